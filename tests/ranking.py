"""Retrieval sets with judgements, and how good a ranking is by them."""

from __future__ import annotations

import json
import lzma
from typing import NamedTuple

import numpy as np

import polyvec as pv


class Retrieval(NamedTuple):
    """Documents and queries as float32 token sets, and {document: grade} for each query."""

    docs: pv.Ragged
    queries: pv.Ragged
    relevance: list[dict[int, int]]


def read(folder):
    """One of the evaluation sets that hold `tokens.npz` (int8 tokens and a scale) and judgements."""
    arrays = np.load(folder / "tokens.npz")
    docs, queries = (
        pv.Ragged(arrays[f"{kind}_tokens"] * arrays["scale"], arrays[f"{kind}_offsets"]) for kind in ("doc", "query")
    )
    rows = {doc: row for row, doc in enumerate(arrays["doc_ids"].tolist())}
    grades: dict[str, dict[int, int]] = {}
    for query, doc, grade in _judgements(folder):
        grades.setdefault(query, {})[rows[doc]] = int(grade)
    return Retrieval(docs, queries, [grades.get(query, {}) for query in arrays["query_ids"].tolist()])


def _judgements(folder):
    if (folder / "qrels.jsonl.xz").exists():
        with lzma.open(folder / "qrels.jsonl.xz", "rt") as lines:
            return [tuple(json.loads(line).values()) for line in lines]
    with lzma.open(folder / "qrels" / "test.tsv.xz", "rt") as lines:
        next(lines)
        return [line.split() for line in lines]


def ndcg(ids, relevance, k=10):
    """Mean nDCG@k over the judged queries: sum of grade / log2(rank + 1), over that of the best order."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    values = []
    for row, grades in zip(np.asarray(ids), relevance, strict=True):
        if not grades:
            continue
        gain = [grades.get(doc, 0) for doc in row[:k].tolist()]
        best = sorted(grades.values(), reverse=True)[:k]
        values.append(np.dot(gain, discount[: len(gain)]) / np.dot(best, discount[: len(best)]))
    return float(np.mean(values))


def recall(ids, expected):
    """Mean share of each row of `expected` that the same row of `ids` holds."""
    return float(np.mean([np.isin(row, found).mean() for found, row in zip(ids, expected, strict=True)]))
