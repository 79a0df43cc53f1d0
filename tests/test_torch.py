"""Differentiable ops: equal to the plain functions, right in their gradients, whole under torch.compile."""

import numpy as np
import pytest

import polyvec as pv
from polyvec import _arrays

torch = pytest.importorskip("torch")
pvt = pytest.importorskip("polyvec.torch")

ALGEBRAS = {"complex": 2, "quaternion": 4, "dihedron": 4, (0.5, -2.0): 4, "octonion": 8}
HEADS, RELATION_IDS = [0, 6, 6, 2, 1, 0], [4, 0, 0, 2, 2, 1]  # ids that repeat: their gradients add up


@pytest.fixture
def tensor(rng, on_device):
    """Makes a float64 tensor of a shape that requires grad."""
    return lambda *shape: torch.as_tensor(on_device(rng.standard_normal(shape))).requires_grad_()


@pytest.fixture
def graph(tensor, on_device):
    """Makes entities, relations, translations; head ids, relation ids."""

    def make(components=4, d=3):
        ids = (torch.as_tensor(on_device(np.array(ids))) for ids in (HEADS, RELATION_IDS))
        return (*(tensor(n, components, d) for n in (7, 5, 5)), *ids)

    return make


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
def test_the_gradients_of_a_product(tensor, algebra, axis):
    shapes = [(2, 1, ALGEBRAS[algebra], 3), (3, ALGEBRAS[algebra], 1)]
    x, y = (tensor(*shape) for shape in shapes)  # axes that broadcast: their gradients add up
    if axis == -1:
        x, y = (a.detach().transpose(-1, -2).requires_grad_() for a in (x, y))

    def product(x, y):
        return pvt.product(x, y, algebra=algebra, axis=axis)

    assert torch.equal(product(x, y), pv.hypercomplex.product(x.detach(), y.detach(), algebra=algebra, axis=axis))
    assert torch.autograd.gradcheck(product, (x, y))
    assert torch.autograd.gradgradcheck(product, (x, y), fast_mode=True)


@pytest.mark.parametrize("axis", [-2, -1])
def test_the_gradients_of_normalize(tensor, axis):
    x = tensor(3, 4, 2)
    if axis == -1:
        x = x.detach().transpose(-1, -2).requires_grad_()
    assert torch.equal(pvt.normalize(x, axis=axis), pv.hypercomplex.normalize(x.detach(), axis=axis))
    assert torch.autograd.gradcheck(lambda x: pvt.normalize(x, axis=axis), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pvt.normalize(x, axis=axis), (x,))


