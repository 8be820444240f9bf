"""The autotune study: every configuration of every kernel, compiled for any GPU without one, timed on the one at hand.

python notebooks/autotune_study.py             times what is not yet timed on this GPU, for five minutes at most
python notebooks/autotune_study.py --verify    times again, and prints how well the recorded order is reproduced
python notebooks/autotune_study.py --compile   asks the compiler alone, for every architecture; needs no GPU

Rows go to OMNI_FIGURES/data, by default to study-output/figures/data. Running again goes on where the last run stopped.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import routing_study as study
import seaborn as sns
import tables
import timing
import torch
import triton
from binaries import machine_code, short_hash
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from omni_kernels import configs, factored_router, forward, original, split_forward
from omni_kernels.factored import frontier, lanes
from omni_kernels.factored.tile import plan_for as plan_of_tile

Problem = collections.namedtuple("Problem", ["kernel", "tokens", "num_expert_sqrt", "k"])
KEY = [*Problem._fields, "tile", "num_warps", "num_stages"]  # the columns that say what a row is of
IDENTITY = [*KEY, "binary"]  # and what was compiled for it
N2_KERNELS = ("fwd", "fwd_split", "bwd")
NAMES = {"fwd": "forward", "fwd_split": "split forward", "bwd": "backward", "tile": "factored, tiles",
         "lanes": "factored, lanes", "frontier": "factored, frontier"}  # fmt: skip
FIELDS = {"TILE_M": "tokens", "TOKENS": "tokens", "CHUNK": "chunk", "LANES": "lanes", "PIECE": "piece"}  # of a plan
RECORDED_GPU = "NVIDIA H100 80GB HBM3"

# The guide's shapes, and other token counts at one of them. The forward kernel holds all N² sums, so it ends at 128.
PROBLEMS = [
    *(Problem("fwd", 1024, n, 16) for n in (64, 128)),
    *(Problem(kernel, 1024, n, 16) for kernel in ("fwd_split", "bwd") for n in (64, 128, 256)),
    *(Problem("fwd", tokens, 64, 16) for tokens in (128, 4096)),
    *(Problem(kernel, tokens, 128, 16) for kernel in ("fwd_split", "bwd") for tokens in (128, 4096)),
    *(Problem(kernel, tokens, 256, 16) for kernel in ("tile", "lanes") for tokens in (128, 4096, 65536)),
    *(Problem("frontier", tokens, 256, 64) for tokens in (128, 4096, 65536)),
]
COMPILED_PROBLEMS = [
    Problem("fwd", 1024, 64, 16),
    *(Problem(kernel, 1024, 256, 16) for kernel in ("fwd_split", "bwd", "tile", "lanes")),
    Problem("frontier", 1024, 256, 64),
]

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

FAST_DOUBLES = {f"cuda:sm{major}{minor}" for major, minor in configs.DOUBLES}

COMPILE_SECONDS, TIME_SECONDS = 1.2, 0.03  # what a configuration takes, as a rule: of a core, of the GPU
COMPILE_LIMIT = 120  # seconds one configuration may take to compile
HOPELESS = 20  # times slower than the best so far: no median is needed
STUMBLE_SECONDS = 0.02  # as a rule a host that stumbles is back by then
PREDICTORS = ["registers", "spills", "shared", "instructions", "occupancy", "prediction"]


# What is launched -----------------------------------------------------------------------------------------------------


@functools.cache
def tensors(tokens, num_expert_sqrt, k, device):
    """Logits of real text, room for scores and indices, the right indices. On the device "meta" without values."""
    x = y = torch.empty(tokens, num_expert_sqrt, dtype=torch.bfloat16, device=device)
    indices = torch.empty(tokens, k, dtype=torch.int32, device=device)
    right = indices
    if device != "meta":
        x, y = study.text_logits(study.text_bytes(tokens), num_expert_sqrt, torch.bfloat16, device)
        right = factored_router(x, y, k)[1]
    return x, y, torch.ones(tokens, k, dtype=torch.bfloat16, device=device), indices, right


def launch(problem, config, device, arch):
    """A kernel, its positional and its keyword arguments, and its grid, for a problem and a configuration."""
    kernel, tokens, n, k = problem
    x, y, scores, indices, right = tensors(tokens, n, k, device)
    logits = (x, y, scores, indices, *x.stride(), *y.stride(), tokens)
    if kernel not in N2_KERNELS:
        plan = plan_of(problem, config, arch in FAST_DOUBLES)
        constants = {"PLAN": plan, "num_warps": plan.num_warps, **configs.OPTIONS}
        return plan.kernel, (*logits[:4], None, *logits[4:]), constants, (plan.grid(tokens),)  # nothing is saved
    constants = config.all_kwargs()
    key = (n, k, configs.token_bucket(tokens))
    if kernel == "fwd":
        function, args = forward.forward_kernel, (*logits, *key)
        constants |= {"TILE_N": triton.next_power_of_2(n)}
    elif kernel == "fwd_split":
        function, args = split_forward.split_forward_kernel, (*logits, *key)
        constants |= {"TILE_K": split_forward.padded_count(k), "PADDED_SQRT": triton.next_power_of_2(n)}
    else:
        function = original.backward_kernel
        grad_x, grad_y = (torch.zeros(tokens, n, device=device) for _ in range(2))
        args = (scores, right, grad_x, grad_y, *scores.stride(), tokens, *key)
    return function, args, constants, (-(-tokens // config.kwargs["TILE_M"]),)


def rule(problem, doubles, num_lanes):
    """The plan that a factored kernel's rules make: where doubles compare as fast as integers or not, for a number of
    lanes a token."""
    kernel, tokens, n, k = problem
    if kernel == "lanes":
        return lanes.plan_of(n, k, torch.bfloat16, torch.bfloat16, 16, False, doubles, num_lanes)
    if kernel == "frontier":
        return frontier.plan_of(n, k, torch.bfloat16, torch.bfloat16, 16, doubles)
    return plan_of_tile(*tensors(tokens, n, k, "meta")[:2], k, torch.bfloat16)


def plan_of(problem, config, doubles):
    """The plan of the rules, with the sizes and warps of a configuration."""
    plan = rule(problem, doubles, config.kwargs.get("LANES"))
    sizes = {FIELDS[name]: size for name, size in config.kwargs.items()}
    if problem.kernel == "lanes":  # loops are made for one size of chunks
        sizes["looped"] = plan.looped and plan.chunk == sizes["chunk"]
    return dataclasses.replace(plan, num_warps=config.num_warps, **sizes)


def chosen(problem):
    """What the package launches for a problem of a factored kernel on the device at hand, as tables name it."""
    kernel, tokens, n, _ = problem
    device = configs.get_device()
    few = tokens <= lanes.most_few_tokens(n, device)
    num_lanes = lanes.lanes_of_few_tokens(n, torch.bfloat16.itemsize) if few else 2
    plan = rule(problem, configs.compares_doubles(device), num_lanes)
    sizes = {name: getattr(plan, FIELDS[name]) for name in configs.TILES[kernel]}
    return label(triton.Config(sizes, num_warps=plan.num_warps, num_stages=1))


def tokens_of(sizes, num_warps):
    """The tokens of one program, by its tile sizes and warps."""
    return sizes.get("TILE_M") or sizes.get("TOKENS") or 32 * num_warps // sizes["LANES"]


def prepare(problem, config, arch):
    """What is timed: a launch on the GPU, run once and its result checked.

    Raises:
        ValueError: a forward kernel selects the wrong experts. And whatever compiling or launching raises.
    """
    function, args, constants, grid = launch(problem, config, "cuda", arch)
    run = functools.partial(function[grid], *args, **constants)
    run()
    if problem.kernel != "bwd":
        *_, indices, right = tensors(*problem[1:], "cuda")
        same = torch.equal(indices, right)
        indices.fill_(-1)  # so that the next configuration cannot pass with this one's result
        if not same:
            raise ValueError("wrong result")
    return run


def space(kernel, name):
    """The configurations of a space ("original", "general", an architecture), or the factored kernel's own."""
    return configs.get_configs(name if kernel in N2_KERNELS else "factored", kernel)


