"""The exact factored router: the k best of each factor, then the k best of their staircase (../reference.py).

Offers the choice of a kernel and its plan (`explain`), and the call itself (`factored_forward`), to ../router.py. On
NVIDIA GPUs lanes.py takes few experts a token and frontier.py many; tile.py runs wherever Triton does. All three sort
packed keys (keys.py). The first two share sorting networks (networks.py), the best columns of rows (rows.py), the best
pairs of tokens (pairs.py) and PTX instructions (ptx.py).
"""

import dataclasses

import torch

from .. import reference
from ..checks import check, check_normalize, check_scores_dtype
from ..configs import device_of, has_kernels, kernel_input, on_nvidia, output_dtype
from ..operators import as_matrix
from . import frontier, lanes, replay, tile
from .plan import Launch, Launches, Plan, launch, new_matrices, saved_numbers

_launches = Launches()  # of each problem: the most tokens that are few, the launch for few, the launch for many


@dataclasses.dataclass(frozen=True)
class PyTorchPlan(Plan):
    """No launch: `reference.factored_router` routes."""

    kernel = None

    def why(self):
        return "PyTorch's own kernels, since none of the package takes this k on this device."


def explain(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None, normalize=None):
    """The plan that `omni_router` follows for these logits. Printed, it says which kernel runs, how, and why.

    Arguments and errors are those of `omni_router`. The scores' dtype is the logits' unless given.
    """
    k = check(router_logits_x, router_logits_y, num_experts_per_token)
    check_scores_dtype(scores_dtype)
    check_normalize(normalize)
    x, y = as_matrix(router_logits_x), as_matrix(router_logits_y)
    return _plan_for(x, y, k, scores_dtype or x.dtype, normalize)


def _plan_for(x, y, k, scores_dtype, normalize):
    kernel = _kernel_for(x, k)
    if kernel:
        return kernel.plan_for(kernel_input(x), kernel_input(y), k, scores_dtype, normalize)
    return PyTorchPlan(x.shape[1], k, x.dtype, scores_dtype, num_warps=0, normalize=normalize)


def _kernel_for(x, k):
    kernels = (lanes, frontier, tile) if has_kernels(x) and 0 < k <= x.shape[1] ** 2 else ()
    return next((kernel for kernel in kernels if kernel.runs_on(x.device, x.shape[1], k)), None)


def normalizes(x, k):
    """Whether a kernel normalizes the scores of k experts of such tokens, (num_tokens, N), chosen by it or before."""
    return _kernel_for(x, k) is not None


def factored_forward(
    router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None, out=None, normalize=None, saved=None
):
    """Scores and indices of the k best experts, by the kernel that fits, or by `reference.factored_router` where none
    does; the same results, bit for bit.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), fp32, fp16 or bf16, on any device, any strides, at least one
            token.
        num_experts_per_token: k, from 1 to N².
        scores_dtype: fp32, fp16 or bf16; the logits' unless given.
        out: what may be written and returned: scores and indices, contiguous, from multiples of 16 bytes on.
        normalize: what becomes of the scores, if the size has a kernel (`normalizes`).
        saved: where to write what the gradient needs, from `room_to_save`; None if it is not wanted.

    Returns:
        scores (num_tokens, k) in scores_dtype and indices (num_tokens, k), int32.
    """
    x, y, k = router_logits_x, router_logits_y, num_experts_per_token
    num_tokens, num_expert_sqrt = x.shape
    if x.is_neg() or y.is_neg():  # a sign that PyTorch has put off
        x, y = x.resolve_neg(), y.resolve_neg()
    strides_x, strides_y, scores_dtype = x.stride(), y.stride(), scores_dtype or x.dtype
    # All that a plan and a binary depend on. Of transposed logits the number of tokens is a matter of alignment.
    problem = (
        x.get_device(), num_expert_sqrt, k, x.dtype, scores_dtype, strides_x, strides_y, x.data_ptr() % 16,
        y.data_ptr() % 16, strides_x[0] == 1 and num_tokens % 8, num_tokens >> 31, normalize, saved is None,
    )  # fmt: skip
    known = _launches.get(problem)
    if known is None:
        return _first_call(problem, x, y, k, scores_dtype, normalize, saved)
    most_few, few, many = known
    scores, indices = out = out or new_matrices(x, num_tokens, k, scores_dtype, torch.int32)
    (few if num_tokens <= most_few else many)((x, y, scores, indices, saved), *strides_x, *strides_y, num_tokens)
    return out


def replay_pairs(x, y, indices, scores_dtype, normalize, saved):
    """The normalized scores of experts chosen before. As a selection of as many gives them, bit for bit: one is made
    for the numbers of rows. Arguments as of `factored_forward`, indices as it returns them."""
    k = indices.shape[1]
    factored_forward(x, y, k, scores_dtype, normalize=normalize, saved=saved)
    x, y = kernel_input(x), kernel_input(y)
    scores = torch.empty(indices.shape, dtype=output_dtype(scores_dtype), device=x.device)
    plan = replay.plan_of(x.shape[1], k, x.dtype, scores_dtype, normalize)
    with device_of(x):
        launch(plan, x, y, scores, indices, saved, *x.stride(), *y.stride(), len(x))
    return scores.to(scores_dtype)


def room_to_save(x, k, normalize):
    """Memory for what a selection saves for its gradient (plan.py)."""
    return x.new_empty(x.shape[0] * saved_numbers(normalize, k), dtype=torch.float32)


def _first_call(problem, x, y, k, scores_dtype, normalize, saved):
    """A call that compiles what it needs, and has compiled meanwhile what another number of tokens will need."""
    plan = _plan_for(x, y, k, scores_dtype, normalize)
    if plan.kernel is None or not on_nvidia(x.device):
        return run(plan, x, y, saved)
    num_tokens, device, most_few, other = len(x), x.get_device(), -1, plan
    if plan.kernel is lanes.lanes_kernel:
        most_few = lanes.most_few_tokens(x.shape[1], x.device)
        other = lanes.plan_for(x, y, k, scores_dtype, normalize, few_tokens=num_tokens > most_few)
    launch_now = Launch(plan, device)
    launch_later = launch_now if other == plan else Launch(other, device)
    is_few = num_tokens <= most_few
    _launches.keep(problem, (most_few, *((launch_now, launch_later) if is_few else (launch_later, launch_now))))
    scores, indices = factored_forward(x, y, k, scores_dtype, normalize=normalize, saved=saved)
    if other != plan:
        launch_later.compile_later(x, y, scores, indices, saved, *x.stride(), *y.stride(), num_tokens)
    return scores, indices


def run(plan, x, y, saved=None):
    """Scores and indices of the k best experts by a plan, that of `explain` or another of its kernel's."""
    if plan.kernel is None:
        return reference.eager_router(x, y, plan.k, plan.scores_dtype)
    num_tokens = len(x)
    x, y = kernel_input(x), kernel_input(y)
    scores = torch.empty((num_tokens, plan.k), dtype=output_dtype(plan.scores_dtype), device=x.device)
    indices = torch.empty((num_tokens, plan.k), dtype=torch.int32, device=x.device)
    with device_of(x):
        launch(plan, x, y, scores, indices, saved, *x.stride(), *y.stride(), num_tokens)
    return scores.to(plan.scores_dtype), indices
