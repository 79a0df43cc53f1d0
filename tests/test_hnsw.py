"""The graph index: exact where it must be, near enough elsewhere, whole after any change, call or file."""

import gzip
import lzma
import pickle
import re
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from polyvec._files import State
from reference import hnsw as ref

METRICS = ["cosine", "ip", "l2"]
HALVES = ["float16", "bfloat16"]
STORAGES = {
    **{name: {"storage": name} for name in ("float32", *HALVES, "int8", "int4")},
    "int8 alone": {"storage": "int8", "rerank": "int8"},
    "int4, int8": {"storage": "int4", "rerank": "int8"},
}


def sample(rng, n, d):
    return rng.standard_normal((n, d)).astype(np.float32)


def build(x, metric="l2", *, num_threads=1, **params):
    index = pv.hnsw.Index(x.shape[1], metric=metric, **params)
    index.add(x, num_threads=num_threads)
    return index


def scale(queries, vectors, metric):
    """Sum of absolute products: the size that rounding errors are measured against."""
    if metric == "l2":
        return 2 * ref.score(queries, vectors, "l2") + 1e-3
    if metric == "cosine":
        queries, vectors = ref.unit(queries), ref.unit(vectors)
    return np.abs(queries).astype(np.float64) @ np.abs(vectors).astype(np.float64).T


def kept_in(index):
    """What the vectors of an index are rounded to."""
    params = index.state().params
    return params.get("rerank", "float32") if params["storage"].startswith("int") else params["storage"]


def rounded(x, dtype):
    """As float32, after the nearest numbers of the dtype."""
    return np.asarray(x).astype(dtype).astype(np.float32)


def assert_scores(scores, ids, queries, index, x):
    """Every score is that of its id among the vectors x, rounded to what they are kept in, and they are sorted."""
    vectors, metric, kept = x, index.metric, kept_in(index)
    if kept != "float32":
        vectors = index.get(np.arange(len(x)))
        unrounded = ref.unit(x).astype(np.float32) if metric == "cosine" else x
        decoded = vectors
        if kept == "int8":
            largest = np.abs(unrounded).max(axis=1, keepdims=True)
            most = largest * (0.5 + 1e-4) / 127
            if metric == "cosine":  # scaled to norm 1 again
                assert np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= 1e-6)
                decoded = vectors * (largest / np.abs(vectors).max(axis=1, keepdims=True))
        else:
            most = np.maximum(np.abs(unrounded), 1e-4) * float(ml_dtypes.finfo(kept).eps)
        assert np.all(np.abs(decoded - unrounded) <= most)
        if metric == "cosine":  # vectors in 16 bits are not quite of norm 1
            queries, metric = ref.unit(queries), "ip"
    exact = np.take_along_axis(ref.score(queries, vectors, metric), ids, 1)
    size = np.take_along_axis(scale(queries, vectors, metric), ids, 1)
    assert_reduction(scores, exact, size, length=vectors.shape[1])
    steps = np.diff(scores, axis=1)
    assert np.all(steps >= 0 if metric == "l2" else steps <= 0)


# Exact searches: as many candidates as there are vectors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 19, 31, 32, 33, 35, 64, 100, 130, 784])
def test_search_with_all_candidates_equals_the_definition(rng, isa, metric, storage, d):
    x, queries = sample(rng, 37, d), sample(rng, 5, d)
    index = build(x, metric, **STORAGES[storage])
    scores, ids = index.search(queries, 37)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    assert_scores(scores, ids, queries, index, x)
    assert_exact(np.sort(ids, 1), np.tile(np.arange(37), (5, 1)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 9, 256, 257])
def test_missing_results_are_marked(rng, metric, n):
    x, queries = sample(rng, n, 6), sample(rng, 3, 6)
    scores, ids = build(x, metric).search(queries, n + 2)
    expected, names = ref.search(queries, x, n + 2, metric)
    assert_exact(ids, names)
    assert_exact(scores[:, n:], expected[:, n:])


