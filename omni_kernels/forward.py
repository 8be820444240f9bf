"""The guide's optimized forward kernel: all N² sums of a token in one program, for N below split_forward's.

The guide wants the experts' coordinates and mask made once for all tokens and the scores updated in place. Here both
are short: coordinates and masks are those of N rows and N columns, and of the N² sums only each row's maximum is kept,
so that a sum costs two instructions, an addition and a maximum. What made the kernel fast is to look at less in each of
the k rounds: the lowest of the best rows gives its best expert, and only that row's N sums are made again, to find the
column, and what is below it, or equal and behind it, for the row's next maximum. A round looks at 2·N numbers instead
of N². Scores are compared as integers (keys.py), whose maximum a warp finds in one instruction.
"""

import torch
import triton
import triton.language as tl

from .configs import device_of, get_arch, kernel_input, output_dtype, token_bucket, tuned
from .factored.keys import float_to_key, key_to_float

MAX_EXPERT_SQRT = 127  # from 128 on the guide streams the sums

PADDING = tl.constexpr(-(1 << 31))  # below every score's key: rows and columns past the last, and rows without experts
TILE_COLUMNS = tl.constexpr(8)  # of the grid, added and compared at once


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    TILE_Y: tl.constexpr = min(TILE_COLUMNS, max(1, TILE_N // 2))  # never more than there are
    start = tl.program_id(0).to(tl.int64) * TILE_M
    rows = tl.arange(0, TILE_N)
    columns = tl.arange(0, TILE_N)
    mask_rows = rows < num_expert_sqrt
    mask_columns = columns < num_expert_sqrt
    tile_columns = tl.arange(0, TILE_Y)
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        x_row = x_ptr + token * stride_xm
        y_row = y_ptr + token * stride_ym
        x = tl.load(x_row + rows.to(tl.int64) * stride_xn, mask=mask_rows, other=0.0).to(tl.float32)
        maxima = tl.full((TILE_Y, TILE_N), -float("inf"), tl.float32)
        for first in range(0, num_expert_sqrt, TILE_Y):
            # The last columns may be added twice, which changes no maximum and saves a mask.
            tile = tl.minimum(first, num_expert_sqrt - TILE_Y) + tile_columns
            y = tl.load(y_row + tile.to(tl.int64) * stride_yn).to(tl.float32)
            maxima = tl.maximum(maxima, x[None, :] + y[:, None], propagate_nan=tl.PropagateNan.ALL)
        row_keys = tl.where(mask_rows, tl.max(float_to_key(maxima), 0), PADDING)
        y = tl.load(y_row + columns.to(tl.int64) * stride_yn, mask=mask_columns, other=0.0).to(tl.float32)
        output = token * num_experts_per_token
        first_left = 0  # of the columns that hold the best row's maximum, those before have been taken
        for slot in range(num_experts_per_token):
            best = tl.max(row_keys, 0)
            row = tl.min(tl.where(row_keys == best, rows, TILE_N), 0)
            x_best = tl.load(x_row + row.to(tl.int64) * stride_xn).to(tl.float32)
            keys = tl.where(mask_columns, float_to_key(x_best + y), PADDING)
            is_best = (keys == best) & (columns >= first_left)
            column = tl.min(tl.where(is_best, columns, TILE_N), 0)
            has_more = tl.max(tl.where(is_best, columns, -1), 0) > column
            below = tl.max(tl.where(keys < best, keys, PADDING), 0)
            # A row that has more of them is the best row again, for rows above it have none.
            first_left = tl.where(has_more, column + 1, 0)
            row_keys = tl.where(rows == row, tl.where(has_more, best, below), row_keys)
            tl.store(scores_ptr + output + slot, key_to_float(best).to(scores_ptr.dtype.element_ty))
            tl.store(indices_ptr + output + slot, row * num_expert_sqrt + column)


def forward(router_logits_x, router_logits_y, num_experts_per_token):
    """Scores and indices of the k best experts, from all N² sums.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's
            interpreter), any strides, at least one token; N at most MAX_EXPERT_SQRT.
        num_experts_per_token: k, from 1 to N².

    Returns:
        scores (num_tokens, k) in the logits' dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, dtype, device = num_experts_per_token, router_logits_x.dtype, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    with device_of(x):
        tuned(forward_kernel, "fwd", get_arch(device))[lambda meta: (triton.cdiv(num_tokens, meta["TILE_M"]),)](
            x, y, scores, indices, *x.stride(), *y.stride(),
            num_tokens, num_expert_sqrt, k, token_bucket(num_tokens), TILE_N=triton.next_power_of_2(num_expert_sqrt),
        )  # fmt: skip
    return scores.to(dtype), indices
