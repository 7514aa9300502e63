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
import json
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
# (pretrained, toy from scratch): what suits the one does not suit a model that starts from nothing
DEFAULTS = {"epochs": (3, 16), "batch": (32, 64), "lr": (5e-5, 4e-4), "tau": (0.035, 0.05), "head_loss": (1.0, 0.3)}
# What a setting may be, by the flags and in a metrics.json: (kind, lowest, highest)
RANGES = {
    "seed": (int, 0, 2**32 - 1), "tau": (float, 0, 1e3), "epochs": (float, 1e-3, 1e4), "max_tokens": (int, 8, 65536),
    "batch": (int, 1, 65536), "lr": (float, 1e-12, 1e3), "head_lr": (float, 1e-12, 1e3), "head_loss": (float, 0, 1e3),
}  # fmt: skip
PRECISIONS = ("float32", "bfloat16")
RULE_NAMES = {"paper": "rule (4)", "exact": "exact rule"}  # on the screen; the names on the left are --rule's


# ---- A run ----------------------------------------------------------------------------------------------------------


def run(args):
    """Stage 1, stage 2, evaluation; leaves stage1.pt, dact.pt, metrics.json and log.jsonl in args.out."""
    join_processes()
    args.device, args.precision, why = pick_hardware(args.precision)
    record = Record(args, find_checkpoint(args))
    torch.manual_seed(args.seed)
    stage1, tokenizer, name = starting_model(args, args.out / "stage1.pt" if record.stage_1_is_done else args.stage1)
    if name == SCRATCH:
        torch.set_num_threads(1)  # CHOICE: so small a model is no faster on more, and then rounds alike on any number of cores
    max_tokens, pad_id = min(args.max_tokens, stage1.bert.config.max_tokens), stage1.bert.config.pad_token_id
    splits = data.load_task(args.task, args.data)
    train_set, dev_set = (data.Dataset(split, tokenizer, max_tokens, pad_id) for split in splits)
    print(f"device     {args.device}, {args.precision} ({why})" + f", {num_processes()} processes" * (num_processes() > 1))
    print(f"model      {name}, {sum(p.numel() for p in stage1.parameters()) / 1e6:.1f} M parameters")
    print(f"task       {args.task}, {len(train_set)} training and {len(dev_set)} dev examples, seed {args.seed}")
    print("versions   " + ", ".join(f"{package} {version}" for package, version in VERSIONS.items()))
    record.begin(train_set, dev_set)

    stage1.to(args.device)
    if not record.stage_1_is_done:
        if args.stage1 is None:
            fit("stage 1", stage1.train(), stage1_loss, train_set, args, record)
        save_model(args.out / "stage1.pt", stage1, tokenizer, name, max_tokens, args.task)

    torch.manual_seed(args.seed)  # stage 2 is the same whether stage 1 ran before it or was read from a file
    adaptive = dact.DactBert(copy.deepcopy(stage1.bert), len(data.TASKS[args.task].labels)).to(args.device)
    without_dropout(adaptive.backbone)
    fit("stage 2", adaptive.train(), stage2_loss(args.tau, args.head_loss), train_set, args, record)
    # CHOICE: 20,000 examples at most. Their vectors, which take 4 N D bytes each, fit into memory, and halting learns on them.
    vectors = Vectors(adaptive.backbone, train_set, args, most=20_000)
    learn_halting(adaptive, args.tau, vectors, args, record)
    save_model(args.out / "dact.pt", adaptive, tokenizer, name, max_tokens, args.task)

    results = evaluate(stage1.eval(), adaptive.eval(), train_set, dev_set, args)
    report(results, args)
    record.finish(results, name)
    print(f"saved      {args.out}/dact.pt and metrics.json")


