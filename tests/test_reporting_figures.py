"""Drawings: well-formed SVG of the page's own ink, the same bytes every time, and whatever names hold is text."""

import re
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np
import pytest

from msae.concepts.gallery import magnitudes
from msae.concepts.samples import Origin, SampleMiner
from msae.web.report import figures

pytest.importorskip("matplotlib")
EVIL = "<script>alert('$x_$ & \"y\"')</script> fill: #000000\x00\x1b \U00020000"
RECOVERY = [{"k": k, "fvu": 0.5 / k, "cosine": 1 - 0.5 / k, "cknna": None, "dead": 3} for k in (1, 2, 4, 8, 16)]
METRICS = [{"step": step, "fvu": 1 / step, "l0": 8.0, "sparsity": 0.5} for step in (50, 100, 150)]


@pytest.fixture(scope="module")
def samples():
    """Latent 0 never fires."""
    rng = np.random.default_rng(0)
    z = np.maximum(rng.normal(size=(200, 6)), 0).astype(np.float32)
    z[:, 0] = 0
    miner = SampleMiner(6, n=4, levels=(2, 6))
    miner.add(z)
    return miner.finish(Origin("s", "f", "m", "h", "image", "relu", "run"), [str(i) for i in range(200)])


def drawings(samples, name):
    runs = {name: RECOVERY, "_hidden": RECOVERY, **{f"run {i}": RECOVERY for i in range(9)}}
    return {
        "recovery": lambda: figures.recovery_curves(runs),
        "recovery without a figure": lambda: figures.recovery_curves({name: RECOVERY}, "cknna"),
        "recovery of nothing": lambda: figures.recovery_curves({}),
        "training": lambda: figures.training_curves({name: METRICS, "b": []}),
        "training l0": lambda: figures.training_curves({name: METRICS}, "l0"),
        "histogram": lambda: figures.activation_histogram(samples, 1),
        "histogram of a dead latent": lambda: figures.activation_histogram(samples, 0),
        "magnitudes": lambda: figures.magnitude_histograms({"image": magnitudes(samples)}),
        "levels": lambda: figures.level_profile(samples, 1),
        "levels of a dead latent": lambda: figures.level_profile(samples, 0),
    }


NAMES = list(drawings(None, ""))


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_is_well_formed_has_a_label_and_is_the_same_every_time(samples, name):
    draw = drawings(samples, EVIL)[name]
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") and root[0].tag.endswith("title")
    assert svg == draw()
    assert (
        "<script" not in svg
        and "<style" not in svg
        and "#000000" not in re.sub(r">[^<]*<|\"[^\"]*script.*?\"", "", svg)
    )
    assert set(re.findall(r"https?://[^\"]*", svg)) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}


def test_many_drawings_on_one_page_share_only_ids_that_mean_the_same(samples):
    seen = {}
    for draw in drawings(samples, "a").values():
        for element in ElementTree.fromstring(draw()).iter():
            if "id" in element.attrib:
                content = re.sub(r"\s+", " ", ElementTree.tostring(element, encoding="unicode").strip())
                assert seen.setdefault(element.get("id"), content) == content


def test_threads_draw_the_same_as_one(samples):
    draws = list(drawings(samples, "a").values())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda draw: draw(), draws)) == [draw() for draw in draws]


def test_every_run_is_in_the_legend(samples):
    svg = drawings(samples, EVIL)["recovery"]()
    words = [text.text or "" for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("text")]
    assert sum("run " in word or "_hidden" in word or "000000" in word for word in words) == 11


def test_a_long_name_keeps_its_end():
    assert figures.shorten("a" * 50 + "\nseed1") == "…" + "a" * 17 + " seed1"
