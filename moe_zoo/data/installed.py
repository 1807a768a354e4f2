"""Text that packages of an operating system bring along, by domain: where it may lie, and how it is read.

Nothing is downloaded and nothing needs to be installed: a root is `/`, or any folder that packages were unpacked into
(`dpkg-deb -x PACKAGE.deb FOLDER`). Of several versions the newest is read.

  help_de, help_en, ...  office help, the same pages in every language; without what is not translated from English
  go                     source code of Go's standard library, without generated files
  mathematics            formal proofs (set.mm)
  sql_manual             the PostgreSQL manual
  dictionary             a dictionary of English
  perl_manual            Perl's manual, in its own markup (POD)
  python_manual          Python's documentation, in its own markup (reStructuredText)
  essays                 political essays
  glosses                words and what they mean, a line each (WordNet)
"""

import collections
import dataclasses
import gzip
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_zoo.core.registry import nearest
from moe_zoo.data.errors import DataError
from moe_zoo.data.markup import html_paragraphs, joined

_log = logging.getLogger(__name__)

#: of office help, as its folders are called; any other that is there can be asked for too
LANGUAGES = {"en": "en-US", "de": "de", "fr": "fr", "es": "es", "ru": "ru", "ja": "ja", "zh": "zh-CN", "ko": "ko"}
_HELP = "help_"

# (name of the document within its source, text)
Texts = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a domain comes from.

    Attributes:
      provided_by: what brings it, for people.
      licence: of the text.
      patterns: globs below a root of the one folder or file.
      read: from that to (name, text) of all documents, sorted.
      paragraphs: documents are paragraphs, of which repeated ones are dropped.
    """

    provided_by: str
    licence: str
    patterns: tuple[str, ...]
    read: Callable[[Path], Texts]
    paragraphs: bool = False

    def find(self, roots: Sequence[Path]) -> Path | None:
        """Returns the newest version in the first root that has any."""
        for root in roots:
            found = {path for pattern in self.patterns for path in root.glob(pattern)}
            if found:
                return max(found, key=lambda path: _natural(path.relative_to(root).as_posix()))
        return None


def source(domain: str) -> Source:
    """Returns the source of `domain`. Raises DataError with the nearest name for one that nobody knows."""
    if domain in _SOURCES:
        return _SOURCES[domain]
    language = domain.removeprefix(_HELP)
    if domain.startswith(_HELP) and re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*", language):
        return _help(LANGUAGES.get(language, language))
    raise DataError(
        f"unknown domain {domain!r}{nearest(domain, DOMAINS)}; known: {', '.join(DOMAINS)}, {_HELP}LANGUAGE"
    )


def family(domain: str) -> str:
    """Returns what domains of the same documents in several languages have in common; the name of any other."""
    return "help" if domain.startswith(_HELP) else domain


def read(domain: str, path: Path, roots: Sequence[Path]) -> tuple[list[tuple[str, str]], collections.Counter[str]]:
    """Returns ([(name, text)] of all documents at `path`, {why: bytes that were dropped}).

    Raises:
      DataError: office help whose English pages are not below `roots`: what is translated could not be told.
    """
    here, dropped = source(domain), collections.Counter()
    if not here.paragraphs:
        return list(here.read(path)), dropped
    english: set[str] = set()
    if domain.startswith(_HELP) and domain != f"{_HELP}en":
        original = source(f"{_HELP}en").find(roots)
        if original is None:
            provided = source(f"{_HELP}en").provided_by
            raise DataError(f"{domain}: what is not translated cannot be told without the English pages ({provided}).")
        english = {p for _, text in here.read(original) for p in text.split("\n\n")}
    seen: set[str] = set()
    documents = []
    for name, text in here.read(path):
        kept = []
        for paragraph in text.split("\n\n"):
            why = "untranslated" if paragraph in english else "repeated" if paragraph in seen else ""
            if why:
                dropped[why] += len(paragraph.encode("utf-8"))
            else:
                kept.append(paragraph)
                seen.add(paragraph)
        documents.append((name, "\n\n".join(kept) + "\n"))
    return documents, dropped


# --- readers ---------------------------------------------------------------------------------------------------------


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sorts 3.9 before 3.11."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text)]


def _text(path: Path, errors: str = "strict") -> str | None:
    """Returns the content, uncompressed; None (and a line in the log) where it cannot be read."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        return raw.decode("utf-8", errors).replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        _log.info("skipping %s: %s", path, error)
        return None


def _files(*suffixes: str, without: tuple[str, ...] = ()) -> Callable[[Path], Texts]:
    """A reader of all files with one of these suffixes below a folder, but in no folder called as in `without`."""

    def read(folder: Path) -> Texts:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.name.endswith(suffixes) or set(name.parts[:-1]) & set(without) or not path.is_file():
                continue
            if (text := _text(path)) is not None:
                yield name.as_posix(), text

    return read


