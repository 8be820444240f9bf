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

import math

import triton
import triton.language as tl

from .keys import bit_length, index_bits, lowest, pack, unpack
from .networks import best_of, is_turned, merge, settle, sort
from .words import (
    hide,
    load_value,
    load_words,
    store_shared,
    transpose_halves,
    turn_columns,
    unpack_word,
    wait_for_rows,
)


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
        words = load_words(row + start, VECTOR // 4)
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
def keys_of_columns(row, column, COUNT: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, KEY: tl.constexpr,
                    FP64: tl.constexpr):  # fmt: skip
    """The keys of COUNT logits at an address, the first of which is in `column`, read VECTOR bytes at once."""
    PER_WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    words = ()
    for start in tl.static_range(0, COUNT * 4 // PER_WORD, VECTOR):
        words = words + load_words(row + start, VECTOR // 4)
    keys = ()
    if PER_WORD == 2:
        reversed_columns = _reversed_columns(row, column)
        for i in tl.static_range(len(words)):
            keys = keys + _keys_of_word(words[i], reversed_columns - 0x20002 * i, DTYPE)
    else:
        values = ()
        for i in tl.static_range(len(words)):
            values = values + unpack_word(words[i], DTYPE)
        keys = _keys(values, column, KEY, True, FP64)
    return keys


@triton.jit
def keys_of_strided(row_ptrs, stride_n, start, COUNT: tl.constexpr, KEY: tl.constexpr, NVIDIA: tl.constexpr,
                    FP64: tl.constexpr):  # fmt: skip
    """The keys of COUNT columns from `start` on, read one by one."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (load_value(row_ptrs + (start + i).to(tl.int64) * stride_n, NVIDIA),)
    return _keys(values, start, KEY, NVIDIA, FP64)


@triton.jit
def _keys(values, index, KEY: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):
    """The keys of a tuple of values whose indices count up from `index`."""
    keys = ()
    for i in tl.static_range(len(values)):
        keys = keys + (pack(values[i], index + i, KEY, NVIDIA, FP64),)
    return keys


@triton.jit
def skip_first(keys, skip, FP64: tl.constexpr):
    """The first `skip` keys become the lowest."""
    kept = ()
    for i in tl.static_range(len(keys)):
        kept = kept + (tl.where(i < skip, lowest(keys[i], FP64), keys[i]),)
    return kept


@triton.jit
def shift(keys, column, FP64: tl.constexpr):
    """The keys of a tile's columns -> those of the row's, `column` further right."""
    shifted = ()
    for i in tl.static_range(len(keys)):
        if FP64 and keys[i].dtype == tl.int64:
            shifted = shifted + (tl.where(keys[i] < 0, keys[i] + column, keys[i] - column),)
        else:
            shifted = shifted + (keys[i] - column,)
    return shifted


@triton.jit
def lowest_keys(like, COUNT: tl.constexpr, FP64: tl.constexpr):
    """A tuple of COUNT keys below all others."""
    keys = ()
    for _rank in tl.static_range(COUNT):
        keys = keys + (lowest(like, FP64),)
    return keys


@triton.jit
def best_of_groups(keys, K: tl.constexpr, GROUP: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr, one):
    """The K best of a tuple, descending, GROUP at a time."""
    best = ()
    for start in tl.static_range(0, len(keys), GROUP):
        group = sort(keys[start : start + GROUP], K, NVIDIA, FP64, one)
        best = merge(best + group, len(best), K, NVIDIA, FP64, one)
    return best


@triton.jit
def candidates_of_tile(row, skip, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                        CHUNK: tl.constexpr, VECTOR: tl.constexpr, KEY: tl.constexpr, RAGGED: tl.constexpr,
                        FP64: tl.constexpr, one):  # fmt: skip
    """Keys (value, column) of a tile among which its K best are: all of it, or its K best chunks.

    Also, where keys hold only the upper bits of values, whether these leave in doubt which chunks are the best.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    none = tl.zeros_like(skip)
    keys, doubt = (), none
    if CHUNK == 1:
        keys = keys_of_columns(row, none, TILE_N, DTYPE, VECTOR, KEY, FP64)
        if RAGGED:
            keys = skip_first(keys, skip, FP64)
    else:
        HALVED: tl.constexpr = DTYPE == tl.float32 and KEY != tl.float32
        CHUNK_KEY: tl.constexpr = bit_length(TILE_N // CHUNK - 1) if HALVED else DTYPE
        maxima = _keys_of_maxima(row, none, DTYPE, TILE_N // CHUNK, CHUNK, VECTOR, CHUNK_KEY, FP64)
        if HALVED:
            chunks = best_of_groups(maxima, K + 1, GROUP, True, FP64, one)
            doubt = ((chunks[K - 1] ^ chunks[K]) >> CHUNK_KEY == 0).to(tl.int32)
            chunks = chunks[:K]
        else:  # their order does not matter
            LAST: tl.constexpr = (len(maxima) - 1) // GROUP * GROUP
            chunks = sort(maxima[LAST:], K, True, FP64, one)
            if LAST > 0:
                first_chunks = best_of_groups(maxima[:LAST], K, GROUP, True, FP64, one)
                chunks = best_of(first_chunks + chunks, len(first_chunks), True, FP64, one)
        for i in tl.static_range(len(chunks)):
            start = unpack(chunks[i], CHUNK_KEY, FP64)[1] * CHUNK
            keys = keys + keys_of_columns(row + start * BYTES, start, CHUNK, DTYPE, CHUNK * BYTES, KEY, FP64)
    return keys, doubt


@triton.jit
def best_in_loops(row, buffer, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, LISTED: tl.constexpr,
                   GROUP: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, PITCH: tl.constexpr,
                   TRANSPOSED: tl.constexpr, KEY: tl.constexpr, FP64: tl.constexpr, one):  # fmt: skip
    """The keys (value, column) of the LISTED best of a tile's K best chunks, descending.

    In loops over groups of GROUP keys. The first begins with a part of the row while the rest is on its way. Also
    whether it is in doubt which chunks are the best.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    HALVED: tl.constexpr = DTYPE == tl.float32
    CHUNK_KEY: tl.constexpr = bit_length(TILE_N // CHUNK - 1) if HALVED else DTYPE
    CHUNKS: tl.constexpr = chunks_listed(K, GROUP, CHUNK)
    none = row & 0
    chunks = lowest_keys(none, CHUNKS + 1 if HALVED else CHUNKS, FP64)
    for group in tl.range(TILE_N // (CHUNK * GROUP)):
        wait_for_rows(none + group, TILE_N // (CHUNK * GROUP))
        first = hide(none + group * GROUP)
        if TRANSPOSED:
            turn_columns(buffer, first * CHUNK, GROUP * CHUNK, BYTES, PITCH)
        maxima = _keys_of_maxima(row + first * (CHUNK * BYTES), first, DTYPE, GROUP, CHUNK, VECTOR, CHUNK_KEY, FP64)
        more = sort(maxima, len(chunks), True, FP64, one)
        chunks = merge(chunks + more, len(chunks), len(chunks), True, FP64, one)
    doubt = ((chunks[K - 1] ^ chunks[CHUNKS]) >> CHUNK_KEY == 0).to(tl.int32) if HALVED else none

    for i in tl.static_range(0, CHUNKS, 4):  # no loop can count through registers: their numbers go behind the tile
        numbers = chunks[i] & 0xFF
        for byte in tl.static_range(1, 4):
            numbers = numbers | ((chunks[i + byte] & 0xFF) << (8 * byte))
        store_shared(row + (TILE_N * BYTES + i), numbers, 32, none == 0)
    best = lowest_keys(none, LISTED, FP64)
    for at in tl.range(0, CHUNKS, GROUP // CHUNK):
        keys = ()
        for i in tl.static_range(0, GROUP // CHUNK, 4):
            numbers = ~load_words(row + hide(none + at) + (TILE_N * BYTES + i), 1)[0]
            for byte in tl.static_range(4):
                start = ((numbers >> (8 * byte)) & ((1 << min(index_bits(CHUNK_KEY), 8)) - 1)) * CHUNK
                keys = keys + keys_of_columns(row + start * BYTES, start, CHUNK, DTYPE, CHUNK * BYTES, KEY, FP64)
        best = merge(best + sort(keys, LISTED, True, FP64, one), LISTED, LISTED, True, FP64, one)
    return best, doubt


@triton.constexpr_function
def chunks_listed(k, group, chunk):
    """How many chunks `best_in_loops` keeps: k, and as many more as it takes to fill its groups."""
    return -(-k * chunk // group) * (group // chunk)


@triton.constexpr_function
def _gcd(a, b):
    return math.gcd(a, b)


@triton.jit
def exact_keys(best, row, doubt, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
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
        value = load_words(row + (column * 4).to(row.dtype), 1)[0].to(tl.float32, bitcast=True)
        exact = exact + _keys((value,), column, tl.float32, True, FP64)
    while tl.max(is_turned(exact, True, FP64), 0) != 0:  # neighbours seldom change places
        exact = settle(exact, True, FP64)
    exact = exact[:K]

    lower = tl.zeros_like(doubt)
    for start in tl.range(0, tl.max(doubt, 0) * TILE_N * 4, VECTOR):
        words = load_words(row + start, VECTOR // 4)
        for i in tl.static_range(len(words)):
            lower = lower | words[i]
    doubt = ((doubt != 0) & (lower & ((1 << KEY) - 1) != 0)).to(tl.int32)
    FEW: tl.constexpr = _gcd(TILE_N, GROUP if GROUP <= 16 else 8)  # code that seldom runs shall be short
    for _ in tl.range(tl.max(doubt, 0)):
        exact = _sorted_top(row, DTYPE, TILE_N, K, FEW, VECTOR, FP64)
    return exact


@triton.jit
def _sorted_top(row, DTYPE: tl.constexpr, TILE_N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                VECTOR: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The 64-bit keys of the K best of a tile of fp32 logits, in little code."""
    best = lowest_keys(tl.zeros_like(row).to(tl.int64), K, FP64)
    for group in tl.range(TILE_N // GROUP):
        start = hide(tl.zeros_like(row).to(tl.int32) + group * GROUP)
        keys = keys_of_columns(row + start * 4, start, GROUP, DTYPE, VECTOR, tl.float32, FP64)
        best = merge(best + sort(keys, K, True, FP64), K, K, True, FP64)
    return best


@triton.jit
def top_of_strided_segment(row_ptrs, stride_n, first_column, skip, SEGMENT: tl.constexpr, K: tl.constexpr,
                            GROUP: tl.constexpr, RAGGED: tl.constexpr, NVIDIA: tl.constexpr,
                            FP64: tl.constexpr):  # fmt: skip
    """The keys (value, column) of the K best columns of a segment, descending."""
    FIRST: tl.constexpr = min(GROUP, SEGMENT)
    TAIL: tl.constexpr = (SEGMENT - FIRST) % GROUP
    best = sorted_group(row_ptrs, stride_n, first_column, skip, FIRST, K, 0, RAGGED, NVIDIA, FP64)
    for start in tl.range(GROUP, SEGMENT - TAIL, GROUP):
        more = sorted_group(row_ptrs, stride_n, first_column + start, skip - start, GROUP, K, 0, RAGGED, NVIDIA, FP64)
        best = merge(best + more, K, K, NVIDIA, FP64)
    if TAIL > 0:
        start = SEGMENT - TAIL
        tail = sorted_group(row_ptrs, stride_n, first_column + start, skip - start, TAIL, K, 0, RAGGED, NVIDIA, FP64)
        best = merge(best + tail, K, K, NVIDIA, FP64)
    return best


@triton.jit
def sorted_group(row_ptrs, stride_n, column, skip, COUNT: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr,
                 RAGGED: tl.constexpr, NVIDIA: tl.constexpr, FP64: tl.constexpr):  # fmt: skip
    """The keys of the K best of COUNT columns, descending, read VECTOR bytes at once or (0) one by one.

    If RAGGED, the first `skip` of them do not count.
    """
    DTYPE: tl.constexpr = row_ptrs.dtype.element_ty
    if VECTOR > 0:
        row = row_ptrs.to(tl.int64) + column * (DTYPE.primitive_bitwidth // 8)
        keys = keys_of_columns(row, column, COUNT, DTYPE, VECTOR, DTYPE, FP64)
    else:
        keys = keys_of_strided(row_ptrs, stride_n, column, COUNT, DTYPE, NVIDIA, FP64)
    if RAGGED:
        keys = skip_first(keys, skip, FP64)
    return sort(keys, K, NVIDIA, FP64)


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
