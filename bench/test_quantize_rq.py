"""Residual quantisation against faiss, on real vectors."""

import numpy as np
import pytest

import polyvec as pv


def error(x, decoded):
    return np.square(x - decoded).sum(1, dtype=np.float64).mean()


def given(faiss_quantizer, codebooks, faiss):
    """A quantizer of faiss with our codebooks."""
    faiss.copy_array_to_vector(codebooks.ravel(), faiss_quantizer.codebooks)
    faiss_quantizer.is_trained = True
    return faiss_quantizer


@pytest.mark.parametrize(("levels", "bits", "n"), [(4, 8, 4096), (12, 4, 4096)], ids=["4x8", "12x4"])
def test_train(compare, faiss, glosses, levels, bits, n):
    """The error of the codes is that of faiss, within 2 %, or less."""
    x = glosses[:n, :96].copy()

    def in_polyvec():
        quantizer = pv.quantize.ResidualQuantizer(96, levels, bits=bits, beam=5).fit(x)
        return lambda: quantizer.decode(quantizer.encode(x))

    def in_faiss():
        quantizer = faiss.ResidualQuantizer(96, levels, bits)
        quantizer.max_beam_size = 5
        quantizer.train(x)
        return lambda: quantizer.decode(quantizer.compute_codes(x))

    ours = error(x, in_polyvec()())
    compare(
        in_polyvec,
        {"faiss": in_faiss},
        check=lambda decode: ours <= 1.02 * error(x, decode()) or pytest.fail(f"error {ours}, {error(x, decode())}"),
    )


@pytest.fixture(scope="module", params=[(8, 8), (32, 4)], ids=["8x8", "32x4"])
def codec(request, glosses):
    """Fitted to few rows: what is timed does not depend on the codewords."""
    levels, bits = request.param
    return pv.quantize.ResidualQuantizer(384, levels, bits=bits, beam=5).fit(glosses, train_size=2048, max_iter=2)


@pytest.mark.parametrize("beam", [1, 5, 16])
def test_encode(compare, faiss, glosses, codec, beam):
    """The same codebooks: the same codes but for near ties."""
    x = glosses[::58]
    codec.beam = beam
    rival = given(faiss.ResidualQuantizer(384, codec.levels, codec.bits), codec.codebooks, faiss)
    rival.max_beam_size = beam
    with_tables = given(faiss.ResidualQuantizer(384, codec.levels, codec.bits), codec.codebooks, faiss)
    with_tables.max_beam_size, with_tables.use_beam_LUT = beam, 1
    with_tables.compute_codebook_tables()
    expected = error(x, codec.decode(codec.encode(x)))
    compare(
        lambda: codec.encode(x),
        {"faiss": lambda: rival.compute_codes(x), "faiss, tables": lambda: with_tables.compute_codes(x)},
        check=lambda codes: np.testing.assert_allclose(error(x, codec.decode(codes)), expected, rtol=1e-3),
        flops=2 * codec.codebooks.size * len(x),
    )


@pytest.mark.parametrize("nq", [1, 200])
def test_search(compare, faiss, glosses, codec, nq):
    """Inner products. Fast-scan rounds its tables to 8 bits: its scores are approximate, ours are exact."""
    codec.beam = 1
    codes, queries = codec.encode(glosses), glosses[:: len(glosses) // nq][:nq].copy()
    packed, lookup = codec.pack(codes), faiss.AdditiveQuantizer.ST_LUT_nonorm
    shape = 384, codec.levels, codec.bits, faiss.METRIC_INNER_PRODUCT, lookup
    if codec.bits == 8:
        name, index = "faiss", faiss.IndexResidualQuantizer(*shape)
    else:
        name, index = "faiss fast-scan", faiss.IndexResidualQuantizerFastScan(*shape)
    given(index.rq, codec.codebooks, faiss).max_beam_size = 1
    index.rq.set_derived_values()
    index.is_trained = True
    index.add(glosses)
    expected = np.sort(queries[0] @ codec.decode(codes).T)[::-1][:100]
    product = pv.quantize.ProductQuantizer(384, codec.levels, bits=codec.bits)
    product.fit(glosses, train_size=2048, max_iter=1)
    product_codes = product.pack(product.encode(glosses))

    def check(scores):
        if scores is not None:
            np.testing.assert_allclose(scores[0], expected, rtol=0, atol=2e-2)

    def search_product():
        product.search(queries, product_codes, 100)  # other scores

    compare(
        lambda: codec.search(queries, packed, 100)[0],
        {
            name: lambda: index.search(queries, 100)[0],
            "codes not packed": lambda: codec.search(queries, codes, 100)[0],
            "product codes": search_product,
        },
        check=check,
        bytes=nq * codes.nbytes,
    )
