"""Codes that find candidates and vectors that put them in order, with and without a certificate."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from reference import scan as ref_scan

METRICS = ["ip", "l2", "cosine"]
REFINED = "quantize.Refined"
CODECS = {
    "scalar-8": lambda d, metric: pv.quantize.ScalarQuantizer(d, metric=metric),
    "scalar-6-dimension": lambda d, metric: pv.quantize.ScalarQuantizer(d, bits=6, ranges="dimension", metric=metric),
    "scalar-8-vector": lambda d, metric: pv.quantize.ScalarQuantizer(d, ranges="vector", metric=metric),
    "rabitq-1": lambda d, metric: pv.quantize.RaBitQ(d, bits=1, metric=metric),
    "rabitq-8": lambda d, metric: pv.quantize.RaBitQ(d, bits=8, metric=metric),
}


def sample(rng, n, d):
    return rng.standard_normal((n, d), np.float32) + np.float32(0.5)


def check(queries, x, k, metric, scores, ids):
    """The exact k best in float64, but for pairs that float32 cannot tell apart."""
    exact = ref_scan.scores(queries, x, metric)
    expected, _ = ref_scan.topk(queries, x, k, metric)
    size = (np.linalg.norm(queries, axis=1)[:, None] + np.linalg.norm(x, axis=1).max()) ** 2 + np.zeros(ids.shape)
    assert_reduction(scores, expected, size, length=x.shape[1])
    assert_reduction(scores, np.take_along_axis(exact, ids, 1), size, length=x.shape[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CODECS)
def test_certified_results_are_the_exact_ones(rng, isa, name, metric):
    for n, d, k in ((1, 3, 1), (40, 8, 7), (700, 24, 10), (1500, 64, 3)):
        x, queries = sample(rng, n, d), sample(rng, 9, d)
        codec = pv.quantize.Refined(CODECS[name](d, metric), factor=1).fit(x)
        scores, ids, rescored = codec.search(queries, codec.encode(x), min(k, n), certified=True)
        check(queries, x, min(k, n), metric, scores, ids)
        assert ((rescored >= min(k, n)) & (rescored <= n)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_eight_bits_certify_with_few(rng, metric):
    x, queries = sample(rng, 4000, 32), sample(rng, 20, 32)
    codec = pv.quantize.Refined(pv.quantize.ScalarQuantizer(32, metric=metric), factor=2).fit(x)
    encoded = codec.encode(x)
    result = codec.search(queries, encoded, 10, certified=True)
    assert result.rescored.mean() < 400
    packed = encoded._replace(codes=codec.codec.pack(encoded.codes))
    for found, expected in zip(codec.search(queries, packed, 10, certified=True), result, strict=True):
        assert_exact(found, expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CODECS)
def test_outliers_do_not_spoil_the_bound_of_all(rng, name, metric):
    x, queries = sample(rng, 4000, 32), sample(rng, 20, 32)
    x[[7, 2000, 3999]] *= np.float32([[30], [500], [0.001]])
    codec = pv.quantize.Refined(CODECS[name](32, metric)).fit(x)
    encoded = codec.encode(x)
    result = codec.search(queries, encoded, 10, certified=True)
    check(queries, x, 10, metric, result.scores, result.ids)
    if name == "rabitq-8":
        assert result.rescored.mean() < 400
    mask = rng.integers(0, 2, 4000).astype(bool)
    mask[7] = True
    chosen = np.flatnonzero(mask)
    for include in (mask, chosen[::-1]):
        scores, ids, rescored = codec.search(queries, encoded, 10, certified=True, include=include)
        expected = codec.search(queries, codec.encode(x[chosen]), 10, certified=True)
        assert_exact(ids, chosen[expected.ids])
        assert_exact(scores, expected.scores)
        assert (rescored <= len(chosen)).all()


def test_a_certificate_needs_more_than_the_first_candidates(rng):
    """One bit: the candidates of factor 1 miss some of the best."""
    x, queries = sample(rng, 2000, 16), sample(rng, 30, 16)
    codec = pv.quantize.Refined(pv.quantize.RaBitQ(16, bits=1), factor=1).fit(x)
    encoded = codec.encode(x)
    plain, sure = (codec.search(queries, encoded, 5, certified=c) for c in (False, True))
    assert (plain[1] != sure.ids).any()
    check(queries, x, 5, "ip", sure.scores, sure.ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rerank", ["float32", "float16", "int8"])
def test_scores_are_those_of_the_kept_vectors(rng, rerank, metric):
    x, queries = sample(rng, 300, 20), sample(rng, 6, 20)
    codec = pv.quantize.Refined(pv.quantize.RaBitQ(20, bits=4, metric=metric), rerank=rerank, factor=30).fit(x)
    encoded = codec.encode(x)
    kept = codec.decode(encoded)
    assert encoded.vectors.dtype == rerank
    assert np.abs(kept - x).max() <= {"float32": 0, "float16": 2e-3, "int8": np.abs(x).max() / 250}[rerank]
    scores, ids = codec.search(queries, encoded, 10)  # all 300 are candidates
    if rerank != "int8":
        return check(queries, kept, 10, metric, scores, ids)
    exact = np.take_along_axis(ref_scan.scores(queries, kept, metric), ids, 1)  # int8: the query is rounded, too
    assert (np.abs(scores - exact) < 0.02 * np.abs(ref_scan.scores(queries, kept, metric)).max()).all()
    return None


def test_product_codes_are_refined(rng):
    x, queries = sample(rng, 600, 16), sample(rng, 6, 16)
    codec = pv.quantize.Refined(pv.quantize.ProductQuantizer(16, 4, metric="l2"), factor=60).fit(x)
    encoded = codec.encode(x)
    check(queries, x, 10, "l2", *codec.search(queries, encoded, 10))
    with pytest.raises(ValueError, match="must have bounds"):
        codec.search(queries, encoded, 10, certified=True)


def test_include_and_missing(rng):
    x = sample(rng, 50, 8)
    codec = pv.quantize.Refined(pv.quantize.ScalarQuantizer(8, metric="l2")).fit(x)
    for certified in (False, True):
        scores, ids = codec.search(x[:2], codec.encode(x), 4, include=[3, 9], certified=certified)[:2]
        assert_exact(np.sort(ids[:, :2]), [[3, 9], [3, 9]])
        assert_exact(ids[:, 2:], np.full((2, 2), -1))
        assert_exact(scores[:, 2:], np.full((2, 2), np.inf))
    nothing = codec.search(x[:2], codec.encode(x[:0]), 3)
    assert_exact(nothing[1], np.full((2, 3), -1))


def test_libraries_out_progress_and_files(rng, lib, tmp_path):
    x, seen = sample(rng, 300, 12), []
    codec = pv.quantize.Refined(pv.quantize.RaBitQ(12, bits=3), rerank="float16", factor=5).fit(lib(x))
    encoded = codec.encode(lib(x), progress=lambda *counts: seen.append(counts))
    assert seen == [(300, 300)]
    scores, ids = codec.search(lib(x[:4]), encoded, 3)
    out = lib(np.empty((4, 3), np.float32)), lib(np.empty((4, 3), np.int64))
    assert type(scores) is type(out[0])
    assert codec.search(lib(x[:4]), encoded, 3, out=out)[0] is out[0]
    assert_exact(out[1], ids)
    codec.save(tmp_path / "codec")
    other = pv.quantize.Refined.load(tmp_path / "codec")
    assert repr(other) == repr(codec)
    assert codec.nbytes == other.nbytes == 4 * 12 + 4 * 4 * 12
    assert_exact(other.encode(x).codes, encoded.codes)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda codec, x: pv.quantize.Refined(3),
            TypeError,
            f"{REFINED}: codec must be ProductQuantizer or RaBitQ or ResidualQuantizer or ScalarQuantizer, got int",
        ),
        (
            lambda codec, x: codec.encode(x.astype(np.float64)),
            TypeError,
            f"{REFINED}.encode: x must be float32, float16 or bfloat16, got float64",
        ),
        (
            lambda codec, x: codec.search(x.astype(np.int64), codec.encode(x), 1),
            TypeError,
            f"{REFINED}.search: queries must be float32, float16 or bfloat16, got int64",
        ),
        (
            lambda codec, x: pv.quantize.Refined(codec.codec, rerank="int4"),
            ValueError,
            f"{REFINED}: rerank must be one of 'float32', 'float16', 'int8', got 'int4'",
        ),
        (
            lambda codec, x: pv.quantize.Refined(codec.codec, factor=0),
            ValueError,
            f"{REFINED}: factor must be at least 1, got 0",
        ),
        (
            lambda codec, x: codec.search(x, x, 1),
            TypeError,
            f"{REFINED}.search: encoded must be RefinedCodes, got ndarray",
        ),
        (
            lambda codec, x: codec.search(x * np.float32(np.nan), codec.encode(x), 1, certified=True),
            ValueError,
            f"{REFINED}.search: queries must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda codec, x: pv.quantize.Refined(codec.codec, rerank="float16").encode(x * np.float32(1e6)),
            ValueError,
            f"{REFINED}.encode: x must be finite, got NaN or Inf in row 0",
        ),
    ],
)
def test_errors(call, error, text):
    x = np.ones((3, 8), np.float32)
    with pytest.raises(error) as caught:
        call(pv.quantize.Refined(pv.quantize.ScalarQuantizer(8)).fit(x), x)
    assert str(caught.value) == text
