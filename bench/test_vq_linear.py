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


@pytest.mark.parametrize("n", [16, 256, 2048])
def test_vq_linear_and_gradients(compare, threads, n):
    """A step of fine-tuning 512 x 512 weights of 64 x 8 bits, beside torch's decompress and multiply.

    The three products of an ordinary layer (403 MFLOP at 256 rows), a decode for two of them, and a sum by codeword
    of the gradients of the weights. Sums of tables, as few rows take them, are 10 times as long at 256 rows.
    """
    torch = pytest.importorskip("torch")
    pvt = pytest.importorskip("polyvec.torch")
    torch.set_num_threads(threads)
    d, outputs, m, k = 512, 512, 64, 256
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(k, (outputs, m), generator=generator, dtype=torch.uint8)
    codebooks = torch.randn(m, k, d // m, generator=generator).requires_grad_()
    x, grad = (torch.randn(n, width, generator=generator) for width in (d, outputs))
    x.requires_grad_()
    labels = codes.long() + k * torch.arange(m)

    def in_torch():
        weights = torch.nn.functional.embedding(labels, codebooks.flatten(0, 1)).flatten(1)
        return torch.autograd.grad(x @ weights.T, (x, codebooks), grad)

    expected = in_torch()

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-3)

    compare(
        lambda: torch.autograd.grad(pvt.vq_linear(x, codes, codebooks), (x, codebooks), grad),
        {"decode, multiply in torch": in_torch},
        check=check,
        flops=6 * n * d * outputs,
    )
