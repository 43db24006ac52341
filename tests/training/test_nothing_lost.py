"""Nothing is lost: divergence, a second process, damaged files, a full disk, refused starts and changed keys."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.io.checkpoints import finished_steps
from lsjax.io.convert import convert
from lsjax.training.finite import check_evaluation, check_state
from lsjax.training.loop import train
from lsjax.training.step import init_state
from tests import conftest
from tests.conftest import process_environment
from tests.helpers.recorded import RECORDED, copy_of
from tests.helpers.runs import continuing, replace

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """A finished run of four steps, and its config."""
    config = conftest.tiny_run.__wrapped__(text_folder)
    config = replace(config, training={"total_steps": 4}, checkpoint={"every_steps": 2})
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config, workdir, verbose=False)
    return config, workdir


@pytest.fixture
def copied(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run"


def go_back_to(workdir: Path, step: int) -> None:
    """Removes the checkpoints after `step`, as if the run had been killed."""
    for later in finished_steps(workdir / "checkpoints"):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))


# ---- A run that diverges


def test_an_update_that_diverges_keeps_the_last_good_checkpoint(copied):
    config, workdir = copied
    go_back_to(workdir, 2)
    good = lsjax.load(workdir)
    explosive = replace(config, training=EXPLOSIVE, checkpoint={"every_steps": 1})
    (workdir / "config.json").write_text(json.dumps(explosive.to_dict()))
    with pytest.raises(UserError, match=r"step 3: .* the update made parameters .* the last good checkpoint is kept"):
        train(explosive, workdir, verbose=False)
    kept = lsjax.load(workdir)
    assert kept.step == good.step == 2
    jax.tree.map(np.testing.assert_array_equal, kept.params, good.params)


# One update with these overflows float32, from parameters, loss and gradient that are finite.
EXPLOSIVE = {"learning_rate": 1e20, "weight_decay": 1e30, "warmup_steps": 0}


def test_a_last_step_that_diverges_leaves_no_checkpoint(tiny_run, tmp_path):
    config = replace(tiny_run, training=EXPLOSIVE | {"total_steps": 1})
    with pytest.raises(UserError, match="the update made parameters or optimizer moments that are not"):
        train(config, tmp_path, verbose=False)
    assert finished_steps(tmp_path / "checkpoints") == []


def test_moments_that_are_not_finite_are_noticed(tiny_run):
    """An infinite second moment gives updates of 0: parameters stay finite, and the run never learns again."""
    state = init_state(tiny_run)
    check_state(1, state)
    for leaf in range(len(jax.tree.leaves(state))):
        leaves, tree = jax.tree.flatten(state)
        if jnp.issubdtype(leaves[leaf].dtype, jnp.floating):
            leaves[leaf] = leaves[leaf].at[..., -1].set(jnp.inf)
            with pytest.raises(UserError, match=r"step 1: .* moments that are not"):
                check_state(1, tree.unflatten(leaves))


def test_an_evaluation_that_is_not_finite_ends_the_run():
    ones = np.ones(2)
    check_evaluation(4, ExitProfile([1, 2], np.array([np.inf, 1.0]), ones, ones))  # an early exit alone may be bad
    with pytest.raises(UserError, match=r"step 4: .* held-out loss is nan"):
        check_evaluation(4, ExitProfile([1, 2], np.array([1.0, np.nan]), ones, ones))


# ---- Real processes


def start(config, workdir, folder, largest_file: int | None = None) -> subprocess.Popen:
    """launch/train.py as a process. largest_file: limit on the size of files, in KiB."""
    path = folder / "config_of_run.py"
    path.write_text(
        f"import json, ml_collections\nCONFIG = json.loads({json.dumps(config.to_dict())!r})\n"
        "def get_config():\n    return ml_collections.ConfigDict(CONFIG)\n"
    )
    command = [sys.executable, ROOT / "launch" / "train.py", f"--config={path}", f"--workdir={workdir}"]
    environment = process_environment(JAX_NUM_CPU_DEVICES="1", PYTHONPATH=str(ROOT))
    if largest_file:
        command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash", *command]
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # it would warn of its own files
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def wait_for_steps(workdir: Path, steps: int, process: subprocess.Popen) -> None:
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_process_is_refused_until_the_first_is_dead(tiny_run, tmp_path):
    config = replace(tiny_run, training={"total_steps": 100_000, "log_every_steps": 1})
    first = start(config, tmp_path / "run", tmp_path)
    try:
        wait_for_steps(tmp_path / "run", 2, first)
        with pytest.raises(UserError, match=rf"run is in use by process {first.pid} on .*another --workdir"):
            train(config, tmp_path / "run", verbose=False)
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (tmp_path / "run" / ".lock").exists()  # left by the dead process, and no hindrance
    with pytest.raises(KeyboardInterrupt):
        interrupted_at_start(config, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def interrupted_at_start(config, workdir):
    """train(), with SIGINT as soon as it has the lock."""
    from lsjax.training import loop

    def check_and_interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    original, loop.check_free = loop.check_free, check_and_interrupt
    try:
        train(config, workdir, verbose=False)
    finally:
        loop.check_free = original


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_ends_with_its_status_and_without_a_traceback(tiny_run, tmp_path, number, times):
    config = replace(tiny_run, training={"total_steps": 100_000})
    process = start(config, tmp_path / "run", tmp_path)
    wait_for_steps(tmp_path / "run", 7, process)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert finished_steps(tmp_path / "run" / "checkpoints")
    if times == 1:
        assert "interrupted: saved at step" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "message"), [(False, "cannot write data folder"), (True, "cannot write a checkpoint")]
)
def test_a_full_disk_is_one_line(finished, tmp_path, packed, message):
    """A limit on the size of files fails in the same calls as a full disk does."""
    config, workdir = finished
    if packed:
        shutil.copytree(workdir / "data", tmp_path / "data")
        config = replace(config, data={"directory": str(tmp_path / "data")})
        # The request for the data holds no directory, so the packed data is taken as it is.
    process = start(config, tmp_path / "run", tmp_path, largest_file=40)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert message in err
    assert err.count("\n") == 1, err
    assert packed or not (tmp_path / "run").exists()


def test_a_file_that_a_killed_process_left_half_written_is_removed(copied):
    config, workdir = copied
    (workdir / ".config.json.0123abcd").write_text("{")
    (workdir / ".gitignore").write_text("*")
    (workdir / ".exported.4567cdef").mkdir()  # what a killed conversion into the workdir leaves
    train(config, workdir, verbose=False)
    hidden = {path.name for path in workdir.iterdir() if path.name.startswith(".")}
    assert hidden == {".gitignore", ".exported.4567cdef"}


# ---- Damaged files


def test_no_flipped_byte_of_the_parameters_loads_as_other_weights(copied):
    _, workdir = copied
    exact = lsjax.load(workdir).params
    files = [p for p in (workdir / "checkpoints" / "4" / "params").rglob("*") if p.is_file()]
    rng, refused = np.random.default_rng(0), 0
    for path in sorted(files, key=lambda p: p.stat().st_size)[-3:]:
        content = path.read_bytes()
        for index in rng.integers(len(content), size=8):
            path.write_bytes(
                content[:index] + bytes([content[index] ^ 1 << int(rng.integers(8))]) + content[index + 1 :]
            )
            try:
                params = lsjax.load(workdir).params
            except UserError as error:
                assert "cannot be read; remove that folder" in str(error)  # noqa: PT017 (some flips change nothing)
                refused += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, params, exact)
        path.write_bytes(content)
    assert refused >= 8


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    garbage = np.random.default_rng(0).bytes(len(content))
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "garbage": garbage,
            "scattered": b"".join(content[i : i + 500] + garbage[i : i + 12] for i in range(0, len(content), 512)),
        }[kind]
    )


RECORDS = ("train-000000-0000.arrayrecord", "held_out-000000-0000.arrayrecord")


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "scattered"])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", *RECORDS])
def test_damaged_data_is_one_line(copied, name, kind):
    config, workdir = copied
    go_back_to(workdir, 2)
    damage(workdir / "data" / name, kind)
    with pytest.raises(UserError) as error:
        train(replace(config, training={"total_steps": 40}), workdir, verbose=False)
    assert str(workdir / "data") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"request": {}}', "[" * 100_000])
def test_a_manifest_of_something_else_is_one_line(copied, manifest):
    config, workdir = copied
    (workdir / "data" / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*; remove .*data to pack the corpus again"):
        train(config, workdir, verbose=False)


LOGS = {
    "metrics.jsonl is a folder": ("metrics.jsonl", lambda p: p.mkdir(), "Is a directory; move it away"),
    "metrics.jsonl is binary": ("metrics.jsonl", lambda p: p.write_bytes(b"\xff\x00\n"), "no record of a step"),
    "metrics.jsonl is nested": ("metrics.jsonl", lambda p: p.write_text("[" * 100_000 + "\n"), "no record of a step"),
    "metrics.jsonl has a list": ("metrics.jsonl", lambda p: p.write_text("[1]\n"), "no record of a step"),
    "evaluations.jsonl is a folder": ("evaluations.jsonl", lambda p: p.mkdir(), "Is a directory; move it away"),
    "tensorboard is a file": ("tensorboard", lambda p: p.write_text(""), "cannot write TensorBoard events in"),
    "checkpoints is a file": ("checkpoints", lambda p: p.write_text(""), "cannot write checkpoint folder"),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_of_the_wrong_kind_is_one_line(copied, name):
    config, workdir = copied
    go_back_to(workdir, 2)
    file, make, message = LOGS[name]
    path = workdir / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)
    with pytest.raises(UserError, match=message) as error:
        train(config, workdir, verbose=False)
    assert str(path) in str(error.value)


# ---- Starts that are refused


def test_an_empty_workdir_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="workdir is empty"):
        train(tiny_run, "", verbose=False)
    assert list(tmp_path.iterdir()) == []


def cut_weights(config, folder):
    """A configuration whose initial model is cut short, which only reading its tensors shows."""
    model = folder / "model"
    convert(copy_of("llama32", folder / "hf"), model, "lsjax")
    data = max((p for p in (model / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    return continuing(config, model)


REFUSED = {
    "seed": lambda config, _: replace(config, training={"seed": 2**32}),
    "mesh": lambda config, _: replace(config, mesh={"data": 3}),
    "microbatch": lambda config, _: replace(config, training={"batch_size": 12}),
    "corpus": lambda config, folder: replace(config, data={"corpus": str(folder / "nowhere")}),
    "too little text": lambda config, _: replace(config, data={"held_out_fraction": 1e-9}),
    "shape of the initial model": lambda config, _: replace_model(config, RECORDED / "llama32"),
    "weights of the initial model": cut_weights,
    "frozen": lambda config, _: replace(config, training={"frozen": "embedd"}),
}


def replace_model(config, path):
    return dataclasses.replace(config, initial_model=str(path))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_start_leaves_nothing_and_the_corrected_one_runs(tiny_run, tmp_path, name):
    workdir = tmp_path / "new" / "run"
    with pytest.raises(UserError):
        train(REFUSED[name](tiny_run, tmp_path), workdir, verbose=False)
    assert not (tmp_path / "new").exists()
    if name == "seed":
        assert train(replace(tiny_run, training={"total_steps": 2}), workdir, verbose=False).step == 2


def test_a_refused_start_leaves_what_was_there(tiny_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match=r"num_layers is 4"):
        train(replace_model(tiny_run, RECORDED / "llama32"), tmp_path, verbose=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


# ---- Resuming with other keys


def test_what_does_not_change_the_mathematics_may_change_and_is_logged(copied, capsys):
    config, workdir = copied
    go_back_to(workdir, 2)
    free = {"log_every_steps": 2, "rematerialize": "none", "loss_chunk": 32, "total_steps": 6}
    changed = replace(config, training=free, evaluation={"every_steps": 3}, checkpoint={"keep": 1}, mesh={"fsdp": 2})
    assert train(changed, workdir).step == 6
    said = capsys.readouterr().out
    assert "from step 3 on, config.training.log_every_steps is 2 (was 1)\n" in said
    assert "config.training.total_steps is 6 (was 4); the schedules of learning rate and LayerSkip end there" in said
    (line,) = (workdir / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert json.loads(line)["changes"]["config.mesh.fsdp"] == [1, 2]
    assert len(json.loads(line)["changes"]) == 7
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(changed.to_dict()))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "learning_rate", 0.5),
        ("training", "seed", 7),
        ("training", "warmup_steps", 1),
        ("training", "compute_dtype", "bfloat16"),
        ("layerskip", "exit_scale", 0.5),
        ("data", "held_out_fraction", 0.3),
    ],
)
def test_what_changes_the_mathematics_is_refused_with_the_way_out(finished, section, key, value):
    config, workdir = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=rf"config.{section}.{key} was .*config.initial_model={workdir}"):
        train(replace(config, **{section: {key: value}}), workdir, verbose=False)
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("latest", "total", "message"),
    [(4, 8, "run that is finished"), (4, 2, "run that is finished"), (3, 2, "run that is at step 3 already")],
)
def test_a_schedule_that_is_over_cannot_be_stretched(copied, latest, total, message):
    config, workdir = copied
    if latest < 4:
        (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / str(latest))
    with pytest.raises(UserError, match=rf"{message}: .*was 4 there and cannot become {total}.*initial_model"):
        train(replace(config, training={"total_steps": total}), workdir, verbose=False)


def test_a_finished_run_says_so(finished, capsys):
    config, workdir = finished
    assert train(config, workdir).interrupted is None
    assert "finished: this run has done all of its 4 steps, nothing is left to train" in capsys.readouterr().out
