"""What tests run on: real files where there are any; small models and tasks as Google, the hub and GLUE write them."""

import contextlib
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tokenizers.pre_tokenizers import ByteLevel
from transformers import RobertaConfig, RobertaModel

import dact
import data
import train

ROOT = Path(train.__file__).parent
ASSETS = Path(os.environ.get("DACT_ASSETS") or "no folder of real files")
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="DACT_ASSETS names no folder of real files")

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "the", "cat", "sat", "##s", "was", "not", "."]
CONFIG = {
    "vocab_size": len(VOCAB), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 140, "type_vocab_size": 2, "hidden_act": "gelu",
}  # fmt: skip


def google_arrays(config=CONFIG):
    """Random arrays under Google's names, in Google's shapes: kernels are (in, out)."""
    rng = np.random.default_rng(0)
    D, I = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "bert/embeddings/word_embeddings": (config["vocab_size"], D),
        "bert/embeddings/position_embeddings": (config["max_position_embeddings"], D),
        "bert/embeddings/token_type_embeddings": (config["type_vocab_size"], D),
        "bert/embeddings/LayerNorm/gamma": (D,),
        "bert/embeddings/LayerNorm/beta": (D,),
        "bert/pooler/dense/kernel": (D, D),
        "bert/pooler/dense/bias": (D,),
        "cls/predictions/output_bias": (config["vocab_size"],),
        "global_step": (),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{n}/"
        dense = {f"attention/self/{name}": (D, D) for name in ("query", "key", "value")}
        dense |= {"attention/output/dense": (D, D), "intermediate/dense": (D, I), "output/dense": (I, D)}
        for name, shape in dense.items():
            shapes |= {f"{layer}{name}/kernel": shape, f"{layer}{name}/bias": shape[1:]}
        for name in ("attention/output/LayerNorm", "output/LayerNorm"):
            shapes |= {f"{layer}{name}/gamma": (D,), f"{layer}{name}/beta": (D,)}
        shapes[f"{layer}output/dense/kernel/adam_m"] = (I, D)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def hugging_face_names(arrays):
    """The same weights under Hugging Face's names: the mapping spelt out once more, to check bert.py's own."""
    tensors = {}
    for name, array in arrays.items():
        if name.startswith("bert/") and not name.endswith("adam_m"):
            key = name.removeprefix("bert/").replace("/", ".").replace("layer_", "layer.")
            if key.endswith(".kernel"):
                key, array = key.removesuffix("kernel") + "weight", array.T
            key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            tensors[key + ".weight" if key.endswith("embeddings") else key] = torch.tensor(array.copy())
    return tensors


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def index_bytes(entries, block_entries=4):
    """A checkpoint index: {name: (shape, offset, size)} as a LevelDB table with prefixed keys and several blocks."""

    def block(pairs):
        body, last = b"", b""
        for key, value in pairs:
            shared = len(os.path.commonprefix([key, last]))
            body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        return body + struct.pack("<II", 0, 1) + bytes(5)  # a type, 0, and a checksum, which bert.py does not read

    def message(shape, offset, size):
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in shape))
        return b"\x08\x01\x12" + varint(len(dims)) + dims + b"\x20" + varint(offset) + b"\x28" + varint(size)

    pairs = [(b"", b"\x08\x01\x1a\x02\x08\x01")]  # the header: one shard, little-endian, version
    pairs += [(name.encode(), message(*entry)) for name, entry in sorted(entries.items())]
    table, handles = b"", []
    for start in range(0, len(pairs), block_entries):
        group = pairs[start : start + block_entries]
        content = block(group)
        handles.append((group[-1][0] + b"~", varint(len(table)) + varint(len(content) - 5)))
        table += content
    index = block(handles)
    footer = varint(0) + varint(0) + varint(len(table)) + varint(len(index) - 5)
    return table + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_google(folder, arrays, config=CONFIG):
    """A folder as Google's zips hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, data = {}, b""
    for name in sorted(arrays):
        raw = np.ascontiguousarray(arrays[name]).tobytes()
        entries[name] = (arrays[name].shape, len(data), len(raw))
        data += raw
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "bert_model.ckpt.index").write_bytes(index_bytes(entries))
    (folder / "bert_model.ckpt.data-00000-of-00001").write_bytes(data)
    return folder


def write_hugging_face(folder, tensors):
    """A folder of the hub's layout: config.json, vocab.txt, model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save(tensors, {"format": "pt"})
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length] + b" ", content[8 + length :]  # of an odd length, as in files of 2022
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length + 1) + header + body)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return folder


def write_roberta(folder, safe=True, vocab=None):
    """A small random RoBERTa as `transformers` saves it: (folder, the model). vocab: (vocab.json, merges.txt) as texts.

    Without a vocab its tokenizer knows the bytes and two merges. safe: model.safetensors, else pytorch_model.bin.
    """
    if vocab is None:
        merges = [("t", "h"), ("th", "e"), ("\u0120", "the")]  # U+0120 stands for a space
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "th", "the", "\u0120the", "<mask>"]
        ids = {token: i for i, token in enumerate(tokens)}
        vocab = json.dumps(ids), "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(json.loads(vocab[0])), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    reference = RobertaModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # away from the start, where biases and positions hardly matter
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    if safe:
        reference.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        weights = {f"roberta.{name}": tensor for name, tensor in reference.state_dict().items()}
        torch.save(weights, folder / "pytorch_model.bin")
    (folder / "vocab.json").write_text(vocab[0])
    (folder / "merges.txt").write_text(vocab[1])
    return folder, reference


