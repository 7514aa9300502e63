"""Figure 3: which input tokens the answer rests on, DACT beside DeeBERT.

    python paper/figure3.py runs/mrpc --examples 0 6

Integrated Gradients of the log-odds of the predicted class where each system leaves: DACT's a_n at its exit block n,
and the off-ramp at which DeeBERT exits. DeeBERT's S is the one at which it runs as many blocks as DACT on the dev set;
no label is looked at. By default the first two dev examples that both answer right, of the hardest level if there are
levels. Leaves figure3.html (numbers appear under the pointer) and figure3.png in the run's folder.
"""

import html
import math
from functools import partial
from typing import NamedTuple

import attributions
import baselines
from attributions import COLOURS, MARKED, Attribution
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
    args = baselines.arguments(__doc__, *attributions.FLAGS).parse_args(argv)
    for folder in args.runs:
        run = baselines.open_run(folder, args.data)
        attributions.check_examples(run, args.examples)
        exits = baselines.deebert(run)
        (logits,) = train.outputs(exits, run.dev, run.args)

        def deebert(S, logits=logits):
            return baselines.simulate(logits, partial(baselines.entropy_rule, S=S))

        S = baselines.bisect_to_depth(deebert, run.metrics["dact"]["mean_blocks"], math.log(len(run.labels)))
        labels, _ = deebert(S)
        examples = args.examples or attributions.first_right(run, 2, labels)
        rows = {i: [deebert_row(run, exits, S, i, args.steps), dact_row(run, i, args.steps)] for i in examples}
        text = page(run, rows).encode()
        train.write_whole(run.folder / "figure3.html", text)
        draw(run, rows, run.folder / "figure3.png")
        for i, pair in rows.items():
            for row in pair:
                print(f"example {i}: {row.title}; {attributions.described(run, [row.found])}")
        print(f"saved {run.folder / 'figure3.html'} and {run.folder / 'figure3.png'}")


def dact_row(run, i, steps):
    return row("DACT-BERT", run, run.dact, attributions.halted(run, i), attributions.dact_answer, i, steps)


def deebert_row(run, exits, S, i, steps):
    halted = exits.early_exit(*attributions.inputs_of(run, i), rule=partial(baselines.entropy_rule, S=S))
    return row(f"DeeBERT (S = {S:.2g})", run, exits, halted, attributions.ramp_answer, i, steps)


def row(system, run, model, halted, score, i, steps):
    """The `Row` of a system that answered `halted` about dev example i. score: a function of `attributions`."""
    n, label, N = halted.exit_block.item(), halted.label.item(), len(model.backbone.blocks)
    x, baseline = attributions.line(run, model.backbone, i)
    method = attributions.integrated_gradients
    found = attributions.to_one_percent(method, score(model, n, label), x, baseline, steps)
    title = f"{system}: {run.labels[label]!r} with {halted.a[0, label]:.3f} after block {n} of {N}"
    return Row(title, attributions.words_of(run, i), found)


def heading(run, i):
    return f"Dev example {i} of {run.args.task}, label {run.labels[run.dev.labels[i]]!r}"


def note(run, found):
    """The line under a row."""
    change = f"log-odds {found.of_baseline:+.2f} → {found.of_input:+.2f} nats; strongest {found.parts.abs().max():.2f}"
    return f"{change}; {attributions.described(run, [found])}"


# ---- As a page, and as a picture ------------------------------------------------------------------------------------


def page(run, rows):
    """The figure as HTML, complete in itself. rows: {example: [Row]}."""
    parts = []
    for i, pair in rows.items():
        parts.append(f"<h2>{html.escape(heading(run, i))}</h2>")
        for row in pair:
            tokens = zip(row.words, row.found.parts.tolist(), attributions.shares(row.found.parts).tolist())
            spans = " ".join(span(*token) for token in tokens)
            parts.append(f"<h3>{html.escape(row.title)}</h3>\n<p>{spans}</p>")
            parts.append(f"<p><small>{html.escape(note(run, row.found))}</small></p>")
    return PAGE.format(title=TITLE, legend=html.escape(LEGEND.capitalize()), body="\n".join(parts))


def span(word, nats, share):
    """One token: its colour, its mark, and its number under the pointer."""
    mark = ("for" if share > 0 else "against") if abs(share) >= MARKED else ""
    colour = to_hex(COLOURS((share + 1) / 2))
    return f'<span class="{mark}" style="background:{colour}" title="{nats:+.4f} nats">{html.escape(word)}</span>'


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Figure 3: attributions of the answer</title>
<style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #000; background: #fff }}
h2, h3 {{ line-height: 1.3 }}
span {{ padding: 1px 3px; border-bottom: 3px solid transparent }}
span.for {{ border-bottom-color: #1f5fa0 }}
span.against {{ border-bottom: 3px dotted #a34a00 }}
</style>
<h1>Figure 3: which tokens the answer rests on</h1>
<p>{title}. {legend}.</p>
{body}
</html>
"""


COLUMNS, SIZE = 110, 10  # of the picture: characters in a line, and points of a letter
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
    raise SystemExit(baselines.command(main))
