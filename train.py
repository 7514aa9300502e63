"""Both fine-tuning stages of DACT-BERT, their evaluation, and the command line.

    python train.py                 the toy task: a tiny BERT from scratch, two minutes on a laptop
    python train.py --task rte      the paper's experiment: downloads Google's BERT-base and GLUE's RTE
    python train.py --explain "the tea was not lovely"     a finished run at work on your own sentence
    torchrun --nproc_per_node 2 train.py --task rte        the same on two GPUs, or wherever torchrun starts processes

Stage 1 fine-tunes the backbone and one classifier. Stage 2 starts from it and trains backbone and DACT heads together;
then the halting units learn once more, alone.

Shapes: B sequences, C classes, N blocks, D hidden size; n examples of a dataset.
"""

import argparse
import copy
import gc
import io
import json
import math
import os
import platform
import signal
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
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
)
# (pretrained, toy from scratch): what suits the one does not suit a model that starts from nothing.
# DIFFERS: tau is 5e-3 nats in the paper; README.md says why not here. CHOICE: the rest.
DEFAULTS = {"epochs": (3, 16), "batch": (32, 64), "lr": (5e-5, 4e-4), "tau": (0.035, 0.05), "head_loss": (1.0, 0.3)}
# What a setting may be, by the flags and in a metrics.json: (kind, lowest, highest)
RANGES = {
    "seed": (int, 0, 2**32 - 1), "tau": (float, 0, 1e3), "epochs": (float, 1e-3, 1e4), "max_tokens": (int, 8, 65536),
    "batch": (int, 1, 65536), "lr": (float, 1e-12, 1e3), "head_lr": (float, 1e-12, 1e3), "head_loss": (float, 0, 1e3),
}  # fmt: skip
# CHOICE: halting learns on so many examples at most, for their vectors (4 N D bytes each) have to fit into memory.
MOST_FOR_HALTING = 20_000
PRECISIONS = ("float32", "bfloat16")
RULE_NAMES = {"paper": "rule (4)", "exact": "exact rule"}  # on the screen; the names on the left are --rule's


# ---- A run ----------------------------------------------------------------------------------------------------------


def run(args, splits=None):
    """Stage 1, stage 2, evaluation; leaves stage1.pt, dact.pt, metrics.json and log.jsonl in args.out.

    splits: (train, dev), two `data.Examples` in the place of the task's own.
    """
    args.device, args.precision, why = pick_hardware(args.precision)
    check_folder(args)
    finished = finished_stages(args)  # before an interruption: none, stage 1, or both
    start = finished[0] if finished else starting_model(args)
    if start.name == SCRATCH:
        torch.set_num_threads(1)  # CHOICE: so small a model is no faster on more, and so it rounds alike on any machine
    splits = splits or data.load_task(args.task, args.data)
    train_set, dev_set = (start.dataset(split) for split in splits)
    settings = settings_of(args, splits, finished)
    print(f"device     {args.device}, {args.precision} ({why})")
    print(f"model      {start.name}, {sum(p.numel() for p in start.model.parameters()) / 1e6:.1f} M parameters")
    print(f"task       {args.task}, {len(train_set)} training and {len(dev_set)} dev examples, seed {args.seed}")
    print("versions   " + ", ".join(f"{package} {version}" for package, version in VERSIONS.items()))
    record = Record(args.out, {"settings": settings}, finished, keep_stage1=args.stage1 is not None)

    stage1 = start.model.to(args.device)
    if not finished:
        if args.stage1 is None:
            fit("stage 1", stage1, stage1_loss, train_set, args, record)
        save_model(args.out / "stage1.pt", start._replace(settings=settings, seconds=record.seconds))

    torch.manual_seed(args.seed)  # stage 2 is the same whether stage 1 ran before it or was read from a file
    if len(finished) > 1:
        adaptive = finished[1].model.to(args.device)
    else:
        adaptive = dact.DactBert(copy.deepcopy(stage1.bert), len(data.TASKS[args.task].labels)).to(args.device)
        without_dropout(adaptive.backbone)
        fit("stage 2", adaptive, partial(stage2_loss, tau=args.tau, head_loss=args.head_loss), train_set, args, record)
        learn_halting(adaptive, args.tau, Vectors(adaptive.backbone, train_set, args, MOST_FOR_HALTING), args, record)
        save_model(args.out / "dact.pt", start._replace(model=adaptive, settings=settings, seconds=record.seconds))

    results = evaluate(stage1.eval(), adaptive.eval(), train_set, dev_set, args)
    report(results, args)
    record.finish(settings | {"model": start.name, "rule": args.rule} | results)


