"""The code NVIDIA GPUs run for row_per_thread.py, run on the CPU: see ptx.py. Compiling needs a process whose Triton is
no interpreter, so this file runs itself as a program."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from cases import NAN, adversarial_logits, assert_same_bits
from ptx import parse, run_warp
from triton.backends.compiler import GPUTarget

from omni_kernels import factored_router
from omni_kernels.keys import INDEX_BITS
from omni_kernels.row_per_thread import row_per_thread_kernel

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
X, Y, SCORES, INDICES = (i << 40 for i in range(1, 5))
# dtype, N, k, TILE_N, CHUNK, whether 64-bit keys order as doubles: each way to read a row and to order keys.
CASES = [
    ("bf16", 64, 16, 64, 1, True),
    ("bf16", 128, 8, 128, 4, False),
    ("bf16", 128, 5, 64, 4, True),
    ("fp16", 64, 10, 64, 2, True),
    ("fp32", 64, 5, 32, 2, True),
    ("fp32", 64, 5, 32, 2, False),
    ("bf16", 33, 5, 0, 1, True),
]


def compile_case(dtype, num_expert_sqrt, k, tile_n, chunk, fp64):
    """The PTX for contiguous logits."""
    constexprs = {
        "stride_xn": 1, "stride_yn": 1, "NUM_EXPERT_SQRT": num_expert_sqrt, "K": k, "TILE_M": 32, "TILE_N": tile_n,
        "GROUP": max(8, triton.next_power_of_2(k)), "CHUNK": chunk, "VECTOR": 16,
        "INDEX_BITS": INDEX_BITS[TYPES[dtype]], "ROW_BITS": 13, "NVIDIA": True, "FP64": fp64,
    }  # fmt: skip
    types = {"indices_ptr": "*i32"} | dict.fromkeys(("x_ptr", "y_ptr", "scores_ptr"), f"*{dtype}")
    names = row_per_thread_kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in names}
    source = triton.compiler.ASTSource(fn=row_per_thread_kernel, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [parse(ptx) for ptx in json.loads(run.stdout)]


def run_kernel(program, x, y, k, tokens_per_warp=32):
    """Scores and indices of all tokens."""
    scores, indices = torch.full((len(x), k), NAN, dtype=x.dtype), torch.full((len(x), k), -1, dtype=torch.int32)
    tensors = {X: x, Y: y, SCORES: scores, INDICES: indices}
    memory = {address: tensor.view(torch.uint8).numpy().reshape(-1) for address, tensor in tensors.items()}
    for program_id in range(triton.cdiv(len(x), tokens_per_warp)):
        run_warp(program, [*tensors, x.stride(0), y.stride(0), len(x)], memory, program_id=program_id)
    return scores, indices


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_every_kind_of_token(case, programs):
    dtype, num_expert_sqrt, k, *_ = CASES[case]
    x, y = adversarial_logits(num_expert_sqrt, TYPES[dtype], repeats=4)
    assert len(x) % 32 != 0, "these tokens do not test a warp that is not full"
    assert_same_bits(run_kernel(programs[case], x, y, k), factored_router(x, y, k))


if __name__ == "__main__":
    print(json.dumps([compile_case(*case) for case in CASES]))
