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
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import bert
import data
import train

BERT_BASE = bert.BertConfig(30522, 768, 12, 12, 3072)
STEP = (16, 128)  # sequences, tokens of the training step that is timed
STOCK_WIDTH = 128  # tokens that the stock recipes, and the scripts of DeeBERT, PABEE and FastBERT, pad every row to
SIZES = (1, 2, 4, 8, 16, 32, 64)  # batches of the latency plot


def main(argv):
    args = parse_arguments(argv)
    runs = [baselines.open_run(folder, args.data) for folder in args.runs]
    config = bert.load_pretrained(args.model, 2)[0].bert.config if args.model else BERT_BASE
    args.device, args.precision = train.pick_hardware(args.model)
    print(f"device     {args.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for precision in dict.fromkeys(("float32", args.precision)):
        rate = peak(args.device, precision)
        print(f"peak       {rate / 1e9:.1f} GFLOP/s, measured on a product of two {precision} matrices")
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


def peak(device, precision):
    """The best rate of a product of square matrices that the device shows, in floating-point operations a second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, precision)) for _ in range(2))
    return 2 * size**3 / min(timed({"product": lambda: a @ b}, 5)["product"])


# ---- Early exit -----------------------------------------------------------------------------------------------------


def exit_rows(run, args):
    """Early exit against full depth, and against itself with one example at a time, which is how others evaluate."""
    rows = np.random.default_rng(0).permutation(len(run.dev))[: args.examples]
    part = run.saved.dataset(baselines.part_of(run.splits[1], rows))
    batch, name, width = min(args.batch, len(part)), run.folder.name, min(STOCK_WIDTH, run.saved.config.max_tokens)
    sizes = sorted({batch, *(size for size in SIZES if size <= len(part))})
    seconds, exit_block = sweep(run, part, sizes, width, args.repetitions)
    used = exit_block.double().mean().item() / run.N
    full, early = seconds[batch, "full"], seconds[batch, "early"]
    full_alone, alone, padded = (seconds[1, variant] for variant in ("full", "early", "padded"))
    ratios, shown = divided(early, [used * x for x in full])
    shown += f", {100 * (1 - used):.1f} % of blocks saved, {run.args.precision}"
    row(f"{name}: early exit at batch {batch} / (1 - saved) x full depth", ratios, "<=", 1.05, shown)
    ratios, shown = divided(alone, full_alone)
    row(f"{name}: early exit at batch 1 / full depth", ratios, "<=", used + 0.1, shown)
    ratios, shown = divided(alone, early)
    row(f"{name}: speed-up of batch {batch} over one at a time, same exit", ratios, ">=", 3.0, shown)
    ratios, shown = divided(padded, early)
    row(f"   over one at a time padded to {width} tokens, as others evaluate", ratios, ">=", 3.0, shown)
    draw(run, len(part), seconds)


def sweep(run, part, sizes, width, repetitions):
    """({(batch size, variant): [seconds of each repetition]} over a part of the dev set, its exits (n,)).

    Variants: "full" and "early", and "padded" at batch 1: early exit of single rows, padded to `width` tokens.
    """
    variants = {"full": lambda *inputs: [run.stage1(*inputs).argmax(1)], "early": run.early_exit}
    padded = {"padded": lambda *inputs: run.early_exit(*widened(inputs, part.pad_id, width))}
    found = defaultdict(list)
    for _ in range(repetitions):
        for size in sizes:
            args = argparse.Namespace(**vars(run.args) | {"batch": size})
            given, seconds = train.predict(variants | (padded if size == 1 else {}), part, args)
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


def training_flops(config, B, T, num_classes=2):
    """Floating-point operations that a training step of a BERT classifier needs: 2 for each product and its sum.

    Matrix products alone, as usual. The backward pass takes two for each one of the forward pass.
    """
    D, I = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * D * D + 2 * D * I)  # query, key, value, output; up, down: for each token of each block
    attention = 2 * 2 * T * D  # scores and context: the same
    head = 2 * (D * D + D * num_classes)  # pooler and classifier: for each sequence
    return 3 * B * (config.num_hidden_layers * T * (linear + attention) + head)


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
    """A training step of full rows: time against `transformers`, and model flops against the peak (utilisation)."""
    config = replace(config, max_position_embeddings=512, first_position=0)
    B, T = STEP
    inputs = torch.randint(1, config.vocab_size, (B, T)), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T) > 0
    *inputs, labels = (x.to(args.device) for x in (*inputs, torch.arange(B) % 2))
    steps = {"ours": our_step(config, args.device), "theirs": their_step(config, args.device)}
    variants = {name: partial(step, inputs, labels, args.precision) for name, step in steps.items()}
    peaks = []  # taken between the steps, for on a busy machine the peak changes too
    variants["peak"] = lambda: peaks.append(peak(args.device, args.precision))
    seconds = timed(variants, args.repetitions)
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {B} x {T} tokens, {args.precision}"
    ratios, shown = divided(seconds["ours"], seconds["theirs"])
    row(f"training step ({shape}) / transformers", ratios, "<=", 0.9, shown)
    rates = [training_flops(config, B, T) / taken for taken in seconds["ours"]]
    shown = f"{statistics.median(rates) / 1e9:.1f} of {max(peaks) / 1e9:.1f} GFLOP/s, the best between the steps"
    wanted = 0.4 if args.device.type == "cuda" else 0.65
    row("   its model flops / the measured peak", [rate / max(peaks) for rate in rates], ">=", wanted, shown)


def epoch_rows(config, dataset, args):
    """An epoch over real lengths, estimated from some of its batches, against the stock recipes of `transformers`."""
    config, lengths = replace(config, max_position_embeddings=512, first_position=0), dataset.lengths
    num_classes = int(dataset.labels.max()) + 1
    ours, theirs = (maker(config, args.device, num_classes) for maker in (our_step, their_step))
    grouped = spread(data.training_batches(lengths, args.batch, 0), lengths)
    order = np.random.default_rng(0).permutation(len(lengths))
    shuffled = spread([order[i : i + args.batch] for i in range(0, len(order), args.batch)], lengths)
    recipes = {
        "ours": (ours, grouped, args.precision, 0),
        "dynamic": (theirs, shuffled, args.precision, 0),
        "padded": (theirs, shuffled[:1], "float32", STOCK_WIDTH),
    }
    variants = {name: partial(run_batches, dataset, args.device, *recipe) for name, recipe in recipes.items()}
    epoch = {}
    for name, seconds in timed(variants, args.repetitions).items():
        share = sum(map(len, recipes[name][1])) / len(dataset)
        epoch[name] = [taken / share for taken in seconds]
    shape = f", {config.num_hidden_layers} x {config.hidden_size}, mean length {lengths.mean():.1f}"
    ratios, shown = divided(epoch["padded"], epoch["ours"])
    row(f"epoch of real lengths: speed-up over padding to {STOCK_WIDTH}, float32", ratios, ">=", 5.0, shown + shape)
    ratios, shown = divided(epoch["dynamic"], epoch["ours"])
    row(f"   over dynamic padding, {args.precision}", ratios, ">=", 1.2, shown)


def spread(batches, lengths, count=5):
    """Some of the batches, evenly from the one with the shortest longest row to the one with the longest."""
    batches = sorted(batches, key=lambda indices: lengths[indices].max())
    count = min(count, len(batches))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def run_batches(dataset, device, step, batches, precision, width):
    """Take a step for each batch; width: pad all rows to as many tokens, or 0: to the longest of the batch."""
    for indices in batches:
        inputs, labels = dataset.batch(indices, device)
        step(widened(inputs, dataset.pad_id, width), labels, precision)


def widened(inputs, pad_id, width):
    """Token ids, segments and mask (B, T), padded on the right to `width` tokens unless they have as many."""
    missing = (0, max(0, width - inputs[0].shape[1]))
    return tuple(F.pad(x, missing, value=fill) for x, fill in zip(inputs, (pad_id, 0, False)))


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
    from fakes import VOCAB, google_arrays, write_google

    config = {name: value for name, value in asdict(BERT_BASE).items() if name != "first_position"}
    arrays = {name: array for name, array in google_arrays(config).items() if not name.endswith("adam_m")}
    vocab = VOCAB + [f"word{i}" for i in range(len(VOCAB), BERT_BASE.vocab_size)]
    return write_google(folder, arrays, config, vocab)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
