"""The systems that DACT-BERT is compared with, on the same backbone, data and code path.

    DeeBERT    (Xin et al., 2020)   off-ramps trained alone on the frozen backbone of stage 1; exit when entropy < S
    FastBERT   (Liu et al., 2020)   the same ramps, imitating the last classifier; the same exit, S in other units
    PABEE      (Zhou et al., 2020)  backbone and ramps trained together; exit when t blocks in a row confirmed an answer
    BERxiT     (Xin et al., 2021)   the same, in turns with the last classifier alone; exit when a learned unit says that
                                    the ramp's answer is right
    PALBERT    (Balagansky and Gavrilov, 2022)  backbone, ramps and a chance to stop (PonderNet) trained together; exit
                                    when the chance to have stopped passes q
    DACT at another price: its halting units trained anew, all else as stage 2 left it
    longer     stage 1 twice over: the control for what DACT's second stage gains by training longer
    generality (section 3.1)        DeeBERT inside DACT: the halting value is a logistic regression on the entropy

All but "longer" are heads that read the [CLS] vectors of all blocks. What every block says is computed once for a whole
dev set, and where an example would leave is read off it: `leave`. (DACT itself really leaves early, in
train.py and speed.py.) Heads whose backbone is frozen learn on vectors that are computed once.
Shapes: B sequences, C classes, D hidden size, N blocks, n = 1 .. N; n examples of a dataset.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the top level, where the model lives

import bert
import dact
import data
import train

MOST_FOR_HALTING = 20_000  # examples that halting at another price learns on; each takes 4 N D bytes of memory
PRIOR = math.log(0.1 / 0.9)  # log-odds of PALBERT's prior chance to stop, after every block

# ---- A finished run of train.py, opened -----------------------------------------------------------------------------


@dataclass
class Run:
    """What a finished run left, and what it was made with."""

    folder: Path
    trained: Path  # the folder in it, such as paper-1a2b3c4d, for what is trained and measured beside the run
    args: argparse.Namespace  # the command line that metrics.json tells of, with device and precision
    metrics: dict  # metrics.json
    saved: train.Saved  # dact.pt
    stage1: bert.BertClassifier
    dact: dact.DactBert
    train_set: data.Dataset
    dev: data.Dataset
    splits: list  # both as `data.Examples`

    @cached_property
    def vectors(self):
        """`Vectors` of stage 1's backbone over the training set."""
        return cls_vectors(self.stage1.bert, self.train_set, self.args)

    @cached_property
    def twice(self):
        """The run as if stage 1 had trained twice over: what `longer` leaves, and a folder for what is trained on it."""
        return replace(self, stage1=longer(self), trained=self.trained / "longer")

    @property
    def N(self):
        """The number of blocks."""
        return len(self.dact.heads)

    @property
    def labels(self):
        """The words of the classes."""
        return data.TASKS[self.args.task].labels

    def early_exit(self, *inputs):
        """DACT's early exit under the run's own rule: `dact.Halted`."""
        return self.dact.early_exit(*inputs, rule=dact.RULES[self.args.rule])


def open_run(folder, data_folder=None, splits=None):
    """The finished run in a folder. Raises data.InputError.

    data_folder: where GLUE's files lie; by default train.py's cache. splits: what it trained on, if not the task's own.
    """
    metrics, args = read_metrics(folder)
    args.data = data_folder
    first, second = (
        train.load_run(args.out / f"{name}.pt", stage, args.task) for stage, name in ((1, "stage1"), (2, "dact"))
    )
    if len(second.model.heads) == 1:
        raise data.InputError(f"{folder}: a model of one block has no block to leave earlier; name another run")
    args.device, args.precision = train.pick_hardware(first.name, args.precision)
    stage1, model = (saved.model.to(args.device) for saved in (first, second))
    splits = splits or data.load_task(args.task, args.data)
    train_set, dev_set = (second.dataset(split) for split in splits)
    # Named after metrics.json, so that a run made anew meets nothing of the old one
    trained = args.out / f"paper-{hashlib.sha256((args.out / 'metrics.json').read_bytes()).hexdigest()[:8]}"
    return Run(args.out, trained, args, metrics, second, stage1, model, train_set, dev_set, splits)


