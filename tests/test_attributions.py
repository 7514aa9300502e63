"""paper/attributions.py against hand calculation and captum; figure3.py and figure4.py on a short run."""

import copy
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from captum.attr import LayerConductance, LayerIntegratedGradients
from fakes import google_arrays, write_google

import bert
import dact
import data
import train

sys.path.insert(0, str(Path(train.__file__).parent / "paper"))

import attributions
import baselines
import figure3
import figure4
from attributions import integrated_gradients, layer_conductance

pytestmark = pytest.mark.usefixtures("few_sentences")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random DactBert of two blocks and three classes, in float64, its halting neurons random too."""
    folder = write_google(tmp_path_factory.mktemp("model"), google_arrays())
    torch.manual_seed(5)
    stage1, _ = bert.load_pretrained(str(folder), 3)
    model = dact.DactBert(stage1.bert, 3).double().eval()
    for head in model.heads:
        for layer in (head.answer[-1], head.halt[-1]):
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


def test_a_linear_function_gives_every_token_its_weight_times_its_way():
    x, baseline, w = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 5.0]]),
        torch.tensor([10.0, 1]),
    )
    found = integrated_gradients(lambda hidden, mask: (hidden * w).sum((1, 2)) + 7, x, baseline, steps=2)
    # token 1: 10 (1 - 1) + 1 (2 - 0) = 2; token 2: 10 (3 - 1) + 1 (4 - 5) = 19
    assert found.parts.tolist() == pytest.approx([2, 19])
    assert (found.of_input, found.of_baseline) == (10 + 2 + 30 + 4 + 7, 10 + 0 + 10 + 5 + 7)
    assert found.error < 1e-6 and found.steps == 2


def test_two_tokens_share_their_product_by_how_far_each_went():
    # F = x_1 x_2 from (1, 0) to (3, 4): on the line x_1 = 1 + 2α, x_2 = 4α
    # IG_1 = 2 ∫ 4α dα = 4;  IG_2 = 4 ∫ (1 + 2α) dα = 8;  together 3·4 - 1·0 = 12
    x, baseline = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [0.0]])
    found = integrated_gradients(lambda hidden, mask: hidden[:, 0, 0] * hidden[:, 1, 0], x, baseline, steps=2)
    assert found.parts.tolist() == pytest.approx([4, 8])


def test_the_completeness_error_says_what_is_missed():
    # F = x^4 from 0 to 1: one Gauss-Legendre point is the middle, F' = 4/8 there, so the sum is 1/2 of 1.
    def fourth(hidden, mask):
        return hidden[:, 0, 0] ** 4

    x, baseline = torch.ones(1, 1), torch.zeros(1, 1)
    assert integrated_gradients(fourth, x, baseline, steps=1).error == pytest.approx(0.5)
    assert integrated_gradients(fourth, x, baseline, steps=2).error < 1e-6  # two points integrate a cubic exactly
    assert integrated_gradients(fourth, x, x, steps=2).error == 0  # no way, nothing missed


def test_conductance_of_a_chain_by_hand():
    # y = (u, v) = (2x, x²), F = u + 3 v, from 0 to 1: u brings 2, v brings 3. The trapezoid rule is exact: F is linear
    # in y.
    def score(hidden, mask):
        y = torch.cat([2 * hidden[:, 0], hidden[:, 0] ** 2], dim=1)
        return y @ torch.tensor([1.0, 3.0]), [y]

    found = layer_conductance(score, torch.ones(1, 1), torch.zeros(1, 1), steps=3)
    assert found.parts[0].tolist() == pytest.approx([2, 3]) and found.error < 1e-6


def test_how_many_points_run_at_a_time_changes_nothing(model):
    score, layers = attributions.dact_answer(model, 2, 1), attributions.weight_left(model, 2)
    whole, pieces = (integrated_gradients(score, *ends(model), steps=10, rows=rows).parts for rows in (64, 3))
    torch.testing.assert_close(whole, pieces)
    whole, pieces = (layer_conductance(layers, *ends(model), steps=10, rows=rows).parts for rows in (64, 3))
    torch.testing.assert_close(whole, pieces)


def step(hidden, mask):
    """F of one number: from 0 to 1 within a tenth of a thousandth of the line, at 0.4."""
    return (1e5 * (hidden[:, 0, 0] - 0.4)).sigmoid()


def test_the_line_is_cut_where_the_sum_is_poor():
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


def test_pieces_of_a_line_give_what_the_whole_gives(model):
    """Of many fine steps, whether in one or in two pieces; both methods."""
    for method, score in (
        (integrated_gradients, attributions.dact_answer(model, 2, 1)),
        (layer_conductance, attributions.weight_left(model, 2)),
    ):
        x, baseline = ends(model)
        middle = (x + baseline) / 2
        whole = method(score, x, baseline, steps=400)
        halves = attributions.joined([method(score, middle, baseline, 200), method(score, x, middle, 200)])
        torch.testing.assert_close(halves.parts, whole.parts, rtol=1e-4, atol=1e-6)
        assert (halves.of_input, halves.of_baseline) == (whole.of_input, whole.of_baseline)


def test_log_odds_by_hand_and_where_the_rest_is_too_small_for_one_minus():
    a = torch.tensor([[0.5, 0.3, 0.2], [1.0, 1e-12, 0.0]])
    odds = attributions.log_odds(a, 0)  # log(0.5 / 0.5) = 0; log(1 / 1e-12) = 12 log 10
    assert odds.tolist() == pytest.approx([0, 27.631], abs=1e-3)
    assert attributions.log_odds(a[:1], 1).item() == pytest.approx(-0.8473, abs=1e-4)  # log(0.3 / 0.7)


# ---- Against captum, on functions of the whole model written out once more ------------------------------------------


def captum_tokens(model, forward, steps=20):
    """captum's Integrated Gradients over what the embedding step returns, summed over D: (T,)."""
    method = LayerIntegratedGradients(forward, model.backbone.embed)
    extra = (SEGMENTS, MASK)
    return method.attribute(IDS, EMPTIED, additional_forward_args=extra, n_steps=steps, method="gausslegendre").sum(-1)[
        0
    ]


