"""The one exception of the data wing."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Data that cannot be used: says what was given, what was expected, and the nearest valid thing."""


def nearest(given: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known name closest to `given`, or an empty string."""
    matches = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
