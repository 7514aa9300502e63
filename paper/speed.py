"""Are saved blocks saved seconds? One table of ratios; the two sides of each are timed in turn in the same run.

    python paper/speed.py                             runs/toy, and random weights of BERT-base's shape
    python paper/speed.py runs/mrpc --model bert-base-uncased        your run; the shape and the loading of a real model

Early exit is measured on finished runs, and drawn over batch sizes into the run's folder (speed.png). A training step
and an epoch stand against `transformers`, with SDPA attention and the same AdamW. Needs requirements-dev.txt.
Shapes: B sequences, T tokens, N blocks.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import baselines  # first, for it puts the top level on the path
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import bert
import data
import train

BERT_BASE = bert.BertConfig(30522, 768, 12, 12, 3072)
STEP = (16, 128)  # sequences, tokens of the training step that is timed
SIZES = (1, 2, 4, 8, 16, 32, 64)  # batches of the latency plot


def main(argv):
    args = parse_arguments(argv)
    runs = [baselines.open_run(folder, args.data) for folder in args.runs]
    config = bert.load_pretrained(args.model, 2)[0].bert.config if args.model else BERT_BASE
    args.device, args.precision = train.pick_hardware(args.model)
    print(f"device     {args.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"\n{'':<66}{'ratio':>8}{'goal':>10}")
    for run in runs:
        exit_rows(run, args)
    of_run = runs[0].saved.config, runs[0].train_set
    for rows, given in ((step_rows, (config,)), (epoch_rows, of_run), (loading_rows, ())):
        try:
            rows(*given, args)
        except (ImportError, FileNotFoundError) as error:  # `transformers`; Linux's /proc
            print(f"not run: {error}")


def parse_arguments(argv):
    parser = baselines.arguments(
        __doc__,
        ("--model", {"help": "shape of the training step, and what is loaded (default: random weights, BERT-base's)"}),
        ("--batch", {"type": baselines.number(int, 2, 65536), "default": 32, "help": "sequences (default: 32)"}),
        ("--examples", {"type": baselines.number(int, 1, 10**6), "default": 128, "help": "of dev (default: 128)"}),
        ("--repetitions", {"type": baselines.number(int, 1, 1000), "default": 3, "help": "of a row (default: 3)"}),
    )
    return parser.parse_args(argv)


# ---- Clock and table ------------------------------------------------------------------------------------------------


def row(what, ratios, sign, goal, detail=""):
    """Print a line of the table: the median of the repetitions' ratios, its goal ("<=" or ">="), least and greatest.

    What slows one repetition down slows both of its sides, so this is steadier than the ratio of two medians.
    """
    ratio = statistics.median(ratios)
    missed = ratio > goal if sign == "<=" else ratio < goal
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}; "
    print(f"{what:<66}{ratio:>8.2f}{sign:>5}{goal:>5.2f} {'! ' if missed else '  '} {spread}{detail}", flush=True)


def divided(first, second):
    """The ratios of two lists of seconds, and their medians in words."""
    medians = " against ".join(f"{statistics.median(seconds):.3g}" for seconds in (first, second))
    return [x / y for x, y in zip(first, second)], f"{medians} s"


def timed(variants, repetitions):
    """{name: [seconds of each repetition]} of functions without arguments, run in turn; a first round only warms up."""
    seconds = {name: [] for name in variants}
    for _ in range(repetitions + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: taken[1:] for name, taken in seconds.items()}


# ---- Early exit -----------------------------------------------------------------------------------------------------


def exit_rows(run, args):
    """Early exit against full depth, and against itself with one example at a time, which is how others evaluate."""
    rows = np.random.default_rng(0).permutation(len(run.dev))[: args.examples]
    part = run.saved.dataset(baselines.part_of(run.splits[1], rows))
    batch, name = min(args.batch, len(part)), run.folder.name
    sizes = sorted({batch, *(size for size in SIZES if size <= len(part))})
    seconds, exit_block = sweep(run, part, sizes, args.repetitions)
    used = exit_block.double().mean().item() / run.N
    full, early = seconds[batch, "full"], seconds[batch, "early"]
    full_alone, alone = (seconds[1, variant] for variant in ("full", "early"))
    ratios, shown = divided(early, [used * x for x in full])
    shown += f", {100 * (1 - used):.1f} % of blocks saved, {run.args.precision}"
    row(f"{name}: early exit at batch {batch} / (1 - saved) x full depth", ratios, "<=", 1.05, shown)
    ratios, shown = divided(alone, full_alone)
    row(f"{name}: early exit at batch 1 / full depth", ratios, "<=", used + 0.1, shown)
    ratios, shown = divided(alone, early)
    row(f"{name}: speed-up of batch {batch} over one at a time, same exit", ratios, ">=", 3.0, shown)
    draw(run, len(part), seconds)


def sweep(run, part, sizes, repetitions):
    """({(batch size, "full" or "early"): [seconds of each repetition]} over a part of the dev set, its exits (n,))."""
    variants = {"full": lambda *inputs: [run.stage1(*inputs).argmax(1)], "early": run.early_exit}
    found = defaultdict(list)
    for _ in range(repetitions):
        for size in sizes:
            args = argparse.Namespace(**vars(run.args) | {"batch": size})
            given, seconds = train.predict(variants, part, args)
            for name, taken in seconds.items():
                found[size, name].append(taken)
    return found, given["early"][2]


def draw(run, examples, seconds):
    """Latency of a batch against its size: speed.png in the run's folder."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes, sizes = figure.subplots(), sorted({size for size, _ in seconds})
    for variant, label in (("full", "full depth"), ("early", "early exit")):
        latency = [1000 * statistics.median(seconds[size, variant]) * size / examples for size in sizes]
        axes.plot(sizes, latency, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, sizes)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="sequences in a batch", ylabel="milliseconds a batch")
    axes.set_title(f"{run.folder.name} ({run.args.device})")
    axes.legend()
    baselines.save_figure(figure, run.folder / "speed.png")


