"""The k best pairs of the two lists of a token, whose two lanes search half of the staircase each (reference.py).

The even lane has the list of x and takes the pairs whose rank in x is at most their rank in y, the odd lane has that of
y and takes the others. The key of a pair is (sum, row, rank of the column), in 32 bits if the low bits of the sums are
zeros, as sums of bf16 logits have them, else in 64. Pairs of one row are sorted by this key as they come, even where
rounding makes different sums equal, and so the merges never disagree with a full sort. Pairs of one column are sorted
too, unless such a rounding tie turns two of them around; then they are sorted again.
"""

import triton
import triton.language as tl

from .keys import bit_length, float_to_key, lowest, pack_wide, unpack, unpack_wide
from .networks import best_of, bitonic, is_less, is_turned, merge, settle
from .ptx import load, load_value, partners, store_row


@triton.constexpr_function
def first_pair(rank, plan):
    """How many pairs the rows before `rank` have in a lane's half of the staircase: row a pairs with a, a + 1, ..."""
    return sum(max(0, min(plan.k // (row + 1), plan.ranks) - row) for row in range(rank))


@triton.jit
def _half_staircase(values, ids, other_values, other_ids, odd, ID_BITS, PLAN, one):
    """The keys of the best pairs in this lane's half of the staircase, descending, at most k.

    Row a of it pairs the lane's rank a with the other factor's ranks from a on. The pairs of equal ranks are the even
    lane's; the odd lane reads its neighbour's list one rank further, and its rows end one pair earlier.

    Also whether a sum does not fit above ID_BITS of a 32-bit key. (ID_BITS = 31: keys have 64 bits.)
    """
    K: tl.constexpr = PLAN.k
    RANKS: tl.constexpr = PLAN.ranks
    SIDE: tl.constexpr = PLAN.side
    shifted_values, shifted_ids = (), ()
    for rank in tl.static_range(RANKS):
        shifted_values = shifted_values + (tl.where(odd, other_values[min(rank + 1, RANKS - 1)], other_values[rank]),)
        shifted_ids = shifted_ids + (tl.where(odd, other_ids[min(rank + 1, RANKS - 1)], other_ids[rank]),)
    keys, lost = tl.tuple(()), tl.zeros_like(ids[0])  # the interpreter cannot add Triton's tuples to one of Python's
    for a in tl.static_range(SIDE):
        for b in tl.static_range(a, min(K // (a + 1), RANKS)):
            value, low = values[a] + shifted_values[b], ids[a] | shifted_ids[b]
            if ID_BITS < 31:
                lost = lost | value.to(tl.int32, bitcast=True)
                key = (float_to_key(value, PLAN) & -(1 << ID_BITS)) | low
            else:
                key = pack_wide(value, low, PLAN)
            keys = keys + (key if b + 1 < min(K // (a + 1), RANKS) else tl.where(odd, lowest(key, PLAN), key),)
    if ID_BITS < 31:
        # Infinite sums are as good as inexact ones: different rows have the same.
        least, most = values[RANKS - 1] + other_values[RANKS - 1], values[0] + other_values[0]
        infinite = (least == float("-inf")) | (most == float("inf"))
        lost = (infinite | (lost & ((1 << ID_BITS) - 1) != 0)).to(tl.int32)
    else:
        # Rounding may turn neighbours in an odd lane's row around, hardly ever.
        turned = tl.zeros_like(ids[0])
        for a in tl.static_range(SIDE):
            turned = turned | is_turned(keys[first_pair(a, PLAN) : first_pair(a + 1, PLAN)], PLAN)
        for _ in tl.range(tl.max(turned, 0) * (RANKS // 2 + 1)):
            keys = _settle_rows(keys, PLAN)

    best = ()
    for a in tl.static_range(SIDE):
        row = keys[first_pair(SIDE - 1 - a, PLAN) : first_pair(SIDE - a, PLAN)]
        best = merge(row + best, len(row), K, PLAN, one)
    return best, lost


@triton.jit
def _settle_rows(keys, PLAN):
    """`settle` for every row of a lane's half of the staircase."""
    SIDE: tl.constexpr = PLAN.side
    settled = tl.tuple(())
    for a in tl.static_range(SIDE):
        settled = settled + settle(keys[first_pair(a, PLAN) : first_pair(a + 1, PLAN)], PLAN)
    return settled


@triton.jit
def select_pairs(best, poison, odd, columns, SHORT, PLAN, one):
    """Scores and indices of the k best pairs, of which each lane may get half, and whether SHORT keys failed.

    A key holds the sum above the row above the rank of the column, each so that the lower one wins among equals. Wide
    ones take the column along; SHORT ones, of 32 bits, leave it in shared memory: `columns`, by rank.
    """
    K: tl.constexpr = PLAN.k
    RANKS: tl.constexpr = PLAN.ranks
    RANK_BITS: tl.constexpr = bit_length(RANKS - 1)
    ROW_AT: tl.constexpr = RANK_BITS if SHORT else 31 - PLAN.row_bits
    RANK_AT: tl.constexpr = 0 if SHORT else PLAN.row_bits
    ROW_MASK: tl.constexpr = (1 << (bit_length(PLAN.num_expert_sqrt - 1) if SHORT else PLAN.row_bits)) - 1
    # The even lane, of x, gives the row and the odd lane the rest: an index times a factor plus an offset, which takes
    # multiply-adds, while other integer instructions wait for each other.
    factor = tl.where(odd, 0 if SHORT else 1, -(1 << ROW_AT))
    offset = tl.where(odd, (RANKS - 1) << RANK_AT, ROW_MASK << ROW_AT)
    step = tl.where(odd, 1 << RANK_AT, 0)
    values, ids = (), ()
    for rank in tl.static_range(RANKS):
        value, index = unpack(best[rank], PLAN.element_ty, PLAN)
        values, ids = values + (value + poison,), ids + (index * factor + (offset - rank * step),)
    ID_BITS: tl.constexpr = bit_length(ROW_MASK << ROW_AT) if SHORT else 31
    half, lost = _half_staircase(
        values, ids, partners(values, 1, PLAN), partners(ids, 1, PLAN), odd, ID_BITS, PLAN, one
    )  # fmt: skip
    other_half = partners(half, 1, PLAN)
    if PLAN.split:  # a bitonic merge, of which the even lane finishes the better half and the odd lane the other
        kept = best_of(half + other_half, len(half), PLAN, one)
        pairs = [
            tl.where(is_less(kept[slot], kept[slot + K // 2], PLAN) ^ odd, kept[slot + K // 2], kept[slot])
            for slot in tl.tuple(range(K // 2))
        ]
        pairs = bitonic(pairs, PLAN, one)
    else:
        pairs = merge(half + other_half, len(half), K, PLAN, one)

    scores, indices = (), ()
    for slot in tl.static_range(len(pairs)):
        if SHORT:
            score, reversed_low = unpack(pairs[slot], ID_BITS)
            low = (1 << ID_BITS) - 1 - reversed_low
            rank = RANKS - 1 - (low & ((1 << RANK_BITS) - 1))
            column = load(columns + rank * 4, 32)
        else:
            score, low = unpack_wide(pairs[slot], PLAN)
            column = low & ROW_MASK
        scores = scores + (score,)
        indices = indices + ((ROW_MASK - (low >> ROW_AT)) * PLAN.num_expert_sqrt + column,)
    return scores, indices, lost


@triton.jit
def fill_masked(x_ptrs, y_ptrs, out_ptrs, stride_xn, stride_yn, num_finite, fill, PLAN):
    """Replace the selected -inf pairs, best only by score, by those of lowest index.

    Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer than
    k others exist, so the -inf pairs among the first k experts are enough. (With NaN or +inf about, they may not be.)
    """
    slot = num_finite
    for i in range(PLAN.k):
        expert = tl.zeros_like(slot) + i
        x = load_value(x_ptrs + (expert // PLAN.num_expert_sqrt).to(tl.int64) * stride_xn, PLAN)
        y = load_value(y_ptrs + (expert % PLAN.num_expert_sqrt).to(tl.int64) * stride_yn, PLAN)
        masked = fill & (x + y == float("-inf")) & (slot < PLAN.k)
        store_row(out_ptrs + slot, (expert,), masked, PLAN)
        slot += masked.to(tl.int32)
