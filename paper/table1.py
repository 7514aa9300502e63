"""Table 1: DACT-BERT beside what else stops early, at every depth.

    python paper/table1.py --task mrpc --seeds 5        the other flags are train.py's: --model, --data, --epochs ...

Everything is made by this one command and kept in --out: a run of train.py for every seed (seed-0, seed-1, ...), the
other systems trained beside each, and one run more (held-out) of seed 0 that never sees a fifth of the training set. On
that fifth the free settings of every system, DACT's too, are chosen: the one with the greatest area under its curve.
Dev labels choose nothing. An interrupted command goes on where it was. Leaves table1.md and table1.png.

A curve is the task's first metric over the blocks saved, from 0 to 90 %, as one knob of the system is turned: linear
between the points that it reaches, constant beyond the last ones. What a table says of a depth is read off each seed's.
"""

import argparse
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import NamedTuple

import baselines
import numpy as np
import torch
from matplotlib.figure import Figure

import data
import train

# The paper's Table 1: {model: {task: (metric, blocks saved) of PAPER_ROWS}} in percent
PAPER_ROWS = ("base", "DeeBERT, S = 0.25", "DeeBERT, S = 0.50", "DeeBERT, S = 0.75", "DACT, rule (4)")
PAPER = {
    "BERT-base": {
        "mrpc": ((88.2, 0.0), (87.3, 30.8), (85.2, 49.1), (79.9, 91.7), (85.4, 48.9)),
        "qnli": ((91.0, 0.0), (89.1, 40.5), (85.5, 58.2), (59.6, 91.7), (87.5, 46.7)),
        "rte": ((69.9, 0.0), (69.8, 5.3), (68.1, 21.2), (52.0, 91.7), (62.7, 50.0)),
    },
    "RoBERTa-base": {
        "mrpc": ((90.4, 0.0), (73.4, 0.0), (73.4, 0.0), (0.0, 91.7), (88.9, 51.7)),
        "qnli": ((92.4, 0.0), (90.2, 33.3), (88.0, 42.8), (59.5, 91.7), (91.9, 44.1)),
        "rte": ((67.5, 0.0), (66.9, 36.1), (66.0, 39.6), (49.8, 91.7), (54.5, 63.1)),
    },
}
TAUS = (0.005, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5)  # nats a block, beside the run's own
DEPTHS = {"a quarter": 25, "a third": 100 / 3, "half": 50, "three quarters": 75}  # percent of the blocks saved
GRID = np.arange(0, 91, 2.5)  # percent of the blocks saved; a curve's area is its mean here
# {row of what is as trained: its name in metrics.json}
AS_TRAINED = {"majority class": "majority", "base": "full", "DACT, rule (4)": "dact", "DACT, exact rule": "exact_rule"}
OURS, FIRST = ("DACT, rule (4)", "DACT by entropy"), "first k blocks"


def main(argv):
    parser = train.Parser(description="Table 1 of the paper. All other flags are train.py's.", allow_abbrev=False)
    parser.add_argument("--seeds", type=baselines.number(int, 1, 10), default=1, help="runs, from seed 0 (default: 1)")
    rivals = [name for name in SYSTEMS if name not in OURS]
    parser.add_argument("--without", nargs="+", choices=rivals, default=[], help="leave these systems out")
    parser.add_argument("--out", help="folder for all of it (default: runs/table1-TASK)")
    own, flags = parser.parse_known_args(argv)
    args = train.parse_arguments(flags)
    if args.stage1 or args.overwrite or args.explain or args.rule != "paper":
        raise data.InputError("all runs are made from the start, by (4); leave --stage1, --overwrite, --rule out")
    out = Path(own.out or f"runs/table1-{args.task}").expanduser()
    systems = {name: system for name, system in SYSTEMS.items() if name not in own.without}
    held_out = opened(args, split_off_a_fifth(args), out=out / "held-out", seed=0)
    print(f"about {hours(held_out, systems, own.seeds):.1f} hours more, less what is finished; it can be interrupted")
    chosen, form = choose(held_out, systems)
    results = []
    for seed in range(own.seeds):
        print(f"\nseed {seed}, run {seed + 2} of {own.seeds + 1}")
        run = opened(held_out.args, out=out / f"seed-{seed}", seed=seed)
        results.append(kept(run, chosen, lambda run=run: measured(run, systems, chosen)))
    text = markdown(held_out, chosen, form, results)
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
        if splits is None and stage1.exists():  # it was interrupted in stage 2; the held-out run has shown its settings
            args.stage1 = str(stage1)
        train.run(args, splits)
    run = baselines.open_run(args.out, args.data, splits)
    for name in ("task", "model", "precision", *train.SETTINGS):
        asked, found = getattr(args, name), getattr(run.args, name)
        if asked not in (None, found):
            raise data.InputError(f"{args.out}: its run has {name} {found}, not {asked}; choose another --out")
    return run


