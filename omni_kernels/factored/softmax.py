"""What becomes of the scores of chosen experts: probabilities, or their logarithms, from numbers at hand.

The sum of exp(x[i] + y[j]) over all N² experts is the product of two sums over rows. So the softmax over all experts
takes two numbers a token, each row's largest logit and its sum of exp(logit - largest), from rows that a kernel has
read anyway. exp makes a relative error of an absolute one. So the difference of a pair's sum from the best one is kept
with what rounding took from it, as `high` and `low`, and exp of it goes by way of 2**n.

exp of a logit - largest is exp2(logit * slope - origin), one multiply-add and one special function. Rounding the origin
moves all exponents of a row alike; a correction of their sum takes that back. Where logits are so large that it moved
them out of fp32's range, the slope is 1, which rounds nothing.
"""

import triton
import triton.language as tl

from . import ptx

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)  # few bits, so that n times it is exact
ROUNDS = tl.constexpr(1.5 * 2.0**23)  # added and subtracted again, leaves an integer
HUGE = tl.constexpr(2.0**30)  # the next logit below is 64 less: its power is nothing beside 1
UP = tl.constexpr(2.0**64)  # keeps what becomes subnormal above that until the last multiplication
ONE = tl.constexpr(2.0**40)  # of a power as an integer: integers add up to the same in any order
LEAST = tl.constexpr(-104.0)  # whose exp rounds to 0
FAR = tl.constexpr(-16.0)  # below, a rounding of the logarithm shows in a probability
BLOCK = tl.constexpr(128)  # bytes whose powers are added up in a tree


# Exact sums -----------------------------------------------------------------------------------------------------------


@triton.jit
def exact_sum(a, b):
    """a + b in fp32, and what rounding took from it (Knuth, TAOCP 2, 4.2.2): nothing from what is infinite."""
    high = a + b
    part = high - a
    low = (a - (high - part)) + (b - part)
    return high, tl.where(low == low, low, 0.0)


@triton.jit
def ratio_of_pair(x, y, best_x, best_y):
    """The logarithm (high, low) of what exp of a pair's sum is to that of the best pair."""
    high_x, low_x = exact_sum(x, -origin_of_row(best_x))
    high_y, low_y = exact_sum(y, -origin_of_row(best_y))
    total, low = exact_sum(high_x, high_y)
    high, low = exact_sum(total, low + (low_x + low_y))
    return high, tl.where((high < FAR) & (high > LEAST), low, 0.0)


