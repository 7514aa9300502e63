"""Both fine-tuning stages of DACT-BERT, their evaluation, and the command line.

    python train.py                 the toy task: a tiny BERT from scratch, two minutes on a laptop
    python train.py --task rte      the paper's experiment: downloads Google's BERT-base and GLUE's RTE
    python train.py --explain "the tea was not lovely"     a finished run at work on your own sentence
    torchrun --nproc_per_node 2 train.py --task rte        training on two GPUs, or wherever torchrun starts processes

Stage 1 fine-tunes the backbone and one classifier. Stage 2 starts from it and trains backbone and DACT heads together.

Shapes: B sequences, C classes, N blocks; n examples of a dataset.
"""

import argparse
import copy
import gc
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bert
import dact
import data
from data import InputError

SCRATCH = "toy (from scratch)"  # the name of the model that the toy task has of its own
TOY_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *data.TOY_WORDS]
TOY_CONFIG = bert.BertConfig(
    vocab_size=len(TOY_VOCAB),
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=1,  # with one head a block cannot gather all that a sentence of level 3 turns on
    intermediate_size=128,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,  # the sentences are plenty and without noise: dropout only slows learning down
    attention_probs_dropout_prob=0.0,
)
# {flag: (default, the toy's own, lowest, highest, help)}: a model that starts from nothing wants other numbers.
# DIFFERS: tau is 5e-3 nats in the paper; README.md says why not here. CHOICE: the rest.
SETTINGS = {
    "tau": (0.05, 0.05, 0, 1e3, "price of a block in equation (3), in nats; the paper's: 0.005"),
    "epochs": (3.0, 10.0, 1e-3, 1e4, "passes in each of the two stages"),
    "batch": (32, 64, 1, 65536, "sequences in a batch"),
    "max_tokens": (128, 128, 8, 65536, "longer inputs are cut"),
    "lr": (5e-5, 4e-4, 1e-12, 1e3, "peak learning rate of all but the heads"),
    "head_lr": (1e-3, 1e-3, 1e-12, 1e3, "that of the DACT heads"),
    "head_loss": (1.0, 1.0, 0, 1e3, "weight of every head's own loss in stage 2, beside (3); the paper's: 0"),
    "seed": (0, 0, 0, 2**32 - 1, "of new weights, dropout and shuffling"),
}
RULE_NAMES = {"paper": "rule (4)", "exact": "exact rule"}  # on the screen; the names on the left are --rule's
RUN_FILES = ("stage1.pt", "dact.pt", "metrics.json")
VERSIONS = {"python": sys.version.split()[0], "torch": torch.__version__, "tokenizers": tokenizers.__version__}


# ---- A run ----------------------------------------------------------------------------------------------------------


def run(args, splits=None):
    """Stage 1, stage 2, evaluation; leaves stage1.pt, dact.pt, metrics.json and log.jsonl in args.out.

    splits: (train, dev), two `data.Examples` in the place of the task's own.
    """
    join_processes()
    check_folder(args)
    start, train_set, dev_set, settings = prepare(args, splits)
    log, seconds = open_log(args), {}

    stage1 = start.model.to(args.device)
    if args.stage1 is None:
        seconds["stage1"] = fit("stage 1", stage1.train(), stage1_loss, train_set, args, log)
    save_model(args.out / "stage1.pt", start._replace(model=stage1))
    print(f"stage 1 is done; if what follows is interrupted, add to the same command --stage1 {args.out}/stage1.pt")

    torch.manual_seed(args.seed)  # stage 2 is the same whether stage 1 ran before it or was read from a file
    adaptive = dact.DactBert(copy.deepcopy(stage1.bert), len(data.TASKS[args.task].labels)).to(args.device)
    stage1.cpu()  # makes room on a GPU until it is evaluated
    without_dropout(adaptive.backbone)
    loss = partial(stage2_loss, tau=args.tau, head_loss=args.head_loss)
    seconds["stage2"] = fit("stage 2", adaptive.train(), loss, train_set, args, log)
    save_model(args.out / "dact.pt", start._replace(model=adaptive))

    first = rank() == 0
    leave_processes()
    if first:
        print(f"evaluation on {len(dev_set)} dev examples", flush=True)
        results = evaluate(stage1.to(args.device).eval(), adaptive.eval(), train_set, dev_set, args)
        report(results, args)
        results["seconds"] |= seconds  # of the dev set, and of training
        write_whole(args.out / "metrics.json", json.dumps(settings | results, indent=1).encode())


