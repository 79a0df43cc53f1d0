"""Scans of integer codes beside faiss and turbovec: as many bytes a vector, and recall of the 10 nearest compared."""

import numpy as np
import pytest

import polyvec as pv

NQ = 200


@pytest.fixture(scope="module")
def glosses(glosses):
    """115,659 x 384, normalised, 200 other ones as queries, and the exact 10 nearest of each."""
    held_out = np.sort(np.random.default_rng(0).choice(len(glosses), 2000, replace=False))
    queries, items = glosses[held_out[::10]].copy(), np.delete(glosses, held_out, 0)
    return items, queries, pv.scan.topk(queries, items, 10)[1]


def recall(ids, nearest):
    return np.mean([len(set(a[:10]) & set(b)) / 10 for a, b in zip(ids.tolist(), nearest.tolist(), strict=True)])


def run(compare, benchmark, glosses, nq, codec, name, search, slack, pack=False):
    """Time both for `nq` queries, once the recall of all queries is no lower than the rival's less `slack`.

    With `pack` our codes are packed, and what they are without it is one more rival.
    """
    items, queries, nearest = glosses
    codes = codec.encode(items)
    ours, theirs = (recall(np.asarray(ids), nearest) for _, ids in (codec.search(queries, codes, 100), search(queries)))
    assert ours >= theirs - slack, (ours, theirs)
    benchmark.extra_info.update(recall={"polyvec": ours, name: theirs}, code_size=codec.code_size)
    few, scanned = queries[:nq].copy(), codec.pack(codes) if pack else codes
    not_packed = {"codes not packed": lambda: codec.search(few, codes, 100)} if pack else {}
    compare(
        lambda: codec.search(few, scanned, 100),
        {name: lambda: search(few), **not_packed},
        check=lambda result: len(result[1]) == nq or pytest.fail("too few results"),
        bytes=codes.nbytes * nq,
    )


@pytest.mark.parametrize("nq", [1, NQ])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_scalar(compare, benchmark, faiss, glosses, bits, nq):
    index = faiss.index_factory(384, f"SQ{bits}", faiss.METRIC_INNER_PRODUCT)
    index.train(glosses[0])
    index.add(glosses[0])
    codec = pv.quantize.ScalarQuantizer(384, bits=bits, ranges="dimension").fit(glosses[0])
    run(compare, benchmark, glosses, nq, codec, "faiss", lambda q: index.search(q, 100), 0.01)


@pytest.mark.parametrize("nq", [1, NQ])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rabitq(compare, benchmark, faiss, glosses, bits, nq):
    """Faiss takes 10 s to encode 4 bits and keeps queries in float32; with one bit it scans by in-register tables."""
    index = faiss.index_factory(384, "RaBitQfs" if bits == 1 else f"RaBitQ{bits}", faiss.METRIC_INNER_PRODUCT)
    index.train(glosses[0])
    index.add(glosses[0])
    codec = pv.quantize.RaBitQ(384, bits=bits).fit(glosses[0])
    run(compare, benchmark, glosses, nq, codec, "faiss", lambda q: index.search(q, 100), 0.02, pack=True)


@pytest.mark.parametrize("nq", [1, NQ])
@pytest.mark.parametrize("bits", [2, 4])
def test_rabitq_beside_turbovec(compare, benchmark, glosses, bits, nq):
    """At the AVX2 level 32 products of bytes and their sum cost two operations, 32 of turbovec's lookups (each of two
    numbers of 2 bits, or one of 4) four. A code and a query of 384 numbers then take about 50 operations alone, with
    unpacking, and 25 in a batch; turbovec's 33 (2 bits) or 66. Before, with products of 16 bits of unpacked rows, the
    ratios of this case were 0.23 and 0.54 (2 bits: one query, a batch), 0.50 and 1.02 (4 bits).

    Rows of 96 bytes are short loops and a sum across lanes each, twice what their operations alone would take (23
    cycles instead of 12 on Zen 3, from the level-2 cache). Packed codes lie word by word, so that neither is left: 13
    cycles, and what memory allows.

    With AVX-512 both wait for memory. turbovec scans one bit of each number and rescores the best of these: at 4 bits
    it reads a quarter, and one query takes it no longer than at 2.
    """
    turbovec = pytest.importorskip("turbovec")
    index = turbovec.TurboQuantIndex(384, bits)
    index.add(glosses[0])
    index.prepare()
    codec = pv.quantize.RaBitQ(384, bits=bits).fit(glosses[0])
    run(compare, benchmark, glosses, nq, codec, "turbovec", lambda q: index.search(q, 100), 0.005, pack=True)


def test_recall_and_rate(curve, glosses):
    """Settings are bits a number: 48 bytes a code each, and those of its factors."""
    turbovec = pytest.importorskip("turbovec")
    items, queries, nearest = glosses
    contenders = {}
    for bits in (2, 3, 4):
        index, codec = turbovec.TurboQuantIndex(384, bits), pv.quantize.RaBitQ(384, bits=bits).fit(items)
        index.add(items)
        index.prepare()
        contenders[bits] = codec, codec.encode(items), index
    curve(
        lambda bits: contenders[bits][0].search(queries, contenders[bits][1], 100)[1],
        {"turbovec": lambda bits: contenders[bits][2].search(queries, 100)[1]},
        settings=(2, 3, 4),
        recall=lambda ids: recall(np.asarray(ids), nearest),
        queries=NQ,
    )


@pytest.mark.parametrize("nq", [1, NQ])
def test_certified(compare, benchmark, glosses, nq):
    """The exact 10 nearest by way of 8-bit codes, against comparing float32 with float32."""
    items, queries, nearest = glosses
    codec = pv.quantize.Refined(pv.quantize.RaBitQ(384, bits=8)).fit(items)
    encoded, few = codec.encode(items), queries[:nq].copy()
    benchmark.extra_info["rescored"] = float(codec.search(queries, encoded, 10, certified=True).rescored.mean())
    compare(
        lambda: codec.search(few, encoded, 10, certified=True),
        {"scan.topk": lambda: pv.scan.topk(few, items, 10)},
        check=lambda result: np.testing.assert_array_equal(result[1], nearest[:nq]),
        flops=2 * items.size * nq,
    )
