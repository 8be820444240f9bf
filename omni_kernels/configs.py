"""What a launch depends on besides the problem: the device, the search space of each kernel, and how it is tuned."""

import concurrent.futures
import contextlib
import functools
import gc
import itertools
import math
import os
import sys
import threading
import types

import torch
import triton
import triton.language as tl

# How a configuration is tried: clock cycles that the GPU waits before each run (half a millisecond), and the runs.
WAIT, TRIALS_MS, MOST_TRIALS = 1 << 20, 20, 40

# The tiles a kernel type is tuned over. A search space below lists a value set for each, then warps, then stages.
TILES = {
    "fwd": ("TILE_M",),
    "fwd_split": ("TILE_M", "TILE_N"),
    "bwd": ("TILE_M", "TILE_K"),
    "tile": ("TILE_M", "CHUNK"),
    "lanes": ("LANES", "CHUNK"),
    "frontier": ("TOKENS", "PIECE"),
}

# Of the N² kernels: the original version's lists, the guide's general ones, and the guide's for two architectures.
ORIGINAL_SPACE = {
    "fwd": ([1, 64, 128, 256], [4], [1]),
    "fwd_split": ([1], [1024, 2048, 4096, 8192, 16384], [4], [1]),
    "bwd": ([64, 128, 256], [16, 32, 64], [4], [1]),
}
GENERAL_SPACE = {
    "fwd": ([1, 2, 4, 8, 16, 32, 64, 128, 256], [2, 4, 8], [1, 2, 3]),
    "fwd_split": ([1, 2, 4], [512, 1024, 2048, 4096, 8192, 16384], [4, 8], [1, 2]),
    "bwd": ([32, 64, 128, 256], [8, 16, 32, 64], [2, 4, 8], [1, 2, 3]),
}
AMPERE_SPACE = {
    "fwd": ([64, 128, 256], [4, 8], [2, 3]),
    "fwd_split": ([1, 2], [4096, 8192, 16384], [8], [2]),
    "bwd": ([128, 256], [32, 64], [4, 8], [2, 3]),
}
HOPPER_SPACE = {
    "fwd": ([128, 256], [8, 16], [3, 4]),
    "fwd_split": ([2, 4], [8192, 16384], [8, 16], [2, 3]),
    "bwd": ([256], [64], [8, 16], [3, 4]),
}
ARCH_SPACES = {
    "cuda:sm80": AMPERE_SPACE,
    "cuda:sm86": AMPERE_SPACE,
    "cuda:sm89": HOPPER_SPACE,
    "cuda:sm90": HOPPER_SPACE,
}
# Of the optimized forward kernels besides: in one warp, all that a round looks for is found without a barrier.
FEW_WARPS_SPACE = {
    "fwd": ([1, 2, 4], [1], [1]),
    "fwd_split": ([1], [1024, 2048, 4096], [1, 2], [1]),
}
# Of the factored kernels, which follow fixed rules instead of tuning: what the rules choose, and what lies around it.
FACTORED_SPACE = {
    "tile": ([1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4], [1]),
    "lanes": ([2, 4, 8, 16, 32], [1, 2, 4], [1, 2], [1]),
    "frontier": ([4, 8, 16], [16, 32, 64], [1], [1]),
}
# Of all kernels, as measured on an H100 (notebook 2): for each problem of the study one within 2% of its best.
HOPPER_MEASURED_SPACE = {
    "fwd": ([1], [1], [1]),
    "fwd_split": ([1], [1024, 4096], [1], [1]),
    "bwd": ([32], [16], [8], [1]),
    "tile": ([1], [1, 4], [1], [1]),
    "lanes": ([2, 4, 16], [1, 4], [1, 2], [1]),
    "frontier": ([8, 16], [32, 64], [1], [1]),
}
SPACES = {
    "original": ORIGINAL_SPACE,
    "general": GENERAL_SPACE,
    "few warps": FEW_WARPS_SPACE,
    "factored": FACTORED_SPACE,
    **ARCH_SPACES,
    "cuda:sm90:measured": HOPPER_MEASURED_SPACE,
}

# Of the compiler: it would build a check of every int32 sum, only to drop them all again unless it debugs.
OPTIONS = {"sanitize_overflow": False}
DOUBLES = ((8, 0), (9, 0), (10, 0))  # GPUs that compare doubles as fast as integers, and have the most shared memory
REGISTERS = 64 * 512 if torch.version.hip else 32 * 255  # of a warp, 32 bits each


