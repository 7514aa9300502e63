"""The systems that DACT-BERT is compared with, on the same backbone, data and code path.

    DeeBERT    (Xin et al., 2020)   off-ramps trained alone on the frozen backbone of stage 1; exit when entropy < S
    FastBERT   (Liu et al., 2020)   the same ramps, imitating the last classifier; the same exit, S in other units
    PABEE      (Zhou et al., 2020)  backbone and ramps trained together; exit when t blocks in a row confirmed an answer
    BERxiT     (Xin et al., 2021)   the same training; exit when a learned unit says that the ramp's answer is right
    PALBERT    (Balagansky and Gavrilov, 2022)  backbone, ramps and a chance to stop (PonderNet) trained together; exit
                                    when the chance to have stopped passes q
    first k    the backbone cut after block k and fine-tuned: no decision at all
    DACT at another price: its halting units trained anew, all else as stage 2 left it
    longer     stage 1 twice over: the control for what DACT's second stage gains by training longer
    generality (section 3.1)        DeeBERT inside DACT: the halting value is a logistic regression on the entropy

DACT and every `Exits` can leave a batch through `dact.early_exit`. To turn a rival's knob over a whole dev set it is
quicker to compute what every block says once, and then where each would leave: `leave` and the functions `simulate...`.
Shapes: B sequences, C classes, D hidden size, N blocks, n = 1 .. N.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import sys
from dataclasses import replace
from functools import cache, partial
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

# ---- A finished run of train.py, opened -----------------------------------------------------------------------------


class Run(NamedTuple):
    """What a finished run left, and what it was made with."""

    folder: Path
    trained: Path  # the folder in it for what is trained and measured beside the run
    args: argparse.Namespace  # the settings that metrics.json holds; data, device, precision
    metrics: dict  # metrics.json
    settings: dict  # what decides its numbers; see `train.settings_of`
    stage1: bert.BertClassifier
    dact: dact.DactBert
    tokenizer: object
    train_set: data.Dataset
    dev: data.Dataset
    splits: list  # both as `data.Examples`
    vectors: object  # () -> the [CLS] vectors of stage 1's backbone over the training set, computed at the first call

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
    folder = Path(folder)
    metrics = read_metrics(folder)
    settings = {name: metrics[name] for name, kind in METRICS_JSON.items() if kind is not dict}
    args = argparse.Namespace(**settings, out=folder, data=data_folder, stage1=None)
    args.device, args.precision, _ = train.pick_hardware(args.precision)
    if args.model == train.SCRATCH:
        torch.set_num_threads(1)  # as train.py
    first, second = (
        train.load_run(folder / f"{name}.pt", stage, args.task) for stage, name in ((1, "stage1"), (2, "dact"))
    )
    if len(second.model.heads) == 1:
        raise data.InputError(f"{folder}: a model of one block has no block to leave earlier; name another run")
    models = [saved.model.to(args.device).eval() for saved in (first, second)]
    splits = splits or data.load_task(args.task, args.data)
    train_set, dev_set = (first.dataset(split) for split in splits)
    vectors = cache(partial(train.Vectors, models[0].bert, train_set, args))
    return Run(
        folder, trained_folder(folder), args, metrics, second.settings, *models, first.tokenizer, train_set, dev_set,
        splits, vectors,
    )  # fmt: skip


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
    with data.reading(path, "it is not the metrics of a run; run train.py again"):
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in METRICS_JSON.items():
            if not isinstance(found[key], kind) or isinstance(found[key], bool):
                raise TypeError(f"{key} is {found[key]!r}")
        early = [found["dact"], *(found["rules"][rule] for rule in dact.RULES)]
        for part in (found["full"], *early):
            numbers = [part[name] for name in data.find_task(found["task"]).metrics]
            if not all(isinstance(number, (int, float)) and abs(number) <= 100 for number in numbers):
                raise ValueError("a metric is no percentage")
        if found["rule"] not in dact.RULES or found["precision"] not in train.PRECISIONS:
            raise ValueError(f"rule {found['rule']!r}, precision {found['precision']!r}")
        for name, (_, low, high) in train.RANGES.items():
            if not low <= found[name] <= high:
                raise ValueError(f"{name} is {found[name]}")
        if not all(0 < part["mean_blocks"] < 1e4 for part in early):
            raise ValueError("mean_blocks is out of its range")
    return found


def trained_folder(folder):
    """runs/x/paper-1a2b3c4d: named after metrics.json, so that a run made anew meets nothing of the old one."""
    return Path(folder) / f"paper-{hashlib.sha256((Path(folder) / 'metrics.json').read_bytes()).hexdigest()[:8]}"


# ---- A backbone with an answer after every block, and the rules to leave it by --------------------------------------


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

    def answer(self, n, cls):
        """Block n's logits (B, C), always in full precision, from its [CLS] vectors (B, D)."""
        with torch.autocast(cls.device.type, enabled=False):
            return self.heads[n - 1](cls.float())

    def forward(self, *inputs):
        """-> logits of all blocks (N, B, C)."""
        vectors = enumerate(dact.cls_after_blocks(self.backbone, inputs), start=1)
        return torch.stack([self.answer(n, cls) for n, cls in vectors])

    def early_exit(self, *inputs, rule):
        """rule: (logits (B, C), state) -> (halt (B,) bool, state). Returns `dact.Halted` with probabilities."""

        def step(n, cls, state):
            logits = self.answer(n, cls)
            halt, state = rule(logits, state)
            return logits.softmax(-1), halt, state

        return dact.early_exit(self.backbone, inputs, step)


