"""What the tests share: adversarial logits, oracles that share no code with the package, the checkers of a result."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import triton
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from omni_kernels import brute_force_router
from omni_kernels.configs import OPTIONS, on_nvidia, pruned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
ON_GPU = torch.cuda.is_available()
ON_NVIDIA = ON_GPU and on_nvidia(torch.device("cuda"))
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # the environment of a process that sees none
NEEDS_INTERPRETER = pytest.mark.skipif(
    triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter takes no loop bound from a kernel under NumPy 2.4",
)
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}  # Triton's types of them
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def run_python(*arguments, folder=None, **environment):
    """What a Python of its own prints, in this folder or another, whose Triton is no interpreter unless told so."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    run = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def compiled_by(file, cache):
    """What a test file, run as a program, prints as JSON. It keeps what it compiles in the folder `cache`."""
    return json.loads(run_python(file, TRITON_CACHE_DIR=str(cache)))


def compile_for(arch, kernel, pointers, constants, **options):
    """The binary of a kernel for an NVIDIA GPU that need not be there. pointers: the types of such arguments, by name.
    All others but the constants are int32. Triton must be no interpreter."""
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump(binary, option):
    """What Triton's cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack_of(binary):
    """How many bytes a thread of a compiled kernel keeps outside its registers."""
    return int(re.search(r"STACK:(\d+)", cuobjdump(binary, "-res-usage"))[1])


def compile_plan(plan, arch=90, **constants):
    """The binary of a plan's kernel; constants: of numbers that Triton would take for constants, too."""
    logits, scores = POINTERS[plan.dtype], POINTERS[plan.scores_dtype]
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "grad_x_ptr", "grad_y_ptr"), logits)
    pointers["keys_ptr"] = "*i64" if plan.dtype == torch.float32 else "*i32"
    pointers |= {"scores_ptr": scores, "grad_ptr": scores, "indices_ptr": "*i32"}
    pointers |= {"saved_ptr": "*fp32", "probabilities_ptr": "*fp32", "experts_ptr": "*i32", "counts_ptr": "*i32"}
    pointers |= {param.name: param.annotation_type for param in plan.kernel.params if param.annotation_type}
    if plan.normalize is None:  # a gradient then needs no logits either
        names = plan.kernel.arg_names
        absent = {"saved_ptr"} | ({"x_ptr", "y_ptr"} if "grad_ptr" in names else set())
        constants = dict.fromkeys(absent.intersection(names)) | constants
    constants = {"PLAN": plan} | constants
    return compile_for(arch, plan.kernel, pointers, constants, num_warps=plan.num_warps, **OPTIONS)


def by_magnitude(x, y):
    """The order of tokens by their largest logits, those with NaN and infinities last."""
    return (x.float().abs() + y.float().abs()).nan_to_num(INF).amax(1).argsort(stable=True)


def case_id(part):
    return dtype_name(part) if isinstance(part, torch.dtype) else str(part)


@contextlib.contextmanager
def dirty_memory():
    """Fills what torch.empty returns with NaN and the largest integers, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def configurations(candidates, kernel_type, *problem):
    """Those that tuning tries for a problem; in the interpreter the first, since all other tests there run the last."""
    kept = pruned(candidates, kernel_type, *problem)
    return kept if ON_GPU else kept[:1]


def only(config):
    """What stands in for `configs.tuned` where one configuration is to run."""
    return lambda kernel, *_, **__: triton.autotune([config], key=[])(kernel)


class DispatchMode(TorchDispatchMode):
    """Notes the operators it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


# Inputs --------------------------------------------------------------------------------------------------------------


