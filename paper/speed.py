"""Are saved blocks saved seconds? One table of ratios; the two sides of each are timed in turn in the same run.

    python paper/speed.py                             runs/toy, and random weights of BERT-base's shape
    python paper/speed.py runs/mrpc --task rte        your run; an epoch over the lengths of another task
    python paper/speed.py --model bert-base-uncased --task rte    the shape, the lengths and the loading of a real model

Early exit is measured on finished runs, and drawn over batch sizes into the run's folder (speed.png). A training step
and an epoch stand against `transformers`, with SDPA attention and the same AdamW, where that is installed.
Shapes: B sequences, T tokens, N blocks.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import baselines  # first, for it puts the top level on the path
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import bert
import data
import train

matplotlib.use("Agg")  # files, no windows
BERT_BASE = bert.BertConfig(30522, 768, 12, 12, 3072)
STEP = (16, 128)  # sequences, tokens of the training step that is timed
STOCK_WIDTH = 128  # tokens that the stock recipes, and the scripts of DeeBERT, PABEE and FastBERT, pad every row to
SIZES = (1, 2, 4, 8, 16, 32, 64)  # batches of the latency plot


def main(argv):
    args = parse_arguments(argv)
    device, precision, reason = train.pick_hardware()
    runs = [baselines.open_run(folder, args.data) for folder in args.runs]  # which may set the number of threads
    peaks = {dtype: peak(device, dtype) for dtype in dict.fromkeys(("float32", precision))}
    print(
        f"device     {device}, {precision} ({reason}), {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    )
    for dtype, flops in peaks.items():
        print(f"peak       {flops / 1e9:.1f} GFLOP/s, measured on a product of two {dtype} matrices")
    if precision != "bfloat16":
        print(f"bfloat16   not run: {reason}; training is timed in {precision}")
    config, tokenizer = runs[0].stage1.bert.config, runs[0].tokenizer
    if args.model:
        model, tokenizer = bert.load_pretrained(args.model, 2)
        config = model.bert.config
    dataset = training_set(runs[0], args, tokenizer, config)  # what is wrong with it is said before anything is timed
    print(f"\n{'':<66}{'ratio':>8}{'goal':>10}")
    for run in runs:
        part = run.dev.part(np.random.default_rng(0).permutation(len(run.dev))[: args.examples])
        batch = min(args.batch, len(part))
        seconds = sweep(run, part, sorted({batch, *(size for size in SIZES if size <= len(part))}), args.repetitions)
        show(exit_rows(run, part, seconds, batch))
        draw(run, part, seconds)
    show(step_rows(config if args.model else BERT_BASE, device, precision, args.repetitions))
    show(epoch_rows(config, dataset, args.batch, device, precision, args.repetitions))
    show(loading_rows(args.model, args.repetitions))
    for run in runs:
        print(f"saved      {run.folder / 'speed.png'}")


def parse_arguments(argv):
    parser = baselines.arguments(
        __doc__,
        ("--model", {"help": "shape of training and what is loaded (default: BERT-base's), of the epoch (the run's)"}),
        ("--task", {"help": "task whose lengths the epoch has (default: the first run's)"}),
        ("--batch", {"type": train.number(int, 2, 65536), "default": 32, "help": "sequences in a batch (default: 32)"}),
        ("--examples", {"type": train.number(int, 1, 10**6), "default": 128, "help": "of the dev set (default: 128)"}),
        ("--repetitions", {"type": train.number(int, 1, 1000), "default": 3, "help": "of each row (default: 3)"}),
    )  # fmt: skip
    return parser.parse_args(argv)


# ---- Clock and table ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table."""

    what: str
    ratio: float  # nan: not run
    goal: tuple  # ("<=" or ">=", number)
    detail: str  # the two sides, or why it was not run


def show(rows):
    for what, ratio, (sign, goal), detail in rows:
        number = "-" if math.isnan(ratio) else f"{ratio:.2f}"
        met = math.isnan(ratio) or (ratio <= goal if sign == "<=" else ratio >= goal)
        print(f"{what:<66}{number:>8}{sign:>5}{goal:>5.2f} {'  ' if met else '! '} {detail}", flush=True)


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


