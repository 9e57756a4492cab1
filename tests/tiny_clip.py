"""Tiny CLIP, SigLIP and SigLIP 2 models with random weights, in the true folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

WORDS = ["a", "an", "the", "red", "green", "blue", "cat", "dog", "photo", "of", "on", "two"]
Kind = Literal["clip", "siglip", "siglip2"]


def make_encoder(folder: Path, kind: Kind = "clip", *, seed: int = 0, width: int = 16) -> Path:
    """A model folder of `kind`; `width` is d_in."""
    import transformers

    tower = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    text["pad_token_id"] = 0
    vision: dict[str, Any] = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    model: Any
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
        model = transformers.CLIPModel(config)
        processor: Any = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    elif kind == "siglip":
        text["projection_size"] = width
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        text["projection_size"] = width
        vision = {**tower, "patch_size": 8, "num_patches": 16}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
        processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    for parameter in model.parameters():  # the initial weights are so small that all inputs look alike
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _tokenizer(kind).save_pretrained(folder)
    return folder


def _tokenizer(kind: Kind) -> Any:
    """Words, lower-cased; each caption ends in `<eos>`, which CLIP pools."""
    if kind == "siglip2":  # a character a token: transformers rebuilds this tokenizer from its vocabulary
        from transformers import Siglip2Tokenizer

        characters = [
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<mask>",
            "▁",
            *"abcdefghijklmnopqrstuvwxyz0123456789",
        ]
        vocabulary = {character: number for number, character in enumerate(characters)}
        return Siglip2Tokenizer(vocab=vocabulary, merges=[], model_max_length=12, padding_side="right")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if kind == "clip":
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<bos> $A <eos>" if kind == "clip" else "$A <eos>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=12,
    )
