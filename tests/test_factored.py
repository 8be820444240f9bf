"""The kernel that runs wherever Triton does: the bits of the factored PyTorch version, and the definition's result, on
every kind of token. Then which kernel routes what, and that it does not matter."""

import collections

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    case_id,
    close_logits,
    dirty_memory,
    dtype_name,
    factors,
    layouts,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from omni_kernels import factored, factored_router, frontier, lanes, reference
from omni_kernels.factored import factored_forward

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, BF16), (2, 1, FP16), (2, 4, FP32), (3, 2, BF16), (3, 9, FP32), (7, 5, FP16), (16, 16, FP32),
    (33, 1, FP16), (33, 31, BF16), (64, 5, FP32), (100, 2, FP32), (128, 16, BF16), (130, 5, FP16),
]  # fmt: skip
if ON_GPU:  # one tile and streamed, all columns and chunks
    CASES = [
        (1, 1, BF16), (7, 49, BF16), (16, 16, FP32), (100, 2, FP16), (130, 64, FP32), (257, 16, BF16), (1000, 5, FP32),
        (9000, 2, FP16),
    ]  # fmt: skip
PATHS = ("lanes", "frontier", "everywhere", "PyTorch")


def forward_by(path, x, y, k):
    """By one of the kernels, or by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        for kernel in (lanes, frontier):
            patch.setattr(kernel, "runs_on", lambda *_, runs=kernel.__name__.endswith(path): runs)
        if path == "PyTorch":
            patch.setattr(factored, "MAX_EXPERTS_PER_TOKEN", 0)
        return factored_forward(x, y, k)


def forward(x, y, k):
    """By the kernel that runs everywhere."""
    return forward_by("everywhere", x, y, k)


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=case_id)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    repeats = 20 if ON_GPU and num_expert_sqrt < 1000 else 1
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k, repeats=repeats)
    with dirty_memory():
        result = forward(x, y, k)
    assert_same_bits(result, factored_router(x, y, k))
    if num_expert_sqrt < 1000:
        few = slice(len(x) // repeats)  # of every kind one
        assert_routes(x[few], y[few], k, *(part[few] for part in result))


@pytest.mark.parametrize("num_expert_sqrt", [2, 3, 5])
def test_all_experts(num_expert_sqrt, device):
    k = num_expert_sqrt**2
    x, y = adversarial_logits(num_expert_sqrt, torch.float16, device)
    scores, indices = factored_forward(x, y, k)
    assert torch.equal(indices.sort(1).values, torch.arange(k, device=device).int().expand(len(x), k))
    assert_same_bits((scores, indices), factored_router(x, y, k))


@given(factors(sizes=st.just(3), max_tokens=5), st.just(4))
@settings(max_examples=300 if ON_GPU else 8, phases=list(Phase) if ON_GPU else [Phase.generate])  # shrinking is slow
def test_any_floats(device, logits, k):
    x, y = (part.to(device) for part in logits)
    result = forward(x, y, k)
    assert_same_bits(result, factored_router(x, y, k))
    assert_routes(x, y, k, *result)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 64, 65, 300])
def test_token_counts(num_tokens, device):
    """Tiles that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, 5), device=device).bfloat16()
    assert_same_bits(forward(x, y, 3), factored_router(x, y, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layout_does_not_matter(dtype, device):
    x, y = adversarial_logits(5, dtype, device)
    want = factored_router(x, y, 3)
    for view_x, view_y in zip(layouts(x), layouts(y)[::-1], strict=True):
        assert_same_bits(forward(view_x, view_y, 3), want)
    row = y[:1].expand_as(x)
    assert_same_bits(forward(x, row, 3), factored_router(x, row, 3))


def test_same_bits_on_every_run(device):
    x, y = adversarial_logits(5, torch.float32, device, repeats=20 if ON_GPU else 1)
    assert_same_bits(forward(x, y, 3), forward(x, y, 3))


def test_a_token_does_not_depend_on_its_neighbours(device):
    x, y = adversarial_logits(3, torch.bfloat16, device)
    want = forward(x, y, 4)
    order = torch.randperm(len(x), device=device)
    assert_same_bits(forward(x[order], y[order], 4), [part[order] for part in want])
    assert_same_bits(forward(x[5:6], y[5:6], 4), [part[5:6] for part in want])


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), [(700, 2, FP32), (9000, 2, FP16)], ids=case_id)
def test_long_rows(num_expert_sqrt, k, dtype, device):
    x, y = torch.randn(2, 3, num_expert_sqrt, device=device).to(dtype)
    x[:, -1], y[0, -1] = 10.0, 10.0
    assert_same_bits(forward(x, y, k), factored_router(x, y, k))


