"""How many floating point operations (FLOPs) a token costs, counted from the model's shape.

XLA's own count includes the body of a layer loop only once, so it cannot be used. Only matrix products are counted, 2
FLOPs for each pair of multiplication and addition.
"""

from typing import NamedTuple

import numpy as np

from lsjax.config import Config, ModelConfig
from lsjax.costs.hardware import Chip
from lsjax.evaluation.exits import evaluated_exits
from lsjax.layerskip.dropout import layer_dropout_rates
from lsjax.layerskip.exits import active_exits
from lsjax.model.lora import MATRICES
from lsjax.model.selection import leaves_by_path, trained_paths
from lsjax.model.transformer import abstract_params


class TokenFlops(NamedTuple):
    """Forward FLOPs of one token.

    Attention is counted in both conventions in use: over every position (full), or over the positions that a token sees
    on average (causal).
    """

    layers: float
    attention_full: float
    attention_causal: float
    head: float

    def model(self, causal: bool = False) -> float:
        """Returns the FLOPs of the plain model: all layers and one head."""
        return self.layers + self.head + (self.attention_causal if causal else self.attention_full)


def forward_flops(config: ModelConfig, sequence_length: int) -> TokenFlops:
    """Counts the forward FLOPs of one token in a sequence of this length."""
    c, S = config, sequence_length
    projections = c.width * c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = 2 * (projections + 3 * c.width * c.feed_forward_width)
    scores_and_mix = 2 * 2 * c.num_heads * c.head_width
    return TokenFlops(
        layers=c.num_layers * layer,
        attention_full=c.num_layers * scores_and_mix * S,
        attention_causal=c.num_layers * scores_and_mix * (S + 1) / 2,
        head=2 * c.width * c.vocab_size,
    )


def model_flops_per_token(config: Config, causal: bool = False) -> float:
    """Counts the training FLOPs of the plain model per token, the numerator of model FLOPs utilisation (MFU).

    The backward pass costs twice the forward pass where everything is trained. Gradients that config.training.frozen or
    LoRA save are not counted, nor are products with the factors A and B, which are thin. A model with an exit_adapter
    in training has no backward pass, and its head reads every exit_token_stride-th token. Recomputation, early exits
    and skipped layers are not included.
    """
    forward = forward_flops(config.model, config.training.sequence_length)
    if config.layerskip.exit_adapter != "none":
        return forward.model(causal) - forward.head * (1 - 1 / config.layerskip.exit_token_stride)
    gradients = _gradients(config)
    attention = forward.attention_causal if causal else forward.attention_full
    head = (gradients.head + gradients.normed) * forward.head
    return forward.model(causal) + gradients.layers_backward(forward, attention) + head


class _Gradients(NamedTuple):
    """The gradients that a step computes.

    matrices: FLOPs of the gradients of the layers' matrices. states: whether the backward pass goes through the layers,
    which all need their states' gradients if a single one of them, or the embedding, is trained.
    normed: whether the states that the head reads have a gradient. head: whether its matrix has one.
    """

    matrices: float
    states: bool
    normed: bool
    head: bool

    def layers_backward(self, forward: TokenFlops, attention: float) -> float:
        """Returns the FLOPs of the backward pass through the layers, of which attention costs `attention` forwards."""
        return self.matrices + self.states * (forward.layers + 2 * attention)


def _gradients(config: Config) -> _Gradients:
    shapes = abstract_params(config.model)
    sizes = {path: leaf.size for path, leaf in leaves_by_path(shapes).items()}
    trained = trained_paths(config.training, shapes)
    # With LoRA the layers' own matrices have no gradient. The step merges the head's adapter into it, so the head has.
    whole = () if config.training.lora_rank else trained
    states = any(path.startswith(("layers/", "embed")) for path in trained)
    return _Gradients(
        matrices=2.0 * sum(sizes[path] for path in whole if path in MATRICES and path.startswith("layers/")),
        states=states,
        normed=states or "final_norm/scale" in trained,
        head=("embed" if config.model.tie_embeddings else "lm_head") in trained,
    )


class StepFlops(NamedTuple):
    """Training FLOPs of one token, as a mean over the run.

    model, model_causal: the plain model, with full or causal attention.
    exits: the early exits, without the last layer's.
    skipped: the layers whose compute dropout really leaves out.
    recomputed: by rematerialisation and inside the attention kernel.
    """

    model: float
    model_causal: float
    exits: float
    skipped: float
    recomputed: float

    @property
    def executed(self) -> float:
        """Returns what the hardware executes: the model with causal attention, + exits - skipped + recomputed."""
        return self.model_causal + self.exits - self.skipped + self.recomputed


