"""MaxSim of tokens packed in fewer bits: scores are those of the decoded tokens."""

import pickle

import numpy as np
import pytest

import polyvec as pv
import ranking
from accuracy import assert_exact, assert_reduction
from polyvec import _files
from reference import maxsim as ref
from reference import packed as stored

WIDTHS = [0, 1, 2, 3, 4, 15, 16, 17, 35, 64, 130, 300]
QUERY_TOKENS = [0, 1, 3, 15, 16, 17, 31, 33, 70]
DOC_TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 29, 31, 32, 33, 48, 65]
PACKED = ["bfloat16", "float16", "int8"]


def sample(rng, lengths, d):
    return [rng.standard_normal((n, d)).astype(np.float32) for n in lengths]


def assert_scores(scores, queries, docs, extra=0):
    """`extra`: additional relative error, of queries that may or may not be rounded."""
    length = queries[0].shape[1]
    scale = np.abs(ref.scale(queries, docs))
    assert_reduction(scores, ref.score(queries, docs), scale * (1 + extra), length=length)


def compressed(rng, lengths, d, bits):
    """Random arrays of ColBERT's form, and the tokens they stand for."""
    n = sum(lengths)
    centroids = rng.standard_normal((7, d)).astype(np.float32)
    weights = np.sort(rng.standard_normal(1 << bits)).astype(np.float32)
    ids, codes = rng.integers(0, 7, n), rng.integers(0, 1 << bits, (n, -(-d // 4) * 4))
    offsets = np.cumsum([0, *lengths])
    arrays = (ids, stored.residual_bytes(codes, bits), centroids, weights, offsets)
    residuals = stored.rounded_weights(weights)[codes[:, :d]]
    return arrays, centroids[ids].astype(np.float64), residuals


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", PACKED)
def test_score_is_that_of_the_decoded_tokens(rng, isa, dtype, d):
    queries, docs = sample(rng, QUERY_TOKENS, d), sample(rng, DOC_TOKENS, d)
    packed = pv.maxsim.pack(docs, dtype)
    assert (len(packed), packed.dim, packed.dtype) == (len(docs), d, dtype)
    decoded = [stored.decoded(x, dtype) for x in docs]
    if dtype == "int8":
        queries_used = [stored.rounded_queries(x) for x in queries]
    elif dtype == "bfloat16" and isa in ("amx", "avx512_bf16"):
        queries_used = [stored.bfloat16(x) for x in queries]
    else:
        queries_used = queries
    assert_scores(pv.maxsim.score(queries, packed), queries_used, decoded)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [4, 8, 20, 128, 1100])
def test_residuals(rng, isa, d, bits, normalize):
    arrays, centroids, residuals = compressed(rng, DOC_TOKENS, d, bits)
    packed = pv.maxsim.from_residuals(*arrays, normalize=normalize)
    assert packed.dtype == f"residual{bits}"
    queries = sample(rng, QUERY_TOKENS, d)
    tokens = centroids + residuals
    lengths = np.linalg.norm(tokens, axis=1, keepdims=True) if normalize else 1
    # <q, c> has the query as it is, <q, residual> has it rounded: one product of rows twice as wide
    wide_queries = [np.concatenate([q, stored.rounded_queries(q)], axis=1) for q in queries]
    wide = np.concatenate([centroids, residuals], axis=1) / lengths
    assert_scores(pv.maxsim.score(queries, packed), wide_queries, np.split(wide, arrays[4][1:-1]))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", *PACKED])
def test_decode(rng, lib, dtype, d):
    docs = sample(rng, DOC_TOKENS, d)
    packed = pv.maxsim.pack([lib(x) for x in docs], dtype)
    decoded = packed.decode()
    assert type(decoded.values) is type(lib(docs[0]))
    assert_exact(decoded.offsets, packed.offsets)
    expected = docs if dtype == "float32" else [stored.decoded(x, dtype) for x in docs]
    assert_exact(np.asarray(decoded.values), np.concatenate(expected).astype(np.float32))
    assert_exact(np.asarray(packed.decode(num_threads=2).values), np.asarray(decoded.values))


def test_decode_extreme_halves():
    x = np.array([[6e-8, -6e-8, 6.1e-5, -0.0, 65504, -1e-39, 1e-45, 3e38]], np.float32)
    assert_exact(pv.maxsim.pack([x[:, :7]], "float16").decode().values, x[:, :7].astype(np.float16).astype(np.float32))
    assert_exact(pv.maxsim.pack([x], "bfloat16").decode().values, stored.bfloat16(x).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [1, 3, 8, 35])
def test_decode_residuals(rng, d, bits, normalize):
    arrays, centroids, residuals = compressed(rng, DOC_TOKENS, d, bits)
    tokens = centroids + residuals
    if normalize:
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    decoded = pv.maxsim.from_residuals(*arrays, normalize=normalize).decode()
    assert_reduction(decoded.values, tokens, np.abs(tokens) + 1e-30, length=1)


def test_decode_centroids(rng):
    packed, tokens, _ = centroid_tokens(rng, DOC_TOKENS, 5)
    assert_exact(packed.decode().values, np.concatenate(tokens))


def centroid_tokens(rng, lengths, d, n=50):
    """Tokens packed as centroids, and the centroids that they are."""
    docs, centroids = sample(rng, lengths, d), rng.standard_normal((n, d)).astype(np.float32)
    packed = pv.maxsim.pack(docs, "centroid", centroids=centroids)
    return packed, [centroids[nearest(x, centroids)] for x in docs], centroids


@pytest.mark.parametrize("d", [1, 3, 16, 130])
@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_centroids_are_scored_to_half_a_step_a_token(rng, isa, n, d):
    packed, docs, centroids = centroid_tokens(rng, DOC_TOKENS, d, n)
    assert (packed.dtype, packed.dim, packed.state().tensors["values"].shape) == ("centroid", d, (sum(DOC_TOKENS), 1))
    queries = sample(rng, QUERY_TOKENS, d)
    scores, expected = pv.maxsim.score(queries, packed), ref.score(queries, docs)
    products = [q.astype(np.float64) @ centroids.T for q in queries]
    steps = np.array([np.sum(np.ptp(p, axis=1)) / 255 for p in products])[:, None]
    rounding = 1e-5 * np.abs(ref.scale(queries, docs))
    full = np.isfinite(expected)
    assert_exact(scores[~full], expected[~full])
    assert (np.abs(scores[full] - expected[full]) <= (0.5 * steps + rounding)[full]).all()


def test_centroids_of_huge_elements_have_finite_scores():
    centroids = np.array([[1e18, 1e18], [-1e18, -1e18], [1, 0]], np.float32)
    packed = pv.maxsim.pack([centroids[:2], centroids[2:]], "centroid", centroids=centroids)
    scores = pv.maxsim.score([np.full((1, 2), 1e21, np.float32)], packed)
    assert np.isfinite(scores).all()
    assert scores[0, 0] > scores[0, 1]


def test_centroid_candidates_hold_the_best_of_colbert(data):
    arrays = np.load(data / "colbert-nanofiqa" / "tokens.npz")
    docs, queries = (pv.Ragged(arrays[f"{kind}_tokens"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query"))
    _, expected = pv.maxsim.topk(queries, docs, 10)
    found = pv.maxsim.topk(queries, pv.maxsim.pack(docs, "centroid"), 100)[1]
    assert ranking.recall(found, expected) >= 0.95


@pytest.mark.parametrize("dtype", [*PACKED, "residual4", "residual2", "centroid"])
def test_batches_slices_threads_and_topk_change_no_bit(rng, isa, dtype):
    lengths = rng.integers(0, 40, 60)
    queries = sample(rng, [5, 0, 32, 17, 90, 1, *[20] * 10], 40)
    if dtype in PACKED:
        packed = pv.maxsim.pack(sample(rng, lengths, 40), dtype)
    elif dtype == "centroid":
        packed = centroid_tokens(rng, lengths, 40)[0]
    else:
        packed = pv.maxsim.from_residuals(*compressed(rng, lengths, 40, int(dtype[-1]))[0])
    scores = pv.maxsim.score(queries, packed)
    assert_exact(np.concatenate([pv.maxsim.score([q], packed) for q in queries]), scores)
    assert_exact(np.concatenate([pv.maxsim.score(queries, packed[i : i + 1]) for i in range(60)], axis=1), scores)
    assert_exact(pv.maxsim.score(queries, packed.take([7, 7, 0])), scores[:, [7, 7, 0]])
    for threads in (2, 7):
        assert_exact(pv.maxsim.score(queries, packed, num_threads=threads), scores)
    best, ids = pv.maxsim.topk(queries, packed, 9)
    assert_exact(ids, ref.topk(scores, 9))
    assert_exact(best, np.take_along_axis(scores, ids, 1))
    lists = (np.arange(len(queries) + 1) * 60, np.tile(np.arange(60), len(queries)))
    assert_exact(pv.maxsim.topk(queries, packed, 9, candidates=lists)[1], ids)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [*PACKED, "residual4", "centroid"])
def test_save_and_load(rng, tmp_path, lib, dtype, mmap):
    queries, lengths = sample(rng, [3, 20], 8), [3, 0, 5]
    if dtype in (*PACKED, "centroid"):
        packed = pv.maxsim.pack([lib(x) for x in sample(rng, lengths, 8)], dtype)
    else:
        packed = pv.maxsim.from_residuals(*(lib(x) for x in compressed(rng, lengths, 8, 4)[0]))
    packed.save(tmp_path / "docs.safetensors")
    loaded = pv.maxsim.PackedTokens.load(tmp_path / "docs.safetensors", mmap=mmap)
    assert (loaded.dtype, loaded.dim, loaded.nbytes) == (dtype, 8, packed.nbytes)
    assert_exact(pv.maxsim.score(queries, loaded), pv.maxsim.score([lib(q) for q in queries], packed))


def nearest(x, centroids):
    return ((x[:, None].astype(np.float64) - centroids) ** 2).sum(2).argmin(1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("d", [4, 17, 40])
def test_pack_residuals(rng, lib, d, bits):
    """Nearest centroid, nearest weight, the token's own length; the weights are quantiles of the residuals."""
    docs, centroids = sample(rng, DOC_TOKENS, d), rng.standard_normal((9, d)).astype(np.float32)
    packed = pv.maxsim.pack([lib(x) for x in docs], f"residual{bits}", centroids=lib(centroids))
    parts = {name: np.asarray(x) for name, x in packed.state().tensors.items()}
    tokens = np.concatenate(docs)
    ids = nearest(tokens, centroids)
    assert_exact(parts["centroid_ids"], ids)
    weights = np.quantile(tokens - centroids[ids], (np.arange(1 << bits) + 0.5) / (1 << bits))
    np.testing.assert_allclose(parts["bucket_weights"], weights, rtol=1e-5)
    codes = np.abs((tokens - centroids[ids])[:, :, None] - parts["bucket_weights"]).argmin(2)
    codes = np.pad(codes, ((0, 0), (0, -d % 4)))
    assert_exact(parts["values"], stored.residual_bytes(codes, bits))
    decoded = centroids[ids] + stored.rounded_weights(parts["bucket_weights"])[codes[:, :d]]
    lengths = np.linalg.norm(tokens, axis=1) / np.linalg.norm(decoded, axis=1)
    np.testing.assert_allclose(parts["scales"], lengths, rtol=1e-5)
    errors = np.linalg.norm(tokens - lengths[:, None] * decoded, axis=1)
    largest = [x.max(initial=0) for x in np.split(errors, np.cumsum(DOC_TOKENS)[:-1])]
    np.testing.assert_allclose(parts["bounds"][:, 0], largest, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("dtype", ["float32", *PACKED, "residual4", "residual2", "centroid"])
def test_append(rng, lib, dtype):
    docs, centroids = sample(rng, [3, 0, 5, 40], 20), rng.standard_normal((9, 20)).astype(np.float32)
    more, queries = sample(rng, [1, 0, 9], 20), sample(rng, [4, 30], 20)
    options = {} if dtype in ("float32", *PACKED) else {"centroids": lib(centroids)}
    packed = pv.maxsim.pack([lib(x) for x in docs], dtype, **options)
    grown = packed.append(more).append([lib(x) for x in docs])
    assert (len(packed), len(grown), grown.dtype) == (4, 11, dtype)
    scores = pv.maxsim.score(queries, grown)
    assert_exact(scores[:, :4], pv.maxsim.score(queries, packed))
    assert_exact(scores[:, 7:], scores[:, :4])
    if dtype in ("float32", *PACKED):
        assert_exact(scores[:, 4:7], pv.maxsim.score(queries, pv.maxsim.pack(more, dtype)))
    assert_exact(pv.maxsim.score(queries, packed[:0].append(docs)), scores[:, :4])
    if grown.state().tensors.keys() >= {"bounds"}:
        tokens = [*docs, *more, *docs]
        assert_exact(pv.maxsim.certified_topk(queries, grown, tokens, 3).ids, pv.maxsim.topk(queries, tokens, 3)[1])


@pytest.mark.parametrize("dtype", ["float32", *PACKED, "residual4", "centroid"])
def test_pickles(rng, lib, dtype):
    packed = pv.maxsim.pack([lib(x) for x in sample(rng, [3, 0, 5], 20)], dtype)
    again = pickle.loads(pickle.dumps(packed))
    assert repr(again) == repr(packed)
    assert again.state().params == packed.state().params
    for name, tensor in packed.state().tensors.items():
        assert type(again.state().tensors[name]) is type(tensor)
        assert_exact(np.asarray(again.state().tensors[name]), np.asarray(tensor))
        assert again.state().tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [*PACKED, "residual4", "residual2", "centroid"])
def test_what_is_too_small_for_steps_counts_as_nothing(rng, isa, dtype):
    (tokens,) = sample(rng, [9], 32)
    for query, docs in ((tokens * 1e-42, tokens), (tokens, tokens * 1e-42)):
        packed = pv.maxsim.pack([docs.astype(np.float32)], dtype)
        assert abs(pv.maxsim.score([query.astype(np.float32)], packed)).max() < 1e-38


def test_a_state_that_does_not_fit_together(rng):
    tensors, params = pv.maxsim.pack(sample(rng, [3, 4], 8), "residual4").state()
    for name, entries in (("scales", 7), ("centroid_ids", 7), ("bounds", 2), ("bucket_weights", 16)):
        with pytest.raises(
            ValueError, match=rf"^PackedTokens.from_state: {name} must have {entries} entries, got {entries - 1}$"
        ):
            pv.maxsim.PackedTokens.from_state(_files.State({**tensors, name: tensors[name][1:]}, params))


@pytest.mark.parametrize("n", [0, 1, 3, 900])
def test_trained_centroids(rng, lib, n):
    docs = rng.standard_normal((1, n, 8), np.float32)
    packed = pv.maxsim.pack(lib(docs), "residual4")
    parts = packed.state().tensors
    assert len(parts["centroids"]) == {0: 1, 1: 1, 3: 3, 900: 256}[n]
    one = pv.maxsim.pack(docs, "residual4", centroids=np.zeros((1, 8), np.float32))
    assert (np.asarray(packed._bounds)[0, 0] <= one._bounds[0, 0]).all()
    assert_exact(np.asarray(pv.maxsim.pack(docs, "residual4", num_threads=2)._bounds), np.asarray(packed._bounds))


def test_append_to_tokens_without_bounds(rng):
    arrays, _, _ = compressed(rng, [3, 4], 8, 4)
    grown = pv.maxsim.from_residuals(*arrays).append(sample(rng, [2, 2], 8))
    with pytest.raises(ValueError, match=r"^maxsim.certified_topk: packed must have bounds, as pack makes them$"):
        pv.maxsim.certified_topk(sample(rng, [2], 8), grown, sample(rng, [3, 4, 2, 2], 8), 1)


def test_moving_to_a_gpu_that_torch_does_not_find(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    packed = pv.maxsim.pack(np.ones((2, 3, 4), np.float32), "int8")
    text = r"^PackedTokens\.to: device must be cpu, as torch finds no GPU, got cuda:1$"
    with pytest.raises(pv.CudaError, match=text):
        packed.to("cuda:1")


def test_extreme_elements():
    exact = [np.array([[0, 2.0**-24, -(2.0**-14), 65504, -1]], np.float32), np.zeros((1, 5), np.float32)]
    query = np.eye(5, dtype=np.float32)[:, None]
    for dtype in ("float16", "bfloat16"):
        scores = pv.maxsim.score(query, pv.maxsim.pack(exact, dtype))
        assert_exact(scores, np.stack([stored.decoded(x[0], dtype) for x in exact], axis=1))
    assert_exact(pv.maxsim.score(query, pv.maxsim.pack(exact, "int8"))[:, 1], np.zeros(5))


def test_int8_ranks_as_float32_does(data):
    docs, queries, relevance = ranking.read(data / "cranfield")
    judged = [q for q, grades in enumerate(relevance) if grades]
    queries, relevance = queries.take(judged), [relevance[q] for q in judged]
    for dtype in PACKED:
        _, ids = pv.maxsim.topk(queries, pv.maxsim.pack(docs, dtype), 10)
        assert abs(ranking.ndcg(ids, relevance) - 0.4382) < 0.002


def sampled(docs, n):
    """Every m-th token for a centroid: worse ones than k-means finds."""
    return np.ascontiguousarray(docs.values[np.arange(n) * len(docs.values) // n])


def test_residuals_rank_as_float32_does(data):
    docs, queries, relevance = ranking.read(data / "cranfield")
    judged = [q for q, grades in enumerate(relevance) if grades]
    queries, relevance = queries.take(judged), [relevance[q] for q in judged]
    packed = pv.maxsim.pack(docs, "residual4", centroids=sampled(docs, 512))
    _, ids = pv.maxsim.topk(queries, packed, 10)
    assert abs(ranking.ndcg(ids, relevance) - 0.4382) < 0.01


@pytest.mark.parametrize(("bits", "kept"), [(4, 0.9), (2, 0.7)])
def test_tokens_of_colbert(data, bits, kept):
    arrays = np.load(data / "colbert-nanofiqa" / "tokens.npz")
    docs, queries = (pv.Ragged(arrays[f"{kind}_tokens"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query"))
    packed = pv.maxsim.pack(docs, f"residual{bits}", centroids=sampled(docs, 512))
    _, expected = pv.maxsim.topk(queries, docs, 10)
    assert ranking.recall(pv.maxsim.topk(queries, packed, 10)[1], expected) >= kept
    assert_exact(pv.maxsim.certified_topk(queries, packed, docs, 10).ids, expected)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.maxsim.pack([ones(2, 3) * 70000], "float16"),
            ValueError,
            "maxsim.pack: docs must be at most 65504 in float16, got 70000",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 3)], "int8", centroids=ones(2, 3)),
            ValueError,
            "maxsim.pack: centroids must be None for int8, got ndarray",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 3)], "residual2", centroids=ones(0, 3)),
            ValueError,
            "maxsim.pack: centroids must have shape (n, 3), got (0, 3)",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 1)], "centroid", centroids=ones(65537, 1)),
            ValueError,
            "maxsim.pack: centroids must be at most 65536, got 65537",
        ),
        (
            lambda: pv.maxsim.score([ones(2, 3) * np.nan], pv.maxsim.pack([ones(2, 3)], "centroid")),
            ValueError,
            "maxsim.score: queries must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.maxsim.certified_topk([ones(2, 3)], pv.maxsim.pack([ones(2, 3)], "centroid"), [ones(2, 3)], 1),
            TypeError,
            "maxsim.certified_topk: packed must be int8 or residual codes, got centroid",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 3)], "int8").append([ones(2, 4)]),
            ValueError,
            "PackedTokens.append: docs must have d = 3, got 4",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 3)]).append([ones(2, 3), ones(2, 3) * np.nan]),
            ValueError,
            "PackedTokens.append: docs must be finite, got NaN or Inf in token 0 of document 1",
        ),
        (
            lambda: pv.maxsim.score([ones(2, 4)], pv.maxsim.pack([ones(2, 3)], "int8")),
            ValueError,
            "maxsim.score: docs must have the same d as queries (4), got 3",
        ),
        (
            lambda: pv.maxsim.score([ones(2, 3) * np.nan], pv.maxsim.pack([ones(2, 3)], "int8")),
            ValueError,
            "maxsim.score: queries must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.maxsim.score(pv.maxsim.pack([ones(2, 3)], "int8"), [ones(2, 3)]),
            TypeError,
            "maxsim.score: queries must be float32 or float64, got tokens packed as int8",
        ),
        (
            lambda: pv.maxsim.from_residuals([0, 7], ones(2, 4, dtype=np.uint8), ones(5, 8), ones(16), [0, 2]),
            IndexError,
            "maxsim.from_residuals: codes must be in [0, 5), got 0 to 7",
        ),
        (
            lambda: pv.maxsim.from_residuals([0, 4], ones(2, 4, dtype=np.uint8), ones(5, 8), ones(8), [0, 2]),
            ValueError,
            "maxsim.from_residuals: bucket_weights must have 4 or 16 entries, got 8",
        ),
        (
            lambda: pv.maxsim.from_residuals([0, 4], ones(2, 4, dtype=np.uint8), ones(5, 8), ones(4), [0, 2]),
            ValueError,
            "maxsim.from_residuals: residuals must have 2 bytes a token, got 4",
        ),
        (
            lambda: pv.maxsim.from_residuals([0], ones(2, 4, dtype=np.uint8), ones(5, 8), ones(16), [0, 2]),
            ValueError,
            "maxsim.from_residuals: codes must have one entry a token (2), got 1",
        ),
        (
            lambda: pv.maxsim.from_residuals([0], ones(1, 4, dtype=np.uint8), ones(5, 8), ones(16) * np.nan, [0, 1]),
            ValueError,
            "maxsim.from_residuals: bucket_weights must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: pv.maxsim.from_residuals([0], ones(1, 4, dtype=np.uint8), ones(5, 8), ones(16), [0, 2]),
            ValueError,
            "maxsim.from_residuals: residuals: offsets must end at the number of rows of values (1), got 2",
        ),
        (
            lambda: pv.maxsim.pack([ones(2, 3) * np.float32(3.4e38)], "bfloat16"),
            ValueError,
            "maxsim.pack: docs must be at most 3.38953e+38 in bfloat16, got 3.4e+38",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
