"""Slow, obvious versions of what galleries and hierarchies compute: everything in memory, one latent at a time."""

import numpy as np


def top_rows(z, n):
    """Of each latent the rows with the n largest positive activations; of equal ones the lower row first."""
    rows = np.full((z.shape[1], n), -1, dtype=np.int64)
    for latent, column in enumerate(z.T):
        best = sorted(np.flatnonzero(column > 0).tolist(), key=lambda row: (-column[row], row))[:n]
        rows[latent, : len(best)] = best
    return rows


def level_profile(z, levels):
    """Of the rows in which a latent fires, the share in which fewer than k latents are stronger, for each k."""
    profile = np.zeros((z.shape[1], len(levels)))
    for latent in range(z.shape[1]):
        firing = [row for row in z if row[latent] > 0]
        for i, k in enumerate(levels):
            within = [(row > row[latent]).sum() < k for row in firing]
            profile[latent, i] = np.mean(within) if firing else 0.0
    return profile


def histogram(values, edges):
    """Counts of positive values, those outside counted in the outer bins."""
    inside = np.clip(values[values > 0], edges[0], np.nextafter(edges[-1], 0))
    return np.histogram(inside, edges)[0]


def edges(fires, *, min_share, min_lift, min_fired):
    """All (child, parent, rows together) by the definition, from pairs of columns."""
    n, d_sae = fires.shape
    found = set()
    for child in range(d_sae):
        for parent in range(d_sae):
            a, b = int(fires[:, child].sum()), int(fires[:, parent].sum())
            if a < max(min_fired, 1) or a >= b:
                continue
            both = int((fires[:, child] & fires[:, parent]).sum())
            p, z = both / a, 1.959963984540054
            low = (p + z * z / (2 * a) - z * np.sqrt(p * (1 - p) / a + z * z / (4 * a * a))) / (1 + z * z / a)
            if low >= min_share and low / (b / n) >= min_lift:
                found.add((child, parent, both))
    return found
