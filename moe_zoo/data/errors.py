"""The exceptions of the data wing."""


class DataError(ValueError):
    """Data that cannot be used: says what was given, what was expected, and the nearest valid thing."""


class MissingPackageError(DataError):
    """A format whose package is not installed. Never a skip: a corpus must not depend on what is installed."""
