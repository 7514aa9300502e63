"""The systems that DACT-BERT is compared with, on the same backbone, data and code path.

    DeeBERT    (Xin et al., 2020)   off-ramps trained alone on the frozen backbone of stage 1; exit when entropy < S
    FastBERT   (Liu et al., 2020)   the same ramps, imitating the last classifier; exit when entropy / log C < speed
    PABEE      (Zhou et al., 2020)  backbone and ramps trained together; exit when t blocks in a row confirmed the answer
    first k    the backbone cut after block k and fine-tuned: no decision at all
    DACT at another price: its halting neurons trained anew, all else as stage 2 left it
    longer     stage 1 twice over: the control for what DACT's second stage gains by training alone
    generality (section 3.1)        DeeBERT inside DACT: the halting value is a logistic regression on the entropy

All leave a batch through `dact.early_exit`: a rule is a function of what is known after block n.
Shapes: B sequences, C classes, D hidden size, N blocks, n = 1 .. N.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the top level, where the model lives

import bert
import dact
import data
import train

# ---------------------------------------------------------------------------------------------------------------------
# A finished run of train.py, opened


class Run(NamedTuple):
    """What a finished run left, and what it was made with."""

    folder: Path
    kept: Path  # the folder in it for what is trained and measured beside the run
    args: argparse.Namespace  # the settings that metrics.json holds, and data
    metrics: dict  # metrics.json
    stage1: bert.BertClassifier
    dact: dact.DactBert
    tokenizer: object
    train: data.Dataset
    dev: data.Dataset
    device: torch.device
    precision: str

    @property
    def labels(self):
        """The words of the classes."""
        return data.TASKS[self.args.task].labels


def open_run(folder, data_folder=None):
    """The finished run in a folder. Raises data.InputError.

    data_folder: where GLUE's files lie; by default train.py's cache.
    """
    folder = Path(folder)
    metrics = read_metrics(folder)
    settings = {name: metrics[name] for name, kind in METRICS_JSON.items() if kind is not dict}
    args = argparse.Namespace(**settings, out=folder, data=data_folder)
    device = train.pick_device()
    stage1, tokenizer, _, max_tokens = train.load_run(folder / "stage1.pt", 1, args.task)
    adaptive = train.load_run(folder / "dact.pt", 2, args.task)[0]
    pad_id = stage1.bert.config.pad_token_id
    splits = [data.Dataset(split, tokenizer, max_tokens, pad_id) for split in data.load_task(args.task, args.data)]
    for model in (stage1, adaptive):
        model.to(device).eval()
    precision = train.pick_precision(device, args.precision)[0]
    return Run(folder, kept_folder(folder), args, metrics, stage1, adaptive, tokenizer, *splits, device, precision)


# The part of metrics.json that is relied on here
METRICS_JSON = {"task": str, "model": str, "seed": int, "tau": (int, float), "rule": str, "epochs": (int, float),
                "batch": int, "max_tokens": int, "lr": float, "head_lr": float, "halt_bias": (int, float),
                "head_loss": (int, float), "head_norm": bool, "precision": str, "full": dict, "dact": dict,
                "rules": dict}  # fmt: skip


def read_metrics(folder):
    """The metrics.json of a finished run, checked as far as it is relied on; runs/toy is made first if it is not there.

    Raises data.InputError.
    """
    path = Path(folder) / "metrics.json"
    if Path(folder) == Path("runs/toy") and not path.exists():
        train.run(train.parse_arguments(["--resume"]))
    if not path.is_file():
        raise data.InputError(f"{path}: no such file; name the folder of a finished run, or make one with train.py")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no object")
        for key, kind in METRICS_JSON.items():
            if not isinstance(found[key], kind) or (kind is not bool and isinstance(found[key], bool)):
                raise TypeError(f"{key} is {str(found[key])[:40]!r}")
        early = [found["dact"], *(found["rules"][rule] for rule in dact.RULES)]
        for part in (found["full"], *early):
            numbers = [part[name] for name in data.find_task(found["task"]).metrics]
            if not all(isinstance(number, (int, float)) and abs(number) <= 100 for number in numbers):
                raise ValueError("a metric is no percentage")
        if found["rule"] not in dact.RULES or found["precision"] not in train.PRECISIONS:
            raise ValueError(f"rule {found['rule'][:20]!r}, precision {found['precision'][:20]!r}")
        positive = [found["batch"], found["epochs"], found["max_tokens"], *(part["mean_blocks"] for part in early)]
        if not all(number > 0 for number in positive) or not 0 <= found["seed"] < 2**32:
            raise ValueError("a number is out of its range")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise data.InputError(f"{path}: not the metrics of a run ({str(error)[:80]!r}); run train.py again") from None
    return found


def kept_folder(folder):
    """runs/x/paper-1a2b3c4d: named after metrics.json, so that a run made anew in runs/x does not meet the old one's."""
    return Path(folder) / f"paper-{hashlib.sha256((Path(folder) / 'metrics.json').read_bytes()).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------------------------------