def prepare(args, splits):
    """What a run starts from (a `Saved`), its two `data.Dataset`s, and the settings that metrics.json keeps.

    Sets args.device and args.precision, and prints the header.
    """
    if rank() > 0:
        dist.barrier()  # until the first process has downloaded everything
    splits = splits or data.load_task(args.task, args.data)
    start = starting_model(args)
    train_set, dev_set = (start.dataset(split) for split in splits)
    if dist.is_initialized() and rank() == 0:
        dist.barrier()
    args.device, args.precision = pick_hardware(start.name, args.precision)
    print(f"device     {args.device}, {args.precision}")
    print(f"model      {start.name}, {sum(p.numel() for p in start.model.parameters()) / 1e6:.1f} M parameters")
    print(f"task       {args.task}, {len(train_set)} training and {len(dev_set)} dev examples, seed {args.seed}")
    print("versions   " + ", ".join(f"{package} {version}" for package, version in VERSIONS.items()))
    settings = {name: getattr(args, name) for name in ("task", "stage1", "precision", "rule", *SETTINGS)}
    more = {"model": start.name, "processes": num_processes(), "versions": VERSIONS}
    return start, train_set, dev_set, settings | more


def starting_model(args):
    """What training starts from, as a `Saved`: the model in --stage1, pretrained weights, or the toy's tiny BERT."""
    torch.manual_seed(args.seed)
    num_classes, name = len(data.find_task(args.task).labels), args.model or "bert-base-uncased"
    if args.stage1 is not None:
        start = load_run(args.stage1, 1, args.task)
        if args.model not in (None, start.name):
            raise InputError(f"{args.stage1} is of {start.name}, not of {args.model}; name another --stage1 or --model")
        return start._replace(max_tokens=args.max_tokens)
    if args.task == "toy" and args.model is None:
        name, tokenizer = SCRATCH, bert.wordpiece_tokenizer(TOY_VOCAB)
        model = bert.BertClassifier(bert.Bert(TOY_CONFIG), bert.Classifier(TOY_CONFIG, num_classes))
        model.apply(bert.init_weights)
    else:
        model, tokenizer = bert.load_pretrained(name, num_classes)
    return Saved(model, tokenizer, name, args.max_tokens, args.task, model.bert.config)


# ---- Training -------------------------------------------------------------------------------------------------------


def stage1_loss(model, inputs, labels):
    """-> (loss,), a scalar."""
    return (torch.nn.functional.cross_entropy(model(*inputs).float(), labels),)


def stage2_loss(model, inputs, labels, tau, head_loss=0.0):
    """-> (loss, price of computation, mean h), scalars. head_loss: weight of every head's own loss."""
    y, h = model(*inputs)
    a, _ = dact.accumulate_all(y, h)
    answer, price = dact.dact_loss(a[-1], h, labels, tau)
    loss = answer + price  # (3)
    if head_loss:
        # DIFFERS: (3) judges a_N alone, so a head learns in proportion to its weight in a_N, and those after a closed
        # gate not at all. Here every head also sees the label: the mean over n of L(y_n, label).
        loss = loss + head_loss * dact.answer_loss(y.flatten(0, 1), labels.repeat(len(y)))
    return loss, price, h.mean()


