"""The functions people call: they check their arguments and call their kernels through operators.py."""

import functools

from torch import Tensor
from torch.compiler import is_compiling

from . import backward, factored, forward, original, reference, split_forward
from .checks import (
    check,
    check_expert_sqrt,
    check_indices,
    check_matrix,
    check_normalize,
    check_scores_dtype,
    check_values,
    is_usual,
)
from .operators import Pairs, Router, Scores, as_matrix, assume_same_tokens, is_distributed, is_ordinary, is_plain


def omni_router(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None, normalize=None):
    """Select the k best of N² experts for every token, exactly, by the fastest path for the shape and device.

    Expert i * N + j scores x[..., i] + y[..., j], summed in fp32. Equal scores put the lower index first. `-inf` masks
    a row or a column of experts: such pairs come last. A token with NaN or +inf among its logits has NaN or +inf among
    its scores and valid indices.

    `normalize` makes probabilities of the scores. The experts and their order stay those of the logits, bit for bit.
    With s[e] the sum of expert e, in fp64, each chosen expert scores

        None:           s[e], in fp32;
        "log_softmax":  s[e] - log(sum of exp(s[f]) over all N² experts f), which is
                        x[i] + y[j] - logsumexp(x) - logsumexp(y);
        "softmax":      exp of that;
        "topk":         exp(s[e]) / (sum of exp(s[f]) over the k chosen f).

    Before they are rounded to scores_dtype, probabilities are within 2e-6 of themselves, logarithms within 1e-6, or
    1e-6 of themselves if those are beyond 1. A masked expert has probability 0. So has every expert of a token whose
    row of x or of y is masked altogether; such a token has no gradient. A token with NaN or +inf among its logits has
    NaN for all normalized scores; for "topk" so has one whose best score is +inf in fp32.

    torch.compile(fullgraph=True), torch.export, CUDA graphs and the transforms of torch.func take it as it is (vmap
    folds its dimension into the tokens). Autocast leaves it alone: it routes in the dtype it is given. DTensors give
    DTensors, whether tokens or factors are sharded: see `sharded_router`.

    Args:
        router_logits_x: (..., N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340. Leading
            dimensions, however many, are of tokens. (num_tokens, N) is the fastest.
        router_logits_y: the same shape, dtype and device.
        num_experts_per_token: k, from 0 to N². Kernels route up to 256 on NVIDIA GPUs (from Ampere on) and up to
            64 elsewhere, PyTorch what is beyond.
        scores_dtype: of the scores, fp32, fp16 or bf16; the logits' unless given. fp32 keeps the sums of 16-bit logits
            as they are, and the gradients that come back for them too, until the sums of those are rounded once.
        normalize: None, "log_softmax", "softmax" or "topk".

    Returns:
        scores: (..., k), best first, rounded once to their dtype. Differentiable: the gradient c of a sum goes to its
            row of x and its column of y, accumulated in fp32, returned in the logits' dtype. The softmax over all
            experts takes softmax(x) * (sum of c over the chosen) from it, and the same of y. No atomics: the same bits
            on every run. Unless normalized, scores are linear in the logits, so their second derivative is zero; one
            with respect to the incoming gradient is a gather. Forward-mode derivatives too: the tangent of a pair is
            the sum of its row's and its column's.
        indices: (..., k), int32, distinct within a token.

    Raises:
        TypeError: a logits argument is no dense floating point tensor, num_experts_per_token no integer, or
            scores_dtype none of the three.
        ValueError: shapes, dtypes or devices differ, a size is out of range, or normalize is none of the four.
    """
    if (
        scores_dtype is None
        and is_compiling()
        and normalize is None
        and is_ordinary(router_logits_x, router_logits_y, num_experts_per_token)
    ):
        return _TRACED(router_logits_x, router_logits_y, num_experts_per_token, router_logits_x.dtype)
    if is_plain(router_logits_x, router_logits_y) and is_usual(router_logits_x, router_logits_y, num_experts_per_token):
        if scores_dtype is None:
            scores_dtype = router_logits_x.dtype
        else:
            check_scores_dtype(scores_dtype)
        if normalize is None:
            return _OMNI_ROUTER(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype, True)
        check_normalize(normalize)
        return _NORMALIZED(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype, normalize, True)
    return _route(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype, normalize)


