"""`report`: everything that is known about a run in one HTML file that opens offline, and its model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from msae import __version__
from msae.base.errors import ConfigError, MissingDependencyError, MsaeError, RunError, StoreError
from msae.base.files import is_writable
from msae.base.results import Result
from msae.concepts.names import names_of
from msae.concepts.regions import Locator
from msae.concepts.samples import SAMPLES_FOLDER, TopSamples
from msae.data.rows import names_to_show
from msae.data.store import EmbeddingStore, as_store, recorded_store
from msae.data.thumbnails import Album
from msae.measure.evaluate import Cell, Evaluation, Kept, table_rows
from msae.measure.evaluate.record import headings, judgements_of, legend, mode_of
from msae.sae.model import check_fit
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit import Audit
from msae.use.compare import Comparison
from msae.web import page
from msae.web.glossary import glossary
from msae.web.report import audit as audit_page
from msae.web.report import comparison as comparison_page
from msae.web.report import figures
from msae.web.report import search as search_page
from msae.web.report.card import write_card
from msae.web.report.facts import Facts, facts_of
from msae.web.report.views import (
    N_CONCEPTS,
    SIDE,
    ConceptView,
    Looked,
    command,
    example_search,
    nodes_of,
    standing_out,
    tree_of,
)

FILE = "report.html"
CARD = "model card"
LIMIT = 10_000_000
"""Bytes that no report reaches."""
MAX_BESIDE = 31
MAX_TABLES = 6
MAX_NAMES = 400


class Missing(NamedTuple):
    """What a report does not show, why, and what to type to change that."""

    section: str
    why: str
    command: str | None


@dataclass(frozen=True, repr=False)
class Report(Result):
    """What `report` wrote."""

    path: Path
    card: Path | None
    """The model card; None where a person wrote or edited the README.md of the run, or it cannot be written."""
    size: int
    """Bytes of the page."""
    missing: tuple[Missing, ...]

    def to_text(self) -> str:
        lines = [f"{self.path}: {self.size / 1e6:.2f} MB, opens in any browser, offline"]
        if self.card is None and all(one.section != CARD for one in self.missing):
            lines.append("README.md of the run was written or edited by hand and is left as it is")
        elif self.card is not None:
            lines.append(f"{self.card}: the model card")
        for section, why, line in self.missing:
            lines.append(f"not in it: {section}: {why}" + (f"; type: {line}" if line else ""))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "report": str(self.path),
            "card": self.card and str(self.card),
            "bytes": self.size,
            "missing": self.records(),
        }

    def records(self) -> list[dict[str, Any]]:
        """What is not in it."""
        return [missing._asdict() for missing in self.missing]


def report(
    run: str | Path,
    on: EmbeddingStore | str | Path | None = None,
    *,
    out: str | Path | None = None,
    beside: Sequence[str | Path] = (),
    audit: Audit | str | Path | None = None,
    compare: Comparison | str | Path | None = None,
    show: str | Sequence[str] = (),
    device: str = "auto",
) -> Report:
    """Write one HTML file about a run that opens offline, and the model card, README.md in the run folder.

    It shows what the run folder has: figures, curves, names. What it lacks is named with the command that makes it.

    Args:
        run: A run folder.
        on: The store for samples, hierarchy and an example of a search. Without it, that of an earlier gallery or
            report.
        out: The file to write. Without it, report.html in the run folder.
        beside: Other run folders to show beside this one in tables and curves.
        audit: An audit to include, as msae audit --json wrote it.
        compare: A comparison to include, as msae compare --json wrote it.
        show: Columns of the metadata to show beside the captions, such as title,colour.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.

    Raises:
        RunError: A run is missing or damaged.
        StoreError: The store is missing, damaged, or does not fit the run.
        ConfigError: `out` is no place for a page, `audit` or `compare` is none, or there are too many runs.
    """
    folder = Path(run)
    facts = facts_of(folder)
    path = _place(Path(out or facts.run.report_file or FILE))
    others = [facts_of(Path(one)) for one in beside if Path(one).resolve() != folder.resolve()]
    if len(others) > MAX_BESIDE:
        raise ConfigError(f"{len(others)} runs to set beside this one; give at most {MAX_BESIDE}")
    given = audit if audit is None or isinstance(audit, Audit) else read_audit(Path(audit))
    looked, hidden = _look(facts, on, device), 0
    if compare is not None and not isinstance(compare, Comparison):
        named = Comparison.from_json(_text(Path(compare), "compare"), where=str(compare))
        compare = comparison_page.of_file(named, None if looked is None else looked.store)
        hidden = comparison_page.n_pictures(named) - comparison_page.n_pictures(compare)
    if looked is not None:
        looked = replace(looked, show=names_to_show(show, looked.store.columns, looked.store.address))
        facts = replace(facts, names=names_of(facts.run, looked.store))
    elif show:
        raise ConfigError("--show takes columns of a store, and no store is known here; add --on STORE")
    text, missing = _fitting(partial(_Draft, facts, others, looked, given, compare))
    page.write_page(text, path)
    if hidden:
        why = f"{hidden:,} rows are not of the report's own store, and pictures that a file names are not opened"
        missing.append(Missing("pictures of the comparison", why, None))
    card = None
    try:
        card = write_card(facts)
    except OSError as err:
        missing.append(Missing(CARD, f"{folder} cannot be written ({err.strerror})", None))
    return Report(path, card, len(text.encode()), tuple(missing))


def read_audit(file: Path) -> Audit:
    """The audit in a file that `msae audit --json` wrote.

    Raises:
        ConfigError: It is missing, or no audit.
    """
    return Audit.from_json(_text(file, "audit"), where=str(file))


def _text(file: Path, verb: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{file} cannot be read ({err}); make it with msae {verb} --json {file}") from err


def _place(path: Path) -> Path:
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ConfigError(f"{path} is no place for a report; give --out a file name that ends in .html")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ConfigError(f"{parent} is a file, so {path} cannot be made; give another --out")
    if not is_writable(parent):
        raise ConfigError(f"{parent} cannot be written, so {path} cannot be made; give another place: --out {FILE}")
    return path


def _look(facts: Facts, on: EmbeddingStore | str | Path | None, device: str) -> Looked | None:
    """The store that was given, or that of samples that were mined before, while it is what it was."""
    if on is not None:
        store = as_store(on)
        check_fit(facts.sae, store, run=facts.folder)
        return Looked.at(facts, store, device)
    known: dict[str, tuple[EmbeddingStore, dict[Modality, TopSamples]]] = {}
    for file in facts.run.cached_files(SAMPLES_FOLDER):
        try:
            samples = TopSamples.load(file)
            origin = samples.origin
            store = recorded_store(origin.store, origin.modality)
            is_true = origin.inference == "trained" and facts.run.holds(origin, store)
        except (RunError, StoreError):
            continue  # a cache may be damaged, and a store may have moved: the report says what is missing
        if is_true:
            known.setdefault(origin.fingerprint, (store, {}))[1].setdefault(origin.modality, samples)
    return Looked(*next(iter(known.values())), device=device) if known else None


def _fitting(draft: Any) -> tuple[str, list[Missing]]:
    """The page with as many concepts as fit below the limit."""
    for n_concepts, room in ((N_CONCEPTS, 5_000_000), (6, 1_000_000), (2, 100_000)):
        made = draft(n_concepts, room)
        text = made.page()
        if len(text.encode()) < LIMIT:
            break
    return text, made.missing


class Table(NamedTuple):
    """The table of measures on one store."""

    title: str
    terms: list[str]
    """The titles of the columns, as the legend has them."""
    columns: list[str]
    rows: list[tuple[bool, list[Cell]]]
    """Whether it is the report's own run, and its cells."""
    labels: str | None
    judgements: list[str]
    """A sentence on the report's own run; empty where an earlier msae evaluated it."""


