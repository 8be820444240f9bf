"""What the functions people call refuse, and what they say: the argument, what it got, what it needs."""

import operator

import torch
from torch.compiler import is_compiling

MAX_EXPERT_SQRT = 46340  # the largest N whose N² expert indices fit in int32
MAX_INT32 = 2**31 - 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64), "int32 or int64"  # of indices and counts, and how they are called
NORMALIZE = ("log_softmax", "softmax", "topk")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_usual(x, y, k):
    """Whether they are right, and what nearly every call brings: two matrices and an int. A microsecond's test."""
    return (
        type(x) in PLAIN
        and type(y) in PLAIN
        and type(k) is int
        and (x.dtype is y.dtype and x.dtype in DTYPES)
        and x.layout is y.layout is torch.strided
        and not (x.is_nested or y.is_nested)
        and x.device == y.device
        and len(shape := x.shape) == 2
        and shape == y.shape
        and 1 <= shape[1] <= MAX_EXPERT_SQRT
        and 0 <= k <= shape[1] * shape[1]
    )


def check(x, y, k, k_name="num_experts_per_token"):
    """Raises unless x and y are logits of the same tokens, and k a number of experts that there are.

    Returns:
        k as a plain int, whatever integer it was; a torch.SymInt as it is.
    """
    if is_usual(x, y, k):
        return k
    for name, logits in (("router_logits_x", x), ("router_logits_y", y)):
        _check_tensor(name, logits)
        if not logits.ndim:
            raise ValueError(f"{name} must have shape (..., num_expert_sqrt), got shape ()")
    for what, got_x, got_y in (
        ("shape", tuple(x.shape), tuple(y.shape)),
        ("dtype", x.dtype, y.dtype),
        ("device", x.device, y.device),
    ):
        if got_x != got_y:
            raise ValueError(f"router_logits_y must have the {what} of router_logits_x, {got_x}, got {got_y}")
    num_expert_sqrt = x.shape[-1]
    if not 1 <= num_expert_sqrt <= MAX_EXPERT_SQRT:
        raise ValueError(
            f"router_logits_x must have 1 to {MAX_EXPERT_SQRT} columns (num_expert_sqrt), got shape {tuple(x.shape)}"
        )
    k = _integer(k_name, k)
    if not 0 <= k <= num_expert_sqrt**2:
        raise ValueError(f"{k_name} must be from 0 to num_expert_sqrt² = {num_expert_sqrt**2}, got {k}")
    return k


def check_matrix(x):
    """Raises unless x, logits that `check` let pass, has one dimension of tokens."""
    if x.ndim != 2:
        raise ValueError(f"router_logits_x must be 2-D (num_tokens, num_expert_sqrt), got shape {tuple(x.shape)}")


def check_expert_sqrt(num_expert_sqrt, x):
    """Raises unless it is the number of columns of x. Returns it as `check` returns k."""
    num_expert_sqrt = _integer("num_expert_sqrt", num_expert_sqrt)
    if num_expert_sqrt != x.shape[1]:
        raise ValueError(f"num_expert_sqrt must be the logits' number of columns, {x.shape[1]}, got {num_expert_sqrt}")
    return num_expert_sqrt


