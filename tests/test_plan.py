"""Plans: what they are to people, to Python and to Triton. Then launches by them, again and again, on GPUs."""

import copy
import dataclasses
import itertools
import json
import pickle
import threading

import pytest
import torch
import triton
from cases import (
    DTYPES,
    NEEDS_INTERPRETER,
    NO_GPU,
    ON_GPU,
    ON_NVIDIA,
    assert_same_bits,
    mixed_layouts,
    oracle_backward,
    run_python,
)

from omni_kernels import backward, explain, factored, factored_router, omni_router
from omni_kernels.factored import frontier, lanes, tile
from omni_kernels.factored import plan as plan_module

FP32, FP16, BF16 = DTYPES


def logits(num_tokens=5, num_expert_sqrt=64, dtype=BF16, device="cpu"):
    return torch.randn(2, num_tokens, num_expert_sqrt, device=device).to(dtype).unbind()


def lanes_plan(dtype, num_lanes, **fields):
    """As it is where kernels are compiled."""
    plan = lanes.plan_of(256, 16, dtype, dtype, 16, False, True, num_lanes)
    return dataclasses.replace(plan, vector=16, ptx=True, **fields)


PLANS = [
    lanes_plan(BF16, 2, tile_n=256, staged=True, num_warps=2),
    lanes_plan(FP32, 16, tile_n=32, staged=False, num_warps=1),
    frontier.plan_of(256, 64, FP16, FP32, 16, True),
    tile.plan_for(*logits(5, 256, FP16), 4, FP16),
    factored.PyTorchPlan(256, 300, FP32, FP32, num_warps=0),
    backward.plan_of(256, 16, BF16, FP32, True),
    backward.plan_of(256, 16, BF16, BF16, False),
    backward.plan_of(8, 16, FP32, FP32, False),
]
ALL_PLANS = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)


def changed(plan):
    """Plans that differ from this one in a field each."""
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if value is None:
            values = {"softmax"}
        elif isinstance(value, torch.dtype):
            values = {*DTYPES} - {value}
        else:
            values = {not value} if isinstance(value, bool) else {value * 2 or 1}  # strings double, too
        for other in values:
            yield dataclasses.replace(plan, **{field.name: other})


# Values -------------------------------------------------------------------------------------------------------------


