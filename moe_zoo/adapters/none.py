"""A model without adapters."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NoAdapterConfig:
    """No settings."""


class NoAdapter:
    """No adapters: the model as it is."""

    Config = NoAdapterConfig
