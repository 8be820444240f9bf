"""How a lane that owns a row, or a part of one, reads and writes it: 16 bytes at a time, staged through shared memory.

Neighbouring lanes own neighbouring rows, so their plain loads would touch 32 cache lines at once. Instead the 32
lanes of a warp copy their 32 rows together (cp.async, coalesced) into shared memory, rows an odd number of vectors
apart so that reading down the rows meets every bank once. A warp shares its rows with nobody and waits for nobody else,
except of transposed logits: of these the warps of a program copy columns together, and turn them around there.

Triton offers no such copy, and it chooses a tensor's layout from the loads and stores it meets, searching everything
connected to them: for kernels of thousands of operations that search alone takes minutes. So on NVIDIA GPUs these
functions are the PTX instructions themselves. Elsewhere (the interpreter runs no PTX) they are plain loads.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def operands(constraint, count):
    """The constraints of `count` operands of an operation in PTX."""
    return ",".join([constraint] * count)


@triton.constexpr_function
def copies(value, count):
    """A tuple of the same."""
    return (value,) * count


@triton.constexpr_function
def register(bits):
    """The constraint of an operand of that many bits."""
    return {16: "h", 32: "r", 64: "l"}[bits]


@triton.constexpr_function
def space_of(address):
    """The memory that an address of that dtype is of."""
    return "shared" if address == tl.int32 else "global"


@triton.constexpr_function
def vector(names, bits=32):
    """What the name of a load or store of some registers ends in, and the operand that they are."""
    return (f"v{len(names)}.b{bits}", "{" + ", ".join(names) + "}") if len(names) > 1 else (f"b{bits}", names[0])


@triton.jit
def _execute(CODE, CONSTRAINTS, args):
    """Run PTX for what it does. Triton wants a result, $0; the arguments are behind it."""
    tl.inline_asm_elementwise(f"{{ {CODE} mov.u32 $0, 0; }}", "=r," + CONSTRAINTS, args, tl.int32, False, 1)


@triton.jit
def allocate_rows(like, BYTES):
    """Shared memory for this program: its address, in every thread of `like`.

    The factor, 1 in a way that is not known beforehand, keeps the address out of the registers that the lanes of a warp
    share. From there the assembler of Triton 3.6 makes illegal instructions of copies that have a cache policy.
    """
    return tl.inline_asm_elementwise(
        f"""{{
        .shared .align 16 .b8 rows[{BYTES}];
        .reg .b32 lane, same;
        mov.u32 lane, %laneid;
        shfl.sync.idx.b32 same, lane, lane, 31, 0xffffffff;
        sub.s32 same, same, lane;
        add.s32 same, same, 1;
        mov.u32 $0, rows;
        mul.lo.s32 $0, $0, same;
        }}""",
        "=r,r", [like], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def copy_rows(buffer, address, wanted, PLAN):
    """Start copying the tile at every lane's global address into shared memory, a vector at a time.

    buffer: the program's shared memory, where thread i finds its bytes at i * PLAN.pitch. wanted: whether to copy at
    all; a branch around the last copy of a loop would make the compiler peel off a whole iteration. The tile comes in
    PLAN.parts equal parts, and `wait_for_rows` can wait for each.
    """
    thread = tl.arange(0, buffer.shape[0])
    rows = buffer + (thread - thread % 32) * PLAN.pitch  # of the warp
    sync_warp(thread)
    _execute(_copies(PLAN), "r,l,r,l", [rows, address, wanted, _policy(thread, PLAN)])


@triton.constexpr_function
def _copies(plan):
    """PTX that copies a tile of each of a warp's 32 rows: $1 is where they go, $2 a lane's own row, $3 if at all.

    The lanes go through the vectors of a part row by row, and ask the lane that owns a row for its address. One
    operation for all of it, since a compiler takes time for each.
    """
    per_row = plan.tile_n * plan.itemsize // (plan.vector * plan.parts)
    mode = "cg" if plan.vector == 16 else "ca"
    lines = [
        ".reg .pred p; .reg .b32 lane, vector, first, owner, offset, place, low, high, own_low, own_high;",
        ".reg .b64 source, offset_wide;",
        "setp.ne.s32 p, $3, 0; mov.u32 lane, %laneid; mov.b64 {own_low, own_high}, $2;",
    ]
    for part in range(plan.parts):
        for step in range(per_row):
            # Where a step is whole rows, or a part of one, all steps have their places in common.
            if 32 % per_row and per_row % 32:
                start, behind = 32 * step, (0, 0)
            else:
                start, behind = 0, divmod(32 * step, per_row)
            if start or not step:
                lines.append(f"""
                add.s32 vector, lane, {start};
                {_divide("first", "vector", per_row)}
                mad.lo.s32 offset, first, {-per_row}, vector;
                mul.lo.s32 offset, offset, {plan.vector};
                mad.lo.s32 place, first, {plan.pitch}, offset;
                add.s32 place, place, $1;
                cvt.s64.s32 offset_wide, offset;""")
            to_source = (part * per_row + behind[1]) * plan.vector
            lines.append(f"""
            add.s32 owner, first, {behind[0]};
            shfl.sync.idx.b32 low, own_low, owner, 31, 0xffffffff;
            shfl.sync.idx.b32 high, own_high, owner, 31, 0xffffffff;
            mov.b64 source, {{low, high}};
            add.s64 source, source, offset_wide;
            @p cp.async.{mode}.shared.global.L2::cache_hint [place+{behind[0] * plan.pitch + to_source}],
                [source+{to_source}], {plan.vector}, $4;""")
        lines.append("cp.async.commit_group;")
    return " ".join(lines)


@triton.constexpr_function
def _divide(quotient, number, divisor):
    """PTX that divides a number below 2**13 by one up to 2**8: the assembler would divide."""
    if divisor & (divisor - 1) == 0:
        return f"shr.u32 {quotient}, {number}, {divisor.bit_length() - 1};"
    return f"mul.lo.u32 {quotient}, {number}, {(1 << 22) // divisor + 1}; shr.u32 {quotient}, {quotient}, 22;"


@triton.jit
def _policy(like, PLAN):
    """What a copy tells L2 of the importance of what it reads."""
    PRIORITY: tl.constexpr = PLAN.priority
    return tl.inline_asm_elementwise(
        f"createpolicy.fractional.L2::{PRIORITY}.b64 $0, 1.0;", "=l,r", [like], tl.int64, True, 1
    )


@triton.jit
def wait_for_rows(part, PARTS):
    """Wait until the parts up to `part`, counted from 0, of what this warp copied last have arrived."""
    _execute(".reg .pred p; " + _waits(PARTS) + " bar.warp.sync 0xffffffff;", "r", [part])


@triton.constexpr_function
def _waits(parts):
    """PTX that waits for part $1: an instruction can only be told how many later ones it need not wait for."""
    later = (f"setp.eq.s32 p, $1, {part}; @p cp.async.wait_group {parts - 1 - part};" for part in range(parts - 1))
    return " ".join((*later, f"setp.eq.s32 p, $1, {parts - 1}; @p cp.async.wait_group 0;"))


@triton.jit
def transpose_halves(a, b):
    """(low half of a, low half of b) and (high half of a, high half of b), as words."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=r,r,r", [a, b], (tl.int32, tl.int32), True, 1
    )


