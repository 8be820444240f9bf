"""The gradient of the router, deterministic and without atomics.

Selected pair r of a token adds grad_scores[t, r] to grad_x[t, row] and to grad_y[t, column]. Several pairs of a token
may share a row, which is why the obvious kernel uses atomics and gives other bits on every run. Here one program owns
its tokens, so nothing needs them:

- on NVIDIA GPUs, from Ampere on, if rows are whole vectors: the output rows of a warp's tokens stand in shared memory,
  in fp32. One lane owns a row and adds the token's slots to it; then the warp rounds the rows and streams them out,
  each byte written once.
- elsewhere, many columns (N > k): each pair looks through its token's k pairs and sums those of its own row. Pairs
  that share a row find the same sum. The program stores zeros over its output rows, waits, and stores the sums:
  duplicates write equal bits, so the order of the stores cannot matter.
- elsewhere, few columns (N <= k): the output row is summed in registers, slot by slot, and stored once.

All add in slot order, starting from zero, so all give the bits of the sequential loop they stand for.

Of normalized scores (factored/softmax.py) a slot adds its gradient times its probability, or what the others leave of
it. And of a softmax over all experts every logit of a row loses its share of what the token's slots add: the program
reads the logits for it, and still writes each byte once.

Triton has no addressed access to shared memory, so the first kernel uses PTX instructions for it (factored/ptx.py).
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from .configs import device_of, kernel_input, on_nvidia, output_dtype
from .factored.plan import OVER_ALL, Launch, Launches, Plan, launch, new_matrices
from .factored.ptx import allocate_rows, load_words, store, sync_warp, unpack_words
from .factored.softmax import LOG2E, origin_of_row

ROW_WORDS = 4096  # sums a warp holds in shared memory at once, of both factors: of 16 KiB a dozen fit an H100's SM
MAX_TILE_M = 16  # tokens of a warp: a lane for each of their rows
MAX_TILE_K = 64  # slots of a token staged at once
AT_ONCE = tl.constexpr(8)  # steps whose logits a warp reads before it has written those before
TOKENS = 32  # of a program of the other kernels

_launches = Launches()


@dataclasses.dataclass(frozen=True)
class GradientPlan(Plan):
    """How the gradient is computed. dtype: of the gradients of the logits."""

    method: str  # "shared", "scatter" or "dense": the three above
    tokens: int  # of a program
    tile_n: int  # columns of a row that are summed, or cleared, at once
    tile_k: int  # slots of a token that are read at once

    def why(self):
        if self.method == "scatter":
            return f"scatter_kernel, since rows are longer than k: {self.tokens} tokens a program, pair by pair."
        if self.method == "dense":
            return f"dense_kernel, since rows are no longer than k: {self.tokens} tokens a program, row by row."
        rows = f"{self.tokens} rows of each factor" if self.pieces == 1 else f"{self.tile_n} columns of a row"
        return f"shared_kernel, since rows are whole vectors: a warp sums {rows} in shared memory."

    @property
    def kernel(self):
        return {"shared": shared_kernel, "scatter": scatter_kernel, "dense": dense_kernel}[self.method]

    @property
    def pieces(self):
        """The programs that share a row."""
        return -(-self.num_expert_sqrt // self.tile_n) if self.method == "shared" else 1

    def grid(self, num_tokens):
        return super().grid(num_tokens) * self.pieces

    @property
    def bytes_read(self):
        saved = 4 * self.saved_numbers if self.normalize else 0
        return super().bytes_written + saved + (super().bytes_read if self.sums_rows else 0)

    @property
    def bytes_written(self):
        return super().bytes_read


@triton.jit
def _given(grad_ptrs, saved_ptr, tokens, slots, num_tokens, mean, mask, PLAN):
    """What slots add to their rows and columns, fp32: the gradients of their scores, or, if those are normalized, of
    the sums. mean: of "topk", the mean of its gradients."""
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    if PLAN.has_weights:
        weights = saved_ptr + num_tokens.to(tl.int64) * 4 + tokens * PLAN.k + slots
        if PLAN.normalize == "topk":
            grad = tl.where(mask, grad - mean, 0.0)  # the mean may be NaN
        grad = tl.load(weights, mask=mask, other=0.0) * grad
    elif PLAN.sums_rows:
        largest_x, _ = _saved_of_rows(saved_ptr, tokens, 0, mask)
        largest_y, _ = _saved_of_rows(saved_ptr, tokens, 1, mask)
        masked = (largest_x == float("-inf")) | (largest_y == float("-inf"))
        grad = tl.where(masked & (largest_x + largest_y == float("-inf")), 0.0, grad)  # of no poisoned token
    return grad


@triton.jit
def _saved_of_rows(saved_ptr, tokens, factor, mask):
    """The largest logit and the total of tokens' rows of a factor, 0 or 1."""
    place = saved_ptr + tokens * 4 + factor * 2
    return tl.load(place, mask=mask, other=0.0), tl.load(place + 1, mask=mask, other=1.0)


