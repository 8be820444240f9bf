"""Sorting networks over tuples of tensors: a tuple's n tensors hold n keys of every token, and no key leaves its lane.

Where each thread owns a token, a compare-exchange is a handful of instructions on registers: no shuffle, no shared
memory, no branch. A network is a list of comparators (i, j), which leave the larger of two keys on wire i and the
smaller on wire j. Batcher's odd-even merge (Knuth, TAOCP 3, 5.3.4) takes any two lengths. What nobody asks for is left
out: the k best of a merge cost less than all of it.

For compilers a whole network is one operation, written in PTX. Of its minima and maxima one by one, Python would build
the intermediate representation for seconds, and LLVM look for something to simplify for seconds more.
"""

import triton
import triton.language as tl

from .ptx import copies, operands


@triton.constexpr_function
def _merge(a, b):
    """A network that merges two descending lists of wires, and the list that it leaves."""
    if not a or not b:
        return [], a + b
    if len(a) + len(b) == 2:
        return [(a[0], b[0])], a + b
    first, evens = _merge(a[0::2], b[0::2])
    second, odds = _merge(a[1::2], b[1::2])
    last = list(zip(evens[1:], odds, strict=False))
    merged = [evens[0], *(wire for pair in last for wire in pair), *evens[len(last) + 1 :], *odds[len(last) :]]
    return first + second + last, merged


