"""Text of pages and of books: paragraphs of HTML, documents cut from one long file."""

import html
import re
from collections.abc import Iterable, Iterator

# What is not the page's own text. Whoever writes HTML by a program closes these and does not nest them in themselves.
_APART = re.compile(
    r"<!--.*?-->|<(head|script|style|nav|header|footer|aside|noscript)\b.*?</\1\s*>"
    r"|<div class=.?nav(?:header|footer)\b.*?</table\s*>",  # DocBook's way to the pages around
    re.S | re.I,
)
_PREFORMATTED = re.compile(r"(<pre\b.*?</pre\s*>)", re.S | re.I)
_BLOCK = re.compile(
    r"</?(?:address|article|blockquote|body|br|center|dd|div|dl|dt|fieldset|figcaption|figure|form|h[1-6]|hr|html|li|main"
    r"|ol|p|section|table|tbody|tfoot|thead|tr|ul)\b[^>]*>",
    re.I,
)
# Cells of a row; and alternatives of which a browser shows one (menus of another system).
_GAP = re.compile(r"</?(?:td|th)\b[^>]*>|<[a-z]+ hidden\b[^>]*>", re.I)
_TAG = re.compile(r"<[^>]*>")


def html_paragraphs(page: str) -> list[str]:
    """Returns the paragraphs of an HTML page in order, headings and list items too, without navigation and scripts.

    White space within a paragraph is one space each, but stays as it is in preformatted ones.
    """
    found = []
    for part in _PREFORMATTED.split(_APART.sub(" ", page)):
        if part[:4].lower() == "<pre":
            found.append(html.unescape(_TAG.sub("", part)).strip("\n").rstrip())
        else:
            blocks = _BLOCK.sub("\0", _GAP.sub(" ", part)).split("\0")
            found += [" ".join(html.unescape(_TAG.sub("", block)).split()) for block in blocks]
    return [paragraph for paragraph in found if paragraph.strip()]


def joined(entries: Iterable[str], least: int = 4_000, most: int = 8_000) -> Iterator[str]:
    """Yields documents of consecutive entries, of `least` to `most` bytes where no single entry is larger."""
    pending, size = [], 0
    for entry in entries:
        length = len(entry.encode("utf-8"))
        if pending and (size >= least or size + length > most):
            yield "".join(pending)
            pending, size = [], 0
        pending.append(entry)
        size += length
    if pending:
        yield "".join(pending)


def cut(text: str, most: int) -> str:
    """Returns the beginning of `text`: at most that many bytes of UTF-8, to the end of a line; "" if no line fits."""
    raw = text.encode("utf-8")
    if len(raw) <= most:
        return text
    return raw[: raw.rfind(b"\n", 0, most) + 1].decode("utf-8")
