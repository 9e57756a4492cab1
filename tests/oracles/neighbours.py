"""Nearest neighbours by brute force, in float64."""

import numpy as np


def cosines(rows, query):
    """Of every row with the query; 0 for a row of zeros."""
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return np.divide(rows @ query, lengths, out=np.zeros(len(rows)), where=lengths > 0)


def nearest(rows, query, n, keep=None):
    """Row numbers and cosines of the n nearest, the nearest first, of equal ones the lower row."""
    scores = cosines(rows, query)
    allowed = np.arange(len(rows)) if keep is None else np.flatnonzero(keep)
    order = allowed[np.lexsort((allowed, -scores[allowed]))][:n]
    return order, scores[order]
