"""The kernel that lists the k best columns of each factor, for the ranks that share a token's logits (../sharded.py).

It is the first half of lanes.py: two lanes share a token, and each has the best columns of its row in registers. A
network puts them in the order of the columns.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ..configs import compares_doubles, device_of, has_kernels, kernel_input, on_nvidia
from . import lanes
from .keys import pack, unpack
from .lanes import LanesPlan, best_of_lanes
from .networks import sort
from .plan import Launch, Launches, launch
from .ptx import store_row
from .rows import columns_are_vectors, row_alignment, rows_of_lanes

_launches = Launches()
LAST = tl.constexpr(0x3FFFFFFF)  # less a column, the upper word of a number that orders alike as int64 and as a double


@dataclasses.dataclass(frozen=True)
class ListsPlan(LanesPlan):
    """How lists_kernel is launched."""

    @property
    def kernel(self):
        return lists_kernel

    @property
    def none(self):
        """The key of -inf in no column: below the keys of all columns."""
        high = {torch.float16: 0x83FF, torch.bfloat16: 0x807F, torch.float32: 0x807FFFFF}[self.dtype]
        return (high - (1 << 8 * self.itemsize)) << (8 * self.itemsize)


@triton.jit
def _column_first(key, PLAN):
    """A key whose column stands above the value, the lowest column first."""
    if key.dtype == tl.int32:
        return ((key << 16) | ((key >> 16) & 0xFFFF)) ^ -(1 << 31)
    else:
        value, column = unpack(key, PLAN.element_ty, PLAN)
        return ((-column + LAST).to(tl.int64) << 32) | value.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _value_first(key, first_column, PLAN):
    """The key that it was made of, as ranks pack it, counting columns from `first_column`."""
    if key.dtype == tl.int32:
        key = key ^ -(1 << 31)
        return ((key << 16) | ((key >> 16) & 0xFFFF)) - first_column
    else:
        column = (-(key >> 32)).to(tl.int32) + (first_column + LAST)
        return pack(key.to(tl.int32).to(tl.float32, bitcast=True), column)


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def lists_kernel(
    x_ptr, y_ptr, keys_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    first_column, num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PLAN.k
    RANKS: tl.constexpr = PLAN.ranks
    lane = tl.arange(0, PLAN.threads)
    one = lane * 0 + tl.minimum(num_tokens, 1).to(tl.int32) if PLAN.add_minima else None  # as in lanes_kernel
    first_token = tl.program_id(0).to(tl.int64) * PLAN.tokens
    tokens = first_token + lane // 2
    _, _, row_ptrs, stride_n = rows_of_lanes(
        x_ptr, y_ptr, stride_xm, stride_xn, stride_ym, stride_yn, tokens, num_tokens, lane % 2 == 1
    )  # fmt: skip
    best, _, _, _ = best_of_lanes(
        x_ptr, y_ptr, stride_xn, stride_yn, row_ptrs, stride_n, lane, lane * 0, lane * 0, first_token, num_tokens, PLAN,
        one,
    )  # fmt: skip
    by_column = sort(tl.tuple([_column_first(key, PLAN) for key in best]), RANKS, PLAN, one)
    keys = ()
    for rank in tl.static_range(K):
        if rank < RANKS:
            keys = keys + (_value_first(by_column[rank], first_column, PLAN),)
        else:
            keys = keys + (tl.zeros_like(best[0]) + PLAN.none,)
    store_row(keys_ptr + (tokens * 2 + lane % 2) * PLAN.k, keys, tokens < num_tokens, PLAN)


def runs_on(x, num_experts_per_token):
    """Whether this kernel takes so many of a tensor's columns, and its device."""
    return has_kernels(x) and num_experts_per_token > 0 and lanes.runs_on(x.device, x.shape[1], num_experts_per_token)


@functools.cache
def plan_of(num_columns, k, dtype, alignment, transposed, doubles):
    """The plan of a problem, as that of two lanes a token in lanes.py."""
    plan = lanes.plan_of(num_columns, k, dtype, dtype, alignment, transposed, doubles, 2)
    return ListsPlan(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


def best_columns(x, y, k, first_column):
    """The packed keys (keys.py) of the k best columns of x, then of y, each in the order of columns.

    Args:
        x, y: (num_tokens, n), fp32, fp16 or bf16, any strides; n may be less than k, and 0 is none.
        k: from 1 to lanes.MAX_EXPERTS_PER_TOKEN.
        first_column: the number of the first column, which keys count from.

    Returns:
        keys (num_tokens, 2 * k), int64 of fp32 logits, int32 of others. What is no column is -inf of the highest column
        that a key can hold.
    """
    (num_tokens, num_columns), dtype = x.shape, x.dtype
    keys = x.new_empty((num_tokens, 2 * k), dtype=torch.int64 if dtype == torch.float32 else torch.int32)
    if not num_tokens:
        return keys
    x, y = x.resolve_neg(), y.resolve_neg()
    # As in factored_forward, which has the same rows to read.
    problem = (
        x.get_device(), num_columns, k, dtype, x.stride(), y.stride(), x.data_ptr() % 16, y.data_ptr() % 16,
        x.stride(0) == 1 and num_tokens % 8, num_tokens >> 31,
    )  # fmt: skip
    known = _launches.get(problem)
    if known is None:
        layout = row_alignment(x, y), columns_are_vectors(x, y)
        plan = plan_of(num_columns, k, dtype, *layout, compares_doubles(x.device))
        if not on_nvidia(x.device):
            x, y = kernel_input(x), kernel_input(y)
            with device_of(x):
                launch(plan, x, y, keys, *x.stride(), *y.stride(), first_column, num_tokens)
            return keys
        known = Launch(plan, x.get_device())
        _launches.keep(problem, known)
    known((x, y, keys), *x.stride(), *y.stride(), first_column, num_tokens)
    return keys
