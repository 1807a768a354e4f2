"""Questions of arithmetic with their answers: a supervised set that is generated, the same on every machine.

addition        "417+86=" -> "503", both below 1000
subtraction     "417-86=" -> "331", both below 1000, never below zero
multiplication  "41*86=" -> "3526", both below 100
"""

from collections.abc import Iterator

import numpy as np

from moe_zoo.data.corpus import Corpus, Document, build_corpus
from moe_zoo.data.tokenizer import Tokenizer

DOMAINS = ("addition", "subtraction", "multiplication")
# Distinct questions of each domain; of products of two numbers below 100 there are 10,000 in all.
_COUNTS = (20_000, 20_000, 8_000)
_BELOW = (1000, 1000, 100)


def arithmetic_documents() -> Iterator[Document]:
    """Yields the questions with their answers, domain by domain, no question twice.

    3+5 and 5+3 are of one group: a split never trains on the one and tests on the other.
    """
    # RandomState: numpy promises that its stream never changes.
    random = np.random.RandomState(0)
    for domain, count, below in zip(DOMAINS, _COUNTS, _BELOW, strict=True):
        numbers = np.arange(below * below)
        if domain == "subtraction":
            numbers = numbers[numbers // below >= numbers % below]
        for number in random.permutation(numbers)[:count].tolist():
            a, b = divmod(number, below)
            sign, answer = {"addition": ("+", a + b), "subtraction": ("-", a - b), "multiplication": ("*", a * b)}[
                domain
            ]
            group = f"{max(a, b)}{sign}{min(a, b)}"
            yield Document.supervised([(f"{a}{sign}{b}=", False), (str(answer), True)], domain, group)


def load_arithmetic(tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus of all questions; only the answers and their ends are trained on and scored."""
    return build_corpus(arithmetic_documents(), tokenizer, domains=DOMAINS)
