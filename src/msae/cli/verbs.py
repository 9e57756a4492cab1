"""The verbs: for each its Python function, and how the result is shown. The options are those of the function."""

from __future__ import annotations

import functools
import json as json_format
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from msae.base.errors import ConfigError
from msae.base.processes import started
from msae.cli.output import report, say

Call = functools.partial[Any]
"""The verb's function with the options that were given; `call.keywords` are these options."""
Shown = tuple[str, Any] | tuple[str, Any, Callable[[], object]] | None
"""What is printed, what --json writes, and what is written after that; None where the verb has shown it itself."""


@dataclass(frozen=True)
class Verb:
    """One command."""

    summary: str
    """Its line in `msae --help`."""
    function: str
    """MODULE:NAME of the Python function; imported when the verb is used."""
    positional: tuple[str, str]
    """The parameter that needs no option, and what help calls it."""
    finish: Callable[..., Shown]
    """Calls the function and shows the result; its keywords are options of the command line alone."""
    settings: str | None = None
    """MODULE:NAME of the dataclass whose fields the function takes as `**options`."""
    hidden: tuple[str, ...] = ()
    """Parameters that only Python has."""
    renamed: Mapping[str, str] | None = None
    """Options of earlier versions, and what they are now."""
    alone: Mapping[str, str] | None = None
    """Options that may stand without a value, and the value that is meant then."""
    others: tuple[tuple[str, str], ...] = ()
    """Further parameters that need no option, after `positional`."""

    @property
    def places(self) -> dict[str, str]:
        """Every parameter that needs no option, in its place."""
        return dict([self.positional, *self.others])


