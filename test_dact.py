"""The accumulator, the loss, the bound and the halting rule, checked by hand, by brute force and against adversaries.

    pytest test_dact.py

Mathematics is tested in float64. A property (halting never changes the answer) does not pin a formula, and a worked
number does not prove a property, so each equation has both.
"""

import doctest
import itertools

import pytest
import torch
from torch import nn

import dact


@pytest.fixture(autouse=True)
def float64_and_seeded():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_outputs(N, B, C, sharpness=2.0):
    """Random answers and halting values of N blocks: y (N, B, C), h (N, B)."""
    return (torch.randn(N, B, C) * sharpness).softmax(-1), (torch.randn(N, B) * sharpness).sigmoid()


# ---- Equations (1) and (2) ------------------------------------------------------------------------------------------


def test_by_hand():
    """README.md's "By hand", where each step is written out, and the worst third block."""
    y, h = torch.tensor([[[0.6, 0.4]], [[0.9, 0.1]], [[0.0, 1.0]]]), torch.tensor([[0.6], [0.1], [0.7]])
    a, p = dact.accumulate_all(y, h)
    torch.testing.assert_close(p[:, 0], torch.tensor([0.6, 0.06, 0.042]))
    torch.testing.assert_close(a[:, 0], torch.tensor([[0.6, 0.4], [0.78, 0.22], [0.7332, 0.2668]]))
    sides = [torch.cat(dact.paper_rule(a[n], p[n], 2 - n)).tolist() for n in (0, 1)]
    assert sides == [pytest.approx([0.096, 1.6]), pytest.approx([0.7332, 0.28])]


def test_docstring_examples():
    torch.set_default_dtype(torch.float32)  # as a reader would run them
    result = doctest.testmod(dact)
    assert result.attempted >= 3 and result.failed == 0


def test_final_answer_is_the_weighted_mean_of_all_answers():
    """Section 3: a_N is "the weighted average of all intermediate outputs"; its weights written out, from h alone."""
    N = 7
    y, h = random_outputs(N, 50, 3)
    p = [torch.ones(50)] + [h[:n].prod(0) for n in range(1, N + 1)]  # (2) as a product
    weights = []
    for n in range(1, N + 1):
        later = [1 - p[k] for k in range(n, N)]  # what blocks n+1 .. N leave of block n's share
        weights.append(p[n - 1] * torch.stack(later).prod(0) if later else p[n - 1])
    weights = torch.stack(weights)
    torch.testing.assert_close(weights.sum(0), torch.ones(50))
    a, _ = dact.accumulate_all(y, h)
    torch.testing.assert_close(a[-1], (weights[:, :, None] * y).sum(0))


def test_running_answers_are_distributions_and_p_falls():
    y, h = random_outputs(12, 100, 4)
    a, p = dact.accumulate_all(y, h)
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(12, 100))
    torch.testing.assert_close(a[0], y[0])  # p_0 = 1: the first answer counts in full
    assert (p[1:] <= p[:-1]).all() and (p >= 0).all()


def test_last_halting_value_weighs_nothing():
    y, h = random_outputs(5, 4, 3)
    h.requires_grad_()
    a, _ = dact.accumulate_all(y, h)
    (gradient,) = torch.autograd.grad(a[-1][:, 0].sum(), h)
    assert (gradient[-1] == 0).all() and (gradient[:-1] != 0).all()


def test_gradients_of_accumulator_and_loss():
    y, h = random_outputs(4, 3, 3)
    label = torch.tensor([0, 2, 1])

    def loss(logits, halt):
        a, _ = dact.accumulate_all(logits.softmax(-1), halt.sigmoid())
        return sum(dact.dact_loss(a[-1], halt.sigmoid(), label, tau=0.1))

    assert torch.autograd.gradcheck(loss, (y.log().requires_grad_(), h.logit().requires_grad_()))


# ---- Equation (3) ---------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    a_N = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    h = torch.tensor([[0.9, 0.1], [0.6, 0.2], [0.5, 0.1]])
    answer, price = dact.dact_loss(a_N, h, torch.tensor([0, 1]), tau=0.01)
    # -(ln 0.5 + ln 0.25) / 2 = 1.5 ln 2 = 1.0397;  0.01 * ((0.9 + 0.6 + 0.5) + (0.1 + 0.2 + 0.1)) / 2 = 0.012
    assert answer.item() == pytest.approx(1.0397207708)
    assert price.item() == pytest.approx(0.012)


