"""Laws of `Run`: one reader of a run folder, and one place that decides what still holds."""

import json
import shutil

import numpy as np
import pytest
import torch

from msae.base.errors import RunError
from msae.base.files import write_json
from msae.data.store import as_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.run import NoTrainingStoreError, Run
from msae.sae.standardize import Standardizer, Statistics
from msae.sae.train import describe_run

X = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.csv").write_text("id\n" + "".join(f"row {i}\n" for i in range(len(X))))
    return tmp_path / "x.npy"


@pytest.fixture
def folder(tmp_path, store):
    SAE(SAEConfig(6, 12, levels=(4, 12)), Standardizer({"image": Statistics(torch.zeros(6), 1.0)})).save(tmp_path / "r")
    settings = {"store": str(store), "store_fingerprint": as_store(store).fingerprint, "modality": "image", "train": {}}
    write_json(tmp_path / "r" / "config.json", settings, schema_version=1)
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return tmp_path / "r"


def test_a_run_is_the_same_however_it_is_given(folder):
    run = Run.open(str(folder))
    assert Run.open(run) is run
    assert Run.open(folder / "sae.safetensors").folder == run.folder == folder
    assert run.sae is run.sae and run.name == str(folder)
    assert run.settings["modality"] == "image" and [row["step"] for row in run.metrics] == [1, 2]


def test_an_sae_is_a_run_without_a_folder(folder):
    sae = SAE.load(folder)
    run = Run.open(sae)
    assert run.sae is sae and run.name == "the matryoshka SAE" and run.weights == Run.open(folder).weights
    assert (run.folder, run.settings, run.metrics, run.checkpoints, run.names_file) == (None, {}, [], [], None)
    assert run.caches("samples") == () and run.writable_cache("samples") is None and run.cached_files("eval") == []


def test_what_is_no_run_is_one_line(folder, tmp_path):
    with pytest.raises(RunError, match=r"nowhere does not exist"):
        Run.open(tmp_path / "nowhere")
    (folder / "sae.json").unlink()
    with pytest.raises(RunError, match=r"holds no sae.json"):
        _ = Run.open(folder).sae
    for name, text in (("config.json", "{"), ("metrics.jsonl", "{"), ("metrics.jsonl", "[1]")):
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(RunError, match=name):
            _ = (Run.open(folder).settings, Run.open(folder).metrics)
        (folder / name).write_text(whole)


def test_what_is_derived_holds_until_any_of_its_inputs_changes(folder, store):
    run = Run.open(folder)
    origin = run.origin(as_store(store))
    assert run.holds(origin) and run.holds(origin, as_store(store))

    table = store.with_suffix(".csv").read_text()
    store.with_suffix(".csv").write_text(table.replace("row 1230\n", "row 9999\n"))
    assert not run.holds(origin) and not run.holds(origin, as_store(store)) and run.holds(origin, metadata=False)
    store.with_suffix(".csv").write_text(table)
    assert run.holds(origin)

    changed = X.copy()
    changed[1230] += 1
    np.save(store, changed)
    assert not run.holds(origin) and not run.holds(origin, metadata=False)
    np.save(store, X)
    assert run.holds(origin)


@pytest.mark.parametrize("change", [{"soft_cap": 3.0}, {"levels": (2, 12)}, {"kind": "relu", "levels": None}])
def test_other_settings_of_the_sae_are_other_weights(folder, store, change):
    origin = Run.open(folder).origin(as_store(store))
    record = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**record, **change}))
    assert not Run.open(folder).holds(origin)


def test_other_weights_or_statistics_are_seen(folder, store):
    origin = Run.open(folder).origin(as_store(store))
    sae = SAE.load(folder)
    sae.standardizer = Standardizer({"image": Statistics(torch.zeros(6), 1.5)})
    assert not Run.open(sae).holds(origin)
    sae = SAE.load(folder)
    with torch.no_grad():
        sae.b_dec[5] = 1e-6
    assert not Run.open(sae).holds(origin)


def test_a_store_that_is_gone_has_not_changed(folder, store):
    run = Run.open(folder)
    origin = run.origin(as_store(store))
    store.rename(store.with_name("moved.npy"))
    assert run.holds(origin)
    store.write_bytes(b"no array")
    assert not run.holds(origin)


def test_a_training_store_with_one_other_row_is_another_store(folder, store):
    assert Run.open(folder).training_store().path == store
    changed = X.copy()
    changed[1] += 1
    np.save(store, changed)
    with pytest.raises(NoTrainingStoreError, match="is no longer what"):
        Run.open(folder).training_store()


def test_a_fingerprint_of_256_rows_is_not_believed(folder):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "store_fingerprint": "f" * 32}, schema_version=1)
    with pytest.raises(NoTrainingStoreError, match="by an earlier msae, which did not record all rows"):
        Run.open(folder).training_store()


def test_caches_lie_in_the_run_or_where_that_cannot_be_written_in_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Run.open(folder)
    assert run.writable_cache("samples") == folder / "samples"
    shutil.rmtree(folder / "samples")
    (folder / "samples").write_text("a file where a folder should be")
    spare = run.writable_cache("samples")
    assert tmp_path / "cache" in spare.parents and spare in run.caches("samples")
    (spare / "one.json").write_text("{}")
    assert Run.open(folder).cached_files("samples") == [spare / "one.json"]


def test_an_sae_that_was_imported_is_described(folder):
    (folder / "config.json").unlink()
    assert describe_run(folder)["state"] == "an SAE that was not trained here" and describe_run(folder)["d_sae"] == 12
