"""Runs one program of a compiled kernel on the CPU, instruction by instruction.

The interpreter runs Triton's operations but no PTX, and some kernels are mostly PTX of their own. Here all threads of a
program, the 32 lanes of each of its warps, run in lockstep, so that code in which they exchange what they have can be
checked bit for bit without a GPU.

It is stricter than a GPU. An address must be aligned and inside a given array. Shared memory holds NaN until something
is written, and a copy's target does until the copy is waited for. Threads may not touch each other's bytes without a
barrier between: their warp's, or the program's if they are of different warps. All threads of the program take a
branch, or none. What an instruction is not known to do raises.

A register is an array of one uint64 a thread; whoever reads one ignores the bits above its width. Compilers may read
one that nobody wrote where they need only half of an operand: it holds NaN.
"""

import re
from functools import cache
from typing import NamedTuple

import numpy as np

LANES = np.arange(32)  # of a warp
SHARED = 1024  # where a kernel's shared memory starts; what is below is the system's
PRIVATE = 1 << 32  # where thread 0's private (.local) memory starts; the other threads' follows
TYPES = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for kind, code in ("bu", "uu", "si") for size in (1, 2, 4, 8)}
TYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"bf16": np.dtype("u2")}
NAN = {"f64": 0x7FF8000000000000, "f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}  # the only ones arithmetic returns
PROGRAM_BARRIERS, WARP_BARRIERS = ("bar.sync 0", "barrier.sync 0"), ("bar.warp.sync 0xffffffff", "bar.warp.sync -1")


# Registers and numbers -----------------------------------------------------------------------------------------------


def constant(number, num_threads):
    return np.full(num_threads, number & (1 << 64) - 1, np.uint64)


def pattern(numbers):
    """The register that holds integers or booleans, or pairs [threads, 2] of 16-bit integers."""
    words = numbers.view(np.uint32)[:, 0] if numbers.ndim == 2 else numbers
    return words.astype(np.int64).view(np.uint64)


@cache
def reader(kind):
    """From a register to its numbers, [threads, 2] where it holds pairs; halves are widened to doubles."""
    if kind == "pred":
        return lambda register: register.astype(bool)
    if kind.endswith("x2"):
        read = reader(kind.removesuffix("x2"))
        return lambda register: read(register.astype(np.uint32).view(np.uint16).reshape(-1, 2))
    number = TYPES[kind]
    word = np.dtype(f"u{number.itemsize}")
    if kind == "bf16":
        return lambda register: (register.astype(word).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "f16":
        return lambda register: register.astype(word).view(number).astype(np.float64)
    return lambda register: register.astype(word, copy=False).view(number)


@cache
def rounder(kind):
    """From floats to a register, rounded to nearest even."""
    kind = kind.removesuffix("x2")
    word = np.dtype(f"u{TYPES[kind].itemsize}")

    def to_words(numbers):
        if kind != "bf16":
            return numbers.astype(TYPES[kind], copy=False).view(word)
        last_place = np.maximum(np.frexp(numbers)[1], -125) - 8
        numbers = np.ldexp(np.rint(np.ldexp(numbers, -last_place)), last_place)
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(word)

    return lambda numbers: pattern(np.where(np.isnan(numbers), word.type(NAN[kind]), to_words(numbers)))


# Arithmetic ----------------------------------------------------------------------------------------------------------


def wide(a):
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def high_product(a, b):
    return (a.astype(object) * b.astype(object) >> 8 * a.itemsize).astype(a.dtype)


def bits_of(a):
    """[threads, width], the lowest bit first."""
    return np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")


def leading_zeros(a):
    return np.where(a == 0, 8 * a.itemsize, bits_of(a)[:, ::-1].argmax(1))


def highest_bit(a):
    """The highest that is not the sign's; -1 without one."""
    return 8 * a.itemsize - 1 - leading_zeros(a ^ (a >> 8 * a.itemsize - 1) if a.dtype.kind == "i" else a)


def clamped(amount, like):
    """A shift by the width or more: numpy, too, shifts everything out."""
    return np.minimum(amount, 64).astype(like.dtype)


def ones(length, like):
    """Ones below bit `length`."""
    return (like.dtype.type(1) << clamped(length & 255, like)) - like.dtype.type(1)


def extract(a, start, length):
    value, field = a >> clamped(start & 255, a), ones(length, a)
    negative = (value & (field ^ field >> 1) != 0) & (length & 255 > 0) & (a.dtype.kind == "i")
    return np.where(negative, value | ~field, value & field)


def insert(a, b, start, length):
    start, field = clamped(start & 255, b), ones(length, b)
    return b & ~(field << start) | (a & field) << start


def logic(a, b, c, table):
    """Any function of three bits, by its truth table."""
    rows = (row for row in range(8) if int(table[0]) >> row & 1)
    terms = ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c) for row in rows)
    return sum(terms, np.zeros_like(a))


