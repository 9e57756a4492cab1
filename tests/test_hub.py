"""The hub: what push sends is what from_pretrained reads, and what cannot be done ends in one line."""

import json
import subprocess
import sys

import pytest
import torch

import msae
from msae.base.errors import ConfigError
from msae.concepts.names import Concept, ConceptNames
from msae.sae.model import SAE, weights_hash
from msae.web import hub as hub_module
from tests.hub_stand_in import TOKEN, Hub
from tests.test_formats import make_sae, rows
from tests.test_model_card import front_matter

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub():
    stand_in = Hub()
    yield stand_in
    stand_in.close()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    sae = make_sae(encoder="openai/clip-vit-base-patch32").with_l0(6, rows())
    sae.save(folder)
    record = {"sae": weights_hash(sae), "on": "/home/me/secret/photos.store"}
    ConceptNames("evidence", sae.d_sae, (Concept(3, "beach", 0.5, 0.1),), {}, (), record).save(folder)
    return folder


def in_python(code, hub, home, **env):
    """Run code in a process of its own: huggingface_hub reads its settings once."""
    known = {name: value for name, value in hub.env(home).items() if env.get(name, "") is not None}
    known |= {name: value for name, value in env.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in __import__("os").environ.items() if not k.startswith("HF_")}, **known},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def command(words, hub, home, **env):
    return in_python(f"from msae.cli import main; main({words!r})", hub, home, **env)


def test_what_is_pushed_comes_back_to_the_byte(hub, run, tmp_path):
    words = ["push", str(run), "me/sae", "--license", "mit", "--private", "--include", "names"]
    code, out, err = command(words, hub, tmp_path / "home")
    assert code == 0, err
    files = hub.repos["me/sae"]
    assert hub.private["me/sae"]
    assert set(files) == {
        "README.md",
        "config.json",
        "names.json",
        "sae.json",
        "sae.safetensors",
        *(f"saelens-image/{name}" for name in ("cfg.json", "sae_weights.safetensors", "msae.safetensors")),
    }
    assert files["sae.safetensors"] == (run / "sae.safetensors").read_bytes()
    assert b"secret" not in b"".join(files.values()) and b"photos.store" in files["names.json"]
    data = front_matter(files["README.md"].decode())
    assert data["license"] == "mit" and data["library_name"] == "msae" and data["pipeline_tag"] == "feature-extraction"
    assert data["base_model"] == "openai/clip-vit-base-patch32" and "metrics" in data
    assert 'msae.SAE.from_pretrained("me/sae")' in files["README.md"].decode()

    code, out, err = in_python(
        "import msae, sys\n"
        "from msae.sae.run import Run\n"
        "from msae.concepts.names import names_of\n"
        f"msae.SAE.from_pretrained('me/sae').save({str(tmp_path / 'a')!r})\n"
        f"msae.SAE.from_pretrained('me/sae', subfolder='saelens-image').save({str(tmp_path / 'b')!r})\n"
        "print(names_of(Run.open('me/sae')).by_name)\n",
        hub,
        tmp_path / "home",
    )
    assert code == 0, err
    for name in ("a", "b"):
        assert (tmp_path / name / "sae.safetensors").read_bytes() == (run / "sae.safetensors").read_bytes()
    assert out.strip() == "{'beach': [3]}"
    # The hub counts a download by this request.
    assert ("GET", "/me/sae/resolve/" + hub.sha("me/sae") + "/config.json") in hub.requests


def test_a_dry_run_sends_nothing_and_lists_what_push_sends(hub, run, tmp_path):
    code, out, err = command(["push", str(run), "me/sae", "--dry-run", "--json", "-"], hub, tmp_path / "home")
    assert code == 0 and not hub.requests, err
    listed = {file["file"]: file["bytes"] for file in json.loads(out)["files"]}
    assert command(["push", str(run), "me/sae"], hub, tmp_path / "home")[0] == 0
    assert listed == {name: len(data) for name, data in hub.repos["me/sae"].items()}
    text = msae.push(run, "me/sae", dry_run=True).to_text()
    assert "nothing was sent" in text and "--license mit" in text and "sae.safetensors" in text


