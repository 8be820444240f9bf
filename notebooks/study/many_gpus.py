"""What routing takes on two GPUs: tokens sharded, factors sharded, experts owned. One process a GPU, over NCCL.

Elsewhere two processes on the CPU do the same over gloo, with small sizes: `rows_of(SMALL, "gloo")`. And any function
of a notebook runs in such processes: `together(function, ...)`.
"""

import inspect
import json
import os
import pathlib
import tempfile
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels import omni_router, sharded_router
from omni_kernels.distributed import combine, dispatch

from . import faults, speed, tables, timing

NUM_RANKS = 2
TOKENS, FACTORS, EXPERTS, LINKS = "tokens sharded", "factors sharded", "experts owned", "messages"
ONE, ALL = "one GPU", "both GPUs"
EXCHANGE, GATHER = "sharded_router", "gather the logits, route"
EXCHANGE_PARTS, GATHER_PARTS = f"{EXCHANGE}, a part of the tokens", f"{GATHER}, a part of the tokens"
SPREAD, LINK = "dispatch + combine", "all-to-all of the same bytes"
KERNEL = ", kernel"


class Sizes(NamedTuple):
    num_tokens: int  # of both GPUs
    sharded: tuple  # N where tokens are
    factors: tuple  # N where factors are
    k: int
    hidden: int
    num_experts: int
    messages: tuple  # bytes from one GPU to the other
    rounds: int  # all calls of a case in turn in each
    calls: int  # back to back


MESSAGES = 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28
FULL = Sizes(131072, (256,), (4096, 256), 16, 1024, 65536, MESSAGES, rounds=15, calls=10)
SMALL = Sizes(64, (32,), (64, 16), 2, 8, 64, (8, 4096), rounds=2, calls=1)

# (case, N, whose time, over whose time, reach, stretch): larger is better of all but factors.
TARGETS = [
    (TOKENS, 256, ONE + KERNEL, ALL + KERNEL, 1.9, 1.98),
    (TOKENS, 256, ONE, ALL, 1.9, 1.98),
    (FACTORS, 4096, EXCHANGE, GATHER, 0.35, 0.2),
    (FACTORS, 4096, EXCHANGE_PARTS, GATHER_PARTS, 0.35, 0.2),
    (FACTORS, 256, EXCHANGE, GATHER, 1.0, None),
    (FACTORS, 256, EXCHANGE_PARTS, GATHER_PARTS, 1.0, None),
    (EXPERTS, 256, LINK, SPREAD, 0.6, 0.8),
]


def measure(again="OMNI_AGAIN" in os.environ):
    """Time everything, unless this GPU has rows of these versions and this commit, or `again`.

    Returns:
        What was done, in words.
    """
    if torch.cuda.device_count() < NUM_RANKS:
        return "not measured: fewer than two GPUs here"
    if len(tables.of_setting("many_gpus", [*tables.SETTING, "commit"])) and not again:
        return "measured before"
    try:
        rows = rows_of(FULL, "cpu:gloo,cuda:nccl")
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        faults.raise_if_machine(error)
        return f"not measured: {str(error).strip().splitlines()[-1]}"
    tables.append("many_gpus", rows)
    return f"{len(rows)} times measured now"


def rows_of(sizes, backend):
    """The rows of the table, measured by processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (sizes, backend, folder), NUM_RANKS)
        return json.loads((pathlib.Path(folder) / "rows").read_text(encoding="utf-8"))


def _run(rank, sizes, backend, folder):
    device = torch.device("cuda", rank) if "nccl" in backend else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder}/ranks", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh(device.type, (NUM_RANKS,))
    rows = [row for n in sizes.sharded for row in _tokens_sharded(mesh, sizes, n)]
    rows += [row for n in sizes.factors for row in _factors_sharded(mesh, sizes, n)]
    rows += _experts_owned(mesh, sizes) + _messages(mesh, sizes)
    if rank == 0:
        (pathlib.Path(folder) / "rows").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _logits(sizes, n, device):
    """All logits of both factors, the same on every rank."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(2, sizes.num_tokens, n, generator=generator, device=device, dtype=torch.bfloat16)


def _spread(whole, mesh, dim):
    """Both factors as DTensors that are sharded along a dimension."""
    rank = dist.get_rank()
    return [
        DTensor.from_local(part.chunk(NUM_RANKS, dim)[rank].contiguous(), mesh, [Shard(dim)], run_check=False)
        for part in whole
    ]


