"""The training run, from start to finish."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from lsjax.config import Config, checked_config
from lsjax.costs.flops import utilization
from lsjax.costs.hardware import chip_of
from lsjax.data.batch import Batch
from lsjax.data.mixture import MixtureReport
from lsjax.data.packed import local_data
from lsjax.data.pipeline import held_out_batches, training_batches
from lsjax.data.prepare import TRAIN_PREPARES_BYTES, prepare
from lsjax.data.sources import held_out_names
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError, shown
from lsjax.evaluation.exits import ExitProfile, exit_profile
from lsjax.files import as_path
from lsjax.io.base_model import BaseModel
from lsjax.io.source import ModelSource
from lsjax.io.workdir import Change, check_free, claim, data_directory, is_run
from lsjax.model.execution import Execution, choose_execution
from lsjax.model.transformer import Params, count_params
from lsjax.parallel import distributed
from lsjax.parallel.sharding import batch_sharding, make_mesh
from lsjax.training.checkpoints import Checkpoints
from lsjax.training.finite import check_evaluation, check_state, check_step
from lsjax.training.interrupts import Interrupts
from lsjax.training.metrics import NoLog, RunLog, active_exit_losses, describe_evaluation, describe_step
from lsjax.training.occupy import occupied
from lsjax.training.progress import ProgressDisplay
from lsjax.training.start import find_base, first_state, open_initial_model
from lsjax.training.step import StepMetrics, TrainState, make_train_step, merged_params, model_params
from lsjax.training.trace import StepTrace


class TrainResult(NamedTuple):
    """The end of a run.

    params: those of the model; with LoRA merged, in the dtype that the run computed in.
    profile: the evaluation at the final step; None when the run was interrupted. interrupted: the signal that ended it.
    """

    step: int
    params: Params
    profile: ExitProfile | None
    interrupted: signal.Signals | None = None


@distributed.lost_hosts_named()
def train(
    config: Config | ConfigDict, workdir: str | Path, *, verbose: bool = True, profile_steps: int = 0
) -> TrainResult:
    """Trains until config.training.total_steps, resuming from the latest checkpoint in `workdir` if there is one.

    On SIGINT or SIGTERM it saves a checkpoint and returns. profile_steps: number of steps to trace into
    `workdir`/profile. Raises UserError on bad input, which leaves `workdir` as it was, and when a loss, a gradient or a
    parameter is not finite; the last good checkpoint then stays.
    """
    # ---- Where: a mesh that fits the devices, one program on all hosts, a workdir for this run alone.
    config, workdir = checked_config(config), as_path(workdir, "workdir")
    if isinstance(profile_steps, bool) or not isinstance(profile_steps, int) or profile_steps < 0:
        raise UserError(f"profile_steps must be a whole number of at least 0, got {shown(profile_steps)}")
    distributed.check_same(config.to_dict(), "config")
    mesh = make_mesh(config.mesh)
    execution = choose_execution(config, mesh.devices.flat[0])
    distributed.check_same({"auto": str(execution)}, "config.training.compute_dtype")
    train_step = make_train_step(config, mesh, execution)

    with Interrupts() as interrupts, _leader_occupies(workdir) as check_ours:
        changes = distributed.leader_first(lambda: check_free(workdir, config))

        # ---- What: packed text, made once.
        verbose = verbose and distributed.is_leader()
        say = print if verbose else _say_nothing
        initial = distributed.leader_first(lambda: open_initial_model(config))
        base = find_base(config, workdir, initial)
        tokenizer = distributed.leader_first(lambda: _pack_text(config, data_directory(workdir, config), say, initial))
        directory = distributed.all_together(lambda: local_data(data_directory(workdir, config), note=say))

        # ---- From: the latest checkpoint, the initial model, or random parameters born in their shards.
        with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
            state = first_state(config, mesh, execution, checkpoints, initial)
            first_step = int(state.step)
            say(_describe_start(config, first_step))
            say(f"{_describe_parameters(config, state)} on {describe_devices(mesh)}, computing in {execution}")

            # ---- Go.
            log = distributed.leader_first(lambda: _open_log(workdir, first_step, check_ours))
            with contextlib.closing(log):
                distributed.leader_first(
                    lambda: _claim(workdir, config, tokenizer, base, changes, log, first_step, say)
                )
                display = ProgressDisplay(first_step, config.training.total_steps, verbose)
                trace = StepTrace(workdir / "profile", first_step, profile_steps)
                with contextlib.closing(display), contextlib.closing(trace):
                    run = _Run(
                        config, mesh, execution, train_step, directory, checkpoints, log, display, trace, interrupts
                    )
                    return run.until_done(state, first_step)


def _say_nothing(text: str) -> None: ...


def _pack_text(config: Config, directory: Path, say: Callable[[str], None], initial: ModelSource | None) -> Tokenizer:
    """Packs the text, or finds it packed. Returns its tokenizer."""
    given = initial.tokenizer if initial else None
    return prepare(config, directory, say, given, most_bytes=TRAIN_PREPARES_BYTES)[0]


@contextlib.contextmanager
def _leader_occupies(workdir: Path) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of the workdir. Only the leader's process holds the lock, for all hosts of this run.

    Gives what `occupied` gives; on other hosts, a function that does nothing.
    """
    with contextlib.ExitStack() as stack:
        yield distributed.leader_first(
            lambda: stack.enter_context(occupied(workdir)) if distributed.is_leader() else lambda: None,
        )


