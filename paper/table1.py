"""Table 1: DACT-BERT beside DeeBERT, and beside what else stops early, over tasks, models and seeds.

    python paper/table1.py runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 runs/rte-0 ...

The runs are finished ones of train.py; those that differ in nothing but their seed make one table. The other
systems are trained from each run's stage 1 and kept in its folder, what was measured is kept in its table1.json, so that
an interrupted table goes on. Leaves table1.md and table1.png in --out.

A threshold is chosen by how much it saves on the dev set, never by what it answers there: no label is looked at.
"""

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import baselines
import matplotlib
import torch

import dact
import data
import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The paper's Table 1, BERT-base: {task: {row: (metric, blocks saved)}} in percent
PAPER = {
    "mrpc": {"base": (88.2, 0.0), "DeeBERT, S = 0.25": (87.3, 30.8), "DeeBERT, S = 0.50": (85.2, 49.1),
             "DeeBERT, S = 0.75": (79.9, 91.7), "DACT, rule (4)": (85.4, 48.9)},
    "qnli": {"base": (91.0, 0.0), "DeeBERT, S = 0.25": (89.1, 40.5), "DeeBERT, S = 0.50": (85.5, 58.2),
             "DeeBERT, S = 0.75": (59.6, 91.7), "DACT, rule (4)": (87.5, 46.7)},
    "rte": {"base": (69.9, 0.0), "DeeBERT, S = 0.25": (69.8, 5.3), "DeeBERT, S = 0.50": (68.1, 21.2),
            "DeeBERT, S = 0.75": (52.0, 91.7), "DACT, rule (4)": (62.7, 50.0)},
}  # fmt: skip
SETTINGS = ("epochs", "batch", "lr", "head_lr", "tau", "halt_bias", "head_loss")  # two runs of one table agree on them
SYSTEMS = ("deebert", "fastbert", "pabee", "first")


def main(argv):
    without = {"nargs": "+", "choices": SYSTEMS, "default": [], "help": "leave these systems out"}
    out = {"help": "folder for table1.md and table1.png (default: that of the first run)"}
    args = baselines.arguments(__doc__, ("--without", without), ("--out", out)).parse_args(argv)
    systems = [system for system in SYSTEMS if system not in args.without]
    tables = defaultdict(list)
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


def measured(folder, data_folder, systems):
    """{"rows": {row: {metric: %, "saved": %, "seconds": s}}, "curves": {system: [[saved %, metric %]]}} of one run."""
    path = Path(folder) / "table1.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
            if found["systems"] == systems and found["task"] and found["model"] and found["settings"]:
                return found
        except (ValueError, KeyError, TypeError):
            raise data.InputError(f"{path}: not a file of table1.py; delete it to measure again") from None
    run = baselines.open_run(folder, data_folder)
    result = {"systems": systems, "task": run.args.task, "model": Path(run.args.model).name, "seed": run.args.seed}
    result["settings"] = ", ".join(f"{name.replace('_', ' ')} {getattr(run.args, name):g}" for name in SETTINGS)
    result |= measure(run, systems)
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
    curves, features = {}, None
    if {"deebert", "fastbert"} & set(systems):
        features = baselines.train_features(run)
    if "deebert" in systems:
        exits, rule = baselines.deebert(run, features), baselines.entropy_rule
        logits = baselines.dev_logits(run, exits)
        choices = {f"S = {S:.2f}": S for S in (0.25, 0.5, 0.75)}
        choices["S for half the blocks"] = baselines.setting(logits, rule, N / 2, math.log(logits.shape[-1]))
        choices["S for DACT's depth"] = baselines.setting(logits, rule, depth, math.log(logits.shape[-1]))
        for name, S in choices.items():
            forms[f"DeeBERT, {name}"] = partial(exits.early_exit, rule=partial(rule, S=S))
        grid = [math.log(logits.shape[-1]) * i / 50 for i in range(52)]
        curves["DeeBERT, over S"] = curve(run, logits, [partial(rule, S=S) for S in grid])
    if "fastbert" in systems:
        exits, rule = baselines.fastbert(run, features), baselines.speed_rule
        logits = baselines.dev_logits(run, exits)
        speed = baselines.setting(logits, rule, depth, 1.0)
        forms["FastBERT, speed for DACT's depth"] = partial(exits.early_exit, rule=partial(rule, speed=speed))
        curves["FastBERT, over speed"] = curve(run, logits, [partial(rule, speed=i / 50) for i in range(52)])
    if "pabee" in systems:
        exits, rule = baselines.pabee(run), baselines.patience_rule
        logits = baselines.dev_logits(run, exits)
        t = min(range(N), key=lambda t: abs(baselines.simulate(logits, partial(rule, t=t))[1].double().mean() - depth))
        forms["PABEE, t nearest DACT's depth"] = partial(exits.early_exit, rule=partial(rule, t=t))
        curves["PABEE, over t"] = curve(run, logits, [partial(rule, t=t) for t in range(N)])
    if "first" in systems:
        k = round(depth)
        model = baselines.first_blocks(run, k)
        forms["first k blocks, DACT's depth"] = lambda *inputs: train.all_blocks(model(*inputs), k)
    said = train.answer(forms, run.dev, run.args.batch, run.device, run.precision)
    rows = {}
    for form, answers in said.items():
        rows[form] = train.scores(answers.labels, run.dev.labels, run.args.task)
        rows[form] |= {"saved": train.blocks_used(answers, N)["saved"], "seconds": answers.seconds}
    majority = torch.full_like(run.dev.labels, run.train.labels.mode().values.item())
    rows["majority"] = train.scores(majority, run.dev.labels, run.args.task)
    return {"rows": rows, "curves": curves}