def permute(a, b, selectors):
    """Four of eight bytes; where a selector's bit 3 is set, the byte's sign, spread."""
    selectors = selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    chosen = np.take_along_axis(np.stack((a, b), 1).view(np.int8), (selectors & 7).astype(np.int64), 1)
    return np.where(selectors & 8, chosen >> 7, chosen).view(np.uint32)[:, 0]


def joined(low, high):
    return high.astype(np.uint64) << 32 | low


def fused(a, b, c):
    """a * b + c of numbers of at most 24 bits, such that rounding it to those rounds the exact sum."""
    product, c = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    # Rounded to odd: a double that is not exact ends in 1, and so is no tie of a shorter format.
    inexact_even = np.isfinite(total) & (error != 0) & (total.view(np.uint64) & 1 == 0)
    return np.where(inexact_even, np.nextafter(total, np.copysign(np.inf, error)), total)


def maximum(a, b):
    return np.where((a > b) | (a == b) & ~np.signbit(a) | np.isnan(b), a, b)


def maximum_nan(a, b):
    return np.where(np.isnan(a), a, np.where(np.isnan(b), b, maximum(a, b)))


def clamped_integer(a, kind):
    """Floats as integers, towards zero; NaN as 0, what is too large as the largest."""
    largest, a = np.iinfo(kind).max, np.trunc(np.nan_to_num(a.astype(np.float64)))
    return np.where(a >= largest, largest, np.maximum(a, np.iinfo(kind).min).astype(kind))


INTEGERS = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum,
    "mul.lo": np.multiply, "mul.hi": high_product, "mul.wide": lambda a, b: wide(a) * wide(b),
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: pattern(wide(a) * wide(b)) + c,
    "div": lambda a, b: (a - np.fmod(a, b)) // b, "rem": np.fmod,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "lop3": logic,
    "shl": lambda a, n: a << clamped(n, a), "shr": lambda a, n: a >> clamped(n, a),
    "shf.l.wrap": lambda a, b, n: joined(a, b) << (n & 31) >> 32,
    "shf.r.wrap": lambda a, b, n: joined(a, b) >> (n & 31),
    "shf.l.clamp": lambda a, b, n: joined(a, b) << np.minimum(n, 32) >> 32,
    "shf.r.clamp": lambda a, b, n: joined(a, b) >> np.minimum(n, 32),
    "bfe": extract, "bfi": insert, "prmt": permute, "popc": lambda a: bits_of(a).sum(1), "clz": leading_zeros,
    "bfind": highest_bit, "brev": lambda a: np.packbits(bits_of(a)[:, ::-1], 1, "little").view(a.dtype)[:, 0],
    "selp": lambda a, b, p: np.where(p, a, b),
}  # fmt: skip
FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fused, "neg": np.negative, "abs": np.abs,
    "max": maximum, "min": lambda a, b: -maximum(-a, -b), "max.NaN": maximum_nan,
    "min.NaN": lambda a, b: -maximum_nan(-a, -b),
    "ex2.approx": np.exp2, "ex2.approx.ftz": np.exp2, "lg2.approx": np.log2, "div.full": np.divide,
    "fma.ftz": fused, "lg2.approx.ftz": np.log2, "div.full.ftz": np.divide,  # nothing here has subnormals that count
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
# The kinds of operands, where they are not all the instruction's own (None).
OPERANDS = {"shl": (None, "u32"), "shr": (None, "u32"), "shf": (None, None, "u32"), "bfe": (None, "u32", "u32"),
            "bfi": (None, None, "u32", "u32"), "selp": (None, None, "pred"), "setp": (None, None, "pred"),
            "mad.wide": (None, None, "u64")}  # fmt: skip


