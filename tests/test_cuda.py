"""The CUDA module: what it refuses and reports without a GPU, and what only a GPU can show."""

import gc
import re

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_elementwise, assert_exact, assert_reduction, assert_sum_of_scores, on_host
from elsewhere import Elsewhere
from polyvec import _backend, _core
from reference import hypercomplex as ref
from reference import maxsim as maxsim_ref
from reference import scan as scan_ref
from test_scan import block_sparse, stored, whole

cuda = pytest.importorskip("polyvec._cuda", reason="polyvec was built without CUDA")


def elsewhere(*shape, dtype=np.float32, **place):
    return Elsewhere(np.ones(shape, dtype), **place)


def test_info():
    info = cuda.info()
    assert sorted(info) == ["architectures", "devices", "error", "runtime"]
    assert "90-virtual" in info["architectures"]
    assert re.fullmatch(r"\d+\.\d", info["runtime"])
    assert info["error"] is None or (isinstance(info["error"], str) and info["devices"] == [])
    assert pv.runtime_info()["cuda"] == info


def test_info_without_a_device(python):
    code = "import polyvec._cuda as c; i = c.info(); assert i['devices'] == [] and i['error'], i; print(i['error'])"
    assert python("-c", code, CUDA_VISIBLE_DEVICES="").stdout.strip()


def test_every_function_is_one_of_the_cpu_module():
    names = {name for name in dir(cuda) if not name.startswith("_")} - {"info"}
    assert names
    assert names <= set(dir(_core))


@pytest.mark.skipif(cuda.info()["error"] is None, reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("hypercomplex.product", lambda x: pv.hypercomplex.product(x, x)),
        ("hypercomplex.norm", lambda x: pv.hypercomplex.norm(x)),
        ("hypercomplex.relation_query", lambda x: pv.hypercomplex.relation_query(x, x, [0, 1], [2, 2])),
    ],
)
def test_without_a_gpu_a_call_says_so(op, call):
    with pytest.raises(pv.CudaError) as caught:
        call(elsewhere(3, 4, 5))
    assert str(caught.value) == f"{op}: CUDA failed: {cuda.info()['error']}"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.hypercomplex.product(elsewhere(4, 3), np.ones((4, 3), np.float32)),
            TypeError,
            "hypercomplex.product: arrays must be on one device, got cuda and cpu",
        ),
        (
            lambda: pv.hypercomplex.product(np.ones((4, 3), np.float32), elsewhere(4, 3)),
            TypeError,
            "hypercomplex.product: arrays must be on one device, got cpu and cuda",
        ),
        (
            lambda: pv.hypercomplex.product(elsewhere(4, 3), elsewhere(4, 3, index=1)),
            TypeError,
            "hypercomplex.product: y must be on cuda:0 as the first array, got cuda:1",
        ),
        (
            lambda: pv.hypercomplex.product(
                elsewhere(4, 3, device=10), elsewhere(4, 3, device=10), out=elsewhere(4, 3)
            ),
            TypeError,
            "hypercomplex.product: out must be on device type 10, got cuda",
        ),
        (
            lambda: pv.hypercomplex.norm(elsewhere(4, 3, device=10), out=elsewhere(3, device=10)),
            TypeError,
            "hypercomplex.norm: arrays must be on cpu or cuda, got device type 10",
        ),
        (
            lambda: pv.hypercomplex.normalize(elsewhere(4, 3, dtype=np.float16)),
            TypeError,
            "hypercomplex.normalize: x must be float32 or float64, got float16; cast it with .astype('float32')",
        ),
        (
            lambda: pv.hypercomplex.relation_query(elsewhere(3, 4, 2), elsewhere(2, 4, 2), np.zeros(1, int), [0]),
            TypeError,
            "hypercomplex.relation_query: arrays must be on one device, got cuda and cpu",
        ),
        (
            lambda: pv.hnsw.Index(4).add(elsewhere(3, 4)),
            TypeError,
            "hnsw.Index.add: arrays must be on cpu, got cuda; this function has no CUDA form yet",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_backend, "cuda_module", lambda: None)
    with pytest.raises(RuntimeError) as caught:
        pv.hypercomplex.norm(elsewhere(4, 3))
    assert str(caught.value) == (
        "hypercomplex.norm: polyvec was built without CUDA; "
        "install it with: pip install polyvec -Ccmake.define.POLYVEC_CUDA=ON"
    )


