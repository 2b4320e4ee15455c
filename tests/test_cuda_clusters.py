# SPDX-License-Identifier: Apache-2.0
"""Rows that the blocks of a cluster share: loss and gradient in one trip, run on the CPU by tests/cuda_emulation."""

import numpy as np
import pytest

import reference
from binding import aligned_weight, tensor
from cuda_binding import DEVICE, ChunkCall, CudaCall, load_emulation
from helpers import DEFAULT, DTYPES, assert_cross_entropy_contract, assert_same_bits
from reference import Options

cuda = load_emulation()
INF = np.inf
ROWS = 7
LEAST_PART = 32 * 1024  # bytes of a row for each block


def pretend(monkeypatch, multiprocessors, shared_bytes=228 * 1024, clusters=1):
    """The GPU of the following calls."""
    for name, value in (("MULTIPROCESSORS", multiprocessors), ("SHARED_BYTES", shared_bytes), ("CLUSTERS", clusters)):
        monkeypatch.setenv(f"FASTLOSS_EMULATION_{name}", str(value))


@pytest.fixture(params=[2, 5, 8])
def blocks(request, monkeypatch):
    """Of the cluster that takes each of ROWS rows of classes_of(...): the fewest that fill the GPU."""
    pretend(monkeypatch, 9 * request.param)
    return request.param


def classes_of(blocks, dtype):
    """No whole number of anything."""
    return blocks * LEAST_PART // DTYPES[dtype].itemsize + 337


def random_logits(blocks, dtype, rng):
    return (3 * rng.standard_normal((ROWS, classes_of(blocks, dtype)))).astype(DTYPES[dtype])


