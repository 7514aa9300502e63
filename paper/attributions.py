"""What an answer or a halting value rests on: Integrated Gradients of tokens, Layer Conductance of what lies inside.

    Integrated Gradients   IG_i   = (x_i - x'_i) ∫₀¹ ∂F/∂x_i dα         (Sundararajan et al., 2017, equation 1)
    Layer Conductance      Cond_j = ∫₀¹ ∂F/∂y_j dy_j/dα dα              (Dhamdhere et al., 2018, equation 2)

both along the straight line x' + α (x - x') from a baseline x', an input that says nothing, to the input x. Both are
complete: the attributions add up to F(x) - F(x'). How far the sums here miss that is the completeness error.

F is any function (hidden (B, T, D), mask (B, T)) -> (B,) of what the embedding step returns: nothing above the second
heading knows of BERT or DACT. Shapes: B rows, T tokens, D hidden size, C classes, N blocks, n = 1 .. N.
"""

from typing import NamedTuple

import baselines  # noqa: F401, first: it makes the top level importable
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

import dact
import data

# ---- The two methods ------------------------------------------------------------------------------------------------


class Attribution(NamedTuple):
    """What the parts of one input contribute to F(x) - F(x')."""

    parts: object  # (T,) of the tokens; for conductance a list of tensors, one a layer; in the unit of F
    of_input: float  # F(x)
    of_baseline: float  # F(x')
    missed: float  # |Σ parts - (F(x) - F(x'))|; of a line in pieces, the sum of what each of them misses
    steps: int  # points or steps that the integral is a sum of

    @property
    def error(self):
        """Completeness error: missed / |F(x) - F(x')|; infinite where F(x) = F(x') and something is missed."""
        change = abs(self.of_input - self.of_baseline)
        return self.missed / change if change else (float("inf") if self.missed else 0.0)


def integrated_gradients(F, x, baseline, steps):
    """The attribution of each token: those of its D numbers, summed. x, baseline (T, D) -> `Attribution`, parts (T,).

    steps: points of a Gauss-Legendre quadrature; all of them run at once.
    """
    # CHOICE: Gauss-Legendre. F is smooth, and n of its points integrate a polynomial of degree 2n - 1 exactly.
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # for an integral over (-1, 1)
    alphas, weights = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in ((nodes + 1) / 2, weights / 2))
    points = on_the_line(x, baseline, alphas).requires_grad_()  # (B, T, D)
    (gradient,) = torch.autograd.grad(F(points, all_real(points)).sum(), points)  # rows do not meet in F
    mean_gradient = torch.einsum("b,btd->td", weights, gradient)
    return complete(((x - baseline) * mean_gradient).sum(-1), *ends(F, x, baseline), steps)


def layer_conductance(F, x, baseline, steps):
    """The attribution of each number of some layers. x, baseline (T, D) -> `Attribution`, parts [(...) of each layer].

    F: (hidden, mask) -> (scores (B,), layers: a list of tensors (B, ...) that the scores were computed from). Complete
    if every way from input to score leads through exactly one of the layers.
    steps: pieces of the line; all of them run at once.
    """
    alphas = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    points = on_the_line(x, baseline, alphas).requires_grad_()
    scores, layers = F(points, all_real(points))
    gradients = torch.autograd.grad(scores.sum(), layers)
    # dy = y(k+1) - y(k) on each piece, so dα cancels; the mean of its two ends is the trapezoid rule.
    parts = [((y[1:] - y[:-1]) * (g[1:] + g[:-1]) / 2).detach().sum(0) for y, g in zip(layers, gradients)]
    return complete(parts, *ends(lambda *inputs: F(*inputs)[0], x, baseline), steps)


def on_the_line(x, baseline, alpha):
    """x' + α (x - x') for α (B,): (B, T, D)."""
    return baseline + alpha[:, None, None] * (x - baseline)


def all_real(hidden):
    """The mask of rows without padding."""
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


@torch.no_grad()
def ends(F, x, baseline):
    """(F(x), F(x')) as floats."""
    both = torch.stack([x, baseline])
    return F(both, all_real(both)).tolist()


