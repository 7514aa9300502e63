"""paper/baselines.py, table1.py, generality.py, submit.py: each system is what its paper says, and the scripts run."""

import argparse
import copy
import io
import json
import math
import random
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import baselines
import choices
import numpy as np
import pytest
import submit
import table1
import torch
from fakes import scattered

import dact
import data
import train

pytestmark = pytest.mark.usefixtures("few_sentences")


@pytest.fixture
def run(toy_run, tmp_path):
    return baselines.open_run(shutil.copytree(toy_run, tmp_path / "run"))


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


fastbert = partial(baselines.frozen, loss=baselines.fastbert_loss, name="FastBERT")
pabee, berxit, palbert = (partial(baselines.joint, name=name) for name in ("PABEE", "BERxiT", "PALBERT"))


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def scattered_exits(run):
    """An `Exits` of random weights, and its logits (N, n, C) of the dev set."""
    exits = baselines.Exits(copy.deepcopy(run.stage1.bert), baselines.Ramps(run.N, run.stage1.classifier))
    return scattered(exits), *baselines.answers(exits, run.dev, run.args)


# ---- Rules and losses, by hand --------------------------------------------------------------------------------------

LOGITS = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.999, 0.001]], dtype=torch.float64))


def test_entropy_by_hand():
    # - 0.9 ln 0.9 - 0.1 ln 0.1 = 0.0948245 + 0.2302585
    expected = torch.tensor([math.log(2), 0.3250830, 0.0079073], dtype=torch.float64)
    torch.testing.assert_close(baselines.entropy(LOGITS), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(baselines.entropy(LOGITS + 7), expected, atol=1e-6, rtol=0)  # logits need no norm
    confident = torch.tensor([[1000.0, 0.0], [-1000.0, 1000.0]])
    assert baselines.entropy(confident).tolist() == [0, 0]


def test_patience_by_hand():
    """Answers A B B A A A A: the count of repetitions is 0 0 1 0 1 2 3."""
    logits = torch.tensor([[[1.0, 0.0] if answer == "A" else [0.0, 1.0]] for answer in "ABBAAAA"])  # (N, 1, C)
    confirmed = baselines.confirmations(logits)
    assert confirmed.flatten().tolist() == [0, 0, 1, 0, 1, 2, 3]
    assert [baselines.leave(logits, confirmed >= t)[1].item() for t in (0, 1, 2, 3)] == [1, 3, 6, 7]


def test_losses_by_hand():
    probabilities = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]], dtype=torch.float64)  # (N, B, C)
    logits, label = probabilities.log(), torch.tensor([1])
    ln = math.log
    assert baselines.deebert_loss(logits, label).item() == pytest.approx(-ln(0.5) - ln(0.1))  # without the last
    # KL(last || ramp): 0.8 ln(0.8 / 0.5) + 0.2 ln(0.2 / 0.5) + the same of 0.9 and 0.1
    expected = 0.8 * ln(0.8 / 0.5) + 0.2 * ln(0.2 / 0.5) + 0.8 * ln(0.8 / 0.9) + 0.2 * ln(0.2 / 0.1)
    assert baselines.fastbert_loss(logits, label).item() == pytest.approx(expected)
    assert baselines.fastbert_loss(logits[[2, 2, 2]], label).item() == pytest.approx(0, abs=1e-12)
    expected = (1 * -ln(0.5) + 2 * -ln(0.1) + 3 * -ln(0.2)) / 6
    assert baselines.pabee_loss(logits, label).item() == pytest.approx(expected)
    # BERxiT: class 1 is wrong by ramps 1 (a draw goes to class 0) and 2, so their targets are 1; the last block has none
    u = torch.tensor([[0.0], [ln(0.25 / 0.75)], [9.0]], dtype=torch.float64)
    for aim, last, ramps in ((1, -ln(0.2), -ln(0.5) - ln(0.1)), (0, -ln(0.8), -ln(0.5) - ln(0.9))):
        unit = (0.5 - aim) ** 2 + (0.25 - aim) ** 2
        found = [baselines.berxit_loss(logits, u, label if aim else 1 - label).item() for _ in range(200)]
        both = pytest.approx(last), pytest.approx(last + ramps + unit)
        assert all(x in both for x in found) and 60 < sum(x == both[0] for x in found) < 140


