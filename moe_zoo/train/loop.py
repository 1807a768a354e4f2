"""The training loop. It reads top to bottom and never asks which router, objective or optimizer is running."""

import collections
import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moe_zoo
from moe_zoo.checkpoints import CheckpointError, Checkpoints
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import DataError
from moe_zoo.models.counting import count_adapters, count_parameters
from moe_zoo.sharding import batch_sharding, make_mesh
from moe_zoo.train import distributed
from moe_zoo.train.config import Config
from moe_zoo.train.guard import explain
from moe_zoo.train.log_writers import JsonlWriter, TensorBoardWriter, Writer, Writers
from moe_zoo.train.memory import check_memory, group_bytes
from moe_zoo.train.metrics import first_non_finite, flatten
from moe_zoo.train.progress import Progress
from moe_zoo.train.step import Trainer
from moe_zoo.train.task import Task
from moe_zoo.train.tasks import make_task
from moe_zoo.train.workdir import SETTINGS, prepare_workdir, write_settings


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line and says what to try."""


def train(
    config: Config,
    workdir: str | Path,
    *,
    overwrite: bool = False,
    stop_at: int | None = None,
    begin_from: Mapping[str, jax.Array] | None = None,
    writers: Sequence[Writer] = (),
) -> dict[str, Any]:
    """Trains to the end of `config`, or goes on where the run in `workdir` stopped.

    `stop_at` ends early at that step as a SIGTERM would. `begin_from`: weights by path for a fresh run (fine-tuning);
    parameters that are not in it are drawn. `writers`: further loggers (`log_writers.Writer`), which get every line of
    metrics that metrics.jsonl gets. Returns {"trainer", "state", "task", its "parts" and "tokenizer",
    "step", "seconds", "tokens_per_second", "finished"}.
    """
    workdir = Path(workdir).absolute()
    distributed.same_settings(config.to_dict())
    mesh = make_mesh(config.mesh)

    # -- data ---------------------------------------------------------------------------------------------------------
    task = make_task(config)
    rows = distributed.rows_here(batch_sharding(mesh), config.data.batch_size, "data.batch_size")
    distributed.rows_here(batch_sharding(mesh), config.data.eval_batch_size, "data.eval_batch_size")
    data = task.iterator(rows)

    # -- model, optimizer ---------------------------------------------------------------------------------------------
    objective = config.train.objective.make()
    trainer = Trainer(config, mesh, objective)

    # -- work directory, checkpoint -----------------------------------------------------------------------------------
    lock = distributed.main_only(lambda: prepare_workdir(workdir, config, task.fingerprint, overwrite))
    with lock or contextlib.nullcontext():
        check_memory(trainer)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        step, watch = 0, _Stopwatch()
        if (latest := checkpoints.latest()) is not None:
            state, meta = checkpoints.restore(latest, trainer.abstract_state())
            step = latest
            _go_on(data, watch, meta, checkpoints.path / str(latest) / "meta")
        else:
            for part, name in (
                ("adapters", config.model.adapters.name if config.model.adapted else None),
                ("depth", config.model.retrofit),
            ):
                if name and begin_from is None:
                    raise ConfigError(
                        f"model.{part}: {name!r} acts beside a trained model, and there is none to begin from: "
                        "--init-from=PATH, of a run or a published directory"
                    )
            state = trainer.init_state(given=begin_from, **task.initial())
        distributed.main_only(lambda: write_settings(workdir, config, task.fingerprint))
        writers = distributed.main_only(lambda: all_writers(workdir, config, step, writers)) or []

        # -- loop -----------------------------------------------------------------------------------------------------
        steps, limit = config.train.steps, (config.train.minutes or 0) * 60
        fraction = lambda: min(1.0, step / steps if steps else agreed.seconds / limit)
        unfinished = lambda: step < steps if steps else agreed.seconds < limit
        speed = lambda: watch.steps_per_second * task.tokens_per_step
        stats = None
        layer_ids = {path: ids for path, _, ids in trainer.abstract.blocks()}
        saved = step

        def save():
            if not (workdir / SETTINGS).is_file():  # the folder itself may be back: a save under way makes its own
                raise TrainingError(f"step {step}: {workdir} has vanished, nothing can be saved there")
            meta = {
                "data": data.get_state(),
                "seconds": watch.seconds,
                "processor_seconds": watch.processor_seconds,
                "config": config.to_dict(),
                "version": code_version(),
            }
            checkpoints.save(step, state, meta)

        shown = Progress(steps, config.train.minutes)
        with _disk_errors(workdir), Writers(writers) as log, shown as progress, _StopSignal() as signals:
            agreed = distributed.Agreement(mesh, signals, watch)
            log.truncate_after(step)
            announce(progress, trainer, task, step, begin_from)
            while unfinished() and not agreed.stop and step != stop_at:
                batch = distributed.put_batch(next(data), trainer.batch_sharding, config.data.batch_size)
                state, stats = trainer.train_step(state, batch, np.float32(fraction()))
                watch.step(stats)
                agreed.after_step()
                step += 1
                ended = not unfinished()
                if step % config.log.every == 0 or ended:
                    host = jax.device_get(stats)
                    line = flatten(host, layer_ids)
                    line |= task.line(line) | {
                        "tokens": step * task.tokens_per_step, "seconds": watch.seconds,
                        "processor_seconds": watch.processor_seconds, "tokens_per_second": speed(),
                    }  # fmt: skip
                    log.write(step, "train", line)
                    if line["skipped_in_a_row"] >= config.train.guard.max_skipped:
                        why = explain(step, line, host["gradient_norms"], trainer.names)
                        raise TrainingError(f"{why}; the last checkpoint is of step {saved}")
                    if (bad := first_non_finite(line)) is not None and not line["skipped_in_a_row"]:
                        why = f"step {step}: {bad} is {line[bad]}, though loss and gradient are finite"
                        raise TrainingError(f"{why}; the last checkpoint is of step {saved}")
                    progress.update(step, fraction(), line, speed())
                else:
                    progress.update(step, fraction())
                if step % config.log.eval_every == 0 or ended:
                    watch.stop(stats)
                    score = task.score(
                        trainer.model(state), "validation", trainer.batch_sharding, max_rows=config.log.eval_rows
                    )
                    found = task.headline(score)
                    log.write(step, "validation", found)
                    progress.update(step, fraction(), {f"validation_{name}": value for name, value in found.items()})
                if step % config.checkpoint.every == 0 and not ended:
                    watch.stop(stats)
                    save()
                    saved = step
            if stats is not None:
                watch.stop(stats)
            if saved != step or latest is None:
                save()
            checkpoints.wait()
            finished = not unfinished()
            if not finished:
                progress.print(f"stopped at step {step}, saved; the same command goes on from there")
        checkpoints.close()
        return {
            "trainer": trainer, "state": state, "task": task, "parts": task.parts, "tokenizer": task.tokenizer,
            "step": step, "seconds": watch.seconds, "finished": finished,
            "tokens_per_second": step * task.tokens_per_step / watch.seconds if watch.seconds else None,
        }  # fmt: skip


def all_writers(workdir: Path, config: Config, step: int, further: Sequence[Writer]) -> list[Writer]:
    """metrics.jsonl, TensorBoard if it is asked for, and `further`."""
    writers = [JsonlWriter(workdir / "metrics.jsonl"), *further]
    if config.log.tensorboard:
        writers.append(TensorBoardWriter(workdir / "tensorboard", resume_step=step if step else None))
    return writers


@contextlib.contextmanager
def _disk_errors(workdir: Path):
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{workdir}: {error.strerror or error}. What was saved before is whole: put that right, and the same "
            "command goes on from there"
        ) from error


def announce(progress: Progress, trainer: Trainer, task: Task, step: int, begin_from) -> None:
    """What is about to run, in three lines; and where the weights come from, if they are given."""
    counts = count_parameters(trainer.abstract, trainer.partition.trainable)
    config = trainer.config
    progress.print(
        f"model {counts['total']:,} parameters, {counts['active']:,} active per token, "
        f"{counts['trainable']:,} trained; {config.model.summary}"
    )
    if config.model.adapted:
        progress.print(describe_adapters(trainer))
    progress.print(f"data {task.summary()}")
    if begin_from and not step:
        fresh = sorted(trainer.shapes.keys() - begin_from.keys())
        drawn = f"; drawn fresh: {', '.join(fresh[:5])}{', ...' * (len(fresh) > 5)}" if fresh else ""
        progress.print(f"weights given for {len(trainer.shapes) - len(fresh)} of {len(trainer.shapes)} arrays{drawn}")
    where = plural(trainer.mesh.devices.size, f"{jax.devices()[0].platform} device")
    where += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    begin = f"goes on from step {step}" if step else "starts"
    progress.print(f"{begin} on {where}, jax {jax.__version__}; the first step compiles")


def describe_adapters(trainer: Trainer) -> str:
    """How many layers matched, what trains, and the memory of it."""
    counts, size = count_adapters(trainer.abstract), group_bytes(trainer)
    parameters = count_parameters(trainer.abstract, trainer.partition.trainable)
    share = parameters["trainable"] / parameters["total"]
    memory = ", ".join(f"{value / 2**20:,.2f} MiB {name}" for name, value in size.items())
    name = trainer.config.model.adapters.name
    return (
        f"adapters {name} beside {counts['matched']} of {counts['linear']} linear layers: {parameters['trainable']:,} "
        f"parameters train ({share:.2%}); memory: {memory}"
    )


def plural(n: int, noun: str) -> str:
    """ "1 device", "8 devices"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def code_version() -> str:
    """Package version, with the commit when run from a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5
        )
        commit = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return moe_zoo.__version__ + (f"+{commit}" if commit else "")


def _go_on(data, watch: "_Stopwatch", meta: dict[str, Any], path: Path) -> None:
    """Puts the iterator behind the last consumed batch, the watch to the time trained; CheckpointError if damaged."""
    position = meta["data"]
    try:
        for name in ("seconds", "processor_seconds"):
            if type(seconds := meta[name]) not in (int, float) or not 0 <= seconds < float("inf"):
                raise TypeError(f"{name} trained: expected a number >= 0, got {str(seconds)[:80]!r}")
            setattr(watch, name, float(seconds))
        # the iterator would take a fraction and fail in its thread
        if not all(type(leaf) is int for leaf in jax.tree.leaves(position)):
            raise TypeError(f"data position: expected whole numbers, got {str(position)[:80]!r}")
        data.set_state(position)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class _Stopwatch:
    """Seconds of training: from the end of one step to the end of the next. It stands still while the first step
    compiles, while validating and while saving. `processor_seconds`: of all threads of this process meanwhile, what the
    machine did besides left out.
    """

    def __init__(self):
        self.seconds = self.processor_seconds = 0.0
        self._compiled, self._since, self._pending = False, None, None
        self._laps: collections.deque[float] = collections.deque(maxlen=50)

    @property
    def steps_per_second(self) -> float:
        """Over the last laps; 0 before the first."""
        return len(self._laps) / sum(self._laps) if self._laps else 0.0

    def step(self, stats) -> None:
        """A step has been dispatched. Waits for the one before it, so that the device never idles."""
        if not self._compiled:
            jax.block_until_ready(stats)
            self._compiled = True
        elif self._since is None:
            self._since = time.perf_counter(), time.process_time()
            self._pending = stats
        else:
            self._lap(self._pending)
            self._pending = stats

    def stop(self, stats) -> None:
        """Waits for the last step, counts it, and stands still until the next."""
        if self._since is not None:
            self._lap(stats)
        self._since = self._pending = None

    def _lap(self, stats) -> None:
        jax.block_until_ready(stats)
        now, (since, worked) = (time.perf_counter(), time.process_time()), self._since
        self._laps.append(now[0] - since)
        self.seconds += now[0] - since
        self.processor_seconds += now[1] - worked
        self._since = now


class _StopSignal:
    """SIGTERM and SIGINT end the loop after the current step; a second one interrupts at once."""

    def __enter__(self):
        self.asked = False
        self._old = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread, for example in a notebook's executor
            pass
        return self

    def _handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not set from Python


__all__ = ["CheckpointError", "DataError", "TrainingError", "train"]