def test_loss_reaches_zero_and_survives_a_zero_probability():
    certain = torch.tensor([[1.0, 0.0]])
    assert dact.dact_loss(certain, torch.zeros(2, 1), torch.tensor([0]), 0.1)[0].item() == 0  # a second softmax: 0.31
    assert dact.answer_loss(certain, torch.tensor([1])).item() == pytest.approx(18.420680744)  # -ln 1e-8


# ---- Equation (4) and the exact rule --------------------------------------------------------------------------------


def test_both_rules_by_hand():
    a, p = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0.1])
    left, right = dact.paper_rule(a, p, 3)
    # 0.7 * 0.9^3 = 0.7 * 0.729 = 0.5103 (not 0.7 * (1 - 0.3) = 0.49);  0.2 + 0.1 * 3 = 0.5 (not 0.2 + 0.001)
    assert (left.item(), right.item()) == (pytest.approx(0.5103), pytest.approx(0.5))
    left, right = dact.exact_rule(a, p, 3)
    # (0.7 - 0.2) * 0.729 = 0.3645 against 1 - 0.729 = 0.271
    assert (left.item(), right.item()) == (pytest.approx(0.3645), pytest.approx(0.271))


def test_each_rule_under_its_name():
    """a = (0.7, 0.2, 0.1), d = 2. p = 0.15: (4) 0.506 >= 0.5, exact 0.361 >= 0.278, both halt. p = 0.17: 0.482 < 0.54,
    0.344 >= 0.311, the exact rule alone. p = 0.2: 0.448 < 0.6, 0.32 < 0.36, neither.
    """
    a, p = torch.tensor([[0.7, 0.2, 0.1]]).expand(3, 3), torch.tensor([0.15, 0.17, 0.2])
    halts = {name: torch.ge(*rule(a, p, 2)).tolist() for name, rule in dact.RULES.items()}
    assert halts == {"paper": [True, False, False], "exact": [True, True, False]}


@pytest.mark.parametrize("rule", dact.RULES.values())
def test_what_always_and_what_never_halts(rule):
    """Nothing left to run, no weight left for it, and one block that can replace the whole answer."""
    a, one = random_outputs(1, 200, 3)[0][0], torch.ones(200)
    for p, d, halts in ((one, 0, True), (0 * one, 7, True), (one, 1, False)):
        assert (torch.ge(*rule(a, p, d)) == halts).all()


def product_of_powers(a, p, d):
    """Equation (4) misread: a power on the right side too. Unsafe; here to show that the tests below would notice."""
    left, _ = dact.paper_rule(a, p, d)
    return left, a.topk(2, dim=1).values[:, 1] + p**d


def worst_leads(rule, trials=2500, N=12):
    """The winners' final leads after every halt of `rule`, each against its own worst future, over random beginnings.

    The future gives all mass to one other class at every later block and never lowers h (each other class is tried).
    """
    leads = []
    for C in (2, 3, 5):
        for sharpness in (0.5, 2.0, 5.0):
            a, p = dact.accumulate_all(*random_outputs(N, trials, C, sharpness))
            for n in range(1, N):
                left, right = rule(a[n - 1], p[n - 1], N - n)
                a_n, p_n = a[n - 1][left >= right], p[n - 1][left >= right]
                winner = a_n.argmax(1)
                for other in range(C):
                    rival = torch.full_like(winner, other)
                    y_n, h_n = nn.functional.one_hot(rival, C).double(), torch.ones_like(p_n)
                    a_N, p_N = a_n, p_n
                    for _ in range(N - n):
                        a_N, p_N = dact.accumulate(y_n, h_n, a_N, p_N)
                    lead = (a_N.gather(1, winner[:, None]) - a_N.gather(1, rival[:, None])).squeeze(1)
                    leads.append(lead[winner != rival])
    return torch.cat(leads)


@pytest.mark.parametrize("rule", dact.RULES.values())
def test_halting_never_changes_the_answer_in_the_worst_future(rule):
    leads = worst_leads(rule)
    assert len(leads) > 10_000
    assert leads.min().item() >= -1e-12  # the exact rule allows a tie, up to rounding


def test_the_adversary_has_teeth():
    leads = worst_leads(product_of_powers)
    assert (leads < -1e-6).sum().item() > 100


@pytest.mark.parametrize("rule", dact.RULES.values())
def test_halting_never_changes_the_answer_in_random_futures(rule):
    halts = 0
    for C, sharpness in itertools.product((2, 3, 5), (0.5, 2.0, 8.0)):
        a, p = dact.accumulate_all(*random_outputs(12, 3000, C, sharpness))
        for n in range(1, 12):
            left, right = rule(a[n - 1], p[n - 1], 12 - n)
            halted = left >= right
            assert (a[n - 1].argmax(1) == a[-1].argmax(1))[halted].all()
            halts += halted.sum().item()
    assert halts > 50_000


