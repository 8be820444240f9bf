"""What notebook 05 measures and draws: the router inside its layer, from logits to probabilities and back.

The rival is what layers do without `normalize`: log-softmax of both factors in fp32, the router, exp. Whose results are
not right is not timed.
"""

import functools
import os

import calls
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import speed_study as speed
import tables
import timing
import torch
import torch.nn.functional as F
from binaries import binary_of
from routing_study import BLUE, GREEN, ORANGE, RED
from speed_study import CASE, DTYPES, Case, microseconds, number, share
from tqdm import tqdm

from omni_kernels import adaptive_router, omni_router

MAIN = speed.MAIN
CASES = [
    MAIN, MAIN._replace(num_expert_sqrt=1024), *(MAIN._replace(num_tokens=count) for count in (8192, 1024, 1048576))
]  # fmt: skip
ROUTER, OURS, EAGER = "router alone", 'normalize="softmax"', "log_softmax, router, exp"
COMPILED, ADAPTIVE = f"{EAGER}, compiled", "adaptive_router"
BACKWARD, BOTH = f"{OURS}, {calls.BACKWARD}", calls.BOTH
COMPARED = [OURS, EAGER, COMPILED]  # forward + backward, from Python
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
        rows = speed.attempt(rows_of, case, known)
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
    steps = {f"{name}, {BOTH}": calls.differentiated(name, routes[name], x, y)[f"{name}, {BOTH}"] for name in COMPARED}
    floors = {name: speed.num_bytes(case) for name in routes} | {BACKWARD: backward_bytes(case)}
    limits = speed.limits()
    rows = {}
    for name in (*timed, *steps):
        floor = floors[name] / limits["bandwidth_gbs"] / 1e3 if name in floors else None
        unknown = dict.fromkeys(["method", *speed.QUANTILES, "call_us", "binary", "error"])
        rows[name] = {"rival": name, **case._asdict(), "floor_us": floor, **limits, **unknown}
    for name in (ROUTER, OURS, ADAPTIVE, BACKWARD):  # the others belong to PyTorch's version
        call, tensors = timed[name]
        rows[name] |= speed.attempt(lambda call=call, tensors=tensors: {"binary": binary_of(lambda: call(*tensors))})
    if all(tables.key(row, IDENTITY) in known for row in rows.values()):
        return []

    want = speed.reference(x, y, case.k)
    for name, (call, tensors) in timed.items():
        if not rows[name]["error"]:
            rows[name] |= speed.attempt(_checked_and_timed, name, call, tensors, want)
    for name, step in steps.items():
        failed = speed.attempt(_check_step, step, routes[name.removesuffix(f", {BOTH}")], x, y)
        rows[name] |= failed or {"method": "rounds"}
    works = {name: step for name, step in steps.items() if not rows[name]["error"]}
    for name, times in timing.rounds_us(works, calls.ROUNDS).items():
        rows[name] |= zip(speed.QUANTILES, np.quantile(times, list(speed.QUANTILES.values())).tolist(), strict=True)
    return list(rows.values())


def _checked_and_timed(name, call, tensors, want):
    if name == ROUTER and speed.compare(call(*tensors), want, *tensors) != "equal":
        raise ValueError("result differs")
    if name in (OURS, EAGER, COMPILED, ADAPTIVE):
        check_result(call(*tensors), want[1], *tensors)
    if name == BACKWARD:
        check_gradients(call(*tensors), *tensors, want[1])
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


def accuracy_table(rows):
    """Errors as multiples of 10⁻⁶."""
    columns = [*PROMISED, "log_error_absolute"]
    lines = [(number(row.scale, "g"), row.num_expert_sqrt, row.k, f"`{row.rival}`" if row.rival == OURS else row.rival,
              *(number(1e6 * getattr(row, column), ".2f") for column in columns))
             for row in rows.itertuples()]  # fmt: skip
    return speed.markdown(["logits' scale", "N", "k", "route", "largest error of a probability, of its value, 10⁻⁶",
                           "of a log-probability, of max(1, its size), 10⁻⁶", "the same, absolute, 10⁻⁶"],
                          lines)  # fmt: skip


# --- reading the table ---


def _times_of_cases(rows):
    """Every case of one GPU with the times of all that was measured in it, NaN of what failed."""
    for case, group in rows.groupby(CASE, sort=False):
        times = group.set_index("rival").us
        yield Case(*case), lambda name, times=times: times.get(name, np.nan), group.set_index("rival").floor_us


def _sizes(case):
    return f"{case.num_tokens:,}", case.num_expert_sqrt


def _head(rows):
    return [f"tokens (k = {rows.k.iloc[0]}, {rows.dtype.iloc[0]})", "N"]


def forward_table(rows):
    lines = []
    for case, us, floor in _times_of_cases(rows):
        lines.append((*_sizes(case), *map(microseconds, (floor[OURS], us(ROUTER), us(OURS))),
                      number(us(OURS) / us(ROUTER), ".2f"), *map(microseconds, (us(EAGER), us(COMPILED), us(ADAPTIVE))),
                      number(us(ADAPTIVE) / us(OURS), ".2f")))  # fmt: skip
    return speed.markdown([*_head(rows), "floor, µs", "router alone, µs", f"`{OURS}`, µs", "over the router",
                           f"{EAGER}, µs", "compiled, µs", f"`adaptive_router`, top_p = {TOP_P}, µs",
                           f"over `{OURS}`"], lines)  # fmt: skip


