"""Adapters against transformers and PEFT on the same weights, in both directions."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import lsjax  # noqa: E402
from lsjax.io.adapter import Adapter  # noqa: E402
from lsjax.io.base_model import describe_base  # noqa: E402
from lsjax.io.convert import convert  # noqa: E402
from lsjax.io.open import open_model  # noqa: E402
from lsjax.io.peft import write_peft  # noqa: E402
from tests.helpers.llamas import make_llama, run_llama  # noqa: E402
from tests.helpers.runs import continuing, replace  # noqa: E402
from tests.model.test_lora import random_adapter  # noqa: E402
from tests.parity.test_transformers import TOKENS, assert_close  # noqa: E402

VARIANTS = ("llama1", "llama31", "smollm2", "multi_query", "wide_heads", "odd_widths")
LAYERS = tuple(
    f"layers/{m}" for m in ("attention/qkv", "attention/output", "feed_forward/gate_up", "feed_forward/down")
)


def logits_of(model):
    return np.asarray(lsjax.forward(model.params, TOKENS, model.config))


def with_peft(base, adapter):
    """Returns the model that transformers and PEFT make of a base folder and an adapter folder."""
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def peft_logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_peft_reads(variant, tmp_path):
    """Adapts every matrix; of a tied embedding, which PEFT cannot adapt as a whole, none."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    plain = run_llama(make_llama(base, variant), TOKENS)[0]
    source = open_model(base)
    targets = LAYERS if source.config.tie_embeddings else ("embed", "lm_head", *LAYERS)
    factors = jax.tree.map(lambda a: 0.3 * np.asarray(a), random_adapter(source.config, targets))
    folder.mkdir()
    write_peft(folder, Adapter(folder, factors, 0.75, 3, base=describe_base(base, source)), source.config)
    theirs = peft_logits(with_peft(base, folder))
    assert np.abs(theirs - plain).max() > 0.1 * np.abs(plain).max()
    assert_close(logits_of(lsjax.load(base, adapter=folder)), theirs)
    convert(base, tmp_path / "merged", "huggingface", adapter=folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(run_llama(merged, TOKENS)[0], theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["k_proj", "down_proj", "embed_tokens", "lm_head"], "rank_pattern": {"k_proj": 5}},
        {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_what_peft_writes_we_read(settings, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_llama(base, "llama31")
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    if "lm_head" in settings["target_modules"]:  # then PEFT saves copies of the base's weights as well
        model.save_pretrained(folder)
        with pytest.raises(lsjax.UserError, match=r"base_layer\.weight, a base weight: .*save_embedding_layers=False"):
            lsjax.load(base, adapter=folder)
    model.save_pretrained(folder, save_embedding_layers=False)
    theirs = peft_logits(model)
    assert_close(logits_of(lsjax.load(base, adapter=folder)), theirs)
    with model.disable_adapter():
        assert np.abs(peft_logits(model) - theirs).max() > 0.01 * np.abs(theirs).max()


def test_peft_settings_that_we_do_not_compute_are_refused(tmp_path):
    make_llama(tmp_path / "base", "llama31")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(lsjax.UserError, match="use_dora is True"):
        lsjax.load(tmp_path / "base", adapter=tmp_path / "adapter")


def test_a_trained_run_goes_to_peft(tiny_run, tmp_path):
    make_llama(tmp_path / "base", "llama31")
    config = continuing(tiny_run, tmp_path / "base")
    config = replace(config, training={"lora_rank": 2, "lora_targets": "layers,lm_head", "learning_rate": 0.02})
    result = lsjax.train(config, tmp_path / "run", verbose=False)
    convert(tmp_path / "run", tmp_path / "adapter", "peft")
    convert(tmp_path / "run", tmp_path / "merged", "huggingface")
    theirs = peft_logits(with_peft(tmp_path / "base", tmp_path / "adapter"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert np.abs(run_llama(base, TOKENS)[0] - theirs).max() > 0.01 * np.abs(theirs).max()
    for ours in (
        run_llama(merged, TOKENS)[0],
        logits_of(lsjax.load(tmp_path / "base", adapter=tmp_path / "adapter")),
        logits_of(lsjax.load(tmp_path / "run")),
        np.asarray(lsjax.forward(jax.device_get(result.params), TOKENS, config.model)),
    ):
        assert_close(ours, theirs)