def starting_model(args, stage1=None):
    """What training starts from: (BertClassifier, Tokenizer, name of the model).

    The model of the file `stage1`, if there is one, or pretrained weights, or for the toy task a tiny BERT with random ones.
    """
    num_classes = len(data.find_task(args.task).labels)
    if stage1 is not None:
        model, tokenizer, name, *_ = load_run(stage1, 1, args.task)
        if args.model not in (None, name):
            raise InputError(f"{stage1} was trained from {name}, not from {args.model}; leave --model out")
        return model, tokenizer, name
    if args.task == "toy" and args.model is None:
        model = bert.BertClassifier(bert.Bert(TOY_CONFIG), bert.Classifier(TOY_CONFIG, num_classes))
        return model.apply(bert.init_weights), bert.wordpiece_tokenizer(TOY_VOCAB), SCRATCH
    name = args.model or "bert-base-uncased"
    return *bert.load_pretrained(name, num_classes), name


# ---- Training -------------------------------------------------------------------------------------------------------


def stage1_loss(model, inputs, labels):
    """-> (loss, price of computation, mean h), scalars; stage 1 has no halting, so the last two are 0."""
    loss = F.cross_entropy(model(*inputs).float(), labels)
    return loss, torch.zeros_like(loss), torch.zeros_like(loss)


def stage2_loss(tau, head_loss=0.0):
    """The loss of stage 2 at a price tau: a function like `stage1_loss`. head_loss: weight of what (3) does not have."""

    def loss(model, inputs, labels):
        y, h = model(*inputs)
        a, _ = dact.accumulate_all(y, h)
        answer, price = dact.dact_loss(a[-1], h, labels, tau)
        total = answer + price  # (3)
        if head_loss:
            # DIFFERS: (3) judges a_N alone, so a head learns in proportion to its weight in a_N, and those after a closed
            # gate not at all. Here every head also sees the label: the mean over n of L(y_n, label).
            total = total + head_loss * dact.answer_loss(y.flatten(0, 1), labels.repeat(len(y)))
        return total, price, h.mean()

    return loss


