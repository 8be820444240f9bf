"""What a launch is, said once, and how a launch is repeated without saying it again.

A plan holds everything about a launch: the kernel, its tiles and warps, how it reads rows and orders keys, the grid.
The rules in a kernel's file decide it for a problem: N, k, dtypes, layout, device, few or many tokens. The kernel and
its helpers read it as one constant, PLAN. All kernels of this folder have plans, and so has the gradient (backward.py).
A helper's arguments in capitals are constants, too: Triton passes a constant on as one, whatever a helper says. What a
comprehension makes is a tuple to Triton, which takes none but those over tuples, and a list to the interpreter:
`tl.tuple` makes both alike.

A `Launch` is a plan whose kernel is compiled. Launching it again skips what Triton does for every call: binding the
arguments, looking at each of them, looking up the binary.
"""

import contextlib
import dataclasses
import math
import threading

import torch
import triton
import triton.language as tl

from ..configs import OPTIONS, compiled, politely

MAX_PROBLEMS = 4096  # whose launches are kept
SLOTS = 1024  # experts that a program of a `SlotsPlan` looks at
OVER_ALL = ("softmax", "log_softmax")  # what takes a sum over every row

_empty_on_gpu = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_loading = threading.Lock()
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclasses.dataclass(frozen=True)
class Plan(dict):
    """What is common to the plans of all kernels. `print` one to read it; change one with `dataclasses.replace`.

    It is a dictionary of its fields as well, since Triton hands the constants of a kernel to compile hooks as JSON.
    """

    num_expert_sqrt: int
    k: int
    dtype: torch.dtype  # of the logits
    scores_dtype: torch.dtype
    num_warps: int
    normalize: str | None = dataclasses.field(default=None, kw_only=True)  # what becomes of the scores (softmax.py)

    def __post_init__(self):
        for name, value in vars(self).items():
            self[name] = value if isinstance(value, int | str | None) else str(value)

    @property
    def cache_key(self):
        """What Triton tells binaries on disk apart by."""
        return repr(self)

    def __str__(self):
        problem = f"{self.num_expert_sqrt} logits a factor in {_name(self.dtype)}, {self.k} experts a token"
        return f"{self.why()} With {problem}, a token reads {self.bytes_read} bytes and writes {self.bytes_written}."

    def grid(self, num_tokens):
        """The number of programs."""
        return -(-num_tokens // self.tokens)

    @property
    def bytes_read(self):
        """Of a token: its logits."""
        return 2 * self.num_expert_sqrt * self.dtype.itemsize

    @property
    def bytes_written(self):
        """Of a token: its scores and indices."""
        return self.k * (self.scores_dtype.itemsize + 4)

    @property
    def element_ty(self):
        """Triton's name of the logits' dtype."""
        return ELEMENTS[self.dtype]

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def sums_rows(self):
        """Whether the softmax over all experts is asked for, which takes a sum over every row."""
        return self.normalize in OVER_ALL

    @property
    def has_weights(self):
        """Whether the gradient of a score is multiplied by a probability."""
        return self.normalize in ("softmax", "topk")

    @property
    def saved_numbers(self):
        """`saved_numbers` of this plan."""
        return saved_numbers(self.normalize, self.k)

    @property
    def ranks(self):
        """How many columns of a row can be among the k best pairs."""
        return min(self.k, self.num_expert_sqrt)

    @property
    def side(self):
        """The rows of a lane's half of the staircase."""
        return min(math.isqrt(self.k), self.num_expert_sqrt)


@dataclasses.dataclass(frozen=True)
class SlotsPlan(Plan):
    """What is common to plans of kernels that look at all experts chosen for a token at once."""

    tokens: int  # of a program
    tile_k: int  # experts of a token, padded

    def why(self):
        return f"{self.kernel.__name__}: {self.tokens} tokens a program."


def saved_numbers(normalize, k):
    """How many fp32 numbers of a token are saved for its gradient: of both rows the largest logit and the total; and,
    behind those of all tokens, the weights."""
    return 4 + (0 if normalize == "log_softmax" else k)


def tile_of_slots(k):
    """The tokens of a program and the padded k of a `SlotsPlan`."""
    tile_k = max(2, triton.next_power_of_2(k))
    return max(1, SLOTS // tile_k), tile_k


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def count(number, noun):
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def launch(plan, *args):
    """Launches the kernel of a plan as Triton does it, on any device. The last argument is the number of tokens."""
    plan.kernel[(plan.grid(args[-1]),)](*args, PLAN=plan, num_warps=plan.num_warps, **OPTIONS)


def new_matrices(like, num_rows, num_columns, first, second):
    """Two empty matrices of a shape and two dtypes, on the device of a tensor, a GPU: in half the time of `new_empty`,
    as compiled code makes its own. Where PyTorch fills what is empty, to find who reads it, `new_empty` does so."""
    shape, strides = (num_rows, num_columns), (num_columns, 1)
    elsewhere = torch._C._cuda_getDevice() != like.get_device()
    if _empty_on_gpu is None or elsewhere or torch._C._get_deterministic_algorithms():
        return like.new_empty(shape, dtype=first), like.new_empty(shape, dtype=second)
    return _empty_on_gpu(shape, strides, first), _empty_on_gpu(shape, strides, second)


class Launches(dict):
    """What is known of problems whose kernels are compiled, by all that tells their binaries apart."""

    def keep(self, problem, known):
        if len(self) >= MAX_PROBLEMS:  # strides may differ from call to call
            self.clear()
        self[problem] = known


class Launch:
    """The launches of a plan's kernel on one NVIDIA GPU, with arguments that Triton compiles the same binary for.

    Those are tensors of the same dtypes and alignment to 16 bytes, or None, and the same numbers but for the last, that
    of tokens. The caller sees to it.
    """

    __slots__ = ("_binary", "_function", "_hooks", "_lock", "_run", "_tokens", "_tokens_have", "device", "plan")

    def __init__(self, plan, device):
        self.plan, self.device = plan, device
        self._binary, self._run, self._lock = None, None, threading.Lock()
        self._tokens, self._tokens_have = plan.tokens, plan.grid(1)  # of a program, and the programs that share them
        self._hooks = getattr(plan.kernel, "pre_run_hooks", ())  # the kernel's own list, to which anybody may add

    def __call__(self, tensors, *numbers):
        """Launches on the current stream of the GPU, whichever GPU is the current one."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(tensors, *numbers)
        runtime = triton.knobs.runtime
        asks = runtime.debug or runtime.add_stages_inspection_hook or triton.knobs.compilation.instrumentation_mode
        if asks or self._hooks or not (self._run or self._load(*tensors, *numbers)):
            return launch(self.plan, *tensors, *numbers)  # somebody wants another binary, or to see
        grid = -(-numbers[-1] // self._tokens) * self._tokens_have
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        # Of a tensor Triton's launcher would ask the driver whether the GPU can read it.
        args = *[t if t is None else t.data_ptr() for t in tensors], *numbers, self.plan
        enter, leave, metadata = runtime.launch_enter_hook, runtime.launch_exit_hook, None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            metadata = self._binary.launch_metadata((grid, 1, 1), stream, *args)
        else:
            enter = leave = None  # calling chains of no hooks takes time
        self._run(grid, 1, 1, stream, *self._function, metadata, enter, leave, *args)

    def _load(self, *args):
        """Makes ready to launch; says whether Triton gave a binary: a hook may keep it from compiling."""
        self._compile(*args)
        if self._binary is None:
            return False
        with _loading:  # Triton shows a binary's launcher before it has its function
            run = self._binary.run
            self._function = self._binary.function, self._binary.packed_metadata
        self._run = run
        return True

    def _compile(self, *args):
        """Makes the binary for arguments like these. If somebody makes it already, waits for that."""
        with self._lock:
            if self._binary is None:
                binary = compiled(self.plan.kernel, *args, PLAN=self.plan, num_warps=self.plan.num_warps)
                self._binary = binary.result() if hasattr(binary, "result") else binary  # if others compile at once

    def compile_later(self, *args):
        """Has Triton compile the kernel in a thread of its own, which keeps none of the tensors, and loads nothing."""
        likes = [_Like(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]

        def work():
            # What it raises, a launch will raise again.
            with contextlib.suppress(Exception), torch.cuda.device(self.device), politely():
                self._compile(*likes)

        threading.Thread(target=work, name="omni_kernels compile").start()


class _Like:
    """What Triton looks at in a tensor."""

    def __init__(self, tensor):
        self.dtype, self._address = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self):
        return self._address
