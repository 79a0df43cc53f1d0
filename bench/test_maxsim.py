"""MaxSim against maxsim_cpu and the best forms in torch, on documents larger than the last-level cache."""

import numpy as np
import pytest

import polyvec as pv
import ranking

N, D, QUERY_TOKENS = 1000, 128, 32


def unit(rng, *shape):
    x = rng.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def documents(rng, kind, d=D, n=N):
    """Documents of 180 tokens, or of 8 to 512 (lognormal, about 180 in the mean)."""
    lengths = np.full(n, 180) if kind == "uniform" else np.clip(rng.lognormal(5, 0.6, n), 8, 512).astype(np.int64)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pv.Ragged(unit(rng, offsets[-1], d), offsets)


def by_product(query, docs):
    """What numpy users write: one product, then the maximum of each document's rows."""
    return np.maximum.reduceat(docs.values @ query.T, docs.offsets[:-1]).sum(1)


def in_maxsim_cpu(query, docs):
    """In parts of at most 4096 query elements: given more, maxsim_cpu 0.1.0 returns wrong scores or crashes."""
    maxsim_cpu = pytest.importorskip("maxsim_cpu")
    uniform = len(set(docs.lengths.tolist())) == 1
    sets = docs.values.reshape(len(docs), -1, docs.dim) if uniform else list(docs)
    scores = maxsim_cpu.maxsim_scores if uniform else maxsim_cpu.maxsim_scores_variable
    step = 4096 // docs.dim
    parts = [query[i : i + step] for i in range(0, len(query), step)]
    return lambda: sum(scores(part, sets) for part in parts)


def in_torch(query, docs):
    """A product and a maximum a document: the fastest of the forms in torch (an einsum over padded sets is not)."""
    torch = pytest.importorskip("torch")
    q, tokens, lengths = torch.from_numpy(query), torch.from_numpy(docs.values), torch.from_numpy(docs.lengths)
    if len(set(docs.lengths.tolist())) == 1:
        return lambda: (tokens @ q.T).view(len(docs), -1, len(q)).amax(1).sum(1)
    return lambda: torch.segment_reduce(tokens @ q.T, "max", lengths=lengths).sum(1)


def in_torch_einsum(query, docs):
    """The padded einsum of sentence-transformers, PyLate and colpali-engine."""
    torch = pytest.importorskip("torch")
    longest = int(docs.lengths.max())
    padded = torch.zeros(len(docs), longest, docs.dim)
    padding = torch.arange(longest) >= torch.from_numpy(docs.lengths)[:, None]
    padded[~padding] = torch.from_numpy(docs.values)
    q = torch.from_numpy(query)

    def call():
        similarities = torch.einsum("qd,ntd->nqt", q, padded)
        return similarities.masked_fill_(padding[:, None], -torch.inf).amax(2).sum(1)

    return call


def compare_scores(compare, query, docs, rivals):
    expected = by_product(query, docs)
    out = np.empty((1, len(docs)), np.float32)
    compare(
        lambda: pv.maxsim.score(query[None], docs, out=out),
        {name: make(query, docs) for name, make in rivals.items()},
        check=lambda result: np.testing.assert_allclose(np.asarray(result).ravel(), expected, rtol=1e-4, atol=1e-4),
        flops=2 * query.size * len(docs.values),
        bytes=docs.values.nbytes,
    )


@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_score(compare, rng, kind):
    rivals = {"maxsim_cpu": in_maxsim_cpu, "torch": in_torch, "torch einsum": in_torch_einsum}
    compare_scores(compare, unit(rng, QUERY_TOKENS, D), documents(rng, kind), rivals)


@pytest.mark.parametrize(("d", "n"), [(48, 2000), (96, 1000), (768, 200), (1024, 150)])
def test_width(compare, rng, d, n):
    docs = documents(rng, "uniform", d, n)
    compare_scores(compare, unit(rng, QUERY_TOKENS, d), docs, {"maxsim_cpu": in_maxsim_cpu, "torch": in_torch})


@pytest.mark.parametrize("tokens", [5, 17, 64, 300])
def test_query_tokens(compare, rng, tokens):
    docs = documents(rng, "ragged")
    compare_scores(compare, unit(rng, tokens, D), docs, {"maxsim_cpu": in_maxsim_cpu, "torch": in_torch})


def test_rerank(compare, rng):
    """200 candidates for each of 20 queries, as a first stage names them; the rival scores what it is given."""
    maxsim_cpu = pytest.importorskip("maxsim_cpu")
    docs = documents(rng, "ragged")
    queries = unit(rng, 20, QUERY_TOKENS, D)
    ids = np.stack([rng.choice(N, 200, replace=False) for _ in queries])
    arrays = list(docs)

    def rival():
        lists = zip(queries, ids.tolist(), strict=True)
        scores = np.stack([maxsim_cpu.maxsim_scores_variable(q, [arrays[i] for i in row]) for q, row in lists])
        order = np.argsort(-scores, axis=1)[:, :10]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    candidates = (np.arange(21) * 200, ids.ravel())
    packed = pv.maxsim.pack(docs)
    expected = np.stack([by_product(q, docs.take(row)) for q, row in zip(queries, ids, strict=True)])
    compare(
        lambda: pv.maxsim.topk(queries, packed, 10, candidates=candidates),
        {"maxsim_cpu": rival},
        check=lambda result: np.testing.assert_allclose(result[0], -np.sort(-expected)[:, :10], rtol=1e-4),
        flops=2 * QUERY_TOKENS * D * docs.lengths[ids].sum(),
    )


