"""Text: a model of the next token, scored in bits per byte."""

import math
from pathlib import Path
from typing import Any

from moe_zoo.core.registry import ConfigError
from moe_zoo.data import compressed_bits_per_byte, load_corpus, load_tokenizer, split, train_iterator
from moe_zoo.models.counting import train_flops_per_token
from moe_zoo.train import distributed
from moe_zoo.train.config import Config
from moe_zoo.train.evaluate import evaluate
from moe_zoo.train.task import Task

_SHOWN = 1500  # tokens over which the picture of depths is drawn


class Language(Task):
    """A corpus in three parts, by document."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's "
                f"{self.tokenizer.vocab_size}"
            )
        corpus = distributed.load_once(lambda: load_corpus(config.data.source, self.tokenizer))
        self.parts = split(corpus, config.data.fractions, config.data.seed, tokenizer=self.tokenizer)
        self.fingerprint, self.domains = corpus.fingerprint, corpus.domains
        self.tokens_per_step = config.data.batch_size * config.data.seq_len
        size, targets = self.parts["train"].trained_bytes_per_domain(), self.parts["train"].targets_per_domain()
        self.bytes_per_token = sum(size.values()) / sum(targets.values())

    def iterator(self, rows):
        data = self.config.data
        return train_iterator(
            self.parts["train"], self.tokenizer, seq_len=data.seq_len, batch_size=data.batch_size, seed=data.seed,
            rows=rows,
        )  # fmt: skip

    def initial(self):
        counts = self.parts["train"].token_counts(self.config.model.vocab_size)
        return {"counts_V": counts, "domains": self.domains}

    def line(self, line):
        return {"bits_per_byte": line["loss"] / math.log(2) / self.bytes_per_token}

    def score(self, model, part, sharding=None, max_rows=None):
        """`max_rows` rows without overlap, or all with the run's own."""
        data = self.config.data
        return evaluate(
            model, self.parts[part], self.tokenizer, seq_len=data.seq_len, batch_size=data.eval_batch_size,
            stride=data.eval_stride if max_rows is None else None, max_rows=max_rows, sharding=sharding,
        )  # fmt: skip

    def headline(self, score):
        return {"bits_per_byte": score["bits_per_byte"]["overall"], "loss": score["loss"]}

    def summary(self):
        train = self.parts["train"]
        size = {name: part.num_bytes.sum() / 1e6 for name, part in self.parts.items()}
        trained = sum(train.trained_bytes_per_domain().values())
        answers = "" if train.trained is None else f"; trained on the answers, {trained / 1e6:.1f} MB"
        domains = f"{len(train.domains)} domain{'' if len(train.domains) == 1 else 's'}"
        return (
            f"{self.config.data.source}: {size['train']:.1f} MB train, {size['validation']:.2f} validation, "
            f"{size['test']:.2f} test, {domains}, split by document{answers}"
        )

    def final(self, run):
        """Of a model whose tokens compete in training, "as_trained" is the score with tokens that compete. Of one with
        blocks that some tokens go through, "token_depth" says what became of each token where the test data begins.
        """
        trainer = run["trainer"]
        model = trainer.model(run["state"])
        result = self.score(model, "test", trainer.batch_sharding)
        if model.competes:
            as_trained = self.score(model.as_trained(), "test", trainer.batch_sharding)
            result["as_trained"] = {name: as_trained[name] for name in ("bits_per_byte", "loss")}
        if model.selects and model.causal:
            from moe_zoo.inference.depth import token_depth  # it imports matplotlib: at the end

            text = self.tokenizer.decode(self.parts["test"].tokens[:_SHOWN])
            result["token_depth"] = token_depth(self._loaded(model), text, self.config.data.seq_len).to_dict()
        return result | {"sample": self._sample(model)}

    def facts(self, run):
        compressed = compressed_bits_per_byte(self.parts["test"], self.tokenizer)
        model, passes = run["trainer"].abstract, run["trainer"].objective.passes
        return {
            "causal": model.causal,
            **{kind: {name: values[kind] for name, values in compressed.items()} for kind in ("gzip", "xz")},
            "flops_per_token": train_flops_per_token(model, self.config.data.seq_len, passes=passes),
        }

    def pictures(self, folder: Path, history, report):
        from moe_zoo.analysis.plots import plot_domain_experts, plot_expert_load, plot_loss  # matplotlib: at the end

        baselines = {"gzip -9": report["gzip"]["overall"], "xz -9e": report["xz"]["overall"]}
        made = {"loss curve": plot_loss(history, folder / "loss.png", baselines=baselines)}
        if report["expert_load"]:
            made["expert load over training"] = plot_expert_load(history, folder / "expert_load.png")
        if report["specialization"]["load"]:
            made["domains and experts"] = plot_domain_experts(report["specialization"], folder / "domain_experts.png")
        if "token_depth" in report:
            from moe_zoo.analysis.depth_over_text import TokenDepth, plot_token_depth, write_token_depth

            depth = TokenDepth.from_dict(report["token_depth"])
            made["depth of tokens"] = plot_token_depth(depth, folder / "depth.png")
            made["depth of tokens, layer by layer"] = write_token_depth(depth, folder / "depth.html")
        return made

    def _loaded(self, model):
        from moe_zoo.inference import Loaded

        return Loaded(model, self.config.model, self.tokenizer)

    def _sample(self, model) -> dict[str, Any] | None:
        """A continuation of log.sample_prompt; None if no tokens are asked for or the model cannot generate."""
        log = self.config.log
        if not log.sample_tokens or not model.causal:
            return None
        text = self._loaded(model).generate(log.sample_prompt, log.sample_tokens, temperature=log.sample_temperature)[0]
        return {"prompt": log.sample_prompt, "text": text}
