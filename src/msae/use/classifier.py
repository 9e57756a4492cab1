"""`LinearClassifier`: coefficients on raw embeddings, in an `.npz` or `.safetensors` file that any tool can write.

The file's keys are defined in docs/audit.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from msae.base.errors import ConfigError, first_line
from msae.base.files import atomic_path
from msae.data.arrays import open_npz

SCORE = "score"
"""What stands for the class of a model of one number."""
KEYS = ("weight", "bias", "classes", "mean", "scale", "unit_norm")


@dataclass(frozen=True)
class Readout:
    """How an audit reads a linear model: the fewest logits that say all, and its outputs.

    Outputs are the probabilities of the watched classes; of a model of one number, that number.
    """

    weight: Float[Tensor, "k d_in"]
    bias: Float[Tensor, " k"]
    unit_norm: bool
    watched: tuple[int, ...]
    kind: Literal["two classes", "classes", "score"]

    @property
    def n_outputs(self) -> int:
        return len(self.watched)

    def outputs(self, logits: Float[Tensor, "k n c"]) -> Float[Tensor, "f n c"]:
        """Of every row after every edit; `logits` may be overwritten."""
        if self.kind == "score":
            return logits
        if self.kind == "classes":
            return logits.softmax(0)[list(self.watched)]
        return torch.cat([logits if this == 1 else -logits for this in self.watched]).sigmoid_()

    def predicted(self, logits: Float[Tensor, "k n c"]) -> Int[Tensor, "n c"]:
        """The number of the likeliest class; 0 where there are none."""
        if self.kind == "score":
            return torch.zeros(logits.shape[1:], dtype=torch.int64)
        return logits.max(0).indices if self.kind == "classes" else (logits[0] > 0).long()


@dataclass(frozen=True)
class LinearClassifier:
    """logits = features @ weight.T + bias, with features = (x - mean) * scale, of unit norm if `unit_norm`.

    One row of weights and no classes are a score: its one logit is what the model says.
    """

    classes: tuple[str, ...]
    weight: Float[Tensor, "k d_in"]
    bias: Float[Tensor, " k"]
    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]
    unit_norm: bool
    source: str
    """Where it comes from, for people."""

    def features(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the weights are multiplied with, before it is scaled to unit norm."""
        return (x - self.mean) * self.scale

    def logits(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n k"]:
        """Unnormalised log-probabilities of the classes for raw embeddings."""
        u = self.features(x)
        return torch.addmm(self.bias, functional.normalize(u, dim=1) if self.unit_norm else u, self.weight.T)

    @property
    def is_score(self) -> bool:
        """It gives a number and no classes."""
        return len(self.weight) == 1

    def readout(self, watched: Sequence[int]) -> Readout:
        """How an audit reads it, with the probabilities of the `watched` classes as outputs."""
        weight, bias = self.weight, self.bias
        kind: Literal["two classes", "classes", "score"] = "score" if self.is_score else "classes"
        if len(weight) == 2:
            kind, weight, bias = "two classes", weight[1:] - weight[:1], bias[1:] - bias[:1]
        return Readout(weight, bias, self.unit_norm, tuple(watched), kind)

    @classmethod
    def load(cls, path: str | Path, *, d_in: int, classes: tuple[str, ...] = ()) -> LinearClassifier:
        """The classifier in a file.

        Args:
            d_in: Width of the embeddings.
            classes: In the order of the rows of `weight`, where the file does not say.

        Raises:
            ConfigError: The file is missing or damaged, or its arrays do not fit each other or `d_in`.
        """
        path = Path(path)
        arrays = _read(path)
        if not np.size(arrays.get("classes", KEYS)):  # of a score
            arrays = {key: value for key, value in arrays.items() if key != "classes"}
        unknown = sorted(set(arrays) - set(KEYS))
        if unknown or "weight" not in arrays:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise ConfigError(f"{path} holds {found}; wanted weight and, where they are, {', '.join(KEYS[1:])}")
        weight = np.atleast_2d(np.asarray(arrays["weight"], np.float64))
        bias = np.atleast_1d(np.asarray(arrays.get("bias", np.zeros(len(weight))), np.float64))
        if weight.shape[1] != d_in:
            raise ConfigError(
                f"{path} has weights of width {weight.shape[1]}, the embeddings have {d_in}; fit it on embeddings of "
                f"the same encoder"
            )
        if len(weight) == 1 and (
            classes or np.size(arrays.get("classes", ()))
        ):  # as scikit-learn keeps two: the logit of the second
            weight, bias = np.concatenate([0 * weight, weight]), np.r_[0.0, bias]
        names = tuple(str(name) for name in np.atleast_1d(arrays.get("classes", np.array(classes)))) or (
            (SCORE,) if len(weight) == 1 else tuple(str(number) for number in range(len(weight)))
        )
        if not len(names) == len(weight) == len(bias):
            raise ConfigError(
                f"{path} has {len(weight)} rows of weights, {len(bias)} biases and {len(names)} classes "
                f"({', '.join(names[:4])}); give one of each per class, two classes may share one row"
            )
        shifts = {key: np.broadcast_to(np.asarray(arrays.get(key, default), np.float64), (d_in,))
                  for key, default in (("mean", 0.0), ("scale", 1.0))}  # fmt: skip
        if not all(np.isfinite(part).all() for part in (weight, bias, *shifts.values())):
            raise ConfigError(f"{path} holds NaN or infinite coefficients; fit the classifier again")
        parts = (weight, bias, shifts["mean"], shifts["scale"])
        w, b, mean, scale = (torch.from_numpy(np.array(part, np.float32)) for part in parts)
        return cls(names, w, b, mean, scale, bool(arrays.get("unit_norm", False)), str(path))

    def save(self, path: str | Path) -> None:
        """Write an `.npz` or a `.safetensors` that `load` reads."""
        path = Path(path)
        arrays = {key: getattr(self, key).contiguous().numpy() for key in ("weight", "bias", "mean", "scale")}
        names = [] if self.is_score else list(self.classes)
        with atomic_path(path) as temporary:
            if path.suffix == ".safetensors":
                from safetensors.numpy import save_file

                words = {"unit_norm": json.dumps(self.unit_norm)} | ({"classes": json.dumps(names)} if names else {})
                save_file(arrays, temporary, words)
            else:
                with temporary.open("wb") as file:
                    np.savez(
                        file, weight=arrays["weight"], bias=arrays["bias"], mean=arrays["mean"], scale=arrays["scale"],
                        classes=np.array(names, str), unit_norm=np.array(self.unit_norm),
                    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give --classifier a .npz or .safetensors file of coefficients")
    if path.suffix == ".npz":
        return open_npz(path, ConfigError)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no .npz or .safetensors file; save the coefficients with numpy.savez")
    try:
        with safe_open(path, framework="np") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            words = tensors.metadata() or {}
        return found | {key: np.array(json.loads(words[key])) for key in ("classes", "unit_norm") if key in words}
    except (OSError, ValueError, SafetensorError) as err:
        raise ConfigError(f"{path} cannot be read ({first_line(err)}); save it with numpy.savez") from err
