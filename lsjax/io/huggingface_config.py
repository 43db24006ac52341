"""Converts config.json of a Hugging Face Llama to a ModelConfig, and back."""

from typing import Any

from lsjax.config import ModelConfig, RopeScaling
from lsjax.config_checks import check_model
from lsjax.errors import UserError

# Keys that change what a Llama computes, with the only value that lsjax supports.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def model_config_from_hf(tree: dict[str, Any], where: str) -> ModelConfig:
    """Returns the ModelConfig that a config.json describes.

    where: the path of the file, for error messages.
    Raises UserError that names the key when one is missing or asks for anything other than a plain Llama.
    """
    kinds = tree.get("architectures") or ["LlamaForCausalLM"]
    if tree.get("model_type") != "llama" or kinds != ["LlamaForCausalLM"]:
        raise UserError(
            f"{where}: model_type {tree.get('model_type')!r}, architectures {kinds}: lsjax reads only LlamaForCausalLM"
        )
    for key, value in _REQUIRED_VALUES.items():
        if tree.get(key, value) not in (value, None):
            raise UserError(f"{where}: {key} is {tree[key]!r}; lsjax supports only {value!r}")
    width, heads = _number(tree, "hidden_size", int, where), _number(tree, "num_attention_heads", int, where)
    tied = tree.get("tie_word_embeddings") or False
    if heads < 1 or not isinstance(tied, bool):
        raise UserError(f"{where}: num_attention_heads is {heads}, tie_word_embeddings {tied!r}")
    theta, scaling = _rope(tree, where)
    config = ModelConfig(
        num_layers=_number(tree, "num_hidden_layers", int, where),
        width=width,
        num_heads=heads,
        num_kv_heads=_number(tree, "num_key_value_heads", int, where, heads),
        head_width=_number(tree, "head_dim", int, where, width // heads),
        feed_forward_width=_number(tree, "intermediate_size", int, where),
        vocab_size=_number(tree, "vocab_size", int, where),
        context_length=_number(tree, "max_position_embeddings", int, where, 2048),
        tie_embeddings=tied,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_epsilon=_number(tree, "rms_norm_eps", float, where, 1e-6),
    )
    try:
        return check_model(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the entries of config.json for a model, with the rotary embedding as transformers 4 and 5 spell it."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | _scaling_to_hf(config.rope_scaling)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.feed_forward_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.rms_norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling.kind == "none" else scaling,
        "rope_parameters": rope,
    }


def _rope(tree: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Returns theta and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).

    As in transformers, a `rope_scaling` that is not empty replaces all of `rope_parameters`.
    """
    new, old = tree.get("rope_parameters") or {}, tree.get("rope_scaling") or {}
    for settings in (new, old):
        if not isinstance(settings, dict):
            raise UserError(f"{where}: rope settings must be an object, got {settings!r}")
        if nested := [key for key, value in settings.items() if isinstance(value, dict)]:
            raise UserError(f"{where}: rope settings for kinds of layers ({nested[0]}) are not those of a plain Llama")
    scaling = old or new
    theta = _number(
        scaling | {"rope_theta": scaling.get("rope_theta", tree.get("rope_theta"))}, "rope_theta", float, where, 1e4
    )
    if old and new.get("rope_theta", theta) != theta:
        raise UserError(
            f"{where}: rope_parameters has rope_theta {new['rope_theta']!r}, but rope_scaling replaces it and means "
            f"{theta:g}; give one of the two, or rope_theta in rope_scaling"
        )
    if scaling.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError(
            f"{where}: partial_rotary_factor is {scaling['partial_rotary_factor']!r}; lsjax supports only 1.0"
        )
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", _number(scaling, "factor", float, where))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=_number(scaling, "factor", float, where),
            low_frequency_factor=_number(scaling, "low_freq_factor", float, where),
            high_frequency_factor=_number(scaling, "high_freq_factor", float, where),
            original_context_length=_number(scaling, "original_max_position_embeddings", int, where),
        )
    raise UserError(f"{where}: rope type {kind!r}; lsjax supports default, linear and llama3")


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return {}


def _number(tree: dict[str, Any], key: str, kind: type, where: str, default: float | None = None) -> Any:
    """Returns a finite number of type `kind` from a JSON object; `default` replaces a missing or null one."""
    value = tree.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where} lacks {key}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e18 < value < 1e18
    if not number or kind(value) != value:
        raise UserError(f"{where}: {key} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
    return kind(value)