def _tokens_sharded(mesh, sizes, n):
    """One GPU routes all tokens while the other waits; both route a half each."""
    whole = _logits(sizes, n, mesh.device_type)
    x, y = _spread(whole, mesh, 0)
    want = omni_router(*whole, sizes.k)
    check = _equal([part.full_tensor() for part in omni_router(x, y, sizes.k)], want)

    def alone():
        if dist.get_rank() == 0:
            omni_router(*whole, sizes.k)

    calls = {ONE: alone, ALL: lambda: omni_router(x, y, sizes.k)}
    times = _times(calls, sizes)
    if mesh.device_type == "cuda":
        local_x, local_y = x.to_local(), y.to_local()
        for name, logits in ((ONE, whole), (ALL, (local_x, local_y))):
            # Copies take turns, so that none finds its logits in the cache.
            copies = [[part.clone() for part in logits] for _ in range(timing.num_copies(4 * logits[0].numel()) - 1)]
            routes = [lambda copy=copy: omni_router(*copy, sizes.k) for copy in [logits, *copies]]
            dist.barrier()
            _synchronize()
            time.sleep(1)  # until NCCL's thread has nothing left to ask the GPU, which nobody may while a graph is made
            times[name + KERNEL] = _slowest(timing.kernel_us(routes, tuple(speed.QUANTILES.values())))
    return _rows(TOKENS, times, sizes, n, check)


def _factors_sharded(mesh, sizes, n):
    """Candidates exchanged, or whatever the router chooses, against logits gathered by PyTorch."""
    whole = _logits(sizes, n, mesh.device_type)
    want = omni_router(*whole, sizes.k)
    x, y = _spread(whole, mesh, 1)
    del whole

    def gather(placement):
        return omni_router(*(part.redistribute(placements=[placement]).to_local() for part in (x, y)), sizes.k)

    calls = {
        EXCHANGE: lambda: sharded_router(x, y, sizes.k),
        GATHER: lambda: gather(Replicate()),
        EXCHANGE_PARTS: lambda: sharded_router(x, y, sizes.k, shard_tokens=True),
        GATHER_PARTS: lambda: gather(Shard(0)),
    }
    got = [[part.full_tensor() for part in calls[name]()] for name in (EXCHANGE, EXCHANGE_PARTS)]
    check = _equal(got[0] + got[1], [*want, *want])
    return _rows(FACTORS, _times(calls, sizes), sizes, n, check)


def _experts_owned(mesh, sizes):
    """Tokens to the owners of random experts and back, against the same rows sent without anything else. What the
    experts do is not timed."""
    device, rank, num_tokens = mesh.device_type, dist.get_rank(), sizes.num_tokens // NUM_RANKS
    generator = torch.Generator(device).manual_seed(rank)
    hidden = torch.randn(num_tokens, sizes.hidden, generator=generator, device=device, dtype=torch.bfloat16)
    scores = torch.rand(num_tokens, sizes.k, generator=generator, device=device, dtype=torch.bfloat16)
    shape = num_tokens, sizes.k
    experts = torch.randint(sizes.num_experts, shape, generator=generator, device=device, dtype=torch.int32)
    dispatched = dispatch(hidden, scores, experts, sizes.num_experts)
    exchange, outputs = dispatched.exchange, dispatched.inputs()
    there, back = hidden[exchange.tokens], torch.zeros(len(dispatched.hidden), sizes.hidden, device=device)
    there_received, back_received = torch.empty_like(back, dtype=there.dtype), torch.empty_like(there, dtype=back.dtype)

    def link():
        dist.all_to_all_single(there_received, there, exchange.received_rows, exchange.sent_rows)
        dist.all_to_all_single(back_received, back, exchange.sent_rows, exchange.received_rows)

    # A token's scores add up to what the sum of its own vector weighs.
    want = hidden.float() * scores.float().sum(1, keepdim=True)
    near = torch.allclose(combine(outputs, dispatched).float(), want, rtol=2e-2, atol=2e-2)
    calls = {
        SPREAD: lambda: combine(outputs, dispatch(hidden, scores, experts, sizes.num_experts)),
        LINK: link,
        "dispatch": lambda: dispatch(hidden, scores, experts, sizes.num_experts),
        "combine": lambda: combine(outputs, dispatched),
    }
    rows = _rows(EXPERTS, _times(calls, sizes), sizes, round(sizes.num_experts**0.5), "near" if near else "wrong")
    sent = sum(rows for other, rows in enumerate(exchange.sent_rows) if other != rank)
    megabytes = sent * sizes.hidden * (there.element_size() + back.element_size()) / 1e6
    return [{**row, "megabytes": megabytes} for row in rows]