# A backbone with an answer after every block, and the rules to leave it by


class Exits(nn.Module):
    """A backbone with a classifier ("off-ramp") after every block; each starts as a copy of `classifier`.

    head_norm: whether they read [CLS] on one scale for all blocks (`dact.ReadCls`).
    """

    def __init__(self, backbone, classifier, head_norm=False):
        super().__init__()
        self.backbone = backbone
        self.read = dact.ReadCls(len(backbone.blocks), backbone.hidden_size, head_norm)
        self.classifiers = nn.ModuleList(copy.deepcopy(classifier) for _ in backbone.blocks)

    def logits(self, n, hidden):
        """Block n's answer, (B, C), always in full precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.classifiers[n - 1](self.read(n, hidden[:, 0].float()))

    def forward(self, *inputs):
        """-> logits of all blocks (N, B, C)."""
        hidden, said, cls = self.backbone.embed(*inputs[:-1]), [], []
        for n, block in enumerate(self.backbone.blocks, start=1):
            hidden = block(hidden, inputs[-1])
            said.append(self.logits(n, hidden))
            cls.append(hidden[:, 0])
        if self.training:
            self.read.observe(cls)
        return torch.stack(said)

    def early_exit(self, *inputs, rule):
        """rule: (logits (B, C), state) -> (halt (B,) bool, state). Returns `dact.Halted` with probabilities."""

        def step(n, hidden, state):
            logits = self.logits(n, hidden)
            halt, state = rule(logits, state)
            return logits.softmax(-1), halt, state

        return dact.early_exit(self.backbone, inputs, step)


def entropy(logits):
    """Shannon entropy in nats of softmax(logits) over the last axis: H = log Σ e^x - Σ x e^x / Σ e^x."""
    return logits.logsumexp(-1) - (logits * logits.softmax(-1)).sum(-1)


def entropy_rule(logits, state, S):
    """DeeBERT: leave when the entropy is under S nats; at most log C, so S > log C leaves after block 1."""
    return entropy(logits) < S, state


def speed_rule(logits, state, speed):
    """FastBERT: leave when the entropy, as a share of log C, is under `speed` from 0 to 1."""
    return entropy(logits) / math.log(logits.shape[-1]) < speed, state


def patience_rule(logits, state, t):
    """PABEE: leave when t blocks in a row have confirmed the answer, that is after t + 1 equal ones."""
    label = logits.argmax(-1)
    last, count = state or (label, torch.full_like(label, -1))
    count = torch.where(label == last, count + 1, 0)
    return count >= t, (label, count)


@torch.no_grad()
def over_dev(run, model):
    """What a model says after every block about every dev example: a tensor (N, examples, ...) for each output."""
    batches, said = data.evaluation_batches(run.dev.lengths, run.args.batch), []
    for indices in batches:
        inputs = (x.to(run.device) for x in run.dev.batch(indices)[0])
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
            outputs = model(*inputs)
        said.append([x.float().cpu() for x in (outputs if isinstance(outputs, tuple) else (outputs,))])
    back = torch.cat([torch.as_tensor(indices) for indices in batches]).argsort()
    return [torch.cat(column, 1)[:, back] for column in zip(*said)]


def simulate(logits, rule):
    """Where a rule leaves and what it answers, from the logits of all blocks (N, n, C): (labels (n,), exits (n,))."""
    exit_block, state = torch.zeros(logits.shape[1], dtype=torch.long), ()
    for n, logits_n in enumerate(logits, start=1):
        halt, state = rule(logits_n, state)
        if n == len(logits):
            halt = torch.ones_like(halt)
        exit_block[halt & (exit_block == 0)] = n
    return logits[exit_block - 1, torch.arange(len(exit_block))].argmax(-1), exit_block


def halted(y, z):
    """Where DACT leaves by (4), and its answers, from y (N, n, C) and z (N, n), h before the sigmoid."""
    a, p = dact.accumulate_all(y, z.sigmoid())
    exit_block = torch.full_like(a[0, :, 0], len(y), dtype=torch.long)
    for n in range(len(y) - 1, 0, -1):
        left, right = dact.paper_rule(a[n - 1], p[n - 1], len(y) - n)
        exit_block[left >= right] = n
    return a[exit_block - 1, torch.arange(len(exit_block))].argmax(-1), exit_block


def lowered(model, bias):
    """A copy of a `DactBert` whose halting biases are lowered by `bias`: it stops earlier, and as safely."""
    model = copy.deepcopy(model)
    for halt in model.halts:
        halt.bias.data -= bias
    return model


def setting(simulated, blocks, high, low=0.0):
    """The x from `low` to `high` at which a system uses so many blocks on average, by bisection.

    simulated: x -> (labels, exit_block); the more x, the fewer blocks.
    """
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated(middle)[1].double().mean() > blocks else (low, middle)
    return high


# ---------------------------------------------------------------------------------------------------------------------
# Losses: logits (N, B, C), labels (B,) -> scalar, in nats


def deebert_loss(logits, labels):
    """The sum of the ramps' cross-entropies; the last classifier is stage 1's and is not trained again."""
    return sum(F.cross_entropy(logits_n, labels) for logits_n in logits[:-1])


def fastbert_loss(logits, labels):
    """Self-distillation: Σ over the ramps of KL(ramp || last classifier) = Σ_c q_c (log q_c - log p_c). No labels."""
    teacher = logits[-1].detach().log_softmax(-1)
    ramps = logits[:-1].log_softmax(-1)
    return (ramps.exp() * (ramps - teacher)).sum(-1).mean(1).sum()


def pabee_loss(logits, labels):
    """The mean of all cross-entropies, block n with weight n: Σ n L_n / Σ n."""
    losses = torch.stack([F.cross_entropy(logits_n, labels) for logits_n in logits])
    weights = torch.arange(1.0, len(losses) + 1, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def as_stage(loss):
    """One of the losses above as `train.fit` wants it."""

    def stage_loss(model, inputs, labels):
        value = loss(model(*inputs), labels)
        return value, torch.zeros_like(value), torch.zeros_like(value)

    return stage_loss


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Features:
    """The [CLS] vectors of every block of a frozen backbone over a dataset: computed once, trained on many times.

    CHOICE: the frozen backbone runs without dropout, so that its vectors are the same in every epoch and need computing
    only once (4 N D bytes an example in memory). It offers what `train.fit` asks of a dataset.
    """

    def __init__(self, backbone, dataset, device, precision, batch_size=64):
        blocks = len(backbone.blocks)
        self.cls = torch.zeros(len(dataset), blocks, backbone.hidden_size)
        self.labels, self.lengths = dataset.labels, dataset.lengths
        for indices in data.evaluation_batches(dataset.lengths, batch_size):
            *inputs, mask = (x.to(device) for x in dataset.batch(indices)[0])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                hidden = backbone.embed(*inputs)
                for n, block in enumerate(backbone.blocks):
                    hidden = block(hidden, mask)
                    self.cls[indices, n] = hidden[:, 0].float().cpu()

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """-> ((cls (B, N, D),), labels (B,))."""
        return (self.cls[indices],), self.labels[indices]


def read_all(read, cls):
    """What the heads of all blocks read: a `dact.ReadCls`, cached vectors (B, N, D) -> N times (B, D)."""
    return [read(n, x) for n, x in enumerate(cls.unbind(1), start=1)]


class Ramps(nn.Module):
    """The classifiers of an `Exits` over cached vectors: cls (B, N, D) -> logits (N, B, C). The last is frozen."""

    def __init__(self, exits):
        super().__init__()
        self.classifiers = exits.classifiers[:-1]
        self.last = exits.classifiers[-1].requires_grad_(False)
        self.read = exits.read

    def forward(self, cls):
        self.last.eval()
        heads = [*self.classifiers, self.last]
        return torch.stack([head(x) for head, x in zip(heads, read_all(self.read, cls))])


def deebert(run, features=None):
    """The run's DeeBERT, an `Exits` on stage 1's frozen backbone. features: a function that gives `train_features`."""
    return ramps(run, features, deebert_loss, "DeeBERT")


def fastbert(run, features=None):
    """The run's FastBERT: as `deebert`, with the last classifier for a teacher in the place of the labels."""
    return ramps(run, features, fastbert_loss, "FastBERT")


