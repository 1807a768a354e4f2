"""Generation on a CPU beside transformers: tokens per second of the same weights.

    python scripts/bench.py generate                        # needs torch and transformers (extra `parity`)
    python scripts/bench.py generate --models=olmoe --batches=8

A tiny model is made by transformers and saved; every contender is a process of its own that opens that directory and,
asked in turn, round after round, continues the same ragged prompts by the same number of tokens, greedily and past any
end of text. Compared are lower quartiles over the rounds. transformers is asked with each of its ways to run experts,
since which one is fastest depends on the batch; what counts is its best.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_train import Contender, worker

#: settings of the two models that both sides run; `mixtral` is the decoder of `bench.py train`
MODELS = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=128, num_experts=64, num_experts_per_tok=8)),
}
SIZES = dict(
    vocab_size=264, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def write_model(name: str, folder: str) -> None:
    """A random model of transformers, whose routers take sides."""
    import torch
    import transformers

    torch.manual_seed(0)
    cls, settings = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**SIZES, **settings))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gate.weight"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def prompts(batch: int, longest: int) -> list[np.ndarray]:
    """Random ids; lengths from half of `longest` to `longest`."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(longest, max(1, longest // 2), batch).astype(int)
    return [rng.integers(3, SIZES["vocab_size"], n).astype(np.int32) for n in lengths]


def ours(folder: str, batch: int, longest: int, new: int) -> Callable[[], np.ndarray]:
    """Continues the prompts with our model."""
    import moe_zoo
    from moe_zoo.inference import generate

    model, rows = moe_zoo.load(folder).model, prompts(batch, longest)
    return lambda: np.stack(generate(model, rows, new, temperature=0.0))


def transformers_(experts: str, folder: str, batch: int, longest: int, new: int) -> Callable[[], np.ndarray]:
    """The same with theirs, experts run in the way called `experts`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts).eval()
    rows = prompts(batch, longest)
    ids = np.zeros((batch, longest), np.int64)
    mask = np.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :], mask[b, longest - len(row) :] = row, 1
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)

    def call():
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, **settings)[:, longest:].numpy()

    return call


CONTENDERS: dict[str, Callable[..., Callable[[], np.ndarray]]] = {
    "ours": ours,
    **{f"transformers {e}": functools.partial(transformers_, e) for e in ("eager", "batched_mm", "grouped_mm")},
}


def run_generate(args: argparse.Namespace) -> None:
    """A table per model and batch."""
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_model(name, folder)
            for batch in map(int, args.batches.split(",")):
                _measure(name, folder, batch, args)


def _measure(model: str, folder: str, batch: int, args: argparse.Namespace) -> None:
    sizes = (batch, args.prompt, args.new)
    contenders = [Contender(name, __file__, folder, *sizes) for name in args.peers.split(",")]
    samples: dict[str, list] = {c.name: [] for c in contenders}
    for r in range(args.rounds):
        for c in contenders[r % len(contenders) :] + contenders[: r % len(contenders)]:
            samples[c.name] += c.steps(1)["samples"]
    for c in contenders:
        c.close()
    quartiles = {name: np.quantile(np.array(taken), 0.25, axis=0) for name, taken in samples.items()}
    theirs = [q for name, q in quartiles.items() if name.startswith("transformers")] or list(quartiles.values())
    best = np.min(np.array(theirs), axis=0)
    print(f"{model}, batch {batch}, prompts up to {args.prompt}, {args.new} new tokens, {args.rounds} rounds; ", end="")
    print("ratios: tokens per second over the best of transformers")
    print(f"  {'':26}{'tokens/CPU s':>13}{'ratio':>7}{'tokens/wall s':>15}{'ratio':>7}{'spread':>8}")
    for name, (cpu, wall) in quartiles.items():
        walls = [w for _, w in samples[name]]
        print(
            f"  {name:26}{batch * args.new / cpu:13.0f}{best[0] / cpu:7.2f}{batch * args.new / wall:15.0f}"
            f"{best[1] / wall:7.2f}{max(walls) / min(walls):8.2f}",
            flush=True,
        )


def add_generate(subparsers: Any) -> None:
    """Greedy generation beside transformers with the same weights."""
    parser = subparsers.add_parser("generate", help="tokens per second beside transformers, on a CPU")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--peers", default=",".join(CONTENDERS))
    parser.add_argument("--prompt", type=int, default=48, help="ids of the longest prompt; the shortest has half")
    parser.add_argument("--new", type=int, default=128, help="tokens to add to each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(run=run_generate)


if __name__ == "__main__":
    _, _, peer, directory, *numbers = sys.argv
    worker(CONTENDERS[peer](directory, *map(int, numbers)))