# The choice of a kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), [(64, 16, BF16), (33, 5, FP16), (20, 7, FP32)], ids=case_id)
def test_every_path_returns_the_same(num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    if dtype == FP32:
        close = close_logits(num_expert_sqrt, k, device)
        x, y = (torch.cat(parts) for parts in zip((x, y), close, strict=True))
    want = factored_router(x, y, k)
    for path in PATHS:
        if path != "frontier" or frontier.runs_on(x.device, num_expert_sqrt, k):
            assert_same_bits(forward_by(path, x, y, k), want)


@pytest.mark.parametrize(
    ("num_expert_sqrt", "k", "on_nvidia", "elsewhere"),
    [
        (1, 1, "lanes", "everywhere"),
        (256, 32, "lanes", "everywhere"),
        (8193, 32, "frontier", "everywhere"),
        (256, 33, "frontier", "everywhere"),
        (256, 64, "frontier", "everywhere"),
        (256, 65, "frontier", "PyTorch"),
        (256, 256, "frontier", "PyTorch"),
        (256, 257, "PyTorch", "PyTorch"),
        (46340, 1, "frontier", "everywhere"),
        (46340, 65, "frontier", "PyTorch"),
    ],
)
def test_choice(num_expert_sqrt, k, on_nvidia, elsewhere, monkeypatch):
    """Also for GPUs that are not there: nothing is launched."""
    chosen = []

    def choose(path):
        return lambda x, *_, **__: chosen.append(path) or (x.new_empty((1, k)), x.new_empty((1, k)))

    monkeypatch.setattr(lanes, "lanes_forward", choose("lanes"))
    monkeypatch.setattr(frontier, "frontier_forward", choose("frontier"))
    monkeypatch.setattr(reference, "factored_router", choose("PyTorch"))
    monkeypatch.setattr(factored, "factored_kernel", collections.defaultdict(lambda: choose("everywhere")))
    for kernel in (lanes, frontier):
        monkeypatch.setattr(kernel, "interpreting", lambda: False)
    x = torch.zeros(1, num_expert_sqrt)
    for is_nvidia in (True, False):
        for kernel in (lanes, frontier):
            monkeypatch.setattr(kernel, "on_nvidia", lambda _, is_nvidia=is_nvidia: is_nvidia)
        factored_forward(x, x, k)
    assert chosen == [on_nvidia, elsewhere]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(64, 16), (64, 40)])
def test_a_new_token_count_compiles_nothing(num_expert_sqrt, k, monkeypatch):
    def run(num_tokens):
        x, y = torch.randn(2, num_tokens, num_expert_sqrt, device="cuda").bfloat16()
        return factored_forward(x, y, k)

    run(300)

    def fail(*_, **__):
        raise AssertionError("compiled again")

    monkeypatch.setattr("triton.compiler.compile", fail)
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", fail)
    for num_tokens in (1, 2, 65, 1024, 5000, 70000):
        assert run(num_tokens)[0].shape == (num_tokens, k)


@pytest.mark.skipif(not ON_GPU, reason="measures the memory of a GPU")
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(64, 16), (64, 40)])
def test_memory_is_that_of_the_outputs(num_expert_sqrt, k):
    x, y = torch.randn(2, 1 << 17, num_expert_sqrt, device="cuda").bfloat16()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = factored_forward(x, y, k)
    outputs = sum(part.nbytes for part in results)
    assert torch.cuda.max_memory_allocated() - before <= outputs + (1 << 20)
