"""What goes in as an array and what comes out: libraries, layouts, dtypes, ids, `out`, ragged sets."""

import re

import ml_dtypes
import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact
from polyvec import _arrays, _core
from polyvec._ragged import as_ragged

torch = pytest.importorskip("torch")
product = pv.hypercomplex.product


class Exporter:
    """An array that offers DLPack and nothing else."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def x(rng):
    return rng.standard_normal((6, 4, 5), np.float32)


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


# Libraries


def test_the_result_is_of_the_first_array_s_library(x):
    t = torch.from_numpy(x)
    expected = product(x, x)
    for first, second, kind in [
        (x, t, np.ndarray),
        (t, x, torch.Tensor),
        (x, Exporter(x), np.ndarray),
        (Exporter(x), t, np.ndarray),  # numpy stands in for a library whose arrays polyvec may not write to
        (x.tolist(), t, np.ndarray),
    ]:
        result = product(first, second)
        assert type(result) is kind
        assert_exact(result, expected)


def test_lists_become_float32(x):
    assert product(x.tolist(), x.tolist()).dtype == np.float32


def test_subclasses_are_read_as_arrays(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    assert_exact(product(np.load(tmp_path / "x.npy", mmap_mode="r"), x), product(x, x))
    assert_exact(product(torch.nn.Parameter(torch.from_numpy(x), requires_grad=False), x), product(x, x))


def test_inputs_are_never_written(x):
    x.flags.writeable = False
    assert_exact(product(x, x), product(x.copy(), x.copy()))
    assert_exact(pv.hypercomplex.relation_query(x, x, [1, 2], [0, 0]).shape, (2, 20))


def test_lazily_negated_tensors_are_resolved(x):
    negated = torch.complex(torch.zeros(6, 4, 5), torch.from_numpy(x)).conj().imag
    assert negated.is_neg()
    assert_exact(product(negated, x), product(-x, x))


# Layouts


def test_any_strides(x):
    big = np.zeros((12, 8, 10), np.float32)
    views = [
        big[::2, ::2, ::2],
        big[::-2, ::-2, ::-2],
        big.reshape(-1)[1 : 1 + x.size].reshape(x.shape),
        np.zeros((5, 4, 6), np.float32).T,
    ]
    for view in views:
        view[...] = x
        assert_exact(product(view, view), product(x, x))
    t = torch.zeros(5, 6, 4).permute(1, 2, 0)
    t[...] = torch.from_numpy(x)
    assert_exact(product(t, t), product(x, x))


def test_unaligned_memory(x):
    memory = bytearray(x.nbytes + 1)
    unaligned = np.frombuffer(memory, np.float32, x.size, offset=1).reshape(x.shape)
    unaligned[...] = x
    assert_exact(product(unaligned, unaligned), product(x, x))


def test_empty_arrays():
    for shape in [(0, 4, 5), (3, 4, 0), (0, 4, 0)]:
        assert product(np.zeros(shape, np.float32), np.zeros(shape, np.float32)).shape == shape


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("f2", "float16"), (">f4", ">f4"), ("i8", "int64"), ("c8", "complex64"), ("O", "object"), ("?", "bool")],
)
def test_no_dtype_is_cast_silently(x, dtype, name):
    text = f"hypercomplex.product: x must be float32 or float64, got {name}; cast it with .astype('float32')"
    with raises(TypeError, text):
        product(x.astype(dtype), x)


def test_the_hint_is_in_the_caller_s_library(x):
    text = "hypercomplex.product: x must be float32 or float64, got float16; cast it with .to(torch.float32)"
    with raises(TypeError, text):
        product(torch.from_numpy(x).half(), x)


def test_mixed_dtypes_are_refused(x):
    with raises(TypeError, "hypercomplex.product: y must be float32, got float64; cast it with .astype('float32')"):
        product(x, x.astype(np.float64))


@pytest.mark.parametrize("array", [np.zeros(3, ml_dtypes.bfloat16), torch.zeros(3, dtype=torch.bfloat16)])
def test_bfloat16_has_one_name(array):
    assert _arrays.dtype_name(array) == "bfloat16"
    assert _arrays.as_array("f", "x", array, dtypes=("bfloat16",)) is array


def test_the_core_refuses_foreign_byte_order(x):
    with raises(TypeError, "first_nonfinite_row: x has a dtype that polyvec does not read: >f4"):
        _core.first_nonfinite_row(x.astype(">f4"), 1)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_ids_of_any_integer_dtype(x, dtype):
    ids = np.array([3, 0, 5], dtype)
    expected = x[[3, 0, 5]].reshape(3, -1)
    unit = np.zeros((1, 4, 5), np.float32)
    unit[:, 0] = 1
    kinds = [ids, ids[::-1].copy()[::-1], Exporter(ids), ids.tolist(), tuple(ids.tolist())]
    kinds += [torch.from_numpy(ids)] if dtype[0] == "i" or dtype == "u1" else []
    for kind in kinds:
        assert_exact(pv.hypercomplex.relation_query(x, unit, kind, [0, 0, 0]), expected)


def test_no_ids_is_an_empty_result(x):
    assert pv.hypercomplex.relation_query(x, x, [], []).shape == (0, 20)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([0.0], TypeError, "head_ids must be integers, got float64"),
        ([True], TypeError, "head_ids must be integers, got bool"),
        (["a"], TypeError, "head_ids must be integers, got <U1"),
        (torch.zeros(1), TypeError, "head_ids must be integers, got float32"),
        ([[0]], ValueError, "head_ids must have 1 axis, got shape (1, 1)"),
        (0, ValueError, "head_ids must have 1 axis, got shape ()"),
        ([6], IndexError, "head_ids must be in [0, 6), got 6 at position 0"),
        (np.array([3, 2**63 + 5], np.uint64), ValueError, f"head_ids must be below 2^63, got {2**63 + 5}"),
        (
            torch.from_numpy(np.array([2**64 - 1, 3], np.uint64)),
            ValueError,
            f"head_ids must be below 2^63, got {2**64 - 1}",
        ),
        ([2**63], ValueError, f"head_ids must be below 2^63, got {2**63}"),
    ],
)
def test_errors_of_ids(x, ids, error, text):
    with raises(error, f"hypercomplex.relation_query: {text}"):
        pv.hypercomplex.relation_query(x, x, ids, [0])


# Gradients and devices


def test_tensors_that_require_grad_are_refused(x):
    wants_grad = torch.ones(6, 4, 5, requires_grad=True)
    text = "must not require grad, got a tensor that does; use polyvec.torch.product or .detach()"
    with raises(TypeError, f"hypercomplex.product: x {text}"):
        product(wants_grad, x)
    with raises(TypeError, f"hypercomplex.product: out {text}"):
        product(x, x, out=wants_grad)
    assert_exact(product(wants_grad.detach(), x), product(np.ones_like(x), x))


def test_other_devices_are_refused(x):
    elsewhere = torch.empty(6, 4, 5, device="meta")
    with raises(TypeError, "hypercomplex.product: arrays must be on cpu or cuda, got meta"):
        product(elsewhere, elsewhere)
    with raises(TypeError, "hypercomplex.product: arrays must be on one device, got cpu and meta"):
        product(x, elsewhere)
    with raises(TypeError, "hypercomplex.product: out must be on cpu, got meta"):
        product(x, x, out=elsewhere)


# Outputs


@pytest.mark.parametrize("make", [np.empty_like, lambda x: torch.empty(x.shape), lambda x: Exporter(np.empty_like(x))])
def test_out_is_written_and_returned(x, make):
    out = make(x)
    assert product(x, x, out=out) is out
    assert_exact(np.from_dlpack(out), product(x, x))


def test_out_may_be_a_part_of_a_larger_array(x):
    large = np.zeros((3, *x.shape), np.float32)
    product(x, x, out=large[1])
    assert_exact(large[1], product(x, x))
    assert not large[::2].any()


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        ([[1.0]], TypeError, "out must be an array, got list"),
        (np.empty((6, 4, 6), np.float32), ValueError, "out must have shape (6, 4, 5), got (6, 4, 6)"),
        (np.empty((4, 5), np.float32), ValueError, "out must have shape (6, 4, 5), got (4, 5)"),
        (np.empty((6, 4, 5)), TypeError, "out must be float32, got float64"),
        (np.empty((5, 4, 6), np.float32).T, ValueError, "out must be C-contiguous"),
        (torch.empty(5, 4, 6).permute(2, 1, 0), ValueError, "out must be C-contiguous"),
        (np.empty((6, 4, 10), np.float32)[..., ::2], ValueError, "out must be C-contiguous"),
        (read_only(np.empty((6, 4, 5), np.float32)), ValueError, "out must be writable"),
        (Exporter(np.empty((5, 4, 6), np.float32).T), ValueError, "out must be C-contiguous"),
    ],
)
def test_errors_of_out(x, out, error, text):
    with raises(error, f"hypercomplex.product: {text}"):
        product(x, x, out=out)


def test_out_must_not_share_memory_with_an_input(x):
    y = x.copy()
    with raises(ValueError, "hypercomplex.product: out must not overlap x"):
        product(x, y, out=x)
    with raises(ValueError, "hypercomplex.product: out must not overlap y"):
        product(x[:5], y[1:], out=y[:5])
    with raises(ValueError, "hypercomplex.product: out must not overlap y"):
        product(x, torch.from_numpy(y), out=y)
    product(x[:3], x[:3], out=x[3:])  # the same array, other memory


# Ragged sets


@pytest.fixture
def sets(rng):
    return [rng.standard_normal((n, 3), np.float32) for n in (2, 0, 3, 1)]


OFFSETS = [0, 2, 2, 5, 6]


def same_sets(ragged, sets):
    assert len(ragged) == len(sets)
    for mine, wanted in zip(ragged, sets, strict=True):
        assert_exact(mine, wanted)


def padded(sets):
    x = np.full((len(sets), 4, 3), np.nan, np.float32)
    for row, one in zip(x, sets, strict=True):
        row[: len(one)] = one
    return x, np.array([len(one) for one in sets])


def test_every_form_of_sets(lib, sets):
    values = lib(np.concatenate(sets))
    x, lengths = padded(sets)
    forms = [
        pv.Ragged(values, OFFSETS),
        (values, OFFSETS),
        (values, np.array(OFFSETS, np.int32)),
        (values, torch.tensor(OFFSETS)),
        [lib(one) for one in sets],
        tuple(lib(one) for one in sets),
        pv.Ragged.from_list([lib(one) for one in sets]),
        (lib(x), lib(lengths)),
        (lib(x), lengths.tolist()),
        pv.Ragged.from_padded(lib(x), lib(lengths)),
    ]
    for form in forms:
        ragged = as_ragged("f", "docs", form)
        assert type(ragged.values) is type(values)
        assert ragged.offsets.tolist() == OFFSETS
        assert ragged.lengths.tolist() == [2, 0, 3, 1]
        assert ragged.dim == 3
        same_sets(ragged, sets)


def test_padded_sets_without_padding(lib, rng):
    x = rng.standard_normal((4, 2, 3), np.float32)
    for form in (lib(x), lib(x.swapaxes(0, 1).copy()).swapaxes(0, 1)):
        same_sets(as_ragged("f", "docs", form), x)


def test_sets_of_other_libraries_and_of_lists(sets):
    same_sets(as_ragged("f", "docs", [Exporter(one) for one in sets]), sets)
    same_sets(as_ragged("f", "docs", (Exporter(np.concatenate(sets)), OFFSETS)), sets)
    same_sets(as_ragged("f", "docs", [one.tolist() for one in sets if len(one)]), [one for one in sets if len(one)])


def test_the_values_are_not_copied(sets):
    values = np.concatenate(sets)
    assert pv.Ragged(values, OFFSETS).values is values
    assert as_ragged("f", "docs", (values, OFFSETS)).values is values


def test_values_are_made_contiguous_once(sets):
    strided = np.concatenate(sets).T.copy().T
    ragged = as_ragged("f", "docs", (strided, OFFSETS))
    assert ragged.values.flags.c_contiguous
    same_sets(ragged, sets)


def test_no_sets():
    for form in [(np.zeros((0, 3), np.float32), [0]), np.zeros((0, 4, 3), np.float32)]:
        ragged = as_ragged("f", "docs", form)
        assert (len(ragged), ragged.dim, list(ragged)) == (0, 3, [])
    assert len(as_ragged("f", "docs", [], dim=3)) == 0


def test_indexing_and_taking(lib, sets):
    ragged = pv.Ragged.from_list([lib(one) for one in sets])
    assert_exact(ragged[-1], sets[-1])
    taken = ragged.take([3, 1, 0, 3])
    assert type(taken.values) is type(ragged.values)
    same_sets(taken, [sets[3], sets[1], sets[0], sets[3]])
    assert len(ragged.take([])) == 0
    for i in (4, -5):
        with raises(IndexError, f"Ragged: index must be in [-4, 4), got {i}"):
            ragged[i]
    with raises(IndexError, "Ragged.take: ids must be in [0, 4), got 0 to 4"):
        ragged.take([0, 4])


def test_slices(lib, sets):
    ragged = pv.Ragged.from_list([lib(one) for one in sets])
    for some in (slice(None), slice(1, 3), slice(2, None), slice(-1, None), slice(4, None), slice(3, 1), slice(-9, 9)):
        part = ragged[some]
        assert type(part.values) is type(ragged.values)
        same_sets(part, sets[some])
    same_sets(ragged[::-2], sets[::-2])
    values = np.concatenate(sets)
    assert np.shares_memory(pv.Ragged(values, OFFSETS)[1:].values, values)


def test_repr(lib):
    assert repr(pv.Ragged(lib(np.zeros((5, 3), np.float32)), [0, 5])) == "Ragged(1 sets, 5 rows, d=3, float32)"


VALUES = np.zeros((5, 3), np.float32)


@pytest.mark.parametrize(
    ("form", "error", "text"),
    [
        ((VALUES, [0, 3, 2, 5]), ValueError, "docs: offsets must not run backwards, got 3 then 2 at position 1"),
        ((VALUES, [1, 5]), ValueError, "docs: offsets must start at 0, got 1"),
        ((VALUES, []), ValueError, "docs: offsets must start at 0, got none"),
        ((VALUES, [0, 4]), ValueError, "docs: offsets must end at the number of rows of values (5), got 4"),
        ((VALUES, [0.0, 5.0]), TypeError, "docs: offsets must be integers, got float64"),
        ((VALUES[0], [0, 3]), ValueError, "docs: values must have 2 axes, got shape (3,)"),
        (
            VALUES,
            ValueError,
            "docs must be a Ragged, (values, offsets), a list of (n_i, d) arrays or a padded (n, t, d) array, "
            "got shape (5, 3)",
        ),
        (3, TypeError, "docs must be a Ragged, (values, offsets) or a list of arrays, got int"),
        ([], ValueError, "docs: dim must be given for an empty list"),
        (
            [VALUES, np.zeros((2, 4), np.float32)],
            ValueError,
            "docs: every array must have the same d as the first (3), got 4 at position 1",
        ),
        ([VALUES, VALUES[0]], ValueError, "docs: every array must have 2 axes, got shape (3,) at position 1"),
        (
            [VALUES, VALUES.astype(np.float64)],
            TypeError,
            "docs: every array must have the dtype of the first (float32), got float64 at position 1",
        ),
        ((VALUES[None], [6]), ValueError, "docs: lengths must be in [0, 5], got 6 at position 0"),
        ((VALUES[None], [-1]), ValueError, "docs: lengths must be in [0, 5], got -1 at position 0"),
        ((VALUES[None], [1, 1]), ValueError, "docs: lengths must have one entry a set (1), got 2"),
        ((VALUES[None], [1.0]), TypeError, "docs: lengths must be integers, got float64"),
        (
            (VALUES.astype(np.float64), [0, 5]),
            TypeError,
            "docs must be float32, got float64; cast it with .astype('float32')",
        ),
    ],
)
def test_errors_of_sets(form, error, text):
    with raises(error, f"f: {text}"):
        as_ragged("f", "docs", form)


def test_sets_of_another_width():
    with raises(ValueError, "f: docs must have d = 4, got 3"):
        as_ragged("f", "docs", (VALUES, [0, 5]), dim=4)


def test_a_ragged_speaks_for_itself():
    with raises(ValueError, "Ragged: offsets must end at the number of rows of values (5), got 4"):
        pv.Ragged(VALUES, [0, 4])
    with raises(ValueError, "Ragged: a padded array must have 3 axes, got shape (5, 3)"):
        pv.Ragged.from_padded(VALUES)