class Palbert(Exits):
    """`Exits` with a chance to stop, λ_n = σ(z_n): z_n from [CLS] of blocks n and n - 1, by one unit for all blocks.

    The unit is that of the authors' code (github.com/tinkoff-ai/palbert, "linear_cat"), and so is the 0 before block 1.
    """

    def __init__(self, backbone, classifier):
        super().__init__(backbone, classifier)
        D = backbone.hidden_size
        self.scales = nn.ModuleList(dact.Scale(D) for _ in backbone.blocks)
        hidden = [layer for _ in range(3) for layer in (nn.Linear(2 * D, 2 * D), nn.Tanh())]
        self.stop = nn.Sequential(*hidden, nn.Linear(2 * D, 1))

    def forward(self, *inputs):
        """-> logits (N, B, C), z (N, B) of all blocks."""
        vectors = list(dact.cls_after_blocks(self.backbone, inputs))
        logits = torch.stack([self.answer(n, cls) for n, cls in enumerate(vectors, start=1)])
        with torch.autocast(logits.device.type, enabled=False):
            now = torch.stack([scale(cls.float()) for scale, cls in zip(self.scales, vectors)])  # (N, B, D)
            before = torch.cat([torch.zeros_like(now[:1]), now[:-1]])
            return logits, self.stop(torch.cat([now, before], -1)).squeeze(-1)


class LearnedExit(nn.Module):
    """BERxiT's: on trained `Exits` one linear unit for all blocks, which reads what a ramp's last layer reads."""

    def __init__(self, exits):
        super().__init__()
        self.backbone, self.heads = exits.backbone, exits.heads
        self.unit = nn.Linear(exits.backbone.hidden_size, 1)

    def forward(self, *inputs):
        """-> logits (N, B, C), u (N, B): the log-odds that block n's answer is wrong; 0 for the last."""
        vectors = [cls.float() for cls in dact.cls_after_blocks(self.backbone, inputs)]
        *ramps, last = self.heads
        with torch.autocast(vectors[0].device.type, enabled=False):
            hidden = torch.stack([ramp[:-1](cls) for ramp, cls in zip(ramps, vectors)])  # (N - 1, B, D)
            logits = torch.stack([*(ramp[-1](of_ramp) for ramp, of_ramp in zip(ramps, hidden)), last(vectors[-1])])
            u = self.unit(hidden).squeeze(-1)
        return logits, torch.cat([u, torch.zeros_like(u[:1])])


def entropy(logits):
    """Shannon entropy in nats of softmax(logits) over the last axis: H = log Σ e^x - Σ x e^x / Σ e^x."""
    return logits.logsumexp(-1) - (logits * logits.softmax(-1)).sum(-1)


def entropy_rule(logits, state, S):
    """DeeBERT: leave when the entropy is under S nats; it is at most log C, so S > log C leaves after block 1."""
    return entropy(logits) < S, state


def patience_rule(logits, state, t):
    """PABEE: leave when t blocks in a row have confirmed the answer, that is after t + 1 equal ones."""
    label = logits.argmax(-1)
    last, count = state or (label, torch.full_like(label, -1))
    count = torch.where(label == last, count + 1, 0)
    return count >= t, (label, count)


