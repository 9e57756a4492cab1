"""The report: one file that opens offline, shows whatever names and captions hold as text, and says what it lacks."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import msae
from msae.base.errors import ConfigError, RunError, StoreError
from msae.cli import main
from msae.concepts.names import Agreement, Concept, ConceptNames, names_of
from msae.concepts.tree import ConceptTree, Edge, Hierarchy
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.measure.evaluate import evaluate
from msae.sae.train import train
from msae.use.audit import Audit, audit
from msae.use.compare import compare
from msae.web.report import document, report
from msae.web.report.facts import facts_of
from msae.web.report.views import Looked, nodes_of, standing_out
from tests.test_bad_input import snapshot

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("faiss")
EVIL = "<img src=x onerror=alert(1)><script>alert('$x$ & \"y\"')</script>\x00\x1b[31m{{ 7*7 }}"
N = 120


def make_store(folder: Path) -> Path:
    """Pictures and captions, of which some are hostile, some missing and one climbs out of its folder."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    for i in range(N):
        Image.new("RGB", (60, 40), (2 * i, 80, 160)).save(folder / f"pictures/{i}.png")
    (folder / "pictures/1.png").write_text("no picture")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder.parent / "outside.png")
    paths = [f"pictures/{i}.png" for i in range(N)]
    paths[2], paths[3] = "../outside.png", "https://example.org/3.png"
    captions = [f"{EVIL} {i}" if i % 3 else f"a red thing {i}" for i in range(N)]
    label = [f"<b>{'ab'[i % 2]}" for i in range(N)]
    table = pa.table(
        {"id": [f"{EVIL} {i}" for i in range(N)], "image_path": paths, "caption": captions, "label": label}
    )
    rng = np.random.default_rng(1)
    rows = {m: rng.normal(shift, 1, (N, 8)).astype(np.float16) for m, shift in (("image", 1.0), ("text", -2.0))}
    return write_store(folder / "pairs.store", [StorePart(rows, table)]).path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a run with everything that verbs leave in it, a sibling that was evaluated, and one that was not."""
    folder = tmp_path_factory.mktemp("report") / "world"
    store = make_store(folder)
    options = {"d_sae": 32, "levels": (4, 8, 32), "epochs": 2, "batch_size": 30, "log_every": 1}
    options |= {"device": "cpu", "recipe": "faithful"}  # latents nest in it after so few steps
    for name, seed in (("run", 0), ("beside", 1), ("bare", 2)):
        train(store, out=folder / name, seed=seed, **options)
    agreement = Agreement(0.9, 0.8, 0.95, 40, 80, 1, 20, 0.9, 0.2)
    concepts = (Concept(0, EVIL, 0.7, 0.3, EVIL, 0.001, 0.01, (EVIL,), agreement, True, 1, True),)
    concepts += (Concept(5, "red", 0.6, None), Concept(7, "red", 0.5, None))
    ConceptNames("evidence", 32, concepts).save(folder / "run")
    for name in ("run", "beside"):
        evaluate(folder / name, store, recovery=True, labels="label")
        evaluate(folder / name, store, modality="text")
    return folder


@pytest.fixture
def world(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(scope="module")
def full(made):
    """The report of everything."""
    store = made / "pairs.store"
    found = audit(made / "run", store, "label", names={EVIL: [0]}, concept=[EVIL], n_permutations=50)
    both = compare(made / "run", f"{store}:label=<b>a", f"{store}:label=<b>b")
    out = made.parent / "full.html"
    beside = [made / "beside", made / "bare"]
    made_report = report(made / "run", store, out=out, beside=beside, audit=found, compare=both)
    return made_report, out.read_text(encoding="utf-8")


def test_a_comparison_in_a_file_shows_pictures_of_the_store_alone(made, tmp_path):
    """A file of a stranger must not put pictures of this machine into a page that is passed on."""
    from PIL import Image

    store, secret = made / "pairs.store", tmp_path / "secret.png"
    Image.new("RGB", (60, 40), "red").save(secret)
    data = compare(made / "run", f"{store}:label=<b>a", f"{store}:label=<b>b").to_json()
    rows = [row.to_json() for row in EmbeddingStore.open(store)[4:8]]
    foreign = [{**rows[0], "path": str(secret)}, {**rows[1], "id": "other"}, {**rows[2], "row": 10**9}]
    data["concepts"][0] |= {"q": 0.0, "rows_a": [rows[3]], "rows_b": [*foreign, {**rows[3], "path": "secret.png"}]}
    data["roots"] = [str(tmp_path)]
    (tmp_path / "c.json").write_text(json.dumps(data))

    made_report = report(made / "run", store, out=tmp_path / "r.html", compare=tmp_path / "c.json")
    section = (
        (tmp_path / "r.html").read_text(encoding="utf-8").split("Two sets compared</h2>")[1].split("Use it</h2>")[0]
    )
    assert section.count("<img") == 1
    assert "4 rows" in next(one.why for one in made_report.missing if one.section == "pictures of the comparison")


class Tags(HTMLParser):
    """Every tag with its attributes, and every text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_section_is_there_and_nothing_is_missing(full):
    made_report, page = full
    (missing,) = made_report.missing  # this store does not say its encoder
    assert missing.section == "regions" and "says which encoder made the embeddings" in missing.why
    assert page.count("Not in this report: neither ") == 1 and 'class="region"' not in page
    headings = re.findall(r"<h2 id=\"(\w+)\">", page)
    links = re.findall(r"<a href=\"#(\w+)\">", page)
    assert headings == links[: len(headings)] and len(headings) == 11
    assert page.count("<caption") == 2 and page.count("data:image/jpeg") > 8
    assert "beside" in page and 'class="best"' in page and 'class="tree"' in page


