"""What notebook 05 measures: the router inside its layer, from logits to probabilities and back.

The rival is what layers do without `normalize`: log-softmax of both factors in fp32, the router, exp. Whose results are
not right is not timed.
"""

import functools
import os

import torch
import torch.nn.functional as F

from omni_kernels import adaptive_router, omni_router

from . import calls, faults, speed, tables, timing
from .binaries import binary_of
from .progress import tqdm
from .rivals import CASE, DTYPES, Case

MAIN = speed.MAIN
CASES = [
    MAIN, MAIN._replace(num_expert_sqrt=1024), *(MAIN._replace(num_tokens=count) for count in (8192, 1024, 1048576))
]  # fmt: skip
ROUTER, OURS, EAGER = "router alone", 'normalize="softmax"', "log_softmax, router, exp"
COMPILED, ADAPTIVE = f"{EAGER}, compiled", "adaptive_router"
BACKWARD, BOTH, ONE_THREAD = f"{OURS}, {calls.BACKWARD}", calls.BOTH, calls.ONE_THREAD
GRAPH = f"{BOTH} in a CUDA graph"
COMPARED = [OURS, EAGER, COMPILED]  # there and back
GATES, LOG_SOFTMAX, LATER_ROUTER, EXP = "gates", "log_softmax", "router, fp32", "exp"
WIDTH = 1024  # of the hidden states that gates read
TOP_P = 0.5
IDENTITY = ["rival", *CASE, "binary", "error"]
SAMPLE = 1024  # tokens whose gradients are compared
CLOSE = 1e-5  # of what is compared, besides a rounding of its dtype

ACCURACY_CASES = [Case(4096, num_expert_sqrt, 16, "fp32") for num_expert_sqrt in (256, 1024)]
SCALES = (0.1, 1.0, 4.0, 16.0, 64.0)  # standard deviations of the logits
PROMISED = {"probability_error": 2e-6, "log_error": 1e-6}  # of its value; of max(1, its size)


# --- what is right ---


def exact_logs(x, y, indices):
    """The log-probabilities of experts among all N², in fp64: the definition."""
    x, y, indices = x.double(), y.double(), indices.long()
    rows, columns = indices // x.shape[1], indices % x.shape[1]
    return x.log_softmax(1).gather(1, rows) + y.log_softmax(1).gather(1, columns)


def exact_gradients(x, y, indices):
    """Those of the sum of all these experts' probabilities."""
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    return torch.autograd.grad(exact_logs(x, y, indices).exp().sum(), (x, y))


def check_result(got, want, x, y):
    """Raises unless the probabilities are those of the k best, which `want`, indices, are; where some tie, others may
    be chosen. Behind a count there is nothing."""
    scores, indices, *counts = got
    right = exact_logs(x, y, want).exp()
    kept = torch.ones_like(indices, dtype=torch.bool)
    if counts:
        before = right.cumsum(1) - right
        fewest, most = ((before < limit).sum(1) for limit in (TOP_P - CLOSE, TOP_P + CLOSE))
        if not ((fewest <= counts[0]) & (counts[0] <= most)).all():
            raise ValueError("counts differ")
        kept = torch.arange(indices.shape[1], device=x.device) < counts[0][:, None]
    chosen = exact_logs(x, y, indices.masked_fill(~kept, 0)).exp()
    rounding = torch.finfo(scores.dtype).eps / 2
    for name, values, close in (("scores", scores, CLOSE + rounding), ("experts", chosen, CLOSE)):
        if not torch.where(kept, (values - right).abs() <= close * right, (scores == 0) & (indices == -1)).all():
            raise ValueError(f"{name} differ")


def check_gradients(got, x, y, indices):
    """Raises unless gradients are those of the sum of these experts' probabilities. Looks at SAMPLE tokens."""
    want = exact_gradients(x[:SAMPLE], y[:SAMPLE], indices[:SAMPLE])
    for grad, right in zip(got, want, strict=True):
        close = torch.finfo(grad.dtype).eps * right.abs() + CLOSE * right.abs().amax(1, keepdim=True)
        if not ((grad[:SAMPLE] - right).abs() <= close).all():
            raise ValueError("gradients differ")


