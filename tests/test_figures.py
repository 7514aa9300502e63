"""Figures 2 and 5, and pruning: what they compute, by hand and by brute force; what they leave and refuse."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import baselines
import choices
import figure2
import figure3
import figure4
import figure5
import generality
import numpy as np
import price
import pruning
import pytest
import sentence
import speed
import submit
import table1
import torch
from fakes import CONFIG, ROOT, google_arrays, hugging_face_names, scattered, write_google
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel

import bert
import dact
import data
import train

pytestmark = pytest.mark.usefixtures("few_sentences")
SCRIPTS = choices, figure2, figure3, figure4, figure5, generality, price, pruning, sentence, speed, submit
SCRIPTS = {each.__name__: each for each in SCRIPTS}


def running_answers(model, dataset):
    """All a_n (N, n, C) and p_n (N, n) of a dataset, one example at a time, so without pads."""
    with torch.no_grad():
        found = [dact.accumulate_all(*model(*dataset.batch([i])[0])) for i in range(len(dataset))]
    return tuple(torch.cat(column, 1) for column in zip(*found))


def early(run, model, dataset=None):
    """`dact.Halted` of a dataset, by default dev, by the run's own rule."""
    return pruning.predicted(run, {"model": model}, dataset or run.dev)[0]["model"]


# ---- Figure 2 -------------------------------------------------------------------------------------------------------


def test_head_entropies_equal_those_of_transformers(tmp_path):
    """Means over the real tokens; theirs of one example at a time: no pads, no batches."""
    arrays = google_arrays()
    model, tokenizer = bert.load_pretrained(write_google(tmp_path / "model", arrays), 2)
    reference = BertModel(ReferenceConfig(**CONFIG, attn_implementation="eager")).eval()
    reference.load_state_dict(hugging_face_names(arrays))
    texts = [" ".join("abcdefghij"[i : i + 1 + 5 * i % 7]) for i in range(9)]
    dataset, total = data.Dataset(data.Examples(texts, [0] * 9), tokenizer, 32, 0), torch.zeros(2, 2)
    for i in range(9):
        input_ids, segment_ids, mask = dataset.batch([i])[0]
        with torch.no_grad():
            weights = torch.cat(reference(input_ids, mask.long(), segment_ids, output_attentions=True).attentions)
        total -= (weights * weights.clamp(min=1e-30).log()).sum((2, 3))  # (N, H, T, T)
    expected = total / int(dataset.lengths.sum())
    assert expected.std() > 0.05 and len(set(dataset.lengths)) > 3  # heads and lengths differ
    for batch_size in (4, 9):
        found = figure2.head_entropies(model.bert.eval(), dataset, batch_size, "cpu")
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)
    # Looking evenly, the tokens of rows of 2 and of 6: 2 times ln 2 and 6 times ln 6, over 8
    assert figure2.uniform_entropy(np.array([2, 6])) == pytest.approx((2 * math.log(2) + 6 * math.log(6)) / 8)


def test_figure_2_draws_what_it_measured(run):
    """Block n is reached by those that leave at n or later."""
    scattered(run.dact)
    panel = figure2.measure(run, 20)
    assert "first 20 of 50 dev examples" in panel.title and "all 50 dev examples" in figure2.measure(run, 50).title
    first = run.saved.dataset(baselines.part_of(run.splits[1], range(20)))
    torch.testing.assert_close(panel.entropies["DeeBERT"], figure2.head_entropies(run.stage1.bert, first, 16, "cpu"))
    exit_block = early(run, run.dact, first).exit_block
    assert panel.reached == pytest.approx([(exit_block >= n).sum().item() / 20 for n in range(1, 7)])
    assert len(exit_block.unique()) > 2
    axes = figure2.draw([panel, panel]).axes
    drawn = [line.get_ydata() for line in axes[1].lines]
    for heads in panel.entropies.values():
        assert any(len(ys) == 6 and np.allclose(ys, heads.mean(1)) for ys in drawn)
    shares = [label.get_text().split("\n")[1] for label in axes[0].get_xticklabels()]
    assert shares == [f"{100 * share:.0f}%" for share in panel.reached]


