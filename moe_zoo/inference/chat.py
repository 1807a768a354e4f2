"""Chat templates of published tokenizers, as transformers renders them (`apply_chat_template`).

A template is a program that came with the weights. It runs in jinja2's immutable sandbox: no attributes of Python
objects, no imports, no files. Its loops and calls are counted, and products of strings and powers of numbers limited,
so it cannot go on forever either.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_zoo.checkpoints import CheckpointError

_MOST_STEPS = 200_000  # turns of loops and calls of one rendering
_MOST_CHARACTERS = 10_000_000
_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

Messages = Sequence[Mapping[str, Any]]


def render(folder: Path, messages: Messages, **variables: Any) -> str:
    """The prompt that the template in `folder` makes of `messages`, each with "role" and "content".

    `variables` are the template's own (`tools`, `enable_thinking`). `add_generation_prompt`, True unless given: end
    with the opening of the assistant's turn.

    Raises CheckpointError when there is no template, when it is refused or refuses, or when jinja2 is missing.
    """
    check(messages)
    source, specials = read(folder)
    environment = _environment()
    import jinja2

    given = {"add_generation_prompt": True, "tools": None, "documents": None, **specials, **variables}
    pieces, size = [], 0
    try:
        for piece in environment.from_string(source).generate(messages=[dict(m) for m in messages], **given):
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_CHARACTERS:
                raise _TooMuch(f"writes more than {_MOST_CHARACTERS} characters")
    except (
        jinja2.TemplateError,
        _TooMuch,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{folder}: its chat template fails: {type(error).__name__}: {error}") from error
    return "".join(pieces)


def check(messages: Messages) -> None:
    """Raises ValueError for what is no conversation."""
    if isinstance(messages, str | Mapping) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"messages: expected [{{'role': ..., 'content': ...}}, ...], got {messages!r:.80}")
    for i, message in enumerate(messages):
        if "role" not in message:
            raise ValueError(f"messages[{i}]: no 'role', expected system, user or assistant; keys {sorted(message)}")


def read(folder: Path) -> tuple[str, dict[str, str]]:
    """(template, special tokens by name): chat_template.jinja, else "chat_template" of tokenizer_config.json."""
    config = _json(folder / "tokenizer_config.json")
    specials = {name: config[name] for name in _SPECIALS if config.get(name)}
    specials = {name: token["content"] if isinstance(token, dict) else token for name, token in specials.items()}
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default", next(iter(named.values()), None))
    if not isinstance(source, str):
        raise CheckpointError(
            f"{folder} has no chat template (chat_template.jinja, or 'chat_template' in tokenizer_config.json): a base "
            "model, most likely; use generate"
        )
    return source, specials


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


class _TooMuch(Exception):
    pass


class _Budget:
    """Counts what a template does."""

    def __init__(self):
        self.left = _MOST_STEPS

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _TooMuch(f"more than {_MOST_STEPS} loop turns and calls")

    def counted(self, items):
        for item in items:
            self.step()
            yield item


def _environment():
    """A fresh one per rendering: it holds the budget."""
    try:
        import jinja2
    except ImportError as error:
        raise CheckpointError("chat templates need jinja2: pip install 'moe-zoo[tokenizers]'") from error
    from jinja2 import ext, nodes, sandbox

    budget = _Budget()

    def bounded(value):
        if hasattr(value, "__len__") and len(value) > _MOST_CHARACTERS:
            raise _TooMuch(f"a value of more than {_MOST_CHARACTERS} characters")
        return value

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def _parse(self, source, name, filename):
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
            for joined in list(tree.find_all(nodes.Concat)):  # `~`, which may double a string at every turn
                joined.nodes = [nodes.Filter(n, "_bounded", [], [], None, None, lineno=n.lineno) for n in joined.nodes]
            return tree

        def call(self, context, function, *args, **kwargs):
            budget.step()
            return super().call(context, function, *args, **kwargs)

        def call_binop(self, context, operator, left, right):
            budget.step()
            size = lambda x: len(x) if hasattr(x, "__len__") else abs(x)
            if operator == "*" and any(hasattr(x, "__len__") for x in (left, right)):
                if size(left) * size(right) > _MOST_CHARACTERS:
                    raise _TooMuch(f"a product of more than {_MOST_CHARACTERS} characters")
            if operator == "**" and (abs(left) > 1e6 or abs(right) > 100):
                raise _TooMuch(f"the power {left} ** {right}")
            return bounded(super().call_binop(context, operator, left, right))

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant said, for training; here it only encloses it."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation])
    made.filters |= {"tojson": tojson, "_counted": budget.counted, "_bounded": bounded}
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.datetime.now().strftime(pattern),
    }
    return made
