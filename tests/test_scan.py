"""Exact search: top-k, nearest, rank, pair scores."""

import lzma
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
from accuracy import assert_exact, assert_reduction, assert_sum_of_scores, on_host
from polyvec import _core
from reference import scan as ref

METRICS = ["ip", "l2", "cosine"]
# Around the lane counts 4, 8 and 16, the panels of 8 and 32 queries, tiles of 3 to 12 rows and the first block of 64.
QUERIES = [0, 1, 4, 7, 8, 9, 15, 31, 32, 33, 67]
ITEMS = [0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 35, 48, 63, 64, 65, 200]
WIDTHS = [0, 1, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 31, 33, 35, 64, 67]


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def whole(rng, *shape, size=3):
    """Whole numbers: every sum is exact, and many are equal."""
    return rng.integers(-size, size + 1, shape).astype(np.float32)


def id_lists(rng, n, items, most=9):
    lengths = rng.integers(0, most if items else 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return offsets, rng.integers(0, max(items, 1), offsets[-1])


def sizes(rng, queries, items, metric):
    """The sum of absolute products behind each score."""
    q, x = np.linalg.norm(queries, axis=1)[:, None], np.linalg.norm(items, axis=1)
    return {"ip": q * x, "l2": (q + x) ** 2, "cosine": np.ones((len(queries), len(items)))}[metric]


@pytest.fixture(scope="module")
def scan(on_device):
    """The functions of pv.scan for numpy arrays, on the device that is tested."""

    def put(x):
        if isinstance(x, tuple):
            return tuple(map(put, x))
        return on_device(x) if isinstance(x, np.ndarray) else x

    def on_the_device(function):
        def call(*args, **options):
            result = function(*map(put, args), **{name: put(x) for name, x in options.items()})
            return tuple(map(on_host, result)) if isinstance(result, tuple) else on_host(result)

        return call

    return SimpleNamespace(**{name: on_the_device(getattr(pv.scan, name)) for name in pv.scan.__all__})


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("nq", QUERIES)
def test_topk_is_exact_on_whole_numbers(rng, isa, scan, nq, metric):
    for n in ITEMS:
        d, k = int(rng.choice(WIDTHS)), int(rng.choice([1, 2, 10, 80]))
        q, x, bias = whole(rng, nq, d), whole(rng, n, d), whole(rng, n) * 2
        exclude = id_lists(rng, nq, n)
        for options in ({}, {"bias": bias}, {"exclude": exclude}, {"bias": bias, "exclude": exclude}):
            result = scan.topk(q, x, k, metric=metric, **options)
            for actual, expected in zip(result, ref.topk(q, x, k, metric, **options), strict=True):
                assert_exact(actual, expected)


@given(
    nq=st.integers(0, 70), n=st.integers(0, 300), d=st.integers(0, 40), k=st.integers(1, 60), seed=st.integers(0, 99),
    metric=st.sampled_from(METRICS[:2]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_topk_over_shapes(nq, n, d, k, seed, metric):
    rng = np.random.default_rng(seed)
    q, x, exclude = whole(rng, nq, d), whole(rng, n, d), id_lists(rng, nq, n, 40)
    result = pv.scan.topk(q, x, k, metric=metric, exclude=exclude)
    for actual, expected in zip(result, ref.topk(q, x, k, metric, exclude=exclude), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [3, 40])
def test_topk_of_real_numbers(rng, isa, scan, nq, metric):
    for d in WIDTHS[1:]:
        q, x, bias = sample(rng, nq, d), sample(rng, 500, d), sample(rng, 500)
        scores, ids = scan.topk(q, x, 20, metric=metric, bias=bias)
        every, size = ref.scores(q, x, metric, bias), sizes(rng, q, x, metric) + np.abs(bias)
        expected, _ = ref.topk(q, x, 20, metric, bias)
        size = np.take_along_axis(size, ids, 1)
        assert_reduction(scores, np.take_along_axis(every, ids, 1), size, length=d)  # each is the score of its id
        assert_reduction(scores, expected, size.max(1, keepdims=True), length=d)  # and no better one is missing
        assert all(len(set(row)) == 20 for row in ids.tolist())
        assert (np.diff(scores if metric == "l2" else -scores, axis=1) >= 0).all()


@pytest.mark.parametrize("nq", [2, 40])
@pytest.mark.parametrize("k", [1, 100, 4096])
def test_topk_over_many_blocks(rng, scan, nq, k):
    q, x = whole(rng, nq, 6, size=9), whole(rng, 5000, 6, size=9)
    for actual, expected in zip(scan.topk(q, x, k), ref.topk(q, x, k), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("nq", [2, 40])
@pytest.mark.parametrize("k", [100, 300, 2000])
def test_topk_of_scores_of_any_size(rng, scan, nq, k):
    """From 1e-38 to 1e38, of both signs, with infinite and equal ones: where the digits of a score say little."""
    x = np.float32(rng.choice([-1, 1], 9000) * 10.0 ** rng.uniform(-45, 38, 9000))[:, None]
    x[rng.integers(0, 9000, 400)] = np.float32([np.inf, 0, -0.0, 1e-45]).repeat(100)[:, None]
    q = np.float32(rng.choice([-1, 1], nq))[:, None]
    for actual, expected in zip(scan.topk(q, x, k), ref.topk(q, x, k), strict=True):
        assert_exact(actual, expected)


def test_zero_vectors_have_cosine_0(rng, isa, scan):
    x = sample(rng, 40, 9)
    x[:20] = 0
    scores, ids = scan.topk(x, -x, 40, metric="cosine")
    assert_exact(scores[0], np.zeros(40))
    assert_exact(ids[0], np.arange(40))
    assert_exact(scan.nearest(x, x[:3], metric="cosine")[1], np.zeros(40))
    assert_exact(scan.score_pairs(x[:2], x, [[0, 30], [1, 39]], metric="cosine"), np.zeros((2, 2)))


@pytest.mark.parametrize("nq", [1, 40])
def test_items_without_a_score_are_never_returned(rng, scan, nq):
    q, x = sample(rng, nq, 5), sample(rng, 30, 5)
    x[3], x[17, 2], bias = np.nan, np.nan, np.zeros(30, np.float32)
    bias[5] = -np.inf
    scores, ids = scan.topk(q, x, 30, bias=bias)
    assert_exact(np.sort(ids, axis=1)[:, :3], np.full((nq, 3), -1))
    assert not np.isin([3, 5, 17], ids).any()
    assert_exact(scores[:, -3:], np.full((nq, 3), -np.inf))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", ITEMS[1:])
def test_nearest_is_exact_on_whole_numbers(rng, isa, scan, k, metric):
    for n in QUERIES:
        d = int(rng.choice(WIDTHS))
        x, centroids = whole(rng, n, d), whole(rng, k, d)
        for actual, expected in zip(
            scan.nearest(x, centroids, metric=metric), ref.nearest(x, centroids, metric), strict=True
        ):
            assert_exact(actual, expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [4, 8, 50, 300])
def test_nearest_of_real_numbers(rng, isa, scan, d, metric):
    x, centroids = sample(rng, 270, d), sample(rng, 1500, d)
    ids, distances = scan.nearest(x, centroids, metric=metric)
    every, size = ref.scores(x, centroids, metric), sizes(rng, x, centroids, metric)
    size = size[np.arange(270), ids]
    assert_reduction(distances, every[np.arange(270), ids], size, length=d)
    assert_reduction(distances, ref.nearest(x, centroids, metric)[1], size, length=d)


def test_distances_do_not_cancel(rng, isa, scan):
    """Away from the origin |q|^2 - 2 q . x + |x|^2 would lose four digits; the returned distances do not."""
    x = sample(rng, 50, 20) + 30
    distances, ids = scan.topk(x, x, 50, metric="l2")
    np.testing.assert_allclose(distances, np.take_along_axis(ref.scores(x, x, "l2"), ids, 1), rtol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert_exact(distances[:, 0], np.zeros(50))
    assert_exact(scan.nearest(x, x)[1], np.zeros(50))


def test_nearest_reads_a_slice_of_columns(rng, isa):
    x, centroids = whole(rng, 100, 24), whole(rng, 16, 8)
    ids, distances = np.empty(100, np.int64), np.empty(100, np.float32)
    _core.scan_nearest(x[:, 8:16], centroids, None, ids, distances, "l2", 1)
    assert_exact(ids, ref.nearest(x[:, 8:16], centroids)[0])
    _core.scan_nearest(x[:, 8:16], centroids, None, ids, None, "l2", 1)
    assert_exact(pv.scan.nearest(x[:, 8:16], centroids)[0], ids)


@pytest.mark.parametrize("ties", ["realistic", "optimistic", "pessimistic"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rank_is_exact_on_whole_numbers(rng, isa, scan, metric, ties):
    for nq in QUERIES:
        n, d = int(rng.choice(ITEMS[1:])), int(rng.choice(WIDTHS))
        q, x, bias = whole(rng, nq, d), whole(rng, n, d), whole(rng, n) * 2
        targets, known = rng.integers(0, n, nq), id_lists(rng, nq, n, 30)
        for options in ({}, {"bias": bias}, {"known": known}, {"bias": bias, "known": known}):
            result = scan.rank(q, x, targets, metric=metric, ties=ties, **options)
            assert_exact(result, ref.rank(q, x, targets, metric, ties=ties, **options))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [100, 4500])
def test_a_target_ties_with_itself_and_its_copies(rng, isa, scan, n, metric):
    """Wherever an item stands, its score has the same bits."""
    q, x, bias = sample(rng, 70, 37), sample(rng, n, 37), sample(rng, n)
    targets = rng.integers(0, n // 2, 70)
    assert_exact(scan.rank(q, x, targets, metric=metric, bias=bias) % 1, np.zeros(70))
    x[n // 2 :], bias[n // 2 :] = x[: n // 2], bias[: n // 2]
    assert_exact(scan.rank(q, x, targets, metric=metric, bias=bias) % 1, np.full(70, 0.5))
    q[:] = q[0]  # equal queries in different lanes and panels
    targets[:] = targets[0]
    assert len(set(scan.rank(q, x, targets, metric=metric, bias=bias))) == 1


def test_rank_of_real_numbers_at_the_size_of_wn18rr(rng):
    q, x = sample(rng, 40, 64), sample(rng, 40943, 64)
    targets = rng.integers(0, 40943, 40)
    every = ref.scores(q, x)
    target = every[np.arange(40), targets][:, None]
    result = pv.scan.rank(q, x, targets)
    close = 1e-4  # scores this close may change places
    assert ((every > target + close).sum(1) < result).all()
    assert (result <= (every >= target - close).sum(1)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [0, 1, 3, 4, 5, 2500])
def test_score_pairs_equal_the_definition(rng, isa, scan, m, metric):
    for d in WIDTHS:
        q, x, bias = sample(rng, 5, d), sample(rng, 60, d), sample(rng, 60)
        ids = rng.integers(0, 60, (5, m))
        for b in (None, bias):
            size = np.take_along_axis(sizes(rng, q, x, metric) + (0 if b is None else np.abs(b)), ids, 1)
            result = scan.score_pairs(q, x, ids, metric=metric, bias=b)
            assert_reduction(result, ref.score_pairs(q, x, ids, metric, b), size, length=max(d, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 5, 300])
def test_result_does_not_depend_on_thread_count(rng, nq, metric):
    q, x, bias = sample(rng, nq, 21), sample(rng, 20000, 21), sample(rng, 20000)
    x[10000:] = x[:10000]
    targets, lists, ids = rng.integers(0, 20000, nq), id_lists(rng, nq, 20000), rng.integers(0, 20000, (nq, 50))
    one, two, seven = (
        (
            *pv.scan.topk(q, x, 30, metric=metric, bias=bias, exclude=lists, num_threads=n),
            *pv.scan.nearest(x[:2000], q, metric=metric, num_threads=n),
            pv.scan.rank(q, x, targets, metric=metric, bias=bias, known=lists, num_threads=n),
            pv.scan.score_pairs(q, x, ids, metric=metric, bias=bias, num_threads=n),
        )
        for n in (1, 2, 7)
    )
    for a, b, c in zip(one, two, seven, strict=True):
        assert_exact(a, b)
        assert_exact(a, c)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", QUERIES)
def test_logsumexp_equals_the_definition(rng, isa, scan, nq, metric):
    for n in ITEMS:
        d, scale = int(rng.choice(WIDTHS)), float(rng.choice([0.05, 1, 20]))
        q, x, bias = sample(rng, nq, d), sample(rng, n, d), sample(rng, n)
        size = scale * (sizes(rng, q, x, metric) + np.abs(bias)).max(1, initial=0)
        exclude = id_lists(rng, nq, n)
        for options in ({}, {"bias": bias}, {"exclude": exclude}, {"bias": bias, "exclude": exclude}):
            result = scan.logsumexp(q, x, scale=scale, metric=metric, **options)
            expected = ref.logsumexp(q, x, scale, metric, **options)
            finite = np.isfinite(expected)
            assert_exact(result[~finite], expected[~finite])
            assert_sum_of_scores(result[finite], expected[finite], size[finite], length=max(d, 1), terms=1)


def test_logsumexp_of_two_items_is_an_exponential(rng, isa, scan):
    """log(1 + e^-t), over all t for which it is more than 0."""
    for t in np.float32([0, 1e-6, 0.1, 0.3465, 0.3466, 1, 3, 10, 16, 80, 87.2, 87.4, 200, 1e30]):
        for nq in (1, 8):
            result = scan.logsumexp(np.ones((nq, 1), np.float32), np.float32([[-t], [0]]))
            assert_sum_of_scores(result, np.full(nq, np.log1p(np.exp(-np.float64(t)))), 0, length=1, terms=1)


@pytest.mark.parametrize("nq", [1, 40])
def test_logsumexp_of_scores_without_a_value(rng, isa, scan, nq):
    q, x = np.ones((nq, 1), np.float32), sample(rng, 2000, 1) * 3000
    assert_sum_of_scores(scan.logsumexp(q, x), ref.logsumexp(q, x), 1e4, length=1, terms=1)
    x[3], x[5] = np.nan, -np.inf
    expected = ref.logsumexp(q, np.delete(x, [3, 5], axis=0))
    assert_sum_of_scores(scan.logsumexp(q, x), expected, 1e4, length=1, terms=1)
    x[1999] = np.inf
    assert_exact(scan.logsumexp(q, x), np.full(nq, np.inf))
    assert_exact(scan.logsumexp(q, x[[3, 5]]), np.full(nq, -np.inf))


@pytest.mark.parametrize("metric", METRICS[:2])
@pytest.mark.parametrize("nq", QUERIES)
def test_hinge_is_exact_on_whole_numbers(rng, isa, scan, nq, metric):
    for n in ITEMS[1:]:
        d, margin = int(rng.choice(WIDTHS)), int(rng.choice([-2, 0, 1, 4]))
        q, x, bias = whole(rng, nq, d), whole(rng, n, d), whole(rng, n) * 2
        targets, known = rng.integers(0, n, nq), id_lists(rng, nq, n, 30)
        for options in ({}, {"bias": bias}, {"known": known}, {"bias": bias, "known": known}):
            result = scan.hinge(q, x, targets, margin=margin, metric=metric, **options)
            assert_exact(result, ref.hinge(q, x, targets, margin, metric, **options))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [3, 40])
def test_hinge_of_real_numbers(rng, isa, scan, nq, metric):
    for d in WIDTHS[1:]:
        q, x, bias, targets = sample(rng, nq, d), sample(rng, 700, d), sample(rng, 700), rng.integers(0, 700, nq)
        size = (sizes(rng, q, x, metric) + np.abs(bias)).max(1)
        result = scan.hinge(q, x, targets, metric=metric, bias=bias)
        assert_sum_of_scores(result, ref.hinge(q, x, targets, 1, metric, bias), size, length=d, terms=2 * 700)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 5, 300])
def test_sums_do_not_depend_on_thread_count(rng, isa, nq, metric):
    q, x, bias = sample(rng, nq, 21), sample(rng, 20000, 21), sample(rng, 20000)
    targets, lists = rng.integers(0, 20000, nq), id_lists(rng, nq, 20000)
    results = [
        (
            pv.scan.logsumexp(q, x, metric=metric, bias=bias, exclude=lists, num_threads=n),
            pv.scan.hinge(q, x, targets, metric=metric, bias=bias, known=lists, num_threads=n),
        )
        for n in (1, 2, 7)
    ]
    for other in results[1:]:
        assert_exact(other[0], results[0][0])
        assert_exact(other[1], results[0][1])


NARROW = [np.uint16, np.float16, np.int8]


def stored(x, dtype):
    """Cuts x to a dtype; to the bits of bfloat16 for uint16."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else x.astype(dtype)


def narrow_items(rng, n, d, dtype):
    """Items of real numbers, and scales of both signs for int8."""
    x = sample(rng, n, d) * (40 if dtype == np.int8 else 1)
    return stored(np.clip(x, -127, 127), dtype), {"scales": sample(rng, n) / 40} if dtype == np.int8 else {}


@pytest.mark.parametrize("nq", [1, 9])
def test_queries_too_small_for_steps_count_as_nothing(rng, isa, scan, nq):
    q, items = sample(rng, nq, 20) * np.float32(1e-40), stored(sample(rng, 50, 20) * 40, np.int8)
    assert_exact(scan.topk(q, items, 3)[0], np.zeros((nq, 3)))
    assert_exact(scan.score_pairs(q, items, np.zeros((nq, 3), int)), np.zeros((nq, 3)))
    assert_exact(scan.rank(q, items, np.zeros(nq, int)), np.full(nq, 25.5))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("nq", [1, 6, 9, 33, 67])
def test_narrow_items_are_exact_on_whole_numbers(rng, isa, scan, nq, dtype):
    for n in ITEMS[1:]:
        d = int(rng.choice(WIDTHS)) + 1
        q, x, bias = whole(rng, nq, d), whole(rng, n, d), whole(rng, n) * 2
        q[:, -1], x[:, -1] = 127, 0  # in 127 steps of the largest, whole numbers are exact
        items, options = stored(x, dtype), {}
        if dtype == np.int8 and n % 2:
            options["scales"] = 2.0 ** rng.integers(-2, 3, n).astype(np.float32)
            x *= options["scales"][:, None]
        targets, known, ids = rng.integers(0, n, nq), id_lists(rng, nq, n, 30), rng.integers(0, n, (nq, 7))
        for metric in METRICS[:2]:
            options["metric"] = metric
            both = {"bias": bias, "exclude": known}
            for actual, expected in zip(
                (
                    *scan.topk(q, items, 20, **options, **both),
                    *scan.topk(q, items, 3, **options),
                    *scan.nearest(q, items, **options),
                    scan.rank(q, items, targets, bias=bias, known=known, **options),
                    scan.score_pairs(q, items, ids, bias=bias, **options),
                ),
                (
                    *ref.topk(q, x, 20, metric, **both),
                    *ref.topk(q, x, 3, metric),
                    *ref.nearest(q, x, metric),
                    ref.rank(q, x, targets, metric, bias, known),
                    ref.score_pairs(q, x, ids, metric, bias),
                ),
                strict=True,
            ):
                assert_exact(actual, expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("metric", METRICS[:2])
@pytest.mark.parametrize("nq", [3, 40])
def test_sums_over_narrow_items(rng, isa, scan, nq, metric, dtype):
    for d in (3, 64, 67):
        q, (items, scales), targets = sample(rng, nq, d), narrow_items(rng, 300, d, dtype), rng.integers(0, 300, nq)
        x, met = ref.decoded(items, **scales), ref.rounded(q, dtype)
        size = sizes(rng, met, x, metric).max(1)
        result = scan.logsumexp(q, items, metric=metric, **scales)
        assert_sum_of_scores(result, ref.logsumexp(met, x, 1, metric), size, length=d, terms=1)
        result = scan.hinge(q, items, targets, metric=metric, **scales)
        assert_sum_of_scores(result, ref.hinge(met, x, targets, 1, metric), size, length=d, terms=2 * 300)


@pytest.mark.parametrize("metric", METRICS[:2])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("nq", [3, 40])
def test_narrow_items_of_real_numbers(rng, isa, scan, nq, dtype, metric):
    for d in [*WIDTHS[1:], 300]:
        q, (items, scales) = sample(rng, nq, d), narrow_items(rng, 200, d, dtype)
        x, met = ref.decoded(items, **scales), ref.rounded(q, dtype)
        every, size = ref.scores(met, x, metric), sizes(rng, met, x, metric)
        scores, ids = scan.topk(q, items, 20, metric=metric, **scales)
        best, size_of = np.take_along_axis(every, ids, 1), np.take_along_axis(size, ids, 1)
        assert_reduction(scores, best, size_of, length=d)
        assert_reduction(scores, ref.topk(met, x, 20, metric)[0], size_of.max(1, keepdims=True), length=d)
        assert_reduction(scan.score_pairs(q, items, ids, metric=metric, **scales), best, size_of, length=d)
        nearest = scan.nearest(q, items, metric=metric, **scales)[1]
        assert_reduction(nearest, ref.nearest(met, x, metric)[1], size.max(1), length=d)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("nq", [3, 40])
def test_cosine_of_narrow_items(rng, isa, scan, nq, dtype):
    """Queries whose norm is a power of two, so that they are rounded by nothing but the items' dtype."""
    q, (items, scales) = np.zeros((nq, 70), np.float32), narrow_items(rng, 100, 70, dtype)
    for row in q:
        row[rng.permutation(70)[: rng.choice([1, 4, 16, 64])]] = 2.0
    q *= rng.choice([-1, 1], q.shape)
    items[7], q[1] = 0, 0
    ids = np.argsort(rng.random((nq, 100)), 1)
    expected = ref.scores(q, ref.decoded(items, **scales), "cosine")
    pairs = scan.score_pairs(q, items, ids, metric="cosine", **scales)
    assert_reduction(pairs, np.take_along_axis(expected, ids, 1), 1, length=70)
    scores, _ = scan.topk(q, items, 100, metric="cosine", **scales)
    assert_reduction(scores, -np.sort(-expected, 1), 1, length=70)
    assert_reduction(scan.nearest(q, items, metric="cosine", **scales)[1], expected.max(1), 1, length=70)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_results_do_not_depend_on_threads_or_places(rng, isa, dtype, metric):
    q, (items, scales) = sample(rng, 70, 37), narrow_items(rng, 3000, 37, dtype)
    items[1500:], targets = items[:1500], rng.integers(0, 1500, 70)
    if scales:
        scales["scales"][1500:] = scales["scales"][:1500]
    results = [
        (
            *pv.scan.topk(q, items, 30, metric=metric, num_threads=n, **scales),
            *pv.scan.nearest(q, items, metric=metric, num_threads=n, **scales),
            pv.scan.rank(q, items, targets, metric=metric, num_threads=n, **scales),
        )
        for n in (1, 2, 7)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_exact(a, b)
    assert_exact(results[0][-1] % 1, np.full(70, 0.5))  # a target ties with its copy alone


def test_narrow_items_of_every_library(rng):
    torch = pytest.importorskip("torch")
    q, x = sample(rng, 3, 8), sample(rng, 50, 8)
    bits = stored(x, np.uint16)
    scores, ids = pv.scan.topk(torch.from_numpy(q), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), 5)
    assert isinstance(scores, torch.Tensor)
    assert_exact(scores, pv.scan.topk(q, bits, 5)[0])
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert_exact(ids, pv.scan.topk(q, bits.view(ml_dtypes.bfloat16), 5)[1])
    half = x.astype(np.float16)
    assert_exact(pv.scan.topk(q, torch.from_numpy(half), 5)[0], pv.scan.topk(q, half, 5)[0])


@pytest.mark.parametrize("nq", [1, 40])
def test_narrow_items_without_a_score_are_never_returned(rng, isa, scan, nq):
    q, x = sample(rng, nq, 5), sample(rng, 30, 5)
    x[3], x[17, 2] = np.nan, np.inf
    x[17, 3] = -np.inf
    q[:, 2:4] = 1  # inf - inf
    for dtype in NARROW[:2]:
        ids = scan.topk(q, stored(x, dtype), 30)[1]
        assert_exact(ids[:, 28:], np.full((nq, 2), -1))
        assert not np.isin([3, 17], ids).any()


def block_sparse(rng, n, blocks, block, density):
    """Queries of whole numbers, each with a 127 at its end, as block-sparse and as dense ones."""
    kept = rng.random((n, blocks)) < density
    kept[:, -1:] = True
    dense = whole(rng, n, blocks, block) * kept[:, :, None]
    dense[:, -1:, -1] = 127  # in 127 steps of the largest, whole numbers are exact
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))])
    dense_rows = dense.reshape(n, blocks * block)
    return pv.BlockSparse(dense[kept], np.nonzero(kept)[1], offsets, blocks * block), dense_rows


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (5, 3), (9, 16), (7, 20), (40, 8), (2, 67), (150, 1)])
def test_block_sparse_queries_are_exact_on_whole_numbers(rng, isa, blocks, block, dtype):
    for nq in (0, 1, 3, 9, 33, 67):
        for density in (0, 0.1, 0.6):
            n = int(rng.choice(ITEMS[1:]))
            (q, dense), x = block_sparse(rng, nq, blocks, block, density), whole(rng, n, blocks * block)
            x[:, -1], bias, options = 0, whole(rng, n) * 2, {}
            items = stored(x, dtype)
            if dtype == np.int8 and n % 2:
                options["scales"] = 2.0 ** rng.integers(-2, 3, n).astype(np.float32)
                x *= options["scales"][:, None]
            exclude, ids = id_lists(rng, nq, n, 30), rng.integers(0, n, (nq, 7))
            for metric in METRICS[:2]:
                options["metric"] = metric
                result = pv.scan.topk(q, items, 20, bias=bias, exclude=exclude, **options)
                for actual, expected in zip(result, ref.topk(dense, x, 20, metric, bias, exclude), strict=True):
                    assert_exact(actual, expected)
                for b in (None, bias):
                    pairs = pv.scan.score_pairs(q, items, ids, bias=b, **options)
                    assert_exact(pairs, ref.score_pairs(dense, x, ids, metric, b))


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nq", [1, 7, 100])
def test_block_sparse_queries_of_real_numbers_on_any_threads(rng, isa, nq, metric, dtype):
    kept = rng.random((nq, 25)) < 0.2
    values, offsets = sample(rng, kept.sum(), 6), np.concatenate([[0], np.cumsum(kept.sum(1))])
    q = pv.BlockSparse(values, np.nonzero(kept)[1], offsets, 150)
    items, scales = (sample(rng, 3000, 150), {}) if dtype == np.float32 else narrow_items(rng, 3000, 150, dtype)
    x, met = ref.decoded(items, **scales), ref.rounded(q.to_dense(), dtype)
    if metric == "cosine" and dtype != np.float32:
        norms = np.linalg.norm(q.to_dense(), axis=1, keepdims=True)
        unit = np.divide(q.to_dense(), norms, out=np.zeros((nq, 150), np.float32), where=norms > 0)
        met = ref.rounded(unit, dtype) * norms
        every = np.divide(met @ x.T, norms * np.linalg.norm(x, axis=1), out=np.zeros((nq, 3000)), where=norms > 0)
    else:
        every = ref.scores(met, x, metric)
    size, ids = sizes(rng, met, x, metric) * (1.01 if metric == "cosine" else 1), rng.integers(0, 3000, (nq, 1100))
    pairs = pv.scan.score_pairs(q, items, ids, metric=metric, **scales)
    assert_reduction(pairs, np.take_along_axis(every, ids, 1), np.take_along_axis(size, ids, 1), length=150)
    scores, found = pv.scan.topk(q, items, 20, metric=metric, **scales)
    best = np.sort(every if metric == "l2" else -every, 1)[:, :20] * (1 if metric == "l2" else -1)
    assert_reduction(scores, best, np.take_along_axis(size, found, 1).max(1, keepdims=True), length=150)
    for threads in (2, 7):
        again = pv.scan.topk(q, items, 20, metric=metric, num_threads=threads, **scales)
        assert_exact(again[0], scores)
        assert_exact(again[1], found)
        again = pv.scan.score_pairs(q, items, ids, metric=metric, num_threads=threads, **scales)
        assert_exact(again, pairs)


