"""What notebook 03 measures of the host: a call from Python beside PyTorch's own operators, and the parts of a call."""

import functools
import os

import torch

from omni_kernels import explain, factored, omni_router
from omni_kernels.backward import backward
from omni_kernels.checks import check
from omni_kernels.factored.plan import Launch, launch

from . import faults, rivals, speed, tables, timing
from .binaries import binary_of

CASE = speed.MAIN._replace(num_tokens=1024)
ROUNDS = 15  # all calls in turn in each

ADD, TOPK, TIMES_ONE, COMPILED_ADD = "x + y", f"x.topk({CASE.k})", "x * 1", "x + y, compiled"
OMNI, FACTORED, PUBLIC, COMPILED = rivals.OMNI, rivals.FACTORED, rivals.PUBLIC, "omni_router, compiled"
PLAIN, WITH_GRADIENT, BACKWARD, BOTH = "no gradient", "with gradient", "backward alone", "forward + backward"
ONE_THREAD = f"{BOTH} on one thread"

# Which time of omni_router is compared with which of PyTorch's.
RATIOS = {
    f"{OMNI}, {PLAIN}": TOPK,
    f"{OMNI}, {WITH_GRADIENT}": TOPK,
    f"{OMNI}, {BACKWARD}": f"{TIMES_ONE}, {BACKWARD}",
    f"{OMNI}, {BOTH}": f"{FACTORED}, {BOTH}",
    f"{OMNI}, {ONE_THREAD}": f"{OMNI}, {BOTH}",
    f"{COMPILED}, {PLAIN}": COMPILED_ADD,
}


def calls(x, y, k):
    """Everything people may call, {name: function without arguments}; those that are compiled compile when called."""
    add, router = torch.compile(lambda x, y: x + y), torch.compile(lambda x, y: omni_router(x, y, k))
    compiled = differentiated(COMPILED, router, x, y)
    del compiled[f"{COMPILED}, {BACKWARD}"]  # what torch.compile makes frees what a second one would need
    return {
        ADD: lambda: x + y,
        TOPK: lambda: x.topk(k),
        **differentiated(TIMES_ONE, lambda x: (x * 1,), x),
        **differentiated(OMNI, lambda x, y: omni_router(x, y, k), x, y),
        **differentiated(FACTORED, lambda x, y: rivals.product_keys(x, y, k, torch.topk), x, y),
        **differentiated(PUBLIC, lambda x, y: rivals.public_kernels(x, y, k), x, y),
        COMPILED_ADD: lambda: add(x, y),
        **compiled,
    }


def differentiated(name, function, *tensors):
    """A function's call without a gradient, with one, the backward pass alone, and both; these also with the backward
    pass on the thread that calls, where else a GPU's has its own and the two wait for each other."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in tensors)

    @functools.cache
    def result_and_gradient():
        result = function(*leaves)[0]
        return result, torch.ones_like(result)

    def backward_alone():
        result, gradient = result_and_gradient()
        return torch.autograd.grad(result, leaves, gradient, retain_graph=True)

    def both():
        return torch.autograd.grad(function(*leaves)[0], leaves, result_and_gradient()[1])

    def both_on_one_thread():
        with torch.autograd.set_multithreading_enabled(False):
            return both()

    return {
        f"{name}, {PLAIN}": lambda: function(*tensors),
        f"{name}, {WITH_GRADIENT}": lambda: function(*leaves),
        f"{name}, {BACKWARD}": backward_alone,
        f"{name}, {BOTH}": both,
        f"{name}, {ONE_THREAD}": both_on_one_thread,
    }


def parts(x, y, k):
    """The parts of a call of omni_router, and Triton's own way to launch its kernel."""
    plan = explain(x, y, k)
    scores, indices = factored.run(plan, x, y)
    tensors, numbers = (x, y, scores, indices, None), (*x.stride(), *y.stride(), len(x))
    repeated = Launch(plan, x.get_device())
    return {
        "checks of the arguments": lambda: check(x, y, k),
        "memory for the results": lambda: (torch.empty_like(scores), torch.empty_like(indices)),
        "launch, as Triton does it": lambda: launch(plan, *tensors, *numbers),
        "launch, as the package does it": lambda: repeated(tensors, *numbers),
        "look-up, memory and launch": lambda: factored.factored_forward(x, y, k),
        "the same of the gradient": lambda: backward(scores, indices, x.shape[1]),
    }


def measure(again="OMNI_AGAIN" in os.environ):
    """Time the calls, unless this GPU has rows of these versions and this commit, or `again`. (A call's time is that of
    Python code, which no binary tells apart.)

    Returns:
        What was done, in words.
    """
    if not torch.cuda.is_available():
        return "not measured: no GPU here"
    known = tables.of_setting("calls", [*tables.SETTING, "commit"])
    if len(known) and not again:
        return "measured before"
    rows = rows_of(*speed.logits(CASE))
    tables.append("calls", rows)
    return f"{len(rows)} calls measured now"


def rows_of(x, y, num_rounds=ROUNDS):
    """The rows of the table: medians and quantiles of the rounds of all calls in turn, whether a call works or not."""
    subjects = {name: ("call", call) for name, call in calls(x, y, CASE.k).items()}
    subjects |= {name: ("part", call) for name, call in parts(x, y, CASE.k).items()}
    unknown = dict.fromkeys([*speed.QUANTILES, "binary", "error"])
    rows = {name: {"rival": name, "kind": kind, **CASE._asdict(), **unknown,
                   **faults.attempt(lambda call=call: {"binary": binary_of(call)})}
            for name, (kind, call) in subjects.items()}  # fmt: skip
    works = {name: call for name, (_, call) in subjects.items() if not rows[name]["error"]}
    for name, times in timing.rounds_us(works, num_rounds).items():
        rows[name] |= speed.quantiles(times)
    return list(rows.values())
