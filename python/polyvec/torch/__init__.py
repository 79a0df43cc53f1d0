"""polyvec's operations as differentiable torch functions.

`product`, `normalize`, `relation_query`, `maxsim`, `maxsim_pairs`, `pool`, `score_pairs` and `logsumexp` are those of
`polyvec.hypercomplex`, `polyvec.maxsim` and `polyvec.scan` on tensors that may require grad; `vq_assign` and
`soft_assign` are learned quantisation, `vq_linear` is a layer of compressed weights. Each is a `torch.library` custom
op, or torch code around one, which `torch.compile` keeps in its graph. Hypercomplex operations, `pool` and
`score_pairs` have gradients of any order, for each backward is written with the same ops, or torch's: the gradient of a
product is a product with another table. MaxSim, log-sum-exp, soft assignment and `vq_linear` have first derivatives.
Forward-mode derivatives (`torch.func.jvp`, dual tensors) are refused, but by `vq_assign`. Under autocast all of them
run in float32, but MaxSim on a GPU in the dtype of autocast. `VectorQuantizer`, `ResidualVectorQuantizer`,
`MaxSimLoss`, `MaxSimDistillationLoss` and `RelationScorer` are modules around them.
"""

from polyvec.torch._hypercomplex import normalize, product, relation_query
from polyvec.torch._maxsim import maxsim, maxsim_pairs, pool
from polyvec.torch._modules import (
    MaxSimDistillationLoss,
    MaxSimLoss,
    RelationScorer,
    ResidualVectorQuantizer,
    VectorQuantizer,
)
from polyvec.torch._quantize import Assignment, CodebookUsage, codebook_usage, soft_assign, vq_assign, vq_linear
from polyvec.torch._scan import logsumexp, score_pairs

__all__ = [
    "Assignment",
    "CodebookUsage",
    "MaxSimDistillationLoss",
    "MaxSimLoss",
    "RelationScorer",
    "ResidualVectorQuantizer",
    "VectorQuantizer",
    "codebook_usage",
    "logsumexp",
    "maxsim",
    "maxsim_pairs",
    "normalize",
    "pool",
    "product",
    "relation_query",
    "score_pairs",
    "soft_assign",
    "vq_assign",
    "vq_linear",
]
