"""Compiles a configuration's real programs for hardware that is not there, on any machine.

Says whether they fit (exit status 1 when one does not), what each device holds, what the devices send each other, and
the time and model FLOPs utilisation that the hardware's peaks allow: bounds, not predictions.

  python launch/compile_ahead.py --config=configs/pretrain_7b.py --topology=tpu:v5p:4x4x4
  python launch/compile_ahead.py --config=configs/pretrain_7b.py --topology=gpu:h100:8x8 --report=report.json
  python launch/compile_ahead.py --config=configs/pretrain_7b.py --topology=gpu:a100-80:4x8 --search
  python launch/compile_ahead.py --config=configs/pretrain_7b.py --topology=gpu:h100:8 --program=decode \
    --config.mesh.tensor=8 --exit_layer=8 --num_speculations=6

Topologies: tpu:v4, tpu:v5p with three sizes (chips along each axis), tpu:v5e, tpu:v6e with two; gpu:a100-40,
gpu:a100-80, gpu:h100, gpu:h200 with hosts x GPUs a host. It needs: pip install 'lsjax[ahead]'.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lsjax import commands
from lsjax.errors import UserError

PROGRAMS = ("train", "evaluation", "decode", "autoregressive", "early_exit", "self_speculative")
CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/pretrain_7b.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SIZE, such as tpu:v5p:4x4x4 or gpu:h100:8x8.")
PROGRAM = flags.DEFINE_enum(
    "program", "train", PROGRAMS, "What to compile; decode is the last three and their prefill."
)
SEARCH = flags.DEFINE_bool("search", False, "Walk batch size and rematerialisation to the fastest step that fits.")
EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Decoding: E (default: a quarter of the layers).")
NUM_SPECULATIONS = flags.DEFINE_integer("num_speculations", 4, "Decoding: d, tokens drafted a round.")
WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "Decoding: weights in int8 instead of bfloat16.")
DRAFT_WEIGHTS = flags.DEFINE_enum("draft_weights", None, ["int8"], "Decoding: drafts by int8 copies of the layers.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Decoding: prompts at a time.", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 1024, "Decoding: tokens of a prompt.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Decoding: tokens to generate.", lower_bound=1)
KERNELS = flags.DEFINE_enum(
    "kernels",
    "auto",
    ["auto", "on", "off"],
    "Decoding: Pallas kernels for the KV cache; auto: where they move fewer bytes.",
)
CACHE = flags.DEFINE_enum("cache", "auto", ["auto", "int8"], "Decoding: KV cache in bfloat16, or in int8 with scales.")
REPORT = flags.DEFINE_string("report", None, "Write the results to this JSON file.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> int:
    from lsjax.evaluation.tables import print_table
    from lsjax.files import check_writable, write_atomically
    from lsjax.scale import compile_only
    from lsjax.scale.hardware import parse_topology
    from lsjax.scale.report import summary_line, tables

    config, topology = commands.read_config(CONFIG), parse_topology(TOPOLOGY.value)
    if REPORT.value:
        check_writable(Path(REPORT.value), "--report")
    compile_only.prepare()
    reports = _search(config, topology) if SEARCH.value else _compile(config, topology)
    for report in reports:
        for table in tables(report):
            print_table(table)
        if "problem" in report:
            print(report["problem"])
        print(summary_line(report), flush=True)
        if SEARCH.value:
            print(" ".join(f"--{key}={value}" for key, value in report["setting"].items()))
            print(f"not more: {report['why_not_more']}")
    if REPORT.value:
        write_atomically(Path(REPORT.value), json.dumps({"config": config.to_dict(), "programs": reports}, indent=2))
        print(f"report: {REPORT.value}")
    return 0 if all(report["fits"] for report in reports) else 1


def _compile(config, topology) -> list:
    from lsjax.scale.ahead import compile_ahead
    from lsjax.scale.report import describe

    reports = []
    for program in _programs(config, topology):
        print(f"compiling {program.name} for {topology}: {program.execution} ...", flush=True)
        reports.append(describe(config, topology, program, compile_ahead(program)))
    return reports


def _programs(config, topology) -> list:
    from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative
    from lsjax.scale import ahead

    if PROGRAM.value == "train":
        return [ahead.train_program(config, topology)]
    if PROGRAM.value == "evaluation":
        return [ahead.evaluation_program(config, topology)]
    exit_layer = EXIT_LAYER.value if EXIT_LAYER.value is not None else max(1, config.model.num_layers // 4)
    drafting = SelfSpeculative(exit_layer, NUM_SPECULATIONS.value, DRAFT_WEIGHTS.value)
    strategies = [Autoregressive(), EarlyExit(exit_layer), drafting]
    sizes = BATCH_SIZE.value, PROMPT_TOKENS.value, MAX_NEW_TOKENS.value
    how = {"in_int8": WEIGHTS.value == "int8", "kernels": KERNELS.value, "cache": CACHE.value}
    wanted = [s for s in strategies if PROGRAM.value in ("decode", s.name)]
    return [program for s in wanted for program in ahead.decode_programs(config, topology, s, *sizes, **how)]


def _search(config, topology) -> list:
    from lsjax.scale.search import search

    if PROGRAM.value != "train":
        raise UserError("--search goes with --program=train")
    return [search(config, topology, note=lambda line: print(line, flush=True))]


if __name__ == "__main__":
    commands.run(main)
