"""The bar on a terminal, plain lines elsewhere, and the closing summary in both."""

import io
import re
import time

import numpy as np
import pytest
from rich.console import Console

from moe_zoo.analysis import Specialization
from moe_zoo.train import progress as progress_module
from moe_zoo.train.progress import Progress, duration, make_console, short_number
from moe_zoo.train.reporting import final_table

_NOW = {"loss": 1.5, "bits_per_byte": 2.164, "validation_bits_per_byte": 2.2}


class _Clock:
    def __init__(self, monkeypatch):
        self.seconds = 100.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.seconds)


def _plain():
    return make_console(io.StringIO())


def _terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})


def test_plain_lines_have_no_escape_codes(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = _plain()
    with Progress(total_steps=1000, every=0.0, console=console) as progress:
        progress.print("[bold]not markup[/bold]")
        progress.update(1, 0.001)
        progress.update(500, 0.5, _NOW, tokens_per_second=18234.0)
    lines = console.file.getvalue().splitlines()
    assert "\x1b" not in console.file.getvalue()
    assert lines[:2] == ["[bold]not markup[/bold]", "step 1/1,000   0%"]
    assert lines[2].startswith("step 500/1,000  50%  loss 1.500  bits/byte 2.164  validation 2.200  18.2k tokens/s")


def test_plain_lines_come_once_per_interval_and_at_the_end(monkeypatch):
    clock, console = _Clock(monkeypatch), _plain()
    with Progress(total_steps=100, every=10.0, console=console) as progress:
        for step in range(1, 48):
            progress.update(step, step / 100, _NOW)
            clock.seconds += 1.0
    steps = re.findall(r"step (\d+)/", console.file.getvalue())
    assert steps == ["1", "11", "21", "31", "41", "47"]


def test_time_left_is_reckoned_from_the_first_update(monkeypatch):
    clock, console = _Clock(monkeypatch), _plain()
    with Progress(total_steps=100, every=0.0, console=console) as progress:
        clock.seconds += 1000.0  # compiling
        progress.update(60, 0.60)  # resumed at 60
        clock.seconds += 10.0
        progress.update(70, 0.70)
    assert console.file.getvalue().splitlines() == ["step 60/100  60%", "step 70/100  70%  30s left"]


def test_minutes_need_no_number_of_steps(monkeypatch):
    clock, console = _Clock(monkeypatch), _plain()
    with Progress(minutes=5, every=0.0, console=console) as progress:
        progress.update(1, 0.0)
        clock.seconds += 60.0
        progress.update(200, 0.2)
    assert console.file.getvalue().splitlines() == ["step 1   0%  5m 00s left", "step 200  20%  4m 00s left"]


def test_metrics_stay_on_display_while_none_are_passed(monkeypatch):
    _Clock(monkeypatch)
    console = _plain()
    with Progress(total_steps=10, every=0.0, console=console) as progress:
        progress.update(1, 0.1, {"loss": 1.25})
        progress.update(2, 0.2, None)
        progress.update(3, 0.3, {"loss": float("nan")})
    assert [line.split("loss ")[1] for line in console.file.getvalue().splitlines()] == ["1.250", "1.250", "nan"]


@pytest.mark.parametrize("width", [40, 100])
def test_a_terminal_gets_a_bar(monkeypatch, width):
    clock, console = _Clock(monkeypatch), _terminal(width)
    with Progress(total_steps=100, console=console) as progress:
        progress.update(1, 0.01)
        progress.print("validation [at] 50")
        clock.seconds += 10.0
        progress.update(50, 0.5, _NOW, tokens_per_second=18234.0)
    text = console.file.getvalue()
    assert "\x1b[" in text and "validation [at] 50" in text
    assert "step 50" in text
    if width == 100:
        assert "━" in text and "bits/byte 2.164" in text and "18.2k tokens/s" in text and "10s left" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_the_bar_is_drawn_at_most_four_times_a_second(monkeypatch):
    clock, console = _Clock(monkeypatch), _terminal()
    with Progress(total_steps=1000, console=console) as progress:
        for step in range(1000):
            progress.update(step, step / 1000)
            clock.seconds += 0.002
    shown = set(re.findall(r"step (\d+)/", console.file.getvalue()))
    assert 8 <= len(shown) <= 10  # two seconds


def test_the_bar_is_taken_down_after_an_error():
    console = _terminal()
    with pytest.raises(KeyboardInterrupt), Progress(total_steps=10, console=console) as progress:
        progress.update(1, 0.1)
        raise KeyboardInterrupt
    assert console.file.getvalue().endswith("\x1b[?25h")


def test_update_is_cheap():
    progress = Progress(total_steps=10**6, every=1e9, console=_plain())
    progress.update(0, 0.0)
    start = time.perf_counter()
    for step in range(10_000):
        progress.update(step, 0.5, _NOW, tokens_per_second=1e4)
    assert (time.perf_counter() - start) / 10_000 < 100e-6  # measured: under 1 us


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (7, "7"),
        (7.25, "7.25"),
        (999.6, "1.00k"),
        (18234, "18.2k"),
        (5.61e6, "5.61M"),
        (3e21, "3000E"),
        (-2e3, "-2.00k"),
    ],
)
def test_short_number(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.6, "1m 00s"), (192, "3m 12s"), (7500, "2h 05m"), (float("nan"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def _report():
    domains = {"python_code": 2.0, "an_uncommonly_long_name_of_a_domain_of_text": 2.5}
    return {
        "context_length": 256,
        "bits_per_byte": {"overall": 2.1, "domains": domains},
        "bytes": {"python_code": 400_000, "an_uncommonly_long_name_of_a_domain_of_text": 100_000},
        "gzip": {"python_code": 2.2, "an_uncommonly_long_name_of_a_domain_of_text": 2.6, "overall": 2.28},
        "xz": {"python_code": 1.9, "overall": 2.0},
        "tokens_per_second": 18234.4,
        "parameters": {"total": 3_123_456, "active": 923_456, "trainable": 3_123_456},
        "flops_per_token": 5.61e6,
        "expert_load": [[0.25, 0.25, 0.5, 0.0], [0.25] * 4],
        "specialization": Specialization.of(
            ["code", "prose"], [100, 10], [(3, [[150, 50, 0, 0], [0, 0, 5, 5]]), (7, np.zeros((2, 4)))]
        ).to_dict(),
        "sparsity": {
            "layers": [3, 7],
            "chunk_length": 8,
            "token": [0.75, 0.5],
            "chunk": [0.25, None],
            "reuse": [0.9, 0.1],
        },
        "sample": {"prompt": "def f(", "text": "def f(x):\n\t[red]return[/red] x\x1b[31m\udc80"},
        "pictures": {"loss": "/" + "deep/" * 30 + "loss.png"},
        "train_seconds": 298.0,
        "steps": 1240,
    }


def _cells(text, first):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first)]
    return re.split(r"\s{2,}", line.strip())


