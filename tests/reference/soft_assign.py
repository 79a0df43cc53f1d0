"""Definitions in float64: every distance of every piece to every codeword, and the sums over them."""

import numpy as np


def soft_assign(x, codebooks, temperature, hard, grad=None):
    """Values (n, m, dsub), ids (n, m), probabilities; with `grad` (n, m, dsub) dx and dcodebooks, too."""
    x, codebooks = np.asarray(x, np.float64), np.asarray(codebooks, np.float64)
    m, k, dsub = codebooks.shape
    u = x.reshape(len(x), m, 1, dsub)
    distances = ((u - codebooks) ** 2).sum(-1)  # (n, m, k)
    ids = distances.argmin(-1)
    p = np.exp(-(distances - distances.min(-1, keepdims=True)) / temperature)
    p /= p.sum(-1, keepdims=True)
    weights = np.eye(k)[ids] if hard else p
    values = np.einsum("nmk,mkd->nmd", weights, codebooks)
    if grad is None:
        return values, ids
    dp = np.einsum("nmd,mkd->nmk", grad, codebooks)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / temperature
    dx = 2 * np.einsum("nmk,mkd->nmd", ds, codebooks)
    dcodebooks = np.einsum("nmk,nmd->mkd", weights, grad) + 2 * np.einsum("nmk,nmkd->mkd", ds, u - codebooks)
    return values, ids, dx, dcodebooks
