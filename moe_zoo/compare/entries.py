"""Entries, and what is equal between them: the settings of one run, matched in cost to the reference."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from moe_zoo.compare.claims import Claim, Reference
from moe_zoo.core.registry import ConfigError, nearest
from moe_zoo.models.config import is_routed
from moe_zoo.train.config import (
    Config,
    config_file_value,
    config_from_dict,
    differences,
    known_configs,
    load_config,
)

#: the entry whose cost the others are matched to
REFERENCE = "top_k"

#: what `--match` makes equal by the width of the experts, and how that is counted
MATCHES = {
    "active": "active FLOPs per token",
    "total": "parameters in total",
    "none": "nothing: experts are as wide as the config says",
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """`name` is a preset of every config. `test_rows`: evenly spaced windows of the test split that are scored.
    `width_step`: of what a matched width is a multiple, for the hardware's sake. `trains`: whether compare.py runs it.
    `strict`: refuses what cannot be matched; a trial of a model too small for that says how far it is off.
    """

    name: str
    test_rows: int
    width_step: int
    trains: bool = True
    strict: bool = True


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", 32, 1, strict=False),
        Scale("cpu", 2048, 4),
        Scale("gpu", 8192, 8),
        Scale("pod", 8192, 16, False),
    )
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A config file with a claim."""

    name: str
    path: Path
    claim: Claim | Reference


@dataclasses.dataclass(frozen=True)
class Match:
    """How an entry was made equal. `by`: of `MATCHES`; `width`: of an expert (of a dense layer, where there is no
    expert); `configured`: the same in the config file; `value`, `target`: what was matched, here and in the reference.
    """

    by: str
    width: int
    configured: int
    value: float
    target: float

    def says(self) -> str:
        """In one line: what was matched, and how closely."""
        kept = f"width {self.width}" + ("" if self.width == self.configured else f" (config: {self.configured})")
        if self.by == "none":
            return kept
        return f"{kept}, {MATCHES[self.by]} {self.value / self.target - 1:+.2%} of {REFERENCE}'s"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run that may be made. `config_hash` is of what it learns from, seed and data apart; `cost_hash` of what all
    entries share; `fits`: the ways of matching that lead to these very settings.
    """

    entry: Entry
    scale: Scale
    seed: int
    config: Config
    match: Match
    config_hash: str
    cost_hash: str
    fits: tuple[str, ...]

    def key(self, fingerprint: str) -> str:
        """What a run is known by in the store, given the data's fingerprint."""
        return f"{self.entry.name}-{self.scale.name}-{self.seed}-{self.config_hash}-{fingerprint}"


def load_entries(names: str = "", folder: str = "") -> dict[str, Entry]:
    """Every config of this folder of configs with a claim, by name, and those that `names` ("top_k,my/idea.py") gives
    as files.

    Raises ConfigError for a claim that cannot be judged.
    """
    here = {PurePath(name).name: path for name, path in known_configs().items() if _folder(name) == folder}
    found = {name: entry for name, path in here.items() if (entry := _entry(name, path)) is not None}
    for name in (part.strip() for part in names.split(",") if part.strip().endswith(".py")):
        path = Path(name)
        entry = _entry(path.stem, path) if path.is_file() else None
        if entry is None:
            raise ConfigError(f"--entries: {name} is no config file with a CLAIM; known names: {', '.join(found)}")
        if path.stem in found and not found[path.stem].path.samefile(path):
            raise ConfigError(f"--entries: {name}: there is an entry {path.stem!r} already; call the file otherwise")
        found[path.stem] = entry
    for entry in found.values():
        baseline = getattr(entry.claim, "baseline", None)
        if baseline is not None and (baseline not in found or baseline == entry.name):
            raise ConfigError(
                f"{entry.path}: CLAIM: baseline {baseline!r} is no other entry{nearest(baseline, found)}; "
                f"known: {', '.join(found)}"
            )
    return found


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _entry(name: str, path: Path) -> Entry | None:
    claim = config_file_value(path, "CLAIM")
    if claim is not None and not isinstance(claim, (Claim, Reference)):
        raise ConfigError(f"{path}: CLAIM must be a Claim or a Reference of moe_zoo.compare, got {claim!r}")
    return None if claim is None else Entry(name, path, claim)


