# SPDX-License-Identifier: Apache-2.0
"""Instruction sets, threads, environment variables, build facts, and what an import does."""

import platform
import sysconfig

import pytest

import fastloss
from helpers import run_python


def test_scalar_is_always_available():
    assert fastloss.available_isas()[0] == "scalar"


def test_isa_is_one_of_the_available_ones():
    assert fastloss.isa() in fastloss.available_isas()


def cpu_flags():
    with open("/proc/cpuinfo") as cpuinfo:
        return next(set(line.split(":")[1].split()) for line in cpuinfo if line.startswith(("flags", "Features")))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("avx2", {"avx2", "fma", "f16c"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx512bf16", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    ],
)
def test_isa_is_available_exactly_where_the_cpu_has_it(name, needed):
    assert (name in fastloss.available_isas()) == (needed <= cpu_flags())


@pytest.mark.parametrize("name", fastloss.available_isas())
def test_environment_chooses_the_isa(name):
    done = run_python("import fastloss; print(fastloss.isa())", FASTLOSS_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_empty_environment_chooses_the_best_isa():
    done = run_python("import fastloss; print(fastloss.isa(), fastloss.available_isas()[-1])", FASTLOSS_ISA="")
    chosen, best = done.stdout.split()
    assert chosen == best


@pytest.mark.parametrize("name", ["sse2", "AVX512", "scalar ", "0"])
def test_unknown_isa_in_the_environment_fails_the_import_and_names_the_known(name):
    done = run_python("import fastloss", FASTLOSS_ISA=name)
    assert done.returncode == 1
    for word in ("FASTLOSS_ISA", name, "scalar", "avx2", "avx512", "avx512bf16", "neon"):
        assert word in done.stderr


def test_isa_of_another_cpu_in_the_environment_fails_the_import():
    name = "neon" if platform.machine() == "x86_64" else "avx2"
    done = run_python("import fastloss", FASTLOSS_ISA=name)
    assert done.returncode == 1
    for word in ("FASTLOSS_ISA", name, "not available"):
        assert word in done.stderr


def test_number_of_threads_is_the_one_that_was_set(set_threads):
    for number in (1, 5, 2):
        set_threads(number)
        assert fastloss.get_num_threads() == number


def test_number_of_threads_can_be_left_to_its_start_value_again(set_threads):
    set_threads(None)
    start = fastloss.get_num_threads()
    set_threads(start + 1)
    set_threads(None)
    assert fastloss.get_num_threads() == start


@pytest.mark.parametrize(
    ("number", "error"),
    [(0, ValueError), (-1, ValueError), (1025, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)],
)
def test_bad_number_of_threads_raises_and_changes_nothing(number, error):
    before = fastloss.get_num_threads()
    with pytest.raises(error, match="n must"):
        fastloss.set_num_threads(number)
    assert fastloss.get_num_threads() == before


def test_environment_sets_the_number_of_threads():
    done = run_python("import fastloss; print(fastloss.get_num_threads())", FASTLOSS_NUM_THREADS="5")
    assert done.stdout.strip() == "5", done.stderr


@pytest.mark.parametrize("text", ["0", "-1", "+3", " 3", "3 ", "2.0", "two", "0x4", "1025", "99999999999999999999"])
def test_bad_number_of_threads_in_the_environment_fails_the_import(text):
    done = run_python("import fastloss", FASTLOSS_NUM_THREADS=text)
    assert done.returncode == 1
    assert f"FASTLOSS_NUM_THREADS = '{text}' is not a number of threads: expected 1 to 1024" in done.stderr


def test_number_of_threads_goes_up_to_1024(set_threads):
    set_threads(1024)
    assert fastloss.get_num_threads() == 1024
    done = run_python("import fastloss; print(fastloss.get_num_threads())", FASTLOSS_NUM_THREADS="1024")
    assert done.stdout.strip() == "1024", done.stderr


def test_number_of_threads_is_that_of_the_cpus_by_default():
    done = run_python("import fastloss, os; print(fastloss.get_num_threads() - len(os.sched_getaffinity(0)))")
    assert done.stdout.strip() == "0", done.stderr


def test_number_of_threads_follows_pytorch_once_it_is_used():
    pytest.importorskip("torch")
    done = run_python(
        "import torch, fastloss.torch\nfor n in (1, 3):\n    torch.set_num_threads(n)\n    print(fastloss.get_num_threads())"
    )
    assert done.stdout.split() == ["1", "3"], done.stderr


def test_build_info_has_version_compiler_and_flags_as_text():
    info = fastloss.build_info()
    assert {"version", "compiler", "flags"} <= set(info)
    assert all(isinstance(value, str) and value for value in info.values())
    assert info["version"] == fastloss.__version__


def test_products_are_not_fused_behind_the_formulas_back():
    assert "-ffp-contract=off" in fastloss.build_info()["flags"]


def test_python_m_fastloss_prints_the_facts_and_checks_itself():
    done = run_python(None, "-m", "fastloss")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (fastloss.__version__, *fastloss.available_isas(), "threads", "float64"):
        assert word in done.stdout


@pytest.mark.parametrize("module", ["torch", "ml_dtypes", "scipy", "jax"])
def test_import_brings_in_no_optional_package(module):
    done = run_python(f"import fastloss, sys; print({module!r} in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_a_call_brings_in_no_optional_package():
    done = run_python(
        "import fastloss, numpy, sys\n"
        "fastloss.cross_entropy(numpy.zeros((2, 3), 'f4'), [0, 1], return_grad=True)\n"
        "print([m for m in ('torch', 'ml_dtypes') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_import_of_the_pytorch_api_without_pytorch_names_the_extra():
    done = run_python("import sys; sys.modules['torch'] = None; import fastloss.torch")
    assert done.returncode == 1
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
    assert "fastloss[torch]" in done.stderr


def test_import_starts_no_threads():
    done = run_python("import fastloss, os; print(len(os.listdir('/proc/self/task')))", OPENBLAS_NUM_THREADS="1")
    assert done.stdout.strip() == "1", done.stderr


def test_small_calls_start_no_threads():
    done = run_python(
        "import fastloss, numpy, os\n"
        "fastloss.set_num_threads(4)\n"
        "fastloss.cross_entropy(numpy.zeros((8, 10), 'f4'), numpy.zeros(8, int), return_grad=True)\n"
        "print(len(os.listdir('/proc/self/task')))",
        OPENBLAS_NUM_THREADS="1",
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python")
def test_import_keeps_the_gil_off_in_free_threaded_python():
    done = run_python("import fastloss, sys; print(sys._is_gil_enabled())", PYTHON_GIL="")
    assert done.stdout.strip() == "False", done.stderr


def test_every_public_name_is_there_and_documented():
    assert {"cross_entropy", "logit_stats", "isa", "available_isas", "build_info"} <= set(fastloss.__all__)
    assert {"set_num_threads", "get_num_threads"} <= set(fastloss.__all__)
    for name in fastloss.__all__:
        assert getattr(fastloss, name).__doc__.strip()
