"""The code NVIDIA GPUs run for lanes.py and frontier.py, run on the CPU: see ptx.py. Compiling needs a process whose
Triton is no interpreter, so this file runs itself as a program."""

import json
import multiprocessing
from typing import NamedTuple

import pytest
import torch
import triton
from cases import INF, NAN, adversarial_logits, assert_same_bits, by_magnitude, close_logits, compiled_by, dtype_name
from ptx import parse, run_warp
from triton.backends.compiler import GPUTarget

from omni_kernels import factored_router, frontier, lanes

pytestmark = pytest.mark.xdist_group("ptx")  # compiled once

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
X, Y, SCORES, INDICES = (i << 40 for i in range(1, 5))


class Case(NamedTuple):
    """A problem, and how its kernel reads rows and orders keys."""

    num_expert_sqrt: int
    k: int
    dtype: torch.dtype
    alignment: int  # of the rows, in bytes; 0: transposed logits, read one at a time; -16: in vectors of a column
    fp64: bool
    lanes: int  # 0: frontier.py
    constants: dict  # among them, so that nobody changes what a case is about unseen

    def __str__(self):
        return f"{self.num_expert_sqrt}-{self.k}-{dtype_name(self.dtype)}-{self.alignment}-{self.fp64}-{self.lanes}"


CASES = [
    # In tiles, staged; pairs in 32 bits, or in 64.
    Case(64, 16, BF16, 16, True, 2, {"NARROW": True, "STAGED": True, "TILE_N": 64, "CHUNK": 2}),
    Case(64, 32, BF16, 16, False, 2, {"NARROW": False, "STAGED": True, "TILE_N": 64, "CHUNK": 1}),
    Case(512, 8, BF16, 16, False, 2, {"NARROW": True, "STAGED": True, "TILE_N": 256, "CHUNK": 4}),
    Case(66, 5, BF16, 4, True, 2, {"NARROW": True, "STAGED": True, "TILE_N": 66, "CHUNK": 2, "VECTOR": 4}),
    Case(256, 4, BF16, 16, False, 4, {"NARROW": True, "STAGED": True, "SEGMENT": 128, "CHUNK": 4}),
    Case(64, 10, FP16, 16, True, 2, {"NARROW": False, "STAGED": True, "TILE_N": 64, "CHUNK": 2}),
    Case(68, 4, FP16, 8, False, 2, {"STAGED": True, "TILE_N": 68, "CHUNK": 4, "VECTOR": 8}),
    Case(128, 10, BF16, 16, True, 2, {"LOOPED": True, "NARROW": True, "TILE_N": 128, "CHUNK": 4, "ADDED": True}),
    Case(256, 20, BF16, 16, True, 2, {"LOOPED": True, "NARROW": False, "TILE_N": 256, "CHUNK": 4, "ADDED": False}),
    # Straight from global memory, ragged or not.
    Case(100, 10, BF16, 8, True, 4, {"STAGED": False, "SEGMENT": 52, "TILE_N": 52, "CHUNK": 1}),
    Case(256, 5, BF16, 16, True, 16, {"STAGED": False, "SEGMENT": 32, "CHUNK": 2}),
    Case(128, 8, FP16, 16, False, 16, {"STAGED": False, "SEGMENT": 16, "CHUNK": 1}),
    Case(100, 4, FP32, 16, True, 8, {"HALVED": False, "SEGMENT": 28, "CHUNK": 1}),
    # fp32 by halves.
    Case(64, 16, FP32, 16, True, 2, {"HALVED": True, "TILE_N": 64, "CHUNK": 2}),
    Case(64, 5, FP32, 16, False, 2, {"HALVED": True, "TILE_N": 64, "CHUNK": 4}),
    Case(64, 5, FP32, 16, True, 4, {"HALVED": True, "TILE_N": 32, "CHUNK": 2}),
    Case(256, 3, FP32, 16, True, 2, {"HALVED": True, "TILE_N": 128, "CHUNK": 4}),
    Case(256, 3, FP32, 16, False, 2, {"HALVED": True, "TILE_N": 128, "CHUNK": 4}),
    Case(128, 9, FP32, 16, True, 2, {"HALVED": True, "LOOPED": True, "TILE_N": 128, "CHUNK": 4}),
    Case(128, 12, FP32, 16, False, 2, {"HALVED": True, "LOOPED": True, "TILE_N": 128, "CHUNK": 4}),
    Case(32, 7, FP32, 16, False, 2, {"HALVED": True, "TILE_N": 32, "CHUNK": 2}),
    Case(32, 10, FP32, 16, True, 2, {"HALVED": True, "TILE_N": 32, "CHUNK": 1}),
    Case(4, 9, FP32, 16, True, 2, {"HALVED": True, "TILE_N": 4, "CHUNK": 1}),
    # Transposed, in squares; one tile, or two.
    Case(64, 8, BF16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 64, "CHUNK": 4, "NARROW": True}),
    Case(64, 10, FP16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 64, "CHUNK": 2}),
    Case(512, 3, BF16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 256, "CHUNK": 4}),
    Case(256, 3, FP32, -16, False, 2, {"TRANSPOSED": True, "TILE_N": 128, "HALVED": True}),
    Case(128, 9, FP32, -16, True, 2, {"TRANSPOSED": True, "LOOPED": True, "HALVED": True}),
    # Logit by logit.
    Case(33, 5, BF16, 2, True, 4, {"TILE_N": 0}),
    Case(7, 5, FP16, 0, True, 4, {"TILE_N": 0}),
    Case(20, 7, FP32, 0, False, 2, {"TILE_N": 0}),
    Case(40, 5, FP32, 0, True, 2, {"TILE_N": 0}),
    Case(1, 1, BF16, 2, True, 2, {"TILE_N": 0}),
    # frontier.py: one piece, several, several tiles of them; fewer tokens a warp.
    Case(64, 40, BF16, 16, True, 0, {"PIECES": 1, "VECTOR": 16}),
    Case(20, 33, FP32, 0, True, 0, {"PIECE": 20, "VECTOR": 0}),
    Case(33, 40, FP32, 4, False, 0, {"PIECE": 33, "VECTOR": 4}),
    Case(100, 40, FP32, 16, True, 0, {"PIECES": 2, "VECTOR": 16}),
    Case(300, 128, BF16, 8, False, 0, {"PIECES": 4, "VECTOR": 8}),
    Case(64, 256, FP32, 16, True, 0, {"TOKENS": 8}),
]


