"""What learned quantisation is made of, on a GPU. Without one, with --device cuda-on-host."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction, on_host
from polyvec._soft_assign import soft_assign, soft_assign_gradient
from reference import quantize as ref

LAYERS = [  # inputs, outputs, m, dsub
    (1, 1, 1, 1), (0, 5, 2, 3), (3, 0, 2, 3), (2, 7, 3, 4), (17, 300, 5, 8), (4, 257, 33, 2), (1, 600, 70, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(request):
    if request.config.getoption("device") == "cpu":
        pytest.skip("needs --device cuda or --device cuda-on-host")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n", "m", "k", "dsub"), [(0, 2, 3, 4), (1, 1, 1, 1), (5, 3, 40, 2), (70, 2, 33, 7), (3, 2, 5, 0)]
)
def test_soft_assign_equals_that_of_the_cpu(rng, on_device, n, m, k, dsub, dtype, hard):
    x, codebooks, grad = (rng.standard_normal(s).astype(dtype) for s in ((n, m * dsub), (m, k, dsub), (n, m * dsub)))
    options = {"temperature": 0.7, "hard": hard}
    there = [on_device(a) for a in (x, codebooks, grad)]
    out, ids = soft_assign(*there[:2], **options)
    expected, nearest = soft_assign(x, codebooks, **options)
    assert_exact(ids, nearest)
    size = np.abs(codebooks).max(initial=1)
    assert_reduction(out, expected, size + np.zeros_like(x), length=k + dsub)
    of = {"of_x": True, "of_codebooks": True}
    ours, theirs = (
        soft_assign_gradient(*there, **options, **of),
        soft_assign_gradient(x, codebooks, grad, **options, **of),
    )
    size = 8 * np.abs(grad).sum(initial=1) * (size + np.abs(x).max(initial=1)) ** 2
    for actual, wanted in zip(ours, theirs, strict=True):
        assert_reduction(actual, wanted, size + np.zeros_like(wanted), length=k + dsub + n)
    assert soft_assign_gradient(*there, **options, of_x=False, of_codebooks=True)[0] is None
    only = soft_assign_gradient(*there, **options, of_x=True, of_codebooks=False)
    assert only[1] is None
    assert_exact(only[0], on_host(ours[0]))


def test_the_nearest_codeword_takes_all_at_low_temperatures(rng, on_device):
    x, codebooks = rng.standard_normal((9, 6)).astype(np.float32), rng.standard_normal((2, 40, 3)).astype(np.float32)
    codebooks[:, 20:] = codebooks[:, :20]  # of equal ones the first
    for temperature in (1e-6, 1e-42):
        out, ids = soft_assign(on_device(x), on_device(codebooks[:, :20]), temperature=temperature, hard=False)
        assert_exact(ids, soft_assign(x, codebooks, temperature=1.0, hard=True)[1])
        expected = np.stack([codebooks[s, on_host(ids)[:, s]] for s in range(2)], 1).reshape(9, 6)
        assert_reduction(out, expected, np.abs(expected) + 1, length=4)
    assert_exact(soft_assign(on_device(x), on_device(codebooks), temperature=1.0, hard=True)[1], on_host(ids))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_products_with_compressed_weights(rng, on_device, shape, bits):
    n, outputs, m, dsub = shape
    labels = rng.integers(0, 1 << bits, (outputs, m))
    x, codebooks = (rng.standard_normal(s, np.float32) for s in ((n, m * dsub), (m, 1 << bits, dsub)))
    bias, grad = (rng.standard_normal(s, np.float32) for s in (outputs, (n, outputs)))
    codes = ref.pack(labels, bits)
    there = [on_device(a) for a in (x, codes, codebooks)]
    expected, size = ref.vq_linear(x, labels, codebooks)
    assert_reduction(pv.quantize.vq_linear(*there), expected, size, length=m * dsub)
    y = pv.quantize.vq_linear(*there, bias=on_device(bias))
    assert_reduction(y, expected + bias, size + np.abs(bias), length=m * dsub)
    of = {"of_x": True, "of_codebooks": True}
    ours = pv.quantize.vq_linear_gradient(*there, on_device(grad), **of)
    theirs, sizes = (
        pv.quantize.vq_linear_gradient(change(x), codes, change(codebooks), change(grad), **of)
        for change in (lambda a: a, np.abs)
    )
    for actual, wanted, scale in zip(ours, theirs, sizes, strict=True):
        assert_reduction(actual, wanted, scale, length=2 * (n + outputs))


def test_a_quantizer_multiplies_on_a_cpu(rng, on_device):
    weights = rng.standard_normal((300, 8), np.float32)
    quantizer = pv.quantize.ProductQuantizer(8, 2, bits=4).fit(weights)
    codes = quantizer.encode(weights)
    with pytest.raises(TypeError, match=r"^quantize\.vq_linear: codebooks must be an array for x on a GPU, got Pro"):
        pv.quantize.vq_linear(on_device(weights), on_device(codes), quantizer)


@pytest.mark.parametrize("op", ["soft_assign", "vq_assign", "vq_linear", "score_pairs", "logsumexp"])
def test_gradients_there_are_those_of_the_cpu(rng, gpu, op):
    import polyvec.torch as pvt

    x, codebooks = (gpu.from_numpy(rng.standard_normal(s, np.float32)) for s in ((20, 12), (3, 16, 4)))
    codes, ids = gpu.randint(256, (7, 2), dtype=gpu.uint8), gpu.randint(48, (20, 5))
    calls = {
        "soft_assign": lambda x, c: pvt.soft_assign(x, c).quantized,
        "vq_assign": lambda x, c: pvt.vq_assign(x, c.reshape(16, 12)).quantized,
        "vq_linear": lambda x, c: pvt.vq_linear(x, codes.to(x.device), c),
        "score_pairs": lambda x, c: pvt.score_pairs(x, c.reshape(-1, 12).repeat(3, 1), ids.to(x.device)),
        "logsumexp": lambda x, c: pvt.logsumexp(x, c.reshape(16, 12), metric="l2", bias=c.sum((0, 2))),
    }
    results = []
    for device in ("cpu", "cuda"):
        inputs = [a.to(device).requires_grad_() for a in (x.clone(), codebooks.clone())]
        y = calls[op](*inputs)
        results.append([t.cpu() for t in (y.detach(), *gpu.autograd.grad((y * y).sum(), inputs))])
        compiled = gpu.compile(calls[op], fullgraph=True)
        gpu.testing.assert_close(compiled(*inputs), y)
    for actual, expected in zip(*results, strict=True):
        gpu.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_quantizers_train_there(rng, gpu):
    import polyvec.torch as pvt

    x = gpu.from_numpy(rng.standard_normal((400, 8), np.float32)).cuda()
    for options in ({}, {"update": "simvq"}, {"update": "gradient", "rank": 4}):
        quantizer = pvt.ResidualVectorQuantizer(8, 32, 2, **options).cuda()
        quantized, ids, losses = quantizer(x)
        losses.sum().backward()
        assert (quantized.device, ids.device, losses.device) == (x.device,) * 3
