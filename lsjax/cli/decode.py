"""Benchmarks decoding with a trained model: autoregressive, early exit, self-speculative.

On text that the training run held out, or on prompts of yours:

  lsjax decode --model=runs/demo --exit_layer=2 --report=report.json
  lsjax decode --model=runs/demo --prompt="def main():" \\
    --stop="class "
  lsjax decode --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --chat --prompt="Hi!"
  lsjax decode --model=runs/demo --prompt="import os" \\
    --temperature=0.8
  lsjax decode --model=runs/demo --lookup=8 --compare=transformers
  lsjax decode --model=runs/demo --compare=transformers,llama_cpp
  lsjax decode --model=runs/demo --exit_layer=2 --draft_weights=int8

The best setting, predicted from one decoding of the prompts and a few timings, or found by measuring a grid:

  lsjax decode --model=runs/demo --exit_layer=auto \\
    --num_speculations=auto
  lsjax decode --model=runs/demo --sweep=runs/demo/sweep

Times never include compilation, repeats of the strategies are interleaved, and speeds are medians over the prompts.
"speed-up" compares with this run's own autoregressive decoding of the same prompts. "same tokens" says whether the
tokens are exactly its tokens; if not, it is the share of them before the first difference. Those of greedy
self_speculative in float32 always are; with --cache=int8 a difference in the last bit may, rarely, round an entry to
the next value.

To see or save texts without measuring, use generate.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError

if TYPE_CHECKING:
    from lsjax.benchmarks.decoding import MakeDecoders
    from lsjax.decoding.batch import Prompt
    from lsjax.decoding.model import Model
    from lsjax.decoding.strategies import SelfSpeculative, Strategy
    from lsjax.tuning.cost_model import Tuning

_BASELINES = ("transformers", "llama_cpp", "no_reuse")
_GRID_FLAGS = ("sweep_exit_layers", "sweep_num_speculations")


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to decode")
    shared.define_model_and_prompts(flags)
    shared.define_held_out_prompts(flags)
    flags.group("Strategy")
    flags.comma_list("strategies", ",".join(shared.STRATEGIES), "The strategies to run.")
    shared.define_setting(flags)
    flags.integer("batch_size", 1, "Prompts decoded side by side; one that ends makes room for the next.")
    flags.group("Sampling")
    shared.define_sampling(flags)
    flags.group("Hardware")
    shared.define_hardware(flags)
    flags.group("Measuring")
    flags.integer("repeats", 3, "Measurements of each prompt and strategy.")
    flags.comma_list(
        "compare",
        "",
        "Also decode the same weights with transformers (PyTorch) or llama_cpp, or verify drafts without reusing their "
        "states and cache entries (no_reuse); several are compared in one run.",
    )
    flags.path("sweep", None, "Measure a grid of settings; leave sweep.csv and sweep.png in this folder.")
    flags.comma_list("sweep_exit_layers", "", "Exit layers of the grid (default: four up to half of the layers).")
    flags.comma_list("sweep_num_speculations", "1,2,3,4,6,8", "Draft lengths of the grid.")
    flags.group("Output")
    flags.path("report", None, "Write the results to this JSON file.")


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from lsjax.files import check_report

    check_report(arguments.report, "runs")
    _check_combinations(arguments)
    lines = shared.given_prompts(arguments)
    texts = [shared.without_settings(line, "decode") for line in lines]
    model = shared.load_model(arguments)
    prompts = shared.make_prompts(arguments, model, texts) if texts else shared.held_out_prompts(arguments)
    if arguments.sweep:
        _write(arguments, _sweep(arguments, model, prompts))
    else:
        _compare(arguments, model, prompts)


def _check_combinations(arguments: Arguments) -> None:
    """Raises UserError for flags that contradict each other or have no effect together."""
    if arguments.draft_weights and (arguments.weights or arguments.sweep):
        raise UserError("--draft_weights goes with neither --weights (its drafts are in int8 already) nor --sweep")
    unknown = [name for name in arguments.compare if name not in _BASELINES]
    if unknown:
        raise UserError(f"--compare: {unknown[0]!r} is not one of {', '.join(_BASELINES)}")
    if arguments.compare and (arguments.weights or arguments.cache == "int8"):
        raise UserError("--compare is of the same model: leave --weights and --cache away")
    if "llama_cpp" in arguments.compare and arguments.batch_size > 1:
        raise UserError("--compare=llama_cpp decodes one prompt at a time: leave --batch_size at 1")
    if "no_reuse" in arguments.compare and arguments.draft_weights:
        raise UserError("--compare=no_reuse: drafts in int8 are never reused, so leave --draft_weights away")
    shared.check_held_out_prompts(arguments)
    if arguments.sweep:
        _check_sweep(arguments)
    else:
        arguments.refuse(_GRID_FLAGS, "it belongs to --sweep=FOLDER")
        _check_strategies(arguments)


def _check_sweep(arguments: Arguments) -> None:
    if arguments.given("exit_layer") or arguments.given("num_speculations") or arguments.given("strategies"):
        raise UserError("--sweep takes --sweep_exit_layers and --sweep_num_speculations, not a single setting")
    arguments.refuse(["lookup", "draft_vocabulary"], "--sweep measures plain drafts of the early layers")
    if arguments.stop or arguments.compare:
        raise UserError("--sweep measures full lengths of our own settings: leave --stop and --compare away")


def _check_strategies(arguments: Arguments) -> None:
    names = arguments.strategies
    unknown = [name for name in names if name not in shared.STRATEGIES]
    if unknown or not names:
        choices = ", ".join(shared.STRATEGIES)
        raise UserError(f"--strategies: {unknown[0] if unknown else 'empty'!r} is not one of {choices}")
    if "auto" in (arguments.exit_layer, arguments.num_speculations) and "self_speculative" not in names:
        raise UserError("auto is a choice for self_speculative: put it into --strategies, or give a number")
    drafting_baseline = {"transformers", "no_reuse"} & set(arguments.compare)
    for flag in shared.DRAFT_FLAGS:
        if arguments.given(flag) and "self_speculative" not in names and not drafting_baseline:
            raise UserError(f"--{flag} is a setting of self_speculative: put it into --strategies")
    if names == ["autoregressive"] and not drafting_baseline:
        arguments.refuse(["exit_layer"], "--strategies=autoregressive runs all layers")


def _compare(arguments: Arguments, model: "Model", prompts: Sequence["Prompt"]) -> None:
    from lsjax.benchmarks.decoding import benchmark
    from lsjax.reports.tables import bandwidth_line, print_decoding_report

    tuning = _tune(arguments, model, prompts)
    drafting = tuning.strategy if tuning else _drafting(arguments, model.config.num_layers)
    strategies = _strategies(arguments, drafting)
    baselines = _baselines(arguments, model, drafting)
    report = benchmark(
        model, prompts, strategies, tuning=tuning, baselines=baselines, stop=arguments.stop, **_settings(arguments)
    )
    if "llama_cpp" in arguments.compare:
        from lsjax.benchmarks.llama_cpp_baseline import describe_library

        report |= {"baseline": describe_library()}
    print_decoding_report(report)
    print(bandwidth_line(report))
    if tuning:
        print(tuning)
    _write(arguments, report)
    if arguments.prompt:
        _print_texts(arguments, model, prompts, strategies)


def _sweep(arguments: Arguments, model: "Model", prompts: Sequence["Prompt"]) -> dict[str, Any]:
    from lsjax.experiments.sweep import Grid, default_exit_layers, summary, sweep
    from lsjax.reports.tables import print_decoding_report

    exits = arguments.integers("sweep_exit_layers") or default_exit_layers(model.config.num_layers)
    grid = Grid(exits, arguments.integers("sweep_num_speculations"))
    report = sweep(model, prompts, grid, arguments.sweep, **_settings(arguments))
    print_decoding_report(report)
    print(summary(report))
    print(f"table: {arguments.sweep}/sweep.csv   picture: {arguments.sweep}/sweep.png")
    return report


def _settings(arguments: Arguments) -> dict[str, Any]:
    """Returns the keywords that `benchmark` and `sweep` share."""
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "sampling": shared.read_sampling(arguments),
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "note": print,
    }


def _drafting(arguments: Arguments, num_layers: int) -> "SelfSpeculative":
    """Returns the self-speculative strategy of the flags; "auto" stays "auto"."""
    from lsjax.decoding.strategies import SelfSpeculative

    exit_layer: Any = shared.choose_exit_layer(arguments, num_layers)
    return SelfSpeculative(
        exit_layer,
        arguments.num_speculations,
        arguments.draft_weights,
        draft_vocabulary=arguments.draft_vocabulary,
    )


def _tune(arguments: Arguments, model: "Model", prompts: Sequence["Prompt"]) -> "Tuning | None":
    """Finds what to put for "auto"; returns None when no setting is "auto"."""
    from lsjax.tuning.tune import tune

    strategy = _drafting(arguments, model.config.num_layers)
    if "auto" not in (strategy.exit_layer, strategy.num_speculations):
        return None
    settings = {name: value for name, value in _settings(arguments).items() if name != "repeats"}
    return tune(model, prompts, strategy=strategy, **settings)


def _strategies(arguments: Arguments, drafting: "SelfSpeculative") -> list["Strategy"]:
    """Returns the strategies to measure; with --lookup, self-speculation with and without it."""
    from lsjax.decoding.strategies import Autoregressive, EarlyExit

    chosen: list[Strategy] = []
    for name in arguments.strategies:
        if name == "autoregressive":
            chosen.append(Autoregressive())
        elif name == "early_exit":
            chosen.append(EarlyExit(int(drafting.exit_layer)))
        elif drafting.num_speculations or not arguments.lookup:
            chosen.append(drafting)
    return [*chosen, dataclasses.replace(drafting, lookup=arguments.lookup)] if arguments.lookup else chosen


def _baselines(arguments: Arguments, model: "Model", drafting: "SelfSpeculative") -> "MakeDecoders | None":
    """Returns a function that makes the decoders of --compare for some batches; None without --compare."""
    if not arguments.compare:
        return None
    if arguments.temperature:
        raise UserError("--compare is for greedy decoding: leave --temperature at 0")
    if arguments.stop:
        raise UserError("--compare knows no --stop: give one or the other")
    if set(arguments.compare) != {"llama_cpp"} and not arguments.num_speculations:
        raise UserError("--compare drafts with the early layers: it needs --num_speculations of at least 1")
    make = {"transformers": _transformers_decoders, "llama_cpp": _llama_cpp_decoders, "no_reuse": _no_reuse_decoders}
    makers = [make[name](model, drafting, arguments.batch_size) for name in dict.fromkeys(arguments.compare)]
    return lambda batches: [decoder for make_decoders in makers for decoder in make_decoders(batches)]


def _transformers_decoders(model: "Model", drafting: "SelfSpeculative", batch_size: int) -> "MakeDecoders":
    from lsjax.benchmarks.transformers_baseline import TransformersDecoder, TransformersModel, transformers_modes

    modes = transformers_modes(int(drafting.exit_layer), int(drafting.num_speculations), batch_size)
    theirs = TransformersModel(model)
    return lambda batches: [TransformersDecoder(theirs, mode, batches) for mode in modes]


def _llama_cpp_decoders(model: "Model", *_: Any) -> "MakeDecoders":
    from lsjax.benchmarks.llama_cpp_baseline import import_library, llama_cpp_decoders

    import_library()
    return lambda batches: llama_cpp_decoders(model, batches)


def _no_reuse_decoders(model: "Model", drafting: "SelfSpeculative", _: int) -> "MakeDecoders":
    from lsjax.benchmarks.decoding import StrategyDecoder

    return lambda batches: [StrategyDecoder(model, drafting, batches, reuse=False)]


def _write(arguments: Arguments, report: dict[str, Any]) -> None:
    from lsjax.files import path_of, write_atomically

    if arguments.report:
        write_atomically(path_of(arguments.report), json.dumps(report, indent=2))
        print(f"report: {arguments.report}")


def _print_texts(
    arguments: Arguments, model: "Model", prompts: Sequence["Prompt"], strategies: Sequence["Strategy"]
) -> None:
    from lsjax.decoding.strategies import label
    from lsjax.generation import generate

    gap = "\n" if arguments.chat else ""
    for strategy in strategies:
        result = generate(
            model,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            strategy=strategy,
            sampling=shared.read_sampling(arguments),
            seed=arguments.seed,
            stop=arguments.stop,
        )
        print(f"\n--- {label(strategy)}\n{arguments.prompt}{gap}{result.text[0]}")
