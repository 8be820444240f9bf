"""The code NVIDIA GPUs run for lanes.py and frontier.py, run on the CPU: see ptx.py. Compiling needs a process whose
Triton is no interpreter, so this file runs itself as a program."""

import contextlib
import json
import multiprocessing
from typing import NamedTuple

import pytest
import torch
import triton
from cases import INF, NAN, adversarial_logits, assert_same_bits, by_magnitude, close_logits, compiled_by, dtype_name
from ptx import parse, run_program
from triton.backends.compiler import GPUTarget

from omni_kernels import factored_router, frontier, lanes
from omni_kernels.configs import OPTIONS

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
    Case(64, 1, BF16, 16, True, 2, {"NARROW": True, "STAGED": True, "TILE_N": 64, "CHUNK": 4}),
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
    Case(64, 18, FP32, 16, True, 2, {"HALVED": True, "TILE_N": 64, "CHUNK": 1, "GROUP": 32}),
    # Lists of wide keys that lanes merge in a loop.
    Case(128, 9, FP32, 16, True, 8, {"HALVED": True, "SEGMENT": 32}),
    Case(100, 10, FP32, 16, False, 16, {"HALVED": False, "SEGMENT": 16}),
    # Transposed, in squares, by several warps together; one tile, or several.
    Case(64, 8, BF16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 64, "CHUNK": 4, "NARROW": True, "num_warps": 4}),
    Case(64, 10, FP16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 64, "CHUNK": 2, "num_warps": 4}),
    Case(512, 3, BF16, -16, True, 2, {"TRANSPOSED": True, "TILE_N": 128, "CHUNK": 4, "num_warps": 4}),
    Case(256, 3, FP32, -16, False, 2, {"TRANSPOSED": True, "TILE_N": 128, "HALVED": True, "num_warps": 2}),
    Case(128, 9, FP32, -16, True, 2, {"TRANSPOSED": True, "LOOPED": True, "HALVED": True, "num_warps": 2}),
    # Logit by logit.
    Case(33, 5, BF16, 2, True, 4, {"TILE_N": 0}),
    Case(7, 5, FP16, 0, True, 4, {"TILE_N": 0}),
    Case(20, 7, FP32, 0, False, 2, {"TILE_N": 0}),
    Case(40, 5, FP32, 0, True, 2, {"TILE_N": 0}),
    Case(1, 1, BF16, 2, True, 2, {"TILE_N": 0}),
    # frontier.py: one piece, several, several tiles of them; in registers or in memory; fewer tokens a warp.
    Case(64, 40, BF16, 16, True, 0, {"IN_REGISTERS": True, "PIECE": 64, "PIECES": 1, "VECTOR": 16}),
    Case(20, 33, FP32, 0, True, 0, {"IN_REGISTERS": True, "PIECE": 20, "VECTOR": 0}),
    Case(33, 40, FP32, 4, False, 0, {"IN_REGISTERS": True, "PIECE": 32, "VECTOR": 4}),
    Case(100, 40, FP32, 16, True, 0, {"IN_REGISTERS": True, "PIECES": 4, "VECTOR": 16}),
    Case(300, 128, BF16, 8, False, 0, {"IN_REGISTERS": True, "PIECE": 64, "VECTOR": 8}),
    Case(300, 140, FP16, 8, True, 0, {"IN_REGISTERS": False, "PIECES": 4, "VECTOR": 8}),
    Case(100, 70, FP32, 16, False, 0, {"IN_REGISTERS": False, "PIECES": 2, "VECTOR": 16}),
    Case(200, 200, FP32, 16, True, 0, {"IN_REGISTERS": False, "TOKENS": 8}),
    Case(64, 2, BF16, 16, True, 0, {"SIDE": 1}),
    Case(46340, 3, FP16, 8, True, 0, {"IN_REGISTERS": True}),
    Case(46340, 3, FP16, 8, False, 0, {"IN_REGISTERS": True}),
]