def constants_of(case):
    """As the launcher has them, but for one warp."""
    *problem, num_lanes, expected = case
    if num_lanes:
        alignment = max(case.alignment, 0)
        problem = *problem[:3], alignment, case.fp64, case.alignment < 0
        constants = dict(lanes._constants(*problem, num_lanes))
    else:
        constants = dict(frontier._constants(*problem))
    differing = {name: constants[name] for name, value in expected.items() if constants[name] != value}
    assert not differing, f"{case}: {differing}"
    constants.pop("num_warps", None)
    constants |= {"TILE_M": 32} if num_lanes else {}
    return constants | ({"stride_xn": 1, "stride_yn": 1} if case.alignment > 0 else {})


def compile_case(position):
    """The PTX of a case, and how many tokens a warp has."""
    case = CASES[position]
    kernel = lanes.lanes_kernel if case.lanes else frontier.frontier_kernel
    constexprs = constants_of(case)
    element = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}[case.dtype]
    types = dict.fromkeys(("x_ptr", "y_ptr", "scores_ptr"), f"*{element}") | {"indices_ptr": "*i32"}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
    return ptx, 32 // case.lanes if case.lanes else constexprs["TOKENS"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """For every case the parsed program, and how many tokens it routes."""
    return [(parse(ptx), tokens) for ptx, tokens in compiled_by(__file__, tmp_path_factory.mktemp("cache"))]


def run_kernel(program, tokens_per_warp, x, y, k):
    """Scores and indices of all tokens."""
    scores, indices = torch.full((len(x), k), NAN, dtype=x.dtype), torch.full((len(x), k), -1, dtype=torch.int32)
    tensors = {X: x, Y: y, SCORES: scores, INDICES: indices}
    memory = {
        address: (tensor if tensor.is_contiguous() else tensor.t()).view(torch.uint8).numpy().reshape(-1)
        for address, tensor in tensors.items()
    }
    strides = [*x.stride(), *y.stride()] if x.stride(1) > 1 else [x.stride(0), y.stride(0)]
    num_programs = triton.cdiv(len(x), tokens_per_warp)
    for program_id in range(num_programs):
        run_warp(program, [*tensors, *strides, len(x)], memory, program_id=program_id, num_programs=num_programs)
    return scores, indices


def logits_of(case, tokens_per_warp):
    """Warps of tokens whose sums have few bits, then tokens of every kind, the largest logits last, so that not
    all warps have any."""
    x, y = adversarial_logits(case.num_expert_sqrt, case.dtype, repeats=2)
    order = by_magnitude(x, y)
    order = order[:5] if case.k > 100 else order[1:]  # an odd number, and few where they are slow
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(-100, 101, (2, 3 * tokens_per_warp, case.num_expert_sqrt), generator=generator) / 32
    # In a warp each, sums that are equal though their rows are not: infinite, or rounded.
    if case.lanes:
        short[1, 0, 0] = INF
    parts = [short.to(case.dtype), (x[order], y[order])]
    if case.dtype == FP32 and case.k <= 100:
        rounded = short[0, tokens_per_warp]
        rounded[:2], rounded[-1] = torch.tensor([3.25, 3.5]), 3.25 + 2.0**-22
        parts.insert(1, close_logits(case.num_expert_sqrt, case.k, apart=tokens_per_warp if case.lanes else 1))
    x, y = (torch.cat(factor) for factor in zip(*parts, strict=True))
    if case.alignment > 0:
        return x, y
    if case.alignment < 0:  # a multiple of 8 tokens, but not of 16
        x, y = (factor[-((len(x) - 8) // 16 * 16 + 8) :] for factor in (x, y))
    return x.t().contiguous().t(), y.t().contiguous().t()


@pytest.mark.parametrize("position", range(len(CASES)), ids=map(str, CASES))
def test_every_kind_of_token(position, programs):
    case, (program, tokens_per_warp) = CASES[position], programs[position]
    x, y = logits_of(case, tokens_per_warp)
    assert len(x) % tokens_per_warp != 0, "these tokens do not test a warp that is not full"
    assert_same_bits(run_kernel(program, tokens_per_warp, x, y, case.k), factored_router(x, y, case.k))


if __name__ == "__main__":
    with multiprocessing.Pool() as pool:
        print(json.dumps(pool.map(compile_case, range(len(CASES)), chunksize=1)))
