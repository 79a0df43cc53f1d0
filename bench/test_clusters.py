"""k-means of many small sets: the tokens of 200 documents of Cranfield, 32 clusters each, 20 iterations at most."""

import numpy as np
import pytest

import polyvec as pv

K, ITERATIONS = 32, 20


@pytest.fixture(scope="module")
def docs(data):
    with np.load(data / "cranfield" / "tokens.npz") as file:
        values, offsets = file["doc_tokens"].astype(np.float32) * np.float32(file["scale"]), file["doc_offsets"]
    sets = pv.Ragged(values, offsets)
    return sets.take(np.flatnonzero(sets.lengths > K)[:200])


def starts(n):
    return np.arange(K) * n // K


def in_torch(torch, padded, mask, start):
    """All documents at once, padded; all iterations."""
    means = start
    for _ in range(ITERATIONS):
        gap = means.square().sum(2)[:, None] - 2 * padded @ means.transpose(1, 2)
        labels = torch.nn.functional.one_hot(gap.argmin(2), K).float() * mask[:, :, None]
        counts = labels.sum(1)[:, :, None]
        means = torch.where(counts > 0, labels.transpose(1, 2) @ padded / counts.clamp(min=1), means)
    gap = means.square().sum(2)[:, None] - 2 * padded @ means.transpose(1, 2)
    return float(((gap.amin(2) + padded.square().sum(2)) * mask).sum())


def test_kmeans_sets(compare, docs, threads):
    torch, cluster = pytest.importorskip("torch"), pytest.importorskip("sklearn.cluster")
    torch.set_num_threads(threads)
    longest = int(docs.lengths.max())
    padded, mask = torch.zeros(len(docs), longest, docs.dim), torch.zeros(len(docs), longest)
    for i, x in enumerate(docs):
        padded[i, : len(x)], mask[i, : len(x)] = torch.from_numpy(x), 1
    start = torch.stack([torch.from_numpy(x[starts(len(x))]) for x in docs])

    def in_sklearn():
        total = 0.0
        for x in docs:
            total += cluster.KMeans(K, init=x[starts(len(x))], n_init=1, max_iter=ITERATIONS, tol=0).fit(x).inertia_
        return total

    ours = pv.quantize.kmeans_sets(docs, K, max_iter=ITERATIONS).inertia.sum()
    compare(
        lambda: pv.quantize.kmeans_sets(docs, K, max_iter=ITERATIONS).inertia.sum(),
        {"scikit-learn": in_sklearn, "torch": lambda: in_torch(torch, padded, mask, start)},
        check=lambda inertia: ours <= 1.01 * inertia or pytest.fail(f"inertia {ours}, theirs {inertia}"),
        flops=2 * 8 * docs.values.size * K,
        budget=8.0,
    )
