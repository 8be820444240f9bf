"""DTensors against one process, to the bit: tokens sharded, factors sharded, and a layer that learns with either."""

import functools
import itertools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, INF, adversarial_logits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_distributed import refuses, run_together
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from omni_kernels import adaptive_router, omni_router, replay, sharded, sharded_router
from omni_kernels.configs import has_kernels
from omni_kernels.distributed import combine, dispatch, expert_range

if multiprocessing.parent_process():  # one of `run_together`
    sharded.WORTH = 1  # so that few columns are exchanged too

NORMALIZE = (None, "topk", "softmax", "log_softmax")


def spread(tensor, mesh, placements):
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_(tensor.requires_grad)


def leaves(x, y):
    return x.detach().requires_grad_(), y.detach().requires_grad_()


def gradient_like(scores):
    generator = torch.Generator().manual_seed(scores.numel())
    return torch.randn(scores.shape, generator=generator).to(scores)


def assert_same(got, want, exactly, name):
    """NaN for NaN. Not exactly: sums of exponentials that ranks added up in another order, and what follows of them."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    if exactly:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")
    else:
        eps = torch.finfo(want.dtype).eps
        rtol, atol = max(4e-6, 2 * eps), max(4e-6, eps)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}")


def assert_routes(x, y, k, mesh, placements, placements_y=None, want=None, function=sharded_router, **options):
    """Scores, experts and gradients; their placements, those of the results if told."""
    name = (x.dtype, tuple(x.shape), k, placements, placements_y, options)
    x, y = leaves(x, y)
    shard_tokens = options.pop("shard_tokens", False)
    scores, experts = omni_router(x, y, k, **options)
    grad = gradient_like(scores)
    scores.backward(grad)
    spread_x, spread_y = spread(x, mesh, placements), spread(y, mesh, placements_y or placements)
    if shard_tokens:
        options["shard_tokens"] = True
    got_scores, got_experts = function(spread_x, spread_y, k, **options)
    assert got_scores.placements == got_experts.placements, name
    assert want is None or got_scores.placements == tuple(want), (name, got_scores.placements)
    got_scores.backward(spread(grad, mesh, got_scores.placements))
    # Ranks that share factors add up in another order, and PyTorch normalizes for them where a kernel does for one.
    normalize, shares = options.get("normalize"), Shard(x.ndim - 1) in spread_x.placements
    exactly = not shares or normalize is None or (normalize == "topk" and not has_kernels(x))
    assert torch.equal(got_experts.full_tensor(), experts), name
    assert_same(got_scores.full_tensor(), scores.detach(), exactly, name)
    for leaf, whole in ((spread_x, x), (spread_y, y)):
        assert leaf.grad.placements == leaf.placements, (name, leaf.grad.placements)
        assert_same(leaf.grad.full_tensor(), whole.grad, exactly, name)
    return got_scores


def check_every_placement(device, rank, num_ranks):
    mesh = init_device_mesh(device.type, (num_ranks,))
    for dtype, n in itertools.product(DTYPES, (37, 64) if num_ranks == 2 else (37,)):
        x, y = adversarial_logits(n, dtype, device)
        for k, normalize in itertools.product((3, 20), NORMALIZE):
            if k == 20 and normalize in ("topk", "log_softmax"):
                continue
            for placement in (Shard(0), Replicate(), Shard(1)):
                want = [Replicate() if placement == Shard(1) else placement]
                assert_routes(x, y, k, mesh, [placement], want=want, normalize=normalize)
            assert_routes(x, y, k, mesh, [Shard(-1)], want=[Shard(0)], normalize=normalize, shard_tokens=True)
        assert_routes(x, y, 3, mesh, [Shard(1)], scores_dtype=torch.float32, function=omni_router)


def check_two_placements(device, rank, num_ranks):
    """x and y need not be placed alike; and other shapes than a matrix."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = (part.view(2, -1, 29)[:, :13] for part in adversarial_logits(29, torch.float32, device, repeats=2))
    for one, other, want in [
        (Shard(0), Replicate(), Shard(0)),
        (Replicate(), Shard(1), Shard(1)),
        (Shard(1), Shard(0), Shard(1)),
        (Shard(2), Shard(1), Shard(1)),
        (Shard(2), Replicate(), Replicate()),
        (Replicate(), Shard(2), Replicate()),
        (Shard(2), Shard(2), Replicate()),
    ]:
        assert_routes(x, y, 3, mesh, [one], [other], want=[want])
    assert_routes(x, y, 3, mesh, [Shard(2)], want=[Shard(0)], shard_tokens=True)
    for placement in (Replicate(), Shard(0)):
        assert_routes(x[0, 0], y[0, 0], 3, mesh, [placement], want=[Replicate()])
    assert_routes(*torch.zeros(2, 2, 0, 29, device=device), 3, mesh, [Shard(2)], want=[Replicate()])
    assert_routes(x, y, 0, mesh, [Shard(2)], want=[Replicate()])


