import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
import ranking
from accuracy import assert_exact, assert_reduction
from reference import fde as ref

SIZES = [0, 1, 2, 7, 40, 0, 200]


def sample(rng, sizes, d):
    """Sets of unit tokens, around a few directions each: some buckets are crowded, some empty."""
    sets = []
    for n in sizes:
        x = rng.standard_normal((n, d)) * 0.5 + rng.standard_normal((1 + n // 8, d))[rng.integers(0, 1 + n // 8, n)]
        sets.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    return sets


def assert_encodings(actual, sets, encoder, docs):
    assert len(actual) == len(sets)
    for encoding, tokens in zip(actual, sets, strict=True):
        expected, size = ref.encode(tokens, encoder, docs)
        assert_reduction(encoding, expected, size, length=len(tokens) + encoder.dim)


def both(encoder, sets, **options):
    return encoder.encode_docs(sets, **options), encoder.encode_queries(sets, **options)


# The definition


@pytest.mark.parametrize("ties", ["first_token", "first_bucket"])
@pytest.mark.parametrize(
    ("d", "repetitions", "bits", "projection_dim"),
    [
        (1, 1, 1, None),
        (3, 2, 0, 2),
        (8, 5, 3, 1),
        (15, 4, 4, None),
        (16, 3, 5, 8),
        (17, 11, 3, 16),
        (31, 8, 2, 15),
        (33, 7, 7, 17),
        (64, 20, 5, 16),
        (130, 1, 7, 31),
        (128, 3, 5, 32),
        (67, 2, 6, 33),
        (96, 1, 4, 48),
        (100, 2, 3, 49),
        (80, 2, 2, 65),
    ],
)
def test_encodings_equal_the_definition(rng, isa, d, repetitions, bits, projection_dim, ties):
    encoder = pv.fde.Encoder(
        d, repetitions=repetitions, simhash_bits=bits, projection_dim=projection_dim, fill_ties=ties
    )
    sets = sample(rng, SIZES, d)
    docs, queries = both(encoder, sets)
    assert docs.shape == (len(SIZES), encoder.output_dim) == (len(SIZES), repetitions * 2**bits * (projection_dim or d))
    assert_encodings(docs, sets, encoder, docs=True)
    assert_encodings(queries, sets, encoder, docs=False)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 70), max_size=6),
    d=st.integers(1, 40),
    repetitions=st.integers(1, 9),
    bits=st.integers(0, 6),
    fill=st.booleans(),
    final_dim=st.one_of(st.none(), st.integers(1, 300)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(sizes, d, repetitions, bits, fill, final_dim, seed):
    rng = np.random.default_rng(seed)
    projection_dim = int(rng.integers(1, d + 1))
    encoder = pv.fde.Encoder(
        d, repetitions=repetitions, simhash_bits=bits, projection_dim=projection_dim, final_dim=final_dim,
        fill_empty=fill, seed=seed, fill_ties=["first_token", "first_bucket"][seed % 2],
    )  # fmt: skip
    sets = sample(rng, sizes, d)
    given_sets = sets if sets else pv.Ragged(np.zeros((0, d), np.float32), [0])
    docs, queries = both(encoder, given_sets)
    assert_encodings(docs, sets, encoder, docs=True)
    assert_encodings(queries, sets, encoder, docs=False)


@pytest.mark.parametrize("bits", [1, 3, 5, 6])
def test_bucket_ids_are_those_of_float64(rng, isa, bits):
    """Tokens that lie in a hyperplane but for their rounding, which float32 products put on either side."""
    d, n = 128, 400
    encoder = pv.fde.Encoder(d, repetitions=100 // bits, simhash_bits=bits)
    planes = encoder.hyperplanes.astype(np.float64).swapaxes(1, 2).reshape(-1, d)
    tokens = rng.standard_normal((n, d))
    normal = planes[rng.integers(0, len(planes), n)]
    tokens -= normal * ((tokens * normal).sum(1) / (normal**2).sum(1))[:, None]
    tokens = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float32)
    expected = ref.bucket_ids(tokens, encoder.hyperplanes)
    in_float32 = np.einsum("td,rdj->trj", tokens, encoder.hyperplanes) > 0
    assert (in_float32 @ (1 << np.arange(bits)) != expected).any()
    assert_exact(encoder.partition(tokens), expected)


def test_bucket_ids_of_tokens_of_any_size(rng, isa):
    encoder = pv.fde.Encoder(19)
    tokens = rng.standard_normal((40, 19)).astype(np.float32)
    for scale in (1e-38, 1e-30, 1e-18, 1, 1e18, 1e30, 3e37):
        scaled = tokens * np.float32(scale)
        assert_exact(encoder.partition(scaled), ref.bucket_ids(scaled, encoder.hyperplanes))


def test_a_token_on_a_plane_is_not_above_it(isa):
    planes = np.ones((1, 2, 3), np.float32)
    encoder = pv.fde.Encoder(2, repetitions=1, simhash_bits=3, projection_dim=None, hyperplanes=planes)
    tokens = np.array([[0, 0], [1, -1], [-0.0, 0.0], [1e-40, 0]], np.float32)
    assert_exact(encoder.partition(tokens), [[0], [0], [0], [7]])


@pytest.mark.parametrize("ties", ["first_token", "first_bucket"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 30])
def test_empty_buckets_take_the_very_token_of_the_definition(rng, isa, n, ties):
    encoder = pv.fde.Encoder(24, repetitions=9, simhash_bits=6, projection_dim=None, fill_ties=ties)
    tokens = rng.standard_normal((n, 24)).astype(np.float32)
    ids = encoder.partition(tokens)
    blocks = encoder.encode_docs([tokens]).reshape(9, 64, 24)
    for r in range(9):
        for bucket in sorted(set(range(64)) - set(ids[:, r].tolist())):
            assert_exact(blocks[r, bucket], tokens[ref.fill_token(ids[:, r], bucket, ties)])


@pytest.mark.parametrize("projection_dim", [None, 8])
@pytest.mark.parametrize("bits", [3, 6])
def test_the_final_sketch_is_that_of_the_long_encoding(rng, isa, bits, projection_dim):
    options = {"repetitions": 6, "simhash_bits": bits, "projection_dim": projection_dim}
    encoder, short = pv.fde.Encoder(20, **options), pv.fde.Encoder(20, final_dim=100, **options)
    index, sign = short.final_projection
    sets = sample(rng, SIZES, 20)
    for long, final in zip(both(encoder, sets), both(short, sets), strict=True):
        expected = np.zeros((len(SIZES), 100), np.float32)
        for row, values in zip(expected, long, strict=True):
            np.add.at(row, index, sign * values)
        assert_exact(final, expected)


def test_values_of_fastembed():
    """The figures of fastembed's own test, tests/test_postprocess.py: Muvera(dim=128, k_sim=5, dim_proj=16, r_reps=20,
    random_seed=42), whose one generator draws the planes repetition by repetition, then all projections."""
    draw = np.random.default_rng(42)
    planes = np.stack([draw.normal(size=(128, 5)) for _ in range(20)]).astype(np.float32)
    projections = (draw.choice([-1, 1], size=(20, 128, 16)) / 4).astype(np.float32)
    given_matrices = pv.fde.Encoder(128, fill_ties="first_bucket", hyperplanes=planes, projections=projections)
    tokens = np.random.default_rng(42).random((10, 128)).astype(np.float32)
    doc, query = (x[0] for x in both(given_matrices, tokens[None]))
    _, size = ref.encode(tokens, given_matrices, docs=True)
    assert_reduction(doc[:3], [-2.61810007e-04, 1.89005750, -2.32070747], size[:3], length=138)
    first = np.flatnonzero(query)[:3]
    _, size = ref.encode(tokens, given_matrices, docs=False)
    assert_reduction(query[first], [-0.85783903, 1.1077204, -0.09522747], size[first], length=138)
    drawn = pv.fde.Encoder(128, fill_ties="first_bucket", seed=42)
    assert_exact(drawn.encode_docs(tokens[None])[0], doc)
    assert_exact(drawn.encode_queries(tokens[None])[0], query)


def test_matrices_are_drawn_as_documented():
    encoder = pv.fde.Encoder(6, repetitions=3, simhash_bits=2, projection_dim=4, final_dim=7, seed=5)
    draw = np.random.default_rng(5)
    assert_exact(encoder.hyperplanes, draw.standard_normal((3, 6, 2)).astype(np.float32))
    assert_exact(encoder.projections, draw.choice([-1, 1], (3, 6, 4)).astype(np.float32) / 2)
    index, sign = encoder.final_projection
    assert_exact(index, draw.integers(0, 7, 48))
    assert_exact(sign, draw.choice([-1, 1], 48))
    assert (index.dtype, sign.dtype, encoder.output_dim) == (np.int32, np.float32, 7)
    assert not any(x.flags.writeable for x in (encoder.hyperplanes, encoder.projections, index, sign))
    for width in (None, 6, 16):
        encoder = pv.fde.Encoder(6, projection_dim=width)
        assert (encoder.projections, encoder.projection_dim, encoder.output_dim) == (None, None, 20 * 32 * 6)


def test_the_inner_product_is_right_in_the_mean(rng):
    """<query, doc> / R converges to the sum over query tokens of their mean product with the document tokens of their
    bucket: exactly so without a projection, in the mean over seeds with one."""
    (query,), (doc,) = sample(rng, [6], 32), sample(rng, [60], 32)
    errors = []
    for seed in range(100):
        plain, projected = (
            pv.fde.Encoder(32, repetitions=40, simhash_bits=3, projection_dim=width, seed=seed) for width in (None, 8)
        )
        value, estimate = (
            float(e.encode_queries([query])[0] @ e.encode_docs([doc])[0]) / 40 for e in (plain, projected)
        )
        if seed == 0:
            ids, doc_ids = plain.partition(query), plain.partition(doc)
            means = [ref.blocks(doc.astype(np.float64), doc_ids[:, r], plain, docs=True)[ids[:, r]] for r in range(40)]
            np.testing.assert_allclose(value, np.mean([(query * block).sum() for block in means]), rtol=1e-4)
        errors.append(estimate - value)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))