class _Draft:
    """One page in the making, and what it had to leave out."""

    def __init__(
        self,
        facts: Facts,
        others: list[Facts],
        looked: Looked | None,
        audit: Audit | None,
        comparison: Comparison | None,
        n_concepts: int,
        room: int,
    ) -> None:
        self.facts, self.looked, self.audit, self.comparison = facts, looked, audit, comparison
        self.runs = dict(zip(_names([facts, *others]), [facts, *others], strict=True))
        self.n_concepts = n_concepts
        self.album = Album(looked.store.picture_roots if looked else (), SIDE, room=room)
        self.missing: list[Missing] = []
        self.store_word = looked.store.address if looked else "STORE"

    def page(self) -> str:
        facts, tables = self.facts, self._tables()
        return page.render(
            "report/report.html",
            facts=facts,
            version=__version__,
            glossary=glossary("h3"),
            store=self.looked and self.looked.store,
            tables=tables,
            meanings=legend(tables[0].terms) if tables else {},
            recovery=self._recovery(),
            training=self._training(),
            concepts=self._concepts(),
            all_names=self._all_names(),
            magnitudes=self._magnitudes(),
            tree=self._tree(),
            search=self._search(),
            audit=self._audit(),
            comparison=self._comparison(),
            missing={one.section: one for one in self.missing},
            album=self.album,
        )

    def _lacks(self, section: str, why: str, *words: str | Path) -> None:
        self.missing.append(Missing(section, why, command("msae", *words) if words else None))

    def _tables(self) -> list[Table]:
        tables = []
        for kept in self.facts.evaluations[:MAX_TABLES]:
            compared = self._compared_with(kept)
            named = [replace(one, run=name) for name, one in compared.items()]
            rows = table_rows(named)
            titles = [title.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓") for title in headings(rows[0])]
            e = kept.evaluation
            title = f"{e.n:,} {e.modality} rows of {Path(e.on).name}, inference {mode_of(e)}"
            ours = [self.runs[name] is self.facts for name in compared]
            cells = [list(row.values()) for row in rows]
            tables.append(
                Table(
                    title,
                    list(rows[0]),
                    titles,
                    list(zip(ours, cells, strict=True)),
                    kept.labels,
                    judgements_of([kept.evaluation]),
                )
            )
        if not tables:
            self._lacks(
                "quality", "this run has not been evaluated", "evaluate", self.facts.folder, "--on", self.store_word
            )
        return tables

    def _compared_with(self, kept: Kept) -> dict[str, Evaluation]:
        """The evaluations that may be compared with one, by the name of their run."""
        return {
            name: evaluation
            for name, facts in self.runs.items()
            for one in facts.evaluations
            if (evaluation := one.compared_with(kept)) is not None
        }

    def _recovery(self) -> list[str]:
        known = next((kept for kept in self.facts.evaluations if kept.evaluation.recovery), None)
        if known is None:
            on = self.facts.evaluations[0].evaluation.on if self.facts.evaluations else self.store_word
            self._lacks(
                "recovery",
                "what few latents recover has not been measured",
                "evaluate",
                self.facts.folder,
                "--on",
                on,
                "--recovery",
            )
            return []
        curves = {
            name: [asdict(point) for point in one.recovery]
            for name, one in self._compared_with(known).items()
            if one.recovery
        }
        measures: list[figures.RecoveryMeasure] = ["fvu", "cknna"]
        return [figures.recovery_curves(curves, measure) for measure in measures]

    def _training(self) -> list[str]:
        if not self.facts.metrics:
            self._lacks("training", "this run has no metrics.jsonl, so it was not trained here")
            return []
        by_run = {name: facts.metrics for name, facts in self.runs.items() if facts.metrics}
        measures: list[figures.TrainingMeasure] = ["fvu", "l0"]
        return [figures.training_curves(by_run, measure) for measure in measures]

    def _concepts(self) -> list[ConceptView]:
        facts = self.facts
        if facts.names is None:
            on = ("--on", self.store_word)
            self._lacks("names", "its latents have not been named", "name", facts.folder, *on)
        if self.looked is None:
            self._lacks(
                "samples",
                "pictures, texts and strengths need a store of embeddings, such as msae embed makes",
                "report",
                facts.folder,
                "--on",
                "STORE",
            )
            return []
        latents = standing_out(facts.names, self.looked.first)
        if facts.names is not None and len(facts.names):
            latents = [latent for latent in latents if facts.names.concept_of(latent)]
        if "image" in self.looked.samples and self.looked.locator is None:
            try:
                view = View(facts.run, self.looked.store, "image", device=self.looked.device)
                self.looked = replace(self.looked, locator=Locator(view, local=True))
            except MsaeError as err:
                self._lacks("regions", str(err))
        return [self.looked.concept(facts, latent, self.album) for latent in latents[: self.n_concepts]]

    def _all_names(self) -> tuple[list[str], int]:
        names = sorted({concept.name for concept in (self.facts.names.confirmed if self.facts.names else ())})
        return names[:MAX_NAMES], len(names)

    def _magnitudes(self) -> str | None:
        return None if self.looked is None else figures.magnitude_histograms(self.looked.magnitudes())

    def _tree(self) -> dict[str, Any] | None:
        if self.looked is None:
            return None
        tree = tree_of(self.facts, self.looked)
        roots = nodes_of(tree)
        n_left_out = len(tree.hierarchy.roots) - len(roots)
        n, rows = len(tree.hierarchy.parent), tree.hierarchy.n_rows
        return {"k": tree.k, "roots": roots, "n_left_out": n_left_out, "n": n, "rows": rows}

    def _search(self) -> dict[str, Any] | None:
        if self.looked is None:
            return None
        try:
            result = example_search(self.facts, self.looked)
        except MissingDependencyError as err:
            self._lacks("search", str(err))
            return None
        if result is None:
            if self.facts.names is not None:
                why = "no named latent fires in these rows" if len(self.facts.names) else "no latent has earned a name"
                self._lacks("search", why)
            return None
        return {"result": result, **search_page.parts(result, self.album)}

    def _audit(self) -> str | None:
        if self.audit is None:
            audit = ("audit", self.facts.folder, "--on", self.store_word, "--target", "COLUMN", "--json", "audit.json")
            self._lacks("audit", "no audit was given; make one, then add --audit audit.json to msae report", *audit)
            return None
        shown = [one for one in self.audit.shown if max(one.latents) < self.facts.config.d_sae]
        faces = {one.name: self._face(one.name, one.latents) for one in shown if self.looked is not None}
        return audit_page.section(self.audit, n_plotted=3, brief=True, faces=faces)

    def _face(self, concept: str, latents: Sequence[int]) -> tuple[str, Markup]:
        assert self.looked is not None
        label, picture = self.looked.face(self.facts, concept, latents, self.album)
        return label, page.render("report/thumb.html", label=label, picture=picture)

    def _comparison(self) -> str | None:
        if self.comparison is None:
            part = f"{self.store_word}:COLUMN="
            words = ("compare", self.facts.folder, f"{part}VALUE", f"{part}OTHER", "--json", "compare.json")
            self._lacks(
                "compare", "nothing was compared; compare, then add --compare compare.json to msae report", *words
            )
            return None
        return comparison_page.section(self.comparison, n_rows=12, n_pictured=3)


def _names(runs: list[Facts]) -> list[str]:
    """The name of each run's folder, or its path where two share one."""
    count = Counter(facts.name for facts in runs)
    return [str(facts.folder) if count[facts.name] > 1 else facts.name for facts in runs]