def targets_at_the_seams(blocks, classes, rng):
    """Ends of the row and places around those where one block's part ends and the next begins."""
    seams = [classes * part // blocks + rng.integers(-20, 20) for part in (1, blocks // 2, blocks - 1)]
    return np.array([0, classes - 1, classes // 3, *seams, classes - 2])


def plan(logits, gradient):
    """(blocks that share a row, whether loss and gradient take one trip)."""
    return cuda.plan(tensor(logits, -1), None if gradient is None else tensor(gradient, -1), *DEVICE)[1:3]


def one_trip(logits, target, blocks, options=DEFAULT, reduction="mean", gradient=None):
    """The call and its gradient, made by clusters of so many blocks."""
    gradient = np.full_like(logits, np.nan) if gradient is None else gradient
    assert plan(logits, gradient) == (blocks, True)
    call = CudaCall(cuda, logits, target, options, reduction=reduction)
    call.forward(gradient)
    return call, gradient


def check(logits, target, blocks, options=DEFAULT, reduction="mean"):
    call, gradient = one_trip(logits, target, blocks, options, reduction)
    assert_cross_entropy_contract(call.loss, gradient, logits, target, options, reduction)
    return call, gradient


# ---- the kernel ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_cluster_keep_the_contract_in_memory_of_their_own_and_in_place(dtype, blocks, rng, order):
    logits = random_logits(blocks, dtype, rng)
    target = targets_at_the_seams(blocks, logits.shape[1], rng)
    fresh, gradient = check(logits, target, blocks)
    over, _ = one_trip(logits, target, blocks, gradient=logits)
    assert_same_bits(over.loss, fresh.loss)
    assert_same_bits(over.saved, fresh.saved)
    assert_same_bits(logits, gradient)


@pytest.mark.parametrize("options", [Options(), Options(softcap=20.0, label_smoothing=0.1, z_loss=1e-3)], ids=["plain", "full"])
def test_both_orders_of_threads_give_the_same_bits(options, blocks, rng, monkeypatch):
    logits = random_logits(blocks, "float32", rng)
    target = rng.integers(logits.shape[1], size=ROWS)
    forwards, gradient = one_trip(logits, target, blocks, options)
    monkeypatch.setenv("FASTLOSS_EMULATION_BACKWARDS", "1")
    backwards, other = one_trip(logits, target, blocks, options)
    assert_same_bits(backwards.loss, forwards.loss)
    assert_same_bits(backwards.saved, forwards.saved)
    assert_same_bits(other, gradient)


def test_loss_has_the_same_bits_whether_the_gradient_is_made_or_not(blocks, rng, order):
    logits = random_logits(blocks, "float32", rng)
    made, gradient = one_trip(logits, rng.integers(logits.shape[1], size=ROWS), blocks)
    without = CudaCall(cuda, logits, made.target, DEFAULT)
    without.forward(as_with_gradient=True)
    assert_same_bits(without.loss, made.loss)
    assert_same_bits(without.saved, made.saved)
    assert_same_bits(without.backward(np.full_like(logits, np.nan)), gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1, 7])
def test_rows_of_a_cluster_may_begin_anywhere(start, dtype, blocks, rng):
    classes = classes_of(blocks, dtype)
    base = rng.standard_normal((ROWS, classes + 8)).astype(DTYPES[dtype])
    room = np.full((ROWS, classes + 16), 5, DTYPES[dtype])
    logits, gradient = base[:, start : start + classes], room[:, 11 : 11 + classes]
    target = targets_at_the_seams(blocks, classes, rng)
    call, _ = one_trip(logits, target, blocks, gradient=gradient)
    assert_cross_entropy_contract(call.loss, gradient, logits, target)
    assert np.all(room[:, :11] == 5)
    assert np.all(room[:, 11 + classes :] == 5)


def test_rows_of_a_cluster_may_lie_along_several_axes(blocks, rng, monkeypatch):
    pretend(monkeypatch, 8 * blocks)  # which six rows fill
    classes = classes_of(blocks, "float32")
    logits = rng.standard_normal((2, 3, classes)).astype(np.float32).swapaxes(0, 1)
    gradient = np.full((3, 2, classes), np.nan, np.float32)
    target = rng.integers(classes, size=(3, 2))
    call, _ = one_trip(logits, target, blocks, gradient=gradient)
    flat = reference.as_rows(logits, -1)
    assert_cross_entropy_contract(call.loss, reference.as_rows(gradient, -1), flat, target.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(), Options(softcap=30.0)], ids=["plain", "full"])
def test_blocks_that_meet_only_minus_inf_are_finite(options, dtype, blocks, rng):
    logits = random_logits(blocks, dtype, rng)
    classes = logits.shape[1]
    part = classes // blocks
    logits[0, : classes - 5] = -INF
    logits[1, 5:] = -INF
    logits[2, part - 50 : classes - 50] = -INF
    logits[3, :] = -INF
    logits[3, classes // 2] = 1
    target = np.array([classes - 1, 2, classes - 3, classes // 2, 1, 2, 3])
    call, _ = check(logits, target, blocks, options, reduction="none")
    assert np.all(np.isfinite(call.loss))


@pytest.mark.parametrize("options", [Options(), Options(label_smoothing=0.1)], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_of_a_cluster_without_a_normaliser_is_nan_and_its_neighbours_are_not(dtype, options, blocks, rng):
    logits = random_logits(blocks, dtype, rng)
    logits[1, -1], logits[3, logits.shape[1] // 2], logits[5] = np.nan, INF, -INF
    call, gradient = one_trip(logits, rng.integers(logits.shape[1], size=ROWS), blocks, options, "none")
    wrong = np.isin(np.arange(ROWS), (1, 3, 5))
    np.testing.assert_array_equal(np.isnan(call.loss), wrong)
    assert np.all(np.isnan(reference.wide(gradient[wrong])))
    assert np.all(np.isfinite(reference.wide(gradient[~wrong])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_and_ids_out_of_range_are_for_all_blocks_of_a_cluster(dtype, blocks, rng):
    logits = random_logits(blocks, dtype, rng)
    classes = logits.shape[1]
    logits[1], logits[2, 17] = np.nan, INF
    target = np.array([5, -100, -100, classes, -1, classes - 1, 2**40])
    call, gradient = one_trip(logits, target, blocks, reduction="none")
    gradient = reference.wide(gradient)
    assert np.all(gradient[1:3] == 0)
    assert np.all(call.loss[1:3] == 0)
    assert np.all(call.saved[1:3] == 0)
    assert np.all(np.isnan(gradient[[3, 4, 6]]))
    assert np.all(np.isnan(call.loss[[3, 4, 6]]))
    counted = [0, 5]
    assert_cross_entropy_contract(
        call.loss[counted], gradient[counted].astype(logits.dtype), logits[counted], target[counted], reduction="none"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "reduction"), [("weight", "mean"), ("smoothing", "sum"), ("everything", "none")])
def test_options_keep_the_contract_in_a_cluster(name, reduction, dtype, blocks, rng):
    logits = random_logits(blocks, dtype, rng)
    classes = logits.shape[1]
    weight = aligned_weight(rng.uniform(0, 2, classes), logits)
    bias = aligned_weight(rng.standard_normal(classes), logits)
    options = {
        "weight": Options(weight=weight),
        "smoothing": Options(label_smoothing=0.1),
        "everything": Options(weight, -100, 0.1, 1e-3, 1.3, 10.0, bias),
    }[name]
    target = targets_at_the_seams(blocks, classes, rng).astype(np.int32)
    target[2] = -100
    check(logits, target, blocks, options, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets_keep_the_contract_in_a_cluster(dtype, blocks, rng):
    logits = random_logits(blocks, dtype, rng)
    target = rng.dirichlet(np.ones(logits.shape[1]), ROWS).astype(np.float32)
    check(logits, target, blocks, Options(label_smoothing=0.1, z_loss=1e-3))


def test_chunk_of_tokens_keeps_the_contract_in_a_cluster(blocks, rng, order):
    logits = random_logits(blocks, "float32", rng)
    target = targets_at_the_seams(blocks, logits.shape[1], rng)
    before = logits.copy()
    call = ChunkCall(cuda, logits, target, DEFAULT)
    assert plan(logits, logits) == (blocks, True)
    loss = call.forward(logits)
    assert_cross_entropy_contract(loss, logits, before, target)


# ---- the plan ----


def planned(monkeypatch, rows, classes, dtype, **gpu):
    pretend(monkeypatch, **{"multiprocessors": 132, **gpu})
    itemsize = DTYPES[dtype].itemsize
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, DTYPES[dtype]), (rows, classes), (classes * itemsize, itemsize))
    return plan(logits, logits)


@pytest.mark.parametrize(
    ("dtype", "classes", "blocks"),
    [
        ("float16", 32_000, 1),
        ("float16", 50_257, 2),
        ("float16", 128_256, 4),
        ("float16", 151_936, 5),
        ("float16", 262_144, 8),
        ("float32", 32_000, 2),
        ("float32", 128_256, 8),
        ("float32", 262_144, 8),  # one block a multiprocessor even so
    ],
)
def test_three_blocks_of_a_multiprocessor_have_room_for_their_rows(classes, dtype, blocks, monkeypatch):
    assert planned(monkeypatch, 8192, classes, dtype) == (blocks, True)


def test_rows_without_room_in_eight_blocks_take_two_trips(monkeypatch):
    assert planned(monkeypatch, 8192, 262_144, "float64") == (1, False)
    assert planned(monkeypatch, 8192, 262_144, "float32", shared_bytes=100 * 1024) == (1, False)


@pytest.mark.parametrize(("rows", "plan_of_rows"), [(1, None), (12, None), (13, 8), (24, 5), (25, 4), (98, 2), (99, 1)])
def test_rows_of_clusters_fill_the_gpu_or_are_split(rows, plan_of_rows, monkeypatch):
    parts, one_trip = planned(monkeypatch, rows, 262_144, "float16", shared_bytes=2**21)
    assert one_trip == (plan_of_rows is not None)
    assert parts > 8 if plan_of_rows is None else parts == plan_of_rows


def test_short_rows_and_small_gpus_have_smaller_clusters(monkeypatch):
    for multiprocessors, parts in ((64, 8), (63, 7), (32, 4), (31, None), (8, None)):
        plan_of_rows = planned(monkeypatch, 8192, 131_072, "float16", multiprocessors=multiprocessors, shared_bytes=80 * 1024)
        assert plan_of_rows == ((1, False) if parts is None else (parts, True))


def test_gpu_without_clusters_takes_a_block_a_row_or_two_trips(monkeypatch):
    assert planned(monkeypatch, 8192, 50_257, "float16", clusters=0) == (1, True)
    assert planned(monkeypatch, 8192, 262_144, "float16", clusters=0) == (1, False)
    parts, one_trip = planned(monkeypatch, 66, 50_257, "float16", clusters=0)
    assert parts > 1
    assert not one_trip


def test_loss_alone_has_no_clusters(monkeypatch):
    pretend(monkeypatch, 132)
    parts, one_trip = plan(np.zeros((16, 100_000), np.float32), None)
    assert parts > 8
    assert not one_trip


def test_classes_that_lie_apart_have_no_clusters(monkeypatch):
    pretend(monkeypatch, 132)
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (20_000, 20_000), (4, 80_000))
    assert plan(logits, logits) == (1, True)


@pytest.mark.parametrize(
    ("classes", "rows", "warps"), [(21, 2**19, 1), (150, 2**19, 2), (1000, 2**19, 8), (150, 2**13, 8), (21, 2**13, 2)]
)
def test_classes_that_lie_apart_are_shared_by_few_warps_unless_rows_are_few(classes, rows, warps, monkeypatch):
    pretend(monkeypatch, 132)
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (rows, classes), (4, 4 * rows))
    assert cuda.plan(tensor(logits, -1), None, *DEVICE)[0] == warps


# ---- rows one after the other ----


def turns_of(logits):
    return cuda.plan(tensor(logits, -1), tensor(logits, -1), *DEVICE)[3]


def check_turns(logits, target, blocks, options):
    """Loss and gradient against the oracle, and the same bits in place."""
    assert turns_of(logits) > 1
    target[target % 7 == 0] = -100
    call, gradient = check(logits, target, blocks, options)
    over, _ = one_trip(logits, target, blocks, options, gradient=logits)
    assert_same_bits(over.loss, call.loss)
    assert_same_bits(over.saved, call.saved)
    assert_same_bits(logits, gradient)


@pytest.mark.parametrize("options", [Options(), Options(softcap=20.0, label_smoothing=0.1)], ids=["plain", "full"])
@pytest.mark.parametrize("classes", [65, 2049, 16_500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_takes_rows_one_after_the_other(dtype, classes, options, rng, order, monkeypatch):
    pretend(monkeypatch, 1)
    warps = cuda.plan(*[tensor(np.zeros((1, classes), DTYPES[dtype]), -1)] * 2, *DEVICE)[0]
    rows = 50 * 8 // warps + 3  # so that the last block has fewer
    logits = (3 * rng.standard_normal((rows, classes))).astype(DTYPES[dtype])
    check_turns(logits, rng.integers(classes, size=rows), 1, options)


def test_a_cluster_takes_rows_one_after_the_other(rng, order, monkeypatch):
    pretend(monkeypatch, 16, shared_bytes=100 * 1024)
    rows, classes = 391, 16_500
    logits = (3 * rng.standard_normal((rows, classes + 1))).astype(np.float32)[:, 1:]
    check_turns(logits, rng.integers(classes, size=rows), 2, DEFAULT)
