# SPDX-License-Identifier: Apache-2.0
"""What `fastloss.torch` does with CUDA tensors, without a GPU: its calls go to the kernels as the CPU runs them.

Tensors stay on the CPU; `fastloss._cuda` is the emulated module of tests/cuda_emulation.
"""

import pytest

torch = pytest.importorskip("torch")

import fastloss  # noqa: E402
import fastloss.torch as fl  # noqa: E402
from cuda_binding import load_emulation  # noqa: E402
from fastloss.torch import operators, ops  # noqa: E402
from helpers import assert_cross_entropy_contract, run_python  # noqa: E402
from reference import Options  # noqa: E402
from torch_helpers import (  # noqa: E402
    TORCH_DTYPES,
    array,
    seeded,
    seeded_ids,
    seeded_probabilities,
    torch_over_emulation,
)

emulated = load_emulation()


@pytest.fixture
def cuda(monkeypatch):
    with torch_over_emulation(emulated, monkeypatch) as (module, _):
        yield module


def contract(loss, logits, target, options, **arguments):
    rows = array(logits)
    assert_cross_entropy_contract(loss.detach().numpy(), array(logits.grad), rows, array(target), options, **arguments)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_keep_the_contract(reduction, dtype, cuda):
    logits = seeded(9, 700, dtype=TORCH_DTYPES[dtype]).requires_grad_()
    target = seeded_ids(700, 9)
    target[4] = -100
    loss = fl.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1, z_loss=1e-3)
    loss.backward()
    contract(loss, logits, target, Options(label_smoothing=0.1, z_loss=1e-3), reduction=reduction)


def test_soft_targets_get_a_gradient_too(cuda):
    logits, target = seeded(4, 50).requires_grad_(), seeded_probabilities(4, 50).requires_grad_()
    fl.cross_entropy(logits, target).backward()
    by_logits, by_target = logits.grad.clone(), target.grad.clone()
    logits.grad = target.grad = None
    torch.nn.functional.cross_entropy(logits, target).backward()
    torch.testing.assert_close(by_logits, logits.grad)
    torch.testing.assert_close(by_target, target.grad)


def test_upstream_gradients_reach_each_row(cuda):
    logits = seeded(4, 50).requires_grad_()
    target, upstream = seeded_ids(50, 4), torch.tensor([1.0, 0.0, -3.0, 0.5], dtype=torch.float64)
    fl.cross_entropy(logits, target, reduction="none").backward(upstream)
    ours = logits.grad.clone()
    logits.grad = None
    torch.nn.functional.cross_entropy(logits, target, reduction="none").backward(upstream)
    torch.testing.assert_close(ours, logits.grad)


@pytest.mark.parametrize("inplace", [True, "backward"])
def test_inplace_writes_over_the_logits(inplace, cuda):
    leaf = seeded(6, 300, dtype=torch.float32).requires_grad_()
    target = seeded_ids(300, 6)
    fresh = torch.autograd.grad(fl.cross_entropy(leaf * 1, target), leaf)[0]
    logits = leaf * 1
    place = logits.data_ptr()
    kept = {}
    logits.register_hook(lambda grad: kept.update(place=grad.data_ptr()))
    fl.cross_entropy(logits, target, inplace=inplace).backward()
    assert kept["place"] == place
    torch.testing.assert_close(leaf.grad, fresh, rtol=0, atol=0)


def test_gradient_in_the_trip_of_the_loss_keeps_the_contract(cuda):
    logits, target = seeded(5, 300, dtype=torch.float32), seeded_ids(300, 5)
    grad = torch.full_like(logits, torch.nan)
    loss, saved, scale = cuda.cross_entropy(logits, target, None, None, ops.Options(1), 1, None, False, grad)
    assert saved is None
    assert scale == 1 / 5
    assert_cross_entropy_contract(loss.numpy(), array(grad), array(logits), array(target))


