"""Figure 5: how often each block is the exit, in DACT and in DeeBERT.

    python paper/figure5.py runs/mrpc --S 0.25 0.5      # a panel for each run; leaves runs/mrpc/figure5.png

DACT leaves by equation (4) and by its exact form; DeeBERT leaves when the entropy of an answer is under S nats.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import baselines
import numpy as np
from matplotlib.figure import Figure

import dact
import train

COLOURS = {"DACT": ("#0072B2", "#56B4E9"), "DeeBERT": ("#D55E00", "#E69F00")}  # told apart by the colour-blind
HATCHES = ("", "///", "...", "xxx")  # within a system, and without any colour


class Panel(NamedTuple):
    """What is drawn of one run."""

    title: str
    exits: dict  # variant: a list of N counts
    scores: dict  # variant: {metric: percent}


def measure(run, thresholds):
    """A run's `Panel`: its dev set through DACT and through DeeBERT, which is trained first if it has not been."""
    ramps = baselines.deebert(run)
    rules = {"DACT, rule (4)": dact.paper_rule, "DACT, exact rule": dact.exact_rule}
    variants = {name: partial(run.dact.early_exit, rule=rule) for name, rule in rules.items()}
    for S in thresholds:
        variants[f"DeeBERT, S = {S:g}"] = partial(ramps.early_exit, rule=partial(baselines.entropy_rule, S=S))
    N, exits, scores = len(run.dact.backbone.blocks), {}, {}
    for name, variant in variants.items():
        labels, exit_block = train.predict(variant, run.dev, run.args)
        exits[name] = train.blocks_used(exit_block, N)["exit_histogram"]
        scores[name] = train.scores(labels, run.dev.labels, run.args.task)
    return Panel(f"{run.args.task}: {len(run.dev)} dev examples", exits, scores)


def mean_block(counts):
    """The mean exit of a list of N counts, from 1."""
    return sum(n * count for n, count in enumerate(counts, start=1)) / sum(counts)


def table(panel):
    """The counts of a panel, as printed."""
    N, metric = len(next(iter(panel.exits.values()))), next(iter(next(iter(panel.scores.values()))))
    lines = [f"{panel.title}; how many leave after block"]
    lines.append(f"{'':<22}" + "".join(f"{n:>6}" for n in range(1, N + 1)) + f"   mean block{metric:>11}")
    for name, counts in panel.exits.items():
        row = "".join(f"{count:>6}" for count in counts)
        lines.append(f"{name:<22}{row}{mean_block(counts):>13.2f}{panel.scores[name][metric]:>10.1f}%")
    return "\n".join(lines)


def draw(panels):
    """The figure: a panel for each run, a group of bars for each block."""
    figure = Figure(figsize=(7.0 * len(panels) + 0.5, 4.4), layout="constrained")
    rows = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(rows, panels):
        draw_panel(axes, panel)
    rows[0].set_ylabel("dev examples that leave")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def draw_panel(axes, panel):
    width, seen = 0.84 / len(panel.exits), {"DACT": 0, "DeeBERT": 0}
    for i, (name, counts) in enumerate(panel.exits.items()):
        system = name.split(",")[0]
        blocks = np.arange(1, len(counts) + 1)
        axes.bar(
            blocks + width * (i - (len(panel.exits) - 1) / 2), counts, width, label=name, edgecolor="white",
            color=COLOURS[system][seen[system] % 2], hatch=HATCHES[seen[system] % 4],
        )  # fmt: skip
        seen[system] += 1
    axes.set_xticks(blocks)
    axes.set_xlim(0.5, len(blocks) + 0.5)
    axes.set_xlabel("block that is the exit")
    axes.set_title(panel.title, fontsize=11)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def main(argv):
    flag = {"type": train.number(float, 0, 100), "nargs": "+", "default": [0.25, 0.5], "metavar": "NATS",
            "help": "DeeBERT's entropy thresholds; give them after the folders (default: 0.25 0.5)"}  # fmt: skip
    args = baselines.arguments(__doc__, ("--S", flag)).parse_args(argv)
    panels = [measure(baselines.open_run(folder, args.data), args.S) for folder in args.runs]
    baselines.show_panels(panels, table, draw, Path(args.runs[0]) / "figure5.png")


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
