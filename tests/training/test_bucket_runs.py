"""Runs whose workdir is in a bucket, against real servers: what they leave, resumption, claims, and several hosts."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lsjax
from lsjax.errors import UserError
from lsjax.files import as_path
from lsjax.training import lease
from lsjax.training.loop import train
from lsjax.training.occupy import occupied
from tests.conftest import process_environment
from tests.helpers.processes import assert_same_run, finish, start
from tests.helpers.runs import replace
from tests.helpers.stores import bucket_at, require_servers

require_servers()

pytestmark = pytest.mark.usefixtures("compilation_cache")

TIMING = {"tokens_per_second", "tokens_per_second_per_device"}
STORES = [pytest.param("gs", id="gs"), pytest.param("s3", id="s3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=STORES)
def bucket(request, tmp_path_factory):
    with bucket_at(request.param, tmp_path_factory.mktemp("scratch")) as url:
        yield url


@pytest.fixture
def url(bucket, request):
    """The URL of a new workdir."""
    return f"{bucket}/runs/{request.node.name.partition('[')[0]}"


@pytest.fixture(scope="module")
def reference(text_folder, tmp_path_factory):
    """An uninterrupted run on a disk, and its config."""
    from tests import conftest

    config = conftest.tiny_run.__wrapped__(text_folder)
    workdir = tmp_path_factory.mktemp("reference")
    train(config, workdir, verbose=False)
    return config, workdir


def read_lines(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same_workdir(url, reference):
    """Compares two runs bit for bit: their logs, and the parameters that they ended with."""
    found = as_path(url)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_lines(found / name) == read_lines(reference / name)
    ours, theirs = lsjax.load(url), lsjax.load(reference)
    assert ours.step == theirs.step
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_a_bucket_holds_what_a_disk_would(url, reference):
    config, workdir = reference
    train(config, url, verbose=False, profile_steps=2)
    assert_same_workdir(url, workdir)
    found = as_path(url)
    assert {path.name for path in found.iterdir()} == {path.name for path in workdir.iterdir()} | {"profile"}
    assert json.loads((found / "config.json").read_text()) == json.loads((workdir / "config.json").read_text())
    assert sorted(int(path.name) for path in (found / "checkpoints").iterdir()) == [10, 12]
    assert (found / "tokenizer.json").read_text() == (workdir / "tokenizer.json").read_text()
    (events,) = found.glob("tensorboard/events.*")
    assert events.stat().st_size == next((workdir / "tensorboard").iterdir()).stat().st_size
    assert list(found.glob("profile/**/*.xplane.pb"))
    for path in (workdir / "data").iterdir():
        assert (found / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_lacks_its_end_falls_back(url, reference):
    """Damages a run as a process does that is killed while it writes a checkpoint."""
    config, workdir = reference
    train(config, url, verbose=False)
    (as_path(url) / "checkpoints" / "12" / "commit_success.txt").unlink()
    assert lsjax.load(url).step == 10
    train(config, url, verbose=False)
    assert_same_workdir(url, workdir)


@pytest.mark.slow
def test_a_changed_byte_in_a_checkpoint_is_found(url, reference):
    config, _ = reference
    train(config, url, verbose=False)
    arrays = as_path(url) / "checkpoints" / "12" / "params" / "ocdbt.process_0" / "d"
    largest = max(arrays.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read; remove that folder"):
        lsjax.load(url)
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read; remove that folder"):
        train(config, url, verbose=False)


def test_a_refused_start_leaves_nothing(url, tiny_run):
    with pytest.raises(UserError, match="neither"):
        train(replace(tiny_run, data={"corpus": "/nowhere"}), url, verbose=False)
    assert not as_path(url).exists()


TRAIN = (
    "import json, sys, jax; jax.config.update('jax_num_cpu_devices', 8);"
    "from lsjax.config import Config; from lsjax.training.loop import train;"
    "train(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2])"
)


def start_training(config, url):
    command = [sys.executable, "-c", TRAIN, json.dumps(config.to_dict()), url]
    return subprocess.Popen(command, env=process_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(path, processes, timeout=120):
    deadline = time.monotonic() + timeout
    while not path.exists():
        ended = [process.communicate()[1] for process in processes if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["within a checkpoint", "after a checkpoint"])
def test_a_killed_run_resumes_bit_for_bit(bucket, tiny_run, tmp_path, moment):
    """A real process, killed, then run again to the end, beside one on a disk that nobody stopped."""
    config = replace(tiny_run, training={"total_steps": 40})
    train(config, tmp_path, verbose=False)
    url = f"{bucket}/killed/{moment.split()[0]}"
    process = start_training(config, url)
    step = as_path(url) / "checkpoints" / "15"
    wait_for(step if moment.startswith("within") else step / "commit_success.txt", [process])
    process.kill()
    process.communicate()
    assert lsjax.load(url).step < 40
    assert list((as_path(url) / ".lock").iterdir())  # its claim, which keeps nobody out
    again = start_training(config, url)
    assert again.wait(120) == 0, again.communicate()[1]
    assert_same_workdir(url, tmp_path)
    assert not list((as_path(url) / ".lock").iterdir())


@pytest.mark.slow
def test_a_second_process_is_refused(url, tiny_run, tmp_path):
    with occupied(as_path(url)):
        process = start_training(tiny_run, url)
        assert process.wait(120) == 1
    error = process.communicate()[1].decode()
    assert f"lsjax.errors.UserError: {url} is in use by process {os.getpid()} on " in error


def pretend_another_machine(url, monkeypatch):
    """Writes the claim of a process on another machine, and returns its path."""
    claim = as_path(url) / ".lock" / "0123456789abcdef"
    claim.write_bytes(json.dumps({"process": os.getpid(), "host": "elsewhere", "machine": "another"}).encode())
    monkeypatch.setattr(lease, "_LOOK", 0.1)
    return claim


def test_a_claim_that_is_renewed_is_obeyed(url, monkeypatch):
    claim = pretend_another_machine(url, monkeypatch)
    looks = iter(range(1000))

    def renew(_):
        claim.write_bytes(claim.read_bytes() + b" " * (next(looks) % 2))

    monkeypatch.setattr(lease.time, "sleep", renew)
    with pytest.raises(UserError, match=r"is in use by process \d+ on elsewhere"), occupied(as_path(url)):
        pass
    assert [path.name for path in (as_path(url) / ".lock").iterdir()] == [claim.name]


def test_a_claim_that_lapsed_is_removed(url, monkeypatch, capsys):
    claim = pretend_another_machine(url, monkeypatch)
    monkeypatch.setattr(lease, "LAPSE", 2.0)
    began = time.monotonic()
    with occupied(as_path(url)) as check:
        assert time.monotonic() - began > 1.0  # S3's clock has whole seconds
        assert not claim.exists()
        check()
    assert "looking whether its process is alive" in capsys.readouterr().err


def test_of_two_that_start_at_once_at_most_one_goes_on(url, monkeypatch):
    first, second = (lease.Lease(as_path(url)) for _ in range(2))
    monkeypatch.setattr(second, "_wait_for_others", first._renew)  # the second has found nobody, then the first comes
    with pytest.raises(UserError, match="is in use by"):
        second.acquire()
    assert not first._others()


def test_a_process_that_slept_finds_its_workdir_taken(url, monkeypatch):
    with occupied(as_path(url)) as check:
        monkeypatch.setattr(lease, "LAPSE", 0.5)
        time.sleep(0.6)
        check()  # nobody came
        time.sleep(0.6)
        pretend_another_machine(url, monkeypatch)
        with pytest.raises(UserError, match="was taken over by another process"):
            check()
        with pytest.raises(UserError, match="was taken over by another process"):
            check()


def test_a_run_that_lost_its_workdir_writes_nothing_more(url, tiny_run, monkeypatch):
    """Two steps before a checkpoint, another process takes the workdir over."""
    monkeypatch.setattr(lease, "_RENEWAL", 1000)
    monkeypatch.setattr("lsjax.training.progress.ProgressDisplay.update", lambda _, record: take(record["step"]))
    foreign = b'{"step": 1, "note": "of the other process"}\n'

    def take(step):
        if step == 8:
            pretend_another_machine(url, monkeypatch)
            (as_path(url) / "metrics.jsonl").write_bytes(foreign)
            monkeypatch.setattr(lease, "LAPSE", -1.0)

    with pytest.raises(UserError, match="was taken over by another process"):
        train(tiny_run, url, verbose=False)
    assert (as_path(url) / "metrics.jsonl").read_bytes() == foreign
    assert [path.name for path in (as_path(url) / "checkpoints").iterdir()] == ["5"]


CONFIG = """
from lsjax.config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_width=8, feed_forward_width=48)
    config.model.update(vocab_size=320, context_length=128)
    config.data.update(corpus="{corpus}", held_out_fraction=0.2)
    config.training.update(total_steps=20, batch_size=8, sequence_length=32, warmup_steps=2, log_every_steps=1)
    config.training.update(loss_chunk=64, compute_dtype="float32")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.checkpoint.every_steps = 5
    config.evaluation.update(every_steps=10, max_batches=2)
    return config
