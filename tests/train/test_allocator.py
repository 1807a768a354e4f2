"""The allocator's settings, that the process goes on under its own id with its own arguments, and what they do."""

import os
import subprocess
import sys

import pytest

from moe_zoo.cli import allocator

_CODE = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:], flush=True)
from moe_zoo.cli import allocator
allocator.use()
"""
_OURS = "glibc.malloc.hugetlb=1"
_FREED = """
import ctypes
from pathlib import Path
import jax
from moe_zoo.cli import allocator
allocator.give_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(100_000) for _ in range(2_000)]
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1]:  # the last one stays, and keeps the heap as long as it is
    libc.free(piece)
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
jax.jit(lambda x: x + 1)(1.0)
print(before - resident())
"""


def test_the_settings_are_added_once():
    new = allocator.environment({"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=0"})
    if new is None:
        pytest.skip("no glibc of 2.35, or a kernel without huge pages")
    assert new == {"A": "1", "GLIBC_TUNABLES": f"glibc.malloc.check=0:{_OURS}"}
    assert allocator.environment(new) is None
    assert allocator.environment({})["GLIBC_TUNABLES"] == _OURS


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.environment({}) is None


def test_the_process_starts_again_under_its_id_with_its_arguments():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    expect_two = allocator.environment(environment) is not None
    command = [sys.executable, "-c", _CODE, "--flag", "two words"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == (2 if expect_two else 1)
    assert len({line.split()[0] for line in out}) == 1
    assert all(line.endswith("['--flag', 'two words']") for line in out)
    assert not expect_two or _OURS in out[1]


def test_what_was_freed_goes_back_when_a_program_is_compiled():
    """200 MB in pieces that are too small to be mapped one by one."""
    environment = allocator.environment({k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"})
    if environment is None:
        pytest.skip("no glibc of 2.35, or a kernel without huge pages")
    done = subprocess.run([sys.executable, "-c", _FREED], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000
