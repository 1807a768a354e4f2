"""What a finished run says of itself: the score on test data, counts and costs, pictures."""

import json
from pathlib import Path
from typing import Any

import jax

from moe_zoo.models.counting import count_parameters
from moe_zoo.train import distributed
from moe_zoo.train.config import Config
from moe_zoo.train.log_writers import read_metrics
from moe_zoo.train.task import Task


def make_report(config: Config, workdir: str | Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Evaluates the test split, draws the pictures into workdir/pictures and writes workdir/report.json.

    Of several processes all evaluate and the first one writes: the others return None.
    """
    task: Task = run["task"]
    result = task.final(run)
    return distributed.main_only(lambda: _write(task, Path(workdir), run, result))


def _write(task: Task, workdir: Path, run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    trainer = run["trainer"]
    report = result | {
        "split": "test",
        **task.facts(run),
        "tokens_per_second": run["tokens_per_second"],
        "train_seconds": run["seconds"],
        "steps": run["step"],
        "parameters": count_parameters(trainer.abstract, trainer.partition.trainable),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }
    folder = workdir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    made = task.pictures(folder, read_metrics(workdir / "metrics.jsonl"), report)
    report["pictures"] = {name: str(path) for name, path in made.items()}
    (workdir / "report.json").write_text(json.dumps(report, indent=2))
    return report
