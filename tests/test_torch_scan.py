"""Differentiable pair scores: the plain scores, gradients of both orders, the same bits for any number of threads."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction

torch = pytest.importorskip("torch")
pvt = pytest.importorskip("polyvec.torch")

METRICS = ["ip", "l2", "cosine"]


def sample(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).requires_grad_()


def arguments(rng, nq, n, d, m):
    ids = torch.from_numpy(rng.integers(0, n, (nq, m)))
    return sample(rng, nq, d), sample(rng, n, d), ids, sample(rng, n)


def definition(queries, items, ids, bias, metric):
    """The scores in float64, by torch's own ops."""
    queries, x, bias = queries.double(), items.double()[ids], bias.double()[ids]
    if metric == "l2":
        return (queries[:, None] - x).square().sum(2) - bias
    if metric == "cosine":
        queries, x = (torch.nn.functional.normalize(y, dim=-1) for y in (queries, x))
    return (queries[:, None] * x).sum(2) + bias


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [0, 1, 40])
@pytest.mark.parametrize("d", [1, 17])
def test_scores_and_derivatives_equal_the_definition(rng, isa, d, m, metric):
    queries, items, ids, bias = arguments(rng, 5, 30, d, m)
    weights = torch.from_numpy(rng.standard_normal((5, m), np.float32))
    inputs = queries, items, bias
    scores = pvt.score_pairs(queries, items, ids, metric=metric, bias=bias)
    if metric != "cosine":
        plain = pv.scan.score_pairs(queries.detach(), items.detach(), ids, metric=metric)
        plain = plain - bias.detach()[ids] if metric == "l2" else plain + bias.detach()[ids]
        assert_exact(scores.detach(), plain)
    expected = definition(queries, items, ids, bias, metric)
    size = 4 * (queries.detach().norm() + items.detach().norm()) ** 2 + 1
    assert_reduction(scores.detach(), expected.detach(), size, length=d)

    def derivatives(scores):
        first = torch.autograd.grad((scores * weights).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs[:2])
        return [x.detach() for x in (*first, *second)]

    norms = torch.cat([queries.detach(), items.detach()]).norm(dim=1)
    least = min(1, float(norms.min())) if metric == "cosine" else 1  # what derivatives of a cosine divide by
    for actual, wanted in zip(derivatives(scores), derivatives(expected), strict=True):
        size = 16 * (float(wanted.abs().max()) + float(weights.abs().sum()) / least**3)
        assert_reduction(actual, wanted, size, length=d + m)


@pytest.mark.parametrize("n", [50, 20_000])
def test_bits_do_not_depend_on_the_number_of_threads(rng, n):
    queries, items, ids, _ = arguments(rng, 200, n, 33, 60)

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with pv.num_threads(threads):
                scores = pvt.score_pairs(queries, items, ids, metric="l2")
                return scores.detach(), *torch.autograd.grad(scores.sin().sum(), (queries, items))
        finally:
            torch.set_num_threads(before)

    one = results(1)
    for threads in (2, 7):
        for a, b in zip(one, results(threads), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("n", [6, 60])
def test_torch_accepts_the_registration(rng, n):
    queries, items, ids, _ = arguments(rng, 4, n, 5, 3)
    weights, own = sample(rng, 4, 3), sample(rng, 4, 3)
    for metric in METRICS:
        torch.library.opcheck(torch.ops.polyvec.scan_score_pairs, (queries, items, ids, metric))
    torch.library.opcheck(torch.ops.polyvec.scan_weighted_sums, (weights, ids, items))
    for x in (None, own):
        torch.library.opcheck(torch.ops.polyvec.scan_scattered_sums, (weights, x, ids, queries, items))


@pytest.mark.parametrize("metric", METRICS)
def test_items_without_a_pair_have_gradient_zero(rng, metric):
    queries, items, _, _ = arguments(rng, 2, 9, 4, 1)
    ids = torch.tensor([[7, 2, 7], [2, 2, 0]])
    (grad,) = torch.autograd.grad(pvt.score_pairs(queries, items, ids, metric=metric).sum(), items)
    assert grad.any(1).nonzero()[:, 0].tolist() == [0, 2, 7]
    with torch.no_grad():
        items[7] = 0
        queries[1] = 0
    scores = pvt.score_pairs(queries, items, ids, metric="cosine")
    assert scores[0, ::2].eq(0).all()
    assert scores[1].eq(0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(scores.sum(), (queries, items)))


def test_gradcheck(rng):
    """In float32 steps: both scores are of degree 2, so that wide differences are exact."""
    queries, items, ids, _ = arguments(rng, 3, 5, 4, 6)
    for metric in METRICS[:2]:
        assert torch.autograd.gradcheck(
            lambda q, x, metric=metric: pvt.score_pairs(q.float(), x.float(), ids, metric=metric).double(),
            (queries.detach().double().requires_grad_(), items.detach().double().requires_grad_()),
            eps=1e-2,
            atol=1e-2,
            rtol=1e-2,
        )


def test_compile_keeps_the_op_in_one_graph(rng):
    queries, items, ids, bias = arguments(rng, 7, 9, 8, 5)

    def loss(queries, items, bias):
        return pvt.score_pairs(queries, items, ids, metric="cosine", bias=bias).logsumexp(1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = queries, items, bias
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x, ids: pvt.score_pairs(x.detach().numpy(), x, ids), TypeError,
         "torch.score_pairs: queries must be a torch tensor, got ndarray"),
        (lambda x, ids: pvt.score_pairs(x, x, ids, metric="dot"), ValueError,
         "torch.score_pairs: metric must be one of 'ip', 'l2', 'cosine', got 'dot'"),
        (lambda x, ids: pvt.score_pairs(x, x[:, 1:], ids), ValueError,
         "scan.score_pairs: items must have the same d as queries (4), got 3"),
        (lambda x, ids: pvt.score_pairs(x, x, ids, bias=x.sum(1).double()), TypeError,
         "torch.score_pairs: bias must be float32, got float64; cast it with .to(torch.float32)"),
        (lambda x, ids: pvt.score_pairs(x, x, ids, bias=x[:, :1]), ValueError,
         "torch.score_pairs: bias must have 1 axis, got shape (3, 1)"),
        (lambda x, ids: pvt.score_pairs(x, x, ids, bias=torch.ones(4)), ValueError,
         "torch.score_pairs: bias must have one entry an item (3), got 4"),
        (lambda x, ids: pvt.score_pairs(x, x, ids + 3), IndexError,
         "scan.score_pairs: ids must be in [0, 3), got 3 at position 0"),
    ],
)  # fmt: skip
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(sample(rng, 3, 4), torch.tensor([[0], [1], [2]]))
    assert str(caught.value) == text