def test_exact_rule_halts_exactly_when_no_future_can_flip():
    """Brute force over futures of up to three blocks: answers all on one class, h in {0, 0.5, 1}."""
    corners = list(itertools.product(torch.eye(3), (0.0, 0.5, 1.0)))  # (y, h): where the extremes of a_N lie
    a_n, p_n = (torch.randn(100, 3) * 2).softmax(-1), torch.rand(100) * 0.6
    winner = nn.functional.one_hot(a_n.argmax(1), 3).bool()
    for d in (1, 2, 3):
        left, right = dact.exact_rule(a_n, p_n, d)
        worst = torch.ones(100)
        for future in itertools.product(corners, repeat=d):
            a, p = a_n, p_n
            for y_n, h_n in future:
                a, p = dact.accumulate(y_n.expand(100, 3), torch.full((100,), h_n), a, p)
            worst = torch.minimum(worst, a[winner] - a.masked_fill(winner, -1).amax(1))
        assert torch.equal(left >= right, worst >= 0)
        assert 10 < (worst >= 0).sum() < 90


def test_exact_rule_never_stops_later_than_the_papers():
    a, p = random_outputs(1, 100_000, 4)[0][0], torch.rand(100_000) ** 3
    earlier = 0
    for d in range(12):
        paper, exact = (torch.ge(*rule(a, p, d)) for rule in (dact.paper_rule, dact.exact_rule))
        assert (exact | ~paper).all()
        earlier += (exact & ~paper).sum().item()
    assert earlier > 1000  # and often earlier


def test_exact_rule_in_float32_is_that_in_float64():
    """Leads and weights down to 1e-8, a part in 10,000 beside the point where the two sides are equal."""
    p = 10 ** (torch.rand(20_000) * 6 - 8)
    for d in (1, 3, 11, 23):
        q = (1 - p) ** d
        lead = (1 - q) / q * (1 + torch.tensor([-1e-4, 1e-4]).repeat(10_000))
        a = torch.stack([lead, torch.zeros_like(lead)], 1).float()  # two of many classes: no sum rounds the lead away
        halts, truth = (torch.ge(*dact.exact_rule(a.to(kind), p.float().to(kind), d)) for kind in (a.dtype, p.dtype))
        assert torch.equal(halts, truth) and 9000 < truth.sum() < 11_000
        rounded = (1 + a[:, 0]) * (1 - p.float()) ** d >= 1  # the same inequality, summed up first
        assert (rounded != truth).sum() > 1000


# ---- Figure 1 -------------------------------------------------------------------------------------------------------


def test_the_boxes_of_the_head():
    """y_n = softmax(A r + a), h_n = sigmoid(H r + b), with r = relu(S x + s) for both, and x on its scale."""
    module = dact.DactModule(5, 3).eval()
    nn.init.normal_(module.halt.weight)
    module.scale.mean, module.scale.var = torch.randn(5), torch.rand(5) + 0.5
    cls = torch.randn(7, 5)
    x = (cls - module.scale.mean) / module.scale.var.sqrt()
    r = torch.clamp(x @ module.shared.weight.T + module.shared.bias, min=0)  # Linear + ReLU
    answer, halt = (r @ last.weight.T + last.bias for last in (module.answer, module.halt))  # Linear
    y_n, h_n = module(cls)
    torch.testing.assert_close(y_n, answer.exp() / answer.exp().sum(1, keepdim=True), atol=1e-6, rtol=1e-6)  # Softmax
    torch.testing.assert_close(h_n, 1 / (1 + (-halt[:, 0]).exp()), atol=1e-6, rtol=1e-6)  # Sigmoid
    assert y_n.shape == (7, 3) and h_n.shape == (7,)
    assert sum(p.numel() for p in module.parameters()) == (5 * 5 + 5) + (5 * 3 + 3) + (5 + 1)  # and no weights besides


class LinearNeuron(dact.DactModule):
    """A halting unit without the hidden layer."""

    def forward(self, cls):
        return super().forward(cls)[0], self.halt(self.scale(cls)).squeeze(-1).sigmoid()