@ALL_PLANS
def test_a_plan_is_a_value(plan):
    for same in (dataclasses.replace(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert same is not plan
        assert type(same) is type(plan)
        assert same == plan
        assert hash(same) == hash(plan)
        assert same.kernel is plan.kernel
        assert str(same) == str(plan)
        assert json.dumps(same) == json.dumps(plan)
        assert (same.cache_key, f"{same}") == (plan.cache_key, f"{plan}")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.k = 3


def test_different_plans_differ_for_triton():
    """Triton tells kernels apart by this key on disk, and by what their constants print as for developers in memory."""
    plans = [*PLANS, *(other for plan in PLANS for other in changed(plan))]
    for plan, other in itertools.combinations(set(plans), 2):
        assert plan != other
        assert plan.cache_key != other.cache_key
        assert repr(plan) != repr(other)
    assert len(set(plans)) > 5 * len(PLANS)


@ALL_PLANS
def test_a_plan_is_json(plan):
    """Of all its fields, as Triton writes the constants of a kernel for compile hooks."""
    read = json.loads(json.dumps({"PLAN": plan}))["PLAN"]
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    assert read == {name: str(value) if isinstance(value, torch.dtype) else value for name, value in fields.items()}


# A process whose Triton thinks that it has an H100, and compiles without launching.
COMPILE_WITH_HOOKS = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from omni_kernels import backward
from omni_kernels.configs import compiled
from omni_kernels.factored import frontier, lanes, tile
from omni_kernels.factored import plan as plan_module

class Driver:
    launcher_cls = staticmethod(lambda source, metadata: kinds.append(list(source.signature.values())))
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

seen, kinds = [], []
triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = lambda **info: seen.append(
    (info["fn"].name, json.loads(info["compile"]["specialization_data"])["constant_vals"])
)
x, scores = torch.zeros(4, 8).half(), torch.zeros(4, 3).half()
indices = scores.int()
for plan, args in (
    (lanes.plan_of(8, 3, x.dtype, x.dtype, 16, False, True, 2), (x, x, scores, indices, None, 8, 1, 8, 1, 4)),
    (tile.plan_for(x, x, 3, x.dtype), (x, x, scores, indices, None, 8, 2, 1, 1 << 31, 1)),
    (backward.plan_of(8, 3, x.dtype, x.dtype, False), (scores, indices, x, x, None, None, None, 3, 1, 4)),
):
    binary = compiled(plan.kernel, *args, PLAN=plan, num_warps=plan.num_warps)
    launched_with = ["*i8" if kind[0] == "*" else kind for kind in binary.src.signature.values()]
    assert kinds.pop() == launched_with, (kinds, launched_with)
    name, constants = seen.pop()
    assert not seen and name.endswith(plan.kernel.__name__) and json.loads(json.dumps(plan)) in constants, seen
    compiled(plan.kernel, *args, PLAN=plan, num_warps=plan.num_warps)
    assert not seen
    print(plan.kernel.__name__)
"""


def test_compile_hooks_are_told_the_plan(tmp_path):
    """And Triton's launcher is built for the arguments that the kernel gets."""
    names = run_python("-c", COMPILE_WITH_HOOKS, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert names == ["lanes_kernel", "tile_kernel", "scatter_kernel"]


# What people read ---------------------------------------------------------------------------------------------------


@ALL_PLANS
def test_a_plan_reads_as_a_paragraph(plan):
    """The kernel and why, the problem, and the bytes to move."""
    text, is_gradient = str(plan), isinstance(plan, backward.GradientPlan)
    logits_bytes, results_bytes = (
        2 * plan.num_expert_sqrt * plan.dtype.itemsize,
        plan.k * (4 + plan.scores_dtype.itemsize),
    )
    reads, writes = (results_bytes, logits_bytes) if is_gradient else (logits_bytes, results_bytes)
    assert text.startswith(plan.kernel.fn.__name__ + ", " if plan.kernel else "PyTorch")
    assert "since" in text or plan.kernel is tile.tile_kernel
    assert (
        f"{plan.num_expert_sqrt} logits a factor in {str(plan.dtype).removeprefix('torch.')}, {plan.k} experts" in text
    )
    assert f"a token reads {reads} bytes and writes {writes}." in text
    assert text.count("\n") == 0
    assert text.endswith(".")
    assert f"{plan}" == text
    assert not set("{}()=[]") & set(text), "that is code"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            PLANS[0],
            ["2 lanes a token", "many tokens", "32 tokens and 2 warps", "256 columns", "16 bytes", "shared memory"],
        ),
        (PLANS[1], ["16 lanes a token", "few tokens", "2 tokens and 1 warp ", "global memory"]),
        (dataclasses.replace(PLANS[0], tile_n=0), ["one by one"]),
        (dataclasses.replace(PLANS[0], transposed=True), ["by columns"]),
        (PLANS[2], ["2 lanes a token", "16 tokens and 1 warp", "16 bytes a load", "64 columns", "registers"]),
        (PLANS[3], ["wherever Triton does", "tiles of 256 columns", "chunks of 4"]),
        (PLANS[5], ["whole vectors", "8 rows of each factor", "shared memory"]),
        (PLANS[6], ["longer than k", "32 tokens a program"]),
        (PLANS[7], ["no longer than k", "32 tokens a program"]),
    ],
    ids=str,
)
def test_a_plan_says_how(plan, words):
    assert [word for word in words if word not in str(plan)] == []


def test_explain_is_what_the_router_does(device):
    """The plan of `explain` routes as `omni_router` does."""
    for num_tokens, num_expert_sqrt, k in ((3, 40, 5), (3, 9, 65), *([(3, 40, 33)] if ON_GPU else [])):
        x, y = logits(num_tokens, num_expert_sqrt, FP32, device)
        for scores_dtype in (None, FP16):
            plan = explain(x, y, k, scores_dtype)
            assert (plan.num_expert_sqrt, plan.k, plan.dtype) == (num_expert_sqrt, k, FP32)
            assert plan.scores_dtype == (scores_dtype or FP32)
            assert_same_bits(factored.run(plan, x, y), omni_router(x, y, k, scores_dtype))


# Launches on a GPU that is not there ---------------------------------------------------------------------------------


class Binary:
    """What Triton would compile: it notes how it is launched."""

    function, packed_metadata = "function", "packed"

    def __init__(self):
        self.launches, self.run = [], lambda *args: self.launches.append(args)

    def launch_metadata(self, grid, stream, *args):
        return grid, stream


@pytest.fixture
def stand_in(monkeypatch):
    """A launch on GPU 0, its binary, what Triton's own way of launching is asked for, and the tensors to launch on."""
    binary, others = Binary(), []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    monkeypatch.setattr(plan_module, "compiled", lambda *_, **__: binary)
    monkeypatch.setattr(plan_module, "launch", lambda *args: others.append(args))
    return plan_module.Launch(PLANS[0], 0), binary, others, [torch.zeros(4) for _ in range(4)]


