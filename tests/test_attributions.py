"""paper/attributions.py against hand calculation and captum; figure3.py and figure4.py on a short run."""

import re
from dataclasses import replace

import attributions
import baselines
import figure3
import figure4
import pytest
import torch
from attributions import integrated_gradients, layer_conductance
from captum.attr import LayerConductance, LayerIntegratedGradients
from fakes import google_arrays, write_google

import bert
import dact
import data

pytestmark = pytest.mark.usefixtures("few_sentences")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random DactBert of two blocks and three classes, in float64, its halting neurons random too."""
    folder = write_google(tmp_path_factory.mktemp("model"), google_arrays())
    torch.manual_seed(5)
    stage1, _ = bert.load_pretrained(str(folder), 3)
    model = dact.DactBert(stage1.bert, 3).double().eval()
    for head in model.heads:
        head.scale.mean.normal_(), head.scale.var.uniform_(0.5, 2)
        for layer in (head.answer, head.halt):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    return model


IDS, SEGMENTS = torch.tensor([[2, 16, 17, 18, 3, 20, 17, 3]]), torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
EMPTIED = torch.tensor([[2, 4, 4, 4, 3, 4, 4, 3]])  # [CLS] and [SEP] stay, [MASK] for the words
MASK = torch.ones(1, 8, dtype=torch.bool)


def ends(model):
    """x and x', (T, D)."""
    with torch.no_grad():
        return model.backbone.embed(IDS, SEGMENTS)[0], model.backbone.embed(EMPTIED, SEGMENTS)[0]


# ---- By hand --------------------------------------------------------------------------------------------------------


def test_the_completeness_error_says_what_is_missed():
    # F = x^4 from 0 to 1: one Gauss-Legendre point is the middle, F' = 4/8 there, so the sum is 1/2 of 1.
    def fourth(hidden, mask):
        return hidden[:, 0, 0] ** 4

    x, baseline = torch.ones(1, 1), torch.zeros(1, 1)
    assert integrated_gradients(fourth, x, baseline, steps=1).error == pytest.approx(0.5)
    assert integrated_gradients(fourth, x, baseline, steps=2).error < 1e-6  # two points integrate a cubic exactly
    assert integrated_gradients(fourth, x, x, steps=2).error == 0  # no way, nothing missed


def test_the_line_is_cut_where_the_sum_is_poor():
    """F of one number: from 0 to 1 within a tenth of a thousandth of the line, at 0.4."""

    def step(hidden, mask):
        return (1e5 * (hidden[:, 0, 0] - 0.4)).sigmoid()

    x, baseline = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    assert integrated_gradients(step, x, baseline, steps=512).error > 0.1
    found = attributions.to_one_percent(integrated_gradients, step, x, baseline, steps=4)
    assert found.error < 0.01 and found.steps % 4 == 0 and 4 < found.steps < 200
    assert found.parts.item() == pytest.approx(1, abs=0.01)  # = F(x) - F(x')
    assert (found.of_input, found.of_baseline) == (pytest.approx(1), pytest.approx(0))
    given_up = attributions.to_one_percent(integrated_gradients, step, x, baseline, steps=4, most=8)
    assert given_up.steps == 8 and given_up.error > 0.1


def test_what_pieces_miss_does_not_cancel_out():
    halves = [attributions.Attribution(torch.tensor([1.0, 2.0]), 3.5, 0.0, 0.5, 4),
              attributions.Attribution(torch.tensor([0.5, 1.0]), 4.5, 3.5, 0.5, 4)]  # fmt: skip
    found = attributions.joined(halves)
    assert found.parts.tolist() == [1.5, 3] and found.parts.sum() == found.of_input - found.of_baseline
    assert found.error == pytest.approx(1 / 4.5) and found.steps == 8


def test_log_odds_by_hand_and_where_the_rest_is_too_small_for_one_minus():
    a = torch.tensor([[0.5, 0.3, 0.2], [1.0, 1e-12, 0.0]])
    odds = attributions.log_odds(a, 0)  # log(0.5 / 0.5) = 0; log(1 / 1e-12) = 12 log 10
    assert odds.tolist() == pytest.approx([0, 27.631], abs=1e-3)
    assert attributions.log_odds(a[:1], 1).item() == pytest.approx(-0.8473, abs=1e-4)  # log(0.3 / 0.7)


