"""The kernel for more experts a token than lanes.py takes: pairs are taken one by one, and no lane holds them.

Two lanes share a token, the even one with its row of x, the odd one with its row of y. A lane sorts its row a piece of
columns at a time with a network in registers (networks.py). Another network merges each piece into the list of its k
best, if that fits in registers as well; if not, pieces go to local memory, and the largest of their heads is taken k
times.

The k best pairs are then taken one by one from the frontier of the staircase (reference.py): the even lane holds the
best pair left of each of its rows, row a being its rank a with the other factor's ranks from a on; the odd lane does
the same with the roles exchanged and the pairs of equal ranks left out. That is ⌊√k⌋ pairs a lane; the better of
the two lanes' best is next, and its row moves on. (Selection in X + Y: Frederickson and Johnson 1982.)

Loops instead of networks of k keys keep the code short: at k = 64 a network of the whole staircase is more than the
instruction cache holds, and waits for its own instructions.

A pair's key is the 64 bits (sum, row, rank in y, rank in x). Rounding may turn pairs of one column around, hardly ever:
where two ranks of x lie so close that it could, all lanes take the token's pairs together, from rows of x alone.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ..configs import compares_doubles, on_nvidia
from . import ptx, softmax
from .keys import lowest, pack, pack_wide, unpack, unpack_wide
from .networks import is_less, merge_best, sort
from .pairs import fill_masked
from .plan import Plan
from .rows import row_alignment, rows_of_lanes, sorted_group

MAX_EXPERTS_PER_TOKEN = 256  # ranks take 8 bits of a pair's key; rows, of which there may be 46340, 16
SHARED_BYTES = 48 << 10  # what a program may declare
MAX_TOKENS = 16  # of a warp, two lanes each
PIECE = 64  # columns sorted at once, in registers
PIECES = 4  # pieces merged at once, in memory
REGISTERS = 128  # of 32 bits, for the best keys of a row


@dataclasses.dataclass(frozen=True)
class FrontierPlan(Plan):
    """How frontier_kernel is launched: one warp a program."""

    tokens: int  # of a program; fewer than MAX_TOKENS where their lists would not fit in shared memory
    piece: int  # columns sorted at once, in registers
    pieces: int  # merged at once, in memory
    in_registers: bool  # whether the best keys of a row stay there
    vector: int  # bytes of a load; 0: logit by logit
    doubles: bool  # whether keys of 64 bits order as doubles

    ptx = True  # helpers are PTX instructions

    def why(self):
        read = f"{self.vector} bytes a load" if self.vector else "one by one"
        place = "registers" if self.in_registers else "local memory"
        return (
            f"frontier_kernel, since lanes_kernel does not take this size: 2 lanes a token, {self.tokens} tokens and "
            f"1 warp a program; rows read {read}, sorted in pieces of {self.piece} columns and merged in {place}; "
            "pairs taken one by one."
        )

    @property
    def kernel(self):
        return frontier_kernel

    @property
    def key_bytes(self):
        """The size of the keys of logits."""
        return 8 if self.dtype == torch.float32 else 4

    @property
    def step(self):
        """The bytes from rank to rank of a lane's list in shared memory, so that every lane has a bank to itself."""
        return 2 * self.tokens * self.key_bytes

    @property
    def pair_pitch(self):
        """The bytes from token to token of the pairs taken, 16 bits each."""
        return ((self.k + 1) // 2 | 1) * 4

    @property
    def shared_bytes(self):
        return self.tokens * (self.pair_pitch + (8 if self.sums_rows else 0)) + (self.ranks + 1) * self.step

    @property
    def ragged(self):
        """Whether pieces do not divide the row: the last ones begin early then, and skip what others have read."""
        return self.num_expert_sqrt % (self.piece if self.in_registers else self.piece * self.pieces) != 0


@triton.jit
def _merge_lists(heads, target, shared_target, writes, PLAN):
    """Write the best keys of sorted lists, to private and to shared memory.

    heads: where each list starts in private memory; each ends with the lowest key.
    """
    keys = [ptx.load(head, PLAN.key_bytes * 8, "local") for head in heads]
    least = lowest(keys[0], PLAN)
    for rank in tl.range(PLAN.ranks):
        best = sort(keys, 1, PLAN)[0]
        ptx.store(target + rank * PLAN.key_bytes, (best,), SPACE="local")
        ptx.store(shared_target + rank * PLAN.step, (best,), writes)
        taken, moves = heads[0], [(key == best) & is_less(least, best, PLAN) for key in keys]
        for i in tl.static_range(len(heads)):
            taken = tl.where(moves[i], heads[i], taken)
        following = ptx.load(taken + PLAN.key_bytes, PLAN.key_bytes * 8, "local")
        next_keys, next_heads = (), ()
        for i in tl.static_range(len(heads)):
            next_keys = next_keys + (tl.where(moves[i], following, keys[i]),)
            next_heads = next_heads + (tl.where(moves[i], heads[i] + PLAN.key_bytes, heads[i]),)
        keys, heads = next_keys, next_heads


@triton.jit
def _sorted_piece(row_ptrs, stride_n, wanted, PLAN):
    """The keys of a piece of columns from `wanted` on, descending."""
    start = tl.minimum(wanted, PLAN.num_expert_sqrt - PLAN.piece)
    return sorted_group(row_ptrs, stride_n, start, wanted - start, PLAN.piece, PLAN.piece, PLAN)


@triton.jit
def _load(address, PLAN):
    """The value and the index of a key in shared memory."""
    return unpack(ptx.load(address, 8 * PLAN.key_bytes), PLAN.element_ty, PLAN)


@triton.jit
def _pair(fixed_list, moving_list, fixed, moving, odd, PLAN):
    """The key of a pair. A rank is given as 255 - rank, as keys have it: that in x is `fixed`, or if odd `moving`."""
    fixed_key = ptx.load(fixed_list + (255 - fixed) * PLAN.step, 8 * PLAN.key_bytes)
    moving_key = ptx.load(moving_list + (255 - moving) * PLAN.step, 8 * PLAN.key_bytes)
    row = unpack(tl.where(odd, moving_key, fixed_key), PLAN.element_ty, PLAN)[1]
    low = ((0xFFFF - row) << 16) | tl.where(odd, (fixed << 8) | moving, (moving << 8) | fixed)
    fixed_value, _ = unpack(fixed_key, PLAN.element_ty, PLAN)
    moving_value, _ = unpack(moving_key, PLAN.element_ty, PLAN)
    return pack_wide(fixed_value + moving_value, low, PLAN)


@triton.jit
def _taken(pair, x_list, y_list, PLAN):
    """Both logits, the row and the column of a pair that was taken, of which `pair` is where its ranks are."""
    ranks = 0xFFFF - ptx.load(pair, 16)
    value_x, row = _load(x_list + (ranks & 255) * PLAN.step, PLAN)
    value_y, column = _load(y_list + (ranks >> 8) * PLAN.step, PLAN)
    return value_x, value_y, row, column


@triton.jit
def _replace_best(keys, key, PLAN):
    """Put a key in the place of the first of a descending tuple, and the tuple in order again."""
    if len(keys) == 1:
        return (key,)
    else:
        above = [is_less(key, other, PLAN) for other in keys[1:]]
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
            best = sort((best, ptx.partner(best, 1 << i, PLAN)), 1, PLAN)[0]
        popped = unpack_wide(best, PLAN)[1]
        ptx.store(pairs + slot * 2, (popped,), tl.arange(0, 32) == 0, BITS=16)
        rank_x, rank_y = 255 - (popped & 255), 256 - ((popped >> 8) & 255)  # of the pair that follows in its row
        key = _pair(x_list, y_list, 255 - rank_x, 255 - tl.minimum(rank_y, RANKS - 1), rank_x < 0, PLAN)
        inside = ((rank_x + 1) * (rank_y + 1) <= PLAN.k) & (rank_y < RANKS)
        following = tl.where(inside, key, lowest(key, PLAN))
        heads = [tl.where(head == best, following, head) for head in heads]


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

    out = ptx.allocate_rows(lane, PLAN.shared_bytes)
    lists = out + PLAN.tokens * PLAN.pair_pitch
    own_list, other_list = lists + lane * KEY_BYTES, lists + (lane ^ 1) * KEY_BYTES
    # Past the end of a list everything is -inf.
    end = pack(tl.full((32,), float("-inf"), tl.float32), lane * 0, PLAN.element_ty, PLAN)
    ptx.store(own_list + RANKS * PLAN.step, (end,), writes)

    least = lowest(lane.to(tl.int64) if PLAN.element_ty == tl.float32 else lane, PLAN)
    if PLAN.in_registers:
        top = (least,) * RANKS
        for piece in tl.range((PLAN.num_expert_sqrt + PLAN.piece - 1) // PLAN.piece):
            piece_keys = _sorted_piece(row_ptrs, stride_n, ptx.hide(lane * 0 + piece * PLAN.piece), PLAN)
            top = merge_best(top + piece_keys[:RANKS], RANKS, RANKS, PLAN)
        for rank in tl.static_range(RANKS):
            ptx.store(own_list + rank * PLAN.step, (top[rank],), writes)
    else:
        # Pieces, and between tiles the best so far, are a lane's own business.
        PIECE: tl.constexpr = PLAN.piece
        PIECES: tl.constexpr = PLAN.pieces
        PITCH: tl.constexpr = (PIECE + 1) * KEY_BYTES
        LIST: tl.constexpr = (RANKS + 1) * KEY_BYTES
        TILES: tl.constexpr = (PLAN.num_expert_sqrt + PIECE * PIECES - 1) // (PIECE * PIECES)
        private = ptx.allocate_private(lane, PIECES * PITCH + 2 * LIST)
        source, target = private + PIECES * PITCH, private + PIECES * PITCH + LIST
        for piece in tl.static_range(PIECES):
            ptx.store(private + piece * PITCH + PIECE * KEY_BYTES, (least,), SPACE="local")
        ptx.store(source, (least,), SPACE="local")  # nothing is best yet
        ptx.store(source + RANKS * KEY_BYTES, (least,), SPACE="local")
        ptx.store(target + RANKS * KEY_BYTES, (least,), SPACE="local")
        for tile in tl.range(TILES):
            for part in tl.range(PIECES):
                wanted = lane * 0 + (tile * PIECES + part) * PIECE
                piece_keys = _sorted_piece(row_ptrs, stride_n, wanted, PLAN)
                for i in tl.static_range(PIECE):
                    ptx.store(private + part * PITCH + i * KEY_BYTES, (piece_keys[i],), SPACE="local")
            heads = (source,) if TILES > 1 else ()
            for piece in tl.static_range(PIECES):
                heads = heads + (private + piece * PITCH,)
            _merge_lists(heads, target, own_list, writes, PLAN)
            source, target = target, source
    ptx.sync_warp(lane)

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
            ptx.sync_warp(lane)  # after the others' loads
            ptx.store(own_list + place * PLAN.step, (nan_key,), writes & poisoned)
        ptx.sync_warp(lane)
    # Sums of one column tie where they round to the same, or are infinite. (Of -inf ones, `fill_masked` takes care.)
    largest, limit = _spread(own_list, PLAN)
    exact = tl.where(odd, largest < ptx.partner(limit, 1, PLAN), ptx.partner(largest, 1, PLAN) < limit)
    by_rows = (~(exact & (first_x + first_y < float("inf")))).to(tl.int32)

    totals = lists + (RANKS + 1) * PLAN.step
    if PLAN.sums_rows:
        largest = tl.where(odd, first_y, first_x)
        if PLAN.vector > 0:
            ROW: tl.constexpr = PLAN.num_expert_sqrt * PLAN.itemsize
            total = softmax.total_of_tile(row_ptrs.to(tl.int64), ROW, lane * 0, largest, num_tokens, PLAN)
        else:
            total = softmax.total_of_strided_segment(
                row_ptrs, stride_n, lane * 0, PLAN.num_expert_sqrt, lane * 0, largest, PLAN
            )
        ptx.store(totals + lane * 4, (total.to(tl.int32, bitcast=True),), writes)

    pairs = out + lane // 2 * PLAN.pair_pitch
    heads = ()
    SIDE: tl.constexpr = PLAN.side
    for a in tl.static_range(SIDE):
        moving = tl.where(odd, 254 - a, 255 - a)
        heads = heads + (_pair(own_list, other_list, lane * 0 + (255 - a), moving, odd, PLAN),)
    heads = sort(heads, SIDE, PLAN)
    for slot in tl.range(K):
        rival = ptx.partner(heads[0], 1, PLAN)
        wins = is_less(rival, heads[0], PLAN)
        popped = unpack_wide(tl.where(wins, heads[0], rival), PLAN)[1]
        ptx.store(pairs + slot * 2, (popped,), writes & ~odd, BITS=16)
        ranks = unpack_wide(heads[0], PLAN)[1]
        fixed, moving = (ranks >> tl.where(odd, 8, 0)) & 255, (ranks >> tl.where(odd, 0, 8)) & 255
        moving = tl.maximum(moving - 1, 255 - min(RANKS, 255))  # up to where a row ends, as keys have ranks
        following = _pair(own_list, other_list, fixed, moving, odd, PLAN)
        heads = _replace_best(heads, tl.where(wins, following, heads[0]), PLAN)
    ptx.sync_warp(lane)
    for token in tl.range(PLAN.tokens * tl.max(by_rows, 0)):
        if tl.max(tl.where(lane // 2 == token, by_rows, 0), 0) != 0:
            _take_by_rows(out + token * PLAN.pair_pitch, lists + token * 2 * KEY_BYTES, PLAN)
    ptx.sync_warp(lane)

    for token in tl.range(PLAN.tokens):
        token_list = lists + token * 2 * KEY_BYTES
        if PLAN.normalize is not None:
            best_x, best_y = _load(token_list, PLAN)[0], _load(token_list + KEY_BYTES, PLAN)[0]
            if PLAN.sums_rows:
                of_x, of_y = ptx.load(totals + token * 8, 32), ptx.load(totals + token * 8 + 4, 32)
                product = of_x.to(tl.float32, bitcast=True) * of_y.to(tl.float32, bitcast=True)
            else:
                integers = tl.zeros((32,), tl.int64)
                for start in tl.static_range(0, K, 32):
                    slots = start + tl.arange(0, 32)
                    pair = out + token * PLAN.pair_pitch + tl.minimum(slots, K - 1) * 2
                    value_x, value_y, _, _ = _taken(pair, token_list, token_list + KEY_BYTES, PLAN)
                    high, low = softmax.ratio_of_pair(value_x, value_y, best_x, best_y)
                    integers += tl.where(slots < K, softmax.as_integer(high, low), 0)
                for level in tl.static_range(5):
                    integers += ptx.partner(integers, 1 << level, PLAN)
                product = softmax.total_of_integers(integers)
            scales = softmax.scales_of_scores(product, best_x + best_y, best_x, best_y, PLAN)
        for start in tl.static_range(0, K, 32):
            slots = start + tl.arange(0, 32)
            pair = out + token * PLAN.pair_pitch + tl.minimum(slots, K - 1) * 2
            value_x, value_y, row, column = _taken(pair, token_list, token_list + KEY_BYTES, PLAN)
            score = value_x + value_y
            outputs = (first_token + token) * K + slots
            valid = (slots < K) & (first_token + token < num_tokens)
            if PLAN.normalize is not None:
                high, low = softmax.ratio_of_pair(value_x, value_y, best_x, best_y)
                score = softmax.normalized(high, low, scales, PLAN)
                if saved_ptr is not None and PLAN.has_weights:
                    ptx.store_row(saved_ptr + 4 * num_tokens.to(tl.int64) + outputs, (score,), valid, PLAN)
            ptx.store_row(scores_ptr + outputs, (score.to(scores_ptr.dtype.element_ty),), valid, PLAN)
            ptx.store_row(indices_ptr + outputs, (row * PLAN.num_expert_sqrt + column,), valid, PLAN)

    if saved_ptr is not None:
        largest = tl.where(odd, first_y, first_x)
        of_row = (largest, total if PLAN.sums_rows else largest)
        ptx.store_row(saved_ptr + tokens * 4 + lane % 2 * 2, of_row, writes & (tokens < num_tokens), PLAN)

    value_x, value_y, _, _ = _taken(pairs + (K - 1) * 2, x_list, y_list, PLAN)
    worst = value_x + value_y
    fill = (tokens < num_tokens) & (first_x < float("inf")) & (first_y < float("inf")) & (worst == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros_like(lane)
        for slot in tl.range(K):
            value_x, value_y, _, _ = _taken(pairs + slot * 2, x_list, y_list, PLAN)
            num_finite += (value_x + value_y > float("-inf")).to(tl.int32)
        ptx.sync_warp(lane)  # after the others' stores
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
    plan = FrontierPlan(
        num_expert_sqrt, k, dtype, scores_dtype, 1, MAX_TOKENS, piece, pieces=min(PIECES, -(-num_expert_sqrt // piece)),
        in_registers=in_registers, vector=vector if vector >= 4 else 0, doubles=doubles, normalize=normalize,
    )  # fmt: skip
    while plan.shared_bytes > SHARED_BYTES:
        plan = dataclasses.replace(plan, tokens=plan.tokens // 2)
    return plan


def runs_on(device, _num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on."""
    return num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and on_nvidia(device)
