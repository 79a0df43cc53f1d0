"""Differentiable scores of given pairs."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from polyvec import scan as _scan
from polyvec.torch._tensors import in_float32, require_tensors, widened


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
    if metric not in ("ip", "l2", "cosine"):
        raise ValueError(f"{op}: metric must be one of 'ip', 'l2', 'cosine', got {metric!r}")
    if bias is not None:
        bias = widened(bias)
        if bias.dtype != torch.float32:
            raise TypeError(f"{op}: bias must be float32, got {str(bias.dtype)[6:]}; cast it with .to(torch.float32)")
        if bias.dim() != 1:
            raise ValueError(f"{op}: bias must have 1 axis, got shape {tuple(bias.shape)}")
        if bias.shape[0] != items.shape[0]:
            raise ValueError(f"{op}: bias must have one entry an item ({items.shape[0]}), got {bias.shape[0]}")
    if metric == "cosine":
        queries = functional.normalize(queries)
    scores, squares = _score_pairs(queries, items, ids, metric)
    if metric == "cosine":
        scores = scores * squares.clamp(min=1e-24).rsqrt()  # as normalize divides: a cosine with a zero vector is 0
    if bias is None:
        return scores
    return scores - bias[ids] if metric == "l2" else scores + bias[ids]
