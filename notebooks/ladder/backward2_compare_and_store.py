"""Backward, rung 2, compare and store: who shares a row finds the same sum, and stores it.

Each pair looks through the k pairs of its token, in order, and sums the gradients of those that have its row. Pairs
that share a row make the same sum, to the bit. So they may all store it: whoever comes last, the same bits are there.
Columns likewise. Before that the program stores zeros over the token's rows, and waits until they have been stored.

What it should gain, by arithmetic: sums grow in registers, so a row is written once, in 16 bits, and a sum once more:
for N = 256, k = 16 a token writes 1 KB and 64 scattered bytes, reads 96. For 65536 tokens that is 73 MB, 24 us at 3
TB/s, where atomics took 112. The price is k * k comparisons for each factor; for k = 16 they are 512 a token, two
instructions each: 32 warp instructions, 2 us. For k = 64 it is 16 times that.

Who owns what: a program owns 32 tokens and all that is written for them, so a barrier inside it is enough. A thread
has four slots of a token: their rows, columns and sums are in its registers. A slot to compare with comes from the
cache.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def store_kernel(
    grad_ptr, experts_ptr, grad_x_ptr, grad_y_ptr, num_tokens,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    zeros = tl.zeros((TOKENS, COLUMNS), grad_x_ptr.dtype.element_ty)
    for start in range(0, N, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        mask = (tokens < num_tokens) & (columns < N)
        tl.store(grad_x_ptr + tokens * N + columns, zeros, mask=mask)
        tl.store(grad_y_ptr + tokens * N + columns, zeros, mask=mask)
    tl.debug_barrier()  # or a sum might be stored first, and cleared

    slots = tl.arange(0, SLOTS)[None, :]
    mask = (tokens < num_tokens) & (slots < K)
    experts = tl.load(experts_ptr + tokens * K + slots, mask=mask, other=0)
    rows, columns = experts // N, experts % N
    sum_x = tl.zeros((TOKENS, SLOTS), tl.float32)
    sum_y = tl.zeros((TOKENS, SLOTS), tl.float32)
    for slot in range(K):
        grad = tl.load(grad_ptr + tokens * K + slot, mask=tokens < num_tokens, other=0.0).to(tl.float32)
        expert = tl.load(experts_ptr + tokens * K + slot, mask=tokens < num_tokens, other=0)
        sum_x += tl.where(rows == expert // N, grad, 0.0)
        sum_y += tl.where(columns == expert % N, grad, 0.0)
    tl.store(grad_x_ptr + tokens * N + rows, sum_x, mask=mask)
    tl.store(grad_y_ptr + tokens * N + columns, sum_y, mask=mask)


def gradient(grad_scores, experts, N):
    """What the gradients of the scores of k experts, (T, k), make of both factors': (T, N), summed in fp32."""
    num_tokens, k = grad_scores.shape
    dtype = grad_scores.dtype
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:  # the interpreter does not round to it
        grad_scores = grad_scores.float()
    grad_scores, experts = grad_scores.contiguous(), experts.contiguous()
    grad_x, grad_y = (torch.empty((num_tokens, N), dtype=grad_scores.dtype, device=experts.device) for _ in range(2))
    sizes = 32, triton.next_power_of_2(k), min(256, triton.next_power_of_2(N))
    store_kernel[(triton.cdiv(num_tokens, 32),)](grad_scores, experts, grad_x, grad_y, num_tokens, N, k, *sizes)
    return grad_x.to(dtype), grad_y.to(dtype)