def kept(run, key, measure):
    """measure(), or what it gave before if that is in the run's table1.json under the same key."""
    path, key = run.trained / "table1.json", str(key)
    with data.reading(path, "delete it to measure again"):
        found = json.loads(path.read_text()) if path.exists() else {"key": None}
        if found["key"] == key:
            return found["measured"]
    found = {"key": key, "measured": measure()}
    run.trained.mkdir(exist_ok=True)
    train.write_whole(path, json.dumps(found, indent=1).encode())
    return found["measured"]


def split_off_a_fifth(args):
    """A task's training set in two, as if they were its train and dev split."""
    whole, _ = data.load_task(args.task, args.data)
    order = list(range(len(whole.texts)))
    random.Random(1234).shuffle(order)
    fifth = len(order) // 5
    return [baselines.part_of(whole, sorted(rows)) for rows in (order[fifth:], order[:fifth])]


def hours(run, systems, seeds):
    """About how long all will take, in stages of training; 2 of them for all that learns on cached vectors."""
    joint = [name for name in systems if name in JOINT]
    choosing = 2 + sum(setting for name in joint for setting in SYSTEMS[name][1])
    # A seed: both stages, halting and stage 1 twice, first k, and each joint system for once or twice the epochs
    a_seed = 2 + 4 + sum(1 - depth / 100 for depth in DEPTHS.values()) + 1.5 * len(joint)
    return (choosing + seeds * a_seed) * run.metrics["seconds"]["stage2"] / 3600


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


def deebert(run, factor):
    """factor: of the run's epochs, as everywhere below."""
    exits = baselines.deebert(run, factor * run.args.epochs)
    return by_entropy(run, *baselines.answers(exits, run.dev, run.args))


def fastbert(run, setting):
    """setting: (which divergence, factor). Its "speed" is the same knob in other units, S / log C."""
    which, factor = setting
    loss = partial(baselines.fastbert_loss, turned=which == "code")
    exits = baselines.frozen(run, loss, f"FastBERT-{which}", factor * run.args.epochs)
    return by_entropy(run, *baselines.answers(exits, run.dev, run.args))


def pabee(run, factor):
    (logits,) = baselines.answers(baselines.pabee(run, factor * run.args.epochs), run.dev, run.args)
    confirmed = baselines.confirmations(logits)
    steps = list(range(1 - run.N, 1))  # t = -x; t = 0: after block 1
    return Outcome(logits, lambda x: baselines.leave(logits, confirmed >= -x), steps)


def berxit(run, factor):
    logits, u = baselines.answers(baselines.berxit(run, factor * run.args.epochs), run.dev, run.args)
    return Outcome(logits, lambda x: baselines.leave(logits, u.sigmoid() < x), [0.0, 1.001])


