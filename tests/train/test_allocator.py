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
_OURS = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
_FAULTS = """
import resource
import jax, jax.numpy as jnp
from moe_zoo.cli import allocator
allocator.keep_memory()
step = jax.jit(lambda x: x + 1)
x = jnp.ones((1 << 24,))
for _ in range(20):  # the last result may still be there when the next one is made
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_the_settings_are_added_once():
    new = allocator.environment({"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=0"})
    if new is None:
        pytest.skip("no glibc of 2.35, or a kernel without huge pages")
    assert new == {"A": "1", "GLIBC_TUNABLES": f"glibc.malloc.check=0:{_OURS}"}
    assert allocator.environment(new) is None
    assert allocator.environment({})["GLIBC_TUNABLES"] == _OURS
    assert allocator.environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"})["GLIBC_TUNABLES"] == (
        "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"
    )


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


def test_a_program_finds_its_memory_again():
    """64 MB, five times: mapped anew, that is at least 32 huge pages each time."""
    environment = allocator.environment({k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"})
    if environment is None:
        pytest.skip("no glibc of 2.35, or a kernel without huge pages")
    done = subprocess.run([sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 32
