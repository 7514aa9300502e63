"""Table 1: DACT-BERT beside DeeBERT, and beside what else stops early, over tasks, models and seeds.

    python paper/table1.py runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 runs/rte-0 ...

The runs are finished ones of train.py; those that differ in nothing but their seed make one table. The other
systems are trained from each run's stage 1 and kept in its folder, and so is what was measured (table1.json): an
interrupted table goes on. Leaves table1.md and table1.png in --out.

A threshold is chosen by how much it saves on the dev set, never by what it answers there: no label is looked at. DACT
has three such knobs, and both rules stay safe, for they are so whatever h is: a number taken off all halting biases
after training; the price tau, at which the halting neurons alone are trained anew; and, in their place, section 3.1's
confidence function, a threshold S on the entropy of y_n ("DACT by entropy": the backbone and the heads of stage 2, left
as DeeBERT leaves).
"""

import json
import math
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import baselines
import matplotlib
import numpy as np
import torch

import dact
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
# Two runs of one table agree on them
SETTINGS = "epochs batch max_tokens lr head_lr tau halt_bias head_loss head_norm".split()  # and precision
STEEP = 1e4  # weight of the confidence function, in 1 / nats: h is 0 below the threshold and 1 above it
TAUS = (0.005, 0.05, 0.1, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.4, 0.5)  # nats a block
GOALS = {"half": "half the blocks", "depth": "DACT's depth"}  # thresholds are chosen for
# How a row's name ends: the row of DACT that it is held against
RIVALS = {"half the blocks": "DACT by entropy, S for half the blocks", "DACT's depth": "DACT, rule (4)",
          "base": "DACT, rule (4)", "stage 1 twice": "DACT, rule (4)"}  # fmt: skip
SYSTEMS = ("tau", "longer", "deebert", "fastbert", "pabee", "first")


def main(argv):
    without = {"nargs": "+", "choices": SYSTEMS, "default": [], "help": "do not train these systems"}
    out = {"help": "folder for table1.md and table1.png (default: that of the first run)"}
    args = baselines.arguments(__doc__, ("--without", without), ("--out", out)).parse_args(argv)
    systems = [system for system in SYSTEMS if system not in args.without]
    tables, seeds = defaultdict(list), set()
    for folder in args.runs:  # all of them before one is measured, which takes minutes
        which = table_of(baselines.read_metrics(folder))
        if which in seeds:
            raise data.InputError(f"{folder}: a second run of seed {which[-1]} in one table; leave one of them out")
        seeds.add(which)
    for folder in args.runs:
        result = measured(folder, args.data, systems)
        tables[result["task"], result["model"], result["settings"]].append(result)
    out = Path(args.out or args.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(*what, results) for what, results in tables.items())
    print("\n" + text)
    train.write_whole(out / "table1.md", lambda file: file.write(text.encode()))
    draw(tables, out / "table1.png")
    print(f"saved {out}/table1.md and table1.png")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def table_of(metrics):
    """(task, model, settings, seed) of a run's metrics: runs that differ in the last alone make one table."""
    settings = [f"{name.replace('_', ' ')} {metrics[name]:g}" for name in SETTINGS]  # 3 and 3.0 are the same
    return metrics["task"], Path(metrics["model"]).name, ", ".join([*settings, metrics["precision"]]), metrics["seed"]


def measured(folder, data_folder, systems):
    """What there is to say of one run, from its table1.json if that holds these systems (it may hold more).

    `table_of` the run, and {"systems": those trained, "rows": {row: {metric: %, "saved": %, "seconds": s, "time": % of the
    base's, "shuffled": %, "answers": a digit for each dev example}}, "labels": the digits, "curves": {system: [[saved %,
    metric %]]}, "blocks": {system: [% of each block]}, "chosen": {row: x}}
    """
    metrics = baselines.read_metrics(folder)
    path = baselines.kept_folder(folder) / "table1.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
            if set(systems) <= set(found["systems"]) and found["labels"]:
                return found
            systems = [system for system in SYSTEMS if system in {*systems, *found["systems"]}]
        except (ValueError, KeyError, TypeError):
            raise data.InputError(f"{path}: not a file of table1.py; delete it to measure again") from None
    run = baselines.open_run(folder, data_folder)
    result = dict(zip(("task", "model", "settings", "seed"), table_of(metrics))) | {"systems": systems}
    result |= measure(run, systems)
    path.parent.mkdir(exist_ok=True)
    train.write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    return result


