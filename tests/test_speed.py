"""All but the clock: torchrun gives one process's numbers, loading holds one copy, speed.py runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import CONFIG, VOCAB, google_arrays, write_google
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bert
import data
import train

sys.path.insert(0, str(Path(train.__file__).parent / "paper"))
import speed

# train.py on 13 toy examples, without dropout: at batch 3 two processes have 2 rows and 1, in the last batch 1 and 0.
# The first two words of the command line name the stage and step at which it is interrupted and goes on; the third, if
# it is "fixed", keeps the heads' scale as it starts, for each process moves it by its own rows.
DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
import dact, data, train

def add(record, step, *rest, whole=train.Record.add):
    if (record.stage, str(step)) == place:
        raise KeyboardInterrupt
    whole(record, step, *rest)

def evaluate(stage1, adaptive, *rest, whole=train.evaluate):
    torch.save(list(adaptive.buffers()), Path(__file__).with_name(f"buffers-{train.rank()}.pt"))
    return whole(stage1, adaptive, *rest)

place, make = tuple(sys.argv[1:3]), data.toy_examples
if sys.argv[3] == "fixed":
    dact.Scale.forward = lambda self, cls: cls
data.toy_examples = lambda count, seed: make(13 if count == 4096 else 20, seed)
train.TOY_CONFIG = replace(train.TOY_CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
whole, train.Record.add, train.evaluate = train.Record.add, add, evaluate
status = train.main(sys.argv[4:])
if any(place):
    train.Record.add = whole
    status = status == 130 and train.main([*sys.argv[4:], "--resume"])
sys.exit(status)
"""


