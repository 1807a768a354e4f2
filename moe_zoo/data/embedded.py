"""The embedded corpus: real text that every installation already has.

Five domains from the standard library and from the packages that the project depends on. Nothing is downloaded. The
text follows the installed versions, so a result on it is quoted with the Python version and the fingerprint.

  python_code       source files of the standard library
  reference_prose   the Python language reference as `help()` prints it, one document per topic
  docstrings        long docstrings of the standard library, one document per file
  c_headers         C headers of numpy, scipy and jaxlib
  character_names   characters of every script with their Unicode names, in documents of 4 to 8 kB
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.data.corpus import Corpus, Document, build_corpus, load_saved_corpus, save_corpus
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

DOMAINS = ("python_code", "reference_prose", "docstrings", "c_headers", "character_names")
HEADER_PACKAGES = ("numpy", "scipy", "jaxlib")

# Part of the cache's key: raise it when the text that this file produces changes.
_VERSION = 1

# Tests (absent from some distributions), tables that are data rather than code, what is not the standard library, and
# pydoc_data, which is the reference_prose domain.
_EXCLUDED_FOLDERS = frozenset(
    "test tests site-packages dist-packages idlelib lib2to3 encodings pydoc_data unittest __pycache__".split()
)
_MIN_DOCSTRING = 200  # characters; shorter ones are mostly signatures in words
_NAMES_MIN, _NAMES_MAX = 4_000, 8_000  # bytes per document of character names


def python_files() -> Iterator[tuple[str, str]]:
    """Yields (path relative to the standard library, source), sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _EXCLUDED_FOLDERS)
        for name in sorted(files):
            # _sysconfigdata*.py holds the paths and flags of the machine that Python was built on.
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            try:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                skipped += 1
    if skipped:
        _log.info("embedded corpus: skipped %d Python files that are not UTF-8 or not readable", skipped)


def _docstrings(source: str) -> list[str]:
    """Returns the docstrings of `source` longer than `_MIN_DOCSTRING` characters, in order, without indentation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > _MIN_DOCSTRING]


def reference_topics() -> Iterator[tuple[str, str]]:
    """Yields (topic, text), sorted; nothing where a distribution leaves the module out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        _log.warning("embedded corpus: this Python has no pydoc_data.topics; the domain reference_prose is empty")
        return
    yield from sorted(topics.items())


def header_files() -> Iterator[str]:
    """Yields the C headers of `HEADER_PACKAGES`, sorted by package and path."""
    skipped = 0
    for package in HEADER_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            _log.info("embedded corpus: %s is not installed; its headers are left out", package)
            continue
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.h")):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                skipped += 1
    if skipped:
        _log.info("embedded corpus: skipped %d headers that are not UTF-8 or not readable", skipped)


def character_lines() -> Iterator[tuple[str, str]]:
    """Yields (script, "character name" line) for characters whose name is more than their code point."""
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        # CJK, Tangut, Nushu and Khitan names end in the code point; Hangul syllables' are spelled by a rule.
        if not name or name.endswith(f"-{code:04X}") or name.startswith("HANGUL SYLLABLE"):
            continue
        yield name.split(" ", 1)[0], f"{chr(code)} {name}\n"


def _character_documents() -> Iterator[str]:
    """Yields documents of 4 to 8 kB, cut where the script changes if that is in reach."""
    lines, size, previous = [], 0, None
    for script, line in character_lines():
        length = len(line.encode("utf-8"))
        if (script != previous and size >= _NAMES_MIN) or size + length > _NAMES_MAX:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += length
        previous = script
    if lines:
        yield "".join(lines)


def embedded_documents() -> Iterator[Document]:
    """Yields the documents of the embedded corpus.

    A file's docstrings are also in its code, so both documents are of one group: a split never trains on the one and
    tests on the other.
    """
    files = list(python_files())
    for path, source in files:
        yield Document(source, "python_code", group=path)
    for topic, text in reference_topics():
        yield Document(text, "reference_prose", group=f"topic:{topic}")
    for path, source in files:
        if found := _docstrings(source):
            yield Document("\n\n".join(found) + "\n", "docstrings", group=path)
    for text in header_files():
        yield Document(text, "c_headers")
    for text in _character_documents():
        yield Document(text, "character_names")


def cache_folder() -> Path:
    """Returns `$MOE_ZOO_CACHE`, or `~/.cache/moe_zoo`; it need not exist."""
    return Path(os.environ.get("MOE_ZOO_CACHE") or "~/.cache/moe_zoo").expanduser()


def _cache_path(tokenizer: Tokenizer) -> Path:
    versions = [str(_VERSION), platform.python_version(), sysconfig.get_paths()["stdlib"], tokenizer.name]
    for package in HEADER_PACKAGES:
        try:
            versions.append(f"{package}=={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    key = hashlib.blake2b("\n".join(versions).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"embedded-{key}.npz"


def load_embedded(tokenizer: Tokenizer, *, cache: bool = True) -> Corpus:
    """Returns the embedded corpus, from the cache if it is there (see `cache_folder`), else made and cached.

    A cache that cannot be read or written costs time, never the result; the log says so.
    """
    try:
        path = _cache_path(tokenizer) if cache else None
    except RuntimeError as error:  # no home directory
        _log.warning("embedded corpus: no place for a cache: %s", error)
        path = None
    if path is not None:
        try:
            return _report(load_saved_corpus(path))
        except FileNotFoundError:
            pass
        except (DataError, OSError) as error:
            _log.warning("embedded corpus: not using the cache: %s", error)
    corpus = build_corpus(embedded_documents(), tokenizer, domains=DOMAINS, deduplicate=True)
    if path is not None:
        try:
            save_corpus(corpus, path)
        except OSError as error:
            _log.warning("embedded corpus: not cached in %s: %s", path.parent, error)
    return _report(corpus)


def _report(corpus: Corpus) -> Corpus:
    sizes = ", ".join(f"{name} {size:,}" for name, size in corpus.bytes_per_domain().items())
    _log.info(
        "embedded corpus: %d documents, bytes: %s; fingerprint %s (Python %s)",
        len(corpus), sizes, corpus.fingerprint, platform.python_version(),
    )  # fmt: skip
    return corpus
