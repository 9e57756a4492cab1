"""The null of every table: the same SAE with untrained weights and as many active latents."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msae.measure import metrics
from msae.measure.evaluate.record import compared_with_untrained, json_number, mode_of_inference
from msae.sae.model import SAE
from msae.sae.run import Run
from msae.sae.view import View

SAMPLE_ROWS = 4096
"""Rows on which a trained SAE is compared with an untrained one: all of a smaller store, random ones of a larger."""


def sample_rows(n: int, *, seed: int) -> NDArray[np.int64]:
    """At most `SAMPLE_ROWS` of `n` rows, chosen at random, ascending."""
    if n <= SAMPLE_ROWS:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, SAMPLE_ROWS, replace=False))


class Untrained(NamedTuple):
    """An untrained SAE through which the rows of a store are seen."""

    view: View
    fvu_per_sample: float
    """On the sample."""


@torch.no_grad()
def untrained_like(view: View, *, k: int | None, seed: int) -> Untrained:
    """The rows of a view through an untrained SAE of the same size and standardisation.

    Decoder rows are random directions and the encoder is their transpose, times the one number with which it
    reconstructs a sample of the rows best: without it the comparison would be with a wrong scale. The `k` strongest
    latents are kept; without `k`, every positive one.
    """
    trained = view.sae
    plain = dataclasses.replace(
        trained.config, kind="relu", k=None, levels=None, widths=None, level_scales=False, soft_cap=None,
        inference_l0=None, threshold_modalities=(),
    )  # fmt: skip
    sae = SAE(plain, view.standardizer, seed=seed).to(view.device).eval()
    seen = View(Run.open(sae), view.store, view.modality, inference="relu", k=k, block_rows=view.block_rows)
    x, x_hat = [], []
    for rows in seen.rows(sample_rows(len(view), seed=seed)):
        x.append(rows.double())
        x_hat.append(sae.reconstruct(seen.activate(rows)).double())
    wanted, found = torch.cat(x), torch.cat(x_hat)
    scale = float((wanted * found).sum() / found.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
    sae.W_enc.mul_(scale)
    return Untrained(seen, float(metrics.fvu_per_sample(wanted, scale * found).mean()))


class Glance(NamedTuple):
    """What is seen of an SAE on a sample of rows."""

    n: int
    """Rows of the sample."""
    inference: str
    """How activations were made, in words."""
    l0: float
    """Mean count of active latents of a row."""
    dead: int
    """Latents that never fire in the sample."""
    d_sae: int
    fvu_per_sample: float | None
    untrained_fvu_per_sample: float | None

    def to_text(self) -> str:
        """The figures in words, a line each, and what they say."""
        lines = [
            f"active latents  {self.l0:,.1f} of {self.d_sae:,} in a row, on average",
            f"dead            {self.dead / self.d_sae:.1%} of the latents never fire in these rows",
        ]
        fvu, untrained = self.fvu_per_sample, self.untrained_fvu_per_sample
        if fvu is not None and untrained:
            lines += [
                f"FVU             {fvu:.3f} of the variance is lost; 0 is perfect, 1 useless",
                f"                {untrained:.3f} with untrained weights and as many active: "
                f"{compared_with_untrained(fvu, untrained)}",
            ]
        return "\n".join(lines)


@torch.no_grad()
def glance(view: View, *, seed: int = 0) -> Glance:
    """The first figures of an SAE, on a random sample of at most 4,096 rows of a view."""
    use, score = metrics.LatentUse(view.sae.d_sae), metrics.ReconstructionScore()
    rows = sample_rows(len(view), seed=seed)
    for x in view.rows(rows):
        z = view.activate(x)
        use.update(z)
        score.update(x, view.sae.reconstruct(z))
    untrained = untrained_like(view, k=max(1, round(use.l0())), seed=seed)
    return Glance(
        len(rows), mode_of_inference(view.inference, view.k), use.l0(), use.dead(), view.sae.d_sae,
        json_number(score.fvu_per_sample().mean), json_number(untrained.fvu_per_sample),
    )  # fmt: skip
