"""The definition of MaxSim in float64, document by document; token sets are lists of (n_i, d) arrays."""

import numpy as np


def similarities(query, doc):
    """All inner products of two token sets, (tq, td)."""
    return np.asarray(query, np.float64) @ np.asarray(doc, np.float64).T


def score(queries, docs, *, zeros=None, empty=-np.inf):
    """(nq, nd): per query token the best document token, summed; an empty sum is 0.

    `zeros[d]` zero vectors join document d; a document that has no tokens then scores `empty`.
    """
    out = np.empty((len(queries), len(docs)))
    for d, doc in enumerate(docs):
        padded = doc if zeros is None else np.concatenate([doc, np.zeros((zeros[d], doc.shape[1]))])
        for q, query in enumerate(queries):
            if len(padded):
                out[q, d] = similarities(query, padded).max(1).sum()
            else:
                out[q, d] = empty if len(query) else 0
    return out


def scale(queries, docs):
    """(nq, nd): the largest sum of absolute products behind each similarity, summed over the query's tokens."""
    return score([np.abs(q) for q in queries], [np.abs(d) for d in docs])


def topk(scores, k, candidates=None):
    """Ids of the k best of each row of `scores`, equal scores by the smaller id, padded with -1."""
    ids = np.full((len(scores), k), -1)
    for q, row in enumerate(scores):
        allowed = np.arange(len(row)) if candidates is None else np.sort(candidates[q])
        order = allowed[np.argsort(-row[allowed], kind="stable")][:k]
        ids[q, : len(order)] = order
    return ids
