"""What is audited: the concepts, the rows and their true classes, and the classifier."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from msae.base.errors import ConfigError
from msae.concepts.examples import ExampleConcept
from msae.data.rows import PATH_COLUMNS, class_names, labelled_rows
from msae.data.store import EmbeddingStore
from msae.data.tables import CAPTION_COLUMNS, values_of
from msae.measure.probe import fit_probe, hold_out
from msae.sae.model import SAE
from msae.sae.view import View
from msae.use.classifier import SCORE, LinearClassifier, Readout
from msae.use.filters import Filter
from msae.use.interventions import Concepts, make_concepts

MAX_CLASSES = 50
"""More are no classes but, say, ages; each costs a column of every table."""
MAX_TRAINING = 200_000
"""Training rows that are compared with the audited ones."""
TEXT_LOGIT_SCALE = 100.0
"""What CLIP multiplies cosines with to make logits; every CLIP of OpenAI ended its training at this bound."""


class Training(NamedTuple):
    """Labelled rows of the training store; of more than `MAX_TRAINING`, a random sample."""

    view: View
    rows: Int64[np.ndarray, " n"]
    truth: Int64[np.ndarray, " n"]
    """Numbers in the classifier's classes."""


@dataclass(frozen=True)
class Subject:
    """Rows to audit, seen by the SAE, with their true classes, and the classifier that is audited on them."""

    view: View
    rows: Int64[np.ndarray, " n"]
    """Positions in the store, ascending."""
    truth: Int64[np.ndarray, " n"] | None
    """Numbers in `classifier.classes`; None where no target column was named."""
    n_left_out: int
    classifier: LinearClassifier
    n_train: int | None
    """Rows that the classifier was trained on here."""
    training: Training | None = None
    """Where it was trained, if a training store was given."""
    notes: tuple[str, ...] = ()
    """Which rows were held out."""
    positive: int | None = None
    """The class whose probability is watched; None watches all of them."""
    numbers: Float64[np.ndarray, " n"] | None = None
    """Of a model of one number, what it should say."""

    @cached_property
    def readout(self) -> Readout:
        """How the classifier is read."""
        return self.classifier.readout(self.watched)

    @property
    def watched(self) -> list[int]:
        """Numbers of the classes whose probabilities are watched."""
        return list(range(len(self.classifier.classes))) if self.positive is None else [self.positive]

    def raw(self, rows: Int64[np.ndarray, " n"]) -> Float[Tensor, "n d_in"]:
        """Embeddings of some rows of the store, as the classifier reads them."""
        return torch.from_numpy(self.view.store.take(rows, self.view.modality))

    def concepts(
        self,
        groups: Sequence[Sequence[int]],
        mean: Float[Tensor, " d_sae"],
        examples: Sequence[ExampleConcept | None] = (),
    ) -> Concepts:
        """`groups` of latents as the classifier sees them, each in the proportions of `mean`."""
        view, classifier = self.view, self.classifier
        to_features = classifier.scale / view.standardizer.statistics[view.modality].scale
        return make_concepts(groups, view.sae.W_dec.detach().cpu(), mean, to_features, self.readout.weight, examples)


def labels_of(store: EmbeddingStore, column: str) -> list[str | None]:
    """The classes in a metadata column, as `EmbeddingStore.labels` gives them.

    Raises:
        ConfigError: Fewer than two classes, or more than are classes.
        StoreError: There is no such column, or it holds lists.
    """
    labels = store.labels(column, option="--target")
    counts = Counter(label for label in labels if label is not None)
    if len(counts) < 2:
        found = f"only {next(iter(counts))!r} in {counts.total():,} labelled rows" if counts else "no labels"
        raise ConfigError(f"column {column!r} of {store.address} has {found}; an audit needs two classes: name another")
    if len(counts) > MAX_CLASSES:
        raise ConfigError(
            f"column {column!r} of {store.address} has {len(counts):,} different values, such as "
            f"{', '.join(sorted(counts)[:3])}; an audit takes at most {MAX_CLASSES} classes: name a column of classes"
        )
    return labels