def measure(run, systems):
    """Train what is asked for, choose thresholds, and run all of it over the dev set, batch by batch in turn."""
    N, depth = len(run.dact.backbone.blocks), run.metrics["rules"]["paper"]["mean_blocks"]
    forms = {
        "base": lambda *inputs: train.all_blocks(run.stage1(*inputs), N),
        "DACT, rule (4)": run.dact.early_exit,
        "DACT, exact rule": partial(run.dact.early_exit, rule=dact.exact_rule),
    }
    if "longer" in systems:
        longer = baselines.longer(run)
        forms["base, stage 1 twice"] = lambda *inputs: train.all_blocks(longer(*inputs), N)
    curves, chosen, targets = {}, {}, {"half": N / 2, "depth": depth}
    said = {}  # {system: what each block's head answers (N, n)}

    def turn(system, knob, form, simulated, high, low=0.0, **wanted):
        """A system with a knob: its curve from 0 to `high`, a row for each of `wanted`, {what for: mean blocks}, from `low`."""
        for goal, blocks in wanted.items():
            row = f"{system}, {knob} for {GOALS[goal]}"
            chosen[row] = baselines.setting(simulated, blocks, high, low)
            forms[row] = form(chosen[row])
        depths = torch.linspace(1, N, 4 * N - 3).tolist()
        settings = [high, *(baselines.setting(simulated, blocks, high) for blocks in depths), 0.0]
        curves[f"{system}, over {knob}"] = [point(run, *simulated(x)) for x in settings]

    def by(system, exits, rule, knob):
        """Two functions of a rule's knob: the exits' form under it, and what that would leave where."""
        (logits,) = baselines.over_dev(run, exits)
        said[system] = logits.argmax(-1)
        return (
            lambda x: partial(exits.early_exit, rule=partial(rule, **{knob: x})),
            lambda x: baselines.simulate(logits, partial(rule, **{knob: x})),
        )

    def nearest(row, knobs, form, simulated, blocks):
        """A row for the knob, of a few, at which a system's use of blocks is nearest to `blocks`."""
        used = {x: simulated(x)[1].double().mean().item() for x in knobs}
        chosen[row] = min(knobs, key=lambda x: abs(used[x] - blocks))
        forms[row] = form(chosen[row])

    of_dev = baselines.Features(run.dact.backbone, run.dev, run.device, run.precision)
    _, y, z = baselines.over_features(run.dact, of_dev)
    turn("DACT", "bias", lambda x: baselines.lowered(run.dact, x).early_exit,
         lambda x: baselines.halted(y, z - x), 40.0, -40.0, half=N / 2)  # fmt: skip
    said["DACT by entropy"] = y.argmax(-1)
    highest, H = 1.001 * math.log(len(run.labels)), baselines.entropy(y.clamp(min=1e-30).log())
    turn("DACT by entropy", "S", lambda S: baselines.EntropyDact(run.dact, True, S, STEEP).to(run.device).early_exit,
         lambda S: baselines.halted(y, STEEP * (H - S)), highest, **targets)  # fmt: skip
    if "tau" in systems:
        of_train = cache(lambda: baselines.Features(run.dact.backbone, run.train, run.device, run.precision))
        models = baselines.dact_over_tau(run, TAUS, of_train)
        at = {tau: baselines.halted(y, baselines.over_features(model, of_dev)[2]) for tau, model in models.items()}
        nearest(f"DACT, tau nearest {GOALS['half']}", TAUS, lambda tau: models[tau].early_exit, at.get, N / 2)
        curves["DACT, over tau"] = [point(run, *at[tau]) for tau in reversed(TAUS)]
    features = cache(partial(baselines.train_features, run))  # computed once, and only if ramps have to be trained
    if "deebert" in systems:
        exits, rule = baselines.deebert(run, features), baselines.entropy_rule
        for S in (0.25, 0.5, 0.75):
            forms[f"DeeBERT, S = {S:.2f}"] = partial(exits.early_exit, rule=partial(rule, S=S))
        turn("DeeBERT", "S", *by("DeeBERT", exits, rule, "S"), highest, **targets)
    if "fastbert" in systems:
        exits, rule = baselines.fastbert(run, features), baselines.speed_rule
        turn("FastBERT", "speed", *by("FastBERT", exits, rule, "speed"), 1.001, **targets)
    if "pabee" in systems:
        exits = baselines.pabee(run)
        turn("PABEE by entropy", "S", *by("PABEE by entropy", exits, baselines.entropy_rule, "S"), highest, **targets)
        form, simulated = by("PABEE", exits, baselines.patience_rule, "t")
        for goal, blocks in targets.items():
            nearest(f"PABEE, t nearest {GOALS[goal]}", range(N), form, simulated, blocks)
        curves["PABEE, over t"] = [point(run, *simulated(t)) for t in range(N)]
    if "first" in systems:
        for goal, blocks in targets.items():
            row, k = f"first k blocks, k for {GOALS[goal]}", round(blocks)
            chosen[row], model = k, baselines.first_blocks(run, k)
            forms[row] = lambda *inputs, model=model, k=k: train.all_blocks(model(*inputs), k)
    answered = train.answer(forms, run.dev, run.args.batch, run.device, run.precision)
    rows = {}
    for form, answers in answered.items():
        rows[form] = train.scores(answers.labels, run.dev.labels, run.args.task)
        rows[form] |= {"saved": train.blocks_used(answers, N)["saved"], "seconds": answers.seconds}
        rows[form]["time"] = 100 * answers.seconds / answered["base"].seconds
        rows[form]["answers"] = digits(answers.labels)
        if (system := form.split(",")[0]) in said:
            rows[form]["shuffled"] = shuffled(said[system], answers.exit_block, partial(first_metric, run))
    majority = torch.full_like(run.dev.labels, run.train.labels.mode().values.item())
    rows["majority"] = train.scores(majority, run.dev.labels, run.args.task)
    blocks = {
        system.removesuffix(" by entropy"): [first_metric(run, labels) for labels in by_block]
        for system, by_block in said.items()
    }
    return {"rows": rows, "labels": digits(run.dev.labels), "curves": curves, "blocks": blocks, "chosen": chosen}


