r"""From a record's fields to a document: plain text, a question with its answer, or a conversation.

  text                                      trained on whole
  prompt (or instruction, question),
  answer (or completion, response, output)  prompt + answer, exactly as they are; trained on the answer and its end. For
                                            an instruction: instruction, blank line, input if there is one, blank line
  and rejected                              another answer, for objectives that compare two; trained on by no other
  messages                                  [{"role": .., "content": ..}, ..]: "<|role|>\ncontent<|end|>\n" each, the
                                            layout of Phi-3; trained on what follows "<|assistant|>\n"

With several of these `text` comes first, then `messages`. Every form may have a `domain`, and `text` a `group`:
documents of one group never part in a split (the same page in several languages). Prompt and answer are
tokenized apart, as they are when a model is given the prompt and writes the answer.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_zoo.core.registry import nearest
from moe_zoo.data.corpus import Document
from moe_zoo.data.errors import DataError

_log = logging.getLogger(__name__)

_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("answer", "completion", "response", "output")
# Every record may be wrong in a way of its own.
_MAX_REASONS = 50
_EXPECTED = "'text', or 'prompt' and 'answer', or 'messages'"


def to_document(record: Mapping[str, Any], domain: str) -> Document | str:
    """Returns the document of a record, or what is wrong with the record. `domain` is for one that does not say."""
    own = record.get("domain")
    if own is not None and not isinstance(own, str):
        return _not_a_string("domain")
    domain = own or domain
    names = [name for name, value in record.items() if value is not None]
    if "text" in names:
        return _plain(record["text"], domain, record.get("group"))
    if "messages" in names:
        return _conversation(record["messages"], domain)
    prompt, answer = _pair_fields(names)
    if prompt and answer:
        return _pair(record, prompt, answer, domain)
    if empty := [name for name in ("text", *_pair_fields(record)) if name in record and record[name] is None]:
        return _not_a_string(empty[0])
    fields = ", ".join(sorted(str(name)[:40] for name in record)[:5])
    return f"no 'text' field (fields: {fields or 'none'}; expected {_EXPECTED}){nearest('text', record)}"


def passed_over(names: Iterable[str]) -> str:
    """Returns the answers' field or fields that `text` comes before; an empty string if there are none."""
    names = set(names)
    prompt, answer = _pair_fields(names)
    if "text" not in names:
        return ""
    return "'messages'" if "messages" in names else repr(answer) if prompt and answer else ""


def choose_columns(names: list[str], strings: list[str]) -> dict[str, str]:
    """Returns {column: field of a record} for a table: the columns of the first form that is there.

    Args:
      names: all columns of the table.
      strings: those that hold text. If none has a known name and there is exactly one, it is the `text`.

    Raises:
      DataError: no form is there.
    """
    domain = {"domain": "domain"} if "domain" in names else {}
    if "text" in strings:
        return {"text": "text"} | domain | ({"group": "group"} if "group" in names else {})
    if "messages" in names:
        return {"messages": "messages"} | domain
    prompt, answer = _pair_fields(names)
    if prompt and answer:
        extra = ["input"] if prompt == "instruction" and "input" in names else []
        extra += ["rejected"] if "rejected" in names else []
        return {name: name for name in (prompt, *extra, answer)} | domain
    if "text" in names:
        raise DataError("the column 'text' does not hold strings.")
    others = [name for name in strings if name != "domain"]
    if len(others) == 1:
        return {others[0]: "text"} | domain
    shown = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
    raise DataError(
        f"no column 'text' (columns: {shown or 'none'}): expected {_EXPECTED}, or a single column of strings"
        f"{nearest('text', names)}."
    )


def keep_good(
    results: Iterable[Document | str | None], unit: str, path: Path, skipped: collections.Counter[str]
) -> Iterator[Document]:
    """Yields the documents among `results` (a `str` says what is wrong with one, None is nothing) and counts the rest.

    Raises:
      DataError: no document at all.
    """
    good = bad = 0
    first = ""
    for number, result in enumerate(results, 1):
        if isinstance(result, Document):
            good += 1
            yield result
        elif result is not None:
            bad += 1
            reason = f"{unit}(s) with {result}"
            skipped[reason if reason in skipped or len(skipped) < _MAX_REASONS else f"{unit}(s) with other faults"] += 1
            first = first or f"{unit} {number}: {result}"
    if not good:
        raise DataError(f"no usable {unit} ({first})." if bad else "the file is empty.")
    if bad:
        _log.warning("%s: skipped %d of %d %ss (first: %s)", path, bad, good + bad, unit, first)


def _pair_fields(names: Iterable[str]) -> tuple[str | None, str | None]:
    names = set(names)
    return next((n for n in _PROMPTS if n in names), None), next((n for n in _ANSWERS if n in names), None)


def _not_a_string(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name!r} that is not a string"


def _plain(text: Any, domain: str, group: Any) -> Document | str:
    if not isinstance(text, str):
        return _not_a_string("text")
    if group is not None and not isinstance(group, str):
        return _not_a_string("group")
    return Document(text, domain, group) if text.strip() else "an empty 'text'"


def _pair(record: Mapping[str, Any], prompt_field: str, answer_field: str, domain: str) -> Document | str:
    prompt, answer = record[prompt_field], record[answer_field]
    extra = record.get("input") if prompt_field == "instruction" else None
    rejected = record.get("rejected")
    given = (prompt_field, prompt), (answer_field, answer), ("input", extra or ""), ("rejected", rejected or "")
    for name, value in given:
        if not isinstance(value, str):
            return _not_a_string(name)
    for name, value in ((answer_field, answer), ("rejected", rejected)):
        if value is not None and not value.strip():
            return f"an empty {name!r}"
    if prompt_field == "instruction":
        prompt = "".join(f"{part}\n\n" for part in (prompt, extra) if part)
    document = Document.supervised([(prompt, False), (answer, True)], domain, group=prompt.strip() or None)
    return dataclasses.replace(document, rejected=rejected)


def _conversation(turns: Any, domain: str) -> Document | str:
    if not isinstance(turns, list):
        return "'messages' that are not a list"
    pieces, answered = [], 0
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return "a message whose 'role' and 'content' are not strings"
        pieces += [(f"<|{role}|>\n", False), (f"{content}<|end|>\n", role == "assistant")]
        if role == "assistant" and content.strip():
            answered = len(pieces)
    if not answered:
        return "'messages' without an answer of the assistant"
    # Turns after the last answer would be context for nothing.
    pieces = pieces[:answered]
    begin = next(i for i, (_, trained) in enumerate(pieces) if trained)
    opening = "".join(text for text, _ in pieces[: begin - 1])
    return Document.supervised(pieces, domain, group=opening.strip() or None)
