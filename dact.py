"""DACT-BERT, equations (1) to (4): a network of blocks that learns when to stop.

After block n a small head reads the block's [CLS] vector and says two things: its answer y_n, a distribution over the
classes, and h_n: the next block enters with h_n times the weight with which this one entered; near 1 goes on, near 0
stops. The answers are folded into one running answer a_n (1), each with the weight that the blocks before it allow (2).
Training lets all N blocks speak and asks for a right a_N at a low price (3). Inference stops after the first block for
which (4) says that no later block can change the winner.

This file imports torch alone and never BERT. Any backbone will do that has a `hidden_size`, an embedding step `embed`,
which takes all inputs but the last, and a list `blocks` of modules called as `block(hidden, mask)`. The last input is
the mask (B, T), True on real tokens, padded on the right. The first token is [CLS].
Where the paper is silent and we picked stands `CHOICE:`, where we depart from it `DIFFERS:`.

The symbols are the paper's; n is the block just run, from 1, and N the number of blocks.
Shapes: B sequences, C classes, T tokens, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import nn

# ---- Equations (1) and (2): the accumulator -------------------------------------------------------------------------


def accumulate(y_n, h_n, a=None, p=None):
    """Fold block n's answer into the running answer: equations (1) and (2).

    paper    here  shape   meaning
    y_n      y_n   (B, C)  answer of block n: class probabilities, a softmax
    h_n      h_n   (B,)    halting value of block n in (0, 1), also called its confidence; yet 1 goes on, 0 stops
    a_{n-1}  a     (B, C)  the answer accumulated so far, left out at n = 1; comes back as a_n
    p_{n-1}  p     (B,)    the weight of block n, left out at n = 1; comes back as p_n, the weight of block n + 1

    >>> y_1, y_2 = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]])
    >>> a, p = accumulate(y_1, torch.tensor([0.5]))   # a_1 = y_1, p_1 = 0.5
    >>> accumulate(y_2, torch.tensor([0.1]), a, p)[0]   # a_2 = 0.5 * y_2 + 0.5 * a_1
    tensor([[0.6000, 0.4000]])
    """
    if a is None:  # a_0 = 0 and p_0 = 1. So a_1 = y_1, and every a_n sums to 1 although a_0 does not.
        a, p = torch.zeros_like(y_n), torch.ones_like(h_n)
    # The order matters: block n enters with p_{n-1}, which the blocks before it have set. Its own h_n comes after.
    a = y_n * p[:, None] + a * (1 - p[:, None])  # (1)  a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1})         (B, C)
    p = h_n * p  # (2)  p_n = h_n p_{n-1}                                                                 (B,)
    return a, p


def accumulate_all(y, h):
    """All running answers of N blocks at once: y (N, B, C), h (N, B) -> a (N, B, C), p (N, B); a[-1] is a_N."""
    a = p = None
    steps = []
    for y_n, h_n in zip(y, h):
        a, p = accumulate(y_n, h_n, a, p)
        steps.append((a, p))
    return tuple(torch.stack(column) for column in zip(*steps))


# ---- Equation (3): the loss -----------------------------------------------------------------------------------------


def answer_loss(a, label):
    """L(x, y): the negative log of the probability that answers a (B, C) give to the labels (B,), a mean in nats."""
    # a is a distribution already. Cross-entropy on it would take a second softmax, and the loss could never reach 0.
    of_label = a.gather(1, label[:, None])  # Pr(label) in a                                              (B, 1)
    return -of_label.clamp(min=1e-8).log().mean()  # log(0) would end the training in NaN; below 1e-8 nothing is learned


def dact_loss(a_N, h, label, tau):
    """The loss of stage 2, equation (3), as its two terms: (answer, price), in nats. Training takes their sum.

    paper       here        shape         meaning
    L(x, y)     a_N, label  (B, C), (B,)  see `answer_loss`
    h_1 .. h_N  h           (N, B)        halting values of all blocks
    τ           tau         float         the price of a block in nats; 5e-3 in the paper
    """
    # CHOICE: (3) sums to n; in training every block runs, so to N. h_N weighs nothing in a_N, so it only costs.
    return answer_loss(a_N, label), tau * h.sum(0).mean()  # (3)  L(x, y) + τ Σ hᵢ


# ---- Equation (4): when no later block can change the winner --------------------------------------------------------


def paper_rule(a, p, d):
    """Both sides of equation (4), (left, right), each (B,): halt after block n iff left >= right.

    paper        here       shape      meaning
    Pr(c*, n)    top        (B,)       probability of the winner in a_n
    Pr(c_ru, n)  runner_up  (B,)       probability of the second in a_n
    p_n, d       p, d       (B,), int  the most weight that a later block has; how many blocks are later, N - n

    Why it is safe. Each of the d later blocks replaces at most a share p_n of the answer (p never rises). At worst all
    of it is taken from the winner, each time: what stays is at least Pr(c*) (1 - p_n)^d, a power. At best for the
    runner-up, all of it is given to it: at most p_n each time, so Pr(c_ru) + p_n d, a product.
    """
    top, runner_up = a.topk(2, dim=1).values.unbind(1)
    # Not p ** d on the right: that is no upper bound, and an adversarial future does flip the winner.
    return top * (1 - p) ** d, runner_up + p * d  # (4)  Pr(c*,n) (1 - p_n)^d ≥ Pr(c_ru,n) + p_n d


def exact_rule(a, p, d):
    """The exact form of (4), ours: both sides (left, right), each (B,); halt after block n iff left >= right.

    Claim: it is the earliest safe stop for whoever knows only a_n, p_n and d.
    Let l_n >= 0 be the winner's lead over another class in a_n. By (1), one more block with answers y gives
        l_{n+1} = l_n (1 - p_n) + p_n (y[winner] - y[other]) >= l_n (1 - p_n) - p_n,
    that is 1 + l_{n+1} >= (1 + l_n) (1 - p_n). As p never rises, d blocks later 1 + l_N >= (1 + l_n) (1 - p_n)^d.
    Safe: if that is at least 1, no class overtakes the winner. (Only y[other] = 1 makes a tie; a softmax is below 1.)
    Exact: with h = 1 and y = all on the runner-up in every later block each step is an equality, so if it is below 1
    there is a future in which the winner falls.

    It never stops later than (4). Write c, r for the two probabilities, q = (1 - p)^d. This rule is c q >= r q + 1 - q,
    and (4) c q >= r + p d, where r >= r q and p d >= 1 - q (Bernoulli).
    """
    # DIFFERS: (4) lets the runner-up keep all it has while the later blocks add to it; they shrink what it has, too.
    top, runner_up = a.topk(2, dim=1).values.unbind(1)
    # (1 + lead) q >= 1, written as lead q >= 1 - q. A small p is lost in 1 - q, but not in -expm1(d log(1 - p)).
    log_q = (d * torch.log1p(-p)).nan_to_num()  # 0 where d = 0, also if p = 1
    return (top - runner_up) * (1 - p) ** d, -log_q.expm1()


RULES = {"paper": paper_rule, "exact": exact_rule}

# ---- Figure 1: the module of one block ------------------------------------------------------------------------------


class Scale(nn.Module):
    """The [CLS] vectors of one block, (B, D): each number brought to mean 0 and deviation 1 over the examples."""

    def __init__(self, size):
        super().__init__()
        for name, value in (("mean", torch.zeros(size)), ("var", torch.ones(size)), ("steps", torch.zeros(()))):
            self.register_buffer(name, value)

    def forward(self, cls):
        if self.training:
            # CHOICE: mean and variance of about the last 20 batches. nn.BatchNorm1d takes those of the batch alone, and
            # sentences of one batch are of one length: on the toy task easy ones then left after hard ones.
            self.steps += 1
            rate = 1 / self.steps.clamp(max=20)
            self.mean.lerp_(cls.detach().mean(0), rate)
            self.var.lerp_((cls.detach() - self.mean).square().mean(0), rate)
        return (cls - self.mean) / (self.var + 1e-8).sqrt()  # 1e-8: what differs by less than 1e-4 is rounding


class DactModule(nn.Module):
    """Figure 1: from the [CLS] vectors (B, D) of one block to its y_n (B, C) and h_n (B,).

    [CLS] -> Scale (ours) -> Linear + ReLU -+-> Linear + Softmax -> y_n
                                            +-> Linear + Sigmoid -> h_n
    """

    def __init__(self, size, num_classes):
        super().__init__()
        # DIFFERS: in the early blocks of a pretrained BERT [CLS] hardly differs between inputs: its deviation is 0.0006 in
        # block 2 of a 12-block model, and 0.17 in block 11. A layer that reads it as it is learns a constant there.
        self.scale = Scale(size)
        self.shared = nn.Linear(size, size)  # CHOICE: the figure gives no width
        self.answer = nn.Linear(size, num_classes)
        self.halt = nn.Linear(size, 1)
        self.reset_halting()

    def reset_halting(self):
        """Untrained halting: h_n = sigmoid(2) = 0.88 for every input."""
        # CHOICE: flat and open. By (4), twelve such blocks stop at most one block early (24 at most five), so what is
        # saved beyond that has been learned. At h = 0.5, blocks 1-3 would hold 77 % of a_N and know nothing of the task yet.
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, 2.0)

    def forward(self, cls):
        # Half precision would round a small p and 1 - p away, so the head leaves autocast.
        with torch.autocast(cls.device.type, enabled=False):
            hidden = self.shared(self.scale(cls.to(self.scale.mean.dtype))).relu()  # (B, D)
            y_n = self.answer(hidden).softmax(-1)  # a softmax *before* it is accumulated                 (B, C)
            h_n = self.halt(hidden).sigmoid().squeeze(-1)  # (B,)
            return y_n, h_n


class Heads(nn.ModuleList):
    """The DACT modules of all N blocks: a network of their own on the [CLS] vectors of a backbone."""

    def forward(self, cls):
        """cls: the [CLS] vectors (B, D) after each block, in turn, or one tensor (N, B, D) -> y (N, B, C), h (N, B)."""
        outputs = [head(cls_n) for head, cls_n in zip(self, cls)]
        return tuple(torch.stack(column) for column in zip(*outputs))


# ---- The model: training over all blocks, inference with early exit -------------------------------------------------


class Halted(NamedTuple):
    """What early exit returns for each of B sequences."""

    label: torch.Tensor  # (B,) int64, the predicted class
    a: torch.Tensor  # (B, C), the answer at the exit: a_n
    exit_block: torch.Tensor  # (B,) int64, n of the exit, 1 to N


class DactBert(nn.Module):
    """A backbone (see the top of this file; shared, not copied) with a DACT module after every block: figure 1."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.heads = Heads(DactModule(backbone.hidden_size, num_classes) for _ in backbone.blocks)

    def forward(self, *inputs):
        """All N blocks answer, as in training. inputs end with the mask (B, T) -> y (N, B, C), h (N, B)."""
        return self.heads(cls_after_blocks(self.backbone, inputs))

    @torch.no_grad()
    def early_exit(self, *inputs, rule=paper_rule):
        """Inference: every sequence leaves the batch at the first block where `rule` holds (section 3.2): `Halted`.

        inputs: as for `forward`; the model in evaluation mode. rule: (a, p, d) -> (left, right), as `paper_rule`.
        """
        hidden, mask = self.backbone.embed(*inputs[:-1]), inputs[-1]
        lengths = mask.sum(1).cpu()  # kept there: trimming then waits for no GPU
        alive = torch.arange(len(mask), device=mask.device)  # row of the batch that each survivor came from
        exit_block, a, p = torch.zeros_like(alive), None, None
        for n, (block, head) in enumerate(zip(self.backbone.blocks, self.heads), start=1):
            hidden = block(hidden, mask)
            a, p = accumulate(*head(hidden[:, 0]), a, p)
            left, right = rule(a, p, len(self.heads) - n)  # after block N d is 0, and both rules hold
            if n == 1:
                answers = torch.zeros_like(a)
            # Every survivor writes its answer and n. Who leaves now writes no more: what was written last is the exit.
            answers[alive] = a
            exit_block.index_fill_(0, alive, n)  # not `[alive] = n`, which would bring n from the CPU
            keep = (left < right).cpu().nonzero().squeeze(1)  # the one wait of a block for its result
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                lengths, keep = lengths[keep], keep.to(mask.device, non_blocking=mask.is_cuda)
                longest = int(lengths.max())
                hidden, mask, alive = hidden[keep, :longest], mask[keep, :longest], alive[keep]
                a, p = a[keep], p[keep]
        return Halted(answers.argmax(1), answers, exit_block)


def cls_after_blocks(backbone, inputs):
    """Run all blocks on a batch; yields the [CLS] vectors (B, D) after each."""
    hidden, mask = backbone.embed(*inputs[:-1]), inputs[-1]
    for block in backbone.blocks:
        hidden = block(hidden, mask)
        yield hidden[:, 0]
