"""train.py end to end on small things: what a run leaves, what it says, and what it refuses."""

import json

import pytest
import torch
from fakes import ASSETS, google_arrays, needs_assets, write_glue, write_google, write_roberta

import dact
import data
import train
from data import InputError


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


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves and says


def test_a_run_leaves_its_four_files(toy_run):
    assert sorted(file.name for file in toy_run.iterdir()) == ["dact.pt", "log.jsonl", "metrics.json", "stage1.pt"]
    metrics = json.loads((toy_run / "metrics.json").read_text())
    wanted = {"task", "model", "seed", "tau", "rule", "full", "dact", "seconds", "versions"}
    assert wanted <= metrics.keys()
    assert metrics["task"] == "toy" and metrics["tau"] == 5e-3 and metrics["rule"] == "paper"
    assert {"accuracy", "saved", "mean_blocks", "exit_histogram"} <= metrics["dact"].keys()
    histogram = metrics["dact"]["exit_histogram"]
    assert len(histogram) == 6 and sum(histogram) == 600
    mean = sum((n + 1) * count for n, count in enumerate(histogram)) / 600
    assert metrics["dact"]["mean_blocks"] == pytest.approx(mean)
    assert metrics["dact"]["saved"] == pytest.approx(100 * (1 - mean / 6))
    assert {"stage1", "stage2", "dev_full", "dev_early_exit"} == metrics["seconds"].keys()
    lines = [json.loads(line) for line in (toy_run / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"stage 1", "stage 2"}
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines)


def test_early_exit_answered_as_all_blocks(toy_run):
    rules = json.loads((toy_run / "metrics.json").read_text())["rules"]
    assert rules.keys() == dact.RULES.keys()
    assert all(rule["same_as_all_blocks"] == 600 for rule in rules.values())
    assert rules["exact"]["mean_blocks"] <= rules["paper"]["mean_blocks"]


def test_the_control_halts_as_it_was_started(toy_run):
    """N = 6, bias 4: p_3 = sigmoid(2.67) sigmoid(1.33) sigmoid(0) = 0.37, p_4 = 0.37 sigmoid(-1.33) = 0.077.

    By (4) no answer halts at n = 3, since 1 (1 - 0.37)^3 = 0.25 < 0.37 * 3. So block 4 is the first that can.
    """
    control = json.loads((toy_run / "metrics.json").read_text())["control"]
    assert control["exit_histogram"][:3] == [0, 0, 0] and control["mean_blocks"] >= 4


def test_stage_2_from_a_file_is_stage_2_of_the_run(toy_run, tmp_path):
    argv = ["--epochs", "1", "--precision", "float32", "--out", str(tmp_path), "--stage1", str(toy_run / "stage1.pt")]
    assert train.main(argv) == 0
    first, second = (torch.load(folder / "dact.pt")["state"] for folder in (toy_run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "stage1.pt").exists()


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
    assert out.count("stops after block") == 2


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
    assert files.keys() == ({"MNLI-m.tsv", "MNLI-mm.tsv"} if name == "MNLI" else {f"{name}.tsv"})
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
    assert f"--stage1 {tmp_path / 'stage1.pt'}" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError):
        train.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_infinite_loss_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, labels: logits.sum() * float("inf"))
    assert "stage 1: the loss is" in fails(capsys, "--epochs", "0.5", "--out", tmp_path)
    assert not (tmp_path / "stage1.pt").exists()


def test_decay_on_matrices_only_and_heads_apart():
    args = train.parse_arguments(["--lr", "5e-5"])
    config = train.TOY_CONFIG
    model = dact.DactBert(train.bert.Bert(config), train.bert.Classifier(config, 2))
    groups = train.parameter_groups(model, args)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    backbone = set(model.backbone.parameters())
    for group in groups:
        assert all((weight.ndim > 1) == (group["weight_decay"] > 0) for weight in group["params"])
        assert all(group["lr"] == (5e-5 if weight in backbone else 1e-3) for weight in group["params"])


def test_precision_is_chosen_by_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    assert train.pick_precision(cpu, "bfloat16") == ("bfloat16", "asked for")
    if not train.Path("/proc/cpuinfo").is_file():
        pytest.skip("reads /proc/cpuinfo, which is Linux's")
    for flags, expected in (("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2 avx512f", "float32")):
        monkeypatch.setattr(train.Path, "read_text", lambda path, flags=flags: f"flags : fpu {flags} sse")
        assert train.pick_precision(cpu, None)[0] == expected


def test_run_in_bfloat16_by_the_exact_rule(tmp_path):
    argv = ["--epochs", "0.1", "--precision", "bfloat16", "--rule", "exact", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["precision"] == "bfloat16" and metrics["rule"] == "exact"
    assert metrics["dact"] == metrics["rules"]["exact"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_unknown_task_and_model(tmp_path, capsys):
    assert "unknown task 'copa'" in fails(capsys, "--task", "copa", "--out", tmp_path)
    assert "STS-B is a regression" in fails(capsys, "--task", "sts-b", "--out", tmp_path)
    assert "no test set" in fails(capsys, "--submit", tmp_path / "x", "--out", tmp_path)
    assert "unknown model 'bort'" in fails(capsys, "--task", "rte", "--model", "bort", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag, value",
    [("--epochs", "0"), ("--batch", "-1"), ("--lr", "fast"), ("--lr", "nan"), ("--rule", "5"), ("--seed", "-1"),
     ("--tau", "-1"), ("--tau", "nan"), ("--halt-bias", "inf"), ("--max-tokens", "2"), ("--precision", "int8")],
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
    assert "not a file of torch.save" in fails(capsys, "--out", tmp_path, "--explain", "x")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "dact.pt")
    assert "not a file of a run" in fails(capsys, "--out", tmp_path, "--explain", "x")
    assert "a run on 'toy'" in fails(capsys, "--task", "rte", "--out", toy_run, "--explain", "x", "y")
    assert "takes 1 text" in fails(capsys, "--out", toy_run, "--explain", "x", "y")
    assert "stage 2 of a run" in fails(capsys, "--stage1", toy_run / "dact.pt", "--out", tmp_path / "new")
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
    with pytest.raises(InputError, match="not a file of torch.save"):
        train.load_run(tmp_path / "stage1.pt", 1, "toy")
    assert not (tmp_path / "evil").exists()


def test_an_output_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(capsys, "--epochs", "0.01", "--out", tmp_path / "file" / "run")


def test_majority_row_and_f1():
    """The majority class of MRPC's dev set scores F1 81.2 and accuracy 68.4 by itself."""
    labels = torch.tensor([1] * 279 + [0] * 129)
    answers = train.Answers(torch.ones_like(labels), torch.ones_like(labels), 0.0)
    scores = train.scores(answers.labels, labels, "mrpc")
    assert scores == {"F1": pytest.approx(81.2, abs=0.05), "accuracy": pytest.approx(68.4, abs=0.05)}
    assert train.blocks_used(answers, 12)["saved"] == pytest.approx(100 * 11 / 12)
    assert data.TASKS["mrpc"].metrics[0] == "F1"