def _open_log(workdir: Path, first_step: int, check_ours: Callable[[], None]) -> RunLog | NoLog:
    return RunLog(workdir, first_step, check_ours) if distributed.is_leader() else NoLog()


def _describe_start(config: Config, first_step: int) -> str:
    total = config.training.total_steps
    if first_step >= total:
        return f"finished: this run has done all of its {total} steps, nothing is left to train"
    if first_step:
        return f"resuming at step {first_step}"
    return f"starting from {config.initial_model or 'random'}"


def _describe_parameters(config: Config, state: TrainState) -> str:
    count = f"{count_params(config.model):,} parameters"
    if state.exit_adapter is not None:
        return f"{count} and the adapter of exit {config.layerskip.draft_exit}, which alone is trained,"
    if state.base is None:
        return count
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return f"{count} and {trained:,} of LoRA, which alone are trained,"


def _claim(
    workdir: Path,
    config: Config,
    tokenizer: Tokenizer,
    base: BaseModel | None,
    changes: list[Change],
    log: RunLog | NoLog,
    first_step: int,
    say: Callable[[str], None],
) -> None:
    """Makes the workdir this run's, once everything that the run needs has been found good."""
    if not distributed.is_leader():
        if not is_run(workdir):
            raise UserError(f"{workdir} is not the folder that host 0 writes to; all hosts must share one --workdir")
        return
    for name, old, new in changes:
        ends = "; the schedules of learning rate and LayerSkip end there" if name.endswith(".total_steps") else ""
        say(f"from step {first_step + 1} on, {name} is {new!r} (was {old!r}){ends}")
    if changes:
        log.write_changes({"step": first_step, "changes": {name: [old, new] for name, old, new in changes}})
    claim(workdir, config, tokenizer, base)


def describe_devices(mesh: Mesh) -> str:
    """Returns the number and kind of the devices, and the number of hosts if there are several."""
    hosts_text = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{mesh.size} {jax.default_backend()} device(s){hosts_text}"


