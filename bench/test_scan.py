"""Exact search against faiss, torch and numpy, on tables larger than the last-level cache."""

import numpy as np
import pytest

import polyvec as pv
import ranking


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def faiss_index(threads, vectors, metric="ip"):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(threads)
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(vectors.shape[1])
    index.add(vectors)
    return index


def best_scores(expected):
    return lambda result: np.testing.assert_allclose(np.asarray(result[0]), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("k", [10, 1000, 4096])
@pytest.mark.parametrize("nq", [1, 4, 1000])
def test_topk(compare, rng, threads, nq, k):
    torch = pytest.importorskip("torch")
    queries, items = sample(rng, nq, 384), sample(rng, 50_000, 384)
    index = faiss_index(threads, items)
    tq, ti = torch.from_numpy(queries), torch.from_numpy(items)
    out = np.empty((nq, k), np.float32), np.empty((nq, k), np.int64)
    compare(
        lambda: pv.scan.topk(queries, items, k, out=out),
        {"faiss": lambda: index.search(queries, k), "torch": lambda: (tq @ ti.T).topk(k)},
        check=best_scores(-np.sort(-(queries @ items.T), axis=1)[:, :k]),
        flops=2 * nq * items.size,
        bytes=items.nbytes,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("nq", [1, 1000])
def test_topk_of_narrow_items(compare, rng, nq, dtype):
    """Beside float32 items: memory is the limit of one query, the arithmetic of many."""
    torch = pytest.importorskip("torch")
    queries, items = torch.from_numpy(sample(rng, nq, 384)), torch.from_numpy(sample(rng, 115_000, 384))
    scale = 24 if dtype == "int8" else 1
    narrow = (items * scale).round().clamp(-127, 127).to(torch.int8) if dtype == "int8" else items.bfloat16()
    narrow = items.half() if dtype == "float16" else narrow
    scales = torch.full((len(items),), 1 / scale) if dtype == "int8" else None
    expected = pv.scan.topk(queries, items, 10)[0]
    compare(
        lambda: pv.scan.topk(queries, narrow, 10, scales=scales),
        {"our float32": lambda: pv.scan.topk(queries, items, 10)},
        check=lambda result: np.testing.assert_allclose(result[0], expected, rtol=0.02, atol=0.02),
        flops=2 * nq * items.numel(),
        bytes=narrow.numel() * narrow.element_size(),
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("nq", "tokens"), [(1, 8), (1, 64), (16, 8)])
def test_topk_of_block_sparse_queries(compare, benchmark, data, nq, tokens, dtype):
    """Encodings of Cranfield, 20,480 wide, beside the same queries as dense ones.

    A share p of the blocks costs p of the arithmetic. From memory it costs more of the reading: a block of 16 float32
    is one line, which comes with its neighbour, and one of int8 is a quarter of a line.
    """
    docs, queries, _ = ranking.read(data / "cranfield")
    encoder = pv.fde.Encoder(128, simhash_bits=6)
    items, scales = encoder.encode_docs(docs, dtype=dtype), None
    if dtype == "int8":
        items, scales = items
    queries = [query[:tokens] for query in queries.take(range(nq))]
    sparse, dense = encoder.encode_queries(queries, sparse=True), encoder.encode_queries(queries)
    benchmark.extra_info["share of blocks"] = sparse.values.size / dense.size
    compare(
        lambda: pv.scan.topk(sparse, items, 10, scales=scales),
        {"dense queries": lambda: pv.scan.topk(dense, items, 10, scales=scales)},
        check=best_scores(pv.scan.topk(dense, items, 10, scales=scales)[0]),
        flops=2 * sparse.values.size * len(items),
        bytes=items.nbytes,
    )


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(100_000, 256, 8), (100_000, 256, 32), (20_000, 1024, 384)],
    ids=["subspace-8", "subspace-32", "k-means-384"],
)
def test_nearest(compare, rng, threads, n, k, d):
    torch = pytest.importorskip("torch")
    x, centroids = sample(rng, n, d), sample(rng, k, d)
    index = faiss_index(threads, centroids, "l2")
    tx, tc = torch.from_numpy(x), torch.from_numpy(centroids)
    out = np.empty(n, np.int64), np.empty(n, np.float32)

    def in_torch():
        distances, ids = zip(*(torch.cdist(part, tc).min(1) for part in tx.split(10_000)), strict=True)
        return torch.cat(ids), torch.cat(distances).square()

    def in_faiss():
        distances, ids = index.search(x, 1)
        return ids[:, 0], distances[:, 0]

    expected = in_torch()[1]
    compare(
        lambda: pv.scan.nearest(x, centroids, out=out),
        {"faiss": in_faiss, "torch": in_torch},
        check=lambda result: np.testing.assert_allclose(np.asarray(result[1]), expected, rtol=1e-3, atol=1e-3),
        flops=2 * n * k * d,
    )


