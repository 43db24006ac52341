"""Mixtures: exact proportions, sources that stay apart, exact resumption, bytes that depend on the texts alone."""

import json
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from lsjax.data import corpus as corpora
from lsjax.data.documents import digest_of, is_held_out
from lsjax.data.mixture import Interleaving, MixtureReport
from lsjax.data.packed import read_manifest
from lsjax.data.pipeline import held_out_batches, training_batches
from lsjax.data.prepare import Shard, prepare, prepare_shard
from lsjax.errors import UserError
from tests.helpers.runs import replace

LETTERS = {"code": "abcdefgh", "prose": "ijklmnop", "rare": "qrstuvwx"}  # the source of a text is seen in its letters
WEIGHTS = {"code": 0.7, "prose": 0.23, "rare": 0.07}  # Grain rounds these to 1000, 328 and 100
LENGTH = 32


def silent(text): ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a JSONL file of random words for each source, of different sizes."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    for (name, letters), count in zip(LETTERS.items(), (300, 200, 40), strict=True):
        texts = (" ".join("".join(rng.choices(letters, k=4)) for _ in range(rng.randint(9, 60))) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def mixture(folder, weights=WEIGHTS):
    return ",".join(f"{name}={folder}/{name}.jsonl:{weight}" for name, weight in weights.items())


@pytest.fixture(scope="module")
def run(folder, text_folder):
    from tests import conftest

    config = conftest.tiny_run.__wrapped__(text_folder)
    return replace(config, data={"corpus": "python", "mixture": mixture(folder), "held_out_fraction": 0.1})


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture") / "data"
    tokenizer, _ = prepare(run, directory, silent, workers=1)
    return directory, tokenizer


def sources_of(tokens, tokenizer):
    """Returns the sources of the sequences of a batch, by their letters."""
    found = []
    for row in np.asarray(tokens):
        letters = set(tokenizer.decode(row.tolist())) - {" "}
        (name,) = [name for name, own in LETTERS.items() if letters <= set(own)]  # fails if sources share a sequence
        found.append(name)
    return found


def stored(directory, split):
    """Returns the tokens of all sequences of a split, as bytes."""
    records = []
    for name in read_manifest(directory)["files"][split]:
        records += ArrayRecordReader(str(directory / name)).read_all()
    return [np.frombuffer(record, np.int32).reshape(2, LENGTH + 1)[0, :-1].tobytes() for record in records]


# ---- Proportions


@pytest.mark.parametrize("weights", [["1"], ["7", "3"], ["0.7", "0.25", "0.05"], ["0.333", "0.1", "12", "3.1416"]])
def test_every_prefix_of_the_stream_has_the_shares(weights):
    weights = [Fraction(weight) for weight in weights]
    total, interleaving = sum(weights), Interleaving(weights)
    seen = [0] * len(weights)
    for index in range(3000):
        assert interleaving.counts(index) == seen
        assert all(abs(count - index * w / total) < len(weights) for count, w in zip(seen, weights, strict=True))
        source, number = interleaving[index]
        assert number == seen[source], "a sequence is left out or comes twice"
        seen[source] += 1


def test_shares_are_exact_after_a_period_however_far():
    interleaving = Interleaving([Fraction("0.7"), Fraction("0.25"), Fraction("0.05")])
    for length in (20, 10**6, 10**15):
        assert interleaving.counts(length) == [length * 7 // 10, length // 4, length // 20]
    assert sum(interleaving.counts(10**15 + 7)) == 10**15 + 7


def test_batches_have_the_requested_proportions_and_the_report_says_what_they_have(run, packed):
    directory, tokenizer = packed
    batches, seen = training_batches(directory, 8, LENGTH, seed=3, mixture=run.data.mixture), Counter()
    report = MixtureReport(run.data.mixture, directory, 8)
    packed_sequences = {name: len(stored(directory, f"train-{name}")) for name in WEIGHTS}
    for step in range(1, 201):
        seen.update(sources_of(next(batches).tokens, tokenizer))
        record = report.record(step)
        assert record["mixture"] == {name: seen[name] / (8 * step) for name in WEIGHTS}
        assert record["epochs"] == {name: seen[name] / packed_sequences[name] for name in WEIGHTS}
    assert record["mixture"] == pytest.approx(WEIGHTS, abs=1e-12)
    assert report.describe(0).startswith(f"mixture: code 70.00% ({packed_sequences['code']:,} sequences packed), prose")
    assert "code 70.00% (1,120 sequences, " in report.describe(200)
    assert report.describe(200).startswith("mixture up to step 200: ")


def test_each_source_is_read_once_before_it_repeats(run, packed):
    directory, _ = packed
    records = {name: stored(directory, f"train-{name}") for name in WEIGHTS}
    source_of = {record: name for name, own in records.items() for record in own}
    read = {name: [] for name in WEIGHTS}
    batches = training_batches(directory, 8, LENGTH, seed=0, mixture=run.data.mixture)
    while any(len(read[name]) < len(own) for name, own in records.items()):
        for row in next(batches).tokens:
            read[source_of[row.tobytes()]].append(row.tobytes())
    for name, own in records.items():
        first = read[name][: len(own)]
        assert sorted(first) == sorted(own)
        assert first != own, "not shuffled"


def test_sources_of_equal_length_are_not_shuffled_alike(run, folder, tmp_path):
    (tmp_path / "twin.jsonl").write_text((folder / "code.jsonl").read_text())
    both = f"code={folder}/code.jsonl:1,twin={tmp_path}/twin.jsonl:1"
    prepare(replace(run, data={"mixture": both}), tmp_path / "data", silent, workers=1)
    assert stored(tmp_path / "data", "train-code") == stored(tmp_path / "data", "train-twin")
    batches = training_batches(tmp_path / "data", 2, LENGTH, seed=0, mixture=both)
    pairs = [next(batches).tokens for _ in range(50)]
    assert sum((code == twin).all() for code, twin in pairs) < 5


# ---- A function of the step


def test_batches_are_the_same_on_any_number_of_hosts_and_from_any_start(run, packed):
    def batches(**options):
        return training_batches(packed[0], 8, LENGTH, seed=3, mixture=run.data.mixture, **options)

    first = batches()
    whole = [next(first) for _ in range(60)]
    for start in (1, 17, 59):
        resumed = batches(first_batch=start)
        for batch in whole[start:]:
            for ours, theirs in zip(next(resumed), batch, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    for shares in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 6], [2, 3, 4, 5, 7]]):
        hosts = [batches(rows=share) for share in shares]
        for batch in whole:
            for share, host in zip(shares, hosts, strict=True):
                np.testing.assert_array_equal(next(host).tokens, batch.tokens[share])


