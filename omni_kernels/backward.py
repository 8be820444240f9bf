"""The gradient of the router, deterministic and without atomics.

Selected pair r of a token adds grad_scores[t, r] to grad_x[t, row] and to grad_y[t, column]. Several pairs of a token
may share a row, which is why the obvious kernel uses atomics and gives other bits on every run. Here one program owns
its tokens, so nothing needs them:

- many columns (N > k): each pair looks through its token's k pairs and sums those of its own row, in slot order. Pairs
  that share a row find the same sum. The program stores zeros over its output rows, waits, and stores the sums:
  duplicates write equal bits, so the order of the stores cannot matter.
- few columns (N <= k): the output row is summed in registers, slot by slot, and stored once.

Both add in slot order, starting from zero, so both give the bits of the sequential loop they stand for.
"""

import torch
import triton
import triton.language as tl

from .configs import device_of, kernel_input, output_dtype

SCATTER_TILES = {"TILE_M": 32, "TILE_K": 16, "TILE_N": 128}
DENSE_TILES = {"TILE_M": 32, "TILE_N": 64}


@triton.jit
def _load_slot(grad_ptr, indices_ptr, tokens, slot, stride_gm, stride_gk, num_experts_per_token, mask):
    """One slot of every token: its gradient in fp32 and its expert."""
    slots = tl.zeros_like(tokens) + slot  # 64 bits, as slot * stride_gk may need them
    grad = tl.load(grad_ptr + tokens * stride_gm + slots * stride_gk, mask=mask, other=0.0).to(tl.float32)
    return grad, tl.load(indices_ptr + tokens * num_experts_per_token + slot, mask=mask, other=0)


@triton.jit(do_not_specialize=["num_tokens"])
def scatter_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr,
    stride_gm, stride_gk,
    num_tokens, num_expert_sqrt, num_experts_per_token,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_batch = tokens < num_tokens
    zeros = tl.zeros((TILE_M, TILE_N), grad_x_ptr.dtype.element_ty)
    for start in range(0, num_expert_sqrt, TILE_N):
        columns = start + tl.arange(0, TILE_N)
        mask = in_batch[:, None] & (columns < num_expert_sqrt)[None, :]
        offsets = tokens[:, None] * num_expert_sqrt + columns[None, :]
        tl.store(grad_x_ptr + offsets, zeros, mask=mask)
        tl.store(grad_y_ptr + offsets, zeros, mask=mask)
    tl.debug_barrier()  # the sums below must land on the zeros, not under them

    for start in range(0, num_experts_per_token, TILE_K):
        slots = start + tl.arange(0, TILE_K)
        mask = in_batch[:, None] & (slots < num_experts_per_token)[None, :]
        experts = tl.load(indices_ptr + tokens[:, None] * num_experts_per_token + slots[None, :], mask=mask, other=0)
        rows, columns = experts // num_expert_sqrt, experts % num_expert_sqrt
        sum_x = tl.zeros((TILE_M, TILE_K), tl.float32)
        sum_y = tl.zeros((TILE_M, TILE_K), tl.float32)
        for slot in range(num_experts_per_token):
            grad, expert = _load_slot(
                grad_ptr, indices_ptr, tokens, slot, stride_gm, stride_gk, num_experts_per_token, in_batch
            )
            sum_x += tl.where(rows == (expert // num_expert_sqrt)[:, None], grad[:, None], 0.0)
            sum_y += tl.where(columns == (expert % num_expert_sqrt)[:, None], grad[:, None], 0.0)
        row_start = tokens[:, None] * num_expert_sqrt
        tl.store(grad_x_ptr + row_start + rows, sum_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_y_ptr + row_start + columns, sum_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def dense_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr,
    stride_gm, stride_gk,
    num_tokens, num_expert_sqrt, num_experts_per_token,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_batch = tokens < num_tokens
    for start in range(0, num_expert_sqrt, TILE_N):
        columns = start + tl.arange(0, TILE_N)
        sum_x = tl.zeros((TILE_M, TILE_N), tl.float32)
        sum_y = tl.zeros((TILE_M, TILE_N), tl.float32)
        for slot in range(num_experts_per_token):
            grad, expert = _load_slot(
                grad_ptr, indices_ptr, tokens, slot, stride_gm, stride_gk, num_experts_per_token, in_batch
            )
            sum_x += tl.where((expert // num_expert_sqrt)[:, None] == columns[None, :], grad[:, None], 0.0)
            sum_y += tl.where((expert % num_expert_sqrt)[:, None] == columns[None, :], grad[:, None], 0.0)
        mask = in_batch[:, None] & (columns < num_expert_sqrt)[None, :]
        offsets = tokens[:, None] * num_expert_sqrt + columns[None, :]
        tl.store(grad_x_ptr + offsets, sum_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_y_ptr + offsets, sum_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


def backward(grad_scores, indices, num_expert_sqrt):
    """The gradients of both factors, from the gradient of the scores. Any k; the same bits on every run.

    Args:
        grad_scores: (num_tokens, k), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's interpreter), any
            strides, at least one token.
        indices: (num_tokens, k), int32, contiguous, as the forward pass returned them.
        num_expert_sqrt: N.

    Returns:
        grad_x, grad_y: (num_tokens, N), in grad_scores' dtype, accumulated in fp32 and rounded once.
    """
    num_tokens, k = grad_scores.shape
    shape, dtype = (num_tokens, num_expert_sqrt), grad_scores.dtype
    grad = kernel_input(grad_scores)
    grad_x, grad_y = (torch.empty(shape, dtype=output_dtype(dtype), device=grad.device) for _ in range(2))
    kernel, tiles = (scatter_kernel, SCATTER_TILES) if num_expert_sqrt > k else (dense_kernel, DENSE_TILES)
    with device_of(grad):
        kernel[(triton.cdiv(num_tokens, tiles["TILE_M"]),)](
            grad, indices, grad_x, grad_y, *grad.stride(), num_tokens, num_expert_sqrt, k, **tiles
        )
    return grad_x.to(dtype), grad_y.to(dtype)
