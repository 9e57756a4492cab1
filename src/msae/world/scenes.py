"""The world of the demo: scenes with known attributes, sampled from a seed and described in words.

A scene is one to three objects on a background. Only `random.Random.random` is drawn from, which Python keeps
the same on every version and machine.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from msae.base.errors import ConfigError, nearest

T = TypeVar("T")
Value = str | int | bool

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("grey", "sky", "sand", "grass", "night", "brick")
COUNTS = (1, 2, 3)
RELATIONS = ("left of", "above")

COUNT_SHARES = (0.55, 0.3, 0.15)  # of scenes with one, two and three objects
ALIKE_SHARE = 0.2  # of scenes with two objects: both the same, so there is no relation to name
ACCESSORY_SHARE = 0.25  # of objects with a hat, of objects with a shadow, of scenes with a frame

ATTRIBUTES: Mapping[str, tuple[Value, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": SIZES,
        "texture": TEXTURES,
        "background": BACKGROUNDS,
        "count": COUNTS,
        "relation": RELATIONS,
        "hat": (False, True),
        "frame": (False, True),
        "shadow": (False, True),
    }
)
"""Every attribute of a scene and the values it can take."""

TRAINING_SEEDS = range(10_000_000)  # what the shipped CLIP may have seen
UNSEEN_SEEDS = range(10_000_000, 2**31)  # what it has never seen: measure here

_SCENE_STREAM, PLACE_STREAM, _WORD_STREAM = range(3)


@dataclass(frozen=True)
class Object:
    """One thing in a scene."""

    shape: str
    colour: str
    size: str
    texture: str
    hat: bool
    shadow: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows; with its seed, everything that is needed to draw it.

    Attributes:
        objects: One to three. Three are always alike; two are alike when `relation` is None.
        background: One of `BACKGROUNDS`.
        relation: How the first object lies to the second, or None where there is nothing to say.
        frame: Whether a picture frame surrounds the scene.
        seed: Decides what is not an attribute: exact places, jitter and the grain of the background.
    """

    objects: tuple[Object, ...]
    background: str
    relation: str | None
    frame: bool
    seed: int


class Draws:
    """Random draws for one purpose of one scene."""

    def __init__(self, seed: int, stream: int) -> None:
        self._random = random.Random(4 * seed + stream).random

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._random()

    def chance(self, share: float) -> bool:
        """True in this share of draws."""
        return self._random() < share

    def pick(self, values: Sequence[T], shares: Sequence[float] | None = None) -> T:
        """One of the values, all equally likely unless their shares are given."""
        point = self._random()
        if shares is None:
            return values[int(point * len(values))]
        for value, share in zip(values, shares, strict=True):
            point -= share
            if point < 0:
                return value
        return values[-1]  # the shares summed to a hair under one


def sample_scene(seed: int, **fixed: Value) -> Scene:
    """The scene of a seed, with the attributes in `fixed` set by hand.

    What is not fixed does not depend on what is: two calls with one seed differ in the fixed attributes
    only, so they make counterfactual pairs. An attribute of objects is fixed for every object of the scene.

    Args:
        seed: Not negative.
        fixed: Attributes and values as in `ATTRIBUTES`, for example `shape="star", hat=True, count=1`. Fixing
            `relation` makes a scene of two.

    Raises:
        ConfigError: Unknown attribute or value, or a relation with a count other than two.
    """
    _check(seed, fixed)
    draws = Draws(seed, _SCENE_STREAM)
    count = draws.pick(COUNTS, COUNT_SHARES)
    alike = draws.chance(ALIKE_SHARE)
    relation = draws.pick(RELATIONS)
    background = draws.pick(BACKGROUNDS)
    frame = draws.chance(ACCESSORY_SHARE)
    # Always three objects, drawn whole and last: neither the count nor a fixed value moves another draw.
    objects = [_sample_object(draws, fixed) for _ in COUNTS]
    if "relation" in fixed:
        count, alike = 2, False
    count = int(fixed.get("count", count))
    if count == 3 or (count == 2 and alike):
        objects = [objects[0]] * count
    return Scene(
        objects=tuple(objects[:count]),
        background=str(fixed.get("background", background)),
        relation=str(fixed.get("relation", relation)) if count == 2 and not alike else None,
        frame=bool(fixed.get("frame", frame)),
        seed=seed,
    )