def test_a_number_of_norm_zero_has_gradient_zero(on_device):
    x = torch.as_tensor(on_device(np.zeros((4, 3)))).requires_grad_()
    (first,) = torch.autograd.grad(pvt.normalize(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, x)
    assert torch.equal(second, x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
def test_the_gradients_of_a_relation_query(graph, algebra, normalize):
    entities, relations, translations, heads, relation_ids = graph(ALGEBRAS[algebra], d=1)

    def query(entities, relations, translations):
        return pvt.relation_query(
            entities,
            relations,
            heads,
            relation_ids,
            algebra=algebra,
            translations=translations,
            normalize=normalize,
        )

    tables = (entities, relations, translations)
    detached = [table.detach() for table in tables]
    expected = pv.hypercomplex.relation_query(
        *detached[:2], heads, relation_ids, algebra=algebra, translations=detached[2], normalize=normalize
    )
    assert torch.equal(query(*tables), expected)
    assert torch.autograd.gradcheck(query, tables, fast_mode=True)
    assert torch.autograd.gradgradcheck(query, tables, fast_mode=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradients_of_heads_that_bring_rotors(tensor, graph, normalize):
    entities, relations, _, heads, relation_ids = graph()
    rotors, texts = tensor(7, 4, 3), tensor(7, 4, 3)

    def query(entities, rotors, relations, texts, of=pvt):
        return of.relation_query(
            entities,
            rotors,
            heads,
            relation_ids,
            algebra="dihedron",
            rotate_by="head",
            translations=relations,
            head_translations=texts,
            normalize=normalize,
        )

    tables = (entities, rotors, relations, texts)
    assert torch.equal(query(*tables), query(*(table.detach() for table in tables), of=pv.hypercomplex))
    assert torch.autograd.gradcheck(query, tables, fast_mode=True)
    assert torch.autograd.gradgradcheck(query, tables, fast_mode=True)


def test_only_what_requires_grad_gets_a_gradient(tensor, graph):
    entities, relations, _, heads, relation_ids = graph()
    pvt.relation_query(entities, relations.detach(), heads.short(), relation_ids.int()).sum().backward()
    assert entities.grad is not None
    assert entities.grad[3].eq(0).all()  # no head
    fixed = tensor(4, 3).detach()
    assert not pvt.product(fixed, fixed).requires_grad


@pytest.fixture
def calls(tensor, graph):
    """Each op with arguments."""
    x, y = tensor(2, 4, 3), tensor(4, 3)
    entities, relations, translations, heads, relation_ids = graph()
    table = pv.hypercomplex.flat_table("dihedron")
    tables = (entities, relations, heads, relation_ids)
    ops = torch.ops.polyvec
    return [
        (ops.hypercomplex_product, (x, y, table, -2)),
        (ops.hypercomplex_normalize, (x, -2)),
        (ops.hypercomplex_relation_query, (*tables, translations, None, table, True, False)),
        (ops.hypercomplex_relation_query, (*tables, None, None, table, False, False)),
        (
            ops.hypercomplex_relation_query,
            (entities, tensor(7, 4, 3), heads, relation_ids, relations, tensor(7, 4, 3), table, True, True),
        ),
        (ops.hypercomplex_sum_products, (entities, relations, heads, relation_ids, heads, 7, table)),
    ]


@pytest.mark.parametrize("case", range(6))
def test_torch_accepts_the_registration(calls, case):
    op, arguments = calls[case]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("rotate_by", ["relation", "head"])
def test_compile_keeps_the_ops_in_one_graph(tensor, graph, rotate_by):
    entities, relations, translations, heads, relation_ids = graph()
    if rotate_by == "head":
        relations = tensor(7, 4, 3)

    def loss(entities, relations, translations):
        queries = pvt.relation_query(
            entities,
            relations,
            heads,
            relation_ids,
            rotate_by=rotate_by,
            translations=translations,
            head_translations=entities,
        )
        return (
            pvt.product(pvt.normalize(entities), relations[0], algebra=(-1, 1)).sum() + queries.square().sum()
        ).sin()

    tables = (entities, relations, translations)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*tables), tables), torch.autograd.grad(loss(*tables), tables), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at its first jvp
def test_forward_mode_is_refused_where_a_tangent_would_be_lost():
    x, tangent, ids = torch.rand(3, 4, 8), torch.rand(3, 4, 8), torch.tensor([0, 1])
    calls = {
        "product: x": lambda x: pvt.product(x, x),
        "product: y": lambda x: pvt.product(x.detach(), x),
        "normalize: x": pvt.normalize,
        "relation_query: entities": lambda x: pvt.relation_query(x, x, ids, ids),
        "maxsim: queries": lambda x: pvt.maxsim(x, x),
        "maxsim_pairs: docs": lambda x: pvt.maxsim_pairs(x.detach(), x),
        "pool: docs": lambda x: pvt.pool(x, 2)[0],
        "logsumexp: items": lambda x: pvt.logsumexp(x[0].detach(), x[1]),
        "score_pairs: items": lambda x: pvt.score_pairs(x[0].detach(), x[1], ids.view(1, 2).expand(4, 2)),
        "soft_assign: codebooks": lambda x: pvt.soft_assign(x[0].detach(), x[:1]).quantized,
        "vq_linear: x": lambda x: pvt.vq_linear(x[0], ids[:, None].byte(), torch.ones(1, 16, 8)),
    }
    for name, call in calls.items():
        text = f"^torch.{name} must have no tangent, got a dual tensor; derivatives are those of backward alone$"
        with pytest.raises(TypeError, match=text):
            torch.func.jvp(call, (x,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            with pytest.raises(TypeError, match=text):
                call(torch.autograd.forward_ad.make_dual(x, tangent))
            call(x)  # has none
    with pytest.raises(TypeError, match="must have no tangent"):
        torch.func.jvp(torch.vmap(pvt.normalize), (x,), (tangent,))
    assert torch.equal(torch.vmap(pvt.normalize)(x), pvt.normalize(x))
    codebook, change = x[1], tangent[1]
    _, derivative = torch.func.jvp(lambda c: pvt.vq_assign(x[0], c).quantized, (codebook,), (change,))
    assert torch.equal(derivative, change[pvt.vq_assign(x[0], codebook).ids])


def test_the_plain_functions_point_here_for_gradients_where_there_are_any():
    assert set(_arrays.DIFFERENTIABLE.values()) <= set(pvt.__all__)
    x = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(TypeError) as caught:
        pv.hypercomplex.product(x, x)
    assert str(caught.value) == (
        "hypercomplex.product: x must not require grad, got a tensor that does; use polyvec.torch.product or .detach()"
    )
    with pytest.raises(TypeError) as caught:
        pv.maxsim.score(x[None], x[None])
    assert str(caught.value) == (
        "maxsim.score: queries must not require grad, got a tensor that does; use polyvec.torch.maxsim or .detach()"
    )
    with pytest.raises(TypeError) as caught:
        pv.hypercomplex.conjugate(x)
    assert str(caught.value) == (
        "hypercomplex.conjugate: x must not require grad, got a tensor that does; use .detach()"
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: pvt.product(x, x.float()),
            TypeError,
            "hypercomplex.product: y must be float64, got float32; cast it with .to(torch.float64)",
        ),
        (
            lambda x: pvt.product(x, x, algebra="octonion"),
            ValueError,
            "hypercomplex.product: x must have 8 components for this algebra, got 4",
        ),
        (
            lambda x: pvt.relation_query(x[None], x[None], torch.tensor([1]), torch.tensor([0])),
            IndexError,
            "hypercomplex.relation_query: head_ids must be in [0, 1), got 1 at position 0",
        ),
        (
            lambda x: pvt.relation_query(x[None], x[None], torch.tensor([0]), torch.tensor([0]), rotate_by="tail"),
            ValueError,
            "torch.relation_query: rotate_by must be one of 'relation', 'head', got 'tail'",
        ),
        (
            lambda x: pvt.product(x.detach().numpy(), x),
            TypeError,
            "torch.product: x must be a torch tensor, got ndarray",
        ),
        (
            lambda x: pvt.relation_query(x[None], x[None], [0], torch.tensor([0])),
            TypeError,
            "torch.relation_query: head_ids must be a torch tensor, got list",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call(torch.ones(4, 3, dtype=torch.float64, requires_grad=True))
    assert str(caught.value) == text


def test_importing_polyvec_does_not_import_torch(python):
    code = "import sys, polyvec; assert 'torch' not in sys.modules and 'polyvec.torch' not in sys.modules"
    python("-c", code)