# How it is called


def test_encodings_do_not_depend_on_the_batch_nor_on_threads(rng, isa):
    encoder = pv.fde.Encoder(40, simhash_bits=4, final_dim=900)
    sets = sample(rng, rng.integers(0, 90, 150), 40)
    one = both(encoder, sets, num_threads=1)
    for threads in (2, 7):
        for a, b in zip(one, both(encoder, sets, num_threads=threads), strict=True):
            assert_exact(a, b)
    for i in (0, 77, 149):
        for batch, alone in zip(one, both(encoder, [sets[i]]), strict=True):
            assert_exact(batch[i], alone[0])
    tokens = np.concatenate(sets)
    assert_exact(encoder.partition(tokens, num_threads=1), encoder.partition(tokens, num_threads=3))


def test_every_form_of_token_sets(rng):
    encoder = pv.fde.Encoder(8, repetitions=3)
    padded = np.stack(sample(rng, [5, 5, 5], 8))
    lengths = np.array([5, 0, 2])
    sets = [x[:n] for x, n in zip(padded, lengths, strict=True)]
    ragged = pv.Ragged.from_list(sets)
    expected = encoder.encode_docs(sets)
    for form in (ragged, (ragged.values, ragged.offsets), (padded, lengths), tuple(sets)):
        assert_exact(encoder.encode_docs(form), expected)
    assert_exact(encoder.encode_docs(padded[:, ::-1]), encoder.encode_docs(padded[:, ::-1].copy()))
    assert_exact(encoder.encode_docs([]), np.zeros((0, encoder.output_dim)))
    assert_exact(encoder.encode_docs([sets[1]]), np.zeros((1, encoder.output_dim)))