def test_rank(compare, rng):
    """256 queries at the size of WN18RR."""
    torch = pytest.importorskip("torch")
    n, nq = 40_943, 256
    queries, items, targets = sample(rng, nq, 512), sample(rng, n, 512), rng.integers(0, n, nq)
    lengths = rng.integers(0, 30, nq)
    offsets, known = np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, n, lengths.sum())
    rows = np.repeat(np.arange(nq), lengths)
    arrays = [torch.from_numpy(a) for a in (queries, items, targets, rows, known)]

    def in_numpy():
        scores = queries @ items.T
        target = scores[np.arange(nq), targets][:, None]
        scores[rows, known] = -np.inf
        scores[np.arange(nq), targets] = target[:, 0]
        return (scores > target).sum(1) + ((scores == target).sum(1) + 1) / 2

    def in_torch():
        q, x, t, r, c = arrays
        scores = q @ x.T
        target = scores.gather(1, t[:, None])
        scores[r, c] = -torch.inf
        scores.scatter_(1, t[:, None], target)
        return (scores > target).sum(1) + ((scores == target).sum(1) + 1) / 2

    expected = in_numpy()
    compare(
        lambda: pv.scan.rank(queries, items, targets, known=(offsets, known)),
        {"numpy": in_numpy, "torch": in_torch},
        check=lambda result: np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=2),
        flops=2 * nq * items.size,
    )


def test_score_pairs(compare, rng):
    """256 sampled negatives a query."""
    torch = pytest.importorskip("torch")
    queries, items, ids = sample(rng, 512, 512), sample(rng, 40_943, 512), rng.integers(0, 40_943, (512, 256))
    tq, ti, tids = (torch.from_numpy(a) for a in (queries, items, ids))
    expected = np.take_along_axis(queries @ items.T, ids, 1)
    compare(
        lambda: pv.scan.score_pairs(queries, items, ids),
        {
            "torch gather": lambda: torch.einsum("nmd,nd->nm", ti[tids], tq),
            "torch product": lambda: (tq @ ti.T).gather(1, tids),
        },
        check=lambda result: np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-3),
        flops=2 * ids.size * 512,
        bytes=4 * ids.size * 512,
    )


@pytest.mark.parametrize("nq", [1, 1000])
def test_logsumexp(compare, rng, nq):
    """A softmax over all items; the rival stores its scores, 200 MB for 1000 queries."""
    torch = pytest.importorskip("torch")
    queries, items = (torch.from_numpy(sample(rng, n, 384)) for n in (nq, 50_000))
    expected = (0.1 * queries @ items.T).logsumexp(1)
    compare(
        lambda: pv.scan.logsumexp(queries, items, scale=0.1),
        {"torch": lambda: (0.1 * queries @ items.T).logsumexp(1)},
        check=lambda result: np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4),
        flops=2 * nq * items.numel(),
        bytes=4 * items.numel(),
    )


@pytest.mark.parametrize("nq", [1, 1000])
def test_hinge(compare, rng, nq):
    """All items but one as negatives; the rival stores its scores, 200 MB for 1000 queries."""
    torch = pytest.importorskip("torch")
    queries, items = (torch.from_numpy(sample(rng, n, 384)) for n in (nq, 50_000))
    targets = torch.from_numpy(rng.integers(0, 50_000, nq))

    def in_torch():
        scores = queries @ items.T
        terms = (1 + scores - scores.gather(1, targets[:, None])).clamp(min=0)
        return terms.sum(1) - 1  # the target's own term is the margin

    expected = in_torch()
    compare(
        lambda: pv.scan.hinge(queries, items, targets),
        {"torch": in_torch},
        check=lambda result: np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1),
        flops=2 * nq * items.numel(),
        bytes=4 * items.numel(),
    )