def arithmetic(op, modifiers, kind):
    """What an instruction does to numbers, and what makes a register of the result. Raises where that is not known."""
    if op == "cvt" and "f" in modifiers[-1] and modifiers[:-1] in ([], ["rn"]):
        number = np.float32 if modifiers[-1] == "f32" else np.float64
        return lambda *parts: np.stack(parts[::-1], 1).squeeze().astype(number), rounder(modifiers[-1])
    if op == "cvt" and modifiers[0] == "rzi" and "f" in kind:
        return lambda a: clamped_integer(a, TYPES[modifiers[1]]), pattern
    if op == "cvt" and "f" not in kind:
        (target,) = modifiers
        return lambda a: a.astype(TYPES[target]), pattern
    if op == "setp":
        compare, combine = comparison(modifiers[0], kind), INTEGERS[modifiers[1] if modifiers[1:] else "and"]
        return lambda a, b, p=True: combine(compare(a, b), p), pattern
    name = ".".join([op, *(part for part in modifiers if part != "rn")])
    if "f" not in kind or op == "selp":
        return INTEGERS[name], pattern
    if name == "fma" and kind == "f64":
        raise KeyError(kind)
    return FLOATS[name], rounder(kind)


def comparison(name, kind):
    if "f" not in kind:
        return COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    compare = COMPARISONS[name[:2]]
    if name[2:] == "u":  # holds for NaN as well
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


# Instructions --------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """instructions: (text, guard, registers written, function of (program, active threads) -> their values)."""

    num_threads: int  # of a program
    instructions: list
    labels: dict
    constants: dict
    shared_bytes: int  # of a program
    private_bytes: int  # of each thread