def simulate(logits, rule):
    """Where a rule leaves and what it answers, from the logits of all blocks (N, n, C): (labels (n,), exits (n,))."""
    halts, state = [], ()
    for logits_n in logits:
        halt, state = rule(logits_n, state)
        halts.append(halt)
    return leave(logits, torch.stack(halts))


def simulate_palbert(logits, z, q):
    """PALBERT's "Q-exit": leave at the first block by which the chance to have stopped is at least q."""
    return leave(logits, exit_chances(z).cumsum(0) >= q)


def leave(answers, halt):
    """(labels, exits (n,)) if each leaves at the first block of halt (N, n) bool, or the last; answers: (N, n, C)."""
    halt = torch.cat([halt[:-1], torch.ones_like(halt[:1])])
    first = halt.int().argmax(0)
    return answers[first, torch.arange(len(first))].argmax(-1), first + 1


def bisect_to_depth(simulated, blocks, high, low=0.0):
    """The x at which `simulated`, x -> (labels, exit_block), uses so many blocks; the more x, the fewer. By bisection."""
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated(middle)[1].double().mean() > blocks else (low, middle)
    return high


# ---- Losses: logits (N, B, C), labels (B,) -> scalar, in nats -------------------------------------------------------


def deebert_loss(logits, labels):
    """The sum of the ramps' cross-entropies; the last classifier is stage 1's and is not trained again."""
    return sum(F.cross_entropy(logits_n, labels) for logits_n in logits[:-1])


def fastbert_loss(logits, labels, turned=False):
    """Self-distillation, no labels: Σ over the ramps of KL(ramp || last classifier) = Σ_c q_c (log q_c - log p_c).

    turned: KL(last classifier || ramp), which the authors' code minimises where their paper writes the other.
    """
    teacher, ramps = logits[-1].detach().log_softmax(-1), logits[:-1].log_softmax(-1)
    divergence = teacher.exp() * (teacher - ramps) if turned else ramps.exp() * (ramps - teacher)
    return divergence.sum(-1).mean(1).sum()


