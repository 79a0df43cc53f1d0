"""Complex, quaternion, dihedron and octonion vectors: products, norms, and the queries of knowledge-graph models.

A planar array is (..., C, d): C planes of length d, the components of d numbers (C = 2, 4 or 8). With `axis=-1` the
components of one number lie side by side, (..., C).

An algebra is "complex" (C = 2), "quaternion", "dihedron" (C = 4), "octonion" (C = 8), or a pair (a, b): the
4-component algebra with i^2 = a, j^2 = b, ij = -ji = k. The quaternions are (-1, -1), the dihedrons (-1, 1): split
quaternions, which multiply as real 2 x 2 matrices. Any other algebra whose basis elements multiply as
e_i e_j = +-e_(i ^ j) is given by its C x C table: `out[c] = sum_i table[c][i] x[i] y[i ^ c]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from polyvec import _backend
from polyvec._arrays import (
    ArrayT,
    as_array,
    as_ids,
    choice,
    contiguous,
    dtype_name,
    empty,
    is_torch,
    namespace,
    output,
)

__all__ = ["conjugate", "flow_keys", "flow_query", "norm", "normalize", "product", "relation_query"]

Algebra = str | tuple[float, float] | Sequence[Sequence[float]]

_FLOATS = ("float32", "float64")


def _cayley_dickson(table: list[list[float]], gamma: float) -> list[list[float]]:
    """Double an algebra: (p, q)(r, s) = (p r + gamma conj(s) q, s p + q conj(r)).

    `table[c][i]` is the sign of x_i y_(i ^ c) in component c; conjugation negates all components but the first.
    """
    n = len(table)
    doubled = [[0.0] * (2 * n) for _ in range(2 * n)]
    for c in range(n):
        for i in range(n):
            j = i ^ c
            conj_j = 1.0 if j == 0 else -1.0
            conj_i = 1.0 if i == 0 else -1.0
            doubled[c][i] = table[c][i]  # p r
            doubled[c][n + j] = gamma * table[c][i] * conj_i  # conj(s) q: s is the left factor
            doubled[c + n][j] = table[c][i]  # s p: s_i p_j
            doubled[c + n][n + i] = table[c][i] * conj_j  # q conj(r)
    return doubled


_SQUARES: dict[str, tuple[float, ...]] = {
    "complex": (-1.0,),
    "quaternion": (-1.0, -1.0),
    "dihedron": (-1.0, 1.0),
    "octonion": (-1.0, -1.0, -1.0),
}


def _doubled(squares: Iterable[float]) -> list[list[float]]:
    table = [[1.0]]
    for gamma in squares:
        table = _cayley_dickson(table, gamma)
    return table


_TABLES = {name: _doubled(squares) for name, squares in _SQUARES.items()}


def sign_table(algebra: Algebra) -> list[list[float]]:
    """Return the C x C table of an algebra: (x y)_c = sum_i table[c][i] x_i y_(i ^ c)."""
    if isinstance(algebra, str):
        if algebra in _TABLES:
            return _TABLES[algebra]
    else:
        try:
            values = np.asarray(algebra, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.shape == (2,):
            return _doubled(values.tolist())
        if values.shape in ((2, 2), (4, 4), (8, 8)):
            return values.tolist()  # type: ignore[no-any-return]
    raise ValueError(
        f"hypercomplex: algebra must be one of {', '.join(map(repr, _TABLES))}, a pair (a, b) or a C x C table, "
        f"got {algebra!r}"
    )


def flat_table(algebra: Algebra) -> list[float]:
    """Return `sign_table` as the flat list that kernels take."""
    return [value for row in sign_table(algebra) for value in row]


def _component_axis(op: str, axis: int, ndim: int) -> bool:
    """Return whether the components are the last axis (interleaved) rather than the last but one (planar)."""
    if axis not in (-1, -2) and axis not in (ndim - 1, ndim - 2):
        raise ValueError(f"{op}: axis must be -2 (planar) or -1 (interleaved), got {axis}")
    return axis in (-1, ndim - 1)


def _check_components(op: str, name: str, x: Any, interleaved: bool, components: int | None) -> None:
    if len(x.shape) < (1 if interleaved else 2):
        raise ValueError(f"{op}: {name} must have {'1 axis' if interleaved else '2 axes'} or more, got {len(x.shape)}")
    found = x.shape[-1 if interleaved else -2]
    if components is None and found not in (2, 4, 8):
        raise ValueError(f"{op}: {name} must have 2, 4 or 8 components on its component axis, got {found}")
    if components is not None and found != components:
        raise ValueError(f"{op}: {name} must have {components} components for this algebra, got {found}")


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    if tuple(x.shape) == shape:
        return x
    return x.broadcast_to(shape) if is_torch(x) else namespace(x).broadcast_to(x, shape)


def product(
    x: ArrayT,
    y: ArrayT,
    *,
    algebra: Algebra = "quaternion",
    axis: int = -2,
    out: ArrayT | None = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Multiply hypercomplex numbers: `out = x (*) y`, number by number; not commutative.

    For the algebra i^2 = a, j^2 = b, k = ij = -ji, with x = (s, x, y, z) and y = (s', x', y', z')::

        out_0 = s s' + a x x' + b y y' - a b z z'      out_2 = s y' + y s' + a x z' - a z x'
        out_1 = s x' + x s' - b y z' + b z y'          out_3 = s z' + z s' + x y' - y x'

    Parameters
    ----------
    x, y : arrays of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        The left and the right factor, of one dtype. Leading axes (and d) broadcast.
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
        C is 4, 4, 2, 8, and 4.
    axis : {-2, -1}
        Where the components are: -2 planar (fastest), -1 interleaved.
    out : array of the broadcast shape, optional
        Written and returned. It must not overlap x or y.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of the broadcast shape, x's dtype, library and device

    Raises
    ------
    ValueError
        Shapes that do not broadcast, a component axis of the wrong length, an unknown algebra.
    TypeError
        Dtypes other than float32 and float64, or two different ones.

    Notes
    -----
    Accumulates in the input's dtype: each component is a sum of C products. 2 C^2 flops and 3 C elements of traffic
    a number: memory-bound. The gradient of either factor is the same kernel with another table
    (`polyvec.torch.product`).

    References
    ----------
    Robin, Lion and Tetra (S01): language-model-augmented dihedron and quaternion embeddings, scoring function.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> i, j = np.eye(4, dtype=np.float32)[1:3]
    >>> pv.hypercomplex.product(i, j, axis=-1)
    array([0., 0., 0., 1.], dtype=float32)
    """
    op = "hypercomplex.product"
    table = flat_table(algebra)
    components = len(sign_table(algebra))
    left: Any = as_array(op, "x", x, dtypes=_FLOATS, dense=False)
    right: Any = as_array(op, "y", y, dtypes=(dtype_name(left),), dense=False)
    interleaved = _component_axis(op, axis, len(left.shape))
    _check_components(op, "x", left, interleaved, components)
    _check_components(op, "y", right, interleaved, components)
    shape = tuple(left.shape)
    if tuple(right.shape) != shape:
        try:
            shape = np.broadcast_shapes(shape, tuple(right.shape))
        except ValueError:
            raise ValueError(f"{op}: y must broadcast against x {shape}, got {tuple(right.shape)}") from None
    left, right = (_kernel_view(a, shape, interleaved) for a in (left, right))
    out = output(op, out, left, shape, dtype_name(left))
    _backend.run(op, "hypercomplex_product", left, left, right, out, table, interleaved, num_threads=num_threads)
    return out


