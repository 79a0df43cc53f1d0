"""Definitions in float64, from MUVERA section 2, written apart from the library."""

import numpy as np


def bucket_ids(tokens, hyperplanes):
    """(T, R): bit j is 1 where <token, plane j> > 0."""
    signs = np.einsum("td,rdj->trj", np.asarray(tokens, np.float64), np.asarray(hyperplanes, np.float64)) > 0
    return signs @ (1 << np.arange(signs.shape[-1]))


def fill_token(ids, bucket, ties):
    """The token that an empty bucket takes, of tokens in buckets `ids`."""
    distances = [bin(i ^ bucket).count("1") for i in ids.tolist()]
    return min(range(len(ids)), key=lambda t: (distances[t], t if ties == "first_token" else ids[t], t))


def blocks(tokens, ids, encoder, docs):
    """(2^bits, d) of one repetition."""
    out = np.zeros((2**encoder.simhash_bits, tokens.shape[1]))
    for bucket in range(len(out) if len(tokens) else 0):
        mine = tokens[ids == bucket]
        if len(mine):
            out[bucket] = mine.mean(0) if docs else mine.sum(0)
        elif docs and encoder.fill_empty:
            out[bucket] = tokens[fill_token(ids, bucket, encoder.fill_ties)]
    return out


def encode(tokens, encoder, docs):
    """The encoding of one set with the matrices and options of `encoder`, and the sums of absolute terms behind it."""
    ids = bucket_ids(tokens, encoder.hyperplanes)
    return tuple(_encode(kind(np.asarray(tokens, np.float64)), ids, encoder, docs, kind) for kind in (np.positive, abs))


def _encode(tokens, ids, encoder, docs, kind):
    long = [blocks(tokens, ids[:, r], encoder, docs) for r in range(encoder.repetitions)]
    if encoder.projections is not None:
        long = [block @ kind(p.astype(np.float64)) for block, p in zip(long, encoder.projections, strict=True)]
    long = np.concatenate(long, axis=None)
    if encoder.final_projection is None:
        return long
    index, sign = encoder.final_projection
    return np.bincount(index, kind(sign) * long, encoder.final_dim)
