"""Runs one thread of a compiled kernel on the CPU, instruction by instruction.

The interpreter runs Triton's operations but no PTX, and row_per_thread.py is mostly PTX of its own. A thread of it owns
a token and talks to no other, except that its warp copies rows into shared memory together; here those rows are simply
there once they have been waited for. Only the instructions that kernel compiles to are known.
"""

import re
import struct

import numpy as np

BITS = {"b16": 16, "u16": 16, "s16": 16, "b64": 64, "u64": 64, "s64": 64, "f64": 64}
NAN = {"f32": 0x7FFFFFFF, "bf16x2": 0x7FFF, "f16x2": 0x7FFF}


def parse(ptx):
    """The instructions of a module's only kernel, and where its labels point."""
    instructions, labels = [], {}
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    for line in re.sub(r"//.*", "", body).splitlines():
        if label := re.fullmatch(r"\s*(\$?\w+):\s*", line):
            labels[label[1]] = len(instructions)
            continue
        statements = (re.sub(r"^[{}\s]+", "", statement).strip() for statement in line.split(";"))
        instructions += [statement for statement in statements if statement and not statement.startswith(".")]
    return instructions, labels


def signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def unpack_float(value, kind):
    """The number a bit pattern is, as a Python float."""
    if kind == "f64":
        return struct.unpack("<d", struct.pack("<Q", value))[0]
    if kind == "f16":
        return float(np.uint16(value & 0xFFFF).view(np.float16))
    return struct.unpack("<f", struct.pack("<I", value << 16 & 0xFFFFFFFF if kind == "bf16" else value & 0xFFFFFFFF))[0]


def pack_float(number, kind):
    """The pattern NVIDIA hardware gives a number, rounded to nearest even; it knows one NaN."""
    if number != number:
        return 0x7FFFFFFF if kind == "f32" else 0x7FFF
    with np.errstate(over="ignore"):
        if kind == "f16":
            return int(np.float16(number).view(np.uint16))
        bits = int(np.float32(number).view(np.uint32))
    return bits if kind == "f32" else bits + 0x7FFF + (bits >> 16 & 1) >> 16


class Thread:
    """Thread 0 of program 0.

    memory: {address: bytes}, what the kernel may read. parameters: the kernel's arguments, in order. staged: the
    thread's rows of shared memory, one for each wait. `run` returns what was stored, {address: byte}.
    """

    def __init__(self, program, memory, parameters, staged):
        self.instructions, self.labels = program
        self.memory, self.parameters, self.staged = memory, parameters, iter(staged)
        self.registers, self.stored = {}, {}

    def run(self):
        position = 0
        while not (statement := self.instructions[position]).startswith("ret"):
            position += 1
            if guard := re.match(r"@(!?)(%?\w+)\s+(.*)", statement):
                if bool(self.value(guard[2])) == (guard[1] == "!"):
                    continue
                statement = guard[3]
            name, operands = (*statement.split(None, 1), "")[:2]
            if name in ("bra", "bra.uni"):
                position = self.labels[operands.strip()]
            else:
                self.execute(name.split("."), re.findall(r"\{[^}]*\}|[^\s,][^,]*", operands) or [""])
        return self.stored

    def value(self, operand):
        operand = operand.strip()
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith(("%tid", "%ctaid", "rows", "global_smem")):
            return 0
        return int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)

    def address(self, operand):
        base, _, offset = operand.strip("[] ").partition("+")
        return self.value(base) + int(offset or 0)

    def read(self, address, size):
        start = max(base for base in self.memory if base <= address)
        data = self.memory[start][address - start : address - start + size]
        assert len(data) == size, f"read of {size} bytes at {address:#x}, past the end"
        return int.from_bytes(data, "little")

    def execute(self, name, operands):
        names = [part.strip() for part in operands[0].strip("{}").split(",")]
        if name[0] == "cp" and name[2] == "wait_all":
            self.memory[0] = next(self.staged)
        elif name[0] in ("cp", "bar"):
            pass  # what is copied is in `staged`, and there is nobody to wait for
        elif name[0] == "ld" and name[1] == "param":
            self.registers[names[0]] = self.parameters[int(re.search(r"param_(\d+)", operands[1])[1])]
        elif name[0] == "ld":
            size = BITS.get(name[-1], 32) // 8
            for i, register in enumerate(names):
                self.registers[register] = self.read(self.address(operands[1]) + i * size, size)
        elif name[0] == "st":
            size = BITS.get(name[-1], 32) // 8
            for i, source in enumerate(operands[1].strip("{}").split(",")):
                for byte in range(size):
                    self.stored[self.address(operands[0]) + i * size + byte] = self.value(source) >> 8 * byte & 255
        elif name[0] == "mov" and "{" in "".join(operands):
            half = BITS.get(name[1], 32) // 2
            if operands[0].startswith("{"):
                for i, register in enumerate(names):
                    self.registers[register] = self.value(operands[1]) >> i * half & (1 << half) - 1
            else:
                low, high = map(self.value, operands[1].strip("{}").split(","))
                self.registers[names[0]] = low | high << half
        else:
            self.registers[names[0].split("|")[0]] = compute(name, [self.value(operand) for operand in operands[1:]])


