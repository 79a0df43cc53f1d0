"""Training in torch: a step of learned quantisation or of embeddings of a graph, its time and memory."""

import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("torch.nn.functional")
pvt = pytest.importorskip("polyvec.torch")


@pytest.fixture
def normal():
    """Makes a normal tensor of a shape that requires grad."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).requires_grad_()


def test_vq_assign(compare, benchmark, peak_megabytes, normal, threads):
    """A codebook of 65,536: torch stores n x K distances."""
    torch.set_num_threads(threads)
    n, k, d = 2048, 65536, 128
    x, codebook = normal(n, d).detach(), normal(k, d).detach()

    def in_torch():
        return (codebook.square().sum(1) - 2 * (x @ codebook.T)).argmin(1)

    expected = in_torch()
    memory = {"polyvec": peak_megabytes(lambda: pvt.vq_assign(x, codebook)), "torch": peak_megabytes(in_torch)}
    assert memory["polyvec"] < 100 < memory["torch"]
    benchmark.extra_info["megabytes"] = memory
    compare(
        lambda: pvt.vq_assign(x, codebook).ids,
        {"torch": in_torch},
        check=lambda ids: torch.equal(ids, expected) or pytest.fail("other codewords"),
        flops=2 * n * k * d,
    )


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_soft_assign_and_gradients(compare, benchmark, peak_megabytes, normal, threads, hard):
    """A step of learning the codebooks of a product quantizer: 64 x 256 codewords.

    Ours makes 5 products of n x K x d with `hard`, 7 without (of the logits twice, rather than to store probabilities)
    and 4 M or 8 M exponentials: on a Zen 3 core 5 or 7 ms, and 1.2 ms every 4 M. It takes twice that. Gradients of
    codewords are added up in tiles of registers, exponentials computed four at a time: before, the soft ratio was 1.5
    there.
    """
    torch.set_num_threads(threads)
    n, m, k, d = 256, 64, 256, 768
    x, codebooks, weights = normal(n, d), normal(m, k, d // m), normal(n, d).detach()

    def in_bmm():
        pieces = x.view(n, m, -1).transpose(0, 1)
        logits = torch.baddbmm(-codebooks.square().sum(-1)[:, None], pieces, codebooks.transpose(1, 2), alpha=2)
        p = logits.softmax(-1)
        if hard:
            p = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0) - p.detach() + p
        return torch.bmm(p, codebooks).transpose(0, 1).reshape(n, d)

    def step(quantize):
        return torch.autograd.grad((quantize() * weights).sum(), (x, codebooks))

    def ours():
        return step(lambda: pvt.soft_assign(x, codebooks, hard=hard).quantized)

    expected = step(in_bmm)

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-4)

    memory = {"polyvec": peak_megabytes(ours), "torch": peak_megabytes(lambda: step(in_bmm))}
    benchmark.extra_info["megabytes"] = memory
    compare(ours, {"torch bmm": lambda: step(in_bmm)}, check=check, flops=10 * n * k * d)


def test_max_sim_distillation_step(compare, normal, threads):
    """16 queries of 32 tokens and 8 documents of 180 for each, and both gradients, as einsum of these pairs alone."""
    torch.set_num_threads(threads)
    queries, docs, teacher = normal(16, 32, 128), normal(128, 180, 128), normal(16, 8).detach()
    loss = pvt.MaxSimDistillationLoss()

    def in_torch():
        scores = torch.einsum("nid,nmtd->nmit", queries, docs.view(16, 8, 180, 128)).amax(3).sum(2)
        least, most = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        student, target = ((scores - least) / (most - least)).log_softmax(1), teacher.log_softmax(1)
        return functional.kl_div(student, target, reduction="batchmean", log_target=True)

    def step(loss):
        return torch.autograd.grad(loss(), (queries, docs))

    expected = step(in_torch)

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-5)

    compare(lambda: step(lambda: loss(queries, docs, teacher)), {"torch einsum": lambda: step(in_torch)}, check=check)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_score_pairs_and_gradients(compare, normal, threads, metric):
    """Few of many items: 256 x 8 pairs of 100,000. Either time is that of filling the items' gradient with zeros."""
    torch.set_num_threads(threads)
    queries, items = normal(256, 64), normal(100_000, 64)
    ids = torch.randint(len(items), (256, 8), generator=torch.Generator().manual_seed(0))

    def scores_in_torch():
        q, x = queries, functional.embedding(ids, items)
        if metric == "l2":
            return (q[:, None] - x).square().sum(2)
        if metric == "cosine":
            q, x = functional.normalize(q), functional.normalize(x, dim=2)
        return (x @ q[:, :, None])[:, :, 0]

    def step(scores):
        return torch.autograd.grad(scores().sum(), (queries, items))

    expected = step(scores_in_torch)

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-4)

    compare(
        lambda: step(lambda: pvt.score_pairs(queries, items, ids, metric=metric)),
        {"torch": lambda: step(scores_in_torch)},
        check=check,
    )


