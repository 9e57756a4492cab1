"""The explorer in Debian's Chromium: every page, two people at once, and rows that mean harm.

Any console error, failed request, or request to another host fails the test that met it.
"""

import importlib.util
import re
import shutil
import time

import pytest

from tests.explorer_world import HOSTILE, make_world, served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if importlib.util.find_spec("faiss") is None:
    pytest.skip("faiss is not installed", allow_module_level=True)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed; as root: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def base(folder):
    with served([folder / "runs/named", folder / "runs/plain"], folder / "scenes.store", folder) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page, condition, arg=None, seconds=20):
    """Wait for a condition: Playwright's own `wait_for_function` needs the `eval` that the pages' policy forbids."""
    end = time.monotonic() + seconds
    while True:
        try:
            if page.evaluate(condition, arg):
                return
        except sync_api.Error as err:
            if "context was destroyed" not in str(err):  # by a link that was followed
                raise
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


class Person:
    """Somebody with a browser of their own; what goes wrong in it is kept."""

    def __init__(self, chromium, base, **context):
        self.base, self.wrong = base, []
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("request", self._check)

    def _said(self, message):
        # Software WebGL finds reading the pixel under the pointer slow, which is how the map knows the point there.
        if message.type in ("error", "warning") and "GPU stall due to ReadPixels" not in message.text:
            self.wrong.append(message.text)

    def _check(self, request):
        if not request.url.startswith((f"{self.base}/", "data:", "blob:")):
            self.wrong.append(f"request to {request.url}")

    def open(self, address="", seconds=20):
        self.page.goto(f"{self.base}/{address}")
        self.settle(seconds)
        return self.page

    def settle(self, seconds=20):
        self.page.wait_for_selector("main h1")
        until(self.page, "!document.querySelector('.msae[aria-busy], .msae [aria-busy]')", seconds=seconds)

    def pictures(self):
        """The rows of the neighbours after the edits, in their order."""
        return self.page.eval_on_selector_all(
            "#part-found section:last-of-type figure", "found => found.map(one => one.dataset.row)"
        )


@pytest.fixture
def person(chromium, base):
    found = Person(chromium, base)
    yield found
    assert found.page.evaluate("window.hurt") is None
    without = "[...document.images].filter(image => !image.alt).length"
    assert found.page.evaluate(without) == 0
    found.context.close()
    assert found.wrong == []


def test_the_harness_sees_errors_and_other_hosts(chromium, base):
    found = Person(chromium, base)
    page = found.open()
    page.evaluate("console.error('said'); setTimeout(() => { throw new Error('thrown') })")
    page.evaluate("fetch('/nothing').catch(() => 0)")
    page.evaluate("fetch('http://127.0.0.2:9/x').catch(() => 0)")
    page.wait_for_timeout(300)
    seen = " ".join(found.wrong)
    assert all(word in seen for word in ("said", "thrown", "404", "Content Security Policy"))
    found.context.close()


def test_a_concept_is_sorted_filtered_found_and_opened(person):
    page = person.open()
    assert page.locator("tbody tr").count() == 40
    page.get_by_role("link", name="fires in").click()
    person.page.wait_for_selector("th.rate[aria-sort=descending]")
    rates = [float(text.rstrip("%")) for text in page.locator("td.rate").all_inner_texts()]
    assert rates == sorted(rates, reverse=True)
    page.get_by_role("link", name="next →").click()
    until(page, "document.querySelector('.pager').innerText.includes('41 to 80')")
    page.locator(".chip", has_text=re.compile("^named$")).click()
    until(page, "[...document.querySelectorAll('tbody th a')].every(a => a.innerText.includes(' #'))")
    shown = page.locator("tbody th a").first.inner_text().split(" #")[0]
    assert shown.startswith("nearest word: ")  # this run was named without rows
    page.get_by_role("searchbox").fill(shown.removeprefix("nearest word: "))
    all_named = "name => [...document.querySelectorAll('tbody th a')].every(a => a.innerText.startsWith(name))"
    until(page, all_named, arg=shown)
    assert "only=named" in page.url and "words=" in page.url
    page.locator("tbody th a").first.click()
    person.page.wait_for_selector("#part-relations table")
    assert page.locator("h1").inner_text().startswith(shown) and "latent=" in page.url
    assert page.locator("#part-image img").count() >= 10 and page.locator("#part-text li").count() > 0
    assert page.locator(".figures svg").count() == 3 and "Why this name" in page.inner_text("main")
    before = page.locator("#part-image figcaption").first.inner_text()
    page.locator("#part-image").get_by_role("link", name="next").click()
    until(page, "was => document.querySelector('#part-image figcaption').innerText !== was", arg=before)
    page.go_back()
    until(page, "was => document.querySelector('#part-image figcaption')?.innerText === was", arg=before)


