"""What notebook 03 measures and draws: the rivals, the rungs of the ladder, the measured tables and their pictures.

The floor of a case is the time its logits, scores and indices take at the speed of a copy, measured in the same run.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tables
import timing
import torch
import triton
from binaries import binary_of
from routing_study import BLUE, GREEN, ORANGE, RED, save_figure
from tqdm import tqdm
from triton.runtime.autotuner import Autotuner

from omni_kernels import (
    brute_force_router,
    factored,
    factored_router,
    omni_router,
    triton_omni_router_func,
    triton_omni_router_func_optimized,
)
from omni_kernels.configs import get_device
from omni_kernels.factored import frontier, lanes, tile

Case = collections.namedtuple("Case", ["num_tokens", "num_expert_sqrt", "k", "dtype"])
CASE = list(Case._fields)
SUBJECT = ["rival", *CASE, "layout"]  # what a row is of
IDENTITY = [*SUBJECT, "binary", "error"]  # and what was compiled for it, or what kept it from that
Rival = collections.namedtuple("Rival", ["route", "family", "why"])  # route(x, y, k) -> scores, indices

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLORS = {"all N² sums": RED, "compositions": ORANGE, "factored kernels": BLUE, "omni_router": GREEN}
WARM_UP_TO = 16384  # tokens whose logits stay in the cache, as behind the layer that has just made them
QUANTILES = {"us": 0.5, "us_10": 0.1, "us_90": 0.9}
SUMS_AT_ONCE = 1 << 30  # 4 GiB of fp32
SECONDS = 2  # that a case takes, as a rule, once everything is compiled
WORKERS, PARTS = 14, 4  # processes that compile, and those of them that share the configurations of a tuned kernel

# --- rivals ---


@triton.jit
def empty_kernel():
    pass


def pytorch_all_sums(x, y, k):
    """`topk` of all N² sums, as many tokens at a time as SUMS_AT_ONCE allows."""
    num_expert_sqrt = x.shape[1]
    slice_size = max(1, SUMS_AT_ONCE // num_expert_sqrt**2)
    parts = [
        (part_x.float()[:, :, None] + part_y.float()[:, None, :]).flatten(1).topk(k)
        for part_x, part_y in zip(x.split(slice_size), y.split(slice_size), strict=True)
    ]
    return torch.cat([part.values for part in parts]).to(x.dtype), torch.cat([part.indices.int() for part in parts])


def product_keys(x, y, k, topk):
    """What product-key memories do: the k best of each factor, then of the square of their sums."""
    count = min(k, x.shape[1])
    best_x, rows = topk(x, count)
    best_y, columns = topk(y, count)
    scores, pairs = topk((best_x.float()[:, :, None] + best_y.float()[:, None, :]).flatten(1), k)
    row, column = rows.gather(1, pairs.long() // count), columns.gather(1, pairs.long() % count)
    return scores.to(x.dtype), (row * x.shape[1] + column).int()


def quack_factored(x, y, k):
    """The same on QuACK's top-k, for powers of two."""
    from quack.topk import topk_fwd  # only few have it

    return _compiled_product_keys()(x, y, k, topk_fwd)


@functools.cache
def _compiled_product_keys():
    torch._dynamo.config.recompile_limit = 64  # one for each case; beyond the limit it would silently run uncompiled
    return torch.compile(product_keys, dynamic=False)


def public_kernels(x, y, k):
    """The router's public implementation, github.com/flash-algo/omni-moe."""
    from omni_moe.ops.triton.omni_router import triton_omni_router_func  # only few have it

    return triton_omni_router_func(x, y, x.shape[1], k)


def tile_rung(**changes):
    """The kernel that gives a token to a warp (tile.py), with some of its ideas turned off."""

    def route(x, y, k):
        return factored.run(dataclasses.replace(tile.plan_for(x, y, k, x.dtype), **changes), x, y)

    return route


def lanes_rung(**changes):
    """The kernel that gives a row to a lane (lanes.py), with some of its ideas turned off. Two lanes a token."""

    def route(x, y, k):
        plan = lanes.plan_for(x, y, k, x.dtype, few_tokens=False)
        return factored.run(dataclasses.replace(plan, **changes), x, y)

    return route


ALL_SUMS, FACTORED, COMPILED = "PyTorch, all N² sums", "PyTorch, factored", "PyTorch, factored, compiled"
QUACK, ORIGINAL, OPTIMIZED, OMNI = "QuACK top-k, compiled", "original kernels", "optimized kernels", "omni_router"
FRONTIER, PUBLIC = "frontier kernel", "omni-moe kernels"