def every_config(kernel):
    """The configurations of all spaces of a kernel, each once."""
    names = ["general", "original", *configs.ARCH_SPACES] + ["few warps"] * (kernel in configs.FEW_WARPS_SPACE)
    found = {label(c): c for name in names for c in space(kernel, name)}
    return list(found.values())


def label(config):
    """A configuration as the tables name it: (tile, num_warps, num_stages)."""
    return " ".join(f"{name}={size}" for name, size in config.kwargs.items()), config.num_warps, config.num_stages


def tile_sizes(tile):
    """A table's tile as a dictionary: "TILE_M=2 TILE_N=512" is {"TILE_M": 2, "TILE_N": 512}."""
    return {name: int(size) for name, size in (part.split("=") for part in tile.split())}


def kept_by_pruning(problem, candidates):
    """The candidates that the package's own tuning would compile for this problem."""
    if problem.kernel not in N2_KERNELS:
        return candidates
    bucket = configs.token_bucket(problem.tokens)
    return configs.pruned(candidates, problem.kernel, bucket, problem.num_expert_sqrt, problem.k)


def all_jobs(problems=PROBLEMS):
    """(problem, config) of everything to measure: shuffled within a problem, the problems in turn, always the same."""
    shuffled = []
    for number, problem in enumerate(problems):
        order = every_config(problem.kernel)
        random.Random(number).shuffle(order)
        shuffled.append([(problem, config) for config in order])
    return [job for turn in itertools.zip_longest(*shuffled) for job in turn if job]


def key_of(problem, config):
    return (*problem, *label(config))


def keys_of(rows):
    return set(rows[KEY].itertuples(index=False, name=None)) if len(rows) else set()