def backward_table(rows):
    lines = [(*_sizes(case), microseconds(floor[BACKWARD]), microseconds(us(BACKWARD)),
              share(floor[BACKWARD], us(BACKWARD)))
             for case, us, floor in _times_of_cases(rows)]  # fmt: skip
    return speed.markdown([*_head(rows), "floor, µs", f"backward of `{OURS}`, µs", "of the floor's speed"], lines)


def steps_table(rows):
    lines = []
    for case, us, _ in _times_of_cases(rows):
        ours, eager, compiled = (us(f"{name}, {BOTH}") for name in COMPARED)
        lines.append((*_sizes(case), *map(microseconds, (ours, eager, compiled)), number(ours / eager, ".2f"),
                      number(ours / compiled, ".2f")))  # fmt: skip
    return speed.markdown([*_head(rows), f"`{OURS}`, µs", f"{EAGER}, µs", "compiled, µs", "ours over eager",
                           "ours over compiled"], lines)  # fmt: skip


def layer_table(rows):
    """The short one, for README."""
    lines = []
    for case, us, _ in _times_of_cases(rows):
        steps = [us(f"{name}, {BOTH}") for name in COMPARED]
        lines.append((*_sizes(case), *map(microseconds, (us(ROUTER), us(OURS), us(EAGER), us(COMPILED), *steps)),
                      number(steps[0] / steps[2], ".2f")))  # fmt: skip
    return speed.markdown([*_head(rows), "router alone, µs", f"`{OURS}`, µs", f"{EAGER}, µs", "compiled, µs",
                           f"forward + backward of `{OURS}`, µs", f"of {EAGER}, µs", "compiled, µs",
                           "ours over compiled"], lines)  # fmt: skip


def adaptive_table(rows):
    lines = [(row.rival, f"{row.value:g}", f"{row.experts:.2f}", f"{row.loss:.4f}") for row in rows.itertuples()]
    return speed.markdown(["rule", "its number", "experts a token, mean", "loss, nats a byte"], lines)


# --- pictures ---

STACKS = {
    "before": [GATES, LOG_SOFTMAX, LATER_ROUTER, EXP],
    "before,\ncompiled": [GATES, COMPILED],
    "after": [GATES, OURS],
}
COLORS = {GATES: "0.75", LOG_SOFTMAX: ORANGE, LATER_ROUTER: BLUE, EXP: RED, COMPILED: sns.light_palette(ORANGE)[3],
          OURS: GREEN}  # fmt: skip


def draw_layer(rows):
    """What a layer takes from hidden states to weights and experts, before and after: a row of panels for every GPU, a
    panel for every N."""
    rows = rows[rows.num_tokens == MAIN.num_tokens]
    groups = list(rows.groupby(["gpu", "num_expert_sqrt"], sort=False))
    columns = rows.num_expert_sqrt.nunique()
    height = len(groups) // columns
    figure, panels = plt.subplots(height, columns, figsize=(5.4 * columns, 2.9 * height), squeeze=False)
    for axes, ((gpu, size), group) in zip(panels.flat, groups, strict=True):
        times, labeled = group.set_index("rival").us, set()
        for place, names in enumerate(STACKS.values()):
            ends = np.cumsum([times[name] for name in names])
            for name, end in zip(names, ends, strict=True):
                label = None if name in labeled else name
                axes.barh(place, times[name], left=end - times[name], color=COLORS[name], height=0.7, label=label)
                labeled.add(name)
            axes.text(ends[-1], place, f" {microseconds(ends[-1])}", va="center", fontsize=9)
        axes.set_yticks(range(len(STACKS)), STACKS)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        axes.set(xlabel=f"µs of kernels, forward, {MAIN.num_tokens:,} tokens, k = {MAIN.k}", title=f"{gpu}, N = {size}")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    return speed.finish(figure)


def draw_adaptive(rows):
    """Loss on unseen text against the experts that a token runs: fixed k, and as many as it needs."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for (name, group), (color, marker) in zip(
        rows.groupby("rival", sort=False), ((ORANGE, "s"), (BLUE, "^"), (RED, "v"), (GREEN, "o")), strict=False
    ):
        axes.plot(group.experts, group.loss, color=color, marker=marker, label=name)
        for row in group.itertuples():
            axes.annotate(f"{row.value:g}", (row.experts, row.loss), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="experts a token runs in a layer, mean", ylabel="loss on unseen text, nats a byte")
    axes.legend()
    return speed.finish(figure)


def draw_text(rows):
    """How many experts each byte of a stretch of text runs, a row of bars for every layer."""
    layers = rows.groupby("layer", sort=False)
    figure, panels = plt.subplots(len(layers), 1, figsize=(11, 1.9 * len(layers)), sharex=True, squeeze=False)
    for axes, (layer, group) in zip(panels[:, 0], layers, strict=True):
        axes.bar(group.position, group.experts, color=GREEN, width=0.8)
        axes.set(ylabel="experts", title=f"layer {layer}", xlim=(-1, len(group)))
        letters = [{32: "␣", 10: "↵"}.get(byte, chr(byte)) for byte in group.byte]
        axes.set_xticks(group.position, letters, family="monospace", fontsize=8)
        axes.grid(False, axis="x")
    return speed.finish(figure)
