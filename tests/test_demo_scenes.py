"""Laws of the demo's world: the truth is what was asked for, and a seed decides everything."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scripts.yardstick import distinct_scenes, measure

from msae.base.errors import ConfigError
from msae.world import ATTRIBUTES, VOCABULARY, attributes, caption, draw, render, sample_scene
from msae.world.drawing import PICTURE_SIZE
from msae.world.scenes import TRAINING_SEEDS, UNSEEN_SEEDS, Value

EVERY_VALUE = [(name, value) for name, values in ATTRIBUTES.items() for value in values]
SEEDS = range(400)


def test_a_seed_decides_picture_caption_and_truth() -> None:
    for seed in range(20):
        first, second = render(seed), render(seed)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.caption, first.attributes, first.scene) == (
            second.caption,
            second.attributes,
            second.scene,
        )


def test_the_world_stays_the_world_on_every_machine() -> None:
    told = "\n".join(f"{sample_scene(seed)} {caption(sample_scene(seed), wording=seed)}" for seed in SEEDS)
    # A change of this number changes the world: the shipped CLIP must then be trained again.
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "4f94ccbcd7aeb1a3"


@pytest.mark.parametrize(("name", "value"), EVERY_VALUE)
def test_what_is_fixed_is_true_and_moves_nothing_else(name: str, value: Value) -> None:
    for seed in range(60):
        other = {"count": 2} if name == "relation" else {}
        free, fixed = sample_scene(seed, **other), sample_scene(seed, **other, **{name: value})
        assert attributes(fixed)[name] == value
        if name == "count":
            assert fixed.objects[0] == free.objects[0]
        elif name == "relation":
            assert fixed.objects[0] == free.objects[0]
            assert replace(fixed, relation=None, objects=()) == replace(free, relation=None, objects=())
        elif name in ("background", "frame"):
            assert replace(fixed, **{name: getattr(free, name)}) == free
        else:
            pairs = zip(fixed.objects, free.objects, strict=True)
            assert all(replace(one, **{name: getattr(two, name)}) == two for one, two in pairs)


def test_attributes_of_lone_objects_are_even_and_independent() -> None:
    rows = [attributes(sample_scene(seed, count=1)) for seed in range(6000)]
    names = [name for name in ATTRIBUTES if name not in ("count", "relation")]
    for name in names:
        shares = [count / len(rows) for count in Counter(row[name] for row in rows).values()]
        expected = [0.75, 0.25] if ATTRIBUTES[name] == (False, True) else [1 / len(ATTRIBUTES[name])] * len(shares)
        # 0.025 is four standard errors of a share of a quarter among 6,000
        assert all(abs(a - b) < 0.025 for a, b in zip(sorted(shares), sorted(expected), strict=True)), name
    for one, two in combinations(names, 2):
        joint = Counter((row[one], row[two]) for row in rows)
        first, second = Counter(row[one] for row in rows), Counter(row[two] for row in rows)
        for (a, b), count in joint.items():
            assert abs(count / len(rows) - first[a] * second[b] / len(rows) ** 2) < 0.025, (one, a, two, b)


def test_every_value_of_every_attribute_occurs() -> None:
    rows = [attributes(sample_scene(seed)) for seed in SEEDS]
    for name, value in EVERY_VALUE:
        assert any(row[name] == value for row in rows), (name, value)


def test_objects_that_differ_have_no_shared_attribute_but_a_list() -> None:
    scene = next(s for s in map(sample_scene, SEEDS) if len({thing.shape for thing in s.objects}) == 2)
    row = attributes(scene)
    assert row["shape"] is None
    assert row["shapes"] == ", ".join(sorted(thing.shape for thing in scene.objects))
    assert scene.relation == row["relation"] is not None


def test_every_attribute_is_seen_in_the_picture() -> None:
    for name, values in ATTRIBUTES.items():
        pictures = {draw(sample_scene(3, **{name: value})).tobytes() for value in values}
        assert len(pictures) == len(values), name


def test_pictures_are_square_and_rgb() -> None:
    image = render(0).image
    assert image.mode == "RGB"
    assert image.size == (PICTURE_SIZE, PICTURE_SIZE)


def test_scenes_told_alike_are_alike() -> None:
    seen: dict[str, dict[str, Value | None]] = {}
    for seed in range(3000):
        row = attributes(sample_scene(seed, count=1, shape="star", colour="red"))
        assert seen.setdefault(caption(sample_scene(seed, count=1, shape="star", colour="red")), row) == row


def test_captions_tell_what_they_are_asked_to() -> None:
    scene = sample_scene(5, count=1, shape="star", colour="orange", size="small", texture="dotted", hat=True,
                         shadow=True, background="grass", frame=True)  # fmt: skip
    assert caption(scene) == "a small dotted orange star with a hat and a shadow on grass in a frame"
    assert caption(scene, naming=["colour"]) == "an orange shape"
    assert caption(scene, naming=[]) == "a shape"
    many = replace(scene, objects=scene.objects * 3)
    assert caption(many, naming=["shape", "hat"]) == "three stars with hats"


def test_order_is_told_only_with_the_relation() -> None:
    scene = sample_scene(8, relation="left of")
    turned = replace(scene, objects=scene.objects[::-1])
    assert caption(scene) != caption(turned)
    assert caption(scene, naming=["shape", "colour"]) == caption(turned, naming=["shape", "colour"])


def test_wording_varies() -> None:
    scene = sample_scene(1)
    assert len({caption(scene, wording=wording) for wording in range(50)}) > 10


def test_every_value_has_words() -> None:
    assert {(name, value) for name, words in VOCABULARY.items() for value in words} == set(EVERY_VALUE)
    phrases = [phrase for words in VOCABULARY.values() for ways in words.values() for phrase in ways]
    assert len(phrases) == len(set(phrases))


def test_training_and_unseen_seeds_are_disjoint() -> None:
    assert TRAINING_SEEDS.stop <= UNSEEN_SEEDS.start


@pytest.mark.parametrize(
    ("seed", "fixed", "message"),
    [
        (0, {"color": "red"}, "did you mean 'colour'"),
        (0, {"colour": "pink"}, "give one of 'red'"),
        (0, {"relation": "above", "count": 3}, "drop one of the two"),
        (-1, {}, "not negative"),
    ],
)
def test_wrong_wishes_are_named(seed: int, fixed: dict[str, Value], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_scene(seed, **fixed)


def test_measured_scenes_are_unseen_and_told_apart() -> None:
    scenes = distinct_scenes(200, UNSEEN_SEEDS.start)
    assert len({caption(scene) for scene in scenes}) == 200
    assert not any(scene.seed in TRAINING_SEEDS for scene in scenes)


def test_a_model_that_sees_nothing_scores_chance() -> None:
    rng = np.random.default_rng(0)
    blind = measure(
        lambda pictures: rng.normal(size=(len(pictures), 16)).astype(np.float32),
        lambda texts: rng.normal(size=(len(texts), 16)).astype(np.float32),
        n_scenes=300,
    )
    assert blind.recall_at_1 < 0.03
    for name, share in blind.zero_shot.items():
        # five standard errors of the rarest value, a quarter of 300 scenes
        assert share == pytest.approx(1 / len(ATTRIBUTES[name]), abs=0.2), name
