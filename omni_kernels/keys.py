"""Order-preserving integer keys: sort one integer instead of a (score, index) pair.

A float's bits, with the magnitude bits of negative numbers flipped, order as a signed integer exactly as the floats do.
Writing the reversed index below them gives one 64-bit key whose plain integer maximum is the largest score and, among
equal scores, the lowest index: ties need no code of their own. (The trick is radix sort's; see D. Knuth, TAOCP 3,
5.2.5.)
"""

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(1 << 63))  # below every packed key: what padding sorts as


@triton.jit
def float_to_key(value, NVIDIA: tl.constexpr = False):
    """fp32 -> int32 of the same order; -0.0 ties with 0.0, and NaN, whatever its sign, comes above +inf.

    An NVIDIA addition turns every NaN into 0x7FFFFFFF, which is already the key it needs.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key if NVIDIA else tl.where(value == value, key, 0x7FFFFFFF)


@triton.jit
def key_to_float(key):
    """The inverse of `float_to_key`; -0.0 comes back as 0.0."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(value, index):
    """(fp32, int32 >= 0) -> int64 whose order is value first, then the lower index."""
    return (float_to_key(value).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def unpack(packed):
    """The inverse of `pack`."""
    return key_to_float((packed >> 32).to(tl.int32)), 0x7FFFFFFF - packed.to(tl.int32)