# ---- Against captum, on functions of the whole model written out once more ------------------------------------------


def assert_close(ours, theirs):
    """To 1e-4 of the largest entry; and that there is something to compare."""
    assert theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("what", ["answer", "halting 1", "halting 2", "ramp"])
def test_attributions_agree_with_captum(model, what):
    torch.manual_seed(0)
    ramps = baselines.Ramps(2, bert.Classifier(model.backbone.config, 3)).double().eval()
    exits = baselines.Exits(model.backbone, ramps)

    def forward(*inputs):
        y, h = model(*inputs)
        if what.startswith("halting"):
            return h[int(what[-1]) - 1].logit()
        cls = torch.stack([*dact.cls_after_blocks(model.backbone, inputs)])
        p = dact.accumulate_all(y, h)[0][-1][:, 1] if what == "answer" else exits.heads(cls)[0][0].softmax(-1)[:, 1]
        return torch.log(p / (1 - p))

    score = {"answer": attributions.dact_answer(model, 2, 1), "halting 1": attributions.halting_value(model, 1),
             "halting 2": attributions.halting_value(model, 2), "ramp": attributions.ramp_answer(exits, 1, 1)}  # fmt: skip
    found = integrated_gradients(score[what], *ends(model), steps=20)
    method, extra = LayerIntegratedGradients(forward, model.backbone.embed), (SEGMENTS, MASK)
    theirs = method.attribute(IDS, EMPTIED, additional_forward_args=extra, n_steps=20, method="gausslegendre")
    assert_close(found.parts, theirs.sum(-1)[0])


def captum_conductance(score, layer, x, baseline, **kind):
    """captum's Layer Conductance by the trapezoid rule.

    Its own rule takes the gradient at the beginning of each piece. Backwards over the same points that is the end of
    each piece, with the opposite sign: the mean of both ways is the trapezoid rule.
    """
    method = LayerConductance(score, layer)

    def one_way(start, end):
        settings = {"n_steps": 20, "method": "riemann_trapezoid"} | kind  # 21 points from 0 to 1, both included
        return method.attribute(end[None], start[None], additional_forward_args=(MASK,), **settings)

    return (one_way(baseline, x) - one_way(x, baseline))[0] / 2


def test_conductance_of_the_weight_left_agrees_with_captum_and_is_complete(model):
    """Of many fine steps in one or in two pieces it is the same."""

    def score(hidden, mask):
        total = 0
        for block, head in zip(model.backbone.blocks, model.heads):
            hidden = block(hidden, mask)
            total = total + head(hidden[:, 0])[1].log()
        return total  # log p_2 = log h_1 + log h_2

    found = layer_conductance(attributions.weight_left(model, 2), *ends(model), steps=20)
    for part, head in zip(found.parts, model.heads):
        assert_close(part, captum_conductance(score, head.scale, *ends(model), attribute_to_layer_input=True))
    x, baseline = ends(model)
    change = (score(x[None], MASK) - score(baseline[None], MASK)).item()
    missed = sum(part.sum().item() for part in found.parts) - change
    assert found.error == pytest.approx(abs(missed / change), rel=1e-6)
    pieces = (((x + baseline) / 2, baseline), (x, (x + baseline) / 2))
    halves = attributions.joined([layer_conductance(attributions.weight_left(model, 2), *ends, 400) for ends in pieces])
    whole = layer_conductance(attributions.weight_left(model, 2), x, baseline, steps=800)
    torch.testing.assert_close(halves.parts, whole.parts, rtol=1e-4, atol=1e-6)
    assert sum(part.sum().item() for part in halves.parts) == pytest.approx(change, rel=1e-4)


# ---- The baseline ---------------------------------------------------------------------------------------------------


def test_the_line_moves_words_alone_and_starts_at_their_baseline(run):
    """That is the mask, where there is one."""
    x, baseline = attributions.line(run, run.dact.backbone, 1)
    words = attributions.words_of(run, 1)
    moved = (x != baseline).any(1).tolist()
    assert moved == [word not in ("[CLS]", "[SEP]") for word in words] and True in moved
    embed, place = run.dact.backbone.embed, 2
    summed = embed.word.weight[0] + embed.position.weight[place] + embed.segment.weight[0]  # [PAD] is token 0
    torch.testing.assert_close(baseline[place], embed.norm(summed).detach())
    assert attributions.baseline_token(run) == (0, "[PAD]")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    saved = run.saved._replace(tokenizer=bert.wordpiece_tokenizer(vocab))
    assert attributions.baseline_token(replace(run, saved=saved)) == (4, "[MASK]")