# --- times ---


def routes_of(k):
    """{name: function of logits}, each with scores and experts for its result."""

    def composed(x, y):
        scores, experts = omni_router(*(logits.log_softmax(-1, dtype=torch.float32) for logits in (x, y)), k)
        return scores.exp(), experts

    torch._dynamo.config.recompile_limit = 64  # beyond it would silently run uncompiled
    return {
        ROUTER: lambda x, y: omni_router(x, y, k),
        OURS: lambda x, y: omni_router(x, y, k, normalize="softmax"),
        EAGER: composed,
        COMPILED: torch.compile(composed, dynamic=False),
        ADAPTIVE: lambda x, y: adaptive_router(x, y, k, top_p=TOP_P),
    }


def backward_alone(route):
    """The backward pass of a route as a function of logits. The first call with some logits is the forward pass too.
    Autograd goes back on the stream of the way there: that must be the one that CUDA graphs are captured on."""

    @functools.cache
    def routed(x, y):
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream if x.is_cuda else None
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            scores = route(*leaves)[0]
            grad = torch.ones_like(scores)
        torch.cuda.synchronize()
        return scores, leaves, grad

    def backward(x, y):
        scores, leaves, grad = routed(x, y)
        return torch.autograd.grad(scores, leaves, grad, retain_graph=True)

    return backward


def there_and_back(route):
    """Both passes of a route as a function of logits, for CUDA graphs: both in one call, on whatever stream that is."""

    def step(x, y):
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        scores = route(*leaves)[0]
        return torch.autograd.grad(scores, leaves, torch.ones_like(scores))

    return step


def parts_of(x, y, k):
    """What stands around a router without `normalize`: {name: (function, the tensors it takes)}."""
    hidden = torch.randn(len(x), WIDTH, device=x.device, dtype=x.dtype)
    weight = torch.randn(2 * x.shape[1], WIDTH, device=x.device, dtype=x.dtype)
    logs = tuple(logits.log_softmax(-1, dtype=torch.float32) for logits in (x, y))
    return {
        GATES: (lambda hidden: F.linear(hidden, weight), (hidden,)),
        LOG_SOFTMAX: (lambda *both: [logits.log_softmax(-1, dtype=torch.float32) for logits in both], (x, y)),
        LATER_ROUTER: (lambda *logs: omni_router(*logs, k), logs),
        EXP: (torch.exp, (omni_router(*logs, k)[0],)),
    }


def backward_bytes(case):
    """What the way back has to move: k gradients and indices (int32) and two rows in, two rows out, for every token."""
    size = DTYPES[case.dtype].itemsize
    return case.num_tokens * (case.k * (size + 4) + 4 * case.num_expert_sqrt * size)


def measure(again="OMNI_AGAIN" in os.environ):
    """Measure the cases that are not on record for this GPU, these versions and the kernels launched here; with `again`
    all of them. Of a case that lacks a row, or has one that failed, all rows are measured.

    Returns:
        What was done, in words.
    """
    if not torch.cuda.is_available():
        return "not measured: no GPU here"
    known = set() if again else tables.last_keys(tables.of_setting("layer"), ["rival", *CASE])
    done = []
    for case in tqdm(CASES, "layer", unit="case", leave=False):
        rows = faults.attempt(rows_of, case, known)
        if isinstance(rows, dict):
            done.append(f"{' '.join(map(str, case))}: {rows['error']}")
        elif rows:
            tables.append("layer", rows)
            done.append(f"{' '.join(map(str, case))}: measured now")
    return "; ".join(done) or "all cases measured before"