def without_dropout(backbone):
    """Put all dropout of a backbone at rate 0."""
    # DIFFERS: in the early blocks dropout moves [CLS] 2 to 46 times as far as the input does (by 0.04 against 0.0009
    # after block 1), so no head there can learn from it.
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def fit(stage, model, loss_of, dataset, args, log):
    """Train `model` in place, in its mode (train or eval), for the epochs of args. Returns the seconds it took.

    loss_of: a function like `stage1_loss` or, with halting, like `stage2_loss`. log: an open file; see `show`.
    """
    torch.manual_seed(args.seed + rank())  # each process has a dropout of its own
    per_epoch = -(-len(dataset) // args.batch)
    step, steps = 0, max(1, round(args.epochs * per_epoch))
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    # Under torchrun gradients are shared; of the statistics (`dact.Scale`) those of the first process are carried on.
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    rows, began = [], time.perf_counter()
    while step < steps:
        batches = data.training_batches(dataset.lengths, args.batch, (args.seed, step // per_epoch))
        for indices in batches[: steps - step]:
            step += 1
            inputs, labels = dataset.batch(my_share(indices), args.device)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * warm_up_and_decay(step, steps)
            with autocast(args):
                loss, *halting = loss_of(parallel, inputs, labels)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rows.append(torch.stack([loss, *halting, norm]).detach())  # to read it now would make the device wait
            if step % -(-steps // 20) == 0 or step == steps:
                show(stage, step, steps, rows, len(dataset) / per_epoch, time.perf_counter() - began, log)
                rows = []
    return time.perf_counter() - began


def show(stage, step, steps, rows, per_step, seconds, log):
    """How training goes, on the screen and in the log: means of `rows`, (loss, norm) or (loss, price, mean h, norm).

    per_step: examples. Raises InputError once the norm of a gradient is not finite, as it is where the loss is not.
    """
    loss, *halting, norm = torch.stack(rows).mean(0).tolist()
    if not math.isfinite(norm):
        raise InputError(f"{stage}: the gradient is not finite before step {step}; take a smaller --lr or --head-lr")
    numbers = {"loss": loss} | dict(zip(("price", "mean_h"), halting))
    print(json.dumps({"stage": stage, "step": step, **numbers, "seconds": seconds}), file=log, flush=True)
    line = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())
    line += f"{step * per_step / seconds:>8.0f} examples/s{(steps - step) * seconds / step / 60:>7.1f} min left"
    overwritten = sys.stdout.isatty() and step < steps
    print(f"{stage} {step:>6}/{steps}{line}", end="\r" if overwritten else "\n", flush=True)


def parameter_groups(model, args):
    """For AdamW: decay on matrices only, and a learning rate of its own for what sits on a `DactBert`'s backbone."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = args.lr if name.startswith(("bert.", "classifier.", "backbone.")) else args.head_lr
            groups.setdefault((lr, 0.01 if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": members, "peak_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


def warm_up_and_decay(step, steps):
    """The share of the peak learning rate at a step from 1 to `steps`."""
    warmup = max(1, steps // 10)  # CHOICE: linear warm-up over a tenth of the steps, then linear decay to 0
    return min(step / warmup, (steps - step + 1) / (steps - warmup + 1))


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def evaluate(stage1, adaptive, train_set, dev, args):
    """The scores of every variant of the model on the dev set, and the times of two, as metrics.json keeps them."""
    task, rule, N = args.task, dact.RULES[args.rule], len(adaptive.heads)
    untrained = copy.deepcopy(adaptive)
    for head in untrained.heads:
        head.reset_halting()
    variants = {
        "full": lambda *inputs: [stage1(*inputs).argmax(1)],
        "dact": partial(adaptive.early_exit, rule=rule),
        "exact_rule": partial(adaptive.early_exit, rule=dact.exact_rule),
        "untrained": partial(untrained.early_exit, rule=rule),
        "all_blocks": lambda *inputs: [x.transpose(0, 1) for x in adaptive(*inputs)],
    }
    outputs, seconds = predict(variants, dev, args)
    majority = torch.full_like(dev.labels, train_set.labels.mode().values.item())
    (full,), (early, _, exits) = outputs["full"], outputs["dact"]
    results = {"majority": scores(majority, dev.labels, task), "full": scores(full, dev.labels, task) | {"saved": 0.0}}
    for name in ("dact", "exact_rule", "untrained"):
        label, _, exit_block = outputs[name]
        results[name] = scores(label, dev.labels, task) | blocks_used(exit_block, N)
    y, h = (x.transpose(0, 1) for x in outputs["all_blocks"])  # (N, n, C), (N, n)
    results["by_chance"] = by_chance(y.argmax(-1), exits, dev.labels, task)
    a, _ = dact.accumulate_all(y, h)
    results["same_as_all_blocks"] = (early == a[-1].argmax(-1)).sum().item()
    seconds = {"dev_full": seconds["full"], "dev_early_exit": seconds["dact"]}
    return results | {"groups": by_group(full, early, exits, dev, task), "examples": len(dev), "seconds": seconds}


@torch.no_grad()
def predict(variants, dataset, args):
    """What functions of a batch's inputs give for a whole dataset, and how long they take.

    variants: {name: inputs -> tensors (B, ...)}. Returns {name: [tensors (n, ...), on the CPU]}, {name: seconds}.
    Each batch goes through all in turn, so that they meet the same noise, and through each twice, of which the second
    counts: survivors of an early exit make ever new shapes of batch, and a device's first meeting with a shape is slow.
    """
    batches = data.evaluation_batches(dataset.lengths, args.batch)
    outputs, seconds = {name: [] for name in variants}, dict.fromkeys(variants, 0.0)
    with autocast(args):  # around all: the weights are cast at their first use and kept in bfloat16 to the end
        for indices in batches:
            inputs, _ = dataset.batch(indices, args.device)
            for name, variant in variants.items():
                for _ in range(2):
                    began = time.perf_counter()
                    tensors = [x.cpu() for x in variant(*inputs)]  # waits for the device
                    elapsed = time.perf_counter() - began
                outputs[name].append(tensors)
                seconds[name] += elapsed
    back = torch.from_numpy(np.concatenate(batches).argsort())
    return {name: [torch.cat(column)[back] for column in zip(*outputs[name])] for name in variants}, seconds


def scores(predicted, labels, task):
    """{metric: percent} of predicted classes (n,) against labels (n,)."""
    return {name: data.METRICS[name](predicted, labels) for name in data.TASKS[task].metrics}


def blocks_used(exit_block, N):
    """What halting saved, from exit blocks (n,): percent of blocks, mean exit block, how many left after each block."""
    mean, histogram = exit_block.double().mean().item(), torch.bincount(exit_block, minlength=N + 1)[1:].tolist()
    return {"saved": 100 * (1 - mean / N), "mean_blocks": mean, "exit_histogram": histogram}


def by_chance(answers, exit_block, labels, task, deals=200):
    """`scores` if chance dealt the same exits out among the examples: the mean of so many deals.

    answers (N, n): the class that each block's own y_n gives (a_n holds its own example's halting); exit_block (n,).
    """
    generator, n = torch.Generator().manual_seed(0), len(exit_block)
    dealt = [exit_block[torch.randperm(n, generator=generator)] for _ in range(deals)]
    found = [scores(answers[exits - 1, torch.arange(n)], labels, task) for exits in dealt]
    return {metric: sum(each[metric] for each in found) / deals for metric in found[0]}


def by_group(full, early, exit_block, dev, task):
    """Scores and mean exit block in each group of the dev set, if it has any: the toy's levels, MNLI's two dev files."""
    groups = {}
    for name in dict.fromkeys(dev.groups):
        rows = torch.tensor([group == name for group in dev.groups])
        groups[name] = {kind: scores(x[rows], dev.labels[rows], task) for kind, x in (("full", full), ("dact", early))}
        groups[name]["mean_blocks"] = exit_block[rows].double().mean().item()
    return groups


def report(results, args):
    """The tables at the end of a run."""
    metrics, seconds, rule = data.TASKS[args.task].metrics, results["seconds"], RULE_NAMES[args.rule]
    rows = {"majority": ("majority class", None), "full": ("stage 1, all blocks", seconds["dev_full"]),
            "dact": (f"DACT, {rule}", seconds["dev_early_exit"]), "by_chance": ("  its exits by chance", None),
            "exact_rule": ("DACT, exact rule", None), "untrained": ("untrained halting", None)}  # fmt: skip
    print("\n" + " " * 26 + "".join(f"{name:>10}" for name in metrics) + "   blocks saved   seconds   speed-up")
    for name, (title, took) in rows.items():
        line = f"{title:<26}" + "".join(f"{results[name][metric]:>9.1f}%" for metric in metrics)
        if "saved" in results[name]:
            line += f"{results[name]['saved']:>14.1f}%"
        print(line + (f"{took:>10.2f}{seconds['dev_full'] / took:>10.2f}x" if took else ""))
    same, histogram = results["same_as_all_blocks"], results["dact"]["exit_histogram"]
    print(f"\nearly exit gives DACT's answer after all blocks on {same} of {results['examples']} dev examples")
    print(f"by {rule} so many leave after block 1 to {len(histogram)}: " + " ".join(map(str, histogram)))
    for name, group in results["groups"].items():
        full, early = group["full"][metrics[0]], group["dact"][metrics[0]]
        print(f"{name:<12}stage 1 {full:5.1f}%   DACT {early:5.1f}%   mean blocks {group['mean_blocks']:.2f}")


# ---- The equations at work on one sentence --------------------------------------------------------------------------


@torch.no_grad()
def explain(args):
    """Print, for each block of a finished run, y_n, h_n, p_n, a_n and both sides of the rule, and where it stops."""
    saved = load_run(args.out / "dact.pt")
    inputs = saved.encode(args.explain if len(args.explain) == 1 else [tuple(args.explain)])
    print("tokens: " + " ".join(map(saved.tokenizer.id_to_token, inputs[0][0].tolist())))
    y, h = saved.model(*inputs)  # (N, 1, C), (N, 1)
    a, p = dact.accumulate_all(y, h)
    names, rule = data.TASKS[saved.task].labels, RULE_NAMES[args.rule]
    N, width, stop = len(y), 6 * len(names) + 1, ""
    print(f"y_n and a_n: probabilities of {', '.join(names)}\n")
    print(f"  n  {'y_n':<{width}} h_n    p_n    {'a_n':<{width}} {rule}")
    for n, (y_n, h_n, a_n, p_n) in enumerate(zip(y, h, a, p), start=1):
        left, right = dact.RULES[args.rule](a_n, p_n, N - n)
        line = f"{n:>3}  {decimals(y_n):<{width}} {decimals(h_n)}  {decimals(p_n)}  {decimals(a_n):<{width}} "
        line += f"{decimals(left)} {'>=' if left >= right else '< '} {decimals(right)}"
        print(line + "   not run" * bool(stop))
        if left >= right and not stop:
            stop = f"{rule} stops after block {n} of {N}: {names[a_n.argmax()]}"
    print(f"\n{stop}")


def decimals(tensor):
    return " ".join(f"{x + 0.0:.3f}" for x in tensor.flatten().tolist())  # -0.0 + 0.0 is 0.0


# ---- The command line -----------------------------------------------------------------------------------------------


def main(argv):
    args = parse_arguments(argv)
    run(args) if args.explain is None else explain(args)


def command(action, argv=None):
    """Run action(argv), a program of this repository: its exit status. What a user can mend is one line."""
    sys.stdout.reconfigure(errors="replace")  # a console that has no ± shows ? and goes on
    try:
        action(argv)
        return 0
    except (InputError, OSError) as error:
        line, status = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # so torch says that a memory is full
            raise
        line, status = "error: the memory is full; try a smaller --batch or --max-tokens", 2
    except KeyboardInterrupt:
        line, status = "interrupted; what was finished is kept", 130
    print(line, file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_arguments(argv=None):
    parser = Parser(description="Fine-tune DACT-BERT in the two stages of the paper.")
    add = parser.add_argument_group("the run").add_argument
    add("--task", default="toy", help=f"one of {', '.join(data.TASKS)} (default: toy)")
    add("--model", help="bert-base-uncased (default), bert-small, roberta-base, ..., or a folder; the toy has its own")
    add("--out", help="folder that the run leaves (default: runs/TASK)")
    add("--explain", nargs="+", metavar="TEXT", help="the equations at work on a sentence or pair, by the run in --out")
    add("--overwrite", action="store_true", help="start again although --out holds a run")
    add("--data", help="folder of the GLUE files; missing ones are downloaded (default: ~/.cache/dact-bert/glue)")
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on hardware that has it, else float32")
    add("--stage1", metavar="FILE", help="skip stage 1: start stage 2 from the stage1.pt of an earlier run")
    add("--rule", choices=dact.RULES, default="paper", help="rule that answers: (4), or our exact one (default: paper)")
    paper, ours = (parser.add_argument_group(title) for title in ("of equation (3)", "our settings"))
    for name, (default, toy, _, _, text) in SETTINGS.items():
        add, shown = (paper if name == "tau" else ours).add_argument, f"{text} (default: {default:g}; toy: {toy:g})"
        add(f"--{name.replace('_', '-')}", type=type(default), metavar="NUMBER", help=shown)
    args = parser.parse_args(argv)
    args.task = args.task.lower()  # GLUE itself writes CoLA, SST-2
    for name, (*defaults, low, high, _) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.task == "toy" and args.model is None])
        if not low <= (value := getattr(args, name)) <= high:  # also refuses nan
            raise InputError(f"--{name.replace('_', '-')} is {value}; give a number from {low:g} to {high:g}")
    args.out = Path(args.out or f"runs/{args.task}").expanduser()
    return args


# ---- From here on, what a first reader may skip or look up: hardware, processes, files ------------------------------


def pick_hardware(name, asked=None):
    """(device, precision) for the model of a name: the best device, and `asked` or what it multiplies natively."""
    if name == SCRATCH:  # CHOICE: so small a model is no faster elsewhere, and every reader sees the README's numbers
        torch.set_num_threads(1)
        return torch.device("cpu"), asked or "float32"
    device, native, flags = "cpu", False, Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        device, native = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available() and not dist.is_initialized():  # gradients are not exchanged from there
        device = "mps"
    elif flags.is_file():
        native = {"amx_bf16", "avx512_bf16"} & set(flags.read_text().split())
    return torch.device(device), asked or ("bfloat16" if native else "float32")


def autocast(args):
    """Matrix products in args.precision."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def join_processes():
    """Under torchrun, meet the other processes. Each has its own GPU, and the first one prints and writes files."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is this one from here on
    # The toy stays on the CPU, and so do barriers: in nccl they wait ten minutes at most, which a download can take.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    print(f"started    {num_processes()} processes")


def leave_processes():
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel lies in a cycle, and its threads must end before Python does
        dist.destroy_process_group()


def rank():  # this process's number, from 0
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(indices):
    """This process's rows of a training batch: as many as every other's, or all, if they cannot be shared evenly."""
    return indices if len(indices) % num_processes() else indices[rank() :: num_processes()]


def check_folder(args):
    """Raise InputError if args.out holds a run, unless --overwrite gives it up or --stage1 goes on with it."""
    held = [path.resolve() for path in (args.out / name for name in RUN_FILES) if path.exists()]
    if held and not args.overwrite and held != [Path(args.stage1 or "").resolve()]:
        raise InputError(f"{args.out} holds a run; choose another --out, or add --overwrite")


def open_log(args):
    """A new log.jsonl in args.out, where an earlier run's files end here (but the stage1.pt that this one starts from)."""
    if rank() > 0:
        return open(os.devnull, "w")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES[0 if args.stage1 is None else 1 :]:
        (args.out / name).unlink(missing_ok=True)
    return open(args.out / "log.jsonl", "w", encoding="utf-8")


def write_whole(path, content):
    """In the first process, write bytes beside `path` and rename: never half a file, and safe from a loss of power."""
    if rank() == 0:
        part = Path(f"{path}.part")
        with data.reading(path, "free some space"), open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        print(f"saved      {path}")


class Saved(NamedTuple):
    """A model of a run and what it takes to use it: the content of a stage1.pt or dact.pt."""

    model: torch.nn.Module  # a BertClassifier (stage 1) or a DactBert (stage 2), on the CPU when read from a file
    tokenizer: tokenizers.Tokenizer
    name: str  # of the model that training started from
    max_tokens: int  # longer inputs are cut
    task: str
    config: bert.BertConfig

    def dataset(self, examples):
        longest = min(self.max_tokens, self.config.max_tokens)
        return data.Dataset(examples, self.tokenizer, longest, self.config.pad_token_id)

    def encode(self, texts, device="cpu"):
        """Texts (str, or (str, str) for a pair) -> what the model takes: ids (B, T), segments (B, T), mask (B, T)."""
        texts, wanted = [texts] if isinstance(texts, str) else list(texts), len(data.TASKS[self.task].texts)
        if not texts or any(wanted != (1 if isinstance(text, str) else len(text)) for text in texts):
            raise InputError(f"{self.task} takes {wanted} text(s) an input, two as a tuple; found {data.plain(texts)}")
        dataset = self.dataset(data.Examples(texts, [0] * len(texts)))
        return dataset.batch(range(len(texts)), device)[0]


def save_model(path, saved):
    """Write stage1.pt or dact.pt: all that `load_run` needs."""
    content = {"stage": 2 if isinstance(saved.model, dact.DactBert) else 1, "task": saved.task, "model": saved.name,
               "max_tokens": saved.max_tokens, "config": asdict(saved.config), "tokenizer": saved.tokenizer.to_str(),
               "state": saved.model.state_dict()}  # fmt: skip
    buffer = io.BytesIO()  # in memory first: when a file fails, torch does not say why
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def load_run(path, stage=2, task=None):
    """Open a stage1.pt (stage 1) or dact.pt (2) of a run on `task` (by default on any): `Saved`, in evaluation mode.

    Nothing in the file can run code. Raises InputError for a file that is not of such a run, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; train first, or name the folder of a finished run")
    advice = "name another file, or train again (--overwrite)"
    saved = bert.load_pickle(path, advice=advice)
    with data.reading(path, f"it is no model of a run; {advice}"):
        found, task = (saved["stage"], saved["task"]), task or saved["task"]
        if found != (stage, task):
            raise InputError(f"{path}: stage and task are {data.plain(found)}, expected {(stage, task)}; {advice}")
        config, num_classes = bert.BertConfig.from_dict(saved["config"], path), len(data.find_task(task).labels)
        with torch.device("meta"):  # no time and no memory for weights that the file takes the place of
            model = bert.Bert(config)
            of_stage1 = bert.BertClassifier(model, bert.Classifier(config, num_classes))
            model = of_stage1 if stage == 1 else dact.DactBert(model, num_classes)
        model.load_state_dict(saved["state"], assign=True)
        tokenizer = tokenizers.Tokenizer.from_str(saved["tokenizer"])
        bert.check_tokenizer(tokenizer, config, path)
        return Saved(model.eval(), tokenizer, saved["model"], saved["max_tokens"], task, config)


if __name__ == "__main__":
    sys.exit(command(main))
