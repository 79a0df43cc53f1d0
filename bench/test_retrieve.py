"""Multi-vector retrieval from end to end: the best ten of the 5,183 documents of SciFact, 218,965 tokens 128 wide."""

import numpy as np
import pytest

import polyvec as pv


@pytest.mark.parametrize(
    ("first_stage", "storage"),
    [
        *((stage, "float32") for stage in ("centroids", "hnsw", "pq", "flat")),
        *(("centroids", storage) for storage in ("bfloat16", "int8", "residual4", "residual2")),
    ],
)
def test_search(curve, benchmark, data, threads, first_stage, storage):
    """By number of candidates, beside exact MaxSim of all documents; recall is of the float32 tokens' best."""
    tokens = np.load(data / "scifact" / "tokens.npz")
    queries, docs = (
        pv.Ragged(tokens[f"{side}_tokens"].astype(np.float32), tokens[f"{side}_offsets"].astype(np.int64))
        for side in ("query", "doc")
    )
    queries = queries[:50]
    index = pv.retrieve.MultiVectorIndex(docs.dim, first_stage=first_stage, storage=storage)
    index.add(docs, num_threads=threads)
    benchmark.extra_info["megabytes"] = index.nbytes / 1e6
    packed = pv.maxsim.pack(docs)
    truth = pv.maxsim.topk(queries, packed, 10, num_threads=threads)[1]

    points = curve(
        lambda candidates: index.search(queries, 10, candidates=candidates, num_threads=threads)[1],
        {"exact MaxSim": lambda _: pv.maxsim.topk(queries, packed, 10, num_threads=threads)[1]},
        settings=[25, 50, 80, 100, 200],
        recall=lambda ids: np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, truth, strict=True)]) / 10,
        queries=len(queries),
    )
    assert points["polyvec"][-1]["recall"] > (0.8 if storage == "residual2" else 0.9)
