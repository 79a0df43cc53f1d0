"""Differentiable hypercomplex operations and MaxSim scores for torch.

The functions are those of `polyvec.hypercomplex` and `polyvec.maxsim`, on tensors that may require grad. Each is a
`torch.library` custom op, which `torch.compile` keeps in its graph. Hypercomplex operations have gradients of any
order, for each backward is written with the same ops: the gradient of a product is a product with another table.
MaxSim has first derivatives.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from polyvec import Ragged, hypercomplex
from polyvec import maxsim as _maxsim
from polyvec.hypercomplex import Algebra

__all__ = ["maxsim", "maxsim_pairs", "normalize", "product", "relation_query"]

_flat_table = torch.compiler.assume_constant_result(hypercomplex.flat_table)


def _require_tensors(op: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch tensor, got {type(x).__name__}")


def _rows(table: list[float]) -> list[list[float]]:
    n = isqrt(len(table))
    return [list(table[i : i + n]) for i in range(0, n * n, n)]


def _left_table(table: list[float]) -> list[float]:
    """Return the table of the left factor's gradient: dx[i] = sum_c table[c][i] g[c] y[i ^ c]."""
    rows = _rows(table)
    return [row[i] for i in range(len(rows)) for row in rows]


def _right_table(table: list[float]) -> list[float]:
    """Return the table of the right factor's gradient: dy[j] = sum_c table[c][j ^ c] g[c] x[j ^ c]."""
    rows = _rows(table)
    return [row[j ^ c] for j in range(len(rows)) for c, row in enumerate(rows)]


@custom_op(
    "polyvec::hypercomplex_product", mutates_args=(), schema="(Tensor x, Tensor y, float[] table, int axis) -> Tensor"
)
def _product(x: Tensor, y: Tensor, table: list[float], axis: int) -> Tensor:
    return hypercomplex.product(x.detach(), y.detach(), algebra=_rows(table), axis=axis)


@_product.register_fake
def _(x: Tensor, y: Tensor, table: list[float], axis: int) -> Tensor:
    return x.new_empty(torch.broadcast_shapes(x.shape, y.shape))


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.table, ctx.axis = inputs
    ctx.save_for_backward(x, y)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    dx = dy = None
    if ctx.needs_input_grad[0]:
        dx = _product(grad, y, _left_table(ctx.table), ctx.axis).sum_to_size(x.shape)
    if ctx.needs_input_grad[1]:
        dy = _product(grad, x, _right_table(ctx.table), ctx.axis).sum_to_size(y.shape)
    return dx, dy, None, None


_product.register_autograd(_product_backward, setup_context=_save_product)


@custom_op("polyvec::hypercomplex_normalize", mutates_args=(), schema="(Tensor x, int axis) -> Tensor")
def _normalize(x: Tensor, axis: int) -> Tensor:
    return hypercomplex.normalize(x.detach(), axis=axis)


@_normalize.register_fake
def _(x: Tensor, axis: int) -> Tensor:
    return x.new_empty(x.shape)


def _normalize_gradient(x: Tensor, grad: Tensor, axis: int) -> Tensor:
    """Return (grad - u <u, grad>) / |x| with u = x / |x|, and 0 for a number of norm 0."""
    unit = _normalize(x, axis)
    size = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    size = torch.where(size > 0, size, torch.inf)
    return (grad - unit * (unit * grad).sum(axis, keepdim=True)) / size


def _save_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.axis = inputs
    ctx.save_for_backward(x)


def _normalize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _normalize_gradient(x, grad, ctx.axis), None


_normalize.register_autograd(_normalize_backward, setup_context=_save_normalize)


@custom_op(
    "polyvec::hypercomplex_relation_query",
    mutates_args=(),
    schema="(Tensor entities, Tensor relations, Tensor head_ids, Tensor relation_ids, Tensor? translations, "
    "float[] table, bool normalize) -> Tensor",
)
def _relation_query(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    translations: Tensor | None,
    table: list[float],
    normalize: bool,
) -> Tensor:
    return hypercomplex.relation_query(
        entities.detach(),
        relations.detach(),
        head_ids,
        relation_ids,
        algebra=_rows(table),
        translations=None if translations is None else translations.detach(),
        normalize=normalize,
    )


@_relation_query.register_fake
def _(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    translations: Tensor | None,
    table: list[float],
    normalize: bool,
) -> Tensor:
    return entities.new_empty(head_ids.shape[0], entities.shape[1] * entities.shape[2])


