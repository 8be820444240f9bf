"""The kernel that lists the k best columns of each factor, for the ranks that share a token's logits (../sharded.py).

It is the first half of tile.py: plain Triton, which runs wherever Triton does.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ..configs import OPTIONS, device_of, has_kernels, kernel_input
from . import tile
from .keys import index_bits
from .tile import TilePlan, top_of_rows

LAST = tl.constexpr(1 << 22)  # above every column; ranks of tile_k fit beside it in 32 bits


@dataclasses.dataclass(frozen=True)
class ListsPlan(TilePlan):
    """How lists_kernel is launched."""

    @property
    def kernel(self):
        return lists_kernel

    @property
    def none(self):
        """The key of -inf in no column: below the keys of all columns."""
        high = {torch.float16: 0x83FF, torch.bfloat16: 0x807F, torch.float32: 0x807FFFFF}[self.dtype]
        return (high - (1 << 8 * self.dtype.itemsize)) << (8 * self.dtype.itemsize)


@triton.jit(do_not_specialize=["num_tokens", "first_column"])
def lists_kernel(
    x_ptr, y_ptr, keys_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    first_column, num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    in_batch = tokens < num_tokens
    is_x = tl.program_id(1) == 0
    rows = tl.where(is_x, x_ptr + tokens * stride_xm, y_ptr + tokens * stride_ym)[:, None]
    num_columns = PLAN.num_expert_sqrt
    keys = top_of_rows(rows, tl.where(is_x, stride_xn, stride_yn), num_columns, in_batch, PLAN)

    # Sorted by their columns. Slots beyond k and what is no column come last.
    MASK: tl.constexpr = (1 << index_bits(PLAN.key)) - 1
    slots = tl.arange(0, PLAN.tile_k)[None, :]
    columns = MASK - (keys & MASK).to(tl.int32)
    columns = tl.where((slots < PLAN.k) & (columns < num_columns), columns, LAST)
    order = tl.sort(columns * PLAN.tile_k + slots, 1)
    keys = tl.gather(keys, order % PLAN.tile_k, 1) - first_column
    keys = tl.where(order // PLAN.tile_k < num_columns, keys, tl.full((1, 1), PLAN.none, keys.dtype))
    outputs = (tokens * 2 + tl.program_id(1))[:, None] * PLAN.k + slots
    tl.store(keys_ptr + outputs, keys, mask=in_batch[:, None] & (slots < PLAN.k))


def plan_for(x, y, k, dtype):
    """The plan for these columns, of logits of a dtype, which the interpreter may have widened."""
    plan = tile.plan_for(x, y, k, dtype)
    return ListsPlan(**dataclasses.asdict(plan) | {"dtype": dtype})


def runs_on(device_like, num_experts_per_token):
    """Whether this kernel takes so many columns, on a tensor's device."""
    return has_kernels(device_like) and 0 < num_experts_per_token <= tile.MAX_EXPERTS_PER_TOKEN


def best_columns(x, y, k, first_column):
    """The packed keys (keys.py) of the k best columns of x, then of y, each in the order of columns.

    Args:
        x, y: (num_tokens, n), fp32, fp16 or bf16, any strides; n may be less than k.
        k: from 1 to tile.MAX_EXPERTS_PER_TOKEN.
        first_column: the number of the first column, which keys count from.

    Returns:
        keys (num_tokens, 2 * k), int64 of fp32 logits, int32 of others. What is no column is -inf of the highest column
        that a key can hold.
    """
    num_tokens, dtype = len(x), x.dtype
    keys = x.new_empty((num_tokens, 2 * k), dtype=torch.int64 if dtype == torch.float32 else torch.int32)
    if num_tokens:
        x, y = kernel_input(x), kernel_input(y)
        plan = plan_for(x, y, k, dtype)
        with device_of(x):
            lists_kernel[(plan.grid(num_tokens), 2)](
                x, y, keys, *x.stride(), *y.stride(), first_column, num_tokens,
                PLAN=plan, num_warps=plan.num_warps, **OPTIONS,
            )  # fmt: skip
    return keys
