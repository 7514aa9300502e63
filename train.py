"""Both fine-tuning stages of DACT-BERT, their evaluation, and the command line.

    python train.py                 the toy task: a tiny BERT from scratch, two minutes on a laptop
    python train.py --task rte      the paper's experiment: downloads Google's BERT-base and GLUE's RTE
    python train.py --explain "the tea was not lovely"     a finished run at work on your own sentence
    torchrun --nproc_per_node 2 train.py --task rte        the same on two GPUs, or wherever torchrun starts processes

Stage 1 fine-tunes the backbone and one classifier. Stage 2 starts from it and trains backbone and DACT heads together;
then the halting units learn once more, alone.
Shapes: B sequences, C classes, N blocks.
"""

import argparse
import copy
import json
import os
import platform
import signal
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
DEFAULTS = {"epochs": (3, 16), "batch": (32, 64), "lr": (5e-5, 4e-4), "head_loss": (1.0, 0.3)}
PRECISIONS = ("float32", "bfloat16")


def main(argv=None):
    try:
        args = parse_arguments(argv)
        if args.explain is not None:
            explain(args)
        elif args.submit is not None:
            submit(args)
        else:
            run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; try a smaller --batch or --max-tokens", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on after the last finished epoch", file=sys.stderr)
        return 130
    return 0


def stop(*_):
    """What SIGTERM does: the same as Ctrl-C, also in a background job, which ignores that."""
    raise KeyboardInterrupt


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_arguments(argv):
    parser = Parser(description="Fine-tune DACT-BERT in the two stages of the paper.")
    add, rate = parser.add_argument, number(float, 1e-12, 1e3)
    add("--task", default="toy", help=f"one of {', '.join(data.TASKS)} (default: toy)")
    add(
        "--model", help="a name such as bert-base-uncased (the default), bert-small or roberta-base, or a folder or zip"
    )
    add("--data", help="folder of the GLUE files; missing ones are downloaded (default: ~/.cache/dact-bert/glue)")
    add("--out", help="folder that the run leaves (default: runs/TASK)")
    add("--epochs", type=number(float, 1e-3, 1e4), help="passes in each stage (default: 3, DeeBERT's; toy: 16)")
    add("--batch", type=number(int, 1, 65536), help="sequences in a batch (default: 32, our choice; toy: 64)")
    add("--max-tokens", type=number(int, 8, 65536), default=128, help="longer inputs are cut (default: 128, DeeBERT's)")
    add("--lr", type=rate, help="peak learning rate of all but the DACT heads (default: 5e-5, our choice; toy: 4e-4)")
    add("--head-lr", type=rate, default=1e-3, help="peak learning rate of the DACT heads (default: 1e-3, our choice)")
    add("--tau", type=number(float, 0, 1e3), default=0.05,
        help="price of a block in equation (3), in nats (default: 0.05, our choice; the paper's: 5e-3)")  # fmt: skip
    add("--head-loss", type=number(float, 0, 1e3),
        help="weight of every head's own loss in stage 2, beside (3) (default: 1; toy: 0.3; the paper's: 0)")  # fmt: skip
    add("--rule", choices=dact.RULES, default="paper",
        help="halting rule that answers: (4), or our exact one (default: paper)")  # fmt: skip
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of new weights, dropout and shuffling (default: 0)")
    add("--precision", choices=PRECISIONS, help="default: bfloat16 on hardware that has it, else float32")
    add("--stage1", metavar="FILE", help="skip stage 1: start stage 2 from the stage1.pt of an earlier run")
    add("--resume", action="store_true", help="go on with the interrupted run in --out after its last finished epoch")
    add("--overwrite", action="store_true", help="start again although --out holds a run")
    add("--submit", metavar="FOLDER", help="write the test predictions of a finished run (--out) as GLUE takes them")
    add("--explain", nargs="+", metavar="TEXT", help="show the equations at work on a sentence or pair (run: --out)")
    args = parser.parse_args(argv)
    scratch = args.task == "toy" and args.model is None
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[scratch])
    args.out = Path(args.out or f"runs/{args.task}")
    return args


def number(kind, low, high):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:  # also refuses nan
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {low} to {high},"  # argparse puts it into its message
    return parse


# ---------------------------------------------------------------------------------------------------------------------
# A run


