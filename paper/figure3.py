"""Figure 3: which input tokens the answer rests on, DACT beside DeeBERT.

    python paper/figure3.py runs/mrpc --examples 0 6

Integrated Gradients of the log-odds of the predicted class where each system leaves: DACT's a_n at its exit block n,
and the off-ramp at which DeeBERT exits. DeeBERT's S is the one at which it runs as many blocks as DACT on the dev set;
no label is looked at. By default the first two dev examples that both answer right, of the hardest level if there are
levels. Leaves figure3.png in the run's folder.
"""

import math
from typing import NamedTuple

import attributions
import baselines
import torch
from attributions import COLOURS, MARKED, Attribution
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import dact
import train

TITLE = "Integrated Gradients of the log-odds of the predicted class"
LEGEND = (
    "blue, solid line: for the answer; orange, dotted line: against it; full colour: the strongest token; "
    f"lines from {MARKED:.0%} of it on"
)


class Row(NamedTuple):
    """One system's answer to one example, and what it rests on."""

    title: str
    words: list  # the T tokens
    found: Attribution  # of the tokens, in nats of log-odds


def main(argv):
    args = baselines.arguments(__doc__, attributions.EXAMPLES).parse_args(argv)
    for folder in args.runs:
        run = baselines.open_run(folder, args.data)
        exits, S, deebert = deebert_at_the_same_depth(run)
        rows = {}
        for i in attributions.chosen_examples(run, args.examples, 2, deebert.label):
            theirs, ours = (column[[i]] for column in deebert), run.early_exit(*attributions.inputs_of(run, i))
            rows[i] = [row(f"DeeBERT (entropy < {S:.2g})", run, exits, dact.Halted(*theirs), attributions.ramp_answer, i),
                       row("DACT-BERT", run, run.dact, ours, attributions.dact_answer, i)]  # fmt: skip
        for i, pair in rows.items():
            for each in pair:
                print(f"example {i}: {each.title}; {attributions.described(run, [each.found])}")
        draw(run, rows, run.folder / "figure3.png")


def deebert_at_the_same_depth(run):
    """(the run's DeeBERT, S, its `dact.Halted` for the dev set) where it runs as many blocks as DACT."""
    exits = baselines.deebert(run)
    (logits,) = baselines.answers(exits, run.dev, run.args)
    H = baselines.entropy(logits)

    def exits_at(S):
        return baselines.leave(logits, H < S)

    S = baselines.bisect_to_depth(exits_at, run.metrics["dact"]["mean_blocks"], math.log(len(run.labels)))
    labels, exit_block = exits_at(S)
    a = logits[exit_block - 1, torch.arange(len(labels))].softmax(-1)  # (n, C)
    return exits, S, dact.Halted(labels, a, exit_block)


def row(system, run, model, halted, score, i):
    """The `Row` of a system that answered `halted` about dev example i. score: a function of `attributions`."""
    n, label = halted.exit_block.item(), halted.label.item()
    line = attributions.line(run, model.backbone, i)
    found = attributions.to_one_percent(attributions.integrated_gradients, score(model, n, label), *line)
    title = f"{system}: {run.labels[label]!r} with {halted.a[0, label]:.3f} after block {n} of {run.N}"
    return Row(title, attributions.words_of(run, i), found)


def heading(run, i):
    return f"Dev example {i} of {run.args.task}, label {run.labels[run.dev.labels[i]]!r}"


def note(run, found):
    """The line under a row."""
    change = f"log-odds {found.of_baseline:+.2f} → {found.of_input:+.2f} nats; strongest {found.parts.abs().max():.2f}"
    return f"{change}; {attributions.described(run, [found])}"


# ---- The picture ----------------------------------------------------------------------------------------------------

COLUMNS, SIZE = 80, 10  # of the picture: characters in a line, and points of a letter
CHARACTER = SIZE * 0.602 / 72  # width of a letter of DejaVu Sans Mono in inches


def draw(run, rows, path):
    """The figure as a picture, in letters of one width, so that where a token ends is a sum."""
    lines = [("bold", TITLE), ("note", LEGEND)]
    for i, pair in rows.items():
        lines += [("text", ""), ("bold", heading(run, i))]
        for row in pair:
            lines.append(("text", row.title))
            lines += [("tokens", tokens) for tokens in wrapped(row)]
            lines.append(("note", note(run, row.found)))
    figure = Figure(figsize=((COLUMNS + 4) * CHARACTER, 0.27 * (len(lines) + 1)))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(len(lines) + 0.5, -0.5))
    axis.axis("off")
    style = {"text": {}, "bold": {"weight": "bold"}, "note": {"size": 0.8 * SIZE, "color": "#444444"}}
    for y, (kind, content) in enumerate(lines):
        if kind == "tokens":
            for column, word, share in content:
                draw_token(axis, column, y, word, share)
        else:
            axis.text(0, y, content, **{"size": SIZE, "va": "center", "parse_math": False} | style[kind])
    baselines.save_figure(figure, path)


def wrapped(row):
    """The tokens of a row broken into lines: [[(column, word, share)]]."""
    lines, column = [[]], 0
    for word, share in zip(row.words, attributions.shares(row.found.parts).tolist()):
        if column + len(word) > COLUMNS and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, word, share))
        column += len(word) + 1
    return lines


def draw_token(axis, column, y, word, share):
    left, right = column - 0.4, column + len(word) + 0.4
    axis.add_patch(Rectangle((left, y - 0.4), right - left, 0.8, color=COLOURS((share + 1) / 2), linewidth=0))
    # A dollar sign would begin a formula.
    axis.text(column, y, word, size=SIZE, family="DejaVu Sans Mono", va="center", parse_math=False)
    if abs(share) >= MARKED:
        colour, form = ("#1f5fa0", "-") if share > 0 else ("#a34a00", ":")
        axis.plot([left + 0.1, right - 0.1], [y + 0.38] * 2, color=colour, linestyle=form, linewidth=2)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
