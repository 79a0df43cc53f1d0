"""Learned quantisation: assignment to codewords with the gradients of training."""

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.library import custom_op

from polyvec import scan
from polyvec.torch._tensors import require_tensors, widened


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
    require_tensors(op, x=x, codebook=codebook)
    if x.dim() == 0 or codebook.dim() != 2 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{op}: x must have shape (..., d) and codebook (K, d), got {tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    x, codebook = widened(x), widened(codebook)
    ids = _nearest(x.detach().flatten(0, -2) if x.dim() > 1 else x.detach()[None], codebook.detach(), metric)
    ids = ids.view(x.shape[:-1])
    codewords = functional.embedding(ids, codebook)
    return Assignment(codewords + (x - x.detach()), ids)  # x - x is 0: the bits are those of the codebook


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
        Codewords, as `vq_assign` numbers them.
    k : int
        Size of the codebook.

    Returns
    -------
    CodebookUsage
        `.utilization` in [0, 1] and `.perplexity` in [1, k]; 0 and 1 without ids.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> usage = pvt.codebook_usage(torch.tensor([0, 1, 2, 3]), 4)
    >>> usage.utilization.item(), round(usage.perplexity.item(), 4)
    (1.0, 4.0)
    """
    require_tensors("torch.codebook_usage", ids=ids)
    counts = torch.bincount(ids.flatten(), minlength=k).float()
    frequencies = counts / counts.sum().clamp(min=1)
    return CodebookUsage((counts > 0).float().mean(), torch.special.entr(frequencies).sum().exp())