def run(args):
    """Stage 1, stage 2, evaluation; leaves stage1.pt, dact.pt, metrics.json and log.jsonl in args.out."""
    join_processes()
    device = pick_device()
    precision, reason = pick_precision(device, args.precision)
    checkpoint = find_checkpoint(args, precision)
    if len(set(everyone(checkpoint and (checkpoint["stage"], checkpoint["step"])))) > 1:
        raise InputError(
            f"{args.out} does not hold the same run for every process; name a folder that all machines share"
        )
    torch.manual_seed(args.seed)
    stage_1_is_done = checkpoint is not None and checkpoint["stage"] == "stage 2"  # and left its file
    stage1, tokenizer, name = starting_model(args, args.out / "stage1.pt" if stage_1_is_done else args.stage1)
    pad_id = stage1.bert.config.pad_token_id
    max_tokens = min(args.max_tokens, stage1.bert.config.max_tokens)
    train, dev = (data.Dataset(split, tokenizer, max_tokens, pad_id) for split in data.load_task(args.task, args.data))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__}
    print(f"device     {device}, {precision} ({reason})" + f", {num_processes()} processes" * dist.is_initialized())
    print(f"model      {name}, {sum(p.numel() for p in stage1.parameters()) / 1e6:.1f} M parameters")
    print(f"task       {args.task}, {len(train)} training and {len(dev)} dev examples, seed {args.seed}")
    print("versions   " + ", ".join(f"{key} {value}" for key, value in versions.items()))

    header = {"task": args.task, "model": name, "max_tokens": max_tokens}
    header |= {"config": asdict(stage1.bert.config), "tokenizer": tokenizer.to_str()}
    seconds = checkpoint["seconds"] if checkpoint else {"stage 1": 0.0}
    if checkpoint is None and rank() == 0:
        clear_folder(args, precision)
    stage1.to(device)
    if not stage_1_is_done:
        if args.stage1 is None:
            fit("stage 1", stage1, stage1_loss, train, args, device, precision, checkpoint, seconds)
        save(args.out / "stage1.pt", header | {"stage": 1, "state": stage1.state_dict()})
    torch.manual_seed(args.seed)  # stage 2 is the same whether stage 1 ran before it or was read from a file
    adaptive = dact.DactBert(copy.deepcopy(stage1.bert), len(data.find_task(args.task).labels)).to(device)
    without_dropout(adaptive.backbone)
    loss = stage2_loss(args.tau, args.head_loss)
    fit("stage 2", adaptive, loss, train, args, device, precision, checkpoint, seconds)
    learn_halting(adaptive, args.tau, train, args, device, precision, seconds=seconds)
    save(args.out / "dact.pt", header | {"stage": 2, "state": adaptive.state_dict()})

    N = len(adaptive.backbone.blocks)
    results = evaluate(stage1, adaptive, dev, args, device, precision)
    report(results, train, dev, args, N)
    write_metrics(results, seconds, dev, args, name, precision, versions, N)
    if rank() == 0:
        (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"saved      {args.out}/dact.pt and metrics.json")
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device():
    """The best device there is: cuda (with TF32 where it multiplies float32), then mps, then cpu."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    # The processes of torchrun cannot exchange gradients from mps.
    return torch.device("mps" if torch.backends.mps.is_available() and not dist.is_initialized() else "cpu")


def pick_precision(device, asked):
    """("float32" or "bfloat16", the reason): bfloat16 only where the hardware multiplies it natively, and so faster."""
    if asked:
        return asked, "asked for"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU has it") if native else ("float32", "the GPU has no bfloat16")
    if device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        for flag in ("amx_bf16", "avx512_bf16"):
            if flag in flags:
                return "bfloat16", f"the CPU has {flag}"
    return "float32", "no native bfloat16 known on it"


def starting_model(args, stage1=None):
    """What training starts from: (BertClassifier, Tokenizer, name of the model).

    The model of the file `stage1`, if there is one, or pretrained weights, or for the toy task a tiny BERT with random ones.
    """
    num_classes = len(data.find_task(args.task).labels)
    if stage1 is not None:
        return load_run(Path(stage1), 1, args.task)[:3]
    if args.task == "toy" and args.model is None:
        model = bert.BertClassifier(bert.Bert(TOY_CONFIG), bert.Classifier(TOY_CONFIG, num_classes))
        return model.apply(bert.init_weights), bert.wordpiece_tokenizer(TOY_VOCAB), SCRATCH
    name = args.model or "bert-base-uncased"
    return *bert.load_pretrained(name, num_classes), name


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, one for each GPU: torchrun starts the same program once for each


def join_processes():
    """Under torchrun, meet the other processes. Each has its own GPU, and only the first prints and writes files."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    local, wanted = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if wanted > torch.cuda.device_count():
            raise InputError(
                f"{wanted} processes on {torch.cuda.device_count()} GPUs; give torchrun a smaller --nproc_per_node"
            )
        torch.cuda.set_device(local)  # "cuda" is this one from here on
    dist.init_process_group()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone(thing):
    """[the thing of every process], in the order of their numbers; all have to ask, and wait for each other."""
    things = [thing] * num_processes()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