def adversarial_logits(num_expert_sqrt, dtype, device="cpu", seed=0, repeats=1):
    """Both factors of a batch that stacks `repeats` tokens of every kind worth a test, about thirty kinds."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [token for _ in range(repeats) for token in _kinds(num_expert_sqrt, torch.finfo(dtype), generator)]
    return tuple(torch.stack(rows).to(dtype).to(device) for rows in zip(*tokens, strict=True))


def _kinds(n, finfo, generator):
    """(row of x, row of y) of each kind, fp32."""

    def normal():
        return torch.randn(n, generator=generator)

    def integers(low, high):
        return torch.randint(low, high, (n,), generator=generator).float()

    def masked(row, density, value=-INF):
        return row.masked_fill(torch.rand(n, generator=generator) < density, value)

    def with_one(row, value):
        row = row.clone()
        row[torch.randint(n, (1,), generator=generator)] = value
        return row

    everywhere_masked, ramp = torch.full((n,), -INF), torch.arange(n).float()
    yield normal(), normal()
    yield normal().mul(4).log_softmax(0), normal().mul(4).log_softmax(0)
    yield ramp, -ramp  # sorted, the two factors against each other: every sum but the diagonals differs
    yield ramp, ramp
    yield -ramp, ramp / 4
    for values in (2, 3, 5):
        yield integers(0, values) - 1, integers(0, values) - 1  # ties
    yield integers(-1, 2), normal()
    yield torch.full((n,), 1.5), torch.full((n,), -2.25)  # one tie of all experts
    yield torch.zeros(n), normal() * 0.0  # zeros of both signs
    yield torch.full((n,), -0.0), integers(-1, 2) * 0.0
    for density in (0.1, 0.5, 0.9):
        yield masked(normal(), density), masked(normal(), density)
        yield masked(integers(0, 3), density), masked(integers(0, 3), density)
    yield masked(normal(), 0.5), normal()
    yield with_one(everywhere_masked, 0.5), with_one(everywhere_masked, -0.5)  # one expert left
    yield everywhere_masked, normal()
    yield integers(0, 2), everywhere_masked
    yield everywhere_masked, everywhere_masked
    # fp32 sums that lose bits: different exact sums become equal.
    yield 2.0**24 + integers(0, 8), integers(0, 4)
    yield 2.0**15 * (1 + integers(0, 2)), integers(0, 4) * 2.0**-10
    yield masked(2.0**15 * (1 + integers(0, 2)), 0.3), integers(-4, 4) * 2.0**-10
    yield normal() * 10 ** (normal() * 3).clamp(-4, 4), normal() * 10 ** (normal() * 3).clamp(-4, 4)
    # The ends of the range: sums that overflow to inf and to -inf, and subnormals.
    yield integers(-2, 3) / 2 * finfo.max, integers(-2, 3) / 2 * finfo.max
    yield integers(-3, 4) * finfo.smallest_normal * finfo.eps, integers(-3, 4) * finfo.smallest_normal * finfo.eps
    # Tokens that must show NaN or +inf.
    yield with_one(normal(), NAN), normal()
    yield normal(), with_one(masked(normal(), 0.5), NAN)
    yield with_one(integers(-1, 2), INF), integers(-1, 2)
    yield with_one(normal(), INF), everywhere_masked
    yield masked(normal(), 0.5, INF), masked(normal(), 0.5)
    yield masked(masked(masked(normal(), 0.3, NAN), 0.3, INF), 0.3), masked(masked(normal(), 0.3, NAN), 0.3, INF)
    yield torch.full((n,), NAN), torch.full((n,), -NAN)
    yield torch.full((n,), INF), torch.full((n,), INF)
    yield normal(), normal()  # an ordinary neighbour


def close_logits(num_expert_sqrt, k, device="cpu", repeats=1, apart=16):
    """fp32 logits of which some differ in their lowest bits alone: all, two or four about the k-th best, or the k best;
    and logits with ties about the k-th best but no lower bits at all. Every `apart`-th token has one such factor, since
    what a kernel repairs for one token of a warp it may repair for all."""
    generator = torch.Generator().manual_seed(k)

    def row(kind, spread, sign):
        ranks = torch.randperm(num_expert_sqrt, generator=generator)
        if spread:  # the best k + 2 as far from each other as can be
            num_best = min(k + 2, num_expert_sqrt)
            best = torch.randperm(num_best, generator=generator) * (num_expert_sqrt // num_best)
            columns = torch.cat((best, ranks[~torch.isin(ranks, best)]))
            ranks[columns] = torch.arange(num_expert_sqrt)
        values = -1.0 - ranks if sign < 0 else float(num_expert_sqrt) - ranks
        first, last = {"all": (0, num_expert_sqrt), "two": (k - 1, k), "best": (0, k - 1)}.get(kind, (k - 2, k + 1))
        close = (ranks >= first) & (ranks <= last)
        values[close] = values[close].mean().round()
        steps = torch.randint(8, ranks.shape, generator=generator, dtype=torch.int32) * close
        return values if kind == "ties" else (values.view(torch.int32) + steps).view(torch.float32)

    kinds = [(kind, False) for kind in ("all", "two", "four", "best", "ties")] + [("two", True), ("four", True)]
    rows = [row(*kind, sign) for _ in range(repeats) for kind in kinds for sign in (1, -1)]
    x, y = torch.randint(-100, 101, (2, len(rows) * apart, num_expert_sqrt), generator=generator) / 32
    for i, close in enumerate(rows):
        side = (i + i // 2) % 2
        (x, y)[side][i * apart] = close
        (y, x)[side][i * apart, 1:] = -4 * num_expert_sqrt  # one left: the k best of this one decide
    return x.to(device), y.to(device)


def layouts(logits):
    """The same values behind other strides: a transposed view, every other column of a wider tensor, reordered rows."""
    num_tokens, num_expert_sqrt = logits.shape
    wide = torch.full((num_tokens, 2 * num_expert_sqrt + 1), NAN, dtype=logits.dtype, device=logits.device)
    wide[:, 1::2] = logits
    apart = torch.full((3 * num_tokens, num_expert_sqrt), NAN, dtype=logits.dtype, device=logits.device)
    apart[1::3] = logits
    return logits.t().contiguous().t(), wide[:, 1::2], apart[1::3]


def mixed_layouts(x, y):
    """Pairs of views of two logits, each in another layout, and one that repeats a row."""
    return [*zip(layouts(x), layouts(y)[::-1], strict=True), (x, y[:1].expand_as(y))]


def far_apart_logits(device):
    """Tokens 2³⁰ elements apart in x, columns 2³⁰ apart in y; the pages between are never touched."""
    memory = torch.empty((1 << 31) + 8, dtype=torch.float16, device=device)
    x, y = memory.as_strided((3, 3), (1 << 30, 1)), memory[4:].as_strided((3, 3), (1, 1 << 30))
    for logits in (x, y):
        logits.copy_(torch.arange(9).view(3, 3).flip(1))
    return x, y


@st.composite
def factors(draw, sizes=st.integers(1, 9), max_tokens=3, dtypes=DTYPES):
    """x, y of one shape and dtype, drawn from few values, among them whatever floats hypothesis finds nasty."""
    shape = draw(st.integers(1, max_tokens)), draw(sizes)
    dtype = draw(st.sampled_from(dtypes))
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 2.0**24, 2.0**24 + 2, 2.0**-149, 3e38, -3e38])
    pool = draw(st.lists(st.one_of(st.floats(width=32), special), min_size=1, max_size=6))
    if draw(st.booleans()):
        pool = [value for value in pool if value < INF] or [-INF]
    numel = shape[0] * shape[1]
    values = draw(st.lists(st.sampled_from(pool), min_size=2 * numel, max_size=2 * numel))
    both = torch.tensor(values, dtype=torch.float32).to(dtype).view(2, *shape)
    return both[0], both[1]


# Oracles -------------------------------------------------------------------------------------------------------------


def oracle_router(x, y, k):
    """The definition once more, in Python and numpy, one pair at a time: (scores in fp32, already rounded; indices)."""
    scores, indices = [], []
    for row_x, row_y in zip(_exact_rows(x), _exact_rows(y), strict=True):
        with np.errstate(all="ignore"):
            pairs = [(a + b, i * len(row_y) + j) for i, a in enumerate(row_x) for j, b in enumerate(row_y)]
        pairs.sort(key=lambda pair: (0, 0.0, pair[1]) if np.isnan(pair[0]) else (1, -pair[0], pair[1]))
        scores.append([_rounded(total, x.dtype) for total, _ in pairs[:k]])
        indices.append([index for _, index in pairs[:k]])
    shape = len(x), k
    return torch.tensor(scores, dtype=torch.float32).view(shape), torch.tensor(indices, dtype=torch.int32).view(shape)


def _exact_rows(logits):
    """Rows of numpy fp32 scalars, widened by hand so that no PyTorch cast is trusted."""
    if logits.dtype == torch.bfloat16:
        return (logits.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return logits.numpy().astype(np.float32)


def _rounded(total, dtype):
    """To nearest even."""
    with np.errstate(over="ignore"):
        if dtype == torch.float16:
            return float(np.float16(total))
    if dtype == torch.bfloat16 and not np.isnan(total):
        bits = int(total.view(np.uint32))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(total)


def oracle_backward(grad_scores, indices, num_expert_sqrt):
    """The gradients as a loop over the slots, in order, in fp32; rounded once to grad_scores' dtype."""
    grad, experts = grad_scores.float().cpu().numpy(), indices.cpu().numpy()
    tokens, grads = np.arange(len(grad)), []
    for targets in (experts // num_expert_sqrt, experts % num_expert_sqrt):
        total = np.zeros((len(grad), num_expert_sqrt), np.float32)
        with np.errstate(all="ignore"):
            for slot in range(grad.shape[1]):
                total[tokens, targets[:, slot]] += grad[:, slot]
        grads.append(torch.from_numpy(total).to(grad_scores.dtype).to(grad_scores.device))
    return tuple(grads)


# Checkers ------------------------------------------------------------------------------------------------------------


def assert_same_bits(got, want):
    """Tensors equal to the last bit, the sign of zero included; any NaN equals any NaN."""
    for left, right in zip(got, want, strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        if left.is_floating_point():
            assert torch.equal(left.isnan(), right.isnan())
            left, right = (part.nan_to_num(0.0, INF, -INF).view(BITS[part.dtype]) for part in (left, right))
        assert torch.equal(left, right)


def is_poisoned(x, y):
    """Which tokens have NaN or +inf among their logits."""
    return sum(part.isnan() | (part == INF) for part in (x, y)).any(1)


def assert_routes(x, y, k, scores, indices):
    """The result is the definition's, except for the order of experts that only fp32 rounding made equal."""
    num_tokens, num_expert_sqrt = x.shape
    assert scores.shape == indices.shape == (num_tokens, k)
    assert (scores.dtype, indices.dtype) == (x.dtype, torch.int32)
    assert scores.device == indices.device == x.device
    indices = indices.long()
    assert ((indices >= 0) & (indices < num_expert_sqrt**2)).all(), "an index is out of range"
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "an expert is selected twice"

    poisoned = is_poisoned(x, y)
    shown = scores.isnan() | (scores == INF)
    assert not k or shown[poisoned].any(1).all(), "a token hides its NaN or +inf"

    x, y, scores, indices = (part[~poisoned] for part in (x, y, scores, indices))
    want_scores, want_indices = brute_force_router(x, y, k)
    want_indices = want_indices.long()
    assert torch.equal(scores, want_scores), "scores differ"
    sums, want_sums = (_sums(x, y, experts) for experts in (indices, want_indices))
    assert torch.equal(sums, want_sums), "an expert does not have the score of its slot"
    assert_equal_sums_in_order(x, y, indices)
    clear = ~rounding_ties(x, y, k)
    assert torch.equal(indices[clear], want_indices[clear]), "experts differ"


def _of_experts(x, y, experts):
    num_expert_sqrt = x.shape[1]
    return x.float().gather(1, experts // num_expert_sqrt), y.float().gather(1, experts % num_expert_sqrt)


def _sums(x, y, experts):
    left, right = _of_experts(x, y, experts)
    return left + right


def _exact_sums(left, right):
    """Two doubles whose sum is exactly left + right (Knuth's TwoSum)."""
    left, right = left.double(), right.double()
    high = left + right
    back = high - left
    return high, ((left - (high - back)) + (right - back)).nan_to_num(0.0)


def assert_equal_sums_in_order(x, y, indices):
    """Of the experts of a token whose exact sums are equal, the lower index comes first, whatever stands between."""
    high, low = _exact_sums(*_of_experts(x, y, indices))
    order = low.sort(dim=1, stable=True).indices
    order = order.gather(1, high.gather(1, order).sort(dim=1, stable=True).indices)
    high, low, indices = (part.gather(1, order) for part in (high, low, indices))
    equal = (high[:, 1:] == high[:, :-1]) & (low[:, 1:] == low[:, :-1])
    assert (indices.diff(dim=1)[equal] > 0).all(), "equal scores do not put the lower index first"


def rounding_ties(x, y, k):
    """Which of the k best slots of each token hold a sum that fp32 rounding made equal to a different exact sum."""
    high, low = _exact_sums(x[:, :, None], y[:, None, :])
    sums, order = (x.float()[:, :, None] + y.float()[:, None, :]).flatten(1).sort(dim=1, descending=True, stable=True)
    high, low = high.flatten(1).gather(1, order), low.flatten(1).gather(1, order)
    same = sums[:, 1:] == sums[:, :-1]
    rounded = same & ((high[:, 1:] != high[:, :-1]) | (low[:, 1:] != low[:, :-1]))
    run = torch.cat((torch.zeros_like(order[:, :1]), (~same).cumsum(1)), dim=1)
    rounded_in_run = torch.zeros_like(order).scatter_add(1, run[:, 1:], rounded.long())
    return rounded_in_run.gather(1, run)[:, :k] > 0


def oracle_scores(x, y, indices, normalize):
    """Of any experts, in numpy's fp64, token by token. For "topk" the experts must be the router's."""
    scores = []
    for row_x, row_y, experts in zip(*(part.detach().double().cpu().numpy() for part in (x, y, indices)), strict=True):
        rows, columns = np.divmod(experts.astype(int), len(row_x))
        with np.errstate(all="ignore"):
            best = np.float32(row_x.max()) + np.float32(row_y.max())
            if not max(row_x.max(), row_y.max()) < INF or (normalize == "topk" and not best < INF):
                scores.append(np.full(len(experts), np.nan))
            elif min(row_x.max(), row_y.max()) == -INF:
                scores.append(np.full(len(experts), -INF if normalize == "log_softmax" else 0.0))
            else:
                row_x, row_y = row_x - row_x.max(), row_y - row_y.max()
                sums = row_x[rows] + row_y[columns]
                total = np.exp(sums).sum() if normalize == "topk" else np.exp(row_x).sum() * np.exp(row_y).sum()
                logs = sums - np.log(total)
                scores.append(logs if normalize == "log_softmax" else np.exp(logs))
    return torch.from_numpy(np.array(scores)).view(indices.shape)


def assert_accurate(got, want, normalize):
    """Within what is promised before the scores are rounded, and half a unit in their last place for rounding them (by
    way of fp32)."""
    finfo = torch.finfo(got.dtype)
    got, size = got.detach().double().cpu(), want.abs()
    assert torch.equal(got.isnan(), want.isnan())
    bound = 1e-6 * size.clamp(min=1) if normalize == "log_softmax" else 2e-6 * size
    bound = bound + (finfo.eps + 2**-23) / 2 * size + finfo.smallest_normal * finfo.eps
    too_large = size + bound > finfo.max  # infinite, or about to be
    assert torch.equal(got[too_large].isinf(), want[too_large].abs() > finfo.max)
    error = (got - want).abs()[~too_large & ~want.isnan()]
    assert (error <= bound[~too_large & ~want.isnan()]).all()