"""


@pytest.mark.slow
def test_two_hosts_share_only_a_bucket(bucket, text_folder, tmp_path, monkeypatch):
    """Two processes with temporary folders of their own train, are killed, and resume to the run of one process."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(corpus=text_folder))
    ((status, _, err),) = finish(start(config, tmp_path / "alone", 1))
    assert status == 0, err
    url = f"{bucket}/two"
    processes = start(config, url, 2, own_environment=_own_folders(tmp_path))
    wait_for(as_path(url) / "checkpoints" / "10" / "commit_success.txt", processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    results = finish(start(config, url, 2, own_environment=_own_folders(tmp_path)))
    assert [status for status, *_ in results] == [0, 0], results
    assert "resuming at step" in results[0][1]
    assert_same_run(read_lines(as_path(url) / "metrics.jsonl"), read_lines(tmp_path / "alone" / "metrics.jsonl"))
    assert lsjax.load(url).step == 20
    for rank in range(2):  # each host had the records on its own disk
        assert list((tmp_path / f"host{rank}").glob("lsjax-*/*/*.arrayrecord"))


def _own_folders(tmp_path):
    folders = {rank: tmp_path / f"host{rank}" for rank in range(2)}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    return {rank: {"TMPDIR": str(folder)} for rank, folder in folders.items()}
