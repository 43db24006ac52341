"""Measures that loading needs little more memory than the parameters."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import train_tokenizer
from lsjax.io.convert import convert
from lsjax.io.huggingface import write_huggingface
from lsjax.model.transformer import abstract_params

pytestmark = pytest.mark.slow

# Runs in a fresh process and measures `load` alone: VmHWM is the peak resident memory of a process.
PROGRAM = """
import jax, sys
import lsjax

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

lsjax.load, lsjax.generate, lsjax.train  # public names load lazily: their libraries are no part of a model
jax.block_until_ready(jax.numpy.ones(8))
before = kilobytes("VmRSS")
model = lsjax.load(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(model.params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(size, (kilobytes("VmHWM") - before) * 1024 / size)
"""

LARGE = ModelConfig(
    num_layers=6,
    width=1536,
    num_heads=12,
    num_kv_heads=4,
    head_width=128,
    feed_forward_width=6144,
    vocab_size=32000,
    tie_embeddings=False,
)

DECODING = """
import jax, sys
import lsjax

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

lsjax.load, lsjax.generate, lsjax.train  # public names load lazily: their libraries are no part of a model
jax.block_until_ready(jax.numpy.ones(8))
before = kilobytes("VmRSS")
model = lsjax.load(sys.argv[1], for_decoding=True, weights=sys.argv[2] or None)
jax.block_until_ready(model.decoder_weights())
if not sys.argv[2]:
    lsjax.generate(model, [[1, 2, 3]], 2)
print((kilobytes("VmHWM") - before) * 1024)
"""


def write_ones(folder, dtype):
    ones = jax.tree.map(lambda a: np.ones(a.shape, jax.numpy.dtype(dtype)), abstract_params(LARGE))
    write_huggingface(folder, LARGE, ones, train_tokenizer(["text"], 300), shard_bytes=10**9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "stored")])
def test_peak_memory_is_below_1_3_times_the_parameters(folders, stored, wanted, tmp_path):
    folder = folders["huggingface"]
    if stored == "bfloat16":
        folder = tmp_path
        write_ones(folder, stored)
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder, wanted], capture_output=True, text=True, check=True)
    size, ratio = done.stdout.split()
    assert int(size) > 10**9
    assert 1.0 <= float(ratio) < 1.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Writes the same float32 model as a Hugging Face folder and as a workdir."""
    folder, run = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("run")
    write_ones(folder, "float32")
    convert(folder, run / "model", "lsjax")
    return {"huggingface": folder, "workdir": run / "model"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "weights", "most"), [("huggingface", "", 1.25), ("workdir", "", 1.5), ("huggingface", "int8", 0.75)]
)
def test_a_model_for_decoding_is_held_once(folders, kind, weights, most):
    """Loads the model and, in float32, decodes with it. XLA:CPU first expands int8 weights to float32.

    A checkpoint needs more than safetensors: TensorStore checks the CRC-32C of a whole chunk before it copies it out,
    and a chunk is an array, so one or two of the largest arrays (0.17 of this model each) are held twice for a moment.
    """
    command = [sys.executable, "-c", DECODING, folders[kind], weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(LARGE)))
    assert 0.3 * whole < int(done.stdout) < most * whole
