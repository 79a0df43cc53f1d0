"""The pipelines: multi-vector retrieval and link prediction."""

import copy
import pathlib
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

import polyvec as pv
import ranking
from accuracy import assert_exact
from polyvec._token_store import TokenStore
from reference import hypercomplex as hc
from reference import retrieve as ref

SCIFACT = pathlib.Path(__file__).parents[1] / "examples" / "data" / "scifact-small"
KNOWN_SCORE = 1e-6  # agreement asked of a filtered MRR with its float64 definition


def sample_docs(rng, n, dim=16, longest=9):
    docs = [rng.standard_normal((rng.integers(1, longest), dim)).astype(np.float32) for _ in range(n)]
    return [d / np.linalg.norm(d, axis=1, keepdims=True) for d in docs]


def scifact(n_queries):
    sample = load_file(SCIFACT / "tokens.safetensors")
    docs = pv.Ragged(sample["doc_tokens"] * sample["scale"], sample["doc_offsets"])
    return docs, pv.Ragged(sample["query_tokens"] * sample["scale"], sample["query_offsets"]).take(range(n_queries))


def small_encoder(dim=16):
    return pv.fde.Encoder(dim, repetitions=10, simhash_bits=3, projection_dim=8)


def build(first_stage, docs, storage="float32", **arguments):
    encoder = None if first_stage == "centroids" else small_encoder()
    index = pv.retrieve.MultiVectorIndex(16, encoder=encoder, first_stage=first_stage, storage=storage)
    index.add(docs, **arguments)
    return index


def assert_same_results(index, other, queries):
    """By the first stage, and without."""
    for candidates in (20, 300):
        found, expected = (each.search(queries, 10, candidates=candidates) for each in (index, other))
        for a, b in zip(found, expected, strict=True):
            assert_exact(a, b)


STAGES = ["centroids", "hnsw", "pq", "flat"]
STORAGES = ["bfloat16", "float16", "int8", "residual4", "residual2"]


@pytest.mark.parametrize("first_stage", STAGES)
def test_every_candidate_gives_the_exact_result(rng, first_stage):
    docs, queries = sample_docs(rng, 300), sample_docs(rng, 7)
    index = build(first_stage, docs)
    scores, ids = index.search(queries, 10, candidates=300)
    expected_scores, expected_ids = pv.maxsim.topk(queries, docs, 10)
    assert_exact(ids, expected_ids)
    assert_exact(scores, expected_scores)


@pytest.mark.parametrize("first_stage", STAGES)
def test_candidates_find_most_of_the_exact_result(first_stage):
    docs, queries = scifact(100)
    encoder = None
    if first_stage != "centroids":
        encoder = pv.fde.Encoder(128, repetitions=20, simhash_bits=4, projection_dim=8)
    index = pv.retrieve.MultiVectorIndex(128, encoder=encoder, first_stage=first_stage)
    index.add(docs)
    exact = pv.maxsim.topk(queries, docs, 10)[1]
    found = [index.search(queries, 10, candidates=candidates) for candidates in (10, 100)]
    assert all((np.diff(scores, axis=1) <= 0).all() for scores, _ in found)
    few, many = (ranking.recall(ids, exact) for _, ids in found)
    assert few < many
    assert many >= 0.9