def compared(what, first, second, goal, detail):
    """The `Row` of first / second: the median of the repetitions' ratios, and after the detail the least and greatest.

    What slows one repetition down slows both of its sides, so this is steadier than the ratio of two medians.
    """
    ratios = [x / y for x, y in zip(first, second)]
    return Row(what, statistics.median(ratios), goal, f"{detail}; {min(ratios):.2f} to {max(ratios):.2f}")


def medians(*times):
    """The medians of lists of seconds, in words."""
    return " against ".join(f"{statistics.median(seconds):.3g}" for seconds in times) + " s"


def peak(device, dtype):
    """The best rate of a product of square matrices that the device shows, in floating-point operations a second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / min(timed({"product": lambda: a @ b}, 5)["product"])


# ---- Early exit -----------------------------------------------------------------------------------------------------


def sweep(run, part, sizes, repetitions):
    """{(batch size, variant): [seconds of each repetition]} over a `Dataset`, a part of the run's dev set.

    Variants: "full" and "early", and "padded" at batch 1: early exit of single rows as wide as others pad them.
    """
    N = len(run.dact.backbone.blocks)
    variants = {"full": lambda *inputs: train.all_blocks(run.stage1(*inputs), N), "early": run.early_exit}
    padded = {"padded": lambda *inputs: run.early_exit(*widened(inputs, run.dev.pad_id, stock_width(run)))}
    found = defaultdict(list)
    for _ in range(repetitions):
        for size in sizes:
            args = argparse.Namespace(**vars(run.args) | {"batch": size})
            for name, taken in train.seconds_of(variants | (padded if size == 1 else {}), part, args).items():
                found[size, name].append(taken)
    return found


def exit_rows(run, part, seconds, batch):
    """Early exit against full depth, and against itself with one example at a time, which is how others evaluate."""
    exit_block = train.predict(run.early_exit, part, run.args).exit_block
    used = exit_block.double().mean().item() / len(run.dact.backbone.blocks)
    name, full, early = run.folder.name, seconds[batch, "full"], seconds[batch, "early"]
    ideal = [used * x for x in full]
    alone, full_alone, padded = (seconds[1, variant] for variant in ("early", "full", "padded"))

    def rates(*times):
        return " against ".join(f"{len(part) / statistics.median(x):.4g}" for x in times) + " examples/s"

    return [
        compared(f"{name}: early exit at batch {batch} / (1 - saved) x full depth", early, ideal, ("<=", 1.05),
                 f"{medians(early, ideal)}, {100 * (1 - used):.1f} % of blocks saved, {run.args.precision}"),
        compared(f"{name}: early exit at batch 1 / full depth", alone, full_alone, ("<=", used + 0.1),
                 medians(alone, full_alone)),
        compared(f"{name}: examples/s at batch {batch} / one at a time, same exit", alone, early, (">=", 3.0),
                 rates(early, alone)),
        compared(f"   / one at a time padded to {stock_width(run)} tokens, as others evaluate", padded, early,
                 (">=", 3.0), rates(early, padded)),
    ]  # fmt: skip


def stock_width(run):
    """STOCK_WIDTH, or as many tokens as the run's model has positions for."""
    return min(STOCK_WIDTH, run.stage1.bert.config.max_tokens)