def test_moving_a_slider_changes_the_neighbours_and_a_link_brings_them_back(person, chromium, base):
    page = person.open("?page=search&run=named")
    first = person.pictures()
    assert len(first) == 12 and page.locator("input[type=range]").count() >= 4
    slider = page.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("End")
    page.wait_for_selector("#part-found h2:has-text('After')")
    person.settle()
    moved = person.pictures()
    assert moved != first and page.locator("#part-found .new").count() > 0
    assert page.evaluate("document.activeElement.type") == "range", "the keyboard stays on the slider"
    link = page.url
    page.reload()
    person.settle()
    assert person.pictures() == moved and page.url == link
    other = Person(chromium, base)
    other.open(link.removeprefix(f"{base}/"))
    assert other.pictures() == moved and other.wrong == []
    other.context.close()
    page.locator("[data-reset]").first.click()
    page.wait_for_selector("#part-found h2:has-text('Nearest')")
    assert person.pictures() == first


def test_words_a_picture_and_a_row_are_searched_for(person, folder):
    page = person.open("?page=search")
    page.get_by_label("words").fill("a red circle")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("figcaption:has-text('“a red circle”')")
    by_words = person.pictures()
    page.get_by_label("picture").set_input_files(next((folder / "scenes/images").iterdir()))
    page.wait_for_selector("[data-preview] img")
    person.settle()
    assert person.pictures() != by_words and "vector=" in page.url
    page.get_by_label("id of a row").fill("no such row")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("[role=alert]:has-text('no row with the id')")
    page.get_by_label("picture").set_input_files(folder / "words.txt")
    page.wait_for_selector("[role=alert]:has-text('cannot be searched for')")


def test_two_people_do_not_see_each_others_state(person, chromium, base):
    other = Person(chromium, base)
    mine, theirs = person.open("?page=search&run=named"), other.open("?page=concepts&run=plain&words=7")
    mine.locator("input[type=range]").first.focus()
    mine.keyboard.press("End")
    mine.wait_for_selector("#part-found h2:has-text('After')")
    person.settle()
    theirs.get_by_role("link", name="Search", exact=True).click()
    theirs.wait_for_selector("h1:has-text('Search')")
    assert theirs.locator("[data-turned]").count() == 0 and "set=" not in theirs.url and "run=plain" in theirs.url
    assert mine.locator("[data-turned]").count() == 1
    other.context.close()
    assert other.wrong == []


def test_an_audit_runs_and_a_sample_is_swept(person):
    page = person.open("?page=audit&run=named")
    page.get_by_label("column").select_option("background")
    page.get_by_role("button", name="Audit", exact=True).click()
    page.wait_for_selector("section.audit .verdict")
    person.settle()
    assert page.locator("section.audit table").count() > 0
    headings = [one for one in page.locator("h2").all_inner_texts() if one[:4] in ("What", "One ")]
    assert headings == ["What the classifier relies on", "One row, one concept at several strengths"]
    assert page.locator("#part-sweep .figures > figure > svg").count() == 1
    before = page.locator("#part-sweep figcaption").first.inner_text()
    page.get_by_label("id of a row").fill(HOSTILE)
    page.get_by_role("button", name="Sweep").click()
    until(page, "was => document.querySelector('#part-sweep figcaption').innerText !== was", arg=before)
    assert HOSTILE in page.locator("#part-sweep figcaption").first.inner_text()


