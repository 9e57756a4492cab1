"""The embedded default: a small world of drawn scenes whose truth is known, and a CLIP trained on it."""

from __future__ import annotations

from pathlib import Path

from msae.world.drawing import Rendered, draw, render, write_scenes
from msae.world.scenes import (
    ATTRIBUTES,
    UNSEEN_SEEDS,
    VOCABULARY,
    WORDS,
    Object,
    Scene,
    attributes,
    caption,
    sample_scene,
)

CLIP_FOLDER = Path(__file__).parent / "clip"  # an ordinary transformers folder: load it as any hub model

__all__ = [
    "ATTRIBUTES",
    "CLIP_FOLDER",
    "UNSEEN_SEEDS",
    "VOCABULARY",
    "WORDS",
    "Object",
    "Rendered",
    "Scene",
    "attributes",
    "caption",
    "draw",
    "render",
    "sample_scene",
    "write_scenes",
]
