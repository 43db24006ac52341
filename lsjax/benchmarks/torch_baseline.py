"""The same training step in PyTorch: the Llama of transformers, our loss in PyTorch's functions, and its AdamW."""

from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.config import Config
from lsjax.data.batch import Batch
from lsjax.errors import UserError
from lsjax.io.huggingface import outgoing_tensors
from lsjax.io.huggingface_config import model_config_to_hf
from lsjax.model.execution import choose_execution
from lsjax.model.transformer import Params
from lsjax.training.optimizer import learning_rate_schedule
from lsjax.training.step import Recipe, layer_mask_at, recipe_at

# torch comes from its CPU index: the one on PyPI brings gigabytes of CUDA packages.
INSTALL_HINT = (
    "run `make parity`, or pip install torch --index-url https://download.pytorch.org/whl/cpu "
    "&& pip install transformers accelerate"
)


class StepInputs(NamedTuple):
    """The inputs of one training step, as numpy arrays: everything that random numbers and schedules decide.

    layer_mask: factor of each layer's output, [L, B] or [L]; None without layer dropout.
    """

    batch: Batch
    recipe: Recipe
    layer_mask: np.ndarray | None
    learning_rate: float


def step_inputs(step: int, batch: Batch, config: Config) -> StepInputs:
    """Returns the inputs of step number `step` on a batch, as our own training draws them."""
    recipe = recipe_at(step, config)
    mask = layer_mask_at(step, 0, recipe, config)
    rate = np.asarray(learning_rate_schedule(config.training)(step + 1)).item()
    recipe, mask = jax.device_get((recipe, mask))
    return StepInputs(batch, recipe, mask, rate)


class TorchTraining:
    """A training run in PyTorch on this CPU.

    It computes in float32, or in PyTorch's mixed precision where our products are bfloat16.
    compiled: compiles layers and losses with torch.compile.
    Raises UserError when PyTorch is not installed, and for settings without a counterpart here.
    """

    def __init__(self, config: Config, params: Params, compiled: bool = False):
        self.torch, transformers = _import()
        _check(config)
        self.config, t = config, config.training
        self.mixed = choose_execution(config, "cpu").rounds_products
        shape = transformers.LlamaConfig(**model_config_to_hf(config.model), attn_implementation="sdpa")
        self.model = transformers.LlamaForCausalLM(shape).float().train()
        outgoing = outgoing_tensors(config.model, params)
        tensors = {tensor.name: self.torch.tensor(tensor.read()) for tensor in outgoing}
        self.model.load_state_dict(tensors, strict=not config.model.tie_embeddings)
        for p in self.model.parameters():  # without a gradient, AdamW would leave a skipped layer's moments as they are
            p.grad = self.torch.zeros_like(p)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        scales = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices}, {"params": scales, "weight_decay": 0.0}]
        betas = (t.adam_b1, t.adam_b2)
        self.optimizer = self.torch.optim.AdamW(groups, betas=betas, eps=1e-8, weight_decay=t.weight_decay, fused=True)
        self.run_layer, self.token_losses = _run_layer, self._token_losses
        if compiled:
            self.run_layer = self.torch.compile(_run_layer, dynamic=False)
            self.token_losses = self.torch.compile(self._token_losses, dynamic=False)

    def step(self, inputs: StepInputs) -> float:
        """Makes one update, and returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = inputs.learning_rate
        self.optimizer.zero_grad(set_to_none=False)
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.mixed):
            loss = self._loss(inputs)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.gradient_clip)
        self.optimizer.step()
        return loss.item()

    def _loss(self, inputs: StepInputs) -> Any:
        """Returns J of Eq. 5 per token."""
        batch: Any = jax.tree.map(lambda array: self.torch.as_tensor(np.asarray(array)), inputs.batch)
        targets, weights = batch.targets.flatten().long(), batch.weights.flatten()
        states, teacher = self._states(batch, inputs.layer_mask), None
        distillation = self.torch.tensor(inputs.recipe.exit_distillation)  # a number would become a compiled constant
        loss, exits = 0.0, np.flatnonzero(inputs.recipe.exit_active)[::-1]  # the last layer first: it is the teacher
        for exit_ in exits:
            each, log_p = self.token_losses(states[exit_].flatten(0, 1), targets, teacher, distillation[exit_])
            loss = loss + float(inputs.recipe.exit_weights[exit_]) * (each * weights).sum()
            if teacher is None and self.config.layerskip.exit_distillation:
                teacher = log_p.detach()
        return loss / weights.sum()

    def _states(self, batch: Batch, layer_mask: np.ndarray | None) -> list:
        """Returns the hidden state after each layer. A layer that the whole batch skips is not run."""
        model = self.model.model
        x = model.embed_tokens(batch.tokens)
        positions = self.torch.arange(x.shape[1])[None] if batch.positions is None else batch.positions
        rotation, visible, states = model.rotary_emb(x, position_ids=positions), self._visible(batch), []
        for number, layer in enumerate(model.layers):
            keep = None if layer_mask is None else layer_mask[number]
            if keep is None or np.any(keep):
                after = self.run_layer(layer, x, visible, rotation)
                partial = keep is not None and np.any(keep != 1)
                scale = self.torch.tensor(keep).reshape(-1, 1, 1) if partial else None
                x = x + scale * (after - x) if partial else after
            states.append(x)
        return states

    def _visible(self, batch: Batch):
        """Returns which position sees which, bool [B, 1, S, S] or [1, 1, S, S]."""
        length = batch.tokens.shape[1]
        causal = self.torch.ones(length, length, dtype=bool).tril()[None, None]
        ids = batch.segment_ids
        return causal if ids is None else causal & (ids[:, None, :, None] == ids[:, None, None, :])

    def _token_losses(self, x, targets, teacher, distillation):
        """Returns each token's cross-entropy + distillation * KL(teacher || exit), and log-probabilities [., V]."""
        functional = self.torch.nn.functional
        log_p = functional.log_softmax(self.model.lm_head(self.model.model.norm(x)).float(), dim=-1)
        each = functional.nll_loss(log_p, targets, reduction="none")
        if teacher is not None:
            divergence = functional.kl_div(log_p, teacher, reduction="none", log_target=True).sum(-1)
            each = each + distillation * divergence
        return each, log_p


def _run_layer(layer, x, visible, rotation):
    return layer(x, attention_mask=visible, position_embeddings=rotation)


def _import():
    try:
        # Not checked, because a machine need not have this extra.
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"comparing with PyTorch needs {error.name}: {INSTALL_HINT}") from None
    return torch, transformers


def _check(config: Config) -> None:
    t, s, default = config.training, config.layerskip, Config()
    for section, name in ((t, "gradient_accumulation"), (t, "frozen"), (t, "lora_rank"), (t, "z_loss")):
        _check_default("training", section, default.training, name)
    for name in ("exit_token_stride", "exits_train_head"):
        _check_default("layerskip", s, default.layerskip, name)


def _check_default(section: str, given: Any, default: Any, name: str) -> None:
    if getattr(given, name) != getattr(default, name):
        value = getattr(default, name)
        raise UserError(f"the PyTorch step has no config.{section}.{name}: leave it at {value!r} to compare")