def draw(run, part, seconds):
    """Latency of a batch against its size: speed.png in the run's folder."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    sizes = sorted({size for size, _ in seconds})
    for variant, label in (("full", "full depth"), ("early", "early exit")):
        latency = [1000 * statistics.median(seconds[size, variant]) * size / len(part) for size in sizes]
        axes.plot(sizes, latency, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, sizes)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(
        xlabel="sequences in a batch", ylabel="milliseconds a batch", title=f"{run.folder.name} ({run.args.device})"
    )
    axes.legend()
    baselines.save_figure(figure, run.folder / "speed.png")
    plt.close(figure)


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
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.BertConfig(**sizes, num_labels=num_classes), attn_implementation="sdpa"
    )

    def loss_of(model, inputs, labels):
        names = dict(zip(("input_ids", "token_type_ids", "attention_mask"), inputs))
        return model(**names, labels=labels).loss

    return stepper(model, loss_of, device)


def have_transformers():
    return importlib.util.find_spec("transformers") is not None


def step_rows(config, device, precision, repetitions):
    """A training step of full rows: time against `transformers`, and model flops against the peak (utilisation)."""
    config = replace(config, max_position_embeddings=512, first_position=0)
    B, T = STEP
    inputs = torch.randint(1, config.vocab_size, (B, T)), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T) > 0
    *inputs, labels = train.to_device((*inputs, torch.arange(B) % 2), device)
    makers = {"ours": our_step} | ({"theirs": their_step} if have_transformers() else {})
    variants = {name: partial(make(config, device), inputs, labels, precision) for name, make in makers.items()}
    peaks = []  # taken between the steps, for on a busy machine the peak changes too
    variants["peak"] = lambda: peaks.append(peak(device, precision))
    seconds = timed(variants, repetitions)
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {B} x {T} tokens, {precision}"
    what, goal = f"training step ({shape}) / transformers", ("<=", 0.9)
    if "theirs" not in seconds:
        rows = [Row(what, math.nan, goal, "not run: transformers is not installed")]
    else:
        sides = seconds["ours"], seconds["theirs"]
        rows = [compared(what, *sides, goal, medians(*sides))]
    rate = training_flops(config, B, T) / statistics.median(seconds["ours"])
    wanted = 0.4 if device.type == "cuda" else 0.65
    detail = f"{rate / 1e9:.1f} of {max(peaks) / 1e9:.1f} GFLOP/s, the best between the steps"
    return [*rows, Row("   its model flops / the measured peak", rate / max(peaks), (">=", wanted), detail)]


def training_set(run, args, tokenizer, config):
    """The training set of --task, or the run's own."""
    if args.task in (None, run.args.task) and not args.model:
        return run.train_set
    task = args.task or run.args.task
    if task != "toy" and tokenizer.get_vocab_size() == len(train.TOY_VOCAB):
        raise data.InputError(f"the toy tokenizer cannot read {task}; add --model or a run on a task of GLUE")
    examples = data.load_task(task, run.args.data)[0]
    return data.Dataset(examples, tokenizer, min(run.args.max_tokens, 128), config.pad_token_id)


def epoch_rows(config, dataset, batch, device, precision, repetitions):
    """An epoch over real lengths, estimated from some of its batches, against the stock recipes of `transformers`."""
    padded, dynamic = (
        f"epoch of real lengths: speed-up over padding to {STOCK_WIDTH}, float32",
        f"   over dynamic padding, {precision}",
    )
    if not have_transformers():
        reason = "not run: transformers is not installed"
        return [Row(padded, math.nan, (">=", 5.0), reason), Row(dynamic, math.nan, (">=", 1.2), reason)]
    config = replace(config, max_position_embeddings=512, first_position=0)
    num_classes = int(dataset.labels.max()) + 1
    ours, theirs = (maker(config, device, num_classes) for maker in (our_step, their_step))
    lengths = dataset.lengths
    grouped = spread(data.training_batches(lengths, batch, 0), lengths)
    order = np.random.default_rng(0).permutation(len(lengths))
    shuffled = spread([order[i : i + batch] for i in range(0, len(order), batch)], lengths)
    variants = {
        "ours": partial(run_batches, ours, dataset, grouped, device, precision),
        "dynamic": partial(run_batches, theirs, dataset, shuffled, device, precision),
        "padded": partial(run_batches, theirs, dataset, shuffled[:1], device, "float32", STOCK_WIDTH),
    }
    examples = {"ours": grouped, "dynamic": shuffled, "padded": shuffled[:1]}
    examples = {name: sum(map(len, batches)) for name, batches in examples.items()}
    epoch = {
        name: [seconds / examples[name] * len(dataset) for seconds in taken]
        for name, taken in timed(variants, repetitions).items()
    }
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, mean length {lengths.mean():.1f}"
    return [
        compared(padded, epoch["padded"], epoch["ours"], (">=", 5.0),
                 f"{medians(epoch['padded'], epoch['ours'])}, {shape}"),
        compared(dynamic, epoch["dynamic"], epoch["ours"], (">=", 1.2), medians(epoch["dynamic"], epoch["ours"])),
    ]  # fmt: skip