def _sample_object(draws: Draws, fixed: Mapping[str, Value]) -> Object:
    shape, colour, size = draws.pick(SHAPES), draws.pick(COLOURS), draws.pick(SIZES)
    texture, hat, shadow = draws.pick(TEXTURES), draws.chance(ACCESSORY_SHARE), draws.chance(ACCESSORY_SHARE)
    return Object(
        shape=str(fixed.get("shape", shape)),
        colour=str(fixed.get("colour", colour)),
        size=str(fixed.get("size", size)),
        texture=str(fixed.get("texture", texture)),
        hat=bool(fixed.get("hat", hat)),
        shadow=bool(fixed.get("shadow", shadow)),
    )


def _check(seed: int, fixed: Mapping[str, Value]) -> None:
    if seed < 0:
        raise ConfigError(f"a scene's seed is {seed}; give one that is not negative")
    for name, value in fixed.items():
        if name not in ATTRIBUTES:
            raise ConfigError(
                f"a scene has no attribute {name!r}{nearest(name, ATTRIBUTES)}; it has {', '.join(ATTRIBUTES)}"
            )
        if value not in ATTRIBUTES[name]:
            known = ", ".join(repr(known) for known in ATTRIBUTES[name])
            raise ConfigError(f"a scene's {name} cannot be {value!r}; give one of {known}")
    if "relation" in fixed and fixed.get("count", 2) != 2:
        raise ConfigError(f"a relation is between two objects, but count is {fixed['count']}; drop one of the two")


def attributes(scene: Scene) -> dict[str, Value | None]:
    """The true attributes of a scene as one flat row of a table.

    `shape`, `colour`, `size` and `texture` are what all objects share, None where they differ; `shapes`,
    `colours`, `sizes` and `textures` are the distinct values in alphabetical order, joined by `", "`.
    `hat` and `shadow` say whether any object has one. `relation` is None unless there are two objects that
    were drawn apart.
    """
    shared: dict[str, Value | None] = {}
    listed: dict[str, Value | None] = {}
    for name in ("shape", "colour", "size", "texture"):
        values = sorted({str(getattr(thing, name)) for thing in scene.objects})
        shared[name] = values[0] if len(values) == 1 else None
        listed[f"{name}s"] = ", ".join(values)
    return {
        **shared,
        "background": scene.background,
        "count": len(scene.objects),
        "relation": scene.relation,
        "hat": any(thing.hat for thing in scene.objects),
        "frame": scene.frame,
        "shadow": any(thing.shadow for thing in scene.objects),
        **listed,
    }


def _of_a_shape(word: str) -> tuple[str, ...]:
    return (word, f"a {word} shape" if word[0] not in "aeiou" else f"an {word} shape")


VOCABULARY: Mapping[str, Mapping[Value, tuple[str, ...]]] = MappingProxyType(
    {
        "shape": {word: (word, f"a {word}") for word in SHAPES},
        "colour": {word: _of_a_shape(word) for word in COLOURS},
        "size": {word: _of_a_shape(word) for word in SIZES},
        "texture": {word: _of_a_shape(word) for word in TEXTURES},
        "background": {
            "grey": ("grey", "on a grey background", "a shape on grey"),
            "sky": ("sky", "in the sky", "a shape in the sky"),
            "sand": ("sand", "on sand", "a shape on sand"),
            "grass": ("grass", "on grass", "a shape on grass"),
            "night": ("night", "at night", "a shape at night"),
            "brick": ("brick", "on a brick wall", "a shape on a brick wall"),
        },
        "count": {
            1: ("one shape", "a single shape"),
            2: ("two shapes", "a pair of shapes"),
            3: ("three shapes", "a group of three shapes"),
        },
        "relation": {
            "left of": ("side by side", "one shape left of another"),
            "above": ("one above the other", "one shape above another"),
        },
        "hat": {
            False: ("no hat", "without a hat", "a shape without a hat"),
            True: ("a hat", "wearing a hat", "a shape with a hat"),
        },
        "frame": {
            False: ("no frame", "without a frame", "a shape without a frame"),
            True: ("a frame", "in a frame", "a shape in a frame"),
        },
        "shadow": {
            False: ("no shadow", "without a shadow", "a shape without a shadow"),
            True: ("a shadow", "casting a shadow", "a shape with a shadow"),
        },
    }
)
"""What each value of each attribute is called, the plainest word first."""