def test_encodings_into_a_file_with_progress(rng, tmp_path):
    encoder = pv.fde.Encoder(8, repetitions=2, simhash_bits=2, projection_dim=4)
    sets = sample(rng, rng.integers(0, 5, 2500), 8)
    out = np.memmap(tmp_path / "encodings", np.float32, "w+", shape=(2500, encoder.output_dim))
    calls = []
    assert encoder.encode_docs(sets, out=out, progress=lambda *done: calls.append(done)) is out
    out.flush()
    assert calls == [(1024, 2500), (2048, 2500), (2500, 2500)]
    written = np.fromfile(tmp_path / "encodings", np.float32).reshape(out.shape)
    assert_exact(written, encoder.encode_docs(sets))
    assert_exact(encoder.encode_queries(sets, progress=lambda *_: None), encoder.encode_queries(sets))


def test_the_caller_gets_the_library_it_gave(rng, lib):
    encoder = pv.fde.Encoder(8, repetitions=3, projection_dim=4)
    sets = [lib(x) for x in sample(rng, [3, 9], 8)]
    expected = encoder.encode_docs([np.asarray(x) for x in sets])
    out = lib(np.full(expected.shape, np.nan, np.float32))
    assert encoder.encode_docs(sets, out=out) is out
    for result in (out, encoder.encode_docs(sets, progress=lambda *_: None)):
        assert type(result) is type(sets[0])
        assert_exact(result, expected)
    assert type(encoder.partition(sets[1])) is type(sets[1])