# Compiling, which needs no GPU ----------------------------------------------------------------------------------------


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
    """What the compiler says of a configuration, or the error it ends with. Not for Triton's interpreter."""
    triton.runtime.driver.set_active(_NoDevice(target))
    arch = f"{target.backend}:{'sm' if target.backend == 'cuda' else ''}{target.arch}"
    try:
        kernel, args, constants, _ = launch(problem, config, "meta", arch)
        compiled = kernel.warmup(*args, grid=(1,), **constants)
    except Exception as error:  # whatever it is, it belongs in the configuration's row
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
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    with recording("compiled" if only is None else None, folder="compiled") as new:
        progress = {"total": len(jobs), "desc": "compiling", "disable": only is not None}
        for (problem, config, target), outcome in tqdm(compile_jobs(jobs), **progress):
            row = {"arch": arch_of[target], **dict(zip(KEY, key_of(problem, config), strict=True)), **outcome}
            if tables.key(row, ["arch", *IDENTITY]) not in known:
                new(row)
    return with_occupancy(pd.concat([rows, pd.DataFrame(new.rows)], ignore_index=True))


@contextlib.contextmanager
def ctrl_c_ignored():
    """Lets nothing be cut short."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class recording:
    """Keeps the rows it is called with, and writes them to a table as they come, every few and at the end; so that
    neither Ctrl-C nor an error loses them. To no table where its name is None."""

    def __init__(self, table, folder=None):
        self.table, self.folder, self.rows, self.written = table, folder, [], 0

    def __enter__(self):
        if self.table:
            tables.DATA.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=tables.DATA) as file:
                file.write(bytes(1 << 20))  # raises now what writing would raise after the work
        return self

    def __call__(self, row):
        self.rows.append(row)
        if len(self.rows) - self.written >= 50:
            self.write()

    def __exit__(self, *_):
        with ctrl_c_ignored():
            self.write()

    def write(self):
        if self.table and self.written < len(self.rows):
            tables.append(self.table, self.rows[self.written :], self.folder)
        self.written = len(self.rows)


def with_occupancy(rows):
    """The same rows with the occupancy predicted for their architecture."""
    if not {"registers", "arch"} <= set(rows):
        return rows
    found = zip(rows["arch"], rows["registers"], rows["shared"], rows["num_warps"], strict=True)
    return rows.assign(
        occupancy=[math.nan if math.isnan(regs) else occupancy(arch, int(regs), int(shared), warps)
                   for arch, regs, shared, warps in found]
    )  # fmt: skip


# Timing ---------------------------------------------------------------------------------------------------------------


def measure(run, best):
    """Median, 20% and 80% quantile of the time of `run`, in µs; the least of a few where the best is far from reach.

    A host may stumble for some milliseconds, and then it is not the GPU's time that is measured: one sample says
    nothing, nor do a few in a row, and quantiles that lie far apart, or above what has been seen, say that it happened.
    """
    least = math.inf
    for pause in (0, STUMBLE_SECONDS):
        time.sleep(pause)
        least = min(least, *(timing.once(run) for _ in range(5)))
        if least <= HOPELESS * best:
            break
    else:
        return [least] * 3
    for pause in (0, STUMBLE_SECONDS, STUMBLE_SECONDS):
        time.sleep(pause)
        times = [1000 * ms for ms in timing.do_bench(run, warmup=1, rep=12, quantiles=(0.5, 0.2, 0.8))]
        if times[2] < 1.5 * times[1] and times[0] < 2 * least:
            break
    return times


def this_gpu():
    """The columns that describe the GPU at hand, and what Triton compiles for on it.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("The study times kernels on a GPU, and PyTorch finds none here.")
    processors = torch.cuda.get_device_properties().multi_processor_count
    columns = {"arch": configs.get_arch(configs.get_device()), "multiprocessors": processors}
    return columns, triton.runtime.driver.active.get_current_target()


def run_jobs(jobs, minutes, keep, known=frozenset()):
    """Compiles the jobs in parallel, then times them one by one, and hands each row to `keep` as soon as it is there.

    Rows whose IDENTITY is known are left out. Stops when the minutes are over; at least half of them are for the
    compiler. Raises RuntimeError where there is no GPU.

    Returns:
        How many jobs were left, because the time was over.
    """
    device, target = this_gpu()
    start, limit = time.monotonic(), 60 * minutes
    estimate = 10 + len(jobs) * (COMPILE_SECONDS / os.cpu_count() + TIME_SECONDS)
    print(f"{len(jobs)} configurations: {estimate:.0f} s if all are new, at most {limit:.0f} s")
    rules = {problem: chosen(problem) for problem, _ in jobs if problem.kernel not in N2_KERNELS}
    compiled, left = {}, len(jobs)
    outcomes = compile_jobs([(*job, target) for job in jobs], start + max(limit - left * TIME_SECONDS, limit / 2))
    for (problem, config, _), outcome in tqdm(outcomes, total=len(jobs), desc="compiling"):
        row = {**dict(zip(KEY, key_of(problem, config), strict=True)), **device,
               "chosen": label(config) == rules.get(problem), **outcome}  # fmt: skip
        if tables.key(row, IDENTITY) in known:
            left -= 1
        elif "error" in row:
            keep(row)
            left -= 1
        else:
            compiled[key_of(problem, config)] = row
    best = dict.fromkeys(PROBLEMS, math.inf)
    for problem, config in tqdm([job for job in jobs if key_of(*job) in compiled], desc="timing"):
        if time.monotonic() > start + limit:
            break
        row = compiled[key_of(problem, config)]
        try:
            times = measure(prepare(problem, config, device["arch"]), best[problem])
            best[problem] = min(best[problem], times[0])
            row |= dict(zip(("time_us", "low_us", "high_us"), (round(t, 3) for t in times), strict=True))
        except torch.AcceleratorError:
            raise  # the GPU is lost to this process: nothing after it would be a measurement
        except Exception as error:  # the configuration's own fault, and its row says so
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        keep(row)
        left -= 1
    return left


