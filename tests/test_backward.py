"""The backward kernels: the bits of a sequential fp32 sum over the slots, however they are launched.

shared_kernel is PTX of its own, which the interpreter does not run: without a GPU its compiled code runs on the CPU
(ptx.py). Compiling needs a process whose Triton is no interpreter, so this file runs itself as a program."""

import dataclasses
import itertools
import json

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    ON_GPU,
    assert_same_bits,
    case_id,
    compile_plan,
    compiled_by,
    dirty_memory,
    dtype_name,
    oracle_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import parse, run_program

from omni_kernels.backward import backward, plan_of, run
from omni_kernels.reference import backward_router

SIZES = (1, 2, 3, 7, 16, 33, 64, 100, 128, 130)
COUNTS = (0, 1, 2, 5, 16, 31, 64)
MATRIX = [(n, k) for n, k in itertools.product(SIZES, COUNTS) if k <= n * n] + [(16, 256), (128, 100)]
CASES = [(*case, dtype) for case in MATRIX for dtype in DTYPES]
if not ON_GPU:  # every pair of sizes, with the dtypes in turn
    CASES = [(*case, dtype) for case, dtype in zip(MATRIX, itertools.cycle(DTYPES), strict=False)]


def problem(num_tokens, num_expert_sqrt, k, dtype, device, seed=0):
    """Gradients of mixed size, so that every order of adding gives other bits, and distinct experts that share rows."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(num_tokens, k, generator=generator) * 10 ** torch.randn(num_tokens, k, generator=generator)
    crowd = max(k, min(num_expert_sqrt**2, 2 * k, 3 * num_expert_sqrt))  # the experts of a few rows
    experts = torch.stack([torch.randperm(crowd, generator=generator)[:k] for _ in range(num_tokens)])
    experts[::2] = num_expert_sqrt**2 - 1 - experts[::2]  # the last rows
    if num_expert_sqrt > 1:
        experts[1::4] = experts[1::4] % num_expert_sqrt * num_expert_sqrt + experts[1::4] // num_expert_sqrt  # columns
    return grad.to(dtype).to(device), experts.int().to(device)


def plain_backward(grad, indices, num_expert_sqrt, dtype=None):
    """By one of the plain kernels, which run everywhere."""
    return run(plan_of(num_expert_sqrt, grad.shape[1], dtype or grad.dtype, grad.dtype, False), grad, indices)


# What the package chooses here, which are the plain kernels in the interpreter.
KERNELS = pytest.mark.parametrize(
    "backward", [backward, plain_backward] if ON_GPU else [plain_backward], ids=lambda backward: backward.__name__
)


@KERNELS
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=case_id)
def test_bits_of_the_sequential_sum(backward, num_expert_sqrt, k, dtype, device):
    grad, indices = problem(300 if ON_GPU else 33, num_expert_sqrt, k, dtype, device, seed=k)
    with dirty_memory():
        grads = backward(grad, indices, num_expert_sqrt)
    assert all(part.is_contiguous() and part.device == grad.device for part in grads)
    assert_same_bits(grads, oracle_backward(grad, indices, num_expert_sqrt))


@given(st.data())
@settings(max_examples=100 if ON_GPU else 25)
def test_any_gradients_and_experts(device, data):
    num_tokens, num_expert_sqrt = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    experts = st.integers(0, num_expert_sqrt**2 - 1)
    k = data.draw(st.integers(1, min(num_expert_sqrt**2, 14)))
    indices = [data.draw(st.lists(experts, min_size=k, max_size=k, unique=True)) for _ in range(num_tokens)]
    floats = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN, 2.0**24, 3e38, 1e-40]))
    grad = [data.draw(st.lists(floats, min_size=k, max_size=k)) for _ in range(num_tokens)]
    grad = torch.tensor(grad, dtype=torch.float32, device=device).to(data.draw(st.sampled_from(DTYPES)))
    indices = torch.tensor(indices, dtype=torch.int32, device=device)
    assert_same_bits(backward(grad, indices, num_expert_sqrt), oracle_backward(grad, indices, num_expert_sqrt))


def strided(grad):
    """The same gradients behind other strides."""
    wide = torch.full((len(grad), 3 * grad.shape[1] + 1), NAN, dtype=grad.dtype, device=grad.device)
    wide[:, 1::3] = grad
    return grad.t().contiguous().t(), wide[:, 1::3]


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(7, 16), (100, 5)])
def test_gradients_of_any_strides(backward, num_expert_sqrt, k, dtype, device):
    grad, indices = problem(10, num_expert_sqrt, k, dtype, device)
    want = oracle_backward(grad, indices, num_expert_sqrt)
    for view in strided(grad):
        assert_same_bits(backward(view, indices, num_expert_sqrt), want)
    for part in (grad[:1, :1], grad[:1], grad[:, :1]):  # one number for all, one row for all, one number a token
        view = part.expand_as(grad)
        assert_same_bits(
            backward(view, indices, num_expert_sqrt), oracle_backward(view.contiguous(), indices, num_expert_sqrt)
        )


@KERNELS
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(2, 3), (5, 3), (4, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_strides_beyond_int32(backward, num_expert_sqrt, k, axis, device):
    """A view may put neighbours 2³⁰ elements apart; only the touched pages of such a storage exist."""
    step = 1 << 30
    storage = torch.empty(2 * step + 3, dtype=torch.float16, device=device)
    grad = storage.as_strided((3, k), (step, 1) if axis == 0 else (1, step))
    values, indices = problem(3, num_expert_sqrt, k, torch.float16, device)
    grad.copy_(values)
    assert_same_bits(backward(grad, indices, num_expert_sqrt), oracle_backward(values, indices, num_expert_sqrt))


@KERNELS
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 200])
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(3, 5), (6, 5), (8, 5)])
def test_token_counts(backward, num_tokens, num_expert_sqrt, k, device):
    grad, indices = problem(num_tokens, num_expert_sqrt, k, torch.float32, device)
    assert_same_bits(backward(grad, indices, num_expert_sqrt), oracle_backward(grad, indices, num_expert_sqrt))


TILINGS = [(1, 4, 8), (4, 2, 16), (16, 32, 4), (2, 8, 256), (128, 64, 16)]


@pytest.mark.parametrize(("tokens", "tile_k", "tile_n"), TILINGS)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(5, 12), (40, 12), (12, 12), (13, 12)])
def test_any_launch_gives_the_same_bits(num_expert_sqrt, k, tokens, tile_k, tile_n, device):
    grad, indices = problem(3, num_expert_sqrt, k, torch.float32, device)
    plan = plan_of(num_expert_sqrt, k, torch.float32, torch.float32, False)
    with dirty_memory():
        grads = run(dataclasses.replace(plan, tokens=tokens, tile_k=tile_k, tile_n=tile_n), grad, indices)
    assert_same_bits(grads, oracle_backward(grad, indices, num_expert_sqrt))


@KERNELS
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(16, 64), (130, 31), (256, 16)])
def test_same_bits_on_every_run(backward, num_expert_sqrt, k, device):
    grad, indices = problem(2000 if ON_GPU else 40, num_expert_sqrt, k, torch.float32, device)
    first = backward(grad, indices, num_expert_sqrt)
    for _ in range(20 if ON_GPU else 2):
        assert_same_bits(backward(grad, indices, num_expert_sqrt), first)


@KERNELS
@pytest.mark.parametrize("num_expert_sqrt", [4096, 46340])
def test_long_rows(backward, num_expert_sqrt, device):
    indices = torch.tensor([[num_expert_sqrt**2 - 1, 0, num_expert_sqrt - 1]], dtype=torch.int32, device=device)
    grad = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    grad_x, grad_y = backward(grad, indices, num_expert_sqrt)
    assert (grad_x[0, 0], grad_x[0, -1], grad_x.sum()) == (6.0, 1.0, 7.0)
    assert (grad_y[0, 0], grad_y[0, -1], grad_y.sum()) == (2.0, 5.0, 7.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(7, 16), (100, 5)])
def test_agrees_with_pytorch(num_expert_sqrt, k, dtype, device):
    """Small whole numbers add up exactly in any order, so the fallback must return the very same."""
    grad, indices = problem(20, num_expert_sqrt, k, dtype, device)
    grad = torch.randint(-8, 9, grad.shape, device=device).to(dtype)
    for got, want in zip(
        backward(grad, indices, num_expert_sqrt), backward_router(grad, indices, num_expert_sqrt), strict=True
    ):
        assert torch.equal(got, want)


# The kernel for NVIDIA GPUs ------------------------------------------------------------------------------------------

GRAD, INDICES, GRAD_X, GRAD_Y, X, Y, SAVED = (i << 40 for i in range(1, 8))
FP32, FP16, BF16 = DTYPES
# dtype of the scores and of the logits, N, k, tokens, tile_k, tile_n: whole rows and pieces, the last one shorter;
# slots in one go and in several; fewer rows than lanes and as many.
PTX_CASES = [
    (BF16, BF16, 64, 16, 16, 16, 64),
    (BF16, BF16, 256, 16, 8, 16, 256),
    (FP16, FP16, 100, 5, 16, 8, 100),
    (FP32, FP32, 12, 40, 4, 16, 12),
    (FP32, BF16, 64, 40, 2, 16, 64),
    (FP32, FP32, 200, 31, 1, 32, 64),
    (BF16, BF16, 4, 1, 16, 4, 4),
    (BF16, BF16, 64, 16, 16, 16, 64, "softmax"),
    (FP32, BF16, 256, 5, 8, 8, 256, "log_softmax"),
    (FP16, FP16, 100, 5, 16, 8, 100, "softmax"),
    (FP32, FP32, 200, 31, 1, 32, 64, "softmax"),
    (FP32, FP32, 12, 40, 4, 16, 12, "topk"),
    (FP32, BF16, 64, 5, 8, 8, 64, "topk"),
]


def shared_plan(scores_dtype, dtype, num_expert_sqrt, k, tokens, tile_k, tile_n, normalize=None):
    plan = plan_of(num_expert_sqrt, k, dtype, scores_dtype, True, normalize)
    return dataclasses.replace(plan, tokens=tokens, tile_k=tile_k, tile_n=tile_n)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return [parse(*binary) for binary in compiled_by(__file__, tmp_path_factory.mktemp("cache"))]


RAW = [i for i, case in enumerate(PTX_CASES) if len(case) == 7]


@pytest.mark.parametrize("case", RAW, ids=["-".join(map(case_id, PTX_CASES[i])) for i in RAW])
def test_compiled_code(case, programs):
    """All tokens of a batch that ends inside a tile, in a wider tensor."""
    plan = shared_plan(*PTX_CASES[case])
    tokens, k = plan.tokens, plan.k
    grad, indices = problem(tokens + 1 + tokens // 2, plan.num_expert_sqrt, k, plan.scores_dtype, "cpu")
    grad[0, : k // 2] = torch.tensor([INF, -INF, NAN, -0.0, 1e-40]).to(grad.dtype).repeat(k)[: k // 2]
    outputs = torch.full((2, len(grad), plan.num_expert_sqrt), NAN, dtype=plan.dtype)
    wide = torch.full((len(grad), 2 * k), NAN, dtype=grad.dtype)
    wide[:, ::2] = grad
    tensors = {GRAD: wide, INDICES: indices, GRAD_X: outputs[0], GRAD_Y: outputs[1]}
    memory = {address: tensor.view(torch.uint8).numpy().reshape(-1) for address, tensor in tensors.items()}
    for program in range(plan.grid(len(grad))):
        run_program(programs[case], [*tensors, 2 * k, 2, len(grad)], memory, program_id=program)
    want = oracle_backward(grad.float(), indices, plan.num_expert_sqrt)
    assert_same_bits(outputs, [part.to(plan.dtype) for part in want])


def run_normalized(plan, program, grad, indices, wide):
    """The gradients of both factors, and those of autograd's own functions in fp64."""
    x, y = (torch.randn(len(grad), plan.num_expert_sqrt).mul(3).to(plan.dtype) for _ in range(2))
    x[1, 1:], y[2] = -INF, -INF  # masked, and one token altogether
    rows, columns = indices.long() // plan.num_expert_sqrt, indices.long() % plan.num_expert_sqrt
    leaves = [part.double().requires_grad_() for part in (x, y)]
    sums = leaves[0].gather(1, rows) + leaves[1].gather(1, columns)
    logs = sums - sum(leaf.logsumexp(1, keepdim=True) for leaf in leaves)
    scores = {"softmax": logs.exp(), "log_softmax": logs, "topk": sums.softmax(1)}[plan.normalize]
    alive = [token for token in range(len(grad)) if token != 2]
    want = torch.autograd.grad(scores[alive], leaves, grad[alive].double())
    largest = torch.stack((x, y), 1).float().amax(2)
    totals = (torch.stack((x, y), 1).float() - largest.nan_to_num(neginf=0.0)[..., None]).exp().sum(2)
    weights = scores.detach().float().nan_to_num(0.0) if plan.has_weights else torch.empty(0)
    if plan.normalize == "topk":
        weights[3] = NAN  # as of a poisoned token
    saved = torch.cat((torch.stack((largest, totals), 2).flatten(), weights.flatten()))
    outputs = torch.full((2, len(grad), plan.num_expert_sqrt), NAN, dtype=plan.dtype)
    tensors = {GRAD: wide, INDICES: indices, GRAD_X: outputs[0], GRAD_Y: outputs[1], X: x, Y: y, SAVED: saved}
    memory = {address: tensor.view(torch.uint8).numpy().reshape(-1) for address, tensor in tensors.items()}
    for number in range(plan.grid(len(grad))):
        run_program(program, [*tensors, 2 * plan.k, 2, len(grad)], memory, program_id=number)
    return outputs, [part.index_fill(0, torch.tensor(2), 0.0) for part in want], (rows, columns)


