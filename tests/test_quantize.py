"""k-means and product quantisation."""

import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from polyvec import _codec, _core, _files, _kmeans
from reference import quantize as ref
from reference import scan as ref_scan

METRICS = ["l2", "cosine", "ip"]
PQ = "quantize.ProductQuantizer"


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def whole(rng, *shape, size=3):
    """Whole numbers: every sum of products is exact, and many are equal."""
    return rng.integers(-size, size + 1, shape).astype(np.float32)


def blobs(rng, n, k, d):
    """Rows close to k centres far from each other."""
    centres = 40 * sample(rng, k, d)
    return (centres[rng.integers(0, k, n)] + sample(rng, n, d)).astype(np.float32)


def kmeans_step(x, centroids, metric="l2", num_threads=1):
    """Labels, inertia and updated centroids of (problems, n, d)."""
    labels, inertia = np.empty(x.shape[:2], np.int64), np.empty(len(x))
    updated = np.empty_like(centroids)
    _core.quantize_kmeans_step(x, centroids, labels, inertia, updated, metric, num_threads)
    return labels, inertia, updated


def quantizer(rng, m, dsub, bits, metric="ip", make=sample):
    """A quantizer with random codebooks."""
    pq = pv.quantize.ProductQuantizer(m * dsub, m, bits=bits, metric=metric)
    pq.codebooks = make(rng, m, 1 << bits, dsub)
    return pq


# k-means


@pytest.mark.parametrize("d", [0, 1, 3, 4, 7, 8, 9, 16, 17, 33, 67])
@pytest.mark.parametrize("k", [1, 2, 13, 40])
def test_a_step_is_exact_on_whole_numbers(rng, isa, k, d):
    x, centroids = whole(rng, 2, 131, d), whole(rng, 2, k, d)
    centroids[:, k // 2 :] += 100 * (k > 20)  # far from every row: these clusters are empty
    labels, inertia, updated = kmeans_step(x, centroids)
    for p in range(2):
        expected = ref.kmeans_step(x[p], centroids[p])
        assert_exact(labels[p], expected[0])
        assert inertia[p] == expected[1]
        assert_exact(updated[p], expected[2].astype(np.float32))


@pytest.mark.parametrize(("n", "k", "d"), [(401, 260, 67), (450, 128, 128), (300, 100, 261), (2200, 1100, 64)])
@pytest.mark.parametrize("shift", [0, 100])
def test_a_step_with_many_means_is_exact_on_whole_numbers(rng, isa, n, k, d, shift):
    x, centroids = whole(rng, 1, n, d) + shift, whole(rng, 1, k, d) + shift
    x[0, ::3] = centroids[0, rng.integers(0, k, len(x[0, ::3]))] + whole(rng, *x[0, ::3].shape, size=1)
    found = kmeans_step(x, centroids)
    expected = ref.kmeans_step(x[0], centroids[0])
    assert_exact(found[0][0], expected[0])
    assert found[1][0] == expected[1]
    assert_exact(found[2][0], expected[2].astype(np.float32))
    for ours, theirs in zip(kmeans_step(x, centroids, num_threads=3), found, strict=True):
        assert_exact(ours, theirs)


@pytest.mark.parametrize("scale", [1, 1e-20, 1e10])
def test_many_means_that_are_about_equally_far(rng, isa, scale):
    x = (sample(rng, 1, 300, 256) * 0.1 * scale).astype(np.float32)
    x[0, 7] = 0
    centroids = np.concatenate([np.eye(256), -np.eye(256)])[None].astype(np.float32) * np.float32(scale)
    labels, _, _ = kmeans_step(x, centroids)
    table = ref.losses(x[0] / np.float32(scale), centroids[0] / np.float32(scale))
    chosen = np.take_along_axis(table, labels[0][:, None], 1)[:, 0]
    assert_reduction(
        chosen.astype(np.float32), table.min(1), (1 + np.linalg.norm(x[0], axis=1).max() / scale) ** 2, length=256
    )


@pytest.mark.parametrize("size", [1e15, 1e25, 3e38])
def test_many_means_of_large_rows(rng, isa, size):
    x = rng.uniform(-size, size, (300, 64)).astype(np.float32)
    result = pv.quantize.kmeans(x, 256, init="random", max_iter=2)
    assert np.isin(result.labels, np.arange(256)).all()
    assert np.isfinite(result.centroids).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 5, 16, 35])
def test_a_step_equals_the_definition(rng, isa, metric, d):
    x, centroids = blobs(rng, 300, 7, d)[None], blobs(rng, 7, 7, d)[None]
    x[0, 5] = 0  # no direction
    labels, inertia, updated = kmeans_step(x, centroids, metric)
    size = (np.linalg.norm(x[0], axis=1).max() + np.linalg.norm(centroids[0], axis=1).max()) ** (metric != "cosine")
    table = ref.losses(x[0], centroids[0], metric)
    chosen = np.take_along_axis(table, labels[0][:, None], 1)[:, 0]
    assert_reduction(chosen.astype(np.float32), table.min(1), size ** (2 if metric == "l2" else 1), length=d)
    assert_reduction(inertia.astype(np.float32), [chosen.sum()], len(x[0]) * size ** (1 + (metric == "l2")), length=d)
    if (labels[0] == table.argmin(1)).all():
        expected = ref.kmeans_step(x[0], centroids[0], metric)[2]
        assert_reduction(updated[0], expected, np.abs(x).max() if metric == "l2" else 1.0, length=1)


def test_iterations_equal_the_definition(rng, isa):
    x = blobs(rng, 500, 9, 6)
    start = x[:9]
    result = pv.quantize.kmeans(x, 9, init=start, max_iter=6, tolerance=0)
    centroids, inertia = ref.kmeans(x, start, 6)
    assert_reduction(result.centroids, centroids, np.abs(x).max(), length=6)
    assert_reduction(np.float32(result.inertia), inertia, inertia, length=6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["k-means++", "random", "strided"])
