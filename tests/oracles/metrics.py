"""The metrics as the formulas read, in numpy float64, with loops. Source of each definition: method.md section 3."""

import numpy as np


def fvu(x, x_hat):
    """Pooled: summed squared error over the summed squared distance from the mean row."""
    mean = sum(x) / len(x)
    return sum(((a - b) ** 2).sum() for a, b in zip(x, x_hat, strict=True)) / sum(((a - mean) ** 2).sum() for a in x)


def fvu_per_sample(x, x_hat):
    return np.array([np.sum((a - b) ** 2) / np.sum(a**2) for a, b in zip(x, x_hat, strict=True)])


def fvu_authors(x, x_hat):
    """The released code's: variance over the features of each row, numpy's variance."""
    return np.array([np.var(a - b) / np.var(a) for a, b in zip(x, x_hat, strict=True)])


def cosine(x, x_hat):
    return np.array([a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)) for a, b in zip(x, x_hat, strict=True)])


def mae(x, x_hat):
    return np.mean(np.abs(x - x_hat)) / np.mean(np.abs(x))


def sparsity(z):
    return np.array([sum(v == 0 for v in row) / len(row) for row in z])


def dead(z):
    return sum(all(row[j] == 0 for row in z) for j in range(z.shape[1]))


def keep_strongest(z, k):
    """Zero but for the k largest of each row, ties to the smallest index."""
    out = np.zeros_like(z)
    for i, row in enumerate(z):
        kept = np.argsort(-row, kind="stable")[:k]
        out[i, kept] = row[kept]
    return out


def decoder_orthogonality(W_dec):
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    n = len(rows)
    return sum((rows[i] @ rows[j]) ** 2 for i in range(n) for j in range(n) if i != j) / n**2


def max_decoder_cosine(W_dec):
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    n = len(rows)
    return np.mean([max(abs(rows[i] @ rows[j]) for j in range(n) if j != i) for i in range(n)])


def hsic_unbiased(K, L):
    """Song et al. 2012, JMLR 13, eq. 5, with its dense products."""
    m = len(K)
    K, L = K.copy(), L.copy()
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    ones = np.ones(m)
    total = np.trace(K @ L) + (ones @ K @ ones) * (ones @ L @ ones) / ((m - 1) * (m - 2))
    return (total - 2 / (m - 2) * (ones @ K @ L @ ones)) / (m * (m - 3))


def cknna(x, z, k=10):
    """Huh et al. 2024, arXiv:2405.07987, as in its released code: dense kernels, dense masks, dense HSIC."""
    K, L = x @ x.T, z @ z.T

    def mask(kernel):
        out = np.zeros_like(kernel)
        for i, row in enumerate(kernel):
            order = [j for j in np.argsort(-row, kind="stable") if j != i]
            out[i, order[:k]] = 1
        return out

    mask_K, mask_L = mask(K), mask(L)
    both = mask_K * mask_L
    cross = hsic_unbiased(both * K, both * L)
    return cross / np.sqrt(hsic_unbiased(mask_K * K, mask_K * K) * hsic_unbiased(mask_L * L, mask_L * L))


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def probe_kl(logits, logits_hat):
    """sum_c p_c log(p_c / p_hat_c) in nats."""
    p, q = softmax(logits), softmax(logits_hat)
    return np.array([sum(a * np.log(a / b) for a, b in zip(r, s, strict=True)) for r, s in zip(p, q, strict=True)])


def f1_of_firing(fires, is_class):
    """2 TP / (2 TP + FP + FN), counted row by row."""
    pairs = list(zip(fires, is_class, strict=True))
    hits, false, missed = (sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1)))
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0


def class_f1(z_train, labels_train, z, labels):
    """Mean over shared classes of the F1 on (z, labels) of the latent that fits the class best in training."""
    scores = []
    for name in sorted(set(labels_train) & set(labels)):
        in_training = [f1_of_firing(latent > 0, np.array(labels_train) == name) for latent in z_train.T]
        best = int(np.argmax(in_training))
        scores.append(f1_of_firing(z[:, best] > 0, np.array(labels) == name) if in_training[best] > 0 else 0.0)
    return np.mean(scores)