def read_metrics(folder):
    """The metrics.json of a finished run, and the command line of train.py that it tells of, as parsed arguments.

    The toy's run in this repository is made first if it is not there. Raises data.InputError.
    """
    path = Path(folder) / "metrics.json"
    if path.parent.resolve() == ROOT / "runs/toy" and not path.exists():
        train.run(train.parse_arguments(["--out", str(folder), "--overwrite"]))
    if not path.is_file():
        raise data.InputError(f"{path}: no such file; name the folder of a finished run, or make one with train.py")
    with data.reading(path, "it is not the metrics of a run; run train.py again"):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        names = ["task", "precision", "rule", *train.SETTINGS] + ["model"] * (metrics["model"] != train.SCRATCH)
        flags = [f"--{name.replace('_', '-')}={metrics[name]}" for name in names]
        first_metric = data.find_task(metrics["task"]).metrics[0]
        for row in ("majority", "full", "dact", "exact_rule"):  # what the files here rely on
            float(metrics[row][first_metric])
        return metrics, train.parse_arguments([f"--out={folder}", *flags])


def part_of(examples, rows):
    """The `data.Examples` of some rows alone."""
    columns = (examples.texts, examples.labels, examples.groups)
    return data.Examples(*([column[i] for i in rows] for column in columns if column))


# ---- What all blocks say, computed once -----------------------------------------------------------------------------


@dataclass
class Vectors:
    """What heads read, of n examples: a dataset for heads that learn on a backbone that does not."""

    values: torch.Tensor  # (N, n, D), on the CPU
    labels: torch.Tensor  # (n,)
    lengths: np.ndarray  # (n,), tokens

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, device="cpu"):
        """-> ((values (N, B, D),), labels (B,))."""
        return (self.values[:, indices].to(device),), self.labels[indices].to(device)


def cls_vectors(backbone, dataset, args, most=None):
    """`Vectors` of [CLS] after every block. most: examples that are taken, by default all."""
    taken = np.sort(np.random.default_rng(0).permutation(len(dataset))[:most])
    lengths, values = dataset.lengths[taken], torch.empty(len(backbone.blocks), len(taken), backbone.hidden_size)
    backbone.eval()
    with torch.no_grad(), train.autocast(args):
        for rows in data.evaluation_batches(lengths, 64):
            inputs, _ = dataset.batch(taken[rows], args.device)
            values[:, rows] = torch.stack([*dact.cls_after_blocks(backbone, inputs)]).float().cpu()
    return Vectors(values, dataset.labels[taken], lengths)


@torch.no_grad()
def over(heads, vectors, device):
    """What heads say of all n examples of `Vectors`, on the CPU: tensors (N, n, ...)."""
    pieces = [heads(*vectors.batch(rows, device)[0]) for rows in torch.arange(len(vectors)).split(256)]
    return [torch.cat(column, 1).cpu() for column in zip(*pieces)]


def answers(model, dataset, args):
    """`over` for an `Exits` or a `dact.DactBert` and a dataset: tensors (N, n, ...)."""
    return over(model.heads, cls_vectors(model.backbone, dataset, args), args.device)


def leave(answers, halt):
    """(labels, exits (n,)) if each leaves at the first block of halt (N, n) bool, or the last; answers: (N, n, C)."""
    halt = torch.cat([halt[:-1], torch.ones_like(halt[:1])])
    first = halt.int().argmax(0)
    return answers[first, torch.arange(len(first))].argmax(-1), first + 1


def leave_by_rule(y, h, rule=dact.paper_rule):
    """(labels, exits (n,)) of DACT's early exit, from what its heads say: y (N, n, C), h (N, n)."""
    a, p = dact.accumulate_all(y, h)
    return leave(a, torch.ge(*sides(a, p, rule)))