# ---- The figures ----------------------------------------------------------------------------------------------------


def test_figure3_leaves_a_picture(toy_run, capsys):
    figure3.main([str(toy_run)])
    output = capsys.readouterr().out
    assert f"saved      {toy_run}/figure3.png" in output
    found = re.findall(r"example (\d+): (\S+) .*'(\w+)' with .*; completeness error ([\d.]+) %", output)
    run = baselines.open_run(toy_run)
    assert [system for _, system, *_ in found] == ["DeeBERT", "DACT-BERT:"] * 2 and output.count("[PAD] for every") == 4
    assert max(float(error) for *_, error in found) <= 1.0
    for i, _, answer, _ in found:
        label = run.early_exit(*attributions.inputs_of(run, int(i))).label.item()
        assert run.labels[label] == answer and label == run.dev.labels[int(i)]


def test_deebert_runs_as_many_blocks_as_dact(run):
    """Its answers are those of its ramps at the exits."""
    exits, S, halted = figure3.deebert_at_the_same_depth(run)
    mean, N = halted.exit_block.double().mean().item(), 6
    assert mean <= run.metrics["dact"]["mean_blocks"] + 1e-6 < mean + 1
    for i in (0, 7):
        logits = exits(*attributions.inputs_of(run, i))[0][:, 0].detach()  # (N, C)
        n = next((n for n in range(1, N) if baselines.entropy(logits[n - 1]) < S), N)
        assert halted.exit_block[i] == n and halted.label[i] == logits[n - 1].argmax()
        torch.testing.assert_close(halted.a[i], logits[n - 1].softmax(0), atol=1e-5, rtol=1e-4)


def test_examples_that_both_answer_right_are_chosen(run):
    order = sorted(range(len(run.dev)), key=lambda i: run.dev.groups[i] != "level 3")  # the hardest first
    right = [i for i in order if run.early_exit(*attributions.inputs_of(run, i)).label.item() == run.dev.labels[i]]
    deebert = run.dev.labels.clone()
    deebert[right[0]] = 1 - deebert[right[0]]  # of those, DeeBERT misses the first
    assert attributions.chosen_examples(run, [], 2, deebert) == right[1:3]
    assert attributions.chosen_examples(run, [], 1) == right[:1] and attributions.chosen_examples(run, [4], 1) == [4]
    with pytest.raises(data.InputError, match="0 of 2 example"):
        attributions.chosen_examples(run, [], 2, 1 - run.dev.labels)


def test_lines_of_the_picture_hold_every_token_once_and_do_not_overflow():
    words = [f"word{'x' * (i % 9)}{i}" for i in range(60)]
    row = figure3.Row("", words, attributions.Attribution(torch.randn(60), 0.0, 0.0, 0.0, 1))
    lines = figure3.wrapped(row)
    assert [word for line in lines for _, word, _ in line] == words and len(lines) > 3
    for line in lines:
        text = " ".join(word for _, word, _ in line)
        assert len(text) <= figure3.COLUMNS and all(column == text.index(word) for column, word, _ in line)


def test_figure4_leaves_a_picture_and_says_which_blocks_halted(toy_run, capsys):
    figure4.main([str(toy_run), "--examples", "2"])
    output = capsys.readouterr().out
    assert f"saved      {toy_run}/figure4.png" in output
    n = int(re.search(r"after block (\d) of 6", output)[1])
    rows = re.findall(r"^ +(\d) +([\d.]+) +(-?[\d.]+)   (\d+): ", output, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, n + 1))
    p, baseline, of_input = re.search(r"log p_(\d): (\S+) nats of the baseline, (\S+) of the input", output).groups()
    assert int(p) == n
    assert sum(float(row[2]) for row in rows) == pytest.approx(float(of_input) - float(baseline), rel=0.02, abs=0.01)
    run = baselines.open_run(toy_run)
    with torch.no_grad():
        h = run.dact(*attributions.inputs_of(run, 2))[1][:, 0]
    assert [float(row[1]) for row in rows] == pytest.approx(h[:n].tolist(), abs=6e-4)
    assert float(of_input) == pytest.approx(h[:n].log().sum().item(), abs=1e-3)