@pytest.mark.parametrize("first_stage", STAGES)
def test_only_included_documents_are_found(rng, first_stage):
    docs, queries = sample_docs(rng, 600), sample_docs(rng, 7)
    names = rng.permutation(5000)[:600]
    index = build(first_stage, docs, ids=names)
    rows = np.sort(rng.permutation(600)[:150])
    include = [*names[rows], 7777, -3, names[rows[0]]]
    expected = pv.maxsim.topk(queries, [docs[row] for row in rows], 10)
    for candidates in (150, 1000):
        scores, ids = index.search(queries, 10, candidates=candidates, include=include)
        assert_exact(scores, expected[0])
        assert_exact(ids, names[rows][expected[1]])
    ids = index.search(queries, 10, candidates=60, include=include)[1]
    assert np.isin(ids, names[rows]).all()
    assert ranking.recall(ids, names[rows][expected[1]]) > 0.5
    mask = np.zeros(names[rows].max() + 1, bool)
    mask[names[rows]] = True
    assert_exact(index.search(queries, 10, candidates=60, include=mask)[1], ids)
    for none in ([], mask[:0], [7777]):
        scores, ids = index.search(queries, 3, include=none)
        assert_exact(ids, np.full((7, 3), -1))
        assert np.isneginf(scores).all()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_tokens_are_kept_as_packed_ones_are(rng, tmp_path, storage, mmap):
    docs, queries = sample_docs(rng, 300), sample_docs(rng, 7)
    index = build("flat", docs, storage=storage, ids=np.arange(300) * 2)
    packed = pv.maxsim.pack(docs, storage)
    scores, ids = index.search(queries, 10, candidates=300)
    expected_scores, expected_ids = pv.maxsim.topk(queries, packed, 10)
    assert_exact(ids, 2 * expected_ids)
    assert_exact(scores, expected_scores)
    kept = index.get([8, 0])
    assert_exact(kept.values, packed.take([4, 0]).decode().values)
    assert_exact(kept.lengths, [len(docs[4]), len(docs[0])])
    index.save(tmp_path / "index")
    loaded = pv.retrieve.MultiVectorIndex.load(tmp_path / "index", mmap=mmap)
    assert repr(loaded) == repr(index)
    assert repr(index).endswith(f"first_stage='flat', storage='{storage}')")
    assert_same_results(index, loaded, queries)
    more = sample_docs(rng, 3)
    for each in (index, loaded):
        each.add(more)
    assert_exact(loaded.search(queries, 10)[1], index.search(queries, 10)[1])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_growing_index_of_few_bits_ranks_as_float32_does(storage):
    """Documents that come one by one first: centroids of residuals are trained again, tokens stored again."""
    docs, queries = scifact(100)
    index = pv.retrieve.MultiVectorIndex(128, storage=storage)
    for begin, end in ((0, 1), (1, 2), (2, 50), (50, len(docs))):
        index.add(docs[begin:end])
    exact = pv.maxsim.topk(queries, docs, 10)[1]
    found = ranking.recall(index.search(queries, 10)[1], exact)
    assert found >= {"residual4": 0.9, "residual2": 0.75}.get(storage, 0.95)
    tokens = docs.values / np.linalg.norm(docs.values, axis=1, keepdims=True)
    cosines = np.einsum("td,td->t", tokens, index.get(np.arange(len(docs))).values)
    assert cosines.mean() > {"residual4": 0.98, "residual2": 0.9}.get(storage, 0.999)


@pytest.mark.parametrize("first_stage", STAGES)
def test_removed_documents_are_not_found(rng, tmp_path, first_stage):
    docs, queries = sample_docs(rng, 400), sample_docs(rng, 7)
    names = rng.permutation(1000)[:400]
    index = build(first_stage, docs, ids=names)
    order, left = rng.permutation(400), np.arange(400)
    for begin, end in ((0, 1), (1, 60), (60, 110), (110, 250), (250, 251)):  # a quarter is passed twice
        index.remove(names[order[begin:end]])
        left = np.setdiff1d(left, order[begin:end])
        assert len(index) == len(left)
        assert_exact(index.ids, names[left])
        assert names[left[0]] in index
        assert names[order[begin]] not in index
        assert 2**64 not in index
        expected = pv.maxsim.topk(queries, [docs[i] for i in left], 10)
        index.save(tmp_path / "index")
        for each in (index, pv.retrieve.MultiVectorIndex.load(tmp_path / "index")):
            scores, ids = each.search(queries, 10, candidates=len(left))
            assert_exact(scores, expected[0])
            assert_exact(ids, names[left][expected[1]])
            ids = each.search(queries, 10, candidates=60)[1]
            assert np.isin(ids, names[left]).all()
            assert ranking.recall(ids, names[left][expected[1]]) > 0.4
            half = left[::2]
            ids = each.search(queries, 3, candidates=20, include=names[np.append(half, order[0])])[1]
            assert np.isin(ids, names[half]).all()
    index.add([docs[i] for i in order[:251]], ids=names[order[:251]])
    scores, ids = index.search(queries, 10, candidates=400)
    expected = pv.maxsim.topk(queries, docs, 10)
    assert_exact(scores, expected[0])
    assert_exact(ids, names[expected[1]])
    assert_exact(index.get(names[:5]).values, np.concatenate(docs[:5]))


