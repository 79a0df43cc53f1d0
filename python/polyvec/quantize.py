"""Compression: k-means clustering, codecs that turn vectors into a few bytes each, and products with their codes.

A codec is fitted to a sample of vectors, encodes vectors into uint8 codes, decodes them, and searches codes without
decoding them. Codes belong to the codec that made them; they are plain arrays and are kept, sliced and saved as such.
All have `fit`, `encode`, `decode`, `pack`, `search`, `code_size`, `nbytes`, `save`, `load`, `state` and `from_state`.
"""

from __future__ import annotations

from polyvec._clusters import KMeansSetsResult, kmeans_sets
from polyvec._codec import PackedCodes
from polyvec._codes import RaBitQ, ScalarQuantizer
from polyvec._kmeans import KMeansResult, KMeansSelection, kmeans, kmeans_select
from polyvec._product_quantizer import ProductQuantizer
from polyvec._refined import CertifiedResult, Refined, RefinedCodes
from polyvec._residual_quantizer import ResidualQuantizer
from polyvec._soft_assign import soft_assign as soft_assign
from polyvec._soft_assign import soft_assign_gradient as soft_assign_gradient
from polyvec._vq_linear import add_decode_gradient as add_decode_gradient
from polyvec._vq_linear import decode as decode
from polyvec._vq_linear import vq_linear
from polyvec._vq_linear import vq_linear_gradient as vq_linear_gradient

__all__ = [
    "CertifiedResult",
    "KMeansResult",
    "KMeansSelection",
    "KMeansSetsResult",
    "PackedCodes",
    "ProductQuantizer",
    "RaBitQ",
    "Refined",
    "RefinedCodes",
    "ResidualQuantizer",
    "ScalarQuantizer",
    "kmeans",
    "kmeans_select",
    "kmeans_sets",
    "vq_linear",
]