# ---- Figure 5 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dact.RULES)
def test_histograms_of_figure_5(run, name):
    """DACT's from all running answers: the exit is the first block at which the rule's left side reaches its right.

    Entropy is never under 0 and never over log 2 = 0.69: S = 0 leaves after block 6, S = 0.7 after block 1.
    """
    a, p = running_answers(scattered(run.dact), run.dev)
    run.args.rule = name
    halts = torch.stack([torch.ge(*dact.RULES[name](a[n], p[n], 5 - n)) for n in range(6)])
    halts[5] = True
    first = halts.int().argmax(0)  # of equal maxima, the first
    panel = figure5.measure(run, [0.0, 0.7])
    assert panel.exits == {f"DACT, {train.RULE_NAMES[name]}": [(first == n).sum().item() for n in range(6)],
                           "DeeBERT, entropy < 0 nats": [0, 0, 0, 0, 0, 50], "DeeBERT, entropy < 0.7 nats": [50, 0, 0, 0, 0, 0]}  # fmt: skip
    assert panel.groups.keys() == {"level 1", "level 2", "level 3"} and len(first.unique()) > 2
    assert [sum(counts) for counts in zip(*panel.groups.values())] == panel.exits[panel.ours]
    last = panel.scores["DeeBERT, entropy < 0 nats"]  # the last ramp is stage 1's classifier
    assert last == pytest.approx({metric: run.metrics["full"][metric] for metric in last})
    rows, score = [line.split() for line in figure5.table(panel).splitlines()[2:]], f"{last['accuracy']:.1f}%"
    assert rows[1][-8:] == ["0", "0", "0", "0", "0", "50", "6.00", score] and rows[2][-2] == "1.00"
    assert rows[0][-2] == f"{(first + 1).double().mean():.2f}"
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure5.draw([panel]).axes]
    assert heights == [[n for counts in bars.values() for n in counts] for bars in (panel.exits, panel.groups)]
    assert len(figure5.draw([panel._replace(groups={})]).axes) == 1


# ---- Pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", dact.RULES)
def test_a_pruned_model_answers_with_the_winner_of_a_K(run, rule):
    """By brute force, for every K: whatever the exits, the label is the winner of the whole model's a_K."""
    run.args.rule = rule
    a, _ = running_answers(scattered(run.dact), run.dev)
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
    """h_4 = 0: some leave before block 4 and all others there. Cut there, saved and loaded, the labels are the same."""
    halt = scattered(run.dact).heads[3].halt
    torch.nn.init.zeros_(halt.weight), torch.nn.init.constant_(halt.bias, -50.0)
    run = replace(run, folder=tmp_path)
    exit_block = early(run, run.dact, run.train_set).exit_block
    assert exit_block.min() < exit_block.max() == pruning.last_block_reached(run) == 4
    path = pruning.save_pruned(run, 4)
    small = train.load_run(path, 2, "toy").model
    assert small.backbone.config.num_hidden_layers == len(small.backbone.blocks) == len(small.heads) == 4
    whole, pruned = (early(run, model).label for model in (run.dact, small))
    assert whole.unique().tolist() == [0, 1] and torch.equal(whole, pruned)
    assert len(run.dact.backbone.blocks) == 6  # the whole model is left as it was


def test_changes_are_counted_apart():
    before = SimpleNamespace(exit_block=torch.tensor([3, 5, 6, 2, 6]), label=torch.tensor([0, 1, 1, 0, 1]))
    after = SimpleNamespace(exit_block=torch.tensor([3, 4, 4, 2, 4]), label=torch.tensor([0, 1, 0, 1, 0]))
    assert pruning.changes(before, after, 4) == (3, 2, 1)  # 5, 6 and 6 went past; two of them changed, and the 2 did


