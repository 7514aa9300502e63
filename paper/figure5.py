"""Figure 5: how often each block is the exit, in DACT and in DeeBERT.

    python paper/figure5.py runs/mrpc --S 0.25 0.5      # a panel for each run; leaves runs/mrpc/figure5.png

DACT leaves by equation (4), or by the run's --rule; DeeBERT where the entropy of an answer is under S nats (--S). Where
the dev set has groups, such as the toy task's levels, a second panel shows which of them leave where in DACT.
"""

from pathlib import Path
from typing import NamedTuple

import baselines
import numpy as np
from matplotlib.figure import Figure

import train

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#CC79A7")  # DACT, then DeeBERT: for the colour-blind, too
SHADES = ("#9ecae1", "#4292c6", "#084594")  # of groups, from easy to hard
HATCHES = ("", "///", "...", "xxx")  # without any colour


class Panel(NamedTuple):
    """What is drawn of one run."""

    title: str
    exits: dict  # variant: a list of N counts
    scores: dict  # variant: {metric: percent}
    ours: str  # the variant that is DACT
    groups: dict  # group: a list of N counts, of DACT


def measure(run, thresholds):
    """A run's `Panel`: its dev set through DACT and through DeeBERT, which is trained first if it has not been."""
    ours = f"DACT, {train.RULE_NAMES[run.args.rule]}"
    label, _, exit_block = train.predict({"early": run.early_exit}, run.dev, run.args)[0]["early"]
    found = {ours: (label, exit_block)}
    (logits,) = baselines.answers(baselines.deebert(run), run.dev, run.args)
    for S in thresholds:
        found[f"DeeBERT, entropy < {S:g} nats"] = baselines.leave(logits, baselines.entropy(logits) < S)
    exits = {name: histogram(run, exits) for name, (_, exits) in found.items()}
    scores = {name: train.scores(labels, run.dev.labels, run.args.task) for name, (labels, _) in found.items()}
    groups = {group: [of == group for of in run.dev.groups] for group in dict.fromkeys(run.dev.groups)}
    groups = {group: histogram(run, exit_block[rows]) for group, rows in groups.items()}
    return Panel(f"{run.args.task}: {len(run.dev)} dev examples", exits, scores, ours, groups)


def histogram(run, exit_block):
    return train.blocks_used(exit_block, run.N)["exit_histogram"]


def table(panel):
    """The counts of a panel, as printed."""
    N, metric = len(next(iter(panel.exits.values()))), next(iter(next(iter(panel.scores.values()))))
    lines = [f"{panel.title}; how many leave after block"]
    lines.append(f"{'':<30}" + "".join(f"{n:>6}" for n in range(1, N + 1)) + f"   mean block{metric:>11}")
    for name, counts in panel.exits.items():
        row, mean = "".join(f"{count:>6}" for count in counts), np.average(range(1, N + 1), weights=counts)
        lines.append(f"{name:<30}{row}{mean:>13.2f}{panel.scores[name][metric]:>10.1f}%")
    return "\n".join(lines)


def draw(panels):
    """The figure: a panel for each run, a group of bars for each block; then one for the groups of its examples."""
    drawn = [(panel.title, panel.exits, COLOURS) for panel in panels]
    drawn += [(f"{panel.title}, {panel.ours}", panel.groups, SHADES) for panel in panels if panel.groups]
    figure = Figure(figsize=(7.0 * len(drawn) + 0.5, 4.4), layout="constrained")
    row = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, bars, colours) in zip(row, drawn):
        draw_panel(axes, title, bars, colours)
    row[0].set_ylabel("dev examples that leave")
    return figure


def draw_panel(axes, title, bars, colours):
    """Bars {name: a list of N counts}, in colours that begin again where there are more bars."""
    width = 0.84 / len(bars)
    for i, (name, counts) in enumerate(bars.items()):
        blocks = np.arange(1, len(counts) + 1)
        axes.bar(
            blocks + width * (i - (len(bars) - 1) / 2), counts, width, label=name, edgecolor="white",
            color=colours[i % len(colours)], hatch=HATCHES[i % 4],
        )  # fmt: skip
    axes.legend(fontsize=9, frameon=False)
    axes.set_xticks(blocks)
    axes.set_xlim(0.5, len(blocks) + 0.5)
    axes.set_xlabel("block that is the exit")
    axes.set_title(title, fontsize=11)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def main(argv):
    flag = {"type": baselines.number(float, 0, 100), "nargs": "+", "default": [0.25, 0.5], "metavar": "NATS",
            "help": "DeeBERT's entropy thresholds; give them after the folders (default: 0.25 0.5)"}  # fmt: skip
    args = baselines.arguments(__doc__, ("--S", flag)).parse_args(argv)
    panels = [measure(baselines.open_run(folder, args.data), args.S) for folder in args.runs]
    print("\n\n".join(map(table, panels)))
    baselines.save_figure(draw(panels), Path(args.runs[0]) / "figure5.png")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
