"""Table 1: DACT-BERT beside what else stops early, at every depth.

    python paper/table1.py --task mrpc --seeds 5        the other flags are train.py's: --model, --data, --epochs ...
    python paper/table1.py --task qnli --seeds 3 --chosen runs/table1-mrpc/chosen.json

Everything is made by this one command and kept in --out: a run of train.py for every seed (seed-0, seed-1, ...), the
other systems trained beside each, and one run more (held-out) of seed 0 that never sees a fifth of the training set. On
that fifth it is chosen how long ramps learn on a frozen backbone: the greatest area under a curve wins. All backbones
train as long as DACT's. Dev labels choose nothing. An interrupted command goes on where it was. Leaves table1.md and
table1.png.

A curve is the task's first metric over the blocks saved, from 0 to 90 %, as one knob of the system is turned: linear
between the points that it reaches. Where two neighbours lie more than 17 % apart, no setting of the knob leads between
them: there the curve has a gap, and the tables a dash. What a table says of a depth is read off each seed's curve.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import baselines
import numpy as np
import torch
from matplotlib.figure import Figure

import data
import train

TAUS = (1e-4, 5e-4, 0.002, 0.005, 0.02, 0.075, 0.1, 0.125, 0.15, 0.2)  # nats a block, beside the run's own
DEPTHS = {"a quarter": 25, "a third": 100 / 3, "half": 50, "three quarters": 75}  # percent of the blocks saved
GRID = np.arange(0, 91, 2.5)  # percent of the blocks saved; a curve's area is its mean here
GAP = 17  # percent of the blocks: between two points of a curve that lie farther apart there is none
# {row of what is as trained: its name in metrics.json}
AS_TRAINED = {"majority class": "majority", "base": "full", "DACT, rule (4)": "dact", "DACT, exact rule": "exact_rule"}
DACT, ONE_BLOCK = "DACT, rule (4)", "DACT, one block for all"
BASES = ("base, all blocks", "stage 1 twice, all blocks")


def main(argv):
    parser = train.Parser(description="Table 1 of the paper. All other flags are train.py's.", allow_abbrev=False)
    parser.add_argument("--seeds", type=baselines.number(int, 1, 10), default=1, help="runs, from seed 0 (default: 1)")
    parser.add_argument("--chosen", metavar="FILE", help="systems and settings: another task's chosen.json")
    parser.add_argument("--out", help="folder for all of it (default: runs/table1-TASK)")
    own, flags = parser.parse_known_args(argv)
    args = train.parse_arguments(flags)
    if args.stage1 or args.overwrite or args.explain or args.rule != "paper":
        raise data.InputError("all runs are made from the start, by (4); leave --stage1, --overwrite, --rule out")
    out = Path(own.out or f"runs/table1-{args.task}").expanduser()
    if own.chosen:
        with data.reading(own.chosen, "name the chosen.json of another table"):
            found = json.loads(Path(own.chosen).read_text())
            chosen = {name: found.get(name, 1) for name in SYSTEMS if name in found or name == DACT}
    name, splits = ("seed-0", None) if own.chosen else ("held-out", split_off_a_fifth(args))
    first = opened(args, splits, out=out / name, seed=0)
    runs = own.seeds + (not own.chosen)  # each takes about 8 times its stage 2, with all systems
    hours = 8 * runs * first.metrics["seconds"]["stage2"] / 3600
    print(f"about {hours:.1f} hours more, less what is finished; it can be interrupted")
    if not own.chosen:
        chosen = choose(first, SYSTEMS)
        train.write_whole(out / "chosen.json", json.dumps(chosen).encode())
    results = []
    for seed in range(own.seeds):
        print(f"\nseed {seed}, of {own.seeds}")
        run = opened(args, out=out / f"seed-{seed}", seed=seed)
        results.append(measured(run, chosen))
    text = markdown(run, chosen, results)
    print("\n" + text)
    train.write_whole(out / "table1.md", text.encode())
    baselines.save_figure(draw(args.task, results), out / "table1.png", dpi=110)


# ---- Runs of train.py -----------------------------------------------------------------------------------------------


def opened(args, splits=None, **changes):
    """The run of train.py with these arguments, `changes` among them, made first if it is not finished.

    splits: what it trains on, if not the task's own. Raises InputError if the run in args.out has other settings.
    """
    args = argparse.Namespace(**vars(args) | {"overwrite": True} | changes)
    stage1 = args.out / "stage1.pt"
    if not (args.out / "metrics.json").exists():
        if args.seed > 0 and stage1.exists():  # it was interrupted in stage 2; the first run has shown its settings
            args.stage1 = str(stage1)
        train.run(args, splits)
    run = baselines.open_run(args.out, args.data, splits)
    for name in ("task", "model", "precision", *train.SETTINGS):
        asked, found = getattr(args, name), getattr(run.args, name)
        if asked not in (None, found):
            raise data.InputError(f"{args.out}: its run has {name} {found}, not {asked}; choose another --out")
    return run


def split_off_a_fifth(args):
    """A task's training set in two, as if they were its train and dev split."""
    whole, _ = data.load_task(args.task, args.data)
    order = list(range(len(whole.texts)))
    random.Random(1234).shuffle(order)
    fifth = len(order) // 5
    return [baselines.part_of(whole, sorted(rows)) for rows in (order[fifth:], order[:fifth])]