def compute(name, a):
    """What an instruction without side effects returns, as an unsigned pattern."""
    op, kind = name[0], name[-1]
    bits = BITS.get(kind, 32)
    mask = (1 << bits) - 1
    number = (lambda v: signed(v, bits)) if kind[0] == "s" else (lambda v: v & mask)
    if op in ("mov", "shfl", "redux"):
        return a[0]  # the thread is alone: it meets itself
    if op == "cvt":
        return convert(name, a)
    if op == "fma" or (op in ("add", "setp") and kind[0] == "f") or "NaN" in name:
        return compute_float(name, a)
    if op == "setp":
        left, right = map(number, a)
        return {"eq": left == right, "ne": left != right, "lt": left < right, "le": left <= right,
                "gt": left > right, "ge": left >= right}[name[1]]  # fmt: skip
    if op in ("mul", "mad") and name[1] == "wide":
        return number(a[0]) * number(a[1]) + (a[2] if op == "mad" else 0) & (1 << 64) - 1
    if op == "prmt":
        source = struct.pack("<II", a[0] & 0xFFFFFFFF, a[1] & 0xFFFFFFFF)
        selectors = [a[2] >> 4 * i & 15 for i in range(4)]
        chosen = [source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in selectors]  # 8: the sign, spread
        return int.from_bytes(bytes(chosen), "little")
    return mask & {
        "add": lambda: a[0] + a[1], "sub": lambda: a[0] - a[1], "mul": lambda: a[0] * a[1],
        "mad": lambda: a[0] * a[1] + a[2], "neg": lambda: -a[0], "and": lambda: a[0] & a[1], "or": lambda: a[0] | a[1],
        "xor": lambda: a[0] ^ a[1], "not": lambda: not a[0] if kind == "pred" else ~a[0],
        "shl": lambda: a[0] << a[1], "shr": lambda: number(a[0]) >> a[1],
        "bfe": lambda: number(a[0]) >> a[1] & (1 << a[2]) - 1, "popc": lambda: a[0].bit_count(),
        "max": lambda: max(map(number, a)), "min": lambda: min(map(number, a)), "selp": lambda: a[0] if a[2] else a[1],
        "div": lambda: number(a[0]) // number(a[1]), "rem": lambda: number(a[0]) % number(a[1]),
    }[op]()  # fmt: skip


def compute_float(name, a):
    kind = name[-1]
    if kind in ("bf16x2", "f16x2"):
        halves = [compute_float([*name[:-1], kind[:-2]], [v >> shift & 0xFFFF for v in a]) for shift in (0, 16)]
        return halves[0] | halves[1] << 16
    left, right, *addend = (unpack_float(v, kind) for v in a)
    if name[0] == "fma":
        return pack_float(left * right + addend[0], kind)
    if name[0] == "add":
        with np.errstate(all="ignore"):
            return pack_float(np.float32(left) + np.float32(right), kind)
    if name[0] == "max":
        return NAN.get(kind, 0x7FFF) if left != left or right != right else a[0] if left > right else a[1]
    unordered = left != left or right != right
    if name[1] in ("num", "nan"):
        return unordered == (name[1] == "nan")
    holds = {"eq": left == right, "ne": left != right, "lt": left < right, "le": left <= right,
             "gt": left > right, "ge": left >= right}[name[1][:2]]  # fmt: skip
    return unordered if len(name[1]) == 3 and unordered else holds and not unordered


def convert(name, a):
    target, source = name[-2], name[-1]
    if target in ("bf16x2", "f16x2"):
        high, low = (pack_float(unpack_float(v, source), target[:-2]) for v in a)
        return low | high << 16
    if source in ("f32", "f16", "bf16"):
        return pack_float(unpack_float(a[0], source), target)
    width = int(source[1:])
    value = signed(a[0], width) if source[0] == "s" else a[0] & (1 << width) - 1
    return value & (1 << int(target[1:])) - 1
