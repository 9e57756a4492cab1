"""How well a CLIP-like model sees the demo's world: retrieval, and zero-shot on every attribute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from msae.world.drawing import draw
from msae.world.scenes import ATTRIBUTES, UNSEEN_SEEDS, VOCABULARY, Scene, attributes, caption, sample_scene

if TYPE_CHECKING:
    from PIL import Image

Rows = npt.NDArray[np.float32]
EmbedImages = Callable[[Sequence["Image.Image"]], Rows]
EmbedTexts = Callable[[Sequence[str]], Rows]


@dataclass(frozen=True)
class Scores:
    """What `measure` found; all shares between 0 and 1.

    Attributes:
        n_scenes: Scenes per measurement.
        recall_at_1: Captions whose own picture is the nearest of all pictures.
        recall_at_5: Captions whose own picture is among the five nearest.
        zero_shot: For each attribute, the accuracy of naming its value by the nearest phrase of the
            vocabulary: the mean over the values, so that a rare value counts as much as a common one.
        order: Pairs whose caption is nearer than the caption with the two objects exchanged; chance is 0.5.
    """

    n_scenes: int
    recall_at_1: float
    recall_at_5: float
    zero_shot: dict[str, float]
    order: float


def measure(
    embed_images: EmbedImages,
    embed_texts: EmbedTexts,
    *,
    n_scenes: int = 1000,
    first_seed: int = UNSEEN_SEEDS.start,
) -> Scores:
    """Score a model on scenes that the demo's CLIP was not trained on.

    Retrieval and the count are measured on scenes of one to three objects, no two of them described alike; the
    relation and the order on pairs; every other attribute on lone objects.

    Args:
        embed_images: Gives one row per picture; rows need no unit length.
        embed_texts: Gives one row per text, in the same space.
        n_scenes: Scenes per measurement.
        first_seed: The measured seeds count on from here.
    """
    mixed = distinct_scenes(n_scenes, first_seed)
    pairs = [sample_scene(first_seed + k, relation=ATTRIBUTES["relation"][k % 2]) for k in range(n_scenes)]
    lone = [sample_scene(first_seed + k, count=1) for k in range(n_scenes)]
    rows = {
        name: _unit(embed_images([draw(scene) for scene in scenes]))
        for name, scenes in (("mixed", mixed), ("pairs", pairs), ("lone", lone))
    }
    texts = _unit(embed_texts([caption(scene, wording=scene.seed) for scene in mixed]))
    ranks = _ranks(texts @ rows["mixed"].T)
    zero_shot = {}
    for name in ATTRIBUTES:
        kind = {"count": "mixed", "relation": "pairs"}.get(name, "lone")
        scenes = {"mixed": mixed, "pairs": pairs, "lone": lone}[kind]
        zero_shot[name] = _zero_shot(name, scenes, rows[kind], embed_texts)
    return Scores(
        n_scenes=n_scenes,
        recall_at_1=float(np.mean(ranks < 1)),
        recall_at_5=float(np.mean(ranks < 5)),
        zero_shot=zero_shot,
        order=_order(pairs, rows["pairs"], embed_texts),
    )


def distinct_scenes(n_scenes: int, first_seed: int) -> list[Scene]:
    """The first scenes from a seed on of which no two have the same canonical caption."""
    scenes: dict[str, Scene] = {}
    seed = first_seed
    while len(scenes) < n_scenes:
        scene = sample_scene(seed)
        scenes.setdefault(caption(scene), scene)
        seed += 1
    return list(scenes.values())


def _zero_shot(name: str, scenes: Sequence[Scene], rows: Rows, embed_texts: EmbedTexts) -> float:
    values = ATTRIBUTES[name]
    phrases = [_unit(embed_texts(VOCABULARY[name][value])).mean(axis=0) for value in values]
    guesses = np.argmax(rows @ _unit(np.stack(phrases)).T, axis=1)
    truth = np.array([values.index(value) for s in scenes if (value := attributes(s)[name]) is not None])
    assert len(truth) == len(guesses)
    return float(np.mean([np.mean(guesses[truth == k] == k) for k in range(len(values))]))


def _order(pairs: Sequence[Scene], rows: Rows, embed_texts: EmbedTexts) -> float:
    """Share of pairs of visibly different objects whose own caption beats the one with them exchanged."""
    swapped = [replace(scene, objects=scene.objects[::-1]) for scene in pairs]
    kept = [k for k, scene in enumerate(pairs) if caption(scene) != caption(swapped[k])]
    right = _unit(embed_texts([caption(pairs[k]) for k in kept]))
    wrong = _unit(embed_texts([caption(swapped[k]) for k in kept]))
    return float(np.mean(np.sum(rows[kept] * (right - wrong), axis=1) > 0))


def _ranks(similarity: Rows) -> npt.NDArray[np.int64]:
    """For each row, how many columns are strictly nearer than the one on the diagonal."""
    return np.asarray(np.sum(similarity > np.diag(similarity)[:, None], axis=1), dtype=np.int64)


def _unit(rows: Rows) -> Rows:
    single = np.asarray(rows, dtype=np.float32)
    return np.asarray(single / np.linalg.norm(single, axis=-1, keepdims=True))
