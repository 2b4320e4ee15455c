# SPDX-License-Identifier: Apache-2.0
"""Memory of large gradients: recycled once freed, never while in use, never more than was in use at one time."""

import ctypes
import gc
import itertools
import multiprocessing

import numpy as np
import pytest

import fastloss
from fastloss import _cpu
from helpers import assert_same_bits

HUGE_PAGE = 1 << 21
ROWS, CLASSES = 64, 32768  # 8 MiB of float32: four huge pages
BYTES = 4 * ROWS * CLASSES


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    fastloss.release_memory()
    yield
    gc.collect()
    fastloss.release_memory()


def gradient(rng, rows=ROWS, classes=CLASSES):
    logits = rng.standard_normal((rows, classes), dtype=np.float32)
    return fastloss.cross_entropy(logits, rng.integers(classes, size=rows), return_grad=True)[1]


def address(array):
    return array.__array_interface__["data"][0]


def test_next_gradient_lives_where_the_freed_one_did(rng):
    first = gradient(rng)
    place = address(first)
    del first
    assert address(gradient(rng)) == place


def test_gradients_in_use_keep_their_memory(rng):
    first = gradient(rng)
    copy = first.copy()
    second = gradient(rng)
    assert not np.shares_memory(first, second)
    assert_same_bits(first, copy)


def test_a_view_keeps_the_memory_in_use(rng):
    view = gradient(rng)[1:3]
    copy = view.copy()
    gradient(rng)
    assert_same_bits(view, copy)


def test_results_are_the_same_in_recycled_memory(rng):
    logits, target = rng.standard_normal((ROWS, CLASSES), dtype=np.float32), rng.integers(CLASSES, size=ROWS)
    first = fastloss.cross_entropy(logits, target, return_grad=True)[1].copy()
    for _ in range(3):
        assert_same_bits(fastloss.cross_entropy(logits, target, return_grad=True)[1], first)


def test_kept_and_used_never_exceed_what_was_in_use_at_once():
    blocks = [_cpu.RecycledBlock(2 * HUGE_PAGE) for _ in range(3)]
    between = blocks.pop(1)
    del blocks
    larger = _cpu.RecycledBlock(3 * HUGE_PAGE)  # neither serves, and of the 6 pages that were in use at once 5 are again
    assert fastloss.release_memory() == 0
    del larger, between
    assert fastloss.release_memory() == 5 * HUGE_PAGE


def test_small_blocks_live_in_a_large_one_that_was_freed_which_is_whole_again_after_them():
    large = _cpu.RecycledBlock(8 * HUGE_PAGE)
    place = address(np.asarray(large))
    del large
    for order in itertools.permutations(range(3)):
        small = {i: _cpu.RecycledBlock((i + 1) * HUGE_PAGE) for i in range(3)}
        places = sorted((address(np.asarray(block)), (i + 1) * HUGE_PAGE) for i, block in small.items())
        assert places[0][0] == place
        assert all(start + size <= behind for (start, size), (behind, _) in itertools.pairwise(places))
        assert places[-1][0] + places[-1][1] <= place + 8 * HUGE_PAGE
        for i in order:
            del small[i]
        large = _cpu.RecycledBlock(8 * HUGE_PAGE)
        assert address(np.asarray(large)) == place
        del large
    assert fastloss.release_memory() == 8 * HUGE_PAGE


def test_a_block_in_use_parts_what_is_kept():
    large = _cpu.RecycledBlock(6 * HUGE_PAGE)
    place = address(np.asarray(large))
    del large
    first, second, third = (_cpu.RecycledBlock(2 * HUGE_PAGE) for _ in range(3))
    del first, third
    assert address(np.asarray(_cpu.RecycledBlock(4 * HUGE_PAGE))) != place
    del second


def test_memory_that_the_system_took_back_is_new_and_the_rest_stays():
    block = _cpu.RecycledBlock(6 * HUGE_PAGE)
    memory = np.asarray(block)
    memory[:] = 7
    place = address(memory)
    del block, memory
    dontneed = 4  # the pages go at once, as the system takes kept ones when it runs short
    taken = slice(2 * HUGE_PAGE + 4096, 3 * HUGE_PAGE + 8192)
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(place + taken.start), taken.stop - taken.start, dontneed) == 0
    memory = np.asarray(_cpu.RecycledBlock(5 * HUGE_PAGE))
    assert address(memory) == place
    assert set(memory[2 * HUGE_PAGE : 4 * HUGE_PAGE]) == {0}  # whole huge pages are new
    assert set(memory[: 2 * HUGE_PAGE]) == set(memory[4 * HUGE_PAGE :]) == {7}
    memory[:] = 1


def test_release_returns_what_was_kept_and_leaves_gradients_alone(rng):
    first, second = gradient(rng), gradient(rng)
    copy = first.copy()
    del second
    assert fastloss.release_memory() == BYTES
    assert fastloss.release_memory() == 0
    assert_same_bits(first, copy)


def test_small_gradients_are_left_to_the_allocator(rng):
    gradient(rng, 4, 1000)
    assert fastloss.release_memory() == 0


def test_too_much_is_a_memory_error():
    with pytest.raises(MemoryError):
        _cpu.RecycledBlock(1 << 60)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_gradient_has_the_memory_order_of_the_logits(rng, order):
    logits = rng.standard_normal((64, 256, 128), dtype=np.float32).transpose(order)
    grad = fastloss.cross_entropy(logits, rng.integers(logits.shape[1], size=logits.shape[::2]), return_grad=True)[1]
    assert grad.strides == np.empty_like(logits).strides


def compute(seed):
    return gradient(np.random.default_rng(seed)).sum(dtype=np.float64)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_has_memory_of_its_own(rng):
    kept = gradient(rng)
    copy = kept.copy()
    freed = gradient(rng)
    del freed
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(compute, range(4)).get(timeout=60)
    assert found == [compute(seed) for seed in range(4)]
    assert_same_bits(kept, copy)


def test_pytorch_recycles_and_keeps_memory_order():
    torch = pytest.importorskip("torch")
    fl = pytest.importorskip("fastloss.torch")
    for shape, order in [((64, 32768), (0, 1)), ((8, 64, 8192), (0, 2, 1))]:
        logits = torch.randn(shape).permute(order).requires_grad_()
        target = torch.zeros(logits[:, 0].shape, dtype=torch.int64)
        for dtype in (torch.float32, torch.bfloat16):
            x = logits.detach().to(dtype).requires_grad_()
            fl.cross_entropy(x, target).backward()
            place, first = x.grad.data_ptr(), x.grad.clone()
            assert x.grad.stride() == torch.empty_like(x).stride()
            x.grad = None
            fl.cross_entropy(x, target).backward()
            assert x.grad.data_ptr() == place
            assert torch.equal(x.grad, first)
            x.grad = None