def check_two_dimensions(device, rank, num_ranks):
    """A mesh of tokens by factors, and of factors by factors."""
    if num_ranks != 4:
        return
    mesh = init_device_mesh(device.type, (2, 2))
    x, y = adversarial_logits(29, torch.bfloat16, device)
    for shard_tokens, placements in itertools.product((False, True), itertools.permutations((Shard(0), Shard(1)))):
        want = [Shard(0) if placement == Shard(0) or shard_tokens else Replicate() for placement in placements]
        assert_routes(x, y, 4, mesh, placements, want=want, shard_tokens=shard_tokens)
    assert_routes(x, y, 4, mesh, [Shard(1), Shard(1)], want=[Replicate()] * 2)
    assert_routes(x, y, 4, mesh, [Replicate(), Shard(1)], want=[Replicate()] * 2)
    assert_routes(x, y, 4, mesh, [Shard(0), Shard(0)], want=[Shard(0)] * 2)


def check_partial(device, rank, num_ranks):
    """Sums that are still to be added up are."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    parts = [
        torch.randint(-9, 9, (2, 5, 11), generator=torch.Generator().manual_seed(r)).float() for r in range(num_ranks)
    ]
    x, y = leaves(*sum(parts).to(device))
    scores, experts = omni_router(x, y, 3)
    scores.sum().backward()
    own = [part.to(device).requires_grad_() for part in parts[rank]]
    got, got_experts = omni_router(*(DTensor.from_local(part, mesh, [Partial()]) for part in own), 3)
    got.sum().backward()
    assert got.placements == (Replicate(),)
    assert torch.equal(got.full_tensor(), scores) and torch.equal(got_experts.full_tensor(), experts)
    assert torch.equal(own[0].grad, x.grad) and torch.equal(own[1].grad, y.grad)


def check_shapes(device, rank, num_ranks):
    """Any sizes. Logits of few values have many ties; -0.0 and masks are among them. All ranks draw the same."""
    mesh = init_device_mesh(device.type, (num_ranks,))

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.integers(1, 40), st.integers(0, 5), st.integers(0, 12), st.sampled_from(DTYPES), st.integers(0, 2**30),
        st.sampled_from((Shard(0), Shard(1))), st.booleans(), st.sampled_from((0.0, 0.3, 0.97)),
        st.sampled_from((None, "topk")),
    )  # fmt: skip
    def run(n, num_tokens, k, dtype, seed, placement, shard_tokens, masks, normalize):
        generator = torch.Generator().manual_seed(seed)
        values = torch.tensor([-1.0, -0.0, 0.0, 0.5, 3.0])
        x, y = values[torch.randint(5, (2, num_tokens, n), generator=generator)].to(device, dtype)
        x, y = (
            part.masked_fill((torch.rand(part.shape, generator=generator) < masks).to(device), -INF) for part in (x, y)
        )
        assert_routes(x, y, min(k, n * n), mesh, [placement], shard_tokens=shard_tokens, normalize=normalize)

    run()


def check_replay(device, rank, num_ranks):
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = leaves(*adversarial_logits(23, torch.float32, device))
    _, experts = omni_router(x, y, 4)
    for normalize, (placement, where) in itertools.product(
        (None, "softmax"), itertools.product((Shard(0), Shard(1), Replicate()), (Shard(0), Replicate()))
    ):
        x.grad = y.grad = None
        scores = replay(x, y, experts, normalize=normalize)
        scores.backward(gradient_like(scores))
        spread_x, spread_y = (spread(part, mesh, [placement]) for part in (x, y))
        got = replay(spread_x, spread_y, spread(experts, mesh, [where]), normalize=normalize)
        want = placement if where == Replicate() and placement == Shard(0) else where
        assert got.placements == (want,)
        got.backward(spread(gradient_like(scores), mesh, [want]))
        assert_same(got.full_tensor(), scores.detach(), True, (placement, where))
        for leaf, whole in ((spread_x, x), (spread_y, y)):
            assert leaf.grad.placements == (placement,)
            assert_same(leaf.grad.full_tensor(), whole.grad, True, (placement, where))


def check_adaptive(device, rank, num_ranks):
    """Of probabilities that rounding cannot move across a limit."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = torch.randn(2, 9, 31, generator=torch.Generator().manual_seed(0)).mul(4).to(device)
    for placement, limit in itertools.product(
        (Shard(0), Shard(1)), ({"top_p": 0.8}, {"min_p": 0.3}, {"threshold": 0.1})
    ):
        scores, experts, counts = adaptive_router(x, y, 3, **limit)
        got = adaptive_router(*(spread(part, mesh, [placement]) for part in (x, y)), 3, **limit)
        want = Shard(0) if placement == Shard(0) else Replicate()
        assert all(part.placements == (want,) for part in got)
        assert_same(got[0].full_tensor(), scores, placement == Shard(0), limit)
        assert torch.equal(got[1].full_tensor(), experts) and torch.equal(got[2].full_tensor(), counts)


