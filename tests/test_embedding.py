"""Laws of embedding: rows are the model's own and belong to their ids, whatever stops the work."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from msae.base.errors import ConfigError, EmbedderError, Interrupted, MsaeError, SourceError, StoreError
from msae.data.embed import embed
from msae.data.embedder import Embedder
from msae.data.images import read_picture
from msae.data.sources import Source, SourceItem
from msae.data.store import EmbeddingStore
from tests.conftest import needs_posix
from tests.tiny_clip import make_encoder

KINDS = ("clip", "siglip", "siglip2")
CAPTIONS = [
    "a red cat",
    "the blue dog on a photo",
    "two",
    "a photo of the green dog and a red cat",
    "Blue DOG",
]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: make_encoder(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def clip(encoders) -> Embedder:
    return Embedder.load(encoders["clip"], dtype="float32")


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def photos(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        (folder / f"{number:03}.png").write_bytes(png(number))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(n: int, *, stop_at: int | None = None, seen: list[int] | None = None) -> Source:
    """A source in memory that can be interrupted at a position and that notes what was read of it."""

    def items(start: int) -> Iterator[SourceItem]:
        for number in range(start, n):
            if number == stop_at:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append(number)
            image = b"broken" if number % 5 == 3 else png(number)
            yield SourceItem(f"s{number}", image, f"a red cat {number}\nand more", {"label": number % 3})

    return Source("samples", True, True, f"{n}", items, total=n)


# the model's own numbers


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers_called_directly(kind, encoders):
    import transformers

    folder = encoders[kind]
    embedder = Embedder.load(folder, dtype="float32")
    classes = {
        "clip": (transformers.CLIPModel, transformers.CLIPImageProcessorPil),
        "siglip": (transformers.SiglipModel, transformers.SiglipImageProcessorPil),
        "siglip2": (transformers.Siglip2Model, transformers.Siglip2ImageProcessorPil),
    }
    model = classes[kind][0].from_pretrained(folder).eval()
    processor = classes[kind][1].from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = [picture(i, (40 + i, 64 - i)) for i in range(5)]
    with torch.no_grad():
        wanted_images = [
            model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output for image in images
        ]
        wanted_texts = []
        for caption in CAPTIONS:  # one by one: neither batch nor padding may matter
            padding = {} if kind == "clip" else {"padding": "max_length"}
            tokens = tokenizer(caption.lower(), return_tensors="pt", max_length=12, truncation=True, **padding)[
                "input_ids"
            ]
            wanted_texts.append(model.get_text_features(input_ids=tokens).pooler_output)
    for found, wanted in [
        (embedder.embed_images(images), wanted_images),
        (embedder.embed_texts(CAPTIONS), wanted_texts),
    ]:
        rows = torch.cat(wanted)
        rows = (rows / rows.norm(dim=1, keepdim=True)).numpy()
        assert found.dtype == np.float32
        # float32 products in batches of another size sum in another order
        np.testing.assert_allclose(found, rows, atol=2e-6)
        assert np.abs(rows[0] - rows[1]).max() > 1e-3  # the model does tell its inputs apart
    assert embedder.d_in == 16


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_embeddings_point_where_float32_ones_do(kind, encoders):
    exact, rough = (Embedder.load(encoders[kind], dtype=dtype) for dtype in ("float32", "bfloat16"))
    images = [picture(i) for i in range(4)]
    for a, b in [
        (exact.embed_images(images), rough.embed_images(images)),
        (exact.embed_texts(CAPTIONS), rough.embed_texts(CAPTIONS)),
    ]:
        assert (a * b).sum(1).min() > 0.995  # 8 bits of mantissa through random weights ten times the usual size


def test_a_caption_beyond_the_context_is_cut_and_counted(clip):
    long = "a red cat on the blue dog and a green photo of two"
    cut = " ".join(long.split()[:10])  # twelve tokens with the first and the last
    np.testing.assert_allclose(clip.embed_texts([long]), clip.embed_texts([cut]), atol=2e-6)
    assert clip.count_truncated([long, cut, "two"]) == 1


def test_the_revision_of_a_folder_changes_with_its_weights(encoders, tmp_path):
    other = make_encoder(tmp_path / "other", seed=1)
    assert Embedder.load(other).revision != Embedder.load(encoders["clip"]).revision
    shutil.copytree(other, tmp_path / "copy")
    assert Embedder.load(other).revision == Embedder.load(tmp_path / "copy").revision


# pictures


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_colour_mode_becomes_rgb_as_it_looks():
    rgb = picture(0)
    grey = rgb.convert("L")
    half = rgb.copy()
    half.putalpha(Image.new("L", rgb.size, 0))
    white = Image.new("RGB", rgb.size, "white")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: 90 degrees clockwise to show it
    cases = {
        "plain": (saved(rgb), rgb, ()),
        "grey": (saved(grey), grey.convert("RGB"), ("L to RGB",)),
        "transparent": (saved(half), white, ("transparency to white",)),
        "16 bit": (saved(wide), grey.convert("RGB"), ("16-bit to 8-bit",)),
        "cmyk": (saved(rgb.convert("CMYK"), "TIFF"), rgb, ("CMYK to RGB",)),
        "turned": (saved(rgb, exif=exif), rgb.transpose(Image.Transpose.ROTATE_270), ("turned upright",)),
        "animated": (saved(rgb, "GIF", save_all=True, append_images=[picture(1)]), None, None),
    }
    for name, (data, wanted, conversions) in cases.items():
        found = read_picture(data)
        assert found.image.mode == "RGB", name
        if wanted is not None:
            assert np.array_equal(np.asarray(found.image), np.asarray(wanted)), name
            assert found.conversions == conversions, name
    assert "first frame of several" in read_picture(cases["animated"][0]).conversions


ZOO = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"<html>404</html>", "not an image"),
    "cut.jpg": (saved(picture(0), "JPEG")[:400], "damaged: "),
    "cut.png": (png(0)[:60], "damaged: "),
    "bomb.png": (saved(Image.new("1", (12_000, 12_000))), "too large: 12000 x 12000"),
    "huge-bomb.png": (saved(Image.new("1", (14_000, 14_000))), "too large: "),
    "thin.png": (saved(Image.new("RGB", (1000, 1))), "too long and thin: 1000 x 1"),
    "float.tif": (saved(Image.new("F", (8, 8)), "TIFF"), "floating-point pixels"),
}


def test_a_bad_image_is_listed_with_its_reason_and_shifts_no_row(encoders, clip, tmp_path):
    folder = photos(tmp_path / "photos", 11)
    for name, (data, _) in ZOO.items():
        (folder / f"00{len(name) % 10}{name}").write_bytes(data)  # sorted in between the good ones
    (folder / "003grey.png").write_bytes(saved(picture(0).convert("L")))
    (folder / "004folder.png").mkdir()
    (folder / "005dangling.png").symlink_to(tmp_path / "nowhere")
    store = embed(folder, encoder=clip, out=tmp_path / "x.store", batch_size=3)
    reasons = {entry.id[3:]: entry.reason for entry in store.skipped}
    for name, (_, reason) in ZOO.items():
        assert reasons.pop(name).startswith(reason), name
    assert reasons == {"dangling.png": "no such file"}
    good = [f"{i:03}.png" for i in range(11)]
    assert sorted(store.ids) == sorted([*good, "003grey.png"])
    for row, id in enumerate(store.ids):
        wanted = clip.embed_images([read_picture(folder / id).image])[0]
        np.testing.assert_allclose(store.take(np.array([row]), "image")[0], wanted, atol=5e-4)  # float16
    counts = store.describe()["counts"]
    assert (counts["inputs"], counts["rows"], counts["skipped"]) == (len(ZOO) + 13, 12, len(ZOO) + 1)
    assert counts["converted"] == {"L to RGB": 1}


def test_an_image_and_its_caption_are_one_row(clip, tmp_path):
    store = embed(samples(23), encoder=clip, out=tmp_path / "x.store", batch_size=2, shard_rows=4)
    kept = [number for number in range(23) if number % 5 != 3]
    assert store.modalities == ("image", "text")
    assert list(store.ids) == [f"s{number}" for number in kept]
    assert store.column("label") == [number % 3 for number in kept]
    assert store.column("caption") == [f"a red cat {number}\nand more" for number in kept]
    rows = np.arange(len(kept))
    # float16 keeps three digits
    texts = clip.embed_texts([f"a red cat {number}\nand more" for number in kept])
    np.testing.assert_allclose(store.take(rows, "text"), texts, atol=5e-4)
    images = clip.embed_images([picture(number) for number in kept])
    np.testing.assert_allclose(store.take(rows, "image"), images, atol=5e-4)


def test_captions_that_are_empty_are_skipped_and_repeated_ids_numbered(clip, tmp_path):
    (tmp_path / "c.csv").write_text('id,text,note\na,red,1\na,"  ",2\nb,,3\na,"two\nlines",4\n')
    store = embed(tmp_path / "c.csv", encoder=clip, out=tmp_path / "x.store")
    assert store.modalities == ("text",)
    assert list(store.ids) == ["a", "a#2"]
    assert store.column("caption") == ["red", "two\nlines"]
    assert store.column("note") == [1, 4]
    assert [(entry.id, entry.reason) for entry in store.skipped] == [
        ("a", "empty caption"),
        ("b", "empty caption"),
    ]


# interruptions


@pytest.mark.parametrize("stop_at", [0, 1, 20, 25, 31, 38])
def test_a_resumed_run_embeds_nothing_twice_and_ends_in_the_same_bytes(stop_at, clip, tmp_path):
    options = {"encoder": clip, "batch_size": 2, "shard_rows": 7, "workers": 1}  # chunks of 8 samples
    embed(samples(39), out=tmp_path / "whole.store", **options)
    out = tmp_path / "x.store"
    with pytest.raises(
        Interrupted, match=r"interrupted; .* to go on, type: msae\.embed\(SOURCE, encoder=.*, shard_rows=7\)$"
    ):
        embed(samples(39, stop_at=stop_at), out=out, **options)
    n_kept = 8 * len(list(out.glob(".partial/chunks/*")))
    assert n_kept >= stop_at - 32  # some samples were read ahead
    if n_kept:
        with pytest.raises(StoreError, match=r"unfinished: embedding was interrupted; to go on, type: msae\.embed\("):
            EmbeddingStore.open(out)
    else:
        assert not out.exists()
    seen: list[int] = []
    embed(samples(39, seen=seen), out=out, **options)
    assert seen == list(range(n_kept, 39))
    assert files(out) == files(tmp_path / "whole.store")


def test_embedding_killed_at_ten_random_moments_ends_in_the_same_bytes(encoders, tmp_path):
    source = photos(tmp_path / "photos", 40)
    (source / "030broken.png").write_bytes(b"broken")
    command = [sys.executable, str(Path(__file__).parent / "killed_embedding.py")]
    arguments = [str(source), str(encoders["clip"]), str(tmp_path), "10"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = files(tmp_path / "whole.store")
    assert "store.json" in wanted
    for trial in trials:
        assert files(Path(trial["out"])) == wanted
        assert (
            trial["opened"]
            or "unfinished" in trial["error"]
            or "does not exist" in trial["error"]
            or "is no store" in trial["error"]
        )
    assert sum(trial["killed"] for trial in trials) >= 8
    assert sum(trial["killed"] and trial["chunks"] > 0 for trial in trials) >= 5


def test_a_finished_store_is_returned_and_never_changed(encoders, clip, tmp_path):
    out = tmp_path / "x.store"
    source = photos(tmp_path / "photos", 5)
    embed(source, encoder=encoders["clip"], out=out, dtype="float32")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert len(embed(source, encoder=encoders["clip"], out=out)) == 5
    other = photos(tmp_path / "others", 4)
    for changed, message in [
        ({"source": other}, "made of the source"),
        ({"encoder": encoders["siglip"]}, "made of encoder"),
        ({"dtype": "bfloat16"}, "made of precision float32"),
        ({"shard_rows": 3}, "made of shard rows 65536"),
    ]:
        asked = {"source": source, "encoder": encoders["clip"], "out": out, **changed}
        with pytest.raises(StoreError, match=message):
            embed(asked.pop("source"), **asked)
    (source / "new.png").write_bytes(png(99))
    with pytest.raises(StoreError, match="made of an earlier state of"):
        embed(source, encoder=encoders["clip"], out=out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_unfinished_store_goes_on_only_as_it_was_begun(encoders, clip, tmp_path):
    out = tmp_path / "x.store"
    with pytest.raises(Interrupted, match="interrupted"):
        embed(samples(39, stop_at=36), encoder=clip, out=out, batch_size=2)
    before = files(out)
    with pytest.raises(StoreError, match=r"was begun with .*; to go on, type: msae\.embed\(SOURCE, "):
        embed(samples(40), encoder=clip, out=out, batch_size=2)
    with pytest.raises(StoreError, match=r"was begun with encoder .*clip; to go on"):
        embed(samples(39), encoder=encoders["siglip"], out=out, batch_size=2, dtype="float32")
    assert files(out) == before
    assert len(embed(samples(39), encoder=clip, out=out, batch_size=5)) == 31


@needs_posix
def test_two_processes_do_not_write_one_store(clip, tmp_path):
    import fcntl

    out = tmp_path / "x.store"
    with pytest.raises(Interrupted, match="interrupted"):
        embed(samples(39, stop_at=36), encoder=clip, out=out, batch_size=2)
    with (out / ".partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="is being written by another process"):
            embed(samples(39), encoder=clip, out=out, batch_size=2)
    assert len(embed(samples(39), encoder=clip, out=out, batch_size=2)) == 31


# what is wrong


def copy(encoder: Path, to: Path) -> Path:
    return Path(shutil.copytree(encoder, to))


def bad_encoders(clip: Path, folder: Path) -> dict[str, str | Path]:
    cut = copy(clip, folder / "cut")
    (cut / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:5000])
    pickled = copy(clip, folder / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    bert = copy(clip, folder / "bert")
    (bert / "config.json").write_text('{"model_type": "bert"}')
    unreadable = copy(clip, folder / "unreadable")
    (unreadable / "config.json").write_text("{")
    no_tokenizer = copy(clip, folder / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (no_tokenizer / name).unlink()
    no_pixels = copy(clip, folder / "no-pixels")
    (no_pixels / "preprocessor_config.json").unlink()
    incomplete = copy(clip, folder / "incomplete")
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    (folder / "nothing").mkdir()
    return {
        "does not exist; did you mean 'pickled'?": folder / "pickle",
        "holds no config.json": folder / "nothing",
        "the hub does not give it": "no-such-owner/no-such-model",
        "is a 'bert' model; wanted CLIP (also of open_clip), SigLIP or SigLIP 2": bert,
        "its config.json cannot be read": unreadable,
        "cut: its weights (model.safetensors) cannot be read": cut,
        "pickled: its weights (model.safetensors) cannot be read": pickled,
        "has no tokenizer": no_tokenizer,
        "incomplete: its weights lack text_projection.weight": incomplete,
        "its preprocessor_config.json cannot be read": no_pixels,
    }


def test_a_bad_encoder_is_one_line_and_leaves_nothing(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = photos(tmp_path / "photos", 2)
    for message, encoder in bad_encoders(encoders["clip"], tmp_path).items():
        with pytest.raises(EmbedderError) as caught:
            embed(source, encoder=encoder, out=tmp_path / "x.store")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x.store").exists()
    with pytest.raises(ConfigError, match="device tpu cannot be used here"):
        Embedder.load(encoders["clip"], device="tpu")
    with pytest.raises((EmbedderError, TypeError), match="half"):  # a TypeError where types are checked
        Embedder.load(encoders["clip"], dtype="half")


def test_a_bad_place_or_source_is_one_line_and_changes_nothing(clip, tmp_path):
    source = photos(tmp_path / "photos", 2)
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"x")
    (tmp_path / "void").mkdir()
    cases: list[tuple[type[MsaeError], str, Path, dict[str, object]]] = [
        (StoreError, "is a file; give a folder", source, {"out": tmp_path / "file"}),
        (StoreError, "cannot be written", source, {"out": tmp_path / "file" / "x.store"}),
        (StoreError, "is not empty and no store", source, {"out": source}),
        (SourceError, "none of the 1 samples .* x.png: not an image", tmp_path / "broken", {}),
        (SourceError, "has no images in it", tmp_path / "void", {}),
        (SourceError, "does not exist", tmp_path / "photo", {}),
        (ConfigError, "batch_size is 0; wanted at least 1", source, {"batch_size": 0}),
    ]
    before = files(tmp_path)
    for kind, message, place, options in cases:
        with pytest.raises(kind, match=message) as caught:
            embed(place, **{"encoder": clip, "out": tmp_path / "new.store", **options})
        assert "\n" not in str(caught.value)
        assert files(tmp_path) == before
        assert not (tmp_path / "new.store").exists()


def test_importing_msae_and_its_embedding_loads_no_heavy_package():
    heavy = ["transformers", "PIL", "datasets", "braceexpand", "pyarrow", "rich"]
    code = f"import sys, msae.data.embed; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_an_encoder_leaves_the_default_type_of_other_threads_alone(encoders, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_default_dtype", chosen.append)
    embedder = Embedder.load(encoders["clip"], dtype="bfloat16", device="cpu")
    assert set(chosen) <= {torch.float32}
    assert embedder._model.dtype == torch.bfloat16
