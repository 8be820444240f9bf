"""The k best columns of a row, or of a segment of it, found by one lane in its own registers.

Logits become keys that carry their own tie-break (keys.py), which sorting networks sort (networks.py). 32 bits of them
cost less than half of 64: one instruction gives the larger of two. A 16-bit logit fits above its column. Of an fp32
logit only the upper bits find room beside the column, which is enough to tell all but a few apart; those few are sorted
again (`exact_keys`).

Of a tile of columns a lane first keeps one maximum a chunk of CHUNK columns and sorts those, since the k best columns
lie in the k chunks with the largest maxima, then sorts the columns of those k chunks alone. A lane runs through its
code once, so that fetching long networks takes longer than executing them; where a tile has enough chunks, the networks
are short and in loops (`best_in_loops`).
"""

import triton
import triton.language as tl

from . import ptx
from .keys import index_bits, lowest, pack, pack_tuple, unpack
from .networks import best_of, is_turned, merge, merge_best, pile_up, settle, sort, taken
from .softmax import moved, total_of_tile


@triton.jit
def rows_of_lanes(x_ptr, y_ptr, stride_xm, stride_xn, stride_ym, stride_yn, tokens, num_tokens, odd):
    """Where a token's rows of x and y begin, and which of them is a lane's own, and the stride of that.

    Lanes past the end route the last token again, and store nothing.
    """
    read = tl.minimum(tokens, num_tokens - 1)
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    return x_ptrs, y_ptrs, tl.where(odd, y_ptrs, x_ptrs), tl.where(odd, stride_yn, stride_xn)


