"""The functions people call: checks, dispatch to a kernel or to PyTorch, and autograd."""

import torch

from . import backward, factored, forward, original, reference, split_forward
from .configs import has_kernels

MAX_EXPERT_SQRT = 46340  # the largest N whose N² expert indices fit in int32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def omni_router(router_logits_x, router_logits_y, num_experts_per_token):
    """Select the k best of N² experts for every token, exactly, by the fastest path for the shape and device.

    Expert i * N + j scores x[t, i] + y[t, j], summed in fp32. Equal scores put the lower index first. `-inf` masks a
    row or a column of experts: such pairs come last. A token with NaN or +inf among its logits has NaN or +inf among
    its scores and valid indices.

    Args:
        router_logits_x: (num_tokens, N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340.
        router_logits_y: the same shape, dtype and device.
        num_experts_per_token: k, from 0 to N². Up to factored.MAX_EXPERTS_PER_TOKEN a kernel routes, beyond it PyTorch.

    Returns:
        scores: (num_tokens, k), best first, in the logits' dtype, rounded once. Differentiable: the gradient of a pair
            goes to its row of x and its column of y, accumulated in fp32.
        indices: (num_tokens, k), int32, distinct within a token.

    Raises:
        TypeError: a logits argument is no floating point tensor, or num_experts_per_token no integer.
        ValueError: shapes, dtypes or devices differ, or a size is out of range.
    """
    _check(router_logits_x, router_logits_y, num_experts_per_token)
    return _Route.apply(router_logits_x, router_logits_y, num_experts_per_token, _fastest_forward, backward.backward)


def _fastest_forward(x, y, k):
    route = factored.factored_forward if k <= factored.MAX_EXPERTS_PER_TOKEN else reference.factored_router
    return route(x, y, k)


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
    _check(router_logits_x, router_logits_y, num_experts_per_token)
    _check_expert_sqrt(num_expert_sqrt, router_logits_x)
    route, route_backward = original.original_forward, original.original_backward
    return _Route.apply(router_logits_x, router_logits_y, num_experts_per_token, route, route_backward)


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
    _check(router_logits_x, router_logits_y, num_experts_per_token)
    _check_expert_sqrt(num_expert_sqrt, router_logits_x)
    if num_expert_sqrt <= forward.MAX_EXPERT_SQRT:
        route = forward.forward
    elif num_experts_per_token <= split_forward.MAX_EXPERTS_PER_TOKEN:
        route = split_forward.split_forward
    else:
        route = reference.factored_router
    return _Route.apply(router_logits_x, router_logits_y, num_experts_per_token, route, backward.backward)


class _Route(torch.autograd.Function):
    """Ties a forward function to a backward one, which needs the indices alone; PyTorch stands in without kernels."""

    @staticmethod
    def forward(ctx, x, y, k, route, route_backward):
        if len(x) and k:
            scores, indices = (route if has_kernels(x) else reference.factored_router)(x, y, k)
        else:
            scores, indices = x.new_empty((len(x), k)), torch.empty((len(x), k), dtype=torch.int32, device=x.device)
        ctx.save_for_backward(indices)
        ctx.num_expert_sqrt, ctx.route_backward = x.shape[1], route_backward
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_scores, _):
        (indices,) = ctx.saved_tensors
        run = ctx.route_backward if has_kernels(grad_scores) and len(indices) else reference.backward_router
        return *run(grad_scores, indices, ctx.num_expert_sqrt), None, None, None


def _check(x, y, k):
    for name, logits in (("router_logits_x", x), ("router_logits_y", y)):
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
        if logits.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {logits.dtype}")
        if logits.ndim != 2:
            raise ValueError(f"{name} must be 2-D (num_tokens, num_expert_sqrt), got shape {tuple(logits.shape)}")
    for what, got_x, got_y in (
        ("shape", tuple(x.shape), tuple(y.shape)),
        ("dtype", x.dtype, y.dtype),
        ("device", x.device, y.device),
    ):
        if got_x != got_y:
            raise ValueError(f"router_logits_y must have the {what} of router_logits_x, {got_x}, got {got_y}")
    num_expert_sqrt = x.shape[1]
    if not 1 <= num_expert_sqrt <= MAX_EXPERT_SQRT:
        raise ValueError(
            f"router_logits_x must have 1 to {MAX_EXPERT_SQRT} columns (num_expert_sqrt), got shape {tuple(x.shape)}"
        )
    _check_integer("num_experts_per_token", k)
    if not 0 <= k <= num_expert_sqrt**2:
        raise ValueError(f"num_experts_per_token must be from 0 to num_expert_sqrt² = {num_expert_sqrt**2}, got {k}")


def _check_expert_sqrt(num_expert_sqrt, x):
    _check_integer("num_expert_sqrt", num_expert_sqrt)
    if num_expert_sqrt != x.shape[1]:
        raise ValueError(f"num_expert_sqrt must be the logits' number of columns, {x.shape[1]}, got {num_expert_sqrt}")


def _check_integer(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