def one_line(result, *words):
    code, out, err = result
    assert code == 1 and out == "" and err.count("\n") == 1 and "unexpected" not in err, (code, out, err)
    for word in words:
        assert word in err


def test_without_rights_it_is_one_line_and_nothing_is_sent(hub, run, tmp_path):
    home = tmp_path / "home"
    one_line(command(["push", str(run), "me/sae"], hub, home, HF_TOKEN=None), "hf auth login", "me/sae")
    one_line(command(["push", str(run), "me/sae"], hub, home, HF_TOKEN="hf_wrong"), "hf auth login")
    one_line(command(["push", str(run), "not-mine/sae"], hub, home), "of your own")
    assert not any(hub.repos.values())


def test_offline_it_is_one_line_and_what_was_downloaded_still_opens(hub, run, tmp_path):
    home = tmp_path / "home"
    assert command(["push", str(run), "me/sae", "--include", "names"], hub, home)[0] == 0
    assert command(["info", str(run)], hub, home)[0] == 0
    load = "import msae; print(msae.SAE.from_pretrained('me/sae').d_sae)"
    assert in_python(load, hub, home)[:2] == (0, "40\n")
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        one_line(
            command(["push", str(run), "me/other"], hub, home, **env), "hub" if "HF_ENDPOINT" in env else "OFFLINE"
        )
        assert in_python(load, hub, home, **env)[:2] == (0, "40\n")
        one_line(command(["export", "me/none", "--to", "saelens", "--out", "x"], hub, home, **env), "me/none")


def test_what_a_repository_lacks_is_said_in_one_line(hub, run, tmp_path):
    home = tmp_path / "home"
    assert command(["push", str(run), "me/sae"], hub, home)[0] == 0
    hub.repos["me/empty"] = {"README.md": b"x"}
    for arguments, word in (
        ("'me/none'", "no repository"),
        ("'me/empty'", "holds no SAE"),
        ("'me/sae', subfolder='elsewhere'", "elsewhere"),
        ("'me/sae', revision='v9'", "v9"),
        ("'../../etc'", ""),
    ):
        code, _, err = in_python(f"import msae; msae.SAE.from_pretrained({arguments})", hub, home)
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("msae.base.errors.RunError") and word in last, err


def test_a_pickle_in_a_repository_is_not_downloaded(hub, tmp_path):
    hub.repos["me/pickled"] = {"config.json": b'{"trainer": {"dict_class": "AutoEncoder"}}', "ae.pt": b"\x80\x04."}
    code, _, err = in_python("import msae; msae.SAE.from_pretrained('me/pickled')", hub, tmp_path / "home")
    assert code == 1 and "holds no SAE" in err
    assert not any("ae.pt" in path for _, path in hub.requests)


def test_an_edited_card_is_sent_as_it_is(run):
    (run / "README.md").write_text("mine\n")
    text = msae.push(run, "me/sae", dry_run=True).to_text()
    assert "edited" in text and "license" not in text


@pytest.mark.parametrize("before", ["/home/me/secret/", "secret/", "../secret/", "~/secret/", "C:\\me\\secret\\",
                                    "C:/me/secret/", "..\\secret\\", "\\\\host\\secret\\", "s3://secret/"])  # fmt: skip
def test_of_a_path_only_the_last_part_is_sent(run, before):
    record = {
        "on": f"{before}photos.store", "vocabulary": f"{before}words.npy", "encoder": "openai/clip-vit-base-patch32",
        "stores": [{"store": f"{before}photos.store"}], "concepts": [{"name": "and/or", "synonyms": ["hot/cold", "."]}],
    }  # fmt: skip
    assert hub_module._without_paths(record) == {
        "on": "photos.store", "vocabulary": "words.npy", "encoder": "openai/clip-vit-base-patch32",
        "stores": [{"store": "photos.store"}], "concepts": [{"name": "and/or", "synonyms": ["hot/cold", "."]}],
    }  # fmt: skip
    kept = "secret/clip" if before == "secret/" else "clip"  # which may be a repository of the hub
    assert hub_module._without_paths({"encoder": f"{before}clip"})["encoder"] == kept


