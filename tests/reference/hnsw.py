"""Nearest neighbours by comparing all, in float64; the codes of vectors in one byte an element."""

import numpy as np


def score(queries, vectors, metric):
    """(nq, n) inner products, cosines or squared distances."""
    queries, vectors = np.asarray(queries, np.float64), np.asarray(vectors, np.float64)
    if metric == "l2":
        return ((queries[:, None] - vectors) ** 2).sum(-1)
    if metric == "cosine":
        queries, vectors = unit(queries), unit(vectors)
    return queries @ vectors.T


def unit(x):
    """Rows over their norms; zero rows stay."""
    x = np.asarray(x, np.float64)
    n = np.sqrt((x**2).sum(-1, keepdims=True))
    return np.divide(x, n, out=np.zeros(x.shape), where=n > 0)


def search(queries, vectors, k, metric, ids=None):
    """The k best, best first; missing ones are id -1 and the worst score."""
    scores = score(queries, vectors, metric)
    sign = 1 if metric == "l2" else -1
    order = np.argsort(sign * scores, axis=1, kind="stable")[:, :k]
    best = np.full((len(queries), k), sign * np.inf)
    best[:, : order.shape[1]] = np.take_along_axis(scores, order, 1)
    names = np.full((len(queries), k), -1)
    names[:, : order.shape[1]] = order if ids is None else np.asarray(ids)[order]
    return best, names


def neighbors(x, k, metric):
    """The k nearest other rows of every row, and their distances: squared, or 1 - cosine."""
    distances = score(x, x, metric) if metric == "l2" else 1 - score(x, x, metric)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def link_ranks(links, ranks):
    """Links (n, width) after linking ranks (nq, k) of each query with the next, both ways, where there is room.

    The first ranks of all queries come first. No link is 2^32 - 1.
    """
    links = links.copy()
    for one, other in zip(ranks.T[:-1], ranks.T[1:], strict=True):
        for pair in zip(one, other, strict=True):
            for a, b in (pair, pair[::-1]):
                row = links[a]
                free = np.flatnonzero(row == 2**32 - 1)
                if len(free) and b not in row:
                    row[free[0]] = b
    return links


def recall(found, truth):
    """Share of the true ids that were found."""
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1]


def adaptive_walk(query, vectors, links, entry, k, margin):
    """The k nearest slots that adaptive beam search finds at the ground level, nearest first."""

    def distance(slots):
        return np.sqrt(((vectors[slots].astype(np.float64) - query) ** 2).sum(-1))

    found, followed = {entry: distance(entry)}, set()
    while True:
        ranks = sorted(found, key=lambda slot: (found[slot], slot))
        slot = next((slot for slot in ranks if slot not in followed), None)
        if slot is None or (len(ranks) >= k and found[slot] > (1 + margin) * found[ranks[k - 1]]):
            return ranks[:k]
        followed.add(slot)
        new = [link for link in links[slot] if link < len(vectors) and link not in found]
        found.update(zip(new, distance(new), strict=True))


def encode(x, bits=8):
    """Codes (n, width) of 8 or 4 bits in bytes, and the scales (n,), of rows (n, d) of float32.

    float32 operations, so that codes are exact: value = (code - bias) * scale, the largest of a row is bias - 1, and
    the bias is 128 or 8. Rows are padded with it to a multiple of 64 or 128.
    """
    bias, align = (128, 64) if bits == 8 else (8, 128)
    most, size = np.float32(bias - 1), np.abs(x).max(axis=1, keepdims=True)
    up = np.divide(most, size, out=np.zeros_like(size), where=size > 1e-36)
    codes = np.full((len(x), -(-x.shape[1] // align) * align), bias, np.uint8)
    codes[:, : x.shape[1]] = np.rint(x * up) + bias
    return codes, np.where(size > 1e-36, size / most, np.float32(0))[:, 0]


def unbiased_scales(x, codes, bits=8):
    """Scales (n,) that make products of codes (n, width) with their own vectors (n, d) exact; 0 for zero vectors."""
    x = x.astype(np.float64)
    products = (x * (codes[:, : x.shape[1]] - 2.0 ** (bits - 1))).sum(1)
    return np.divide((x**2).sum(1), products, out=np.zeros(len(x)), where=products > 0)


def pack_halves(codes):
    """Of each 128 codes of 4 bits (n, width), the first 64 in the low halves of 64 bytes, the others in the high."""
    low, high = np.moveaxis(codes.reshape(len(codes), -1, 2, 64), 2, 0)
    return (low | high << 4).reshape(len(codes), -1)


def rotate(rows, signs):
    """Rows (n, d) times `signs` (4, d) in turn, each time with Hadamard's matrix on the first or last 2^j elements."""
    rows = np.array(rows, np.float64)
    d = rows.shape[1]
    power = 1 << (d.bit_length() - 1)
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    for k, factors in enumerate(np.asarray(signs, np.float64)):
        rows *= factors
        part = slice(0, power) if k % 2 == 0 else slice(d - power, d)
        rows[:, part] = rows[:, part] @ matrix
    return rows


def frozen_bits(d):
    """Bits an element of a code, and whether all of it fits into a cache line with three floats."""
    fit = 52 // (-(-d // 32) * 4)
    return min(max(fit, 2), 4), fit >= 2


def frozen_codes(x, frame):
    """Levels (n, d), odd numbers around 0, scales (n,), and the rotated residuals that they stand for."""
    residuals = rotate(np.asarray(x, np.float64) - frame[0], frame[1:])
    squares = (residuals**2).sum(1)
    bits, _ = frozen_bits(x.shape[1])
    step = frozen_step(residuals)
    steps = np.divide(residuals, step, out=np.zeros_like(residuals), where=step > 0)
    levels = 2 * np.clip(np.ceil(steps), 1 - 2 ** (bits - 1), 2 ** (bits - 1)) - 1
    products = (levels * residuals).sum(1)
    return levels, np.divide(squares, products, out=np.zeros(len(x)), where=products > 0), residuals


def frozen_step(residuals):
    """Of levels, (n, 1): the least loss for normal elements of the residuals' size."""
    d = residuals.shape[1]
    return {2: 0.9957, 3: 0.5860, 4: 0.3352}[frozen_bits(d)[0]] * np.sqrt((residuals**2).sum(1) / d)[:, None]


def frozen_distances(queries, x, frame, metric):
    """What a walk over codes compares: (nq, n), lower is nearer."""
    levels, scales, residuals = frozen_codes(x, frame)
    decoded, centre = levels * scales[:, None], np.asarray(frame[0], np.float64)
    queries = np.asarray(queries, np.float64)
    if metric == "l2":
        rest = queries - centre
        squares = (rest**2).sum(1)[:, None] + (residuals**2).sum(1)
        return squares - 2 * rotate(rest, frame[1:]) @ decoded.T
    if metric == "cosine":
        queries = unit(queries)
    share = (queries @ centre / (centre @ centre))[:, None]
    along = (np.asarray(x, np.float64) - centre) @ centre
    return -(queries @ centre)[:, None] - share * along - rotate(queries - share * centre, frame[1:]) @ decoded.T
