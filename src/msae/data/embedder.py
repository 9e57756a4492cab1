"""`Embedder`: a frozen CLIP, SigLIP or SigLIP 2 model that turns images and captions into embeddings."""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msae.base.devices import as_device
from msae.base.errors import ConfigError, EmbedderError, MissingDependencyError, StoreError, first_line, nearest_beside
from msae.data.open_clip import is_open_clip, load_open_clip

if TYPE_CHECKING:
    from PIL.Image import Image

Precision = Literal["auto", "float32", "bfloat16"]

DEMO = Path(__file__).parents[1] / "world" / "clip"
"""The folder of the encoder called `demo`."""

DEPTH, STEPS = 2, 4
"""Blocks and steps of the integrated gradients of `Embedder.contributions`; docs/regions.md has what else was tried."""
ValuesOf: TypeAlias = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n c"]]
"""Values of the embedding of each picture."""

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
    """Absolute path of the folder, hub id, or `demo`."""
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
        local: bool = False,
    ) -> Embedder:
        """The model in a folder or on the Hugging Face hub; nothing is unpickled and no foreign code is run.

        Args:
            id: A folder in the format of transformers or open_clip, a hub id, or `demo` for the small CLIP inside msae.
            device: `auto` is the first of cuda, mps and cpu that is there.
            dtype: What the model computes in; `auto` is bfloat16 on a CUDA device and on a CPU with AMX, else
                float32. docs/store-format.md says what bfloat16 gains and costs.
            revision: Branch, tag or commit on the hub.
            local: Take hub models from this machine's cache alone.

        Raises:
            EmbedderError: There is no such model, the hub cannot be reached, or the model is of another kind.
            MissingDependencyError: transformers or pillow is not installed.
        """
        try:
            import PIL  # noqa: F401

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook without widgets
                import transformers
        except ImportError as err:
            raise MissingDependencyError.of(err.name or "transformers", extra="clip") from None
        folder = find_folder(str(id), revision, local=local)
        device = as_device(device, allow_mps=True)
        chosen = choose_dtype(dtype, device)
        with _silent_transformers():
            if is_open_clip(folder):
                model, processor = load_open_clip(id, folder)
            else:
                model, processor = _load_transformers(id, folder, local=local)
            config = model.config
            if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
                raise EmbedderError(f"encoder {id} has no tokenizer; wanted one of {', '.join(_TOKENIZER_FILES)}")
            tokenizer = _load(id, transformers.AutoTokenizer, folder, config=config)
        is_clip = config.model_type == "clip"
        return cls(
            id=full_name(id),
            revision=revision_of(folder),
            d_in=int(config.projection_dim if is_clip else config.vision_config.hidden_size),
            device=device,
            dtype=chosen,
            pixel_backend="pil",
            max_tokens=int(config.text_config.max_position_embeddings),
            _model=model.eval().requires_grad_(False).to(device, getattr(torch, chosen)),
            _tokenizer=_with_padding(tokenizer, is_clip=is_clip),
            _processor=processor,
        )

    def embed_images(self, images: Sequence[Image]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of RGB images; see `msae.data.images.read_picture`."""
        return self.embed_pixels(self.pixels(images))

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """What the model's image tower takes in, on the CPU; safe to call from several threads."""
        return dict(self._processor(images=list(images), return_tensors="pt"))

    def embed_pixels(self, pixels: Mapping[str, Tensor]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of what `pixels` returned."""
        with torch.inference_mode():
            return _unit_rows(self._model.get_image_features(**self._inputs(pixels))).cpu().numpy()

    def contributions(
        self, pixels: Mapping[str, Tensor], of: Callable[[Float[Tensor, "n d_in"]], ValuesOf]
    ) -> list[Float32[np.ndarray, "c rows columns"]]:
        """What each patch of each picture adds to each value of its embedding.

        Integrated gradients at the input of the second last block, where a patch still holds what is in its place: on
        the way from a picture whose patches are all the mean of its own to the picture itself. Nothing is kept of
        the blocks before.

        Args:
            of: Gives, for the embeddings of the pictures, what has the values: a function of embeddings that may
                differ from picture to picture.

        Source: Sundararajan et al. 2017, arXiv:1703.01365.
        """
        blocks = self._model.vision_model.encoder.layers[-DEPTH:]
        inputs = self._inputs(pixels)
        entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        thread = threading.get_ident()

        def keep(_: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if threading.get_ident() == thread:  # somebody else may embed with the same model
                entered.append((args, options))

        hook = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                x = _unit_rows(self._model.get_image_features(**inputs))
        finally:
            hook.remove()
        ((whole, *others), options), values = entered[0], of(x)
        grids, first = self._grids(pixels), 0 if self._is_siglip else 1  # CLIP's class token comes first
        start = whole.clone()
        for patches, (rows, columns) in zip(start[:, first:], grids, strict=True):
            patches[: rows * columns] = patches[: rows * columns].mean(0)
        added: Tensor | float = 0.0
        with torch.enable_grad():
            for step in range(STEPS):
                state = (start + (step + 0.5) / STEPS * (whole - start)).requires_grad_()
                hidden = state
                for block in blocks:
                    out = block(hidden, *others, **options)
                    hidden = out if isinstance(out, Tensor) else out[0]
                sums = values(_unit_rows(self._pooled(hidden, inputs))).sum(0)
                gradients = (torch.autograd.grad(one, state, retain_graph=True)[0] for one in sums)
                added = added + torch.stack([((whole - start) * gradient).float().sum(-1) for gradient in gradients], 1)
        assert isinstance(added, Tensor)
        return [
            one[:, first : first + rows * columns].reshape(-1, rows, columns).cpu().numpy() / STEPS
            for one, (rows, columns) in zip(added, grids, strict=True)
        ]

    def _pooled(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Image features of what the last block gives."""
        vision = self._model.vision_model
        if self._is_siglip:
            mask = [inputs["pixel_attention_mask"]] if "pixel_attention_mask" in inputs else []
            features: Tensor = vision.head(vision.post_layernorm(hidden), *mask)
        else:
            features = self._model.visual_projection(vision.post_layernorm(hidden[:, 0]))
        return features

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a picture of this size that the model looks at: left, top, right and bottom, as shares."""
        processor = self._processor
        if not getattr(processor, "do_center_crop", False):
            return (0.0, 0.0, 1.0, 1.0)
        size: Any = processor.size if processor.do_resize else {"width": width, "height": height}
        if shortest := size.get("shortest_edge"):
            size = {"width": width * shortest / min(width, height), "height": height * shortest / min(width, height)}
        across, down = (processor.crop_size[side] / size[side] for side in ("width", "height"))
        return ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)

    def _inputs(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor.to(self.device) for name, tensor in pixels.items()}
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self._model.dtype)}

    def _grids(self, pixels: Mapping[str, Tensor]) -> list[list[int]]:
        """Rows and columns of each picture's patches."""
        if "spatial_shapes" in pixels:  # SigLIP 2 keeps the sides' proportion, and fills up with empty patches
            shapes: list[list[int]] = pixels["spatial_shapes"].tolist()
            return shapes
        n, _, height, width = pixels["pixel_values"].shape
        side = int(self._model.config.vision_config.patch_size)
        return [[height // side, width // side]] * n

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d_in"]:
        """Embeddings of captions; what does not fit into `max_tokens` is cut off.

        Raises:
            EmbedderError: The tokenizer has no token to pad with.
        """
        if self._tokenizer.pad_token is None:
            raise EmbedderError(
                f"the tokenizer of {self.id} has no pad token, so no text can be embedded; add pad_token to its "
                f"tokenizer_config.json, or embed pictures only"
            )
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
            found = self._model.get_text_features(**{name: inputs[name].to(self.device) for name in names})
            return _unit_rows(found).cpu().numpy()

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the captions do not fit into `max_tokens`."""
        tokens = self._tokenizer(self._prepared(texts), verbose=False)["input_ids"]
        return sum(len(row) > self.max_tokens for row in tokens)

    def is_known(self, texts: Sequence[str]) -> list[bool]:
        """Whether the tokenizer knows every word of each text; one that has no token for all others knows them all."""
        tokens = self._tokenizer(self._prepared(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._tokenizer.unk_token_id not in row for row in tokens]

    @property
    def _is_siglip(self) -> bool:
        return bool(self._model.config.model_type != "clip")

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        """SigLIP was trained on lower case; not every version of its tokenizer sees to that."""
        return [text.lower() for text in texts] if self._is_siglip else list(texts)


class MadeBy(Protocol):
    """What says which encoder made embeddings: an `EmbeddingStore`, or the config of an SAE."""

    @property
    def encoder(self) -> str | None: ...
    @property
    def encoder_revision(self) -> str | None: ...


class MadeStore(MadeBy, Protocol):
    @property
    def address(self) -> str: ...


def embedder_for(
    store: MadeStore | None,
    sae: MadeBy | None = None,
    *,
    need: str,
    option: str | None = None,
    encoder: str | Path | None = None,
    embedder: Embedder | None = None,
    device: str = "auto",
    local: bool = False,
) -> Embedder:
    """The model that made the embeddings of a store and of an SAE, at the revision that they record.

    Args:
        store: Embeddings that the model's own are compared with.
        sae: The config of the SAE that reads them.
        need: What is to be embedded, for the messages: `--text`, for example.
        option: The option that takes another encoder, for the messages, where there is one.
        encoder: A folder or hub id to take instead of the recorded one; its weights must be the recorded ones.
        embedder: A model that is loaded already; it is checked.
        device: Where a model is loaded.
        local: Take hub models from this machine's cache alone.

    Raises:
        ConfigError: Nothing says which model it is.
        StoreError: The model has other weights than the one that made the embeddings.
        EmbedderError: It cannot be loaded.
    """
    made = [(owner, (one.encoder, one.encoder_revision)) for owner, one in _owners(store, sae)]
    if embedder is not None:
        for owner, known in made:
            _check_same(need, option, (embedder.id, embedder.revision), owner, known)
        return embedder
    recorded = next((known for _, known in made if known[0]), None)
    name = encoder or (recorded and recorded[0])
    if name is None:
        raise ConfigError(
            f"neither {store.address if store else 'a store'} nor the SAE says which encoder made the embeddings, "
            f"which {need} needs; {f'give {option} ID' if option else 'a store made by msae embed says it'}"
        )
    revision = None
    if not is_folder(name):
        revision = next((known[1] for _, known in made if known[0] == str(name)), None)
        if revision is not None and not _is_commit(revision):
            raise EmbedderError(f"encoder {name} is not here, which {need} needs; {_remedy(option)}")
    folder = find_folder(str(name), revision, local=local)
    for owner, known in made:
        _check_same(need, option, (full_name(name), revision_of(folder, like=known[1])), owner, known)
    return Embedder.load(name, revision=revision, device=device, local=local)


def _owners(store: MadeStore | None, sae: MadeBy | None) -> Iterator[tuple[str, MadeBy]]:
    if store is not None:
        yield f"{store.address} was embedded by", store
    if sae is not None:
        yield "the SAE reads embeddings of", sae


def _check_same(need: str, option: str | None, mine: EncoderId, owner: str, known: EncoderId) -> None:
    if is_other_encoder(mine, known):
        raise StoreError(
            f"{need} would be embedded by {encoder_text(mine)}, but {owner} {encoder_text(known)}; {_remedy(option)}"
        )


def _remedy(option: str | None) -> str:
    first = f"give {option} the folder or id of that one" if option else "put that one back"
    return f"{first}, or embed the store again"


EncoderId = tuple[str | None, str | None]
"""An encoder's name and its revision, as far as they are known."""


def is_other_encoder(one: EncoderId, other: EncoderId) -> bool:
    """Whether two encoders are known to differ.

    A revision identifies an encoder's weights, wherever their folder lies; only where one side has none must the
    encoder's name agree. What a file does not say is not compared.
    """
    revisions = [revision for _, revision in (one, other) if revision]
    # Earlier hashes of a folder have 32 digits and cannot be compared with those of today.
    compared = 1 if len(revisions) == 2 and {len(revision) for revision in revisions} != {32, 64} else 0
    return bool(one[compared] and other[compared] and one[compared] != other[compared])


def encoder_text(encoder: EncoderId) -> str:
    """An encoder in an error message, with the first twelve digits of its revision."""
    name, revision = encoder
    return " at ".join(part for part in (name, revision and revision[:12]) if part)


def is_folder(id: str | Path) -> bool:
    """Whether an encoder is a folder on this machine, and no model of the hub."""
    return _place(id).is_dir()


def _place(id: str | Path) -> Path:
    """Where an encoder lies if it is a folder. Stores of earlier versions may name `demo` by the path it had then."""
    return DEMO if str(id) == "demo" or Path(id).parts[-3:] == ("msae", "demo", "clip") else Path(id)


def full_name(id: str | Path) -> str:
    """What is recorded of an encoder, so that it is found from any folder: absolute paths, hub ids, `demo`."""
    return str(Path(id).resolve()) if Path(id).is_dir() and str(id) != "demo" else str(id)


def find_folder(id: str, revision: str | None = None, *, local: bool = False) -> Path:
    """The folder of a model: the given one, msae's own for `demo`, or the hub's in the local cache.

    Raises:
        EmbedderError: There is no such folder, or the hub cannot be reached and the cache lacks it.
    """
    path = _place(id)
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_open_clip(path):
            raise EmbedderError(
                f"{path} holds no config.json; wanted a model folder in the format of transformers or of open_clip"
            )
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id) or id.startswith(".") or id == "demo":
        raise EmbedderError(f"encoder {path} does not exist{nearest_beside(path)}; wanted a folder or hub id")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as err:
        raise MissingDependencyError.of(err.name or "huggingface_hub", extra="clip") from None
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=_FILES, local_files_only=local))
    except (OSError, ValueError, RuntimeError) as err:
        at = f" at {revision[:12]}" if revision else ""
        raise EmbedderError(
            f"encoder {id!r} is no folder here, and the hub does not give it{at} ({first_line(err)}); "
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


def _load_transformers(id: str | Path, folder: Path, *, local: bool) -> tuple[Any, Any]:
    """The model and the image processor in a folder of transformers."""
    import transformers

    config = _load(id, transformers.AutoConfig, folder)
    if config.model_type not in _MODEL_TYPES:
        raise EmbedderError(
            f"{id} is a {config.model_type!r} model; wanted CLIP (also of open_clip), SigLIP or SigLIP 2"
        )
    if is_folder(id) or any(folder.glob("*.safetensors")):
        model = _load_model(id, folder, **_WEIGHTS)
    elif find_folder(str(id), local=local) == folder:
        # transformers knows where the hub keeps a safetensors conversion of old repositories, of `main` alone
        model = _load_model(id, str(id), local_files_only=local, **_WEIGHTS)
    else:
        raise EmbedderError(f"encoder {id} has no safetensors weights at {folder.name}; wanted model.safetensors")
    is_v5 = int(transformers.__version__.split(".")[0]) >= 5
    pillow = {"backend": "pil"} if is_v5 else {"use_fast": False}
    return model, _load(id, transformers.AutoImageProcessor, folder, **pillow)


def _load_model(id: str | Path, source: Path | str, **options: Any) -> Any:
    """The model with all of its weights: transformers would replace missing ones by random numbers."""
    import transformers

    model, report = _load(id, transformers.AutoModel, source, output_loading_info=True, **options)
    if report["missing_keys"]:
        first, *others = sorted(report["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise EmbedderError(f"encoder {id}: its weights lack {first}{more}; restore or download it")
    return model


def _with_padding(tokenizer: Any, *, is_clip: bool) -> Any:
    """The tokenizer with a pad token: CLIP reads a caption up to its end token, so that one may pad it too."""
    if tokenizer.pad_token is None and is_clip and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(id: str | Path, auto: Any, source: Path | str, **options: Any) -> Any:
    """What a class of transformers reads from a folder, or one line that says why it cannot."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except ImportError as err:
        raise EmbedderError(f"encoder {id} needs a package that is not installed: {first_line(err)}") from err
    except Exception as err:  # a damaged file surfaces as almost any error in transformers
        what = {"AutoConfig": "config.json", "AutoModel": "weights (model.safetensors)"}
        part = what.get(auto.__name__, "tokenizer" if "Tokenizer" in auto.__name__ else "preprocessor_config.json")
        raise EmbedderError(
            f"encoder {id}: its {part} cannot be read ({first_line(err)}); restore or download it"
        ) from err


def revision_of(folder: Path, *, like: str | None = None) -> str:
    """The hub's commit where the folder is one in its cache, else a hash of all bytes of the folder's model files.

    Args:
        like: A recorded revision; where that is a hash of the earlier kind, of 32 digits, so is the answer.
    """
    if folder.parent.name == "snapshots" and _is_commit(folder.name):
        return folder.name
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt", ".model", ".safetensors")]
    if like is not None and len(like) == 32:
        return _hash_of_ends(files)
    digest = hashlib.blake2b(digest_size=32)
    for path in files:
        known = path.stat()
        digest.update(f"{path.name}:{_hash_of(path, known.st_size, known.st_mtime_ns, known.st_ctime_ns)};".encode())
    return digest.hexdigest()


@lru_cache(64)
def _hash_of(path: Path, _size: int, _mtime: int, _ctime: int) -> str:
    """Of a file's bytes; kept until its size or one of its times changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_ends(files: Sequence[Path]) -> str:
    """What earlier versions recorded: of each file its size, its first and its last MB."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _unit_rows(features: Any) -> Float32[Tensor, "n d_in"]:
    """The features as float32 rows of unit length; transformers 5 returns an object, 4 a tensor."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


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