def test_summary_without_a_terminal_is_plain_and_complete():
    console = _plain()
    final_table(_report(), console)
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("loss: "))
    assert _cells(text, "python_code") == ["python_code", "2.000", "2.200", "1.900", "400,000"]
    assert _cells(text, "an_uncommonly")[1:] == ["2.500", "2.600", "-", "100,000"]
    assert _cells(text, "overall") == ["overall", "2.100", "2.280", "2.000", "500,000"]
    loads = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if "▄▄" in line]
    assert loads == [["3", "2.00", "0.00", "▄▄█·"], ["7", "1.00", "1.00", "▄▄▄▄"]]
    told = text[text.index("Domains and experts") :]
    told = told[: told.index("Sparsity")]
    assert _cells(told, "3 ") == ["3", "1.000", "100.0%", "1.00-2.00", "code 0 3.0x, prose 2 2.0x"]
    assert _cells(told, "7 ") == ["7", "-", "-", "0.00-0.00"]
    told = text[text.index("Sparsity") :]
    assert _cells(told, "3 ") == ["3", "75.0%", "25.0%", "90.0%"]
    assert _cells(told, "7 ") == ["7", "50.0%", "-", "10.0%"]
    assert _cells(told, "mean ") == ["mean", "62.5%", "25.0%", "50.0%"]
    for part in ("256 tokens", "18,234 tokens/s", "3,123,456 in total", "923,456 active", "5.61M per token", "4m 58s"):
        assert part in text
    assert "def f(x):" in text and "    [red]return[/red] x\\x1b[31m\\udc80" in text
    assert "/" + "deep/" * 30 + "loss.png" in text


def test_summary_of_many_experts_fits():
    console = _plain()
    final_table({"expert_load": np.full((48, 128), 1 / 128)}, console)
    text = console.file.getvalue()
    assert "one bar per 2 experts" in text and text.count("▄" * 64) == 48
    assert all(len(line) <= 100 for line in text.splitlines())


def test_summary_on_a_narrow_terminal_in_colour():
    console = _terminal(60)
    final_table(_report(), console)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert "\x1b[" in console.file.getvalue()
    assert all(len(line) <= 60 for line in plain.splitlines() if not line.startswith("loss: "))


def test_summary_where_only_ascii_can_be_written():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    report = _report() | {"sample": {"prompt": "“", "text": "é"}}
    final_table(report, make_console(file))
    file.seek(0)
    assert "\\u201c\\xe9" in file.read()


@pytest.mark.parametrize("missing", list(_report()))
def test_any_key_may_be_missing(missing):
    final_table({name: value for name, value in _report().items() if name != missing}, _plain())
    final_table({missing: _report()[missing]}, _plain())


def test_an_empty_report_and_long_samples():
    final_table({}, _plain())
    console = _plain()
    final_table({"sample": {"prompt": "", "text": "line\n" * 100}}, console)
    assert "[...]" in console.file.getvalue() and console.file.getvalue().count("line") == 24