def test_palbert_by_hand():
    """λ = 1/2, 1/4, anything: stops at 1, 2, 3 with chances 1/2, 1/8, 3/8; a prior of 0.1: 0.1, 0.09, 0.81."""
    ln, z = math.log, torch.tensor([[0.0], [math.log(1 / 3)], [5.0]], dtype=torch.float64)
    p, prior = (0.5, 0.125, 0.375), (0.1, 0.09, 0.81)
    assert baselines.exit_chances(z).flatten().tolist() == pytest.approx(p)
    logits = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]], dtype=torch.float64).log()
    expected = -0.5 * ln(0.5) - 0.125 * ln(0.1) - 0.375 * ln(0.2) + 0.5 * sum(w * ln(w / q) for w, q in zip(prior, p))
    assert baselines.palbert_loss(logits, z, torch.tensor([1])).item() == pytest.approx(expected)
    three = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])  # answers 0, 1, 0
    left = [baselines.leave(three, baselines.exit_chances(z).cumsum(0) >= q) for q in (0.4, 0.5, 0.6, 0.7)]
    assert [(label.item(), block.item()) for label, block in left] == [(0, 1), (0, 1), (1, 2), (0, 3)]


def test_dact_leaves_by_rule_where_early_exit_leaves(run):
    """Read off the heads of all blocks, as against the batches that shrink; by both rules."""
    model = scattered(run.dact)
    for rule in dact.RULES.values():
        early = train.predict({"early": partial(model.early_exit, rule=rule)}, run.dev, run.args)[0]["early"]
        y, h = baselines.answers(model, run.dev, run.args)
        labels, exit_block = baselines.leave_by_rule(y, h, rule)
        assert torch.equal(labels, early[0]) and torch.equal(exit_block, early[2]) and len(exit_block.unique()) > 2


@pytest.mark.parametrize("system", ["DeeBERT", "PABEE"])
def test_exits_of_all_are_the_exits_of_each_alone(run, system):
    """Worked out block by block for one example at a time, of the model as a whole."""
    exits, logits = scattered_exits(run)
    confirmed = baselines.confirmations(logits)
    halt = baselines.entropy(logits) < 0.4 if system == "DeeBERT" else confirmed >= 2
    labels, exit_block = baselines.leave(logits, halt)
    assert len(exit_block.unique()) > 2
    for i in range(20):
        inputs, _ = run.dev.batch([i])
        with torch.no_grad():
            alone = exits(*inputs)[0][:, 0]  # (N, C)
        for n in range(1, 7):
            H = -(alone[n - 1].softmax(0) * alone[n - 1].log_softmax(0)).sum()
            equal = n > 2 and len(set(alone[n - 3 : n].argmax(1).tolist())) == 1
            if (H < 0.4 if system == "DeeBERT" else equal) or n == 6:
                break
        assert (n, alone[n - 1].argmax()) == (exit_block[i], labels[i])


def test_bisection_finds_a_depth():
    def exits_at(x):  # 100 examples; example i leaves block 3 where x > i
        return None, torch.where(torch.arange(100) < x, 1, 3)

    assert baselines.bisect_to_depth(exits_at, 2.0, 100.0) == pytest.approx(49, abs=1e-5)  # 1 for 50, 3 for 50
    assert baselines.bisect_to_depth(exits_at, 0.5, 100.0) == pytest.approx(100)  # more than there is to save


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [baselines.deebert, fastbert, pabee, berxit, palbert])
def test_what_shall_learn_learns_and_what_is_frozen_stays(run, system, monkeypatch):
    """Learned anew it is the same, and from its file, when nothing is left to learn."""
    start, joint = weights(run.stage1), system not in (baselines.deebert, fastbert)
    exits = system(run)
    torch.manual_seed(run.args.seed)
    *fresh, last = baselines.Ramps(run.N, run.stage1.classifier).ramps
    *ramps, classifier = exits.heads.ramps
    assert not any(torch.equal(ramp[1].weight, before[1].weight) for ramp, before in zip(ramps, fresh))
    assert same(weights(last), weights(classifier)) != joint
    moved = {not torch.equal(tensor, start[f"bert.{name}"]) for name, tensor in weights(exits.backbone).items()}
    assert moved == {joint} and (exits.backbone is run.stage1.bert) != joint and same(start, weights(run.stage1))
    shutil.rmtree(run.trained)
    assert same(weights(exits), weights(system(run)))
    monkeypatch.setattr(train, "fit", None)
    assert same(weights(exits), weights(system(run)))


