"""Table 1: DACT-BERT beside DeeBERT, and beside what else stops early, over tasks, models and seeds.

    python paper/table1.py runs/mrpc-0 runs/mrpc-1 runs/mrpc-2 runs/rte-0 ...

The runs are finished ones of train.py; those that differ in nothing but their seed make one table. The other
systems are trained from each run's stage 1 and kept in its folder, and so is what was measured (table1.json): an
interrupted table goes on. Leaves table1.md and table1.png in --out.

A threshold is chosen by how much it saves on the dev set, never by what it answers there: no label is looked at. DACT
has three such knobs, and both rules stay safe, for they are so whatever h is: a number taken off all halting biases
after training; the price tau, at which the halting units alone are trained anew; and, in their place, section 3.1's
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
SETTINGS = "epochs batch max_tokens lr head_lr tau head_loss".split()  # and precision
STEEP = 1e4  # weight of the confidence function, in 1 / nats: h is 0 below the threshold and 1 above it
TAUS = (0.005, 0.05, 0.1, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.4, 0.5)  # nats a block
HALF, DEPTH = "half the blocks", "DACT's depth"  # what knobs are turned for
# How a row's name ends: the row of DACT that it is held against
RIVALS = {HALF: f"DACT by entropy, S for {HALF}", DEPTH: "DACT, rule (4)", "base": "DACT, rule (4)",
          "stage 1 twice": "DACT, rule (4)"}  # fmt: skip


def main(argv):
    without = {"nargs": "+", "choices": SYSTEMS, "default": [], "help": "do not train these systems"}
    out = {"help": "folder for table1.md and table1.png (default: that of the first run)"}
    args = baselines.arguments(__doc__, ("--without", without), ("--out", out)).parse_args(argv)
    systems = [system for system in SYSTEMS if system not in args.without]
    folders = defaultdict(dict)  # {table: {seed: folder}}
    for folder in args.runs:  # all of them before one is measured, which takes minutes
        metrics = baselines.read_metrics(folder)
        table, seed = folders[table_of(metrics)], metrics["seed"]
        if seed in table:
            raise data.InputError(f"{folder}: a second run of seed {seed} in one table; leave one of them out")
        table[seed] = folder
    tables = {
        table: [measured(folder, args.data, systems) | {"seed": seed} for seed, folder in runs.items()]
        for table, runs in folders.items()
    }
    out = Path(args.out or args.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(*what, results) for what, results in tables.items())
    print("\n" + text)
    train.write_whole(out / "table1.md", text.encode())
    draw(tables, out / "table1.png")
    print(f"saved {out}/table1.md and table1.png")


# ---- One run --------------------------------------------------------------------------------------------------------


def table_of(metrics):
    """(task, model, settings) of a run's metrics: runs that differ in nothing but their seed make one table."""
    settings = [f"{name.replace('_', ' ')} {metrics[name]:g}" for name in SETTINGS]  # 3 and 3.0 are the same
    return metrics["task"], Path(metrics["model"]).name, ", ".join([*settings, metrics["precision"]])


def measured(folder, data_folder, systems):
    """What there is to say of one run, from its table1.json if that holds these systems (it may hold more).

    {"systems": those trained, "rows": {row: {metric: %, "saved": %, "seconds": s, "time": % of the base's, "shuffled": %,
    "answers": a digit for each dev example}}, "labels": the digits, "curves": {system: [[saved %, metric %]]}, "blocks":
    {system: [% of each block]}, "chosen": {row: x}}
    """
    path = baselines.trained_folder(folder) / "table1.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
            if set(systems) <= set(found["systems"]) and found["labels"]:
                return found
            systems = [system for system in SYSTEMS if system in {*systems, *found["systems"]}]
        except (ValueError, KeyError, TypeError):
            raise data.InputError(f"{path}: not a file of table1.py; delete it to measure again") from None
    run = baselines.open_run(folder, data_folder)
    result = {"systems": systems} | measure(run, systems)
    path.parent.mkdir(exist_ok=True)
    train.write_whole(path, json.dumps(result, indent=1).encode())
    return result


def measure(run, systems):
    """Train what is asked for, choose thresholds, and run all of it over the dev set, batch by batch in turn."""
    contest = Contest(run)
    enter_dact(contest)
    for number, system in enumerate(systems, start=1):
        print(f"{run.folder}: {system}, system {number} of {len(systems)}")
        SYSTEMS[system](contest)
    return contest.results()


