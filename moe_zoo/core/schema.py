"""From a loose nested mapping to frozen dataclasses, once, with every mistake named.

Config files are Python that return an `ml_collections.ConfigDict`; modules only ever see dataclasses. `build` is the
one place between the two: it fills defaults, checks types, and answers an unknown key with the nearest valid one.

A field whose metadata holds a `Registry` is a *choice*: `{"name": ..., **keys of that class's Config}`. Keys of other
classes are errors, so sixty routers need no shared pile of flags.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from moe_zoo.core.registry import ConfigError, Registry, nearest


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registry entry together with its validated settings."""

    name: str
    cls: type
    config: Any

    def make(self, *args, **kwargs):
        return self.cls(self.config, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Text:
    """A value typed on a command line: its type is decided by the field that it meets."""

    value: str


def choice(registry: Registry, default: str, **settings):
    """A dataclass field that picks one entry of `registry`."""
    return dataclasses.field(
        default_factory=lambda: build_choice(registry, {"name": default, **settings}, ""),
        metadata={"registry": registry},
    )


def choices(registry: Registry, default: Mapping[str, Mapping] | None = None):
    """A dataclass field that holds several entries of `registry`: `{name: settings}`."""
    return dataclasses.field(
        default_factory=lambda: build_choices(registry, default or {}, ""),
        metadata={"registry": registry, "many": True},
    )


def section_of(cls: type, registry: Registry):
    """A dataclass field of `cls`; a section with a "name" is of the `Config` of that entry of `registry` instead, which
    has a field `name` itself.
    """
    return dataclasses.field(default_factory=cls, metadata={"kinds": registry})


def build(cls: type, values: Mapping, path: str = ""):
    """`cls(**values)` with every value converted to its field's type.

    Raises:
      ConfigError: unknown key, wrong type, or whatever `cls.validate` finds; the message starts with the dotted path.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a section with keys, got {_show(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ConfigError(
                f"unknown key {prefix + str(key)!r}{nearest(key, fields)}; keys of {path or 'config'}: {known}"
            )
    kwargs = {}
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _field(field, hints[name], values[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {prefix + name!r} ({_type_name(hints[name])})")
    built = cls(**kwargs)
    if hasattr(built, "validate"):
        built.validate(path)
    return built


def build_choice(registry: Registry, values, path: str) -> Choice:
    """`{"name": ..., **settings}` (or just a name) -> the entry with its Config built."""
    if isinstance(values, Choice):
        return values
    if isinstance(values, Text):
        values = {"name": values.value}
    if isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(
            f"{path}: expected a section with a 'name', one of {', '.join(registry.names())}; got {_show(values)}"
        )
    name = values["name"].value if isinstance(values["name"], Text) else values["name"]
    cls = registry.get(name, f"{path}.name")
    rest = {k: v for k, v in values.items() if k != "name"}
    return Choice(name, cls, build(cls.Config, rest, path))


def build_choices(registry: Registry, values, path: str) -> tuple[Choice, ...]:
    """`{name: settings, ...}` -> entries in that order."""
    if isinstance(values, Text):
        values = _literal(values.value)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected {{name: settings}}, got {_show(values)}")
    for name, rest in values.items():
        if rest is not None and not isinstance(rest, Mapping):
            raise ConfigError(f"{path}.{name}: expected a section with keys, got {_show(rest)}")
    return tuple(
        build_choice(registry, {"name": name, **(rest or {})}, f"{path}.{name}") for name, rest in values.items()
    )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def to_dict(built) -> dict:
    """The inverse of `build`: plain nested dicts and lists that JSON can hold, every default written out; but of a
    field whose metadata says "silent": then settings written before there was such a field are what they are now.
    """
    if isinstance(built, Choice):
        return {"name": built.name, **to_dict(built.config)}
    result = {}
    for field in dataclasses.fields(built):
        value = getattr(built, field.name)
        if field.metadata.get("silent") and value == _default(field):
            continue
        if isinstance(value, tuple) and field.metadata.get("many"):
            result[field.name] = {c.name: to_dict(c.config) for c in value}
        elif isinstance(value, Choice) or dataclasses.is_dataclass(value):
            result[field.name] = to_dict(value)
        else:
            result[field.name] = list(value) if isinstance(value, tuple) else value
    return result


def set_path(tree: dict, dotted: str, value, path: str = "config") -> None:
    """`tree["a"]["b"] = value` for `"a.b"`, creating sections on the way."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{path}.{dotted}: {parent!r} is a value ({_show(child)}), not a section")
        tree = child
    tree[last] = value


def overlay(old: Mapping, new: Mapping) -> dict:
    """`new` over `old`, section by section. A section that is empty, or names another choice, replaces the old one
    whole: the old choice's other keys mean nothing to it.
    """
    merged = dict(old)
    for key, value in new.items():
        section = merged.get(key)
        if isinstance(value, Mapping) and isinstance(section, Mapping) and value:
            same = value.get("name", section.get("name")) == section.get("name")
            value = overlay(section, value) if same else value
        merged[key] = value
    return merged


def positive(obj, path: str, *names: str, zero: bool = False) -> None:
    """Raises ConfigError unless each named number is > 0 (>= 0 with `zero`)."""
    for name in names:
        value = getattr(obj, name)
        if value is not None and not (value > 0 or (zero and value == 0)):
            raise ConfigError(f"{join(path, name)}: expected a number {'>= 0' if zero else '> 0'}, got {value}")


def join(path: str, name: str) -> str:
    """A dotted path."""
    return f"{path}.{name}" if path else name


def _field(field, hint, value, path):
    registry = field.metadata.get("registry")
    if registry is not None:
        return (build_choices if field.metadata.get("many") else build_choice)(registry, value, path)
    kinds = field.metadata.get("kinds")
    if kinds is not None and isinstance(value, Mapping) and "name" in value:
        name = value["name"].value if isinstance(value["name"], Text) else value["name"]
        return build(kinds.get(name, f"{path}.name").Config, value, path)
    built = kinds is not None and dataclasses.is_dataclass(value) and not isinstance(value, Text)
    return value if built else _convert(hint, value, path)


def _convert(hint, value, path):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if origin is Literal:
        value = value.value if isinstance(value, Text) else value
        if value not in args:
            raise ConfigError(f"{path}: got {value!r}{nearest(value, args)}; valid: {', '.join(map(repr, args))}")
        return value
    if isinstance(value, Text):
        value = value.value if hint is str else _literal(value.value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {_show(value)}")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {_show(value)}")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is Any:
        return _plain(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e4 is how people write steps
    if type(value) is not hint:
        raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_show(value)}")
    return value


def _convert_union(args, value, path):
    text = value.value if isinstance(value, Text) else value
    if type(None) in args and (text is None or (isinstance(value, Text) and text.lower() in ("none", "null"))):
        return None
    errors = []
    for arg in (a for a in args if a is not type(None)):
        try:
            return _convert(arg, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _plain(value):
    """Without text that was typed, where no field says its type."""
    if isinstance(value, Text):
        return _literal(value.value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _literal(text: str):
    low = text.lower()
    if low in ("true", "false"):
        return low == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _type_name(hint) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint))


def _show(value) -> str:
    value = value.value if isinstance(value, Text) else value
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"