def drive(folder, out, processes=0, place=("", ""), epochs="2", scale="fixed"):
    """Run the driver, under torchrun if `processes` are given: what it printed."""
    (folder / "driver.py").write_text(DRIVER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    command = [sys.executable, *launch, folder / "driver.py", *place, scale, "--out", folder / out]
    command += f"--epochs {epochs} --batch 3 --precision float32".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Also when they are interrupted and go on. Every step is logged; 5 an epoch, and of halting, which has 6 epochs,
    every other one."""
    drive(tmp_path, "one")
    out = drive(tmp_path, "two", 2, ("stage 2", "7"))
    assert "2 processes" in out and out.count("resumed    after stage 1") == 1 and out.count("metrics.json") == 1
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert one[0]["settings"] | {"processes": 2} == two[0]["settings"]
    assert len(one) == 1 + 10 + 10 + 15
    del two[11:18]  # the part of stage 2 that ran twice, and the settings between
    assert len(two) == len(one)
    for first, second in zip(one[1:], two[1:]):
        assert first.keys() == second.keys() and first["step"] == second["step"]
        for key in {"loss", "price", "mean_h"} & first.keys():
            assert first[key] == pytest.approx(second[key], abs=1e-4)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert all(one[key] == two[key] for key in ("full", "dact", "rules", "untrained", "groups"))


def test_two_processes_evaluate_with_the_same_scale(tmp_path):
    """What the heads' scale followed in the last step is each process's own; both go on with the first one's."""
    drive(tmp_path, "out", 2, epochs="1.8", scale="follows")  # in the last step both have the same row
    first, second = (torch.load(tmp_path / f"buffers-{rank}.pt") for rank in (0, 1))
    saved = train.load_run(tmp_path / "out" / "dact.pt", 2, "toy")[0]
    assert (
        len(first) == 3 * 6 and all(map(torch.equal, first, second)) and all(map(torch.equal, first, saved.buffers()))
    )


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_shares_of_a_batch_add_up_to_it(monkeypatch, rows):
    """Mean over 3 processes of (weight x mean of own rows) is the mean of the rows, even where a process has none."""
    examples, tokenizer = data.toy_examples(9, 0), bert.wordpiece_tokenizer(train.TOY_VOCAB)
    dataset, cpu = data.Dataset(examples, tokenizer, 32, 0), torch.device("cpu")
    indices = torch.arange(9).numpy()[:rows]
    inputs, labels, weight = train.my_rows(dataset, indices, cpu)
    assert weight == 1 and len(labels) == rows and len(inputs) == 3
    whole = dataset.labels[:rows].double().mean()
    monkeypatch.setattr(train, "num_processes", lambda: 3)
    parts = []
    for i in range(3):
        monkeypatch.setattr(train, "rank", lambda i=i: i)
        inputs, labels, weight = train.my_rows(dataset, indices, cpu)
        assert all(len(x) == len(labels) > 0 for x in inputs)
        parts.append(weight * labels.double().mean())
    assert torch.stack(parts).mean() == pytest.approx(whole.item())


def test_loading_holds_one_copy_and_not_the_compiler(tmp_path):
    """40 MB of weights. The file stays mapped while they are copied out of it, but its pages are let go of."""
    config = CONFIG | {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 3}
    write_google(tmp_path, google_arrays(config), config)
    assert speed.loading_rows(str(tmp_path), 1)[-1].ratio < 1.5
    code = f"import bert, sys; bert.load_pretrained({str(tmp_path)!r}, 2); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, check=False).returncode == 0


def test_flops_of_a_training_step():
    """By hand, and as torch counts them.

    D = 8, I = 12, N = 2, B = 5, T = 3, C = 2. A token of a block: 2 (4 * 64 + 2 * 96) = 896 in the linear layers, and
    2 * 2 * 3 * 8 = 96 in attention. A sequence: 2 blocks * 3 tokens * 992 = 5952, and 2 (64 + 16) = 160 in its head.
    Forward 5 * 6112 = 30560; with the backward pass three times that.
    """
    config = bert.BertConfig(**CONFIG)
    assert speed.training_flops(config, 5, 3) == 91680
    step = speed.our_step(config, torch.device("cpu"))
    ids = torch.ones(5, 3, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step((ids, 0 * ids, ids > 0), ids[:, 0], "float32")
    assert counter.get_total_flops() == 91680


def test_speed_prints_its_table_and_draws_its_picture(tmp_path, capsys):
    run, model = tmp_path / "run", write_google(tmp_path / "model", google_arrays())
    assert train.main(["--epochs", "0.05", "--batch", "512", "--out", str(run)]) == 0
    capsys.readouterr()
    flags = f"--model {model} --batch 2 --examples 4 --repetitions 1"
    speed.main([str(run), *flags.split()])
    out = capsys.readouterr().out
    titles = ["early exit at batch 2", "early exit at batch 1", "examples/s at batch 2", "as others evaluate",
              "training step", "model flops",
              "padding to 128", "dynamic padding", "loading", "peak memory"]  # fmt: skip
    for title in titles:
        (line,) = [line for line in out.splitlines() if title in line and "goal" not in line]
        # A tiny model's share of the peak may round to 0.00: its rate, "4.0 of 2438.2 GFLOP/s", does not.
        shown = line.split(" of ")[0].split()[-1] if title == "model flops" else line[66:74]
        assert float(shown) > 0, line
    assert "GFLOP/s, measured on a product of two float32 matrices" in out
    assert (run / "speed.png").stat().st_size > 10_000


def test_an_epoch_of_a_task_of_three_classes():
    texts = [("a b", "c"), ("d", "e f"), ("b", "c d")] * 2
    examples, tokenizer = data.Examples(texts, [0, 1, 2] * 2), bert.wordpiece_tokenizer(VOCAB)
    dataset = data.Dataset(examples, tokenizer, 32, 0)
    rows = speed.epoch_rows(bert.BertConfig(**CONFIG), dataset, 2, torch.device("cpu"), "float32", 1)
    assert all(row.ratio > 0 for row in rows)


def test_a_task_that_cannot_be_read_is_said_before_anything_is_timed(toy_run, monkeypatch):
    monkeypatch.setattr(speed, "sweep", None)
    with pytest.raises(data.InputError, match="the toy tokenizer cannot read rte"):
        speed.main([str(toy_run), "--task", "rte"])


def test_rows_say_what_was_missed_or_not_run(capsys, monkeypatch):
    monkeypatch.setattr(speed, "have_transformers", lambda: False)
    speed.show(speed.epoch_rows(None, None, 32, None, "float32", 1))
    speed.show([speed.Row("a", 2.0, ("<=", 1.0), ""), speed.Row("b", 2.0, (">=", 1.0), "")])
    *not_run, missed, met = capsys.readouterr().out.splitlines()
    assert all("not run: transformers is not installed" in line for line in not_run)
    assert "!" in missed and "!" not in met
