"""DACT-BERT, equations (1) to (4): a network of blocks that learns when to stop.

After block n a small head reads the block's [CLS] vector and says two things: "my answer is y_n", a distribution over
the classes, and "I want to go on with probability h_n". The answers are folded into one running answer a_n (1), each
with the weight that is left to it (2). Training lets all N blocks speak and asks for a right a_N at a low price (3).
Inference stops after the first block at which no later block can change the winner (4).

This file imports torch alone and never BERT: any backbone will do that has an embedding step `embed(*inputs)`, a list
`blocks` of modules called as `block(hidden, mask)`, and a `hidden_size`.

The symbols are the paper's. Shapes: B sequences, C classes, T tokens, D hidden size.

    y_n  (B, C)  answer of block n: class probabilities, a softmax        section 3
    h_n  (B,)    halting value of block n in (0, 1): 1 goes on, 0 stops   section 3
    p    (B,)    p_n: the weight left to the blocks after n               equation (2)
    a    (B, C)  a_n: the answer accumulated so far                       equation (1)
    n, N         the block just run, from 1; the number of blocks
    d            N - n: blocks not yet run                                equation (4)
    tau          the price of a block, in nats of loss                    equation (3)
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Equations (1) and (2): the accumulator


def accumulate(y_n, h_n, a, p):
    """Fold block n's answer into the running answer: equations (1) and (2).

    paper     here       shape         meaning
    y_n, h_n  y_n, h_n   (B, C), (B,)  what block n says
    a_{n-1}   a          (B, C)        the answer so far; comes back as a_n
    p_{n-1}   p          (B,)          the weight left to block n; comes back as p_n

    >>> y_1, y_2 = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]])
    >>> a, p = accumulate(y_1, torch.tensor([0.5]), *start(y_1))   # a_1 = y_1, p_1 = 0.5
    >>> accumulate(y_2, torch.tensor([0.1]), a, p)[0]              # a_2 = 0.5 * y_2 + 0.5 * a_1
    tensor([[0.6000, 0.4000]])
    """
    # The order matters: block n is weighted by p_{n-1}, what the blocks before it left over. Its own h_n comes after.
    a = y_n * p[:, None] + a * (1 - p[:, None])  # (1)  a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1})         (B, C)
    p = h_n * p  # (2)  p_n = h_n p_{n-1}                                                                 (B,)
    return a, p


def start(y_n):
    """a_0 = 0 and p_0 = 1 (equations (1) and (2), n = 0) in the shapes and on the device of an answer y_n (B, C)."""
    # With p_0 = 1 the first answer counts in full, a_1 = y_1, so every a_n sums to 1 although a_0 does not.
    return torch.zeros_like(y_n), torch.ones_like(y_n[:, 0])


def accumulate_all(y, h):
    """All running answers of N blocks at once: y (N, B, C), h (N, B) -> a (N, B, C), p (N, B); a[-1] is a_N."""
    a, p = start(y[0])
    steps = []
    for y_n, h_n in zip(y, h):
        a, p = accumulate(y_n, h_n, a, p)
        steps.append((a, p))
    return tuple(torch.stack(column) for column in zip(*steps))


# ---------------------------------------------------------------------------------------------------------------------
# Equation (3): the loss


def dact_loss(a_N, h, label, tau):
    """The loss of stage 2, equation (3), in its two terms, each a mean over the batch: (answer, price) in nats.

    paper       here        shape         meaning
    L(x, y)     a_N, label  (B, C), (B,)  negative log of the probability that a_N gives to the label
    h_1 .. h_N  h           (N, B)        halting values of all blocks
    τ           tau         float         5e-3 in the paper
    """
    # a_N is a distribution already. Cross-entropy on it would take a second softmax, and the loss could never reach 0.
    of_label = a_N.gather(1, label[:, None]).squeeze(1)  # Pr(label) in a_N                               (B,)
    answer = -of_label.clamp(min=1e-8).log().mean()  # away from 0: log(0) would end the training in NaN
    # DIFFERS: (3) sums to n; in training every block runs, so n = N. h_N weighs nothing in a_N: it has only its price.
    price = tau * h.sum(0).mean()  # (3)  τ Σ hᵢ
    return answer, price


# ---------------------------------------------------------------------------------------------------------------------
# Equation (4): when no later block can change the winner


def paper_rule(a, p, d):
    """Both sides of equation (4), (left, right), each (B,): halt after block n iff left >= right.

    paper        here       shape      meaning
    Pr(c*, n)    top        (B,)       probability of the winner in a_n
    Pr(c_ru, n)  runner_up  (B,)       probability of the second in a_n
    p_n, d       p, d       (B,), int  weight left to later blocks; how many they are

    Why it is safe. Each of the d later blocks replaces at most a share p_n of the answer (p never rises). At worst all
    of it is taken from the winner, each time: what stays is at least Pr(c*) (1 - p_n)^d, a power. At best for the
    runner-up, all of it is given to it: at most p_n each time, so Pr(c_ru) + p_n d, a product.
    """
    top, runner_up = a.topk(2, dim=1).values.unbind(1)
    # Not p ** d on the right: that is no upper bound, and an adversarial future does flip the winner.
    return top * (1 - p) ** d, runner_up + p * d  # (4)  Pr(c*,n) (1 - p_n)^d ≥ Pr(c_ru,n) + p_n d


def exact_rule(a, p, d):
    """The exact form of (4), ours: both sides (left, right), each (B,); halt after block n iff left >= right.

    Claim: it is the weakest safe condition that knows only a_n, p_n and d.
    Let D_n >= 0 be the winner's lead over another class in a_n. By (1), one more block with answers y gives
        D_{n+1} = D_n (1 - p_n) + p_n (y[winner] - y[other]) >= D_n (1 - p_n) - p_n,
    that is 1 + D_{n+1} >= (1 + D_n) (1 - p_n). As p never rises, d blocks later
        1 + D_N >= (1 + D_n) (1 - p_n)^d.
    Safe: if the right side is at least 1, D_N >= 0 and no class overtakes the winner; a lead over the runner-up is a
    lead over all. (D_N = 0 would be a tie; it takes h = 1 in every later block, where a sigmoid stays below. All of this
    is exact arithmetic: a lead of less than float32's 1e-7 is rounding, and either rule may go wrong on it.)
    Exact: with h = 1 and y = all on the runner-up in every later block, each step above is an equality, so if the right
    side is below 1 there is a future in which the winner falls.

    It never stops later than (4). Write c, r for the two probabilities, q = (1 - p)^d; then q >= 1 - p d (Bernoulli).
    If (4) holds, c q >= r + p d, then (1 + c - r) q = q + c q - r q >= q + p d + r (1 - q) >= 1.
    """
    # DIFFERS: (4) bounds winner and runner-up apart, as if one block could give its mass to both. Their difference is
    # what decides, and its bound is tight.
    top, runner_up = a.topk(2, dim=1).values.unbind(1)
    return (1 + (top - runner_up)) * (1 - p) ** d, torch.ones_like(p)


RULES = {"paper": paper_rule, "exact": exact_rule}


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Halted(NamedTuple):
    """What early exit returns for each of B sequences."""

    label: torch.Tensor  # (B,) int64, the predicted class
    a: torch.Tensor  # (B, C), the answer at the exit: a_n
    exit_block: torch.Tensor  # (B,) int64, n of the exit, 1 to N


@torch.no_grad()
def early_exit(backbone, inputs, step):
    """Run a batch block by block; each sequence leaves it where `step` says so (section 3.2). Returns `Halted`.

    inputs: as for the backbone's embed, then the mask (B, T); padding must be on the right, for it is trimmed.
    step: what is known after block n, (n, hidden, state) -> (answer (B, C), halt (B,) bool, state). state: a tuple of
    tensors (B, ...), empty at n = 1; survivors take their rows of it along.
    """
    hidden, mask = backbone.embed(*inputs[:-1]), inputs[-1]
    N, device = len(backbone.blocks), mask.device
    lengths = mask.sum(1).cpu()  # kept on the CPU: trimming then needs no second synchronisation
    alive = torch.arange(len(mask), device=device)  # row of the batch that each survivor came from
    exit_block, state = torch.zeros_like(alive), ()
    for n, block in enumerate(backbone.blocks, start=1):
        hidden = block(hidden, mask)
        answer, halt, state = step(n, hidden, state)
        if n == 1:
            answers = torch.zeros_like(answer)
        # Every survivor writes its answer; those that leave now write no more, so this is where they exit.
        answers[alive] = answer
        exit_block.index_fill_(0, alive, n)
        if n == N:  # the last block always answers
            break
        keep = (~halt).cpu().nonzero().squeeze(1)  # the one wait of a block for its result
        if len(keep) == 0:
            break
        if len(keep) < len(alive):
            lengths, keep = lengths[keep], keep.to(device, non_blocking=True)
            longest = int(lengths.max())
            hidden, mask, alive = hidden[keep, :longest], mask[keep, :longest], alive[keep]
            state = tuple(rows[keep] for rows in state)
    return Halted(answers.argmax(1), answers, exit_block)


class ReadCls(nn.Module):
    """What the heads of block n read: its [CLS] vector, as it is, or brought to one scale for all blocks.

    In the early blocks of a pretrained BERT [CLS] hardly differs between inputs (by 0.0006 about a mean of 0.06 in block
    2 of a 12-block model, by 0.17 in block 11): a head that reads it as it is learns a constant, and a halting neuron
    decides alike for all inputs. With `norm`, each number of the vector is brought from its mean and deviation over the
    examples to those that it has after the last block, where the classifier of stage 1 knows it.

    mean, var  (N + 1, D)  running over the training of `observe`; the last row is that of the last block once more,
                           so that it stays if blocks are dropped
    """

    def __init__(self, N, hidden_size, norm=False):
        super().__init__()
        self.norm = norm
        if norm:
            self.register_buffer("mean", torch.zeros(N + 1, hidden_size))
            self.register_buffer("var", torch.ones(N + 1, hidden_size))
            self.register_buffer("steps", torch.zeros(()))

    def forward(self, n, cls):
        """Block n's (from 1) [CLS] vectors (B, D) -> (B, D)."""
        if not self.norm:
            return cls
        # 1e-8 is a deviation of 1e-4: what differs by less is rounding.
        ratio = ((self.var[-1] + 1e-8) / (self.var[n - 1] + 1e-8)).sqrt()
        return self.mean[-1] + (cls - self.mean[n - 1]) * ratio

    @torch.no_grad()
    def observe(self, cls):
        """Follow the training: the [CLS] vectors of one batch after every block, N times (B, D)."""
        if self.norm:
            # CHOICE: no batch norm. Batches are of like length, and [CLS] knows it: their own means would hide it in
            # training alone. The statistics run over the last 20 batches or so, and are used a step later (among several
            # processes those of the first, which DistributedDataParallel hands to the others).
            cls = torch.stack([*cls, cls[-1]]).to(self.mean.dtype)  # (N + 1, B, D)
            self.steps += 1
            rate = 1 / self.steps.clamp(max=20)
            self.mean.lerp_(cls.mean(1), rate)
            self.var.lerp_((cls - self.mean[:, None]).square().mean(1), rate)


class DactBert(nn.Module):
    """A backbone with a DACT head after every block (figure 1).

    backbone: see the top of this file; its weights are used, not copied.
    classifier: a module from [CLS] vectors (B, D) to logits (B, C); each block gets a copy of it as its answer head.
    halt_bias: where the initial biases of the halting neurons, which fall by 20 over the depth, begin: at block n they
        are halt_bias - 20 n / N, so that h_n starts at 0.5 after halt_bias / 20 of the blocks. Less of it saves more.
    head_norm: whether the heads read [CLS] on one scale (`ReadCls`).
    """

    def __init__(self, backbone, classifier, halt_bias=8.0, head_norm=False):
        super().__init__()
        self.backbone = backbone
        self.read = ReadCls(len(backbone.blocks), backbone.hidden_size, head_norm)
        # CHOICE: the paper says "linear layers". As in DeeBERT's off-ramps, on whose code it was built, an answer head
        # is pooler and linear layer; all start from those of stage 1, the only ones that know the task.
        self.classifiers = nn.ModuleList(copy.deepcopy(classifier) for _ in backbone.blocks)
        # PAPER: "a perceptron ... followed by a sigmoid" (section 3.1): one neuron a block.
        self.halts = nn.ModuleList(nn.Linear(backbone.hidden_size, 1) for _ in backbone.blocks)
        N = len(self.halts)
        for n, halt in enumerate(self.halts, start=1):
            # CHOICE: zero weights and a bias that falls with n: training starts from "go on early, stop late" for every
            # input. With one bias for all, p_n falls geometrically from the start: at h = 0.5 blocks 1-3 hold 77 % of
            # a_N, know nothing of the task yet, and the answer can lock at the majority class.
            nn.init.zeros_(halt.weight)
            nn.init.constant_(halt.bias, halt_bias - 20 * n / N)

    def head(self, n, hidden):
        """Block n's (from 1) answer and halting value, read off the [CLS] vector: y_n (B, C), h_n (B,)."""
        cls = hidden[:, 0].to(self.halts[n - 1].weight.dtype)  # (B, D), back to full precision under autocast
        with torch.autocast(cls.device.type, enabled=False):  # half precision would round a small p and 1 - p away
            cls = self.read(n, cls)
            y_n = self.classifiers[n - 1](cls).softmax(-1)  # a softmax *before* it is accumulated
            h_n = self.halts[n - 1](cls).squeeze(-1).sigmoid()
        return y_n, h_n

    def forward(self, *inputs):
        """Training: all N blocks speak. inputs end with the mask (B, T) -> y (N, B, C), h (N, B)."""
        hidden, mask = self.backbone.embed(*inputs[:-1]), inputs[-1]
        said, cls = [], []
        for n, block in enumerate(self.backbone.blocks, start=1):
            hidden = block(hidden, mask)
            said.append(self.head(n, hidden))
            cls.append(hidden[:, 0])
        if self.training:
            self.read.observe(cls)
        return tuple(torch.stack(column) for column in zip(*said))

    def early_exit(self, *inputs, rule=paper_rule):
        """Inference: every sequence leaves the batch at the first block where `rule` holds. Returns `Halted`.

        inputs: as for forward; padding must be on the right. rule: (a, p, d) -> (left, right), as `paper_rule`.
        """
        N = len(self.backbone.blocks)

        def step(n, hidden, state):
            y_n, h_n = self.head(n, hidden)
            a, p = accumulate(y_n, h_n, *(state or start(y_n)))
            left, right = rule(a, p, N - n)
            return a, left >= right, (a, p)

        return early_exit(self.backbone, inputs, step)
