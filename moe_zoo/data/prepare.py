"""A corpus of equal domains from installed text, as a folder of its own: one folder per domain, and a manifest.

The same text and settings give the same files, whatever the order of a file system. Documents are taken in the order of
a hash of their name, the same pages in every language; so a smaller corpus is a part of a larger one.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_zoo.data import installed
from moe_zoo.data.corpus import hash64
from moe_zoo.data.errors import DataError
from moe_zoo.data.markup import cut
from moe_zoo.data.sources import MANIFEST

_log = logging.getLogger(__name__)

BYTES_PER_DOMAIN = 3_000_000
# Shorter ones are titles of pages; of longer ones the beginning is taken, so that a few do not fill a domain.
_MIN_DOCUMENT, _MAX_DOCUMENT = 200, 100_000
# A domain with less of the wanted bytes is left out rather than making all others as small.
_ENOUGH = 0.4


@dataclasses.dataclass
class _Domain:
    """What was taken of a domain: (name, text) in the order of taking, from where, and what was dropped on the way."""

    path: Path
    documents: list[tuple[str, str]]
    dropped: collections.Counter[str]

    @property
    def size(self) -> int:
        return sum(len(text.encode("utf-8")) for _, text in self.documents)


def prepare(
    out: str | Path,
    *,
    roots: Sequence[str | Path] = ("/",),
    domains: Sequence[str] = installed.DOMAINS,
    bytes_per_domain: int = BYTES_PER_DOMAIN,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the corpus to the folder `out`, all or nothing, and returns its manifest (see `manifest.json` there).

    Every domain gets the same bytes, up to the end of a line: `bytes_per_domain`, or as many as the smallest has. A
    domain that is not installed, or has less than two fifths of them, is left out with a warning.

    Raises:
      DataError: unknown domains, nothing to be found, or `out` exists.
    """
    out, roots = Path(os.path.expanduser(out)), [Path(os.path.expanduser(root)) for root in roots]
    if bytes_per_domain < _MAX_DOCUMENT:
        raise DataError(f"{bytes_per_domain} bytes per domain: expected at least {_MAX_DOCUMENT:,}.")
    _check_out(out, overwrite)
    places = {domain: installed.source(domain).find(roots) for domain in dict.fromkeys(domains)}
    left_out = {domain: _missing(domain) for domain, path in places.items() if path is None}
    taken: dict[str, _Domain] = {}
    for domain, path in places.items():
        if path is None:
            continue
        try:
            taken[domain] = _take(domain, path, roots, bytes_per_domain)
        except DataError as error:
            left_out[domain] = str(error)
            continue
        if taken[domain].size < _ENOUGH * bytes_per_domain:
            small = taken.pop(domain)
            left_out[domain] = f"{path} has only {small.size:,} bytes of text, of {bytes_per_domain:,} wanted"
    for domain, why in left_out.items():
        _log.warning("left out %s: %s", domain, why)
    if not taken:
        raise DataError(f"no text of any domain below {', '.join(map(str, roots))}: {_how_to(places)}")
    least = min(taken, key=lambda name: taken[name].size)
    size = min(bytes_per_domain, taken[least].size)
    if size < 0.99 * bytes_per_domain:
        _log.warning("%s has only %s bytes of text of its own: all domains get as many", least, f"{size:,}")
    for domain in taken.values():
        domain.documents = _first(domain.documents, size)
    manifest = {
        "bytes": sum(domain.size for domain in taken.values()),
        "bytes_per_domain": {"wanted": bytes_per_domain, "got": size},
        "domains": {name: _describe(name, domain) for name, domain in taken.items()},
        "left_out": left_out,
    }
    _write(out, taken, manifest)
    return manifest


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{str(out)!r} exists: give another folder, or overwrite it.")
    if not (out / MANIFEST).is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise DataError(f"{str(out)!r} holds something else than a prepared corpus (no {MANIFEST}): not overwritten.")


def _missing(domain: str) -> str:
    return f"not installed; it comes with: {installed.source(domain).provided_by}"


def _how_to(domains: Sequence[str]) -> str:
    provided = "; ".join(f"{domain}: {installed.source(domain).provided_by}" for domain in domains)
    return f"install what provides them, or unpack it and name that folder as a root ({provided})."


def _take(domain: str, path: Path, roots: Sequence[Path], size: int) -> _Domain:
    """The first documents of `domain` by hash of their name, up to `size` bytes."""
    documents, dropped = installed.read(domain, path, roots)
    documents = [(name, cut(text, _MAX_DOCUMENT)) for name, text in documents]
    documents = [(name, text) for name, text in documents if len(text.encode("utf-8")) >= _MIN_DOCUMENT]
    documents.sort(key=lambda document: (hash64(document[0]), document[0]))
    return _Domain(path, _first(_unique(documents), size), dropped)


def _unique(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen = set()
    for name, text in documents:
        if text not in seen:
            seen.add(text)
            yield name, text


def _first(documents: Iterable[tuple[str, str]], size: int) -> list[tuple[str, str]]:
    """The first `size` bytes, the last document cut."""
    first = []
    for name, text in documents:
        part = cut(text, size)
        if part:
            first.append((name, part))
        if part != text:
            break
        size -= len(part.encode("utf-8"))
    return first


def _records(name: str, domain: _Domain) -> bytes:
    """JSON lines; pages of the same name in several languages are one group, which never parts in a split."""
    prefix = installed.family(name)
    lines = [{"text": text, "group": f"{prefix}:{document}"} for document, text in domain.documents]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")


def _describe(name: str, domain: _Domain) -> dict[str, Any]:
    source = installed.source(name)
    return {
        "bytes": domain.size,
        "documents": len(domain.documents),
        "from": str(domain.path),
        "provided_by": source.provided_by,
        "licence": source.licence,
        "dropped_bytes": dict(sorted(domain.dropped.items())),
        "sha256": hashlib.sha256(_records(name, domain)).hexdigest(),
    }


def _write(out: Path, taken: dict[str, _Domain], manifest: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    old = temporary.with_suffix(".old")
    try:
        for name, domain in taken.items():
            (temporary / name).mkdir(parents=True)
            (temporary / name / "documents.jsonl").write_bytes(_records(name, domain))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
