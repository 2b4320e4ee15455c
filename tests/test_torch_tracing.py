# SPDX-License-Identifier: Apache-2.0
"""All functions of `fastloss.torch` under `torch.jit.trace` and `torch.export`, which see other sizes than those traced."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch as fl  # noqa: E402
from torch_helpers import seeded, seeded_ids  # noqa: E402
from transform_helpers import FLOAT64, each_function, example, gradient  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
TOKENS, CLASSES, FEATURES = 6, 10, 8


@each_function
@pytest.mark.usefixtures("device")
def test_a_traced_function_computes_its_own_inputs(name):
    ours, theirs, x, y = example(name)
    traced = torch.jit.trace(ours, (x + 1, y))
    torch.testing.assert_close(traced(x, y), theirs(x, y), **FLOAT64)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(traced(leaf, y).sum(), leaf)
    torch.testing.assert_close(grad, gradient(theirs)(x, y), **FLOAT64)


@pytest.mark.parametrize("backward", ["exact", "sampled"])
def test_a_traced_module_takes_other_numbers_of_tokens(backward):
    module = fl.LinearCrossEntropyLoss(FEATURES, CLASSES, backward=backward)
    hidden, target = seeded(TOKENS, FEATURES).float(), seeded_ids(CLASSES, TOKENS)
    traced = torch.jit.trace(module, (hidden, target))
    torch.testing.assert_close(traced(hidden[:3], target[:3]), module(hidden[:3], target[:3]))
    traced(hidden, target).backward()
    assert module.linear.weight.grad is not None


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"backward": "sampled"}], ids=str)
def test_an_exported_loss_takes_other_numbers_of_tokens(options):
    class Model(torch.nn.Module):
        def forward(self, hidden, weight, target):
            return fl.linear_cross_entropy(hidden, weight, target, **options)

    hidden, weight, target = seeded(TOKENS, FEATURES), seeded(CLASSES, FEATURES, seed=1), seeded_ids(CLASSES, TOKENS)
    tokens = torch.export.Dim("tokens", min=2)
    dynamic = ({0: tokens}, None, {0: tokens})
    program = torch.export.export(Model(), (hidden, weight, target), dynamic_shapes=dynamic, strict=False)
    few = (hidden[:3], weight, target[:3])
    torch.testing.assert_close(program.module()(*few), fl.linear_cross_entropy(*few, **options))
