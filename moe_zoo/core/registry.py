"""Tables from a short name to a class, imported only when somebody asks for it.

A wing's `__init__` holds one table: a line per idea. Listing the table costs one import per line, so `import moe_zoo`
stays cheap and an unknown name is answered without loading anything. A class that is in no table is named by where it
is, `"my_router:MyRouter"`: what a run writes down of its settings is then enough to find it again.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping


class ConfigError(ValueError):
    """A value that a user gave is not usable. The message is one line: what was given, what is valid, the nearest."""


def nearest(given: str, known) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(str(given), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry:
    """name -> `"module:Class"`. Every class carries a `Config` dataclass and a first docstring line.

    `base`: `"module:Class"` of what all of them derive from, if there is such a class.
    """

    def __init__(self, kind: str, table: Mapping[str, str], base: str | None = None):
        self.kind, self.base = kind, base
        self.table = dict(table)

    def __contains__(self, name) -> bool:
        return name in self.table

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.table))

    def get(self, name: str, path: str = "") -> type:
        """The class behind `name`, of the table or `"module:Class"`.

        Raises ConfigError with the nearest name, or with why the class cannot be used; `path` says where the name was
        written.
        """
        where = f"{path}: " if path else ""
        if name in self.table:
            return _named(self.table[name])
        if ":" in str(name):
            return self._outside(name, where)
        raise ConfigError(
            f"{where}unknown {self.kind} {name!r}{nearest(name, self.table)}; known: {', '.join(self.names())}, or "
            "MODULE:CLASS of your own"
        )

    def _outside(self, name: str, where: str) -> type:
        try:
            cls = _named(name)
        except Exception as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"{where}{self.kind} {name!r}: {type(error).__name__}: {why}; expected MODULE:CLASS that can be "
                "imported from here"
            ) from error
        base = _named(self.base) if self.base else object
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ConfigError(f"{where}{self.kind} {name!r} is no class that derives from {self.base or 'object'}")
        if not dataclasses.is_dataclass(getattr(cls, "Config", None)):
            raise ConfigError(f"{where}{self.kind} {name!r} has no Config, a dataclass of its settings")
        return cls

    def lines(self) -> dict[str, str]:
        """One line per entry, from the class docstring."""
        return {name: (self.get(name).__doc__ or "").strip().splitlines()[0] for name in self.names()}


def _named(spec: str) -> type:
    """The class at `"module:Class"`."""
    module, _, cls = spec.partition(":")
    return getattr(importlib.import_module(module), cls)