def palbert(run, factor):
    kind = baselines.PalbertHeads, baselines.palbert_loss, "PALBERT"
    exits = baselines.joint(run, *kind, factor * run.args.epochs)
    logits, z = baselines.answers(exits, run.dev, run.args)
    stopped = baselines.exit_chances(z).cumsum(0)
    return Outcome(logits, lambda x: baselines.leave(logits, stopped >= 1 - x), [0.0, 1.0])


def dact_over_tau(run, factor):
    """Rule (4), with the halting units trained anew at other prices; the answers stay."""
    run = trained_longer(run, factor)
    vectors = baselines.cls_vectors(run.dact.backbone, run.dev, run.args)  # one backbone for all prices
    heads = {run.args.tau: run.dact.heads, **baselines.dact_over_tau(run, TAUS)}
    found = {tau: baselines.over(each, vectors, run.args.device) for tau, each in heads.items()}
    y, _ = found[run.args.tau]
    return Outcome(y, lambda tau: baselines.leave_by_rule(*found[tau]), sorted(found))


def dact_by_entropy(run, factor):
    """Section 3.1's confidence function on DACT's backbone and heads as stage 2 left them."""
    run = trained_longer(run, factor)
    y, _ = baselines.answers(run.dact, run.dev, run.args)
    return by_entropy(run, y.clamp(min=1e-30).log())


def trained_longer(run, factor):
    """The run, or one of the same stage 1 whose stage 2 has `factor` times the epochs."""
    if factor == 1:
        return run
    changes = {"epochs": factor * run.args.epochs, "stage1": str(run.folder / "stage1.pt")}
    return opened(run.args, run.splits, out=run.trained / f"stage2-{factor:g}", **changes)


RAMPS, WHOLE = (1, 2, 10 / 3), (1, 2)
# {system: (run, setting -> `Outcome`, trained beside the run or loaded; the settings to choose from)}
SYSTEMS = {
    "DeeBERT": (deebert, RAMPS),
    "FastBERT": (fastbert, tuple((loss, factor) for loss in ("paper", "code") for factor in RAMPS)),
    "PABEE": (pabee, WHOLE),
    "BERxiT": (berxit, WHOLE),
    "PALBERT": (palbert, WHOLE),
    "DACT, rule (4)": (dact_over_tau, WHOLE),
    "DACT by entropy": (dact_by_entropy, WHOLE),
}
JOINT = ("PABEE", "PALBERT", "DACT, rule (4)")  # that train a backbone


# ---- Curves ---------------------------------------------------------------------------------------------------------


def curve(run, outcome):
    """[[blocks saved %, first metric %, what is won by who leaves where]], with the saving rising. What is won: the
    metric of what the exits' own heads answer, less that of the same exits dealt out by chance."""
    N, answers, settings = run.N, outcome.logits.argmax(-1), outcome.knob
    if len(settings) == 2:
        low, high = settings
        depths = [blocks for blocks in N * (1 - GRID / 100) if blocks >= 1]
        settings = [low, *(baselines.bisect_to_depth(outcome.leave, blocks, high, low) for blocks in depths), high]
    points = []
    for x in settings:
        labels, exit_block = outcome.leave(x)
        metric, saved = point(run, labels, exit_block)
        own = first_metric(run, answers[exit_block - 1, torch.arange(len(exit_block))])
        chance = train.by_chance(answers, exit_block, run.dev.labels, run.args.task, deals=50)
        points.append([saved, metric, own - chance[data.TASKS[run.args.task].metrics[0]]])
    return sorted(points)


def at(points, saved):
    """A curve's metric where so many percent of the blocks are saved."""
    points = np.array(points)
    return np.interp(saved, points[:, 0], points[:, 1])


def read_off(points):
    """What a table says of a curve: its metric at `DEPTHS`, and its area: its mean from 0 to 90 % saved."""
    return np.array([*at(points, list(DEPTHS.values())), at(points, GRID).mean()])


def first_metric(run, labels):
    return data.METRICS[data.TASKS[run.args.task].metrics[0]](labels, run.dev.labels)