def starting_model(args):
    """What training starts from, as a `Saved`: the model in --stage1, pretrained weights, or the toy's tiny BERT."""
    torch.manual_seed(args.seed)
    num_classes = len(data.find_task(args.task).labels)
    if args.stage1 is not None:
        start = load_run(args.stage1, 1, args.task)
        if args.model not in (None, start.name):
            raise InputError(f"{args.stage1} was trained from {start.name}, not from {args.model}; leave --model out")
        return start._replace(max_tokens=min(args.max_tokens, start.config.max_tokens))
    if args.task == "toy" and args.model is None:
        name, tokenizer = SCRATCH, bert.wordpiece_tokenizer(TOY_VOCAB)
        model = bert.BertClassifier(bert.Bert(TOY_CONFIG), bert.Classifier(TOY_CONFIG, num_classes))
        model.apply(bert.init_weights)
    else:
        name = args.model or "bert-base-uncased"
        model, tokenizer = bert.load_pretrained(name, num_classes)
    config = model.bert.config
    return Saved(model, tokenizer, name, min(args.max_tokens, config.max_tokens), args.task, config)


# ---- Training -------------------------------------------------------------------------------------------------------


def stage1_loss(model, inputs, labels):
    """-> (loss,), a scalar."""
    return (F.cross_entropy(model(*inputs).float(), labels),)


def stage2_loss(model, inputs, labels, tau, head_loss=0.0):
    """-> (loss, price of computation, mean h), scalars. head_loss: weight of what (3) does not have."""
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