def check_compile(device, rank, num_ranks):
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = adversarial_logits(37, torch.float32, device)
    cases = [
        ([Shard(0)], omni_router, {}),
        ([Shard(0)], omni_router, {"normalize": "softmax"}),
        ([Shard(1)], omni_router, {}),
        ([Shard(1)], sharded_router, {"shard_tokens": True, "normalize": "softmax"}),
    ]
    for placements, function, options in cases if num_ranks == 2 else cases[num_ranks - 1 :][:1]:  # it takes long
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_routes(x, y, 3, mesh, placements, function=compiled, **options)
    torch._dynamo.reset()


def check_traffic(device, rank, num_ranks):
    """Whole tokens need no communication; sharded factors that of the shorter way, k keys of a factor and rank."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    for dtype, n, placement, options in itertools.product(
        DTYPES, (6, 100), (Shard(0), Replicate(), Shard(1)), ({}, {"shard_tokens": True}, {"normalize": "softmax"})
    ):
        x, y = (spread(torch.zeros(6, n, dtype=dtype, device=device), mesh, [placement]) for _ in range(2))
        with Collectives() as seen:
            sharded_router(x, y, 2, **options)
        if placement != Shard(1):
            assert seen.inputs == []
        elif n > 16 * num_ranks:  # 8 * ranks * k
            sums = 8 if "normalize" in options else 0
            assert seen.inputs == [6 * (2 * 2 * 2 * dtype.itemsize + sums)]
        elif num_ranks > 1:
            assert sum(seen.inputs) > 0


class Collectives(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the bytes of what goes into collectives, but for asynchronous ones: of what ranks agree on."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if "c10d_functional" in function.namespace and "all_" in str(function):
            self.inputs.append(args[0].nbytes)
        elif function.namespace == "c10d" and any(arg is False for arg in args):  # async_op
            self.inputs.append(args[1].nbytes)
        return function(*args, **(kwargs or {}))


def check_bad_input(device, rank, num_ranks):
    """What one rank refuses all do where they would communicate, and then go on together."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = torch.zeros(2, 3, 4 * num_ranks, device=device)
    own = torch.zeros(3, 4, device=device)
    good = {"x": spread(x, mesh, [Shard(1)]), "y": spread(y, mesh, [Shard(1)]), "k": 2, "options": {}}

    def call(x, y, k, options):
        return omni_router(x, y, k, **options)

    bad = [
        (TypeError, "router_logits_y must be a torch.Tensor", {"y": None}),
        (TypeError, "router_logits_y must be a DTensor", {"y": y}),
        (TypeError, "router_logits_x must be float32", {"x": spread(x.long(), mesh, [Shard(1)])}),
        (ValueError, "router_logits_y must have the shape", {"y": spread(y[1:], mesh, [Shard(1)])}),
        (ValueError, "num_experts_per_token must be from 0 to", {"k": (4 * num_ranks) ** 2 + 1}),
        (TypeError, "num_experts_per_token must be an int", {"k": 2.0}),
        (TypeError, "scores_dtype must be", {"options": {"scores_dtype": "fp32"}}),
        (ValueError, "normalize must be", {"options": {"normalize": "max"}}),
        (
            ValueError, "router_logits_x must have the local shape",
            {"x": DTensor.from_local(own[:, 1:], mesh, [Shard(1)], shape=x.shape, stride=x.stride())},
        ),
    ]  # fmt: skip
    different = [
        ("the logits' shapes", {name: DTensor.from_local(own[1:], mesh, [Shard(1)]) for name in "xy"}),
        ("the logits' shapes", {name: DTensor.from_local(own[:, 1:], mesh, [Shard(1)]) for name in "xy"}),
        ("the logits' dtypes", {name: DTensor.from_local(own.half(), mesh, [Shard(1)]) for name in "xy"}),
        ("requires_grad", {"x": spread(x, mesh, [Shard(1)]).requires_grad_()}),
        ("num_experts_per_token", {"k": 3}),
        ("normalize", {"options": {"normalize": "topk"}}),
    ]
    for culprit in {0, num_ranks - 1}:
        for error, message, change in bad:
            change, words = (change, message) if rank == culprit else ({}, f"rank {culprit} of the group refuses")
            refuses(error, words, call, *(good | change).values())
        for message, change in different if num_ranks > 1 else []:
            change = change if rank == culprit else {}
            refuses(ValueError, f"{message} must be the same on every rank", call, *(good | change).values())
        assert omni_router(good["x"], good["y"], 2)[0].shape == (3, 2)
    refuses(TypeError, "router_logits_x must be a DTensor", sharded_router, x, y, 2)
    row = spread(x[0], mesh, [Shard(0)])
    refuses(ValueError, "shard_tokens needs", sharded_router, row, row, 2, None, None, True)
    refuses(TypeError, "indices must be a DTensor", replay, good["x"], good["y"], torch.zeros(3, 2).int())
    refuses(ValueError, "exactly one of", adaptive_router, good["x"], good["y"], 2)
    negative = functools.partial(adaptive_router, top_p=0.5)
    refuses(ValueError, "max_experts_per_token must be", negative, good["x"], good["y"], -1)