def run_study(minutes=5, problems=PROBLEMS):
    """Compiles every configuration and times those whose binary is not on record for this GPU and Triton. Ctrl-C keeps
    what was measured.

    Raises RuntimeError where there is no GPU, OSError where the table cannot be written.
    """
    this_gpu()
    known, left = tables.last_keys(tables.of_setting("autotune", ["gpu", "triton"]), KEY, ["binary"]), None
    with recording("autotune") as keep:
        try:
            left = run_jobs(all_jobs(problems), minutes, keep, known)
        except KeyboardInterrupt:
            print("Stopped.")
    print(f"{tables.setting()['gpu']}: {len(keep.rows)} measured and kept in {os.path.relpath(tables.DATA)}"
          + ("" if left == 0 else f", {left or 'others'} left: run again to go on."))  # fmt: skip


def verify(minutes=5):
    """Times the recorded configurations of this GPU again, keeps nothing, and prints the rank correlations."""
    this_gpu()
    recorded = recorded_rows("autotune")
    recorded = recorded[recorded["gpu"] == tables.setting()["gpu"]] if len(recorded) else recorded
    if not len(recorded):
        print(f"No times of {tables.setting()['gpu']} are on record.")
        return
    again = []
    wanted = keys_of(recorded.dropna(subset="time_us"))
    run_jobs([job for job in all_jobs() if key_of(*job) in wanted], minutes, again.append)
    again = pd.DataFrame(again, columns=[*KEY, "time_us"])  # all there are, even if the time was over at once
    both = recorded.merge(again.dropna(), on=KEY, suffixes=("", "_again"))
    for problem, rows in both.groupby(list(Problem._fields)):
        print(f"{title(Problem(*problem)):48} {spearman(rows['time_us'], rows['time_us_again']):6.3f}")
    ratio = both["time_us_again"] / both["time_us"]
    print(f"{'all, ' + str(len(both)):48} {spearman(both['time_us'], both['time_us_again']):6.3f}")
    print(f"time again / time on record: median {ratio.median():.3f}, 5% to 95%: "
          f"{ratio.quantile(0.05):.3f} to {ratio.quantile(0.95):.3f}")  # fmt: skip


# What the tables say --------------------------------------------------------------------------------------------------


def recorded_rows(table):
    """The rows of a table, of every GPU: where a GPU was measured under several Tritons, those of the one with the most
    rows, the latest of equals, so that no two are mixed; of rows of one configuration the last."""
    rows = tables.read(table)
    if not len(rows):
        return rows
    rows = rows.drop_duplicates(["gpu", "triton", *KEY], keep="last")
    groups = [group for _, group in rows.groupby(["gpu", "triton"])]
    groups.sort(key=lambda group: (len(group), group.index.max()))
    return pd.concat({group["gpu"].iloc[0]: group for group in groups}.values(), ignore_index=True)


def of_gpu(rows, gpu=RECORDED_GPU):
    """The rows of a GPU, with the occupancy and the time predicted from what the compiler said; none if none are."""
    if not len(rows) or gpu not in set(rows["gpu"]):
        return pd.DataFrame()
    rows = rows[rows["gpu"] == gpu].reset_index(drop=True)
    measured = ["time_us", "low_us", "high_us", "error", "chosen"]
    measured += ["registers", "spills", "shared", "instructions", "binary"]
    rows = with_occupancy(rows.reindex(columns=list(dict.fromkeys([*rows, *measured]))))
    return rows.assign(
        problem=[Problem(*values) for values in rows[list(Problem._fields)].itertuples(index=False, name=None)],
        config=list(rows[KEY[4:]].itertuples(index=False, name=None)),
        prediction=[prediction(row) for row in rows.itertuples()],
    )


def prediction(row):
    """Cycles a launch should take: waves of programs, times the instructions of each, issued by four schedulers."""
    if math.isnan(row.instructions) or not row.occupancy:
        return math.nan
    programs = math.ceil(row.tokens / tokens_of(tile_sizes(row.tile), row.num_warps))
    resident = min(row.occupancy, math.ceil(programs / row.multiprocessors))
    waves = math.ceil(programs / (row.multiprocessors * row.occupancy))
    latency = 6  # cycles from an instruction to one that needs it, where no other warp fills them
    return waves * rounds(row) * row.instructions * max(latency, resident * row.num_warps / 4)