@triton.jit
def _shares(saved_ptr, tokens, factor, given, mask):
    """origin and weight: a logit of the row loses exp(logit - origin) * weight."""
    largest, total = _saved_of_rows(saved_ptr, tokens, factor, mask)
    return origin_of_row(largest), tl.where(largest == float("-inf"), 0.0, given / total)


@triton.jit
def _load_numbers(address):
    """A tuple of 4 fp32 numbers."""
    return tl.tuple([word.to(tl.float32, bitcast=True) for word in load_words(address, 4)])


@triton.jit
def _add_in_order(addresses, values, masks):
    """Four lane-wise `memory[address] += value`, fp32, one after the other, at addresses no other lane touches.

    All four are read at once. Where an address comes up again, the sum just made takes the place of what was read.
    """
    before, sums = (), ()
    for i in tl.static_range(4):
        word = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.shared.f32 $0, [$1]; }",
            "=&f,r,r", [addresses[i], masks[i].to(tl.int32)], tl.float32, False, 1,
        )  # fmt: skip
        before = before + (word,)
    for i in tl.static_range(4):
        total = before[i]
        for j in tl.static_range(i):
            total = tl.where(addresses[i] == addresses[j], sums[j], total)
        sums = sums + (total + values[i],)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }",
            "=r,r,f,r", [addresses[i], sums[i], masks[i].to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def _store_sums(pointer, OFFSET, sums, mask, DTYPE):
    """Store a tuple of 4 fp32 sums, rounded to DTYPE, at pointer (an integer) + OFFSET elements."""
    START: tl.constexpr = OFFSET * (DTYPE.primitive_bitwidth // 8)
    if DTYPE == tl.float32:
        tl.inline_asm_elementwise(
            f"{{ .reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1+{START}], {{$2, $3, $4, $5}};"
            " mov.u32 $0, 0; }",
            "=r,l,f,f,f,f,r", [pointer, sums[0], sums[1], sums[2], sums[3], mask.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    else:
        PAIR: tl.constexpr = "bf16x2" if DTYPE == tl.bfloat16 else "f16x2"
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 low, high; setp.ne.s32 p, $6, 0;"
            f" cvt.rn.{PAIR}.f32 low, $3, $2; cvt.rn.{PAIR}.f32 high, $5, $4;"
            f" @p st.global.v2.b32 [$1+{START}], {{low, high}}; mov.u32 $0, 0; }}",
            "=r,l,f,f,f,f,r", [pointer, sums[0], sums[1], sums[2], sums[3], mask.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def _logits_ahead(x_ptr, y_ptr, start, some, end, PLAN):
    """The logits of the next steps, of which each lane has four columns: a tuple of words of x and of y for each. What
    is past the end is read from before it instead."""
    lane, words = tl.arange(0, 32), ()
    for first in tl.static_range(some, min(some + 128 * AT_ONCE, PLAN.tokens * PLAN.tile_n), 128):
        source = start + tl.minimum(first + lane * 4, end - 4)
        x_words = load_words((x_ptr + source).to(tl.int64), PLAN.itemsize)
        words = words + ((x_words, load_words((y_ptr + source).to(tl.int64), PLAN.itemsize)),)
    return words


@triton.jit
def _less_shares(sums, words, shares, PLAN):
    """Four sums without what their logits, in words, lose."""
    origin, weight, _, _ = _load_numbers(shares)
    logits = unpack_words(words, PLAN.element_ty)
    return tl.tuple([sums[i] - tl.exp2((logits[i] - origin) * LOG2E) * weight for i in tl.tuple(range(4))])


@triton.jit(do_not_specialize=["num_tokens"])
def shared_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr, x_ptr, y_ptr, saved_ptr,
    stride_gm, stride_gk,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    """One warp sums the rows of some tokens, or tile_n columns of those of one."""
    NUM_EXPERT_SQRT: tl.constexpr = PLAN.num_expert_sqrt
    TILE_M: tl.constexpr = PLAN.tokens
    TILE_K: tl.constexpr = PLAN.tile_k
    TILE_N: tl.constexpr = PLAN.tile_n
    num_experts_per_token = PLAN.k
    lane = tl.arange(0, 32)
    first_token = (tl.program_id(0) // PLAN.pieces).to(tl.int64) * TILE_M
    first_column = tl.program_id(0) % PLAN.pieces * TILE_N
    num_rows = tl.minimum(num_tokens - first_token, TILE_M).to(tl.int32)

    # Rows of neighbouring tokens are neighbours in memory too, so a tile of whole rows is one piece.
    own_logits = first_token * NUM_EXPERT_SQRT + first_column
    end = tl.minimum(num_rows * TILE_N, num_rows * NUM_EXPERT_SQRT - first_column)
    ALL: tl.constexpr = TILE_M * TILE_N
    STEPS: tl.constexpr = 128 * AT_ONCE if PLAN.sums_rows else ALL
    words = ()
    if PLAN.sums_rows:
        words = _logits_ahead(x_ptr, y_ptr, own_logits, 0, end, PLAN)

    # In shared memory: the rows of x, those of y; then of each token's slots the gradient, and the bytes to the row
    # and to the column. Tokens are an odd number of vectors apart, so that lanes that read down them do not collide.
    ROWS: tl.constexpr = TILE_M * TILE_N * 4
    SLOTS: tl.constexpr = (2 * ROWS + 511) // 512 * 512
    PITCH: tl.constexpr = (TILE_K + 4) * 4
    SHARES: tl.constexpr = SLOTS + 3 * TILE_M * PITCH
    buffer = allocate_rows(num_rows, SHARES + (512 if PLAN.sums_rows else 0))

    # A lane adds to one row: lane r to row r of x, lane TILE_M + r to row r of y.
    own_row = buffer + lane * (TILE_N * 4)
    own_grad = buffer + SLOTS + lane % TILE_M * PITCH
    own_offsets = own_grad + tl.where(lane < TILE_M, TILE_M, 2 * TILE_M) * PITCH
    rows = tl.arange(0, TILE_M)[:, None]
    slots = tl.arange(0, TILE_K)[None, :]
    place = buffer + SLOTS + rows * PITCH + slots * 4
    tokens = first_token + rows
    grad_ptrs = grad_ptr + tokens * stride_gm + slots.to(tl.int64) * stride_gk
    indices_ptrs = indices_ptr + tokens * num_experts_per_token + slots
    mean = 0.0
    if PLAN.normalize == "topk":
        sums = tl.zeros((TILE_M,), tl.float32)
        for start in range(0, num_experts_per_token, TILE_K):
            mask = (rows < num_rows) & (start + slots < num_experts_per_token)
            ptrs = grad_ptrs + (start + slots * 0).to(tl.int64) * stride_gk
            sums += tl.sum(_given(ptrs, saved_ptr, tokens, start + slots, num_tokens, 0.0, mask, PLAN), 1)
        mean = sums[:, None]
    mask = (rows < num_rows) & (slots < num_experts_per_token)
    grad = _given(grad_ptrs, saved_ptr, tokens, slots, num_tokens, mean, mask, PLAN)
    experts = tl.load(indices_ptrs, mask=mask, other=0)
    given = lane * 0.0
    zero = lane * 0
    for step in tl.static_range(SLOTS // 512):
        store(buffer + lane * 16 + step * 512, (zero, zero, zero, zero))
    for start in range(TILE_K, num_experts_per_token + TILE_K, TILE_K):
        sync_warp(lane)  # the slots before these have been added
        store(place, (grad.to(tl.int32, bitcast=True),))
        store(place + TILE_M * PITCH, ((experts // NUM_EXPERT_SQRT - first_column) * 4,))
        store(place + 2 * TILE_M * PITCH, ((experts % NUM_EXPERT_SQRT - first_column) * 4,))
        sync_warp(lane)
        mask = (rows < num_rows) & (start + slots < num_experts_per_token)
        ptrs = grad_ptrs + start.to(tl.int64) * stride_gk
        grad = _given(ptrs, saved_ptr, tokens, start + slots, num_tokens, mean, mask, PLAN)  # while these are added
        experts = tl.load(indices_ptrs + start, mask=mask, other=0)
        for step in tl.static_range(0, TILE_K, 4):
            offsets, values = load_words(own_offsets + step * 4, 4), _load_numbers(own_grad + step * 4)
            addresses, masks = (), ()
            for i in tl.static_range(4):
                given += values[i]
                mine = lane < 2 * TILE_M
                if TILE_N < NUM_EXPERT_SQRT:
                    mine = mine & (offsets[i] >= 0) & (offsets[i] < TILE_N * 4)
                addresses, masks = addresses + (own_row + offsets[i],), masks + (mine,)
            _add_in_order(addresses, values, masks)
    if PLAN.sums_rows:
        row, factor = lane % TILE_M, tl.minimum(lane // TILE_M, 1)
        origin, weight = _shares(saved_ptr, first_token + row, factor, given, row < num_rows)
        shares = [number.to(tl.int32, bitcast=True) for number in (origin, weight, weight, weight)]
        store(buffer + SHARES + lane * 16, shares)
    sync_warp(lane)

    DTYPE: tl.constexpr = grad_x_ptr.dtype.element_ty
    x_out = (grad_x_ptr + own_logits).to(tl.int64) + lane * 4 * (DTYPE.primitive_bitwidth // 8)
    y_out = (grad_y_ptr + own_logits).to(tl.int64) + lane * 4 * (DTYPE.primitive_bitwidth // 8)
    for some in tl.static_range(0, ALL, STEPS):
        now = words
        if PLAN.sums_rows and some + STEPS < ALL:
            words = _logits_ahead(x_ptr, y_ptr, own_logits, some + STEPS, end, PLAN)
        for first in tl.static_range(some, min(some + STEPS, ALL), 128):
            mask = first + lane * 4 < end
            x_sums = _load_numbers(buffer + lane * 16 + first * 4)
            y_sums = _load_numbers(buffer + lane * 16 + (ROWS + first * 4))
            if PLAN.sums_rows:
                row = tl.minimum((first + lane * 4) // TILE_N, TILE_M - 1)
                x_words, y_words = now[(first - some) // 128]
                x_sums = _less_shares(x_sums, x_words, buffer + SHARES + row * 16, PLAN)
                y_sums = _less_shares(y_sums, y_words, buffer + SHARES + (row + TILE_M) * 16, PLAN)
            _store_sums(x_out, first, x_sums, mask, DTYPE)
            _store_sums(y_out, first, y_sums, mask, DTYPE)


@triton.jit
def _load_slot(grad_ptr, indices_ptr, saved_ptr, tokens, slot, stride_gm, stride_gk, num_tokens, mean, mask, PLAN):
    """One slot of every token: what it adds and its expert."""
    slots = tl.zeros_like(tokens) + slot  # 64 bits, as slot * stride_gk may need them
    grad_ptrs = grad_ptr + tokens * stride_gm + slots * stride_gk
    grad = _given(grad_ptrs, saved_ptr, tokens, slots, num_tokens, mean, mask, PLAN)
    return grad, tl.load(indices_ptr + tokens * PLAN.k + slot, mask=mask, other=0)


@triton.jit
def _mean_and_shares(grad_ptr, indices_ptr, saved_ptr, tokens, stride_gm, stride_gk, num_tokens, mask, PLAN):
    """The mean of the gradients of "topk", else 0; and of both factors' rows the shares, if they have any."""
    given = tl.full((PLAN.tokens,), 0.0, tl.float32)
    if PLAN.normalize is not None:
        for slot in range(PLAN.k):
            given += _load_slot(
                grad_ptr, indices_ptr, saved_ptr, tokens, slot, stride_gm, stride_gk, num_tokens, 0.0, mask, PLAN
            )[0]  # fmt: skip
    if PLAN.sums_rows:
        of_x, of_y = _shares(saved_ptr, tokens, 0, given, mask), _shares(saved_ptr, tokens, 1, given, mask)
        return given * 0.0, of_x, of_y
    else:
        return given, (given,), (given,)


@triton.jit
def _lost(logits_ptr, offsets, shares, mask, PLAN):
    """What logits, [tokens, columns], lose."""
    if not PLAN.sums_rows:
        return 0.0
    else:
        origin, weight = shares
        logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        return tl.exp2((logits - origin[:, None]) * LOG2E) * weight[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def scatter_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr, x_ptr, y_ptr, saved_ptr,
    stride_gm, stride_gk,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    num_expert_sqrt, num_experts_per_token = PLAN.num_expert_sqrt, PLAN.k
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    in_batch = tokens < num_tokens
    mean, x_shares, y_shares = _mean_and_shares(
        grad_ptr, indices_ptr, saved_ptr, tokens, stride_gm, stride_gk, num_tokens, in_batch, PLAN
    )  # fmt: skip
    zeros = tl.full((PLAN.tokens, PLAN.tile_n), 0.0, tl.float32)
    for start in range(0, num_expert_sqrt, PLAN.tile_n):
        columns = start + tl.arange(0, PLAN.tile_n)
        mask = in_batch[:, None] & (columns < num_expert_sqrt)[None, :]
        offsets = tokens[:, None] * num_expert_sqrt + columns[None, :]
        x_grad = zeros - _lost(x_ptr, offsets, x_shares, mask, PLAN)
        y_grad = zeros - _lost(y_ptr, offsets, y_shares, mask, PLAN)
        tl.store(grad_x_ptr + offsets, x_grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_y_ptr + offsets, y_grad.to(grad_y_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the sums below must land on these, not under them

    for start in range(0, num_experts_per_token, PLAN.tile_k):
        slots = start + tl.arange(0, PLAN.tile_k)
        mask = in_batch[:, None] & (slots < num_experts_per_token)[None, :]
        experts = tl.load(indices_ptr + tokens[:, None] * num_experts_per_token + slots[None, :], mask=mask, other=0)
        rows, columns = experts // num_expert_sqrt, experts % num_expert_sqrt
        sum_x = tl.full((PLAN.tokens, PLAN.tile_k), 0.0, tl.float32)
        sum_y = tl.full((PLAN.tokens, PLAN.tile_k), 0.0, tl.float32)
        for slot in range(num_experts_per_token):
            grad, expert = _load_slot(
                grad_ptr, indices_ptr, saved_ptr, tokens, slot, stride_gm, stride_gk, num_tokens, mean, in_batch, PLAN
            )
            sum_x += tl.where(rows == (expert // num_expert_sqrt)[:, None], grad[:, None], 0.0)
            sum_y += tl.where(columns == (expert % num_expert_sqrt)[:, None], grad[:, None], 0.0)
        row_start = tokens[:, None] * num_expert_sqrt
        sum_x -= _lost(x_ptr, row_start + rows, x_shares, mask, PLAN)
        sum_y -= _lost(y_ptr, row_start + columns, y_shares, mask, PLAN)
        tl.store(grad_x_ptr + row_start + rows, sum_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_y_ptr + row_start + columns, sum_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def dense_kernel(
    grad_ptr, indices_ptr, grad_x_ptr, grad_y_ptr, x_ptr, y_ptr, saved_ptr,
    stride_gm, stride_gk,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    num_expert_sqrt, num_experts_per_token = PLAN.num_expert_sqrt, PLAN.k
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    in_batch = tokens < num_tokens
    mean, x_shares, y_shares = _mean_and_shares(
        grad_ptr, indices_ptr, saved_ptr, tokens, stride_gm, stride_gk, num_tokens, in_batch, PLAN
    )  # fmt: skip
    for start in range(0, num_expert_sqrt, PLAN.tile_n):
        columns = start + tl.arange(0, PLAN.tile_n)
        sum_x = tl.full((PLAN.tokens, PLAN.tile_n), 0.0, tl.float32)
        sum_y = tl.full((PLAN.tokens, PLAN.tile_n), 0.0, tl.float32)
        for slot in range(num_experts_per_token):
            grad, expert = _load_slot(
                grad_ptr, indices_ptr, saved_ptr, tokens, slot, stride_gm, stride_gk, num_tokens, mean, in_batch, PLAN
            )
            sum_x += tl.where((expert // num_expert_sqrt)[:, None] == columns[None, :], grad[:, None], 0.0)
            sum_y += tl.where((expert % num_expert_sqrt)[:, None] == columns[None, :], grad[:, None], 0.0)
        mask = in_batch[:, None] & (columns < num_expert_sqrt)[None, :]
        offsets = tokens[:, None] * num_expert_sqrt + columns[None, :]
        sum_x -= _lost(x_ptr, offsets, x_shares, mask, PLAN)
        sum_y -= _lost(y_ptr, offsets, y_shares, mask, PLAN)
        tl.store(grad_x_ptr + offsets, sum_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_y_ptr + offsets, sum_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


def backward(
    grad_scores, indices, num_expert_sqrt, dtype=None, out=None, normalize=None, logits=(None, None), saved=None
):
    """The gradients of both factors, from the gradient of the scores. Any k; the same bits on every run.

    Args:
        grad_scores: (num_tokens, k), fp32, fp16 or bf16, on a GPU (or on the CPU under Triton's interpreter), any
            strides, at least one token.
        indices: (num_tokens, k), int32, contiguous, as the forward pass returned them.
        num_expert_sqrt: N.
        dtype: of the gradients: fp32, fp16 or bf16; grad_scores' unless given.
        out: what may be written and returned: grad_x and grad_y, contiguous, from multiples of 16 bytes on.
        normalize: what became of the scores, and if anything did:
        logits: x and y, (num_tokens, N), in dtype, any strides.
        saved: what the forward pass saved (factored/plan.py).

    Returns:
        grad_x, grad_y: (num_tokens, N), accumulated in fp32 and rounded once.
    """
    grad, (num_tokens, k), dtype = grad_scores, grad_scores.shape, dtype or grad_scores.dtype
    if grad.is_neg():  # a sign that PyTorch has put off
        grad = grad.resolve_neg()
    strides, x, y = grad.stride(), *map(_in_vectors, logits)
    problem = (grad.get_device(), num_expert_sqrt, k, grad.dtype, dtype, strides, grad.data_ptr() % 16,
               indices.data_ptr() % 16, num_tokens >> 31, normalize)  # fmt: skip
    known = _launches.get(problem)
    if known is None:
        plan = plan_for(grad, num_expert_sqrt, dtype, normalize)
        if not on_nvidia(grad.device):
            return run(plan, grad, indices, (x, y), saved)
        known = Launch(plan, grad.get_device())
        _launches.keep(problem, known)
    grad_x, grad_y = out = out or new_matrices(grad, num_tokens, num_expert_sqrt, dtype, dtype)
    known((grad, indices, grad_x, grad_y, x, y, saved), *strides, num_tokens)
    return out


def _in_vectors(logits):
    """Contiguous rows, from a multiple of 16 bytes on; None stays None."""
    if logits is None or (logits.is_contiguous() and logits.data_ptr() % 16 == 0 and not logits.is_neg()):
        return logits
    return logits.resolve_neg().clone(memory_format=torch.contiguous_format)


def run(plan, grad_scores, indices, logits=(None, None), saved=None):
    """The gradients of both factors by a plan, that of `plan_for` or another."""
    grad, shape = kernel_input(grad_scores), (len(grad_scores), plan.num_expert_sqrt)
    grad_x, grad_y = (torch.empty(shape, dtype=output_dtype(plan.dtype), device=grad.device) for _ in range(2))
    with device_of(grad):
        x, y = (part if part is None else kernel_input(part) for part in logits)
        launch(plan, grad, indices, grad_x, grad_y, x, y, saved, *grad.stride(), len(grad))
    return grad_x.to(plan.dtype), grad_y.to(plan.dtype)


def plan_for(grad_scores, num_expert_sqrt, dtype, normalize=None):
    """The plan for a gradient of some scores and logits of a dtype."""
    k, whole_vectors = grad_scores.shape[1], num_expert_sqrt % 4 == 0
    shared = whole_vectors and on_nvidia(grad_scores.device)
    return plan_of(num_expert_sqrt, k, dtype, grad_scores.dtype, shared, normalize)


@functools.cache
def plan_of(num_expert_sqrt, k, dtype, scores_dtype, shared, normalize=None):
    """The plan of a problem; shared: whether shared_kernel takes it."""
    problem = num_expert_sqrt, k, dtype, scores_dtype
    if shared:  # as many whole rows as fit, or a piece of one; no slot is staged by two lanes
        # Who reads logits as well is faster with half the rows.
        words = ROW_WORDS // 2 if normalize in OVER_ALL else ROW_WORDS
        tokens = min(max(words // (2 * triton.next_power_of_2(num_expert_sqrt)), 1), MAX_TILE_M)
        tile_k = min(max(triton.next_power_of_2(k), 4, 32 // tokens), MAX_TILE_K)
        sizes = "shared", tokens, min(num_expert_sqrt, ROW_WORDS // 2), tile_k
        return GradientPlan(*problem, 1, *sizes, normalize=normalize)
    if num_expert_sqrt > k:
        return GradientPlan(*problem, 4, "scatter", TOKENS, 128, 16, normalize=normalize)
    return GradientPlan(*problem, 4, "dense", TOKENS, 64, 1, normalize=normalize)
