"""Every kernel of the package compiles for every NVIDIA architecture, without a GPU, and keeps its small tiles in
registers. Compiling needs a process whose Triton is no interpreter, so this file runs itself as a program."""

import importlib
import json
import multiprocessing
import pkgutil
import re
import warnings

import pytest
import torch
import triton.language as tl
from cases import POINTERS, compile_for, compile_plan, compiled_by, cuobjdump, stack_of
from triton.runtime.jit import KernelInterface

import omni_kernels
from omni_kernels import backward, configs
from omni_kernels.factored import frontier, lanes, lists, replay, tile
from omni_kernels.factored.prefix import PrefixPlan

FP32, BF16 = torch.float32, torch.bfloat16
ARCHS = {80: ["bf16"], 86: ["bf16"], 89: ["bf16"], 90: ["bf16", "fp32"], 100: ["bf16"], 120: ["bf16"]}
DTYPES = {"bf16": BF16, "fp32": FP32}
MAX_STACK = 128  # bytes a thread may keep outside its registers

# module.kernel -> its constants, or how to make its plan, of the dtype of logits and scores and of whether the GPU
# compares doubles.
KERNELS = {
    "backward.dense_kernel": lambda dtype, _: backward.plan_of(4, 16, FP32, dtype, False),
    "backward.scatter_kernel": lambda dtype, _: backward.plan_of(256, 16, FP32, dtype, False),
    "backward.scatter_kernel of a softmax": lambda dtype, _: backward.plan_of(30, 16, FP32, dtype, False, "softmax"),
    "backward.shared_kernel of a softmax": lambda dtype, _: backward.plan_of(256, 16, FP32, dtype, True, "softmax"),
    "backward.shared_kernel": lambda dtype, _: backward.plan_of(256, 16, FP32, dtype, True),
    "candidates.experts_kernel": {"RANKS": 2, "K": 16, "KEY": tl.bfloat16, "TILE_M": 32, "TILE_K": 16},
    "candidates.matrices_kernel": {"RANKS": 2, "K": 16, "KEY": tl.bfloat16, "TILE": 1024},
    "forward.forward_kernel": {"TILE_M": 4, "TILE_N": 32},
    "frontier.frontier_kernel": lambda dtype, doubles: frontier.plan_of(256, 64, dtype, dtype, 16, doubles),
    "frontier.frontier_kernel in memory": lambda dtype, doubles: frontier.plan_of(256, 200, dtype, dtype, 16, doubles),
    "lanes.lanes_kernel": lambda dtype, doubles: plan_of_lanes(256, 8, dtype, doubles),
    "lanes.lanes_kernel of few tokens": lambda dtype, doubles: plan_of_lanes(256, 8, dtype, doubles, num_lanes=16),
    "lanes.lanes_kernel of an odd number of vectors": lambda dtype, doubles: plan_of_lanes(100, 8, dtype, doubles),
    "lanes.lanes_kernel in loops": lambda dtype, doubles: plan_of_lanes(256, 16, dtype, doubles),
    "lanes.lanes_kernel of transposed logits": lambda dtype, doubles: plan_of_lanes(256, 16, dtype, doubles, True),
    "lanes.lanes_kernel of a softmax": lambda dtype, doubles: plan_of_lanes(
        256, 16, dtype, doubles, normalize="softmax"
    ),
    "lists.lists_kernel": lambda dtype, doubles: lists.plan_of(2048, 16, dtype, 16, False, doubles),
    "original.backward_kernel": {"TILE_M": 64, "TILE_K": 16},
    "original.forward_kernel": {"TILE_M": 4, "TILE_N": 1024},
    "original.split_forward_kernel": {"TILE_M": 1, "TILE_N": 1024, "TILE_K": 16},
    "prefix.prefix_kernel": lambda dtype, _: PrefixPlan(0, 16, FP32, dtype, 4, 64, 16, "top_p"),
    "replay.replay_kernel": lambda dtype, _: replay.plan_of(256, 16, dtype, dtype, "softmax"),
    "row_sums.row_sums_kernel": {"TILE_N": 1024, "TILE_K": 16},
    "split_forward.split_forward_kernel": {"TILE_M": 2, "TILE_N": 1024, "TILE_K": 32, "PADDED_SQRT": 128},
    "tile.tile_kernel": lambda dtype, _: plan_of_tile(1000, 4, dtype),
    "tile.tile_kernel of one expert": lambda dtype, _: plan_of_tile(100, 1, dtype),
}


