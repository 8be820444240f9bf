"""The autotune study: every configuration of every kernel, compiled, then timed on the GPU at hand.

Rows are recorded as they come; running again goes on where the last run stopped.
"""

import functools
import math
import os
import time

import pandas as pd
import torch
import triton

from omni_kernels import configs

from . import faults, tables, timing
from .autotune_report import recorded_rows, spearman
from .compiling import compile_jobs
from .configurations import (
    IDENTITY,
    KEY,
    N2_KERNELS,
    PROBLEMS,
    Problem,
    all_jobs,
    chosen,
    key_of,
    keys_of,
    label,
    launch,
    tensors,
    title,
)
from .progress import tqdm

COMPILE_SECONDS, TIME_SECONDS = 1.2, 0.03  # what a configuration takes, as a rule: of a core, of the GPU
HOPELESS = 20  # times slower than the best so far: no median is needed
STUMBLE_SECONDS = 0.02  # as a rule a host that stumbles is back by then


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
        except Exception as error:
            faults.raise_if_machine(error)  # anything else is the configuration's own, and its row says so
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
    with tables.recording("autotune") as keep:
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
