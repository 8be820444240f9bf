"""What a tuner believes: notebook 02's times of the same configurations by two benchmarks, alone and beside a thread
that runs Python, and in CUDA graphs, which no host can slow down."""

import contextlib
import functools
import threading

import triton.testing

from omni_kernels import configs, get_arch, get_device

from . import tables, timing, training
from .autotune import prepare
from .configurations import Problem, kept_by_pruning, label
from .progress import tqdm

PROBLEM = Problem("fwd_split", 1024, 128, 16)
BENCHMARKS = {
    "triton.testing.do_bench": functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    "configs.time_on_gpu": configs.time_on_gpu,
}
KEYS = ["rival", "host", "tile", "num_warps"]


@contextlib.contextmanager
def python_beside():
    """Another thread runs Python, as one that loads data does."""
    over = threading.Event()

    def work():
        while not over.is_set():
            sum(range(200))

    thread = threading.Thread(target=work, name="python beside")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


HOSTS = {"alone": contextlib.nullcontext, "beside a thread that runs Python": python_beside}


def candidates():
    """What the package tunes over on the GPU at hand."""
    return kept_by_pruning(PROBLEM, configs.candidates(get_arch(get_device()), PROBLEM.kernel))


def measure():
    """Measure where this GPU has no rows of the kernel as it is."""
    training.measure_missing("tuner", record, launch)


def record(binary):
    rows = []
    for config in tqdm(candidates(), "tuner", unit="configuration", leave=False):
        run, (tile, num_warps, _) = prepare(PROBLEM, config, get_arch(get_device())), label(config)
        of = {"tile": tile, "num_warps": num_warps, "graph_us": timing.kernel_us([run])[0]}
        for host, around in HOSTS.items():
            for name, bench in BENCHMARKS.items():
                with around():
                    median, *_ = bench(run, quantiles=(0.5, 0.2, 0.8))
                rows.append({"rival": name, "host": host, **of, "us": 1000 * median})
    tables.append("tuner", rows, **PROBLEM._asdict(), binary=binary)


def launch():
    """Launches one of what `record` measures."""
    prepare(PROBLEM, candidates()[0], get_arch(get_device()))()
