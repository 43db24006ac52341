"""Damaged models: Hugging Face folders, shards and GGUF files."""

import functools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import lsjax
from tests.fuzz import mutations
from tests.fuzz.harness import Case
from tests.fuzz.mutations import Damage, flip_bits
from tests.fuzz.parts import check_model, same_params
from tests.helpers.gguf_files import write_gguf
from tests.helpers.recorded import RECORDED

_RECORDED = RECORDED / "smollm2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Where a Hugging Face config says what a ModelConfig says: {key: (field, type, default)}.
_FIELDS = {
    "hidden_size": "width", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_width", "intermediate_size": "feed_forward_width",
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length", "rms_norm_eps": "rms_norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip


def damaged_copy(source: Path, watch: Any, name: str, file: str, damage: Damage) -> Path:
    """Returns a copy of a model in the case's folder with one file damaged."""
    target = watch.folder / name
    if source.is_dir():
        shutil.copytree(source, target)
        damage(target / file)
    else:
        shutil.copy(source, target)
        damage(target)
    watch.prepared()
    return target


def load_case(name: str, part: str, file: str, damage: Damage, check: Callable | None, copy: str = "model") -> Case:
    """Returns a case that loads a damaged copy of a good part."""

    def call(parts, watch):
        path = damaged_copy(getattr(parts, part), watch, copy, file, damage)
        return path, lsjax.load(path)

    return Case(name, call, check)


def says_what_its_files_say(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a loaded Hugging Face folder: its config is that of the file, and its parameters are unchanged."""
    path, model = result
    tree = json.loads((path / "config.json").read_bytes())
    for key, field in _FIELDS.items():
        if tree.get(key) is not None:
            assert getattr(model.config, field) == tree[key], f"{key} is {tree[key]!r} in config.json: {model.config}"
            assert not isinstance(tree[key], bool) or field == "tie_embeddings"
    rope = tree.get("rope_parameters") or {}
    assert model.config.rope_theta == (rope.get("rope_theta") or tree.get("rope_theta") or 1e4)
    assert same_params(model.params, parts.model.params), "its parameters are not those of the file"
    check_model(model)
    check_tokenizer(model)


def holds_the_files_tensors(_: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a loaded folder with damaged weights: what the file holds is what is loaded."""
    path, model = result
    stored = load_file(path / "model.safetensors")
    for ours, theirs in (
        (model.params["embed"], stored["model.embed_tokens.weight"]),
        (model.params["final_norm"]["scale"], stored["model.norm.weight"]),
        (model.params["layers"]["feed_forward"]["down"][1], stored["model.layers.1.mlp.down_proj.weight"].T),
    ):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.astype(np.float32))
    check_model(model)


def has_the_same_weights(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a model whose damage left the weights alone."""
    assert same_params(result[1].params, parts.model.params), "its parameters are not those of the file"
    check_model(result[1])
    check_tokenizer(result[1])


def is_the_trained_model(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a model loaded from a damaged workdir: bit for bit the trained one."""
    assert same_params(result[1].params, parts.trained.params), "its parameters are not those that were saved"
    check_model(result[1])
    check_tokenizer(result[1])


def check_tokenizer(model: lsjax.Model) -> None:
    """Fails unless a model's tokenizer gives ids that exist, and text for them."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode("def main(): return 0")
    assert all(0 <= index < model.config.vocab_size for index in ids)
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.stop
    assert all(type(index) is int and index >= 0 for index in tokenizer.stop)


def huggingface_cases() -> Iterator[Case]:
    rng = random.Random(11)
    for file in ("config.json", *_TOKENIZER_FILES, "model.safetensors"):
        for name, damage in mutations.WHOLE_FILE.items():
            yield load_case(f"huggingface {file}: {name}", "huggingface", file, damage, has_the_same_weights)
    for name, damage in mutations.json_damages(_RECORDED / "config.json", rng, 50).items():
        yield load_case(
            f"huggingface config.json: {name}", "huggingface", "config.json", damage, says_what_its_files_say
        )
    for file, count in zip(_TOKENIZER_FILES, (40, 15, 15), strict=True):
        for name, damage in mutations.json_damages(_RECORDED / file, rng, count).items():
            yield load_case(f"huggingface {file}: {name}", "huggingface", file, damage, has_the_same_weights)
    for name, damage in mutations.SAFETENSORS.items():
        yield load_case(f"safetensors: {name}", "huggingface", "model.safetensors", damage, holds_the_files_tensors)
    header = 8 + int.from_bytes((_RECORDED / "model.safetensors").read_bytes()[:8], "little")
    for seed in range(25):
        damage = flip_bits(seed, last=header)
        yield load_case(f"safetensors: header flip {seed}", "huggingface", "model.safetensors", damage, headers_flip)
    for seed in range(10):
        damage = flip_bits(seed, first=header)
        yield load_case(f"safetensors: data flip {seed}", "huggingface", "model.safetensors", damage,
                        holds_the_files_tensors)  # fmt: skip
    for value in (math.nan, math.inf, -math.inf):
        for tensor in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight"):
            damage = functools.partial(put_into_tensor, tensor=tensor, value=value)
            yield load_case(f"safetensors: {value} in {tensor}", "huggingface", "model.safetensors", damage, None)
    yield from sharded_cases(rng)


def headers_flip(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a folder one bit of whose safetensors header differs: a flip that loads changed nothing but spelling."""
    assert same_params(result[1].params, parts.model.params), "its parameters are not those that were saved"


def put_into_tensor(path: Path, tensor: str, value: float) -> None:
    """Puts one value into a stored tensor."""
    stored = load_file(path)
    stored[tensor] = stored[tensor].copy()
    stored[tensor].flat[7] = value
    save_file(stored, path)


_SHARDED_INDEX = "model.safetensors.index.json"


def sharded_cases(rng: random.Random) -> Iterator[Case]:
    """Damages of the index of several files, and of the files that it names."""
    first = "model-00001-of-00009.safetensors"

    def places(file: Any, tensor: str = "model.norm.weight") -> Damage:
        return mutations.set_key(("weight_map", tensor), file)

    damages: dict[str, Damage] = {
        "no map": mutations.drop_key(("weight_map",)),
        "an empty map": mutations.set_key(("weight_map",), {}),
        "a list for a map": mutations.set_key(("weight_map",), [1]),
        "a tensor without a file": mutations.drop_key(("weight_map", "model.norm.weight")),
        "a tensor of another file": places(first),
        "a tensor that is nowhere": places(first, "model.norm.bias"),
        "a path out": places("../huggingface/model.safetensors"),
        "an absolute path": places("/etc/passwd"),
        "an empty name": places(""),
        "a null character": places("a\0b"),
        "a surrogate": places("\ud800"),
        "a name of 5000 characters": places("y" * 5000),
        "numbers for files": places(3),
        "a folder for a file": places("."),
    }
    for name, damage in damages.items():
        yield load_case(f"index: {name}", "sharded", _SHARDED_INDEX, damage, None)
    for name, damage in mutations.WHOLE_FILE.items():
        yield load_case(f"index: {name}", "sharded", _SHARDED_INDEX, damage, None)

    def first_shard(damage: Damage) -> Damage:
        return lambda path: damage(min(path.parent.glob("model-0*.safetensors")))

    for name, damage in mutations.WHOLE_FILE.items():
        yield load_case(f"shard {first[:11]}: {name}", "sharded", _SHARDED_INDEX, first_shard(damage), None)


# Fields of GGUF metadata with values of other types and sizes.
_GGUF_FIELDS = [
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length",
    "llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
]  # fmt: skip
_GGUF_VALUES: dict[str, Any] = {
    "0": 0, "1": 1, "2**31": 2**31, "2**32-1": 2**32 - 1, "2.5": 2.5, "nan": math.nan, "-1.0": -1.0, "inf": math.inf,
    "true": True, "a text": "x", "an empty text": "", "[1]": [1], "[-1]": [-1], "texts": ["a", "b"], "1e-30": 1e-30,
    "1e38": 1e38, "a surrogate's bytes": "\ufffd", "[0.5]": [0.5], "missing": None,
}  # fmt: skip


def gguf_cases() -> Iterator[Case]:
    rng = random.Random(12)
    chosen: set[tuple[str, str]] = set()
    while len(chosen) < 60:
        chosen.add((rng.choice(_GGUF_FIELDS), rng.choice(sorted(_GGUF_VALUES))))
    for field, name in sorted(chosen):
        yield Case(f"gguf {field}: {name}", functools.partial(_load_gguf, field=field, name=name), agrees_with_metadata)
    for name, damage in mutations.WHOLE_FILE.items():
        if name not in ("deleted", "a loop", "bytes after its end"):
            yield load_case(f"gguf: {name}", "gguf", "", damage, None, "model.gguf")
    for seed in range(10):
        damage = mutations.truncate(0.05 + 0.09 * seed)
        yield load_case(f"gguf: truncated {seed}", "gguf", "", damage, None, "model.gguf")
    for seed in range(40):
        yield load_case(f"gguf: metadata flip {seed}", "gguf", "", gguf_flip(seed, "fields"), has_finite_weights,
                        "model.gguf")  # fmt: skip
    for seed in range(30):
        yield load_case(f"gguf: directory flip {seed}", "gguf", "", gguf_flip(seed, "directory"), has_the_same_weights,
                        "model.gguf")  # fmt: skip


def _load_gguf(parts: Any, watch: Any, field: str, name: str) -> tuple[Path, lsjax.Model]:
    value = _GGUF_VALUES[name]
    change = {"without": [field]} if value is None else {"fields": {field: value}}
    path = write_gguf(watch.folder / "model.gguf", "smollm2", **change)
    watch.prepared()
    return path, lsjax.load(path)


def agrees_with_metadata(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a GGUF file with another value in one field: the weights are the same, and numbers are numbers."""
    config = result[1].config
    for field in ("num_layers", "width", "num_heads", "num_kv_heads", "head_width", "context_length"):
        assert type(getattr(config, field)) is int, f"{field} is {getattr(config, field)!r}"
    assert math.isfinite(config.rope_theta)
    assert math.isfinite(config.rms_norm_epsilon)
    has_the_same_weights(parts, result)


def gguf_flip(seed: int, part: str) -> Damage:
    """Returns a damage that flips a bit in the metadata fields of a GGUF file, or in its directory of tensors."""

    def damage(path: Path) -> None:
        fields, data = mutations.gguf_layout(path)
        first, last = (0, fields) if part == "fields" else (fields, data)
        flip_bits(seed, first=first, last=last)(path)

    return damage


def has_finite_weights(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a GGUF file one bit of whose metadata differs, which may be a good file of a slightly other model."""
    has_the_same_weights(parts, result)
