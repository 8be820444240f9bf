"""Experts spread over ranks against a layer that one process computes alone, in numbers whose sums are exact."""

import datetime
import functools
import itertools
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from omni_kernels import brute_force_router
from omni_kernels.distributed import combine, dispatch, expert_range

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN, NUM_EXPERTS, K = 4, 9, 3
TIMEOUT = datetime.timedelta(seconds=60)


def integers(*shape, generator, low=-2, high=2):
    return torch.randint(low, high + 1, shape, generator=generator).float()


def random_case(num_ranks, sizes=None, num_experts=NUM_EXPERTS, k=K, experts=None, seed=0, numbers=integers):
    """(hidden, scores, indices, gradient of the result) of every rank; indices among `experts`, with padding, an expert
    now and then twice. sizes: the tokens of every rank."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor(range(num_experts) if experts is None else experts)
    parts = []
    for rank in range(num_ranks):
        shape = sizes[rank] if sizes else (5 + rank,)
        indices = experts[torch.randint(len(experts), (*shape, k), generator=generator)]
        indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < 0.2, -1).int()
        hidden, grad = (numbers(*shape, HIDDEN, generator=generator) for _ in range(2))
        parts.append((hidden, numbers(*shape, k, generator=generator) / 2, indices, grad))
    return parts


def parameters(num_experts, numbers=integers):
    generator = torch.Generator().manual_seed(1)
    return numbers(num_experts, HIDDEN, generator=generator), numbers(num_experts, HIDDEN, generator=generator)


def alone(case, num_experts, weights, biases, dtype):
    """Every rank's (result, gradients of hidden and scores) in fp64, rounded, and the gradients of the parameters."""
    weights, biases = (part.double().requires_grad_() for part in (weights, biases))
    results = []
    for hidden, scores, indices, grad in case:
        hidden, scores = (part.to(dtype).double().requires_grad_() for part in (hidden, scores))
        chosen = indices.clamp(min=0).long()
        outputs = (hidden[..., None, :] * weights[chosen] + biases[chosen]) * (indices >= 0)[..., None]
        result = (scores[..., None] * outputs).sum(-2)
        result.backward(grad.to(dtype).double())
        results.append((result.detach(), hidden.grad, scores.grad))
    return results, (weights.grad, biases.grad)


def spread(case, num_experts, weights, biases, dtype, device, group=None, inputs=None):
    """The same of this rank, through dispatch and combine; the parameters' gradients are those of its experts."""
    rank = dist.get_rank(group)
    owned = expert_range(num_experts, rank, dist.get_world_size(group))
    weights, biases = (part[owned.start : owned.stop] for part in (weights, biases))
    weights, biases = (part.to(device, dtype, copy=True).requires_grad_() for part in (weights, biases))
    hidden, scores, indices, grad = (part.to(device) for part in case[rank])
    hidden, scores = (part.detach().to(dtype, copy=True).requires_grad_() for part in (hidden, scores))
    dispatched = dispatch(hidden, scores, indices, num_experts, group)
    assert dispatched.scores.dtype == dispatched.hidden.dtype == dtype
    vectors = dispatched.inputs() if inputs is None else inputs(dispatched)
    experts = dispatched.experts.long()
    result = combine(vectors * weights[experts] + biases[experts], dispatched)
    assert (result.shape, result.dtype) == (hidden.shape, dtype)
    result.backward(grad.to(dtype))
    return dispatched, (result.detach(), hidden.grad, scores.grad), (weights.grad, biases.grad)