def sides(a, p, rule):
    """Both sides of a rule after every block, (left, right), each (N, n); a (N, n, C) and p (N, n) are all a_n and p_n."""
    each = [rule(a_n, p_n, len(a) - n) for n, (a_n, p_n) in enumerate(zip(a, p), start=1)]
    return tuple(torch.stack(column) for column in zip(*each))


def entropy(logits):
    """Shannon entropy in nats of softmax(logits) over the last axis: H = -Σ y log y.

    DeeBERT leaves where it is under S; it is at most log C, so S > log C leaves after block 1.
    """
    log_y = logits.log_softmax(-1)
    return -(log_y.exp() * log_y).sum(-1)


def confirmations(logits):
    """How many blocks in a row have confirmed the answer, at each block: logits (N, n, C) -> (N, n).

    PABEE leaves where t have, that is after t + 1 equal answers.
    """
    labels = logits.argmax(-1)
    counts = [torch.zeros_like(labels[0])]
    for before, now in pairwise(labels):
        counts.append(torch.where(now == before, counts[-1] + 1, 0))
    return torch.stack(counts)


def exit_chances(z):
    """z (N, B) -> the chance to stop at each block: λ_n = σ(z_n) of what is left; the last block takes the rest.

    PALBERT leaves at the first block by which the chance to have stopped is at least q (its "Q-exit").
    """
    # CHOICE: as in PonderNet; in PALBERT's code the last block has a λ_N, and the chances need not sum to 1.
    stop = torch.cat([z.sigmoid()[:-1], torch.ones_like(z[:1])])
    left = torch.cat([torch.ones_like(z[:1]), (1 - stop[:-1]).cumprod(0)])
    return stop * left


