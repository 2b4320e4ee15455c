# SPDX-License-Identifier: Apache-2.0
"""No byte is touched outside the arrays: they end at a page that may not be read, begin behind one, and start misaligned.

A wrong access ends the process by a signal, and with it the run of the tests.
"""

import ctypes
import mmap

import numpy as np
import pytest

import binding
from fastloss import _cpu
from helpers import AWKWARD_LENGTHS, DTYPES, accumulation, assert_same_bits
from reference import Options

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, 3
libc = ctypes.CDLL(None, use_errno=True)


class GuardedMemory:
    """Readable and writable pages between two that are neither."""

    def __init__(self, nbytes):
        self.pages = -(-nbytes // PAGE)
        self.memory = mmap.mmap(-1, (self.pages + 2) * PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.guards = (self.bytes.ctypes.data, self.bytes.ctypes.data + (self.pages + 1) * PAGE)
        for guard in self.guards:
            self.protect(guard, PROT_NONE)

    def protect(self, page, mode):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), mode):
            raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, array, where):
        """A copy of the array that ends at the guard behind, begins at the one before, or starts one element off."""
        inside = self.bytes[PAGE : (self.pages + 1) * PAGE]
        start = {"end": len(inside) - array.nbytes, "start": 0, "misaligned": array.itemsize}[where]
        copy = inside[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def release(self):
        for guard in self.guards:
            self.protect(guard, PROT_READ_WRITE)


@pytest.fixture
def guarded():
    """A function that copies an array to a place at a guard page."""
    areas = []

    def place(array, where):
        area = GuardedMemory(array.nbytes + array.itemsize)
        areas.append(area)
        return area.place(array, where)

    yield place
    for area in areas:
        area.release()


def test_the_guard_page_ends_a_process_that_reads_it():
    from helpers import run_python

    done = run_python(
        "import numpy as np, test_ends_of_memory as t\n"
        "x = t.GuardedMemory(8).place(np.zeros(2, np.float32), 'end')\n"
        "print(np.lib.stride_tricks.as_strided(x, (3,), (4,))[2])"
    )
    assert done.returncode < 0
    assert done.stdout == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["end", "start", "misaligned"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_cross_entropy_stays_within_its_arrays(soft, where, dtype, isa, guarded, rng):
    for classes in AWKWARD_LENGTHS:
        logits = rng.standard_normal((3, classes)).astype(DTYPES[dtype])
        acc = accumulation(logits.dtype)
        target = rng.random((3, classes)).astype(DTYPES[dtype]) if soft else rng.integers(classes, size=3)
        weight, bias = (rng.uniform(0.5, 2, classes).astype(acc) for _ in range(2))
        options = Options(weight=weight, bias=bias, label_smoothing=0.1, softcap=20.0)
        expected = np.zeros_like(logits)
        loss = binding.Call(logits, target, options, reduction="none").forward(expected)

        placed = options._replace(weight=guarded(weight, where), bias=guarded(bias, where))
        gradient = guarded(np.zeros_like(logits), where)
        call = binding.Call(guarded(logits, where), guarded(target, where), placed, reduction="none")
        call.loss = guarded(call.loss, where)
        call.saved = guarded(call.saved, where)
        assert_same_bits(call.forward(gradient), loss)
        assert_same_bits(gradient, expected)
        gradient[...] = 0
        assert_same_bits(call.backward(gradient, np.ones(3)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["end", "start", "misaligned"])
def test_in_place_gradient_of_plain_logits_stays_within_them(where, dtype, isa, guarded, rng):
    for classes in AWKWARD_LENGTHS:
        logits = rng.standard_normal((2, classes)).astype(DTYPES[dtype])
        target = rng.integers(classes, size=2)
        expected = np.zeros_like(logits)
        binding.Call(logits, target, Options()).forward(expected)
        placed = guarded(logits, where)
        binding.Call(placed, target, Options()).forward(placed)
        assert_same_bits(placed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["end", "start"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 70, 65), (3, 4097, 2)], ids=str)
def test_class_axis_in_the_middle_stays_within_its_array(shape, where, dtype, isa, guarded, rng):
    logits = rng.standard_normal(shape).astype(DTYPES[dtype])
    target = rng.integers(shape[1], size=(shape[0], shape[2]))
    expected = np.zeros_like(logits)
    binding.Call(logits, target, Options(), axis=1).forward(expected)
    placed, gradient = guarded(logits, where), guarded(np.zeros_like(logits), where)
    binding.Call(placed, target, Options(), axis=1).forward(gradient)
    assert_same_bits(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["end", "start", "misaligned"])
def test_statistics_stay_within_their_arrays(where, dtype, isa, guarded, rng):
    for classes in AWKWARD_LENGTHS:
        logits = guarded(rng.standard_normal((2, classes)).astype(DTYPES[dtype]), where)
        acc = accumulation(logits.dtype)
        ids = guarded(rng.integers(classes, size=(2, 3)), where)
        out = [guarded(np.zeros((2, 3), acc), where)]
        out += [guarded(np.zeros(2, acc), where) for _ in range(5)]
        out += [guarded(np.zeros(2, np.int64), where), guarded(np.zeros((2, 3), np.int64), where)]
        pointers = tuple(array.ctypes.data for array in out)
        _cpu.statistics(binding.tensor(logits, 1), (ids.ctypes.data, 8), 3, (1.0, 0.0, 0), pointers, 0)
        assert np.all(out[0] <= 0)
        np.testing.assert_array_equal(out[6], np.argmax(logits.astype(np.float64), axis=1))


def test_bytes_between_the_rows_are_untouched_by_an_in_place_gradient(isa, rng):
    for classes in (1, 17, 64, 100, 4097):
        wide = rng.standard_normal((4, classes + 9)).astype(np.float32)
        before = wide.copy()
        rows = wide[:, 4 : 4 + classes]
        binding.Call(rows, rng.integers(classes, size=4), Options()).forward(rows)
        np.testing.assert_array_equal(wide[:, :4], before[:, :4])
        np.testing.assert_array_equal(wide[:, 4 + classes :], before[:, 4 + classes :])


@pytest.mark.parametrize("where", ["start", "end", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (13, 70, 33), (6, 64, 100), (5, 129, 64)], ids=str)
def test_products_that_make_logits(shape, dtype, where, guarded, rng, isa):
    tokens, classes, features = shape
    dtype = DTYPES[dtype]
    hidden, bias = (rng.standard_normal(n).astype(accumulation(dtype)) for n in ((tokens, features), classes))
    weight = rng.standard_normal((classes, features)).astype(dtype)
    out = np.zeros((tokens, classes), dtype)
    results = []
    for h, w, b, o in ((hidden, weight, bias, out), [guarded(array, where) for array in (hidden, weight, bias, out)]):
        _cpu.ordered_product(binding.tensor(h, 1), binding.tensor(w, 1), b.ctypes.data, binding.tensor(o, 1))
        results.append(o.copy())
    assert_same_bits(*results)


@pytest.mark.parametrize("where", ["start", "end", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=["none", "left", "right"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (13, 70, 33), (6, 64, 100), (5, 129, 64), (7, 1500, 3)], ids=str)
def test_products_that_make_gradients(shape, transposed, dtype, where, guarded, rng, isa):
    rows, depth, columns = shape
    dtype = DTYPES[dtype]
    left = rng.standard_normal((depth, rows) if transposed[0] else (rows, depth)).astype(dtype)
    right = rng.standard_normal((columns, depth) if transposed[1] else (depth, columns)).astype(dtype)
    out = np.ones((rows, columns), accumulation(dtype))
    results = []
    for a, b, o in ((left, right, out), [guarded(array, where) for array in (left, right, out)]):
        factors = [binding.tensor(f.T if turned else f, 1) for f, turned in zip((a, b), transposed, strict=True)]
        _cpu.add_product(*factors, True, binding.tensor(o, 1))
        added = o.copy()
        _cpu.product(*factors, binding.tensor(o, 1))
        results.append((added, o.copy()))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
