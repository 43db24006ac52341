"""Adapters in PEFT's layout: against weights that numpy merged, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lsjax
from lsjax.io.adapter import Adapter
from lsjax.io.base_model import BaseModel, describe_base
from lsjax.io.convert import convert
from lsjax.io.exit_adapter import write_exit_adapter
from lsjax.io.open import open_model
from lsjax.io.peft import write_peft
from lsjax.model.exit_adapter import ExitAdapter
from tests.helpers.recorded import RECORDED, copy_of, edit_tensors
from tests.model.test_lora import random_adapter

BASE = RECORDED / "llama31"  # three layers, 4 query heads on 2 KV heads, an untied head
MODULES = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip


def make_peft(folder, targets, base=BASE, alpha=6.0, rank=2, **settings):
    """Writes random factors for these modules as PEFT stores them. Returns the change of each tensor of the base."""
    weights, rng = load_file(base / "model.safetensors"), np.random.default_rng(0)
    tensors, changes = {}, {}
    names = [f"model.layers.{layer}.{MODULES[t]}" for t in targets if t in MODULES for layer in range(3)]
    names += [{"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[t] for t in targets if t not in MODULES]
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape  # of a table: tokens, width
        r = settings.get("rank_pattern", {}).get(name.rpartition(".")[2], rank)
        sides = (columns, rows) if name.endswith("embed_tokens") else (rows, columns)
        a, b = rng.normal(0, 0.5, (r, sides[1])), rng.normal(0, 0.5, (sides[0], r))
        scale = alpha / (r**0.5 if settings.get("use_rslora") else r)
        table = name.endswith("embed_tokens")
        changes[f"{name}.weight"] = scale * ((b @ a).T if table else b @ a)
        for side, factor in (("A", a), ("B", b)):
            key = f"lora_embedding_{side}" if table else f"lora_{side}.weight"
            tensors[f"base_model.model.{name}.{key}"] = np.float32(factor)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["q_proj", "v_proj"], {}),
        ([*MODULES, "embed_tokens", "lm_head"], {}),
        (["k_proj", "up_proj"], {"use_rslora": True}),
        (["q_proj", "k_proj", "o_proj"], {"rank_pattern": {"k_proj": 5}}),
    ],
    ids=lambda value: ",".join(value)[:30],
)
def test_loading_merges_what_numpy_merges(targets, settings, tmp_path):
    changes = make_peft(tmp_path / "adapter", targets, **settings)
    merged = copy_of("llama31", tmp_path / "merged")
    edit_tensors(merged, lambda tensors: tensors.update({n: np.float32(tensors[n] + c) for n, c in changes.items()}))
    expected = lsjax.load(merged)
    model = lsjax.load(BASE, adapter=tmp_path / "adapter")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), model.params, expected.params)
    for_decoding = lsjax.load(BASE, adapter=str(tmp_path / "adapter"), for_decoding=True).stack_params()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), for_decoding, expected.params)
    assert "adapter=" in repr(model)
    convert(BASE, tmp_path / "converted", "huggingface", adapter=tmp_path / "adapter")
    again = lsjax.load(tmp_path / "converted").params
    jax.tree.map(np.testing.assert_array_equal, again, model.params)


def test_what_is_written_is_read_back(tmp_path):
    model = lsjax.load(BASE)
    targets = ("embed", "layers/attention/qkv", "layers/feed_forward/down")
    factors = jax.device_get(random_adapter(model.config, targets))
    base = describe_base(BASE, open_model(BASE))
    adapter = Adapter(tmp_path, factors, 0.75, rank=3, base=base)
    write_peft(tmp_path, adapter, model.config)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "embed_tokens", "k_proj", "q_proj", "v_proj"]
    assert settings["lora_alpha"] / settings["r"] == 0.75
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    down = factors["layers"]["feed_forward"]["down"]
    stored = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    np.testing.assert_array_equal(stored, down["lora_b"][1].T)
    params = lsjax.load(BASE, adapter=tmp_path).params
    expected = jax.tree.map(np.float64, model.params)
    for layer in range(3):
        qkv = factors["layers"]["attention"]["qkv"]
        expected["layers"]["attention"]["qkv"][layer] += 0.75 * np.tensordot(
            np.float64(qkv["lora_a"][layer]), qkv["lora_b"][layer], 1
        )
        expected["layers"]["feed_forward"]["down"][layer] += 0.75 * down["lora_a"][layer] @ down["lora_b"][layer]
    expected["embed"] += 0.75 * factors["embed"]["lora_a"] @ factors["embed"]["lora_b"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, expected)


def test_an_exits_adapter_is_left_away_with_the_model_it_learned_from(tmp_path):
    base = copy_of("llama31", tmp_path / "base")
    write_exit_adapter(base, ExitAdapter(1, np.ones((lsjax.read_model_config(base).width,) * 2, np.float32)))
    make_peft(tmp_path / "adapter", ["q_proj"])
    assert lsjax.load(base).exit_adapter.exit_layer == 1
    assert lsjax.load(base, adapter=tmp_path / "adapter").exit_adapter is None
    plain = convert(base, tmp_path / "plain", "huggingface")
    merged = convert(base, tmp_path / "merged", "huggingface", adapter=tmp_path / "adapter")
    assert (plain.exit_adapter.exit_layer, merged.exit_adapter) == (1, None)
    assert [(tmp_path / name / "exit_adapter.safetensors").exists() for name in ("plain", "merged")] == [True, False]
    assert len({path.stat().st_mode for path in (tmp_path / "plain").iterdir()}) == 1


def test_a_base_is_known_by_its_values(tmp_path):
    """A copy in another format is the same base; one changed bit, or another rotary base, is another one."""
    original = describe_base(BASE, open_model(BASE))
    assert original.path == str(BASE.absolute())
    convert(BASE, tmp_path / "lsjax", "lsjax")
    assert describe_base(tmp_path / "lsjax", open_model(tmp_path / "lsjax")).sha256 == original.sha256
    changed = copy_of("llama31", tmp_path / "changed")

    def flip(tensors):
        weight = tensors["model.layers.2.mlp.up_proj.weight"]
        weight[5, 3] = np.nextafter(weight[5, 3], np.float32(np.inf))

    edit_tensors(changed, flip)
    assert describe_base(changed, open_model(changed)).sha256 != original.sha256
    (tmp_path / "a").mkdir()
    factors = jax.device_get(random_adapter(open_model(BASE).config, ("lm_head",)))
    write_peft(tmp_path / "a", Adapter(tmp_path, factors, 1.0, rank=3, base=original), open_model(BASE).config)
    lsjax.load(tmp_path / "lsjax", adapter=tmp_path / "a")
    with pytest.raises(lsjax.UserError, match=f"changed is not the base model of the adapter in {tmp_path / 'a'}"):
        lsjax.load(changed, adapter=tmp_path / "a")


def rename(old, new):
    def edit(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {re.sub(old, new, name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
        )

    return edit


def set_keys(**keys):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return edit


def drop(name):
    def edit(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({n: t for n, t in tensors.items() if name not in n}, folder / "adapter_model.safetensors")

    return edit


def change(name, function):
    def edit(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {n: function(t) if name in n else t for n, t in tensors.items()}, folder / "adapter_model.safetensors"
        )

    return edit


MISUSES = {
    "another kind": (set_keys(peft_type="IA3"), "peft_type is 'IA3'; lsjax reads LORA only"),
    "DoRA": (set_keys(use_dora=True), "use_dora is True; lsjax supports only False"),
    "biases": (set_keys(bias="all"), "bias is 'all'"),
    "whole modules": (set_keys(modules_to_save=["lm_head"]), "modules_to_save is"),
    "no alpha": (set_keys(lora_alpha=None), "lora_alpha must be a number, got None"),
    "a deeper model's": (rename(r"layers\.2", "layers.7"), "adapter for another model: this one has no place for base"),
    "another model's": (
        rename("q_proj", "qkv_proj"),
        "this one has no place for base_model.model.model.layers.0.self_",
    ),
    "a wider model's": (change("q_proj.lora_A", lambda t: np.repeat(t, 2, 1)), r"q_proj.lora_A.weight has the shape"),
    "ranks that differ": (change("1.self_attn.v_proj.lora_B", lambda t: t[:, :1].copy()), r"v_proj.lora_B.weight has"),
    "no B": (drop("layers.1.self_attn.q_proj.lora_B"), "lacks the tensor base_model.model.model.layers.1.self_attn.q"),
    "a layer missing": (drop("layers.1.self_attn.q_proj"), "lacks the factors of model.layers.1.self_attn.q_proj"),
    "not finite": (change("q_proj.lora_A", lambda t: t * np.float32(np.nan)), "holds NaN or infinity"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "damaged": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors is damaged"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
    "a wrong base file": (lambda f: (f / "base_model.json").write_text("{}"), "must hold the texts path and sha256"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_one_line_says_what_is_wrong(misuse, tmp_path):
    make_peft(tmp_path / "adapter", ["q_proj", "v_proj"])
    damage, message = MISUSES[misuse]
    damage(tmp_path / "adapter")
    with pytest.raises(lsjax.UserError, match=re.escape(message).replace(r"\ ", " ")) as caught:
        lsjax.load(BASE, adapter=tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_an_adapter_cannot_be(tmp_path):
    with pytest.raises(lsjax.UserError, match=r"no adapter at .*nothing: it is neither"):
        lsjax.load(BASE, adapter=tmp_path / "nothing")
    with pytest.raises(lsjax.UserError, match=r"no adapter at .*llama32: it is neither"):
        lsjax.load(BASE, adapter=RECORDED / "llama32")
    with pytest.raises(lsjax.UserError, match="adapter must be a text or a Path, got int"):
        lsjax.load(BASE, adapter=3)
    make_peft(tmp_path / "adapter", ["q_proj"])
    with pytest.raises(
        lsjax.UserError, match="an adapter of PEFT: give its base model, and this folder as the adapter"
    ):
        lsjax.load(tmp_path / "adapter")
    for source, adapter in ((BASE, None), (BASE, tmp_path / "adapter")):
        with pytest.raises(lsjax.UserError, match=r"is no run with LoRA .config.training.lora_rank."):
            convert(source, tmp_path / "out", "peft", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_has_no_layout_of_peft(tmp_path):
    tied = RECORDED / "llama32"
    config = open_model(tied).config
    assert config.tie_embeddings
    adapter = Adapter(tmp_path, jax.device_get(random_adapter(config, ("embed",))), 1.0, 3, 1, BaseModel("b", ""))
    with pytest.raises(lsjax.UserError, match=r"adapts a tied embedding .* --format=huggingface"):
        write_peft(tmp_path, adapter, config)
    make_peft(tmp_path / "adapter", ["embed_tokens"], tied)
    with pytest.raises(lsjax.UserError, match="adapts the embedding without the head that is tied to it"):
        lsjax.load(tied, adapter=tmp_path / "adapter")