@pytest.mark.parametrize(
    "case", [i for i, case in enumerate(PTX_CASES) if len(case) > 7], ids=lambda i: PTX_CASES[i][-1]
)
def test_compiled_code_of_normalized_scores(case, programs):
    plan = shared_plan(*PTX_CASES[case])
    grad, indices = problem(plan.tokens + 3 + plan.tokens // 2, plan.num_expert_sqrt, plan.k, plan.scores_dtype, "cpu")
    wide = torch.full((len(grad), 2 * plan.k), NAN, dtype=grad.dtype)
    wide[:, ::2] = grad
    for got, right, chosen in zip(*run_normalized(plan, programs[case], grad, indices, wide), strict=True):
        if plan.normalize == "topk":
            right[3] = torch.zeros(plan.num_expert_sqrt).index_fill(0, chosen[3], NAN)
            assert torch.equal(got[3].isnan(), right[3].isnan())
            got, right = got.nan_to_num(0.0), right.nan_to_num(0.0)
        size = grad.double().abs().sum(1, keepdim=True)
        error = (got.double() - right).abs() - torch.finfo(plan.dtype).eps / 2 * right.abs()
        assert (error <= 3e-7 * size + torch.finfo(plan.dtype).tiny).all()


@pytest.mark.parametrize("num_expert_sqrt", [4, 64, 100, 256, 1024, 2048, 4096, 46340])
@pytest.mark.parametrize("k", [1, 16, 100])
def test_tiles_fit(num_expert_sqrt, k):
    """In shared memory, of which a kernel may declare 48 KiB, and in the lanes; a piece is of one row."""
    plan = plan_of(num_expert_sqrt, k, FP32, FP32, True)
    assert 2 * plan.tokens <= 32
    assert plan.tile_k % 4 == 0
    assert plan.tokens * plan.tile_k >= 32
    assert plan.tile_n == num_expert_sqrt or plan.tokens == 1
    assert 4 * (2 * plan.tokens * plan.tile_n + 3 * plan.tokens * (plan.tile_k + 4)) <= 28 << 10


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(7, 16), (100, 5), (4, 16)])
def test_fp32_gradients_of_other_logits(num_expert_sqrt, k, dtype, device):
    grad, indices = problem(10, num_expert_sqrt, k, torch.float32, device)
    want = [part.to(dtype) for part in oracle_backward(grad, indices, num_expert_sqrt)]
    assert_same_bits(backward(grad, indices, num_expert_sqrt, dtype), want)


if __name__ == "__main__":
    binaries = [compile_plan(shared_plan(*case), 80) for case in PTX_CASES]
    print(json.dumps([(binary.asm["ptx"], binary.metadata.shared) for binary in binaries]))
