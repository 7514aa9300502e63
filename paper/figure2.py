"""Figure 2: how widely every attention head looks, block by block, in DACT's backbone and in DeeBERT's.

    python paper/figure2.py runs/mrpc runs/qnli runs/rte      # a panel each; leaves runs/mrpc/figure2.png

A point is a head: the entropy in nats of the distribution that a token attends with, averaged over the real tokens of
the first --examples of the dev set. 0: the head looks at one token; log T: evenly at all T. DeeBERT's backbone is that
of stage 1, for its ramps are trained on it frozen. All blocks are run on all examples, also those that early exit never
comes to: they are shaded, and below each block stands the share of the examples that reach it.

Shapes: B sequences, T tokens, D hidden size, H heads, N blocks.
"""

from pathlib import Path
from typing import NamedTuple

import baselines
import numpy as np
import torch
from matplotlib.figure import Figure

import data
import train

# Told apart by the colour-blind, and by the marker and the line without any colour.
STYLES = {"DACT": ("#0072B2", "o", "-", -0.13), "DeeBERT": ("#D55E00", "^", "--", 0.13)}


class Panel(NamedTuple):
    """What is drawn of one run."""

    title: str
    entropies: dict  # system: (N, H) tensor, nats
    reached: list  # N shares from 0 to 1: of the examples that DACT runs the block on
    uniform: float  # nats: the entropy of heads that look at everything evenly
    rule: str


def attention_entropy(attention, hidden, mask):
    """Entropy of the distributions with which `bert.SelfAttention` would mix `hidden`: (B, H, T), nats.

    hidden (B, T, D), mask (B, T) True on real tokens. Queries that are pads get a number too; it means nothing.
    """
    q, k = (
        linear(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
        for linear in (attention.query, attention.key)
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, T): query, key
    weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
    return torch.special.entr(weights).sum(-1)  # Σ -w log w; entr(0) = 0, so that pads add nothing


@torch.no_grad()
def head_entropies(backbone, dataset, batch_size, device):
    """The mean of `attention_entropy` over all real tokens of a dataset, for each block and head: (N, H), nats."""
    sums = [0.0] * len(backbone.blocks)
    for indices in data.evaluation_batches(dataset.lengths, batch_size):
        *inputs, mask = dataset.batch(indices, device)[0]
        hidden = backbone.embed(*inputs)
        for n, block in enumerate(backbone.blocks):
            nats = attention_entropy(block.attention, hidden, mask) * mask[:, None]  # pads ask nothing
            sums[n] += nats.sum((0, 2)).cpu().double()
            hidden = block(hidden, mask)
    return torch.stack(sums) / int(dataset.lengths.sum())


def uniform_entropy(lengths):
    """What `head_entropies` is for heads that look at every real token evenly: the mean of log T over all tokens."""
    return float((lengths * np.log(lengths)).sum() / lengths.sum())


def reached(run, dataset):
    """The share of a dataset, 0 to 1, on which DACT runs block 1 .. N under the run's rule."""
    _, _, exit_block = train.predict({"early": run.early_exit}, dataset, run.args)[0]["early"]
    return [(exit_block >= n).double().mean().item() for n in range(1, run.N + 1)]


def measure(run, count):
    """A run's `Panel`, from the first `count` examples of its dev set; attention is computed in float32."""
    dev = run.saved.dataset(baselines.part_of(run.splits[1], range(min(count, len(run.dev)))))
    backbones = {"DACT": run.dact.backbone, "DeeBERT": run.stage1.bert}
    found = {name: head_entropies(model, dev, run.args.batch, run.args.device) for name, model in backbones.items()}
    part = f"first {len(dev)} of {len(run.dev)}" if len(dev) < len(run.dev) else f"all {len(dev)}"
    title = f"{run.args.task}: {part} dev examples"
    return Panel(title, found, reached(run, dev), uniform_entropy(dev.lengths), train.RULE_NAMES[run.args.rule])


def table(panel):
    """Mean entropy per block, as printed."""
    lines = [f"{panel.title}; mean entropy of the heads in nats (looking evenly: {panel.uniform:.2f})"]
    lines.append("block   " + "".join(f"{name:>10}" for name in panel.entropies) + "   reached by DACT")
    for n, share in enumerate(panel.reached):
        means = "".join(f"{heads[n].mean().item():>10.2f}" for heads in panel.entropies.values())
        lines.append(f"{n + 1:>5}   {means}{100 * share:>16.1f}%")
    return "\n".join(lines)


def draw(panels):
    """The figure: a panel for each run."""
    figure = Figure(figsize=(5.5 * len(panels) + 0.5, 4.8), layout="constrained")
    rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(rows, panels):
        draw_panel(axes, panel)
    rows[0].set_ylabel("attention entropy of a head (nats)")
    # One legend above all panels: inside one it would cover points, and not every panel has a shaded part.
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def draw_panel(axes, panel):
    N = len(panel.reached)
    blocks = np.arange(1, N + 1)
    for system, heads in panel.entropies.items():
        colour, marker, line, shift = STYLES[system]
        places = np.repeat(blocks + shift, heads.shape[1])
        axes.plot(places, heads.flatten(), marker, color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
        axes.plot(
            blocks, heads.mean(1), line, marker=marker, color=colour, lw=2, label=f"{system}: heads (small), their mean"
        )
    axes.axhline(panel.uniform, color="0.45", linestyle=":", label="even attention to all tokens")
    idle = sum(share == 0 for share in panel.reached)  # they are the last ones: a block is reached through all before
    if idle:
        axes.axvspan(N - idle + 0.5, N + 0.5, color="0.92", zorder=0, label="reached by no example (DACT)")
    axes.set_xticks(blocks, [f"{n}\n{100 * share:.0f}%" for n, share in zip(blocks, panel.reached)], fontsize=9)
    axes.set_xlim(0.5, N + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(f"block; below it, how many of the examples reach it in DACT ({panel.rule})", fontsize=9)


def main(argv):
    flag = {"type": baselines.number(int, 1, 10**9), "default": 400, "help": "dev examples (default: the first 400)"}
    args = baselines.arguments(__doc__, ("--examples", flag)).parse_args(argv)
    panels = [measure(baselines.open_run(folder, args.data), args.examples) for folder in args.runs]
    print("\n\n".join(map(table, panels)))
    baselines.save_figure(draw(panels), Path(args.runs[0]) / "figure2.png")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