def test_result_fits_together(rng, metric, init):
    x = sample(rng, 400, 10)
    result = pv.quantize.kmeans(x, 12, metric=metric, init=init, max_iter=300, tolerance=0)
    assert result.iterations < 300
    labels, inertia, updated = kmeans_step(x[None], result.centroids[None], metric)
    assert_exact(result.labels, labels[0])
    assert result.inertia == inertia[0]
    assert len(np.unique(labels)) == 12
    assert_reduction(result.centroids, updated[0], 1.0, length=10)  # a fixed point: each is the mean of its rows
    if metric != "l2":
        assert_reduction(np.linalg.norm(result.centroids, axis=1), np.ones(12), 1.0, length=10)


@pytest.mark.parametrize("metric", METRICS)
def test_inertia_never_rises(rng, metric):
    x = sample(rng, 300, 8)
    far = np.full((20, 8), 50, np.float32) + np.arange(20, dtype=np.float32)[:, None]  # but for one, without rows
    inertia = [
        pv.quantize.kmeans(x, 20, metric=metric, init=far, max_iter=n, tolerance=0).inertia for n in range(1, 12)
    ]
    assert_reduction(np.maximum.accumulate(np.float32(inertia[::-1])), inertia[::-1], inertia[0], length=1)


def test_as_many_centroids_as_rows(rng):
    x = sample(rng, 17, 3)
    result = pv.quantize.kmeans(x, 17)
    assert_exact(np.sort(result.centroids, axis=0), np.sort(x, axis=0))
    assert result.inertia == 0


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows(metric):
    result = pv.quantize.kmeans(np.full((50, 3), 2, np.float32), 5, metric=metric)
    assert result.inertia == pytest.approx(0, abs=1e-5)
    assert np.isfinite(result.centroids).all()


@pytest.mark.parametrize(("d", "least"), [(1, 1e50), (17, np.inf)])  # short rows are added up in float64
def test_squares_that_overflow(isa, d, least):
    x = np.repeat(np.array([[1e30], [-1e30], [1e25], [0]], np.float32), d, 1)
    result = pv.quantize.kmeans(x, 2)
    assert result.inertia >= least
    assert np.isfinite(result.centroids).all()


@pytest.mark.parametrize("k", [2, 3])
def test_seeds_are_drawn_by_squared_distance(k):
    """20,000 independent drawings against the probabilities of drawing one at a time, within 5 standard deviations."""
    x, n = np.array([[0, 0], [1, 0], [0, 3], [5, 5]], np.float32) + 1000, 20_000
    rows = np.empty((n, k), np.int64)
    _core.quantize_kmeans_seed(np.broadcast_to(x, (n, *x.shape)).copy(), rows, 1, "l2", 1)
    for expected, p in ref.seeding_probabilities(x, k).items():
        found = (rows == expected).all(1).mean()
        assert abs(found - p) <= 5 * np.sqrt(p * (1 - p) / n), expected


def test_seeds_of_the_spherical_metrics_ignore_lengths():
    x = np.array([[1, 0], [100, 0], [1, 0.01], [0, 1]], np.float32)
    rows = np.empty((500, 2), np.int64)
    _core.quantize_kmeans_seed(np.broadcast_to(x, (500, *x.shape)).copy(), rows, 1, "cosine", 1)
    assert ((rows == 3).any(1)).mean() > 0.98


def test_start_is_better_with_kmeans_plus_plus(rng):
    x = blobs(rng, 3000, 30, 8)  # more than 64 rows a centroid: a sample of them
    plain, plus = (pv.quantize.kmeans(x, 30, init=init, max_iter=1).inertia for init in ("random", "k-means++"))
    assert plus < plain / 2


def test_seed(rng):
    x = sample(rng, 900, 4)
    a, b, c = (pv.quantize.kmeans(x, 10, seed=seed, max_iter=2) for seed in (3, 3, 4))
    assert_exact(a.centroids, b.centroids)
    assert (np.asarray(a.centroids) != np.asarray(c.centroids)).any()