@pytest.mark.parametrize("dtype", [np.float32, *NARROW[:2]])
def test_what_meets_no_block_of_a_query_is_not_read(rng, isa, dtype):
    q, x = pv.BlockSparse(sample(rng, 3, 16), [0, 1, 2], [0, 2, 3], 160), sample(rng, 50, 160)
    x[:, 48:] = np.nan
    items = stored(x, dtype)
    x[:, 48:] = 0
    scores, ids = pv.scan.topk(q, items, 50)
    assert_exact(np.sort(ids, axis=1), np.tile(np.arange(50), (2, 1)))
    x = stored(x, dtype)
    assert_exact(scores, pv.scan.topk(q, x, 50)[0])
    assert_exact(pv.scan.score_pairs(q, items, ids), pv.scan.score_pairs(q, x, ids))


def test_block_sparse_queries_of_every_library(rng, cpu_lib):
    q, x = block_sparse(rng, 2, 3, 4, 0.5)[0], sample(rng, 9, 12)
    given_q = pv.BlockSparse(cpu_lib(q.values), cpu_lib(q.blocks), cpu_lib(q.offsets), 12)
    scores, ids = pv.scan.topk(given_q, cpu_lib(x), 3)
    assert type(scores) is type(ids) is type(given_q.values)
    assert_exact(ids, pv.scan.topk(q, x, 3)[1])
    pairs = pv.scan.score_pairs(given_q, cpu_lib(x), ids)
    assert type(pairs) is type(given_q.values)
    assert_exact(pairs, pv.scan.score_pairs(q, x, on_host(ids)))


