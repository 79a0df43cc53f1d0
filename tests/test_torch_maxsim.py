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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_masks_of_tokenizers_are_integers(rng, dtype):
    queries, docs = padded(rng, 3, 4, 2), padded(rng, 3, 5, 2)
    masks = [torch.from_numpy(rng.random(x.shape[:2]) < 0.7) for x in (queries, docs)]
    options = [dict(zip(("query_mask", "doc_mask"), x, strict=True)) for x in (masks, [m.to(dtype) for m in masks])]
    assert_exact(*(pvt.maxsim(queries, docs, **x).detach() for x in options))
    assert_exact(*(pv.maxsim.score(queries.detach(), docs.detach(), **x) for x in options))
    assert_exact(*(pvt.MaxSimLoss()(queries, docs, **x).detach() for x in options))


def test_a_similarity_of_nan_is_never_the_maximum(rng):
    queries, docs = padded(rng, 2, 3, 4), padded(rng, 2, 3, 4).detach()
    docs[1, 2] = np.nan
    scores = pvt.maxsim(queries, docs)
    assert_exact(scores.detach(), pv.maxsim.score(queries.detach(), [docs[0], docs[1, :2]]))
    assert torch.autograd.grad(scores.sum(), queries)[0].isfinite().all()


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
    for of in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.polyvec.maxsim_gradient, (*fixed, *of))


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


# Pooling


def pooled_by_definition(docs, means_of):
    """The segment means of (values, offsets) in float64, and the size of each."""
    sizes = torch.bincount(means_of)
    means = torch.zeros(len(sizes), docs.shape[1], dtype=torch.float64).index_add(0, means_of, docs.double())
    return means / sizes[:, None], sizes


@pytest.mark.parametrize("method", ["kmeans", "ward"])
@pytest.mark.parametrize("options", [{"k": 1}, {"k": 4}, {"k": 1000}, {"ratio": 0.3}, {"ratio": 1.0}], ids=str)
def test_pool_has_the_means_and_the_gradients_of_the_definition(rng, isa, method, options):
    docs = sets(rng, [0, 1, 33, 70, 4, 0], 17, torch.float32)
    values, offsets = pvt.pool(docs, **options, method=method)
    expected = pv.maxsim.pool(plain(docs), **options, method=method)
    assert_exact(values.detach(), expected.values)
    assert_exact(offsets, expected.offsets)
    _, means_of = torch.ops.polyvec.pool(*docs, offsets, int(offsets[-1]), method, 20)
    means, sizes = pooled_by_definition(docs[0].detach(), means_of)
    assert (sizes > 0).all()
    assert_reduction(values.detach(), means, 4.0, length=1)
    weights = torch.from_numpy(rng.standard_normal(values.shape).astype(np.float32))
    values.backward(weights)
    assert_reduction(docs[0].grad, (weights.double() / sizes[:, None])[means_of], 4.0, length=1)


def test_pool_of_padded_documents(rng):
    docs = padded(rng, 3, 6, 5, torch.float32)
    values, offsets = pvt.pool(docs, 2)
    assert offsets.tolist() == [0, 2, 4, 6]
    lengths = torch.tensor([6, 0, 3])
    some, starts = pvt.pool((docs, lengths), 2)
    assert starts.tolist() == [0, 2, 2, 4]
    assert torch.equal(some[:2], values[:2])
    mask = torch.arange(6) < lengths[:, None]
    assert torch.equal(pvt.pool(docs, 2, doc_mask=mask)[0], some)
    (grad,) = torch.autograd.grad(some.sum(), docs)
    assert torch.equal(grad.any(-1), mask)


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.7])
def test_pool_keeps_as_many_tokens_padded_or_not(rng, ratio):
    for t in (0, 1, 7, 10, 30, 100):
        docs = padded(rng, 2, t, 3, torch.float32)
        same = docs.detach().flatten(0, 1), torch.tensor([0, t, 2 * t])
        offsets = [pvt.pool(x, ratio=ratio)[1].tolist() for x in (docs, same)]
        assert offsets[0] == offsets[1] == pv.maxsim.pool(plain(same), ratio=ratio).offsets.tolist()