def test_no_queries(rng):
    scores, ids = build(sample(rng, 4, 3)).search(np.empty((0, 3), np.float32), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_zero_vectors_and_extreme_lengths(rng):
    x = sample(rng, 6, 4)
    x[1] = 0
    x[2] *= np.float32(1e-30)
    x[3] *= np.float32(1e30)
    queries = np.concatenate([x[:4], sample(rng, 2, 4)])
    index = build(x, "cosine")
    scores, ids = index.search(queries, 6)
    assert_scores(scores, ids, queries, index, x)
    assert_exact(scores[1], np.zeros(6, np.float32))
    assert not np.signbit(scores[1]).any()


def test_queries_that_are_not_finite_find_nothing_or_the_defined_result(rng):
    index = build(np.abs(sample(rng, 100, 4)), "ip")
    queries = np.ones((2, 4), np.float32)
    queries[0, 2] = np.nan
    queries[1, 2] = np.inf
    for ef in (10, 100):
        scores, ids = index.search(queries, 3, ef=ef)
        assert_exact(ids[0], [-1, -1, -1])
        assert_exact(scores, [[-np.inf] * 3, [np.inf] * 3])


# The graph


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("m", [2, 5, 16])
def test_graph_search_returns_true_scores(rng, isa, metric, storage, m):
    x, queries = sample(rng, 700, 17), sample(rng, 40, 17)
    index = build(x, metric, m=m, ef_construction=60, **STORAGES[storage])
    scores, ids = index.search(queries, 10, ef=40)
    assert_scores(scores, ids, queries, index, x)
    assert all(len(set(row)) == 10 for row in ids.tolist())
    assert ref.recall(ids, ref.search(queries, x, 10, metric)[1]) > (0.4 if m == 2 else 0.9)


def split(x, neighbours):
    """Every tenth row of the file is a query; the ids of the truth are rows of the file."""
    rows = np.arange(len(x))
    queries = rows % 10 == 0
    return x[~queries].astype(np.float32), rows[~queries], x[queries].astype(np.float32), neighbours[: queries.sum()]


def read(path):
    with lzma.open(path) as file:
        return np.load(file)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_recall_on_sift(data, storage, num_threads):
    x, rows, queries, truth = split(
        read(data / "sift-10k" / "vectors.npy.xz"), read(data / "sift-10k" / "neighbors_l2_top100.npy.xz")
    )
    index = pv.hnsw.Index(128, metric="l2", **STORAGES[storage])
    index.add(x, rows, num_threads=num_threads)
    recalls = [ref.recall(index.search(queries, 10, ef=ef)[1], truth[:, :10]) for ef in (16, 64)]
    assert recalls[0] > 0.92
    assert recalls[1] > 0.99


@pytest.mark.parametrize("storage", STORAGES)
def test_recall_on_mnist(data, storage):
    with gzip.open(data / "mnist-t10k" / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    x, rows, queries, truth = split(pixels, read(data / "mnist-t10k" / "neighbors_l2_top100.npy.xz"))
    index = pv.hnsw.Index(784, metric="l2", **STORAGES[storage])
    index.add(x, rows)
    assert ref.recall(index.search(queries, 10, ef=64)[1], truth[:, :10]) > 0.99


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("storage", STORAGES)
def test_recall_on_sentence_vectors(data, metric, storage):
    folder = data / "wordnet-minilm"
    x = read(folder / "base_i8.npy.xz")[:6000].astype(np.float32)
    queries = read(folder / "queries.npy.xz")[:300].astype(np.float32)
    if metric == "ip":
        x = ref.unit(x).astype(np.float32)
    index = pv.hnsw.Index(384, metric=metric, **STORAGES[storage], ef_construction=100)
    index.add(x)
    assert ref.recall(index.search(queries, 10, ef=64)[1], ref.search(queries, x, 10, metric)[1]) > 0.95


@pytest.mark.parametrize("storage", STORAGES)
def test_recall_on_vectors_that_lie_in_order(rng, storage):
    """Neighbours are added one after the other, so in one batch: they must find each other."""
    x = np.cumsum(rng.standard_normal((6000, 16)), axis=0).astype(np.float32)
    queries = x[::20] + 0.1 * rng.standard_normal((300, 16)).astype(np.float32)
    truth = pv.scan.topk(queries, x, 10, metric="l2")[1]
    ef = 160 if "int4" in storage else 32  # the way is long, and 15 levels tell neighbours badly apart
    found = build(x, **STORAGES[storage]).search(queries, 10, ef=ef)[1]
    assert ref.recall(found, truth) > 0.97


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("length", [1, 1.003, 1.03])
def test_many_copies_of_a_vector_do_not_cut_the_graph(rng, storage, length):
    """Nor where codes do not tell them from one that is a little longer."""
    x = sample(rng, 900, 12)
    x[100:400] = x[100]
    x[400] = x[100] * np.float32(length)
    copied = x[100]
    x = x[rng.permutation(900)]
    index = build(x, **STORAGES[storage])
    x = index.get(np.arange(900))
    queries = sample(rng, 50, 12)
    scores, _ = index.search(queries, 10)
    near = index.search(copied[None], 200, ef=250)[0]
    assert np.mean(near <= near[0, 0] * (1 + 1e-5) + 1e-12) > 0.97
    assert np.mean(scores <= ref.search(queries, x, 10, "l2")[0] * (1 + 1e-5)) > 0.95


def tensors_of(index):
    return {name: tensor.copy() for name, tensor in index.state().tensors.items()}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("metric", METRICS)
def test_the_graph_does_not_depend_on_thread_count(rng, metric, storage):
    x = sample(rng, 3000, 9)
    graphs = []
    for num_threads in (1, 2, 7):
        index = pv.hnsw.Index(9, metric=metric, **STORAGES[storage], seed=5, ef_construction=30)
        index.add(x[:2500], num_threads=num_threads)
        index.add(x[2500:], num_threads=num_threads)
        graphs.append(tensors_of(index))
    for graph in graphs[1:]:
        for name, tensor in graph.items():
            assert_exact(tensor, graphs[0][name])
    assert not np.array_equal(tensors_of(build(x, seed=6))["levels"], graphs[0]["levels"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 5, 16, 63, 64, 65, 127, 128, 129, 200, 300, 384, 700])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_definition(rng, isa, metric, d, bits):
    x = sample(rng, 20, d) * np.float32(10) ** rng.integers(-30, 12, (20, 1)).astype(np.float32)
    x[3] = 0
    most = 2 ** (bits - 1) - 1
    x[4] = (np.arange(d) % most + 0.5) / most  # between two codes but for rounding
    x[4, -1] = 1
    index = build(x, metric, storage=f"int{bits}")
    tensors = tensors_of(index)
    codes = ref.encode(tensors["vectors"], bits)[0]
    assert_exact(tensors["codes"], codes if bits == 8 else ref.pack_halves(codes))
    scales = ref.unbiased_scales(tensors["vectors"], codes, bits)
    np.testing.assert_allclose(tensors["factors"][:, 0], scales, rtol=1e-6)
    if metric == "l2":
        squares = (tensors["vectors"].astype(np.float64) ** 2).sum(1)
        np.testing.assert_allclose(tensors["factors"][:, 1], squares, rtol=1e-6, atol=1e-37)
    else:
        assert_exact(tensors["factors"][:, 1], np.zeros(20))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_vectors_in_int8_are_those_of_the_definition(rng, isa, metric, storage):
    x = sample(rng, 20, 70) * np.float32(10) ** rng.integers(-30, 12, (20, 1)).astype(np.float32)
    x[3] = 0
    tensors = tensors_of(build(x, metric, storage=storage, rerank="int8"))
    unrounded = tensors_of(build(x, metric))["vectors"]
    codes, scales = ref.encode(unrounded)
    kept = tensors["scales"] if storage == "int4" else tensors["factors"][:, 0]
    if metric == "cosine":  # of norm 1 again
        norms = np.linalg.norm(codes - 128.0, axis=1)
        unit = np.divide(1, norms, out=np.zeros(20), where=norms > 0)
        np.testing.assert_allclose(kept, unit, rtol=3e-7)
    else:
        assert_exact(kept, scales)
    assert_exact(tensors["vectors"], codes)
    if storage == "int8":
        assert "codes" not in tensors
        squares = ((codes - 128.0) ** 2).sum(1) * kept.astype(np.float64) ** 2
        expected = squares if metric == "l2" else np.zeros(20)
        np.testing.assert_allclose(tensors["factors"][:, 1], expected, rtol=1e-6, atol=1e-37)
    else:
        vectors = (codes[:, :70].astype(np.float32) - 128) * kept[:, None]
        assert_exact(tensors["codes"], ref.pack_halves(ref.encode(vectors, 4)[0]))


@pytest.mark.parametrize("storage", STORAGES)
def test_memory(rng, storage):
    n, d, m = 1024, 96, 16
    index = pv.hnsw.Index(d, m=m, **STORAGES[storage])
    index.add(sample(rng, n, d))
    vectors = {"float32": 4 * d, "float16": 2 * d, "bfloat16": 2 * d, "int8": 128}[kept_in(index)]
    codes = {"int8": 128 + 8, "int8 alone": 8, "int4": 64 + 8, "int4, int8": 64 + 12}.get(storage, 0)
    assert 0 <= index.nbytes - n * (vectors + codes + 8 * m) <= n * 34
    bits = 64 + {"int8 alone": 8, "int4, int8": 4}.get(storage, 0)
    assert 0 <= index.freeze().nbytes - n * (vectors + bits + 8 * m) <= n * 38


def test_levels_are_geometric(rng):
    levels = tensors_of(build(sample(rng, 4000, 2), m=4, ef_construction=4))["levels"]
    assert 0.2 < np.mean(levels >= 1) < 0.3
    assert 0.04 < np.mean(levels >= 2) < 0.09


@pytest.mark.parametrize("storage", STORAGES)
def test_a_graph_without_hierarchy(data, tmp_path, storage):
    x = ref.unit(read(data / "wordnet-minilm" / "base_i8.npy.xz")[:3000]).astype(np.float32)
    queries = ref.unit(read(data / "wordnet-minilm" / "queries.npy.xz")[:200]).astype(np.float32)
    index = build(x, "ip", **STORAGES[storage], hierarchy=False, ef_construction=100, num_threads=2)
    index.remove(np.arange(0, 600, 2))
    rows = np.delete(np.arange(3000), np.arange(0, 600, 2))
    truth = ref.search(queries, x[rows], 10, "ip", rows)[1]
    index.save(tmp_path / "flat.pv")
    compacted = pv.hnsw.Index.load(tmp_path / "flat.pv")
    compacted.compact()
    for each in (index, compacted, index.freeze()):
        assert "hierarchy=False" in repr(each)
        tensors = tensors_of(each)
        assert_exact(tensors["levels"], np.zeros(len(tensors["ids"])))
        assert tensors["upper_links"].size == 0
        assert ref.recall(each.search(queries, 10, ef=64)[1], truth) > 0.97
    assert index.nbytes < build(x, "ip", **STORAGES[storage], ef_construction=100).nbytes


@pytest.mark.parametrize("storage", STORAGES)
def test_search_does_not_depend_on_threads_or_company(rng, isa, storage):
    index = build(sample(rng, 500, 33), **STORAGES[storage])
    index.remove(np.arange(0, 500, 9))
    queries = sample(rng, 200, 33)
    scores, ids = index.search(queries, 5, ef=20, num_threads=1)
    for n in (2, 7):
        assert_exact(index.search(queries, 5, ef=20, num_threads=n), (scores, ids))
    alone = [index.search(query[None], 5, ef=20) for query in queries]
    assert_exact(np.concatenate([one[0] for one in alone]), scores)
    assert_exact(np.concatenate([one[1] for one in alone]), ids)


def test_more_candidates_than_vectors_are_all_of_them(rng):
    x = sample(rng, 300, 4)
    expected = tensors_of(build(x, ef_construction=300))
    for most in (2**40, 2**62):
        for name, tensor in tensors_of(build(x, ef_construction=most)).items():
            assert_exact(tensor, expected[name])
    index = pv.hnsw.Index(4, ef_construction=2**62)
    index.add(x[:1])
    index.add(x[1:])
    assert len(index) == 300


def test_more_threads_build_a_graph_as_good(rng):
    x, queries = sample(rng, 2000, 8), sample(rng, 100, 8)
    index = build(x, num_threads=7)
    again = pv.hnsw.Index.from_state(index.state())  # checks every link
    assert ref.recall(again.search(queries, 10)[1], ref.search(queries, x, 10, "l2")[1]) > 0.98


# The neighbours of every row


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(("n", "d", "probes"), [(1500, 12, None), (2500, 3, None), (2500, 12, None), (2500, 12, 40)])
def test_knn_graph(rng, isa, metric, dtype, n, d, probes):
    x = sample(rng, n, d)
    given = x if dtype == "float32" else arrays_of(x, dtype)[1]
    x = rounded(x, dtype)
    indptr, indices, distances = pv.hnsw.knn_graph(given, 9, metric=metric, probes=probes)
    assert (indptr.dtype, indices.dtype, distances.dtype) == (np.int64, np.int64, np.float32)
    assert_exact(indptr, np.arange(0, n * 9 + 1, 9))
    found, distances = indices.reshape(n, 9), distances.reshape(n, 9)
    assert np.all(found != np.arange(n)[:, None])
    assert np.all(np.diff(distances, axis=1) >= 0)
    assert ref.recall(found, ref.neighbors(x, 9, metric)[1]) > 0.99
    exact = np.take_along_axis(ref.score(x, x, metric), found, 1)
    size = np.take_along_axis(scale(x, x, metric), found, 1) + 1
    assert_reduction(distances, exact if metric == "l2" else 1 - exact, size, length=d)
    again = pv.hnsw.knn_graph(given, 9, metric=metric, probes=probes, num_threads=7)
    assert_exact(again[1], indices)


@pytest.mark.parametrize("d", [4, 24])
def test_knn_graph_by_probes(rng, d):
    """More find more; all clusters find all but what codes confuse."""
    x = sample(rng, 4000, d)
    truth = ref.neighbors(x, 10, "l2")[1]

    def recall(probes):
        found = pv.hnsw.knn_graph(x, 10, probes=probes)
        neighbors = np.split(found[1], found[0][1:-1])
        return np.mean([len(np.intersect1d(a, b)) for a, b in zip(neighbors, truth, strict=True)]) / 10

    assert recall(1) + 0.2 < recall(8) < recall(1000)
    assert recall(1000) > 0.99


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("d", [3, 12])
def test_knn_graph_compares_all_where_clusters_have_too_few(rng, metric, dtype, d):
    n, k = 2300, 300
    x = sample(rng, n, d)
    given = x if dtype == "float32" else arrays_of(x, dtype)[1]
    x = rounded(x, dtype)
    indptr, indices, distances = pv.hnsw.knn_graph(given, k, metric=metric, probes=1)
    assert_exact(indptr, np.arange(n + 1) * k)
    found, distances = indices.reshape(n, k), distances.reshape(n, k)
    assert np.all(found != np.arange(n)[:, None])
    assert np.all(np.diff(distances, axis=1) >= 0)
    assert ref.recall(found, ref.neighbors(x, k, metric)[1]) > 0.999


def recall_of_graph(x, metric="l2", **options):
    """Of 15 neighbours, of some rows."""
    some = np.arange(0, len(x), 17)
    own = np.arange(len(some) + 1), some
    truth = pv.scan.topk(x[some], x, 15, metric=metric, exclude=own)[1]
    return ref.recall(pv.hnsw.knn_graph(x, 15, metric=metric, **options)[1].reshape(-1, 15)[some], truth)


@pytest.mark.parametrize("d", [97, 200, 800])
def test_recall_of_a_graph_of_any_width(rng, d):
    """Subspaces of several dimensions, the last ones padded."""
    x = sample(rng, 3000, 16) @ sample(rng, 16, d)
    assert recall_of_graph(x + sample(rng, 3000, d), probes=40) > 0.96


def with_outlier(rng, x):
    x[0] *= 30
    return x


def with_outliers(rng, x):
    x[::100] *= 30
    return x


def with_column_of_another_scale(rng, x):
    x[:, 0] *= 10
    return x


def with_heavy_tails(rng, x):
    return rng.standard_t(3, (len(x), 32)).astype(np.float32)


def exponential(rng, x):
    return np.exp(x / x.std())


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (with_outlier, 0.98),
        (with_outliers, 0.92),
        (with_column_of_another_scale, 0.97),
        (with_heavy_tails, 0.95),
        (exponential, 0.97),
    ],
)
def test_recall_of_a_graph_of_uneven_values(rng, isa, change, least):
    """By codes alone, on every level: tables of bytes keep what tells near rows apart."""
    x = sample(rng, 8000, 12) @ sample(rng, 12, 128) + 0.1 * sample(rng, 8000, 128)
    assert recall_of_graph(change(rng, x), probes=40) > least


def test_knn_graph_compares_all_where_codes_do_not_suffice(rng):
    """Norms of rows over orders of magnitude: codewords are for the long ones, short ones all have the same code."""
    x = sample(rng, 15_000, 12) @ sample(rng, 12, 64) + 0.1 * sample(rng, 15_000, 64)
    x *= np.exp(2 * sample(rng, 15_000, 1))
    assert recall_of_graph(x, probes=40) < 0.9
    calls = []
    assert recall_of_graph(x, progress=lambda done, total: calls.append((done, total))) > 0.999
    assert calls[-1] == (15_000, 15_000)
    assert (30_000, 30_000) in calls


def test_knn_graph_of_many_neighbours_compares_all(rng):
    x, k, calls = sample(rng, 4000, 32), 300, []
    _, indices, _ = pv.hnsw.knn_graph(x, k, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4000, 4000)
    some = np.arange(0, 4000, 40)
    truth = pv.scan.topk(x[some], x, k, metric="l2", exclude=(np.arange(len(some) + 1), some))[1]
    assert_exact(indices.reshape(-1, k)[some], truth)


