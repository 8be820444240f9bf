"""What Nsight Compute says of each rung of the ladder, and of the shipped router where memory is not its limit: where
cycles go, and what moves.

It runs once for each, on a GPU whose counters a user may read. Of a rung that launches several kernels, times and
bytes are those of all together.
"""

import csv
import functools
import io
import pathlib
import re
import subprocess
import sys

import torch

from omni_kernels import omni_router

from . import speed, tables
from .rivals import OMNI, RIVALS, rung_to_read

LADDER = pathlib.Path(__file__).parents[1] / "ladder"
# A round of these reads all sums of a token, and ncu runs each kernel many times: fewer tokens tell as much.
FEW_TOKENS = {"rung1_all_sums": 1024, "rung2_one_kernel": 8192}

# The shipped router's sizes that are far from the speed of memory: long rows and many experts, short rows, few tokens.
CORNERS = [
    *({"k": k} for k in (32, 64, 128)), *({"num_expert_sqrt": n, "k": 32} for n in (360, 1000)),
    {"num_expert_sqrt": 64}, {"num_expert_sqrt": 128}, {"num_expert_sqrt": 100, "k": 10}, {"dtype": "fp32"},
    *({"num_tokens": t} for t in (1, 1024, 4096)),
]  # fmt: skip

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"  # cycles that a warp waits so, for each it issues
REASONS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard",
    "sleeping", "tex_throttle", "wait",
)  # fmt: skip
TOP = 3  # reasons that a row names
# Column -> metric. Those of the first kind add up over a rung's kernels, those of the second are averages over time.
SUMS = {
    "us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "code_requests": "sm__icc_requests.sum",  # of the instruction cache
    "code_hits": "sm__icc_requests_lookup_hit.sum",
}
AVERAGES = {
    "issue_busy_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_active": "smsp__warps_active.avg.per_cycle_active",
    **{reason: STALL.format(reason) for reason in REASONS},
}
REGISTERS = "launch__registers_per_thread"
UNITS = {"n": 1e-3, "ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6,
         "second": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip  # to µs and to bytes


def command(name, *calls):
    """The command line that profiles calls of a rung, each after a first one that compiles it. calls: of each the sizes
    that are not the ladder's, by their names."""
    metrics = [*SUMS.values(), *AVERAGES.values(), REGISTERS]
    ncu = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--metrics"]
    program = "; ".join(
        ["from study import profiling", *(f"profiling.call_twice({name!r}, **{sizes})" for sizes in calls)]
    )
    return [*ncu, ",".join(metrics), sys.executable, "-c", program]


def kernels(text):
    """The kernels in what ncu printed: dictionaries of their columns, with None where ncu knew nothing.

    Raises:
        ValueError: there is no table in it.
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f'text must hold ncu\'s table, which begins with the column "ID", got {text[:200]!r}')
    header, units, *rows = csv.reader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    scales = [UNITS.get(unit, 1) for unit in units]
    return [{name: _number(cell, scale) for name, cell, scale in zip(header, row, scales, strict=True)} for row in rows]


def _number(cell, scale):
    """Of "1,234.5", in µs or bytes if it is a time or a size; text as it is."""
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", cell):
        return float(cell.replace(",", "")) * scale
    return None if cell in ("", "n/a") else cell


def row_of(found):
    """What the kernels of a rung come to, together. What ncu did not know is None."""
    row = {column: _total([kernel.get(metric) for kernel in found]) for column, metric in SUMS.items()}
    times = [kernel[SUMS["us"]] for kernel in found]
    for column, metric in AVERAGES.items():
        weighted = [value * us if (value := kernel.get(metric)) is not None else None
                    for kernel, us in zip(found, times, strict=True)]  # fmt: skip
        total = _total(weighted)
        row[column] = None if total is None else total / sum(times)
    stalls = {reason: row.pop(reason) for reason in REASONS}
    known = sorted((reason for reason in stalls if stalls[reason] is not None), key=stalls.get, reverse=True)
    row["stalls"] = ", ".join(f"{reason} {stalls[reason]:.2f}" for reason in known[:TOP])
    row["no_instruction"] = stalls["no_instruction"]
    hits, requests = row.pop("code_hits"), row["code_requests"]
    row["code_misses"] = None if None in (hits, requests) else requests - hits
    row["registers"] = max((kernel[REGISTERS] for kernel in found if kernel.get(REGISTERS) is not None), default=None)
    return {"kernels": len(found), **row}


def _total(values):
    return None if None in values else sum(values)


def call_of(name, **sizes):
    """A call of a rung, or of the shipped router, on random logits."""
    case = speed.MAIN._replace(**sizes)
    x, y = speed.logits(case)
    if name in RIVALS:
        return functools.partial(RIVALS[name].route, x, y, case.k)
    _, experts = omni_router(x, y, case.k)
    return functools.partial(rung_to_read(name, "gradient"), x[:, : case.k].contiguous(), experts, case.num_expert_sqrt)


def names():
    """The rungs, in order, and the shipped router."""
    return [*sorted(path.stem for path in LADDER.glob("*.py")), OMNI]


def call_twice(name, **sizes):
    """Call a rung, and once more for ncu to look on."""
    call = call_of(name, **sizes)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def measure():
    """Profile every rung and the shipped router, and that in its corners, and record a row of each.

    Returns:
        What was done, in words: with what ncu said of those that it could not profile.
    """
    if not torch.cuda.is_available():
        return "not measured: no GPU here"
    refused = []
    with tables.recording("profile") as record:
        for name in names():
            sizes = {"num_tokens": FEW_TOKENS.get(name, speed.MAIN.num_tokens)}
            refused += _profile(record, name, [sizes])
    with tables.recording("profile_corners") as record:
        refused += _profile(record, OMNI, CORNERS)
    return "\n".join([f"{len(names()) + len(CORNERS)} calls to profile", *refused])


def _profile(record, name, calls):
    """Record a row of one call, of all its kernels, or of several calls of one kernel each. Returns, in a list, what
    ncu said instead, if it did."""
    run = subprocess.run(command(name, *calls), cwd=LADDER.parent, capture_output=True, encoding="utf-8", check=False)
    try:
        found = kernels(run.stdout)
        parts = [found] if len(calls) == 1 else [[kernel] for kernel in found]
        for sizes, part in zip(calls, parts, strict=True):
            record({"rival": name, **speed.MAIN._replace(**sizes)._asdict(), **row_of(part)})
    except ValueError as error:
        return [f"{name}: {error} {run.stderr[-500:]}"]
    return []