def test_the_caller_gets_the_library_it_gave(rng, lib):
    x = lib(sample(rng, 8, 4))
    offsets, ids = lib(np.array([0, 1, 1])), lib(np.array([3]))
    kind = type(x)
    scores, found = pv.scan.topk(x[:2], x, 3, exclude=(offsets, ids), bias=lib(np.ones(8, np.float32)))
    assert type(scores) is type(found) is kind
    assert all(type(a) is kind for a in pv.scan.nearest(x, x))
    assert type(pv.scan.rank(x[:2], x, ids.repeat(2), known=(offsets, ids))) is kind
    assert type(pv.scan.score_pairs(x[:1], x, lib(np.array([[1, 2]])))) is kind

    pair = lib(np.zeros((2, 3), np.float32)), lib(np.zeros((2, 3), np.int64))
    result = pv.scan.topk(x[:2], x, 3, out=pair)
    assert result[0] is pair[0]
    assert result[1] is pair[1]
    assert_exact(pair[1], pv.scan.topk(x[:2], x, 3)[1])
    for function, arguments, shape, dtype in (
        (pv.scan.rank, ([1, 2],), 2, np.float64),
        (pv.scan.score_pairs, ([[1, 1], [2, 7]],), (2, 2), np.float32),
    ):
        out = lib(np.zeros(shape, dtype))
        assert function(x[:2], x, *arguments, out=out) is out
        assert_exact(out, function(x[:2], x, *arguments))


