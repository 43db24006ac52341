"""Compiles a configuration's real programs for hardware that is not there, on any machine.

Says whether they fit (exit status 1 when one does not), what each device holds, what the devices send each other, and
the time and model FLOPs utilisation that the hardware's peaks allow. These are bounds, not predictions.

  lsjax compile_ahead --config=pretrain_7b \\
    --topology=tpu:v5p:4x4x4
  lsjax compile_ahead --config=pretrain_7b \\
    --topology=gpu:h100:8x8 --report=report.json
  lsjax compile_ahead --config=pretrain_7b \\
    --topology=gpu:a100-80:4x8 --search
  lsjax compile_ahead --config=pretrain_7b \\
    --topology=gpu:h100:8 --program=decode --config.mesh.tensor=8 \\
    --exit_layer=8 --num_speculations=6

Topologies: tpu:v4 and tpu:v5p with three sizes (chips along each axis), tpu:v5e and tpu:v6e with two; gpu:a100-40,
gpu:a100-80, gpu:h100 and gpu:h200 with hosts x GPUs per host. The compilers are the extra "ahead": `make ahead`, or pip
install 'lsjax[ahead]'.
"""

import json
from typing import TYPE_CHECKING, Any

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError

if TYPE_CHECKING:
    from lsjax.aot.programs import LoweredProgram
    from lsjax.config import Config
    from lsjax.costs.hardware import Topology

_PROGRAMS = ("train", "evaluation", "decode", "autoregressive", "early_exit", "self_speculative")
_DECODING_FLAGS = (
    "exit_layer", "num_speculations", "weights", "draft_weights", "batch_size", "prompt_tokens", "max_new_tokens",
    "kernels", "cache",
)  # fmt: skip


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to compile")
    flags.config()
    flags.text("topology", None, "CHIP:SIZE, such as tpu:v5p:4x4x4 or gpu:h100:8x8.", required=True)
    flags.choice("program", "train", _PROGRAMS, "The program; decode is the last three and their prefill.")
    flags.switch("search", "Try batch sizes and rematerialisation up to the fastest training step that fits.")
    flags.group("Decoding programs")
    flags.integer("exit_layer", None, "E (default: config.layerskip.draft_exit, else a quarter of the layers).")
    flags.integer("num_speculations", 4, "d: tokens drafted per round.")
    flags.choice("weights", None, ["int8"], "Weights in int8 instead of bfloat16.")
    flags.choice("draft_weights", None, ["int8"], "Drafts by int8 copies of the early layers.")
    flags.integer("batch_size", 1, "Prompts at a time.", at_least=1)
    flags.integer("prompt_tokens", 1024, "Tokens of a prompt.", at_least=1)
    flags.integer("max_new_tokens", 512, "Tokens to generate.", at_least=1)
    flags.choice(
        "kernels", "auto", ["auto", "on", "off"], "Pallas kernels for the KV cache; auto: where they move fewer bytes."
    )
    flags.choice("cache", "auto", ["auto", "int8"], "KV cache in bfloat16, or in int8 with scales.")
    flags.group("Output")
    flags.path("report", None, "Write the results to this JSON file.")


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 1 when a program does not fit."""
    from lsjax.aot import compile_only
    from lsjax.costs.hardware import parse_topology
    from lsjax.files import check_report, path_of, write_atomically

    config, topology = arguments.read_config(), parse_topology(arguments.topology)
    if arguments.search and arguments.program != "train":
        raise UserError("--search goes with --program=train")
    if arguments.program in ("train", "evaluation"):
        arguments.refuse(_DECODING_FLAGS, f"it is for decoding, and --program is {arguments.program}")
    check_report(arguments.report, "programs")
    compile_only.prepare()
    reports = _search(config, topology) if arguments.search else _compile(arguments, config, topology)
    for report in reports:
        _print_report(report)
    if arguments.report:
        write_atomically(
            path_of(arguments.report), json.dumps({"config": config.to_dict(), "programs": reports}, indent=2)
        )
        print(f"report: {arguments.report}")
    return 0 if all(report["fits"] for report in reports) else 1


def _print_report(report: dict[str, Any]) -> None:
    from lsjax.aot.report import summary_line, tables
    from lsjax.reports.tables import print_table

    for table in tables(report):
        print_table(table)
    if "problem" in report:
        print(report["problem"])
    print(summary_line(report), flush=True)
    if "why_not_more" in report:  # a search
        print(" ".join(f"--{key}={value}" for key, value in report["setting"].items()))
        print(f"not more: {report['why_not_more']}")


def _compile(arguments: Arguments, config: "Config", topology: "Topology") -> list[dict[str, Any]]:
    from lsjax.aot.programs import compile_ahead
    from lsjax.aot.report import describe

    reports = []
    for program in _programs(arguments, config, topology):
        print(f"compiling {program.name} for {topology}: {program.execution} ...", flush=True)
        reports.append(describe(config, topology, program, compile_ahead(program)))
    return reports


def _programs(arguments: Arguments, config: "Config", topology: "Topology") -> list["LoweredProgram"]:
    from lsjax.aot import programs
    from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative

    if arguments.program == "train":
        return [programs.train_program(config, topology)]
    if arguments.program == "evaluation":
        return [programs.evaluation_program(config, topology)]
    exit_layer = arguments.exit_layer
    if exit_layer is None:
        exit_layer = config.layerskip.draft_exit or max(1, config.model.num_layers // 4)
    drafting = SelfSpeculative(exit_layer, arguments.num_speculations, arguments.draft_weights)
    return [
        program
        for strategy in (Autoregressive(), EarlyExit(exit_layer), drafting)
        if arguments.program in ("decode", strategy.name)
        for program in programs.decode_programs(
            config,
            topology,
            strategy,
            batch_size=arguments.batch_size,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.max_new_tokens,
            int8_weights=arguments.weights == "int8",
            kernels=arguments.kernels,
            cache=arguments.cache,
        )
    ]


def _search(config: "Config", topology: "Topology") -> list[dict[str, Any]]:
    from lsjax.aot.search import search

    def note(line: str) -> None:
        print(line, flush=True)

    return [search(config, topology, note=note)]
