"""Evaluates a model task by task: how good its texts are, and how fast each strategy writes them.

On functions of the standard library (no download) and on HumanEval (the extra eval):

  lsjax evaluate --model=runs/demo --tasks=docstrings,held_out_text \\
    --strategies=early_exit:2,self_speculative:2:4,auto
  lsjax evaluate --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --tasks=human_eval --allow_code_execution --report=report.json

On your files, in the format in which the data set is published, or with a prompt and a reference per line:

  lsjax evaluate --model=runs/demo \\
    --tasks=xsum:data/xsum,gsm8k:test.jsonl
  lsjax evaluate --model=runs/demo --tasks=custom:mine.jsonl:rougeL

Decoding is greedy. Autoregressive decoding always runs, because speed-up and equal texts compare with it. The
strategies take turns, batch by batch, so that a change of the machine's load hits all alike. In float32, a
self-speculative text that is not the autoregressive one ends the command with status 1.

With --report, an interrupted evaluation goes on where it stopped, and further tasks and strategies join the same file.
"""

import sys

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError

_INEXACT = 1


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to evaluate")
    shared.define_model(flags)
    flags.comma_list(
        "tasks",
        "docstrings",
        "docstrings[:FILE], human_eval[:FILE], held_out_text[:FILE], cnn_dm:PATH, xsum:PATH, topv2:PATH, gsm8k:PATH, "
        "custom:FILE.jsonl[:METRIC].",
    )
    flags.comma_list(
        "strategies",
        "autoregressive",
        "autoregressive, early_exit:E, self_speculative:E:d (d drafts per round), or E:d:k (among the k most frequent "
        "tokens), either followed by :int8 (drafts in int8), auto.",
    )
    flags.integer("num_examples", None, "Examples per task, chosen by the seed (default: all).", at_least=1)
    flags.integer("num_shots", None, "Solved examples in a prompt (default: cnn_dm 1, gsm8k 5, others 0).", at_least=0)
    flags.integer("max_new_tokens", None, "Most tokens per example (default: each task's own).", at_least=1)
    flags.integer("batch_size", 1, "Examples decoded side by side.", at_least=1)
    flags.integer("seed", 0, "Seed of the choice of examples and of the confidence intervals.", at_least=0)
    flags.switch(
        "allow_code_execution", "Run what the model writes for human_eval, in a sandbox: pass@1 in place of ROUGE."
    )
    flags.group("Hardware")
    shared.define_hardware(flags)
    flags.group("Output")
    flags.path("report", None, "Write the results to this JSON file, or continue those that it holds.")


def main(arguments: Arguments) -> int | None:
    """Runs the command. Returns 1 when self-speculation in float32 is not exact."""
    from lsjax.evaluation.tasks.parse import FEW_SHOT, parse_task
    from lsjax.files import check_writable, own_results, path_of

    report_path = path_of(arguments.report) if arguments.report else None
    if report_path:
        check_writable(report_path, "--report")
    names = list(dict.fromkeys(arguments.tasks))
    if not names:
        raise UserError("--tasks is empty: name at least one task (see --help)")
    kinds = {name.partition(":")[0] for name in names}
    if "human_eval" not in kinds:
        arguments.refuse(["allow_code_execution"], "it belongs to the task human_eval")
    if not kinds & set(FEW_SHOT):
        arguments.refuse(["num_shots"], f"it belongs to the tasks {', '.join(FEW_SHOT)}")
    tasks = {name: parse_task(name, arguments.num_shots, arguments.allow_code_execution) for name in names}

    from lsjax.benchmarks.quality import InexactError
    from lsjax.experiments.evaluation import EvaluationConfig, evaluate
    from lsjax.reports.evaluation import evaluation_table
    from lsjax.reports.tables import print_table

    config = EvaluationConfig(
        num_examples=arguments.num_examples,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    flags = {name: getattr(arguments, name) for name in ("num_shots", "allow_code_execution")}
    model = shared.load_model(arguments)
    try:
        report = evaluate(model, tasks, arguments.strategies, config, report_path, _note, settings=flags)
    except InexactError as error:
        print(f"lsjax evaluate: {error}", file=sys.stderr)
        return _INEXACT
    with own_results(report_path or path_of("the report")):  # rows of an earlier evaluation may be damaged
        table = evaluation_table(report)
    print_table(table)
    if report_path:
        print(f"report: {report_path}")
    return None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