def target_columns(store: EmbeddingStore) -> dict[str, int]:
    """The metadata columns that can be audited, with their numbers of classes; `refused_columns` has the others."""
    return {name: found for name, found in _judged_columns(store).items() if isinstance(found, int)}


def refused_columns(store: EmbeddingStore) -> dict[str, str]:
    """The metadata columns that `target_columns` leaves out, with the reason of each."""
    return {name: found for name, found in _judged_columns(store).items() if isinstance(found, str)}


def _judged_columns(store: EmbeddingStore) -> dict[str, int | str]:
    """Each metadata column's number of classes, or why it cannot be audited."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, int | str] = {}
    for name in store.columns:
        column = store.metadata.column(name)
        if name in ("id", *PATH_COLUMNS, *CAPTION_COLUMNS):
            found[name] = "names or describes single rows"
            continue
        if pa.types.is_nested(column.type):
            found[name] = "holds lists and not one class per row"
            continue
        n = len({label for label in class_names(values_of(pc.unique(column))) if label is not None})
        if n < 2:
            found[name] = "has the same value in every row" if n else "has no labels"
        elif n > MAX_CLASSES:
            found[name] = f"has {n:,} different values; an audit takes at most {MAX_CLASSES}"
        else:
            found[name] = n
    return found


def make_subject(
    view: View,
    *,
    target: str | None,
    classifier: LinearClassifier | str | Path | None,
    class_texts: Mapping[str, str] | None,
    train_store: EmbeddingStore | str | Path | None,
    seed: int,
    positive: str | None = None,
    where: str | None = None,
    device: str = "auto",
) -> Subject:
    """The rows and the classifier that the options of `audit` name.

    Without a training store, the classifier is trained on one half of the store and audited on the other.
    """
    sae, store, modality = view.sae, view.store, view.modality
    sae.standardizer.apply(torch.zeros(1, sae.d_in), modality)  # says what is missing where there are no statistics
    if sum(option is not None for option in (classifier, class_texts, train_store)) > 1:
        raise ConfigError("--classifier, --class-texts and --train-store each give a classifier; keep one of them")
    given = None
    kept = np.ones(len(store), bool) if where is None else Filter.parse(where).rows_of(store)
    if not kept.any():
        raise ConfigError(f"no row of {store.address} fits {where!r}; give another --where")
    numbers = None if target is None else numbers_of(store, target)
    labels = None if target is None or numbers is not None else labels_of(store, target)
    if classifier is not None:
        known = tuple(sorted({label for label in labels or () if label is not None}))
        given = (
            classifier
            if isinstance(classifier, LinearClassifier)
            else LinearClassifier.load(classifier, d_in=store.d_in, classes=known)
        )
        if given.weight.shape[1] != store.d_in:
            raise ConfigError(f"the classifier reads width {given.weight.shape[1]}, {store.address} has {store.d_in}")
    elif class_texts is not None:
        given = zero_shot(class_texts, sae, store, device)
    if positive is not None and (numbers is not None or (given is not None and given.is_score)):
        raise ConfigError(f"--positive {positive} names a class, and the model gives a number; leave it out")
    if given is not None and given.is_score:
        return _scored(view, given, numbers, np.flatnonzero(kept))
    if given is not None and numbers is not None:
        raise ConfigError(f"column {target!r} holds numbers and the classifier has classes; give a column of classes")
    if given is not None:
        return _with_given(view, labels, given, positive, rows=np.flatnonzero(kept))
    if numbers is not None:
        return _fitted_score(view, numbers, str(target), train_store, kept, seed)
    if target is None or labels is None:
        raise ConfigError("nothing to audit; give --target COLUMN, or a classifier with --classifier FILE")
    other = (
        view
        if train_store is None
        else View(view.run, train_store, modality, inference=view.inference, device=str(view.device))
    )
    theirs = labels if other is view else labels_of(other.store, target)
    held = hold_out(
        other.store,
        store,
        modality,
        train_rows=_kept(labelled_rows(theirs), kept) if other is view else labelled_rows(theirs),
        on_rows=_kept(labelled_rows(labels), kept),
        seed=seed,
    )
    source = f"half of {store.address}" if train_store is None else other.store.address
    fitted = _fit(other, [theirs[row] for row in held.train], held.train, source, seed)
    n_missing = sum(label is None for label, keep in zip(labels, kept, strict=True) if keep)
    subject = _with_given(view, labels, fitted, positive, rows=held.on, n_train=len(held.train), n_missing=n_missing)
    if train_store is None:
        return subject
    training = _training(other, theirs, held.train, fitted, seed)
    return dataclasses.replace(subject, training=training, notes=(held.note,) if held.note else ())


def numbers_of(store: EmbeddingStore, column: str) -> Float64[np.ndarray, " n"] | None:
    """The numbers in a column, NaN where one is missing; None where it holds classes: no numbers, or few different."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(store.coded_labels(column, option="--target")[1]) <= MAX_CLASSES:  # says what is missing
        return None
    values = pa.chunked_array([chunk for piece in store.pieces([column]) for chunk in piece.column(column).chunks])
    try:
        if pa.types.is_string(values.type):
            values = pc.if_else(pc.equal(values, ""), None, values)
        return np.asarray(values.cast(pa.float64()).to_numpy(), np.float64)
    except pa.ArrowException:
        return None


