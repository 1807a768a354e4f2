"""Tasks on real text, with their answers, from what is installed; nothing is downloaded.

    kind        a line of text -> python, c, english            "kind:static void free_row(=" -> "c"
    category    a character's name -> its general category      "category:LATIN SMALL LETTER THORN=" -> "Ll"
    completion  a line of Python -> the name that it ends with  "completion:return os.path.=" -> "join"
    language    a piece of office help -> its language          "language:Spalten gleichmäßig verteilen=" -> "de"

The first three are made of the standard library, its language reference, C headers of numpy, scipy and jaxlib, and
Python's table of Unicode (PSF, BSD, Apache, Unicode licences): every installation has them, and their questions
follow the installed versions. `language` is there once `scripts/prepare_data.py --out=runs/corpus` was run where office
help is installed (MPL-2.0).
"""

import collections
import heapq
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moe_zoo.data.corpus import hash64
from moe_zoo.data.embedded import character_lines, header_files, python_files, reference_topics
from moe_zoo.data.errors import DataError
from moe_zoo.data.installed import LANGUAGES

#: the prepared corpus that `language` is read from
PREPARED = Path("runs/corpus")
_SHORTEST, _LONGEST = 12, 40  # bytes of a question
_PER_CATEGORY = 500

# (question, answer)
Questions = list[tuple[str, str]]


def kind(count: int) -> Questions:
    """Lines of three kinds of text, as many of each; one that is of several kinds counts as the first."""
    texts = {
        "python": (text for _, text in python_files()),
        "c": header_files(),
        "english": (text for _, text in reference_topics()),
    }
    found: dict[str, str] = {}
    for name, all_of in texts.items():
        for line in _first(_lines(all_of), count // len(texts)):
            found.setdefault(line, name)
    return list(found.items())


def category(count: int) -> Questions:
    """Names of characters, at most 500 of a category."""
    found = collections.defaultdict(list)
    for _, line in character_lines():
        character, name = line[0], line[2:-1]
        if len(name) <= _LONGEST:
            found[unicodedata.category(character)].append(name)
    answers = {name: answer for answer, names in found.items() for name in _first(names, _PER_CATEGORY)}
    return [(name, answers[name]) for name in _first(answers, count)]


def completion(count: int) -> Questions:
    """Lines of Python whose last word is a name of three to nine letters, cut before it."""
    pattern = re.compile(rf"(.{{{_SHORTEST},{_LONGEST}}}[ .(\[])([A-Za-z_]{{3,9}})\W*")
    found = {}
    for _, text in python_files():
        for line in text.splitlines():
            match = pattern.fullmatch(line.strip())
            if match and line.isascii():
                found[match[1]] = match[2]
    return [(question, found[question]) for question in _first(found, count)]


def language(count: int) -> Questions:
    """Beginnings of paragraphs in eight languages, as many of each. Raises DataError if the corpus is not there."""
    missing = [name for name in LANGUAGES if not (PREPARED / f"help_{name}").is_dir()]
    if missing:
        raise DataError(
            f"{PREPARED} has no help_{missing[0]}: scripts/prepare_data.py --out={PREPARED} makes it where office help "
            "is installed"
        )
    return [
        (piece, name) for name in LANGUAGES for piece in _first(_pieces(PREPARED / f"help_{name}"), count // 8)
    ]  # fmt: skip


REAL_TASKS: dict[str, Callable[[int], Questions]] = {
    "kind": kind, "category": category, "completion": completion, "language": language,
}  # fmt: skip


def _first(texts: Iterable[str], count: int) -> list[str]:
    """So many different ones, by their hash: the same whatever the order of files."""
    return heapq.nsmallest(count, set(texts), key=hash64)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of several words in printable ASCII that are neither long nor short."""
    for text in texts:
        for line in text.splitlines():
            line = line.strip()
            if _SHORTEST <= len(line) <= _LONGEST and line.isascii() and line.isprintable() and " " in line:
                yield line


def _pieces(folder: Path) -> Iterator[str]:
    """The beginning of every paragraph, up to so many bytes."""
    for file in sorted(folder.glob("*.jsonl")):
        for record in file.read_text(encoding="utf-8").splitlines():
            for paragraph in json.loads(record)["text"].split("\n"):
                piece = paragraph.encode("utf-8")[:_LONGEST].decode("utf-8", errors="ignore").strip()
                # a single word of ASCII may be of any language
                if len(piece.encode("utf-8")) >= _SHORTEST and (" " in piece or not piece.isascii()):
                    yield piece
