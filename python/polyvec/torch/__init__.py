"""polyvec's operations as differentiable torch functions.

`product`, `normalize`, `relation_query`, `maxsim` and `maxsim_pairs` are those of `polyvec.hypercomplex` and
`polyvec.maxsim` on tensors that may require grad; `vq_assign` is `polyvec.scan.nearest` with the gradients of learned
quantisation. Each is a `torch.library` custom op, or torch code around one, which `torch.compile` keeps in its graph.
Hypercomplex operations have gradients of any order, for each backward is written with the same ops: the gradient of a
product is a product with another table. MaxSim has first derivatives. Under autocast all of them run in float32.
"""

from polyvec.torch._hypercomplex import normalize, product, relation_query
from polyvec.torch._maxsim import maxsim, maxsim_pairs
from polyvec.torch._quantize import Assignment, CodebookUsage, codebook_usage, vq_assign

__all__ = [
    "Assignment",
    "CodebookUsage",
    "codebook_usage",
    "maxsim",
    "maxsim_pairs",
    "normalize",
    "product",
    "relation_query",
    "vq_assign",
]
