"""The table of an evaluation: a row per task and strategy, with intervals, in the order of the tasks."""

import io

from rich.console import Console

from lsjax.reports.evaluation import evaluation_table


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


def row(task, strategy, metric, figure, **others):
    default = {
        "task": task, "strategy": strategy, "decoded_by": strategy, "exit_layer": None, "num_speculations": None,
        "examples": 164, "metrics": {metric: figure, "other": None}, "acceptance_rate": None,
        "tokens_per_second": estimate(62.94, 60.0, 65.0), "speedup": estimate(1.0, 1.0, 1.0),
        "same_texts": estimate(1.0, 1.0, 1.0),
    }  # fmt: skip
    return default | others


def test_a_row_shows_every_figure_with_its_interval():
    chosen = {"decoded_by": "self_speculative", "exit_layer": 8, "num_speculations": 6}
    drafting = {"acceptance_rate": estimate(0.671, 0.65, 0.69), "speedup": estimate(1.83, 1.75, 1.9)}
    report = {
        "settings": {"model": "runs/[b]", "device": "cpu", "batch_size": 1, "weights": "float32"},
        "rows": [
            row("human_eval", "autoregressive", "pass@1", estimate(0.041, 0.01, 0.07)),
            row("text", "autoregressive", "bits_per_byte", estimate(1.25, 1.2, 1.3), tokens_per_second=None),
            row("human_eval", "auto", "pass@1", estimate(0.041, 0.01, 0.07), **chosen, **drafting),
        ],
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(evaluation_table(report))
    lines = console.file.getvalue().splitlines()
    assert "runs/[b] on cpu, batch size 1, weights in float32; [low, high]: 95 % over examples" in lines[0]
    first, second, third = (line.split() for line in lines[3:] if "164" in line)
    assert first[:6] == ["human_eval", "autoregressive", "164", "pass@1", "4.1%", "[1.0%,"]
    assert " ".join(second) == (
        "auto (self_speculative:8:6) 164 pass@1 4.1% [1.0%, 7.0%] 67% [65%, 69%] 62.9 [60.0, 65.0] "
        "1.83 [1.75, 1.90] 100%"
    )
    assert " ".join(third) == "text autoregressive 164 bits_per_byte 1.250 [1.200, 1.300] - - 1.00 100%"