def _scored(
    view: View,
    classifier: LinearClassifier,
    numbers: Float64[np.ndarray, " n"] | None,
    rows: Int64[np.ndarray, " m"],
    n_train: int | None = None,
    n_missing: int = 0,
) -> Subject:
    """Rows audited by a model of one number; those without a number are left out, beside the `n_missing` before."""
    n = n_missing + len(rows)
    if numbers is not None:
        rows = rows[np.isfinite(numbers[rows])]
        if not len(rows):
            raise ConfigError("the column has a number in none of the audited rows; name another with --target")
    known = None if numbers is None else numbers[rows]
    return Subject(view, rows, None, n - len(rows), classifier, n_train, positive=0, numbers=known)


def _fitted_score(
    view: View,
    numbers: Float64[np.ndarray, " n"],
    column: str,
    train_store: EmbeddingStore | str | Path | None,
    kept: NDArray[np.bool_],
    seed: int,
) -> Subject:
    """Ridge regression on a training store, or on a random half of the rows."""
    from sklearn.linear_model import RidgeCV

    other = view if train_store is None else View(view.run, train_store, view.modality, device=str(view.device))
    theirs = numbers if other is view else numbers_of(other.store, column)
    if theirs is None:
        raise ConfigError(
            f"column {column!r} of {other.store.address} holds classes, {view.store.address} has numbers there"
        )
    allowed = kept if other is view else np.ones(len(theirs), bool)
    held = hold_out(
        other.store, view.store, view.modality, seed=seed, train_rows=np.flatnonzero(np.isfinite(theirs) & allowed),
        on_rows=np.flatnonzero(np.isfinite(numbers) & kept),
    )  # fmt: skip
    known = view.standardizer.statistics[view.modality]
    scale = torch.full_like(known.mean, known.scale)
    nothing = torch.zeros(1, view.store.d_in)
    source = f"ridge regression on {f'half of {view.store.address}' if other is view else other.store.address}"
    blank = LinearClassifier((SCORE,), nothing, torch.zeros(1), known.mean, scale, True, source)
    x = torch.from_numpy(other.store.take(held.train, view.modality))
    u = torch.nn.functional.normalize(blank.features(x), dim=1).double().numpy()
    model = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(u, theirs[held.train])
    weight, bias = (torch.from_numpy(np.atleast_1d(part)).float() for part in (model.coef_, model.intercept_))
    fitted = dataclasses.replace(blank, weight=weight[None], bias=bias)
    n_missing = int((kept & ~np.isfinite(numbers)).sum())
    subject = _scored(view, fitted, numbers, held.on, len(held.train), n_missing)
    return subject if other is view else dataclasses.replace(subject, notes=(held.note,) if held.note else ())


def _training(
    view: View,
    labels: Sequence[str | None],
    rows: Int64[np.ndarray, " n"],
    classifier: LinearClassifier,
    seed: int,
) -> Training:
    number_of = {name: number for number, name in enumerate(classifier.classes)}
    if len(rows) > MAX_TRAINING:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_TRAINING, replace=False))
    return Training(view, rows, np.array([number_of[labels[row] or ""] for row in rows], dtype=np.int64))


