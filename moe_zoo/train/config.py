"""The settings of a run, and the way from a config file and a command line to them.

A config file is Python with `get_config(arg: str = "") -> ml_collections.ConfigDict`; `arg` picks a preset
(`configs/quickstart.py:tiny`). `--config.optim.learning_rate=3e-4` overrides a key. All of it becomes frozen
dataclasses here, once; what is wrong is said before anything compiles.
"""

import ast
import dataclasses
import importlib.util
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from moe_zoo.core.registry import ConfigError, Registry, nearest
from moe_zoo.core.schema import Choice, Text, build, choice, join, overlay, positive, section_of, set_path, to_dict
from moe_zoo.models.config import MODELS, ModelConfig
from moe_zoo.sharding.mesh import MeshConfig
from moe_zoo.train.guard import GuardConfig
from moe_zoo.train.objective import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`source`: "embedded", "arithmetic", "tasks" ("tasks:copy,kind": these), "guarded_tasks", a file or a folder
    (`moe_zoo.data.load_corpus`). `fractions`: train, validation, test, by document.

    `eval_stride`: evaluation windows of seq_len overlap so that every scored token sees at least seq_len - eval_stride
    tokens of its document, if there are that many.
    """

    #: what a batch is; the model and the objective must take the same
    batches: ClassVar[str] = "text"

    source: str = "embedded"
    tokenizer: str = "bytes"
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0
    fractions: tuple[float, ...] = (0.9, 0.05, 0.05)
    eval_batch_size: int = 32
    eval_stride: int | None = None

    def validate(self, path: str) -> None:
        positive(self, path, "seq_len", "batch_size", "eval_batch_size", "eval_stride")
        positive(self, path, "seed", zero=True)
        if self.eval_stride is not None and self.eval_stride > self.seq_len:
            raise ConfigError(
                f"{join(path, 'eval_stride')}: {self.eval_stride} skips tokens of seq_len={self.seq_len}; "
                f"at most {self.seq_len}"
            )


#: what a run may learn from besides text (`train/task.py`)
TASKS = Registry("data", {"labelled": "moe_zoo.train.classification:Labels"}, base="moe_zoo.train.task:Task")

OPTIMIZERS = ("adamw", "muon", "lion", "sgd")
#: those of optax whose update is a multiple of the learning rate (tests/train/test_optimizer.py checks each)
OPTAX_OPTIMIZERS = tuple(
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adan amsgrad lamb lars nadam nadamw novograd "
    "optimistic_adam_v2 radam rmsprop rprop sign_sgd signum sm3 yogi contrib.acprop contrib.ademamix contrib.adopt "
    "contrib.simplified_ademamix".split()
)
SCHEDULES = ("cosine", "wsd", "linear", "constant")
OPTAX_SCHEDULES = tuple(
    "cosine_decay_schedule cosine_onecycle_schedule exponential_decay linear_onecycle_schedule linear_schedule "
    "piecewise_constant_schedule piecewise_interpolate_schedule polynomial_schedule sgdr_schedule "
    "warmup_constant_schedule warmup_cosine_decay_schedule warmup_exponential_decay_schedule".split()
)


def parse_options(options: Sequence[str], path: str) -> dict[str, object]:
    """`["momentum=0.9"]` -> {"momentum": 0.9}; values are Python literals, other text is a string."""
    parsed = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{path}: {text!r}; expected 'name=value' like 'momentum=0.9'")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """`name`: "adamw", "muon", "lion", "sgd", or another optimizer of optax by its name there (`OPTAX_OPTIMIZERS`) with
    `options` as its further arguments: "momentum=0.9" strings. `learning_rate` is the peak. Schedules run over all of
    training after `warmup_steps`: "cosine" and "linear" to `final_fraction` of the peak, "wsd" holds the peak and falls
    linearly over the last `decay_fraction`, "constant"; or a schedule of optax by its name there, over steps, with
    `schedule_options`, its first or peak value being `learning_rate`.
    `weight_decay` applies to matrices only (no norms, biases, embeddings). `clip_norm` None: no clipping. `lr_scales`:
    "pattern=factor" strings, such as "embed.*=4": the rate of parameters whose name matches; the first one counts.
    """

    name: str = "adamw"
    options: tuple[str, ...] = ()
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    schedule_options: tuple[str, ...] = ()
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    lr_scales: tuple[str, ...] = ()

    def validate(self, path: str) -> None:
        positive(self, path, "learning_rate", "eps", "clip_norm")
        positive(self, path, "warmup_steps", "weight_decay", zero=True)
        self.rate_factors(path)
        for name, known in (("name", OPTIMIZERS + OPTAX_OPTIMIZERS), ("schedule", SCHEDULES + OPTAX_SCHEDULES)):
            given = getattr(self, name)
            if given not in known:
                raise ConfigError(
                    f"{join(path, name)}: unknown {given!r}{nearest(given, known)}; known: {', '.join(known)}"
                )
        for name, ours, chosen in (
            ("options", OPTIMIZERS, self.name),
            ("schedule_options", SCHEDULES, self.schedule),
        ):
            if parse_options(getattr(self, name), join(path, name)) and chosen in ours:
                raise ConfigError(f"{join(path, name)}: only for those of optax, and {chosen!r} is ours")
        for name in ("decay_fraction", "final_fraction", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{join(path, name)}: expected a number in [0, 1], got {getattr(self, name)}")

    def rate_factors(self, path: str = "optim") -> list[tuple[str, float]]:
        """`lr_scales` as (pattern, factor)."""
        pairs = []
        for text in self.lr_scales:
            pattern, _, factor = text.partition("=")
            try:
                pairs.append((pattern, float(factor)))
            except ValueError:
                raise ConfigError(
                    f"{join(path, 'lr_scales')}: {text!r}; expected 'pattern=factor' like 'embed.*=4'"
                ) from None
        return pairs


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Exactly one of `steps` and `minutes` ends the run. With `minutes`, schedules follow the clock (from the first
    step after compiling), so such a run can be resumed but not repeated bit for bit. `accumulation`: micro-batches per
    step, each of data.batch_size / accumulation rows. `freeze`: patterns of parameter names that are not trained; the
    last that matches decides, and one behind "!" is trained after all: ("*", "!*.router.*"). Buffers follow the
    data all the same. `guard`: which steps are skipped, and how many may be.
    """

    steps: int | None = None
    minutes: float | None = None
    accumulation: int = 1
    seed: int = 0
    freeze: tuple[str, ...] = ()
    objective: Choice = choice(OBJECTIVES, "next_token")
    guard: GuardConfig = GuardConfig()

    def validate(self, path: str) -> None:
        positive(self, path, "steps", "minutes", "accumulation")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"{join(path, 'seed')}: expected a whole number from 0 to 2**31 - 1, got {self.seed}")
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError(f"{path}: set exactly one of steps (got {self.steps}) and minutes (got {self.minutes})")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end; the last `keep` stay."""

    every: int = 500
    keep: int = 2

    def validate(self, path: str) -> None:
        positive(self, path, "every", "keep")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Metrics every `every` steps, a quick validation on `eval_rows` rows every `eval_every`."""

    every: int = 20
    eval_every: int = 500
    eval_rows: int = 256
    tensorboard: bool = True
    sample_prompt: str = "def "
    sample_tokens: int = 400
    sample_temperature: float = 0.8

    def validate(self, path: str) -> None:
        positive(self, path, "every", "eval_every", "eval_rows")
        positive(self, path, "sample_tokens", "sample_temperature", zero=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on. `model` and `data` with a "name" are of another kind than a decoder of text."""

    model: ModelConfig = section_of(ModelConfig, MODELS)
    data: DataConfig = section_of(DataConfig, TASKS)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig(steps=1000)
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()

    def validate(self, path: str) -> None:
        if self.data.batch_size % self.train.accumulation:
            raise ConfigError(
                f"data.batch_size: {self.data.batch_size} does not divide into "
                f"train.accumulation={self.train.accumulation} micro-batches"
            )
        if not len(self.data.fractions) == 3:
            raise ConfigError(
                f"data.fractions: expected three numbers (train, validation, test), got {list(self.data.fractions)}"
            )
        for where, part in (("model", self.model), ("train.objective", self.train.objective.cls)):
            if part.batches != self.data.batches:
                name = getattr(part, "__name__", type(part).__name__)
                raise ConfigError(f"{where}: {name} learns from {part.batches}, but data is {self.data.batches}")

    def to_dict(self) -> dict:
        return to_dict(self)


# What may differ between a run and its continuation: when it ends and what it says, not what it learns.
RESUMABLE = ("train.steps", "train.minutes", "checkpoint.", "log.", "mesh.")


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = (), given: Mapping | None = None) -> Config:
    """`"configs/quickstart.py:tiny"` and `[("optim.learning_rate", "3e-4")]` -> Config.

    `given`: `{"model": settings, "data": {"tokenizer": ...}}` of a model to begin from. It takes the place of the
    file's model section, but for the adapters and depth that the file puts on it, and of those keys of other sections;
    overrides come after it.
    Raises ConfigError for a missing file, an unknown preset, key or value; always one line.
    """
    tree = dict(read_config_file(spec))
    for section, values in (given or {}).items():
        own = tree.get(section, {})
        put_on = {k: own[k] for k in own if k in ("adapters", "depth")}
        tree[section] = {**values, **put_on} if section == "model" else own | values
    config = config_from_dict(tree)
    if not overrides:
        return config
    tree = config.to_dict()  # with all defaults, so that an override changes one key and not a whole section
    for key, text in overrides:
        _override(config, tree, key, text)
    return config_from_dict(tree)


def config_from_dict(tree: Mapping) -> Config:
    """Validated settings from nested mappings."""
    return build(Config, tree)


def read_config_file(spec: str) -> dict:
    """Runs `get_config(preset)` of a config file and returns plain nested dicts."""
    name, _, preset = spec.partition(":")
    config = _run_config_file(find_config(name), lambda module: module.get_config(preset))
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def config_file_value(path: Path, name: str) -> Any:
    """What a config file calls `name` at its top level; None if it has no such thing."""
    return _run_config_file(path, lambda module: getattr(module, name, None))


def _run_config_file(path: Path, take: Callable[[types.ModuleType], Any]) -> Any:
    """Executes the file and returns `take(module)`; whatever goes wrong in it is a ConfigError."""
    module_spec = importlib.util.spec_from_file_location(f"moe_zoo_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return take(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config file {path}: {type(error).__name__}: {error}") from error


def known_configs() -> dict[str, Path]:
    """{bare name: file} of the configs that come with the project; of one in a folder `FOLDER/NAME`."""
    folders = [Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs"]
    files = [(p.relative_to(folder), p) for folder in folders if folder.is_dir() for p in sorted(folder.rglob("*.py"))]
    return {name.with_suffix("").as_posix(): path for name, path in files}


def find_config(name: str) -> Path:
    """A path, or the bare name of a config that comes with the project."""
    path = Path(name)
    if path.is_file():
        return path
    known = known_configs()
    bare = path.with_suffix("").as_posix().removeprefix("configs/")
    for stem in (bare, path.stem):
        if stem in known and path.suffix in ("", ".py"):
            return known[stem]
    raise ConfigError(f"no config file {name!r}{nearest(bare, known)}; known: {', '.join(known)}")


def preset(name: str, presets: Mapping[str, object]):
    """`presets[name]`, for config files; raises ConfigError with the nearest name."""
    if name not in presets:
        raise ConfigError(
            f"unknown preset {name!r}{nearest(name, presets)}; known: {', '.join(repr(p) for p in presets)}"
        )
    return presets[name]


def extend(spec: str, changes: Mapping | Callable[[dict], Mapping]) -> dict:
    """Another config file's settings with `changes` (or what `changes` makes of them) laid over, for config files."""
    base = read_config_file(spec)
    return overlay(base, changes(base) if callable(changes) else changes)


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """`["optim.learning_rate: 0.003 -> 0.001", ...]` between two nested dicts."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


def _override(config: Config, tree: dict, key: str, text: str) -> None:
    """Sets one key of the tree. Another `name` of a section drops the keys that only the old choice knew."""
    set_path(tree, key, Text(text))
    parents, _, last = key.rpartition(".")
    registry = _registry_at(config, parents) if last == "name" else None
    if registry is None:
        return
    section = tree
    for parent in parents.split("."):
        section = section[parent]
    known = {f.name for f in dataclasses.fields(registry.get(text, key).Config)}
    for stale in [k for k in section if k != "name" and k not in known]:
        del section[stale]


def _registry_at(config: Config, path: str):
    """The registry behind a section such as `model.router`, or None."""
    part = config
    *parents, last = path.split(".")
    for parent in parents:
        part = getattr(part, parent, None)
    field = {f.name: f for f in dataclasses.fields(part)}.get(last) if dataclasses.is_dataclass(part) else None
    return None if field is None else field.metadata.get("registry") or field.metadata.get("kinds")