def test_what_stands_out_is_drawn_with_its_sweep(person, folder):
    import msae

    on, run = folder / "scenes.store", folder / "runs/named"
    target = next(one for one in ("shadow", "frame", "relation") if msae.audit(run, on, one).ranked)
    page = person.open(f"?page=audit&run=named&target={target}")
    page.wait_for_selector("section.audit .verdict")
    drawn = page.locator("section.audit .figures").first.locator("figure > svg")
    labels = [one.get_attribute("aria-label") for one in drawn.all()]
    assert len(labels) == 4 and any("One row, the concept at several strengths" in one for one in labels)


def test_only_the_rows_that_fit_are_audited(person):
    page = person.open("?page=audit&run=named")
    page.get_by_label("column").select_option("background")
    page.get_by_label("only rows with").fill("count == 1")
    page.get_by_role("button", name="Audit", exact=True).click()
    page.wait_for_selector("section.audit .verdict")
    assert "only rows with count == 1" in page.locator("section.audit").inner_text()
    assert page.get_by_label("only rows with").input_value() == "count == 1"


def test_a_written_audit_is_loaded_and_a_wrong_file_is_refused(person, folder, tmp_path):
    import json

    import msae

    name = next(iter(msae.ConceptNames.load(folder / "runs/named"))).name
    found = msae.audit(folder / "runs/named", folder / "scenes.store", "count", concept=[name])
    (tmp_path / "audit.json").write_text(json.dumps(found.to_json()))
    (tmp_path / "wrong.json").write_text(HOSTILE)
    page = person.open("?page=audit")
    page.locator("[data-audit]").set_input_files(tmp_path / "wrong.json")
    page.wait_for_selector("#part-loaded:has-text('This file is no audit')")
    page.locator("[data-audit]").set_input_files(tmp_path / "audit.json")
    page.wait_for_selector("#part-loaded table")
    assert name in page.locator("#part-loaded").inner_text()


ZOOM = "() => latentMap.sigma.getCamera().ratio"
RING = "latent => latentMap.active === latent && latentMap.sigma.getNodeDisplayData(latent).highlighted"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_map_shows_what_is_pointed_at_found_and_reached_by_keyboard(chromium, base, width, scheme):
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "reduced_motion": "reduce"}
    person = Person(chromium, base, **view)
    page = person.open("?page=map&run=named", seconds=120)  # the first map compiles UMAP
    assert page.locator("#plane canvas").count() >= 3 and "Placed by" in page.inner_text("#method")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    latent = page.locator("[data-point]").first.get_attribute("data-point")
    page.locator("#plane").scroll_into_view_if_needed()
    place = page.evaluate("latent => latentMap.sigma.graphToViewport(latentMap.at(latent))", latent)
    box = page.locator("#plane").bounding_box()
    page.mouse.move(box["x"] + place["x"] - 1, box["y"] + place["y"])
    page.mouse.move(box["x"] + place["x"], box["y"] + place["y"])
    page.wait_for_selector(".card:not([hidden]) img")
    assert page.evaluate(RING, latent) and page.locator(".card img").count() >= 2
    page.mouse.click(box["x"] + place["x"], box["y"] + place["y"])
    page.wait_for_selector(".card.pinned a")
    page.locator("#plane").press("Escape")
    assert page.locator(".card").is_hidden()
    page.mouse.move(0, 0)
    page.locator("[data-point]").nth(1).focus()
    second = page.locator("[data-point]").nth(1).get_attribute("data-point")
    until(page, RING, arg=second)
    page.locator("#plane").press("+")
    assert page.evaluate(ZOOM) < 1
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate(ZOOM) == 1
    whole = page.evaluate("latentMap.sigma.getCamera().x")
    page.locator("#plane").press("ArrowRight")
    assert page.evaluate("latentMap.sigma.getCamera().x") > whole
    page.get_by_role("searchbox").fill(latent)
    until(page, "latent => latentMap.fits?.size === 1 && latentMap.fits.has(latent)", arg=latent)
    faint = page.evaluate("latentMap.faint")
    colours = "() => latentMap.found.latents.map(one => latentMap.sigma.getNodeDisplayData(one).color)"
    assert sum(colour != faint for colour in page.evaluate(colours)) == 1 and "words=" in page.url
    page.locator("[data-point]").click()
    page.wait_for_selector("h1:has-text('#'), h1 .maybe, h1")
    assert f"latent={latent}" in page.url and "page=concept" in page.url
    person.context.close()
    assert person.wrong == []


