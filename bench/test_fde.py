"""Fixed dimensional encodings against fastembed's Muvera and the same algebra in numpy."""

import numpy as np
import pytest

import polyvec as pv

D, TOKENS = 128, 180


def unit_tokens(rng, n, tokens):
    """Token sets around a few directions each, as a text's tokens are."""
    x = (
        rng.standard_normal((n, tokens, D), np.float32)
        + 2 * rng.standard_normal((n, 6, D), np.float32)[:, rng.integers(0, 6, tokens)]
    )
    return x / np.linalg.norm(x, axis=2, keepdims=True)


def flops(encoder, sets, tokens, rows):
    """Signs, sums, and projections of `rows` blocks a repetition."""
    per_repetition = 2 * tokens * D * encoder.simhash_bits + tokens * D
    if encoder.projections is not None:
        per_repetition += 2 * rows * D * encoder.projection_dim
    return sets * encoder.repetitions * per_repetition


def muvera(encoder):
    """The encoder of fastembed with our hyperplanes: float64 of float32, so that bucket ids are equal."""
    postprocess = pytest.importorskip("fastembed.postprocess")
    rival = postprocess.Muvera(D, encoder.simhash_bits, encoder.projection_dim, encoder.repetitions, random_seed=0)
    for projection, planes in zip(rival.simhash_projections, encoder.hyperplanes, strict=True):
        projection.simhash_vectors = planes.astype(np.float64)
    return rival


class InNumpy:
    """One set at a time, all repetitions at once: matrix products only."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.planes = np.moveaxis(encoder.hyperplanes, 0, 1).reshape(D, -1)
        self.buckets = np.arange(2**encoder.simhash_bits)
        self.distances = np.array([[bin(a ^ b).count("1") for b in self.buckets] for a in self.buckets])

    def encode(self, tokens, docs):
        """Encode one set."""
        encoder, n = self.encoder, len(tokens)
        signs = (tokens @ self.planes > 0).reshape(n, encoder.repetitions, -1)
        ids = (signs << np.arange(encoder.simhash_bits)).sum(-1).T
        member = ids[:, None, :] == self.buckets[:, None]
        blocks = member.astype(np.float32) @ tokens
        if docs:
            counts = member.sum(-1)
            blocks /= np.maximum(counts, 1)[..., None]
            for r in range(encoder.repetitions):
                empty = np.flatnonzero(counts[r] == 0)
                order = np.lexsort((np.arange(n), ids[r]))  # ties: the first token of the lowest bucket
                blocks[r, empty] = tokens[order[np.argmin(self.distances[empty][:, ids[r, order]], axis=1)]]
        if encoder.projections is not None:
            blocks = blocks @ encoder.projections
        if encoder.final_projection is None:
            return blocks.ravel()
        index, sign = encoder.final_projection
        return np.bincount(index, sign * blocks.ravel(), encoder.final_dim)


def close_to(expected):
    return lambda result: np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [TOKENS, 30])
def test_docs(compare, rng, tokens, threads):
    sets = unit_tokens(rng, 32, tokens)
    encoder = pv.fde.Encoder(D, dialect="fastembed")
    rival, numpy = muvera(encoder), InNumpy(encoder)
    out = np.empty((len(sets), encoder.output_dim), np.float32)
    compare(
        lambda: encoder.encode_docs(sets, out=out, num_threads=threads),
        {
            "fastembed": lambda: np.stack([rival.process_document(x) for x in sets]),
            "numpy": lambda: np.stack([numpy.encode(x, True) for x in sets]),
        },
        check=close_to(np.stack([rival.process_document(x) for x in sets])),
        flops=flops(encoder, len(sets), tokens, 32),
    )


def test_queries(compare, rng, threads):
    sets = unit_tokens(rng, 64, 32)
    encoder = pv.fde.Encoder(D)
    rival, numpy = muvera(encoder), InNumpy(encoder)
    out = np.empty((len(sets), encoder.output_dim), np.float32)
    compare(
        lambda: encoder.encode_queries(sets, out=out, num_threads=threads),
        {
            "fastembed": lambda: np.stack([rival.process_query(x) for x in sets]),
            "numpy": lambda: np.stack([numpy.encode(x, False) for x in sets]),
        },
        check=close_to(np.stack([rival.process_query(x) for x in sets])),
    )


def test_docs_with_a_final_sketch(compare, benchmark, peak_megabytes, rng, threads):
    """(40, 6, 128) to 10240: the 327,680 columns before the sketch are never stored."""
    sets = unit_tokens(rng, 16, TOKENS)
    encoder = pv.fde.Encoder(
        D, repetitions=40, simhash_bits=6, projection_dim=None, final_dim=10240, dialect="fastembed"
    )
    numpy = InNumpy(encoder)
    many = unit_tokens(rng, 200, TOKENS)
    kilobytes = 1024 * peak_megabytes(lambda: encoder.encode_docs(many, num_threads=threads)) / len(many)
    benchmark.extra_info["kilobytes a document"] = kilobytes  # 40 are its encoding; the long one has 1280
    assert kilobytes < 200
    out = np.empty((len(sets), encoder.output_dim), np.float32)
    compare(
        lambda: encoder.encode_docs(sets, out=out, num_threads=threads),
        {"numpy": lambda: np.stack([numpy.encode(x, True) for x in sets])},
        check=close_to(np.stack([numpy.encode(x, True) for x in sets])),
        flops=flops(encoder, len(sets), TOKENS, 64),
    )
