"""Order-preserving integer keys: sort one integer instead of a (score, index) pair.

A float's bits, with the magnitude bits of negative numbers flipped, order as a signed integer exactly as the floats do.
Writing the reversed index below them gives one 64-bit key whose plain integer maximum is the largest score and, among
equal scores, the lowest index: ties need no code of their own. (The trick is radix sort's; see D. Knuth, TAOCP 3,
5.2.5.)
"""

import triton
import triton.language as tl

from .ptx import copies, operands

LOWEST_KEY = tl.constexpr(-(1 << 63))  # below every packed key: what padding sorts as


@triton.jit
def float_to_key(value, PLAN=None):
    """fp32 -> int32 of the same order; -0.0 ties with 0.0, and NaN, whatever its sign, comes above +inf.

    An NVIDIA addition turns every NaN into 0x7FFFFFFF, which is already the key it needs. There it is written in PTX,
    since LLVM would gather the signs of many values bit by bit in a word.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    if PLAN is not None and PLAN.ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 sign; shr.s32 sign, $1, 31; and.b32 sign, sign, 0x7FFFFFFF; xor.b32 $0, $1, sign; }", "=r,r",
            [bits], tl.int32, True, 1,
        )  # fmt: skip
    else:
        return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def key_to_float(key):
    """The inverse of `float_to_key`; -0.0 comes back as 0.0."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def bit_length(number):
    """How many bits the numbers up to this one take."""
    return number.bit_length()


@triton.constexpr_function
def index_bits(KEY):
    """How many low bits of a key hold the index."""
    return KEY if isinstance(KEY, int) else 31 if KEY == tl.float32 else 16


@triton.jit
def pack(value, index, KEY=tl.float32, PLAN=None):
    """(fp32, int32 >= 0) -> a key whose order is value first, then the lower index.

    KEY says which: with tl.float32 an int64 key, for any value and index; with tl.bfloat16 or tl.float16 an int32 key,
    for values of that dtype and indices below 2**16; with a number an int32 key of a value's upper bits above an index
    of that many bits, for indices that fit.
    """
    MASK: tl.constexpr = (1 << index_bits(KEY)) - 1
    if KEY == tl.float32:
        return pack_wide(value, tl.zeros_like(value).to(tl.int32) + (MASK - index), PLAN)
    elif KEY == tl.float16:
        bits = (value + 0.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        key = bits ^ ((bits >> 31) & 0x7FFF0000)
        return (key if PLAN is not None and PLAN.ptx else tl.where(value == value, key, 0x7FFF0000)) | (MASK - index)
    else:
        return (float_to_key(value, PLAN) & ~MASK) | (MASK - index)


@triton.jit
def pack_tuple(values, index, KEY, PLAN):
    """The keys of a tuple of values whose indices count up from `index`."""
    if PLAN.ptx and KEY != tl.float32:
        COUNT: tl.constexpr = len(values)
        return tl.inline_asm_elementwise(
            _packing(COUNT, KEY), operands("=&r", COUNT) + "," + operands("f", COUNT) + ",r", values + (index,),
            copies(tl.int32, COUNT), True, 1,
        )  # fmt: skip
    else:
        return tl.tuple([pack(values[i], index + i, KEY, PLAN) for i in tl.tuple(range(len(values)))])


@triton.constexpr_function
def _packing(count, KEY):
    """PTX that packs `count` values into 32-bit keys; one operation, since a compiler takes time for each."""
    mask = (1 << index_bits(KEY)) - 1
    lines = []
    for i in range(count):
        bits = f"add.f32 bits, ${count + i}, 0f00000000;"
        if KEY == tl.float16:
            bits += " cvt.rn.f16.f32 half, bits; mov.b32 bits, {zero, half};"
        lines.append(f"""{bits} shr.s32 sign, bits, 31; and.b32 sign, sign, 0x7FFFFFFF; xor.b32 bits, bits, sign;
            and.b32 bits, bits, {~mask}; sub.s32 low, {mask - i}, ${2 * count}; or.b32 ${i}, bits, low;""")
    declared = ".reg .b16 zero, half; .reg .b32 bits, sign, low; mov.b16 zero, 0;"
    return " ".join(["{", declared, *lines, "}"])


@triton.jit
def unpack(key, KEY=tl.float32, PLAN=None):
    """The inverse of `pack`."""
    MASK: tl.constexpr = (1 << index_bits(KEY)) - 1
    if KEY == tl.float32:
        value, low = unpack_wide(key, PLAN)
        return value, MASK - low
    elif KEY == tl.float16:
        half = ((key ^ ((key >> 31) & 0x7FFF0000)) >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32), MASK - (key & MASK)
    else:
        high = key & ~MASK
        value = (high ^ ((high >> 31) & (0x7FFFFFFF & ~MASK))).to(tl.float32, bitcast=True)
        return value, MASK - (key & MASK)


@triton.jit
def pack_wide(value, low, PLAN):
    """An fp32 value above 32 bits, without a sign, that order equals, as one int64 key.

    Where the plan says doubles, the keys order as such. The value's pattern is a double's high word, which orders by
    sign and magnitude as fp32 does. So negative keys turn the low word around, and NaN becomes a number as a double.
    """
    if PLAN is not None and PLAN.doubles and PLAN.itemsize == 4:
        # One operation, since a compiler takes time for each.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 bits, low, sign;
            add.f32 bits, $1, 0f00000000; min.s32 bits, bits, 0x7FEFFFFF;
            shr.s32 sign, bits, 31; xor.b32 low, $2, sign; mov.b64 $0, {low, bits}; }""",
            "=l,f,r", [value, low], tl.int64, True, 1,
        )  # fmt: skip
    elif PLAN is not None and PLAN.doubles:
        bits = tl.minimum((value + 0.0).to(tl.int32, bitcast=True), 0x7FEFFFFF)
        low = low ^ (bits >> 31)
        return (bits.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        return (float_to_key(value, PLAN).to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def unpack_wide(key, PLAN):
    """The inverse of `pack_wide`."""
    if PLAN is not None and PLAN.doubles and PLAN.itemsize == 4:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 sign; mov.b64 {$1, $0}, $2; shr.s32 sign, $0, 31; xor.b32 $1, $1, sign; }",
            "=&f,=&r,l", [key], (tl.float32, tl.int32), True, 1,
        )  # fmt: skip
    high, low = (key >> 32).to(tl.int32), key.to(tl.int32)
    if PLAN is not None and PLAN.doubles:
        return high.to(tl.float32, bitcast=True), low ^ (high >> 31)
    else:
        return key_to_float(high), low


@triton.jit
def lowest(like, PLAN):
    """A key below all others, of the type of `like`."""
    if like.dtype == tl.int32:
        return tl.full(like.shape, -(1 << 31) + (1 << 16), tl.int32)  # stays lowest when shifted
    elif PLAN.doubles:
        return tl.full(like.shape, -0x0010000100000000, tl.int64)  # the least double that is finite
    else:
        return tl.full(like.shape, -(1 << 63) + (1 << 32), tl.int64)
