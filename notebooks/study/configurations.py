"""What the autotune study launches: its problems, every configuration of every kernel, the arguments of a launch."""

import collections
import dataclasses
import functools
import itertools
import random

import torch
import triton

from omni_kernels import configs, factored_router, forward, original, split_forward
from omni_kernels.factored import frontier, lanes
from omni_kernels.factored.tile import plan_for as plan_of_tile

from . import routing

Problem = collections.namedtuple("Problem", ["kernel", "tokens", "num_expert_sqrt", "k"])
KEY = [*Problem._fields, "tile", "num_warps", "num_stages"]  # the columns that say what a row is of
IDENTITY = [*KEY, "binary"]  # and what was compiled for it
N2_KERNELS = ("fwd", "fwd_split", "bwd")
NAMES = {"fwd": "forward", "fwd_split": "split forward", "bwd": "backward", "tile": "factored, tiles",
         "lanes": "factored, lanes", "frontier": "factored, frontier"}  # fmt: skip
FIELDS = {"TILE_M": "tokens", "TOKENS": "tokens", "CHUNK": "chunk", "LANES": "lanes", "PIECE": "piece"}  # of a plan

# The guide's shapes, and other token counts at one of them. The forward kernel holds all N² sums, so it ends at 128.
PROBLEMS = [
    *(Problem("fwd", 1024, n, 16) for n in (64, 128)),
    *(Problem(kernel, 1024, n, 16) for kernel in ("fwd_split", "bwd") for n in (64, 128, 256)),
    *(Problem("fwd", tokens, 64, 16) for tokens in (128, 4096)),
    *(Problem(kernel, tokens, 128, 16) for kernel in ("fwd_split", "bwd") for tokens in (128, 4096)),
    *(Problem(kernel, tokens, 256, 16) for kernel in ("tile", "lanes") for tokens in (128, 4096, 65536)),
    *(Problem("frontier", tokens, 256, 64) for tokens in (128, 4096, 65536)),
]
COMPILED_PROBLEMS = [
    Problem("fwd", 1024, 64, 16),
    *(Problem(kernel, 1024, 256, 16) for kernel in ("fwd_split", "bwd", "tile", "lanes")),
    Problem("frontier", 1024, 256, 64),
]

FAST_DOUBLES = {f"cuda:sm{major}{minor}" for major, minor in configs.DOUBLES}


@functools.cache
def tensors(tokens, num_expert_sqrt, k, device):
    """Logits of real text, room for scores and indices, the right indices. On the device "meta" without values."""
    x = y = torch.empty(tokens, num_expert_sqrt, dtype=torch.bfloat16, device=device)
    indices = torch.empty(tokens, k, dtype=torch.int32, device=device)
    right = indices
    if device != "meta":
        x, y = routing.text_logits(routing.text_bytes(tokens), num_expert_sqrt, torch.bfloat16, device)
        right = factored_router(x, y, k)[1]
    return x, y, torch.ones(tokens, k, dtype=torch.bfloat16, device=device), indices, right


