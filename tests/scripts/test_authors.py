"""The comparison with the authors' code: what is missing is skipped, what differs fails. Their code is not needed."""

import importlib
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def authors():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("authors")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def repo(tmp_path):
    """A checkout with one committed file and a change that is not committed."""
    path = tmp_path / "owner+name"
    path.mkdir()
    git = lambda *command: subprocess.run(["git", "-C", str(path), *command], check=True, capture_output=True)
    git("init", "-q")
    source = "import nowhere\n\ndef f(x: Absent):\n    return factor * x\n\nif x > 1:\n    log.append(x)\n"
    (path / "a.py").write_text(source)
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "commit", "-qm", "a")
    (path / "a.py").write_text("def f(x):\n    return 0\n")
    return tmp_path


def test_only_what_is_named_runs_and_as_committed(authors, repo):
    checkout, log = authors.Checkout(repo, "owner/name"), []
    assert checkout.run("a.py", "f", factor=3).f(2) == 6
    checkout.run("a.py", "x > 1", x=2, log=log)
    assert log == [2]
    with pytest.raises(authors.Missing, match="has no g"):
        checkout.run("a.py", "g")
    with pytest.raises(authors.Missing, match="no checkout of other/name"):
        authors.Checkout(repo / "owner+name", "other/name")


@pytest.mark.parametrize("figures,line,good", [
    ({"gates": 1e-7, "choices": 0}, "gates 1.0e-07, choices 0", True),
    ({"gates": 1e-3, "choices": 1}, "gates 1.0e-03 !, choices 1 !", False),
    ({"gates": float("nan")}, "gates nan !", False),
])  # fmt: skip
def test_a_difference_is_marked_and_fails(authors, repo, monkeypatch, capsys, figures, line, good):
    monkeypatch.setattr(authors, "torch", authors.torch or object())
    monkeypatch.setitem(authors.COMPARISONS, "made_up", (lambda checkout: figures, "owner/name"))
    monkeypatch.setattr(sys, "argv", ["authors.py", f"--checkouts={repo}", "--only=made_up"])
    assert authors.main() == (0 if good else 1)
    assert capsys.readouterr().out.strip().endswith(line)


def test_all_missing_is_said_and_no_failure(authors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["authors.py", f"--checkouts={tmp_path}", "--only=soft,switch"])
    assert authors.main() == 0
    assert "soft: skipped: no checkout of google-research/vmoe" in capsys.readouterr().out


def test_nothing_is_not_equal_to_nothing(authors):
    with pytest.raises(ValueError, match="nothing to compare"):
        importlib.import_module("checkout").difference([0.0], [0.0])
