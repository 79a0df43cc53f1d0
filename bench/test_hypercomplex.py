"""Hypercomplex products and relation queries against the same formula in numpy and torch."""

import numpy as np
import pytest

import polyvec as pv
from reference import hypercomplex as ref

N, D = 4096, 128


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def by_components(x, y, stack):
    """The Hamilton product component by component, as users of numpy and torch write it."""
    a, b, c, d = (x[:, i] for i in range(4))
    p, q, r, s = (y[:, i] for i in range(4))
    return stack(
        (
            a * p - b * q - c * r - d * s,
            a * q + b * p + c * s - d * r,
            a * r + c * p + d * q - b * s,
            a * s + d * p + b * r - c * q,
        ),
        1,
    )


def close_to(expected):
    return lambda result: np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-4)


def test_product(compare, rng):
    torch = pytest.importorskip("torch")
    x, y = sample(rng, N, 4, D), sample(rng, N, 4, D)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    out = np.empty_like(x)
    compare(
        lambda: pv.hypercomplex.product(x, y, out=out),
        {"numpy": lambda: by_components(x, y, np.stack), "torch": lambda: by_components(tx, ty, torch.stack)},
        check=close_to(ref.product(x, y, "quaternion")),
        flops=28 * N * D,
        bytes=3 * x.nbytes,
    )


def test_interleaved_product(compare, rng):
    torch = pytest.importorskip("torch")
    x, y = sample(rng, N * D, 4), sample(rng, N * D, 4)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    out = np.empty_like(x)
    compare(
        lambda: pv.hypercomplex.product(x, y, axis=-1, out=out),
        {"numpy": lambda: by_components(x, y, np.stack), "torch": lambda: by_components(tx, ty, torch.stack)},
        check=close_to(ref.product(x.T, y.T, "quaternion").T),
        flops=28 * N * D,
        bytes=3 * x.nbytes,
    )


def test_relation_query(compare, rng):
    torch = pytest.importorskip("torch")
    entities, relations = sample(rng, 40_000, 4, D), sample(rng, 20, 4, D)
    heads, relation_ids = rng.integers(0, 40_000, N), rng.integers(0, 20, N)
    tensors = [torch.from_numpy(a) for a in (entities, relations, heads, relation_ids)]
    out = np.empty((N, 4 * D), np.float32)

    def in_numpy():
        rotors = relations / np.sqrt(np.square(relations).sum(1, keepdims=True))
        return by_components(entities[heads], rotors[relation_ids], np.stack).reshape(N, -1)

    def in_torch():
        e, r, h, i = tensors
        rotors = r / r.square().sum(1, keepdim=True).sqrt()
        return by_components(e[h], rotors[i], torch.stack).reshape(N, -1)

    compare(
        lambda: pv.hypercomplex.relation_query(entities, relations, heads, relation_ids, out=out),
        {"numpy": in_numpy, "torch": in_torch},
        check=close_to(ref.relation_query(entities, relations, heads, relation_ids, "quaternion", None, True)),
        flops=28 * N * D,
        bytes=2 * out.nbytes,
    )


def test_relation_query_of_texts(compare, rng):
    """Robin's and Lion's queries: rotors and translations of the heads' texts, and one translation a relation."""
    torch = pytest.importorskip("torch")
    entities, rotors, texts = (sample(rng, 40_000, 4, D) for _ in range(3))
    relations = sample(rng, 20, 4, D)
    heads, relation_ids = rng.integers(0, 40_000, N), rng.integers(0, 20, N)
    tables = [torch.from_numpy(a) for a in (entities, rotors, relations, texts, heads, relation_ids)]
    out = np.empty((N, 4 * D), np.float32)

    def in_torch():
        e, r, s, t, h, i = tables
        unit = torch.nn.functional.normalize(r[h], dim=1)
        return (by_components(e[h], unit, torch.stack) + s[i] + t[h]).reshape(N, -1)

    compare(
        lambda: pv.hypercomplex.relation_query(
            entities,
            rotors,
            heads,
            relation_ids,
            rotate_by="head",
            translations=relations,
            head_translations=texts,
            out=out,
        ),
        {"torch": in_torch},
        check=close_to(
            ref.relation_query(entities, rotors, heads, relation_ids, "quaternion", relations, True, "head", texts)
        ),
        bytes=4 * out.nbytes,
    )


@pytest.mark.parametrize("kind", ["wasserstein", "piecewise", "kl"])
def test_flow_query(compare, rng, kind):
    torch = pytest.importorskip("torch")
    softplus = torch.nn.functional.softplus
    parts = 3 if kind == "piecewise" else 2
    entities, relations = sample(rng, 40_000, parts, D), sample(rng, 20, 2, D)
    heads, relation_ids = rng.integers(0, 40_000, N), rng.integers(0, 20, N)
    tables = [torch.from_numpy(a) for a in (entities, relations, heads, relation_ids)]
    out = np.empty((N, parts * D), np.float32), np.empty(N, np.float32)

    def in_torch():
        e, r, h, i = tables
        (mean, *scales), (shift, scale) = e[h].unbind(1), r[i].unbind(1)
        mean = scale * mean + shift
        if kind == "kl":
            a = softplus(scale) * softplus(scales[0])
            return torch.cat([-(a.square() + mean.square()) / 2, mean], 1), (a.log() + 0.5).sum(1)
        a = [(scale * s).abs() for s in scales]
        if kind == "wasserstein":
            return torch.cat([2 * mean, 2 * a[0]], 1), -(mean.square() + a[0].square()).sum(1)
        slope = (2 / np.pi) ** 0.5
        extra = (a[0].square() + a[1].square()) / 2 + slope * mean * (a[1] - a[0])
        return torch.cat([mean, *a], 1), -(mean.square() + extra).sum(1)

    expected = [np.asarray(x) for x in in_torch()]

    def check(result):
        for x, y in zip(result, expected, strict=True):
            np.testing.assert_allclose(np.asarray(x), y, rtol=1e-4, atol=1e-3)

    compare(
        lambda: pv.hypercomplex.flow_query(entities, relations, heads, relation_ids, kind=kind, out=out),
        {"torch": in_torch},
        check=check,
        bytes=2 * out[0].nbytes,
    )


def test_relation_query_with_gradients(compare, rng):
    torch = pytest.importorskip("torch")
    pvt = pytest.importorskip("polyvec.torch")
    entities, relations = (torch.from_numpy(sample(rng, n, 4, D)).requires_grad_() for n in (N, 20))
    heads, relation_ids = (torch.from_numpy(rng.integers(0, n, N)) for n in (N, 20))
    grad = torch.from_numpy(sample(rng, N, 4 * D))

    def in_torch():
        rotors = torch.nn.functional.normalize(relations, dim=1)
        return by_components(entities[heads], rotors[relation_ids], torch.stack).flatten(1)

    def gradients(result):
        return torch.cat([g.flatten() for g in torch.autograd.grad(result, (entities, relations), grad)])

    expected = gradients(in_torch())
    compare(
        lambda: gradients(pvt.relation_query(entities, relations, heads, relation_ids)),
        {"torch": lambda: gradients(in_torch())},
        check=lambda result: torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3),
        bytes=5 * grad.nbytes,
    )