def pick(names: str, known: Mapping[str, Entry]) -> list[Entry]:
    """`"top_k,remoe"` -> those entries in that order; `"all"` -> all, those that others are compared with first.

    A config file, `"my/idea.py"`, is the entry of its stem.
    """
    baselines = [getattr(entry.claim, "baseline", None) for entry in known.values()]
    by_use = sorted(known, key=lambda name: (-baselines.count(name), name))
    stem = lambda name: Path(name).stem if name.endswith(".py") else name
    asked = by_use if names == "all" else list(dict.fromkeys(stem(n.strip()) for n in names.split(",") if n.strip()))
    for name in asked:
        if name not in known:
            raise ConfigError(f"--entries: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}, or all")
    if not asked:
        raise ConfigError(f"--entries: expected names or all, got {names!r}; known: {', '.join(known)}")
    return [known[name] for name in asked]


def plan(entry: Entry, scale: Scale, seed: int, *, by: str = "active", source: str | None = None) -> Plan:
    """The settings of one run: the entry's preset of the scale, its experts as wide as `by` says, this seed and data.

    The seed also shuffles and splits the data, in the same way for every entry. Raises ConfigError if the entry changes
    what all must share, or cannot be matched.
    """
    config = load_config(f"{entry.path}:{scale.name}")
    reference = load_config(f"{REFERENCE}:{scale.name}")
    if changed := differences(_shared(reference), _shared(config)):
        raise ConfigError(
            f"{entry.path}:{scale.name}: {'; '.join(changed[:4])}: a comparison needs these to be {REFERENCE}'s"
        )
    match = _match(config, reference, by, scale.width_step, scale.strict)
    tree = config.to_dict()
    tree["train"]["seed"] = tree["data"]["seed"] = seed
    tree["data"]["source"] = source or tree["data"]["source"]
    same = lambda how: how == by or _match(config, reference, how, scale.width_step, check=False).width == match.width
    fits = tuple(how for how in MATCHES if same(how))
    tree["model"][_width_key(config)] = match.width
    config = config_from_dict(tree)
    return Plan(entry, scale, seed, config, match, digest(learned(config)), digest(_shared(config)), fits)


def _match(config: Config, reference: Config, by: str, step: int, check: bool) -> Match:
    """The width of an expert that comes closest to the reference's cost; cost is linear in it."""
    key = _width_key(config)
    configured = getattr(config.model, key)
    if by == "none":
        return Match(by, configured, configured, 0.0, 0.0)
    target, (one, two) = _cost(reference, None, by), (_cost(config, width, by) for width in (1, 2))
    width = max(1, round((1 + (target - one) / (two - one)) / step)) * step
    value = _cost(config, width, by)
    if check and abs(value / target - 1) > 0.05:
        raise ConfigError(
            f"--match={by}: no width of the experts gives this config {REFERENCE}'s {MATCHES[by]}: {target:.4g} are "
            f"wanted, width {width} comes to {value:.4g}; --match=none leaves widths as they are"
        )
    return Match(by, width, configured, value, target)


def _cost(config: Config, width: int | None, by: str) -> float:
    from moe_zoo.models import Decoder
    from moe_zoo.models.counting import count_parameters, train_flops_per_token

    changes = {} if width is None else {_width_key(config): width}
    model = Decoder(dataclasses.replace(config.model, **changes))
    if by == "total":
        return count_parameters(model)["total"]
    return train_flops_per_token(model, config.data.seq_len, passes=config.train.objective.cls.passes)


def _width_key(config: Config) -> str:
    routed = any(is_routed(kind) for s in config.model.segments() for kind in s.pattern)
    return "moe_intermediate_size" if routed else "intermediate_size"


#: of the model's settings, what an entry may have of its own
_OWN = (
    "layers", "intermediate_size", "moe_intermediate_size", "num_experts", "shared_expert_size", "shared_expert_gate",
    "mlp", "chain", "router", "experts", "dispatch", "losses", "depth", "remat", "variants",
)  # fmt: skip


def _shared(config: Config) -> dict[str, Any]:
    """What all entries of a comparison must have in common: data, optimizer, schedule, decoder."""
    tree = learned(config)
    model = {name: value for name, value in tree["model"].items() if name not in _OWN}
    train = {name: tree["train"][name] for name in ("steps", "minutes", "accumulation")}
    return {
        "model": model | {"num_layers": config.model.num_layers}, "train": train, "data": tree["data"],
        "optim": tree["optim"],
    }  # fmt: skip


def learned(config: Config) -> dict[str, Any]:
    """The settings that change what is learned, but for the seed and where the data lies."""
    tree = {
        name: dict(section) for name, section in config.to_dict().items() if name not in ("checkpoint", "log", "mesh")
    }
    del tree["train"]["seed"], tree["data"]["seed"], tree["data"]["source"]
    return tree


def digest(tree: Mapping[str, Any]) -> str:
    """A hash of settings, 12 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=6).hexdigest()
