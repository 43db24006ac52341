"""The training run, start to finish, as one story."""

import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lsjax.checkpoint import Checkpoints, abstract_arrays
from lsjax.config import Config
from lsjax.data.batch import Batch
from lsjax.data.packing import prepare
from lsjax.data.pipeline import held_out_batches, training_batches
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile, exit_profile
from lsjax.interop.source import ModelSource
from lsjax.loading import open_model
from lsjax.model.execution import choose_execution
from lsjax.model.transformer import count_params
from lsjax.scale import hosts
from lsjax.scale.flops import utilization
from lsjax.scale.hardware import chip_of
from lsjax.scale.sharding import batch_sharding, make_mesh
from lsjax.training import workdir as workdirs
from lsjax.training.metrics import NoLog, RunLog, active_exit_losses, describe_evaluation, describe_step
from lsjax.training.optimizer import make_optimizer
from lsjax.training.progress import ProgressDisplay
from lsjax.training.step import StepMetrics, TrainState, check_microbatch, init_state, make_train_step, state_shardings
from lsjax.training.trace import StepTrace


class TrainResult(NamedTuple):
    """`profile` is that of the final step; None when the run was interrupted before it."""

    step: int
    params: dict
    profile: ExitProfile | None


@hosts.lost_hosts_named()
def train(config: Config, workdir: str | Path, *, verbose: bool = True, profile_steps: int = 0) -> TrainResult:
    """Trains until config.training.total_steps, resuming by itself from the latest checkpoint in `workdir`.

    Interrupted by SIGINT or SIGTERM it saves where it is and returns. profile_steps: of how many steps to write a
    profiler's trace to `workdir`/profile. Raises UserError on bad input, and when a
    loss or gradient is not finite (the last good checkpoint stays).
    """
    # ---- Where: the workdir is this run's alone, the mesh fits the devices, all hosts want the same.
    workdir = Path(workdir)
    hosts.check_same(config.to_dict(), "config")
    mesh = make_mesh(config.mesh)
    hosts.check_same(
        {"auto": str(choose_execution(config, mesh.devices.flat[0].platform))}, "config.training.compute_dtype"
    )
    check_microbatch(config, mesh)
    hosts.leader_first(lambda: workdirs.check_free(workdir, config))
    shardings = state_shardings(config, mesh)

    # ---- What: packed text, made once.
    verbose = verbose and hosts.is_leader()
    say = print if verbose else lambda _: None
    directory = workdirs.data_directory(workdir, config)
    initial, tokenizer = hosts.leader_first(lambda: _open_inputs(config, directory, say))
    hosts.leader_first(lambda: _claim(workdir, config, tokenizer))

    # ---- From: the latest checkpoint, the initial model, or random parameters born in their shards.
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
        state = _first_state(config, shardings, checkpoints, initial)
        first_step = int(state.step)
        start = f"resuming at step {first_step}" if first_step else f"starting from {config.initial_model or 'random'}"
        say(f"{start}: {count_params(config.model):,} parameters on {describe_devices(mesh)}")
        say(f"computing in {choose_execution(config, mesh.devices.flat[0].platform)}")

        # ---- Go.
        log = hosts.leader_first(lambda: RunLog(workdir, first_step) if hosts.is_leader() else NoLog())
        display = ProgressDisplay(first_step, config.training.total_steps, verbose)
        trace = StepTrace(workdir / "profile", first_step, profile_steps)
        try:
            run = _Run(config, mesh, directory, checkpoints, log, display, trace)
            return run.until_done(state, first_step)
        finally:
            trace.close()
            display.close()
            log.close()


def _open_inputs(config: Config, directory: Path, say) -> tuple[ModelSource | None, Tokenizer]:
    initial = open_initial_model(config)
    return initial, prepare(config, directory, say, initial and initial.tokenizer)[0]