def test_recall_of_a_graph_of_real_vectors(data):
    assert (
        recall_of_graph(
            read(data / "wordnet-glosses-minilm" / "vectors_i8.npy.xz")[:20000].astype(np.float32), "cosine"
        )
        > 0.96
    )
    assert recall_of_graph(read(data / "sift-10k" / "vectors.npy.xz").astype(np.float32), "l2") > 0.98
    with gzip.open(data / "mnist-t10k" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    assert recall_of_graph(images.astype(np.float32), "l2") > 0.98
    spread = images.std(0)
    assert recall_of_graph((images / np.where(spread > 0, spread, 1)).astype(np.float32), "l2") > 0.97


def test_knn_graph_reports_progress_and_stops(rng):
    x, calls = sample(rng, 3000, 8), []
    for probes in (40, None):
        pv.hnsw.knn_graph(x, 5, probes=probes, progress=lambda done, total: calls.append((done, total)))
    assert [call for call in calls if call[0] == call[1]] == [(6000, 6000), (3000, 3000)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pv.hnsw.knn_graph(x, 5, progress=stop)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_knn_graph_of_few_rows_has_all_of_them(rng, n):
    x = sample(rng, n, 3)
    indptr, indices, distances = pv.hnsw.knn_graph(x, 5)
    expected, order = ref.neighbors(x, min(5, max(n - 1, 0)), "l2")
    assert_exact(indptr, np.arange(n + 1) * max(min(n - 1, 5), 0))
    assert_exact(indices, order.ravel())
    assert_reduction(distances, expected.ravel(), expected.ravel() + 1, length=3)


@pytest.mark.parametrize(("n", "d"), [(100, 4), (1000, 3), (1000, 8)])
def test_knn_graph_counts_copies_as_neighbours(rng, n, d):
    x = np.repeat(sample(rng, n, d), 3, axis=0)
    _, indices, distances = pv.hnsw.knn_graph(x, 2)
    copies = indices // 3 == np.repeat(np.arange(3 * n) // 3, 2)
    assert copies.mean() > 0.98
    assert_exact(distances == 0, copies)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_knn_graph_of_equal_rows(metric):
    """A single cluster, of more codes than are scanned at once, and zero vectors, whose cosines are 0."""
    x = np.zeros((20_000, 8), np.float32)
    indptr, indices, distances = pv.hnsw.knn_graph(x, 5, metric=metric)
    assert_exact(indptr, np.arange(0, 100_001, 5))
    assert np.all(np.diff(np.sort(indices.reshape(-1, 5), 1), axis=1) > 0)
    assert np.all(indices.reshape(-1, 5) != np.arange(20_000)[:, None])
    assert_exact(distances, np.full(100_000, float(metric == "cosine"), np.float32))


# Vectors kept in 16 bits


def arrays_of(x, dtype):
    """The same numbers as numpy and as torch hold them."""
    torch = pytest.importorskip("torch")
    return np.asarray(x).astype(dtype), torch.from_numpy(np.asarray(x, np.float32)).to(getattr(torch, dtype))


@pytest.mark.parametrize("given", ["float32", *HALVES])
@pytest.mark.parametrize("kept", ["float32", *HALVES])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 48])
def test_vectors_are_kept_as_the_nearest_numbers(rng, isa, given, kept, coded, metric, d):
    x = rounded(sample(rng, 25, d) * np.float32(10) ** rng.integers(-6, 3, (25, d)), given)
    x[3] = 0
    for vectors in arrays_of(x, given):
        index = pv.hnsw.Index(d, metric=metric, **({"storage": "int8", "rerank": kept} if coded else {"storage": kept}))
        index.add(vectors)
        tensor = index.state().tensors["vectors"]
        assert tensor.dtype == {"bfloat16": np.uint16}.get(kept, kept)
        if metric == "cosine":
            exact = ref.unit(x)
            assert np.all(
                np.abs(index.get(index.ids) - exact) <= float(ml_dtypes.finfo(kept).eps) * np.abs(exact) + 6e-8
            )
        else:
            assert_exact(index.get(index.ids), rounded(x, kept))
            assert_exact(tensor.view(kept).astype(np.float32), rounded(x, kept))
        if coded:
            vectors = index.get(index.ids)
            codes, scales = ref.encode(vectors)
            expected = ref.unbiased_scales(vectors, codes)
            np.testing.assert_allclose(index.state().tensors["factors"][:, 0], expected, rtol=1e-6)
            steps = np.divide(vectors, scales[:, None], where=scales[:, None] > 0, out=np.zeros_like(x))
            ties = np.abs(steps % 1 - 0.5) < 1e-4  # of numbers with few bits some lie between two codes
            assert_exact(index.state().tensors["codes"][:, :d][~ties], codes[:, :d][~ties])
            assert ties.mean() < 0.1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("metric", METRICS)
def test_queries_in_16_bits_are_those_numbers(rng, dtype, storage, metric):
    index = build(sample(rng, 300, 19), metric, **STORAGES[storage])
    queries = rounded(sample(rng, 20, 19), dtype)
    expected = index.search(queries, 5)
    for halves in arrays_of(queries, dtype):
        found = index.search(halves, 5)
        assert type(found[0]) is type(halves)
        for part, other in zip(found, expected, strict=True):
            assert_exact(part, other)


@pytest.mark.parametrize("storage", HALVES)
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_numbers_that_would_be_infinite_are_refused(storage, metric):
    index = pv.hnsw.Index(3, metric=metric, storage=storage)
    largest = float(ml_dtypes.finfo(storage).max)
    step = {"float16": 16, "bfloat16": 2.0**119}[storage]  # half of what the next number would be away
    index.add(np.float32([[0, -largest, 0], [largest + step * 0.99, 0, 0]]))
    assert_exact(index.get([0, 1]), np.float32([[0, -largest, 0], [largest, 0, 0]]))
    text = {"float16": "65504 in float16, got 65520", "bfloat16": "3.38953e+38 in bfloat16, got 3.39618e+38"}[storage]
    with pytest.raises(ValueError, match=f"^hnsw.Index.add: vectors must be at most {re.escape(text)} in row 1$"):
        index.add(np.float32([[1, 0, 0], [0, -(largest + step), 0]]))
    assert len(index) == 2


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("rerank", [*HALVES, "int8"])
def test_codes_beside_narrow_vectors(rng, tmp_path, storage, rerank):
    x, queries = sample(rng, 900, 40), sample(rng, 50, 40)
    index = build(x, "ip", storage=storage, rerank=rerank)
    assert repr(index) == (
        f"hnsw.Index(dim=40, metric='ip', storage={storage!r}, m=16, ef_construction=200, seed=0, rerank={rerank!r}, "
        "900 vectors)"
    )
    assert index.nbytes < build(x, "ip", storage=storage).nbytes - 900 * 40 * 2 + 1
    index.remove([7, 300])
    shown = np.delete(np.arange(900), [7, 300])
    index.compact()
    index.save(tmp_path / "index.pv")
    frozen = index.freeze()
    frozen.save(tmp_path / "frozen.pv")
    loaded = [pv.hnsw.Index.load(tmp_path / f"{name}.pv", mmap=True) for name in ("index", "frozen")]
    for each in (index, frozen, *loaded):
        scores, ids = each.search(queries, 10, ef=100)
        assert_exact(each.get(shown), index.get(shown))
        exact = np.take_along_axis(ref.score(queries, index.get(shown), "ip"), np.searchsorted(shown, ids), 1)
        np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5)
        assert ref.recall(ids, ref.search(queries, x[shown], 10, "ip", shown)[1]) > (0.93 if rerank == "int8" else 0.95)
    assert_exact(loaded[0].search(queries, 10), index.search(queries, 10))
    assert_exact(loaded[1].search(queries, 10), frozen.search(queries, 10))


def test_float32_beside_codes_is_the_default(rng):
    index = pv.hnsw.Index(4, storage="int8", rerank="float32")
    assert repr(index) == repr(pv.hnsw.Index(4, storage="int8"))
    assert "rerank" not in index.state().params


# Links for queries


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_links_for_queries_are_those_of_the_definition(rng, isa, metric, storage):
    x = sample(rng, 400, 10)
    queries = rounded(sample(rng, 30, 10) + 1, "bfloat16")
    index = build(x, metric, **STORAGES[storage], m=4)
    before, vectors = tensors_of(index), index.get(np.arange(400))
    index.fit_queries(queries, k=20)
    ranks = ref.search(queries, vectors, 20, "ip" if metric == "cosine" else metric)[1]
    after = tensors_of(index)
    assert_exact(after["links"], ref.link_ranks(before["links"], ranks))
    assert not np.array_equal(after["links"], before["links"])
    for name in after.keys() - {"links"}:
        assert_exact(after[name], before[name])
    again = pv.hnsw.Index.from_state(index.state())  # checks every link
    assert_exact(again.search(queries, 5), index.search(queries, 5))


def test_links_for_queries_do_not_depend_on_threads(rng):
    x, queries = sample(rng, 700, 12), sample(rng, 1100, 12) + 1
    links = []
    for num_threads in (1, 2, 7):
        index = build(x, "ip")
        index.fit_queries(queries.astype(np.float16), k=30, num_threads=num_threads)
        links.append(tensors_of(index)["links"])
    for other in links[1:]:
        assert_exact(other, links[0])


def test_links_for_queries_leave_removed_vectors_out(rng):
    x, queries = sample(rng, 300, 5), sample(rng, 40, 5)
    index = build(x, "l2", m=3)
    gone = rng.permutation(300)[:150]
    index.remove(gone)
    before = tensors_of(index)["links"]
    index.fit_queries(queries, k=200)  # more than there are
    after = tensors_of(index)["links"]
    added = after[after != before]
    assert len(added) > 0
    assert not np.isin(added, gone).any()
    index.remove(index.ids)
    index.fit_queries(queries)
    pv.hnsw.Index(5).fit_queries(queries)
    assert len(tensors_of(index)["links"]) == 0


def test_links_for_queries_in_an_index_that_is_a_file(rng, tmp_path):
    x, queries = sample(rng, 300, 6), sample(rng, 40, 6) + 1
    index = build(x, "ip", storage="bfloat16")
    index.save(tmp_path / "index.pv")
    mapped, before = pv.hnsw.Index.load(tmp_path / "index.pv", mmap=True), (tmp_path / "index.pv").read_bytes()
    for each in (index, mapped):
        each.fit_queries(queries, k=9)
    assert_exact(tensors_of(mapped)["links"], tensors_of(index)["links"])
    assert (tmp_path / "index.pv").read_bytes() == before


def test_progress_of_links_for_queries(rng, monkeypatch):
    monkeypatch.setattr(pv.hnsw, "_QUERIES", 40)
    index, calls = build(sample(rng, 200, 4), "ip"), []
    index.fit_queries(sample(rng, 100, 4), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(40, 100), (80, 100), (100, 100)]

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        index.fit_queries(sample(rng, 100, 4), progress=stop)
    index.add(sample(rng, 1, 4))
    assert len(index) == 201


@pytest.fixture(scope="module")
def factors(data):
    """Articles as items, users as queries, split into those to fit and those to search; inner products."""
    items, users = (
        read(data / "citeulike-a" / f"als64_{name}.npy.xz").astype(np.float32) for name in ("items", "users")
    )
    held_out = read(data / "citeulike-a" / "als64_queries_users.npy.xz")
    truth = read(data / "citeulike-a" / "als64_neighbors_ip_top100.npy.xz")
    return items, np.delete(users, held_out, axis=0), users[held_out], truth


@pytest.mark.parametrize("storage", STORAGES)
def test_fitted_queries_raise_the_recall_of_others(factors, storage):
    """Means of three graphs: one in a hundred users are alike, and hardly a link leads to what they want. A walk that
    keeps few candidates finds all of that or nothing, by luck.
    """
    items, sample, queries, truth = factors
    graphs = [build(items, "ip", **STORAGES[storage], ef_construction=ef, num_threads=2) for ef in (160, 200, 240)]

    def recalls():
        return [
            np.mean([ref.recall(index.search(queries, k, ef=ef)[1], truth[:, :k]) for index in graphs])
            for k, ef in ((10, 16), (100, 100))
        ]

    before = recalls()
    for index in graphs:
        index.fit_queries(sample, num_threads=2)
    after = recalls()
    assert after[0] > max(0.975, before[0] + 0.015)
    assert before[1] < 0.89
    assert after[1] > (0.95 if "int4" in storage else 0.97)  # of the 100 that are kept all are returned
    frozen = graphs[1].freeze(num_threads=2)
    assert ref.recall(frozen.search(queries, 100, ef=150)[1], truth) > 0.97


