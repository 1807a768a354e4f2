"""Adapters that PEFT made, beside a tiny Llama by transformers: the same logits; out again the same files. float32."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PEFT: pip install 'moe-zoo[parity]'")
transformers = pytest.importorskip("transformers", reason="parity with PEFT: pip install 'moe-zoo[parity]'")
peft = pytest.importorskip("peft", reason="parity with PEFT: pip install 'moe-zoo[parity]'")

import jax  # noqa: E402

import moe_zoo  # noqa: E402
from moe_zoo.checkpoints.hf.safetensors import Files, read_header  # noqa: E402
from moe_zoo.core import param as P  # noqa: E402
from moe_zoo.transform import load_adapters, merge, save_adapter, unmerge  # noqa: E402

torch.set_num_threads(1)

IDS = np.random.default_rng(0).integers(3, 96, (2, 11))
WEIGHTS = "adapter_model.safetensors"
CASES = {
    "patterns": dict(
        r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        rank_pattern={"v_proj": 3, r"layers\.1\.mlp\.down_proj": 2}, alpha_pattern={"o_proj": 5},
    ),
    "one_layer_rslora": dict(
        r=5, lora_alpha=7, target_modules=r".*\.(k_proj|gate_proj|up_proj)", use_rslora=True, layers_to_transform=None
    ),
    "layers": dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "dora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "up_proj"], use_dora=True),
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return moe_zoo.load(folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, base, tmp_path_factory):
    """(PEFT's model, the directory that it saved, ours)."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **CASES[request.param])).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder, load_adapters(base, folder)


def test_logits_are_theirs_beside_and_merged(pair, base):
    model, folder, ours = pair
    expected = theirs(model)
    np.testing.assert_allclose(ours(IDS).logits, expected, rtol=0, atol=2e-4)
    assert np.abs(np.asarray(base(IDS).logits) - expected).max() > 0.05
    merged = merge(ours)
    np.testing.assert_allclose(merged(IDS).logits, expected, rtol=0, atol=2e-4)
    if not ours.config.adapters.config.use_dora:
        for path, value in P.arrays(unmerge(merged, ours).model).items():
            np.testing.assert_allclose(value, P.arrays(ours.model)[path], rtol=0, atol=1e-6, err_msg=path)


def test_out_again_the_tensors_are_theirs_bit_for_bit_and_peft_opens_them(pair, tmp_path):
    model, folder, ours = pair
    save_adapter(ours, tmp_path)
    old, new = (Files(read_header(path / WEIGHTS)) for path in (folder, tmp_path))
    assert {n: (t.shape, t.dtype) for n, t in old.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in new.tensors.items()
    }
    for name in old.tensors:
        if name.endswith("magnitude_vector"):
            np.testing.assert_allclose(new[name], old[name], rtol=3e-7)
        else:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    known = json.loads((folder / "adapter_config.json").read_text())
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= known.keys()
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    np.testing.assert_allclose(theirs(again), theirs(model), rtol=0, atol=1e-5)


def test_several_adapters_mixed_by_one_hot_gates_are_each_of_theirs(base, tmp_path):
    models = []
    for i, name in enumerate(("patterns", "layers")):
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **CASES[name])).eval()
        torch.manual_seed(i + 1)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.add_(0.2 * torch.randn_like(p))
        model.save_pretrained(tmp_path / name)
        models.append(model)
    mixture = load_adapters(base, [tmp_path / "patterns", tmp_path / "layers"], "mole")
    for e, model in enumerate(models):
        merged = merge(mixture, [float(e == 0), float(e == 1)])
        np.testing.assert_allclose(merged(IDS).logits, theirs(model), rtol=0, atol=2e-4)


@pytest.mark.parametrize("splits", [1, 4], ids=["poly", "mhr"])
def test_poly_is_theirs_for_every_task_and_out_again_bit_for_bit(splits, base, tmp_path):
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", r=3, n_tasks=3, n_skills=2, n_splits=splits, target_modules=["q_proj", "down_proj"]
    )
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "poly_" in name:
                p.add_((2.0 if "logits" in name else 0.2) * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapters(base, tmp_path / "theirs")
    logits = jax.jit(lambda model, task: model(IDS.astype(np.int32), domain=task)[0])
    outputs = []
    for tasks in ([0, 2], [1, 1]):
        with torch.no_grad():
            outputs.append(model(torch.tensor(IDS), task_ids=torch.tensor(tasks)).logits.numpy())
        domain = np.repeat(np.array(tasks, np.int32)[:, None], IDS.shape[1], axis=1)
        np.testing.assert_allclose(logits(ours.model, domain), outputs[-1], rtol=0, atol=2e-4)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01
    save_adapter(ours, tmp_path / "ours")
    old, new = (Files(read_header(tmp_path / name / WEIGHTS)) for name in ("theirs", "ours"))
    assert old.tensors.keys() == new.tensors.keys()
    for name in old.tensors:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        same = again(torch.tensor(IDS), task_ids=torch.tensor([1, 1])).logits.numpy()
    np.testing.assert_allclose(same, outputs[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [
    dict(layerwise_scalings=False, softmax_temperature=2.0),
    dict(layerwise_scalings=True, scaling_pass_value=0.3, global_scaling_weight=1.5),
    dict(layerwise_scalings=True, top_k_lora=1, enable_softmax_topk=True),
], ids=["one", "layerwise", "top_k"])  # fmt: skip
def test_xlora_mixes_as_theirs(settings, base, tmp_path):
    paths = []
    for i, rank in enumerate((4, 3)):
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
        model = peft.get_peft_model(llama(), lora)
        torch.manual_seed(i)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.add_(0.3 * torch.randn_like(p))
        paths.append(tmp_path / str(i))
        model.save_pretrained(paths[-1])
    theirs_base = llama()
    theirs_base.config.use_cache = False
    adapters = {str(i): str(path) for i, path in enumerate(paths)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters, **settings)
    model = peft.get_peft_model(theirs_base, config).eval()
    last = model.base_model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.copy_(torch.randn_like(last.weight))
        last.bias.copy_(torch.randn_like(last.bias))
        expected = model(input_ids=torch.tensor(IDS)).logits.numpy()
    ours = load_adapters(base, paths, {"name": "xlora", **settings})
    values = P.arrays(ours.model)
    values["adapters.kernel"] = jax.numpy.asarray(last.weight.detach().numpy().T)
    values["adapters.bias"] = jax.numpy.asarray(last.bias.detach().numpy())
    ours.model = P.replace(ours.model, values)
    np.testing.assert_allclose(ours(IDS).logits, expected, rtol=0, atol=2e-4)
    assert np.abs(np.asarray(base(IDS).logits) - expected).max() > 0.05