@pytest.mark.skipif(cuda.info()["error"] is None, reason="needs a machine without a GPU")
def test_arrays_are_asked_for_on_the_stream_that_the_kernel_uses(monkeypatch):
    x, out = elsewhere(4, 3), elsewhere(3)
    monkeypatch.setattr(_backend, "_stream_of", lambda x: 77)
    with pytest.raises(pv.CudaError):
        pv.hypercomplex.norm(x, out=out)
    assert (x.streams, out.streams) == ([77], [77])


def test_the_default_stream_has_the_name_that_dlpack_takes():
    assert _backend._stream_of(elsewhere(4, 3)) == 1


# What follows runs on a GPU with --device cuda; what does not name `gpu`, without one with --device cuda-on-host.


@pytest.fixture
def kernels(request):
    if request.config.getoption("device") == "cpu":
        pytest.skip("needs --device cuda or --device cuda-on-host")


def sample(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 4, 3)), ((2, 1, 4, 33), (3, 4, 33)), ((7, 4, 1), (4, 300))], ids=str)
def test_leading_axes_broadcast(rng, on_device, kernels, shapes):
    x, y = (sample(rng, *shape) for shape in shapes)
    wide = np.broadcast_arrays(x, y)
    scale = ref.norm(wide[0]) * ref.norm(wide[1])
    result = pv.hypercomplex.product(on_device(x), on_device(y))
    assert_elementwise(result, ref.product(*wide), scale[..., None, :])


@pytest.mark.parametrize("rows", [0, 1, 2, 257, 4099])
@pytest.mark.parametrize("d", [0, 1, 31, 32, 33, 127, 129, 1000])
def test_every_entry_is_written(rng, on_device, kernels, rows, d):
    x = on_device(sample(rng, rows, 4, d))
    ids = on_device(rng.integers(0, max(1, rows), rows))
    outs = [on_device(np.full(shape, np.nan, np.float32)) for shape in ((rows, 4, d), (rows, d), (rows, 4 * d))]
    pv.hypercomplex.product(x, x, out=outs[0])
    pv.hypercomplex.norm(x, out=outs[1])
    pv.hypercomplex.relation_query(x, x, ids, ids, out=outs[2])
    for out in outs:
        assert np.isfinite(on_host(out)).all()


def test_rows_of_ids_outside_the_tables_are_nan(rng, on_device, kernels):
    entities, relations = on_device(sample(rng, 5, 4, 40)), on_device(sample(rng, 3, 4, 40))
    heads, rows = np.array([0, 5, -1, 4, 1, 2**62]), np.array([2, 0, 1, 3, -(2**62), 0])
    result = on_host(pv.hypercomplex.relation_query(entities, relations, on_device(heads), on_device(rows)))
    assert np.isfinite(result[0]).all()
    assert np.isnan(result[1:]).all()


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_scan_passes_over_ids_outside_the_items(rng, on_device, kernels, metric):
    q, x = sample(rng, 3, 9), sample(rng, 20, 9)
    lists = np.array([0, 2, 3, 4]), np.array([-1, 20, 2**62, 7])
    on_lists, (queries, items) = tuple(map(on_device, lists)), map(on_device, (q, x))
    ids = on_device(np.array([[0, 20], [-1, 3], [-(2**62), 19]]))
    missing = np.isnan(on_host(pv.scan.score_pairs(queries, items, ids, metric=metric)))
    assert_exact(missing, [[False, True], [True, False], [True, False]])
    found = on_host(pv.scan.topk(queries, items, 20, metric=metric, exclude=on_lists)[1])
    assert_exact(np.sort(found[:2]), np.tile(np.arange(20), (2, 1)))
    assert_exact(np.sort(found[2]), [-1, *(i for i in range(20) if i != 7)])
    ranks = on_host(pv.scan.rank(queries, items, on_device(np.array([20, 3, -1])), metric=metric, known=on_lists))
    assert_exact(np.isnan(ranks), [True, False, True])
    assert ranks[1] == pv.scan.rank(q, x, [0, 3, 0], metric=metric)[1]


