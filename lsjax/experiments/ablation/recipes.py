"""The recipes to compare: named settings of the configuration's `layerskip` section, each with its source."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lsjax.config import Config, LayerSkipConfig
from lsjax.errors import UserError
from lsjax.layerskip.dropout import layer_dropout_rates

BASELINE = "none"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe of the ablation.

    about: one line that says what it is. layerskip: how it differs from no LayerSkip; nothing of the base
    configuration's section is kept. steps: length of the run, as a share of the base configuration's.
    """

    name: str
    about: str
    layerskip: dict[str, Any]
    steps: float = 1.0

    def config(self, base: Config, seed: int) -> Config:
        """Returns the configuration of the run from one seed."""
        t = base.training
        return dataclasses.replace(
            base,
            layerskip=LayerSkipConfig(**_NOTHING | self.layerskip),
            training=dataclasses.replace(t, seed=seed, total_steps=round(self.steps * t.total_steps)),
        )


_NOTHING = {"dropout_max_rate": 0.0, "exit_curriculum": "none", "exit_rotation": 1}


def recipes(num_layers: int) -> dict[str, Recipe]:
    """Returns all recipes by name.

    "paper" is the paper's setting for training from scratch (Table 8): e_scale 0.2, R = L - 1, and dropout that grows
    exponentially in depth and in time.
    """
    dropout = {"dropout_max_rate": 0.2, "dropout_depth_schedule": "exponential", "dropout_time_schedule": "exponential"}
    exits = {"exit_curriculum": "rotational", "exit_scale": 0.2, "exit_rotation": max(1, num_layers - 1)}
    half = max(1, num_layers // 2)
    mean_rate = float(layer_dropout_rates(num_layers, dropout["dropout_max_rate"], 0, 1).mean())
    constant = dropout | {"dropout_depth_schedule": "uniform", "dropout_max_rate": mean_rate}
    successor = {"dropout_depth_schedule": "linear", "dropout_time_schedule": "linear_decay", "dropout_rescale": True}
    distilled = {"exit_distillation": 3.0, "exit_weight_floor": 0.3}
    focused = {"exit_last": half, "exit_rotation": min(2, half)}
    light = {"exit_weight_floor": 0.1}
    drafting = {"draft_exit": half, "exit_distillation": 20.0, "exit_distillation_schedule": "linear"}
    skipped = {"dropout_granularity": "batch", "dropout_max_rate": 0.5} | successor
    both = dropout | exits
    listed = [
        Recipe(BASELINE, "no LayerSkip", {}),
        Recipe("none-shorter", "no LayerSkip, in 3/4 of the steps", {}, 0.75),
        Recipe("none-longer", "no LayerSkip, in 5/4 of the steps", {}, 1.25),
        Recipe("dropout", "the paper's layer dropout alone", dropout),
        Recipe("constant-dropout", "dropout with the same mean rate at every layer (the paper's Fig. 12)", constant),
        Recipe("exit-loss", "the paper's early exit loss alone", exits),
        Recipe("paper", "dropout and early exit loss (arXiv 2404.16710, from scratch)", both),
        Recipe("paper-successor", "arXiv 2609.05275: linear, decaying, rescaled", both | successor),
        Recipe("paper-floor", "paper, first exits weigh at least 0.3 of the last", both | {"exit_weight_floor": 0.3}),
        Recipe("paper-own-head", "paper, exits do not train norm and head", both | {"exits_train_head": False}),
        Recipe(
            "paper-distilled",
            "paper, KL from the last layer (EESD, arXiv 2406.03853)",
            both | {"exit_distillation": 3.0},
        ),
        Recipe("distilled", "weight floor and KL, no dropout", exits | distilled),
        Recipe("focused", "distilled, on exits of the first half only", exits | distilled | focused),
        Recipe("focused-light", "focused, with a floor of 0.1", exits | distilled | focused | light),
        Recipe(
            "focused-skipping",
            "focused-light, with whole layers skipped for a batch at a time",
            exits | distilled | focused | light | skipped,
        ),
        Recipe(
            "drafting",
            "paper-successor with a floor of 0.3; the exit at half depth is on at every step, and it alone learns from "
            "the last layer, by a KL whose weight grows to 20",
            both | successor | {"exit_weight_floor": 0.3} | drafting,
        ),
    ]
    return {recipe.name: recipe for recipe in listed}


def choose(names: Sequence[str], num_layers: int) -> list[Recipe]:
    """Returns the named recipes, the baseline first; all of them for no names. Raises UserError for an unknown name."""
    known = recipes(num_layers)
    for name in names:
        if name not in known:
            raise UserError(f"unknown recipe {name!r}; the recipes are: {', '.join(known)}")
    return [recipe for recipe in known.values() if not names or recipe.name in {BASELINE, *names}]
