"""What notebook 03 measures: the router and its rivals against tokens, N and k, beside the speed of a copy.

The floor of a case is the time its logits, scores and indices take at the speed of a copy, measured in the same run.
"""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import time

import numpy as np
import torch
import triton
from triton.runtime.autotuner import Autotuner

from omni_kernels import brute_force_router, factored_router
from omni_kernels.configs import get_device

from . import tables, timing
from .binaries import binary_of
from .faults import attempt
from .progress import tqdm
from .rivals import (
    ALL_SUMS,
    CASE,
    COMPILED,
    DTYPES,
    FACTORED,
    FRONTIER,
    LADDER,
    OMNI,
    OPTIMIZED,
    ORIGINAL,
    PUBLIC,
    QUACK,
    RIVALS,
    RUNGS,
    TO_READ,
    Case,
)

SUBJECT = ["rival", *CASE, "layout"]  # what a row is of
IDENTITY = [*SUBJECT, "binary", "error"]  # and what was compiled for it, or what kept it from that
WARM_UP_TO = 16384  # tokens whose logits stay in the cache, as behind the layer that has just made them
QUANTILES = {"us": 0.5, "us_10": 0.1, "us_90": 0.9}
SECONDS = 2  # that a case takes, as a rule, once everything is compiled
WORKERS, PARTS = 14, 4  # processes that compile, and those of them that share the configurations of a tuned kernel

# --- what is measured ---

MAIN = Case(65536, 256, 16, "bf16")
FP32 = MAIN._replace(dtype="fp32")
TARGETS = {
    MAIN: [COMPILED, QUACK], MAIN._replace(dtype="fp16"): [QUACK], FP32: [COMPILED, QUACK],
    Case(1048576, 256, 16, "bf16"): [QUACK], Case(1048576, 256, 8, "bf16"): [QUACK],
    Case(262144, 1024, 16, "bf16"): [QUACK], Case(16384, 4096, 16, "bf16"): [QUACK],
    Case(65536, 64, 16, "bf16"): [QUACK], Case(65536, 128, 16, "bf16"): [QUACK], Case(65536, 100, 10, "bf16"): [],
    MAIN._replace(k=32): [QUACK], MAIN._replace(k=64): [QUACK], MAIN._replace(k=128): [],
    Case(65536, 360, 32, "bf16"): [], Case(65536, 1000, 32, "bf16"): [],
    **{MAIN._replace(num_tokens=t): [QUACK] for t in (1, 128, 1024, 4096, 16384)},
}  # fmt: skip


def _against(size, powers, some):
    """Cases that differ in one size, a power of two. PyTorch and omni_router run in all of them, the rivals of `some`,
    which are slow or slow to compile, at the sizes it gives."""
    return [
        (MAIN._replace(**{size: 1 << power}), [*(name for name in some if 1 << power in some[name]), FACTORED, OMNI])
        for power in powers
    ]


# The timed tables: cases, each with its rivals.
TIMED = {
    "ladder": [(MAIN, LADDER)],
    "targets": [(case, [FACTORED, *some, OMNI]) for case, some in TARGETS.items()],
    "against_tokens": _against("num_tokens", range(21), {
        ALL_SUMS: (1, 16, 1024, 65536), ORIGINAL: (1, 16, 1024, 65536), OPTIMIZED: (1024, 65536),
        QUACK: (1024, 65536, 1048576),
    }),
    "against_size": _against("num_expert_sqrt", range(4, 13), {
        ORIGINAL: (64, 256), OPTIMIZED: (64, 256), QUACK: (64, 256, 1024),
    }),
    "against_k": _against("k", range(9), {
        ORIGINAL: (16,), OPTIMIZED: (16,), QUACK: (8, 16, 32), FRONTIER: (4, 8, 16, 32),
    }),
    "rungs": [
        *((case, [*TO_READ, OMNI]) for case in (MAIN, MAIN._replace(num_tokens=1024))),
        *((case, [*TO_READ[2:], OMNI]) for case in (FP32, MAIN._replace(num_expert_sqrt=1024))),
    ],
    "guide": [(Case(1024, size, k, "bf16"), [ORIGINAL, OPTIMIZED, OMNI]) for size in (64, 128, 256) for k in (16, 32)],
}  # fmt: skip

MEMORY = [(Case(1024, 1 << power, 16, "bf16"), [ALL_SUMS, FACTORED, OMNI]) for power in range(4, 13)]

# How the same logits may lie in memory.
LAYOUTS = {
    "rows": lambda logits: logits,
    "rows of a wider matrix": lambda logits: torch.cat([logits, logits], 1)[:, : logits.shape[1]],
    "columns": lambda logits: logits.t().contiguous().t(),
}
TABLES = TIMED | {"layouts": [(case, list(LAYOUTS)) for case in (MAIN, FP32)], "memory": MEMORY}


@triton.jit
def empty_kernel():
    pass