def rounds(row):
    """How often a program should run through most of its code."""
    sizes = tile_sizes(row.tile)
    if row.kernel == "fwd":
        return sizes["TILE_M"]
    if row.kernel == "fwd_split":
        # Once for each tile and once for each expert that is among the best so far: of the experts of the j-th tile, in
        # random order, k / j are.
        tiles = math.ceil(row.num_expert_sqrt**2 / sizes["TILE_N"])
        return sizes["TILE_M"] * (tiles + row.k * sum(1 / tile for tile in range(1, tiles + 1)))
    if row.kernel == "bwd":
        return math.ceil(row.k / sizes["TILE_K"])
    if row.kernel == "frontier":
        return math.ceil(row.num_expert_sqrt / sizes["PIECE"])  # networks; the loop that pops the pairs is short
    return 1


def title(problem):
    return f"{NAMES[problem.kernel]}, {problem.tokens} tokens, N = {problem.num_expert_sqrt}"


def spearman(a, b):
    """The rank correlation of two columns, over the rows that have both."""
    both = pd.DataFrame({"a": a, "b": b}).dropna()
    return both["a"].rank().corr(both["b"].rank()) if len(both) > 2 else math.nan


def times_of(rows, problem, wanted=None):
    """{configuration: µs} of a problem; of the wanted configurations alone, where given. A failed one takes forever."""
    rows = rows[rows["problem"] == problem]
    times = dict(zip(rows["config"], rows["time_us"].fillna(math.inf), strict=True))
    return times if wanted is None else {label(c): times[label(c)] for c in wanted if label(c) in times}


def lists_of(rows, problem):
    """The lists one could tune a problem over, as {name: {configuration: µs}}: original, general, the architecture's,
    and what pruning leaves of the general one."""
    if problem.kernel not in N2_KERNELS:
        return {"own": times_of(rows, problem)}
    arch = rows["arch"].iloc[0]
    names = {"original": "original", "general": "general"}
    names |= {"architecture": arch} if arch in configs.ARCH_SPACES else {}
    wanted = {name: space(problem.kernel, where) for name, where in names.items()}
    wanted["pruned"] = kept_by_pruning(problem, wanted["general"])
    return {name: times_of(rows, problem, candidates) for name, candidates in wanted.items()}


def gains(rows):
    """For each problem of the N² kernels: the best time of each list, in µs, and how many percent faster the longer
    and the architecture's list are than the original one, and the latter than the general one."""
    found = []
    gained = ["general gain %", "architecture gain %", "architecture over general %"]
    names = ["problem", "original", "general", "architecture", "pruned", *gained]
    for problem in problems_of(rows, N2_KERNELS):
        best = {name: min(times.values(), default=math.nan) for name, times in lists_of(rows, problem).items()}
        row = {"problem": title(problem), "architecture": math.nan, **best}
        row["general gain %"] = 100 * (row["original"] / row["general"] - 1)
        row["architecture gain %"] = 100 * (row["original"] / row["architecture"] - 1)
        row["architecture over general %"] = 100 * (row["general"] / row["architecture"] - 1)
        found.append(row)
    return pd.DataFrame(found, columns=names).set_index("problem").replace(math.inf, math.nan)


def choices(rows):
    """For each problem of the N² kernels: the best configuration and the best of the architecture's list, what the
    latter costs over the former, and the programs each launches."""
    found = []
    names = [f"{name}{what}" for name in ("best", "architecture") for what in ("", " programs", " µs")]
    for problem in problems_of(rows, N2_KERNELS):
        row = {"problem": title(problem)}
        lists = lists_of(rows, problem)
        for name, times in (("best", times_of(rows, problem)), ("architecture", lists.get("architecture", {}))):
            if times and math.isfinite(min(times.values())):
                config = min(times, key=times.get)
                programs = math.ceil(problem.tokens / tokens_of(tile_sizes(config[0]), config[1]))
                row |= {name: short(config), f"{name} programs": programs, f"{name} µs": times[config]}
        found.append(row)
    frame = pd.DataFrame(found, columns=["problem", *names]).set_index("problem")
    return frame.assign(**{"time / best": frame["architecture µs"] / frame["best µs"]})


def rules(rows):
    """For each problem of the factored kernels: the best configuration, the one that their rules choose, and what that
    costs over the best."""
    found = []
    for problem in problems_of(rows, [kernel for kernel in NAMES if kernel not in N2_KERNELS]):
        times = times_of(rows, problem)
        best = min(times, key=times.get)
        ours = rows[(rows["problem"] == problem) & rows["chosen"].eq(True)]
        row = {"problem": title(problem), "best": short(best), "chosen": "-", "time / best": math.nan}
        if len(ours):
            row |= {"chosen": short(ours["config"].iloc[0]), "time / best": ours["time_us"].iloc[0] / times[best]}
        found.append(row)
    return pd.DataFrame(found, columns=["problem", "best", "chosen", "time / best"]).set_index("problem")


def measured_list(rows):
    """For each problem: how long the architecture's measured list is, and the best of it over the best of all. Times of
    one binary count as one."""
    name, found = f"{rows['arch'].iloc[0]}:measured", []
    for problem in problems_of(rows) if name in configs.SPACES else ():
        group = rows[rows["problem"] == problem]
        listed = group["config"].isin([label(config) for config in configs.get_configs(name, problem.kernel)])
        best = group["time_us"][group["binary"].isin(group["binary"][listed])].min()
        found.append({"problem": title(problem), "configurations": listed.sum(), "of": len(group),
                      "time / best": best / group["time_us"].min()})  # fmt: skip
    return pd.DataFrame(found, columns=["problem", "configurations", "of", "time / best"]).set_index("problem")