def complete(parts, of_input, of_baseline, steps):
    """`Attribution` of parts, with what they miss of F(x) - F(x')."""
    total = sum(part.sum().item() for part in (parts if isinstance(parts, list) else [parts]))
    return Attribution(parts, of_input, of_baseline, abs(total - (of_input - of_baseline)), steps)


def to_one_percent(method, F, x, baseline, steps=8, most=2048):
    """One of the two methods, with the line in pieces, as many as bring its completeness error below 1 %.

    steps: of each piece; most: of all of them. What is left then is for the figure to say.
    """

    def piece(start, end):
        """The part of the line from α = start to end, and its attributions."""
        a, b = (baseline + alpha * (x - baseline) for alpha in (start, end))
        return start, end, method(F, b, a, steps)

    # CHOICE: F can turn within a hair's breadth of the line, and then equal steps are of no use: on MRPC 512 of them
    # once missed 121 %. But attributions of pieces of the line add up to those of the line, and each piece is complete
    # in itself, so that it is known where the sum is poor. The piece that misses most is halved, and halved again.
    pieces = [piece(0.0, 1.0)]
    while (found := joined([of_piece for *_, of_piece in pieces])).error >= 0.01 and found.steps + steps <= most:
        worst = max(range(len(pieces)), key=lambda i: pieces[i][-1].missed)
        start, end, _ = pieces[worst]
        middle = (start + end) / 2
        pieces[worst : worst + 1] = piece(start, middle), piece(middle, end)  # still in order
    return found


def joined(pieces):
    """The `Attribution` of a line from those of its pieces, in order."""
    parts = [piece.parts for piece in pieces]
    parts = [sum(layer) for layer in zip(*parts)] if isinstance(parts[0], list) else sum(parts)
    missed, steps = (sum(getattr(piece, name) for piece in pieces) for name in ("missed", "steps"))
    return Attribution(parts, pieces[-1].of_input, pieces[0].of_baseline, missed, steps)


# ---- From where to where --------------------------------------------------------------------------------------------


def baseline_token(run):
    """(id, word) of the token that stands for every word of a baseline."""
    # CHOICE: [MASK], which in pretraining stood for "a word is here, unknown", so that the line ends where the model
    # knows its way. [PAD] has hardly been trained and the zero vector never: F is ragged on the way there, and takes
    # hundreds of steps. A vocabulary without a mask (the toy task's) has nothing but [PAD].
    for word in ("[MASK]", "<mask>"):
        if run.saved.tokenizer.token_to_id(word) is not None:
            return run.saved.tokenizer.token_to_id(word), word
    pad_id = run.dact.backbone.config.pad_token_id
    return pad_id, run.saved.tokenizer.id_to_token(pad_id)


@torch.no_grad()
def line(run, backbone, i):
    """x and x', both (T, D): dev example i as `backbone` embeds it, and the same with all its words taken out.

    Words, positions and segments are summed and normalised here. [CLS] and [SEP] stay, as do positions and segments: so
    no attribution falls on them, and the baseline is an input of the same shape.
    """
    input_ids, segment_ids, _ = inputs_of(run, i)
    frame = torch.tensor(run.saved.tokenizer.encode("").ids, device=run.args.device)  # what is put around a text
    emptied = torch.where(torch.isin(input_ids, frame), input_ids, baseline_token(run)[0])
    return backbone.embed(input_ids, segment_ids)[0], backbone.embed(emptied, segment_ids)[0]


def inputs_of(run, i):
    """(input_ids, segment_ids, mask), each (1, T), of dev example i."""
    return run.dev.batch([i], run.args.device)[0]


def words_of(run, i):
    """The tokens of dev example i, without the marks for a space before them."""
    tokens = [run.saved.tokenizer.id_to_token(token) for token in run.dev.input_ids[i].tolist()]
    return [token.lstrip("\u2581\u0120") or "␣" for token in tokens]  # SentencePiece's mark, and byte-level BPE's


