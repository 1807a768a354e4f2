"""Tables from a short name to a class, imported only when somebody asks for it.

A wing's `__init__` holds one table: a line per idea. Listing the table costs one import per line, so `import moe_zoo`
stays cheap and an unknown name is answered without loading anything.
"""

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
    """name -> `"module:Class"`. Every class carries a `Config` dataclass and a first docstring line."""

    def __init__(self, kind: str, table: Mapping[str, str]):
        self.kind = kind
        self.table = dict(table)

    def __contains__(self, name) -> bool:
        return name in self.table

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.table))

    def get(self, name: str, path: str = "") -> type:
        """The class behind `name`. Raises ConfigError with the nearest name; `path` says where the name was written."""
        if name not in self.table:
            where = f"{path}: " if path else ""
            raise ConfigError(
                f"{where}unknown {self.kind} {name!r}{nearest(name, self.table)}; known: {', '.join(self.names())}"
            )
        module, cls = self.table[name].split(":")
        return getattr(importlib.import_module(module), cls)

    def lines(self) -> dict[str, str]:
        """One line per entry, from the class docstring."""
        return {name: (self.get(name).__doc__ or "").strip().splitlines()[0] for name in self.names()}
