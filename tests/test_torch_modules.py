"""Modules: what they return equals the expressions of their papers, they learn, and torch can save and compile them."""

import numpy as np
import pytest

import polyvec as pv

torch = pytest.importorskip("torch")
functional = torch.nn.functional
pvt = pytest.importorskip("polyvec.torch")
_modules = pytest.importorskip("polyvec.torch._modules")


@pytest.fixture
def tensor(rng):
    """Makes a float32 tensor of a shape that requires grad."""
    return lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).requires_grad_()


@pytest.mark.parametrize(
    "options", [{}, {"update": "gradient"}, {"update": "gradient", "rank": 3}, {"update": "simvq"}], ids=str
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_vector_quantizer_returns_codewords_and_the_losses_of_the_papers(tensor, options, metric):
    quantizer = pvt.VectorQuantizer(6, 20, metric=metric, commitment=0.25, **options)
    codebook, x, weights = quantizer.codebook.detach().clone(), tensor(4, 9, 6), tensor(4, 9, 6).detach()
    quantized, ids, loss = quantizer(x)
    assert torch.equal(ids, pvt.vq_assign(x, codebook, metric=metric).ids)
    assert torch.equal(quantized, codebook[ids])
    error = (x - codebook[ids]).square().mean()
    torch.testing.assert_close(loss, error * (1.25 if options else 0.25))
    (dx,) = torch.autograd.grad((quantized * weights).sum(), x, retain_graph=True)
    assert torch.equal(dx, weights)
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(dx, 0.25 * 2 * (x - codebook[ids]).detach() / x.numel())
    learned = list(quantizer.parameters())
    assert len(learned) == {0: 0, 1: 1, 2: 2}[len(options)]
    if learned:
        same = functional.mse_loss(quantizer.codebook[ids], x.detach())
        for a, b in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(same, learned), strict=True):
            torch.testing.assert_close(a, b)


def test_moving_averages(tensor):
    quantizer, x = pvt.VectorQuantizer(2, 3, decay=0.5, epsilon=0.0), torch.tensor([[1.0, 0], [3, 0], [0, 5]])
    quantizer.basis.copy_(torch.tensor([[1.0, 0], [0, 4], [-9, -9]]))
    quantizer.sums.copy_(quantizer.basis)
    assert quantizer(x)[1].tolist() == [0, 0, 1]
    # counts 0.5 * 1 + 0.5 * (2, 1, 0); sums 0.5 * old + 0.5 * ((4, 0), (0, 5), 0)
    assert quantizer.counts.tolist() == [1.5, 1.0, 0.5]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2.5 / 1.5, 0], [0, 4.5], [-9, -9]]))
    before = quantizer.codebook.clone()
    quantizer.eval()(x)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("options", [{"dead_below": 1.0}, {"update": "gradient"}, {"update": "simvq"}], ids=str)
def test_a_batch_without_vectors_changes_nothing(options):
    quantizer = pvt.VectorQuantizer(4, 8, **options)
    before = {name: x.clone() for name, x in quantizer.state_dict().items()}
    x = torch.ones(2, 0, 4, requires_grad=True)
    quantized, ids, loss = quantizer(x)
    assert (quantized.shape, ids.shape, loss.item()) == ((2, 0, 4), (2, 0), 0)
    loss.backward()
    assert all(p.grad.eq(0).all() for p in quantizer.parameters() if p.grad is not None)
    assert all(torch.equal(x, before[name]) for name, x in quantizer.state_dict().items())