# ---- Systems --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a trained system does on a dev set of n examples."""

    logits: torch.Tensor  # (N, n, C): what each block's head answers by itself
    leave: object  # x -> (labels (n,), exit blocks (n,)); the greater the knob x, the fewer blocks
    knob: list  # its settings; two are the ends of a range


def by_entropy(run, logits):
    """Leave when the entropy of the answer is below S nats."""
    H = baselines.entropy(logits)
    return Outcome(logits, lambda S: baselines.leave(logits, H < S), [0.0, 1.001 * math.log(len(run.labels))])


def one_block(run, logits):
    """No decision: all leave after block k."""
    n = torch.arange(1, run.N + 1)[:, None].expand(logits.shape[:2])
    return Outcome(logits, lambda x: baselines.leave(logits, n >= -x), list(range(-run.N, 0)))


def logits_of(run, model):
    """(n, C) of a `BertClassifier` on the dev set."""
    return train.predict({"": lambda *inputs: [model(*inputs)]}, run.dev, run.args)[0][""][0]


def deebert(run, factor):
    """factor: of the run's epochs. Stage 1 is trained twice over, for DACT's backbone is, too."""
    exits = baselines.deebert(run.twice, factor * run.args.epochs)
    return by_entropy(run, *baselines.answers(exits, run.dev, run.args))


def fastbert(run, factor):
    """The same. Its "speed" is the same knob in other units, S / log C."""
    exits = baselines.frozen(run.twice, baselines.fastbert_loss, "FastBERT", factor * run.args.epochs)
    return by_entropy(run, *baselines.answers(exits, run.dev, run.args))


def pabee(run, _):
    (logits,) = baselines.answers(baselines.joint(run, "PABEE"), run.dev, run.args)
    confirmed = baselines.confirmations(logits)
    steps = list(range(1 - run.N, 1))  # t = -x; t = 0: after block 1
    return Outcome(logits, lambda x: baselines.leave(logits, confirmed >= -x), steps)


def berxit(run, _):
    logits, u = baselines.answers(baselines.joint(run, "BERxiT"), run.dev, run.args)
    return Outcome(logits, lambda x: baselines.leave(logits, u.sigmoid() < x), [0.0, 1.001])


def palbert(run, _):
    logits, z = baselines.answers(baselines.joint(run, "PALBERT"), run.dev, run.args)
    stopped = baselines.exit_chances(z).cumsum(0)
    return Outcome(logits, lambda x: baselines.leave(logits, stopped >= 1 - x), [0.0, 1.0])


