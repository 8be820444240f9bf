"""The kernel that keeps as many of a token's experts as it needs (../adaptive.py): a prefix, since they are sorted."""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ..configs import device_of, on_nvidia, output_dtype
from .plan import Launch, Launches, SlotsPlan, launch, tile_of_slots

MAX_EXPERTS_PER_TOKEN = 256
ONE = tl.constexpr(2.0**60)  # of a probability as an integer: those down to 2**-37 are such integers exactly

_launches = Launches()


@dataclasses.dataclass(frozen=True)
class PrefixPlan(SlotsPlan):
    """How prefix_kernel is launched."""

    limit: str  # "top_p", "min_p" or "threshold"

    @property
    def kernel(self):
        return prefix_kernel


@triton.jit(do_not_specialize=["value", "whole", "num_tokens"])
def prefix_kernel(
    probabilities_ptr, experts_ptr, scores_ptr, indices_ptr, counts_ptr,
    value: tl.float32, whole: tl.int64,
    num_tokens,
    PLAN: tl.constexpr,
):  # fmt: skip
    """whole: the least integer sum of probabilities that is no longer below a top_p."""
    tokens = tl.program_id(0).to(tl.int64) * PLAN.tokens + tl.arange(0, PLAN.tokens)
    slots = tl.arange(0, PLAN.tile_k)[None, :]
    in_batch = tokens < num_tokens
    mask = in_batch[:, None] & (slots < PLAN.k)
    places = tokens[:, None] * PLAN.k + slots
    scores = tl.load(probabilities_ptr + places, mask=mask, other=0.0)
    experts = tl.load(experts_ptr + places, mask=mask, other=-1)
    ends = scores == 0
    if PLAN.limit == "threshold":
        ends = ends | (scores < value)
    elif PLAN.limit == "min_p":
        ends = ends | (scores < tl.sum(tl.where(slots == 0, scores, 0.0), 1)[:, None] * value)
    else:
        integers = (tl.where(scores == scores, scores, 0.0) * ONE).to(tl.int64)
        ends = ends | (tl.cumsum(integers, 1) - integers >= whole)
    counts = tl.min(tl.where(ends, slots, PLAN.k), 1)
    kept = slots < counts[:, None]
    scores = tl.where(kept, scores, 0.0).to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + places, scores, mask=mask)
    tl.store(indices_ptr + places, tl.where(kept, experts, -1), mask=mask)
    tl.store(counts_ptr + tokens, counts, mask=in_batch)


def takes(scores):
    """Whether the kernel takes so many tokens and experts."""
    return scores.numel() > 0 and scores.shape[-1] <= MAX_EXPERTS_PER_TOKEN


def keep_prefix(probabilities, experts, limit, value, scores_dtype):
    """Of the k best experts of tokens those that are needed.

    Args:
        probabilities: (..., k), fp32, best first, from a router; contiguous, as experts. At least one.
        experts: (..., k), int32.
        limit, value: the rule of `adaptive.adaptive_router`.
        scores_dtype: fp32, fp16 or bf16.

    Returns:
        scores in scores_dtype, indices and counts, as `adaptive.adaptive_router` returns them.
    """
    k = probabilities.shape[-1]
    num_tokens = probabilities.numel() // k
    scores = torch.empty_like(probabilities, dtype=output_dtype(scores_dtype))
    indices, counts = torch.empty_like(experts), experts.new_empty(experts.shape[:-1])
    tensors = probabilities, experts, scores, indices, counts
    numbers = value, _whole(value) if limit == "top_p" else 0, num_tokens
    problem = probabilities.get_device(), k, limit, scores_dtype, num_tokens >> 31
    known = _launches.get(problem)
    if known is None:
        plan = PrefixPlan(0, k, torch.float32, scores_dtype, 4, *tile_of_slots(k), limit)
        if not on_nvidia(probabilities.device):
            with device_of(probabilities):
                launch(plan, *tensors, *numbers)
            return scores.to(scores_dtype), indices, counts
        known = Launch(plan, probabilities.get_device())
        _launches.keep(problem, known)
    known(tensors, *numbers)
    return scores, indices, counts


@functools.lru_cache(64)
def _whole(top_p):
    """The least integer that as a double is no longer below top_p * ONE; at 1 and above everything is kept."""
    if top_p >= 1:
        return (1 << 63) - 1
    limit = top_p * ONE.value
    low, high = int(limit) - 256, int(limit) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if float(middle) >= limit else (middle, high)
    return high