def test_dead_codewords_are_replaced_by_rows_of_the_batch(rng):
    quantizer, x = pvt.VectorQuantizer(2, 5, decay=0.5, dead_below=0.75), torch.tensor([[1.0, 0], [3, 0], [0, 5]])
    quantizer.basis.copy_(torch.tensor([[1.0, 0], [0, 4], [-9, -9], [-8, -8], [-7, -7]]))
    quantizer.sums.copy_(quantizer.basis)
    quantizer(x)
    assert quantizer.counts.tolist() == [1.5, 1.0, 0.75, 0.75, 0.75]  # three of them fell to 0.5
    replaced = quantizer.codebook[2:].tolist()
    assert sorted(replaced) == sorted(x.tolist())  # three rows for three codewords, each once
    torch.testing.assert_close(quantizer.sums[2:], 0.75 * quantizer.codebook[2:])
    before = quantizer.codebook.clone()
    quantizer.eval()(x)
    assert torch.equal(quantizer.codebook, before)


def test_no_more_dead_codewords_are_replaced_than_there_are_rows():
    quantizer = pvt.VectorQuantizer(2, 6, decay=0.0, dead_below=0.5)
    quantizer.basis.copy_(torch.arange(12.0).reshape(6, 2))
    quantizer.sums.copy_(quantizer.basis)
    quantizer(torch.tensor([[0.0, 1], [0, 1.5]]))
    assert quantizer.counts.tolist() == [2, 0.5, 0.5, 0, 0, 0]


def test_replacing_dead_codewords_compiles(tensor):
    quantizer = pvt.VectorQuantizer(8, 16, dead_below=1.0)
    torch.compile(quantizer, fullgraph=True, backend="aot_eager")(tensor(5, 8))
    assert (quantizer.counts == 1).any()


def test_replacing_dead_codewords_uses_the_codebook(rng):
    x = torch.from_numpy(rng.standard_normal((2000, 8)).astype(np.float32)) + 3
    used = {}
    for dead_below in (0.0, 1.0):
        torch.manual_seed(0)
        quantizer = pvt.VectorQuantizer(8, 256, dead_below=dead_below)
        for _ in range(20):
            _, ids, _ = quantizer(x)
        used[dead_below] = pvt.codebook_usage(ids, 256).utilization.item()
    assert used[0.0] < 0.6 < 0.95 < used[1.0]


@pytest.mark.parametrize(
    "options", [{}, {"update": "gradient"}, {"update": "gradient", "rank": 3}, {"update": "simvq"}], ids=str
)
def test_residual_quantizer_is_a_chain_of_quantizers(tensor, options):
    quantizer, x, weights = pvt.ResidualVectorQuantizer(6, 20, 3, **options).eval(), tensor(4, 9, 6), tensor(4, 9, 6)
    quantized, ids, losses = quantizer(x)
    residual, total = x.detach(), torch.zeros_like(x)
    for level in range(3):
        q, chosen, loss = quantizer.quantizers[level](residual)
        assert torch.equal(ids[..., level], chosen)
        torch.testing.assert_close(losses[level], loss)
        total = total + q.detach()
        residual = x.detach() - total
    assert torch.equal(quantized, total)
    torch.testing.assert_close(quantizer.decode(ids), total)
    torch.testing.assert_close(quantizer.decode(ids[..., :1]), quantizer.quantizers[0].codebook[ids[..., 0]])
    (dx,) = torch.autograd.grad((quantized * weights.detach()).sum(), x, retain_graph=True)
    assert torch.equal(dx, weights)  # straight through, once
    (dx,) = torch.autograd.grad(losses.sum(), x)
    partial = [quantizer.decode(ids[..., :level]).detach() for level in (1, 2, 3)]
    torch.testing.assert_close(dx, sum(2 * (x - q).detach() / x.numel() for q in partial))