@triton.jit
def copy_columns(buffer, x_ptr, y_ptr, stride_x, stride_y, token, num_tokens, first, wanted, PLAN):
    """Start copying the tile of columns from `first` on of transposed logits, where those of a column lie side by side.

    The 16 tokens of a warp are less of a column than a cache line has, and four reads of 32 bytes take longer than one
    of 128. So the warps of a program, as many as fill a line, copy together, for as many columns at once as 16 bytes
    hold tokens (SIDE): `turn_columns` will make rows of squares of SIDE tokens by SIDE columns. Until then, eight
    threads' vectors lie in 128 bytes of some row, in an order in which those of its columns meet every bank once.

    buffer: the program's shared memory, where row 2 * token + factor begins at that multiple of PLAN.pitch. stride_x,
    stride_y: from column to column. token: the program's first. wanted: as in `copy_rows`.
    """
    SIDE: tl.constexpr = 16 // PLAN.itemsize
    THREADS: tl.constexpr = buffer.shape[0]
    VECTORS: tl.constexpr = THREADS // (2 * SIDE)  # of a column
    thread = tl.arange(0, THREADS)
    factor, column = thread // VECTORS % 2, thread // (2 * VECTORS)
    # What is past the end is read from before it instead.
    start = tl.minimum(token + thread % VECTORS * SIDE, num_tokens - SIDE)
    stride = tl.where(factor == 0, stride_x, stride_y).to(tl.int64)
    source = tl.where(factor == 0, x_ptr, y_ptr).to(tl.int64) + (start + (first + column) * stride) * PLAN.itemsize
    target = buffer + thread // 8 * PLAN.pitch
    policy = _policy(thread, PLAN)
    sync_program(thread)
    PARTS: tl.constexpr = PLAN.parts
    COLUMNS: tl.constexpr = PLAN.tile_n // PARTS
    for part in tl.static_range(PARTS):
        for square in tl.static_range(part * COLUMNS // SIDE, (part + 1) * COLUMNS // SIDE):
            offset = (thread ^ square) % 8 * 16 + (square % 8 * (THREADS // 8) * PLAN.pitch + square // 8 * 128)
            _execute(
                ".reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.cg.shared.global.L2::cache_hint [$1], [$2], 16, $4;",
                "r,l,r,l", [target + offset, source + square * 16 * stride, wanted, policy],
            )  # fmt: skip
        _execute("cp.async.commit_group;", "r", [thread])


@triton.jit
def turn_columns(buffer, first, COLUMNS, PLAN):
    """Make rows of the COLUMNS from `first` on that `copy_columns` has copied, in multiples of 128 bytes of a row.

    Every warp of the program has waited for what it copied of them itself.
    """
    SIDE: tl.constexpr = 16 // PLAN.itemsize
    THREADS: tl.constexpr = buffer.shape[0]
    thread = tl.arange(0, THREADS)
    tokens, factor, square = thread // (2 * SIDE), thread // SIDE % 2, thread % SIDE
    rows = buffer + (2 * tokens * SIDE + factor) * PLAN.pitch + first * PLAN.itemsize
    sync_program(thread)
    for start in tl.static_range(0, COLUMNS * PLAN.itemsize, 128):
        columns = ()
        for more in tl.static_range(0, 8, SIDE):
            for i in tl.static_range(SIDE):
                vector = (i * 2 + factor) * (THREADS // (2 * SIDE)) + tokens
                row = (square + more) * (THREADS // 8) + vector // 8
                place = buffer + first * PLAN.itemsize + row * PLAN.pitch + (vector ^ (square + more)) % 8 * 16
                columns = columns + (load_words(place + start, 4),)
        sync_program(thread)
        for more in tl.static_range(0, 8, SIDE):
            for word in tl.static_range(4):
                target = rows + (square + more) * 16 + (word * (2 * SIDE // 4) * PLAN.pitch + start)
                if PLAN.itemsize == 4:
                    store(target, [column[word] for column in columns[more : more + SIDE]])
                else:
                    even, odd = (), ()
                    for i in tl.static_range(0, SIDE, 2):
                        low, high = transpose_halves(columns[more + i][word], columns[more + i + 1][word])
                        even, odd = even + (low,), odd + (high,)
                    store(target, even)
                    store(target + 2 * PLAN.pitch, odd)
    sync_warp(thread)


@triton.jit
def load_words(address, WORDS):
    """A tuple of the WORDS (1, 2 or 4) 32-bit words at an address, in one instruction.

    address: int32, in shared memory, or int64, in global memory.
    """
    return tl.inline_asm_elementwise(
        _load(WORDS, address.dtype), operands("=r", WORDS) + "," + register(address.dtype.primitive_bitwidth),
        [address], copies(tl.int32, WORDS), False, 1,
    )  # fmt: skip


@triton.constexpr_function
def _load(count, address):
    kind, words = vector([f"${i}" for i in range(count)])
    return f"ld.{space_of(address)}.{kind} {words}, [${count}];"


@triton.jit
def load(address, BITS, SPACE=None):
    """An integer of 16, 32 or 64 bits, from an address as in `store`; 16 bits of shared memory as an int32 >= 0."""
    WIDTH: tl.constexpr = max(BITS, 32) if address.dtype == tl.int32 else BITS
    return tl.inline_asm_elementwise(
        f"ld.{SPACE or space_of(address.dtype)}.u{BITS} $0, [$1];",
        f"={register(WIDTH)},{register(address.dtype.primitive_bitwidth)}", [address],
        tl.int64 if WIDTH == 64 else tl.int32 if WIDTH == 32 else tl.int16, False, 1,
    )  # fmt: skip


@triton.jit
def store(address, words, mask=None, BITS=None, SPACE=None):
    """Store a tuple of words of 16, 32 or 64 bits, or the lower BITS of each, one behind the other.

    address: as in `load_words`; in a lane's own memory where SPACE says so ("local"). mask: if at all.
    """
    WIDTH: tl.constexpr = words[0].dtype.primitive_bitwidth
    masks = () if mask is None else (mask.to(tl.int32),)
    _execute(
        _stores(len(words), BITS or WIDTH, SPACE or space_of(address.dtype), mask is not None),
        register(address.dtype.primitive_bitwidth) + "," + operands(register(WIDTH), len(words)) + ",r" * len(masks),
        (address,) + words + masks,
    )


@triton.constexpr_function
def _stores(count, bits, space, masked):
    """PTX that stores words from $2 on at $1, as many at a time as divide them, if what is behind them says so."""
    width = next(width for width in (4, 2, 1) if count % width == 0) if bits == 32 else 1
    lines, guard = ([f".reg .pred p; setp.ne.s32 p, ${2 + count}, 0;"], "@p ") if masked else ([], "")
    for i in range(0, count, width):
        kind, words = vector([f"${2 + i + j}" for j in range(width)], bits)
        lines.append(f"{guard}st.{space}.{kind} [$1+{i * bits // 8}], {words};")
    return " ".join(lines)


@triton.jit
def partner(value, distance, PLAN):
    """What the lane whose number differs in the bit `distance` holds: int32, fp32 or int64."""
    if not PLAN.ptx:
        return tl.gather(value, tl.arange(0, value.shape[0]) ^ distance, 0)
    elif value.dtype == tl.int64:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            mov.b64 {low, high}, $1;
            shfl.sync.bfly.b32 low, low, $2, 31, 0xffffffff;
            shfl.sync.bfly.b32 high, high, $2, 31, 0xffffffff;
            mov.b64 $0, {low, high};
            }""",
            "=l,l,r", [value, distance], tl.int64, False, 1,
        )  # fmt: skip
    else:
        bits = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [value.to(tl.int32, bitcast=True), distance],
            tl.int32, False, 1,
        )  # fmt: skip
        return bits.to(value.dtype, bitcast=True)


@triton.jit
def partners(values, distance, PLAN):
    """`partner` of each of a tuple."""
    return tl.tuple([partner(value, distance, PLAN) for value in values])


@triton.jit
def load_value(place, PLAN):
    """One logit, as fp32, from anywhere in global memory, or from an address in shared memory, an int32."""
    if not PLAN.ptx:
        return tl.load(place).to(tl.float32)
    else:
        bits = load(place if place.dtype == tl.int32 else place.to(tl.int64), 8 * PLAN.itemsize)
        if PLAN.itemsize == 2:
            bits = bits.to(tl.int16)
        return bits.to(PLAN.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def unpack_words(words, DTYPE):
    """A tuple of 32-bit words -> one of the fp32 values of the one or two logits in each."""
    values = ()
    for i in tl.static_range(len(words)):
        word = words[i]
        if DTYPE == tl.float32:
            values = values + (word.to(tl.float32, bitcast=True),)
        elif DTYPE == tl.bfloat16:
            values = values + ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
        else:
            low, high = word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
            values = values + (low.to(tl.float32), high.to(tl.float32))
    return values


@triton.jit
def _pack_words(values):
    """A tuple of fp32, int32, int64, fp16 or bf16 values -> a tuple of the 32-bit words they fill, or of 16-bit ones if
    they fill none."""
    words = ()
    if values[0].dtype == tl.int64:
        for i in tl.static_range(len(values)):
            words = words + (values[i].to(tl.int32), (values[i] >> 32).to(tl.int32))
    elif values[0].dtype.primitive_bitwidth == 32:
        words = tl.tuple([value.to(tl.int32, bitcast=True) for value in values])
    elif len(values) % 2 == 0:
        for i in tl.static_range(0, len(values), 2):
            low = values[i].to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            words = words + (low | (values[i + 1].to(tl.int16, bitcast=True).to(tl.int32) << 16),)
    else:
        words = tl.tuple([value.to(tl.int16, bitcast=True) for value in values])
    return words


@triton.jit
def store_row(ptrs, values, mask, PLAN):
    """Store a tuple of values, each already in its dtype, as a contiguous row at each pointer."""
    if PLAN.ptx:
        store(ptrs.to(tl.int64), _pack_words(values), mask)
    else:
        for i in tl.static_range(len(values)):
            tl.store(ptrs + i, values[i], mask=mask)


@triton.jit
def allocate_private(like, BYTES):
    """Memory of each lane's own: its address, in int64."""
    return tl.inline_asm_elementwise(
        f"{{ .local .align 8 .b8 private[{BYTES}]; mov.u64 $0, private; }}", "=l,r", [like], tl.int64, False, 1
    )


@triton.jit
def sync_warp(like):
    """Wait for the warp, and for what it wrote."""
    _execute("bar.warp.sync 0xffffffff;", "r", [like])


@triton.jit
def sync_program(like):
    """Wait for all warps of the program, and for what they wrote."""
    _execute("bar.sync 0;", "r", [like])


@triton.jit
def hide(value):
    """An int32 of which the compiler does not know where it comes from."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.int32, False, 1)
