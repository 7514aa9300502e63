"""Every file that comes from outside, damaged at random: a result that can be used or one line of error, no more.

DACT_FUZZ says for how many seconds each kind of file is damaged (1 by default); DACT_FUZZ_SEED, with which numbers.
"""

import codecs
import faulthandler
import json
import os
import random
import time
from pathlib import Path

import baselines
import numpy as np
import pytest
import submit
import torch

import bert
import dact
import data
import train
from data import InputError

SECONDS, SEED = float(os.environ.get("DACT_FUZZ", "1")), int(os.environ.get("DACT_FUZZ_SEED", "0"))
CALL = b"cposix\nsystem\n(S'touch ran'\ntR."  # a pickle that runs a program
HARD = [b"\xff" * 8, b"\0" * 8, b"9" * 11, b"-1", b"1e999", b"NaN", b"null", b"{}", b"[" * 300, b"\t", b"\n", b'"',
        b"\r\n", b"\xe2\x98\x83", b"../..", CALL]  # fmt: skip


def damaged(content, rng):
    """A copy of some bytes with a few of them changed, cut out, doubled, replaced by hard ones, or the end missing."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(content) + 1), rng.randint(1, 12)
        kind = rng.randrange(7)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place : place + length] = rng.choice(HARD)
        elif kind == 5 and (numbers := [i for i, byte in enumerate(content) if 48 <= byte < 58]):
            content[rng.choice(numbers)] = rng.randrange(48, 58)
        elif kind == 6:
            del content[place:]
    return bytes(content)


def fuzz(file, use, head=None):
    """Damage a file, or its first `head` bytes, and use it, again and again.

    use: a function without arguments that reads the file, and asserts whatever can be known of the result.
    """
    rng, content, refused, count = random.Random(SEED), file.read_bytes(), 0, 0
    use()  # the whole file is good
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        broken = damaged(content[:head], rng) + (content[head:] if head else b"")
        file.write_bytes(broken)
        faulthandler.dump_traceback_later(20, exit=True)  # a hang ends the whole of pytest
        count += 1
        try:
            use()
        except InputError as error:
            refused += 1
            message = str(error).replace(str(file.parent), "")
            assert message.isprintable() and len(message) < 400 and "weights_only" not in message, message
        except BaseException:
            file.with_name("broken").write_bytes(broken)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    file.write_bytes(content)
    print(f"{count} damaged files, {refused} refused")
    assert refused and not Path("ran").exists()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
def answer(model, tokenizer, pad_id=0, max_tokens=20):
    """What a model is there for: an answer of the right shape to two texts."""
    dataset = data.Dataset(data.Examples([("the cat sat", "a b"), ("a", "the")], [0, 1]), tokenizer, max_tokens, pad_id)
    inputs, _ = dataset.batch(np.arange(2))
    return model.eval()(*inputs)


def a_model(folder):
    model, tokenizer = bert.load_pretrained(folder, 2)
    assert answer(model, tokenizer, model.bert.config.pad_token_id).shape == (2, 2)


@pytest.mark.parametrize("name", ["bert_config.json", "bert_model.ckpt.index", "vocab.txt", "tokenizer.json"])
def test_google(google, name):
    if name == "tokenizer.json":
        (google / name).write_text(bert.read_tokenizer(google).to_str())
    fuzz(google / name, lambda: a_model(google))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_hugging_face(hub, name):
    settings = {"do_lower_case": True, "strip_accents": False, "tokenizer_class": "BertTokenizer"}
    (hub / "tokenizer_config.json").write_text(json.dumps(settings))
    head = 8 + int.from_bytes((hub / name).read_bytes()[:8], "little") if name == "model.safetensors" else None
    fuzz(hub / name, lambda: a_model(hub), head)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt"])
def test_roberta(roberta, name):
    fuzz(roberta / name, lambda: a_model(roberta))


def test_an_index_of_several_files(hub):
    index, parts = hub / "model.safetensors.index.json", dict.fromkeys(bert.read_weights(hub), "part.safetensors")
    (hub / "model.safetensors").rename(hub / "part.safetensors")
    index.write_text(json.dumps({"weight_map": parts}))
    fuzz(index, lambda: a_model(hub))


@pytest.mark.parametrize("stage", [1, 2])
def test_models_of_a_run(tmp_path, google, stage):
    model, tokenizer = bert.load_pretrained(google, 2)
    config, model = model.bert.config, model if stage == 1 else dact.DactBert(model.bert, 2)
    train.save_model(tmp_path / "model.pt", train.Saved(model, tokenizer, "m", 20, "rte", config))

    def use():
        found = train.load_run(tmp_path / "model.pt", stage, "rte")
        found = answer(found.model, found.tokenizer, found.config.pad_token_id, found.max_tokens)
        assert found.shape == (2, 2) if stage == 1 else [len(part) for part in found] == [2, 2]

    fuzz(tmp_path / "model.pt", use)


@pytest.mark.parametrize("split", ["train", "test"])
def test_tsv(tmp_path, split):
    rng, columns = random.Random(1), ("index", "sentence1", "sentence2", "label")
    rows = [[str(i), *("".join(rng.choices('ab "é,.', k=9)) for _ in range(2)), rng.choice(data.ENTAILMENT)]
            for i in range(20)]  # fmt: skip
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("\n".join("\t".join(row) for row in [columns, *rows]), "utf-8")

    def use():
        """Every line with its number and label, read by another way: bytes, which are decoded last."""
        if split == "train":
            found = data.load_task("rte", tmp_path)[0]
        else:
            numbers, found = submit.load_test("rte", tmp_path)["RTE"]
        content = (tmp_path / f"{split}.tsv").read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
        header, *lines = [[field.decode() for field in line.split(b"\t")] for line in lines if line]
        index, first, second, label = (header.index(column) if column in header else None for column in columns)
        assert found.texts == [(line[first], line[second]) for line in lines]
        if split == "train":
            assert [data.ENTAILMENT[i] for i in found.labels] == [line[label] for line in lines]
        else:
            assert numbers == [line[index] for line in lines]

    fuzz(tmp_path / f"{split}.tsv", use)


def test_metrics(tmp_path):
    row, settings = {"accuracy": 66.5, "saved": 20.25}, {name: values[0] for name, values in train.SETTINGS.items()}
    rows = dict.fromkeys(("majority", "full", "dact", "exact_rule", "untrained", "by_chance"), row)
    whole = {"task": "rte", "model": "m", "rule": "paper", "precision": "float32"} | settings | rows
    (tmp_path / "metrics.json").write_text(json.dumps(whole))

    def use():
        """The file has no checksum: what comes back is what it says."""
        metrics, args = baselines.read_metrics(tmp_path)
        assert json.dumps(metrics) == json.dumps(json.loads((tmp_path / "metrics.json").read_bytes()))
        assert args.task in data.TASKS

    fuzz(tmp_path / "metrics.json", use)
