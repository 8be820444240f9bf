"""The kernel that lists the best columns of each factor, against PyTorch's sorting."""

import json

import pytest
import torch
from cases import DTYPES, NEEDS_INTERPRETER, ON_GPU, ON_NVIDIA, adversarial_logits, case_id, compile_plan, compiled_by
from ptx import parse, run_program

from omni_kernels import sharded
from omni_kernels.factored import lists
from omni_kernels.factored.plan import launch

pytestmark = [] if ON_GPU else NEEDS_INTERPRETER
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
PTX_CASES = [(64, 16, BF16, 16), (128, 5, FP32, 16), (8, 12, FP16, 16), (360, 20, BF16, 16), (33, 3, FP32, 4)]


def by_pytorch(x, y, k, first_column):
    return torch.cat([sharded._keys_by_column(logits, k, first_column) for logits in (x, y)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (40, 16), (100, 3)])
def test_lists_are_those_of_pytorch(n, k, dtype, device):
    x, y = adversarial_logits(n, dtype, device)
    assert lists.runs_on(x, k)
    assert torch.equal(lists.best_columns(x, y, k, 1000), by_pytorch(x, y, k, 1000))


def test_any_strides_and_no_tokens(device):
    x, y = adversarial_logits(40, torch.float32, device)
    x, y = x.t().contiguous().t(), y.repeat(1, 2)[:, ::2]
    assert torch.equal(lists.best_columns(x, y, 4, 8), by_pytorch(x, y, 4, 8))
    assert lists.best_columns(x[:0], y[:0], 4, 8).shape == (0, 8)


def test_a_launch_is_kept_for_other_tokens_and_columns(device, monkeypatch):
    """But not for other strides, alignment or k. On an NVIDIA GPU by its own launches, elsewhere by Triton's."""
    made = []

    class Launch(lists.Launch):
        def __init__(self, plan, device):
            made.append(plan)
            super().__init__(plan, device)

        def __call__(self, tensors, *numbers):
            if not ON_NVIDIA:
                return launch(self.plan, *tensors, *numbers)
            return super().__call__(tensors, *numbers)

    monkeypatch.setattr(lists, "_launches", type(lists._launches)())
    monkeypatch.setattr(lists, "on_nvidia", lambda _: True)
    monkeypatch.setattr(lists, "Launch", Launch)
    x, y = adversarial_logits(40, torch.float32, device)
    whole, rows, columns = (x, y), (x[:5], y[:5]), (x[:, 1:], y[:, 1:])
    for number, (pair, k, first) in enumerate(
        [(whole, 4, 8), (rows, 4, 16), (columns, 4, 0), (whole, 3, 8), (whole, 4, 8)]
    ):
        assert torch.equal(lists.best_columns(*pair, k, first), by_pytorch(*pair, k, first))
        assert len(made) == (1, 1, 2, 3, 3)[number]


def test_more_than_the_kernel_takes_are_pytorchs(device):
    x, y = adversarial_logits(100, torch.bfloat16, device)
    assert not lists.runs_on(x, 33)
    assert torch.equal(sharded._best_columns(x, y, 33, 0), by_pytorch(x, y, 33, 0))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The kernel of every case, and how many tokens a program of it has."""
    return [
        (parse(ptx, shared), tokens) for ptx, shared, tokens in compiled_by(__file__, tmp_path_factory.mktemp("cache"))
    ]


@pytest.mark.parametrize("case", range(len(PTX_CASES)), ids=[str(case[:2]) for case in PTX_CASES])
def test_compiled_code(case, programs):
    (n, k, dtype, _), (program, tokens) = PTX_CASES[case], programs[case]
    x, y = adversarial_logits(n, dtype, "cpu")
    want = by_pytorch(x, y, k, 1000)
    keys = torch.full_like(want, 7)
    memory = {
        address << 40: tensor.view(torch.uint8).numpy().reshape(-1) for address, tensor in enumerate((x, y, keys), 1)
    }
    num_programs = -(-len(x) // tokens)
    for number in range(num_programs):
        run_program(program, [*memory, n, n, 1000, len(x)], memory, number, num_programs)
    assert torch.equal(keys, want)


if __name__ == "__main__":
    plans = [lists.plan_of(*case, False, True) for case in PTX_CASES]
    binaries = [(compile_plan(plan, stride_xn=1, stride_yn=1), plan.tokens) for plan in plans]
    print(json.dumps([(binary.asm["ptx"], binary.metadata.shared, tokens) for binary, tokens in binaries]))
