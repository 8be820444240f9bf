"""Configurations compiled for any GPU, which needs none, and what the compiler says of them."""

import collections
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import tempfile
import time

import pandas as pd
import triton
from triton.backends.compiler import GPUTarget

from . import faults, tables
from .binaries import machine_code, short_hash
from .configurations import COMPILED_PROBLEMS, IDENTITY, KEY, all_jobs, key_of, launch
from .files import ctrl_c_ignored
from .progress import tqdm

TARGETS = {f"cuda:sm{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["hip:gfx942"] = GPUTarget("hip", "gfx942", 64)

# What a multiprocessor holds at once: programs, warps, shared memory in KiB. The vendors' tables say so.
LIMITS = {
    "cuda:sm80": (32, 64, 164),
    "cuda:sm86": (16, 48, 100),
    "cuda:sm89": (24, 48, 100),
    "cuda:sm90": (32, 64, 228),
    "cuda:sm100": (32, 64, 228),
    "cuda:sm120": (24, 48, 100),
    "hip:gfx942": (32, 32, 64),
}

COMPILE_LIMIT = 120  # seconds one configuration may take to compile


class _NoDevice:
    """Stands in for Triton's driver, so that kernels compile for a GPU that is not there."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    get_current_device = get_current_target  # a cache of compiled kernels for each

    def get_current_stream(self, device):
        return 0


def compile_one(problem, config, target):
    """What the compiler says of a configuration, or the error it ends with. Not for Triton's interpreter.

    Raises:
        OSError: the machine is to blame, such as a full disk.
    """
    triton.runtime.driver.set_active(_NoDevice(target))
    arch = f"{target.backend}:{'sm' if target.backend == 'cuda' else ''}{target.arch}"
    try:
        kernel, args, constants, _ = launch(problem, config, "meta", arch)
        compiled = kernel.warmup(*args, grid=(1,), **constants)
    except Exception as error:
        faults.raise_if_machine(error)  # anything else is the configuration's own, and belongs in its row
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return resources(compiled)


def resources(kernel):
    """Registers a thread, its bytes in local memory (spilled, except for the frontier kernel's lists), shared bytes a
    program, instructions, and a hash of those."""
    code = machine_code(kernel)
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        registers, spills = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
        instructions = len(code) // 16
    else:
        registers, spills = (int(re.search(rf"\.{name}: +(\d+)", kernel.asm["amdgcn"])[1])
                             for name in ("vgpr_count", "private_segment_fixed_size"))  # fmt: skip
        instructions = code.count(b"\n") + 1
    # Besides what Triton allocates there is what a kernel's own PTX declares.
    declared = re.findall(r"\.shared [^;]*\[(\d+)\]", kernel.asm.get("ptx", ""))
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared + sum(map(int, declared)),
        "instructions": instructions,
        "binary": short_hash(code),
    }


def occupancy(arch, registers, shared, num_warps):
    """Programs that a multiprocessor of an architecture can hold at once; NaN for one without limits listed."""
    if arch not in LIMITS:
        return math.nan
    programs, warps, kib = LIMITS[arch]
    if arch.startswith("hip"):
        by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8 or 8)) // num_warps  # four units, 512 a lane
        return min(programs, warps // num_warps, by_registers, kib * 1024 // max(1, shared))
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // num_warps
    return min(programs, warps // num_warps, by_registers, kib * 1024 // (shared + 1024))


def compile_jobs(jobs, deadline=math.inf, workers=None):
    """Compiles (problem, config, target) in as many processes as there are cores, into Triton's disk cache.

    Yields (job, what `compile_one` returns), in the order they end. A configuration that takes longer than
    COMPILE_LIMIT or takes the process down has an error of its own; what has not begun at the deadline is left out.
    What `compile_one` raises, it raises.
    """
    waiting, idle, running = collections.deque(jobs), [], {}
    workers = min(workers or os.cpu_count(), len(waiting))
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                connection, process = idle.pop() if idle else _start_worker()
                connection.send(waiting[0])
                running[connection] = process, waiting.popleft(), time.monotonic()
            if not running:
                return
            for connection in multiprocessing.connection.wait(running, timeout=1):
                process, job, _ = running.pop(connection)
                try:
                    outcome = connection.recv()
                    idle.append((connection, process))
                except EOFError:
                    outcome = {"error": "the compiler crashed"}
                if isinstance(outcome, Exception):
                    raise outcome
                yield job, outcome
            for connection, (process, job, start) in list(running.items()):
                if time.monotonic() - start > COMPILE_LIMIT:
                    process.kill()
                    del running[connection]
                    yield job, {"error": f"not compiled within {COMPILE_LIMIT} s"}
    finally:
        for process in [process for _, process in idle] + [process for process, *_ in running.values()]:
            process.kill()


def _start_worker():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_compile_for, args=(there,), daemon=True)
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    try:
        with ctrl_c_ignored():  # which the process inherits
            process.start()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    there.close()
    return here, process


def _compile_for(connection):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Triton prints whole programs where it gives up
    while True:
        job = connection.recv()
        try:
            connection.send(compile_one(*job))
        except Exception as error:
            connection.send(error)


def compile_table(targets=tuple(TARGETS), problems=COMPILED_PROBLEMS, only=None):
    """What the compiler says of every configuration, as a table, for some of TARGETS.

    Rows that are on record, of this Triton and the same binary, are not recorded again. `only` takes a job (problem,
    config) and says whether it is wanted; then nothing is recorded.
    """
    rows = tables.of_setting("compiled", ["triton"]) if only is None else pd.DataFrame()
    known = tables.last_keys(rows, ["arch", *KEY], ["binary"])
    jobs = [
        (problem, config, TARGETS[arch])
        for problem, config in all_jobs(problems)
        for arch in targets
        if only is None or only(problem, config)
    ]
    jobs.sort(key=lambda job: job[1].num_stages)  # the numbers of stages that repeat others come last
    arch_of = {target: arch for arch, target in TARGETS.items()}
    with tables.recording("compiled" if only is None else None, folder="compiled") as new:
        progress = {"total": len(jobs), "desc": "compiling", "disable": only is not None}
        for (problem, config, target), outcome in tqdm(compile_jobs(jobs), **progress):
            row = {"arch": arch_of[target], **dict(zip(KEY, key_of(problem, config), strict=True)), **outcome}
            if tables.key(row, ["arch", *IDENTITY]) not in known:
                new(row)
    return with_occupancy(pd.concat([rows, pd.DataFrame(new.rows)], ignore_index=True))


def with_occupancy(rows):
    """The same rows with the occupancy predicted for their architecture."""
    if not {"registers", "arch"} <= set(rows):
        return rows
    found = zip(rows["arch"], rows["registers"], rows["shared"], rows["num_warps"], strict=True)
    return rows.assign(
        occupancy=[math.nan if math.isnan(regs) else occupancy(arch, int(regs), int(shared), warps)
                   for arch, regs, shared, warps in found]
    )  # fmt: skip
