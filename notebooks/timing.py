"""How the notebooks time a call on a GPU: its kernels, never the host that launches them."""

from unittest import mock

import torch
import triton
import triton.testing

FLUSH_BYTES = 2 << 30  # at most an eighth of a GPU's memory


def _buffer():
    size = min(FLUSH_BYTES, torch.cuda.get_device_properties().total_memory // 8)
    return torch.empty(size // 4, dtype=torch.int, device="cuda")


def do_bench(call, **options):
    """`triton.testing.do_bench`, clearing FLUSH_BYTES before each run instead of 256 MiB.

    That takes a large GPU the better part of a millisecond, so the host has launched the whole call by the time it
    begins. After the smaller buffer a short kernel waits for a slow host, and the wait would count.
    """
    with mock.patch.object(triton.runtime.driver.active, "get_empty_cache_for_benchmark", _buffer):
        return triton.testing.do_bench(call, **options)


def once(call):
    """One sample of what `do_bench` measures, in µs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _buffer().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end)
