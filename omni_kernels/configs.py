"""What a launch depends on besides the problem: the device, the search space of each kernel, and how it is tuned."""

import contextlib
import functools
import itertools

import torch
import triton

KERNEL_TYPES = ("fwd", "fwd_split", "bwd")


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


def token_bucket(num_tokens):
    """The next power of two: the tuning key, so that a new batch size does not tune again."""
    return max(16, triton.next_power_of_2(num_tokens))