def plan_of_lanes(num_expert_sqrt, k, dtype, doubles, transposed=False, num_lanes=2, normalize=None):
    return lanes.plan_of(num_expert_sqrt, k, dtype, dtype, 16, transposed, doubles, num_lanes, normalize)


def plan_of_tile(num_expert_sqrt, k, dtype):
    logits = columns(num_expert_sqrt, dtype)
    return tile.plan_for(logits, logits, k, dtype)


def columns(number, dtype):
    return torch.empty((4, number), dtype=dtype, device="meta")


def package_kernels():
    """Every launchable kernel of the package, by name: those a jit function is called `..._kernel` for."""
    infos = pkgutil.walk_packages(omni_kernels.__path__, "omni_kernels.")
    modules = [importlib.import_module(info.name) for info in infos]
    return {
        f"{module.__name__.split('.')[-1]}.{name}": kernel
        for module in modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, KernelInterface) and name.endswith("_kernel") and kernel.fn.__module__ == module.__name__
    }


def cases():
    """Variants of a kernel differ little in what an architecture minds: they are compiled for the first and for one
    more, and those that normalize for one."""
    wanted = [
        (name, arch)
        for name in KERNELS
        for arch in ARCHS
        if arch == 90 or " " not in name or (arch == 80 and "softmax" not in name)
    ]
    return [(name, arch, dtype) for name, arch in wanted for dtype in ARCHS[arch]]


def compile_kernel(case):
    """(name, arch, dtype) -> what the binary was made for, the stack it takes beyond what the kernel asks for, and its
    copies to shared memory."""
    name, arch, dtype = case
    kernel = package_kernels()[name.split(" ")[0]]
    if callable(KERNELS[name]):
        plan = KERNELS[name](DTYPES[dtype], divmod(arch, 10) in configs.DOUBLES)
        assert plan.kernel is kernel
        binary = compile_plan(plan, arch)
    else:
        pointers = {arg: POINTERS[DTYPES[dtype]] for arg in kernel.arg_names if arg.endswith("_ptr")}
        pointers |= {"indices_ptr": "*i32", "grad_x_ptr": "*fp32", "grad_y_ptr": "*fp32", "which_ptr": "*i64"}
        pointers |= dict.fromkeys(("keys_ptr", "places_ptr", "experts_ptr"), "*i32")
        binary = compile_for(arch, kernel, pointers, KERNELS[name])
    stack = stack_of(binary) - sum(map(int, re.findall(r"private\[(\d+)\]", binary.asm["ptx"])))
    copies = re.findall(r"LDGSTS[^;]*", cuobjdump(binary, "-sass"))
    return case, re.search(r"\.target (\w+)", binary.asm["ptx"])[1], stack, copies


def test_every_kernel_is_listed():
    assert set(package_kernels()) == {name.split(" ")[0] for name in KERNELS}


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """What `python test_compile.py` found, as `compile_kernel` returns it for every case."""
    return compiled_by(__file__, tmp_path_factory.mktemp("cache"))


def test_every_kernel_compiles_for_every_architecture(binaries):
    compiled = {(name, arch, dtype) for (name, arch, dtype), *_ in binaries}
    assert compiled == set(cases())
    for (name, arch, dtype), target, stack, _ in binaries:
        assert target.rstrip("a") == f"sm_{arch}"
        assert stack <= MAX_STACK, f"{name} spills on sm{arch} in {dtype}"


def test_no_copy_adds_a_shared_register_to_its_address(binaries):
    """The assembler of Triton 3.6 makes an illegal instruction of one that also has a cache policy."""
    copies = [copy for (name, *_), _, _, copies in binaries if "odd number" in name for copy in copies]
    assert copies
    assert not [copy for copy in copies if "+UR" in copy]


if __name__ == "__main__":
    warnings.simplefilter("error")  # nobody wants to read them in a notebook
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 tells everyone
    with multiprocessing.Pool() as pool:
        print(json.dumps(pool.map(compile_kernel, cases(), chunksize=1)))