@dataclasses.dataclass
class _Run:
    """The loop over steps, with everything it needs."""

    config: Config
    mesh: Mesh
    execution: Execution
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    directory: Path
    checkpoints: Checkpoints
    log: RunLog | NoLog
    display: ProgressDisplay
    trace: StepTrace
    interrupts: Interrupts
    profile: ExitProfile | None = None
    clock: tuple[float, int] = (0.0, 0)  # when the last logged step ended, and its number

    def __post_init__(self) -> None:
        batch_size = self.config.training.batch_size
        self.rows = distributed.batch_rows(batch_sharding(self.mesh), batch_size)
        self.mixture = MixtureReport(self.config.data.mixture, self.directory, batch_size)

    def until_done(self, state: TrainState, first_step: int) -> TrainResult:
        total, stop_vote = self.config.training.total_steps, distributed.StopVote(self.mesh)
        batches = self._batches(first_step)
        pending: tuple[int, StepMetrics, Any] | None = None
        self.clock = (time.monotonic(), first_step)
        self.interrupts.defer()
        self._note_mixture(first_step)
        step, stopping = first_step, False
        for step in range(first_step + 1, total + 1):
            # Step n is dispatched before the metrics of n-1 are fetched: the device never waits for the host.
            with self.trace.begin_step(step):
                state, metrics = self.train_step(state, self._put(next(batches)))
            if self.trace.end_step(step, metrics):
                self.display.note(f"trace of the last steps: {self.trace.folder}")
            stopping = self._finish_step(*pending) if pending else False
            pending = (step, metrics, stop_vote.cast(self.interrupts.requested is not None))
            evaluating = step == total or step % self.config.evaluation.every_steps == 0
            saving = step == total or step % self.config.checkpoint.every_steps == 0
            if evaluating or saving or stopping:
                # Only a step known to be finite is evaluated or saved. Its log records are written before its
                # checkpoint: a run that is killed in between repeats the step, and no record is missing.
                stopping |= self._finish_step(*pending)
                check_state(step, state)
                pending = None
            if evaluating:
                self._log_evaluations(step, self._evaluate(state))
            if saving or stopping:
                self.log.flush()  # which ends a run whose workdir another process has taken over
                self.checkpoints.save(state)
            if stopping:
                break
        if step > first_step:
            self._note_mixture(step)
        if step < total:
            self.display.note(f"interrupted: saved at step {step}; the same command resumes from there")
            # On a host that got no signal itself, another host's ended the run.
            return TrainResult(
                step, merged_params(state, self.config), None, self.interrupts.requested or signal.SIGTERM
            )
        # A run that was complete before has logged its evaluation already.
        profile = self.profile or next(iter(self._evaluate(state).values()))
        return TrainResult(step, merged_params(state, self.config), profile)

    def _note_mixture(self, step: int) -> None:
        if self.config.data.mixture:
            self.display.note(self.mixture.describe(step))

    def _finish_step(self, step: int, metrics: StepMetrics, vote: Any) -> bool:
        """Waits for a step's metrics, checks that they are finite, and logs them when due.

        Returns whether any host was asked to stop.
        """
        metrics, stopping = jax.device_get((metrics, vote))
        check_step(step, metrics)
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
        record |= self.mixture.record(step)
        self.log.write_step(record)
        self.display.update(record)

    def _evaluate(self, state: TrainState) -> dict[str, ExitProfile]:
        """Returns the exits' results on each held-out set by its name. The first one is that of the run."""
        began = time.monotonic()
        c, t = self.config, self.config.training
        profiles, params = {}, model_params(state, c)
        for name in held_out_names(c.data):
            with _reading(self.directory):
                batches = held_out_batches(
                    self.directory,
                    t.batch_size,
                    t.sequence_length,
                    c.evaluation.max_batches,
                    self.rows.tolist(),
                    c.data.separate_documents,
                    name,
                )
            on_devices = (self._put(batch) for batch in batches)
            profiles[name] = exit_profile(
                params, on_devices, c.model, c.evaluation.exit_stride, self.execution, state.adapter(c)
            )
        self.profile = next(iter(profiles.values()))
        then, previous = self.clock
        self.clock = (then + time.monotonic() - began, previous)  # evaluation does not count as training time
        return profiles

    def _log_evaluations(self, step: int, profiles: dict[str, ExitProfile]) -> None:
        for name, profile in profiles.items():
            check_evaluation(step, profile)
            self.log.write_evaluation(describe_evaluation(step, profile, name))
            self.display.note(_evaluation_line(step, profile, name))

    def _batches(self, first_step: int) -> Iterator[Batch]:
        t = self.config.training
        with _reading(self.directory):
            batches = training_batches(
                self.directory,
                t.batch_size,
                t.sequence_length,
                t.seed,
                mixture=self.config.data.mixture,
                first_batch=first_step,
                rows=self.rows.tolist(),
                separate_documents=self.config.data.separate_documents,
            )
        while True:
            with _reading(self.directory):
                batch = next(batches)
            yield batch

    def _put(self, batch: Batch) -> Batch:
        return put_batch(batch, self.rows, self.config.training.batch_size, batch_sharding(self.mesh))


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Turns the errors of damaged records into a UserError; the readers raise many kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the packed data in {directory} is damaged ({reason}); remove that folder to pack the corpus again"
        ) from error


def describe_speed(config: Config, tokens_per_second: float, mesh: Mesh) -> dict[str, float]:
    """Returns the speed per device and, for a chip of known peak (lsjax/costs/hardware.py), FLOPs utilization."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    speed = {"tokens_per_second_per_device": round(tokens_per_second / mesh.size, 1)}
    return speed | (utilization(config, tokens_per_second, mesh.size, chip) if chip else {})


def put_batch(batch: Batch, rows: np.ndarray, batch_size: int, sharding: NamedSharding) -> Batch:
    """Returns global arrays, laid out over the mesh, from this host's sequences.

    rows: their positions in the global batch.
    """

    def put(column: np.ndarray) -> jax.Array:
        def shard(index) -> np.ndarray:
            return column[np.isin(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *column.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


def _evaluation_line(step: int, profile: ExitProfile, name: str) -> str:
    exits = profile.exit_layers
    shown = sorted({exits[min(quarter * len(exits) // 4, len(exits) - 1)] for quarter in (0, 1, 2, 3, 4)})
    exits = "  ".join(f"{layer}: {profile.at(layer)[0]:.3f}" for layer in shown)
    return f"{name.replace('_', ' ')} at step {step}: loss by exit layer  {exits}"
