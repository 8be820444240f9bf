"""What notebook 04 measures of backward kernels and of dtypes to route in; and how training runs are recorded.

Times, the floor's bandwidth and the way tables are written are notebook 03's (speed.py).
"""

import os

import numpy as np
import torch

from omni_kernels import backward as kernels
from omni_kernels import omni_router
from omni_kernels.original import original_backward
from omni_kernels.reference import backward_router

from . import tables
from .binaries import binary_of
from .faults import attempt
from .rivals import DTYPES, Case, rung_to_read
from .speed import limits, times_us


def plain_backward(grad, indices, num_expert_sqrt):
    """By the plain Triton kernels, on any device."""
    plan = kernels.plan_of(num_expert_sqrt, grad.shape[1], grad.dtype, grad.dtype, False)
    return kernels.run(plan, grad, indices)


SCATTER, ATOMICS, PLAIN, OURS = "PyTorch, scatter_add", "original kernel, atomics", "plain Triton", "shared memory"
BACKWARDS = {SCATTER: backward_router, ATOMICS: original_backward, PLAIN: plain_backward, OURS: kernels.backward}
BACKWARD_CASES = [
    Case(65536, 64, 16, "bf16"), Case(65536, 256, 16, "bf16"), Case(65536, 1024, 16, "bf16"),
    Case(65536, 1024, 64, "bf16"), Case(1048576, 256, 16, "bf16"), Case(1024, 256, 16, "bf16"),
    Case(65536, 256, 16, "fp32"),
]  # fmt: skip
READ_CASE = Case(65536, 256, 16, "bf16")  # of the rungs that people read
REPEATED = Case(4096, 32, 256, "fp32")  # many slots share a row
PRECISION_CASES = [Case(16384, n, k, "fp32") for n, k in ((64, 16), (256, 16), (1024, 16), (256, 64))]
ROUTES = {"fp32": ("fp32", "fp32"), "fp16": ("fp16", "fp16"), "fp16, scores fp32": ("fp16", "fp32"),
          "bf16": ("bf16", "bf16"), "bf16, scores fp32": ("bf16", "fp32")}  # fmt: skip
RECORD_EVERY = 5  # training steps


def measure_missing(table, measure, probe, columns=()):
    """Measure a table where there is a GPU without rows of what `probe`, a function, launches here, or whose rows lack
    one of some columns: `measure(binary)` records them under the launches' hash. What fails is told, and does not end
    the run."""
    failed = attempt(_measure_missing, table, measure, probe, columns) if torch.cuda.is_available() else None
    if failed:
        print(f"{table}: not measured: {failed['error']}")


def _measure_missing(table, measure, probe, columns):
    binary = binary_of(probe)
    found = tables.last_keys(tables.of_setting(table), [], ["binary", *columns])
    known = any(last == binary and "" not in others for last, *others in found)
    if "OMNI_AGAIN" in os.environ or not known:
        measure(binary)


# --- the backward kernels ---


TO_READ = {name: rung_to_read(name, "gradient") for name in ("backward1_atomics", "backward2_compare_and_store")}


def backward_problem(case, device, seed=0):
    """The experts a router selects from normal logits, and gradients of mixed size, so that order shows in the bits."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = case.num_tokens, case.num_expert_sqrt
    logits = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    indices = omni_router(*logits, case.k)[1]
    size, grad = torch.randn(2, case.num_tokens, case.k, device=device, generator=generator)
    return (grad * 10**size).to(DTYPES[case.dtype]), indices


def sequential_sums(grad, indices, num_expert_sqrt):
    """The definition: slot after slot, in fp32, rounded once. One addition a token at a time has only one order."""
    sums = grad.new_zeros((2, len(grad), num_expert_sqrt), dtype=torch.float32)
    for slot in range(grad.shape[1]):
        expert, value = indices[:, slot : slot + 1].long(), grad[:, slot : slot + 1].float()
        sums[0].scatter_add_(1, expert // num_expert_sqrt, value)
        sums[1].scatter_add_(1, expert % num_expert_sqrt, value)
    return tuple(sums.to(grad.dtype))


def same_bits(name, grad, indices, num_expert_sqrt):
    """How a backward's gradients compare with the definition's."""
    got = (BACKWARDS | TO_READ)[name](grad, indices, num_expert_sqrt)
    want = sequential_sums(grad, indices, num_expert_sqrt)
    if all(map(torch.equal, got, want)):
        return "equal"
    scale = grad.float().abs().sum(1, keepdim=True)
    near = [((a.float() - b.float()).abs() <= 0.01 * scale).all() for a, b in zip(got, want, strict=True)]
    return "last bits differ" if all(near) else "WRONG"


def backward_bytes(case):
    """What a backward pass has to move: k gradients and indices (int32) in, two rows out, for every token."""
    size = DTYPES[case.dtype].itemsize
    return case.num_tokens * (case.k * (size + 4) + 2 * case.num_expert_sqrt * size)


def measure_backward(binary, cases=BACKWARD_CASES, device="cuda", functions=None, table="backward"):
    rows = []
    for case in cases:
        grad, indices = backward_problem(case, device)
        floor = backward_bytes(case) / limits()["bandwidth_gbs"] / 1e3
        for name, function in (functions or BACKWARDS).items():
            row = {"rival": name, **case._asdict(), "floor_us": floor, **limits(), "us": None, "check": None}
            rows.append(row | attempt(_timed_backward, name, function, case, grad, indices))
    tables.append(table, rows, binary=binary)


def _timed_backward(name, function, case, grad, indices):
    check = same_bits(name, grad, indices, case.num_expert_sqrt)
    times = times_us(lambda grad, indices: function(grad, indices, case.num_expert_sqrt), grad, indices)
    return {**times, "check": check}


def launch_backwards(cases=BACKWARD_CASES, device="cuda", functions=None):
    """Launches what `measure_backward` measures."""
    for case in cases:
        grad, indices = backward_problem(case, device)
        for function in (functions or BACKWARDS).values():
            attempt(function, grad, indices, case.num_expert_sqrt)


def measure_rungs(binary, device="cuda"):
    """Table backward_rungs: the rungs that people read."""
    measure_backward(binary, [READ_CASE], device, TO_READ, "backward_rungs")


def launch_rungs():
    """Launches what `measure_rungs` measures."""
    launch_backwards([READ_CASE], functions=TO_READ)


# --- run after run ---


def spread_of_runs(name, num_runs=30, case=REPEATED, device="cuda"):
    """How far the gradient of x moves between runs on the same input: largest minus smallest, (num_tokens, N)."""
    grad, indices = backward_problem(case, device)
    runs = [BACKWARDS[name](grad, indices, case.num_expert_sqrt)[0] for _ in range(num_runs)]
    low, high = runs[0].clone(), runs[0].clone()
    for run in runs[1:]:
        low, high = torch.minimum(low, run), torch.maximum(high, run)
    return high - low


def measure_repeats(binary, names=(SCATTER, ATOMICS, OURS), device="cuda", window=32):
    """Table repeats: how many numbers moved. Table repeats_map: by how much, for a window of tokens."""
    counts, cells = [], []
    for name in names:
        spread = spread_of_runs(name, device=device)
        moved = spread.count_nonzero().item()
        counts.append({"rival": name, **REPEATED._asdict(), "numbers": spread.numel(), "moved": moved,
                       "largest": spread.max().item()})  # fmt: skip
        start = spread.count_nonzero(1).unfold(0, window, window).sum(1).argmax().item() * window  # where most moved
        for token, row in enumerate(spread[start : start + window].tolist()):
            cells += [{"rival": name, "token": token, "column": i, "spread": value} for i, value in enumerate(row)]
    tables.append("repeats", counts, binary=binary)
    tables.append("repeats_map", cells, binary=binary)


def launch_repeated():
    """Launches what `measure_repeats` measures."""
    launch_backwards([REPEATED])


# --- which dtype to route in ---


def precision_problem(case, device, width=64):
    """Logits as a layer makes them, in fp32: hidden states, two gates, log-softmax; and a value for every expert."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.num_tokens, width, generator=generator).to(device).requires_grad_()
    gates = torch.randn(2, width, case.num_expert_sqrt, generator=generator).to(device) * 2 / width**0.5
    values = torch.randn(case.num_expert_sqrt**2, generator=generator).to(device)
    return hidden, (hidden @ gates).log_softmax(-1), values


