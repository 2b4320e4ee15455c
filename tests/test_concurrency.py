# SPDX-License-Identifier: Apache-2.0
"""Processes that fork, threads that call at once, and interrupts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastloss
from helpers import assert_same_bits, run_python

# Python 3.12 warns of a fork in a process with threads; that is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")

ROWS, CLASSES = 64, 20000


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, CLASSES)).astype(np.float32), rng.integers(CLASSES, size=ROWS)


@pytest.fixture
def expected(problem, set_threads):
    set_threads(3)
    return fastloss.cross_entropy(*problem, return_grad=True)


def assert_result(result, expected):
    for one, other in zip(result, expected, strict=True):
        assert_same_bits(one, other)


def compute(problem):
    return fastloss.cross_entropy(*problem, return_grad=True)


def test_fork_after_use_computes_the_same(problem, expected):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for result in pool.map_async(compute, [problem] * 4).get(timeout=60):
            assert_result(result, expected)


def test_parent_computes_the_same_after_a_fork(problem, expected):
    process = multiprocessing.get_context("fork").Process(target=compute, args=(problem,))
    process.start()
    assert_result(compute(problem), expected)
    process.join(60)
    assert process.exitcode == 0
    assert_result(compute(problem), expected)


def compute_in_a_grandchild(problem, queue):
    compute(problem)
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(compute(problem)[0]))
    child.start()
    child.join(60)


def test_fork_of_a_fork_computes_the_same(problem, expected):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=compute_in_a_grandchild, args=(problem, queue))
    process.start()
    assert_same_bits(queue.get(timeout=60), expected[0])
    process.join(60)


def test_fork_while_another_thread_computes_does_not_hang(problem, expected):
    stop = threading.Event()

    def keep_computing():
        while not stop.is_set():
            compute(problem)

    thread = threading.Thread(target=keep_computing)
    thread.start()
    try:
        for _ in range(5):
            process = multiprocessing.get_context("fork").Process(target=compute, args=(problem,))
            process.start()
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        thread.join()


def test_spawned_process_computes_the_same():
    code = (
        "import test_concurrency as t, multiprocessing, numpy as np\n"
        "if __name__ == '__main__':\n"
        "    rng = np.random.default_rng(0)\n"
        "    p = rng.standard_normal((8, 9000)).astype('f4'), rng.integers(9000, size=8)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(t.compute, (p,))[0] == t.compute(p)[0])\n"
    )
    done = run_python(code)
    assert done.stdout.strip() == "True", done.stderr


OWN_POOL = """
import multiprocessing, sys
import numpy as np, fastloss, test_concurrency as t
assert "torch" not in sys.modules
fastloss.set_num_threads(3)
rng = np.random.default_rng(0)
problem = rng.standard_normal((64, 20000)).astype("f4"), rng.integers(20000, size=64)
expected = t.compute(problem)
with multiprocessing.get_context("fork").Pool(2) as pool:
    for result in pool.map_async(t.compute, [problem] * 4).get(timeout=60):
        t.assert_result(result, expected)
t.assert_result(t.compute(problem), expected)
print("same")
"""


def test_fork_after_use_of_the_own_pool_computes_the_same():
    done = run_python(OWN_POOL)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("callers", [2, 8])
def test_concurrent_calls_from_python_threads_compute_the_same(callers, problem, expected):
    with ThreadPoolExecutor(callers) as executor:
        for result in executor.map(lambda _: compute(problem), range(4 * callers)):
            assert_result(result, expected)


def test_concurrent_calls_of_different_sizes_compute_the_same(set_threads):
    set_threads(3)
    rng = np.random.default_rng(1)
    shapes = [(1, 100000), (300, 70), (2, 40000), (17, 4097), (1000, 10)]
    problems = [(rng.standard_normal(s).astype(np.float32), rng.integers(s[1], size=s[0])) for s in shapes]
    alone = [compute(problem) for problem in problems]
    with ThreadPoolExecutor(5) as executor:
        for i, result in enumerate(executor.map(compute, problems * 10)):
            assert_result(result, alone[i % 5])


def test_threads_may_be_changed_while_another_thread_computes(problem, expected, set_threads):
    with ThreadPoolExecutor(1) as executor:
        results = executor.map(lambda _: compute(problem), range(20))
        for i in range(200):
            fastloss.set_num_threads(1 + i % 7)
        for result in results:
            assert_result(result, expected)


def test_the_gil_is_released_while_it_computes(problem):
    ticks = []
    computing = threading.Event()

    def tick():
        computing.wait()
        while computing.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    logits = np.broadcast_to(problem[0][:1], (20000, CLASSES))
    target = np.zeros(20000, np.int64)
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    computing.set()
    fastloss.cross_entropy(logits, target)
    end = time.perf_counter()
    computing.clear()
    thread.join()
    # With the GIL held the other thread would wait from the start to the end.
    assert any(start + 0.2 * (end - start) < at < start + 0.8 * (end - start) for at in ticks)


INTERRUPTED = """
import signal
import numpy as np, fastloss
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits a deaf ear
logits = np.broadcast_to(np.zeros((1, 20000), "f4"), (5000, 20000))
target = np.zeros(5000, np.int64)
fastloss.cross_entropy(logits, target)
print("ready", flush=True)
try:
    while True:
        fastloss.cross_entropy(logits, target)
except KeyboardInterrupt:
    print("interrupted", float(fastloss.cross_entropy(logits[:100], target[:100])), flush=True)
"""


def test_keyboard_interrupt_is_raised_and_the_next_call_works():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(Path(__file__).parent), *sys.path) if p)}
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline().strip() == "ready"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        line = process.stdout.readline().split()
        assert process.wait(30) == 0
    assert line[0] == "interrupted"
    assert float(line[1]) == pytest.approx(np.log(20000), rel=2.0**-22)


def test_process_with_idle_workers_ends_at_once():
    done = run_python(
        "import numpy as np, fastloss\n"
        "fastloss.set_num_threads(4)\n"
        "fastloss.cross_entropy(np.zeros((100, 20000), 'f4'), np.zeros(100, int))\n",
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_exception_in_one_thread_leaves_the_others_alone(problem, expected):
    logits, target = problem
    wrong = target.copy()
    wrong[ROWS // 2] = CLASSES

    def call(i):
        if i % 2:
            with pytest.raises(IndexError):
                compute((logits, wrong))
            return None
        return compute(problem)

    with ThreadPoolExecutor(4) as executor:
        for result in executor.map(call, range(12)):
            if result is not None:
                assert_result(result, expected)


# What sampling keeps of 256 tokens at this threshold, nearly everything, is more than may be had, and threads collect it.
OUT_OF_MEMORY = """
import resource, numpy as np, fastloss
fastloss.set_num_threads(3)
hidden, weight = np.ones((256, 8), np.float32), np.zeros((200_000, 8), np.float32)
def run(tokens):
    fastloss.linear_cross_entropy(
        hidden[:tokens], weight, np.arange(tokens), return_grad=True, backward="sampled", threshold=1e-7, chunk_tokens=64)
run(4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (450 << 20),) * 2)
try:
    run(256)
except MemoryError:
    print("MemoryError")
run(4)
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer takes all addresses")
def test_out_of_memory_in_a_thread_raises():
    done = run_python(OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MemoryError\n"
