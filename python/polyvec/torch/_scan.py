"""Differentiable scores of given pairs."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from polyvec import scan as _scan
from polyvec.torch._tensors import in_float32, require_tensors


@custom_op(
    "polyvec::scan_score_pairs", mutates_args=(), schema="(Tensor queries, Tensor items, Tensor ids, bool l2) -> Tensor"
)
def _score_pairs(queries: Tensor, items: Tensor, ids: Tensor, l2: bool) -> Tensor:
    return _scan.score_pairs(queries.detach(), items.detach(), ids, metric="l2" if l2 else "ip")


@_score_pairs.register_fake
def _(queries: Tensor, items: Tensor, ids: Tensor, l2: bool) -> Tensor:
    return queries.new_empty(ids.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.l2 = inputs
    ctx.save_for_backward(*tensors)


def _weighted_sums(weights: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Return sum_j weights[i, j] * rows[ids[i, j]], in the order of j; the products are never stored."""
    begins = torch.arange(ids.shape[0], device=ids.device) * ids.shape[1]
    flat = ids.reshape(-1), weights.reshape(-1)
    return functional.embedding_bag(flat[0], rows, begins, mode="sum", per_sample_weights=flat[1])


def _scattered_sums(weights: Tensor, ids: Tensor, rows: Tensor, n: int) -> Tensor:
    """Return for each of n ids the sum of weights[i, j] * rows[i] over its pairs, in the order of the pairs."""
    of, order = ids.reshape(-1).sort(stable=True)
    begins = torch.searchsorted(of, torch.arange(n, device=ids.device))
    sources = order // max(ids.shape[1], 1)
    return functional.embedding_bag(
        sources, rows, begins, mode="sum", per_sample_weights=weights.reshape(-1).gather(0, order)
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    queries, items, ids = ctx.saved_tensors
    ids = ids.long()
    d_queries = d_items = None
    if ctx.needs_input_grad[0]:
        d_queries = _weighted_sums(grad, ids, items)
        if ctx.l2:
            d_queries = 2 * (grad.sum(1, keepdim=True) * queries - d_queries)
    if ctx.needs_input_grad[1]:
        d_items = _scattered_sums(grad, ids, queries, items.shape[0])
        if ctx.l2:
            ones = torch.ones_like(queries[:, :1])
            d_items = 2 * (_scattered_sums(grad, ids, ones, items.shape[0]) * items - d_items)
    return d_queries, d_items, None, None


_score_pairs.register_autograd(_backward, setup_context=_save)
in_float32(_score_pairs)


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
    A backward costs 2 nq m d flops for each side that requires grad, and a sort of the ids for the items; as in the
    forward, no nq x m x d tensor is made. Sums run in the order of the pairs, so gradients have the same bits for any
    number of threads. Second derivatives are exact, too. "cosine" divides all queries and items by their norms first, a
    copy of both.

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
    if metric == "cosine":
        queries, items = functional.normalize(queries), functional.normalize(items)
    scores = _score_pairs(queries, items, ids, metric == "l2")
    if bias is None:
        return scores
    return scores - bias[ids] if metric == "l2" else scores + bias[ids]
