"""What a call takes on a machine without a GPU, where PyTorch routes, beside the composition that people write."""

import os

import torch

from omni_kernels import brute_force_router, omni_router

from . import rivals, tables, timing
from .rivals import FACTORED, OMNI, Case
from .speed import logits, quantiles

CASES = [
    Case(4096, 256, 16, "fp32"),
    Case(4096, 256, 16, "bf16"),
    Case(64, 256, 16, "fp32"),
    Case(64, 256, 16, "bf16"),
    Case(1, 256, 16, "fp32"),
    Case(1, 256, 16, "bf16"),
    Case(4096, 1024, 64, "fp32"),
]
ROUNDS = 25  # both calls in turn in each
CHECKED = 64  # tokens that are held against the definition


def measure(again="OMNI_AGAIN" in os.environ):
    """Time all cases on this CPU, unless it has rows of these versions and this commit, or `again`.

    Returns:
        What was done, in words.
    """
    if torch.cuda.is_available():
        return "not measured: rows would name the GPU, so hide it first, with CUDA_VISIBLE_DEVICES="
    known = tables.of_setting("cpu", [*tables.SETTING, "commit"])
    if len(known) and (known.cpu == cpu_name()).any() and not again:
        return "measured before"
    with tables.recording("cpu", "cpu") as record:
        for case in CASES:
            for row in rows_of(case):
                record(row | {"cpu": cpu_name(), "threads": torch.get_num_threads()})
    return f"{len(CASES)} cases measured now"


def rows_of(case):
    """The rows of both rivals: medians and quantiles, µs, of calls in turn, and whether results are right."""
    x, y = logits(case, "cpu")
    calls = {OMNI: lambda: omni_router(x, y, case.k), FACTORED: lambda: rivals.product_keys(x, y, case.k, torch.topk)}
    want = brute_force_router(x[:CHECKED], y[:CHECKED], case.k)
    for name, times in timing.rounds_us(calls, ROUNDS).items():
        alike = all(torch.equal(part[:CHECKED], right) for part, right in zip(calls[name](), want, strict=True))
        result = "equal" if alike else "others among ties"
        yield {"rival": name, **case._asdict(), **quantiles(times), "result": result}


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown CPU"
