"""The rivals of a forward pass, and the rungs of the ladder from all N² sums to the router that people call."""

import collections
import dataclasses
import functools
import importlib
import pathlib

import torch

from omni_kernels import (
    factored,
    omni_router,
    triton_omni_router_func,
    triton_omni_router_func_optimized,
)
from omni_kernels.factored import frontier, lanes, tile

Case = collections.namedtuple("Case", ["num_tokens", "num_expert_sqrt", "k", "dtype"])
CASE = list(Case._fields)
Rival = collections.namedtuple("Rival", ["route", "family", "why"])  # route(x, y, k) -> scores, indices
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUMS_AT_ONCE = 1 << 30  # 4 GiB of fp32


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


def later_public_kernels(x, y, k):
    """The same at github.com/HKUSTDial/omni-moe, of May 2026: its omni_moe/ops/triton, as a package of this name."""
    from omni_moe_9fc2506.omni_router import OmniRouterFunc

    return OmniRouterFunc.apply(x, y, x.shape[1], k)


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


def rung_to_read(name, function="route"):
    """The function of a file of notebooks/ladder, imported when it is called."""

    def call(*args):
        return getattr(importlib.import_module(f"ladder.{name}"), function)(*args)

    return call


ALL_SUMS, FACTORED, COMPILED = "PyTorch, all N² sums", "PyTorch, factored", "PyTorch, factored, compiled"
QUACK, ORIGINAL, OPTIMIZED, OMNI = "QuACK top-k, compiled", "original kernels", "optimized kernels", "omni_router"
FRONTIER, PUBLIC, LATER_PUBLIC = "frontier kernel", "omni-moe kernels", "omni-moe kernels, 9fc2506"

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
    LATER_PUBLIC: Rival(
        later_public_kernels,
        "compositions",
        "`topk` of each factor by PyTorch; then k rounds over the k² sums of what is left, a token after the other.",
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
        "Keys of 64 bits that order as doubles are compared as doubles, of which the kernel has no other use.",
    ),
    "short keys of pairs": Rival(
        lanes_rung(**ONE_WARP),
        "factored kernels",
        "A pair's sum, row and rank share 32 bits where the sums leave room for it; where they do not, 64 as before.",
    ),
    "two warps a program": Rival(
        lanes_rung(**STRAIGHT),
        "factored kernels",
        "They run close together, so that they may share the code they fetch.",
    ),
    "networks in loops": Rival(
        lanes_rung(**COMPARED),
        "factored kernels",
        "Short code, and work that can begin with a part of a row while the rest is on its way.",
    ),
    "minima by sums": Rival(
        lanes_rung(**KEPT),
        "factored kernels",
        "The smaller of two keys is their sum less the larger: multiply-adds instead of comparisons.",
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
# The rungs that people read, each of which stands alone.
TO_READ = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "ladder").glob("rung*.py"))
LADDER = [name for name in RIVALS if name != FRONTIER]
RUNGS = [name for name in LADDER if RIVALS[name].family == "factored kernels"]
RIVALS |= {name: Rival(rung_to_read(name), "rungs to read", "A file of notebooks/ladder.") for name in TO_READ}
