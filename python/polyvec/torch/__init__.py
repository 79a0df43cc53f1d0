"""Differentiable hypercomplex operations and MaxSim scores for torch.

The functions are those of `polyvec.hypercomplex` and `polyvec.maxsim`, on tensors that may require grad. Each is a
`torch.library` custom op, which `torch.compile` keeps in its graph. Hypercomplex operations have gradients of any
order, for each backward is written with the same ops: the gradient of a product is a product with another table.
MaxSim has first derivatives.
"""

from polyvec.torch._hypercomplex import normalize, product, relation_query
from polyvec.torch._maxsim import maxsim, maxsim_pairs

__all__ = ["maxsim", "maxsim_pairs", "normalize", "product", "relation_query"]
