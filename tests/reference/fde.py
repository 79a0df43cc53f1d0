"""Definitions in float64, from MUVERA section 2 and from what others do, written apart from the library."""

import numpy as np


def sign_bits(tokens, hyperplanes):
    """(T, R, bits): whether <token, plane j> > 0."""
    return np.einsum("td,rdj->trj", np.asarray(tokens, np.float64), np.asarray(hyperplanes, np.float64)) > 0


def bucket_of(bits, dialect):
    """The bucket id of one token's sign bits."""
    bucket = 0
    for j, bit in enumerate(bits):
        if dialect in ("google", "muvera-py"):  # the reflected code: a bit is flipped where the one before it is set
            bucket = 2 * bucket + (int(bit) ^ bucket & 1)
        else:
            bucket += int(bit) << j
    return bucket


def wanted_bits(bucket, count, dialect):
    """The sign bits whose nearest token fills a bucket: its own, but for muvera-py's mistake."""
    if dialect == "muvera-py":
        code, rest = bucket, bucket >> 1
        while rest:
            code, rest = code ^ rest, rest >> 1
        return [bool(code >> j & 1) for j in reversed(range(count))]
    every = [[bool(word >> j & 1) for j in range(count)] for word in range(2**count)]
    return next(bits for bits in every if bucket_of(bits, dialect) == bucket)


def bucket_ids(tokens, hyperplanes, dialect="paper"):
    """(T, R): the bucket id of each token in each repetition."""
    bits = sign_bits(tokens, hyperplanes)
    ids = [[bucket_of(repetition, dialect) for repetition in token] for token in bits]
    return np.array(ids, int).reshape(bits.shape[:2])


def fill_token(bits, bucket, dialect):
    """The token that an empty bucket takes, of tokens (T, bits) of one repetition."""
    distances = (bits != wanted_bits(bucket, bits.shape[1], dialect)).sum(1)
    nearest = np.flatnonzero(distances == distances.min())
    if dialect in ("fastembed", "opensearch"):
        return min(nearest, key=lambda t: (bucket_of(bits[t], dialect), t))
    return nearest[0]


def blocks(tokens, bits, encoder, docs):
    """(2^bits, d) of one repetition."""
    out = np.zeros((2**encoder.simhash_bits, tokens.shape[1]))
    ids = np.array([bucket_of(token, encoder.dialect) for token in bits], int)
    for bucket in range(len(out) if len(tokens) else 0):
        mine = tokens[ids == bucket]
        if len(mine):
            out[bucket] = mine.mean(0) if docs else mine.sum(0)
        elif docs and encoder.fill_empty:
            out[bucket] = tokens[fill_token(bits, bucket, encoder.dialect)]
    return out


def carve(tokens, threshold):
    """The balls of one set, each the list of its tokens."""
    products = np.asarray(tokens, np.float64) @ np.asarray(tokens, np.float64).T
    left, balls = list(range(len(tokens))), []
    while left:
        balls.append([t for t in left if t == left[0] or products[left[0], t] >= threshold])
        left = [t for t in left if t not in balls[-1]]
    return balls


def encode(tokens, encoder, docs):
    """The encoding of one set with the matrices and options of `encoder`, and the sums of absolute terms behind it."""
    bits = sign_bits(tokens, encoder.hyperplanes)
    return tuple(
        _encode(kind(np.asarray(tokens, np.float64)), bits, encoder, docs, kind) for kind in (np.positive, abs)
    )


def _encode(tokens, bits, encoder, docs, kind):
    long = [blocks(tokens, bits[:, r], encoder, docs) for r in range(encoder.repetitions)]
    if encoder.projections is not None:
        long = [block @ kind(p.astype(np.float64)) for block, p in zip(long, encoder.projections, strict=True)]
    long = np.concatenate(long, axis=None)
    if encoder.final_projection is None:
        return long
    index, sign = encoder.final_projection
    return np.bincount(index, kind(sign) * long, encoder.final_dim)