def test_a_launch_says_what_triton_would(stand_in):
    launch, binary, others, tensors = stand_in
    for num_tokens, grid in ((600, 19), (32, 1), (33, 2)):
        launch((*tensors, None), 1, 2, 3, 4, num_tokens)
        addresses = [tensor.data_ptr() for tensor in tensors]
        want = (
            grid,
            1,
            1,
            70,
            "function",
            "packed",
            None,
            None,
            None,
            *addresses,
            None,
            1,
            2,
            3,
            4,
            num_tokens,
            PLANS[0],
        )
        assert binary.launches.pop() == want
    assert (binary.launches, others) == ([], [])


def test_a_launch_hook_is_told_of_a_launch(stand_in):
    launch, binary, _, tensors = stand_in
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        launch(tensors, 33)
    finally:
        hooks.remove(print)
    assert binary.launches[0][6:9] == (((2, 1, 1), 70), hooks, triton.knobs.runtime.launch_exit_hook)


def test_who_wants_another_launch_gets_tritons_own(stand_in, monkeypatch):
    """Whoever debugs, runs before a kernel, or keeps it from compiling."""
    launch, binary, others, tensors = stand_in
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        launch(tensors, 33)
    launch._hooks = [print]
    launch(tensors, 33)
    launch._hooks = []
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "compiled", lambda *_, **__: None)
        launch(tensors, 33)
    assert others == [(PLANS[0], *tensors, 33)] * 3
    assert binary.launches == []
    launch(tensors, 33)
    assert len(binary.launches) == 1


# Launches -----------------------------------------------------------------------------------------------------------

NEEDS_NVIDIA = pytest.mark.skipif(not ON_NVIDIA, reason="needs an NVIDIA GPU from Ampere on")
BOTH_KERNELS = pytest.mark.parametrize(("num_expert_sqrt", "k"), [(64, 16), (64, 40)])


@pytest.fixture
def nothing_known(monkeypatch):
    """Every problem's next call is its first."""
    for module in (factored, backward):
        monkeypatch.setattr(module, "_launches", type(module._launches)())


def wait_for_compilation():
    """What compiles in the background."""
    [thread.join() for thread in threading.enumerate() if thread.name == "omni_kernels compile"]


def assert_routed(x, y, k=16):
    """Forward, and backward."""
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    scores, indices = omni_router(*leaves, k)
    assert_same_bits((scores.detach(), indices), factored_router(x, y, k))
    grad = torch.randn_like(scores)
    assert_same_bits(torch.autograd.grad(scores, leaves, grad), oracle_backward(grad, indices, x.shape[1]))


@NEEDS_NVIDIA
@BOTH_KERNELS
def test_a_launch_hook_sees_every_call(num_expert_sqrt, k):
    x, y = logits(300, num_expert_sqrt, device="cuda")
    assert_routed(x, y, k)
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    names = []

    def enter(metadata):
        names.append(metadata.get()["name"])

    def leave(metadata):
        names.append("done")

    hooks[0].add(enter), hooks[1].add(leave)
    try:
        for _ in range(2):
            names.clear()
            assert_routed(x, y, k)
            assert names == ["lanes_kernel" if k <= 32 else "frontier_kernel", "done", "shared_kernel", "done"]
    finally:
        hooks[0].remove(enter), hooks[1].remove(leave)


@NEEDS_NVIDIA
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("nothing_known")
def test_another_gpu_is_the_current_one():
    first, second = (logits(300, device=f"cuda:{i}") for i in range(2))
    for _ in range(3):
        for current, (x, y) in itertools.product(range(2), (first, second)):
            with torch.cuda.device(current):
                assert_routed(x, y)
                assert torch.cuda.current_device() == current


@NEEDS_NVIDIA
@BOTH_KERNELS
def test_a_side_stream(num_expert_sqrt, k):
    """What it is told to wait for has not happened yet when the kernel is launched."""
    x, y = logits(300, num_expert_sqrt, device="cuda")
    new_x, new_y = logits(300, num_expert_sqrt, device="cuda")
    want = factored_router(new_x, new_y, k)
    omni_router(x, y, k)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles
        x.copy_(new_x), y.copy_(new_y)
        got = omni_router(x, y, k)
        torch.cuda.current_stream().synchronize()
    assert_same_bits(got, want)


