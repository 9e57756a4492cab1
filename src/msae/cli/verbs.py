"""The table of verbs: for each a function that makes its command when it is asked for, so that others load nothing."""

from __future__ import annotations

from collections.abc import Callable

from msae.cli import look, make

VERBS: dict[str, Callable[[list[str]], Callable[..., None]]] = {
    "demo": make.demo_verb,
    "embed": make.embed_verb,
    "train": make.train_verb,
    "evaluate": make.evaluate_verb,
    "name": make.name_verb,
    "gallery": look.gallery_verb,
    "stability": look.stability_verb,
    "audit": look.audit_verb,
    "search": look.search_verb,
    "report": look.report_verb,
    "explore": look.explore_verb,
    "info": look.info_verb,
}
