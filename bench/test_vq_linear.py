"""Products with compressed weights against decoding them first, and against the weights themselves."""

import numpy as np
import pytest

import polyvec as pv

D = 4096


@pytest.fixture(scope="module", params=[(8, 8), (16, 8), (4, 4)], ids=["8-bits-of-8", "8-bits-of-16", "4-bits-of-4"])
def layer(request):
    """4096 x 4096 weights in pieces of 8, 16 and 4; 1, 1/2 and 1 bit a weight. Random: times do not depend on them."""
    dsub, bits = request.param
    rng = np.random.default_rng(0)
    pq = pv.quantize.ProductQuantizer(D, D // dsub, bits=bits)
    pq.codebooks = rng.standard_normal((pq.m, 1 << bits, dsub), np.float32)
    codes = rng.integers(0, 256, (D, pq.code_size), np.uint8)
    return pq, codes, pq.decode(codes)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_vq_linear(compare, rng, layer, n):
    """Decoding writes and reads 64 MB; the weights themselves are read in 64 MB."""
    pq, codes, weights = layer
    x = rng.standard_normal((n, D), np.float32)
    decoded = np.empty_like(weights)
    expected = x @ weights.T
    compare(
        lambda: pv.quantize.vq_linear(x, codes, pq.codebooks),
        {
            "decode, multiply": lambda: x @ pq.decode(codes, out=decoded).T,
            "not compressed": lambda: x @ weights.T,
        },
        check=lambda y: np.testing.assert_allclose(y, expected, rtol=0, atol=2e-2),
        bytes=codes.nbytes,
    )
