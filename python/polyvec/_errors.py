"""Exception types that have no equal among Python's own."""


class FormatError(ValueError):
    """A file that polyvec cannot read: damaged, truncated, not polyvec's, or of a newer format."""


class CudaError(RuntimeError):
    """A CUDA launch or run-time failure; the text names the function and CUDA's own error."""
