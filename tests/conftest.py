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


@pytest.fixture(scope="module")
def pytorch_routes():
    """On a CPU, unless a test asks for `kernels`: interpreted, they would take hours. (The same bits, tests of theirs
    say.)"""
    from omni_kernels import operators  # not before the interpreter is chosen

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(operators, "has_kernels", lambda _: False)
        yield


@pytest.fixture
def kernels(monkeypatch):
    from omni_kernels import configs, operators

    monkeypatch.setattr(operators, "has_kernels", configs.has_kernels)


@pytest.fixture(scope="session", autouse=True)
def few_configurations():
    """On a GPU kernels tune themselves over two configurations a problem, since what takes the time is compiling them;
    each of the others has a test of its own."""
    from omni_kernels import configs  # not before the interpreter is chosen

    def first_and_last(*problem, pruned=configs.pruned):
        kept = pruned(*problem)
        return kept[:1] + kept[1:][-1:]

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cuda":
            patch.setattr(configs, "pruned", first_and_last)
        yield
