"""What `bench.py train --gpu` and `--gpu-static` train: an OLMoE of some size, the same for us and for transformers.

One published configuration (`config.json` of an OlmoeForCausalLM) says what it is; transformers builds it as it is, and
we read it as we read a checkpoint's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and a step of it: `batch` rows of `seq` tokens. `like`: which published shapes it has."""

    like: str
    layers: int
    hidden: int
    heads: int
    experts: int
    per_token: int
    width: int
    vocab: int
    batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.seq

    def published(self) -> dict[str, Any]:
        """The decoder's config.json."""
        return {
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": self.width, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "num_experts": self.experts,
            "num_experts_per_tok": self.per_token, "max_position_embeddings": self.seq, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "rope_theta": 10000.0, "norm_topk_prob": False,
        }  # fmt: skip


#: "1b": 1.4 billion parameters in all, whose state of 16 bytes each leaves an 80 GB card room for a step. "2b": OLMoE's
#: own matrices, 1.3 billion parameters at work per token, a quarter of its experts. "tiny": for a CPU, to see it run
SIZES = {
    "1b": Size("Granite 3.0 1B-A400M", 24, 1024, 16, 32, 8, 512, 50304, 4, 2048),
    "2b": Size("OLMoE-1B-7B with 16 of its 64 experts", 16, 2048, 16, 16, 8, 1024, 50304, 4, 2048),
    "tiny": Size("nothing published", 2, 64, 2, 4, 2, 32, 256, 2, 64),
}


def sized(name: str, batch: int | None = None, seq: int | None = None) -> Size:
    """One of SIZES, with other rows where they are given."""
    size = SIZES[name]
    return dataclasses.replace(size, batch=batch or size.batch, seq=seq or size.seq)


def our_trainer(size: Size, devices: Sequence[Any] | None = None):
    """Our trainer of it, on one device: bfloat16, weights and moments in float32, AdamW, the loop's own objective."""
    import jax

    from moe_zoo.checkpoints.hf.families.olmoe import FAMILY
    from moe_zoo.core.schema import to_dict
    from moe_zoo.sharding import make_mesh
    from moe_zoo.train.config import config_from_dict
    from moe_zoo.train.step import Trainer

    model = to_dict(FAMILY.read(size.published())) | {"dtype": "bfloat16"}
    data = {"seq_len": size.seq, "batch_size": size.batch}
    config = config_from_dict({"model": model, "data": data, "optim": {"name": "adamw", "learning_rate": 3e-4}})
    mesh = make_mesh(devices=jax.devices()[:1] if devices is None else devices)
    return Trainer(config, mesh, config.train.objective.make())


def counted(trainer, seq: int) -> dict[str, float]:
    """{"total", "active"} parameters, and the FLOPs to train on one token of a row of `seq`, without recomputation."""
    from moe_zoo.models.counting import count_parameters, train_flops_per_token

    counts = count_parameters(trainer.abstract)
    flops = train_flops_per_token(trainer.abstract, seq)
    return {"total": counts["total"], "active": counts["active"], "flops_per_token": flops}


def random_tokens(size: Size, number: int) -> np.ndarray:
    """[batch, seq + 1] of batch `number`, drawn evenly from the vocabulary."""
    return np.random.default_rng(number).integers(0, size.vocab, (size.batch, size.seq + 1)).astype(np.int32)


def our_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One document per row, in the shape that the loop makes."""
    rows, seq = tokens.shape[0], tokens.shape[1] - 1
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((rows, seq), np.int32),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (rows, 1)), "domain": np.zeros((rows, seq), np.int32),
        "loss_mask": np.ones((rows, seq), bool),
    }  # fmt: skip
