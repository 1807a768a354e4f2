"""What all runs of a scale share: the tasks' questions, and the base beside which adapters act, trained once and kept.

The base learns from text and from half of the questions of the trained tasks, but without the tasks' names:
"hxQa=" -> "aQxh" or "HXqA", as it comes. So it can do something of each, and a fine-tune has to learn which when. Of
the tasks that are held out it sees nothing. Adapters are trained and scored on the other half.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_zoo.checkpoints import Checkpoints
from moe_zoo.compare.adapters.plans import Scale, base_config
from moe_zoo.compare.entries import digest, learned
from moe_zoo.core import param as P
from moe_zoo.data import Corpus, DataError, Tokenizer, load_corpus, load_tokenizer
from moe_zoo.inference import Loaded, load
from moe_zoo.train import loop

_log = logging.getLogger(__name__)

#: bytes of each domain of the embedded text, and at most of one document
_TEXT, _DOCUMENT = 80_000, 8_000


@dataclasses.dataclass(frozen=True)
class Bench:
    """`corpus`: the half of the questions that adapters get, of the trained tasks and then of those held out.
    `fingerprint` is of the corpus and of the base's weights: runs of one fingerprint may be compared.
    """

    base: Loaded
    corpus: Corpus
    fingerprint: str

    @classmethod
    def of(cls, base: Loaded, corpus: Corpus) -> "Bench":
        """With the fingerprint of both."""
        digest = hashlib.blake2b(digest_size=3)
        for name, array in sorted(P.arrays(base.model).items()):
            digest.update(name.encode() + np.asarray(array).tobytes())
        return cls(base, corpus, f"{corpus.fingerprint}-{digest.hexdigest()}")


def questions(scale: Scale, tasks: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """(what the base may see, what adapters are trained and scored on): halves by the hash of a question."""
    corpus = load_corpus("tasks:" + ",".join((*tasks, *scale.held_out)), tokenizer)
    empty = [task for task, size in corpus.bytes_per_domain().items() if not size]
    if len(empty) > len(tasks) // 2:
        raise DataError(f"too few of the tasks are there to compare anything: {', '.join(empty)} are not installed")
    for_base = corpus.groups % 2 == 0
    known = corpus.domain_ids < len(tasks)
    return corpus.select(for_base & known), corpus.select(~for_base)


def prepare(scale: Scale, tasks: tuple[str, ...], workdir: Path, say: Callable[[str], None]) -> Bench:
    """The bench of a scale; its base is trained in `workdir` if it is not there. Other processes wait for it."""
    workdir = Path(workdir).absolute()
    config = base_config(scale, "")
    tokenizer = load_tokenizer(config.data.tokenizer)
    seen, kept = questions(scale, tasks, tokenizer)
    name = f"base-{scale.name}-{digest(learned(config))}-{seen.fingerprint}"
    folder, text = workdir / name, workdir / f"{name}.jsonl"
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / f"{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a kill
        if not _finished(folder, scale.base_steps):
            say(f"training the base: {scale.base} on text and {len(seen):,} questions, {scale.base_steps:,} steps")
            if not text.is_file():
                partial = text.with_suffix(".partial")
                lines = records(seen, load_corpus("embedded", tokenizer), tokenizer)
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                partial.replace(text)
            if not loop.train(base_config(scale, str(text)), folder)["finished"]:
                raise KeyboardInterrupt
    return Bench.of(load(folder), kept)


def records(tasks: Corpus, text: Corpus, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """What the base is trained on, as JSON lines: text by domain, and questions without the tasks' names."""
    left = dict.fromkeys(text.domains, _TEXT)
    raw = list(text.document_bytes(tokenizer))
    for i in np.argsort(text.groups, kind="stable"):
        domain = text.domains[text.domain_ids[i]]
        part = raw[i][: min(_DOCUMENT, left[domain])].decode("utf-8", errors="ignore")
        if part.strip():
            left[domain] -= len(part.encode("utf-8"))
            yield {"text": part, "domain": domain}
    for i, whole in enumerate(tasks.document_bytes(tokenizer)):
        answer = tasks.trained_bytes[i]
        _, _, question = whole[: len(whole) - answer].partition(b":")
        domain = tasks.domains[tasks.domain_ids[i]]
        yield {"prompt": question.decode("utf-8"), "answer": whole[len(whole) - answer :].decode("utf-8"),
               "domain": domain}  # fmt: skip


def _finished(folder: Path, steps: int) -> bool:
    if not folder.is_dir():
        return False
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.latest() == steps
    finally:
        checkpoints.close()
