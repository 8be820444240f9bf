"""The kernel that normalizes the scores of experts chosen before, with the numbers of a selection of as many."""

import dataclasses
import functools

import triton
import triton.language as tl

from .plan import SlotsPlan, tile_of_slots
from .softmax import as_integer, normalized, ratio_of_pair, scales_of_scores, total_of_integers


@dataclasses.dataclass(frozen=True)
class ReplayPlan(SlotsPlan):
    """How replay_kernel is launched."""

    @property
    def kernel(self):
        return replay_kernel


@triton.jit(do_not_specialize=["num_tokens"])
def replay_kernel(
    x_ptr, y_ptr, scores_ptr, indices_ptr, saved_ptr,
    stride_xm, stride_xn, stride_ym, stride_yn,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Reads what a selection saved of rows (plan.py), and saves its weights in their place."""
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    slots = tl.arange(0, PLAN.tile_k)
    mask = (tokens < num_tokens)[:, None] & (slots < PLAN.k)[None, :]
    outputs = tokens[:, None] * PLAN.k + slots[None, :]
    experts = tl.load(indices_ptr + outputs, mask=mask, other=0)
    rows, columns = (experts // PLAN.num_expert_sqrt).to(tl.int64), (experts % PLAN.num_expert_sqrt).to(tl.int64)
    x = tl.load(x_ptr + tokens[:, None] * stride_xm + rows * stride_xn, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + tokens[:, None] * stride_ym + columns * stride_yn, mask=mask, other=0.0).to(tl.float32)
    of_rows, in_batch = saved_ptr + tokens * 4, tokens < num_tokens
    first_x, total_x = tl.load(of_rows, mask=in_batch, other=0.0), tl.load(of_rows + 1, mask=in_batch, other=1.0)
    first_y, total_y = tl.load(of_rows + 2, mask=in_batch, other=0.0), tl.load(of_rows + 3, mask=in_batch, other=1.0)
    best, total = first_x + first_y, total_x * total_y
    if PLAN.normalize == "topk":  # from the best of these, which may be far from the best of all
        sums = tl.where(mask & (x + y == x + y), x + y, float("-inf"))  # NaN shows in the best of all
        is_first = slots[None, :] == tl.argmax(sums, 1, tie_break_left=True)[:, None]
        first_x, first_y = tl.sum(tl.where(is_first, x, 0.0), 1), tl.sum(tl.where(is_first, y, 0.0), 1)
    high, low = ratio_of_pair(x, y, first_x[:, None], first_y[:, None])
    if PLAN.normalize == "topk":
        total = total_of_integers(tl.sum(tl.where(mask, as_integer(high, low), 0), 1))
    scales = scales_of_scores(total[:, None], best[:, None], first_x[:, None], first_y[:, None], PLAN)
    scores = normalized(high, low, scales, PLAN)
    tl.store(scores_ptr + outputs, scores.to(scores_ptr.dtype.element_ty), mask=mask)
    if PLAN.has_weights:
        tl.store(saved_ptr + num_tokens.to(tl.int64) * 4 + outputs, scores, mask=mask)


@functools.cache
def plan_of(num_expert_sqrt, k, dtype, scores_dtype, normalize):
    """The plan of a problem."""
    return ReplayPlan(num_expert_sqrt, k, dtype, scores_dtype, 4, *tile_of_slots(k), normalize=normalize)
