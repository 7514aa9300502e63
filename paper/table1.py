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
import matplotlib
import numpy as np
import torch

import data
import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The paper's Table 1: {model: {task: {row: (metric, blocks saved)}}} in percent
PAPER = {
    "BERT-base": {
        "mrpc": {"base": (88.2, 0.0), "DeeBERT, S = 0.25": (87.3, 30.8), "DeeBERT, S = 0.50": (85.2, 49.1),
                 "DeeBERT, S = 0.75": (79.9, 91.7), "DACT, rule (4)": (85.4, 48.9)},
        "qnli": {"base": (91.0, 0.0), "DeeBERT, S = 0.25": (89.1, 40.5), "DeeBERT, S = 0.50": (85.5, 58.2),
                 "DeeBERT, S = 0.75": (59.6, 91.7), "DACT, rule (4)": (87.5, 46.7)},
        "rte": {"base": (69.9, 0.0), "DeeBERT, S = 0.25": (69.8, 5.3), "DeeBERT, S = 0.50": (68.1, 21.2),
                "DeeBERT, S = 0.75": (52.0, 91.7), "DACT, rule (4)": (62.7, 50.0)},
    },
    "RoBERTa-base": {
        "mrpc": {"base": (90.4, 0.0), "DeeBERT, S = 0.25": (73.4, 0.0), "DeeBERT, S = 0.50": (73.4, 0.0),
                 "DeeBERT, S = 0.75": (0.0, 91.7), "DACT, rule (4)": (88.9, 51.7)},
        "qnli": {"base": (92.4, 0.0), "DeeBERT, S = 0.25": (90.2, 33.3), "DeeBERT, S = 0.50": (88.0, 42.8),
                 "DeeBERT, S = 0.75": (59.5, 91.7), "DACT, rule (4)": (91.9, 44.1)},
        "rte": {"base": (67.5, 0.0), "DeeBERT, S = 0.25": (66.9, 36.1), "DeeBERT, S = 0.50": (66.0, 39.6),
                "DeeBERT, S = 0.75": (49.8, 91.7), "DACT, rule (4)": (54.5, 63.1)},
    },
}  # fmt: skip
TAUS = (0.005, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5)  # nats a block, beside the run's own
DEPTHS = {"a quarter": 25, "a third": 100 / 3, "half": 50, "three quarters": 75}  # percent of the blocks saved
GRID = np.arange(0, 91, 2.5)  # percent of the blocks saved; a curve's area is its mean here
OURS, FIRST = ("DACT, rule (4)", "DACT by entropy"), "first k blocks"


def main(argv):
    parser = train.Parser(
        description=__doc__.splitlines()[0], epilog="All other flags are train.py's.", allow_abbrev=False
    )
    parser.add_argument(
        "--seeds", type=train.number(int, 1, 10), default=1, help="runs, of seeds 0, 1, ... (default: 1)"
    )
    rivals = [name for name in SYSTEMS if name not in OURS]
    parser.add_argument("--without", nargs="+", choices=rivals, default=[], help="leave these systems out")
    parser.add_argument("--out", help="folder for all of it (default: runs/table1-TASK)")
    own, flags = parser.parse_known_args(argv)
    args = train.parse_arguments(flags)
    if args.stage1 or args.overwrite or args.explain or args.submit:
        raise data.InputError("all runs are made from the start; leave --stage1, --overwrite, --explain, --submit out")
    out = data.own_path(own.out or f"runs/table1-{args.task}")
    systems = {name: system for name, system in SYSTEMS.items() if name not in own.without}
    held_out = opened(flags, out / "held-out", split_off_a_fifth(args))
    time = hours(held_out, systems, own.seeds)
    print(f"the rest takes about {time:.1f} hours here, less what is finished already; it can be interrupted")
    chosen, form = choose(held_out, systems)
    results = []
    for seed in range(own.seeds):
        print(f"\nseed {seed}, run {seed + 2} of {own.seeds + 1}")
        results.append(measured(opened([*flags, "--seed", str(seed)], out / f"seed-{seed}"), systems, chosen))
    text = markdown(held_out.args, chosen, form, results)
    print("\n" + text)
    train.write_whole(out / "table1.md", text.encode())
    baselines.save_figure(draw(args, results), out / "table1.png", dpi=110)
    print(f"saved      {out}/table1.md and table1.png")


