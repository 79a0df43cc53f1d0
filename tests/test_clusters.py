"""Clusters of many small sets at once: quantize.kmeans_sets and maxsim.pool."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from reference import clusters as ref

SIZES = (1, 2, 3, 0, 15, 16, 17, 33, 64, 65, 130)


def sample(rng, d=9):
    return pv.Ragged.from_list([rng.standard_normal((n, d), np.float32) for n in SIZES])


def check_means(sets, result):
    """Every centroid is the mean of its rows, and the inertia theirs."""
    for s, x in enumerate(sets):
        labels = np.asarray(result.labels)[sets.offsets[s] : sets.offsets[s + 1]]
        means = np.asarray(result.centroids[s])
        assert_exact(np.unique(labels), np.arange(len(means)))
        expected = [np.float64(x[labels == c]).mean(0) for c in range(len(means))]
        if len(x):
            assert_reduction(means, np.stack(expected), np.abs(means).max() + np.zeros(means.shape), length=1)
        inertia = np.square(np.float64(x) - means[labels]).sum() if len(x) else 0
        np.testing.assert_allclose(result.inertia[s], inertia, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 16, 40])
def test_kmeans_is_lloyds_from_evenly_spaced_rows(rng, isa, k):
    sets = sample(rng)
    for iterations in (1, 4, 25):
        result = pv.quantize.kmeans_sets(sets, k, max_iter=iterations)
        check_means(sets, result)
        for s, x in enumerate(sets):
            if len(x) <= k:
                assert_exact(result.centroids[s], x)
                assert result.iterations[s] == 0
                continue
            labels, inertia = ref.kmeans(x, k, iterations)
            assert_exact(np.asarray(result.labels)[sets.offsets[s] : sets.offsets[s + 1]], labels)
            np.testing.assert_allclose(result.inertia[s], inertia, rtol=1e-5)
            assert result.iterations[s] <= iterations


def test_it_stops_when_nothing_moves(rng):
    sets = sample(rng)
    result = pv.quantize.kmeans_sets(sets, 4, max_iter=500)
    assert result.iterations.max() < 100
    assert_exact(pv.quantize.kmeans_sets(sets, 4, max_iter=100).labels, result.labels)
    assert (pv.quantize.kmeans_sets(sets, 4, tolerance=0.5).iterations <= result.iterations).all()


@pytest.mark.parametrize("d", [1, 6])
def test_means_that_stay_are_not_forgotten(rng, isa, d):
    """Bundles that are found at once, and loose rows that go on from mean to mean: most means stay most of the time."""
    bundles = 10 * rng.standard_normal((12, 1, d)) + 0.1 * rng.standard_normal((12, 6, d))
    loose = rng.standard_normal((300, d))
    x = np.concatenate([np.concatenate([bundles[:, j] for j in range(6)]), loose]).astype(np.float32)
    for k in (20, 33):
        labels, inertia = ref.kmeans(x, k, 40)
        result = pv.quantize.kmeans_sets([x], k, max_iter=40)
        assert result.iterations[0] > 3
        assert_exact(result.labels, labels)
        np.testing.assert_allclose(result.inertia[0], inertia, rtol=1e-5)


def test_empty_clusters_take_the_farthest_rows(rng, isa):
    """Some clusters start from one row: all but the first of them are empty."""
    n, k = 48, 8
    for _ in range(100):
        x = rng.standard_normal((n, 2)).astype(np.float32)
        starts = np.arange(k) * n // k
        x[starts[rng.integers(0, k, 4)]] = x[0]
        for iterations in (2, 4, 9):
            assert_exact(pv.quantize.kmeans_sets([x], k, max_iter=iterations).labels, ref.kmeans(x, k, iterations)[0])


@pytest.mark.parametrize("offset", [0, 3e4, 1e18])
def test_clusters_without_rows_whose_losses_cancel(rng, isa, offset):
    """Two rows, again and again: all losses are 0, but for rounding below it, or for overflow."""
    two = rng.uniform(0, 255, (2, 784)) + offset
    sets = pv.Ragged(two.astype(np.float32)[np.arange(200) % 2], [0, 100, 200])
    for iterations in (1, 2, 20):
        result = pv.quantize.kmeans_sets(sets, 7, max_iter=iterations)
        for labels in np.split(result.labels, 2):
            assert_exact(np.unique(labels), np.arange(7))


@pytest.mark.parametrize("k", [3, 20, 45])
def test_rows_that_repeat(rng, isa, k):
    """Equal means, and clusters that lose their last row again and again."""
    sets = pv.Ragged(rng.integers(0, 2, (1000, 4)).astype(np.float32), np.arange(0, 1001, 50))
    check_means(sets, pv.quantize.kmeans_sets(sets, k, max_iter=30))


@pytest.mark.parametrize("method", ["kmeans", "ward"])
def test_nonfinite_rows_are_refused_and_large_ones_are_not(rng, isa, method):
    x = rng.standard_normal((70, 9)).astype(np.float32)
    for row, bad in ((0, np.nan), (39, np.inf), (69, -np.inf)):
        wrong = x.copy()
        wrong[row, row % 9] = bad
        for size in (2, 35, 70):  # 2: rows that are their own means
            with pytest.raises(ValueError, match=rf"docs must be finite, got NaN or Inf in row {row}$"):
                pv.maxsim.pool(wrong.reshape(-1, size, 9), 3, method=method)
    large = x[:4].reshape(1, 4, 9) * np.float32(1e30)
    assert np.isfinite(pv.maxsim.pool(large, 2, method=method).values).all()


def test_equal_rows_fill_all_clusters():
    x = np.full((50, 3), 2, np.float32)
    x[7] = 9
    result = pv.quantize.kmeans_sets([x], 5)
    check_means(pv.Ragged.from_list([x]), result)
    assert result.inertia[0] == 0


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_ward_joins_what_raises_the_inertia_least(rng, isa, k):
    sets = sample(rng).take(np.flatnonzero(np.array(SIZES) <= 33))
    pooled = pv.maxsim.pool(sets, k, method="ward")
    for x, means in zip(sets, pooled, strict=True):
        labels = ref.ward(x, k)
        expected = [np.float64(x[labels == c]).mean(0) for c in range(min(k, len(x)))]
        if len(x):
            assert_reduction(means, np.stack(expected), np.abs(x).max() + np.zeros(means.shape), length=1)


def test_ratio(rng):
    sets = sample(rng)
    pooled = pv.maxsim.pool(sets, ratio=0.25)
    assert pooled.lengths.tolist() == [max(n // 4, min(n, 1)) for n in SIZES]
    assert_exact(pv.maxsim.pool(sets, ratio=1.0).values, sets.values)


@pytest.mark.parametrize("method", ["kmeans", "ward"])
def test_result_does_not_depend_on_thread_count(rng, method):
    sets = sample(rng)
    one, *others = (pv.maxsim.pool(sets, 5, method=method, num_threads=n).values for n in (1, 2, 7))
    for other in others:
        assert_exact(one, other)


def test_the_caller_gets_the_library_it_gave(rng, lib):
    x = rng.standard_normal((4, 10, 6), np.float32)
    lengths = np.array([10, 0, 3, 7])
    pooled = pv.maxsim.pool((lib(x), lengths), 4)
    assert type(pooled.values) is type(lib(x))
    assert pooled.lengths.tolist() == [4, 0, 3, 4]
    assert type(pv.quantize.kmeans_sets(lib(x), 2).labels) is type(lib(x))


def test_pooled_tokens_score_nearly_alike(rng):
    """Tokens in 8 tight bundles a document: pooling to 8 keeps the scores."""
    bundles = rng.standard_normal((20, 8, 1, 32), np.float32)
    docs = (bundles + 0.05 * rng.standard_normal((20, 8, 6, 32), np.float32)).reshape(20, 48, 32)
    queries = rng.standard_normal((5, 4, 32), np.float32)
    exact = pv.maxsim.score(queries, docs)
    for method in ("kmeans", "ward"):
        assert np.abs(pv.maxsim.score(queries, pv.maxsim.pool(docs, 8, method=method)) / exact - 1).max() < 0.15


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: pv.quantize.kmeans_sets(x),
            ValueError,
            "quantize.kmeans_sets: k or ratio must be given, and not both, got k=None, ratio=None",
        ),
        (
            lambda x: pv.maxsim.pool(x, 3, ratio=0.5),
            ValueError,
            "maxsim.pool: k or ratio must be given, and not both, got k=3, ratio=0.5",
        ),
        (
            lambda x: pv.maxsim.pool(x, 0),
            ValueError,
            "maxsim.pool: k must be at least 1, got 0",
        ),
        (
            lambda x: pv.maxsim.pool(x, ratio=1.5),
            ValueError,
            "maxsim.pool: ratio must be in (0, 1], got 1.5",
        ),
        (
            lambda x: pv.maxsim.pool(x, 2, method="average"),
            ValueError,
            "maxsim.pool: method must be one of 'kmeans', 'ward', got 'average'",
        ),
        (
            lambda x: pv.quantize.kmeans_sets(x, 2, tolerance=-1),
            ValueError,
            "quantize.kmeans_sets: tolerance must be at least 0, got -1",
        ),
        (
            lambda x: pv.quantize.kmeans_sets(x * np.float32(np.nan), 2),
            ValueError,
            "quantize.kmeans_sets: sets must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda x: pv.maxsim.pool(x.astype(np.float64), 2),
            TypeError,
            "maxsim.pool: docs must be float32, got float64; cast it with .astype('float32')",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call(np.ones((2, 3, 4), np.float32))
    assert str(caught.value) == text
