"""Train quaternion or dihedron embeddings of a small knowledge graph and save them as one safetensors file.

    python examples/train_kge.py                                        # UMLS, quaternion
    python examples/train_kge.py DATA_DIR --algebra dihedron --out dihedron.safetensors

The score of a triple is ``<h r/|r|, t>``: the relation, of Euclidean norm 1 in each 4-tuple, multiplies the head in
the algebra, and the result is compared with the tail by inner product. Training follows Lacroix et al., "Canonical
Tensor Decomposition for Knowledge Base Completion" (2018): each relation has a reciprocal, so that every query asks for
a tail; the loss is the softmax over all entities; Adagrad minimises it. Ctrl-C leaves no file behind.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm import trange

from _data import DATA_DIR, KnowledgeGraph, load_knowledge_graph
from polyvec.torch import relation_query

ALGEBRAS = ("quaternion", "dihedron")


def score_all_tails(queries: Tensor, entities: Tensor) -> Tensor:
    """Return the inner product of every query (B, 4 d) with every entity (N, 4, d)."""
    return queries @ entities.flatten(1).T


def with_reciprocals(triples: NDArray[np.int64], num_relations: int) -> NDArray[np.int64]:
    """Append (t, r + R, h) for each (h, r, t): asking for the tail of r + R is asking for the head of r."""
    head, relation, tail = triples.T
    return np.concatenate([triples, np.stack([tail, relation + num_relations, head], axis=1)])


def train(
    graph: KnowledgeGraph,
    *,
    algebra: str,
    dim: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Return the trained entities (N, 4, dim) and relations (2 R, 4, dim), reciprocals in the second half."""
    entities = (0.1 * torch.randn(len(graph.entities), 4, dim)).requires_grad_()
    relations = torch.randn(2 * len(graph.relations), 4, dim, requires_grad=True)
    optimizer = torch.optim.Adagrad([entities, relations], learning_rate)
    triples = torch.from_numpy(with_reciprocals(graph.train, len(graph.relations)))
    progress = trange(epochs, unit="epoch")
    for _ in progress:
        for batch in triples[torch.randperm(len(triples))].split(batch_size):
            head, relation, tail = batch.T
            queries = relation_query(entities, relations, head, relation, algebra=algebra)
            queries = functional.dropout(queries, dropout)  # else small graphs are overfitted after some 20 epochs
            loss = functional.cross_entropy(score_all_tails(queries, entities), tail)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    if not loss.isfinite():  # comparisons with NaN are false, which would give every target rank 1
        raise ValueError(f"training diverged: loss {loss.item()}; a smaller learning rate may help")
    return entities.detach(), relations.detach()


def evaluate(
    entities: Tensor, relations: Tensor, triples: NDArray[np.int64], *, algebra: str, known: NDArray[np.int64]
) -> dict[str, float]:
    """Return filtered MRR and hits@k over the head and the tail queries of ``triples``.

    Filtered: the other right answers do not compete; ``known`` lists all right triples, ``triples`` among them. Ties
    are realistic: the target gets the mean of the ranks it shares. All scores, 2 n x N, are held at once.
    """
    num_relations = len(relations) // 2
    right_tails = defaultdict(list)
    for head, relation, tail in with_reciprocals(known, num_relations).tolist():
        right_tails[head, relation].append(tail)

    head, relation, target = torch.from_numpy(with_reciprocals(triples, num_relations)).T
    scores = score_all_tails(relation_query(entities, relations, head, relation, algebra=algebra), entities)
    target_scores = scores.gather(1, target[:, None])
    for row, query in enumerate(zip(head.tolist(), relation.tolist(), strict=True)):
        scores[row, right_tails[query]] = -torch.inf  # the target too: it must not compete with itself
    ranks = 1 + (scores > target_scores).sum(1) + (scores == target_scores).sum(1) / 2
    hits = {f"hits@{k}": (ranks <= k).double().mean().item() for k in (1, 3, 10)}
    return {"mrr": ranks.double().reciprocal().mean().item(), **hits}


def save_embeddings(
    path: Path, entities: Tensor, relations: Tensor, graph: KnowledgeGraph, metadata: dict[str, str]
) -> None:
    """Write one safetensors file, names in its metadata; ``path`` is replaced whole or not at all."""
    names = {"entity_names": json.dumps(graph.entities), "relation_names": json.dumps(graph.relations)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save({"entities": entities, "relations": relations}, metadata | names))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; a wrong one ends here, before any work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data",
        type=Path,
        nargs="?",
        default=DATA_DIR / "umls",
        metavar="DATA_DIR",
        help="folder with train, valid and test, each .txt or .txt.xz, head TAB relation TAB tail (default: UMLS)",
    )
    parser.add_argument("--algebra", choices=ALGEBRAS, default="quaternion", help="default: %(default)s")
    parser.add_argument("--dim", type=positive_int, default=32, help="4-tuples in an embedding (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=60, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of Adagrad (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.4, help="of the query vectors (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the embeddings to this safetensors file (default: do not)")
    arguments = parser.parse_args()
    if arguments.out and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        parser.error(f"--out: must be a file in an existing folder, got {arguments.out}")
    if not 0 <= arguments.dropout < 1:
        parser.error(f"--dropout: must be at least 0 and below 1, got {arguments.dropout}")
    return arguments


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    """Train, report, save."""
    arguments = parse_arguments()
    settings = {
        name: getattr(arguments, name)
        for name in ("algebra", "dim", "epochs", "batch_size", "learning_rate", "dropout")
    }
    graph = load_knowledge_graph(arguments.data)
    torch.manual_seed(arguments.seed)
    entities, relations = train(graph, **settings)

    known = np.concatenate([graph.train, graph.valid, graph.test])
    for split in ("valid", "test"):
        figures = evaluate(entities, relations, getattr(graph, split), algebra=arguments.algebra, known=known)
        print(split, *(f"{name} {value:.4f}" for name, value in figures.items()), sep="  ")
    if arguments.out:
        metadata = {name: str(value) for name, value in settings.items()} | {"seed": str(arguments.seed)}
        save_embeddings(arguments.out, entities, relations, graph, metadata)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing written")
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
