"""Trains the plain model that ships, python-20m, on Python source, on a laptop: no layer dropout, no early exits.

  python examples/python_corpus/build.py --output=runs/python_corpus
  python launch/prepare.py --config=configs/python_20m.py --workdir=runs/python_20m
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
    python launch/train.py --config=configs/python_20m.py --workdir=runs/python_20m

Run: 1,100 steps of 4,096 tokens; learning rate 1.5e-3.
Hardware: 2 CPU cores with AMX (bfloat16 products), 6 GB of memory.
Time: about 50 minutes (1,500 to 1,650 tokens per second).
Expected: held-out loss 3.67 nats per token at the last layer, 5.44 at exit layer 4, 5.79 at the first.
Longer: --config.training.total_steps=7500, which is 31 million tokens, gives a better model.
Data: 382 MB of source from 112 packages of PyPI under permissive licences (examples/python_corpus), without the
  standard library, so that `make demo` can read that as text it has not seen.
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["python_20m"].to_dict())

    config.layerskip.dropout_max_rate = 0.0
    config.layerskip.exit_curriculum = "none"

    config.data.corpus = "runs/python_corpus/corpus.jsonl"
    config.training.total_steps = 1100
    config.training.batch_size = 8
    config.training.sequence_length = 512
    config.training.learning_rate = 1.5e-3
    config.training.warmup_steps = 100
    config.training.rematerialize = "elementwise"
    config.training.scan_unroll = 12

    config.evaluation.every_steps = 250
    config.evaluation.max_batches = 12
    config.checkpoint.every_steps = 100
    return config