def _with_given(
    view: View,
    labels: list[str | None] | None,
    classifier: LinearClassifier,
    positive: str | None,
    *,
    rows: Int64[np.ndarray, " n"],
    n_train: int | None = None,
    n_missing: int = 0,
) -> Subject:
    watched = _positive(classifier, positive)
    if labels is None:
        return Subject(view, rows, None, 0, classifier, None, positive=watched)
    number_of = {name: number for number, name in enumerate(classifier.classes)}
    truth = np.array([number_of.get(labels[row] or "", -1) for row in rows], dtype=np.int64)
    kept = truth >= 0
    if not kept.any():
        theirs = sorted({label for label in labels if label is not None})[:4]
        raise ConfigError(
            f"the classifier's classes {', '.join(classifier.classes[:4])} are none of the column's "
            f"{', '.join(theirs)}; name another column with --target, or write its values into the file as classes"
        )
    n_missing += len(rows) - int(kept.sum())
    return Subject(view, rows[kept], truth[kept], n_missing, classifier, n_train, positive=watched)


def _kept(rows: Int64[np.ndarray, " n"], kept: NDArray[np.bool_]) -> Int64[np.ndarray, " m"]:
    found: Int64[np.ndarray, " m"] = rows[kept[rows]]
    return found


def _positive(classifier: LinearClassifier, name: str | None) -> int | None:
    if name is None:
        return 1 if len(classifier.classes) == 2 else None
    if name not in classifier.classes:
        raise ConfigError(f"there is no class {name!r}; the classes are {', '.join(classifier.classes)}")
    return classifier.classes.index(name)


def _fit(
    view: View, labels: Sequence[str | None], rows: Int64[np.ndarray, " n"], source: str, seed: int
) -> LinearClassifier:
    """A probe on embeddings standardised as the SAE's, as a classifier of raw ones."""

    def standardized(chosen: Any) -> torch.Tensor:
        return view.standardize(torch.from_numpy(view.store.take(rows[np.asarray(chosen)], view.modality)))

    probe = fit_probe(standardized, labels, seed=seed)
    known = view.sae.standardizer.statistics[view.modality]
    scale = torch.full_like(known.mean, known.scale)
    source = f"logistic regression on {source}"
    return LinearClassifier(probe.classes, probe.weight, probe.bias, known.mean, scale, True, source)


def parse_class_texts(options: Mapping[str, str] | Sequence[str] | None) -> dict[str, str] | None:
    """The text of each class, from a mapping or from `CLASS=TEXT` words; None where there are none.

    Raises:
        ConfigError: One has no `=`.
    """
    if isinstance(options, Mapping):
        return dict(options)
    if not options:
        return None
    wrong = next((option for option in options if "=" not in option), None)
    if wrong is not None:
        raise ConfigError(f"--class-texts {wrong!r} is not CLASS=TEXT; write for example 'man=a photo of a man'")
    return dict(option.split("=", 1) for option in options)


def zero_shot(texts: Mapping[str, str], sae: SAE, store: EmbeddingStore, device: str = "auto") -> LinearClassifier:
    """CLIP's zero-shot classifier: a class's weights are the unit-norm embedding of its text, times 100.

    Raises:
        ConfigError: There are fewer than two texts, or nothing says which model made the embeddings.
        StoreError: That model has other weights now.
    """
    if len(texts) < 2:
        raise ConfigError(
            f"{len(texts)} class text; give two or more, for example --class-texts 'man=a man' 'woman=a woman'"
        )
    from msae.data.embedder import embedder_for

    embedder = embedder_for(store, sae.config, need="--class-texts", device=device)
    weight = TEXT_LOGIT_SCALE * torch.from_numpy(embedder.embed_texts(list(texts.values())))
    nothing = torch.zeros(store.d_in)
    source = f"zero-shot texts of {embedder.id}"
    return LinearClassifier(tuple(texts), weight, torch.zeros(len(texts)), nothing, nothing + 1, True, source)
