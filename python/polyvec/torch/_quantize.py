"""Learned quantisation: assignment to codewords with the gradients of training."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.library import custom_op

from polyvec import quantize, scan
from polyvec.torch._tensors import in_float32, require_tensors, require_tensors_or_duals, widened


@custom_op("polyvec::nearest", mutates_args=(), schema="(Tensor x, Tensor centroids, str metric) -> Tensor")
def _nearest(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    return scan.nearest(x.detach(), centroids.detach(), metric=metric)[0]


@_nearest.register_fake
def _(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.int64)


class Assignment(NamedTuple):
    """Vectors and the codewords that stand for them; a tuple with names.

    Parameters
    ----------
    quantized : tensor of the vectors' shape
        The codewords, with gradients.
    ids : int64 tensor
        Their numbers.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> quantized, ids = pvt.vq_assign(torch.tensor([[0.4, 0.0]]), torch.eye(2))
    >>> quantized, ids
    (tensor([[1., 0.]]), tensor([0]))
    """

    quantized: Tensor
    ids: Tensor


def vq_assign(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Assignment:
    """Replace each vector by its nearest codeword; gradients pass straight through.

    Parameters
    ----------
    x : tensor of shape (..., d), float32
    codebook : tensor of shape (K, d), float32
        Parameters, or what they give: a reparameterised codebook (SimVQ, low rank) is the product of its factors.
    metric : {"l2", "ip", "cosine"}
        "l2": the least distance. "ip" and "cosine": the greatest inner product, the greatest cosine.

    Returns
    -------
    Assignment
        `.quantized` of shape (..., d), rows of `codebook` to the bit; `.ids` of shape (...), int64.

    Raises
    ------
    ValueError
        Shapes that do not fit, no codeword, an unknown metric, NaN or Inf.
    TypeError
        Not tensors, or a dtype other than float32.

    Notes
    -----
    The gradient for x is the one for `.quantized`, as if they were equal (the straight-through estimator); the one for
    a codeword is the sum over the vectors it stands for. Detach either side to train the other alone. 2 n K d flops,
    and n K distances are never stored: beside the results it needs a few MB. Runs in float32 under autocast.

    References
    ----------
    van den Oord, Vinyals and Kavukcuoglu (2017): Neural discrete representation learning, section 3.2. Zhu et al.
    (2024): Addressing representation collapse in vector quantized models with one linear layer, section 3 (SimVQ).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> x = torch.tensor([[0.9, 0.2]], requires_grad=True)
    >>> quantized, ids = pvt.vq_assign(x, torch.eye(2))
    >>> quantized.sum().backward()
    >>> ids.tolist(), x.grad.tolist()
    ([0], [[1.0, 1.0]])
    """
    op = "torch.vq_assign"
    require_tensors_or_duals(op, x=x, codebook=codebook)
    if x.dim() == 0 or codebook.dim() != 2 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{op}: x must have shape (..., d) and codebook (K, d), got {tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    x, codebook = widened(x), widened(codebook)
    ids = _nearest(x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None], codebook.detach(), metric)
    ids = ids.view(x.shape[:-1])
    codewords = functional.embedding(ids, codebook)
    return Assignment(codewords + (x - x.detach()), ids)  # x - x is 0: the bits are those of the codebook


@custom_op(
    "polyvec::soft_assign",
    mutates_args=(),
    schema="(Tensor x, Tensor codebooks, float temperature, bool hard) -> (Tensor, Tensor)",
)
def _soft_assign(x: Tensor, codebooks: Tensor, temperature: float, hard: bool) -> tuple[Tensor, Tensor]:
    return quantize.soft_assign(x.detach(), codebooks.detach(), temperature=temperature, hard=hard)


@_soft_assign.register_fake
def _(x: Tensor, codebooks: Tensor, temperature: float, hard: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


@custom_op(
    "polyvec::soft_assign_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor codebooks, Tensor grad, float temperature, bool hard, bool of_x, bool of_codebooks) "
    "-> (Tensor, Tensor)",
)
def _soft_assign_gradient(
    x: Tensor, codebooks: Tensor, grad: Tensor, temperature: float, hard: bool, of_x: bool, of_codebooks: bool
) -> tuple[Tensor, Tensor]:
    gradients = quantize.soft_assign_gradient(
        x.detach(),
        codebooks.detach(),
        grad.detach(),
        temperature=temperature,
        hard=hard,
        of_x=of_x,
        of_codebooks=of_codebooks,
    )
    dx, dcodebooks = (x.new_empty(0) if g is None else g for g in gradients)  # an op returns tensors
    return dx, dcodebooks


@_soft_assign_gradient.register_fake
def _(
    x: Tensor, codebooks: Tensor, grad: Tensor, temperature: float, hard: bool, of_x: bool, of_codebooks: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else 0), x.new_empty(codebooks.shape if of_codebooks else 0)


def _save_soft_assign(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codebooks, ctx.temperature, ctx.hard = inputs
    ctx.save_for_backward(x, codebooks)
    ctx.mark_non_differentiable(output[1])


def _soft_assign_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    of_x, of_codebooks = ctx.needs_input_grad[:2]
    dx, dcodebooks = _soft_assign_gradient(*ctx.saved_tensors, grad, ctx.temperature, ctx.hard, of_x, of_codebooks)
    return dx if of_x else None, dcodebooks if of_codebooks else None, None, None


_soft_assign.register_autograd(_soft_assign_backward, setup_context=_save_soft_assign)
in_float32(_soft_assign, _soft_assign_gradient)


def soft_assign(x: Tensor, codebooks: Tensor, *, temperature: float = 1.0, hard: bool = True) -> Assignment:
    """Quantise the pieces of each vector by softmax, so that codewords are trained through both choice and value.

    A vector is cut into m pieces u, and each has its own codebook: p_j = softmax_j(-|u - c_j|^2 / temperature).

    Parameters
    ----------
    x : tensor of shape (..., m * dsub), float32 | float64
    codebooks : tensor of shape (m, k, dsub), x's dtype
        m = 1 is plain vector quantisation.
    temperature : float
        Above 0; towards 0 p becomes the nearest codeword alone. It has no gradient.
    hard : bool
        True: the value is the likeliest codeword, as searched codes decode to; its gradient goes to that codeword
        (hard path) and through p (soft path), which also reaches x. False: the value is the mean of the codewords
        under p, differentiated exactly.

    Returns
    -------
    Assignment
        `.quantized` of x's shape; `.ids` of shape (..., m), int64, of equally likely codewords the first.

    Raises
    ------
    ValueError
        Shapes that do not fit, a temperature of 0 or below, NaN or Inf.
    TypeError
        Not tensors, or dtypes that differ or are no float32 or float64.

    Notes
    -----
    With g the gradient of a piece's value, dp_j = <g, c_j> and ds_j = p_j (dp_j - sum p dp) / temperature:
    du = 2 sum_j ds_j c_j and dc_j = w_j g + 2 ds_j (u - c_j), where w is 1 at the id and else 0 (hard), or p (soft).
    2 n k d flops for a forward (twice that when soft) and 8 n k d for both gradients. Probabilities are computed anew
    in the backward, and neither they nor differences u - c_j are stored: a forward saves its inputs alone. Sums over
    rows run in a fixed order: gradients have the same bits for any number of threads. First derivatives only. Runs in
    float32 under autocast. On a GPU nothing waits for values, so that NaN and Inf are not refused; p is kept there for
    up to 2^26 codewords of rows at a time.

    References
    ----------
    Xiao et al. (2022): Distill-VQ: Learning retrieval oriented vector quantization by distilling knowledge from dense
    embeddings, section 4.1.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> codebooks = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    >>> quantized, ids = pvt.soft_assign(torch.tensor([[0.9, 0.8]]), codebooks)
    >>> quantized.tolist(), ids.tolist()
    ([[1.0, 1.0]], [[1]])
    >>> pvt.soft_assign(torch.tensor([[0.5, 0.5]]), codebooks, hard=False).quantized.tolist()
    [[0.5, 0.5]]
    """
    op = "torch.soft_assign"
    require_tensors(op, x=x, codebooks=codebooks)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise TypeError(f"{op}: temperature must not require grad, got a tensor that does; use .detach()")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape (..., m * dsub), got ()")
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    quantized, ids = _soft_assign(rows, codebooks, temperature, hard)
    return Assignment(quantized.view(x.shape), ids.view(*x.shape[:-1], codebooks.shape[0]))


def _decodes(x: Tensor, codebooks: Tensor, *, cached: int, else_: int) -> bool:
    """Whether x has so many rows that products with decoded weights are faster than sums of tables.

    Decoding waits for codewords that do not lie in the cache, so that it takes more rows to pay.
    """
    return not x.is_cuda and len(x) >= (cached if codebooks.nbytes <= 1 << 20 else else_)


def _blocks(codes: Tensor, codebooks: Tensor) -> tuple[Tensor, ...]:
    """Split the outputs so that the decoded weights of a block take 8 MB."""
    return codes.split(max(1, (1 << 21) // max(1, codebooks.shape[0] * codebooks.shape[2])))


@custom_op(
    "polyvec::vq_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor codebooks) -> Tensor",
)
def _vq_linear(x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    x, codebooks = x.detach(), codebooks.detach()
    if not _decodes(x, codebooks, cached=16, else_=64):
        return quantize.vq_linear(x, codes, codebooks)
    quantize.vq_linear(x[:0], codes, codebooks)  # checks the arguments
    return torch.cat([x @ quantize.decode(some, codebooks).T for some in _blocks(codes, codebooks)], 1)


@_vq_linear.register_fake
def _(x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@custom_op(
    "polyvec::vq_linear_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor codebooks, Tensor grad, bool of_x, bool of_codebooks) -> (Tensor, Tensor)",
)
def _vq_linear_gradient(
    x: Tensor, codes: Tensor, codebooks: Tensor, grad: Tensor, of_x: bool, of_codebooks: bool
) -> tuple[Tensor, Tensor]:
    x, codebooks, grad = x.detach(), codebooks.detach(), grad.detach()
    if not _decodes(x, codebooks, cached=4, else_=32):
        gradients = quantize.vq_linear_gradient(x, codes, codebooks, grad, of_x=of_x, of_codebooks=of_codebooks)
        dx, dcodebooks = (x.new_empty(0) if g is None else g for g in gradients)  # an op returns tensors
        return dx, dcodebooks
    dx = x.new_zeros(x.shape if of_x else 0)
    dcodebooks = x.new_zeros(codebooks.shape if of_codebooks else 0)
    blocks = _blocks(codes, codebooks)
    for some, of_some in zip(blocks, grad.split(len(blocks[0]), 1), strict=True):
        if of_x:
            dx.addmm_(of_some, quantize.decode(some, codebooks))
        if of_codebooks:
            quantize.add_decode_gradient(of_some.T @ x, some, dcodebooks)
    return dx, dcodebooks


@_vq_linear_gradient.register_fake
def _(
    x: Tensor, codes: Tensor, codebooks: Tensor, grad: Tensor, of_x: bool, of_codebooks: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else 0), x.new_empty(codebooks.shape if of_codebooks else 0)


def _save_vq_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _vq_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, _, of_codebooks = ctx.needs_input_grad
    dx, dcodebooks = _vq_linear_gradient(*ctx.saved_tensors, grad, of_x, of_codebooks)
    return dx if of_x else None, None, dcodebooks if of_codebooks else None


_vq_linear.register_autograd(_vq_linear_backward, setup_context=_save_vq_linear)
in_float32(_vq_linear, _vq_linear_gradient)


def vq_linear(x: Tensor, codes: Tensor, codebooks: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiply by compressed weights without decompressing them: `polyvec.quantize.vq_linear` with gradients.

    Parameters
    ----------
    x : tensor of shape (..., d), float32
    codes : tensor of shape (outputs, code_size), uint8
        The rows of W, as `polyvec.quantize.ProductQuantizer.encode` writes them.
    codebooks : tensor of shape (m, 256 or 16, d / m), float32
    bias : tensor of shape (outputs,), optional

    Returns
    -------
    tensor of shape (..., outputs), float32
        x @ W.T + bias.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    TypeError
        Not tensors, or other dtypes.

    Notes
    -----
    Codes are fixed; x, codebooks and bias have gradients: fine-tuning of a compressed layer. For few rows, with g_c the
    sum of the gradients of the outputs whose code has codeword c in a subspace, dx = sum_c g_c c and dc = g_c x: n m
    outputs additions and 4 n k d flops for both, in a fixed order: the same bits for any number of threads. From 16
    rows on (gradients: 4), with codebooks over 1 MB from 64 (32), 8 MB of weights at a time are decoded for torch's
    matmul, and the gradients of the weights summed by codeword. First derivatives only. Runs in float32 under autocast.
    On a GPU products take the flops of a layer that is not compressed, without matmul.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> codebooks = torch.arange(32.0).view(1, 16, 2).requires_grad_()
    >>> y = pvt.vq_linear(torch.tensor([[1.0, 10.0]]), torch.tensor([[0], [3]], dtype=torch.uint8), codebooks)
    >>> y.sum().backward()
    >>> y.tolist(), codebooks.grad[0, 3].tolist()
    ([[10.0, 76.0]], [1.0, 10.0])
    """
    op = "torch.vq_linear"
    require_tensors(op, x=x, codes=codes, codebooks=codebooks)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape (..., d), got ()")
    y = _vq_linear(x.flatten(0, -2) if x.dim() > 1 else x[None], codes, codebooks)
    y = y.view(*x.shape[:-1], codes.shape[0])
    return y if bias is None else y + widened(bias)