@triton.constexpr_function
def _sort(wires):
    """A network that sorts a list of wires, and the list that it leaves."""
    if len(wires) == 1:
        return [], wires
    first, a = _sort(wires[: len(wires) // 2])
    second, b = _sort(wires[len(wires) // 2 :])
    last, merged = _merge(a, b)
    return first + second + last, merged


@triton.constexpr_function
def _bitonic(wires):
    """A network for wires that rise and then fall, or start anywhere on such a circle; of a power of two."""
    if len(wires) == 1:
        return []
    upper, lower = wires[: len(wires) // 2], wires[len(wires) // 2 :]
    return [*zip(upper, lower, strict=True), *_bitonic(upper), *_bitonic(lower)]


@triton.constexpr_function
def _network(kind, count, first, k):
    """The comparators that it takes to get the k best of `count` keys, and the wires where those are then.

    Keys to merge, or to take the best of, are a list of the `first` ones and one of the rest.
    """
    wires = list(range(count))
    comparators, outputs = [], wires
    if kind == "sort":
        comparators, outputs = _sort(wires)
    elif kind == "merge":
        comparators, outputs = _merge(wires[:first], wires[first:])
    elif kind == "bitonic":
        comparators = _bitonic(wires)
    elif kind == "best of":
        comparators = list(zip(wires[2 * first - count : first], reversed(wires[first:]), strict=True))
    elif kind == "settle":
        comparators = [*zip(wires[0::2], wires[1::2], strict=False), *zip(wires[1::2], wires[2::2], strict=False)]
    needed, wanted = [], set(outputs[:k])
    for pair in comparators[::-1]:
        if wanted.intersection(pair):
            needed.append(pair)
            wanted.update(pair)
    return needed[::-1], outputs[:k]


@triton.constexpr_function
def _ptx(kind, count, first, k, key, added):
    """A network in PTX, for keys that order as a PTX type says.

    64-bit keys are exchanged by halves. Doubles are compared by a unit of their own, while integers would wait for the
    one that moves the halves. Minima and maxima wait for each other, too: if added, with one more operand, int32 ones
    that the compiler does not know for ones, the smaller of two keys is what the larger leaves of their sum, modulo
    2**32: two multiply-adds, which have a unit of their own. One in seven stays a minimum, or that unit would be the
    one to wait for.
    """
    comparators, outputs = _network(kind, count, first, k)
    keys, one = [f"${k + wire}" for wire in range(count)], f"${k + count}"
    bits = key[1:]
    lines = []
    for i, j in comparators:
        a, b = keys[i], keys[j]
        larger, smaller = f"larger{len(lines)}", f"smaller{len(lines)}"
        if bits == "64":
            lines.append(f"""{{
            .reg .pred less;
            .reg .b32 a_low, a_high, b_low, b_high, low, high;
            mov.b64 {{a_low, a_high}}, {a};
            mov.b64 {{b_low, b_high}}, {b};
            setp.lt.{key} less, {a}, {b};
            selp.b32 low, b_low, a_low, less;
            selp.b32 high, b_high, a_high, less;
            mov.b64 {larger}, {{low, high}};
            selp.b32 low, a_low, b_low, less;
            selp.b32 high, a_high, b_high, less;
            mov.b64 {smaller}, {{low, high}};
            }}""")
        elif added and len(lines) % 7 < 6:
            lines.append(f"""{{
            .reg .b32 sum;
            max.s32 {larger}, {a}, {b};
            mad.lo.s32 sum, {a}, {one}, {b};
            mul.lo.s32 sum, sum, {one};
            sub.s32 {smaller}, sum, {larger};
            }}""")
        else:
            lines.append(f"max.s32 {larger}, {a}, {b}; min.s32 {smaller}, {a}, {b};")
        keys[i], keys[j] = larger, smaller
    declared = f".reg .b{bits} larger<{len(lines) + 1}>, smaller<{len(lines) + 1}>;"
    copied = [f"mov.b{bits} ${rank}, {keys[wire]};" for rank, wire in enumerate(outputs)]
    return " ".join(["{", declared, *lines, *copied, "}"])


@triton.constexpr_function
def _comparisons(count, key):
    """PTX that sets $0 to 1 where a key, from $1 on, is less than the next, in one instruction a pair.

    LLVM would gather the answers bit by bit in a word.
    """
    pairs = (f"setp.lt.or.{key} less, ${i}, ${i + 1}, less;" for i in range(1, count))
    return f"{{ .reg .pred less; setp.ne.s32 less, 0, 0; {' '.join(pairs)} selp.b32 $0, 1, 0, less; }}"


@triton.constexpr_function
def _key_type(dtype, plan):
    return "s32" if dtype == tl.int32 else "f64" if plan.doubles else "s64"


@triton.constexpr_function
def _registers(key, count, of=""):
    """The constraints of `count` operands of a PTX type."""
    return operands(of + ("r" if key == "s32" else "l"), count)


@triton.jit
def _run(keys, KIND, FIRST, K, PLAN, one):
    """The K best keys of a tuple, as a network of that kind leaves them; all if there are no more."""
    # `one` is None or the operand of ones, where the smaller keys come from a sum.
    COUNT: tl.constexpr = len(keys)
    RANKS: tl.constexpr = min(K, COUNT)
    if PLAN.ptx:
        KEY: tl.constexpr = _key_type(keys[0].dtype, PLAN)
        ADDED: tl.constexpr = one is not None and KEY == "s32"
        return tl.inline_asm_elementwise(
            _ptx(KIND, COUNT, FIRST, RANKS, KEY, ADDED),
            _registers(KEY, RANKS, "=") + "," + _registers(KEY, COUNT + (1 if ADDED else 0)),
            keys + (one,) if ADDED else keys, copies(keys[0].dtype, RANKS), True, 1,
        )  # fmt: skip
    else:
        comparators, outputs = _network(KIND, COUNT, FIRST, RANKS)
        keys = list(keys)
        for i, j in comparators:
            larger, smaller = tl.maximum(keys[i], keys[j]), tl.minimum(keys[i], keys[j])
            keys[i], keys[j] = larger, smaller
        return tl.tuple([keys[wire] for wire in outputs])


@triton.jit
def is_less(a, b, PLAN):
    """Whether key a comes after key b; int64 keys are ordered as doubles where the plan says so."""
    if PLAN.doubles and a.dtype == tl.int64:
        return a.to(tl.float64, bitcast=True) < b.to(tl.float64, bitcast=True)
    else:
        return a < b


@triton.jit
def is_turned(keys, PLAN):
    """1 where a key of a tuple comes after the one behind it, else 0."""
    if PLAN.ptx:
        KEY: tl.constexpr = _key_type(keys[0].dtype, PLAN)
        return tl.inline_asm_elementwise(
            _comparisons(len(keys), KEY), "=r," + _registers(KEY, len(keys)), keys, tl.int32, True, 1
        )
    else:
        turned = tl.zeros_like(keys[0]).to(tl.int32)
        for i in tl.static_range(1, len(keys)):
            turned = turned | is_less(keys[i - 1], keys[i], PLAN).to(tl.int32)
        return turned


@triton.jit
def sort(keys, K, PLAN, one=None):
    """The K best of a tuple, descending."""
    return _run(keys, "sort", 0, K, PLAN, one)


@triton.jit
def merge(keys, FIRST, K, PLAN, one=None):
    """The K best of two descending tuples, one of FIRST keys and what is behind it, descending."""
    return _run(keys, "merge", FIRST, K, PLAN, one)


@triton.jit
def best_of(keys, FIRST, PLAN, one=None):
    """The FIRST best of two descending tuples, one of FIRST keys and one of no more behind it, in no order but ready
    for `bitonic`."""
    return _run(keys, "best of", FIRST, FIRST, PLAN, one)


@triton.jit
def bitonic(keys, PLAN, one=None):
    """Sort, descending, a tuple that rises and then falls, or starts anywhere on such a circle; of a power of two."""
    return _run(keys, "bitonic", 0, len(keys), PLAN, one)


@triton.jit
def merge_best(keys, FIRST, K, PLAN, one=None):
    """As `merge`, of tuples of which the one behind is no longer; of K comparators a step where K allows."""
    if K == FIRST and K & (K - 1) == 0:
        return bitonic(best_of(keys, FIRST, PLAN, one), PLAN, one)
    else:
        return merge(keys, FIRST, K, PLAN, one)


@triton.jit
def settle(keys, PLAN):
    """Two steps of an odd-even transposition sort."""
    return _run(keys, "settle", 0, len(keys), PLAN, None)


@triton.jit
def pile_up(keys, least, top, STEP, PLAN):
    """Put the keys above `least` on a pile in shared memory, STEP bytes apart. It ends at `top`, and at the result."""
    KEY: tl.constexpr = _key_type(keys[0].dtype, PLAN)
    return tl.inline_asm_elementwise(
        _piling(len(keys), KEY, STEP), "=&r,r," + _registers(KEY, len(keys) + 1), (top, least) + keys, tl.int32, False,
        1,
    )  # fmt: skip


@triton.constexpr_function
def _piling(count, key, step):
    """PTX that puts those of the keys from $3 on that are above $2 on a pile that ends at $1, and at $0 then."""
    stores = (
        f"setp.gt.{key} p, ${3 + i}, $2; @p st.shared.b{key[1:]} [$0], ${3 + i}; @p add.s32 $0, $0, {step};"
        for i in range(count)
    )
    return " ".join(["{ .reg .pred p; mov.b32 $0, $1;", *stores, "}"])


@triton.jit
def taken(start, height, COUNT, STEP, least, PLAN):
    """A tuple of COUNT keys from a pile, of which `height` are there; the others are `least`."""
    KEY: tl.constexpr = _key_type(least.dtype, PLAN)
    return tl.inline_asm_elementwise(
        _taking(COUNT, KEY, STEP), _registers(KEY, COUNT, "=&") + ",r,r," + _registers(KEY, 1), (start, height, least),
        copies(least.dtype, COUNT), False, 1,
    )  # fmt: skip


@triton.constexpr_function
def _taking(count, key, step):
    """PTX that loads keys from a pile at $count, as many as the operand behind it says; others are the last operand."""
    bits = key[1:]
    loads = (
        f"setp.gt.s32 p, ${count + 1}, {i}; mov.b{bits} ${i}, ${count + 2};"
        f"@p ld.shared.b{bits} ${i}, [${count}+{step * i}];"
        for i in range(count)
    )
    return " ".join(["{ .reg .pred p;", *loads, "}"])