@NEEDS_NVIDIA
@pytest.mark.usefixtures("nothing_known")
@BOTH_KERNELS
def test_new_strides_and_alignment(num_expert_sqrt, k):
    x, y = logits(304, num_expert_sqrt, device="cuda")
    for _ in range(2):
        assert_routed(x, y, k)
        for view_x, view_y in mixed_layouts(x, y):
            assert_routed(view_x, view_y, k)
        wide = torch.randn(2, 304, num_expert_sqrt + 16, device="cuda").bfloat16()
        for offset in (0, 1, 2, 4, 8):
            assert_routed(*wide[:, :, offset : offset + num_expert_sqrt], k)
            assert_routed(x, wide[1, :, offset : offset + num_expert_sqrt], k)
        columns_x, columns_y = (part.t().contiguous().t() for part in (x, y))
        for num_tokens in (304, 303, 296):
            assert_routed(columns_x[:num_tokens], columns_y[:num_tokens], k)


@NEEDS_NVIDIA
@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("order", [1, -1])
@BOTH_KERNELS
def test_few_tokens_and_many(num_expert_sqrt, k, order):
    most_few = lanes.most_few_tokens(num_expert_sqrt, torch.device("cuda"))
    for num_tokens in [1, 2, most_few, most_few + 1, 10 * most_few][::order]:
        assert_routed(*logits(num_tokens, num_expert_sqrt, device="cuda"), k)


@NEEDS_NVIDIA
def test_signs_that_pytorch_has_put_off():
    """The imaginary part of a conjugate is a view of other numbers, marked as negative."""
    x, y = logits(300, dtype=FP32, device="cuda")
    marked = torch.complex(x, -x).conj().imag  # x
    assert marked.is_neg()
    for _ in range(2):
        assert_same_bits(omni_router(marked, y, 16), factored_router(x, y, 16))
        assert_same_bits(omni_router(y, marked, 16), factored_router(y, x, 16))
        scores, indices = omni_router(x.requires_grad_(), y, 16)
        grad = torch.randn_like(scores)
        (got,) = torch.autograd.grad(scores, x, torch.complex(grad, -grad).conj().imag)
        assert_same_bits([got], oracle_backward(grad, indices, 64)[:1])
        x = x.detach()


@NEEDS_NVIDIA
@pytest.mark.usefixtures("nothing_known")
def test_threads_call_at_once():
    """First calls included: of one problem, and of several."""
    problems = [(*logits(num_tokens, n, device="cuda"), k) for num_tokens in (7, 9000) for n, k in ((64, 5), (52, 33))]
    start, failures = threading.Barrier(8), []

    def call(number):
        start.wait()
        try:
            for i in range(20):
                assert_routed(*problems[(number + i) % len(problems)])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []


@NEEDS_NVIDIA
@pytest.mark.usefixtures("nothing_known")
@BOTH_KERNELS
def test_a_second_call_compiles_nothing(num_expert_sqrt, k, monkeypatch):
    """Whatever the number of tokens."""
    assert_routed(*logits(300, num_expert_sqrt, device="cuda"), k)
    wait_for_compilation()

    def fail(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr("triton.compiler.compile", fail)
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", fail)
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", fail)  # what looks for a binary
    for num_tokens in (300, 1, 2, 65, 1024, 5000, 70000):
        assert_routed(*logits(num_tokens, num_expert_sqrt, device="cuda"), k)


@pytest.mark.skipif(not ON_GPU, reason="measures the memory of a GPU")
@BOTH_KERNELS
def test_memory_is_that_of_the_outputs(num_expert_sqrt, k):
    x, y = logits(1 << 17, num_expert_sqrt, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = factored.factored_forward(x, y, k)
    outputs = sum(part.nbytes for part in results)
    assert torch.cuda.max_memory_allocated() - before <= outputs + (1 << 20)


FORK = """
import os, torch
from omni_kernels import explain, factored_router, omni_router
x, y = torch.randn(2, 5, 8)
child = os.fork()
assert all(map(torch.equal, omni_router(x, y, 4), factored_router(x, y, 4)))
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(explain(x, y, 4))
"""


@pytest.mark.parametrize(
    ("interpret", "router"), [("0", "PyTorch"), pytest.param("1", "lanes_kernel", marks=NEEDS_INTERPRETER)]
)
def test_a_forked_child_routes_on_the_cpu(interpret, router):
    """With Triton's interpreter and without; `explain` knows."""
    assert run_python("-c", FORK, TRITON_INTERPRET=interpret, **NO_GPU).startswith(router)
