import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyvec as pv
import ranking
from accuracy import assert_exact, assert_reduction, on_host
from reference import fde as ref

DIALECTS = ["paper", "google", "fastembed", "weaviate", "opensearch", "muvera-py"]
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


def both(encoder, sets, to=np.asarray, **options):
    if isinstance(sets, list) and sets:
        sets = [to(tokens) for tokens in sets]
    return on_host(encoder.encode_docs(sets, **options)), on_host(encoder.encode_queries(sets, **options))


# The definition


@pytest.mark.parametrize("dialect", DIALECTS)
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
def test_encodings_equal_the_definition(rng, isa, on_device, d, repetitions, bits, projection_dim, dialect):
    encoder = pv.fde.Encoder(
        d, repetitions=repetitions, simhash_bits=bits, projection_dim=projection_dim, dialect=dialect
    )
    sets = sample(rng, SIZES, d)
    docs, queries = both(encoder, sets, on_device)
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
        fill_empty=fill, seed=seed, dialect=DIALECTS[seed % 6],
    )  # fmt: skip
    sets = sample(rng, sizes, d)
    given_sets = sets if sets else pv.Ragged(np.zeros((0, d), np.float32), [0])
    docs, queries = both(encoder, given_sets)
    assert_encodings(docs, sets, encoder, docs=True)
    assert_encodings(queries, sets, encoder, docs=False)


@pytest.mark.parametrize("bits", [1, 3, 5, 6])
def test_bucket_ids_are_those_of_float64(rng, isa, on_device, bits):
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
    assert_exact(encoder.partition(on_device(tokens)), expected)


def test_bucket_ids_of_tokens_of_any_size(rng, isa, on_device):
    encoder = pv.fde.Encoder(19)
    tokens = rng.standard_normal((40, 19)).astype(np.float32)
    for scale in (1e-38, 1e-30, 1e-18, 1, 1e18, 1e30, 3e37):
        scaled = tokens * np.float32(scale)
        assert_exact(encoder.partition(on_device(scaled)), ref.bucket_ids(scaled, encoder.hyperplanes))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_bucket_ids_by_planes_of_any_size(rng, isa, on_device, scale):
    planes = pv.fde.Encoder(19).hyperplanes * np.float32(scale)
    encoder = pv.fde.Encoder(19, hyperplanes=planes)
    tokens = rng.standard_normal((40, 19)) * 10.0 ** rng.integers(-12, 12, (40, 1))
    tokens = tokens.astype(np.float32)
    assert_exact(encoder.partition(on_device(tokens)), ref.bucket_ids(tokens, planes))


def test_a_token_on_a_plane_is_not_above_it(isa, on_device):
    planes = np.ones((1, 2, 3), np.float32)
    encoder = pv.fde.Encoder(2, repetitions=1, simhash_bits=3, projection_dim=None, hyperplanes=planes)
    tokens = np.array([[0, 0], [1, -1], [-0.0, 0.0], [1e-40, 0]], np.float32)
    assert_exact(encoder.partition(on_device(tokens)), [[0], [0], [0], [7]])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 30])
def test_empty_buckets_take_the_very_token_of_the_definition(rng, isa, on_device, n, dialect):
    encoder = pv.fde.Encoder(24, repetitions=9, simhash_bits=6, projection_dim=None, dialect=dialect)
    tokens = rng.standard_normal((n, 24)).astype(np.float32)
    ids, bits = on_host(encoder.partition(on_device(tokens))), ref.sign_bits(tokens, encoder.hyperplanes)
    assert_exact(ids, ref.bucket_ids(tokens, encoder.hyperplanes, dialect))
    blocks = on_host(encoder.encode_docs([on_device(tokens)])).reshape(9, 64, 24)
    for r in range(9):
        for bucket in sorted(set(range(64)) - set(ids[:, r].tolist())):
            assert_exact(blocks[r, bucket], tokens[ref.fill_token(bits[:, r], bucket, dialect)])


