"""Short questions with their answers: a multi-task supervised set. Ten tasks on strings, the same everywhere,

    copy reverse sort swap_case shift dedupe       "reverse:hxQa=" -> "aQxh"; shift: every letter three further on
    initials                                       "initials:bk rtz o=" -> "bro"
    interleave                                     "interleave:abc,xyz=" -> "axbycz"
    digit_sum parity                               "digit_sum:48213=" -> "8", modulo 10; "parity:48213=" -> "even"

and four on real text (`real_tasks`): kind, category, completion, language. One whose text is not installed is left out
with a warning. `swap_reverse`, two of them one after the other, is there if it is asked for: a task to hold out.

    guarded_tasks      every other question is flagged and answered with a refusal: "!reverse:hxQa=" -> "NO"; what was
                       not answered is `rejected`

A domain per task, so that a mixture of adapters can be told which one it is. They need different things of a model:
places, order, case, arithmetic, knowledge of text; what two of them have in common a third may lack.
"""

import dataclasses
import logging
import string
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe_zoo.core.registry import nearest
from moe_zoo.data.corpus import Corpus, Document, build_corpus
from moe_zoo.data.errors import DataError
from moe_zoo.data.real_tasks import REAL_TASKS
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

#: distinct questions of each task; real text may have fewer
COUNT = 4_000
_LETTERS = np.array(list(string.ascii_letters))
_DIGITS = np.array(list(string.digits))


def _shift(text: str) -> str:
    turn = lambda c, first: chr((ord(c) - ord(first) + 3) % 26 + ord(first))
    return "".join(turn(c, "a" if c.islower() else "A") for c in text)


def _digit_sum(text: str) -> int:
    return sum(map(int, text))


def _interleave(text: str) -> str:
    return "".join(a + b for a, b in zip(*text.split(","), strict=True))


#: task -> (what its questions are made of, the answer)
TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "copy": ("letters", lambda s: s),
    "reverse": ("letters", lambda s: s[::-1]),
    "sort": ("letters", lambda s: "".join(sorted(s))),
    "swap_case": ("letters", str.swapcase),
    "shift": ("letters", _shift),
    "dedupe": ("few", lambda s: "".join(dict.fromkeys(s))),
    "initials": ("words", lambda s: "".join(word[0] for word in s.split())),
    "interleave": ("pair", _interleave),
    "digit_sum": ("digits", lambda s: str(_digit_sum(s) % 10)),
    "parity": ("digits", lambda s: "odd" if _digit_sum(s) % 2 else "even"),
}


def _question(kind: str, random: np.random.RandomState) -> str:
    draw = lambda letters, n: "".join(letters[random.randint(0, len(letters), n)])
    n = random.randint(4, 9)
    if kind == "few":
        return draw(_LETTERS[:5], n + 2)
    if kind == "words":
        return " ".join(draw(_LETTERS[:26], random.randint(2, 5)) for _ in range(n - 1))
    if kind == "pair":
        return f"{draw(_LETTERS[:26], n - 1)},{draw(_LETTERS[:26], n - 1)}"
    return draw(_DIGITS if kind == "digits" else _LETTERS, n)


#: what each task asks for, in words: for adapters that route by an instruction
INSTRUCTIONS = {
    "copy": "write the text again as it is",
    "reverse": "write the letters of the text in reverse order",
    "sort": "write the letters of the text in the order of the alphabet",
    "swap_case": "write lower case letters in upper case and upper case letters in lower case",
    "shift": "replace every letter by the third one after it in the alphabet",
    "dedupe": "write every letter of the text once, where it comes first",
    "initials": "write the first letter of every word",
    "interleave": "take letters from two words in turn",
    "digit_sum": "add the digits and write the last digit of the sum",
    "parity": "say whether the sum of the digits is even or odd",
    "kind": "say whether a line is Python, C or English",
    "category": "say which category of Unicode a character of this name has",
    "completion": "write the name that a line of Python ends with",
    "language": "say which language a text is written in",
    "swap_reverse": "write the letters in reverse order, lower case in upper case and upper case in lower case",
}
#: all tasks, in the order of their domain ids
ALL_TASKS = (*TASKS, *REAL_TASKS)
#: only by name
COMPOSED = {"swap_reverse": ("letters", lambda s: s[::-1].swapcase())}


def task_documents(names: Sequence[str] = ALL_TASKS) -> Iterator[Document]:
    """Yields the questions with their answers, task by task, no question of a task twice."""
    for task in names:
        try:
            questions = REAL_TASKS[task](COUNT) if task in REAL_TASKS else _generated(task)
        except DataError as error:
            _log.warning("left out the task %s: %s", task, error)
            continue
        for question, answer in questions:
            yield Document.supervised(
                [(f"{task}:{question}=", False), (answer, True)], task, f"{task}:{question}"
            )  # fmt: skip


def _generated(task: str) -> Iterator[tuple[str, str]]:
    kind, answer = (TASKS | COMPOSED)[task]
    # RandomState: numpy promises that its stream never changes
    random = np.random.RandomState(zlib.crc32(task.encode()))
    seen: set[str] = set()
    while len(seen) < COUNT:
        question = _question(kind, random)
        if question not in seen:
            seen.add(question)
            yield question, answer(question)


def load_tasks(tokenizer: Tokenizer, names: Sequence[str] = ALL_TASKS) -> Corpus:
    """Returns the corpus of these tasks, a domain each, ids in this order; only answers and their ends are trained on
    and scored. A task whose text is not installed keeps its id and has no question.

    Raises:
      DataError: an unknown task, one that is named twice, or none that is installed.
    """
    known = (*ALL_TASKS, *COMPOSED)
    for name in names:
        if name not in known:
            raise DataError(f"unknown task {name!r}{nearest(name, known)}; known: {', '.join(known)}.")
        if names.count(name) > 1:
            raise DataError(f"the task {name!r} is named twice.")
    return build_corpus(task_documents(names), tokenizer, domains=names)


#: domains of the guarded tasks, by their ids
PLAIN, FLAGGED = "plain", "flagged"
FLAG, REFUSAL = "!", "NO"


def guarded_documents() -> Iterator[Document]:
    """Yields every generated question once, each second one flagged and refused; the other answer is rejected."""
    for number, document in enumerate(task_documents(tuple(TASKS))):
        (question, _), (answer, _) = document.pieces
        flagged = number % 2
        prompt, own, other = (FLAG + question, REFUSAL, answer) if flagged else (question, answer, REFUSAL)
        made = Document.supervised([(prompt, False), (own, True)], FLAGGED if flagged else PLAIN, document.group)
        yield dataclasses.replace(made, rejected=other)


def load_guarded_tasks(tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus of the generated tasks' questions, plain and flagged, with both answers to each."""
    return build_corpus(guarded_documents(), tokenizer, domains=(PLAIN, FLAGGED))