def sharded_router(
    router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None, normalize=None, shard_tokens=False
):
    """`omni_router` of DTensors, which calls this for them.

    Experts are those that one process chooses from whole logits, and scores and gradients are the same, bit for bit.
    But where the factors are sharded, "softmax" and "log_softmax" may differ within their accuracy, since they take
    sums of the ranks' sums. Gradients have the placements of the logits.

    What happens along a dimension of the mesh depends on the placements of x and y there:

        Shard of tokens, Replicate: every rank routes what it has, without communication. If one is sharded and the
            other replicated, the results are sharded.
        Shard(-1): the factors are sharded, as column-parallel gates leave them. The results are replicated, or with
            shard_tokens Shard(0): then every rank finishes a part of the tokens, which is less traffic and less work.
        Others, and shards of different dimensions: PyTorch redistributes them to x's shard of tokens, else y's, else
            to Replicate. The gradient of Partial is Replicate.

    Where the factors are sharded, a rank sends the k best columns that it has of x and of y as packed keys, of 4 bytes
    for 16-bit logits and 8 for fp32, and two fp32 numbers a token for a softmax over all experts. So 2 * ranks * k
    keys a token arrive, against 2 * N logits of half their width if the logits were gathered. They are gathered unless
    8 * ranks * k < N, a quarter of the bytes, since finding and merging candidates takes time too; and also if several
    dimensions of the mesh shard the factors. N need not be a multiple of the ranks. The gradient of a rank's own
    columns needs communication only with shard_tokens. It has no second derivative.

    Ranks that communicate first tell each other, in a few integers, whether they refuse their arguments and what they
    bring. These travel by CPU if the group has a backend for it, as "cpu:gloo,cuda:nccl" has. Else the host waits for
    the GPU. Compiled code skips this. torch.compile(fullgraph=True) takes it.

    A rank that dies or never calls leaves the others waiting until the group's timeout ends them. Set it where the
    group is made, long enough for the slowest step: `init_process_group(..., timeout=datetime.timedelta(minutes=5))`
    for a mesh of one dimension over all ranks, else `new_group(..., timeout=...)` and `DeviceMesh.from_group`.

    Args:
        router_logits_x: (..., N), a DTensor, else as for `omni_router`.
        router_logits_y: the same shape, dtype and mesh.
        num_experts_per_token, scores_dtype, normalize: as for `omni_router`.
        shard_tokens: whether a dimension of the mesh that shards the factors shards dimension 0 of the results.

    Returns:
        scores, indices: as of `omni_router`, but DTensors.

    Raises:
        TypeError: as `omni_router`, or only one of the two is a DTensor, or neither.
        ValueError: as `omni_router`; meshes differ, or this rank is not in them; a local tensor is not the part that a
            DTensor has there; shard_tokens where there is no dimension of tokens; ranks that communicate bring what
            should be alike and is not.
        Of ranks that communicate all raise if one does.
    """
    x, y, k = router_logits_x, router_logits_y, num_experts_per_token
    if not is_distributed(x, y):
        raise TypeError(f"router_logits_x must be a DTensor, got {type(x).__name__}")

    def check_all():
        check_scores_dtype(scores_dtype)
        check_normalize(normalize)
        known = check(x, y, k)
        if shard_tokens and x.ndim == 1:
            raise ValueError(f"shard_tokens needs router_logits_x of a dimension of tokens, got shape {tuple(x.shape)}")
        return known

    facts = {"scores_dtype": scores_dtype, "normalize": normalize, "shard_tokens": shard_tokens}
    return route_distributed(x, y, k, scores_dtype, normalize, check_all, facts, shard_tokens)


def route_distributed(x, y, k, scores_dtype, normalize, check_all, facts, shard_tokens=False):
    """`sharded_router` with other checks: check_all gives k, and facts, by their names, are the same on all ranks."""
    from . import sharded  # half a second that others need not wait

    functions = omni_router, _PAIRS, _OMNI_ROUTER.backward_operator
    facts = {"num_experts_per_token": k, **facts}
    return sharded.route(functions, x, y, scores_dtype, normalize, check_all, facts, shard_tokens)


