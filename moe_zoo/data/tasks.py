"""Ten tasks on short strings, with their answers: a multi-task supervised set that is generated, the same everywhere.

    copy reverse sort swap_case shift dedupe       "reverse:hxQa=" -> "aQxh"; shift: every letter three further on
    initials                                       "initials:bk rtz o=" -> "bro"
    interleave                                     "interleave:abc,xyz=" -> "axbycz"
    digit_sum parity                               "digit_sum:48213=" -> "8", modulo 10; "parity:48213=" -> "even"

    guarded_tasks                                  every other question is flagged and answered with a refusal:
                                                   "!reverse:hxQa=" -> "NO"; what was not answered is `rejected`

A domain per task, so that a mixture of adapters can be told which one it is. They need different things of a model:
places, order, case, arithmetic; what two of them have in common a third may lack.
"""

import dataclasses
import string
from collections.abc import Callable, Iterator

import numpy as np

from moe_zoo.data.corpus import Corpus, Document, build_corpus
from moe_zoo.data.tokenizer import Tokenizer

#: distinct questions of each task
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


def task_documents() -> Iterator[Document]:
    """Yields the questions with their answers, task by task, no question of a task twice."""
    # RandomState: numpy promises that its stream never changes
    random = np.random.RandomState(0)
    for task, (kind, answer) in TASKS.items():
        seen: set[str] = set()
        while len(seen) < COUNT:
            question = _question(kind, random)
            if question not in seen:
                seen.add(question)
                yield Document.supervised(
                    [(f"{task}:{question}=", False), (answer(question), True)], task, f"{task}:{question}"
                )


def load_tasks(tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus of all questions; only the answers and their ends are trained on and scored."""
    return build_corpus(task_documents(), tokenizer, domains=tuple(TASKS))


#: domains of the guarded tasks, by their ids
PLAIN, FLAGGED = "plain", "flagged"
FLAG, REFUSAL = "!", "NO"


def guarded_documents() -> Iterator[Document]:
    """Yields every question once, each second one of a task flagged and refused; the other answer is rejected."""
    for number, document in enumerate(task_documents()):
        (question, _), (answer, _) = document.pieces
        flagged = number % 2
        prompt, own, other = (FLAG + question, REFUSAL, answer) if flagged else (question, answer, REFUSAL)
        made = Document.supervised([(prompt, False), (own, True)], FLAGGED if flagged else PLAIN, document.group)
        yield dataclasses.replace(made, rejected=other)


def load_guarded_tasks(tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus of all questions, plain and flagged, with both answers to each."""
    return build_corpus(guarded_documents(), tokenizer, domains=(PLAIN, FLAGGED))
