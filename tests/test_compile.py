"""Every kernel of the package compiles for every NVIDIA architecture, without a GPU, and keeps its small tiles in
registers. Compiling needs a process whose Triton is no interpreter, so this file runs itself as a program."""

import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
import warnings

import pytest
import torch
import triton
from cases import compiled_by
from triton.backends.compiler import GPUTarget

import omni_kernels
from omni_kernels import configs, factored, frontier, lanes

ARCHS = {80: ["bf16"], 86: ["bf16"], 89: ["bf16"], 90: ["bf16", "fp32"], 100: ["bf16"], 120: ["bf16"]}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_STACK = 128  # bytes a thread may keep outside its registers

# module.kernel -> its constexpr arguments, by dtype where it matters, and the warps if not 4; of kernels whose launcher
# computes them, (N, k, ...) that it computes them from. Runtime arguments are typed by their names.
KERNELS = {
    "backward.dense_kernel": {"TILE_M": 16, "TILE_N": 16},
    "backward.scatter_kernel": {"TILE_M": 16, "TILE_K": 16, "TILE_N": 64},
    "backward.shared_kernel": {"NUM_EXPERT_SQRT": 256, "TILE_M": 8, "TILE_K": 16, "TILE_N": 256, "num_warps": 1},
    "factored.factored_kernel": {
        "K": 4,
        "TILE_M": 1,
        "TILE_N": 64,
        "TILE_K": 4,
        "CHUNK": 4,
        "WIDE_KEYS": False,
        "STREAMED": True,
        "NUM_CANDIDATES": 8,
        "SIDE": 2,
        "num_warps": 1,
    },
    "factored.factored_kernel of one expert": (100, 1),
    "forward.forward_kernel": {"TILE_M": 4, "TILE_N": 32},
    "frontier.frontier_kernel": (256, 64),
    "frontier.frontier_kernel in memory": (256, 200),
    "lanes.lanes_kernel": (256, 8, False, 2),
    "lanes.lanes_kernel of few tokens": (256, 8, False, 16),
    "lanes.lanes_kernel of an odd number of vectors": (100, 8, False, 2),
    "lanes.lanes_kernel in loops": (256, 16, False, 2),
    "lanes.lanes_kernel of transposed logits": (256, 16, True, 2),
    "original.backward_kernel": {"TILE_M": 64, "TILE_K": 16},
    "original.forward_kernel": {"TILE_M": 4, "TILE_N": 1024},
    "original.split_forward_kernel": {"TILE_M": 1, "TILE_N": 1024, "TILE_K": 16},
    "split_forward.split_forward_kernel": {"TILE_M": 2, "TILE_N": 1024, "TILE_K": 32, "PADDED_SQRT": 128},
}


def package_kernels():
    """Every launchable kernel of the package, by name: those a jit function is called `..._kernel` for."""
    modules = [
        importlib.import_module(f"omni_kernels.{info.name}") for info in pkgutil.iter_modules(omni_kernels.__path__)
    ]
    return {
        f"{module.__name__.split('.')[-1]}.{name}": kernel
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__
    }


def cases():
    return [(name, arch, dtype) for name in KERNELS for arch, dtypes in ARCHS.items() for dtype in dtypes]


def argument_type(name, dtype):
    if name == "indices_ptr":
        return "*i32"
    if name in ("grad_x_ptr", "grad_y_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def launched_constants(name, num_expert_sqrt, k, *of_lanes, arch, dtype):
    """The constants that a kernel's launcher computes."""
    problem = num_expert_sqrt, k, DTYPES[dtype], 16, (arch // 10, arch % 10) in configs.DOUBLES
    if name == "frontier":
        return frontier.kernel_constants(*problem)
    if name == "lanes":
        return lanes.kernel_constants(*problem, *of_lanes)
    return factored.kernel_constants(4, num_expert_sqrt, k)


def compile_kernel(case):
    """(name, arch, dtype) -> what the binary was made for, the stack it takes beyond what the kernel asks for, and its
    copies to shared memory."""
    name, arch, dtype = case
    kernel = package_kernels()[name.split(" ")[0]]
    constants = KERNELS[name]
    if isinstance(constants, tuple):
        constants = launched_constants(name.split(".")[0], *constants, arch=arch, dtype=dtype)
    constexprs = {arg: value[dtype] if isinstance(value, dict) else value for arg, value in constants.items()}
    options = {name: constexprs.pop(name) for name in ("num_warps", *configs.OPTIONS) if name in constexprs}
    signature = {arg: "constexpr" if arg in constexprs else argument_type(arg, dtype) for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    stack = int(re.search(r"STACK:(\d+)", usage)[1]) - sum(map(int, re.findall(r"private\[(\d+)\]", binary.asm["ptx"])))
    return case, re.search(r"\.target (\w+)", binary.asm["ptx"])[1], stack, re.findall(r"LDGSTS[^;]*", code)


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