def ramps(run, features, loss, name):
    """An `Exits` whose ramps alone are trained, and kept."""
    exits = Exits(run.stage1.bert, run.stage1.classifier, run.args.head_norm).to(run.device)
    # DIFFERS: the papers start all ramps but the last from nothing (FastBERT's are a self-attention each) at the rate of
    # the backbone. Here every system has DACT's heads, DACT's start, from stage 1, and DACT's --head-lr for them.

    def train_them():
        dataset = features() if features else train_features(run)
        exits.read.observe(dataset.cls.transpose(0, 1).to(run.device))  # once, for the backbone does not change
        fit(run, name, Ramps(exits), as_stage(loss), dataset)

    kept(run, name, nn.ModuleList([exits.classifiers, exits.read]), train_them)
    return exits.eval()


def train_features(run):
    """The [CLS] vectors of stage 1's backbone over the training set."""
    return Features(run.stage1.bert, run.train, run.device, run.precision)


def pabee(run):
    """The run's PABEE: backbone and ramps together."""
    # DIFFERS: from stage 1's weights, as DACT, where the paper starts from the pretrained ones.
    exits = Exits(copy.deepcopy(run.stage1.bert), run.stage1.classifier, run.args.head_norm).to(run.device)
    if run.args.head_norm:
        train.without_dropout(exits.backbone)
    return kept(run, "PABEE", exits, lambda: fit(run, "PABEE", exits, as_stage(pabee_loss), run.train))