def choose(run, systems):
    """On the dev set of `run`, the held-out fifth: ({system: the setting of the greatest area}, our better form)."""
    areas = kept(run, {name: settings for name, (_, settings) in systems.items()}, lambda: areas_of(run, systems))
    chosen = {name: settings[np.argmax(areas[name])] for name, (_, settings) in systems.items()}
    return chosen, max(OURS, key=lambda name: max(areas[name]))


def areas_of(run, systems):
    """{system: [area under its curve on the dev set of `run` with each of its settings]}"""
    areas = {}
    for number, (name, (outcome_of, settings)) in enumerate(systems.items(), start=1):
        print(f"held-out fifth: {name}, {len(settings)} setting(s), system {number} of {len(systems)}")
        areas[name] = [read_off(curve(run, outcome_of(run, setting)))[-1] for setting in settings]
        print(f"held-out fifth: {name}, area " + ", ".join(f"{x:.2f} ({of})" for x, of in zip(areas[name], settings)))
    return areas


def measured(run, systems, chosen):
    """What there is to say of one seed's run.

    {"rows": {row: [metric %, saved %]}, "curves": {system: points},
    "by entropy": {system: points if its heads left by their entropy}}
    """
    rows, curves, by_their_entropy = {}, {}, {}
    for row, name in AS_TRAINED.items():
        found = run.metrics[name]
        rows[row] = [found[data.TASKS[run.args.task].metrics[0]], found.get("saved", 0.0)]
    for number, (name, (outcome_of, _)) in enumerate(systems.items(), start=1):
        print(f"{run.folder}: {name}, system {number} of {len(systems)}")
        outcome = outcome_of(run, chosen[name])
        curves[name] = curve(run, outcome)
        by_their_entropy[name] = curve(run, by_entropy(run, outcome.logits))
        if name == "DeeBERT":
            rows |= {f"DeeBERT, S = {S:.2f}": point(run, *outcome.leave(S)) for S in (0.25, 0.5, 0.75)}
    rows["base, stage 1 twice"] = whole(run, baselines.longer(run))
    points, depths = [rows["base"]], [round(run.N * (1 - depth / 100), 6) for depth in DEPTHS.values()]
    for k in sorted({*map(math.floor, depths), *map(math.ceil, depths)} - {0, run.N}):
        print(f"{run.folder}: the first {k} of {run.N} blocks")
        points.append(whole(run, baselines.first_blocks(run, k), k))
    curves[FIRST] = sorted([saved, metric, 0.0] for metric, saved in points)
    return {"rows": rows, "curves": curves, "by entropy": by_their_entropy}


def whole(run, model, k=None):
    """`point` of a `BertClassifier` that runs k blocks, by default all, on every example."""
    (labels,) = train.predict({"": lambda *inputs: [model(*inputs).argmax(1)]}, run.dev, run.args)[0][""]
    return point(run, labels, torch.full_like(labels, k or run.N))


def point(run, labels, exit_block):
    """[first metric %, blocks saved %] of labels and exits (n,) on the dev set."""
    return [first_metric(run, labels), train.blocks_used(exit_block, run.N)["saved"]]


# ---- Tables over the seeds ------------------------------------------------------------------------------------------