class Contest:
    """The systems of one run's table. Each enters with rows to be measured, and with the curve that they lie on.

    variants {row: inputs -> `dact.Halted`}
    chosen   {row: the setting x of the system's knob}
    curves   {system, knob: [[blocks saved %, metric %]]}
    answers  {system: what each block's head answers (N, n) on the n dev examples}
    goals    {what a knob is turned for: mean blocks}
    """

    def __init__(self, run):
        self.run, self.N = run, len(run.dact.backbone.blocks)
        self.goals = {HALF: self.N / 2, DEPTH: run.metrics["rules"]["paper"]["mean_blocks"]}
        self.variants, self.chosen, self.curves, self.answers = {}, {}, {}, {}
        self.of_dev = train.Vectors(run.dact.backbone, run.dev, run.args)
        self.logits, self.z = baselines.logits_of(run.dact, self.of_dev, run.args)
        self.y = self.logits.softmax(-1)
        self.highest_S = 1.001 * math.log(len(run.labels))
        # Computed once, and only if ramps have to be trained.
        self.vectors = cache(partial(baselines.train_vectors, run))

    def enter(self, row, variant, x):
        """variant: x -> what is to be measured."""
        self.chosen[row], self.variants[row] = x, variant(x)

    def turn(self, system, knob, variant, simulated, high, low=0.0, goals=(HALF, DEPTH)):
        """A row for the x from `low` to `high` that uses as many blocks as each goal says, and the curve from `high` to 0.

        simulated: x -> (labels, exit_block); the more x, the fewer blocks.
        """
        for goal in goals:
            x = baselines.bisect_to_depth(simulated, self.goals[goal], high, low)
            self.enter(f"{system}, {knob} for {goal}", variant, x)
        depths = torch.linspace(1, self.N, 4 * self.N - 3).tolist()
        settings = [high, *(baselines.bisect_to_depth(simulated, blocks, high) for blocks in depths), 0.0]
        self.curve(f"{system}, over {knob}", simulated, settings)

    def nearest(self, system, knob, variant, simulated, settings, goals=(HALF, DEPTH)):
        """As `turn`, for a knob of few settings: a row for the one that comes nearest to each goal."""
        used = {x: simulated(x)[1].double().mean().item() for x in settings}
        for goal in goals:
            x = min(settings, key=lambda x: abs(used[x] - self.goals[goal]))
            self.enter(f"{system}, {knob} nearest {goal}", variant, x)
        self.curve(f"{system}, over {knob}", simulated, settings)

    def curve(self, name, simulated, settings):
        """A line of the plot, a point for each setting."""
        self.curves[name] = [point(self.run, *simulated(x)) for x in settings]

    def by(self, system, exits, rule, knob):
        """Two functions of a rule's knob: the variant of an `Exits` under it, and what that would leave where."""
        (logits,) = train.outputs(exits, self.run.dev, self.run.args)
        self.answers[system] = logits.argmax(-1)
        return (
            lambda x: partial(exits.early_exit, rule=partial(rule, **{knob: x})),
            lambda x: baselines.simulate(logits, partial(rule, **{knob: x})),
        )

    def results(self):
        """All variants over the dev set: what `measured` keeps of the run."""
        run, rows = self.run, {}
        task, labels = run.args.task, run.dev.labels
        seconds = train.seconds_of(self.variants, run.dev, run.args)
        for name, variant in self.variants.items():
            predictions = train.predict(variant, run.dev, run.args)
            rows[name] = train.scores(predictions.labels, labels, task)
            rows[name] |= {"saved": train.blocks_used(predictions.exit_block, self.N)["saved"], "seconds": seconds[name]}
            rows[name] |= {"time": 100 * seconds[name] / seconds["base"], "answers": digits(predictions.labels)}
            if (system := name.split(",")[0]) in self.answers:
                chance = train.by_chance(self.answers[system], predictions.exit_block, labels, task)
                rows[name]["shuffled"] = chance[data.TASKS[task].metrics[0]]
        majority = torch.full_like(run.dev.labels, run.train.labels.mode().values.item())
        rows["majority"] = train.scores(majority, run.dev.labels, run.args.task)
        blocks = {
            system.removesuffix(" by entropy"): [first_metric(run, labels) for labels in by_block]
            for system, by_block in self.answers.items()
        }
        return {
            "rows": rows, "labels": digits(run.dev.labels), "curves": self.curves, "blocks": blocks, "chosen": self.chosen
        }  # fmt: skip


def enter_dact(contest):
    """The base, DACT as stage 2 left it, by a lower bias, and by entropy."""
    run, y, z, N = contest.run, contest.y, contest.z, contest.N
    contest.variants |= {
        "base": lambda *inputs: train.all_blocks(run.stage1(*inputs), N),
        "DACT, rule (4)": run.dact.early_exit,
        "DACT, exact rule": partial(run.dact.early_exit, rule=dact.exact_rule),
    }
    contest.turn("DACT", "bias", lambda x: baselines.lowered(run.dact, x).early_exit,
                 lambda x: baselines.simulate_dact(y, z - x), 40.0, -40.0, (HALF,))  # fmt: skip
    H, answers = baselines.entropy(contest.logits), baselines.answers_of(run.dact)
    contest.answers["DACT by entropy"] = y.argmax(-1)
    contest.turn("DACT by entropy", "S",
                 lambda S: baselines.entropy_dact(run.dact, answers, True, S, STEEP).early_exit,
                 lambda S: baselines.simulate_dact(y, STEEP * (H - S)), contest.highest_S)  # fmt: skip