# ---- Training -------------------------------------------------------------------------------------------------------


def stepper(model, loss_of, device):
    """A function (inputs, labels, precision) that takes a training step; loss_of: (model, inputs, labels) -> scalar."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def step(inputs, labels, precision):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(model, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(config, device, num_classes=2):
    """`stepper` of stage 1 with random weights."""
    model = bert.BertClassifier(bert.Bert(config), bert.Classifier(config, num_classes)).apply(bert.init_weights)
    return stepper(model, lambda *given: train.stage1_loss(*given)[0], device)


def their_step(config, device, num_classes=2):
    """The same model of `transformers`."""
    import transformers

    sizes = asdict(config)
    del sizes["first_position"]
    theirs = transformers.BertConfig(**sizes, num_labels=num_classes)
    model = transformers.AutoModelForSequenceClassification.from_config(theirs, attn_implementation="sdpa")

    def loss_of(model, inputs, labels):
        names = dict(zip(("input_ids", "token_type_ids", "attention_mask"), inputs))
        return model(**names, labels=labels).loss

    return stepper(model, loss_of, device)


def step_rows(config, args):
    """A training step of full rows against `transformers`."""
    config = replace(config, max_position_embeddings=512, first_position=0)
    B, T = STEP
    inputs = torch.randint(1, config.vocab_size, (B, T)), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T) > 0
    *inputs, labels = (x.to(args.device) for x in (*inputs, torch.arange(B) % 2))
    steps = {"ours": our_step(config, args.device), "theirs": their_step(config, args.device)}
    variants = {name: partial(step, inputs, labels, args.precision) for name, step in steps.items()}
    seconds = timed(variants, args.repetitions)
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {B} x {T} tokens, {args.precision}"
    ratios, shown = divided(seconds["ours"], seconds["theirs"])
    row(f"training step ({shape}) / transformers", ratios, "<=", 0.9, shown)


def epoch_rows(config, dataset, args):
    """An epoch over real lengths, estimated from some of its batches, against `transformers` and dynamic padding."""
    config, lengths = replace(config, max_position_embeddings=512, first_position=0), dataset.lengths
    num_classes = int(dataset.labels.max()) + 1
    ours, theirs = (maker(config, args.device, num_classes) for maker in (our_step, their_step))
    grouped = spread(data.training_batches(lengths, args.batch, 0), lengths)
    order = np.random.default_rng(0).permutation(len(lengths))
    shuffled = spread([order[i : i + args.batch] for i in range(0, len(order), args.batch)], lengths)
    recipes = {"ours": (ours, grouped), "dynamic": (theirs, shuffled)}
    variants = {name: partial(run_batches, dataset, args, *recipe) for name, recipe in recipes.items()}
    epoch = {}
    for name, seconds in timed(variants, args.repetitions).items():
        share = sum(map(len, recipes[name][1])) / len(dataset)
        epoch[name] = [taken / share for taken in seconds]
    shape = f", {config.num_hidden_layers} x {config.hidden_size}, mean length {lengths.mean():.1f}"
    ratios, shown = divided(epoch["dynamic"], epoch["ours"])
    row(f"epoch of real lengths: speed-up over dynamic padding, {args.precision}", ratios, ">=", 1.2, shown + shape)


def spread(batches, lengths, count=5):
    """Some of the batches, evenly from the one with the shortest longest row to the one with the longest."""
    batches = sorted(batches, key=lambda indices: lengths[indices].max())
    count = min(count, len(batches))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def run_batches(dataset, args, step, batches):
    """Take a step for each batch."""
    for indices in batches:
        inputs, labels = dataset.batch(indices, args.device)
        step(inputs, labels, args.precision)


# ---- Loading --------------------------------------------------------------------------------------------------------

LOADER = """
import sys, time
import bert

