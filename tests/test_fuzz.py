"""Everything that comes from outside, damaged at random: a clean error or a correct read, and nothing else.

DACT_FUZZ says how many damaged inputs each reader gets (200 by default; 10,000 take some minutes).
"""

import json
import os
import random
import resource
import sys
from pathlib import Path

import pytest
import torch
from fakes import google_arrays, hugging_face_names, write_google, write_hugging_face
from safetensors.torch import load as reference_load

import bert
import data
from data import InputError

sys.path.insert(0, str(Path(__file__).parent.parent / "paper"))
import baselines

COUNT = int(os.environ.get("DACT_FUZZ", "200"))


def damaged(content, rng):
    """A copy of some bytes with a few of them changed, cut out, doubled, replaced by hard ones, or the end missing."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(content) + 1), rng.randint(1, 12)
        kind = rng.randrange(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place : place + length] = rng.choice(
                [
                    b"\xff" * 8,
                    b"\0" * 8,
                    b"99999999999",
                    b"-1",
                    b"1e999",
                    b"null",
                    b"{}",
                    b"[" * 300,
                    b"\t",
                    b"\n",
                    b'"',
                    b"\r\n",
                ]
            )
        else:
            del content[place:]
    return bytes(content)


def outcomes(content, read, is_correct):
    """Read COUNT damaged copies: each must raise InputError (one line) or be correct. Returns how many were refused."""
    rng, refused = random.Random(0), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(COUNT):
        broken = damaged(content, rng)
        try:
            result = read(broken)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert is_correct(result, broken), broken
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kilobytes
    return refused


def test_tensorflow_index(tmp_path):
    content = (write_google(tmp_path, google_arrays()) / "bert_model.ckpt.index").read_bytes()
    whole = bert.read_index(content, "index")
    # Its blocks have checksums: what is read is what was written, or nothing.
    refused = outcomes(content, lambda broken: bert.read_index(broken, "index"), lambda result, _: result == whole)
    assert refused > 0.5 * COUNT


def test_safetensors(tmp_path):
    file = write_hugging_face(tmp_path, hugging_face_names(google_arrays())) / "model.safetensors"
    content = file.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")

    def read(broken):
        """Only the header is damaged: a changed weight is a weight, for the format has no checksums."""
        file.write_bytes(broken + content[head:])
        tensors = bert.open_safetensors(tmp_path, "model.safetensors")
        return {name: read() for name, read in tensors.items() if bert.is_encoder(name)}

    def is_correct(result, broken):
        """As the reader of the people who made the format, which refuses what this one should."""
        expected = reference_load(broken + content[head:])
        expected = {name: tensor for name, tensor in expected.items() if bert.is_encoder(name)}
        return result.keys() == expected.keys() and all(torch.equal(result[key], expected[key]) for key in result)

    assert outcomes(content[:head], read, is_correct) > 0.5 * COUNT


def test_tsv():
    rng = random.Random(1)
    rows = [
        [str(i), *("".join(rng.choices('ab "é,.', k=9)) for _ in range(2)), rng.choice(data.ENTAILMENT)]
        for i in range(20)
    ]
    columns = ("sentence1", "sentence2", "label")
    content = "\n".join("\t".join(row) for row in [["index", *columns], *rows]).encode()

    def read(broken):
        examples = data.Examples()
        data.add_rows(examples, data.parse_tsv(broken, "file", columns), data.TASKS["rte"])
        return examples

    def is_correct(result, broken):
        """Every line with its label, read by another way: from the right end, one character at a time."""
        table = [[]]
        field = ""
        for character in broken.decode("utf-8-sig") + "\n":
            if character not in "\t\n":
                field += character
                continue
            table[-1].append(field.removesuffix("\r") if character == "\n" else field)
            field = ""
            if character == "\n":
                table.append([])
        table = [line for line in table if line and line != [""]]
        places = [table[0].index(column) for column in columns]
        texts = [tuple(line[place] for place in places[:2]) for line in table[1:]]
        return result.texts == texts and [data.ENTAILMENT[i] for i in result.labels] == [
            line[places[2]] for line in table[1:]
        ]

    outcomes(content, read, is_correct)


@pytest.mark.parametrize("name", ["config", "tokenizer", "vocab"])
def test_files_of_a_model(tmp_path, name):
    folder = write_hugging_face(tmp_path, hugging_face_names(google_arrays()))
    if name == "tokenizer":
        (folder / "tokenizer.json").write_text(bert.read_tokenizer(folder, {"vocab.txt"}).to_str())
    file = folder / {"config": "config.json", "tokenizer": "tokenizer.json", "vocab": "vocab.txt"}[name]
    content = file.read_bytes()

    def read(broken):
        file.write_bytes(broken)
        return bert.load_pretrained(folder, 2)

    def is_correct(result, broken):
        model, tokenizer = result
        with torch.no_grad():  # whatever was read can be computed with
            ids = torch.tensor([tokenizer.encode("the cat sat", "a b").ids])
            return model(ids, torch.zeros_like(ids), torch.ones_like(ids).bool()).isfinite().all()

    assert outcomes(content, read, is_correct) > 0.2 * COUNT


def test_metrics(tmp_path):
    file = tmp_path / "metrics.json"
    rules = {rule: {"accuracy": 66.5, "saved": 20.25, "mean_blocks": 9.5} for rule in ("paper", "exact")}
    whole = {"task": "rte", "model": "m", "seed": 3, "tau": 5e-3, "rule": "paper", "epochs": 3, "batch": 32,
             "max_tokens": 128, "lr": 5e-5, "head_lr": 1e-3, "head_loss": 1.0, "precision": "float32",
             "full": {"accuracy": 65.75}, "dact": rules["paper"], "rules": rules}  # fmt: skip
    file.write_text(json.dumps(whole))
    assert baselines.read_metrics(tmp_path) == whole

    def read(broken):
        file.write_bytes(broken)
        return baselines.read_metrics(tmp_path)

    def is_correct(result, broken):
        """The file has no checksum: what comes back is what it says, and of the kinds that are relied on."""
        same = result == json.loads(broken)
        blocks = result["rules"][result["rule"]]["mean_blocks"]
        return same and -100 <= result["full"]["accuracy"] <= 100 and isinstance(result["seed"], int) and blocks > 0

    assert outcomes(json.dumps(whole).encode(), read, is_correct) > 0.2 * COUNT


def test_pickles(tmp_path):
    file = tmp_path / "weights.bin"
    torch.save({f"weight{i}": torch.arange(9.0) for i in range(3)}, file)

    def is_correct(result, broken):
        return all(torch.equal(tensor, torch.arange(9.0)) for tensor in result.values())

    def read(broken):
        file.write_bytes(broken)
        return bert.load_pickle(file, file)

    outcomes(file.read_bytes(), read, is_correct)