# ---------------------------------------------------------------------------------------------------------------------
# Training


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
        total = answer + price
        if head_loss:
            # DIFFERS: (3) judges a_N alone, so a head learns in proportion to its weight in a_N, and those after a closed
            # gate not at all. Here every head also sees the label: the mean over n of L(y_n, label).
            total = total + head_loss * dact.dact_loss(y.flatten(0, 1), h, labels.repeat(len(y)), tau)[0]
        return total, price, h.mean()

    return loss


def without_dropout(backbone):
    """Put all dropout of a backbone at rate 0."""
    # DIFFERS: in the early blocks dropout moves [CLS] 2 to 46 times as far as the input does (by 0.04 against 0.0009
    # after block 1), so no head there can learn from it.
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def learn_halting(model, tau, train, args, device, precision, seconds=None):
    """Stage 2 goes on: the halting units of a `DactBert` learn once more by (3), alone. seconds: as for `fit`."""
    # CHOICE: while the answers still change, halting follows them badly: it settles on one or two blocks for all inputs.
    # Learned anew with everything else as it is now, it depends on the input. On vectors that are computed once this
    # takes seconds, so it has three times the epochs.
    args = argparse.Namespace(**vars(args) | {"epochs": 3 * args.epochs})
    vectors = Features(model.backbone, train, device, precision, most=20_000)
    torch.manual_seed(args.seed)
    fit("halting", HaltingAlone(model.heads), stage2_loss(tau), vectors, args, device, "float32", seconds=seconds)


