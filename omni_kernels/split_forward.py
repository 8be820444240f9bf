"""The guide's optimized split forward kernel: the N² sums of a token, streamed in tiles into a running top k.

A tile is some rows of the N × N grid, padded to a power of two, or a piece of one row where N is larger than the tile.
The coordinates inside a tile are the same for all tiles and tokens, so they are made once; y is read once a token, and
x once an element. The running top k is an unsorted set of packed keys (keys.py): while a tile's best beats the worst of
the set, it takes its place, so no list is shifted and the tile is its own scratch space. Ranks are counted at the end.
"""

import torch
import triton
import triton.language as tl

from .configs import device_of, get_arch, kernel_input, output_dtype, token_bucket, tuned
from .factored.keys import LOWEST_KEY, pack, unpack

MAX_EXPERTS_PER_TOKEN = 256  # the running set is compared with itself in registers

HIGHEST_KEY = tl.constexpr((1 << 63) - 1)  # above every packed key: never the worst of the set


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def split_forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PADDED_SQRT: tl.constexpr,
):  # fmt: skip
    TILE_Y: tl.constexpr = min(PADDED_SQRT, TILE_N)
    TILE_X: tl.constexpr = TILE_N // TILE_Y
    start = tl.program_id(0).to(tl.int64) * TILE_M
    tile_rows = tl.arange(0, TILE_X)
    tile_columns = tl.arange(0, TILE_Y)
    tile_experts = tile_rows[:, None] * num_expert_sqrt + tile_columns[None, :]
    slots = tl.arange(0, TILE_K)
    # Distinct and below every score's key, so that one at a time is replaced; slots past k never are.
    empty = tl.where(slots < num_experts_per_token, LOWEST_KEY + slots.to(tl.int64), HIGHEST_KEY)
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        top = empty
        for first_column in range(0, num_expert_sqrt, TILE_Y):
            columns = first_column + tile_columns
            in_row = columns < num_expert_sqrt
            y_offsets = token * stride_ym + columns.to(tl.int64) * stride_yn
            y = tl.load(y_ptr + y_offsets, mask=in_row, other=0.0).to(tl.float32)
            for first_row in range(0, num_expert_sqrt, TILE_X):
                rows = first_row + tile_rows
                in_column = rows < num_expert_sqrt
                x_offsets = token * stride_xm + rows.to(tl.int64) * stride_xn
                x = tl.load(x_ptr + x_offsets, mask=in_column, other=0.0).to(tl.float32)
                keys = pack(x[:, None] + y[None, :], first_row * num_expert_sqrt + first_column + tile_experts)
                keys = tl.where(in_column[:, None] & in_row[None, :], keys, LOWEST_KEY)
                best = tl.max(keys)
                worst = tl.min(top, 0)
                while best > worst:
                    top = tl.where(top == worst, best, top)
                    keys = tl.where(keys == best, LOWEST_KEY, keys)
                    best = tl.max(keys)
                    worst = tl.min(top, 0)
        top = tl.where(slots < num_experts_per_token, top, LOWEST_KEY)
        ranks = tl.sum((top[None, :] > top[:, None]).to(tl.int32), 1)
        scores, experts = unpack(top)
        outputs = token * num_experts_per_token + ranks
        mask = slots < num_experts_per_token
        tl.store(scores_ptr + outputs, scores.to(scores_ptr.dtype.element_ty), mask=mask)
        tl.store(indices_ptr + outputs, experts, mask=mask)


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
            TILE_K=triton.next_power_of_2(k), PADDED_SQRT=triton.next_power_of_2(num_expert_sqrt),
        )  # fmt: skip
    return scores.to(dtype), indices
