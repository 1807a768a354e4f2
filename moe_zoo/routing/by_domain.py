"""Numbers for the domains of a corpus (an expert, a group), for routers that are told where a text comes from.

Rules are text, `"help_de|help_en=0"`: names or shell patterns of domains with `|` between them, and their number. The
first rule that matches a name counts. A run's router learns the names from the corpus before the first step
(`Router.from_corpus`) and keeps the numbers in a buffer, so that they are part of the checkpoint.
"""

import fnmatch
import logging
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moe_zoo.core.param import Buffer, Constant, param
from moe_zoo.core.registry import ConfigError, nearest

_log = logging.getLogger(__name__)
_MOST = 256  # domains of a corpus; more are rather names of documents


def parse(rules: Sequence[str], path: str) -> list[tuple[list[str], int]]:
    """[(patterns, number)]. Raises ConfigError for what is no rule."""
    found = []
    for text in rules:
        names, _, number = text.rpartition("=")
        patterns = [name.strip() for name in names.split("|")]
        if not all(patterns) or not number.strip().isdecimal():
            raise ConfigError(f"{path}: {text!r}; expected 'domain|domain=number' like 'help_de|help_en=0'")
        found.append((patterns, int(number)))
    return found


def check(rules: Sequence[str], size: int, path: str, what: str) -> None:
    """Raises ConfigError for a number that is not below `size`, of which `what` says what is counted."""
    for text, (_, number) in zip(rules, parse(rules, path), strict=True):
        if number >= size:
            raise ConfigError(f"{path}: {text!r} of {what}={size}; at most {size - 1}")


def declare() -> Buffer:
    """The buffer of the numbers: -1, none, until `table` fills it."""
    return param((_MOST,), (None,), Constant(-1.0), dtype=jnp.int32, kind=Buffer)


def table(rules: Sequence[str], domains: Sequence[str], path: str) -> Int[np.ndarray, "X"]:
    """The number of each domain by its id, -1 where no rule matches.

    Raises ConfigError for a rule that matches no domain, so that a misspelt name is not a rule without effect, and for
    more domains than there is room for.
    """
    if len(domains) > _MOST:
        raise ConfigError(f"{path}: the data has {len(domains)} domains; at most {_MOST} can have numbers")
    numbers = np.full(_MOST, -1, np.int32)
    for patterns, number in reversed(parse(rules, path)):
        hits = [i for i, name in enumerate(domains) if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if not hits:
            raise ConfigError(
                f"{path}: {'|'.join(patterns)!r} matches no domain of the data{nearest(patterns[0], domains)}; "
                f"known: {', '.join(domains)}"
            )
        numbers[hits] = number
    without = [name for i, name in enumerate(domains) if numbers[i] < 0]
    if without:
        _log.info("%s: no rule for %s", path, ", ".join(without))
    return numbers


def numbers_of(ids_T: Int[Array, "T"], numbers_X: Int[Array, "X"] | None, size: int) -> Int[Array, "T"]:
    """The number of each token's domain, -1 for what has none (id -1: not known). Without a table, id modulo `size`."""
    numbers_T = ids_T % size if numbers_X is None else numbers_X.at[ids_T].get(mode="fill", fill_value=-1)
    return jnp.where(ids_T < 0, -1, numbers_T).astype(jnp.int32)
