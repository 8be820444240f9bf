"""The guide's optimized split forward kernel: the N² sums of a token, streamed in tiles into a running top k.

The guide wants the coordinates inside a tile made once for all tiles and tokens, and a cheaper merge than the public
kernel's, which shifts a list for every expert it takes. Both are here: the running top k is an unsorted set, what
enters takes the place of its worst, and ranks are counted at the end. What made the kernel fast is to look at less:

- A tile, some rows by some columns, is added up and compared with the last one, two instructions a sum, and forgotten:
  all that is left of a strip of rows, when its tiles have passed, is the maximum of each row.
- A strip none of whose rows beats the worst of the set costs one comparison.
- While one does, the lowest of the best rows gives its best expert: only that row's N sums are made again, to find the
  column, and what is below it, or equal and behind it, for the row's next maximum. A round looks at N rows and N
  columns where a tile has thousands of sums.
- Scores are compared as integers of 32 bits (keys.py), whose maximum a warp finds in one instruction.
"""

import torch
import triton
import triton.language as tl

from .configs import device_of, get_arch, kernel_input, output_dtype, token_bucket, tuned
from .factored.keys import float_to_key, key_to_float

MAX_EXPERTS_PER_TOKEN = 256  # the running set is compared with itself in registers

PADDING = tl.constexpr(-(1 << 31))  # below every score's key: rows and columns past the last, and rows without experts
HIGHEST_KEY = tl.constexpr((1 << 31) - 1)  # no score's key is above it
TILE_COLUMNS = tl.constexpr(8)  # a tile has at least so many, and as many rows as they leave room for


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def split_forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PADDED_SQRT: tl.constexpr,
):  # fmt: skip
    TILE_X: tl.constexpr = min(PADDED_SQRT, TILE_N // TILE_COLUMNS)
    TILE_Y: tl.constexpr = min(TILE_N // TILE_X, max(1, PADDED_SQRT // 2))  # never more than there are
    PIECE: tl.constexpr = min(PADDED_SQRT, TILE_N)
    start = tl.program_id(0).to(tl.int64) * TILE_M
    strip_rows = tl.arange(0, TILE_X)
    tile_columns = tl.arange(0, TILE_Y)
    piece_columns = tl.arange(0, PIECE)
    slots = tl.arange(0, TILE_K)
    in_top = slots < num_experts_per_token
    empty_keys = tl.where(in_top, PADDING, HIGHEST_KEY)
    empty_experts = num_expert_sqrt * num_expert_sqrt + slots  # distinct, so that one at a time is replaced
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        x_row = x_ptr + token * stride_xm
        y_row = y_ptr + token * stride_ym
        top_keys, top_experts = empty_keys, empty_experts
        worst = tl.min(top_keys, 0)
        for first_row in range(0, num_expert_sqrt, TILE_X):
            rows = first_row + strip_rows
            mask_rows = rows < num_expert_sqrt
            x = tl.load(x_row + rows.to(tl.int64) * stride_xn, mask=mask_rows, other=0.0).to(tl.float32)
            maxima = tl.full((TILE_Y, TILE_X), -float("inf"), tl.float32)
            for first in range(0, num_expert_sqrt, TILE_Y):
                # The last columns may be added twice, which changes no maximum and saves a mask.
                columns = tl.minimum(first, num_expert_sqrt - TILE_Y) + tile_columns
                y = tl.load(y_row + columns.to(tl.int64) * stride_yn).to(tl.float32)
                maxima = tl.maximum(maxima, x[None, :] + y[:, None], propagate_nan=tl.PropagateNan.ALL)
            row_keys = tl.where(mask_rows, tl.max(float_to_key(maxima), 0), PADDING)
            first_left = 0  # of the columns that hold the best row's maximum, those before have been taken
            best = tl.max(row_keys, 0)
            while best > worst:
                row = tl.min(tl.where(row_keys == best, rows, first_row + TILE_X), 0)
                x_best = tl.load(x_row + row.to(tl.int64) * stride_xn).to(tl.float32)
                column = num_expert_sqrt
                last_column = -1
                below = PADDING
                for first in range(0, num_expert_sqrt, PIECE):
                    columns = first + piece_columns
                    mask_columns = columns < num_expert_sqrt
                    y = tl.load(y_row + columns.to(tl.int64) * stride_yn, mask=mask_columns, other=0.0)
                    keys = tl.where(mask_columns, float_to_key(x_best + y.to(tl.float32)), PADDING)
                    is_best = (keys == best) & (columns >= first_left)
                    column = tl.minimum(column, tl.min(tl.where(is_best, columns, num_expert_sqrt), 0))
                    last_column = tl.maximum(last_column, tl.max(tl.where(is_best, columns, -1), 0))
                    below = tl.maximum(below, tl.max(tl.where(keys < best, keys, PADDING), 0))
                # A row that has more of them is the best row again, for rows above it have none.
                has_more = last_column > column
                first_left = tl.where(has_more, column + 1, 0)
                row_keys = tl.where(rows == row, tl.where(has_more, best, below), row_keys)
                # Experts come in index order among equals, so the worst of the set is, of its equals, the last.
                replaced = top_experts == tl.max(tl.where(top_keys == worst, top_experts, -1), 0)
                top_keys = tl.where(replaced, best, top_keys)
                top_experts = tl.where(replaced, row * num_expert_sqrt + column, top_experts)
                worst = tl.min(top_keys, 0)
                best = tl.max(row_keys, 0)
        # Keys above experts in one integer, so that a comparison ranks them; slots past k come last.
        top = tl.where(in_top, (top_keys.to(tl.int64) << 32) - top_experts, -(1 << 63))
        ranks = tl.sum((top[None, :] > top[:, None]).to(tl.int32), 1)
        outputs = token * num_experts_per_token + ranks
        tl.store(scores_ptr + outputs, key_to_float(top_keys).to(scores_ptr.dtype.element_ty), mask=in_top)
        tl.store(indices_ptr + outputs, top_experts, mask=in_top)


def padded_count(num_experts_per_token):
    """TILE_K: a power of two, and no less than a warp has lanes, so that one instruction finds the worst of the set."""
    return max(32, triton.next_power_of_2(num_experts_per_token))


def split_forward(router_logits_x, router_logits_y, num_experts_per_token):
    """Scores and indices of the k best experts, from all N² sums, streamed.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's
            interpreter), any strides, at least one token.
        num_experts_per_token: k, from 1 to N² or MAX_EXPERTS_PER_TOKEN, whichever is less.

    Returns:
        scores (num_tokens, k) in the logits' dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, dtype, device = num_experts_per_token, router_logits_x.dtype, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    kernel = tuned(split_forward_kernel, "fwd_split", get_arch(device))
    with device_of(x):
        kernel[lambda meta: (triton.cdiv(num_tokens, meta["TILE_M"]),)](
            x, y, scores, indices, *x.stride(), *y.stride(),
            num_tokens, num_expert_sqrt, k, token_bucket(num_tokens),
            TILE_K=padded_count(k), PADDED_SQRT=triton.next_power_of_2(num_expert_sqrt),
        )  # fmt: skip
    return scores.to(dtype), indices
