"""A small world for the explorer's tests: scenes, a trained SAE with names, and rows that mean harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msae
from msae.world.chain import write_scenes
from msae.world.scenes import UNSEEN_SEEDS, WORDS

N = 360
HOSTILE = '<img src=x onerror="window.hurt=1">'
SECRET = "secret.png"


def make_world(folder: Path) -> Path:
    """`folder` with scenes.store, runs/named and runs/plain; its first rows have hostile captions and paths."""
    import csv

    write_scenes(folder / "scenes", range(UNSEEN_SEEDS.start, UNSEEN_SEEDS.start + N))
    file = folder / "scenes" / "scenes.csv"
    with file.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    rows[0] |= {"caption": HOSTILE, "id": HOSTILE, "background": "<script>window.hurt=1</script>"}
    (folder / SECRET).write_bytes((folder / "scenes" / rows[1]["image_path"]).read_bytes())
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    msae.embed(file, encoder="demo", out=folder / "scenes.store", batch_size=128)
    _move_picture(folder / "scenes.store", row=1, path=f"../{SECRET}")
    words = folder / "words.txt"
    words.write_text("\n".join([*WORDS, HOSTILE]) + "\n", encoding="utf-8")
    vocabulary = msae.embed(words, encoder="demo", out=folder / "words.store")
    options = {"d_sae": 96, "epochs": 12, "batch_size": 32, "lr": 2e-3}
    store = folder / "scenes.store"
    msae.train(
        store, out=folder / "runs/named", weighting="reverse", levels=(6, 12, 24, 96), inference_l0=24, **options
    )
    msae.train(store, out=folder / "runs/plain", kind="topk", k=8, **options)
    msae.name(folder / "runs/named", vocabulary)
    return folder


def _move_picture(store: Path, *, row: int, path: str) -> None:
    """Let a row of the store list another picture, as a forged store would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = store / "metadata" / "metadata_0.parquet"
    table = pq.read_table(file)
    paths = table.column("image_path").to_pylist()
    paths[row] = path
    pq.write_table(table.set_column(table.schema.get_field_index("image_path"), "image_path", pa.array(paths)), file)


@contextmanager
def served(runs, on, folder: Path):
    """The address of `msae explore`, in a process of its own that ends with Ctrl-C; `folder` takes what it says."""
    told, said = folder / "address.json", folder / "said.txt"
    told.unlink(missing_ok=True)
    store = [] if on is None else ["--on", str(on)]
    command = [sys.executable, "-m", "msae", "explore", *map(str, runs), *store, "--port", "0", "--json", str(told)]
    with said.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        while not told.exists():
            assert process.poll() is None, said.read_text()
            time.sleep(0.05)
        yield json.loads(told.read_text())["url"].rstrip("/")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, said.read_text()
    assert "Traceback" not in said.read_text(), said.read_text()