def test_progress(rng):
    x, seen = sample(rng, 900, 4), []
    result = pv.quantize.kmeans(x, 10, max_iter=3, tolerance=0, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.iterations == 3


# Batches, and the number of clusters


def test_batches_equal_the_definition(rng, isa):
    """With a start in every cluster: none is empty."""
    x = blobs(rng, 900, 7, 6)
    start, draw = pv.quantize.kmeans(x, 7).centroids + 1, np.random.default_rng(5)
    batches = [x[np.sort(draw.choice(900, 60, replace=False, shuffle=False))] for _ in range(8)]
    assert all(len(np.unique(ref.losses(batch, start).argmin(1))) == 7 for batch in batches)
    result = pv.quantize.kmeans(x, 7, init=start, max_iter=8, minibatch=60, seed=5)
    expected = ref.kmeans_batches(batches, start)
    assert_reduction(result.centroids, expected, np.abs(x).max(), length=60)
    assert_exact(result.labels, ref.losses(x, result.centroids).argmin(1))
    assert_reduction(np.float32(result.inertia), ref.losses(x, result.centroids).min(1).sum(), result.inertia, length=6)
    assert result.iterations == 8


@pytest.mark.parametrize("init", ["k-means++", "random", "strided"])
def test_batches_come_close_to_all_rows(rng, init):
    x = sample(rng, 6000, 8)
    full = pv.quantize.kmeans(x, 20, init=init)
    part = pv.quantize.kmeans(x, 20, init=init, minibatch=500, max_iter=60)
    assert part.inertia < 1.03 * full.inertia
    again, other = (pv.quantize.kmeans(x, 20, init=init, minibatch=500, max_iter=60, seed=s) for s in (0, 1))
    assert_exact(again.centroids, part.centroids)
    if init != "strided":
        assert (other.centroids != part.centroids).any()


def test_a_batch_moves_centroids_without_rows(rng):
    x = blobs(rng, 500, 5, 4)
    start = np.concatenate([x[:1], np.full((4, 4), 1e4, np.float32)])
    result = pv.quantize.kmeans(x, 5, init=start, minibatch=200, max_iter=20)
    assert len(np.unique(result.labels)) == 5


def test_a_batch_larger_than_x_is_all_of_it(rng):
    x = sample(rng, 50, 3)
    a, b = (pv.quantize.kmeans(x, 4, minibatch=size, max_iter=5) for size in (50, 500))
    assert_exact(a.centroids, b.centroids)


def test_batches_of_a_memory_map(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(_kmeans, "_BLOCK_ELEMENTS", 600)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1000, 6))
    x[:] = sample(rng, 1000, 6)
    seen = []
    result = pv.quantize.kmeans(
        x, 5, minibatch=100, max_iter=4, num_threads=2, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    same = pv.quantize.kmeans(np.array(x), 5, minibatch=100, max_iter=4, num_threads=1)
    assert_exact(result.centroids, same.centroids)
    assert_exact(result.labels, same.labels)
    torch = pytest.importorskip("torch")
    tensors = pv.quantize.kmeans(torch.from_numpy(np.array(x)), 5, minibatch=100, max_iter=4)
    assert type(tensors.centroids) is type(tensors.labels) is torch.Tensor
    assert_exact(tensors.labels, same.labels)
    x[777, 2] = np.inf
    with pytest.raises(ValueError, match="x must be finite, got NaN or Inf in row 777"):
        pv.quantize.kmeans(x, 5, minibatch=100, max_iter=4)


@pytest.mark.parametrize("criterion", ["elbow", "silhouette"])
def test_the_number_of_clusters_is_found(rng, criterion):
    centres = 40 * sample(rng, 6, 8)
    x = (centres[np.arange(300) % 6] + sample(rng, 300, 8)).astype(np.float32)
    found = pv.quantize.kmeans_select(x, range(2, 13), criterion=criterion)
    assert found.k == 6
    assert found.scores.shape == (11,)
    expected = pv.quantize.kmeans(x, 6)
    assert_exact(found.result.centroids, expected.centroids)
    if criterion == "elbow":
        assert found.scores[4] == expected.inertia
    else:
        value = ref.silhouette(x, expected.centroids)
        size = (np.abs(x).max() / np.sqrt(ref.losses(x, expected.centroids).min())) ** 2
        assert_reduction(np.float32(found.scores[4]), value, size, length=8)


# Product quantisation


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "dsub"), [(1, 1), (2, 3), (3, 4), (5, 8), (7, 17), (16, 2), (33, 1)])
def test_codes_are_exact_on_whole_numbers(rng, isa, bits, m, dsub):
    for n in (0, 1, 7, 8, 31, 32, 33, 130):
        pq = quantizer(rng, m, dsub, bits, make=whole)
        x = whole(rng, n, m * dsub)
        labels = ref.encode(x, pq.codebooks)
        codes = pq.encode(x)
        assert_exact(codes, ref.pack(labels, bits))
        assert_exact(pq.decode(codes), ref.decode(labels, pq.codebooks))


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_nearest_codewords(rng, isa, bits):
    pq = quantizer(rng, 6, 11, bits)
    x = sample(rng, 300, 66)
    loss = ((x - pq.decode(pq.encode(x)).astype(np.float64)) ** 2).sum(1)
    best = ((x - ref.decode(ref.encode(x, pq.codebooks), pq.codebooks).astype(np.float64)) ** 2).sum(1)
    assert_reduction(
        loss.astype(np.float32), best, (x**2).sum(1) + 4 * (pq.codebooks**2).sum(-1).max(1).sum(), length=66
    )


@pytest.mark.parametrize(("bits", "dsub"), [(8, 1), (8, 4), (4, 8), (8, 11), (8, 16)])
def test_codes_are_the_same_at_every_level(rng, bits, dsub):
    """Also of rows halfway between two codewords, which are nearest by rounding alone."""
    pq = quantizer(rng, 2, dsub, bits)
    pairs = rng.integers(0, 1 << bits, (2, 2, 3000))
    halfway = [pq.codebooks[s][pairs[s]].mean(0) for s in range(2)]
    x = np.concatenate([np.concatenate(halfway, 1), sample(rng, 3000, 2 * dsub)])
    before, codes = _core.active_isa(), []
    for isa in _core.available_isas():
        _core.force_isa(isa)
        codes.append(pq.encode(x))
    _core.force_isa(before)
    for other in codes[1:]:
        assert_exact(codes[0], other)


def check_search(pq, queries, codes, k, **options):
    """Scores are those of the decoded vectors; ids differ from the exact ones by rounding alone."""
    scores, ids = pq.search(queries, codes, k, **options)
    decoded = np.asarray(pq.decode(codes), np.float64)
    exact = ref_scan.scores(queries, decoded, pq.metric)
    expected, _ = ref_scan.topk(queries, decoded, k, pq.metric)
    longest = np.linalg.norm(decoded, axis=1).max(initial=0)
    size = (np.linalg.norm(queries, axis=1)[:, None] + longest) ** 2 + np.zeros(ids.shape)
    assert_reduction(scores, expected, size, length=pq.dim)
    found = min(k, len(codes))
    assert (ids[:, found:] == -1).all()
    assert all(len(set(row)) == found for row in ids[:, :found].tolist())
    assert_reduction(scores[:, :found], np.take_along_axis(exact, ids[:, :found], 1), size[:, :found], length=pq.dim)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("nq", [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 35])