def dact_over_tau(run, _):
    """Rule (4), with the halting units trained anew at other prices; the answers stay as stage 2 left them."""
    vectors = baselines.cls_vectors(run.dact.backbone, run.dev, run.args)  # one backbone for all prices
    heads = baselines.dact_over_tau(run, TAUS, more=8) | {run.args.tau: run.dact.heads}
    found = {tau: baselines.over(each, vectors, run.args.device) for tau, each in heads.items()}
    y, _ = found[run.args.tau]
    return Outcome(y.clamp(min=1e-30).log(), lambda tau: baselines.leave_by_rule(*found[tau]), sorted(found))


RAMPS = (1 / 6, 1 / 3, 1, 2)
# {system: (run, setting -> `Outcome`, trained beside the run or loaded; the settings to choose from)}
SYSTEMS = {
    "DeeBERT": (deebert, RAMPS),
    "FastBERT": (fastbert, RAMPS),
    "PABEE": (pabee, (1,)),
    "BERxiT": (berxit, (1,)),
    "PALBERT": (palbert, (1,)),
    DACT: (dact_over_tau, (1,)),
}
JOINT = (*baselines.JOINT, DACT)  # their heads leave by their entropy, too, in a row of their own
PUBLISHED = {"DeeBERT": ("S", (0.25, 0.5, 0.75)), "PALBERT": ("q", (0.5,))}  # what the papers set their knobs to


# ---- Curves ---------------------------------------------------------------------------------------------------------


def curve(run, outcome):
    """Points [blocks saved %, first metric %, what is won by who leaves where, the answers], with the saving rising.

    What is won: the metric of what the exits' own heads answer, less that of the same exits dealt out by chance.
    """
    N, answers, settings = run.N, outcome.logits.argmax(-1), outcome.knob
    if len(settings) == 2:
        low, high = settings
        depths = [blocks for blocks in N * (1 - GRID / 100) if blocks >= 1]
        settings = [low, *(baselines.bisect_to_depth(outcome.leave, blocks, high, low) for blocks in depths), high]
    points = []
    for x in settings:
        labels, exit_block = outcome.leave(x)
        own = first_metric(run, answers[exit_block - 1, torch.arange(len(exit_block))])
        chance = train.by_chance(answers, exit_block, run.dev.labels, run.args.task, deals=50)
        won = own - chance[data.TASKS[run.args.task].metrics[0]]
        points.append([saved_by(exit_block, N), first_metric(run, labels), won, labels.tolist()])
    return sorted(points)


def saved_by(exit_block, N):
    return train.blocks_used(exit_block, N)["saved"]


def around(points, saved):
    """The points of a curve that a depth is read off, [(weight, point)]; the weight is nan in a gap and after the end.

    Before the first point it is that one, which saves more.
    """
    if points[-1][0] <= saved - 1e-6:
        return [(math.nan, points[-1])]
    after = next(i for i, point in enumerate(points) if point[0] > saved - 1e-6)
    if after == 0 or points[after][0] < saved + 1e-6:
        return [(1.0, points[after])]
    before, width = points[after - 1], points[after][0] - points[after - 1][0]
    weight = (saved - before[0]) / width if width <= GAP else math.nan
    return [(1 - weight, before), (weight, points[after])]


def at(points, saved, column=1):
    """A column of a curve's points where so many percent of the blocks are saved; nan where there is none."""
    return sum(weight * point[column] for weight, point in around(points, saved))


def read_off(points, column=1):
    return np.array([at(points, saved, column) for saved in DEPTHS.values()])


def area(points):
    """The mean metric from 0 to 90 % saved; for this alone a straight line leads through every gap."""
    return np.interp(GRID, *zip(*(point[:2] for point in points))).mean()


def first_metric(run, labels):
    return data.METRICS[data.TASKS[run.args.task].metrics[0]](labels, run.dev.labels)


