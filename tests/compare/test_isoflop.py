"""Equal training FLOPs: what the budget buys, commands that give the same settings, tables, wrong input."""

import shlex

import pytest

from moe_zoo.cli.isoflop import isoflop
from moe_zoo.compare.isoflop import curves, difference, draw, plan, table
from moe_zoo.compare.store import Store
from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import load_config


@pytest.mark.parametrize("name, width", [("dense", 64), ("mod", 96), ("random_depth", 128), ("top_k", 128)])
def test_every_run_spends_the_budget_and_its_command_is_its_settings(name, width):
    made, dense = plan(name, width, 1, budget=2.0), plan("dense", 128, 0, budget=2.0)
    spent = made.match.steps * made.match.flops_per_token * 16 * 128
    assert spent == pytest.approx(dense.match.budget, rel=0.005) and dense.match.steps == 600
    _, config, *given = shlex.split(made.command())
    overrides = [(k.removeprefix("--config."), v) for k, _, v in (arg.partition("=") for arg in given)]
    again = load_config(config.removeprefix("--config="), overrides)
    assert again.model == made.config.model and again.train.steps == made.config.train.steps
    assert made.config.model.hidden_size == width and made.config.train.seed == made.config.data.seed == 1


def runs_of(bits: dict) -> list[dict]:
    return [
        {"entry": entry, "width": width, "seed": seed, "scale": "cpu", "budget": 1e12, "flops_per_token": 1e6 * width,
         "steps": 1000 // width, "parameters": width * 1000, "key": f"{entry}{width}{seed}",
         "results": {"test_bits_per_byte": value, **({"as_trained": value - 0.01} if entry == "mod" else {})}}
        for (entry, width), values in bits.items() for seed, value in enumerate(values)
    ]  # fmt: skip


RUNS = runs_of({("dense", 64): [2.0, 2.2], ("dense", 96): [2.1, 2.3], ("mod", 64): [2.1, 2.2], ("mod", 96): [1.9, 2.0]})


def test_curves_meet_at_their_lowest_points(tmp_path):
    dense, mod = curves(RUNS, ["dense", "mod", "nobody"])
    assert (dense.best, mod.best) == (64, 96)
    found = difference(mod, dense)  # -0.1 and -0.2
    assert found.mean == pytest.approx(-0.15) and found.low < -0.15 < found.high and found.n == 2
    text = table([dense, mod])
    assert "| mod | 96 | 0.10 M | 96.00 | 10 | **1.9500** (spread 0.1000) | 1.9400 | 2 |" in text
    assert "mod at 96 - dense at 64: -0.1500, 95% interval" in text
    assert draw([dense, mod], tmp_path / "iso.png").stat().st_size > 5000


def test_the_page_is_made_of_the_store(tmp_path, capsys):
    store = Store(tmp_path / "iso.jsonl")
    for run in RUNS:
        store.append(run)
    isoflop(["--page", f"--store={store.path}"])
    assert "mod at 96 - dense at 64" in capsys.readouterr().out and (tmp_path / "iso.png").is_file()


@pytest.mark.parametrize("flags, says", [
    ("--entries=modd --widths=64", "unknown 'modd' .did you mean 'mod'"),
    ("--entries=mod --widths=65", "65 is no multiple of 32"),
    ("--entries=mod --widths=sixty", "expected numbers"),
    ("--entries=mod --widths=64 --scale=gpuu", "did you mean 'gpu'"),
    ("--entries=mod --widths=64 --budget=0.01", "fewer than twice"),
    ("--entries=mod --widths=64 --seeds=0", "above zero"),
    ("--entries=mod", "give --entries and --widths"),
    ("--entries=mod --widths=64 --config.train.steps=3", "no --config.KEY=VALUE"),
    ("--page --store=nowhere.jsonl", "no run of scale cpu"),
])  # fmt: skip
def test_wrong_input_is_one_line(flags, says):
    with pytest.raises(ConfigError, match=says):
        isoflop(flags.split())