def test_names_captions_and_columns_are_text(full):
    _, page = full
    assert (
        "<script" not in page
        and "<img src=x" not in page
        and "<b>a" not in page
        and "49" not in re.findall(r"\]\d+m(\w+)", page)
    )
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page


def test_nothing_is_fetched_and_tags_are_closed(full):
    _, page = full
    read = Tags(page)
    assert read.open == []
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), attributes
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["alt"]
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_headings_go_down_one_by_one_and_links_lead_somewhere(full):
    tags = Tags(full[1]).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = {attributes["id"] for tag, attributes in tags if "id" in attributes}
    assert {a["href"][1:] for tag, a in tags if tag == "a"} <= ids


def test_pictures_come_from_the_store_alone(full, made):
    import base64
    import io

    from PIL import Image

    uris = set(re.findall(r"data:image/jpeg;base64,([^\"]*)", full[1]))
    sizes = {Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris}
    assert (9, 9) not in sizes and sizes == {(60, 40)}


def test_the_same_run_makes_the_same_bytes(made, full, tmp_path):
    store = made / "pairs.store"
    texts = []
    for i in range(2):
        report(made / "run", store, out=tmp_path / f"{i}.html", beside=[made / "beside"])
        texts.append((tmp_path / f"{i}.html").read_bytes())
    assert texts[0] == texts[1]


def test_a_bare_run_says_what_to_type(world):
    found = report(world / "bare")
    page = (world / "bare/report.html").read_text(encoding="utf-8")
    commands = {missing.section: missing.command for missing in found.missing}
    assert set(commands) == {"quality", "recovery", "names", "samples", "audit", "compare"}
    for command in commands.values():
        assert command.startswith("msae ") and f"<code>{command}" in page.replace("&#39;", "'")
    assert all(line in found.to_text() for line in commands.values())


def test_what_it_says_to_type_is_what_makes_it(world, capsys):
    for section in ("samples", "quality", "recovery"):
        missing = {one.section: one.command for one in report(world / "bare").missing}
        with pytest.raises(SystemExit) as left:
            main(missing[section].replace("STORE", str(world / "pairs.store")).split()[1:])
        assert left.value.code == 0, capsys.readouterr().err
    assert {one.section for one in report(world / "bare").missing} == {"names", "audit", "regions", "compare"}


def test_the_glossary_is_in_the_page_with_every_word_once(full):
    page = full[1]
    words = re.findall(r'<p id="(word-[^"]+)"><strong>', page)
    assert len(words) == len(set(words)) > 40 and "word-latent" in words and 'href="#glossary"' in page


def test_an_unnamed_run_shows_its_strongest_latents(world):
    report(world / "bare", world / "pairs.store")
    page = (world / "bare/report.html").read_text(encoding="utf-8")
    assert page.count("<article") > 3 and "unnamed" in page