def test_fitted_queries_raise_the_recall_of_encodings(data):
    tokens = np.load(data / "cranfield" / "tokens.npz")
    queries, docs = (
        pv.Ragged(tokens[f"{side}_tokens"].astype(np.float32), tokens[f"{side}_offsets"].astype(np.int64))
        for side in ("query", "doc")
    )
    encoder = pv.fde.Encoder(128, repetitions=5)
    x, queries = encoder.encode_docs(docs), encoder.encode_queries(queries)
    index = build(x, "ip", storage="float16", num_threads=2)
    truth = pv.scan.topk(queries[::3], x, 10, metric="ip")[1]
    before = ref.recall(index.search(queries[::3], 10, ef=10)[1], truth)
    index.fit_queries(np.delete(queries, np.s_[::3], axis=0), num_threads=2)
    assert ref.recall(index.search(queries[::3], 10, ef=10)[1], truth) > before + 0.02


# Walks that end by distance


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("margin", [0, 0.03, 0.3])
def test_a_margin_ends_walks_by_the_definition(rng, isa, metric, margin):
    x, queries = sample(rng, 800, 12), sample(rng, 60, 12)
    index = build(x, metric, hierarchy=False, m=6, ef_construction=30)
    vectors, links = index.get(np.arange(800)), index.state().tensors["links"]
    asked = ref.unit(queries) if metric == "cosine" else queries
    expected = [ref.adaptive_walk(query, vectors, links, 0, 5, margin) for query in asked]
    ids = index.search(queries, 5, margin=margin)[1]
    assert np.mean(np.all(ids == expected, axis=1)) > 0.95
    alone = [index.search(query[None], 5, margin=margin)[1][0] for query in queries]
    assert_exact(alone, ids)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_wider_margin_finds_more(data, storage, metric):
    x = ref.unit(read(data / "wordnet-minilm" / "base_i8.npy.xz")[:4000]).astype(np.float32)
    queries = ref.unit(read(data / "wordnet-minilm" / "queries.npy.xz")[:200]).astype(np.float32)
    truth = ref.search(queries, x, 10, metric)[1]
    index = build(x, metric, **STORAGES[storage], ef_construction=100, num_threads=2)
    for each in (index, index.freeze()):
        recalls = [ref.recall(each.search(queries, 10, margin=margin)[1], truth) for margin in (0, 0.03, 0.1)]
        assert recalls[0] < recalls[1] < recalls[2]
        assert recalls[2] > (0.98 if "int8" in storage and storage != "int8" else 0.99)
        few = each.search(queries, 10, margin=0.1, ef=10)[1]
        assert ref.recall(few, truth) < recalls[2]  # `ef` is the most candidates
        for shown in (np.arange(4000) % 4 > 0, np.arange(4000) % 20 == 0):  # walked and compared
            rows = np.flatnonzero(shown)
            ids = each.search(queries, 10, margin=0.1, include=shown)[1]
            assert ref.recall(ids, ref.search(queries, x[rows], 10, metric, rows)[1]) > 0.97
    index.remove(np.arange(0, 4000, 4))
    rows = np.flatnonzero(np.arange(4000) % 4 > 0)
    ids = index.search(queries, 10, margin=0.1)[1]
    assert ref.recall(ids, ref.search(queries, x[rows], 10, metric, rows)[1]) > 0.97


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("margin", [0.5, 1e20])
def test_a_margin_among_vectors_that_codes_hardly_tell_apart(rng, storage, metric, margin):
    """Estimates of distances may be below 0, or cosines above 1: no reason to end. As good as many candidates."""
    x = np.float32(1) + np.float32(1e-2) * sample(rng, 400, 12)
    queries = np.float32(1) + np.float32(1e-2) * sample(rng, 30, 12)
    index = build(x, metric, **STORAGES[storage], hierarchy=False)
    for each in (index, index.freeze()):
        vectors = each.get(np.arange(400))
        asked, measure = (ref.unit(queries), "ip") if metric == "cosine" else (queries, metric)
        truth = ref.search(asked, vectors, 5, measure)[0]
        found, others = (each.search(queries, 5, **how)[0] for how in ({"margin": margin}, {"ef": 200}))
        assert np.mean(np.abs(found - truth) <= 1e-5) > np.mean(np.abs(others - truth) <= 1e-5) - 0.1


def test_few_vectors_by_a_margin(rng):
    x = sample(rng, 3, 4)
    scores, ids = build(x).search(x, 5, margin=0)
    assert_exact(ids[:, 0], np.arange(3))
    assert_exact(np.sort(ids[:, :3], axis=1), np.tile(np.arange(3), (3, 1)))
    assert_exact(ids[:, 3:], np.full((3, 2), -1))
    assert np.all(np.isinf(scores[:, 3:]))
    assert pv.hnsw.Index(4).search(x, 2, margin=0.1)[1].tolist() == [[-1, -1]] * 3
    copies = build(np.tile(x[:1], (200, 1)))
    assert_exact(copies.search(x[:1], 50, margin=0)[0], np.zeros((1, 50)))


# Ids, removal, growth


def test_ids_are_the_callers_own(rng):
    x = sample(rng, 6, 3)
    index = pv.hnsw.Index(3, metric="l2")
    index.add(x[:2])
    index.add(x[2:4], [2**63 - 5, -7])
    index.add(x[4:])
    assert_exact(index.ids, [0, 1, 2**63 - 5, -7, 2**63 - 4, 2**63 - 3])
    assert_exact(index.search(x, 1)[1][:, 0], index.ids)
    assert len(index) == 6
    assert -7 in index
    assert 7 not in index
    assert np.int64(2**63 - 5) in index
    assert 2**64 not in index
    assert -(2**63) - 1 not in index
    assert_exact(index.get([-7, 0]), x[[3, 0]])
    assert index.get([]).shape == (0, 3)


def test_cosine_stores_unit_vectors(rng):
    x = sample(rng, 5, 8)
    index = build(x, "cosine")
    assert_reduction(index.get(range(5)), ref.unit(x), 1, length=8)


def test_removed_vectors_are_passed_through_but_never_found(rng):
    x, queries = sample(rng, 7000, 6), sample(rng, 30, 6)
    index = build(x, num_threads=2)
    gone = rng.permutation(7000)[:3500]
    index.remove(gone)
    assert len(index) == 3500  # more than a scan pays for, and not fewer than were removed
    assert len(tensors_of(index)["ids"]) == 7000
    kept = np.setdiff1d(np.arange(7000), gone)
    assert_exact(index.ids, kept)
    ids = index.search(queries, 10, ef=20)[1]
    assert not np.isin(ids, gone).any()
    assert ref.recall(ids, ref.search(queries, x[kept], 10, "l2", kept)[1]) > 0.95
    index.add(x[gone[:5]] + 100, gone[:5])  # their ids are free again
    assert_exact(index.search(x[gone[:5]] + 100, 1)[1][:, 0], gone[:5])
    assert len(index.ids) == 3505


def test_a_region_without_live_vectors_is_crossed(rng):
    """All near neighbours are removed: more than ef of them lie before the first that counts."""
    near, far = sample(rng, 2500, 4), sample(rng, 2500, 4) + 20
    index = build(np.concatenate([near, far]), num_threads=2)
    index.remove(np.arange(2500))
    ids = index.search(near[:20], 10, ef=30)[1]
    assert ids.min() >= 2500
    assert ref.recall(ids, ref.search(near[:20], far, 10, "l2", np.arange(2500, 5000))[1]) > 0.8


@pytest.mark.parametrize("metric", METRICS)
def test_all_removed(rng, metric):
    index = build(sample(rng, 50, 3), metric)
    index.remove(index.ids)
    scores, ids = index.search(sample(rng, 2, 3), 4)
    assert len(index) == 0
    assert_exact(ids, np.full((2, 4), -1))
    assert_exact(scores, np.full((2, 4), np.inf if metric == "l2" else -np.inf))
    index.add(np.ones((1, 3), np.float32), [3])
    assert_exact(index.search(np.ones((1, 3), np.float32), 2)[1], [[3, -1]])


# Memory of removed vectors


def rows_of(tensors, kept):
    """What is kept of each vector, of some of them."""
    return {name: tensors[name][kept] for name in ("vectors", "codes", "factors", "ids") if name in tensors}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("count", [1, 300, 1000, 1100, 1990])
def test_compact_gives_removed_vectors_back(rng, metric, storage, count):
    """Up to a half of them by mending links, more by linking anew."""
    x, queries = sample(rng, 2000, 12), sample(rng, 60, 12)
    index = build(x, metric, **STORAGES[storage], ef_construction=60, num_threads=2)
    before, gone = tensors_of(index), rng.permutation(2000)[:count]
    state = index.state()
    index.remove(gone)
    assert len(tensors_of(index)["ids"]) == (2000 if count <= 1000 else 2000 - count)
    index.compact()
    index = pv.hnsw.Index.from_state(index.state())  # checks every link
    kept = np.setdiff1d(np.arange(2000), gone)
    for name, rows in rows_of(before, kept).items():
        assert_exact(tensors_of(index)[name], rows)
        assert_exact(state.tensors[name], before[name])
    assert not tensors_of(index)["removed"].any()
    vectors = index.get(kept)
    ids = index.search(queries, 10, ef=40)[1]
    expected = ref.search(queries, vectors, 10, "ip" if metric == "cosine" else metric, kept)[1]
    assert ref.recall(ids, expected) > 0.95
    index.add(x[gone[:50]], gone[:50])
    assert len(index) == 2000 - count + len(gone[:50])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("count", [300, 700, 1500])
def test_compact_does_not_depend_on_thread_count(rng, isa, storage, count):
    x, gone, graphs = sample(rng, 2000, 9), rng.permutation(2000)[:count], []
    for num_threads in (1, 2, 7):
        index = build(x, **STORAGES[storage], m=5, ef_construction=30)
        index.remove(gone, num_threads=num_threads)
        index.compact(num_threads=num_threads)
        graphs.append(tensors_of(index))
    for graph in graphs[1:]:
        for name, tensor in graph.items():
            assert_exact(tensor, graphs[0][name])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_few_of_many_are_linked_as_in_a_new_index(rng, storage):
    x = sample(rng, 1500, 8)
    index = build(x, **STORAGES[storage])
    index.remove(np.arange(1499, 400, -1))
    for name, tensor in tensors_of(build(x[:401], **STORAGES[storage])).items():
        assert_exact(tensors_of(index)[name], tensor)


@pytest.mark.parametrize("always", [False, True])
def test_replacing_vectors_takes_no_more_memory_and_loses_no_recall(rng, always):
    """All of them 20 times, a tenth at a time."""
    n, queries, ids = 1000, sample(rng, 300, 12), np.arange(1000)
    x = sample(rng, n, 12)
    index = build(x, m=8, ef_construction=60)
    most = 2.2 * build(np.concatenate([x, x]), m=8, ef_construction=4).nbytes
    for _ in range(20):
        for some in np.array_split(rng.permutation(n), 10):
            index.remove(some)
            if always:
                index.compact()
            x[some] = sample(rng, len(some), 12)
            index.add(x[some], some)
            assert len(tensors_of(index)["ids"]) <= (n if always else 2 * n)
            assert index.nbytes <= most
    assert_exact(index.get(ids), x)
    truth = ref.search(queries, x, 10, "l2")[1]
    replaced, fresh = (
        ref.recall(each.search(queries, 10, ef=16)[1], truth) for each in (index, build(x, m=8, ef_construction=60))
    )
    assert replaced > fresh - 0.02
    assert len(tensors_of(index.freeze())["ids"]) == n


def test_a_few_vectors_among_removed_ones_stay_within_reach(rng):
    """Their neighbours, and those of their neighbours, are all removed."""
    x = sample(rng, 3000, 4)
    x[1500:] += 50
    index = build(x, m=4, ef_construction=30)
    kept = np.arange(0, 1500, 100)
    index.remove(np.setdiff1d(np.arange(1500), kept))
    index.compact()
    found = index.search(x[kept], 5, ef=60)[1]
    assert_exact(found[:, 0], kept)
    assert ref.recall(found, ref.search(x[kept], x[kept], 5, "l2", kept)[1]) > 0.9
    assert ref.recall(index.search(x[1500:1600], 5)[1], ref.search(x[1500:1600], x[1500:], 5, "l2")[1] + 1500) > 0.98