# GLUE's files as they are: {file: (first line, a row)}, spelt out to check data.py's own table.
def files(train, test):
    return {"train.tsv": train, "dev.tsv": train, "test.tsv": test}


MNLI_TEXT = "promptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI_HEAD, MNLI_ROW = f"index\t{MNLI_TEXT}\tsentence1\tsentence2", "{i}\t1\t1n\tfiction\t( x )\t( y )\tx\ty\t{a}\t{b}"
MNLI_DEV = (MNLI_HEAD + "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label", MNLI_ROW + "\tx\tx\tx\tx\tx\t{label}")
PAIR, SINGLE = ("index\tsentence1\tsentence2", "{i}\t{a}\t{b}"), ("index\tsentence", "{i}\t{a}")
LABELLED = (PAIR[0] + "\tlabel", PAIR[1] + "\t{label}")
QQP = ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t7\t8\t{a}\t{b}\t{label}")
GLUE = {
    "CoLA": files(("", "gj04\t{label}\t*\t{a}"), SINGLE),
    "SST-2": files(("sentence\tlabel", "{a} \t{label}"), SINGLE),
    "QQP": files(QQP, ("id\tquestion1\tquestion2", "{i}\t{a}\t{b}")),
    "MNLI": {
        "train.tsv": (MNLI_HEAD + "\tlabel1\tgold_label", MNLI_ROW + "\tx\t{label}"),
        **dict.fromkeys(("dev_matched.tsv", "dev_mismatched.tsv"), MNLI_DEV),
        **dict.fromkeys(("test_matched.tsv", "test_mismatched.tsv"), (MNLI_HEAD, MNLI_ROW)),
    },
    "QNLI": files(("index\tquestion\tsentence\tlabel", LABELLED[1]), ("index\tquestion\tsentence", PAIR[1])),
    "RTE": files(LABELLED, PAIR),
    "WNLI": files(LABELLED, PAIR),
}
ENTAILMENT = ("not_entailment", "entailment")
WORDS = {"MNLI": ("neutral", "entailment", "contradiction"), "RTE": ENTAILMENT, "QNLI": ENTAILMENT}


def write_glue(folder, name, examples=40):
    """A small task in GLUE's own format: the second sentence repeats the first, says something else, or a third thing.

    Returns ({file: [(first, second, label word)]}), what was written.
    """
    rng, written = random.Random(0), {}
    (folder / name).mkdir(parents=True)
    if name == "MNLI":  # whose models answer the diagnostic set, too
        (folder / "AX.tsv").write_text(PAIR[0] + "\n" + "".join(f"{i}\ta b\tc\n" for i in range(examples)))
    words = WORDS.get(name, ("0", "1"))
    for file, (header, row) in GLUE[name].items():
        written[file] = []
        for i in range(examples):
            first = " ".join(rng.choices([*"efghij", '"'], k=rng.randint(2, 9)))
            kind = rng.randrange(len(words))
            second = (" ".join(rng.choices("abcd", k=4)), first, "not " + first)[kind]
            written[file].append((first, second, words[kind]))
        lines = [row.format(i=i, a=a, b=b, label=label) for i, (a, b, label) in enumerate(written[file])]
        end = "" if (name, file) == ("CoLA", "dev.tsv") else "\n"
        (folder / name / file).write_text("\n".join([header] * bool(header) + lines) + end)
    return written


def refuse(call, *words):
    """Check that a call without arguments raises an error of one printable line that is not too long and has words."""
    with pytest.raises(data.InputError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 450 and "weights_only" not in message, message
    assert all(word in message for word in words), message


@contextlib.contextmanager
def small_toy_task(divisor):
    """The toy task with fewer sentences: training then takes seconds."""
    whole = data.toy_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy_examples", lambda count, seed: whole(count // divisor if count > 100 else count, seed))
        yield


def short_toy_run(folder, batch, *flags):
    """Train one epoch of the toy task into a folder: the folder."""
    argv = ["--epochs", "1", "--lr", "1e-3", "--batch", str(batch), "--out", str(folder), *flags]
    assert train.command(train.main, argv) == 0
    return folder


def scattered(model):
    """The model with random weights, with which it answers differently for every example and block."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            small = name.startswith("heads.") and ".halt." not in name
            torch.nn.init.normal_(weight, std=0.17 if small else 0.3)
    for module in model.modules():
        if isinstance(module, dact.Scale):
            module.mean.zero_(), module.var.fill_(1)
        if isinstance(module, dact.DactModule):
            torch.nn.init.constant_(module.halt.bias, 2.0)
    return model.eval()
