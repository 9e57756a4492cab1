"""`Probe`: a linear classifier on embeddings, and rows to train and to evaluate it on with no embedding in both."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch.nn import functional

from msae.base.errors import ConfigError
from msae.data.layout import Modality
from msae.data.rows import class_names, labelled_rows
from msae.data.store import EmbeddingStore

C = 100.0
"""Inverse strength of the L2 penalty, as in scikit-learn: summed cross-entropy + ||weight||^2 / (2 C).

Unit-norm inputs need long weights. On CLIP ViT-B/32 (48,943 rows, 2,105 classes) C = 1, 10, 100 gave accuracies of
.728, .780, .787 and a cross-entropy of 1.81, .94, .79 on unseen images (five passes of minibatches).
"""
LBFGS_ROWS = 300_000
"""Rows above which all of them in float64 are too many to hold."""
LBFGS_WORK = 5e8
"""Rows x classes x width above which one of its some 100 iterations takes longer than a tenth of a second."""
MINIBATCH = 1024
MINIBATCH_STEPS = 250
"""At least these, and at least one pass: 5 passes over the rows named above, where 10 gave an accuracy of .795."""
LEARNING_RATE = 0.3
"""Of Adam, falling linearly to 0; 0.1 was behind by .004 of accuracy after 250 steps."""


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on standardised embeddings that are scaled to unit norm."""

    classes: tuple[str, ...]
    """Sorted."""
    weight: Float[Tensor, "n_classes d_in"]
    bias: Float[Tensor, " n_classes"]
    solver: Literal["lbfgs", "minibatch"]

    def logits(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n n_classes"]:
        """Unnormalised log-probabilities of the classes for standardised embeddings of any norm."""
        return torch.addmm(self.bias, unit_norm(x), self.weight.T)

    def encode(self, labels: Sequence[Any]) -> Int[Tensor, " n"]:
        """The number of each label's class, -1 for a missing label and for one that the probe never saw."""
        known = {name: number for number, name in enumerate(self.classes)}
        names = class_names(labels)
        return torch.tensor([-1 if name is None else known.get(name, -1) for name in names], dtype=torch.int64)

    def to(self, device: torch.device | str) -> Probe:
        """A copy on `device`."""
        return Probe(self.classes, self.weight.to(device), self.bias.to(device), self.solver)


def unit_norm(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1; a zero row stays zero."""
    return functional.normalize(x, dim=1)


def fit_probe(
    rows: Callable[[Int[np.ndarray, " m"]], Float[Tensor, "m d_in"]],
    labels: Sequence[Any],
    *,
    solver: Literal["auto", "lbfgs", "minibatch"] = "auto",
    seed: int = 0,
) -> Probe:
    """The probe that minimises cross-entropy with an L2 penalty (`C`) on the labelled rows.

    Args:
        rows: Gives the standardised embeddings of row numbers, in ascending order.
        labels: One per row; rows whose label is missing are left out.
        solver: `lbfgs` is scikit-learn's, to convergence, on all rows in memory. `minibatch` is Adam and reads
            a batch at a time. `auto` takes the latter for many rows or classes. Both minimise the same objective.

    Raises:
        ConfigError: There are fewer than two classes, or no class has two rows.
    """
    every = class_names(labels)
    labelled = labelled_rows(every)
    names = [name for name in every if name is not None]
    counts = Counter(names)
    if len(counts) < 2:
        found = f"only the class {names[0]!r}" if names else "no labels"
        raise ConfigError(f"a probe needs two classes, but there is {found}; name another column with --labels")
    if max(counts.values()) < 2:
        raise ConfigError(
            f"each of the {len(names)} labels occurs once, so there is nothing to learn; "
            f"name a column of classes with --labels"
        )
    classes = tuple(sorted(counts))
    number_of = {name: number for number, name in enumerate(classes)}
    targets = torch.tensor([number_of[name] for name in names])
    if solver == "auto":
        d_in = rows(labelled[:1]).shape[1]
        is_small = len(labelled) <= LBFGS_ROWS and len(labelled) * len(classes) * d_in <= LBFGS_WORK
        solver = "lbfgs" if is_small else "minibatch"
    if solver == "lbfgs":
        weight, bias = _fit_lbfgs(unit_norm(rows(labelled)), targets)
    else:
        weight, bias = _fit_minibatch(rows, labelled, targets, n_classes=len(classes), seed=seed)
    return Probe(classes, weight, bias, solver)


def _fit_lbfgs(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, solver="lbfgs", max_iter=1000)
    with warnings.catch_warnings():
        # After 1000 iterations the predictions stand, and the penalty keeps separable classes finite.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        model.fit(x.cpu().double().numpy(), targets.numpy())
    weight, bias = (torch.from_numpy(value).float() for value in (model.coef_, model.intercept_))
    if len(weight) == 1:  # two classes: scikit-learn fits the difference of their logits
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return weight, bias


def _fit_minibatch(
    rows: Callable[[np.ndarray], Tensor], labelled: np.ndarray, targets: Tensor, *, n_classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    example = rows(labelled[:1])
    weight = torch.zeros(n_classes, example.shape[1], device=example.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=example.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE, fused=True)
    size = min(MINIBATCH, len(labelled))
    n_steps = max(MINIBATCH_STEPS, len(labelled) // size)
    order = np.empty(0, dtype=np.int64)
    for step in range(n_steps):
        if len(order) < size:
            order = rng.permutation(len(labelled))
        chosen, order = np.sort(order[:size]), order[size:]
        x, y = unit_norm(rows(labelled[chosen])), targets[torch.from_numpy(chosen)].to(example.device)
        loss = functional.cross_entropy(torch.addmm(bias, x, weight.T), y)
        penalty = weight.square().sum() / (2 * C * len(labelled))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / n_steps)
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach(), bias.detach()


ROWS_AT_ONCE = 8192


class HoldOut(NamedTuple):
    """Rows of two stores that share no embedding."""

    train: Int64[np.ndarray, " n"]
    """Rows of the training store, ascending."""
    on: Int64[np.ndarray, " m"]
    """Rows of the evaluated store, ascending."""
    note: str | None
    """What was held out; None where the stores shared nothing."""


def hold_out(
    train: EmbeddingStore,
    on: EmbeddingStore,
    modality: Modality,
    *,
    train_rows: Int64[np.ndarray, " n"],
    on_rows: Int64[np.ndarray, " m"],
    seed: int,
) -> HoldOut:
    """`train_rows` and `on_rows` without what both contain: a random half of that trains, the other half is evaluated.

    Rows are the same where their embeddings are equal, whatever their ids: a classifier has seen the embedding, not
    the id. Where one store holds float16, both are compared as float16.
    """
    dtypes = {store.rows[modality].dtype for store in (train, on)}
    dtype = np.float16 if "float16" in dtypes else np.float32
    theirs = _keys(train, modality, train_rows, dtype)
    mine = theirs
    is_one = train is on or (train.path == on.path and train.fingerprint == on.fingerprint)
    if not is_one or not np.array_equal(train_rows, on_rows):
        mine = _keys(on, modality, on_rows, dtype)
    is_trained_on = _among(mine, theirs)
    if not is_trained_on.any():
        return HoldOut(train_rows, on_rows, None)
    shared, first = np.unique(mine[is_trained_on], return_index=True)
    shuffled = np.random.default_rng(seed).permutation(shared[np.argsort(first)])  # equal rows stay together
    kept = train_rows[~_among(theirs, shuffled[1::2])], on_rows[~_among(mine, shuffled[::2])]
    note = (
        f"{int(is_trained_on.sum()):,} of the {len(on_rows):,} rows to evaluate in {on.path} are also training rows of "
        f"the classifier in {train.path}: a random half of them (seed {seed}) is used for training alone, the other "
        f"for evaluation alone, which leaves {len(kept[0]):,} and {len(kept[1]):,} rows"
    )
    return HoldOut(*kept, note)


def _keys(
    store: EmbeddingStore, modality: Modality, rows: Int64[np.ndarray, " n"], dtype: type[np.floating]
) -> Int64[np.ndarray, " n"]:
    """A hash of each row; equal rows have equal ones."""
    found = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        x = store.take(rows[start : start + ROWS_AT_ONCE], modality)
        with np.errstate(over="ignore"):
            x = x.astype(dtype) + dtype(0)  # -0 becomes 0
        found[start : start + len(x)] = [hash(row.tobytes()) for row in x]
    return found


def _among(keys: Int64[np.ndarray, " n"], known: Int64[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which keys are among the known; `np.isin` says the same and holds some 70 bytes for each."""
    ordered, found = np.sort(known), np.zeros(len(keys), bool)
    for first in range(0, len(keys) if len(known) else 0, ROWS_AT_ONCE):
        some = keys[first : first + ROWS_AT_ONCE]
        place = np.searchsorted(ordered, some).clip(max=len(ordered) - 1)
        found[first : first + len(some)] = ordered[place] == some
    return found
