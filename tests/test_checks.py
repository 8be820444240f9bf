"""What is let through and what is refused, by the quick test of an ordinary call and by the one that explains alike."""

import enum
import re

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_name
from torch.fx.experimental.proxy_tensor import make_fx

from omni_kernels.checks import MAX_EXPERT_SQRT, check, check_expert_sqrt

OK = torch.zeros(2, 3)


class Logits(torch.Tensor):
    """Logits of a type that the quick test does not know."""


class Count(enum.IntEnum):
    FOUR = 4


class Index:
    def __index__(self):
        return 4


INTEGERS = {
    "int": 4,
    "enum": Count.FOUR,
    "__index__": Index(),
    "array": np.array(4),
    "tensor": torch.tensor(4),
    **{name: getattr(np, name)(4) for name in ("int8", "int32", "int64", "uint8", "uint64")},
}
NO_INTEGERS = {
    "bool": True,
    "numpy bool": np.True_,
    "bool tensor": torch.tensor(True),
    "float": 4.0,
    "numpy float": np.float64(4),
    "float tensor": torch.tensor(4.0),
    "string": "4",
    "None": None,
}
GOOD = {
    "nothing": (OK, OK, 0),
    "everything": (OK, OK, 9),
    "no tokens": (torch.empty(0, 5), torch.empty(0, 5), 1),
    "one expert": (torch.zeros(3, 1), torch.zeros(3, 1), 1),
    "any strides": (torch.zeros(3, 2).T, torch.zeros(1, 3).expand(2, 3), 4),
    "largest": (torch.empty(1, 1).expand(1, MAX_EXPERT_SQRT),) * 2 + (MAX_EXPERT_SQRT**2,),
    "one token": (OK[0], OK[0], 4),
    "more dimensions": (OK[None], OK[None], 4),
    "no data": (torch.empty(2, 3, device="meta"),) * 2 + (4,),
}
BAD = {
    "dtype": (OK.double(), OK.double(), 2),
    "dtypes": (OK, OK.half(), 2),
    "dtypes, the other": (OK.bfloat16(), OK, 2),
    "no dimensions": (OK[0, 0], OK[0, 0], 1),
    "dimensions": (OK, OK[0], 2),
    "more dimensions": (OK, OK[None], 2),
    "shapes": (OK, OK[:1], 2),
    "columns": (OK, OK[:, :2], 2),
    "devices": (OK, OK.to("meta"), 2),
    "no columns": (OK[:, :0], OK[:, :0], 0),
    "too many columns": (torch.empty(1, 1).expand(1, MAX_EXPERT_SQRT + 1),) * 2 + (2,),
    "k below": (OK, OK, -1),
    "k above": (OK, OK, 10),
    "k": (OK, OK, 2.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("x", "y", "k"), GOOD.values(), ids=GOOD)
def test_good_input_is_let_through(x, y, k, dtype):
    x, y = x.to(dtype), y.to(dtype)
    for as_type in (lambda logits: logits, torch.nn.Parameter, lambda logits: logits.as_subclass(Logits)):
        assert check(as_type(x), as_type(y), k) == k


@pytest.mark.parametrize(("x", "y", "k"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_the_same_words(x, y, k):
    with pytest.raises((TypeError, ValueError)) as plain:
        check(x, y, k)
    with pytest.raises(plain.type, match=f"^{re.escape(str(plain.value))}$"):
        check(x.as_subclass(Logits), y.as_subclass(Logits), k)


@pytest.mark.parametrize("value", INTEGERS.values(), ids=INTEGERS)
def test_any_integer_is_one(value):
    for got in (check(OK, OK, value), check_expert_sqrt(value, torch.zeros(1, 4))):
        assert (type(got), got) == (int, 4)


@pytest.mark.parametrize("value", NO_INTEGERS.values(), ids=NO_INTEGERS)
def test_nothing_else_is_an_integer(value):
    words = re.escape(f"must be an int, got {type(value).__name__} {value!r}")
    with pytest.raises(TypeError, match=f"^num_experts_per_token {words}$"):
        check(OK, OK, value)
    with pytest.raises(TypeError, match=f"^num_expert_sqrt {words}$"):
        check_expert_sqrt(value, OK)


def test_symbolic_integers_stay_so():
    kinds = []

    def trace(x, y):
        k = check(x, y, x.shape[1])
        kinds.extend(map(type, (k, check_expert_sqrt(k, x))))
        return x + k

    make_fx(trace, tracing_mode="symbolic")(OK, OK)
    assert kinds == [torch.SymInt, torch.SymInt]


def test_a_count_may_vary_in_compiled_code():
    run = torch.compile(lambda x, y, k: x + check(x, y, k), fullgraph=True, dynamic=True, backend="eager")
    for k in (2, 3, 5):
        assert torch.equal(run(OK, OK, k), OK + k)
