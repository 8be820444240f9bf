"""The code NVIDIA GPUs run for lanes_kernel and frontier_kernel, run on the CPU: see ptx.py. Compiling needs a process
whose Triton is no interpreter, so this file runs itself as a program."""

import contextlib
import dataclasses
import json
import multiprocessing
from typing import NamedTuple

import pytest
import torch
import triton
from cases import (
    INF,
    NAN,
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    by_magnitude,
    close_logits,
    compile_plan,
    compiled_by,
    dtype_name,
    oracle_scores,
)
from ptx import parse, run_program

from omni_kernels import factored_router
from omni_kernels.factored import frontier, lanes, room_to_save

pytestmark = pytest.mark.xdist_group("ptx")  # compiled once

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
X, Y, SCORES, INDICES, SAVED = (i << 40 for i in range(1, 6))


class Case(NamedTuple):
    """A problem, and how its kernel reads rows and orders keys."""

    num_expert_sqrt: int
    k: int
    dtype: torch.dtype
    alignment: int  # of the rows, in bytes; 0: transposed logits, read one at a time; -16: in vectors of a column
    doubles: bool
    lanes: int  # 0: frontier.py
    normalize: str | None
    expected: dict  # of the plan, so that nobody changes what a case is about unseen

    def __str__(self):
        parts = *self[:2], dtype_name(self.dtype), *self[3:6], *([self.normalize] if self.normalize else [])
        return "-".join(map(str, parts))


def case(*problem, normalize=None, **expected):
    return Case(*problem, normalize, expected)


