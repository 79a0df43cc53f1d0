"""Learned quantisation: the nearest codewords, and gradients against those of torch's own expressions."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from reference import scan as ref
from reference.soft_assign import soft_assign

torch = pytest.importorskip("torch")
functional = torch.nn.functional
pvt = pytest.importorskip("polyvec.torch")


@pytest.fixture
def tensor(rng):
    """Makes a float32 tensor of a shape that requires grad."""
    return lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).requires_grad_()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("shape", [(5,), (40, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_vq_assign_is_the_nearest_codeword(tensor, isa, shape, metric):
    x, codebook = tensor(*shape), tensor(300, 5)
    quantized, ids = pvt.vq_assign(x, codebook, metric=metric)
    assert ids.shape == shape[:-1]
    assert ids.dtype == torch.int64
    expected, _ = ref.nearest(x.detach().reshape(-1, 5).numpy(), codebook.detach().numpy(), metric)
    assert ids.flatten().tolist() == expected.tolist()
    assert torch.equal(quantized, codebook[ids])


def test_gradients_of_vq_assign_pass_straight_through_and_gather_in_the_codebook(tensor):
    x, codebook, weights = tensor(40, 5), tensor(7, 5), tensor(40, 5).detach()
    quantized, ids = pvt.vq_assign(x, codebook)
    dx, dc = torch.autograd.grad((quantized * weights).sum(), (x, codebook))
    assert torch.equal(dx, weights)
    torch.testing.assert_close(dc, torch.zeros(7, 5).index_add(0, ids, weights))
    (only,) = torch.autograd.grad(pvt.vq_assign(x, codebook.detach()).quantized.sum(), x)
    assert torch.equal(only, torch.ones(40, 5))


def test_a_reparameterised_codebook_learns_through_its_factors(tensor):
    """SimVQ's codebook is C W^T; its gradient for W is that of the product."""
    x, basis, w = tensor(40, 5).detach(), tensor(7, 5).detach(), tensor(5, 5)
    quantized, ids = pvt.vq_assign(x, basis @ w.T)
    (dw,) = torch.autograd.grad((quantized - x).square().sum(), w)
    (expected,) = torch.autograd.grad((basis[ids] @ w.T - x).square().sum(), w)
    torch.testing.assert_close(dw, expected)


