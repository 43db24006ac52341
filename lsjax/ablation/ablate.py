"""An ablation from the first run to its table and picture."""

from collections.abc import Sequence
from pathlib import Path

from lsjax.ablation.figure import draw_ablation
from lsjax.ablation.recipes import choose, recipes
from lsjax.ablation.report import findings, outcomes, table
from lsjax.ablation.run import run_all
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.evaluation.tables import print_table


def ablate(config: Config, workdir: str | Path, names: Sequence[str] = (), seeds: Sequence[int] = (0,)) -> None:
    """Trains the named recipes (none: all) from each seed, prints the table of all that WORKDIR holds, and leaves
    ablation.png there. Interrupted, it stops after saving, and the same call goes on."""
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds must be numbers from 0 on, got {','.join(map(str, seeds))}")
    workdir, layers = Path(workdir), config.model.num_layers
    if not run_all(config, workdir, choose(names, layers), seeds):
        return
    found = outcomes(workdir, list(recipes(layers).values()))
    print()
    print_table(table(found, layers))
    for line in findings(found, layers):
        print(line)
    draw_ablation(workdir / "ablation.png", found, layers)
    print(f"picture: {workdir / 'ablation.png'}")