# What the later rungs change, the last one first.
KEPT = {"priority": "evict_normal"}
COMPARED = KEPT | {"add_minima": False}
STRAIGHT = COMPARED | {"looped": False}
ONE_WARP = STRAIGHT | {"num_warps": 1}
LONG_PAIRS = ONE_WARP | {"short_pairs": False}

# In the order of the ladder; the last is none of its rungs. A rung says what is new in it.
RIVALS = {
    ALL_SUMS: Rival(pytorch_all_sums, "all N² sums", "Writes every sum to memory, then reads them to select."),
    PUBLIC: Rival(
        public_kernels,
        "all N² sums",
        "The public implementation: sums stay on the chip; each of the k rounds still looks at all of them.",
    ),
    ORIGINAL: Rival(
        lambda x, y, k: triton_omni_router_func(x, y, x.shape[1], k),
        "all N² sums",
        "The same plan, its defects mended; what beats the running best is inserted at once, not shifted in.",
    ),
    OPTIMIZED: Rival(
        lambda x, y, k: triton_omni_router_func_optimized(x, y, x.shape[1], k),
        "all N² sums",
        "Coordinates once, loads coalesced, a tile costs a round only where it beats the running best.",
    ),
    FACTORED: Rival(
        lambda x, y, k: product_keys(x, y, k, torch.topk),
        "compositions",
        "Only the k best of each factor can win: k² sums instead of N², selected by the library.",
    ),
    COMPILED: Rival(
        lambda x, y, k: _compiled_product_keys()(x, y, k, torch.topk),
        "compositions",
        "Sums, gathers and casts fused by torch.compile; the selections are the library's.",
    ),
    QUACK: Rival(
        quack_factored,
        "compositions",
        "The same on a public top-k kernel in CuTe, which hides the column in the value's low bits.",
    ),
    "one kernel": Rival(
        tile_rung(chunk=1, wide_keys=True, num_candidates=256),
        "factored kernels",
        "A warp takes a token from logits to results, nothing is stored in between; room for all k² pairs.",
    ),
    "staircase": Rival(
        tile_rung(chunk=1, wide_keys=True),
        "factored kernels",
        "Pairs of ranks with a·b > k cannot win: fewer places to sort.",
    ),
    "packed keys": Rival(
        tile_rung(chunk=1), "factored kernels", "Value and column of a 16-bit logit share one 32-bit integer."
    ),
    "chunk maxima": Rival(
        tile_rung(),
        "factored kernels",
        "The k best lie in the k chunks with the largest maxima: those are sorted, then what is in them.",
    ),
    "a row a lane": Rival(
        lanes_rung(tile_n=0, chunk=1, vector=0, staged=False, short_keys=False, doubles=False, **LONG_PAIRS),
        "factored kernels",
        "Sorting networks in a lane's own registers; a token's two lanes meet only for the pairs.",
    ),
    "vector loads": Rival(
        lanes_rung(chunk=1, staged=False, short_keys=False, doubles=False, **LONG_PAIRS),
        "factored kernels",
        "A lane reads 16 bytes of its row at a time.",
    ),
    "staged rows": Rival(
        lanes_rung(chunk=1, short_keys=False, doubles=False, **LONG_PAIRS),
        "factored kernels",
        "A warp copies its rows together into shared memory, in whole cache lines.",
    ),
    "chunk maxima in a lane": Rival(
        lanes_rung(short_keys=False, doubles=False, **LONG_PAIRS),
        "factored kernels",
        "The maxima first, here too; two logits of 16 bits at once.",
    ),
    "keys as doubles": Rival(
        lanes_rung(**LONG_PAIRS),
        "factored kernels",
        "Keys of 64 bits that order as doubles are compared by a unit that is otherwise idle.",
    ),
    "short keys of pairs": Rival(
        lanes_rung(**ONE_WARP),
        "factored kernels",
        "A pair's sum, row and rank share 32 bits where the sums leave room for it; where they do not, 64 as before.",
    ),
    "two warps a program": Rival(
        lanes_rung(**STRAIGHT), "factored kernels", "They run close together and share the code they fetch."
    ),
    "networks in loops": Rival(
        lanes_rung(**COMPARED),
        "factored kernels",
        "Short code that is fetched once, and begins with a part of a row while the rest is on its way.",
    ),
    "minima by sums": Rival(
        lanes_rung(**KEPT),
        "factored kernels",
        "The smaller of two keys is their sum less the larger: multiply-adds, which have a unit of their own.",
    ),
    "rows read once": Rival(
        lanes_rung(), "factored kernels", "What has been read makes room in the cache before anything else."
    ),
    OMNI: Rival(omni_router, "omni_router", "What people call: the kernel it chooses, its checks, and autograd."),
    FRONTIER: Rival(
        lambda x, y, k: factored.run(frontier.plan_for(x, y, k, x.dtype), x, y),
        "factored kernels",
        "For many experts a token: lists in shared memory, and the pairs taken one by one.",
    ),
}
LADDER = [name for name in RIVALS if name != FRONTIER]
RUNGS = [name for name in LADDER if RIVALS[name].family == "factored kernels"]

