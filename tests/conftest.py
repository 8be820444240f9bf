"""Tests run on the GPU when there is one, else on the CPU in Triton's interpreter, which is chosen here, before Triton
is first imported."""

import os

import pytest
import torch
from hypothesis import settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def device():
    return DEVICE