@triton.jit
def _larger_halves(a, b, DTYPE):
    """The two 16-bit maxima of two words, in one instruction; NaN wins."""
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _maximum(values):
    """The largest of a tuple; NaN wins."""
    if len(values) == 1:
        return values[0]
    else:
        first, second = _maximum(values[: len(values) // 2]), _maximum(values[len(values) // 2 :])
        return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _keys_of_maxima(row, first_chunk, CHUNKS, PLAN):
    """The keys (maximum, chunk) of CHUNKS chunks, of which `first_chunk` is at `row`."""
    DTYPE: tl.constexpr = PLAN.element_ty
    PER_WORD: tl.constexpr = 4 // PLAN.itemsize
    CHUNK: tl.constexpr = PLAN.chunk
    VECTOR: tl.constexpr = PLAN.vector
    maxima = ()  # one of each chunk: a value, or a word of two halves that are still to be compared
    for start in tl.static_range(0, CHUNKS * CHUNK * PLAN.itemsize, VECTOR):
        words = ptx.load_words(row + start, VECTOR // 4)
        for first in tl.static_range(0, len(words), CHUNK // PER_WORD):
            if PER_WORD == 2:
                word = words[first]
                for i in tl.static_range(1, CHUNK // 2):
                    word = _larger_halves(word, words[first + i], DTYPE)
                maxima = maxima + (word,)
            else:
                maxima = maxima + (_maximum(ptx.unpack_words(words[first : first + CHUNK], DTYPE)),)
    keys = ()
    if PER_WORD == 1:
        keys = pack_tuple(maxima, first_chunk, PLAN.chunk_key, PLAN)
    else:
        for i in tl.static_range(0, len(maxima), 2):
            chunk = first_chunk + i
            if i + 1 == len(maxima):
                keys = keys + pack_tuple((_maximum(ptx.unpack_words(maxima[i:], DTYPE)),), chunk, PLAN.chunk_key, PLAN)
            else:
                lows, highs = ptx.transpose_halves(maxima[i], maxima[i + 1])
                pair = _larger_halves(lows, highs, DTYPE)
                keys = keys + _keys_of_word(pair, _reversed_columns(row, chunk), DTYPE)
    return keys


@triton.jit
def _reversed_columns(like, column):
    """What `_keys_of_word` wants to be told of two columns of which `column` is the first."""
    return (0xFFFF - (tl.zeros_like(like).to(tl.int32) + column)) * 0x10001 - 0x10000


@triton.jit
def _keys_of_word(word, reversed_columns, DTYPE):
    """The keys of the two 16-bit logits in a word; both arguments hold two halves, the lower column in the lower.

    `pack` two at a time: the product turns -0.0 into 0.0 and every NaN into one, the first permutation spreads the
    signs, whose magnitude bits are then flipped, and the others put a column below each half.
    """
    ONE: tl.constexpr = "0x3F803F80" if DTYPE == tl.bfloat16 else "0x3C003C00"
    FMA: tl.constexpr = "fma.rn.bf16x2" if DTYPE == tl.bfloat16 else "fma.rn.f16x2"
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .b32 one, zero, value, sign;
        mov.b32 one, {ONE};
        mov.b32 zero, 0;
        {FMA} value, $2, one, zero;
        prmt.b32 sign, value, value, 0xBB99;
        and.b32 sign, sign, 0x7FFF7FFF;
        xor.b32 value, value, sign;
        prmt.b32 $0, value, $3, 0x1054;
        prmt.b32 $1, value, $3, 0x3276;
        }}""",
        "=&r,=&r,r,r", [word, tl.zeros_like(word) + reversed_columns], (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def keys_of_columns(row, column, COUNT, VECTOR, KEY, PLAN):
    """The keys of COUNT logits at an address, the first of which is in `column`, read VECTOR bytes at once."""
    words = ()
    for start in tl.static_range(0, COUNT * PLAN.itemsize, VECTOR):
        words = words + ptx.load_words(row + start, VECTOR // 4)
    keys = ()
    if PLAN.itemsize == 2:
        reversed_columns = _reversed_columns(row, column)
        for i in tl.static_range(len(words)):
            keys = keys + _keys_of_word(words[i], reversed_columns - 0x20002 * i, PLAN.element_ty)
    else:
        keys = pack_tuple(ptx.unpack_words(words, PLAN.element_ty), column, KEY, PLAN)
    return keys


@triton.jit
def _keys_of_strided(row_ptrs, stride_n, start, COUNT, PLAN):
    """The keys of COUNT columns from `start` on, read one by one."""
    values = [ptx.load_value(row_ptrs + (start + i).to(tl.int64) * stride_n, PLAN) for i in tl.tuple(range(COUNT))]
    return pack_tuple(values, start, PLAN.element_ty, PLAN)


@triton.jit
def _skip_first(keys, skip, PLAN):
    """The first `skip` keys become the lowest."""
    return tl.tuple([tl.where(i < skip, lowest(keys[i], PLAN), keys[i]) for i in tl.tuple(range(len(keys)))])


@triton.jit
def shift(keys, column, PLAN):
    """The keys of a tile's columns -> those of the row's, `column` further right."""
    if PLAN.doubles and keys[0].dtype == tl.int64:
        COUNT: tl.constexpr = len(keys)
        return tl.inline_asm_elementwise(
            _shifting(COUNT), ptx.operands("=&l", COUNT) + "," + ptx.operands("l", COUNT) + ",r", keys + (column,),
            ptx.copies(tl.int64, COUNT), True, 1,
        )  # fmt: skip
    else:
        return tl.tuple([key - column for key in keys])


@triton.constexpr_function
def _shifting(count):
    """PTX that shifts keys that order as doubles, whose columns the negative ones have turned around."""
    lines = (
        f"setp.lt.s64 turned, ${count + i}, 0; selp.b64 step, right, left, turned; add.s64 ${i}, ${count + i}, step;"
        for i in range(count)
    )
    declared = ".reg .pred turned; .reg .b64 right, left, step;"
    return " ".join(["{", declared, f"cvt.s64.s32 right, ${2 * count}; neg.s64 left, right;", *lines, "}"])


@triton.jit
def lowest_keys(like, COUNT, PLAN):
    """A tuple of COUNT keys below all others."""
    return (lowest(like, PLAN),) * COUNT


@triton.jit
def best_of_groups(keys, K, PLAN, one):
    """The K best of a tuple, descending, a group at a time."""
    GROUP: tl.constexpr = PLAN.group
    best = ()
    for start in tl.static_range(0, len(keys), GROUP):
        group = sort(keys[start : start + GROUP], K, PLAN, one)
        best = merge(best + group, len(best), K, PLAN, one)
    return best


@triton.jit
def candidates_of_tile(row, skip, PLAN, one):
    """Keys (value, column) of a tile among which its best are: all of it, or its best chunks.

    Also, where keys hold only the upper bits of values, whether these leave in doubt which chunks are the best.
    """
    K: tl.constexpr = PLAN.own
    none = tl.zeros_like(skip)
    keys, doubt = (), none
    if PLAN.chunk == 1:
        keys = keys_of_columns(row, none, PLAN.tile_n, PLAN.vector, PLAN.sort_key, PLAN)
        if PLAN.ragged:
            keys = _skip_first(keys, skip, PLAN)
    else:
        maxima = _keys_of_maxima(row, none, PLAN.tile_n // PLAN.chunk, PLAN)
        if PLAN.short_keys:
            chunks = best_of_groups(maxima, K + 1, PLAN, one)
            doubt = ((chunks[K - 1] ^ chunks[K]) >> PLAN.chunk_key == 0).to(tl.int32)
            chunks = chunks[:K]
        else:  # their order does not matter
            LAST: tl.constexpr = (len(maxima) - 1) // PLAN.group * PLAN.group
            chunks = sort(maxima[LAST:], K, PLAN, one)
            if LAST > 0:
                first_chunks = best_of_groups(maxima[:LAST], K, PLAN, one)
                chunks = best_of(first_chunks + chunks, len(first_chunks), PLAN, one)
        for i in tl.static_range(len(chunks)):
            start = unpack(chunks[i], PLAN.chunk_key, PLAN)[1] * PLAN.chunk
            keys = keys + _keys_of_chunk(row, start, PLAN)
    return keys, doubt


@triton.jit
def _keys_of_chunk(row, start, PLAN):
    """The keys of the columns of a chunk, of which `start` is the first."""
    row = row + start * PLAN.itemsize
    return keys_of_columns(row, start, PLAN.chunk, PLAN.chunk * PLAN.itemsize, PLAN.sort_key, PLAN)


@triton.jit
def best_in_loops(row, buffer, num_tokens, PLAN, one):
    """The keys (value, column) of the best of a tile's best chunks, descending.

    In loops over groups of keys. The first begins with a part of the row while the rest is on its way. Also whether it
    is in doubt which chunks are the best; and, where the plan asks, the sum of exp(logit - the largest).
    """
    CHUNKS: tl.constexpr = chunks_listed(PLAN)
    none = row & 0
    chunks = lowest_keys(none, CHUNKS + 1 if PLAN.short_keys else CHUNKS, PLAN)
    largest, total = tl.full(none.shape, float("-inf"), tl.float32), none * 0.0
    adding = None if PLAN.sums_in_parts else one  # beside powers it is the slots to issue that are few
    for group in tl.range(PLAN.parts):
        ptx.wait_for_rows(none + group, PLAN.parts)
        first = ptx.hide(none + group * PLAN.group)
        if PLAN.transposed:
            ptx.turn_columns(buffer, first * PLAN.chunk, PLAN.group * PLAN.chunk, PLAN)
        maxima = _keys_of_maxima(row + first * (PLAN.chunk * PLAN.itemsize), first, PLAN.group, PLAN)
        more = sort(maxima, len(chunks), PLAN, adding)
        chunks = merge(chunks + more, len(chunks), len(chunks), PLAN, adding)
        if PLAN.sums_in_parts:  # while the next part is on its way
            PART: tl.constexpr = PLAN.group * PLAN.chunk * PLAN.itemsize
            before, largest = largest, unpack(chunks[0], PLAN.chunk_key, PLAN)[0]
            part = total_of_tile(row + first * (PLAN.chunk * PLAN.itemsize), PART, none, largest, num_tokens, PLAN)
            total = moved(total, before, largest) + part
    doubt = ((chunks[PLAN.own - 1] ^ chunks[CHUNKS]) >> PLAN.chunk_key == 0).to(tl.int32) if PLAN.short_keys else none

    BEHIND: tl.constexpr = PLAN.tile_n * PLAN.itemsize
    for i in tl.static_range(0, CHUNKS, 4):  # no loop can count through registers: their numbers go behind the tile
        numbers = chunks[i] & 0xFF
        for byte in tl.static_range(1, 4):
            numbers = numbers | ((chunks[i + byte] & 0xFF) << (8 * byte))
        ptx.store(row + (BEHIND + i), (numbers,))
    best = lowest_keys(none, PLAN.listed, PLAN)
    NUMBER: tl.constexpr = (1 << min(index_bits(PLAN.chunk_key), 8)) - 1
    STEP: tl.constexpr = PLAN.group // PLAN.chunk
    for at in tl.range(0, CHUNKS, STEP):
        keys = ()
        for i in tl.static_range(0, STEP, 4):
            numbers = ~ptx.load_words(row + ptx.hide(none + at) + (BEHIND + i), 1)[0]
            for byte in tl.static_range(4):
                keys = keys + _keys_of_chunk(row, ((numbers >> (8 * byte)) & NUMBER) * PLAN.chunk, PLAN)
        best = merge(best + sort(keys, PLAN.listed, PLAN, one), PLAN.listed, PLAN.listed, PLAN, one)
    return best, doubt, total


@triton.jit
def improved(best, keys, top, pile, kept, PLAN, one):
    """The best of a descending tuple and of keys in no order, and where the lane's pile ends then.

    Most columns of a long row are no better than the last of the best so far. Those that are go on a pile in shared
    memory. What is on top of it, a group at a time, is sorted and merged until no lane has more than `kept` there. So
    how long that takes depends on the logits: if they rise, all pass.
    """
    K: tl.constexpr = len(best)
    STEP: tl.constexpr = pile.shape[0] * keys[0].dtype.primitive_bitwidth // 8
    top = pile_up(keys, best[K - 1], top, STEP, PLAN)
    height = tl.max((top - pile) // STEP, 0)
    for _ in tl.range((height - kept + PLAN.group - 1) // PLAN.group):
        start = tl.maximum(top - PLAN.group * STEP, pile)
        group = taken(start, (top - start) // STEP, PLAN.group, STEP, lowest(best[0], PLAN), PLAN)
        best = merge_best(best + sort(group, K, PLAN, one), K, K, PLAN, one)
        top = start
    return best, top


@triton.constexpr_function
def chunks_listed(plan):
    """How many chunks `best_in_loops` keeps: one for each key, and as many more as it takes to fill its groups."""
    return -(-plan.own * plan.chunk // plan.group) * (plan.group // plan.chunk)


@triton.jit
def exact_keys(best, row, doubt, PLAN):
    """The 64-bit keys of the best of a tile of fp32 logits, descending, from the 32-bit keys of two more, or of all.

    Those hold only the upper bits of a value. One more than is needed are sorted again by all bits: the best are among
    these, unless the next has the same upper bits as the last. Then, and where the choice of chunks is in doubt, all
    columns are sorted by all bits, if any logit of the tile has lower bits at all.
    """
    K: tl.constexpr = PLAN.own
    BITS: tl.constexpr = PLAN.sort_key
    if len(best) == K + 2:
        same = ((best[K - 1] ^ best[K]) | (best[K] ^ best[K + 1])) >> BITS == 0
        doubt = doubt | same.to(tl.int32)
    exact = ()
    for rank in tl.static_range(min(K + 1, len(best))):
        column = unpack(best[rank], BITS)[1]
        value = ptx.load_words(row + (column * 4).to(row.dtype), 1)[0].to(tl.float32, bitcast=True)
        exact = exact + (pack(value, column, tl.float32, PLAN),)
    while tl.max(is_turned(exact, PLAN), 0) != 0:  # neighbours seldom change places
        exact = settle(exact, PLAN)
    exact = exact[:K]

    lower = tl.zeros_like(doubt)
    for start in tl.range(0, tl.max(doubt, 0) * PLAN.tile_n * 4, PLAN.vector):
        words = ptx.load_words(row + start, PLAN.vector // 4)
        for i in tl.static_range(len(words)):
            lower = lower | words[i]
    doubt = ((doubt != 0) & (lower & ((1 << BITS) - 1) != 0)).to(tl.int32)
    for _ in tl.range(tl.max(doubt, 0)):
        exact = _sorted_top(row, PLAN)
    return exact


@triton.jit
def _sorted_top(row, PLAN):
    """The 64-bit keys of the best of a tile of fp32 logits, in little code."""
    FEW: tl.constexpr = min(PLAN.tile_n & -PLAN.tile_n, PLAN.group if PLAN.group <= 16 else 8)
    best = lowest_keys(tl.zeros_like(row).to(tl.int64), PLAN.own, PLAN)
    for group in tl.range(PLAN.tile_n // FEW):
        start = ptx.hide(tl.zeros_like(row).to(tl.int32) + group * FEW)
        keys = keys_of_columns(row + start * 4, start, FEW, PLAN.vector, tl.float32, PLAN)
        best = merge(best + sort(keys, PLAN.own, PLAN), PLAN.own, PLAN.own, PLAN)
    return best


@triton.jit
def top_of_strided_segment(row_ptrs, stride_n, first_column, skip, PLAN):
    """The keys (value, column) of the best columns of a segment, descending."""
    K: tl.constexpr = PLAN.own
    FIRST: tl.constexpr = min(PLAN.group, PLAN.segment)
    TAIL: tl.constexpr = (PLAN.segment - FIRST) % PLAN.group
    best = sorted_group(row_ptrs, stride_n, first_column, skip, FIRST, K, PLAN)
    for start in tl.range(PLAN.group, PLAN.segment - TAIL, PLAN.group):
        more = sorted_group(row_ptrs, stride_n, first_column + start, skip - start, PLAN.group, K, PLAN)
        best = merge(best + more, K, K, PLAN)
    if TAIL > 0:
        start = PLAN.segment - TAIL
        tail = sorted_group(row_ptrs, stride_n, first_column + start, skip - start, TAIL, K, PLAN)
        best = merge(best + tail, K, K, PLAN)
    return best


@triton.jit
def sorted_group(row_ptrs, stride_n, column, skip, COUNT, K, PLAN):
    """The keys of the K best of COUNT columns, descending, read in vectors or, where the plan has none, one by one.

    If segments or pieces do not divide the row, the first `skip` of them do not count.
    """
    if PLAN.vector > 0:
        row = row_ptrs.to(tl.int64) + column * PLAN.itemsize
        keys = keys_of_columns(row, column, COUNT, PLAN.vector, PLAN.element_ty, PLAN)
    else:
        keys = _keys_of_strided(row_ptrs, stride_n, column, COUNT, PLAN)
    if PLAN.ragged:
        keys = _skip_first(keys, skip, PLAN)
    return sort(keys, K, PLAN)


def row_alignment(x, y):
    """The largest power of two, in bytes and up to 16, that all rows begin at; 0: logits do not lie side by side."""
    if x.shape[1] > 1 and not x.stride(1) == y.stride(1) == 1:
        return 0
    starts = x.data_ptr() | y.data_ptr() | (x.stride(0) | y.stride(0)) * x.element_size()
    return min(16, starts & -starts)


def columns_are_vectors(x, y):
    """Whether every column of transposed logits is a whole number of 16-byte vectors, that begin at multiples of 16."""
    if not x.stride(0) == y.stride(0) == 1:
        return False
    starts = x.data_ptr() | y.data_ptr() | (x.stride(1) | y.stride(1) | x.shape[0]) * x.element_size()
    return starts % 16 == 0