def test_the_map_is_coloured_by_what_is_chosen_and_a_class_is_shown_alone(person):
    page = person.open("?page=map&run=named")
    seen = {}
    for by in ("level", "firing rate", "modality"):
        page.locator("fieldset .chip", has_text=by).click()
        until(page, "by => document.querySelector('.classes:not([hidden])').ariaLabel.includes(by)", arg=by)
        until(page, "by => new URLSearchParams(location.search).get('by') === by.split(' ').pop()", arg=by)
        seen[by] = page.evaluate("latentMap.found.latents.map(one => latentMap.sigma.getNodeDisplayData(one).color)")
        shown, fills = page.evaluate("[...new Set(latentMap.colours)]"), page.locator(".classes:not([hidden]) circle")
        assert set(seen[by]) <= set(shown) and fills.count() >= len(set(seen[by])), "every colour is in the legend"
    assert seen["level"] != seen["modality"] != seen["firing rate"]
    button = page.locator(".classes:not([hidden]) button").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    alone = page.evaluate("latentMap.found.latents.filter((one, i) => latentMap.isFit(String(one), i)).length")
    assert alone == page.evaluate("latentMap.found.classes.modality.filter(one => one === 0).length")


def test_without_webgl_the_map_says_so_and_the_list_stays(chromium, base):
    person = Person(chromium, base)
    person.context.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page = person.open("?page=map&run=named")
    assert "no WebGL" in page.inner_text("#plane [role=alert]") and page.locator("[data-point]").count() == 20
    person.context.close()
    assert all("getParameter" in said for said in person.wrong), "nothing but sigma saying that it is missing"


def test_models_are_evaluated_and_drawn(person):
    page = person.open("?page=models")
    assert page.locator("svg").count() == 3
    page.get_by_role("link", name="Evaluate now").click()
    page.wait_for_selector("td b")
    person.settle()
    assert page.locator("svg").count() == 6 and {"named", "plain"} <= set(
        page.locator("td:first-child").all_inner_texts()
    )


def test_markup_in_captions_ids_and_names_is_text(person):
    page = person.open("?" + "page=search&row=" + "%3Cimg%20src%3Dx%20onerror%3D%22window.hurt%3D1%22%3E")
    assert HOSTILE in page.locator(".query").inner_text() and page.locator("img[src=x]").count() == 0
    page = person.open("?page=audit&target=background")
    assert page.locator("main script").count() == 0