@pytest.mark.parametrize("projection_dim", [None, 8])
@pytest.mark.parametrize("bits", [3, 6])
def test_the_final_sketch_is_that_of_the_long_encoding(rng, isa, on_device, bits, projection_dim):
    options = {"repetitions": 6, "simhash_bits": bits, "projection_dim": projection_dim}
    encoder, short = pv.fde.Encoder(20, **options), pv.fde.Encoder(20, final_dim=100, **options)
    index, sign = short.final_projection
    sets = sample(rng, SIZES, 20)
    for long, final in zip(both(encoder, sets, on_device), both(short, sets, on_device), strict=True):
        expected = np.zeros((len(SIZES), 100), np.float32)
        for row, values in zip(expected, long, strict=True):
            np.add.at(row, index, sign * values)
        assert_exact(final, expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("d", "bits", "projection_dim"), [(20, 5, 8), (33, 3, 17), (7, 0, None), (16, 6, None)])
def test_sparse_queries_are_the_dense_ones(rng, isa, d, bits, projection_dim, dialect):
    encoder = pv.fde.Encoder(d, repetitions=6, simhash_bits=bits, projection_dim=projection_dim, dialect=dialect)
    sets = sample(rng, SIZES, d)
    sparse, dense = encoder.encode_queries(sets, sparse=True), encoder.encode_queries(sets)
    assert_exact(sparse.to_dense(), dense)
    assert_exact(sparse.to_dense().view(np.int32), dense.view(np.int32))
    ids = [ref.bucket_ids(tokens, encoder.hyperplanes, dialect) for tokens in sets]
    held = [sorted({r * 2**bits + b for row in query for r, b in enumerate(row)}) for query in ids]
    assert_exact(sparse.blocks, np.concatenate(held))
    assert_exact(np.diff(sparse.offsets), [len(blocks) for blocks in held])
    assert (sparse.block, sparse.shape) == (projection_dim or d, dense.shape)


def test_sparse_queries_in_any_batch_on_any_threads_with_progress(rng, cpu_lib):
    encoder = pv.fde.Encoder(24, repetitions=5, simhash_bits=4, projection_dim=8)
    sets = sample(rng, rng.integers(0, 9, 2100), 24)
    expected, dones = encoder.encode_queries(sets), []
    given_sets = [cpu_lib(x) for x in sets]
    for options in ({"num_threads": 1}, {"num_threads": 2}, {"num_threads": 7, "progress": lambda *d: dones.append(d)}):
        sparse = encoder.encode_queries(given_sets, sparse=True, **options)
        assert type(sparse.values) is type(given_sets[0])
        assert_exact(sparse.to_dense(), expected)
    assert dones == [(1024, 2100), (2048, 2100), (2100, 2100)]
    assert encoder.encode_queries([], sparse=True).shape == (0, encoder.output_dim)
    assert len(encoder.encode_queries([given_sets[0][:0]], sparse=True).values) == 0


def test_values_of_fastembed():
    """The figures of fastembed's own test, tests/test_postprocess.py: Muvera(dim=128, k_sim=5, dim_proj=16, r_reps=20,
    random_seed=42), whose one generator draws the planes repetition by repetition, then all projections."""
    draw = np.random.default_rng(42)
    planes = np.stack([draw.normal(size=(128, 5)) for _ in range(20)]).astype(np.float32)
    projections = (draw.choice([-1, 1], size=(20, 128, 16)) / 4).astype(np.float32)
    given_matrices = pv.fde.Encoder(128, dialect="fastembed", hyperplanes=planes, projections=projections)
    tokens = np.random.default_rng(42).random((10, 128)).astype(np.float32)
    doc, query = (x[0] for x in both(given_matrices, tokens[None]))
    _, size = ref.encode(tokens, given_matrices, docs=True)
    assert_reduction(doc[:3], [-2.61810007e-04, 1.89005750, -2.32070747], size[:3], length=138)
    first = np.flatnonzero(query)[:3]
    _, size = ref.encode(tokens, given_matrices, docs=False)
    assert_reduction(query[first], [-0.85783903, 1.1077204, -0.09522747], size[first], length=138)
    drawn = pv.fde.Encoder(128, dialect="fastembed", seed=42)
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


