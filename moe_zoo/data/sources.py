"""Where a corpus comes from: the embedded one, a file, or a folder of files.

Accepted: `.txt` (one document), `.jsonl` and `.jsonl.gz` (one document a line: `text`, optional `domain`), and folders
of these. What cannot be read is a `DataError` when it was named itself, and a counted, logged skip inside a folder.
"""

import collections
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.core.registry import nearest
from moe_zoo.data.corpus import Corpus, Document, build_corpus
from moe_zoo.data.embedded import load_embedded
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

EMBEDDED = "embedded"
ACCEPTED = (".txt", ".jsonl", ".jsonl.gz")
_ACCEPTED_TEXT = "'embedded', a .txt, .jsonl or .jsonl.gz file, or a folder of those"

# Formats that people have and that have to be converted first.
_KNOWN_OTHERS = tuple(".parquet .zst .arrow .arrayrecord .csv .tsv .json .txt.gz .zip .bz2 .xz".split())
# Fewer bytes than this in all are a mistake, not a corpus.
_MIN_BYTES = 256
# Up to this many text files directly in a folder are a domain each (a book, a language); more are documents of one.
_MAX_STEM_DOMAINS = 16


def load_corpus(source: str | Path, tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus at `source`: "embedded", a file, or a folder.

    Domains: of a line in a `.jsonl`, its `domain`; else the first sub-folder the file is in; else, directly in the
    folder (or named itself), the file's stem, except that more than 16 `.txt` files directly in the folder are
    documents of one domain with its name. Hidden files and folders are left alone.

    Raises:
      DataError: nothing there, a format that is not accepted, or no usable text.
    """
    if str(source) == EMBEDDED:
        return load_embedded(tokenizer)
    path = Path(os.path.expanduser(source))
    # An empty name would be the current folder; pipes and devices might never end.
    if not str(source) or not (os.path.isdir(path) or os.path.isfile(path)):
        raise DataError(
            f"data source {str(source)!r} is not a file or folder: expected {_ACCEPTED_TEXT}.{_suggestion(path)}"
        )
    skipped: collections.Counter[str] = collections.Counter()
    try:
        documents = _folder_documents(path, skipped) if path.is_dir() else _file_documents(path, None, skipped)
        corpus = build_corpus(documents, tokenizer)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}{_skips(skipped)}") from error
    if skipped:
        _log.warning("%s:%s", path, _skips(skipped))
    if corpus.num_bytes.sum() < _MIN_BYTES:
        raise DataError(
            f"{str(path)!r} is too short: {int(corpus.num_bytes.sum())} bytes of text in all; at least {_MIN_BYTES} "
            f"are needed, and a model that is to learn something needs hundreds of thousands.{_skips(skipped)}"
        )
    sizes = ", ".join(f"{name} {size:,}" for name, size in corpus.bytes_per_domain().items())
    _log.info("%s: %d documents, bytes: %s; fingerprint %s", path, len(corpus), sizes, corpus.fingerprint)
    return corpus


def _suggestion(path: Path) -> str:
    try:
        siblings = sorted(os.listdir(path.parent or "."))
    except OSError:
        return ""
    return nearest(path.name, [EMBEDDED, *siblings])


def _skips(skipped: collections.Counter[str]) -> str:
    return "" if not skipped else " skipped " + ", ".join(f"{n} {why}" for why, n in skipped.most_common()) + "."


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in sorted(ACCEPTED, key=len, reverse=True) if name.endswith(suffix)), None)


def _stem(path: Path) -> str:
    kind = _kind(path)
    return path.name[: -len(kind)] if kind and len(path.name) > len(kind) else path.stem


def _file_documents(path: Path, domain: str | None, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields the documents of one file; `domain` is for lines and files that do not say."""
    kind = _kind(path)
    if kind is None:
        given = repr("".join(path.suffixes[-2:])) if path.suffix else "without a suffix"
        raise DataError(f"unsupported format {given}: expected {_ACCEPTED_TEXT}.")
    domain = _stem(path) if domain is None else domain
    if kind == ".txt":
        yield Document(_decode(path.read_bytes()), domain)
    else:
        yield from _json_lines(path, domain, skipped)


def _decode(raw: bytes) -> str:
    """Returns the text of a whole file; raises DataError with what to do."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16: convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`.")
    if b"\0" in raw:
        raise DataError("the file is binary (it has NUL bytes): expected UTF-8 text.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start:,}): convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from error
    if not text.strip():
        raise DataError("the file is empty.")
    return text


def _json_lines(path: Path, domain: str, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields one document per good line; bad ones are counted, and too many of them are an error."""
    good = bad = 0
    first = ""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        document, why = _json_document(line, domain)
        if document is not None:
            good += 1
            yield document
            continue
        bad += 1
        skipped[f"line(s) with {why}"] += 1
        first = first or f"line {number}: {why}"
    if not good:
        raise DataError(f"no usable line ({first})." if bad else "the file is empty.")
    if bad:
        _log.warning("%s: skipped %d of %d lines (first: %s)", path, bad, good + bad, first)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a whole gzip file: {error}") from error


def _json_document(line: bytes, domain: str) -> tuple[Document | None, str]:
    """Returns (document, "") or (None, what is wrong with the line)."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "bad UTF-8"
    except (ValueError, RecursionError):
        return None, "invalid JSON"
    if not isinstance(value, dict):
        return None, "JSON that is not an object"
    text, domain = value.get("text"), value.get("domain") or domain
    if "text" not in value:
        keys = ", ".join(sorted(map(str, value))[:5])
        return None, f"no 'text' field (fields: {keys or 'none'})"
    if not isinstance(text, str) or not isinstance(domain, str):
        return None, f"a {'text' if not isinstance(text, str) else 'domain'!r} that is not a string"
    if not text.strip():
        return None, "an empty 'text'"
    return Document(text, domain), ""


def _walk(root: Path) -> Iterator[Path]:
    """Yields every visible file below `root`, sorted, without following links to folders."""

    def complain(error: OSError):
        _log.warning("cannot list %s: %s", error.filename, error.strerror)

    for folder, folders, files in os.walk(root, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _folder_documents(root: Path, skipped: collections.Counter[str]) -> Iterator[Document]:
    """Yields the documents of all accepted files below `root`; files that cannot be used are counted."""
    files = list(_walk(root))
    if any(path.name in ("dataset_info.json", "dataset_dict.json") for path in files):
        raise DataError(f"a `datasets.save_to_disk` folder, which cannot be read yet: expected {_ACCEPTED_TEXT}.")
    usable = [path for path in files if _kind(path) and path.is_file()]
    for path in set(files) - set(usable):
        known = next((suffix for suffix in _KNOWN_OTHERS if path.name.lower().endswith(suffix)), None)
        skipped[f"{known} file(s), a format that is not accepted" if known else "file(s) of other formats"] += 1
    if not usable:
        raise DataError(f"no .txt, .jsonl or .jsonl.gz file in this folder of {len(files)} files.")
    top_texts = sum(path.parent == root and _kind(path) == ".txt" for path in usable)
    name = root.resolve().name or "data"
    good = 0
    for path in usable:
        try:
            for document in _file_documents(path, _domain(path, root, name, top_texts), skipped):
                good += 1
                yield document
        except (DataError, OSError) as error:
            skipped["file(s) that could not be read (to the end)"] += 1
            _log.warning("skipping %s: %s", path, error)
    if not good:
        raise DataError(f"none of the {len(usable)} .txt and .jsonl files holds usable text.")


def _domain(path: Path, root: Path, root_name: str, top_texts: int) -> str:
    relative = path.relative_to(root)
    if len(relative.parts) > 1:
        return relative.parts[0]
    return root_name if _kind(path) == ".txt" and top_texts > _MAX_STEM_DOMAINS else _stem(path)
