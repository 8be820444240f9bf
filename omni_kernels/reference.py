"""The router in plain PyTorch: its definition, and the factored version that needs no kernel.

Both run on any device PyTorch knows, and neither looks at the other: the definition is what everything else
is compared with, the factored version is what runs where a kernel cannot. So it is with the scores that a softmax makes
of the sums: `brute_force_router` takes it over all N² experts, `normalize_sums` from N logits of each factor.
"""

import functools
import math

import torch

from .checks import check, check_matrix, check_normalize, check_scores_dtype

# Tokens are routed in slices, so that the candidates of a long batch never sit in memory at once.
CANDIDATES_PER_SLICE = 1 << 24
FEW = 256  # experts a token whose pairs of ranks are kept
COLUMN_BITS = 12  # as many fp32 numbers lie between neighbours in fp16
LEAST_NORMAL = 0x00800000  # the bits of the least fp32 number that has all of its own


def brute_force_router(router_logits_x, router_logits_y, num_experts_per_token, normalize=None):
    """The definition: score all num_expert_sqrt² experts and sort them.

    Args:
        router_logits_x: (num_tokens, N), floating point; its column i belongs to experts i * N to i * N + N - 1.
        router_logits_y: same shape, dtype and device; its column j belongs to experts j, N + j, 2N + j, ...
        num_experts_per_token: k, from 0 to N².
        normalize: what becomes of the scores, as in `router.omni_router`.

    Returns:
        scores (num_tokens, k), best first, summed in fp32 (if they are normalized, in fp64), rounded once to the
        logits' dtype; and indices (num_tokens, k), int32; equal scores put the lower index first. Differentiable by
        autograd.

    Raises:
        TypeError, ValueError: as `router.omni_router`.
    """
    num_experts_per_token = check(router_logits_x, router_logits_y, num_experts_per_token)
    check_matrix(router_logits_x)
    check_normalize(normalize)
    sums = (router_logits_x.float()[:, :, None] + router_logits_y.float()[:, None, :]).flatten(1)
    order = sums.detach().sort(dim=1, descending=True, stable=True).indices[:, :num_experts_per_token]
    scores = sums.gather(1, order)
    if normalize is not None:
        sums = (router_logits_x.double()[:, :, None] + router_logits_y.double()[:, None, :]).flatten(1)
        masked = (sums == -torch.inf).all(1, keepdim=True)
        sums = sums.masked_fill(masked, 0.0)
        if normalize == "topk":
            poison = torch.where((scores < torch.inf).all(1, keepdim=True), 0.0, torch.nan)
            scores = sums.gather(1, order).softmax(1).masked_fill(masked, 0.0) + poison
        elif normalize == "softmax":
            scores = sums.softmax(1).masked_fill(masked, 0.0).gather(1, order)
        else:
            scores = sums.log_softmax(1).masked_fill(masked, -torch.inf).gather(1, order)
    return scores.to(router_logits_x.dtype), order.int()


def factored_router(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None):
    """The same selection from the k best of each factor: O(N + k log k) a token instead of O(N²).

    Sort both factors, best first. The pair of ranks (a, b), counted from 1, is beaten by a·b - 1 others, so only pairs
    with a·b <= k can be selected: a staircase of about k·ln k candidates. (Selection in X + Y: Frederickson and
    Johnson, 1982. Product-key memories, Lample et al., 2019, search the whole k × k square.) Equal sums put the lower
    row first, and within a row the better rank: for sums that are exactly equal that is the lower index, and where only
    rounding made them equal it is an order that every row of the staircase already has, so the kernels, which merge
    those rows, agree with this function bit for bit. A token with NaN, or with +inf where -inf may meet it, gets NaN
    for all its scores.

    Arguments, results and errors as in `brute_force_router`, the scores in scores_dtype if given, but without autograd:
    `backward_router` is the gradient.
    """
    k = check(router_logits_x, router_logits_y, num_experts_per_token)
    check_matrix(router_logits_x)
    check_scores_dtype(scores_dtype)
    return _route(router_logits_x, router_logits_y, k, scores_dtype, looks=False)


