"""The systems that DACT-BERT is compared with, on the same backbone, data and code path.

    DeeBERT    (Xin et al., 2020)   off-ramps trained alone on the frozen backbone of stage 1; exit when entropy < S
    FastBERT   (Liu et al., 2020)   the same ramps, imitating the last classifier; exit when entropy / log C < speed
    PABEE      (Zhou et al., 2020)  backbone and ramps trained together; exit when t blocks in a row confirmed the answer
    first k    the backbone cut after block k and fine-tuned: no decision at all
    DACT at another price: its halting units trained anew, all else as stage 2 left it
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
                "batch": int, "max_tokens": int, "lr": float, "head_lr": float, "head_loss": (int, float),
                "precision": str, "full": dict, "dact": dict, "rules": dict}  # fmt: skip


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
            if not isinstance(found[key], kind) or isinstance(found[key], bool):
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


def off_ramp(size, num_classes):
    """What a `dact.DactModule` answers with, boxes and all, without its halting unit: [CLS] (B, D) -> logits (B, C)."""
    return nn.Sequential(dact.Scale(size), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, num_classes))


class Exits(nn.Module):
    """A backbone with an off-ramp after every block but the last, after which a copy of `classifier` answers."""

    def __init__(self, backbone, classifier):
        super().__init__()
        self.backbone = backbone
        size, num_classes = backbone.hidden_size, classifier.linear.out_features
        ramps = [off_ramp(size, num_classes) for _ in backbone.blocks[:-1]]
        self.heads = nn.ModuleList([*ramps, copy.deepcopy(classifier)])

    def logits(self, n, hidden):
        """Block n's answer, (B, C), always in full precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.heads[n - 1](hidden[:, 0].float())

    def forward(self, *inputs):
        """-> logits of all blocks (N, B, C)."""
        hidden, logits = self.backbone.embed(*inputs[:-1]), []
        for n, block in enumerate(self.backbone.blocks, start=1):
            hidden = block(hidden, inputs[-1])
            logits.append(self.logits(n, hidden))
        return torch.stack(logits)

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


def over_dev(run, model):
    """What a model says after every block about every dev example: a tensor (N, examples, ...) for each output."""
    return train.outputs(model, run.dev, run.args.batch, run.device, run.precision)


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


