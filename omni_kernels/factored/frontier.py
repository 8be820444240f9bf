"""The kernel for more experts a token than lanes.py takes: lists of columns lie in memory, and no lane holds all pairs.

Two lanes share a token, the even one with its row of x, the odd one with its row of y. A lane sorts its row a piece of
columns at a time with a network in registers (networks.py). Another network merges each piece into the list of its k
best, if that fits in registers as well; if not, pieces go to local memory, and the largest of their heads is taken k
times.

The even lane then has the pairs of each of its ranks with the other factor's ranks from there on, row by row of the
staircase (reference.py); the odd lane has the same with the roles exchanged and the pairs of equal ranks left out.

16-bit logits, and so their sums, are whole numbers of some unit. A logit becomes an integer, above its row if it is of
x, above its rank if it is of y, such that the sum of two is a pair's key, in 32 bits. Each lane merges its rows, and
then both lanes' best are merged. A logit that is no whole number of units is rounded. Where a pair of such a logit
might be among the best, and where not everything is finite, these keys do not count.

Then, and for fp32, pairs are taken one by one: a lane holds the best pair left of each of its ⌊√k⌋ rows; the better of
the two lanes' best is next, and its row moves on. (Selection in X + Y: Frederickson and Johnson 1982.) A pair's key is
the 64 bits (sum, row, rank in y, rank in x). Rounding may turn pairs of one column around, hardly ever: where two ranks
of x lie so close that it could, all lanes take the token's pairs together, from rows of x alone.
"""

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl

from ..configs import compares_doubles, on_nvidia
from .keys import lowest, pack, pack_wide, unpack, unpack_wide
from .networks import bitonic, is_less, merge, merge_best, sort
from .pairs import fill_masked
from .plan import Plan
from .ptx import (
    allocate_private,
    allocate_rows,
    hide,
    load_private,
    load_shared,
    partner,
    store_private,
    store_row,
    store_shared,
    sync_warp,
)
from .rows import keys_of_group, lowest_keys, row_alignment, rows_of_lanes
from .softmax import (
    ROUNDS,
    as_integer,
    normalized,
    ratio_of_pair,
    scales_of_scores,
    total_of_integers,
    total_of_strided_segment,
    total_of_tile,
)

MAX_EXPERTS_PER_TOKEN = 256  # ranks take 8 bits of a pair's key; rows, of which there may be 46340, 16
SHARED_BYTES = 48 << 10  # what a program may declare
MAX_TOKENS = 16  # of a warp, two lanes each
PIECE = 64  # columns sorted at once, in registers
PIECES = 4  # pieces merged at once, in memory
REGISTERS = 128  # of 32 bits, for the best keys of a row
MINIMA = 4  # so that minima and multiply-adds are equally busy
SUM_BITS = 12  # that sums have room for in a 32-bit key, or nearly none would fit


