"""Codecs of integers: scalar quantisation and RaBitQ."""

import lzma

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from evaluation_sets import data  # noqa: F401 (a fixture)
from polyvec import _core, _files
from reference import codes as ref
from reference import scan as ref_scan

METRICS = ["ip", "l2", "cosine"]
SCALAR = [(bits, ranges) for bits in (8, 6, 4) for ranges in ("all", "dimension", "vector")]
CODECS = {
    **{f"scalar-{b}-{r}": (pv.quantize.ScalarQuantizer, {"bits": b, "ranges": r}) for b, r in SCALAR},
    **{f"rabitq-{b}": (pv.quantize.RaBitQ, {"bits": b}) for b in (1, 2, 3, 4, 7, 8)},
}
SQ, RABITQ = "quantize.ScalarQuantizer", "quantize.RaBitQ"


def sample(rng, n, d):
    return rng.standard_normal((n, d), np.float32)


def make(name, dim, **options):
    kind, own = CODECS[name]
    return kind(dim, **own, **options)


def integers(dim, bits, metric="ip"):
    """A scalar quantizer whose codes stand for the numbers 0, 1, 2, ... themselves."""
    codec = pv.quantize.ScalarQuantizer(dim, bits=bits, metric=metric).fit(np.ones((1, dim), np.float32))
    codec.mid, codec.step = np.full(dim, (2**bits - 1) / 2, np.float32), np.ones(dim, np.float32)
    return codec


# The bytes of a code


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout(rng, bits):
    for d in (1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 130, 257, 384, 520):
        x = rng.integers(0, 2**bits, (5, d)).astype(np.float32)
        mid, step = np.full(d, (2**bits - 1) / 2, np.float32), np.ones(d, np.float32)
        codes, decoded = np.empty((5, _core.code_size(d, bits, "")), np.uint8), np.empty_like(x)
        assert _core.code_size(d, bits, "") == sum(-(-d * w // 8) for w in (8, 4, 2, 1) if bits & w)
        _core.codes_scalar_encode(x, mid, step, codes, bits, "", 1)
        _core.codes_decode(codes, mid, step, decoded, bits, "", 1)
        assert_exact(ref.unpack(codes, d, bits), x)
        assert_exact(decoded, x)


@pytest.mark.parametrize(("bits", "ranges"), SCALAR)
def test_scalar_codes_are_the_nearest_numbers(rng, bits, ranges):
    x = sample(rng, 400, 37) * np.linspace(0.1, 3, 37, dtype=np.float32)
    x[7] = 2.5  # no range
    codec = pv.quantize.ScalarQuantizer(37, bits=bits, ranges=ranges).fit(x)
    codes, half = codec.encode(x), (2**bits - 1) / 2
    if ranges == "vector":
        low, high = (np.float64(v) for v in (x.min(1, keepdims=True), x.max(1, keepdims=True)))
        mid, step = (low + high) / 2, (high - low) / (2 * half)
    else:
        mid, step = codec.mid, codec.step
        assert (np.ptp(mid) == 0) == (np.ptp(step) == 0) == (ranges == "all")
    numbers = ref.unpack(codes, 37, bits)
    assert np.abs(numbers - ref.scalar(x, mid, step, bits)).max() <= 1  # halfway between two
    expected = mid + step * (numbers - half)
    decoded = codec.decode(codes)
    assert_reduction(decoded, expected, np.abs(mid) + np.abs(step) * half, length=1)
    nearest = np.abs(np.clip(x, mid - step * half, mid + step * half) - expected)
    assert (nearest <= step * (0.5 + 1e-4)).all()
    assert_exact(decoded[7], x[7]) if ranges == "vector" else None


@pytest.mark.parametrize("ranges", ["all", "dimension"])
def test_a_range_is_shrunk_where_that_loses_less(rng, ranges):
    x = sample(rng, 3000, 16)

    def error():
        return np.square(codec.decode(codec.encode(x)) - x).mean()

    codec = pv.quantize.ScalarQuantizer(16, bits=4, ranges=ranges).fit(x)
    fitted, full = error(), (x.max(0) - x.min(0)) / 15
    assert (codec.step < 0.9 * full).all() if ranges == "dimension" else codec.step[0] < 0.9 * full.max()
    codec.step = full.astype(np.float32)
    assert fitted < 0.9 * error()


# RaBitQ


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 96, 100, 384])
def test_rotation(rng, isa, d):
    x = sample(rng, 9, d)
    codec = pv.quantize.RaBitQ(d, seed=3).fit(x)
    matrix = ref.rotation(codec.signs)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-5)
    rotated = x.copy()
    _core.codes_rotate(codec.signs, rotated, False, 1)
    size = np.linalg.norm(x, axis=1, keepdims=True) + np.zeros_like(x)
    assert_reduction(rotated, x @ matrix.T, size, length=d)
    _core.codes_rotate(codec.signs, rotated, True, 1)
    assert_reduction(rotated, x, size, length=d)