def test_rows_with_nan_have_no_nearest(rng, on_device, kernels):
    x, centroids = sample(rng, 4, 3), sample(rng, 5, 3)
    x[2, 1] = np.nan
    ids, distances = map(on_host, pv.scan.nearest(on_device(x), on_device(centroids)))
    assert_exact(ids[2], -1)
    assert_exact(distances[2], np.inf)
    assert (np.delete(ids, 2) >= 0).all()


@pytest.mark.parametrize("k", [1, 7, 700])
@pytest.mark.parametrize("nq", [0, 1, 3])
def test_parts_of_many_items_are_merged(rng, on_device, kernels, nq, k):
    q, x = (np.round(2 * sample(rng, n, 4)) for n in (nq, 9001))  # many equal scores
    found = pv.scan.topk(on_device(q), on_device(x), k)
    for actual, expected in zip(found, scan_ref.topk(q, x, k), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("nq", [1, 9])
def test_candidates_that_do_not_fit_are_found_again(rng, on_device, kernels, nq):
    """A sample has fewer than k of the best items, so that all of them, too many, pass the limit that it sets."""
    x, q = sample(rng, 60_000, 4), np.ones((nq, 4), np.float32)
    x[48_000:] += 50
    found = pv.scan.topk(on_device(q), on_device(x), 2000)
    assert_reduction(found[0], scan_ref.topk(q, x, 2000)[0], 220, length=4)
    ids = on_host(found[1])
    assert (ids >= 48_000).all()
    assert all(len(set(row)) == 2000 for row in ids.tolist())


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_scan_over_many_tiles(gpu, metric, dtype):
    """All multiprocessors at work, on several pieces where rows are split into parts; whole numbers are exact."""
    n, d = 200_000, 200
    q, x = (gpu.randint(-9, 10, (rows, d), device="cuda").float() for rows in (300, n))
    q[:, 0] = 127  # one of 127 steps is 1
    items, targets = x.to(getattr(gpu, dtype)), gpu.randint(n, (300,), device="cuda")
    exact = q.double() @ x.double().T
    if metric == "l2":
        exact = 2 * exact - (q.double() ** 2).sum(1, keepdim=True) - (x.double() ** 2).sum(1)
    sign = -1 if metric == "l2" else 1
    for k in (1, 10, 1000):
        ids = (exact * n - gpu.arange(n, device="cuda")).topk(k).indices  # of equal scores the smaller id
        scores, found = pv.scan.topk(q, items, k, metric=metric)
        assert_exact(found, on_host(ids))
        assert_exact(scores, on_host(sign * exact.gather(1, ids)))
    nearest, best = pv.scan.nearest(q, items, metric=metric)
    assert_exact(nearest, on_host((exact * n - gpu.arange(n, device="cuda")).argmax(1)))
    assert_exact(best, on_host(sign * exact.amax(1)))
    limits = exact.gather(1, targets[:, None])
    ranks = (exact > limits).sum(1) + (1 + (exact == limits).sum(1).double()) / 2
    assert_exact(pv.scan.rank(q, items, targets, metric=metric), on_host(ranks))
    size = np.full(300, 4 * on_host(exact.abs().max()))
    result = pv.scan.logsumexp(q, items, scale=0.01, metric=metric)
    assert_sum_of_scores(result, on_host((0.01 * exact).logsumexp(1)), 0.01 * size, length=d, terms=1)
    result = pv.scan.hinge(q, items, targets, metric=metric)
    expected = (1 - limits + exact).clamp(min=0).sum(1) - 1
    assert_sum_of_scores(result, on_host(expected), size, length=d, terms=n)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.float16, np.int8])