# ---- Preparing


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_processes_and_shards_do_not_change_the_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK_BYTES", 10_000)
    prepare(run, tmp_path / "one", silent, workers=1)
    whole = content(tmp_path / "one")
    assert sum(name.startswith("train-code-") for name in whole) >= 3
    prepare(run, tmp_path / "two", silent, workers=2)
    assert content(tmp_path / "two") == whole
    for index, complete in ((2, False), (1, False), (3, True)):
        assert prepare_shard(run, tmp_path / "shards", Shard(index, 3), silent, workers=1) is complete
    assert content(tmp_path / "shards") == whole


def test_a_part_of_each_source_is_held_out_under_its_name(run, packed):
    directory, tokenizer = packed
    splits = read_manifest(directory)["splits"]
    assert set(splits) == {"train-code", "code", "train-prose", "prose", "train-rare", "rare"}
    for name in WEIGHTS:
        assert splits[name]["documents"] > 0
        for batch in held_out_batches(directory, 2, LENGTH, 3, split=name):
            assert set(sources_of(batch.tokens, tokenizer)) == {name}
        assert not set(stored(directory, name)) & set(stored(directory, f"train-{name}"))


def test_with_validation_sets_the_sources_are_trained_on_whole(run, folder, tmp_path):
    config = replace(run, data={"mixture": f"code={folder}/code.jsonl:1", "validation": f"rare={folder}/rare.jsonl"})
    splits = prepare(config, tmp_path / "data", silent, workers=1)[1]["splits"]
    assert {split: counts["documents"] for split, counts in splits.items()} == {"train-code": 300, "rare": 40}


