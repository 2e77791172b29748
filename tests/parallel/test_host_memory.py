"""Freed memory on a CPU: glibc's settings, and who keeps them from being changed."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fedsim.parallel import host_memory
from fedsim.parallel.host_memory import SETTINGS, keep_freed_memory

PROGRAM = """
import resource, numpy
from fedsim.parallel.host_memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        arrays = [numpy.ones(1 << 20, dtype=numpy.uint8) for _ in range(8)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
assert keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What is set; nothing is."""
    for name in list(os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    found: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        found[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    return found


def test_settings_fit_what_the_library_takes(calls: dict[int, int]) -> None:
    """An int each; glibc refuses a larger threshold of mapping than half of a heap."""
    assert keep_freed_memory() and calls == SETTINGS
    assert all(0 < value < 1 << 31 for value in calls.values()) and calls[host_memory._MMAP_THRESHOLD] <= 1 << 25


def test_the_users_own_settings_stay(calls: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory() and not calls


@pytest.mark.parametrize("library", [SimpleNamespace(), OSError()])
def test_another_library_is_left_alone(calls: dict[int, int], monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    def load(_: None) -> Any:
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_pages_are_taken_again() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    if plain == 0:
        pytest.skip("the kernel does not count page faults")
    assert kept < plain / 10