def check_second_calls(device, rank, num_ranks):
    """What is kept of a call serves those alone that bring the same. Ranks still tell each other what they bring."""
    mesh = init_device_mesh(device.type, (num_ranks,))
    x, y = adversarial_logits(24 * num_ranks, torch.float32, device)
    both, half = [Shard(1), Shard(1)], [part.half() for part in (x, y)]
    cases = [
        ((x, y), both, (2,)), ((x, y), both, (3,)), (half, both, (2,)), ((x[1:], y[1:]), both, (2,)),
        ((x[:, num_ranks:], y[:, num_ranks:]), both, (2,)), ((x, y), [Shard(1), Replicate()], (2,)),
        ((x, y), both, (2, torch.float16)), ((x, y), both, (2, None, "topk")), ((x, y), both, (2, None, None, True)),
        ((x, y), both, (20,)), ((x, y.clone().requires_grad_()), both, (2,)),
    ]  # fmt: skip

    calls = []
    for logits, placements, rest in cases:
        parts = [spread(part, mesh, [placement]) for part, placement in zip(logits, placements, strict=True)]
        calls.append((*parts, *rest))
    for call, (logits, *name, rest) in zip(2 * calls, 2 * cases, strict=True):
        (got, got_experts), (scores, experts) = sharded_router(*call), omni_router(*logits, *rest[:3])
        assert torch.equal(got_experts.full_tensor(), experts), (name, rest)
        assert_same(got.full_tensor(), scores, "topk" not in rest, (name, rest))
    good, *others = calls
    for other, culprit in itertools.product(others, {0, num_ranks - 1}) if num_ranks > 1 else ():
        call = other if rank == culprit else good
        refuses(ValueError, "must be the same on every rank", sharded_router, *call)
    for bad, error in ((-1, ValueError), (2.0, TypeError)):
        call = good if rank else (*good[:2], bad)
        refuses(error, "num_experts_per_token must be|rank 0 of the group refuses", sharded_router, *call)

    group = dist.new_group()  # an equal mesh of another group, which is gone afterwards
    other_mesh = dist.DeviceMesh.from_group(group, device.type)
    own = [DTensor.from_local(part.to_local(), other_mesh, [Shard(1)], run_check=False) for part in good[:2]]
    sharded_router(*own, 4)
    dist.barrier()
    dist.destroy_process_group(group)
    sharded_router(*good[:2], 4)
    assert not any(group in call.groups for call in sharded._known.values())


