r"""Train quaternion or dihedron embeddings of a knowledge graph and save them as one safetensors file.

    python examples/train_kge.py                                        # UMLS, quaternion, half a minute
    python examples/train_kge.py DATA_DIR --algebra dihedron --out dihedron.safetensors
    python examples/train_kge.py WN18RR --dim 100 --negatives 4096 --n3 0.1 --dropout 0 --batch-size 500 \
        --epochs 60 --evaluate-every 3 --checkpoint wn18rr.pt           # on a CPU; the same line goes on from there
    python examples/train_kge.py WN18RR --dim 500 --n3 0.1 --dropout 0 --batch-size 500 --epochs 50    # on a GPU

The score of a triple is ``<h r/|r|, t>``: the relation, of Euclidean norm 1 in each 4-tuple, multiplies the head in the
algebra, and the result is compared with the tail by inner product. Training follows Lacroix et al., "Canonical Tensor
Decomposition for Knowledge Base Completion" (2018): each relation has a reciprocal, so that every query asks for a
tail; the loss is the softmax over all entities, or with ``--negatives`` over some drawn ones; Adagrad minimises it. An
epoch over all entities costs 24 dim N flops a query (on a CPU with dim up to 256 and many entities 32, for their scores
are computed twice instead of stored): on WN18RR with dim 500 9e13, a quarter of an hour at 100 GFLOP/s. Figures are
filtered, over heads and tails. Ctrl-C leaves the checkpoint of the last whole epoch behind, and no other file.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import polyvec as pv
from _data import DATA_DIR, KnowledgeGraph, load_knowledge_graph
from polyvec.torch import RelationScorer

ALGEBRAS = ("quaternion", "dihedron")


def with_reciprocals(triples: NDArray[np.int64], num_relations: int) -> NDArray[np.int64]:
    """Append (t, r + R, h) for each (h, r, t): asking for the tail of r + R is asking for the head of r."""
    head, relation, tail = triples.T
    return np.concatenate([triples, np.stack([tail, relation + num_relations, head], axis=1)])


def train(graph: KnowledgeGraph, settings: argparse.Namespace, known: NDArray[np.int64]) -> RelationScorer:
    """Return trained embeddings; reciprocals are the second half of the relations."""
    torch.manual_seed(settings.seed)
    scorer = RelationScorer(
        len(graph.entities),
        2 * len(graph.relations),
        settings.dim,
        algebra=settings.algebra,
        dropout=settings.dropout,  # else small graphs are overfitted after some 20 epochs
        sparse=settings.negatives > 0,
    ).to(settings.device)
    optimizer = torch.optim.Adagrad(scorer.parameters(), settings.learning_rate)
    first = resume(settings, scorer, optimizer) if settings.checkpoint else 0
    triples = torch.from_numpy(with_reciprocals(graph.train, len(graph.relations))).to(settings.device)
    figures: dict[str, str] = {}
    for epoch in range(first, settings.epochs):
        batches = triples[torch.randperm(len(triples))].split(settings.batch_size)
        with tqdm(batches, f"epoch {epoch + 1} of {settings.epochs}", unit="batch", leave=False) as progress:
            for batch in progress:
                head, relation, tail = batch.T
                loss = scorer.loss(head, relation, tail, negatives=settings.negatives or None)
                if settings.n3:
                    loss = loss + settings.n3 * nuclear_norm(scorer.embed(torch.stack([head, tail])))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", **figures, refresh=False)
        if not loss.isfinite():  # comparisons with NaN are false, which would give every target rank 1
            raise ValueError(f"training diverged: loss {loss.item()}; a smaller learning rate may help")
        if settings.evaluate_every and (epoch + 1) % settings.evaluate_every == 0:
            mrr = evaluate(scorer, graph.valid, known)["mrr"]
            figures = {"valid": f"{mrr:.4f}"}
            tqdm.write(f"epoch {epoch + 1}  loss {loss.item():.3f}  valid mrr {mrr:.4f}")
        if settings.checkpoint:
            save_checkpoint(settings, scorer, optimizer, epoch + 1)
    return scorer


def nuclear_norm(ends: Tensor) -> Tensor:
    """Return the mean over triples of sum |h|^3 + sum |t|^3, | | that of a 4-tuple (Lacroix et al. 2018, section 4).

    ``ends`` holds heads and tails, shape (2, n, 4, dim).
    """
    sizes = ends.square().sum(-2).add(1e-12).sqrt()
    return sizes.pow(3).sum() / ends.shape[1]


def evaluate(scorer: RelationScorer, triples: NDArray[np.int64], known: NDArray[np.int64]) -> dict[str, float]:
    """Return filtered MRR and hits@k over the head and the tail queries of ``triples``, ties at their mean rank."""
    entities, relations = (table.detach().cpu() for table in (scorer.entities, scorer.relations))
    predictor = pv.retrieve.LinkPredictor(entities, relations, algebra=scorer.algebra, reciprocal=True)
    return predictor.evaluate(triples, known=known)


TRAINING = ("algebra", "dim", "batch_size", "learning_rate", "dropout", "negatives", "n3", "seed")


def resume(settings: argparse.Namespace, scorer: RelationScorer, optimizer: torch.optim.Optimizer) -> int:
    """Go on where the checkpoint ends; returns how many epochs that were, 0 without one."""
    if not settings.checkpoint.exists():
        return 0
    state = torch.load(settings.checkpoint, map_location=settings.device, weights_only=True)
    for name in TRAINING:
        if state["settings"][name] != getattr(settings, name):
            raise ValueError(
                f"{settings.checkpoint} was made with {name} {state['settings'][name]}, not {getattr(settings, name)}"
            )
    scorer.load_state_dict(state["scorer"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"].cpu())
    return int(state["epochs"])


def save_checkpoint(
    settings: argparse.Namespace, scorer: RelationScorer, optimizer: torch.optim.Optimizer, epochs: int
) -> None:
    """Write all that the next epoch depends on."""
    state = {
        "settings": {name: getattr(settings, name) for name in TRAINING},
        "scorer": scorer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "epochs": epochs,
    }
    with replacing(settings.checkpoint) as partial:
        torch.save(state, partial)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; ``path`` is replaced by it whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_embeddings(
    path: Path, entities: Tensor, relations: Tensor, graph: KnowledgeGraph, metadata: dict[str, str]
) -> None:
    """Write one safetensors file, names in its metadata."""
    names = {"entity_names": json.dumps(graph.entities), "relation_names": json.dumps(graph.relations)}
    with replacing(path) as partial:
        partial.write_bytes(save({"entities": entities, "relations": relations}, metadata | names))


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
    parser.add_argument(
        "--negatives",
        type=int,
        default=0,
        help="wrong tails drawn for a batch; 0: all entities compete, 1-vs-all (default: %(default)s)",
    )
    parser.add_argument("--n3", type=float, default=0.0, help="weight of the nuclear 3-norm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)"
    )
    parser.add_argument("--evaluate-every", type=int, default=0, metavar="EPOCHS", help="valid MRR meanwhile")
    parser.add_argument("--checkpoint", type=Path, help="write this file after each epoch, and go on from it")
    parser.add_argument("--out", type=Path, help="write the embeddings to this safetensors file (default: do not)")
    arguments = parser.parse_args()
    for name in ("out", "checkpoint"):
        path = getattr(arguments, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name}: must be a file in an existing folder, got {path}")
    if arguments.negatives < 0:
        parser.error(f"--negatives: must be at least 0, got {arguments.negatives}")
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
    settings = parse_arguments()
    graph = load_knowledge_graph(settings.data)
    known = np.concatenate([graph.train, graph.valid, graph.test])
    scorer = train(graph, settings, known)
    for split in ("valid", "test"):
        figures = evaluate(scorer, getattr(graph, split), known)
        print(split, *(f"{name} {value:.4f}" for name, value in figures.items()), sep="  ")
    if settings.out:
        metadata = {name: str(getattr(settings, name)) for name in ("epochs", *TRAINING)}
        save_embeddings(settings.out, scorer.entities.detach().cpu(), scorer.relations.detach().cpu(), graph, metadata)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: no embeddings written")
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
