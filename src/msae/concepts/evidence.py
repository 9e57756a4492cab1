"""Evidence for names: nearest words, random directions, synonym groups, words in captions.

docs/naming.md says how the rule uses them, and what each choice was measured to do.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from msae.base.errors import ConfigError, require
from msae.base.progress import progress
from msae.data.arrays import unit_rows

BLOCK_ENTRIES = 8_000_000
"""Cosines held at once, 32 MB of them: what bounds memory, whatever the number of words and latents."""
DRAWN_ROWS = 4096
"""Random directions that are drawn at once, in float64."""


# --- Nearest words


class Matches(NamedTuple):
    """The words nearest to each direction."""

    words: Int64[np.ndarray, "n top"]
    """Row numbers of the words, the nearest first."""
    cosines: Float32[np.ndarray, "n top"]
    rivals: Int64[np.ndarray, " n"]
    """The nearest word of another group than that of the nearest word; -1 where all words are one group."""
    rival_cosines: Float32[np.ndarray, " n"]
    """NaN where there is no rival."""


def nearest_words(
    directions: Float32[np.ndarray, "n d"],
    words: Float32[np.ndarray, "m d"],
    groups: Int64[np.ndarray, " m"],
    *,
    top: int,
) -> Matches:
    """The `top` nearest words of each direction, and the nearest word outside the best word's group.

    Args:
        directions: Rows of unit norm.
        words: Rows of unit norm.
        groups: The synonym group of each word.
    """
    top = min(top, len(words))
    labels = torch.from_numpy(groups)
    parts = []
    for cosines in _cosine_blocks(directions, words):
        best = cosines.topk(top, dim=1)
        cosines[labels[None, :] == labels[best.indices[:, :1]]] = -torch.inf
        rival = cosines.max(dim=1)
        none = rival.values.isneginf()
        parts.append(
            Matches(
                best.indices.numpy(),
                best.values.numpy(),
                rival.indices.masked_fill(none, -1).numpy(),
                rival.values.masked_fill(none, torch.nan).numpy(),
            )
        )
    return Matches(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def best_cosines(
    directions: Float32[np.ndarray, "n d"], words: Float32[np.ndarray, "m d"]
) -> Float32[np.ndarray, " n"]:
    """The cosine of each direction and its nearest word."""
    return np.concatenate([block.amax(dim=1).numpy() for block in _cosine_blocks(directions, words)])


def _cosine_blocks(directions: Float32[np.ndarray, "n d"], words: Float32[np.ndarray, "m d"]) -> Iterator[Tensor]:
    """Cosines with all words of some directions at a time, in memory that the next block overwrites.

    A new block each time would leave holes between the small results that are kept: nearly the whole matrix in the end.
    """
    rows = min(max(1, BLOCK_ENTRIES // len(words)), len(directions))
    transposed = torch.from_numpy(words).T
    memory = torch.empty(rows, len(words))
    with progress("comparing with words", total=len(directions), unit="directions") as advance:
        for first in range(0, len(directions), rows):
            block = directions[first : first + rows]
            yield torch.mm(torch.from_numpy(block), transposed, out=memory[: len(block)])
            advance(len(block))


# --- The null


def random_like(
    rows: Float32[np.ndarray, "n d"], count: int, rng: np.random.Generator
) -> Float32[np.ndarray, "count d"]:
    """Random unit rows, normal with the mean and covariance of `rows` before they are brought to norm one."""
    mean = rows.mean(0, dtype=np.float64)
    centred = rows - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(rows))
    root = vectors * np.sqrt(values.clip(0))  # clip: a covariance that is not of full rank has eigenvalues of -1e-9
    drawn = np.empty((count, rows.shape[1]), np.float32)
    for first in range(0, count, DRAWN_ROWS):  # the stream of numbers is the same, whatever the block
        block = drawn[first : first + DRAWN_ROWS]
        block[:] = unit_rows((mean + rng.standard_normal(block.shape) @ root.T).astype(np.float32))
    return drawn


# --- Synonyms


def synonym_groups(words: Float32[np.ndarray, "m d"], *, threshold: float) -> Int64[np.ndarray, " m"]:
    """A group number per word; any two words of one group have at least the cosine `threshold`.

    Groups are merged from the most similar pair down, and only where all their words are similar (complete
    linkage): a chain car, van, bus, tram would otherwise become one group.

    Args:
        words: Rows of unit norm.
    """
    parent = np.arange(len(words))
    members = {word: [word] for word in range(len(words))}
    for first, second in _similar_pairs(words, threshold):
        a, b = parent[first], parent[second]
        if a != b and bool((words[members[a]] @ words[members[b]].T >= threshold).all()):
            parent[members[b]] = a
            members[a] += members.pop(b)
    return np.unique(parent, return_inverse=True)[1].astype(np.int64)


def _similar_pairs(words: Float32[np.ndarray, "m d"], threshold: float) -> Int64[np.ndarray, "pairs 2"]:
    """Pairs of words at least that similar, the most similar first."""
    pairs, cosines, first = [], [], 0
    for block in _cosine_blocks(words, words):
        found = (block.triu_(first + 1) >= threshold).nonzero()
        cosines.append(block[found[:, 0], found[:, 1]].numpy())
        pairs.append(found.numpy() + np.array([first, 0]))
        first += len(block)
    order = np.argsort(-np.concatenate(cosines), kind="stable")
    return np.asarray(np.concatenate(pairs)[order])


# --- Words in captions


IRREGULAR_PLURALS = {
    "children": "child", "dice": "die", "feet": "foot", "geese": "goose", "lice": "louse", "mice": "mouse",
    "oxen": "ox", "people": "person", "teeth": "tooth",
}  # fmt: skip
"""English plurals that no rule of `_singulars` finds."""
UNSPACED_SCRIPTS = ("CJK ", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""How the Unicode names of characters begin whose scripts put no spaces between words."""


