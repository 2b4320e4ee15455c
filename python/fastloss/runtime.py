# SPDX-License-Identifier: Apache-2.0
"""What the library runs on: instruction set, threads, build."""

from __future__ import annotations

from fastloss import _cpu, _options


def isa() -> str:
    """Returns the instruction set in use.

    It is the best one that this CPU runs, or the one that the environment variable `FASTLOSS_ISA` names when fastloss
    is imported. Results have the same bits on all of them.

    Example:
        >>> import fastloss
        >>> fastloss.isa() in fastloss.available_isas()
        True
    """
    return _cpu.isa()


def available_isas() -> list[str]:
    """Returns the instruction sets that this build has and this CPU runs, the plainest first.

    Example:
        >>> import fastloss
        >>> fastloss.available_isas()[0]
        'scalar'
    """
    return _cpu.available_isas()


def set_num_threads(n: int | None) -> None:
    """Sets the number of threads that one call may use; results do not depend on it.

    The start value comes from the environment variable `FASTLOSS_NUM_THREADS`; without it, it is the number of CPUs, or
    that of PyTorch's threads once `fastloss.torch` is imported and work runs on them.

    Args:
        n: from 1 to 1024; None for the start value again.

    Raises:
        TypeError: n is neither an int nor None.
        ValueError: n is out of range.

    Example:
        >>> import fastloss
        >>> fastloss.set_num_threads(1)
        >>> fastloss.get_num_threads()
        1
        >>> fastloss.set_num_threads(None)
    """
    if n is None:
        _cpu.set_num_threads(0)
        return
    threads = _options.index("n", n)
    if not 1 <= threads <= _cpu.MOST_THREADS:
        raise ValueError(f"n must lie in [1, {_cpu.MOST_THREADS}], got {threads}")
    _cpu.set_num_threads(threads)


def get_num_threads() -> int:
    """Returns the number of threads that one call may use.

    Example:
        >>> import fastloss
        >>> fastloss.get_num_threads() >= 1
        True
    """
    return _cpu.get_num_threads()


def build_info() -> dict[str, str]:
    """Returns how this copy was built: version, compiler, flags, and for which GPUs, or "no" where it has no CUDA kernels.

    Example:
        >>> import fastloss
        >>> fastloss.build_info()["version"] == fastloss.__version__
        True
    """
    return _cpu.build_info()


def release_memory() -> int:
    """Gives the memory that is kept for future gradients back to the system.

    A gradient of 4 MiB or more lives in memory of its own, which stays mapped after it was freed, for the next gradients: the
    system clears a page at its first touch, which takes longer than computing what goes there. The system may take kept pages
    whenever it runs short of memory, and kept memory and gradients in use never hold more together than the gradients in use
    once did. Until the system takes them, kept pages count as resident.

    Returns:
        The number of bytes given back. Gradients in use are left alone.

    Example:
        >>> import fastloss
        >>> fastloss.release_memory() >= 0
        True
        >>> fastloss.release_memory()
        0
    """
    return _cpu.release_recycled()
