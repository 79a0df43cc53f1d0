"""Definitions in float64 of link prediction, and the reader of its data."""

import lzma
import pathlib

import numpy as np

from reference import hypercomplex as hc


def link_scores(
    entities,
    relations,
    *,
    algebra,
    metric="ip",
    rotate_by="relation",
    translations=None,
    head_translations=None,
    bias=None,
    normalize=True,
    reciprocal=False,
):
    """All scores: ["tail"][h, r, t] and ["head"][t, r, h]."""
    n, rows = len(entities), len(relations if rotate_by == "relation" else translations)
    flat = entities.astype(np.float64).reshape(n, -1)
    heads, rotors = np.divmod(np.arange(n * rows), rows)
    queries = hc.relation_query(
        entities, relations, heads, rotors, algebra, translations, normalize, rotate_by, head_translations
    )
    scores = queries @ flat.T if metric == "ip" else -((queries[:, None, :] - flat[None]) ** 2).sum(-1)
    scores = scores.reshape(n, rows, n)
    extra = np.zeros(n) if bias is None else bias.astype(np.float64)
    if reciprocal:
        return {"tail": scores[:, : rows // 2] + extra, "head": scores[:, rows // 2 :] + extra}
    return {"tail": scores + extra, "head": scores.transpose(2, 1, 0) + extra}


def filtered(scores, side, anchors, relations, known, targets=None):
    """Scores of every entity for each query, known answers (but for the target) at -inf."""
    out = scores[side][anchors, relations].copy()
    if known is None:
        return out
    for row, (anchor, relation) in enumerate(zip(anchors, relations, strict=True)):
        for h, r, t in known:
            given, answer = (h, t) if side == "tail" else (t, h)
            if given == anchor and r == relation and (targets is None or answer != targets[row]):
                out[row, answer] = -np.inf
    return out


def link_ranks(scores, triples, known):
    """Filtered ranks of heads and of tails, ties at their mean rank."""
    ranks = []
    for side, anchor, target in (("head", 2, 0), ("tail", 0, 2)):
        rows = filtered(scores, side, triples[:, anchor], triples[:, 1], known, triples[:, target])
        own = rows[np.arange(len(rows)), triples[:, target]][:, None]
        ranks.append(1 + (rows > own).sum(1) + ((rows == own).sum(1) - 1) / 2)
    return ranks


def link_figures(ranks):
    """Means over the ranks of heads and tails."""
    ranks = np.concatenate(ranks)
    hits = {f"hits@{k}": np.mean(ranks <= k) for k in (1, 3, 10)}
    return {"mrr": np.mean(1 / ranks), **hits, "mean_rank": np.mean(ranks)}


def streamed_mrr(entities, relations, triples, known):
    """Filtered MRR of quaternion embeddings, one query at a time: for graphs whose scores do not fit in memory."""
    flat = entities.astype(np.float64).reshape(len(entities), -1)
    rotors = hc.normalize(relations)
    answers = {}
    for h, r, t in known.tolist():
        answers.setdefault(("tail", h, r), set()).add(t)
        answers.setdefault(("head", t, r), set()).add(h)
    reciprocal_ranks = []
    for h, r, t in triples.tolist():
        rotated = hc.product(entities[h], rotors[r]).reshape(-1)
        back = hc.product(entities[t], hc.conjugate(rotors[r])).reshape(-1)  # unit rotors: the transpose is the inverse
        for side, query, anchor, target in (("tail", rotated, h, t), ("head", back, t, h)):
            scores = flat @ query
            own = scores[target]
            scores[list(answers[side, anchor, r] | {target})] = -np.inf
            reciprocal_ranks.append(1 / (1 + (scores > own).sum() + (scores == own).sum() / 2))
    return np.mean(reciprocal_ranks)


def load_triples(folder):
    """Read train, valid and test of a folder: entity names, relation names, {split: (n, 3) ids}."""
    rows = {}
    for split in ("train", "valid", "test"):
        path = pathlib.Path(folder) / f"{split}.txt.xz"
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            rows[split] = [tuple(line.rstrip("\n").split("\t")) for line in lines]
    everything = [row for split in rows.values() for row in split]
    entities = sorted({name for h, _, t in everything for name in (h, t)})
    relations = sorted({r for _, r, _ in everything})
    entity, relation = ({name: i for i, name in enumerate(names)} for names in (entities, relations))
    ids = {split: np.array([(entity[h], relation[r], entity[t]) for h, r, t in part]) for split, part in rows.items()}
    return entities, relations, ids