# --- what is measured ---

MAIN = Case(65536, 256, 16, "bf16")
FP32 = MAIN._replace(dtype="fp32")
TARGETS = {
    MAIN: [COMPILED, QUACK], MAIN._replace(dtype="fp16"): [QUACK], FP32: [COMPILED, QUACK],
    Case(1048576, 256, 16, "bf16"): [QUACK], Case(1048576, 256, 8, "bf16"): [QUACK],
    Case(262144, 1024, 16, "bf16"): [QUACK], Case(16384, 4096, 16, "bf16"): [QUACK],
    Case(65536, 64, 16, "bf16"): [QUACK], Case(65536, 128, 16, "bf16"): [QUACK], Case(65536, 100, 10, "bf16"): [],
    MAIN._replace(k=32): [QUACK], MAIN._replace(k=64): [QUACK], MAIN._replace(k=128): [],
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
GUIDE_EXPECTS = {64: (10, 20), 128: (15, 25), 256: (20, 35)}  # percent, of the forward pass
GUIDE_EXPECTS_BACKWARD = (5, 15)


def logits(case):
    """The two factors of a case: normal, from a fixed seed."""
    generator = torch.Generator(get_device()).manual_seed(0)
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


def measure(again="OMNI_AGAIN" in os.environ):
    """Measure the cases that are not on record for this GPU, these versions and what is compiled here; with `again` all
    of them. Of a case that lacks a row all rivals are measured, so that one host has timed their calls.

    What cannot be measured is told of, and does not keep the others from it.

    Returns:
        {table: what was done about it}.
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


def attempt(function, *args):
    """What function(*args) returns, or a row that says how it failed."""
    try:
        return function(*args)
    except ImportError as error:
        return {"error": f"not installed: {error.name}"}
    except Exception as error:
        torch.cuda.synchronize()  # a fault that took the GPU with it must not become a row
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


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
        for part in range(PARTS if name in (PUBLIC, ORIGINAL, OPTIMIZED) else name in (OMNI, FRONTIER, *RUNGS)):
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


# --- reading the tables ---

NO_RESULTS = "No measurement is recorded yet."
NOISE = 1.02  # times that differ by less are the same


def latest(table):
    """The rows of a table to show: of each GPU those of its last versions, H100s first; of rows of the same case the
    last, in the place of the first. Empty where nobody measured."""
    rows = tables.read(table)
    if rows.empty:
        return rows
    rows = rows.merge(rows.drop_duplicates("gpu", keep="last")[tables.SETTING], on=tables.SETTING)
    case = ["gpu", "rival", *CASE, *rows.columns.intersection(["cache", "layout"])]
    rows["place"] = rows.groupby(case, sort=False).ngroup()
    rows["order"] = rows.gpu.map(lambda gpu: ("H100" not in gpu, gpu))
    return rows.drop_duplicates("place", keep="last").sort_values(["order", "place"]).drop(columns=["order", "place"])


def _groups(rows, columns):
    return rows.groupby(columns, sort=False) if len(rows) else ()


def told(table, tell):
    """The last run of a table on every GPU, as `tell` writes its rows: Markdown."""
    return "\n\n".join(f"{describe(rows)}:\n\n{tell(rows)}" for _, rows in _groups(latest(table), "gpu")) or NO_RESULTS


def show(name, draw, *wanted):
    """Draw the last run of some tables on every GPU, and keep the picture by name."""
    rows = [latest(table) for table in wanted]
    if all(map(len, rows)):
        save_figure(draw(pd.concat(rows)), name)
    else:
        print(NO_RESULTS)


def markdown(header, lines):
    """A table; numbers go to the right."""
    numeric = [all(str(line[i])[:1].isdigit() or line[i] in ("", "–") for line in lines) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines])


def share(floor, us):
    """The share of the floor's speed."""
    percent = 100 * floor / us
    return "–" if us != us else f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%" if percent >= 0.1 else "0.0%"


def microseconds(us):
    """Three digits, or all there are before the point."""
    if us != us:
        return "–"
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def ladder_table(rows):
    """The ladder of one GPU: each rung's time, how many times faster it is than the one above it in the list, its share
    of the floor's speed, how its result compares, and what is new in it."""
    lines, before = [], math.nan
    for row in rows.itertuples():
        why = RIVALS[row.rival].why
        if row.us == row.us:
            step = f"{before / row.us:.3g}×" if before == before else "–"
            lines.append((row.rival, microseconds(row.us), step, share(row.floor_us, row.us), row.check, why))
            before = row.us
        else:
            lines.append((row.rival, "–", "–", "–", row.error, why))
    return markdown(["rung", "µs", "faster than the rung before", "of the floor's speed", "result", "why"], lines)


def targets_table(rows):
    """omni_router of one GPU over all cases: its time, its share of the floor's speed, the time of a call from Python,
    and the other rivals' times."""
    lines = []
    for case, group in rows.groupby(CASE, sort=False):
        times = group.set_index("rival").us
        row = group.set_index("rival").loc[OMNI]
        others = times.drop(OMNI).dropna()
        best = f"{others.idxmin()}, {others.min() / row.us:.3g}×" if len(others) and row.us == row.us else "–"
        check = row.check if row.us == row.us else row.error
        lines.append((*case, *map(microseconds, (row.floor_us, row.us)), share(row.floor_us, row.us),
                      microseconds(row.call_us), check, best))  # fmt: skip
    header = ["tokens", "N", "k", "dtype", "floor, µs", "`omni_router`, µs", "of the floor's speed", "a call, µs"]
    return markdown([*header, "result", "fastest other measured here, and how many times its time is"], lines)


def layouts_table(rows):
    """omni_router of one GPU on logits that lie differently in memory."""
    lines = [
        (row.layout, row.num_tokens, row.num_expert_sqrt, row.k, row.dtype, microseconds(row.us),
         share(row.floor_us, row.us), row.check)
        for row in rows.itertuples()
    ]  # fmt: skip
    return markdown(["logits lie in", "tokens", "N", "k", "dtype", "µs", "of the floor's speed", "result"], lines)


def guide_table(rows):
    """Times and speedups over the original kernels, of one GPU, beside what the guide expects of the optimized ones;
    last the backward pass, whose times are in a table of their own."""
    lines = []
    for (size, k), group in rows.groupby(["num_expert_sqrt", "k"], sort=False):
        times = group.set_index("rival").us[[ORIGINAL, OPTIMIZED, OMNI]]
        lines.append(_guide_line(f"{size}×{size}, forward", k, times, GUIDE_EXPECTS[size]))
    backward = latest("backward")
    if len(backward):
        few = backward[(backward.gpu == rows.gpu.iloc[0]) & (backward.num_tokens == rows.num_tokens.iloc[0])]
        for (size, k), group in few.groupby(["num_expert_sqrt", "k"], sort=False):
            times = group.set_index("rival").us[["original kernel, atomics", "shared memory", "shared memory"]]
            lines.append(_guide_line(f"{size}×{size}, backward", k, times, GUIDE_EXPECTS_BACKWARD))
    return markdown(["experts", "k", "original, µs", "optimized, µs", "`omni_router`, µs", "optimized", "`omni_router`",
                     "the guide expects of optimized"], lines)  # fmt: skip


def _guide_line(experts, k, times, expected):
    original, *others = times
    gains = [f"{original / us:.3g}×" if us == us else "–" for us in others]
    low, high = (f"{1 + percent / 100:.3g}" for percent in expected)
    return experts, k, *map(microseconds, times), *gains, f"{low} to {high}×"


def number(value, spec):
    """A number as text, or a dash where there is none."""
    return "–" if value != value else format(value, spec)


def describe(rows):
    """On what one GPU's rows were measured, and when."""
    row, days, commits = rows.iloc[-1], sorted(set(rows.date)), list(dict.fromkeys(rows.commit))
    when = f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{row.gpu}, PyTorch {row.torch}, Triton {row.triton}, {when}"


def distance():
    """How the way from the first rung to the last divides among the families of rungs, in words."""
    lines = []
    for gpu, rows in _groups(latest("ladder"), "gpu"):
        best = rows.groupby(rows.rival.map(lambda name: RIVALS[name].family), sort=False).us.min().dropna()
        before, steps = rows.us.dropna().iloc[0], []
        for family, us in best.items():
            steps.append(f"{before / us:.3g}× to {family}")
            before = us
        lines.append(f"{gpu}: {', '.join(steps)}")
    return lines or [NO_RESULTS]


def losses():
    """Everything that was measured and is not the best there is, by more than NOISE, in words."""
    found = []
    for table in TIMED:
        for (gpu, *case), group in _groups(latest(table), ["gpu", *CASE]):
            times = group.set_index("rival").us.dropna()
            best = times.idxmin() if OMNI in times else None
            if best and times[OMNI] > NOISE * times[best]:
                slower = f"{times[OMNI] / times[best]:.3g} times the time of “{best}”"
                found.append(f"{gpu}, {' '.join(map(str, case))}: omni_router takes {slower}")
    for gpu, rows in _groups(latest("ladder"), "gpu"):
        climbed = rows.dropna(subset="us")
        for before, rung in itertools.pairwise(climbed.itertuples()):
            if rung.us > NOISE * before.us:
                found.append(f"{gpu}: “{rung.rival}” is slower than “{before.rival}”, the rung before it")
    for (gpu, size, k), group in _groups(latest("guide"), ["gpu", "num_expert_sqrt", "k"]):
        times = group.set_index("rival").us
        if times[ORIGINAL] / times[OPTIMIZED] < 1 + GUIDE_EXPECTS[size][0] / 100:
            found.append(f"{gpu}: the optimized kernels gain less than the guide expects at {size}×{size}, k = {k}")
    return list(dict.fromkeys(found))


# --- pictures ---


def draw_ladder(rows):
    """A bar for every rung, its time on a log scale, and the floor; a column of bars for every GPU."""
    rows = rows.dropna(subset="us")
    figure, panels = panel_for_each_gpu(rows, width=7.5, height=5.6)
    for axes, (gpu, group) in zip(panels, _groups(rows, "gpu"), strict=True):
        places = np.arange(len(group))
        axes.barh(places, group.us, color=[COLORS[RIVALS[name].family] for name in group.rival], height=0.75)
        for place, row in zip(places, group.itertuples(), strict=True):
            text = f" {microseconds(row.us)} µs, {share(row.floor_us, row.us)}"
            axes.text(row.us, place, text, va="center", fontsize=9)
        floor = group.floor_us.iloc[0]
        axes.axvline(floor, color="black", linestyle="--", linewidth=1.2)
        axes.text(floor, -0.75, "floor ", ha="right", va="center", fontsize=9)
        axes.set(xscale="log", xlim=(floor / 3, group.us.max() * 8), xlabel="µs, share of the floor's speed", title=gpu)
        axes.set_yticks(places, group.rival)
        axes.set_ylim(len(group) - 0.4, -1.2)
        axes.grid(False, axis="y")
    families = dict.fromkeys(RIVALS[name].family for name in rows.rival)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[family]) for family in families]
    panels[0].legend(handles, families, loc="lower right", fontsize=9)
    return finish(figure)