def opened(flags, folder, splits=None):
    """The run of train.py in `folder` with these flags, made or finished first. InputError if it has others."""
    args = train.parse_arguments([*flags, "--out", str(folder), "--resume"])
    run = made(args, splits)
    args.precision = args.precision or run.args.precision
    train.settings_of(args, run.splits, [run])  # asked for, and found
    return run


def made(args, splits):
    """The run in args.out, which is made or finished first if it is not there."""
    if not (args.out / "metrics.json").exists():
        train.run(args, splits)
    return baselines.open_run(args.out, args.data, splits)


def split_off_a_fifth(args):
    """A task's training set in two, as if they were its train and dev split."""
    whole, _ = data.load_task(args.task, args.data)
    order = list(range(len(whole.texts)))
    random.Random(1234).shuffle(order)
    fifth = len(order) // 5
    return [
        data.Examples(*([column[i] for i in rows] for column in (whole.texts, whole.labels, whole.groups) if column))
        for rows in (sorted(order[fifth:]), sorted(order[:fifth]))
    ]


def hours(run, systems, seeds):
    """About how long all will take, from the times of a run: whole backbones, and halting at other prices."""
    joint = [name for name in systems if name in JOINT]
    choosing = sum(setting for name in joint for setting in SYSTEMS[name][1])  # in stages 1
    # A seed: both stages and stage 1 twice, first k, and each joint system for once or twice the epochs
    a_seed = 3 + sum(1 - depth / 100 for depth in DEPTHS.values()) + 1.5 * len(joint)
    # Each price for once and twice the epochs to choose, then for one of them a seed
    halting = (3 + 1.5 * seeds) * len(TAUS) * run.metrics["seconds"]["halting"]
    return ((choosing + seeds * a_seed) * run.metrics["seconds"]["stage1"] + halting) / 3600


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
    return by_entropy(run, *train.outputs(baselines.deebert(run, factor * run.args.epochs), run.dev, run.args))


def fastbert(run, setting):
    """setting: (which divergence, factor). Its "speed" is the same knob in other units, S / log C."""
    which, factor = setting
    loss = partial(baselines.fastbert_loss, turned=which == "code")
    exits = baselines.ramps(run, loss, f"FastBERT-{which}", factor * run.args.epochs)
    return by_entropy(run, *train.outputs(exits, run.dev, run.args))


def pabee(run, factor):
    (logits,) = train.outputs(baselines.pabee(run, factor * run.args.epochs), run.dev, run.args)
    steps = list(range(1 - len(logits), 1))  # t = 0: after block 1
    return Outcome(logits, lambda x: baselines.simulate(logits, partial(baselines.patience_rule, t=-x)), steps)


def berxit(run, factor):
    logits, u = train.outputs(baselines.berxit(run, factor * run.args.epochs), run.dev, run.args)
    return Outcome(logits, lambda x: baselines.leave(logits, u.sigmoid() < x), [0.0, 1.001])


def palbert(run, factor):
    logits, z = train.outputs(baselines.palbert(run, factor * run.args.epochs), run.dev, run.args)
    return Outcome(logits, lambda x: baselines.simulate_palbert(logits, z, 1 - x), [0.0, 1.0])


def dact_over_tau(run, factor):
    """Rule (4), with the halting units trained anew at other prices; the answers stay."""
    run = trained_longer(run, factor)
    models = {run.args.tau: run.dact, **baselines.dact_over_tau(run, TAUS)}
    of_dev = train.Vectors(run.dact.backbone, run.dev, run.args)  # one backbone for all of them
    found = {tau: train.predict(train.over_vectors(each).early_exit, of_dev, run.args) for tau, each in models.items()}
    logits, _ = baselines.logits_of(run.dact, of_dev, run.args)
    return Outcome(logits, lambda tau: (found[tau].label, found[tau].exit_block), sorted(found))