@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (5, 3), (40, 16), (700, 4)])
@pytest.mark.parametrize(("nq", "density"), [(0, 0.5), (1, 0), (1, 0.3), (3, 0.1), (8, 0.5), (40, 0.2)])
def test_block_sparse_queries_score_as_dense_ones(rng, on_device, kernels, dtype, blocks, block, nq, density):
    (q, dense), x = block_sparse(rng, nq, blocks, block, density), whole(rng, 300, blocks * block)
    items = stored(x, dtype)
    placed = pv.BlockSparse(on_device(q.values), q.blocks, q.offsets, q.d)
    ids, bias = rng.integers(0, 300, (nq, 9)), whole(rng, 300)
    for metric in ("ip", "l2"):
        rest = {"metric": metric, "bias": bias}
        on_gpu = {"metric": metric, "bias": on_device(bias)}
        found = pv.scan.topk(placed, on_device(items), 7, **on_gpu)
        for ours, theirs in zip(found, pv.scan.topk(dense, items, 7, **rest), strict=True):
            assert_exact(ours, theirs)
        pairs = pv.scan.score_pairs(placed, on_device(items), on_device(ids), **on_gpu)
        assert_exact(pairs, pv.scan.score_pairs(dense, items, ids, **rest))


def test_sparse_encodings_on_a_gpu_find_what_dense_ones_do(on_device, kernels, token_sets):
    _, (queries, docs) = token_sets(64, np.float32, queries=(32,), docs=[20] * 50)
    encoder = pv.fde.Encoder(64)  # 10,240 wide
    items = encoder.encode_docs(docs)
    sparse, dense = (encoder.encode_queries(queries, sparse=sparse) for sparse in (True, False))
    assert_exact(pv.scan.topk(sparse, items, 9)[1], pv.scan.topk(dense, items, 9)[1])


@pytest.fixture
def token_sets(rng, on_device):
    """Queries and documents of some lengths, and on the device; in some documents nothing takes part."""

    def make(d, dtype, queries=(3, 0, 1, 7, 2), docs=(5, 0, 1, 70, 33)):
        lists = [[sample(rng, n, d, dtype=dtype) for n in lengths] for lengths in (queries, docs)]
        sets = (pv.Ragged.from_list(x) for x in lists)
        return lists, [pv.Ragged(on_device(x.values), x.offsets) for x in sets]

    return make


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [0, 1, 3, 17, 128])
def test_maxsim_equals_the_definition(on_device, kernels, token_sets, d, dtype):
    (queries, docs), sets = token_sets(d, dtype)
    expected, size = maxsim_ref.score(queries, docs), np.abs(maxsim_ref.scale(queries, docs))
    assert_reduction(pv.maxsim.score(*sets), expected, size, length=max(d, 1))
    assert_reduction(pv.maxsim.score_pairs(*sets), expected.diagonal(), size.diagonal(), length=max(d, 1))
    for padding, empty in (("zero", 0.0), ("relu", -1.0), ("exclude", -7.0)):
        options = {"padding": padding, "empty": empty}
        other = pv.maxsim.score(queries, docs, **options)
        assert_reduction(pv.maxsim.score(*sets, **options), other, np.where(size < np.inf, size, 0), length=max(d, 1))
    matrix = pv.maxsim.score_matrix(on_device(queries[3]), on_device(docs[3]))
    scale = maxsim_ref.similarities(abs(queries[3]), abs(docs[3]))
    assert_reduction(matrix, maxsim_ref.similarities(queries[3], docs[3]), scale, length=max(d, 1))
    ids, similarities = map(on_host, pv.maxsim.align(on_device(queries[3]), on_device(docs[3])))
    assert_exact(ids, on_host(matrix).argmax(1))
    assert_exact(similarities, on_host(matrix).max(1))