def test_more_than_200_are_found_by_default(rng):
    index = build("centroids", sample_docs(rng, 300))
    assert (np.sort(index.search(sample_docs(rng, 2), 250)[1], axis=1)[:, 0] >= 0).all()


def test_removing_everything(rng):
    index = build("centroids", sample_docs(rng, 5))
    index.remove(index.ids)
    assert (len(index), index.nbytes < 2000) == (0, True)
    assert_exact(index.search(sample_docs(rng, 2), 3)[1], np.full((2, 3), -1))
    index.add(sample_docs(rng, 2))
    assert_exact(index.ids, [0, 1])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("first_stage", STAGES)
def test_documents_are_removed_from_a_loaded_index(rng, tmp_path, first_stage, mmap):
    docs = sample_docs(rng, 300)
    build(first_stage, docs).save(tmp_path / "index")
    index = pv.retrieve.MultiVectorIndex.load(tmp_path / "index", mmap=mmap)
    for ids in ([7, 9], np.arange(100, 250)):
        index.remove(ids)
        found = index.search(docs[:100], 1, candidates=50)[1][:, 0]
        assert_exact(found[[7, 9]] == [7, 9], [False, False])
        assert (np.delete(found == np.arange(100), [7, 9])).mean() > 0.9
    index.add(docs[100:250], ids=np.arange(100, 250))
    assert len(index) == 298


def test_a_failed_remove_changes_nothing(rng):
    index = build("hnsw", sample_docs(rng, 5), ids=[5, 3, 8, 1, 9])
    for ids, error, text in (
        ([3, 4], IndexError, "remove: ids must be in the index, got 4"),
        ([3, -1], IndexError, "remove: ids must be in the index, got -1"),
        ([3, 10], IndexError, "remove: ids must be in the index, got 10"),
        ([3, 3], ValueError, "remove: ids must be unique, got 3 twice"),
        ([0.5], TypeError, "remove: ids must be integers, got float64"),
    ):
        with pytest.raises(error) as caught:
            index.remove(ids)
        assert str(caught.value) == f"MultiVectorIndex.{text}"
    index.remove([])
    assert_exact(index.ids, [5, 3, 8, 1, 9])
    index.remove([3])
    with pytest.raises(IndexError, match=r"^MultiVectorIndex.get: ids must be in the index, got 3$"):
        index.get([9, 3])


def test_an_encoder_of_another_dialect_finds_and_loads(rng, tmp_path):
    docs, queries = sample_docs(rng, 300), sample_docs(rng, 7)
    encoder = pv.fde.Encoder(16, repetitions=10, simhash_bits=3, projection_dim=8, dialect="google")
    index = pv.retrieve.MultiVectorIndex(16, encoder=encoder, first_stage="flat")
    index.add(docs)
    found = index.search(queries, 10, candidates=50)
    candidates = pv.scan.topk(encoder.encode_queries(queries), encoder.encode_docs(docs), 50)[1]
    exact = pv.maxsim.score(queries, docs)
    for row, expected, scores in zip(found[1], candidates, exact, strict=True):
        best = sorted(expected.tolist(), key=lambda i: (-scores[i], i))[:10]
        assert_exact(row, best)
    index.save(tmp_path / "index")
    for a, b in zip(
        pv.retrieve.MultiVectorIndex.load(tmp_path / "index").search(queries, 10, candidates=50), found, strict=True
    ):
        assert_exact(a, b)


def test_adding_in_parts_is_adding_at_once(rng):
    docs, queries = sample_docs(rng, 600), sample_docs(rng, 5)
    ids = rng.permutation(1000)[:600]
    whole = build("flat", docs, ids=ids)
    parts = build("flat", docs[:100], ids=ids[:100])
    parts.add(docs[100:101], ids=ids[100:101])
    parts.add(docs[101:], ids=ids[101:])
    assert len(whole) == len(parts) == 600
    assert_exact(parts.ids, ids)
    for a, b in zip(whole.search(queries, 7, candidates=50), parts.search(queries, 7, candidates=50), strict=True):
        assert_exact(a, b)


