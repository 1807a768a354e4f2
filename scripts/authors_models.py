"""Whole models that transformers has no class for beside their authors' layers: the tiny checkpoints of
tests/checkpoints/hf/references.py. Each function gives the figures of authors.py for one model.
"""

import contextlib
import functools
import sys
import tempfile
import warnings
from abc import ABC
from pathlib import Path
from types import SimpleNamespace as Space

from checkout import Checkout, Config, Idle, difference, torch

import moe_zoo
from moe_zoo.core.schema import to_dict

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/checkpoints/hf"))
import references  # noqa: E402

#: the last commit of ColossalAI with the router that its OpenMoE calls
_ROUTERS = "4606b558ce6b6e3e7d49b9a74ff6db8e2a2b320c"


def loaded(name: str) -> moe_zoo.Loaded:
    """Ours, from a directory as published."""
    with tempfile.TemporaryDirectory() as folder:
        references.save(name, Path(folder))
        return moe_zoo.load(folder)


def logits(name: str, layers: list):
    """What their layers make of the reference's text, with its tensors."""
    w = {path: torch.tensor(array) for path, array in references.tensors(name).items()}
    S, norm = len(references.IDS), functools.partial(torch.nn.functional.rms_norm, eps=1e-6)
    x = w["model.embed_tokens.weight"][torch.tensor(references.IDS)][None]
    unseen = torch.full((1, 1, S, S), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            at = f"model.layers.{i}."
            layer.load_state_dict({path.removeprefix(at): v for path, v in w.items() if path.startswith(at)})
            x = layer.eval()(x, attention_mask=unseen.clone(), position_ids=torch.arange(S)[None])[0]
        return (norm(x, x.shape[-1:], w["model.norm.weight"]) @ w["lm_head.weight"].T)[0]


def deepseek_moe(checkout: Checkout) -> dict[str, float]:
    """DeepSeekMoE-16B's remote code: attention, gate, experts, shared experts, a dense first layer."""
    c = Space(**references.TINY["deepseek"], attention_dropout=0.0, pretraining_tp=1, _attn_implementation="eager")
    theirs = checkout.run(
        "modeling_deepseek.py", "DeepseekRMSNorm", "DeepseekRotaryEmbedding", "rotate_half", "apply_rotary_pos_emb",
        "DeepseekMLP", "MoEGate", "AddAuxiliaryLoss", "DeepseekMoE", "repeat_kv", "DeepseekAttention",
        "DeepseekDecoderLayer", ACT2FN={"silu": torch.nn.functional.silu}, warnings=warnings, logger=Idle(),
    )  # fmt: skip
    theirs.Deepseek_ATTENTION_CLASSES = {"eager": theirs.DeepseekAttention}
    layers = [theirs.DeepseekDecoderLayer(c, i) for i in range(c.num_hidden_layers)]
    ours = loaded("deepseek")(references.IDS[None]).logits[0]
    return {"logits": difference(ours, logits("deepseek", layers))}


def openmoe(checkout: Checkout) -> dict[str, float]:
    """ColossalAI's OpenMoE with places for all, and with those that its config.json gives."""
    make, given, ours, out = _openmoe(checkout), references.TINY["openmoe"], loaded("openmoe"), {}
    places = {"capacity_factor": 1.25, "eval_capacity_factor": given["router_capacity_factor_eval"]}
    places |= {"name": "capacity", "rounding": "even", "min_capacity": given["router_min_capacity"]}
    for name, factor, dispatch in (
        ("", 99.0, {"name": "dropless"}),
        ("with drops ", places["eval_capacity_factor"], places),
    ):
        c = Config(**{**given, "router_capacity_factor_eval": factor}, router_drop_tks=True, enable_kernel=False)
        routed = [(i + 1) % given["moe_layer_interval"] == 0 for i in range(given["num_hidden_layers"])]
        ours.replace_router(to_dict(ours.config)["router"], dispatch=dispatch)
        theirs = logits("openmoe", [make(c, moe=moe) for moe in routed])
        out[f"{name}logits"] = difference(ours(references.IDS[None]).logits[0], theirs)
    return out


def _openmoe(checkout: Checkout) -> type:
    """The class of a layer."""
    path, act = "colossalai/legacy/moe", lambda name: {"swiglu": theirs.SwiGLU}[name]
    as_it_is = Space(apply=lambda x, size: x)
    routers = checkout.run(
        "colossalai/moe/routers.py", "MoeRouter", "Top2Router", "get_router_cls", at=_ROUTERS, ABC=ABC,
        MOE_MANAGER=Idle(), moe_cumsum=lambda mask, use_kernel: torch.cumsum(mask, 0) - 1, Top1Router=None,
        TopKRouter=None,
    )  # fmt: skip
    experts = checkout.run(
        f"{path}/layer/experts.py", "MLPExperts", get_activation=act, EPGradScalerIn=as_it_is, EPGradScalerOut=as_it_is,
        HAS_TRITON=False, Randomizer=lambda seed: Space(fork_rng=lambda enable_cpu: contextlib.nullcontext()),
    )  # fmt: skip
    sparse = checkout.run(
        f"{path}/layer/layers.py", "SparseMLP", MLPExperts=experts.MLPExperts, get_router_cls=routers.get_router_cls,
        get_noise_generator=lambda *given: None,
    )  # fmt: skip
    theirs = checkout.run(
        f"{path}/openmoe/model/modeling_openmoe.py", "generate_fixed_pos_embedding", "apply_rotary_embedding",
        "rotate_half", "SwiGLU", "OpenMoeMLP", "repeat_kv", "OpenMoeAttention", "OpenMoeDecoderLayer",
        get_activation=act, SparseMLP=functools.partial(sparse.SparseMLP, parallel=None), HAS_TRITON=False,
        HAS_FLASH_ATTN=False, LlamaRMSNorm=lambda size, eps: torch.nn.RMSNorm(size, eps),
        torch=Space(**{**vars(torch), "arange": lambda *given, **more: here(torch.arange(*given, **more))}),
    )  # fmt: skip
    return theirs.OpenMoeDecoderLayer


def here(array):
    """An array that stays on the CPU when their code moves it."""
    array.cuda = lambda: array
    return array
