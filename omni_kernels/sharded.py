"""The router on DTensors. Imported where there is one: PyTorch takes half a second to import them.

Where tokens are sharded or replicated every rank routes what it has. Where the factors are sharded, as column-parallel
gates leave them, the k best experts of a token are pairs of the k best rows of x and the k best columns of y, and these
are among the k best that each rank finds in its columns. So ranks exchange those lists alone, as packed keys, and route
what came: a matrix of ranks * k columns, in the order of the columns that they stand for, so that ties break the same
way. Columns that are in no list count as masked.
"""

import functools
import math
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from . import reference
from .configs import has_kernels
from .distributed import backends_of, prepare, raise_together, refusal_code
from .factored import candidates, lists
from .factored.plan import OVER_ALL, Launches
from .operators import as_matrix, define

MAX_SPECS = 256  # that are kept
# Candidates are exchanged where they are that much fewer bytes than logits, since they are found, unpacked and merged.
# On two H200 131072 tokens with N = 256 and k = 16, a quarter of the bytes, were faster gathered.
WORTH = 4
# What they were called before PyTorch 2.12.
_gather_in_graph = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def route(functions, x, y, scores_dtype, normalize, check, facts, shard_tokens=False):
    """`router.sharded_router`.

    functions: of plain tensors: omni_router, the operator of `reference.sums_of_pairs`, that of a router's gradient.
    check: takes no argument, raises unless all are right, and gives k. facts: what else ranks must have in common.
    """
    eager = not is_compiling() and isinstance(x, DTensor) and isinstance(y, DTensor)
    key = _key(x, y, facts) if eager else None
    call = _known.get(key) if eager else None  # a compiler would hash what the others were
    if call is None or call.groups != _groups(x.device_mesh, call.dims):  # those of equal meshes may differ
        call = _call(x, y, check, facts, shard_tokens)
        if eager and len(call.dims) < 2:
            _known.keep(key, call)
    settle = call.tell()
    if call.way is None:
        settle()
    if call.moves:
        x, y = (_redistributed(logits, call.placements) for logits in (x, y))
    x, y = _local(x), _local(y)
    if call.exchanges:
        parts = _route_candidates(functions, x, y, call.k, scores_dtype, normalize, call.way, settle)
    elif call.way is not None:
        gather = _Gather.apply if _is_learned(x, y) else _gather_factors
        parts = functions[0](*gather(as_matrix(x), as_matrix(y), call.way, settle), call.k, scores_dtype, normalize)
        parts = [_as_tokens(part, x.shape[:-1], call.way) for part in parts]
    else:
        parts = functions[0](x, y, call.k, scores_dtype, normalize)
    return tuple(_wrapped(part, call.mesh, call.results, call.shape) for part in parts)


class _Call(NamedTuple):
    """What a call does, as far as others that bring logits alike do the same."""

    k: int
    dims: list  # of the mesh, along which ranks need each other
    groups: list  # of these
    tell: object  # as of `_agree`
    moves: bool  # whether logits are redistributed first
    placements: tuple  # to these
    way: object  # a _Way, if ranks bring each other their parts
    exchanges: bool  # whether these are candidates
    mesh: object
    results: tuple  # their placements
    shape: torch.Size


# Of calls in eager mode, that were checked. Else it takes PyTorch many times as long as the launches.
_known = Launches()


def _key(x, y, facts):
    """All that a `_Call` hangs on, to look it up."""
    tensors, enabled = (x._local_tensor, y._local_tensor), torch.is_grad_enabled()
    local = [(tensor.shape, tensor.device) for tensor in tensors]
    return x._spec, y._spec, *local, enabled and (x.requires_grad, y.requires_grad), *map(repr, facts.values())