def test_a_picture_outside_the_store_is_not_shown(person, folder):
    ids = [line.split(",")[0] for line in (folder / "scenes/scenes.csv").read_text().splitlines()]
    page = person.open(f"?page=search&row={ids[2]}")  # its picture is ../secret.png
    assert page.locator(".query .nopicture").count() == 1 and page.locator(".query img").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_regions_lie_over_their_pictures_and_can_be_switched_off(chromium, base, width):
    found = Person(chromium, base, viewport={"width": width, "height": 900})
    page = found.open("?page=concept&run=named")
    page.wait_for_selector("#part-relations table")
    box = page.get_by_label("show what in each picture makes it fire")
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#part-image svg.region")
    found.settle()
    assert page.evaluate("document.activeElement.name") == "where", "the keyboard stays on the box"
    place = "one => (({x, y, width, height}) => [x, y, width, height].map(Math.round))(one.getBoundingClientRect())"
    overlap = f"[...document.querySelectorAll('#part-image .looked')].map(one => [...one.children].map({place}))"
    boxes = page.evaluate(overlap)
    assert len(boxes) >= 10 and all(picture == region for picture, region in boxes)
    dimmed = page.locator("#part-image svg.region .dimmed").first
    assert dimmed.evaluate("one => getComputedStyle(one).fillOpacity") == "0.58", "the style reaches the drawing"
    label = page.locator("#part-image svg.region").first.get_attribute("aria-label")
    assert label.removeprefix("what makes it fire: ") in page.locator("#part-image figcaption").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width and "where=1" in page.url
    page.reload()  # the link has it
    page.wait_for_selector("#part-image svg.region")
    page.get_by_label("show what in each picture makes it fire").uncheck()
    until(page, "!document.querySelector('#part-image svg.region')")
    assert "where=" not in page.url
    found.context.close()
    assert found.wrong == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_row_of_an_audit_has_a_region_that_a_box_switches_off(chromium, base, width):
    found = Person(chromium, base, viewport={"width": width, "height": 900})
    page = found.open("?page=audit&run=named&target=background")
    page.wait_for_selector("#part-sweep .row img")
    if page.locator("#part-sweep svg.region").count():
        assert page.locator("#part-sweep svg.region").is_visible()
        page.locator("#part-sweep .switch input").uncheck()
        assert not page.locator("#part-sweep svg.region").is_visible()
    else:
        assert "is not in this picture" in page.inner_text("#part-sweep")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found.context.close()
    assert found.wrong == []


def test_rows_are_picked_by_clicking_and_become_a_concept(person):
    page = person.open("?page=search")
    for place in range(6):
        page.locator("#part-found figure").nth(place).get_by_role("link", name="like", exact=True).click()
        person.settle()
        page.wait_for_selector(f"text=Picked: {place + 1} like")
    page.get_by_role("link", name="Find what they share").click()
    page.wait_for_selector("#part-learnt figure")
    assert "msae name" in page.inner_text("#part-learnt pre")
    page.get_by_role("link", name="Search with it").click()
    person.settle()
    assert page.locator(".slider").count() > 0 and page.locator(".problem").count() == 0


def test_two_values_are_chosen_and_compared(person):
    page = person.open("?page=compare")
    page.get_by_label("column").select_option("background")
    page.get_by_role("button", name="Choose values").click()
    person.settle()
    page.locator("select[name=a]").select_option("night")
    page.locator("select[name=b]").select_option("sand")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#part-compared table")
    assert "stronger in" in page.inner_text("#part-compared") and page.locator("#part-compared img").count() > 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["concepts", "concept", "map", "search", "find", "compare", "audit", "models"])
def test_every_page_fits_a_phone_in_both_themes(chromium, base, page, scheme):
    found = Person(chromium, base, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    shown = found.open(f"?page={page}&target=background&column=background&a=night&b=sand")
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    ground, ink = (shown.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}") for where, what in
                   (("body", "backgroundColor"), (".msae h1", "color")))  # fmt: skip
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert bright[0] - bright[1] > 500 if scheme == "light" else bright[1] - bright[0] > 500
    found.context.close()
    assert found.wrong == []


def test_the_keyboard_reaches_the_content_and_every_control(person):
    page = person.open("?page=concepts")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"
    seen = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.name || document.activeElement.tagName"))
    assert {"words", "only", "A"} <= seen
    unlabelled = (
        "[...document.querySelectorAll('main input:not([type=hidden]), main select')]"
        ".filter(field => !field.labels.length && !field.ariaLabel).length"
    )
    for address in (
        "?page=concepts",
        "?page=map",
        "?page=search",
        "?page=find",
        "?page=compare&column=frame",
        "?page=audit",
    ):
        assert person.open(address).evaluate(unlabelled) == 0


def test_empty_states_say_what_to_type(person, folder):
    page = person.open("?page=concepts&run=plain")
    assert f"msae name {folder / 'runs/plain'} --on STORE" in page.inner_text(".empty code")
    page.get_by_role("searchbox").fill("zzzz")
    page.wait_for_selector("text=No latent fits")
    page = person.open("?page=concepts&run=../../etc")
    assert "There is no run" in page.inner_text("[role=alert]")
