"""The factored router with a few lanes of a warp to a token: every sort happens in a lane's own registers.

LANES lanes share a token. The even ones read its row of x and the odd ones its row of y, each a segment of it, and find
the k best of what they read with sorting networks on tuples of [TILE_M] tensors (networks.py). Lanes of the same row
merge their lists (shuffles, no memory), then each even lane trades with its odd neighbour and both search half of the
staircase (reference.py): the even lane the pairs whose rank in x is at most their rank in y, the odd lane the others.
Two lanes a token do the least work in all; more lanes answer sooner, which is what few tokens need.

A row passes through shared memory (words.py) in tiles of TILE_N columns; of each tile a lane first keeps one maximum a
chunk of CHUNK columns and sorts those, since the k best columns lie in the k chunks with the largest maxima, then sorts
the columns of those k chunks alone. A lane runs through its code once, so that fetching long networks takes longer than
executing them; where a tile has enough chunks, the networks are short and in loops (`_best_in_loops`).

Keys carry their own tie-break, and 32 bits of them cost less than half of 64: one instruction gives the larger of two.
A 16-bit logit fits above its column. Of an fp32 logit only the upper bits find room beside the column, which is enough
to tell all but a few apart; those few are sorted again (`_exact_keys`). The key of a pair is (sum, row, rank of the
column), in 32 bits if the low bits of the sums are zeros, as sums of bf16 logits have them, else in 64
(`_select_pairs`). Pairs of one row are sorted by this key as they come, even where rounding makes different sums equal,
and so the merges never disagree with a full sort. Pairs of one column are sorted too, unless such a rounding tie turns
two of them around; then they are sorted again.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .configs import compile_all, device_of, interpreting, kernel_input, on_nvidia, output_dtype
from .keys import float_to_key, index_bits, pack, pack_wide, unpack, unpack_wide
from .networks import best_of, bitonic, exchange, is_less, merge, merge_best, sort
from .words import (
    allocate_rows,
    copy_columns,
    copy_rows,
    hide,
    load_shared,
    load_value,
    load_words,
    partner,
    partners,
    store_row,
    store_shared,
    sync_warp,
    transpose_halves,
    turn_columns,
    unpack_word,
    wait_for_rows,
)

MAX_EXPERTS_PER_TOKEN = 32  # more would not fit in a lane's registers
TILE_BYTES = 512  # what of a row a lane has at hand at once
LOOPED_TILE = 256  # columns of a tile that loops go over, where a multiprocessor has the shared memory for it
DOUBLES = ((8, 0), (9, 0), (10, 0))  # GPUs that compare doubles as fast as integers, and have the most shared memory
TRANSPOSED_TILE = 128  # columns of a tile that several warps copy together; a program has 48 KiB for it
MIN_TILE = 64  # columns below which a tile is not worth its merge
SUM_BITS = 9  # the fraction that nearly all sums of bf16 logits need
MANY_LANES = 16  # of a token, where there are few tokens
WARPS_OF_FEW_TOKENS = 3  # that a scheduler gets, at N = 256, before two lanes a token are faster
STAGED_BYTES = 128  # of a row a lane; fewer are read straight from global memory

_compiled = set()  # the problems whose kernels are, both


@triton.jit
def _larger_halves(a, b, DTYPE: tl.constexpr):
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
def _keys_of_maxima(row, first_chunk, DTYPE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
                    VECTOR: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The keys (maximum, chunk) of CHUNKS chunks, of which `first_chunk` is at `row`."""
    PER_WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    maxima = ()  # one of each chunk: a value, or a word of two halves that are still to be compared
    for start in tl.static_range(0, CHUNKS * CHUNK * 4 // PER_WORD, VECTOR):
        words = load_words(row, start, VECTOR // 4)
        for first in tl.static_range(0, len(words), CHUNK // PER_WORD):
            if PER_WORD == 2:
                word = words[first]
                for i in tl.static_range(1, CHUNK // 2):
                    word = _larger_halves(word, words[first + i], DTYPE)
                maxima = maxima + (word,)
            else:
                chunk = ()
                for i in tl.static_range(CHUNK):
                    chunk = chunk + unpack_word(words[first + i], DTYPE)
                maxima = maxima + (_maximum(chunk),)
    keys = ()
    if PER_WORD == 1:
        keys = _keys(maxima, first_chunk, KEY, True, FP64)
    else:
        for i in tl.static_range(0, len(maxima), 2):
            chunk = first_chunk + i
            if i + 1 == len(maxima):
                keys = keys + _keys((_maximum(unpack_word(maxima[i], DTYPE)),), chunk, KEY, True, FP64)
            else:
                lows, highs = transpose_halves(maxima[i], maxima[i + 1])
                pair = _larger_halves(lows, highs, DTYPE)
                keys = keys + _keys_of_word(pair, _reversed_columns(row, chunk), DTYPE)
    return keys


@triton.jit
def _reversed_columns(like, column):
    """What `_keys_of_word` wants to be told of two columns of which `column` is the first."""
    return (0xFFFF - (tl.zeros_like(like).to(tl.int32) + column)) * 0x10001 - 0x10000


@triton.jit
def _keys_of_word(word, reversed_columns, DTYPE: tl.constexpr):
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
def keys_of_bytes(row, OFFSET: tl.constexpr, column, DTYPE: tl.constexpr, BYTES: tl.constexpr, KEY: tl.constexpr,
                 FP64: tl.constexpr):  # fmt: skip
    """The keys of BYTES (4, 8 or 16) of logits, the first of which is in `column`."""
    words = load_words(row, OFFSET, BYTES // 4)
    keys = ()
    if DTYPE.primitive_bitwidth == 16:
        reversed_columns = _reversed_columns(row, column)
        for i in tl.static_range(len(words)):
            keys = keys + _keys_of_word(words[i], reversed_columns - 0x20002 * i, DTYPE)
    else:
        for i in tl.static_range(len(words)):
            values = unpack_word(words[i], DTYPE)
            keys = keys + _keys(values, column + i * len(values), KEY, True, FP64)
    return keys


@triton.jit
def _best_of_groups(keys, K: tl.constexpr, GROUP: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr, one):
    """The K best of a tuple, descending, GROUP at a time."""
    best = ()
    for start in tl.static_range(0, len(keys), GROUP):
        group = sort(keys[start : start + GROUP], NVIDIA, FP64, one)
        best = merge(best, group, len(best), NVIDIA, FP64, one)[:K]
    return best


@triton.jit
def _keys(values, index, KEY: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """The keys of a tuple of values whose indices count up from `index`."""
    keys = ()
    for i in tl.static_range(len(values)):
        keys = keys + (pack(values[i], index + i, KEY, NVIDIA, FP64),)
    return keys


@triton.jit
def _candidates_of_tile(row, skip, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                        CHUNK: tl.constexpr, VECTOR: tl.constexpr, KEY: tl.constexpr, RAGGED: tl.constexpr,
                        FP64: tl.constexpr, one):  # fmt: skip
    """Keys (value, column) of a tile among which its K best are: all of it, or its K best chunks.

    Also, where keys hold only the upper bits of values, whether these leave in doubt which chunks are the best.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    keys, doubt = (), tl.zeros_like(skip)
    if CHUNK == 1:
        for start in tl.static_range(0, TILE_N * BYTES, VECTOR):
            keys = keys + keys_of_bytes(row, start, start // BYTES, DTYPE, VECTOR, KEY, FP64)
        if RAGGED:
            keys = skip_first(keys, skip, FP64)
    else:
        HALVED: tl.constexpr = DTYPE == tl.float32 and KEY != tl.float32
        CHUNK_KEY: tl.constexpr = _bit_length(TILE_N // CHUNK - 1) if HALVED else DTYPE
        maxima = _keys_of_maxima(row, 0, DTYPE, TILE_N // CHUNK, CHUNK, VECTOR, CHUNK_KEY, FP64)
        if HALVED:
            chunks = _best_of_groups(maxima, K + 1, GROUP, True, FP64, one)
            doubt = ((chunks[K - 1] ^ chunks[K]) >> CHUNK_KEY == 0).to(tl.int32)
            chunks = chunks[:K]
        else:  # their order does not matter
            LAST: tl.constexpr = (len(maxima) - 1) // GROUP * GROUP
            chunks = sort(maxima[LAST:], True, FP64, one)[:K]
            if LAST > 0:
                chunks = best_of(_best_of_groups(maxima[:LAST], K, GROUP, True, FP64, one), chunks, True, FP64, one)
        for i in tl.static_range(len(chunks)):
            start = unpack(chunks[i], CHUNK_KEY, FP64)[1] * CHUNK
            keys = keys + keys_of_bytes(row + start * BYTES, 0, start, DTYPE, CHUNK * BYTES, KEY, FP64)
    return keys, doubt


@triton.jit
def _best_in_loops(row, buffer, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, LISTED: tl.constexpr,
                   GROUP: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, PITCH: tl.constexpr,
                   TRANSPOSED: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr, one):  # fmt: skip
    """The keys (value, column) of the LISTED best of a tile's K best chunks, descending.

    In loops over groups of GROUP keys. The first begins with a part of the row while the rest is on its way. Also
    whether it is in doubt which chunks are the best.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    HALVED: tl.constexpr = DTYPE == tl.float32
    CHUNK_KEY: tl.constexpr = _bit_length(TILE_N // CHUNK - 1) if HALVED else DTYPE
    CHUNKS: tl.constexpr = _chunks_listed(K, GROUP, CHUNK)
    none = row & 0
    chunks = _lowest_keys(none, CHUNKS + 1 if HALVED else CHUNKS, FP64)
    for group in tl.range(TILE_N // (CHUNK * GROUP)):
        wait_for_rows(none + group, TILE_N // (CHUNK * GROUP))
        first = hide(none + group * GROUP)
        if TRANSPOSED:
            turn_columns(buffer, first * CHUNK, GROUP * CHUNK, BYTES, PITCH)
        maxima = _keys_of_maxima(row + first * (CHUNK * BYTES), first, DTYPE, GROUP, CHUNK, VECTOR, CHUNK_KEY, FP64)
        chunks = merge(chunks, sort(maxima, True, FP64, one), len(chunks), True, FP64, one)[: len(chunks)]
    doubt = ((chunks[K - 1] ^ chunks[CHUNKS]) >> CHUNK_KEY == 0).to(tl.int32) if HALVED else none

    for i in tl.static_range(0, CHUNKS, 4):  # no loop can count through registers: their numbers go behind the tile
        numbers = chunks[i] & 0xFF
        for byte in tl.static_range(1, 4):
            numbers = numbers | ((chunks[i + byte] & 0xFF) << (8 * byte))
        store_shared(row + (TILE_N * BYTES + i), numbers, 32, none == 0)
    best = _lowest_keys(none, LISTED, FP64)
    for at in tl.range(0, CHUNKS, GROUP // CHUNK):
        keys = ()
        for i in tl.static_range(0, GROUP // CHUNK, 4):
            numbers = ~load_words(row + hide(none + at), TILE_N * BYTES + i, 1)[0]
            for byte in tl.static_range(4):
                start = ((numbers >> (8 * byte)) & ((1 << min(index_bits(CHUNK_KEY), 8)) - 1)) * CHUNK
                keys = keys + keys_of_bytes(row + start * BYTES, 0, start, DTYPE, CHUNK * BYTES, KEY, FP64)
        best = merge(best, sort(keys, True, FP64, one), LISTED, True, FP64, one)[:LISTED]
    return best, doubt


@triton.constexpr_function
def _chunks_listed(k, group, chunk):
    """How many chunks `_best_in_loops` keeps: k, and as many more as it takes to fill its groups."""
    return -(-k * chunk // group) * (group // chunk)


@triton.jit
def _lowest_keys(like, COUNT: tl.constexpr, FP64: tl.constexpr):
    """A tuple of COUNT keys below all others."""
    keys = ()
    for _rank in tl.static_range(COUNT):
        keys = keys + (lowest(like, FP64),)
    return keys


@triton.constexpr_function
def _bit_length(number):
    return number.bit_length()


@triton.constexpr_function
def _gcd(a, b):
    return math.gcd(a, b)


@triton.jit
def _exact_keys(best, row, doubt, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                VECTOR: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The 64-bit keys of the K best of a tile of fp32 logits, descending, from 32-bit keys of the K + 2 best or all.

    Those hold only the upper bits of a value. The K + 1 best of them are sorted again by all bits: the K best are among
    these, unless one more has the same upper bits as the K-th. Then, and where the choice of chunks is in doubt, all
    columns are sorted by all bits, if any logit of the tile has lower bits at all.
    """
    if len(best) == K + 2:
        same = ((best[K - 1] ^ best[K]) | (best[K] ^ best[K + 1])) >> KEY == 0
        doubt = doubt | same.to(tl.int32)
    exact = ()
    for rank in tl.static_range(min(K + 1, len(best))):
        column = unpack(best[rank], KEY)[1]
        value = load_words(row + (column * 4).to(row.dtype), 0, 1)[0].to(tl.float32, bitcast=True)
        exact = exact + _keys((value,), column, tl.float32, True, FP64)
    for again in tl.static_range(2):  # neighbours seldom change places, and hardly ever more than two of them
        turned = doubt != doubt
        for rank in tl.static_range(1, len(exact)):
            turned = turned | is_less(exact[rank - 1], exact[rank], FP64)
        for _ in tl.range(tl.max(turned.to(tl.int32), 0) * (K // 2 + 1 if again else 1)):
            exact = _settle(exact, True, FP64)
    exact = exact[:K]

    lower = tl.zeros_like(doubt)
    for start in tl.range(0, tl.max(doubt, 0) * TILE_N * 4, VECTOR):
        words = load_words(row + start, 0, VECTOR // 4)
        for i in tl.static_range(len(words)):
            lower = lower | words[i]
    doubt = ((doubt != 0) & (lower & ((1 << KEY) - 1) != 0)).to(tl.int32)
    for _ in tl.range(tl.max(doubt, 0)):
        exact = _sorted_top(row, DTYPE, TILE_N, K, _gcd(TILE_N, GROUP), VECTOR, FP64)
    return exact


@triton.jit
def _sorted_top(row, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                VECTOR: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The 64-bit keys of the K best of a tile of fp32 logits, in little code."""
    best = _lowest_keys(tl.zeros_like(row).to(tl.int64), K, FP64)
    for group in tl.range(TILE_N // GROUP):
        start = hide(tl.zeros_like(row).to(tl.int32) + group * GROUP)
        keys = ()
        for offset in tl.static_range(0, GROUP * 4, VECTOR):
            keys = keys + keys_of_bytes(row + start * 4, offset, start + offset // 4, DTYPE, VECTOR, tl.float32, FP64)
        best = merge(best, sort(keys, True, FP64), K, True, FP64)[:K]
    return best


@triton.jit
def lowest(like, FP64: tl.constexpr):
    """A key below all others, of the type of `like`."""
    if like.dtype == tl.int32:
        return tl.full(like.shape, -(1 << 31) + (1 << 16), tl.int32)  # stays lowest when shifted
    elif FP64:
        return tl.full(like.shape, -0x0010000100000000, tl.int64)  # the least double that is finite
    else:
        return tl.full(like.shape, -(1 << 63) + (1 << 32), tl.int64)


@triton.jit
def skip_first(keys, skip, FP64: tl.constexpr):
    """The first `skip` keys become the lowest."""
    kept = ()
    for i in tl.static_range(len(keys)):
        kept = kept + (tl.where(i < skip, lowest(keys[i], FP64), keys[i]),)
    return kept


@triton.jit
def _shift(keys, column, FP64: tl.constexpr):
    """The keys of a tile's columns -> those of the row's, `column` further right."""
    shifted = ()
    for i in tl.static_range(len(keys)):
        if FP64 and keys[i].dtype == tl.int64:
            shifted = shifted + (tl.where(keys[i] < 0, keys[i] + column, keys[i] - column),)
        else:
            shifted = shifted + (keys[i] - column,)
    return shifted


@triton.jit
def keys_of_strided(row_ptrs, stride_n, start, COUNT: tl.constexpr, KEY: tl.constexpr, NVIDIA: tl.constexpr,
                    FP64: tl.constexpr):  # fmt: skip
    """The keys of COUNT columns from `start` on, read one by one."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (load_value(row_ptrs + (start + i).to(tl.int64) * stride_n, NVIDIA),)
    return _keys(values, start, KEY, NVIDIA, FP64)


@triton.jit
def _sorted_group(row_ptrs, stride_n, first_column, start, skip, COUNT: tl.constexpr, KEY: tl.constexpr,
                  RAGGED: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The sorted keys of COUNT columns of a segment from `start` on."""
    keys = keys_of_strided(row_ptrs, stride_n, first_column + start, COUNT, KEY, NVIDIA, FP64)
    if RAGGED:
        keys = skip_first(keys, skip - start, FP64)
    return sort(keys, NVIDIA, FP64)


@triton.jit
def _top_of_strided_segment(row_ptrs, stride_n, first_column, skip, SEGMENT: tl.constexpr, K: tl.constexpr,
                            GROUP: tl.constexpr, KEY: tl.constexpr, RAGGED: tl.constexpr, NVIDIA: tl.constexpr,
                            FP64: tl.constexpr):  # fmt: skip
    """The keys (value, column) of the K best columns of a segment, descending."""
    FIRST: tl.constexpr = min(GROUP, SEGMENT)
    TAIL: tl.constexpr = (SEGMENT - FIRST) % GROUP
    best = _sorted_group(row_ptrs, stride_n, first_column, 0, skip, FIRST, KEY, RAGGED, NVIDIA, FP64)[:K]
    for start in tl.range(GROUP, SEGMENT - TAIL, GROUP):
        more = _sorted_group(row_ptrs, stride_n, first_column, start, skip, GROUP, KEY, RAGGED, NVIDIA, FP64)
        best = merge(best, more, K, NVIDIA, FP64)[:K]
    if TAIL > 0:
        tail = _sorted_group(
            row_ptrs, stride_n, first_column, SEGMENT - TAIL, skip, TAIL, KEY, RAGGED, NVIDIA, FP64
        )  # fmt: skip
        best = merge(best, tail, K, NVIDIA, FP64)[:K]
    return best


@triton.constexpr_function
def _first_pair(rank, k, ranks):
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
        turned = odd & False
        for a in tl.static_range(SIDE):
            for i in tl.static_range(_first_pair(a, K, RANKS) + 1, _first_pair(a + 1, K, RANKS)):
                turned = turned | is_less(keys[i - 1], keys[i], FP64)
        for _ in tl.range(tl.max(turned.to(tl.int32), 0) * (RANKS // 2 + 1)):
            keys = _settle_rows(keys, RANKS, K, SIDE, NVIDIA, FP64)

    best = ()
    for a in tl.static_range(SIDE):
        row = keys[_first_pair(SIDE - 1 - a, K, RANKS) : _first_pair(SIDE - a, K, RANKS)]
        best = merge(row, best, len(row), NVIDIA, FP64, one)[:K]
    return best, lost


@triton.jit
def _settle(keys, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """Two steps of an odd-even transposition sort."""
    for first in tl.static_range(2):
        settled = keys[:first]
        for i in tl.static_range(first, len(keys) - 1, 2):
            settled = settled + exchange(keys[i], keys[i + 1], NVIDIA, FP64)
        keys = settled + keys[len(settled) :]
    return keys


@triton.jit
def _settle_rows(keys, RANKS: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, NVIDIA: tl.constexpr,
                 FP64: tl.constexpr):  # fmt: skip
    """`_settle` for every row of a lane's half of the staircase."""
    settled = ()
    for a in tl.static_range(SIDE):
        settled = settled + _settle(keys[_first_pair(a, K, RANKS) : _first_pair(a + 1, K, RANKS)], NVIDIA, FP64)
    return settled


@triton.jit
def _select_pairs(best, poison, odd, columns, NUM_EXPERT_SQRT: tl.constexpr, RANKS: tl.constexpr,
                  K: tl.constexpr, SIDE: tl.constexpr, SPLIT: tl.constexpr, KEY: tl.constexpr,
                  ROW_BITS: tl.constexpr, NARROW: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr,
                  one):  # fmt: skip
    """Scores and indices of the K best pairs, of which each lane gets half if SPLIT, and whether NARROW keys failed.

    A key holds the sum above the row above the rank of the column, each so that the lower one wins among equals. Wide
    ones take the column along; NARROW ones, of 32 bits, leave it in shared memory: `columns`, by rank.
    """
    RANK_BITS: tl.constexpr = _bit_length(RANKS - 1)
    ROW_AT: tl.constexpr = RANK_BITS if NARROW else 31 - ROW_BITS
    RANK_AT: tl.constexpr = 0 if NARROW else ROW_BITS
    ROW_MASK: tl.constexpr = (1 << (_bit_length(NUM_EXPERT_SQRT - 1) if NARROW else ROW_BITS)) - 1
    # The even lane, of x, gives the row and the odd lane the rest: an index times a factor plus an offset, which takes
    # multiply-adds, while other integer instructions wait for each other.
    factor = tl.where(odd, 0 if NARROW else 1, -(1 << ROW_AT))
    offset = tl.where(odd, (RANKS - 1) << RANK_AT, ROW_MASK << ROW_AT)
    step = tl.where(odd, 1 << RANK_AT, 0)
    values, ids = (), ()
    for rank in tl.static_range(RANKS):
        value, index = unpack(best[rank], KEY, FP64)
        values, ids = values + (value + poison,), ids + (index * factor + (offset - rank * step),)
    ID_BITS: tl.constexpr = _bit_length(ROW_MASK << ROW_AT) if NARROW else 31
    half, lost = _half_staircase(
        values, ids, partners(values, 1, NVIDIA), partners(ids, 1, NVIDIA), odd, RANKS, K, SIDE, ID_BITS, NVIDIA, FP64,
        one,
    )  # fmt: skip
    other_half = partners(half, 1, NVIDIA)
    if SPLIT:  # a bitonic merge, of which the even lane finishes the better half and the odd lane the other
        kept = best_of(half, other_half, NVIDIA, FP64, one)
        pairs = ()
        for slot in tl.static_range(K // 2):
            chosen = is_less(kept[slot], kept[slot + K // 2], FP64) ^ odd
            pairs = pairs + (tl.where(chosen, kept[slot + K // 2], kept[slot]),)
        pairs = bitonic(pairs, NVIDIA, FP64, one)
    else:
        pairs = merge(half, other_half, len(half), NVIDIA, FP64, one)[:K]

    scores, indices = (), ()
    for slot in tl.static_range(len(pairs)):
        if NARROW:
            score, reversed_low = unpack(pairs[slot], ID_BITS)
            low = (1 << ID_BITS) - 1 - reversed_low
            rank = RANKS - 1 - (low & ((1 << RANK_BITS) - 1))
            column = load_shared(columns + rank * 4, False)
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


@triton.jit
def _copy_tile(buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted,
               TILE_N: tl.constexpr, VECTOR: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr,
               TRANSPOSED: tl.constexpr, PRIORITY: tl.constexpr):  # fmt: skip
    """Start copying the tile of every lane's segment that begins at a column of it, if wanted."""
    BYTES: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    wanted = wanted.to(tl.int32)
    if TRANSPOSED:
        copy_columns(
            buffer, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column, wanted, TILE_N, PITCH, PARTS,
            PRIORITY,
        )  # fmt: skip
    else:
        address = segment + (column * BYTES).to(tl.int64)
        copy_rows(buffer, address, wanted, TILE_N * BYTES, VECTOR, PITCH, PARTS, PRIORITY)


@triton.jit(do_not_specialize=["num_tokens"])
def lanes_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    NUM_EXPERT_SQRT: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr,
    LANES: tl.constexpr, SEGMENT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, VECTOR: tl.constexpr, STAGED: tl.constexpr, TRANSPOSED: tl.constexpr, PRIORITY: tl.constexpr,
    LOOPED: tl.constexpr, HALVED: tl.constexpr, NARROW: tl.constexpr, ADDED: tl.constexpr, ROW_BITS: tl.constexpr,
    NVIDIA: tl.constexpr, FP64: tl.constexpr,
):  # fmt: skip
    RANKS: tl.constexpr = min(K, NUM_EXPERT_SQRT)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    lane = tl.arange(0, TILE_M)
    odd = lane % 2 == 1
    one = lane * 0 + tl.minimum(num_tokens, 1).to(tl.int32) if ADDED else None  # as far as a compiler can know
    stride_n = tl.where(odd, stride_yn, stride_xn)
    # Where segments do not divide the row, the last ones begin early and skip what others have read.
    RAGGED: tl.constexpr = LANES // 2 * SEGMENT != NUM_EXPERT_SQRT
    first_column = tl.minimum(lane % LANES // 2 * SEGMENT, NUM_EXPERT_SQRT - SEGMENT)
    skip = lane % LANES // 2 * SEGMENT - first_column
    OWN: tl.constexpr = min(RANKS, SEGMENT)
    TILES: tl.constexpr = SEGMENT // max(TILE_N, 1)

    first_token = tl.program_id(0).to(tl.int64) * (TILE_M // LANES)
    tokens = first_token + lane // LANES
    inside = tokens < num_tokens
    read = tl.minimum(tokens, num_tokens - 1)  # lanes past the end route the last token again, and store nothing
    x_ptrs, y_ptrs = x_ptr + read * stride_xm, y_ptr + read * stride_ym
    row_ptrs = tl.where(odd, y_ptrs, x_ptrs)
    if TILE_N > 0:
        segment = row_ptrs.to(tl.int64) + first_column * BYTES
        if STAGED:
            # Rows an odd number of vectors apart meet every bank once.
            BEHIND: tl.constexpr = _chunks_listed(OWN, GROUP, CHUNK) if LOOPED else 0
            VECTORS: tl.constexpr = (TILE_N * BYTES + BEHIND + VECTOR - 1) // VECTOR
            PITCH: tl.constexpr = (VECTORS + 1 - VECTORS % 2) * VECTOR
            buffer = allocate_rows(lane, TILE_M * PITCH)
            PARTS: tl.constexpr = TILE_N // (CHUNK * GROUP) if LOOPED else 1
            _copy_tile(
                buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, lane * 0, lane >= 0,
                TILE_N, VECTOR, PITCH, PARTS, TRANSPOSED, PRIORITY,
            )  # fmt: skip
        # Where 32-bit keys do for fp32 logits, nearly always, two more than K tell.
        SORT_KEY: tl.constexpr = _bit_length(TILE_N - 1) if HALVED else DTYPE
        LISTED: tl.constexpr = min(OWN + 2, TILE_N) if HALVED else OWN
        best = _lowest_keys(lane.to(tl.int64) if DTYPE == tl.float32 else lane, OWN, FP64)
        for step in tl.range(TILES):
            # Hidden, or LLVM would count the columns in 64 bits, and sort keys of 64 bits to subtract them from.
            column = hide(lane * 0 + step * TILE_N)
            row = segment + column * BYTES
            if STAGED:
                row = buffer + lane * PITCH
                if not LOOPED:
                    wait_for_rows(lane * 0, 1)
                    if TRANSPOSED:
                        turn_columns(buffer, 0, TILE_N, BYTES, PITCH)
            if LOOPED:
                more, doubt = _best_in_loops(
                    row, buffer, DTYPE, TILE_N, OWN, LISTED, GROUP, CHUNK, VECTOR, PITCH, TRANSPOSED, SORT_KEY, FP64,
                    one,
                )  # fmt: skip
            else:
                keys, doubt = _candidates_of_tile(
                    row, skip - column, DTYPE, TILE_N, OWN, GROUP, CHUNK, VECTOR, SORT_KEY, RAGGED, FP64, one
                )  # fmt: skip
            if HALVED:
                more = more if LOOPED else _best_of_groups(keys, LISTED, GROUP, NVIDIA, FP64, one)
                more = _exact_keys(more, row, doubt, DTYPE, TILE_N, OWN, GROUP, VECTOR, SORT_KEY, FP64)
            if STAGED and TILES > 1:  # where the tile is not read again
                _copy_tile(
                    buffer, segment, x_ptr, y_ptr, stride_xn, stride_yn, first_token, num_tokens, column + TILE_N,
                    lane * 0 + step + 1 < TILES, TILE_N, VECTOR, PITCH, PARTS, TRANSPOSED, PRIORITY,
                )  # fmt: skip
            if not (LOOPED or HALVED):
                more = _best_of_groups(keys, OWN, GROUP, NVIDIA, FP64, one)
            if TILES == 1:
                best = more
            else:
                best = merge(best, _shift(more, column, FP64), OWN, NVIDIA, FP64, one)[:OWN]
        if LANES > 2:
            best = _shift(best, first_column, FP64)
    else:
        best = _top_of_strided_segment(
            row_ptrs, stride_n, first_column, skip, SEGMENT, OWN, GROUP, DTYPE, RAGGED, NVIDIA, FP64
        )  # fmt: skip
    for level in tl.static_range(1, 5):
        if LANES > 1 << level:
            best = merge_best(
                best, partners(best, 1 << level, NVIDIA), min(RANKS, 2 * len(best)), NVIDIA, FP64, one
            )  # fmt: skip
    # Each lane looks at one of the two ways they may meet; its NaN reaches the other lane with its values.
    first, last = unpack(best[0], DTYPE, FP64)[0], unpack(best[RANKS - 1], DTYPE, FP64)[0]
    widest = first + partner(last, 1, NVIDIA)
    poison = tl.where(widest == widest, 0.0, float("nan"))
    # Where all pairs of a lane may be among the K best, and K is a power of two, its neighbour finishes half of them.
    SPLIT: tl.constexpr = K > 1 and K & (K - 1) == 0 and _first_pair(SIDE, K, RANKS) >= K
    columns = lane
    if NARROW:
        columns = buffer + (lane | 1) * PITCH
        for rank in tl.static_range(RANKS):
            column = unpack(best[rank], DTYPE, FP64)[1]
            store_shared(buffer + lane * PITCH + rank * 4, column, 32, lane >= 0)
        sync_warp(lane)
    scores, indices, lost = _select_pairs(
        best, poison, odd, columns, NUM_EXPERT_SQRT, RANKS, K, SIDE, SPLIT, DTYPE, ROW_BITS, NARROW, NVIDIA, FP64,
        one,
    )  # fmt: skip
    if NARROW:
        for _ in tl.range(tl.max(lost, 0)):
            again = ()
            for rank in tl.static_range(RANKS):
                again = again + (hide(best[rank]),)  # or what both ways have in common would stay in registers
            scores, indices, lost = _select_pairs(
                again, poison, odd, columns, NUM_EXPERT_SQRT, RANKS, K, SIDE, SPLIT, DTYPE, ROW_BITS, False, NVIDIA,
                FP64, None,
            )  # fmt: skip

    SLOTS: tl.constexpr = K // 2 if SPLIT else K
    writes = inside & (lane % LANES < (2 if SPLIT else 1))
    outputs = tokens * K + (lane % 2 * SLOTS if SPLIT else 0)
    rounded = ()
    for slot in tl.static_range(SLOTS):
        rounded = rounded + (scores[slot].to(scores_ptr.dtype.element_ty),)
    store_row(scores_ptr + outputs, rounded, writes, NVIDIA)
    store_row(indices_ptr + outputs, indices, writes, NVIDIA)

    ordinary = inside & (poison == 0.0) & (first < float("inf")) & (partner(first, 1, NVIDIA) < float("inf"))
    fill = ordinary & (scores[SLOTS - 1] == float("-inf"))
    if tl.max(fill.to(tl.int32), 0) != 0:
        num_finite = tl.zeros_like(lane)
        for slot in tl.static_range(SLOTS):
            num_finite += (scores[slot] > float("-inf")).to(tl.int32)
        if SPLIT:
            num_finite += partner(num_finite, 1, NVIDIA)
        tl.debug_barrier()  # after the neighbour's stores
        fill_masked(
            x_ptrs, y_ptrs, indices_ptr + tokens * K, stride_xn, stride_yn, num_finite,
            ordinary & (lane % LANES == 0), NUM_EXPERT_SQRT, K, NVIDIA,
        )  # fmt: skip


def lanes_forward(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype):
    """Scores and indices of the k best experts; results as `reference.factored_router`, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on an NVIDIA GPU from Ampere on (or on
            the CPU under Triton's interpreter), at least one token, N as far as `runs_on` says. Any strides, but
            logits are read one at a time unless rows are contiguous, 4-byte aligned and a multiple of a tile long, or
            `columns_are_vectors`, rows are a multiple of 128 bytes, and there are many tokens.
        num_experts_per_token: k, from 1 to MAX_EXPERTS_PER_TOKEN.
        scores_dtype: fp32, fp16 or bf16.

    Returns:
        scores (num_tokens, k) in scores_dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, device = num_experts_per_token, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(scores_dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    problem = num_expert_sqrt, k, x.dtype, row_alignment(x, y), compares_doubles(device), columns_are_vectors(x, y)
    args = x, y, scores, indices, *x.stride(), *y.stride(), num_tokens
    lanes = lanes_per_token(num_tokens, num_expert_sqrt, x.element_size(), device)
    with device_of(x):
        constants = _constants(*problem, lanes)
        if (device, scores_dtype, *problem) not in _compiled and not interpreting():
            _compiled.add((device, scores_dtype, *problem))
            # No later number of tokens shall have to wait for its kernel.
            kinds = {2, lanes_per_token(1, num_expert_sqrt, x.element_size(), device)}
            if len(kinds) > 1:
                compile_all(lanes_kernel, args, [_constants(*problem, kind) for kind in kinds])
        lanes_kernel[(-(-num_tokens * lanes // constants["TILE_M"]),)](*args, **constants)
    return scores.to(scores_dtype), indices


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


@functools.cache
def _constants(num_expert_sqrt, k, dtype, alignment, fp64, transposed, lanes):
    """The kernel's constants: among them how a lane reads its segment, in tiles, or logit by logit (TILE_N = 0).

    alignment: of the rows, in bytes; 0 where their logits do not lie side by side. transposed: `columns_are_vectors`.
    Short segments come straight from global memory, where a staged copy would only add its latency.
    """
    itemsize = dtype.itemsize
    row = num_expert_sqrt * itemsize
    transposed = transposed and lanes == 2 and row % 128 == 0
    vector = 16 if transposed else min(alignment, row & -row)  # bytes of a load
    ranks = min(k, num_expert_sqrt)
    group = min(32, max(8, 1 << (ranks - 1).bit_length()))
    reading = {"SEGMENT": -(-num_expert_sqrt // (lanes // 2)), "TILE_N": 0, "CHUNK": 1, "VECTOR": 0}
    staged = looped = halved = False
    if vector >= 4 and not interpreting():
        step = vector // itemsize
        segment = -(-num_expert_sqrt // (lanes // 2 * step)) * step
        ragged = lanes // 2 * segment != num_expert_sqrt
        staged, halved = segment * itemsize >= STAGED_BYTES, dtype == torch.float32 and not ragged

        def widest_tile(columns):
            columns, unit = (min(columns, TRANSPOSED_TILE), 128 // itemsize) if transposed else (columns, step)
            return next(n for n in range(min(segment, columns), 0, -1) if segment % n == 0 and n % unit == 0)

        tile_n, chunk = widest_tile(LOOPED_TILE if itemsize == 2 or fp64 else TILE_BYTES // 4), 4
        looped = staged and not ragged and vector >= 4 * itemsize and group >= 16 and (itemsize == 2 or k <= 16)
        looped = looped and tile_n >= 8 * k and tile_n % (4 * group) == 0
        if not looped:
            tile_n = widest_tile(TILE_BYTES // itemsize // (2 if k > 16 else 1))
            chunks = (c for c in (4, 2) if 4 <= c * itemsize <= vector and tile_n % c == 0 and tile_n >= 2 * c * k)
            chunk = 1 if ragged else next(chunks, 1)
        if tile_n >= min(segment, MIN_TILE):
            reading = {"SEGMENT": segment, "TILE_N": tile_n, "CHUNK": chunk, "VECTOR": vector}
        else:
            staged = looped = halved = False
    transposed = transposed and staged
    # A pair's sum may share 32 bits with row and rank where that leaves it the bits that sums of such logits have.
    sum_bits = 23 - (num_expert_sqrt - 1).bit_length() - (ranks - 1).bit_length()
    narrow = dtype == torch.bfloat16 and staged and k <= 16 and sum_bits >= SUM_BITS
    narrow = narrow and reading["TILE_N"] * itemsize >= 4 * ranks
    # Two warps a program run closer together and share more of the code they fetch, which long code gains from.
    warps = 2 if staged and itemsize == 2 and reading["TILE_N"] * itemsize == TILE_BYTES else 1
    warps = 8 // itemsize if transposed else warps  # whose tokens fill a cache line of a column
    return {
        "NUM_EXPERT_SQRT": num_expert_sqrt, "K": k, "SIDE": min(math.isqrt(k), num_expert_sqrt), "LANES": lanes,
        "GROUP": group, "TILE_M": 1024 if interpreting() else warps * 32, **reading,
        "STAGED": staged, "TRANSPOSED": transposed, "PRIORITY": "evict_first", "LOOPED": looped, "HALVED": halved,
        "NARROW": narrow, "ADDED": staged and lanes == 2 and k <= 16, "ROW_BITS": _row_bits(k),
        "NVIDIA": not interpreting(), "FP64": fp64, "num_warps": warps,
    }  # fmt: skip


def _row_bits(k):
    """Row, rank and column of a pair share 31 bits."""
    return (31 - (k - 1).bit_length()) // 2


def lanes_per_token(num_tokens, num_expert_sqrt, itemsize, device):
    """How many lanes share a token: many while that leaves a scheduler few warps, more of them where rows are long."""
    few_tokens = num_tokens * MANY_LANES <= _num_lanes(device) * WARPS_OF_FEW_TOKENS * (num_expert_sqrt / 256) ** 0.5
    longest = num_expert_sqrt * itemsize // 8  # 16 bytes of a row a lane, at least
    return max(2, min(MANY_LANES, 1 << longest.bit_length() >> 1)) if few_tokens else 2


@functools.cache
def _num_lanes(device):
    """The lanes of a GPU whose every scheduler, four in a multiprocessor, has one warp; in the interpreter, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count * 4 * 32 if device.type == "cuda" else 64


def runs_on(device, num_expert_sqrt, num_experts_per_token):
    """Whether this kernel takes the size, and the device: NVIDIA GPUs from Ampere on, or the interpreter."""
    fits = num_experts_per_token <= MAX_EXPERTS_PER_TOKEN and num_expert_sqrt <= 1 << _row_bits(num_experts_per_token)
    return fits and (interpreting() or on_nvidia(device))


@functools.cache
def compares_doubles(device):
    """Whether this GPU compares doubles as fast as integers: those for data centers do. The interpreter never does."""
    return not interpreting() and on_nvidia(device) and torch.cuda.get_device_capability(device) in DOUBLES
