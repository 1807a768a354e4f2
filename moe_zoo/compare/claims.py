"""What a paper claims, written down before anything is trained: a direction on a named statistic against a baseline.

A config file that takes part in the comparison says so at its top level:

    CLAIM = Claim("test_bits_per_byte", "lower", baseline="top_k", says="...", source="arXiv 2412.14711")

or, if others are compared with it and it claims nothing itself, `CLAIM = Reference(says="...")`.
"""

import dataclasses
from collections.abc import Mapping

from moe_zoo.core.registry import ConfigError, nearest

DIRECTIONS = ("lower", "higher")


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number that a run ends with. `short`: its name in a claim; `title`: spelled out. `form`: how it is written.
    `needs_causal`: says nothing about a model that sees the future.
    """

    short: str
    title: str
    form: str
    needs_causal: bool = False


#: what claims may name; a finished run has each of them, None where it does not apply; the store also holds runs from
#: before a statistic was added, which lack it
STATISTICS: Mapping[str, Statistic] = {
    "test_bits_per_byte": Statistic("loss", "test bits per byte", ".4f", needs_causal=True),
    "load_violation": Statistic("imbalance", "load violation: busiest expert over an even share, minus 1", ".3f"),
    "max_load_violation": Statistic("worst imbalance", "load violation of the worst layer", ".3f"),
    "dropped_fraction": Statistic("drops", "share of choices dropped in training", ".4f"),
    "experts_per_token": Statistic("experts per token", "experts per token in training", ".3f"),
    "train_flops_per_token": Statistic("compute", "active FLOPs per token in training, as measured", ".4g"),
    "specialization": Statistic("specialization", "what the expert says of the domain, in bits", ".4f"),
    "token_sparsity": Statistic("token sparsity", "share of experts that a test token leaves alone", ".4f"),
    "chunk_sparsity": Statistic("chunk sparsity", "share of experts that 8 test tokens in a row leave alone", ".4f"),
    "reuse": Statistic("reuse", "share of a test token's experts that the next token uses too", ".4f"),
    "tokens_per_second": Statistic("speed", "tokens per second of training", ",.0f"),
}

#: the same of adapters on tasks (`compare/adapters`); losses are nats per token of the answers, tasks weigh alike
OF_ADAPTERS: Mapping[str, Statistic] = {
    "held_in_loss": Statistic("loss", "loss on the answers, tasks that were trained", ".4f"),
    "held_in_exact": Statistic("exact", "answers exactly right, tasks that were trained", ".3f"),
    "held_out_loss": Statistic("loss held out", "loss on the answers, tasks that nobody trained", ".4f"),
    "held_out_exact": Statistic("exact held out", "answers exactly right, tasks that nobody trained", ".3f"),
    "specialization": STATISTICS["specialization"],
    "experts_per_token": Statistic("experts per token", "experts per token on test questions", ".3f"),
    "active_parameters": Statistic("active", "trained parameters that one token uses", ",.0f"),
}
ALL_STATISTICS = {**OF_ADAPTERS, **STATISTICS}


@dataclasses.dataclass(frozen=True)
class Claim:
    """`statistic` is `direction` ("lower", "higher") than that of the entry `baseline`. `says`: the claim in words,
    `source`: where it is made.
    """

    statistic: str
    direction: str
    baseline: str
    says: str
    source: str

    def __post_init__(self):
        for name, known in (("statistic", ALL_STATISTICS), ("direction", DIRECTIONS)):
            given = getattr(self, name)
            if given not in known:
                raise ConfigError(f"CLAIM: unknown {name} {given!r}{nearest(given, known)}; known: {', '.join(known)}")
        for name in ("baseline", "says", "source"):
            if not getattr(self, name):
                raise ConfigError(f"CLAIM: {name} is empty; a claim has a baseline, words and a source")

    @property
    def sign(self) -> int:
        """What a difference to the baseline is multiplied with, so that below zero is as claimed."""
        return 1 if self.direction == "lower" else -1

    def short(self) -> str:
        """The claim in one line."""
        return f"{ALL_STATISTICS[self.statistic].short} {'<' if self.direction == 'lower' else '>'} {self.baseline}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """An entry that others are compared with and that claims nothing."""

    says: str