STYLES = {
    ALL_SUMS: (RED, "v", ":"), ORIGINAL: (RED, "o", "-"), OPTIMIZED: (RED, "s", "--"), FACTORED: (ORANGE, "o", "-"),
    COMPILED: (ORANGE, "s", "--"), QUACK: (ORANGE, "^", ":"), FRONTIER: (BLUE, "D", "-"), OMNI: (GREEN, "o", "-"),
}  # fmt: skip


def draw_against(rows, column, label):
    """Time against one size, a line for each rival, and the floor; a panel for every GPU."""
    figure, panels = panel_for_each_gpu(rows, width=7.5, height=5)
    for axes, (gpu, group) in zip(panels, _groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group, column, "us")
        floor = group.drop_duplicates(column).sort_values(column)
        axes.plot(floor[column], floor.floor_us, color="black", linestyle="--", linewidth=1.2, label="floor")
        if column == "num_tokens":
            axes.axhline(floor.empty_us.iloc[0], color="grey", linestyle=":", linewidth=1.2, label="empty kernel")
        axes.set(xlabel=label, ylabel="µs", title=gpu)
        axes.legend(fontsize=8)
    return finish(figure)


def draw_memory(rows):
    """The memory a call takes against N; its results are the least it can be."""
    figure, panels = panel_for_each_gpu(rows, width=6.5, height=4.2)
    for axes, (gpu, group) in zip(panels, _groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group.assign(mebibytes=group.peak_bytes / 2**20), "num_expert_sqrt", "mebibytes")
        least = group.results_bytes.iloc[0] / 2**20
        axes.axhline(least, color="black", linestyle="--", linewidth=1.2, label="results alone")
        axes.set(xlabel="N", ylabel="MiB at the peak, logits not counted", title=gpu)
        axes.legend(fontsize=8)
    return finish(figure)