def first_blocks(run, k):
    """A `BertClassifier` of the first k blocks of the model that stage 1 started from, fine-tuned with the run's settings."""
    args = copy.copy(run.args)
    args.model = None if args.model == train.SCRATCH else args.model
    torch.manual_seed(args.seed)
    model = train.starting_model(args)[0]
    model.bert.blocks = model.bert.blocks[:k]
    model.bert.config = replace(model.bert.config, num_hidden_layers=k)
    model.to(run.device)
    return kept(run, f"first-{k}", model, lambda: fit(run, f"first-{k}", model, train.stage1_loss, run.train))


def longer(run):
    """Stage 1 once more, from the weights that it left: a `BertClassifier` that has trained as long as DACT."""
    model = copy.deepcopy(run.stage1)
    if run.args.head_norm:
        train.without_dropout(model.bert)
    return kept(run, "longer", model, lambda: fit(run, "longer", model, train.stage1_loss, run.train))


def fit(run, name, model, loss, dataset, **changes):
    """`train.fit` in a folder of its own; an interrupted one goes on where it was.

    changes: settings that differ from the run's, such as head_lr.
    """
    args = argparse.Namespace(**(vars(run.args) | changes))
    args.out = run.kept / name.lower()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    checkpoint = bert.load_pickle(path) if path.exists() else None
    # Heads over cached vectors learn in full precision, as those over a backbone do (`dact.DactBert.head`).
    precision = run.precision if dataset is run.train else "float32"
    try:
        train.fit(name, model, loss, dataset, args, run.device, precision, checkpoint)
    except data.InputError as error:
        what = str(error).partition(";")[0]  # behind it stand flags of train.py
        raise data.InputError(f"{what}; repeat the command, or delete {args.out} to train {name} anew") from None
    path.unlink()


