"""`Folded`: an SAE that reads raw embeddings; standardisation and thresholds are folded into its weights.

An SAE trained on `(x - mean) * s` equals, on raw `x`, the one with the same `W_enc` and `W_dec`, with `b_enc` and
thresholds divided by `s`, and with `b_dec / s + mean`. Its activations are those of msae divided by `s`; which latents
are active, and their order, do not change. A factor that the SAE has for its activations at this number of active
latents goes into `W_enc`, `b_enc` and thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msae.base.errors import ConfigError
from msae.sae.model import SAE, Inference, SAEConfig
from msae.sae.standardize import MODALITIES, Modality, Standardizer, Statistics
from msae.sae.thresholds import SILENT


@dataclass(frozen=True, eq=False)
class Folded:
    """Weights on raw embeddings: `z = active((x - b_dec) W_enc + b_enc)`, `x_hat = z W_dec + b_dec`."""

    W_enc: Tensor
    """(d_in, d_sae)"""
    W_dec: Tensor
    """(d_sae, d_in)"""
    b_enc: Tensor
    b_dec: Tensor
    k: int | None = None
    """Only the k largest are active, where they are positive."""
    threshold: Tensor | None = None
    """(d_sae,): only latents above theirs are active. Without it and `k`, all positive ones."""

    @property
    def d_in(self) -> int:
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)

    def without_pre_bias(self) -> Tensor:
        """`b_enc` for a format that does not subtract `b_dec` before the encoder."""
        return (self.b_enc.double() - self.b_dec.double() @ self.W_enc.double()).float()

    def is_close(self, other: Folded) -> bool:
        """Whether both say the same, but for rounding."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("W_enc", "b_enc", "b_dec")]
        if (self.threshold is None) != (other.threshold is None) or self.k != other.k:
            return False
        if self.threshold is not None and other.threshold is not None:
            pairs.append((self.threshold, other.threshold))
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def modality_of(sae: SAE, modality: Modality | None) -> Modality:
    """The modality asked for, or the only one that the SAE standardises.

    Raises:
        ConfigError: It standardises several, or not this one.
    """
    known = sae.standardizer.modalities
    if modality is None and len(known) == 1:
        return known[0]
    if modality not in known:
        found = " and ".join(known) or "nothing"
        raise ConfigError(
            f"this SAE standardises {found}, and a file of another library holds one modality; "
            f"give --modality {known[0] if known else 'image'}"
        )
    return modality


def fold(sae: SAE, modality: Modality, *, inference: Inference = "trained", k: int | None = None) -> Folded:
    """The SAE on raw embeddings of one modality.

    Raises:
        ConfigError: It has a soft cap, or `inference` cannot be had.
    """
    if sae.config.soft_cap is not None:
        raise ConfigError(
            f"this SAE has a soft cap of {sae.config.soft_cap:g}, which this format cannot hold; "
            "--to onnx can, or train without --soft-cap"
        )
    known, rule = sae.standardizer.statistics[modality], sae.rule(inference, k, modality)
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    threshold = None
    if rule.threshold is not None:
        threshold = rule.threshold.detach().cpu().double() * (rule.scale / known.scale)
        threshold = threshold.clamp_max(SILENT).float().expand(sae.d_sae).clone()
    return Folded(
        W_enc=(state["W_enc"] if rule.scale == 1 else (state["W_enc"].double() * rule.scale).float()).contiguous(),
        W_dec=state["W_dec"].contiguous(),
        b_enc=(state["b_enc"].double() * (rule.scale / known.scale)).float(),
        b_dec=(state["b_dec"].double() / known.scale + known.mean.cpu().double()).float(),
        k=None if rule.k is None else min(rule.k, sae.d_sae),
        threshold=threshold,
    )


def unfold(
    folded: Folded,
    *,
    standardizer: Standardizer | None = None,
    encoder: str | None = None,
    unnormalised: bool = False,
    soft_cap: float | None = None,
) -> SAE:
    """An SAE with these very weights.

    Args:
        standardizer: What the weights expect their embeddings to be put through; without it, nothing.
    """
    nothing = Standardizer({modality: Statistics(torch.zeros(folded.d_in), 1.0) for modality in MODALITIES})
    config = SAEConfig(
        d_in=folded.d_in,
        d_sae=folded.d_sae,
        kind="relu" if folded.k is None else "topk",
        k=folded.k,
        encoder=encoder,
        unnormalised=unnormalised,
        soft_cap=soft_cap,
    )
    sae = SAE(config, standardizer or nothing)
    state = {name: getattr(folded, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if folded.threshold is not None:
        sae.thresholds = folded.threshold
        sae.threshold_table = torch.zeros(0, folded.d_sae)
        sae.threshold_table_l0 = torch.zeros(0, dtype=torch.float64)
    sae.load_state_dict(state, strict=False)
    return sae.eval()