def eager_router(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None):
    """`factored_router` of checked arguments, where nothing traces. On the CPU it looks at its numbers: what only ties,
    infinities and NaN need is done only where there are some. On a GPU it would have to wait for them."""
    looks = router_logits_x.device.type == "cpu"
    return _route(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype, looks)


def backward_router(grad_scores, indices, num_expert_sqrt):
    """The gradient of both factors: each selected pair adds its score's gradient to its row and to its column.

    Args:
        grad_scores: (num_tokens, k), floating point, any strides.
        indices: (num_tokens, k), int32, as the forward pass returned them.
        num_expert_sqrt: N.

    Returns:
        grad_x, grad_y: (num_tokens, N) in grad_scores' dtype, accumulated in fp32.
    """
    grad = grad_scores.float()
    zeros = grad.new_zeros((len(grad), num_expert_sqrt))
    rows, columns = indices.long() // num_expert_sqrt, indices.long() % num_expert_sqrt
    return tuple(zeros.scatter_add(1, target, grad).to(grad_scores.dtype) for target in (rows, columns))


# Scores of experts that have been chosen ------------------------------------------------------------------------------


def sums_of_pairs(x, y, indices, origin_x=None, origin_y=None):
    """The sums of experts' two logits, in fp64, where they are exact but for logits 2²⁹ times each other's size.

    Args:
        x, y: (num_tokens, N), floating point.
        indices: (num_tokens, k), int32 or int64.
        origin_x, origin_y: (num_tokens, 1), what to subtract from the logits of each factor before; if any, both.

    Returns:
        sums (num_tokens, k), fp64. Rounded to fp32, those without origins are fp32 sums, bit for bit.
    """
    indices, num_expert_sqrt = indices.long(), x.shape[1]
    left, right = x.gather(1, indices // num_expert_sqrt).double(), y.gather(1, indices % num_expert_sqrt).double()
    if origin_x is not None:
        left, right = left - origin_x, right - origin_y
    return left + right


def poison(x, y, k):
    """What to add to the sums of a token's k best experts, (num_tokens, 1), fp32: NaN where the router makes NaN of all
    of them, else 0. That is where NaN is among the logits, or +inf in one factor may meet -inf among the min(k, N) best
    of the other."""
    x, y = x.detach(), y.detach()
    best_x, best_y = x.amax(1, keepdim=True), y.amax(1, keepdim=True)
    clash = best_x.isnan() | best_y.isnan()
    for best, other in ((best_x, y), (best_y, x)):
        unmasked = (other > -torch.inf).sum(1, keepdim=True)
        clash = clash | ((best == torch.inf) & (unmasked < k) & (unmasked < other.shape[1]))
    return torch.where(clash, torch.nan, 0.0)


def best_logits(x, y):
    """The largest logit of each row of both factors, (num_tokens, 1), without derivatives."""
    return x.detach().amax(1, keepdim=True), y.detach().amax(1, keepdim=True)


def origins(best_x, best_y):
    """What `normalize_sums` wants subtracted: the largest logits, but 0 of rows that are masked altogether."""
    return tuple(best.masked_fill(best == -torch.inf, 0.0) for best in (best_x, best_y))


def sum_of_exponentials(logits, origin):
    """The sum of exp(logit - origin) of each row, (num_tokens, 1)."""
    return (logits - origin).exp().sum(1, keepdim=True)


def normalize_sums(sums, x, y, best_x, best_y, normalize, totals=None):
    """The softmax of the sums of chosen experts, or its logarithm.

    Over all N² experts it takes the sums of both rows alone: sum of exp(x[i] + y[j]) over all pairs is sum of exp(x[i])
    times sum of exp(y[j]). What is done N times a token is done in fp32, what is done k times in fp64. No derivative
    but that of a poisoned token is NaN.

    Args:
        sums: (num_tokens, k), fp64, from `sums_of_pairs` with `origins`.
        x, y: (num_tokens, N), fp32, all the logits.
        best_x, best_y: from `best_logits`.
        normalize: "softmax" or "log_softmax" over all experts, or "topk": softmax over the chosen.
        totals: the `sum_of_exponentials` of x and of y, with `origins`, if known; x and y are not looked at then.

    Returns:
        scores (num_tokens, k), fp64. Of a token whose rows of x or y are masked altogether: all 0, or -inf of
        "log_softmax". All NaN of a token with NaN or +inf among its logits, and for "topk" also where the fp32 score of
        its best expert is +inf.
    """
    best = best_x.double() + best_y
    if normalize == "topk":
        masked = (sums == -torch.inf).all(1, keepdim=True) & (best < torch.inf)
        chances = sums.masked_fill(masked, 0.0).softmax(1).masked_fill(masked, 0.0)
        return chances * torch.where(best.float() < torch.inf, 1.0, torch.nan)  # and so are its derivatives
    if totals is None:
        totals = map(sum_of_exponentials, (x, y), origins(best_x, best_y))
    for total, row_best in zip(totals, (best_x, best_y), strict=True):
        sums = sums - total.masked_fill(row_best == -torch.inf, 1.0).double().log()
    logs = sums.masked_fill(best == -torch.inf, -torch.inf)
    return logs if normalize == "log_softmax" else logs.exp()


# The factored router's parts ------------------------------------------------------------------------------------------


def _route(x, y, k, scores_dtype, looks):
    num_tokens, num_expert_sqrt = x.shape
    scores_dtype = scores_dtype or x.dtype
    quickly = _route_quickly if x.dtype == torch.float32 else _route_by_ulps
    route = quickly if looks and x.element_size() < 8 else functools.partial(_route_slice, looks=looks)
    ranks = (_few_ranks if looks and k <= FEW else _staircase)(k, num_expert_sqrt, x.device)
    slice_size = max(1, CANDIDATES_PER_SLICE // (len(ranks[0]) + k + num_expert_sqrt))
    if k and 0 < num_tokens <= slice_size:
        scores, indices = route(x, y, k, *ranks)
        return scores.to(scores_dtype), indices.int()
    scores = x.new_empty((num_tokens, k), dtype=scores_dtype)
    indices = torch.empty((num_tokens, k), dtype=torch.int32, device=x.device)
    for start in range(0, num_tokens if k else 0, slice_size):
        part = slice(start, start + slice_size)
        scores[part], indices[part] = route(x[part], y[part], k, *ranks)
    return scores, indices


def _staircase(k, num_expert_sqrt, device):
    """The rank pairs (a, b), counted from 0, that can be among the k best: all a, all b. Made anew in every call: kept,
    they could be as large as the logits, or fake tensors, or of a device that was asked for meanwhile."""
    longest = min(k, num_expert_sqrt)
    size = sum(min(longest, k // a) for a in range(1, longest + 1))
    rank = torch.arange(longest, device=device)
    lengths = (k // (rank + 1)).clamp(max=longest)
    rank_x = rank.repeat_interleave(lengths, output_size=size)
    rank_y = torch.arange(size, device=device) - (lengths.cumsum(0) - lengths)[rank_x]
    return rank_x, rank_y


# Of few experts, for who is no tracer: a token alone is routed in less time than it takes to make them.
_few_ranks = functools.lru_cache(16)(_staircase)


def _route_quickly(x, y, k, rank_x, rank_y):
    """fp32 logits by plain selections, which leave open who comes first among equals. Tokens that have equals among the
    best, or what is not finite, are routed again by `_route_slice`. (Seldom: so the host looks first if there are any.)
    """
    num_expert_sqrt = x.shape[1]
    limit = min(k + 1, num_expert_sqrt)  # one more shows equals at the edge
    (best_x, rows), (best_y, columns) = x.topk(limit), y.topk(limit)
    sums = best_x.index_select(1, rank_x) + best_y.index_select(1, rank_y)
    scores, places = sums.topk(min(k + 1, len(rank_x)))
    chosen = places[:, :k]
    row, column = rows.gather(1, rank_x.take(chosen)), columns.gather(1, rank_y.take(chosen))
    indices = torch.add(column, row, alpha=num_expert_sqrt)
    distinct = [values[:, :-1] > values[:, 1:] for values in (best_x, best_y, scores)]
    scores = scores[:, :k] + 0.0  # no -0.0
    if not (all(part.all() for part in distinct) and math.isfinite(sums.sum())):
        doubt = ~(torch.cat(distinct, 1).all(1) & sums.isfinite().all(1))
        _route_again(doubt, scores, indices, x, y, k, rank_x, rank_y)
    return scores, indices


def _route_by_ulps(x, y, k, rank_x, rank_y):
    """16-bit logits, as fp32 times 1 and a few ulps, more for lower columns: no two of a row are the same then, and
    none is beyond the next logit. So it is above 0, where numbers order as their bits do, and where the best of a row
    are, as a rule. `_route_slice` takes the other tokens, and all if the first has too few such logits.
    """
    num_tokens, num_expert_sqrt = x.shape
    keys = torch.cat((x, y)).float()
    fits = num_expert_sqrt <= 1 << COLUMN_BITS and math.isfinite(keys.sum())
    if not fits or int((keys[0] > 0).sum()) < 2 * k:
        return _route_slice(x, y, k, rank_x, rank_y, looks=True)
    keys *= _ulps(num_expert_sqrt, x.device)
    best, found = keys.view(torch.int32).topk(min(k, num_expert_sqrt))
    values = (best & (-1 << (16 if x.dtype == torch.bfloat16 else 13))).view(torch.float32)
    rows, columns = found[:num_tokens], found[num_tokens:]
    sums = values[:num_tokens].index_select(1, rank_x) + values[num_tokens:].index_select(1, rank_y)
    low = torch.sub(0x7FFFFFFF - rank_y, rows.index_select(1, rank_x), alpha=1 << COLUMN_BITS)
    packed = torch.add(low, sums.view(torch.int32), alpha=1 << 32).topk(k).values
    scores, row_and_rank = (packed >> 32).int().view(torch.float32), 0x7FFFFFFF - (packed & 0xFFFFFFFF)
    column = columns.gather(1, row_and_rank & ((1 << COLUMN_BITS) - 1))
    indices = torch.add(column, row_and_rank >> COLUMN_BITS, alpha=num_expert_sqrt)
    least = best[:, -1]
    if int(least.min()) < LEAST_NORMAL:
        doubt = (least < LEAST_NORMAL).view(2, -1).any(0)
        _route_again(doubt, scores, indices, x, y, k, rank_x, rank_y)
    return scores, indices


@functools.lru_cache(16)
def _ulps(num_columns, device):
    return torch.arange(num_columns - 1, -1, -1, device=device) * 2.0**-23 + 1


def _route_again(doubt, scores, indices, x, y, k, rank_x, rank_y):
    """Put the results of `_route_slice` in the place of those of the tokens in doubt."""
    tokens = doubt.nonzero()[:, 0]
    scores[tokens], indices[tokens] = _route_slice(x[tokens], y[tokens], k, rank_x, rank_y, looks=True)


def _route_slice(x, y, k, rank_x, rank_y, looks=False):
    """By packed keys, which no two are equal of. Where the host looks, finite logits get only what those need."""
    num_expert_sqrt = x.shape[1]
    finite = looks and math.isfinite(x.sum() + y.sum())
    best_x, rows = _top(x, min(k, num_expert_sqrt), finite)
    best_y, columns = _top(y, min(k, num_expert_sqrt), finite)
    sums = best_x.index_select(1, rank_x) + best_y.index_select(1, rank_y)
    if not finite:
        # Where +inf may meet -inf, or NaN is there, all of the token's scores become NaN: every path agrees on that.
        clash = (best_x[:, :1] + best_y[:, -1:]).isnan() | (best_y[:, :1] + best_x[:, -1:]).isnan()
        sums = torch.where(clash, torch.nan, sums)
    row_and_rank = rows.index_select(1, rank_x) * num_expert_sqrt + rank_y
    scores, row_and_rank = _unpack(_pack(sums, row_and_rank, finite).topk(k).values)
    row, rank = row_and_rank // num_expert_sqrt, row_and_rank % num_expert_sqrt
    indices = row * num_expert_sqrt + columns.gather(1, rank)
    if finite:
        return scores, indices

    # Among -inf pairs only the index counts, which the staircase does not know. Where one of them is selected, fewer
    # than k others exist, so the -inf pairs among the first k experts are enough. (With NaN or +inf about, they may not
    # be: those tokens keep what the staircase gave.)
    ordinary = (best_x[:, :1] < torch.inf) & (best_y[:, :1] < torch.inf)
    first = torch.arange(k, device=x.device)
    masked = ordinary & (x[:, first // num_expert_sqrt].float() + y[:, first % num_expert_sqrt].float() == -torch.inf)
    return scores, fill_masked(scores, indices, masked)


def fill_masked(scores, indices, masked):
    """The indices of the k best, (num_tokens, k), of which those that score -inf become the lowest that are masked.

    scores: of these, fp32. masked: (num_tokens, k), which of the experts 0 to k - 1 are, for this purpose.
    """
    k = indices.shape[1]
    before = masked.t().contiguous().cumsum(0).t()  # along rows a GPU would take ten times as long
    slot = (scores > -torch.inf).sum(1, keepdim=True) + before - 1
    slot = torch.where(masked & (slot < k), slot, k)  # column k takes what is not wanted
    first = torch.arange(k, device=indices.device, dtype=indices.dtype)
    return torch.cat((indices, indices[:, :1]), dim=1).scatter(1, slot, first.expand_as(slot))[:, :k]


def _top(logits, count, finite):
    """The `count` largest logits of each row, lower columns first among equals: fp32 values (-0.0 as 0.0), columns."""
    return unpack_keys(top_keys(logits, count, finite), logits.dtype)


def top_keys(logits, count, finite=False):
    """The same as packed keys, descending: int64 of fp32 logits, int32 of others."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    pack = _pack if logits.dtype == torch.float32 else _pack_short
    return pack(logits, columns, finite).topk(count).values


def unpack_keys(keys, dtype):
    """The fp32 values and the columns of packed keys of logits of a dtype."""
    return _unpack(keys) if dtype == torch.float32 else _unpack_short(keys, dtype)


def _pack(value, index, finite=False):
    """fp32 value and index as one int64 of the same order: the PyTorch twin of `keys.pack`."""
    bits = (value + 0.0).view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if not finite:
        key = torch.where(value == value, key, 0x7FFFFFFF)
    return torch.add(0x7FFFFFFF - index, key.long(), alpha=1 << 32)  # one operation for a shift and an or


def _unpack(packed):
    key = (packed >> 32).int()
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return value, 0x7FFFFFFF - (packed & 0xFFFFFFFF)


def _pack_short(value, index, finite):
    """A 16-bit value and an index below 2¹⁶ as one int32 of the same order."""
    bits = (value + 0.0).view(torch.int16)
    key = bits ^ (bits >> 15).bitwise_and_(0x7FFF)  # in place: memory that is new costs more than what is done there
    if not finite:
        key = torch.where(value == value, key, 0x7FFF)
    return key.int().mul_(1 << 16).add_(0xFFFF - index.int())


def _unpack_short(packed, dtype):
    key = (packed >> 16).short()
    value = (key ^ ((key >> 15) & 0x7FFF)).view(dtype)
    return value.float(), 0xFFFF - (packed & 0xFFFF).long()
