"""The figure of an ablation."""

from collections.abc import Sequence
from pathlib import Path

from lsjax.experiments.ablation.recipes import BASELINE
from lsjax.experiments.ablation.report import Outcome
from lsjax.reports.figures import plt, save_figure


def draw_ablation(path: Path, outcomes: Sequence[Outcome], num_layers: int) -> None:
    """Writes a PNG with four panels.

    They show loss by exit, the middle layer's loss during training, accepted drafts by exit, and each recipe's price
    (the last layer's loss) against its gain (tokens per round).
    """
    figure, ((exits, course), (drafts, trade)) = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    middle = max(1, num_layers // 2)
    base = next(o for o in outcomes if o.recipe.name == BASELINE)
    shown = [o for o in outcomes if o.recipe.steps == 1]
    colors = plt.get_cmap("tab20")
    for index, o in enumerate(shown):
        style = {"color": colors(index % colors.N), "label": o.recipe.name}
        exits.plot(o.profiles[0].exit_layers, o.mean_loss(), "o-", **style)
        course.plot(*zip(*o.history(middle), strict=True), **style)
        few = min(d for _, d in o.settings())
        layers = sorted({e for e, _ in o.settings()})
        drafts.plot(layers, [o.decoding(e, few)["acceptance_rate"] for e in layers], "o-", **style)
        change = 100 * (o.loss(num_layers) / base.loss(num_layers) - 1)
        trade.plot(change, o.fastest()["tokens_per_round"], "o", **style)
        trade.annotate(o.recipe.name, (change, o.fastest()["tokens_per_round"]), fontsize=8)
    exits.set(title="Held-out loss by exit", xlabel="exit layer", ylabel="nats per token", ylim=(None, 8))
    course.set(title=f"Held-out loss of exit layer {middle} during training", xlabel="step", ylim=(None, 9))
    drafts.set(title=f"Drafted tokens accepted, {few} per round", xlabel="exit layer", ylim=(0, 1))
    trade.set(
        title="Price and gain", xlabel="last layer's loss against no LayerSkip (%)", ylabel="tokens per round, fastest"
    )
    exits.legend(fontsize=8)
    save_figure(figure, path)