def chosen_examples(run, examples, wanted, other=None):
    """`examples` if there are any, checked: indices into the dev set. Else the first so many that are answered right.

    Those of the last group (the toy's level 3) come before all others. other: labels (n,) that another system gives,
    which must be right, too. Raises InputError for an index of no example, and if there are too few.
    """
    for i in examples:
        if not 0 <= i < len(run.dev):
            raise data.InputError(f"--examples: no dev example {i}; give numbers from 0 to {len(run.dev) - 1}")
    if examples:
        return examples
    groups, labels, found = run.dev.groups or [""] * len(run.dev), run.dev.labels, []
    hardest = max(groups)
    for i in sorted(range(len(labels)), key=lambda i: groups[i] != hardest):
        if (other is None or other[i] == labels[i]) and run.early_exit(*inputs_of(run, i)).label.item() == labels[i]:
            found.append(i)
        if len(found) == wanted:
            return found
    raise data.InputError(f"{run.folder}: {len(found)} of {wanted} example(s) answered right; choose by --examples")


# ---- What is attributed: functions of (hidden, mask) for the two methods --------------------------------------------


def dact_answer(model, n, label):
    """F: the log-odds of class `label` in DACT's running answer a_n, in nats."""

    def score(hidden, mask):
        a, _ = dact.accumulate_all(*model.heads(cls_of_blocks(model, n, hidden, mask)))
        return log_odds(a[-1], label)

    return score


def ramp_answer(exits, n, label):
    """F: the log-odds of class `label` at DeeBERT's off-ramp n, in nats."""
    ramp = exits.heads.ramps[n - 1]
    return lambda hidden, mask: log_odds(ramp(cls_of_blocks(exits, n, hidden, mask)[-1]).softmax(-1), label)


def log_odds(a, label):
    """log Pr(label) - log Pr(another) of distributions a (B, C): (B,)."""
    # CHOICE: the paper says "the final prediction". A probability is flat wherever the model is sure: all that happens
    # on the line happens within a few steps, and the sum is poor. Its log-odds are not.
    others = torch.cat([a[:, :label], a[:, label + 1 :]], dim=1)  # not 1 - Pr(label), which rounds to 0
    return a[:, label].log() - others.sum(1).log()


def halting_value(model, n):
    """F: the halting unit of block n before its sigmoid, which would flatten it; above 0 is "go on"."""
    head = model.heads[n - 1]
    until_sigmoid = torch.nn.Sequential(head.scale, head.shared, torch.nn.ReLU(), head.halt, torch.nn.Flatten(0))
    return lambda hidden, mask: until_sigmoid(cls_of_blocks(model, n, hidden, mask)[-1])


def weight_left(model, n):
    """F and layers, for conductance: log p_n in nats, and the vectors (B, D) that the heads of blocks 1 .. n read.

    p_n is what makes (4) halt. log p_n = Σ log h_i: every block has its own share, and no share is counted twice.
    """

    def score(hidden, mask):
        read = cls_of_blocks(model, n, hidden, mask)
        _, p = dact.accumulate_all(*model.heads(read))
        return p[-1].log(), read

    return score


def cls_of_blocks(model, n, hidden, mask):
    """The [CLS] vectors (B, D) after blocks 1 .. n, from what the embedding step returns.

    Each is a tensor of its own: its gradient is what the head of its block made of it, and no later block.
    """
    vectors = []
    for block in model.backbone.blocks[:n]:
        hidden = block(hidden, mask)
        vectors.append(hidden[:, 0])
    return vectors


# ---- Colours --------------------------------------------------------------------------------------------------------

# Blue for +, orange for -: told apart with every kind of colour blindness, and pale enough for black letters.
COLOURS = LinearSegmentedColormap.from_list("orange to blue", ["#f28e2b", "#ffffff", "#5aa5e6"])
MARKED = 0.15  # from this share of the largest attribution on, its sign is marked by more than the colour


def shares(parts):
    """Attributions (...) as shares from -1 to 1 of the largest of them."""
    return parts / parts.abs().max().clamp(min=1e-30)


def described(run, attributions):
    """What has to be known to judge attributions: baseline, steps, completeness error."""
    steps = sorted({found.steps for found in attributions})
    number = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    error = f"{100 * max(found.error for found in attributions):.2f} %" + " at most" * (len(attributions) > 1)
    return f"baseline: {baseline_token(run)[1]} for every word; {number} steps; completeness error {error}"


# The flag of figures 3 and 4
EXAMPLES = ("--examples", {"nargs": "+", "type": int, "default": [], "help": "dev examples, from 0; after the folders"})