def _save_relation_query(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.table, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _relation_query_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entities, relations, head_ids, relation_ids = ctx.saved_tensors
    grad = grad.reshape(-1, *entities.shape[1:])
    each = torch.arange(grad.shape[0], device=grad.device)

    def gathered(table: Tensor, ids: Tensor, signs: list[float], normalize: bool) -> Tensor:
        """Multiply each row of grad by a row of `table`."""
        return _relation_query(grad, table, each, ids, None, signs, normalize).view_as(grad)

    def scattered(rows: Tensor, ids: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_add_(0, ids.long(), rows)

    d_entities = d_relations = d_translations = None
    if ctx.needs_input_grad[0]:
        rows = gathered(relations, relation_ids, _left_table(ctx.table), ctx.normalize)
        d_entities = scattered(rows, head_ids, entities)
    if ctx.needs_input_grad[1]:
        rows = gathered(entities, head_ids, _right_table(ctx.table), False)
        d_relations = scattered(rows, relation_ids, relations)
        if ctx.normalize:
            d_relations = _normalize_gradient(relations, d_relations, -2)
    if ctx.needs_input_grad[4]:
        d_translations = scattered(grad, relation_ids, relations)
    return d_entities, d_relations, None, None, d_translations, None, None


_relation_query.register_autograd(_relation_query_backward, setup_context=_save_relation_query)


@custom_op(
    "polyvec::maxsim",
    mutates_args=(),
    schema="(Tensor queries, Tensor query_offsets, Tensor docs, Tensor doc_offsets, bool pairs) -> (Tensor, Tensor)",
)
def _match(
    queries: Tensor, query_offsets: Tensor, docs: Tensor, doc_offsets: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    sets = Ragged(queries.detach(), query_offsets), Ragged(docs.detach(), doc_offsets)
    return _maxsim.match(*sets, pairs=pairs)


@_match.register_fake
def _(queries: Tensor, query_offsets: Tensor, docs: Tensor, doc_offsets: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    nq, nd, tokens = query_offsets.shape[0] - 1, doc_offsets.shape[0] - 1, queries.shape[0]
    return (
        queries.new_empty((nq,) if pairs else (nq, nd)),
        queries.new_empty((tokens,) if pairs else (nd, tokens), dtype=torch.int32),
    )


@custom_op(
    "polyvec::maxsim_gradient",
    mutates_args=(),
    schema="(Tensor queries, Tensor query_offsets, Tensor docs, Tensor doc_offsets, Tensor grad, Tensor rows, "
    "bool of_docs) -> Tensor",
)
def _match_gradient(
    queries: Tensor,
    query_offsets: Tensor,
    docs: Tensor,
    doc_offsets: Tensor,
    grad: Tensor,
    rows: Tensor,
    of_docs: bool,
) -> Tensor:
    sets = Ragged(queries.detach(), query_offsets), Ragged(docs.detach(), doc_offsets)
    return _maxsim.match_gradient(*sets, grad.detach(), rows, of_docs=of_docs)


@_match_gradient.register_fake
def _(
    queries: Tensor,
    query_offsets: Tensor,
    docs: Tensor,
    doc_offsets: Tensor,
    grad: Tensor,
    rows: Tensor,
    of_docs: bool,
) -> Tensor:
    tokens = docs if of_docs else queries
    return tokens.new_empty(tokens.shape)


def _save_match(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *sets, _ = inputs
    ctx.save_for_backward(*sets, output[1])
    ctx.mark_non_differentiable(output[1])


def _match_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *sets, rows = ctx.saved_tensors
    gradients = [
        _match_gradient(*sets, grad, rows, of_docs) if ctx.needs_input_grad[2 * of_docs] else None
        for of_docs in (False, True)
    ]
    return gradients[0], None, gradients[1], None, None


_match.register_autograd(_match_backward, setup_context=_save_match)


def _token_sets(op: str, name: str, x: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of all sets and where each set begins."""
    first, second = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    _require_tensors(op, **{name: first})
    if first.dim() == 2 and second is not None and mask is None:
        return first, torch.as_tensor(second)
    if first.dim() != 3:
        raise ValueError(
            f"{op}: {name} must be a padded (n, t, d) tensor, (padded, lengths) or (values, offsets), "
            f"got shape {tuple(first.shape)}"
        )
    if second is None and mask is None:
        return first.flatten(0, 1), torch.arange(first.shape[0] + 1) * first.shape[1]
    sets = Ragged.from_padded(first, second, mask=mask)  # indexes `first`, which torch differentiates
    return sets.values, torch.from_numpy(sets.offsets)


def maxsim(queries: Any, docs: Any, *, query_mask: Any = None, doc_mask: Any = None) -> Tensor:
    """Score every query against every document: `polyvec.maxsim.score` with gradients for the tokens.

    Parameters
    ----------
    queries : token sets, float32 | float64
        A padded tensor of shape (n, t, d), alone or with its lengths as `(padded, lengths)`, or `(values, offsets)`
        with values of shape (T, d).
    docs : token sets of queries' dtype and width
    query_mask, doc_mask : bool tensor of shape (n, t), optional
        Which tokens of padded queries, of padded documents count.

    Returns
    -------
    tensor of shape (nq, nd), queries' dtype
        Padding is excluded: -inf for a document without tokens, 0 for a query without tokens.

    Notes
    -----
    Each score is differentiated at its maxima, of equal ones at the first. A forward saves the tokens and an int32 for
    each query token and document, never a similarity. A backward costs 2 d flops for each of these for every side that
    requires grad, in a fixed order: gradients have the same bits for any number of threads. Lengths and masks break the
    graph of `torch.compile`, for it cannot know how many tokens they keep; the other forms do not. CPU only.

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
    sets = *_token_sets(op, "queries", queries, query_mask), *_token_sets(op, "docs", docs, doc_mask)
    return _match(*sets, False)[0]


def maxsim_pairs(queries: Any, docs: Any, *, query_mask: Any = None, doc_mask: Any = None) -> Tensor:
    """Score each query against one document: `polyvec.maxsim.score_pairs` with gradients for the tokens.

    Parameters
    ----------
    queries : n token sets, float32 | float64
        A padded tensor of shape (n, t, d), alone or with its lengths as `(padded, lengths)`, or `(values, offsets)`
        with values of shape (T, d).
    docs : n token sets of queries' dtype and width
    query_mask, doc_mask : bool tensor of shape (n, t), optional
        Which tokens of padded queries, of padded documents count.

    Returns
    -------
    tensor of shape (n,), queries' dtype
        The score of query i and document i.

    Notes
    -----
    As for `maxsim`; a forward saves an int32 for each query token.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> queries = torch.ones(2, 3, 4, requires_grad=True)
    >>> pvt.maxsim_pairs(queries, (torch.ones(2, 5, 4), torch.tensor([5, 1]))).sum().backward()
    >>> queries.grad.shape, queries.grad.sum()
    (torch.Size([2, 3, 4]), tensor(24.))
    """
    op = "torch.maxsim_pairs"
    sets = *_token_sets(op, "queries", queries, query_mask), *_token_sets(op, "docs", docs, doc_mask)
    return _match(*sets, True)[0]


def product(x: Tensor, y: Tensor, *, algebra: Algebra = "quaternion", axis: int = -2) -> Tensor:
    """Multiply hypercomplex numbers: `polyvec.hypercomplex.product` with gradients for both factors.

    Parameters
    ----------
    x, y : tensors of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        Leading axes (and d) broadcast.
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
    axis : {-2, -1}
        Where the components are: -2 planar (fastest), -1 interleaved.

    Returns
    -------
    tensor of the broadcast shape, x's dtype and device

    Notes
    -----
    A backward costs one product for each factor that requires grad; broadcast axes are summed.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> x = torch.tensor([0.0, 1.0, 0.0, 0.0], requires_grad=True)
    >>> pvt.product(x, torch.tensor([0.0, 0.0, 1.0, 0.0]), axis=-1)[3].backward()  # the k of i j
    >>> x.grad
    tensor([0., 1., 0., 0.])
    """
    _require_tensors("torch.product", x=x, y=y)
    return _product(x, y, _flat_table(algebra), axis)


def normalize(x: Tensor, *, axis: int = -2) -> Tensor:
    """Divide each number by its Euclidean norm: `polyvec.hypercomplex.normalize` with a gradient.

    Parameters
    ----------
    x : tensor of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        C = 2, 4 or 8.
    axis : {-2, -1}

    Returns
    -------
    tensor of x's shape, dtype and device

    Notes
    -----
    A number of norm 0 stays 0, and its gradient is taken as 0.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> x = torch.tensor([3.0, 4.0, 0.0, 0.0], requires_grad=True)
    >>> pvt.normalize(x, axis=-1)[2].backward()
    >>> x.grad
    tensor([0.0000, 0.0000, 0.2000, 0.0000])
    """
    _require_tensors("torch.normalize", x=x)
    return _normalize(x, axis)


def relation_query(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    *,
    algebra: Algebra = "quaternion",
    translations: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Compose (head, relation) pairs: `polyvec.hypercomplex.relation_query` with gradients for its tables.

    Parameters
    ----------
    entities : tensor of shape (N, C, d), float32 | float64
    relations : tensor of shape (R, C, d), entities' dtype
    head_ids, relation_ids : integer tensors of shape (n,)
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
    translations : tensor of shape (R, C, d), optional
    normalize : bool
        Divide each rotor by its Euclidean norm.

    Returns
    -------
    tensor of shape (n, C * d), entities' dtype and device

    Notes
    -----
    A backward costs one fused product and one `index_add` for each table that requires grad. On a GPU `index_add` sums
    in no fixed order: see `torch.use_deterministic_algorithms`.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> entities, relations = torch.ones(3, 4, 2, requires_grad=True), torch.ones(1, 4, 2)
    >>> pvt.relation_query(entities, relations, torch.tensor([2, 2]), torch.tensor([0, 0])).sum().backward()
    >>> entities.grad[:, 0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [4.0, 4.0]]
    """
    _require_tensors(
        "torch.relation_query",
        entities=entities,
        relations=relations,
        head_ids=head_ids,
        relation_ids=relation_ids,
        **({} if translations is None else {"translations": translations}),
    )
    return _relation_query(entities, relations, head_ids, relation_ids, translations, _flat_table(algebra), normalize)
