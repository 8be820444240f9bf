"""What a launch depends on besides the problem: the device, the search space of each kernel, and how it is tuned."""

import contextlib
import functools
import itertools

import torch
import triton
import triton.testing

# The tiles a kernel type is tuned over. A search space below lists a value set for each, then warps, then stages.
TILES = {"fwd": ("TILE_M",), "fwd_split": ("TILE_M", "TILE_N"), "bwd": ("TILE_M", "TILE_K")}

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


def interpreting():
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return triton.knobs.runtime.interpret


def has_kernels(tensor):
    """Whether Triton kernels can run on this tensor's device."""
    return tensor.is_cuda or interpreting()


def device_of(tensor):
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def output_dtype(dtype):
    """The dtype a kernel writes for logits of `dtype`: the interpreter truncates to bf16, so there PyTorch rounds."""
    return torch.float32 if interpreting() else dtype


def kernel_input(tensor):
    """What a kernel reads of a tensor: the interpreter flushes bf16's subnormals, so there PyTorch widens them."""
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
    """The configurations the optimized kernels are tuned over on an architecture (the table is the guide's).

    Args:
        arch: what `get_arch` returns; architectures without a list of their own get the general space.
        kernel_type: "fwd", "fwd_split" or "bwd".

    Returns:
        A list of triton.Config.

    Raises:
        ValueError: an unknown kernel_type.
    """
    return _configs(ARCH_SPACES.get(arch, GENERAL_SPACE), kernel_type)


def get_original_configs(kernel_type):
    """The configurations the original version is tuned over, on every architecture.

    Args:
        kernel_type: "fwd", "fwd_split" or "bwd".

    Returns:
        A list of triton.Config.

    Raises:
        ValueError: an unknown kernel_type.
    """
    return _configs(ORIGINAL_SPACE, kernel_type)


def _configs(space, kernel_type):
    if kernel_type not in TILES:
        raise ValueError(f"kernel_type must be one of {', '.join(map(repr, TILES))}, got {kernel_type!r}")
    return [
        triton.Config(dict(zip(TILES[kernel_type], tiles, strict=True)), num_warps=num_warps, num_stages=num_stages)
        for *tiles, num_warps, num_stages in itertools.product(*space[kernel_type])
    ]


@functools.cache
def tuned(kernel, kernel_type, arch=None, reset_to_zero=()):
    """A kernel that tunes itself on the first launch of each problem size and remembers the result on disk.

    Args:
        kernel: a triton.jit function with the arguments num_expert_sqrt, num_experts_per_token and token_bucket, which
            are the tuning key, and the tiles of its type.
        kernel_type: "fwd", "fwd_split" or "bwd".
        arch: tune over this architecture's configurations; None: over the original version's.
        reset_to_zero: names of the arguments the kernel adds into, cleared before each trial run.

    Returns:
        What triton.autotune returns: launch it as `tuned(...)[grid](...)`, without the tiles.
    """
    configs = get_original_configs(kernel_type) if arch is None else get_arch_specific_configs(arch, kernel_type)
    if interpreting():
        configs = configs[-1:]  # nothing can be timed there, and the largest tiles make the fewest steps
    return triton.autotune(
        configs,
        key=["num_expert_sqrt", "num_experts_per_token", "token_bucket"],
        prune_configs_by={"early_config_prune": _prune},
        reset_to_zero=list(reset_to_zero),
        do_bench=_bench,
        cache_results=True,
    )(kernel)


def _prune(configs, named_args, **_):
    """Drop tiles that hold more than the whole problem; of each kind of tile the smallest always stays."""
    whole = {
        "TILE_M": named_args["token_bucket"],
        "TILE_N": triton.next_power_of_2(named_args["num_expert_sqrt"] ** 2),
        "TILE_K": triton.next_power_of_2(named_args["num_experts_per_token"]),
    }
    limits = {tile: max(whole[tile], min(c.kwargs[tile] for c in configs)) for tile in configs[0].kwargs}
    return [c for c in configs if all(size <= limits[tile] for tile, size in c.kwargs.items())]


def _bench(launch, quantiles):
    """Triton's own benchmark, except that a configuration its compiler gives up on loses instead of raising."""
    try:
        return triton.testing.do_bench(launch, quantiles=quantiles)
    except RuntimeError as error:
        if "PassManager::run failed" not in str(error):
            raise
        return [float("inf")] * len(quantiles)