def problems_of(rows, kernels=tuple(NAMES)):
    """The problems in which something was timed, in the order of PROBLEMS."""
    timed = set(rows.dropna(subset="time_us")["problem"])
    return [problem for problem in PROBLEMS if problem in timed and problem.kernel in kernels]


def short(config):
    """A configuration in a few characters: tile, warps, stages."""
    tile, warps, stages = config
    return f"{' × '.join(map(str, tile_sizes(tile).values()))}, {warps} warps, {stages} stages"


def noise(rows):
    """How far times of one binary in one problem lie apart: the largest over the smallest, for each measured twice."""
    times = rows.dropna(subset="time_us").groupby([*Problem._fields, "binary"])["time_us"]
    return (times.max() / times.min())[times.size() > 1]


def noise_table(rows):
    """The quantiles of the noise, in percent, by kernel."""
    percent = 100 * (noise(rows) - 1)
    return percent.groupby("kernel").quantile([0.5, 0.9]).unstack().rename(columns="{:.0%} of pairs".format)


def tries_table(rows, within=1.05):
    """The tries in random order after which tuning is, as a rule, within 5% of the best; "-" where a list never is."""
    found = []
    for problem in problems_of(rows):
        best = min(times_of(rows, problem).values())
        row = {"problem": title(problem)}
        for name, times in lists_of(rows, problem).items():
            close = np.flatnonzero(regret(times, best) <= within)
            row[name] = f"{close[0] + 1} of {len(times)}" if len(close) else f"- of {len(times)}"
        found.append(row)
    return pd.DataFrame(found, columns=None if found else ["problem"]).set_index("problem")


def compiled_rows():
    """What the compiler said last, of the Triton it was asked for most, with predicted occupancy."""
    rows = tables.read("compiled")
    if not len(rows):
        return rows
    rows = rows.drop_duplicates(["triton", "arch", *KEY], keep="last")
    groups = [group for _, group in rows.groupby("triton", sort=False)]
    return with_occupancy(max(groups, key=len).reset_index(drop=True))


def compiled_table(rows):
    """For each kernel and architecture: configurations asked for, failed, spilling; distinct binaries, occupancy."""
    groups = rows.assign(
        failed=rows["registers"].isna(),
        spilling=rows["spills"] > 0,
        config=rows["tile"] + rows["num_warps"].astype(str),
    ).groupby(["kernel", "arch"])
    return pd.DataFrame(
        {
            "configurations": groups.size(),
            "failed": groups["failed"].sum(),
            "spilling": groups["spilling"].sum(),
            "tile × warps": groups["config"].nunique(),
            "binaries": groups["binary"].nunique(),
            "registers (median)": groups["registers"].median(),
            "programs at once (median)": groups["occupancy"].median(),
        }
    )


def correlations(rows):
    """The rank correlation of each predictor with the measured time, for each problem."""
    timed = rows.dropna(subset="time_us")
    return pd.DataFrame(
        {
            title(problem): {
                name: spearman(group[name], group["time_us"]) for name in PREDICTORS if group[name].nunique() > 1
            }
            for problem in problems_of(rows)
            for group in [timed[timed["problem"] == problem]]
        }
    ).T.reindex(columns=PREDICTORS)


def prediction_rule(rows, within=2.0):
    """For each problem: how many binaries a tuner times that skips those predicted slower than `within` times the
    best prediction, and the best of them over the best of all."""
    found = []
    for problem in problems_of(rows):
        group = rows[(rows["problem"] == problem)].dropna(subset=["time_us", "prediction"]).drop_duplicates("binary")
        kept = group[group["prediction"] <= within * group["prediction"].min()]
        found.append({"problem": title(problem), "binaries": len(group), "kept": len(kept),
                      "best kept / best": kept["time_us"].min() / group["time_us"].min()})  # fmt: skip
    return pd.DataFrame(found, columns=["problem", "binaries", "kept", "best kept / best"]).set_index("problem")


def transfer(rows, kernel):
    """What the best configuration of one problem (row) costs at another (column), over the best there."""
    problems = problems_of(rows, (kernel,))
    times = {problem: times_of(rows, problem) for problem in problems}
    best = {problem: min(times[problem], key=times[problem].get) for problem in problems}
    names = [f"{p.tokens}, {p.num_expert_sqrt}" for p in problems]
    loss = [[times[at].get(best[of], math.nan) / times[at][best[at]] for at in problems] for of in problems]
    return pd.DataFrame(loss, names, names).replace(math.inf, math.nan)