def load(place: str) -> Any:
    """What `place`, as MODULE:NAME, names."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def demo(call: Call, *, json: str | None) -> Shown:
    tell: Callable[[str], object] = say if json == "-" else functools.partial(print, flush=True)
    result = call(say=tell)
    return result.to_text(), result.to_json()


def embed(call: Call) -> Shown:
    store = call()
    if call.keywords.get("part"):
        done = f"{store.samples:,} samples, {store.new:,} of them now"
        text = f"{call.keywords['out']}: part {store.part} is done ({done}); when all are, type: {store.next}"
        return text, store._asdict()
    n_skipped = store.record["counts"]["skipped"]
    skipped = f", inputs skipped: {n_skipped:,} (listed in store.json)" if n_skipped else ""
    text = f"{call.keywords['out']}: {len(store):,} rows x {store.d_in} of {' and '.join(store.modalities)}{skipped}"
    return "\n  ".join([text, *store.record.get("notes", ())]), store.describe()


def train(call: Call) -> Shown:
    from msae.measure.evaluate.untrained import glance
    from msae.sae.train.rows import TrainingRows
    from msae.sae.view import View

    sae = call()
    if started()[0] > 0:  # the first of several processes shows what they trained
        return None
    out = Path(call.keywords["out"])
    last = json_format.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    settings = json_format.loads((out / "config.json").read_text(encoding="utf-8"))["train"]
    rows = TrainingRows(call.keywords["store"], settings["modality"])
    lines = [f"{out}: {sae.config.kind} SAE {sae.d_in} -> {sae.d_sae}, {last['step']:,} steps"]
    samples: dict[str, Any] = {}
    for modality in rows.trained:
        store = next(store for store in rows.stores if modality in store.modalities)
        view = View(out, store, modality, device=call.keywords.get("device", "auto"))
        seen = glance(view, seed=settings["seed"])
        what = "" if len(rows.trained) == 1 else f"{modality} "
        of = "its" if len(rows.stores) == 1 else f"{store.path.name}'s"
        lines.append(
            f"on {seen.n:,} of {of} {len(store):,} {what}training rows (unseen rows lose more), "
            f"inference {seen.inference}:"
        )
        lines += [f"  {line}" for line in seen.to_text().splitlines()]
        samples[f"training_sample{'' if not samples else f'_{modality}'}"] = seen._asdict()
    lines.append(f"next, on rows that it was not trained on: msae evaluate {out} --on STORE")
    return "\n".join(lines), {"run": str(out), "settings": settings, "last": last, **samples}


def evaluate(call: Call, *, poster: bool = False, latex: bool = False) -> Shown:
    """
    Args:
        poster: Print the eight columns of the poster's table instead.
        latex: Print the poster's table as LaTeX.
    """
    from msae.measure.evaluate import poster_table

    results = call()
    for note in dict.fromkeys(note for result in results for note in result.notes):
        say(f"note: {note}")
    if poster or latex:
        return poster_table(results, style="latex" if latex else "markdown"), results.to_json()
    return results.to_text(), results.to_json()


def name(
    call: Call,
    *,
    as_: str | None = None,
    from_: str | None = None,
    like: tuple[str, ...] = (),
    unlike: tuple[str, ...] = (),
) -> Shown:
    """
    Args:
        as_: Instead of words for latents, learn one concept of this name from examples: a few latents that together
            fire for them. The examples are `from_`, or rows of `on` that `like` and `unlike` pick.
        from_: The rows of a store with a value in a column are the examples, those with another value show what it is
            not.
        like: Ids of rows that show the concept.
        unlike: Ids of rows that do not; without them, random other rows.
    """
    given = dict(call.keywords)
    if as_ is None:
        for option, value in (("--from", from_), ("--like", like), ("--unlike", unlike)):
            if value:
                raise ConfigError(f"{option} belongs to a concept from examples; add --as NAME")
        return show(call)
    from msae.concepts.examples import learn_concept

    sae, on = given.pop("sae"), given.pop("on", None)
    common = {key: given.pop(key) for key in ("modality", "device", "seed") if key in given}
    ignored = [f"--{key.replace('_', '-')}" for key, value in given.items() if not isinstance(value, bool)]
    if ignored:
        raise ConfigError(f"--as learns a concept from examples and takes no {', '.join(ignored)}; leave it out")
    if (from_ is None) == (on is None):
        raise ConfigError("the examples are given by --from STORE:column=value, or by --on STORE and --like ID ...")
    found = learn_concept(sae, as_, from_ if from_ is not None else on, like=like, unlike=unlike, **common)
    return found.to_text(), found.to_json()


def gallery(
    call: Call,
    *,
    sheet: Path | None = None,
    tree: bool = False,
    k: int | None = None,
    pairs: Path | None = None,
    magnitudes: bool = False,
) -> Shown:
    """
    Args:
        sheet: Also write the samples of the latent as one picture (.png) or as a page that opens offline (.html).
        tree: Instead of one latent, print which latents are parts of which others.
        k: With --tree: a latent counts as active where it is among the k strongest of its row. Without it, the
            smallest level of a matryoshka SAE; for other kinds every activation that is not zero counts.
        pairs: With --tree: score the tree against this table, whose columns child and parent hold a word and a
            broader word.
        magnitudes: Instead of one latent, print how large the activations are, and the largest of each row.
    """
    from msae.concepts.gallery import all_magnitudes
    from msae.concepts.tree import concept_tree

    given = call.keywords
    common = {key: given[key] for key in ("sae", "on", "inference", "max_rows", "device") if key in given}
    for option, value in (("--pairs", pairs), ("--k", k)):
        if value is not None and not tree:
            raise ConfigError(f"{option} {value} belongs to a tree; add --tree")
    if tree or magnitudes:
        ignored = [f"--{key}" for key, value in given.items() if key not in common and value is not False] + [
            "--sheet"
        ] * (sheet is not None)
        if tree and magnitudes:
            ignored.append("--magnitudes")
        if ignored:
            which = "--tree" if tree else "--magnitudes"
            raise ConfigError(f"{which} is of all latents and takes no {', '.join(ignored)}; leave out one of them")
    if tree:
        found = concept_tree(**common, k=k, pairs=pairs)
        return found.to_text(), found.to_json()
    if magnitudes:
        sizes = all_magnitudes(**common)
        return sizes.to_text(), sizes.to_json()
    shown = call()
    if sheet is not None:
        from msae.web.report.sheet import write_sheet

        write_sheet(shown, sheet)
    return shown.to_text(), shown.to_json()


def audit(call: Call, *, html: Path | None = None) -> Shown:
    """
    Args:
        html: Also write a page with plots to this file; it opens offline.
    """
    return _with_page(call(), html, "msae.web.report.audit:write_html", call.keywords["sae"])


def compare(call: Call, *, html: Path | None = None) -> Shown:
    """
    Args:
        html: Also write a page with pictures of both sides to this file; it opens offline.
    """
    return _with_page(call(), html, "msae.web.report.comparison:write_html")


def search(call: Call, *, html: Path | None = None) -> Shown:
    """
    Args:
        html: Also write a page of what was found before and after the edits; it opens offline.
    """
    return _with_page(call(), html, "msae.web.report.search:write_page")


def _with_page(result: Any, html: Path | None, write: str, *more: Any) -> Shown:
    """A page is written after the JSON, so that there is none of a result that could not be kept."""
    shown = result.to_text(), result.to_json()
    return shown if html is None else (*shown, lambda: load(write)(result, html, *more))


def explore(call: Call, *, json: str | None) -> Shown:
    def ready(url: str) -> None:
        data = {"url": url, "runs": list(call.keywords["runs"]), "on": call.keywords.get("on")}
        report(f"open {url} in a browser (Ctrl-C ends it)", data, json)
        sys.stdout.flush()

    call(say=say, ready=ready)
    return None


def show(call: Call) -> Shown:
    """The text and the data of a result that knows both."""
    result = call()
    return result.to_text(), result.to_json()


def info(call: Call) -> Shown:
    data = call()
    known = {key: value for key, value in data.items() if value is not None and value != []}
    width = max(map(len, known))
    lines = (
        f"{key:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in known.items()
    )
    return "\n".join(lines), data


RUN, RUNS, STORES = "RUN", "RUN...", "STORE..."
VERBS: dict[str, Verb] = {
    "demo": Verb(
        "the whole chain on a small world of drawn pictures that comes with the package, offline",
        "msae.world.chain:demo",
        ("", ""),
        demo,
    ),
    "embed": Verb("images or captions -> a store of embeddings", "msae.data.embed:embed", ("source", "SOURCE"), embed,
                  hidden=("shard_rows", "workers"), alone={"--ray": "auto"}),
    "train": Verb("a store -> a sparse autoencoder in a run folder", "msae.sae.train:train", ("store", STORES), train,
                  settings="msae.sae.train:TrainSettings"),
    "evaluate": Verb("runs -> how well each keeps the embeddings, and whether that is good",
                     "msae.measure.evaluate:evaluate", ("sae", RUNS), evaluate, hidden=("train_store", "batch_size")),
    "name": Verb("a run -> names for its latents, with evidence", "msae.concepts.naming:name",
                 ("sae", RUN), name, settings="msae.concepts.naming:NameSettings"),
    "find": Verb("which latents go with the values of a column", "msae.concepts.find:find", ("sae", RUN), show),
    "gallery": Verb("what activates a latent most; the tree of latents; how large activations are",
                    "msae.concepts.gallery:gallery", ("sae", RUN), gallery),
    "stability": Verb("which latents come back in runs from other seeds", "msae.concepts.stability:stability",
                      ("runs", RUNS), show),
    "search": Verb("nearest neighbours of a query in which concepts are made stronger or weaker",
                   "msae.use.search:search", ("sae", RUN), search,
                   renamed={"--no-residual": "--no-keep-residual"}),
    "audit": Verb("which concepts a classifier relies on, and what removing them does", "msae.use.audit:audit",
                  ("sae", RUN), audit, renamed={"--permutations": "--n-permutations"}),
    "compare": Verb("which concepts set two stores, or two parts of one, apart", "msae.use.compare:compare",
                    ("sae", RUN), compare, others=(("a", "A"), ("b", "B"))),
    "report": Verb("a run as one HTML file that opens offline, and as a model card", "msae.web.report:report",
                   ("run", RUN), show),
    "explore": Verb("runs and a store in a browser on this machine", "msae.web.explorer:explore", ("runs", RUNS),
                    explore),
    "encode": Verb("rows of a store as sparse codes, in a file or in Qdrant", "msae.use.codes:encode", ("sae", RUN),
                   show, hidden=("client",)),
    "export": Verb("a run for SAELens, sparsify, ONNX and others", "msae.use.export:export", ("run", RUN), show),
    "import": Verb("an SAE of another library -> a run; in Python: msae.import_sae", "msae.sae.formats:import_sae",
                   ("file", "FILE"), show),
    "push": Verb("a run -> a repository of the Hugging Face hub", "msae.web.hub:push", ("run", RUN), show,
                 others=(("repo", "REPO"),)),
    "info": Verb("what a store or a run holds", "msae.cli.info:info", ("path", "PATH"), info),
}  # fmt: skip
