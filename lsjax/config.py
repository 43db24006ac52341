"""Configuration: frozen dataclasses, built from the ml_collections config that a file in configs/ returns.

A configuration file starts from `default_config()`, so that every key exists and can be overridden on the command
line, and sets what differs. `Config.from_dict` checks names, types and values once, at the start of a command. The
text under each field documents that key.
"""

import dataclasses
from typing import Any, Literal

import ml_collections

from lsjax.checks import build_dataclass
from lsjax.config_checks import check_config
from lsjax.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of the rotary embedding, for contexts longer than the model was first trained on."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """Kind of scaling: "linear" divides every frequency by `factor`, "llama3" only the low ones (as Llama 3)."""
    factor: float = 1.0
    """Divisor of the scaled frequencies, positive."""
    low_frequency_factor: float = 1.0
    """For "llama3": wavelengths above original_context_length / low_frequency_factor are divided by `factor`."""
    high_frequency_factor: float = 4.0
    """For "llama3": wavelengths below original_context_length / high_frequency_factor stay as they are."""
    original_context_length: int = 8192
    """For "llama3": context length of the first training, in tokens."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama. The letters are those that the docstrings use for array shapes."""

    num_layers: int = 12
    """Number of transformer layers (L)."""
    width: int = 256
    """Width of the hidden states (D)."""
    num_heads: int = 4
    """Number of query heads (N), a multiple of num_kv_heads."""
    num_kv_heads: int = 2
    """Number of key and value heads (K); equal to num_heads for Llama 1 and for Llama 2 up to 13B."""
    head_width: int = 64
    """Width of one head (H), even."""
    feed_forward_width: int = 704
    """Inner width of the feed-forward block (F)."""
    vocab_size: int = 2048
    """Number of rows of the embedding (V), at least the number of tokens that the tokenizer has."""
    context_length: int = 1024
    """Largest number of tokens that the model is meant to attend to."""
    tie_embeddings: bool = True
    """Whether the LM head is the transposed embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """Frequency scaling of the rotary embedding."""
    rms_norm_epsilon: float = 1e-5
    """Constant added to the mean square in every RMS norm."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the shape as nested dicts of plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LayerSkipConfig:
    """The LayerSkip recipe (arXiv 2404.16710, section 4.1). The defaults are the paper's continual setting."""

    dropout_max_rate: float = 0.1
    """Dropout probability p_max of the last layer, in [0, 1). The paper: 0.1 or 0.2."""
    dropout_depth_schedule: Literal["exponential", "linear", "uniform"] = "exponential"
    """Growth of the dropout rate with depth, D(l). The paper: "exponential"."""
    dropout_time_schedule: Literal["constant", "exponential", "linear_decay"] = "constant"
    """Change of the dropout rate over the run, S(t). The paper: "constant" when it continues from a pretrained model,
    "exponential" from scratch. arXiv 2609.05275: "linear_decay"."""
    dropout_granularity: Literal["sample", "subset", "batch"] = "sample"
    """Unit that is dropped. "sample" draws for each sequence and masks (the paper). "subset" keeps the same number of
    sequences on every device, drawn anew for each layer, and computes only those (after DINOv2's stochastic depth,
    arXiv 2304.07193); its draws depend on the number of devices. "batch" draws once per layer for the whole
    microbatch and skips the layer's compute."""
    dropout_groups: int = 4
    """For "subset": it keeps or drops a device's sequences of a microbatch in this number of groups of equal size."""
    dropout_rescale: bool = False
    """Whether a layer that is kept is scaled by 1/(1-p). The paper: False. arXiv 2609.05275: True."""
    exit_scale: float = 0.2
    """Scale e_scale of the early exits' loss weights, in [0, 1]. The paper: 0.1, 0.2 or 1.0."""
    exit_curriculum: Literal["none", "rotational", "gradual", "all"] = "rotational"
    """Early exits that are active at each step. "rotational": every R-th exit, one further each step. "gradual": from
    the last layer down to the first, all of them from half of the run on. The paper: both of these."""
    exit_rotation: int = 8
    """Period R of the rotational curriculum, in steps. The paper: 8 to 39."""
    exit_weight_floor: float = 0.0
    """Least loss weight of an active exit, as a share of the last layer's, in [0, 1]. The paper: 0, where the first
    exits, which are the cheapest to draft with, have almost no weight."""
    exit_distillation: float = 0.0
    """Weight of each early exit's KL divergence from the last layer's distribution (gradient stopped), added to its
    cross-entropy (after EESD, arXiv 2406.03853). The paper: 0."""
    exit_distillation_schedule: Literal["constant", "linear"] = "constant"
    """Change of exit_distillation over the run; "linear" grows from 0 to its value (after PS-KD, arXiv 2006.12000)."""
    draft_exit: int = 0
    """Exit layer that decoding will draft with. It is active at every step, whatever exit_curriculum, exit_first and
    exit_last say, and is the only exit that exit_distillation applies to. 0 singles out none (the paper)."""
    exit_adapter: Literal["none", "linear"] = "none"
    """Learned map between the state at draft_exit and the shared norm and head, for drafts alone. "linear" is h + h W
    with a matrix W [D,D] that starts at zero (tuned lens, arXiv 2303.08112). It learns from the last layer's
    distribution alone. The model is frozen and stays as it is, bit for bit. The paper: "none"."""
    exit_first: int = 1
    """First exit layer of the curriculum. The paper: 1. Training the first layers of a pretrained model to predict
    harms its last layer most."""
    exit_last: int = 0
    """Last early exit layer of the curriculum, for exits that will not draft; the model's last layer always trains.
    0 sets no limit (the paper)."""
    exit_token_stride: int = 1
    """Early exits and the exit_adapter learn from one token in this number, a different one each step; the last layer
    from all tokens.
    It divides training.sequence_length. The paper: 1."""
    exits_train_head: bool = True
    """Whether early exits send gradients to the shared norm and head. The paper: True."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text to train on, and how it is packed into sequences."""

    corpus: str = "python"
    """Text: "python" (the running interpreter's standard library), a folder, or a .jsonl or .parquet file, or
    one of tokens. `lsjax train` prepares up to 1,000,000,000 bytes by itself; for more, run `lsjax prepare` first."""
    mixture: str = ""
    """Several corpora in place of `corpus`: NAME=PATH:WEIGHT for each, separated by commas, such as
    "code=my/code:7,prose=my/prose:3". Weights give each one's share of the sequences."""
    file_pattern: str = "**/*"
    """Glob pattern of the files to read when `corpus` is a folder."""
    text_key: str = "text"
    """Key that holds the text in each line of a .jsonl corpus, or column of a .parquet one."""
    format: Literal["text", "completion", "chat"] = "text"
    """Meaning of a row. "text": a document, all of which is learned. "completion": {"prompt", "completion"}, of which
    the completion is learned. "chat": {"messages"}, of which the assistant's turns are learned; they are rendered with
    the tokenizer's chat template. Examples are packed whole."""
    token_separator: int = -1
    """Id of the token that ends each document of a corpus of tokens, which .npy and .bin files hold. -1 means that the
    corpus is text."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the tokens in .bin files; .npy files say theirs."""
    held_out_fraction: float = 0.03
    """Share of the documents that is kept for evaluation, between 0 and 1. A hash of its text decides for each
    document."""
    validation: str = ""
    """Held-out text of your own, named as `corpus` is: a path, or NAME=PATH for each of several sets, separated by
    commas, which are evaluated one by one. Empty keeps held_out_fraction of each corpus for evaluation."""
    tokenizer: str = ""
    """Path of a tokenizer.json. Empty takes the initial model's, or, without one, trains a byte-level BPE of
    model.vocab_size tokens on the corpus, or on 32 MiB of it."""
    separate_documents: bool = True
    """Whether positions and attention restart at each document in a packed sequence. If not, a token attends to
    everything before it; cuDNN attention is then faster, because it needs no mask."""
    directory: str = ""
    """Folder of the packed data. Empty means WORKDIR/data."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimization, number types and what a step keeps in memory."""

    total_steps: int = 1000
    """Number of optimizer steps of the run (T). Schedules of the learning rate and of LayerSkip end there."""
    batch_size: int = 16
    """Sequences per step over all hosts, a multiple of gradient_accumulation."""
    sequence_length: int = 256
    """Tokens per sequence, at most model.context_length. The paper: 4096."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end of the cosine decay, as a share of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up, at most total_steps."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, for matrices only."""
    adam_b1: float = 0.9
    """Decay rate of AdamW's first moment, in [0, 1)."""
    adam_b2: float = 0.95
    """Decay rate of AdamW's second moment, in [0, 1)."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    z_loss: float = 0.0
    """Weight of each exit's squared log-normalizer, which keeps logits from drifting (PaLM, arXiv 2204.02311: 1e-4).
    The paper: 0."""
    gradient_accumulation: int = 1
    """Number of microbatches that each step is split into."""
    seed: int = 0
    """Seed of the parameters, of layer dropout and of the data order, from 0 to 2**32 - 1."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the computation; parameters and optimizer are float32. "auto" is bfloat16, except on a CPU
    without bfloat16 instructions and on GPUs before A100. On a CPU, bfloat16 rounds only the factors of products with
    weights."""
    attention: Literal["auto", "flash", "plain"] = "auto"
    """Attention: "auto" is flash attention where the platform has it, "flash" requires it, "plain" avoids it."""
    rematerialize: Literal["none", "elementwise", "feed_forward", "layer"] = "layer"
    """What the backward pass recomputes to save memory, from nothing to all of a layer except its input."""
    loss_chunk: int = 1024
    """Tokens per device whose logits exist at the same time."""
    scan_unroll: int = 1
    """Layers per iteration of the layer loop."""
    frozen: str = ""
    """Parameters that are not trained: paths, or their beginnings, separated by commas, such as
    "embed,layers/attention_norm" (paths as in lsjax/parallel/sharding.py)."""
    lora_rank: int = 0
    """Rank r of LoRA adapters (arXiv 2106.09685): each matrix W of `lora_targets` becomes W + lora_alpha / r A B, and
    only A and B are trained. It needs an `initial_model`, which stays as it is. 0 trains the parameters themselves."""
    lora_alpha: float = 16.0
    """Numerator of the scale of LoRA adapters, lora_alpha / lora_rank."""
    lora_targets: str = "layers"
    """Matrices that get a LoRA adapter, written as in `frozen`: paths, or their beginnings, separated by commas.
    Matrices that `frozen` names get none."""
    log_every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh. One of them may be -1, which means all that the others leave."""

    data: int = -1
    """Devices that hold copies of the parameters and split the batch."""
    fsdp: int = 1
    """Devices that split both the batch and the parameters."""
    tensor: int = 1
    """Devices that split heads, the feed-forward width and the vocabulary."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay. The last step is always saved."""

    every_steps: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Number of the latest checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and on what every exit is evaluated. The last step is always evaluated."""

    every_steps: int = 500
    """Steps between two evaluations on held-out text."""
    max_batches: int = 8
    """Held-out batches per evaluation; 0 means all of them."""
    exit_stride: int = 1
    """Distance between two evaluated exit layers; the last layer is always evaluated."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    layerskip: LayerSkipConfig = LayerSkipConfig()
    """Layer dropout and early-exit loss."""
    data: DataConfig = DataConfig()
    """Text to train on."""
    training: TrainingConfig = TrainingConfig()
    """Optimization."""
    mesh: MeshConfig = MeshConfig()
    """Layout over devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out text."""
    initial_model: str = ""
    """Model to start from: a training workdir, a Hugging Face folder, a GGUF file or a name on the Hugging Face Hub
    (`org/name[@revision]`). Empty starts from random parameters."""

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Config":
        """Builds the configuration. Raises UserError that names the first unknown key, wrong type or bad value."""
        config = build_dataclass(cls, tree, "config")
        check_config(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as nested dicts of plain values."""
        return dataclasses.asdict(self)


def checked_config(config: Config | ml_collections.ConfigDict) -> Config:
    """Returns a configuration, or the one that a ConfigDict describes, with every value checked."""
    if not isinstance(config, Config | ml_collections.ConfigDict):
        raise UserError(
            f"config must be a Config, or a ConfigDict such as lsjax.default_config() returns, got {shown(config)}"
        )
    try:
        tree = config.to_dict()
    except Exception as error:  # a value of a class of the caller's own, which cannot be copied
        raise UserError(f"config cannot be read: {shown(error)}") from error
    return Config.from_dict(tree)


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default. The result is locked: assigning a key that does not exist raises."""
    return ml_collections.ConfigDict(Config().to_dict()).lock()