def test_centroids_are_trained_again_as_documents_come():
    """Four times as many tokens have twice as many centroids, and candidates are as good as if all had come at once."""
    docs, queries = scifact(100)
    exact = pv.maxsim.topk(queries, docs, 10)[1]
    whole, parts = (pv.retrieve.MultiVectorIndex(128) for _ in range(2))
    whole.add(docs)
    counts = []
    for begin, end in ((0, 1), (1, 2), (2, 100), (100, 110), (110, len(docs))):
        parts.add(docs[begin:end])
        counts.append(len(parts.state().tensors["stage.centroids"]))
    wanted = 2 ** int(np.log2(8 * len(docs.values) ** 0.5))
    assert counts[-1] == len(whole.state().tensors["stage.centroids"]) == wanted
    assert counts[2] == counts[3] > 2 * counts[1]
    found, in_parts = (ranking.recall(index.search(queries, 10, candidates=50)[1], exact) for index in (whole, parts))
    assert found >= 0.9
    assert in_parts > found - 0.02


def test_the_default_stage_depends_on_the_encoder():
    assert pv.retrieve.MultiVectorIndex(16).first_stage == "centroids"
    assert pv.retrieve.MultiVectorIndex(16, encoder=small_encoder()).first_stage == "hnsw"


def test_default_ids_go_on_from_the_largest(rng):
    index = build("flat", sample_docs(rng, 2), ids=[5, 3])
    index.add(sample_docs(rng, 2))
    assert_exact(index.ids, [5, 3, 6, 7])


@pytest.mark.parametrize("first_stage", STAGES)
def test_a_saved_index_gives_the_same_results(rng, tmp_path, first_stage):
    docs, queries = sample_docs(rng, 300), sample_docs(rng, 5)
    index = build(first_stage, docs, ids=np.arange(300) * 3)
    index.save(tmp_path / "index.safetensors")
    loaded = pv.retrieve.MultiVectorIndex.load(tmp_path / "index.safetensors")
    copies = pickle.loads(pickle.dumps(index)), copy.copy(index), copy.deepcopy(index)
    for again in (loaded, pv.retrieve.MultiVectorIndex.from_state(index.state()), *copies):
        assert repr(again) == repr(index)
        assert_same_results(index, again, queries)
        again.add(sample_docs(rng, 3))
        assert (len(again), len(index)) == (303, 300)


@pytest.mark.parametrize("first_stage", STAGES)
def test_a_damaged_file_is_a_format_error(rng, tmp_path, first_stage):
    path = tmp_path / "index.safetensors"
    build(first_stage, sample_docs(rng, 300)).save(path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1)]
    for position in np.linspace(0, len(whole) - 1, 40).astype(int):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        damaged.append(bytes(flipped))
    for contents in damaged:
        path.write_bytes(contents)
        with pytest.raises(pv.FormatError):
            pv.retrieve.MultiVectorIndex.load(path)


def test_an_empty_index_finds_nothing(rng):
    scores, ids = pv.retrieve.MultiVectorIndex(16).search(sample_docs(rng, 2), 3)
    assert_exact(ids, np.full((2, 3), -1))
    assert_exact(scores, np.full((2, 3), -np.inf))


def test_fewer_documents_than_k(rng):
    scores, ids = build("flat", sample_docs(rng, 2)).search(sample_docs(rng, 1), 4)
    assert_exact(ids[0, 2:], [-1, -1])
    assert_exact(scores[0, 2:], [-np.inf, -np.inf])
    assert sorted(ids[0, :2]) == [0, 1]


