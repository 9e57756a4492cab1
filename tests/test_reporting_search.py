"""The page of a search opens offline, shows the store's pictures alone, and runs nothing that the data brings."""

import re
from dataclasses import replace

import pytest

from msae.use.search import AppliedEdit, Hit, SearchResult, Shared
from msae.web.report.search import render, write_page

pytest.importorskip("jinja2")
EVIL = "<script>alert('x')</script>\"><img src=x onerror=y>"


def hit(rank, path=None, caption=None, before=1):
    return Hit(rank, f"id{rank}{EVIL}", path, caption, {}, rank, 0.9, before, 0.8, (Shared(EVIL, 1.0, 1.0),))


def result(roots=(), hits=None, before=()):
    natural = {"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0, "firing_rate": 0.1}
    edit = AppliedEdit(EVIL, "p99", (1,), 0.0, 3.0, natural, (EVIL,), EVIL)
    hits = hits or (hit(1, "a.png", EVIL, before=7), hit(2, "b.png"))
    return SearchResult("s", "text", EVIL, "text", "image", "embedding", (edit,), hits, before, (EVIL,), roots)


def test_nothing_of_the_data_becomes_markup():
    page = render(result(before=(hit(30, caption=EVIL),)))
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Before", "After"]


def test_pictures_are_inlined_and_missing_ones_leave_a_field(tmp_path):
    from PIL import Image

    Image.new("RGB", (400, 300), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    page = render(result((tmp_path / "nowhere", tmp_path)))
    assert page.count('src="data:image/jpeg;base64,') == 1 and page.count('class="none"') == 1
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_without_edits_there_is_one_side(tmp_path):
    plain = replace(result(), edits=(), warnings=())
    write_page(plain, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Found"] and "<table>" not in page
