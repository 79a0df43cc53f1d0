"""Definitions in float64: residual quantisation with a beam, and the bytes of its codes."""

import numpy as np

from reference import quantize


def beam_search(x, codebooks, beam):
    """Return labels (n, beam, m) of the sums that a beam search ends with, and their losses (n, beam), best first."""
    x = np.asarray(x, np.float64)
    labels, sums = np.zeros((len(x), 1, 0), np.int64), np.zeros((len(x), 1, x.shape[1]))
    for book in np.asarray(codebooks, np.float64):
        extended = sums[:, :, None] + book
        losses = ((x[:, None, None] - extended) ** 2).sum(-1).reshape(len(x), sums.shape[1] * len(book))
        best = np.argsort(losses, axis=1, kind="stable")[:, :beam]
        sum_ids, codewords = np.divmod(best, len(book))
        labels = np.concatenate([np.take_along_axis(labels, sum_ids[..., None], 1), codewords[..., None]], 2)
        sums = np.take_along_axis(extended.reshape(*losses.shape, x.shape[1]), best[..., None], 1)
    return labels, ((x[:, None] - sums) ** 2).sum(-1)


def decode(labels, codebooks):
    """Return the sums of the codewords of (n, m) labels."""
    return sum(book[label] for book, label in zip(np.float64(codebooks), np.transpose(labels), strict=True))


def norm_digits(decoded, codebooks, bits):
    """Return (n, 24 / bits): |decoded|^2 in 2^24 - 1 steps of what codebooks can reach, the lowest digit first."""
    reach = np.linalg.norm(np.float64(codebooks), axis=2).max(1).sum() ** 2
    numbers = np.rint((np.float64(decoded) ** 2).sum(1) / reach * (2**24 - 1)).astype(np.int64)
    return np.stack([numbers >> shift & (2**bits - 1) for shift in range(0, 24, bits)], 1)


def encode(x, codebooks, beam, bits, metric):
    """(n, code_size) uint8."""
    labels = beam_search(x, codebooks, beam)[0][:, 0]
    if metric == "l2":
        labels = np.concatenate([labels, norm_digits(decode(labels, codebooks), codebooks, bits)], 1)
    return quantize.pack(labels, bits)
