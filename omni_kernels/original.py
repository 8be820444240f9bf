"""The original version, the baseline: all N² sums of a token in one tile, or streamed, and gradients by atomics.

It follows the public N² implementation of this router (flash-algo/omni-moe) in its plan, not in its defects: padding is
masked by a key below every score's, k need be no power of two, gradients start from zeros, and what is better than the
worst of a list takes its place there at once, where the public kernel shifts the others one by one.
Scores are compared as integers (keys.py), so NaN, infinities and -0.0 need no code of their own.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .configs import device_of, kernel_input, output_dtype, token_bucket, tuned
from .factored.keys import float_to_key, key_to_float

SPLIT_FROM = 128  # num_expert_sqrt from which the sums are streamed
MAX_SPLIT_EXPERTS_PER_TOKEN = 256  # the sorted list of the split kernel must fit in registers

PADDING = tl.constexpr(-(1 << 31))  # below every score's key: lanes past the last expert, and experts already taken


@triton.jit
def _score_keys(
    x_ptr, y_ptr, token, experts, stride_xm, stride_xn, stride_ym, stride_yn, num_expert_sqrt
):  # fmt: skip
    """The keys of some experts' scores for one token."""
    mask = experts < num_expert_sqrt * num_expert_sqrt
    ix = experts // num_expert_sqrt
    iy = experts - ix * num_expert_sqrt
    x = tl.load(x_ptr + token * stride_xm + ix.to(tl.int64) * stride_xn, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + token * stride_ym + iy.to(tl.int64) * stride_yn, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, float_to_key(x + y), PADDING)


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * TILE_M
    experts = tl.arange(0, TILE_N)
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        keys = _score_keys(
            x_ptr, y_ptr, token, experts, stride_xm, stride_xn, stride_ym, stride_yn, num_expert_sqrt
        )  # fmt: skip
        output = token * num_experts_per_token
        for slot in range(num_experts_per_token):
            score = key_to_float(tl.max(keys, 0))
            expert = tl.argmax(keys, 0)
            tl.store(scores_ptr + output + slot, score.to(scores_ptr.dtype.element_ty))
            tl.store(indices_ptr + output + slot, expert)
            keys = tl.where(experts == expert, PADDING, keys)


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def split_forward_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * TILE_M
    slots = tl.arange(0, TILE_K)
    for m in range(tl.minimum(TILE_M, num_tokens - start)):
        token = start + m
        # The best of the tiles so far, best first.
        top_keys = tl.full((TILE_K,), PADDING, tl.int32)
        top_experts = tl.zeros((TILE_K,), tl.int32)
        for first in range(0, num_expert_sqrt * num_expert_sqrt, TILE_N):
            experts = first + tl.arange(0, TILE_N)
            keys = _score_keys(
                x_ptr, y_ptr, token, experts, stride_xm, stride_xn, stride_ym, stride_yn, num_expert_sqrt
            )  # fmt: skip
            best = tl.max(keys, 0)
            worst = tl.min(top_keys, 0)
            while best > worst:
                # Behind its equals: tiles come in index order, so theirs are lower.
                expert = first + tl.argmax(keys, 0)
                rank = tl.sum((top_keys >= best).to(tl.int32), 0)
                source = tl.maximum(slots - (slots > rank).to(tl.int32), 0)
                top_keys = tl.where(slots == rank, best, tl.gather(top_keys, source, 0))
                top_experts = tl.where(slots == rank, expert, tl.gather(top_experts, source, 0))
                keys = tl.where(experts == expert, PADDING, keys)
                best = tl.max(keys, 0)
                worst = tl.min(top_keys, 0)
        outputs = token * num_experts_per_token + slots
        mask = slots < num_experts_per_token
        tl.store(scores_ptr + outputs, key_to_float(top_keys).to(scores_ptr.dtype.element_ty), mask=mask)
        tl.store(indices_ptr + outputs, top_experts, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "token_bucket"])
