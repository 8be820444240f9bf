"""The configuration tables to the last entry, and tuning that never depends on the exact number of tokens."""

import concurrent.futures
import itertools
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import NEEDS_INTERPRETER, NO_GPU, ON_GPU, run_python

from omni_kernels import (
    configs,
    forward,
    get_arch,
    get_arch_specific_configs,
    get_device,
    omni_router,
    original,
    triton_omni_router_func,
    triton_omni_router_func_optimized,
)
from omni_kernels.configs import candidates, get_configs, pruned, token_bucket, tuned

TILES = {"fwd": ["TILE_M"], "fwd_split": ["TILE_M", "TILE_N"], "bwd": ["TILE_M", "TILE_K"]}
GENERAL = {
    "fwd": [[1, 2, 4, 8, 16, 32, 64, 128, 256], [2, 4, 8], [1, 2, 3]],
    "fwd_split": [[1, 2, 4], [512, 1024, 2048, 4096, 8192, 16384], [4, 8], [1, 2]],
    "bwd": [[32, 64, 128, 256], [8, 16, 32, 64], [2, 4, 8], [1, 2, 3]],
}
SM80 = {
    "fwd": [[64, 128, 256], [4, 8], [2, 3]],
    "fwd_split": [[1, 2], [4096, 8192, 16384], [8], [2]],
    "bwd": [[128, 256], [32, 64], [4, 8], [2, 3]],
}
SM90 = {
    "fwd": [[128, 256], [8, 16], [3, 4]],
    "fwd_split": [[2, 4], [8192, 16384], [8, 16], [2, 3]],
    "bwd": [[256], [64], [8, 16], [3, 4]],
}
ORIGINAL = {
    "fwd": [[1, 64, 128, 256], [4], [1]],
    "fwd_split": [[1], [1024, 2048, 4096, 8192, 16384], [4], [1]],
    "bwd": [[64, 128, 256], [16, 32, 64], [4], [1]],
}
GENERAL_ARCHS = ("cpu", "cuda:sm75", "cuda:sm100", "cuda:sm120", "cuda:sm800", "hip:gfx942", "hip:gfx90a", "")
TABLE = {
    **dict.fromkeys(("cuda:sm80", "cuda:sm86"), SM80),
    **dict.fromkeys(("cuda:sm89", "cuda:sm90"), SM90),
    **dict.fromkeys(GENERAL_ARCHS, GENERAL),
}
KERNEL_TYPES = pytest.mark.parametrize("kernel_type", TILES)


def assert_configs(got, kernel_type, lists):
    names = [*TILES[kernel_type], "num_warps", "num_stages"]
    flat = [{**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages} for config in got]
    assert flat == [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]


@KERNEL_TYPES
@pytest.mark.parametrize("arch", TABLE)
def test_every_entry(arch, kernel_type):
    assert_configs(get_arch_specific_configs(arch, kernel_type), kernel_type, TABLE[arch][kernel_type])


@KERNEL_TYPES
def test_every_entry_of_the_original_version(kernel_type):
    assert_configs(get_configs("original", kernel_type), kernel_type, ORIGINAL[kernel_type])


@KERNEL_TYPES
def test_one_function_gives_every_space(kernel_type):
    assert get_configs("general", kernel_type) == get_arch_specific_configs("cpu", kernel_type)
    for arch in ("cuda:sm80", "cuda:sm86", "cuda:sm89", "cuda:sm90"):
        assert get_configs(arch, kernel_type) == get_arch_specific_configs(arch, kernel_type)


def test_the_factored_kernels_have_spaces_of_their_own():
    for kernel_type, lists in configs.FACTORED_SPACE.items():
        found = get_configs("factored", kernel_type)
        assert len(set(map(str, found))) == len(list(itertools.product(*lists)))
        assert {tuple(config.kwargs) for config in found} == {configs.TILES[kernel_type]}


def test_the_measured_lists_are_a_part_of_what_was_measured():
    for kernel_type in configs.TILES:
        spaces = [name for name in ("factored", "general", "few warps") if kernel_type in configs.SPACES[name]]
        everything = [config for name in spaces for config in get_configs(name, kernel_type)]
        measured = get_configs("cuda:sm90:measured", kernel_type)
        assert 0 < len(measured) < len(everything)
        assert set(map(str, measured)) < set(map(str, everything))