def test_heads_over_cached_vectors_are_the_model(run):
    exits, logits = scattered_exits(run)
    vectors, indices = baselines.cls_vectors(exits.backbone, run.dev, run.args), np.array([5, 3, 20])
    inputs, labels = run.dev.batch(indices)
    cached, same_labels = vectors.batch(indices)
    with torch.no_grad():
        torch.testing.assert_close(exits.heads(*cached)[0], exits(*inputs)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[:, indices], exits(*inputs)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, same_labels)
    some = baselines.cls_vectors(exits.backbone, run.dev, run.args, most=10)
    rows = [(vectors.values == values[:, None]).all(0).all(1).nonzero().item() for values in some.values.unbind(1)]
    assert len(some) == 10 and len(set(rows)) == 10
    assert torch.equal(some.labels, run.dev.labels[rows]) and np.array_equal(some.lengths, run.dev.lengths[rows])


def test_every_system_reads_on_one_scale_and_trains_without_dropout(run, monkeypatch):
    """As DACT does: the frozen ramps on the scale of the training set, the joint ones' as they train.

    Vectors are computed once, however many systems learn on them, and only if asked for.
    """
    made, vectors = [], baselines.cls_vectors
    monkeypatch.setattr(baselines, "cls_vectors", lambda *args: made.append(1) or vectors(*args))
    run = baselines.open_run(run.folder)
    for module in run.stage1.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # which the toy does not have
    joint = [system(run) for system in (pabee, berxit, palbert)]
    batches = -(-len(run.train_set) // 16)  # an epoch each
    assert all(head.scale.steps == batches for head in run.dact.heads)
    assert all(ramp[0].steps == batches for exits in joint for ramp in exits.heads.ramps[:-1])
    for model in (*(exits.backbone for exits in joint), baselines.longer(run).bert):
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert not made
    for system in (baselines.deebert, fastbert):
        for exits in (system(run), system(run)):  # trained, and from its file
            for cls, ramp in zip(run.vectors.values, exits.heads.ramps[:-1]):
                moved = ramp[0](cls)  # statistics of the last 20 batches, so that they differ a little
                assert moved.mean(0).abs().max() < 0.3 and (moved.std(0) - 1).abs().max() < 0.3
    assert len(made) == 1
    for system in (baselines.deebert, fastbert):  # and on a backbone that has trained as long as DACT's
        exits = system(run.twice)
        assert same(weights(exits.backbone), weights(baselines.longer(run).bert))
        assert same(weights(exits.classifier), weights(baselines.longer(run).classifier))
    assert len(made) == 2


def test_the_last_classifier_learns_as_the_backbone_does(run):
    for system in (pabee, palbert):
        exits = system(run)
        groups = train.parameter_groups(exits, argparse.Namespace(lr=1.0, head_lr=2.0))
        slow = [p for group in groups if group["peak_lr"] == 1.0 for p in group["params"]]
        expected = [*exits.backbone.parameters(), *exits.heads.ramps[-1].parameters()]
        assert {*map(id, slow)} == {*map(id, expected)}


def test_palbert_reads_this_ramp_and_the_one_before(run):
    """Three times linear and tanh, then linear, the same for all blocks; before block 1 stands 0."""
    torch.manual_seed(0)
    heads = baselines.PalbertHeads(run.N, run.stage1.classifier).eval()
    vectors = baselines.cls_vectors(run.stage1.bert, run.dev, run.args)
    logits, z = baselines.over(heads, vectors, "cpu")
    read = [ramp[2](ramp[1](ramp[0](cls))) for ramp, cls in zip(heads.ramps[:-1], vectors.values)]
    assert z.sigmoid()[:-1].mean() == pytest.approx(0.1, abs=0.03) and (z[-1] == 0).all()  # it starts near the prior
    for n in (1, 2, 5):
        x = torch.cat([read[n - 1], read[n - 2] if n > 1 else torch.zeros_like(read[0])], 1)

        for linear in (heads.stop[0], heads.stop[2], heads.stop[4]):
            assert linear.weight.shape == (2 * 64, 2 * 64)
            x = torch.tanh(x @ linear.weight.T + linear.bias)
        expected = x @ heads.stop[6].weight[0] + heads.stop[6].bias
        torch.testing.assert_close(z[n - 1], expected, atol=1e-4, rtol=1e-4)
    assert len(heads.stop) == 7 and logits.shape == (6, len(run.dev), 2)


def test_berxits_unit_is_one_for_all_ramps_and_learns_with_them(run):
    learned = berxit(run)
    torch.manual_seed(run.args.seed)
    assert not same(weights(baselines.BerxitHeads(run.N, run.stage1.classifier).unit), weights(learned.heads.unit))
    logits, u = baselines.answers(learned, run.dev, run.args)
    cls = baselines.cls_vectors(learned.backbone, run.dev, run.args).values
    for n in (1, 3):
        read = learned.heads.ramps[n - 1][:-1](cls[n - 1])
        torch.testing.assert_close(u[n - 1], learned.heads.unit(read).squeeze(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[n - 1], learned.heads.ramps[n - 1][-1](read), atol=1e-4, rtol=1e-4)
    assert u.shape == (6, len(run.dev)) and (u[-1] == 0).all() and (u[:-1] != 0).any()


def test_all_ramps_start_alike_and_learn_apart(run):
    first, *others = baselines.Ramps(run.N, run.stage1.classifier).ramps[:-1]
    assert all(same(weights(first), weights(ramp)) for ramp in others)
    first, *others = baselines.deebert(run).heads.ramps[:-1]
    assert not any(same(weights(first), weights(ramp)) for ramp in others)


def test_the_longer_base_goes_on_from_stage_1(run):
    """At a learning rate of 0 it is stage 1 still; at the run's own it is not."""
    before = weights(run.stage1)
    assert not any(torch.equal(before[name], tensor) for name, tensor in weights(baselines.longer(run)).items())
    (run.trained / "longer.pt").unlink()
    run.args.lr = 0.0
    assert same(before, weights(baselines.longer(run))) and same(before, weights(run.stage1))


def test_precision(run, monkeypatch):
    """What trains a backbone beside a run does so in the run's own precision, but heads are in full, always."""
    run.args.precision, used = "bfloat16", {}

    def fit(name, model, loss, dataset, args, log):
        used[name.split("-")[0]] = args.precision
        with train.autocast(args):
            output = model(*dataset.batch(np.arange(4))[0])
            assert output.dtype == torch.bfloat16 if name == "longer" else output[0].dtype == torch.float32

    monkeypatch.setattr(train, "fit", fit)
    for system in (baselines.deebert, fastbert, pabee, palbert, baselines.longer):
        system(run)
    assert {name for name, precision in used.items() if precision == "float32"} == {"DeeBERT", "FastBERT"}


def test_what_is_trained_belongs_to_one_run(run):
    """A run that is made anew in the same folder meets nothing of the old one's; what fits no model is refused."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "show", lambda *_: 1 / 0)  # interrupted, it leaves nothing that could be taken for it
        baselines.deebert(run)
    assert not [*run.trained.glob("*.pt*")]
    first = weights(baselines.deebert(run).heads)
    assert [file.name for file in run.trained.glob("*.pt")] == ["deebert-2.pt"]
    metrics = json.loads((run.folder / "metrics.json").read_text()) | {"seed": 1}
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    again = baselines.open_run(run.folder)
    assert again.trained != run.trained and not same(first, weights(baselines.deebert(again).heads))
    torch.save({}, again.trained / "deebert-2.pt")
    with pytest.raises(data.InputError, match="delete it to train it again"):
        baselines.deebert(again)


# ---- Section 3.1, and the scripts -----------------------------------------------------------------------------------


def test_entropy_heads_are_a_logistic_regression_on_the_entropy(run):
    tied, untied = (baselines.entropy_heads(6, tied, 0.25, weight=8.0) for tied in (True, False))
    for heads, parameters in ((tied, 2), (untied, 12)):
        assert [head.threshold() for head in heads] == pytest.approx([0.25] * 6)
        assert sum(p.numel() for p in heads.parameters()) == parameters
    y_n, h_n = tied[1](torch.randn(5, 2))
    H = -(y_n * y_n.log()).sum(1)
    torch.testing.assert_close(h_n, torch.sigmoid(8 * (H - 0.25)), atol=1e-5, rtol=1e-5)
    exits, logits = scattered_exits(run)
    before = weights(exits)
    learned = baselines.learned_entropy_heads(run, exits, False, 0.25)
    y, _ = learned(logits)
    torch.testing.assert_close(y, logits.softmax(-1), atol=1e-5, rtol=1e-4)
    assert same(before, weights(exits))
    assert [head.threshold() for head in learned] != pytest.approx([0.25] * 6, abs=1e-4)


@pytest.mark.parametrize("S", [0.3, 0.4, 0.5])
def test_deebert_is_a_case_of_dact(run, S):
    """Section 3.1: with a steep confidence function DACT leaves where DeeBERT leaves, with the same answer."""
    _, logits = scattered_exits(run)
    labels, exit_block = baselines.leave(logits, baselines.entropy(logits) < S)
    ours, our_exits = baselines.leave_by_rule(*baselines.entropy_heads(6, True, S, weight=1e4)(logits))
    assert len(exit_block.unique()) > 2
    assert torch.equal(our_exits, exit_block) and torch.equal(ours, labels)


def test_dact_at_another_price(run, monkeypatch):
    """Halting alone is trained anew. A block at 5 nats is never worth its price, so all leave after block 1; where going
    on earns 5 nats a block, nobody leaves early. From its file too.
    """
    before, exits = weights(run.dact), []
    vectors = baselines.cls_vectors(run.dact.backbone, run.dev, run.args)
    run.args.epochs, run.args.head_lr = 4, 0.1  # far enough for both ends
    models = baselines.dact_over_tau(run, (-5.0, 5.0))
    monkeypatch.setattr(baselines, "cls_vectors", lambda *_: pytest.fail("nothing is left to learn"))
    for tau, heads in models.items():
        assert same(weights(heads), weights(baselines.dact_over_tau(run, (tau,))[tau]))
        learned = {name for name, tensor in weights(heads).items() if not torch.equal(tensor, before[f"heads.{name}"])}
        assert learned == {f"{n}.halt.{part}" for n in range(6) for part in ("weight", "bias")}
        y_and_h = baselines.over(heads, vectors, "cpu")
        exits.append(baselines.leave_by_rule(*y_and_h)[1].double().mean().item())
    assert exits == [6, 1] and same(before, weights(run.dact))
    assert all(parameter.requires_grad for parameter in run.dact.parameters())


def test_section_3_1_learns_when_to_stop():
    """Half of the examples leave block 1 unsure, with H = 0.663 nats. If the blocks after it are wrong, its threshold
    rises above that, so that these stop as well; if they are right, it does not.
    """
    torch.manual_seed(0)
    sure = torch.rand(256, 1) < 0.5
    first = torch.where(sure, torch.tensor([4.0, 0.0]), torch.tensor([0.5, 0.0]))
    labels, learned = torch.zeros(256, dtype=torch.long), []
    for later in ([-4.0, 0.0], [4.0, 0.0]):
        logits = torch.stack([first, *[torch.tensor([later]).expand(256, 2)] * 2])  # (N, B, C)
        heads = baselines.entropy_heads(3, False, 0.5)
        optimizer = torch.optim.Adam(heads.parameters(), 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            train.stage2_loss(heads, (logits,), labels, 5e-3)[0].backward()
            optimizer.step()
        learned.append(heads[0].threshold())
    assert learned[0] > 0.663 and learned[1] < 0.6


def test_submit_writes_the_index_of_each_row(run, tmp_path):
    """Also of a test file that was shuffled and lost a row; one with a broken row is refused."""
    texts, file = data.toy_examples(40, 5).texts, tmp_path / "test.tsv"
    rows = [f"{i}\t{text}\tbut the tea was kind" for i, text in enumerate(texts)]
    (tmp_path / "train.tsv").touch()  # all that is there is not downloaded

    def submitted(rows):
        file.write_text("\n".join(["index\tsentence1\tsentence2", *rows]))
        submit.submit(run.saved, run.args, submit.load_test("rte", tmp_path), tmp_path / "answers")
        header, *lines = (tmp_path / "answers/RTE.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        return dict(line.split("\t") for line in lines)

    scattered(run.dact)
    whole, dropped = submitted(rows), rows.pop(7)
    alone = [
        run.early_exit(*run.saved._replace(task="rte").encode([(text, "but the tea was kind")])).label.item()
        for text in texts
    ]
    assert whole == {str(i): run.labels[label] for i, label in enumerate(alone)} and len(set(alone)) == 2
    random.Random(1).shuffle(rows)
    again = submitted(rows)
    assert list(again) == [row.split("\t")[0] for row in rows] and again.items() < whole.items()
    with pytest.raises(data.InputError, match="of 41 rows"):
        submitted([*rows, dropped, "41\tno second sentence"])


# ---- Table 1, and what choices are worth ----------------------------------------------------------------------------


def test_what_choices_are_worth(run, capsys, monkeypatch):
    """The paper as it is written: another price, no Scale. Afterwards all is as it was."""
    rows, functions = ("as shipped", "the paper as it is written"), (dact.Scale.forward, train.fit)
    monkeypatch.setattr(choices, "CHANGES", {row: choices.CHANGES[row] for row in rows})
    for _ in range(2):
        choices.main([str(run.folder)])
        assert (dact.Scale.forward, train.fit) == functions
        monkeypatch.setattr(train, "run", None)  # the second time nothing is left to make
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [line for line in lines if line.startswith(("| as shipped", "| the paper"))][:2]
    early = run.metrics["dact"]
    assert lines[-2].startswith(f"| as shipped | {early['accuracy']:.1f} | {early['saved']:.1f} | ")
    folder = run.trained / "the-paper-as-it-is-written"
    assert json.loads((folder / "metrics.json").read_text())["tau"] == 0.005
    assert {json.loads(line)["stage"] for line in (folder / "log.jsonl").read_text().splitlines()} == {"stage 2"}
    assert all(head.scale.steps == 0 for head in train.load_run(folder / "dact.pt").model.heads)


def test_table_1_from_nothing(tmp_path, capsys, monkeypatch):
    """One command trains all, a second one nothing. The fifth that chooses is of the training set; nobody learns on it."""
    argv = ["--epochs", "0.5", "--out", str(tmp_path)]
    for name in ("FastBERT", "PABEE", "BERxiT"):
        monkeypatch.delitem(table1.SYSTEMS, name)
    tables, measured = [], table1.measured
    monkeypatch.setattr(table1, "measured", lambda *args: tables.append(measured(*args)) or tables[-1])
    whole, _ = data.load_task("toy")
    assert train.command(table1.main, argv) == 0, capsys.readouterr().err
    rest, fifth = table1.split_off_a_fifth(train.parse_arguments([]))
    assert len(fifth.texts) == len(whole.texts) // 5 and sorted(rest.texts + fifth.texts) == sorted(whole.texts)
    assert set(fifth.groups) == {"level 1", "level 2", "level 3"} and len(fifth.groups) == len(fifth.labels)
    out, text = capsys.readouterr().out, (tmp_path / "table1.md").read_text()
    assert f"{len(rest.texts)} training and {len(fifth.texts)} dev" in out and "system 3 of 3" in out
    run = baselines.open_run(tmp_path / "seed-0")
    monkeypatch.setattr(train, "fit", None)
    assert train.command(table1.main, argv) == 0 and (tmp_path / "table1.md").read_text() == text
    for flags, word in ((["--tau", "0.1"], "its run has tau 0.05, not 0.1"), (["--stage1", "x"], "leave --stage1")):
        assert train.command(table1.main, [*argv, *flags]) == 2
        assert word in capsys.readouterr().err
    assert (tmp_path / "table1.png").stat().st_size
    assert f"| base | {run.metrics['full']['accuracy']:.1f} | 0.0 |" in text
    found = tables[0]
    for row, name in (("DACT, rule (4)", "dact"), ("DACT, exact rule", "exact_rule")):
        assert found["rows"][row] == [run.metrics[name]["accuracy"], run.metrics[name]["saved"]]
    assert found["rows"]["DeeBERT, S = 0.75"][1] == pytest.approx(100 * 5 / 6)
    _, z = baselines.answers(palbert(run), run.dev, run.args)
    blocks = (baselines.exit_chances(z).cumsum(0) < 0.5).sum(0) + 1
    assert found["rows"]["PALBERT, q = 0.50"][1] == pytest.approx(train.blocks_used(blocks, 6)["saved"])
    one_block = found["curves"]["DACT, one block for all"]
    assert [point[:3:2] for point in one_block] == [[pytest.approx(100 * k / 6), pytest.approx(0)] for k in range(6)]
    for points in found["curves"].values():
        assert points == sorted(points) and all(0 <= x <= 100 for point in points for x in point[:2])
        for _, metric, _, answers in points:
            assert data.accuracy(torch.tensor(answers), run.dev.labels) == pytest.approx(metric)
    chosen = ["--out", str(tmp_path), "--epochs", "0.5", "--chosen", str(tmp_path / "chosen.json")]
    shutil.rmtree(tmp_path / "held-out")  # settings of another table need none
    assert train.command(table1.main, chosen) == 0 and (tmp_path / "table1.md").read_text() == text


@pytest.mark.parametrize("seed", [0, 1])
def test_an_interrupted_run_of_table_1_goes_on_after_stage_1(run, seed, monkeypatch):
    """To the same weights, and only what is not finished is made. The first run's settings are not known: from the start."""
    args, stages, fit = train.parse_arguments(["--epochs", "1", "--lr", "1e-3", "--batch", "16"]), [], train.fit
    opened = partial(table1.opened, args, out=run.folder.parent / "another", seed=seed)
    first = weights(opened().dact)
    monkeypatch.setattr(train, "fit", lambda stage, *rest: stages.append(stage) or fit(stage, *rest))
    for file in ("dact.pt", "metrics.json"):
        (run.folder.parent / "another" / file).unlink()
    assert same(first, weights(opened().dact))
    assert stages == ["stage 1", "stage 2"][seed:] and opened()
    assert len(stages) == 2 - seed


@pytest.mark.parametrize("name", [name for name in table1.SYSTEMS if name != table1.DACT])
def test_a_knob_goes_from_all_blocks_to_one(run, name, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: None)
    outcome_of, settings = table1.SYSTEMS[name]
    outcome = outcome_of(run, settings[0])
    exits = [outcome.leave(outcome.knob[end])[1].unique().tolist() for end in (0, -1)]
    assert exits == [[6], [1]] and outcome.knob == sorted(outcome.knob)


def test_dacts_heads_leave_by_the_entropy_of_y(run, monkeypatch):
    """Not of a_n, and not of y as if it were logits."""
    monkeypatch.setattr(train, "fit", lambda *_: None)
    y, _ = baselines.answers(run.dact, run.dev, run.args)
    torch.testing.assert_close(table1.dact_over_tau(run, 1).logits.softmax(-1), y)


def test_a_curve_by_hand(run):
    """Answers are right from block 4 on: before it half of them. Of a range each depth is met; of steps only they are."""
    dev = run.dev.labels
    answers = torch.stack([torch.where(torch.arange(len(dev)) % 2 == 0, dev, 1 - dev)] * 3 + [dev] * 3)

    def leave(x):
        exit_block = torch.full_like(dev, 6 - int(x))
        return answers[exit_block - 1, torch.arange(len(dev))], exit_block

    half = 100 * (torch.arange(len(dev)) % 2 == 0).double().mean().item()
    logits = torch.nn.functional.one_hot(answers, 2).float()
    points = table1.curve(run, table1.Outcome(logits, leave, [0, 2, 3]))
    assert [point[1:3] for point in points] == [[100, pytest.approx(0)]] * 2 + [[pytest.approx(half), pytest.approx(0)]]
    assert points[1][3] == dev.tolist() and points[2][3] == answers[0].tolist()  # all leave together: nothing is won
    # Who is right at block 1 leaves there, the others after block 6; the answer is wrong all the same. By chance right:
    # all who are right at block 1, and of the others those who go on.
    exit_block = torch.where(answers[0] == dev, 1, 6)
    ((_, metric, won, _),) = table1.curve(run, table1.Outcome(logits, lambda _: (1 - dev, exit_block), [0]))
    assert metric == 0 and won == pytest.approx(100 - half - (100 - half) ** 2 / 100, abs=1)
    whole = table1.curve(run, table1.Outcome(logits, leave, [0.0, 5.0]))
    assert len(whole) > 30 and whole[0][0] == 0 and whole[-1][0] == pytest.approx(500 / 6)


def test_reading_off_a_curve():
    """Linear between points, the first one before them; nothing in a gap of more than 17 % and after the last one."""
    points = [[10, 90, 1], [20, 80, 2], [50, 40, 3], [60, 30, 4]]
    found = [table1.at(points, saved) for saved in (0, 10, 15, 20, 30, 50, 57, 60, 61)]
    assert found == pytest.approx([90, 90, 85, 80, math.nan, 40, 33, 30, math.nan], nan_ok=True)
    assert table1.at(points, 15, column=2) == 1.5
    assert table1.area([[0, 80, 0], [90, 60, 0]]) == pytest.approx(70)


def test_the_setting_of_the_greatest_area_is_chosen(run, monkeypatch):
    areas, asked = {("A", 1): 3.0, ("A", 2): 7.0, ("B", 1): 5.0}, []

    def system(name, *settings):
        return lambda run, setting: asked.append((name, setting)) or (name, setting), settings

    monkeypatch.setattr(table1, "curve", lambda run, outcome: outcome)
    monkeypatch.setattr(table1, "area", areas.get)
    assert table1.choose(run, {"A": system("A", 1, 2), "B": system("B", 1)}) == {"A": 2, "B": 1}
    assert len(asked) == 2  # for B there is nothing to choose


def test_a_difference_in_words_by_hand():
    """1, 2, 3: mean 2, deviation 1, standard error 1/√3 = 0.577; Student's t with 2 degrees of freedom is 4.303: ± 2.48.

    The word wants both intervals on one side of 0.
    """
    draws = np.linspace(1, 5, 1001)  # 95 % of them from 1.1 to 4.9
    assert table1.in_words([1.0, 2.0, 3.0], draws) == "+2.0 (-0.5 to +4.5; +1.1 to +4.9), level"
    assert table1.in_words([2.9, 3.0, 3.1], draws) == "+3.0 (+2.8 to +3.2; +1.1 to +4.9), ahead"
    assert table1.in_words([-2.9, -3.0, -3.1], -draws) == "-3.0 (-3.2 to -2.8; -4.9 to -1.1), behind"
    assert table1.in_words([2.9, 3.0, 3.1], draws - 2).endswith("level")
    assert table1.in_words([2.0], draws) == "+2.0 (+1.1 to +4.9), ahead" and table1.in_words([math.nan], draws) == "–"
    assert table1.mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_the_tables_over_seeds():
    """DeeBERT is wrong on half of 100 examples, of which other dev sets would hold 40 to 60; DACT on none."""
    right, half = [1] * 100, [0] * 50 + [1] * 50

    def curve(shift, answers, most=100):
        return [[x, 60 + shift - x / 10, 1 + shift, answers] for x in range(0, most + 1, 10)]

    results = [
        {"labels": right, "rows": {"base": [60 + seed, 0.0], "DACT, rule (4)": [60, 10.0 * seed]},
         "curves": {"DeeBERT": curve(0, half), "DACT, rule (4)": curve(2 + seed, right, 60), "DACT by entropy": curve(4, right),
                    "base, all blocks": [[100.0, 50.0, 0.0, half]]}}
        for seed in (0, 1, 2)
    ]  # fmt: skip
    run = SimpleNamespace(args=train.parse_arguments(["--task", "rte"]), metrics={"model": "folder/m"})
    text = table1.markdown(run, {"DeeBERT": 2}, results)
    assert "**rte, m**, 3 seed(s)" in text and "| base | 61.0 ± 1.0 | 0.0 ± 0.0 |" in text
    assert "| DeeBERT | 57.5 ± 0.0 | 56.7 ± 0.0 | 55.0 ± 0.0 | 52.5 ± 0.0 | 2 |" in text
    assert "| DACT, rule (4) | 60.5 ± 1.0 | 59.7 ± 1.0 | 58.0 ± 1.0 | – |" in text
    assert "| DACT, rule (4) less DeeBERT | +3.0 (+0.5 to +5.5; +" in text and "), ahead | – |" in text
    assert "| DACT, rule (4) less DACT by entropy | -1.0 (-3.5 to +1.5; +0.0 to +0.0), level |" in text
    assert "| DACT by entropy less DeeBERT |" in text and "| base, all blocks | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| DACT, rule (4) | 4.0 ± 1.0 | 4.0 ± 1.0 | 4.0 ± 1.0 | – |" in text  # over chance
    _, over_examples = table1.differences(results, "rte")["DACT, rule (4) less DeeBERT"]
    low, high = np.percentile(over_examples[:, 0], [2.5, 97.5])
    assert 39 <= low <= 42 and 58 <= high <= 61 and np.isnan(over_examples[:, 3]).all()


def test_an_ascii_console_does_not_end_it(monkeypatch):
    """After all training it would be "±" that does."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert train.command(lambda _: print(table1.mean_and_deviation([1.0, 2.0]))) == 0
    assert sys.stdout.buffer.getvalue() == b"1.5 ? 0.7\n"


def test_the_command_line_is_read_back_from_a_run(run):
    """All that metrics.json says of it; one that no run has is refused."""
    for name in ("task", "precision", "rule", *train.SETTINGS):
        assert getattr(run.args, name) == run.metrics[name]
    for changed in ({"rule": "papper"}, {"precision": "bf16"}, {"batch": 0}, {"seed": None}, {"dact": {}}, {"task": 3}):
        (run.folder / "metrics.json").write_text(json.dumps(run.metrics | changed))
        with pytest.raises(data.InputError):
            baselines.read_metrics(run.folder)
