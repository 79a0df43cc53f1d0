"""Definitions in float64, from the formulas of S01, written apart from the library's own tables."""

import numpy as np

SQUARES = {"quaternion": (-1, -1), "dihedron": (-1, 1)}


def product(x, y, algebra="quaternion"):
    """Planar (..., C, d) product from the written-out formulas."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if algebra == "complex":
        (r, i), (r2, i2) = (np.moveaxis(v, -2, 0) for v in (x, y))
        return np.stack([r * r2 - i * i2, r * i2 + i * r2], -2)
    if algebra == "octonion":  # Cayley-Dickson pairs of quaternions: (p, q)(r, s) = (p r - s* q, s p + q r*)
        p, q, r, s = x[..., :4, :], x[..., 4:, :], y[..., :4, :], y[..., 4:, :]
        return np.concatenate(
            [product(p, r) - product(conjugate(s), q), product(s, p) + product(q, conjugate(r))], axis=-2
        )
    a, b = SQUARES.get(algebra, algebra)
    (s, x1, y1, z1), (s2, x2, y2, z2) = (np.moveaxis(v, -2, 0) for v in (x, y))
    return np.stack(
        [
            s * s2 + a * x1 * x2 + b * y1 * y2 - a * b * z1 * z2,
            s * x2 + x1 * s2 - b * y1 * z2 + b * z1 * y2,
            s * y2 + y1 * s2 + a * x1 * z2 - a * z1 * x2,
            s * z2 + z1 * s2 + x1 * y2 - y1 * x2,
        ],
        -2,
    )


def conjugate(x):
    """All components but the first negated."""
    x = np.asarray(x, np.float64).copy()
    x[..., 1:, :] *= -1
    return x


def norm(x):
    """Euclidean norm over the components."""
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum(-2))


def normalize(x):
    """x / norm, 0 where the norm is 0."""
    n = norm(x)[..., None, :]
    return np.divide(x, n, out=np.zeros(np.shape(x)), where=n > 0)


def relation_query(
    entities,
    relations,
    head_ids,
    relation_ids,
    algebra,
    translations=None,
    normalized=True,
    rotate_by="relation",
    head_translations=None,
):
    """One row a (head, relation) pair."""
    rotors = normalize(relations) if normalized else np.asarray(relations, np.float64)
    rotor_ids = head_ids if rotate_by == "head" else relation_ids
    out = product(np.asarray(entities)[head_ids], rotors[rotor_ids], algebra)
    if translations is not None:
        out = out + np.asarray(translations, np.float64)[relation_ids]
    if head_translations is not None:
        out = out + np.asarray(head_translations, np.float64)[head_ids]
    return out.reshape(len(head_ids), -1)


def sum_products(x, y, x_ids, y_ids, out_ids, rows, algebra):
    """out[k] = sum of x[x_ids[i]] (*) y[y_ids[i]] over the i with out_ids[i] = k."""
    out = np.zeros((rows, *np.shape(x)[1:]))
    np.add.at(out, out_ids, product(np.asarray(x)[x_ids], np.asarray(y)[y_ids], algebra))
    return out


def distance(query, tail):
    """Squared Euclidean distance of two numbers (C, d)."""
    return ((query - tail) ** 2).sum()


def robin_score(head, rotor_texts, relation, texts, tail, algebra):
    """Robin and Lion: h (*) [u | v] / |.| + r + u' + v' against t; one triple.

    head, relation, tail: (4, d); rotor_texts: u and v, (2, d) each; texts: u' and v', (4, d) each.
    """
    query = product(head, normalize(np.concatenate(rotor_texts)), algebra) + relation + texts[0] + texts[1]
    return -distance(query, tail)


def tetra_score(head, head_texts, relation, tail, tail_texts, algebra):
    """Tetra: (e, u, v, w) (*) r / |r| against the tail's own (e, u, v, w); one triple.

    head, tail: (d,); texts: three of (d,); relation: (4, d).
    """
    query = product(np.stack([head, *head_texts]), normalize(relation), algebra)
    return -distance(query, np.stack([tail, *tail_texts]))


def softplus(x):
    """log(1 + exp(x))."""
    return np.logaddexp(0, x)


def flow_distance(head, relation, tail, kind):
    """NFE's distance of one triple, by its definition. head and tail: (2 or 3, d), relation: (2, d)."""
    head, (shift, scale), tail = (np.asarray(x, np.float64) for x in (head, relation, tail))
    mean, other = scale * head[0] + shift, tail[0]
    if kind == "kl":
        a, b = softplus(scale) * softplus(head[1]), softplus(tail[1])
        return (a**2 / (2 * b**2) - np.log(a) + np.log(b) - 0.5 + (mean - other) ** 2 / (2 * b**2)).sum()
    a, b = np.abs(scale * head[1:]), np.abs(tail[1:])
    if kind == "wasserstein":
        return ((mean - other) ** 2 + (a[0] - b[0]) ** 2).sum()
    skew = (mean - other) * (a[1] - a[0] + b[0] - b[1])
    return ((mean - other) ** 2 + ((a - b) ** 2).sum(0) / 2 + np.sqrt(2 / np.pi) * skew).sum()


def matrix(x):
    """A dihedron number (s, x, y, z) as a real 2 x 2 matrix; products become matrix products."""
    s, x1, y1, z1 = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    return np.stack([np.stack([s - z1, -x1 + y1], -1), np.stack([x1 + y1, s + z1], -1)], -2)