def step_flops(config: Config) -> StepFlops:
    """Counts the FLOPs per token of the training step of `config`, LayerSkip included."""
    c, s = config.model, config.layerskip
    forward = forward_flops(c, config.training.sequence_length)
    if s.exit_adapter != "none":
        adapter = 4 * c.width**2  # its product, and the one that is the gradient of its kernel
        exits = (2 * forward.head + adapter) / s.exit_token_stride
        model, causal = (model_flops_per_token(config, causal) for causal in (False, True))
        return StepFlops(model, causal, exits, skipped=0.0, recomputed=0.0)
    run, gradients = 1 - skipped_share(config), _gradients(config)
    # An exit costs a forward pass, the gradient of the states and that of the head. Inside the layer loop, the forward
    # pass is computed twice. With a teacher, the exits run after the layers, and every step computes the last layer's
    # logits once more.
    taught = s.exit_distillation > 0
    states, head = gradients.normed if s.exits_train_head else gradients.states, s.exits_train_head and gradients.head
    passes = 1 + states + head + ((states or head) and not taught)
    recomputed = run * gradients.states * (_recomputed_layers(config, forward) + forward.attention_causal / 2)
    layers = forward.layers + forward.attention_causal
    return StepFlops(
        model=model_flops_per_token(config),
        model_causal=model_flops_per_token(config, causal=True),
        exits=(taught + passes * early_exits(config)) * forward.head / s.exit_token_stride,
        skipped=(1 - run) * (layers + gradients.layers_backward(forward, forward.attention_causal)),
        recomputed=recomputed,
    )


def evaluation_flops(config: Config) -> float:
    """Counts the FLOPs per token of an evaluation: the forward pass, and the head at each evaluated exit.

    The exit of an adapter is evaluated too, through it.
    """
    forward = forward_flops(config.model, config.training.sequence_length)
    exits, adapter = {*evaluated_exits(config.model.num_layers, config.evaluation.exit_stride)}, 0.0
    if config.layerskip.exit_adapter != "none":
        exits.add(config.layerskip.draft_exit)
        adapter = 2.0 * config.model.width**2
    return forward.model(causal=True) + (len(exits) - 1) * forward.head + adapter


def round_flops(config: ModelConfig, capacity: int, exit_layer: int, drafted: int, verified_from: int | None) -> float:
    """Counts the FLOPs of one sequence in one round of a decoding loop.

    capacity: the cache entries that attention reads.
    exit_layer, drafted: the round runs `drafted` tokens one by one through the first exit_layer layers and the head.
    verified_from: E, the exit layer at which verification starts: one more token through the first E layers, and
        drafted + 1 through the other layers and the head. None: no verification.
    """
    forward = forward_flops(config, capacity)
    layer = (forward.layers + forward.attention_full) / config.num_layers
    flops = drafted * (exit_layer * layer + forward.head)
    if verified_from is None:
        return flops
    rest = (config.num_layers - verified_from) * layer + forward.head
    return flops + verified_from * layer + (drafted + 1) * rest


def _recomputed_layers(config: Config, forward: TokenFlops) -> float:
    """Counts the FLOPs that the rematerialisation policy computes again.

    A layer's last product is never recomputed, because the backward pass does not need its result.
    """
    c, policy = config.model, config.training.rematerialize
    gate_up = c.num_layers * 2 * 2 * c.width * c.feed_forward_width
    if policy == "layer":
        return forward.layers - gate_up / 2 + forward.attention_causal
    return gate_up if policy == "feed_forward" else 0.0


def skipped_share(config: Config) -> float:
    """Returns the share of layer compute that dropout saves, as a mean over layers and steps.

    Masks per sample save none.
    """
    s = config.layerskip
    if s.dropout_granularity == "sample" or not s.dropout_max_rate:
        return 0.0
    return float(np.mean([_dropout_rates(config, step) for step in _sampled_steps(config)]))


def early_exits(config: Config) -> float:
    """Returns the mean number of early exits per step, without the last layer."""
    c, s, t = config.model, config.layerskip, config.training
    steps = _sampled_steps(config) if s.exit_curriculum == "gradual" else range(s.exit_rotation)
    active = [np.asarray(active_exits(s, c.num_layers, step, t.total_steps)) for step in steps]
    return float(np.mean([a[:-1].sum() for a in active]))


def _dropout_rates(config: Config, step: int) -> np.ndarray:
    s = config.layerskip
    rates = layer_dropout_rates(
        config.model.num_layers,
        s.dropout_max_rate,
        step,
        config.training.total_steps,
        depth_schedule=s.dropout_depth_schedule,
        time_schedule=s.dropout_time_schedule,
    )
    return np.asarray(rates)


def _sampled_steps(config: Config) -> np.ndarray:
    """Returns steps spread evenly over the run, for the mean of a schedule."""
    total = config.training.total_steps
    return np.unique(np.linspace(0, total - 1, min(total, 65)).astype(int))


def utilization(config: Config, tokens_per_second: float, devices: int, chip: Chip) -> dict[str, float]:
    """Returns model FLOPs utilisation in both conventions: {"mfu": full attention, "mfu_causal": causal}.

    tokens_per_second: of all devices together.
    """
    achieved = tokens_per_second / (devices * chip.peak_flops)
    return {
        "mfu": model_flops_per_token(config) * achieved,
        "mfu_causal": model_flops_per_token(config, causal=True) * achieved,
    }
