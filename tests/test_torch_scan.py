"""Differentiable pair scores and log-sum-exp: the plain results, their derivatives, and the same bits for any number of
threads.
"""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from polyvec.torch import _scan
from reference import scan as ref

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


def assert_gradients(actual, inputs, grad, scale, metric):
    """Each within the error of its sums, and of probabilities whose scores are sums, too."""
    queries, items, bias = (x.detach().numpy() for x in inputs)
    expected = ref.logsumexp_gradients(queries, items, grad, scale, metric, bias)
    least = min(np.linalg.norm(x, axis=1).min(initial=1) for x in (queries, items)) if metric == "cosine" else 1
    largest = max(np.abs(x).max(initial=1) for x in (queries, items)) / least
    length = max(queries.shape[1], *(len(x) for x in (queries, items)))
    score = scale * max(np.linalg.norm(x, axis=1).max(initial=1) for x in (queries, items)) ** 2 + 1
    for x, wanted in zip(actual, expected, strict=True):
        size = 4 * scale * np.abs(grad.numpy()).sum() * largest * score
        assert_reduction(x.detach(), wanted, size, length=length)


SIZES = [(0, 9, 3), (5, 0, 3), (1, 1, 1), (3, 40, 0), (33, 65, 17), (5, 1300, 8), (600, 530, 33)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("nq", "n", "d"), SIZES)
def test_logsumexp_and_its_gradients_equal_the_definition(rng, isa, nq, n, d, metric):
    if d == 0 and metric == "cosine":
        pytest.skip("the cosine of nothing")
    inputs = sample(rng, nq, d), sample(rng, n, d), sample(rng, n)
    grad = torch.from_numpy(rng.standard_normal(nq, np.float32))
    for scale in (1.0, 0.07):
        result = pvt.logsumexp(*inputs[:2], scale=scale, metric=metric, bias=inputs[2])
        plain = [x.detach().numpy() for x in inputs]
        assert_exact(pvt.logsumexp(*inputs[:2], scale=scale).detach(), pv.scan.logsumexp(*plain[:2], scale=scale))
        expected = ref.logsumexp(*plain[:2], scale, metric, plain[2])
        size = scale * sum(np.linalg.norm(x, axis=1).max(initial=1) for x in plain[:2]) ** 2 + scale * 4 + 1
        assert_reduction(result.detach(), expected, size, length=d + 16)
        assert_gradients(torch.autograd.grad(result, inputs, grad), inputs, grad, scale, metric)


def test_gradients_of_logsumexp_of_more_queries_than_are_packed_at_a_time(rng, isa):
    nq, n, d = 1100, 60, 8200
    inputs = [x.detach().requires_grad_() for x in (sample(rng, nq, d) / 90, sample(rng, n, d), sample(rng, n))]
    grad = torch.from_numpy(rng.standard_normal(nq, np.float32))
    result = pvt.logsumexp(*inputs[:2], bias=inputs[2])
    d_queries, d_items, d_bias = torch.autograd.grad(result, inputs, grad)
    rows = slice(500, 530)  # of the first batch, and of the second
    some = pvt.logsumexp(inputs[0][rows], inputs[1], bias=inputs[2])
    torch.testing.assert_close(torch.autograd.grad(some, inputs[0], grad[rows])[0][rows], d_queries[rows])
    halves = [
        torch.autograd.grad(pvt.logsumexp(inputs[0][part], inputs[1], bias=inputs[2]), inputs[1:], grad[part])
        for part in (slice(0, 512), slice(512, 1024), slice(1024, None))
    ]
    for whole, *parts in zip((d_items, d_bias), *halves, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-4)


def test_gradients_of_logsumexp_by_matmul(rng):
    """What a GPU does, in blocks that do not fit."""
    inputs = sample(rng, 33, 7), sample(rng, 65, 7), sample(rng, 65)
    plain = [x.detach() for x in inputs]
    result = pvt.logsumexp(*plain[:2], scale=0.5, bias=plain[2])
    grad = torch.from_numpy(rng.standard_normal(33, np.float32))
    every = {"of_queries": True, "of_items": True, "of_bias": True}
    gradients = _scan._gradient_by_matmul(*plain, result, grad, scale=0.5, step=16, **every)
    assert_gradients(gradients, inputs, grad, 0.5, "ip")
    none = dict.fromkeys(every, False)
    assert _scan._gradient_by_matmul(*plain, result, grad, scale=0.5, step=16, **none) == (None, None, None)


def test_logsumexp_differentiates_what_requires_grad(rng):
    inputs = sample(rng, 40, 9), sample(rng, 70, 9), sample(rng, 70)
    every = torch.autograd.grad(pvt.logsumexp(*inputs[:2], bias=inputs[2]).sum(), inputs)
    for i, gradient in enumerate(every):
        some = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        assert_exact(torch.autograd.grad(pvt.logsumexp(*some[:2], bias=some[2]).sum(), some[i])[0], gradient)
    assert_exact(torch.autograd.grad(pvt.logsumexp(inputs[0].t().contiguous().t(), inputs[1], bias=inputs[2]).sum(),
                                     inputs[0])[0], every[0])  # fmt: skip


