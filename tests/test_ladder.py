"""The rungs of notebooks/ladder: each stands alone, routes as the definition does, and compiles without spilling.

Compiling needs a process whose Triton is no interpreter, so this file runs itself as a program.
"""

import ast
import importlib
import json
import pathlib
import re
import sys
import warnings
from unittest import mock

import pytest
import torch
import triton
from cases import (
    DTYPES,
    NEEDS_INTERPRETER,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    case_id,
    compiled_by,
    is_poisoned,
    oracle_backward,
    stack_of,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
FILES = sorted((NOTEBOOKS / "ladder").glob("*.py"))
RUNGS = [path.stem for path in FILES if path.stem.startswith("rung")]
BACKWARD = [path.stem for path in FILES if path.stem.startswith("backward")]


def module(name):
    return importlib.import_module(f"ladder.{name}")


def test_rungs_are_listed_in_order():
    assert [name.split("_")[0] for name in RUNGS] == [f"rung{number}" for number in range(1, 7)]
    assert [name.split("_")[0] for name in BACKWARD] == ["backward1", "backward2"]
    assert len(RUNGS) + len(BACKWARD) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_a_kernel_and_its_wrapper(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert 30 <= len(text.splitlines()) <= 120
    for topic in ("by arithmetic: ", "Who owns what: "):
        assert topic in ast.get_docstring(tree).replace("\n", " ")

    rest, wrapper = tree.body[1:-1], tree.body[-1]
    imports = [node for node in rest if isinstance(node, ast.Import)]
    assert {alias.name.split(".")[0] for node in imports for alias in node.names} == {"torch", "triton"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    kernels = [node for node in rest if isinstance(node, ast.FunctionDef)]
    assert {ast.unparse(decorator) for node in kernels for decorator in node.decorator_list} == {"triton.jit"}
    assert [node.name for node in kernels if node.name.endswith("_kernel")]
    constants = [node for node in rest if isinstance(node, ast.Assign)]
    assert len(imports) + len(kernels) + len(constants) == len(rest)
    names = ("route", ["x", "y", "k"]), ("gradient", ["grad_scores", "experts", "N"])
    assert (wrapper.name, [arg.arg for arg in wrapper.args.args]) == names[path.stem in BACKWARD]


# All experts of a row shorter than k, an odd row, a long one, many experts: every step-th kind of token of each dtype.
SIZES = [(3, 9, 3, DTYPES), (10, 6, 9, DTYPES), (40, 3, 15, DTYPES), (9, 64, 15, (torch.float16,))]


@NEEDS_INTERPRETER
@pytest.mark.parametrize("num_expert_sqrt, k, step, dtypes", SIZES, ids=case_id)
@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_routes(name, num_expert_sqrt, k, step, dtypes, device):
    for first, dtype in enumerate(dtypes):
        x, y = adversarial_logits(num_expert_sqrt, dtype, device)
        finite = ~is_poisoned(x, y)
        x, y = (logits[finite][first::step] for logits in (x, y))
        assert_routes(x, y, k, *module(name).route(x, y, k))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_takes_any_strides(name, device):
    x, y = (torch.randn(5, 3, device=device).t() for _ in range(2))
    assert_routes(x, y, 2, *module(name).route(x, y, 2))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("num_tokens, num_expert_sqrt, k", [(40, 3, 9), (3, 300, 5), (2, 8, 64)])
@pytest.mark.parametrize("name", BACKWARD)
def test_a_gradient_is_the_loops(name, num_tokens, num_expert_sqrt, k, dtype, device):
    """Atomics may add in another order, so they get numbers whose sums are exact."""
    generator = torch.Generator().manual_seed(k)
    experts = torch.rand((num_tokens, num_expert_sqrt**2), generator=generator).argsort(1)[:, :k].int().to(device)
    grad = torch.randn((num_tokens, k), generator=generator)
    if "atomics" in name:
        grad = (4 * grad).round()
    grad = grad.to(dtype).to(device)
    assert_same_bits(
        module(name).gradient(grad, experts, num_expert_sqrt), oracle_backward(grad, experts, num_expert_sqrt)
    )


def launches(function, *args):
    """What a call launches, none of which runs: kernels, their arguments by name, and options."""
    found = []

    def note(kernel, *args, grid, warmup, **kwargs):
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        found.append((kernel, named, {key: named.pop(key) for key in set(named) - set(kernel.arg_names)}))

    with mock.patch.object(JITFunction, "run", note):
        function(*args)
    return {kernel: (named, options) for kernel, named, options in found}


def compile_rung(name, num_expert_sqrt, k, dtype, arch):
    """Each kernel of a rung, compiled as a launch would: what the binary was made for, and the stack that it takes."""
    grad, experts = torch.zeros((64, k), dtype=dtype), torch.zeros((64, k), dtype=torch.int32)
    logits = torch.zeros((64, num_expert_sqrt), dtype=dtype)
    if name in BACKWARD:
        found = launches(module(name).gradient, grad, experts, num_expert_sqrt)
    else:
        found = launches(module(name).route, logits, logits, k)
    for kernel, (named, options) in found.items():
        constants = {param.name: named[param.name] for param in kernel.params if param.is_constexpr}
        signature = {key: "constexpr" if key in constants else mangle_type(named[key]) for key in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if key.endswith("_ptr")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        yield name, re.search(r"\.target (\w+)", binary.asm["ptx"])[1], stack_of(binary)


def test_every_rung_compiles_and_spills_nothing(tmp_path):
    found = compiled_by(__file__, tmp_path)
    assert {name for name, *_ in found} == {*RUNGS, *BACKWARD}
    for name, target, stack in found:
        assert target.rstrip("a") == "sm_90"
        assert stack == 0, f"{name} keeps {stack} bytes of a thread outside its registers"


if __name__ == "__main__":
    warnings.simplefilter("error")  # nobody wants to read them in a notebook
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 tells everyone
    print(
        json.dumps([row for name in (*RUNGS, *BACKWARD) for row in compile_rung(name, 64, 4, torch.bfloat16, arch=90)])
    )
