"""Checkpoints of open_clip: the same embeddings as its formulas give, and others refused by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import msae
from msae.base.errors import EmbedderError
from msae.data.embedder import Embedder
from tests.oracles import open_clip as oracle
from tests.tiny_clip import _tokenizer

WIDTH, TEXT_WIDTH, LAYERS, D_IN, SIDE, PATCH, CONTEXT, WORDS = 16, 24, 2, 12, 32, 8, 10, 64
CAPTIONS = ["a red cat", "two blue dog on the photo of a green dog and more", "a"]


def weights_of(seed=0, prefix=""):
    """A state dict with open_clip's names and shapes; `prefix` is that of the text tower."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng) * 0.3

    def tower(name, width):
        for layer in range(LAYERS):
            block = f"{name}.resblocks.{layer}"
            shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                      "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                      "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
                      "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}  # fmt: skip
            yield from ((f"{block}.{part}", draw(*shape)) for part, shape in shapes.items())
            yield from norm(f"{block}.ln_1", width)
            yield from norm(f"{block}.ln_2", width)

    def norm(name, width):
        yield f"{name}.weight", 1 + draw(width)
        yield f"{name}.bias", draw(width)

    return {
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH), "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, WIDTH), "visual.proj": draw(WIDTH, D_IN),
        **dict(norm("visual.ln_pre", WIDTH)), **dict(norm("visual.ln_post", WIDTH)),
        **dict(tower("visual.transformer", WIDTH)),
        f"{prefix}token_embedding.weight": draw(WORDS, TEXT_WIDTH),
        f"{prefix}positional_embedding": draw(CONTEXT, TEXT_WIDTH),
        f"{prefix}text_projection": draw(TEXT_WIDTH, D_IN), **dict(norm(f"{prefix}ln_final", TEXT_WIDTH)),
        **dict(tower(f"{prefix}transformer", TEXT_WIDTH)), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip


def make_open_clip(folder, weights=None, *, model=None, vision=None, text=None, preprocess=None, dtype=torch.float32):
    """A folder as open_clip pushes it to the hub; head widths of 4 and 6."""
    folder.mkdir(exist_ok=True)
    config = {
        "model_cfg": {
            "embed_dim": D_IN, **(model or {}),
            "vision_cfg": {"image_size": SIDE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH, "head_width": 4,
                           **(vision or {})},
            "text_cfg": {"context_length": CONTEXT, "vocab_size": WORDS, "width": TEXT_WIDTH, "heads": 4,
                         "layers": LAYERS, **(text or {})},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], **(preprocess or {})},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = weights_of() if weights is None else weights
    save_file(
        {name: one.to(dtype).contiguous() for name, one in weights.items()}, folder / "open_clip_model.safetensors"
    )
    _tokenizer("clip").save_pretrained(folder)
    return folder


def load(folder):
    return Embedder.load(folder, device="cpu", dtype="float32")