def test_a_score_of_infinity_has_probability_zero(rng):
    queries, items = sample(rng, 40, 3), sample(rng, 50, 3)
    bias = torch.zeros(50)
    bias[[3, 49]] = -np.inf
    kept = bias == 0
    gradients = torch.autograd.grad(pvt.logsumexp(queries, items, bias=bias).sum(), (queries, items))
    assert not gradients[1][~kept].any()
    expected = torch.autograd.grad(pvt.logsumexp(queries, items[kept]).sum(), (queries, items))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_logsumexp_has_first_derivatives_only(rng):
    queries, items = sample(rng, 3, 4), sample(rng, 5, 4)
    (first,) = torch.autograd.grad(pvt.logsumexp(queries, items).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match=r"scan_logsumexp_gradient.* no autograd formula was registered"):
        first.sum().backward()


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


def test_bits_of_logsumexp_do_not_depend_on_the_number_of_threads(rng):
    inputs = sample(rng, 700, 33), sample(rng, 1500, 33), sample(rng, 1500)

    def results(threads):
        with pv.num_threads(threads):
            result = pvt.logsumexp(*inputs[:2], bias=inputs[2])
            return result.detach(), *torch.autograd.grad(result.sum(), inputs)

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
    for bias in (None, sample(rng, n)):
        torch.library.opcheck(torch.ops.polyvec.scan_logsumexp, (queries, items, bias, 0.5))
        plain = [None if x is None else x.detach() for x in (queries, items, bias)]
        for of in ((True, True, bias is not None), (False, True, False), (True, False, False)):
            inputs = *plain, torch.ones(4), torch.ones(4), 0.5, *of
            torch.library.opcheck(torch.ops.polyvec.scan_logsumexp_gradient, inputs)


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


def test_gradcheck_of_logsumexp(rng):
    """Of float32: steps that are wide, and errors of their third derivative."""
    inputs = tuple(0.3 * sample(rng, *shape).detach().double() for shape in ((3, 4), (5, 4), (5,)))
    for metric in METRICS:
        assert torch.autograd.gradcheck(
            lambda q, x, b, metric=metric: pvt.logsumexp(
                q.float(), x.float(), scale=0.5, metric=metric, bias=b.float()
            ).double(),
            tuple(x.requires_grad_() for x in inputs),
            eps=1e-2,
            atol=1e-2,
            rtol=1e-2,
        )


def test_compile_keeps_the_op_in_one_graph(rng):
    queries, items, ids, bias = arguments(rng, 7, 9, 8, 5)

    def loss(queries, items, bias):
        scores = pvt.score_pairs(queries, items, ids, metric="cosine", bias=bias)
        return scores.logsumexp(1).sum() + pvt.logsumexp(queries, items, metric="l2", bias=bias).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = queries, items, bias
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def gradient_of_logsumexp(queries, items, grad):
    of = {"of_queries": True, "of_items": True, "of_bias": False}
    return pv.scan.logsumexp_gradient(queries, items, None, torch.ones(3), grad, scale=1.0, **of)


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
        (lambda x, ids: pvt.logsumexp(x, x.detach().numpy()), TypeError,
         "torch.logsumexp: items must be a torch tensor, got ndarray"),
        (lambda x, ids: pvt.logsumexp(x, x, metric="dot"), ValueError,
         "torch.logsumexp: metric must be one of 'ip', 'l2', 'cosine', got 'dot'"),
        (lambda x, ids: pvt.logsumexp(x, x[0], metric="l2"), ValueError,
         "torch.logsumexp: items must have 2 axes, got shape (4,)"),
        (lambda x, ids: pvt.logsumexp(x, x[:, 1:]), ValueError,
         "scan.logsumexp: items must have the same d as queries (4), got 3"),
        (lambda x, ids: pvt.logsumexp(x, x, scale=0.0), ValueError,
         "scan.logsumexp: scale must be a positive finite number, got 0"),
        (lambda x, ids: pvt.logsumexp(x, x, scale=x.sum()), TypeError,
         "torch.logsumexp: scale must not require grad, got a tensor that does; "
         "with metric='ip' multiply the queries by it"),
        (lambda x, ids: pvt.logsumexp(x.double(), x.double()), TypeError,
         "scan.logsumexp: queries must be float32, got float64; cast it with .to(torch.float32)"),
        (lambda x, ids: gradient_of_logsumexp(x.detach(), x.detach(), torch.ones(2)), ValueError,
         "scan.logsumexp_gradient: grad must have one entry a query (3), got 2"),
        (lambda x, ids: gradient_of_logsumexp(x.detach(), x.detach().half(), torch.ones(3)), TypeError,
         "scan.logsumexp_gradient: items must be float32, got float16"),
        (lambda x, ids: pvt.logsumexp(x, x, bias=torch.ones(4)), ValueError,
         "torch.logsumexp: bias must have one entry an item (3), got 4"),
    ],
)  # fmt: skip
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(sample(rng, 3, 4), torch.tensor([[0], [1], [2]]))
    assert str(caught.value) == text