def dact_by_entropy(run, factor):
    """Section 3.1's confidence function on DACT's backbone and heads as stage 2 left them."""
    run = trained_longer(run, factor)
    of_dev = train.Vectors(run.dact.backbone, run.dev, run.args)
    return by_entropy(run, baselines.logits_of(run.dact, of_dev, run.args)[0])


def trained_longer(run, factor):
    """The run, or one of the same stage 1 whose stage 2 has `factor` times the epochs."""
    if factor == 1:
        return run
    own = {"out": run.folder / f"stage2-{factor:g}", "epochs": factor * run.args.epochs, "model": None, "resume": True}
    own |= {"stage1": str(run.folder / "stage1.pt"), "overwrite": False}
    return made(argparse.Namespace(**vars(run.args) | own), run.splits)


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
    N, answers, settings = len(run.dact.backbone.blocks), outcome.logits.argmax(-1), outcome.knob
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
    found = load_found(run)
    for number, (name, (outcome_of, settings)) in enumerate(systems.items(), start=1):
        for setting in settings:
            if str(setting) not in found.setdefault(name, {}):
                print(f"held-out fifth: {name}, setting {setting}, system {number} of {len(systems)}")
                found[name][str(setting)] = read_off(curve(run, outcome_of(run, setting)))[-1]
                save_found(run, found)
        print(f"held-out fifth: {name}, area " + ", ".join(f"{found[name][str(x)]:.2f} ({x})" for x in settings))
    chosen = {name: max(settings, key=lambda x: found[name][str(x)]) for name, (_, settings) in systems.items()}
    return chosen, max(OURS, key=lambda name: max(found[name].values()))


def measured(run, systems, chosen):
    """What there is to say of one seed's run, with what its table1.json has of it already.

    {"rows": {row: [metric %, saved %]}, "curves": {system: points}, "by entropy": {system: points if its heads left by
    their entropy}, "heads": {system: [metric of each block's head]}, "chosen": {system: its setting}}
    """
    found = {"rows": {}, "curves": {}, "by entropy": {}, "heads": {}, "chosen": {}} | load_found(run)
    metric, rules = data.TASKS[run.args.task].metrics[0], run.metrics["rules"]
    for row, each in {"majority class": run.metrics["majority"], "base": run.metrics["full"]}.items():
        found["rows"][row] = each[metric], 0.0
    for rule, each in rules.items():
        found["rows"][f"DACT, {train.RULE_NAMES[rule]}"] = each[metric], each["saved"]
    for number, (name, (outcome_of, _)) in enumerate(systems.items(), start=1):
        if found["chosen"].get(name) == str(chosen[name]) and name in found["by entropy"]:
            continue
        print(f"{run.folder}: {name}, system {number} of {len(systems)}")
        outcome = outcome_of(run, chosen[name])
        found["curves"][name] = curve(run, outcome)
        found["by entropy"][name] = curve(run, by_entropy(run, outcome.logits))
        found["heads"][name] = [first_metric(run, labels) for labels in outcome.logits.argmax(-1)]
        if name == "DeeBERT":
            for S in (0.25, 0.5, 0.75):
                found["rows"][f"DeeBERT, S = {S:.2f}"] = point(run, *outcome.leave(S))
        found["chosen"][name] = str(chosen[name])
        save_found(run, found)
    if "base, stage 1 twice" not in found["rows"]:
        found["rows"]["base, stage 1 twice"] = whole(run, baselines.longer(run))
    if FIRST not in found["curves"]:
        N, points = len(run.dact.backbone.blocks), [found["rows"]["base"]]
        depths = [round(N * (1 - depth / 100), 6) for depth in DEPTHS.values()]
        for k in sorted({*map(math.floor, depths), *map(math.ceil, depths)} - {0, N}):
            print(f"{run.folder}: the first {k} of {N} blocks")
            points.append(whole(run, baselines.first_blocks(run, k), k))
        found["curves"][FIRST] = sorted((saved, metric, 0.0) for metric, saved in points)
    save_found(run, found)
    curves = {name: found["curves"][name] for name in [*systems, FIRST]}  # in this order, and no others
    return found | {"curves": curves, "heads": {name: found["heads"][name] for name in systems}}


