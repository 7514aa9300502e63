"""Figures 2 and 5, and pruning: what they compute, by hand and by brute force; what they leave and refuse."""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import baselines
import figure2
import figure3
import figure4
import figure5
import generality
import numpy as np
import pruning
import pytest
import speed
import submit
import torch
from fakes import CONFIG, ROOT, google_arrays, hugging_face_names, write_google
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel

import bert
import dact
import data
import train

pytestmark = pytest.mark.usefixtures("few_sentences")
SCRIPTS = {each.__name__: each for each in (figure2, figure3, figure4, figure5, generality, pruning, speed, submit)}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(toy_run):
    """The run, opened anew for each test, so that a test may change its models."""
    return baselines.open_run(toy_run)


def random_run(run, seed=1):
    """Give a run's DactBert large random weights: answers and halting differ by example and by block."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.dact.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4, generator=generator)
        for head in run.dact.heads:
            for layer in (head.shared, head.answer, head.halt):
                layer.bias.zero_()
            head.scale.steps.zero_()
        run.dact.train()(*run.dev.batch(list(range(len(run.dev))))[0])  # the heads' scale follows
        run.dact.eval()
    return run


def running_answers(model, dataset):
    """All a_n (N, n, C) and p_n (N, n) of a dataset, one example at a time, so without pads."""
    with torch.no_grad():
        found = [dact.accumulate_all(*model(*dataset.batch([i])[0])) for i in range(len(dataset))]
    return tuple(torch.cat(column, 1) for column in zip(*found))


def early(run, model, dataset=None):
    """`dact.Halted` of a dataset, by default dev, by the run's own rule."""
    return pruning.predicted(run, {"model": model}, dataset or run.dev)[0]["model"]


# ---- Figure 2 -------------------------------------------------------------------------------------------------------


