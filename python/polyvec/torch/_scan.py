"""Differentiable scores of given pairs, and the normaliser of a softmax over all items."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from polyvec import scan as _scan
from polyvec.torch._tensors import in_float32, one_of, require_tensors, widened


@custom_op(
    "polyvec::scan_score_pairs",
    mutates_args=(),
    schema="(Tensor queries, Tensor items, Tensor ids, str metric) -> (Tensor, Tensor)",
)
def _score_pairs(queries: Tensor, items: Tensor, ids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return the scores, for "cosine" inner products, and for "cosine" alone |items[ids]|^2, which it divides by."""
    queries, items = queries.detach(), items.detach()
    scores = _scan.score_pairs(queries, items, ids, metric="l2" if metric == "l2" else "ip")
    if metric != "cosine":
        return scores, queries.new_empty(0)
    return scores, _scan.score_pairs(torch.zeros_like(queries), items, ids, metric="l2")


@_score_pairs.register_fake
def _(queries: Tensor, items: Tensor, ids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return queries.new_empty(ids.shape), queries.new_empty(ids.shape if metric == "cosine" else 0)


@custom_op("polyvec::scan_weighted_sums", mutates_args=(), schema="(Tensor weights, Tensor ids, Tensor rows) -> Tensor")
def _weighted_sums(weights: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Return sum_j weights[i, j] * rows[ids[i, j]], in the order of j; the products are never stored."""
    begins = torch.arange(ids.shape[0], device=ids.device) * ids.shape[1]
    return _sums_of_bags(ids.reshape(-1), rows.detach(), begins, weights.detach().reshape(-1))


@_weighted_sums.register_fake
def _(weights: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(ids.shape[0], rows.shape[1])


@custom_op(
    "polyvec::scan_scattered_sums",
    mutates_args=(),
    schema="(Tensor weights, Tensor? own, Tensor ids, Tensor rows, Tensor items) -> Tensor",
)
def _scattered_sums(weights: Tensor, own: Tensor | None, ids: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Return for each item the sum of weights[i, j] * rows[i] + own[i, j] * item over its pairs, in their order."""
    of, order = ids.reshape(-1).sort(stable=True)
    if every := of.is_cuda or len(items) <= len(of):  # a bag an item: a GPU does not wait for how many are in use
        names: Tensor | slice = slice(None)
        begins = torch.searchsorted(of, torch.arange(items.shape[0], device=of.device))
    else:
        names, counts = of.unique_consecutive(return_counts=True)
        begins = counts.cumsum(0) - counts
    sums = _sums_of_bags(
        order // max(ids.shape[1], 1), rows.detach(), begins, weights.detach().reshape(-1).gather(0, order)
    )
    if own is not None:
        sums += _sums_of_bags(order, own.detach().reshape(-1, 1), begins) * items.detach()[names]
    if every:
        return sums
    out = items.new_zeros(items.shape)
    out[names] = sums
    return out


@_scattered_sums.register_fake
def _(weights: Tensor, own: Tensor | None, ids: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    return items.new_empty(items.shape)


def _sums_of_bags(ids: Tensor, rows: Tensor, begins: Tensor, weights: Tensor | None = None) -> Tensor:
    return functional.embedding_bag(ids, rows, begins, mode="sum", per_sample_weights=weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if not isinstance(x, str)))
    ctx.metric = inputs[-1]


def _backward(ctx: Any, grad: Tensor, d_squares: Tensor) -> tuple[Tensor | None, ...]:
    queries, items, ids = ctx.saved_tensors
    ids = ids.long()
    d_queries = d_items = None
    if ctx.needs_input_grad[0]:
        d_queries = _weighted_sums(grad, ids, items)
        if ctx.metric == "l2":
            d_queries = 2 * (grad.sum(1, keepdim=True) * queries - d_queries)
    if ctx.needs_input_grad[1]:
        own = {"ip": None, "l2": 2 * grad, "cosine": 2 * d_squares}[ctx.metric]
        d_items = _scattered_sums(-2 * grad if ctx.metric == "l2" else grad, own, ids, queries, items)
    return d_queries, d_items, None, None


# All three are derivatives of one sum, sum_ij weights[i, j] <rows[i], items[ids[i, j]]>, and so their own derivatives.


def _weighted_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, ids, rows = ctx.saved_tensors
    d_weights = d_rows = None
    if ctx.needs_input_grad[0]:
        d_weights = _score_pairs(grad, rows, ids, "ip")[0]
    if ctx.needs_input_grad[2]:
        d_rows = _scattered_sums(weights, None, ids, grad, rows)
    return d_weights, None, d_rows


def _scattered_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, own, ids, rows, items = ctx.saved_tensors
    d_weights = d_own = d_rows = d_items = None
    if ctx.needs_input_grad[0]:
        d_weights = _score_pairs(rows, grad, ids, "ip")[0]
    if ctx.needs_input_grad[1]:
        d_own = (items[ids] * grad[ids]).sum(-1)
    if ctx.needs_input_grad[3]:
        d_rows = _weighted_sums(weights, ids, grad)
    if ctx.needs_input_grad[4] and own is not None:
        d_items = _scattered_sums(torch.zeros_like(weights), own, ids, rows, grad)
    return d_weights, d_own, None, d_rows, d_items


_score_pairs.register_autograd(_backward, setup_context=_save)
_weighted_sums.register_autograd(_weighted_sums_backward, setup_context=_save)
_scattered_sums.register_autograd(_scattered_sums_backward, setup_context=_save)
in_float32(_score_pairs, _weighted_sums, _scattered_sums)


_METRICS = ("ip", "l2", "cosine")


def _checked_bias(op: str, bias: Tensor | None, items: Tensor) -> Tensor | None:
    if bias is None:
        return None
    bias = widened(bias)
    if bias.dtype != torch.float32:
        raise TypeError(f"{op}: bias must be float32, got {str(bias.dtype)[6:]}; cast it with .to(torch.float32)")
    if bias.dim() != 1:
        raise ValueError(f"{op}: bias must have 1 axis, got shape {tuple(bias.shape)}")
    if bias.shape[0] != items.shape[0]:
        raise ValueError(f"{op}: bias must have one entry an item ({items.shape[0]}), got {bias.shape[0]}")
    return bias


def score_pairs(
    queries: Tensor, items: Tensor, ids: Tensor, *, metric: str = "ip", bias: Tensor | None = None
) -> Tensor:
    """Score each query with items of its own: `polyvec.scan.score_pairs` with gradients for all but the ids.

    Parameters
    ----------
    queries : tensor of shape (nq, d), float32
    items : tensor of shape (n, d), float32
    ids : integer tensor of shape (nq, m)
        Rows of `items`, in any order, repeats allowed.
    metric : {"ip", "l2", "cosine"}
    bias : tensor of shape (n,), float32, optional
        Added to the score of each item; for "l2" it is taken off the distance.

    Returns
    -------
    tensor of shape (nq, m), float32

    Notes
    -----
    A backward costs 2 nq m d flops for each side that requires grad, and for the items a sort of the ids and a gradient
    of zeros but for the items in use; as in the forward, no nq x m x d tensor is made, but by second derivatives of
    "l2" and "cosine" for the items. Sums run in the order of the pairs, so gradients have the same bits for any number
    of threads. Derivatives of any order.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> items = torch.tensor([[0.0, 1.0], [2.0, 0.0]], requires_grad=True)
    >>> pvt.score_pairs(torch.tensor([[1.0, 3.0]]), items, torch.tensor([[1, 1]])).sum().backward()
    >>> items.grad
    tensor([[0., 0.],
            [2., 6.]])
    """
    op = "torch.score_pairs"
    require_tensors(op, queries=queries, items=items, ids=ids, **({} if bias is None else {"bias": bias}))
    one_of(op, "metric", metric, _METRICS)
    bias = _checked_bias(op, bias, items)
    if metric == "cosine":
        queries = functional.normalize(queries)
    scores, squares = _score_pairs(queries, items, ids, metric)
    if metric == "cosine":
        scores = scores * squares.clamp(min=1e-24).rsqrt()  # as normalize divides: a cosine with a zero vector is 0
    if bias is None:
        return scores
    return scores - bias[ids] if metric == "l2" else scores + bias[ids]


@custom_op(
    "polyvec::scan_logsumexp",
    mutates_args=(),
    schema="(Tensor queries, Tensor items, Tensor? bias, float scale) -> Tensor",
)
def _logsumexp(queries: Tensor, items: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    bias = None if bias is None else bias.detach()
    return _scan.logsumexp(queries.detach(), items.detach(), scale=scale, bias=bias)


@_logsumexp.register_fake
def _(queries: Tensor, items: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return queries.new_empty(queries.shape[0])


@custom_op(
    "polyvec::scan_logsumexp_gradient",
    mutates_args=(),
    schema="(Tensor queries, Tensor items, Tensor? bias, Tensor result, Tensor grad, float scale, bool of_queries, "
    "bool of_items, bool of_bias) -> (Tensor, Tensor, Tensor)",
)
def _logsumexp_gradient(
    queries: Tensor,
    items: Tensor,
    bias: Tensor | None,
    result: Tensor,
    grad: Tensor,
    scale: float,
    of_queries: bool,
    of_items: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient: Callable[..., Any] = _gradient_by_matmul if queries.is_cuda else _scan.logsumexp_gradient
    gradients = gradient(
        *(None if x is None else x.detach() for x in (queries, items, bias, result, grad)),
        scale=scale,
        of_queries=of_queries,
        of_items=of_items,
        of_bias=of_bias,
    )
    d_queries, d_items, d_bias = (queries.new_empty(0) if g is None else g for g in gradients)  # an op returns tensors
    return d_queries, d_items, d_bias


def _gradient_by_matmul(
    queries: Tensor,
    items: Tensor,
    bias: Tensor | None,
    result: Tensor,
    grad: Tensor,
    *,
    scale: float,
    of_queries: bool,
    of_items: bool,
    of_bias: bool,
    step: int = 4096,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `polyvec.scan.logsumexp_gradient` returns, by torch's matmul: step x step probabilities at a time."""
    weights = scale * grad
    weighted = weights[:, None] * queries
    d_queries = torch.zeros_like(queries) if of_queries else None
    d_items = torch.zeros_like(items) if of_items else None
    d_bias = torch.zeros_like(items[:, 0]) if of_bias else None
    for first in range(0, len(items), step):
        block = slice(first, first + step)
        less = result[:, None] if bias is None else result[:, None] - scale * bias[block]
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            p = torch.addmm(less[some], queries[some], items[block].T, alpha=scale, beta=-1).exp_()
            if d_queries is not None:
                d_queries[some].addmm_(p, items[block])
            if d_items is not None:
                d_items[block].addmm_(p.T, weighted[some])
            if d_bias is not None:
                d_bias[block].addmv_(p.T, weights[some])
    return None if d_queries is None else d_queries * weights[:, None], d_items, d_bias


@_logsumexp_gradient.register_fake
def _(
    queries: Tensor,
    items: Tensor,
    bias: Tensor | None,
    result: Tensor,
    grad: Tensor,
    scale: float,
    of_queries: bool,
    of_items: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape if of_queries else 0),
        items.new_empty(items.shape if of_items else 0),
        items.new_empty(items.shape[0] if of_bias else 0),
    )


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = _logsumexp_gradient(*ctx.saved_tensors, grad, ctx.scale, *wanted)
    return (*(x if asked else None for x, asked in zip(gradients, wanted, strict=True)), None)


_logsumexp.register_autograd(_logsumexp_backward, setup_context=_save_logsumexp)
in_float32(_logsumexp, _logsumexp_gradient)


def logsumexp(
    queries: Tensor, items: Tensor, *, scale: float = 1.0, metric: str = "ip", bias: Tensor | None = None
) -> Tensor:
    """Return the log of the sum over all items of exp(scale * score) for each query: the normaliser of a softmax.

    `polyvec.scan.logsumexp` with gradients. InfoNCE and 1-vs-all cross entropy are the mean of
    `logsumexp(queries, items, scale=scale) - scale * score_pairs(queries, items, targets[:, None])[:, 0]`, without a
    score matrix in either direction.

    Parameters
    ----------
    queries : tensor of shape (nq, d), float32
    items : tensor of shape (n, d), float32
    scale : float
        1 / temperature: positive. It has no gradient: with "ip", multiply the queries by one that is learned.
    metric : {"ip", "l2", "cosine"}
        "l2": the score is minus the squared distance, -(|q - x|^2 - bias).
    bias : tensor of shape (n,), float32, optional
        Added to the score of each item.

    Returns
    -------
    tensor of shape (nq,), float32
        -inf without items.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown metric, a scale that is not positive and finite.
    TypeError
        Not tensors, or dtypes other than float32; a scale that requires grad.

    Notes
    -----
    2 nq n d flops for a forward and 6 for a backward (4 for one side alone): the scores are computed anew, in blocks of
    512 x 480, instead of stored. Beside results a forward needs about 20 MB, a backward 70 MB; a forward saves its
    inputs and result. "l2" and "cosine" are "ip" of changed queries, items and bias, and take a copy of the items for
    "cosine". Sums run in one order: gradients have the same bits for any number of threads. First derivatives only.
    Runs in float32 under autocast.

    Few scores are better stored: below about 512 x 512 pairs, and for less than 32 queries, `torch.logsumexp(queries @
    items.T, 1)` is faster. A NaN or Inf in an item makes the queries' gradients NaN. On a GPU a backward takes blocks
    of 4096 x 4096 by torch's matmul.

    References
    ----------
    Wijmans et al. (2024): Cut your losses in large-vocabulary language models, section 4: the backward, of blocks that
    are computed anew. van den Oord et al. (2018): Representation learning with contrastive predictive coding, section
    2.3 (InfoNCE).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> queries, items = torch.tensor([[2.0, 5.0]], requires_grad=True), torch.eye(2)
    >>> pvt.logsumexp(queries, items).backward()
    >>> queries.grad  # the softmax of 2 and 5
    tensor([[0.0474, 0.9526]])
    """
    op = "torch.logsumexp"
    require_tensors(op, queries=queries, items=items, **({} if bias is None else {"bias": bias}))
    one_of(op, "metric", metric, _METRICS)
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            f"{op}: scale must not require grad, got a tensor that does; with metric='ip' multiply the queries by it"
        )
    for name, x in (("queries", queries), ("items", items)):
        if x.dim() != 2:
            raise ValueError(f"{op}: {name} must have 2 axes, got shape {tuple(x.shape)}")
    bias = _checked_bias(op, bias, items)
    queries, items = widened(queries), widened(items)
    if metric == "cosine":
        queries, items = functional.normalize(queries), functional.normalize(items)
    if metric != "l2" or len(items) == 0:
        return _logsumexp(queries, items, bias, scale)
    squares = items.square().sum(1)  # -|q - x|^2 = <2 q, x> - |x|^2 - |q|^2
    result = _logsumexp(2 * queries, items, -squares if bias is None else bias - squares, scale)
    return result - scale * queries.square().sum(1)