def test_a_model_that_needs_all_its_blocks_is_left_alone(run, tmp_path, capsys):
    for head in run.dact.heads:  # h = 1: nothing is ever safe to stop
        torch.nn.init.constant_(head.halt.bias, 50.0)
    shutil.copy(run.folder / "dact.pt", tmp_path)
    run = replace(run, folder=tmp_path)
    pruning.prune_run(run, None)
    assert "no block can be dropped" in capsys.readouterr().out and not (tmp_path / "pruned.pt").exists()
    pruning.prune_run(run, 2)  # forced
    out = capsys.readouterr().out
    assert "dropped    block 3 to 6, as told" in out and "50 of 50 dev examples went past block 2" in out


# ---- The scripts ----------------------------------------------------------------------------------------------------


def test_the_scripts_leave_their_files(toy_run, tmp_path, capsys):
    folder = shutil.copytree(toy_run, tmp_path / "run")
    generality.main([str(folder)])
    assert "untied, from S = 0.5" in capsys.readouterr().out
    for name in ("figure2", "figure5", "sentence"):
        SCRIPTS[name].main([str(folder), str(toy_run)])
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
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
    (folder / "pruned.pt").replace(folder / "dact.pt")  # which train.py reads, too
    assert train.command(train.main, ["--out", str(folder), "--explain", "the tea was not lovely"]) == 0
    assert "of 3: " in capsys.readouterr().out


def test_where_a_sentence_stops_and_how_the_sides_meet(run):
    scattered(run.dact)
    for text in run.splits[1].texts[:10]:
        halted = run.dact.early_exit(*run.saved.encode(text))
        a, p, sides, stop = sentence.trace(run.saved._replace(model=run.dact), [text], dact.paper_rule)
        assert stop == halted.exit_block.item() and torch.allclose(a[stop - 1], halted.a[0], atol=1e-6)
        assert sides[0].tolist() == [side.item() for side in dact.paper_rule(a[:1], p[:1], 5)] and p.shape == (6,)


def test_from_which_price_on_no_block_is_worth_it_to_all(run, capsys, monkeypatch):
    """Losses of 0.7, 0.6 and 0.1: block 2 earns 0.1 for its price, blocks 2 and 3 together 0.6 for two prices."""
    early = run.metrics["dact"]
    y = torch.tensor([0.7, 0.6, 0.1]).neg().exp()[:, None, None].expand(3, len(run.train_set), 2)
    monkeypatch.setattr(baselines, "answers", lambda *_: (y, None))
    assert price.limit_of(run) == pytest.approx(0.3)
    monkeypatch.setattr(price, "TAUS", (0.05, 5.0))
    monkeypatch.setattr(
        table1, "opened", lambda *_, tau, **__: replace(run, metrics=run.metrics | {"dact": {**early, "saved": tau}})
    )
    price.main([str(run.folder)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0.05", "5"] and [row[2] for row in rows] == [f"{early['saved']:.1f}%", "5.0%"]
    assert (run.folder / "price.png").stat().st_size


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
        ("figure2 --examples 0", "--examples: 0 is no int from 1 to"),
        ("figure3 --examples 50", "--examples: no dev example 50; give numbers from 0 to 49"),
        ("figure3 --examples -1", "--examples: no dev example -1"),
        ("figure4 --examples 1 2", "--examples: figure 4 is of one example, found 2"),
        ("figure4 --examples one", "--examples: invalid int value: 'one'"),
        ("figure5 --S nan", "--S: nan is no float from 0"),
        ("figure5 --S few", "--S: invalid float value: 'few'"),
        ("pruning --keep 0", "--keep: 0 is no int from 1"),
        ("pruning --keep 6", "--keep 6 of 6 blocks drops none; give a number from 1 to 5"),
        ("table1", "unrecognized arguments"),  # it makes its runs itself
    ],
)
def test_bad_flags(words, message, toy_run, capsys):
    name, *flags = words.split()
    assert train.command((SCRIPTS | {"table1": table1})[name].main, [str(toy_run), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


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
    assert train.command(train.main, ["--model", str(model), "--epochs", "0.1", "--out", str(tmp_path / "run")]) == 0
    assert train.command(figure2.main, [str(tmp_path / "run")]) == 2
    assert "a model of one block" in capsys.readouterr().err
