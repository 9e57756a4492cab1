"""Errors a caller can catch. Each message is one line: what was found, what was wanted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MsaeError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names out of files may hold line breaks


class ConfigError(MsaeError):
    """A setting is unknown, out of range, or contradicts another."""


class StoreError(MsaeError):
    """Embeddings on disk are missing, damaged, or do not fit what they are used for."""


class SourceError(MsaeError):
    """The images or captions to embed cannot be read, or there are none."""


class EmbedderError(MsaeError):
    """A CLIP-like model cannot be loaded or does not fit its inputs."""


class RunError(MsaeError):
    """A run folder or a saved SAE is missing, damaged, or does not fit."""


class TrainingError(MsaeError):
    """Training cannot go on, for example because the loss diverged."""


class Interrupted(MsaeError):
    """Ctrl-C was pressed; what was done is saved, and the message says how to go on."""


class MissingDependencyError(MsaeError):
    """An optional package is needed for this and is not installed."""

    @classmethod
    def of(cls, package: str, *, extra: str) -> MissingDependencyError:
        """The error that names the missing `package` and the extra of msae that brings it."""
        return cls(f"{package} is not installed but is needed here; type: pip install 'msae[{extra}]'")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` for the known word nearest to `word`, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
