# SPDX-License-Identifier: Apache-2.0
"""Runs each CUDA kernel once or twice on small inputs: what tools/gpu.sh watches with compute-sanitizer."""

import torch

import fastloss.torch as fl
from fastloss._options import MEAN
from fastloss.torch import ops

OPTIONS = ({}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-3})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A leaf on the GPU, whose rows begin anywhere."""
    return torch.randn(*shape[:-1], shape[-1] + 1, device="cuda").to(dtype)[..., 1:].detach().requires_grad_()


def main() -> None:
    """Every kernel; answers are for the tests to check."""
    for dtype in DTYPES:
        for options in OPTIONS:
            for shape, dim in (((5, 3001), 1), ((1, 70_001), 1), ((2, 37, 5), 1)):
                logits = random(*shape, dtype=dtype)
                rows = shape[:dim] + shape[dim + 1 :]
                target = torch.randint(shape[dim], rows, device="cuda")
                fl.cross_entropy(logits, target, **options).backward()
                for inplace in (True, "backward"):
                    fl.cross_entropy(logits * 1, target, inplace=inplace, **options).backward()
                soft = logits.detach().softmax(dim).requires_grad_()
                fl.cross_entropy(logits, soft, **options).backward()
                stats = fl.logit_stats(logits, target, dim=dim, want=("logprob", "entropy", "rank"))
                (stats.logprob + stats.entropy).sum().backward()
            rows = torch.cuda.get_device_properties(0).multi_processor_count // 8  # taken by clusters, where there are any
            logits, target = random(rows, 140_001, dtype=dtype), torch.randint(140_001, (rows,), device="cuda")
            ops.cross_entropy(logits, target, None, None, ops.Options(1, **options), MEAN, None, False, logits)
            for features in (24, 25):
                hidden, weight = random(40, features, dtype=dtype), random(901, features, dtype=dtype)
                bias, target = random(901, dtype=dtype), torch.randint(901, (40,), device="cuda")
                target[:3] = -100
                for backward in ("exact", "sampled"):
                    loss = fl.linear_cross_entropy(
                        hidden, weight, target, linear_bias=bias, backward=backward, chunk_tokens=16, **options
                    )
                    (loss * 2).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