def parse(ptx, launch_bytes=0):
    """A module's only Kernel. launch_bytes: what a launch adds to the shared memory that the kernel itself declares.
    NotImplementedError: names an instruction that is not known."""
    body = re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", ptx[ptx.index("{", ptx.index(".entry")) :], flags=re.M)
    instructions, labels, constants, shared_bytes, places, private_bytes = [], {}, {}, 0, {}, 0
    num_threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    scopes, num_scopes = [], 0  # what each open brace declares, under names that no other does
    for statement in body.split(";"):
        while token := re.match(r"\s*(?:([{}])|([$\w]+):(?!:))", statement):
            statement = statement[token.end() :]
            if token[2]:
                labels[token[2]] = len(instructions)
            elif token[1] == "{":
                scopes, num_scopes = [*scopes, {}], num_scopes + 1
            elif not (scopes := scopes[:-1]):  # the end of the kernel
                dynamic = re.findall(r"\.extern \.shared .*?([$\w]+)\[\]", ptx)
                shared_bytes += -shared_bytes % 16
                constants |= {name: constant(SHARED + shared_bytes, num_threads) for name in dynamic}
                private = PRIVATE + np.arange(num_threads) * private_bytes
                constants |= {name: pattern(private + place) for name, place in places.items()}
                shared_bytes += launch_bytes
                return Kernel(num_threads, instructions, labels, constants, shared_bytes, private_bytes)
        statement = statement.strip()
        if private := re.match(r"\.local \.align \d+ \.b8\s+([$\w]+)\[(\d+)\]", statement):
            scopes[-1][private[1]] = name = f"{private[1]}#{num_scopes}"
            places[name] = private_bytes
            private_bytes += int(private[2]) + -int(private[2]) % 8
        elif shared := re.match(r"\.shared \.align (\d+) \.b8 ([$\w]+)\[(\d+)\]", statement):
            shared_bytes += -shared_bytes % int(shared[1])
            scopes[-1][shared[2]] = name = f"{shared[2]}#{num_scopes}"
            constants[name] = constant(SHARED + shared_bytes, num_threads)
            shared_bytes += int(shared[3])
        elif statement.startswith(".reg"):
            names = re.findall(r"([$%\w]+)\s*(?:,|$)", statement)
            scopes[-1].update((name, f"{name}#{num_scopes}") for name in names)
        elif statement and not statement.startswith(".pragma"):
            local = {name: unique for scope in scopes for name, unique in scope.items()}
            renamed = re.sub(r"[$%\w.]+", lambda word, local=local: local.get(word[0], word[0]), statement)
            for number in re.findall(r"(?<![\w%$.:#+-])-?\d\w*", renamed):
                bits = int(number[2:], 16) if number[:2] in ("0f", "0d") else int(number.rstrip("U"), 0)
                constants[number] = constant(bits, num_threads)
            instructions.append(compile_statement(renamed))
    raise ValueError("the kernel does not end")


def compile_statement(statement):
    guard, name, operands = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", statement, flags=re.S).groups()
    op, operands = name.split(".")[0], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
    try:
        if op in ("bra", "ret"):
            targets, execute = (), lambda program, active: program.jump(operands, active)
        elif op == "membar":
            targets, execute = (), lambda program, active: ()
        elif (barrier := f"{name} {' '.join(operands)}") in PROGRAM_BARRIERS + WARP_BARRIERS:
            targets, execute = (), lambda program, active: program.pass_barrier(barrier in WARP_BARRIERS, active)
        elif op == "cp":
            targets, execute = (), compile_copy(name, operands)
        elif op == "st":
            targets, execute = (), compile_store(name, *operands)
        else:
            targets, compile_value = registers_of(operands[0]), VALUES.get(op, compile_arithmetic)
            execute = compile_value(name, len(targets), *operands[1:])
    except (LookupError, TypeError, ValueError) as error:
        raise NotImplementedError(statement) from error
    return statement, guard and value_of(guard, "pred"), targets, execute


def registers_of(operand):
    """Those of a vector, or of a destination and its predicate."""
    return re.findall(r"[^\s,|{}]+", operand)


def value_of(operand, kind):
    """What an operand is: a function of the program."""
    name, read = operand.lstrip("!"), reader(kind)
    return lambda program: ~read(program.registers[name]) if operand[0] == "!" else read(program.registers[name])


def compile_arithmetic(name, num_targets, *operands):
    op, *modifiers, kind = name.split(".")
    function, to_register = arithmetic(op, modifiers, kind)
    kinds = next((kinds for start, kinds in OPERANDS.items() if name.startswith(start + ".")), [None] * len(operands))
    if op == "selp":
        kind = kind.replace("f", "b")
    values = [value_of(operand, own or kind) for operand, own in zip(operands, kinds, strict=op != "setp")]
    return lambda program, active: (to_register(function(*[value(program) for value in values])),)


def compile_move(name, num_targets, operand):
    kind, sources = name.split(".")[1], registers_of(operand)
    bits = 1 if kind == "pred" else 8 * TYPES[kind].itemsize // max(num_targets, len(sources))
    field = (1 << bits) - 1
    if num_targets > 1:
        return lambda program, active: [program.registers[operand] >> i * bits & field for i in range(num_targets)]
    if len(sources) > 1:
        return lambda program, active: (
            sum((program.registers[name] & field) << i * bits for i, name in enumerate(sources)),
        )
    return lambda program, active: (program.registers[operand],)


def compile_load(name, num_targets, place):
    number = TYPES[name.split(".")[-1].replace("f", "b")]
    space, size = space_of(name), number.itemsize * num_targets
    if space == "param":
        position = int(re.search(r"param_(\d+)\]", place)[1])
        return lambda program, active: (pattern(program.parameters[position].astype(f"u{size}").view(number)),)

    def load(program, active):
        data = program.load(space, program.addresses(space, place, size, active), size, active)
        return [pattern(numbers) for numbers in data.view(number).T]

    return load


def compile_store(name, place, operand):
    sources = [value_of(source, name.split(".")[-1].replace("f", "b")) for source in registers_of(operand)]
    space = space_of(name)

    def store(program, active):
        data = np.stack([source(program) for source in sources], 1).view(np.uint8)
        program.store(space, program.addresses(space, place, data.shape[1], active), data, active)
        return ()

    return store


def space_of(name):
    """Which memory an instruction accesses."""
    (space,) = {part.split("::")[0] for part in name.split(".")} & {"param", "shared", "local", "global"}
    return space


def compile_copy(name, operands):
    if name == "cp.async.commit_group":
        return lambda program, active: program.commit_copies(active)
    if name == "cp.async.wait_group":
        return lambda program, active: program.finish_copies(int(operands[0]), active)
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::cache_hint)?(\.L2::\d+B)?", name):
        raise LookupError(name)
    target, source, size, *length = operands[:-1] if "cache_hint" in name else operands
    size, length = int(size), value_of(length[0] if length else size, "u32")

    def copy(program, active):
        targets = program.addresses("shared", target, size, active)
        sources, lengths = program.addresses("global", source, size, active), length(program)
        data = np.zeros((len(active), size), np.uint8)  # what is past a thread's length stays zero
        for count in set(lengths[active].tolist()) - {0}:
            data[:, :count] |= program.load("global", sources, count, active & (lengths == count))
        program.store("shared", targets, np.full_like(data, 0xFF), active)
        program.copies.append((targets, data, active))
        return ()

    return copy


