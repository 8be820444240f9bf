"""The guide's optimized forward kernel: all N² sums of a token in one tile, for N below split_forward's.

The tile is the N × N grid itself, padded to a power of two each way: its coordinates and mask are two short vectors
made once for all tokens, and a token reads its 2·N logits once, coalesced, where the flat tile gathers 2·N² of them.
Scores are integer keys (keys.py), updated in place: a round is a maximum, the lowest cell that holds it, an update.
"""

import torch
import triton
import triton.language as tl

from .configs import device_of, get_arch, kernel_input, output_dtype, token_bucket, tuned
from .factored.keys import float_to_key, key_to_float

MAX_EXPERT_SQRT = 127  # the tile, 128 × 128 then, must fit in registers

PADDING = tl.constexpr(-(1 << 31))  # below every score's key: cells outside the grid, and experts already taken


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * TILE_M
    columns = tl.arange(0, TILE_N)
    in_row = columns < num_expert_sqrt
    cells = columns[:, None] * TILE_N + columns[None, :]  # ordered as the experts, but constants to the compiler
    mask = in_row[:, None] & in_row[None, :]
    x_row = x_ptr + columns.to(tl.int64) * stride_xn
    y_row = y_ptr + columns.to(tl.int64) * stride_yn
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        x = tl.load(x_row + token * stride_xm, mask=in_row, other=0.0).to(tl.float32)
        y = tl.load(y_row + token * stride_ym, mask=in_row, other=0.0).to(tl.float32)
        keys = tl.where(mask, float_to_key(x[:, None] + y[None, :]), PADDING)
        output = token * num_experts_per_token
        for slot in range(num_experts_per_token):
            best = tl.max(keys)
            cell = tl.min(tl.where(keys == best, cells, TILE_N * TILE_N))
            tl.store(scores_ptr + output + slot, key_to_float(best).to(scores_ptr.dtype.element_ty))
            tl.store(indices_ptr + output + slot, cell // TILE_N * num_expert_sqrt + cell % TILE_N)
            keys = tl.where(cells == cell, PADDING, keys)


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