@triton.jit
def origin_of_row(best):
    """What is subtracted from the logits of a row: the largest, but 0 where all are masked."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def differences(sums, best):
    """The ratios of a tuple of sums that are exact: tuples of high and of low, where no high is FAR."""
    return tl.tuple([total - best for total in sums]), (tl.zeros_like(best),) * len(sums)


# Scores ---------------------------------------------------------------------------------------------------------------


@triton.jit
def scales_of_scores(total, best, best_x, best_y, PLAN):
    """What `normalized` wants to know of a token, from the total of its ratios, the sum of the best of all its pairs,
    and both logits of the pair that ratios are to. If one of them is -inf, a row is masked altogether."""
    masked = (best < float("inf")) & ((best_x == float("-inf")) | (best_y == float("-inf")))
    if PLAN.normalize == "log_softmax":
        # Of a number: for others log2 has a branch of its own, where lanes would part.
        log = tl.log2(tl.where(total == total, total, 1.0)) * LN2 + (total - total)
        return tl.where(masked, float("-inf"), -log), log
    else:
        total = tl.where(masked, 1.0, total)
        if PLAN.normalize == "topk":
            total = tl.where(best < float("inf"), total, float("nan"))
        return UP / total, tl.where(masked, 0.0, tl.where(total == total, 1.0 / UP, float("nan")))


@triton.jit
def normalized(high, low, scales, PLAN):
    """The score of a pair from its ratio to the best."""
    if PLAN.normalize == "log_softmax":
        return (high + scales[0]) + low
    else:
        return _exp(high, low, scales[0], scales[1])


@triton.jit
def _exp(high, low, up, down):
    """exp(high + low) * up * down, rounded once where it is subnormal; up is at least 2**33, and NaN shows in down."""
    high = tl.maximum(high, LEAST)
    shifted = tl.fma(high, LOG2E, ROUNDS)  # an integer n in its last bits
    n = shifted - ROUNDS
    rest = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, high)) + low
    power = tl.exp2(rest * LOG2E) * up
    return (power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(
        tl.float32, bitcast=True
    ) * down


@triton.jit
def as_integer(high, low):
    """exp of a ratio, for `total_of_integers`."""
    return _exp(high, low, tl.zeros_like(high) + UP, ONE / UP).to(tl.int64)


@triton.jit
def total_of_integers(integers):
    return integers.to(tl.float32) * (1.0 / ONE)


# Sums over rows -------------------------------------------------------------------------------------------------------


@triton.jit
def _scale_of_row(best):
    """slope and origin of the powers of a row whose largest logit is `best`, and the correction of their sum."""
    best = origin_of_row(best)
    slope = tl.where(tl.abs(best) < HUGE, LOG2E, 1.0)
    origin = best * slope
    return slope, origin, tl.exp2(-tl.fma(best, slope, -origin))


@triton.jit
def total_of_tile(row, BYTES, skip, best, num_tokens, PLAN):
    """The sum of exp(logit - best) over the logits at an address but the first `skip`.

    row: int32, in shared memory, or int64, in global memory; in vectors of the plan.
    """
    STEP: tl.constexpr = min(BYTES & -BYTES, BLOCK)
    slope, origin, correction = _scale_of_row(best)
    if STEP == BYTES:
        total = _powers(row, STEP, skip, slope, origin, PLAN)
    else:
        total, rest = tl.zeros_like(best), tl.zeros_like(best)
        # A compiler that knew how often the loop runs would write it out.
        for start in tl.range(0, tl.minimum(num_tokens, 1).to(tl.int32) * BYTES, STEP):
            first = ptx.hide(skip * 0 + start)
            part = _powers(row + first, STEP, skip - first // PLAN.itemsize, slope, origin, PLAN)
            total, rest = add_exactly(total, rest, part)
    return total * correction


@triton.jit
def _powers(address, BYTES, skip, slope, origin, PLAN):
    """The sum of exp2(logit * slope - origin) of a block, but of the first `skip`."""
    return tl.inline_asm_elementwise(
        _block(BYTES, address.dtype, PLAN), "=f,f,f,r," + ptx.register(address.dtype.primitive_bitwidth),
        [slope, -origin, skip, address], tl.float32, False, 1,
    )  # fmt: skip


@triton.jit
def add_exactly(total, rest, part):
    """total + part, with what rounding took from the total before, and takes now (Kahan, 1965)."""
    part -= rest
    more = total + part
    return more, (more - total) - part


@triton.constexpr_function
def _block(size, address, plan):
    """PTX that adds up exp2(logit * $1 + $2) of `size` bytes of logits at $4, but the first $3."""
    space, vector = ptx.space_of(address), min(size, plan.vector)
    lines, values = [], []
    for start in range(0, size, vector):
        words = [f"word{start // 4 + i}" for i in range(vector // 4)]
        kind, names = ptx.vector(words)
        lines.append(f"ld.{space}.{kind} {names}, [$4+{start}];")
        for word in words:
            for half in range(4 // plan.itemsize):
                value = f"value{len(values)}"
                if plan.itemsize == 4:
                    lines.append(f"mov.b32 {value}, {word};")
                elif plan.element_ty == tl.bfloat16:
                    lines.append(f"and.b32 bits, {word}, 0xFFFF0000;" if half else f"shl.b32 bits, {word}, 16;")
                    lines.append(f"mov.b32 {value}, bits;")
                else:
                    lines.append(f"mov.b32 {{low, high}}, {word}; cvt.f32.f16 {value}, {'high' if half else 'low'};")
                lines.append(f"fma.rn.f32 {value}, {value}, $1, $2; ex2.approx.ftz.f32 {value}, {value};")
                if plan.ragged:
                    lines.append(f"setp.gt.s32 p, $3, {len(values)}; selp.f32 {value}, 0f00000000, {value}, p;")
                values.append(value)
    while len(values) > 1:  # a tree
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        lines += [f"add.f32 {pair[0]}, {pair[0]}, {pair[1]};" for pair in pairs if len(pair) == 2]
        values = [pair[0] for pair in pairs]
    declared = f".reg .pred p; .reg .b16 low, high; .reg .b32 bits, word<{size // 4}>;"
    declared += f" .reg .f32 value<{size // plan.itemsize}>;"
    return " ".join(["{", declared, *lines, f"mov.f32 $0, {values[0]};", "}"])


@triton.jit
def total_of_strided_segment(row_ptrs, stride_n, first_column, COUNT, skip, best, PLAN):
    """`total_of_tile` of columns that are read one by one."""
    origin = origin_of_row(best)
    total, rest = tl.zeros_like(best), tl.zeros_like(best)
    for column in tl.range(COUNT):
        value = ptx.load_value(row_ptrs + (first_column + column).to(tl.int64) * stride_n, PLAN)
        power = tl.where(column < skip, 0.0, tl.exp2((value - origin) * LOG2E))
        total, rest = add_exactly(total, rest, power)
    return total


@triton.jit
def joined(best, total, other_best, other_total):
    """The largest logit of two parts of a row and the sum of exp(logit - largest), from those of each."""
    largest = tl.maximum(best, other_best, propagate_nan=tl.PropagateNan.ALL)
    return largest, moved(total, best, largest) + moved(other_total, other_best, largest)


@triton.jit
def moved(total, best, largest):
    """A sum of exp(logit - best) as one of exp(logit - largest)."""
    return total * tl.exp2(tl.where(best == largest, 0.0, best - largest) * LOG2E)