def launch(problem, config, device, arch):
    """A kernel, its positional and its keyword arguments, and its grid, for a problem and a configuration."""
    kernel, tokens, n, k = problem
    x, y, scores, indices, right = tensors(tokens, n, k, device)
    logits = (x, y, scores, indices, *x.stride(), *y.stride(), tokens)
    if kernel not in N2_KERNELS:
        plan = plan_of(problem, config, arch in FAST_DOUBLES)
        constants = {"PLAN": plan, "num_warps": plan.num_warps, **configs.OPTIONS}
        return plan.kernel, (*logits[:4], None, *logits[4:]), constants, (plan.grid(tokens),)  # nothing is saved
    constants = config.all_kwargs()
    key = (n, k, configs.token_bucket(tokens))
    if kernel == "fwd":
        function, args = forward.forward_kernel, (*logits, *key)
        constants |= {"TILE_N": triton.next_power_of_2(n)}
    elif kernel == "fwd_split":
        function, args = split_forward.split_forward_kernel, (*logits, *key)
        constants |= {"TILE_K": split_forward.padded_count(k), "PADDED_SQRT": triton.next_power_of_2(n)}
    else:
        function = original.backward_kernel
        grad_x, grad_y = (torch.zeros(tokens, n, device=device) for _ in range(2))
        args = (scores, right, grad_x, grad_y, *scores.stride(), tokens, *key)
    return function, args, constants, (-(-tokens // config.kwargs["TILE_M"]),)


def rule(problem, doubles, num_lanes):
    """The plan that a factored kernel's rules make: where doubles compare as fast as integers or not, for a number of
    lanes a token."""
    kernel, tokens, n, k = problem
    if kernel == "lanes":
        return lanes.plan_of(n, k, torch.bfloat16, torch.bfloat16, 16, False, doubles, num_lanes)
    if kernel == "frontier":
        return frontier.plan_of(n, k, torch.bfloat16, torch.bfloat16, 16, doubles)
    return plan_of_tile(*tensors(tokens, n, k, "meta")[:2], k, torch.bfloat16)


def plan_of(problem, config, doubles):
    """The plan of the rules, with the sizes and warps of a configuration."""
    plan = rule(problem, doubles, config.kwargs.get("LANES"))
    sizes = {FIELDS[name]: size for name, size in config.kwargs.items()}
    if problem.kernel == "lanes":  # loops are made for one size of chunks
        sizes["looped"] = plan.looped and plan.chunk == sizes["chunk"]
    return dataclasses.replace(plan, num_warps=config.num_warps, **sizes)


def chosen(problem):
    """What the package launches for a problem of a factored kernel on the device at hand, as tables name it."""
    kernel, tokens, n, _ = problem
    device = configs.get_device()
    few = tokens <= lanes.most_few_tokens(n, device)
    num_lanes = lanes.lanes_of_few_tokens(n, torch.bfloat16.itemsize) if few else 2
    plan = rule(problem, configs.compares_doubles(device), num_lanes)
    sizes = {name: getattr(plan, FIELDS[name]) for name in configs.TILES[kernel]}
    return label(triton.Config(sizes, num_warps=plan.num_warps, num_stages=1))


def tokens_of(sizes, num_warps):
    """The tokens of one program, by its tile sizes and warps."""
    return sizes.get("TILE_M") or sizes.get("TOKENS") or 32 * num_warps // sizes["LANES"]


def space(kernel, name):
    """The configurations of a space ("original", "general", an architecture), or the factored kernel's own."""
    return configs.get_configs(name if kernel in N2_KERNELS else "factored", kernel)


def every_config(kernel):
    """The configurations of all spaces of a kernel, each once."""
    names = ["general", "original", *configs.ARCH_SPACES] + ["few warps"] * (kernel in configs.FEW_WARPS_SPACE)
    found = {label(c): c for name in names for c in space(kernel, name)}
    return list(found.values())


def label(config):
    """A configuration as the tables name it: (tile, num_warps, num_stages)."""
    return " ".join(f"{name}={size}" for name, size in config.kwargs.items()), config.num_warps, config.num_stages


def tile_sizes(tile):
    """A table's tile as a dictionary: "TILE_M=2 TILE_N=512" is {"TILE_M": 2, "TILE_N": 512}."""
    return {name: int(size) for name, size in (part.split("=") for part in tile.split())}


def kept_by_pruning(problem, candidates):
    """The candidates that the package's own tuning would compile for this problem."""
    if problem.kernel not in N2_KERNELS:
        return candidates
    bucket = configs.token_bucket(problem.tokens)
    return configs.pruned(candidates, problem.kernel, bucket, problem.num_expert_sqrt, problem.k)


def all_jobs(problems=PROBLEMS):
    """(problem, config) of everything to measure: shuffled within a problem, the problems in turn, always the same."""
    shuffled = []
    for number, problem in enumerate(problems):
        order = every_config(problem.kernel)
        random.Random(number).shuffle(order)
        shuffled.append([(problem, config) for config in order])
    return [job for turn in itertools.zip_longest(*shuffled) for job in turn if job]


def key_of(problem, config):
    return (*problem, *label(config))


def keys_of(rows):
    return set(rows[KEY].itertuples(index=False, name=None)) if len(rows) else set()


def title(problem):
    return f"{NAMES[problem.kernel]}, {problem.tokens} tokens, N = {problem.num_expert_sqrt}"
