"""Compares with transformers on folders that it wrote, with what it computed (see tests/parity/record.py)."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lsjax
from lsjax.config import RopeScaling
from lsjax.io.checkpoints import save_model
from lsjax.io.convert import convert
from lsjax.io.huggingface import open_huggingface, write_huggingface
from lsjax.io.tensors import all_finite
from lsjax.model.transformer import abstract_params
from lsjax.parallel.sharding import make_mesh, tree_shardings
from tests.helpers.recorded import RECORDED, copy_of, edit_tensors

VARIANTS = sorted(path.name for path in RECORDED.iterdir())


def test_there_are_recorded_models():
    assert len(VARIANTS) >= 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_states_and_greedy_tokens_are_those_of_transformers(variant):
    model = lsjax.load(RECORDED / variant)
    expected = np.load(RECORDED / variant / "expected.npz")
    tokens = expected["tokens"]
    for ours, theirs in (
        (lsjax.forward(model.params, tokens, model.config)[:, -4:], expected["logits"]),
        (lsjax.hidden_states(model.params, tokens, model.config)[:, :, -4:], expected["states"]),
    ):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    greedy = lsjax.generate(model, tokens[:, :16].tolist(), 24).tokens[0]
    assert greedy == expected["greedy"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_keeps_every_bit(dtype, tmp_path):
    source = copy_of("llama31", tmp_path / "a")
    tensors = {name: t.astype(jnp.dtype(dtype)) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "b", "lsjax")
    convert(tmp_path / "b", tmp_path / "c", "huggingface")
    again = load_file(tmp_path / "c" / "model.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].tobytes() == tensor.tobytes(), name


def test_the_tokenizer_and_both_spellings_of_rope_survive(tmp_path):
    for variant in ("llama31", "llama32"):
        convert(RECORDED / variant, tmp_path / variant, "huggingface")
        ours, theirs = lsjax.load(tmp_path / variant), lsjax.load(RECORDED / variant)
        assert ours.config == theirs.config
        assert ours.config.rope_scaling.kind == "llama3"
        assert ours.tokenizer.encode("def f():\n") == theirs.tokenizer.encode("def f():\n")
        assert (ours.tokenizer.begin, ours.tokenizer.stop) == (theirs.tokenizer.begin, theirs.tokenizer.stop)
        written = json.loads((tmp_path / variant / "config.json").read_text())
        assert written["rope_scaling"]["factor"] == written["rope_parameters"]["factor"]


def test_several_files_with_an_index_are_one_model(tmp_path):
    model = lsjax.load(RECORDED / "llama31")
    write_huggingface(tmp_path, model.config, model.params, model.tokenizer, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    again = lsjax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


def test_shards_of_a_mesh_are_read_each_on_its_own():
    """Loads the same values on 8 devices; no device holds a whole parameter of several axes."""
    source = open_huggingface(RECORDED / "llama31")
    whole = lsjax.load(RECORDED / "llama31").params
    mesh = make_mesh(lsjax.Config().mesh.__class__(data=2, fsdp=2, tensor=2))
    shapes = abstract_params(source.config)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=s), shapes, tree_shardings(shapes, mesh)
    )
    spread = source.load_params(abstract)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)
    qkv = spread["layers"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.size == qkv.size // 4


def test_several_stop_tokens_and_none_at_all(tmp_path):
    folder = copy_of("smollm2", tmp_path / "a")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert lsjax.load(folder).tokenizer.stop == (2, 3)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=3)
    assert lsjax.load(folder).tokenizer.stop == (3,)
    edit_json(folder / "config.json", eos_token_id=None)
    assert lsjax.load(folder).tokenizer.stop == (2,)  # eos_token of tokenizer_config.json
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(lsjax.UserError, match="nothing says which token"):
        lsjax.load(folder)


def test_a_conversation_goes_through_the_models_template(tmp_path):
    folder = copy_of("smollm2", tmp_path / "a")
    template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = lsjax.load(folder).tokenizer
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    plain = tokenizer.encode
    assert ids == [1, *plain("user\nhi"), 2, *plain("\n"), 1, *plain("assistant\n")]
    assert tokenizer.encode("</s>") != [2]  # in plain text it is text
    with pytest.raises(lsjax.UserError, match="no chat template"):
        lsjax.load(RECORDED / "llama31").tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_limits_that_a_tokenizer_was_saved_with_are_not_obeyed(tmp_path):
    folder = copy_of("smollm2", tmp_path / "a")
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    edit_json(folder / "tokenizer.json", truncation=cut, padding=pad | {"pad_to_multiple_of": None})
    text = "def main(): return 0"
    assert lsjax.load(folder).tokenizer.encode(text) == lsjax.load(RECORDED / "smollm2").tokenizer.encode(text)


@pytest.mark.parametrize("template", ["{{ range(10 ** 30) }}", "{{ 1 + 'a' }}", "{% if %}", [{"name": "x"}], {"a": 1}])
def test_a_template_that_fails_is_one_error(template, tmp_path):
    folder = copy_of("smollm2", tmp_path / "a")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(lsjax.UserError, match="chat template"):
        lsjax.load(folder).tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_a_shape(folder: Path) -> None:
    """Writes a header whose shape does not fit its bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b"[56,36]") > 0
    path.write_bytes(data.replace(b"[56,36]", b"[99,36]", 1))


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def index_that_lies(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "part.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names | {"more": "part.safetensors"}})
    )


