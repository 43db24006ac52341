"""Checks that a run has not diverged."""

import numpy as np

from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.training.step import StepMetrics, TrainState, is_finite


def check_step(step: int, metrics: StepMetrics) -> None:
    """Raises UserError that names the first thing in a step's metrics that is not finite. metrics: on the host."""
    for layer in np.flatnonzero(metrics.exit_active):
        if not np.isfinite(metrics.exit_losses[layer]):
            raise UserError(
                f"step {step}: the loss at exit layer {layer + 1} is {metrics.exit_losses[layer]}, the first of "
                "the active exits that is not finite; the last good checkpoint is kept. Lower "
                "config.training.learning_rate or lengthen config.training.warmup_steps"
            )
    if not (np.isfinite(metrics.gradient_norm) and np.isfinite(metrics.loss)):
        raise UserError(
            f"step {step}: every exit's loss is finite but the gradient norm is {metrics.gradient_norm} and the loss "
            f"{metrics.loss}; the last good checkpoint is kept. Lower config.training.learning_rate"
        )


def check_state(step: int, state: TrainState) -> None:
    """Raises UserError unless every parameter and optimizer moment of the state after a step is finite."""
    if not is_finite(state):
        raise UserError(
            f"step {step}: loss and gradient are finite, but the update made parameters or optimizer moments that are "
            "not; the last good checkpoint is kept. Lower config.training.learning_rate"
        )


def check_evaluation(step: int, profile: ExitProfile) -> None:
    """Raises UserError when the last layer's loss on held-out text is not finite."""
    if not np.isfinite(profile.loss[-1]):
        raise UserError(
            f"step {step}: the update made parameters with which the last layer's held-out loss is {profile.loss[-1]}; "
            "the last good checkpoint is kept. Lower config.training.learning_rate"
        )