def _call(x, y, check, facts, shard_tokens):
    k, asked, tell = _agree(x, y, check, facts)
    mesh, last = x.device_mesh, x.ndim - 1
    dims = [dim for dim in range(mesh.ndim) if _shard_factors(x, y, dim)]
    results = [_of_tokens(both, last) for both in zip(x.placements, y.placements, strict=True)]
    if shard_tokens:
        for dim in dims:
            results[dim] = Shard(0)
    placements, results, exchanges, way = results, tuple(results), False, None
    if len(dims) == 1:
        (dim,) = dims
        exchanges = _pays(x, k, dim, results)
        if exchanges or _gathers_at_once(x, y, dim, results):
            placements = [*results[:dim], Shard(last), *results[dim + 1 :]]
            way = _way(x, dim, placements, shard_tokens)
    moves = not (x.placements == y.placements == tuple(placements))
    shape = torch.Size((*x.shape[:-1], k))
    return _Call(k, asked, _groups(mesh, asked), tell, moves, placements, way, exchanges, mesh, results, shape)


def _groups(mesh, dims):
    return [mesh.get_group(dim) for dim in dims]


def replay(function, x, y, indices, check, facts):
    """`router.replay` where one of the three is a DTensor: `function` of plain ones, where the experts are."""
    _, _, tell = _agree(x, y, check, facts, indices)
    tell()()
    last = x.ndim - 1
    all_placements = zip(indices.placements, x.placements, y.placements, strict=True)
    placements = [_of_tokens(all_three, last) for all_three in all_placements]
    local = [_local(_redistributed(part, placements)) for part in (x, y, indices)]
    return _wrapped(function(*local), x.device_mesh, placements, indices.shape)


def on_local_tokens(function, *tensors):
    """A function that works on tokens one by one, of DTensors whose tokens are sharded alike or replicated."""
    mesh, placements, tokens = tensors[0].device_mesh, tensors[0].placements, tensors[0].shape[:-1]
    results = function(*(_local(tensor) for tensor in tensors))
    return tuple(_wrapped(result, mesh, placements, (*tokens, *result.shape[len(tokens) :])) for result in results)


# Placements -----------------------------------------------------------------------------------------------------------


def _is_shard(placement, last):
    """Whether a placement shards tokens, the dimensions before `last`."""
    return type(placement) is Shard and placement.dim != last


def _of_tokens(placements, last):
    """What placements of several tensors along one dimension of the mesh become, so that every rank has whole tokens:
    the first that shards tokens, else replicated."""
    for placement in placements:
        if _is_shard(placement, last):
            return placement
    return Replicate()


def _shard_factors(x, y, dim):
    """Whether a dimension of the mesh shards the factors of one, and the other's too or replicates that."""
    one, other = x.placements[dim], y.placements[dim]
    last = Shard(x.ndim - 1)
    return (one == last or other == last) and all(p == last or p.is_replicate() for p in (one, other))


def _pays(x, k, dim, results):
    """Whether to exchange candidates: 2 * ranks * k keys a token, twice as wide as logits, against 2 * N logits, are
    less than one part in WORTH."""
    return 0 < 2 * WORTH * x.device_mesh.size(dim) * k < x.shape[-1] and _in_order(dim, results)


def _gathers_at_once(x, y, dim, results):
    """Whether one collective can bring both factors: they are sharded alike, in equal parts, and no other dimension of
    the mesh changes."""
    others = [place for place in range(x.device_mesh.ndim) if place != dim]
    same = x.placements == y.placements and all(x.placements[place] == results[place] for place in others)
    in_equal_parts = x.shape[-1] % x.device_mesh.size(dim) == 0
    return same and in_equal_parts and _in_order(dim, results) and not is_compiling()


def _in_order(dim, results):
    """Whether tokens come out in their order. Those that a later dimension of the mesh shards too would not."""
    return not any(placement == results[dim] == Shard(0) for placement in results[dim + 1 :])


def _redistributed(tensor, placements):
    return tensor if tensor.placements == tuple(placements) else tensor.redistribute(placements=placements)


def _wrapped(tensor, mesh, placements, shape):
    """The DTensor of a shape that has this local part. Without a gradient it is made as PyTorch makes its own, in a
    tenth of the time."""
    shape = torch.Size(shape)
    if not (is_compiling() or tensor.requires_grad):
        spec = _spec(mesh, tuple(placements), shape, tensor.dtype)
        return DTensor.__new__(DTensor, tensor, spec, requires_grad=False)  # __init__ does nothing, in as long again
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=_strides(shape))


