"""paper/speed.py: all but the clock."""

import subprocess
import sys

import numpy as np
import pytest
import speed
import torch
from fakes import CONFIG, ROOT, VOCAB, google_arrays, short_toy_run, write_google

import bert
import data
import train


def test_loading_holds_one_copy_and_not_the_compiler(tmp_path):
    """40 MB of weights, which are mapped while they are copied out of the file."""
    config = CONFIG | {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 3}
    write_google(tmp_path, google_arrays(config), config)
    assert speed.load_apart(tmp_path)[1] < 1.2
    code = f"import bert, sys; bert.load_pretrained({str(tmp_path)!r}, 2); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_speed_prints_its_table_and_draws_its_picture(few_sentences, tmp_path, capsys, monkeypatch):
    run, flags = short_toy_run(tmp_path / "run", 512), ["--batch", "2", "--examples", "4", "--repetitions", "1"]
    monkeypatch.setattr(speed, "BERT_BASE", bert.BertConfig.from_dict(CONFIG))
    capsys.readouterr()
    assert train.command(speed.main, [str(run), *flags]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line[74:79].strip() in ("<=", ">=")]
    assert len(rows) == 7 and all(float(line[66:74]) > 0 for line in rows)
    assert (run / "speed.png").stat().st_size > 10_000


def test_an_epoch_of_a_task_of_three_classes_and_what_is_not_run(capsys, monkeypatch):
    args = speed.parse_arguments(["--batch", "2", "--repetitions", "1"])
    args.device, args.precision = torch.device("cpu"), "float32"
    texts = [("a b", "c"), ("d", "e f"), ("b", "c d")] * 2
    dataset = data.Dataset(data.Examples(texts, [0, 1, 2] * 2), bert.wordpiece_tokenizer(VOCAB), 32, 0)
    speed.epoch_rows(bert.BertConfig.from_dict(CONFIG), dataset, args)
    assert capsys.readouterr().out.count(" >=") == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"):
        speed.epoch_rows(bert.BertConfig.from_dict(CONFIG), dataset, args)


def test_a_row_is_the_median_of_ratios_and_says_what_was_missed(capsys):
    for ratios, sign in (([3.0, 2.0, 1.0], "<="), ([3.0, 2.0, 1.0], ">=")):
        speed.row("a", ratios, sign, 1.0)
    missed, met = capsys.readouterr().out.splitlines()
    assert "2.00   <= 1.00 !  1.00 to 3.00" in missed and "2.00   >= 1.00    1.00 to 3.00" in met
    assert speed.divided([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == ([2.0, 3.0, 1.0], "4 against 2 s")


def test_batches_from_short_to_long():
    spread = speed.spread([np.arange(3 * i, 3 * i + 3) for i in range(10)], np.arange(30), count=5)
    assert [batch[0] // 3 for batch in spread] == [1, 3, 5, 7, 9]