def memory():  # bytes, without the pages of the file itself, which the system takes back when it wants them
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, clock = memory(), time.perf_counter()
model = bert.load_pretrained(sys.argv[1], 2)[0]
print(time.perf_counter() - clock, (memory() - before) / sum(4 * weight.numel() for weight in model.parameters()))
"""


def loading_rows(args):
    """Seconds and memory of loading a model, by default a checkpoint in Google's format of BERT-base's size."""
    Path("/proc/self/status").read_bytes()  # Linux alone has it
    with tempfile.TemporaryDirectory() as folder:
        where = bert.find_model(args.model).resolve() if args.model else write_base(Path(folder))
        found = [load_apart(where) for _ in range(args.repetitions + 1)][1:]  # the first fills the disk cache
    seconds, memory = zip(*found)
    size = args.model or "random weights of BERT-base's shape in Google's format"
    row("loading from the disk cache, in seconds", seconds, "<=", 1.0, size)
    row("   its memory / the weights", memory, "<=", 1.1)


def load_apart(folder):
    """(seconds, memory / weights) of loading a model in a process of its own."""
    command = [sys.executable, "-c", LOADER, str(folder)]
    done = subprocess.run(command, cwd=baselines.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise data.InputError(f"cannot load {folder}: {done.stderr.strip().splitlines()[-1]}")
    return tuple(float(word) for word in done.stdout.split()[-2:])


def write_base(folder):
    """Write a checkpoint of random weights in BERT-base's shape, as Google's zips hold it, into a folder."""
    sys.path.append(str(baselines.ROOT / "tests"))
    from fakes import google_arrays, write_google

    config = {name: value for name, value in asdict(BERT_BASE).items() if name != "first_position"}
    arrays = {name: array for name, array in google_arrays(config).items() if not name.endswith("adam_m")}
    return write_google(folder, arrays, config)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
