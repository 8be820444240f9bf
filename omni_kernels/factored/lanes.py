"""The kernel for few experts a token: a few lanes of a warp share a token, and each sorts in its own registers.

The even lanes of a token read its row of x and the odd ones its row of y, each a segment of it, and find the k best of
what they read (rows.py). Lanes of the same row merge their lists by shuffles. Then each even lane trades lists with its
odd neighbour, and both search half of the staircase (pairs.py). Two lanes a token do the least work in all. More lanes
answer sooner, which is what few tokens need.

A row passes through shared memory (ptx.py) in tiles of tile_n columns, which a warp copies together in whole cache
lines. Of transposed logits several warps copy a tile together, since a line holds one column of many tokens.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ..configs import compares_doubles, interpreting, on_nvidia
from . import ptx, rows, softmax
from .keys import bit_length, unpack
from .networks import merge, merge_best
from .pairs import fill_masked, first_pair, select_pairs
from .plan import OVER_ALL, Plan, count
from .softmax import FAR

MAX_EXPERTS_PER_TOKEN = 32  # more would not fit in a lane's registers
TILE_BYTES = 512  # what of a row a lane has at hand at once
PILED_TILE, PART, PILED_GROUP = 200, 40, 16  # columns of a tile, those that may go on a pile at once, and are sorted
LOOPED_TILE = 256  # columns of a tile that loops go over, where a multiprocessor has the shared memory for it
TRANSPOSED_TILE = 128  # columns of a tile that several warps copy together; a program has 48 KiB for it
MIN_TILE = 64  # columns below which a tile is not worth its merge
SUM_BITS = 9  # the fraction that nearly all sums of bf16 logits need
MANY_LANES = 16  # of a token, where there are few tokens
WARPS_OF_FEW_TOKENS = 3  # that a scheduler gets, at N = 256, before two lanes a token are faster
STAGED_BYTES = 128  # of a row a lane; fewer are read straight from global memory


@dataclasses.dataclass(frozen=True)
class LanesPlan(Plan):
    """How lanes_kernel is launched."""

    lanes: int  # of a warp that share a token
    segment: int  # columns a lane reads
    tile_n: int  # columns of a segment that are read at once; 0: logit by logit
    vector: int  # bytes of a load
    group: int  # keys sorted at once
    chunk: int  # columns of which only the maximum is sorted at first
    staged: bool  # whether a warp copies its rows to shared memory together
    transposed: bool  # whether several warps copy columns together
    priority: str  # of the rows, in L2: "evict_first" or "evict_normal"
    looped: bool  # whether loops over short networks sort a tile
    part: int  # columns of a tile that a lane looks at before it sorts those better than its best; 0: it sorts all
    short_keys: bool  # whether fp32 logits are first sorted by the upper bits that fit beside a column in 32
    short_pairs: bool  # whether keys of pairs have 32 bits, where the sums leave room for it
    add_minima: bool  # whether the smaller of two keys is their sum less the larger
    doubles: bool  # whether keys of 64 bits order as doubles
    ptx: bool  # whether helpers are PTX instructions; the interpreter runs none

    def why(self):
        read = "one by one"
        if self.tile_n:
            read = f"in tiles of {self.tile_n} columns, {self.vector} bytes a load"
            read += ", staged through shared memory" if self.staged else ", straight from global memory"
            read += " by columns" if self.transposed else ""
            read += ", and those better than the best before sorted" if self.part else ""
        reason = "there are many tokens" if self.lanes == 2 else "there are few tokens"
        return (
            f"lanes_kernel, since k is at most {MAX_EXPERTS_PER_TOKEN}: {self.lanes} lanes a token, since {reason}; "
            f"{count(self.tokens, 'token')} and {count(self.num_warps, 'warp')} a program; rows read {read}."
        )

    @property
    def kernel(self):
        return lanes_kernel

    @property
    def threads(self):
        """The lanes of a program: its warps', and in the interpreter, which runs programs one by one, many more."""
        return 32 * self.num_warps if self.ptx else 1024

    @property
    def tokens(self):
        """The tokens of a program."""
        return self.threads // self.lanes

    @property
    def ragged(self):
        """Whether segments do not divide the row: the last ones begin early then, and skip what others have read."""
        return self.lanes // 2 * self.segment != self.num_expert_sqrt

    @property
    def own(self):
        """The keys that a lane keeps of its segment."""
        return min(self.ranks, self.segment)

    @property
    def tiles(self):
        return self.segment // max(self.tile_n, 1)

    @property
    def sort_key(self):
        """What kind of keys (keys.py) a tile is sorted by."""
        return bit_length(self.tile_n - 1) if self.short_keys else self.element_ty

    @property
    def listed(self):
        """The keys that are kept of a tile: where short keys do, nearly always, two more than needed tell."""
        return min(self.own + 2, self.tile_n) if self.short_keys else self.own

    @property
    def chunk_key(self):
        """What kind of keys chunks are sorted by."""
        return bit_length(self.tile_n // self.chunk - 1) if self.short_keys else self.element_ty

    @property
    def pitch(self):
        """The bytes from row to row in shared memory. Rows an odd number of vectors apart meet every bank once."""
        behind = rows.chunks_listed(self) if self.looped else 0
        vectors = -(-(self.tile_n * self.itemsize + behind) // self.vector)
        return (vectors | 1) * self.vector

    @property
    def piled(self):
        """The columns better than the best before that a lane has room for: a part, and less than a group before it."""
        return self.part + self.group if self.part else 0

    @property
    def shared_bytes(self):
        return self.threads * (self.pitch + 4 * self.piled)

    @property
    def parts(self):
        """The pieces in which a tile arrives."""
        return self.tile_n // (self.chunk * self.group) if self.looped else 1

    @property
    def row_bits(self):
        """The bits of a wide key of a pair that hold its row; row, rank and column share 31."""
        return _row_bits(self.k)

    @property
    def sums_in_parts(self):
        """Whether rows are summed up as they arrive, since keys of chunks tell the largest logit so far."""
        return self.sums_rows and self.looped and not self.short_keys

    @property
    def spread(self):
        """Whether a token has a lane for every slot that one of its pairs of lanes holds."""
        return self.lanes // 2 >= (self.k // 2 if self.split else self.k) and self.lanes > 2

    @property
    def split(self):
        """Whether both lanes finish half of a token's pairs: where all pairs of one may be among the k best."""
        return self.k > 1 and self.k & (self.k - 1) == 0 and first_pair(self.side, self) >= self.k


@triton.jit
def _copy_tile(buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted,
               PLAN):  # fmt: skip
    """Start copying the tile of every lane's segment that begins at a column of it, if wanted."""
    wanted = wanted.to(tl.int32)
    if PLAN.transposed:
        ptx.copy_columns(buffer, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted, PLAN)
    else:
        ptx.copy_rows(buffer, segment + (column * PLAN.itemsize).to(tl.int64), wanted, PLAN)


@triton.jit
def _of_rank(values, rank):
    """That of a tuple's values whose number is a lane's rank; the last of higher ones."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(rank >= i, values[i], value)
    return value


@triton.jit
def _ratios_of_pairs(indices, x_row, y_row, stride_xn, stride_yn, best_x, best_y, PLAN):
    """The ratios of a tuple of experts, from logits that are read again: in shared memory where rows are int32."""
    highs, lows = (), ()
    for slot in tl.static_range(len(indices)):
        expert = indices[slot].to(tl.uint32)
        row, column = (expert // PLAN.num_expert_sqrt).to(tl.int32), (expert % PLAN.num_expert_sqrt).to(tl.int32)
        x, y = _logit(x_row, row, stride_xn, PLAN), _logit(y_row, column, stride_yn, PLAN)
        high, low = softmax.ratio_of_pair(x, y, best_x, best_y)
        highs, lows = highs + (high,), lows + (low,)
    return highs, lows


@triton.jit
def _logit(row, column, stride_n, PLAN):
    """One logit, as fp32, of a row in global memory, or at an address in shared memory."""
    if row.dtype == tl.int32:
        return ptx.load_value(row + column * PLAN.itemsize, PLAN)
    else:
        return ptx.load_value(row + column.to(tl.int64) * stride_n, PLAN)


@triton.jit
def _normalized(highs, lows, total, best_x, best_y, PLAN):
    """`normalized` of a tuple of pairs."""
    scales = softmax.scales_of_scores(total, best_x + best_y, best_x, best_y, PLAN)
    return tl.tuple([softmax.normalized(highs[i], lows[i], scales, PLAN) for i in tl.tuple(range(len(highs)))])


@triton.jit
def best_of_lanes(
    x_ptr, y_ptr, stride_xn, stride_yn, row_ptrs, stride_n, lane, first_column, skip, first_token, num_tokens, PLAN, one
):  # fmt: skip
    """The keys of the best columns of every lane's row, descending; the largest logit of its segment and the sum of
    powers, if rows are summed up as they pass; and where a program's tile stands in shared memory, if anywhere."""
    RANKS: tl.constexpr = PLAN.ranks
    if PLAN.tile_n > 0:
        segment = row_ptrs.to(tl.int64) + first_column * PLAN.itemsize
        if PLAN.staged:
            buffer = ptx.allocate_rows(lane, PLAN.shared_bytes)
            pile = buffer + PLAN.threads * PLAN.pitch + lane * 4
            top = pile
            _copy_tile(
                buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, lane * 0, lane >= 0, PLAN
            )  # fmt: skip
        else:
            buffer = lane
        best = rows.lowest_keys(lane.to(tl.int64) if PLAN.element_ty == tl.float32 else lane, PLAN.own, PLAN)
        largest, total = tl.full(lane.shape, float("-inf"), tl.float32), lane * 0.0
        for step in tl.range(PLAN.tiles):
            # Hidden, or LLVM would count the columns in 64 bits, and sort keys of 64 bits to subtract them from.
            column = ptx.hide(lane * 0 + step * PLAN.tile_n)
            row = segment + column * PLAN.itemsize
            if PLAN.staged:
                row = buffer + lane * PLAN.pitch
                if PLAN.looped:
                    more, doubt, total_here = rows.best_in_loops(row, buffer, num_tokens, PLAN, one)
                else:
                    ptx.wait_for_rows(lane * 0, 1)
                    if PLAN.transposed:
                        ptx.turn_columns(buffer, 0, PLAN.tile_n, PLAN)
            if PLAN.part > 0:
                for start in tl.range(0, PLAN.tile_n, PLAN.part):
                    first = ptx.hide(lane * 0 + start)
                    keys = rows.keys_of_columns(
                        row + first * PLAN.itemsize, column + first, PLAN.part, PLAN.vector, PLAN.element_ty, PLAN
                    )  # fmt: skip
                    ends = (start == PLAN.tile_n - PLAN.part) & (PLAN.sums_rows | (step == PLAN.tiles - 1))
                    kept = tl.where(ends, 0, PLAN.group)
                    best, top = rows.improved(best, keys, top, pile, kept, PLAN, one)
                more = best
            elif not PLAN.looped:
                keys, doubt = rows.candidates_of_tile(row, skip - column, PLAN, one)
                if PLAN.short_keys or PLAN.sums_rows:
                    more = rows.best_of_groups(keys, PLAN.listed, PLAN, one)
            if PLAN.short_keys:
                more = rows.exact_keys(more, row, doubt, PLAN)
            if PLAN.sums_rows and PLAN.staged:
                largest_here = unpack(more[0], PLAN.element_ty, PLAN)[0]
                if PLAN.ragged:
                    largest_here = tl.where(skip - column >= PLAN.tile_n, float("-inf"), largest_here)
                if not PLAN.sums_in_parts:
                    TILE: tl.constexpr = PLAN.tile_n * PLAN.itemsize
                    total_here = softmax.total_of_tile(row, TILE, skip - column, largest_here, num_tokens, PLAN)
                if PLAN.tiles == 1:
                    largest, total = largest_here, total_here
                else:
                    largest, total = softmax.joined(largest, total, largest_here, total_here)
            if PLAN.staged and PLAN.tiles > 1:  # where the tile is not read again
                _copy_tile(
                    buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column + PLAN.tile_n,
                    lane * 0 + step + 1 < PLAN.tiles, PLAN,
                )  # fmt: skip
            if not (PLAN.looped or PLAN.short_keys or PLAN.sums_rows or PLAN.part > 0):
                more = rows.best_of_groups(keys, PLAN.own, PLAN, one)
            if PLAN.tiles == 1 or PLAN.part > 0:
                best = more
            else:
                best = merge(best + rows.shift(more, column, PLAN), PLAN.own, PLAN.own, PLAN, one)
        if PLAN.lanes > 2:
            best = rows.shift(best, first_column, PLAN)
    else:
        best = rows.top_of_strided_segment(row_ptrs, stride_n, first_column, skip, PLAN)
        largest, total, buffer = lane, lane, lane  # nobody asks
    if PLAN.lanes > 4 and PLAN.own == RANKS and RANKS > 8 and PLAN.element_ty == tl.float32:
        # A loop, since long networks of wide keys take longer to fetch than to execute; a compiler that knew how often
        # it runs would write it out.
        for level in tl.range(1, bit_length(PLAN.lanes) - 2 + tl.minimum(num_tokens, 1).to(tl.int32)):
            more = ptx.partners(best, (lane * 0 + 1) << level, PLAN)
            best = merge_best(best + more, RANKS, RANKS, PLAN, one)
    else:
        for level in tl.static_range(1, bit_length(PLAN.lanes) - 1):
            both = best + ptx.partners(best, 1 << level, PLAN)
            best = merge_best(both, len(best), min(RANKS, len(both)), PLAN, one)
    return best, largest, total, buffer


@triton.jit(do_not_specialize=["num_tokens"])
def lanes_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr, saved_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = PLAN.ranks
    lane = tl.arange(0, PLAN.threads)
    odd = lane % 2 == 1
    # A one as far as a compiler can know.
    one = lane * 0 + tl.minimum(num_tokens, 1).to(tl.int32) if PLAN.add_minima else None
    first_column = tl.minimum(lane % PLAN.lanes // 2 * PLAN.segment, PLAN.num_expert_sqrt - PLAN.segment)
    skip = lane % PLAN.lanes // 2 * PLAN.segment - first_column

    first_token = tl.program_id(0).to(tl.int64) * PLAN.tokens
    tokens = first_token + lane // PLAN.lanes
    inside = tokens < num_tokens
    x_ptrs, y_ptrs, row_ptrs, stride_n = rows.rows_of_lanes(
        x_ptr, y_ptr, stride_xm, stride_xn, stride_ym, stride_yn, tokens, num_tokens, odd
    )  # fmt: skip
    best, largest, total, buffer = best_of_lanes(
        x_ptr, y_ptr, stride_xn, stride_yn, row_ptrs, stride_n, lane, first_column, skip, first_token, num_tokens, PLAN,
        one,
    )  # fmt: skip
    # Each lane looks at one of the two ways they may meet; its NaN reaches the other lane with its values.
    first, last = unpack(best[0], PLAN.element_ty, PLAN)[0], unpack(best[RANKS - 1], PLAN.element_ty, PLAN)[0]
    widest = first + ptx.partner(last, 1, PLAN)
    poison = tl.where(widest == widest, 0.0, float("nan"))
    if PLAN.sums_rows:
        if PLAN.staged:
            for level in tl.static_range(1, bit_length(PLAN.lanes) - 1):
                more_largest, more_total = ptx.partners((largest, total), 1 << level, PLAN)
                largest, total = softmax.joined(largest, total, more_largest, more_total)
        else:  # what is read again is at hand
            if PLAN.tile_n > 0:
                SEGMENT: tl.constexpr = PLAN.segment * PLAN.itemsize
                segment = row_ptrs.to(tl.int64) + first_column * PLAN.itemsize
                total = softmax.total_of_tile(segment, SEGMENT, skip, first, num_tokens, PLAN)
            else:
                total = softmax.total_of_strided_segment(
                    row_ptrs, stride_n, first_column, PLAN.segment, skip, first, PLAN
                )
            for level in tl.static_range(1, bit_length(PLAN.lanes) - 1):
                total += ptx.partner(total, 1 << level, PLAN)
    columns = lane
    if PLAN.short_pairs:
        columns = buffer + (lane | 1) * PLAN.pitch
        for rank in tl.static_range(RANKS):
            column = unpack(best[rank], PLAN.element_ty, PLAN)[1]
            ptx.store(buffer + lane * PLAN.pitch + rank * 4, (column,))
        ptx.sync_warp(lane)
    scores, indices, lost = select_pairs(best, poison, odd, columns, PLAN.short_pairs, PLAN, one)
    SLOTS: tl.constexpr = PLAN.k // 2 if PLAN.split else PLAN.k
    if PLAN.normalize is not None:
        other_first = ptx.partner(first, 1, PLAN)
        best_x, best_y = tl.where(odd, other_first, first), tl.where(odd, first, other_first)
    if PLAN.short_pairs:
        doubt = lost
        if PLAN.normalize is not None:  # sums of so few bits differ by a number that is exact, unless it is large
            highs, lows = softmax.differences(scores, first + other_first)
            doubt = lost * 2 | (highs[SLOTS - 1] < FAR).to(tl.int32)
        doubt = tl.max(doubt, 0)
        for _ in tl.range(doubt if PLAN.normalize is None else doubt >> 1):
            again = [ptx.hide(key) for key in best]  # or what both ways have in common would stay in registers
            # Hidden, or LLVM, which does not know that lanes shuffle here, might give the odd ones a loop of their own.
            is_odd = ptx.hide(odd.to(tl.int32)) != 0
            scores, indices, lost = select_pairs(again, poison, is_odd, columns, False, PLAN, None)

    takes = inside & (lane % PLAN.lanes < (2 if PLAN.split else 1))
    outputs = tokens * PLAN.k + (lane % 2 * SLOTS if PLAN.split else 0)
    results, writes, places = scores, takes, outputs
    if PLAN.normalize is not None:
        experts = indices
        if PLAN.spread:  # a slot for each lane, since all lanes of a token have chosen
            rank = lane % PLAN.lanes // 2
            experts = (_of_rank(indices, rank),)
            places, writes = outputs + rank, inside & (rank < SLOTS) & (PLAN.split | (lane % 2 == 0))
        if PLAN.short_pairs and not PLAN.spread:
            for _ in tl.range(tl.minimum(doubt, 1)):
                highs, lows = _ratios_of_pairs(experts, x_ptrs, y_ptrs, stride_xn, stride_yn, best_x, best_y, PLAN)
        elif PLAN.staged and PLAN.tiles == 1 and PLAN.lanes == 2:  # whole rows are at hand
            x_row, y_row = buffer + (lane & -2) * PLAN.pitch, buffer + (lane | 1) * PLAN.pitch
            highs, lows = _ratios_of_pairs(experts, x_row, y_row, stride_xn, stride_yn, best_x, best_y, PLAN)
        else:
            highs, lows = _ratios_of_pairs(experts, x_ptrs, y_ptrs, stride_xn, stride_yn, best_x, best_y, PLAN)
        if PLAN.sums_rows:
            totals = total * ptx.partner(total, 1, PLAN)
        else:
            integers = tl.zeros_like(tokens)
            for slot in tl.static_range(len(highs)):
                integers += softmax.as_integer(highs[slot], lows[slot])
            if PLAN.spread:
                integers = tl.where(rank < SLOTS, integers, 0)
                for level in tl.static_range(1, bit_length(PLAN.lanes) - 1):
                    integers += ptx.partner(integers, 1 << level, PLAN)
            if PLAN.split:
                integers += ptx.partner(integers, 1, PLAN)
            totals = softmax.total_of_integers(integers)
            total = totals
        results = _normalized(highs, lows, totals, best_x, best_y, PLAN)
        if saved_ptr is not None:
            of_row = saved_ptr + tokens * 4 + lane % 2 * 2
            ptx.store_row(of_row, (first, total), inside & (lane % PLAN.lanes < 2), PLAN)
            if PLAN.has_weights:
                ptx.store_row(saved_ptr + 4 * num_tokens.to(tl.int64) + places, results, writes, PLAN)
    rounded = [result.to(scores_ptr.dtype.element_ty) for result in results]
    ptx.store_row(scores_ptr + places, rounded, writes, PLAN)
    ptx.store_row(indices_ptr + outputs, indices, takes, PLAN)

    ordinary = inside & (poison == 0.0) & (first < float("inf")) & (ptx.partner(first, 1, PLAN) < float("inf"))
    fill = ordinary & (scores[SLOTS - 1] == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros_like(lane)
        for slot in tl.static_range(SLOTS):
            num_finite += (scores[slot] > float("-inf")).to(tl.int32)
        if PLAN.split:
            num_finite += ptx.partner(num_finite, 1, PLAN)
        tl.debug_barrier()  # after the neighbour's stores
        fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * PLAN.k, stride_xn, stride_yn, num_finite,
            ordinary & (lane % PLAN.lanes == 0), PLAN,
        )  # fmt: skip


def plan_for(x, y, k, scores_dtype, normalize=None, few_tokens=None):
    """The plan for these logits; for few tokens or many, whatever their number, where few_tokens says so."""
    num_tokens, num_expert_sqrt = x.shape
    if few_tokens is None:
        few_tokens = num_tokens <= most_few_tokens(num_expert_sqrt, x.device)
    lanes = lanes_of_few_tokens(num_expert_sqrt, x.element_size()) if few_tokens else 2
    layout = rows.row_alignment(x, y), rows.columns_are_vectors(x, y)
    return plan_of(num_expert_sqrt, k, x.dtype, scores_dtype, *layout, compares_doubles(x.device), lanes, normalize)


@functools.cache
def plan_of(num_expert_sqrt, k, dtype, scores_dtype, alignment, transposed, doubles, lanes, normalize=None):
    """The plan of a problem: among the rest how a lane reads its segment, in tiles, or logit by logit.

    alignment: of the rows, in bytes; 0 where their logits do not lie side by side. transposed: `columns_are_vectors`.
    Short segments come straight from global memory, where a staged copy would only add its latency.
    """
    itemsize = dtype.itemsize
    row = num_expert_sqrt * itemsize
    transposed = transposed and lanes == 2 and row % 128 == 0
    vector = 16 if transposed else min(alignment, row & -row)  # bytes of a load
    ranks = min(k, num_expert_sqrt)
    group = min(32, max(8, 1 << (ranks - 1).bit_length()))
    reading = {"segment": -(-num_expert_sqrt // (lanes // 2)), "tile_n": 0, "chunk": 1, "vector": 0}
    staged = looped = short_keys = False
    part = 0
    if vector >= 4 and not interpreting():
        step = vector // itemsize
        segment = -(-num_expert_sqrt // (lanes // 2 * step)) * step
        ragged = lanes // 2 * segment != num_expert_sqrt
        staged, short_keys = segment * itemsize >= STAGED_BYTES, dtype == torch.float32 and not ragged

        def widest_tile(columns):
            columns, unit = (min(columns, TRANSPOSED_TILE), 128 // itemsize) if transposed else (columns, step)
            return next(n for n in range(min(segment, columns), 0, -1) if segment % n == 0 and n % unit == 0)

        tile_n, chunk = widest_tile(LOOPED_TILE if itemsize == 2 or doubles else TILE_BYTES // 4), 4
        looped = staged and not ragged and vector >= 4 * itemsize and group >= 16 and (itemsize == 2 or k <= 16)
        looped = looped and tile_n >= 8 * k and tile_n % (4 * group) == 0
        # Columns of 16 bits are faster turned a whole tile at once, unless parts of rows are summed as they arrive.
        looped = looped and (not transposed or itemsize == 4 or normalize in OVER_ALL)
        if k > 16 and itemsize == 2 and lanes == 2 and segment > LOOPED_TILE and not transposed:
            looped, tile_n, chunk = False, widest_tile(PILED_TILE), 1
            part = next(n for n in range(PART, 0, -1) if tile_n % n == 0 and n % step == 0)
        elif not looped:
            tile_n = widest_tile(TILE_BYTES // itemsize // (2 if k > 16 else 1))
            chunks = (c for c in (4, 2) if 4 <= c * itemsize <= vector and tile_n % c == 0 and tile_n >= 2 * c * k)
            chunk = 1 if ragged else next(chunks, 1)
        if tile_n >= min(segment, PART if part else MIN_TILE):
            reading = {"segment": segment, "tile_n": tile_n, "chunk": chunk, "vector": vector}
        else:
            staged = looped = short_keys = False
            part = 0
    transposed = transposed and staged
    # A pair's sum may share 32 bits with row and rank where that leaves it the bits that sums of such logits have.
    sum_bits = 23 - (num_expert_sqrt - 1).bit_length() - (ranks - 1).bit_length()
    # Of many pairs out of few the sums lie further apart; the keys of 64 bits are made too then.
    fits = sum_bits >= SUM_BITS if k <= 16 else sum_bits > SUM_BITS and num_expert_sqrt >= 4 * k
    short_pairs = dtype == torch.bfloat16 and staged and fits
    short_pairs = short_pairs and reading["tile_n"] * itemsize >= 4 * ranks
    # Two warps a program run closer together and share more of the code they fetch, which long code gains from.
    warps = 2 if staged and itemsize == 2 and reading["tile_n"] * itemsize == TILE_BYTES else 1
    warps = 8 // itemsize if transposed else warps  # whose tokens fill a cache line of a column
    return LanesPlan(
        num_expert_sqrt, k, dtype, scores_dtype, warps, lanes, **reading, group=PILED_GROUP if part else group,
        staged=staged, transposed=transposed, priority="evict_first", looped=looped, part=part, short_keys=short_keys,
        short_pairs=short_pairs, add_minima=staged and lanes == 2 and k <= 16, doubles=doubles,
        ptx=not interpreting(), normalize=normalize,
    )  # fmt: skip


def _row_bits(k):
    return (31 - (k - 1).bit_length()) // 2


def most_few_tokens(num_expert_sqrt, device):
    """The largest number of tokens that many lanes share each: what leaves a scheduler few warps; more of long rows."""
    return int(_num_lanes(device) * WARPS_OF_FEW_TOKENS * (num_expert_sqrt / 256) ** 0.5 / MANY_LANES)


def lanes_of_few_tokens(num_expert_sqrt, itemsize):
    """How many lanes share a token where there are few: each reads 16 bytes of a row, at least."""
    longest = num_expert_sqrt * itemsize // 8
    return max(2, min(MANY_LANES, 1 << longest.bit_length() >> 1))


@functools.cache
def _num_lanes(device):
    """The lanes of a GPU whose every scheduler, four in a multiprocessor, has one warp; in the interpreter, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count * 4 * 32 if device.type == "cuda" else 64


def runs_on(device, num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on, or the interpreter."""
    fits = num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and num_expert_sqrt <= 1 << _row_bits(num_experts_per_token)
    return fits and (interpreting() or on_nvidia(device))
