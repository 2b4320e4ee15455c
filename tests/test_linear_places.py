# SPDX-License-Identifier: Apache-2.0
"""`fastloss.torch.linear_cross_entropy` with a head for each of several places."""

import pytest

torch = pytest.importorskip("torch")

import fastloss.torch  # noqa: E402
from fastloss.torch import matmul  # noqa: E402
from linear_helpers import CLASS_WEIGHT, CLASSES, FEATURES, TOKENS, on_each_device  # noqa: E402
from torch_helpers import here, same_bits, seeded, seeded_ids  # noqa: E402

ours = fastloss.torch.linear_cross_entropy
PLACES = (3, 2)
HEADS = (CLASSES, *PLACES, FEATURES)


def heads():
    return seeded(TOKENS, FEATURES).requires_grad_(), seeded(*HEADS, seed=1, scale=1.0).requires_grad_()


@on_each_device
@pytest.mark.parametrize("options", [{}, {"weight": CLASS_WEIGHT}], ids=["", "weighted"])
def test_every_target_of_all_places_ignored(options):
    hidden, weight = heads()
    loss = ours(hidden, weight, torch.full((TOKENS, *PLACES), -100), **here(options))
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


@on_each_device
def test_a_seed_gives_each_place_random_numbers_of_its_own_and_always_the_same():
    hidden = seeded(TOKENS, FEATURES, scale=0.1)
    weight = seeded(CLASSES, FEATURES, seed=1)[:, None].repeat(1, 3, 1).requires_grad_()
    target = seeded_ids(CLASSES, TOKENS)[:, None].expand(-1, 3)

    def gradient(seed):
        loss = ours(hidden, weight, target, reduction="sum", backward="sampled", threshold=0.1, seed=seed)
        return torch.autograd.grad(loss, weight)[0].unbind(1)

    first = gradient(7)
    assert all(same_bits(one, other) for one, other in zip(first, gradient(7), strict=True))
    every = [*first, *gradient(8)]
    assert not any(torch.equal(one, other) for i, one in enumerate(every) for other in every[:i])
    single = ours(hidden, weight[:, 0], target[:, 0], reduction="sum", backward="sampled", threshold=0.1, seed=7)
    assert torch.equal(torch.autograd.grad(single, weight)[0][:, 0], first[0])


BAD_PLACES = {
    "id at a place": ({"target": (2, 2, 1, 99)}, IndexError, ["target[2, 2, 1] = 99", "37 classes"]),
    "id of the first class behind, weighted": (
        {"target": (0, 1, 0, CLASSES), "weight": CLASS_WEIGHT},
        IndexError,
        ["target[0, 1, 0] = 37", "37 classes"],
    ),
    "short weight": ({"weight": CLASS_WEIGHT[:2]}, ValueError, ["weight", "(2,)", "(37,)"]),
    "weight of a list": ({"weight": [1.0] * CLASSES}, TypeError, ["weight", "list"]),
    "ignore_index of text": ({"ignore_index": "x"}, TypeError, ["ignore_index", "str"]),
    "no place": ({"linear_weight": torch.zeros(CLASSES, 0, FEATURES)}, ValueError, ["linear_weight", "place", "(37, 0, 5)"]),
    "seed of text": ({"seed": "x"}, TypeError, ["seed", "str"]),
    "threshold of 0": ({"threshold": 0.0}, ValueError, ["threshold", "0.0"]),
    "negative denominator": ({"denominator": torch.tensor(-1.0)}, ValueError, ["denominator", "-1.0"]),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_bad_input_of_places_raises_before_any_product_is_made(case, monkeypatch):
    changed, error, words = BAD_PLACES[case]
    monkeypatch.setattr(matmul, "logits_product", lambda *_: pytest.fail("a product was made"))
    hidden, weight = heads()
    target = seeded_ids(CLASSES, TOKENS, *PLACES)
    if "target" in changed:
        *place, wrong = changed["target"]
        target[tuple(place)] = wrong
    arguments = {"input": hidden, "linear_weight": weight} | changed | {"target": target}
    with pytest.raises(error) as raised:
        ours(**arguments)
    for word in words:
        assert word in str(raised.value)
