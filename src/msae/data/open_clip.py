"""Checkpoints of open_clip whose towers are CLIP's vision transformers, converted to `CLIPModel` of transformers.

A folder has `open_clip_config.json` and safetensors. What differs from CLIP (timm or ResNet towers, other poolings,
text models of the hub) is refused by name. `tests/peers/open_clip_forward.py` compares with open_clip itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msae.base.errors import EmbedderError, first_line

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, which open_clip takes where a config says nothing."""
_RESAMPLE = {"bicubic": 3, "random": 3, "bilinear": 2}  # numbers of Pillow; random is for training
_VISION = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_WITHOUT_EFFECT = ("patch_dropout", "init_logit_scale", "init_logit_bias", "custom_text", "cast_dtype", "output_tokens")
"""Settings of training, or of what is no part of an embedding."""
_PLAIN = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",), "pad_id": (0,)}
"""Other settings, at what a CLIP has; any further one must be off."""
_NAMES = (
    (r"^text\.", ""),  # where open_clip keeps the text tower as a module of its own
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of open_clip, and none of transformers."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return "model_type" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return True


def load_open_clip(id: str | Path, folder: Path) -> tuple[Any, Any]:
    """The checkpoint in a folder as a `CLIPModel` in float32, with the image processor that its config asks for.

    Raises:
        EmbedderError: It is damaged, has no safetensors, or its towers are no CLIP vision transformer and text model.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model_config, preprocess = dict(config["model_cfg"]), dict(config.get("preprocess_cfg", {}))
        vision, text = dict(model_config.pop("vision_cfg")), dict(model_config.pop("text_cfg"))
        width = int(model_config.pop("embed_dim"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise EmbedderError(
            f"encoder {id}: its {CONFIG} cannot be read ({first_line(err)}); restore or download it"
        ) from err
    activation = "quick_gelu" if model_config.pop("quick_gelu", False) else "gelu"
    _check(id, model_config, vision, text)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise EmbedderError(f"encoder {id} has no safetensors weights; wanted {' or '.join(WEIGHTS)} beside {CONFIG}")
    try:
        seen, read = {**_VISION, **vision}, {**_TEXT, **text}
        side = _side(seen["image_size"])
        clip = transformers.CLIPConfig(
            projection_dim=width,
            vision_config={
                **_tower(seen, int(seen["width"]) // int(seen["head_width"]), activation),
                "image_size": side,
                "patch_size": _side(seen["patch_size"]),
            },
            text_config={
                **_tower(read, int(read["heads"]), activation),
                "vocab_size": int(read["vocab_size"]),
                "max_position_embeddings": int(read["context_length"]),
                "eos_token_id": 2,  # transformers pools at the largest token then, as open_clip does
            },
        )
        with torch.random.fork_rng(devices=[]):  # the weights that a new model draws are replaced
            model = transformers.CLIPModel(clip)
        model.load_state_dict(convert(load_file(file)))
        return model, _processor(transformers, side, preprocess)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as err:
        raise EmbedderError(
            f"encoder {id}: its {file.name} and {CONFIG} do not make a CLIP ({' '.join(str(err).split())[:300]}); "
            f"restore or download it"
        ) from err


def _check(id: str | Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Refuse, by its name, what a CLIP of transformers does not have."""
    what = None
    if isinstance(vision.get("layers"), list):
        what = "its image tower is a ResNet"
    for where, name in ((vision, "timm_model_name"), (text, "hf_model_name"), (text, "hf_tokenizer_name")):
        if where.get(name):
            what = f"it uses {where[name]} ({name})"
    for where, known in ((model, {}), (vision, _VISION), (text, _TEXT)):
        for name, value in where.items():
            if name in known or name in _WITHOUT_EFFECT or name.startswith(("timm_", "hf_")) or what:
                continue
            if value not in (*_PLAIN.get(name, ()), None, False, "", {}):
                what = f"{name} is {value!r}"[:120]
    if what:
        raise EmbedderError(
            f"encoder {id} is an open_clip model other than CLIP's two transformers: {what}; give one that is, "
            f"such as ViT-B-32, or a model in the format of transformers"
        )


def _tower(config: Mapping[str, Any], heads: int, activation: str) -> dict[str, Any]:
    width = int(config["width"])
    return {
        "hidden_size": width,
        "intermediate_size": int(width * float(config["mlp_ratio"])),
        "num_hidden_layers": int(config["layers"]),
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


def _side(size: Any) -> int:
    sides = {int(one) for one in size} if isinstance(size, list) else {int(size)}
    if len(sides) != 1:
        raise ValueError(f"pictures or patches of {size} are no squares")
    return sides.pop()


def _processor(transformers: Any, side: int, config: Mapping[str, Any]) -> Any:
    mode, interpolation = config.get("resize_mode") or "shortest", config.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise ValueError(
            f"pictures scaled by {mode} and {interpolation}; wanted shortest or squash, bicubic or bilinear"
        )
    squares = {"height": side, "width": side}
    make = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return make(
        size={"shortest_edge": side} if mode == "shortest" else squares,
        crop_size=squares,
        do_center_crop=mode == "shortest",
        resample=_RESAMPLE[interpolation],
        image_mean=list(config.get("mean") or _MEAN),
        image_std=list(config.get("std") or _STD),
    )


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip under the names that transformers has for them, in float32."""
    found = {}
    for name, tensor in weights.items():
        value = tensor.float()
        if name in ("logit_bias", "attn_mask", "text.attn_mask"):  # no part of an embedding
            continue
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            found[name] = value.T.contiguous()
        elif (joined := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)) is not None:
            for part, one in zip("qkv", value.chunk(3), strict=True):
                found[f"{joined[1]}.self_attn.{part}_proj.{joined[2]}"] = one.contiguous()
        else:
            found[name] = value
    return found