def test_search_is_exact_on_whole_numbers(rng, isa, nq, bits, metric):
    for n in (0, 1, 3, 4, 5, 15, 16, 17, 255, 256, 257, 600):
        m, dsub, k = int(rng.choice([1, 2, 3, 15, 16, 17, 33])), int(rng.integers(1, 5)), int(rng.choice([1, 3, 40]))
        pq = quantizer(rng, m, dsub, bits, metric, make=whole)
        queries, codes = whole(rng, nq, m * dsub), pq.encode(whole(rng, n, m * dsub))
        expected = ref_scan.topk(queries, pq.decode(codes), k, metric)
        for actual, exact in zip(pq.search(queries, codes, k), expected, strict=True):
            assert_exact(actual, exact)


@given(
    nq=st.integers(0, 40), n=st.integers(0, 700), m=st.integers(1, 40), dsub=st.integers(1, 9), k=st.integers(1, 50),
    bits=st.sampled_from([8, 4]), metric=st.sampled_from(["ip", "l2"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_search_equals_the_definition(nq, n, m, dsub, k, bits, metric, seed):
    rng = np.random.default_rng(seed)
    pq = quantizer(rng, m, dsub, bits, metric)
    check_search(pq, sample(rng, nq, m * dsub), rng.integers(0, 256, (n, pq.code_size)).astype(np.uint8), k)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert_exact(x, y)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(("bits", "m"), [(8, 1), (8, 5), (8, 300), (4, 1), (4, 9), (4, 601), (4, 2100)])
def test_packed_codes_and_some_of_them(rng, isa, bits, m, metric):
    """More subspaces than a sum of 16 bits holds, blocks that are not full, masks that are empty, sparse and full."""
    pq = quantizer(rng, m, 2, bits, metric)
    for n in (0, 1, 15, 64, 65, 1100):
        queries, codes = sample(rng, 11, 2 * m), rng.integers(0, 256, (n, pq.code_size)).astype(np.uint8)
        packed = pq.pack(codes)
        assert len(packed) == n
        assert_same(pq.search(queries, packed, 7), pq.search(queries, codes, 7))
        check_search(pq, queries, codes, 7)
        for share in (0, 0.01, 0.5, 1):
            mask = rng.random(n) < share
            rows = np.flatnonzero(mask)
            scores, ids = pq.search(queries, codes[rows], 7)
            expected = scores, np.append(rows, -1)[ids]
            for table in (codes, packed):
                assert_same(pq.search(queries, table, 7, include=mask), expected)
                assert_same(pq.search(queries, table, 7, include=rng.permutation(rows)), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [1, 100, 600])
def test_the_best_lie_side_by_side(rng, isa, bits, k):
    """Every 32nd block of 16 codes, the first ones or the last hold the best: a sample of the codes misleads."""
    pq, n = quantizer(rng, 12, 2, bits), 20_000
    queries = sample(rng, 9, 24)
    for good in (np.arange(n) // 16 % 32 == 0, np.arange(n) < 50, np.arange(n) >= n - 700):
        rows = sample(rng, n, 24) / 10
        rows[good] += queries[0] + queries[1]
        codes = pq.encode(rows)
        packed, blocks = pq.pack(codes), [pq.search(queries, codes[i : i + 500], k) for i in range(0, n, 500)]
        scores = np.concatenate([s for s, _ in blocks], 1)
        ids = np.concatenate([np.where(i < 0, n, i + 500 * b) for b, (_, i) in enumerate(blocks)], 1)
        order = [np.lexsort((i, -s))[:k] for s, i in zip(scores, ids, strict=True)]
        expected = np.take_along_axis(scores, np.array(order), 1), np.take_along_axis(ids, np.array(order), 1)
        for table in (codes, packed):
            assert_same(pq.search(queries, table, k), expected)
            assert_same(pq.search(queries, table, k, num_threads=2), expected)
        for mask in (good, ~good, rng.random(n) < 0.5):
            some = np.flatnonzero(mask)
            scores, ids = pq.search(queries, codes[some], k)
            assert_same(pq.search(queries, packed, k, include=mask), (scores, np.append(some, -1)[ids]))


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_scores(rng, isa, bits):
    """More codes than are kept for rescoring at a time, and all but one are the same; a query that tells none apart."""
    pq = quantizer(rng, 6, 3, bits)
    codes = np.zeros((20_000, pq.code_size), np.uint8)
    codes[17_000] = rng.integers(1, 256, pq.code_size)
    queries = sample(rng, 3, 18)
    queries[1] = 0
    queries[2] = pq.decode(codes[17_000:17_001])[0] - pq.decode(codes[:1])[0]
    for table in (codes, pq.pack(codes)):
        _, ids = pq.search(queries, table, 5)
        assert_exact(ids[1:], [[0, 1, 2, 3, 4], [17_000, 0, 1, 2, 3]])
        assert_exact(np.sort(ids[0])[:4], [0, 1, 2, 3])


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_sparse_queries(rng, isa, bits, metric):
    """Zero pieces are not read, with the same bits; each query has its own."""
    pq = quantizer(rng, 40, 2, bits, metric)
    codes = pq.pack(rng.integers(0, 256, (700, pq.code_size)).astype(np.uint8))
    counts = [0, 1, 20, 5, 3]
    sparse = pv.BlockSparse(
        sample(rng, sum(counts), 4),
        np.concatenate([np.sort(rng.choice(20, count, replace=False)) for count in counts]),
        np.cumsum([0, *counts]),
        80,
    )
    dense = sparse.to_dense()
    assert_same(pq.search(sparse, codes, 9), pq.search(dense, codes, 9))
    for q in range(len(counts)):
        assert_same(pq.search(dense[q : q + 1], codes, 9), [a[q : q + 1] for a in pq.search(dense, codes, 9)])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_query_scores_alone_as_it_does_in_a_batch(rng, isa, bits):
    pq = quantizer(rng, 19, 5, bits, "l2")
    queries, codes = sample(rng, 21, 95), rng.integers(0, 256, (3000, pq.code_size)).astype(np.uint8)
    scores, ids = pq.search(queries, codes, 9)
    for q in range(21):
        alone = pq.search(queries[q : q + 1], codes, 9)
        assert_exact(alone[0], scores[q : q + 1])
        assert_exact(alone[1], ids[q : q + 1])


def test_no_query_finds_what_is_not_a_number(rng):
    pq = quantizer(rng, 4, 2, 8)
    queries = sample(rng, 5, 8)
    queries[2, 3] = np.nan
    scores, ids = pq.search(queries, np.zeros((20, 4), np.uint8), 3)
    assert_exact(ids[2], [-1, -1, -1])
    assert_exact(scores[2], [-np.inf] * 3)
    assert_exact(ids[1], [0, 1, 2])  # equal scores: by id


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rotation", [None, "random", "opq"])
def test_fit_encode_search(rng, rotation, bits):
    x = (sample(rng, 1500, 6) @ sample(rng, 6, 24)).astype(np.float32)  # correlated: subspaces share directions
    pq = pv.quantize.ProductQuantizer(24, 6, bits=bits, metric="l2", rotation=rotation).fit(x, max_iter=8)
    if rotation is None:
        assert pq.rotation_matrix is None
    else:
        product = pq.rotation_matrix @ pq.rotation_matrix.T
        assert_reduction(product, np.eye(24), np.ones((24, 24)), length=24)
    assert pq.codebooks.shape == (6, 1 << bits, 4)
    codes = pq.encode(x)
    assert codes.shape == (1500, 6 if bits == 8 else 3) == (1500, pq.code_size)
    check_search(pq, x[:20], codes, 10)


def distortion(pq, x):
    return ((x - pq.decode(pq.encode(x))) ** 2).sum(1, dtype=np.float64).mean()


def test_more_codes_lose_less_and_a_fitted_rotation_less_still(rng):
    x = (sample(rng, 2000, 8) @ sample(rng, 8, 32)).astype(np.float32)
    losses = [
        distortion(pv.quantize.ProductQuantizer(32, m, bits=bits).fit(x), x)
        for m, bits in ((4, 4), (8, 4), (8, 8), (16, 8))
    ]
    assert losses == sorted(losses, reverse=True)
    assert distortion(pv.quantize.ProductQuantizer(32, 8, rotation="opq").fit(x), x) < 0.8 * losses[2]


# The score-aware loss


def codes_and_labels(rng, pq, n):
    labels = rng.integers(0, 1 << pq.bits, (n, pq.m))
    return ref.pack(labels, pq.bits), labels


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "dsub"), [(1, 1), (2, 3), (5, 8), (7, 17)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 30.0])
def test_improved_codes_are_where_coordinate_descent_ends(rng, isa, bits, m, dsub, weight):
    pq, x = quantizer(rng, m, dsub, bits), sample(rng, 37, m * dsub)
    x[5] = 0  # no direction: as it was
    codes, labels = codes_and_labels(rng, pq, 37)
    _core.quantize_pq_improve(x, pq.codebooks, codes, weight, 1)
    for _ in range(10):
        labels[np.arange(37) != 5] = ref.improve(x, pq.codebooks, labels, weight)[np.arange(37) != 5]
    loss, expected = (
        ref.anisotropic_losses(x, decoded, weight) for decoded in (pq.decode(codes), ref.decode(labels, pq.codebooks))
    )
    size = (1 + weight) * (np.linalg.norm(x, axis=1) + np.sqrt((pq.codebooks**2).sum(-1).max(1).sum())) ** 2
    # A near tie may send the descent elsewhere; all but a few rows agree.
    assert (np.abs(loss - expected) <= 1e-5 * size).mean() >= 0.9
    assert loss.sum() <= 1.02 * expected.sum() + 1e-5 * size.sum()
    assert_exact(codes[5], ref.pack(labels, bits)[5])


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_the_anisotropic_loss_lose_less_of_it_than_the_nearest(rng, isa, bits):
    x = sample(rng, 600, 24)
    pq = pv.quantize.ProductQuantizer(24, 6, bits=bits, loss="anisotropic", threshold=0.5).fit(x, max_iter=3)
    weight = ref.anisotropic_weight(24, 0.5)
    assert pq._weight == pytest.approx(weight)
    nearest = ref.decode(ref.encode(x, pq.codebooks), pq.codebooks)
    ours = pq.decode(pq.encode(x))
    assert ref.anisotropic_losses(x, ours, weight).sum() < 0.95 * ref.anisotropic_losses(x, nearest, weight).sum()
    assert ((x - ours) ** 2).sum() > ((x - nearest) ** 2).sum()
    for i in (0, 7, 599):
        assert_exact(pq.encode(x[i : i + 1]), pq.encode(x)[i : i + 1])
    assert_exact(pq.encode(x, num_threads=2), pq.encode(x, num_threads=1))
    plain = pv.quantize.ProductQuantizer(24, 6, bits=bits).fit(x, max_iter=3)
    lost = [ref.anisotropic_losses(x, q.decode(q.encode(x)), weight).sum() for q in (pq, plain)]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_training_by_the_anisotropic_loss_never_raises_it(rng, bits):
    x, weight = sample(rng, 700, 12), 9.0
    pq = quantizer(rng, 4, 3, bits)
    codes = pq.encode(x)

    def loss():
        return ref.anisotropic_losses(x, pq.decode(codes), weight).sum()

    losses = [loss()]
    for _ in range(6):
        _core.quantize_pq_improve(x, pq.codebooks, codes, weight, 1)
        losses.append(loss())
        _core.quantize_pq_move(pq._cut(x, None), codes, pq.codebooks, weight, 1)
        losses.append(loss())
    assert_reduction(np.maximum.accumulate(np.float32(losses[::-1])), losses[::-1], losses[0], length=1)
    assert losses[-1] < 0.9 * losses[1]


def test_a_codebook_moves_to_the_minimum(rng):
    """No step away from it, of one codeword in one direction, lowers the loss."""
    x, weight = sample(rng, 300, 6), 5.0
    pq = quantizer(rng, 2, 3, 4)
    labels = ref.encode(x, pq.codebooks)
    before = pq.codebooks.copy()
    x[7] = 0  # no direction: counts by its square alone
    _core.quantize_pq_move(pq._cut(x, None), ref.pack(labels, 4), pq.codebooks, weight, 1)
    assert (pq.codebooks != before).any()
    threaded = before.copy()
    _core.quantize_pq_move(pq._cut(x, None), ref.pack(labels, 4), threaded, weight, 2)
    assert_exact(threaded, pq.codebooks)
    books = np.float64(pq.codebooks)
    least = ref.anisotropic_losses(x, ref.decode(labels, books), weight).sum()
    for c in np.unique(labels[:, 1]):  # the last codebook: the first has moved since
        for step in 1e-2 * np.concatenate([np.eye(3), -np.eye(3)]):
            moved = books.copy()
            moved[1, c] += step
            assert ref.anisotropic_losses(x, ref.decode(labels, moved), weight).sum() > least


def test_anisotropic_codes_of_glosses_find_as_many(data):
    """At equal bytes: the share of the 10 best inner products among the first 10, of texts not fitted to."""
    with lzma.open(data / "wordnet-glosses-minilm" / "vectors_i8.npy.xz") as file:
        x = np.load(file)[::8].astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    queries, x = x[::60], np.delete(x, np.s_[::60], 0)
    _, best = pv.scan.topk(queries, x, 10)
    recalls = {}
    for m in (48, 96):
        for loss in ("squared", "anisotropic"):
            pq = pv.quantize.ProductQuantizer(384, m, bits=4, loss=loss).fit(x)
            _, ids = pq.search(queries, pq.encode(x), 10)
            recalls[m, loss] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, best, strict=True)])
        assert recalls[m, "anisotropic"] >= recalls[m, "squared"], recalls
    assert recalls[48, "anisotropic"] >= recalls[48, "squared"] + 0.01, recalls


