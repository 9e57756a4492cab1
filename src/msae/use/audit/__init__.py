"""`audit`: which concepts a linear classifier relies on, by association and by intervention, with honest statistics.

What is tested and how to read it is in docs/audit.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from msae.base.errors import ConfigError, RunError
from msae.concepts.concept import Names, groups_of, is_numbers
from msae.concepts.examples import ExampleConcept
from msae.concepts.names import ConceptNames, as_names, names_of
from msae.data.sampled import SampledStore, notes_on, sample_rows
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE, Inference
from msae.sae.run import Run
from msae.sae.standardize import Modality
from msae.sae.view import View
from msae.use.audit.auditor import N_CONTROLS, Auditor, Sweeper
from msae.use.audit.fix import Fix, TooFewRows, Way, fix_classifier
from msae.use.audit.results import Association, Audit, ConceptAudit, Control, Debiasing, Effect, Group, Sweep
from msae.use.audit.slices import Slice
from msae.use.audit.subjects import make_subject, parse_class_texts
from msae.use.classifier import LinearClassifier

__all__ = [
    "Association",
    "Audit",
    "ConceptAudit",
    "Control",
    "Debiasing",
    "Effect",
    "Fix",
    "Group",
    "Slice",
    "Sweep",
    "Sweeper",
    "Way",
    "audit",
    "parse_class_texts",
]


def audit(
    sae: SAE | str | Path,
    on: EmbeddingStore | str | Path,
    target: str | None = None,
    *,
    concept: Sequence[str] = (),
    classifier: LinearClassifier | str | Path | None = None,
    class_texts: Mapping[str, str] | Sequence[str] | None = None,
    train_store: EmbeddingStore | str | Path | None = None,
    positive: str | None = None,
    names: Names | str | Path | None = None,
    all_latents: bool = False,
    where: str | None = None,
    fix: str | Path | None = None,
    groups: str | None = None,
    errors: bool = False,
    modality: Modality | None = None,
    inference: Inference = "trained",
    n_permutations: int | None = None,
    sweep_id: str | None = None,
    max_rows: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Audit:
    """Which concepts a linear classifier of embeddings relies on, the strongest causal effect first.

    Each concept is tested twice: whether it goes together with the classes, and how the classifier's answers change
    when the concept is removed or set high.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        on: The store whose rows are audited.
        target: The metadata column that holds the true classes; rows without one are left out and counted. Not needed
            where a classifier is given.
        concept: A name, a latent as #123, or several joined by |; may be given several times. Without it, every named
            concept.
        classifier: A .npz or .safetensors file of the classifier's coefficients.
        class_texts: A text for each class, as in "man=a photo of a man": CLIP's zero-shot classifier.
        train_store: The store on which a classifier is trained. Without this, `classifier` and `class_texts`, it is
            trained on a random half of `on`, and the other half is audited. Embeddings that are in both stores are
            divided likewise.
        positive: The class whose probability is watched. Without it, the second of two classes, or all of more.
        names: The names.json to use. Without it, the run's.
        all_latents: Audit every latent, named or not.
        where: Audit only rows whose metadata fit, as in "split == 'test' and size in (1, 2)".
        fix: Write a better classifier to this .npz or .safetensors file: without the concept of `concept`, or else
            without the strongest that stands out and has enough rows. Ways to do so are compared on rows used for
            neither fitting nor choosing.
        groups: With `fix`: the column of two values that says which rows have the concept. Without it, its firing does.
        errors: Also look for slices of errors: concepts that the wrong predictions of a class have more of than the
            right ones.
        modality: Which embeddings of the store. Without it, images where the store has them.
        inference: How activations are made: `trained` uses the activation function of the SAE, `threshold` keeps those
            above the thresholds fitted after training, `relu` keeps every positive one.
        n_permutations: The most shuffles for one p-value. Without it, 40 for each concept, but at least 2,000.
        sweep_id: Id of the row in which each concept is moved from 0 to twice its p99. Without it, an ordinary row for
            each concept.
        max_rows: Read at most so many rows of each store: of more, a random sample. Memory and time do not grow beyond
            it.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        seed: Random seed.

    Raises:
        ConfigError: Options that contradict each other, an unknown concept or class, a column that has no two classes.
        RunError: The run is missing or damaged.
        StoreError: A store is missing or damaged, does not fit the run, or lacks the modality or the column.
    """
    if groups is not None and fix is None:
        raise ConfigError(f"--groups {groups} says which rows a fix is judged by; add --fix FILE")
    if fix is not None and Path(fix).suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"--fix {fix} is no .npz or .safetensors file; give it one of these endings")
    run = Run.open(sae)
    store = sample_rows(as_store(on, modality, unnamed=run.modality), max_rows, seed=seed)
    sampled = [store]
    if train_store is not None:
        train_store = sample_rows(as_store(train_store, modality, unnamed=run.modality), max_rows, seed=seed)
        sampled.append(train_store)
    view = View(run, store, modality, inference=inference, device=device)
    subject = make_subject(
        view, target=target, classifier=classifier, class_texts=parse_class_texts(class_texts),
        train_store=train_store, seed=seed, positive=positive, where=where, device=device,
    )  # fmt: skip
    if errors and subject.truth is None:
        raise ConfigError("errors need true classes; give --target COLUMN with classes")
    known, examples, notes = _groups(view.run, concept, names, all_latents=all_latents)
    n_permutations = n_permutations or max(2000, 40 * len(known))
    auditor = Auditor(
        subject,
        known,
        n_permutations,
        sweep_id,
        np.random.default_rng(seed),
        examples=examples,
        keep_rare=bool(concept),
        errors=errors,
    )
    concepts, sample = auditor.run()
    if isinstance(store, SampledStore):
        sample = dataclasses.replace(sample, rows=store.chosen[sample.rows])
    found = Audit(
        target, view.store.address, subject.classifier.classes, len(subject.rows), subject.n_left_out,
        classifier=auditor.describe_classifier(),
        settings={
            "modality": view.modality, "inference": inference, "positive": positive, "n_permutations": n_permutations,
            "n_controls": N_CONTROLS, "where": where, "asked": bool(concept),
            "n_rare": len(auditor.rare), "seed": seed, "test": auditor.test,
        },
        concepts=tuple(concepts), notes=(*notes_on(*sampled), *subject.notes, *notes, *auditor.notes),
        slices=tuple(auditor.slices) if errors else None, sample=sample,
    )  # fmt: skip
    if fix is None:
        return found
    refused: dict[str, TooFewRows] = {}
    for this in _to_fix(found, bool(concept)):
        try:
            fixed, _ = fix_classifier(
                subject, this.name, this.latents,
                groups=groups, file=Path(fix), seed=seed, example=examples.get(this.name),
            )  # fmt: skip
        except TooFewRows as error:
            refused[this.name] = error
            continue
        skipped = [f"too few rows for a fix, so the next was taken: {', '.join(refused)}"] if refused else []
        return dataclasses.replace(found, fix=fixed, notes=(*found.notes, *skipped))
    first = next(iter(refused.values()))
    if len(refused) == 1:
        raise first
    raise ConfigError(f"none of the {len(refused)} concepts that stand out has enough rows for a fix: {first}")


def _to_fix(found: Audit, is_asked: bool) -> Sequence[ConceptAudit]:
    """The concepts to take out of the classifier, the first that has enough rows."""
    if is_asked and len(found.concepts) > 1:
        raise ConfigError(f"--fix takes one concept out, {len(found.concepts)} were given; keep one --concept")
    candidates = found.concepts if is_asked else [one for one in found.ranked if not one.is_target]
    if not candidates:
        raise ConfigError("no concept stands out, so there is nothing to fix; name one with --concept")
    return candidates


def _groups(
    run: Run,
    asked: Sequence[str],
    names: Names | str | Path | None,
    *,
    all_latents: bool,
) -> tuple[dict[str, tuple[int, ...]], dict[str, ExampleConcept], list[str]]:
    """The latents of each concept, which are concepts from examples, and what to say about the choice."""
    d_sae = run.sae.d_sae
    if all_latents:
        return {f"#{latent}": (latent,) for latent in range(d_sae)}, {}, []
    only_numbers = bool(asked) and all(is_numbers(one) for one in asked)
    if names is None and not only_numbers:
        if run.folder is None:
            if asked:
                raise ConfigError(f"nothing here says which latent is {asked[0]!r}; give names=, or latents as '#123'")
            return (
                _groups(run, asked, names, all_latents=True)[0],
                {},
                ["the SAE has no names here, so every latent was audited; names= takes what msae.name gave"],
            )
        names = names_of(run)
        names = run.folder if names is None else names
    if isinstance(names, str | Path):
        try:
            names = as_names(names)
        except RunError as err:
            raise RunError(f"{err}, or audit every latent with --all-latents") from err
    groups = groups_of(asked, names, d_sae)
    if not groups:
        raise ConfigError("no latent of this SAE has a name; audit every latent with --all-latents")
    examples, guessed = {}, []
    if isinstance(names, ConceptNames):
        examples = {name: example for name in groups if (example := names.example(name)) is not None}
        guessed = [name for name in groups if names.shown_name(name) != name]
    note = (
        f"{len(guessed)} of the {len(groups)} names are only the nearest words: no rows have confirmed them; to test "
        f"them, type: msae name RUN --on STORE"
    )
    return groups, examples, [note] if guessed else []
