"""Definitions in float64: k-means of one set from evenly spaced rows, and Ward's method by its criterion."""

import numpy as np


def kmeans(x, k, iterations):
    """Return labels and inertia of Lloyd's iterations; an empty cluster takes the farthest row of a larger one."""
    x = np.float64(x)
    means = x[np.arange(k) * len(x) // k]
    for _ in range(iterations + 1):
        losses = np.square(x[:, None] - means).sum(2)
        labels, losses = losses.argmin(1), losses.min(1)
        for c in range(k):
            if c not in labels:
                farthest = np.where(np.bincount(labels)[labels] > 1, losses, -1).argmax()
                labels[farthest], losses[farthest] = c, 0
        means = np.stack([x[labels == c].mean(0) for c in range(k)])
    return labels, np.square(x - means[labels]).sum()


def ward(x, k):
    """Return labels: the two clusters whose union raises the inertia least are joined until k are left."""
    x, clusters = np.float64(x), [[i] for i in range(len(x))]

    def rise(a, b):
        gap = x[a].mean(0) - x[b].mean(0)
        return len(a) * len(b) / (len(a) + len(b)) * gap @ gap

    while len(clusters) > k:
        pairs = [(rise(a, b), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters[:i])]
        _, i, j = min(pairs)
        clusters[j] += clusters.pop(i)
    labels = np.empty(len(x), np.int64)
    for c, rows in enumerate(sorted(clusters, key=min)):
        labels[rows] = c
    return labels