def test_attention_entropy_equals_transformers(tmp_path):
    arrays = google_arrays()
    model = bert.load_pretrained(write_google(tmp_path / "model", arrays), 2)[0].bert.eval()
    reference = BertModel(ReferenceConfig(**CONFIG, attn_implementation="eager")).eval()
    reference.load_state_dict(hugging_face_names(arrays))
    lengths = torch.tensor([9, 3, 6])
    mask = torch.arange(9) < lengths[:, None]
    input_ids = torch.randint(5, CONFIG["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0)) * mask
    segment_ids = torch.zeros_like(input_ids)
    with torch.no_grad():
        expected = reference(input_ids, mask.long(), segment_ids, output_attentions=True).attentions
        hidden = model.embed(input_ids, segment_ids)
        for block, weights in zip(model.blocks, expected):
            found = figure2.attention_entropy(block.attention, hidden, mask).transpose(1, 2)  # (B, T, H)
            wanted = -(weights * weights.clamp(min=1e-30).log()).sum(-1).transpose(1, 2)
            assert wanted[mask].std() > 0.05  # heads and tokens differ
            torch.testing.assert_close(found[mask], wanted[mask], atol=1e-4, rtol=0)
            hidden = block(hidden, mask)


def test_head_entropies_are_means_over_tokens_without_pads(run):
    """The same numbers from one example at a time: no pads, no batches."""
    backbone, total = run.dact.backbone, torch.zeros(6)
    with torch.no_grad():
        for i in range(len(run.dev)):
            *inputs, mask = run.dev.batch([i])[0]
            hidden = backbone.embed(*inputs)
            for n, block in enumerate(backbone.blocks):
                q, k = block.attention.query(hidden)[0], block.attention.key(hidden)[0]  # the toy has one head
                total[n] += baselines.entropy(q @ k.T / 8).sum()  # 8 = sqrt(64)
                hidden = block(hidden, mask)
    expected = total / int(run.dev.lengths.sum())
    assert expected.std() > 1e-3
    for batch_size in (7, 50):
        found = figure2.head_entropies(backbone, run.dev, batch_size, run.args.device)[:, 0]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_even_attention():
    """Tokens of rows of 2 and of 6: 2 times ln 2 and 6 times ln 6, over 8."""
    expected = (2 * math.log(2) + 6 * math.log(6)) / 8
    assert figure2.uniform_entropy(np.array([2, 6])) == pytest.approx(expected)


def test_shares_that_reach_a_block(run):
    """From the exits that were measured: block n is reached by those that leave at n or later."""
    exit_block = early(run, random_run(run).dact).exit_block
    shares = figure2.reached(run, run.dev)
    assert len(exit_block.unique()) > 2 and shares[0] == 1
    assert shares[3] == pytest.approx((exit_block >= 4).sum().item() / 50)


def test_figure_2_draws_what_it_measured(run):
    panel = figure2.measure(run, 20)
    assert "first 20 of 50 dev examples" in panel.title and len(panel.reached) == 6
    assert "all 50 dev examples" in figure2.measure(run, 50).title
    first = run.saved.dataset(data.Examples(*(column[:20] for column in (run.splits[1].texts, run.splits[1].labels))))
    torch.testing.assert_close(panel.entropies["DeeBERT"], figure2.head_entropies(run.stage1.bert, first, 16, "cpu"))
    axes = figure2.draw([panel, panel]).axes
    assert len(axes) == 2
    drawn = [line.get_ydata() for line in axes[1].lines]
    for heads in panel.entropies.values():
        assert any(len(ys) == 6 and np.allclose(ys, heads.mean(1)) for ys in drawn)
    shares = [label.get_text().split("\n")[1] for label in axes[0].get_xticklabels()]
    assert shares == [f"{100 * share:.0f}%" for share in panel.reached]


# ---- Figure 5 -------------------------------------------------------------------------------------------------------


def test_histograms_of_figure_5(run):
    """Entropy is never under 0 and never over log 2 = 0.69: S = 0 leaves after block 6, S = 0.7 after block 1."""
    panel = figure5.measure(run, [0.0, 0.4, 0.7])
    assert list(panel.exits) == ["DACT, rule (4)", "DeeBERT, S = 0", "DeeBERT, S = 0.4", "DeeBERT, S = 0.7"]
    assert all(len(counts) == 6 and sum(counts) == 50 for counts in panel.exits.values())
    assert panel.exits["DeeBERT, S = 0"] == [0, 0, 0, 0, 0, 50]
    assert panel.exits["DeeBERT, S = 0.7"] == [50, 0, 0, 0, 0, 0]
    last = panel.scores["DeeBERT, S = 0"]  # the last ramp is stage 1's classifier
    assert last == pytest.approx({metric: run.metrics["full"][metric] for metric in last})


@pytest.mark.parametrize("name", dact.RULES)
def test_histograms_of_figure_5_are_the_rules_own(run, name):
    """From all running answers: the exit is the first block at which the rule's left side reaches its right."""
    a, p = running_answers(random_run(run).dact, run.dev)
    run.args.rule = name
    halts = torch.stack([torch.ge(*dact.RULES[name](a[n], p[n], 5 - n)) for n in range(6)])
    halts[5] = True
    first = halts.int().argmax(0)  # of equal maxima, the first
    panel = figure5.measure(run, [])
    assert panel.exits == {f"DACT, {train.RULE_NAMES[name]}": [(first == n).sum().item() for n in range(6)]}
    assert panel.groups.keys() == {"level 1", "level 2", "level 3"} and len(first.unique()) > 2
    assert [sum(counts) for counts in zip(*panel.groups.values())] == panel.exits[panel.ours]


def test_figure_5_draws_and_prints_what_it_measured():
    exits = {"DACT, rule (4)": [0, 30, 10], "DeeBERT, S = 0.5": [25, 0, 15]}
    groups, scores = {"level 1": [0, 9, 1], "level 2": [0, 21, 9]}, {name: {"accuracy": 62.5} for name in exits}
    panel = figure5.Panel("toy: 40 dev examples", exits, scores, "DACT, rule (4)", groups)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure5.draw([panel]).axes]
    assert heights == [[0, 30, 10, 25, 0, 15], [0, 9, 1, 0, 21, 9]]
    assert len(figure5.draw([panel._replace(groups={})]).axes) == 1
    rows = [line.split() for line in figure5.table(panel).splitlines()]
    # (2 * 30 + 3 * 10) / 40 = 2.25 and (25 + 3 * 15) / 40 = 1.75
    assert rows[2][-5:] == ["0", "30", "10", "2.25", "62.5%"]
    assert rows[3][-5:] == ["25", "0", "15", "1.75", "62.5%"]


# ---- Pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", dact.RULES)
def test_a_pruned_model_answers_with_the_winner_of_a_K(run, rule):
    """By brute force, for every K: whatever the exits, the label is the winner of the whole model's a_K."""
    random_run(run)
    run.args.rule = rule
    a, _ = running_answers(run.dact, run.dev)
    moved = 0
    for K in range(1, 7):
        whole, pruned = early(run, run.dact), early(run, pruning.prune(run.dact, K))
        assert torch.equal(pruned.label, a[K - 1].argmax(-1))
        assert (pruned.exit_block <= whole.exit_block.clamp(max=K)).all()
        past, lost, others = pruning.changes(whole, pruned, K)
        assert past == (whole.exit_block > K).sum() and others == 0
        moved += lost
    assert moved > 0  # there was something to lose: some examples did need the dropped blocks


def test_a_model_that_never_reaches_its_last_blocks_loses_nothing(run, tmp_path):
    """h_1 = h_2 = h_3 = 1 and h_4 = 0: all leave at block 4. Cut there, saved and loaded, the labels are the same."""
    random_run(run, seed=6)
    for head in run.dact.heads[:4]:
        torch.nn.init.zeros_(head.halt.weight)
        torch.nn.init.constant_(head.halt.bias, 50.0)
    torch.nn.init.constant_(run.dact.heads[3].halt.bias, -50.0)
    run = run._replace(folder=tmp_path)
    assert pruning.last_block_reached(run) == 4
    train.save_model(tmp_path / "dact.pt", run.saved)
    path = pruning.save_pruned(run, 4)
    small = train.load_run(path, 2, "toy").model
    assert small.backbone.config.num_hidden_layers == len(small.backbone.blocks) == len(small.heads) == 4
    assert path.stat().st_size < 0.8 * (tmp_path / "dact.pt").stat().st_size
    whole, pruned = (early(run, model).label for model in (run.dact, small))
    assert whole.unique().tolist() == [0, 1] and torch.equal(whole, pruned)
    assert len(run.dact.backbone.blocks) == 6  # the whole model is left as it was


def test_the_last_block_that_an_example_reaches(run):
    """Cut to 4 blocks, some training examples leave early and some at block 4: K is the exit of the last of them."""
    run = run._replace(dact=pruning.prune(random_run(run).dact, 4))
    exit_block = early(run, run.dact, run.train_set).exit_block
    assert exit_block.min() < exit_block.max() == 4
    assert pruning.last_block_reached(run) == 4


def test_changes_are_counted_apart():
    before = SimpleNamespace(exit_block=torch.tensor([3, 5, 6, 2, 6]), label=torch.tensor([0, 1, 1, 0, 1]))
    after = SimpleNamespace(exit_block=torch.tensor([3, 4, 4, 2, 4]), label=torch.tensor([0, 1, 0, 1, 0]))
    assert pruning.changes(before, after, 4) == (3, 2, 1)  # 5, 6 and 6 went past; two of them changed, and the 2 did


def test_a_model_that_needs_all_its_blocks_is_left_alone(run, tmp_path, capsys):
    for head in run.dact.heads:  # h = 1: nothing is ever safe to stop
        torch.nn.init.constant_(head.halt.bias, 50.0)
    shutil.copy(run.folder / "dact.pt", tmp_path)
    run = run._replace(folder=tmp_path)
    pruning.prune_run(run, None)
    assert "no block can be dropped" in capsys.readouterr().out and not (tmp_path / "pruned.pt").exists()
    pruning.prune_run(run, 2)  # forced
    out = capsys.readouterr().out
    assert "dropped    block 3 to 6, as told" in out and "50 of 50 dev examples went past block 2" in out


# ---- The scripts ----------------------------------------------------------------------------------------------------


def test_the_scripts_leave_their_files(toy_run, tmp_path, capsys):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    for name in ("figure2", "figure5"):
        SCRIPTS[name].main([str(folder), str(toy_run)])
        assert (folder / f"{name}.png").read_bytes().startswith(PNG)
        assert f"saved      {folder / name}.png" in capsys.readouterr().out
    pruning.main([str(folder), "--keep", "3"])
    out = capsys.readouterr().out
    assert "block 4 to 6" in out and str(folder / "pruned.pt") in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "," in line and "%" in line}
    sizes = {name: int(rows[name][3].replace(",", "")) for name in ("unpruned", "pruned")}
    assert sizes["pruned"] == (folder / "pruned.pt").stat().st_size < sizes["unpruned"]
    # A block of the toy: 4 (64 * 64 + 64) attention, 2 * 64 * 128 + 128 + 64 feed-forward, 4 * 64 norms = 33472;
    # its head: 64 * 64 + 64 shared, 2 * 64 + 2 answer, 64 + 1 halting = 4355; three of them go.
    counts = [int(rows[name][2].replace(",", "")) for name in ("unpruned", "pruned")]
    assert counts[0] - counts[1] == 3 * (33472 + 4355)