def learned_halting(kind, steps=300):
    """h_1 where block 1 knows the log-odds s of the label, and block 2 the label: for s = -6, -0.5, 0.5, 6.

    Learned by (3) and the heads' own loss, as in train.py. Where |s| = 6 the answer of block 1 costs 0.017 nats, less
    than the price of 0.3 to go on; where it is 0.5, 0.66.
    """
    heads = nn.ModuleList(kind(16, 2) for _ in range(2))
    levels = torch.tensor([-6.0, -0.5, 0.5, 6.0])

    def read(s):
        return torch.cat([s[:, None], torch.randn(len(s), 15)], 1)

    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(steps):
        s = levels[torch.randint(4, (256,))]
        label = torch.rand(256) < s.sigmoid()
        y, h = (torch.stack(x) for x in zip(heads[0](read(s)), heads[1](read(8.0 * label - 4))))
        a, _ = dact.accumulate_all(y, h)
        loss = sum(dact.dact_loss(a[-1], h, label.long(), tau=0.3))
        (loss + dact.answer_loss(y.flatten(0, 1), label.long().repeat(2))).backward()
        optimizer.step()
        heads.zero_grad()
    with torch.no_grad():
        return heads[0](read(levels.repeat_interleave(200)))[1].view(4, 200).mean(1)


def test_halting_learns_to_go_on_only_if_unsure():
    low, unsure_0, unsure_1, high = learned_halting(dact.DactModule).tolist()
    assert max(low, high) < 0.3 and min(unsure_0, unsure_1) > 0.7  # for both classes alike


def test_a_linear_neuron_cannot_learn_that():
    """It rises or falls with the log-odds: between two values that it stops at, it stops."""
    low, unsure_0, unsure_1, high = learned_halting(LinearNeuron).tolist()
    assert max(low, high) > min(unsure_0, unsure_1) - 0.1 and min(low, high) < 0.6  # from 0.88: it did learn


# ---- The model, on a backbone that is not BERT ----------------------------------------------------------------------


