"""Errors a caller can catch. Each message is one line: what was found, what was wanted, what to do."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path


class MsaeError(Exception):
    """Base of every error that the user can put right; the command line prints it without a traceback."""

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


class FailedElsewhere(MsaeError):
    """Another of the processes of a training failed and says why, so this one has nothing to say."""


class MissingDependencyError(MsaeError):
    """An optional package is needed for this and is not installed."""

    @classmethod
    def of(cls, package: str, *, extra: str) -> MissingDependencyError:
        """The error that names the missing `package` and the extra of msae that brings it."""
        return cls(f"{package} is not installed but is needed here; type: pip install 'msae[{extra}]'")


EXTRAS: Mapping[str, str] = {
    "transformers": "clip",
    "tokenizers": "clip",
    "sentencepiece": "clip",
    "huggingface_hub": "clip",
    "datasets": "sources",
    "braceexpand": "sources",
    "numba": "fast",
    "llvmlite": "fast",
    "faiss": "index",
    "umap": "map",
    "tensorboard": "loggers",
    "simplemma": "words",
    "onnx": "formats",
    "qdrant_client": "formats",
    "aiohttp": "far",
    "fsspec": "far",
    "gcsfs": "far",
    "s3fs": "far",
    "ray": "cluster",
}
"""Modules that a bare install lacks, and the extra of msae that brings each."""


def require(module: str) -> None:
    """Refuse to begin what needs an optional package that is not installed.

    Raises:
        MissingDependencyError: `module`, one of `EXTRAS`, cannot be imported.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError.of(module, extra=EXTRAS[module])


def missing_dependency(err: BaseException) -> MissingDependencyError | None:
    """The error to show where `err`, or a cause of it, is the failed import of an optional package; else None."""
    chain: BaseException | None = err
    while chain is not None:
        module = (chain.name or "").partition(".")[0] if isinstance(chain, ImportError) else ""
        if module in EXTRAS:
            return MissingDependencyError.of(module, extra=EXTRAS[module])
        chain = chain.__cause__ or chain.__context__
    return None


def first_line(err: BaseException) -> str:
    """The first line of an error's message, without a final full stop or colon."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(".:")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` for the known word nearest to `word`, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_beside(path: Path) -> str:
    """The same hint for a file that is missing: the name in its folder that is nearest."""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
