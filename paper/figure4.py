"""Figure 4: which tokens each block's halting value rests on, and which blocks and neurons decided to halt.

    python paper/figure4.py runs/mrpc --examples 0

Above, a row for each block: Integrated Gradients of its halting neuron before the sigmoid (+ goes on, - halts). Below,
those of the answer at the exit, as in figure 3. On the right Layer Conductance: what each block added to log p_n, the
weight left at the exit n, whose fall makes (4) halt. By default the first dev example that is answered right, of the
hardest level if there are levels. Prints the neurons of the [CLS] vector with the largest share. Leaves figure4.png in
the run's folder.
"""

import attributions
import baselines
import torch
from attributions import COLOURS, MARKED
from matplotlib.figure import Figure

import data
import train


def main(argv):
    args = baselines.arguments(__doc__, attributions.EXAMPLES).parse_args(argv)
    if len(args.examples) > 1:
        raise data.InputError(f"--examples: figure 4 is of one example, found {len(args.examples)}; give one number")
    for folder in args.runs:
        run = baselines.open_run(folder, args.data)
        (i,) = attributions.chosen_examples(run, args.examples, 1)
        halted = run.early_exit(*attributions.inputs_of(run, i))
        n, label = halted.exit_block.item(), halted.label.item()
        halting, output, conductance = attribute(run, i, n, label)
        with torch.no_grad():
            h = run.dact(*attributions.inputs_of(run, i))[1][:, 0].tolist()
        answer = f"{run.labels[label]!r} with {halted.a[0, label]:.3f} after block {n} of {len(h)}"
        print(f"example {i}: label {run.labels[run.dev.labels[i]]!r}; DACT-BERT: {answer}")
        notes = [f"{name}: {attributions.described(run, of)}" for name, of in
                 (("halting", halting), ("answer", [output]), ("conductance", [conductance]))]  # fmt: skip
        print("\n".join(notes))
        print_neurons(conductance, h)
        figure = draw(run, i, h, answer, (halting, output, conductance))
        figure.supxlabel("\n".join(notes), size=9, parse_math=False)
        baselines.save_figure(figure, run.folder / "figure4.png", dpi=110)


def attribute(run, i, n, label):
    """(the halting value of each block, the answer at exit n, the conductance of log p_n) of dev example i."""
    line = attributions.line(run, run.dact.backbone, i)
    gradients, conductance = attributions.integrated_gradients, attributions.layer_conductance

    def found(method, score):
        return attributions.to_one_percent(method, score, *line)

    halting = [found(gradients, attributions.halting_value(run.dact, k)) for k in range(1, run.N + 1)]
    output = found(gradients, attributions.dact_answer(run.dact, n, label))
    return halting, output, found(conductance, attributions.weight_left(run.dact, n))


def print_neurons(conductance, h, top=3):
    """A line for each block that was run: its halting value, what it added to log p_n, and its strongest neurons."""
    before, after = conductance.of_baseline, conductance.of_input
    print(f"\nlog p_{len(conductance.parts)}: {before:.3f} nats of the baseline, {after:.3f} of the input; by block:")
    print(f"{'block':>5}{'h_n':>8}{'nats':>9}   strongest neurons of its [CLS] vector (number: nats)")
    for k, (layer, h_k) in enumerate(zip(conductance.parts, h), start=1):
        neurons = layer.flatten()
        order = neurons.abs().argsort(descending=True)[:top].tolist()
        strongest = ", ".join(f"{j}: {neurons[j]:+.3f}" for j in order)
        print(f"{k:>5}{h_k:>8.3f}{neurons.sum():>9.3f}   {strongest}")
    print()


# ---- The picture ----------------------------------------------------------------------------------------------------


def draw(run, i, h, answer, found):
    """Heat map of blocks x tokens above that of the answer; conductance by block on the right."""
    halting, output, conductance = found
    N, words, n = len(h), attributions.words_of(run, i), len(conductance.parts)
    width, height = max(4.0, 0.2 * len(words)), 0.3 * N
    figure = Figure(figsize=(width + 4.5, height + 3.4), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=[width + 1, 2.2], height_ratios=[N, 1])
    figure.suptitle(f"{run.args.task}, dev example {i}, label {run.labels[run.dev.labels[i]]!r}. DACT-BERT: {answer}")
    top = heat_map(axes[0, 0], torch.stack([a.parts for a in halting]).cpu())
    ends = [""] * (n - 1) + [" ◀ exit"] + [", not run"] * (N - n)
    names = [f"block {k}, h = {h_k:.2f}{end}" for k, (h_k, end) in enumerate(zip(h, ends), start=1)]
    axes[0, 0].set_yticks(range(N), names, size=11)
    axes[0, 0].set_xticks([])
    axes[0, 0].axhline(n - 0.5, color="black", linewidth=1.5)
    axes[0, 0].axhspan(n - 0.5, N - 0.5, color="white", alpha=0.65)  # what is not run at inference is paler
    axes[0, 0].set_title("halting value before the sigmoid, by token (+ goes on, − halts)", size=12)
    bottom = heat_map(axes[1, 0], output.parts[None].cpu())
    axes[1, 0].set_yticks([0], ["answer, log-odds"], size=11)
    axes[1, 0].set_xticks(range(len(words)), words, rotation=90, size=11, parse_math=False)
    figure.colorbar(top, ax=axes[0, 0], label="logit of h", aspect=30, pad=0.01)
    ends = [bottom.norm.vmin, bottom.norm.vmax]
    figure.colorbar(bottom, ax=axes[1, 0], label="nats", aspect=5, pad=0.01, ticks=ends, format="%.2f")
    bars(axes[0, 1], [layer.sum().item() for layer in conductance.parts], N)
    axes[1, 1].axis("off")
    return figure


def heat_map(axis, values):
    """Attributions (rows, T) on one scale, symmetric around 0; the stronger ones with their sign."""
    largest = max(values.abs().max().item(), 1e-30)
    shares = attributions.shares(values)
    for row, token in (shares.abs() >= MARKED).nonzero().tolist():
        axis.text(token, row, "+" if shares[row, token] > 0 else "−", ha="center", va="center", size=8)
    return axis.imshow(values.numpy(), cmap=COLOURS, vmin=-largest, vmax=largest, aspect="auto")


def bars(axis, nats, N):
    """What each block that was run added to log p_n, beside its row of the heat map."""
    colours = [COLOURS(1.0 if value > 0 else 0.0) for value in nats]
    axis.barh(range(len(nats)), nats, color=colours, edgecolor="black", linewidth=0.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axhline(len(nats) - 0.5, color="black", linewidth=1.5)
    axis.set(ylim=(N - 0.5, -0.5), yticks=[])
    axis.set_title("conductance by block", size=12)
    axis.set_xlabel(f"change of log p_{len(nats)} (nats)", size=10)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
