"""Tokens in fewer bits: what stored rows stand for, and what queries are rounded to when they are scored."""

import numpy as np


def int8(x):
    """Codes in [-127, 127] and a scale for each row: 127 steps of the row's largest element."""
    largest = np.abs(x).max(axis=1, initial=0)
    steps = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(x * steps[:, None]).astype(np.int64), (largest / np.float32(127)).astype(np.float32)


def rounded_queries(x):
    codes, scales = int8(x)
    return codes * scales[:, None].astype(np.float64)


def bfloat16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def decoded(x, dtype):
    """The tokens that `pack(x, dtype)` stores."""
    if dtype == "bfloat16":
        return bfloat16(x)
    if dtype == "int8":
        return rounded_queries(x)
    return x.astype(dtype)


def residual_bytes(codes, bits):
    """Pack codes (T, d) as ColBERTv2 does: bits of a code lowest first, into bytes from the highest bit on."""
    each = codes[:, :, None] >> np.arange(bits) & 1
    return np.packbits(each.reshape(len(codes), -1).astype(np.uint8), axis=1)


def rounded_weights(weights):
    unit = np.abs(weights).max() / np.float32(127)
    return np.rint(weights / unit) * np.float64(unit)
