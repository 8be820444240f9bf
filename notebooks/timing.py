"""How the notebooks time a call on a GPU: its kernels, never the host that launches them."""

from unittest import mock

import torch
import triton
import triton.testing

FLUSH_BYTES = 2 << 30


def do_bench(call, **options):
    """`triton.testing.do_bench`, clearing FLUSH_BYTES before each run instead of 256 MiB.

    That takes a large GPU the better part of a millisecond, so the host has launched the whole call by the time it
    begins. After the smaller buffer a short kernel waits for a slow host, and the wait would count.
    """

    def buffer():
        return torch.empty(FLUSH_BYTES // 4, dtype=torch.int, device="cuda")

    with mock.patch.object(triton.runtime.driver.active, "get_empty_cache_for_benchmark", buffer):
        return triton.testing.do_bench(call, **options)
