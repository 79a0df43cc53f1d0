"""Hypercomplex products, norms and the fused relation query."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polyvec as pv
from accuracy import assert_elementwise, assert_exact, assert_reduction, on_host
from reference import hypercomplex as ref

ALGEBRAS = {"complex": 2, "quaternion": 4, "dihedron": 4, (0.5, -2.0): 4, "octonion": 8}
WIDTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 19, 33, 35, 64, 65, 130]


def sample(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def scale(x, y, algebra):
    """Sum of absolute products: the size that rounding errors are measured against."""
    weight = max(1.0, *(abs(v) for v in algebra)) ** 2 if isinstance(algebra, tuple) else 1.0
    return weight * np.sqrt((x.astype(np.float64) ** 2).sum(-2) * (y.astype(np.float64) ** 2).sum(-2))[..., None, :]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_product_equals_the_definition(rng, isa, on_device, algebra, d, dtype):
    x, y = (sample(rng, 3, ALGEBRAS[algebra], d, dtype=dtype) for _ in range(2))
    result = pv.hypercomplex.product(on_device(x), on_device(y), algebra=algebra)
    assert_elementwise(result, ref.product(x, y, algebra), scale(x, y, algebra))


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 255, 256, 257, 600])
def test_interleaved_product_is_the_planar_one(rng, isa, on_device, algebra, n):
    x, y = (on_device(sample(rng, n, ALGEBRAS[algebra])) for _ in range(2))
    planar = pv.hypercomplex.product(x.T, y.T, algebra=algebra)
    assert_exact(pv.hypercomplex.product(x, y, algebra=algebra, axis=-1), planar.T)


def test_dihedrons_multiply_as_matrices(rng):
    x, y = (sample(rng, 50, 4, dtype=np.float64) for _ in range(2))
    product = pv.hypercomplex.product(x, y, algebra="dihedron", axis=-1)
    np.testing.assert_allclose(ref.matrix(product), ref.matrix(x) @ ref.matrix(y), rtol=0, atol=1e-13)


def test_an_algebra_may_be_given_by_its_table(rng):
    x, y = (sample(rng, 2, 9, dtype=np.float64) for _ in range(2))
    hyperbolic = pv.hypercomplex.product(x, y, algebra=[[1, 1], [1, 1]])  # j^2 = 1
    assert_elementwise(hyperbolic, np.stack([x[0] * y[0] + x[1] * y[1], x[0] * y[1] + x[1] * y[0]]), scale(x, y, ""))


@pytest.mark.parametrize(("algebra", "composes"), [("quaternion", True), ("octonion", True), ("dihedron", False)])
def test_norms_multiply_in_the_division_algebras_only(rng, algebra, composes):
    x, y = (sample(rng, ALGEBRAS[algebra], 40, dtype=np.float64) for _ in range(2))
    norm = pv.hypercomplex.norm
    equal = np.allclose(norm(pv.hypercomplex.product(x, y, algebra=algebra)), norm(x) * norm(y), rtol=1e-12)
    assert equal == composes


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    drop=st.integers(0, 3),
    ones=st.lists(st.booleans(), min_size=5, max_size=5),
    swap=st.booleans(),
    d=st.integers(0, 9),
)
def test_leading_axes_broadcast_like_numpy(on_device, leading, drop, ones, swap, d):
    rng = np.random.default_rng(d)
    shape = (*leading, 4, d)
    other = (*tuple(1 if one else n for one, n in zip(ones, leading, strict=False))[drop:], 4, 1 if ones[-1] else d)
    x, y = sample(rng, *shape), sample(rng, *other)
    if swap:
        x, y = y, x
    result = pv.hypercomplex.product(on_device(x), on_device(y))
    expected = ref.product(*(np.broadcast_arrays(x, y)))
    assert_elementwise(result, expected, scale(*np.broadcast_arrays(x, y), "quaternion"))


def test_strided_and_unaligned_inputs(rng, isa, on_device):
    big = sample(rng, 6, 4, 40)
    x, y = big[::2, :, 1:18], big[1::2, :, 3:20]
    dense = pv.hypercomplex.product(on_device(x.copy()), on_device(y.copy()))
    big = on_device(big)
    assert_exact(pv.hypercomplex.product(big[::2, :, 1:18], big[1::2, :, 3:20]), dense)
    assert_exact(
        pv.hypercomplex.product(big.swapaxes(1, 2), big.swapaxes(1, 2), axis=-1),
        pv.hypercomplex.product(big, big).swapaxes(1, 2),
    )


@pytest.mark.parametrize("d", [1, 16, 33])
@pytest.mark.parametrize("components", [2, 4, 8])
def test_norm_normalize_conjugate(rng, isa, on_device, components, d):
    x = sample(rng, 5, components, d)
    x[2, :, 0] = 0
    norms, numbers = ref.norm(x), ref.normalize(x)
    conjugates = ref.conjugate(x)
    x = on_device(x)
    assert_elementwise(pv.hypercomplex.norm(x), norms, norms)
    assert_elementwise(pv.hypercomplex.normalize(x), numbers, 1)
    assert_exact(pv.hypercomplex.normalize(x)[2, :, 0], np.zeros(components))
    assert_exact(pv.hypercomplex.conjugate(x), conjugates)
    last = x.swapaxes(1, 2)
    for function in (pv.hypercomplex.normalize, pv.hypercomplex.conjugate):
        assert_exact(function(last, axis=-1), function(x).swapaxes(1, 2))
    assert_exact(pv.hypercomplex.norm(last, axis=-1), pv.hypercomplex.norm(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
def test_relation_query_equals_the_definition(rng, isa, on_device, algebra, normalize, translated, dtype):
    components = ALGEBRAS[algebra]
    entities, relations, shifts = (sample(rng, n, components, 67, dtype=dtype) for n in (13, 5, 5))
    heads, relation_ids = rng.integers(0, 13, 21), rng.integers(0, 5, 21)
    shifts = shifts if translated else None
    tables = [on_device(entities), on_device(relations), on_device(heads), on_device(relation_ids)]
    translations = on_device(shifts) if translated else None
    result = pv.hypercomplex.relation_query(*tables, algebra=algebra, translations=translations, normalize=normalize)
    expected = ref.relation_query(entities, relations, heads, relation_ids, algebra, shifts, normalize)
    rotor_size = 1 if normalize else ref.norm(relations)[relation_ids]
    size = np.repeat((ref.norm(entities)[heads] * rotor_size + 3)[:, None, :], components, 1).reshape(21, -1)
    assert_elementwise(result, expected, size * (4 if isinstance(algebra, tuple) else 1))


@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
@pytest.mark.parametrize("d", [1, 16, 35])
def test_a_head_may_bring_its_own_rotor_and_translation(rng, isa, on_device, algebra, d, translated):
    components = ALGEBRAS[algebra]
    entities, rotors, texts = (sample(rng, 13, components, d) for _ in range(3))
    relations = sample(rng, 5, components, d) if translated else None  # without: relation_ids name nothing
    heads, relation_ids = rng.integers(0, 13, 21), rng.integers(0, 5, 21)
    result = pv.hypercomplex.relation_query(
        *map(on_device, (entities, rotors, heads, relation_ids)),
        algebra=algebra,
        rotate_by="head",
        translations=on_device(relations) if translated else None,
        head_translations=on_device(texts),
    )
    expected = ref.relation_query(
        entities, rotors, heads, relation_ids, algebra, relations, rotate_by="head", head_translations=texts
    )
    size = np.repeat((ref.norm(entities)[heads] + 6)[:, None, :], components, 1).reshape(21, -1)
    assert_elementwise(result, expected, size * (4 if isinstance(algebra, tuple) else 1))


@pytest.mark.parametrize("algebra", ["quaternion", "dihedron"])
def test_robin_lion_and_tetra_are_relation_queries(rng, algebra):
    n, d = 9, 6
    entities, relations = sample(rng, n, 4, d, dtype=np.float64), sample(rng, 3, 4, d, dtype=np.float64)
    u, v = (sample(rng, n, 2, d, dtype=np.float64) for _ in range(2))
    u_shift, v_shift = (sample(rng, n, 4, d, dtype=np.float64) for _ in range(2))
    embedding, *texts = (sample(rng, n, d, dtype=np.float64) for _ in range(4))
    heads, relation_ids, tails = rng.integers(0, n, 20), rng.integers(0, 3, 20), rng.integers(0, n, 20)

    robin = pv.hypercomplex.relation_query(
        entities,
        np.concatenate([u, v], 1),
        heads,
        relation_ids,
        algebra=algebra,
        rotate_by="head",
        translations=relations,
        head_translations=u_shift + v_shift,
    )
    stacked = np.stack([embedding, *texts], 1)
    tetra = pv.hypercomplex.relation_query(stacked, relations, heads, relation_ids, algebra=algebra)
    for i, (h, r, t) in enumerate(zip(heads, relation_ids, tails, strict=True)):
        expected = ref.robin_score(
            entities[h], (u[h], v[h]), relations[r], (u_shift[h], v_shift[h]), entities[t], algebra
        )
        assert_elementwise(-np.square(robin[i] - entities[t].ravel()).sum(), expected, 4 * abs(expected))
        expected = ref.tetra_score(
            embedding[h], [x[h] for x in texts], relations[r], embedding[t], [x[t] for x in texts], algebra
        )
        assert_elementwise(-np.square(tetra[i] - stacked[t].ravel()).sum(), expected, 4 * abs(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 60, 300])
@pytest.mark.parametrize("d", [35, 32])
def test_sums_of_products_equal_the_definition(rng, isa, on_device, algebra, n, d, dtype):
    components = ALGEBRAS[algebra]
    x, y = (sample(rng, rows, components, d, dtype=dtype) for rows in (5, 7))
    x_ids, y_ids, out_ids = (rng.integers(0, rows, n) for rows in (5, 7, 6))
    out_ids[out_ids == 3] = 2  # a row without products is zero
    ids = [x_ids, y_ids, out_ids]
    result = pv.hypercomplex.sum_products(on_device(x), on_device(y), *map(on_device, ids), 6, algebra=algebra)
    weight = 4 if isinstance(algebra, tuple) else 1
    size = np.zeros((6, 1, d))
    np.add.at(size, out_ids, (ref.norm(x)[x_ids] * ref.norm(y)[y_ids])[:, None])
    assert_elementwise(result, ref.sum_products(x, y, *ids, 6, algebra), np.broadcast_to(weight * size, result.shape))
    assert_exact(result[3], np.zeros((components, d)))


FLOWS = {"wasserstein": 2, "piecewise": 3, "kl": 2}


def sample_flow(rng, kind, d, dtype):
    """Entities, relations, head ids, relation ids; scales of either sign."""
    entities, relations = (sample(rng, n, parts, d, dtype=dtype) for n, parts in ((9, FLOWS[kind]), (3, 2)))
    return entities, relations, rng.integers(0, 9, 14), rng.integers(0, 3, 14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("d", WIDTHS)
def test_flow_scores_are_inner_products(rng, isa, on_device, kind, d, dtype):
    entities, relations, heads, relation_ids = sample_flow(rng, kind, d, dtype)
    queries, offset = pv.hypercomplex.flow_query(*map(on_device, (entities, relations, heads, relation_ids)), kind=kind)
    items, bias = pv.hypercomplex.flow_keys(on_device(entities), kind=kind)
    q, o, x, b = (on_host(a).astype(np.float64) for a in (queries, offset, items, bias))
    scores = (q @ x.T + b + o[:, None]).astype(dtype)
    expected = np.array(
        [
            [-ref.flow_distance(entities[h], relations[r], tail, kind) for tail in entities]
            for h, r in zip(heads, relation_ids, strict=True)
        ]
    )
    size = np.abs(q) @ np.abs(x).T + np.abs(b) + np.abs(o)[:, None] + d
    assert_reduction(scores, expected.reshape(scores.shape), size, length=max(1, items.shape[1]))


@pytest.mark.parametrize("kind", FLOWS)
def test_scans_rank_tails_by_the_distance_of_flows(rng, kind):
    entities, relations, heads, relation_ids = sample_flow(rng, kind, 20, np.float32)
    queries, _ = pv.hypercomplex.flow_query(entities, relations, heads, relation_ids, kind=kind)
    items, bias = pv.hypercomplex.flow_keys(entities, kind=kind)
    _, ids = pv.scan.topk(queries, items, 9, bias=bias)
    targets = rng.integers(0, 9, 14)
    ranks = pv.scan.rank(queries, items, targets, bias=bias)
    for i, (h, r) in enumerate(zip(heads, relation_ids, strict=True)):
        distances = [ref.flow_distance(entities[h], relations[r], tail, kind) for tail in entities]
        assert_exact(ids[i], np.argsort(distances))
        assert ranks[i] == 1 + np.argsort(np.argsort(distances))[targets[i]]


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_write_to_out(rng, lib, kind):
    entities, relations, heads, relation_ids = (lib(a) for a in sample_flow(rng, kind, 5, np.float32))
    for function, arguments in (
        (pv.hypercomplex.flow_query, (entities, relations, heads, relation_ids)),
        (pv.hypercomplex.flow_keys, (entities,)),
    ):
        fresh = function(*arguments, kind=kind)
        assert all(type(array) is type(entities) for array in fresh)
        out = tuple(lib(np.full(tuple(array.shape), np.nan, np.float32)) for array in fresh)
        given = function(*arguments, kind=kind, out=out)
        assert all(a is b for a, b in zip(given, out, strict=True))
        for a, b in zip(given, fresh, strict=True):
            assert_exact(a, b)


def test_softplus_neither_overflows_nor_loses_small_scales():
    scales = np.float32([-40, -20, 0, 200])
    entities = np.stack([np.ones(4, np.float32), scales])[None]
    items, bias = pv.hypercomplex.flow_keys(entities, kind="kl")
    b = ref.softplus(scales.astype(np.float64))
    assert_elementwise(items[0], np.concatenate([b**-2, b**-2]), np.concatenate([b**-2, b**-2]))
    assert_reduction(bias[0], -(np.log(b) + 0.5 * b**-2).sum(), (np.abs(np.log(b)) + 0.5 * b**-2).sum(), length=4)


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
def test_result_does_not_depend_on_thread_count(rng, algebra):
    x, y = (sample(rng, 2000, ALGEBRAS[algebra], 37) for _ in range(2))
    ids = rng.integers(0, 2000, 3001)

    def sums(threads):
        before = pv.get_num_threads()
        pv.set_num_threads(threads)
        try:
            return pv.hypercomplex.sum_products(x, y, ids, ids[::-1], ids // 50, 41, algebra=algebra)
        finally:
            pv.set_num_threads(before)

    one, two, seven = (
        (
            pv.hypercomplex.product(x, y, algebra=algebra, num_threads=n),
            pv.hypercomplex.normalize(x, num_threads=n),
            pv.hypercomplex.relation_query(x, y, ids, ids[::-1], algebra=algebra, num_threads=n),
            sums(n),
            *pv.hypercomplex.flow_query(x[:, :2], y[:, :2], ids % 2000, ids, kind="kl", num_threads=n),
            *pv.hypercomplex.flow_keys(x[:, :2], num_threads=n),
        )
        for n in (1, 2, 7)
    )
    for a, b, c in zip(one, two, seven, strict=True):
        assert_exact(a, b)
        assert_exact(a, c)


def test_the_caller_gets_the_library_it_gave(rng, lib):
    x = lib(sample(rng, 3, 4, 5))
    for result in (
        pv.hypercomplex.product(x, x),
        pv.hypercomplex.norm(x),
        pv.hypercomplex.relation_query(x, x, [0, 1], [2, 2]),
    ):
        assert type(result) is type(x)
    out = lib(np.full((3, 4, 5), np.nan, np.float32))  # whatever is not written stays NaN
    assert pv.hypercomplex.product(x, x, out=out) is out
    assert_exact(out, pv.hypercomplex.product(x, x))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pv.hypercomplex.product(zeros(2, 4, 3), zeros(2, 3, 3)),
            ValueError,
            "hypercomplex.product: y must have 4 components for this algebra, got 3",
        ),
        (
            lambda: pv.hypercomplex.product(zeros(2, 4, 3), zeros(3, 4, 3)),
            ValueError,
            "hypercomplex.product: y must broadcast against x (2, 4, 3), got (3, 4, 3)",
        ),
        (
            lambda: pv.hypercomplex.product(zeros(4, 3, dtype=np.float16), zeros(4, 3)),
            TypeError,
            "hypercomplex.product: x must be float32 or float64, got float16; cast it with .astype('float32')",
        ),
        (
            lambda: pv.hypercomplex.product(zeros(4, 3), zeros(4, 3), axis=0 - 3),
            ValueError,
            "hypercomplex.product: axis must be -2 (planar) or -1 (interleaved), got -3",
        ),
        (
            lambda: pv.hypercomplex.product(zeros(4, 3), zeros(4, 3), algebra="sedenion"),
            ValueError,
            "hypercomplex: algebra must be one of 'complex', 'quaternion', 'dihedron', 'octonion', a pair (a, b) or a "
            "C x C table, got 'sedenion'",
        ),
        (
            lambda: pv.hypercomplex.product(zeros(4, 3), zeros(4, 3), algebra=(1.0, 2.0, 3.0)),
            ValueError,
            "hypercomplex: algebra must be one of 'complex', 'quaternion', 'dihedron', 'octonion', a pair (a, b) or a "
            "C x C table, got (1.0, 2.0, 3.0)",
        ),
        (
            lambda: pv.hypercomplex.norm(zeros(3, 3)),
            ValueError,
            "hypercomplex.norm: x must have 2, 4 or 8 components on its component axis, got 3",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 2), [0, 3], [0, 0]),
            IndexError,
            "hypercomplex.relation_query: head_ids must be in [0, 3), got 3 at position 1",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 2), [0, 1], [0, -1]),
            IndexError,
            "hypercomplex.relation_query: relation_ids must be in [0, 2), got -1 at position 1",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 5), [0], [0]),
            ValueError,
            "hypercomplex.relation_query: relations must have the same last two axes as entities (4, 2), got (4, 5)",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 2), [0], [0], rotate_by="head"),
            ValueError,
            "hypercomplex.relation_query: relations must have as many rows as entities (3), got 2",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 2), [0], [0], rotate_by="tail"),
            ValueError,
            "hypercomplex.relation_query: rotate_by must be one of 'relation', 'head', got 'tail'",
        ),
        (
            lambda: pv.hypercomplex.relation_query(
                zeros(3, 4, 2), zeros(2, 4, 2), [0], [0], head_translations=zeros(2, 4, 2)
            ),
            ValueError,
            "hypercomplex.relation_query: head_translations must have as many rows as entities (3), got 2",
        ),
        (
            lambda: pv.hypercomplex.relation_query(
                zeros(3, 4, 2), zeros(3, 4, 2), [0], [2], rotate_by="head", translations=zeros(2, 4, 2)
            ),
            IndexError,
            "hypercomplex.relation_query: relation_ids must be in [0, 2), got 2 at position 0",
        ),
        (
            lambda: pv.hypercomplex.relation_query(
                zeros(3, 4, 2), zeros(2, 4, 2), [0], [0], adjoint=True, head_translations=zeros(3, 4, 2)
            ),
            ValueError,
            "hypercomplex.relation_query: head_translations must be None with adjoint=True, got an array",
        ),
        (
            lambda: pv.hypercomplex.relation_query(
                zeros(3, 4, 2), zeros(3, 4, 2), [0], [0], adjoint=True, rotate_by="head"
            ),
            ValueError,
            "hypercomplex.relation_query: rotate_by must be 'relation' with adjoint=True, got 'head'",
        ),
        (
            lambda: pv.hypercomplex.sum_products(
                zeros(3, 4, 2), zeros(2, 4, 2), [0], [2], [0], 1, algebra="quaternion"
            ),
            IndexError,
            "hypercomplex.sum_products: y_ids must be in [0, 2), got 2 at position 0",
        ),
        (
            lambda: pv.hypercomplex.sum_products(
                zeros(3, 4, 2), zeros(2, 4, 3), [0], [0], [0], 1, algebra="quaternion"
            ),
            ValueError,
            "hypercomplex.sum_products: y must have the same last two axes as out (4, 2), got (4, 3)",
        ),
        (
            lambda: pv.hypercomplex.flow_query(zeros(3, 2, 2), zeros(2, 2, 2), [0], [0], kind="euclidean"),
            ValueError,
            "hypercomplex.flow_query: kind must be one of 'wasserstein', 'piecewise', 'kl', got 'euclidean'",
        ),
        (
            lambda: pv.hypercomplex.flow_query(zeros(3, 2, 2), zeros(2, 2, 2), [0], [0], kind="piecewise"),
            ValueError,
            "hypercomplex.flow_query: entities must have a mean and the scales of its kind on axis 1 (3), got 2",
        ),
        (
            lambda: pv.hypercomplex.flow_query(zeros(3, 2, 2), zeros(2, 3, 2), [0], [0]),
            ValueError,
            "hypercomplex.flow_query: relations must have a mean and a scale on axis 1 (2), got 3",
        ),
        (
            lambda: pv.hypercomplex.flow_query(zeros(3, 2, 2), zeros(2, 2, 2), [0], [2]),
            IndexError,
            "hypercomplex.flow_query: relation_ids must be in [0, 2), got 2 at position 0",
        ),
        (
            lambda: pv.hypercomplex.flow_keys(zeros(3, 3, 2)),
            ValueError,
            "hypercomplex.flow_keys: entities must have a mean and the scales of its kind on axis 1 (2), got 3",
        ),
        (
            lambda: pv.hypercomplex.flow_keys(zeros(3, 2, 2), out=zeros(3, 4)),
            TypeError,
            "hypercomplex.flow_keys: out must be a pair of arrays (items, bias), got ndarray",
        ),
        (
            lambda: pv.hypercomplex.flow_keys(zeros(3, 2, 2), out=(zeros(3, 4), zeros(2))),
            ValueError,
            "hypercomplex.flow_keys: out bias must have shape (3,), got (2,)",
        ),
        (
            lambda: pv.hypercomplex.relation_query(zeros(3, 4, 2), zeros(2, 4, 2), [0.5], [0]),
            TypeError,
            "hypercomplex.relation_query: head_ids must be integers, got float64",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
