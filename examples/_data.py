"""Loaders for the sample data in ``examples/data``; its README.md gives origin and licence of each set."""

import json
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

DATA_DIR = Path(__file__).parent / "data"


class RetrievalSet(NamedTuple):
    """Documents and queries as token sets, with the judgements between them.

    Document ``i`` is the rows ``doc_offsets[i]:doc_offsets[i + 1]`` of ``doc_tokens``; queries likewise.
    """

    doc_tokens: NDArray[np.float32]  # (total doc tokens, 128)
    doc_offsets: NDArray[np.int64]  # (docs + 1,)
    doc_titles: list[str]
    query_tokens: NDArray[np.float32]  # (total query tokens, 128)
    query_offsets: NDArray[np.int64]  # (queries + 1,)
    query_texts: list[str]
    relevance: list[dict[int, int]]  # for each query: document number -> grade, judged documents only


class KnowledgeGraph(NamedTuple):
    """Triples of ids, each split (n, 3) int64 with columns head, relation, tail; ids index the sorted names."""

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    entities: list[str]
    relations: list[str]


class GraphEmbeddings(NamedTuple):
    """Hypercomplex embeddings of a knowledge graph, as written by ``train_kge.py``.

    ``relations`` holds the R relations, then their R reciprocals: relation ``r + R`` turns a tail of ``r`` to its head.
    """

    entities: NDArray[np.float32]  # (N, 4, d)
    relations: NDArray[np.float32]  # (2 R, 4, d)
    algebra: str
    entity_names: list[str]
    relation_names: list[str]  # R names: reciprocals have none of their own


def load_retrieval_set(name: str) -> RetrievalSet:
    """Load ``"limit-small"`` or ``"scifact-small"``; int8 tokens come back as float32 of norm 1 (but for rounding)."""
    folder = DATA_DIR / name
    tensors = load_file(folder / "tokens.safetensors")
    docs = _read_jsonl(folder / "docs.jsonl")
    queries = _read_jsonl(folder / "queries.jsonl")
    return RetrievalSet(
        doc_tokens=tensors["doc_tokens"] * tensors["scale"],
        doc_offsets=tensors["doc_offsets"],
        doc_titles=[doc["title"] for doc in docs],
        query_tokens=tensors["query_tokens"] * tensors["scale"],
        query_offsets=tensors["query_offsets"],
        query_texts=[query["text"] for query in queries],
        relevance=_read_qrels(folder / "qrels.tsv", queries, docs),
    )


def load_knowledge_graph(folder: str | Path = DATA_DIR / "umls") -> KnowledgeGraph:
    """Load ``train``, ``valid`` and ``test`` (``.txt`` or ``.txt.xz``; one ``head TAB relation TAB tail`` a line)."""
    splits = [_read_triples(Path(folder), split) for split in ("train", "valid", "test")]
    triples = [triple for split in splits for triple in split]
    entities = sorted({name for head, _, tail in triples for name in (head, tail)})
    relations = sorted({relation for _, relation, _ in triples})
    entity_ids = {name: i for i, name in enumerate(entities)}
    relation_ids = {name: i for i, name in enumerate(relations)}

    def as_ids(split: list[list[str]]) -> NDArray[np.int64]:
        rows = [(entity_ids[head], relation_ids[relation], entity_ids[tail]) for head, relation, tail in split]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    train, valid, test = map(as_ids, splits)
    return KnowledgeGraph(train, valid, test, entities, relations)


def load_graph_embeddings(path: str | Path = DATA_DIR / "umls" / "quaternion.safetensors") -> GraphEmbeddings:
    """Load embeddings that ``train_kge.py`` wrote; ids are those of ``load_knowledge_graph`` on the same graph."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        return GraphEmbeddings(
            entities=file.get_tensor("entities"),
            relations=file.get_tensor("relations"),
            algebra=metadata["algebra"],
            entity_names=json.loads(metadata["entity_names"]),
            relation_names=json.loads(metadata["relation_names"]),
        )


def _read_jsonl(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _read_qrels(path: Path, queries: list[dict[str, str]], docs: list[dict[str, str]]) -> list[dict[int, int]]:
    query_rows = {query["_id"]: row for row, query in enumerate(queries)}
    doc_rows = {doc["_id"]: row for row, doc in enumerate(docs)}
    relevance: list[dict[int, int]] = [{} for _ in queries]
    with path.open(encoding="utf-8") as lines:
        next(lines)  # header
        for line in lines:
            query, doc, grade = line.rstrip("\n").split("\t")
            relevance[query_rows[query]][doc_rows[doc]] = int(grade)
    return relevance


def _read_triples(folder: Path, split: str) -> list[list[str]]:
    plain, packed = folder / f"{split}.txt", folder / f"{split}.txt.xz"
    if not plain.exists() and not packed.exists():
        raise FileNotFoundError(f"{folder} has neither {plain.name} nor {packed.name}")
    path, open_text = (plain, open) if plain.exists() else (packed, lzma.open)
    with open_text(path, "rt", encoding="utf-8") as lines:
        triples = [line.rstrip("\n").split("\t") for line in lines if line.strip()]
    if not triples:
        raise ValueError(f"{path} holds no triples")
    for number, triple in enumerate(triples, start=1):
        if len(triple) != 3:
            raise ValueError(f"{path}: triple {number} must be head TAB relation TAB tail, got {triple}")
    return triples
