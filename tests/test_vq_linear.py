"""Products with weights that are product codes, and their gradients."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction
from polyvec import _core
from reference import quantize as ref

OP = "quantize.vq_linear"
SHAPES = [  # inputs, outputs, m, dsub
    (1, 1, 1, 1), (0, 5, 2, 3), (3, 0, 2, 3), (2, 7, 3, 4), (17, 300, 5, 8), (4, 257, 33, 2), (16, 64, 16, 17),
    (33, 40, 35, 1), (1, 600, 70, 3),
]  # fmt: skip


def sample(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def layer(rng, n, outputs, m, dsub, bits):
    """x, labels, codes and codebooks."""
    labels = rng.integers(0, 1 << bits, (outputs, m))
    return sample(rng, n, m * dsub), labels, ref.pack(labels, bits), sample(rng, m, 1 << bits, dsub)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_definition(rng, isa, shape, bits):
    x, labels, codes, codebooks = layer(rng, *shape, bits)
    bias = sample(rng, shape[1])
    expected, size = ref.vq_linear(x, labels, codebooks)
    length = shape[2] * shape[3]
    assert_reduction(pv.quantize.vq_linear(x, codes, codebooks), expected, size, length=length)
    with_bias = pv.quantize.vq_linear(x, codes, codebooks, bias=bias)
    assert_reduction(with_bias, expected + bias, size + np.abs(bias), length=length)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_multiplies_by_what_a_quantizer_decodes(rng, isa, bits):
    weights, x = sample(rng, 300, 24), sample(rng, 5, 24)
    pq = pv.quantize.ProductQuantizer(24, 6, bits=bits).fit(weights)
    codes = pq.encode(weights)
    decoded = np.float64(pq.decode(codes))
    size = np.abs(x) @ np.abs(decoded).T
    y = pv.quantize.vq_linear(x, codes, pq.codebooks)
    assert_reduction(y, x @ decoded.T, size, length=24)
    assert_exact(pv.quantize.vq_linear(x, codes, pq), y)


@pytest.mark.parametrize("rotation", ["random", "opq"])
def test_inputs_are_rotated_as_a_quantizer_rotated_the_weights(rng, cpu_lib, rotation):
    weights, x = sample(rng, 300, 24), sample(rng, 5, 24)
    pq = pv.quantize.ProductQuantizer(24, 6, bits=4, rotation=rotation).fit(weights)
    codes = pq.encode(weights)
    decoded = np.float64(pq.decode(codes))
    y = pv.quantize.vq_linear(cpu_lib(x), cpu_lib(codes), pq)
    assert type(y) is type(cpu_lib(x))
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(decoded, axis=1)
    assert_reduction(np.asarray(y), x @ decoded.T, 24**0.5 * size, length=48)


def test_an_input_alone_gives_what_it_gives_in_a_batch(rng, isa):
    x, _, codes, codebooks = layer(rng, 35, 300, 20, 4, 8)
    y = pv.quantize.vq_linear(x, codes, codebooks)
    for i in (0, 15, 16, 34):
        assert_exact(pv.quantize.vq_linear(x[i : i + 1], codes, codebooks), y[i : i + 1])


def gradients(x, codes, codebooks, grad, **options):
    return pv.quantize.vq_linear_gradient(x, codes, codebooks, grad, of_x=True, of_codebooks=True, **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_the_definition(rng, isa, shape, bits):
    x, labels, codes, codebooks = layer(rng, *shape, bits)
    grad = sample(rng, *shape[:2])
    dx, dcodebooks = gradients(x, codes, codebooks, grad)

    def expected(x, codebooks, grad):
        dweights = (grad.T @ x).reshape(shape[1], *shape[2:])
        of_codebooks = np.zeros(codebooks.shape)
        for s in range(shape[2]):
            np.add.at(of_codebooks[s], labels[:, s], dweights[:, s])
        return grad @ ref.decode(labels, codebooks), of_codebooks

    arrays = [np.float64(a) for a in (x, codebooks, grad)]
    exact, size = expected(*arrays), expected(*map(np.abs, arrays))
    assert_reduction(dx, exact[0], size[0], length=shape[1])
    assert_reduction(dcodebooks, exact[1], size[1], length=shape[0] * shape[1])


def test_result_does_not_depend_on_thread_count(rng):
    x, _, codes, codebooks = layer(rng, 20, 3000, 40, 4, 8)
    grad = sample(rng, 20, 3000)
    results = [
        (
            pv.quantize.vq_linear(x, codes, codebooks, num_threads=n),
            *gradients(x, codes, codebooks, grad, num_threads=n),
        )
        for n in (1, 2, 7)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_exact(a, b)


def test_the_caller_gets_the_library_it_gave(rng, cpu_lib):
    x, _, codes, codebooks = (cpu_lib(a) for a in layer(rng, 3, 9, 4, 2, 8))
    y = pv.quantize.vq_linear(x, codes, codebooks)
    assert type(y) is type(x)
    out = cpu_lib(np.zeros((3, 9), np.float32))
    assert pv.quantize.vq_linear(x, codes, codebooks, out=out) is out
    assert_exact(out, y)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def fitted(**options):
    return pv.quantize.ProductQuantizer(8, 2, **options).fit(np.eye(256, 8, dtype=np.float32))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: pv.quantize.vq_linear(zeros(8), c, zeros(2, 256, 4)), ValueError,
         f"{OP}: x must have 2 axes, got shape (8,)"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 9), c, zeros(2, 256, 4)), ValueError,
         f"{OP}: x must have the dim of the codebooks (8), got 9"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 9), c, fitted(rotation="random")), ValueError,
         f"{OP}: x must have the dim of the codebooks (8), got 9"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, pv.quantize.ProductQuantizer(8, 2)), RuntimeError,
         f"{OP}: the quantizer must be fitted before; call fit(x)"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, pv.quantize.ResidualQuantizer(8, 2)), TypeError,
         f"{OP}: codebooks must be an array of float32, got ResidualQuantizer"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, zeros(2, 64, 4)), ValueError,
         f"{OP}: codebooks must have 16 or 256 codewords a subspace, got 64"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, zeros(2, 16, 4)), ValueError,
         f"{OP}: codes must have the code size (1), got 2"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c.astype(np.int32), zeros(2, 256, 4)), TypeError,
         f"{OP}: codes must be uint8, got int32; cast it with .astype('uint8')"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, zeros(2, 256, 4), bias=zeros(4)), ValueError,
         f"{OP}: bias must have one value a code (3), got 4"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, zeros(2, 256, 4), out=zeros(1, 4)), ValueError,
         f"{OP}: out must have shape (1, 3), got (1, 4)"),
        (lambda c: pv.quantize.vq_linear(zeros(1, 8), c, zeros(2, 256, 4), num_threads=0), ValueError,
         f"{OP}: num_threads must be at least 1, got 0"),
        (lambda c: _core.vq_linear_gradient(zeros(1, 8), c, zeros(2, 256, 4), zeros(1, 4), None, None, 1), ValueError,
         f"{OP}_gradient: grad must have one column a code (3), got 4"),
        (lambda c: pv.quantize.add_decode_gradient(zeros(4, 8), c, zeros(2, 256, 4)), ValueError,
         "quantize.decode_gradient: codes must have one row a row of grad (4), got 3"),
        (lambda c: _core.vq_linear_gradient(zeros(1, 8), c, zeros(2, 256, 4), zeros(1, 3), zeros(2, 8), None, 1),
         ValueError, f"{OP}_gradient: dx must have the shape of x (1, 8), got (2, 8)"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call(zeros(3, 2, dtype=np.uint8))
    assert str(caught.value) == text