def paste(rows, within=1.02):
    """The lists to paste into configs.py: few values that hold, for every problem, one within 2% of its best."""
    lines = ["MEASURED_SPACE = {"]
    for kernel in dict.fromkeys(problem.kernel for problem in problems_of(rows)):
        good = {}
        for problem in problems_of(rows, (kernel,)):
            times = times_of(rows, problem)
            limit = within * min(times.values())
            for tile, warps, _ in (config for config, us in times.items() if us <= limit):
                first = min(stages for *other, stages in times if other == [tile, warps])
                good.setdefault((tile, warps, first), set()).add(problem)
        chosen, missing = [], set().union(*good.values())
        while missing:
            config = max(sorted(good), key=lambda config: len(good[config] & missing))
            chosen.append(config)
            missing -= good[config]
        values = [[*tile_sizes(tile).values(), warps, stages] for tile, warps, stages in chosen]
        lists = ", ".join(str(sorted(set(column))) for column in zip(*values, strict=True))
        lines.append(f'    "{kernel}": ({lists}),')
    return "\n".join([*lines, "}"])


# Pictures -------------------------------------------------------------------------------------------------------------


def draw_heat_map(rows, problem):
    """Time over the best of the problem, tile against warps, a panel for each number of stages."""
    group = rows[rows["problem"] == problem]
    if group["time_us"].isna().all():
        return None
    relative = group.assign(relative=group["time_us"] / group["time_us"].min())
    tiles = sorted(group["tile"].unique(), key=lambda tile: tuple(tile_sizes(tile).values()))
    names = {tile: " × ".join(map(str, tile_sizes(tile).values())) for tile in tiles}
    stages = sorted(group["num_stages"].unique())
    figure, panels = plt.subplots(
        1, len(stages), figsize=(2.1 * len(stages) + 1.6, 0.27 * len(tiles) + 1.7), sharey=True, squeeze=False
    )
    top = np.log2(relative["relative"].max())
    warps = sorted(group["num_warps"].unique())
    for count, axes in zip(stages, panels[0], strict=True):
        cells = relative[relative["num_stages"] == count].pivot(index="tile", columns="num_warps", values="relative")
        cells = cells.reindex(index=tiles, columns=warps).rename(index=names)
        sns.heatmap(np.log2(cells), ax=axes, cmap="cividis_r", vmin=0, vmax=max(top, 0.1), cbar=False, annot=cells,
                    fmt=".3g", annot_kws={"size": 8}, linewidths=0.5)  # fmt: skip
        axes.set(title=f"{count} stages" if count > 1 else "1 stage", xlabel="warps", ylabel="")
        axes.tick_params(axis="y", labelrotation=0)
        axes.grid(False)
        axes.set_facecolor("0.93")  # not in any list, or it failed
    panels[0][0].set_ylabel(" × ".join(tile_sizes(tiles[0])))
    figure.suptitle(f"{title(problem)}: time / best", x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_distribution(rows):
    """The time of every configuration over the best of its problem, the shorter lists marked."""
    problems = problems_of(rows, N2_KERNELS)
    if not problems:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(problems) + 1.4), layout="constrained")
    marks = {"general": (study.BLUE, ".", 5), "architecture": (study.GREEN, "D", 6), "original": (study.RED, "o", 8)}
    for line, problem in enumerate(problems):
        lists, best = lists_of(rows, problem), min(times_of(rows, problem).values())
        for name, (color, marker, size) in marks.items():
            values = np.array([us for us in lists.get(name, {}).values() if math.isfinite(us)]) / best
            hollow = {} if name == "general" else {"markerfacecolor": "none", "markeredgewidth": 1.4}
            axes.plot(values, np.full(len(values), line), marker, color=color, markersize=size, linestyle="none",
                      label=f"{name} list" if line == 0 else None, **hollow)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(problems)), [title(problem) for problem in problems])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="time / best", title="Every configuration that ran")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def regret(times, best, tries=400):
    """The best found after 1, 2, 3... tries over the best there is: the median of many random orders."""
    values = np.array(list(times.values()), dtype=float)
    orders = np.random.default_rng(0).permuted(np.tile(values, (tries, 1)), axis=1)
    return np.median(np.minimum.accumulate(orders, axis=1), axis=0) / best


def draw_gains(rows):
    """How much faster the best of the longer lists is than the best of the original one, beside what was expected."""
    table = gains(rows)
    if table.empty:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(table) + 1.4), layout="constrained")
    axes.axvspan(1.05, 1.15, color="0.8", label="the guide's 5 to 15%")
    axes.axvline(1, color="0.4", linewidth=1)
    for name, color, marker in (("general", study.BLUE, "o"), ("architecture", study.GREEN, "D")):
        axes.plot(table["original"] / table[name], range(len(table)), marker, color=color, label=f"{name} list")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda speed, _: f"{speed:g}×" if speed >= 1 else f"1/{1 / speed:g}")
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.set(xlabel="speed, over that of the original list's best", title="What other lists are worth")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_regret(rows, problems):
    """Regret curves: tuning over the general list, what pruning leaves of it, the original and the architecture's."""
    problems = [problem for problem in problems if problem in problems_of(rows)]
    if not problems:
        return None
    figure, panels = plt.subplots(1, len(problems), figsize=(3.6 * len(problems), 3.6), sharey=True, squeeze=False)
    styles = {
        "general": (study.BLUE, "-"), "pruned": (study.ORANGE, "-"), "architecture": (study.GREEN, "--"),
        "original": (study.RED, ":"), "own": (study.BLUE, "-"),
    }  # fmt: skip
    for problem, axes in zip(problems, panels[0], strict=True):
        best = min(times_of(rows, problem).values())
        for name, times in lists_of(rows, problem).items():
            curve = regret(times, best)
            color, line = styles[name]
            axes.plot(np.arange(1, len(curve) + 1), curve, color=color, linestyle=line, linewidth=2, label=name,
                      marker="o" if len(curve) == 1 else None)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=title(problem).replace(", ", "\n", 1), xlabel="configurations tried")
    panels[0][0].set_ylabel("best found / best of all")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure


