"""Differentiable MaxSim: the plain scores, gradients at the maxima, the same bits for any number of threads."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from reference import maxsim as ref

torch = pytest.importorskip("torch")
pvt = pytest.importorskip("polyvec.torch")

QUERY_LENGTHS, DOC_LENGTHS = [3, 0, 1, 70], [5, 1, 0, 33]


def sets(rng, lengths, d, dtype=torch.float64):
    """(values, offsets) of standard normal tokens."""
    values = torch.from_numpy(rng.standard_normal((sum(lengths), d))).to(dtype).requires_grad_()
    return values, torch.from_numpy(np.cumsum([0, *lengths]))


def padded(rng, n, t, d, dtype=torch.float64):
    return torch.from_numpy(rng.standard_normal((n, t, d))).to(dtype).requires_grad_()


def plain(x):
    return pv.Ragged(x[0].detach(), x[1])


def gradients(queries, docs, weights, of=np.asarray):
    """Of (scores * weights).sum() in float64; a document without tokens has none. `of` is applied to every factor."""
    queries, docs = ([x.detach().double().numpy() for x in plain(sets)] for sets in (queries, docs))
    d_queries, d_docs = ([np.zeros_like(x) for x in sets] for sets in (queries, docs))
    for q, query in enumerate(queries):
        for d, doc in enumerate(docs):
            if len(doc):
                best = ref.similarities(query, doc).argmax(1)
                d_queries[q] += of(weights[q, d]) * of(doc[best])
                np.add.at(d_docs[d], best, of(weights[q, d]) * of(query))
    return np.concatenate(d_queries), np.concatenate(d_docs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 17, 64])
def test_scores_and_gradients_equal_the_definition(rng, isa, d, dtype):
    queries, docs = sets(rng, QUERY_LENGTHS, d, dtype), sets(rng, DOC_LENGTHS, d, dtype)
    scores = pvt.maxsim(queries, docs)
    assert_exact(scores.detach(), pv.maxsim.score(plain(queries), plain(docs)))
    weights = rng.standard_normal((4, 4)).astype(str(dtype)[6:])
    scores.backward(torch.from_numpy(weights))
    expected = gradients(queries, docs, weights.astype(np.float64))
    size = gradients(queries, docs, weights.astype(np.float64), of=np.abs)
    assert_reduction(queries[0].grad, expected[0], size[0], length=4)
    assert_reduction(docs[0].grad, expected[1], size[1], length=74)


@pytest.mark.parametrize("n", [0, 4, 1500])
def test_pairs(rng, isa, n):
    lengths = rng.integers(0, 5, (2, n))
    queries, docs = (sets(rng, row, 3) for row in lengths)
    scores = pvt.maxsim_pairs(queries, docs)
    assert_exact(scores.detach(), pv.maxsim.score_pairs(plain(queries), plain(docs)))
    if n == 4:
        scores.sum().backward()
        expected, size = (gradients(queries, docs, np.eye(4), of) for of in (np.asarray, np.abs))
        assert_reduction(queries[0].grad, expected[0], size[0], length=4)
        assert_reduction(docs[0].grad, expected[1], size[1], length=4)


@pytest.mark.parametrize("function", [pvt.maxsim, pvt.maxsim_pairs])
def test_gradcheck_of_every_form(rng, function):
    queries, docs = padded(rng, 3, 4, 2), padded(rng, 3, 5, 2)
    mask = torch.from_numpy(rng.random((3, 5)) < 0.7)
    mask[:, 0] = True
    lengths = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(function, (queries, docs))
    assert torch.autograd.gradcheck(lambda q, d: function((q, lengths), d, doc_mask=mask), (queries, docs))
    values, offsets = sets(rng, [2, 3, 1], 2)
    assert torch.autograd.gradcheck(lambda q, v: function(q, (v, offsets)), (queries, values))
    kept = [doc[m] for doc, m in zip(docs.detach(), mask, strict=True)]
    score = pv.maxsim.score if function is pvt.maxsim else pv.maxsim.score_pairs
    assert_exact(function(queries, docs, doc_mask=mask).detach(), score(queries.detach(), kept))


def test_of_equal_maxima_the_first_gets_the_gradient():
    docs = torch.ones(1, 3, 2, requires_grad=True)
    pvt.maxsim(torch.ones(1, 1, 2), docs).sum().backward()
    assert docs.grad.tolist() == [[[1, 1], [0, 0], [0, 0]]]


def test_only_what_requires_grad_gets_a_gradient(rng):
    queries, docs = padded(rng, 2, 3, 4), padded(rng, 2, 3, 4).detach()
    scores = pvt.maxsim(queries, docs)
    saved = [x for x in scores.grad_fn.saved_tensors if x.dtype == torch.int32]
    assert [x.shape for x in saved] == [(2, 6)]
    scores.sum().backward()
    assert docs.grad is None
    assert not pvt.maxsim(docs, docs).requires_grad


def test_bits_do_not_depend_on_the_number_of_threads(rng):
    queries, docs = sets(rng, rng.integers(0, 40, 30), 33, torch.float32), sets(rng, [50] * 40, 33, torch.float32)

    def results(threads):
        with pv.num_threads(threads):
            scores = pvt.maxsim(queries, docs)
            return scores.detach(), *torch.autograd.grad(scores.sin().sum(), (queries[0], docs[0]))

    one = results(1)
    for threads in (2, 7):
        for a, b in zip(one, results(threads), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("pairs", [False, True])
def test_torch_accepts_the_registration(rng, pairs):
    queries, docs = sets(rng, [3, 2], 4), sets(rng, [2, 5], 4)
    torch.library.opcheck(torch.ops.polyvec.maxsim, (*queries, *docs, pairs))
    rows = torch.zeros(5 if pairs else (2, 5), dtype=torch.int32)
    grad = torch.ones(2 if pairs else (2, 2), dtype=torch.float64)
    fixed = (queries[0].detach(), queries[1], docs[0].detach(), docs[1], grad, rows)
    for of_docs in (False, True):
        torch.library.opcheck(torch.ops.polyvec.maxsim_gradient, (*fixed, of_docs))


def test_compile_keeps_the_ops_in_one_graph(rng):
    queries, docs = padded(rng, 3, 4, 8), sets(rng, [2, 5, 1], 8)

    def loss(queries, values):
        return pvt.maxsim(queries, (values, docs[1])).logsumexp(1).sum() + pvt.maxsim_pairs(queries, queries).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (queries, docs[0])
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: pvt.maxsim(x.detach().numpy(), x), TypeError,
         "torch.maxsim: queries must be a torch tensor, got ndarray"),
        (lambda x: pvt.maxsim(x, x[0]), ValueError,
         "torch.maxsim: docs must be a padded (n, t, d) tensor, (padded, lengths) or (values, offsets), "
         "got shape (3, 4)"),
        (lambda x: pvt.maxsim(x, x.float()), TypeError,
         "maxsim.score: docs must be float64, got float32; cast it with .to(torch.float64)"),
        (lambda x: pvt.maxsim(x, x[..., 1:]), ValueError,
         "maxsim.score: docs must have the same d as queries (4), got 3"),
        (lambda x: pvt.maxsim_pairs(x, x[:1]), ValueError,
         "maxsim.score_pairs: docs must have one document a query (2), got 1"),
        (lambda x: pvt.maxsim(x, (x, [1, 4])), ValueError,
         "Ragged: lengths must be in [0, 3], got 4 at position 1"),
    ],
)  # fmt: skip
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(padded(rng, 2, 3, 4))
    assert str(caught.value) == text
