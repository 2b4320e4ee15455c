# SPDX-License-Identifier: Apache-2.0
"""Fixtures: every instruction set that this CPU runs, devices, threads, and random numbers with a seed per test."""

import os
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import fastloss

# What the compiler kept of another version of fastloss, whose operators kept other numbers of a row, must not serve this one.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

settings.register_profile(
    "fastloss",
    deadline=None,
    max_examples=50,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastloss")


@pytest.fixture(params=fastloss.available_isas())
def isa(request):
    """The test runs once on each instruction set."""
    before = fastloss.isa()
    fastloss._cpu.set_isa(request.param)
    yield request.param
    fastloss._cpu.set_isa(before)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The test runs once on each device that PyTorch finds: new tensors go there."""
    if request.param == "cpu":
        yield request.param
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture
def no_waiting():
    """Anything that makes PyTorch wait for the GPU raises."""
    import torch

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def linear(monkeypatch):
    """`fastloss.torch.cuda_linear` over the emulated module: losses of CPU tensors go there."""
    from cuda_binding import load_emulation
    from torch_helpers import torch_over_emulation

    with torch_over_emulation(load_emulation(), monkeypatch) as (_, module):
        yield module


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def order(request, monkeypatch):
    """The order in which the emulation runs threads: what no barrier orders comes out wrong in one of them."""
    if request.param:
        monkeypatch.setenv("FASTLOSS_EMULATION_BACKWARDS", "1")


@pytest.fixture
def set_threads():
    """A function that sets the number of threads; the start value comes back after the test."""
    yield fastloss.set_num_threads
    fastloss.set_num_threads(None)


@pytest.fixture(params=(1, 2, 3, 7), ids="{} threads".format)
def threads(request, set_threads):
    set_threads(request.param)
    return request.param


@pytest.fixture
def rng(request):
    """Random numbers, the same at every run of a test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def compiled_afresh():
    """torch.compile as if nothing had been compiled yet."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