def test_links_for_queries_outlast_compact(rng):
    x, queries = sample(rng, 600, 10), sample(rng, 100, 10) + 1
    index = build(x, "ip", m=4)
    index.fit_queries(queries, k=20)
    before = tensors_of(index)["links"]
    index.remove([599])
    index.compact()
    links = tensors_of(index)["links"]
    whole = ~(before == 599).any(1)[:599]
    assert np.mean((before[:599][whole] == links[whole]).all(1)) > 0.8


def test_compact_of_a_file(rng, tmp_path):
    x, queries = sample(rng, 300, 6), sample(rng, 40, 6)
    index = build(x)
    index.remove(np.arange(100))
    index.save(tmp_path / "index.pv")
    before = (tmp_path / "index.pv").read_bytes()
    mapped = pv.hnsw.Index.load(tmp_path / "index.pv", mmap=True)
    for each in (index, mapped):
        each.compact()
        assert len(tensors_of(each)["ids"]) == 200
    assert_exact(mapped.search(queries, 5), index.search(queries, 5))
    assert (tmp_path / "index.pv").read_bytes() == before
    mapped.compact()  # there is nothing to do
    pv.hnsw.Index(4).compact()


def test_numbers_of_removed_vectors_are_not_given_again(rng, tmp_path):
    index = build(sample(rng, 10, 3))
    index.remove(np.arange(3, 10))
    assert len(tensors_of(index)["ids"]) == 3
    index.save(tmp_path / "index.pv")
    for each in (index, pv.hnsw.Index.load(tmp_path / "index.pv"), pickle.loads(pickle.dumps(index))):
        each.add(sample(rng, 2, 3))
        assert_exact(each.ids, [0, 1, 2, 10, 11])
    tensors, params = index.state()
    del params["largest_id"]  # as files had it before
    assert pv.hnsw.Index.from_state(State(tensors, params)).ids.max() == 11


@pytest.mark.parametrize("count", [60_000, 100_000])
def test_ctrl_c_leaves_an_index_that_is_to_be_compacted(python, count):
    code = f"""if True:
        import numpy as np, os, polyvec as pv, signal, threading
        x = np.random.default_rng(0).standard_normal((150_000, 8), np.float32)
        index = pv.hnsw.Index(8, metric="l2", m=48, ef_construction=1)
        index.add(x, num_threads=2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with Ctrl-C ignored
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            index.remove(np.arange({count}), num_threads=1)
            index.compact(num_threads=1)
            print("finished")
        except KeyboardInterrupt:
            assert len(index) == len(x) - {count}
            assert len(index.state().tensors["ids"]) == len(x)
            assert index.search(x[-9:], 1)[1].min() >= {count}
            print("interrupted")
    """
    assert python("-c", code).stdout == "interrupted\n"


def test_searches_go_on_while_an_index_is_compacted(rng):
    x, queries = sample(rng, 3000, 8), sample(rng, 50, 8)
    index = build(x, num_threads=2)
    errors, stop, searches = [], threading.Event(), []

    def search():
        while not stop.is_set():
            ids = index.search(queries, 5)[1]
            searches.append(len(index))
            if ids.min() < 1200:
                errors.append(ids)

    index.remove(np.arange(1200))
    thread = threading.Thread(target=search)
    thread.start()
    for first in (1200, 2000):
        index.remove(np.arange(first, first + 100))
        index.compact()
    stop.set()
    thread.join()
    assert not errors
    assert len(index) == 1600
    assert len(tensors_of(index)["ids"]) == 1600


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_what_no_link_leads_to_is_found_where_too_little_is(rng, metric, storage):
    """Most of many equal vectors are out of reach where hardly any candidates are kept."""
    x = sample(rng, 1000, 8)
    x[rng.random(1000) < 0.7] = 0
    queries = sample(rng, 100, 8)
    index = build(x, metric, **STORAGES[storage], m=2, ef_construction=1)
    for each in (index, index.freeze()):
        for k in (10, 300):
            ids = each.search(queries, k, ef=max(k, 50))[1]
            assert ids.min() >= 0
            assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("frozen", [False, True])
def test_many_candidates_are_compared_with_all(rng, metric, frozen):
    x, queries = sample(rng, 3000, 5), sample(rng, 9, 5)
    index = build(x, metric, m=4)
    index = index.freeze() if frozen else index
    for k, include in ((1100, None), (3000, None), (1100, np.arange(0, 3000, 2)), (1500, np.arange(0, 3000, 2))):
        kept = np.arange(3000) if include is None else include
        scores, ids = index.search(queries, k, include=include)
        assert_scores(scores, ids, queries, build(x, metric, ef_construction=1), x)
        expected = ref.search(queries, x[kept], k, metric, kept)[1]
        assert ref.recall(ids, expected) > 0.9995  # ties