def test_rotation_spreads_single_coordinates():
    codec = pv.quantize.RaBitQ(384).fit(np.ones((1, 384), np.float32))
    x = np.eye(384, dtype=np.float32)
    _core.codes_rotate(codec.signs, x, False, 1)
    assert np.abs(x).max() < 6 / np.sqrt(384)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("d", [20, 100])
def test_rabitq_codes_are_the_closest_in_angle(isa, bits, d):
    # The same rows at every level, and many of the short ones, whose errors differ more from row to row.
    x = sample(np.random.default_rng([bits, d]), 2000 // d, d)
    codec = pv.quantize.RaBitQ(d, bits=bits, metric="l2").fit(x)
    codes = codec.encode(x)
    rotated = (x - codec.centroid) @ ref.rotation(codec.signs).T
    u = ref.unpack(codes, d, bits) - (2**bits - 1) / 2
    lengths = np.linalg.norm(rotated, axis=1)
    cosines = (rotated * u).sum(1) / np.linalg.norm(u, axis=1) / lengths
    best = np.array([ref.best_cosine(row, bits) for row in rotated])
    assert (cosines <= best + 1e-6).all()
    assert ((1 - cosines**2) / (1 - best**2)).mean() <= 1.05  # the squared error, of the least possible
    scale, offset = codes[:, -10:-2].copy().view(np.float32).T
    assert_reduction(scale, lengths**2 / (rotated * u).sum(1), scale, length=d)
    assert_reduction(offset, -(lengths**2) / 2, lengths**2, length=d)
    errors = lengths * np.sqrt((1 - cosines**2) / cosines**2 / (d - 1))
    assert (np.abs(codec.errors(codes) / errors - 1) < 2e-3).all()
    assert (codec.errors(codes) > errors * (1 - 1e-5)).all()  # rounded up
    decoded = codec.decode(codes)
    expected = codec.centroid + (u * scale[:, None]) @ ref.rotation(codec.signs)
    assert_reduction(decoded, expected, np.abs(expected) + lengths[:, None], length=d)


@pytest.mark.parametrize("bits", [1, 2])
def test_rabitq_scores_are_unbiased_and_within_their_bound(rng, bits):
    """Over 300 rotations: the mean of the errors within 5 standard deviations of 0, their size as `errors` says."""
    x, query = sample(rng, 30, 48), sample(rng, 1, 48)
    exact = (query.astype(np.float64) @ x.T)[0]
    deviations, bounds = [], []
    for seed in range(300):
        codec = pv.quantize.RaBitQ(48, bits=bits, seed=seed).fit(x)
        codes = codec.encode(x)
        scores, ids = codec.search(query, codes, 30)
        found = np.empty(30)
        found[ids[0]] = scores[0]
        deviations.append(found - exact)
        bounds.append(codec.errors(codes) * np.linalg.norm(query))
    deviations, bounds = np.array(deviations), np.array(bounds)
    assert (np.abs(deviations.mean(0)) <= 5 * deviations.std(0) / np.sqrt(300)).all()
    assert (np.abs(deviations) <= 1.9 * bounds).mean() > 0.9
    assert 0.7 < (deviations / bounds).std() < 1.2


@pytest.mark.parametrize("bits", [1, 4])
def test_vectors_that_equal_the_centroid(bits):
    x = np.full((5, 12), 2, np.float32)
    codec = pv.quantize.RaBitQ(12, bits=bits, metric="l2").fit(x)
    codes = codec.encode(x)
    assert_exact(codec.decode(codes), x)
    assert_exact(codec.errors(codes), np.zeros(5))
    assert_exact(codec.search(x[:1], codes, 2)[0], [[0, 0]])


# Search


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_are_words_side_by_side(rng, bits):
    for n, d in ((0, 3), (1, 1), (16, 20), (33, 65), (40, 257)):
        codec = pv.quantize.RaBitQ(d, bits=bits, metric="l2").fit(sample(rng, 9, d))
        codes = codec.encode(sample(rng, n, d))
        planes = [-(-d * w // 8) for w in (8, 4, 2, 1) if bits & w]
        parts = np.split(codes[:, :-2], np.cumsum(planes), 1)  # the last one: the factors
        words = [np.pad(part, ((0, -n % 16), (0, -part.shape[1] % 4))) for part in parts]
        packed = codec.pack(codes)
        columns = sum(part.shape[1] for part in words) // 4
        expected = np.concatenate(words, 1).reshape(-1, 16, columns, 4).transpose(0, 2, 1, 3)
        assert_exact(packed.blocks, expected)
        assert len(packed) == n
        assert repr(packed) == f"PackedCodes({n} codes, {n * 4 * packed.blocks.shape[1]} bytes)"


@pytest.mark.parametrize("level", _core.available_isas())
def test_nothing_behind_the_codes_is_read(python, level):
    code = """if True:
        import ctypes, mmap
        import numpy as np
        import polyvec as pv

        page = mmap.PAGESIZE
        memory = mmap.mmap(-1, 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None).mprotect
        assert protect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        rng = np.random.default_rng(0)
        for n in (128, 129, 131, 136, 150):
            codec = pv.quantize.ScalarQuantizer(9).fit(x := rng.standard_normal((n, 9), np.float32))
            codes = codec.encode(x)
            last = np.frombuffer(memory, np.uint8, codes.size, page - codes.size).reshape(codes.shape)
            last[:] = codes
            for found, expected in zip(codec.search(x[:1], last, 5), codec.search(x[:1], codes, 5), strict=True):
                assert (found == expected).all()
            blocks = codec.pack(codes).blocks
            last = np.frombuffer(memory, np.uint8, blocks.size, page - blocks.size).reshape(blocks.shape)
            last[:] = blocks
            packed = pv.quantize.PackedCodes(last, n)
            for found, expected in zip(codec.search(x[:1], packed, 5), codec.search(x[:1], codes, 5), strict=True):
                assert (found == expected).all()
    """
    python("-c", code, POLYVEC_ISA=level)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("nq", [0, 1, 2, 12, 20, 21, 33, 70])
def test_search_is_exact_on_whole_numbers(rng, isa, nq, bits, metric):
    for n in (0, 1, 3, 15, 16, 17, 31, 127, 128, 129, 300):
        d, k = int(rng.choice([1, 3, 15, 64, 65, 100])), int(rng.choice([1, 3, 40]))
        codec = integers(d, bits, metric)
        items = rng.integers(0, 2**bits, (n, d)).astype(np.float32)
        queries = rng.integers(-126, 127, (nq, d)).astype(np.float32)
        queries[:, 0] = 127
        rows = codec.encode(items)
        include = rng.random(n) < 0.4
        for codes in (rows, codec.pack(rows)):
            for actual, exact in zip(
                codec.search(queries, codes, k), ref_scan.topk(queries, items, k, metric), strict=True
            ):
                assert_exact(actual, exact)
            scores, ids = codec.search(queries, codes, k, include=include)
            expected, kept = ref_scan.topk(queries, items[include], k, metric)
            assert_exact(scores, expected)
            assert_exact(ids, np.where(kept >= 0, np.flatnonzero(include)[kept] if include.any() else -1, -1))
            assert_exact(codec.search(queries, codes, k, include=[])[1], np.full((len(queries), k), -1))
            again = codec.search(queries, codes, k, include=np.flatnonzero(include)[::-1])
            assert_exact(again[0], scores)
            assert_exact(again[1], ids)


@pytest.mark.parametrize(
    ("name", "metric"),
    [*((name, metric) for name in ("rabitq", "scalar") for metric in METRICS), ("residual", "ip"), ("residual", "l2")],
)
def test_equal_scores_come_by_smaller_id(rng, name, metric):
    """A constant of the query is added, and distances below 0 are taken for 0, after codes were put in order."""
    x = rng.standard_normal((3000, 12), np.float32) * np.float32(0.01) + 10
    x[rng.permutation(3000)[:1500]] = x[:1500]
    codec = {
        "rabitq": lambda: pv.quantize.RaBitQ(12, bits=2, metric=metric),
        "scalar": lambda: pv.quantize.ScalarQuantizer(12, metric=metric),
        "residual": lambda: pv.quantize.ResidualQuantizer(12, 2, bits=4, metric=metric),
    }[name]().fit(x)
    scores, ids = codec.search(x[:20], codec.encode(x), 200)
    equal = np.diff(scores) == 0
    assert equal.sum() > 100
    assert (np.diff(ids)[equal] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("d", [5, 100])
def test_scores_are_those_of_decoded_vectors(rng, isa, name, metric, d):
    """But for the rounding of the query: half a step of 127 of its largest element, an element."""
    x = sample(rng, 300, d) + 1
    codec = make(name, d, metric=metric).fit(x)
    codes, queries = codec.encode(x), sample(rng, 40, d)
    decoded = np.float64(codec.decode(codes))
    if metric == "cosine":
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    products = queries @ decoded.T
    if isinstance(codec, pv.quantize.RaBitQ):
        deviation, weights = decoded - codec.centroid, queries - (metric == "l2") * codec.centroid
        weights = weights @ ref.rotation(codec.signs).T
        norms = np.square(x - codec.centroid).sum(1)
        exact = np.square(weights).sum(1)[:, None] + norms - 2 * (queries - codec.centroid) @ deviation.T
        reach = np.abs(deviation @ ref.rotation(codec.signs).T).sum(1)
    else:
        exact = ref_scan.scores(queries, decoded, "l2")
        weights = queries if codec.ranges == "vector" else queries * codec.step
        middle = decoded.mean(1, keepdims=True) if codec.ranges == "vector" else codec.mid
        reach = np.abs(decoded - middle if codec.ranges == "vector" else (decoded - middle) / codec.step).sum(1)
        reach = 2 * reach + np.abs(decoded).max(1) * 2
    exact = np.maximum(exact, 0) if metric == "l2" else products
    slack = np.abs(weights).max(1)[:, None] / 254 * reach * (2 if metric == "l2" else 1)
    for nq in (40, 1):
        scores, ids = codec.search(queries[:nq], codes, 300)
        assert_exact(np.sort(ids), np.tile(np.arange(300), (nq, 1)))
        assert (np.diff(scores if metric == "l2" else -scores) >= 0).all()
        error = np.abs(scores - np.take_along_axis(exact[:nq], ids, 1))
        size = np.abs(exact[:nq]).max(1)[:, None] + np.abs(np.take_along_axis(products[:nq], ids, 1))
        assert (error <= np.take_along_axis(slack[:nq], ids, 1) + 1e-5 * (size + 1)).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("nq", [1, 40])
def test_the_largest_products_do_not_overflow(isa, bits, nq):
    """Kernels add them up in 16 bits for a while."""
    d, half = 1030, (2**bits - 1) / 2
    numbers = np.zeros((40, d), np.float32)
    numbers[::2] = 2**bits - 1
    numbers[20:, ::3] = 2**bits - 1
    codes = np.empty((40, _core.code_size(d, bits, "")), np.uint8)
    _core.codes_scalar_encode(numbers, np.full(d, half, np.float32), np.ones(d, np.float32), codes, bits, "", 1)
    weights = np.full((nq, d), 127, np.float32)
    weights[::3] = -127
    weights[::4, ::2] = -127
    blocks = np.empty((3, _core.code_columns(d, bits, ""), 16, 4), np.uint8)
    _core.codes_pack(codes, blocks, d, bits, "", 1)
    zeros, scores, ids = np.zeros(nq, np.float32), np.empty((nq, 40), np.float32), np.empty((nq, 40), np.int64)
    for table in (codes, blocks):
        _core.codes_search(weights, zeros, zeros, table, 40, None, scores, ids, bits, "", False, 1)
        assert_exact(scores, np.take_along_axis(np.float64(weights) @ (numbers - half).T, ids, 1))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("metric", METRICS)
def test_codes_and_results_are_the_same_at_every_level(rng, name, metric):
    results, before = [], _core.active_isa()
    x, queries = sample(rng, 500, 75), sample(rng, 40, 75)
    for isa in _core.available_isas():
        _core.force_isa(isa)
        codec = make(name, 75, metric=metric).fit(x)
        codes = codec.encode(x)
        packed = codec.pack(codes)
        of_two = codec.search(queries[:2], codes, 9)
        results.append((codes, packed.blocks, codec.decode(codes), *codec.search(queries, codes, 9), *of_two))
        assert_exact(codec.search(queries, packed, 9), codec.search(queries, codes, 9))
        assert_exact(codec.search(queries[:2], packed, 9), of_two)
    _core.force_isa(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("name", ["scalar-8-all", "scalar-6-vector", "rabitq-3"])
def test_result_does_not_depend_on_thread_count(rng, name):
    x = sample(rng, 9000, 24)
    results = []
    for n in (1, 2, 7):
        codec = make(name, 24, metric="l2").fit(x, num_threads=n)
        codes = codec.encode(x, num_threads=n)
        many = np.tile(codes, (20, 1))  # several ranges of codes, and equal scores between them
        results.append([
            codes, codec.decode(codes, num_threads=n),
            *codec.search(x[:2], many, 70, num_threads=n), *codec.search(x[:600], codes, 5, num_threads=n),
            *codec.search(x[:2], codec.pack(many, num_threads=n), 70, num_threads=n),
        ])  # fmt: skip
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("name", ["scalar-4-vector", "rabitq-7"])
def test_a_query_scores_alone_as_it_does_in_a_batch(rng, isa, name):
    codec = make(name, 95, metric="l2").fit(sample(rng, 50, 95))
    queries, codes = sample(rng, 70, 95), codec.encode(sample(rng, 3000, 95))
    scores, ids = codec.search(queries, codes, 9)
    for q in range(0, 70, 7):
        for table in (codes, codec.pack(codes)):
            alone = codec.search(queries[q : q + 1], table, 9)
            assert_exact(alone[0], scores[q : q + 1])
            assert_exact(alone[1], ids[q : q + 1])


@pytest.mark.parametrize("name", ["scalar-8-dimension", "rabitq-1", "rabitq-4"])
@pytest.mark.parametrize("k", [1, 100, 250])
def test_the_best_lie_side_by_side(rng, isa, name, k):
    """Every 32nd code, the first ones or the last are the best: a sample of the codes misleads."""
    n, d = 12_000, 24
    queries = sample(rng, 45, d)
    for good in (np.arange(n) % 32 == 0, np.arange(n) % 640 == 0, np.arange(n) < 50, np.arange(n) >= n - 700):
        x = sample(rng, n, d) / 10
        x[good] += queries[:40].sum(0) / 6 + queries[44]
        codec = make(name, d).fit(x)
        codes = codec.encode(x)
        parts = [codec.search(queries, codes[i : i + 500], k) for i in range(0, n, 500)]
        scores = np.concatenate([s for s, _ in parts], 1)
        ids = np.concatenate([i + 500 * b for b, (_, i) in enumerate(parts)], 1)
        order = np.array([np.lexsort((i, -s))[:k] for s, i in zip(scores, ids, strict=True)])
        for num_threads, table in ((1, codes), (2, codes), (2, codec.pack(codes))):
            found = codec.search(queries, table, k, num_threads=num_threads)
            assert_exact(found[0], np.take_along_axis(scores, order, 1))
            assert_exact(found[1], np.take_along_axis(ids, order, 1))


@pytest.mark.parametrize("name", ["scalar-8-dimension", "rabitq-2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_query_finds_what_is_not_a_number(rng, isa, name, bad):
    codec = make(name, 8).fit(sample(rng, 9, 8))
    for nq in (3, 40):
        queries = sample(rng, nq, 8)
        queries[2, 3] = bad
        scores, ids = codec.search(queries, codec.encode(sample(rng, 20, 8)), 3)
        assert_exact(ids[2], [-1, -1, -1])
        assert_exact(scores[2], [-np.inf] * 3)
        assert (ids[1] >= 0).all()


def test_zero_vectors_have_cosine_zero(rng):
    x = sample(rng, 30, 16)
    x[4] = 0
    codec = pv.quantize.ScalarQuantizer(16, ranges="vector", metric="cosine").fit(x)
    scores, ids = codec.search(np.ones((1, 16), np.float32), codec.encode(x), 30)
    assert scores[0, ids[0] == 4] == 0
    assert_exact(codec.search(np.zeros((1, 16), np.float32), codec.encode(x), 2), [[[0, 0]], [[0, 1]]])


# Arrays


@pytest.mark.parametrize("name", ["scalar-6-all", "rabitq-4"])
def test_the_caller_gets_the_library_it_gave(rng, lib, name):
    x = lib(sample(rng, 300, 8))
    kind = type(x)
    codec = make(name, 8).fit(x)
    codes = codec.encode(x)
    results = codes, codec.decode(codes), *codec.search(x, codes, 3)
    assert all(type(result) is kind for result in results)
    out = [lib(np.zeros_like(np.asarray(result))) for result in results]
    assert codec.encode(x, out=out[0]) is out[0]
    assert codec.decode(codes, out=out[1]) is out[1]
    assert codec.search(x, codes, 3, out=(out[2], out[3]))[0] is out[2]
    for a, b in zip(results, out, strict=True):
        assert_exact(a, b)
    assert_exact(codec.encode(np.asarray(x).tolist()), codes)
    assert_exact(
        codec.search(x, codes, 3, include=lib(np.arange(0, 300, 3)))[1],
        codec.search(x, codes, 3, include=lib(np.arange(300) % 3 == 0))[1],
    )


@pytest.mark.parametrize("name", ["scalar-8-vector", "rabitq-4"])
def test_halves_are_converted(rng, name):
    x = sample(rng, 40, 12).astype(np.float16)
    wide = x.astype(np.float32)
    codec = make(name, 12).fit(x)
    codes = codec.encode(x)
    assert_exact(codes, codec.encode(wide))
    assert_exact(codec.search(x, codes, 3)[0], codec.search(wide, codes, 3)[0])
    torch = pytest.importorskip("torch")
    b = torch.from_numpy(wide).bfloat16()
    assert_exact(codec.encode(b), codec.encode(b.float()))
    assert_exact(codec.search(b, codec.encode(b), 2)[1], codec.search(b.float(), codec.encode(b), 2)[1])


def test_strided_input(rng):
    big = sample(rng, 300, 20)
    x = big[::2, 3:11]
    codec = pv.quantize.RaBitQ(8).fit(x)
    codes = codec.encode(x)
    assert_exact(codes, codec.encode(x.copy()))
    assert_exact(codec.search(x, np.repeat(codes, 2, 0)[::2], 5)[1], codec.search(x.copy(), codes, 5)[1])


@pytest.mark.parametrize("name", ["scalar-4-dimension", "rabitq-1"])
def test_memory_maps_are_encoded_in_blocks(rng, tmp_path, name):
    n = (1 << 14) + 100
    source = np.memmap(tmp_path / "x", np.float16, "w+", shape=(n, 6))
    source[:] = rng.standard_normal((n, 6)).astype(np.float16)
    codec, seen = make(name, 6).fit(source), []
    out = np.memmap(tmp_path / "codes", np.uint8, "w+", shape=(n, codec.code_size))
    assert codec.encode(source, out=out, progress=lambda *counts: seen.append(counts)) is out
    assert seen == [(1 << 14, n), (n, n)]
    assert_exact(out, codec.encode(np.asarray(source)))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.encode(source, progress=stop)


# Files


@pytest.mark.parametrize("name", ["scalar-6-dimension", "scalar-4-vector", "rabitq-3"])
def test_save_and_load(rng, tmp_path, name):
    x, path = sample(rng, 400, 12), tmp_path / "codec.safetensors"
    codec = make(name, 12, metric="l2").fit(x)
    codec.save(path)
    other = type(codec).load(path)
    assert repr(other) == repr(codec)
    assert codec.nbytes == sum(t.nbytes for t in codec.state().tensors.values()) > 0
    codes = codec.encode(x)
    assert_exact(other.encode(x), codes)
    for ours, theirs in zip(codec.search(x, codes, 4), other.search(x, codes, 4), strict=True):
        assert_exact(ours, theirs)
    state = codec.state()
    first = next(iter(state.tensors))
    shape = state.tensors[first].shape
    state.tensors[first] = state.tensors[first][..., 1:]
    kind = codec._KIND
    _files.save(path, kind, state)
    with pytest.raises(pv.FormatError) as caught:
        type(codec).load(path)
    cut = (*shape[:-1], shape[-1] - 1)
    assert str(caught.value) == (
        f"{kind}.load: {path} is damaged: ValueError: {first} must be float32 of shape {shape}, got float32 of "
        f"shape {cut}"
    )


def test_repr():
    assert repr(pv.quantize.RaBitQ(8, bits=2)) == "RaBitQ(8, bits=2, metric='ip', seed=0), not fitted"
    codec = pv.quantize.ScalarQuantizer(8).fit(np.ones((1, 8), np.float32))
    assert repr(codec) == "ScalarQuantizer(8, bits=8, ranges='all', metric='ip')"


# Real data


@pytest.mark.parametrize(
    ("name", "recall"),
    [("scalar-8-all", 0.98), ("scalar-6-dimension", 0.95), ("scalar-4-vector", 0.83), ("rabitq-1", 0.5),
     ("rabitq-2", 0.69), ("rabitq-4", 0.9), ("rabitq-8", 0.98)],
)  # fmt: skip
def test_sift(data, name, recall):  # noqa: F811
    def load(name):
        with lzma.open(data / "sift-10k" / name) as file:
            return np.load(file)

    x, neighbors = load("vectors.npy.xz").astype(np.float32), load("neighbors_l2_top100.npy.xz")
    base, queries, neighbors = np.delete(x, np.s_[::10], 0), x[::10], neighbors - neighbors // 10 - 1
    codec = make(name, 128, metric="l2").fit(base)
    _, ids = codec.search(queries, codec.encode(base), 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, neighbors[:, :10], strict=True)]) >= recall


# Errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def fitted():
    return pv.quantize.RaBitQ(8).fit(np.eye(8, dtype=np.float32))


def codes_of(n):
    return zeros(n, fitted().code_size, dtype=np.uint8)


def packed_of(bits):
    codec = pv.quantize.RaBitQ(8, bits=bits).fit(np.eye(8, dtype=np.float32))
    return codec.pack(zeros(3, codec.code_size, dtype=np.uint8))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.quantize.ScalarQuantizer(8, bits=5),
            ValueError,
            f"{SQ}: bits must be one of 8, 6, 4, got 5",
        ),
        (
            lambda: pv.quantize.ScalarQuantizer(8, ranges="row"),
            ValueError,
            f"{SQ}: ranges must be one of 'all', 'dimension', 'vector', got 'row'",
        ),
        (
            lambda: pv.quantize.RaBitQ(8, bits=9),
            ValueError,
            f"{RABITQ}: bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9",
        ),
        (
            lambda: pv.quantize.RaBitQ(8, bits=4.0),
            TypeError,
            f"{RABITQ}: bits must be an integer, got float",
        ),
        (
            lambda: pv.quantize.RaBitQ(8, metric="dot"),
            ValueError,
            f"{RABITQ}: metric must be one of 'ip', 'l2', 'cosine', got 'dot'",
        ),
        (
            lambda: pv.quantize.RaBitQ(40_000),
            ValueError,
            f"{RABITQ}: dim must be at most 32768, got 40000",
        ),
        (
            lambda: pv.quantize.RaBitQ(8).encode(zeros(1, 8)),
            RuntimeError,
            f"{RABITQ}.encode: the quantizer must be fitted before; call fit(x)",
        ),
        (
            lambda: fitted().search(zeros(1, 8), packed_of(8), 1),
            ValueError,
            f"{RABITQ}.search: codes must have blocks of shape (2, 16, 4), got (3, 16, 4)",
        ),
        (
            lambda: fitted().pack(zeros(3, 5, dtype=np.uint8)),
            ValueError,
            f"{RABITQ}.pack: codes must have 10 bytes a row, got 5",
        ),
        (
            lambda: pv.quantize.PackedCodes(zeros(3, 64, dtype=np.uint8), 3),
            ValueError,
            "quantize.PackedCodes: blocks must have 3 or 4 axes, got 2",
        ),
        (
            lambda: pv.quantize.ScalarQuantizer(8).fit(zeros(0, 8)),
            ValueError,
            f"{SQ}.fit: x must have at least 1 row, got 0",
        ),
        (
            lambda: pv.quantize.RaBitQ(8).fit(zeros(0, 8)),
            ValueError,
            f"{RABITQ}.fit: x must have at least 1 row, got 0",
        ),
        (
            lambda: fitted().encode(zeros(3, 9)),
            ValueError,
            f"{RABITQ}.encode: x must have d = 8, got 9",
        ),
        (
            lambda: fitted().encode(np.concatenate([zeros(1 << 14, 8), np.full((1, 8), np.nan, np.float32)])),
            ValueError,
            f"{RABITQ}.encode: x must be finite, got NaN or Inf in row 16384",
        ),
        (
            lambda: fitted().encode(zeros(3, 8, dtype=np.float64)),
            TypeError,
            f"{RABITQ}.encode: x must be float32 or float16 or bfloat16, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: fitted().decode(zeros(3, 5, dtype=np.uint8)),
            ValueError,
            f"{RABITQ}.decode: codes must have 10 bytes a row, got 5",
        ),
        (
            lambda: fitted().search(zeros(3, 8), codes_of(3), 0),
            ValueError,
            f"{RABITQ}.search: k must be at least 1, got 0",
        ),
        (
            lambda: fitted().search(zeros(3, 8), codes_of(3), 1, include=[True, False]),
            ValueError,
            f"{RABITQ}.search: include must have one entry a code (3), got 2",
        ),
        (
            lambda: fitted().search(zeros(3, 8), codes_of(3), 1, include=[0, 3]),
            IndexError,
            f"{RABITQ}.search: include must be in [0, 3), got 3 at position 1",
        ),
        (
            lambda: fitted().search(zeros(3, 8), codes_of(3), 1, include=[0.5]),
            TypeError,
            f"{RABITQ}.search: include must be integers, got float64",
        ),
        (
            lambda: fitted().search(zeros(3, 8), codes_of(3), 1, num_threads=0),
            ValueError,
            f"{RABITQ}.search: num_threads must be at least 1, got 0",
        ),
        (
            lambda: fitted().errors(zeros(3, 5, dtype=np.uint8)),
            ValueError,
            f"{RABITQ}.errors: codes must have 10 bytes a row, got 5",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
