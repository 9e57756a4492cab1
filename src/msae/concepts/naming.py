"""`name`: the latents of an SAE get words for names, where the evidence allows it.

The rules, their choices and what each was measured to do: docs/naming.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float32, Int64

from msae.base import statistics
from msae.base.config import settings_from
from msae.base.errors import ConfigError, RunError, StoreError
from msae.base.files import is_writable
from msae.concepts import evidence
from msae.concepts import rows as row_evidence
from msae.concepts.names import Agreement, Candidate, Concept, ConceptNames, RowEvidence, Rule
from msae.concepts.words import WORD_COLUMNS, embedded_words
from msae.data.arrays import unit_rows
from msae.data.sampled import sample_rows
from msae.data.store import EmbeddingStore, as_store
from msae.sae.model import SAE, Inference, check_fit, weights_hash
from msae.sae.run import Run, RunLike
from msae.sae.standardize import Modality, Statistics, fit_statistics
from msae.sae.view import View

Centre = Literal["vocabulary", "sae", "none"]
Untested = Literal["unnamed", "named"]

POSTER_COSINE = 0.42
POSTER_RATIO = 2.0
MIN_ROWS = 5
"""Rows with a word, and rows without, that agreement needs."""
TEXT_SHARE = 0.01
"""A name must be among this share of the words by how much its text activates the latent, or be the very first: a word
at random is with a probability of .01, or of one in the number of words where that is more."""
INFERENCE: Inference = "trained"
"""How activations are made, for texts and for rows: as in galleries."""
ACTIVATION_ENTRIES = 1 << 28
"""Activations of the rows that confirm names held at once, 1 GB of them; more latents take another pass."""
_CAPTION_COLUMNS = ("caption", "text", "label", "class", "title")


@dataclass(frozen=True)
class NameSettings:
    """How to name. Everything but the two stores and the SAE."""

    rule: Rule = "evidence"
    """Which latents get a name: `evidence` tests each name against chance; `poster` is the rule of the paper."""
    centre: Centre = "vocabulary"
    """What is subtracted from the words' embeddings: their own mean, the SAE's mean of texts, or nothing."""
    subtract_b_dec: bool = True
    """Subtract the SAE's decoder bias from the words."""
    false_names: float = 0.05
    """By the evidence rule, the largest q: of the latents that pass, the share, on average, that would lie as near to
    some word were their directions random. It does not bound the share of names that are wrong."""
    synonyms: float = 0.8
    """Words whose centred embeddings have at least this cosine are one group."""
    candidates: int = 5
    """How many of the nearest words are kept for every latent, named or not."""
    modality: Modality | None = None
    """Which embeddings of the store `on`. Without it, images where it has them."""
    column: str | None = None
    """The column of captions or labels of the store `on`. Without it, the first of caption, text, label, class and
    title."""
    language: str | None = None
    """The language of captions, such as de, whose inflected forms count as the word; needs msae[words]. Without it,
    words in captions are found as they are and in the English plural."""
    untested: Untested = "unnamed"
    """What becomes of a name that neither pictures nor captions can confirm: captions hardly mention it, or mention
    fewer than 20 words."""
    max_rows: int = 50_000
    """Rows of the store `on` to use; of more, a random sample."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        for field, low in (("false_names", 0.0), ("synonyms", -1.0)):
            if not low < getattr(self, field) <= 1:
                option = field.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, field)} is not in {low:g} to 1; give a number in between")
        for field in ("candidates", "max_rows"):
            if getattr(self, field) < 1:
                option = field.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, field)} is not positive; give at least 1")


class NameOptions(TypedDict, total=False):
    """The fields of `NameSettings`, as keywords that an editor completes."""

    rule: Rule
    centre: Centre
    subtract_b_dec: bool
    false_names: float
    synonyms: float
    candidates: int
    modality: Modality | None
    column: str | None
    language: str | None
    untested: Untested
    max_rows: int
    seed: int


def name(
    sae: RunLike,
    vocabulary: EmbeddingStore | str | Path | None = None,
    *,
    words: str | Path | None = None,
    on: EmbeddingStore | str | Path | None = None,
    encoder: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    settings: NameSettings | None = None,
    **options: Unpack[NameOptions],
) -> ConceptNames:
    """Give latents words for names: those that pictures and captions confirm, or the nearest to their decoder rows.

    Args:
        sae: A run folder, or a Hugging Face repository that holds an SAE.
        vocabulary: A store of words, embedded as text by the encoder of the SAE. Rows with the same word, such as
            prompt templates of it, count as one word with their mean embedding. Without it and without `words`, some
            10,000 words that come with msae, embedded by the encoder of the SAE the first time.
        words: A list of words to embed instead: a text file with one a line, or a .csv or .parquet with a column
            `word`.
        on: A store to confirm names on, of the kind of rows that names shall hold for. Images need no captions: half
            of them choose the word whose likeness goes best with a latent's activation, the other half decides
            whether it holds. Captions or labels, where there are any, may refuse a name: a latent must be active where
            they contain it. Without a store every name is only the nearest word.
        encoder: The encoder that embeds words, where it lies elsewhere or the SAE does not say which it was.
        out: Where to write names.json. Without it, into the run folder.
        device: Where to compute: `cpu`, `cuda`, `cuda:1` and so on; `auto` takes a GPU where there is one.
        settings: All settings at once, instead of `options`.
        options: Fields of `NameSettings`, such as `rule="poster"`.

    Raises:
        StoreError: A store is of another encoder or width, or has no words or no captions.
        RunError: names.json cannot be written there.
        EmbedderError: The encoder that shall embed words cannot be loaded.
        ConfigError: A setting is unknown or out of range, `settings` are given beside `options`, `words` beside
            `vocabulary`, or the SAE has no statistics for what is asked.
    """
    settings = settings_from(NameSettings, settings, options, where="name")
    run = Run.open(sae)
    target = out or run.names_file
    folder = None if target is None else Path(target) if Path(target).is_dir() else Path(target).parent
    if folder is not None and folder.is_dir() and not is_writable(folder):  # said before the work, not after it
        raise RunError(f"{target} cannot be written; give another place with --out names.json")
    sae = run.sae
    if vocabulary is None:
        vocabulary = embedded_words(run, words, encoder=encoder, device=device)
    elif words is not None:
        raise ConfigError("--words and --vocabulary both give the words; give one of them")
    store = as_store(vocabulary, "text")
    known = read_words(sae, store, settings)
    if settings.rule == "poster":
        names = _by_poster(sae, known, settings)
    else:
        names = _by_evidence(View(run, store, "text", inference=INFERENCE, device=device), known, on, settings)
    if target is not None:
        names.save(target)
    if out is None and (tested := names.record.get("on_fingerprint")) and (file := run.names_file_on(tested)):
        names.save(file)  # names of other rows come and go; what these rows said stays
    return names


# --- Words


@dataclass(frozen=True)
class Words:
    """The words of a vocabulary, each once, ready to be compared with decoder rows."""

    texts: tuple[str, ...]
    directions: Float32[np.ndarray, "m d_in"]
    """Unit rows in the space of the decoder."""
    groups: Int64[np.ndarray, " m"]
    """Synonym group of each word."""
    standardized: Float32[np.ndarray, "m d_in"]
    """What the SAE would read, were the words its input."""
    record: Mapping[str, Any]

    def members(self, group: int) -> list[str]:
        return [self.texts[i] for i in np.flatnonzero(self.groups == group)]


def read_words(sae: SAE, vocabulary: EmbeddingStore, settings: NameSettings) -> Words:
    """The vocabulary's words as directions in the space of the decoder of `sae`.

    Raises:
        StoreError: The vocabulary has no words, or is of another encoder or width.
    """
    check_fit(sae, vocabulary)
    texts, row_words = _distinct(_text_column(vocabulary, WORD_COLUMNS, None), vocabulary)
    raw = np.concatenate(list(vocabulary.batches("text", 8192)))
    n_rows = np.bincount(row_words)
    mean = np.zeros((len(texts), sae.d_in))
    # Unit rows, so that no prompt template of a word weighs more than another.
    np.add.at(mean, row_words, unit_rows(raw) * np.linalg.norm(raw, axis=1).mean())
    mean = (mean / n_rows[:, None]).astype(np.float32)
    centred = _standardize(mean, _origin(sae, mean, settings.centre, vocabulary))
    read = _standardize(mean, _origin(sae, mean, "sae" if "text" in sae.standardizer else "vocabulary", vocabulary))
    b_dec = sae.b_dec.detach().cpu().numpy() if settings.subtract_b_dec else np.float32(0)
    groups = evidence.synonym_groups(unit_rows(mean - mean.mean(0)), threshold=settings.synonyms)
    record = {
        "vocabulary": vocabulary.record.get("words", vocabulary.address),
        "n_unknown_words": int(vocabulary.record.get("n_unknown_words", 0)),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "vocabulary_metadata": vocabulary.metadata_fingerprint,
        "encoder": sae.config.encoder or vocabulary.encoder,
        "n_words": len(texts),
        "n_synonym_groups": int(groups.max()) + 1,
    }
    return Words(texts, unit_rows(centred - b_dec), groups, read, record)


def _origin(sae: SAE, words: Float32[np.ndarray, "m d_in"], centre: Centre, vocabulary: EmbeddingStore) -> Statistics:
    if centre == "sae":
        sae.standardizer.apply(torch.zeros(1, sae.d_in), "text")  # says what is missing where there are no statistics
        return sae.standardizer.statistics["text"]
    if centre == "vocabulary":
        try:
            return fit_statistics(lambda: [torch.from_numpy(words)])
        except StoreError as err:
            raise StoreError(f"{vocabulary.path} cannot be a vocabulary: {err}") from err
    scale = float(np.sqrt(sae.d_in) / np.linalg.norm(words, axis=1).mean())
    return Statistics(torch.zeros(sae.d_in), scale)


def _standardize(x: Float32[np.ndarray, "n d_in"], origin: Statistics) -> Float32[np.ndarray, "n d_in"]:
    return np.asarray((x - origin.mean.cpu().numpy()) * np.float32(origin.scale))


def _text_column(
    store: EmbeddingStore, known: Sequence[str], column: str | None, *, option: str | None = None
) -> list[str]:
    column = column or next((name for name in known if name in store.columns), None)
    if column is None:
        raise StoreError(
            f"{store.address} has none of the columns {', '.join(known)} "
            f"(it has {', '.join(store.columns) or 'none'}); "
            f"put a .csv with one of them beside it{f', or name another with {option}' if option else ''}"
        )
    return ["" if value is None else " ".join(str(value).split()) for value in store.column(column, option=option)]


def _distinct(texts: Sequence[str], vocabulary: EmbeddingStore) -> tuple[tuple[str, ...], Int64[np.ndarray, " n"]]:
    """Each word once, in the spelling that comes first, and the number of the word of each row."""
    known: dict[str, int] = {}
    spelling: list[str] = []
    numbers = np.empty(len(texts), np.int64)
    for row, text in enumerate(texts):
        if not text:
            raise StoreError(f"row {row} of the vocabulary {vocabulary.path} has no word; remove the row")
        if text.casefold() not in known:
            known[text.casefold()] = len(spelling)
            spelling.append(text)
        numbers[row] = known[text.casefold()]
    if len(spelling) < 2:
        raise StoreError(f"the vocabulary {vocabulary.path} has {len(spelling)} word; a name needs at least two")
    return tuple(spelling), numbers


# --- The poster's rule


def _by_poster(sae: SAE, words: Words, settings: NameSettings) -> ConceptNames:
    """Cosine above .42, twice the second best, and no other latent with the same best word."""
    found = evidence.nearest_words(
        _decoder(sae), words.directions, np.arange(len(words.texts)), top=max(2, settings.candidates)
    )
    best, second, word = found.cosines[:, 0], found.cosines[:, 1], found.words[:, 0]
    is_near = best > POSTER_COSINE
    is_clear = best > POSTER_RATIO * second  # without a division: a second best of 0 or less is no rival
    is_only = np.bincount(word, minlength=len(words.texts))[word] == 1
    valid = is_near & is_clear & is_only
    counts = {
        "cosine": int(is_near.sum()),
        "ratio": int(is_clear.sum()),
        "cosine_and_ratio": int((is_near & is_clear).sum()),
        "unique": int(is_only.sum()),
        "valid": int(valid.sum()),
    }
    concepts = [
        Concept(
            int(latent),
            words.texts[word[latent]],
            _round(best[latent]),
            _round(best[latent] - second[latent]),
            words.texts[found.words[latent, 1]],
        )
        for latent in np.flatnonzero(valid)
    ]
    return _names(sae, words, settings, concepts, counts, found)


# --- The evidence


class _Proposal(NamedTuple):
    """A word for a latent, with what rows say of it."""

    latent: int
    word: int
    rows: RowEvidence | None = None
    """Of pictures; None where the decoder proposed the word."""
    agreement: Agreement | None = None


def _by_evidence(
    texts: View, words: Words, on: EmbeddingStore | str | Path | None, settings: NameSettings
) -> ConceptNames:
    """Nearer than chance and read by the encoder as well, or chosen and confirmed by pictures; captions may refuse."""
    sae = texts.run.sae
    directions = _decoder(sae)
    found = evidence.nearest_words(directions, words.directions, words.groups, top=settings.candidates)
    rng = np.random.default_rng(settings.seed)
    null = evidence.random_like(directions, max(20_000, 2 * sae.d_sae), rng)
    null_cosines = evidence.best_cosines(null, words.directions)
    p = statistics.tail_p_values(found.cosines[:, 0], null_cosines)
    q = statistics.q_values(p)
    latents = np.flatnonzero(q <= settings.false_names)
    counts = {"latents": sae.d_sae, "beyond_chance": len(latents)}
    ranks = _text_ranks(texts, words, latents, found.words[latents, 0])
    latents = latents[ranks <= max(1, int(TEXT_SHARE * len(words.texts)))]
    counts["fired_by_text"] = len(latents)
    record: dict[str, Any] = {
        "inference": texts.inference,
        "false_names": settings.false_names,
        "null_size": len(null),
        "null_cosines": {str(share): _round(np.quantile(null_cosines, share)) for share in (0.5, 0.95, 0.99)},
    }
    proposals = [_Proposal(int(latent), int(found.words[latent, 0])) for latent in latents]
    if on is not None:
        proposals, tested, about = _on_rows(texts, words, as_store(on), proposals, settings, rng)
        counts |= tested
        record |= about
    own = np.array([one.word for one in proposals], dtype=np.int64)
    ranks = _text_ranks(texts, words, np.array([one.latent for one in proposals], dtype=np.int64), own)
    concepts = [
        _concept(
            one, words, found, directions[one.latent], (float(p[one.latent]), float(q[one.latent])), int(rank), record
        )
        for one, rank in zip(proposals, ranks, strict=True)
    ]
    return _names(sae, words, settings, concepts, {**counts, "named": len(concepts)}, found, record)


def _on_rows(
    texts: View,
    words: Words,
    store: EmbeddingStore,
    by_decoder: Sequence[_Proposal],
    settings: NameSettings,
    rng: np.random.Generator,
) -> tuple[list[_Proposal], dict[str, int], dict[str, Any]]:
    """The names that the rows of a store leave, at most one a latent, with counts and what goes into names.json."""
    sae = texts.sae
    check_fit(sae, store)
    is_readable = [m for m in store.modalities if m in sae.standardizer]
    drawn = sample_rows(store, settings.max_rows, seed=settings.seed)
    view = View(sae, drawn, settings.modality or (is_readable or store.modalities)[0], inference=INFERENCE)
    rows = np.sort(rng.permutation(len(drawn)))
    counts: dict[str, int] = {}
    record: dict[str, Any] = {
        "on": store.address,
        "on_fingerprint": store.fingerprint,
        "on_metadata": store.metadata_fingerprint,
        "on_modality": view.modality,
        "on_rows": len(rows),
        "untested": settings.untested,
        "language": settings.language,
    }
    by_rows: list[_Proposal] = []
    if view.modality == "image":
        chosen = row_evidence.choose(
            view, rows, words.directions, words.groups, by_decoder={one.latent: one.word for one in by_decoder},
            false_names=settings.false_names, rng=rng,
        )  # fmt: skip
        counts |= {"rows_tested": len(chosen.latents), "rows_held": int(chosen.is_held.sum())}
        by_rows = [
            _Proposal(int(chosen.latents[i]), int(chosen.words[i]), chosen.evidence[i])
            for i in np.flatnonzero(chosen.is_held)
        ]
    has_captions = settings.column is not None or any(column in store.columns for column in _CAPTION_COLUMNS)
    if view.modality == "image" and not has_captions:
        # A word near the decoder row that the pictures do not confirm is no name.
        return by_rows, counts, record
    captions = _Captions(view, words, rows, settings)
    record["on_words"] = captions.n_words
    proposals = [*by_rows, *by_decoder]
    found = captions.agreements(
        np.array([one.latent for one in proposals], dtype=np.int64),
        np.array([one.word for one in proposals], dtype=np.int64),
    )
    best: dict[int, _Proposal] = {}
    for proposal, agreement in zip(proposals, found, strict=True):
        one = proposal._replace(agreement=agreement)
        if _is_kept(one, settings.untested) and (
            one.latent not in best or _sureness(one) > _sureness(best[one.latent])
        ):
            best[one.latent] = one
    decided = found[len(by_rows) :]
    counts["tested"] = sum(agreement is not None and agreement.is_tested for agreement in decided)
    counts["agree"] = sum(agreement is not None and agreement.holds for agreement in decided)
    return sorted(best.values()), counts, record


def _is_kept(one: _Proposal, untested: Untested) -> bool:
    """Whether a name stands: captions do not refuse it, and pictures or captions confirm it, or `untested` does."""
    agreement = one.agreement
    if agreement is not None and agreement.is_tested:
        return agreement.holds
    if one.rows is not None:
        return True
    # the first of few words is so by chance too often to be confirmed by it
    return untested == "named" and (agreement is None or (agreement.low > 0.5 and agreement.rank == 1))


def _sureness(one: _Proposal) -> tuple[bool, float, bool]:
    """Of two words for one latent: which captions confirm goes before, then what they separate better."""
    held = one.agreement is not None and one.agreement.holds
    return held, one.agreement.auroc if held and one.agreement else 0.0, one.rows is not None


def _concept(
    one: _Proposal,
    words: Words,
    found: evidence.Matches,
    direction: Float32[np.ndarray, " d_in"],
    by_chance: tuple[float, float],
    text_rank: int,
    record: Mapping[str, Any],
) -> Concept:
    word, is_nearest = one.word, one.word == found.words[one.latent, 0]
    cosine = float(direction @ words.directions[word])
    rival, rival_cosine = int(found.rivals[one.latent]), float(found.rival_cosines[one.latent])
    if not is_nearest:
        near, nearest_cosine = int(found.words[one.latent, 0]), float(found.cosines[one.latent, 0])
        if words.groups[near] != words.groups[word]:
            rival, rival_cosine = near, nearest_cosine
    agreement, images_fire = one.agreement, True if one.rows else None
    if agreement and record.get("on_modality") == "image":
        images_fire = agreement.low > 0.5
    return Concept(
        one.latent,
        words.texts[word],
        _round(cosine),
        _round(cosine - rival_cosine) if rival >= 0 else None,
        words.texts[rival] if rival >= 0 else None,
        p=by_chance[0] if is_nearest else None,
        q=by_chance[1] if is_nearest else None,
        synonyms=tuple(text for text in words.members(words.groups[word]) if text != words.texts[word]),
        agreement=agreement,
        rows=one.rows,
        text_fires=text_rank <= len(words.texts),
        text_rank=text_rank,
        images_fire=images_fire,
    )


def _text_ranks(
    texts: View, words: Words, latents: Int64[np.ndarray, " c"], own: Int64[np.ndarray, " c"]
) -> Int64[np.ndarray, " c"]:
    """The place of each latent's word among all words by how much their texts activate the latent.

    It is the encoder's word on a name that only the decoder was asked for. Synonyms of the name are no rivals; a
    word that leaves the latent silent is behind all others.
    """
    x, size = torch.from_numpy(words.standardized).to(texts.device), texts.block_rows
    mine = np.empty(len(latents), np.float32)
    for first in range(0, len(latents), size):
        z = texts.activate(x[own[first : first + size]], latents[first : first + size].tolist())
        mine[first : first + size] = z.diagonal().cpu().numpy()
    n_stronger = np.zeros(len(latents), np.int64)
    for first in range(0, len(x), size):
        is_rival = words.groups[first : first + size, None] != words.groups[own]
        theirs = texts.activate(x[first : first + size], latents.tolist()).cpu().numpy()
        n_stronger += ((theirs > mine) & is_rival).sum(0)
    return np.where(mine > 0, 1 + n_stronger, 1 + len(words.texts))


class _Captions:
    """Rows with captions or labels: is a latent active where they mention its name?"""

    def __init__(self, view: View, words: Words, rows: Int64[np.ndarray, " n"], settings: NameSettings) -> None:
        captions = _text_column(view.store, _CAPTION_COLUMNS, settings.column, option="--column")
        self.view, self.words, self.rows = view, words, rows
        by_word = evidence.rows_with_words([captions[row] for row in self.rows], words.texts, settings.language)
        by_group: list[set[int]] = [set() for _ in range(int(words.groups.max()) + 1)]
        for group, found in zip(words.groups, by_word, strict=True):
            by_group[group].update(found)
        tested = [g for g, found in enumerate(by_group) if MIN_ROWS <= len(found) <= len(self.rows) - MIN_ROWS]
        self.rows_with = [sorted(by_group[group]) for group in tested]
        self.place = {group: i for i, group in enumerate(tested)}

    @property
    def n_words(self) -> int:
        """Words, synonyms counted once, that occur often enough to be ranked."""
        return len(self.rows_with)

    def agreements(self, latents: Int64[np.ndarray, " c"], own: Int64[np.ndarray, " c"]) -> list[Agreement | None]:
        """The agreement of each latent with its own word; None where the rows mention it too rarely."""
        groups = self.words.groups[own]
        result: list[Agreement | None] = [None] * len(latents)
        testable = np.array([i for i, group in enumerate(groups) if int(group) in self.place], dtype=np.int64)
        places = np.array([self.place[int(group)] for group in groups[testable]], dtype=np.int64)
        for held in _blocks(len(testable), len(self.rows), ACTIVATION_ENTRIES):
            z = self.view.table(self.rows, latents[testable[held]].tolist(), title="comparing with captions")
            for block in _blocks(z.shape[1], len(self.rows), evidence.BLOCK_ENTRIES):
                found = self._agreements(z[:, block], places[held][block])
                for i, agreement in zip(testable[held][block], found, strict=True):
                    result[i] = agreement
        return result

    def _agreements(self, z: Float32[np.ndarray, "n c"], places: Int64[np.ndarray, " c"]) -> Iterable[Agreement]:
        values = statistics.aurocs(z, self.rows_with)
        own = values[np.arange(len(places)), places]
        ranks = 1 + (values > own[:, None]).sum(1)
        n_with = np.array([len(self.rows_with[place]) for place in places])
        low, high = statistics.auroc_interval(own, n_with, len(z) - n_with)
        for i, place in enumerate(places):
            fires = z[:, i] > 0
            with_word = int(fires[self.rows_with[place]].sum())
            n, others = int(n_with[i]), len(z) - int(n_with[i])
            yield Agreement(
                auroc=_round(own[i]),
                low=_round(low[i]),
                high=_round(high[i]),
                n_with=n,
                n_without=others,
                rank=int(ranks[i]),
                n_words=len(self.rows_with),
                fires_with=_round(with_word / n),
                fires_without=_round((int(fires.sum()) - with_word) / others),
            )


# --- Small things


def _names(
    sae: SAE,
    words: Words,
    settings: NameSettings,
    concepts: Sequence[Concept],
    counts: Mapping[str, int],
    found: evidence.Matches,
    record: Mapping[str, Any] | None = None,
) -> ConceptNames:
    near = tuple(
        tuple(Candidate(words.texts[word], _round(cosine)) for word, cosine in zip(numbers, cosines, strict=True))
        for numbers, cosines in zip(
            found.words[:, : settings.candidates], found.cosines[:, : settings.candidates], strict=True
        )
    )
    how = {
        "centre": settings.centre,
        "subtract_b_dec": settings.subtract_b_dec,
        "synonym_cosine": settings.synonyms,
        "seed": settings.seed,
    }
    return ConceptNames(
        settings.rule,
        sae.d_sae,
        tuple(concepts),
        counts,
        near,
        {"sae": weights_hash(sae), **words.record, **how, **(record or {})},
    )


def _decoder(sae: SAE) -> Float32[np.ndarray, "d_sae d_in"]:
    return unit_rows(sae.W_dec.detach().cpu().float().numpy())


def _blocks(n: int, width: int, entries: int) -> list[slice]:
    """Slices of `range(n)` so small that each, times `width`, has at most `entries` entries."""
    size = max(1, entries // width)
    return [slice(first, first + size) for first in range(0, n, size)]


def _round(value: float | np.floating[Any]) -> float:
    return round(float(value), 6)