def test_without_a_store_that_of_an_earlier_report_is_used_while_it_is_there(world):
    report(world / "run", world / "pairs.store", out=world / "first.html")
    report(world / "run", out=world / "second.html")
    first, second = ((world / name).read_bytes() for name in ("first.html", "second.html"))
    assert first == second
    shutil.rmtree(world / "pairs.store")
    assert "samples" in {one.section for one in report(world / "run").missing}


def test_columns_that_are_asked_for_stand_beside_each_caption(world):
    pages = [report(world / "run", world / "pairs.store", show=show).path.read_text() for show in ([], ["label"])]
    assert "· label: &lt;b&gt;a" not in pages[0] and pages[1].count("· label: &lt;b&gt;a") > 3
    with pytest.raises(StoreError, match="colour"):
        report(world / "run", world / "pairs.store", show=["colour"])


def test_figures_of_other_weights_are_not_shown(world):
    for file in ("sae.safetensors", "sae.json"):
        shutil.copy(world / "bare" / file, world / "run" / file)
    assert {"quality", "recovery", "samples"} <= {one.section for one in report(world / "run").missing}


def test_huge_data_stays_below_the_limit(world, monkeypatch):
    monkeypatch.setattr(document, "LIMIT", 400_000)
    found = report(world / "run", world / "pairs.store")
    assert found.size < 400_000 and (world / "run/report.html").stat().st_size == found.size


def test_a_tree_that_is_deep_wide_and_large_is_cut_and_says_so():
    deep, pairs = ({i: i - 1 for i in numbers} for numbers in (range(1, 40), range(91, 400, 2)))
    parents = deep | dict.fromkeys(range(41, 90), 40) | pairs
    fired = np.arange(1000, 600, -1)
    edges = tuple(Edge(child, parent, 9, 0.9, 0.8, 2.0, 1.9) for child, parent in parents.items())
    tree = ConceptTree(Hierarchy(2000, fired, edges), 8, {398: "named"}, {})
    roots = nodes_of(tree)
    assert roots[0].latent == 398 and sum(root.n_shown for root in roots) <= 120

    def shown(node, depth=0):
        yield node.latent, depth
        for child in node.children:
            yield from shown(child, depth + 1)

    for root in roots:
        nodes = list(shown(root))
        assert len(nodes) == root.n_shown <= 16 and max(depth for _, depth in nodes) <= 4
        assert all(parents[latent] is not None for latent, depth in nodes if depth)
    hidden = {root.latent: root.n_hidden for root in roots}
    assert hidden[0] == 40 - 5 and hidden[40] == 50 - 16


def test_an_album_has_room_for_so_much_and_no_more(world):
    from msae.data.thumbnails import Album

    album = Album([world], 64, room=2000)
    uris = [album.uri(f"pictures/{i}.png") for i in range(10, 20)]
    kept = [uri for uri in uris if uri]
    assert 0 < len(kept) < 10 and sum(map(len, kept)) <= 2000 and album.n_left_out == 10 - len(kept)


def test_a_store_of_vectors_alone_will_do(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32))
    train(tmp_path / "x.npy", out=tmp_path / "run", d_sae=16, kind="topk", k=4, epochs=1, batch_size=30, device="cpu")
    found = report(tmp_path / "run", tmp_path / "x.npy")
    assert "samples" not in {one.section for one in found.missing}