LIBSTDCXX_NORMALS = """
    -0x1.621002p-1 0x1.11bd36p+0 0x1.8307bp-2 -0x1.8ec48p-5 -0x1.61f38p-2 0x1.bd3532p+0 -0x1.b1d9f6p+0 0x1.1aebe2p-2
    -0x1.befa82p-1 0x1.363d98p-9 -0x1.19e332p-3 -0x1.760b4ep-1 0x1.b34234p+1 -0x1.d79878p-7 0x1.9a2b4cp-1 0x1.8eaaeap-2
    -0x1.2c558ap-1 0x1.0da278p+0"""
JAVA_NORMALS = """
    1.1419053154730547 0.9194079489827879 -0.9498666368908959 -1.1069902863993377 0.2809776380727795 0.6846227956326554
    -0.8172214073987268 -1.3966434026780434 -0.19094451307087512 1.4862133923906502"""
JAVA_SIGNS = [-1, -1, 1, 1, 1, 1, -1, -1, 1, -1, -1, -1, 1, -1, 1, -1, 1, -1, -1, -1, 1, -1, 1, -1, -1, -1, 1, -1, 1, 1]


def test_google_draws_what_libstdcxx_does():
    """Figures of a C++ program, GCC 12: std::mt19937(7) through std::normal_distribution<float>; through
    std::uniform_int_distribution(0, 2) and std::bernoulli_distribution(0.5) in turns; and the same of 10,240 columns,
    whose indices are rejected now and then."""
    encoder = pv.fde.Encoder(9, repetitions=1, simhash_bits=2, projection_dim=3, seed=7, dialect="google")
    assert_exact(encoder.hyperplanes[0].T.ravel(), [np.float32(float.fromhex(x)) for x in LIBSTDCXX_NORMALS.split()])
    column, sign = np.abs(encoder.projections[0]).argmax(1), encoder.projections[0].sum(1)
    assert_exact(column, [0, 0, 2, 0, 1, 1, 1, 2, 1])
    assert_exact(sign, [-1, -1, -1, 1, 1, 1, -1, 1, 1])
    assert (np.count_nonzero(encoder.projections[0], axis=1) == 1).all()
    index, sign = pv._fde_dialects._libstdcxx_sketch(7, 400_000, 10240)
    digest = 0
    for word in (2 * index + (sign > 0)).tolist():
        digest = (digest * 31 + word) % 1_000_000_007
    assert digest == 813450327
    assert_exact(index[:5], [781, 3266, 7408, 3154, 5131])


def test_opensearch_draws_what_java_does():
    """Figures of a Java program: java.util.Random(42).nextGaussian() 45 times, then nextBoolean() 30 times."""
    encoder = pv.fde.Encoder(5, repetitions=3, simhash_bits=3, projection_dim=2, seed=42, dialect="opensearch")
    planes = encoder.hyperplanes.swapaxes(1, 2).ravel()
    assert_exact(planes[:10], np.array(JAVA_NORMALS.split(), float).astype(np.float32))
    assert_exact(np.sign(encoder.projections).swapaxes(1, 2).ravel(), JAVA_SIGNS)
    assert_exact(np.abs(encoder.projections), np.full((3, 5, 2), np.float32(np.sqrt(0.5))))


def test_weaviate_draws_from_the_generator_of_go():
    """The first words of Go's own TestPCG; then the documented formulas."""
    words = pv._fde_dialects._go_pcg(1, 2, 3)
    assert_exact(words, np.array([0xC4F5A58656EEF510, 0x9DCEC3AD077DEC6C, 0xC8D04605312F8088], np.uint64))
    encoder = pv.fde.Encoder(4, repetitions=2, simhash_bits=3, projection_dim=5, dialect="weaviate")
    words = pv._fde_dialects._go_pcg(0x532CA5105169B1DF, 0x385AB5285169B1AC, 88).reshape(2, 44)
    uniform = (words[:, :24] % np.uint64(2**53)) / 2**53
    planes = np.sqrt(-2 * np.log(uniform[:, ::2])) * np.cos(2 * np.pi * uniform[:, 1::2])
    assert_exact(encoder.hyperplanes.swapaxes(1, 2).reshape(2, 12), planes.astype(np.float32))
    signs = np.where(words[:, 24:] % np.uint64(2), 1, -1)
    assert_exact(np.sign(encoder.projections).swapaxes(1, 2).reshape(2, 20), signs)


