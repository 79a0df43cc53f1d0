"""Make the retrieval sets and the graph files of ``examples/data`` from the full sets.

    python scripts/make_example_data.py SOURCE_DIR

SOURCE_DIR holds ``limit-small``, ``scifact`` and ``umls``; examples/data/README.md says where each comes from and how
its token embeddings were made. The output depends on the source alone: running the script again writes the same bytes.
``train_kge.py`` makes the trained embeddings, the one file that this script does not write.
"""

import argparse
import csv
import json
import lzma
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

DATA_DIR = Path(__file__).resolve().parents[1] / "examples" / "data"
SCIFACT_DOCS = 750  # with all test queries, 5 MB of tokens
SEED = 0

Row = dict[str, str]
Judgement = tuple[str, str, int]  # query id, document id, grade


def make_limit_small(source: Path, target: Path) -> None:
    """Write the whole of LIMIT-small; a document's id is the name of the person it is about, hence its title."""
    docs = [
        {"_id": doc["_id"], "title": doc["_id"], "text": doc["text"]} for doc in read_jsonl(source / "corpus.jsonl.xz")
    ]
    queries = list(read_jsonl(source / "queries.jsonl.xz"))
    qrels = [(row["query-id"], row["corpus-id"], int(row["score"])) for row in read_jsonl(source / "qrels.jsonl.xz")]
    write_retrieval_set(source, target, docs, queries, qrels)


def make_scifact_small(source: Path, target: Path) -> None:
    """Write all test queries, every document judged relevant to one of them, and random other documents."""
    with lzma.open(source / "qrels" / "test.tsv.xz", "rt", encoding="utf-8") as lines:
        qrels = [
            (row["query-id"], row["corpus-id"], int(row["score"])) for row in csv.DictReader(lines, delimiter="\t")
        ]
    judged_queries = {query for query, _, _ in qrels}
    judged_docs = {doc for _, doc, _ in qrels}

    corpus = list(read_jsonl(source / "corpus.jsonl.xz"))
    others = [doc["_id"] for doc in corpus if doc["_id"] not in judged_docs]
    distractors = np.random.default_rng(SEED).choice(others, SCIFACT_DOCS - len(judged_docs), replace=False)
    kept = judged_docs | set(distractors.tolist())

    # Titles only: the licence of the abstracts covers their collection, and the examples print no more than a title.
    docs = [{"_id": doc["_id"], "title": doc["title"]} for doc in corpus if doc["_id"] in kept]
    queries = [query for query in read_jsonl(source / "queries.jsonl.xz") if query["_id"] in judged_queries]
    write_retrieval_set(source, target, docs, queries, qrels)


def make_umls(source: Path, target: Path) -> None:
    """Write the three splits as plain text; the entities' and relations' names in them are readable as they are."""
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        with lzma.open(source / f"{split}.txt.xz") as packed, (target / f"{split}.txt").open("wb") as plain:
            shutil.copyfileobj(packed, plain)


def write_retrieval_set(
    source: Path, target: Path, docs: list[Row], queries: list[Row], qrels: list[Judgement]
) -> None:
    """Write the tokens, texts and judgements of these documents and queries; row i of a text file is token set i."""
    with np.load(source / "tokens.npz") as tokens:
        doc_tokens, doc_offsets = select_sets(tokens, "doc", [doc["_id"] for doc in docs])
        query_tokens, query_offsets = select_sets(tokens, "query", [query["_id"] for query in queries])
        scale = tokens["scale"]
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        "doc_tokens": doc_tokens,
        "doc_offsets": doc_offsets,
        "query_tokens": query_tokens,
        "query_offsets": query_offsets,
        "scale": scale,
    }
    save_file(tensors, target / "tokens.safetensors")
    write_jsonl(target / "docs.jsonl", docs)
    write_jsonl(target / "queries.jsonl", queries)
    with (target / "qrels.tsv").open("w", encoding="utf-8", newline="\n") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{query}\t{doc}\t{grade}\n" for query, doc, grade in qrels)


def select_sets(tokens: np.lib.npyio.NpzFile, kind: str, ids: list[str]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return the rows of the token sets with these ids, in this order, and their offsets."""
    values, offsets = tokens[f"{kind}_tokens"], tokens[f"{kind}_offsets"]
    position = {name: i for i, name in enumerate(tokens[f"{kind}_ids"].tolist())}
    sets = [values[offsets[i] : offsets[i + 1]] for i in map(position.__getitem__, ids)]
    return np.concatenate(sets), np.cumsum([0, *map(len, sets)], dtype=np.int64)


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the objects of an xz-packed file with one JSON object a line."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Make every set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_DIR", help="folder with limit-small, scifact and umls")
    source = parser.parse_args().source
    make_limit_small(source / "limit-small", DATA_DIR / "limit-small")
    make_scifact_small(source / "scifact", DATA_DIR / "scifact-small")
    make_umls(source / "umls", DATA_DIR / "umls")


if __name__ == "__main__":
    main()
