"""Fine-tunes python-20m, which ships, with LayerSkip on a task: from a function to the first line of its docstring.

  python examples/docstrings/build.py --output=runs/docstrings
  python launch/train.py --config=configs/finetune_docstrings.py --workdir=runs/finetune_docstrings
  lsjax evaluate --model=runs/finetune_docstrings --tasks=docstrings:runs/docstrings/test.jsonl \\
    --strategies=self_speculative:4:3

Run: 240 steps of 4,096 tokens, about 2 epochs; only the docstrings are learned; learning rate 5e-4.
Hardware: 2 CPU cores, 6 GB of memory.
Time: about 15 minutes, reckoned from 1,500 tokens per second.
Expected: on 60 of the tests, ROUGE-L 0.118 (0.021 before); 62 % of 3 drafts are accepted (7 % before), and decoding is
  1.25 times as fast as autoregressive decoding (docs/results.md, "Fine-tuned on a task").
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.initial_model = "python-20m"
    config.model.update(LLAMAS["python_20m"].to_dict())
    config.data.update(corpus="runs/docstrings/train.jsonl", format="completion")

    config.layerskip.update(dropout_max_rate=0.0, exit_curriculum="none", exit_scale=0.0, exits_train_head=False)
    config.layerskip.update(draft_exit=4, exit_weight_floor=0.3, exit_distillation=4.0)

    config.training.update(total_steps=240, batch_size=8, sequence_length=512, learning_rate=5e-4, warmup_steps=20)
    config.training.update(rematerialize="elementwise", scan_unroll=12)
    config.evaluation.every_steps = 60
    config.checkpoint.every_steps = 60
    return config
