"""A sentence on its way through the blocks: its answer, the weight of the next block, and the two sides of (4).

    python paper/sentence.py runs/toy --text "the tea was not lovely" --text "..."      leaves runs/toy/sentence.png

Above, the bars are the running answer a_n, the line is p_n, the weight of the next block and the most that a later one
can take. Below, both sides of the rule: what the winner keeps at least, and what the runner-up reaches at most (by the
exact rule: what the winner's lead keeps at least, and what it loses at most); early on that is far above the picture.
Early exit stops at the first block where the first is not below the second; blocks that it would not run are paler.
"""

from pathlib import Path

import baselines
import numpy as np
import torch
from matplotlib.figure import Figure

import dact
import data
import train

COLOURS = ("#56B4E9", "#E69F00", "#009E73")  # of the classes
SIDES = {"paper": ("the winner keeps", "the runner-up reaches"), "exact": ("its lead keeps", "its lead loses")}
LEVELS = ["the garden was not bitter", "the service was not kind but the room was good , the former counts"]


def main(argv):
    flag = {"nargs": "+", "action": "append", "help": "a sentence, or the two of a pair; may be given several times"}
    args = baselines.arguments(__doc__, ("--text", flag)).parse_args(argv)
    _, of_run = baselines.read_metrics(args.runs[0])
    saved = train.load_run(of_run.out / "dact.pt", 2, of_run.task)
    texts = args.text or [[text] for text in LEVELS]
    figure = Figure(figsize=(5.2 * len(texts), 5), layout="constrained")
    columns = figure.subplots(2, len(texts), sharex=True, sharey="row", squeeze=False).T
    for axes, text in zip(columns, texts):
        draw(axes, text, data.TASKS[saved.task].labels, of_run.rule, *trace(saved, text, dact.RULES[of_run.rule]))
    columns[0][0].set_ylabel("a_n, p_n")
    columns[0][1].set_ylabel(f"sides of {train.RULE_NAMES[of_run.rule]}")
    baselines.save_figure(figure, Path(args.runs[0]) / "sentence.png")


@torch.no_grad()
def trace(saved, text, rule):
    """What every block makes of a text: a (N, C), p (N,), both sides of the rule (N, 2), and the block that stops."""
    y, h = saved.model(*saved.encode(text if len(text) == 1 else [tuple(text)]))
    a, p = dact.accumulate_all(y, h)
    left, right = baselines.sides(a, p, rule)
    _, stop = baselines.leave(a, left >= right)
    return a[:, 0], p[:, 0], torch.cat([left, right], 1), stop.item()


def draw(axes, text, labels, rule, a, p, sides, stop):
    """A column of the figure."""
    blocks, run, bottom = np.arange(1, len(a) + 1), np.arange(len(a)) < stop, np.zeros(len(a))
    for label, column, colour in zip(labels, a.numpy().T, COLOURS):
        for some, alpha in ((run, 0.9), (~run, 0.25)):
            name = label if alpha > 0.5 else None
            axes[0].bar(blocks[some], column[some], 0.7, bottom[some], color=colour, alpha=alpha, label=name)
        bottom = bottom + column
    keeps, loses = SIDES[rule]
    for axis, line, style, name in (
        (axes[0], p.numpy(), "ko-", "p_n"),
        (axes[1], sides[:, 0], "bo-", f"{keeps} at least"),
        (axes[1], sides[:, 1], "rs--", f"{loses} at most"),
    ):
        axis.plot(blocks[:stop], line[:stop], style, markersize=4, label=name)
        axis.plot(blocks[stop - 1 :], line[stop - 1 :], style, markersize=4, alpha=0.25)
    for axis in axes:
        axis.axvline(stop, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_ylim(-0.05, 1.5)
    axes[0].legend(fontsize=8, loc="upper right", ncols=3)
    axes[1].legend(fontsize=8, loc="best")
    answer = labels[a[stop - 1].argmax()]
    axes[0].set_title("\n".join(text) + f"\nstops after block {stop} of {len(a)}: {answer}", fontsize=9)
    axes[1].set_xlabel("block n")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
