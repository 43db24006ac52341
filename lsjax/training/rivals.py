"""The same training step in PyTorch: the Llama of transformers, our loss with PyTorch's own functions, its AdamW."""

from typing import NamedTuple

import jax
import numpy as np

from lsjax.config import Config
from lsjax.data.batch import Batch
from lsjax.errors import UserError
from lsjax.interop.hf_config import model_config_to_hf
from lsjax.interop.huggingface import stored_tensors
from lsjax.model.execution import choose_execution
from lsjax.model.transformer import Params
from lsjax.training.optimizer import learning_rate_schedule
from lsjax.training.step import Recipe, layer_mask_at, recipe_at


class Turn(NamedTuple):
    """What one step is given, as numpy arrays: all that chance and schedules decide."""

    batch: Batch
    recipe: Recipe
    layer_mask: np.ndarray | None
    learning_rate: float


def turn_at(step: int, batch: Batch, config: Config) -> Turn:
    recipe = recipe_at(step, config)
    mask = layer_mask_at(step, 0, recipe, config)
    rate = float(learning_rate_schedule(config.training)(step + 1))
    return Turn(batch, *jax.device_get((recipe, mask)), rate)


class TorchTraining:
    """On this CPU, in float32; by PyTorch's own mixed precision where our products are of bfloat16. `compiled`: layers
    and losses by torch.compile. Raises UserError when PyTorch is not installed, or for settings that it has no
    counterpart of here."""

    def __init__(self, config: Config, params: Params, compiled: bool = False):
        self.torch, transformers = _import()
        _check(config)
        self.config, t = config, config.training
        self.mixed = choose_execution(config, "cpu").rounds_products
        shape = transformers.LlamaConfig(**model_config_to_hf(config.model), attn_implementation="sdpa")
        self.model = transformers.LlamaForCausalLM(shape).float().train()
        tensors = {name: self.torch.tensor(read()) for name, read, _ in stored_tensors(config.model, params)}
        self.model.load_state_dict(tensors, strict=not config.model.tie_embeddings)
        for p in self.model.parameters():  # where there is none, AdamW leaves a skipped layer's moments as they are
            p.grad = self.torch.zeros_like(p)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        scales = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices}, {"params": scales, "weight_decay": 0.0}]
        betas = (t.adam_b1, t.adam_b2)
        self.optimizer = self.torch.optim.AdamW(groups, betas=betas, eps=1e-8, weight_decay=t.weight_decay, fused=True)
        self.run_layer, self.charge = _run_layer, self._charge
        if compiled:
            self.run_layer, self.charge = (self.torch.compile(f, dynamic=False) for f in (_run_layer, self._charge))

    def step(self, turn: Turn) -> float:
        """One update; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = turn.learning_rate
        self.optimizer.zero_grad(set_to_none=False)
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.mixed):
            loss = self._loss(turn)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.gradient_clip)
        self.optimizer.step()
        return loss.item()

    def _loss(self, turn: Turn):
        """J of Eq. 5 a token."""
        batch = Batch(*(None if a is None else self.torch.as_tensor(np.asarray(a)) for a in turn.batch))
        targets, weights = batch.targets.flatten().long(), batch.weights.flatten()
        states, teacher = self._states(batch, turn.layer_mask), None
        distillation = self.torch.tensor(turn.recipe.exit_distillation)  # a number would be compiled in
        loss, exits = 0.0, np.flatnonzero(turn.recipe.exit_active)[::-1]  # the last layer first: it teaches the others
        for exit_ in exits:
            each, log_p = self.charge(states[exit_].flatten(0, 1), targets, teacher, distillation[exit_])
            loss = loss + float(turn.recipe.exit_weights[exit_]) * (each * weights).sum()
            if teacher is None and self.config.layerskip.exit_distillation:
                teacher = log_p.detach()
        return loss / weights.sum()

    def _states(self, batch: Batch, layer_mask: np.ndarray | None) -> list:
        """After each layer. A layer that the whole batch skips is not run."""
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
        """bool [B,1,S,S]: which position sees which."""
        length = batch.tokens.shape[1]
        causal = self.torch.ones(length, length, dtype=bool).tril()[None, None]
        ids = batch.segment_ids
        return causal if ids is None else causal & (ids[:, None, :, None] == ids[:, None, None, :])

    def _charge(self, x, targets, teacher, distillation):
        """Of each token: cross-entropy + distillation KL(teacher || exit); and log-probabilities [tokens, V]."""
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
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"comparing with PyTorch needs {error.name}: pip install 'lsjax[parity]', or make test-parity"
        ) from None
    return torch, transformers


def _check(config: Config) -> None:
    t, s, default = config.training, config.layerskip, Config()
    for section, name in ((t, "gradient_accumulation"), (t, "frozen"), (t, "z_loss")):
        _plain("training", section, default.training, name)
    for name in ("exit_token_stride", "exits_train_head"):
        _plain("layerskip", s, default.layerskip, name)


def _plain(section: str, given, default, name: str) -> None:
    if getattr(given, name) != getattr(default, name):
        value = getattr(default, name)
        raise UserError(f"the PyTorch step has no config.{section}.{name}: leave it at {value!r} to compare")