def test_save_and_load_of_the_anisotropic_loss(rng, tmp_path):
    x = sample(rng, 300, 8)
    pq = pv.quantize.ProductQuantizer(8, 2, bits=4, loss="anisotropic", threshold=0.6).fit(x)
    pq.save(tmp_path / "pq")
    other = pv.quantize.ProductQuantizer.load(tmp_path / "pq")
    text = "ProductQuantizer(8, 2, bits=4, metric='ip', rotation=None, loss='anisotropic', threshold=0.6, seed=0)"
    assert repr(other) == repr(pq) == text
    assert_exact(other.encode(x), pq.encode(x))
    state = pq.state()
    del state.params["loss"], state.params["threshold"]  # as a file of an earlier release
    assert pv.quantize.ProductQuantizer.from_state(state).loss == "squared"


def test_fit_to_a_sample(rng):
    x = sample(rng, 5000, 8)
    pq = pv.quantize.ProductQuantizer(8, 4, bits=4)
    small, all_rows = (distortion(pq.fit(x, train_size=size), x) for size in (100, 5000))
    assert all_rows < small < 2 * all_rows


def test_training_can_be_stopped(rng):
    x = sample(rng, 500, 8)
    pq = pv.quantize.ProductQuantizer(8, 4, bits=4).fit(x)
    before, seen = pq.codebooks, []

    def stop(done, total):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pq.fit(x, progress=stop)
    assert seen == [(1, 25), (2, 25)]
    assert pq.codebooks is before