class CodebookUsage(NamedTuple):
    """How much of a codebook is in use; a tuple with names.

    Parameters
    ----------
    utilization : scalar tensor, float32
        The fraction of the codewords that occur.
    perplexity : scalar tensor, float32
        exp(entropy) of the codewords' frequencies: K where all are equally frequent, 1 where one has everything.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> pvt.codebook_usage(torch.tensor([0, 0, 2, 2]), 4)
    CodebookUsage(utilization=tensor(0.5000), perplexity=tensor(2.))
    """

    utilization: Tensor
    perplexity: Tensor


def codebook_usage(ids: Tensor, k: int) -> CodebookUsage:
    """Measure how many of k codewords a batch uses, and how evenly: what tells a collapsed codebook.

    Parameters
    ----------
    ids : integer tensor of any shape
        Codewords, as `vq_assign` numbers them; -1, as a level that `ResidualVectorQuantizer` dropped has it, does not
        count.
    k : int
        Size of the codebook.

    Returns
    -------
    CodebookUsage
        `.utilization` in [0, 1] and `.perplexity` in [1, k]; 0 and 1 without ids.

    Raises
    ------
    IndexError
        Ids outside [-1, k), but on a GPU, where nothing waits for them, and in a compiled graph: there they do not
        count.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> usage = pvt.codebook_usage(torch.tensor([0, 1, 2, 3]), 4)
    >>> usage.utilization.item(), round(usage.perplexity.item(), 4)
    (1.0, 4.0)
    """
    op = "torch.codebook_usage"
    require_tensors(op, ids=ids)
    ids = ids.flatten().long()
    if not (ids.is_cuda or torch.compiler.is_compiling()):
        wrong = ids[(ids < -1) | (ids >= k)]
        if len(wrong):
            raise IndexError(f"{op}: ids must be in [-1, {k}), got {int(wrong[0])}")
    places = ids.new_zeros(k + 2).index_add_(0, ids.clamp(-1, k) + 1, torch.ones_like(ids))
    counts = places[1:-1].float()  # without those of ids that do not count
    frequencies = counts / counts.sum().clamp(min=1)
    return CodebookUsage((counts > 0).float().mean(), torch.special.entr(frequencies).sum().exp())