@pytest.mark.parametrize("k", [1, 4, 300])
def test_maxsim_topk_is_the_sorted_score(rng, on_device, kernels, token_sets, k):
    _, sets = token_sets(9, np.float32, docs=rng.integers(0, 5, 700))
    expected = on_host(pv.maxsim.score(*sets))
    scores, ids = map(on_host, pv.maxsim.topk(*sets, k))
    assert_exact(ids, maxsim_ref.topk(expected, k))
    lists = [np.array(ids) for ids in ([4, -1, 2], [], [2**62, 700, 699], range(700), [5, 5])]
    candidates = on_device(np.cumsum([0, *map(len, lists)])), on_device(np.concatenate(lists).astype(np.int64))
    scores, ids = map(on_host, pv.maxsim.topk(*sets, k, candidates=candidates))
    kept = [i[(i >= 0) & (i < 700)].astype(int) for i in lists]
    assert_exact(ids, maxsim_ref.topk(expected, k, kept))
    assert_exact(scores, np.where(ids < 0, -np.inf, np.take_along_axis(expected, ids, 1)))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matches_and_their_gradients_are_those_of_the_cpu(rng, on_device, kernels, token_sets, pairs, dtype):
    lists, sets = token_sets(19, dtype)
    on_cpu = [pv.Ragged.from_list(x) for x in lists]
    scores, rows = pv.maxsim.match(*sets, pairs=pairs)
    _, expected = pv.maxsim.match(*on_cpu, pairs=pairs)
    assert_exact(rows, expected)
    grad = sample(rng, *on_host(scores).shape, dtype=dtype)
    of = {"of_queries": True, "of_docs": True}
    sizes = pv.maxsim.match_gradient(*(pv.Ragged(abs(x.values), x.offsets) for x in on_cpu), abs(grad), expected, **of)
    theirs = pv.maxsim.match_gradient(*on_cpu, grad, expected, **of)
    for a, b, size in zip(pv.maxsim.match_gradient(*sets, on_device(grad), rows, **of), theirs, sizes, strict=True):
        assert_reduction(a, b, size, length=20)


FDE_SHAPES = [  # d, repetitions, bits, tokens of each document: some do not fit into shared memory
    (128, 4, 5, (100, 0, 31, 180, 33)),
    (5, 2, 12, (3, 60)),
    (40, 1, 0, (70,)),
    (33, 130, 1, (9, 1, 35)),
    (260, 3, 4, (20, 300)),
]


@pytest.mark.parametrize("dialect", ["google", "fastembed"])
@pytest.mark.parametrize(("d", "repetitions", "bits", "sizes"), FDE_SHAPES)
def test_fde_has_the_bits_of_the_cpu_before_projections(
    on_device, kernels, token_sets, d, repetitions, bits, sizes, dialect
):
    (docs, _), (placed, _) = token_sets(d, np.float32, queries=sizes)
    encoder = pv.fde.Encoder(d, repetitions=repetitions, simhash_bits=bits, projection_dim=None, dialect=dialect)
    assert_exact(encoder.partition(placed.values), encoder.partition(np.concatenate(docs)))
    for encode in (encoder.encode_docs, encoder.encode_queries):
        assert_exact(encode(placed), encode(docs))
        out = on_device(np.full((len(docs), encoder.output_dim), np.nan, np.float16))
        assert encode(placed, dtype="float16", out=out) is out
        assert_exact(out, encode(docs, dtype="float16"))


@pytest.mark.parametrize("options", [{}, {"projection_dim": 40}, {"final_dim": 99}, {"fill_empty": False}], ids=str)
def test_fde_encodings_are_those_of_the_cpu(on_device, kernels, token_sets, options):
    (docs, _), (placed, _) = token_sets(128, np.float32, queries=(100, 0, 31, 180, 33, 450))
    encoder = pv.fde.Encoder(128, repetitions=6, **options)
    sizes = encoder.encode_queries([np.abs(x).sum(0, keepdims=True) for x in docs])
    for encode in (encoder.encode_docs, encoder.encode_queries):
        assert_reduction(encode(placed), encode(docs), np.abs(sizes).max(1, keepdims=True) + 1, length=500)