def _draw_lines(axes, rows, column, value):
    rows = rows.dropna(subset=value)
    for name in [name for name in STYLES if name in set(rows.rival)]:
        color, marker, line = STYLES[name]
        group = rows[rows.rival == name].sort_values(column)
        axes.plot(group[column], group[value], color=color, marker=marker, linestyle=line, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def draw_roofline(rows):
    """Bytes a second against the values looked at for each byte: the copy is the roof, the diagonals are values a
    second."""
    rows = rows.dropna(subset="us").drop_duplicates(["gpu", "rival", *CASE])
    figure, panels = panel_for_each_gpu(rows, width=7, height=5)
    for axes, (gpu, group) in zip(panels, _groups(rows, "gpu"), strict=True):
        for name in [name for name in STYLES if name in set(group.rival)]:
            points = group[group.rival == name]
            case_bytes = np.array([num_bytes(Case(*case)) for case in points[CASE].itertuples(index=False)])
            values = [examined(name, n, k) for n, k in zip(points.num_expert_sqrt, points.k, strict=True)]
            intensity = np.array(values) * points.num_tokens / case_bytes
            color, marker, _ = STYLES[name]
            gigabytes = case_bytes / points.us / 1e3
            axes.scatter(intensity, gigabytes, color=color, marker=marker, s=26, alpha=0.8, label=name)
        roof = group.bandwidth_gbs.median()
        axes.axhline(roof, color="black", linestyle="--", linewidth=1.2, label="copy")
        axes.set(xscale="log", yscale="log", title=gpu, xlabel="logits and sums looked at, for each byte moved",
                 ylabel="GB/s of logits and results")  # fmt: skip
        left, right = axes.get_xlim()
        bottom, top = axes.get_ylim()
        for power in range(8, 16):
            axes.plot([left, right], [10.0 ** (power - 9) / left, 10.0 ** (power - 9) / right], color="0.8", zorder=0)
            if bottom < 10.0 ** (power - 9) / right < top:
                axes.text(right, 10.0 ** (power - 9) / right, f" $10^{{{power}}}$ values/s", fontsize=8, va="center")
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return finish(figure)


def draw_guide(rows):
    """Speedup over the original kernels at the guide's sizes, and the range it expects of the optimized ones."""
    figure, panels = panel_for_each_gpu(rows, width=8, height=4.4)
    for axes, (gpu, group) in zip(panels, _groups(rows, "gpu"), strict=True):
        labels = []
        for place, ((size, k), case) in enumerate(group.groupby(["num_expert_sqrt", "k"], sort=False)):
            times = case.set_index("rival").us
            low, high = (1 + percent / 100 for percent in GUIDE_EXPECTS[size])
            for offset, name in ((-0.2, OPTIMIZED), (0.2, OMNI)):
                speedup = times[ORIGINAL] / times[name]
                axes.bar(place + offset, speedup, width=0.38, color=STYLES[name][0], label=None if labels else name)
                top = max(speedup, high) if name == OPTIMIZED else speedup
                axes.text(place + offset, 1.03 * top, f"{speedup:.3g}×", ha="center", va="bottom", fontsize=9)
            label = None if labels else "the guide's expectation"
            axes.fill_between([place - 0.42, place + 0.02], low, high, color="black", alpha=0.45, label=label)
            labels.append(f"{size}×{size}\nk = {k}")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(yscale="log", title=gpu, ylabel="times as fast as the original")
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(False, axis="x")
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    return finish(figure)


def panel_for_each_gpu(rows, width, height):
    count = rows.gpu.nunique()
    figure, panels = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, panels[0]


def finish(figure):
    for axes in figure.axes:
        sns.despine(ax=axes)
    figure.tight_layout()
    return figure
