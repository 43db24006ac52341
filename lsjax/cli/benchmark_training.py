"""Times the training step of a configuration on this machine, beside the same step in PyTorch if you like.

  lsjax benchmark_training --config=scratch
  lsjax benchmark_training --config=scratch \\
    --compare=pytorch,compiled
  lsjax benchmark_training --config=scratch \\
    --config.training.rematerialize=layer
  lsjax benchmark_training --config=scratch \\
    --config.training.lora_rank=16 --compare=full

Random parameters and random words, on one device: no corpus is read and nothing is kept. All take each step in turns.

--compare=pytorch takes the Llama of transformers (its attention by scaled_dot_product_attention) with fused AdamW, on
the CPU; compiled is the same by torch.compile. Both need PyTorch and transformers: `make parity` installs them. They
get the same weights, batches, dropped layers, exits and learning rates. They compute in float32, or where our products
are in bfloat16 by PyTorch's own mixed precision, which rounds attention and logits too (--config.training.compute_dtype
says which). The losses of the first and of the last step show that it is the same step: they agree up to rounding,
which training then magnifies.

--compare=full is our own step with every parameter trained, beside LoRA or frozen parameters.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError

if TYPE_CHECKING:
    from lsjax.config import Config

_TORCH = ("pytorch", "compiled")
_BASELINES = (*_TORCH, "full")


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to time")
    flags.config()
    flags.integer("steps", 24, "Steps to time.", at_least=1)
    flags.integer("warmup", 8, "Steps before them that are not timed; the first ones compile.", at_least=1)
    flags.comma_list("compare", "", "Also time one or more of pytorch, compiled (PyTorch by torch.compile) and full.")
    flags.group("Output")
    flags.path("report", None, "Write every step's seconds and loss to this JSON file.")


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from lsjax.benchmarks.training import benchmark_training
    from lsjax.files import check_report, path_of, write_atomically
    from lsjax.reports.tables import print_table, training_table

    config = arguments.read_config()
    unknown = [name for name in arguments.compare if name not in _BASELINES]
    if unknown:
        raise UserError(f"--compare: {unknown[0]!r} is not one of {', '.join(_BASELINES)}")
    check_report(arguments.report, "runs")

    variants = {"full": _full(config)} if "full" in arguments.compare else {}
    torch_names = [name for name in arguments.compare if name in _TORCH]

    def make_baselines(params: Any) -> dict[str, Any]:
        return _make_baselines(config, params, torch_names) if torch_names else {}

    report = benchmark_training(config, arguments.steps, arguments.warmup, make_baselines, variants, print)
    print_table(training_table(report))
    if arguments.report:
        write_atomically(path_of(arguments.report), json.dumps(report, indent=2))
        print(f"report: {arguments.report}")


def _full(config: "Config") -> "Config":
    """Returns the configuration with every parameter trained. Raises UserError where they are trained already."""
    if not config.training.lora_rank and not config.training.frozen:
        raise UserError("--compare=full: this configuration trains everything; set --config.training.lora_rank")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, lora_rank=0, frozen=""))


def _make_baselines(config: "Config", params: Any, names: list[str]) -> dict[str, Any]:
    """Returns the training step of each named baseline, started from `params`."""
    from lsjax.benchmarks.torch_baseline import TorchTraining

    return {name: TorchTraining(config, params, compiled=name == "compiled").step for name in names}
