"""Whose fault a failure is: that of what was called, whose row says so, or the machine's, which ends the study."""

import pathlib

import torch
import triton

from omni_kernels.configs import interpreting

from .files import check_room


def check_cache():
    """Raises OSError, in one line that names the folder, where Triton cannot keep what it compiles."""
    folder = pathlib.Path(triton.knobs.cache.dir)
    try:
        check_room(folder)
    except OSError as error:
        why = f"Triton's cache cannot be written to: {error.strerror}. TRITON_CACHE_DIR may name another folder than"
        raise OSError(error.errno, why, str(folder)) from None


def raise_if_machine(error):
    """Raises what is no result: Triton's cache cannot be written to, or the system refused a file or a process."""
    if not interpreting():  # which compiles nothing
        check_cache()
    while error:
        if isinstance(error, OSError) and error.errno:  # a library that cannot be loaded has no number
            raise error
        error = error.__cause__


def attempt(function, *args):
    """What function(*args) returns, or a row that says how it failed. Raises OSError where the machine is to blame."""
    try:
        return function(*args)
    except ImportError as error:
        return {"error": f"not installed: {error.name}"}
    except Exception as error:
        raise_if_machine(error)
        torch.cuda.synchronize()  # a fault that took the GPU with it must not become a row
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
