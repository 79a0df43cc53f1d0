"""Definitions in float64: one iteration of k-means, D^2 sampling, and product quantisation by its formula."""

import itertools

import numpy as np

from reference import scan


def losses(x, centroids, metric="l2"):
    """(n, k): what an assignment minimises."""
    if metric == "l2":
        return scan.scores(x, centroids, "l2")
    cosines = scan.scores(x, centroids, "cosine")
    return (
        1 - cosines
        if metric == "cosine"
        else np.linalg.norm(np.asarray(x, np.float64), axis=1)[:, None] * (1 - cosines)
    )


def kmeans_step(x, centroids, metric="l2"):
    """Return labels, inertia and the updated centroids."""
    table = losses(x, centroids, metric)
    labels = table.argmin(1)
    loss = table[np.arange(len(x)), labels]
    members = np.asarray(_unit(x) if metric == "cosine" else x, np.float64)
    updated = np.array(centroids, np.float64)
    farthest = iter(np.argsort(-loss, kind="stable"))
    for c in range(len(centroids)):
        if (labels == c).any():
            mean = members[labels == c].mean(0)
            if metric == "l2" or mean.any():  # rows without a direction leave it where it is
                updated[c] = mean
        else:
            row = next(farthest)
            updated[c] = x[row] if loss[row] > 0 else centroids[c]
    return labels, loss.sum(), updated if metric == "l2" else _unit(updated)


def kmeans(x, centroids, iterations):
    """Return centroids and inertia after so many iterations of l2."""
    for _ in range(iterations):
        _, _, centroids = kmeans_step(x, centroids)
    return centroids, kmeans_step(x, centroids)[1]


def kmeans_batches(batches, centroids):
    """Return the centroids of mini-batch k-means (Sculley 2010, algorithm 1): each a running mean of its rows."""
    centroids, counts = np.array(centroids, np.float64), np.zeros(len(centroids))
    for batch in batches:
        labels = losses(batch, centroids).argmin(1)
        for x, label in zip(batch, labels, strict=True):
            counts[label] += 1
            centroids[label] += (x - centroids[label]) / counts[label]
    return centroids


def silhouette(x, centroids):
    """Mean over rows of (b - a) / b: a, b the distances from the nearest and the next centroid."""
    distances = np.sort(np.sqrt(losses(x, centroids)), 1)
    return ((distances[:, 1] - distances[:, 0]) / distances[:, 1]).mean()


def seeding_probabilities(x, k):
    """Return {rows drawn, in order: probability} of D^2 sampling of k rows."""
    gaps = losses(x, x)
    probabilities = {}
    for rows in itertools.permutations(range(len(x)), k):
        p = 1 / len(x)
        for j in range(1, k):
            gap = gaps[:, rows[:j]].min(1)
            p *= gap[rows[j]] / gap.sum()
        probabilities[rows] = p
    return probabilities


def encode(x, codebooks):
    """(n, m): the nearest codeword of each subspace, the first of equals."""
    return np.stack(
        [losses(piece, book).argmin(1) for piece, book in zip(_cut(x, codebooks), codebooks, strict=True)], 1
    )


def decode(labels, codebooks):
    """Return the codewords of (n, m) labels, one after the other."""
    return np.concatenate([book[label] for book, label in zip(codebooks, np.transpose(labels), strict=True)], 1)


def pack(labels, bits):
    """Return the bytes of (n, m) labels: with 4 bits the even subspaces are the low nibbles."""
    if bits == 8:
        return labels.astype(np.uint8)
    if labels.shape[1] % 2:
        labels = np.pad(labels, ((0, 0), (0, 1)))
    return (labels[:, ::2] | labels[:, 1::2] << 4).astype(np.uint8)


def vq_linear(x, labels, codebooks):
    """Products of x with the vectors that labels stand for, and the sums of absolute products behind them."""
    weights = decode(labels, np.asarray(codebooks, np.float64))
    return np.float64(x) @ weights.T, np.abs(np.float64(x)) @ np.abs(weights).T


def anisotropic_weight(dim, threshold):
    """h - 1: what the part of an error along its vector counts beyond the rest."""
    return max(0.0, (dim - 1) * threshold**2 / (1 - threshold**2) - 1)


def anisotropic_losses(x, decoded, weight):
    """(n,): |x - y|^2 + weight <x, x - y>^2 / |x|^2."""
    x, error = np.asarray(x, np.float64), np.asarray(x, np.float64) - decoded
    squares = (x * x).sum(1)
    along = (x * error).sum(1) ** 2
    return (error * error).sum(1) + weight * np.divide(along, squares, out=np.zeros_like(along), where=squares > 0)


def improve(x, codebooks, labels, weight):
    """Return labels (n, m) after one pass of coordinate descent on the anisotropic losses."""
    labels = labels.copy()
    for s in range(len(codebooks)):
        losses = []
        for c in range(codebooks.shape[1]):
            labels[:, s] = c
            losses.append(anisotropic_losses(x, decode(labels, codebooks), weight))
        labels[:, s] = np.argmin(losses, 0)
    return labels


def _cut(x, codebooks):
    return np.asarray(x, np.float64).reshape(len(x), len(codebooks), codebooks.shape[-1]).transpose(1, 0, 2)


def _unit(x):
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
