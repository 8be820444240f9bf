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
from .words import load_shared, load_value, partners, store_row


@triton.constexpr_function
def first_pair(rank, k, ranks):
    """How many pairs the rows before `rank` have in a lane's half of the staircase: row a pairs with a, a + 1, ..."""
    return sum(max(0, min(k // (row + 1), ranks) - row) for row in range(rank))


@triton.jit
def _half_staircase(values, ids, other_values, other_ids, odd, RANKS: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
                    ID_BITS: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr, one):  # fmt: skip
    """The keys of the best pairs in this lane's half of the staircase, descending, at most K.

    Row a of it pairs the lane's rank a with the other factor's ranks from a on. The pairs of equal ranks are the even
    lane's; the odd lane reads its neighbour's list one rank further, and its rows end one pair earlier.

    Also whether a sum does not fit above ID_BITS of a 32-bit key. (ID_BITS = 31: keys have 64 bits.)
    """
    shifted_values, shifted_ids = (), ()
    for rank in tl.static_range(RANKS):
        if rank + 1 < RANKS:
            shifted_values = shifted_values + (tl.where(odd, other_values[rank + 1], other_values[rank]),)
            shifted_ids = shifted_ids + (tl.where(odd, other_ids[rank + 1], other_ids[rank]),)
        else:
            shifted_values, shifted_ids = shifted_values + other_values[rank:], shifted_ids + other_ids[rank:]
    keys, lost = (), tl.zeros_like(ids[0])
    for a in tl.static_range(SIDE):
        for b in tl.static_range(a, min(K // (a + 1), RANKS)):
            value, low = values[a] + shifted_values[b], ids[a] | shifted_ids[b]
            if ID_BITS < 31:
                lost = lost | value.to(tl.int32, bitcast=True)
                key = (float_to_key(value, NVIDIA) & -(1 << ID_BITS)) | low
            else:
                key = pack_wide(value, low, NVIDIA, FP64)
            keys = keys + (key if b + 1 < min(K // (a + 1), RANKS) else tl.where(odd, lowest(key, FP64), key),)
    if ID_BITS < 31:
        # Infinite sums are as good as inexact ones: different rows have the same.
        least, most = values[RANKS - 1] + other_values[RANKS - 1], values[0] + other_values[0]
        infinite = (least == float("-inf")) | (most == float("inf"))
        lost = (infinite | (lost & ((1 << ID_BITS) - 1) != 0)).to(tl.int32)
    else:
        # Rounding may turn neighbours in an odd lane's row around, hardly ever.
        turned = tl.zeros_like(ids[0])
        for a in tl.static_range(SIDE):
            row = keys[first_pair(a, K, RANKS) : first_pair(a + 1, K, RANKS)]
            turned = turned | is_turned(row, NVIDIA, FP64)
        for _ in tl.range(tl.max(turned, 0) * (RANKS // 2 + 1)):
            keys = _settle_rows(keys, RANKS, K, SIDE, NVIDIA, FP64)

    best = ()
    for a in tl.static_range(SIDE):
        row = keys[first_pair(SIDE - 1 - a, K, RANKS) : first_pair(SIDE - a, K, RANKS)]
        best = merge(row + best, len(row), K, NVIDIA, FP64, one)
    return best, lost


@triton.jit
def _settle_rows(keys, RANKS: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, NVIDIA: tl.constexpr,
                 FP64: tl.constexpr):  # fmt: skip
    """`settle` for every row of a lane's half of the staircase."""
    settled = ()
    for a in tl.static_range(SIDE):
        settled = settled + settle(keys[first_pair(a, K, RANKS) : first_pair(a + 1, K, RANKS)], NVIDIA, FP64)
    return settled


@triton.jit
def select_pairs(best, poison, odd, columns, NUM_EXPERT_SQRT: tl.constexpr, RANKS: tl.constexpr,
                  K: tl.constexpr, SIDE: tl.constexpr, SPLIT: tl.constexpr, KEY: tl.constexpr,
                  ROW_BITS: tl.constexpr, NARROW: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr,
                  one):  # fmt: skip
    """Scores and indices of the K best pairs, of which each lane gets half if SPLIT, and whether NARROW keys failed.

    A key holds the sum above the row above the rank of the column, each so that the lower one wins among equals. Wide
    ones take the column along; NARROW ones, of 32 bits, leave it in shared memory: `columns`, by rank.
    """
    RANK_BITS: tl.constexpr = bit_length(RANKS - 1)
    ROW_AT: tl.constexpr = RANK_BITS if NARROW else 31 - ROW_BITS
    RANK_AT: tl.constexpr = 0 if NARROW else ROW_BITS
    ROW_MASK: tl.constexpr = (1 << (bit_length(NUM_EXPERT_SQRT - 1) if NARROW else ROW_BITS)) - 1
    # The even lane, of x, gives the row and the odd lane the rest: an index times a factor plus an offset, which takes
    # multiply-adds, while other integer instructions wait for each other.
    factor = tl.where(odd, 0 if NARROW else 1, -(1 << ROW_AT))
    offset = tl.where(odd, (RANKS - 1) << RANK_AT, ROW_MASK << ROW_AT)
    step = tl.where(odd, 1 << RANK_AT, 0)
    values, ids = (), ()
    for rank in tl.static_range(RANKS):
        value, index = unpack(best[rank], KEY, FP64)
        values, ids = values + (value + poison,), ids + (index * factor + (offset - rank * step),)
    ID_BITS: tl.constexpr = bit_length(ROW_MASK << ROW_AT) if NARROW else 31
    half, lost = _half_staircase(
        values, ids, partners(values, 1, NVIDIA), partners(ids, 1, NVIDIA), odd, RANKS, K, SIDE, ID_BITS, NVIDIA, FP64,
        one,
    )  # fmt: skip
    other_half = partners(half, 1, NVIDIA)
    if SPLIT:  # a bitonic merge, of which the even lane finishes the better half and the odd lane the other
        kept = best_of(half + other_half, len(half), NVIDIA, FP64, one)
        pairs = ()
        for slot in tl.static_range(K // 2):
            chosen = is_less(kept[slot], kept[slot + K // 2], FP64) ^ odd
            pairs = pairs + (tl.where(chosen, kept[slot + K // 2], kept[slot]),)
        pairs = bitonic(pairs, NVIDIA, FP64, one)
    else:
        pairs = merge(half + other_half, len(half), K, NVIDIA, FP64, one)

    scores, indices = (), ()
    for slot in tl.static_range(len(pairs)):
        if NARROW:
            score, reversed_low = unpack(pairs[slot], ID_BITS)
            low = (1 << ID_BITS) - 1 - reversed_low
            rank = RANKS - 1 - (low & ((1 << RANK_BITS) - 1))
            column = load_shared(columns + rank * 4, 32)
        else:
            score, low = unpack_wide(pairs[slot], FP64)
            column = low & ROW_MASK
        scores = scores + (score,)
        indices = indices + ((ROW_MASK - (low >> ROW_AT)) * NUM_EXPERT_SQRT + column,)
    return scores, indices, lost


@triton.jit
def fill_masked(x_ptrs, y_ptrs, out_ptrs, stride_xn, stride_yn, num_finite, fill,
                 NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, NVIDIA: tl.constexpr):  # fmt: skip
    """Replace the selected -inf pairs, best only by score, by those of lowest index.

    Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer than
    K others exist, so the -inf pairs among the first K experts are enough. (With NaN or +inf about, they may not be.)
    """
    slot = num_finite
    for i in range(K):
        expert = tl.zeros_like(slot) + i
        x = load_value(x_ptrs + (expert // NUM_EXPERT_SQRT).to(tl.int64) * stride_xn, NVIDIA)
        y = load_value(y_ptrs + (expert % NUM_EXPERT_SQRT).to(tl.int64) * stride_yn, NVIDIA)
        masked = fill & (x + y == float("-inf")) & (slot < K)
        store_row(out_ptrs + slot, (expert,), masked, NVIDIA)
        slot += masked.to(tl.int32)