def bisect_to_depth(exits_at, blocks, high, low=0.0):
    """The x at which `exits_at`, x -> (labels, exits), uses so many blocks; the more x, the fewer. By bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exits_at(middle)[1].double().mean() > blocks else (low, middle)
    return high


# ---- Rivals' heads: [CLS] vectors of all blocks (N, B, D) -> a tuple of tensors (N, B, ...) -------------------------


def off_ramp(size, num_classes):
    """From [CLS] (B, D) to logits (B, C), as a `dact.DactModule` answers, boxes and all, without its halting unit."""
    return nn.Sequential(dact.Scale(size), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, num_classes))


class Ramps(nn.Module):
    """An off-ramp after each of N blocks but the last, after which a copy of `classifier` answers.

    All ramps start alike, so one unit for all blocks finds alike what it reads (the authors' start from one pooler).
    """

    def __init__(self, N, classifier):
        super().__init__()
        num_classes, size = classifier.linear.weight.shape
        ramp = off_ramp(size, num_classes)
        self.ramps = nn.ModuleList([*(copy.deepcopy(ramp) for _ in range(N - 1)), copy.deepcopy(classifier)])

    def forward(self, cls):
        """-> (logits (N, B, C),)"""
        return self.read(cls)[:1]

    def read(self, cls):
        """-> logits (N, B, C), what the last layers of the ramps read (N - 1, B, D)."""
        *ramps, last = self.ramps
        hidden = torch.stack([ramp[:-1](cls_n) for ramp, cls_n in zip(ramps, cls)])
        logits = torch.stack([*(ramp[-1](of_ramp) for ramp, of_ramp in zip(ramps, hidden)), last(cls[-1])])
        return logits, hidden


class PalbertHeads(Ramps):
    """`Ramps` with a chance to stop, λ_n = σ(z_n), by one unit for all blocks; it reads ramps n and n - 1.

    The unit is that of the authors' code (github.com/tinkoff-ai/palbert, "linear_cat"), and so is the 0 before block 1.
    DIFFERS: their blocks share one classifier; here each has a ramp, as in the other systems.
    """

    def __init__(self, N, classifier):
        super().__init__(N, classifier)
        D = classifier.linear.in_features
        hidden = [layer for _ in range(3) for layer in (nn.Linear(2 * D, 2 * D), nn.Tanh())]
        self.stop = nn.Sequential(*hidden, nn.Linear(2 * D, 1))
        # CHOICE: it starts near the prior. From λ = 1/2, 7/8 of the loss would lie on the first three ramps.
        nn.init.constant_(self.stop[-1].bias, PRIOR)

    def forward(self, cls):
        """-> logits (N, B, C), z (N, B); 0 for the last block, where all stop."""
        logits, now = self.read(cls)
        before = torch.cat([torch.zeros_like(now[:1]), now[:-1]])
        z = self.stop(torch.cat([now, before], -1)).squeeze(-1)
        return logits, torch.cat([z, torch.zeros_like(z[:1])])


class BerxitHeads(Ramps):
    """`Ramps` with one linear unit for all blocks, which reads what a ramp's last layer reads."""

    def __init__(self, N, classifier):
        super().__init__(N, classifier)
        self.unit = nn.Linear(classifier.linear.in_features, 1)

    def forward(self, cls):
        """-> logits (N, B, C), u (N, B): the log-odds that block n's answer is wrong; 0 for the last."""
        logits, hidden = self.read(cls)
        u = self.unit(hidden).squeeze(-1)
        return logits, torch.cat([u, torch.zeros_like(u[:1])])


class Exits(nn.Module):
    """A backbone with heads on the [CLS] vectors of all its blocks."""

    def __init__(self, backbone, heads):
        super().__init__()
        # Named first, the last classifier learns as the backbone does, at --lr, not at the heads' rate.
        self.backbone, self.classifier, self.heads = backbone, heads.ramps[-1], heads

    def forward(self, *inputs):
        cls = torch.stack([*dact.cls_after_blocks(self.backbone, inputs)])  # (N, B, D)
        with torch.autocast(cls.device.type, enabled=False):  # heads are in full precision, always
            return self.heads(cls.float())


# ---- Losses: what heads say of B examples, labels (B,) -> scalar, in nats -------------------------------------------


def deebert_loss(logits, labels):
    """The sum of the ramps' cross-entropies; the last classifier is the frozen backbone's own."""
    return sum(F.cross_entropy(logits_n, labels) for logits_n in logits[:-1])


def fastbert_loss(logits, labels):
    """Self-distillation, no labels: Σ over the ramps of KL(last classifier || ramp) = Σ_c p_c (log p_c - log q_c).

    As in the authors' code; their paper writes the other, KL(ramp || last classifier).
    """
    teacher, ramps = logits[-1].detach().log_softmax(-1), logits[:-1].log_softmax(-1)
    return (teacher.exp() * (teacher - ramps)).sum(-1).mean(1).sum()


def pabee_loss(logits, labels):
    """The mean of all cross-entropies, block n with weight n: Σ n L_n / Σ n."""
    losses = torch.stack([F.cross_entropy(logits_n, labels) for logits_n in logits])
    weights = torch.arange(1.0, len(losses) + 1, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def berxit_loss(logits, u, labels):
    """The last classifier's cross-entropy; in every other batch Σ over the ramps of L_n + (σ(u_n) - [n is wrong])², too.

    0 and 1 as in the paper; the authors' code (github.com/castorini/berxit) has others, too.
    """
    losses = torch.stack([F.cross_entropy(logits_n, labels) for logits_n in logits])
    wrong = (logits.argmax(-1) != labels).float()
    of_ramps = losses[:-1] + (u.sigmoid() - wrong)[:-1].square().mean(1)
    return losses[-1] + torch.randint(2, ()) * of_ramps.sum()  # CHOICE: a toss, where their code takes turns


def palbert_loss(logits, z, labels):
    """Σ p_n L_n + KL(prior || p) / 2, a mean over the batch; p: `exit_chances`. (PonderNet has KL(p || prior).)"""
    p, losses = exit_chances(z), torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
    wanted = exit_chances(torch.full((len(z), 1), PRIOR, device=z.device))
    divergence = wanted * (wanted.log() - p.clamp(min=1e-8).log())
    return (p * losses + 0.5 * divergence).sum(0).mean()


def as_stage(loss):
    """One of the losses above as `train.fit` wants it."""
    return lambda model, inputs, labels: (loss(*model(*inputs), labels),)


# ---- Training -------------------------------------------------------------------------------------------------------


def trained(run, name, model, loss_of, dataset, **settings):
    """`model` with the weights of the run's <name>.pt, in evaluation mode; if there is none, it learns first.

    loss_of: as for `train.fit`. dataset: () -> what it learns on, asked for only then. settings: instead of the run's.
    """
    path = run.trained / f"{name.lower()}.pt"
    if path.exists():
        saved = bert.load_pickle(path)
        with data.reading(path, "it is not of this run; delete it to train it again"):
            model.load_state_dict(saved)
        return model.eval()
    run.trained.mkdir(exist_ok=True)
    with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as log:
        train.fit(name, model, loss_of, dataset(), argparse.Namespace(**vars(run.args) | settings), log)
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    train.write_whole(path, content.getbuffer())
    return model.eval()


def deebert(run, epochs=None):
    """The run's DeeBERT, an `Exits` on stage 1's frozen backbone."""
    return frozen(run, deebert_loss, "DeeBERT", epochs)


def frozen(run, loss, name, epochs=None):
    """An `Exits` whose ramps alone are trained, on cached vectors. epochs: by default twice the run's."""
    # DIFFERS: in the papers a ramp is a pooler and a linear layer (DeeBERT) or a self-attention (FastBERT), at the rate
    # of the backbone. Here every system has DACT's answer head, with DACT's start and DACT's --head-lr.
    epochs = epochs or 2 * run.args.epochs
    torch.manual_seed(run.args.seed)
    heads = Ramps(run.N, run.stage1.classifier).to(run.args.device).train()
    heads.ramps[-1].eval().requires_grad_(False)
    settings = {"epochs": epochs, "precision": "float32"}  # heads are in full precision, always
    heads = trained(run, f"{name}-{epochs:g}", heads, as_stage(loss), lambda: run.vectors, **settings)
    return Exits(run.stage1.bert, heads)


JOINT = {"PABEE": (Ramps, pabee_loss), "BERxiT": (BerxitHeads, berxit_loss), "PALBERT": (PalbertHeads, palbert_loss)}


def joint(run, name):
    """The run's PABEE, BERxiT or PALBERT, an `Exits`: backbone and heads train together, as long as DACT's stage 2."""
    # DIFFERS: from stage 1's weights and without dropout, as DACT; the papers start from the pretrained weights.
    heads, loss = JOINT[name]
    torch.manual_seed(run.args.seed)
    model = Exits(copy.deepcopy(run.stage1.bert), heads(run.N, run.stage1.classifier)).to(run.args.device)
    train.without_dropout(model.backbone)
    return trained(run, name, model.train(), as_stage(loss), lambda: run.train_set)


def longer(run):
    """Stage 1 once more, from what it left, as DACT's stage 2 without dropout in the backbone: a `BertClassifier`."""
    model = copy.deepcopy(run.stage1).train()
    train.without_dropout(model.bert)
    return trained(run, "longer", model, train.stage1_loss, lambda: run.train_set)


# ---- DACT at another price of a block -------------------------------------------------------------------------------


def dact_over_tau(run, taus, more=0):
    """The heads of the run's DACT with halting alone trained anew, by equation (3), at other prices: {tau: heads}.

    "The training of only the confidence functions" (section 3.1). more: so many prices are added, one by one, between
    the two neighbours whose mean exits on the training set lie farthest apart.
    """
    vectors = cache(partial(cls_vectors, run.dact.backbone, run.train_set, run.args, MOST_FOR_HALTING))
    settings = {"epochs": 2 * run.args.epochs, "precision": "float32"}  # heads are in full precision

    @cache
    def at(tau):
        heads = copy.deepcopy(run.dact.heads).requires_grad_(False)
        for head in heads:
            head.reset_halting()
            head.halt.requires_grad_(True)
        return trained(run, f"tau-{tau:g}", heads, partial(train.stage2_loss, tau=tau), vectors, **settings)

    @cache
    def mean_exit(tau):
        return leave_by_rule(*over(at(tau), vectors(), run.args.device))[1].double().mean()

    taus = sorted(taus)
    for _ in range(more):
        i = max(range(1, len(taus)), key=lambda i: mean_exit(taus[i - 1]) - mean_exit(taus[i]))
        taus.insert(i, math.sqrt(taus[i - 1] * taus[i]))
    return {tau: at(tau) for tau in taus}


# ---- Section 3.1: DeeBERT as a case of DACT -------------------------------------------------------------------------


class EntropyHead(nn.Module):
    """A head of DACT whose halting value is a logistic regression on an entropy in nats: h_n = σ(w (H(y_n) - S)).

    It reads logits (B, C) of y_n, such as those of DeeBERT's off-ramp, which do not learn with it. S is DeeBERT's
    threshold: below it h_n < 1/2. With a large w the gate is a step, all weight lies on the first block below its S,
    and DACT *is* DeeBERT (on DeeBERT's ramps).
    """

    def __init__(self, halt):
        super().__init__()
        self.halt = halt

    def forward(self, logits):
        return logits.softmax(-1), self.halt(entropy(logits)[:, None]).squeeze(-1).sigmoid()

    def threshold(self):
        """S = -bias / weight, in nats."""
        return (-self.halt.bias / self.halt.weight).item()


def entropy_heads(N, tied, S, weight=10.0):
    """`dact.Heads` of N `EntropyHead`s, from a threshold of S nats. tied: one w and one S for all, as in DeeBERT."""
    halts = [nn.Linear(1, 1) for _ in range(N)]
    for halt in halts:
        nn.init.constant_(halt.weight, weight)
        nn.init.constant_(halt.bias, -weight * S)
    return dact.Heads(EntropyHead(halts[0] if tied else halt) for halt in halts)


def learned_entropy_heads(run, exits, tied, S):
    """The third stage of section 3.1: on DeeBERT's ramps the confidence functions alone are trained, by (3), from S."""

    def logits():
        (values,) = over(exits.heads, run.vectors, run.args.device)
        return replace(run.vectors, values=values)

    heads, name = entropy_heads(run.N, tied, S).to(run.args.device), f"entropy-{'tied' if tied else 'untied'}-{S:g}"
    # CHOICE: ten times the epochs and fifty times the rate: two numbers have far to go, and an epoch costs nothing.
    settings = {"epochs": 10 * run.args.epochs, "head_lr": 5e-2, "precision": "float32"}
    return trained(run, name, heads, partial(train.stage2_loss, tau=run.args.tau), logits, **settings)


# ---- Pictures and command lines -------------------------------------------------------------------------------------


def save_figure(figure, path, dpi=150):
    """Write a figure of matplotlib as a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    train.write_whole(path, content.getbuffer())


def number(kind, low, high):
    """A type for argparse: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message about what is no number
    return parse


def arguments(description, *flags):
    """The flags that the files here have, and `flags`, pairs of (name, keywords) of its own."""
    parser = train.Parser(description=description.splitlines()[0])
    toy = os.path.relpath(ROOT / "runs/toy")
    parser.add_argument("runs", nargs="*", default=[toy], help=f"folders of finished runs (default: {toy})")
    parser.add_argument("--data", help="folder of the GLUE files (default: train.py's cache)")
    for name, keywords in flags:
        parser.add_argument(name, **keywords)
    return parser
