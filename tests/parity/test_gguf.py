"""Compares GGUF with independent readers: transformers on a real file, SentencePiece on its own model."""

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

import lsjax  # noqa: E402
from lsjax.experiments.pretrained import fetch_smollm2  # noqa: E402
from lsjax.io.gguf_tokenizer import gguf_tokenizer  # noqa: E402
from tests.helpers.llamas import run_llama  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXTS = (
    "def main():\n    return 0\n",
    "  two spaces, é ü 中文 \U0001f600, and\ttabs\n\n\n",
    "x = 3.14159 * 2 ** 100  # Café",
    pathlib.Path(pathlib.__file__).read_text()[:20_000],
)


@pytest.fixture(scope="module")
def smollm2():
    return fetch_smollm2(ROOT / "runs" / "pretrained")


def test_a_real_model_agrees_with_transformers(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = lsjax.load(smollm2)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text)
        assert ids == tokenizer(text)["input_ids"]
        assert ours.tokenizer.decode(ids) == text
    tokens = np.array([ours.tokenizer.encode(TEXTS[3])[:256]])
    logits, states = run_llama(theirs, tokens)
    mine = np.asarray(lsjax.forward(ours.params, tokens, ours.config))
    assert np.abs(mine - logits).max() < 1e-4 * np.abs(logits).max()
    for layer, (a, b) in enumerate(
        zip(np.asarray(lsjax.hidden_states(ours.params, tokens, ours.config)), states, strict=True)
    ):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max(), layer
    prompt = tokens[:, :32]
    expected = theirs.generate(torch.as_tensor(prompt), max_new_tokens=32, do_sample=False)[0, 32:].tolist()
    assert lsjax.generate(ours, prompt.tolist(), 32).tokens[0] == expected


def test_a_sentencepiece_vocabulary_gives_its_tokens(tmp_path):
    """Trains a vocabulary like that of Llama 1 and 2: BPE pieces with scores, and bytes to fall back on."""
    import io

    lines = "\n".join(pathlib.Path(f.__file__).read_text() for f in (pathlib, np.lib)).splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = theirs.vocab_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in range(size)
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
    }
    ours = gguf_tokenizer(fields, "test")
    assert ours.begin == theirs.bos_id()
    assert ours.stop == (theirs.eos_id(),)
    for text in TEXTS:
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text