@pytest.mark.parametrize("kernel_type", ["fwd", "fwd_split"])
@pytest.mark.parametrize("arch", TABLE)
def test_the_optimized_kernels_may_choose_whatever_the_original_may(arch, kernel_type):
    found = [str(config) for config in candidates(arch, kernel_type)]
    assert len(set(found)) == len(found)
    assert set(map(str, get_configs("original", kernel_type))) <= set(found)
    best_known = get_configs("cuda:sm90:measured" if arch == "cuda:sm90" else "general", kernel_type)
    assert set(map(str, best_known)) <= set(found)
    assert any(config.num_warps == 1 for config in candidates(arch, kernel_type))


@pytest.mark.parametrize(
    ("space", "counts"),
    [
        ("original", [4, 5, 9]),
        ("general", [81, 72, 144]),
        ("cuda:sm80", [12, 6, 16]),
        ("cuda:sm86", [12, 6, 16]),
        ("cuda:sm89", [8, 16, 4]),
        ("cuda:sm90", [8, 16, 4]),
    ],
)
def test_counts(space, counts):
    assert [len(get_configs(space, kernel_type)) for kernel_type in TILES] == counts


@pytest.mark.parametrize("kernel_type", ["forward", "FWD", "", None, "tile"])
@pytest.mark.parametrize(
    "configs_of",
    [lambda kind: get_configs("original", kind), lambda kind: get_arch_specific_configs("cuda:sm90", kind)],
)
def test_unknown_kernel_type(configs_of, kernel_type):
    with pytest.raises(ValueError, match=r"kernel_type must be one of 'fwd', 'fwd_split', 'bwd', got ") as error:
        configs_of(kernel_type)
    assert str(error.value).endswith(repr(kernel_type))


@pytest.mark.parametrize("space", ["Original", "cuda:sm100", "", None])
def test_unknown_space(space):
    with pytest.raises(ValueError, match=r"space must be one of 'original', 'general', 'few warps', 'factored'"):
        get_configs(space, "fwd")


