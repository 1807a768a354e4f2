"""What a finished run says of itself: test bits per byte beside compressors, load, a sample, pictures."""

import json
from pathlib import Path
from typing import Any

import jax

from moe_zoo.analysis.depth_over_text import TokenDepth, plot_token_depth, token_depth, write_token_depth
from moe_zoo.analysis.plots import plot_domain_experts, plot_expert_load, plot_loss
from moe_zoo.data import Corpus, Tokenizer, compressed_bits_per_byte
from moe_zoo.inference import Loaded
from moe_zoo.models.counting import count_parameters, train_flops_per_token
from moe_zoo.train import distributed
from moe_zoo.train.config import Config
from moe_zoo.train.evaluate import evaluate
from moe_zoo.train.log_writers import read_metrics


def make_report(config: Config, workdir: str | Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Evaluates the test split, draws the pictures into workdir/pictures and writes workdir/report.json.
    Of a model with blocks that some tokens go through, "as_trained" is the score with tokens that compete for them.

    Of several processes all evaluate and the first one writes: the others return None.
    """
    trainer, parts, tokenizer = run["trainer"], run["parts"], run["tokenizer"]
    model = trainer.model(run["state"])
    score = lambda model: evaluate(
        model, parts["test"], tokenizer, seq_len=config.data.seq_len, stride=config.data.eval_stride,
        batch_size=config.data.eval_batch_size, sharding=trainer.batch_sharding,
    )  # fmt: skip
    result = score(model)
    if model.competes:
        as_trained = score(model.as_trained())
        result["as_trained"] = {name: as_trained[name] for name in ("bits_per_byte", "loss")}
    loaded = Loaded(model, config.model, tokenizer)
    result["sample"] = draw_sample(config, loaded)
    depth = None
    if model.selects and model.causal:
        depth = token_depth(loaded, _beginning(parts["test"], tokenizer), config.data.seq_len)
    return distributed.main_only(lambda: _write(config, Path(workdir), run, result, depth))


def _beginning(corpus: Corpus, tokenizer: Tokenizer, tokens: int = 1500) -> str:
    """The split's first text: what the picture of depths is drawn over."""
    return tokenizer.decode(corpus.tokens[:tokens])


def _write(
    config: Config, workdir: Path, run: dict[str, Any], result: dict[str, Any], depth: TokenDepth | None
) -> dict[str, Any]:
    trainer, test = run["trainer"], run["parts"]["test"]
    compressed = compressed_bits_per_byte(test, run["tokenizer"])
    column = lambda kind: {name: values[kind] for name, values in compressed.items()}
    report = result | {
        "split": "test",
        "causal": trainer.abstract.causal,
        "gzip": column("gzip"),
        "xz": column("xz"),
        "tokens_per_second": run["tokens_per_second"],
        "train_seconds": run["seconds"],
        "steps": run["step"],
        "parameters": count_parameters(trainer.abstract, trainer.partition.trainable),
        "flops_per_token": train_flops_per_token(
            trainer.abstract, config.data.seq_len, passes=trainer.objective.passes
        ),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }
    report["pictures"] = draw_pictures(workdir, report)
    if depth is not None:
        folder = workdir / "pictures"
        report["pictures"] |= {
            "depth of tokens": str(plot_token_depth(depth, folder / "depth.png")),
            "depth of tokens, layer by layer": str(write_token_depth(depth, folder / "depth.html")),
        }
    (workdir / "report.json").write_text(json.dumps(report, indent=2))
    return report


def draw_sample(config: Config, loaded: Loaded) -> dict[str, str] | None:
    """A continuation of log.sample_prompt; None if no tokens are asked for or the model cannot generate."""
    if not config.log.sample_tokens or not loaded.model.causal:
        return None
    prompt = config.log.sample_prompt
    text = loaded.generate(prompt, config.log.sample_tokens, temperature=config.log.sample_temperature)[0]
    return {"prompt": prompt, "text": text}


def draw_pictures(workdir: Path, report: dict[str, Any]) -> dict[str, str]:
    """{name: path} of the pictures that the run has data for."""
    folder = workdir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    history = read_metrics(workdir / "metrics.jsonl")
    baselines = {"gzip -9": report["gzip"]["overall"], "xz -9e": report["xz"]["overall"]}
    pictures = {"loss curve": plot_loss(history, folder / "loss.png", baselines=baselines)}
    if report["expert_load"]:
        pictures["expert load over training"] = plot_expert_load(history, folder / "expert_load.png")
    if report["specialization"]["load"]:
        pictures["domains and experts"] = plot_domain_experts(report["specialization"], folder / "domain_experts.png")
    return {name: str(path) for name, path in pictures.items()}
