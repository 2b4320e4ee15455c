# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloss`: says what the library runs on; checks every instruction set and dtype against float64 NumPy."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import numpy as np

import fastloss
from fastloss import _arrays, _cpu
from fastloss._arrays import Array

ROWS, CLASSES = 16, 4999
SMOOTHING, Z_LOSS = 0.1, 1e-4

# Bounds of the relative errors: a few units in the last place of the loss, one rounding of the gradient.
LOSS_TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-6, "bfloat16": 1e-6}
GRADIENT_TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}


def main() -> int:
    """Prints the facts and the outcome of the checks; returns the exit status."""
    facts = fastloss.build_info()
    print(f"fastloss {facts.pop('version')}")
    facts["python"] = f"{platform.python_version()}, NumPy {np.__version__}, PyTorch {torch_version()}"
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["isa"] = f"{fastloss.isa()} (available: {', '.join(fastloss.available_isas())})"
    facts["threads"] = str(fastloss.get_num_threads())
    if facts["cuda"] != "no":
        from fastloss import _cuda

        facts["gpus"] = str(_cuda.device_count() or "no CUDA device")
    for name, value in facts.items():
        print(f"  {name + ':':<10} {value}")
    chosen = fastloss.isa()
    failures = 0
    for isa in fastloss.available_isas():
        _cpu.set_isa(isa)
        for dtype in _arrays.DTYPE_CODES:
            loss_error, gradient_error = errors(dtype)
            good = loss_error <= LOSS_TOLERANCE[dtype] and gradient_error <= GRADIENT_TOLERANCE[dtype]
            failures += not good
            print(
                f"  {isa:<10} {dtype:<9} error of the loss {loss_error:.1e}, of the gradient {gradient_error:.1e}"
                f"  {'ok' if good else 'FAILED'}"
            )
    _cpu.set_isa(chosen)
    return 1 if failures else 0


def torch_version() -> str:
    """Returns the version of PyTorch that is installed, without an import of it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "not installed"


def errors(dtype: str) -> tuple[float, float]:
    """Returns the largest errors of the row losses and, relative to the largest entry of its row, of the gradient."""
    rng = np.random.default_rng(0)
    exact = rng.normal(scale=4.0, size=(ROWS, CLASSES))
    exact[0, : CLASSES // 2] = -np.inf
    target = rng.integers(CLASSES // 2, CLASSES, ROWS)
    logits, values = stored(exact, dtype)
    grad = np.empty_like(logits)
    loss = np.empty(ROWS, np.float64 if dtype == "float64" else np.float32)
    # With label smoothing a class of no probability would cost infinity.
    smoothing = np.where(np.isinf(exact).any(axis=1), 0.0, SMOOTHING)
    for row in range(ROWS):
        ids = (_arrays.address(target[row:]), target.itemsize)
        _cpu.cross_entropy(
            (described(logits[row], dtype), ids, None, 0, (1.0, 0.0, 0), -100, float(smoothing[row]), Z_LOSS),
            0,
            None,
            _arrays.address(loss[row:]),
            0,
            described(grad[row], dtype),
            1.0,
            None,
        )
    expected_loss, expected_grad = reference(values, target, smoothing)
    loss_error = np.max(np.abs(loss - expected_loss) / np.maximum(1.0, np.abs(expected_loss)))
    largest = np.max(np.abs(expected_grad), axis=1, keepdims=True)
    gradient_error = np.max(np.abs(loaded(grad, dtype) - expected_grad) / largest)
    return float(loss_error), float(gradient_error)


def reference(z: Array, target: Array, smoothing: Array) -> tuple[Array, Array]:
    """Returns row losses and gradients by the formulas of `cross_entropy`, in float64."""
    top = z.max(axis=1, keepdims=True)
    exp = np.exp(z - top)
    p = exp / exp.sum(axis=1, keepdims=True)
    normaliser = top + np.log(exp.sum(axis=1, keepdims=True))
    q = np.repeat(smoothing[:, None] / CLASSES, CLASSES, axis=1)
    q[np.arange(ROWS), target] += 1 - smoothing
    terms = np.multiply(q, normaliser - z, where=q > 0, out=np.zeros_like(q))
    loss = terms.sum(axis=1) + Z_LOSS * normaliser[:, 0] ** 2
    return loss, p - q + 2 * Z_LOSS * normaliser * p


def stored(values: Array, dtype: str) -> tuple[Array, Array]:
    """Returns values as an array of the dtype, bfloat16 as its bits in uint16, and that array in float64."""
    array = values.astype(np.float32 if dtype == "bfloat16" else dtype)
    if dtype == "bfloat16":
        array = (array.view(np.uint32) >> 16).astype(np.uint16)
    return array, loaded(array, dtype)


def loaded(array: Array, dtype: str) -> Array:
    """Returns the values of an array made by `stored`, in float64."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def described(array: Array, dtype: str) -> _cpu.Tensor:
    """Describes one row to the kernels; without ml_dtypes, only its name tells bfloat16 from uint16."""
    return _arrays.address(array), _arrays.DTYPE_CODES[dtype], array.shape, (1,), 0


if __name__ == "__main__":
    sys.exit(main())
