"""Differentiable MaxSim scores, and tokens pooled to fewer."""

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.library import custom_op

from polyvec import Ragged
from polyvec import maxsim as _maxsim
from polyvec.torch._tensors import in_float32, narrowed, one_of, require_tensors


def _ragged(values: Tensor, offsets: Tensor) -> Ragged:
    if values.is_cuda or (offsets.dtype == torch.int64 and offsets.dim() == 1 and len(offsets) > 0):
        return Ragged.on_device(values.detach(), offsets.contiguous())  # a CPU kernel checks them
    return Ragged(values.detach(), offsets)


@custom_op(
    "polyvec::maxsim",
    mutates_args=(),
    schema="(Tensor queries, Tensor query_offsets, Tensor docs, Tensor doc_offsets, bool pairs) -> (Tensor, Tensor)",
)
def _match(
    queries: Tensor, query_offsets: Tensor, docs: Tensor, doc_offsets: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    sets = _ragged(queries, query_offsets), _ragged(docs, doc_offsets)
    return _maxsim.match(*sets, pairs=pairs)


@_match.register_fake
def _(queries: Tensor, query_offsets: Tensor, docs: Tensor, doc_offsets: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    nq, nd, tokens = query_offsets.shape[0] - 1, doc_offsets.shape[0] - 1, queries.shape[0]
    dtype = torch.float32 if queries.itemsize == 2 else queries.dtype
    return (
        queries.new_empty((nq,) if pairs else (nq, nd), dtype=dtype),
        queries.new_empty((tokens,) if pairs else (nd, tokens), dtype=torch.int32),
    )


@custom_op(
    "polyvec::maxsim_gradient",
    mutates_args=(),
    schema="(Tensor queries, Tensor query_offsets, Tensor docs, Tensor doc_offsets, Tensor grad, Tensor rows, "
    "bool of_queries, bool of_docs) -> (Tensor, Tensor)",
)
def _match_gradient(
    queries: Tensor,
    query_offsets: Tensor,
    docs: Tensor,
    doc_offsets: Tensor,
    grad: Tensor,
    rows: Tensor,
    of_queries: bool,
    of_docs: bool,
) -> tuple[Tensor, Tensor]:
    q, d = (  # the forward has checked them
        Ragged.on_device(values.detach(), offsets.long().contiguous())
        for values, offsets in ((queries, query_offsets), (docs, doc_offsets))
    )
    gradients = _maxsim.match_gradient(q, d, grad.detach(), rows, of_queries=of_queries, of_docs=of_docs)
    d_queries, d_docs = (queries.new_empty(0) if g is None else g for g in gradients)  # an op returns tensors
    return d_queries, d_docs


@_match_gradient.register_fake
def _(
    queries: Tensor,
    query_offsets: Tensor,
    docs: Tensor,
    doc_offsets: Tensor,
    grad: Tensor,
    rows: Tensor,
    of_queries: bool,
    of_docs: bool,
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape if of_queries else 0), docs.new_empty(docs.shape if of_docs else 0)


def _save_match(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *sets, _ = inputs
    ctx.save_for_backward(*sets, output[1])
    ctx.mark_non_differentiable(output[1])


def _match_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    of_queries, of_docs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    *sets, rows = ctx.saved_tensors
    d_queries, d_docs = _match_gradient(*sets, grad, rows, of_queries, of_docs)
    return d_queries if of_queries else None, None, d_docs if of_docs else None, None, None


_match.register_autograd(_match_backward, setup_context=_save_match)


def _token_sets(op: str, name: str, x: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of all sets and where each set begins, on their device."""
    first, second = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    require_tensors(op, **{name: first})
    if first.dim() == 2 and second is not None and mask is None:
        offsets = torch.as_tensor(second)
        if first.is_cuda and not offsets.is_cuda:
            offsets = torch.from_numpy(Ragged(first.detach(), offsets).offsets).to(first.device)
        return first, offsets
    if first.dim() != 3:
        raise ValueError(
            f"{op}: {name} must be a padded (n, t, d) tensor, (padded, lengths) or (values, offsets), "
            f"got shape {tuple(first.shape)}"
        )
    if second is None and mask is None:
        n, t = first.shape[:2]
        offsets = torch.arange(0, n * t + 1, t, device=first.device) if t else first.new_zeros(n + 1, dtype=torch.int64)
        return first.flatten(0, 1), offsets
    try:
        sets = Ragged.from_padded(first, second, mask=mask)  # indexes `first`, which torch differentiates
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).replace('Ragged: ', f'{name}: ')}") from None
    return sets.values, torch.from_numpy(sets.offsets).to(first.device)


def _narrowed_sets(op: str, name: str, x: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """The same for scores, which autocast computes in a narrower type on a GPU."""
    values, offsets = _token_sets(op, name, x, mask)
    return narrowed(values), offsets


def maxsim(queries: Any, docs: Any, *, query_mask: Any = None, doc_mask: Any = None) -> Tensor:
    """Score every query against every document: `polyvec.maxsim.score` with gradients for the tokens.

    Parameters
    ----------
    queries : token sets, float32 | float64; on a GPU bfloat16 | float16, too
        A padded tensor of shape (n, t, d), alone or with its lengths as `(padded, lengths)`, or `(values, offsets)`
        with values of shape (T, d).
    docs : token sets of queries' dtype and width
    query_mask, doc_mask : bool or integer tensor of shape (n, t), optional
        Which tokens of padded queries, of padded documents count; integers are 0 and 1.

    Returns
    -------
    tensor of shape (nq, nd), queries' dtype; float32 for bfloat16 and float16
        Padding is excluded: -inf for a document without tokens, 0 for a query without tokens.

    Notes
    -----
    Each score is differentiated at its maxima, of equal ones at the first. A forward saves the tokens and an int32 for
    each query token and document, never a similarity. A backward costs 2 d flops for each of these for every side that
    requires grad, in a fixed order: gradients have the same bits for any number of threads. First derivatives only.
    Lengths and masks break the graph of `torch.compile`, for it cannot know how many tokens they keep; the other forms
    do not.

    A similarity that is NaN is never the maximum: a document token with NaN drops out, scores stay finite, and training
    does not notice.

    On a GPU offsets that lie there are not checked, for a check would wait for them, and autocast hands over tokens in
    its own dtype, as it does to a product of matrices; on a CPU in float32.

    References
    ----------
    ColBERT (Khattab and Zaharia 2020), section 3.2.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> docs = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]], requires_grad=True)
    >>> scores = pvt.maxsim(torch.tensor([[[2.0, 1.0]]]), docs)
    >>> scores.sum().backward()
    >>> scores.tolist(), docs.grad.tolist()
    ([[3.0]], [[[0.0, 0.0], [2.0, 1.0]]])
    """
    op = "torch.maxsim"
    sets = *_narrowed_sets(op, "queries", queries, query_mask), *_narrowed_sets(op, "docs", docs, doc_mask)
    return _match(*sets, False)[0]


def maxsim_pairs(queries: Any, docs: Any, *, query_mask: Any = None, doc_mask: Any = None) -> Tensor:
    """Score each query against one document: `polyvec.maxsim.score_pairs` with gradients for the tokens.

    Parameters
    ----------
    queries : n token sets, float32 | float64; on a GPU bfloat16 | float16, too
        A padded tensor of shape (n, t, d), alone or with its lengths as `(padded, lengths)`, or `(values, offsets)`
        with values of shape (T, d).
    docs : n token sets of queries' dtype and width
    query_mask, doc_mask : bool or integer tensor of shape (n, t), optional
        Which tokens of padded queries, of padded documents count; integers are 0 and 1.

    Returns
    -------
    tensor of shape (n,), queries' dtype; float32 for bfloat16 and float16
        The score of query i and document i.

    Notes
    -----
    As for `maxsim`, NaN included; a forward saves an int32 for each query token.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> queries = torch.ones(2, 3, 4, requires_grad=True)
    >>> pvt.maxsim_pairs(queries, (torch.ones(2, 5, 4), torch.tensor([5, 1]))).sum().backward()
    >>> queries.grad.shape, queries.grad.sum()
    (torch.Size([2, 3, 4]), tensor(24.))
    """
    op = "torch.maxsim_pairs"
    sets = *_narrowed_sets(op, "queries", queries, query_mask), *_narrowed_sets(op, "docs", docs, doc_mask)
    return _match(*sets, True)[0]


def _repeated(values: Tensor, offsets: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Return each token set `times` times in a row."""
    if times == 1:
        return values, offsets
    total = times * values.shape[0]
    begins, lengths = (x.repeat_interleave(times) for x in (offsets[:-1], offsets.diff()))
    new = functional.pad(lengths.cumsum(0), (1, 0))
    shifts = (begins - new[:-1]).repeat_interleave(lengths, output_size=total)
    return values[torch.arange(total, device=values.device) + shifts], new


def scores_of_own(
    op: str, queries: Any, docs: Any, query_mask: Any, doc_mask: Any, names: tuple[str, str] = ("queries", "docs")
) -> Tensor:
    """Score each of n queries against m documents of its own, the m of a query one after the other: (n, m)."""
    q, q_offsets = _narrowed_sets(op, names[0], queries, query_mask)
    d, d_offsets = _narrowed_sets(op, names[1], docs, doc_mask)
    nq, nd = q_offsets.shape[0] - 1, d_offsets.shape[0] - 1
    if nq == nd == 0:
        return q.new_empty(0, 0)
    if nq == 0 or nd % nq:
        raise ValueError(f"{op}: {names[1]} must have as many documents for each query ({nq}), got {nd}")
    return _match(*_repeated(q, q_offsets, nd // nq), d, d_offsets, True)[0].view(nq, nd // nq)


@custom_op(
    "polyvec::pool",
    mutates_args=(),
    schema="(Tensor values, Tensor offsets, Tensor mean_offsets, int count, str method, int max_iter) "
    "-> (Tensor, Tensor)",
)
def _pool(
    values: Tensor, offsets: Tensor, mean_offsets: Tensor, count: int, method: str, max_iter: int
) -> tuple[Tensor, Tensor]:
    means = _ragged(values.new_empty(count, values.shape[1]), mean_offsets)
    labels = _maxsim.pool_into(_ragged(values, offsets), means, method=method, max_iter=max_iter)
    firsts = mean_offsets[:-1].repeat_interleave(offsets.diff(), output_size=values.shape[0])
    return means.values, labels + firsts


@_pool.register_fake
def _(
    values: Tensor, offsets: Tensor, mean_offsets: Tensor, count: int, method: str, max_iter: int
) -> tuple[Tensor, Tensor]:
    return values.new_empty(count, values.shape[1]), values.new_empty(values.shape[:1], dtype=torch.int64)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.count = inputs[3]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    sizes = grad.new_zeros(ctx.count).index_add_(0, rows, torch.ones_like(rows, dtype=grad.dtype))
    return (grad / sizes[:, None])[rows], None, None, None, None, None


_pool.register_autograd(_pool_backward, setup_context=_save_pool)
in_float32(_pool)


def pool(
    docs: Any,
    k: int | None = None,
    *,
    ratio: float | None = None,
    method: str = "kmeans",
    max_iter: int = 20,
    doc_mask: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replace the tokens of each document by the means of their clusters: `polyvec.maxsim.pool` with gradients.

    Parameters
    ----------
    docs : token sets, float32
        A padded tensor of shape (n, t, d), alone or with its lengths as `(padded, lengths)`, or `(values, offsets)`
        with values of shape (T, d).
    k : int, optional
        Tokens that a document keeps; one of no more tokens stays as it is.
    ratio : float, optional
        Instead of k: tokens to keep for each token of the document, in (0, 1], rounded down, at least one.
    method : {"kmeans", "ward"}
        Lloyd's iterations from evenly spaced tokens, or Ward's hierarchical clustering.
    max_iter : int
        Iterations of "kmeans" at most.
    doc_mask : bool or integer tensor of shape (n, t), optional
        Which tokens of padded documents count; integers are 0 and 1.

    Returns
    -------
    values, offsets : tensors of shape (K, d) and (n + 1,), float32 and int64
        The means of all documents and where each document's begin, as `maxsim` takes them. For padded documents of
        full length, `values.view(n, -1, d)` is padded, too.

    Raises
    ------
    ValueError
        Neither k nor ratio or both, values out of range, an unknown method, NaN or Inf in a token.
    TypeError
        Not tensors, or dtypes other than float32.

    Notes
    -----
    Which token belongs to which cluster counts as constant: a token's gradient is that of its mean over the number of
    tokens in it (CRISP trains an encoder through its clusters so). Derivatives of any order. A forward saves an int64 a
    token. Lengths, offsets and masks break the graph of `torch.compile`, for it cannot know how many tokens they keep;
    on a GPU they are waited for. Runs in float32 under autocast. On a GPU a document with NaN or Inf has means of NaN.

    References
    ----------
    Veneroso et al. (2025): CRISP, section 3 (k-means). Clavie et al. (2024): Reducing the footprint of multi-vector
    retrieval with minimal performance impact via token pooling, section 3 (Ward).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> docs = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]], requires_grad=True)
    >>> values, offsets = pvt.pool(docs, 2, method="ward")
    >>> values[0].sum().backward()
    >>> values.tolist(), offsets.tolist(), docs.grad.tolist()
    ([[0.5, 0.5], [3.0, 0.0]], [0, 2], [[[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]])
    """
    op = "torch.pool"
    if (k is None) == (ratio is None):
        raise ValueError(f"{op}: k or ratio must be given, and not both, got k={k}, ratio={ratio}")
    for name, value in (("k", 1 if k is None else k), ("max_iter", max_iter)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"{op}: ratio must be in (0, 1], got {ratio}")
    one_of(op, "method", method, ("kmeans", "ward"))
    values, offsets = _token_sets(op, "docs", docs, doc_mask)
    if isinstance(docs, Tensor) and doc_mask is None:  # lengths that torch.compile knows
        n, t = docs.shape[:2]
        kept = min(k, t) if k is not None else max(min(1, t), int(t * float(ratio or 0)))
        mean_offsets, count = torch.arange(n + 1, device=values.device) * kept, n * kept
    else:
        lengths = offsets.diff()
        least = lengths.clamp(max=1 if k is None else k)
        sizes = least if ratio is None else (lengths.double() * ratio).long().maximum(least)
        mean_offsets = functional.pad(sizes.cumsum(0), (1, 0))
        count = int(mean_offsets[-1])
    return _pool(values, offsets, mean_offsets, count, method, max_iter)[0], mean_offsets
