"""The functions people call: they check their arguments and call their kernels through operators.py."""

from torch import Tensor
from torch.compiler import is_compiling

from . import backward, factored, forward, original, reference, split_forward
from .checks import check, check_expert_sqrt, check_scores_dtype
from .operators import Router, assume_same_tokens, is_ordinary, is_plain


def omni_router(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None):
    """Select the k best of N² experts for every token, exactly, by the fastest path for the shape and device.

    Expert i * N + j scores x[t, i] + y[t, j], summed in fp32. Equal scores put the lower index first. `-inf` masks a
    row or a column of experts: such pairs come last. A token with NaN or +inf among its logits has NaN or +inf among
    its scores and valid indices.

    torch.compile(fullgraph=True), torch.export, CUDA graphs and the transforms of torch.func take it as it is (vmap
    folds its dimension into the tokens). Autocast leaves it alone: it routes in the dtype it is given.

    Args:
        router_logits_x: (num_tokens, N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340.
        router_logits_y: the same shape, dtype and device.
        num_experts_per_token: k, from 0 to N². Kernels route up to 256 on NVIDIA GPUs (from Ampere on) and up to
            64 elsewhere, PyTorch what is beyond.
        scores_dtype: of the scores, fp32, fp16 or bf16; the logits' unless given. fp32 keeps the sums of 16-bit logits
            as they are, and the gradients that come back for them too, until the sums of those are rounded once.

    Returns:
        scores: (num_tokens, k), best first, rounded once to their dtype. Differentiable: the gradient of a pair goes to
            its row of x and its column of y, accumulated in fp32, returned in the logits' dtype. It is linear, so a
            second derivative with respect to the logits is zero; one with respect to the incoming gradient is a gather.
            Forward-mode derivatives too: the tangent of a pair is the sum of its row's and its column's.
        indices: (num_tokens, k), int32, distinct within a token.

    Raises:
        TypeError: a logits argument is no dense floating point tensor, num_experts_per_token no integer, or
            scores_dtype none of the three.
        ValueError: shapes, dtypes or devices differ, or a size is out of range.
    """
    if scores_dtype is None and is_compiling() and is_ordinary(router_logits_x, router_logits_y, num_experts_per_token):
        return _TRACED(router_logits_x, router_logits_y, num_experts_per_token, router_logits_x.dtype)
    k, plain = _check(router_logits_x, router_logits_y, num_experts_per_token)
    if scores_dtype is None:
        scores_dtype = router_logits_x.dtype
    else:
        check_scores_dtype(scores_dtype)
    return _OMNI_ROUTER(router_logits_x, router_logits_y, k, scores_dtype, plain)


def triton_omni_router_func(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The original version, the baseline: from all N² sums, with gradients by atomics.

    Args:
        router_logits_x, router_logits_y: as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². From N = original.SPLIT_FROM on, more than
            original.MAX_SPLIT_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    k, plain = _check(router_logits_x, router_logits_y, num_experts_per_token)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    return _ORIGINAL(router_logits_x, router_logits_y, k, router_logits_x.dtype, plain)


def triton_omni_router_func_optimized(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The guide's optimized version: from all N² sums, in one tile or streamed, with gradients free of atomics.

    Args:
        router_logits_x, router_logits_y: as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². Above N = forward.MAX_EXPERT_SQRT, more than
            split_forward.MAX_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    k, plain = _check(router_logits_x, router_logits_y, num_experts_per_token)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    return _OPTIMIZED(router_logits_x, router_logits_y, k, router_logits_x.dtype, plain)


def _check(x, y, k):
    """Raises unless the arguments are right; k as an int, and whether x and y are plain."""
    plain = is_plain(x, y)
    if not plain and isinstance(x, Tensor) and isinstance(y, Tensor):
        assume_same_tokens(x, y)
    return check(x, y, k), plain


def _forward_original(x, y, k, *_):
    return original.original_forward(x, y, k)


def _backward_original(grad_scores, indices, num_expert_sqrt, *_):
    return original.original_backward(grad_scores, indices, num_expert_sqrt)


def _forward_optimized(x, y, k, *_):
    if x.shape[1] <= forward.MAX_EXPERT_SQRT:
        return forward.forward(x, y, k)
    if k <= split_forward.MAX_EXPERTS_PER_TOKEN:
        return split_forward.split_forward(x, y, k)
    return reference.eager_router(x, y, k)


_OMNI_ROUTER = Router("omni_router", factored.factored_forward, backward.backward)
_TRACED = _OMNI_ROUTER.operator
_ORIGINAL = Router("triton_omni_router_func", _forward_original, _backward_original)
_OPTIMIZED = Router("triton_omni_router_func_optimized", _forward_optimized, backward.backward)
