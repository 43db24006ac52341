"""The whole recipe on one laptop: train with LayerSkip, look at every exit, decode three ways."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lsjax.config import Config
from lsjax.decoding.benchmark import benchmark
from lsjax.decoding.strategies import EarlyExit, SelfSpeculative, Strategy, check_strategy
from lsjax.errors import UserError
from lsjax.evaluation.figures import draw_run
from lsjax.evaluation.tables import decoding_table, exit_table, print_table
from lsjax.files import write_atomically
from lsjax.loading import load
from lsjax.prompts import held_out_prompts
from lsjax.training.loop import train

_EXPLANATION = """\
Each row lets the text leave the model after that many layers, through the one shared head. LayerSkip trains all
of them, so a low loss early on, and agreement with the last layer, mean that those few layers can draft."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the demo measures: every exit layer with every draft length, on held-out prompts."""

    exit_layers: tuple[int, ...]
    num_speculations: tuple[int, ...]
    prompts: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    repeats: int = 3

    def check(self, config: Config) -> None:
        """Raises UserError before minutes of training would be spent on a grid that cannot be measured."""
        if not self.exit_layers or not self.num_speculations:
            raise UserError("the demo needs at least one exit layer and one number of speculations")
        for strategy in self.strategies():
            check_strategy(strategy, config.model.num_layers)
        needed = min(self.prompt_tokens, config.training.sequence_length) + self.max_new_tokens
        if needed > config.model.context_length:
            raise UserError(f"the demo decodes {needed} tokens; config.model.context_length is less")

    def strategies(self) -> list[Strategy]:
        pairs = ((e, d) for e in self.exit_layers for d in self.num_speculations)
        return [*(EarlyExit(e) for e in self.exit_layers), *(SelfSpeculative(e, d) for e, d in pairs)]


def run_demo(config: Config, workdir: str | Path, grid: Grid) -> dict[str, Any]:
    """Trains (or resumes), prints both tables, leaves demo.png and report.json in `workdir`. Returns the report."""
    workdir = Path(workdir)
    grid.check(config)
    result = train(config, workdir)
    if result.profile is None:  # interrupted: there is nothing to show yet
        return {}
    print()
    print_table(exit_table(result.profile))
    print(_EXPLANATION, end="\n\n")

    model = load(workdir)
    prompts = held_out_prompts(workdir, grid.prompts, grid.prompt_tokens)
    report = benchmark(
        model, prompts, grid.strategies(), max_new_tokens=grid.max_new_tokens, repeats=grid.repeats, note=print
    )
    print()
    print_table(decoding_table(report))
    write_atomically(workdir / "report.json", json.dumps(report, indent=2))
    draw_run(
        workdir / "demo.png", result.profile, report, f"LayerSkip, {config.model.num_layers} layers, held-out text"
    )
    print(summary(report))
    print(f"picture: {workdir / 'demo.png'}   report: {workdir / 'report.json'}")
    return report


def summary(report: dict[str, Any]) -> str:
    """One sentence: the best self-speculative setting, and whether its tokens are the full model's."""
    runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
    best = max(runs, key=lambda run: run["speedup"] or 0.0)
    if best["speedup"] is None:
        return "every text ended with its first token: there is no speed to compare"
    same = "all settings gave" if all(run["matches_autoregressive"] for run in runs) else "NOT all settings gave"
    return (
        f"self-speculation is fastest with exit layer {best['exit_layer']} and {best['num_speculations']} drafts: "
        f"{best['speedup']:.2f} times autoregressive, {best['acceptance_rate']:.0%} of drafts accepted; "
        f"{same} autoregressive's exact tokens"
    )