# Triton makes its own functions for the interpreter or for the compiler when it is imported, once and for all.
_INTERPRETING = not isinstance(tl.sum, triton.JITFunction)


def interpreting():
    """Whether kernels run in Triton's interpreter: whether TRITON_INTERPRET was set when triton was imported."""
    return _INTERPRETING


@contextlib.contextmanager
def as_triton_was_imported():
    """Triton makes and compiles kernels as it made its own functions, whatever TRITON_INTERPRET has become meanwhile:
    the two kinds cannot call each other."""
    if triton.knobs.runtime.interpret == _INTERPRETING:
        yield
        return
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = _INTERPRETING
        yield


@functools.cache
def on_nvidia(device):
    """Whether kernels are compiled for an NVIDIA GPU that copies to shared memory on the side: from Ampere on."""
    nvidia = device.type == "cuda" and torch.version.hip is None and not interpreting()
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def compares_doubles(device):
    """Whether this GPU compares doubles as fast as integers: those for data centers do. The interpreter never does."""
    return on_nvidia(device) and torch.cuda.get_device_capability(device) in DOUBLES


def has_kernels(tensor):
    """Whether Triton kernels can run on this tensor's device."""
    return tensor.is_cuda or interpreting()


def device_of(tensor):
    """Around every launch: makes the tensor's GPU the current one, which is where Triton launches. The interpreter
    exchanges functions of Triton while it runs, so there one thread launches at a time."""
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    if _INTERPRETING or triton.knobs.runtime.interpret:
        return _alone(device)
    return device


@contextlib.contextmanager
def _alone(device):
    with _launching, as_triton_was_imported(), device:
        yield


def _renew_locks():
    """A new process must not wait for a thread that it does not have."""
    global _launching, _polite
    _launching, _polite = threading.RLock(), threading.Lock()


_renew_locks()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_locks)


def output_dtype(dtype):
    """The dtype a kernel writes for logits of `dtype`: the interpreter truncates to bf16, so there PyTorch rounds."""
    return torch.float32 if interpreting() else dtype


def kernel_input(tensor):
    """What a kernel reads of a tensor: a sign that PyTorch has put off is written out. The interpreter flushes bf16's
    subnormals, so there PyTorch widens them."""
    tensor = tensor.resolve_neg()
    return tensor.float() if interpreting() and tensor.dtype == torch.bfloat16 else tensor


def token_bucket(num_tokens):
    """The next power of two: the tuning key, so that a new batch size does not tune again."""
    return max(16, triton.next_power_of_2(num_tokens))


def get_device():
    """The device kernels run on: the current GPU (NVIDIA or AMD), or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_arch(device):
    """The architecture of a device, as `get_arch_specific_configs` takes it.

    Args:
        device: a torch.device, or what torch.device makes one of ("cuda", "cuda:1", "cpu", 0).

    Returns:
        "cuda:sm90", "hip:gfx942" and so on for GPUs, otherwise the device's type ("cpu").
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "hip:" + torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "cuda:sm{}{}".format(*torch.cuda.get_device_capability(device))


def get_arch_specific_configs(arch, kernel_type):
    """The configurations the guide lists for an architecture. The optimized forward kernels are tuned over `candidates`
    instead, and the optimized backward kernels follow rules.

    Args:
        arch: what `get_arch` returns; architectures without a list of their own get the general space.
        kernel_type: "fwd", "fwd_split" or "bwd".

    Returns:
        A list of triton.Config.

    Raises:
        ValueError: an unknown kernel_type.
    """
    return get_configs(arch if arch in ARCH_SPACES else "general", kernel_type)


