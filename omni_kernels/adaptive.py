"""As many experts for a token as it needs, and the chosen pairs of tokens and experts grouped by expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .checks import check, check_limit, check_pairs, check_scores_dtype, check_values
from .factored import prefix
from .operators import assume_same_tokens, is_distributed, is_plain
from .router import omni_router, route_distributed


def adaptive_router(
    router_logits_x,
    router_logits_y,
    max_experts_per_token,
    *,
    top_p=None,
    min_p=None,
    threshold=None,
    scores_dtype=None,
):
    """Select as many of the k best of N² experts as a token needs: few where the router is sure, more where it is not.

    Routes as `omni_router` does with normalize="softmax", true probabilities among all N² experts, best first. Of these
    k the first `counts` are kept. Exactly one argument says how many:

        top_p:      as few as have a sum of at least top_p, but one at least; all k where that is not reached. 1 keeps
                    all k, whatever rounding makes of the sum.
        min_p:      those that have at least min_p times the probability of the first.
        threshold:  those that have at least that probability; there may be none.

    An expert is kept only if all before it are. Only where fp32 makes different sums of logits equal can a probability
    be larger than the one before it; min_p and threshold then end at the first that is too small.

    Probabilities are compared in fp32, within 2e-6 of themselves, and rounded to scores_dtype last. Their sums are
    those of the fp32 numbers, exact to k · 2⁻⁶⁰. What has probability 0 in fp32 is not kept, so no masked expert is: a
    token whose row of x or of y is masked altogether has count 0. A kept score may still round to 0 in fp16. A token
    with NaN or +inf among its logits shows it: it keeps all k, with NaN for every score and valid indices.

    Nothing waits for the GPU. Compilers, export, CUDA graphs and transforms take it as they take `omni_router`. Of
    DTensors the results are DTensors, as from `sharded_router`.

    top_p is nucleus sampling (Holtzman et al., 2020) in a router, as in dynamic routing (Huang et al., 2024, "Harder
    Tasks Need More Experts"); min_p is min-p sampling (Nguyen et al., 2024).

    Args:
        router_logits_x: (..., N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340.
        router_logits_y: the same shape, dtype and device.
        max_experts_per_token: k, from 0 to N².
        top_p, min_p, threshold: one float above 0 and at most 1, the others None.
        scores_dtype: of the scores, fp32, fp16 or bf16; the logits' unless given.

    Returns:
        scores: (..., k), best first, 0 from the count on. Differentiable as those of `omni_router`; counts have no
            derivative, and what is not kept gives no gradient.
        indices: (..., k), int32, -1 from the count on.
        counts: (...), int32, from 0 to k.

    Raises:
        TypeError: as `omni_router`, or the one argument is no float or int.
        ValueError: as `omni_router`, none or several of the three are given, or the one is out of range.
    """
    x, y = router_logits_x, router_logits_y

    def check_all():
        check_limit(top_p=top_p, min_p=min_p, threshold=threshold)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            assume_same_tokens(x, y)
        k = check(x, y, max_experts_per_token, "max_experts_per_token")
        check_scores_dtype(scores_dtype)
        return k

    def keep(scores, indices):
        limit = check_limit(top_p=top_p, min_p=min_p, threshold=threshold)
        if (
            not scores.requires_grad
            and is_plain(scores, indices)
            and operators.has_kernels(scores)
            and prefix.takes(scores)
        ):
            return prefix.keep_prefix(scores, indices, *limit, scores_dtype or x.dtype)
        dropped = _dropped(scores.detach(), *limit)
        scores = scores.masked_fill(dropped, 0.0).to(scores_dtype or x.dtype)
        return scores, indices.masked_fill(dropped, -1), (~dropped).sum(-1, dtype=torch.int32)

    if is_distributed(x, y):
        from .sharded import on_local_tokens  # half a second that others need not wait

        facts = {"scores_dtype": scores_dtype, "top_p": top_p, "min_p": min_p, "threshold": threshold}
        results = route_distributed(x, y, max_experts_per_token, torch.float32, "softmax", check_all, facts)
        return on_local_tokens(keep, *results)
    return keep(*omni_router(x, y, check_all(), scores_dtype=torch.float32, normalize="softmax"))


def _dropped(scores, limit, value):
    """Which of the probabilities, (..., k), fp32, come from the count on. NaN is never too small."""
    if limit == "threshold":
        too_much = scores < value
    elif limit == "min_p":
        too_much = scores < scores[..., :1] * value
    elif value < 1:
        too_much = _sums_before(scores) >= value
    else:  # rounded, they may have a sum of 1 before the last
        too_much = False
    return ((scores == 0) | too_much).cumsum(-1) > 0


def _sums_before(scores):
    """The sum of all probabilities before each, fp64. Added as integers: PyTorch promises no order of adding floats."""
    one = prefix.ONE.value
    integers = (scores.nan_to_num(0.0).double() * one).long()
    return (integers.cumsum(-1) - integers).double() / one


class ExpertGroups(NamedTuple):
    """Pairs of a token and an expert, grouped by expert: expert e has those from offsets[e] to offsets[e + 1]. Within
    an expert they are in the order of tokens. From offsets[-1] on there is padding, so that the length is static.

    tokens: (num_tokens * k,), int32, the token of every pair; -1 of padding.
    scores: (num_tokens * k,), its score; 0 of padding.
    offsets: (num_experts + 1,), int32. offsets[1:] are the ends of groups that PyTorch's grouped_mm takes.
    positions: (..., k), int64, where a token's k pairs are among them. groups.scores[groups.positions] are the scores
        that came, and so a token's outputs are found and added up without atomics. What was not kept is in the padding.
    """

    tokens: Tensor
    scores: Tensor
    offsets: Tensor
    positions: Tensor


def to_csr(scores, indices, counts, num_experts):
    """Group the experts that a router chose for tokens into the tokens that every expert has, for grouped kernels.

    The rows of this sparse matrix are experts, as in MegaBlocks (Gale et al., 2023). Experts are sorted, stably, and
    nothing is added up: no atomics, the same result on every run. Nothing waits for the GPU. Compilers and transforms
    take it as it is; vmap searches once for every part of a batch.

    Args:
        scores: (..., k), fp32, fp16 or bf16, on a GPU or the CPU. Leading dimensions, however many, are of tokens, and
            tokens are numbered as if these were one.
        indices: the same shape and device, int32 or int64, from 0 to num_experts - 1; -1 is no expert.
        counts: (...), the same device, int32 or int64, from 0 to k: how many of a token's experts to take, the first
            ones. None takes all k. From the count on an index may be anything.
            Indices and counts are looked at on the CPU, in eager mode. Elsewhere an index out of range is no expert.
        num_experts: from 1 to 2³¹ - 1; N² of a router.

    Returns:
        An `ExpertGroups`, scores in their dtype. They are a permutation of those that are taken, so the gradient is the
        same permutation backwards, a gather.

    Raises:
        TypeError: scores, indices or counts are no dense tensors of such dtypes, or num_experts is no integer.
        ValueError: shapes or devices differ, there are more than 2³¹ - 1 pairs, num_experts is out of range, or, where
            they are looked at, an index or a count is.
    """
    num_experts = check_pairs(scores, indices, counts, num_experts)
    k = scores.shape[-1]
    taken = torch.ones_like(indices, dtype=torch.bool)
    if counts is not None:
        taken = torch.arange(k, device=scores.device) < counts[..., None]
    if scores.device.type == "cpu" and all(is_plain(scores, part) for part in (indices, counts) if part is not None):
        check_values("indices", indices.masked_fill(~taken, -1), -1, num_experts - 1)
        if counts is not None:
            check_values("counts", counts, 0, k)

    taken = taken & (indices >= 0) & (indices < num_experts)
    experts = indices.masked_fill(~taken, num_experts).int().flatten()  # padding sorts last
    experts, pairs = experts.sort(stable=True)
    tokens = (pairs // max(k, 1)).int().masked_fill(experts == num_experts, -1)
    every_expert = torch.arange(num_experts + 1, dtype=torch.int32, device=scores.device)
    offsets = torch.searchsorted(experts, every_expert, out_int32=True)
    positions = pairs.scatter(0, pairs, torch.arange(pairs.numel(), device=pairs.device))  # the inverse permutation
    scores = scores.masked_fill(~taken, 0.0).flatten()
    # A gather of pairs would do, but its gradient would be added up by atomics; the gradient of this is a gather.
    scores = torch.empty_like(scores).scatter(0, positions, scores)
    return ExpertGroups(tokens, scores, offsets, positions.view(indices.shape))
