"""Residual quantisation."""

import lzma

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from polyvec import _codec, _core, _files, _residual_quantizer
from reference import quantize_rq as ref
from reference import scan as ref_scan

RQ = "quantize.ResidualQuantizer"


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def whole(rng, *shape, size=3):
    """Whole numbers: every sum of products is exact, and many are equal."""
    return rng.integers(-size, size + 1, shape).astype(np.float32)


def quantizer(rng, dim, levels, bits, metric="ip", make=sample, beam=8):
    """A quantizer with random codebooks, the later the shorter."""
    rq = pv.quantize.ResidualQuantizer(dim, levels, bits=bits, metric=metric, beam=beam)
    rq.codebooks = make(rng, levels, 1 << bits, dim)
    if make is sample:
        rq.codebooks /= (1 + np.arange(levels, dtype=np.float32))[:, None, None]
    return rq


def random_codes(rng, rq, n):
    """Codes with the right norms."""
    labels = rng.integers(0, 1 << rq.bits, (n, rq.levels)).astype(np.uint8)
    if rq.metric == "l2":
        norms = ref.norm_digits(ref.decode(labels, rq.codebooks), rq.codebooks, rq.bits)
        labels = np.concatenate([labels, norms.astype(np.uint8)], 1)
    return _residual_quantizer._bytes_of(labels, rq.bits)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert_exact(x, y)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("levels", "dim"), [(1, 1), (2, 3), (3, 8), (5, 17), (9, 33)])
def test_codes_are_exact_on_whole_numbers(rng, isa, bits, levels, dim, metric):
    for beam, n in ((1, 0), (1, 65), (2, 1), (5, 7), (8, 64), (40, 9)):
        rq = quantizer(rng, dim, levels, bits, metric, make=whole, beam=beam)
        x = whole(rng, n, dim, size=9)
        codes = rq.encode(x)
        assert_exact(codes, ref.encode(x, rq.codebooks, beam, bits, metric))
        labels = ref.beam_search(x, rq.codebooks, beam)[0][:, 0]
        for first in range(1, levels + 1):
            expected = ref.decode(labels[:, :first], rq.codebooks[:first])
            assert_exact(rq.decode(codes, levels=first), expected)
        assert_exact(rq.decode(codes), ref.decode(labels, rq.codebooks))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("beam", [1, 3, 16, 33])
def test_codes_lose_what_those_of_the_definition_lose(rng, isa, bits, beam):
    rq, x = quantizer(rng, 21, 6, bits, beam=beam), sample(rng, 150, 21)
    loss = np.square(x - rq.decode(rq.encode(x)).astype(np.float64)).sum(1)
    _, expected = ref.beam_search(x, rq.codebooks, beam)
    longest = np.linalg.norm(rq.codebooks, axis=2).max(1).sum()
    size = (np.linalg.norm(x, axis=1) + longest) ** 2
    # A near tie may send the beam another way; all but a few rows agree, and the rest loses as much on average.
    close = np.abs(loss - expected[:, 0]) <= 1e-5 * size
    assert close.mean() >= 0.95
    assert abs(loss.mean() / expected[:, 0].mean() - 1) < 5e-3