def get_configs(space, kernel_type):
    """All configurations of a search space.

    Args:
        space: "original" (the lists the original version is tuned over), "general", "few warps" (what the optimized
            forward kernels may take besides), an architecture with lists of its own ("cuda:sm80", "cuda:sm86",
            "cuda:sm89", "cuda:sm90"), "cuda:sm90:measured" (what an H100 is fastest with), or "factored".
        kernel_type: "fwd", "fwd_split" or (not with few warps) "bwd"; in the factored and the measured space "tile",
            "lanes" or "frontier".

    Returns:
        A list of triton.Config.

    Raises:
        ValueError: an unknown space or kernel_type.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(map(repr, SPACES))}, got {space!r}")
    lists = SPACES[space]
    if kernel_type not in lists:
        raise ValueError(f"kernel_type must be one of {', '.join(map(repr, lists))}, got {kernel_type!r}")
    return [
        triton.Config(dict(zip(TILES[kernel_type], tiles, strict=True)), num_warps=num_warps, num_stages=num_stages)
        for *tiles, num_warps, num_stages in itertools.product(*lists[kernel_type])
    ]


def candidates(arch, kernel_type):
    """What the optimized forward kernels are tuned over: the list measured on the architecture, or else everything, and
    in any case the original version's choices. The guide's own lists for architectures are not, since they lose: their
    programs take so many tokens that 1024 leave most of a GPU idle.

    Args:
        arch: what `get_arch` returns.
        kernel_type: "fwd" or "fwd_split".

    Returns:
        A list of triton.Config, each once.
    """
    measured = f"{arch}:measured"
    spaces = (measured, "original") if measured in SPACES else ("few warps", "general", "original")
    found = {str(config): config for space in spaces for config in get_configs(space, kernel_type)}
    return list(found.values())


@functools.cache
def tuned(kernel, kernel_type, arch=None, reset_to_zero=()):
    """A kernel that tunes itself on the first launch of each problem size and remembers the result on disk.

    Args:
        kernel: a triton.jit function with the arguments num_expert_sqrt, num_experts_per_token and token_bucket, which
            are the tuning key, and the tiles of its type.
        kernel_type: "fwd", "fwd_split" or "bwd".
        arch: tune over the candidates for this architecture; None: over the original version's list.
        reset_to_zero: names of the arguments the kernel adds into, cleared before each trial run.

    Returns:
        What triton.autotune returns: launch it as `tuned(...)[grid](...)`, without the tiles.
    """
    configs = get_configs("original", kernel_type) if arch is None else candidates(arch, kernel_type)
    if interpreting():
        configs = configs[-1:]  # nothing can be timed there, and the largest tiles make the fewest steps
    trials = _Trials(kernel, kernel_type)
    return triton.autotune(
        configs,
        key=["num_expert_sqrt", "num_experts_per_token", "token_bucket"],
        prune_configs_by={"early_config_prune": trials.prune},
        reset_to_zero=list(reset_to_zero),
        do_bench=trials.bench,
        cache_results=True,
    )(kernel)


class _Trials:
    """The trial runs of one kernel: few, since pruned, and compiled together before the first of them."""

    def __init__(self, kernel, kernel_type):
        self.kernel, self.kernel_type, self.compile = kernel, kernel_type, lambda: None

    def prune(self, configs, named_args, grid=None, warmup=False, **constants):
        """What Triton calls to narrow the choice. Results may be on disk already, so nothing is compiled yet."""
        sizes = (named_args[name] for name in ("token_bucket", "num_expert_sqrt", "num_experts_per_token"))
        kept = pruned(configs, self.kernel_type, *sizes)
        self.compile = lambda: compile_all(
            self.kernel, list(named_args.values()), [constants | config.all_kwargs() for config in kept]
        )
        return kept

    def bench(self, launch, quantiles):
        """Quantiles of what a configuration takes, in ms. One that its compiler gives up on loses."""
        self.compile()
        self.compile = lambda: None
        try:
            return time_on_gpu(launch, quantiles)
        except RuntimeError as error:
            if "PassManager::run failed" not in str(error):
                raise
            return [float("inf")] * len(quantiles)


def time_on_gpu(launch, quantiles):
    """Quantiles of what a launch takes on the current GPU, in ms.

    Before each the GPU waits for longer than a slow host needs to launch. What triton.testing.do_bench does before
    each, clearing a cache, takes less: where a host is slow, or other threads of it run Python, all short kernels take
    as long as their launch, and of 10 and 28 µs the tuner took 28.
    """

    def times(count):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            torch.cuda._sleep(WAIT)
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)

    with politely():
        launch()
        (once,) = times(1)
        found = times(min(max(int(TRIALS_MS / once), 3), MOST_TRIALS))
    return [found[round(quantile * (len(found) - 1))] for quantile in quantiles]


@contextlib.contextmanager
def politely():
    """Inside, a thread that asks for the interpreter has it within microseconds, not milliseconds later. PyTorch asks
    at many of its operations. One thread at a time is inside."""
    with _polite:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            yield
        finally:
            sys.setswitchinterval(interval)


def pruned(configs, kernel_type, token_bucket, num_expert_sqrt, num_experts_per_token):
    """The configurations worth compiling for a problem.

    Dropped are tiles that hold more than the whole problem (of each kind of tile the smallest stays), tiles that cannot
    fit in the registers of their warps, and on NVIDIA GPUs all but the first number of stages: stages pipeline the
    loads that feed matrix products there, and these kernels have none, so their binary is the same for any number.

    Args:
        configs: a list of triton.Config of this kernel_type.
        kernel_type: "fwd", "fwd_split" or "bwd".
        token_bucket, num_expert_sqrt, num_experts_per_token: the problem, as `tuned` kernels take it.

    Returns:
        A part of the list, in its order, never empty.
    """
    num_experts = triton.next_power_of_2(num_expert_sqrt**2)
    whole = {"TILE_M": token_bucket, "TILE_N": num_experts, "TILE_K": triton.next_power_of_2(num_experts_per_token)}
    limits = {tile: max(whole[tile], min(c.kwargs[tile] for c in configs)) for tile in configs[0].kwargs}
    kept = [c for c in configs if all(size <= limits[tile] for tile, size in c.kwargs.items())]

    def fits(config):
        tiles = {"bwd": ("TILE_M", "TILE_K"), "fwd_split": ("TILE_N",)}.get(kernel_type, ())
        elements = math.prod(config.kwargs[tile] for tile in tiles)
        return elements <= config.num_warps * REGISTERS  # a register for each of them, at least

    kept = [c for c in kept if fits(c)] or [max(kept, key=lambda config: config.num_warps)]
    if torch.version.hip:
        return kept
    first = {}
    for config in kept:
        first.setdefault((*config.kwargs.values(), config.num_warps), config)
    return list(first.values())


def compiled(kernel, *args, **constants):
    """The binary of a kernel for some arguments, tensors or their dtypes, which are not used otherwise.

    What else a first launch waits for is done meanwhile: Triton hashes itself, and a C compiler builds Triton's driver
    and the launcher for these arguments.
    """
    hashing = threading.Thread(target=getattr(triton.runtime.cache, "triton_key", int))
    hashing.start()
    driver = triton.runtime.driver.active
    building = threading.Thread(target=_build_launcher, args=(driver, kernel, args))
    building.start()
    hashing.join()
    with _old_objects_kept():
        binary = kernel.warmup(*args, grid=(1,), **constants, **OPTIONS)
    building.join()
    return binary


def _build_launcher(driver, kernel, args):
    """Leaves on disk what Triton up to 3.7 builds after a kernel to launch it, which depends on the kinds of arguments
    alone. A later Triton has one launcher for all of them, so that this fails at once."""
    signature = {}
    for parameter, arg in itertools.zip_longest(kernel.params, args):
        if isinstance(arg, torch.dtype) or hasattr(arg, "dtype"):
            kind = "*i8"  # any pointer
        elif arg is None or (arg == 1 and not parameter.do_not_specialize):
            kind = "constexpr"
        else:
            kind = parameter.annotation_type or ("i64" if arg >> 31 else "i32")
        signature[parameter.num] = kind
    with contextlib.suppress(Exception):
        driver.launcher_cls(types.SimpleNamespace(constants={}, signature=signature), None)


def compile_all(kernel, args, variants):
    """Compiles variants of a kernel together, on all cores. What fails raises when it is launched, not here.

    Args:
        kernel: a triton.jit function.
        args: its positional arguments, tensors or their dtypes.
        variants: for each variant a dictionary of its keyword arguments.
    """
    with (
        _old_objects_kept(),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for constants in variants:
            kernel.warmup(*args, grid=(1,), **constants)


@contextlib.contextmanager
def _old_objects_kept():
    """Python's garbage collector leaves alone what is there already: looking through all of PyTorch, time and again,
    is a tenth of the time that compiling takes."""
    if gc.get_freeze_count() > 0:  # someone else has seen to it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