def test_train_py_reads_a_pruned_model(toy_run, tmp_path, capsys):
    run = baselines.open_run(toy_run)._replace(folder=tmp_path)
    shutil.copy(toy_run / "dact.pt", tmp_path)
    pruning.save_pruned(run, 3).rename(tmp_path / "dact.pt")
    assert train.main(["--out", str(tmp_path), "--explain", "the tea was not lovely"]) == 0
    assert "of 3: " in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_is_no_run(name, tmp_path, capsys):
    for content, words in ((None, "no such file"), ("[]", "not the metrics of a run")):
        if content:
            (tmp_path / "metrics.json").write_text(content)
        assert train.command(SCRIPTS[name].main, [str(tmp_path)]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    "words, message",
    [
        ("figure2 --examples 0", "0 is no int from 1 to"),
        ("figure3 --examples 50", "no dev example 50; give numbers from 0 to 49"),
        ("figure3 --examples -1", "no dev example -1"),
        ("figure4 --examples 1 2", "figure 4 is of one example, found 2"),
        ("figure4 --examples one", "invalid int value: 'one'"),
        ("figure5 --S nan", "nan is no float from 0"),
        ("figure5 --S few", "invalid float value: 'few'"),
        ("pruning --keep 0", "0 is no int from 1"),
        ("pruning --keep 6", "give a number from 1 to 5"),
    ],
)
def test_bad_flags(words, message, toy_run, capsys):
    name, *flags = words.split()
    assert train.command(SCRIPTS[name].main, [str(toy_run), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and flags[0] in error


def test_without_a_folder_it_is_the_repositorys_own_run(tmp_path, monkeypatch, capsys):
    """Wherever the command is typed, and made first if it is not there."""
    for folder, shown in ((ROOT / "paper", Path("../runs/toy")), (ROOT, Path("runs/toy"))):
        monkeypatch.chdir(folder)
        assert baselines.arguments("a figure").parse_args([]).runs == [str(shown)]
    monkeypatch.setattr(baselines, "ROOT", tmp_path)
    monkeypatch.setattr(train, "run", lambda args: print(f"made {os.path.relpath(args.out, tmp_path)}"))
    with pytest.raises(data.InputError, match="no such file"):
        baselines.open_run(*baselines.arguments("a figure").parse_args([]).runs)
    assert capsys.readouterr().out == "made runs/toy\n"


def test_a_model_of_one_block_is_refused(tmp_path, capsys):
    config = CONFIG | {"num_hidden_layers": 1}
    model = write_google(tmp_path / "model", google_arrays(config), config)
    assert train.main(["--model", str(model), "--epochs", "0.1", "--out", str(tmp_path / "run")]) == 0
    assert train.command(figure2.main, [str(tmp_path / "run")]) == 2
    assert "a model of one block" in capsys.readouterr().err
