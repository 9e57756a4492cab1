"""The losses as the formulas read, in float64 and with loops. Source: method.md section 1; arXiv:2502.20578."""

import torch


def topk_rows(h, k):
    """Keeps the k largest of each row by sorting, then the positive part."""
    out = torch.zeros_like(h)
    for i, row in enumerate(h):
        keep = torch.argsort(row, descending=True)[:k]
        out[i, keep] = torch.clamp(row[keep], min=0)
    return out


def matryoshka(x, W_enc, b_enc, W_dec, b_dec, levels, weights, soft_cap=None):
    """sum_i alpha_i ||x - x_hat_i||^2 / sum_i alpha_i, per element, with z_i = ReLU(TopK_k_i(h)) for each level."""
    x, W_enc, b_enc, W_dec, b_dec = (t.double() for t in (x, W_enc, b_enc, W_dec, b_dec))
    h = (x - b_dec) @ W_enc + b_enc
    total = 0.0
    for k, alpha in zip(levels, weights, strict=True):
        z = topk_rows(h, k)
        if soft_cap is not None:
            z = soft_cap * torch.tanh(z / soft_cap)
        total = total + alpha * ((x - (z @ W_dec + b_dec)) ** 2).sum() / x.numel()
    return total / sum(weights)


def relu_l1(x, W_enc, b_enc, W_dec, b_dec, l1):
    """Squared error per element plus l1 times the mean over rows of sum(z) / ||x||."""
    x, W_enc, b_enc, W_dec, b_dec = (t.double() for t in (x, W_enc, b_enc, W_dec, b_dec))
    z = torch.clamp((x - b_dec) @ W_enc + b_enc, min=0)
    penalty = sum(z[i].sum() / torch.sqrt((x[i] ** 2).sum()) for i in range(len(x))) / len(x)
    return ((x - (z @ W_dec + b_dec)) ** 2).sum() / x.numel() + l1 * penalty


def batchtopk(x, W_enc, b_enc, W_dec, b_dec, k):
    """The n * k largest pre-activations of the whole batch, by sorting all of them."""
    x, W_enc, b_enc, W_dec, b_dec = (t.double() for t in (x, W_enc, b_enc, W_dec, b_dec))
    h = (x - b_dec) @ W_enc + b_enc
    border = torch.sort(h.flatten(), descending=True).values[len(x) * k - 1]
    z = torch.where(h >= border, torch.clamp(h, min=0), torch.zeros_like(h))
    return ((x - (z @ W_dec + b_dec)) ** 2).sum() / x.numel()
