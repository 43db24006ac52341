"""llama.cpp, on GGUF files that we write, gives our tokens, and its tokenizer gives our ids."""

import copy
import dataclasses
import importlib.metadata
import json
import pathlib
import time

import jax
import numpy as np
import pytest
import tokenizers

pytest.importorskip("xllamacpp")

import lsjax
from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.llama_cpp_baseline import KINDS, Kind, LlamaCppDecoder, LlamaCppServer, serve_model
from lsjax.cli.main import main
from lsjax.data.tokenizer import Tokenizer, begin_with
from lsjax.io.convert import convert
from lsjax.io.gguf_tokenizer import IGNORE_MERGES, PRE_TOKENIZERS
from lsjax.io.gguf_vocabulary import byte_level_vocabulary
from lsjax.io.gguf_writer import write_gguf
from tests.conftest import TINY, random_params
from tests.helpers.recorded import RECORDED

# One thread: where other programs run, llama.cpp's threads wait for each other in loops.
THREADS = 1
NEW_TOKENS = 48
CODE = (
    "import os\n",
    "def main():\n    parser = argparse.ArgumentParser(",
    "class Node:\n    def __init__(self, value):\n",
    "for i in range(10):\n    print(",
    "# Returns the sum of\n",
    "from typing import Any\n\n\ndef read_file(path: str) -> ",
)
TEXTS = (
    *CODE,
    "",
    " ",
    "  two spaces, \u00e9 \u00fc \u4e2d\u6587 \U0001f600, and\ttabs\r\n\n\n",
    "x = 3.14159 * 2 ** 100  # Caf\u00e9 isn't I'LL we've",
    "<|end_of_text|> is text here, and so is <|begin_of_text|>.",
    "1234567890 12 345 \u0661\u0662\u0663 \u00bd\u00b2",
    "\u200b\u00a0\u3000 trailing   \n   ",
    pathlib.Path(json.__file__).read_text(encoding="utf-8"),
)


@pytest.fixture(scope="module")
def python_20m():
    return lsjax.load("python-20m")