def test_factor_of_the_mean_stays_a_tensor_of_the_device(cuda):
    _, _, scale = cuda.cross_entropy(seeded(5, 30), seeded_ids(30, 5), None, None, ops.Options(1), 1, None, True)
    assert isinstance(scale, torch.Tensor)
    assert operators.as_tensor(scale) is scale


def test_second_derivatives_go_through_the_plain_formula(cuda):
    logits = seeded(3, 7).requires_grad_()
    target = seeded_ids(7, 3)
    grad = torch.autograd.grad(fl.cross_entropy(logits, target), logits, create_graph=True)[0]
    ours = torch.autograd.grad(grad.square().sum(), logits)[0]
    grad = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits, create_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(grad.square().sum(), logits)[0])


def test_statistics_fill_their_outputs(cuda):
    logits, ids = seeded(4, 90, dtype=torch.float32), seeded_ids(90, 4, 2)
    want = [True] * 8
    outputs = ops.stats_outputs(logits, ids, 1, want)
    cuda.statistics(logits, ids, 2, None, 1, 0.0, 1.0, outputs, want)
    expected = fl.logit_stats(logits, ids, want=fastloss.LogitStats._fields)
    for name, out in zip(fastloss.LogitStats._fields, outputs, strict=False):
        torch.testing.assert_close(out, getattr(expected, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_statistics_is_that_of_the_cpu(inplace, k, cuda):
    logits, ids = seeded(4, 90, dtype=torch.float32), seeded_ids(90, 4, k)
    *_, saved = torch.ops.fastloss.statistics(logits, ids, None, 1, 0.0, 1.0, [True] * 8)
    coefficients, g = seeded(4, 4), seeded(4, k, seed=1)
    expected = ops.gradient(logits, saved, coefficients, ids, g, None, 1, 0.0, 1.0)
    grad = logits if inplace else torch.empty_like(logits)
    cuda.gradient(logits, saved[..., :3].contiguous(), coefficients, ids, k, g, None, 1, 0.0, 1.0, grad)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


def test_id_out_of_range_is_nan_and_raises_when_debugging(cuda, monkeypatch):
    logits, target = seeded(3, 5), torch.tensor([0, 5, 2])
    assert fl.cross_entropy(logits, target).isnan()
    monkeypatch.setattr(cuda, "DEBUG", True)
    with pytest.raises(IndexError, match=r"target\[1\] = 5 is out of range for 5 classes"):
        fl.cross_entropy(logits, target)
    target[1] = -100
    assert fl.cross_entropy(logits, target).isfinite()


# ---- devices ----


def test_cuda_module_is_not_imported_for_cpu_tensors():
    done = run_python(
        "import sys, torch, fastloss.torch as fl\n"
        "fl.cross_entropy(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()\n"
        "print([m for m in sys.modules if 'cuda' in m and 'fastloss' in m])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_build_without_cuda_says_so():
    done = run_python(
        "import sys, fastloss.torch.ops as ops\nsys.modules['fastloss._cuda'] = None\n"
        "try: ops.gpu()\nexcept NotImplementedError as error: print(error)"
    )
    assert "no CUDA kernels" in done.stdout, done.stderr
    assert "FASTLOSS_CUDA=ON" in done.stdout


@pytest.mark.skipif(fastloss.build_info()["cuda"] == "no", reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_module_loads_without_a_gpu_and_says_so():
    done = run_python(
        "from fastloss import _cuda\nprint(_cuda.device_count(), _cuda.ARCHITECTURES)\n"
        "try: _cuda.workspace_bytes((0, 0, (2, 3), (3, 1), 1), 0, 0)\nexcept RuntimeError as error: print(error)\n"
        "import fastloss.torch.ops as ops\n"
        "try: ops.gpu()\nexcept RuntimeError as error: print(error)"
    )
    count, first, second = done.stdout.splitlines()
    assert count.startswith("0 "), done.stderr
    assert "no CUDA device" in first
    assert "no CUDA device" in second