def enter_tau(contest):
    """DACT with its halting units trained anew, at other prices of a block."""
    run = contest.run
    of_train = cache(partial(train.Vectors, run.dact.backbone, run.train, run.args))
    models = baselines.dact_over_tau(run, TAUS, of_train)
    at = {
        tau: baselines.simulate_dact(contest.y, baselines.logits_of(model, contest.of_dev, run.args)[1])
        for tau, model in models.items()
    }
    contest.nearest("DACT", "tau", lambda tau: models[tau].early_exit, at.get, TAUS[::-1], (HALF,))


def enter_longer(contest):
    """The base, trained for as long as DACT."""
    model = baselines.longer(contest.run)
    contest.variants["base, stage 1 twice"] = lambda *inputs: train.all_blocks(model(*inputs), contest.N)


def enter_deebert(contest):
    """At the thresholds of the paper's table, and at those that use as many blocks as DACT."""
    exits = baselines.deebert(contest.run, contest.vectors)
    variant, simulated = contest.by("DeeBERT", exits, baselines.entropy_rule, "S")
    contest.variants |= {f"DeeBERT, S = {S:.2f}": variant(S) for S in (0.25, 0.5, 0.75)}
    contest.turn("DeeBERT", "S", variant, simulated, contest.highest_S)


def enter_fastbert(contest):
    """By its own normalised entropy, the "speed"."""
    exits = baselines.fastbert(contest.run, contest.vectors)
    contest.turn("FastBERT", "speed", *contest.by("FastBERT", exits, baselines.speed_rule, "speed"), 1.001)


def enter_pabee(contest):
    """By patience, and by entropy, which its paper does not do: a control for what the rule is worth."""
    exits = baselines.pabee(contest.run)
    by_entropy = contest.by("PABEE by entropy", exits, baselines.entropy_rule, "S")
    contest.turn("PABEE by entropy", "S", *by_entropy, contest.highest_S)
    by_patience = contest.by("PABEE", exits, baselines.patience_rule, "t")
    contest.nearest("PABEE", "t", *by_patience, range(contest.N))


def enter_first(contest):
    """The first k blocks, for both goals."""

    def variant(k):
        model = baselines.first_blocks(contest.run, k)
        return lambda *inputs: train.all_blocks(model(*inputs), k)

    for goal, blocks in contest.goals.items():
        contest.enter(f"first k blocks, k for {goal}", variant, round(blocks))


# What --without takes, in the order of the table
SYSTEMS = {"tau": enter_tau, "longer": enter_longer, "deebert": enter_deebert, "fastbert": enter_fastbert,
           "pabee": enter_pabee, "first": enter_first}  # fmt: skip


def digits(labels):
    """Classes (n,) as a text of n digits."""
    return "".join(map(str, labels.tolist()))


def first_metric(run, labels):
    """The task's first metric of answers on the dev set, in percent."""
    return data.METRICS[data.TASKS[run.args.task].metrics[0]](labels, run.dev.labels)


def point(run, labels, exit_block):
    """[blocks saved %, first metric %] of the answers on the dev set."""
    return [100 * (1 - exit_block.double().mean().item() / len(run.dact.backbone.blocks)), first_metric(run, labels)]


# ---- All runs of one task, model and settings -----------------------------------------------------------------------


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
    first, last = ["majority", "base", "base, stage 1 twice"], ["DACT, rule (4)", "DACT, exact rule"]
    rows = dict.fromkeys(row for result in results for row in result["rows"])  # of all: one may lack a system
    for row in [*(row for row in first if row in rows), *(row for row in rows if row not in first + last), *last]:
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
    answers_of = [[torch.tensor([*map(int, result["rows"][name]["answers"])]) for name in (row, rival)] for result in both]
    S, E, rng = len(answers_of), len(labels), np.random.default_rng(0)

    def difference(seeds=range(S), examples=slice(None)):
        """The mean over the seeds."""
        right = labels[examples]
        reached = [[data.METRICS[metric](answers[examples], right) for answers in answers_of[seed]] for seed in seeds]
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
        axis.set(title=f"{task}, {model}{seeds}".replace("$", r"\$"), xlabel="blocks saved (%)", ylabel=f"{metric} (%)")
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