def choose(run, systems):
    """{system: the setting of the greatest area} on the dev set of `run`, the held-out fifth."""
    several, chosen = {name: system for name, system in systems.items() if len(system[1]) > 1}, {}
    for number, (name, (outcome_of, settings)) in enumerate(several.items(), start=1):
        print(f"held-out fifth: {name}, {len(settings)} settings, system {number} of {len(several)}")
        areas = [area(curve(run, outcome_of(run, setting))) for setting in settings]
        print(f"held-out fifth: {name}, " + ", ".join(f"{x:.2f} ({of:.3g})" for x, of in zip(areas, settings)))
        chosen[name] = settings[np.argmax(areas)]
    return {name: chosen.get(name, settings[0]) for name, (_, settings) in systems.items()}


def measured(run, chosen):
    """Of one seed's run: {"labels": of the dev set, "rows": {row: [metric %, saved %]}, "curves": {system: points}}."""
    rows, curves = {}, {}
    for row, name in AS_TRAINED.items():
        found = run.metrics[name]
        rows[row] = [found[data.TASKS[run.args.task].metrics[0]], found.get("saved", 0.0)]
    for number, (name, setting) in enumerate(chosen.items(), start=1):
        print(f"{run.folder}: {name}, system {number} of {len(chosen)}")
        outcome = SYSTEMS[name][0](run, setting)
        curves[name] = curve(run, outcome)
        if name in JOINT:
            curves[entropy_of(name)] = curve(run, by_entropy(run, outcome.logits))
        knob, values = PUBLISHED.get(name, ("", ()))
        for x in values:  # PALBERT's x is 1 - q, and q is 1/2
            labels, exit_block = outcome.leave(x)
            rows[f"{name}, {knob} = {x:.2f}"] = [first_metric(run, labels), saved_by(exit_block, run.N)]
        if name == DACT:
            curves[ONE_BLOCK] = curve(run, one_block(run, outcome.logits))
    for name, model in zip(BASES, (run.stage1, run.twice.stage1)):
        labels = logits_of(run, model).argmax(1)  # no knob: one point, which `around` finds for every depth
        curves[name] = [[100.0, first_metric(run, labels), 0.0, labels.tolist()]]
    return {"labels": run.dev.labels.tolist(), "rows": rows, "curves": curves}


def entropy_of(name):
    """The row of a system's heads if they left by the entropy of their answers, not by what they have learned."""
    return f"{name.split(',')[0]} by entropy"


# ---- Tables over the seeds ------------------------------------------------------------------------------------------