@dataclasses.dataclass(frozen=True)
class FrontierPlan(Plan):
    """How frontier_kernel is launched: one warp a program."""

    tokens: int  # of a program; fewer than MAX_TOKENS where their lists would not fit in shared memory
    piece: int  # columns sorted at once, in registers
    pieces: int  # merged at once, in memory
    in_registers: bool  # whether the best keys of a row stay there
    vector: int  # bytes of a load; 0: logit by logit
    doubles: bool  # whether keys of 64 bits order as doubles
    sum_bits: int  # of a sum in a 32-bit key of a pair, above a row and a rank; 0: keys of 64 bits

    ptx = True  # helpers are PTX instructions

    def why(self):
        read = f"{self.vector} bytes a load" if self.vector else "one by one"
        place = "registers" if self.in_registers else "local memory"
        return (
            f"frontier_kernel, since lanes_kernel does not take this size: 2 lanes a token, {self.tokens} tokens and "
            f"1 warp a program; rows read {read}, sorted in pieces of {self.piece} columns and merged in {place}; "
            f"pairs {'merged by keys of 32 bits' if self.sum_bits else 'taken one by one'}."
        )

    @property
    def kernel(self):
        return frontier_kernel

    @property
    def side(self):
        """The rows of a lane's half of the staircase."""
        return min(math.isqrt(self.k), self.num_expert_sqrt)

    @property
    def key_bytes(self):
        """The size of the keys of logits."""
        return 8 if self.dtype == torch.float32 else 4

    @property
    def rank_bits(self):
        """The bits of a 32-bit key of a pair that hold the rank in y."""
        return (self.ranks - 1).bit_length()

    @property
    def row_mask(self):
        """Those that hold the row, above."""
        return (1 << (self.num_expert_sqrt - 1).bit_length()) - 1

    @property
    def step(self):
        """The bytes from rank to rank of a lane's list in shared memory, so that every lane has a bank to itself."""
        return 2 * self.tokens * self.key_bytes

    @property
    def direct(self):
        """Whether lanes write what they find by 32-bit keys, each half a token's slots."""
        return self.sum_bits > 0 and self.normalize is None and self.k & (self.k - 1) == 0 and self.k > 1

    @property
    def pair_bytes(self):
        """The size of a pair taken: its ranks, or a 32-bit key."""
        return 4 if self.sum_bits else 2

    @property
    def pair_pitch(self):
        """The bytes from token to token of the pairs taken."""
        return (-(-self.k * self.pair_bytes // 4) | 1) * 4

    @property
    def lists_at(self):
        """Where the lists of keys begin, behind the pairs, and the lists of integers that those come from."""
        integers = (self.ranks + 1) * self.step if self.sum_bits else 0
        return max(self.tokens * self.pair_pitch, integers)

    @property
    def shared_bytes(self):
        numbers = 8 * (self.sums_rows + (self.sum_bits > 0))  # of a token
        return self.lists_at + (self.ranks + 1) * self.step + self.tokens * numbers

    @property
    def ragged(self):
        """Whether pieces do not divide the row: the last ones begin early then, and skip what others have read."""
        return self.num_expert_sqrt % (self.piece if self.in_registers else self.piece * self.pieces) != 0


@triton.jit
def _merge_lists(heads, target, shared_target, writes, PLAN):
    """Write the best keys of sorted lists, to private and to shared memory.

    heads: where each list starts in private memory; each ends with the lowest key.
    """
    keys = ()
    for i in tl.static_range(len(heads)):
        keys = keys + (load_private(heads[i], PLAN.key_bytes * 8),)
    least = lowest(keys[0], PLAN)
    for rank in tl.range(PLAN.ranks):
        best = sort(keys, 1, PLAN)[0]
        store_private(target + rank * PLAN.key_bytes, best)
        store_shared(shared_target + rank * PLAN.step, best, PLAN.key_bytes * 8, writes)
        taken, moves = heads[0], ()
        for i in tl.static_range(len(heads)):
            moves = moves + ((keys[i] == best) & is_less(least, best, PLAN),)
            taken = tl.where(moves[i], heads[i], taken)
        following = load_private(taken + PLAN.key_bytes, PLAN.key_bytes * 8)
        next_keys, next_heads = (), ()
        for i in tl.static_range(len(heads)):
            next_keys = next_keys + (tl.where(moves[i], following, keys[i]),)
            next_heads = next_heads + (tl.where(moves[i], heads[i] + PLAN.key_bytes, heads[i]),)
        keys, heads = next_keys, next_heads


@triton.jit
def _sorted_piece(row_ptrs, stride_n, wanted, PLAN, one):
    """The keys of a piece of columns from `wanted` on, descending."""
    start = tl.minimum(wanted, PLAN.num_expert_sqrt - PLAN.piece)
    return sort(keys_of_group(row_ptrs, stride_n, start, wanted - start, PLAN.piece, PLAN), PLAN.piece, PLAN, one)


@triton.jit
def _load(address, PLAN):
    """The value and the index of a key in shared memory."""
    return unpack(load_shared(address, 8 * PLAN.key_bytes), PLAN.element_ty, PLAN)


@triton.jit
def _pair(fixed_list, moving_list, fixed, moving, odd, PLAN):
    """The key of a pair. A rank is given as 255 - rank, as keys have it: that in x is `fixed`, or if odd `moving`."""
    fixed_key = load_shared(fixed_list + (255 - fixed) * PLAN.step, 8 * PLAN.key_bytes)
    moving_key = load_shared(moving_list + (255 - moving) * PLAN.step, 8 * PLAN.key_bytes)
    row = unpack(tl.where(odd, moving_key, fixed_key), PLAN.element_ty, PLAN)[1]
    low = ((0xFFFF - row) << 16) | tl.where(odd, (fixed << 8) | moving, (moving << 8) | fixed)
    fixed_value, moving_value = (
        unpack(fixed_key, PLAN.element_ty, PLAN)[0],
        unpack(moving_key, PLAN.element_ty, PLAN)[0],
    )
    return pack_wide(fixed_value + moving_value, low, PLAN)


@triton.jit
def _taken(pair, x_list, y_list, PLAN):
    """Both logits, the row and the column of a pair that was taken, of which `pair` is where its ranks are."""
    ranks = 0xFFFF - (load_shared(pair, 8 * PLAN.pair_bytes) & 0xFFFF)
    value_x, row = _load(x_list + (ranks & 255) * PLAN.step, PLAN)
    value_y, column = _load(y_list + (ranks >> 8) * PLAN.step, PLAN)
    return value_x, value_y, row, column


@triton.jit
def _sum_of_taken(pair, x_list, y_list, PLAN):
    value_x, value_y, _, _ = _taken(pair, x_list, y_list, PLAN)
    return value_x + value_y


@triton.jit
def _of_short_key(key, y_list, unit, origin, PLAN):
    """The sum of a pair, its logit of y, its row and its column."""
    rank = PLAN.ranks - 1 - (key & ((1 << PLAN.rank_bits) - 1))
    row = PLAN.row_mask - ((key >> PLAN.rank_bits) & PLAN.row_mask)
    value_y, column = _load(y_list + rank * PLAN.step, PLAN)
    return tl.fma((key >> (31 - PLAN.sum_bits)).to(tl.float32), unit, origin), value_y, row, column


@triton.jit
def _chosen(pair, x_list, y_list, unit_at, is_long, PLAN):
    """`_taken` of what is at `pair`, which may be a short key instead."""
    if PLAN.direct or PLAN.sum_bits == 0:
        return _taken(pair, x_list, y_list, PLAN)
    else:
        if is_long != 0:
            value_x, value_y, row, column = _taken(pair, x_list, y_list, PLAN)
        else:
            unit = load_shared(unit_at, 32).to(tl.float32, bitcast=True)
            origin = load_shared(unit_at + 4, 32).to(tl.float32, bitcast=True)
            total, value_y, row, column = _of_short_key(load_shared(pair, 32), y_list, unit, origin, PLAN)
            value_x = total - value_y
        return value_x, value_y, row, column


@triton.jit
def _integers_of_list(values_list, integers, first, last, other_first, other_last, odd, writes, PLAN):
    """Write integers of which the sum of one of x and one of y is a short key, in units of sums.

    A unit is a power of two that all differences fit above the other bits in, and all sums in those of fp32. Sums of
    logits that are whole numbers of units are exact. Also the unit, the logit from which integers count, and by how
    many units the last of the best pairs must be above the least for other logits not to matter.
    """
    ID_BITS: tl.constexpr = 31 - PLAN.sum_bits
    largest = tl.maximum(tl.abs(first), tl.abs(last)) + tl.maximum(tl.abs(other_first), tl.abs(other_last))
    spread = (first - last) + (other_first - other_last)
    unit = tl.maximum(tl.maximum(spread * 2.0**-PLAN.sum_bits, largest * 2.0**-22), 2.0**-100)
    exponent = (unit.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    unit, per_unit = exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    least = tl.fma(last, per_unit, ROUNDS)
    # The lane of x gives the row, that of y the rank, both so that the lower one wins among equals.
    factor = tl.where(odd, 0, 1 << PLAN.rank_bits)
    offset = tl.where(odd, 0, (PLAN.row_mask - 0xFFFF) << PLAN.rank_bits)
    offset -= least.to(tl.int32, bitcast=True) << ID_BITS
    doubtful = tl.full(unit.shape, float("-inf"), tl.float32)  # the largest logit that is not a whole number, in units
    for behind in tl.range(PLAN.ranks):
        at = (PLAN.ranks - 1 - behind) * PLAN.step
        key = load_shared(values_list + at, 32)
        value = unpack(key, PLAN.element_ty, PLAN)[0]
        units = tl.fma(value, per_unit, ROUNDS)
        doubtful = tl.where(tl.fma(value, per_unit, ROUNDS - units) == 0.0, doubtful, units)
        integer = (units.to(tl.int32, bitcast=True) << ID_BITS) + ((key & 0xFFFF) * factor + offset)
        store_shared(integers + at, integer + tl.where(odd, behind, 0), 32, writes)
    needed = (doubtful - least) + tl.fma(other_first - other_last, per_unit, 2.0)  # more than roundings take
    return unit, (least - ROUNDS) * unit, tl.where(largest + spread < 2.0**100, needed, float("inf"))


@triton.jit
def _short_keys(own, other, odd, PLAN, one):
    """The short keys of a token's best pairs, half of them for each lane, which merges half of the staircase's rows.

    own, other: where the lists of integers are.
    """
    K: tl.constexpr = PLAN.k
    WIDTH: tl.constexpr = _power_of_two(K)
    SIDE: tl.constexpr = PLAN.side
    other += tl.where(odd, PLAN.step, 0)  # pairs of equal ranks are the even lane's
    half = ()
    for i in tl.static_range(1, SIDE):
        half = _merge_row(half, own, other, SIDE - i, odd, PLAN, one)
    none = lowest(odd.to(tl.int32), PLAN)
    COUNT: tl.constexpr = len(half)
    best = ()
    for i in tl.static_range(WIDTH):
        key = half[WIDTH - 1 - i] if WIDTH - 1 - i < COUNT else none
        if i < PLAN.ranks:
            more = _short_key(own, other, 0, i, odd, PLAN)
            key = tl.maximum(key, more) if WIDTH - 1 - i < COUNT else more
        best = best + (key,)
    half = bitonic(best, PLAN, one)
    # Of both lanes' best, the even lane finishes the better half and the odd lane the other.
    best = ()
    for i in tl.static_range(WIDTH):
        best = best + (tl.maximum(half[i], partner(half[WIDTH - 1 - i], 1, PLAN)),)
    half = ()
    for i in tl.static_range(WIDTH // 2):
        a, b = best[i], best[i + WIDTH // 2]
        half = half + (tl.where((a < b) ^ odd, b, a),)
    return bitonic(half, PLAN, one)


@triton.jit
def _outputs(keys, y_list, unit, origin, PLAN):
    """Scores and indices of pairs by their short keys."""
    scores, indices = (), ()
    for slot in tl.static_range(len(keys)):
        score, _, row, column = _of_short_key(keys[slot], y_list, unit, origin, PLAN)
        scores, indices = scores + (score,), indices + (row * PLAN.num_expert_sqrt + column,)
    return scores, indices


@triton.jit
def _merge_row(best, own, other, a, odd, PLAN, one):
    """The best short keys of a descending tuple and of a row of a lane's half of the staircase."""
    COUNT: tl.constexpr = min(PLAN.k // (a + 1), PLAN.ranks) - a
    row = ()
    for i in tl.static_range(COUNT):
        row = row + (_short_key(own, other, a, a + i, odd, PLAN),)
    return merge(row + best, COUNT, PLAN.k, PLAN, one)


@triton.jit
def _short_key(own, other, a, b, odd, PLAN):
    key = load_shared(own + a * PLAN.step, 32) + load_shared(other + b * PLAN.step, 32)
    # Rows of the odd lane end one pair earlier.
    return key if b + 1 < min(PLAN.k // (a + 1), PLAN.ranks) else tl.where(odd, lowest(key, PLAN), key)


@triton.constexpr_function
def _power_of_two(number):
    return max(2, 1 << (number - 1).bit_length())


@triton.jit
def _replace_best(keys, key, PLAN):
    """Put a key in the place of the first of a descending tuple, and the tuple in order again."""
    if len(keys) == 1:
        return (key,)
    else:
        above = ()
        for i in tl.static_range(1, len(keys)):
            above = above + (is_less(key, keys[i], PLAN),)
        replaced = (tl.where(above[0], keys[1], key),)
        for i in tl.static_range(1, len(keys) - 1):
            replaced = replaced + (tl.where(above[i], keys[i + 1], tl.where(above[i - 1], key, keys[i])),)
        return replaced + (tl.where(above[len(keys) - 2], key, keys[len(keys) - 1]),)


@triton.jit
def _take_by_rows(pairs, x_list, PLAN):
    """The ranks of a token's k best pairs, taken by all lanes of the warp, each from every 32nd row of x."""
    RANKS: tl.constexpr = PLAN.ranks
    y_list = x_list + PLAN.key_bytes
    heads = ()
    for first in tl.static_range(0, RANKS, 32):
        rank = tl.minimum(first + tl.arange(0, 32), RANKS - 1)
        key = _pair(x_list, y_list, 255 - rank, rank * 0 + 255, rank < 0, PLAN)
        heads = heads + (tl.where(first + tl.arange(0, 32) < RANKS, key, lowest(key, PLAN)),)
    for slot in tl.range(PLAN.k):
        best = sort(heads, 1, PLAN)[0]
        for i in tl.static_range(5):
            best = sort((best, partner(best, 1 << i, PLAN)), 1, PLAN)[0]
        popped = unpack_wide(best, PLAN)[1]
        store_shared(pairs + slot * PLAN.pair_bytes, popped, 8 * PLAN.pair_bytes, tl.arange(0, 32) == 0)
        rank_x, rank_y = 255 - (popped & 255), 256 - ((popped >> 8) & 255)  # of the pair that follows in its row
        key = _pair(x_list, y_list, 255 - rank_x, 255 - tl.minimum(rank_y, RANKS - 1), rank_x < 0, PLAN)
        inside = ((rank_x + 1) * (rank_y + 1) <= PLAN.k) & (rank_y < RANKS)
        following, next_heads = tl.where(inside, key, lowest(key, PLAN)), ()
        for i in tl.static_range(len(heads)):
            next_heads = next_heads + (tl.where(heads[i] == best, following, heads[i]),)
        heads = next_heads


@triton.jit
def _spread(values_list, PLAN):
    """The largest magnitude in a descending list that is not infinite; and how much more the other factor's must not
    be, or two sums of one column might round to the same.

    That takes neighbours x > x' of the list with x - x' at most 2**-23 of a sum, which is at most |x| + |y|. (The
    factor here leaves some room.)
    """
    previous, _ = _load(values_list, PLAN)
    largest, limit = tl.zeros_like(previous), tl.full(previous.shape, float("inf"), tl.float32)
    for rank in tl.range(PLAN.ranks):
        value, _ = _load(values_list + rank * PLAN.step, PLAN)
        largest = tl.where(tl.abs(value) < float("inf"), tl.maximum(largest, tl.abs(value)), largest)
        margin = (previous - value) * (0.75 * 2.0**23) - tl.abs(previous)
        limit = tl.where(previous > value, tl.minimum(limit, margin), limit)
        previous = value
    return largest, limit


@triton.jit
def _take_one_by_one(out, lists, lane, writes, PLAN):
    """Write the ranks of all tokens' best pairs."""
    RANKS: tl.constexpr = PLAN.ranks
    SIDE: tl.constexpr = PLAN.side
    odd = lane % 2 == 1
    own_list, other_list = lists + lane * PLAN.key_bytes, lists + (lane ^ 1) * PLAN.key_bytes
    first, other_first = _load(own_list, PLAN)[0], _load(other_list, PLAN)[0]
    # Sums of one column tie where they round to the same, or are infinite. (Of -inf ones, `fill_masked` takes care.)
    largest, limit = _spread(own_list, PLAN)
    exact = tl.where(odd, largest < partner(limit, 1, PLAN), partner(largest, 1, PLAN) < limit)
    by_rows = (~(exact & (first + other_first < float("inf")))).to(tl.int32)

    pairs = out + lane // 2 * PLAN.pair_pitch
    heads = ()
    for a in tl.static_range(SIDE):
        moving = tl.where(odd, 254 - a, 255 - a)
        heads = heads + (_pair(own_list, other_list, lane * 0 + (255 - a), moving, odd, PLAN),)
    heads = sort(heads, SIDE, PLAN)
    for slot in tl.range(PLAN.k):
        rival = partner(heads[0], 1, PLAN)
        wins = is_less(rival, heads[0], PLAN)
        popped = unpack_wide(tl.where(wins, heads[0], rival), PLAN)[1]
        store_shared(pairs + slot * PLAN.pair_bytes, popped, 8 * PLAN.pair_bytes, writes & ~odd)
        ranks = unpack_wide(heads[0], PLAN)[1]
        fixed, moving = (ranks >> tl.where(odd, 8, 0)) & 255, (ranks >> tl.where(odd, 0, 8)) & 255
        # Up to where a row ends, in the form of a key's ranks.
        moving = tl.maximum(moving - 1, 255 - min(RANKS, 255))
        following = _pair(own_list, other_list, fixed, moving, odd, PLAN)
        heads = _replace_best(heads, tl.where(wins, following, heads[0]), PLAN)
    sync_warp(lane)
    for token in tl.range(PLAN.tokens * tl.max(by_rows, 0)):
        if tl.max(tl.where(lane // 2 == token, by_rows, 0), 0) != 0:
            _take_by_rows(out + token * PLAN.pair_pitch, lists + token * 2 * PLAN.key_bytes, PLAN)


@triton.jit(do_not_specialize=["num_tokens"])
def frontier_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr, saved_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PLAN.k
    RANKS: tl.constexpr = PLAN.ranks
    KEY_BYTES: tl.constexpr = PLAN.key_bytes
    # Where the lists of 16 tokens would not fit, a warp routes fewer, and its other lanes do as the first ones do.
    lane = tl.arange(0, 32) % (2 * PLAN.tokens)
    writes = tl.arange(0, 32) < 2 * PLAN.tokens
    first_token = tl.program_id(0).to(tl.int64) * PLAN.tokens
    tokens = first_token + lane // 2
    odd = lane % 2 == 1
    x_ptrs, y_ptrs, row_ptrs, stride_n = rows_of_lanes(
        x_ptr, y_ptr, stride_xm, stride_xn, stride_ym, stride_yn, tokens, num_tokens, odd
    )  # fmt: skip

    out = allocate_rows(lane, PLAN.shared_bytes)
    lists = out + PLAN.lists_at
    own_list = lists + lane * KEY_BYTES
    # Past the end of a list everything is -inf.
    end = pack(tl.full((32,), float("-inf"), tl.float32), lane * 0, PLAN.element_ty, PLAN)
    store_shared(own_list + RANKS * PLAN.step, end, KEY_BYTES * 8, writes)

    # A one as far as a compiler can know: the smaller of two 32-bit keys is their sum less the larger.
    one = lane * 0 + tl.minimum(num_tokens, 1).to(tl.int32)
    least = lowest(lane.to(tl.int64) if PLAN.element_ty == tl.float32 else lane, PLAN)
    if PLAN.in_registers:
        top = lowest_keys(least, RANKS, PLAN)
        for piece in tl.range((PLAN.num_expert_sqrt + PLAN.piece - 1) // PLAN.piece):
            more = _sorted_piece(row_ptrs, stride_n, hide(lane * 0 + piece * PLAN.piece), PLAN, one)[:RANKS]
            if piece == 0:
                top = more + top[: RANKS - len(more)]
            else:
                top = merge_best(top + more, RANKS, RANKS, PLAN, one)
        for rank in tl.static_range(RANKS):
            store_shared(own_list + rank * PLAN.step, top[rank], KEY_BYTES * 8, writes)
    else:
        # Pieces, and between tiles the best so far, are a lane's own business.
        PIECE: tl.constexpr = PLAN.piece
        PIECES: tl.constexpr = PLAN.pieces
        PITCH: tl.constexpr = (PIECE + 1) * KEY_BYTES
        LIST: tl.constexpr = (RANKS + 1) * KEY_BYTES
        TILES: tl.constexpr = (PLAN.num_expert_sqrt + PIECE * PIECES - 1) // (PIECE * PIECES)
        private = allocate_private(lane, PIECES * PITCH + 2 * LIST)
        source, target = private + PIECES * PITCH, private + PIECES * PITCH + LIST
        for piece in tl.static_range(PIECES):
            store_private(private + piece * PITCH + PIECE * KEY_BYTES, least)
        store_private(source, least)  # nothing is best yet
        store_private(source + RANKS * KEY_BYTES, least)
        store_private(target + RANKS * KEY_BYTES, least)
        for tile in tl.range(TILES):
            for part in tl.range(PIECES):
                wanted = lane * 0 + (tile * PIECES + part) * PIECE
                piece_keys = _sorted_piece(row_ptrs, stride_n, wanted, PLAN, one)
                for i in tl.static_range(PIECE):
                    store_private(private + part * PITCH + i * KEY_BYTES, piece_keys[i])
            heads = (source,) if TILES > 1 else ()
            for piece in tl.static_range(PIECES):
                heads = heads + (private + piece * PITCH,)
            _merge_lists(heads, target, own_list, writes, PLAN)
            source, target = target, source
    sync_warp(lane)

    x_list, y_list = lists + (lane & -2) * KEY_BYTES, lists + (lane | 1) * KEY_BYTES
    END: tl.constexpr = (RANKS - 1) * PLAN.step
    first_x, last_x = _load(x_list, PLAN)[0], _load(x_list + END, PLAN)[0]
    first_y, last_y = _load(y_list, PLAN)[0], _load(y_list + END, PLAN)[0]
    # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
    poisoned = (first_x + last_y != first_x + last_y) | (first_y + last_x != first_y + last_x)
    if tl.max(poisoned.to(tl.int32), 0) != 0:
        for place in tl.range(RANKS):
            value, index = _load(own_list + place * PLAN.step, PLAN)
            nan_key = pack(value + float("nan"), index, PLAN.element_ty, PLAN)
            sync_warp(lane)  # after the others' loads
            store_shared(own_list + place * PLAN.step, nan_key, KEY_BYTES * 8, writes & poisoned)
        sync_warp(lane)
    totals = lists + (RANKS + 1) * PLAN.step
    if PLAN.sums_rows:
        largest = tl.where(odd, first_y, first_x)
        if PLAN.vector > 0:
            ROW: tl.constexpr = PLAN.num_expert_sqrt * PLAN.itemsize
            total = total_of_tile(row_ptrs.to(tl.int64), ROW, lane * 0, largest, num_tokens, PLAN)
        else:
            total = total_of_strided_segment(
                row_ptrs, stride_n, lane * 0, PLAN.num_expert_sqrt, lane * 0, largest, PLAN
            )
        store_shared(totals + lane * 4, total.to(tl.int32, bitcast=True), 32, writes)

    pairs = out + lane // 2 * PLAN.pair_pitch
    units = totals + (8 * PLAN.tokens if PLAN.sums_rows else 0)
    is_long = 1
    if PLAN.sum_bits > 0:
        own, other = out + lane * 4, out + (lane ^ 1) * 4
        unit, origin, needed = _integers_of_list(
            own_list, own, tl.where(odd, first_y, first_x), tl.where(odd, last_y, last_x),
            tl.where(odd, first_x, first_y), tl.where(odd, last_x, last_y), odd, writes, PLAN,
        )  # fmt: skip
        origin += partner(origin, 1, PLAN)
        of_token = tl.where(odd, origin, unit).to(tl.int32, bitcast=True)
        store_shared(units + lane * 4, of_token, 32, writes)
        sync_warp(lane)
        half = _short_keys(own, other, odd, PLAN, one)
        WIDTH: tl.constexpr = len(half)
        last = half[(K - 1) % WIDTH]
        last = tl.where(odd == (K > WIDTH), last, partner(last, 1, PLAN)) >> (31 - PLAN.sum_bits)
        is_long = tl.max((~(last.to(tl.float32) >= needed)).to(tl.int32), 0)
        sync_warp(lane)  # after the other lanes' loads
        if PLAN.direct:
            if is_long == 0:
                scores, indices = _outputs(half, y_list, unit, origin, PLAN)
                rounded = ()
                for slot in tl.static_range(WIDTH):
                    rounded = rounded + (scores[slot].to(scores_ptr.dtype.element_ty),)
                outputs, valid = tokens * K + lane % 2 * WIDTH, writes & (tokens < num_tokens)
                store_row(scores_ptr + outputs, rounded, valid, PLAN)
                store_row(indices_ptr + outputs, indices, valid, PLAN)
        else:
            for i in tl.static_range(WIDTH):
                place = tl.where(odd, WIDTH + i, i)
                store_shared(pairs + place * 4, half[i], 32, writes & (place < K))
            sync_warp(lane)
    if is_long != 0:
        _take_one_by_one(out, lists, lane, writes, PLAN)
    sync_warp(lane)

    for token in tl.range(PLAN.tokens * is_long if PLAN.direct else PLAN.tokens):
        token_list = lists + token * 2 * KEY_BYTES
        if PLAN.normalize is not None:
            best_x, best_y = _load(token_list, PLAN)[0], _load(token_list + KEY_BYTES, PLAN)[0]
            if PLAN.sums_rows:
                of_x, of_y = load_shared(totals + token * 8, 32), load_shared(totals + token * 8 + 4, 32)
                product = of_x.to(tl.float32, bitcast=True) * of_y.to(tl.float32, bitcast=True)
            else:
                integers = tl.zeros((32,), tl.int64)
                for start in tl.static_range(0, K, 32):
                    slots = start + tl.arange(0, 32)
                    pair = out + token * PLAN.pair_pitch + tl.minimum(slots, K - 1) * PLAN.pair_bytes
                    value_x, value_y, _, _ = _chosen(
                        pair, token_list, token_list + KEY_BYTES, units + token * 8, is_long, PLAN
                    )
                    high, low = ratio_of_pair(value_x, value_y, best_x, best_y)
                    integers += tl.where(slots < K, as_integer(high, low), 0)
                for level in tl.static_range(5):
                    integers += partner(integers, 1 << level, PLAN)
                product = total_of_integers(integers)
            scales = scales_of_scores(product, best_x + best_y, best_x, best_y, PLAN)
        for start in tl.static_range(0, K, 32):
            slots = start + tl.arange(0, 32)
            pair = out + token * PLAN.pair_pitch + tl.minimum(slots, K - 1) * PLAN.pair_bytes
            value_x, value_y, row, column = _chosen(
                pair, token_list, token_list + KEY_BYTES, units + token * 8, is_long, PLAN
            )
            score = value_x + value_y
            outputs = (first_token + token) * K + slots
            valid = (slots < K) & (first_token + token < num_tokens)
            if PLAN.normalize is not None:
                high, low = ratio_of_pair(value_x, value_y, best_x, best_y)
                score = normalized(high, low, scales, PLAN)
                if saved_ptr is not None and PLAN.has_weights:
                    store_row(saved_ptr + 4 * num_tokens.to(tl.int64) + outputs, (score,), valid, PLAN)
            store_row(scores_ptr + outputs, (score.to(scores_ptr.dtype.element_ty),), valid, PLAN)
            store_row(indices_ptr + outputs, (row * PLAN.num_expert_sqrt + column,), valid, PLAN)

    if saved_ptr is not None:
        largest = tl.where(odd, first_y, first_x)
        of_row = (largest, total if PLAN.sums_rows else largest)
        store_row(saved_ptr + tokens * 4 + lane % 2 * 2, of_row, writes & (tokens < num_tokens), PLAN)

    if is_long != 0:
        worst = _sum_of_taken(pairs + (K - 1) * PLAN.pair_bytes, x_list, y_list, PLAN)
        fill = (tokens < num_tokens) & (first_x < float("inf")) & (first_y < float("inf")) & (worst == float("-inf"))
        if tl.max(fill.to(tl.int32), 0) != 0:
            num_finite = tl.zeros_like(lane)
            for slot in tl.range(K):
                score = _sum_of_taken(pairs + slot * PLAN.pair_bytes, x_list, y_list, PLAN)
                num_finite += (score > float("-inf")).to(tl.int32)
            sync_warp(lane)  # after the others' stores
            fill_masked(
                x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite, fill & writes & ~odd, PLAN
            )  # fmt: skip


def plan_for(x, y, k, scores_dtype, normalize=None):
    """The plan for these logits."""
    return plan_of(x.shape[1], k, x.dtype, scores_dtype, row_alignment(x, y), compares_doubles(x.device), normalize)


@functools.cache
def plan_of(num_expert_sqrt, k, dtype, scores_dtype, alignment, doubles, normalize=None):
    """The plan of a problem. alignment: of the rows, in bytes; 0 where their logits do not lie side by side."""
    ranks, words = min(k, num_expert_sqrt), 2 if dtype == torch.float32 else 1  # of a key
    in_registers = ranks * words <= REGISTERS
    piece = min(PIECE // words if in_registers else PIECE, num_expert_sqrt)
    row, piece_bytes = num_expert_sqrt * dtype.itemsize, piece * dtype.itemsize
    vector = min(alignment, row & -row, piece_bytes & -piece_bytes)
    sum_bits = 31 - (num_expert_sqrt - 1).bit_length() - (ranks - 1).bit_length()
    short_pairs = in_registers and dtype != torch.float32 and sum_bits >= SUM_BITS
    plan = FrontierPlan(
        num_expert_sqrt, k, dtype, scores_dtype, 1, MAX_TOKENS, piece, pieces=min(PIECES, -(-num_expert_sqrt // piece)),
        in_registers=in_registers, vector=vector if vector >= 4 else 0, doubles=doubles,
        sum_bits=sum_bits if short_pairs else 0, normalize=normalize, minima=MINIMA,
    )  # fmt: skip
    while plan.shared_bytes > SHARED_BYTES:
        plan = dataclasses.replace(plan, tokens=plan.tokens // 2)
    return plan


def runs_on(device, _num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on."""
    return num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and on_nvidia(device)