def assert_close(ours, theirs):
    """To 1e-4 of the largest entry; and that there is something to compare."""
    assert theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_answer_agrees_with_captum(model):
    def forward(*inputs):
        a = dact.accumulate_all(*model(*inputs))[0][-1][:, 1]
        return torch.log(a / (1 - a))

    ours = integrated_gradients(attributions.dact_answer(model, 2, 1), *ends(model), steps=20)
    assert_close(ours.parts, captum_tokens(model, forward))


@pytest.mark.parametrize("n", [1, 2])
def test_halting_values_agree_with_captum(model, n):
    ours = integrated_gradients(attributions.halting_value(model, n), *ends(model), steps=20)
    assert_close(ours.parts, captum_tokens(model, lambda *inputs: model(*inputs)[1][n - 1].logit()))


def test_a_ramp_agrees_with_captum(model):
    # An `Exits` answers in float32, as its ramps are: so here must all be.
    exits = baselines.Exits(copy.deepcopy(model.backbone), bert.Classifier(model.backbone.config, 3)).float().eval()

    def forward(*inputs):
        y = exits(*inputs)[0].softmax(-1)[:, 2]
        return torch.log(y / (1 - y))

    ours = integrated_gradients(attributions.ramp_answer(exits, 1, 2), *ends(exits), steps=20)
    assert_close(ours.parts, captum_tokens(exits, forward))


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


@pytest.mark.parametrize("n", [1, 2])
def test_conductance_of_a_blocks_output_agrees_with_captum(model, n):
    def ours(hidden, mask, layer=None):
        for i, block in enumerate(model.backbone.blocks, start=1):
            hidden = block(hidden, mask)
            layer = hidden if i == n else layer
        return model.heads[1].logits(hidden[:, 0])[1], [layer]

    found = layer_conductance(ours, *ends(model), steps=20)
    score = attributions.halting_value(model, 2)
    theirs = captum_conductance(score, model.backbone.blocks[n - 1], *ends(model))
    assert_close(found.parts[0], theirs)


def test_conductance_of_the_weight_left_agrees_with_captum_and_is_complete(model):
    def score(hidden, mask):
        total = 0
        for block, head in zip(model.backbone.blocks, model.heads):
            hidden = block(hidden, mask)
            total = total + torch.nn.functional.logsigmoid(head.logits(hidden[:, 0])[1])
        return total  # log p_2 = log h_1 + log h_2

    found = layer_conductance(attributions.weight_left(model, 2), *ends(model), steps=20)
    for part, head in zip(found.parts, model.heads):
        assert_close(part, captum_conductance(score, head.scale, *ends(model), attribute_to_layer_input=True))
    sums = [part.sum().item() for part in found.parts]
    x, baseline = (score(end[None], MASK).item() for end in ends(model))
    many = layer_conductance(attributions.weight_left(model, 2), *ends(model), steps=2000)
    assert sum(part.sum().item() for part in many.parts) == pytest.approx(x - baseline, rel=1e-4)
    assert found.error == pytest.approx(abs(sum(sums) - (x - baseline)) / abs(x - baseline), rel=1e-6)


def test_attributions_are_complete(model):
    for score in (attributions.dact_answer(model, 2, 0), attributions.halting_value(model, 2)):
        found = integrated_gradients(score, *ends(model), steps=1000)  # the heads have kinks
        x, baseline = (score(end[None], MASK).item() for end in ends(model))
        assert abs(x - baseline) > 0.01
        assert found.parts.sum().item() == pytest.approx(x - baseline, rel=1e-3) and found.error < 1e-3


# ---- The baseline ---------------------------------------------------------------------------------------------------


def test_the_line_moves_words_alone_and_starts_at_their_baseline(toy_run):
    run = baselines.open_run(toy_run)
    x, baseline = attributions.line(run, run.dact.backbone, 1)
    words = attributions.words_of(run, 1)
    moved = (x != baseline).any(1).tolist()
    assert moved == [word not in ("[CLS]", "[SEP]") for word in words] and True in moved
    embed, place = run.dact.backbone.embed, 2
    summed = embed.word.weight[0] + embed.position.weight[place] + embed.segment.weight[0]  # [PAD] is token 0
    torch.testing.assert_close(baseline[place], embed.norm(summed).detach())