def backward_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr,
    stride_gm, stride_gk,
    num_tokens, num_expert_sqrt, num_experts_per_token, token_bucket,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    row_starts = tokens[:, None] * num_expert_sqrt
    for first in range(0, num_experts_per_token, TILE_K):
        slots = (first + tl.arange(0, TILE_K)).to(tl.int64)
        mask = (tokens < num_tokens)[:, None] & (slots < num_experts_per_token)[None, :]
        grad = tl.load(grad_ptr + tokens[:, None] * stride_gm + slots[None, :] * stride_gk, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        experts = tl.load(indices_ptr + tokens[:, None] * num_experts_per_token + slots[None, :], mask=mask, other=0)
        tl.atomic_add(grad_x_ptr + row_starts + experts // num_expert_sqrt, grad, mask=mask)
        tl.atomic_add(grad_y_ptr + row_starts + experts % num_expert_sqrt, grad, mask=mask)


def original_forward(router_logits_x, router_logits_y, num_experts_per_token):
    """Scores and indices of the k best experts, from all N² sums.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's
            interpreter), any strides, at least one token.
        num_experts_per_token: k, from 1 to N². From N = SPLIT_FROM on, more than MAX_SPLIT_EXPERTS_PER_TOKEN take
            `reference.factored_router`.

    Returns:
        scores (num_tokens, k) in the logits' dtype and indices (num_tokens, k), int32.
    """
    num_tokens, num_expert_sqrt = router_logits_x.shape
    k, dtype, device = num_experts_per_token, router_logits_x.dtype, router_logits_x.device
    x, y = kernel_input(router_logits_x), kernel_input(router_logits_y)
    if num_expert_sqrt < SPLIT_FROM:
        kernel, tiles = tuned(forward_kernel, "fwd"), {"TILE_N": triton.next_power_of_2(num_expert_sqrt**2)}
    elif k <= MAX_SPLIT_EXPERTS_PER_TOKEN:
        kernel, tiles = tuned(split_forward_kernel, "fwd_split"), {"TILE_K": triton.next_power_of_2(k)}
    else:
        return reference.eager_router(router_logits_x, router_logits_y, k)
    scores = torch.empty((num_tokens, k), dtype=output_dtype(dtype), device=device)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=device)
    with device_of(x):
        kernel[lambda meta: (triton.cdiv(num_tokens, meta["TILE_M"]),)](
            x, y, scores, indices, *x.stride(), *y.stride(),
            num_tokens, num_expert_sqrt, k, token_bucket(num_tokens), **tiles,
        )  # fmt: skip
    return scores.to(dtype), indices


def original_backward(grad_scores, indices, num_expert_sqrt):
    """The gradients of both factors by atomic adds, whose order, and so the last bits, may differ between runs.

    Args:
        grad_scores: (num_tokens, k), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's interpreter), any
            strides, at least one token.
        indices: (num_tokens, k), int32, contiguous, as the forward pass returned them.
        num_expert_sqrt: N.

    Returns:
        grad_x, grad_y: (num_tokens, N), in grad_scores' dtype, accumulated in fp32 and rounded once.
    """
    num_tokens, k = grad_scores.shape
    shape, device = (num_tokens, num_expert_sqrt), grad_scores.device
    grad = kernel_input(grad_scores)
    grad_x, grad_y = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
    kernel = tuned(backward_kernel, "bwd", reset_to_zero=("grad_x_ptr", "grad_y_ptr"))
    with device_of(grad):
        kernel[lambda meta: (triton.cdiv(num_tokens, meta["TILE_M"]),)](
            grad, indices, grad_x, grad_y, *grad.stride(),
            num_tokens, num_expert_sqrt, k, token_bucket(num_tokens),
        )  # fmt: skip
    return grad_x.to(grad_scores.dtype), grad_y.to(grad_scores.dtype)