def test_gradcheck_of_pool(rng):
    """The clusters stay as they are over steps as small as these; float32 is what there is."""
    docs = padded(rng, 2, 7, 3, torch.float32)
    options = {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        with pytest.warns(UserWarning, match="double precision"):
            assert check(lambda x: pvt.pool(x, 3)[0].sin(), docs, **options)


def test_pool_trains_through_maxsim(rng):
    """CRISP: the loss of clustered documents reaches the tokens."""
    queries, docs = padded(rng, 3, 4, 8, torch.float32), padded(rng, 3, 12, 8, torch.float32)
    loss = torch.nn.functional.cross_entropy(pvt.maxsim(queries, pvt.pool(docs, 3)), torch.arange(3))
    before = loss.item()
    (grad,) = torch.autograd.grad(loss, docs)
    with torch.no_grad():
        scores = pvt.maxsim(queries, pvt.pool(docs - 0.1 * grad, 3))
    assert torch.nn.functional.cross_entropy(scores, torch.arange(3)).item() < before


def test_pool_is_a_proper_op_and_compiles(rng):
    docs = sets(rng, [3, 0, 5], 4, torch.float32)
    torch.library.opcheck(torch.ops.polyvec.pool, (*docs, torch.tensor([0, 2, 2, 4]), 4, "kmeans", 20))
    docs = padded(rng, 3, 6, 5, torch.float32)

    def loss(docs):
        return pvt.pool(docs, 2)[0].sin().sum() + pvt.pool(docs, ratio=0.5, method="ward")[0].cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(docs), docs), torch.autograd.grad(loss(docs), docs))


def test_pool_has_the_same_bits_for_any_number_of_threads(rng):
    docs = padded(rng, 50, 40, 8, torch.float32)

    def results(threads):
        with pv.num_threads(threads):
            values, _ = pvt.pool(docs, 5)
            return values.detach(), *torch.autograd.grad(values.sin().sum(), docs)

    for threads in (2, 7):
        for a, b in zip(results(1), results(threads), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: pvt.pool(x.detach().numpy(), 2), TypeError, "torch.pool: docs must be a torch tensor, got ndarray"),
        (lambda x: pvt.pool(x[0], 2), ValueError,
         "torch.pool: docs must be a padded (n, t, d) tensor, (padded, lengths) or (values, offsets), "
         "got shape (3, 4)"),
        (lambda x: pvt.pool(x.double(), 2), TypeError,
         "maxsim.pool: docs must be float32, got float64; cast it with .to(torch.float32)"),
        (lambda x: pvt.pool(x * np.nan, 2), ValueError, "maxsim.pool: docs must be finite, got NaN or Inf in row 0"),
        (lambda x: pvt.pool(x), ValueError,
         "torch.pool: k or ratio must be given, and not both, got k=None, ratio=None"),
        (lambda x: pvt.pool(x, 2, ratio=0.5), ValueError,
         "torch.pool: k or ratio must be given, and not both, got k=2, ratio=0.5"),
        (lambda x: pvt.pool(x, 2.5), TypeError, "torch.pool: k must be an integer, got float"),
        (lambda x: pvt.pool(x, 2, max_iter=1.5), TypeError, "torch.pool: max_iter must be an integer, got float"),
        (lambda x: pvt.pool(x, 0), ValueError, "torch.pool: k must be at least 1, got 0"),
        (lambda x: pvt.pool(x, ratio=1.5), ValueError, "torch.pool: ratio must be in (0, 1], got 1.5"),
        (lambda x: pvt.pool(x, 2, method="mean"), ValueError,
         "torch.pool: method must be one of 'kmeans', 'ward', got 'mean'"),
        (lambda x: pvt.pool(x, 2, max_iter=0), ValueError, "torch.pool: max_iter must be at least 1, got 0"),
        (lambda x: pv.maxsim.pool(x, 2), TypeError,
         "maxsim.pool: docs must not require grad, got a tensor that does; use polyvec.torch.pool or .detach()"),
    ],
)  # fmt: skip
def test_errors_of_pool(call, error, text):
    with pytest.raises(error) as caught:
        call(torch.ones(2, 3, 4, requires_grad=True))
    assert str(caught.value) == text


# Errors


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
         "torch.maxsim: docs: lengths must be in [0, 3], got 4 at position 1"),
        (lambda x: pvt.maxsim(x, (x[0], torch.tensor([0, 4]))), ValueError,
         "maxsim.match: doc offsets must end at the number of rows (3), got 4"),
        (lambda x: pvt.maxsim(x, (x[0], torch.tensor([0, 4], dtype=torch.int32))), ValueError,
         "Ragged: offsets must end at the number of rows of values (3), got 4"),
        (lambda x: pvt.maxsim_pairs(x, x, query_mask=torch.ones(2, 4, dtype=torch.int64)), ValueError,
         "torch.maxsim_pairs: queries: mask must have shape (2, 3), got (2, 4)"),
        (lambda x: pvt.MaxSimLoss()(x, x, doc_mask=torch.ones(2, 3)), TypeError,
         "torch.maxsim: docs: mask must be bool, or integers of 0 and 1, got float32"),
    ],
)  # fmt: skip
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(padded(rng, 2, 3, 4))
    assert str(caught.value) == text