def test_the_baseline_is_the_mask_where_there_is_one(toy_run):
    run = baselines.open_run(toy_run)
    assert attributions.baseline_token(run) == (0, "[PAD]")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    assert attributions.baseline_token(run._replace(tokenizer=bert.wordpiece_tokenizer(vocab))) == (4, "[MASK]")


# ---- The figures ----------------------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n"


def test_figure3_leaves_a_page_and_a_picture(toy_run, capsys):
    figure3.main([str(toy_run)])
    output = capsys.readouterr().out
    text = (toy_run / "figure3.html").read_text()
    assert (toy_run / "figure3.png").read_bytes().startswith(PNG)
    assert str(toy_run / "figure3.html") in output and str(toy_run / "figure3.png") in output
    assert not re.search(r"<script|src=|href=|url\(|@import|http", text)  # nothing from outside
    chosen = [int(i) for i in re.findall(r"Dev example (\d+)", text)]
    run = baselines.open_run(toy_run)
    predictions = train.predict(run.dact.early_exit, run.dev, run.args)
    right = (predictions.label == run.dev.labels).nonzero().flatten().tolist()
    assert len(chosen) == 2 and set(chosen) <= set(right) and chosen == sorted(chosen)
    for i in chosen:
        shown = " ".join(attributions.words_of(run, i))
        assert re.sub("<[^>]+>", "", text).count(shown + "\n") == 2  # once for each system
    errors = [float(e) for e in re.findall(r"completeness error ([\d.]+) %", text)]
    assert len(errors) == 4 and max(errors) <= 1.0
    assert text.count("[PAD] for every word; ") == 4


def test_figure3_takes_the_first_that_both_answer_right(toy_run):
    run = baselines.open_run(toy_run)
    order = sorted(range(len(run.dev)), key=lambda i: run.dev.groups[i] != "level 3")  # the hardest first
    right = [i for i in order if attributions.halted(run, i).label.item() == run.dev.labels[i]]
    deebert = run.dev.labels.clone()
    deebert[right[0]] = 1 - deebert[right[0]]  # of those, DeeBERT misses the first
    assert attributions.first_right(run, 2, deebert) == right[1:3] and attributions.first_right(run, 1) == right[:1]
    with pytest.raises(data.InputError, match="0 of 2 example"):
        attributions.first_right(run, 2, 1 - run.dev.labels)


def test_signs_and_sizes_are_seen_without_colour():
    found = attributions.Attribution(torch.tensor([2.0, -1.0, 0.1]), 0.0, 0.0, 0.0, 1)
    spans = [figure3.span(*t) for t in zip("abc", found.parts.tolist(), attributions.shares(found.parts).tolist())]
    assert [re.search('class="([a-z]*)"', s)[1] for s in spans] == ["for", "against", ""]
    assert len({re.search("background:(#[0-9a-f]+)", s)[1] for s in spans}) == 3
    assert 'title="-1.0000 nats"' in spans[1]
    assert "&lt;b&gt;&amp;" in figure3.span("<b>&", 0.1, 0.1) and "<b>" not in figure3.span("<b>&", 0.1, 0.1)


def test_lines_of_the_picture_hold_every_token_once_and_do_not_overflow():
    words = [f"word{'x' * (i % 9)}{i}" for i in range(60)]
    row = figure3.Row("", words, attributions.Attribution(torch.randn(60), 0.0, 0.0, 0.0, 1))
    lines = figure3.wrapped(row)
    assert [word for line in lines for _, word, _ in line] == words and len(lines) > 3
    for line in lines:
        assert line[0][0] == 0 and line[-1][0] + len(line[-1][1]) <= figure3.COLUMNS
        for (left, word, _), (right, _, _) in pairwise(line):
            assert right == left + len(word) + 1


def test_figure4_leaves_a_picture_and_says_which_blocks_halted(toy_run, capsys):
    figure4.main([str(toy_run), "--examples", "2"])
    output = capsys.readouterr().out
    assert (toy_run / "figure4.png").read_bytes().startswith(PNG) and str(toy_run / "figure4.png") in output
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


@pytest.mark.parametrize(
    "script, argv, message",
    [
        (figure3, ["--examples", "50"], "no dev example 50; give numbers from 0 to 49"),
        (figure3, ["--examples", "-1"], "no dev example -1"),
        (figure3, ["--examples", "1", "--steps", "1"], "int from 2 to 1024"),
        (figure4, ["--examples", "1", "2"], "figure 4 is of one example, found 2"),
        (figure4, ["--examples", "one"], "invalid int value: 'one'"),
        (figure4, ["nowhere"], "no such file"),
    ],
)
def test_bad_input_is_one_line(toy_run, capsys, monkeypatch, script, argv, message):
    folder = [] if argv == ["nowhere"] else [str(toy_run)]
    monkeypatch.setattr(sys, "argv", [script.__name__, *folder, *argv])
    assert baselines.command(script.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
