"""Join text vectors with a knowledge graph in hypercomplex space: the models Robin, Lion and Tetra.

    python examples/text_and_knowledge_graphs.py                      # UMLS, dihedrons
    python examples/text_and_knowledge_graphs.py --algebra quaternion --epochs 60

The models are those of Nayyeri et al., "Integrating Knowledge Graph Embedding and Pretrained Language Models in
Hypercomplex Spaces" (2022). Each scores a triple by ``-|q - t|^2 + bias``; they differ in what a relation query turns
and adds:

- Tetra: an entity is its own vector and three texts, one a component; the relation turns it.
- Robin and Lion: two texts of the head turn it; they and the relation are added. Robin takes one text from the entity's
  name, Lion takes two language models of one text.

For a real graph give it vectors of sentence encoders; here hashed words and letters of the entities' names stand in for
them, so that nothing is downloaded. Training is that of ``train_kge.py``: reciprocals, softmax over all tails, Adagrad.
"""

import argparse
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

import polyvec as pv
from _data import load_knowledge_graph
from polyvec.torch import relation_query
from train_kge import with_reciprocals

DIM = 32  # 4-tuples in an embedding


def hashed(names: list[str], pieces_of: Callable[[str], list[str]]) -> Tensor:
    """Return a unit vector a name: how often each of its pieces occurs, hashed to 256 numbers."""
    vectors = np.zeros((len(names), 256), np.float32)
    for vector, name in zip(vectors, names, strict=True):
        for piece in pieces_of(name.replace("_", " ")):
            vector[zlib.crc32(piece.encode()) % 256] += 1
    return functional.normalize(torch.from_numpy(vectors))


def words(name: str) -> list[str]:
    """Split a name into words."""
    return name.split()


def trigrams(name: str) -> list[str]:
    """Split a name into overlapping triples of letters."""
    return [f" {name} "[i : i + 3] for i in range(len(name))]


def word_pairs(name: str) -> list[str]:
    """Split a name into pairs of neighbouring words."""
    return [" ".join(pair) for pair in zip(["<", *name.split()], [*name.split(), ">"], strict=True)]


class Project(nn.Sequential):
    """Bring text vectors (N, 256) to the width of the embeddings: (N, components, DIM)."""

    def __init__(self, text: Tensor, components: int) -> None:
        super().__init__(nn.Linear(text.shape[1], components * DIM), nn.Tanh(), nn.Unflatten(1, (components, DIM)))
        self.text = text

    def forward(self) -> Tensor:
        """Return the projected texts of all entities."""
        return super().forward(self.text)


def table(rows: int, components: int, size: float) -> nn.Parameter:
    """Return random embeddings that training changes."""
    return nn.Parameter(size * torch.randn(rows, components, DIM))


class Tetra(nn.Module):
    """h = [embedding, text1, text2, text3]; q = h (*) r / |r|."""

    def __init__(self, num_entities: int, num_relations: int, texts: list[Tensor]) -> None:
        super().__init__()
        self.embedding = table(num_entities, 1, 0.1)
        self.rotors = table(num_relations, 4, 1.0)
        self.projections = nn.ModuleList(Project(text, 1) for text in texts)

    def arguments(self) -> dict[str, Tensor | str]:
        """Return what `relation_query` and `LinkPredictor` take."""
        return {
            "entities": torch.cat([self.embedding, *(project() for project in self.projections)], 1),
            "relations": self.rotors,
        }


class Robin(nn.Module):
    """q = h (*) [text1 | text2] / |.| + r + text1' + text2', texts being those of the head."""

    def __init__(self, num_entities: int, num_relations: int, texts: list[Tensor]) -> None:
        super().__init__()
        self.entities = table(num_entities, 4, 0.1)
        self.relations = table(num_relations, 4, 0.1)
        self.rotors = nn.ModuleList(Project(text, 2) for text in texts)
        self.translations = nn.ModuleList(Project(text, 4) for text in texts)

    def arguments(self) -> dict[str, Tensor | str]:
        """Return what `relation_query` and `LinkPredictor` take."""
        return {
            "entities": self.entities,
            "relations": torch.cat([project() for project in self.rotors], 1),
            "rotate_by": "head",
            "translations": self.relations,
            "head_translations": sum(project() for project in self.translations),
        }


class Lion(Robin):
    """As Robin, with two language models of one text."""


def train(model: nn.Module, triples: Tensor, bias: nn.Parameter, *, algebra: str, epochs: int) -> None:
    """Minimise the cross entropy of the right tail among all entities."""
    optimizer = torch.optim.Adagrad([*model.parameters(), bias], 0.05)
    for _ in range(epochs):
        for head, relation, tail in (batch.T for batch in triples[torch.randperm(len(triples))].split(256)):
            arguments = model.arguments()
            queries = relation_query(**arguments, head_ids=head, relation_ids=relation, algebra=algebra)
            tails = arguments["entities"].flatten(1)
            scores = 2 * queries @ tails.T - tails.square().sum(1) + bias  # -|q - t|^2 but for |q|^2, alike for all t
            loss = functional.cross_entropy(scores, tail)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def evaluate(model: nn.Module, bias: Tensor, triples: NDArray[np.int64], known: NDArray[np.int64], algebra: str) -> str:
    """Rank the true entities among all, and return the figures."""
    arguments = {name: x.detach() if isinstance(x, Tensor) else x for name, x in model.arguments().items()}
    predictor = pv.retrieve.LinkPredictor(
        **arguments, algebra=algebra, metric="l2", bias=bias.detach(), reciprocal=True
    )
    figures = predictor.evaluate(triples, known=known)
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def main() -> None:
    """Train and evaluate the three models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algebra", choices=("quaternion", "dihedron"), default="dihedron")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)  # matrices this small gain nothing from more
    graph = load_knowledge_graph()
    known = np.concatenate([graph.train, graph.valid, graph.test])
    triples = torch.from_numpy(with_reciprocals(graph.train, len(graph.relations)))
    by_word, by_letter, by_pair = (hashed(graph.entities, pieces) for pieces in (words, trigrams, word_pairs))
    for kind, texts in ((Tetra, [by_word, by_letter, by_pair]), (Robin, [by_word, by_letter]),
                        (Lion, [by_letter, by_pair])):  # fmt: skip
        torch.manual_seed(options.seed)
        model = kind(len(graph.entities), 2 * len(graph.relations), texts)
        bias = nn.Parameter(torch.zeros(len(graph.entities)))
        train(model, triples, bias, algebra=options.algebra, epochs=options.epochs)
        print(f"{kind.__name__:6}", evaluate(model, bias, graph.test, known, options.algebra))


if __name__ == "__main__":
    main()