def _check_tensor(name, tensor, dtypes=DTYPES, needs="float32, float16 or bfloat16"):
    """Raises unless it is a dense tensor of one of the dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {needs}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be dense, got {'nested' if tensor.is_nested else tensor.layout}")


def _check_tokens(name, tensor, last, other_name, other):
    """Raises unless its dimensions but the last, which is called so, are those of another tensor."""
    if tensor.ndim != other.ndim or tuple(tensor.shape[:-1]) != tuple(other.shape[:-1]):
        tokens = "".join(f"{size}, " for size in other.shape[:-1])
        raise ValueError(
            f"{name} must have shape ({tokens}{last}), as {other_name} has shape {tuple(other.shape)}, "
            f"got shape {tuple(tensor.shape)}"
        )


def _check_device(name, tensor, other_name, other):
    if tensor.device != other.device:
        raise ValueError(f"{name} must have the device of {other_name}, {other.device}, got {tensor.device}")


def _integer(name, value):
    """Any integer but a bool as a plain int; a symbolic one as it is."""
    if isinstance(value, torch.SymInt):
        return value
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool
    try:
        return operator.index(None if is_bool else value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}") from None


def check_scores_dtype(scores_dtype):
    """Raises unless it is None or a dtype that scores may have."""
    if scores_dtype is not None and not (isinstance(scores_dtype, torch.dtype) and scores_dtype in DTYPES):
        raise TypeError(f"scores_dtype must be None, float32, float16 or bfloat16, got {scores_dtype!r}")


def check_normalize(normalize):
    """Raises unless it is None or one of the three ways to normalize scores."""
    if not (normalize is None or (isinstance(normalize, str) and normalize in NORMALIZE)):
        raise ValueError(f"normalize must be None, 'log_softmax', 'softmax' or 'topk', got {normalize!r}")


def check_limit(**limits):
    """Raises unless exactly one is not None, and that one above 0 and at most 1. Returns its name and value."""
    given = [name for name, value in limits.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(limits)} must be given, got {' and '.join(given) or 'none'}")
    (name,) = given
    value = limits[name]
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__} {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return name, value


def check_pairs(scores, indices, counts, num_experts):
    """Raises unless they are what a router chose among as many experts. Returns num_experts as `check` returns k."""
    _check_tensor("scores", scores)
    if not scores.ndim:
        raise ValueError("scores must have shape (..., num_experts_per_token), got shape ()")
    for name, tensor, shape in (("indices", indices, scores.shape), ("counts", counts, scores.shape[:-1])):
        if tensor is None and name == "counts":
            continue
        _check_tensor(name, tensor, *INTEGERS)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have shape {tuple(shape)}, as scores has shape {tuple(scores.shape)}, "
                f"got shape {tuple(tensor.shape)}"
            )
        _check_device(name, tensor, "scores", scores)
    if not is_compiling() and scores.numel() > MAX_INT32:  # else compiled code were for so many tokens alone
        raise ValueError(f"scores must have at most 2³¹ - 1 elements, got shape {tuple(scores.shape)}")
    if type(num_experts) is not int:  # symbolic ones are, to the compiler
        num_experts = _integer("num_experts", num_experts)
    if not 1 <= num_experts <= MAX_INT32:
        raise ValueError(f"num_experts must be from 1 to 2³¹ - 1, got {num_experts}")
    return num_experts


def check_hidden(hidden, scores, backends):
    """Raises unless they are hidden vectors of the tokens of scores, which `check_pairs` let pass, on a device that is
    among the backends of a process group."""
    _check_tensor("hidden", hidden)
    _check_device("hidden", hidden, "scores", scores)
    _check_tokens("hidden", hidden, "hidden_size", "scores", scores)
    if hidden.device.type not in backends:
        raise ValueError(
            f"hidden must be on a device that the group serves, {', '.join(backends)}, got {hidden.device}"
        )


def check_outputs(outputs, hidden, num_pairs):
    """Raises unless they are what experts made of as many pairs of the hidden vectors that were dispatched."""
    _check_tensor("outputs", outputs)
    _check_device("outputs", outputs, "dispatched", hidden)
    shape = num_pairs, hidden.shape[1]
    if tuple(outputs.shape) != shape:
        raise ValueError(f"outputs must have shape {shape}, a row for each pair, got shape {tuple(outputs.shape)}")


def check_values(name, values, low, high, what_high_is=""):
    """Raises unless they are from low to high. Reads them all."""
    if values.numel():
        least, most = (int(part) for part in values.aminmax())
        if least < low or most > high:
            got = least if least < low else most
            raise ValueError(f"{name} must be from {low} to {what_high_is}{high}, got {got}")


def check_indices(indices, x):
    """Raises unless they are integers of the tokens of x, logits that `check` let pass."""
    _check_tensor("indices", indices, *INTEGERS)
    _check_tokens("indices", indices, "num_experts_per_token", "router_logits_x", x)
    _check_device("indices", indices, "router_logits_x", x)
