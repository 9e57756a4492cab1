"""Slow and obvious concept edits, in numpy and float64, for one latent and one row.

Source: Zaigrajew et al. 2025, arXiv:2502.20578, "Nearest neighbor search with concept manipulation"; the poster
does not say whether the reconstruction error is added back: we add it.
"""

import numpy as np


def set_latent(x, mean, scale, W_enc, b_enc, W_dec, b_dec, latent, value, *, keep_residual=True):
    """The raw row `x` with one latent's activation set to `value`: encode, edit, decode, add the error, undo."""
    standard = (x.astype(np.float64) - mean) * scale
    z = np.maximum((standard - b_dec) @ W_enc + b_enc, 0)
    error = standard - (z @ W_dec + b_dec)
    z[latent] = value
    edited = z @ W_dec + b_dec + (error if keep_residual else 0)
    return edited / scale + mean
