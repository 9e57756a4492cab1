"""Where training figures go: a jsonl file always; TensorBoard, wandb and trackio when asked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from msae.base.errors import EXTRAS, MissingDependencyError, RunError, require
from msae.base.files import atomic_path

LoggerName = Literal["tensorboard", "wandb", "trackio"]


class Logger(Protocol):
    """Takes one record of figures per logged step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Sequence[LoggerName]) -> None:
    """Refuse, before anything is written, a logger whose package is not there."""
    for name in names:
        if name in EXTRAS:
            require(name)
        elif importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed but --loggers asks for it; type: pip install {name}")


class JsonlLogger:
    """One JSON object a line. Lines after `resume_step` are dropped first, so a resumed run logs no step twice.

    A figure that is not finite, as the FVU of a batch of one row, is null: JSON knows neither NaN nor Infinity.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = [line for line in _complete_lines(path) if _step_of(line, path) <= resume_step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoardLogger:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _TrackerLogger:
    """wandb and trackio share one interface: init, log, finish."""

    def __init__(self, package: Literal["wandb", "trackio"], folder: Path, settings: Mapping[str, Any]) -> None:
        self._tracker: Any = importlib.import_module(package)
        self._tracker.init(project="msae", name=folder.name, config=dict(settings))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._tracker.log(dict(figures), step=step)

    def close(self) -> None:
        self._tracker.finish()


class Loggers:
    """Several loggers as one."""

    def __init__(
        self, names: Sequence[LoggerName], folder: Path, *, settings: Mapping[str, Any], resume_step: int = 0
    ) -> None:
        self._loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", resume_step=resume_step)]
        for name in names:
            match name:
                case "tensorboard":
                    self._loggers.append(_TensorBoardLogger(folder))
                case "wandb" | "trackio":
                    self._loggers.append(_TrackerLogger(name, folder, settings))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, figures)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def _step_of(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as err:
        raise RunError(f"{path} has a line that is no step of training ({line[:40]!r}); delete that line") from err


def _complete_lines(path: Path) -> list[str]:
    """The lines of a jsonl file without a last line that a killed process left half-written."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines[:-1] if line]