def rows_with_words(captions: Sequence[str], words: Sequence[str], language: str | None = None) -> list[list[int]]:
    """For each word, the numbers of the captions that contain it, as whole words, singular or plural.

    Letter case, punctuation and underscores do not count; a word may be a phrase, which must stand together. In scripts
    without spaces between words it may stand anywhere. Plurals are English ones; with a `language` all its inflected
    forms count, by the dictionaries of simplemma. A stemmer does not serve: Snowball's takes *animal* and *animation*
    for one word, and *woman* and *women* for two.

    Raises:
        MissingDependencyError: A language is given, and simplemma is not installed.
        ConfigError: simplemma has no dictionary of the language.
    """
    forms = _inflected(language) if language else _forms
    wanted: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, word in enumerate(words):
        for form in forms(_tokens(word)):
            wanted[form].append(number)
    longest = max((len(form) for form in wanted), default=0)
    rows: list[list[int]] = [[] for _ in words]
    for row, caption in enumerate(captions):
        tokens = _tokens(caption)
        phrases = {tokens[i : i + n] for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)}
        for number in {found for phrase in phrases for form in forms(phrase) for found in wanted.get(form, ())}:
            rows[number].append(row)
    return rows


def _inflected(language: str) -> Callable[[tuple[str, ...]], set[tuple[str, ...]]]:
    """What gives a phrase as it is and with the dictionary form of each of its words."""
    require("simplemma")
    import simplemma

    try:
        simplemma.lemmatize("a", lang=language)
    except ValueError as err:
        raise ConfigError(f"--language {language}: {err}; give a code such as en, de or fr") from err

    @lru_cache(maxsize=1 << 16)
    def lemma(word: str) -> str:
        return str(simplemma.lemmatize(word, lang=language)).casefold()

    return lambda phrase: {phrase, tuple(map(lemma, phrase))} if phrase else set()


def _tokens(text: str) -> tuple[str, ...]:
    """The words of a text; in scripts without spaces between words, its characters."""
    # NFKC: an accent of its own and one letter with it are the same, and so are wide and narrow letters.
    return tuple("".join(map(_spelled, unicodedata.normalize("NFKC", text.casefold()))).split())


@cache
def _spelled(character: str) -> str:
    """A character as it counts in a word: itself, nothing for an apostrophe, a space for what parts words."""
    if character in "'\u2019":
        return ""
    if not character.isalnum() and not unicodedata.category(character).startswith(
        "M"
    ):  # marks are vowels in many scripts
        return " "
    return f" {character} " if unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS) else character


def _forms(phrase: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The phrase, and what it may be the plural of."""
    if not phrase:
        return set()
    *rest, last = phrase
    return {(*rest, form) for form in (last, *_singulars(last))}


@lru_cache(maxsize=1 << 16)
def _singulars(word: str) -> set[str]:
    """What an English word may be the plural of."""
    found = {IRREGULAR_PLURALS[word]} if word in IRREGULAR_PLURALS else set()
    if word.endswith("men"):  # men, women, firemen
        found.add(word[:-2] + "an")
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        found.add(word[:-1])
        if word.endswith("es"):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        if word.endswith("ves"):  # wolves, knives
            found |= {word[:-3] + "f", word[:-3] + "fe"}
    return {form for form in found if len(form) > 2 or word in IRREGULAR_PLURALS}
