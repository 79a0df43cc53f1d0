"""The certified top-k: equal to that of the float tokens, bit for bit, whatever the tokens are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
import ranking
from accuracy import assert_exact
from reference import packed as stored


def sample(rng, lengths, d):
    return [rng.standard_normal((n, d)).astype(np.float32) for n in lengths]


def assert_certified(queries, docs, k, **options):
    packed = pv.maxsim.pack(docs, "int8")
    best = pv.maxsim.certified_topk(queries, packed, docs, k, **options)
    scores, ids = pv.maxsim.topk(queries, docs, k)
    assert_exact(best.ids, ids)
    assert_exact(best.scores, scores)
    assert best.rescored.shape == (len(queries),)
    assert ((best.rescored >= min(k, len(docs))) & (best.rescored <= len(docs))).all()
    return best


@pytest.mark.parametrize("d", [0, 1, 4, 17, 128, 300])
@pytest.mark.parametrize("k", [1, 7, 90])
def test_equals_topk(rng, isa, d, k):
    queries = sample(rng, [5, 0, 32, 1, 70], d)
    docs = sample(rng, rng.integers(0, 30, 80), d)
    best = assert_certified(queries, docs, k)
    for threads in (2, 7):
        other = assert_certified(queries, docs, k, num_threads=threads)
        assert_exact(other.rescored, best.rescored)


@pytest.mark.parametrize("dtype", ["residual2", "residual4"])
def test_residuals(rng, isa, dtype):
    queries, docs = sample(rng, [5, 32], 20), sample(rng, rng.integers(0, 30, 80), 20)
    docs = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in docs]
    packed = pv.maxsim.pack(docs, dtype, centroids=np.concatenate(docs)[::5])
    best, (scores, ids) = pv.maxsim.certified_topk(queries, packed, docs, 7), pv.maxsim.topk(queries, docs, 7)
    assert_exact(best.ids, ids)
    assert_exact(best.scores, scores)


def test_few_are_rescored(rng):
    docs = rng.standard_normal((400, 6, 32), np.float32)
    best = assert_certified(docs[:10], docs, 1)
    assert_exact(best.ids[:, 0], np.arange(10))
    assert_exact(best.rescored, np.ones(10))


def test_near_ties(rng):
    """Documents that differ by less than an int8 step: screening cannot tell them apart."""
    docs = np.repeat(rng.standard_normal((3, 4, 16), np.float32), 40, axis=0)
    docs += rng.standard_normal(docs.shape, np.float32) * np.float32(1e-4)
    docs[7::9] = docs[7]
    best = assert_certified(docs[[0, 7, 50]] + np.float32(0.01), docs, 5)
    assert (best.rescored >= 30).all()


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-25, 1e-19, 1e17, 1e30])
def test_extreme_elements(rng, isa, scale):
    """Products that underflow or overflow, rounding steps that no float32 holds."""
    queries, docs = sample(rng, [3, 20], 24), sample(rng, [4] * 50, 24)
    for at in (1, scale):
        assert_certified([np.float32(scale) * q for q in queries], [np.float32(at) * x for x in docs], 6)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 12), st.sampled_from([0.01, 1.0, 4.0]), st.booleans()
)
def test_any_distribution(seed, d, k, tail, coarse):
    """Heavy tails, where a token's largest element hides the others, and grids, where scores tie."""
    rng = np.random.default_rng(seed)
    docs = [np.sign(x) * np.abs(x) ** np.float32(tail) for x in sample(rng, rng.integers(0, 9, 40), d)]
    if coarse:
        docs = [np.rint(x) for x in docs]
    assert_certified(sample(rng, [4, 9], d), docs, k)


def test_screening_errs_by_less_than_the_bound(rng):
    """The bounds that packing stores, against those of the decoded tokens."""
    docs = sample(rng, [4, 1, 9, 0], 20)
    bounds = pv.maxsim.pack(docs, "int8")._bounds
    for x, (error, rounded, size) in zip(docs, bounds.astype(np.float64), strict=True):
        decoded = stored.decoded(x, "int8")
        norm = [np.linalg.norm(y, axis=1) for y in (x - decoded, decoded)]
        largest = [
            *(y.max(initial=0) for y in norm),
            (np.linalg.norm(x.astype(np.float64), axis=1) + norm[1]).max(initial=0),
        ]
        assert ((error, rounded, size) >= np.array(largest)).all()
        np.testing.assert_allclose((error, rounded, size), largest, rtol=1e-6, atol=1e-44)


def test_libraries_slices_files_and_out(rng, lib, tmp_path):
    docs, queries = rng.standard_normal((30, 5, 8), np.float32), rng.standard_normal((4, 3, 8), np.float32)
    packed = pv.maxsim.pack(lib(docs), "int8")
    packed.save(tmp_path / "docs.safetensors")
    loaded = pv.maxsim.PackedTokens.load(tmp_path / "docs.safetensors", mmap=True)
    out = lib(np.empty((4, 3), np.float32)), lib(np.empty((4, 3), np.int64))
    best = pv.maxsim.certified_topk(lib(queries), packed, lib(docs), 3, out=out)
    assert best.scores is out[0]
    assert best.ids is out[1]
    assert type(best.rescored) is type(out[0])
    for part, tokens in ((loaded, docs), (packed[3:20], docs[3:20]), (packed.take([9, 2, 9, 4]), docs[[9, 2, 9, 4]])):
        best = pv.maxsim.certified_topk(lib(queries), part, lib(np.ascontiguousarray(tokens)), 3)
        scores, ids = pv.maxsim.topk(queries, tokens, 3)
        assert_exact(best.ids, ids)
        assert_exact(best.scores, scores)


@pytest.mark.parametrize("name", ["cranfield", "scifact"])
def test_few_documents_of_real_sets_are_rescored(data, name):
    docs, queries, _ = ranking.read(data / name)
    best = assert_certified(queries.take(range(15)), docs, 10)
    assert best.rescored.mean() < 0.02 * len(docs)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda p: (ones(2, 3, 4), [], ones(5, 2, 4)),
            TypeError,
            "packed must be PackedTokens, got list",
        ),
        (
            lambda p: (ones(2, 3, 4), p(ones(5, 2, 4)), ones(5, 2, 4)),
            TypeError,
            "packed must be int8 or residual codes, got float32",
        ),
        (
            lambda p: (ones(2, 3, 4), p(ones(5, 2, 4), "int8"), ones(5, 3, 4)),
            ValueError,
            "docs must have the lengths of the packed documents",
        ),
        (
            lambda p: (ones(2, 3, 4), p(ones(5, 2, 4), "int8"), ones(5, 2, 8)),
            ValueError,
            "docs must have the same d as queries (4), got 8",
        ),
        (
            lambda p: (ones(2, 3, 4) * np.inf, p(ones(5, 2, 4), "int8"), ones(5, 2, 4)),
            ValueError,
            "queries must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda p: (ones(2, 3, 4).astype(np.float64), p(ones(5, 2, 4), "int8"), ones(5, 2, 4)),
            TypeError,
            "queries must be float32, got float64",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        pv.maxsim.certified_topk(*call(pv.maxsim.pack), 1)
    assert str(caught.value).startswith(f"maxsim.certified_topk: {text}")