def _strides(shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


@functools.lru_cache(MAX_SPECS)
def _spec(mesh, placements, shape, dtype):
    return DTensorSpec(mesh, placements, TensorMeta(shape, _strides(shape), dtype))


class _Local(torch.autograd.Function):
    """`DTensor.to_local`. That of PyTorch 2.11 gives wrong strides to the gradient of a DTensor that is cut unevenly,
    so that its placements are lost where it is accumulated."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.rest = tensor.device_mesh, tensor.placements, tensor.shape
        return tensor._local_tensor.view_as(tensor._local_tensor)

    @staticmethod
    def backward(ctx, grad):
        return _wrapped(grad, *ctx.rest)


def _local(tensor):
    return _Local.apply(tensor) if _is_learned(tensor) else tensor._local_tensor


def _is_learned(*tensors):
    """Whether somebody may want gradients. Else an autograd function would only take time."""
    return is_compiling() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _sizes(size, num_ranks):
    """How much of a dimension each rank has, as `torch.chunk` gives it."""
    most = -(-size // num_ranks)
    return [max(0, min(most, size - rank * most)) for rank in range(num_ranks)]


def _local_shape(shape, mesh, placements):
    """That of this rank's part of a tensor, replicated where it is not sharded."""
    shape = list(shape)
    for dim, placement in enumerate(placements):
        if type(placement) is Shard:
            shape[placement.dim] = _sizes(shape[placement.dim], mesh.size(dim))[mesh.get_local_rank(dim)]
    return tuple(shape)


# What ranks tell each other first -------------------------------------------------------------------------------------


def _agree(x, y, check, facts, *others):
    """What `check` gives; the dimensions of the mesh along which ranks need each other; and a function that tells the
    others along these what this rank brings, and gives another to call before ranks wait for each other. All of them
    raise there if one does, or if they differ in what they bring: or here, if there are several such dimensions.

    Ranks that need no other say nothing, nor does compiled code. The integers travel by CPU if the group has a backend
    for it, so that nobody waits for a GPU.
    """
    if is_compiling():
        return check(), (), _tell_nothing
    given = [tensor for tensor in (x, y, *others) if isinstance(tensor, DTensor)]
    mesh = given[0].device_mesh
    refusal = k = None
    try:
        for name, tensor in zip(("router_logits_x", "router_logits_y", "indices"), (x, y, *others), strict=False):
            _check_spread(name, tensor, given[0])
        k = check()
    except (TypeError, ValueError) as error:
        refusal = error
    if mesh.get_coordinate() is None:
        raise refusal
    given = [tensor for tensor in given if tensor.device_mesh == mesh]
    last, dims = given[0].ndim - 1, []
    for dim in range(mesh.ndim):
        (placement, *different) = {tensor.placements[dim] for tensor in given}
        if different or not (_is_shard(placement, last) or placement.is_replicate()):
            dims.append(dim)
    if len(dims) == 1 and refusal is None:  # ranks of one dimension alone have something to tell: they need not wait
        return k, dims, _prepare(mesh, *dims, None, given, facts)
    for dim in dims:
        refusal = _reason(_prepare(mesh, dim, refusal, given, facts))
    if refusal is not None:
        raise refusal
    return k, dims, _tell_nothing


def _tell_nothing():
    return _nothing


def _nothing():
    """To wait for."""


def _reason(tell):
    """Why a rank raises, or None."""
    try:
        tell()()
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_spread(name, tensor, like):
    """Raises unless it is a DTensor of the same mesh, which this rank is in, cut as DTensors are."""
    if not isinstance(tensor, Tensor):
        return  # `check` says so
    mesh = like.device_mesh
    if not isinstance(tensor, DTensor):
        raise TypeError(f"{name} must be a DTensor, as others are, got {type(tensor).__name__}")
    if tensor.device_mesh != mesh:
        raise ValueError(f"{name} must have the mesh of the others, {mesh}, got {tensor.device_mesh}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} must have a mesh that this rank is in, got {mesh}")
    if not all(type(part) is Shard or part.is_replicate() or part.is_partial() for part in tensor.placements):
        return  # PyTorch knows how it is cut
    shape = _local_shape(tensor.shape, mesh, tensor.placements)
    if tensor._local_tensor.shape != shape:
        raise ValueError(
            f"{name} must have the local shape {shape}, a DTensor's part of {tuple(tensor.shape)} placed "
            f"{tensor.placements}, got {tuple(tensor._local_tensor.shape)}"
        )


def _prepare(mesh, dim, refusal, tensors, facts):
    """A function that tells the ranks along a dimension of the mesh what this one brings, as often as it is called. It
    gives another, that raises if this rank refuses, or one of them, or if they differ."""
    group, rank = mesh.get_group(dim), mesh.get_local_rank(dim)
    facts = {
        "the logits' shapes": [tuple(tensor.shape) for tensor in tensors],
        "the logits' placements": [tensor.placements for tensor in tensors],
        "the logits' dtypes": [tensor.dtype for tensor in tensors],
        "requires_grad": [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors],
        **facts,
    }
    backends = backends_of(group)
    backends = {"cpu": backends["cpu"]} if "cpu" in backends else backends
    code = 0 if refusal is None else refusal_code(refusal)
    tell = prepare(group, backends, None, code, [zlib.crc32(repr(fact).encode()) for fact in facts.values()])

    def settle(hear):
        told, received = hear()
        if refusal is None and torch.equal(told, received):
            return  # since each was told the same
        received = received.tolist()
        raise_together(refusal, received)
        for i, (name, fact) in enumerate(facts.items()):
            if len({row[1 + i] for row in received}) > 1:
                raise ValueError(f"{name} must be the same on every rank, got {fact} on rank {rank} of the group")

    return lambda: functools.partial(settle, tell())


# Factors sharded ------------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """How lists of candidates travel: from all ranks of a group to the ranks that finish the tokens, and back."""

    group: object
    num_ranks: int
    rank: int
    num_experts: int  # N
    first: int  # this rank's first column
    tokens: list  # how many each rank finishes of those that all have; None: every rank finishes all

    def bring(self, values):
        """(num_tokens, width) -> (num_ranks, tokens to finish, width): what all ranks have."""
        if self.tokens is None:
            return _gather(values, self.group, self.num_ranks).unflatten(0, (self.num_ranks, len(values)))
        received = self.tokens[self.rank]
        values = _trade(values, [received] * self.num_ranks, self.tokens, self.group)
        return values.unflatten(0, (self.num_ranks, received))

    def bring_back(self, values):
        """(num_ranks, tokens to finish, width) -> (num_tokens, width): the gradient of what this rank had."""
        if self.tokens is None:
            return values[self.rank]
        sent = [self.tokens[self.rank]] * self.num_ranks
        return _trade(values.flatten(0, 1).contiguous(), self.tokens, sent, self.group)

    def share(self, values):
        """(tokens to finish, width) -> (num_tokens, width): what all ranks made."""
        if self.tokens is None:
            return values
        sent = [len(values)] * self.num_ranks
        return _trade(values.repeat(self.num_ranks, 1), self.tokens, sent, self.group)


def _gather(values, group, num_ranks):
    if is_compiling():
        return collectives.wait_tensor(_gather_in_graph(values.contiguous(), 0, group))
    answer = values.new_empty((num_ranks * len(values), values.shape[1]))
    _gather_into(answer, values.contiguous(), group)
    return answer


def _trade(values, received, sent, group):
    if is_compiling():
        return collectives.wait_tensor(collectives.all_to_all_single(values, received, sent, group))
    answer = values.new_empty((sum(received), values.shape[1]))
    dist.all_to_all_single(answer, values, received, sent, group)
    return answer


def _way(x, dim, placements, shard_tokens):
    mesh, num_experts = x.device_mesh, x.shape[-1]
    num_ranks, rank = mesh.size(dim), mesh.get_local_rank(dim)
    tokens = None
    if shard_tokens:
        outer, *inner = _local_shape(x.shape, mesh, placements)[:-1]
        tokens = [size * math.prod(inner) for size in _sizes(outer, num_ranks)]
    first = sum(_sizes(num_experts, num_ranks)[:rank])
    return _Way(mesh.get_group(dim), num_ranks, rank, num_experts, first, tokens)


def _exchange(sums, keys, way):
    """The candidates' packed keys, and a few sums that travel with them."""
    if sums is None:
        return None, way.bring(keys)
    received = way.bring(torch.cat((keys, sums.view(keys.dtype)), 1))
    return received[..., keys.shape[1] :].contiguous().view(torch.float32), received[..., : keys.shape[1]]


class _Exchange(torch.autograd.Function):
    """`_exchange`, with the gradient of the sums, which travels back."""

    @staticmethod
    def forward(ctx, sums, keys, way):
        ctx.way = way
        sums, keys = _exchange(sums, keys, way)
        ctx.mark_non_differentiable(keys)
        return sums, keys

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return ctx.way.bring_back(grad), None, None


def _gather_factors(x, y, way, settle):
    """All columns of both factors, of the tokens that this rank finishes, in one collective."""
    parts = torch.cat((x, y), 1)
    settle()
    parts = way.bring(parts).unflatten(2, (2, x.shape[1]))
    return parts.permute(2, 1, 0, 3).flatten(2).unbind(0)


class _Gather(torch.autograd.Function):
    """`_gather_factors`, whose gradient goes to each rank's own columns."""

    @staticmethod
    def forward(ctx, x, y, way, settle):
        ctx.way = way
        return _gather_factors(x, y, way, settle)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        way = ctx.way
        parts = [grad.unflatten(1, (way.num_ranks, -1)).transpose(0, 1) for grad in grads]
        return *way.bring_back(torch.cat(parts, 2)).split(parts[0].shape[2], 1), None, None


class _Own(torch.autograd.Function):
    """Sums of pairs as they are, whose gradient goes to each rank's own columns of x and y."""

    @staticmethod
    def forward(ctx, x, y, sums, experts, way, sum_up):
        ctx.save_for_backward(experts)
        ctx.rest = way, sum_up, x.shape[1], x.dtype
        return sums.view_as(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        way, sum_up, num_columns, dtype = ctx.rest
        grad = way.share(grad.float() if grad.dtype == torch.float64 else grad)
        experts = way.share(ctx.saved_tensors[0])
        own = []  # one column more takes what is others'
        for place in (experts // way.num_experts - way.first, experts % way.num_experts - way.first):
            own.append(torch.where((place >= 0) & (place < num_columns), place, num_columns))
        grads = sum_up(grad.contiguous(), own[0] * (num_columns + 1) + own[1], num_columns + 1, dtype)
        return *(part[:, :num_columns].contiguous() for part in grads), None, None, None, None


def _best_columns(x, y, k, first_column):
    """`lists.best_columns`, by PyTorch where no kernel takes them."""
    if lists.runs_on(x, k):
        return lists.best_columns(x, y, k, first_column)
    return torch.cat([_keys_by_column(logits, k, first_column) for logits in (x, y)], 1)


def _keys_by_column(logits, k, first_column):
    keys = reference.top_keys(logits, min(k, logits.shape[1]))
    low = 0x7FFFFFFF if logits.dtype == torch.float32 else 0xFFFF
    keys = keys.gather(1, (keys & low).argsort(1, descending=True)) - first_column
    none = reference.top_keys(logits.new_full((1, 1), -torch.inf), 1) - low
    return torch.cat((keys, none.expand(len(keys), k - keys.shape[1])), 1)


def _empty_keys(x, _, k, __):
    return x.new_empty((len(x), 2 * k), dtype=torch.int64 if x.dtype == torch.float32 else torch.int32)


_BEST_COLUMNS = define(
    "best_columns", "(Tensor x, Tensor y, SymInt k, SymInt first) -> Tensor", _best_columns, _empty_keys
)


def _route_candidates(functions, x, y, k, scores_dtype, normalize, way, settle):
    """Scores and indices of the tokens that this rank finishes, from its columns of both factors. settle: called before
    ranks wait for each other."""
    omni_router, pairs, sum_up = functions
    dtype, tokens, learned = x.dtype, x.shape[:-1], _is_learned(x, y)
    scores_dtype = scores_dtype or dtype
    x, y = as_matrix(x), as_matrix(y)
    list_columns = _BEST_COLUMNS if is_compiling() else _best_columns  # an operator takes the host as long again
    keys = list_columns(x.detach(), y.detach(), k, way.first)
    sums, over_all = None, normalize in OVER_ALL
    if normalize is not None:
        x, y = x.float(), y.float()  # so that gradients are rounded once
    if over_all:
        sums = torch.cat([_own_total(logits) for logits in (x, y)], 1)
    settle()
    sums, keys = (_Exchange.apply if learned else _exchange)(sums, keys, way)

    with torch.no_grad():
        if normalize is None and not is_compiling() and has_kernels(keys):
            scores, places = omni_router(*candidates.matrices(keys, dtype), k, scores_dtype)
            experts = candidates.experts(keys, places, dtype, way.num_experts)
        else:
            lists = [part.transpose(0, 1).flatten(1) for part in keys.split(k, 2)]
            (all_x, rows), (all_y, columns) = (reference.unpack_keys(part, dtype) for part in lists)
            scores, places = omni_router(all_x.to(dtype), all_y.to(dtype), k, scores_dtype)
            experts = _experts(all_x, all_y, rows, columns, places, way.num_experts)
        if normalize is not None:
            best = reference.best_logits(all_x, all_y)
            scores = pairs(all_x, all_y, places, *reference.origins(*best))
    if learned:
        scores = _Own.apply(x, y, scores, experts, way, sum_up)
    if normalize is not None:
        totals = map(_total, sums.unbind(2), (all_x, all_y), best) if over_all else None
        scores = reference.normalize_sums(scores, all_x, all_y, *best, normalize, totals).to(scores_dtype)
    return _as_tokens(scores, tokens, way), _as_tokens(experts, tokens, way)


def _as_tokens(matrix, tokens, way):
    """A matrix of the tokens that this rank finishes, in their dimensions."""
    return matrix.reshape(*(tokens if way.tokens is None else (-1, *tokens[1:])), matrix.shape[1])


def _experts(x, y, rows, columns, places, num_experts):
    """The experts at some places among candidates, (num_tokens, k). x, y: the candidates, fp32. rows, columns: theirs.

    Of -inf pairs those of lowest index, as in `reference.factored_router`. One is selected only if fewer than k others
    exist. Then what is in no list is masked, or as good as: with a row or a column in a list it makes no other pair.
    """
    k, row, column = places.shape[1], places.long() // x.shape[1], places.long() % x.shape[1]
    experts = rows.gather(1, row) * num_experts + columns.gather(1, column)
    first_row = torch.where(rows == 0, x, -torch.inf).amax(1, keepdim=True)
    nothing = torch.full((len(y), k + 1), -torch.inf, device=y.device)
    first_columns = nothing.scatter(1, columns.clamp(max=k), y)[:, :k]  # k < N: the first experts are of row 0
    ordinary = ((x < torch.inf) & (y < torch.inf)).all(1, keepdim=True)
    masked = ordinary & (first_row + first_columns == -torch.inf)
    return reference.fill_masked(x.gather(1, row) + y.gather(1, column), experts, masked).int()


def _own_total(logits):
    """`reference.sum_of_exponentials` of a rank's columns, less their best; 0 if there is none."""
    if not logits.shape[1]:
        return logits.new_zeros((len(logits), 1))
    best, _ = reference.best_logits(logits, logits)
    return reference.sum_of_exponentials(logits, reference.origins(best, best)[0])


def _total(sums, logits, best):
    """That of all columns, less the best of all, from each rank's and its candidates, (num_tokens, num_ranks * k)."""
    (origin, _), own = reference.origins(best, best), logits.unflatten(1, (len(sums), -1)).amax(2)
    return (sums.t() * (own - origin).exp()).sum(1, keepdim=True)