def test_an_audit_survives_its_json(made):
    found = audit(made / "run", made / "pairs.store", "label", names={EVIL: [0], "red": [5, 7]}, n_permutations=50)
    text = json.dumps(found.to_json())
    again = Audit.from_json(text, where="audit.json")
    assert again.to_json() == found.to_json() and again.to_text() == found.to_text()
    with pytest.raises(ConfigError, match=r"^audit\.json is not what msae audit writes"):
        Audit.from_json('{"concepts": [{"name": 3}]}', where="audit.json")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("report missing", "missing is no run folder"),
        ("report pairs.store", "sae.json"),
        ("report run --on nowhere.store", "nowhere.store"),
        ("report run --on wide.npy", "16"),
        ("report run --out page.pdf", "ends in .html"),
        ("report run --out run", "ends in .html"),
        ("report run --out pictures/5.png/page.html", "is a file"),
        ("report run --json pictures/5.png/x.json", "5.png"),
        ("report run --audit missing.json", "missing.json"),
        ("report run --audit list.json", "is not what msae audit writes"),
        ("report run --audit run/config.json", "is not what msae audit writes"),
        ("report run --beside missing", "missing is no run folder"),
        ("report torn", "metrics.jsonl is damaged"),
        ("report odd", "metrics.jsonl has a line"),
        ("report kept", "is damaged"),
        ("report other", "names 7 latents, but the SAE has 32; type: msae name other"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(command, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    np.save("wide.npy", np.ones((20, 16), np.float32))
    Path("list.json").write_text("[]")
    for name in ("torn", "odd", "kept", "other"):
        shutil.copytree("run", name)
    Path("torn/metrics.jsonl").write_text("{")
    Path("odd/metrics.jsonl").write_text('{"epoch": 3}\n')
    next(Path("kept/eval").iterdir()).write_text('{"schema_version": 2}')
    ConceptNames("evidence", 7, ()).save("other")
    before = snapshot(world)
    with pytest.raises(SystemExit) as left:
        main(command.split())
    out, err = capsys.readouterr()
    assert left.value.code == 1 and out == ""
    assert message in err and err.count("\n") == 1 and "unexpected" not in err, err
    assert snapshot(world) == before


def test_the_command_says_where_and_its_json_what(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as left:
        main(["report", "run", "--on", "pairs.store", "--beside", "beside", "bare", "--json", "made.json"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("run/report.html: ")
    data = json.loads(Path("made.json").read_text())
    assert data["report"] == "run/report.html" and data["card"] == "run/README.md"
    assert [missing["section"] for missing in data["missing"]] == ["regions", "audit", "compare"]


def test_too_many_runs_are_refused(world):
    for i in range(32):
        shutil.copytree(world / "bare", world / f"more/{i}")
    with pytest.raises(ConfigError, match="at most 31"):
        report(world / "run", beside=sorted((world / "more").iterdir()))


def test_the_python_name_is_the_function():
    assert msae.report is report
    with pytest.raises(RunError):
        msae.report("nowhere")


def test_concepts_come_by_how_well_they_tell_the_rows_apart_and_confirmed_names_first(world):
    """By the oracle: the variance between the rows in which a latent fires and the others."""
    facts, store = facts_of(world / "run"), EmbeddingStore.open(world / "pairs.store")
    names, samples = names_of(world / "run"), Looked.at(facts, store, "cpu").first
    found = standing_out(names, samples)
    z = facts.sae.encode(store.take(np.arange(len(store)), "image"), "image")
    rate = (z > 0).mean(0)
    tells = np.array([z[:, i].sum() ** 2 / max(1, (z[:, i] > 0).sum()) ** 2 for i in range(32)]) * rate * (1 - rate)
    kinds = [0 if latent == 0 else 1 if latent in (5, 7) else 2 for latent in found]
    assert kinds == sorted(kinds)
    for kind in (0, 1, 2):
        part = tells[[latent for latent, own in zip(found, kinds, strict=True) if own == kind]]
        assert (np.diff(part) <= 1e-6).all()
    assert len({5, 7} & set(found)) <= 1  # one latent for each name
    page = report(world / "run", store, out=world / "order.html").path.read_text()
    assert "nearest word: red" in page and "No rows have confirmed this word" in page


def test_a_concept_says_what_else_stands_out_in_its_pictures_and_unnamed_ones_have_pictures(made, full):
    facts = facts_of(made / "run")
    looked = Looked.at(facts, EmbeddingStore.open(made / "pairs.store"), "cpu")
    latent = int(np.argmax(looked.first.fired))
    view = looked.concept(facts, latent, document.Album(looked.store.picture_roots, 16))
    z = facts.sae.encode(looked.store.take(np.array([one.row for one in looked.first.top(latent, view.n)]), "image"))
    strength = z.mean(0) / np.maximum(looked.first.quantiles((0.99,))[:, 0], 1e-9)
    strength[[latent, *([5, 7] if latent in (5, 7) else [])]] = 0
    best = int(strength.argmax())
    named = {0: f"{EVIL}", 5: "nearest word: red", 7: "nearest word: red"}
    assert view.others[0].label == named.get(best, f"#{best}") and view.others[0].n == (z[:, best] > 0).sum()
    assert "What else stands out in these" in full[1]
    label, picture = looked.face(facts, "red", [5, 7], document.Album(looked.store.picture_roots, 16))
    assert label == "nearest word: red" and (picture is None or picture.startswith("data:image/jpeg"))
    assert looked.face(facts, EVIL, [0], document.Album((), 16)) == (EVIL, None)