def route_in(route, case, hidden, logits, values):
    """Routes fp32 logits in other dtypes: scores, experts, and the gradient of the hidden states."""
    logits_dtype, scores_dtype = (DTYPES[name] for name in ROUTES[route])
    scores, indices = omni_router(*logits.to(logits_dtype), case.k, scores_dtype=scores_dtype)
    outputs = (scores.float().exp() * values[indices.long()]).sum(1)
    (grad,) = torch.autograd.grad(outputs.square().sum(), hidden, retain_graph=True)
    return scores.detach().float(), indices, grad


def compare_dtypes(case, device):
    """The rows of one case: each route against fp32 throughout."""
    hidden, logits, values = precision_problem(case, device)
    want_scores, want, want_grad = route_in("fp32", case, hidden, logits, values)
    rows = []
    for route in ROUTES:
        scores, indices, grad = route_in(route, case, hidden, logits, values)
        kept = (indices[:, :, None] == want[:, None, :]).any(2).float().mean(1)
        rows.append({
            "rival": route, **case._asdict(),
            "changed_tokens": (kept < 1).float().mean().item(), "changed_experts": 1 - kept.mean().item(),
            "score_error": (scores - want_scores).abs().mean().item(),
            "grad_error": ((grad - want_grad).norm() / want_grad.norm()).item(),
        })  # fmt: skip
    return rows


def measure_precision(binary, cases=PRECISION_CASES, device="cuda"):
    tables.append("precision", [row for case in cases for row in compare_dtypes(case, device)], binary=binary)


def launch_precision():
    """Launches what `measure_precision` measures."""
    for case in PRECISION_CASES:
        compare_dtypes(case, "cuda")


# --- training ---


def record_training(binary, runs, table="training", **sizes):
    """Records a table with every few steps, and <table>_runs with one row a run; all rows have some sizes.

    runs: {name: what byte_model.train returns of a run}, all of one seed. The first is the one that others are compared
    with.
    """
    first = next(iter(runs.values()))
    steps, summary = [], []
    for name, run in runs.items():
        of = {"rival": name, "seed": run["seed"], **sizes}
        for step in range(RECORD_EVERY - 1, len(run["losses"]), RECORD_EVERY):
            loss = np.mean(run["losses"][step + 1 - RECORD_EVERY : step + 1])
            counts = {f"experts_{layer}": count for layer, count in enumerate(run["experts"][step], start=1)}
            steps.append({**of, "step": step + 1, "loss": loss, **counts})
        apart = np.abs(np.subtract(run["losses"], first["losses"])).max()
        summary.append({
            **of, "steps": len(run["losses"]), "step_ms": 1e3 * np.median(run["seconds"]),
            "peak_bytes": run["peak_bytes"], "parameters": run["parameters"], "test_loss": run["test_loss"],
            "largest_difference": apart,
        })  # fmt: skip
    tables.append(table, steps, binary=binary)
    tables.append(f"{table}_runs", summary, binary=binary)


def record_sample(binary, sample):
    """Table training_sample: text that a model wrote."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in sample)
    tables.append("training_sample", [{"text": shown}], binary=binary)
