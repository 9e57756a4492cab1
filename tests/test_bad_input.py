"""Bad input through the command line: one line on stderr, exit code 1 or 2, nothing changed on disk."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from msae.cli import main
from msae.sae.train import train
from tests.conftest import needs_posix

N, D_IN = 300, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a good store, a trained run, and everything broken that a command may be given."""
    root = tmp_path_factory.mktemp("world")
    rows = np.random.default_rng(0).normal(size=(N, D_IN)).astype(np.float32)
    np.save(root / "good.npy", rows)
    (root / "good.csv").write_text("id,label\n" + "".join(f"r{i},{'ab'[i % 2]}\n" for i in range(N)))
    train(root / "good.npy", out=root / "run", d_sae=64, epochs=1, batch_size=64, device="cpu")
    _broken_stores(root, rows)
    _broken_runs(root)
    _broken_settings(root)
    _broken_sources(root)
    return root


def _broken_stores(root: Path, rows: np.ndarray) -> None:
    np.save(root / "wide.npy", np.hstack([rows, rows]))
    np.save(root / "empty.npy", rows[:0])
    np.save(root / "flat.npy", rows[0])
    np.save(root / "words.npy", np.array([["a", "b"]]))
    np.save(root / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(root / "same.npy", np.ones((50, D_IN), np.float32))
    for name, bad in (("nan", np.nan), ("inf", np.inf)):
        broken = rows.copy()
        broken[41, 3] = bad
        np.save(root / f"{name}.npy", broken)
    (root / "truncated.npy").write_bytes((root / "good.npy").read_bytes()[:-400])
    (root / "headerless.npy").write_bytes(rows.tobytes())
    np.save(root / "short.npy", rows)
    (root / "short.csv").write_text("id,label\nr0,a\n")
    np.save(root / "twice.npy", rows)
    (root / "twice.csv").write_text("id\n" + "same\n" * N)
    (root / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (root / "broken.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")
    save_file({"a": rows, "b": rows}, root / "two.safetensors")
    (root / "store.txt").write_text("not embeddings")
    (root / "nothing").mkdir()
    (root / "torn.store").mkdir()
    (root / "torn.store/store.json").write_text('{"schema_version": 1')


def _broken_runs(root: Path) -> None:
    for name in ("torn", "schema", "weightless", "damaged"):
        (root / f"run-{name}").mkdir()
        for file in (root / "run").iterdir():
            if file.is_file():
                (root / f"run-{name}" / file.name).write_bytes(file.read_bytes())
    (root / "run-torn/sae.json").write_text("{")
    (root / "run-schema/sae.json").write_text(json.dumps({"schema_version": 7}))
    (root / "run-weightless/sae.safetensors").unlink()
    (root / "run-damaged/sae.safetensors").write_bytes(b"\x08" + bytes(15))


def _broken_settings(root: Path) -> None:
    (root / "syntax.toml").write_text("lr = = 1")
    (root / "key.toml").write_text("epoch = 3")
    (root / "type.toml").write_text('epochs = "three"')
    (root / "latin.toml").write_bytes(b'kind = "\xff"')


def _broken_sources(root: Path) -> None:
    (root / "images").mkdir()
    (root / "images/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (root / "images/empty.jpg").write_bytes(b"")
    (root / "columns.csv").write_text("a,b\n1,2\n")
    (root / "captions.txt").write_text("a red star\n")
    (root / "blank.txt").write_text("\n\n")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (root / "bad.jsonl").write_text('{"caption": "a"}\n{"caption": \n')
    (root / "not-a-clip").mkdir()
    (root / "not-a-clip/config.json").write_text('{"model_type": "bert"}')


TRAIN = "--out new --device cpu"
CASES = [
    # What is trained on.
    (f"train missing.npy {TRAIN}", 1, "missing.npy does not exist"),
    (f"train empty.npy {TRAIN}", 1, "empty.npy"),
    (f"train flat.npy {TRAIN}", 1, "flat.npy"),
    (f"train words.npy {TRAIN}", 1, "words.npy"),
    (f"train objects.npy {TRAIN}", 1, "objects.npy"),
    (f"train same.npy {TRAIN}", 1, "the same vector"),
    (f"train nan.npy {TRAIN}", 1, "41"),
    (f"train inf.npy {TRAIN}", 1, "41"),
    (f"train truncated.npy {TRAIN}", 1, "truncated.npy"),
    (f"train headerless.npy {TRAIN}", 1, "headerless.npy"),
    (f"train short.npy {TRAIN}", 1, "short"),
    (f"train broken.parquet {TRAIN}", 1, "broken.parquet"),
    (f"train broken.safetensors {TRAIN}", 1, "broken.safetensors"),
    (f"train two.safetensors {TRAIN}", 1, "two.safetensors"),
    (f"train store.txt {TRAIN}", 1, "store.txt"),
    (f"train nothing {TRAIN}", 1, "nothing"),
    (f"train torn.store {TRAIN}", 1, "store.json"),
    # How.
    (f"train good.npy {TRAIN} --kind topk --k 999", 1, "k 999 is not between 1 and d_sae 128"),
    (f"train good.npy {TRAIN} --levels 64 32", 1, "do not strictly increase"),
    (f"train good.npy {TRAIN} --levels 8 4096", 1, "level 4096 is above d_sae 128"),
    (f"train good.npy {TRAIN} --levels 8 64 --weights 1", 1, "one weight for each"),
    (f"train good.npy {TRAIN} --lr 0", 1, "--lr 0.0 is not positive"),
    (f"train good.npy {TRAIN} --epochs -1", 1, "--epochs -1 is not positive"),
    (f"train good.npy {TRAIN} --kind relu --weighting reverse", 1, "belong to matryoshka"),
    (f"train good.npy {TRAIN} --config missing.toml", 1, "missing.toml does not exist"),
    (f"train good.npy {TRAIN} --config syntax.toml", 1, "not readable TOML"),
    (f"train good.npy {TRAIN} --config key.toml", 1, "unknown setting 'epoch'; did you mean 'epochs'"),
    (f"train good.npy {TRAIN} --config type.toml", 1, "epochs = 'three'"),
    (f"train good.npy {TRAIN} --config latin.toml", 1, "latin.toml"),
    ("train good.npy --out new --device abacus", 1, "device abacus"),
    ("train good.npy --out run", 1, "already holds a run; add --resume"),
    ("train good.npy --out run --resume --seed 5", 1, "was started with"),
    ("train good.npy --out nothing/../good.csv", 1, "good.csv"),
    ("train good.npy", 2, "--out is missing"),
    (f"train good.npy {TRAIN} --kind topp", 2, "invalid choice 'topp'"),
    (f"train good.npy {TRAIN} --levls 4", 2, "did you mean --levels"),
    (f"train good.npy {TRAIN} --k many", 2, "'many'"),
    # What is evaluated.
    ("evaluate missing --on good.npy", 1, "missing"),
    ("evaluate nothing --on good.npy", 1, "sae.json"),
    ("evaluate run-torn --on good.npy", 1, "not readable JSON"),
    ("evaluate run-schema --on good.npy", 1, "schema version 7"),
    ("evaluate run-weightless --on good.npy", 1, "sae.safetensors does not exist"),
    ("evaluate run-damaged --on good.npy", 1, "sae.safetensors is damaged"),
    ("evaluate run --on wide.npy", 1, "32"),
    ("evaluate run --on nan.npy", 1, "41"),
    ("evaluate run --on empty.npy", 1, "empty.npy"),
    ("evaluate run --on good.npy --inference topk", 1, "--k"),
    ("evaluate run --on good.npy --inference topk --k 0", 1, "k 0"),
    ("evaluate run --on good.npy --labels lable", 1, "'label'"),
    ("evaluate run --on good.npy --modality sound", 2, "sound"),
    ("evaluate run", 2, "--on is missing"),
    # What is embedded.
    ("embed missing --encoder demo --out new", 1, "missing"),
    ("embed nothing --encoder demo --out new", 1, "nothing"),
    ("embed images --encoder demo --out new", 1, "images"),
    ("embed columns.csv --encoder demo --out new", 1, "columns.csv"),
    ("embed blank.txt --encoder demo --out new", 1, "blank.txt"),
    ("embed latin.txt --encoder demo --out new", 1, "latin.txt"),
    ("embed bad.jsonl --encoder demo --out new", 1, "bad.jsonl"),
    ("embed captions.txt --encoder not-a-clip --out new", 1, "not-a-clip"),
    ("embed captions.txt --encoder nobody/nothing-of-that-name --out new", 1, "nobody/nothing-of-that-name"),
    ("embed captions.txt --encoder demo --out run", 1, "run"),
    ("embed captions.txt --encoder demo", 2, "--out is missing"),
    # The rest.
    ("info missing", 1, "missing"),
    ("info nothing", 1, "nothing is neither a store nor a run"),
    ("info good.csv", 1, "good.csv"),
    ("info run/sae.json", 1, "is a part of the run"),
    ("info run/metrics.jsonl", 1, "is a part of the run"),
    ("info not-a-clip", 1, "not-a-clip is neither a store nor a run"),
    ("info", 2, "PATH is missing"),
    ("evaluate --on good.npy", 2, "RUN... is missing"),
    ("stability", 2, "RUN... is missing"),
    ("explore", 2, "RUN... is missing"),
    ("stability run", 1, "at least two runs"),
    ("evaluate good.npy --on good.npy", 1, "good.npy is a file, not a run"),
    ("gallery good.npy --on good.npy --latent 3", 1, "good.npy is a file, not a run"),
    ("name good.npy --vocabulary good.npy", 1, "good.npy is a file, not a run"),
    ("search good.npy --on good.npy --like r0", 1, "good.npy is a file, not a run"),
    ("audit good.npy --on good.npy --target label", 1, "good.npy is a file, not a run"),
    ("explore good.npy", 1, "good.npy is a file, not a run"),
    ("report good.npy", 1, "good.npy is no run folder"),
    ("report nothing", 1, "nothing"),
    ("gallery run --on good.npy --latent 3 --k 3", 1, "add --tree"),
    ("gallery run --on good.npy --tree --latent 3", 1, "--tree is of all latents and takes no --latent"),
    ("gallery run --on good.npy --tree --magnitudes", 1, "takes no --magnitudes"),
    ("info good.npy --json nothing", 1, "nothing"),
    ("trian good.npy", 2, "did you mean 'train'"),
    ("evaluate run --on good.npy --json nothing/x/../../good.npy/y.json", 1, "good.npy"),
]


def snapshot(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(("command", "code", "message"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_line_and_changes_nothing(command, code, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = snapshot(world)
    with pytest.raises(SystemExit) as leave:
        main(command.split())
    out, err = capsys.readouterr()
    assert leave.value.code == code, err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err and "unexpected" not in err, err
    assert out == ""
    assert snapshot(world) == before, "something changed on disk"


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40


@needs_posix
@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_a_place_that_is_not_writable_is_one_line(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    (world / "locked").mkdir(mode=0o500)
    with pytest.raises(SystemExit) as leave:
        main(["train", "good.npy", "--out", "locked/run", "--device", "cpu"])
    assert leave.value.code == 1 and "locked" in capsys.readouterr().err
