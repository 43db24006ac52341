"""Runs that are killed at random instants, started twice, damaged, or out of disk end as if nothing had happened."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import lsjax
from lsjax.io.convert import convert
from tests.fuzz import mutations, victim
from tests.fuzz.harness import WALL_LIMIT, wait_until
from tests.fuzz.parts import same_params


@pytest.fixture(scope="module")
def all_inputs(request) -> bool:
    return request.config.getoption("--all-inputs", default=False)


@pytest.fixture(scope="module")
def config(parts) -> lsjax.Config:
    config = parts.config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, total_steps=8))


@pytest.fixture(scope="module")
def undisturbed(config, all_inputs, tmp_path_factory) -> tuple[dict, float]:
    """The parameters of a run that nothing was done to, and the seconds that it took."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    for _ in range(2 if all_inputs else 1):  # the first one also waits for the server and compiles
        shutil.rmtree(workdir, ignore_errors=True)
        began = time.monotonic()
        process = victim.start(config, workdir, workdir.parent / "log")
        assert victim.exit_status(process) == 0, (workdir.parent / "log").read_text()
    return lsjax.load(workdir).params, time.monotonic() - began


@pytest.mark.slow
def test_killed_at_random_instants_a_run_ends_as_if_it_had_not_been(config, undisturbed, all_inputs, tmp_path):
    params, seconds = undisturbed
    rng, kills = random.Random(7), 0
    for number in itertools.count():
        workdir, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        kills += run_with_kills(config, workdir, log, rng, seconds)
        assert same_params(lsjax.load(workdir).params, params), f"run {number} ends with other parameters"
        assert steps_logged(workdir) == list(range(1, 9))
        assert not temporary_files(workdir)
        assert "Traceback" not in log.read_text()
        if kills >= (50 if all_inputs else 3):
            break
    print(f"{kills} kills in {number + 1} runs")


def run_with_kills(config: lsjax.Config, workdir: Path, log: Path, rng: random.Random, seconds: float) -> int:
    """Starts a run again and again, and kills it at random instants, until it ends; returns how often it was killed."""
    for kills in range(25):
        process = victim.start(config, workdir, log)
        process.join(rng.uniform(0, 1.2 * seconds))
        if not process.is_alive():
            assert process.exitcode == 0, log.read_text()
            return kills
        process.kill()
        process.join()
    assert victim.exit_status(victim.start(config, workdir, log)) == 0, log.read_text()
    return 25


def steps_logged(workdir: Path) -> list[int]:
    """Returns the steps of metrics.jsonl."""
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def temporary_files(workdir: Path) -> list[str]:
    """Returns what a killed process may have left and the next one must have cleared away."""
    names = [path.name for path in workdir.iterdir()] + [path.name for path in (workdir / "checkpoints").iterdir()]
    return [name for name in names if (name.startswith(".") and "lock" not in name) or "tmp" in name]


def test_of_two_writers_one_is_told(config, undisturbed, all_inputs, tmp_path):
    if not all_inputs:
        pytest.skip("make test-fuzz runs this; tests/training/test_nothing_lost.py has one of its kind")
    for number in range(5):
        workdir, logs = tmp_path / f"run{number}", [tmp_path / f"{number}.{i}.log" for i in (0, 1)]
        first = victim.start(config, workdir, logs[0])
        if number % 2:  # else both start at the same instant
            wait_until(lambda workdir=workdir: (workdir / "config.json").exists(), WALL_LIMIT)
        second = victim.start(config, workdir, logs[1])
        codes = [victim.exit_status(process) for process in (first, second)]
        assert sorted(codes) in ([0, 2], [0, 0]), [log.read_text() for log in logs]
        for code, log in zip(codes, logs, strict=True):
            lines = log.read_text().splitlines()
            assert len(lines) == (1 if code == 2 else 0), lines
        assert same_params(lsjax.load(workdir).params, undisturbed[0])
        assert steps_logged(workdir) == list(range(1, 9))


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_byte_in_a_checkpoint_is_found_on_resuming(seed, parts, all_inputs, tmp_path):
    if not all_inputs and seed:
        pytest.skip("make test-fuzz runs all")
    shutil.copytree(parts.half_done, tmp_path / "run")
    files = sorted(path for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    path = random.Random(seed).choice([path for path in files if path.stat().st_size])
    mutations.flip_bits(seed)(path)
    with contextlib.suppress(lsjax.UserError):
        result = lsjax.train(parts.config, tmp_path / "run", verbose=False)
        assert same_params(result.params, parts.trained.params), f"{path} was damaged, and nobody noticed"


@pytest.mark.parametrize("limit", [0, 300, 2_000, 5_000, 20_000, 60_000])
def test_where_the_disk_is_full_one_line_says_so(limit, config, undisturbed, all_inputs, tmp_path):
    if not all_inputs:
        pytest.skip("make test-fuzz runs this; tests/training/test_nothing_lost.py has one of its kind")
    check_full_disk(config, undisturbed[0], tmp_path / "run", tmp_path / "log", file_limit=limit)


@pytest.mark.parametrize("size", [64, 200, 400])
def test_a_small_disk_that_is_full(size, config, undisturbed, all_inputs, tmp_path):
    if not all_inputs or os.geteuid() != 0:
        pytest.skip("make test-fuzz runs this, as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={size}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        grow = ["mount", "-o", "remount,size=100m", disk]
        check_full_disk(config, undisturbed[0], disk / "run", tmp_path / "log", relieve=grow)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("form", ["huggingface", "lsjax", "gguf"])
@pytest.mark.parametrize("limit", [0, 3_000])
def test_a_conversion_onto_a_full_disk_is_one_line(form, limit, parts, all_inputs, tmp_path, capfd):
    if not all_inputs and (form, limit) != ("lsjax", 3_000):
        pytest.skip("make test-fuzz runs all")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    model = parts.huggingface  # made here if it is its first use, while there is room
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(lsjax.UserError, match=r"cannot write .*out"):
            convert(model, tmp_path / "out", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    time.sleep(0.5)  # for threads that still write
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def check_full_disk(
    config: lsjax.Config,
    params: dict,
    workdir: Path,
    log: Path,
    file_limit: int | None = None,
    relieve: list | None = None,
) -> None:
    """Fails unless a run on a full disk says so in one line, and the same run ends well once there is room."""
    process = victim.start(config, workdir, log, file_limit)
    status, text = victim.exit_status(process), log.read_text()
    assert status == 2, f"exit status {status}: {text[-3000:]}"
    assert text.count("\n") == 1, text[:3000]
    if relieve:
        subprocess.run(relieve, check=True)
    process = victim.start(config, workdir, log)
    assert victim.exit_status(process) == 0, log.read_text()
    assert same_params(lsjax.load(workdir).params, params)