class Features:
    """[CLS] vectors after every block, computed once, for heads that learn on a backbone that does not. As `fit` reads them.

    most: examples that are taken, by default all; each needs 4 N D bytes of memory.
    """

    def __init__(self, backbone, dataset, device, precision, most=None):
        backbone.eval()
        taken = np.sort(np.random.default_rng(0).permutation(len(dataset))[:most])
        self.labels, self.lengths = dataset.labels[taken], dataset.lengths[taken]
        self.cls = torch.empty(len(taken), len(backbone.blocks), backbone.hidden_size)
        for rows in data.evaluation_batches(self.lengths, 64):
            *inputs, mask = to_device(dataset.batch(taken[rows])[0], device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                hidden = backbone.embed(*inputs)
                for n, block in enumerate(backbone.blocks):
                    hidden = block(hidden, mask)
                    self.cls[rows, n] = hidden[:, 0].float().cpu()

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """-> ((cls (B, N, D),), labels (B,))."""
        return (self.cls[indices],), self.labels[indices]


class HaltingAlone(torch.nn.Module):
    """The heads of a `DactBert` over `Features`: cls (B, N, D) -> y (N, B, C), h (N, B). Halting alone learns, anew."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        for head in heads:
            head.reset_halting()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".halt." in name)

    def train(self, mode=True):
        return super().train(False)  # the scale on which the heads read stays as it is

    def forward(self, cls):
        pairs = [head(x) for head, x in zip(self.heads, cls.unbind(1))]
        return tuple(torch.stack(column) for column in zip(*pairs))


def parameter_groups(model, args):
    """For AdamW: decay on matrices only, and a learning rate of their own for the DACT heads."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = args.head_lr if name.startswith("heads.") else args.lr
            groups.setdefault((lr, 0.01 if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": members, "peak_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


def fit(stage, model, loss_of, train, args, device, precision, checkpoint=None, seconds=None):
    """Train `model` in place for args.epochs; prints a line per interval.

    Leaves args.out/checkpoint.pt after every epoch. checkpoint: the content of one; if it is of this stage, training
    goes on after it, to the same numbers. seconds: {stage: what its training took}, for the checkpoint to keep.
    """
    torch.manual_seed(args.seed + rank())  # each process has a dropout of its own
    seconds = {} if seconds is None else seconds
    per_epoch = -(-len(train) // args.batch)
    steps = max(1, round(args.epochs * per_epoch))
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    done, interval = 0, max(1, steps // 20)
    if checkpoint and checkpoint["stage"] == stage:
        done = restore(checkpoint, model, optimizer, device, args.out)
    earlier = seconds.get(stage, 0.0)
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model  # the same weights, shared gradients
    began, examples = time.perf_counter(), 0
    sums = []  # (loss, price, mean h) of each step since the last line, left on the device: reading them would stall it
    model.train()
    batches = endless_batches(train, args, done // per_epoch)
    for step in range(done + 1, steps + 1):
        indices = next(batches)
        inputs, labels, weight = own_share(train, indices, device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * warm_up_and_decay(step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            said = loss_of(parallel, inputs, labels)
        (said[0] * weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        examples += len(indices)
        sums.append(torch.stack(said).detach() * weight)
        epoch_ends = step % per_epoch == 0 or step == steps
        if step % interval == 0 or epoch_ends:
            rows, sums = torch.stack(everyone(torch.stack(sums).cpu())).mean(0), []
            stop_unless_finite(rows[:, 0], stage, step, steps, args)
            elapsed = time.perf_counter() - began
            rate = examples / elapsed, (step - done) / elapsed
            progress(stage, step, steps, rows.mean(0).tolist(), rate, args.out)
        if epoch_ends:
            seconds[stage] = earlier + elapsed
            if stage != "halting":  # which takes seconds, and starts from where stage 2 ended
                place = {"stage": stage, "step": step, "seconds": seconds}
                save_checkpoint(args.out, place, model, optimizer, device)
    if dist.is_initialized():
        for buffer in model.buffers():  # what the last step observed differs between processes
            dist.broadcast(buffer, 0)


def warm_up_and_decay(step, steps):
    """The share of the peak learning rate at a step from 1 to `steps`."""
    warmup = max(1, steps // 10)  # CHOICE: linear warm-up over a tenth of the steps, then linear decay to 0
    return min(step / warmup, (steps - step + 1) / (steps - warmup + 1))


def stop_unless_finite(losses, stage, step, steps, args):
    """Raise InputError if one of the losses of the steps up to `step` is no number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step += 1 + bad[0].item() - len(losses)
        rate, last = args.lr * warm_up_and_decay(step, steps), args.out / "checkpoint.pt"
        sound = f"the last sound state is {last}" if last.is_file() else "no epoch was finished"
        raise InputError(
            f"{stage}: the loss is {losses[bad[0]].item()} at step {step}, learning rate {rate:.2g}; "
            f"start again with a smaller --lr ({sound})"
        )


def save_checkpoint(out, place, model, optimizer, device):
    """All that training needs to go on from here to the same numbers; place: where it stands, plain values."""
    random = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})
    random = everyone(random)
    if rank() == 0:
        place |= {"log_bytes": (out / "log.jsonl").stat().st_size}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
        save(out / "checkpoint.pt", place | state)


def restore(checkpoint, model, optimizer, device, out):
    """Put a checkpoint into a model and its optimizer, cut the log back to it. Returns the steps done."""
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        random = checkpoint["random"][rank()]
        torch.set_rng_state(random["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
    except (RuntimeError, ValueError, LookupError, TypeError):
        raise InputError("checkpoint.pt is of another model or machine; start again with --overwrite") from None
    if rank() == 0:  # what came after the last finished epoch comes again
        os.truncate(out / "log.jsonl", checkpoint["log_bytes"])
    print(f"resumed    {checkpoint['stage']} after step {checkpoint['step']}")
    return checkpoint["step"]


def progress(stage, step, steps, means, rate, out):
    """One aligned line to the terminal and one of JSON to the log. rate: (examples, steps) a second."""
    halting = {"price": means[1], "mean_h": means[2]} if means[2] else {}
    write_log(out, {"stage": stage, "step": step, "loss": means[0], **halting, "examples_per_second": rate[0]}, "a")
    words = "price {price:.4f}  mean h {mean_h:.3f}  ".format(**halting) if halting else ""
    print(
        f"{stage}  step {step:>5}/{steps}  loss {means[0]:.4f}  {words}"
        f"{rate[0]:7.1f} examples/s  {(steps - step) / rate[1] / 60:5.1f} min left",
        flush=True,
    )


def endless_batches(train, args, epoch):
    """The batches, as arrays of indices, from an epoch (from 0) on, each epoch in an order of its own."""
    while True:
        yield from data.training_batches(train.lengths, args.batch, (args.seed, epoch))
        epoch += 1


def own_share(train, indices, device):
    """This process's rows of a batch, on the device: (inputs, labels, weight).

    The batch's loss is the sum of every process's mean, each times its share of the rows; DistributedDataParallel takes
    the mean of the gradients. So weight = processes * own rows / all rows: one process alone has 1.
    """
    own = indices[rank() :: num_processes()]
    weight = num_processes() * len(own) / len(indices)
    # A batch may have fewer rows than there are processes, but all must take part: then with a row that weighs nothing.
    inputs, labels = train.batch(own if len(own) else indices[:1])
    *inputs, labels = to_device((*inputs, labels), device)
    return inputs, labels, weight


def to_device(tensors, device):
    """The tensors on a device. A GPU fetches them out of pinned memory while the program goes on."""
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    return tuple(x.pin_memory().to(device, non_blocking=True) for x in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Answers(NamedTuple):
    """What one form of the model said about n examples."""

    labels: torch.Tensor  # (n,) int64, predicted classes
    exit_block: torch.Tensor  # (n,) int64, from 1
    seconds: float  # of all processes together


def evaluate(stage1, adaptive, dev, args, device, precision):
    """Run the dev set through every variant of the model: {variant: Answers}.

    Variants: "stage 1"; the halting rules; "control", untrained halting: args.rule with the halting units as they were
    before training. Beside them the classes that "all blocks" say, the winners of DACT's a_N (n,), and that each of
    "blocks" says, those of every y_n (N, n).
    """
    N = len(adaptive.backbone.blocks)
    untrained = copy.deepcopy(adaptive, {id(adaptive.backbone): adaptive.backbone})  # but the backbone itself
    for head in untrained.heads:
        head.reset_halting()
    for model in (stage1, adaptive, untrained):
        model.eval()
    forms = {
        "stage 1": lambda *inputs: all_blocks(stage1(*inputs), N),
        **{name: partial(adaptive.early_exit, rule=rule) for name, rule in dact.RULES.items()},
        "control": partial(untrained.early_exit, rule=dact.RULES[args.rule]),
    }
    y, h = outputs(adaptive, dev, args.batch, device, precision)
    a, _ = dact.accumulate_all(y, h)
    return answer(forms, dev, args.batch, device, precision) | {"all blocks": a[-1].argmax(-1), "blocks": y.argmax(-1)}


@torch.no_grad()
def outputs(model, dataset, batch_size, device, precision):
    """What a model gives of every block for every example: (N, n, ...) on the CPU, one tensor for each of its outputs."""
    batches, rows = data.evaluation_batches(dataset.lengths, batch_size), []
    for indices in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = model(*to_device(dataset.batch(indices)[0], device))
        rows.append([x.float().cpu() for x in (found if isinstance(found, tuple) else (found,))])
    back = torch.cat([torch.as_tensor(indices) for indices in batches]).argsort()
    return [torch.cat(column, 1)[:, back] for column in zip(*rows)]


def dealt_by_chance(blocks, exit_block, score, deals=200):
    """The score if chance dealt the same exits out among the examples; what is beyond it, the choice of who leaves won.

    blocks (N, n): the class that each block's y_n says; exit_block (n,), from 1; score: labels (n,) -> number. The mean of
    so many deals.
    """
    generator, n = torch.Generator().manual_seed(0), len(exit_block)
    dealt = (exit_block[torch.randperm(n, generator=generator)] for _ in range(deals))
    return sum(score(blocks[exits - 1, torch.arange(n)]) for exits in dealt) / deals


def all_blocks(scores, N):
    """`Halted` for a model that ran all N blocks: scores (B, C), logits or probabilities."""
    label = scores.argmax(1)
    return dact.Halted(label, scores, torch.full_like(label, N))


@torch.no_grad()
def answer(forms, dataset, batch_size, device, precision, passes=2):
    """Run a dataset through functions inputs -> `Halted`: {form: Answers}.

    Each batch goes through all forms in turn, so that their times meet the same batches and the same noise; through each
    twice, and the second time counts. For survivors of an early exit make ever new shapes of batch, and what a device
    prepares at its first meeting with a shape can cost as much as the work itself. passes: 1 where no time is asked for.
    Processes share the batches out among them and all get all answers.
    """
    said = {form: torch.zeros(2, len(dataset), dtype=torch.long) for form in forms}
    seconds = dict.fromkeys(forms, 0.0)
    batches = data.evaluation_batches(dataset.lengths, batch_size)[rank() :: num_processes()]
    # One autocast around all: the weights are cast at their first use and kept in bfloat16 to the end.
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for indices in batches:
            inputs = to_device(dataset.batch(indices)[0], device)
            for form, run_form in forms.items():
                for _ in range(passes):
                    began = time.perf_counter()
                    halted = run_form(*inputs)
                    said[form][:, indices] = torch.stack(
                        [halted.label, halted.exit_block]
                    ).cpu()  # waits for the device
                    elapsed = time.perf_counter() - began
                seconds[form] += elapsed
    parts = everyone((said, seconds))
    said = {form: torch.stack([said[form] for said, _ in parts]).amax(0) for form in forms}  # 0: another one's example
    return {form: Answers(*said[form], sum(seconds[form] for _, seconds in parts)) for form in forms}


def scores(predicted, labels, task):
    """{metric: percent} of predicted classes (n,) against labels (n,)."""
    return {name: data.METRICS[name](predicted, labels) for name in data.TASKS[task].metrics}


def blocks_used(answers, N):
    """What halting saved: percent of blocks, mean exit block, and how many examples left after each block."""
    mean = answers.exit_block.double().mean().item()
    return {
        "saved": 100 * (1 - mean / N),
        "mean_blocks": mean,
        "exit_histogram": torch.bincount(answers.exit_block, minlength=N + 1)[1:].tolist(),
    }


def same_as_all_blocks(results, rule):
    """On how many examples early exit by `rule` gave the answer of all blocks."""
    return (results[rule].labels == results["all blocks"]).sum().item()


def by_chance(results, dev, args, rule="paper"):
    """{metric: percent} of the exits of `rule` dealt out by chance among the dev examples."""

    def dealt(metric):
        return dealt_by_chance(
            results["blocks"], results[rule].exit_block, lambda found: data.METRICS[metric](found, dev.labels)
        )

    return {metric: dealt(metric) for metric in data.TASKS[args.task].metrics}


def by_group(results, dev, args):
    """Scores and mean blocks for each group of the dev set (the toy's levels, MNLI's two dev files), if it has any."""
    groups = {}
    for name in dict.fromkeys(dev.groups):
        of_group = torch.tensor([group == name for group in dev.groups])
        full, halted = results["stage 1"], results[args.rule]
        groups[name] = {
            "examples": of_group.sum().item(),
            "full": scores(full.labels[of_group], dev.labels[of_group], args.task),
            "dact": scores(halted.labels[of_group], dev.labels[of_group], args.task),
            "mean_blocks": halted.exit_block[of_group].double().mean().item(),
        }
    return groups


def report(results, train, dev, args, N):
    """The tables at the end of a run."""
    metrics = data.TASKS[args.task].metrics
    majority = torch.full_like(dev.labels, train.labels.mode().values.item())
    full, early = results["stage 1"], results["paper"]
    print("\n" + " " * 26 + "".join(f"{name:>10}" for name in metrics) + "   blocks saved   seconds   speed-up")
    print_row("majority class", scores(majority, dev.labels, args.task))
    rows = {"stage 1, all blocks": full, "DACT, rule (4)": early, "DACT, exact rule": results["exact"]}
    for title, answers in (rows | {"untrained halting": results["control"]}).items():
        timed = f"{answers.seconds:>10.2f}{full.seconds / answers.seconds:>10.2f}x"
        print_row(title, scores(answers.labels, dev.labels, args.task), blocks_used(answers, N)["saved"], timed)
        if answers is early:
            print_row("  its exits by chance", by_chance(results, dev, args), blocks_used(answers, N)["saved"])
    for rule in dact.RULES:
        same = same_as_all_blocks(results, rule)
        print(f"rule {rule!r}: the answer of all blocks on {same} of {len(dev)} dev examples")
    left = blocks_used(early, N)["exit_histogram"]
    print(f"\nby rule (4), so many leave after block 1 to {N}: " + " ".join(map(str, left)))
    if dev.groups:
        print(f"\n{'group':<12}examples   stage 1   DACT ({args.rule} rule)   mean blocks")
        for name, group in by_group(results, dev, args).items():
            first, second = group["full"][metrics[0]], group["dact"][metrics[0]]
            print(f"{name:<12}{group['examples']:>8}{first:>9.1f}%{second:>18.1f}%{group['mean_blocks']:>14.2f}")


def print_row(title, found, saved=None, timed=""):
    """A line of the table: found {metric: percent}, and the blocks saved in percent."""
    columns = "".join(f"{value:>9.1f}%" for value in found.values())
    print(f"{title:<26}{columns}" + (f"{saved:>14.1f}%" if saved is not None else "") + timed)


def write_metrics(results, seconds, dev, args, name, precision, versions, N):
    """metrics.json: what was run, and what came of it."""

    def found(variant):
        return scores(results[variant].labels, dev.labels, args.task) | blocks_used(results[variant], N)

    rules = {rule: found(rule) for rule in dact.RULES}
    for rule in dact.RULES:
        rules[rule]["same_as_all_blocks"] = same_as_all_blocks(results, rule)
        rules[rule]["by_chance"] = by_chance(results, dev, args, rule)
    seconds = {stage.replace(" ", ""): took for stage, took in seconds.items()}
    seconds |= {"dev_full": results["stage 1"].seconds, "dev_early_exit": results[args.rule].seconds}
    content = {
        **settings(args, precision), "model": name, "rule": args.rule,
        "full": scores(results["stage 1"].labels, dev.labels, args.task), "dact": rules[args.rule], "rules": rules,
        "control": found("control"), "groups": by_group(results, dev, args),
        "seconds": seconds, "versions": versions,
    }  # fmt: skip
    write_whole(args.out / "metrics.json", lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run

RUN_FILES = ("log.jsonl", "checkpoint.pt", "stage1.pt", "dact.pt", "metrics.json")


def settings(args, precision):
    """What decides the numbers of a run, as log.jsonl (so that only its like resumes it) and metrics.json keep it."""
    names = "task model stage1 epochs batch max_tokens lr head_lr tau head_loss seed".split()
    return {name: getattr(args, name) for name in names} | {"precision": precision, "processes": num_processes()}


def find_checkpoint(args, precision):
    """Look at args.out before anything is loaded or written: the checkpoint to go on from, or None to begin.

    Raises InputError if args.out holds a run, unless it is to be overwritten, or resumed and has the same settings.
    """
    held = [name for name in RUN_FILES if (args.out / name).exists()]
    if not held or (args.overwrite and not args.resume):
        return None
    if "metrics.json" in held:
        raise InputError(f"{args.out} holds a finished run; choose another --out, or start again with --overwrite")
    if not args.resume:
        raise InputError(
            f"{args.out} holds an unfinished run; go on with --resume, choose another --out, or begin again with "
            "--overwrite"
        )
    log = args.out / "log.jsonl"
    try:
        with open(log, encoding="utf-8") as file:
            found = json.loads(file.readline(1 << 16))["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{log} does not say what was run; start again with --overwrite") from None
    wanted = settings(args, precision)
    for name, value in found:
        if name not in wanted or wanted[name] != value:
            raise InputError(
                f"{args.out}: its run has {name} {value!r}, not {wanted.get(name)!r}; "
                "ask for the same, or choose another --out"
            )
    if not (args.out / "checkpoint.pt").exists():
        return None
    checkpoint = bert.load_pickle(args.out / "checkpoint.pt")
    if not isinstance(checkpoint, dict) or not {"stage", "step", "seconds", "log_bytes"} <= checkpoint.keys():
        raise InputError(f"{args.out / 'checkpoint.pt'} is no checkpoint; start again with --overwrite")
    return checkpoint


def clear_folder(args, precision):
    """Make args.out the folder of a run that begins: nothing of an earlier one in it, and the settings in its log."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        if not args.stage1 or (args.out / name).resolve() != Path(args.stage1).resolve():
            (args.out / name).unlink(missing_ok=True)
    write_log(args.out, {"settings": settings(args, precision)}, "w")


def write_log(out, line, mode):
    if rank() > 0:
        return
    with open(out / "log.jsonl", mode, encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_whole(path, write):
    """Call `write(file)` on a file beside `path` and rename it, in the first process: `path` is never half written."""
    if rank() > 0:
        return
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save(path, content):
    try:
        write_whole(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # torch.save turns a failed write into one
        reason = error.__context__ if isinstance(error.__context__, OSError) else "the disk may be full"
        raise InputError(f"cannot write {path} ({reason}); free some space, then add --resume") from None


def load_run(path, stage, task):
    """The model of a stage1.pt (stage 1, a BertClassifier) or dact.pt (2, a DactBert), its tokenizer, and the rest.

    Nothing in the file can run code. Raises InputError for a file that is not of a run on `task`, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a run that finished this stage")
    saved = bert.load_pickle(path)
    try:
        found = saved["task"], saved["stage"]
        tokenizer = Tokenizer.from_str(saved["tokenizer"])
        name, max_tokens, state, config = (saved[key] for key in ("model", "max_tokens", "state", "config"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"{path}: not a file of a run ({type(error).__name__}); name another one") from None
    if found != (task, stage):
        raise InputError(
            f"{path}: stage {found[1]} of a run on {found[0]!r}, expected stage {stage} on {task!r}; name another one"
        )
    config = bert.BertConfig.from_dict(config, str(path))
    if type(max_tokens) is not int or not 1 <= max_tokens <= config.max_tokens:
        raise InputError(f"{path}: max_tokens is {max_tokens!r}, for {config.max_tokens} positions; name another run")
    num_classes = len(data.find_task(task).labels)
    with torch.device("meta"), bert.NoRandomStart():  # for the file overwrites it
        backbone = bert.Bert(config)
        if stage == 1:
            model = bert.BertClassifier(backbone, bert.Classifier(config, num_classes))
        else:
            model = dact.DactBert(backbone, num_classes)
    try:
        model.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights do not fit its own config; name another run") from None
    return model, tokenizer, name, max_tokens


# ---------------------------------------------------------------------------------------------------------------------
# A finished run on GLUE's test set, whose labels only its server knows


def submit(args):
    """Write FOLDER/<task>.tsv: a finished run's answers by early exit, a line (index, label word) per test example."""
    device = pick_device()
    precision, _ = pick_precision(device, args.precision)
    examples = data.load_test(args.task, args.data)
    model, tokenizer, _, max_tokens = load_run(args.out / "dact.pt", 2, args.task)
    model.to(device).eval()
    test = data.Dataset(examples, tokenizer, max_tokens, model.backbone.config.pad_token_id)
    forms = {"test": partial(model.early_exit, rule=dact.RULES[args.rule])}
    predicted, exit_block, _ = answer(forms, test, args.batch, device, precision, passes=1)["test"]
    folder, words = Path(args.submit), data.TASKS[args.task].labels
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(examples.groups):
        rows = [words[i] for i, group in zip(predicted.tolist(), examples.groups) if group == name]
        text = "".join(f"{i}\t{word}\n" for i, word in enumerate(rows))
        write_whole(folder / f"{name}.tsv", lambda file, text=text: file.write(f"index\tprediction\n{text}".encode()))
        print(f"saved      {folder / name}.tsv, {len(rows)} predictions")
    print(f"mean block {exit_block.double().mean().item():.2f} of {len(model.backbone.blocks)} ({args.rule} rule)")


# ---------------------------------------------------------------------------------------------------------------------
# The equations at work on one sentence


@torch.no_grad()
def explain(args):
    """Print, for each block of a finished run, y_n, h_n, p_n, a_n and both sides of the rules, and where each stops."""
    task = data.find_task(args.task)
    wanted = max(1, len(task.texts))  # the toy task has no files, and one text
    if len(args.explain) != wanted:
        raise InputError(f"--explain takes {wanted} text(s) of {args.task}, found {len(args.explain)}; quote each one")
    text = args.explain[0] if wanted == 1 else tuple(args.explain)
    model, tokenizer, _, max_tokens = load_run(args.out / "dact.pt", 2, args.task)
    dataset = data.Dataset(data.Examples([text], [0]), tokenizer, max_tokens, model.backbone.config.pad_token_id)
    print("tokens: " + " ".join(tokenizer.id_to_token(i) for i in dataset.input_ids[0].tolist()))
    print(f"probabilities in the order: {', '.join(task.labels)}\n")
    y, h = model.eval()(*dataset.batch([0])[0])
    print_equations(y, h, task.labels)


def print_equations(y, h, names):
    """The table of `explain`: y (N, 1, C), h (N, 1)."""
    a, p = dact.accumulate_all(y, h)
    N, width, stops = len(y), 6 * len(names) + 1, {}
    print(f"  n  {'y_n':<{width}} h_n    p_n    {'a_n':<{width}} (4) left >= right   exact left >= right")
    for n, (y_n, h_n, a_n, p_n) in enumerate(zip(y, h, a, p), start=1):
        line = f"{n:>3}  {decimals(y_n):<{width}} {decimals(h_n)}  {decimals(p_n)}  {decimals(a_n):<{width}} "
        for name, rule in dact.RULES.items():
            left, right = rule(a_n, p_n, N - n)
            halts = bool(left >= right)
            line += f"{decimals(left)} {'>=' if halts else '< '} {decimals(right)}     "
            if halts and name not in stops:
                stops[name] = f"rule {name!r}: stops after block {n} of {N} with {names[a_n.argmax()]!r}"
        print(line.rstrip())
    print("\n".join(stops.values()))


def decimals(tensor):
    return " ".join(f"{x + 0.0:.3f}" for x in tensor.flatten().tolist())  # -0.0 + 0.0 is 0.0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