def test_injected_matrices_may_be_torch_tensors():
    torch = pytest.importorskip("torch")
    one = pv.fde.Encoder(4, repetitions=2, simhash_bits=1, projection_dim=2, final_dim=5)
    index, sign = (torch.from_numpy(x.copy()) for x in one.final_projection)
    two = pv.fde.Encoder(
        4, repetitions=2, simhash_bits=1, projection_dim=2, final_dim=5, seed=9,
        hyperplanes=torch.from_numpy(one.hyperplanes.copy()), projections=torch.from_numpy(one.projections.copy()),
        final_projection=(index, sign),
    )  # fmt: skip
    tokens = np.eye(4, dtype=np.float32)[None]
    assert_exact(one.encode_docs(tokens), two.encode_docs(tokens))


def test_nan_and_inf_stay_in_their_set(rng, isa):
    encoder = pv.fde.Encoder(20, simhash_bits=3)
    sets = sample(rng, [4, 30, 5], 20)
    expected = both(encoder, sets)
    for value in (np.nan, np.inf):
        sets[1][7, 3] = value
        for damaged, clean in zip(both(encoder, sets), expected, strict=True):
            assert_exact(damaged[[0, 2]], clean[[0, 2]])
            assert (~np.isfinite(damaged[1].reshape(20, -1))).any(1).all()


@pytest.mark.parametrize("options", [{}, {"final_dim": 33, "fill_ties": "first_bucket"}, {"projection_dim": None}])
def test_save_and_load(rng, tmp_path, options):
    encoder = pv.fde.Encoder(16, **{"projection_dim": 8, "repetitions": 4, "seed": 3, **options})
    encoder.save(tmp_path / "encoder")
    sets = sample(rng, [0, 3, 20], 16)
    for copy in (pv.fde.Encoder.load(tmp_path / "encoder"), pickle.loads(pickle.dumps(encoder))):
        assert repr(copy) == repr(encoder)
        for a, b in zip(both(encoder, sets), both(copy, sets), strict=True):
            assert_exact(a, b)


def test_a_state_that_does_not_fit_together_is_refused(tmp_path):
    encoder = pv.fde.Encoder(16, repetitions=4, final_dim=9)
    for change in ({"repetitions": 5}, {"final_dim": 8}, {"simhash_bits": 40}, {"fill_ties": "any"}, {"other": 1}):
        state = encoder.state()
        state.params.update(change)
        pv._files.save(tmp_path / "encoder", "fde.Encoder", state)
        with pytest.raises(pv.FormatError, match=re.escape(f"fde.Encoder.load: {tmp_path / 'encoder'} is damaged")):
            pv.fde.Encoder.load(tmp_path / "encoder")


# Real tokens


def recall_of_candidates(docs, queries, k, candidates):
    """Mean share of the exact MaxSim top k among the candidates that the encodings' inner products name."""
    encoder = pv.fde.Encoder(docs.dim)
    _, found = pv.scan.topk(encoder.encode_queries(queries), encoder.encode_docs(docs), candidates)
    return ranking.recall(found, pv.maxsim.topk(queries, docs, k)[1])


def test_candidates_of_cranfield_hold_the_exact_best(data):
    sets = ranking.read(data / "cranfield")
    assert recall_of_candidates(sets.docs, sets.queries, 10, 100) >= 0.94