SHAPES = [(1, 1, 1, 1), (5, 3, 16, 4), (7, 2, 33, 3), (70, 4, 256, 12), (0, 2, 16, 4), (3, 1, 5, 130), (1100, 1, 17, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("n", "m", "k", "dsub"), SHAPES)
def test_soft_assign_equals_the_definition(rng, isa, n, m, k, dsub, hard, dtype):
    temperature = dsub / 2
    x, grad = (torch.from_numpy(rng.standard_normal((n, m * dsub))).to(dtype) for _ in range(2))
    codebooks = torch.from_numpy(rng.standard_normal((m, k, dsub))).to(dtype)
    inputs = x.requires_grad_(), codebooks.requires_grad_()
    quantized, ids = pvt.soft_assign(*inputs, temperature=temperature, hard=hard)
    dx, dcodebooks = torch.autograd.grad(quantized, inputs, grad)
    g = grad.double().numpy().reshape(n, m, dsub)
    arrays = [a.detach().double().numpy() for a in inputs]
    expected, nearest, expected_dx, expected_dcodebooks = soft_assign(*arrays, temperature, hard, g)
    assert_exact(ids, nearest)
    # A probability is off by the rounding of its logit; everything is a sum of products with probabilities.
    size = np.abs(arrays[0]).max(initial=1) + np.abs(arrays[1]).max()
    logit = 1 + dsub * size**2 / temperature
    most = np.abs(g).max(initial=1)
    assert_reduction(quantized.detach(), expected.reshape(x.shape), size * logit, length=dsub)
    assert_reduction(dx, expected_dx.reshape(x.shape), dsub * most * size**2 / temperature * logit, length=k)
    scale = n / min(k, 4) * dsub * most * size**2 / temperature * logit + most
    assert_reduction(dcodebooks, expected_dcodebooks, scale, length=n)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_gradcheck_of_soft_assign(rng, temperature):
    x, codebooks = (torch.from_numpy(rng.standard_normal(s)).requires_grad_() for s in [(2, 3, 8), (4, 5, 2)])
    assert torch.autograd.gradcheck(
        lambda x, c: pvt.soft_assign(x, c, temperature=temperature, hard=False).quantized, (x, codebooks)
    )


def test_hard_and_soft_agree_at_a_low_temperature(tensor):
    x, codebooks = tensor(2, 9, 8), tensor(4, 5, 2)
    hard = pvt.soft_assign(x, codebooks)
    soft = pvt.soft_assign(x, codebooks, temperature=1e-6, hard=False)
    assert hard.ids.shape == (2, 9, 4)
    assert torch.equal(hard.ids, soft.ids)
    assert torch.equal(hard.quantized, torch.cat([codebooks[s][hard.ids[..., s]] for s in range(4)], -1))
    torch.testing.assert_close(hard.quantized, soft.quantized)


def test_of_equally_likely_codewords_the_first_is_chosen():
    assert pvt.soft_assign(torch.ones(1, 2), torch.ones(1, 40, 2)).ids.tolist() == [[0]]


def test_only_what_requires_grad_gets_a_gradient_of_soft_assign(tensor):
    x, codebooks = tensor(9, 8), tensor(4, 5, 2)
    both = torch.autograd.grad(pvt.soft_assign(x, codebooks).quantized.sum(), (x, codebooks))
    pvt.soft_assign(x, codebooks.detach()).quantized.sum().backward()
    assert_exact(x.grad, both[0])
    pvt.soft_assign(x.detach(), codebooks).quantized.sum().backward()
    assert_exact(codebooks.grad, both[1])
    saved = torch.ops.polyvec.soft_assign(x, codebooks, 1.0, True)[0].grad_fn.saved_tensors
    assert [a.shape for a in saved] == [x.shape, codebooks.shape]


@pytest.mark.parametrize("hard", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(tensor, hard):
    x, codebooks = tensor(3000, 6), tensor(2, 50, 3)

    def results(threads):
        with pv.num_threads(threads):
            quantized, ids = pvt.soft_assign(x, codebooks, hard=hard)
            return quantized.detach(), ids, *torch.autograd.grad(quantized.sin().sum(), (x, codebooks))

    one = results(1)
    for threads in (2, 7):
        for a, b in zip(one, results(threads), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize(
    ("ids", "utilization", "perplexity"),
    [
        ([[0, 1], [2, 3]], 1.0, 4.0),
        ([3, 3, 3], 0.25, 1.0),
        ([0, 0, 2, 2], 0.5, 2.0),
        ([], 0.0, 1.0),
        ([0, -1, 2, -1], 0.5, 2.0),
        ([-1, -1], 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_codebook_usage(ids, utilization, perplexity, dtype):
    usage = pvt.codebook_usage(torch.tensor(ids, dtype=dtype), 4)
    assert usage.utilization.item() == utilization
    assert usage.perplexity.item() == pytest.approx(perplexity)


def test_ids_outside_a_codebook_do_not_count_where_they_cannot_be_refused():
    ids = torch.tensor([0, 4, 2, -1, 0, -7, 2])
    usage = torch.compile(pvt.codebook_usage, fullgraph=True, backend="aot_eager")(ids, 4)
    assert usage == pvt.codebook_usage(torch.tensor([0, 0, 2, 2]), 4)


def test_torch_accepts_the_registration(tensor):
    for metric in ("l2", "ip", "cosine"):
        torch.library.opcheck(torch.ops.polyvec.nearest, (tensor(9, 5).detach(), tensor(4, 5).detach(), metric))
    x, codebooks, grad = tensor(9, 6), tensor(3, 5, 2), tensor(9, 6)
    for hard in (False, True):
        torch.library.opcheck(torch.ops.polyvec.soft_assign, (x, codebooks, 0.5, hard))
        for of in ((True, True), (False, True), (True, False)):
            fixed = x.detach(), codebooks.detach(), grad.detach()
            torch.library.opcheck(torch.ops.polyvec.soft_assign_gradient, (*fixed, 0.5, hard, *of))


@pytest.fixture
def compressed(rng):
    """A layer of 21 outputs: codes of 8 bits and codebooks that require grad."""
    codebooks = torch.from_numpy(rng.standard_normal((3, 256, 4)).astype(np.float32)).requires_grad_()
    return torch.from_numpy(rng.integers(0, 256, (21, 3)).astype(np.uint8)), codebooks


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_vq_linear_and_gradients_are_those_of_decoded_weights(tensor, compressed, shape):
    codes, codebooks = compressed
    x, bias, weights = tensor(*shape), tensor(21), tensor(*shape[:-1], 21).detach()

    def decoded(x, codebooks, bias):
        rows = torch.cat([codebooks[s][codes[:, s].long()] for s in range(3)], 1)
        return functional.linear(x, rows, bias)

    inputs = x, codebooks, bias
    y = pvt.vq_linear(x, codes, codebooks, bias=bias)
    torch.testing.assert_close(y, decoded(*inputs), rtol=1e-4, atol=1e-4)
    ours, expected = (torch.autograd.grad((z * weights).sum(), inputs) for z in (y, decoded(*inputs)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    (only,) = torch.autograd.grad((pvt.vq_linear(x, codes, codebooks.detach()) * weights).sum(), x)
    assert torch.equal(only, ours[0])
    (only,) = torch.autograd.grad((pvt.vq_linear(x.detach(), codes, codebooks) * weights).sum(), codebooks)
    assert torch.equal(only, ours[1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("n", "outputs", "m", "dsub"), [(64, 1, 1, 1), (65, 300, 35, 3), (100, 2100, 512, 2), (70, 0, 3, 2)]
)
def test_vq_linear_of_many_rows_decodes_weights(rng, n, outputs, m, dsub, bits):
    """As the sums of tables that few rows take, over several blocks of weights."""
    d = m * dsub
    x, codebooks = rng.standard_normal((n, d), np.float32), rng.standard_normal((m, 1 << bits, dsub), np.float32)
    codes = rng.integers(0, 256, (outputs, m if bits == 8 else (m + 1) // 2)).astype(np.uint8)
    grad = rng.standard_normal((n, outputs), np.float32)
    inputs = [torch.from_numpy(a).requires_grad_() for a in (x, codebooks)]
    y = pvt.vq_linear(inputs[0], torch.from_numpy(codes), inputs[1])
    assert_reduction(y.detach(), pv.quantize.vq_linear(x, codes, codebooks), 16.0 * d**0.5, length=d)
    ours = torch.autograd.grad(y, inputs, torch.from_numpy(grad))
    expected = pv.quantize.vq_linear_gradient(x, codes, codebooks, grad, of_x=True, of_codebooks=True)
    for actual, wanted, length in zip(ours, expected, (outputs, n * outputs), strict=True):
        assert_reduction(actual, wanted, 16.0 * length**0.5, length=length)
    (only,) = torch.autograd.grad(
        pvt.vq_linear(inputs[0].detach(), torch.from_numpy(codes), inputs[1]).sum(), inputs[1]
    )
    assert only.shape == codebooks.shape


def test_gradients_of_codewords_do_not_depend_on_the_number_of_threads(rng):
    grad, codes = rng.standard_normal((3000, 120), np.float32), rng.integers(0, 256, (3000, 40)).astype(np.uint8)
    results = []
    for threads in (1, 2, 7):
        results.append(np.ones((40, 256, 3), np.float32))
        pv.quantize.add_decode_gradient(grad, codes, results[-1], num_threads=threads)
        assert_exact(results[-1], results[0])


def test_vq_linear_is_a_proper_op_and_compiles(tensor, compressed):
    codes, codebooks = compressed
    x, grad = tensor(5, 12), tensor(5, 21).detach()
    torch.library.opcheck(torch.ops.polyvec.vq_linear, (x, codes, codebooks))
    for of in ((True, True), (False, True), (True, False)):
        fixed = x.detach(), codes, codebooks.detach(), grad
        torch.library.opcheck(torch.ops.polyvec.vq_linear_gradient, (*fixed, *of))

    def loss(x, codebooks):
        return pvt.vq_linear(x, codes, codebooks).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, codebooks), (x, codebooks))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, codebooks), (x, codebooks)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert pvt.vq_linear(x.bfloat16(), codes, codebooks).dtype == torch.float32


def test_compile_keeps_the_ops_in_one_graph(tensor):
    inputs = tensor(2, 9, 5), tensor(4, 5)

    def loss(x, codebook):
        quantized, ids = pvt.vq_assign(x, codebook)
        soft = pvt.soft_assign(x, codebook[None], hard=False).quantized
        return (quantized - x.detach()).square().sum() + soft.sin().sum() + pvt.codebook_usage(ids, 4).perplexity

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: pvt.vq_assign(x.detach().numpy(), x), TypeError,
         "torch.vq_assign: x must be a torch tensor, got ndarray"),
        (lambda x: pv.scan.nearest(x, x), TypeError,
         "scan.nearest: x must not require grad, got a tensor that does; use polyvec.torch.vq_assign or .detach()"),
        (lambda x: pvt.vq_assign(x, x[:, 1:]), ValueError,
         "torch.vq_assign: x must have shape (..., d) and codebook (K, d), got (3, 4) and (3, 3)"),
        (lambda x: pvt.vq_assign(x, x, metric="max"), ValueError,
         "scan.nearest: metric must be one of 'ip', 'l2', 'cosine', got 'max'"),
        (lambda x: pvt.vq_assign(x.bfloat16(), x), TypeError,
         "scan.nearest: x must be float32, got bfloat16; cast it with .to(torch.float32)"),
        (lambda x: pvt.vq_assign(x, x[:0]), ValueError,
         "scan.nearest: centroids must have at least 1 row, got 0"),
        (lambda x: pvt.vq_assign(x / 0, x), ValueError,
         "scan.nearest: x must be finite, got NaN or Inf in row 0"),
        (lambda x: pvt.codebook_usage(torch.tensor([0, -1, 4]), 4), IndexError,
         "torch.codebook_usage: ids must be in [-1, 4), got 4"),
        (lambda x: pvt.codebook_usage(torch.tensor([0, -2]), 4), IndexError,
         "torch.codebook_usage: ids must be in [-1, 4), got -2"),
        (lambda x: pvt.vq_linear(torch.ones(99, 5), x.byte(), torch.ones(4, 256, 1)), ValueError,
         "quantize.vq_linear: x must have the dim of the codebooks (4), got 5"),
        (lambda x: pvt.soft_assign(x, [1.0]), TypeError,
         "torch.soft_assign: codebooks must be a torch tensor, got list"),
        (lambda x: pvt.soft_assign(x.sum(), x[None]), ValueError,
         "torch.soft_assign: x must have shape (..., m * dsub), got ()"),
        (lambda x: pvt.soft_assign(x, x), ValueError,
         "quantize.soft_assign: codebooks must have 3 axes, got shape (3, 4)"),
        (lambda x: pvt.soft_assign(x, x[None].double()), TypeError,
         "quantize.soft_assign: codebooks must be float32, got float64"),
        (lambda x: pvt.soft_assign(x, x[:, None]), ValueError,
         "quantize.soft_assign: x must have the width of the codebooks (12), got 4"),
        (lambda x: pvt.soft_assign(x, x[None, :0]), ValueError,
         "quantize.soft_assign: codebooks must have at least 1 codeword, got 0"),
        (lambda x: pvt.soft_assign(x, x[None], temperature=torch.nn.Parameter(torch.ones(()))), TypeError,
         "torch.soft_assign: temperature must not require grad, got a tensor that does; use .detach()"),
        (lambda x: pvt.soft_assign(x, x[None], temperature=0), ValueError,
         "quantize.soft_assign: temperature must be above 0, got 0"),
        (lambda x: pvt.soft_assign(x, x[None] / 0), ValueError,
         "quantize.soft_assign: codebooks must be finite, got NaN or Inf in row 0"),
    ],
)  # fmt: skip
def test_errors(tensor, call, error, text):
    with pytest.raises(error) as caught:
        call(tensor(3, 4))
    assert str(caught.value) == text