def logprob_error(model, prompt, server) -> float:
    """Returns the largest difference between our and its log-probabilities of the 50 likeliest next tokens."""
    settings = {"n_predict": 1, "n_probs": 50, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
    answer = server.post("/completion", {"prompt": prompt} | settings)
    theirs = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    assert len(theirs) == 50
    ours = jax.nn.log_softmax(lsjax.forward(model.params, [prompt], model.config)[0, -1])
    return max(abs(float(ours[index]) - value) for index, value in theirs.items())


def margin(model, tokens) -> float:
    """Returns by how much the likeliest next token leads over the second, in logits."""
    last = np.asarray(lsjax.forward(model.params, [tokens], model.config))[0, -1]
    second, first = np.sort(last)[-2:]
    return float(first - second)


def differing(model, prompts, server, new_tokens) -> int:
    """Returns how many texts differ. They may, where our two likeliest tokens are as good as equal."""
    count = 0
    for prompt, ours in zip(prompts, lsjax.generate(model, prompts, new_tokens).tokens, strict=True):
        theirs = server.decode(prompt, new_tokens).tokens
        if ours != theirs:
            first = next(at for at, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
            assert margin(model, prompt + ours[:first]) < 1e-4, (prompt, first)
            count += 1
    return count


def test_float32_tokens_are_ours(python_20m):
    prompts = [python_20m.tokenizer.encode(text) for text in CODE]
    assert differing(python_20m, prompts, serve_model(python_20m, Kind.F32, 256, THREADS), NEW_TOKENS) <= 1


@pytest.mark.parametrize("variant", ["smollm2", "multi_query", "linear_scaling", "llama31", "llama32"])
def test_other_shapes_and_rotations(variant):
    """The longest prompt goes beyond the 64 tokens at which Llama 3's scaling starts in the recorded models."""
    model = lsjax.load(RECORDED / variant)
    server = serve_model(model, Kind.F32, 128, THREADS)
    for prompt in ([5, 17, 99, 3, 250], [7] * 3 + [42] * 14, list(range(20, 60)), list(range(100, 200))):
        assert logprob_error(model, prompt, server) < 1e-4


def test_the_same_run_measures_all_types(python_20m):
    servers = [serve_model(python_20m, kind, 128, THREADS) for kind in KINDS]
    report = benchmark(
        python_20m,
        [python_20m.tokenizer.encode(text) for text in CODE[:2]],
        [lsjax.SelfSpeculative(4, 2)],
        max_new_tokens=16,
        repeats=1,
        baselines=lambda batches: [LlamaCppDecoder(server, batches) for server in servers],
    )
    runs = {run["strategy"]: run for run in report["runs"]}
    assert list(runs)[2:] == ["llama.cpp, F32", "llama.cpp, BF16", "llama.cpp, Q8_0"]
    assert runs["llama.cpp, F32"]["matching_share"] > 0.9
    for run in list(runs.values())[2:]:
        assert run["new_tokens"] == 32
        assert run["matching_share"] > 0.2
        assert run["matches_autoregressive"] == (run["matching_share"] == 1)
        assert run["speedup"] > 0
        assert run["time_to_first_token_ms"] > 0


def test_its_clocks_split_the_call_at_the_first_token(python_20m):
    server = serve_model(python_20m, Kind.F32, 512, THREADS)
    prompt = list(range(100, 400))
    server.decode(prompt, 2)
    began = time.perf_counter()
    one = server.decode(prompt, 1)
    middle = time.perf_counter()
    many = server.decode(prompt, 40)
    ended = time.perf_counter()
    assert (len(one.tokens), len(many.tokens)) == (1, 40)
    assert one.seconds < 0.001  # no token but the first
    assert 0 < one.first_seconds < middle - began
    assert many.seconds > 0
    assert many.first_seconds + many.seconds < ended - middle


def test_a_stop_token_ends_the_text_and_belongs_to_it(python_20m):
    prompt = python_20m.tokenizer.encode(CODE[0])
    whole = serve_model(python_20m, Kind.F32, 128, THREADS).decode(prompt, 16).tokens
    stops = (whole[4], whole[9], 3)
    stopping = dataclasses.replace(python_20m, tokenizer=copy.copy(python_20m.tokenizer))
    for order in (stops, stops[1:] + stops[:1], stops[2:] + stops[:2]):
        stopping.tokenizer.stop = order
        tokens = serve_model(stopping, Kind.F32, 128, THREADS).decode(prompt, 16).tokens
        assert tokens == whole[: min(whole.index(stop) for stop in stops[:2]) + 1]


def test_the_context_holds_what_was_asked_for(python_20m):
    prompt = list(range(100, 300))
    server = serve_model(python_20m, Kind.F32, len(prompt) + 56, THREADS)
    assert len(server.decode(prompt, 56).tokens) == 56


def tokenize(server: LlamaCppServer, text: str) -> list[int]:
    return server.post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]


def test_a_converted_file_has_our_tokenizer_and_model(python_20m, tmp_path):
    convert("python-20m", tmp_path / "model.gguf", "gguf", "float32")
    server = LlamaCppServer(tmp_path / "model.gguf", Kind.F32, 256, THREADS)
    for text in TEXTS:
        ids = python_20m.tokenizer.encode(text)
        assert tokenize(server, text) == ids, text[:80]
        assert server.post("/detokenize", {"tokens": ids[1:]})["content"] == text
    assert differing(python_20m, [python_20m.tokenizer.encode(CODE[1])], server, NEW_TOKENS) == 0


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_every_rule_for_words_gives_its_ids(rule, tmp_path):
    """Trains a vocabulary under each rule that we have a name of llama.cpp's for."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=rule in IGNORE_MERGES))
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *map(str, range(3000))], trainer)
    backend.add_tokens(["<added>"])
    begin_with(backend, special[0])
    tokenizer = Tokenizer(backend, (backend.token_to_id(special[1]),))
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    vocabulary = byte_level_vocabulary(tokenizer, config.vocab_size, "it")
    assert vocabulary.pre == rule
    write_gguf(tmp_path / "model.gguf", config, random_params(config), vocabulary, Kind.F32)
    server = LlamaCppServer(tmp_path / "model.gguf", Kind.F32, 256, THREADS)
    for text in (*TEXTS, "an<added>token"):
        assert tokenize(server, text) == tokenizer.encode(text), text[:80]


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(lsjax.UserError, match=r"llama\.cpp cannot load"):
        LlamaCppServer(tmp_path / "model.gguf", Kind.F32, 256, THREADS)


@pytest.mark.parametrize("others", [[], ["transformers"]])
def test_the_command_compares_and_names_the_library(others, tmp_path, capsys):
    for library in others:
        pytest.importorskip(library)
    report = tmp_path / "report.json"
    flags = [
        f"--compare={','.join([*others, 'llama_cpp'])}",
        "--prompt=import os",
        "--max_new_tokens=4",
        "--repeats=1",
        f"--report={report}",
    ]
    assert main(["decode", "--model=python-20m", "--strategies=autoregressive", *flags]) == 0
    tree, printed = json.loads(report.read_text()), capsys.readouterr().out
    names = [run["strategy"] for run in tree["runs"]]
    assert names[-3:] == ["llama.cpp, F32", "llama.cpp, BF16", "llama.cpp, Q8_0"]
    assert len({name.partition(",")[0] for name in names}) == 2 + len(others)
    assert importlib.metadata.version("xllamacpp") in tree["baseline"]
    assert f"compared with {tree['baseline']}" in printed
