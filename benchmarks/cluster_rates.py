"""What docs/cluster.md counts with: rates of counting, decoding and finishing on one core.

    python benchmarks/cluster_rates.py --folder FOLDER

Pictures are noise that was blurred, 256 pixels wide, as JPEG of quality 95: as large as those that img2dataset writes.
Rows of the finished store are random; captions and addresses are as long as those of LAION.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from msae.data.chunks import Chunk, Report, chunk_path, write_chunk
from msae.data.embed import _Asked, _finish
from msae.data.embedder import Embedder
from msae.data.images import read_picture
from msae.data.sources import tars
from msae.data.store import EmbeddingStore
from results import write_section


def pictures(n: int) -> list[bytes]:
    draws = np.random.default_rng(0)
    found = []
    for _ in range(n):
        noise = Image.fromarray(draws.integers(0, 255, (256, 256, 3), dtype=np.uint8)).filter(
            ImageFilter.GaussianBlur(1)
        )
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", quality=95)
        found.append(buffer.getvalue())
    return found


def counting(folder: Path, n: int, data: bytes) -> float:
    """Samples a second of three members each."""
    path = folder / "count.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(n):
            for suffix, content in ((".jpg", data), (".txt", b"a caption"), (".json", b"{}")):
                member = tarfile.TarInfo(f"{number:09}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    began = time.perf_counter()
    assert tars.count(path) == n
    return n / (time.perf_counter() - began)


def decoding(data: list[bytes]) -> float:
    """Pictures a second, from JPEG to 224 x 224 numbers."""
    import transformers

    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    began = time.perf_counter()
    for one in data:
        processor(images=[read_picture(one).image], return_tensors="pt")
    return len(data) / (time.perf_counter() - began)


def finishing(folder: Path, n: int, d_in: int, chunk: int) -> tuple[float, float, EmbeddingStore]:
    """Rows a second of images and texts, and the peak of the process's own memory in bytes."""
    out = folder / "finish.store"
    shutil.rmtree(out, ignore_errors=True)
    draws = np.random.default_rng(0)
    rows = {name: draws.standard_normal((chunk, d_in)).astype(np.float16) for name in ("image", "text")}
    for number in range(n // chunk):
        ids = [f"{i:012}" for i in range(number * chunk, (number + 1) * chunk)]
        words = [" ".join(f"{word:04x}" for word in draws.integers(0, 1 << 16, 12)) for _ in ids]
        columns = {"id": ids, "caption": words, "url": [f"https://pictures.example/{word}.jpg" for word in words]}
        write_chunk(chunk_path(out / ".partial" / "chunks", number), Chunk(rows, pa.table(columns), Report(chunk)))
    asked = _Asked("synthetic", "", "demo", "", None, "float32", 65_536)
    state = {**vars(asked), "pixel_backend": "pil"}
    peak, is_over = 0, False

    def look() -> None:
        nonlocal peak
        while not is_over:
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = max(peak, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
            time.sleep(0.01)

    watching = threading.Thread(target=look)
    watching.start()
    began = time.perf_counter()
    store = _finish(out, state, [])
    seconds = time.perf_counter() - began
    is_over = True
    watching.join()
    return n / seconds, peak, store


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=409_600)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    data = pictures(400)
    counted, decoded = counting(given.folder, 10_000, data[0]), decoding(data)
    Embedder.load("demo")  # torch and transformers are no part of the growth
    _, small, _ = finishing(given.folder, given.rows // 4, 512, 4096)
    rate, large, store = finishing(given.folder, given.rows, 512, 4096)
    growth = (large - small) / (given.rows - given.rows // 4)
    files = sum(path.stat().st_size for path in (store.path / "metadata").iterdir())
    write_section(
        "cluster-rates",
        "Embedding by several processes: rates of one core",
        f"""| step | rate |
|---|---:|
| headers of a tar, samples of three members | {counted:,.0f} samples/s |
| JPEG of {sum(map(len, data)) / len(data) / 1024:.0f} KB, 256 x 256, to what CLIP takes in | {decoded:,.0f} images/s |
| `--finish`, {given.rows:,} rows of images and texts, d_in 512, with the fingerprint | {rate:,.0f} rows/s |
| peak of own memory against a quarter of the rows | {growth:,.0f} bytes a row |
| metadata on disk: id, address, caption of 60 random letters | {files / given.rows:,.0f} bytes a row |""",
    )


if __name__ == "__main__":
    main()