def markdown(run, chosen, results):
    """The tables of a task and a model as Markdown. run: a `Run` of it."""
    task, model = run.args.task, Path(run.metrics["model"]).name
    metric, seeds = data.TASKS[task].metrics[0], len(results)
    lines = [f"**{task}, {model}**, {seeds} seed(s), {metric} in percent"]
    lines += ["", f"| as trained | {metric} | blocks saved |", "| --- | ---: | ---: |"]
    for row in results[0]["rows"]:
        cells = map(mean_and_deviation, zip(*(result["rows"][row] for result in results)))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += heading("blocks saved", "chosen: times the epochs")
    for name in results[0]["curves"]:
        cells = map(mean_and_deviation, zip(*(read_off(result["curves"][name]) for result in results)))
        setting = f"{chosen[name]:.3g}" if name in chosen and name not in JOINT else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {setting} |")
    lines += heading("difference (95 %: over the seeds; over the examples)")
    for what, (of_seeds, of_draws) in differences(results, task).items():
        lines.append(f"| {what} | {' | '.join(map(in_words, of_seeds.T, of_draws.T))} |")
    lines += heading("what is won by who leaves where, over the same exits by chance")
    for name in [name for name in results[0]["curves"] if name not in (ONE_BLOCK, *BASES)]:
        cells = map(mean_and_deviation, zip(*(read_off(result["curves"][name], column=2) for result in results)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def heading(title, *more):
    """The first lines of a table with a column for each of `DEPTHS`, and of `more`."""
    line = "| --- |" + " ---: |" * len(DEPTHS) + " --- |" * len(more)
    return ["", f"| {' | '.join([title, *DEPTHS, *more])} |", line]


def differences(results, task, draws=1000):
    """{what: by how much one curve is above another: (seeds, 4), and the mean on dev sets drawn anew (draws, 4)}"""
    curves = {name: [result["curves"][name] for result in results] for name in results[0]["curves"]}
    labels, metric = torch.tensor(results[0]["labels"]), data.METRICS[data.TASKS[task].metrics[0]]
    rows = torch.randint(len(labels), (draws, len(labels)), generator=torch.Generator().manual_seed(0))
    labels = labels[rows]  # (draws, n), with replacement; the same for all systems and seeds

    def drawn(points, saved):
        total = np.zeros(draws)
        for weight, (*_, answers) in around(points, saved):
            total += weight * np.array([*map(metric, torch.tensor(answers)[rows], labels)])
        return total

    by_seed = {name: np.stack([read_off(points) for points in of_seeds]) for name, of_seeds in curves.items()}
    by_draw = {name: np.mean([[drawn(points, saved) for saved in DEPTHS.values()] for points in of_seeds], axis=0).T
               for name, of_seeds in curves.items()}  # fmt: skip
    pairs = [(DACT, name) for name in curves if name != DACT]
    pairs += [(name, entropy_of(name)) for name in curves if name in JOINT and name != DACT]
    others = [entropy_of(name) if name in JOINT else name for name in SYSTEMS if name != DACT]
    pairs += [(entropy_of(DACT), name) for name in others if name in curves]  # the same exit, entropy; other heads
    return {f"{a} less {b}": (by_seed[a] - by_seed[b], by_draw[a] - by_draw[b]) for a, b in pairs}


def mean_and_deviation(values):
    """ "88.2 ± 0.4"; the deviation is the sample's, and left out for a single value. A dash in a gap."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return "–" if np.isnan(values).any() else f"{np.mean(values):.1f}{deviation}"


# The 97.5 % points of Student's t with 1 to 9 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def in_words(of_seeds, of_draws):
    """ "+1.2 (+0.4 to +2.0; +0.1 to +2.2), ahead": if both intervals of 95 % are above 0. A dash in a gap.

    The first is Student's over the seeds, which share a dev set; one seed has none. The second is over the examples.
    """
    mean, n = np.mean(of_seeds), len(of_seeds)
    if np.isnan(mean):
        return "–"
    spans = [np.percentile(of_draws, [2.5, 97.5])]
    if n > 1:
        error = STUDENT[n - 2] * np.std(of_seeds, ddof=1) / n**0.5
        spans.insert(0, (mean - error, mean + error))
    lows, highs = zip(*spans)
    word = "ahead" if min(lows) > 0 else "behind" if max(highs) < 0 else "level"
    return f"{mean:+.1f} ({'; '.join(f'{low:+.1f} to {high:+.1f}' for low, high in spans)}), {word}"


COLOURS = {DACT: "#0072B2", "DACT by entropy": "#56B4E9", "DeeBERT": "#D55E00", "FastBERT": "#009E73",
           "PABEE": "#CC79A7", "BERxiT": "#999933", "PALBERT": "#882255", ONE_BLOCK: "#E69F00"}  # fmt: skip


def draw(task, results):
    """The curves: means over the seeds, with their deviation as a band."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in [name for name in COLOURS if name in results[0]["curves"]]:
        values = np.array([[at(result["curves"][name], saved) for saved in GRID] for result in results])
        mean, spread = values.mean(0), values.std(0, ddof=int(len(values) > 1))
        colour, mark = COLOURS[name], "." if name == ONE_BLOCK else None
        line, width = ("-", 2) if "DACT" in name else ("--", 1.2)
        axis.plot(GRID, mean, line, marker=mark, color=colour, linewidth=width, label=name)
        axis.fill_between(GRID, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    for row, line in (("base", "-."), ("majority class", ":")):
        axis.axhline(np.mean([result["rows"][row][0] for result in results]), color="grey", linestyle=line, label=row)
    title = f"{task}, {len(results)} seed" + ("s" if len(results) > 1 else "")
    axis.set(xlabel="blocks saved (%)", ylabel=f"{data.TASKS[task].metrics[0]} (%)", title=title)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    raise SystemExit(train.command(main))
