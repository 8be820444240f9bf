"""The integer keys: their order is the order of the floats they stand for, and nothing is lost in them."""

import pytest
import torch
import triton
import triton.language as tl
from cases import BITS, INF, NAN, ON_NVIDIA, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from omni_kernels import reference
from omni_kernels.factored import frontier, keys

# On NVIDIA GPUs a plan may ask for the shorter code for NaN.
PLANS = [None, *([frontier.plan_of(4, 4, torch.float32, torch.float32, 0, False)] if ON_NVIDIA else [])]
LOWEST_INDEX, HIGHEST_INDEX = 0, 46340**2 - 1


@triton.jit
def key_kernel(values_ptr, keys_ptr, back_ptr, num_values, PLAN: tl.constexpr, TILE_M: tl.constexpr):
    offsets = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    key = keys.float_to_key(tl.load(values_ptr + offsets, mask=offsets < num_values, other=0.0), PLAN)
    tl.store(keys_ptr + offsets, key, mask=offsets < num_values)
    tl.store(back_ptr + offsets, keys.key_to_float(key), mask=offsets < num_values)


@triton.jit
def pack_kernel(values_ptr, index_ptr, packed_ptr, value_back_ptr, index_back_ptr, num_values, KEY: tl.constexpr,
                TILE_M: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    mask = offsets < num_values
    values = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    packed = keys.pack(values, tl.load(index_ptr + offsets, mask=mask, other=0), KEY)
    value_back, index_back = keys.unpack(packed, KEY)
    tl.store(packed_ptr + offsets, packed, mask=mask)
    tl.store(value_back_ptr + offsets, value_back, mask=mask)
    tl.store(index_back_ptr + offsets, index_back, mask=mask)


def launch(kernel, inputs, output_dtypes, **constants):
    outputs = [torch.empty(inputs[0].shape, dtype=dtype, device=inputs[0].device) for dtype in output_dtypes]
    kernel[(triton.cdiv(len(inputs[0]), 1024),)](*inputs, *outputs, len(inputs[0]), TILE_M=1024, **constants)
    return outputs


def to_keys(values):
    results = [launch(key_kernel, [values], [torch.int32, torch.float32], PLAN=plan) for plan in PLANS]
    assert_same_bits(results[0], results[-1])
    return results[0]


def pack(values, index, key=tl.float32):
    key_dtype = torch.int64 if key == tl.float32 else torch.int32
    return launch(pack_kernel, [values, index], [key_dtype, torch.float32, torch.int32], KEY=key)


def every_16_bit_pattern(dtype, device):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return patterns.view(dtype).float().to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_float_keeps_its_place(dtype, device):
    values = every_16_bit_pattern(dtype, device)
    key, back = to_keys(values)
    assert_same_bits([back], [values + 0.0])  # -0.0 comes back as 0.0
    finite = values[~values.isnan()].sort().values
    sorted_keys = to_keys(finite)[0].long()
    assert torch.equal(sorted_keys.diff() > 0, finite.diff() > 0)
    assert (sorted_keys.diff() >= 0).all()
    assert (key[values.isnan()] > key[values == INF]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_32_bits_hold_a_16_bit_float_and_its_index(dtype, device):
    values = every_16_bit_pattern(dtype, device)
    index = torch.arange(len(values), device=device, dtype=torch.int32).flip(0)
    packed, value_back, index_back = pack(
        values, index, {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    )
    assert_same_bits([value_back, index_back], [values + 0.0, index])
    assert torch.equal(packed.argsort(), pack(values, index)[0].argsort())


@pytest.mark.parametrize("bits", [5, 8])
def test_32_bits_hold_the_upper_bits_of_a_float_and_its_index(bits, device):
    values = torch.randn(1 << bits, device=device) * torch.logspace(-30, 30, 1 << bits, device=device)
    index = torch.arange(len(values), device=device, dtype=torch.int32)
    packed, value_back, index_back = pack(values, index, bits)
    assert_same_bits([index_back], [index])
    assert ((value_back - values).abs() <= values.abs() * 2.0 ** (bits - 23)).all()
    assert (value_back[packed.argsort()].diff() >= 0).all()


@given(st.lists(st.floats(width=32), min_size=2, max_size=50))
def test_any_floats_keep_their_order(device, numbers):
    values = torch.tensor(numbers, dtype=torch.float32, device=device)
    key, back = to_keys(values)
    assert_same_bits([back], [values + 0.0])
    left, right = values[:, None], values[None, :]
    above = (left > right) | (left.isnan() & ~right.isnan())
    assert torch.equal(key[:, None] > key[None, :], above)


def test_the_values_where_bits_and_order_part(device):
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1], dtype=torch.int32)
    nans = bits.view(torch.float32).to(device)  # quiet, signalling and full payloads of both signs
    assert nans.isnan().all()
    key, back = to_keys(nans)
    assert (key == 0x7FFFFFFF).all()
    assert back.isnan().all()

    ladder = [-INF, -3.4028234663852886e38, -1.0, -(2.0**-126), -(2.0**-149), 0.0, 2.0**-149, 2.0**-126, 1.0, INF, NAN]
    key, back = to_keys(torch.tensor(ladder, device=device))
    assert (key.long().diff() > 0).all()
    zeros = to_keys(torch.tensor([0.0, -0.0], device=device))
    assert zeros[0][0] == zeros[0][1]
    assert zeros[1].view(BITS[torch.float32]).tolist() == [0, 0]


@given(st.data())
def test_packed_keys_order_by_value_then_lower_index(device, data):
    pool = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN]))
    numbers = data.draw(st.lists(pool, min_size=2, max_size=40))
    indices = st.one_of(st.integers(0, 5), st.integers(HIGHEST_INDEX - 5, HIGHEST_INDEX))
    columns = data.draw(st.lists(indices, min_size=len(numbers), max_size=len(numbers)))
    values = torch.tensor(numbers, dtype=torch.float32, device=device)
    index = torch.tensor(columns, dtype=torch.int32, device=device)
    packed, value_back, index_back = pack(values, index)
    assert_same_bits([value_back, index_back], [values + 0.0, index])

    order = sorted(range(len(numbers)), key=lambda at: (numbers[at] == numbers[at], -numbers[at], columns[at]))
    nans = [at for at in order if numbers[at] != numbers[at]]
    order = sorted(nans, key=lambda at: columns[at]) + order[len(nans) :]
    assert packed.sort(descending=True).values.tolist() == packed[order].tolist()


def test_padding_sorts_below_everything(device):
    values = torch.tensor([-INF, -INF, -3.4e38, NAN], device=device)
    index = torch.tensor([LOWEST_INDEX, HIGHEST_INDEX, HIGHEST_INDEX, HIGHEST_INDEX], dtype=torch.int32, device=device)
    assert (pack(values, index)[0] > keys.LOWEST_KEY.value).all()


def test_pytorch_packs_the_same_keys(device):
    """The fallback and the kernels break rounding ties alike only because their keys are equal."""
    values = every_16_bit_pattern(torch.bfloat16, device)
    index = torch.randint(HIGHEST_INDEX, (len(values),), device=device)
    packed = pack(values, index.int())[0]
    assert torch.equal(packed, reference._pack(values, index))
    value_back, index_back = reference._unpack(packed)
    assert_same_bits([value_back, index_back], [values + 0.0, index])
