"""An edit of a concept the long way: every row decoded and classified again, the reconstruction error kept.

Source: Zaigrajew et al. 2025, arXiv:2502.20578, and design decision "the residual is kept" (docs/audit.md).
"""

import torch


def edited_probabilities(sae, classifier, x, z, edited_z, modality="image"):
    """Class probabilities of the raw rows `x` once their activations `z` are `edited_z`."""
    residual = x - sae.decode(z, modality)
    return classifier.logits(sae.decode(edited_z, modality) + residual).softmax(1)


def set_group(z, rows, latents, W_dec, strength):
    """A copy of `z` where the latents of a group have `strength` in `rows`, shared as they are on average."""
    mean = z[:, latents].double().mean(0)
    length = (mean @ W_dec[latents].double()).norm()
    edited = z.clone()
    for row in rows:
        edited[row, latents] = (strength * mean / length).float()
    return edited


def group_strength(z, latents, W_dec):
    """Length of what the latents add, along the direction of their mean sum."""
    common = z[:, latents].mean(0) @ W_dec[latents]
    return (z[:, latents] @ W_dec[latents]) @ (common / common.norm())


def mean_change(before, after, rows, k):
    """Mean change of class `k` over `rows`, and the share of them whose predicted class changed."""
    change = (after - before)[rows, k].mean()
    return float(change), float((after.argmax(1) != before.argmax(1))[rows].float().mean())


def accuracy(probabilities, truth):
    return float((probabilities.argmax(1) == torch.as_tensor(truth)).float().mean())