def compile_shuffle(name, num_targets, *operands):
    _, _, mode, _ = name.split(".")
    move = {
        "up": lambda lanes, segment, b: lanes - b, "down": lambda lanes, segment, b: lanes + b,
        "bfly": lambda lanes, segment, b: lanes ^ b, "idx": lambda lanes, segment, b: lanes & segment | b & ~segment,
    }[mode]  # fmt: skip
    valid = np.greater_equal if mode == "up" else np.less_equal
    value, *others = [value_of(operand, "u64" if i == 0 else "s64") for i, operand in enumerate(operands)]

    def shuffle(program, active):
        b, c, members = (other(program) for other in others)
        groups(members, active)
        threads, lanes, segment = program.threads, program.lanes, c >> 8 & 31
        source = move(lanes, segment, b & 31)
        found = valid(source, lanes & segment | c & 31 & ~segment)
        return value(program)[np.where(found, threads - lanes + source, threads)], pattern(found)

    return shuffle


def compile_vote(name, num_targets, operand, members):
    op, _, how, kind = name.split(".")
    if kind not in ("pred", "b32", "u32", "s32"):
        raise LookupError(kind)
    value, members = value_of(operand, "pred" if op == "vote" else kind), value_of(members, "s64")
    reduce = {"any": np.any, "all": np.all, "ballot": np.sum, "add": np.sum, "min": np.min, "max": np.max,
              "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce}[how]  # fmt: skip

    def vote(program, active):
        values = value(program) << program.lanes if how == "ballot" else value(program)
        result = np.zeros_like(program.lanes)
        for threads in groups(members(program), active):
            result[threads] = reduce(values[threads])
        return (pattern(result),)

    return vote


def groups(members, active):
    """The threads of each group that the active threads' membermasks name; those named must be there and agree."""
    threads = np.arange(len(active))
    members = members & 0xFFFFFFFF | threads // 32 << 32  # of which warp
    assert (members >> threads % 32 & 1)[active].all(), "a lane is no member of its own group"
    threads_of = [np.flatnonzero(group >> LANES & 1) + (group >> 32) * 32 for group in set(members[active].tolist())]
    for threads in threads_of:
        assert active[threads].all() and (members[threads] == members[threads[0]]).all(), "group members are missing"
    return threads_of


def compile_active_mask(name, num_targets):
    return lambda program, active: (pattern((active << program.lanes).reshape(-1, 32).sum(1).repeat(32)),)


VALUES = {
    "ld": compile_load, "mov": compile_move, "shfl": compile_shuffle, "vote": compile_vote, "redux": compile_vote,
    "activemask": compile_active_mask,
    "createpolicy": lambda name, num_targets, *fraction: lambda program, active: (constant(0, len(active)),),
}  # fmt: skip


# The program ---------------------------------------------------------------------------------------------------------


def run_program(kernel, parameters, memory, program_id=0, num_programs=1):
    """Runs one program of a kernel; what it stores is in `memory` afterwards.

    kernel: what `parse` returned. parameters: the kernel's arguments in order, integers. memory: {address: uint8
    array}, all the global memory there is. AssertionError: the program does what no kernel may; a note says in which
    instruction.
    """
    program = Program(kernel, parameters, memory, program_id, num_programs)
    with np.errstate(all="ignore"):
        while program.position < len(kernel.instructions):
            statement, *instruction = kernel.instructions[program.position]
            program.position += 1
            try:
                program.step(*instruction)
            except Exception as error:
                error.add_note(f"in {statement}")
                raise


class Registers(dict):
    def __missing__(self, name):
        if not re.fullmatch(r"%(r|rs|rd)\d+", name):
            raise KeyError(name)
        return constant(-1, len(self["%tid.x"]))


class Program:
    def __init__(self, kernel, parameters, memory, program_id, num_programs):
        num_threads = kernel.num_threads
        self.labels, self.position, self.end = kernel.labels, 0, len(kernel.instructions)
        self.threads, self.everyone = np.arange(num_threads), np.ones(num_threads, bool)
        self.lanes = self.threads % 32
        self.parameters = [constant(parameter, num_threads) for parameter in parameters]
        self.registers = Registers(kernel.constants)
        self.registers |= {"%tid.x": pattern(self.threads), "%laneid": pattern(self.lanes)}
        special = dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0)
        special |= {"%ctaid.x": program_id, "%nctaid.x": num_programs}
        self.registers |= {name: constant(number, num_threads) for name, number in special.items()}
        shared = np.full(kernel.shared_bytes, 0xFF, np.uint8)
        private = np.full(num_threads * kernel.private_bytes, 0xFF, np.uint8)
        spaces = {"shared": {SHARED: shared}, "local": {PRIVATE: private}, "global": memory}
        self.memory = {
            space: [Memory(*array, num_threads) for array in arrays.items()] for space, arrays in spaces.items()
        }
        self.copies, self.groups = [], []  # (addresses, data, threads) on their way to shared memory, and lists of them

    def step(self, guard, targets, execute):
        active = guard(self) if guard else self.everyone
        if active.any():
            for target, value in zip(targets, execute(self, active), strict=False):
                self.registers[target] = np.where(active, value, self.registers.get(target, 0)) if guard else value

    def jump(self, labels, active):
        assert active.all(), "the threads part"
        self.position = self.labels[labels[0]] if labels else self.end
        return ()

    def pass_barrier(self, of_warp, active):
        assert active.all(), "not all threads meet"
        for memory in (*self.memory["shared"], *self.memory["global"]):
            memory.forget(of_warp)
        return ()

    def commit_copies(self, active):
        assert active.all(), "threads differ in how many groups of copies they have"
        self.groups.append(self.copies)
        self.copies = []
        return ()

    def finish_copies(self, unfinished, active):
        """All groups but the last `unfinished`."""
        assert active.all(), "not all threads wait"
        while len(self.groups) > unfinished:
            for copy in self.groups.pop(0):
                self.store("shared", *copy)
        return ()

    def addresses(self, space, operand, size, active):
        base, _, offset = operand.strip("[]").partition("+")
        addresses = self.registers[base.strip()] + np.uint64(int(offset or 0) % (1 << 64))
        addresses = addresses & 0xFFFFFFFF if space == "shared" else addresses
        wrong = addresses[active & (addresses % size != 0)]
        assert not len(wrong), f"{wrong[0]:#x} is not a multiple of {size}"
        return addresses

    def load(self, space, addresses, size, active):
        """The bytes [threads, size] from each thread's address on; zeros in threads that are not active."""
        data = np.zeros((len(active), size), np.uint8)
        for memory, threads, places in self.find(space, addresses, size, active):
            memory.touch(places, threads, writes=False)
            data[threads] = memory.data[places]
        return data

    def store(self, space, addresses, data, active):
        for memory, threads, places in self.find(space, addresses, data.shape[1], active):
            memory.touch(places, threads, writes=True, at_once=space == "shared")
            memory.data[places] = data[threads]
            assert (memory.data[places] == data[threads]).all(), "lanes store different numbers in one place"

    def find(self, space, addresses, size, active):
        """Yields each memory that threads access, which threads, and the places [threads, size] of their bytes."""
        for memory in self.memory[space]:
            offsets = addresses - np.uint64(memory.base)
            inside = active & (offsets < len(memory.data)) & (offsets + size <= len(memory.data))
            if inside.any():
                yield memory, self.threads[inside], offsets[inside, None] + np.arange(size, dtype=np.uint64)
            active = active & ~inside
        assert not active.any(), f"{size} bytes at {addresses[active][0]:#x} are not all {space} memory"


class Memory:
    """Bytes from an address on, and which thread used and which wrote each since the last barrier, of a warp or of the
    program; where there are several warps, also which warp since the last of the program."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, base, data, num_threads):
        self.base, self.data = base, data
        self.traces = {size: np.full((2, len(data)), self.NOBODY, np.int16) for size in (1, 32) if size < num_threads}

    def forget(self, of_warp):
        for size, trace in self.traces.items():
            if size == 1 or not of_warp:
                trace[:] = self.NOBODY

    def touch(self, places, threads, writes, at_once=False):
        """at_once: lanes of a warp may write the same place in one instruction, as reductions across warps do."""
        for size, (all_users, all_writers) in self.traces.items():
            names, users, writers = threads[:, None] // size, all_users[places], all_writers[places]
            all_users[places] = names
            now, before = all_users[places] != names, (users != names) & (users != self.NOBODY)
            all_users[places[now | before]] = self.SEVERAL
            if writes:
                races = before | now & (size > 1 or not at_once)
                all_writers[places] = names
            else:
                races = (writers != names) & (writers != self.NOBODY)
            assert not races.any(), f"two threads race for {self.base + int(places[races][0]):#x}"