def constants_of(case):
    """As the launcher has them, but for one warp where a warp shares nothing with others."""
    *problem, num_lanes, expected = case
    if num_lanes:
        alignment = max(case.alignment, 0)
        problem = *problem[:3], alignment, case.fp64, case.alignment < 0
        constants = dict(lanes.kernel_constants(*problem, num_lanes))
    else:
        constants = dict(frontier.kernel_constants(*problem))
    differing = {name: constants[name] for name, value in expected.items() if constants[name] != value}
    assert not differing, f"{case}: {differing}"
    if not constants.get("TRANSPOSED"):
        constants |= {"num_warps": 1} | ({"TILE_M": 32} if num_lanes else {})
    return constants | ({"stride_xn": 1, "stride_yn": 1} if case.alignment > 0 else {})


def compile_case(position):
    """The PTX of a case, how much shared memory its launch adds, and how many tokens a program has."""
    case = CASES[position]
    kernel = lanes.lanes_kernel if case.lanes else frontier.frontier_kernel
    constexprs = constants_of(case)
    options = {name: constexprs.pop(name) for name in ("num_warps", *OPTIONS)}
    element = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}[case.dtype]
    types = dict.fromkeys(("x_ptr", "y_ptr", "scores_ptr"), f"*{element}") | {"indices_ptr": "*i32"}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tokens = constexprs["TILE_M"] // case.lanes if case.lanes else constexprs["TOKENS"]
    return compiled.asm["ptx"], compiled.metadata.shared, tokens


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """For every case what `compile_case` returns, parsed."""
    return [(parse(ptx), *rest) for ptx, *rest in compiled_by(__file__, tmp_path_factory.mktemp("cache"))]


def run_kernel(kernel, shared_bytes, tokens_per_program, x, y, k):
    """Scores and indices of all tokens."""
    scores, indices = torch.full((len(x), k), NAN, dtype=x.dtype), torch.full((len(x), k), -1, dtype=torch.int32)
    tensors = {X: x, Y: y, SCORES: scores, INDICES: indices}
    memory = {
        address: (tensor if tensor.is_contiguous() else tensor.t()).view(torch.uint8).numpy().reshape(-1)
        for address, tensor in tensors.items()
    }
    strides = [*x.stride(), *y.stride()] if x.stride(1) > 1 else [x.stride(0), y.stride(0)]
    num_programs = triton.cdiv(len(x), tokens_per_program)
    for program_id in range(num_programs):
        run_program(kernel, [*tensors, *strides, len(x)], memory, shared_bytes, program_id, num_programs)
    return scores, indices


def ties_of_far_rows(num_expert_sqrt, dtype):
    """Three tokens whose best rows are far apart, and whose best sums are equal in the last one."""
    x, y = torch.randn(2, 3, num_expert_sqrt, generator=torch.Generator().manual_seed(0))
    x[0, -1] = y[0, -1] = x[1, 0] = x[1, -1] = 10.0
    x[2, [7, -7]] = y[2, [3, -3]] = 10.0
    return x.to(dtype), y.to(dtype)


def logits_of(case, tokens_per_program):
    """Programs of tokens whose sums have few bits, then tokens of every kind, the largest logits last, so that not
    all programs have any. The longest rows take too long for that."""
    if case.num_expert_sqrt > 1000:
        return ties_of_far_rows(case.num_expert_sqrt, case.dtype)
    x, y = adversarial_logits(case.num_expert_sqrt, case.dtype, repeats=2)
    order = by_magnitude(x, y)
    order = order[:5] if case.k > 100 else order[1:]  # an odd number, and few where they are slow
    more = (8 - len(order)) % 16 if case.alignment < 0 else 0  # for a multiple of 8 tokens, but not of 16
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(-100, 101, (2, 3 * tokens_per_program + more, case.num_expert_sqrt), generator=generator) / 32
    # In a program each, sums that are equal though their rows are not: infinite, or rounded.
    if case.lanes:
        short[1, 0, 0] = INF
    parts = [short.to(case.dtype), (x[order], y[order])]
    if case.dtype == FP32 and case.k <= 100:
        rounded = short[0, tokens_per_program]
        rounded[:2], rounded[-1] = torch.tensor([3.25, 3.5]), 3.25 + 2.0**-22
        parts.insert(1, close_logits(case.num_expert_sqrt, case.k, apart=tokens_per_program if case.lanes else 1))
    x, y = (torch.cat(factor) for factor in zip(*parts, strict=True))
    return (x, y) if case.alignment > 0 else (x.t().contiguous().t(), y.t().contiguous().t())