def kept(run, name, model, train_it):
    """`model` with the weights of the run's <name>.pt; if there is none, `train_it()` trains it and they are kept."""
    path = run.kept / f"{name.lower()}.pt"
    if path.exists():
        saved = bert.load_pickle(path)
        try:
            model.load_state_dict(saved)
        except (RuntimeError, KeyError, TypeError, AttributeError):
            raise data.InputError(f"{path}: not of this run; delete it to train it again") from None
    else:
        train_it()
        train.save(path, model.state_dict())
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Section 3.1: DeeBERT as a case of DACT


class EntropyDact(dact.DactBert):
    """DACT whose halting value is a logistic regression on the entropy of y_n: h_n = σ(w_n (H(y_n) - S_n)), H in nats.

    exits: a trained DeeBERT or DACT, whose backbone and heads are used. S_n is the threshold of block n,
    DeeBERT's own hyper-parameter: below it h_n < 1/2. tied: one w and S for all blocks, as in DeeBERT. With a large w
    the gate is a step, all weight lies on the first block below its S_n, and DACT *is* DeeBERT (on DeeBERT's ramps).
    """

    def __init__(self, exits, tied, threshold, weight=10.0):
        super().__init__(exits.backbone, exits.classifiers[-1])
        self.classifiers, self.read = exits.classifiers, exits.read
        halts = [nn.Linear(1, 1) for _ in exits.classifiers]
        for halt in halts:
            nn.init.constant_(halt.weight, weight)
            nn.init.constant_(halt.bias, -weight * threshold)
        self.halts = nn.ModuleList(halts[:1] * len(halts) if tied else halts)

    def head(self, n, hidden):
        """y_n (B, C), h_n (B,), as in DACT."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.classifiers[n - 1](self.read(n, hidden[:, 0].float()))
            return logits.softmax(-1), self.halts[n - 1](entropy(logits)[:, None]).squeeze(-1).sigmoid()

    def thresholds(self):
        """S_n = -bias / weight in nats, one for each block."""
        return [(-halt.bias / halt.weight).item() for halt in self.halts]


class Neurons(nn.Module):
    """Halting neurons over what they read and what the frozen heads said: (B, N, D + C) -> y (N, B, C), h (N, B)."""

    def __init__(self, halts):
        super().__init__()
        self.halts = halts

    def forward(self, said):
        D = self.halts[0].in_features
        h = [halt(said[:, n, :D]).squeeze(-1) for n, halt in enumerate(self.halts)]
        return said[..., D:].transpose(0, 1), torch.stack(h).sigmoid()


def entropy_and_answer(logits):
    """What `Neurons` that read the entropy learn from: logits (B, N, C) -> (B, N, 1 + C)."""
    return torch.cat([entropy(logits)[..., None], logits.softmax(-1)], -1)


def ramp_logits(exits, features):
    """A dataset like `features`, of the frozen ramps' logits (B, N, C) in the place of what they read."""
    said = copy.copy(features)
    with torch.no_grad():
        device = next(exits.parameters()).device
        cls = read_all(exits.read, features.cls.to(device))
        logits = [head(x).cpu() for head, x in zip(exits.classifiers, cls)]
    said.cls = torch.stack(logits, 1)
    return said


