"""How the notebooks time calls on a GPU: what the kernels take, and what a call from Python takes."""

import itertools
import math
import statistics
import threading
import time
from unittest import mock

import numpy as np
import torch
import triton
import triton.testing

FLUSH_BYTES = 2 << 30  # at most an eighth of a GPU's memory
GRAPH_US, REPLAYS = 10_000, 10  # what a graph takes, at least, and how often it runs
CACHES = 3  # times the L2 cache: inputs that shall come from memory take turns with copies as large as that together
CALLS_US, RUNS = 10_000, 5  # what calls that are timed together take, and how often they are


def kernel_us(calls, quantiles=(0.5, 0.1, 0.9)):
    """Quantiles of what the kernels of a call take, in µs, in a CUDA graph, which no host can slow down.

    calls: functions without arguments that take turns. A call that synchronises cannot be in a graph.

    Raises:
        RuntimeError: CUDA cannot make a graph of the calls.
    """
    for call in calls:
        call()
    settle()
    rounds = 1
    for _ in range(2):  # a graph takes some time to start, which makes one round look long
        rounds = math.ceil(GRAPH_US * rounds / min(_replays_us(_graph_of(calls, rounds), 3)))
    times = _replays_us(_graph_of(calls, rounds), REPLAYS)
    return [float(us) / (rounds * len(calls)) for us in np.quantile(times, quantiles)]


def _graph_of(calls, rounds):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replays_us(graph, count):
    """What each of some replays takes. One more before them uploads the graph and gives the host time. Nothing is
    cleared: what reads its logits so that they make room first would not find them in a cache that is full of zeros."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def num_copies(num_bytes):
    """How many copies of inputs of a size take turns so that none is found in the L2 cache."""
    return math.ceil(CACHES * torch.cuda.get_device_properties().L2_cache_size / num_bytes)


def settle():
    """Waits for the package's threads, which compile in the background: they slow the host down."""
    for thread in threading.enumerate():
        if thread.name == "omni_kernels compile":
            thread.join()


def call_us(call):
    """What a call takes from Python, in µs: many back to back, with nothing between them that waits for the GPU; the
    median of a few runs. Of short kernels that is the host's time, of long ones the GPU's."""
    return statistics.median(rounds_us({"": call}, RUNS)[""])


def rounds_us(calls, num_rounds):
    """The same for several calls in turn, so that a host that drifts slows all of them alike: {name: µs of a call, one
    number a round}."""
    counts = {name: max(1, int(CALLS_US / _back_to_back_us(call, 3))) for name, call in calls.items()}
    settle()
    found = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(num_rounds), calls.items()):
        found[name].append(_back_to_back_us(call, counts[name]))
    return found


def _back_to_back_us(call, count):
    call()
    _wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait()
    return 1e6 * (time.perf_counter() - start) / count


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def do_bench(call, **options):
    """`triton.testing.do_bench`, clearing FLUSH_BYTES before each run instead of 256 MiB.

    That takes a large GPU the better part of a millisecond, so the host has launched the whole call by the time it
    begins. After the smaller buffer a short kernel waits for a slow host, and the wait would count.
    """
    with mock.patch.object(triton.runtime.driver.active, "get_empty_cache_for_benchmark", _buffer):
        return triton.testing.do_bench(call, **options)


def once(call):
    """What the GPU takes from the beginning of a call to its end, in µs. It first has a buffer to clear, so that a host
    that is not too slow has launched the whole call by then."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _buffer().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end)


def _buffer():
    size = min(FLUSH_BYTES, torch.cuda.get_device_properties().total_memory // 8)
    return torch.empty(size // 4, dtype=torch.int, device="cuda")