def _pages(folder: Path) -> Texts:
    """HTML pages, paragraphs with blank lines between; those within preformatted text become single line ends."""
    for name, page in _files(".html", ".htm")(folder):
        yield name, "\n\n".join(re.sub(r"\n\s*\n", "\n", paragraph) for paragraph in html_paragraphs(page))


def _go(folder: Path) -> Texts:
    for name, text in _files(".go", without=("testdata", "vendor"))(folder):
        if not re.search(r"^// .*(?i:code generated|do not edit)", text[:4000], re.M):
            yield name, text


def _numbered(path: Path, entries: Iterator[str]) -> Texts:
    yield from ((f"{path.name}:{i:06}", text) for i, text in enumerate(joined(entries)))


def _proofs(path: Path) -> Texts:
    text = _text(path) or ""
    return _numbered(path, (statement + "\n\n" for statement in re.split(r"\n\s*\n", text) if statement.strip()))


def _dictionary(path: Path) -> Texts:
    """Entries of a file for dictd: a headword at the start of a line, the rest indented. Those that say a source or a
    pronunciation are words, all others the file's own header."""
    entries = re.split(r"\n(?=\S)", _text(path, errors="replace") or "")
    words = (e for e in entries if re.match(r"[^\n]*\\", e) or re.search(r"\[(1913 Webster|PJC|WordNet 1\.\d)", e))
    # some entries hold bytes of another encoding
    return _numbered(path, (word.rstrip() + "\n\n" for word in words if "\ufffd" not in word))


def _glosses(folder: Path) -> Texts:
    for path in sorted(folder.glob("data.*")):
        yield from _numbered(path, _synsets(_text(path) or ""))


def _synsets(text: str) -> Iterator[str]:
    """Yields "word, word: gloss" lines of a WordNet data file, whose lines are `offset file type count (word id)* ..
    | gloss`, count in hexadecimal; its licence is indented."""
    for line in text.splitlines():
        fields, _, gloss = line.partition(" | ")
        fields = fields.split()
        if line[:1].isdigit() and gloss and len(fields) > 4:
            words = [re.sub(r"\(.*?\)$", "", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            yield f"{', '.join(words)}: {gloss.strip()}\n".replace("_", " ")


# --- sources ---------------------------------------------------------------------------------------------------------


def _help(folder: str) -> Source:
    places = ("usr/share/libreoffice*", "usr/lib*/libreoffice*", "opt/libreoffice*")
    return Source(
        f"Debian package libreoffice-help-{folder.lower()}, or LibreOffice's own help packages",
        "MPL-2.0",
        tuple(f"{place}/help/{folder}/text" for place in places),
        _pages,
        paragraphs=True,
    )


_SOURCES = {
    "go": Source(
        "Debian package golang-src, or any installation of Go",
        "BSD-3-Clause",
        ("usr/share/go*/src", "usr/lib/go*/src", "usr/lib/golang/src", "usr/local/go/src"),
        _go,
    ),
    "mathematics": Source(
        "Debian package metamath-databases", "CC0-1.0", ("usr/share/metamath/**/set.mm",), _proofs
    ),
    "sql_manual": Source(
        "Debian package postgresql-doc", "PostgreSQL", ("usr/share/doc/postgresql*/html",), _pages, paragraphs=True
    ),
    "dictionary": Source(
        "Debian package dict-gcide", "GPL-2.0-or-later", ("usr/share/dictd/gcide.dict.dz",), _dictionary
    ),
    "perl_manual": Source(
        "Debian package perl-doc",
        "Artistic-1.0-Perl OR GPL-1.0-or-later",
        ("usr/share/perl*/*/pod", "usr/share/perl*/pod", "usr/lib*/perl5/*/pod", "usr/local/lib/perl5/*/pod"),
        _files(".pod"),
    ),
    "python_manual": Source(
        "Debian package python3-doc", "PSF-2.0", ("usr/share/doc/python3*/html/_sources",), _files(".rst.txt", ".rst")
    ),
    "essays": Source(
        "Debian package anarchism",
        "GPL-2.0-or-later OR GFDL-1.1-or-later",
        ("usr/share/doc/anarchism/html",),
        _pages,
        paragraphs=True,
    ),
    "glosses": Source("Debian package wordnet-base", "WordNet", ("usr/share/wordnet*",), _glosses),
}  # fmt: skip

#: eight languages of the same text, eight kinds of English text
DOMAINS = (*(f"{_HELP}{language}" for language in LANGUAGES), *_SOURCES)