def picture(width=32, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("prefix", ["", "text."])
def test_embeddings_are_those_of_open_clips_formulas(tmp_path, quick, prefix):
    embedder = load(make_open_clip(tmp_path / "a", weights_of(prefix=prefix), model={"quick_gelu": quick}))
    weights = weights_of()
    pixels = embedder.pixels([picture()])["pixel_values"][0]
    found = embedder.embed_images([picture()])[0]
    wanted = oracle.embed_pixels(pixels, weights, layers=LAYERS, heads=4, patch=PATCH, quick=quick)
    assert embedder.d_in == D_IN == len(found) and embedder.max_tokens == CONTEXT
    assert np.allclose(found, wanted.numpy(), atol=1e-5)  # float32 against float64
    for caption, row in zip(CAPTIONS, embedder.embed_texts(CAPTIONS), strict=True):
        tokens = embedder._tokenizer(caption, truncation=True, max_length=CONTEXT)["input_ids"]
        wanted = oracle.embed_tokens(tokens, weights, layers=LAYERS, heads=4, quick=quick)
        assert np.allclose(row, wanted.numpy(), atol=1e-5)


def test_the_two_activations_differ(tmp_path):
    plain, quick = (load(make_open_clip(tmp_path / str(q), model={"quick_gelu": q})) for q in (False, True))
    assert np.abs(plain.embed_images([picture()]) - quick.embed_images([picture()])).max() > 1e-4


def test_pictures_are_scaled_as_the_config_says(tmp_path):
    wide = picture(64, 32)
    values = np.asarray(wide, dtype=np.float64) / 255
    cut = (values[:, 16:48] - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]  # the middle square, not scaled
    embedder = load(make_open_clip(tmp_path / "a"))
    assert np.allclose(embedder.pixels([wide])["pixel_values"][0], cut.transpose(2, 0, 1), atol=1e-5)
    assert embedder.seen(64, 32) == (0.25, 0, 0.75, 1)
    squash = load(make_open_clip(tmp_path / "b", preprocess={"resize_mode": "squash", "interpolation": "bilinear"}))
    small = np.asarray(wide.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    wanted = ((small - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).transpose(2, 0, 1)
    assert np.allclose(squash.pixels([wide])["pixel_values"][0], wanted, atol=1e-5)
    assert squash.seen(64, 32) == (0, 0, 1, 1)


def test_half_precision_weights_are_read(tmp_path):
    whole, half = load(make_open_clip(tmp_path / "a")), load(make_open_clip(tmp_path / "b", dtype=torch.float16))
    assert np.allclose(whole.embed_texts(CAPTIONS), half.embed_texts(CAPTIONS), atol=1e-2)


def test_a_folder_of_both_kinds_is_read_by_transformers(tmp_path):
    from tests.tiny_clip import make_encoder

    folder = make_encoder(tmp_path / "a")
    wanted = load(folder).embed_texts(CAPTIONS)
    (folder / "open_clip_config.json").write_text("{}")
    assert np.array_equal(load(folder).embed_texts(CAPTIONS), wanted)


def test_a_store_is_made_and_searched_with_it(tmp_path):
    encoder = make_open_clip(tmp_path / "encoder")
    (tmp_path / "words.txt").write_text("\n".join(CAPTIONS))
    store = msae.embed(tmp_path / "words.txt", encoder=str(encoder), out=tmp_path / "a.store")
    assert store.encoder == str(encoder) and store.encoder_revision == load(encoder).revision


@pytest.mark.parametrize("options,what", [
    ({"vision": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "vit_base_patch16_siglip_224"),
    ({"vision": {"layers": [3, 4, 6, 3]}}, "ResNet"),
    ({"text": {"hf_model_name": "xlm-roberta-base"}}, "xlm-roberta-base"),
    ({"text": {"hf_tokenizer_name": "bert-base-uncased"}}, "bert-base-uncased"),
    ({"model": {"multimodal_cfg": {"layers": 12}}}, "multimodal_cfg"),
    ({"vision": {"attentional_pool": True}}, "attentional_pool"),
    ({"vision": {"pool_type": "avg"}}, "pool_type is 'avg'"),
    ({"vision": {"ls_init_value": 1e-5}}, "ls_init_value"),
    ({"text": {"pool_type": "last"}}, "pool_type is 'last'"),
    ({"text": {"no_causal_mask": True}}, "no_causal_mask"),
    ({"vision": {"something_new": 3}}, "something_new is 3"),
    ({"preprocess": {"resize_mode": "longest"}}, "longest"),
    ({"vision": {"image_size": [32, 64]}}, "no squares"),
    ({"vision": {"width": 32}}, "do not make a CLIP"),
    ({"vision": {"width": "wide"}}, "do not make a CLIP"),
])  # fmt: skip
def test_what_is_no_clip_is_refused_by_name_in_one_line(tmp_path, options, what):
    folder = make_open_clip(tmp_path / "a", **options)
    with pytest.raises(EmbedderError, match=what) as err:
        load(folder)
    assert "\n" not in str(err.value)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    weights = weights_of()
    less = {name: one for name, one in weights.items() if name != "visual.ln_pre.bias"}
    more = {**weights, "visual.extra": torch.zeros(1)}
    folders = [make_open_clip(tmp_path / "less", less), make_open_clip(tmp_path / "more", more)]
    for name, file, data in (
        ("json", "open_clip_config.json", b"{"), ("list", "open_clip_config.json", b"[]"),
        ("short", "open_clip_model.safetensors", b"\xff" * 20),
    ):  # fmt: skip
        folders.append(make_open_clip(tmp_path / name))
        (folders[-1] / file).write_bytes(data)
    folders.append(make_open_clip(tmp_path / "pickle"))
    (folders[-1] / "open_clip_model.safetensors").rename(folders[-1] / "open_clip_pytorch_model.bin")
    for folder in folders:
        with pytest.raises(EmbedderError) as err:
            load(folder)
        assert "\n" not in str(err.value) and str(folder) in str(err.value)