def test_topk(compare, rng):
    """20 queries against all documents: the rival multiplies everything and sorts."""
    torch = pytest.importorskip("torch")
    docs = documents(rng, "ragged")
    queries = unit(rng, 20, QUERY_TOKENS, D)
    tokens, lengths = torch.from_numpy(docs.values), torch.from_numpy(docs.lengths)
    q = torch.from_numpy(queries.reshape(-1, D))

    def rival():
        best = torch.segment_reduce(tokens @ q.T, "max", lengths=lengths)
        return best.view(N, len(queries), QUERY_TOKENS).sum(2).T.topk(10)

    expected = np.stack([by_product(query, docs) for query in queries])
    compare(
        lambda: pv.maxsim.topk(queries, docs, 10),
        {"torch": rival},
        check=lambda result: np.testing.assert_allclose(result[0], -np.sort(-expected)[:, :10], rtol=1e-4),
        flops=2 * queries.size * len(docs.values),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "residual4", "residual2"])
def test_packed(compare, rng, dtype):
    """Tokens in fewer bits against our own float32."""
    query, docs = unit(rng, QUERY_TOKENS, D), documents(rng, "uniform")
    if dtype.startswith("residual"):
        bits = int(dtype[-1])
        residuals = rng.integers(0, 256, (len(docs.values), D * bits // 8), np.uint8)
        weights = np.linspace(-0.05, 0.05, 1 << bits, dtype=np.float32)
        ids, centroids = rng.integers(0, 4096, len(docs.values)), unit(rng, 4096, D)
        packed = pv.maxsim.from_residuals(ids, residuals, centroids, weights, docs.offsets)
        codes = np.unpackbits(residuals, axis=1).reshape(len(residuals), D, bits) @ (1 << np.arange(bits))
        tokens = centroids[ids] + weights[codes]
        docs = pv.Ragged(tokens / np.linalg.norm(tokens, axis=1, keepdims=True), docs.offsets)
    else:
        packed = pv.maxsim.pack(docs, dtype)
    floats, expected = pv.maxsim.pack(docs), by_product(query, docs)
    compare(
        lambda: pv.maxsim.score(query[None], packed),
        {"float32": lambda: pv.maxsim.score(query[None], floats)},
        check=lambda result: np.testing.assert_allclose(np.ravel(result), expected, rtol=0.01, atol=0.01),
        flops=2 * query.size * len(docs.values),
        bytes=packed.nbytes,
    )


@pytest.mark.parametrize("name", ["cranfield", "scifact"])
def test_certified_topk(compare, data, name):
    """Screening int8 tokens of real documents, where scores crowd less than those of random ones, against float32."""
    docs, queries, _ = ranking.read(data / name)
    queries, floats, packed = queries.take(range(20)), pv.maxsim.pack(docs), pv.maxsim.pack(docs, "int8")
    expected = pv.maxsim.topk(queries, floats, 10)

    def check(result):
        np.testing.assert_array_equal(result[0], expected[0])
        np.testing.assert_array_equal(result[1], expected[1])

    compare(
        lambda: pv.maxsim.certified_topk(queries, packed, floats, 10),
        {"float32": lambda: pv.maxsim.topk(queries, floats, 10)},
        check=check,
        flops=2 * queries.values.size * len(docs.values),
    )


def test_score_matrix(compare, rng):
    """All similarities of one pair, as heat maps show them; numpy and torch call a BLAS."""
    torch = pytest.importorskip("torch")
    query, doc = unit(rng, QUERY_TOKENS, D), unit(rng, 4096, D)
    q, x = torch.from_numpy(query), torch.from_numpy(doc)
    out = np.empty((len(query), len(doc)), np.float32)
    compare(
        lambda: pv.maxsim.score_matrix(query, doc, out=out),
        {"numpy": lambda: query @ doc.T, "torch": lambda: q @ x.T},
        check=lambda result: np.testing.assert_allclose(result, query @ doc.T, rtol=0, atol=1e-5),
        flops=2 * query.size * len(doc),
        bytes=doc.nbytes + out.nbytes,
    )


def test_score_pairs(compare, rng):
    torch = pytest.importorskip("torch")
    n = 500
    queries, docs = unit(rng, n, QUERY_TOKENS, D), unit(rng, n, 180, D)
    q, d = torch.from_numpy(queries), torch.from_numpy(docs)
    expected = np.stack([(query @ doc.T).max(1).sum() for query, doc in zip(queries, docs, strict=True)])
    compare(
        lambda: pv.maxsim.score_pairs(queries, docs),
        {"torch": lambda: torch.bmm(q, d.transpose(1, 2)).amax(2).sum(1)},
        check=lambda result: np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-4, atol=1e-4),
        flops=2 * queries.size * 180,
        bytes=queries.nbytes + docs.nbytes,
    )


def test_scores_and_gradients(compare, rng):
    """A step of training with in-batch negatives: scores of all pairs, and gradients for both sides."""
    torch = pytest.importorskip("torch")
    pvt = pytest.importorskip("polyvec.torch")
    n = 64
    q, d = (torch.from_numpy(unit(rng, n, t, D)).requires_grad_() for t in (QUERY_TOKENS, 180))

    def step(score):
        return torch.autograd.grad(score(q, d).logsumexp(1).sum(), (q, d))

    def in_einsum(q, d):
        return torch.einsum("aid,bjd->abij", q, d).amax(3).sum(2)

    expected = step(in_einsum)

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-5)

    compare(
        lambda: step(pvt.maxsim),
        {"torch einsum": lambda: step(in_einsum)},
        check=check,
        flops=2 * n * q.numel() * 180 + 4 * n * q.numel(),
        bytes=4 * (q.numel() + d.numel()),
    )