def rows_of(case, known=frozenset()):
    """The table's rows of a case, or none where the identities of all are known."""
    x, y = speed.logits(case)
    routes = routes_of(case.k)
    timed = {name: (route, (x, y)) for name, route in routes.items()}
    timed[BACKWARD] = backward_alone(routes[OURS]), (x, y)
    if case.num_tokens == MAIN.num_tokens:
        timed |= parts_of(x, y, case.k)
    timed |= {f"{name}, {GRAPH}": (there_and_back(routes[name]), (x, y)) for name in COMPARED}
    steps = {step: call for name in COMPARED for step, call in calls.differentiated(name, routes[name], x, y).items()
             if step.endswith((BOTH, ONE_THREAD))}  # fmt: skip
    floors = {name: speed.num_bytes(case) for name in routes} | {BACKWARD: backward_bytes(case)}
    floors |= {f"{name}, {GRAPH}": floors[name] + floors[BACKWARD] for name in COMPARED}
    limits = speed.limits()
    rows = {}
    for name in (*timed, *steps):
        floor = floors[name] / limits["bandwidth_gbs"] / 1e3 if name in floors else None
        unknown = dict.fromkeys(["method", *speed.QUANTILES, "call_us", "binary", "error"])
        rows[name] = {"rival": name, **case._asdict(), "floor_us": floor, **limits, **unknown}
    for name in (ROUTER, OURS, ADAPTIVE, BACKWARD, f"{OURS}, {GRAPH}"):  # the others belong to PyTorch's version
        call, tensors = timed[name]
        rows[name] |= faults.attempt(lambda call=call, tensors=tensors: {"binary": binary_of(lambda: call(*tensors))})
    if all(tables.key(row, IDENTITY) in known for row in rows.values()):
        return []

    want = speed.reference(x, y, case.k)
    for name, (call, tensors) in timed.items():
        if not rows[name]["error"]:
            rows[name] |= faults.attempt(_checked_and_timed, name, call, tensors, want, routes)
    for name, step in steps.items():
        failed = faults.attempt(_check_step, step, _route_of(name, routes), x, y)
        rows[name] |= failed or {"method": "rounds"}
    works = {name: step for name, step in steps.items() if not rows[name]["error"]}
    for name, times in timing.rounds_us(works, calls.ROUNDS).items():
        rows[name] |= speed.quantiles(times)
    return list(rows.values())


def _route_of(name, routes):
    """That of a step's name."""
    return routes[name.rsplit(", ", 1)[0]]


def _checked_and_timed(name, call, tensors, want, routes):
    if name == ROUTER and speed.compare(call(*tensors), want, *tensors) != "equal":
        raise ValueError("result differs")
    if name in (OURS, EAGER, COMPILED, ADAPTIVE):
        check_result(call(*tensors), want[1], *tensors)
    if name == BACKWARD:
        check_gradients(call(*tensors), *tensors, want[1])
    if name.endswith(GRAPH):
        check_gradients(call(*tensors), *tensors, _route_of(name, routes)(*tensors)[1])
    return speed.times_us(call, *tensors)


def _check_step(step, route, x, y):
    check_gradients(step(), x, y, route(x, y)[1])


# --- accuracy ---


def errors_of(case, scale):
    """Rows of the largest errors against fp64, on normal logits of a scale: of `normalize` and of its rival. Scores are
    fp32; probabilities that this cannot hold to its full precision do not count."""
    x, y = (logits * scale for logits in speed.logits(case))
    ours = [omni_router(x, y, case.k, torch.float32, normalize) for normalize in ("softmax", "log_softmax")]
    logs, experts = omni_router(*(logits.log_softmax(-1, dtype=torch.float32) for logits in (x, y)), case.k)
    found = {OURS: (ours[0][0], ours[1][0], ours[0][1]), EAGER: (logs.exp(), logs, experts)}
    rows = []
    for name, (scores, logs, experts) in found.items():
        want = exact_logs(x, y, experts)
        apart = (logs - want).abs()
        counted = want.exp() >= torch.finfo(scores.dtype).smallest_normal
        errors = (scores / want.exp() - 1).abs()[counted], apart / want.abs().clamp(min=1), apart
        largest = zip((*PROMISED, "log_error_absolute"), (error.max().item() for error in errors), strict=True)
        rows.append({"rival": name, **case._asdict(), "scale": scale, **dict(largest)})
    return rows


def measure_accuracy(binary):
    rows = [row for case in ACCURACY_CASES for scale in SCALES for row in errors_of(case, scale)]
    tables.append("layer_accuracy", rows, binary=binary)


def launch_accuracy():
    """Launches what `measure_accuracy` measures."""
    for case in ACCURACY_CASES:
        errors_of(case, 1.0)
