"""The text of a `*-final_bundles.txt` dump, taken apart: bundles, their instructions and the regions they begin."""

import dataclasses
import re

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+([A-Z]{2}\s*)?:((?:\s*>)*)\s*\{", re.M)
_COMMENT = re.compile(r"/\*(.*?)\*/", re.S)
_REGION = re.compile(r"Start region (\d+)|Start/End empty region (\d+)|End region (\d+)")
_DMA_SIZE = re.compile(r"/\*size_in_granules=\*/([^,]+),")
_DMA_KIND = re.compile(r"/\* (\w+-to-\w+) \*/")
_CORE_ID = re.compile(r"sld \[smem:\[(#allocation\d+)\]\]\s*/\* (?:megacore )?core id")
_INSTRUCTION = re.compile(r"(?:(%\w+) = )?([\w.<]+)(.*)$", re.S)
_NOTE = re.compile(r"\[(thread|resolvable|sequence|trace):[^\]]*\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`dst = op rest`; dst is None for those without a result."""

    dst: str | None
    op: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What issues in one cycle. Sizes of its DMAs and the kind of a general one stand in comments.

    `label`: "LB" at the top of a loop, "PF" after one, ...; `depth`: loops around it.
    """

    instructions: list[Instruction]
    dma_sizes: list[str]
    dma_kind: str | None
    label: str
    depth: int


def count_bundles(text: str) -> int:
    """Without taking them apart."""
    return sum(1 for _ in _BUNDLE.finditer(text))


def core_id_allocation(text: str) -> str | None:
    """The SMEM allocation that holds the id of the core, in programs that run on several."""
    match = _CORE_ID.search(text)
    return match.group(1) if match else None


def parse(text: str) -> tuple[list[Bundle], dict[int, int]]:
    """(bundles, first bundle of each region).

    An empty region may go unmarked. The one that is skipped to when a condition fails has the number after that of the
    body, and lies where the body ends.
    """
    heads = list(_BUNDLE.finditer(text))
    starts = [head.start() for head in heads] + [len(text)]
    bundles, region_start, after_region = [], {}, {}
    for i, (begin, end) in enumerate(zip(starts, starts[1:])):
        chunk = text[begin:end]
        for comment in _COMMENT.findall(chunk):
            for opened, empty, closed in _REGION.findall(comment):
                if closed:
                    after_region[int(closed)] = i + 1
                else:
                    region_start[int(opened or empty)] = i
        bundles.append(_bundle(chunk, (heads[i][1] or "").strip(), heads[i][2].count(">")))
    return bundles, {region + 1: at for region, at in after_region.items()} | region_start


def _bundle(chunk: str, label: str, depth: int) -> Bundle:
    body = _COMMENT.sub("", chunk)
    body = body[body.index("{") + 1 : body.rindex("}")]
    instructions = []
    for part in filter(None, (s.strip() for s in body.split(";;"))):
        match = _INSTRUCTION.match(part)
        if match:
            dst, op, rest = match.groups()
            instructions.append(Instruction(dst, op, _NOTE.sub("", rest).strip()))
    kind = _DMA_KIND.search(chunk)
    return Bundle(
        instructions, _DMA_SIZE.findall(chunk), kind.group(1).replace("-", "_") if kind else None, label, depth
    )