def whole(run, model, k=None):
    """`point` of a `BertClassifier` that runs k blocks, by default all, on every example."""
    k = k or len(run.dact.backbone.blocks)
    halted = train.predict(lambda *inputs: train.all_blocks(model(*inputs), k), run.dev, run.args)
    return point(run, halted.label, halted.exit_block)


def point(run, labels, exit_block):
    """(first metric %, blocks saved %) of labels and exits (n,) on the dev set."""
    return first_metric(run, labels), train.blocks_used(exit_block, len(run.dact.backbone.blocks))["saved"]


def load_found(run):
    """The content of a run's table1.json; {} if there is none."""
    path = run.trained / "table1.json"
    with data.reading(path, "delete it to measure again"):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def save_found(run, found):
    run.trained.mkdir(exist_ok=True)
    train.write_whole(run.trained / "table1.json", json.dumps(found, indent=1).encode())


# ---- Tables over the seeds ------------------------------------------------------------------------------------------


def markdown(args, chosen, form, results):
    """The tables of a task and a model as Markdown."""
    task, model = args.task, Path(args.model).name
    metric, seeds = data.TASKS[task].metrics[0], len(results)
    paper = "RoBERTa-base" if "roberta" in model.lower() else "BERT-base"
    lines = [f"**{task}, {model}**, {seeds} seed(s), {metric} in percent", "",
             f"| as trained | {metric} | blocks saved | the paper's {paper} |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for row in results[0]["rows"]:
        both = [mean_and_deviation([result["rows"][row][i] for result in results]) for i in (0, 1)]
        of_paper = "{}, {} % saved".format(*PAPER[paper][task][row]) if row in PAPER[paper].get(task, {}) else ""
        lines.append(f"| {row} | {both[0]} | {both[1]} | {of_paper} |")
    columns = f"{' | '.join(DEPTHS)} | area"
    lines += ["", f"| blocks saved | {columns} | chosen |", "| --- |" + " ---: |" * 5 + " --- |"]
    for name in results[0]["curves"]:
        cells = map(mean_and_deviation, zip(*(read_off(result["curves"][name]) for result in results)))
        lines.append(f"| {name} | {' | '.join(cells)} | {in_words(chosen.get(name), args.epochs)} |")
    lines += ["", f"| difference | {columns} |", "| --- |" + " ---: |" * 5]
    found = [differences(result, form) for result in results]
    for what in found[0]:
        if any(np.any(each[what]) for each in found):  # all 0 for what leaves by entropy itself
            lines.append(f"| {what} | {' | '.join(map(interval, zip(*(each[what] for each in found))))} |")
    N = len(results[0]["heads"][form])
    lines += ["", f"| the head of block | {' | '.join(str(n) for n in range(1, N + 1))} |", "| --- |" + " ---: |" * N]
    for name in results[0]["heads"]:
        means = np.mean([result["heads"][name] for result in results], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def differences(result, form):
    """{what: by how much (5,) one curve of a seed is above another}"""
    curves = {name: read_off(points) for name, points in result["curves"].items()}
    found = {f"{form} less {name}": curves[form] - curves[name] for name in curves if name != form}
    for name in result["heads"]:
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


def draw(args, results):
    """The mean curves over the seeds, and the operating points of DACT and of the base."""
    figure, axis = plt.subplots(figsize=(7, 5))
    for name in results[0]["curves"]:
        means = np.mean([at(result["curves"][name], GRID) for result in results], axis=0)
        line, width = ("-", 2) if name in OURS else ("--", 1.2)
        axis.plot(GRID, means, line, color=COLOURS[name], linewidth=width, label=name)
    for row, mark in (("base", "s"), ("DACT, rule (4)", "o"), ("DACT, exact rule", "*")):
        reached, saved = np.mean([result["rows"][row] for result in results], axis=0)
        axis.plot(saved, reached, mark, color=COLOURS.get(row, "k"), markersize=9, label=f"{row}, as trained")
    axis.axhline(results[0]["rows"]["majority class"][0], color="grey", linestyle=":", label="majority class")
    title = f"{args.task}, mean of {len(results)} seed(s)"
    axis.set(xlabel="blocks saved (%)", ylabel=f"{data.TASKS[args.task].metrics[0]} (%)", title=title)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
