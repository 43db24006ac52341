"""Small good models, runs and corpora to damage, and what they give."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np

import lsjax
from lsjax.config import Config
from tests.conftest import TINY
from tests.helpers.gguf_files import write_gguf
from tests.helpers.recorded import RECORDED

VARIANT = "smollm2"
PROMPT = "def main(): return 0"
NEW_TOKENS = 4


# A configuration file of a run of a second or two.
TINY_CONFIG_FILE = """
from lsjax.config import default_config

def get_config():
    config = default_config()
    config.model.update(num_layers=2, width=16, feed_forward_width=24, num_heads=2, num_kv_heads=1, head_width=8)
    config.model.update(vocab_size=320, context_length=128)
    config.data.update(corpus={corpus!r}, held_out_fraction=0.3)
    config.training.update(total_steps=4, batch_size=8, sequence_length=16, warmup_steps=1, compute_dtype="float32")
    return config
"""


class Parts:
    """Good parts, each made at first use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._texts: dict[str, list[list[int]]] = {}

    @functools.cached_property
    def huggingface(self) -> Path:
        """A folder of Hugging Face transformers."""
        return self._copy(RECORDED / VARIANT, "huggingface")

    @functools.cached_property
    def sharded(self) -> Path:
        """The same model in several files with an index."""
        from lsjax.io.huggingface import write_huggingface

        folder = self.folder / "sharded"
        folder.mkdir()
        write_huggingface(folder, self.model.config, self.model.params, self.model.tokenizer, shard_bytes=20_000)
        return folder

    @functools.cached_property
    def gguf(self) -> Path:
        """The same model as GGUF."""
        return write_gguf(self.folder / "model.gguf", VARIANT)

    @functools.cached_property
    def corpus(self) -> Path:
        """A folder of texts."""
        folder = self.folder / "corpus"
        folder.mkdir()
        for index in range(12):
            (folder / f"{index}.txt").write_text(f"line {index}: the quick brown fox jumps over it\n" * 30)
        return folder

    @functools.cached_property
    def config(self) -> Config:
        """A run of a second or two."""
        config = Config(model=dataclasses.replace(TINY, num_layers=2, width=16, feed_forward_width=24, num_heads=2))
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_kv_heads=1),
            layerskip=dataclasses.replace(config.layerskip, exit_rotation=2),
            data=dataclasses.replace(config.data, corpus=str(self.corpus), held_out_fraction=0.3),
            training=dataclasses.replace(
                config.training, total_steps=4, batch_size=8, sequence_length=16, warmup_steps=1, log_every_steps=1,
                loss_chunk=64, compute_dtype="float32",
            ),
            checkpoint=dataclasses.replace(config.checkpoint, every_steps=2),
            evaluation=dataclasses.replace(config.evaluation, every_steps=4, max_batches=1),
        )  # fmt: skip

    @functools.cached_property
    def workdir(self) -> Path:
        """A finished run."""
        workdir = self.folder / "workdir"
        lsjax.train(self.config, workdir, verbose=False)
        return workdir

    @functools.cached_property
    def half_done(self) -> Path:
        """The same run as its checkpoint of step 2 left it."""
        folder = self._copy(self.workdir, "half_done")
        shutil.rmtree(folder / "checkpoints" / "4")
        return folder

    @functools.cached_property
    def trained(self) -> lsjax.Model:
        return lsjax.load(self.workdir)

    @functools.cached_property
    def prompts(self) -> Path:
        """A file of prompts."""
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def main():", "import os", "x = 1")))
        return path

    @functools.cached_property
    def model(self) -> lsjax.Model:
        return lsjax.load(self.huggingface)

    def make_all(self) -> None:
        """Makes every part, so that none is made, or fails to be made, inside an input."""
        assert self.texts()
        assert all(path.exists() for path in (self.sharded, self.gguf, self.half_done, self.prompts))
        assert self.trained.step == 4

    def texts(self, **settings) -> list[list[int]]:
        """Returns the tokens that `generate` gives for good arguments."""
        key = repr(sorted(settings.items()))
        if key not in self._texts:
            arguments = {"prompts": [PROMPT], "max_new_tokens": NEW_TOKENS} | settings
            self._texts[key] = lsjax.generate(self.model, **arguments).tokens
        return self._texts[key]

    def _copy(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.folder / name))


def check_model(model: lsjax.Model) -> None:
    """Fails unless a model's parameters have the shapes of its config and are finite, and it says tokens that exist."""
    for leaf in jax.tree.leaves(model.params):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), "the model has parameters that are not finite"
    tokens = lsjax.generate(model, [[1, 2, 3]], 3).tokens[0]
    assert 1 <= len(tokens) <= 3
    assert all(0 <= token < model.config.vocab_size for token in tokens)
    logits = np.asarray(lsjax.forward(model.params, np.array([[1, 2, 3]]), model.config))
    assert np.isfinite(logits).all(), "the model's logits are not finite"


def same_params(a: dict, b: dict) -> bool:
    """Returns whether two trees of parameters are equal, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
