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
    exits: dict  # form: a list of N counts
    scores: dict  # form: {metric: percent}


def measure(run, thresholds):
    """A run's `Panel`: its dev set through DACT and through DeeBERT, which is trained first if it has not been."""
    ramps = baselines.deebert(run)
    rules = {"DACT, rule (4)": dact.paper_rule, "DACT, exact rule": dact.exact_rule}
    forms = {name: partial(run.dact.early_exit, rule=rule) for name, rule in rules.items()}
    for S in thresholds:
        forms[f"DeeBERT, S = {S:g}"] = partial(ramps.early_exit, rule=partial(baselines.entropy_rule, S=S))
    answers = train.answer(forms, run.dev, run.args.batch, run.device, run.precision, passes=1)
    N = len(run.dact.backbone.blocks)
    exits = {form: train.blocks_used(found, N)["exit_histogram"] for form, found in answers.items()}
    scores = {form: train.scores(found.labels, run.dev.labels, run.args.task) for form, found in answers.items()}
    return Panel(f"{run.args.task}: {len(run.dev)} dev examples", exits, scores)


def mean_block(counts):
    """The mean exit of a list of N counts, from 1."""
    return sum(n * count for n, count in enumerate(counts, start=1)) / sum(counts)


def table(panel):
    """The counts of a panel, as printed."""
    N, metric = len(next(iter(panel.exits.values()))), next(iter(next(iter(panel.scores.values()))))
    lines = [f"{panel.title}; how many leave after block"]
    lines.append(f"{'':<22}" + "".join(f"{n:>6}" for n in range(1, N + 1)) + f"   mean block{metric:>11}")
    for form, counts in panel.exits.items():
        row = "".join(f"{count:>6}" for count in counts)
        lines.append(f"{form:<22}{row}{mean_block(counts):>13.2f}{panel.scores[form][metric]:>10.1f}%")
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
    for i, (form, counts) in enumerate(panel.exits.items()):
        system = form.split(",")[0]
        blocks = np.arange(1, len(counts) + 1)
        axes.bar(
            blocks + width * (i - (len(panel.exits) - 1) / 2), counts, width, label=form, edgecolor="white",
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
