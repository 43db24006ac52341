"""Decodes with a trained model and reports speed: autoregressive, early exit, self-speculative.

On text that the run held out, or on a prompt of yours:

  python launch/decode.py --model=runs/demo --exit_layer=2 --num_speculations=4 --report=report.json
  python launch/decode.py --model=runs/demo --prompt="def main():"
  python launch/decode.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt="What is the capital of France?"
  python launch/decode.py --model=runs/demo --prompt="import os" --temperature=0.8 --top_p=0.95 --seed=1
  python launch/decode.py --model=runs/demo --exit_layer=2 --num_speculations=4 --lookup=8
  python launch/decode.py --model=runs/demo --compare=transformers
  python launch/decode.py --model=runs/demo --prompt="def main():" --stop="class " --stop=$'\n\n'
  python launch/decode.py --model=runs/demo --exit_layer=2 --draft_weights=int8
  python launch/decode.py --model=runs/demo --exit_layer=2 --cache=int8

The best setting, predicted from one decoding of the prompts and a few timings, or found by measuring a grid:

  python launch/decode.py --model=runs/demo --exit_layer=auto --num_speculations=auto
  python launch/decode.py --model=runs/demo --sweep=runs/demo/sweep

Times never include compilation, repeats of the strategies are interleaved, and speeds are medians over the
prompts. `speed-up` is against this run's own autoregressive decoding of the same prompts, and "same tokens" says
whether the tokens are exactly its tokens: always so for greedy self_speculative in float32 (with --cache=int8 all but
always: a difference in the last bit may round an entry to the next value).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lsjax import commands
from lsjax.errors import UserError

NAMES = ("autoregressive", "early_exit", "self_speculative")
MODEL = flags.DEFINE_string("model", None, "Training workdir, Hugging Face folder or GGUF file.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt; its continuations are printed.")
PROMPTS = flags.DEFINE_string("prompts", None, 'A .jsonl file of {"prompt": TEXT} lines.')
CHAT = flags.DEFINE_bool("chat", False, "Put each prompt into the model's chat template, as a user's message.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 8, "Held-out prompts to take when none are given.", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "Length of the held-out prompts.", lower_bound=1)
STRATEGIES = flags.DEFINE_list("strategies", ",".join(NAMES), f"Which of {', '.join(NAMES)} to run.")
EXIT_LAYER = commands.define_number_or_auto(
    "exit_layer", None, "E: layers that draft (default: a quarter of them), or auto: those predicted to be fastest."
)
NUM_SPECULATIONS = commands.define_number_or_auto("num_speculations", 4, "d: tokens drafted a round, or auto.")
LOOKUP = flags.DEFINE_integer(
    "lookup", 0, "Also self_speculative that copies so many drafts where the text repeats itself; d may then be 0."
)
SWEEP = flags.DEFINE_string("sweep", None, "Measure a grid of settings; leave sweep.csv and sweep.png in this folder.")
SWEEP_EXIT_LAYERS = flags.DEFINE_list("sweep_exit_layers", None, "Exit layers of the grid (default: four up to L/2).")
SWEEP_NUM_SPECULATIONS = flags.DEFINE_list("sweep_num_speculations", "1,2,3,4,6,8", "Draft lengths of the grid.")
WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "Round the weights to int8: another model, half the bytes.")
DRAFT_WEIGHTS = flags.DEFINE_enum(
    "draft_weights", None, ["int8"], "Draft with int8 copies of the early layers; all layers verify, as they are."
)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices to split the model over (tensor parallelism).")
KERNELS = flags.DEFINE_enum(
    "kernels", "auto", ["auto", "on", "off"], "Pallas kernels for the KV cache; auto: where they move fewer bytes."
)
CACHE = flags.DEFINE_enum(
    "cache",
    "auto",
    ["auto", "int8"],
    "KV cache in the type that is computed with, or in int8: half of bfloat16's bytes.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 1, "Prompts decoded side by side; one that is done makes room for the next."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate for each prompt.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy; above, tokens are drawn.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sampling: only the k likeliest tokens (0: all).")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sampling: only the fewest tokens that together have this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Sampling: other seeds draw other texts.", lower_bound=0)
STOP = flags.DEFINE_multi_string(
    "stop", [], "A text that ends a continuation, just before it; may be given repeatedly."
)
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each prompt and strategy.")
COMPARE = flags.DEFINE_enum("compare", None, ["transformers"], "Also decode with PyTorch transformers: same weights.")
REPORT = flags.DEFINE_string("report", None, "Write the results to this JSON file.")


def main() -> None:
    from lsjax.files import check_writable, write_atomically
    from lsjax.loading import load

    if REPORT.value:
        check_writable(Path(REPORT.value), "--report")
    if DRAFT_WEIGHTS.value and (WEIGHTS.value or SWEEP.value):
        raise UserError("--draft_weights goes with neither --weights (its drafts are in int8 already) nor --sweep")
    if COMPARE.value and (WEIGHTS.value or CACHE.value == "int8"):
        raise UserError("--compare is of the same model: leave --weights and --cache away")
    held = {"for_decoding": True, "weights": WEIGHTS.value, "cache": CACHE.value}
    model = load(MODEL.value, tensor=TENSOR.value, kernels=KERNELS.value, **held)
    report = _sweep(model) if SWEEP.value else _compare(model)
    if REPORT.value:
        write_atomically(Path(REPORT.value), json.dumps(report, indent=2))
        print(f"report: {REPORT.value}")


def _compare(model) -> dict:
    from lsjax.decoding.benchmark import benchmark
    from lsjax.evaluation.tables import bandwidth_line, decoding_table, print_table

    prompts, common = _prompts(model), _settings()
    tuning = _tuning(model, prompts)
    strategies = _strategies(model.config.num_layers, tuning, STRATEGIES.value)
    beside = {"tuning": tuning, "rivals": _rivals(model, tuning), "stop": STOP.value}
    report = benchmark(model, prompts, strategies, repeats=REPEATS.value, **beside, **common)
    print_table(decoding_table(report))
    print(bandwidth_line(report))
    if tuning:
        print(tuning)
    if PROMPT.value:
        _print_texts(model, strategies)
    return report


def _sweep(model) -> dict:
    from lsjax.evaluation.tables import decoding_table, print_table
    from lsjax.sweep import Grid, default_exit_layers, summary, sweep

    if EXIT_LAYER.present or NUM_SPECULATIONS.present or STRATEGIES.present:
        raise UserError("--sweep takes --sweep_exit_layers and --sweep_num_speculations, not a single setting")
    if LOOKUP.value:
        raise UserError("--sweep measures drafts of the early layers alone: leave --lookup away")
    if STOP.value or COMPARE.value:
        raise UserError("--sweep measures full lengths of our own settings: leave --stop and --compare away")
    given = SWEEP_EXIT_LAYERS.value
    exits = commands.integers(SWEEP_EXIT_LAYERS) if given else default_exit_layers(model.config.num_layers)
    grid = Grid(exits, commands.integers(SWEEP_NUM_SPECULATIONS))
    report = sweep(model, _prompts(model), grid, SWEEP.value, repeats=REPEATS.value, **_settings())
    print_table(decoding_table(report))
    print(summary(report))
    print(f"table: {SWEEP.value}/sweep.csv   picture: {SWEEP.value}/sweep.png")
    return report


def _settings() -> dict:
    return {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "batch_size": BATCH_SIZE.value,
        "sampling": _sampling(),
        "seed": SEED.value,
        "note": print,
    }


def _tuning(model, prompts):
    """What to put for "auto"; None when nothing is."""
    from lsjax.decoding.strategies import AUTO, SelfSpeculative
    from lsjax.decoding.tuning import tune

    if AUTO not in (EXIT_LAYER.value, NUM_SPECULATIONS.value):
        return None
    if "self_speculative" not in STRATEGIES.value:
        raise UserError("auto is a choice for self_speculative: put it into --strategies, or give a number")
    strategy = SelfSpeculative(_exit_layer(model.config.num_layers), NUM_SPECULATIONS.value, DRAFT_WEIGHTS.value)
    return tune(model, prompts, strategy=strategy, **_settings())


def _prompts(model) -> list:
    from lsjax.prompts import held_out_prompts, read_prompts

    if PROMPT.value is not None and PROMPTS.value is not None:
        raise UserError("give --prompt or --prompts, not both")
    if PROMPT.value is not None or PROMPTS.value is not None:
        texts = [PROMPT.value] if PROMPT.value is not None else read_prompts(Path(PROMPTS.value))
        return [_in_template(model, text) for text in texts] if CHAT.value else texts
    if CHAT.value:
        raise UserError("--chat needs --prompt or --prompts")
    return held_out_prompts(Path(MODEL.value), NUM_PROMPTS.value, PROMPT_TOKENS.value)


def _in_template(model, text: str) -> list[int]:
    return model.tokenizer.encode_chat([{"role": "user", "content": text}])


def _exit_layer(num_layers: int) -> int | str:
    return EXIT_LAYER.value if EXIT_LAYER.value is not None else max(1, num_layers // 4)


def _drafting(num_layers: int, tuning):
    from lsjax.decoding.strategies import SelfSpeculative

    given = _exit_layer(num_layers), NUM_SPECULATIONS.value, DRAFT_WEIGHTS.value
    return tuning.strategy if tuning else SelfSpeculative(*given)


def _strategies(num_layers: int, tuning, names: Sequence[str]) -> list:
    from lsjax.decoding.strategies import Autoregressive, EarlyExit

    drafting = _drafting(num_layers, tuning)
    makers = {
        "autoregressive": lambda: Autoregressive(),
        "early_exit": lambda: EarlyExit(drafting.exit_layer),
        "self_speculative": lambda: drafting,
    }
    unknown = [name for name in names if name not in makers]
    if unknown or not names:
        raise UserError(f"--strategies: {unknown[0] if unknown else 'empty'!r} is not one of {', '.join(NAMES)}")
    for flag in (LOOKUP, DRAFT_WEIGHTS):
        if flag.value and "self_speculative" not in names:
            raise UserError(f"--{flag.name} is a setting of self_speculative: put it into --strategies")
    if not LOOKUP.value:
        return [makers[name]() for name in names]
    copying = dataclasses.replace(drafting, lookup=LOOKUP.value)
    return [*(makers[name]() for name in names if name != "self_speculative" or drafting.num_speculations), copying]


def _rivals(model, tuning):
    """What to measure beside our own strategies."""
    if not COMPARE.value:
        return lambda _: []
    if TEMPERATURE.value:
        raise UserError("--compare is for greedy decoding: leave --temperature at 0")
    if STOP.value:
        raise UserError("--compare knows no --stop: give one or the other")
    if not NUM_SPECULATIONS.value:
        raise UserError("--compare drafts with the early layers: it needs --num_speculations of at least 1")
    from lsjax.decoding.rivals import TransformersModel, TransformersTrial, ways

    speculative = _drafting(model.config.num_layers, tuning)
    known = ways(speculative.exit_layer, speculative.num_speculations, BATCH_SIZE.value)
    theirs = TransformersModel(model)
    return lambda batches: [TransformersTrial(theirs, way, batches) for way in known]


def _sampling():
    from lsjax.decoding.strategies import Sampling

    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)


def _print_texts(model, strategies: list) -> None:
    from lsjax.decoding.generate import generate
    from lsjax.decoding.strategies import label

    gap = "\n" if CHAT.value else ""
    for strategy in strategies:
        how = (strategy, _sampling(), SEED.value, STOP.value)
        text = generate(model, _prompts(model), MAX_NEW_TOKENS.value, *how).text[0]
        print(f"\n--- {label(strategy)}\n{PROMPT.value}{gap}{text}")


if __name__ == "__main__":
    commands.run(main)