def test_this_machine(device):
    assert get_device().type == device
    arch = get_arch(get_device())
    assert arch.startswith(("cuda:sm", "hip:gfx")) if ON_GPU else arch == "cpu"
    assert get_arch("cpu") == get_arch(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_arch_of_a_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, arch in (((8, 0), "cuda:sm80"), ((9, 0), "cuda:sm90"), ((12, 0), "cuda:sm120")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert get_arch(device) == arch

    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert get_arch(device) == "hip:gfx942"


def test_token_buckets():
    assert [token_bucket(n) for n in (1, 16, 17, 1000, 1024, 1025)] == [16, 16, 32, 1024, 1024, 2048]


@KERNEL_TYPES
@pytest.mark.parametrize("space", ["cuda:sm80", "cuda:sm90", "general", "original"])
@pytest.mark.parametrize(
    ("tokens", "num_expert_sqrt", "k"), [(16, 1, 1), (64, 33, 5), (65536, 256, 64), (1024, 46340, 9)]
)
def test_pruning_keeps_what_fits_or_the_smallest(kernel_type, space, tokens, num_expert_sqrt, k):
    listed = get_configs(space, kernel_type)
    kept = pruned(listed, kernel_type, tokens, num_expert_sqrt, k)
    padded = {
        "TILE_M": tokens,
        "TILE_N": 1 << (num_expert_sqrt**2 - 1).bit_length(),
        "TILE_K": 1 << (k - 1).bit_length(),
    }
    for tile in TILES[kernel_type]:
        sizes = {config.kwargs[tile] for config in listed}
        allowed = {size for size in sizes if size <= padded[tile]} or {min(sizes)}
        assert {config.kwargs[tile] for config in kept} == allowed
    assert [config for config in listed if config in kept] == kept != []


def test_pruning_drops_tiles_larger_than_the_registers(monkeypatch):
    monkeypatch.setattr(configs, "REGISTERS", 32 * 255)

    def warps(space, kernel_type, **tiles):
        kept = pruned(get_configs(space, kernel_type), kernel_type, 1024, 256, 64)
        return sorted({config.num_warps for config in kept if config.kwargs.items() >= tiles.items()})

    assert warps("general", "fwd") == [2, 4, 8]  # its tile is small
    assert warps("few warps", "fwd_split", TILE_N=4096) == [1, 2]
    assert warps("general", "fwd_split", TILE_N=16384) == [4, 8]
    assert warps("general", "bwd", TILE_M=256, TILE_K=64) == [4, 8]  # 16384 pairs: 256 a thread of two warps
    assert warps("general", "bwd", TILE_M=128, TILE_K=64) == [2, 4, 8]
    monkeypatch.setattr(configs, "REGISTERS", 32 * 8)
    assert warps("general", "fwd_split", TILE_N=2048) == [8]
    assert warps("cuda:sm90", "bwd") == [16]  # no number fits: the most there are


def test_pruning_keeps_one_number_of_stages_on_nvidia_gpus(monkeypatch):
    def stages(space):
        return {config.num_stages for config in pruned(get_configs(space, "fwd"), "fwd", 1024, 64, 16)}

    monkeypatch.setattr(torch.version, "hip", None)
    assert stages("general") == {1}
    assert stages("cuda:sm90") == {3}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert stages("general") == {1, 2, 3}


def test_tuning_key():
    tuner = tuned(forward.forward_kernel, "fwd", "cuda:sm90")
    assert tuned(forward.forward_kernel, "fwd", "cuda:sm90") is tuner
    assert tuner.keys == ["num_expert_sqrt", "num_experts_per_token", "token_bucket"]
    assert "num_tokens" in tuner.arg_names


@pytest.mark.skipif(not ON_GPU, reason="the interpreter neither tunes nor compiles")
@pytest.mark.parametrize("route", [original.original_forward, forward.forward])
def test_a_new_token_count_neither_tunes_nor_compiles(route, monkeypatch):
    def run(num_tokens):
        x, y = (torch.randn(num_tokens, 10, device="cuda") for _ in range(2))
        return route(x, y, 3)

    run(100)

    def fail(*_, **__):
        raise AssertionError("compiled or tuned again")

    monkeypatch.setattr(configs, "time_on_gpu", fail)
    monkeypatch.setattr("triton.compiler.compile", fail)
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", fail)
    for num_tokens in (65, 101, 112, 128):
        run(num_tokens)


def test_a_configuration_the_compiler_gives_up_on_loses(monkeypatch):
    def raising(error):
        def time_on_gpu(*_):
            raise error

        monkeypatch.setattr(configs, "time_on_gpu", time_on_gpu)

    trials = configs._Trials(forward.forward_kernel, "fwd")
    raising(RuntimeError("PassManager::run failed"))
    assert trials.bench(None, (0.5, 0.2, 0.8)) == [float("inf")] * 3
    raising(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        trials.bench(None, (0.5, 0.2, 0.8))


def test_a_trial_waits_for_the_host_and_other_threads_make_way(monkeypatch):
    """The GPU waits, then come the start, the launch and the end, and no other thread has Python for long."""
    noted, interval = [], sys.getswitchinterval()

    class Event:
        def __init__(self, enable_timing):
            self.place = None

        def record(self):
            self.place = len(noted)
            noted.append("event")

        def elapsed_time(self, end):
            return float(end.place - self.place) / 2  # two steps between them: 1 ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: noted.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = configs.time_on_gpu(lambda: noted.append(sys.getswitchinterval()), (0.5, 0.2))
    assert found == [1.0, 1.0]
    launches = [step for step in noted if isinstance(step, float)]
    assert max(launches) < interval == sys.getswitchinterval()
    assert noted == launches[:1] + ["wait", "event", launches[0], "event"] * (1 + configs.TRIALS_MS)


def test_candidates_are_compiled_together_before_the_first_is_timed(monkeypatch):
    events = []
    monkeypatch.setattr(configs, "compile_all", lambda *args: events.append(args))
    monkeypatch.setattr(configs, "time_on_gpu", lambda launch, _: events.append(launch))
    trials = configs._Trials(forward.forward_kernel, "fwd")
    named_args = {"num_expert_sqrt": 64, "num_experts_per_token": 16, "token_bucket": 1024}
    kept = trials.prune(get_configs("general", "fwd"), named_args, grid=(1,), warmup=False, TILE_N=64)
    assert events == []  # the result may be on disk
    for launch in ("first", "second"):
        trials.bench(launch, (0.5, 0.2, 0.8))
    variants = [{"TILE_N": 64} | config.all_kwargs() for config in kept]
    assert events == [(forward.forward_kernel, [64, 16, 1024], variants), "first", "second"]


# For a process whose Triton is no interpreter, and a GPU that is not there. A tile of 17 columns fails to compile.
COMPILE = """
import os, pathlib, torch, triton
from triton.backends.compiler import GPUTarget
from omni_kernels import configs, forward


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
args = [torch.float32, torch.float32, torch.float32, torch.int32, 16, 1, 16, 1, 64, 16, 2, 64]
candidates = [configs.get_configs("general", "fwd")[index] for index in (0, 3, 9)]
variants = [{"TILE_N": 16} | config.all_kwargs() for config in candidates]
bad = variants[0] | {"TILE_N": 17}
configs.compile_all(forward.forward_kernel, args, [*variants, bad])
print(len(list(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))))



def kernel(constants):  # a launch looks at the compiled kernel, too
    return forward.forward_kernel.warmup(*args, grid=(1,), **constants).asm


try:
    kernel(bad)
except triton.CompilationError:
    print("raises")
forward.forward_kernel.compile = None  # what is compiled is there, and not compiled again
print(sum("cubin" in kernel(constants) for constants in variants))
"""


def test_compiling_together_compiles_all_and_ignores_what_fails(tmp_path):
    """Versions of Triton differ in what they keep of a kernel that failed to compile; to launch it fails in all."""
    assert run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split() == ["3", "raises", "3"]


# For a process without a GPU: the variable changes before or after the package is imported, Triton being there already.
CHANGED = """
import os, sys
before, after = sys.argv[1:]


def change(when):
    if when == "set":
        os.environ["TRITON_INTERPRET"] = "1"
    elif when == "unset":
        del os.environ["TRITON_INTERPRET"]


import torch, triton
change(before)
from omni_kernels import configs, omni_router, original, triton_omni_router_func, triton_omni_router_func_optimized
change(after)
x, y = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 3.0]])
for scores, indices in (
    omni_router(x, y, 3),
    triton_omni_router_func(x, y, 2, 3),
    triton_omni_router_func_optimized(x, y, 2, 3),
):
    scores.sum().backward()
    assert scores.tolist() == [[3.0, 3.0, 1.0]] and indices.tolist() == [[1, 3, 0]]
assert x.grad.tolist() == [[6.0, 3.0]]
with configs.device_of(x):
    assert triton.knobs.runtime.interpret == configs.interpreting()
print(configs.interpreting(), type(original.forward_kernel).__name__, os.environ.get("TRITON_INTERPRET"))
"""


SET = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize(
    ("at_first", "before", "after", "words"),
    [
        ({}, "set", "", ["False", "JITFunction", "1"]),
        ({}, "", "set", ["False", "JITFunction", "1"]),
        pytest.param(SET, "unset", "", ["True", "InterpretedFunction", "None"], marks=NEEDS_INTERPRETER),
        pytest.param(SET, "", "unset", ["True", "InterpretedFunction", "None"], marks=NEEDS_INTERPRETER),
    ],
)
def test_the_interpreter_is_chosen_when_triton_is_imported(at_first, before, after, words):
    assert run_python("-c", CHANGED, before, after, **NO_GPU, **at_first).split() == words


def test_threads_may_call_at_once(device):
    x, y = torch.randn(2, 1, 4, device=device)

    def route(_):
        logits = x.clone().requires_grad_()
        results = (
            omni_router(logits, y, 3),
            triton_omni_router_func(logits, y, 4, 3),
            triton_omni_router_func_optimized(logits, y, 4, 3),
        )
        return *itertools.chain(*results), *torch.autograd.grad(sum(scores.sum() for scores, _ in results), logits)

    want = route(None)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(route, range(60 if ON_GPU else 24)):
            assert all(map(torch.equal, got, want))


# A process is forked in the middle of a launch, and while a thread keeps everyone from launching: the child still can.
FORK = """
import os, signal, threading, torch
from omni_kernels import brute_force_router, configs, omni_router

torch.set_num_threads(1)  # those of PyTorch do not outlive a fork
x, y = torch.randn(2, 4, 16)
want = brute_force_router(x, y, 5)[1]


def routes_in_a_child():
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os._exit(0 if all(torch.equal(omni_router(x, y, 5)[1], want) for _ in range(2)) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def launch():
    while not done.is_set():
        omni_router(x, y, 5)


def hold():
    with configs.device_of(x):
        held.set()
        done.wait()


for work in (launch, hold):
    held, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if work is hold:
        held.wait()
    print(all(routes_in_a_child() for _ in range(5)))
    done.set()
    thread.join()
print(torch.equal(omni_router(x, y, 5)[1], want))
"""


@NEEDS_INTERPRETER
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_may_launch():
    assert run_python("-W", "ignore", "-c", FORK, **SET, **NO_GPU).split() == ["True"] * 3


def test_importing_needs_no_gpu_and_tunes_nothing():
    program = "from omni_kernels import configs, get_arch, get_device\n"
    program += "print(configs.tuned.cache_info().currsize, get_arch(get_device()))"
    assert run_python("-c", program, **NO_GPU).split() == ["0", "cpu"]