def entropy_dact(run, exits, said, tied, threshold):
    """The third stage of section 3.1: only the confidence functions are trained, by equation (3), from a start S.

    said: a function that gives the `ramp_logits` of the training set.
    """
    model = EntropyDact(exits, tied, threshold).to(run.device)
    name = f"entropy-{'tied' if tied else 'untied'}-{threshold:g}"
    # CHOICE: ten times the epochs and fifty times the rate: two numbers have far to go, and an epoch of them costs nothing.
    longer = {"epochs": 10 * run.args.epochs, "head_lr": 5e-2}

    def train_them():
        dataset = copy.copy(said())
        dataset.cls = entropy_and_answer(dataset.cls)
        fit(run, name, Neurons(model.halts), train.stage2_loss(run.args.tau), dataset, **longer)

    kept(run, name, model.halts, train_them)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# DACT at another price of a block


@torch.no_grad()
def over_features(model, features):
    """A `DactBert`'s heads over cached vectors: what they read (n, N, D), y (N, n, C), and z (N, n), h before the sigmoid."""
    cls = read_all(model.read, features.cls.to(model.halts[0].weight.device))
    y = [head(x).softmax(-1) for head, x in zip(model.classifiers, cls)]
    z = [halt(x).squeeze(-1) for halt, x in zip(model.halts, cls)]
    return torch.stack(cls, 1).cpu(), torch.stack(y).cpu(), torch.stack(z).cpu()


def dact_over_tau(run, taus, features):
    """The run's DACT with its halting neurons alone trained anew, by equation (3), at other prices: {tau: `DactBert`}.

    "The training of only the confidence functions" (section 3.1), from the run's own --halt-bias.
    features: a function that gives the `Features` of its backbone over the training set.
    """

    @cache
    def standardised():
        """What the neurons learn from, and the mean and deviation (N, D) that were taken out of it."""
        # CHOICE: standardised numbers, each of each block over the examples, for the neurons to learn from; then they get
        # weights that make the same of what they will read.
        said = copy.copy(features())
        cls, y, _ = over_features(run.dact, said)
        mean, deviation = cls.mean(0), cls.std(0).clamp(min=1e-6)
        said.cls = torch.cat([cls.sub_(mean).div_(deviation), y.transpose(0, 1)], -1)  # in place: it can take gigabytes
        return said, mean, deviation

    def at(tau):
        model = dact.DactBert(run.dact.backbone, run.dact.classifiers[0], run.args.halt_bias).to(run.device)
        model.classifiers, model.read = run.dact.classifiers, run.dact.read
        name = f"tau-{tau:g}"

        def train_them():
            said, mean, deviation = standardised()
            # CHOICE: ten times the epochs, as for `entropy_dact`, which over cached vectors cost little: after the
            # run's own three the neurons are still on their way, and even at 0.5 nats those of RTE saved less than half.
            fit(run, name, Neurons(model.halts), train.stage2_loss(tau), said, epochs=10 * run.args.epochs)
            with torch.no_grad():
                for halt, m, d in zip(model.halts, mean.to(run.device), deviation.to(run.device)):
                    halt.weight.div_(d)
                    halt.bias.sub_(halt.weight @ m)

        kept(run, name, model.halts, train_them)
        return model.eval()

    return {tau: at(tau) for tau in taus}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and command lines


def save_figure(figure, path, dpi=150):
    """Write a figure of matplotlib as a PNG, whole or not at all."""
    train.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def show_panels(panels, table, draw, path):
    """Print table(panel) of each run's panel and leave draw(panels) at `path`."""
    print("\n\n".join(table(panel) for panel in panels))
    save_figure(draw(panels), path)
    print(f"\nsaved      {path}")


def arguments(description, *flags):
    """The flags that every file here has, and `flags`, pairs of (name, keywords) of its own."""
    parser = train.Parser(description=description.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=["runs/toy"], help="folders of finished runs (default: runs/toy)")
    parser.add_argument("--data", help="folder of the GLUE files (default: train.py's cache)")
    for name, keywords in flags:
        parser.add_argument(name, **keywords)
    return parser


def command(main):
    """Run main(argv), with train.py's one line for mistakes; returns the exit status."""
    try:
        main(sys.argv[1:])
    except (data.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; free some of it, or hide it (CUDA_VISIBLE_DEVICES=)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0