def without_dropout(backbone):
    """Put all dropout of a backbone at rate 0."""
    # DIFFERS: in the early blocks dropout moves [CLS] 2 to 46 times as far as the input does (by 0.04 against 0.0009
    # after block 1), so no head there can learn from it.
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def fit(stage, model, loss_of, train_set, args, record, checkpoints=True):
    """Train `model` in place, in its mode (train or eval), for args.epochs; `record` shows, logs and keeps how it goes."""
    torch.manual_seed(args.seed + rank())  # each process has a dropout of its own
    per_epoch = -(-len(train_set) // args.batch)
    steps = max(1, round(args.epochs * per_epoch))
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    step = record.start(stage, steps, model, optimizer)  # more than 0 after an interruption
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model  # the same weights, shared gradients
    while step < steps:
        for indices in data.training_batches(train_set.lengths, args.batch, (args.seed, step // per_epoch)):
            step += 1
            inputs, labels, weight = my_rows(train_set, indices, args.device)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * warm_up_and_decay(step, steps)
            with autocast(args):
                loss, price, mean_h = loss_of(parallel, inputs, labels)
            (loss * weight).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            values = torch.stack([loss * weight, price * weight, mean_h * weight, norm]).detach()
            record.add(step, values, len(train_set) / per_epoch)
            if step == steps:
                break
        if checkpoints:
            record.save_checkpoint(step, model, optimizer)
    if dist.is_initialized():
        for buffer in model.buffers():  # what the last step observed differs between processes
            dist.broadcast(buffer, 0)


def parameter_groups(model, args):
    """For AdamW: decay on matrices only, and a learning rate of their own for the DACT heads."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = args.head_lr if name.startswith("heads.") else args.lr
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
    # CHOICE: while the answers still change, halting follows them badly: it settles on one or two blocks for all inputs.
    # Learned anew with everything else as it is now, it depends on the input. On vectors that are computed once this
    # takes seconds, so it has three times the epochs.
    args = argparse.Namespace(**vars(args) | {"epochs": 3 * args.epochs})
    alone = over_vectors(model.eval())  # eval: the scale on which the heads read stays as it is
    torch.manual_seed(args.seed)
    for head in alone.heads:
        head.reset_halting()
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(".halt." in name)
    fit("halting", alone, stage2_loss(tau), vectors, args, record, checkpoints=False)  # it takes seconds


class Vectors:
    """[CLS] vectors after every block, computed once, for heads that learn on a backbone that does not. As `fit` reads them.

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
    """Stands in for a backbone whose [CLS] vectors (B, N, D) are known: "block n" brings the n-th one to the front."""

    def __init__(self, N, size):
        super().__init__()
        self.hidden_size, self.blocks = size, [lambda cls, mask: cls.roll(-1, 1)] * N

    def embed(self, cls):
        return cls.roll(1, 1)  # which block 1 undoes


def over_vectors(model):
    """A model of a backbone and heads, with the same heads, that reads the batches of `Vectors`."""
    return replaced(model, backbone=VectorBackbone(len(model.heads), model.backbone.hidden_size))


def replaced(model, **modules):
    """A shallow copy of a model that has other modules under some names and shares all else."""
    model = copy.copy(model)
    model._modules = model._modules | modules
    return model


# ---- Evaluation -----------------------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What a model answers on n examples."""

    labels: torch.Tensor  # (n,) int64, predicted classes
    exit_block: torch.Tensor  # (n,) int64, from 1


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
    found = {name: scores(p.labels, dev.labels, task) | blocks_used(p.exit_block, N) for name, p in predictions.items()}
    y, h = outputs(adaptive, dev, args)
    winner = dact.accumulate_all(y, h)[0][-1].argmax(-1)
    for rule in dact.RULES:
        found[rule]["same_as_all_blocks"] = (predictions[rule].labels == winner).sum().item()
        found[rule]["by_chance"] = by_chance(y.argmax(-1), predictions[rule].exit_block, dev.labels, task)
    majority = torch.full_like(dev.labels, train_set.labels.mode().values.item())
    timed = {"dev_full": variants["stage 1"], "dev_early_exit": variants[args.rule]}
    return {
        "majority": scores(majority, dev.labels, task),
        "full": scores(predictions["stage 1"].labels, dev.labels, task),
        "dact": found[args.rule], "rules": {rule: found[rule] for rule in dact.RULES}, "control": found["untrained"],
        "groups": by_group(predictions["stage 1"], predictions[args.rule], dev, task),
        "examples": len(dev), "seconds": seconds_of(timed, dev, args),
    }  # fmt: skip


def all_blocks(scores, N):
    """`Halted` for a model that ran all N blocks: scores (B, C), logits or probabilities."""
    label = scores.argmax(1)
    return dact.Halted(label, scores, torch.full_like(label, N))


@torch.no_grad()
def predict(variant, dataset, args):
    """The `Predictions` of a function inputs -> `Halted` on a dataset. Processes share the work; all get all of it."""
    found = torch.zeros(2, len(dataset), dtype=torch.long)
    with autocast(args):
        for indices, inputs in my_batches(dataset, args):
            halted = variant(*inputs)
            found[:, indices] = torch.stack([halted.label, halted.exit_block]).cpu()
    return Predictions(*torch.stack(gather(found)).amax(0))  # 0: another process's example


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
def outputs(model, dataset, args):
    """What a model gives of every block for every example: (N, n, ...) on the CPU, one tensor for each of its outputs."""
    batches, rows = data.evaluation_batches(dataset.lengths, args.batch), []
    with autocast(args):
        for indices in batches:
            found = model(*to_device(dataset.batch(indices)[0], args.device))
            rows.append([x.float().cpu() for x in (found if isinstance(found, tuple) else (found,))])
    back = torch.cat([torch.as_tensor(indices) for indices in batches]).argsort()
    return [torch.cat(column, 1)[:, back] for column in zip(*rows)]


def scores(predicted, labels, task):
    """{metric: percent} of predicted classes (n,) against labels (n,)."""
    return {name: data.METRICS[name](predicted, labels) for name in data.TASKS[task].metrics}


def blocks_used(exit_block, N):
    """What halting saved, from exit blocks (n,): percent of blocks, mean exit block, and how many left after each block."""
    mean, histogram = exit_block.double().mean().item(), torch.bincount(exit_block, minlength=N + 1)[1:].tolist()
    return {"saved": 100 * (1 - mean / N), "mean_blocks": mean, "exit_histogram": histogram}


def by_chance(answers, exit_block, labels, task, deals=200):
    """`scores` if chance dealt the same exits out among the examples; what is beyond them, the choice of who leaves won.

    answers (N, n): the class that each block's y_n gives (not a_n, which holds what h made of the example before); exit_block
    (n,), from 1. The mean of so many deals.
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
            "full": scores(full.labels[of_group], dev.labels[of_group], task),
            "dact": scores(early.labels[of_group], dev.labels[of_group], task),
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
    row("stage 1, all blocks", results["full"] | {"saved": 0}, results["seconds"]["dev_full"])
    for rule, title in RULE_NAMES.items():
        row(f"DACT, {title}", rules[rule], results["seconds"]["dev_early_exit"] if rule == args.rule else None)
        row("  its exits by chance", rules[rule]["by_chance"] | {"saved": rules[rule]["saved"]})
    row("untrained halting", results["control"])
    same = " and ".join(f"{rules[rule]['same_as_all_blocks']} ({title})" for rule, title in RULE_NAMES.items())
    print(f"\nearly exit gives the answer of all blocks on {same} of {n} dev examples")
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
    unknown, frame = tokens.count("[UNK]"), len(saved.tokenizer.encode("", "" if wanted > 1 else None).ids)
    if unknown:
        print(f"[UNK]: {unknown} of {len(tokens) - frame} words that this vocabulary does not have")
    if unknown + frame == len(tokens):
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
        already = len(stops) == len(dact.RULES)
        for name, rule in dact.RULES.items():
            left, right = rule(a_n, p_n, N - n)
            halts = bool(left >= right)
            line += f"{decimals(left)} {'>=' if halts else '< '} {decimals(right)}     "
            if halts and name not in stops:
                stops[name] = f"{RULE_NAMES[name]} stops after block {n} of {N}: {names[a_n.argmax()]}"
        print(line.rstrip() + "   not run" * already)
    print("\n" + "\n".join(stops.values()))


def decimals(tensor):
    return " ".join(f"{x + 0.0:.3f}" for x in tensor.flatten().tolist())  # -0.0 + 0.0 is 0.0


# ---- A finished run on GLUE's test set, whose labels only its server knows ------------------------------------------


def submit(args):
    """Write FOLDER/<task>.tsv: a finished run's answers by early exit, a line (index, label word) per test example."""
    join_processes()
    args.device, args.precision, _ = pick_hardware(args.precision)
    model, tokenizer, _, max_tokens, _ = load_run(args.out / "dact.pt", 2, args.task)  # before anything is downloaded
    examples = data.load_test(args.task, args.data)
    model.to(args.device).eval()
    test = data.Dataset(examples, tokenizer, max_tokens, model.backbone.config.pad_token_id)
    labels, exit_block = predict(partial(model.early_exit, rule=dact.RULES[args.rule]), test, args)
    folder, words = Path(args.submit), data.TASKS[args.task].labels
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(examples.groups):
        rows = [words[i] for i, group in zip(labels.tolist(), examples.groups) if group == name]
        text = "index\tprediction\n" + "".join(f"{i}\t{word}\n" for i, word in enumerate(rows))
        write_whole(folder / f"{name}.tsv", lambda file, text=text: file.write(text.encode()))
        print(f"saved      {folder / name}.tsv, {len(rows)} predictions")
    print("GLUE's server takes one zip with a file for each task, also STS-B.tsv: any number from 0 to 5 for its 1379 lines")
    print(f"mean block {exit_block.double().mean().item():.2f} of {len(model.backbone.blocks)} ({RULE_NAMES[args.rule]})")


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
        more = "; the same command with --resume goes on after the last finished epoch" if action is run else ""
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
    add("--model", help="bert-base-uncased (the default), bert-small, roberta-base, ..., or a folder or zip of yours")
    add("--out", help="folder that the run leaves (default: runs/TASK)")
    add("--explain", nargs="+", metavar="TEXT", help="show the equations at work on a sentence or pair (run: --out)")
    add("--resume", action="store_true", help="go on with the interrupted run in --out after its last finished epoch")
    add("--overwrite", action="store_true", help="start again although --out holds a run")
    add("--data", help="folder of the GLUE files; missing ones are downloaded (default: ~/.cache/dact-bert/glue)")
    add("--seed", type=number(*RANGES["seed"]), default=0, help="of new weights, dropout and shuffling (default: 0)")
    add("--precision", choices=PRECISIONS, help="default: bfloat16 on hardware that has it, else float32")
    add("--stage1", metavar="FILE", help="skip stage 1: start stage 2 from the stage1.pt of an earlier run")
    add("--submit", metavar="FOLDER", help="write the test predictions of a finished run (--out) as GLUE takes them")
    add = parser.add_argument_group("the paper's settings").add_argument
    add("--tau", type=number(*RANGES["tau"]),
        help="price of a block in equation (3), in nats (default: 0.035; toy: 0.05; the paper's: 5e-3)")  # fmt: skip
    add("--epochs", type=number(*RANGES["epochs"]), help="passes in each stage (default: 3, DeeBERT's; toy: 16)")
    add("--max-tokens", type=number(*RANGES["max_tokens"]), default=128, help="longer inputs are cut (default: 128, DeeBERT's)")
    add = parser.add_argument_group("our settings").add_argument
    add("--rule", choices=dact.RULES, default="paper", help="halting rule that answers: (4), or our exact one (default: paper)")
    add("--batch", type=number(*RANGES["batch"]), help="sequences in a batch (default: 32; toy: 64)")
    add("--lr", type=number(*RANGES["lr"]), help="peak learning rate of all but the heads (default: 5e-5; toy: 4e-4)")
    add("--head-lr", type=number(*RANGES["head_lr"]), default=1e-3, help="that of the DACT heads (default: 1e-3)")
    add("--head-loss", type=number(*RANGES["head_loss"]),
        help="weight of every head's own loss in stage 2, beside (3) (default: 1; toy: 0.3; the paper's: 0)")  # fmt: skip
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

    asked: "float32", "bfloat16" or None.
    """
    cuda, flags = torch.cuda.is_available(), set()
    # The processes of torchrun cannot exchange gradients from mps.
    mps = torch.backends.mps.is_available() and not dist.is_initialized()
    device = torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied
        if torch.cuda.is_bf16_supported(including_emulation=False):
            flags = {"bfloat16"}
    elif device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        flags = set(Path("/proc/cpuinfo").read_text().split()) & {"amx_bf16", "avx512_bf16"}
    if asked:
        return device, asked, "asked for"
    if flags:
        return device, "bfloat16", f"the {'GPU' if cuda else 'CPU'} has {min(flags)}"
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
RUN_FILES = ("log.jsonl", "checkpoint.pt", "stage1.pt", "dact.pt", "metrics.json")


def settings(args):
    """What decides the numbers of a run, as its files keep it: only a run of the same settings goes on from a checkpoint."""
    names = "task model stage1 epochs batch max_tokens lr head_lr tau head_loss seed precision".split()
    return {name: getattr(args, name) for name in names} | {"processes": num_processes()}


def find_checkpoint(args):
    """Look at args.out before anything is loaded or written: the checkpoint to go on from, or None to begin.

    Raises InputError if args.out holds a run, unless it is to be overwritten, or resumed and has the same settings.
    """
    held = [name for name in RUN_FILES if (args.out / name).exists()]
    if not held or (args.overwrite and not args.resume):
        return None
    if "metrics.json" in held:
        what = "choose another --out, or start again with --overwrite and without --resume"
        raise InputError(f"{args.out} holds a finished run; {what}")
    if not args.resume:
        what = "go on with --resume, choose another --out, or start again with --overwrite"
        raise InputError(f"{args.out} holds an unfinished run; {what}")
    if "checkpoint.pt" not in held:
        return None
    checkpoint, wanted = read_checkpoint(args.out / "checkpoint.pt"), settings(args)
    found = checkpoint["settings"]
    for name, value in wanted.items():
        if type(found.get(name)) is not type(value) or found[name] != value:
            was = f"{args.out}: its run has {name} {data.plain(repr(found.get(name)))}, not {value!r}"
            raise InputError(f"{was}; ask for the same, choose another --out, or add --overwrite without --resume")
    if checkpoint["stage"] not in ("stage 1", "stage 2"):
        raise InputError(f"{args.out}: checkpoint.pt is of no stage of a run; start again with --overwrite")
    return checkpoint


def read_checkpoint(path):
    """The content of a checkpoint.pt, of the kinds that are relied on. Raises InputError."""
    checkpoint = bert.load_pickle(path)
    with data.reading(path, "start again with --overwrite"):
        checkpoint = dict(checkpoint)
        kinds = {"stage": str, "step": int, "settings": dict, "seconds": dict, "log_bytes": int, "model": dict,
                 "optimizer": dict, "rows": torch.Tensor}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(checkpoint[name], kind) or isinstance(checkpoint[name], bool):
                raise TypeError(f"{name} of another kind")
        rows, times = checkpoint["rows"], checkpoint["seconds"].values()
        check_like(torch.zeros(len(rows), 4), rows, name="rows")
        if checkpoint["step"] < 0 or checkpoint["log_bytes"] < 0 or not all(type(time) is float for time in times):
            raise ValueError("a number out of its range")
    return checkpoint


class Record:
    """How a run goes: on the screen, in log.jsonl and checkpoint.pt, and at its end in metrics.json.

    lines: how many a stage shows and logs.
    """

    def __init__(self, args, checkpoint=None, lines=20):
        self.args, self.out, self.checkpoint, self.lines = args, args.out, checkpoint, lines
        if len(set(gather(checkpoint and (checkpoint["stage"], checkpoint["step"])))) > 1:
            raise InputError(f"{self.out} does not hold the same run for every process; name a folder that all share")
        self.data = None  # checksums of what is trained on; what is trained beside a run (paper/) has none
        self.stage_1_is_done = checkpoint is not None and checkpoint["stage"] == "stage 2"  # and left its file
        self.seconds = checkpoint["seconds"] if checkpoint else {"stage 1": 0.0}

    def begin(self, train, dev):
        """Make args.out the folder of this run alone: none of an earlier run's RUN_FILES in it, and the settings in its log."""
        self.data = [zlib.crc32(torch.cat([*part.input_ids, part.labels]).numpy().tobytes()) for part in (train, dev)]
        if self.checkpoint and self.checkpoint.get("data") != self.data:
            raise InputError(f"{self.out}: its run was on other data; give the same, or choose another --out")
        if rank() > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        data.lock(self.out, self)
        if self.checkpoint:
            return
        for name in RUN_FILES:
            if not self.args.stage1 or (self.out / name).resolve() != Path(self.args.stage1).resolve():
                (self.out / name).unlink(missing_ok=True)
        self.log({"settings": settings(self.args)})

    def log(self, line):
        if rank() == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def start(self, stage, steps, model, optimizer):
        """A stage begins, or goes on where the checkpoint has it: the steps done."""
        self.stage, self.steps, self.done, self.values, self.rows = stage, steps, 0, [], torch.empty(0, 4)
        saved, path = self.checkpoint, self.out / "checkpoint.pt"
        if rank() == 0:
            (self.out / "log.jsonl").touch()
        if saved and saved["stage"] == stage:
            with data.reading(path, "it is of another model or machine; start again with --overwrite"):
                check_state(saved["model"], model)
                model.load_state_dict(saved["model"])
                own, theirs = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
                if [group | {"lr": 0} for group in own] != [group | {"lr": 0} for group in theirs]:
                    raise ValueError("the optimiser has other settings")
                optimizer.load_state_dict(saved["optimizer"])
                for group in optimizer.param_groups:
                    for parameter in group["params"]:  # the fused optimiser would write past the end of other moments
                        moments = optimizer.state[parameter]
                        check_like(parameter, moments["exp_avg"], moments["exp_avg_sq"])
                        check_like(torch.tensor(0.0), moments["step"].cpu())
                if not 0 < saved["step"] <= steps:
                    raise ValueError("it goes on where this run cannot be")
                torch.set_rng_state(saved["random"][rank()]["cpu"])
                if self.args.device.type == "cuda":
                    torch.cuda.set_rng_state(saved["random"][rank()]["cuda"])
                self.done, self.rows, log_bytes = saved["step"], saved["rows"], saved["log_bytes"]
            if rank() == 0:  # what came after the last finished epoch comes again
                os.truncate(self.out / "log.jsonl", min(log_bytes, (self.out / "log.jsonl").stat().st_size))
            print(f"resumed    {stage} after step {self.done}")
        self.began, self.earlier = time.perf_counter(), self.seconds.get(stage, 0.0)
        return self.done

    def add(self, step, values, examples):
        """What a step gave, (loss, price, mean h, gradient's norm); a line after so many. examples: of a step, on average."""
        self.values.append(values)  # left on the device, for reading them would stall it
        if step % max(1, self.steps // self.lines) == 0 or step == self.steps:
            self.collect(step)
            self.show(step, *self.rows.mean(0).tolist()[:3], (step - self.done) / (time.perf_counter() - self.began), examples)
            self.rows = self.rows[:0]

    def collect(self, step):
        """Fetch what the last steps gave, of all processes. Raises InputError if a loss or a gradient is no number."""
        if self.values:
            rows = torch.stack(gather(torch.stack(self.values).cpu())).mean(0)
            self.rows, self.values = torch.cat([self.rows, rows]), []
        self.seconds[self.stage] = self.earlier + time.perf_counter() - self.began
        bad = (~self.rows[:, [0, 3]].isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            what = f"the {('loss', 'norm of the gradient')[column]} is {self.rows[row, 3 * column]}"
            step -= len(self.rows) - 1 - row  # the last row is this step's
            raise InputError(f"{self.stage}: {what} at step {step}; add --overwrite and a smaller --lr or --head-lr")

    def show(self, step, loss, price, mean_h, speed, examples):
        """A line in the log and one on the screen, which on a terminal overwrites itself. speed: steps a second."""
        halting = {"price": price, "mean_h": mean_h} if mean_h else {}
        speeds = {"examples_per_second": speed * examples}
        self.log({"stage": self.stage, "step": step, "loss": loss, **halting, **speeds})
        line = f"{self.stage} {step:>6}/{self.steps}  loss {loss:.4f}"
        line += f"  price {price:.4f}  mean h {mean_h:.3f}" if halting else ""
        line += f"{speed * examples:>8.0f}/s {(self.steps - step) / speed / 60:>5.1f} min left"
        print(line, end="\r" if sys.stdout.isatty() and step < self.steps else "\n", flush=True)

    def save_checkpoint(self, step, model, optimizer):
        """All that training needs to go on from here to the same numbers."""
        self.collect(step)
        cuda = self.args.device.type == "cuda"
        random = gather({"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if cuda else {}))
        if rank() == 0:
            place = {"stage": self.stage, "step": step, "seconds": self.seconds, "settings": settings(self.args)}
            place |= {"rows": self.rows, "data": self.data, "log_bytes": (self.out / "log.jsonl").stat().st_size}
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
            save(self.out / "checkpoint.pt", place | state)

    def finish(self, results, name):
        """Write metrics.json; the checkpoint goes, and the other processes."""
        seconds = {stage.replace(" ", ""): took for stage, took in self.seconds.items()} | results["seconds"]
        content = settings(self.args) | {"model": name, "rule": self.args.rule} | results
        content |= {"seconds": seconds, "versions": VERSIONS}
        write_whole(self.out / "metrics.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
        if rank() == 0:
            (self.out / "checkpoint.pt").unlink(missing_ok=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def write_whole(path, write):
    """Call `write(file)` on a file beside `path` and rename it, in the first process: `path` is never half written."""
    if rank() > 0:
        return
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, is to outlive a loss of power
            folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except RuntimeError as error:  # torch.save turns whatever ends a write into one
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        reason = error.__context__ if isinstance(error.__context__, OSError) else "the disk may be full"
        raise InputError(f"cannot write {path} ({reason}); free some space, then add --resume") from None
    finally:
        part.unlink(missing_ok=True)


def save(path, content):
    write_whole(path, lambda file: torch.save(content, file))


HEADS = "figure 1, halting with a layer of its own"  # what a dact.pt holds; one of other heads cannot be read


def backbone_of(model):
    """The `bert.Bert` of a BertClassifier or a DactBert."""
    return model.bert if isinstance(model, bert.BertClassifier) else model.backbone


def save_model(path, model, tokenizer, name, max_tokens, task):
    """Write stage1.pt or dact.pt: all that `load_run` needs."""
    stage = 2 if isinstance(model, dact.DactBert) else 1
    save(path, {"task": task, "stage": stage, "heads": HEADS, "model": name, "max_tokens": max_tokens,
                "config": asdict(backbone_of(model).config), "tokenizer": tokenizer.to_str(), "state": model.state_dict()})  # fmt: skip


class Saved(NamedTuple):
    """A model of a finished run, with what it takes to use it."""

    model: torch.nn.Module  # a BertClassifier (stage 1) or a DactBert (stage 2), on the CPU
    tokenizer: Tokenizer
    name: str  # of the model that training started from
    max_tokens: int  # longer inputs are cut
    task: str

    def encode(self, texts, device="cpu"):
        """Texts (str, or (str, str) for a pair) -> what the model takes: ids (B, T), segments (B, T), mask (B, T)."""
        examples, pad_id = data.Examples(texts, [0] * len(texts)), backbone_of(self.model).config.pad_token_id
        dataset = data.Dataset(examples, self.tokenizer, self.max_tokens, pad_id)
        return to_device(dataset.batch(range(len(texts)))[0], torch.device(device))


def load_run(path, stage=2, task=None):
    """Open a stage1.pt (stage 1) or dact.pt (2) of a run on `task` (by default on any): `Saved`.

    Nothing in the file can run code. Raises InputError for a file that is not of such a run, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a run that finished this stage")
    saved = bert.load_pickle(path)
    with data.reading(path, "it is no model of a run; name another file"):
        found, tokenizer = (saved["task"], saved["stage"]), Tokenizer.from_str(saved["tokenizer"])
        name, max_tokens, state, config = (saved[key] for key in ("model", "max_tokens", "state", "config"))
        if not isinstance(found[0], str) or type(found[1]) is not int or not isinstance(name, str):
            raise TypeError("a field of another kind")
    task = task or found[0]
    if found != (task, stage):
        wanted = f"expected stage {stage} on {task!r}"
        raise InputError(f"{path}: stage {found[1]} of a run on {data.plain(found[0])!r}, {wanted}; name another one")
    if stage == 2 and saved.get("heads") != HEADS:
        raise InputError(f"{path}: written by a version of dact-bert that had other heads; train again")
    config = bert.BertConfig.from_dict(config, str(path))
    bert.check_tokenizer(tokenizer, config, path)
    if type(max_tokens) is not int or not 8 <= max_tokens <= config.max_tokens:
        raise InputError(f"{path}: max_tokens is {data.plain(max_tokens)!r}, for {config.max_tokens} positions; name another run")
    num_classes = len(data.find_task(task).labels)
    with torch.device("meta"), bert.NoRandomStart():  # for the file overwrites it
        model = bert.Bert(config)
        if stage == 1:
            model = bert.BertClassifier(model, bert.Classifier(config, num_classes))
        else:
            model = dact.DactBert(model, num_classes)
    with data.reading(path, "its weights do not fit its own config; name another run"):
        check_state(state, model)
        model.load_state_dict(state, assign=True)
    return Saved(model, tokenizer, data.plain(name, 200), max_tokens, task)


def check_state(state, model):
    """Raise ValueError unless a state dict has tensors of the very kinds that the model's own are of."""
    wanted = model.state_dict()
    if state.keys() != wanted.keys():
        raise ValueError(f"other tensors, such as {min(state.keys() ^ wanted.keys())}")
    for name, tensor in wanted.items():
        check_like(tensor, state[name], name=name)


def check_like(tensor, *others, name="a tensor"):
    for other in others:
        if (other.shape, other.dtype, other.layout) != (tensor.shape, tensor.dtype, tensor.layout):
            raise ValueError(f"{name} is {other.dtype} {tuple(other.shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
        if other.is_meta or not other.is_contiguous():
            raise ValueError(f"{name} holds no numbers of its own")
        if not bert.all_finite(other):
            raise ValueError(f"{name} holds a number that is not finite")


def interrupt(*_):
    """What SIGTERM does: the same as Ctrl-C, which a job in the background ignores."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="replace")  # a console that has no ▁ shows ? and goes on
    sys.exit(main())
