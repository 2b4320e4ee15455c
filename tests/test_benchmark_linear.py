# SPDX-License-Identifier: Apache-2.0
"""The bare products that the benchmark of linear cross-entropy compares with are the products that they stand for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from benchmarks.linear.case import LinearCase  # noqa: E402
from benchmarks.linear.jobs import ROLES, products  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_float64(dtype):
    case = LinearCase(24, 130, 16, dtype)
    ways = products(case)
    assert {role for role, *_ in ways} == set(ROLES)
    hidden, weight = case.hidden.double(), case.weight.double()
    for (role, *_), job in ways.items():
        grad = job.buffers.logits.fill_(1e-3).double()
        expected = {"logits": hidden @ weight.T, "hidden": grad @ weight, "weight": grad.T @ hidden}[role]
        job.run()
        found = {"logits": job.buffers.logits, "hidden": job.buffers.by_hidden, "weight": job.buffers.by_weight}[role]
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
