"""MaxSim on a GPU: every form of tokens, few queries and many. Without one, with --device cuda-on-host."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction, on_host
from reference import maxsim as ref
from reference import packed as stored
from test_maxsim_packed import compressed

QUERY_TOKENS = [0, 1, 16, 17, 32, 33, 70]
DOC_TOKENS = [0, 1, 7, 8, 9, 31, 33, 65, 180]
ROUNDED = {
    "bfloat16": stored.bfloat16,
    "float16": lambda x: x.astype(np.float16),
    "int8": stored.rounded_queries,
}


@pytest.fixture(autouse=True)
def kernels(request):
    if request.config.getoption("device") == "cpu":
        pytest.skip("needs --device cuda or --device cuda-on-host")


def sample(rng, lengths, d):
    return [rng.standard_normal((n, d)).astype(np.float32) for n in lengths]


def placed(on_device, sets):
    ragged = pv.Ragged.from_list(sets)
    return pv.Ragged(on_device(ragged.values), ragged.offsets)


def placed_packed(on_device, packed):
    state = packed.state()
    parts = {name: on_device(np.asarray(x)) for name, x in state.tensors.items() if name not in ("offsets", "values")}
    sets = pv.Ragged(on_device(state.tensors["values"]), state.tensors["offsets"])
    return pv.maxsim.PackedTokens(sets, packed.dtype, packed.dim, **parts)


def in_halves(request, on_device, sets, dtype):
    """Token sets of 16 bits on the device."""
    ragged = pv.Ragged.from_list(sets)
    if request.config.getoption("device") == "cuda":
        torch = pytest.importorskip("torch")
        return pv.Ragged(on_device(ragged.values).to(getattr(torch, dtype)), ragged.offsets)
    if dtype == "bfloat16":
        pytest.skip("numpy has no bfloat16 that DLPack exports: packed tokens cover the kernel")
    return pv.Ragged(on_device(ragged.values.astype(np.float16)), ragged.offsets)


def assert_scores(scores, queries, docs, rounded_to=0.0):
    """`rounded_to`: the relative error of parts of a similarity."""
    assert on_host(scores).dtype == np.float32
    scale = np.abs(ref.scale(queries, docs)) * (1 + rounded_to / np.finfo(np.float32).eps)
    assert_reduction(scores, ref.score(queries, docs), scale, length=queries[0].shape[1])


@pytest.mark.parametrize("d", [1, 3, 16, 35, 128])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_score_of_packed_tokens(rng, on_device, dtype, d):
    queries, docs = sample(rng, QUERY_TOKENS, d), sample(rng, DOC_TOKENS, d)
    packed = placed_packed(on_device, pv.maxsim.pack(docs, dtype))
    used, decoded = [ROUNDED[dtype](x) for x in queries], [stored.decoded(x, dtype) for x in docs]
    on_gpu = placed(on_device, queries)
    assert_scores(pv.maxsim.score(on_gpu, packed), used, decoded)
    pairs = pv.maxsim.score_pairs(placed(on_device, queries[1:]), packed.take([0, 1, 4, 8, 2, 5]))
    expected = [ref.score([q], [decoded[i]])[0, 0] for q, i in zip(used[1:], [0, 1, 4, 8, 2, 5], strict=True)]
    scale = [ref.scale([q], [decoded[i]])[0, 0] for q, i in zip(used[1:], [0, 1, 4, 8, 2, 5], strict=True)]
    assert_reduction(pairs, expected, np.abs(scale), length=d)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("d", [4, 20, 128])
def test_score_of_residuals(rng, on_device, d, bits):
    arrays, centroids, residuals = compressed(rng, DOC_TOKENS, d, bits)
    packed = pv.maxsim.from_residuals(*arrays, normalize=True)
    queries, tokens = sample(rng, QUERY_TOKENS, d), centroids + residuals
    wide_queries = [np.concatenate([q, stored.rounded_queries(q)], axis=1) for q in queries]
    wide = np.concatenate([centroids, residuals], axis=1) / np.linalg.norm(tokens, axis=1, keepdims=True)
    scores = pv.maxsim.score(placed(on_device, queries), placed_packed(on_device, packed))
    # products with centroids are kept in float16
    assert_scores(scores, wide_queries, np.split(wide, arrays[4][1:-1]), rounded_to=2.0**-11)


@pytest.mark.parametrize("d", [1, 8, 24, 96, 128, 136])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("queries", [QUERY_TOKENS, [32] * 9 + [5, 0, 300]], ids=["few", "many"])
def test_score_of_halves(request, rng, on_device, dtype, d, queries):
    queries, docs = sample(rng, queries, d), sample(rng, DOC_TOKENS, d)
    used, decoded = ([np.asarray(ROUNDED[dtype](x), np.float32) for x in sets] for sets in (queries, docs))
    sets = [in_halves(request, on_device, x, dtype) for x in (queries, docs)]
    assert_scores(pv.maxsim.score(*sets), used, decoded)
    zero = on_host(pv.maxsim.score(*sets, padding="zero"))
    assert_reduction(
        zero,
        ref.score(used, decoded, zeros=[max(DOC_TOKENS) - n for n in DOC_TOKENS]),
        np.where(np.isfinite(scale := np.abs(ref.scale(used, decoded))), scale, 0),
        length=d,
    )
    best, ids = map(on_host, pv.maxsim.topk(*sets, 4))
    scores = on_host(pv.maxsim.score(*sets))
    assert_exact(ids, ref.topk(scores, 4))
    assert_exact(best, np.take_along_axis(scores, ids, 1))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matches_of_halves(request, rng, on_device, dtype, many, pairs):
    docs = sample(rng, DOC_TOKENS, 40)
    queries = sample(rng, [40 if many else 3] * (len(docs) - 2) + [0, 2], 40)
    used, decoded = ([np.asarray(ROUNDED[dtype](x), np.float32) for x in sets] for sets in (queries, docs))
    sets = [in_halves(request, on_device, x, dtype) for x in (queries, docs)]
    scores, rows = pv.maxsim.match(*sets, pairs=pairs)
    expected, expected_rows = pv.maxsim.match(*map(pv.Ragged.from_list, (used, decoded)), pairs=pairs)
    scale = np.abs(ref.scale(used, decoded))
    scale, length = (scale.diagonal() if pairs else scale), 40
    assert_reduction(scores, expected, scale, length=length)
    assert_exact(rows, expected_rows)
    grad = rng.standard_normal(on_host(scores).shape).astype(np.float32)
    of = {"of_queries": True, "of_docs": True}
    theirs, sizes = (
        pv.maxsim.match_gradient(
            *(pv.Ragged(change(np.concatenate(x)), pv.Ragged.from_list(x).offsets) for x in (used, decoded)),
            change(grad), expected_rows, **of,
        )
        for change in (lambda x: x, np.abs)
    )  # fmt: skip
    for ours, same, size in zip(
        pv.maxsim.match_gradient(*sets, on_device(grad), rows, **of), theirs, sizes, strict=True
    ):
        unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]  # what the result is rounded to
        values = on_host(ours.float() if hasattr(ours, "float") else ours).astype(np.float32)
        assert_reduction(values, same, size * (1 + unit / np.finfo(np.float32).eps), length=1)


def test_many_documents_are_scored_by_a_warp_each(request, rng, on_device):
    docs = sample(rng, rng.integers(0, 4, 600 if request.config.getoption("device") != "cuda" else 40_000), 8)
    queries = sample(rng, [3, 40], 8)
    assert_scores(pv.maxsim.score(placed(on_device, queries), placed(on_device, docs)), queries, docs)


@pytest.mark.parametrize("k", [1, 300, 3000])
def test_topk_of_many_candidates(rng, on_device, k):
    """Equal scores and equal ids in lists that are longer than what a block keeps."""
    docs = [np.round(x) for x in sample(rng, [1] * 500, 2)]
    queries = [np.round(x) for x in sample(rng, [2, 1, 3], 2)]
    lists = [rng.integers(-2, 505, n) for n in (0, 4700, 120)]
    candidates = np.cumsum([0, *map(len, lists)]), np.concatenate(lists)
    scores, ids = pv.maxsim.topk(
        placed(on_device, queries), placed(on_device, docs), k, candidates=tuple(map(on_device, candidates))
    )
    exact = ref.score(queries, docs)
    kept = [np.sort(i[(i >= 0) & (i < 500)]) for i in lists]
    expected = np.full((3, k), -1)
    for q, row in enumerate(kept):
        order = row[np.argsort(-exact[q, row], kind="stable")][:k]
        expected[q, : len(order)] = order
    assert_exact(ids, expected)
    assert_exact(scores, np.where(expected < 0, -np.inf, np.take_along_axis(exact, expected, 1)))


def test_more_than_4096_results_are_refused(rng, on_device):
    sets = placed(on_device, sample(rng, [2], 3))
    with pytest.raises(ValueError, match=r"^maxsim\.topk: k must be at most 4096 on a GPU, got 4097$"):
        pv.maxsim.topk(sets, sets, 4097)


def test_more_scores_than_are_kept_at_once(rng, gpu):
    queries, docs = (gpu.randn(n, 1, 8, device="cuda", dtype=gpu.float16) for n in (1500, 100_000))
    scores, ids = pv.maxsim.topk(queries, docs, 5)
    expected = (queries[:, 0].float() @ docs[:, 0].float().T).topk(5)
    gpu.testing.assert_close(scores, expected.values, rtol=1e-3, atol=1e-3)
    assert (ids == expected.indices).float().mean() > 0.99


def assert_same_tensors(ours, theirs):
    ours, theirs = ours.state().tensors, theirs.state().tensors
    assert sorted(ours) == sorted(theirs)
    for name, x in theirs.items():
        assert on_host(ours[name]).dtype == np.asarray(x).dtype
        assert_exact(ours[name], x)


@pytest.mark.parametrize("d", [0, 1, 3, 16, 35, 130])
@pytest.mark.parametrize("dtype", ["float32", *ROUNDED])
def test_packing_there_gives_the_bits_of_the_cpu(rng, on_device, dtype, d):
    docs = sample(rng, DOC_TOKENS, d)
    docs[3] *= np.float32(1e-41)  # subnormal, in part
    docs[4] *= 1e4
    docs[5][:] = 0
    assert_same_tensors(pv.maxsim.pack(placed(on_device, docs), dtype), pv.maxsim.pack(docs, dtype))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("d", [1, 17, 40])
def test_packing_residuals_there_gives_the_bits_of_the_cpu(rng, on_device, d, bits):
    docs, centroids = sample(rng, DOC_TOKENS, d), rng.standard_normal((9, d)).astype(np.float32)
    packed = pv.maxsim.pack(placed(on_device, docs), f"residual{bits}", centroids=on_device(centroids))
    assert_same_tensors(packed, pv.maxsim.pack(docs, f"residual{bits}", centroids=centroids))


def test_packing_many_residuals_there_takes_the_weights_of_the_same_sample(rng, on_device):
    docs, centroids = rng.standard_normal((1, 9000, 140)).astype(np.float32), np.zeros((2, 140), np.float32)
    ours = pv.maxsim.pack(
        on_device(docs[:, :8000]), "residual2", centroids=on_device(centroids)
    )  # of every other token
    weights = pv.maxsim.pack(docs[:, :8000], "residual2", centroids=centroids).state().tensors["bucket_weights"]
    assert_exact(ours.state().tensors["bucket_weights"], weights)


@pytest.mark.parametrize("bits", [2, 4])
def test_residuals_that_lie_there_are_scaled_as_on_the_cpu(rng, on_device, bits):
    ids, residuals, centroids, weights, offsets = compressed(rng, DOC_TOKENS, 20, bits)[0]
    for normalize in (False, True):
        theirs = pv.maxsim.from_residuals(ids, residuals, centroids, weights, offsets, normalize=normalize)
        arrays = map(on_device, (ids, residuals, centroids, weights))
        assert_same_tensors(pv.maxsim.from_residuals(*arrays, offsets, normalize=normalize), theirs)


@pytest.mark.parametrize("dtype", [*ROUNDED, "residual4", "centroid"])
def test_documents_are_appended_there(rng, on_device, dtype):
    docs, more = sample(rng, DOC_TOKENS, 12), sample(rng, [4, 0, 9], 12)
    centroids = rng.standard_normal((5, 12)).astype(np.float32)
    options = [
        {"centroids": x} if dtype in ("residual4", "centroid") else {} for x in (centroids, on_device(centroids))
    ]
    theirs = pv.maxsim.pack(docs, dtype, **options[0]).append(more)
    ours = pv.maxsim.pack(placed(on_device, docs), dtype, **options[1])
    assert_same_tensors(ours.append(placed(on_device, more)), theirs)


def test_tokens_that_are_not_finite_stay_so(on_device):
    docs = pv.Ragged(on_device(np.array([[1, -2], [np.nan, 1], [np.inf, 1], [70_000, 1]], np.float32)), [0, 4])
    state = pv.maxsim.pack(docs, "int8").state().tensors
    assert_exact(state["scales"], np.float32([2, np.nan, np.nan, 70_000]) / np.float32(127))
    assert_exact(on_host(state["values"])[1:3], 128)
    assert_exact(pv.maxsim.pack(docs, "float16").state().tensors["values"],
                 np.float16([[1, -2], [np.nan, 1], [np.inf, 1], [np.inf, 1]]))  # fmt: skip
    with pytest.raises(ValueError, match=r"^maxsim\.pack: centroids must be given for residual4 on a GPU, got None$"):
        pv.maxsim.pack(docs, "residual4")


@pytest.mark.parametrize("dtype", ["bfloat16", "residual4", "centroid"])
def test_packed_tokens_move_to_a_gpu(rng, gpu, dtype):
    packed = pv.maxsim.pack(sample(rng, DOC_TOKENS, 16), dtype)
    queries = sample(rng, QUERY_TOKENS, 16)
    there = packed.to("cuda")
    assert there.nbytes == packed.nbytes
    assert (there.state().tensors["values"].device.type, there.to("cpu").dtype) == ("cuda", dtype)
    scores = pv.maxsim.score(placed(lambda x: gpu.from_numpy(x).cuda(), queries), there)
    gpu.testing.assert_close(scores.cpu(), gpu.from_numpy(pv.maxsim.score(queries, packed)), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("d", [1, 8, 40])
def test_score_of_centroids(rng, on_device, d):
    queries, docs = sample(rng, QUERY_TOKENS, d), sample(rng, DOC_TOKENS, d)
    centroids = rng.standard_normal((50, d)).astype(np.float32)
    packed = pv.maxsim.pack(docs, "centroid", centroids=centroids)
    decoded = [centroids[np.asarray(ids)[:, 0]] for ids in packed._sets]
    sets, there = placed(on_device, queries), placed_packed(on_device, packed)
    scores = pv.maxsim.score(sets, there)
    assert_scores(scores, queries, decoded, rounded_to=2.0**-11)  # products are kept in float16
    pairs = pv.maxsim.score_pairs(placed(on_device, queries[:4]), there.take([4, 0, 8, 1]))
    assert_exact(pairs, on_host(scores)[range(4), [4, 0, 8, 1]])
    for padding in ("zero", "relu"):
        options = {"padding": padding, "empty": -3.0}
        ours = on_host(pv.maxsim.score(sets, there, **options))
        theirs = pv.maxsim.score(queries, decoded, **options)
        assert np.allclose(ours, theirs, rtol=2.0**-10, atol=2.0**-9 * np.sqrt(d) * 70)
    best, ids = map(on_host, pv.maxsim.topk(sets, there, 4))
    assert_exact(ids, ref.topk(on_host(scores), 4))
    assert_exact(best, np.take_along_axis(on_host(scores), ids, 1))
    lists = [[2, -1, 7], [], [9, 1], [0, 3], [8], [5, 4, 3], [1]]
    candidates = np.cumsum([0, *map(len, lists)]), np.array([i for ids in lists for i in ids])
    ids = on_host(pv.maxsim.topk(sets, there, 3, candidates=tuple(map(on_device, candidates)))[1])
    assert_exact(
        ids, ref.topk(on_host(scores), 3, [np.array([i for i in x if 0 <= i < len(docs)], int) for x in lists])
    )


def test_packing_centroids_there_gives_the_bits_of_the_cpu(rng, on_device):
    docs, centroids = sample(rng, DOC_TOKENS, 6), rng.standard_normal((40_000, 6)).astype(np.float32)
    packed = pv.maxsim.pack(placed(on_device, docs), "centroid", centroids=on_device(centroids))
    assert_same_tensors(packed, pv.maxsim.pack(docs, "centroid", centroids=centroids))
    with pytest.raises(ValueError, match=r"^maxsim\.pack: centroids must be given for centroid on a GPU, got None$"):
        pv.maxsim.pack(placed(on_device, docs), "centroid")


def certified(on_device, queries, docs, k):
    """Its result, which must be that of topk."""
    packed = placed_packed(on_device, pv.maxsim.pack(docs, "int8"))
    sets = placed(on_device, queries), placed(on_device, docs)
    best = pv.maxsim.certified_topk(sets[0], packed, sets[1], k)
    for ours, theirs in zip(best[:2], pv.maxsim.topk(*sets, k), strict=True):
        assert_exact(ours, on_host(theirs))
    rescored = on_host(best.rescored)
    assert ((rescored >= min(k, len(docs))) & (rescored <= len(docs))).all()
    return rescored


@pytest.mark.parametrize("d", [1, 4, 17, 128])
@pytest.mark.parametrize("k", [1, 7, 90])
def test_certified_documents_are_those_of_topk(rng, on_device, d, k):
    queries = sample(rng, [5, 0, 32, 1, 70], d)
    certified(on_device, queries, sample(rng, rng.integers(0, 30, 80), d), k)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-25, 1e-19, 1e17, 1e30])
def test_documents_are_certified_whatever_their_size(rng, on_device, scale):
    queries, docs = sample(rng, [3, 20], 24), sample(rng, [4] * 50, 24)
    for at in (1, scale):
        certified(on_device, [np.float32(scale) * q for q in queries], [np.float32(at) * x for x in docs], 6)


def test_few_documents_are_rescored_unless_they_are_alike(rng, on_device):
    docs = rng.standard_normal((400, 6, 32), np.float32)
    assert_exact(certified(on_device, list(docs[:10]), list(docs), 1), np.ones(10))
    alike = np.repeat(rng.standard_normal((3, 4, 16), np.float32), 40, axis=0)
    alike += rng.standard_normal(alike.shape, np.float32) * np.float32(1e-4)
    alike[7::9] = alike[7]
    assert (certified(on_device, list(alike[[0, 7, 50]] + np.float32(0.01)), list(alike), 5) >= 30).all()


def test_what_a_gpu_does_not_certify(rng, on_device):
    queries, docs = sample(rng, [3], 8), sample(rng, [4, 2], 8)
    sets = placed(on_device, queries), placed(on_device, docs)
    packed = pv.maxsim.pack(docs, "residual4", centroids=np.concatenate(docs))
    with pytest.raises(TypeError, match=r"^maxsim\.certified_topk: packed must be int8 on a GPU$"):
        pv.maxsim.certified_topk(sets[0], placed_packed(on_device, packed), sets[1], 1)
    packed = placed_packed(on_device, pv.maxsim.pack(docs, "int8"))
    with pytest.raises(ValueError, match=r"^maxsim\.certified_topk: k must be at most 4096 on a GPU, got 4097$"):
        pv.maxsim.certified_topk(sets[0], packed, sets[1], 4097)


def test_certified_search_can_be_captured_in_a_graph(rng, gpu):
    docs, queries = (
        gpu.from_numpy(rng.standard_normal(shape, np.float32)).cuda() for shape in ((90, 5, 16), (4, 3, 16))
    )
    sets = [pv.Ragged(x.flatten(0, 1), np.arange(len(x) + 1) * x.shape[1]) for x in (queries, docs)]
    packed = pv.maxsim.pack(sets[1], "int8")
    expected = [x.clone() for x in pv.maxsim.certified_topk(sets[0], packed, sets[1], 7)]
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        results = pv.maxsim.certified_topk(sets[0], packed, sets[1], 7)
    graph.replay()
    for actual, of in zip(results, expected, strict=True):
        assert_exact(actual, on_host(of))


@pytest.mark.parametrize("d", [1, 3, 16, 130])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "residual4", "residual2", "centroid"])
def test_decoding_there_gives_the_tokens_of_the_cpu(rng, on_device, dtype, d):
    docs = sample(rng, DOC_TOKENS, d)
    packed = pv.maxsim.pack(docs, dtype)
    decoded = placed_packed(on_device, packed).decode()
    assert_reduction(decoded.values, packed.decode().values, np.abs(packed.decode().values), length=1)


def test_topk_of_included_documents(rng, on_device):
    queries, docs = sample(rng, [3, 20, 0], 24), sample(rng, DOC_TOKENS, 24)
    expected = pv.maxsim.topk(queries, docs, 4, include=[8, 1, 5])
    found = pv.maxsim.topk(placed(on_device, queries), placed(on_device, docs), 4, include=[8, 1, 5])
    assert_exact(found[1], expected[1])