def test_residual_quantizer_learns_level_by_level(rng):
    x = torch.from_numpy(rng.standard_normal((2000, 8)).astype(np.float32))
    torch.manual_seed(0)
    quantizer = pvt.ResidualVectorQuantizer(8, 32, 4, dead_below=1.0)
    for _ in range(30):
        quantizer(x)
    _, ids, losses = quantizer.eval()(x)
    errors = [functional.mse_loss(quantizer.decode(ids[..., :level]), x).item() for level in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25 * x.var().item()
    torch.testing.assert_close(losses, torch.tensor(errors))


def test_quantizer_dropout_trains_prefixes(tensor):
    quantizer, x = pvt.ResidualVectorQuantizer(6, 20, 4, least_levels=2), tensor(5, 6)
    seen = set()
    for _ in range(50):
        before = [q.codebook.clone() for q in quantizer.quantizers]
        quantized, ids, losses = quantizer(x)
        used = int((ids[0] >= 0).sum())
        seen.add(used)
        assert (ids[:, :used] >= 0).all()
        assert (ids[:, used:] == -1).all()
        assert (losses[used:] == 0).all()
        torch.testing.assert_close(quantized, sum(before[level][ids[:, level]] for level in range(used)))
        moved = [not torch.equal(a, q.codebook) for a, q in zip(before, quantizer.quantizers, strict=True)]
        assert not any(moved[used:])
        decoded = quantizer.decode(ids)
        torch.testing.assert_close(decoded, quantizer.decode(ids[:, :used]))
    assert seen == {2, 3, 4}
    assert (quantizer.eval()(x)[1] >= 0).all()


def test_simvq_uses_a_codebook_that_collapses_otherwise(rng):
    """On normal vectors far from the codewords the few nearest ones win everything, unless one step moves all."""
    torch.manual_seed(0)
    x = torch.from_numpy(rng.standard_normal((2048, 8)).astype(np.float32)) + 4

    def utilization(update):
        quantizer = pvt.VectorQuantizer(8, 128, update=update)
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        for _ in range(150):
            _, ids, loss = quantizer(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return pvt.codebook_usage(ids, 128).utilization.item()

    assert utilization("simvq") > 2 * utilization("gradient")


def test_max_sim_loss(tensor):
    queries, docs, negatives = tensor(3, 4, 8), tensor(5, 6, 8), tensor(3, 2, 8)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[1, 2:] = False
    scores = torch.einsum("qid,ntd->qnit", queries, docs).masked_fill(~mask[None, :, None], -torch.inf).amax(3).sum(2)
    loss = pvt.MaxSimLoss(temperature=0.5)
    value = loss(queries, docs, doc_mask=mask)
    expected = functional.cross_entropy(scores / 0.5, torch.arange(3))
    torch.testing.assert_close(value, expected)
    for a, b in zip(
        torch.autograd.grad(value, (queries, docs)), torch.autograd.grad(expected, (queries, docs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    right = torch.einsum("qid,qtd->qit", queries, docs[2:]).amax(2).sum(1)
    wrong = torch.einsum("qid,qtd->qit", queries, negatives).amax(2).sum(1)
    pairwise = functional.cross_entropy(torch.stack([right, wrong], 1) / 0.5, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(loss(queries, docs[2:], negatives), pairwise)


def scores_in_torch(queries, docs, lengths):
    """(n, m): each query of one length against documents of its own, all padded to one length."""
    pairs = torch.einsum("nid,nmtd->nmit", queries, docs)
    padding = torch.arange(docs.shape[2]) >= lengths[..., None]
    return pairs.masked_fill(padding[:, :, None], -torch.inf).amax(3).sum(2)


def test_max_sim_loss_of_columns_and_of_several_negatives(tensor):
    queries, positives, negatives = tensor(3, 4, 8), tensor(3, 6, 8), tensor(3, 2, 5, 8)
    lengths = torch.tensor([[5, 1], [2, 5], [4, 4]])
    mask = torch.arange(5) < lengths[..., None]
    right = scores_in_torch(queries, positives[:, None], torch.full((3, 1), 6))
    wrong = scores_in_torch(queries, negatives, lengths)
    loss, inputs = pvt.MaxSimLoss(temperature=0.5), (queries, positives, negatives)

    def check(value, scores, targets):
        expected = functional.cross_entropy(scores / 0.5, targets)
        torch.testing.assert_close(value, expected)
        for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    own = loss(queries, positives, negatives.flatten(0, 1), negative_mask=mask.flatten(0, 1))
    check(own, torch.cat([right, wrong], 1), torch.zeros(3, dtype=torch.int64))
    columns = [positives, negatives[:, 0], negatives[:, 1]]
    rows = [queries[i : i + 1].expand(3, -1, -1) for i in range(3)]
    of_all = [
        torch.stack([scores_in_torch(q, c[:, None], n[:, None])[:, 0] for q in rows])
        for c, n in zip(columns, (torch.full((3,), 6), *lengths.T), strict=True)
    ]
    check(loss(queries, columns, doc_mask=[None, mask[:, 0], mask[:, 1]]), torch.cat(of_all, 1), torch.arange(3))


@pytest.mark.parametrize("normalize", [True, False])
def test_max_sim_distillation_loss_is_the_divergence_from_the_teacher(rng, normalize):
    queries, docs = (
        torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((4, 3, 8), (4, 5, 6, 8))
    )
    teacher = torch.from_numpy(10 * rng.standard_normal((4, 5)))
    lengths = torch.from_numpy(rng.integers(1, 7, (4, 5)))
    lengths[1, 3], teacher[1, 3] = 0, -torch.inf  # the second query has four documents
    scores = scores_in_torch(queries, docs, lengths)
    expected = 0
    for row, (student, logits) in enumerate(zip(scores, teacher, strict=True)):
        kept = logits > -torch.inf
        student, p = student[kept], torch.softmax(logits[kept] / 3, 0)
        if normalize:
            student = (student - student.min()) / (student.max() - student.min())
        assert len(p) == (4 if row == 1 else 5)
        expected = expected + (p * (p.log() - torch.log_softmax(student / 3, 0))).sum() / 4
    mask = torch.arange(6) < lengths[..., None]
    ragged = docs[mask], functional.pad(lengths.flatten().cumsum(0), (1, 0))
    loss = pvt.MaxSimDistillationLoss(normalize=normalize, temperature=3)
    for value in (
        loss(queries, docs.flatten(0, 1), teacher, doc_mask=mask.flatten(0, 1)),
        loss((queries.flatten(0, 1), torch.arange(5) * 3), ragged, teacher),
    ):
        torch.testing.assert_close(value, expected)
        gradients = torch.autograd.grad(value, (queries, docs))
        for a, b in zip(gradients, torch.autograd.grad(expected, (queries, docs), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_max_sim_distillation_loss_of_equal_scores_and_of_nothing(tensor):
    loss, docs = pvt.MaxSimDistillationLoss(), tensor(2, 3, 8)
    value = loss(docs[:1], docs[:1].expand(2, 3, 8), torch.tensor([[2.0, 2.0]]))
    assert value.item() == pytest.approx(0)
    assert torch.autograd.grad(value, docs)[0].isfinite().all()
    absent = loss(docs[:1], docs, torch.full((1, 2), -torch.inf))
    assert absent.item() == 0
    assert not torch.autograd.grad(absent, docs)[0].any()
    assert loss(docs[:0], docs[:0], torch.ones(0, 0)).item() == 0


@pytest.mark.parametrize("algebra", ["quaternion", "dihedron"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_relation_scorer_agrees_with_the_link_predictor(rng, algebra, metric):
    scorer = pvt.RelationScorer(30, 3, 5, algebra=algebra, metric=metric, translate=True, bias=True)
    with torch.no_grad():
        scorer.translations.normal_()
        scorer.biases.normal_()
    heads, relations, tails = (torch.from_numpy(rng.integers(0, n, 8)) for n in (30, 3, 30))
    scores = scorer(heads, relations)
    some = (tails[:, None] + torch.from_numpy(rng.integers(1, 30, (8, 4)))) % 30
    torch.testing.assert_close(scorer(heads, relations, some), scores.gather(1, some), rtol=1e-4, atol=1e-4)
    predictor = pv.retrieve.LinkPredictor(
        scorer.entities.detach(),
        scorer.relations.detach(),
        algebra=algebra,
        metric=metric,
        translations=scorer.translations.detach(),
        bias=scorer.biases.detach(),
    )
    best, ids = (torch.as_tensor(a) for a in predictor.predict_tails(heads, relations, k=5))
    expected = scores.topk(5)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(best.abs(), expected.values.abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.loss(heads, relations, tails), functional.cross_entropy(scores, tails))
    sampled = torch.cat([scores.gather(1, tails[:, None]), scores.gather(1, some)], 1)
    expected = functional.cross_entropy(sampled, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(scorer.loss(heads, relations, tails, negatives=some), expected, rtol=1e-4, atol=1e-4)
    scorer.loss(heads, relations, tails, negatives=7).backward()
    assert all(p.grad is not None for p in scorer.parameters())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_loss_over_many_entities_is_that_of_all_scores(rng, monkeypatch, metric, sparse):
    calls = []
    monkeypatch.setattr(_modules, "logsumexp", lambda *x, **y: calls.append(x) or pvt.logsumexp(*x, **y))
    scorer = pvt.RelationScorer(1000, 3, 1, metric=metric, translate=True, bias=True, sparse=sparse)
    heads, relations, tails = (torch.from_numpy(rng.integers(0, n, 40)) for n in (1000, 3, 1000))
    loss, expected = scorer.loss(heads, relations, tails), functional.cross_entropy(scorer(heads, relations), tails)
    assert len(calls) == 1
    torch.testing.assert_close(loss, expected)
    parameters = list(scorer.parameters())
    gradients = [torch.autograd.grad(x, parameters) for x in (loss, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        scorer.loss(heads, relations, tails)
    scorer.loss(heads[:10], relations[:10], tails[:10])
    assert len(calls) == 1


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_negatives_of_a_batch_are_those_of_each_triple(rng, metric):
    scorer = pvt.RelationScorer(30, 3, 5, metric=metric, translate=True, bias=True)
    heads, relations, tails = (torch.from_numpy(rng.integers(0, n, 8)) for n in (30, 3, 30))
    shared = torch.from_numpy(rng.permutation(30)[:20])
    scores = scorer(heads, relations)
    right = scores.gather(1, tails[:, None])
    wrong = scores[:, shared].masked_fill(shared == tails[:, None], -torch.inf)
    assert wrong.isinf().any()  # a right tail is among them
    expected = (torch.cat([right, wrong], 1).logsumexp(1) - right[:, 0]).mean()
    for negatives in (shared, shared.expand(8, 20)):
        loss = scorer.loss(heads, relations, tails, negatives=negatives)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    everything = scorer.loss(heads, relations, tails, negatives=torch.arange(30))
    torch.testing.assert_close(everything, scorer.loss(heads, relations, tails), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("negatives", [None, 5, torch.tensor([3, 0]), torch.tensor([[3], [0], [2]])], ids=str)
def test_ids_of_a_loss_are_any_integers(negatives, sparse):
    scorer = pvt.RelationScorer(30, 3, 5, bias=True, sparse=sparse)
    ids = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 1]), torch.tensor([29, 4, 2])

    def loss(dtype):
        torch.manual_seed(0)
        others = negatives.to(dtype) if isinstance(negatives, torch.Tensor) else negatives
        return scorer.loss(*(x.to(dtype) for x in ids), negatives=others)

    loss(torch.int32).backward()
    assert torch.equal(loss(torch.int32), loss(torch.int64))
    ids[0][1] = -1
    with pytest.raises(IndexError):
        loss(torch.int64)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # by torch's own Adagrad
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("shape", [(4,), (6, 4)])
def test_sparse_gradients_are_the_dense_ones(rng, metric, shape):
    dense = pvt.RelationScorer(50, 3, 5, metric=metric, translate=True, bias=True)
    sparse = pvt.RelationScorer(50, 3, 5, metric=metric, translate=True, bias=True, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    heads, relations, tails = (torch.from_numpy(rng.integers(0, n, 6)) for n in (50, 3, 50))
    negatives = torch.from_numpy(rng.integers(0, 50, shape))
    touched = {
        "entities": torch.cat([heads, tails, negatives.flatten()]).unique(),
        "biases": torch.cat([tails, negatives.flatten()]).unique(),
    }
    optimizers = [torch.optim.Adagrad(scorer.parameters(), 0.1) for scorer in (dense, sparse)]
    for _ in range(3):
        for scorer, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            loss = scorer.loss(heads, relations, tails, negatives=negatives)
            loss = (
                loss
                + scorer.embed(torch.stack([heads, tails])).pow(3).mean()
                + scorer(heads, relations, tails[:, None]).mean()
            )
            loss.backward()
            optimizer.step()
        for name, parameter in sparse.named_parameters():
            grad = parameter.grad
            assert grad.is_sparse == (name in touched)
            if grad.is_sparse:
                assert torch.equal(grad.coalesce().indices()[0], touched[name])
                grad = grad.to_dense()
            torch.testing.assert_close(grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parameter, dense.get_parameter(name), rtol=1e-4, atol=1e-5)
    sparse.zero_grad()
    sparse.loss(heads, relations, tails).backward()
    assert not sparse.entities.grad.is_sparse
    assert sparse.embed(heads.view(2, 3)).shape == (2, 3, 4, 5)


MODULES = {
    "ema": lambda: pvt.VectorQuantizer(8, 16).eval(),
    "simvq": lambda: pvt.VectorQuantizer(8, 16, update="simvq"),
    "residual": lambda: pvt.ResidualVectorQuantizer(8, 16, 3).eval(),
    "MaxSimLoss": pvt.MaxSimLoss,
    "MaxSimDistillationLoss": pvt.MaxSimDistillationLoss,
    "RelationScorer": lambda: pvt.RelationScorer(20, 4, 8, dropout=0.5).eval(),
}


def arguments_of(name, tensor):
    if name == "MaxSimLoss":
        return tensor(3, 4, 8), tensor(3, 5, 8)
    if name == "MaxSimDistillationLoss":
        return tensor(3, 4, 8), tensor(6, 5, 8), tensor(3, 2)
    ids = torch.arange(4)
    return (ids, ids) if name == "RelationScorer" else (tensor(5, 8),)


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_save_and_obey_autocast(tensor, name):
    module, arguments = MODULES[name](), arguments_of(name, tensor)
    last = (lambda result: result[-1] if isinstance(result, tuple) else result)(module(*arguments))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled[-1] if isinstance(compiled, tuple) else compiled, last)
    copy = MODULES[name]()
    copy.load_state_dict(module.state_dict())
    again = copy(*arguments)
    torch.testing.assert_close(again[-1] if isinstance(again, tuple) else again, last)
    narrow = [a.detach().bfloat16() if a.is_floating_point() else a for a in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        result = module(*narrow)
    result = result[-1] if isinstance(result, tuple) else result
    torch.testing.assert_close(result.float(), last, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pvt.VectorQuantizer(4, 8, metric="ip"), ValueError,
         "torch.VectorQuantizer: metric must be one of 'l2', 'cosine', got 'ip'"),
        (lambda: pvt.VectorQuantizer(4, 8, update="sgd"), ValueError,
         "torch.VectorQuantizer: update must be one of 'ema', 'gradient', 'simvq', got 'sgd'"),
        (lambda: pvt.VectorQuantizer(4, 8, rank=2), ValueError,
         "torch.VectorQuantizer: rank must be None unless update is 'gradient', got 2"),
        (lambda: pvt.VectorQuantizer(4, 8, decay=1.0), ValueError,
         "torch.VectorQuantizer: decay must be in [0, 1), got 1.0"),
        (lambda: pvt.VectorQuantizer(4, 8, dead_below=-1.0), ValueError,
         "torch.VectorQuantizer: dead_below must be at least 0, got -1.0"),
        (lambda: pvt.VectorQuantizer(4, 8, update="simvq", dead_below=1.0), ValueError,
         "torch.VectorQuantizer: dead_below must be 0 unless update is 'ema', got 1.0"),
        (lambda: pvt.ResidualVectorQuantizer(4, 8, 0), ValueError,
         "torch.ResidualVectorQuantizer: levels must be at least 1, got 0"),
        (lambda: pvt.ResidualVectorQuantizer(4, 8, 3, least_levels=4), ValueError,
         "torch.ResidualVectorQuantizer: least_levels must be in [1, 3], got 4"),
        (lambda: pvt.ResidualVectorQuantizer(4, 8, 3).decode(torch.zeros(2, 4, dtype=torch.int64)), ValueError,
         "torch.ResidualVectorQuantizer.decode: ids must have 1 to 3 levels, got shape (2, 4)"),
        (lambda: pvt.ResidualVectorQuantizer(4, 8, 3).decode(torch.tensor(1)), ValueError,
         "torch.ResidualVectorQuantizer.decode: ids must have 1 to 3 levels, got shape ()"),
        (lambda: pvt.MaxSimLoss()(torch.ones(1, 1, 2), torch.ones(1, 1, 2), negative_mask=torch.ones(1, 1).bool()),
         ValueError, "torch.MaxSimLoss: negative_mask must be None without negatives, got Tensor of shape (1, 1)"),
        (lambda: pvt.MaxSimLoss(temperature=0), ValueError,
         "torch.MaxSimLoss: temperature must be above 0, got 0"),
        (lambda: pvt.MaxSimLoss()(torch.ones(3, 1, 2), torch.ones(2, 1, 2)), ValueError,
         "torch.MaxSimLoss: docs must have a document for each query (3), got 2"),
        (lambda: pvt.MaxSimLoss()(torch.ones(2, 1, 2), [torch.ones(2, 1, 2)] * 2, doc_mask=torch.ones(2, 1)),
         ValueError, "torch.MaxSimLoss: doc_mask must be a list of one mask for each of 2 docs, got Tensor"),
        (lambda: pvt.MaxSimLoss()(torch.ones(2, 1, 2), []), ValueError,
         "torch.MaxSimLoss: docs must not be an empty list"),
        (lambda: pvt.MaxSimLoss()(torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.ones(3, 1, 2)), ValueError,
         "torch.MaxSimLoss: negatives must have as many documents for each query (2), got 3"),
        (lambda: pvt.MaxSimDistillationLoss(temperature=-1), ValueError,
         "torch.MaxSimDistillationLoss: temperature must be above 0, got -1"),
        (lambda: pvt.MaxSimDistillationLoss()(torch.ones(2, 1, 2), torch.ones(4, 1, 2), torch.ones(2, 3)), ValueError,
         "torch.MaxSimDistillationLoss: teacher must have shape (2, 2), got (2, 3)"),
        (lambda: pvt.MaxSimDistillationLoss()(torch.ones(2, 1, 2), torch.ones(4, 1, 2), [[1, 2], [3, 4]]), TypeError,
         "torch.MaxSimDistillationLoss: teacher must be a torch tensor, got list"),
        (lambda: pvt.RelationScorer(4, 2, 3, metric="cosine"), ValueError,
         "torch.RelationScorer: metric must be one of 'ip', 'l2', got 'cosine'"),
        (lambda: pvt.RelationScorer(4, 2, 3).loss(*torch.zeros(3, 2, dtype=torch.int64), negatives=0), ValueError,
         "torch.RelationScorer.loss: negatives must be at least 1, got 0"),
        (lambda: pvt.RelationScorer(4, 2, 3).loss(*torch.zeros(3, 2, dtype=torch.int64), negatives=2.5), TypeError,
         "torch.RelationScorer.loss: negatives must be an integer or a tensor, got float"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