def answers_of(model):
    """Of a `DactBert`, the function (n, hidden) -> logits of y_n (B, C)."""

    def logits(n, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return model.heads[n - 1].logits(hidden[:, 0].float())[0]

    return logits


def lowered(model, bias):
    """A copy of a `DactBert` whose halting biases are lowered by `bias`: it stops earlier, and as safely."""
    model = copy.deepcopy(model)
    for head in model.heads:
        head.halt[-1].bias.data -= bias
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


class Ramps(nn.Module):
    """The heads of an `Exits` over `train.Features`: cls (B, N, D) -> logits (N, B, C). The last is frozen."""

    def __init__(self, exits):
        super().__init__()
        self.heads = exits.heads[:-1]
        self.last = exits.heads[-1].requires_grad_(False)

    def forward(self, cls):
        self.last.eval()
        return torch.stack([head(x) for head, x in zip([*self.heads, self.last], cls.unbind(1))])


def deebert(run, features=None):
    """The run's DeeBERT, an `Exits` on stage 1's frozen backbone. features: a function that gives `train_features`."""
    return ramps(run, features, deebert_loss, "DeeBERT")


def fastbert(run, features=None):
    """The run's FastBERT: as `deebert`, with the last classifier for a teacher in the place of the labels."""
    return ramps(run, features, fastbert_loss, "FastBERT")


def ramps(run, features, loss, name):
    """An `Exits` whose ramps alone are trained, and kept."""
    # DIFFERS: in the papers a ramp is a pooler and a linear layer (DeeBERT) or a self-attention (FastBERT), at the rate of
    # the backbone. Here every system has DACT's answer head, with DACT's start and DACT's --head-lr.
    torch.manual_seed(run.args.seed)
    exits = Exits(run.stage1.bert, run.stage1.classifier).to(run.device)

    def train_them():
        fit(run, name, Ramps(exits), as_stage(loss), features() if features else train_features(run))

    kept(run, name, exits.heads, train_them)
    return exits.eval()


def train_features(run):
    """The [CLS] vectors of stage 1's backbone over the training set."""
    return train.Features(run.stage1.bert, run.train, run.device, run.precision)


def pabee(run):
    """The run's PABEE: backbone and ramps together."""
    # DIFFERS: from stage 1's weights, as DACT, where the paper starts from the pretrained ones.
    torch.manual_seed(run.args.seed)
    exits = Exits(copy.deepcopy(run.stage1.bert), run.stage1.classifier).to(run.device)
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

    logits: (n, hidden) -> logits of y_n, such as those of a trained DeeBERT or DACT on this backbone. S_n is the
    threshold of block n, DeeBERT's own hyper-parameter: below it h_n < 1/2. tied: one w and S for all blocks, as in
    DeeBERT. With a large w the gate is a step, all weight lies on the first block below its S_n, and DACT *is* DeeBERT
    (on DeeBERT's ramps).
    """

    def __init__(self, backbone, logits, tied, threshold, weight=10.0):
        nn.Module.__init__(self)  # no heads of its own
        self.backbone, self.logits = backbone, logits
        halts = [nn.Linear(1, 1) for _ in backbone.blocks]
        for halt in halts:
            nn.init.constant_(halt.weight, weight)
            nn.init.constant_(halt.bias, -weight * threshold)
        self.halts = nn.ModuleList(halts[:1] * len(halts) if tied else halts)

    def head(self, n, hidden):
        """y_n (B, C), h_n (B,), as in DACT."""
        logits = self.logits(n, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return logits.softmax(-1), self.halts[n - 1](entropy(logits)[:, None]).squeeze(-1).sigmoid()

    def thresholds(self):
        """S_n = -bias / weight in nats, one for each block."""
        return [(-halt.bias / halt.weight).item() for halt in self.halts]


class EntropyAlone(nn.Module):
    """The halting values of an `EntropyDact` over cached answers: logits (B, N, C) -> y (N, B, C), h (N, B)."""

    def __init__(self, halts):
        super().__init__()
        self.heads = halts

    def forward(self, logits):
        h = [halt(entropy(x)[:, None]).squeeze(-1) for halt, x in zip(self.heads, logits.unbind(1))]
        return logits.softmax(-1).transpose(0, 1), torch.stack(h).sigmoid()


def ramp_logits(exits, features):
    """A dataset like `features`, of the frozen ramps' logits (B, N, C) in the place of the [CLS] vectors."""
    logits = copy.copy(features)
    device = next(exits.parameters()).device
    with torch.no_grad():
        answers = [head(x.to(device)).cpu() for head, x in zip(exits.eval().heads, features.cls.unbind(1))]
    logits.cls = torch.stack(answers, 1)
    return logits


def entropy_dact(run, exits, logits, tied, threshold):
    """The third stage of section 3.1: only the confidence functions are trained, by equation (3), from a start S.

    logits: a function that gives the `ramp_logits` of the training set.
    """
    model = EntropyDact(exits.backbone, exits.logits, tied, threshold).to(run.device)
    name = f"entropy-{'tied' if tied else 'untied'}-{threshold:g}"
    # CHOICE: ten times the epochs and fifty times the rate: two numbers have far to go, and an epoch of them costs nothing.
    longer = {"epochs": 10 * run.args.epochs, "head_lr": 5e-2}
    loss = train.stage2_loss(run.args.tau)
    kept(run, name, model.halts, lambda: fit(run, name, EntropyAlone(model.halts), loss, logits(), **longer))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# DACT at another price of a block


@torch.no_grad()
def over_features(model, features):
    """A `DactBert`'s heads over cached vectors: logits of y (N, n, C), and z (N, n), h before the sigmoid."""
    device = next(model.parameters()).device
    pairs = [head.logits(x.to(device)) for head, x in zip(model.heads, features.cls.unbind(1))]
    return tuple(torch.stack(column).cpu() for column in zip(*pairs))


def dact_over_tau(run, taus, features):
    """The run's DACT with its halting units alone trained anew, by equation (3), at other prices: {tau: `DactBert`}.

    "The training of only the confidence functions" (section 3.1). features: a function that gives the `train.Features`
    of its backbone over the training set.
    """

    def at(tau):
        model = copy.deepcopy(run.dact, {id(run.dact.backbone): run.dact.backbone})  # all but the backbone
        name, longer = f"tau-{tau:g}", {"epochs": 3 * run.args.epochs}  # as in `train.learn_halting`

        def train_them():
            fit(run, name, train.HaltingAlone(model.heads), train.stage2_loss(tau), features(), **longer)

        kept(run, name, model.heads, train_them)
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
