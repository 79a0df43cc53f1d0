import pickle

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact


def arrays(rng, n, blocks, block, density):
    """(values, blocks, offsets) of random rows, and the rows themselves."""
    kept = rng.random((n, blocks)) < density
    values = rng.standard_normal((kept.sum(), block), np.float32)
    dense = np.zeros((n, blocks, block), np.float32)
    dense[kept] = values
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))])
    return (values, np.nonzero(kept)[1], offsets), dense.reshape(n, blocks * block)


@pytest.mark.parametrize(("n", "blocks", "block"), [(0, 4, 2), (1, 1, 1), (5, 9, 3), (7, 640, 16)])
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_the_dense_rows(rng, lib, n, blocks, block, density):
    (values, ids, offsets), expected = arrays(rng, n, blocks, block, density)
    rows = pv.BlockSparse(lib(values), lib(ids), lib(offsets), blocks * block)
    dense = rows.to_dense()
    assert type(dense) is type(rows.values) is type(lib(values))
    assert_exact(dense, expected)
    assert (rows.shape, len(rows), rows.block) == ((n, blocks * block), n, block)
    assert (rows.blocks.dtype, rows.offsets.dtype) == (np.int32, np.int64)
    assert rows.nbytes == values.nbytes + 4 * len(ids) + 8 * (n + 1)


def test_what_it_keeps(rng):
    (values, ids, offsets), expected = arrays(rng, 4, 6, 2, 0.5)
    rows = pv.BlockSparse(values, ids.tolist(), offsets.tolist(), 12)
    assert rows.values is values
    assert_exact(pv.BlockSparse(np.asfortranarray(values), ids, offsets, 12).to_dense(), expected)
    assert_exact(pickle.loads(pickle.dumps(rows)).to_dense(), expected)
    assert repr(rows) == f"BlockSparse(4 rows, {len(ids)} blocks of 2, d=12)"


VALUES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ((VALUES.astype(int), [0, 1, 2], [0, 3], 6), TypeError,
         "BlockSparse: values must be float32, got int64; cast it with .astype('float32')"),
        ((VALUES[0], [0], [0, 1], 6), ValueError, "BlockSparse: values must have 2 axes, got shape (2,)"),
        ((VALUES, [0, 1, 2], [0, 3], 7), ValueError,
         "BlockSparse: d must be a multiple of the width of values (2), got 7"),
        ((VALUES[:, :0], [0, 1, 2], [0, 3], 6), ValueError,
         "BlockSparse: d must be a multiple of the width of values (0), got 6"),
        ((VALUES, [0, 1, 2], [0, 3], 0), ValueError, "BlockSparse: d must be at least 1, got 0"),
        ((VALUES, [0, 1, 2**31], [0, 3], 2**33), ValueError,
         "BlockSparse: d must be at most 2^31 times the width of values (2), got 8589934592"),
        ((VALUES, [0.0, 1, 2], [0, 3], 6), TypeError, "BlockSparse: blocks must be integers, got float64"),
        ((VALUES, [0, 1], [0, 3], 6), ValueError,
         "BlockSparse: blocks must have one entry a row of values (3), got 2"),
        ((VALUES, [0, 1, 3], [0, 3], 6), ValueError, "BlockSparse: blocks must be in [0, 3), got 3 at position 2"),
        ((VALUES, [-1, 1, 2], [0, 3], 6), ValueError, "BlockSparse: blocks must be in [0, 3), got -1 at position 0"),
        ((VALUES, [0, 2, 2], [0, 1, 3], 6), ValueError,
         "BlockSparse: blocks must be ascending within a row, got 2 then 2 at position 1"),
        ((VALUES, [0, 1, 2], [0, 2], 6), ValueError,
         "BlockSparse: offsets must run from 0 to the number of rows of values (3) and never backwards, got [0, 2]"),
        ((VALUES, [0, 1, 2], [0, 2, 1, 3], 6), ValueError,
         "BlockSparse: offsets must run from 0 to the number of rows of values (3) and never backwards, "
         "got [0, 2, 1, 3]"),
        ((VALUES, [0, 1, 2], [0, 2, 9, 1, 1, 1, 1, 1, 3], 6), ValueError,
         "BlockSparse: offsets must run from 0 to the number of rows of values (3) and never backwards, got 0 to 3"),
    ],
)  # fmt: skip
def test_errors(given, error, text):
    with pytest.raises(error) as caught:
        pv.BlockSparse(*given)
    assert str(caught.value) == text