class Mixer(nn.Module):
    """A block: every token sees the mean of the real tokens. Counts the rows that it is asked to compute."""

    def __init__(self, size):
        super().__init__()
        self.linear, self.rows = nn.Linear(2 * size, size), 0

    def forward(self, hidden, mask):
        assert hidden.shape[:2] == mask.shape
        assert mask.all(0).any() and mask.any(0).all()  # no column of padding alone
        self.rows += len(hidden)
        mean = (hidden * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return torch.tanh(self.linear(torch.cat([hidden, mean.expand_as(hidden)], -1)) * 3)


class Backbone(nn.Module):
    hidden_size = 8

    def __init__(self, N):
        super().__init__()
        self.embed = nn.Embedding(20, self.hidden_size)
        self.blocks = nn.ModuleList(Mixer(self.hidden_size) for _ in range(N))


def random_model(N=6, C=3, B=64):
    """A DactBert with random heads, and a padded batch for it."""
    model = dact.DactBert(Backbone(N), C).eval()
    for head in model.heads:
        nn.init.normal_(head.answer.weight, std=6.0)
        nn.init.normal_(head.halt.weight, std=3.0)
        nn.init.zeros_(head.halt.bias)
    lengths = torch.randint(1, 10, (B,))
    mask = torch.arange(lengths.max()) < lengths[:, None]
    return model, (torch.randint(20, mask.shape), mask)


@pytest.mark.parametrize("N, C", [(6, 3), (24, 2)])
@pytest.mark.parametrize("rule", dact.RULES.values())
def test_early_exit_equals_the_full_run(rule, N, C):
    for seed in range(20):
        torch.manual_seed(seed)
        model, inputs = random_model(N, C)
        y, h = model(*inputs)
        a, p = dact.accumulate_all(y, h)
        assert y.shape == (N, 64, C) and h.shape == (N, 64)
        holds = torch.stack([torch.ge(*rule(a[n - 1], p[n - 1], N - n)) for n in range(1, N + 1)])
        first = holds.int().argmax(0) + 1  # the first block at which the rule holds; at N it always does
        model.backbone.blocks.apply(lambda module: setattr(module, "rows", 0))
        halted = model.early_exit(*inputs, rule=rule)
        assert torch.equal(halted.exit_block, first)
        assert torch.equal(halted.label, a[-1].argmax(1))
        torch.testing.assert_close(halted.a, a[first - 1, torch.arange(len(first))])
        assert h.requires_grad and not halted.a.requires_grad  # no graph is kept at inference
        # those who halted left the batch: every block saw its survivors once, and nobody else
        assert [block.rows for block in model.backbone.blocks] == [(first >= n).sum().item() for n in range(1, N + 1)]
    assert 1 < first.double().mean().item() < N


def test_early_exit_with_rules_that_always_and_never_hold():
    model, inputs = random_model()
    always = model.early_exit(*inputs, rule=lambda a, p, d: (p, p))
    never = model.early_exit(*inputs, rule=lambda a, p, d: (p, p + 1))
    assert (always.exit_block == 1).all() and (never.exit_block == 6).all()  # the last block always answers
    torch.testing.assert_close(never.a, dact.accumulate_all(*model(*inputs))[0][-1])


def test_the_default_rule_is_the_papers():
    model, inputs = random_model(12, 2, 256)
    exits = {name: model.early_exit(*inputs, rule=rule).exit_block for name, rule in dact.RULES.items()}
    assert torch.equal(model.early_exit(*inputs).exit_block, exits["paper"])
    assert not torch.equal(exits["paper"], exits["exact"])


@pytest.mark.parametrize("N, saved", [(12, 1), (24, 5)])
def test_untrained_halting_is_flat_and_open(N, saved):
    """h_n = sigmoid(2) = 0.8808, p_n = 0.8808^n. Twelve blocks: p_11 = 0.248, so with d = 1 (4) asks for a lead of more
    than 0.4; of 24, p_19 = 0.090 is the first at which it can hold: 0.910^5 = 0.62 > 0.45. p_18 = 0.102: 0.525 < 0.61.
    """
    model, inputs = random_model(N, 3)
    for head in model.heads:
        head.reset_halting()
    _, h = model(*inputs)
    torch.testing.assert_close(h, torch.full_like(h, 0.8807970780))
    assert N - saved <= model.early_exit(*inputs).exit_block.min()
    for head in model.heads:
        nn.init.zeros_(head.answer.weight)
        head.answer.bias.data = torch.tensor([50.0, 0.0, 0.0])
    assert (model.early_exit(*inputs).exit_block == N - saved).all()  # where every block is certain
    fresh = dact.DactBert(model.backbone, 3)
    torch.testing.assert_close(fresh(*inputs)[1], h)


def test_heads_read_the_first_token_alone(monkeypatch):
    model, (ids, mask) = random_model()
    monkeypatch.setattr(Mixer, "forward", lambda self, hidden, mask: hidden)  # tokens do not meet
    others = torch.cat([ids[:, :1], (ids[:, 1:] + 1) % 20], 1)
    assert all(map(torch.equal, model(ids, mask), model(others, mask)))
    assert all(map(torch.equal, model.early_exit(ids, mask), model.early_exit(others, mask)))


def test_every_weight_learns():
    """Section 3: "the whole formulation is end-to-end differentiable"."""
    model, inputs = random_model(N=4)
    y, h = model(*inputs)
    a, _ = dact.accumulate_all(y, h)
    sum(dact.dact_loss(a[-1], h, torch.randint(3, (64,)), tau=0.01)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_heads_keep_full_precision_under_autocast():
    model, inputs = random_model()
    model.float()
    cls = model.backbone.embed(*inputs[:-1])[:, 0]
    y, h = model.heads[0](cls)
    with torch.autocast("cpu", torch.bfloat16):
        same_y, same_h = model.heads[0](cls)
    assert torch.equal(y, same_y) and torch.equal(h, same_h)  # bfloat16's 8 bits would move them by 1e-3
    assert not torch.equal(h, h.bfloat16().float())


# ---- The scale on which the heads read ------------------------------------------------------------------------------


def test_the_scale_follows_the_training():
    """One number. 1, 3: mean 2, var 1. Then 4, 8: mean 2 + (6 - 2) / 2 = 4, and (0 + 16) / 2 = 8 about it, so var
    (1 + 8) / 2 = 4.5: 8 comes out as (8 - 4) / sqrt(4.5) = 1.886. From the 20th batch on a batch counts a twentieth.
    """
    scale = dact.Scale(1)
    for batch, mean, var in (([1.0, 3.0], 2, 1), ([4.0, 8.0], 4, 4.5)):
        read = scale(torch.tensor(batch)[:, None])
        assert scale.mean.item() == mean and scale.var.item() == var
    assert read[1].item() == pytest.approx(1.885618)
    for _ in range(998):
        scale(torch.zeros(2, 1))
    scale(torch.full((1, 1), 20.0))
    torch.testing.assert_close(scale.mean, torch.ones(1))
    scale.eval()(torch.full((1, 1), 99.0))
    torch.testing.assert_close(scale.mean, torch.ones(1))  # training alone moves it


def test_what_differs_by_rounding_is_not_blown_up():
    """A deviation of 1e-4 counts as 1e-4 sqrt(2): 3e-4 about the mean comes out as 3 / sqrt(2)."""
    scale = dact.Scale(1).eval()
    scale.var.fill_(1e-8)
    assert scale(torch.full((1, 1), 3e-4)).item() == pytest.approx(3 / 2**0.5)
