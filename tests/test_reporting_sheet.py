"""Contact sheets: every sample is on them, bad pictures are grey, nothing from the store is markup."""

import io
import re

import pytest
from PIL import Image

from msae.base.errors import ConfigError
from msae.concepts.gallery import Gallery, Sample
from msae.web.report.sheet import as_html, draw_sheet, write_sheet

KNOWN = {"firing_rate": 0.25, "p50": 1.0, "p99": 3.0, "max": 4.0, "levels": {"64": 1.0}}


def make_gallery(images, texts=(), name="red"):
    statistics = {**({"image": KNOWN} if images else {}), **({"text": KNOWN} if texts else {})}
    return Gallery(3, name, (), tuple(images), tuple(texts), statistics, ())


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, size in enumerate([(40, 40), (300, 20), (16, 200)]):
        Image.new("RGB", size, (255, 0, 10 * i)).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    return [Sample(i, f"id-{i}", str(path), f"a red thing {i}", {}, 3.0 - i) for i, path in enumerate(paths)]


def test_sheet_holds_every_picture(tmp_path, pictures):
    texts = [Sample(i, f"t{i}", None, "words " * 40, {}, 1.0) for i in range(16)]
    write_sheet(make_gallery(pictures, texts), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(100_000)}
    assert {(255, 0, 0), (255, 0, 10), (255, 0, 20)} <= colours


def test_picture_that_is_gone_or_broken_is_a_grey_field(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    (tmp_path / "cut.png").write_bytes(png()[:60])
    names = ("gone.png", "broken.png", "cut.png", "")
    samples = [Sample(i, str(i), str(tmp_path / name), None, {}, 1.0) for i, name in enumerate(names)]
    samples += [Sample(9, "x", None, None, {}, 1.0), Sample(9, "y", "https://example.org/y.png", None, {}, 1.0)]
    sheet = draw_sheet(make_gallery(samples, name=None))
    assert {colour: n for n, colour in sheet.getcolors(100_000)}[(0xD8, 0xD8, 0xD8)] >= len(samples) * 128 * 128


def png():
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, format="PNG")
    return data.getvalue()


def test_a_gallery_is_text_a_table_and_pictures(pictures):
    evil = Sample(7, "<script>", None, "<script>", {"label": "x"}, 0.5)
    found = make_gallery(pictures, [evil])
    table = found.to_pandas()
    assert list(table["activation"]) == [3.0, 2.0, 1.0, 0.5] and list(table["modality"]) == ["image"] * 3 + ["text"]
    shown = found._repr_html_()
    assert shown.count('<img src="data:image/jpeg;base64,') == 3 and "latent 3: red" in shown
    assert "<script" not in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize("n", [0, 1, 4, 17])
def test_any_number_of_images_and_texts_makes_a_sheet(pictures, n):
    for images, texts in ((n, 0), (0, n), (n, n)):
        gallery = make_gallery((pictures * 6)[:images], (pictures * 6)[:texts])
        draw_sheet(gallery)
        page = as_html(gallery)
        assert page.count("<img") == images and page.count("<li>") == texts


def test_page_is_whole_in_itself_and_nothing_from_the_store_is_markup(tmp_path):
    evil = '<script>alert("x")</script>" onerror="y'
    sample = Sample(0, evil, "gone.png", evil, {}, 1.0)
    write_sheet(make_gallery([sample], [sample], name=evil), tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert "<script" not in page and 'onerror="' not in page and page.count("&lt;script&gt;") >= 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_other_suffix_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.png or \.html"):
        write_sheet(make_gallery([]), tmp_path / "sheet.pdf")
