"""Kernels for vectors with structure: token sets, hypercomplex embeddings, codes and graphs.

Four moves, and every module is one of them: compose structured things into vectors (`hypercomplex`, `fde`), compress
vectors (`quantize`), search them (`scan`, `hnsw`), rescore exactly (`maxsim`). `retrieve` strings them together.
"""

from __future__ import annotations

__version__ = "0.1.0"

from polyvec import fde, hnsw, hypercomplex, maxsim, quantize, retrieve, scan
from polyvec._block_sparse import BlockSparse
from polyvec._errors import CudaError, FormatError
from polyvec._ragged import Ragged
from polyvec._runtime import runtime_info
from polyvec._threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "BlockSparse",
    "CudaError",
    "FormatError",
    "Ragged",
    "__version__",
    "fde",
    "get_num_threads",
    "hnsw",
    "hypercomplex",
    "maxsim",
    "num_threads",
    "quantize",
    "retrieve",
    "runtime_info",
    "scan",
    "set_num_threads",
]
