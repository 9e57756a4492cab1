"""open_clip's CLIP as plain formulas on its own state dict, one picture or caption at a time.

Source: Radford et al. 2021, arXiv:2103.00020, and the layout of open_clip's checkpoints.
"""

from __future__ import annotations

import torch


def _norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def _gelu(x, quick):
    return x * torch.sigmoid(1.702 * x) if quick else 0.5 * x * (1 + torch.erf(x / 2**0.5))


def _blocks(x, weights, name, *, layers, heads, quick, causal):
    n, width = x.shape
    size = width // heads
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}"
        y = _norm(x, weights, f"{block}.ln_1")
        joined = y @ weights[f"{block}.attn.in_proj_weight"].T + weights[f"{block}.attn.in_proj_bias"]
        q, k, v = joined[:, :width], joined[:, width : 2 * width], joined[:, 2 * width :]
        heard = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
            heard.append(scores.softmax(-1) @ v[:, part])
        x = (
            x
            + torch.cat(heard, 1) @ weights[f"{block}.attn.out_proj.weight"].T
            + weights[f"{block}.attn.out_proj.bias"]
        )
        y = _norm(x, weights, f"{block}.ln_2")
        y = _gelu(y @ weights[f"{block}.mlp.c_fc.weight"].T + weights[f"{block}.mlp.c_fc.bias"], quick)
        x = x + y @ weights[f"{block}.mlp.c_proj.weight"].T + weights[f"{block}.mlp.c_proj.bias"]
    return x


def embed_pixels(pixels, weights, *, layers, heads, patch, quick):
    """Embedding of unit length of one picture, (3, side, side), already scaled and normalised."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    kernel = weights["visual.conv1.weight"]
    side = pixels.shape[1] // patch
    tokens = [weights["visual.class_embedding"]]
    for row in range(side):
        for column in range(side):
            cut = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].double()
            tokens.append((kernel * cut).sum((1, 2, 3)))
    x = _norm(torch.stack(tokens) + weights["visual.positional_embedding"], weights, "visual.ln_pre")
    x = _blocks(x, weights, "visual.transformer", layers=layers, heads=heads, quick=quick, causal=False)
    x = _norm(x[0], weights, "visual.ln_post") @ weights["visual.proj"]
    return x / x.norm()


def embed_tokens(tokens, weights, *, layers, heads, quick):
    """Embedding of unit length of one caption's tokens; it is read at the largest one."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: len(tokens)]
    x = _blocks(x, weights, "transformer", layers=layers, heads=heads, quick=quick, causal=True)
    x = _norm(x[int(torch.tensor(tokens).argmax())], weights, "ln_final") @ weights["text_projection"]
    return x / x.norm()