def test_candidates_of_colbert_tokens_hold_the_exact_best(data):
    """35 documents and 5 queries of ColBERTv2: too few to judge quality, enough to see that it works."""
    arrays = np.load(data / "colbert-nanofiqa" / "tokens.npz")
    docs, queries = (pv.Ragged(arrays[f"{kind}_tokens"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query"))
    assert recall_of_candidates(docs, queries, 3, 15) >= 0.8


# Errors


def encoder(**options):
    return pv.fde.Encoder(4, **{"repetitions": 2, "simhash_bits": 1, "projection_dim": 2, **options})


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pv.fde.Encoder(0), ValueError, "fde.Encoder: dim must be at least 1, got 0"),
        (lambda: encoder(repetitions=0), ValueError, "fde.Encoder: repetitions must be at least 1, got 0"),
        (lambda: encoder(simhash_bits=17), ValueError, "fde.Encoder: simhash_bits must be at most 16, got 17"),
        (lambda: encoder(projection_dim=0), ValueError, "fde.Encoder: projection_dim must be at least 1, got 0"),
        (lambda: encoder(final_dim=2**31), ValueError, "fde.Encoder: final_dim must be below 2^31, got 2147483648"),
        (lambda: encoder(seed=-1), ValueError, "fde.Encoder: seed must be at least 0, got -1"),
        (
            lambda: encoder(fill_ties="any"),
            ValueError,
            "fde.Encoder: fill_ties must be one of 'first_token', 'first_bucket', got 'any'",
        ),
        (
            lambda: encoder(hyperplanes=zeros(2, 4, 2)),
            ValueError,
            "fde.Encoder: hyperplanes must have shape (2, 4, 1), got (2, 4, 2)",
        ),
        (
            lambda: encoder(hyperplanes=zeros(2, 4, 1, dtype=np.float64)),
            TypeError,
            "fde.Encoder: hyperplanes must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: encoder(projections=np.full((2, 4, 2), np.nan, np.float32)),
            ValueError,
            "fde.Encoder: projections must be finite, got NaN or Inf in row 0",
        ),
        (
            lambda: encoder(projection_dim=None, projections=zeros(2, 4, 4)),
            ValueError,
            "fde.Encoder: projections must be None without a projection_dim below dim (4), got shape (2, 4, 4)",
        ),
        (
            lambda: encoder(final_projection=(zeros(8, dtype=int), zeros(8))),
            ValueError,
            "fde.Encoder: final_projection must be None without a final_dim, got tuple",
        ),
        (
            lambda: encoder(final_dim=3, final_projection=zeros(8)),
            TypeError,
            "fde.Encoder: final_projection must be a pair (index, sign), got ndarray",
        ),
        (
            lambda: encoder(final_dim=3, final_projection=(zeros(7, dtype=int), zeros(8))),
            ValueError,
            "fde.Encoder: final_projection index must have shape (8,), got (7,)",
        ),
        (
            lambda: encoder(final_dim=3, final_projection=(np.arange(8), zeros(8))),
            IndexError,
            "fde.Encoder: final_projection index must be in [0, 3), got 3 at position 3",
        ),
        (
            lambda: encoder().encode_docs(zeros(2, 3, 5)),
            ValueError,
            "fde.Encoder.encode_docs: tokens must have d = 4, got 5",
        ),
        (
            lambda: encoder().encode_queries([zeros(2, 4, dtype=np.float64)]),
            TypeError,
            "fde.Encoder.encode_queries: tokens must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: encoder().encode_docs(zeros(2, 3, 4), out=zeros(2, 9)),
            ValueError,
            "fde.Encoder.encode_docs: out must have shape (2, 8), got (2, 9)",
        ),
        (
            lambda: encoder().encode_docs(zeros(2, 3, 4), progress="yes"),
            TypeError,
            "fde.Encoder.encode_docs: progress must be None, a bool or a callable (done, total), got str",
        ),
        (
            lambda: encoder().partition(zeros(3, 5)),
            ValueError,
            "fde.Encoder.partition: tokens must have the encoder's d (4), got 5",
        ),
        (
            lambda: encoder().partition(zeros(4)),
            ValueError,
            "fde.Encoder.partition: tokens must have 2 axes, got shape (4,)",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
