"""Times the training step of a configuration on this machine, beside the same step in PyTorch if you like.

  python launch/benchmark_training.py --config=configs/demo.py
  python launch/benchmark_training.py --config=configs/demo.py --compare=pytorch           # needs lsjax[parity]
  python launch/benchmark_training.py --config=configs/demo.py --compare=pytorch,compiled  # torch.compile as well
  python launch/benchmark_training.py --config=configs/demo.py --config.training.rematerialize=layer

Random parameters and random words, on one device: no corpus is read and nothing is kept. PyTorch takes the Llama of
transformers (its attention by scaled_dot_product_attention), AdamW fused, the same weights, batches, dropped layers,
exits and learning rates, on the CPU: in float32, or where our products are of bfloat16 by its own mixed precision,
which rounds attention and logits too (--config.training.compute_dtype says which). All take each step in turns; "loss"
of the first step and of the last say that it is the same step: they agree to rounding, which training then magnifies.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lsjax import commands
from lsjax.errors import UserError

RIVALS = ("pytorch", "compiled")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/demo.py.", lock_config=True
)
STEPS = flags.DEFINE_integer("steps", 24, "Steps to time.", lower_bound=1)
WARMUP = flags.DEFINE_integer(
    "warmup", 8, "Steps before them that are not timed; the first ones compile.", lower_bound=1
)
COMPARE = flags.DEFINE_list("compare", [], f"Beside ours: {', '.join(RIVALS)} (PyTorch by torch.compile), or both.")
REPORT = flags.DEFINE_string("report", None, "Write every step's seconds and loss to this JSON file.")
flags.mark_flags_as_required(["config"])


def main() -> None:
    from lsjax.evaluation.tables import print_table, training_table
    from lsjax.files import check_writable, write_atomically
    from lsjax.training.benchmark import benchmark_training

    config = commands.read_config(CONFIG)
    unknown = [name for name in COMPARE.value if name not in RIVALS]
    if unknown:
        raise UserError(f"--compare: {unknown[0]!r} is not one of {', '.join(RIVALS)}")
    if REPORT.value:
        check_writable(Path(REPORT.value), "--report")
    report = benchmark_training(config, STEPS.value, WARMUP.value, lambda params: _rivals(config, params))
    print_table(training_table(report))
    if REPORT.value:
        write_atomically(Path(REPORT.value), json.dumps(report, indent=2))
        print(f"report: {REPORT.value}")


def _rivals(config, params) -> dict:
    from lsjax.training.rivals import TorchTraining

    return {name: TorchTraining(config, params, compiled=name == "compiled").step for name in COMPARE.value}


if __name__ == "__main__":
    commands.run(main)
