"""What the price τ of a block does: stage 2 at eight prices from one stage 1.

    python paper/price.py            the toy task, about ten minutes; leaves runs/toy/price.png

Each run is kept in the folder of the given one. Its accuracy and the blocks saved are drawn against τ, and where the
groups of the dev set leave, such as the toy's levels.

With gates near 0 or 1 an example that leaves at block k pays about τ (k - 1) more than one that leaves at block 1. Let
L_k be the mean loss of y_k. Below τ = max of (L_1 - L_k) / (k - 1), the line in the picture, it is cheaper to send all
to some later block than to stop all at block 1. Above it no block is worth its price to all alike; halting may still
send on the examples that it expects to gain more than τ a block. By the answers at τ = 0.005, on the training set.
"""

from pathlib import Path

import baselines
import choices
from matplotlib.figure import Figure

import dact
import data
import train

TAUS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # nats a block
STYLES = ("o-", "s--", "^:", "d-.")


def main(argv):
    args = baselines.arguments(__doc__).parse_args(argv)
    run = baselines.open_run(args.runs[0], args.data)
    metric = data.TASKS[run.args.task].metrics[0]
    metrics, limit = {tau: at_price(run, tau).metrics for tau in TAUS}, limit_of(at_price(run, TAUS[0]))
    print(f"\n{'tau':>6}{metric:>10}{'saved':>8}   mean exits of " + ", ".join(groups(metrics[TAUS[0]])))
    for tau, each in metrics.items():
        exits = " ".join(f"{group['mean_blocks']:.2f}" for group in groups(each).values())
        print(f"{tau:>6g}{each['dact'][metric]:>9.1f}%{each['dact']['saved']:>7.1f}%   {exits}")
    print(f"from tau = {limit:.3f} on, no later block is worth its price to all examples alike")
    baselines.save_figure(draw(metrics, metric, limit), Path(args.runs[0]) / "price.png")


def at_price(run, tau):
    """The run, or one of its stage 1 at another price, made first if it is not finished."""
    return run if tau == run.args.tau else choices.another_stage2(run, f"price-{tau:g}", tau=tau)


def groups(metrics):
    """The groups of the dev set in a metrics.json, or all of it as one."""
    return metrics["groups"] or {"all": metrics["dact"]}


def limit_of(run):
    """The price in nats from which no later block is worth it to all examples alike: the line in the picture."""
    y, _ = baselines.answers(run.dact, run.train_set, run.args)
    losses = [dact.answer_loss(y_n, run.train_set.labels).item() for y_n in y]
    return max((losses[0] - loss) / n for n, loss in enumerate(losses[1:], start=1))


def draw(metrics, metric, limit):
    """metrics: {tau: metrics.json of a run}."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, (name, key) in zip(("ko-", "ks--"), ((metric, metric), ("blocks saved", "saved"))):
        left.plot(list(metrics), [each["dact"][key] for each in metrics.values()], style, label=f"{name} (%)")
    for style, group in zip(STYLES, groups(next(iter(metrics.values())))):
        exits = [groups(each)[group]["mean_blocks"] for each in metrics.values()]
        right.plot(list(metrics), exits, style, label=group)
    left.set_ylabel("%")
    right.set_ylabel("blocks run, mean")
    for axis, place in ((left, "center left"), (right, "lower left")):
        name = "right of it: all at block 1 is cheapest" if axis is left else None
        axis.axvline(limit, color="0.5", linestyle=":", label=name)
        axis.set(xscale="log", xlabel="τ, the price of a block (nats)")
        axis.legend(fontsize=8, frameon=False, loc=place)
    return figure


if __name__ == "__main__":
    raise SystemExit(train.command(main))
