"""MaxSim scores, search, alignment and packed tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
import ranking
from accuracy import assert_exact, assert_reduction
from reference import maxsim as ref

WIDTHS = [0, 1, 2, 3, 15, 16, 17, 35, 64, 130]
# Around the lane counts (2 to 16), the panels (4 to 64) and the tiles (2 to 12 rows).
QUERY_TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 19, 31, 32, 33, 47, 48, 49, 64, 65, 130]
DOC_TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 23, 24, 25, 0, 37]

WIDE = 150  # a few hundred query tokens of this width are work for several pieces


def sample(rng, lengths, d, dtype=np.float32):
    return [rng.standard_normal((n, d)).astype(dtype) for n in lengths]


def integers(rng, lengths, d):
    """Tokens whose inner products are exact in any order, and often equal."""
    return [rng.integers(-2, 3, (n, d)).astype(np.float32) for n in lengths]


def assert_scores(scores, queries, docs):
    length = queries[0].shape[1]
    assert_reduction(scores, ref.score(queries, docs), np.abs(ref.scale(queries, docs)), length=length)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", WIDTHS)
def test_score_equals_the_definition(rng, isa, d, dtype):
    queries, docs = sample(rng, QUERY_TOKENS, d, dtype), sample(rng, DOC_TOKENS, d, dtype)
    scores = pv.maxsim.score(queries, docs)
    assert scores.dtype == dtype
    assert_scores(scores, queries, docs)


@pytest.mark.parametrize("d", [512, 1024])
def test_rows_a_multiple_of_a_page_apart(rng, isa, d):
    queries, docs = sample(rng, [17], d), sample(rng, [1, 3, 12, 29], d)
    assert_scores(pv.maxsim.score(queries, docs), queries, docs)


@settings(max_examples=60)
@given(
    query_lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    doc_lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    d=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_ragged_shapes(query_lengths, doc_lengths, d, seed):
    rng = np.random.default_rng(seed)
    queries, docs = integers(rng, query_lengths, d), integers(rng, doc_lengths, d)
    expected = ref.score(queries, docs)
    assert_exact(pv.maxsim.score(queries, docs), expected)
    scores, ids = pv.maxsim.topk(queries, docs, 5)
    assert_exact(ids, ref.topk(expected, 5))
    best = -np.sort(-expected, axis=1)[:, :5]
    assert_exact(scores, np.pad(best, ((0, 0), (0, 5 - best.shape[1])), constant_values=-np.inf))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_does_not_depend_on_the_batch(rng, isa, dtype):
    queries = sample(rng, [5, 0, 32, 17, 300, 1, 64, *[20] * 40], WIDE, dtype)
    docs = sample(rng, DOC_TOKENS, WIDE, dtype)
    together = pv.maxsim.score(queries, docs)
    assert_exact(np.concatenate([pv.maxsim.score([query], docs) for query in queries]), together)
    assert_exact(np.concatenate([pv.maxsim.score(queries, [doc]) for doc in docs], axis=1), together)
    assert_exact(pv.maxsim.score(queries[::-1], docs[::-1])[::-1, ::-1], together)


@pytest.mark.parametrize("k", [1, 7, 300])
def test_topk_is_the_sorted_score(rng, isa, k):
    queries, docs = sample(rng, rng.integers(0, 40, 50), WIDE), sample(rng, rng.integers(0, 60, 250), WIDE)
    expected = pv.maxsim.score(queries, docs)
    scores, ids = pv.maxsim.topk(queries, docs, k)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    assert_exact(ids, ref.topk(expected, k))
    assert_exact(scores[:, :250], -np.sort(-expected, axis=1)[:, :k])
    assert_exact(scores[:, 250:], np.full((50, max(0, k - 250)), -np.inf))


def test_topk_of_candidates(rng, isa):
    queries, docs = sample(rng, rng.integers(0, 40, 50), WIDE), sample(rng, rng.integers(0, 60, 250), WIDE)
    lists = [rng.choice(250, n, replace=False) for n in [0, 1, 200, *rng.integers(0, 30, 47)]]
    offsets = np.cumsum([0, *map(len, lists)])
    candidates = (offsets, np.concatenate(lists))
    expected = pv.maxsim.score(queries, docs)
    scores, ids = pv.maxsim.topk(queries, docs, 12, candidates=candidates)
    assert_exact(ids, ref.topk(expected, 12, lists))
    assert_exact(scores, np.where(ids < 0, -np.inf, np.take_along_axis(expected, ids, 1)))
    everything = (np.arange(51) * 250, np.tile(np.arange(250), 50))
    for a, b in zip(
        pv.maxsim.topk(queries, docs, 12, candidates=everything), pv.maxsim.topk(queries, docs, 12), strict=True
    ):
        assert_exact(a, b)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8", "residual4", "centroid"])
def test_topk_of_included_documents(rng, isa, dtype):
    queries, docs = sample(rng, rng.integers(0, 40, 50), 20), sample(rng, rng.integers(0, 60, 250), 20)
    if dtype == "float64":
        queries, docs = ([x.astype(dtype) for x in sets] for sets in (queries, docs))
    else:
        docs = pv.maxsim.pack(docs, dtype)
    expected = pv.maxsim.score(queries, docs)
    for chosen in (rng.permutation(250)[:90], np.array([7]), np.arange(0)):
        scores, ids = pv.maxsim.topk(queries, docs, 12, include=chosen)
        assert_exact(ids, ref.topk(expected, 12, [np.sort(chosen)] * 50))
        assert_exact(scores, np.where(ids < 0, -np.inf, np.take_along_axis(expected, ids, 1)).astype(np.float32))
        mask = np.isin(np.arange(250), chosen)
        for same in (mask, [*chosen, *chosen]):
            assert_exact(pv.maxsim.topk(queries, docs, 12, include=same, num_threads=2)[1], ids)


def test_an_id_that_a_list_names_twice_is_ranked_twice(rng):
    queries, docs = sample(rng, [3], 8), sample(rng, [4, 4, 4], 8)
    _, ids = pv.maxsim.topk(queries, docs, 4, candidates=([0, 3], [2, 2, 1]))
    assert sorted(ids[0].tolist()) == [-1, 1, 2, 2]


def test_empty_documents_come_last(rng):
    queries, docs = [np.ones((2, 4), np.float32)], [np.empty((0, 4), np.float32), -np.ones((3, 4), np.float32)]
    scores, ids = pv.maxsim.topk(queries, docs, 3)
    assert ids.tolist() == [[1, 0, -1]]
    assert scores.tolist() == [[-8, -np.inf, -np.inf]]


def test_a_similarity_that_is_nan_is_never_the_maximum(rng, isa):
    query, doc = sample(rng, [20, 30], 16)
    expected = pv.maxsim.score([query], [doc[1:]])
    doc[0] = np.nan
    assert_exact(pv.maxsim.score([query], [doc]), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [0, 1, 17, 64])
def test_score_pairs(rng, isa, d, dtype):
    docs = sample(rng, DOC_TOKENS * 2, d, dtype)
    queries = sample(rng, rng.permutation(QUERY_TOKENS * 2)[: len(docs)], d, dtype)
    scores = pv.maxsim.score_pairs(queries, docs)
    assert scores.dtype == dtype
    expected, scale = (f(queries, docs).diagonal() for f in (ref.score, ref.scale))
    assert_reduction(scores, expected, abs(scale), length=d)
    assert_exact(scores, pv.maxsim.score(queries, docs).diagonal())


def test_more_pairs_than_are_prepared_at_a_time(rng):
    queries, docs = (integers(rng, rng.integers(0, 4, 2500), 3) for _ in range(2))
    expected = [ref.score([query], [doc])[0, 0] for query, doc in zip(queries, docs, strict=True)]
    assert_exact(pv.maxsim.score_pairs(queries, docs), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("tq", "td"), [(0, 5), (5, 0), (1, 1), (15, 30), (17, 180), (33, 63), (130, 65)])
def test_score_matrix(rng, isa, tq, td, dtype):
    query, doc = sample(rng, [tq, td], 19, dtype)
    matrix = pv.maxsim.score_matrix(query, doc)
    assert matrix.dtype == dtype
    size = ref.similarities(abs(query), abs(doc))
    assert_reduction(matrix, ref.similarities(query, doc), size, length=19)
    if td:
        assert_exact(matrix.max(1), pv.maxsim.align(query, doc)[1])
    query[1:2, 3], doc[3:4, 5] = np.inf, np.nan
    matrix = pv.maxsim.score_matrix(query, doc)
    with np.errstate(invalid="ignore"):
        expected = query @ doc.T
    expected[np.isnan(expected)] = -np.inf
    assert_exact(np.isinf(matrix), np.isinf(expected))
    assert_exact(matrix[np.isinf(matrix)], expected[np.isinf(expected)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "bfloat16", "int8"])
@pytest.mark.parametrize("empty", [-np.inf, 0, np.float32(-1e9)])
@pytest.mark.parametrize("padding", ["exclude", "zero", "relu"])
def test_what_takes_part_in_place_of_missing_tokens(rng, isa, padding, empty, dtype):
    packed = isinstance(dtype, str)
    queries = sample(rng, [0, 1, 5, 17, 40], 8, np.float32 if packed else dtype)
    docs = sample(rng, [3, 0, 1, 7, 2, 7], 8, np.float32 if packed else dtype)
    docs = [-abs(queries[2][:1]) + doc * np.float32(0.1) for doc in docs]  # many best similarities are below 0
    lengths = np.array([len(doc) for doc in docs])
    zeros = {"exclude": 0 * lengths, "zero": lengths.max() - lengths, "relu": 0 * lengths + 1}[padding]
    sets = pv.maxsim.pack(docs, dtype) if packed else docs
    options = {"padding": padding, "empty": empty}
    scores = pv.maxsim.score(queries, sets, **options)
    if packed:  # the rounding of tokens is none of this test's business: one-token queries show the maxima
        tokens = [token[None] for token in np.concatenate(queries)]
        maxima = pv.maxsim.score(tokens, sets, empty=-np.inf)
        maxima = np.where(zeros > 0, np.maximum(maxima, 0), maxima)
        ends = np.cumsum([len(query) for query in queries])
        expected = [np.add.reduce(m, dtype=np.float64) for m in np.split(maxima, ends[:-1])]
        expected = np.array(expected, np.float32)
        expected[1:, (lengths == 0) & (zeros == 0)] = empty
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    else:
        expected = ref.score(queries, docs, zeros=zeros, empty=empty)
        assert_reduction(scores, expected, abs(np.where(lengths > 0, ref.scale(queries, docs), 1e9)), length=8)
    best, ids = pv.maxsim.topk(queries, sets, 6, **options)
    assert_exact(ids, ref.topk(scores.astype(np.float32), 6))
    assert_exact(best, -np.sort(-scores.astype(np.float32), axis=1))
    assert_exact(pv.maxsim.score_pairs(queries, sets[:5], **options), scores[:, :5].diagonal())


def test_zero_padding_is_that_of_the_padded_array(rng, lib):
    queries, docs = sample(rng, [4, 3], 8), rng.standard_normal((5, 7, 8)).astype(np.float32)
    mask = rng.random((5, 7)) < 0.5
    mask[:, 3] = False  # no document has all its rows
    lengths = np.array([2, 0, 6, 6, 1])
    for form, kept, options in (
        (lib(docs), mask, {"doc_mask": lib(mask)}),
        ((lib(docs), lengths), np.arange(7) < lengths[:, None], {}),
    ):
        scores = pv.maxsim.score([lib(query) for query in queries], form, padding="zero", **options)
        assert_reduction(scores, ref.score(queries, docs * kept[..., None]), ref.scale(queries, docs), length=8)


def test_masks_drop_tokens(rng, lib):
    queries, docs = (rng.standard_normal((n, t, 8)).astype(np.float32) for n, t in ((4, 6), (4, 9)))
    query_mask, doc_mask = rng.random((4, 6)) < 0.5, rng.random((4, 9)) < 0.5
    doc_mask[2] = False
    kept = [[lib(x[m]) for x, m in zip(*pair, strict=True)] for pair in ((queries, query_mask), (docs, doc_mask))]
    given = (lib(queries), lib(docs))
    masks = {"query_mask": lib(query_mask), "doc_mask": doc_mask.tolist()}
    assert_exact(pv.maxsim.score(*given, **masks), pv.maxsim.score(*kept))
    assert_exact(pv.maxsim.topk(*given, 2, **masks)[1], pv.maxsim.topk(*kept, 2)[1])
    assert_exact(pv.maxsim.score_pairs(*given, **masks), pv.maxsim.score_pairs(*kept))
    docs[~doc_mask] = np.nan
    first = [lib(doc[:5][m[:5]]) for doc, m in zip(docs, doc_mask, strict=True)]
    scores = pv.maxsim.score(kept[0], (lib(docs), [5] * 4), doc_mask=doc_mask)
    assert_exact(scores, pv.maxsim.score(kept[0], first))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("tq", "td"), [(0, 5), (5, 0), (1, 1), (15, 30), (17, 180), (33, 13), (130, 7)])
def test_align(rng, isa, tq, td, dtype):
    query, doc = sample(rng, [tq, td], 19, dtype)
    ids, similarities = pv.maxsim.align(query, doc)
    assert (ids.dtype, similarities.dtype) == (np.int64, dtype)
    exact = ref.similarities(query, doc)
    assert_exact(ids, exact.argmax(1) if td else np.full(tq, -1))
    size = ref.similarities(abs(query), abs(doc)).max(1, initial=0)
    assert_reduction(similarities, exact.max(1, initial=-np.inf), size, length=19)
    if tq and td:
        total = np.add.reduce(similarities, dtype=np.float64).astype(dtype)
        np.testing.assert_allclose(pv.maxsim.score([query], [doc])[0, 0], total, rtol=1e-6)


def test_align_writes_to_out(rng, lib):
    query, doc = (lib(rng.standard_normal((n, 16)).astype(np.float32)) for n in (5, 9))
    out = lib(np.empty(5, np.int64)), lib(np.empty(5, np.float32))
    ids, similarities = pv.maxsim.align(query, doc, out=out)
    assert ids is out[0]
    assert similarities is out[1]
    for written, expected in zip(out, pv.maxsim.align(query, doc), strict=True):
        assert_exact(written, expected)


def test_align_takes_the_first_of_equals(rng, isa):
    query, doc = integers(rng, [40, 90], 2)
    ids, similarities = pv.maxsim.align(query, doc)
    assert_exact(ids, ref.similarities(query, doc).argmax(1))
    assert_exact(similarities, ref.similarities(query, doc).max(1))


def test_result_does_not_depend_on_thread_count(rng):
    queries, docs = sample(rng, rng.integers(0, 50, 70), WIDE), sample(rng, rng.integers(0, 100, 200), WIDE)
    candidates = (np.arange(71) * 100, rng.integers(0, 200, 7000))

    def results(threads):
        return (
            pv.maxsim.score(queries, docs, num_threads=threads),
            *pv.maxsim.topk(queries, docs, 9, num_threads=threads),
            *pv.maxsim.topk(queries, docs, 9, candidates=candidates, num_threads=threads),
            *pv.maxsim.align(np.concatenate(queries), docs[3], num_threads=threads),
            pv.maxsim.score_pairs(queries, docs[:70], num_threads=threads),
            pv.maxsim.score_matrix(np.concatenate(queries), docs[3], num_threads=threads),
        )

    one = results(1)
    for threads in (2, 7):
        for a, b in zip(one, results(threads), strict=True):
            assert_exact(a, b)


def test_every_form_of_token_sets(rng):
    lengths = [3, 0, 5, 1]
    docs = sample(rng, lengths, 8)
    padded = np.full((4, 5, 8), np.nan, np.float32)
    for row, doc in zip(padded, docs, strict=True):
        row[: len(doc)] = doc
    ragged = pv.Ragged.from_list(docs)
    wide = np.zeros((9, 16), np.float32)
    wide[:, ::2] = ragged.values
    expected = pv.maxsim.score(docs, docs)
    for form in (ragged, (ragged.values, ragged.offsets), (padded, lengths), (wide[:, ::2], ragged.offsets),
                 pv.maxsim.pack(docs)):  # fmt: skip
        assert_exact(pv.maxsim.score(form, docs), expected)
        assert_exact(pv.maxsim.score(docs, form), expected)
    uniform = np.stack([docs[0]] * 2)
    assert_exact(pv.maxsim.score(uniform, docs), expected[[0, 0]])


def test_no_queries_and_no_documents(rng):
    docs = sample(rng, [3, 2], 8)
    assert pv.maxsim.score([], docs).shape == (0, 2)
    assert pv.maxsim.score(docs, []).shape == (2, 0)
    assert pv.maxsim.score([], np.empty((0, 4, 8), np.float32)).shape == (0, 0)
    scores, ids = pv.maxsim.topk(docs, [], 3)
    assert_exact(ids, np.full((2, 3), -1))
    assert_exact(scores, np.full((2, 3), -np.inf))
    assert pv.maxsim.topk([], docs, 3)[1].shape == (0, 3)


def test_the_caller_gets_the_library_it_gave(rng, lib):
    queries, docs = ([lib(a) for a in sample(rng, lengths, 8)] for lengths in ([3, 4], [5, 6, 7]))
    scores = lib(np.full((2, 3), np.nan, np.float32))
    assert pv.maxsim.score(queries, docs, out=scores) is scores
    assert_exact(scores, pv.maxsim.score(queries, docs))
    out = (lib(np.zeros((2, 2), np.float32)), lib(np.zeros((2, 2), np.int64)))
    best = pv.maxsim.topk(queries, docs, 2, candidates=(lib(np.array([0, 2, 3])), [0, 1, 2]), out=out)
    assert best[0] is out[0]
    assert best[1] is out[1]
    pairs, matrix = lib(np.zeros(2, np.float32)), lib(np.zeros((3, 5), np.float32))
    assert pv.maxsim.score_pairs(queries, docs[:2], out=pairs) is pairs
    assert pv.maxsim.score_matrix(queries[0], docs[0], out=matrix) is matrix
    for result in (pv.maxsim.score(queries, docs), *pv.maxsim.topk(queries, docs, 1),
                   *pv.maxsim.align(queries[0], docs[0])):  # fmt: skip
        assert type(result) is type(queries[0])


def test_packed_tokens(rng, cpu_lib):
    docs = sample(rng, [3, 0, 5, 1, 2], 8)
    packed = pv.maxsim.pack(pv.Ragged(cpu_lib(np.concatenate(docs)), [0, 3, 3, 8, 9, 11]))
    assert (len(packed), packed.dim, packed.dtype, packed.nbytes) == (5, 8, "float32", 11 * 8 * 4 + 6 * 8)
    assert repr(packed) == "PackedTokens(5 documents, 11 tokens, dim=8, dtype='float32')"
    scores = pv.maxsim.score(docs, packed)
    for documents in (slice(1, 4), slice(None), slice(2, 2), slice(4, 1), slice(-2, None), slice(None, None, -2)):
        assert_exact(pv.maxsim.score(docs, packed[documents]), scores[:, documents])
    assert_exact(pv.maxsim.score(docs, packed.take([4, 0, 0])), scores[:, [4, 0, 0]])


@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(rng, tmp_path, cpu_lib, mmap):
    docs = sample(rng, [3, 0, 5], 8)
    path = tmp_path / "docs.safetensors"
    pv.maxsim.pack([cpu_lib(doc) for doc in docs]).save(path)
    packed = pv.maxsim.PackedTokens.load(path, mmap=mmap)
    assert (len(packed), packed.dim, packed.dtype) == (3, 8, "float32")
    assert_exact(pv.maxsim.score(docs, packed), pv.maxsim.score(docs, docs))
    assert_exact(pv.maxsim.topk(docs, packed[1:], 1)[1], pv.maxsim.topk(docs, docs[1:], 1)[1])
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-40] + b"?" + whole[-39:]):
        path.write_bytes(damaged)
        with pytest.raises(pv.FormatError):
            pv.maxsim.PackedTokens.load(path)


@pytest.mark.parametrize(
    ("name", "exact", "pooled"),
    [("cranfield", 0.4382, 0.3854), ("limit-small", 0.9919, 0.3418), ("scifact", 0.6975, 0.5707)],
)
def test_exact_maxsim_beats_mean_pooled_tokens(data, name, exact, pooled):
    docs, queries, relevance = ranking.read(data / name)
    judged = [q for q, grades in enumerate(relevance) if grades]
    queries, relevance = queries.take(judged), [relevance[q] for q in judged]
    _, ids = pv.maxsim.topk(queries, pv.maxsim.pack(docs), 10)
    assert round(ranking.ndcg(ids, relevance), 4) == exact
    query_means, doc_means = (np.array([tokens.mean(0) for tokens in sets]) for sets in (queries, docs))
    doc_means /= np.linalg.norm(doc_means, axis=1, keepdims=True)
    ids = np.argsort(-query_means @ doc_means.T, axis=1, kind="stable")[:, :10]
    assert round(ranking.ndcg(ids, relevance), 4) == pooled


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def with_value(value, row):
    docs = [zeros(2, 3), zeros(0, 3), zeros(4, 3)]
    docs[2][row] = value
    return docs


DOCS = [zeros(2, 3), zeros(4, 3)]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.maxsim.score(zeros(1, 2, 128), zeros(1, 2, 96)),
            ValueError,
            "maxsim.score: docs must have the same d as queries (128), got 96",
        ),
        (
            lambda: pv.maxsim.score(DOCS, zeros(1, 2, 3, dtype=np.float64)),
            TypeError,
            "maxsim.score: docs must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: pv.maxsim.score(zeros(1, 2, 3, dtype=np.float16), DOCS),
            TypeError,
            "maxsim.score: queries must be float32 or float64, got float16; cast it with .astype('float32')",
        ),
        (
            lambda: pv.maxsim.score(zeros(2, 3), DOCS),
            ValueError,
            "maxsim.score: queries must be a Ragged, (values, offsets), a list of (n_i, d) arrays or a padded "
            "(n, t, d) array, got shape (2, 3)",
        ),
        (
            lambda: pv.maxsim.score((zeros(4, 3), [0, 3, 2, 4]), DOCS),
            ValueError,
            "maxsim.score: queries: offsets must not run backwards, got 3 then 2 at position 1",
        ),
        (
            lambda: pv.maxsim.score(DOCS, DOCS, out=zeros(2, 3)),
            ValueError,
            "maxsim.score: out must have shape (2, 2), got (2, 3)",
        ),
        (
            lambda: pv.maxsim.score(DOCS, DOCS, num_threads=0),
            ValueError,
            "maxsim.score: num_threads must be at least 1, got 0",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 0),
            ValueError,
            "maxsim.topk: k must be at least 1, got 0",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, include=[0, -2]),
            IndexError,
            "maxsim.topk: include must be in [0, 2), got -2",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, include=[True]),
            ValueError,
            "maxsim.topk: include must have one entry a document (2), got 1",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=([0, 1, 2], [0, 1]), include=[0]),
            ValueError,
            "maxsim.topk: candidates must be None with include",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=([0, 1, 2], [0, 2])),
            IndexError,
            "maxsim.topk: candidates ids must be in [0, 2), got 2 at position 1",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=([0, 1], [0])),
            ValueError,
            "maxsim.topk: candidates offsets must have one entry more than there are queries (3), got 2",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=([0, 2, 1], [0])),
            ValueError,
            "maxsim.topk: candidates offsets must not run backwards, got 2 then 1 at position 1",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=[[0, 1], [0]]),
            TypeError,
            "maxsim.topk: candidates must be a pair (offsets, ids), got list",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, candidates=([0, 1, 2], [0.5, 1])),
            TypeError,
            "maxsim.topk: candidates ids must be integers, got float64",
        ),
        (
            lambda: pv.maxsim.score_pairs(DOCS, DOCS[:1]),
            ValueError,
            "maxsim.score_pairs: docs must have one document a query (2), got 1",
        ),
        (
            lambda: pv.maxsim.score(DOCS, DOCS, padding="max"),
            ValueError,
            "maxsim.score: padding must be one of 'exclude', 'zero', 'relu', got 'max'",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, empty=np.nan),
            ValueError,
            "maxsim.topk: empty must be a number, got nan",
        ),
        (
            lambda: pv.maxsim.topk(DOCS, DOCS, 1, empty="none"),
            TypeError,
            "maxsim.topk: empty must be a number, got str",
        ),
        (
            lambda: pv.maxsim.score(DOCS, DOCS, query_mask=[[True]]),
            ValueError,
            "maxsim.score: queries must be a padded (n, t, d) array to take a mask, got list",
        ),
        (
            lambda: pv.maxsim.score(DOCS, pv.maxsim.pack(DOCS), doc_mask=[[True]]),
            ValueError,
            "maxsim.score: docs must be a padded (n, t, d) array to take a mask, got PackedTokens",
        ),
        (
            lambda: pv.maxsim.score(DOCS, zeros(2, 4, 3), doc_mask=np.ones((2, 3), bool)),
            ValueError,
            "maxsim.score: docs: mask must have shape (2, 4), got (2, 3)",
        ),
        (
            lambda: pv.maxsim.score(DOCS, zeros(2, 4, 3), doc_mask=np.ones((2, 4), np.float32)),
            TypeError,
            "maxsim.score: docs: mask must be bool, or integers of 0 and 1, got float32",
        ),
        (
            lambda: pv.maxsim.score(DOCS, zeros(2, 4, 3), doc_mask=np.full((2, 4), 2)),
            ValueError,
            "maxsim.score: docs: mask must be bool, or integers of 0 and 1, got 2",
        ),
        (
            lambda: pv.maxsim.score_matrix(zeros(2, 3), zeros(2, 4)),
            ValueError,
            "maxsim.score_matrix: doc must have the same d as query (3), got 4",
        ),
        (
            lambda: pv.maxsim.align(zeros(2, 3), zeros(2, 4)),
            ValueError,
            "maxsim.align: doc must have the same d as query (3), got 4",
        ),
        (
            lambda: pv.maxsim.align(zeros(1, 2, 3), zeros(2, 3)),
            ValueError,
            "maxsim.align: query must have 2 axes, got shape (1, 2, 3)",
        ),
        (
            lambda: pv.maxsim.pack(with_value(np.nan, 3)),
            ValueError,
            "maxsim.pack: docs must be finite, got NaN or Inf in token 3 of document 2",
        ),
        (
            lambda: pv.maxsim.pack(with_value(-np.inf, 0)),
            ValueError,
            "maxsim.pack: docs must be finite, got NaN or Inf in token 0 of document 2",
        ),
        (
            lambda: pv.maxsim.pack(DOCS, "int7"),
            ValueError,
            "maxsim.pack: dtype must be one of 'float32', 'bfloat16', 'float16', 'int8', 'residual2', 'residual4', "
            "'centroid', got 'int7'",
        ),
        (
            lambda: pv.maxsim.pack(zeros(1, 2, 3, dtype=np.float64)),
            TypeError,
            "maxsim.pack: docs must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: pv.maxsim.pack(DOCS)[1],
            TypeError,
            "PackedTokens: index must be a slice, got int; use take(ids)",
        ),
        (
            lambda: pv.maxsim.pack(DOCS).take([0, 1, -1]),
            IndexError,
            "PackedTokens.take: ids must be in [0, 2), got -1 at position 2",
        ),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