def digits(labels):
    """Classes (n,) as a text of n digits."""
    return "".join(map(str, labels.tolist()))


def first_metric(run, labels):
    """The task's first metric of answers on the dev set, in percent."""
    return data.METRICS[data.TASKS[run.args.task].metrics[0]](labels, run.dev.labels)


def point(run, labels, exit_block):
    """[blocks saved %, first metric %] of the answers on the dev set."""
    return [100 * (1 - exit_block.double().mean().item() / len(run.dact.backbone.blocks)), first_metric(run, labels)]


def shuffled(said, exit_block, score, draws=200):
    """The metric if chance dealt the same exits out among the examples: beyond it is what the choice of who leaves is worth.

    said (N, n): what each block answers; exit_block (n,); score: labels (n,) -> metric. The mean of so many deals.
    """
    rng, n = np.random.default_rng(0), len(exit_block)
    deals = (exit_block[torch.from_numpy(rng.permutation(n))] for _ in range(draws))
    return float(np.mean([score(said[exits - 1, torch.arange(n)]) for exits in deals]))


# ---------------------------------------------------------------------------------------------------------------------
# All runs of one task, model and settings


def markdown(task, model, settings, results):
    """The table of runs that differ in their seed, as Markdown: mean ± standard deviation."""
    metrics = data.TASKS[task].metrics
    kind = "RoBERTa-base" if "roberta" in model.lower() else "BERT-base"
    seeds = ", ".join(str(result["seed"]) for result in results)
    seconds = ", ".join(f"{result['rows']['base']['seconds']:.1f}" for result in results)
    lines = [f"**{task.upper() if task != 'toy' else task}, {model}**, seed(s) {seeds}; {settings}; base: {seconds} s"]
    titles = [*metrics, "blocks saved", "time, of base", f"{metrics[0]}, exits shuffled", f"{metrics[0]} beyond DACT's",
              f"in the paper ({kind})"]  # fmt: skip
    lines += ["", f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    first, last = ["majority", "base"], ["DACT, rule (4)", "DACT, exact rule"]
    rows = dict.fromkeys(row for result in results for row in result["rows"])  # of all: one may lack a system
    for row in [*first, *(row for row in rows if row not in first + last), *last]:
        cells = []
        for key in (*metrics, "saved", "time", "shuffled"):
            values = [result["rows"][row][key] for result in results if key in result["rows"].get(row, ())]
            cells.append(mean_and_deviation(values, len(results)))
        cells.append(beyond(row, results, metrics[0]))
        paper = PAPER[kind].get(task, {}).get(row)
        lines.append(f"| {row} | {' | '.join(cells)} | {f'{paper[0]} %, {paper[1]} %' if paper else ''} |")
    return "\n".join([*lines, "", *heads(results, metrics[0])]) + "\n"


def heads(results, metric):
    """The lines of a table of what every block's head reaches by itself, mean over the seeds; none without such."""
    lines = []
    for system in dict.fromkeys(system for result in results for system in result["blocks"]):
        means = np.mean([result["blocks"][system] for result in results if system in result["blocks"]], axis=0)
        if not lines:
            numbers = " | ".join(str(n) for n, _ in enumerate(means, start=1))
            lines = [f"| {metric} of the head of block | {numbers} |", "| --- |" + " ---: |" * len(means)]
        lines.append(f"| {system} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return lines


def mean_and_deviation(values, results):
    """ "88.2 ± 0.4 %"; the deviation is the sample's, and left out for a single value. It says if a seed is missing."""
    if not values:
        return ""
    values = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {values.std().item():.1f}" if len(values) > 1 else ""
    return f"{values.mean().item():.1f}{deviation} %" + f" ({len(values)} of {results})" * (len(values) < results)


def beyond(row, results, metric, draws=1000):
    """What a row reaches beyond its rival, in points, and in brackets its 95 % interval: "-0.8 (-2.4 to +0.9)".

    The rival is DACT at about as many blocks; of the base, which runs all, DACT by rule (4). The interval is that of a
    paired bootstrap: seeds, dev examples and both are drawn again and again, with replacement.
    """
    rival = next((rival for ending, rival in RIVALS.items() if row.endswith(ending)), row)
    both = [result for result in results if {row, rival} <= result["rows"].keys()]
    if rival == row or not both:
        return ""
    labels = torch.tensor([*map(int, both[0]["labels"])])
    said = [[torch.tensor([*map(int, result["rows"][name]["answers"])]) for name in (row, rival)] for result in both]
    S, E, rng = len(said), len(labels), np.random.default_rng(0)

    def difference(seeds=range(S), examples=slice(None)):
        """The mean over the seeds."""
        right = labels[examples]
        reached = [[data.METRICS[metric](answers[examples], right) for answers in said[seed]] for seed in seeds]
        return np.subtract(*np.mean(reached, axis=0))

    drawn = []
    for _ in range(draws):
        seeds, examples = rng.integers(S, size=S), torch.from_numpy(rng.integers(E, size=E))
        drawn.append([difference(seeds), difference(examples=examples), difference(seeds, examples)])
    of_seeds, of_examples, of_both = np.var(drawn, axis=0)
    # Both drawn at once would say too much: what is noise of one seed on one example alone is in it three times (Owen,
    # 2007, "The pigeonhole bootstrap"), and once in each of the other two. This leaves it once.
    error = math.sqrt(max(2 * (of_seeds + of_examples) - of_both, of_examples))
    found = difference()
    return f"{found:+.1f} ({found - 1.96 * error:+.1f} to {found + 1.96 * error:+.1f})"


COLOURS = {"DACT": "#0072B2", "DACT by entropy": "#56B4E9", "DeeBERT": "#D55E00", "FastBERT": "#009E73",
           "PABEE": "#CC79A7", "PABEE by entropy": "#999933"}  # fmt: skip
MARKS = {"base": ("k", "s"), "first k blocks": ("#E69F00", "^"),
         "DACT, rule (4)": (COLOURS["DACT"], "o"), "DACT, exact rule": (COLOURS["DACT"], "*")}  # fmt: skip


def draw(tables, path):
    """Metric against blocks saved, one panel for each table: a line for each system, the mean over the seeds."""
    figure, axes = plt.subplots(1, len(tables), figsize=(1 + 4.5 * len(tables), 5.2), squeeze=False)
    shown = {}  # one legend for all panels, under them: {label: line}
    for axis, ((task, model, _), results) in zip(axes[0], tables.items()):
        metric = data.TASKS[task].metrics[0]
        for name in dict.fromkeys(name for result in results for name in result["curves"]):
            line = ":" if name.endswith("bias") else "-"
            curve = mean_curve([result["curves"][name] for result in results if name in result["curves"]])
            shown[name] = axis.plot(*curve, line, color=COLOURS[name.split(",")[0]], linewidth=1.5)[0]
        for row in dict.fromkeys(row for result in results for row in result["rows"]):
            name = "first k blocks" if row.startswith("first") else row
            if name in MARKS:
                found = [result["rows"][row] for result in results if row in result["rows"]]
                saved, reached = (np.mean([each[key] for each in found]) for key in ("saved", metric))
                colour, mark = MARKS[name]
                shown[name] = axis.plot(saved, reached, mark, color=colour, markersize=8, linestyle="")[0]
        majority = results[0]["rows"]["majority"][metric]
        shown["majority class"] = axis.axhline(majority, color="grey", linestyle=":")
        seeds = f", mean of {len(results)} seeds" * (len(results) > 1)
        axis.set(title=f"{task}, {model}{seeds}", xlabel="blocks saved (%)", ylabel=f"{metric} (%)")
    columns = 2 * len(tables)
    height = 0.2 * -(-len(shown) // columns) / 5.2
    figure.legend(shown.values(), shown, loc="lower center", ncols=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, height + 0.02, 1, 1))
    baselines.save_figure(figure, path, dpi=110)


def mean_curve(curves):
    """The mean of curves [[saved, metric]], over as much of the saving as all of them reach: (saved, metric)."""
    curves = [np.array(sorted(points)).T for points in curves]
    saved = np.linspace(max(points[0, 0] for points in curves), min(points[0, -1] for points in curves), 60)
    return saved, np.mean([np.interp(saved, *points) for points in curves], axis=0)


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