def test_other_weights_take_the_same_packed_data_and_other_sources_do_not(run, folder, tmp_path):
    prepare(run, tmp_path / "data", silent, workers=1)
    before = content(tmp_path / "data")
    even = replace(run, data={"mixture": mixture(folder, dict.fromkeys(WEIGHTS, 1))})
    prepare(even, tmp_path / "data", silent, workers=1)
    prepare(replace(even, data={"corpus": "ignored"}), tmp_path / "data", silent, workers=1)
    assert content(tmp_path / "data") == before
    with pytest.raises(UserError, match="holds data packed for"):
        prepare(replace(run, data={"mixture": mixture(folder, {"code": 1})}), tmp_path / "data", silent)


FORM = "config.data.mixture must be NAME=PATH:WEIGHT for each source"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tmp}/a.jsonl", f"{FORM}, separated by commas"),
        ("{tmp}/a.jsonl:1", f"{FORM}, separated by commas"),
        ("a={tmp}/a.jsonl", f"{FORM}, such as code=my/code:0.7; got a="),
        ("a=:1", f"{FORM}, such as code=my/code:0.7; got a=:1"),
        ("a={tmp}/a.jsonl:1,a={tmp}/b.jsonl:1", f"{FORM}, separated by commas, each name once"),
        ("a={tmp}/a.jsonl:1,", f"{FORM}, separated by commas"),
        ("train={tmp}/a.jsonl:1", "each name once and not 'train'"),
        ("a-b={tmp}/a.jsonl:1", f"{FORM}, separated by commas"),
        ("a={tmp}/a.jsonl:0", "config.data.mixture: the weight of a must be a number above 0, got '0'"),
        ("a={tmp}/a.jsonl:0.0,b={tmp}/b.jsonl:1", "the weight of a must be a number above 0, got '0.0'"),
        ("a={tmp}/a.jsonl:-1", "the weight of a must be a number above 0, got '-1'"),
        ("a={tmp}/a.jsonl:nan", "the weight of a must be a number above 0, got 'nan'"),
        ("a={tmp}/a.jsonl:inf", "the weight of a must be a number above 0, got 'inf'"),
        ("a={tmp}/a.jsonl:70%", "the weight of a must be a number above 0, got '70%'"),
        ("a={tmp}/a.jsonl:", "the weight of a must be a number above 0, got ''"),
        ("a={tmp}/none:1", "config.data.mixture '.*none' is neither"),
        ("a={tmp}/a.jsonl:1,b={tmp}/empty.jsonl:1", "config.data.mixture: b is empty"),
        ("a={tmp}/a.jsonl:1,b={tmp}/one.jsonl:1", r"config.data.mixture: b has 1 document\(s\), too few to split"),
        ("a={tmp}/a.jsonl:1,b={tmp}/short.jsonl:1", "the train-b documents are shorter than one sequence"),
        ("a={tmp}/a.jsonl:1,b={tmp}:1", "config.data.mixture: a and b both hold .*a.jsonl; a file belongs to one"),
        ("a={tmp}/a.jsonl:1,b={tmp}/link.jsonl:1", "config.data.mixture: a and b both hold .*a.jsonl"),
    ],
)
def test_a_wrong_mixture_is_named_and_leaves_nothing_behind(text, message, run, folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text((folder / "code.jsonl").read_text())
    (texts / "b.jsonl").write_text((folder / "prose.jsonl").read_text())
    (texts / "link.jsonl").symlink_to(texts / "a.jsonl")
    (texts / "empty.jsonl").write_text("")
    (texts / "one.jsonl").write_text('{"text": "one text"}\n')
    one_of_each = [
        next(i for i in range(99) if is_held_out(digest_of(b"%d" % i), 0.1) is held) for held in (True, False)
    ]
    (texts / "short.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in one_of_each))
    with pytest.raises(UserError, match=message) as error:
        prepare(replace(run, data={"mixture": text.format(tmp=texts)}), tmp_path / "data", silent, workers=1)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [texts]