CASES = [
    # In tiles, staged; pairs in 32 bits, or in 64.
    case(64, 16, BF16, 16, True, 2, short_pairs=True, staged=True, tile_n=64, chunk=2),
    case(64, 32, BF16, 16, False, 2, short_pairs=False, staged=True, tile_n=64, chunk=1),
    case(512, 8, BF16, 16, False, 2, short_pairs=True, staged=True, tile_n=256, chunk=4),
    case(66, 5, BF16, 4, True, 2, short_pairs=True, staged=True, tile_n=66, chunk=2, vector=4),
    case(256, 4, BF16, 16, False, 4, short_pairs=True, staged=True, segment=128, chunk=4),
    case(64, 10, FP16, 16, True, 2, short_pairs=False, staged=True, tile_n=64, chunk=2),
    case(68, 4, FP16, 8, False, 2, staged=True, tile_n=68, chunk=4, vector=8),
    case(128, 10, BF16, 16, True, 2, looped=True, short_pairs=True, tile_n=128, chunk=4, add_minima=True),
    case(256, 20, BF16, 16, True, 2, looped=True, short_pairs=True, tile_n=256, chunk=4, add_minima=False),
    # By a pile: in one tile or several, of whole vectors or not, of fewer keys than are sorted at once.
    case(360, 32, BF16, 16, True, 2, part=40, piled=56, tile_n=120, short_pairs=False),
    case(330, 18, FP16, 4, False, 2, part=22, piled=38, tile_n=110, vector=4),
    case(280, 20, FP16, 16, True, 2, part=8, piled=24, tile_n=56, group=16),
    # Straight from global memory, ragged or not.
    case(100, 10, BF16, 8, True, 4, staged=False, segment=52, tile_n=52, chunk=1),
    case(256, 5, BF16, 16, True, 16, staged=False, segment=32, chunk=2),
    case(128, 8, FP16, 16, False, 16, staged=False, segment=16, chunk=1),
    case(100, 4, FP32, 16, True, 8, short_keys=False, segment=28, chunk=1),
    # fp32 by short keys.
    case(64, 16, FP32, 16, True, 2, short_keys=True, tile_n=64, chunk=2),
    case(64, 5, FP32, 16, True, 4, short_keys=True, tile_n=32, chunk=2),
    case(256, 3, FP32, 16, False, 2, short_keys=True, tile_n=128, chunk=4),
    case(128, 9, FP32, 16, True, 2, short_keys=True, looped=True, tile_n=128, chunk=4),
    case(32, 7, FP32, 16, False, 2, short_keys=True, tile_n=32, chunk=2),
    case(32, 10, FP32, 16, True, 2, short_keys=True, tile_n=32, chunk=1),
    case(4, 9, FP32, 16, True, 2, short_keys=True, tile_n=4, chunk=1),
    case(64, 18, FP32, 16, True, 2, short_keys=True, tile_n=64, chunk=1, group=32),
    # Lists of wide keys that lanes merge in a loop.
    case(128, 9, FP32, 16, True, 8, short_keys=True, segment=32),
    case(100, 10, FP32, 16, False, 16, short_keys=False, segment=16),
    # Transposed, in squares, by several warps together; one tile, or several.
    case(64, 8, BF16, -16, True, 2, transposed=True, tile_n=64, chunk=4, short_pairs=True, num_warps=4),
    case(64, 10, FP16, -16, True, 2, transposed=True, tile_n=64, chunk=2, num_warps=4),
    case(512, 3, BF16, -16, True, 2, transposed=True, tile_n=128, chunk=4, num_warps=4),
    case(256, 3, FP32, -16, False, 2, transposed=True, tile_n=128, short_keys=True, num_warps=2),
    case(128, 9, FP32, -16, True, 2, transposed=True, looped=True, short_keys=True, num_warps=2),
    case(128, 9, BF16, -16, True, 2, transposed=True, looped=False, chunk=4, num_warps=4),
    # Logit by logit.
    case(33, 5, BF16, 2, True, 4, tile_n=0),
    case(7, 5, FP16, 0, True, 4, tile_n=0),
    case(20, 7, FP32, 0, False, 2, tile_n=0),
    case(40, 5, FP32, 0, True, 2, tile_n=0),
    case(1, 1, BF16, 2, True, 2, tile_n=0),
    case(296, 20, BF16, 16, True, 2, tile_n=0, part=0, group=32),
    # frontier.py: one piece, several, several tiles of them; in registers or in memory; fewer tokens a warp.
    case(64, 40, BF16, 16, True, 0, in_registers=True, piece=64, pieces=1, vector=16),
    case(20, 33, FP32, 0, True, 0, in_registers=True, piece=20, vector=0),
    case(33, 40, FP32, 4, False, 0, in_registers=True, piece=32, vector=4),
    case(100, 40, FP32, 16, True, 0, in_registers=True, pieces=4, vector=16),
    case(300, 128, BF16, 8, False, 0, in_registers=True, piece=64, vector=8),
    case(300, 140, FP16, 8, True, 0, in_registers=False, pieces=4, vector=8),
    case(100, 70, FP32, 16, False, 0, in_registers=False, pieces=2, vector=16),
    case(200, 200, FP32, 16, True, 0, in_registers=False, tokens=8),
    case(64, 2, BF16, 16, True, 0, side=1),
    case(46340, 3, FP16, 8, True, 0, in_registers=True),
    # Normalized scores: staged or not, in tiles or logit by logit, ragged, transposed, by many lanes, half a list each.
    case(512, 8, BF16, 16, False, 2, normalize="log_softmax", short_pairs=True, tiles=2),
    case(66, 5, BF16, 4, True, 2, normalize="topk", short_pairs=True, vector=4, split=False),
    case(128, 10, BF16, 16, True, 2, normalize="softmax", looped=True, short_pairs=True),
    case(360, 17, BF16, 16, True, 2, normalize="softmax", piled=56, tiles=3),
    case(100, 10, BF16, 8, True, 4, normalize="softmax", staged=False, ragged=True),
    case(100, 4, FP32, 16, True, 8, normalize="log_softmax", staged=False, ragged=True),
    case(256, 3, FP32, 16, False, 2, normalize="softmax", short_keys=True, tiles=2),
    case(256, 16, BF16, 16, True, 16, normalize="softmax", staged=False, spread=True, split=True),
    case(512, 3, BF16, -16, True, 2, normalize="softmax", transposed=True, tiles=4, num_warps=4),
    case(33, 5, BF16, 2, True, 4, normalize="softmax", tile_n=0, ragged=True),
    case(64, 40, BF16, 16, True, 0, normalize="softmax", vector=16),
    case(33, 40, FP32, 4, False, 0, normalize="topk", vector=4),
]