def assert_groups(dispatched, case, num_experts, rank, num_ranks):
    """A vector comes once, its pairs in the order of experts, then of ranks and tokens."""
    owned = expert_range(num_experts, rank, num_ranks)
    assert [e for e in range(num_experts) if e * num_ranks // num_experts == rank] == list(owned)
    vectors, pairs = [], []
    for hidden, scores, indices, _ in case:
        hidden = hidden.view(-1, HIDDEN)
        scores, indices = (part.reshape(len(hidden), part.shape[-1]) for part in (scores, indices))
        chosen = zip(hidden, scores, indices, strict=True)
        for vector, row_scores, row in chosen:
            here = [(e - owned.start, len(vectors), s) for e, s in zip(row.tolist(), row_scores, strict=True)]
            here = [pair for pair in here if 0 <= pair[0] < len(owned)]
            pairs += here
            vectors += [vector] if here else []
    pairs.sort(key=lambda pair: pair[:2])
    assert [*zip(dispatched.experts.tolist(), dispatched.rows.tolist(), dispatched.scores.tolist(), strict=True)] == [
        (e, row, s.item()) for e, row, s in pairs
    ]
    assert dispatched.hidden.tolist() == [vector.tolist() for vector in vectors]
    assert dispatched.offsets.tolist() == [sum(e < end for e, _, _ in pairs) for end in range(len(owned) + 1)]
    assert (dispatched.rows.dtype, dispatched.experts.dtype) == (torch.int64, torch.int32)
    assert dispatched.offsets.dtype == torch.int32


def some(num_tokens, device):
    """So many tokens, or a sixth where kernels are interpreted."""
    return num_tokens // 6 if device.type == "cpu" else num_tokens


def some_dtypes(name, device):
    """All of them, or where kernels are interpreted fp32 alone in most cases: who gets what hangs on no dtype."""
    return DTYPES[:1] if device.type == "cpu" and name not in ("random", "many") else DTYPES


def check_layer(device, rank, num_ranks):
    last = expert_range(NUM_EXPERTS, num_ranks - 1, num_ranks)
    none, other = [(0,)] * num_ranks, [(7,)] * (num_ranks - 1)
    cases = {
        "random": {},
        "all to the first rank": {"experts": [0, 1]},
        "all to the last rank": {"experts": last},
        "one expert has all": {"experts": [NUM_EXPERTS // 2]},
        "no expert at all": {"experts": [-1]},
        "a rank without tokens": {"sizes": [(0,), *other]},
        "the last rank has all tokens": {"sizes": [*none[1:], (6,)]},
        "no tokens": {"sizes": none},
        "fewer experts than ranks": {"num_experts": 1},
        "two experts": {"num_experts": 2},
        "many": {"num_experts": 1000, "k": 20, "sizes": [(some(30, device),)] * num_ranks},
        "leading dimensions": {"sizes": [(2, 3)] + [(3, 1, 2)] * (num_ranks - 1)},
        "no dimension": {"sizes": [()] * num_ranks},
        "k of 0": {"k": 0},
    }
    for name, options in cases.items():
        num_experts, case = options.get("num_experts", NUM_EXPERTS), random_case(num_ranks, **options)
        for dtype in some_dtypes(name, device):
            assert_layer(case, num_experts, dtype, device, rank, num_ranks, name=name)


def assert_layer(case, num_experts, dtype, device, rank, num_ranks, group=None, name=""):
    weights, biases = parameters(num_experts)
    wants, want_parameters = alone(case, num_experts, weights, biases, dtype)
    dispatched, got, got_parameters = spread(case, num_experts, weights, biases, dtype, device, group)
    assert_groups(dispatched, case, num_experts, rank, num_ranks)
    for part, want in zip(got, wants[rank], strict=True):
        assert torch.equal(part.cpu(), want.to(dtype)), (name, dtype)
    owned = expert_range(num_experts, rank, num_ranks)
    if dtype == torch.float32:  # others' are beyond what the dtype holds exactly
        for part, want in zip(got_parameters, want_parameters, strict=True):
            assert torch.equal(part.cpu(), want[owned.start : owned.stop].to(dtype)), name


def check_router(device, rank, num_ranks):
    """With what a router chose."""
    case = []
    for hidden, _, _, grad in random_case(num_ranks):
        x, y = integers(2, len(hidden), 3, generator=torch.Generator().manual_seed(len(hidden)))
        case.append((hidden, *brute_force_router(x, y, K), grad))
    assert_layer(case, 9, torch.float32, device, rank, num_ranks)


def check_indexing(device, rank, num_ranks):
    """hidden[rows] is what inputs() is, and so are its gradients where sums are exact."""
    case = random_case(num_ranks)
    run = functools.partial(spread, case, NUM_EXPERTS, *parameters(NUM_EXPERTS), torch.float32, device)
    one, two = run(), run(inputs=lambda dispatched: dispatched.hidden[dispatched.rows])
    assert all(torch.equal(*both) for both in zip(one[1] + one[2], two[1] + two[2], strict=True))


def check_floats(device, rank, num_ranks):
    """Any floats: near fp64, and the same bits on every run."""

    def normal(*shape, generator):
        return torch.randn(shape, generator=generator)

    case = random_case(num_ranks, sizes=[(some(50, device),)] * num_ranks, k=8, numbers=normal)
    weights, biases = parameters(NUM_EXPERTS, normal)
    for dtype in DTYPES:
        wants, _ = alone(case, NUM_EXPERTS, weights.to(dtype), biases.to(dtype), dtype)
        _, got, _ = spread(case, NUM_EXPERTS, weights, biases, dtype, device)
        _, again, _ = spread(case, NUM_EXPERTS, weights, biases, dtype, device)
        for part, other, want in zip(got, again, wants[rank], strict=True):
            assert torch.equal(part, other)
            error = (part.cpu().double() - want).abs().max()
            assert error <= 8 * torch.finfo(dtype).eps * want.abs().max(), (dtype, error)


def check_rounds_once(device, rank, num_ranks):
    """In bf16 1 + 2**-8 + 2**-8 is 1 + 2**-7, though each sum in bf16 were 1; whichever ranks have the parts."""
    hidden = torch.ones(1, HIDDEN, dtype=torch.bfloat16, device=device)
    scores = torch.tensor([[1.0, 2.0**-8, 2.0**-8]], device=device)
    for experts in ([0, 1, 2], [0, 4, 8]):
        dispatched = dispatch(hidden, scores, torch.tensor([experts], device=device), NUM_EXPERTS)
        assert combine(dispatched.inputs(), dispatched).tolist() == [[1 + 2.0**-7] * HIDDEN]


def check_gradients_wanted_on_one_rank(device, rank, num_ranks):
    """Nobody waits for a rank whose tensors require none, or whose experts got nothing and made constants."""
    hidden, scores, indices, _ = (part.to(device) for part in random_case(num_ranks, experts=[0])[rank])
    for wanting in ("hidden", "scores", "outputs", None):
        mine = rank == (0 if wanting == "outputs" else num_ranks - 1)  # only rank 0 has pairs
        h, s = (
            part.detach().requires_grad_(mine and wanting == name)
            for part, name in ((hidden, "hidden"), (scores, "scores"))
        )
        dispatched = dispatch(h, s, indices, NUM_EXPERTS)
        outputs = dispatched.inputs()
        outputs = outputs if len(outputs) else torch.zeros_like(outputs, requires_grad=False)
        factor = torch.ones(HIDDEN, device=device, requires_grad=mine and wanting == "outputs")
        result = combine(outputs * factor if mine and wanting == "outputs" else outputs, dispatched)
        assert result.requires_grad == (wanting is not None)
        if wanting is not None:
            result.sum().backward()
        chosen = (indices >= 0).float()
        if mine and wanting == "hidden":
            assert torch.equal(h.grad, (scores * chosen).sum(-1, keepdim=True).expand_as(hidden))
        if mine and wanting == "scores":
            assert torch.equal(s.grad, hidden.sum(-1, keepdim=True) * chosen)
        if mine and wanting == "outputs":
            assert factor.grad.shape == (HIDDEN,)


def check_no_grad(device, rank, num_ranks):
    hidden, scores, indices, _ = (part.to(device) for part in random_case(num_ranks)[rank])
    with torch.no_grad():
        dispatched = dispatch(hidden.requires_grad_(), scores, indices, NUM_EXPERTS)
        assert not combine(dispatched.inputs(), dispatched).requires_grad
    if num_ranks == 1:
        return
    with torch.set_grad_enabled(rank > 0):
        refuses(ValueError, "is_grad_enabled", dispatch, hidden, scores, indices, NUM_EXPERTS)
        refuses(ValueError, "is_grad_enabled", combine, dispatched.inputs(), dispatched)


def check_strides(device, rank, num_ranks):
    hidden, scores, indices, _ = (part.to(device) for part in random_case(num_ranks)[rank])
    results = []
    for parts in ((hidden, scores, indices), (part.t().contiguous().t() for part in (hidden, scores, indices.long()))):
        dispatched = dispatch(*parts, NUM_EXPERTS)
        results.append(combine(dispatched.inputs().t().contiguous().t(), dispatched))
    assert torch.equal(*results)


def refuses(error, message, function, *arguments):
    with pytest.raises(error, match=message) as caught:
        function(*arguments)
    assert type(caught.value) is error


def check_bad_input(device, rank, num_ranks):
    """What one rank refuses all do, whichever it is, and then go on together."""
    hidden, scores, indices, _ = (part.to(device) for part in random_case(num_ranks)[rank])
    good = {"hidden": hidden, "scores": scores, "indices": indices, "num_experts": NUM_EXPERTS}
    outside = good["indices"].clone()
    outside[0, 0] = NUM_EXPERTS
    below = good["indices"].clone()
    below[-1, -1] = -2
    bad = [
        (TypeError, "hidden must be a torch.Tensor", {"hidden": None}),
        (TypeError, "hidden must be float32", {"hidden": good["hidden"].double()}),
        (TypeError, "hidden must be dense", {"hidden": good["hidden"].to_sparse()}),
        (ValueError, "hidden must have shape", {"hidden": good["hidden"][1:]}),
        (ValueError, "hidden must have shape", {"hidden": good["hidden"][0, 0]}),
        (ValueError, "hidden must have the device", {"hidden": good["hidden"].to("meta")}),
        (ValueError, "group serves", {name: good[name].to("meta") for name in ("hidden", "scores", "indices")}),
        (TypeError, "scores must be float32", {"scores": good["scores"].long()}),
        (TypeError, "indices must be int32", {"indices": good["scores"]}),
        (ValueError, "indices must have shape", {"indices": good["indices"][:, 1:]}),
        (ValueError, f"indices must be from -1 to 8, got {NUM_EXPERTS}", {"indices": outside}),
        (ValueError, "indices must be from -1 to 8, got -2", {"indices": below}),
        (TypeError, "num_experts must be an int", {"num_experts": 9.0}),
        (ValueError, "num_experts must be from 1", {"num_experts": 0}),
    ]
    different = [
        ("hidden's size", {"hidden": good["hidden"][:, 1:]}),
        ("hidden's dtype", {"hidden": good["hidden"].half()}),
        ("scores' dtype", {"scores": good["scores"].half()}),
        ("num_experts", {"num_experts": NUM_EXPERTS + 1}),
        ("scores' last dimension", {name: good[name][:, 1:] for name in ("scores", "indices")}),
    ]
    for culprit in {0, num_ranks - 1}:
        for error, message, change in bad:
            change, message = (change, message) if rank == culprit else ({}, f"rank {culprit} of the group refuses")
            refuses(error, re.escape(message), dispatch, *(good | change).values())
        for message, change in different if num_ranks > 1 else []:
            change = change if rank == culprit else {}
            refuses(ValueError, f"{message} must be the same on every rank", dispatch, *(good | change).values())
        dispatched = dispatch(*good.values())
        outputs = dispatched.inputs()
        bad_outputs = [
            (TypeError, "outputs must be a torch.Tensor", None),
            (TypeError, "outputs must be float32", outputs.double()),
            (ValueError, "outputs must have shape", torch.cat((outputs, outputs[:1], outputs.new_zeros(1, HIDDEN)))),
            (ValueError, "outputs must have shape", outputs[:, 1:]),
            (ValueError, "outputs must have the device", outputs.to("meta")),
        ]
        for error, message, value in bad_outputs:
            mine = rank == culprit
            message = message if mine else f"rank {culprit} of the group refuses"
            refuses(error, message, combine, value if mine else outputs, dispatched)
        assert combine(outputs, dispatched).shape == good["hidden"].shape
    refuses(TypeError, "dispatched must be what dispatch returned", combine, outputs, tuple(dispatched))


def check_groups(device, rank, num_ranks):
    """Within a group of some ranks; others have nothing to do with it."""
    members = sorted({0, num_ranks - 1})
    group, case = dist.new_group(members), random_case(len(members))
    if rank in members:
        assert_layer(case, NUM_EXPERTS, torch.float32, device, members.index(rank), len(members), group)
    else:
        refuses(ValueError, "group must be one that this rank is in", dispatch, *case[0][:3], NUM_EXPERTS, group)
    refuses(TypeError, "group must be a process group or None", dispatch, *case[0][:3], NUM_EXPERTS, "world")


def check_dead_rank(device, rank, num_ranks):
    """The group's timeout ends those who wait. NCCL's would end the process."""
    if device.type != "cpu":
        return
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if rank:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            dispatch(*random_case(num_ranks)[rank][:3], NUM_EXPERTS, group)
        assert time.monotonic() - start < 30
    dist.barrier()


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


def run_checks(rank, num_ranks, backend, file, checks):
    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{file}", TIMEOUT, num_ranks, rank)
    for check in checks:
        check(device, rank, num_ranks)
        dist.barrier()
    dist.destroy_process_group()


def run_together(num_ranks, backend, folder, checks):
    """One start of the processes for all checks, which takes longer than they do."""
    if backend == "nccl" and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    multiprocessing.spawn(run_checks, (num_ranks, backend, folder / "ranks", checks), num_ranks)


RANKS = [("gloo", number) for number in (1, 2, 3)] + [("nccl", number) for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(("backend", "num_ranks"), RANKS)
def test_ranks_together(backend, num_ranks, tmp_path):
    run_together(num_ranks, backend, tmp_path, CHECKS)


def test_without_a_process_group():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="process group"):
        dispatch(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1).int(), 1)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 256, 46340**2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 1000])
def test_every_expert_has_one_owner(num_experts, num_ranks):
    ranges = [expert_range(num_experts, rank, num_ranks) for rank in range(num_ranks)]
    assert ranges[0].start == 0 and ranges[-1].stop == num_experts
    assert all(left.stop == right.start for left, right in itertools.pairwise(ranges))
    for rank, owned in enumerate(ranges):
        assert all(e * num_ranks // num_experts == rank for e in [*owned[:1], *owned[-1:]])