def test_sums_give_the_library_they_got(rng, lib):
    x = lib(sample(rng, 8, 4))
    for function, arguments in ((pv.scan.hinge, ([1, 2],)), (pv.scan.logsumexp, ())):
        result, out = function(x[:2], x, *arguments), lib(np.zeros(2, np.float32))
        assert type(result) is type(x)
        assert function(x[:2], x, *arguments, out=out) is out
        assert_exact(out, result)


def load(path):
    with lzma.open(path) as file:
        return np.load(file)


def test_sift_neighbours_are_the_known_ones(data):
    vectors = load(data / "sift-10k/vectors.npy.xz").astype(np.float32)
    rows = np.arange(0, 10000, 10)
    base = np.delete(np.arange(10000), rows)
    distances, ids = pv.scan.topk(vectors[rows], vectors[base], 100, metric="l2")
    assert_exact(base[ids], load(data / "sift-10k/neighbors_l2_top100.npy.xz"))
    assert_exact(distances, load(data / "sift-10k/sqdist_l2_top100.npy.xz"))


def test_wordnet_neighbours_are_the_known_ones(data):
    base = load(data / "wordnet-minilm/base_i8.npy.xz").astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    queries = load(data / "wordnet-minilm/queries.npy.xz").astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    known = load(data / "wordnet-minilm/neighbors_ip_top100.npy.xz")
    for metric in ("ip", "cosine", "l2"):
        scores, ids = pv.scan.topk(queries, base, 100, metric=metric)
        assert (ids == known).mean() > 0.999  # scores this close to each other change places
        best = np.float64(queries[:, None]) @ np.float64(base[known]).swapaxes(1, 2)
        np.testing.assert_allclose(scores, 2 - 2 * best[:, 0] if metric == "l2" else best[:, 0], rtol=0, atol=1e-6)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


