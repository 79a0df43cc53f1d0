"""Definitions in float64: the whole score matrix, sorted or counted."""

import numpy as np


def scores(queries, items, metric="ip", bias=None):
    """Score of every pair; for "l2" lower is better."""
    q, x = np.asarray(queries, np.float64), np.asarray(items, np.float64)
    bias = np.zeros(len(x)) if bias is None else np.asarray(bias, np.float64)
    if metric == "l2":
        return np.array([((row - x) ** 2).sum(1) for row in q]).reshape(len(q), len(x)) - bias
    if metric == "cosine":
        size = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
        return np.divide(q @ x.T, size, out=np.zeros(size.shape), where=size > 0) + bias
    return q @ x.T + bias


def decoded(items, scales=None):
    """What stored items stand for; uint16 holds the bits of bfloat16."""
    if items.dtype == np.uint16:
        return (items.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return items.astype(np.float64) * (1 if scales is None else np.asarray(scales, np.float64)[:, None])


def rounded(queries, dtype):
    """Queries as they meet items of this dtype."""
    queries = np.ascontiguousarray(queries, np.float32)
    if dtype == np.uint16:
        bits = queries.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)
    if dtype == np.int8:
        largest = np.abs(queries).max(1, initial=0, keepdims=True)
        steps = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        return np.rint(queries * steps).astype(np.float64) * largest / 127
    return queries.astype(np.float64)


def lists(pair, n):
    """The id list of each query."""
    offsets, ids = pair
    return [np.asarray(ids)[offsets[i] : offsets[i + 1]] for i in range(n)]


def topk(queries, items, k, metric="ip", bias=None, exclude=None):
    """Scores and ids, best first, equal scores by smaller id, padded."""
    sign = -1 if metric == "l2" else 1
    value = sign * scores(queries, items, metric, bias)
    if exclude is not None:
        for row, ids in zip(value, lists(exclude, len(value)), strict=True):
            row[ids] = -np.inf
    order = np.argsort(-value, axis=1, kind="stable")[:, :k]
    best = np.full((len(value), k), -np.inf)
    best[:, : order.shape[1]] = np.take_along_axis(value, order, 1)
    ids = np.full((len(value), k), -1)
    ids[:, : order.shape[1]] = order
    return sign * best, np.where(best == -np.inf, -1, ids)


def nearest(x, centroids, metric="l2"):
    """Ids and distances (or similarities)."""
    value = scores(x, centroids, metric)
    ids = value.argmin(1) if metric == "l2" else value.argmax(1)
    return ids, np.take_along_axis(value, ids[:, None], 1)[:, 0]


def rank(queries, items, targets, metric="ip", bias=None, known=None, ties="realistic"):
    """One rank a query, by counting."""
    value = (-1 if metric == "l2" else 1) * scores(queries, items, metric, bias)
    ranks = []
    for i, target in enumerate(targets):
        counts = np.ones(len(items), bool)
        if known is not None:
            counts[lists(known, len(value))[i]] = False
        counts[target] = True
        above = (value[i, counts] > value[i, target]).sum()
        same = (value[i, counts] == value[i, target]).sum()
        ranks.append({"optimistic": above + 1, "pessimistic": above + same, "realistic": above + (1 + same) / 2}[ties])
    return np.array(ranks, np.float64)


def score_pairs(queries, items, ids, metric="ip", bias=None):
    """The chosen entries of the score matrix."""
    return np.take_along_axis(scores(queries, items, metric, bias), np.asarray(ids), 1)


def logsumexp(queries, items, scale=1, metric="ip", bias=None, exclude=None):
    """One number a query; the score of "l2" is minus the distance."""
    value = scale * (-1 if metric == "l2" else 1) * scores(queries, items, metric, bias)
    if exclude is not None:
        for row, ids in zip(value, lists(exclude, len(value)), strict=True):
            row[ids] = -np.inf
    return np.logaddexp.reduce(value, axis=1)


def logsumexp_gradients(queries, items, grad, scale=1, metric="ip", bias=None):
    """Of queries, items and bias, for that of each result; cosines of no zero vector."""
    q, x = np.asarray(queries, np.float64), np.asarray(items, np.float64)
    value = scale * (-1 if metric == "l2" else 1) * scores(q, x, metric, bias)
    p = scale * np.asarray(grad, np.float64)[:, None] * np.exp(value - np.logaddexp.reduce(value, axis=1)[:, None])
    if metric == "l2":
        return 2 * (p @ x - p.sum(1)[:, None] * q), 2 * (p.T @ q - p.sum(0)[:, None] * x), p.sum(0)
    if metric == "cosine":
        sizes = [np.linalg.norm(y, axis=1, keepdims=True) for y in (q, x)]
        q, x = (y / size for y, size in zip((q, x), sizes, strict=True))
        pairs = zip((p @ x, p.T @ q), (q, x), sizes, strict=True)
        return *((g - (g * y).sum(1, keepdims=True) * y) / size for g, y, size in pairs), p.sum(0)
    return p @ x, p.T @ q, p.sum(0)


def hinge(queries, items, targets, margin=1, metric="ip", bias=None, known=None):
    """One number a query; the score of "l2" is minus the distance."""
    value = (-1 if metric == "l2" else 1) * scores(queries, items, metric, bias)
    rows = np.arange(len(value))
    terms = np.maximum(0, margin - value[rows, targets][:, None] + value)
    terms[rows, targets] = 0
    if known is not None:
        for row, ids in zip(terms, lists(known, len(value)), strict=True):
            row[ids] = 0
    return terms.sum(1)