def test_a_beam_of_all_sums_finds_the_best(rng):
    rq, x = quantizer(rng, 5, 2, 4, beam=256), sample(rng, 40, 5)
    sums = (rq.codebooks[0][:, None] + rq.codebooks[1]).reshape(256, 5)
    labels = rq.encode(x)
    best = ref_scan.scores(x, sums, "l2").argmin(1)
    assert_exact(labels[:, 0], best // 16 | best % 16 << 4)


def test_a_wider_beam_loses_less_and_more_levels_do(rng):
    x = sample(rng, 2000, 24)
    losses = [
        distortion(pv.quantize.ResidualQuantizer(24, levels, bits=bits, beam=beam).fit(x), x)
        for levels, bits, beam in ((2, 4, 1), (4, 4, 1), (4, 4, 4), (4, 4, 16), (4, 8, 16))
    ]
    assert losses == sorted(losses, reverse=True)


def distortion(rq, x):
    return np.square(x - rq.decode(rq.encode(x))).sum(1, dtype=np.float64).mean()


def test_first_levels_are_coarser_vectors(rng):
    x = sample(rng, 1500, 16)
    rq = pv.quantize.ResidualQuantizer(16, 4, bits=4, metric="l2").fit(x)
    codes = rq.encode(x)
    losses = [np.square(x - rq.decode(codes, levels=level)).sum() for level in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True)


def check_search(rq, queries, codes, k, **options):
    """Scores are those of the decoded vectors; ids differ from the exact ones by rounding alone."""
    scores, ids = rq.search(queries, codes, k, **options)
    decoded = np.asarray(rq.decode(codes), np.float64)
    exact = ref_scan.scores(queries, decoded, rq.metric)
    expected, _ = ref_scan.topk(queries, decoded, k, rq.metric)
    # Sums of codewords cancel out: their lengths count. Norms are in steps of that length squared.
    longest = np.linalg.norm(rq.codebooks, axis=2).max(1).sum()
    size = (np.linalg.norm(queries, axis=1)[:, None] + longest) ** 2 + np.zeros(ids.shape)
    found = min(k, len(codes))
    assert_reduction(scores, expected, size, length=rq.dim)
    assert (ids[:, found:] == -1).all()
    assert all(len(set(row)) == found for row in ids[:, :found].tolist())
    assert_reduction(scores[:, :found], np.take_along_axis(exact, ids[:, :found], 1), size[:, :found], length=rq.dim)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("nq", [0, 1, 2, 7, 8, 9, 21])
def test_search_equals_the_definition(rng, isa, nq, bits, metric):
    for n in (0, 1, 15, 64, 257, 700):
        dim, levels, k = int(rng.integers(1, 40)), int(rng.choice([1, 2, 3, 8, 17])), int(rng.choice([1, 3, 40]))
        rq = quantizer(rng, dim, levels, bits, metric)
        check_search(rq, sample(rng, nq, dim), random_codes(rng, rq, n), k)


@pytest.mark.parametrize("bits", [8, 4])
def test_inner_products_are_exact_on_whole_numbers(rng, isa, bits):
    rq = quantizer(rng, 9, 5, bits, make=whole)
    queries, codes = whole(rng, 11, 9), random_codes(rng, rq, 600)
    assert_same(rq.search(queries, codes, 30), ref_scan.topk(queries, rq.decode(codes), 30, "ip"))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_codes_and_some_of_them(rng, isa, bits, metric):
    rq = quantizer(rng, 12, 5, bits, metric)
    for n in (0, 1, 15, 64, 65, 1100):
        queries, codes = sample(rng, 11, 12), random_codes(rng, rq, n)
        packed = rq.pack(codes)
        assert_same(rq.search(queries, packed, 7), rq.search(queries, codes, 7))
        for share in (0, 0.01, 0.5, 1):
            mask = rng.random(n) < share
            rows = np.flatnonzero(mask)
            scores, ids = rq.search(queries, codes[rows], 7)
            expected = scores, np.append(rows, -1)[ids]
            for table in (codes, packed):
                assert_same(rq.search(queries, table, 7, include=mask), expected)
                assert_same(rq.search(queries, table, 7, include=rng.permutation(rows)), expected)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_query_scores_alone_as_it_does_in_a_batch(rng, isa, bits, metric):
    rq = quantizer(rng, 19, 5, bits, metric)
    queries, codes = sample(rng, 21, 19), random_codes(rng, rq, 3000)
    scores, ids = rq.search(queries, codes, 9)
    for q in range(21):
        assert_same(rq.search(queries[q : q + 1], codes, 9), (scores[q : q + 1], ids[q : q + 1]))


@pytest.mark.parametrize(("metric", "worst"), [("ip", -np.inf), ("l2", np.inf)])
def test_no_query_finds_what_is_not_a_number(rng, metric, worst):
    rq = quantizer(rng, 8, 4, 8, metric)
    queries, codes = sample(rng, 5, 8), random_codes(rng, rq, 20)
    good = rq.search(queries, codes, 3)
    queries[2, 3] = np.nan
    scores, ids = rq.search(queries, codes, 3)
    assert_exact(ids[2], [-1, -1, -1])
    assert_exact(scores[2], [worst] * 3)
    for q in (0, 1, 3, 4):
        assert_same((scores[q], ids[q]), (good[0][q], good[1][q]))


def test_codes_do_not_depend_on_the_other_rows(rng, isa):
    rq, x = quantizer(rng, 19, 5, 8), sample(rng, 133, 19)
    codes = rq.encode(x)
    for i in (0, 63, 64, 132):
        assert_exact(rq.encode(x[i : i + 1]), codes[i : i + 1])


def test_values_that_overflow_have_codes(rng, isa):
    rq = quantizer(rng, 4, 3, 8)
    assert rq.encode(np.full((3, 4), 3e38, np.float32)).shape == (3, 3)


def test_result_does_not_depend_on_thread_count(rng):
    x = sample(rng, 4000, 24)
    results = []
    for n in (1, 2, 7):
        rq = pv.quantize.ResidualQuantizer(24, 3, metric="l2", beam=3).fit(x, max_iter=2, num_threads=n)
        codes = rq.encode(x, num_threads=n)
        many = np.tile(codes, (20, 1))
        found = rq.search(x[:20], many, 70, num_threads=n)
        results.append([rq.codebooks, codes, rq.decode(codes, num_threads=n), *found])
    for other in results[1:]:
        assert_same(results[0], other)


def test_seed(rng):
    x = sample(rng, 900, 6)
    a, b, c = (pv.quantize.ResidualQuantizer(6, 2, bits=4, seed=s).fit(x, max_iter=2).codebooks for s in (3, 3, 4))
    assert_exact(a, b)
    assert (a != c).any()


def test_training_can_be_stopped(rng):
    x = sample(rng, 500, 8)
    rq = pv.quantize.ResidualQuantizer(8, 4, bits=4).fit(x)
    before, seen = rq.codebooks, []

    def stop(done, total):
        seen.append((done, total))
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rq.fit(x, progress=stop)
    assert seen[0] == (1, 200)  # 4 levels, 5 widths, 10 iterations
    assert seen[-1][0] >= 30
    assert rq.codebooks is before
    seen.clear()
    rq.fit(x, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (200, 200)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_save_and_load(rng, tmp_path, metric):
    x, path = sample(rng, 400, 12), tmp_path / "rq.safetensors"
    rq = pv.quantize.ResidualQuantizer(12, 3, bits=4, metric=metric, beam=5, seed=7).fit(x)
    rq.save(path)
    other = pv.quantize.ResidualQuantizer.load(path)
    assert repr(other) == repr(rq) == f"ResidualQuantizer(12, 3, bits=4, metric={metric!r}, beam=5, seed=7)"
    codes = rq.encode(x)
    assert_exact(other.encode(x), codes)
    assert_same(rq.search(x, codes, 4), other.search(x, codes, 4))
    state = rq.state()
    state.tensors["codebooks"] = state.tensors["codebooks"][1:]
    _files.save(path, RQ, state)
    with pytest.raises(pv.FormatError) as caught:
        pv.quantize.ResidualQuantizer.load(path)
    assert str(caught.value) == (
        f"{RQ}.load: {path} is damaged: ValueError: codebooks must be float32 of shape (3, 16, 12), got float32 of "
        "shape (2, 16, 12)"
    )


def test_the_caller_gets_the_library_it_gave(rng, cpu_lib):
    x = cpu_lib(sample(rng, 300, 8))
    rq = pv.quantize.ResidualQuantizer(8, 2, metric="l2").fit(x, max_iter=2)
    codes = rq.encode(x)
    results = codes, rq.decode(codes), *rq.search(x, codes, 3)
    assert all(type(result) is type(x) for result in results)
    out = [cpu_lib(np.zeros_like(np.asarray(result))) for result in results]
    assert rq.encode(x, out=out[0]) is out[0]
    assert rq.decode(codes, out=out[1]) is out[1]
    assert rq.search(x, codes, 3, out=(out[2], out[3]))[0] is out[2]
    assert_same(results, out)


def test_narrow_floats(rng):
    torch = pytest.importorskip("torch")
    for x in (sample(rng, 300, 8).astype(np.float16), torch.from_numpy(sample(rng, 300, 8)).bfloat16()):
        wide = np.asarray(x.float() if isinstance(x, torch.Tensor) else x.astype(np.float32))
        rq, other = (pv.quantize.ResidualQuantizer(8, 3, bits=4).fit(rows, max_iter=3) for rows in (x, wide))
        assert_exact(rq.codebooks, other.codebooks)
        codes = rq.encode(x)
        assert type(codes) is type(x)
        assert_exact(codes, rq.encode(wide))
        assert_same(rq.search(x, codes, 3), rq.search(wide, np.asarray(codes), 3))


def test_memory_maps_are_encoded_in_blocks(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(_codec, "_BLOCK_ELEMENTS", 800)
    x = np.memmap(tmp_path / "x", np.float16, "w+", shape=(250, 8))
    x[:] = sample(rng, 250, 8)
    out, seen = np.memmap(tmp_path / "codes", np.uint8, "w+", shape=(250, 5)), []
    rq = pv.quantize.ResidualQuantizer(8, 4, bits=4, metric="l2").fit(x, train_size=50)
    assert rq.encode(x, out=out, progress=lambda *counts: seen.append(counts)) is out
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert_exact(out, rq.encode(np.array(x, np.float32)))
    x[203, 1] = np.nan
    with pytest.raises(ValueError, match="x must be finite, got NaN or Inf in row 203"):
        rq.encode(x)


def test_refined_takes_it(rng, tmp_path):
    x = sample(rng, 600, 16)
    codec = pv.quantize.Refined(pv.quantize.ResidualQuantizer(16, 4, bits=4, metric="l2"), factor=20).fit(x)
    encoded = codec.encode(x)
    assert_exact(codec.search(x[:9], encoded, 1)[1][:, 0], np.arange(9))
    codec.save(tmp_path / "refined")
    assert_same(pv.quantize.Refined.load(tmp_path / "refined").search(x, encoded, 2), codec.search(x, encoded, 2))


@pytest.mark.parametrize(
    ("levels", "bits", "beam", "loss"),
    [
        (8, 8, 5, 19515),
        (16, 4, 5, 31626),
    ],  # the loss is that of faiss 1.15 at equal codes and beam, trained on the same rows
)
def test_sift(data, levels, bits, beam, loss):
    with lzma.open(data / "sift-10k" / "vectors.npy.xz") as file:
        x = np.load(file).astype(np.float32)
    rq = pv.quantize.ResidualQuantizer(128, levels, bits=bits, beam=beam).fit(x)
    assert distortion(rq, x) <= 1.02 * loss


# Errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def fitted(metric="ip"):
    return quantizer(np.random.default_rng(0), 8, 4, 8, metric)


def codes_of(n, size):
    return zeros(n, size, dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pv.quantize.ResidualQuantizer(0, 4), ValueError, f"{RQ}: dim must be at least 1, got 0"),
        (lambda: pv.quantize.ResidualQuantizer(8, 0), ValueError, f"{RQ}: levels must be at least 1, got 0"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4, bits=6), ValueError, f"{RQ}: bits must be one of 8, 4, got 6"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4, metric="cosine"), ValueError,
         f"{RQ}: metric must be one of 'ip', 'l2', got 'cosine'"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4, beam=0), ValueError, f"{RQ}: beam must be at least 1, got 0"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4, beam=257), ValueError,
         f"{RQ}: beam must be at most 256, got 257"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).encode(zeros(1, 8)), RuntimeError,
         f"{RQ}.encode: the quantizer must be fitted before; call fit(x)"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).search(zeros(1, 8), codes_of(1, 4), 1), RuntimeError,
         f"{RQ}.search: the quantizer must be fitted before; call fit(x)"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).fit(zeros(255, 8)), ValueError,
         f"{RQ}.fit: x must have at least 2^bits rows (256), got 255"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).fit(zeros(300, 8), train_size=100), ValueError,
         f"{RQ}.fit: train_size must be at least 256, got 100"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).fit(np.full((300, 8), np.inf, np.float32)), ValueError,
         f"{RQ}.fit: x must be finite, got NaN or Inf in row 0"),
        (lambda: pv.quantize.ResidualQuantizer(8, 4).fit(zeros(300, 8, dtype=np.float64)), TypeError,
         f"{RQ}.fit: x must be float32 or float16 or bfloat16, got float64; cast it with .astype('float32')"),
        (lambda: fitted().encode(zeros(3, 9)), ValueError, f"{RQ}.encode: x must have d = 8, got 9"),
        (lambda: fitted().encode(zeros(3, 8), out=zeros(3, 4)), TypeError,
         f"{RQ}.encode: out must be uint8, got float32"),
        (lambda: fitted("l2").decode(codes_of(3, 4)), ValueError,
         f"{RQ}.decode: codes must have 7 bytes a row, got 4"),
        (lambda: fitted().decode(codes_of(3, 4), levels=5), ValueError,
         f"{RQ}.decode: levels must be at most 4, got 5"),
        (lambda: fitted().decode(codes_of(3, 4), levels=0), ValueError,
         f"{RQ}.decode: levels must be at least 1, got 0"),
        (lambda: fitted().pack(codes_of(3, 5)), ValueError, f"{RQ}.pack: codes must have 4 bytes a row, got 5"),
        (lambda: fitted().search(zeros(3, 7), codes_of(3, 4), 1), ValueError,
         f"{RQ}.search: queries must have d = 8, got 7"),
        (lambda: fitted().search(zeros(3, 8), codes_of(3, 4), 1, include=[True, False]), ValueError,
         f"{RQ}.search: include must have one entry a code (3), got 2"),
        (lambda: fitted().search(zeros(3, 8), codes_of(3, 4), 1, include=[2, 0, 3]), IndexError,
         f"{RQ}.search: include must be in [0, 3), got 3 at position 2"),
        (lambda: fitted("l2").search(zeros(3, 8), fitted().pack(codes_of(3, 4)), 1), ValueError,
         f"{RQ}.search: codes must have blocks of shape (7, 64), got (4, 64)"),
        (lambda: fitted().search(zeros(3, 8), codes_of(3, 4), 0), ValueError,
         f"{RQ}.search: k must be at least 1, got 0"),
        (lambda: fitted().search(zeros(3, 8), codes_of(3, 4), 1, num_threads=0), ValueError,
         f"{RQ}.search: num_threads must be at least 1, got 0"),
        (lambda: _core.quantize_rq_extend(zeros(1, 8), zeros(2, 16, 8), zeros(255), codes_of(1, 0)[:, None],
                                          zeros(1, 1), codes_of(1, 2)[:, None], zeros(1, 1), 1), ValueError,
         f"{RQ}.encode: products must hold all pairs of levels, got 255"),
        (lambda: _core.quantize_rq_extend(zeros(1, 8), zeros(1, 16, 8), zeros(0), codes_of(1, 0)[:, None],
                                          zeros(1, 1), codes_of(1, 1)[:, None], zeros(1, 17), 1), ValueError,
         f"{RQ}.encode: out_scores must be no wider than there are sums (16), got 17"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