def _claim(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
    if hosts.is_leader():
        workdirs.claim(workdir, config, tokenizer)
    elif not workdirs.is_run(workdir):
        raise UserError(f"{workdir} is not the folder that host 0 writes to: all hosts must share it")


def describe_devices(mesh: Mesh) -> str:
    hosts_text = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{mesh.size} {jax.default_backend()} device(s){hosts_text}"


def open_initial_model(config: Config) -> ModelSource | None:
    """Raises UserError that names the first key in which config.model is not the model at config.initial_model."""
    if not config.initial_model:
        return None
    source = open_model(config.initial_model)
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(source.config)
    for key in ours:
        if key != "context_length" and ours[key] != theirs[key]:
            raise UserError(
                f"config.model.{key} is {ours[key]}, that of config.initial_model {theirs[key]}; in a configuration "
                "file, config.model.update(lsjax.read_model_config(PATH).to_dict()) takes its shape"
            )
    return source


def _first_state(
    config: Config, shardings: TrainState, checkpoints: Checkpoints, initial: ModelSource | None
) -> TrainState:
    """Every array is made, or read, in its shards: nothing else of its size exists beside it."""
    abstract = abstract_arrays(jax.eval_shape(lambda: init_state(config)), shardings)
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(abstract)
    if initial is None:
        return jax.jit(lambda: init_state(config), out_shardings=shardings)()
    params = initial.load_params(abstract.params)
    optimizer = jax.jit(make_optimizer(config.training).init, out_shardings=shardings.optimizer)(params)
    return TrainState(jax.device_put(np.int32(0), shardings.step), params, optimizer)


class _Run:
    """The loop and what it needs at hand."""

    def __init__(self, config, mesh, directory, checkpoints, log, display, trace):
        self.config, self.mesh, self.directory = config, mesh, directory
        self.execution = choose_execution(config, mesh.devices.flat[0].platform)
        self.checkpoints, self.log, self.display, self.trace = checkpoints, log, display, trace
        self.profile: ExitProfile | None = None
        self.clock = (time.monotonic(), 0)  # when the last logged step ended, and which it was

    def until_done(self, state: TrainState, first_step: int) -> TrainResult:
        t, sharding = self.config.training, batch_sharding(self.mesh)
        train_step = make_train_step(self.config, self.mesh)
        rows = hosts.batch_rows(sharding, t.batch_size)
        batches = training_batches(
            self.directory,
            t.batch_size,
            t.sequence_length,
            t.seed,
            first_batch=first_step,
            rows=rows,
            separate_documents=self.config.data.separate_documents,
        )
        stop_vote = hosts.StopVote(self.mesh)
        pending: tuple[int, StepMetrics, Any] | None = None
        self.clock = (time.monotonic(), first_step)
        step = first_step
        with _stop_on_signal() as stop_requested:
            for step in range(first_step + 1, t.total_steps + 1):
                # Step n is dispatched before the metrics of n-1 are fetched: the device never waits for us.
                with self.trace.begin_step(step):
                    state, metrics = train_step(state, put_batch(next(batches), rows, t.batch_size, sharding))
                if self.trace.end_step(step, metrics):
                    self.display.note(f"trace of the last steps: {self.trace.folder}")
                stopping = self._finish_step(*pending) if pending else False
                pending = (step, metrics, stop_vote.cast(stop_requested()))
                evaluating = step == t.total_steps or step % self.config.evaluation.every_steps == 0
                saving = step == t.total_steps or step % self.config.checkpoint.every_steps == 0
                if evaluating or saving or stopping:
                    # Only a step known to be finite is evaluated or saved. What is logged of a step is written
                    # before its checkpoint: a run killed in between repeats it, and nothing is missing.
                    stopping |= self._finish_step(*pending)
                    pending = None
                if evaluating:
                    self._log_evaluation(step, self._evaluate(state))
                if saving or stopping:
                    self.checkpoints.save(state)
                if stopping:
                    break
        if step < t.total_steps:
            self.display.note(f"interrupted: saved at step {step}; the same command resumes from there")
            return TrainResult(step, state.params, None)
        # A run that was complete before has logged its evaluation already.
        return TrainResult(step, state.params, self.profile or self._evaluate(state))

    def _finish_step(self, step: int, metrics: StepMetrics, vote: Any) -> bool:
        """Waits for a step's metrics, refuses what is not finite, and logs it when its turn has come. Returns whether
        any host wants to stop."""
        metrics, stopping = jax.device_get((metrics, vote))
        _check_finite(step, metrics)
        self.display.observe(active_exit_losses(metrics))
        if step % self.config.training.log_every_steps == 0 or step in (1, self.config.training.total_steps):
            self._log_step(step, metrics)
        return bool(stopping)

    def _log_step(self, step: int, metrics: StepMetrics) -> None:
        now, (then, previous) = time.monotonic(), self.clock
        tokens = (step - previous) * self.config.training.batch_size * self.config.training.sequence_length
        self.clock = (now, step)
        speed = tokens / max(now - then, 1e-9)
        record = describe_step(step, metrics, speed) | describe_speed(self.config, speed, self.mesh)
        self.log.write_step(record)
        self.display.update(record)

    def _evaluate(self, state: TrainState) -> ExitProfile:
        began = time.monotonic()
        c, t, sharding = self.config, self.config.training, batch_sharding(self.mesh)
        rows = hosts.batch_rows(sharding, t.batch_size)
        batches = held_out_batches(
            self.directory, t.batch_size, t.sequence_length, c.evaluation.max_batches, rows, c.data.separate_documents
        )
        put = (put_batch(batch, rows, t.batch_size, sharding) for batch in batches)
        self.profile = exit_profile(state.params, put, c.model, c.evaluation.exit_stride, self.execution)
        then, previous = self.clock
        self.clock = (then + time.monotonic() - began, previous)  # evaluation is no training time
        return self.profile

    def _log_evaluation(self, step: int, profile: ExitProfile) -> None:
        self.log.write_evaluation(describe_evaluation(step, profile))
        self.display.note(_evaluation_line(step, profile))


def describe_speed(config: Config, tokens_per_second: float, mesh: Mesh) -> dict[str, float]:
    """For each device, and where its peak is known (lsjax/scale/hardware.py), model FLOPs utilisation."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    speed = {"tokens_per_second_per_device": round(tokens_per_second / mesh.size, 1)}
    return speed | (utilization(config, tokens_per_second, mesh.size, chip) if chip else {})


def put_batch(batch: Batch, rows: np.ndarray, batch_size: int, sharding) -> Batch:
    """This host's rows (which they are of the global batch: `rows`) -> global arrays laid out over the mesh."""

    def put(column: np.ndarray) -> jax.Array:
        shape = (batch_size, *column.shape[1:])
        wanted = lambda index: column[np.isin(rows, np.arange(batch_size)[index[0]])]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding, wanted)

    return jax.tree.map(put, batch)


def _check_finite(step: int, metrics: StepMetrics) -> None:
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


def _evaluation_line(step: int, profile: ExitProfile) -> str:
    exits = profile.exit_layers
    shown = sorted({exits[min(quarter * len(exits) // 4, len(exits) - 1)] for quarter in (0, 1, 2, 3, 4)})
    exits = "  ".join(f"{layer}: {profile.at(layer)[0]:.3f}" for layer in shown)
    return f"held out at step {step}: loss by exit layer  {exits}"


class _stop_on_signal:  # noqa: N801 (used as a context manager function)
    """Turns SIGINT and SIGTERM into a flag, so that a run ends between two steps, saved."""

    def __enter__(self) -> Callable[[], bool]:
        self._requested = False
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: leave signals alone
                break
        return lambda: self._requested

    def _request(self, *_) -> None:
        if self._requested:  # asked twice: stop at once
            raise KeyboardInterrupt
        self._requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
