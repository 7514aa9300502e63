"""train.py end to end on small things: what a run leaves, what it says, and what it refuses."""

import contextlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import ASSETS, google_arrays, needs_assets, scattered, short_toy_run, write_glue, write_google, write_roberta
from torch._subclasses import fake_tensor

import bert
import dact
import data
import train
from data import InputError

pytestmark = pytest.mark.usefixtures("few_sentences")  # in this process; what is started has all


def fails(capsys, *argv):
    """Run train.py on something bad: exit status 2 and one line, which is returned."""
    assert train.command(train.main, [str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def state_of(path):
    return torch.load(path)["state"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tiny_rte(folder):
    """Flags for a run on 40 pairs and a random BERT of Google's layout, which has dropout."""
    write_glue(folder / "glue", "RTE")
    write_google(folder / "model", google_arrays())
    return ["--task", "rte", "--data", str(folder / "glue"), "--model", str(folder / "model"), "--epochs", "1"]


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
    wanted = {"task", "model", "seed", "tau", "rule", "full", "dact", "seconds", "versions", "untrained", "by_chance"}
    assert wanted <= metrics.keys()
    assert metrics["task"] == "toy" and metrics["tau"] == 0.05 and metrics["rule"] == "paper"
    assert {"accuracy", "saved", "mean_blocks", "exit_histogram"} == metrics["dact"].keys()
    histogram = metrics["dact"]["exit_histogram"]
    assert len(histogram) == 6 and sum(histogram) == metrics["examples"] == metrics["same_as_all_blocks"] == 50
    mean = sum((n + 1) * count for n, count in enumerate(histogram)) / 50
    assert metrics["dact"]["mean_blocks"] == pytest.approx(mean)
    assert metrics["dact"]["saved"] == pytest.approx(100 * (1 - mean / 6))
    assert metrics["exact_rule"]["mean_blocks"] <= mean
    assert {"stage1", "stage2", "dev_full", "dev_early_exit"} == metrics["seconds"].keys()
    assert metrics["groups"].keys() == {"level 1", "level 2", "level 3"}
    lines = [json.loads(line) for line in (toy_run / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"stage 1", "stage 2"}
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_untrained_halting_halts_as_it_was_started(toy_run):
    """h = sigmoid(2) = 0.88 in every block: by (4) none of six stops early, for p_5 = 0.53 is left to the last one.

    The model itself is made to stop everything after block 1, and its running answer to differ from y_2, ..., y_6.
    """
    saved = train.load_run(toy_run / "stage1.pt", 1, "toy")
    dev, adaptive = saved.dataset(data.toy_examples(50, seed=2)), train.load_run(toy_run / "dact.pt", 2, "toy").model
    for head in adaptive.heads:
        torch.nn.init.constant_(head.halt.bias, -20.0)
        torch.nn.init.zeros_(head.halt.weight)
    args = train.parse_arguments([])
    args.device, args.precision = train.pick_hardware(train.SCRATCH)
    results = train.evaluate(saved.model, adaptive, dev, dev, args)
    assert results["dact"]["exit_histogram"] == [50, 0, 0, 0, 0, 0]
    assert results["untrained"]["exit_histogram"] == [0, 0, 0, 0, 0, 50]
    assert results["by_chance"]["accuracy"] == pytest.approx(results["dact"]["accuracy"])
    assert results["same_as_all_blocks"] == results["examples"] == 50
    assert all((head.halt.bias == -20).all() for head in adaptive.heads)  # it was a copy that was reset


def test_the_evaluation_is_by_the_rule_that_was_asked_for(run):
    by_rule = {}
    for run.args.rule in dact.RULES:
        by_rule[run.args.rule] = train.evaluate(run.stage1, scattered(run.dact), run.dev, run.dev, run.args)
    assert by_rule["exact"]["dact"] == by_rule["exact"]["exact_rule"] == by_rule["paper"]["exact_rule"]
    assert by_rule["exact"]["dact"]["mean_blocks"] < by_rule["paper"]["dact"]["mean_blocks"]


def test_exits_dealt_out_by_chance():
    """Block 1 is right on 0 and 1 of 4, block 2 on all. Whoever leaves late, 2 of 4 do: (2 + 2 * 2 / 4) / 4 are right.

    A confidence that sends just 0 and 1 out early answers all.
    """
    truth = torch.tensor([1, 1, 1, 1])
    answers, exits = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([1, 1, 2, 2])
    assert train.scores(answers[exits - 1, torch.arange(4)], truth, "toy") == {"accuracy": 100}
    found = train.by_chance(answers, exits, truth, "toy", deals=2000)
    assert found == {"accuracy": pytest.approx(75, abs=2)}


def test_majority_row_and_f1():
    """The majority class of MRPC's dev set scores F1 81.2 and accuracy 68.4 by itself."""
    labels = torch.tensor([1] * 279 + [0] * 129)
    scores = train.scores(torch.ones_like(labels), labels, "mrpc")
    assert [*scores.items()] == [("F1", pytest.approx(81.2, abs=0.05)), ("accuracy", pytest.approx(68.4, abs=0.05))]


def test_what_learns_in_which_stage(tmp_path, monkeypatch, capsys):
    """All of it; in stage 2 without dropout in the backbone."""
    seen, fit = {}, train.fit

    def spy(stage, model, *rest):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seconds = fit(stage, model, *rest)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        seen[stage] = moved, before.keys(), rates
        return seconds

    monkeypatch.setattr(train, "fit", spy)
    assert train.command(train.main, [*tiny_rte(tmp_path), "--out", str(tmp_path / "run"), "--batch", "4"]) == 0
    moved, names, rates = seen["stage 1"]
    assert moved == names and rates == {0.1}
    moved, names, rates = seen["stage 2"]
    assert moved == names and rates == {0.0}
    adaptive = train.load_run(tmp_path / "run" / "dact.pt").model
    assert all(head.scale.steps == 10 for head in adaptive.heads)
    out = capsys.readouterr().out
    assert "majority class" in out and "40 training and 40 dev examples" in out
    assert train.command(train.main, ["--out", str(tmp_path / "run"), "--explain", "a b c", "a b c"]) == 0
    assert "[CLS] a b c [SEP] a b c [SEP]" in capsys.readouterr().out


def test_learning_rate_rises_and_falls():
    """Of 100 steps 10 warm up: 0.1, 0.2, ... 1, then down to 1/91 of the peak at the last."""
    shares = [train.warm_up_and_decay(step, 100) for step in range(1, 101)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10] == pytest.approx(90 / 91) and shares[-1] == pytest.approx(1 / 91)
    assert train.warm_up_and_decay(1, 1) == 1


def test_decay_on_matrices_only_and_heads_apart():
    args = train.parse_arguments(["--lr", "5e-5"])
    model = dact.DactBert(bert.Bert(train.TOY_CONFIG), 2)
    groups, backbone = train.parameter_groups(model, args), {*model.backbone.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert all((weight.ndim > 1) == (group["weight_decay"] > 0) for weight in group["params"])
        assert all(group["peak_lr"] == (5e-5 if weight in backbone else 1e-3) for weight in group["params"])


def test_a_time_is_that_of_the_second_pass_over_a_batch(toy_run, monkeypatch):
    """By a clock that the model itself turns: a batch that it meets for the first time costs 100 seconds, then 1."""
    dev = train.load_run(toy_run / "dact.pt").dataset(data.toy_examples(50, seed=2))
    met, now, args = set(), [0.0], train.parse_arguments(["--batch", "10"])
    args.device, args.precision = train.pick_hardware(train.SCRATCH)

    def variant(input_ids, segment_ids, mask):
        now[0] += 1.0 if input_ids.numpy().tobytes() in met else 100.0
        met.add(input_ids.numpy().tobytes())
        return [mask.sum(1)]

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    found, seconds = train.predict({"variant": variant}, dev, args)
    assert seconds == {"variant": 5} and len(met) == 5
    assert found["variant"][0].tolist() == dev.lengths.tolist()  # in the dataset's order


# ---- Going on, and what is kept -------------------------------------------------------------------------------------


def test_stage_2_from_a_file_is_stage_2_of_the_run(toy_run, tmp_path):
    """In another folder. Then in one that holds nothing but this file, in bfloat16 by the exact rule."""
    short_toy_run(tmp_path, 16, "--stage1", str(toy_run / "stage1.pt"))
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (toy_run, tmp_path))
    assert before["dact"] == after["dact"] and equal(state_of(toy_run / "dact.pt"), state_of(tmp_path / "dact.pt"))
    for name in ("dact.pt", "metrics.json"):
        (tmp_path / name).unlink()
    short_toy_run(tmp_path, 512, "--stage1", f"{tmp_path}/stage1.pt", "--precision", "bfloat16", "--rule", "exact")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["dact"] == metrics["exact_rule"]
    assert (metrics["precision"], metrics["rule"]) == ("bfloat16", "exact")
    assert equal(state_of(toy_run / "stage1.pt"), state_of(tmp_path / "stage1.pt"))  # whole folders, as paper/ reads


def test_an_interruption_keeps_stage_1_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dact, "dact_loss", interrupt)
    assert train.command(train.main, ["--epochs", "0.05", "--out", str(tmp_path)]) == 130
    out, error = capsys.readouterr()
    assert (tmp_path / "stage1.pt").exists() and not (tmp_path / "dact.pt").exists()
    assert f"--stage1 {tmp_path}/stage1.pt" in out and error.startswith("interrupted") and error.count("\n") == 1
    monkeypatch.setattr(train, "stage1_loss", interrupt)
    assert train.command(train.main, ["--out", str(tmp_path / "new")]) == 130
    assert "--stage1" not in "".join(capsys.readouterr())  # nothing is finished


def test_a_folder_that_holds_a_run(toy_run, tmp_path, capsys, monkeypatch):
    before = {file.name: file.read_bytes() for file in toy_run.iterdir()}
    for flags in ([], ["--task", "rte"], ["--stage1", toy_run / "stage1.pt"]):
        error = fails(capsys, *flags, "--out", toy_run)
        assert f"{toy_run} holds a run; choose another --out, or add --overwrite" in error
    assert "unknown model" in fails(capsys, *tiny_rte(tmp_path), "--model", "bort", "--overwrite", "--out", toy_run)
    assert {file.name: file.read_bytes() for file in toy_run.iterdir()} == before  # nothing is lost by a bad command
    out = ["--epochs", "0.05", "--out", str(tmp_path)]
    for name in ("stage1.pt", "dact.pt", "metrics.json"):  # each alone is a run's
        (tmp_path / name).write_bytes(before[name])
        assert "holds a run" in fails(capsys, *out)
        (tmp_path / name).unlink()
    for name, content in before.items():  # a new run begins without an old one's results
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(train, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.command(train.main, [*out, "--overwrite"]) == 130
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["log.jsonl"]


def test_a_full_disk_leaves_what_was_finished(tmp_path):
    """No file may grow beyond 0.9 MB: stage 1's weights fit, but not those of stage 2."""
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000)); "
    command = [sys.executable, "-c", limit + f"runpy.run_path({train.__file__!r}, run_name='__main__')"]
    command += ["--epochs", "0.02", "--out", tmp_path / "run"]
    out = subprocess.run(command, check=False, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    assert out.stderr.startswith("error: ") and "dact.pt" in out.stderr and "free some space" in out.stderr
    assert (tmp_path / "run" / "stage1.pt").exists() and not (tmp_path / "run" / "dact.pt").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch):
    loss_of = train.stage1_loss
    monkeypatch.setattr(train, "stage1_loss", lambda *given: (loss_of(*given)[0] * math.inf,))
    error = fails(capsys, "--epochs", "0.5", "--out", tmp_path)
    assert "stage 1: the gradient is not finite before step 1; take a smaller --lr" in error
    assert not (tmp_path / "stage1.pt").exists()


# ---- A finished run answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, title", train.RULE_NAMES.items())
def test_explain_shows_the_equations(toy_run, capsys, rule, title):
    sentence = "the tea was not lovely but the staff was kind"
    assert train.command(train.main, ["--out", str(toy_run), "--rule", rule, "--explain", sentence]) == 0
    out = capsys.readouterr().out
    assert sentence in out and "negative, positive" in out
    rows = [line.split() for line in out.splitlines() if line[:3].strip().isdigit()]
    assert len(rows) == 6
    p = 1.0
    for row in rows:  # n, y_n (2 numbers), h_n, p_n, a_n (2 numbers), left, sign, right
        p *= float(row[3])
        assert float(row[4]) == pytest.approx(p, abs=2e-3)  # (2), from the printed numbers
        if abs(float(row[7]) - float(row[9])) > 2e-3:  # else the printed decimals may tie
            assert (float(row[7]) > float(row[9])) == (row[8] == ">=")
    (stop,) = map(int, re.findall(rf"{re.escape(title)} stops after block (\d) of 6", out))
    assert out.count("not run") == 6 - stop
    a, left = float(rows[0][5]), float(rows[0][7])  # of block 1, with d = 5
    a, p = max(a, 1 - a), float(rows[0][4])
    assert left == pytest.approx((a if rule == "paper" else 2 * a - 1) * (1 - p) ** 5, abs=0.02)


def test_a_loaded_run_answers_alike_and_takes_one_text_or_many(toy_run, capsys):
    """`load_run` gives a model in evaluation mode: its answers do not depend on what else it has answered."""
    saved = train.load_run(toy_run / "dact.pt")
    texts = ["the tea was not lovely", "the food was good but the room was not warm"]
    both = saved.model.early_exit(*saved.encode(texts))
    for i, text in enumerate(texts):
        alone = saved.model.early_exit(*saved.encode(text))
        assert alone.exit_block.tolist() == both.exit_block[i : i + 1].tolist()
        torch.testing.assert_close(alone.a[0], both.a[i], atol=1e-5, rtol=1e-4)
    assert saved.encode("the tea was not lovely but " * 9)[0].shape == (1, 32)
    assert "note: 1 of 1 inputs are longer than 32 tokens, and cut" in capsys.readouterr().out
    rte = saved._replace(task="rte")
    assert rte.encode([("the tea", "was not lovely")])[0].shape == (1, 8)
    for wrong, by in (([], saved), ([("a", "b")], saved), (("a", "b"), rte), ("a", rte)):
        with pytest.raises(InputError, match=r"takes \d text\(s\) an input, two as a tuple"):
            by.encode(wrong)


def test_the_program_of_the_readme(toy_run, tmp_path, monkeypatch, capsys):
    """As it stands there, on a run in runs/toy: what it prints is what the run's own model answers."""
    readme = (Path(train.__file__).parent / "README.md").read_text("utf-8")
    (program,) = [block for block in re.findall("```python\n(.*?)```", readme, re.DOTALL) if "load_run" in block]
    assert len(program.strip().splitlines()) <= 12
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(toy_run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(program)
    runpy.run_path(str(tmp_path / "program.py"))
    saved, lines = train.load_run("runs/toy/dact.pt"), capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        block, probability, text = re.fullmatch(r"after block (\d): {'negative': ([\d.e-]+), .*}  (.*)", line).groups()
        halted = saved.model.early_exit(*saved.encode(text))  # without the other one's padding
        assert halted.exit_block.item() == int(block)
        assert halted.a[0, 0].item() == pytest.approx(float(probability), abs=1e-5)


# ---- Real formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNLI", "CoLA"])  # three classes, pairs and two dev files; one sentence
def test_roberta_through_both_stages(tmp_path, capsys, name):
    model, _ = write_roberta(tmp_path / "model")
    write_glue(tmp_path / "glue", name)
    argv = ["--task", name.lower(), "--data", str(tmp_path / "glue"), "--out", str(tmp_path / "out")]
    assert train.command(train.main, [*argv, "--model", str(model), "--epochs", "1", "--batch", "16"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert -100 <= metrics["dact"][{"CoLA": "Matthews"}.get(name, "accuracy")] <= 100
    assert metrics["same_as_all_blocks"] == metrics["examples"] == {"CoLA": 40}.get(name, 80)
    out = capsys.readouterr().out
    if name == "MNLI":
        assert metrics["groups"].keys() == {"matched", "mismatched"}
        stage1, new = str(tmp_path / "out" / "stage1.pt"), str(tmp_path / "new")
        again = [*argv, "--model", str(model), "--epochs", "1", "--batch", "16", "--stage1", stage1, "--out", new]
        assert train.command(train.main, again) == 0  # the same command with --stage1
        assert equal(state_of(tmp_path / "out" / "dact.pt"), state_of(tmp_path / "new" / "dact.pt"))
        assert "is of " + str(model) in fails(capsys, *argv, "--overwrite", "--stage1", stage1, "--model", "bert-tiny")
        halves = [group["dact"]["accuracy"] for group in metrics["groups"].values()]
        assert metrics["dact"]["accuracy"] == pytest.approx(sum(halves) / 2)
        assert "matched" in out


@needs_assets
def test_small_roberta_on_the_real_rte(tmp_path, capsys):
    vocab = tuple((ASSETS / "roberta-tokenizer" / name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))
    model, _ = write_roberta(tmp_path / "model", vocab=vocab)
    argv = ["--task", "rte", "--data", str(ASSETS / "glue"), "--out", str(tmp_path / "out"), "--max-tokens", "64"]
    assert train.command(train.main, [*argv, "--model", str(model), "--epochs", "0.2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["examples"] == metrics["same_as_all_blocks"] == 277
    assert "of 277 inputs are longer than 64 tokens, and cut" in capsys.readouterr().out


# ---- Hardware and processes -----------------------------------------------------------------------------------------


def test_precision_is_chosen_by_the_hardware(monkeypatch):
    assert train.pick_hardware("bert", "bfloat16")[1] == "bfloat16"
    device, precision = train.pick_hardware(train.SCRATCH)
    assert (device.type, precision, torch.get_num_threads()) == ("cpu", "float32", 1)  # everywhere
    if not Path("/proc/cpuinfo").is_file() or train.pick_hardware("bert")[0].type != "cpu":
        pytest.skip("reads /proc/cpuinfo, which is Linux's, where there is no GPU")
    for flags, expected in (("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2 avx512f", "float32")):
        monkeypatch.setattr(train.Path, "read_text", lambda path, flags=flags: f"flags : fpu {flags} sse")
        assert train.pick_hardware("bert")[1] == expected


def test_all_tensors_stand_on_the_models_device(monkeypatch):
    """One step of both stages and an early exit, on tensors without numbers that lie on a device other than the CPU.

    An operation on tensors of two devices is an error, as it is on a GPU. The host waits for it once, and once a block.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown on this "device"
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 64)  # what the host knows it may look at
    waits = []

    def to_host(tensor):
        waits.append(tensor.device.type)
        return torch.tensor([True, False] if tensor.dtype == torch.bool else [3, 5])  # of two rows one goes on

    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        stage1 = bert.BertClassifier(bert.Bert(train.TOY_CONFIG), bert.Classifier(train.TOY_CONFIG, 2)).train()
        model, inputs = dact.DactBert(stage1.bert, 2).train(), [torch.ones(2, 5, dtype=int) for _ in range(2)]
        inputs, labels = [*inputs, torch.ones(2, 5, dtype=bool)], torch.ones(2, dtype=int)
        train.stage1_loss(stage1, inputs, labels)[0].backward()
        train.stage2_loss(model, inputs, labels, tau=0.1, head_loss=1.0)[0].backward()
        with pytest.raises(RuntimeError, match="device"):
            train.stage1_loss(stage1, inputs, labels.to("cpu"))
        with torch.device("cpu"):
            monkeypatch.setattr(torch.Tensor, "cpu", to_host)
            halted = model.eval().early_exit(*inputs)
    assert {tensor.device.type for tensor in halted} == {"meta"}
    assert waits == ["meta"] * (1 + 6)


DRIVER = """
import sys, data, dact, train

make = data.toy_examples
dact.Scale.forward = lambda self, cls: cls  # else each process follows the mean of its own rows
data.toy_examples = lambda count, seed: make(13 if count > 1000 else 20, seed)
sys.exit(train.command(train.main, sys.argv[1:]))
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Batches of 4, 4, 4 and 1: the last one cannot be shared."""
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    for out, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launch, tmp_path / "driver.py", "--out", tmp_path / out, "--epochs=2", "--batch=4"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "started    2 processes" in done.stdout and done.stdout.count("metrics.json") == 1
    for name in ("stage1.pt", "dact.pt"):
        one, two = (state_of(tmp_path / out / name) for out in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-4)
    one, two = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "two"))
    assert all(one[key] == two[key] for key in ("full", "dact", "untrained", "groups"))


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_unknown_task_model_and_folder(tmp_path, capsys, monkeypatch):
    assert "unknown task 'copa'" in fails(capsys, "--task", "copa", "--out", tmp_path)
    flags = tiny_rte(tmp_path)
    assert "unknown model 'bort'" in fails(capsys, *flags, "--model", "bort", "--out", tmp_path / "out")
    assert [train.parse_arguments(["--task", name]).task for name in ("SST-2", "CoLA")] == ["sst-2", "cola"]
    (tmp_path / "file").write_text("")
    fails(capsys, "--epochs", "0.01", "--out", tmp_path / "file" / "run")
    assert "no folder; name the one that holds GLUE's files" in fails(capsys, *flags, "--data", tmp_path / "file")
    assert "stage1.pt: no such file" in fails(capsys, "--stage1", tmp_path / "stage1.pt", "--out", tmp_path / "new")
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
    monkeypatch.setattr(bert, "load_pretrained", lambda *_: pytest.fail("it is read before the data"))
    (tmp_path / "glue" / "RTE" / "dev.tsv").write_text("")
    assert "RTE/dev.tsv: " in fails(capsys, *flags, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "flag, value",
    [("--epochs", "0"), ("--batch", "-1"), ("--lr", "fast"), ("--lr", "nan"), ("--rule", "5"), ("--seed", "-1"),
     ("--tau", "-1"), ("--tau", "nan"), ("--head-loss", "inf"), ("--max-tokens", "2"), ("--precision", "int8")],
)  # fmt: skip
def test_bad_flags(flag, value, capsys, tmp_path):
    error = fails(capsys, f"{flag}={value}", "--out", tmp_path / "new")
    assert flag in error and value in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_full(tmp_path, capsys, monkeypatch, error):
    monkeypatch.setattr(train, "fit", lambda *_: (_ for _ in ()).throw(error))
    assert "memory is full; try a smaller --batch" in fails(capsys, "--out", tmp_path)


def test_files_that_are_no_run(toy_run, tmp_path, capsys):
    """Another stage or task, another kind of file, fields that do not fit: one line each."""
    assert "are (2, 'toy'), expected (1, 'toy')" in fails(capsys, "--stage1", toy_run / "dact.pt", "--out", tmp_path)
    assert "dact.pt: no such file; train first" in fails(capsys, "--out", tmp_path, "--explain", "x")
    saved, path = torch.load(toy_run / "dact.pt"), tmp_path / "dact.pt"
    for field, words in (({"task": 1}, "unknown task '1'"), ({"max_tokens": -1}, "the tokenizer: "),
                         ({"state": {}}, "no model of a run"), ({"stage": "2"}, "expected (2, "),
                         ({"config": saved["config"] | {"num_hidden_layers": 10**9}}, "dact.pt: ")):  # fmt: skip
        torch.save(saved | field, path)
        assert words in fails(capsys, "--out", tmp_path, "--explain", "x")
    path.write_bytes(b"not a checkpoint")
    assert "no whole file of torch.save" in fails(capsys, "--out", tmp_path, "--explain", "x")


def test_nothing_that_is_loaded_can_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"task": "toy", "evil": Evil()}, tmp_path / "stage1.pt")
    with pytest.raises(InputError, match="no whole file of torch.save"):
        train.load_run(tmp_path / "stage1.pt", 1, "toy")
    assert not (tmp_path / "evil").exists()


def test_the_flags_are_few_and_say_their_defaults(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert len({*re.findall(r"--[a-z][a-z0-9-]+", text)} - {"--help"}) <= 17
    assert "(default: 0.05; toy: 0.05)" in text and "(default: 5e-05; toy: 0.0004)" in text
    assert "(default: runs/TASK)" in text
