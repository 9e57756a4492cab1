"""`Embedder`: a frozen CLIP, SigLIP or SigLIP 2 model that turns images and captions into embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from msae.base.devices import as_device
from msae.base.errors import EmbedderError, MissingDependencyError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

Precision = Literal["auto", "float32", "bfloat16"]

DEMO = Path(__file__).parents[1] / "demo" / "clip"
"""The folder of the encoder called `demo`."""

_MODEL_TYPES = ("clip", "siglip", "siglip2")
_WEIGHTS: Mapping[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
"""Loaded in float32 and converted afterwards: for any other type transformers changes the default type of the whole
process for as long as it loads, and whoever computes in another thread would compute in that."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # what is needed of a hub repository; no pickles


@dataclass(frozen=True, eq=False)
class Embedder:
    """A frozen model of two towers; embeddings are float32 rows of unit L2 norm."""

    id: str
    """Folder or hub id, as it was given."""
    revision: str | None
    """Commit of the hub, or for a folder a hash of its files."""
    d_in: int
    """Width of an embedding."""
    device: str
    dtype: Literal["float32", "bfloat16"]
    """What the model computes in."""
    pixel_backend: str
    """What scales the images; always `pil`, so that a store does not depend on what else is installed."""
    max_tokens: int
    """Longer captions are cut off."""
    _model: Any = field(repr=False)
    _tokenizer: Any = field(repr=False)
    _processor: Any = field(repr=False)

    @classmethod
    def load(
        cls,
        id: str | Path,
        *,
        device: str = "auto",
        dtype: Precision = "auto",
        revision: str | None = None,
    ) -> Embedder:
        """The model in a folder or on the Hugging Face hub; nothing is unpickled and no foreign code is run.

        Args:
            id: A folder in the format of transformers, a hub id, or `demo` for the small CLIP inside msae.
            device: `auto` is the first of cuda, mps and cpu that is there.
            dtype: What the model computes in; `auto` is bfloat16 on a CUDA device and on a CPU with AMX, else
                float32. docs/store-format.md says what bfloat16 gains and costs.
            revision: Branch, tag or commit on the hub.

        Raises:
            EmbedderError: There is no such model, the hub cannot be reached, or the model is of another kind.
            MissingDependencyError: transformers or pillow is not installed.
        """
        try:
            import PIL  # noqa: F401
            import transformers
        except ImportError as err:
            raise MissingDependencyError.of(err.name or "transformers", extra="clip") from None
        folder = find_folder(str(id), revision)
        device = as_device(device, allow_mps=True)
        chosen = choose_dtype(dtype, device)
        with _silent_transformers():
            config = _load(id, transformers.AutoConfig, folder)
            if config.model_type not in _MODEL_TYPES:
                raise EmbedderError(
                    f"{id} is a {config.model_type!r} model; wanted CLIP, SigLIP or SigLIP 2 of transformers"
                )
            if Path(id).is_dir() or str(id) == "demo" or any(folder.glob("*.safetensors")):
                model = _load_model(id, folder, **_WEIGHTS)
            else:  # transformers knows where the hub keeps a safetensors conversion of old repositories
                model = _load_model(id, str(id), revision=revision, **_WEIGHTS)
            if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
                raise EmbedderError(f"encoder {id} has no tokenizer; wanted one of {', '.join(_TOKENIZER_FILES)}")
            tokenizer = _load(id, transformers.AutoTokenizer, folder)
            is_v5 = int(transformers.__version__.split(".")[0]) >= 5
            pillow = {"backend": "pil"} if is_v5 else {"use_fast": False}
            processor = _load(id, transformers.AutoImageProcessor, folder, **pillow)
        embedder = cls(
            id=str(id),
            revision=revision_of(folder),
            d_in=0,
            device=device,
            dtype=chosen,
            pixel_backend="pil",
            max_tokens=int(config.text_config.max_position_embeddings),
            _model=model.eval().requires_grad_(False).to(device, getattr(torch, chosen)),
            _tokenizer=tokenizer,
            _processor=processor,
        )
        return replace(embedder, d_in=embedder.embed_texts(["a"]).shape[1])

    def embed_images(self, images: Sequence[Image]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of RGB images; see `msae.data.images.read_picture`."""
        return self.embed_pixels(self.pixels(images))

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """What the model's image tower takes in, on the CPU; safe to call from several threads."""
        return dict(self._processor(images=list(images), return_tensors="pt"))

    def embed_pixels(self, pixels: Mapping[str, Tensor]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of what `pixels` returned."""
        inputs = {name: tensor.to(self.device) for name, tensor in pixels.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.inference_mode():
            return _unit_rows(self._model.get_image_features(**inputs))

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of captions; what does not fit into `max_tokens` is cut off."""
        inputs = self._tokenizer(
            self._prepared(texts),
            padding="max_length" if self._is_siglip else True,  # SigLIP was trained on padded captions only
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        # SigLIP attends to its padding: the mask must not reach it
        names = ("input_ids",) if self._is_siglip else ("input_ids", "attention_mask")
        with torch.inference_mode():
            return _unit_rows(self._model.get_text_features(**{name: inputs[name].to(self.device) for name in names}))

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the captions do not fit into `max_tokens`."""
        tokens = self._tokenizer(self._prepared(texts), verbose=False)["input_ids"]
        return sum(len(row) > self.max_tokens for row in tokens)

    @property
    def _is_siglip(self) -> bool:
        return bool(self._model.config.model_type != "clip")

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        """SigLIP was trained on lower case; not every version of its tokenizer sees to that."""
        return [text.lower() for text in texts] if self._is_siglip else list(texts)


def find_folder(id: str, revision: str | None = None) -> Path:
    """The folder of a model: the given one, msae's own for `demo`, or the hub's in the local cache.

    Raises:
        EmbedderError: There is no such folder, or the hub cannot be reached and the cache lacks it.
    """
    path = DEMO if id == "demo" else Path(id)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EmbedderError(f"{path} holds no config.json; wanted a model folder in the format of transformers")
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id) or id.startswith(".") or id == "demo":
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EmbedderError(f"encoder {path} does not exist{nearest(path.name, siblings)}; wanted a folder or hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, RuntimeError) as err:
        raise EmbedderError(
            f"encoder {id!r} is no folder here, and the hub does not give it ({_line(err)}); "
            f"check the name and the network, give the folder of a model, or --encoder demo"
        ) from err


def choose_dtype(dtype: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """What a model computes in; `auto` is bfloat16 where the hardware multiplies it.

    Raises:
        EmbedderError: `dtype` is unknown.
    """
    if dtype == "float32" or dtype == "bfloat16":
        return dtype
    if dtype != "auto":
        raise EmbedderError(f"dtype {dtype!r} is unknown; wanted auto, float32 or bfloat16")
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # AMX alone: with AVX512-BF16 and no AMX, bfloat16 was measured to be half as fast as float32.
    # Private, so feature-tested: torch has no public name for it in all the versions that msae takes.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return "bfloat16" if device == "cpu" and has_amx else "float32"


def _load_model(id: str | Path, source: Path | str, **options: Any) -> Any:
    """The model with all of its weights: transformers would replace missing ones by random numbers."""
    import transformers

    model, report = _load(id, transformers.AutoModel, source, output_loading_info=True, **options)
    if report["missing_keys"]:
        first, *others = sorted(report["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise EmbedderError(f"encoder {id}: its weights lack {first}{more}; restore or download it")
    return model


def _load_tokenizer(id: str | Path, folder: Path) -> Any:
    """The tokenizer, from its files: without any, transformers would make an empty one."""
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise EmbedderError(f"encoder {id} has no tokenizer; wanted one of {', '.join(_TOKENIZER_FILES)}")
    return _load(id, transformers.AutoTokenizer, folder)


def _load(id: str | Path, auto: Any, source: Path | str, **options: Any) -> Any:
    """What a class of transformers reads from a folder, or one line that says why it cannot."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except ImportError as err:
        raise EmbedderError(f"encoder {id} needs a package that is not installed: {_line(err)}") from err
    except Exception as err:  # a damaged file surfaces as almost any error in transformers
        what = {"AutoConfig": "config.json", "AutoModel": "weights (model.safetensors)"}
        part = what.get(auto.__name__, "tokenizer" if "Tokenizer" in auto.__name__ else "preprocessor_config.json")
        raise EmbedderError(f"encoder {id}: its {part} cannot be read ({_line(err)}); restore or download it") from err


def revision_of(folder: Path) -> str:
    """The hub's commit where the folder is one in its cache, else a hash of the folder's files.

    Of weights only the size and the two ends are read: hashing gigabytes would delay every start.
    """
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors"):
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, path.stat().st_size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()


def _unit_rows(features: Any) -> Float32[np.ndarray, "n d_in"]:
    """The features as float32 rows of unit length; transformers 5 returns an object, 4 a tensor."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1).cpu().numpy()


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Loading without transformers' own progress bars and advice."""
    import logging as levels

    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(".:")