@pytest.mark.parametrize(
    ("nq", "n", "d"),
    [(1024, 40_943, 200), (1024, 40_943, 800), (4096, 4096, 128), (512, 512, 128)],
)
def test_logsumexp_and_gradients(compare, benchmark, peak_megabytes, normal, threads, nq, n, d):
    """1-vs-all of WN18RR, and batches of InfoNCE: torch stores the scores and their softmax.

    Ours makes four products to torch's three, and an exponential a score twice. Nine tenths of its time are tiles of
    products, the rest exponentials. What torch takes beside products are passes over scores, most of them over fresh
    pages where these do not fit the cache.
    """
    torch.set_num_threads(threads)
    queries, items = normal(nq, d), normal(n, d)
    queries = (queries.detach() * d**-0.5).requires_grad_()

    def step(logsumexp):
        return torch.autograd.grad(logsumexp().mean(), (queries, items))

    def ours():
        return step(lambda: pvt.logsumexp(queries, items))

    def in_torch():
        return step(lambda: torch.logsumexp(queries @ items.T, 1))

    expected = in_torch()

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-8)

    benchmark.extra_info["megabytes"] = {"polyvec": peak_megabytes(ours), "torch": peak_megabytes(in_torch)}
    compare(ours, {"torch": in_torch}, check=check, flops=8 * nq * n * d)


@pytest.mark.parametrize(("n", "dim"), [(500, 50), (1000, 200)])
def test_relation_scorer_loss_over_all(compare, threads, n, dim):
    """The loss of n triples among the 40,943 entities of WN18RR, and its gradients: torch stores all scores."""
    torch.set_num_threads(threads)
    scorer = pvt.RelationScorer(40_943, 22, dim)
    generator = torch.Generator().manual_seed(0)
    heads, relations, tails = (torch.randint(size, (n,), generator=generator) for size in (40_943, 22, 40_943))

    def step(loss):
        return torch.autograd.grad(loss(), (scorer.entities, scorer.relations))

    def in_torch():
        return step(lambda: functional.cross_entropy(scorer(heads, relations), tails))

    expected = in_torch()

    def check(result):
        for gradient, same in zip(result, expected, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-6)

    compare(lambda: step(lambda: scorer.loss(heads, relations, tails)), {"torch": in_torch}, check=check)


@pytest.mark.parametrize("negatives", ["shared", "own"])
def test_relation_scorer_step(compare, threads, negatives):
    """The loss of 512 triples of a graph of 200,000 entities by sampled negatives, and its sparse gradients.

    torch does what is usually written: it embeds heads, tails and negatives (sparse, too), multiplies quaternions
    component by component, and scores by one product where the 4096 negatives are shared, else by a product a triple
    with 128 of its own. The three products of shared negatives, 4.9 GFLOP by torch's matmul, are two thirds of either
    time. Own negatives are 65,536 embeddings of 1.6 KB: torch stores
    them twice more, as what is multiplied and as gradients.
    """
    torch.set_num_threads(threads)
    n, num_entities, num_relations, dim = 512, 200_000, 20, 100
    generator = torch.Generator().manual_seed(0)
    heads, relations, tails = (
        torch.randint(size, (n,), generator=generator) for size in (num_entities, num_relations, num_entities)
    )
    others = torch.randint(num_entities, (4096,) if negatives == "shared" else (n, 128), generator=generator)
    scorer = pvt.RelationScorer(num_entities, num_relations, dim, sparse=True)
    table = scorer.entities.detach().flatten(1).clone().requires_grad_()

    def ours():
        loss = scorer.loss(heads, relations, tails, negatives=others)
        return torch.autograd.grad(loss, (scorer.entities, scorer.relations))

    def in_torch():
        h, t, o = (functional.embedding(ids, table, sparse=True) for ids in (heads, tails, others))
        a, b, c, d = h.view(n, 4, dim).unbind(1)
        w, x, y, z = functional.normalize(scorer.relations, dim=1)[relations].unbind(1)
        products = (
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        )
        queries = torch.cat(products, 1)
        right = (queries * t).sum(1, keepdim=True)
        wrong = queries @ o.T if negatives == "shared" else torch.einsum("nd,nmd->nm", queries, o)
        scores = torch.cat([right, wrong.masked_fill(others == tails[:, None], -torch.inf)], 1)
        return torch.autograd.grad(functional.cross_entropy(scores, torch.zeros_like(tails)), (table, scorer.relations))

    expected = in_torch()

    def check(result):
        rows, same = (gradient.coalesce() for gradient in (result[0], expected[0]))
        assert torch.equal(rows.indices(), same.indices())
        torch.testing.assert_close(rows.values().flatten(1), same.values(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-3, atol=1e-5)

    compare(ours, {"torch": in_torch}, check=check)
