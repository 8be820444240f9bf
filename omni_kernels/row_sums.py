"""Sums of a matrix's rows, one after the other: what the experts made of a token, on its way home (distributed.py).

PyTorch's index_add would add a token's rows up in any order, and its gathering writes each row once more.
"""

import torch
import triton
import triton.language as tl

from .configs import OPTIONS, device_of, has_kernels, kernel_input, output_dtype

COLUMNS = 1024  # of a program
AT_ONCE = tl.constexpr(4)  # rows that are read before they are added


@triton.jit(do_not_specialize=["most"])
def row_sums_kernel(values_ptr, weights_ptr, which_ptr, sums_ptr, num_columns, most, TILE_N: tl.constexpr,
                    TILE_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside = columns < num_columns
    total = tl.zeros((TILE_N,), tl.float32)
    for first in tl.range(0, TILE_K, AT_ONCE):
        rows = ()
        for i in tl.static_range(AT_ONCE):
            place = row * 0 + first + i
            chosen = tl.where(place < most, tl.load(which_ptr + row * most + tl.minimum(place, most - 1)), -1)
            mask = inside & (columns * 0 + chosen >= 0)
            values = tl.load(values_ptr + chosen * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + tl.maximum(chosen, 0)).to(tl.float32)
                values = tl.where(mask, values * weight, 0.0)
            rows = rows + (values,)
        for i in tl.static_range(AT_ONCE):
            total += rows[i]
    tl.store(sums_ptr + row * num_columns + columns, total.to(sums_ptr.dtype.element_ty), mask=inside)


def row_sums(values, which, dtype, weights=None):
    """For every row of `which` the weighted sum of those rows of `values`, added up in fp32 in their order.

    Args:
        values: (num_rows, num_columns), fp32, fp16 or bf16.
        which: (num_sums, most), int64; -1 is no row.
        dtype: of the sums.
        weights: (num_rows,), fp32, fp16 or bf16; all 1 if None.

    Returns:
        (num_sums, num_columns), rounded once.
    """
    num_columns, most = values.shape[1], which.shape[1]
    if not (len(values) and which.numel() and num_columns):
        return torch.zeros(len(which), num_columns, dtype=dtype, device=values.device)
    if not has_kernels(values):
        return _by_pytorch(values, which, weights).to(dtype)
    sums = torch.empty(len(which), num_columns, dtype=output_dtype(dtype), device=values.device)
    values, weights = kernel_input(values.contiguous()), weights if weights is None else kernel_input(weights)
    tile_n, tile_k = min(COLUMNS, triton.next_power_of_2(num_columns)), triton.next_power_of_2(most)
    with device_of(values):
        row_sums_kernel[(len(which), triton.cdiv(num_columns, tile_n))](
            values, weights, which, sums, num_columns, most, TILE_N=tile_n, TILE_K=tile_k, **OPTIONS
        )
    return sums.to(dtype)


def _by_pytorch(values, which, weights):
    total = torch.zeros(len(which), values.shape[1], device=values.device)
    for part in which.unbind(1):
        chosen = part.clamp(min=0)
        summand = values[chosen].float()
        if weights is not None:
            summand *= weights[chosen].float()[:, None]
        total += summand.masked_fill_(part[:, None] < 0, 0.0)
    return total