def test_muvera_py_draws_a_generator_a_matrix():
    encoder = pv.fde.Encoder(
        6, repetitions=2, simhash_bits=3, projection_dim=4, final_dim=7, seed=42, dialect="muvera-py"
    )
    for r in range(2):
        planes = np.random.default_rng(42 + r).normal(size=(6, 3)).astype(np.float32)
        assert_exact(encoder.hyperplanes[r], planes)
        draw = np.random.default_rng(42 + r)
        column, sign = draw.integers(0, 4, size=6), draw.choice([-1.0, 1.0], size=6)
        assert_exact(encoder.projections[r][np.arange(6), column], sign)
        assert np.count_nonzero(encoder.projections[r]) == 6
    draw = np.random.default_rng(42)
    assert_exact(encoder.final_projection[0], draw.integers(0, 7, size=64))
    assert_exact(encoder.final_projection[1], draw.choice([-1.0, 1.0], size=64))


@pytest.mark.parametrize(("bits", "wrong"), [(2, 0), (3, 4), (4, 12), (5, 28), (6, 60), (7, 124)])
def test_how_many_buckets_muvera_py_fills_from_elsewhere(bits, wrong):
    words, sources = pv._fde_dialects.sign_words(bits, pv._fde_dialects.DIALECTS["muvera-py"])
    assert (words != sources).sum() == wrong
    google = pv._fde_dialects.sign_words(bits, pv._fde_dialects.DIALECTS["google"])
    assert_exact(google, [words, words])


def test_only_some_dialects_project_to_more_columns(rng):
    (tokens,) = sample(rng, [20], 6)
    for dialect in DIALECTS:
        encoder = pv.fde.Encoder(6, repetitions=2, simhash_bits=2, projection_dim=9, dialect=dialect)
        assert encoder.output_dim == 2 * 4 * (6 if dialect in ("paper", "fastembed") else 9)
        assert_encodings(encoder.encode_docs([tokens]), [tokens], encoder, docs=True)


def test_the_hash_names_the_matrices():
    def hash_of(**options):
        return pv.fde.Encoder(6, **{"repetitions": 2, "projection_dim": 3, **options}).matrices_hash

    assert hash_of() == hash_of(fill_empty=False)
    others = [{"seed": 1}, {"dialect": "fastembed"}, {"projection_dim": 2}, {"final_dim": 4}, {"projection_dim": None}]
    assert len({hash_of(), *(hash_of(**other) for other in others)}) == 6


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
            ids, bits = plain.partition(query), ref.sign_bits(doc, plain.hyperplanes)
            means = [ref.blocks(doc.astype(np.float64), bits[:, r], plain, docs=True)[ids[:, r]] for r in range(40)]
            np.testing.assert_allclose(value, np.mean([(query * block).sum() for block in means]), rtol=1e-4)
        errors.append(estimate - value)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))


# How it is called


def test_encodings_do_not_depend_on_the_batch_nor_on_threads(rng, isa, on_device):
    encoder = pv.fde.Encoder(40, simhash_bits=4, final_dim=900)
    sets = sample(rng, rng.integers(0, 90, 150), 40)
    one = both(encoder, sets, on_device, num_threads=1)
    for threads in (2, 7):
        for a, b in zip(one, both(encoder, sets, on_device, num_threads=threads), strict=True):
            assert_exact(a, b)
    for i in (0, 77, 149):
        for batch, alone in zip(one, both(encoder, [sets[i]], on_device), strict=True):
            assert_exact(batch[i], alone[0])
    tokens = on_device(np.concatenate(sets))
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


