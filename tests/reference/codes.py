"""Definitions in float64: the bytes of integer codes, what they stand for, scalar quantisation and RaBitQ."""

import numpy as np


def unpack(codes, d, bits):
    """(n, d) numbers of the planes at the beginning of codes."""
    numbers, at = np.zeros((len(codes), d), np.int64), 0
    for w in (8, 4, 2, 1):
        if not bits & w:
            continue
        size = -(-d * w // 8)
        for begin in range(0, size, 64):
            count = min(64, size - begin)
            for k in range(8 // w):
                first = begin * 8 // w + k * count
                n = max(0, min(count, d - first))
                field = codes[:, at + begin : at + begin + n] >> (k * w) & (2**w - 1)
                numbers[:, first : first + n] += field.astype(np.int64) << (bits & (w - 1))
        at += size
    return numbers


def scalar(x, mid, step, bits):
    """(n, d) numbers: the nearest of mid + step * (c - (2^bits - 1) / 2)."""
    half = (2**bits - 1) / 2
    position = np.divide(x - np.float64(mid), step, out=np.zeros(x.shape), where=np.broadcast_to(step, x.shape) > 0)
    return np.clip(np.floor(position + half + 0.5), 0, 2 * half).astype(np.int64)


def rotation(signs):
    """(d, d): the matrix R of a fast rotation; the rows of x @ R.T are rotated."""
    d = signs.shape[1]
    power = 1 << (d.bit_length() - 1)
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    whole = np.eye(d)
    for k, row in enumerate(np.float64(signs)):
        step = np.eye(d)
        part = slice(0, power) if k % 2 == 0 else slice(d - power, d)
        step[part, part] = hadamard
        whole = step @ (row[:, None] * whole)
    return whole


def best_cosine(x, bits):
    """The largest cosine of x with a grid point c - (2^bits - 1) / 2, over all scales at which a level changes."""
    magnitudes, top = np.abs(np.float64(x)), 2 ** (bits - 1) - 1
    positive = magnitudes[magnitudes > 0]
    scales = np.concatenate([np.arange(1, top + 1)[:, None] / positive, [0 * positive]]).ravel()
    best = 0
    for scale in np.unique(scales):
        levels = np.minimum(np.floor(scale * (1 + 1e-12) * magnitudes), top) + 0.5
        best = max(best, magnitudes @ levels / np.linalg.norm(levels))
    return best / np.linalg.norm(magnitudes)
