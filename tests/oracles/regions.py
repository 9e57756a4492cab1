"""Integrated gradients through a whole image tower, one picture and one value at a time, all layers in the graph.

Source: Sundararajan, Taly and Yan 2017, arXiv:1703.01365, formula 1, by the midpoint rule.
"""

from __future__ import annotations

import torch


def features_with(model, inputs, layer, change):
    """Image features of unit length where what enters `layer` is first changed, and what entered it."""
    entered = []

    def swap(_, args):
        entered.append(args[0])
        return (change(args[0]), *args[1:])

    hook = model.vision_model.encoder.layers[layer].register_forward_pre_hook(swap)
    found = model.get_image_features(**inputs)
    hook.remove()
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return found / found.norm(dim=-1, keepdim=True), entered[0]


def contributions(model, inputs, value, *, layer, steps, first, n_patches):
    """What each patch of the one picture in `inputs` adds to `value` of its features.

    Args:
        value: A function of one embedding that gives one number.
        layer: The block at whose input the patches are read.
        first: Tokens before the patches.
    """
    model.requires_grad_(True)  # so that every layer is in the graph
    _, whole = features_with(model, inputs, layer, lambda hidden: hidden)
    mean = torch.zeros_like(whole[0, 0])
    for patch in range(n_patches):
        mean = mean + whole[0, first + patch] / n_patches
    added = [0.0] * n_patches
    for step in range(steps):
        t = (step + 0.5) / steps
        state = whole.detach().clone()
        for patch in range(n_patches):
            state[0, first + patch] = mean + t * (whole[0, first + patch] - mean)
        state = state.detach().requires_grad_(True)
        features, _ = features_with(model, inputs, layer, lambda _: state)  # noqa: B023
        (gradient,) = torch.autograd.grad(value(features[0]), state)
        for patch in range(n_patches):
            difference = whole[0, first + patch] - mean
            added[patch] += float((gradient[0, first + patch] @ difference).detach()) / steps
    model.requires_grad_(False)
    return added