@pytest.mark.parametrize("options", [{}, {"final_dim": 40}])
def test_narrow_encodings_are_rounded_floats(rng, isa, on_device, options):
    encoder = pv.fde.Encoder(12, repetitions=3, simhash_bits=3, projection_dim=5, **options)
    sets = [on_device(x) for x in sample(rng, SIZES, 12)]
    for encode in (encoder.encode_docs, encoder.encode_queries):
        exact = on_host(encode(sets))
        assert_exact(encode(sets, dtype="float16"), exact.astype(np.float16))
        codes, scales = map(on_host, encode(sets, dtype="int8"))
        assert_exact(scales, abs(exact).max(1) / np.float32(127))
        assert abs(codes.astype(int)).max() == 127
        assert (abs(codes * scales[:, None] - exact) <= 0.5001 * scales[:, None]).all()
        for threads in (2, 7):
            again = encode(sets, dtype="int8", num_threads=threads, progress=lambda done, total: None)
            assert_exact(again[0], codes)
            assert_exact(again[1], scales)


def test_narrow_encodings_into_a_file_serve_a_scan(rng, tmp_path, lib):
    encoder = pv.fde.Encoder(16, repetitions=4, simhash_bits=2, projection_dim=8)
    sets = sample(rng, [5] * 40, 16)
    half = np.lib.format.open_memmap(tmp_path / "half.npy", "w+", np.float16, (40, encoder.output_dim))
    assert encoder.encode_docs(sets, dtype="float16", out=half, progress=lambda done, total: None) is half
    assert_exact(np.load(tmp_path / "half.npy"), encoder.encode_docs(sets).astype(np.float16))
    out = np.empty((40, encoder.output_dim), np.int8), np.empty(40, np.float32)
    codes, scales = encoder.encode_docs(sets, dtype="int8", out=out)
    assert codes is out[0]
    assert scales is out[1]
    queries = encoder.encode_queries(sets)
    for items, options in ((half, {}), (codes, {"scales": lib(scales)})):
        best = pv.scan.topk(lib(queries), lib(np.array(items)), 1, **options)[1]
        assert on_host(best)[:, 0].tolist() == list(range(40))


def test_the_caller_gets_the_library_it_gave(rng, lib):
    encoder = pv.fde.Encoder(8, repetitions=3, projection_dim=4)
    arrays = sample(rng, [3, 9], 8)
    sets = [lib(x) for x in arrays]
    out = lib(np.full((2, encoder.output_dim), np.nan, np.float32))
    assert encoder.encode_docs(sets, out=out) is out
    assert_encodings(on_host(out), arrays, encoder, docs=True)
    for result in (encoder.encode_docs(sets), encoder.encode_docs(sets, progress=lambda *_: None)):
        assert type(result) is type(sets[0])
        assert_exact(result, out)
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


def test_nan_and_inf_stay_in_their_set(rng, isa, on_device):
    encoder = pv.fde.Encoder(20, simhash_bits=3)
    sets = sample(rng, [4, 30, 5], 20)
    expected = both(encoder, sets, on_device)
    for value in (np.nan, np.inf):
        sets[1][7, 3] = value
        for damaged, clean in zip(both(encoder, sets, on_device), expected, strict=True):
            assert_exact(damaged[[0, 2]], clean[[0, 2]])
            assert (~np.isfinite(damaged[1].reshape(20, -1))).any(1).all()


@pytest.mark.parametrize("options", [{}, {"final_dim": 33, "dialect": "google"}, {"projection_dim": None}])
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
    for change in (
        {"repetitions": 5},
        {"final_dim": 8},
        {"simhash_bits": 40},
        {"dialect": "google"},
        {"dialect": "any"},
        {"matrices": "0"},
        {"other": 1},
    ):
        state = encoder.state()
        state.params.update(change)
        pv._files.save(tmp_path / "encoder", "fde.Encoder", state)
        with pytest.raises(pv.FormatError, match=re.escape(f"fde.Encoder.load: {tmp_path / 'encoder'} is damaged")):
            pv.fde.Encoder.load(tmp_path / "encoder")


# Real tokens