def logits(case, device=None):
    """The two factors of a case: normal, from a fixed seed. device: the notebooks' unless given."""
    generator = torch.Generator(device or get_device()).manual_seed(0)
    shape = case.num_tokens, case.num_expert_sqrt
    return tuple(
        torch.randn(shape, device=generator.device, generator=generator).to(DTYPES[case.dtype]) for _ in range(2)
    )


def num_bytes(case):
    """What a forward pass has to move: two rows of logits in, k scores and k indices (int32) out, for every token."""
    size = DTYPES[case.dtype].itemsize
    return case.num_tokens * (2 * case.num_expert_sqrt * size + case.k * (size + 4))


def floor_us(case, bandwidth_gbs):
    return num_bytes(case) / bandwidth_gbs / 1e3


def examined(rival, num_expert_sqrt, k):
    """How many values of a token a rival looks at: logits and sums."""
    best = min(k, num_expert_sqrt)
    if RIVALS[rival].family == "all N² sums":
        return num_expert_sqrt**2
    if RIVALS[rival].family == "compositions":
        return 2 * num_expert_sqrt + best**2
    return 2 * num_expert_sqrt + sum(min(best, k // rank) for rank in range(1, best + 1))


# --- measuring ---


def quantiles(times):
    """The columns of a row that say what some rounds took."""
    return dict(zip(QUANTILES, np.quantile(times, list(QUANTILES.values())).tolist(), strict=True))


def measure(again="OMNI_AGAIN" in os.environ):
    """Measure the cases that are not on record for this GPU, these versions and what is compiled here; with `again` all
    of them. Of a case that lacks a row all rivals are measured, so that one host has timed their calls.

    What cannot be measured is told of, and does not keep the others from it.

    Returns:
        {table: what was done about it}.

    Raises:
        OSError: a fault of the machine, such as a full disk, which is no result.
    """
    if not torch.cuda.is_available():
        return dict.fromkeys(TABLES, "not measured: no GPU here")
    start = time.perf_counter()
    print(f"Compiling: a minute or two. Then {sum(map(len, TABLES.values()))} cases: about {SECONDS:.0f} s each if new")
    ahead = attempt(_compile_ahead, [pair for table in TABLES if table != "layouts" for pair in TABLES[table]])
    done = {"compiled ahead": ahead["error"] if ahead else f"in {time.perf_counter() - start:.0f} s"}
    for table, cases in TABLES.items():
        start = time.perf_counter()
        known = set() if again else tables.last_keys(tables.of_setting(table), SUBJECT)
        done[table] = attempt(_measure_table, table, cases, known)
        if isinstance(done[table], dict):
            done[table] = done[table]["error"]
        done[table] += f", in {time.perf_counter() - start:.0f} s"
    return done


def _measure_table(table, cases, known):
    count = 0
    for case, names in tqdm(cases, desc=table, unit="case", leave=False):
        rows = rows_of(table, case, names, known)
        if rows:
            tables.append(table, rows)
            count += 1
    return f"{count} of {len(cases)} cases measured now, the others before"


def rows_of(table, case, names, known=frozenset()):
    """A table's rows of a case: every rival on the same logits, or `omni_router` on logits that lie differently in
    memory. None where the identities of all are known."""
    factors = logits(case)
    subjects = [({"rival": name}, factors) for name in names]
    if table == "layouts":
        subjects = [({"rival": OMNI, "layout": name}, tuple(map(LAYOUTS[name], factors))) for name in names]
    unknown = dict.fromkeys(["binary", "error"])
    rows = [{**label, **case._asdict(), **unknown, **attempt(compiled_by, label["rival"], x, y, case.k)}
            for label, (x, y) in subjects]  # fmt: skip
    if all(tables.key(row, IDENTITY) in known for row in rows):
        return []
    if table == "memory":
        measured = {"results_bytes": num_bytes(case) - sum(factor.nbytes for factor in factors), "peak_bytes": None}
        rest = (peak_bytes,)
    else:
        measured = {"floor_us": floor_us(case, limits()["bandwidth_gbs"]), **limits()}
        measured |= dict.fromkeys(["method", *QUANTILES, "call_us", "check"])
        rest = timed, reference(*factors, case.k)
    function, *want = rest
    for row, (_, (x, y)) in zip(rows, subjects, strict=True):
        row |= measured
        if not row["error"]:
            row |= attempt(function, row["rival"], x, y, case.k, *want)
    return rows


def compiled_by(name, x, y, k):
    """What a rival launches; of PyTorch's own operators nothing, since they belong to its version."""
    if name == ALL_SUMS or RIVALS[name].family == "compositions":
        RIVALS[name].route(x, y, k)
        return {"binary": ""}
    return {"binary": binary_of(lambda: RIVALS[name].route(x, y, k))}


def timed(name, x, y, k, want):
    """A rival's times and how its result compares; what the first call compiles and tunes is not timed."""
    route = RIVALS[name].route
    check = compare(route(x, y, k), want, x, y)
    return {**times_us(lambda *logits: route(*logits, k), x, y), "check": check}


def times_us(call, *tensors):
    """What a call takes: its kernels, in a CUDA graph (quantiles, in µs), and from Python. Inputs of more than
    WARM_UP_TO tokens come from memory. Where there can be no graph, the time of the call is all there is."""
    from_python = timing.call_us(lambda: call(*tensors))
    count = 1 if len(tensors[0]) <= WARM_UP_TO else timing.num_copies(sum(tensor.nbytes for tensor in tensors))
    copies = [tensors, *(tuple(map(_copy, tensors)) for _ in range(count - 1))]
    try:
        times = timing.kernel_us([functools.partial(call, *copy) for copy in copies], list(QUANTILES.values()))
        method = "graph"
    except RuntimeError:  # it synchronises, or takes too much memory
        torch.cuda.synchronize()
        times, method = [from_python] * len(QUANTILES), "call"
    return {"method": method, **dict(zip(QUANTILES, times, strict=True)), "call_us": from_python}


def _copy(tensor):
    """With the same strides."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@functools.cache
def limits():
    """What no kernel can beat here: the bytes a copy reads and writes (GB/s, no cache holds them), an empty kernel."""
    source = torch.ones(1 << 29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_us = timing.call_us(lambda: target.copy_(source))  # long enough to hide any host
    empty_us = timing.kernel_us([lambda: empty_kernel[(1,)]()])[0]
    return {"bandwidth_gbs": 2 * len(source) / copy_us / 1e3, "empty_us": empty_us}


def reference(x, y, k):
    """What every result is compared with: `factored_router`'s, itself compared with the definition on a sample."""
    want = factored_router(x, y, k)
    count = min(len(x), max(1, (1 << 24) // x.shape[1] ** 2))
    sample = torch.linspace(0, len(x) - 1, count, device=x.device).round().long()
    some_x, some_y, some = x[sample], y[sample], tuple(part[sample] for part in want)
    if compare(some, brute_force_router(some_x, some_y, k), some_x, some_y) == "inexact":
        raise RuntimeError("factored_router does not agree with the definition")
    return want


def compare(got, want, x, y):
    """How a result compares with the right one.

    Returns:
        "equal": the same scores and experts. "ties": the same scores, and experts that have them, but where scores are
        equal it chose or ordered the experts differently. "inexact": anything else.
    """
    scores, experts = got[0], got[1].long()
    if torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]):
        return "equal"
    num_expert_sqrt = x.shape[1]
    if not torch.equal(scores, want[0]) or experts.min() < 0 or experts.max() >= num_expert_sqrt**2:
        return "inexact"
    sums = x.gather(1, experts // num_expert_sqrt).float() + y.gather(1, experts % num_expert_sqrt).float()
    distinct = (experts.sort(1).values.diff(dim=1) > 0).all()
    return "ties" if distinct and torch.equal(sums.to(scores.dtype), scores) else "inexact"


def peak_bytes(name, x, y, k):
    """The most a call has allocated at a time, its results included, its logits not. What is allocated once, such as a
    library's workspace, an earlier call has allocated."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    RIVALS[name].route(x, y, k)
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def _compile_ahead(work):
    """Compile what the cases of some tables will launch, in many processes, which share Triton's cache on disk.

    What fails here fails again, and is recorded, when it is measured. Meanwhile this process compiles what only it can.
    """
    pairs = list(dict.fromkeys((name, case) for case, names in work for name in names))
    jobs = collections.defaultdict(list)
    for name, case in pairs:
        for part in range(
            PARTS if name in (PUBLIC, ORIGINAL, OPTIMIZED) else name in (OMNI, FRONTIER, *RUNGS, *TO_READ)
        ):
            jobs[name, case[1:], part].append(case)  # one job: few of its token counts need a kernel of their own
    if not jobs:
        return
    workers = min(WORKERS, len(jobs), max(1, torch.cuda.mem_get_info()[0] >> 31))  # a process takes half a GiB or more
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for (name, _, part), cases in sorted(jobs.items(), key=lambda job: -len(job[1])):
            pool.submit(_compile_job, name, sorted(cases), part)
        for name, case in pairs:
            if name in (COMPILED, QUACK):
                attempt(RIVALS[name].route, *logits(case), case.k)


def _compile_job(name, cases, part):
    """Compile a rival for some cases; of what it would tune, every PARTS-th configuration, and without timing any."""

    def compile_configurations(tuner, *args, warmup, **kwargs):
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs)[part::PARTS]:
            attempt(functools.partial(tuner.fn.warmup, *args, **kwargs, **config.all_kwargs()))

    Autotuner.run = compile_configurations
    for case in cases:
        shape = case.num_tokens, case.num_expert_sqrt
        x, y = (torch.zeros(shape, dtype=DTYPES[case.dtype], device="cuda") for _ in range(2))
        attempt(RIVALS[name].route, x, y, case.k)
