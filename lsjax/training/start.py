"""The state that a run starts from: its latest checkpoint, an initial model, or random parameters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.io.adapter import AdaptedSource
from lsjax.io.base_model import BaseModel, check_base, describe_base, read_base
from lsjax.io.open import open_model
from lsjax.io.source import ModelSource
from lsjax.io.workdir import is_run
from lsjax.model.execution import Execution
from lsjax.model.exit_adapter import init_kernel
from lsjax.parallel import distributed
from lsjax.parallel.sharding import abstract_arrays
from lsjax.training.checkpoints import Checkpoints
from lsjax.training.optimizer import make_optimizer
from lsjax.training.step import TrainState, init_adapter_state, init_state, state_shardings


def open_initial_model(config: Config) -> ModelSource | None:
    """Opens config.initial_model, or returns None when it is empty.

    Raises UserError that names the first key in which config.model differs from that model, and when LoRA has no model
    to adapt.
    """
    if not config.initial_model:
        if config.training.lora_rank:
            raise UserError("config.training.lora_rank needs config.initial_model: an adapter changes a trained model")
        return None
    source = open_model(config.initial_model)
    if config.training.lora_rank and isinstance(source, AdaptedSource):
        raise UserError(
            f"config.initial_model ({config.initial_model}) is a run with LoRA itself, whose merged weights another "
            "machine would round otherwise: convert it first, with lsjax convert, and start from that folder"
        )
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(source.config)
    for key in ours:
        if key != "context_length" and ours[key] != theirs[key]:
            raise UserError(
                f"config.model.{key} is {ours[key]}, that of config.initial_model {theirs[key]}; in a configuration "
                "file, config.model.update(lsjax.read_model_config(PATH).to_dict()) takes its shape"
            )
    return source


def find_base(config: Config, workdir: Path, initial: ModelSource | None) -> BaseModel | None:
    """Returns the description of the model that a run with LoRA adapts; None for other runs. It reads the model once.

    All hosts must call it together. Raises UserError on every one of them when the run in `workdir` began with another
    model, or when a host has another one.
    """
    if not config.training.lora_rank or initial is None:
        return None
    found, problem = describe_base(config.initial_model, initial), ""
    try:
        if is_run(workdir):
            check_base(found, read_base(workdir), workdir)
    except UserError as error:
        problem = str(error)
    distributed.raise_together(problem)
    distributed.check_same({"sha256": found.sha256}, "base model")
    return found


def first_state(
    config: Config, mesh: Mesh, execution: Execution, checkpoints: Checkpoints, initial: ModelSource | None
) -> TrainState:
    """Returns the state to start from. Every array is made, or read, in its shards, without a second copy."""
    shardings = state_shardings(config, mesh)
    abstract = abstract_arrays(jax.eval_shape(lambda: init_state(config, execution)), shardings)
    resumes = checkpoints.latest_step() is not None
    if config.training.lora_rank:
        assert initial is not None
        start = jax.jit(lambda: init_adapter_state(config), out_shardings=shardings._replace(base=None))
        state = checkpoints.restore(abstract) if resumes else start()
        return state._replace(base=initial.load_params(abstract.base))
    if resumes:
        return checkpoints.restore(abstract)
    if initial is None:
        return jax.jit(lambda: init_state(config), out_shardings=shardings)()
    state = TrainState(jax.device_put(np.int32(0), shardings.step), initial.load_params(abstract.params), ())
    if shardings.exit_adapter is not None:
        kernel = _first_kernel(config, initial)
        state = state._replace(exit_adapter={"kernel": jax.device_put(kernel, shardings.exit_adapter["kernel"])})
    optimizer = jax.jit(make_optimizer(config.training).init, out_shardings=shardings.optimizer)(state.trained)
    return state._replace(optimizer=optimizer)


def _first_kernel(config: Config, initial: ModelSource) -> np.ndarray:
    """Returns the kernel of the exit adapter to start from: the initial model's for this exit, or one of zeros."""
    adapter = initial.load_exit_adapter()
    if adapter is not None and adapter.exit_layer == config.layerskip.draft_exit:
        return np.asarray(adapter.kernel, np.float32)
    return np.asarray(init_kernel(config.model))