@pytest.mark.parametrize(("d", "repetitions", "bits", "sizes"), FDE_SHAPES)
@pytest.mark.parametrize("projection_dim", [None, 3])
def test_sparse_fde_queries_are_the_dense_ones(
    on_device, kernels, token_sets, d, repetitions, bits, sizes, projection_dim
):
    (queries, _), (placed, _) = token_sets(d, np.float32, queries=sizes)
    encoder = pv.fde.Encoder(d, repetitions=repetitions, simhash_bits=bits, projection_dim=projection_dim)
    sparse, expected = (encoder.encode_queries(x, sparse=True) for x in (placed, queries))
    assert type(sparse.values) is type(placed.values)
    assert_exact(sparse.blocks, expected.blocks)
    assert_exact(sparse.offsets, expected.offsets)
    assert (sparse.shape, sparse.nbytes, repr(sparse)) == (
        expected.shape, expected.nbytes, repr(expected).replace(")", ", cuda)"),
    )  # fmt: skip
    assert_exact(sparse.to_dense(), encoder.encode_queries(placed))
    in_steps = encoder.encode_queries(placed, sparse=True, progress=lambda done, total: None)
    assert_exact(in_steps.values, on_host(sparse.values))
    assert_exact(in_steps.blocks, sparse.blocks)


def test_sparse_fde_queries_without_tokens(on_device, kernels):
    encoder = pv.fde.Encoder(4, repetitions=3)
    tokens = on_device(np.zeros((0, 4), np.float32))
    for offsets in ([0], [0, 0, 0]):
        sparse = encoder.encode_queries(pv.Ragged(tokens, offsets), sparse=True)
        assert sparse.shape == (len(offsets) - 1, encoder.output_dim)
        assert_exact(sparse.offsets, np.zeros(len(offsets)))


@pytest.mark.parametrize("threshold", [-2.0, 0.1, 0.6, 9.0])
@pytest.mark.parametrize("d", [1, 7, 8, 33, 200])
def test_carving_there_gives_the_bits_of_the_cpu(rng, on_device, kernels, d, threshold):
    queries = [sample(rng, n, d) / np.float32(np.sqrt(d)) for n in (32, 0, 1, 90, 300)]
    queries[0][5] = np.nan
    sets = pv.Ragged.from_list(queries)
    placed = pv.Ragged(on_device(sets.values), sets.offsets)
    ours, theirs = (pv.fde.carve(x, threshold=threshold) for x in (placed, queries))
    assert_exact(ours.offsets, theirs.offsets)
    assert_exact(ours.values, theirs.values)


def test_fde_encodings_too_large_for_their_dtype_are_marked(on_device, kernels):
    tokens = np.array([[1, 2], [1e5, 3], [np.nan, 1]], np.float32)
    encoder = pv.fde.Encoder(2, repetitions=1, simhash_bits=0, projection_dim=None)
    sets = pv.Ragged(on_device(tokens), [0, 1, 2, 3])
    assert_exact(encoder.encode_docs(sets, dtype="float16"), np.float16([[1, 2], [np.inf, 3], [np.nan, 1]]))
    codes, scales = map(on_host, encoder.encode_docs(sets, dtype="int8"))
    assert_exact(codes, [[64, 127], [127, 0], [0, 0]])
    assert_exact(scales, np.float32([2, 1e5, np.nan]) / np.float32(127))


def test_offsets_are_copied_to_the_device_once(on_device, kernels, token_sets):
    _, (queries, docs) = token_sets(4, np.float32)
    pv.maxsim.score(queries, docs)
    placed = queries.placed_offsets
    pv.maxsim.score(queries, docs)
    assert queries.placed_offsets is placed
    assert_exact(placed, queries.offsets)


def test_a_call_is_queued_on_the_current_stream_and_does_not_wait(rng, on_device, gpu):
    x = on_device(sample(rng, 100, 4, 32))
    expected = pv.hypercomplex.product(x, x)  # loads the kernel
    y, out = gpu.zeros_like(x), gpu.empty_like(x)
    stream = gpu.cuda.Stream()
    gpu.cuda.synchronize()
    with gpu.cuda.stream(stream):
        gpu.cuda._sleep(500_000_000)  # cycles: a quarter of a second
        y.copy_(x)
        pv.hypercomplex.product(y, y, out=out)
        assert not stream.query()  # the call came back before the stream had reached it
    stream.synchronize()
    assert_exact(out, expected)