def test_ctrl_c_stops_searches_with_many_candidates(python):
    code = """if True:
        import numpy as np, os, polyvec as pv, signal, threading, time
        x = np.random.default_rng(0).standard_normal((50_000, 8), np.float32)
        index = pv.hnsw.Index(8, metric="l2", m=2, ef_construction=1)
        index.add(x)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with Ctrl-C ignored
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            index.search(x, 1, ef=len(index), num_threads=1)
            print("finished")
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert python("-c", code).stdout == "interrupted\n"


# Filters


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_recall_among_included_vectors(rng, data, storage, frozen):
    vectors = read(data / "sift-10k" / "vectors.npy.xz").astype(np.float32)
    n = 5000
    x, queries = vectors[:n], vectors[n : n + 100]
    index = pv.hnsw.Index(128, metric="l2", **STORAGES[storage])
    index.add(x, num_threads=2)
    index = index.freeze() if frozen else index
    for count in (2500, 1800, 500, 50, 5):
        shown = np.sort(rng.permutation(n)[:count])
        scores, ids = index.search(queries, 10, ef=24 if count > 2000 else 15, include=shown)
        found = min(10, count)
        assert np.isin(ids[:, :found], shown).all()
        assert_exact(ids[:, found:], np.full((100, 10 - found), -1))
        assert np.isinf(scores[:, found:]).all()
        truth = ref.search(queries, index.get(shown), found, "l2", shown)
        # The two longest lists are walked for, the others are compared.
        assert ref.recall(ids[:, :found], truth[1]) > (0.85 if count > 1000 else 0.999)


def test_a_mask_says_the_same_as_ids(rng):
    x, queries = sample(rng, 3000, 8), sample(rng, 20, 8)
    index = build(x)
    for count in (2000, 30):
        shown = rng.permutation(3000)[:count]
        mask = np.zeros(3000, bool)
        mask[shown] = True
        ids = index.search(queries, 10, ef=12, include=shown)[1]
        for other in (mask, mask[: shown.max() + 1], np.append(mask, True), np.append(shown[::-1], [7000, -5])):
            assert_exact(index.search(queries, 10, ef=12, include=other)[1], ids)


@pytest.mark.parametrize("frozen", [False, True])
def test_included_vectors_far_from_the_query_are_all_compared(rng, frozen):
    """Near vectors are all hidden: a walk through them gives up."""
    near, far = sample(rng, 3000, 8), sample(rng, 1500, 8) + 20
    index = build(np.concatenate([near, far]))
    index = index.freeze() if frozen else index
    scores, ids = index.search(near[:30], 10, ef=10, include=np.arange(3000, 4500))
    expected, truth = ref.search(near[:30], far, 10, "l2", np.arange(3000, 4500))
    assert_exact(ids, truth)
    assert_reduction(scores, expected, expected, length=16)


@pytest.mark.parametrize("frozen", [False, True])
def test_including_all_or_none(rng, frozen):
    x, queries = sample(rng, 900, 6), sample(rng, 20, 6)
    index = build(x)
    index.remove(np.arange(0, 900, 3))
    index = index.freeze() if frozen else index
    both = index.search(queries, 5, ef=8), index.search(queries, 5, ef=8, include=np.arange(900))
    for one, other in zip(*both, strict=True):
        assert_exact(one, other)
    for none in ([], np.zeros(900, bool), np.zeros(0, bool), [0, 3, 2**62], np.array([], np.int32)):
        scores, ids = index.search(queries, 5, include=none)
        assert_exact(ids, np.full((20, 5), -1))
        assert_exact(scores, np.full((20, 5), np.inf))
    assert index.search(queries, 5, include=[4, 4])[1][:, :2].tolist() == [[4, -1]] * 20


def test_included_ids_are_names(rng):
    x = sample(rng, 6, 3)
    index = pv.hnsw.Index(3, metric="l2")
    index.add(x, [2**63 - 1, -7, 3, 900, 5, 0])
    assert_exact(index.search(x[:1], 6, include=[-7, 900, 2**63 - 1])[1][0, 3:], [-1, -1, -1])
    assert sorted(index.search(x[:1], 2, include=[900, -7])[1][0]) == [-7, 900]
    for some in ({900, -7}, frozenset([900, -7]), {900: "a", -7: "b"}.keys(), (i for i in (900, -7)), (-7, 900)):
        assert sorted(index.search(x[:1], 2, include=some)[1][0]) == [-7, 900]
    for none in (set(), [], range(0), np.array([])[:0].tolist()):
        assert_exact(index.search(x[:1], 2, include=none)[1], [[-1, -1]])
    assert sorted(index.search(x[:1], 3, include=np.uint8([0, 3, 0]))[1][0]) == [-1, 0, 3]  # ids, as of any integers
    assert sorted(index.search(x[:1], 3, include=[True, False, True, True, True, False])[1][0]) == [-1, 0, 3]


def test_filtered_searches_do_not_depend_on_threads_or_company(rng, isa):
    x, queries = sample(rng, 3000, 20), sample(rng, 100, 20)
    for index in (build(x, storage="int8"), build(x).freeze()):
        for count in (2000, 300):  # walked for, compared
            include = rng.permutation(3000)[:count]
            together = index.search(queries, 7, ef=10, include=include, num_threads=2)
            alone = [index.search(query[None], 7, ef=10, include=include, num_threads=1) for query in queries]
            for part in (0, 1):
                assert_exact(together[part], np.concatenate([result[part] for result in alone]))


@settings(max_examples=25)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "add", "remove", "reload", "compact"]), st.integers(0, 40)), max_size=8
    ),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_changes(steps, seed):
    rng = np.random.default_rng(seed)
    index, model = pv.hnsw.Index(3, metric="l2", m=4, ef_construction=10), {}
    for step, n in steps:
        if step == "add":
            ids = rng.permutation(200)[:n]
            ids = ids[~np.isin(ids, list(model))]
            x = sample(rng, len(ids), 3)
            index.add(x, ids)
            model.update(zip(ids.tolist(), x, strict=True))
        elif step == "remove":
            ids = rng.permutation(np.array(list(model), np.int64))[:n]
            index.remove(ids)
            for i in ids.tolist():
                del model[i]
        elif step == "compact":
            index.compact()
        else:
            index = pv.hnsw.Index.from_state(index.state())
    assert len(index) == len(model)
    assert_exact(index.ids, list(model))
    if model:
        queries, vectors = sample(rng, 4, 3), np.stack(list(model.values()))
        assert_exact(index.get(list(model)), vectors)
        expected = ref.search(queries, vectors, 5, "l2", list(model))[1]
        assert_exact(index.search(queries, 5, ef=200)[1], expected)


# Calls


def test_the_caller_gets_the_library_it_gave(rng, lib):
    x = lib(sample(rng, 20, 5))
    index = pv.hnsw.Index(5)
    index.add(x, lib(np.arange(20)))
    scores, ids = index.search(x, 3)
    assert type(scores) is type(ids) is type(x)
    assert_exact(ids[:, 0], np.arange(20))
    out = lib(np.empty((20, 3), np.float32)), lib(np.empty((20, 3), np.int64))
    assert index.search(x, 3, out=out) == out
    assert_exact(out[0], scores)
    assert type(index.get(lib(np.arange(2)))) is type(x)
    index.remove(lib(np.arange(5)))
    assert len(index) == 15


def test_strided_input(rng):
    big = sample(rng, 20, 12)
    index = build(big[::2, 1:9])
    assert_exact(index.search(big[::2, 1:9], 1)[1][:, 0], np.arange(10))


def test_progress(rng, capsys, monkeypatch):
    monkeypatch.setattr(pv.hnsw, "_CHUNK", 40)
    index, calls = pv.hnsw.Index(4), []
    index.add(sample(rng, 100, 4), progress=lambda done, total: calls.append((done, total, len(index))))
    assert calls == [(40, 100, 40), (80, 100, 80), (100, 100, 100)]
    index.add(sample(rng, 10, 4), progress=True)
    assert "hnsw.Index.add: 100%" in capsys.readouterr().err

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        index.add(sample(rng, 100, 4), progress=stop)
    assert_exact(index.ids, np.arange(150))  # what was done before is kept


def test_two_python_threads_search_while_another_changes_the_index(rng):
    x, queries = sample(rng, 3000, 8), sample(rng, 50, 8)
    index = build(x[:1000])
    errors, stop = [], threading.Event()

    def search():
        while not stop.is_set():
            scores, ids = index.search(queries, 5, num_threads=2)
            if not (np.all(ids >= 0) and np.all(np.diff(scores) >= 0)):
                errors.append(ids)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    index.add(x[1000:])
    index.remove(np.arange(100))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(index) == 2900
    assert (
        ref.recall(index.search(queries, 5)[1], ref.search(queries, x[100:], 5, "l2", np.arange(100, 3000))[1]) > 0.95
    )


@pytest.mark.parametrize("num_threads", [1, 2])
def test_ctrl_c_leaves_the_vectors_before_some_row(python, num_threads):
    code = f"""if True:
        import numpy as np, os, polyvec as pv, signal, threading
        pv.hnsw._CHUNK = 10**9
        x = np.random.default_rng(0).standard_normal((200_000, 8), np.float32)
        index = pv.hnsw.Index(8, metric="l2", ef_construction=1000)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with Ctrl-C ignored
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            index.add(x, num_threads={num_threads})
            print("finished")
        except KeyboardInterrupt:
            n = len(index)
            assert 0 < n < len(x), n
            assert (index.ids == np.arange(n)).all()
            assert (index.get(index.ids) == x[:n]).all()
            again = pv.hnsw.Index.from_state(index.state())  # checks every link
            rows = np.arange(0, n, 1 + n // 50)
            assert (again.search(x[rows], 1)[1][:, 0] == rows).mean() > 0.9
            index.add(x[n : n + 100])
            assert len(index) == n + 100
            print("interrupted")
    """
    assert python("-c", code).stdout == "interrupted\n"


# Files


@pytest.fixture(params=STORAGES)
def saved(rng, tmp_path, request):
    index = pv.hnsw.Index(7, metric="cosine", **STORAGES[request.param], m=3, ef_construction=20, seed=9)
    index.add(sample(rng, 60, 7), np.arange(60) * 3)
    index.remove([3, 30])
    index.save(tmp_path / "index.pv")
    return index, tmp_path / "index.pv"


@pytest.mark.parametrize("mmap", [False, True])
def test_a_loaded_index_is_the_saved_one(rng, saved, mmap):
    index, path = saved
    loaded = pv.hnsw.Index.load(path, mmap=mmap)
    assert repr(loaded) == repr(index)
    params = index.state().params
    rerank = f", rerank={params['rerank']!r}" if "rerank" in params else ""
    assert repr(loaded) == (
        f"hnsw.Index(dim=7, metric='cosine', storage={params['storage']!r}, m=3, ef_construction=20, seed=9{rerank}, "
        "58 vectors)"
    )
    queries, more = sample(rng, 20, 7), sample(rng, 200, 7)
    before = path.read_bytes()
    for _ in range(2):
        assert_exact(loaded.search(queries, 5, ef=9), index.search(queries, 5, ef=9))
        assert_exact(loaded.ids, index.ids)
        for each in (index, loaded):  # the loaded one copies first
            each.add(more, num_threads=1)
            each.remove([0])
        more, index = more + 1, pv.hnsw.Index.from_state(index.state())
        index.add(np.ones((1, 7), np.float32), [0])
        loaded.add(np.ones((1, 7), np.float32), [0])
    assert path.read_bytes() == before


def test_mapped_tensors_are_used_in_place(saved):
    _, path = saved
    mapped = pv.hnsw.Index.load(path, mmap=True)
    vectors = mapped.state().tensors["vectors"]
    queries = mapped.get(mapped.ids)
    with open("/proc/self/maps") as maps:
        areas = [line.split() for line in maps if line.rstrip().endswith(str(path))]
    begin, end = (int(address, 16) for address in areas[0][0].split("-"))
    assert begin <= vectors.ctypes.data < end
    path.unlink()
    assert_exact(mapped.search(queries, 1)[1][:, 0], mapped.ids)


def test_an_empty_index_is_a_file_too(tmp_path):
    pv.hnsw.Index(4).save(tmp_path / "empty.pv")
    for mmap in (False, True):
        loaded = pv.hnsw.Index.load(tmp_path / "empty.pv", mmap=mmap)
        assert len(loaded) == 0
        loaded.add(np.eye(4, dtype=np.float32))
        assert len(loaded) == 4


def test_state_is_a_snapshot(rng):
    index = build(sample(rng, 100, 4))
    state = index.state()
    before = {name: tensor.copy() for name, tensor in state.tensors.items()}
    index.add(sample(rng, 1, 4))
    index.remove([5])
    del index
    for name, tensor in state.tensors.items():
        assert_exact(tensor, before[name])


def test_pickle(rng):
    index = build(sample(rng, 100, 4))
    queries = sample(rng, 9, 4)
    assert_exact(pickle.loads(pickle.dumps(index)).search(queries, 3), index.search(queries, 3))


def test_a_damaged_file_is_refused(saved):
    """In every region; test_files.py goes through every byte."""
    _, path = saved
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for length in [0, 7, 8, 9, data - 1, data, data + 1, *range(data, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(pv.FormatError, match=r"^hnsw.Index.load: .*index.pv "):
            pv.hnsw.Index.load(path)
    tensors = saved[0].state().tensors
    lazy = range(data, data + sum(tensors[name].nbytes for name in ("vectors", "codes") if name in tensors))
    for position in [*range(8), *range(8, data, 31), *range(data, len(whole), 29)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        for mmap in (False, True):
            if mmap and position in lazy:
                assert len(pv.hnsw.Index.load(path, mmap=True)) == 58  # not verified, harmless
            else:
                with pytest.raises(pv.FormatError):
                    pv.hnsw.Index.load(path, mmap=mmap)


def with_entry(name, position, value):
    def change(state):
        tensor = state.tensors[name].copy()
        tensor[position] = value
        state.tensors[name] = tensor

    return change


@pytest.fixture
def state(rng):
    """A state with vectors in float32."""
    index = pv.hnsw.Index(7, metric="cosine", m=3, ef_construction=20, seed=9)
    index.add(sample(rng, 60, 7), np.arange(60) * 3)
    return index.state()


CODES = {"codes": np.zeros((60, 7), np.uint8), "factors": np.zeros((60, 2), np.float32)}


def with_tensor(name, make):
    return lambda state: state.tensors.update({name: make(state.tensors[name])})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_entry("links", (3, 0), 60), "is damaged: slot 3 must have links to slots of its level 0, got 60"),
        (
            with_entry("links", (3, 0), 2**31),
            "is damaged: slot 3 must have links to slots of its level 0, got 2147483648",
        ),
        (with_entry("links", (0, 0), 2**32 - 1), "is damaged: slot 0 must have no link after its last"),
        (with_entry("levels", 0, 64), "is damaged: levels must be at most 63, got 64"),
        (with_entry("ids", 4, 0), "is damaged: ids must be distinct"),
        (with_entry("ids", 4, -1), "is damaged: ids must not be -1"),
        (
            with_tensor("vectors", lambda x: x[:-1]),
            "is damaged: vectors must be float32 with 60 rows, got float32 of shape (59, 7)",
        ),
        (
            lambda state: state.params.update(storage="float16"),
            "is damaged: vectors must be float16 with 60 rows, got float32 of shape (60, 7)",
        ),
        (
            lambda state: state.params.update(storage="bfloat16"),
            "is damaged: vectors must be uint16 with 60 rows, got float32 of shape (60, 7)",
        ),
        (
            with_tensor("links", lambda x: x[:, :-1].copy()),
            "is damaged: links must be uint32 with 60 rows, got uint32 of shape (60, 5)",
        ),
        (
            with_tensor("links", lambda x: x.view(np.int32)),
            "is damaged: links must be uint32 with 60 rows, got int32 of shape (60, 6)",
        ),
        (
            with_tensor("ids", lambda x: x.reshape(6, 10)),
            "is damaged: ids must be int64 with 6 rows, got int64 of shape (6, 10)",
        ),
        (lambda state: state.params.update(entry=60), "is damaged: entry must be a slot of the highest level, got 60"),
        (lambda state: state.params.update(entry=-1), "is damaged: entry must be a slot of the highest level, got -1"),
        (
            lambda state: (state.params.update(storage="int8"), state.tensors.update(CODES)),
            "is damaged: codes must be uint8 with 60 rows, got uint8 of shape (60, 7)",
        ),
        (
            lambda state: (state.params.update(storage="int8", rerank="int8"), state.tensors.update(CODES)),
            "is damaged: vectors must be uint8 with 60 rows, got float32 of shape (60, 7)",
        ),
        (
            lambda state: (
                state.params.update(storage="int4", rerank="int8"),
                state.tensors.update(CODES, vectors=np.zeros((60, 64), np.uint8), codes=np.zeros((60, 64), np.uint8)),
                state.tensors.update(scales=np.zeros((60, 1), np.float32)),
            ),
            "is damaged: scales must be float32 with 60 rows, got float32 of shape (60, 1)",
        ),
        (
            lambda state: state.params.update(m=4),
            "is damaged: links must be uint32 with 60 rows, got uint32 of shape (60, 6)",
        ),
    ],
)
def test_a_state_that_does_not_fit_together(state, change, text):
    change(state)
    with pytest.raises(pv.FormatError) as caught:
        pv.hnsw.Index.from_state(state)
    assert str(caught.value) == text


def test_a_link_to_a_slot_of_a_lower_level_is_refused(saved):
    state = saved[0].state()
    upper, low = state.tensors["upper_links"].copy(), int(np.argmin(state.tensors["levels"]))
    upper[0, 0] = low
    with pytest.raises(pv.FormatError, match=f"must have links to slots of its level 1, got {low}$"):
        pv.hnsw.Index.from_state(State({**state.tensors, "upper_links": upper}, state.params))


def test_a_file_with_strange_parameters(saved):
    from polyvec import _files

    index, path = saved
    for key, value in [("dim", "7"), ("dim", -7), ("dim", 2**62), ("m", 10**30), ("metric", "hamming"), ("entry", 1.5)]:
        tensors, params = index.state()
        _files.save(path, "hnsw.Index", State(tensors, {**params, key: value}))
        with pytest.raises(pv.FormatError, match="is damaged: "):
            pv.hnsw.Index.load(path)


# Frozen indexes


def frozen_state(index):
    """The state of a frozen index, and the vectors, levels and factors in it."""
    tensors = index.state().tensors
    x, codes = tensors["vectors"], tensors["codes"]
    n, d = x.shape
    plane = -(-d // 32) * 4
    bits, whole = ref.frozen_bits(d)
    width = 64 if whole else -(-(plane + 12) // 64) * 64
    first, second = codes.reshape(-1)[: n * width].reshape(n, width), codes.reshape(-1)[n * width :].reshape(n, -1)
    assert second.shape[1] == (0 if whole else -(-plane // 64) * 64 if plane > 32 else 32)
    planes = [first[:, i * plane :] for i in range(bits)] if whole else [first, second]
    factors = first[:, (bits if whole else 1) * plane :][:, :12].copy().view(np.float32)

    def unpacked(part):
        packed = part[:, None, :plane] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        return packed.reshape(n, -1)[:, :d].astype(np.float64)

    levels = sum(2**i * unpacked(part) for i, part in enumerate(reversed(planes)))
    return tensors, x, 2 * levels + 1 - 2**bits, factors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 33, 96, 97, 127, 128, 129, 192, 193, 256, 384, 1100])
def test_frozen_codes_are_those_of_the_definition(rng, isa, metric, d):
    x = sample(rng, 50, d) + np.float32(0.5)
    tensors, x, levels, factors = frozen_state(build(x, metric, seed=3).freeze())
    frame = tensors["frame"]
    assert frame.shape == (5, d)
    assert_reduction(frame[0], x.mean(0, dtype=np.float64), np.abs(x).mean(0), length=50)
    expected, scales, residuals = ref.frozen_codes(x, frame)
    steps = residuals / ref.frozen_step(residuals)
    near = np.abs(steps - np.rint(steps)) < 1e-4
    assert_exact(levels[~near], expected[~near])
    assert near.mean() < 0.01
    whole = ~near.any(1)
    assert_reduction(factors[whole, 2], scales[whole], scales[whole], length=d)
    rough = (residuals**2).sum(1) / np.maximum(np.abs(residuals).sum(1), 1e-30)
    assert_reduction(factors[:, 0], rough, rough, length=d)
    centre = frame[0].astype(np.float64)
    added = (residuals**2).sum(1) if metric == "l2" else (x - centre) @ centre
    size = added if metric == "l2" else np.abs(x - centre) @ np.abs(centre)
    assert_reduction(factors[:, 1], added, size, length=d)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [2, 5, 31, 90, 128, 130, 192, 200, 300, 1300])
def test_frozen_walks_compare_by_the_definition(rng, isa, metric, d):
    """Where all candidates are asked for, they are those that are nearest by their codes. Among many, the one result is
    at least as good as the best of the 8 that are.
    """
    x, queries = sample(rng, 400, d) + np.float32(0.3), sample(rng, 100, d)
    index = build(x, metric, m=32).freeze()
    tensors, x = frozen_state(index)[:2]
    nearest = np.argsort(ref.frozen_distances(queries, x, tensors["frame"], metric), axis=1)[:, :40]
    found = index.search(queries, 40, ef=40)[1]
    assert ref.recall(found, index.ids[nearest]) > 0.9
    sign = 1 if metric == "l2" else -1
    expected = np.take_along_axis(sign * ref.score(queries, x, metric), nearest[:, :8], 1).min(1)
    best = sign * index.search(queries, 1, ef=399)[0][:, 0]
    assert np.mean(best <= expected + 1e-5 * np.abs(expected)) > 0.95


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [16, 100, 384, 600, 1030])
def test_frozen_walks_pass_by_little_that_is_near(rng, isa, metric, d):
    """Of wide vectors the high bits alone decide what a full pool takes a closer look at."""
    directions = sample(rng, 40, d) / 6  # as many dimensions as leave some near each other

    def draw(n):
        return sample(rng, n, 40) @ directions + np.float32(0.3) * sample(rng, n, d) + np.float32(0.2)

    x, queries = draw(1000), draw(100)
    index = build(x, metric, m=8)
    truth = ref.search(queries, x, 10, metric)[1]
    whole, frozen = (ref.recall(each.search(queries, 10, ef=80)[1], truth) for each in (index, index.freeze()))
    assert whole > 0.95
    assert frozen > whole - 0.03


@pytest.mark.parametrize("d", [16, 64, 128])
def test_narrow_vectors_freeze_without_loss(rng, isa, d):
    """More bits an element, where a cache line has room for them: with two recall falls by .1 to .2."""
    x, queries = sample(rng, 4000, d), sample(rng, 300, d)
    x[:, 16:] *= np.float32(0.2)
    index = build(x, ef_construction=100)
    truth = ref.search(queries, x, 10, "l2")[1]
    whole, frozen = (ref.recall(each.search(queries, 10, ef=20)[1], truth) for each in (index, index.freeze()))
    assert frozen > whole - 0.03


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_frozen_search_returns_true_scores(rng, isa, metric, storage):
    x, queries = sample(rng, 700, 40), sample(rng, 40, 40)
    index = build(x, metric, **STORAGES[storage])
    frozen = index.freeze()
    assert (frozen.frozen, index.frozen, len(frozen)) == (True, False, 700)
    assert repr(frozen) == repr(index)[:-1] + ", frozen)"
    assert_exact(np.sort(frozen.ids), np.arange(700))
    assert_exact(frozen.get([5, 600]), index.get([5, 600]))
    for k in (1, 10, 100):
        scores, ids = frozen.search(queries, k, ef=200)
        assert_scores(scores, ids, queries, frozen, x)
        assert all(len(set(row)) == k for row in ids.tolist())
        assert ref.recall(ids, ref.search(queries, x, k, metric)[1]) > 0.9
    scores, ids = frozen.search(queries, 700)
    assert_scores(scores, ids, queries, frozen, x)
    assert_exact(np.sort(ids, 1), np.tile(np.arange(700), (40, 1)))


def test_recall_of_frozen_sentence_vectors(data):
    x, queries = (
        read(data / "wordnet-minilm" / name).astype(np.float32) for name in ("base_i8.npy.xz", "queries.npy.xz")
    )
    x = np.ascontiguousarray(x[:6000] / np.linalg.norm(x[:6000], axis=1, keepdims=True))
    index = build(x, "ip", num_threads=2).freeze()
    for k, efs in ((10, (32, 96)), (100, (150, 300))):
        truth = pv.scan.topk(queries, x, k, metric="ip")[1]
        recalls = [ref.recall(index.search(queries, k, ef=ef)[1], truth) for ef in efs]
        assert recalls[0] > 0.93
        assert recalls[1] > 0.98
    assert index.nbytes < 1.5 * x.nbytes


def test_recall_of_frozen_sift(data):
    x, rows, queries, truth = split(
        read(data / "sift-10k" / "vectors.npy.xz"), read(data / "sift-10k" / "neighbors_l2_top100.npy.xz")
    )
    index = pv.hnsw.Index(128, metric="l2")
    index.add(x, rows)
    assert ref.recall(index.freeze().search(queries, 10, ef=96)[1], truth[:, :10]) > 0.97


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_frozen_index_of_few_vectors(rng, n):
    x, queries = sample(rng, n, 6), sample(rng, 3, 6)
    expected, names = ref.search(queries, x, n + 2, "l2")
    scores, ids = build(x).freeze().search(queries, n + 2)
    assert_exact(ids, names)
    assert_exact(scores[:, n:], expected[:, n:])


def test_freezing_does_not_depend_on_threads_nor_searches_on_company(rng, isa):
    x, queries = sample(rng, 3000, 20), sample(rng, 100, 20)
    index = build(x)
    one, two = (index.freeze(num_threads=n) for n in (1, 2))
    for name, tensor in one.state().tensors.items():
        assert_exact(two.state().tensors[name], tensor)
    together = one.search(queries, 7, num_threads=2)
    alone = [one.search(query[None], 7, num_threads=1) for query in queries]
    for part in (0, 1):
        assert_exact(together[part], np.concatenate([result[part] for result in alone]))


def test_frozen_queries_that_are_not_finite_find_nothing(rng):
    index = build(np.abs(sample(rng, 500, 4)), "ip").freeze()
    queries = np.full((2, 4), np.nan, np.float32)
    queries[1] = [1, np.inf, 1, 1]
    scores, ids = index.search(queries, 3)
    assert_exact(ids[0], [-1, -1, -1])
    assert np.all(np.isinf(scores))


def test_freezing_keeps_removed_vectors_out_and_the_original_as_it_is(rng):
    x = sample(rng, 500, 8)
    index = build(x)
    index.remove(np.arange(0, 500, 2))
    before = index.search(x, 5, ef=100)
    frozen = index.freeze()
    assert len(frozen) == len(tensors_of(frozen)["ids"]) == 250
    assert 3 in frozen
    assert 4 not in frozen
    ids = frozen.search(x, 5, ef=100)[1]
    assert np.all(ids % 2 == 1)
    index.add(x[:1], [0])
    index.remove([0])
    assert len(frozen) == 250
    assert_exact(index.search(x, 5, ef=100)[0], before[0])


@pytest.mark.parametrize("mmap", [False, True])
def test_a_frozen_file(rng, tmp_path, mmap):
    x, queries = sample(rng, 300, 12), sample(rng, 20, 12)
    index = build(x, "cosine", storage="int8")
    index.remove([7])
    index.freeze().save(tmp_path / "index.pv")
    loaded = pv.hnsw.Index.load(tmp_path / "index.pv", mmap=mmap)
    assert loaded.frozen
    for other in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert repr(other) == repr(index.freeze())
        assert_exact(other.search(queries, 5), index.freeze().search(queries, 5))
    whole = (tmp_path / "index.pv").read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    lazy = range(data, data + 300 * (64 + 12 * 4))
    for position in [*range(0, data, 41), *range(data, len(whole), 997), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "index.pv").write_bytes(flipped)
        if mmap and position in lazy:
            damaged = pv.hnsw.Index.load(tmp_path / "index.pv", mmap=True)
            assert damaged.search(queries, 5)[1].shape == (20, 5)
        else:
            with pytest.raises(pv.FormatError):
                pv.hnsw.Index.load(tmp_path / "index.pv", mmap=mmap)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.update(codes=tensors["codes"][:, :-1].copy()),
            "is damaged: codes must be uint8 with 30 rows, got uint8 of shape (30, 63)",
        ),
        (
            lambda tensors: tensors.update(frame=tensors["frame"][:4]),
            "is damaged: frame must be float32 with 5 rows, got float32 of shape (4, 7)",
        ),
    ],
)
def test_a_frozen_state_that_does_not_fit_together(rng, change, text):
    state = build(sample(rng, 30, 7)).freeze().state()
    change(state.tensors)
    with pytest.raises(pv.FormatError) as caught:
        pv.hnsw.Index.from_state(state)
    assert str(caught.value) == text


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_first_change_thaws(rng, metric, storage):
    x, more, queries = sample(rng, 600, 20), sample(rng, 50, 20), sample(rng, 40, 20)
    index = build(x, metric, **STORAGES[storage])
    index.remove([3])
    frozen = index.freeze()
    before = frozen.search(queries, 10, ef=50)
    order = frozen.ids
    for change in (lambda i: i.add(more), lambda i: i.remove([5]), lambda i: i.fit_queries(queries, k=5)):
        thawed = pv.hnsw.Index.from_state(frozen.state())
        change(thawed)
        assert frozen.frozen
        assert not thawed.frozen
        assert repr(thawed)[:-13] == repr(index)[:-13]
        assert_exact(frozen.search(queries, 10, ef=50), before)
        old = order[order != 5] if 5 not in thawed else order
        assert_exact(thawed.ids[: len(old)], old)
        assert_exact(thawed.get(old), index.get(old))
        tensors, named = tensors_of(thawed), tensors_of(index)
        assert set(tensors) == set(named)
        of = named["ids"].argsort()[tensors["ids"][:599]]  # slots of the same ids
        for name in ("codes", "factors", "scales", "levels"):
            if name in tensors:
                assert_exact(tensors[name][:599], named[name][of])
        ids = thawed.search(queries, 10, ef=200)[1]
        truth = ref.search(queries, np.concatenate([x, more])[thawed.ids], 10, metric, thawed.ids)[1]
        assert ref.recall(ids, truth) > 0.93


@pytest.mark.parametrize("n", [0, 1, 2])
def test_thawing_few_vectors(rng, n):
    index = build(sample(rng, n, 4), storage="int4").freeze()
    index.compact()  # nothing is removed
    assert index.frozen
    index.add(sample(rng, 3, 4))
    assert_exact(index.search(sample(rng, 1, 4), n + 3)[1] >= 0, np.ones((1, n + 3), bool))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda i: i.add(np.full((1, 3), np.nan, np.float32)),
            ValueError,
            "hnsw.Index.add: vectors must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda i: i.add(zeros(1, 3), [4]),
            ValueError,
            "hnsw.Index.add: ids must be new, got 4, which is in the index",
        ),
        (lambda i: i.remove([30]), IndexError, "hnsw.Index.remove: ids must be in the index, got 30"),
        (
            lambda i: i.fit_queries(zeros(1, 4)),
            ValueError,
            "hnsw.Index.fit_queries: queries must have d = 3, got 4",
        ),
        (
            lambda i: i.freeze(),
            ValueError,
            "hnsw.Index.freeze: index must not be frozen, got one that freeze returned",
        ),
        (
            lambda i: i.freeze(num_threads=0),
            ValueError,
            "hnsw.Index.freeze: num_threads must be at least 1, got 0",
        ),
    ],
)
def test_a_call_that_is_refused_thaws_nothing(rng, call, error, text):
    index = build(sample(rng, 30, 3)).freeze()
    with pytest.raises(error) as caught:
        call(index)
    assert str(caught.value) == text
    assert index.frozen
    assert len(index) == 30


def test_vectors_too_wide_to_freeze():
    with pytest.raises(ValueError, match=r"^hnsw.Index.freeze: dim must be at most 131072, got 131073$"):
        pv.hnsw.Index(131073).freeze()


# Errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def bad_row():
    x = zeros(3, 4)
    x[1, 2] = np.nan
    return x


@pytest.fixture
def index():
    index = pv.hnsw.Index(4, metric="l2")
    index.add(np.eye(4, dtype=np.float32), [5, 6, 7, 8])
    return index


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda _: pv.hnsw.Index(0), ValueError, "hnsw.Index: dim must be at least 1, got 0"),
        (lambda _: pv.hnsw.Index(4, m=1), ValueError, "hnsw.Index: m must be at least 2, got 1"),
        (lambda _: pv.hnsw.Index(4, seed=-1), ValueError, "hnsw.Index: seed must be at least 0, got -1"),
        (lambda _: pv.hnsw.Index(4, seed=2**63), ValueError, f"hnsw.Index: seed must be below 2^63, got {2**63}"),
        (lambda _: pv.hnsw.Index(4, m=1025), ValueError, "hnsw.Index: m must be in [2, 1024], got 1025"),
        (
            lambda _: pv.hnsw.Index(4, metric="dot"),
            ValueError,
            "hnsw.Index: metric must be one of 'cosine', 'ip', 'l2', got 'dot'",
        ),
        (
            lambda _: pv.hnsw.Index(4, storage="int2"),
            ValueError,
            "hnsw.Index: storage must be one of 'float32', 'float16', 'bfloat16', 'int8', 'int4', got 'int2'",
        ),
        (
            lambda _: pv.hnsw.Index(4, storage="float16", rerank="float16"),
            ValueError,
            "hnsw.Index: rerank must be None unless storage is 'int8' or 'int4', got 'float16'",
        ),
        (
            lambda _: pv.hnsw.Index(4, storage="int8", rerank="int4"),
            ValueError,
            "hnsw.Index: rerank must be one of 'float32', 'float16', 'bfloat16', 'int8', got 'int4'",
        ),
        (
            lambda _: pv.hnsw.Index(131073, storage="int8"),
            ValueError,
            "hnsw.Index: dim must be at most 131072 with codes, got 131073",
        ),
        (lambda i: i.add(zeros(2, 3)), ValueError, "hnsw.Index.add: vectors must have d = 4, got 3"),
        (lambda i: i.add(zeros(4)), ValueError, "hnsw.Index.add: vectors must have 2 axes, got shape (4,)"),
        (
            lambda i: i.add(zeros(2, 4, dtype=np.float64)),
            TypeError,
            "hnsw.Index.add: vectors must be float32 or float16 or bfloat16, got float64; cast it with "
            ".astype('float32')",
        ),
        (
            lambda i: i.add(bad_row()),
            ValueError,
            "hnsw.Index.add: vectors must be finite, got NaN or Inf in row 1",
        ),
        (lambda i: i.add(zeros(2, 4), [1]), ValueError, "hnsw.Index.add: ids must have one entry a vector (2), got 1"),
        (lambda i: i.add(zeros(2, 4), [0.5, 1]), TypeError, "hnsw.Index.add: ids must be integers, got float64"),
        (
            lambda i: i.add(zeros(2, 4), np.uint64([2**63 + 5, 7])),
            ValueError,
            f"hnsw.Index.add: ids must be below 2^63, got {2**63 + 5}",
        ),
        (lambda i: "a" in i, TypeError, "hnsw.Index: id must be an integer, got str"),
        (lambda i: 5.0 in i, TypeError, "hnsw.Index: id must be an integer, got float"),
        (lambda i: i.add(zeros(3, 4), [1, 2, 1]), ValueError, "hnsw.Index.add: ids must be distinct, got 1 twice"),
        (
            lambda i: i.add(zeros(2, 4), [1, 7]),
            ValueError,
            "hnsw.Index.add: ids must be new, got 7, which is in the index",
        ),
        (
            lambda i: i.add(zeros(1, 4), [-1]),
            ValueError,
            "hnsw.Index.add: ids must not be -1, which stands for a missing result",
        ),
        (
            lambda i: i.add(zeros(1, 4), progress=3),
            TypeError,
            "hnsw.Index.add: progress must be None, a bool or a callable (done, total), got int",
        ),
        (lambda i: i.search(zeros(2, 5), 1), ValueError, "hnsw.Index.search: queries must have d = 4, got 5"),
        (lambda i: i.search(zeros(2, 4), 0), ValueError, "hnsw.Index.search: k must be at least 1, got 0"),
        (lambda i: i.search(zeros(2, 4), -3), ValueError, "hnsw.Index.search: k must be at least 1, got -3"),
        (lambda i: i.search(zeros(2, 4), 1.5), TypeError, "hnsw.Index.search: k must be an integer, got float"),
        (
            lambda i: i.search(zeros(2, 4), 1, margin=-0.1),
            ValueError,
            "hnsw.Index.search: margin must be a finite number of at least 0, got -0.1",
        ),
        (
            lambda i: i.search(zeros(2, 4), 1, margin=np.nan),
            ValueError,
            "hnsw.Index.search: margin must be a finite number of at least 0, got nan",
        ),
        (
            lambda i: i.search(zeros(2, 4), 1, margin="0"),
            TypeError,
            "hnsw.Index.search: margin must be a number, got str",
        ),
        (
            lambda _: pv.hnsw.Index(4, metric="ip").search(zeros(2, 4), 1, margin=0.1),
            ValueError,
            "hnsw.Index.search: margin must be None unless metric is 'cosine' or 'l2', got 0.1",
        ),
        (lambda i: i.search(zeros(2, 4), 1, ef=0), ValueError, "hnsw.Index.search: ef must be at least 1, got 0"),
        (
            lambda i: i.search(zeros(2, 4), 1, ef=10**30),
            ValueError,
            f"hnsw.Index.search: ef must be below 2^63, got {10**30}",
        ),
        (
            lambda i: i.search(zeros(2, 4), 1, out=(zeros(2, 1), zeros(2, 2, dtype=np.int64))),
            ValueError,
            "hnsw.Index.search: out ids must have shape (2, 1), got (2, 2)",
        ),
        (lambda i: i.fit_queries(zeros(2, 3)), ValueError, "hnsw.Index.fit_queries: queries must have d = 4, got 3"),
        (lambda i: i.fit_queries(zeros(2, 4), k=0), ValueError, "hnsw.Index.fit_queries: k must be at least 1, got 0"),
        (
            lambda i: i.fit_queries(bad_row()),
            ValueError,
            "hnsw.Index.fit_queries: queries must be finite, got NaN or Inf in row 1",
        ),
        (lambda _: pv.hnsw.knn_graph(zeros(3, 4), 0), ValueError, "hnsw.knn_graph: k must be at least 1, got 0"),
        (
            lambda _: pv.hnsw.knn_graph(zeros(3, 4), 1, metric="ip"),
            ValueError,
            "hnsw.knn_graph: metric must be one of 'l2', 'cosine', got 'ip'",
        ),
        (
            lambda _: pv.hnsw.knn_graph(bad_row(), 1),
            ValueError,
            "hnsw.knn_graph: x must be finite, got NaN or Inf in row 1",
        ),
        (lambda i: i.get([5, 9]), IndexError, "hnsw.Index.get: ids must be in the index, got 9"),
        (
            lambda i: i.search(zeros(1, 4), 1, include=[0.5]),
            TypeError,
            "hnsw.Index.search: include must be integers, got float64",
        ),
        (
            lambda i: i.search(zeros(1, 4), 1, include={"a"}),
            TypeError,
            "hnsw.Index.search: include must be integers, got <U1",
        ),
        (
            lambda i: i.search(zeros(1, 4), 1, include=3),
            ValueError,
            "hnsw.Index.search: include must have 1 axis, got shape ()",
        ),
        (
            lambda i: i.search(zeros(1, 4), 1, include=np.zeros((2, 2), bool)),
            ValueError,
            "hnsw.Index.search: include must have 1 axis, got shape (2, 2)",
        ),
        (lambda i: i.remove([5, 9]), IndexError, "hnsw.Index.remove: ids must be in the index, got 9"),
        (lambda i: i.remove([5, 5]), ValueError, "hnsw.Index.remove: ids must be distinct, got 5 twice"),
    ],
)
def test_errors_leave_the_index_unchanged(index, call, error, text):
    before = tensors_of(index)
    with pytest.raises(error) as caught:
        call(index)
    assert str(caught.value) == text
    for name, tensor in tensors_of(index).items():
        assert_exact(tensor, before[name])


def test_running_numbers_end(index):
    index.add(zeros(1, 4), [2**63 - 2])
    index.add(zeros(1, 4))
    with pytest.raises(ValueError, match="ids must be given, no numbers are left after 9223372036854775807"):
        index.add(zeros(1, 4))
    assert len(index) == 6


def test_files_of_other_kinds(tmp_path, index):
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "missing" / "index.pv")
    with pytest.raises(FileNotFoundError):
        pv.hnsw.Index.load(tmp_path / "missing.pv")
    pv.maxsim.pack([zeros(2, 3)]).save(tmp_path / "tokens.pv")
    with pytest.raises(pv.FormatError, match=r"tokens.pv holds another kind of object: maxsim.PackedTokens$"):
        pv.hnsw.Index.load(tmp_path / "tokens.pv")