@pytest.mark.parametrize("rotation", [None, "random"])
def test_save_and_load(rng, tmp_path, rotation):
    x, path = sample(rng, 400, 12), tmp_path / "pq.safetensors"
    pq = pv.quantize.ProductQuantizer(12, 3, bits=4, metric="l2", rotation=rotation, seed=5).fit(x)
    pq.save(path)
    other = pv.quantize.ProductQuantizer.load(path)
    assert repr(other) == repr(pq) == f"ProductQuantizer(12, 3, bits=4, metric='l2', rotation={rotation!r}, seed=5)"
    codes = pq.encode(x)
    assert_exact(other.encode(x), codes)
    for ours, theirs in zip(pq.search(x, codes, 4), other.search(x, codes, 4), strict=True):
        assert_exact(ours, theirs)
    state = pq.state()
    state.tensors["codebooks"] = state.tensors["codebooks"][1:]
    _files.save(path, "quantize.ProductQuantizer", state)
    with pytest.raises(pv.FormatError) as caught:
        pv.quantize.ProductQuantizer.load(path)
    assert str(caught.value) == (
        f"{PQ}.load: {path} is damaged: ValueError: codebooks must be float32 of shape (3, 16, 4), got float32 of "
        "shape (2, 16, 4)"
    )


# Both


