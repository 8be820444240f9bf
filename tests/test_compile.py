"""Every kernel of the package compiles for every NVIDIA architecture, without a GPU, and keeps its small tiles in
registers. Compiling needs a process whose Triton is no interpreter, so this file runs itself as a program."""

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile

import pytest
import triton
from triton.backends.compiler import GPUTarget

import omni_kernels

ARCHS = {80: ["bf16"], 86: ["bf16"], 89: ["bf16"], 90: ["bf16", "fp32"], 100: ["bf16"], 120: ["bf16"]}
MAX_STACK = 128  # bytes a thread may keep outside its registers

# module.kernel -> its constexpr arguments, by dtype where it matters. Runtime arguments are typed by their names.
KERNELS = {
    "backward.dense_kernel": {"TILE_M": 16, "TILE_N": 16},
    "backward.scatter_kernel": {"TILE_M": 16, "TILE_K": 16, "TILE_N": 64},
    "backward.shared_kernel": {"NUM_EXPERT_SQRT": 256, "TILE_M": 8, "TILE_K": 16, "TILE_N": 256},
    "factored.factored_kernel": {
        "K": 4,
        "TILE_M": 1,
        "TILE_N": 64,
        "TILE_K": 4,
        "CHUNK": 4,
        "INDEX_BITS": {"bf16": 16, "fp32": 32},
        "STREAMED": True,
        "NUM_CANDIDATES": 8,
        "SIDE": 2,
    },
    "forward.forward_kernel": {"TILE_M": 4, "TILE_N": 32},
    "original.backward_kernel": {"TILE_M": 64, "TILE_K": 16},
    "original.forward_kernel": {"TILE_M": 4, "TILE_N": 1024},
    "original.split_forward_kernel": {"TILE_M": 1, "TILE_N": 1024, "TILE_K": 16},
    "row_per_thread.row_per_thread_kernel": {
        "NUM_EXPERT_SQRT": 128,
        "K": 8,
        "TILE_M": 32,
        "TILE_N": 64,
        "GROUP": 8,
        "CHUNK": 4,
        "VECTOR": 16,
        "INDEX_BITS": {"bf16": 16, "fp32": 32},
        "ROW_BITS": 13,
        "NVIDIA": True,
        "FP64": True,
    },
    "split_forward.split_forward_kernel": {"TILE_M": 2, "TILE_N": 1024, "TILE_K": 16, "PADDED_SQRT": 128},
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


def compile_kernel(case):
    """(name, arch, dtype) -> what the binary was made for, and the stack it takes."""
    name, arch, dtype = case
    kernel = package_kernels()[name]
    constexprs = {arg: value[dtype] if isinstance(value, dict) else value for arg, value in KERNELS[name].items()}
    signature = {arg: "constexpr" if arg in constexprs else argument_type(arg, dtype) for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": 1 if any(part in name for part in ("factored", "row_per_thread", "shared")) else 4},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return case, re.search(r"\.target (\w+)", binary.asm["ptx"])[1], int(re.search(r"STACK:(\d+)", usage)[1])


def test_every_kernel_is_listed():
    assert sorted(package_kernels()) == sorted(KERNELS)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """What `python test_compile.py` found, as `compile_kernel` returns it for every case."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_architecture(binaries):
    compiled = {(name, arch, dtype) for (name, arch, dtype), _, _ in binaries}
    assert compiled == set(cases())
    for (name, arch, dtype), target, stack in binaries:
        assert target.rstrip("a") == f"sm_{arch}"
        assert stack <= MAX_STACK, f"{name} spills on sm{arch} in {dtype}"


if __name__ == "__main__":
    with multiprocessing.Pool() as pool:
        print(json.dumps(pool.map(compile_kernel, cases(), chunksize=1)))
