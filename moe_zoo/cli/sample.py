"""Continue a prompt: sample.py --workdir=runs/quickstart --prompt='def main('

Chat with a published model: sample.py --workdir=DIR --chat (asks on the terminal; one question with --prompt).
"""

import sys
from collections.abc import Sequence

from moe_zoo.cli import common


def sample(argv: Sequence[str]) -> None:
    """Prints a continuation of every prompt, or the answers of a conversation, as they come."""
    parser = common.Parser(prog="sample", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run, or a published directory")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times", default=None)
    parser.add_argument("--chat", action="store_true", help="prompts are turns of one conversation; none: ask for them")
    parser.add_argument("--system", default=None, help="with --chat: the system message")
    parser.add_argument("--tokens", type=int, default=200, help="how many at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--stop", action="append", default=None, help="text that ends it; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("a run's config is fixed; --config.KEY=VALUE is for train.py")
    if arguments.system is not None and not arguments.chat:
        raise common.ConfigError("--system needs --chat")

    from moe_zoo.inference import load
    from moe_zoo.inference.sampling import Sampling

    how = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    try:
        Sampling(**how)
        if arguments.tokens < 1 or "" in (arguments.stop or ()):
            raise ValueError("expected --tokens >= 1 and a --stop of at least one character")
    except ValueError as error:
        raise common.ConfigError(str(error)) from error
    loaded = load(arguments.workdir)
    if not loaded.model.causal:
        raise common.ConfigError(f"router {loaded.config.router.name!r} is not causal: it cannot generate text")
    how |= {"seed": arguments.seed, "stop": arguments.stop or ()}
    samples = _chat(loaded, arguments, how) if arguments.chat else _continue(loaded, arguments, how)
    if arguments.json:
        common.print_json({"samples": samples})


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _continue(loaded, arguments, how) -> list[dict[str, str]]:
    """One prompt as it comes; several in one batch, and printed when all are done."""
    prompts = arguments.prompt or [""]
    if len(prompts) == 1:
        _write(prompts[0])
        how = {**how, "on_text": lambda row, piece: _write(piece)}
    texts = loaded.generate(prompts, arguments.tokens, **how)
    for prompt, text in zip(prompts, texts):
        print("" if len(prompts) == 1 else f"{prompt}{text}\n{'-' * 40}")
    return [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]


def _chat(loaded, arguments, how) -> list[dict[str, str]]:
    """Every prompt is a turn that sees the ones before it."""
    messages = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    samples = []
    for question in arguments.prompt or _asked():
        messages.append({"role": "user", "content": question})
        answer = loaded.chat(messages, arguments.tokens, on_text=_write, **how)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
        samples.append({"prompt": question, "text": answer})
    return samples


def _asked():
    """Lines typed until the end of input."""
    while True:
        if sys.stdin.isatty():
            _write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(sample))