def check_outside_of_the_mesh(device, rank, num_ranks):
    """Ranks that a mesh leaves out have none of its DTensors to route."""
    if num_ranks == 1:
        return
    mesh = torch.distributed.device_mesh.DeviceMesh(device.type, [0, 1] if num_ranks > 2 else [0])
    logits = distribute_tensor(torch.zeros(3, 8, device=device), mesh, [Shard(1)])
    if mesh.get_coordinate() is None:
        refuses(ValueError, "router_logits_x must have a mesh that this rank is in", omni_router, logits, logits, 2)
    else:
        assert omni_router(logits, logits, 2)[0].shape == (3, 2)


# A layer that learns, in numbers whose sums are exact, whatever their order -------------------------------------------

N, HIDDEN, TOKENS, STEPS = 12, 8, 24, 20


def rounded(tensor, step, limit):
    """To a multiple of a power of two, within a limit; its gradient passes."""
    return tensor + ((tensor / step).round().mul(step).clamp(-limit, limit) - tensor).detach()


def train(hidden, target, weights, values, experts_of, look_up):
    """The experts of every step. weights: of the gates of x and of y. experts_of: routes; look_up: sums of values."""
    chosen = []
    for _ in range(STEPS):
        logits = [torch.nn.functional.linear(hidden, weight) for weight in weights]
        scores, experts = experts_of(*logits)
        chosen.append(experts)
        output = look_up(scores, experts, values)
        (rounded(output, 2**-2, 4.0) - target).square().sum().mul(2**-3).backward()
        with torch.no_grad():
            for parameter in (*weights, values):
                grad = parameter.grad
                parameter.copy_(rounded(parameter - grad * 2**-7, 2**-4, 2.0))
                parameter.grad = None
    return chosen


def sum_of_values(scores, experts, values):
    return (scores[..., None] * values[experts.long()]).sum(1)


def check_training(device, rank, num_ranks):
    mesh = init_device_mesh(device.type, (num_ranks,))
    generator = torch.Generator().manual_seed(0)

    def integers(*shape, step=1.0):
        return torch.randint(-2, 3, shape, generator=generator).float().mul(step).to(device)

    hidden, target = integers(TOKENS, HIDDEN), integers(TOKENS, HIDDEN)
    weights, values = integers(2, N, HIDDEN, step=2**-2), integers(N * N, HIDDEN, step=2**-2)

    def parameter(tensor):
        return tensor.clone().requires_grad_()

    route = lambda x, y: omni_router(x, y, 2)  # noqa: E731
    want = train(hidden, target, [parameter(part) for part in weights], parameter(values), route, sum_of_values)
    assert len({step.cpu().numpy().tobytes() for step in want}) > 2  # it does learn

    # Factors sharded: gates of own columns.
    gates = [spread(part.requires_grad_(), mesh, [Shard(0)]) for part in weights.clone()]
    whole = DTensor.from_local(hidden, mesh, [Replicate()])

    def local_sum(scores, experts, values):
        return sum_of_values(scores.to_local(), experts.to_local(), values)

    got = train(whole, target, gates, parameter(values), route, local_sum)
    assert all(torch.equal(*both) for both in zip([step.to_local() for step in got], want, strict=True))

    # Tokens sharded, and the experts spread over their owners.
    gates = [spread(part.requires_grad_(), mesh, [Replicate()]) for part in weights.clone()]
    owned = expert_range(N * N, rank, num_ranks)
    own_values = parameter(values[owned.start : owned.stop])

    def sum_at_owners(scores, experts, values):
        dispatched = dispatch(own_hidden, scores.to_local(), experts.to_local(), N * N)
        return combine(values[dispatched.experts.long()], dispatched)

    own_tokens = spread(hidden, mesh, [Shard(0)])
    own_hidden, own_target = own_tokens.to_local(), spread(target, mesh, [Shard(0)]).to_local()
    got = train(own_tokens, own_target, gates, own_values, route, sum_at_owners)
    assert all(torch.equal(*both) for both in zip([step.full_tensor() for step in got], want, strict=True))


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize(
    ("num_ranks", "backend"), [(2, "gloo"), (3, "gloo"), (4, "gloo"), (1, "nccl"), (2, "nccl"), (4, "nccl")]
)
def test_ranks_together(backend, num_ranks, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # where the kernels would take minutes
    run_together(num_ranks, backend, tmp_path, CHECKS)


def test_plain_tensors_need_no_process_group():
    assert not dist.is_initialized()
    x = torch.zeros(1, 3)
    with pytest.raises(TypeError, match="must be a DTensor"):
        sharded_router(x, x, 2)
    assert omni_router(x, x, 2, normalize="topk")[1].tolist() == [[0, 1]]