def index_that_leads_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def set_config(**values):
    return lambda folder: edit_json(folder / "config.json", **values)


def set_tensor(name: str, value):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__setitem__(name, value))


def pointer(name: str):
    return lambda folder: (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD = {
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(DOWN)), f"lacks the tensor {DOWN} [36, 56]"),
    "an extra tensor": (set_tensor("model.layers.0.self_attn.q_proj.bias", np.zeros(36, np.float32)), "q_proj.bias"),
    "a wrong shape": (
        set_tensor(DOWN, np.zeros((36, 55), np.float32)),
        f"{DOWN} has shape [36, 55], its config says [36, 56]",
    ),
    "integers": (set_tensor(DOWN, np.zeros((36, 56), np.int8)), "stored as I8"),
    "another head under tied embeddings": (set_tensor("lm_head.weight", np.zeros((288, 36), np.float32)), "tie_word"),
    "another architecture": (set_config(model_type="mistral", architectures=["MistralForCausalLM"]), "'mistral'"),
    "an unknown rope type": (set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope type 'yarn'"),
    "biases": (set_config(attention_bias=True), "attention_bias"),
    "a missing key": (set_config(hidden_size=None), "lacks hidden_size"),
    "a fractional size": (set_config(num_hidden_layers=2.5), "num_hidden_layers must be a whole number"),
    "heads that do not group": (set_config(num_key_value_heads=2), "multiple of num_kv_heads"),
    "a truncated file": (lambda f: cut_file(f / "model.safetensors"), "model.safetensors is damaged"),
    "a lying header": (lie_about_a_shape, "model.safetensors is damaged"),
    "an index that lies": (index_that_lies, "lacks the tensor more"),
    "an index that leads elsewhere": (index_that_leads_elsewhere, "not a file in"),
    "a pickle": (pickle_instead, "is a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "a link to nothing": (link_to_nothing, "is a link to blobs/gone, which does not exist"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "a stop token out of range": (set_config(eos_token_id=[999]), "not in the vocabulary"),
    "a negative stop token": (set_config(eos_token_id=-1), "not in the vocabulary"),
    "no heads": (set_config(num_attention_heads=0), "num_attention_heads is 0"),
    "an infinite size": (set_config(hidden_size=float("inf")), "hidden_size must be a whole number"),
    "a text for a truth": (set_config(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    "a billion layers": (set_config(num_hidden_layers=10**9), "lacks the tensor model.layers.3."),
    "true for a stop token": (set_config(eos_token_id=[True]), "eos_token_id must be an id or a list of ids"),
    "NaN": (set_tensor(DOWN, np.full((36, 56), np.nan, np.float32)), f"{DOWN} holds NaN or infinity"),
    "infinity": (set_tensor(DOWN, np.full((36, 56), -np.inf, np.float16)), f"{DOWN} holds NaN or infinity"),
    "a pointer": (pointer("model.safetensors"), "model.safetensors is a Git LFS pointer"),
    "a pointer for the config": (pointer("config.json"), "config.json is a Git LFS pointer"),
    "only a SentencePiece model": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "only tokenizer.model",
    ),
    "a file of weights without an index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"),
        "it has model-00001-of-00001.safetensors, which needs an index",
    ),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "an adapter of PEFT"),
    "a config nested too deep": (
        lambda f: (f / "config.json").write_text('{"a": ' * 100_000 + "}" * 100_000),
        "config.json is not JSON",
    ),
    "two rotary bases": (
        set_config(rope_parameters={"rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_parameters has rope_theta 500000.0",
    ),
    "rotary settings for kinds of layers": (set_config(rope_parameters={"full_attention": {}}), "kinds of layers"),
    "an empty vocabulary": (lambda f: edit_json(f / "tokenizer.json", model={"type": "WordLevel"}), "tokenizer.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused_whole(what, tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    spoil, message = BAD[what]
    lsjax.load(folder)
    spoil(folder)
    with pytest.raises(lsjax.UserError) as raised:
        lsjax.load(folder)
    assert message in str(raised.value)
    assert str(folder) in str(raised.value)
    assert str(raised.value).count(str(folder / "config.json")) <= 1


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    edit_tensors(
        folder, lambda t: t.__setitem__("model.embed_tokens.weight", t["model.embed_tokens.weight"][:200].copy())
    )
    edit_json(folder / "config.json", vocab_size=200)
    with pytest.raises(lsjax.UserError, match="tokenizer has 270 tokens, its embedding 200"):
        lsjax.load(folder)


def test_what_old_converters_left_behind_is_ignored(tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    before = lsjax.load(folder).params

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit_tensors(folder, add)
    jax.tree.map(np.testing.assert_array_equal, before, lsjax.load(folder).params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_tied_head_may_be_stored_again_in_a_narrower_dtype(dtype, tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    before = lsjax.load(folder).params

    def add(tensors, factor=1.0):
        tensors["lm_head.weight"] = (factor * tensors["model.embed_tokens.weight"]).astype(jnp.dtype(dtype))

    edit_tensors(folder, add)
    jax.tree.map(np.testing.assert_array_equal, before, lsjax.load(folder).params)
    edit_tensors(folder, lambda tensors: add(tensors, 1.1))
    with pytest.raises(lsjax.UserError, match="tie_word_embeddings"):
        lsjax.load(folder)


@pytest.mark.parametrize(
    ("values", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_theta": 5e5}, 5e5, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, 1e4, RopeScaling("linear", 4.0)),
    ],
)
def test_rope_scaling_replaces_rope_parameters_as_in_transformers(values, theta, scaling, tmp_path):
    folder = copy_of("smollm2", tmp_path / "model")
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=None)
    edit_json(folder / "config.json", **values, rope_scaling={"rope_type": "linear", "factor": 4.0})
    config = lsjax.read_model_config(folder)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinity_are_found_wherever_they_are(dtype):
    dtype = jnp.dtype(dtype)
    largest = float(jnp.finfo(dtype).max)
    values = np.array([0.0, -0.0, largest, -largest, float(jnp.finfo(dtype).tiny), 1.0], dtype)
    assert all_finite(values)
    assert all_finite(np.tile(values, (4, 1)).T)
    assert all_finite(values[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in range(len(values)):
            spoiled = values.copy()
            spoiled[place] = bad
            assert not all_finite(spoiled)


def test_a_checkpoint_with_nan_is_refused(tmp_path):
    model = lsjax.load(RECORDED / "smollm2")
    convert(RECORDED / "smollm2", tmp_path / "good", "lsjax")
    lsjax.load(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    shutil.rmtree(tmp_path / "bad" / "checkpoints")
    down = np.array(model.params["layers"]["feed_forward"]["down"])
    down[1, 2, 3] = np.nan
    feed_forward = model.params["layers"]["feed_forward"] | {"down": down}
    save_model(tmp_path / "bad", model.params | {"layers": model.params["layers"] | {"feed_forward": feed_forward}})
    for settings in ({}, {"for_decoding": True}):
        with pytest.raises(lsjax.UserError, match="bad: layers/feed_forward/down holds NaN or infinity"):
            lsjax.load(tmp_path / "bad", **settings)


def test_a_name_of_300_characters_is_no_model():
    with pytest.raises(lsjax.UserError, match="no model at"):
        lsjax.load("x" * 300)


def test_converted_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        convert(copy_of("llama32", tmp_path / "model"), tmp_path / "out", "huggingface")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_conversion_never_overwrites_and_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(lsjax.UserError, match="exists and holds something"):
        convert(RECORDED / "smollm2", target, "huggingface")
    broken = copy_of("smollm2", tmp_path / "broken")
    cut_file(broken / "model.safetensors")
    with pytest.raises(lsjax.UserError, match="damaged"):
        convert(broken, tmp_path / "new", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
