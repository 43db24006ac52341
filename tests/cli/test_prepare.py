"""The command `lsjax prepare`: shards complete each other, and training then finds the data."""

import json

import pytest

from lsjax.cli.main import main

TINY = [
    *("--config=scratch", "--config.model.num_layers=2", "--config.model.width=32", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=2", "--config.model.head_width=16", "--config.model.vocab_size=320"),
    *("--config.layerskip.draft_exit=1", "--config.training.sequence_length=32", "--config.data.held_out_fraction=0.2"),
]


def test_shards_complete_the_data(text_folder, tmp_path, capsys, monkeypatch):
    from lsjax.data import corpus

    monkeypatch.setattr(corpus, "BLOCK_BYTES", 100_000)
    command = ["prepare", *TINY, f"--config.data.corpus={text_folder}", f"--workdir={tmp_path}/run"]
    assert main([*command, "--shard=1/2"]) == 0
    assert "shard 1 of 2 is done; the last shard that ends completes" in capsys.readouterr().out
    assert not (tmp_path / "run" / "data").exists()
    assert main([*command, "--shard=2/2"]) == 0
    out = capsys.readouterr().out
    assert f"complete: {tmp_path}/run/data" in out
    assert "train: " in out
    assert "% padding" in out
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert len(manifest["files"]["train"]) >= 2
    assert main(command) == 0  # it is complete, and stays


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_wrong_shard_is_named(shard, tmp_path, capsys):
    assert main(["prepare", *TINY, f"--workdir={tmp_path}", f"--shard={shard}"]) == 2
    assert f"--shard must be I/N with I from 1 to N, such as 1/8, got '{shard}'" in capsys.readouterr().err


def test_a_folder_must_be_named(capsys):
    assert main(["prepare", *TINY]) == 2
    assert "give --workdir or --config.data.directory" in capsys.readouterr().err