def spread(batches, lengths, count=5):
    """Some of the batches, evenly from the one with the shortest longest row to the one with the longest."""
    batches = sorted(batches, key=lambda indices: lengths[indices].max())
    count = min(count, len(batches))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def run_batches(step, dataset, batches, device, precision, width=0):
    """Take a step for each batch; width: pad all rows to as many tokens, by default to the longest of the batch."""
    for indices in batches:
        inputs, labels = dataset.batch(indices)
        *inputs, labels = train.to_device((*widened(inputs, dataset.pad_id, width), labels), device)
        step(inputs, labels, precision)


def widened(inputs, pad_id, width):
    """Token ids, segments and mask (B, T), padded on the right to `width` tokens unless they have as many."""
    missing = (0, max(0, width - inputs[0].shape[1]))
    return tuple(F.pad(x, missing, value=fill) for x, fill in zip(inputs, (pad_id, 0, False)))


# ---- Loading --------------------------------------------------------------------------------------------------------

LOADER = """
import sys, time
import bert

def peak():  # bytes; not getrusage's, which begins with the peak of the parent process
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before, clock, processor = peak(), time.perf_counter(), time.process_time()
model = bert.load_pretrained(sys.argv[1], 2)[0]
print(time.perf_counter() - clock, time.process_time() - processor)
print((peak() - before) / sum(4 * weight.numel() for weight in model.parameters()))
"""


def loading_rows(name, repetitions):
    """Seconds and peak memory of loading a model, by default a checkpoint in Google's format of BERT-base's size."""
    what, memory = "loading from the disk cache, in seconds", "   its peak memory / the weights"
    if not Path("/proc/self/status").exists():
        return [Row(what, math.nan, ("<=", 1.0), "not run: the peak is read from Linux's /proc")]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if not name:
                write_base(Path(folder))
        except ImportError as error:
            return [Row(what, math.nan, ("<=", 1.0), f"not run: no {error.name}, with which the checkpoint is written")]
        found = [load_apart(name or folder) for _ in range(repetitions + 1)][1:]  # the first fills the disk cache
    clock, processor, peaks = zip(*found)
    size = name or "random weights of BERT-base's shape in Google's format"
    detail = f"{statistics.median(processor):.2f} s of the processor; {size}"
    return [Row(what, statistics.median(clock), ("<=", 1.0), detail), Row(memory, max(peaks), ("<=", 1.3), "")]


def load_apart(name):
    """(seconds, seconds of the processor, peak memory / weights) of loading a model in a process of its own."""
    where = bert.find_model(str(name)).resolve()  # and so downloaded before
    command, folder = [sys.executable, "-c", LOADER, str(where)], Path(bert.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise data.InputError(f"cannot load {name}: {done.stderr.strip().splitlines()[-1]}")
    return tuple(float(word) for word in done.stdout.split()[-3:])


def write_base(folder):
    """Write a checkpoint of random weights in BERT-base's shape, as Google's zips hold it, into a folder."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from fakes import VOCAB, google_arrays, index_bytes

    config = {name: value for name, value in asdict(BERT_BASE).items() if name != "first_position"}
    entries, end = {}, 0
    with open(folder / "bert_model.ckpt.data-00000-of-00001", "wb") as file:
        for name, array in sorted(google_arrays(config).items()):
            if not name.endswith("adam_m"):
                entries[name] = (array.shape, end, array.nbytes)
                end += file.write(array.tobytes())
    (folder / "bert_model.ckpt.index").write_bytes(index_bytes(entries))
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCAB + [f"word{i}" for i in range(len(VOCAB), BERT_BASE.vocab_size)]))


if __name__ == "__main__":
    sys.exit(baselines.command(main))
