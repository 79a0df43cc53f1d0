"""`python -m bench.gpu [--out bench/results]`: time the CUDA kernels and their rivals on this machine's GPU.

Writes one table, named after the GPU: the ceilings measured on the spot first (copy bandwidth, bf16 product), then each
case with its median time, the rate it reaches of what the task must move or compute, and every rival's time over ours.
Each result is checked against torch before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

import polyvec as pv
import polyvec.torch as pvt

DEVICE = "cuda"
D = 128  # 4 x 128: rows of 2 KB


@dataclasses.dataclass
class Case:
    """What a task must do, our call for it, and torch's."""

    name: str
    work: float  # bytes to move, or flops
    ours: Callable
    rival: Callable
    tensors: tuple
    grad: torch.Tensor | None = None
    unit: str = "GB/s"
    documents: int = 0  # whose number a second is of interest
    compiled: bool = True  # whether torch.compile can do better than torch's own kernels
    tolerance: dict = dataclasses.field(default_factory=lambda: {"rtol": 1e-4, "atol": 1e-3})


def milliseconds(call, rounds=20):
    """Median time of a call on the GPU, by events: of fewer rounds where they would take more than a second."""
    for _ in range(3):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        last = time.perf_counter() - start
    times = []
    for _ in range(min(rounds, max(3, int(1 / last)))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measured_ceilings():
    """Copy bandwidth in GB/s (bytes read and written) and bf16 product in TFLOP/s, both on random data."""
    x = torch.randn(1 << 29, device=DEVICE)  # 2 GB: larger than any cache
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e6
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * n**3 / milliseconds(lambda: a @ b) / 1e9


def eager_product(x, y):
    """The Hamilton product component by component, as users of torch write it."""
    a, b, c, d = x.unbind(-2)
    p, q, r, s = y.unbind(-2)
    return torch.stack(
        (
            a * p - b * q - c * r - d * s,
            a * q + b * p + c * s - d * r,
            a * r + c * p + d * q - b * s,
            a * s + d * p + b * r - c * q,
        ),
        -2,
    )


def eager_relation_query(entities, relations, heads, relation_ids):
    rotors = torch.nn.functional.normalize(relations, dim=-2)
    return eager_product(entities[heads], rotors[relation_ids]).flatten(1)


def with_gradients(function, tensors, grad):
    """A call that runs `function` forwards and backwards and returns the gradients of `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def cases(n):
    """The hypercomplex engine at n numbers of 4 x D."""
    x, y, grad = (torch.randn(n, 4, D, device=DEVICE) for _ in range(3))
    relations = torch.randn(1000, 4, D, device=DEVICE)
    heads = torch.randint(n, (n,), device=DEVICE)
    relation_ids = torch.randint(len(relations), (n,), device=DEVICE)
    size = x.nbytes

    def query(entities, relations):
        return pvt.relation_query(entities, relations, heads, relation_ids)

    def eager_query(entities, relations):
        return eager_relation_query(entities, relations, heads, relation_ids)

    flat = grad.flatten(1)
    yield Case("product", 3 * size, lambda: pv.hypercomplex.product(x, y), eager_product, (x, y))
    yield Case("normalize", 2 * size, lambda: pv.hypercomplex.normalize(x), eager_normalize, (x,))
    yield Case(
        "relation query",
        2 * size,
        lambda: pv.hypercomplex.relation_query(x, relations, heads, relation_ids),
        eager_query,
        (x, relations),
    )
    both = with_gradients(pvt.product, (x, y), grad)
    yield Case("product, forward and backward", 8 * size, both, eager_product, (x, y), grad)
    both = with_gradients(query, (x, relations), flat)
    yield Case("relation query, forward and backward", 5 * size, both, eager_query, (x, relations), flat)


def search_cases(items, docs):
    """Searches among `items` rows of D float32, and `docs` documents of 180."""
    queries, rows = torch.randn(32, D, device=DEVICE), torch.randn(items, D, device=DEVICE)
    yield Case(
        f"scan.topk, 32 queries, {items:,} items, k = 10",
        rows.nbytes,
        lambda: pv.scan.topk(queries, rows, 10)[0],
        lambda queries, rows: (queries @ rows.T).topk(10).values,
        (queries, rows),
    )
    ids = torch.randint(items, (32, 1000), device=DEVICE)
    yield Case(
        f"scan.score_pairs, 32 queries, 1,000 of {items:,} items each",
        ids.numel() * D * 4,
        lambda: pv.scan.score_pairs(queries, rows, ids),
        lambda queries, rows: torch.einsum("qd,qmd->qm", queries, rows[ids]),
        (queries, rows),
    )
    tokens, padded = torch.randn(1, 32, D, device=DEVICE), torch.randn(docs, 180, D, device=DEVICE)
    sets = pv.Ragged.from_padded(tokens), pv.Ragged.from_padded(padded)
    yield Case(
        f"maxsim.score, 32 tokens, {docs:,} documents of 180",
        padded.nbytes,
        lambda: pv.maxsim.score(*sets),
        lambda tokens, padded: torch.einsum("qid,njd->qnij", tokens, padded).amax(-1).sum(-1),
        (tokens, padded),
    )


def eager_encodings(padded, planes, projections):
    """MUVERA encodings of documents of one length, as users of torch write them, a repetition at a time."""
    n, _, d = padded.shape
    bits = planes.shape[2]
    powers, buckets = 2 ** torch.arange(bits, device=DEVICE), 2**bits
    words = torch.arange(buckets, device=DEVICE)
    distances = ((words[:, None] ^ words)[..., None] & powers > 0).sum(-1)
    first_block, out = torch.arange(n, device=DEVICE)[:, None] * buckets, []
    for plane, projection in zip(planes, projections, strict=True):
        ids = ((padded @ plane > 0) * powers).sum(-1)
        at = (ids + first_block).flatten()
        sums = torch.zeros(n * buckets, d, device=DEVICE).index_add_(0, at, padded.view(-1, d))
        counts = torch.bincount(at, minlength=n * buckets)[:, None]
        nearest = distances[:, ids].argmin(-1).T  # (n, buckets)
        filled = padded.gather(1, nearest[..., None].expand(-1, -1, d)).view(-1, d)
        out.append((torch.where(counts > 0, sums / counts, filled) @ projection).view(n, -1))
    return torch.cat(out, 1).half()


def eager_ids(tokens, planes):
    powers = 2 ** torch.arange(planes.shape[2], device=DEVICE)
    return ((torch.einsum("td,rdj->trj", tokens, planes) > 0) * powers).sum(-1).int()


def fde_cases(docs, t=180):
    """Encodings in float16 of documents of t tokens. Signs are of sums of integers: exact in float32, too."""
    padded = torch.randint(-64, 65, (docs, t, D), device=DEVICE) / 512
    planes = torch.round(64 * torch.randn(20, D, 5)) / 64
    encoder = pv.fde.Encoder(D, hyperplanes=planes)
    sets, out = pv.Ragged.from_padded(padded), torch.empty(docs, encoder.output_dim, device=DEVICE, dtype=torch.half)
    yield Case(
        f"fde.encode_docs, {docs:,} documents of {t}, (20, 5, 16), float16",
        padded.nbytes + out.nbytes,
        lambda: encoder.encode_docs(sets, dtype="float16", out=out),
        eager_encodings,
        (padded, planes.to(DEVICE), torch.from_numpy(encoder.projections.copy()).to(DEVICE)),
        compiled=False,
        tolerance={"rtol": 2e-3, "atol": 1e-3},
        documents=docs,
    )
    tokens, ids = sets.values, torch.empty(docs * t, 20, device=DEVICE, dtype=torch.int32)
    yield Case(
        f"fde.partition, {docs:,} documents of {t}, 20 times 5 planes",
        tokens.nbytes + ids.nbytes,
        lambda: encoder.partition(tokens, out=ids),
        eager_ids,
        (tokens, planes.to(DEVICE)),
        compiled=False,
        documents=docs,
    )


def eager_maxsim(queries, docs, at_once=1 << 28):
    """Scores of padded token sets (nq, tq, D), (nd, td, D), as users of torch write them: some documents at a time."""
    step = max(1, at_once // (queries.shape[0] * queries.shape[1] * docs.shape[1]))
    some = [torch.einsum("qid,njd->qnij", queries, x).amax(-1).sum(-1, dtype=torch.float32) for x in docs.split(step)]
    return torch.cat(some, 1)


def maxsim_cases(docs):
    """Documents of 180 tokens in bfloat16: one query against `docs` of them, and all pairs of 512."""
    step, many = 1 << 16, {"compiled": False, "tolerance": {"rtol": 2e-2, "atol": 0.1}}
    query = torch.randn(1, 32, D, device=DEVICE).bfloat16() / 8
    tokens = torch.empty(docs, 180, D, device=DEVICE, dtype=torch.bfloat16)
    for some in tokens.split(step):
        some.copy_(torch.randn(some.shape, device=DEVICE) / 8)
    for n in (docs, 10_000, 1_000):
        sets = pv.Ragged.from_padded(query), pv.Ragged.from_padded(tokens[:n])
        yield Case(
            f"maxsim.score, 32 tokens, {n:,} documents of 180 bfloat16",
            tokens[:n].nbytes,
            lambda sets=sets: pv.maxsim.score(*sets),
            eager_maxsim,
            (query, tokens[:n]),
            **many,
        )
    sets = pv.Ragged.from_padded(query), pv.Ragged.from_padded(tokens)
    yield Case(
        f"maxsim.topk, the same {docs:,}, k = 10",
        tokens.nbytes,
        lambda: pv.maxsim.topk(*sets, 10)[0],
        lambda query, tokens: eager_maxsim(query, tokens).topk(10).values,
        (query, tokens),
        **many,
    )
    ends = torch.randint(1, docs * 180, (docs - 1,)).sort().values  # as many tokens in documents of any length
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([docs * 180])])
    ragged = pv.Ragged(tokens.view(-1, D), offsets)
    longest = int(ragged.lengths.argmax())
    yield Case(
        f"maxsim.score, the same tokens in {docs:,} documents of random lengths",
        tokens.nbytes,
        lambda: pv.maxsim.score(sets[0], ragged)[:, longest : longest + 1],
        lambda query, doc: eager_maxsim(query, doc),  # of one document: torch has no form for all
        (query, ragged[longest][None]),
        **many,
    )
    queries = torch.randn(512, 32, D, device=DEVICE).bfloat16() / 8
    pairs = pv.Ragged.from_padded(queries), pv.Ragged.from_padded(tokens[:512])
    yield Case(
        "maxsim.score, 512 queries of 32, 512 documents of 180 bfloat16",
        2 * 512 * 32 * 512 * 180 * D,
        lambda: pv.maxsim.score(*pairs),
        eager_maxsim,
        (queries, tokens[:512]),
        unit="TFLOP/s",
        **many,
    )


def residual_case(docs, centroids=8192):
    """One query against documents of 180 tokens as 4-bit residual codes."""
    n = docs * 180
    codes = torch.randint(0, 256, (n, D // 2), device=DEVICE, dtype=torch.uint8)
    ids = torch.randint(centroids, (n,), device=DEVICE, dtype=torch.int32)
    means, weights = torch.randn(centroids, D, device=DEVICE) / 8, torch.randn(16, device=DEVICE).sort().values / 50
    scales = torch.rand(n, device=DEVICE) + 0.5
    sets = pv.Ragged(codes, torch.arange(docs + 1) * 180)
    parts = {"scales": scales, "centroid_ids": ids, "centroids": means, "bucket_weights": weights}
    packed = pv.maxsim.PackedTokens(sets, "residual4", D, **parts)
    query = torch.randn(1, 32, D, device=DEVICE) / 8
    queries = pv.Ragged.from_padded(query)
    reverse = torch.tensor([int(f"{code:04b}"[::-1], 2) for code in range(16)], device=DEVICE)

    def decoded(query, codes):
        some = []
        for first in range(0, docs, 10_000):
            rows = slice(first * 180, (first + 10_000) * 180)
            both = torch.stack([codes[rows] >> 4, codes[rows] & 15], -1).flatten(1).long()
            tokens = (means[ids[rows].long()] + weights[reverse[both]]) * scales[rows, None]
            some.append(eager_maxsim(query, tokens.view(-1, 180, D)))
        return torch.cat(some, 1)

    yield Case(
        f"maxsim.score, 32 tokens, {docs:,} documents of 180, residual4",
        n * (D // 2 + 8),
        lambda: pv.maxsim.score(queries, packed),
        decoded,
        (query, codes),
        compiled=False,
        tolerance={"rtol": 2e-2, "atol": 0.2},
    )


def centroid_case(docs, centroids=8192):
    """One query against documents of 180 tokens of which only centroids are kept."""
    ids = torch.randint(centroids, (docs * 180, 1), device=DEVICE, dtype=torch.int16).view(torch.uint16)
    means, query = torch.randn(centroids, D, device=DEVICE) / 8, torch.randn(1, 32, D, device=DEVICE) / 8
    packed = pv.maxsim.PackedTokens(pv.Ragged(ids, torch.arange(docs + 1) * 180), "centroid", D, centroids=means)
    queries = pv.Ragged.from_padded(query)

    def looked_up(query, means):
        table, rows = query[0] @ means.T, ids.view(torch.int16).view(docs, 180)
        return torch.cat([table[:, some.long()].amax(-1).sum(0)[None] for some in rows.split(10_000)], 1)

    yield Case(
        f"maxsim.score, 32 tokens, {docs:,} documents of 180, centroid",
        ids.nbytes,
        lambda: pv.maxsim.score(queries, packed),
        looked_up,
        (query, means),
        compiled=False,
        tolerance={"rtol": 1e-2, "atol": 0.1},
    )


def certified_case(docs):
    """The exact ten best of float32 tokens, by way of int8 ones; torch scores all."""
    tokens, query = torch.randn(docs, 180, D, device=DEVICE) / 8, torch.randn(1, 32, D, device=DEVICE) / 8
    sets, queries = pv.Ragged.from_padded(tokens), pv.Ragged.from_padded(query)
    packed = pv.maxsim.pack(sets, "int8")
    yield Case(
        f"maxsim.certified_topk, 32 tokens, {docs:,} documents of 180, k = 10",
        tokens.numel(),
        lambda: pv.maxsim.certified_topk(queries, packed, sets, 10).scores,
        lambda query, tokens: eager_maxsim(query, tokens).topk(10).values,
        (query, tokens),
        compiled=False,
        tolerance={"rtol": 1e-2, "atol": 0.1},  # torch's products are of TF32
    )


def soft_assign_case(n, m=64, k=256, d=768):
    """The means of codewords under a softmax, and both gradients."""
    x, codebooks, grad = (torch.randn(s, device=DEVICE) for s in ((n, d), (m, k, d // m), (n, d)))

    def eager(x, codebooks):
        pieces = x.view(n, m, -1).transpose(0, 1)
        distances = (
            pieces.square().sum(-1, keepdim=True) - 2 * pieces @ codebooks.mT + codebooks.square().sum(-1)[:, None]
        )
        return (torch.softmax(-distances, -1) @ codebooks).transpose(0, 1).reshape(n, d)

    yield Case(
        f"soft_assign, forward and backward, {n:,} x {d}, {m} x {k} codewords",
        12 * n * k * d,
        with_gradients(lambda x, c: pvt.soft_assign(x, c, hard=False).quantized, (x, codebooks), grad),
        eager,
        (x, codebooks),
        grad=grad,
        unit="TFLOP/s",
        tolerance={"rtol": 1e-2, "atol": 1e-1},
    )


def logsumexp_case(n, m, d):
    """The normaliser of InfoNCE, and both gradients."""
    queries, items, grad = (torch.randn(s, device=DEVICE) for s in ((n, d), (m, d), (n,)))
    queries *= d**-0.5
    yield Case(
        f"torch.logsumexp, forward and backward, {n:,} x {m:,}, d = {d}",
        8 * n * m * d,
        with_gradients(pvt.logsumexp, (queries, items), grad),
        lambda queries, items: (queries @ items.T).logsumexp(1),
        (queries, items),
        grad=grad,
        unit="TFLOP/s",
        tolerance={"rtol": 1e-2, "atol": 1e-3},
    )


def packing_case(docs):
    """Documents of 180 tokens to int8."""
    padded = torch.randn(docs, 180, D, device=DEVICE)
    sets = pv.Ragged.from_padded(padded)

    def eager(padded):
        steps = 127 / padded.abs().amax(-1, keepdim=True)
        return ((padded * steps).round() + 128).to(torch.uint8).view(-1, D)

    yield Case(
        f"maxsim.pack, {docs:,} documents of 180, int8",
        padded.nbytes * 10 // 4,  # tokens and codes are read once more, for bounds
        lambda: pv.maxsim.pack(sets, "int8").state().tensors["values"],
        eager,
        (padded,),
        tolerance={"rtol": 0, "atol": 1},
        documents=docs,
    )


def sparse_case(items):
    """One query as the blocks of its encoding, among encodings in float32."""
    encoder = pv.fde.Encoder(D)
    tokens, rows = torch.randn(1, 32, D, device=DEVICE), torch.randn(items, encoder.output_dim, device=DEVICE)
    query = encoder.encode_queries(tokens, sparse=True)
    dense = query.to_dense()
    share = query.values.numel() / dense.numel()
    yield Case(
        f"scan.topk, 1 query with {share:.0%} of its blocks, {items:,} x {encoder.output_dim:,}, k = 10",
        rows.nbytes * share,
        lambda: pv.scan.topk(query, rows, 10)[0],
        lambda dense, rows: (dense @ rows.T).topk(10).values,
        (dense, rows),
        compiled=False,
        tolerance={"rtol": 1e-3, "atol": 0.1},
    )


FLOPS = {"unit": "TFLOP/s", "compiled": False}


def batch_cases(items):
    """1,024 queries, where arithmetic is the limit."""
    queries = torch.randn(1024, 768, device=DEVICE).bfloat16()
    rows = torch.randn(items, 768, device=DEVICE, dtype=torch.bfloat16)
    same = queries.float()
    for k in (10, 100, 4096):
        yield Case(
            f"scan.topk, 1,024 queries, {items:,} x 768 bfloat16, k = {k:,}",
            2 * rows.numel() * len(queries),
            lambda k=k: pv.scan.topk(same, rows, k)[0],
            lambda queries, rows, k=k: (queries @ rows.T).topk(k).values.float(),
            (queries, rows),
            tolerance={"rtol": 1e-2, "atol": 0.1},
            **FLOPS,
        )


def one_query_cases(items):
    """One query, where memory is the limit: whole numbers to 127 are exact in any dtype."""
    rows = torch.randn(items, 768, device=DEVICE)
    query = torch.randint(-127, 128, (1, 768), device=DEVICE).float()
    query[0, 0] = 127
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        stored = (rows * 30).clamp(-127, 127).to(dtype) if dtype == torch.int8 else rows.to(dtype)
        narrow = query.to(dtype if dtype.is_floating_point else torch.float32)  # torch has no int8 product
        yield Case(
            f"scan.topk, 1 query, {items:,} x 768 {str(dtype).removeprefix('torch.')}, k = 10",
            stored.nbytes,
            lambda stored=stored: pv.scan.topk(query, stored, 10)[0],
            lambda narrow, stored: (narrow @ stored.to(narrow.dtype).T).float().topk(10).values,
            (narrow, stored),
            compiled=False,
            tolerance={"rtol": 1e-2, "atol": 1},
        )


def float_cases(items):
    """1,024 queries among float32 items, and the nearest of many codes."""
    queries, rows = torch.randn(1024, D, device=DEVICE) / 4, torch.randn(items, D, device=DEVICE)
    targets = torch.randint(items, (1024,), device=DEVICE)
    for name, ours, rival in (
        ("rank", lambda: pv.scan.rank(queries, rows, targets, ties="optimistic"), eager_rank),
        ("logsumexp", lambda: pv.scan.logsumexp(queries, rows), lambda scores, _: scores.logsumexp(1)),
        ("hinge", lambda: pv.scan.hinge(queries, rows, targets), eager_hinge),
    ):
        yield Case(
            f"scan.{name}, 1,024 queries, {items:,} x {D} float32",
            2 * rows.numel() * len(queries),
            ours,
            lambda queries, rows, rival=rival: rival(queries @ rows.T, targets),
            (queries, rows),
            tolerance={"rtol": 1e-4, "atol": 4 if name == "rank" else 1e-3},
            **FLOPS,
        )
    codes = torch.randn(65536, D, device=DEVICE)
    yield Case(
        f"scan.nearest, {items:,} x {D} float32 to 65,536",
        2 * rows.numel() * len(codes),
        lambda: pv.scan.nearest(rows, codes)[1],
        lambda rows, codes: torch.cat([eager_distances(some, codes) for some in rows.split(16384)]),
        (rows, codes),
        **FLOPS,
    )


def eager_rank(scores, targets):
    limits = scores.gather(1, targets[:, None])
    return 1 + (scores > limits).sum(1).double()


def eager_hinge(scores, targets):
    margins = 1 - scores.gather(1, targets[:, None])
    return (scores + margins).clamp_(min=0).sum(1) - 1


def eager_distances(x, codes):
    return torch.addmm((codes * codes).sum(1), x, codes.T, alpha=-2).amin(1) + (x * x).sum(1)


def eager_normalize(x):
    return torch.nn.functional.normalize(x, dim=-2)


def call_overhead():
    """Microseconds from Python for one small call, the GPU being faster than that."""
    x = torch.randn(4, D, device=DEVICE)
    out = torch.empty_like(x)
    pv.hypercomplex.product(x, x, out=out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        pv.hypercomplex.product(x, x, out=out)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def row(case, ceilings):
    """Check a case, time it and its rivals, and return its line of the table."""
    rivals = [case.rival, torch.compile(case.rival)] if case.compiled else [case.rival]
    calls = [
        (lambda f=f: f(*case.tensors)) if case.grad is None else with_gradients(f, case.tensors, case.grad)
        for f in rivals
    ]
    torch.testing.assert_close(case.ours(), calls[0](), **case.tolerance)
    time_of_ours, *times = (milliseconds(call) for call in (case.ours, *calls))
    rate = case.work / time_of_ours / (1e6 if case.unit == "GB/s" else 1e9)
    ratios = " | ".join([f"{t / time_of_ours:.2f}" for t in times] + [""] * (2 - len(times)))
    share = f"{rate:.0f} {case.unit} ({rate / ceilings[case.unit]:.0%})"
    name = case.name
    if case.documents:
        name += f": {case.documents / time_of_ours / 1e3:.2f} million a second"
    return f"| {name} | {time_of_ours:.3f} | {share} | {ratios} |"


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/results"), help="default: %(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch sees none")
    gpu, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    n = min(1 << 20, free // (40 * 4 * D * 4))  # rivals hold some thirty arrays of a component each
    copy, product = measured_ceilings()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = [
        f"# {gpu}",
        "",
        f"polyvec {pv.__version__} at {commit.stdout.strip() or 'an unknown commit'}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}; medians by events, random data; quaternions are float32, rows of 4 x {D}.",
        "",
        f"- copy bandwidth: {copy:.0f} GB/s",
        f"- bf16 product, 8192 cubed: {product:.0f} TFLOP/s",
        f"- one small call from Python: {call_overhead():.1f} us",
        "",
        f"| case, n = {n:,} | ms | rate (of copy or product) | torch eager / ours | torch.compile / ours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ceilings = {"GB/s": copy, "TFLOP/s": product}
    items = 1 << 20
    for some in (
        cases(n),
        search_cases(items, 10_000),
        batch_cases(items),
        one_query_cases(items),
        float_cases(items),
        fde_cases(20_000),
        sparse_case(min(200_000, free // 4 // (4 * 10_240))),
        packing_case(100_000),
        maxsim_cases(min(1_000_000, free // 2 // (180 * D * 2))),
        residual_case(1_000_000),
        centroid_case(1_000_000),
        certified_case(20_000),
        soft_assign_case(4096),
        logsumexp_case(8192, 50_000, 256),
    ):
        lines += [row(case, ceilings) for case in some]
    path = arguments.out / f"{gpu.replace(' ', '-')}.md"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"), f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
