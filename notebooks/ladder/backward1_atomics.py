"""Backward, rung 1, atomics: zeros in memory, and every pair adds its gradient there.

A score is x[i] + y[j], so its gradient goes to x[i] and to y[j] as it is. Pairs of a token may share a row or a
column. The obvious kernel lets the memory add: it never loses a summand, but it adds in the order in which they
arrive, which is another one on every run. So do the last bits change, for fp32 sums depend on their order.

What it costs, by arithmetic: sums have to be fp32 while they grow. For N = 256 a token clears 2 * 256 sums of 4 bytes,
reads them again and writes them rounded to 16 bits: 5 KB, where 1 KB would do for the results. For 65536 tokens 5 KB
are 336 MB, at 3 TB/s 112 us, in three kernels; the k = 16 pairs of a token, 2 million atomic additions in all, come on
top.

Who owns what: a thread has one pair. Nobody owns a row.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def atomics_kernel(
    grad_ptr, experts_ptr, grad_x_ptr, grad_y_ptr, num_pairs, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pairs < num_pairs
    grad = tl.load(grad_ptr + pairs, mask=mask, other=0.0).to(tl.float32)
    experts = tl.load(experts_ptr + pairs, mask=mask, other=0)
    row_start = pairs // K * N
    tl.atomic_add(grad_x_ptr + row_start + experts // N, grad, mask=mask, sem="relaxed")
    tl.atomic_add(grad_y_ptr + row_start + experts % N, grad, mask=mask, sem="relaxed")


def gradient(grad_scores, experts, N):
    """What the gradients of the scores of k experts, (T, k), make of both factors': (T, N), summed in fp32."""
    num_tokens, k = grad_scores.shape
    dtype = grad_scores.dtype
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:  # the interpreter does not round to it
        grad_scores = grad_scores.float()
    grad_scores, experts = grad_scores.contiguous(), experts.contiguous()
    grad_x, grad_y = (torch.zeros((num_tokens, N), device=grad_scores.device) for _ in range(2))
    grid = (triton.cdiv(num_tokens * k, 256),)
    atomics_kernel[grid](grad_scores, experts, grad_x, grad_y, num_tokens * k, N, k, BLOCK=256)
    return grad_x.to(dtype), grad_y.to(dtype)
