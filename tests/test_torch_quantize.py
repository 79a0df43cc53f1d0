"""Learned quantisation: the nearest codewords, and gradients against those of torch's own expressions."""

import numpy as np
import pytest

from reference import scan as ref

torch = pytest.importorskip("torch")
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


@pytest.mark.parametrize(
    ("ids", "utilization", "perplexity"),
    [([[0, 1], [2, 3]], 1.0, 4.0), ([3, 3, 3], 0.25, 1.0), ([0, 0, 2, 2], 0.5, 2.0), ([], 0.0, 1.0)],
)
def test_codebook_usage(ids, utilization, perplexity):
    usage = pvt.codebook_usage(torch.tensor(ids, dtype=torch.int64), 4)
    assert usage.utilization.item() == utilization
    assert usage.perplexity.item() == pytest.approx(perplexity)


def test_torch_accepts_the_registration(tensor):
    for metric in ("l2", "ip", "cosine"):
        torch.library.opcheck(torch.ops.polyvec.nearest, (tensor(9, 5).detach(), tensor(4, 5).detach(), metric))


def test_compile_keeps_the_ops_in_one_graph(tensor):
    inputs = tensor(2, 9, 5), tensor(4, 5)

    def loss(x, codebook):
        quantized, ids = pvt.vq_assign(x, codebook)
        return (quantized - x.detach()).square().sum() + pvt.codebook_usage(ids, 4).perplexity

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
    ],
)  # fmt: skip
def test_errors(tensor, call, error, text):
    with pytest.raises(error) as caught:
        call(tensor(3, 4))
    assert str(caught.value) == text