NAN = np.full((3, 4), np.nan, np.float32)
SPARSE = pv.BlockSparse(np.full((2, 2), np.nan, np.float32), [1, 0], [0, 0, 1, 2], 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.scan.topk(np.zeros((1, 131073), np.float32), np.zeros((2, 131073), np.int8), 1),
            ValueError,
            "scan.topk: items must have a width of at most 131072 in int8, got 131073",
        ),
        (
            lambda: pv.scan.nearest(np.zeros((1, 131073), np.float32), np.zeros((2, 131073), np.int8)),
            ValueError,
            "scan.nearest: centroids must have a width of at most 131072 in int8, got 131073",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 3), 1),
            ValueError,
            "scan.topk: items must have the same d as queries (4), got 3",
        ),
        (
            lambda: pv.scan.topk(SPARSE, zeros(9, 2), 1),
            ValueError,
            "scan.topk: items must have the same d as queries (4), got 2",
        ),
        (
            lambda: pv.scan.topk(SPARSE, zeros(9, 4, dtype=np.int8), 1),
            ValueError,
            "scan.topk: queries must be finite, got NaN or Inf in row 1",
        ),
        (
            lambda: pv.scan.topk(SPARSE, zeros(9, 4), 1, exclude=([0, 1], [3])),
            ValueError,
            "scan.topk: exclude offsets must have one entry more than there are queries (4), got 2",
        ),
        (
            lambda: pv.scan.score_pairs(SPARSE, zeros(9, 4), [[0], [1]]),
            ValueError,
            "scan.score_pairs: ids must have one row a query (3), got 2",
        ),
        (
            lambda: pv.scan.rank(SPARSE, zeros(9, 4), [0, 1, 2]),
            TypeError,
            "scan.rank: queries must be an array of float32, got BlockSparse",
        ),
        (
            lambda: pv.scan.topk(zeros(4), zeros(9, 4), 1),
            ValueError,
            "scan.topk: queries must have 2 axes, got shape (4,)",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4, dtype=np.float64), zeros(9, 4), 1),
            TypeError,
            "scan.topk: queries must be float32, got float64; cast it with .astype('float32')",
        ),
        (lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 0), ValueError, "scan.topk: k must be at least 1, got 0"),
        (lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1.5), TypeError, "scan.topk: k must be an integer, got float"),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, metric="dot"),
            ValueError,
            "scan.topk: metric must be one of 'ip', 'l2', 'cosine', got 'dot'",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, bias=zeros(8)),
            ValueError,
            "scan.topk: bias must have one entry an item (9), got 8",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, exclude=[0]),
            TypeError,
            "scan.topk: exclude must be a pair (offsets, ids), got list",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, exclude=([0, 1, 2], [3, 9])),
            IndexError,
            "scan.topk: exclude ids must be in [0, 9), got 9 at position 1",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, exclude=([0, 2, 1], [3])),
            ValueError,
            "scan.topk: exclude offsets must not run backwards, got 2 then 1 at position 1",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, exclude=([0, 1], [3])),
            ValueError,
            "scan.topk: exclude offsets must have one entry more than there are queries (3), got 2",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, out=(zeros(2, 1), zeros(2, 1))),
            TypeError,
            "scan.topk: out ids must be int64, got float32",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4, dtype=np.int32), 1),
            TypeError,
            "scan.topk: items must be float32 or bfloat16 or float16 or int8 or uint16, got int32; "
            "cast it with .astype('float32')",
        ),
        (
            lambda: pv.scan.topk(zeros(2, 4), zeros(9, 4), 1, scales=zeros(9)),
            ValueError,
            "scan.topk: scales must come with int8 items, got float32",
        ),
        (
            lambda: pv.scan.rank(zeros(2, 4), zeros(9, 4, dtype=np.int8), [0, 1], scales=zeros(8)),
            ValueError,
            "scan.rank: scales must have one entry a row of items (9), got 8",
        ),
        (
            lambda: pv.scan.score_pairs(NAN, zeros(9, 4, dtype=np.int8), [[0], [1], [2]]),
            ValueError,
            "scan.score_pairs: queries must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.scan.nearest(zeros(2, 4), NAN.astype(np.float16)),
            ValueError,
            "scan.nearest: centroids must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.scan.nearest(zeros(2, 4), stored(NAN, np.uint16)),
            ValueError,
            "scan.nearest: centroids must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.scan.nearest(zeros(2, 4), zeros(0, 4)),
            ValueError,
            "scan.nearest: centroids must have at least 1 row, got 0",
        ),
        (
            lambda: pv.scan.nearest(NAN, zeros(2, 4)),
            ValueError,
            "scan.nearest: x must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.scan.nearest(zeros(2, 4), NAN),
            ValueError,
            "scan.nearest: centroids must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.scan.rank(zeros(2, 4), zeros(9, 4), [0, 9]),
            IndexError,
            "scan.rank: targets must be in [0, 9), got 9 at position 1",
        ),
        (
            lambda: pv.scan.rank(zeros(2, 4), zeros(9, 4), [0]),
            ValueError,
            "scan.rank: targets must have one entry a query (2), got 1",
        ),
        (
            lambda: pv.scan.rank(zeros(2, 4), zeros(9, 4), [0, 1], ties="lucky"),
            ValueError,
            "scan.rank: ties must be one of 'realistic', 'optimistic', 'pessimistic', got 'lucky'",
        ),
        (
            lambda: pv.scan.rank(NAN, zeros(9, 4), [0, 1, 2]),
            ValueError,
            "scan.rank: targets must have scores that are numbers, got NaN for query 0",
        ),
        (
            lambda: pv.scan.logsumexp(zeros(2, 4), zeros(9, 4), scale=0),
            ValueError,
            "scan.logsumexp: scale must be a positive finite number, got 0",
        ),
        (
            lambda: pv.scan.logsumexp(zeros(2, 4), zeros(9, 4), scale=float("nan")),
            ValueError,
            "scan.logsumexp: scale must be a positive finite number, got nan",
        ),
        (
            lambda: pv.scan.logsumexp(zeros(2, 4), zeros(9, 4), scale="1"),
            TypeError,
            "scan.logsumexp: scale must be a number, got str",
        ),
        (
            lambda: pv.scan.logsumexp(zeros(2, 4), zeros(9, 4), metric="dot"),
            ValueError,
            "scan.logsumexp: metric must be one of 'ip', 'l2', 'cosine', got 'dot'",
        ),
        (
            lambda: pv.scan.logsumexp(zeros(2, 4), zeros(9, 4), exclude=([0, 0, 1], [9])),
            IndexError,
            "scan.logsumexp: exclude ids must be in [0, 9), got 9 at position 0",
        ),
        (
            lambda: pv.scan.hinge(zeros(2, 4), zeros(9, 4), [0, 9]),
            IndexError,
            "scan.hinge: targets must be in [0, 9), got 9 at position 1",
        ),
        (
            lambda: pv.scan.hinge(zeros(2, 4), zeros(9, 4), [0, 1], margin=float("inf")),
            ValueError,
            "scan.hinge: margin must be a finite number, got inf",
        ),
        (
            lambda: pv.scan.hinge(zeros(2, 4), zeros(9, 4), [0, 1], margin=None),
            TypeError,
            "scan.hinge: margin must be a number, got NoneType",
        ),
        (
            lambda: pv.scan.hinge(NAN, zeros(9, 4), [0, 1, 2]),
            ValueError,
            "scan.hinge: targets must have scores that are numbers, got NaN for query 0",
        ),
        (
            lambda: pv.scan.score_pairs(zeros(2, 4), zeros(9, 4), [[0], [-1]]),
            IndexError,
            "scan.score_pairs: ids must be in [0, 9), got -1 at position 1",
        ),
        (
            lambda: pv.scan.score_pairs(zeros(2, 4), zeros(9, 4), [[0.5], [1]]),
            TypeError,
            "scan.score_pairs: ids must be integers, got float64",
        ),
        (
            lambda: pv.scan.score_pairs(zeros(2, 4), zeros(9, 4), [[0]]),
            ValueError,
            "scan.score_pairs: ids must have one row a query (2), got 1",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
