"""The command line is the Python functions with exit codes; its text and its JSON say the same."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import msae
from msae.cli import OVERVIEW, VERBS, main


@pytest.fixture
def store(tmp_path):
    rows = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    return tmp_path / "x.npy"


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as leave:
        main([str(argument) for argument in arguments])
    return leave.value.code


def test_the_overview_names_every_verb(capsys):
    assert run("--help") == 0 and run() == 0
    assert capsys.readouterr().out == OVERVIEW * 2
    assert all(f"\n  {verb}  " in OVERVIEW for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert run(verb, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: msae {verb} ") and "--json" in out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "demo"])
def test_a_verb_without_arguments_says_what_it_lacks(verb, capsys):
    assert run(verb) == 2
    assert re.fullmatch(rf"msae {verb}: .*(missing|required).*\n", capsys.readouterr().err, re.I)


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"msae {msae.__version__}\n"


def test_train_evaluate_info_and_their_json(store, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", store, "--out", out, "--d-sae", 64, "--levels", 8, 64, "--epochs", 2, "--batch-size", 50) == 0
    assert "16 -> 64, 16 steps" in capsys.readouterr().out
    assert run("info", out, "--json", "-") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["state"] == "finished" and described["levels"] == [8, 64]
    assert run("evaluate", out, "--on", store, "--json", tmp_path / "e.json") == 0
    table = capsys.readouterr().out
    (record,) = json.loads((tmp_path / "e.json").read_text())
    assert f"{record['fvu_per_sample']:.3f}".lstrip("0") in table and record["n"] == 400


def test_options_win_over_the_settings_file(store, tmp_path, capsys):
    file = tmp_path / "f.toml"
    file.write_text('kind = "topk"\nk = 8\nd-sae = 64\nepochs = 1\n')
    assert run("train", store, "--out", tmp_path / "run", "--config", file, "--k", 5, "--json", "-") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["kind"], settings["k"], settings["d_sae"]) == ("topk", 5, 64)


def test_debug_shows_the_traceback(tmp_path):
    from msae.base.errors import StoreError

    with pytest.raises(StoreError):
        main(["info", str(tmp_path / "missing.npy"), "--debug"])


def test_ctrl_c_saves_and_says_how_to_go_on(store, tmp_path):
    command = [sys.executable, "-m", "msae", "train", str(store), "--out", str(tmp_path / "run")]
    command += ["--d-sae", "256", "--epochs", "100000", "--batch-size", "50", "--checkpoint-every", "50"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.count("\n") == 1 and "which is saved" in err and "--resume" in err


def test_a_closed_pipe_is_no_error(store):
    command = f"{sys.executable} -m msae info {store} | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
