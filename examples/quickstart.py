"""polyvec's main job on real data: find documents by sets of vectors, and predict missing entities of a graph.

    python examples/quickstart.py

Multi-vector retrieval: two sets of token embeddings with relevance judgements. LIMIT-small was made so that single
vectors fail; SciFact (a part) asks for the abstract behind a scientific claim. Link prediction: quaternion embeddings
of the UMLS semantic network. `examples/data/README.md` says where the data comes from.
"""

import time

import numpy as np

import polyvec as pv
from _data import load_graph_embeddings, load_knowledge_graph, load_retrieval_set

K = 10


def ndcg(ids, relevance, k=K):
    """Mean nDCG@k of ranked document numbers (n, k); `relevance` has {document: grade} a query."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    scores = []
    for ranked, grades in zip(ids, relevance, strict=True):
        gains = [grades.get(int(i), 0) for i in ranked]
        ideal = sorted(grades.values(), reverse=True)[:k]
        scores.append(np.dot(gains, discounts) / np.dot(ideal, discounts[: len(ideal)]))
    return np.mean(scores)


def mean_pooled(sets):
    """One vector a set: the mean of its tokens."""
    return np.stack([tokens.mean(0) for tokens in sets])


def timed(search, n):
    """Run `search` and return (ids, queries per second)."""
    start = time.perf_counter()
    ids = search()[1]
    return ids, n / (time.perf_counter() - start)


def retrieve(name, candidates):
    """Search one sample three ways and print how good and how fast each is."""
    sample = load_retrieval_set(name)
    docs = pv.Ragged(sample.doc_tokens, sample.doc_offsets)
    queries = pv.Ragged(sample.query_tokens, sample.query_offsets)
    print(f"\n{name}: {len(docs)} documents of {docs.lengths.mean():.0f} token vectors, {len(queries)} queries")

    index = pv.retrieve.MultiVectorIndex(docs.dim)
    index.add(docs, progress=True)
    packed = pv.maxsim.pack(docs)
    pooled_docs, pooled_queries = mean_pooled(docs), mean_pooled(queries)
    results = {
        "exact MaxSim": timed(lambda: pv.maxsim.topk(queries, packed, K), len(queries)),
        f"index ({candidates} candidates)": timed(
            lambda: index.search(queries, K, candidates=candidates), len(queries)
        ),
        "mean-pooled vectors": timed(
            lambda: pv.scan.topk(pooled_queries, pooled_docs, K, metric="cosine"), len(queries)
        ),
    }
    exact = results["exact MaxSim"][0]
    print(f"  {'':24}  nDCG@{K}  recall of exact  queries/s")
    for label, (ids, rate) in results.items():
        recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(ids, exact, strict=True)])
        print(f"  {label:24}  {ndcg(ids, sample.relevance):7.4f}  {recall:15.3f}  {rate:9,.0f}")

    best = index.search(queries[0][None], 3, candidates=candidates)
    print(f"  e.g. {sample.query_texts[0]}")
    for score, i in zip(best[0][0], best[1][0], strict=True):
        mark = "*" if int(i) in sample.relevance[0] else " "
        print(f"    {mark} {score:6.2f}  {sample.doc_titles[i][:90]}")


def mrr_by_definition(embeddings, triples, known):
    """Filtered MRR straight from the formula, in float64 numpy: what LinkPredictor must agree with."""
    entities = embeddings.entities.astype(np.float64)
    rotors = embeddings.relations.astype(np.float64)
    rotors /= np.linalg.norm(rotors, axis=1, keepdims=True)
    reciprocal = len(rotors) // 2
    asked = [(h, r, t) for h, r, t in triples] + [(t, r + reciprocal, h) for h, r, t in triples]
    answers = {}
    for h, r, t in known:
        answers.setdefault((h, r), set()).add(t)
        answers.setdefault((t, r + reciprocal), set()).add(h)
    reciprocal_ranks = []
    for head, relation, tail in asked:
        (s, x, y, z), (s2, x2, y2, z2) = entities[head], rotors[relation]
        query = np.stack(
            [
                s * s2 - x * x2 - y * y2 - z * z2,
                s * x2 + x * s2 + y * z2 - z * y2,
                s * y2 + y * s2 - x * z2 + z * x2,
                s * z2 + z * s2 + x * y2 - y * x2,
            ]
        )
        scores = np.einsum("cd,ncd->n", query, entities)
        target = scores[tail]
        scores[list(answers[head, relation])] = -np.inf
        reciprocal_ranks.append(1 / (1 + np.sum(scores > target) + np.sum(scores == target) / 2))
    return np.mean(reciprocal_ranks)


def predict_links():
    """Evaluate trained embeddings, and complete one triple."""
    graph, embeddings = load_knowledge_graph(), load_graph_embeddings()
    known = np.concatenate([graph.train, graph.valid, graph.test])
    predictor = pv.retrieve.LinkPredictor(
        embeddings.entities, embeddings.relations, algebra=embeddings.algebra, reciprocal=True
    )
    print(f"\numls: {len(graph.entities)} entities, {len(graph.relations)} relations, {len(graph.test)} test triples")
    start = time.perf_counter()
    figures = predictor.evaluate(graph.test, known=known)
    seconds = time.perf_counter() - start
    definition = mrr_by_definition(embeddings, graph.test.tolist(), known.tolist())
    print("  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()) + f"  ({seconds * 1e3:.1f} ms)")
    print(f"  MRR from its definition in numpy: {definition:.4f}")

    head, relation, tail = graph.test[0]
    _, tails = predictor.predict_tails([head], [relation], 3, known=np.concatenate([graph.train, graph.valid]))
    names = ", ".join(graph.entities[i] for i in tails[0])
    print(f"  e.g. {graph.entities[head]} {graph.relations[relation]} -> {names} (held out: {graph.entities[tail]})")


def main():
    """Run everything."""
    info = pv.runtime_info()
    print(f"polyvec {info['version']}, {info['isa']}, {info['num_threads']} threads")
    retrieve("limit-small", candidates=20)
    retrieve("scifact-small", candidates=50)
    predict_links()


if __name__ == "__main__":
    main()