def curve(run, logits, rules):
    """[[blocks saved %, first metric %]] of each rule on the dev set."""
    metric, N, points = data.METRICS[data.TASKS[run.args.task].metrics[0]], len(logits), []
    for rule in rules:
        labels, exit_block = baselines.simulate(logits, rule)
        points.append([100 * (1 - exit_block.double().mean().item() / N), metric(labels, run.dev.labels)])
    return points


# ---------------------------------------------------------------------------------------------------------------------
# All runs of one task, model and settings


def markdown(task, model, settings, results):
    """The table of runs that differ in their seed, as Markdown: mean ± standard deviation."""
    metrics = data.TASKS[task].metrics
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [f"**{task.upper() if task != 'toy' else task}, {model}**, seed(s) {seeds}; {settings}", ""]
    lines.append("| | " + " | ".join(metrics) + " | blocks saved | seconds | in the paper (BERT-base) |")
    lines.append("| --- |" + " ---: |" * (len(metrics) + 3))
    order = [
        "majority",
        "base",
        *(row for row in results[0]["rows"] if not row.startswith(("majority", "base", "DACT"))),
    ]
    for row in [*order, "DACT, rule (4)", "DACT, exact rule"]:
        cells = []
        for key in (*metrics, "saved", "seconds"):
            values = [result["rows"][row][key] for result in results if key in result["rows"][row]]
            cells.append(mean_and_deviation(values, "" if key == "seconds" else " %"))
        paper = PAPER.get(task, {}).get(row)
        lines.append(f"| {row} | {' | '.join(cells)} | {f'{paper[0]} %, {paper[1]} %' if paper else ''} |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values, unit):
    """ "88.2 ± 0.4 %"; the deviation is the sample's, and left out for a single value."""
    if not values:
        return ""
    values = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {values.std().item():.1f}" if len(values) > 1 else ""
    return f"{values.mean().item():.1f}{deviation}{unit}"


COLOURS = {"DeeBERT, over S": "#D55E00", "FastBERT, over speed": "#009E73", "PABEE, over t": "#CC79A7"}
MARKS = {"base": ("k", "s"), "DACT, rule (4)": ("#0072B2", "o"), "DACT, exact rule": ("#0072B2", "*"),
         "first k blocks, DACT's depth": ("#E69F00", "^")}  # fmt: skip


def draw(tables, path):
    """Metric against blocks saved, one panel for each table: a line for each system and seed."""
    figure, axes = plt.subplots(1, len(tables), figsize=(1 + 4.5 * len(tables), 4), squeeze=False)
    for axis, ((task, model, _), results) in zip(axes[0], tables.items()):
        metric = data.TASKS[task].metrics[0]
        for i, result in enumerate(results):
            for name, points in result["curves"].items():
                saved, scores = zip(*sorted(points))
                label = name if i == 0 else None
                axis.plot(saved, scores, color=COLOURS[name], alpha=0.7, linewidth=1, label=label)
            for row, (colour, marker) in MARKS.items():
                if row in result["rows"]:
                    point = result["rows"][row]
                    label = row if i == 0 else None
                    axis.plot(
                        point["saved"], point[metric], marker, color=colour, markersize=8, label=label, linestyle=""
                    )
        axis.axhline(results[0]["rows"]["majority"][metric], color="grey", linestyle=":", label="majority class")
        axis.set(title=f"{task}, {model}", xlabel="blocks saved (%)", ylabel=f"{metric} (%)")
        axis.legend(fontsize=8)
    figure.tight_layout()
    baselines.save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
