"""Experts spread over the ranks of a process group: tokens go to the owners of their experts, and sums come back."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import DTYPES, check_hidden, check_outputs, check_pairs, check_values
from .row_sums import row_sums

REFUSALS = (None, TypeError, ValueError)
# What all ranks must bring alike, as integers, and what an integer means.
ALIKE = {
    "hidden's size": int,
    "hidden's dtype": DTYPES.__getitem__,
    "scores' dtype": DTYPES.__getitem__,
    "num_experts": int,
    "scores' last dimension": int,
    "hidden's being on the CPU": bool,
    "torch.is_grad_enabled()": bool,
}


class Exchange(NamedTuple):
    """What `combine` needs to know of a `dispatch`. Its fields may change; hand it on as it is.

    A row is a token's hidden vector at one rank, a pair an expert of such a token. Sent are those of this rank's
    tokens, in the order of ranks, tokens and experts; received are those of this rank's experts, in the order of the
    ranks they came from, and their order there.
    """

    group: object  # a torch.distributed.ProcessGroup, None for the default one
    sent_rows: list  # how many, to every rank
    sent_pairs: list
    received_rows: list  # how many, from every rank
    received_pairs: list
    tokens: Tensor  # (rows sent,): the token of each
    pairs: Tensor  # (pairs sent,): where each is among all scores
    token_rows: Tensor  # (num_tokens, most): the rows sent of each token, in the order of ranks; -1 of none
    order: Tensor  # (pairs received,): which of them stands where, grouped by expert
    positions: Tensor  # the inverse permutation
    rows: Tensor  # the row of each, grouped by expert
    row_pairs: Tensor  # (rows received, most): the pairs of each row, grouped by expert; -1 of none
    shape: torch.Size  # of hidden
    dtype: torch.dtype


class Dispatched(NamedTuple):
    """The tokens that chose experts of this rank, and the pairs of these tokens and experts, grouped by expert: this
    rank's expert e has the pairs from offsets[e] to offsets[e + 1], in the order of ranks and of tokens there.

    hidden: (num_rows, hidden_size), the tokens' hidden vectors, each once. Differentiable.
    rows: (num_pairs,), int64, which of them is a pair's.
    experts: (num_pairs,), int32, a pair's expert, numbered from this rank's first, `expert_range(...).start`.
    scores: (num_pairs,), its score. Differentiable.
    offsets: (number of this rank's experts + 1,), int32. offsets[1:] are the ends that PyTorch's grouped_mm takes.
    exchange: how it all came, for `combine`.
    """

    hidden: Tensor
    rows: Tensor
    experts: Tensor
    scores: Tensor
    offsets: Tensor
    exchange: Exchange

    def inputs(self):
        """(num_pairs, hidden_size): hidden[rows]. Its gradient adds a token's pairs up in their order, in fp32; that of
        the indexing may add them in any."""
        return _Gather.apply(self.hidden, self.exchange)


def expert_range(num_experts, rank, num_ranks):
    """The experts that a rank of a group owns: those e with e * num_ranks // num_experts == rank, a range."""
    return range(-(-rank * num_experts // num_ranks), -(-(rank + 1) * num_experts // num_ranks))


def dispatch(hidden, scores, indices, num_experts, group=None):
    """Send every token to the owners of its experts. All ranks of the group call it together; each has its own tokens.

    Rank r owns the experts of `expert_range(num_experts, r, num_ranks)`. A hidden vector goes once to a rank, however
    many of the token's experts live there. An expert that a token names twice makes two pairs.

    Ranks first exchange a few integers: whether they refuse their arguments, what must be alike, and how much each will
    send to each. The host reads these once, as PyTorch wants to know the sizes: so every call waits for the GPU. The
    rest does not. Runs in eager mode.

    If hidden or scores require gradients on one rank, all ranks' results do. Then every rank must call backward, also
    one without tokens or pairs, as gradients travel the same way back. No atomics: the same bits on every run.

    A rank that dies or never calls leaves the others waiting until the group's timeout ends them. Set it where the
    group is made, long enough for the slowest step: `init_process_group(..., timeout=datetime.timedelta(minutes=5))`,
    or the same argument of `new_group`. Gloo then raises RuntimeError; NCCL's watchdog ends the process, unless
    TORCH_NCCL_ASYNC_ERROR_HANDLING=0 forbids it.

    Args:
        hidden: (..., hidden_size), fp32, fp16 or bf16, on a device that the group's backend serves. Leading dimensions
            are of tokens. Their number may differ between ranks, and be 0.
        scores: (..., k), fp32, fp16 or bf16, the leading dimensions and device of hidden. k is the same on all ranks.
        indices: (..., k), int32 or int64, from 0 to num_experts - 1; -1 is no expert, as `adaptive_router` gives it.
        num_experts: from 1 to 2³¹ - 1; N² of a router. It may be less than the number of ranks.
        group: the process group; the default one if None.

    Returns:
        A `Dispatched`.

    Raises:
        TypeError: hidden, scores or indices are no dense tensors of such dtypes, num_experts is no integer, or group no
            process group.
        ValueError: shapes or devices differ, the backend does not serve the device, an index or num_experts is out of
            range, the ranks disagree, this rank is not in the group, or there is no process group.
        But for the group, which a rank can only refuse alone, all ranks raise if one does.
    """
    rank, num_ranks = _place(group)
    backends = backends_of(group)
    refusal, alike, counts = None, [0] * len(ALIKE), None
    try:
        num_experts = check_pairs(scores, indices, None, num_experts)
        check_hidden(hidden, scores, backends)
    except (TypeError, ValueError) as error:
        refusal, refused, wanted, device = error, refusal_code(error), (False, False), None
    else:
        k, device = scores.shape[-1], hidden.device
        enabled = torch.is_grad_enabled()
        alike = [
            hidden.shape[-1],
            DTYPES.index(hidden.dtype),
            DTYPES.index(scores.dtype),
            num_experts,
            k,
            device.type == "cpu",
            enabled,
        ]
        wanted = (enabled and hidden.requires_grad, enabled and scores.requires_grad)
        experts = indices.reshape(indices.shape[:-1].numel(), k).long()
        refused = ((experts < -1) | (experts >= num_experts)).any() * REFUSALS.index(ValueError)
        sending = _Sending(experts, num_experts, num_ranks)
        counts = sending.counts
    hear = prepare(group, backends, device, refused, [*alike, *wanted], counts)()
    sent, received = torch.stack(hear()).tolist()
    if refusal is None and sent[0][0]:
        try:
            check_values("indices", indices, -1, num_experts - 1)
        except ValueError as error:
            refusal = error
    raise_together(refusal, received)
    for i, (name, meaning) in enumerate(ALIKE.items()):
        values = [meaning(row[1 + i]) for row in received]
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on every rank, got {values} on ranks 0 to {num_ranks - 1}")

    sent_rows, sent_pairs, _ = (list(part) for part in zip(*(row[-3:] for row in sent), strict=True))
    received_rows, received_pairs, most = (list(part) for part in zip(*(row[-3:] for row in received), strict=True))
    pairs, tokens, codes, token_rows = sending.plan(sum(sent_rows), sum(sent_pairs))
    codes = _all_to_all(codes, sent_pairs, received_pairs, group)
    matrix = hidden.reshape(len(token_rows), hidden.shape[-1])
    arrive = _start(matrix.detach()[tokens], sent_rows, received_rows, group)  # while pairs are put in order
    local, order, positions, rows, row_pairs = _receive(codes, sum(received_rows), max(most))
    every_expert = torch.arange(len(expert_range(num_experts, rank, num_ranks)) + 1, device=device)
    offsets = torch.searchsorted(local, every_expert.int(), out_int32=True)
    exchange = Exchange(
        group,
        sent_rows,
        sent_pairs,
        received_rows,
        received_pairs,
        tokens,
        pairs,
        token_rows,
        order,
        positions,
        rows,
        row_pairs,
        hidden.shape,
        hidden.dtype,
    )
    first = 1 + len(ALIKE)
    matrix = _requiring(matrix, any(row[first] for row in received))
    scores = _requiring(scores, any(row[first + 1] for row in received))
    vectors, scores = _Dispatch.apply(matrix, scores.flatten(), exchange, arrive)
    return Dispatched(vectors, rows, local, scores, offsets, exchange)


def combine(outputs, dispatched):
    """Bring the experts' outputs home: for every token the sum of its experts' outputs, weighted by their scores.

    All ranks of the group call it together. The owner adds up the pairs of a token in the order of experts and sends
    one fp32 row back; home adds those up in the order of ranks and rounds once. No atomics: the same bits on every run.
    The sums' order, and so their last bits, hang on the number of ranks.

    Ranks first tell each other whether they refuse their arguments. The host reads that, and so waits for the GPU.

    If outputs or scores require gradients on one rank, all ranks' results do, and every rank must call backward.

    Args:
        outputs: (num_pairs, hidden_size), fp32, fp16 or bf16, what the experts made of the pairs of `dispatched`, in
            their order and not weighted.
        dispatched: as `dispatch` returned it.

    Returns:
        (..., hidden_size), the shape and dtype of the hidden that was dispatched; 0 for a token without an expert.
        Differentiable in outputs, in the scores and, through outputs, in hidden. Gradients are rounded to their
        tensors' dtypes, those of hidden once at each owner, where autograd keeps them so, and once at home.

    Raises:
        TypeError: dispatched is no `Dispatched`; outputs is no dense tensor of such a dtype.
        ValueError: outputs has another shape or device, or torch.is_grad_enabled() differs between ranks.
        But for dispatched, without which there is no group to tell, all ranks raise if one does.
    """
    if not isinstance(dispatched, Dispatched):
        raise TypeError(f"dispatched must be what dispatch returned, got {type(dispatched).__name__}")
    exchange, device, enabled = dispatched.exchange, dispatched.hidden.device, torch.is_grad_enabled()
    refusal, refused, wanted = None, 0, False
    try:
        check_outputs(outputs, dispatched.hidden, len(dispatched.rows))
        wanted = enabled and outputs.requires_grad
    except (TypeError, ValueError) as error:
        refusal, refused = error, refusal_code(error)
    hear = prepare(exchange.group, backends_of(exchange.group), device, refused, [enabled, wanted])()
    if refusal is None:  # meanwhile
        sums = row_sums(outputs.detach(), exchange.row_pairs, torch.float32, dispatched.scores.detach())
    received = hear()[1].tolist()
    raise_together(refusal, received)
    if len({row[1] for row in received}) > 1:
        raise ValueError("torch.is_grad_enabled() must be the same on every rank")
    outputs = _requiring(outputs, any(row[2] for row in received))
    return _Combine.apply(outputs, dispatched.scores, exchange, sums).view(exchange.shape)


# What ranks tell each other first ------------------------------------------------------------------------------------


def _place(group):
    """This rank's number in the group, and how many there are. Raises unless it is in the group."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this rank is in, got what new_group returns to other ranks")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must be one that this rank is in")
    return rank, dist.get_world_size(group)


def backends_of(group):
    """The group's backend for every type of device."""
    return dict(part.split(":") for part in dist.get_backend_config(group).split(","))


def refusal_code(error):
    return REFUSALS.index(TypeError if isinstance(error, TypeError) else ValueError)


def prepare(group, backends, device, refused, facts, counts=None):
    """A function that tells each rank refused, facts and three counts, as often as it is called. It gives another, that
    waits for what each told this one, and gives both as matrices, a row for each rank.

    The integers travel by a device that all ranks choose alike, since one of them may have brought no tensor: by a GPU
    only if its backend is for GPUs. device: of this rank's tensors, None if they were refused.
    """
    kind = next((kind for kind, backend in backends.items() if kind != "cpu" and backend != "gloo"), "cpu")
    if device is None or device.type != kind:
        device = torch.device(kind)
    message = torch.zeros(dist.get_world_size(group), 4 + len(facts), dtype=torch.int64, device=device)
    message[:, 0] = refused
    message[:, 1:-3] = torch.tensor(facts, dtype=torch.int64, device=device)
    if counts is not None:
        message[:, -3:] = counts

    def tell():
        answer = torch.empty_like(message)
        work = dist.all_to_all_single(answer, message, group=group, async_op=True)

        def hear():
            work.wait()
            return message, answer

        return hear

    return tell


def raise_together(refusal, received):
    if refusal is not None:
        raise refusal
    for rank, (code, *_) in enumerate(received):
        if code:
            raise REFUSALS[code](f"rank {rank} of the group refuses its arguments")


def _requiring(tensor, wanted):
    """The tensor, or one of its values that requires gradients where another rank's does: so that all go backward."""
    return tensor.detach().requires_grad_() if wanted and not tensor.requires_grad else tensor


# Who gets what -------------------------------------------------------------------------------------------------------


class _Sending:
    """What a rank sends. experts: (num_tokens, k), int64; others than there are count as none."""

    def __init__(self, experts, num_experts, num_ranks):
        self.num_ranks, self.k, device = num_ranks, experts.shape[1], experts.device
        k, none = max(self.k, 1), (experts < 0) | (experts >= num_experts)
        # No two keys are equal: a stable sort of short rows takes a GPU six times as long as another.
        keys = experts.masked_fill(none, num_experts) * k + torch.arange(self.k, device=device)
        keys = keys.sort(dim=1).values
        self.experts, self.slots = keys // k, keys % k
        owners = self.experts * num_ranks // num_experts  # num_ranks where there is no expert: these sort last
        self.starts = owners < num_ranks  # the first pair of a token at a rank
        self.starts[:, 1:] &= owners[:, 1:] != owners[:, :-1]
        short = torch.uint8 if num_ranks < 256 else torch.int32  # sorted in fewer passes
        owners, self.order = owners.flatten().to(short).sort(stable=True)
        owners = owners.long()
        starts = self.starts.flatten()[self.order]
        self.rows = starts.cumsum(0) - 1
        self.local = self.experts.flatten()[self.order] - -(-owners * num_experts // num_ranks)
        self.local = torch.where(starts, ~self.local, self.local)  # negative, it starts a row

        bounds = torch.searchsorted(owners, torch.arange(num_ranks + 1, device=device))
        row_bounds = torch.cat((self.rows.new_zeros(1), self.rows + 1))[bounds]
        most = torch.where(owners < num_ranks, _places(starts, self.rows) + 1, 0)
        most = torch.cat((most, most.new_zeros(1))).amax().expand(num_ranks)
        # (num_ranks, 3): rows and pairs for each rank, and how many pairs a row has at most
        self.counts = torch.stack((row_bounds.diff(), bounds.diff(), most), dim=1)

    def plan(self, num_rows, num_pairs):
        """The sent pairs' places among the scores, the rows' tokens, the pairs' codes, and the rows of tokens."""
        k, device = max(self.k, 1), self.order.device
        tokens = self.order // k
        pairs = tokens * k + self.slots.flatten()[self.order]
        firsts = torch.searchsorted(self.rows[:num_pairs].contiguous(), torch.arange(num_rows, device=device))
        rows = torch.empty_like(self.rows).scatter(0, self.order, self.rows).view(self.starts.shape)
        rows = rows.masked_fill(~self.starts, num_rows).sort(dim=1).values[:, : min(self.k, self.num_ranks)]
        rows = rows.masked_fill(rows == num_rows, -1)
        return pairs[:num_pairs], tokens[firsts], self.local[:num_pairs].int(), rows


def _receive(codes, num_rows, most):
    """What came: codes, (num_pairs,), int32, as `_Sending` makes them. Returns experts in order, then as in Exchange
    the order, positions, rows and row_pairs."""
    starts = codes < 0
    rows = starts.cumsum(0) - 1
    local, order = torch.where(starts, ~codes, codes).sort(stable=True)
    positions = order.scatter(0, order, torch.arange(len(order), device=order.device))
    row_pairs = torch.full((num_rows * most,), -1, device=order.device)
    row_pairs = row_pairs.scatter(0, rows * most + _places(starts, rows), positions).view(num_rows, most)
    return local, order, positions, rows[order], row_pairs


def _places(starts, rows):
    """Each pair's place in its row, from 0. (A GPU's cummax of one row has one multiprocessor.)"""
    numbers = torch.arange(len(starts), device=starts.device)
    firsts = numbers.new_zeros(len(starts) + 1).scatter(0, torch.where(starts, rows, len(starts)), numbers)
    return numbers - firsts[rows]


# What travels, and back ----------------------------------------------------------------------------------------------


def _all_to_all(values, sent, received, group):
    """What the ranks have for this one. sent, received: how many for each rank and from each."""
    return _start(values, sent, received, group)()


def _start(values, sent, received, group):
    """`_all_to_all` begun: a function that waits for it and gives what came."""
    answer, values = values.new_empty((sum(received), *values.shape[1:])), values.contiguous()
    work = dist.all_to_all_single(answer, values, received, sent, group=group, async_op=True)

    def arrive():
        work.wait()
        return answer

    return arrive


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, scores, exchange, arrive):
        ctx.exchange, ctx.num_scores = exchange, len(scores)
        scores = _all_to_all(scores[exchange.pairs], exchange.sent_pairs, exchange.received_pairs, exchange.group)
        return arrive(), scores[exchange.order]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_scores):
        exchange = ctx.exchange
        need_hidden, need_scores, *_ = ctx.needs_input_grad  # the same on all ranks
        hidden = scores = None
        if need_hidden:
            hidden = _all_to_all(grad_hidden, exchange.received_rows, exchange.sent_rows, exchange.group)
            hidden = row_sums(hidden, exchange.token_rows, grad_hidden.dtype)
        if need_scores:
            grad_scores = grad_scores[exchange.positions]
            grad_scores = _all_to_all(grad_scores, exchange.received_pairs, exchange.sent_pairs, exchange.group)
            scores = grad_scores.new_zeros(ctx.num_scores).scatter(0, exchange.pairs, grad_scores)
        return hidden, scores, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, exchange):
        ctx.exchange = exchange
        return hidden[exchange.rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return row_sums(grad, ctx.exchange.row_pairs, grad.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, scores, exchange, sums):
        ctx.exchange = exchange
        ctx.save_for_backward(outputs, scores)
        sums = _all_to_all(sums, exchange.received_rows, exchange.sent_rows, exchange.group)
        return row_sums(sums, exchange.token_rows, exchange.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exchange, (outputs, scores) = ctx.exchange, ctx.saved_tensors
        grad = _all_to_all(grad[exchange.tokens], exchange.sent_rows, exchange.received_rows, exchange.group)
        grad = grad[exchange.rows].float()
        need_outputs, need_scores, *_ = ctx.needs_input_grad
        grad_outputs = (grad * scores.float()[:, None]).to(outputs.dtype) if need_outputs else None
        grad_scores = (grad * outputs.float()).sum(1).to(scores.dtype) if need_scores else None
        return grad_outputs, grad_scores, None, None
