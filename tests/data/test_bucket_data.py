"""Corpora and packed data in buckets, against real servers: equal to those on a disk, byte for byte."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsjax.cli.main import main
from lsjax.config import Config, DataConfig
from lsjax.data import corpus
from lsjax.data.pipeline import training_batches
from lsjax.data.prepare import prepare
from lsjax.errors import UserError
from lsjax.files import as_path
from tests.conftest import process_environment
from tests.helpers.stores import bucket_at, require_servers

require_servers()

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    with bucket_at(request.param, tmp_path_factory.mktemp("scratch")) as url:
        yield url


@pytest.fixture
def url(bucket, request):
    """The URL of a new folder."""
    return f"{bucket}/data/{request.node.name.partition('[')[0]}"


def config_for(tiny_run: Config, **data) -> Config:
    return Config.from_dict(tiny_run.to_dict() | {"data": tiny_run.to_dict()["data"] | data})


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def without_paths(manifest: bytes) -> dict:
    tree = json.loads(manifest)
    return tree | {"request": tree["request"] | {"corpus": "", "tokenizer": ""}}


def write_corpus(folder: Path) -> None:
    """Writes documents as files of every kind, some below a folder."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    lines = b"".join(json.dumps({"text": f"line {n} " * 30}).encode() + b"\n" for n in range(200))
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "plain.jsonl").write_bytes(lines)
    (folder / "deeper" / "words.txt").write_text("some words, ä and ß\n" * 40)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.replace(b"line", b"gzip"), mtime=0))
    (folder / "packed.jsonl.zst").write_bytes(zstd.compress(lines.replace(b"line", b"zstd")))
    rows = [f"row {n} of a table " * 20 for n in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "rows.parquet", row_group_size=50)
    (folder / ".hidden.txt").write_text("not read")


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            as_path(f"{url}/{path.relative_to(folder).as_posix()}").write_bytes(path.read_bytes())


def test_a_corpus_in_a_bucket_is_packed_as_one_on_a_disk(url, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 20_000)  # pieces begin within files
    write_corpus(tmp_path / "corpus")
    upload(tmp_path / "corpus", f"{url}/corpus")
    here = config_for(tiny_run, corpus=str(tmp_path / "corpus"), file_pattern="**/*")
    there = config_for(tiny_run, corpus=f"{url}/corpus", file_pattern="**/*")
    prepare(here, tmp_path / "data", workers=1)
    _, manifest = prepare(there, tmp_path / "copied", workers=1)
    assert manifest["corpus"]["documents"] == 801
    ours, theirs = files_in(tmp_path / "copied"), files_in(tmp_path / "data")
    assert len(ours) > 6
    assert without_paths(ours.pop("manifest.json")) == without_paths(theirs.pop("manifest.json"))
    assert ours == theirs


def test_tokens_in_a_bucket_are_packed_as_those_on_a_disk(url, tiny_run, tmp_path):
    tokenizer = prepare(tiny_run, tmp_path / "first", workers=1)[0]
    tokenizer.save(tmp_path)
    tokens = np.random.default_rng(0).integers(2, 300, 20_000).astype(np.uint16)
    tokens[::50] = tokenizer.stop[0]
    np.save(tmp_path / "tokens.npy", tokens)
    as_path(f"{url}/tokens.npy").write_bytes((tmp_path / "tokens.npy").read_bytes())
    settings = {"token_separator": tokenizer.stop[0], "tokenizer": str(tmp_path)}
    prepare(config_for(tiny_run, corpus=str(tmp_path), file_pattern="*.npy", **settings), tmp_path / "a", workers=1)
    prepare(config_for(tiny_run, corpus=url, file_pattern="*.npy", **settings), tmp_path / "b", workers=1)
    ours, theirs = files_in(tmp_path / "b"), files_in(tmp_path / "a")
    assert without_paths(ours.pop("manifest.json")) == without_paths(theirs.pop("manifest.json"))
    assert ours == theirs