WORDS = tuple(ways[0] for values in VOCABULARY.values() for value, ways in values.items() if value is not False)
"""The plainest word for everything that this world can show."""

_SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
_TEXTURE_WORDS = {
    "plain": ("plain", ""),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
}
_BACKGROUND_WORDS = {
    "grey": ("on a grey background", "on grey", "against grey"),
    "sky": ("in the sky", "on a sky background", "against the sky"),
    "sand": ("on sand", "on a sand background", "on the sand"),
    "grass": ("on grass", "on a grass background", "on the grass"),
    "night": ("at night", "on a night background", "in the night"),
    "brick": ("on a brick wall", "on a brick background", "against a brick wall"),
}
_RELATION_WORDS = {
    "left of": ("{0} left of {1}", "{0} to the left of {1}", "{1} right of {0}", "{1} to the right of {0}"),
    "above": ("{0} above {1}", "{0} over {1}", "{1} below {0}", "{1} under {0}"),
}
_OPENINGS = ("", "", "a picture of ", "an image of ", "a drawing of ")
_COUNT_WORDS = {2: ("two",), 3: ("three",)}


def caption(scene: Scene, *, naming: Collection[str] = tuple(ATTRIBUTES), wording: int | None = None) -> str:
    """The scene in words.

    Args:
        scene: The scene.
        naming: The attributes that the caption says; it always says the count.
        wording: A seed that varies the wording, or None for the one canonical wording: two scenes with the
            same canonical caption agree in everything that is named.
    """
    words = _Words(wording)
    if len(scene.objects) == 2 and scene.relation is not None:
        text = _pair(scene, naming, words)
    elif len(scene.objects) == 1:
        text = _with_article(_noun(scene.objects[0], naming, words))
    else:
        number = words.choose(_COUNT_WORDS[len(scene.objects)])
        text = f"{number} {_noun(scene.objects[0], naming, words, plural=True)}"
    if "background" in naming:
        text += " " + words.choose(_BACKGROUND_WORDS[scene.background])
    if "frame" in naming and scene.frame:
        text += " " + words.choose(("in a frame", "inside a frame"))
    return words.choose(_OPENINGS) + text


class _Words:
    """Chooses among ways of saying one thing; without a seed always the first."""

    def __init__(self, wording: int | None) -> None:
        self._draws = None if wording is None else Draws(wording, _WORD_STREAM)

    def choose(self, ways: Sequence[str]) -> str:
        return ways[0] if self._draws is None else self._draws.pick(ways)


def _pair(scene: Scene, naming: Collection[str], words: _Words) -> str:
    pair = [_with_article(_noun(thing, naming, words)) for thing in scene.objects]
    if "relation" in naming and scene.relation is not None:
        return words.choose(_RELATION_WORDS[scene.relation]).format(*pair)
    pair.sort()  # who stands first is part of the relation, which is not said
    return words.choose(("{0} and {1}", "{1} and {0}")).format(*pair)


def _noun(thing: Object, naming: Collection[str], words: _Words, *, plural: bool = False) -> str:
    parts = [
        words.choose(_SIZE_WORDS[thing.size]) if "size" in naming else "",
        words.choose(_TEXTURE_WORDS[thing.texture]) if "texture" in naming else "",
        thing.colour if "colour" in naming else "",
        _shape_word(thing.shape if "shape" in naming else words.choose(("shape", "object")), plural=plural),
    ]
    worn = [name for name in ("hat", "shadow") if name in naming and getattr(thing, name)]
    if worn:
        verb = {"hat": "wearing", "shadow": "casting"}[worn[0]]
        verbs = ("with", verb) if len(worn) == 1 else ("with",)
        parts += [words.choose(verbs), " and ".join(f"{name}s" if plural else f"a {name}" for name in worn)]
    return " ".join(part for part in parts if part)


def _shape_word(shape: str, *, plural: bool) -> str:
    if not plural:
        return shape
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
