"""Sorting networks over tuples of tensors: a tuple's n tensors hold n keys of every token, and no key leaves its lane.

Where each thread owns a token, a compare-exchange is a handful of instructions on registers: no shuffle, no shared
memory, no branch. Batcher's odd-even merge (Knuth, TAOCP 3, 5.3.4) takes any two lengths, and what a caller slices off
the result, the compiler removes from the network: `merge(a, b)[:k]` pays for the k best alone.
"""

import triton
import triton.language as tl


@triton.jit
def exchange(a, b, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """The larger and the smaller of two int32 or int64 keys; with FP64, int64 keys are ordered as doubles.

    64-bit keys are exchanged in PTX on NVIDIA GPUs: compilers would turn it into a minimum and a maximum, and compare
    twice, unless they see halves. Doubles are compared by a unit of their own, while integers would wait for the one
    that moves the halves.

    Minima and maxima wait for each other, too. With `one`, int32 ones that the compiler does not know for ones, the
    smaller of two int32 keys is what the larger leaves of their sum, modulo 2**32: two multiply-adds, which have a unit
    of their own.
    """
    if NVIDIA and a.dtype == tl.int64:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .pred p;
            .reg .b32 al, ah, bl, bh, cl, ch, dl, dh;
            mov.b64 {{al, ah}}, $2;
            mov.b64 {{bl, bh}}, $3;
            setp.lt.{"f64" if FP64 else "s64"} p, $2, $3;
            selp.b32 cl, bl, al, p;
            selp.b32 ch, bh, ah, p;
            selp.b32 dl, al, bl, p;
            selp.b32 dh, ah, bh, p;
            mov.b64 $0, {{cl, ch}};
            mov.b64 $1, {{dl, dh}};
            }}""",
            "=&l,=&l,l,l", [a, b], (tl.int64, tl.int64), True, 1,
        )  # fmt: skip
    elif one is not None:
        larger = tl.maximum(a, b)
        smaller = tl.inline_asm_elementwise(
            """{
            .reg .b32 sum;
            mad.lo.s32 sum, $1, $4, $2;
            mul.lo.s32 sum, sum, $4;
            sub.s32 $0, sum, $3;
            }""",
            "=r,r,r,r,r", [a, b, larger, one], tl.int32, True, 1,
        )  # fmt: skip
        return larger, smaller
    else:
        return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def is_less(a, b, FP64: tl.constexpr):
    """Whether key a comes after key b; with FP64, int64 keys are ordered as doubles."""
    if FP64 and a.dtype == tl.int64:
        return a.to(tl.float64, bitcast=True) < b.to(tl.float64, bitcast=True)
    else:
        return a < b


@triton.jit
def merge(a, b, LENGTH: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """Merge two descending tuples into one.

    LENGTH is len(a): Triton 3.6 names a specialized function after the elements of its tuples but not after where one
    tuple ends, and would take two and two keys for three and one.
    """
    if len(a) == 0:
        return b
    elif len(b) == 0:
        return a
    elif len(a) + len(b) == 2:
        return exchange(a[0], b[0], NVIDIA, FP64, one)
    else:
        evens = merge(a[0::2], b[0::2], len(a[0::2]), NVIDIA, FP64, one)
        odds = merge(a[1::2], b[1::2], len(a[1::2]), NVIDIA, FP64, one)
        merged = evens[:1]
        for i in tl.static_range(len(odds)):
            if i + 1 < len(evens):
                merged = merged + exchange(evens[i + 1], odds[i], NVIDIA, FP64, one)
            else:
                merged = merged + odds[i:]
        return merged + evens[len(odds) + 1 :]


@triton.jit
def sort(keys, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """Sort a tuple, descending."""
    HALF: tl.constexpr = len(keys) // 2
    if HALF == 0:
        return keys
    else:
        first, second = sort(keys[:HALF], NVIDIA, FP64, one), sort(keys[HALF:], NVIDIA, FP64, one)
        return merge(first, second, HALF, NVIDIA, FP64, one)


@triton.jit
def best_of(a, b, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """The len(a) best of two descending tuples, len(b) <= len(a), in no order: the first step of a bitonic merge."""
    kept = a[: len(a) - len(b)]
    for i in tl.static_range(len(b)):
        kept = kept + (exchange(a[len(a) - len(b) + i], b[len(b) - 1 - i], NVIDIA, FP64, one)[0],)
    return kept


@triton.jit
def bitonic(keys, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """Sort, descending, a tuple that rises and then falls, or starts anywhere on such a circle; of a power of two."""
    HALF: tl.constexpr = len(keys) // 2
    if HALF == 0:
        return keys
    else:
        upper, lower = (), ()
        for i in tl.static_range(HALF):
            larger, smaller = exchange(keys[i], keys[i + HALF], NVIDIA, FP64, one)
            upper, lower = upper + (larger,), lower + (smaller,)
        return bitonic(upper, NVIDIA, FP64, one) + bitonic(lower, NVIDIA, FP64, one)


@triton.jit
def merge_best(a, b, K: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr, one=None):
    """The K best of two descending tuples, descending, K at most len(a), and len(b) no more."""
    if K == len(a) and K & (K - 1) == 0:
        return bitonic(best_of(a, b, NVIDIA, FP64, one), NVIDIA, FP64, one)
    else:
        return merge(a, b, len(a), NVIDIA, FP64, one)[:K]


@triton.jit
def settle(keys, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """Two steps of an odd-even transposition sort."""
    for first in tl.static_range(2):
        settled = keys[:first]
        for i in tl.static_range(first, len(keys) - 1, 2):
            settled = settled + exchange(keys[i], keys[i + 1], NVIDIA, FP64)
        keys = settled + keys[len(settled) :]
    return keys