def replay(router_logits_x, router_logits_y, indices, scores_dtype=None, normalize=None):
    """The scores of experts chosen before: bit for bit what `omni_router` gives with indices that it chose from these
    logits, and the same gradients. For recomputation, reinforcement learning, frozen routing. (Normalized by kernels,
    scores are rounded as for as many experts of as many tokens in the same layout, in eager mode and compiled. What
    transforms take apart is normalized by PyTorch's operators, within the same accuracy.)

    Formulas, accuracy, masks, NaN and +inf, derivatives, compilers and transforms are as for `omni_router`. Any other
    experts may be asked for, in any order, an expert twice too. A token then has NaN for all its scores where
    `omni_router` would give all of its k best NaN; "topk" has NaN where the best of all experts scores NaN or +inf, and
    0 where all that are asked for are masked.

    Of DTensors, all three must be some, and the scores are one. The logits go where the indices are, whose placements
    count before those of x and y: as for `sharded_router`, but where the factors are sharded, they are gathered.

    Args:
        router_logits_x: (..., N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340.
        router_logits_y: the same shape, dtype and device.
        indices: (..., k), int32 or int64, the leading dimensions and the device of the logits; each from 0 to N² - 1.
            Looked at on the CPU, in eager mode. Elsewhere PyTorch's gather decides what becomes of others, and their
            gradients are undefined.
        scores_dtype: of the scores, fp32, fp16 or bf16; the logits' unless given.
        normalize: None, "log_softmax", "softmax" or "topk".

    Returns:
        scores: (..., k), in the order of the indices.

    Raises:
        TypeError: a logits argument is no dense floating point tensor, indices no dense one of int32 or int64, or
            scores_dtype none of the three.
        ValueError: shapes, dtypes or devices differ, N is out of range, normalize is none of the four, or, where they
            are looked at, an index is out of range.
    """
    x, y = router_logits_x, router_logits_y
    plain = is_plain(x, y)

    def check_all():
        _check(x, y, 0, plain)
        if not plain and isinstance(indices, Tensor):
            assume_same_tokens(x, indices)
        check_indices(indices, x)
        check_scores_dtype(scores_dtype)
        check_normalize(normalize)

    if not plain and is_distributed(x, y, indices):
        from . import sharded

        local = functools.partial(replay, scores_dtype=scores_dtype, normalize=normalize)
        facts = {"scores_dtype": scores_dtype, "normalize": normalize}
        return sharded.replay(local, x, y, indices, check_all, facts)
    check_all()
    if plain and indices.device.type == "cpu" and is_plain(indices, indices):
        check_values("indices", indices, 0, x.shape[-1] ** 2 - 1, "num_expert_sqrt² - 1 = ")
    experts, scores_dtype = as_matrix(indices).int().contiguous(), scores_dtype or x.dtype
    x, y, k = as_matrix(x), as_matrix(y), experts.shape[1]
    if normalize is None:
        scores = _scores(x, y, experts, scores_dtype, None)
    else:
        scores, _ = _NORMALIZED(x, y, k, scores_dtype, normalize, plain and is_plain(experts, experts), experts)
    return scores.reshape(indices.shape)


def _route(x, y, k, scores_dtype, normalize):
    """`omni_router` for whatever calls there are."""
    plain = is_plain(x, y)
    if not plain and is_distributed(x, y):
        return sharded_router(x, y, k, scores_dtype, normalize)
    k = _check(x, y, k, plain)
    check_scores_dtype(scores_dtype)
    check_normalize(normalize)
    shape, scores_dtype = (*x.shape[:-1], k), scores_dtype or x.dtype
    x, y = as_matrix(x), as_matrix(y)
    if normalize is None:
        scores, indices = _OMNI_ROUTER(x, y, k, scores_dtype, plain)
    else:
        scores, indices = _NORMALIZED(x, y, k, scores_dtype, normalize, plain)
    return (scores, indices) if len(shape) == 2 else (scores.reshape(shape), indices.reshape(shape))


def _scores(x, y, indices, scores_dtype, normalize):
    """The scores of chosen experts in PyTorch, differentiable as often as anybody likes."""
    if normalize is None:
        return (_PAIRS(x, y, indices).float() + reference.poison(x, y, indices.shape[1])).to(scores_dtype)
    x, y = x.float(), y.float()  # so that gradients are rounded once
    best = reference.best_logits(x, y)
    sums = _PAIRS(x, y, indices, *reference.origins(*best))
    return reference.normalize_sums(sums, x, y, *best, normalize).to(scores_dtype)


def triton_omni_router_func(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The original version, the baseline: from all N² sums, with gradients by atomics.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), else as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². From N = original.SPLIT_FROM on, more than
            original.MAX_SPLIT_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    plain = is_plain(router_logits_x, router_logits_y)
    k = _check(router_logits_x, router_logits_y, num_experts_per_token, plain)
    check_matrix(router_logits_x)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    return _ORIGINAL(router_logits_x, router_logits_y, k, router_logits_x.dtype, plain)


def triton_omni_router_func_optimized(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The guide's optimized version: from all N² sums, in one tile or streamed, with gradients free of atomics.

    Args:
        router_logits_x, router_logits_y: (num_tokens, N), else as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². Above N = forward.MAX_EXPERT_SQRT, more than
            split_forward.MAX_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    plain = is_plain(router_logits_x, router_logits_y)
    k = _check(router_logits_x, router_logits_y, num_experts_per_token, plain)
    check_matrix(router_logits_x)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    return _OPTIMIZED(router_logits_x, router_logits_y, k, router_logits_x.dtype, plain)


def _check(x, y, k, plain):
    """Raises unless the arguments are right; k as an int. plain: whether x and y are."""
    if not plain and isinstance(x, Tensor) and isinstance(y, Tensor):
        assume_same_tokens(x, y)
    return check(x, y, k)


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
_PAIRS = Pairs("omni_router_pairs", _OMNI_ROUTER)
_NORMALIZED = Scores("omni_router_normalized", _OMNI_ROUTER, factored, _scores)
_TRACED = _OMNI_ROUTER.operator
_ORIGINAL = Router("triton_omni_router_func", _forward_original, _backward_original)
_OPTIMIZED = Router("triton_omni_router_func_optimized", _forward_optimized, backward.backward)