@pytest.mark.parametrize("position", range(len(CASES)), ids=map(str, CASES))
def test_every_kind_of_token(position, kernels):
    case, (kernel, shared_bytes, tokens_per_program) = CASES[position], kernels[position]
    x, y = logits_of(case, tokens_per_program)
    assert len(x) % tokens_per_program != 0, "these tokens do not test a program that is not full"
    assert_same_bits(run_kernel(kernel, shared_bytes, tokens_per_program, x, y, case.k), factored_router(x, y, case.k))


TWO_WARPS = """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 64
{{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<2>;
    .shared .align 4 .b8 words[256];
    mov.u32 %r1, %tid.x;
    {}
    mov.u32 %r4, %tid.x;
    ld.param.b64 %rd1, [kernel_param_0];
    mad.wide.u32 %rd1, %r4, 4, %rd1;
    st.global.b32 [%rd1], %r1;
    ret;
}}
"""
THREADS = torch.arange(64)


def run_two_warps(code):
    """What each of 64 threads has in %r1, at first its number, after some PTX."""
    numbers = torch.full((64,), -1, dtype=torch.int32)
    run_program(parse(TWO_WARPS.format(code)), [X], {X: numbers.view(torch.uint8).numpy()})
    return numbers


@pytest.mark.parametrize("partner", [1, 32])
@pytest.mark.parametrize("before", ["", "bar.warp.sync -1;", "bar.sync 0;"])
@pytest.mark.parametrize("after", ["", "bar.warp.sync -1;", "bar.sync 0;"])
def test_barriers(partner, before, after):
    """Two threads of a warp or of two read what the other wrote, and overwrite their own."""
    code = f"""
    mov.u32 %r2, words;
    xor.b32 %r3, %r1, {partner};
    mad.lo.s32 %r3, %r3, 4, %r2;
    mad.lo.s32 %r2, %r1, 4, %r2;
    st.shared.b32 [%r2], %r1; {before}
    ld.shared.b32 %r1, [%r3]; {after}
    st.shared.b32 [%r2], %r1;
    """
    if "" in (before, after) or (partner == 32 and "bar.warp.sync -1;" in (before, after)):
        with pytest.raises(AssertionError, match="race"):
            run_two_warps(code)
    else:
        assert torch.equal(run_two_warps(code), (THREADS ^ partner).int())


@pytest.mark.parametrize(("place", "number", "error"), [(32, 32, None), (32, 31, "different"), (0, 0, "race")])
def test_stores_at_once(place, number, error):
    """Lanes of a warp may store the same number in one place of shared memory."""
    code = f"""
    mov.u32 %r2, words;
    and.b32 %r3, %r1, {place};
    add.u32 %r2, %r2, %r3;
    and.b32 %r1, %r1, {number};
    st.shared.b32 [%r2], %r1;
    """
    with pytest.raises(AssertionError, match=error) if error else contextlib.nullcontext():
        run_two_warps(code)


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("mov.u32 %r1, %laneid;", THREADS % 32),
        ("shfl.sync.idx.b32 %r1, %r1, 5, 31, -1;", THREADS // 32 * 32 + 5),
        ("shfl.sync.down.b32 %r1, %r1, 16, 31, -1;", THREADS | 16),
        ("redux.sync.max.u32 %r1, %r1, -1;", THREADS | 31),
        ("setp.ge.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r1, %p1, -1;", THREADS // 32 * -(1 << 8)),
        ("setp.ge.u32 %p1, %r1, 40; @%p1 activemask.b32 %r1;", torch.where(THREADS < 40, THREADS, -(1 << 8))),
    ],
)
def test_exchanges(code, want):
    """Each warp's is its own."""
    assert torch.equal(run_two_warps(code), want.int())


if __name__ == "__main__":
    with multiprocessing.Pool() as pool:
        print(json.dumps(pool.map(compile_case, range(len(CASES)), chunksize=1)))
