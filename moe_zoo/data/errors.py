"""The one exception of the data wing."""


class DataError(ValueError):
    """Data that cannot be used: says what was given, what was expected, and the nearest valid thing."""
