"""Configuration: frozen dataclasses, built from the ml_collections config that a file in configs/ returns.

A configuration file starts from `default_config()`, so that every key exists (and can be overridden on the
command line), and sets what differs. `Config.from_dict` checks names, types and values once, at start.
"""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from lsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of the rotary embedding. `kind`: "none", "linear" (divide by factor) or "llama3"."""

    kind: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama. Letters of the docstrings: L num_layers, D width, N num_heads, K num_kv_heads,
    H head_width, F feed_forward_width, V vocab_size."""

    num_layers: int = 12
    width: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_width: int = 64
    feed_forward_width: int = 704
    vocab_size: int = 2048
    context_length: int = 1024
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_epsilon: float = 1e-5

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LayerSkipConfig:
    """The recipe (arXiv 2404.16710, section 4.1). The defaults are the paper's continual setting.

    `dropout_granularity`: "sample" draws for each sequence (the paper) and masks; "subset" keeps as many sequences of
    every device, drawn anew for each layer, and computes only these (after DINOv2's stochastic depth, arXiv
    2304.07193), a device's sequences of a microbatch going by `dropout_groups` of equal size; "batch" draws once for
    the whole batch, and skips. What "subset" draws depends on the number of devices.
    `exit_weight_floor`: least weight of an active exit, as a share of the last layer's (0 is the paper, where the
    first exits, the cheapest to draft with, weigh next to nothing).
    `exit_distillation`: beside the cross-entropy of each early exit, this much of its KL divergence from the last
    layer's own distribution, gradient stopped (not in the paper; EESD, arXiv 2406.03853). 0 is the paper.
    `exit_distillation_schedule`: "constant", or "linear": from nothing up to `exit_distillation` over the run (after
    PS-KD, arXiv 2006.12000).
    `draft_exit`: the exit layer that decoding will draft with: on at every step, whatever the curriculum,
    `exit_first` and `exit_last` say, and the only one that `exit_distillation` is for (0 is the paper: none is singled
    out, and all learn alike).
    `exit_first`: exit layers below it are left out of the curriculum (1 is the paper; asking the first layers of a
    pretrained model to predict costs its last layer dear). `exit_last`: so are those above it, but for the last layer
    (0: none is): exits that will not draft need not learn to.
    `exit_token_stride`: early exits look at one token in so many, another one each step (the last layer at all).
    `exits_train_head`: whether early exits pull on the shared norm and head (as in the paper)."""

    dropout_max_rate: float = 0.1
    dropout_depth_schedule: str = "exponential"
    dropout_time_schedule: str = "constant"
    dropout_granularity: str = "sample"
    dropout_groups: int = 4
    dropout_rescale: bool = False
    exit_scale: float = 0.2
    exit_curriculum: str = "rotational"
    exit_rotation: int = 8
    exit_weight_floor: float = 0.0
    exit_distillation: float = 0.0
    exit_distillation_schedule: str = "constant"
    draft_exit: int = 0
    exit_first: int = 1
    exit_last: int = 0
    exit_token_stride: int = 1
    exits_train_head: bool = True


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`corpus`: "python" (the running interpreter's standard library), a folder of text, or a .jsonl file.
    `tokenizer`: a tokenizer.json; empty takes that of `initial_model`, or without one trains a byte-level BPE of
    model.vocab_size entries on the corpus.
    `separate_documents`: whether positions and attention start anew at each document packed into a sequence; if not,
    a token sees all that stands before it (and cuDNN's attention, which wants a mask for it, is faster).
    `directory`: where packed data is kept; empty means WORKDIR/data."""

    corpus: str = "python"
    file_pattern: str = "**/*"
    text_key: str = "text"
    held_out_fraction: float = 0.03
    tokenizer: str = ""
    separate_documents: bool = True
    directory: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """`batch_size`: sequences a step over all hosts. `compute_dtype`: "auto" is bfloat16, on a CPU only where
    it has instructions for it, else float32; there products with weights are rounded to it and nothing else.
    `attention`: "auto" is flash attention where the platform has it, "flash" insists on it, "plain" avoids it.
    `rematerialize`: what the backward pass recomputes to save memory, from "none" over "elementwise" and
    "feed_forward" to "layer" (all but each layer's input). `loss_chunk`: tokens of a device whose logits exist at once.
    `scan_unroll`: layers per iteration of the layer loop. `z_loss`: beside the cross-entropy of each exit, this much of
    the square of its log-normalizer, which keeps logits from drifting (PaLM, arXiv 2204.02311, has 1e-4).
    `frozen`: parameters that stay as they are, such as "embed" or "embed,layers/attention_norm" (paths as in
    lsjax/scale/sharding.py, or their beginnings)."""

    total_steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 1e-3
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 50
    weight_decay: float = 0.1
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    gradient_clip: float = 1.0
    z_loss: float = 0.0
    gradient_accumulation: int = 1
    seed: int = 0
    compute_dtype: str = "auto"
    attention: str = "auto"
    rematerialize: str = "layer"
    loss_chunk: int = 1024
    scan_unroll: int = 1
    frozen: str = ""
    log_every_steps: int = 10


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. One of them may be -1: what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """`max_batches`: held-out batches per evaluation; 0 means all of them. `exit_stride`: one exit in so many is
    evaluated, and the last."""

    every_steps: int = 500
    max_batches: int = 8
    exit_stride: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """`initial_model`: a training workdir, Hugging Face folder or GGUF file to start from; empty is random."""

    model: ModelConfig = ModelConfig()
    layerskip: LayerSkipConfig = LayerSkipConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    initial_model: str = ""

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """Raises UserError that names the first unknown key, wrong type or impossible value."""
        config = _build(cls, tree, "config")
        _check_values(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default. Locked: assigning a key that does not exist raises."""
    return ml_collections.ConfigDict(Config().to_dict()).lock()


def first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
    """(path, value in a, value in b) of the first key in which two trees of sections differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return None if a == b else (path, a, b)
    differences = (first_difference(a.get(key), b.get(key), f"{path}.{key}") for key in {**b, **a})
    return next((difference for difference in differences if difference), None)


def _build(cls: type, tree: Any, path: str):
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a section of keys, got {tree!r}")
    types = typing.get_type_hints(cls)
    for key in tree:
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(types)}"
            raise UserError(f"unknown config key {path}.{key}{hint}")
    return cls(**{key: _convert(types[key], value, f"{path}.{key}") for key, value in tree.items()})


def _convert(kind: type, value: Any, path: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _choice(path: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{path} is {value!r}; choose one of {', '.join(allowed)}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"config.{section}.{name} must be positive, got {value}")


def check_model(m: ModelConfig) -> ModelConfig:
    """The same configuration, or a UserError that names the first impossible value."""
    _positive("model", m, "num_layers", "width", "num_heads", "num_kv_heads", "head_width")
    _positive("model", m, "feed_forward_width", "vocab_size", "context_length", "rope_theta", "rms_norm_epsilon")
    _require(
        m.num_heads % m.num_kv_heads == 0,
        f"config.model.num_heads ({m.num_heads}) must be a multiple of num_kv_heads ({m.num_kv_heads})",
    )
    _require(m.head_width % 2 == 0, f"config.model.head_width must be even for rotary embeddings, got {m.head_width}")
    _choice("config.model.rope_scaling.kind", m.rope_scaling.kind, ("none", "linear", "llama3"))
    _positive("model.rope_scaling", m.rope_scaling, "factor", "low_frequency_factor", "original_context_length")
    _require(
        m.rope_scaling.low_frequency_factor < m.rope_scaling.high_frequency_factor,
        "config.model.rope_scaling.low_frequency_factor must be below high_frequency_factor",
    )
    return m


def _check_layerskip(s: LayerSkipConfig) -> None:
    _require(
        0 <= s.dropout_max_rate < 1, f"config.layerskip.dropout_max_rate must be in [0, 1), got {s.dropout_max_rate}"
    )
    _choice("config.layerskip.dropout_depth_schedule", s.dropout_depth_schedule, ("exponential", "linear", "uniform"))
    _choice(
        "config.layerskip.dropout_time_schedule",
        s.dropout_time_schedule,
        ("constant", "exponential", "linear_decay"),
    )
    _choice("config.layerskip.dropout_granularity", s.dropout_granularity, ("sample", "subset", "batch"))
    _choice("config.layerskip.exit_curriculum", s.exit_curriculum, ("none", "rotational", "gradual", "all"))
    _choice("config.layerskip.exit_distillation_schedule", s.exit_distillation_schedule, ("constant", "linear"))
    _require(0 <= s.exit_scale <= 1, f"config.layerskip.exit_scale must be in [0, 1], got {s.exit_scale}")
    _positive("layerskip", s, "dropout_groups", "exit_rotation", "exit_token_stride", "exit_first")
    d, floor = s.exit_distillation, s.exit_weight_floor
    _require(d >= 0, f"config.layerskip.exit_distillation must not be negative, got {d}")
    _require(0 <= floor <= 1, f"config.layerskip.exit_weight_floor must be in [0, 1], got {floor}")


def _check_training(config: Config) -> None:
    t = config.training
    _positive("training", t, "total_steps", "batch_size", "sequence_length", "learning_rate")
    _positive("training", t, "gradient_clip", "gradient_accumulation", "loss_chunk", "scan_unroll", "log_every_steps")
    for name in ("adam_b1", "adam_b2"):
        _require(0 <= getattr(t, name) < 1, f"config.training.{name} must be in [0, 1), got {getattr(t, name)}")
    for name in ("final_learning_rate_fraction", "weight_decay", "z_loss", "seed"):
        _require(getattr(t, name) >= 0, f"config.training.{name} must not be negative, got {getattr(t, name)}")
    _choice("config.training.compute_dtype", t.compute_dtype, ("auto", "float32", "bfloat16"))
    _choice("config.training.attention", t.attention, ("auto", "flash", "plain"))
    _choice("config.training.rematerialize", t.rematerialize, ("none", "elementwise", "feed_forward", "layer"))
    _require(
        t.batch_size % t.gradient_accumulation == 0,
        f"config.training.batch_size ({t.batch_size}) must be a multiple of gradient_accumulation "
        f"({t.gradient_accumulation})",
    )
    _require(
        t.sequence_length <= config.model.context_length,
        f"config.training.sequence_length ({t.sequence_length}) exceeds config.model.context_length "
        f"({config.model.context_length})",
    )
    _require(
        0 <= t.warmup_steps <= t.total_steps,
        f"config.training.warmup_steps ({t.warmup_steps}) must be within 0..total_steps ({t.total_steps})",
    )


def _check_exits(config: Config) -> None:
    """What the exits ask of the model, of the sequences and of each other."""
    s, layers, length = config.layerskip, config.model.num_layers, config.training.sequence_length
    _require(
        s.exit_first <= layers,
        f"config.layerskip.exit_first ({s.exit_first}) exceeds config.model.num_layers ({layers})",
    )
    _require(
        s.exit_last == 0 or s.exit_first <= s.exit_last <= layers,
        f"config.layerskip.exit_last ({s.exit_last}) must be 0 (all exits) or within exit_first..num_layers "
        f"({s.exit_first}..{layers})",
    )
    _require(
        0 <= s.draft_exit < layers,
        f"config.layerskip.draft_exit ({s.draft_exit}) must be 0 (none) or an exit layer below "
        f"config.model.num_layers ({layers})",
    )
    _require(
        not s.draft_exit or s.exit_weight_floor > 0 or (s.draft_exit > 1 and s.exit_scale > 0),
        f"config.layerskip.draft_exit ({s.draft_exit}) weighs nothing: set exit_weight_floor, such as 0.3",
    )
    _require(
        not s.exit_distillation or bool(s.draft_exit) or s.exit_curriculum != "none",
        f"config.layerskip.exit_distillation is {s.exit_distillation}, but no early exit is trained: choose an "
        "exit_curriculum or a draft_exit",
    )
    _require(
        length % s.exit_token_stride == 0,
        f"config.layerskip.exit_token_stride ({s.exit_token_stride}) must divide config.training.sequence_length "
        f"({length})",
    )


def _check_values(config: Config) -> None:
    check_model(config.model)
    _check_layerskip(config.layerskip)
    _check_training(config)
    _check_exits(config)
    d = config.data.held_out_fraction
    _require(0 < d < 1, f"config.data.held_out_fraction must be between 0 and 1, got {d}")
    _positive("checkpoint", config.checkpoint, "every_steps", "keep")
    _positive("evaluation", config.evaluation, "every_steps", "exit_stride")
    most = config.evaluation.max_batches
    _require(most >= 0, f"config.evaluation.max_batches must not be negative, got {most}")
    sizes = dataclasses.astuple(config.mesh)
    _require(
        all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
        f"config.mesh {dataclasses.asdict(config.mesh)}: sizes are positive, and at most one is -1",
    )
