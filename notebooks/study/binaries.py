"""What was compiled: the machine code of kernels, and the kernels that a call launches.

A measured row belongs to these. Code that is renamed or moved compiles to the same, and what was measured stays true.
"""

import contextlib
import hashlib
import re
import struct
from unittest import mock

import triton
from triton.compiler import CompiledKernel

EXECUTABLE = 4  # SHF_EXECINSTR, of a section in an ELF file


def machine_code(kernel):
    """The instructions of a compiled kernel: on NVIDIA GPUs 16 bytes each, on AMD's a line of assembly each."""
    if "cubin" in kernel.asm:
        return _executable_sections(kernel.asm["cubin"])
    return "\n".join(re.findall(r"^\t(?![.;])(.*?)(?:;.*)?$", kernel.asm["amdgcn"], flags=re.MULTILINE)).encode()


def _executable_sections(cubin):
    """Of an ELF file. Disassembling them would take as long as compiling."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + number * size) for number in range(count)]
    return b"".join(cubin[start : start + length] for _, _, flags, _, start, length in sections if flags & EXECUTABLE)


def short_hash(code):
    return hashlib.sha256(code).hexdigest()[:12]


@contextlib.contextmanager
def launched():
    """Inside, a list of the Triton kernels that are launched, each with its grid, grows as they are."""
    found, launch_metadata = [], CompiledKernel.launch_metadata

    def noting(kernel, grid, *args):  # what every launch asks for, if there is a hook that it is for
        found.append((kernel, grid))
        return launch_metadata(kernel, grid, *args)

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(_ignore)
    try:
        with mock.patch.object(CompiledKernel, "launch_metadata", noting):
            yield found
    finally:
        hooks.remove(_ignore)


def _ignore(_):
    """A launch hook."""


def binary_of(call):
    """What a call launches, as a hash of the kernels' machine code, warps, shared memory and grids, each counted once.
    Empty where it launches none of Triton's. The first of two calls compiles and tunes, and tells nothing."""
    call()
    with launched() as found:
        call()
    parts = [(short_hash(machine_code(kernel)), kernel.metadata.num_warps, kernel.metadata.shared, (*grid, 1, 1)[:3])
             for kernel, grid in found]  # fmt: skip
    return short_hash(str(list(dict.fromkeys(parts))).encode()) if parts else ""
