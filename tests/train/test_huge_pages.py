"""The setting for huge pages, and that the process goes on under its own id with its own arguments."""

import os
import subprocess
import sys

import pytest

from moe_zoo.cli import huge_pages

_CODE = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:], flush=True)
from moe_zoo.cli import huge_pages
huge_pages.use()
"""


def test_the_setting_is_added_once():
    new = huge_pages.environment({"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=0"})
    if new is None:
        pytest.skip("no glibc of 2.35, or a kernel without huge pages")
    assert new == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1"}
    assert huge_pages.environment(new) is None
    assert huge_pages.environment({})["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.environment({}) is None


def test_the_process_starts_again_under_its_id_with_its_arguments():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    expect_two = huge_pages.environment(environment) is not None
    command = [sys.executable, "-c", _CODE, "--flag", "two words"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == (2 if expect_two else 1)
    assert len({line.split()[0] for line in out}) == 1
    assert all(line.endswith("['--flag', 'two words']") for line in out)
    assert not expect_two or "glibc.malloc.hugetlb=1" in out[1]
