"""Continue a prompt: sample.py --workdir=runs/quickstart --prompt='def main('"""

import sys
from collections.abc import Sequence

from moe_zoo.cli import common


def sample(argv: Sequence[str]) -> None:
    """Prints a continuation of every prompt."""
    parser = common.Parser(prog="sample", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times", default=None)
    parser.add_argument("--tokens", type=int, default=200, help="how many at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("a run's config is fixed; --config.KEY=VALUE is for train.py")
    if arguments.tokens < 1 or arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise common.ConfigError("expected --tokens >= 1, --temperature >= 0, 0 < --top-p <= 1")

    from moe_zoo.inference import load

    prompts = arguments.prompt or [""]
    loaded = load(arguments.workdir)
    if not loaded.model.causal:
        raise common.ConfigError(f"router {loaded.config.router.name!r} is not causal: it cannot generate text")
    texts = loaded.generate(
        prompts, arguments.tokens, temperature=arguments.temperature, top_k=arguments.top_k,
        top_p=arguments.top_p, seed=arguments.seed,
    )  # fmt: skip
    for prompt, text in zip(prompts, texts):
        print(f"{prompt}{text}")
        if len(prompts) > 1:
            print("-" * 40)
    if arguments.json:
        common.print_json({"samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]})


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(sample))