def fit(stage, model, loss_of, train_set, args, record):
    """Train `model` in place, in its mode (train or eval), for args.epochs; `record` shows and logs how it goes.

    loss_of: a function like `stage1_loss` or, with halting, like `stage2_loss`.
    """
    torch.manual_seed(args.seed + rank())  # each process has a dropout of its own
    per_epoch = -(-len(train_set) // args.batch)
    step, steps = 0, max(1, round(args.epochs * per_epoch))
    record.start(stage, steps, len(train_set) / per_epoch)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model  # the same weights, shared gradients
    while step < steps:
        batches = data.training_batches(train_set.lengths, args.batch, (args.seed, step // per_epoch))
        for indices in batches[: steps - step]:
            step += 1
            inputs, labels, weight = my_rows(train_set, indices, args.device)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * warm_up_and_decay(step, steps)
            with autocast(args):
                loss, *halting = (part * weight for part in loss_of(parallel, inputs, labels))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            record.add(step, torch.stack([loss, *halting, norm]).detach())
    if dist.is_initialized():
        for buffer in model.buffers():  # what the last step observed differs between processes
            dist.broadcast(buffer, 0)


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


def learn_halting(model, tau, vectors, args, record):
    """Stage 2 goes on: the halting units of a `DactBert` learn once more by (3), alone, from where they started.

    vectors: `Vectors` of its backbone over the training set. All else of its heads is frozen, and stays so.
    """
    # DIFFERS: the paper has no such step. While the answers still change, halting follows them badly: it settles on one
    # or two blocks for all inputs. Learned anew with everything else as it is now, it depends on the input. On vectors
    # that are computed once this takes seconds, so it has three times the epochs.
    args = argparse.Namespace(**vars(args) | {"epochs": 3 * args.epochs})
    alone = over_vectors(model.eval())  # eval: the scale on which the heads read stays as it is
    torch.manual_seed(args.seed)
    for head in alone.heads:
        head.reset_halting()
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(".halt." in name)
    fit("halting", alone, partial(stage2_loss, tau=tau), vectors, args, record)


class Vectors:
    """[CLS] vectors after every block, computed once: a dataset for heads that learn on a backbone that does not.

    most: examples that are taken, by default all; each needs 4 N D bytes of memory.
    """

    def __init__(self, backbone, dataset, args, most=None):
        taken = np.sort(np.random.default_rng(0).permutation(len(dataset))[:most])
        self.labels, self.lengths = dataset.labels[taken], dataset.lengths[taken]
        self.cls = torch.empty(len(taken), len(backbone.blocks), backbone.hidden_size)
        backbone.eval()
        with torch.no_grad(), autocast(args):
            for rows in data.evaluation_batches(self.lengths, 64):
                inputs = to_device(dataset.batch(taken[rows])[0], args.device)
                for n, cls in enumerate(dact.cls_after_blocks(backbone, inputs)):
                    self.cls[rows, n] = cls.float().cpu()

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """-> ((cls (B, N, D), mask (B, N)), labels (B,)): inputs of a model `over_vectors`."""
        cls = self.cls[indices]
        return (cls, torch.ones(cls.shape[:2], dtype=torch.bool)), self.labels[indices]


class VectorBackbone(torch.nn.Module):
    """Stands in for a backbone whose [CLS] vectors (B, N, D) are known: a "block" drops the one before its own."""

    def __init__(self, N, size):
        super().__init__()
        self.hidden_size, self.blocks = size, [lambda hidden, mask: hidden[:, 1:]] * N

    def embed(self, cls):
        return F.pad(cls, (0, 0, 1, 0))  # (B, 1 + N, D); what block 1 drops


def over_vectors(model):
    """A model of a backbone and heads, with the same heads, that reads the batches of `Vectors`."""
    return replaced(model, backbone=VectorBackbone(len(model.heads), model.backbone.hidden_size))


def replaced(model, **modules):
    """A shallow copy of a model that has other modules under some names and shares all else."""
    model = copy.copy(model)
    model._modules = model._modules | modules
    return model


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def evaluate(stage1, adaptive, train_set, dev, args):
    """The scores of every variant of the model on the dev set, and the times of two, as metrics.json keeps them."""
    N, task = len(adaptive.backbone.blocks), args.task
    untrained = replaced(adaptive, heads=copy.deepcopy(adaptive.heads))
    for head in untrained.heads:
        head.reset_halting()
    variants = {
        "stage 1": lambda *inputs: all_blocks(stage1(*inputs), N),
        **{name: partial(adaptive.early_exit, rule=rule) for name, rule in dact.RULES.items()},
        "untrained": partial(untrained.early_exit, rule=dact.RULES[args.rule]),
    }
    predictions = {name: predict(variant, dev, args) for name, variant in variants.items()}
    found = {name: scores(p.label, dev.labels, task) | blocks_used(p.exit_block, N) for name, p in predictions.items()}
    y, h = outputs(adaptive, dev, args)
    winner = dact.accumulate_all(y, h)[0][-1].argmax(-1)
    for rule in dact.RULES:
        found[rule]["same_as_all_blocks"] = (predictions[rule].label == winner).sum().item()
        found[rule]["by_chance"] = by_chance(y.argmax(-1), predictions[rule].exit_block, dev.labels, task)
    majority = torch.full_like(dev.labels, train_set.labels.mode().values.item())
    timed = {"dev_full": variants["stage 1"], "dev_early_exit": variants[args.rule]}
    return {
        "majority": scores(majority, dev.labels, task),
        "full": found["stage 1"],
        "dact": found[args.rule], "rules": {rule: found[rule] for rule in dact.RULES}, "untrained": found["untrained"],
        "groups": by_group(predictions["stage 1"], predictions[args.rule], dev, task),
        "examples": len(dev), "seconds": seconds_of(timed, dev, args),
    }  # fmt: skip


def all_blocks(scores, N):
    """`Halted` for a model that ran all N blocks: scores (B, C), logits or probabilities."""
    label = scores.argmax(1)
    return dact.Halted(label, scores, torch.full_like(label, N))


def predict(variant, dataset, args):
    """What a function inputs -> `Halted` answers on a whole dataset: one `Halted`, on the CPU."""
    return dact.Halted(*outputs(variant, dataset, args, dim=0))


@torch.no_grad()
def seconds_of(variants, dataset, args):
    """How long functions inputs -> `Halted` take for a dataset: {name: seconds}, of all processes together.

    Each batch goes through all in turn, so that they meet the same noise, and through each twice, of which the second
    counts: survivors of an early exit make ever new shapes of batch, and a device's first meeting with a shape is slow.
    """
    seconds = dict.fromkeys(variants, 0.0)
    with autocast(args):  # around all: the weights are cast at their first use and kept in bfloat16 to the end
        for _, inputs in my_batches(dataset, args):
            for name, variant in variants.items():
                for _ in range(2):
                    began = time.perf_counter()
                    variant(*inputs).label.cpu()  # waits for the device
                    elapsed = time.perf_counter() - began
                seconds[name] += elapsed
    return {name: sum(part[name] for part in gather(seconds)) for name in variants}


@torch.no_grad()
def outputs(model, dataset, args, dim=1):
    """What a model gives for n examples, on the CPU, one tensor for each of its outputs: (N, n, ...), of every block.

    dim: where the examples stand in it, for a model of other outputs. Processes share the work; all get all of it.
    """
    found = []
    with autocast(args):
        for indices, inputs in my_batches(dataset, args):
            output = model(*inputs)
            parts = output if isinstance(output, tuple) else (output,)
            found.append((torch.as_tensor(indices), *(part.cpu() for part in parts)))
    order, *columns = zip(*sum(gather(found), []))
    back = torch.cat(order).argsort()
    return [torch.cat(column, dim).index_select(dim, back) for column in columns]


def scores(predicted, labels, task):
    """{metric: percent} of predicted classes (n,) against labels (n,)."""
    return {name: data.METRICS[name](predicted, labels) for name in data.TASKS[task].metrics}


def blocks_used(exit_block, N):
    """What halting saved, from exit blocks (n,): percent of blocks, mean exit block, how many left after each block."""
    mean, histogram = exit_block.double().mean().item(), torch.bincount(exit_block, minlength=N + 1)[1:].tolist()
    return {"saved": 100 * (1 - mean / N), "mean_blocks": mean, "exit_histogram": histogram}


def by_chance(answers, exit_block, labels, task, deals=200):
    """`scores` if chance dealt the same exits out among the examples, to see what choosing who leaves is worth.

    answers (N, n): the class that each block's own y_n gives; a_n would still hold the halting values of its own
    example. exit_block (n,), from 1. The mean of so many deals.
    """
    generator, n = torch.Generator().manual_seed(0), len(exit_block)
    dealt = [exit_block[torch.randperm(n, generator=generator)] for _ in range(deals)]
    found = [scores(answers[exits - 1, torch.arange(n)], labels, task) for exits in dealt]
    return {metric: sum(each[metric] for each in found) / deals for metric in found[0]}


def by_group(full, early, dev, task):
    """Scores and mean blocks for each group of the dev set (the toy's levels, MNLI's two dev files), if it has any."""
    groups = {}
    for name in dict.fromkeys(dev.groups):
        of_group = torch.tensor([group == name for group in dev.groups])
        groups[name] = {
            "examples": of_group.sum().item(),
            "full": scores(full.label[of_group], dev.labels[of_group], task),
            "dact": scores(early.label[of_group], dev.labels[of_group], task),
            "mean_blocks": early.exit_block[of_group].double().mean().item(),
        }
    return groups


def report(results, args):
    """The tables at the end of a run."""
    metrics, rules, n = data.TASKS[args.task].metrics, results["rules"], results["examples"]

    def row(title, found, seconds=None):
        line = f"{title:<26}" + "".join(f"{found[metric]:>9.1f}%" for metric in metrics)
        if "saved" in found:
            line += f"{found['saved']:>14.1f}%"
        print(line + (f"{seconds:>10.2f}{results['seconds']['dev_full'] / seconds:>10.2f}x" if seconds else ""))

    print("\n" + " " * 26 + "".join(f"{name:>10}" for name in metrics) + "   blocks saved   seconds   speed-up")
    row("majority class", results["majority"])
    row("stage 1, all blocks", results["full"], results["seconds"]["dev_full"])
    for rule, title in RULE_NAMES.items():
        row(f"DACT, {title}", rules[rule], results["seconds"]["dev_early_exit"] if rule == args.rule else None)
        row("  its exits by chance", rules[rule]["by_chance"] | {"saved": rules[rule]["saved"]})
    row("untrained halting", results["untrained"])
    same = " and ".join(f"{rules[rule]['same_as_all_blocks']} ({title})" for rule, title in RULE_NAMES.items())
    print(f"\nearly exit gives DACT's answer after all blocks on {same} of {n} dev examples")
    left = results["dact"]["exit_histogram"]
    print(f"by {RULE_NAMES[args.rule]} so many leave after block 1 to {len(left)}: " + " ".join(map(str, left)))
    for name, group in results["groups"].items():
        full, early = group["full"][metrics[0]], group["dact"][metrics[0]]
        print(f"{name:<12}stage 1 {full:5.1f}%   DACT {early:5.1f}%   mean blocks {group['mean_blocks']:.2f}")


# ---- The equations at work on one sentence --------------------------------------------------------------------------


@torch.no_grad()
def explain(args):
    """Print, for each block of a finished run, y_n, h_n, p_n, a_n and both sides of the rules, and where each stops."""
    wanted = max(1, len(data.find_task(args.task).texts))  # the toy task has no files, and one text
    if len(args.explain) != wanted:
        raise InputError(f"--explain takes {wanted} text(s) of {args.task}, found {len(args.explain)}; quote each one")
    saved = load_run(args.out / "dact.pt", 2, args.task)
    texts = [text.encode(errors="replace").decode() for text in args.explain]  # bytes that are no UTF-8 as ?
    inputs = saved.encode([texts[0] if wanted == 1 else tuple(texts)])
    tokens = [saved.tokenizer.id_to_token(i) for i in inputs[0][0].tolist()]
    print("tokens: " + " ".join(tokens))
    unknown, words = tokens.count("[UNK]"), len(tokens) - saved.tokenizer.num_special_tokens_to_add(wanted > 1)
    if unknown:
        print(f"[UNK]: {unknown} of {words} words that this vocabulary does not have")
    if unknown == words:
        raise InputError("no word of this text is in the model's vocabulary, so it has no answer; try other words")
    print_equations(*saved.model.eval()(*inputs), data.TASKS[args.task].labels)


def print_equations(y, h, names):
    """The table of `explain`: y (N, 1, C), h (N, 1)."""
    a, p = dact.accumulate_all(y, h)
    N, width, stops = len(y), 6 * len(names) + 1, {}
    print(f"y_n and a_n: probabilities of {', '.join(names)}\n")
    print(f"  n  {'y_n':<{width}} h_n    p_n    {'a_n':<{width}} rule (4)           exact rule")
    for n, (y_n, h_n, a_n, p_n) in enumerate(zip(y, h, a, p), start=1):
        line = f"{n:>3}  {decimals(y_n):<{width}} {decimals(h_n)}  {decimals(p_n)}  {decimals(a_n):<{width}} "
        not_run = "   not run" * (len(stops) == len(dact.RULES))
        for name, rule in dact.RULES.items():
            left, right = rule(a_n, p_n, N - n)
            line += f"{decimals(left)} {'>=' if left >= right else '< '} {decimals(right)}     "
            if left >= right:
                stops.setdefault(name, f"{RULE_NAMES[name]} stops after block {n} of {N}: {names[a_n.argmax()]}")
        print(line.rstrip() + not_run)
    print("\n" + "\n".join(stops.values()))


def decimals(tensor):
    return " ".join(f"{x + 0.0:.3f}" for x in tensor.flatten().tolist())  # -0.0 + 0.0 is 0.0


# ---- A finished run on GLUE's test set, whose labels only its server knows ------------------------------------------


def submit(args):
    """Write FOLDER/<task>.tsv: a finished run's answers by early exit, a line (index, label word) per test example."""
    args.device, args.precision, _ = pick_hardware(args.precision)
    saved = load_run(args.out / "dact.pt", 2, args.task)  # before anything is downloaded
    examples, model = data.load_test(args.task, args.data), saved.model.to(args.device).eval()
    test = saved.dataset(examples)
    halted = predict(partial(model.early_exit, rule=dact.RULES[args.rule]), test, args)
    folder, words = Path(args.submit), data.TASKS[args.task].labels
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(examples.groups):
        rows = [words[i] for i, group in zip(halted.label.tolist(), examples.groups) if group == name]
        text = "index\tprediction\n" + "".join(f"{i}\t{word}\n" for i, word in enumerate(rows))
        write_whole(folder / f"{name}.tsv", text.encode())
        print(f"saved      {folder / name}.tsv, {len(rows)} predictions")
    print("GLUE's server takes one zip with a file for each task, also STS-B.tsv: 1379 times any number from 0 to 5")
    mean = halted.exit_block.double().mean().item()
    print(f"mean block {mean:.2f} of {len(model.backbone.blocks)} ({RULE_NAMES[args.rule]})")


# ---- The command line -----------------------------------------------------------------------------------------------


def main(argv=None):
    action = run
    try:
        args = parse_arguments(argv)
        action = explain if args.explain is not None else submit if args.submit is not None else run
        action(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print("error: the memory is full; try a smaller --batch or --max-tokens", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; the same command with --resume goes on after the last finished stage" if action is run else ""
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_arguments(argv):
    parser = Parser(description="Fine-tune DACT-BERT in the two stages of the paper. A finished run answers questions.")
    add = parser.add_argument_group("the run").add_argument
    add("--task", default="toy", help=f"one of {', '.join(data.TASKS)} (default: toy)")
    models = "bert-base-uncased (default), bert-small, roberta-base, ..., a folder or zip of yours; the toy has its own"
    add("--model", help=models)
    add("--out", help="folder that the run leaves (default: runs/TASK)")
    add("--explain", nargs="+", metavar="TEXT", help="the equations at work on a sentence or pair, by the run in --out")
    add("--resume", action="store_true", help="go on with the interrupted run in --out after its last finished stage")
    add("--overwrite", action="store_true", help="start again although --out holds a run")
    add("--data", help="folder of the GLUE files; missing ones are downloaded (default: ~/.cache/dact-bert/glue)")
    add("--seed", type=number(*RANGES["seed"]), default=0, help="of new weights, dropout and shuffling (default: 0)")
    add("--precision", choices=PRECISIONS, help="default: bfloat16 on hardware that has it, else float32")
    add("--stage1", metavar="FILE", help="skip stage 1: start stage 2 from the stage1.pt of an earlier run")
    add("--submit", metavar="FOLDER", help="write the test predictions of the run in --out, as GLUE takes them")
    add = parser.add_argument_group("the paper's setting").add_argument
    tau = "price of a block in equation (3), in nats (default: 0.035; toy: 0.05; the paper's: 5e-3)"
    add("--tau", type=number(*RANGES["tau"]), help=tau)
    add = parser.add_argument_group("our settings").add_argument
    add("--epochs", type=number(*RANGES["epochs"]), help="passes in each stage (default: 3, DeeBERT's; toy: 16)")
    add("--max-tokens", type=number(*RANGES["max_tokens"]), default=128, help="longer inputs are cut (default: 128)")
    add("--rule", choices=dact.RULES, default="paper", help="rule that answers: (4), or our exact one (default: paper)")
    add("--batch", type=number(*RANGES["batch"]), help="sequences in a batch (default: 32; toy: 64)")
    add("--lr", type=number(*RANGES["lr"]), help="peak learning rate of all but the heads (default: 5e-5; toy: 4e-4)")
    add("--head-lr", type=number(*RANGES["head_lr"]), default=1e-3, help="that of the DACT heads (default: 1e-3)")
    head_loss = "weight of every head's own loss in stage 2, beside (3) (default: 1; toy: 0.3; the paper's: 0)"
    add("--head-loss", type=number(*RANGES["head_loss"]), help=head_loss)
    args = parser.parse_args(argv)
    args.task = {"sst2": "sst-2"}.get(args.task.lower(), args.task.lower())  # GLUE itself writes CoLA, SST2, SST-2
    scratch = args.task == "toy" and args.model is None
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[scratch])
    args.out = data.own_path(args.out or f"runs/{args.task}")
    if args.model and os.path.exists(data.own_path(args.model)):  # so that metrics.json names it for any folder
        args.model = str(data.own_path(args.model).resolve())
    return args


def number(kind, low, high):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:  # also refuses nan
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {low} to {high},"  # argparse puts it into its message
    return parse


# ---- From here on, what a first reader may skip: hardware, processes, files -----------------------------------------


def pick_hardware(asked=None):
    """(device, precision, why): the best device there is, and bfloat16 where it multiplies it natively, and so faster.

    asked: "float32", "bfloat16" or None. Under torchrun the processes meet first, for each has its own GPU.
    """
    join_processes()
    cuda, cpu_flags = torch.cuda.is_available(), Path("/proc/cpuinfo")
    # The processes of torchrun cannot exchange gradients from mps.
    mps = torch.backends.mps.is_available() and not dist.is_initialized()
    device = torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied
    if asked:
        return device, asked, "asked for"
    if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, "bfloat16", "the GPU has it"
    if device.type == "cpu" and cpu_flags.is_file():
        if found := {"amx_bf16", "avx512_bf16"} & set(cpu_flags.read_text().split()):
            return device, "bfloat16", f"the CPU has {min(found)}"
    return device, "float32", "no native bfloat16 known on it"


def autocast(args):
    """Matrix products in args.precision."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def to_device(tensors, device):
    """The tensors on a device. A GPU fetches them out of pinned memory while the program goes on."""
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    return tuple(x.pin_memory().to(device, non_blocking=True) for x in tensors)


def join_processes():
    """Under torchrun, meet the other processes. Each has its own GPU, and only the first prints and writes files."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    local, wanted = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        GPUs = torch.cuda.device_count()
        if wanted > GPUs:
            raise InputError(f"{wanted} processes on {GPUs} GPUs; give torchrun a smaller --nproc_per_node")
        torch.cuda.set_device(local)  # "cuda" is this one from here on
    dist.init_process_group()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    print(f"started    {num_processes()} processes")


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(thing):
    """[the thing of every process], in the order of their numbers; all have to ask, and wait for each other."""
    things = [thing] * num_processes()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def my_rows(train, indices, device):
    """This process's rows of a training batch, on the device: (inputs, labels, weight).

    The batch's loss is the sum of every process's mean, each times its share of the rows; DistributedDataParallel takes
    the mean of the gradients. So weight = processes * own rows / all rows: one process alone has 1.
    """
    own = indices[rank() :: num_processes()]
    weight = num_processes() * len(own) / len(indices)
    # A batch may have fewer rows than there are processes, but all must take part: then with a row that weighs nothing.
    inputs, labels = train.batch(own if len(own) else indices[:1])
    *inputs, labels = to_device((*inputs, labels), device)
    return inputs, labels, weight


def my_batches(dataset, args):
    """This process's share of the evaluation batches, on the device: (indices, inputs)."""
    for indices in data.evaluation_batches(dataset.lengths, args.batch)[rank() :: num_processes()]:
        yield indices, to_device(dataset.batch(indices)[0], args.device)


VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__}
RUN_FILES = ("log.jsonl", "stage1.pt", "dact.pt", "metrics.json")


def settings_of(args, splits, finished):
    """What decides the numbers of a run, as its files keep it.

    Raises InputError unless the stages (`Saved`) that it goes on from have the same.
    """
    names = "task model stage1 epochs batch max_tokens lr head_lr tau head_loss seed precision".split()
    sums = [zlib.crc32(repr((split.texts, split.labels)).encode()) for split in splits]
    settings = {name: getattr(args, name) for name in names} | {"processes": num_processes(), "data": sums}
    for saved in finished:
        for name, value in settings.items():
            if (found := saved.settings.get(name)) != value:
                was = f"{args.out}: its run has {name} {data.plain(repr(found))}, not {value!r}"
                raise InputError(f"{was}; ask for the same, choose another --out, or add --overwrite without --resume")
    return settings


def check_folder(args):
    """Raise InputError if args.out holds a run, unless --resume goes on with it or --overwrite gives it up."""
    held = [name for name in RUN_FILES if (args.out / name).exists()]
    if not held or (args.overwrite and not args.resume):
        return
    advice = "choose another --out, or start again with --overwrite and without --resume"
    if "metrics.json" in held:
        raise InputError(f"{args.out} holds a finished run; {advice}")
    if "dact.pt" in held and "stage1.pt" not in held:
        raise InputError(f"{args.out}: stage1.pt is missing beside dact.pt; {advice}")
    if not args.resume:
        raise InputError(f"{args.out} holds an unfinished run; go on with --resume, {advice}")


def finished_stages(args):
    """What --resume goes on with: the `Saved` of stage1.pt and of dact.pt in args.out, as far as they are there."""
    finished = []
    for stage, name in ((1, "stage1.pt"), (2, "dact.pt")):
        if args.resume and (args.out / name).exists():
            finished.append(load_run(args.out / name, stage, args.task))
    if args.resume and (args.out / "log.jsonl").exists():
        where = f"after stage {len(finished)}" if finished else "before the end of stage 1: at its start"
        print(f"resumed    {where}")
    if len(set(gather(len(finished)))) > 1:
        raise InputError(f"{args.out} does not hold the same run for every process; name a folder that all share")
    return finished


class Record:
    """How training goes, on the screen and in log.jsonl, and how long each stage took.

    first: the log's first line. finished: the stages (`Saved`) that the run goes on from; if there are none, the files
    of an earlier run in `folder` are deleted. keep_stage1 spares stage1.pt, from which the run may have started.
    lines: how many a stage shows and logs. The folder is this record's alone for as long as there is one.
    """

    def __init__(self, folder, first, finished=(), keep_stage1=False, lines=20):
        self.folder, self.lines = folder, lines
        self.seconds = dict(finished[-1].seconds) if finished else {"stage 1": 0.0}
        folder.mkdir(parents=True, exist_ok=True)
        # The lock on the file lasts as long as it is open. Only the first process has a log.
        self.log = open(os.devnull if rank() else folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if rank() == 0:
            data.lock(self.log, folder)
            if not finished:
                self.log.truncate(0)
                for name in RUN_FILES[2 if keep_stage1 else 1 :]:
                    (folder / name).unlink(missing_ok=True)
        print(json.dumps(first), file=self.log, flush=True)

    def start(self, stage, steps, examples):
        """A stage of so many steps begins; examples: in a step, on average."""
        self.stage, self.steps, self.examples, self.rows, self.began = stage, steps, examples, [], time.perf_counter()

    def add(self, step, row):
        """row: what a step gave, (loss, gradient's norm) or (loss, price, mean h, norm), a tensor on the device."""
        self.rows.append(row)  # to read it now would make the device wait
        if step % -(-self.steps // self.lines) and step < self.steps:
            return
        rows, self.rows = torch.stack(gather(torch.stack(self.rows).cpu())).mean(0), []
        for number, row in enumerate(rows.tolist(), start=step - len(rows) + 1):
            for what, value in (("loss", row[0]), ("norm of the gradient", row[-1])):
                if not math.isfinite(value):
                    what = f"{self.stage}: the {what} is {value} at step {number}"
                    raise InputError(f"{what}; start again with a smaller --lr or --head-lr")
        loss, *halting, _ = rows.mean(0).tolist()
        halting = dict(zip(("price", "mean_h"), halting))
        seconds = self.seconds[self.stage] = time.perf_counter() - self.began
        speed, minutes = step * self.examples / seconds, (self.steps - step) * seconds / step / 60
        logged = {"stage": self.stage, "step": step, "loss": loss, **halting, "examples_per_second": speed}
        print(json.dumps(logged), file=self.log, flush=True)
        line = f"{self.stage} {step:>6}/{self.steps}  loss {loss:.4f}"
        line += "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in halting.items())
        line += f"{speed:>8.0f}/s {minutes:>5.1f} min left"
        overwritten = sys.stdout.isatty() and step < self.steps
        print(line, end="\r" if overwritten else "\n", flush=True)

    def finish(self, results):
        """Write metrics.json, and leave the other processes."""
        seconds = {stage.replace(" ", ""): took for stage, took in self.seconds.items()} | results["seconds"]
        content = results | {"seconds": seconds, "versions": VERSIONS}
        write_whole(self.folder / "metrics.json", json.dumps(content, indent=1).encode())
        print(f"saved      {self.folder}/dact.pt and metrics.json")
        if dist.is_initialized():
            gc.collect()  # DistributedDataParallel lies in a cycle, and its threads must end before Python does
            dist.destroy_process_group()


def write_whole(path, content):
    """In the first process, write bytes beside `path` and rename: never half a file, and safe from a loss of power."""
    if rank() > 0:
        return
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too
            folder = os.open(part.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        advice = "free some space and go on (train.py: add --resume)"
        raise InputError(f"cannot write {path} ({error.strerror}); {advice}") from None
    finally:
        part.unlink(missing_ok=True)


def torch_bytes(content):
    """What torch.save makes of something. In memory first: when a file fails, torch does not say why."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


class Saved(NamedTuple):
    """A model of a run and what it takes to use it: the content of a stage1.pt or dact.pt."""

    model: torch.nn.Module  # a BertClassifier (stage 1) or a DactBert (stage 2), on the CPU when read from a file
    tokenizer: Tokenizer
    name: str  # of the model that training started from
    max_tokens: int  # longer inputs are cut
    task: str
    config: bert.BertConfig
    settings: dict = {}  # of the run; see `settings_of`
    seconds: dict = {}  # {stage: how long its training took}

    def dataset(self, examples):
        return data.Dataset(examples, self.tokenizer, self.max_tokens, self.config.pad_token_id)

    def encode(self, texts, device="cpu"):
        """Texts (str, or (str, str) for a pair) -> what the model takes: ids (B, T), segments (B, T), mask (B, T)."""
        dataset = self.dataset(data.Examples(texts, [0] * len(texts)))
        return to_device(dataset.batch(range(len(texts)))[0], torch.device(device))


VERSION = 2  # of the files below; an older one has other heads, or other names
KINDS = {"task": str, "stage": int, "model": str, "max_tokens": int, "config": dict, "settings": dict, "seconds": dict}


def save_model(path, saved):
    """Write stage1.pt or dact.pt: all that `load_run` needs."""
    stage = 2 if isinstance(saved.model, dact.DactBert) else 1
    about = {"task": saved.task, "stage": stage, "model": saved.name, "max_tokens": saved.max_tokens,
             "config": asdict(saved.config), "settings": saved.settings, "seconds": saved.seconds}  # fmt: skip
    about = json.dumps(about)  # so that nothing but plain numbers and words comes back
    texts = {"version": VERSION, "about": about, "tokenizer": saved.tokenizer.to_str()}
    write_whole(path, torch_bytes(texts | {"state": saved.model.state_dict()}))


def load_run(path, stage=2, task=None):
    """Open a stage1.pt (stage 1) or dact.pt (2) of a run on `task` (by default on any): `Saved`.

    Nothing in the file can run code. Raises InputError for a file that is not of such a run, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a run that finished this stage")
    advice = "name another file, or train again (--overwrite)"
    saved = bert.load_pickle(path, advice=advice)
    with data.reading(path, f"it is no model of a run; {advice}"):
        state, version = saved["state"], saved.get("version")
        if type(version) is not int or version != VERSION:
            raise InputError(f"{path}: written by another version of dact-bert; train again")
        about, tokenizer = json.loads(saved["about"]), Tokenizer.from_str(saved["tokenizer"])
        for key, kind in KINDS.items():
            if type(about[key]) is not kind:
                raise TypeError(f"{key} is no {kind.__name__}")
        times = about["seconds"]
        plain = all(type(t) is float and 0 <= t < 1e9 for t in times.values())
        if times.keys() - {"stage 1", "stage 2", "halting"} or not plain:
            raise ValueError("seconds of no training")
        config, max_tokens = bert.BertConfig.from_dict(about["config"], path), about["max_tokens"]
        if not 8 <= max_tokens <= config.max_tokens:
            raise ValueError(f"max_tokens is {data.plain(max_tokens)}")
    bert.check_tokenizer(tokenizer, config, path)
    task = task or about["task"]
    if (about["task"], about["stage"]) != (task, stage):
        found = data.plain(f"stage {about['stage']} of a run on {about['task']!r}")
        raise InputError(f"{path}: {found}, expected stage {stage} on {task!r}; name another one")
    num_classes = len(data.find_task(task).labels)
    with torch.device("meta"), bert.NoRandomStart():  # for the file overwrites it
        model = bert.Bert(config)
        if stage == 1:
            model = bert.BertClassifier(model, bert.Classifier(config, num_classes))
        else:
            model = dact.DactBert(model, num_classes)
    with data.reading(path, "its weights do not fit its own config; name another run"):
        check_state(state)
        model.load_state_dict(state, assign=True)
    return Saved(model, tokenizer, data.plain(about["model"], 200), max_tokens, task, config, about["settings"], times)


def check_state(state):
    """Raise ValueError unless all tensors are plain, finite float32; load_state_dict looks at names and shapes."""
    for name, tensor in state.items():
        kind = tensor.dtype, tensor.layout, tensor.is_meta
        if kind != (torch.float32, torch.strided, False) or not tensor.is_contiguous():
            raise ValueError(f"{name} is no plain float32 tensor")
        if not bert.all_finite(tensor):
            raise ValueError(f"{name} holds a number that is not finite")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a run as Ctrl-C does
    sys.stdout.reconfigure(errors="replace")  # a console that has no ▁ shows ? and goes on
    sys.exit(main())