def test_result_does_not_depend_on_thread_count(rng):
    x = sample(rng, 9000, 24)
    results = []
    for n in (1, 2, 7):
        pq = pv.quantize.ProductQuantizer(24, 4, metric="l2").fit(x, max_iter=2, num_threads=n)
        codes = np.tile(pq.encode(x, num_threads=n), (60, 1))  # several ranges of codes, and equal scores between them
        results.append(
            [
                *(part for metric in METRICS for part in pv.quantize.kmeans(x, 50, metric=metric, num_threads=n)),
                *pv.quantize.kmeans(x[:, :5].copy(), 50, max_iter=9, num_threads=n),
                pq.codebooks,
                codes,
                pq.decode(codes[:9000], num_threads=n),
                *pq.search(x[:2], codes, 70, num_threads=n),
                *pq.search(x[:20], codes, 70, num_threads=n),
                *pq.search(x[:20], pq.pack(codes, num_threads=n), 70, num_threads=n),
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_exact(a, b)


def test_the_caller_gets_the_library_it_gave(rng, lib):
    x = lib(sample(rng, 300, 8))
    kind = type(x)
    for init in ("k-means++", "random", "strided", sample(rng, 4, 8)):
        result = pv.quantize.kmeans(x, 4, init=init)
        assert type(result.centroids) is type(result.labels) is kind
        assert isinstance(result.inertia, float)
    pq = pv.quantize.ProductQuantizer(8, 4, rotation="random").fit(x)
    codes = pq.encode(x)
    results = codes, pq.decode(codes), *pq.search(x, codes, 3)
    assert all(type(result) is kind for result in results)
    out = [lib(np.zeros_like(np.asarray(result))) for result in results]
    assert pq.encode(x, out=out[0]) is out[0]
    assert pq.decode(codes, out=out[1]) is out[1]
    assert pq.search(x, codes, 3, out=(out[2], out[3]))[0] is out[2]
    for a, b in zip(results, out, strict=True):
        assert_exact(a, b)
    assert_exact(pv.quantize.kmeans(np.asarray(x).tolist(), 4).labels, pv.quantize.kmeans(x, 4).labels)


def test_strided_input(rng):
    big = sample(rng, 300, 20)
    x = big[::2, 3:11]
    assert_exact(pv.quantize.kmeans(x, 5).centroids, pv.quantize.kmeans(x.copy(), 5).centroids)
    pq = pv.quantize.ProductQuantizer(8, 2, bits=4).fit(x)
    codes = pq.encode(x)
    assert_exact(codes, pq.encode(x.copy()))
    assert_exact(pq.search(x, np.repeat(codes, 2, 0)[::2], 5)[1], pq.search(x.copy(), codes, 5)[1])


def test_narrow_floats(rng):
    torch = pytest.importorskip("torch")
    for x in (sample(rng, 300, 8).astype(np.float16), torch.from_numpy(sample(rng, 300, 8)).bfloat16()):
        wide = np.asarray(x.float() if isinstance(x, torch.Tensor) else x.astype(np.float32))
        pq, other = (pv.quantize.ProductQuantizer(8, 4, rotation="random").fit(rows) for rows in (x, wide))
        assert_exact(pq.codebooks, other.codebooks)
        codes = pq.encode(x)
        assert type(codes) is type(x)
        assert_exact(codes, pq.encode(wide))
        assert_same(pq.search(x, codes, 3), pq.search(wide, np.asarray(codes), 3))


def test_memory_maps_are_encoded_in_blocks(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(_codec, "_BLOCK_ELEMENTS", 800)
    x = np.memmap(tmp_path / "x", np.float16, "w+", shape=(250, 8))
    x[:] = sample(rng, 250, 8)
    out, seen = np.memmap(tmp_path / "codes", np.uint8, "w+", shape=(250, 2)), []
    pq = pv.quantize.ProductQuantizer(8, 4, bits=4, rotation="random").fit(x, train_size=50)
    assert pq.encode(x, out=out, progress=lambda *counts: seen.append(counts)) is out
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert_exact(out, pq.encode(np.array(x, np.float32)))
    x[203, 1] = np.nan
    with pytest.raises(ValueError, match="x must be finite, got NaN or Inf in row 203"):
        pq.encode(x)


# Real data


@pytest.fixture(scope="module")
def sift(data):
    """Base, queries and exact neighbours (rows of the base)."""

    def load(name):
        with lzma.open(data / "sift-10k" / name) as file:
            return np.load(file)

    x, neighbors = load("vectors.npy.xz").astype(np.float32), load("neighbors_l2_top100.npy.xz")
    return np.delete(x, np.s_[::10], 0), x[::10], neighbors - neighbors // 10 - 1


@pytest.mark.parametrize(
    ("bits", "m", "rotation", "loss", "recall"),
    [  # the loss is that of faiss 1.15 at equal codes, trained on the same rows
        (8, 16, None, 9948, 0.74),
        (4, 32, None, 17860, 0.64),
        (4, 32, "opq", 17860, 0.68),
    ],
)
def test_sift(sift, bits, m, rotation, loss, recall):
    base, queries, neighbors = sift
    pq = pv.quantize.ProductQuantizer(128, m, bits=bits, metric="l2", rotation=rotation).fit(base)
    codes = pq.encode(base)
    assert distortion(pq, base) <= 1.02 * loss
    _, ids = pq.search(queries, codes, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, neighbors[:, :10], strict=True)]) >= recall


def test_kmeans_on_sift(sift):
    x = sift[0][:3000]
    result = pv.quantize.kmeans(x, 32, init="strided", max_iter=10, tolerance=0)
    _, inertia = ref.kmeans(x, x[np.arange(32) * 3000 // 32], 10)
    assert abs(result.inertia / inertia - 1) < 1e-3  # rows halfway between two centroids may go either way
    assert pv.quantize.kmeans(x, 32, max_iter=10).inertia <= 1.03 * inertia


# Errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def fitted():
    return quantizer(np.random.default_rng(0), 4, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 6),
            ValueError,
            "quantize.kmeans: k must be at most the number of rows of x (5), got 6",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 0),
            ValueError,
            "quantize.kmeans: k must be at least 1, got 0",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5), 2),
            ValueError,
            "quantize.kmeans: x must have 2 axes, got shape (5,)",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2, dtype=np.float64), 2),
            TypeError,
            "quantize.kmeans: x must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: pv.quantize.kmeans(np.array([[1, 2], [3, np.nan]], np.float32), 2),
            ValueError,
            "quantize.kmeans: x must be finite, got NaN or Inf in row 1",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, metric="l1"),
            ValueError,
            "quantize.kmeans: metric must be one of 'l2', 'cosine', 'ip', got 'l1'",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, init="first"),
            ValueError,
            "quantize.kmeans: init must be one of 'k-means++', 'random', 'strided', got 'first'",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, init=zeros(2, 3)),
            ValueError,
            "quantize.kmeans: init must have shape (2, 2), got (2, 3)",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, tolerance=-1),
            ValueError,
            "quantize.kmeans: tolerance must be at least 0, got -1",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, max_iter=0),
            ValueError,
            "quantize.kmeans: max_iter must be at least 1, got 0",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, minibatch=0),
            ValueError,
            "quantize.kmeans: minibatch must be at least 1, got 0",
        ),
        (
            lambda: pv.quantize.kmeans(zeros(5, 2), 2, minibatch=3, metric="cosine"),
            ValueError,
            "quantize.kmeans: minibatch must be None unless metric is 'l2', got 3",
        ),
        (
            lambda: pv.quantize.kmeans_select(zeros(5, 2), [2, 3]),
            ValueError,
            "quantize.kmeans_select: k_range must have at least 3 numbers, got 2",
        ),
        (
            lambda: pv.quantize.kmeans_select(zeros(5, 2), [2, 4, 3]),
            ValueError,
            "quantize.kmeans_select: k_range must ascend, got [2, 4, 3]",
        ),
        (
            lambda: pv.quantize.kmeans_select(zeros(5, 2), [2, 3, 6]),
            ValueError,
            "quantize.kmeans_select: k_range must be at most the number of rows of x (5), got 6",
        ),
        (
            lambda: pv.quantize.kmeans_select(zeros(5, 2), [1, 2], criterion="silhouette"),
            ValueError,
            "quantize.kmeans_select: k_range must start at 2 or above for 'silhouette', got 1",
        ),
        (
            lambda: pv.quantize.kmeans_select(zeros(5, 2), [1, 2, 3], criterion="gap"),
            ValueError,
            "quantize.kmeans_select: criterion must be one of 'elbow', 'silhouette', got 'gap'",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(10, 4),
            ValueError,
            f"{PQ}: m must divide dim (10), got 4",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4, bits=6),
            ValueError,
            f"{PQ}: bits must be one of 8, 4, got 6",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4, metric="cosine"),
            ValueError,
            f"{PQ}: metric must be one of 'ip', 'l2', got 'cosine'",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4, loss="l2"),
            ValueError,
            f"{PQ}: loss must be one of 'squared', 'anisotropic', got 'l2'",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4, loss="anisotropic", metric="l2"),
            ValueError,
            f"{PQ}: loss must be 'squared' unless metric is 'ip', got 'anisotropic'",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4, loss="anisotropic", threshold=1),
            ValueError,
            f"{PQ}: threshold must be in (0, 1), got 1",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4).encode(zeros(1, 8)),
            RuntimeError,
            f"{PQ}.encode: the quantizer must be fitted before; call fit(x)",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4).search(zeros(1, 8), zeros(1, 4, dtype=np.uint8), 1),
            RuntimeError,
            f"{PQ}.search: the quantizer must be fitted before; call fit(x)",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4).fit(zeros(255, 8)),
            ValueError,
            f"{PQ}.fit: x must have at least 2^bits rows (256), got 255",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4).fit(zeros(300, 8), train_size=100),
            ValueError,
            f"{PQ}.fit: train_size must be at least 256, got 100",
        ),
        (
            lambda: pv.quantize.ProductQuantizer(8, 4).fit(np.full((300, 8), np.inf, np.float32)),
            ValueError,
            f"{PQ}.fit: x must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: fitted().encode(zeros(3, 9)),
            ValueError,
            f"{PQ}.encode: x must have d = 8, got 9",
        ),
        (
            lambda: fitted().encode(zeros(3, 8), out=zeros(3, 4)),
            TypeError,
            f"{PQ}.encode: out must be uint8, got float32",
        ),
        (
            lambda: fitted().decode(zeros(3, 5, dtype=np.uint8)),
            ValueError,
            f"{PQ}.decode: codes must have 4 bytes a row, got 5",
        ),
        (
            lambda: fitted().decode(zeros(3, 4)),
            TypeError,
            f"{PQ}.decode: codes must be uint8, got float32; cast it with .astype('uint8')",
        ),
        (
            lambda: fitted().search(zeros(3, 7), zeros(3, 4, dtype=np.uint8), 1),
            ValueError,
            f"{PQ}.search: queries must have d = 8, got 7",
        ),
        (
            lambda: fitted().search(zeros(3, 8), zeros(3, 4, dtype=np.uint8), 1, include=[True, False]),
            ValueError,
            f"{PQ}.search: include must have one entry a code (3), got 2",
        ),
        (
            lambda: fitted().search(zeros(3, 8), zeros(3, 4, dtype=np.uint8), 1, include=[2, 0, 3]),
            IndexError,
            f"{PQ}.search: include must be in [0, 3), got 3 at position 2",
        ),
        (
            lambda: fitted().search(
                zeros(3, 8), quantizer(np.random.default_rng(0), 4, 2, 4).pack(zeros(3, 2, dtype=np.uint8)), 1
            ),
            ValueError,
            f"{PQ}.search: codes must have blocks of shape (4, 64), got (4, 16)",
        ),
        (
            lambda: fitted().pack(zeros(3, 5, dtype=np.uint8)),
            ValueError,
            f"{PQ}.pack: codes must have 4 bytes a row, got 5",
        ),
        (
            lambda: pv.quantize.PackedCodes(zeros(1, 4, 32, dtype=np.uint8), 3),
            ValueError,
            "quantize.PackedCodes: blocks must hold 16 or 64 codes each, got 32",
        ),
        (
            lambda: pv.quantize.PackedCodes(zeros(1, 4, 16, dtype=np.uint8), 17),
            ValueError,
            "quantize.PackedCodes: blocks must have 2 rows for 17 codes, got 1",
        ),
        (
            lambda: fitted().search(zeros(3, 8), zeros(3, 4, dtype=np.uint8), 0),
            ValueError,
            f"{PQ}.search: k must be at least 1, got 0",
        ),
        (
            lambda: fitted().search(zeros(3, 8), zeros(3, 4, dtype=np.uint8), 1, num_threads=0),
            ValueError,
            f"{PQ}.search: num_threads must be at least 1, got 0",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