def draw_correlations(rows):
    """How well each of the compiler's numbers ranks the configurations."""
    table = correlations(rows)
    if table.empty:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(table) + 1.3))
    sns.heatmap(table.astype(float), ax=axes, cmap="vlag", vmin=-1, vmax=1, annot=True, fmt=".2f", linewidths=0.5,
                cbar=False)  # fmt: skip
    axes.set(title="Rank correlation with the measured time", ylabel="")
    axes.tick_params(axis="x", labelrotation=20)
    axes.grid(False)
    axes.set_facecolor("0.93")  # the same for all configurations
    figure.tight_layout()
    return figure


def draw_transfer(rows):
    """A panel for each kernel: the best configuration of one problem used at the others."""
    matrices = {kernel: transfer(rows, kernel) for kernel in NAMES}
    matrices = {kernel: matrix for kernel, matrix in matrices.items() if len(matrix) > 1}
    if not matrices:
        return None
    figure, panels = plt.subplots(2, math.ceil(len(matrices) / 2), figsize=(11, 6.6), squeeze=False)
    for axes in panels.flat[len(matrices) :]:
        axes.remove()
    for (kernel, matrix), axes in zip(matrices.items(), panels.flat, strict=False):
        sns.heatmap(matrix, ax=axes, cmap=study.SCORES, vmin=1, vmax=2, annot=True, fmt=".2f", cbar=False,
                    linewidths=0.5, annot_kws={"size": 9})  # fmt: skip
        axes.set(title=NAMES[kernel], xlabel="used at tokens, N", ylabel="best of tokens, N")
        axes.tick_params(axis="y", labelrotation=0)
        axes.set_xticks(axes.get_xticks(), [name.replace(", ", "\n") for name in matrix], rotation=0)
    figure.suptitle("Time with another problem's best configuration / best", x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_two_gpus(here, there):
    """Every configuration on two GPUs, each time over the best of its problem on that GPU."""
    names = [frame["gpu"].iloc[0] for frame in (here, there)]
    columns = []
    for frame in (here, there):
        best = frame.groupby(list(Problem._fields))["time_us"].transform("min")
        columns.append(frame.assign(relative=frame["time_us"] / best)[[*KEY, "relative"]].dropna())
    both = columns[0].merge(columns[1], on=KEY, suffixes=("_here", "_there"))
    figure, axes = plt.subplots(figsize=(6.4, 6))
    for color, (kernel, group) in zip(sns.color_palette("colorblind"), both.groupby("kernel"), strict=False):
        axes.plot(group["relative_there"], group["relative_here"], "o", color=color, markersize=4, alpha=0.6,
                  label=NAMES[kernel])  # fmt: skip
    axes.axline((1, 1), slope=1, color="0.5", linewidth=1)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"time / best, {names[1]}", ylabel=f"time / best, {names[0]}", title="One order on both?")
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def show(make, rows, *args, name=None):
    """Shows what `make` makes of recorded rows, a table, or a picture that is kept under a name, if there is any."""
    made = make(rows, *args) if len(rows) else None
    if made is None or (not name and made.empty):
        print("Nothing of this kind is on record yet.")
    elif name:
        study.save_figure(made, name)
    else:
        print(made.to_string(float_format="{:.3g}".format, na_rep="-"))


def draw_here():
    """Draws the GPU at hand beside the recorded one, and prints the lists to paste into configs.py."""
    rows = recorded_rows("autotune")
    here, there = of_gpu(rows, tables.setting()["gpu"]), of_gpu(rows)
    if not len(here) or here["time_us"].isna().all():
        print(f"No times of {tables.setting()['gpu']} are on record.")
        return
    show(draw_distribution, here, name="autotune_here")
    if len(there) and tables.setting()["gpu"] != RECORDED_GPU:
        study.save_figure(draw_two_gpus(here, there), "autotune_two_gpus")
    print(paste(here))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="stop after this long (default: %(default)s)")
    other = parser.add_mutually_exclusive_group()
    for name in ("verify", "compile"):
        other.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    try:
        if options.compile:
            compile_table()
        elif options.verify:
            verify(options.minutes)
        else:
            run_study(options.minutes)
            plt.switch_backend("agg")
            draw_here()
            print(f"The figures are in {study.FIGURES}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; what was measured before is kept.")
    except (OSError, RuntimeError) as error:
        sys.exit(f"{error}\nWhat was recorded before is as it was.")


if __name__ == "__main__":
    main()
