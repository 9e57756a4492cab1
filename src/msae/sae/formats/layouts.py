"""How other libraries lay out an SAE on disk: for each, what is written and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from msae.base.errors import ConfigError, RunError
from msae.sae.formats.folded import Folded

SAE_LENS_VERSION = "6.54.12"
"""The version that the files are written for; SAELens takes anything below 6.0 for its old format."""


class Layout(NamedTuple):
    """The files of one library."""

    config: str
    weights: str
    write: Callable[[Folded, Path, Mapping[str, Any]], None]
    """Writes a folder; the mapping is what else is known of the SAE, for formats that have a place for it."""
    read: Callable[[dict[str, Any], dict[str, Tensor]], Folded] | None
    """Makes sense of the config and the tensors; raises `RunError` where msae has no such SAE. None: it has none."""


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """In a folder that is not there yet for anyone else."""
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _needs_k(folded: Folded, library: str) -> int:
    if folded.k is None:
        raise ConfigError(f"{library} knows only the k largest latents of a row; give --k, for example --k 64")
    return folded.k


def _linear(weight: Tensor, bias: Tensor | None = None, name: str = "encoder") -> dict[str, Tensor]:
    """A torch Linear of rows by inputs."""
    tensors = {f"{name}.weight": weight.contiguous()}
    return tensors if bias is None else {**tensors, f"{name}.bias": bias}


def _of_linear(tensors: Mapping[str, Tensor], **more: Any) -> Folded:
    """From `encoder.weight`, `encoder.bias`, `b_dec`, and a decoder as `W_dec` or `decoder.weight`."""
    decoder = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T.contiguous()
    weight = tensors["encoder.weight"].T.contiguous()
    return Folded(weight, decoder, tensors["encoder.bias"], tensors["b_dec"], **more)


# --- SAELens


def _write_saelens(folded: Folded, folder: Path, about: Mapping[str, Any]) -> None:
    architecture = "topk" if folded.k else "standard" if folded.threshold is None else "jumprelu"
    config = {
        "architecture": architecture,
        "d_in": folded.d_in,
        "d_sae": folded.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **about},
    }
    if folded.k:
        config |= {"k": folded.k, "rescale_acts_by_decoder_norm": False}
    tensors = {name: getattr(folded, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if folded.threshold is not None:
        tensors["threshold"] = folded.threshold
    write_json(folder / "cfg.json", config)
    save_file(tensors, folder / "sae_weights.safetensors")


def _read_saelens(config: dict[str, Any], tensors: dict[str, Tensor]) -> Folded:
    architecture = config.get("architecture", "standard")
    # Before SAELens 6 a top-k SAE was a standard one with another activation function.
    old = {**(config.get("activation_fn_kwargs") or {})}
    is_topk = architecture == "topk" or config.get("activation_fn", config.get("activation_fn_str")) == "topk"
    if architecture not in ("standard", "topk", "jumprelu"):
        raise RunError(f"it is a {architecture} SAE, and msae reads standard, topk and jumprelu ones")
    if config.get("normalize_activations", "none") not in ("none", None):
        raise RunError(f"it normalises its input by {config['normalize_activations']}, which msae does not")
    if config.get("finetuning_scaling_factor"):
        raise RunError("it has a fine-tuned scaling factor, which msae does not")
    k = config.get("k", old.get("k")) if is_topk else None
    if is_topk and not (isinstance(k, int) and k > 0):
        raise RunError(f"its k is {k!r}, not a positive number")
    threshold = None
    if architecture == "jumprelu":
        threshold = tensors["log_threshold"].exp() if "log_threshold" in tensors else tensors["threshold"]
    W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    if is_topk and config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1).clamp_min(1e-8)
        W_enc, W_dec, b_enc = W_enc * norms, W_dec / norms[:, None], b_enc * norms
    if not config.get("apply_b_dec_to_input", True):
        b_enc = (b_enc.double() + b_dec.double() @ W_enc.double()).float()
    return Folded(W_enc, W_dec, b_enc, b_dec, k=k, threshold=threshold)


# --- sparsify


def _write_sparsify(folded: Folded, folder: Path, about: Mapping[str, Any]) -> None:  # noqa: ARG001  # no place for it
    config = {
        "activation": "topk",
        "expansion_factor": max(1, folded.d_sae // folded.d_in),
        "normalize_decoder": False,
        "num_latents": folded.d_sae,
        "k": _needs_k(folded, "sparsify"),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": folded.d_in,
    }
    write_json(folder / "cfg.json", config)
    tensors = {**_linear(folded.W_enc.T, folded.b_enc), "W_dec": folded.W_dec, "b_dec": folded.b_dec}
    save_file(tensors, folder / "sae.safetensors")


def _read_sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> Folded:
    for name in ("transcode", "skip_connection"):
        if config.get(name):
            raise RunError(f"it has {name} set, and msae reads plain SAEs")
    if config.get("activation", "topk") != "topk":
        raise RunError(f"its activation is {config['activation']}, and msae reads topk")
    k = config.get("k", 32)
    if not (isinstance(k, int) and k > 0):
        raise RunError(f"its k is {k!r}, not a positive number")
    return _of_linear(tensors, k=k)


# --- dictionary_learning


def _write_dictionary_learning(folded: Folded, folder: Path, about: Mapping[str, Any]) -> None:
    trainer: dict[str, Any] = {"activation_dim": folded.d_in, "dict_size": folded.d_sae}
    if folded.k:
        trainer |= {"dict_class": "AutoEncoderTopK", "k": folded.k}
        tensors = {
            **_linear(folded.W_enc.T, folded.b_enc),
            **_linear(folded.W_dec.T, name="decoder"),
            "b_dec": folded.b_dec,
            "k": torch.tensor(folded.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),
        }
    elif folded.threshold is None:
        trainer["dict_class"] = "AutoEncoder"
        tensors = {
            "bias": folded.b_dec,
            **_linear(folded.W_enc.T, folded.b_enc),
            **_linear(folded.W_dec.T, name="decoder"),
        }
    else:
        trainer["dict_class"] = "JumpReluAutoEncoder"
        tensors = {
            "W_enc": folded.W_enc,
            "W_dec": folded.W_dec,
            "b_enc": folded.without_pre_bias(),
            "b_dec": folded.b_dec,
            "threshold": folded.threshold,
        }
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}, "msae": dict(about)})
    torch.save(tensors, folder / "ae.pt")


def _read_dictionary_learning(config: dict[str, Any], tensors: dict[str, Tensor]) -> Folded:
    trainer = config.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind == "AutoEncoder":
        return _of_linear({**tensors, "b_dec": tensors["bias"]})
    if kind == "AutoEncoderTopK":
        return _of_linear(tensors, k=int(tensors["k"]) if "k" in tensors else int(config["trainer"]["k"]))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        if kind == "MatryoshkaBatchTopKSAE":
            W_enc, W_dec, b_enc = tensors["W_enc"], tensors["W_dec"], tensors["b_enc"]
            plain = Folded(W_enc, W_dec, b_enc, tensors["b_dec"])
        else:
            plain = _of_linear(tensors)
        threshold = tensors["threshold"].float().expand(plain.d_sae).clone()
        return Folded(plain.W_enc, plain.W_dec, plain.b_enc, plain.b_dec, threshold=threshold)
    if kind == "JumpReluAutoEncoder":
        W_enc, b_dec = tensors["W_enc"], tensors["b_dec"]
        b_enc = (tensors["b_enc"].double() + b_dec.double() @ W_enc.double()).float()
        return Folded(W_enc, tensors["W_dec"], b_enc, b_dec, threshold=tensors["threshold"])
    raise RunError(
        f"its dict_class is {kind!r}, and msae reads AutoEncoder, AutoEncoderTopK, BatchTopKSAE, "
        "MatryoshkaBatchTopKSAE and JumpReluAutoEncoder"
    )


# --- sentence-transformers


def _write_sentence_transformers(folded: Folded, folder: Path, about: Mapping[str, Any]) -> None:  # noqa: ARG001
    k = _needs_k(folded, "sentence-transformers")
    config = {
        "input_dim": folded.d_in,
        "hidden_dim": folded.d_sae,
        "k": k,
        "k_aux": min(512, folded.d_sae),
        "normalize": False,
        "dead_threshold": 30,
    }
    write_json(folder / "config.json", config)
    tensors = {
        "pre_bias": folded.b_dec,
        **_linear(folded.W_enc.T),
        "latent_bias": folded.b_enc,
        "stats_last_nonzero": torch.zeros(folded.d_sae, dtype=torch.long),
    }
    save_file(tensors, folder / "model.safetensors")


# --- ViT-Prisma


def read_prisma(config: dict[str, Any], tensors: dict[str, Tensor]) -> Folded:
    """ViT-Prisma's files, whose config is that of its training."""
    known = {key: config.get(key) for key in ("activation_fn_str", "activation_fn_kwargs", "normalize_activations")}
    if config.get("is_transcoder"):
        raise RunError("it is a transcoder, and msae reads SAEs")
    return _read_saelens({"architecture": config.get("architecture", "standard"), **known}, tensors)


LAYOUTS: dict[str, Layout] = {
    "saelens": Layout("cfg.json", "sae_weights.safetensors", _write_saelens, _read_saelens),
    "sparsify": Layout("cfg.json", "sae.safetensors", _write_sparsify, _read_sparsify),
    "dictionary-learning": Layout("config.json", "ae.pt", _write_dictionary_learning, _read_dictionary_learning),
    "sentence-transformers": Layout("config.json", "model.safetensors", _write_sentence_transformers, None),
}
