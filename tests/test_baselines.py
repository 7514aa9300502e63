"""paper/baselines.py, table1.py, generality.py: each system is what its paper says, and the scripts run."""

import copy
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import google_arrays, short_toy_run, small_toy_task, write_glue, write_google

import bert
import dact
import data
import train

sys.path.insert(0, str(Path(__file__).parent.parent / "paper"))
import baselines
import generality
import table1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A short run on a small toy task."""
    with small_toy_task(8):
        yield short_toy_run(tmp_path_factory.mktemp("baselines") / "toy", 32)


@pytest.fixture
def run(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    return baselines.open_run(tmp_path / "run")


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def fastbert(run):
    return baselines.ramps(run, baselines.fastbert_loss, "FastBERT")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- Rules and losses, by hand --------------------------------------------------------------------------------------

LOGITS = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.999, 0.001]], dtype=torch.float64))


def test_entropy_by_hand():
    # - 0.9 ln 0.9 - 0.1 ln 0.1 = 0.0948245 + 0.2302585
    expected = torch.tensor([math.log(2), 0.3250830, 0.0079073], dtype=torch.float64)
    torch.testing.assert_close(baselines.entropy(LOGITS), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(baselines.entropy(LOGITS + 7), expected, atol=1e-6, rtol=0)  # logits need no norm
    confident = torch.tensor([[1000.0, 0.0], [-1000.0, 1000.0]])
    assert baselines.entropy(confident).tolist() == [0, 0]


def test_entropy_rule():
    assert baselines.entropy_rule(LOGITS, (), 0.25)[0].tolist() == [False, False, True]
    assert baselines.entropy_rule(LOGITS, (), 0.33)[0].tolist() == [False, True, True]
    assert baselines.entropy_rule(LOGITS, (), 0.75)[0].tolist() == [True, True, True]  # 0.75 > ln 2: all leave


def test_patience_by_hand():
    """Answers A B B A A A A: the count of repetitions is 0 0 1 0 1 2 3."""
    exits = []
    for t in (0, 1, 2, 3):
        state, left = (), []
        for answer in "ABBAAAA":
            logits = torch.tensor([[1.0, 0.0] if answer == "A" else [0.0, 1.0]])
            halt, state = baselines.patience_rule(logits, state, t)
            left.append(halt.item())
        exits.append(left.index(True) + 1)
    assert exits == [1, 3, 6, 7]


def test_losses_by_hand():
    probabilities = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]], dtype=torch.float64)  # (N, B, C)
    logits, label = probabilities.log(), torch.tensor([1])
    ln = math.log
    assert baselines.deebert_loss(logits, label).item() == pytest.approx(-ln(0.5) - ln(0.1))  # without the last
    # KL(ramp || last): 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2) + 0.9 ln(0.9 / 0.8) + 0.1 ln(0.1 / 0.2)
    expected = 0.5 * ln(0.5 / 0.8) + 0.5 * ln(0.5 / 0.2) + 0.9 * ln(0.9 / 0.8) + 0.1 * ln(0.1 / 0.2)
    assert baselines.fastbert_loss(logits, label).item() == pytest.approx(expected)
    # KL(last || ramp), as the authors' code has it: 0.8 ln(0.8 / 0.5) + 0.2 ln(0.2 / 0.5) + the same of 0.9 and 0.1
    turned = 0.8 * ln(0.8 / 0.5) + 0.2 * ln(0.2 / 0.5) + 0.8 * ln(0.8 / 0.9) + 0.2 * ln(0.2 / 0.1)
    assert baselines.fastbert_loss(logits, label, turned=True).item() == pytest.approx(turned)
    for turned in (False, True):
        assert baselines.fastbert_loss(logits[[2, 2, 2]], label, turned).item() == pytest.approx(0, abs=1e-12)
    expected = (1 * -ln(0.5) + 2 * -ln(0.1) + 3 * -ln(0.2)) / 6
    assert baselines.pabee_loss(logits, label).item() == pytest.approx(expected)
    # BERxiT: class 1 is wrong by ramps 1 (a draw goes to class 0) and 2, so their targets are 1; the last block has none
    u = torch.tensor([[0.0], [ln(0.25 / 0.75)], [9.0]], dtype=torch.float64)
    assert baselines.berxit_loss((logits, u), label).item() == pytest.approx((0.5 - 1) ** 2 + (0.25 - 1) ** 2)
    assert baselines.berxit_loss((logits, u), 1 - label).item() == pytest.approx(0.5**2 + 0.25**2)


def test_palbert_by_hand():
    """λ = 1/2, 1/4, anything: stops at 1, 2, 3 with chances 1/2, 1/8, 3/8; a prior of 0.1: 0.1, 0.09, 0.81."""
    ln, z = math.log, torch.tensor([[0.0], [math.log(1 / 3)], [5.0]], dtype=torch.float64)
    p, prior = (0.5, 0.125, 0.375), (0.1, 0.09, 0.81)
    assert baselines.exit_chances(z).flatten().tolist() == pytest.approx(p)
    logits = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.8, 0.2]]], dtype=torch.float64).log()
    expected = -0.5 * ln(0.5) - 0.125 * ln(0.1) - 0.375 * ln(0.2) + 0.5 * sum(w * ln(w / q) for w, q in zip(prior, p))
    assert baselines.palbert_loss((logits, z), torch.tensor([1])).item() == pytest.approx(expected)
    three = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])  # answers 0, 1, 0
    left = [baselines.simulate_palbert(three, z, q) for q in (0.4, 0.5, 0.6, 0.7)]
    assert [(label.item(), block.item()) for label, block in left] == [(0, 1), (0, 1), (1, 2), (0, 3)]


def test_each_leaves_at_the_first_block_that_halts():
    halt = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])  # (blocks, examples)
    answers = torch.eye(3)[torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2]])]  # block n answers class n - 1
    labels, exit_block = baselines.leave(answers, halt)
    assert exit_block.tolist() == [1, 2, 3] and labels.tolist() == [0, 1, 2]


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [baselines.deebert, fastbert])
def test_frozen_weights_stay_and_ramps_learn(run, system):
    backbone, last = weights(run.stage1.bert), weights(run.stage1.classifier)
    exits = system(run)
    assert same(backbone, weights(exits.backbone)) and same(last, weights(exits.heads[-1]))
    fresh = baselines.Exits(exits.backbone, exits.heads[-1])
    assert all(not torch.equal(ramp[1].weight, start[1].weight) for ramp, start in zip(exits.heads[:-1], fresh.heads))
    again = system(run)  # from its file
    assert same(weights(exits), weights(again))


def test_a_model_over_cached_vectors_is_the_model(run):
    exits = scattered(baselines.Exits(run.stage1.bert, run.stage1.classifier))
    vectors = train.Vectors(exits.backbone, run.dev, run.args)
    for n, ramp in enumerate(exits.heads[:-1]):
        ramp[0].mean.fill_(0.1 * n)
    indices = data.evaluation_batches(run.dev.lengths, 20)[1]
    inputs, labels = run.dev.batch(indices)
    cached, same_labels = vectors.batch(indices)
    with torch.no_grad():
        torch.testing.assert_close(train.over_vectors(exits)(*cached), exits(*inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, same_labels) and exits.backbone is run.stage1.bert
    rule = partial(baselines.entropy_rule, S=0.4)  # early exit, too
    for ours, theirs in zip(
        train.over_vectors(exits).early_exit(*cached, rule=rule), exits.early_exit(*inputs, rule=rule)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_vectors_are_computed_once_and_only_if_asked_for(run, monkeypatch):
    """However many systems learn on them."""
    made, vectors = [], train.Vectors
    monkeypatch.setattr(train, "Vectors", lambda *args: made.append(1) or vectors(*args))
    run = baselines.open_run(run.folder)
    assert not made
    baselines.deebert(run, 1), baselines.deebert(run, 2), fastbert(run)
    assert len(made) == 1


def test_every_system_reads_on_one_scale_and_trains_without_dropout(run):
    """As DACT does: the frozen ramps on the scale of the training set, PABEE's as they train."""
    pabee, batches = baselines.pabee(run), -(-len(run.train_set) // 32)  # one epoch of each
    assert all(head.scale.steps == batches for head in run.dact.heads)
    assert all(ramp[0].steps == batches for ramp in pabee.heads[:-1])
    for model in (pabee.backbone, baselines.longer(run).bert):
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    cls = run.vectors().cls
    for system in (baselines.deebert, fastbert):
        for exits in (system(run), system(run)):  # trained, and from its file
            for n, ramp in enumerate(exits.heads[:-1]):
                moved = ramp[0](cls[:, n])  # statistics of the last 20 batches, so that they differ a little
                assert moved.mean(0).abs().max() < 0.3 and (moved.std(0) - 1).abs().max() < 0.3


@pytest.mark.parametrize("system", [baselines.pabee, baselines.palbert])
def test_joint_systems_train_everything(run, system):
    before = weights(run.stage1.bert)
    after = weights(system(run).backbone)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert same(before, weights(run.stage1.bert))  # on a copy


def test_palbert_reads_this_block_and_the_one_before(run):
    """Three times linear and tanh, then linear, the same for all blocks; before block 1 stands 0."""
    torch.manual_seed(0)
    model = baselines.Palbert(run.stage1.bert, run.stage1.classifier).eval()
    logits, z = train.outputs(model, run.dev, run.args)
    scaled = [
        scale(cls) for scale, cls in zip(model.scales, train.Vectors(run.stage1.bert, run.dev, run.args).cls.unbind(1))
    ]
    for n in (1, 2, 6):
        x = torch.cat([scaled[n - 1], scaled[n - 2] if n > 1 else torch.zeros_like(scaled[0])], 1)
        for linear in (model.stop[0], model.stop[2], model.stop[4]):
            assert linear.weight.shape == (2 * 64, 2 * 64)
            x = torch.tanh(x @ linear.weight.T + linear.bias)
        expected = x @ model.stop[6].weight[0] + model.stop[6].bias
        torch.testing.assert_close(z[n - 1], expected, atol=1e-4, rtol=1e-4)
    assert len(model.stop) == 7 and logits.shape == (6, 75, 2)


def test_berxit_is_pabee_with_a_unit_that_learned_alone(run):
    pabee, learned = baselines.pabee(run), baselines.berxit(run)
    assert same(weights(pabee.backbone), weights(learned.backbone)) and same(
        weights(pabee.heads), weights(learned.heads)
    )
    torch.manual_seed(run.args.seed)
    assert not same(weights(baselines.LearnedExit(pabee).unit), weights(learned.unit))
    assert same(weights(learned), weights(baselines.berxit(run)))  # from its file
    logits, u = train.outputs(learned, run.dev, run.args)
    torch.testing.assert_close(logits, train.outputs(pabee, run.dev, run.args)[0], atol=1e-5, rtol=1e-5)
    cls = train.Vectors(pabee.backbone, run.dev, run.args).cls[:, 2]
    torch.testing.assert_close(u[2], learned.unit(pabee.heads[2][:-1](cls)).squeeze(1), atol=1e-4, rtol=1e-4)
    assert u.shape == (6, 75) and (u[-1] == 0).all() and (u[:-1] != 0).any()


def test_the_longer_base_goes_on_from_stage_1(run):
    """At a learning rate of 0 it is stage 1 still; at the run's own it is not."""
    before = weights(run.stage1)
    assert not any(same({0: before[name]}, {0: tensor}) for name, tensor in weights(baselines.longer(run)).items())
    (run.trained / "longer-1.pt").unlink()
    run.args.lr = 0.0
    assert same(before, weights(baselines.longer(run))) and same(before, weights(run.stage1))


@pytest.mark.parametrize("task", ["rte", "toy"])
def test_first_blocks_are_those_of_the_pretrained_model(tmp_path, task):
    """On the toy task, too, if it was given one."""
    model, folder = write_google(tmp_path / "model", google_arrays()), tmp_path / "glue"
    write_glue(folder, "RTE")
    argv = ["--task", task, "--model", model, "--data", folder, "--out", tmp_path / "run", "--epochs", "0.01"]
    with small_toy_task(16):
        assert train.main([str(word) for word in argv]) == 0
        run = baselines.open_run(tmp_path / "run", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", lambda *args, **more: None)
        cut = baselines.first_blocks(run, 1)
    pretrained, _ = bert.load_pretrained(model, 2)
    assert len(cut.bert.blocks) == 1 and cut.bert.config.num_hidden_layers == 1
    assert same(weights(cut.bert), weights(pretrained.bert))


def test_precision(run, monkeypatch):
    """Everything beside a run is in the run's own precision, but heads are in full, always."""
    metrics = json.loads((run.folder / "metrics.json").read_text()) | {"precision": "bfloat16"}
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    run, used = baselines.open_run(run.folder), {}

    def fit(name, model, loss, dataset, args, record):
        used[name] = args.precision
        with train.autocast(args):
            assert model(*dataset.batch(np.arange(4))[0]).dtype == torch.float32 or name == "longer"

    monkeypatch.setattr(train, "fit", fit)
    for system in (baselines.deebert, fastbert, baselines.pabee, baselines.longer):
        system(run)
    assert used == dict.fromkeys(("DeeBERT", "FastBERT", "PABEE", "longer"), "bfloat16")


def test_an_interrupted_system_is_trained_again(run, monkeypatch):
    whole, add = weights(baselines.pabee(run)), train.Record.add
    (run.trained / "pabee-1.pt").unlink()

    def stop(record, step, *rest):
        if step > 10:
            raise KeyboardInterrupt
        add(record, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Record, "add", stop)
        baselines.pabee(run)
    assert same(whole, weights(baselines.pabee(run)))


def test_what_is_trained_belongs_to_one_run(run):
    """A run that is made anew in the same folder meets nothing of the old one's; what fits no model is refused."""
    first = weights(baselines.deebert(run).heads)
    assert [file.name for file in run.trained.glob("*.pt")] == ["deebert-2.pt"]
    metrics = json.loads((run.folder / "metrics.json").read_text()) | {"seed": 1}
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    again = baselines.open_run(run.folder)
    assert again.trained != run.trained and not same(first, weights(baselines.deebert(again).heads))
    torch.save({}, again.trained / "deebert-2.pt")
    with pytest.raises(data.InputError, match="delete it to train it again"):
        baselines.deebert(again)


# ---- Exits ----------------------------------------------------------------------------------------------------------


def scattered(model):
    """The model with random weights, with which it answers differently for every example and block."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.17 if name.startswith("heads.") else 0.3)
    for module in model.modules():
        if isinstance(module, dact.Scale):
            module.mean.zero_(), module.var.fill_(1)
    return model.eval()


def exits_of(run, rule):
    """A scattered `Exits`, and what a rule makes of it on the dev set."""
    exits = scattered(baselines.Exits(copy.deepcopy(run.stage1.bert), run.stage1.classifier))
    answers = train.predict(partial(exits.early_exit, rule=rule), run.dev, run.args)
    return exits, answers


def test_s_0_runs_all_blocks_and_s_above_ln_c_runs_one(run):
    assert exits_of(run, partial(baselines.entropy_rule, S=0.0))[1].exit_block.unique().tolist() == [6]
    assert exits_of(run, partial(baselines.entropy_rule, S=math.log(2) + 1e-6))[1].exit_block.unique().tolist() == [1]
    assert exits_of(run, partial(baselines.patience_rule, t=0))[1].exit_block.unique().tolist() == [1]
    assert exits_of(run, partial(baselines.patience_rule, t=5))[1].exit_block.unique().tolist() == [6]


@pytest.mark.parametrize("rule", [partial(baselines.entropy_rule, S=0.4), partial(baselines.patience_rule, t=2)])
def test_batched_exit_is_the_exit_of_each_alone(run, rule):
    """Worked out from the logits of all blocks, one example at a time, against the batches that shrink."""
    exits, answers = exits_of(run, rule)
    (logits,) = train.outputs(exits, run.dev, run.args)
    labels, exit_block = baselines.simulate(logits, rule)
    assert torch.equal(exit_block, answers.exit_block) and torch.equal(labels, answers.label)
    assert len(exit_block.unique()) > 2
    for i in range(20):
        state = ()
        for n in range(1, 7):
            halt, state = rule(logits[n - 1, i : i + 1], state)
            if halt or n == 6:
                break
        assert (n, logits[n - 1, i].argmax()) == (exit_block[i], labels[i])


# ---- Section 3.1, and the scripts -----------------------------------------------------------------------------------


def ramps_of(exits):
    return [partial(exits.answer, n) for n in range(1, len(exits.heads) + 1)]


def test_entropy_dact_is_a_logistic_regression_on_the_entropy(run):
    exits = baselines.Exits(run.stage1.bert, run.stage1.classifier).eval()
    tied, untied = (baselines.entropy_dact(run.dact, ramps_of(exits), tied, 0.25, weight=8.0) for tied in (True, False))
    for model, parameters in ((tied, 2), (untied, 12)):
        assert [head.threshold() for head in model.heads] == pytest.approx([0.25] * 6)
        assert sum(p.numel() for p in model.heads.parameters()) == parameters
    y_n, h_n = tied.heads[1](torch.randn(5, 64))
    H = -(y_n * y_n.log()).sum(1)
    torch.testing.assert_close(h_n, torch.sigmoid(8 * (H - 0.25)), atol=1e-5, rtol=1e-5)
    before, heads = weights(exits), run.dact.heads
    model = baselines.learned_entropy_dact(run, exits, False, 0.25)
    assert model.backbone is exits.backbone and run.dact.heads is heads and heads[0].halt is not None
    y, _ = train.outputs(model, run.dev, run.args)
    torch.testing.assert_close(
        y.log(), train.outputs(exits, run.dev, run.args)[0].log_softmax(-1), atol=1e-5, rtol=1e-4
    )
    assert same(before, weights(exits))
    assert [head.threshold() for head in model.heads] != pytest.approx([0.25] * 6, abs=1e-4)


@pytest.mark.parametrize("S", [0.2, 0.4, 0.6])
def test_deebert_is_a_case_of_dact(run, S):
    """Section 3.1: with a steep confidence function DACT leaves where DeeBERT leaves, with the same answer."""
    exits, deebert = exits_of(run, partial(baselines.entropy_rule, S=S))
    model = baselines.entropy_dact(
        train.replaced(run.dact, backbone=exits.backbone), ramps_of(exits), True, S, weight=1e4
    )
    adaptive = train.predict(model.early_exit, run.dev, run.args)
    assert len(deebert.exit_block.unique()) > 2
    assert torch.equal(adaptive.exit_block, deebert.exit_block) and torch.equal(adaptive.label, deebert.label)


def test_dact_by_entropy(run):
    """With the heads of stage 2 it answers y_n of the first block n whose entropy is under S."""
    S, model = 0.4, scattered(run.dact)
    y, _ = train.outputs(model, run.dev, run.args)
    y_logits = [lambda cls, head=head: head.logits(cls)[0] for head in model.heads]
    by_entropy = baselines.entropy_dact(model, y_logits, True, S, weight=1e4)
    answers = train.predict(by_entropy.early_exit, run.dev, run.args)
    labels, exit_block = baselines.simulate(y.log(), partial(baselines.entropy_rule, S=S))
    assert torch.equal(answers.exit_block, exit_block) and torch.equal(answers.label, labels)
    assert len(exit_block.unique()) > 2


def test_dact_at_another_price(run, monkeypatch):
    """Halting alone is trained anew. A block at 5 nats is never worth its price, so all leave after block 1; where going
    on earns 5 nats a block, nobody leaves early. From its file too.
    """
    before, exits = weights(run.dact), []
    dev = train.Vectors(run.dact.backbone, run.dev, run.args)
    run.args.epochs, run.args.head_lr = 1, 0.1  # far enough for both ends
    models = baselines.dact_over_tau(run, (-5.0, 5.0))
    monkeypatch.setattr(train, "Vectors", lambda *_: pytest.fail("nothing is left to learn"))
    for tau, model in models.items():
        predictions = train.predict(model.early_exit, run.dev, run.args)
        again = baselines.dact_over_tau(run, (tau,))[tau]
        assert same(weights(model), weights(again)) and again.backbone is run.dact.backbone
        logits, z = baselines.logits_of(again, dev, run.args)
        over_vectors = train.predict(train.over_vectors(again).early_exit, dev, run.args)
        assert torch.equal(over_vectors.label, predictions.label)
        same_exit = over_vectors.exit_block == predictions.exit_block
        assert same_exit.double().mean() > 0.97  # a sum of floats may decide otherwise
        y_and_h = [logits.softmax(-1), z.sigmoid()]
        torch.testing.assert_close(y_and_h, train.outputs(again, run.dev, run.args), atol=1e-4, rtol=1e-3)
        exits.append(predictions.exit_block.double().mean().item())
    assert exits == [6, 1] and same(before, weights(run.dact))


def test_section_3_1_learns_when_to_stop():
    """Half of the examples leave block 1 unsure, with H = 0.663 nats. If the blocks after it are wrong, its threshold
    rises above that, so that these stop as well; if they are right, it does not.
    """
    torch.manual_seed(0)
    sure = torch.rand(256, 1) < 0.5
    first = torch.where(sure, torch.tensor([4.0, 0.0]), torch.tensor([0.5, 0.0]))
    labels, learned = torch.zeros(256, dtype=torch.long), []
    for later in ([-4.0, 0.0], [4.0, 0.0]):
        logits = torch.stack([first, *[torch.tensor([later]).expand(256, 2)] * 2], 1)
        model = baselines.entropy_dact(dact.DactBert(train.VectorBackbone(3, 2), 2), [lambda cls: cls] * 3, False, 0.5)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            train.stage2_loss(model, (logits, torch.ones(256, 3)), labels, 5e-3)[0].backward()
            optimizer.step()
        learned.append(model.heads[0].threshold())
    assert learned[0] > 0.663 and learned[1] < 0.6


def test_bisection_finds_a_depth():
    def simulated(x):  # 100 examples; example i leaves block 3 where x > i
        return None, torch.where(torch.arange(100) < x, 1, 3)

    assert baselines.bisect_to_depth(simulated, 2.0, 100.0) == pytest.approx(49, abs=1e-5)  # 1 for 50, 3 for 50
    assert baselines.bisect_to_depth(simulated, 0.5, 100.0) == pytest.approx(100)  # more than there is to save


def test_section_3_1_runs_on_the_toy_task(run, capsys):
    assert baselines.command(lambda _: generality.main([str(run.folder)])) == 0
    assert "untied, from S = 0.5" in capsys.readouterr().out


# ---- Table 1 --------------------------------------------------------------------------------------------------------


def test_table_1_from_nothing(tmp_path, capsys, monkeypatch):
    """One command trains all; a second one nothing. The fifth that chooses is of the training set, and nobody trains on it."""
    argv = [
        "--epochs",
        "0.5",
        "--precision",
        "float32",
        "--out",
        str(tmp_path),
        "--without",
        "FastBERT",
        "PABEE",
        "BERxiT",
    ]
    with small_toy_task(16):
        whole, dev = data.load_task("toy")
        assert baselines.command(lambda _: table1.main(argv)) == 0, capsys.readouterr().err
        rest, fifth = table1.split_off_a_fifth(train.parse_arguments([]))
        assert len(fifth.texts) == len(whole.texts) // 5 and sorted(rest.texts + fifth.texts) == sorted(whole.texts)
        assert all(group in ("level 1", "level 2", "level 3") for group in fifth.groups) and len(fifth.groups) == len(
            fifth.labels
        )
        out = capsys.readouterr().out
        assert (
            f"{len(rest.texts)} training and {len(fifth.texts)} dev" in out
            and "system 4 of 4" in out
            and "hours" in out
        )
        text = (tmp_path / "table1.md").read_text()
        metrics = baselines.read_metrics(tmp_path / "seed-0")
        run = baselines.open_run(tmp_path / "seed-0")
        monkeypatch.setattr(train, "fit", None)
        monkeypatch.setattr(table1, "curve", None)
        assert baselines.command(lambda _: table1.main(argv)) == 0
        for flags, word in ((["--tau", "0.1"], "its run has tau 0.05, not 0.1"), (["--stage1", "x"], "leave --stage1")):
            assert baselines.command(lambda _, flags=flags: table1.main([*argv, *flags])) == 2
            assert word in capsys.readouterr().err
    assert (tmp_path / "table1.md").read_text() == text and (tmp_path / "table1.png").stat().st_size
    assert f"| base | {metrics['full']['accuracy']:.1f} | 0.0 |" in text
    found = table1.load_found(run)
    assert found["rows"]["DACT, rule (4)"] == [
        metrics["rules"]["paper"]["accuracy"],
        metrics["rules"]["paper"]["saved"],
    ]
    assert found["rows"]["DeeBERT, S = 0.75"][1] == pytest.approx(100 * 5 / 6)
    saved = [100 * k / 6 for k in range(6)]  # a quarter of 6 blocks lies between 1 and 2 of them
    assert [point[0] for point in found["curves"]["first k blocks"]] == pytest.approx(saved)
    assert found["by entropy"]["DeeBERT"] == found["curves"]["DeeBERT"]
    for points in found["curves"].values():
        assert points == sorted(points) and all(0 <= x <= 100 for x in np.array(points)[:, :2].flat)


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
    zero = pytest.approx(0)  # all leave together
    assert points == [[0.0, 100.0, zero], [pytest.approx(100 / 3), 100.0, zero], [50.0, pytest.approx(half), zero]]
    assert table1.at(points, 100 / 3) == 100 and table1.at(points, 90) == pytest.approx(
        half
    )  # constant beyond its ends
    assert table1.at(points, 125 / 3) == pytest.approx((100 + half) / 2)  # linear between
    assert table1.read_off([[0, 80, 0], [90, 60, 0]])[-1] == pytest.approx(70)
    # Who is right at block 1 leaves there, the others after block 6; the answer is wrong all the same. By chance right:
    # all who are right at block 1, and of the others those who go on.
    exit_block = torch.where(answers[0] == dev, 1, 6)
    ((_, metric, won),) = table1.curve(run, table1.Outcome(logits, lambda _: (1 - dev, exit_block), [0]))
    assert metric == 0 and won == pytest.approx(100 - half - (100 - half) ** 2 / 100, abs=1)
    whole = table1.curve(run, table1.Outcome(logits, leave, [0.0, 5.0]))
    assert len(whole) > 30 and whole[0][0] == 0 and whole[-1][0] == pytest.approx(500 / 6)


def test_the_setting_of_the_greatest_area_is_chosen(run, monkeypatch):
    areas = {("A", 1): 3.0, ("A", 2): 7.0, ("DACT, rule (4)", 1): 5.0, ("DACT by entropy", 1): 4.0}
    asked = []

    def system(name, *settings):
        return lambda run, setting: asked.append((name, setting)) or (name, setting), settings

    monkeypatch.setattr(table1, "curve", lambda run, outcome: outcome)
    monkeypatch.setattr(table1, "read_off", lambda name_and_setting: [areas[name_and_setting]])
    systems = {"A": system("A", 1, 2)} | {name: system(name, 1) for name in table1.OURS}
    for _ in range(2):
        chosen, form = table1.choose(run, systems)
        assert chosen == {"A": 2, **dict.fromkeys(table1.OURS, 1)} and form == "DACT, rule (4)"
    assert len(asked) == 4  # the second time from the file


def test_an_interval_over_seeds_by_hand():
    """1, 2, 3: mean 2, deviation 1, standard error 1/√3 = 0.577; Student's t with 2 degrees of freedom is 4.303: ± 2.48."""
    assert table1.interval([1.0, 2.0, 3.0]) == "+2.0 (-0.5 to +4.5), level"
    assert table1.interval([2.9, 3.0, 3.1]) == "+3.0 (+2.8 to +3.2), ahead"
    assert table1.interval([-2.9, -3.0, -3.1]).endswith("behind") and table1.interval([2.0]) == "+2.0"
    assert table1.mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_the_tables_over_seeds():
    def curve(shift):
        return [[0, 60 + shift, 1 + shift], [100, 50 + shift, 1 + shift]]

    results = [
        {"rows": {"base": [60 + seed, 0.0], "DACT, rule (4)": [60, 10.0 * seed]},
         "curves": {"DeeBERT": curve(0), "DACT, rule (4)": curve(2 + seed)}, "by entropy": {"DACT, rule (4)": curve(4)},
         "heads": {"DACT, rule (4)": [50, 54 + seed]}}
        for seed in (0, 1, 2)
    ]  # fmt: skip
    args = train.parse_arguments(["--task", "rte", "--model", "m"])
    text = table1.markdown(args, {"DeeBERT": ("code", 2)}, "DACT, rule (4)", results)
    assert "| base | 61.0 ± 1.0 | 0.0 ± 0.0 | 69.9, 0.0 % saved |" in text
    assert "| DACT, rule (4) | 60.0 ± 0.0 | 10.0 ± 10.0 | 62.7, 50.0 % saved |" in text
    assert "| DeeBERT | 57.5 ± 0.0 | 56.7 ± 0.0 | 55.0 ± 0.0 | 52.5 ± 0.0 | 55.5 ± 0.0 | code, 6 epochs |" in text
    assert "| DACT, rule (4) less DeeBERT | +3.0 (+0.5 to +5.5), ahead |" in text
    assert "| DACT, rule (4): its exits less chance's | +4.0 (+1.5 to +6.5), ahead |" in text
    assert "| DACT, rule (4): its exits less entropy's | -1.0 (-3.5 to +1.5), level |" in text
    assert text.endswith("| the head of block | 1 | 2 |\n| --- | ---: | ---: |\n| DACT, rule (4) | 50.0 | 55.0 |\n")
    args.model = "my-roberta"
    assert "54.5, 63.1 % saved" in table1.markdown(args, {}, "DACT, rule (4)", results)


@pytest.mark.parametrize(
    "broken",
    [
        {"rule": "papper"},
        {"precision": "bf16"},
        {"batch": 0},
        {"epochs": -1},
        {"seed": -1},
        {"rules": {}},
        {"dact": {}},
    ],
)
def test_metrics_that_no_run_has(run, broken):
    path = run.folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    with pytest.raises(data.InputError, match="not the metrics of a run"):
        baselines.read_metrics(run.folder)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert baselines.command(lambda _: generality.main([str(tmp_path)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "metrics.json" in error and error.count("\n") == 1
    assert baselines.command(lambda _: table1.main([str(tmp_path)])) == 2
    assert "unrecognized arguments" in capsys.readouterr().err