def test_a_call_can_be_captured_in_a_graph(rng, on_device, gpu):
    x = on_device(sample(rng, 100, 4, 32))
    ids = on_device(rng.integers(0, 100, 50))
    out = gpu.zeros(50, 128, device="cuda")
    pv.hypercomplex.relation_query(x, x, ids, ids, out=out)  # the module loads its kernels at the first launch
    expected = out.clone()
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        pv.hypercomplex.relation_query(x, x, ids, ids, out=out)
    out.fill_(float("nan"))
    graph.replay()
    gpu.cuda.synchronize()
    assert_exact(out, expected)


def test_an_encoding_can_be_captured_in_a_graph_after_the_first(rng, on_device, gpu):
    encoder = pv.fde.Encoder(64, final_dim=500)
    sets = pv.Ragged(on_device(sample(rng, 900, 64)), [0, 200, 200, 900])
    out = gpu.empty(3, 500, device="cuda")
    expected = encoder.encode_docs(sets, out=out).clone()
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        encoder.encode_docs(sets, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert_exact(out, expected)


def test_an_encoder_can_be_dropped_while_a_graph_is_captured(rng, on_device, gpu):
    tokens, x = on_device(sample(rng, 9, 8)), on_device(sample(rng, 100, 4, 32))
    encoder, out = pv.fde.Encoder(8), gpu.zeros_like(x)
    encoder.partition(tokens)
    expected = pv.hypercomplex.product(x, x)
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        del encoder
        gc.collect()
        pv.hypercomplex.product(x, x, out=out)
    graph.replay()
    assert_exact(out, expected)
    assert_exact(pv.fde.Encoder(8).partition(tokens), pv.fde.Encoder(8).partition(on_host(tokens)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "residual4"])
def test_packing_can_be_captured_in_a_graph(rng, on_device, gpu, dtype):
    tokens, centroids = on_device(sample(rng, 900, 20)), on_device(sample(rng, 9, 20))
    sets = pv.Ragged(tokens, [0, 200, 200, 900])
    options = {"centroids": centroids} if dtype == "residual4" else {}
    expected = {name: on_host(x) for name, x in pv.maxsim.pack(sets, dtype, **options).state().tensors.items()}
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        packed = pv.maxsim.pack(sets, dtype, **options)
    graph.replay()
    for name, x in packed.state().tensors.items():
        assert_exact(x, expected[name])


@pytest.mark.parametrize("nq", [2, 70])
def test_a_search_can_be_captured_in_a_graph(rng, on_device, gpu, nq):
    q, x = on_device(sample(rng, nq, 32)), on_device(sample(rng, 3000, 32))
    out = gpu.zeros(nq, 7, device="cuda"), gpu.zeros(nq, 7, device="cuda", dtype=gpu.int64)
    expected = [result.clone() for result in pv.scan.topk(q, x, 7, out=out)]
    graph = gpu.cuda.CUDAGraph()
    with gpu.cuda.graph(graph):
        pv.scan.topk(q, x, 7, out=out)
    out[0].fill_(float("nan"))
    graph.replay()
    gpu.cuda.synchronize()
    for actual, of in zip(out, expected, strict=True):
        assert_exact(actual, of)


def test_the_tensors_device_is_used_and_the_callers_restored(rng, gpu):
    if gpu.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = gpu.randn(3, 4, 5, device="cuda:1")
    result = pv.hypercomplex.product(x, x)
    assert result.device == x.device
    assert gpu.cuda.current_device() == 0
    assert_exact(result, pv.hypercomplex.product(x.to("cuda:0"), x.to("cuda:0")))


def test_more_entries_than_an_int_counts(gpu):
    d = 1 << 20
    rows = 515  # x 4 x 2^20 > 2^31
    if gpu.cuda.mem_get_info()[0] < 3 * rows * 4 * d * 4:
        pytest.skip("needs 26 GB of free GPU memory")
    x, one = gpu.randn(rows, 4, d, device="cuda"), gpu.zeros(4, d, device="cuda")
    one[0] = 1
    assert gpu.equal(pv.hypercomplex.product(x, one), x)