def pabee_loss(logits, labels):
    """The mean of all cross-entropies, block n with weight n: Σ n L_n / Σ n."""
    losses = torch.stack([F.cross_entropy(logits_n, labels) for logits_n in logits])
    weights = torch.arange(1.0, len(losses) + 1, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def berxit_loss(outputs, labels):
    """Of the learned exit alone: Σ over the ramps of (σ(u_n) - [ramp n is wrong])², a mean over the batch.

    0 and 1 as in the paper; the authors' code (github.com/castorini/berxit) aims at 0.01 and 0.63.
    """
    logits, u = outputs
    wrong = (logits.argmax(-1) != labels).float()
    return (u.sigmoid() - wrong)[:-1].square().mean(1).sum()


def exit_chances(z):
    """z (N, B) -> the chance to stop at each block: λ_n = σ(z_n) of what is left; the last block takes the rest."""
    # CHOICE: as in PonderNet; in PALBERT's code the last block has a λ_N, and the chances need not sum to 1.
    stop = torch.cat([z.sigmoid()[:-1], torch.ones_like(z[:1])])
    left = torch.cat([torch.ones_like(z[:1]), (1 - stop[:-1]).cumprod(0)])
    return stop * left


def palbert_loss(outputs, labels, prior=0.1, beta=0.5):
    """Σ p_n L_n + β KL(geometric prior || p), a mean over the batch; p: `exit_chances`, L_n: cross-entropies."""
    logits, z = outputs
    p, losses = exit_chances(z), torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
    wanted = exit_chances(torch.full((len(z), 1), math.log(prior / (1 - prior)), device=z.device))
    divergence = wanted * (wanted.log() - p.clamp(min=1e-8).log())
    return (p * losses + beta * divergence).sum(0).mean()


def as_stage(loss):
    """One of the losses above as `train.fit` wants it."""

    def stage_loss(model, inputs, labels):
        return (loss(model(*inputs), labels),)

    return stage_loss


# ---- Training -------------------------------------------------------------------------------------------------------


def deebert(run, epochs=None):
    """The run's DeeBERT, an `Exits` on stage 1's frozen backbone."""
    return ramps(run, deebert_loss, "DeeBERT", epochs)


def ramps(run, loss, name, epochs=None):
    """An `Exits` whose ramps alone are trained, on cached vectors. epochs: by default twice the run's."""
    # DIFFERS: in the papers a ramp is a pooler and a linear layer (DeeBERT) or a self-attention (FastBERT), at the rate
    # of the backbone. Here every system has DACT's answer head, with DACT's start and DACT's --head-lr.
    epochs = epochs or 2 * run.args.epochs
    torch.manual_seed(run.args.seed)
    exits = Exits(run.stage1.bert, run.stage1.classifier).to(run.args.device)

    def train_them(args, record):
        args.epochs = epochs
        exits.heads.train()[-1].eval().requires_grad_(False)
        train.fit(name, train.over_vectors(exits), as_stage(loss), run.vectors(), args, record)

    train_or_load(run, f"{name}-{epochs:g}", exits.heads, train_them)
    return exits.eval()


def pabee(run, epochs=None):
    """The run's PABEE: backbone and ramps together. epochs: by default the run's."""
    return joint(run, Exits, pabee_loss, "PABEE", epochs)


def palbert(run, epochs=None):
    """The run's PALBERT, a `Palbert`. epochs: by default the run's."""
    return joint(run, Palbert, palbert_loss, "PALBERT", epochs)


def joint(run, kind, loss, name, epochs=None):
    """A system whose backbone and heads train together."""
    # DIFFERS: from stage 1's weights, as DACT, where the papers start from the pretrained ones.
    torch.manual_seed(run.args.seed)
    exits = kind(copy.deepcopy(run.stage1.bert), run.stage1.classifier).to(run.args.device)
    train.without_dropout(exits.backbone)
    return trained(run, name, exits, as_stage(loss), epochs)


def berxit(run, epochs=None):
    """The run's BERxiT, a `LearnedExit` on the ramps of its PABEE, whose losses are weighted as BERxiT's can be."""
    # CHOICE: the unit learns after all else, as DACT's halting does, over cached vectors, for three times the epochs.
    torch.manual_seed(run.args.seed)
    model = LearnedExit(pabee(run, epochs)).to(run.args.device)

    def train_it(args, record):
        args.epochs = 3 * args.epochs
        model.eval().heads.requires_grad_(False)
        vectors = train.Vectors(model.backbone, run.train_set, run.args)
        train.fit("BERxiT", train.over_vectors(model), as_stage(berxit_loss), vectors, args, record)

    train_or_load(run, f"BERxiT-{epochs or run.args.epochs:g}", model.unit, train_it)
    return model.eval()


def first_blocks(run, k):
    """A `BertClassifier` of the first k blocks of what stage 1 started from, fine-tuned with the run's settings."""
    args = copy.copy(run.args)
    args.model = None if args.model == train.SCRATCH else args.model
    model = train.starting_model(args).model
    model.bert.blocks = model.bert.blocks[:k]
    model.bert.config = replace(model.bert.config, num_hidden_layers=k)
    return trained(run, f"first-{k}", model.to(run.args.device), train.stage1_loss)


def longer(run):
    """Stage 1 once more, from what it left, as DACT's stage 2 without dropout in the backbone: a `BertClassifier`."""
    model = copy.deepcopy(run.stage1)
    train.without_dropout(model.bert)
    return trained(run, "longer", model, train.stage1_loss)


def trained(run, name, model, loss, epochs=None):
    """`model` as a whole, trained with the run's data and settings, or loaded. epochs: if not the run's."""
    epochs = epochs or run.args.epochs

    def train_it(args, record):
        args.epochs = epochs
        train.fit(name, model.train(), loss, run.train_set, args, record)

    return train_or_load(run, f"{name}-{epochs:g}", model, train_it)


def train_or_load(run, name, model, train_it):
    """`model` with the weights of the run's <name>.pt. If there is none, train_it(args, record) makes them first.

    args: the run's settings; record: the `train.Record` for `train.fit`.
    """
    path = run.trained / f"{name.lower()}.pt"
    if path.exists():
        saved = bert.load_pickle(path)
        with data.reading(path, "it is not of this run; delete it to train it again"):
            train.check_state(saved)
            model.load_state_dict(saved)
        return model.eval()
    lines = 20 if sys.stdout.isatty() else 1  # scripts train many systems
    train_it(copy.copy(run.args), train.Record(path.with_suffix(""), {"system": name}, lines=lines))
    train.write_whole(path, train.torch_bytes(model.state_dict()))
    return model.eval()


# ---- Section 3.1: DeeBERT as a case of DACT -------------------------------------------------------------------------


class EntropyHead(nn.Module):
    """A head of DACT whose halting value is a logistic regression on an entropy in nats: h_n = σ(w (H(y_n) - S)).

    answer: [CLS] (B, D) -> logits of y_n, such as an off-ramp of DeeBERT's; it does not learn with this. S is DeeBERT's
    threshold: below it h_n < 1/2. With a large w the gate is a step, all weight lies on the first block below its S,
    and DACT *is* DeeBERT (on DeeBERT's ramps).
    """

    def __init__(self, answer, halt):
        super().__init__()
        self.answer, self.halt = answer, halt

    def forward(self, cls):
        with torch.no_grad():
            logits = self.answer(cls)
        with torch.autocast(cls.device.type, enabled=False):
            return logits.softmax(-1), self.halt(entropy(logits)[:, None]).squeeze(-1).sigmoid()

    def threshold(self):
        """S = -bias / weight, in nats."""
        return (-self.halt.bias / self.halt.weight).item()


def entropy_dact(model, answers, tied, S, weight=10.0):
    """A `DactBert` on the backbone of `model` whose heads are `EntropyHead`s on `answers`, from a threshold of S nats.

    model: a `DactBert`. answers: a function for each block. tied: one w and one S for all blocks, as in DeeBERT.
    """
    halts = [nn.Linear(1, 1) for _ in answers]
    for halt in halts:
        nn.init.constant_(halt.weight, weight)
        nn.init.constant_(halt.bias, -weight * S)
    heads = [EntropyHead(answer, halts[0] if tied else halt) for answer, halt in zip(answers, halts)]
    return train.replaced(model, heads=nn.ModuleList(heads).to(next(model.parameters()).device))


def learned_entropy_dact(run, exits, tied, S):
    """The third stage of section 3.1: on DeeBERT's ramps the confidence functions alone are trained, by (3), from S."""
    answers = [partial(exits.answer, n) for n in range(1, len(exits.heads) + 1)]
    model = entropy_dact(train.replaced(run.dact, backbone=exits.backbone), answers, tied, S)
    name = f"entropy-{'tied' if tied else 'untied'}-{S:g}"

    def train_it(args, record):
        # CHOICE: ten times the epochs and fifty times the rate: two numbers have far to go, and an epoch costs nothing.
        args.epochs, args.head_lr = 10 * args.epochs, 5e-2
        loss = partial(train.stage2_loss, tau=args.tau)
        train.fit(name, train.over_vectors(model), loss, run.vectors(), args, record)

    train_or_load(run, name, model.heads, train_it)
    return model.eval()


# ---- DACT at another price of a block -------------------------------------------------------------------------------


def dact_over_tau(run, taus):
    """The run's DACT with its halting units alone trained anew, by equation (3), at other prices: {tau: `DactBert`}.

    "The training of only the confidence functions" (section 3.1).
    """
    vectors = cache(partial(train.Vectors, run.dact.backbone, run.train_set, run.args, train.MOST_FOR_HALTING))

    def at(tau):
        model = train.replaced(run.dact, heads=copy.deepcopy(run.dact.heads))
        train_or_load(run, f"tau-{tau:g}", model.heads,
                      lambda args, record: train.learn_halting(model, tau, vectors(), args, record))  # fmt: skip
        return model.eval()

    return {tau: at(tau) for tau in taus}


def logits_of(model, vectors, args):
    """A `DactBert`'s heads over `Vectors`: logits of y (N, n, C), and z (N, n), h before the sigmoid."""
    model = train.replaced(model, heads=[head.logits for head in model.heads])
    return train.outputs(train.over_vectors(model), vectors, args)


# ---- Pictures and command lines -------------------------------------------------------------------------------------


def save_figure(figure, path, dpi=150):
    """Write a figure of matplotlib as a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    train.write_whole(path, content.getbuffer())


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
    except (torch.OutOfMemoryError, MemoryError):
        print("error: the memory is full; free some, or hide a full GPU (CUDA_VISIBLE_DEVICES=)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0
