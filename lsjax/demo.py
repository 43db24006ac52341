"""The whole recipe on one laptop: train with LayerSkip, look at every exit, decode three ways."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lsjax.config import Config
from lsjax.decoding.benchmark import benchmark
from lsjax.decoding.strategies import EarlyExit, SelfSpeculative, Strategy
from lsjax.errors import UserError
from lsjax.evaluation.figures import draw_run
from lsjax.evaluation.tables import decoding_table, exit_table, print_table
from lsjax.files import write_atomically
from lsjax.loading import load
from lsjax.prompts import held_out_prompts
from lsjax.sweep import Grid as Settings
from lsjax.sweep import summary
from lsjax.training.loop import train

_EXPLANATION = """\
Each row lets the text leave the model after that many layers, through the one shared head. LayerSkip trains all
of them, so a low loss early on, and agreement with the last layer, mean that those few layers can draft."""


@dataclasses.dataclass(frozen=True)
class Grid(Settings):
    """What the demo measures: every exit layer alone, with every draft length, and with `drafts_beside_lookup`
    drafts where it cannot copy `lookup` of them (0: no copies), on held-out prompts."""

    lookup: int = 8
    drafts_beside_lookup: int = 4
    prompts: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    repeats: int = 3

    def check(self, config: Config) -> None:
        """Raises UserError before minutes of training would be spent on a grid that cannot be measured."""
        self.check_settings(config.model.num_layers)
        needed = min(self.prompt_tokens, config.training.sequence_length) + self.max_new_tokens
        if needed > config.model.context_length:
            raise UserError(f"the demo decodes {needed} tokens; config.model.context_length is less")

    def strategies(self) -> list[Strategy]:
        d, lookup = self.drafts_beside_lookup, self.lookup
        copying = [SelfSpeculative(e, d, lookup=lookup) for e in self.exit_layers] if lookup else []
        return [*(EarlyExit(e) for e in self.exit_layers), *super().strategies(), *copying]


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
