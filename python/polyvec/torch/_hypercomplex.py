"""Differentiable hypercomplex operations: their gradients are the same ops with another table, of any order."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from polyvec import hypercomplex
from polyvec.hypercomplex import Algebra
from polyvec.torch._tensors import in_float32, one_of, require_tensors

_flat_table = torch.compiler.assume_constant_result(hypercomplex.flat_table)


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
    "polyvec::hypercomplex_sum_products",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor x_ids, Tensor y_ids, Tensor out_ids, SymInt rows, float[] table) -> Tensor",
)
def _sum_products(
    x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor, out_ids: Tensor, rows: int, table: list[float]
) -> Tensor:
    """out[k] = sum of x[x_ids[i]] (*) y[y_ids[i]] over the i with out_ids[i] = k."""
    return hypercomplex.sum_products(x.detach(), y.detach(), x_ids, y_ids, out_ids, rows, algebra=_rows(table))


@_sum_products.register_fake
def _(x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor, out_ids: Tensor, rows: int, table: list[float]) -> Tensor:
    return x.new_empty(rows, *x.shape[1:])


def _save_sum_products(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.table = inputs
    ctx.save_for_backward(*tensors)


def _sum_products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, x_ids, y_ids, out_ids = ctx.saved_tensors
    dx = dy = None
    if ctx.needs_input_grad[0]:
        dx = _sum_products(grad, y, out_ids, y_ids, x_ids, x.shape[0], _left_table(ctx.table))
    if ctx.needs_input_grad[1]:
        dy = _sum_products(grad, x, out_ids, x_ids, y_ids, y.shape[0], _right_table(ctx.table))
    return dx, dy, None, None, None, None, None


_sum_products.register_autograd(_sum_products_backward, setup_context=_save_sum_products)


@custom_op(
    "polyvec::hypercomplex_relation_query",
    mutates_args=(),
    schema="(Tensor entities, Tensor relations, Tensor head_ids, Tensor relation_ids, Tensor? translations, "
    "Tensor? head_translations, float[] table, bool normalize, bool rotate_by_head) -> Tensor",
)
def _relation_query(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    translations: Tensor | None,
    head_translations: Tensor | None,
    table: list[float],
    normalize: bool,
    rotate_by_head: bool,
) -> Tensor:
    return hypercomplex.relation_query(
        entities.detach(),
        relations.detach(),
        head_ids,
        relation_ids,
        algebra=_rows(table),
        rotate_by="head" if rotate_by_head else "relation",
        translations=None if translations is None else translations.detach(),
        head_translations=None if head_translations is None else head_translations.detach(),
        normalize=normalize,
    )


@_relation_query.register_fake
def _(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    translations: Tensor | None,
    head_translations: Tensor | None,
    table: list[float],
    normalize: bool,
    rotate_by_head: bool,
) -> Tensor:
    return entities.new_empty(head_ids.shape[0], entities.shape[1] * entities.shape[2])


def _save_relation_query(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    entities, relations, head_ids, relation_ids, translations, _, ctx.table, ctx.normalize, ctx.rotate_by_head = inputs
    ctx.num_translations = 0 if translations is None else translations.shape[0]
    ctx.save_for_backward(entities, relations, head_ids, relation_ids)


def _relation_query_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entities, relations, head_ids, relation_ids = ctx.saved_tensors
    grad = grad.reshape(-1, *entities.shape[1:])
    each = torch.arange(grad.shape[0], device=grad.device)
    rotor_ids = head_ids if ctx.rotate_by_head else relation_ids

    def scattered(ids: Tensor, rows: int) -> Tensor:
        return grad.new_zeros(rows, *grad.shape[1:]).index_add_(0, ids.long(), grad)

    d_entities = d_relations = d_translations = d_head_translations = None
    if ctx.needs_input_grad[0]:
        rotors = _normalize(relations, -2) if ctx.normalize else relations
        d_entities = _sum_products(grad, rotors, each, rotor_ids, head_ids, entities.shape[0], _left_table(ctx.table))
    if ctx.needs_input_grad[1]:
        d_relations = _sum_products(
            grad, entities, each, head_ids, rotor_ids, relations.shape[0], _right_table(ctx.table)
        )
        if ctx.normalize:
            d_relations = _normalize_gradient(relations, d_relations, -2)
    if ctx.needs_input_grad[4]:
        d_translations = scattered(relation_ids, ctx.num_translations)
    if ctx.needs_input_grad[5]:
        d_head_translations = scattered(head_ids, entities.shape[0])
    return d_entities, d_relations, None, None, d_translations, d_head_translations, None, None, None


_relation_query.register_autograd(_relation_query_backward, setup_context=_save_relation_query)
in_float32(_product, _normalize, _relation_query, _sum_products)


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
    require_tensors("torch.product", x=x, y=y)
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
    require_tensors("torch.normalize", x=x)
    return _normalize(x, axis)


def relation_query(
    entities: Tensor,
    relations: Tensor,
    head_ids: Tensor,
    relation_ids: Tensor,
    *,
    algebra: Algebra = "quaternion",
    rotate_by: str = "relation",
    translations: Tensor | None = None,
    head_translations: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Compose (head, relation) pairs: `polyvec.hypercomplex.relation_query` with gradients for its tables.

    Parameters
    ----------
    entities : tensor of shape (N, C, d), float32 | float64
    relations : tensor of shape (R, C, d), entities' dtype
        (N, C, d) with rotate_by="head".
    head_ids, relation_ids : integer tensors of shape (n,)
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
    rotate_by : {"relation", "head"}
        Whose rotors `relations` holds.
    translations : tensor of shape (R, C, d), optional
    head_translations : tensor of shape (N, C, d), optional
    normalize : bool
        Divide each rotor by its Euclidean norm.

    Returns
    -------
    tensor of shape (n, C * d), entities' dtype and device

    Notes
    -----
    A backward costs one pass for each table that requires grad: its rows are sums of products, gathered in the order of
    the ids, so that gradients have the same bits for any number of threads. On a GPU they are added in no fixed order.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> entities, relations = torch.ones(3, 4, 2, requires_grad=True), torch.ones(1, 4, 2)
    >>> pvt.relation_query(entities, relations, torch.tensor([2, 2]), torch.tensor([0, 0])).sum().backward()
    >>> entities.grad[:, 0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [4.0, 4.0]]
    """
    op = "torch.relation_query"
    shifts = {"translations": translations, "head_translations": head_translations}
    require_tensors(
        op,
        entities=entities,
        relations=relations,
        head_ids=head_ids,
        relation_ids=relation_ids,
        **{name: shift for name, shift in shifts.items() if shift is not None},
    )
    one_of(op, "rotate_by", rotate_by, ("relation", "head"))
    return _relation_query(
        entities,
        relations,
        head_ids,
        relation_ids,
        translations,
        head_translations,
        _flat_table(algebra),
        normalize,
        rotate_by == "head",
    )