def markdown(run, chosen, form, results):
    """The tables of a task and a model as Markdown. run: a `Run` of it."""
    task, model = run.args.task, Path(run.metrics["model"]).name
    metric, seeds = data.TASKS[task].metrics[0], len(results)
    paper = "RoBERTa-base" if "roberta" in model.lower() else "BERT-base"
    lines = [f"**{task}, {model}**, {seeds} seed(s), {metric} in percent"]
    lines += ["", f"| as trained | {metric} | blocks saved | the paper's {paper} |", "| --- | ---: | ---: | ---: |"]
    for row in results[0]["rows"]:
        both = [mean_and_deviation([result["rows"][row][i] for result in results]) for i in (0, 1)]
        of_paper = dict(zip(PAPER_ROWS, PAPER[paper].get(task, ())))
        theirs = "{}, {} % saved".format(*of_paper[row]) if row in of_paper else ""
        lines.append(f"| {row} | {both[0]} | {both[1]} | {theirs} |")
    columns = f"{' | '.join(DEPTHS)} | area"
    lines += ["", f"| blocks saved | {columns} | chosen |", "| --- |" + " ---: |" * 5 + " --- |"]
    for name in results[0]["curves"]:
        cells = map(mean_and_deviation, zip(*(read_off(result["curves"][name]) for result in results)))
        lines.append(f"| {name} | {' | '.join(cells)} | {in_words(chosen.get(name), run.args.epochs)} |")
    lines += ["", f"| difference | {columns} |", "| --- |" + " ---: |" * 5]
    found = [differences(result, form) for result in results]
    for what in found[0]:
        if any(np.any(each[what]) for each in found):  # all 0 for what leaves by entropy itself
            lines.append(f"| {what} | {' | '.join(map(interval, zip(*(each[what] for each in found))))} |")
    return "\n".join(lines) + "\n"


def differences(result, form):
    """{what: by how much (5,) one curve of a seed is above another}"""
    curves = {name: read_off(points) for name, points in result["curves"].items()}
    found = {f"{form} less {name}": curves[form] - curves[name] for name in curves if name != form}
    for name in result["by entropy"]:
        found[f"{name}: its exits less chance's"] = read_off([(saved, won) for saved, _, won in result["curves"][name]])
        found[f"{name}: its exits less entropy's"] = curves[name] - read_off(result["by entropy"][name])
    return found


def in_words(setting, epochs):
    """A setting of `SYSTEMS`, such as ("code", 2), for a run of so many epochs: "code, 6 epochs"."""
    if setting is None:
        return ""
    which, factor = setting if isinstance(setting, tuple) else (None, setting)
    return (f"{which}, " if which else "") + f"{factor * epochs:.3g} epochs"


def mean_and_deviation(values):
    """ "88.2 ± 0.4"; the deviation is the sample's, and left out for a single value."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


# The 97.5 % points of Student's t with 1 to 9 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(differences):
    """Paired differences over the seeds in words: "+1.2 (+0.4 to +2.0), ahead". The 95 % interval is Student's."""
    mean = np.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.1f}"
    error = STUDENT[len(differences) - 2] * np.std(differences, ddof=1) / len(differences) ** 0.5
    word = "ahead" if mean - error > 0 else "behind" if mean + error < 0 else "level"
    return f"{mean:+.1f} ({mean - error:+.1f} to {mean + error:+.1f}), {word}"


COLOURS = {"DACT, rule (4)": "#0072B2", "DACT by entropy": "#56B4E9", "DeeBERT": "#D55E00", "FastBERT": "#009E73",
           "PABEE": "#CC79A7", "BERxiT": "#999933", "PALBERT": "#882255", FIRST: "#E69F00"}  # fmt: skip


def draw(task, results):
    """The mean curves over the seeds, and the operating points of DACT and of the base."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for name in results[0]["curves"]:
        means = np.mean([at(result["curves"][name], GRID) for result in results], axis=0)
        line, width = ("-", 2) if name in OURS else ("--", 1.2)
        axis.plot(GRID, means, line, color=COLOURS[name], linewidth=width, label=name)
    for row, mark in (("base", "s"), ("DACT, rule (4)", "o")):
        reached, saved = np.mean([result["rows"][row] for result in results], axis=0)
        axis.plot(saved, reached, mark, color=COLOURS.get(row, "k"), markersize=9, label=f"{row}, as trained")
    axis.axhline(results[0]["rows"]["majority class"][0], color="grey", linestyle=":", label="majority class")
    title = f"{task}, mean of {len(results)} seed(s)"
    axis.set(xlabel="blocks saved (%)", ylabel=f"{data.TASKS[task].metrics[0]} (%)", title=title)
    axis.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    raise SystemExit(train.command(main))