def test_packed_data_in_a_bucket_gives_the_same_batches(url, tiny_run, tmp_path):
    prepare(tiny_run, tmp_path / "data", workers=1)
    tokenizer, _ = prepare(tiny_run, as_path(url), workers=1)
    ours, theirs = files_in(as_path(url)), files_in(tmp_path / "data")
    assert ours == theirs
    assert tokenizer.backend.to_str() == theirs["tokenizer.json"].decode()
    batches = [training_batches(folder, 4, 32, seed=3) for folder in (as_path(url), tmp_path / "data")]
    for _ in range(3):
        for a, b in zip(*map(next, batches), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_copy_is_used_again_and_a_changed_object_copied_anew(url, tiny_run, tmp_path, monkeypatch):
    prepare(tiny_run, as_path(url), workers=1)
    training_batches(as_path(url), 4, 32, seed=3)
    copied = []
    download = type(as_path(url)).download
    monkeypatch.setattr("lsjax.buckets.BucketPath.download", lambda *a: copied.append(a[0].name) or download(*a))
    training_batches(as_path(url), 4, 32, seed=3)
    assert copied == []
    records = next(as_path(url).glob("train-*.arrayrecord"))
    records.write_bytes(records.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        training_batches(as_path(url), 4, 32, seed=3)
    assert records.name in copied


def test_a_disk_that_is_too_small_is_named(url, tiny_run, monkeypatch):
    prepare(tiny_run, as_path(url), workers=1)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"takes [\d,]+ bytes, and the disk of .* has 10 left: set TMPDIR"):
        training_batches(as_path(url), 4, 32, seed=3)


def command(url, text_folder, *flags):
    return [
        *("prepare", "--config=scratch", "--config.model.num_layers=2", "--config.model.width=32"),
        *("--config.model.num_heads=2", "--config.model.num_kv_heads=2", "--config.model.head_width=16"),
        *("--config.model.vocab_size=320", "--config.layerskip.draft_exit=1", "--config.training.sequence_length=32"),
        *("--config.data.held_out_fraction=0.2", f"--config.data.corpus={text_folder}", f"--workdir={url}", *flags),
    ]


def test_shards_share_only_a_bucket(url, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 100_000)
    assert main(command(tmp_path / "whole", text_folder)) == 0
    assert main(command(url, text_folder, "--shard=1/2")) == 0
    assert "shard 1 of 2 is done; the last shard that ends completes" in capsys.readouterr().out
    assert not (as_path(url) / "data" / "manifest.json").exists()
    assert main(command(url, text_folder, "--shard=2/2")) == 0
    assert f"complete: {url}/data" in capsys.readouterr().out
    assert files_in(as_path(url) / "data") == files_in(tmp_path / "whole" / "data")
    assert not (as_path(url) / "data" / "tokenizer").exists()
    assert main(command(url, text_folder)) == 0  # it is complete, and stays


def test_the_first_of_two_tokenizers_stays(url, tiny_run):
    """Two jobs that train a tokenizer at the same time: the later one takes the earlier one's."""
    from lsjax.data.prepare import _save_first
    from lsjax.data.tokenizer import train_tokenizer

    first, second = (train_tokenizer([text * 50], 270) for text in ("abc abd ", "xyz xyw "))
    _save_first(first, as_path(url))
    _save_first(second, as_path(url))
    assert (as_path(url) / "tokenizer.json").read_text() == first.backend.to_str(pretty=False)


@pytest.mark.slow
def test_a_killed_preparation_goes_on(url, text_folder, tmp_path, monkeypatch):
    """A real process with workers, killed when some blocks are in the bucket."""
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 30_000)
    program = (
        "import sys; from lsjax.data import corpus; corpus.BLOCK_BYTES = 30_000;"
        "from lsjax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    assert main(command(tmp_path / "whole", text_folder)) == 0
    arguments = [sys.executable, "-c", program, *command(url, text_folder)]
    process = subprocess.Popen(arguments, env=process_environment(), cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list((as_path(url) / "data").glob("part-*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (as_path(url) / "data" / "manifest.json").exists()
    subprocess.run(arguments, env=process_environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert files_in(as_path(url) / "data") == files_in(tmp_path / "whole" / "data")


def test_a_folder_that_holds_something_else_is_refused(url, tiny_run):
    as_path(f"{url}/notes.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and holds something else"):
        prepare(tiny_run, as_path(url), workers=1)
    assert [path.name for path in as_path(url).iterdir()] == ["notes.txt"]


def test_bad_input_leaves_nothing_behind(url, tiny_run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2"):
        prepare(config_for(tiny_run, corpus=str(tmp_path / "bad.jsonl")), as_path(url), workers=1)
    assert not as_path(url).exists()


def test_two_sources_in_a_bucket_may_not_share_a_file(url, tiny_run):
    as_path(f"{url}/a/x.jsonl").write_bytes(b'{"text": "a"}\n')
    mixture = f"one={url}/a/x.jsonl:1,two={url}/a:1"
    config = config_for(tiny_run, mixture=mixture, corpus="", file_pattern="**/*.jsonl")
    with pytest.raises(UserError, match=f"both hold {url}/a/x.jsonl"):
        prepare(config, as_path(f"{url}/data"), workers=1)


def test_a_corpus_that_is_not_there_is_named(url):
    data = DataConfig(corpus=f"{url}/nowhere")
    with pytest.raises(UserError, match=f"config.data.corpus '{url}/nowhere' is neither"):
        corpus.list_corpus(data)


def test_runs_in_a_bucket_are_left_out_of_a_corpus_around_them(url, tiny_run, tmp_path):
    for index in range(20):
        as_path(f"{url}/{index}.txt").write_bytes(f"text {index} ".encode() * 30)
    _, before = prepare(config_for(tiny_run, corpus=url, file_pattern="**/*"), tmp_path / "a", workers=1)
    as_path(f"{url}/runs/x/config.json").write_bytes(json.dumps(tiny_run.to_dict()).encode())
    as_path(f"{url}/runs/x/metrics.jsonl").write_bytes(b'{"step": 1}\n')
    _, manifest = prepare(config_for(tiny_run, corpus=url, file_pattern="**/*"), tmp_path / "b", workers=1)
    assert files_in(tmp_path / "a").keys() == files_in(tmp_path / "b").keys()
    assert manifest["corpus"] == before["corpus"]
    assert manifest["skipped"]["files"] == {"a training workdir": 1}
    with pytest.raises(UserError, match="is a training workdir of lsjax"):
        prepare(config_for(tiny_run, corpus=f"{url}/runs/x"), tmp_path / "c", workers=1)