def recall_of_candidates(docs, queries, k, candidates, **options):
    """Mean share of the exact MaxSim top k among the candidates that the encodings' inner products name."""
    encoder = pv.fde.Encoder(docs.dim, **options)
    _, found = pv.scan.topk(encoder.encode_queries(queries), encoder.encode_docs(docs), candidates)
    return ranking.recall(found, pv.maxsim.topk(queries, docs, k)[1])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_candidates_of_cranfield_hold_the_exact_best(data, dialect):
    sets = ranking.read(data / "cranfield")
    assert recall_of_candidates(sets.docs, sets.queries, 10, 100, dialect=dialect) >= 0.94


def test_candidates_of_colbert_tokens_hold_the_exact_best(data):
    """35 documents and 5 queries of ColBERTv2: too few to judge quality, enough to see that it works."""
    arrays = np.load(data / "colbert-nanofiqa" / "tokens.npz")
    docs, queries = (pv.Ragged(arrays[f"{kind}_tokens"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query"))
    assert recall_of_candidates(docs, queries, 3, 15) >= 0.8


# Of the two relevant documents of a query, the share among the first 2, 10 and 20 of 46, at the default sizes. All
# documents differ in a few words: MaxSim of the tokens has 0.981, 1 and 1, single vectors of the same model 0.162 at 2.
LIMIT_SMALL = {
    "paper": (0.363, 0.729, 0.879),
    "google": (0.3795, 0.73, 0.872),
    "fastembed": (0.3785, 0.732, 0.89),
    "weaviate": (0.366, 0.741, 0.882),
    "opensearch": (0.3695, 0.7055, 0.8705),
    "muvera-py": (0.3175, 0.6935, 0.858),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_recall_of_limit_small(data, dialect):
    docs, queries, relevance = ranking.read(data / "limit-small")
    encoder = pv.fde.Encoder(128, dialect=dialect)
    ids = pv.scan.topk(encoder.encode_queries(queries), encoder.encode_docs(docs), 20)[1]
    relevant = [sorted(grades) for grades in relevance]
    for k, expected in zip((2, 10, 20), LIMIT_SMALL[dialect], strict=True):
        assert abs(ranking.recall(ids[:, :k], relevant) - expected) < 0.002


# Ball carving


def test_long_sets_are_carved_alike_on_any_threads(rng):
    """So long that threads share the products of one set."""
    tokens = rng.standard_normal((1900, 80), np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    tokens[900:1500] = tokens[:600]
    one, two, seven = (pv.fde.carve([tokens, tokens[:9]], threshold=0.4, num_threads=n) for n in (1, 2, 7))
    assert_carved(one, [tokens, tokens[:9]], 0.4)
    assert_exact(two.values, one.values)
    assert_exact(seven.values, one.values)


def assert_carved(actual, sets, threshold):
    assert len(actual) == len(sets)
    for carved, tokens in zip(actual, sets, strict=True):
        expected = [np.float64(tokens[ball]).sum(0).astype(np.float32) for ball in ref.carve(tokens, threshold)]
        assert_exact(np.asarray(carved), np.array(expected, np.float32).reshape(-1, tokens.shape[1]))


@pytest.mark.parametrize("d", [1, 7, 8, 19, 128])
@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.7, 2.0])
def test_balls_are_those_of_the_definition(rng, isa, d, threshold):
    sets = sample(rng, SIZES, d)
    carved = pv.fde.carve(sets, threshold=threshold)
    assert_carved(carved, sets, threshold)
    if threshold == 2:
        np.testing.assert_array_equal(carved.values, np.concatenate(sets))
    for threads in (2, 7):
        np.testing.assert_array_equal(
            pv.fde.carve(sets, threshold=threshold, num_threads=threads).values, carved.values
        )


def test_a_product_at_the_threshold_joins_and_first_tokens_go_first():
    tokens = np.float32([[1, 0], [3, 4], [2, 9], [0, 1], [0, 2]])
    carved = pv.fde.carve([tokens, tokens[:0]], threshold=2)
    assert carved.offsets.tolist() == [0, 2, 2]
    assert carved.values.tolist() == [[6, 13], [0, 3]]


def test_a_token_with_nan_is_a_ball_of_its_own():
    tokens = np.float32([[1, 0], [np.nan, 0], [1, 0]])
    np.testing.assert_array_equal(pv.fde.carve([tokens]).values, np.float32([[2, 0], [np.nan, 0]]))


def test_carving_gives_the_library_it_got(rng, cpu_lib):
    sets = sample(rng, [9, 3], 6)
    carved = pv.fde.carve((cpu_lib(np.concatenate(sets)), [0, 9, 12]))
    assert type(carved.values) is type(cpu_lib(sets[0]))
    assert_carved([np.asarray(c) for c in carved], sets, 0.7)


def test_carved_colbert_queries_score_like_whole_ones(data):
    """The published figures: 9 to 15 of 32 tokens are left, and the order of documents stays nearly the same."""
    arrays = np.load(data / "colbert-nanofiqa" / "tokens.npz")
    docs, queries = (pv.Ragged(arrays[f"{kind}_tokens"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query"))
    carved = pv.fde.carve(queries)
    assert carved.lengths.min() >= 9
    assert carved.lengths.max() <= 15
    whole, fewer = pv.maxsim.score(queries, docs), pv.maxsim.score(carved, docs)
    ranks = [scores.argsort(1).argsort(1) for scores in (whole, fewer)]
    spearman = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    assert np.mean(spearman) >= 0.995


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
            lambda: encoder(dialect="any"),
            ValueError,
            "fde.Encoder: dialect must be one of 'paper', 'google', 'fastembed', 'weaviate', 'opensearch', "
            "'muvera-py', got 'any'",
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
            lambda: encoder(final_dim=9).encode_queries(zeros(2, 3, 4), sparse=True),
            ValueError,
            "fde.Encoder.encode_queries: sparse must be False with a final_dim, got final_dim=9",
        ),
        (
            lambda: encoder().encode_queries(zeros(2, 3, 4), sparse=True, out=zeros(2, 8)),
            ValueError,
            "fde.Encoder.encode_queries: out must be None with sparse=True, got ndarray",
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
        (
            lambda: encoder().encode_docs([zeros(3, 4)], dtype="bfloat16"),
            ValueError,
            "fde.Encoder.encode_docs: dtype must be one of 'float32', 'float16', 'int8', got 'bfloat16'",
        ),
        (
            lambda: encoder().encode_docs([zeros(3, 4)], dtype="int8", out=zeros(1, 8)),
            TypeError,
            "fde.Encoder.encode_docs: out must be a pair of arrays (codes, scales) in int8, got ndarray",
        ),
        (
            lambda: encoder().encode_queries([zeros(3, 4)], dtype="float16", out=zeros(1, 8)),
            TypeError,
            "fde.Encoder.encode_queries: out must be float16, got float32",
        ),
        (
            lambda: encoder(projection_dim=None).encode_docs([zeros(3, 4), zeros(1, 4) + 65520], dtype="float16"),
            ValueError,
            "fde.Encoder.encode_docs: tokens must have encodings of at most 65504 in float16, got 65520 in set 1",
        ),
        (
            lambda: encoder().encode_docs([zeros(3, 4) * np.nan], dtype="int8"),
            ValueError,
            "fde.Encoder.encode_docs: tokens must have encodings that are finite in int8, got nan in set 0",
        ),
        (
            lambda: encoder().encode_queries([zeros(3, 4)], dtype="int8", sparse=True),
            ValueError,
            "fde.Encoder.encode_queries: dtype must be float32 with sparse=True, got int8",
        ),
        (
            lambda: pv.fde.carve([zeros(3, 4, dtype=np.float64)]),
            TypeError,
            "fde.carve: queries must be float32, got float64; cast it with .astype('float32')",
        ),
        (
            lambda: pv.fde.carve([zeros(3, 4)], threshold=float("nan")),
            ValueError,
            "fde.carve: threshold must not be NaN, got nan",
        ),
        (
            lambda: pv.fde.carve([zeros(3, 4)], threshold="most"),
            TypeError,
            "fde.carve: threshold must be a number, got str",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
