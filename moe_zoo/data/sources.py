"""Where a corpus comes from: one that needs no file, a file, or a folder of files.

Accepted: the formats in `moe_zoo.data.formats`, folders that `datasets.save_to_disk` wrote, and folders of all these.
What cannot be read is a `DataError` when it was named itself, and a counted, logged skip inside a folder.
"""

import collections
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from moe_zoo.core.registry import nearest
from moe_zoo.data.arithmetic import load_arithmetic
from moe_zoo.data.corpus import Corpus, Document, build_corpus
from moe_zoo.data.embedded import load_embedded
from moe_zoo.data.errors import DataError, MissingPackageError
from moe_zoo.data.formats import ACCEPTED_TEXT, Skipped, format_of, read_file, stem
from moe_zoo.data.formats.saved import is_saved, read_saved
from moe_zoo.data.tasks import load_guarded_tasks, load_tasks
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# Corpora that need no file.
NAMED = {
    "embedded": load_embedded, "arithmetic": load_arithmetic, "tasks": load_tasks, "guarded_tasks": load_guarded_tasks,
}  # fmt: skip

#: what describes a folder and is no text of it
MANIFEST = "manifest.json"

# Formats that people have and that have to be converted first.
_KNOWN_OTHERS = tuple(".arrayrecord .tfrecord .csv .tsv .json .zip .gz .zst .bz2 .xz .tar .pdf .docx".split())
# Fewer bytes than this in all are a mistake, not a corpus.
_MIN_BYTES = 256
# Up to this many text files directly in a folder are a domain each (a book, a language); more are documents of one.
_MAX_STEM_DOMAINS = 16
# So many domains are rather names or addresses of documents.
_MANY_DOMAINS = 256
# How many reasons for skips a message lists.
_MAX_REASONS = 12


def load_corpus(source: str | Path, tokenizer: Tokenizer) -> Corpus:
    """Returns the corpus at `source`: "embedded", "arithmetic", "tasks", "guarded_tasks", a file, or a folder.
    "tasks:copy,kind": these tasks, with ids in this order.

    Domains: of a record, its `domain`; else the first sub-folder the file is in; else, directly in the folder (or named
    itself), the file's stem without a shard's "-00001-of-00005", except that more than 16 text files directly in the
    folder are documents of one domain with its name. Hidden files and folders, and the folder's `manifest.json`, are
    left alone. A saved data set that is
    named itself is one domain. Supervised records: see `moe_zoo.data.formats.records`.

    Raises:
      DataError: nothing there, a format that is not accepted, no usable text, or a package for it is not installed.
    """
    if str(source) in NAMED:
        return NAMED[str(source)](tokenizer)
    name, _, tasks = str(source).partition(":")
    if name == "tasks" and tasks:
        return load_tasks(tokenizer, [task.strip() for task in tasks.split(",")])
    path = Path(os.path.expanduser(source))
    # An empty name would be the current folder; pipes and devices might never end.
    if not str(source) or not (os.path.isdir(path) or os.path.isfile(path)):
        raise DataError(
            f"data source {str(source)!r} is not a file or folder: expected {', '.join(map(repr, NAMED))}, "
            f"{ACCEPTED_TEXT}.{_suggestion(path)}"
        )
    skipped: Skipped = collections.Counter()
    try:
        corpus = build_corpus(_documents(path, skipped), tokenizer)
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
    if len(corpus.domains) > _MANY_DOMAINS:
        _log.warning("%s: %d domains; statistics per domain take time and memory", path, len(corpus.domains))
    if corpus.trained is not None:
        answers = sum(corpus.trained_bytes_per_domain().values())
        _log.info("%s: supervised: trained and scored on %d of %d bytes", path, answers, corpus.num_bytes.sum())
    return corpus


def _suggestion(path: Path) -> str:
    try:
        siblings = sorted(os.listdir(path.parent or "."))
    except OSError:
        return ""
    return nearest(path.name, [*NAMED, *siblings])


def _skips(skipped: Skipped) -> str:
    if not skipped:
        return ""
    shown = ", ".join(f"{n} {why}" for why, n in skipped.most_common(_MAX_REASONS))
    rest = sum(skipped.values()) - sum(n for _, n in skipped.most_common(_MAX_REASONS))
    return f" skipped {shown}{f', and {rest} for other reasons' if rest else ''}."


def _documents(path: Path, skipped: Skipped) -> Iterator[Document]:
    if not path.is_dir():
        return read_file(path, stem(path), skipped)
    if is_saved(path):
        return read_saved(path, _name(path), skipped)
    return _folder_documents(path, skipped)


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"


def _walk(root: Path) -> Iterator[Path]:
    """Yields every visible file and saved data set below `root`, sorted, without following links to folders."""

    def complain(error: OSError):
        _log.warning("cannot list %s: %s", error.filename, error.strerror)

    for folder, folders, files in os.walk(root, onerror=complain):
        visible = sorted(name for name in folders if not name.startswith("."))
        saved = [name for name in visible if is_saved(Path(folder, name)) and not Path(folder, name).is_symlink()]
        folders[:] = [name for name in visible if name not in saved]
        described = {MANIFEST} if Path(folder) == root else set()
        names = sorted(name for name in set(files) - described if not name.startswith("."))
        yield from (Path(folder, name) for name in [*names, *saved])


def _folder_documents(root: Path, skipped: Skipped) -> Iterator[Document]:
    """Yields the documents of everything accepted below `root`; what cannot be used is counted."""
    found = list(_walk(root))
    usable = [path for path in found if path.is_dir() or (format_of(path) and path.is_file())]
    for path in set(found) - set(usable):
        known = next((suffix for suffix in _KNOWN_OTHERS if path.name.lower().endswith(suffix)), None)
        skipped[f"{known} file(s), a format that is not accepted" if known else "file(s) of other formats"] += 1
    if not usable:
        raise DataError(f"nothing usable in this folder of {len(found)} files: expected {ACCEPTED_TEXT}.")
    top_texts = sum(path.parent == root and _is_text(path) for path in usable)
    good, first = 0, ""
    for path in usable:
        domain = _domain(path, root, top_texts)
        try:
            for document in read_saved(path, domain, skipped) if path.is_dir() else read_file(path, domain, skipped):
                good += 1
                yield document
        except MissingPackageError:
            raise
        except (DataError, OSError) as error:
            skipped["file(s) that could not be read (to the end)"] += 1
            first = first or f"{path.relative_to(root)}: {error}"
            _log.warning("skipping %s: %s", path, error)
    if not good:
        raise DataError(f"none of the {len(usable)} files holds usable text (first: {first}).")


def _is_text(path: Path) -> bool:
    return (format_of(path) or "").startswith(".txt")


def _domain(path: Path, root: Path, top_texts: int) -> str:
    relative = path.relative_to(root)
    if len(relative.parts) > 1:
        return relative.parts[0]
    if path.is_dir():
        return path.name
    return _name(root) if _is_text(path) and top_texts > _MAX_STEM_DOMAINS else stem(path)
