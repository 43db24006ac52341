"""Checks of a configuration's values, beyond the types of its keys.

The configuration's classes are defined one floor above (config.py), so arguments are described here by their names.
"""

import dataclasses
from typing import Any

from lsjax.checks import MAX_FLOAT, MAX_INTEGER, check_positive, check_seed, require


def check_config(config: Any) -> None:
    """Raises UserError that names the first impossible value of a Config."""
    check_model(config.model)
    _check_layerskip(config.layerskip)
    _check_training(config)
    _check_exits(config)
    _check_exit_adapter(config)
    d = config.data.held_out_fraction
    require(0 < d < 1, f"config.data.held_out_fraction must be between 0 and 1, got {d}")
    require(bool(config.data.text_key), "config.data.text_key is empty; name the key whose value is the text")
    check_positive("checkpoint", config.checkpoint, "every_steps", "keep")
    check_positive("evaluation", config.evaluation, "every_steps", "exit_stride")
    most = config.evaluation.max_batches
    require(most >= 0, f"config.evaluation.max_batches must not be negative, got {most}")
    sizes = dataclasses.astuple(config.mesh)
    require(
        all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
        f"config.mesh {dataclasses.asdict(config.mesh)}: sizes are positive, and at most one is -1",
    )


def check_model(m: Any) -> Any:
    """Returns a ModelConfig, or raises UserError that names the first impossible value."""
    check_positive("model", m, "num_layers", "width", "num_heads", "num_kv_heads", "head_width")
    check_positive("model", m, "feed_forward_width", "vocab_size", "context_length", "rope_theta", "rms_norm_epsilon")
    require(
        m.num_heads % m.num_kv_heads == 0,
        f"config.model.num_heads ({m.num_heads}) must be a multiple of num_kv_heads ({m.num_kv_heads})",
    )
    require(m.head_width % 2 == 0, f"config.model.head_width must be even for rotary embeddings, got {m.head_width}")
    check_positive("model.rope_scaling", m.rope_scaling, "factor", "low_frequency_factor", "original_context_length")
    fastest = max(1.0, 1 / m.rope_theta) / min(1.0, m.rope_scaling.factor)
    require(
        fastest * m.context_length <= MAX_FLOAT,
        f"config.model.rope_theta ({m.rope_theta}) or rope_scaling.factor ({m.rope_scaling.factor}) is too small: "
        "angles of the rotary embedding would be infinite",
    )
    require(
        m.rope_scaling.low_frequency_factor < m.rope_scaling.high_frequency_factor,
        "config.model.rope_scaling.low_frequency_factor must be below high_frequency_factor",
    )
    return m


def _check_layerskip(s: Any) -> None:
    require(
        0 <= s.dropout_max_rate < 1, f"config.layerskip.dropout_max_rate must be in [0, 1), got {s.dropout_max_rate}"
    )
    require(0 <= s.exit_scale <= 1, f"config.layerskip.exit_scale must be in [0, 1], got {s.exit_scale}")
    check_positive("layerskip", s, "dropout_groups", "exit_rotation", "exit_token_stride", "exit_first")
    d, floor = s.exit_distillation, s.exit_weight_floor
    require(d >= 0, f"config.layerskip.exit_distillation must not be negative, got {d}")
    require(0 <= floor <= 1, f"config.layerskip.exit_weight_floor must be in [0, 1], got {floor}")


def _check_training(config: Any) -> None:
    t = config.training
    check_positive("training", t, "total_steps", "batch_size", "sequence_length", "learning_rate")
    check_positive(
        "training", t, "gradient_clip", "gradient_accumulation", "loss_chunk", "scan_unroll", "log_every_steps"
    )
    for name in ("adam_b1", "adam_b2"):
        require(0 <= getattr(t, name) < 1, f"config.training.{name} must be in [0, 1), got {getattr(t, name)}")
    check_seed(t.seed, "config.training.seed")
    require(t.lora_rank >= 0, f"config.training.lora_rank must not be negative, got {t.lora_rank}")
    check_positive("training", t, "lora_alpha")
    for name in ("final_learning_rate_fraction", "weight_decay", "z_loss"):
        require(getattr(t, name) >= 0, f"config.training.{name} must not be negative, got {getattr(t, name)}")
    require(
        t.batch_size % t.gradient_accumulation == 0,
        f"config.training.batch_size ({t.batch_size}) must be a multiple of gradient_accumulation "
        f"({t.gradient_accumulation})",
    )
    require(
        t.sequence_length <= config.model.context_length,
        f"config.training.sequence_length ({t.sequence_length}) exceeds config.model.context_length "
        f"({config.model.context_length})",
    )
    require(
        t.batch_size * t.sequence_length <= MAX_INTEGER,
        f"config.training.batch_size ({t.batch_size}) times sequence_length ({t.sequence_length}) exceeds "
        f"{MAX_INTEGER} tokens per step",
    )
    require(
        0 <= t.warmup_steps <= t.total_steps,
        f"config.training.warmup_steps ({t.warmup_steps}) must be within 0..total_steps ({t.total_steps})",
    )


def _check_exits(config: Any) -> None:
    """Checks exits against the model, the sequences and each other."""
    s, layers, length = config.layerskip, config.model.num_layers, config.training.sequence_length
    require(
        s.exit_first <= layers,
        f"config.layerskip.exit_first ({s.exit_first}) exceeds config.model.num_layers ({layers})",
    )
    require(
        s.exit_last == 0 or s.exit_first <= s.exit_last <= layers,
        f"config.layerskip.exit_last ({s.exit_last}) must be 0 (all exits) or within exit_first..num_layers "
        f"({s.exit_first}..{layers})",
    )
    require(
        0 <= s.draft_exit < layers,
        f"config.layerskip.draft_exit ({s.draft_exit}) must be 0 (none) or an exit layer below "
        f"config.model.num_layers ({layers})",
    )
    require(
        not s.draft_exit
        or s.exit_adapter != "none"
        or s.exit_weight_floor > 0
        or (s.draft_exit > 1 and s.exit_scale > 0),
        f"config.layerskip.draft_exit ({s.draft_exit}) weighs nothing: set exit_weight_floor, such as 0.3",
    )
    require(
        not s.exit_distillation or bool(s.draft_exit) or s.exit_curriculum != "none",
        f"config.layerskip.exit_distillation is {s.exit_distillation}, but no early exit is trained: choose an "
        "exit_curriculum or a draft_exit",
    )
    require(
        length % s.exit_token_stride == 0,
        f"config.layerskip.exit_token_stride ({s.exit_token_stride}) must divide config.training.sequence_length "
        f"({length})",
    )


def _check_exit_adapter(config: Any) -> None:
    """Checks that nothing else is asked for than to train the adapter of a model's exit."""
    if config.layerskip.exit_adapter == "none":
        return
    require(bool(config.layerskip.draft_exit), "config.layerskip.exit_adapter needs the exit it adapts: set draft_exit")
    require(bool(config.initial_model), "config.layerskip.exit_adapter needs the model it adapts: set initial_model")
    trained_elsewhere = {
        "layerskip.dropout_max_rate": 0.0,
        "layerskip.exit_curriculum": "none",
        "layerskip.exit_distillation": 0.0,
        "training.frozen": "",
        "training.z_loss": 0.0,
        "training.lora_rank": 0,
    }
    for name, off in trained_elsewhere.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        require(
            value == off,
            f"config.layerskip.exit_adapter trains the adapter alone, so config.{name} must be {off!r}, got {value!r}",
        )