def test_progress_counts_documents(rng):
    seen = []
    build("flat", sample_docs(rng, 600), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_failed_add_changes_nothing(rng):
    docs = sample_docs(rng, 3)
    index = build("flat", docs, ids=[1, 2, 3])
    poisoned = sample_docs(rng, 2)
    poisoned[1][0, 3] = np.nan
    failures = [
        (lambda: index.add(poisoned), ValueError, "docs must be finite"),
        (lambda: index.add(docs, ids=[4, 5, 4]), ValueError, "ids must be unique, got 4 twice"),
        (lambda: index.add(docs, ids=[4, 2, 6]), ValueError, "ids must be new, got 2, which is in the index"),
        (lambda: index.add(docs, ids=[4, 5]), ValueError, "ids must have one entry a document (3), got 2"),
        (lambda: index.add(docs, ids=[4, -5, 6]), ValueError, "ids must not be negative, got -5"),
        (lambda: index.add([np.ones((2, 5), np.float32)]), ValueError, "docs must have d = 16, got 5"),
        (lambda: index.add(np.ones((2, 16), np.float32)), ValueError, "docs must be a Ragged"),
        (lambda: index.add([np.ones((2, 16))]), TypeError, "docs must be float32, got float64"),
        (
            lambda: build("flat", [np.full((1, 16), -65520, np.float32)], storage="float16"),
            ValueError,
            "docs must be at most 65504 with storage 'float16', got 65520.0",
        ),
    ]
    before = index.search(docs, 3)
    for call, error, text in failures:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith("MultiVectorIndex.add: " + text)
        assert len(index) == 3
        for a, b in zip(before, index.search(docs, 3), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("first_stage", ["centroids", "hnsw", "flat"])
def test_an_interrupted_block_leaves_whole_blocks(rng, tmp_path, first_stage):
    docs = sample_docs(rng, 600)

    def stop(done, total):
        if done > 300:
            raise KeyboardInterrupt

    index = build(first_stage, [])
    with pytest.raises(KeyboardInterrupt):
        index.add(docs, progress=stop)
    kept = len(index)
    assert kept in (256, 512)
    index._stage.add(pv.Ragged(np.ones((5, 16), np.float32), np.arange(6)), None)  # as a block cut short leaves it
    _scores, ids = index.search(docs[:4], 3, candidates=100)
    assert (ids < kept).all()
    index.save(tmp_path / "index")
    assert len(pv.retrieve.MultiVectorIndex.load(tmp_path / "index")) == kept
    index.add(docs[kept:])
    assert len(index) == 600
    assert_exact(index.search(docs, 1, candidates=600)[1][:, 0], np.arange(600))


@pytest.mark.parametrize("first_stage", STAGES)
def test_an_interrupted_removal_leaves_the_parts_together(rng, monkeypatch, first_stage):
    docs = sample_docs(rng, 300)
    index = build(first_stage, docs)
    keep = TokenStore.keep

    def stop(store, numbers):
        if store is not getattr(index._stage, "_tokens", None) and store._dtype == "float32":
            raise KeyboardInterrupt
        keep(store, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            index.remove(np.arange(100))
    for first in (100, 101):
        assert len(index) == 300 - first
        assert_exact(index.search(docs[first:], 1, candidates=300)[1][:, 0], np.arange(first, 300))
        if first == 100:
            index.remove([100])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.retrieve.MultiVectorIndex(16, first_stage="tree"),
            ValueError,
            "MultiVectorIndex: first_stage must be one of 'centroids', 'hnsw', 'pq', 'flat', got 'tree'",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(8, encoder=small_encoder(8), first_stage="centroids"),
            ValueError,
            f'MultiVectorIndex: encoder must be None with first_stage "centroids", got {small_encoder(8)!r}',
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16, encoder=small_encoder(8)),
            ValueError,
            "MultiVectorIndex: encoder must have dim 16, got 8",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16, storage="float64"),
            ValueError,
            "MultiVectorIndex: storage must be one of 'float32', 'bfloat16', 'float16', 'int8', 'residual4', "
            "'residual2', got 'float64'",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16).search([np.ones((1, 16), np.float32)], 30, candidates=20),
            ValueError,
            "MultiVectorIndex.search: candidates must be at least k (30), got 20",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16).search([np.ones((1, 16), np.float32)], 1, include=[0.5]),
            TypeError,
            "MultiVectorIndex.search: include must be integers, got float64",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16).search([np.ones((1, 16), np.float32)], 0),
            ValueError,
            "MultiVectorIndex.search: k must be at least 1, got 0",
        ),
        (
            lambda: pv.retrieve.MultiVectorIndex(16, first_stage="pq").add([np.ones((1, 16), np.float32)] * 3),
            ValueError,
            'MultiVectorIndex.add: docs must be at least 256 to train first_stage "pq", got 3',
        ),
        (
            lambda: pv.retrieve.LinkPredictor(np.zeros((3, 2, 5), np.float32), np.zeros((1, 2, 5), np.float32)),
            ValueError,
            "LinkPredictor: entities must have 4 components for this algebra, got 2",
        ),
        (
            lambda: predictor_of_zeros(rotate_by="head"),
            ValueError,
            "LinkPredictor: relations must have one row an entity (3) with rotate_by='head', got 2",
        ),
        (
            lambda: predictor_of_zeros(rows=3, rotate_by="head"),
            ValueError,
            "LinkPredictor: translations must be given with rotate_by='head', got None",
        ),
        (
            lambda: predictor_of_zeros(rows=3, rotate_by="head", translations=np.zeros((2, 4, 3), np.float32)),
            ValueError,
            "LinkPredictor: translations must have the last two axes of entities (4, 2), got (4, 3)",
        ),
        (
            lambda: predictor_of_zeros(head_translations=np.zeros((2, 4, 2), np.float32)),
            ValueError,
            "LinkPredictor: head_translations must have the shape of entities (3, 4, 2), got (2, 4, 2)",
        ),
        (
            lambda: predictor_of_zeros().predict_tails([0, 3], [0, 0], 2),
            IndexError,
            "LinkPredictor.predict_tails: heads must be in [0, 3), got 3 at position 1",
        ),
        (
            lambda: predictor_of_zeros().evaluate(np.zeros((0, 3), np.int64)),
            ValueError,
            "LinkPredictor.evaluate: triples must not be empty",
        ),
        (
            lambda: predictor_of_zeros().ranks([[0, 0, 1]], ties="average"),
            ValueError,
            "LinkPredictor.ranks: ties must be one of 'realistic', 'optimistic', 'pessimistic', got 'average'",
        ),
        (
            lambda: predictor_of_zeros().ranks([[0, 0, 3]]),
            IndexError,
            "LinkPredictor.ranks: triples must be in [0, 3), got 3 at position 0",
        ),
        (
            lambda: predictor_of_zeros().evaluate([[0, 0]]),
            ValueError,
            "LinkPredictor.evaluate: triples must have 3 columns (head, relation, tail), got 2",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def predictor_of_zeros(rows=2, **arguments):
    zeros = (np.zeros((n, 4, 2), np.float32) for n in (3, rows))
    return pv.retrieve.LinkPredictor(*zeros, **arguments)


def random_graph(rng, n=40, relations=3, triples=150):
    return np.unique(np.stack([rng.integers(0, n, triples), rng.integers(0, relations, triples),
                               rng.integers(0, n, triples)], 1), axis=0)  # fmt: skip


VARIANTS = [
    {},
    {"metric": "l2"},
    {"translations": True},
    {"translations": True, "metric": "l2"},
    {"bias": True},
    {"bias": True, "metric": "l2"},
    {"normalize": False},
    {"reciprocal": True, "translations": True, "bias": True},
    {"head_translations": True},
    {"head_translations": True, "translations": True, "metric": "l2"},
    {"rotate_by": "head", "head_translations": True, "translations": True},
    {"rotate_by": "head", "translations": True, "metric": "l2", "bias": True},
    {"rotate_by": "head", "head_translations": True, "translations": True, "reciprocal": True, "metric": "l2"},
]


def variant_arguments(rng, variant, rows, n):
    arguments = dict(variant)
    if arguments.pop("translations", False):
        arguments["translations"] = rng.standard_normal((rows, 4, 6)).astype(np.float32)
    if arguments.pop("head_translations", False):
        arguments["head_translations"] = rng.standard_normal((n, 4, 6)).astype(np.float32)
    if arguments.pop("bias", False):
        arguments["bias"] = rng.standard_normal(n).astype(np.float32)
    return arguments


@pytest.mark.parametrize("algebra", ["quaternion", "dihedron"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_link_prediction_equals_the_definition(rng, algebra, variant):
    n, relations = 40, 3
    rows = relations * (2 if variant.get("reciprocal") else 1)
    entities = rng.standard_normal((n, 4, 6)).astype(np.float32)
    rotors = rng.standard_normal((n if "rotate_by" in variant else rows, 4, 6)).astype(np.float32)
    arguments = variant_arguments(rng, variant, rows, n)
    predictor = pv.retrieve.LinkPredictor(entities, rotors, algebra=algebra, **arguments)
    scores = ref.link_scores(entities, rotors, algebra=algebra, **arguments)  # {"tail", "head"}: (n, relations, n)

    triples = random_graph(rng)
    train, test = triples[::2], triples[1::2]
    for known in (None, triples):
        figures = predictor.evaluate(test, known=known)
        ranks = ref.link_ranks(scores, test, known)
        for found, same in zip(predictor.ranks(test, known=known), ranks, strict=True):
            assert_exact(found, same)
        expected = ref.link_figures(ranks)
        assert figures.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(figures[name] - value) <= KNOWN_SCORE

    anchors, relation_ids = rng.integers(0, n, 9), rng.integers(0, relations, 9)
    for side in ("tail", "head"):
        if side == "tail":
            found, ids = predictor.predict_tails(anchors, relation_ids, 5, known=train)
        else:
            found, ids = predictor.predict_heads(relation_ids, anchors, 5, known=train)
        expected = ref.filtered(scores, side, anchors, relation_ids, train)
        order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
        assert_exact(ids, order)
        np.testing.assert_allclose(found, np.take_along_axis(expected, order, 1), rtol=0, atol=2e-4)


def test_ranks_of_ties_and_of_no_triples(rng):
    predictor = predictor_of_zeros()
    for ties, rank in (("realistic", 2), ("optimistic", 1), ("pessimistic", 3)):
        for ranks in predictor.ranks([[0, 0, 1], [2, 0, 2]], ties=ties):
            assert_exact(ranks, [rank, rank])
    assert [x.shape for x in predictor.ranks(np.zeros((0, 3), np.int64))] == [(0,), (0,)]


@pytest.mark.parametrize("algebra", ["complex", "quaternion", "octonion"])
def test_heads_by_distance_are_found_without_turning_all(rng, algebra):
    """As with rotors that are given normalised, for which all heads are turned; so they are where a rotor is 0."""
    c = {"complex": 2, "quaternion": 4, "octonion": 8}[algebra]
    entities, rotors, shifts = (rng.standard_normal((n, c, 6)).astype(np.float32) for n in (50, 5, 5))
    tails, relations = rng.integers(0, 50, 9), rng.integers(0, 5, 9)
    for zero in (False, True):
        rotors[2] *= not zero
        unit = pv.hypercomplex.normalize(rotors)
        found, expected = (
            pv.retrieve.LinkPredictor(
                entities, r, algebra=algebra, metric="l2", translations=shifts, normalize=normalize
            ).predict_heads(relations, tails, 10)
            for r, normalize in ((rotors, True), (unit, False))
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
        assert_exact(found[1], expected[1])


def test_a_score_is_an_inner_product_with_either_side(rng):
    x, r, t = (rng.standard_normal((5, 4, 3)) for _ in range(3))
    ids = np.arange(5)
    for algebra in ("quaternion", "dihedron"):
        tail_query = pv.hypercomplex.relation_query(x, r, ids, ids, algebra=algebra)
        head_query = pv.hypercomplex.relation_query(t, r, ids, ids, algebra=algebra, adjoint=True)
        left = (tail_query * t.reshape(5, -1)).sum(1)
        right = (head_query * x.reshape(5, -1)).sum(1)
        np.testing.assert_allclose(left, right, rtol=1e-12)
        np.testing.assert_allclose(left, (hc.relation_query(x, r, ids, ids, algebra) * t.reshape(5, -1)).sum(1))


def test_predictions_come_in_the_entities_library(rng, lib):
    entities, rotors = (lib(rng.standard_normal((n, 4, 6)).astype(np.float32)) for n in (9, 2))
    scores, ids = pv.retrieve.LinkPredictor(entities, rotors).predict_tails([0, 1], [1, 1], 3)
    assert type(scores) is type(ids) is type(entities)
    given = lib(np.empty((2, 3), np.float32)), lib(np.empty((2, 3), np.int64))
    again = pv.retrieve.LinkPredictor(entities, rotors).predict_tails([0, 1], [1, 1], 3, out=given)
    assert again[0] is given[0]
    assert again[1] is given[1]
    assert_exact(given[0], scores)
    assert_exact(given[1], ids)


def test_wn18rr_ranks_equal_float64(rng, data):
    """Given embeddings over WN18RR: the filtered MRR equals a float64 computation to 1e-6."""
    entities, relations, splits = ref.load_triples(data / "wn18rr")
    test = splits["test"][:100]
    known = np.concatenate(list(splits.values()))
    vectors = rng.standard_normal((len(entities), 4, 16)).astype(np.float32)
    rotors = rng.standard_normal((len(relations), 4, 16)).astype(np.float32)
    figures = pv.retrieve.LinkPredictor(vectors, rotors).evaluate(test, known=known)
    expected = ref.streamed_mrr(vectors, rotors, test, known)
    assert abs(figures["mrr"] - expected) <= KNOWN_SCORE
