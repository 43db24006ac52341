"""Input without an end: devices, pipes and small archives are refused in one line, and never read whole."""

import gzip
import os
import threading

import pytest

import lsjax
from lsjax.benchmarks.prompts import read_prompts
from lsjax.cli.flags import CommandFlags
from lsjax.config import DataConfig
from lsjax.data import corpus, jsonl
from lsjax.data.packed import read_manifest
from lsjax.errors import UserError
from lsjax.evaluation.tasks import held_out_text
from lsjax.evaluation.tasks.rows import read_rows, read_split
from lsjax.training.metrics import read_complete_lines
from tests.fuzz.harness import memory_limit, time_limit
from tests.helpers.corpora import read_texts

LONGEST = 100_000
LINE = b'{"prompt": "a", "text": "a"}\n'
ZERO = "/dev/zero"

pytestmark = pytest.mark.skipif(not os.path.exists(ZERO), reason="this system has no device without an end")


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", LONGEST)
    monkeypatch.setattr(held_out_text, "LONGEST_LINE", LONGEST)
    with memory_limit(), time_limit():
        yield


def pipe(content: bytes) -> str:
    """Returns the path of a pipe that gives `content` and then ends, as a shell's <(...) is one."""
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    threading.Thread(target=write, daemon=True).start()
    return f"/dev/fd/{reading}"


@pytest.mark.parametrize("read", [read_prompts, lambda path: read_rows(path, ("a",)), held_out_text._texts])
def test_a_device_with_an_endless_line_is_refused(read, tmp_path):
    path = tmp_path / "zero.jsonl"
    path.symlink_to(ZERO)
    with pytest.raises(UserError, match=r"zero\.jsonl holds a line of 100,000 bytes or more"):
        read(path)


def test_held_out_text_of_a_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="/dev/zero holds 100,000 characters or more"):
        held_out_text._texts(held_out_text.Path(ZERO))


@pytest.mark.parametrize("read", [lambda path: read_rows(path, ("a",)), lambda path: read_split(path, "test", ("a",))])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(ZERO), os.mkfifo])
def test_a_table_that_is_no_file_is_refused(read, make, tmp_path):
    make(tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"rows\.csv is a pipe or a device"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(ZERO), os.mkfifo])
def test_files_of_a_run_that_are_none_are_refused(make, tmp_path):
    for name, read in (("manifest.json", lambda path: read_manifest(path.parent)), ("log.jsonl", read_complete_lines)):
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a pipe or a device, not a file"):
            read(tmp_path / name)


@pytest.mark.parametrize("open_path", [lsjax.load, lsjax.read_model_config])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(ZERO), os.mkfifo])
def test_a_model_that_is_a_pipe_or_a_device_is_refused(open_path, make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(UserError, match=r"no model at .*model: it is a pipe or a device, not a file or a folder"):
        open_path(tmp_path / "model")


def test_pipes_are_read_as_long_as_their_lines_end():
    assert read_prompts(pipe(LINE * 5000)) == ["a"] * 5000
    assert held_out_text._texts(held_out_text.Path(pipe(b"some text"))) == ["some text"]
    with pytest.raises(UserError, match="holds a line of 100,000 bytes or more"):
        read_prompts(pipe(LINE + b"x" * 2 * LONGEST))


def test_a_small_archive_of_one_endless_line_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(LINE + b" " * 5 * LONGEST))
    reads = [read_prompts, lambda path: read_texts(DataConfig(corpus=str(path)))]
    for block in (corpus.BLOCK_BYTES, 10):  # a small corpus, and one that is cut while it is decompressed
        monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
        for read in reads:
            with pytest.raises(UserError, match=r"bomb\.jsonl\.gz holds a line of 100,000 bytes or more"):
                read(path)


@pytest.mark.parametrize("flag", ["flagfile", "undefok"])
def test_flags_that_read_files_or_excuse_mistakes_are_unknown(flag):
    flags = CommandFlags()
    flags.group("First")
    flags.text("prompt", None, "One prompt.")
    with pytest.raises(UserError, match=f"unknown flag --{flag}"):
        flags.parse([f"--{flag}={ZERO}"])