def _messages(mesh, sizes):
    """One GPU to the other, and back at the same time, by the collective that `dispatch` is made of."""
    calls, same, rank = {}, [], dist.get_rank()
    for size in sizes.messages:
        sent = torch.full((NUM_RANKS, size), rank, dtype=torch.uint8, device=mesh.device_type)
        received = torch.empty_like(sent)
        calls[f"all-to-all, {size:,} bytes"] = lambda sent=sent, got=received: dist.all_to_all_single(got, sent)
        dist.all_to_all_single(received, sent)
        same.append(received.amin(1) == torch.arange(NUM_RANKS, device=received.device))
    check = _equal([torch.stack(same)], [torch.ones_like(torch.stack(same))])
    rows = _rows(LINKS, _times(calls, sizes), sizes, 0, check)
    return [{**row, "megabytes": size / 1e6} for row, size in zip(rows, sizes.messages, strict=True)]


def _equal(got, want):
    same = all(torch.equal(*both) for both in zip(got, want, strict=True))
    return "equal" if _slowest([0.0 if same else 1.0])[0] == 0 else "different"


def _slowest(numbers):
    """The largest that any rank has, of each."""
    values = torch.tensor(numbers, dtype=torch.float64, device=_device())
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def _device():
    return torch.device("cuda") if "nccl" in dist.get_backend_config() else torch.device("cpu")


def _synchronize():
    if _device().type == "cuda":
        torch.cuda.synchronize()


def _times(calls, sizes):
    """What calls take, all in turn, several times back to back, until the slowest rank is done: {name: quantiles of
    the rounds, µs}."""
    found = {name: [] for name in calls}
    for call in calls.values():
        call()
    timing.settle()
    for _ in range(sizes.rounds):
        for name, call in calls.items():
            call()
            _synchronize()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(sizes.calls):
                call()
            _synchronize()
            found[name].append(1e6 * (time.perf_counter() - start) / sizes.calls)
    quantiles = list(speed.QUANTILES.values())
    return {name: np.quantile(_slowest(times), quantiles) for name, times in found.items()}


def _rows(case, times, sizes, n, check):
    common = {"ranks": NUM_RANKS, "num_tokens": sizes.num_tokens, "num_expert_sqrt": n, "k": sizes.k, "dtype": "bf16"}
    return [
        {"case": case, "rival": name, **common, **dict(zip(speed.QUANTILES, map(float, us), strict=True)),
         "check": check}
        for name, us in times.items()
    ]  # fmt: skip


# --- what a notebook runs ---


def together(function, *args):
    """What function(mesh, *args) returns in each of two processes on the CPU, over gloo, in the order of ranks.

    Processes start without what a notebook imports and defines. So the function travels as its source, and imports
    what it needs. Arguments and results are tensors, numbers and texts, and lists and dictionaries of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, f"{folder}/arguments")
        multiprocessing.spawn(_call, (inspect.getsource(function), function.__name__, folder), NUM_RANKS)
        return [torch.load(f"{folder}/results{rank}") for rank in range(NUM_RANKS)]


def _call(rank, source, name, folder):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where gloo says that it has found the others
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=NUM_RANKS)
    mesh, here = init_device_mesh("cpu", (NUM_RANKS,)), {}
    exec(source, here)
    torch.save(here[name](mesh, *torch.load(f"{folder}/arguments")), f"{folder}/results{rank}")
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Adds up the bytes of logits, candidates and gradients that this rank gives to collectives: to functional ones,
    which DTensors communicate by, and to those that the host starts and leaves. It awaits the others: of a few integers
    that ranks agree on."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor says what becomes of it
        if "c10d_functional" in function.namespace and "all_" in str(function):
            self.bytes += args[0].nbytes
        elif function.namespace == "c10d" and any(arg is False for arg in args):  # async_op
            self.bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))
