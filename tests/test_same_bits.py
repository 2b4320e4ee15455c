# SPDX-License-Identifier: Apache-2.0
"""The same bits for any number of threads, any split of the work, every instruction set, every layout, one trip or two."""

import numpy as np
import pytest

import binding
import fastloss
from helpers import AWKWARD_LENGTHS, DTYPES, accumulation, assert_same_bits, run_python
from reference import Options

# Rows and classes: many small rows, fewer rows than threads, one row alone, rows that end within a block.
SHAPES = [(700, 100), (40, 4097), (5, 40000), (2, 128256), (1, 256000)]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
}


@pytest.fixture
def fastest():
    """The instruction set that is chosen by default runs the calls that are compared with."""
    return fastloss.available_isas()[-1]


def problem(rng, shape, dtype, soft=False):
    logits = (4 * rng.standard_normal(shape)).astype(DTYPES[dtype])
    logits[0, : min(shape[1] // 2, 5000)] = -np.inf
    acc = accumulation(logits.dtype)
    target = rng.random(shape).astype(acc) if soft else rng.integers(shape[1], size=shape[0])
    if not soft:
        target[-1] = np.argmax(logits[-1])
    weight, bias = (rng.uniform(0.5, 1.5, shape[1]).astype(acc) for _ in range(2))
    return logits, target, weight, bias


def results(logits, target, weight=None, bias=None, **options):
    """Loss of each row, mean, gradient and every statistic, of one call each."""
    row_losses = fastloss.cross_entropy(logits, target, weight, axis=-1, bias=bias, reduction="none", **options)
    mean, gradient = fastloss.cross_entropy(logits, target, weight, axis=-1, bias=bias, return_grad=True, **options)
    return [row_losses, np.asarray(mean), gradient]


def statistics(logits, target, bias=None, **transform):
    ids = target if target.ndim == 1 else None
    want = ("logsumexp", "entropy", "mean_logit", "sum_sq_prob", "max_prob", "argmax")
    want = want + ("logprob", "rank") if ids is not None else want
    stats = fastloss.logit_stats(logits, ids, want=want, bias=bias, **transform)
    return [getattr(stats, name) for name in want]


def assert_all_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_threads_gives_the_same_bits(shape, dtype, threads, set_threads, rng):
    logits, target, weight, bias = problem(rng, shape, dtype)
    actual = results(logits, target, weight, bias, label_smoothing=0.1) + statistics(logits, target)
    set_threads(1)
    assert_all_same_bits(actual, results(logits, target, weight, bias, label_smoothing=0.1) + statistics(logits, target))


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_instruction_set_gives_the_same_bits_of_cross_entropy(name, dtype, soft, isa, fastest, rng):
    for shape in [(9, 1000), (3, 4096 * 2 + 777)]:
        logits, target, weight, bias = problem(rng, shape, dtype, soft)
        fastloss._cpu.set_isa(isa)
        actual = results(logits, target, weight, bias, **OPTIONS[name])
        fastloss._cpu.set_isa(fastest)
        assert_all_same_bits(actual, results(logits, target, weight, bias, **OPTIONS[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=["plain", "softcap"])
def test_every_instruction_set_gives_the_same_bits_of_statistics(transform, dtype, isa, fastest, rng):
    for shape in [(9, 1000), (3, 4096 * 2 + 777)]:
        logits, target, _, bias = problem(rng, shape, dtype)
        fastloss._cpu.set_isa(isa)
        actual = statistics(logits, target, bias, **transform)
        fastloss._cpu.set_isa(fastest)
        assert_all_same_bits(actual, statistics(logits, target, bias, **transform))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits_at_every_length(dtype, isa, fastest, rng):
    for classes in AWKWARD_LENGTHS:
        logits = (4 * rng.standard_normal((3, classes))).astype(DTYPES[dtype])
        target = rng.integers(classes, size=3)
        fastloss._cpu.set_isa(isa)
        actual = results(logits, target)
        fastloss._cpu.set_isa(fastest)
        assert_all_same_bits(actual, results(logits, target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits_on_subnormals_and_extremes(dtype, isa, fastest, rng):
    info_max = float(np.finfo(np.float16).max) if dtype == "float16" else 3e38
    smallest = {"float16": 2.0**-24, "float64": 2.0**-1074}.get(dtype, 2.0**-126)
    values = np.array([0.0, -0.0, smallest, -smallest, 1.0, -87.0, -88.5, -103.0, -700.0, -745.2, -info_max])
    logits = rng.choice(values, (6, 500)).astype(DTYPES[dtype])
    logits[3, 77] = info_max
    target = rng.integers(500, size=6)
    fastloss._cpu.set_isa(isa)
    actual = results(logits, target)
    fastloss._cpu.set_isa(fastest)
    assert_all_same_bits(actual, results(logits, target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["row stride", "every second class", "reversed", "transposed", "broadcast rows"])
@pytest.mark.parametrize("shape", [(70, 300), (3, 9000)], ids=str)
def test_every_layout_gives_the_same_bits(shape, layout, dtype, isa, rng):
    count, classes = shape
    numbers = (4 * rng.standard_normal((2 * count, 2 * classes))).astype(DTYPES[dtype])
    strided = {
        "row stride": numbers[:count, :classes],
        "every second class": numbers[:count, ::2],
        "reversed": numbers[count - 1 :: -1, classes - 1 :: -1],
        "transposed": numbers.reshape(classes * 2, count * 2)[:classes, :count].T,
        "broadcast rows": np.broadcast_to(numbers[0, :classes], shape),
    }[layout]
    target = rng.integers(classes, size=count)
    assert strided.shape == shape
    assert_all_same_bits(results(strided, target), results(np.ascontiguousarray(strided), target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes_between", [(7, 300, 11), (2, 9000, 3), (3, 21, 130)], ids=str)
def test_class_axis_in_the_middle_gives_the_same_bits(classes_between, dtype, isa, rng):
    batch, classes, places = classes_between
    logits = (4 * rng.standard_normal(classes_between)).astype(DTYPES[dtype])
    target = rng.integers(classes, size=(batch, places))
    loss, gradient = fastloss.cross_entropy(logits, target, return_grad=True)
    moved = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    moved_loss, moved_gradient = fastloss.cross_entropy(moved, target, axis=-1, return_grad=True)
    assert_same_bits(loss, moved_loss)
    assert_same_bits(np.moveaxis(gradient, 1, -1), moved_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
@pytest.mark.parametrize("shape", [(9, 1000), (2, 20000)], ids=str)
def test_two_trips_give_the_bits_of_one(shape, soft, dtype, isa, rng):
    logits, target, weight, bias = problem(rng, shape, dtype, soft)
    options = Options(weight=weight, bias=bias, label_smoothing=0.1, z_loss=1e-3, softcap=9.0)
    call = binding.Call(logits, target, options)
    one_trip, two_trips = np.empty_like(logits), np.empty_like(logits)
    call.forward(one_trip)
    call.forward()
    assert_same_bits(call.backward(two_trips), one_trip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 1000), (2, 20000), (130, 65)], ids=str)
def test_in_place_gives_the_bits_of_fresh_memory(shape, dtype, isa, rng):
    logits, target, _, _ = problem(rng, shape, dtype)
    fresh = np.empty_like(logits)
    binding.Call(logits, target, Options()).forward(fresh)
    binding.Call(logits, target, Options()).forward(logits)
    assert_same_bits(logits, fresh)


def test_loss_without_the_gradient_has_the_bits_of_the_loss_with_it(isa, rng):
    logits, target, _, _ = problem(rng, (9, 5000), "float32")
    with_gradient, _ = fastloss.cross_entropy(logits, target, return_grad=True)
    assert_same_bits(fastloss.cross_entropy(logits, target), with_gradient)


def test_rows_do_not_depend_on_their_neighbours(isa, rng):
    logits, target, _, _ = problem(rng, (70, 500), "float32")
    together = fastloss.cross_entropy(logits, target, reduction="none")
    alone = [fastloss.cross_entropy(logits[i : i + 1], target[i : i + 1], reduction="none")[0] for i in range(70)]
    assert_same_bits(together, np.array(alone))


def test_the_second_run_gives_the_bits_of_the_first(rng):
    logits, target, _, _ = problem(rng, (200, 5000), "float32")
    first = results(logits, target)
    for _ in range(5):
        assert_all_same_bits(results(logits, target), first)


POOLS = """
import hashlib, sys
if {torch}:
    import fastloss.torch
import fastloss, numpy as np
assert ("torch" in sys.modules) == {torch}
for threads in (1, 2, 3, 7):
    fastloss.set_num_threads(threads)
    digest = hashlib.sha256()
    for shape in [(700, 100), (40, 4097), (2, 128256)]:
        rng = np.random.default_rng(1)
        logits = rng.standard_normal(shape).astype(np.float32)
        target = rng.integers(shape[1], size=shape[0])
        for array in fastloss.cross_entropy(logits, target, return_grad=True):
            digest.update(np.asarray(array).tobytes())
    print(digest.hexdigest())
"""


def digests_of_a_process(torch):
    done = run_python(POOLS.format(torch=torch))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_pool_of_fastloss_gives_the_same_bits_for_every_number_of_threads():
    digests = digests_of_a_process(torch=False)
    assert len(digests) == 4
    assert len(set(digests)) == 1


def test_the_pool_of_pytorch_gives_the_bits_of_the_own_one():
    pytest.importorskip("torch")
    assert digests_of_a_process(torch=True) == digests_of_a_process(torch=False)