def _kernel_view(x: Any, shape: tuple[int, ...], interleaved: bool) -> Any:
    """Broadcast `x` to `shape` without a copy where kernels can read it so: planar, with dense last two axes."""
    planar_dense = not interleaved and tuple(x.shape[-2:]) == shape[-2:] and len(shape) <= 8
    if not planar_dense:
        return contiguous(_broadcast(x, shape))
    return _broadcast(contiguous(x), shape)


def _map(op: str, x: Any, axis: int, out: Any, num_threads: int | None, *, keeps_shape: bool) -> Any:
    value = as_array(op, "x", x, dtypes=_FLOATS)
    interleaved = _component_axis(op, axis, len(value.shape))
    _check_components(op, "x", value, interleaved, None)
    shape = tuple(value.shape)
    if not keeps_shape:
        shape = shape[:-1] if interleaved else (*shape[:-2], shape[-1])
    out = output(op, out, value, shape, dtype_name(value))
    _backend.run(op, op.replace(".", "_"), value, value, out, interleaved, num_threads=num_threads)
    return out


def conjugate(x: ArrayT, *, axis: int = -2, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
    """Negate all components but the first.

    Parameters
    ----------
    x : array of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        C = 2, 4 or 8.
    axis, out, num_threads
        As for `product`.

    Returns
    -------
    array of x's shape, dtype, library and device

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.hypercomplex.conjugate(np.float32([1, 2, 3, 4]), axis=-1)
    array([ 1., -2., -3., -4.], dtype=float32)
    """
    return _map("hypercomplex.conjugate", x, axis, out, num_threads, keeps_shape=True)  # type: ignore[no-any-return]


def norm(x: ArrayT, *, axis: int = -2, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
    """Return the Euclidean norm of each number: the square root of the sum of its squared components.

    It is the same for every algebra; for dihedrons it is not the algebra's own (indefinite) norm, which the models of
    S01 do not use either.

    Parameters
    ----------
    x : array of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        C = 2, 4 or 8.
    axis, out, num_threads
        As for `product`.

    Returns
    -------
    array of shape (..., d), or (...) with axis=-1; x's dtype, library and device

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.hypercomplex.norm(np.float32([[3, 4, 0, 0], [1, 1, 1, 1]]), axis=-1)
    array([5., 2.], dtype=float32)
    """
    return _map("hypercomplex.norm", x, axis, out, num_threads, keeps_shape=False)  # type: ignore[no-any-return]


def normalize(x: ArrayT, *, axis: int = -2, out: ArrayT | None = None, num_threads: int | None = None) -> ArrayT:
    """Divide each number by its Euclidean norm; a number of norm 0 stays 0.

    Parameters
    ----------
    x : array of shape (..., C, d), or (..., C) with axis=-1; float32 | float64
        C = 2, 4 or 8.
    axis, out, num_threads
        As for `product`.

    Returns
    -------
    array of x's shape, dtype, library and device

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> pv.hypercomplex.normalize(np.float32([[3, 0, 0, 0], [0, 0, 0, 0]]), axis=-1)
    array([[1., 0., 0., 0.],
           [0., 0., 0., 0.]], dtype=float32)
    """
    return _map("hypercomplex.normalize", x, axis, out, num_threads, keeps_shape=True)  # type: ignore[no-any-return]


def relation_query(
    entities: ArrayT,
    relations: ArrayT,
    head_ids: Any,
    relation_ids: Any,
    *,
    algebra: Algebra = "quaternion",
    rotate_by: str = "relation",
    translations: ArrayT | None = None,
    head_translations: ArrayT | None = None,
    normalize: bool = True,
    adjoint: bool = False,
    out: ArrayT | None = None,
    num_threads: int | None = None,
) -> ArrayT:
    """Compose (head, relation) pairs into query vectors, so that the score of a tail is an inner product.

    `out[i] = entities[head_ids[i]] (*) r / |r| + translations[relation_ids[i]] + head_translations[head_ids[i]]` with
    `r = relations[relation_ids[i]]`, flattened to C * d: gathered, normalised, rotated and translated in one pass.

    Parameters
    ----------
    entities : array of shape (N, C, d), float32 | float64
    relations : array of shape (R, C, d), entities' dtype
        The rotors; (N, C, d) with rotate_by="head".
    head_ids, relation_ids : integer arrays of shape (n,)
        Rows of `entities` (and `head_translations`), and of `relations` and `translations`.
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
    rotate_by : {"relation", "head"}
        "head": each entity has a rotor of its own, made of its text: `r = relations[head_ids[i]]`.
    translations : array of shape (R, C, d), optional
        Added after the rotation: one a relation.
    head_translations : array of shape (N, C, d), optional
        Added after the rotation: one a head.
    normalize : bool
        Divide each rotor by its Euclidean norm, number by number (a rotor of norm 0 gives 0).
    adjoint : bool
        Apply the transposed rotation: with tails as `head_ids` this gives the queries that find heads, since
        <h (*) r, t> = <h, adjoint query of (t, r)>. Takes no translations: theirs is a constant of the (r, t) pair;
        and only rotate_by="relation", for a rotor of the head is not known.
    out : array of shape (n, C * d), optional
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    array of shape (n, C * d), entities' dtype, library and device

    Raises
    ------
    ValueError
        Shapes that do not fit each other or the algebra; translations or rotate_by="head" with `adjoint`.
    TypeError
        Dtypes other than float32 and float64, or mixed ones.
    IndexError
        An id outside its table. On a GPU ids cannot be checked without waiting for it: there such a row becomes NaN.

    Notes
    -----
    Reads each gathered row once and writes the result once: 3 C d elements of traffic a query, C d more for each kind
    of translations. Memory is the limit: heads are rows anywhere in it.

    The models that join text vectors with a graph (C = 4, score -|q - t|^2 + b_h + b_t):

    - Tetra: an entity is `[embedding, text1, text2, text3]`, d numbers each, on both sides of the score;
      `relation_query(np.stack([embedding, text1, text2, text3], 1), relations, ...)`.
    - Robin and Lion (which differ in the language models behind text1 and text2): the head's text is its rotor, and
      its text and the relation translate; `relation_query(entities, np.concatenate([text1, text2], 1), ...,
      rotate_by="head", translations=relations, head_translations=text)`, text1 and text2 being (N, 2, d), and text
      (N, 4, d) the sum of another projection of each.

    `examples/text_and_knowledge_graphs.py` has them in full; `retrieve.LinkPredictor` takes the same arguments.

    References
    ----------
    Integrating Knowledge Graph Embedding and Pretrained Language Models in Hypercomplex Spaces (Nayyeri et al. 2022),
    section 4: Robin, Lion, Tetra (S01); QuatE (Zhang et al. 2019), section 4.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> entities = np.ones((3, 4, 2), np.float32)
    >>> relations = np.zeros((1, 4, 2), np.float32)
    >>> relations[0, 0] = 5.0  # a real rotor turns nothing, and its length does not count
    >>> pv.hypercomplex.relation_query(entities, relations, [2], [0])
    array([[1., 1., 1., 1., 1., 1., 1., 1.]], dtype=float32)
    """
    op = "hypercomplex.relation_query"
    choice(op, "rotate_by", rotate_by, ("relation", "head"))
    if adjoint and (translations is not None or head_translations is not None):
        name = "head_translations" if translations is None else "translations"
        raise ValueError(f"{op}: {name} must be None with adjoint=True, got an array")
    if adjoint and rotate_by == "head":
        raise ValueError(f"{op}: rotate_by must be 'relation' with adjoint=True, got 'head'")
    if adjoint:  # <x (*) y, g> = <x, g (*)' y>, where (*)' has the transposed table
        algebra = list(zip(*sign_table(algebra), strict=True))
    table: Any = as_array(op, "entities", entities, dtypes=_FLOATS, ndim=3)
    dtype = (dtype_name(table),)
    rotors = as_array(op, "relations", relations, dtypes=dtype, ndim=3)
    shifts = [
        None if shift is None else as_array(op, name, shift, dtypes=dtype, ndim=3)
        for name, shift in (("translations", translations), ("head_translations", head_translations))
    ]
    heads, relation_rows = (
        as_ids(op, name, ids, like=table) for name, ids in (("head_ids", head_ids), ("relation_ids", relation_ids))
    )
    _check_components(op, "entities", table, False, len(sign_table(algebra)))
    out = output(op, out, table, (int(heads.shape[0]), int(table.shape[1] * table.shape[2])), dtype[0])
    _backend.run(
        op, "hypercomplex_relation_query", table,
        table, rotors, heads, relation_rows, *shifts, out,
        flat_table(algebra), normalize, rotate_by == "head",
        num_threads=num_threads,
    )  # fmt: skip
    return out


_FLOWS = ("wasserstein", "piecewise", "kl")  # in the order of the C++ enum


def _flow_outputs(op: str, out: Any, like: Any, n: int, second: str) -> tuple[Any, Any]:
    """Return the (n, parts * d) and the (n,) array that a flow writes."""
    if out is None:
        out = (None, None)
    first = "queries" if second == "offset" else "items"
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{op}: out must be a pair of arrays ({first}, {second}), got {type(out).__name__}")
    shapes = (n, int(like.shape[1] * like.shape[2])), (n,)
    names = f"out {first}", f"out {second}"
    vectors, numbers = (
        output(op, array, like, shape, dtype_name(like), name=name)
        for array, shape, name in zip(out, shapes, names, strict=True)
    )
    return vectors, numbers


def flow_query(
    entities: ArrayT,
    relations: ArrayT,
    head_ids: Any,
    relation_ids: Any,
    *,
    kind: str = "wasserstein",
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Compose (head, relation) pairs of normalising-flow embeddings into query vectors.

    An entity is a random variable, by a mean and a scale a dimension; a relation maps it, `m = r_s * h_m + r_m` and
    `a = |r_s * h_s|`; the score of a tail (t, b = |t_s|) is minus the distance of the two distributions:

    - "wasserstein": `|m - t|^2 + |a - b|^2`.
    - "piecewise", with two scales: `|m - t|^2 + (|a1 - b1|^2 + |a2 - b2|^2) / 2 + c (m - t) . (a2 - a1 + b1 - b2)`,
      `c = sqrt(2 / pi)`.
    - "kl": `sum a^2 / (2 b^2) - log a + log b - 1/2 + (m - t)^2 / (2 b^2)`, with
      `a = softplus(r_s) softplus(h_s)` and `b = softplus(t_s)`.

    Each is an inner product: `-distance = queries . items + bias + offset`, items and bias being those of `flow_keys`.

    Parameters
    ----------
    entities : array of shape (N, 2, d), float32 | float64
        Means, scales; (N, 3, d) for "piecewise": means, first scales, second scales.
    relations : array of shape (R, 2, d), entities' dtype
        Means r_m, scales r_s.
    head_ids, relation_ids : integer arrays of shape (n,)
        Rows of `entities` and of `relations`.
    kind : {"wasserstein", "piecewise", "kl"}
    out : pair of arrays, optional
        (queries, offset) of the returned shapes and dtype.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    queries : array of shape (n, 2 * d), or (n, 3 * d) for "piecewise"; entities' dtype, library and device
    offset : array of shape (n,)
        What the pair adds to every score: it changes no ranking.

    Raises
    ------
    ValueError
        Shapes that do not fit each other or the kind, an unknown kind.
    TypeError
        Dtypes other than float32 and float64, or mixed ones.
    IndexError
        An id outside its table. On a GPU such a row becomes NaN.

    Notes
    -----
    `scan.topk(queries, items, k, bias=bias)` and `scan.rank` predict tails: one product 3 d wide where the definition
    of "piecewise" has five d wide, 2 d for the three of "kl". A score is a difference of larger terms: its error is
    about 1e-7 (float32) of |m|^2 + |t|^2, not of the distance. "kl" needs scales above -40 (float32): at -45 the
    inverse square of softplus overflows. The paper adds a margin to all scores, which changes no ranking, either.

    References
    ----------
    Knowledge Graph Embedding by Normalizing Flows (Xiao et al. 2023; S03), NFE-1, NFE-2 and NFE-3.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> entities = np.float32([[[1], [1]], [[2], [3]]])  # mean 1 and scale 1, mean 2 and scale 3
    >>> relations = np.float32([[[1], [2]]])  # times 2, plus 1
    >>> queries, offset = pv.hypercomplex.flow_query(entities, relations, [0], [0])
    >>> items, bias = pv.hypercomplex.flow_keys(entities)
    >>> queries @ items.T + bias + offset[:, None]  # mean 3 and scale 2: -(2^2 + 1^2) and -(1^2 + 1^2)
    array([[-5., -2.]], dtype=float32)
    """
    op = "hypercomplex.flow_query"
    choice(op, "kind", kind, _FLOWS)
    table: Any = as_array(op, "entities", entities, dtypes=_FLOATS, ndim=3)
    maps = as_array(op, "relations", relations, dtypes=(dtype_name(table),), ndim=3)
    ids = [as_ids(op, name, i, like=table) for name, i in (("head_ids", head_ids), ("relation_ids", relation_ids))]
    queries, offset = _flow_outputs(op, out, table, int(ids[0].shape[0]), "offset")
    _backend.run(
        op, "hypercomplex_flow_query", table,
        table, maps, *ids, queries, offset, _FLOWS.index(kind),
        num_threads=num_threads,
    )  # fmt: skip
    return queries, offset


def flow_keys(
    entities: ArrayT,
    *,
    kind: str = "wasserstein",
    out: tuple[Any, Any] | None = None,
    num_threads: int | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Turn entities of normalising-flow embeddings into the items that `flow_query`'s queries are compared with.

    Parameters
    ----------
    entities : array of shape (N, 2, d), float32 | float64
        Means, scales; (N, 3, d) for "piecewise": means, first scales, second scales.
    kind : {"wasserstein", "piecewise", "kl"}
    out : pair of arrays, optional
        (items, bias) of the returned shapes and dtype.
    num_threads : int, optional
        CPU threads; the process setting when None.

    Returns
    -------
    items : array of shape (N, 2 * d), or (N, 3 * d) for "piecewise"; entities' dtype, library and device
    bias : array of shape (N,)
        Added to the score of each item: the `bias` of `scan.topk` and `scan.rank`.

    Raises
    ------
    ValueError
        A shape that does not fit the kind, an unknown kind.
    TypeError
        A dtype other than float32 and float64.

    Examples
    --------
    >>> import numpy as np, polyvec as pv
    >>> entities = np.float32([[[1], [1]], [[2], [3]]])
    >>> relations = np.float32([[[1], [2]]])
    >>> queries, offset = pv.hypercomplex.flow_query(entities, relations, [0], [0])
    >>> items, bias = pv.hypercomplex.flow_keys(entities)
    >>> scores, ids = pv.scan.topk(queries, items, 1, bias=bias)
    >>> ids, scores + offset
    (array([[1]]), array([[-2.]], dtype=float32))
    """
    op = "hypercomplex.flow_keys"
    choice(op, "kind", kind, _FLOWS)
    table: Any = as_array(op, "entities", entities, dtypes=_FLOATS, ndim=3)
    items, bias = _flow_outputs(op, out, table, int(table.shape[0]), "bias")
    _backend.run(op, "hypercomplex_flow_keys", table, table, items, bias, _FLOWS.index(kind), num_threads=num_threads)
    return items, bias


def sum_products(x: Any, y: Any, x_ids: Any, y_ids: Any, out_ids: Any, rows: int, *, algebra: Algebra) -> Any:
    """Return out (rows, C, d) with out[k] = sum of x[x_ids[i]] (*) y[y_ids[i]] over the i with out_ids[i] = k.

    Not public: the gradients of relation queries, and the gradients of these, for `polyvec.torch`.
    """
    op = "hypercomplex.sum_products"
    left: Any = as_array(op, "x", x, dtypes=_FLOATS, ndim=3)
    right = as_array(op, "y", y, dtypes=(dtype_name(left),), ndim=3)
    ids = [as_ids(op, name, i) for name, i in (("x_ids", x_ids), ("y_ids", y_ids), ("out_ids", out_ids))]
    out = empty(left, (rows, int(left.shape[1]), int(left.shape[2])), dtype_name(left))
    _backend.run(op, "hypercomplex_sum_products", left, left, right, *ids, out, flat_table(algebra))
    return out