def plan_of(case):
    """As the launcher has it, but for one warp where a warp shares nothing with others."""
    num_expert_sqrt, k, dtype, alignment, doubles, num_lanes, normalize, expected = case
    problem = num_expert_sqrt, k, dtype, dtype, max(alignment, 0)
    if num_lanes:
        plan = lanes.plan_of(*problem, alignment < 0, doubles, num_lanes, normalize)
    else:
        plan = frontier.plan_of(*problem, doubles, normalize)
    differing = {name: getattr(plan, name) for name, value in expected.items() if getattr(plan, name) != value}
    assert not differing, f"{case}: {differing}"
    return dataclasses.replace(plan, num_warps=plan.num_warps if expected.get("transposed") else 1)


def compile_case(position):
    """The PTX of a case, how much shared memory its launch adds, and how many tokens a program has."""
    plan = plan_of(CASES[position])
    compiled = compile_plan(plan, **({"stride_xn": 1, "stride_yn": 1} if CASES[position].alignment > 0 else {}))
    return compiled.asm["ptx"], compiled.metadata.shared, plan.tokens


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernel of every case, and how many tokens a program of it has."""
    return [
        (parse(ptx, launch_bytes), tokens)
        for ptx, launch_bytes, tokens in compiled_by(__file__, tmp_path_factory.mktemp("cache"))
    ]


def run_kernel(kernel, tokens_per_program, x, y, case):
    """Scores and indices of all tokens, and what is saved of them if they are normalized."""
    k = case.k
    scores, indices = torch.full((len(x), k), NAN, dtype=x.dtype), torch.full((len(x), k), -1, dtype=torch.int32)
    tensors = {X: x, Y: y, SCORES: scores, INDICES: indices}
    saved = room_to_save(x, k, case.normalize) if case.normalize else None
    if case.normalize:
        tensors[SAVED] = saved
    memory = {
        address: (tensor if tensor.is_contiguous() else tensor.t()).view(torch.uint8).numpy().reshape(-1)
        for address, tensor in tensors.items()
    }
    strides = [*x.stride(), *y.stride()] if x.stride(1) > 1 else [x.stride(0), y.stride(0)]
    num_programs = triton.cdiv(len(x), tokens_per_program)
    for program_id in range(num_programs):
        run_program(kernel, [*tensors, *strides, len(x)], memory, program_id, num_programs)
    return scores, indices, saved


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
    if case.normalize:  # largest logits of which log2(e) times as much is far from a number of fp32
        far = torch.randn((2, 8, case.num_expert_sqrt), generator=generator) * 2.0 ** torch.arange(20, 36, 2)[:, None]
        parts.insert(1, far.to(case.dtype))
    if case.dtype == FP32 and case.k <= 100:
        rounded = short[0, tokens_per_program]
        rounded[:2], rounded[-1] = torch.tensor([3.25, 3.5]), 3.25 + 2.0**-22
        parts.insert(1, close_logits(case.num_expert_sqrt, case.k, apart=tokens_per_program if case.lanes else 1))
    x, y = (torch.cat(factor) for factor in zip(*parts, strict=True))
    return (x, y) if case.alignment > 0 else (x.t().contiguous().t(), y.t().contiguous().t())


@pytest.mark.parametrize("position", range(len(CASES)), ids=map(str, CASES))
def test_every_kind_of_token(position, kernels):
    case, (kernel, tokens_per_program) = CASES[position], kernels[position]
    x, y = logits_of(case, tokens_per_program)
    assert len(x) % tokens_per_program != 0, "these tokens do not test a program that is not full"
    scores, indices, saved = run_kernel(kernel, tokens_per_program, x, y, case)
    want, experts = factored_router(x, y, case.k)
    assert_same_bits([indices], [experts])
    if case.normalize is None:
        assert_same_bits([scores], [want])
        return
    want = oracle_scores(x, y, indices, case.normalize)
    assert_accurate(scores, want, case.normalize)
    of_rows, weights = saved[: 4 * len(x)].view(-1, 2, 2), saved[4 * len(x) :].view(len(x), -1)
    largest = torch.stack((x.float().amax(1), y.float().amax(1)), 1)
    torch.testing.assert_close(of_rows[..., 0], largest, rtol=0, atol=0, equal_nan=True)
    if case.normalize != "log_softmax":
        assert_accurate(weights, want, case.normalize)
    if case.normalize != "topk":
        finite = largest.isfinite()
        exact = torch.stack((x, y), 1).double().sub(largest[..., None]).exp().sum(2)
        torch.testing.assert_close(of_rows[..., 1][finite].double(), exact[finite], rtol=1e-6, atol=0)


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
