"""train.py end to end on small things: what a run leaves, what it says, and what it refuses."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import (
    ASSETS,
    google_arrays,
    needs_assets,
    short_toy_run,
    small_toy_task,
    write_glue,
    write_google,
    write_roberta,
)

import dact
import data
import train
from data import InputError


@pytest.fixture(scope="module", autouse=True)
def few_toy_sentences():
    """An eighth of the toy task's: 512 to train on and 75 in the dev set. In this process; what is started has all."""
    with small_toy_task(8):
        yield


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A short run on the toy task: the folder."""
    folder = tmp_path_factory.mktemp("toy")
    assert train.main(["--epochs", "1", "--precision", "float32", "--out", str(folder)]) == 0
    return folder


def fails(capsys, *argv):
    """Run train.py on something bad: exit status 2 and one line, which is returned."""
    assert train.main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- The loss of stage 2 --------------------------------------------------------------------------------------------


def test_loss_of_stage_2_by_hand():
    """Two blocks, two rows, tau = 0.1. Row 1: a_2 = 0.5 y_2 + 0.5 y_1 = 0.7; row 2: 0.25 * 0.5 + 0.75 * 0.1 = 0.2."""
    y = torch.tensor([[[0.8, 0.2], [0.9, 0.1]], [[0.6, 0.4], [0.5, 0.5]]])
    h = torch.tensor([[0.5, 0.25], [0.1, 0.15]])
    labels, log = torch.tensor([0, 1]), math.log
    answer, price = -(log(0.7) + log(0.2)) / 2, 0.1 * (0.6 + 0.4) / 2
    total, said_price, mean_h = train.stage2_loss(lambda: (y, h), (), labels, 0.1)
    assert (total.item(), said_price.item(), mean_h.item()) == pytest.approx((answer + price, price, 0.25))
    heads = -(log(0.8) + log(0.1) + log(0.6) + log(0.5)) / 4  # every head's own loss, if asked for
    total, said_price, _ = train.stage2_loss(lambda: (y, h), (), labels, 0.1, 2.0)
    assert (total.item(), said_price.item()) == pytest.approx((answer + price + 2 * heads, price))


# ---- What a run leaves and says -------------------------------------------------------------------------------------


def test_a_run_leaves_its_four_files(toy_run):
    assert sorted(file.name for file in toy_run.iterdir()) == ["dact.pt", "log.jsonl", "metrics.json", "stage1.pt"]
    metrics = json.loads((toy_run / "metrics.json").read_text())
    wanted = {"task", "model", "seed", "tau", "rule", "full", "dact", "seconds", "versions"}
    assert wanted <= metrics.keys()
    assert metrics["task"] == "toy" and metrics["tau"] == 0.05 and metrics["rule"] == "paper"
    assert {"accuracy", "saved", "mean_blocks", "exit_histogram"} <= metrics["dact"].keys()
    histogram = metrics["dact"]["exit_histogram"]
    assert len(histogram) == 6 and sum(histogram) == 75
    mean = sum((n + 1) * count for n, count in enumerate(histogram)) / 75
    assert metrics["dact"]["mean_blocks"] == pytest.approx(mean)
    assert metrics["dact"]["saved"] == pytest.approx(100 * (1 - mean / 6))
    assert {"stage1", "stage2", "halting", "dev_full", "dev_early_exit"} == metrics["seconds"].keys()
    assert metrics["rules"]["paper"]["by_chance"].keys() == {"accuracy"}
    first, *lines = [json.loads(line) for line in (toy_run / "log.jsonl").read_text().splitlines()]
    assert first["settings"]["task"] == "toy" and first["settings"]["epochs"] == 1
    assert {line["stage"] for line in lines} == {"stage 1", "stage 2", "halting"}
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines)


def test_early_exit_answered_as_all_blocks(toy_run):
    rules = json.loads((toy_run / "metrics.json").read_text())["rules"]
    assert rules.keys() == dact.RULES.keys()
    assert all(rule["same_as_all_blocks"] == 75 for rule in rules.values())
    assert rules["exact"]["mean_blocks"] <= rules["paper"]["mean_blocks"]


def hardware(*flags):
    """The settings of a run, ready to be used."""
    args = train.parse_arguments(["--precision", "float32", *flags])
    args.device, args.precision, _ = train.pick_hardware(args.precision)
    return args


def test_untrained_halting_halts_as_it_was_started(toy_run):
    """h = sigmoid(2) = 0.88 in every block: by (4) none of six stops early, for p_5 = 0.53 is left to the last one.

    The model itself is made to stop everything after block 1, and its running answer to differ from y_2, ..., y_6.
    """
    saved = train.load_run(toy_run / "stage1.pt", 1, "toy")
    stage1, dev = saved.model, saved.dataset(data.toy_examples(50, seed=2))
    adaptive = train.load_run(toy_run / "dact.pt", 2, "toy").model.eval()
    for head in adaptive.heads:
        torch.nn.init.zeros_(head.halt[-1].weight)
        torch.nn.init.constant_(head.halt[-1].bias, -20.0)
    results = train.evaluate(stage1.eval(), adaptive, dev, dev, hardware())
    assert results["dact"]["exit_histogram"] == [50, 0, 0, 0, 0, 0]
    assert results["untrained"]["exit_histogram"] == [0, 0, 0, 0, 0, 50]
    assert results["dact"]["by_chance"]["accuracy"] == pytest.approx(results["dact"]["accuracy"])
    assert results["dact"]["same_as_all_blocks"] == results["examples"] == 50
    assert all((head.halt[-1].bias == -20).all() for head in adaptive.heads)  # it was a copy that was reset


def test_exits_dealt_out_by_chance():
    """Block 1 is right on 0 and 1 of 4, block 2 on all. Whoever leaves late, 2 of 4 do: (2 + 2 * 2 / 4) / 4 are right.

    A confidence that sends just 0 and 1 out early answers all.
    """
    truth = torch.tensor([1, 1, 1, 1])
    answers, exits = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([1, 1, 2, 2])
    assert train.scores(answers[exits - 1, torch.arange(4)], truth, "toy") == {"accuracy": 100}
    found = train.by_chance(answers, exits, truth, "toy", deals=2000)
    assert found == {"accuracy": pytest.approx(75, abs=2)}


def test_what_learns_in_which_stage(tmp_path, monkeypatch):
    """Stage 2: all, without dropout in the backbone. Afterwards the halting units alone, on the scale that is there."""
    seen, fit = {}, train.fit

    def spy(stage, model, *rest, **more):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit(stage, model, *rest, **more)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        seen[stage] = moved, before.keys(), rates

    monkeypatch.setattr(train, "fit", spy)
    short_toy_run(tmp_path / "run", 32)
    moved, names, rates = seen["stage 1"]
    assert moved == names and rates == {0.1}
    moved, names, rates = seen["stage 2"]
    assert moved == names and rates == {0.0}
    moved, names, _ = seen["halting"]
    assert moved == {name for name in names if ".halt." in name} and len(moved) == 24 < len(names)
    adaptive = train.load_run(tmp_path / "run" / "dact.pt", 2, "toy")[0]
    assert all(head.scale.steps == 16 for head in adaptive.heads)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rules"]["exact"]["same_as_all_blocks"] == 75


def test_vectors_are_what_the_heads_read(toy_run):
    """Of all examples in their order, or of so many of them."""
    saved, args = train.load_run(toy_run / "dact.pt"), hardware("--batch", "16")
    adaptive, dev = saved.model, saved.dataset(data.toy_examples(50, seed=2))
    vectors = train.Vectors(adaptive.backbone, dev, args)
    over_cls = train.outputs(train.over_vectors(adaptive.eval()), vectors, args)
    for ours, theirs in zip(over_cls, train.outputs(adaptive, dev, args)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    some = train.Vectors(adaptive.backbone, dev, args, most=20)
    found = [i for i in range(50) if any(torch.allclose(vectors.cls[i], cls, atol=1e-5) for cls in some.cls)]
    assert len(some) == 20 <= len(found) and torch.equal(dev.labels[found].unique(), some.labels.unique())


def test_learning_rate_rises_and_falls():
    """Of 100 steps 10 warm up: 0.1, 0.2, ... 1, then down to 1/91 of the peak at the last."""
    shares = [train.warm_up_and_decay(step, 100) for step in range(1, 101)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10] == pytest.approx(90 / 91) and shares[-1] == pytest.approx(1 / 91)
    assert train.warm_up_and_decay(1, 1) == 1


def test_stage_2_from_a_file_is_stage_2_of_the_run(toy_run, tmp_path):
    argv = ["--epochs", "1", "--precision", "float32", "--out", str(tmp_path), "--stage1", str(toy_run / "stage1.pt")]
    assert train.main(argv) == 0
    first, second = (torch.load(folder / "dact.pt")["state"] for folder in (toy_run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (torch.load(folder / "stage1.pt")["state"] for folder in (toy_run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)  # the folder is whole, as paper/ reads it


def test_explain_shows_the_equations(toy_run, capsys):
    sentence = "the tea was not lovely but the staff was kind"
    assert train.main(["--out", str(toy_run), "--explain", sentence]) == 0
    out = capsys.readouterr().out
    assert sentence in out and "negative, positive" in out
    rows = [line.split() for line in out.splitlines() if line[:3].strip().isdigit()]
    assert len(rows) == 6
    p = 1.0
    for row in rows:  # n, y_n (2 numbers), h_n, p_n, a_n (2 numbers), left, sign, right, ...
        p *= float(row[3])
        assert float(row[4]) == pytest.approx(p, abs=2e-3)  # (2), from the printed numbers
        if abs(float(row[7]) - float(row[9])) > 2e-3:  # else the printed decimals may tie
            assert (float(row[7]) > float(row[9])) == (row[8] == ">=")
    assert out.count("stops after block") == 2 and "rule (4) stops" in out and "exact rule stops" in out
    stop = max(int(word) for word in re.findall(r"stops after block (\d)", out))
    assert out.count("not run") == 6 - stop


def test_the_program_of_the_readme(toy_run, tmp_path, monkeypatch, capsys):
    """As it stands there, on a run in runs/toy: what it prints is what the run's own model answers."""
    readme = (Path(train.__file__).parent / "README.md").read_text("utf-8")
    (program,) = [block for block in re.findall("```python\n(.*?)```", readme, re.S) if "load_run" in block]
    assert len(program.strip().splitlines()) <= 12
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(toy_run)
    monkeypatch.chdir(tmp_path)
    exec(program, scope := {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("after block ") and "'positive'" in line for line in lines)
    saved, texts = train.load_run("runs/toy/dact.pt"), scope["texts"]
    for text, block, probabilities in zip(texts, scope["halted"].exit_block, scope["halted"].a.cpu()):
        alone = saved.model.eval().early_exit(*saved.encode([text]))  # without the other one's padding
        assert alone.exit_block.item() == block
        torch.testing.assert_close(alone.a[0], probabilities, atol=1e-5, rtol=1e-4)


def test_explain_says_which_words_are_unknown(toy_run, capsys):
    assert train.main(["--out", str(toy_run), "--explain", "the tea was drinkable"]) == 0
    assert "[UNK]: 1 of 4 words" in capsys.readouterr().out
    assert "no word of this text" in fails(capsys, "--out", toy_run, "--explain", "quantum chromodynamics")


def test_explain_takes_bytes_that_are_no_text(toy_run, capsys):
    assert train.main(["--out", str(toy_run), "--explain", "the tea was \udcff lovely"]) == 0
    assert "[UNK]" in capsys.readouterr().out


def test_stage_1_of_another_model(toy_run, tmp_path, capsys):
    error = fails(capsys, "--stage1", toy_run / "stage1.pt", "--model", "bert-tiny", "--out", tmp_path)
    assert "trained from toy (from scratch), not from bert-tiny" in error


def test_memory_that_is_full(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(train, "fit", full)
    assert "memory is full; try a smaller --batch" in fails(capsys, "--out", tmp_path)


def test_glue_task_with_a_pretrained_model(tmp_path, capsys):
    model, folder = write_google(tmp_path / "model", google_arrays()), tmp_path / "glue"
    write_glue(folder, "RTE")
    argv = ["--task", "rte", "--model", model, "--data", folder, "--out", tmp_path / "out", "--epochs", "1"]
    assert train.main([str(word) for word in argv]) == 0
    out = capsys.readouterr().out
    assert "majority class" in out and "40 training and 40 dev examples" in out
    assert train.main(["--task", "rte", "--out", str(tmp_path / "out"), "--explain", "a b c", "a b c"]) == 0
    assert "[CLS] a b c [SEP] a b c [SEP]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["RTE", "MNLI", "CoLA"])  # pairs; three classes and two dev files; one sentence
def test_roberta_through_both_stages_and_to_the_server(tmp_path, capsys, name):
    model, _ = write_roberta(tmp_path / "model")
    written = write_glue(tmp_path / "glue", name)
    argv = ["--task", name.lower(), "--data", str(tmp_path / "glue"), "--out", str(tmp_path / "out")]
    assert train.main([*argv, "--model", str(model), "--epochs", "1", "--batch", "16"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    metric = {"CoLA": "Matthews"}.get(name, "accuracy")
    assert -100 <= metrics["dact"][metric] <= 100 and metrics["rules"]["exact"]["same_as_all_blocks"] == metrics_size(
        metrics
    )
    if name == "MNLI":
        assert metrics["groups"].keys() == {"matched", "mismatched"} and metrics_size(metrics) == 80
        halves = [group["dact"]["accuracy"] for group in metrics["groups"].values()]
        assert metrics["dact"]["accuracy"] == pytest.approx(sum(halves) / 2)
        assert "matched" in capsys.readouterr().out
    assert train.main([*argv, "--submit", str(tmp_path / "answers")]) == 0
    files = {file.name: file.read_text().splitlines() for file in (tmp_path / "answers").iterdir()}
    assert files.keys() == ({"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"} if name == "MNLI" else {f"{name}.tsv"})
    words = {word for _, _, word in written["train.tsv"]}
    for lines in files.values():
        assert lines[0] == "index\tprediction" and len(lines) == 41
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(40)]
        assert {line.split("\t")[1] for line in lines[1:]} <= words


def metrics_size(metrics):
    return sum(metrics["dact"]["exit_histogram"])


@needs_assets
def test_small_roberta_on_the_real_rte(tmp_path):
    vocab = tuple((ASSETS / "roberta-tokenizer" / name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))
    model, _ = write_roberta(tmp_path / "model", vocab=vocab)
    argv = ["--task", "rte", "--data", str(ASSETS / "glue"), "--out", str(tmp_path / "out")]
    assert train.main([*argv, "--model", str(model), "--epochs", "0.2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics_size(metrics) == 277 and metrics["rules"]["exact"]["same_as_all_blocks"] == 277
    assert train.main([*argv, "--submit", str(tmp_path)]) == 0
    assert len((tmp_path / "RTE.tsv").read_text().splitlines()) == 3001


def test_a_time_is_that_of_the_second_pass_over_a_batch(toy_run, monkeypatch):
    """By a clock that the model itself turns: a batch that it meets for the first time costs 100 seconds, then 1."""
    tokenizer = train.load_run(toy_run / "dact.pt").tokenizer
    dev, met, now = data.Dataset(data.toy_examples(50, seed=2), tokenizer, 32, 0), set(), [0.0]

    def variant(input_ids, segment_ids, mask):
        now[0] += 1.0 if input_ids.numpy().tobytes() in met else 100.0
        met.add(input_ids.numpy().tobytes())
        return train.all_blocks(mask[:, :2].float(), 6)

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    assert train.seconds_of({"variant": variant}, dev, hardware("--batch", "10")) == {"variant": 5} and len(met) == 5


def test_submitted_answers_are_those_of_early_exit(tmp_path):
    """The test file made a copy of the dev file: the share of right answers is the accuracy that the run measured."""
    (model, _), folder = write_roberta(tmp_path / "model"), tmp_path / "glue"
    written = write_glue(folder, "RTE")
    dev = (folder / "RTE" / "dev.tsv").read_text().splitlines()
    (folder / "RTE" / "test.tsv").write_text("\n".join(line.rsplit("\t", 1)[0] for line in dev) + "\n")
    argv = ["--task", "rte", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert train.main([*argv, "--model", str(model), "--epochs", "20", "--lr", "3e-3", "--batch", "8"]) == 0
    assert train.main([*argv, "--submit", str(tmp_path)]) == 0
    answers = [line.split("\t")[1] for line in (tmp_path / "RTE.tsv").read_text().splitlines()[1:]]
    right = sum(answer == label for answer, (_, _, label) in zip(answers, written["dev.tsv"]))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["dact"]["accuracy"] == pytest.approx(100 * right / 40) and len(set(answers)) == 2


def test_interruption_keeps_stage_1(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dact, "dact_loss", interrupt)
    assert train.main(["--epochs", "0.05", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "stage1.pt").exists() and not (tmp_path / "dact.pt").exists()
    error = capsys.readouterr().err
    assert "--resume" in error and error.count("\n") == 1


def toy_argv(out):
    return ["--epochs", "2", "--batch", "64", "--precision", "float32", "--out", str(out)]


def assert_same_run(first, second):
    """Two run folders with the same weights, bit for bit, and the same results."""
    for name in ("stage1.pt", "dact.pt"):
        states = [torch.load(folder / name)["state"] for folder in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert metrics[0].pop("seconds").keys() == metrics[1].pop("seconds").keys()
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run: the folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(toy_argv(folder)) == 0
    return folder


@pytest.mark.parametrize("stage, kept", [("stage 1", 0), ("stage 2", 1), ("halting", 1), ("evaluation", 2)])
def test_a_resumed_run_ends_with_the_same_numbers(whole_run, tmp_path, capsys, monkeypatch, stage, kept):
    """Stopped in the middle of each stage, and between the last one and its results."""

    add = train.Record.add

    def stop(*args):
        if stage == "evaluation" or (args[0].stage, args[1]) == (stage, 5):
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(*((train, "evaluate") if stage == "evaluation" else (train.Record, "add")), stop)
    capsys.readouterr()
    assert train.main(toy_argv(tmp_path / "cut")) == 130
    assert capsys.readouterr().err.startswith("interrupted")
    monkeypatch.undo()
    assert train.main([*toy_argv(tmp_path / "cut"), "--resume"]) == 0
    assert ("after stage", kept) == ("after stage", 0) or f"resumed    after stage {kept}" in capsys.readouterr().out
    assert_same_run(whole_run, tmp_path / "cut")


def test_killed_at_random_moments_and_resumed(whole_run, tmp_path):
    """SIGKILL, which no program can answer. DACT_KILLS: how often in all (once by default)."""
    kills, rng, run = int(os.environ.get("DACT_KILLS", "1")), random.Random(0), 0
    small = "import sys, data, train; make = data.toy_examples; "
    small += "data.toy_examples = lambda count, seed: make(count // 8, seed); sys.exit(train.main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    while kills > 0:
        folder, run, finished = tmp_path / f"cut{run}", run + 1, False
        while not (folder / "metrics.json").exists():  # a kill that comes as the process ends finds a finished run
            command = [sys.executable, "-c", small, *toy_argv(folder), "--resume"]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
                try:
                    process.communicate(timeout=rng.uniform(2, 5) if kills > 0 else None)
                    finished = True
                except subprocess.TimeoutExpired:
                    process.kill()
                kills -= 1
            assert process.returncode == (0 if finished else -signal.SIGKILL)
        assert_same_run(whole_run, folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_end_a_run_with_one_line(tmp_path, name):
    process = subprocess.Popen(
        [sys.executable, "-u", train.__file__, "--epochs", "0.5", "--out", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    while "loss" not in process.stdout.readline():
        pass
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("interrupted") and "--resume" in error and error.count("\n") == 1, error


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(train.os, "fsync", fail)
    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        train.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_inside_a_write_is_one(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.os, "fsync", interrupted)
    assert train.main(["--epochs", "0.1", "--batch", "512", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("interrupted") and [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_two_runs_in_one_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        data.lock(log, tmp_path)
        assert "in use by another run" in fails(capsys, "--epochs", "0.1", "--out", tmp_path / "run", "--overwrite")
    assert train.main(["--epochs", "0.1", "--out", str(tmp_path / "run"), "--overwrite"]) == 0


def test_resuming_on_other_data(tmp_path, capsys, monkeypatch):
    make = data.toy_examples
    monkeypatch.setattr(
        train, "without_dropout", lambda backbone: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # after stage 1
    assert train.main(toy_argv(tmp_path)) == 130
    capsys.readouterr()
    monkeypatch.setattr(data, "toy_examples", lambda count, seed: make(count, seed + 5))
    assert "its run has data [" in fails(capsys, *toy_argv(tmp_path), "--resume")


def test_an_infinite_gradient_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    assert "stage 1: the norm of the gradient is nan at step 1" in fails(capsys, "--epochs", "0.5", "--out", tmp_path)
    assert not (tmp_path / "stage1.pt").exists()


def test_an_infinite_loss_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, labels: logits.sum() * float("inf"))
    error = fails(capsys, "--epochs", "0.5", "--out", tmp_path)
    assert "stage 1: the loss is" in error and "at step 1; start again with a smaller --lr" in error
    assert not (tmp_path / "stage1.pt").exists()


def test_decay_on_matrices_only_and_heads_apart():
    args = train.parse_arguments(["--lr", "5e-5"])
    config = train.TOY_CONFIG
    model = dact.DactBert(train.bert.Bert(config), 2)
    groups = train.parameter_groups(model, args)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    backbone = set(model.backbone.parameters())
    for group in groups:
        assert all((weight.ndim > 1) == (group["weight_decay"] > 0) for weight in group["params"])
        assert all(group["peak_lr"] == (5e-5 if weight in backbone else 1e-3) for weight in group["params"])


def test_precision_is_chosen_by_the_hardware(monkeypatch):
    assert train.pick_hardware("bfloat16")[1:] == ("bfloat16", "asked for")
    if not train.Path("/proc/cpuinfo").is_file() or train.pick_hardware()[0].type != "cpu":
        pytest.skip("reads /proc/cpuinfo, which is Linux's, where there is no GPU")
    for flags, expected in (("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2 avx512f", "float32")):
        monkeypatch.setattr(train.Path, "read_text", lambda path, flags=flags: f"flags : fpu {flags} sse")
        assert train.pick_hardware()[1] == expected


def test_run_in_bfloat16_by_the_exact_rule(tmp_path):
    argv = ["--epochs", "0.1", "--precision", "bfloat16", "--rule", "exact", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["precision"] == "bfloat16" and metrics["rule"] == "exact"
    assert metrics["dact"] == metrics["rules"]["exact"]


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_unknown_task_and_model(tmp_path, capsys):
    assert "unknown task 'copa'" in fails(capsys, "--task", "copa", "--out", tmp_path)
    for spelling in ("sts-b", "STS-B", "STSB", "sts_b"):
        assert "STS-B is a regression" in fails(capsys, "--task", spelling, "--out", tmp_path)
    assert [train.parse_arguments(["--task", name]).task for name in ("SST2", "SST-2", "CoLA")] == [
        "sst-2",
        "sst-2",
        "cola",
    ]
    assert "dact.pt: no such file" in fails(capsys, "--task", "rte", "--submit", tmp_path / "x", "--out", tmp_path)
    assert "unknown model 'bort'" in fails(capsys, "--task", "rte", "--model", "bort", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag, value",
    [("--epochs", "0"), ("--batch", "-1"), ("--lr", "fast"), ("--lr", "nan"), ("--rule", "5"), ("--seed", "-1"),
     ("--tau", "-1"), ("--tau", "nan"), ("--head-loss", "inf"), ("--max-tokens", "2"), ("--precision", "int8")],
)  # fmt: skip
def test_bad_flags(flag, value, capsys, tmp_path):
    error = fails(capsys, f"{flag}={value}", "--out", tmp_path / "new")
    assert flag in error and value in error
    assert not (tmp_path / "new").exists()


def test_bad_files_reach_the_user_as_one_line(tmp_path, capsys):
    model, folder = write_google(tmp_path / "model", google_arrays()), tmp_path / "glue"
    write_glue(folder, "RTE")
    (model / "bert_model.ckpt.data-00000-of-00001").unlink()
    argv = ["--task", "rte", "--model", model, "--data", folder, "--out", tmp_path / "out"]
    assert "data-00000-of-00001 is missing" in fails(capsys, *argv)
    write_google(tmp_path / "model", google_arrays())
    (folder / "RTE" / "dev.tsv").write_text("")
    assert "RTE/dev.tsv: the file is empty" in fails(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_run_folder_that_is_not_one(toy_run, tmp_path, capsys):
    assert "dact.pt: no such file" in fails(capsys, "--out", tmp_path, "--explain", "x")
    (tmp_path / "dact.pt").write_bytes(b"not a checkpoint")
    assert "no file of torch.save" in fails(capsys, "--out", tmp_path, "--explain", "x")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "dact.pt")
    assert "no model of a run" in fails(capsys, "--out", tmp_path, "--explain", "x")
    assert "a run on 'toy'" in fails(capsys, "--task", "rte", "--out", toy_run, "--explain", "x", "y")
    assert "no test set" in fails(capsys, "--submit", tmp_path / "x", "--out", toy_run)
    assert "takes 1 text" in fails(capsys, "--out", toy_run, "--explain", "x", "y")
    assert "stage 2 of a run" in fails(capsys, "--stage1", toy_run / "dact.pt", "--out", tmp_path / "new")
    saved = torch.load(toy_run / "dact.pt")
    fields = [{"settings": 5}, {"seconds": None}, {"seconds": {"stage 1": math.nan}}, {"seconds": {"stage 1": "5"}},
              {"task": 1}, {"stage": "2"}, {"model": 5}, {"max_tokens": 1000}, {"max_tokens": 0}, {"max_tokens": "x"},
              {"config": {}}]  # fmt: skip
    abouts = [{"about": json.dumps(json.loads(saved["about"]) | field)} for field in fields]
    parts = [
        {"about": torch.zeros(2)},
        {"about": "[]"},
        {"tokenizer": [""]},
        {"version": torch.zeros(1).expand(10**10)},
    ]
    for broken in (*abouts, *parts, {"state": {}}, {"state": 5}, {"state": {"heads.0.scale.mean": 5}}):
        torch.save(saved | broken, tmp_path / "dact.pt")
        assert "dact.pt: " in fails(capsys, "--out", tmp_path, "--explain", "x")
    name, weight = "backbone.blocks.0.up.weight", saved["state"]["backbone.blocks.0.up.weight"]
    for other in (weight.double(), weight[:-1], weight.to_sparse(), 5, None):
        torch.save(saved | {"state": saved["state"] | {name: other}}, tmp_path / "dact.pt")
        assert "do not fit its own config" in fails(capsys, "--out", tmp_path, "--explain", "x")
    torch.save({name: saved[name] for name in saved.keys() - {"about"}}, tmp_path / "dact.pt")
    assert "no model of a run" in fails(capsys, "--out", tmp_path, "--explain", "x")
    torch.save({name: saved[name] for name in saved.keys() - {"version"}}, tmp_path / "dact.pt")
    assert "written by another version of dact-bert; train again" in fails(capsys, "--out", tmp_path, "--explain", "x")
    assert "no such file" in fails(capsys, "--stage1", tmp_path / "stage1.pt", "--out", tmp_path / "new")
    assert "no such file" in fails(capsys, "--stage1", "", "--out", tmp_path / "new")  # an unset shell variable
    damaged = bytearray((toy_run / "dact.pt").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 2000] = bytes(2000)
    (tmp_path / "dact.pt").write_bytes(damaged)
    assert "damaged" in fails(capsys, "--out", tmp_path, "--explain", "x")


def test_nothing_that_is_loaded_can_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"task": "toy", "evil": Evil()}, tmp_path / "stage1.pt")
    with pytest.raises(InputError, match="no file of torch.save"):
        train.load_run(tmp_path / "stage1.pt", 1, "toy")
    assert not (tmp_path / "evil").exists()


def test_resume_wins_over_overwrite(tmp_path):
    """For the advice after Ctrl-C is "the same command with --resume", and that command may have held --overwrite."""
    (tmp_path / "stage1.pt").write_bytes(b"")
    args = train.parse_arguments(["--out", str(tmp_path), "--overwrite", "--resume"])
    train.check_folder(args)
    with pytest.raises(InputError, match="no file of torch.save"):  # it is looked at
        train.finished_stages(args)
    args.resume = False
    train.check_folder(args)
    assert not train.finished_stages(args)


def test_an_output_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(capsys, "--epochs", "0.01", "--out", tmp_path / "file" / "run")


def test_majority_row_and_f1():
    """The majority class of MRPC's dev set scores F1 81.2 and accuracy 68.4 by itself."""
    labels = torch.tensor([1] * 279 + [0] * 129)
    scores = train.scores(torch.ones_like(labels), labels, "mrpc")
    assert scores == {"F1": pytest.approx(81.2, abs=0.05), "accuracy": pytest.approx(68.4, abs=0.05)}
    assert train.blocks_used(torch.ones_like(labels), 12)["saved"] == pytest.approx(100 * 11 / 12)
    assert data.TASKS["mrpc"].metrics[0] == "F1"


def test_a_folder_that_holds_a_run(toy_run, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in toy_run.iterdir()}
    finished = [], ["--resume"], ["--task", "rte"], ["--stage1", toy_run / "stage1.pt"]
    for flags in finished:
        assert "holds a finished run" in fails(capsys, *flags, "--out", toy_run)
    assert "unknown model" in fails(capsys, "--task", "rte", "--model", "bort", "--overwrite", "--out", toy_run)
    assert {file.name: file.read_bytes() for file in toy_run.iterdir()} == before  # nothing is lost by a bad command
    argv = ["--epochs", "0.05", "--precision", "float32", "--out", tmp_path]
    (tmp_path / "dact.pt").write_bytes(before["dact.pt"])
    assert "stage1.pt is missing beside dact.pt" in fails(capsys, *argv, "--resume")
    (tmp_path / "dact.pt").unlink()
    (tmp_path / "stage1.pt").write_bytes(before["stage1.pt"])
    assert "holds an unfinished run" in fails(capsys, *argv)
    assert "its run has epochs 1.0, not 0.05" in fails(capsys, *argv, "--resume")
    assert "a run on 'toy', expected stage 1 on 'rte'" in fails(capsys, *argv, "--resume", "--task", "rte")
    assert train.main([str(word) for word in [*argv, "--overwrite", "--stage1", tmp_path / "stage1.pt"]]) == 0
    states = [torch.load(folder / "stage1.pt")["state"] for folder in (toy_run, tmp_path)]
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states)))
    assert (tmp_path / "metrics.json").exists()


def test_a_full_disk_leaves_what_was_finished(tmp_path):
    """No file may grow beyond 1 MB: stage 1's weights fit, but not those of stage 2."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
    command = [
        sys.executable,
        "-c",
        limit + f"runpy.run_path({train.__file__!r}, run_name='__main__')",
    ]
    out = subprocess.run(
        [*command, "--epochs", "0.1", "--batch", "512", "--out", tmp_path / "run"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 2
    assert out.stderr.startswith("error: cannot write") and "--resume" in out.stderr and out.stderr.count("\n") == 1, (
        out.stderr
    )
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["log.jsonl", "stage1.pt"]