@pytest.mark.parametrize("on", ["secret/pairs.npy", "../secret/pairs.npy", "C:\\my secret\\pairs.npy"])
def test_no_path_is_in_a_page_that_is_sent(hub, run, tmp_path, monkeypatch, on):
    """A page has the paths of its records, as they were given."""
    monkeypatch.chdir(tmp_path)
    data = json.loads((run / "names.json").read_text(encoding="utf-8"))
    (run / "names.json").write_text(json.dumps({**data, "on": on, "rule": "evidence"}), encoding="utf-8")
    (run / "report.html").write_text(
        f"<p>a/b &amp; c/d</p><code>msae name {on} '{on}' &#34;/home/me/secret/x.npy&#34;</code><a href='{on}'>1/2</a>"
    )
    assert command(["push", str(run), "me/sae", "--include", "names", "report"], hub, tmp_path / "home")[0] == 0
    page = hub.repos["me/sae"]["report.html"].decode()
    assert (
        page
        == "<p>a/b &amp; c/d</p><code>msae name pairs.npy 'pairs.npy' &#34;x.npy&#34;</code><a href='pairs.npy'>1/2</a>"
    )
    assert not [name for name, data in hub.repos["me/sae"].items() if b"secret" in data]


def test_no_path_of_this_machine_is_sent(hub, tmp_path):
    folder = tmp_path / "secret" / "run"
    make_sae(encoder="/home/me/secret/clip").with_l0(6, rows()).save(folder)
    page = msae.report(folder).path.read_text(encoding="utf-8")
    assert command(["push", str(folder), "me/sae", "--include", "report"], hub, tmp_path / "home")[0] == 0
    files = hub.repos["me/sae"]
    assert "secret" in page and not [name for name, data in files.items() if b"secret" in data]
    assert b"embedding of clip into" in files["report.html"] and b"of clip" in files["README.md"]


def test_an_address_that_no_record_has_is_its_last_part(hub, run, tmp_path):
    (run / "report.html").write_text(
        "<code>msae find RUN --on s3://secret/a/faces</code> <a href='https://x.org/a/b'>b</a>"
    )
    assert command(["push", str(run), "me/sae", "--include", "report"], hub, tmp_path / "home")[0] == 0
    page = hub.repos["me/sae"]["report.html"].decode()
    assert page == "<code>msae find RUN --on faces</code> <a href='https://x.org/a/b'>b</a>"


def test_a_file_that_is_no_json_is_one_line(hub, run, tmp_path):
    (run / "report.html").write_text("<p>x</p>")
    (run / "notes.json").write_text("not json")
    code, _, error = command(["push", str(run), "me/sae", "--include", "report"], hub, tmp_path / "home")
    assert code == 1 and "notes.json is no JSON" in error and error.count("\n") == 1


def test_what_cannot_be_included_is_said_first(run):
    with pytest.raises(ConfigError, match="msae report"):
        msae.push(run, "me/sae", dry_run=True, include=("report",))
    for bad in ("sae", "a/b/c", "../x", "me/", "me/ x"):
        with pytest.raises(ConfigError, match="OWNER/NAME"):
            msae.push(run, bad, dry_run=True)


def test_a_soft_cap_travels_in_our_files_and_has_no_folder_for_saelens(tmp_path):
    make_sae(soft_cap=5.0).save(tmp_path / "run")
    pushed = msae.push(tmp_path / "run", "me/sae", dry_run=True)
    assert not any(name.startswith("saelens") for name, _ in pushed.files) and any(
        "soft cap" in n for n in pushed.notes
    )


def test_the_config_of_an_imported_sae_is_no_training(hub, tmp_path):
    make_sae().save(tmp_path / "run")
    assert command(["push", str(tmp_path / "run"), "me/sae"], hub, tmp_path / "home")[0] == 0
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in hub.repos["me/sae"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    assert msae.report(folder).path.exists()
    assert msae.info(folder)["d_sae"] == 40
    assert torch.equal(SAE.load(folder).W_enc, SAE.load(tmp_path / "run").W_enc) and TOKEN
