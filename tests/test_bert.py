"""bert.py against `transformers` on the same weights, and its loaders against all that can be wrong with a file."""

import json
import math
import shutil
import struct

import fakes
import numpy as np
import pytest
import torch
from fakes import (
    ASSETS,
    CONFIG,
    VOCAB,
    google_arrays,
    hugging_face_names,
    needs_assets,
    write_google,
    write_hugging_face,
    write_roberta,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel, BertTokenizer, PreTrainedTokenizerFast, RobertaModel, RobertaTokenizer

import bert
import dact
import data

MODELS = ASSETS / "models"
ROBERTA = ASSETS / "roberta-tokenizer"
DATA_FILE = "bert_model.ckpt.data-00000-of-00001"


@pytest.fixture
def google(tmp_path):
    return write_google(tmp_path / "google", google_arrays())


@pytest.fixture
def hub(tmp_path):
    return write_hugging_face(tmp_path / "hub", hugging_face_names(google_arrays()))


@pytest.fixture
def roberta(tmp_path):
    return write_roberta(tmp_path / "roberta", safe=False)[0]


def change_json(path, **changes):
    """Set keys of a JSON file's dictionary; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def real_batch(tokenizer, pad_id, max_tokens=128):
    """Pairs of RTE's dev set, padded, with both segments (also where the tokenizer numbers them all 0)."""
    _, dev = data.load_task("rte", ASSETS / "glue")
    dataset = data.Dataset(data.Examples(dev.texts[:24], dev.labels[:24]), tokenizer, max_tokens, pad_id)
    (input_ids, segment_ids, mask), _ = dataset.batch(np.arange(24))
    assert not mask.all()
    if pad_id == 1 and tokenizer.token_to_id("<s>") is not None:  # RoBERTa has one segment
        return input_ids, segment_ids, mask
    segment_ids = (torch.arange(mask.shape[1]) > mask.sum(1, keepdim=True) // 2).long() * mask
    assert segment_ids.any()
    return input_ids, segment_ids, mask


@torch.no_grad()
def assert_same_hidden_states(model, reference, input_ids, segment_ids, mask):
    """Every block's hidden states on real tokens, to 1e-5."""
    model.eval(), reference.eval()
    expected = reference(
        input_ids=input_ids, token_type_ids=segment_ids, attention_mask=mask.long(), output_hidden_states=True
    ).hidden_states
    hidden = model.embed(input_ids, segment_ids)
    torch.testing.assert_close(hidden[mask], expected[0][mask], atol=1e-5, rtol=0)
    assert len(expected) == len(model.blocks) + 1
    for block, wanted in zip(model.blocks, expected[1:]):
        hidden = block(hidden, mask)
        torch.testing.assert_close(hidden[mask], wanted[mask], atol=1e-5, rtol=0)


def arrays_of(folder):
    """{name: float32 array} of a TensorFlow checkpoint, by its index alone."""
    content = (folder / DATA_FILE).read_bytes()
    entries, _, _ = bert.read_index((folder / "bert_model.ckpt.index").read_bytes())
    return {
        name: np.frombuffer(content, np.float32, math.prod(shape), offset).reshape(shape)
        for name, (shape, _, offset) in entries.items()
    }


def reference_from_google(folder):
    """transformers' BertModel, filled from a TensorFlow checkpoint through the mapping in fakes.py."""
    reference = BertModel(ReferenceConfig(**json.loads((folder / "bert_config.json").read_text())))
    reference.load_state_dict(hugging_face_names(arrays_of(folder)))
    return reference


# ---- The same numbers as transformers -------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("name, pad_id", [("minilm_L-6_H-384_A-12", 0), ("e5-small-12L", 1)])
def test_real_models_equal_transformers(name, pad_id):
    model, tokenizer = bert.load_pretrained(MODELS / name, 2)
    if pad_id:
        reference = BertModel.from_pretrained(MODELS / name, dtype=torch.float32)
    else:
        reference = reference_from_google(MODELS / name)
    assert_same_hidden_states(model.bert, reference, *real_batch(tokenizer, pad_id))


@needs_assets
def test_tiny_random_from_tensorflow_equals_transformers_and_its_arrays():
    folder = MODELS / "tiny_random_L-2_H-32_A-2"
    expected = {name.replace("|", "/"): array for name, array in np.load(folder / "expected.npz").items()}
    tensors = bert.read_weights(folder)
    assert expected.keys() <= tensors.keys()
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in expected.items())
    config = bert.BertConfig.from_dict(json.loads((folder / "bert_config.json").read_text()))
    model = bert.build(config, 2, tensors, folder)
    tokenizer = bert.read_tokenizer(MODELS / "minilm_L-6_H-384_A-12")
    input_ids, segment_ids, mask = real_batch(tokenizer, 0, max_tokens=64)
    assert_same_hidden_states(model.bert, reference_from_google(folder), input_ids % 128, segment_ids, mask)


def test_small_random_model_equals_transformers(google):
    model, _ = bert.load_pretrained(google, 2)
    mask = torch.arange(9) < torch.tensor([9, 3, 6])[:, None]
    batch = torch.randint(len(VOCAB), (3, 9)), torch.randint(2, (3, 9)), mask
    assert_same_hidden_states(model.bert, reference_from_google(google), *batch)


def test_attention_in_training_is_that_of_evaluation():
    config = bert.BertConfig(8, 32, 1, 4, 64, attention_probs_dropout_prob=0.0)
    attention, hidden, mask = bert.SelfAttention(config), torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    expected = attention.train()(hidden, mask)
    torch.testing.assert_close(expected, attention.eval()(hidden, mask), atol=1e-6, rtol=1e-5)
    attention.dropout.p = 0.5
    assert not torch.allclose(attention.train()(hidden, mask), expected, atol=1e-3)
    changed = hidden.clone()
    changed[1, 4:] += 1  # what is padding is not looked at
    attention.dropout.p = 0.0
    torch.testing.assert_close(attention(changed, mask)[1, :4], expected[1, :4])


@needs_assets
@pytest.mark.parametrize("task", ["rte", "mrpc"])
@pytest.mark.parametrize("name", ["minilm_L-6_H-384_A-12", "e5-small-12L", "roberta"])
@pytest.mark.parametrize("max_tokens", [512, 40], ids=["whole", "cut"])
def test_token_ids_equal_transformers(task, name, max_tokens):
    path = ROBERTA if name == "roberta" else MODELS / name
    if name == "roberta":
        reference = RobertaTokenizer.from_pretrained(path)
    elif name.startswith("minilm"):
        reference = BertTokenizer(vocab=str(path / "vocab.txt"), do_lower_case=True)
    else:
        reference = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    _, dev = data.load_task(task, ASSETS / "glue")
    dataset = data.Dataset(dev, bert.read_tokenizer(path), max_tokens, 0)
    expected = reference([a for a, _ in dev.texts], [b for _, b in dev.texts], truncation=True, max_length=max_tokens)
    assert [ids.tolist() for ids in dataset.input_ids] == expected["input_ids"]
    if name.startswith("minilm"):
        assert [ids.tolist() for ids in dataset.segment_ids] == expected["token_type_ids"]


@needs_assets
def test_a_genuine_index_of_google():
    folder = MODELS / "uncased_L-8_H-512_A-8.index-only"
    entries, num_shards, lengths = bert.read_index((folder / "bert_model.ckpt.index").read_bytes())
    assert num_shards == 1 and len(entries) == 142
    assert entries["bert/embeddings/word_embeddings"][0] == (30522, 512)
    assert lengths == {0: 166_673_648}  # the data file's known size
    refuse(folder, DATA_FILE, "No such file")


# ---- RoBERTa --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", ["small", pytest.param("real", marks=needs_assets)])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_roberta_equals_transformers(tmp_path, safe, vocab):
    files = tuple((ROBERTA / name).read_text("utf-8") for name in ("vocab.json", "merges.txt") if vocab == "real")
    folder, reference = write_roberta(tmp_path / "hub", safe, files or None)
    model, tokenizer = bert.load_pretrained(folder, 2)
    assert model.bert.config.first_position == 2 and model.bert.config.layer_norm_eps == 1e-5
    texts = [("the cat", "sat on the mat"), ("a", "b <pad> c")]  # a pad token inside a text counts as no position
    dataset = data.Dataset(data.Examples(texts, [0, 1]), tokenizer, 128, 1)
    assert_same_hidden_states(model.bert, reference, *dataset.batch(np.arange(2))[0])
    if safe:
        assert_same_hidden_states(model.bert, RobertaModel.from_pretrained(folder), *dataset.batch(np.arange(2))[0])
    if vocab == "real":
        assert_same_hidden_states(model.bert, reference, *real_batch(tokenizer, 1))
        assert tokenizer.encode("Hello world!").ids == [0, 31414, 232, 328, 2]  # as in RoBERTa's own examples


def test_roberta_pairs_and_segments(roberta):
    _, tokenizer = bert.load_pretrained(roberta, 2)
    encoding = tokenizer.encode("the", "a the")
    assert encoding.tokens == ["<s>", "the", "</s>", "</s>", "a", "\u0120the", "</s>"]
    assert encoding.type_ids == [0] * 7
    assert tokenizer.encode("x <mask>").ids[2] == tokenizer.token_to_id("<mask>")  # the mask takes its space along
    (roberta / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    reference = RobertaTokenizer.from_pretrained(roberta, add_prefix_space=True)
    assert bert.read_tokenizer(roberta).encode("the", "a the").ids == reference("the", "a the")["input_ids"]


def test_a_roberta_whose_config_does_not_say_so(roberta, tmp_path):
    expected, _ = bert.load_pretrained(roberta, 2)
    change_json(roberta / "config.json", model_type=None)
    model, _ = bert.load_pretrained(roberta, 2)
    assert model.bert.config == expected.bert.config and model.bert.config.first_position == 2
    for kind, words in (("bert", "its weights are a RoBERTa's"), ("camembert", "model_type is 'camembert'")):
        change_json(roberta / "config.json", model_type=kind)
        refuse(roberta, words)
    bare, _ = write_roberta(tmp_path / "bare")  # whose names do not say it, either
    change_json(bare / "config.json", model_type=None)
    refuse(bare, "model_type is 'missing'")


def test_pads_from_which_roberta_counts(tmp_path):
    """Google's config has no pad_token_id. In BERT pads are masked, so any token serves; RoBERTa counts from it."""
    vocab = ["[MASK]", "[PAD]", *(token for token in VOCAB if token not in ("[MASK]", "[PAD]"))]
    _, tokenizer = bert.load_pretrained(write_google(tmp_path / "m", google_arrays(), vocab=vocab), 2)
    assert tokenizer.token_to_id("[PAD]") == 1
    folder = write_roberta(tmp_path / "r")[0]
    change_json(folder / "config.json", pad_token_id=0)
    refuse(folder, "<pad> is not the config's pad_token_id")


def test_bad_byte_level_vocabulary(roberta):
    ids = json.loads((roberta / "vocab.json").read_text())
    for vocab, word in (
        ([1], "tokenizer"),
        (ids | {"a": -1}, "tokenizer"),
        ({"a": 0}, "tokenizer"),
        (ids | {"more": len(ids)}, f"tokens 0..{len(ids)}, the model {len(ids)}"),
        ({token: i for token, i in ids.items() if token != "th"}, "Token `th` out of vocabulary"),
        (ids | {f"more{i}": len(ids) + i for i in range(1000)}, "merges.txt is cut"),
    ):
        (roberta / "vocab.json").write_text(json.dumps(vocab))
        refuse(roberta, word)
    (roberta / "vocab.json").write_text(json.dumps(ids))
    (roberta / "merges.txt").write_text("t h e\n")
    refuse(roberta, "tokenizer")
    (roberta / "merges.txt").unlink()
    refuse(roberta, "tokenizer", "No such file")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["google", "roberta"])
def test_padding_changes_no_answer(request, kind):
    """Hidden states, answers and halting values of every block, alone and beside a longer sequence's padding."""
    model, tokenizer = bert.load_pretrained(request.getfixturevalue(kind), 3)
    examples = data.Examples([("the cat", "sat"), ("the", "the " * 30)], [0, 1])
    dataset = data.Dataset(examples, tokenizer, 128, model.bert.config.pad_token_id)
    adaptive = dact.DactBert(model.bert, 3).eval()
    torch.nn.init.normal_(adaptive.heads[0].halt.weight)
    (alone, _), (padded, _) = dataset.batch(np.array([0])), dataset.batch(np.array([0, 1]))
    length = alone[0].shape[1]
    assert padded[0].shape[1] > length + 10
    for found, with_padding in zip(adaptive(*alone), adaptive(*padded)):  # y (N, B, C), h (N, B)
        torch.testing.assert_close(with_padding[:, :1], found, atol=1e-6, rtol=0)
    hidden, wide = model.bert.embed(*alone[:2]), model.bert.embed(*padded[:2])
    torch.testing.assert_close(wide[:1, :length], hidden, atol=1e-6, rtol=0)
    for block in model.bert.blocks:
        hidden, wide = block(hidden, alone[2]), block(wide, padded[2])
        torch.testing.assert_close(wide[:1, :length], hidden, atol=2e-6, rtol=0)


# ---- Where weights come from ----------------------------------------------------------------------------------------


def assert_same_weights(model, other, tolerance=0.0):
    """All but the fresh classification layer."""
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        if not name.startswith("classifier.linear"):
            torch.testing.assert_close(tensor, wanted[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "bert.", "module.bert."])
@pytest.mark.parametrize("old", [False, True], ids=["weight-bias", "gamma-beta"])
def test_hugging_face_folder(tmp_path, google, dtype, prefix, old):
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in hugging_face_names(google_arrays()).items()}
    if old:  # as the hub's files of 2018 call them
        names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in tensors}
        tensors = {names[name].replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()}
    tensors |= {"cls.predictions.bias": torch.zeros(3), prefix + "embeddings.position_ids": torch.arange(3)}
    model, _ = bert.load_pretrained(write_hugging_face(tmp_path / "hub", tensors), 2)
    expected, _ = bert.load_pretrained(google, 2)
    assert_same_weights(model, expected, tolerance=0.0 if dtype == torch.float32 else 0.01)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_a_missing_pooler_starts_fresh_and_is_said(tmp_path, capsys):
    tensors = {name: t for name, t in hugging_face_names(google_arrays()).items() if "pooler" not in name}
    model, _ = bert.load_pretrained(write_hugging_face(tmp_path / "hub", tensors), 2)
    assert "no pooler" in capsys.readouterr().out
    assert 0.01 < model.classifier.pooler.weight.std() < 0.03  # N(0, 0.02), cut


@pytest.mark.parametrize("kind, file", [("google", DATA_FILE), ("hub", "model.safetensors")])
def test_loaded_weights_do_not_change_the_file(request, kind, file):
    folder = request.getfixturevalue(kind)
    before = (folder / file).read_bytes()
    model, _ = bert.load_pretrained(folder, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / file).read_bytes() == before


def test_fine_tuned_checkpoints(tmp_path, google, capsys):
    """The head of a task and an optimiser's slots are left out, and said so, under any name of a checkpoint."""
    expected, _ = bert.load_pretrained(google, 2)
    more = {"output_weights": np.zeros((2, 8), np.float32), "bert/pooler/dense/bias/Adam_1": np.zeros(8, np.float32)}
    folder = write_google(tmp_path / "tuned", google_arrays() | more)
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"bert_model.ckpt.{suffix}").rename(folder / f"model.ckpt-20.{suffix}")
    (folder / "._model.ckpt-20.index").write_bytes(b"Mac")
    capsys.readouterr()
    assert_same_weights(bert.load_pretrained(folder, 2)[0], expected)
    out = capsys.readouterr().out
    assert "left out" in out and "output_weights" in out and "adam_m" in out and "no pooler" not in out
    shutil.copy(folder / "model.ckpt-20.index", folder / "model.ckpt-30.index")
    refuse(folder, "model.ckpt-20.index and model.ckpt-30.index are two checkpoints")
    head = {"module.classifier.weight": torch.zeros(2, 8)}
    tensors = {f"module.bert.{name}": tensor for name, tensor in hugging_face_names(google_arrays()).items()}
    hub = write_hugging_face(tmp_path / "hub", tensors | head)
    assert_same_weights(bert.load_pretrained(hub, 2)[0], expected)
    assert "module.classifier.weight" in capsys.readouterr().out


def test_weights_in_several_files(tmp_path, google):
    tensors, folder, parts = hugging_face_names(google_arrays()), tmp_path / "hub", {}
    for i in (0, 1):
        part = sorted(tensors)[i::2]
        write_hugging_face(folder, {name: tensors[name] for name in part})
        (folder / "model.safetensors").rename(folder / f"model-{i}.safetensors")
        parts |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / "config.json").rename(folder / "bert_config.json")  # Google's name beside PyTorch's weights
    assert_same_weights(bert.load_pretrained(folder, 2)[0], bert.load_pretrained(google, 2)[0])
    (folder / "model-1.safetensors").unlink()
    refuse(folder, "model-1.safetensors", "No such file")


def test_prefixes_and_the_language_model_head_are_passed_over(roberta):
    expected, _ = bert.load_pretrained(roberta, 2)
    weights = torch.load(roberta / "pytorch_model.bin")
    bare = {name.removeprefix("roberta."): tensor for name, tensor in weights.items()} | {"lm_head.bias": torch.ones(3)}
    torch.save(bare, roberta / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(bert.load_pretrained(roberta, 2)[0], expected)  # also: the format of before torch 1.6


def test_a_local_folder_with_a_known_name(google, monkeypatch):
    google.rename(google.with_name("bert-tiny"))
    monkeypatch.chdir(google.parent)
    assert bert.load_pretrained("bert-tiny", 2)[0].bert.config.hidden_size == 8
    monkeypatch.setenv("HOME", str(google.parent))
    assert bert.find_model("~/bert-tiny") == google.with_name("bert-tiny")


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def test_cased_or_uncased_is_read_off_the_vocabulary():
    uncased = bert.wordpiece_tokenizer(VOCAB)
    assert uncased.encode("The CATS", "é z").tokens == ["[CLS]", "the", "cat", "##s", "[SEP]", "e", "[UNK]", "[SEP]"]
    assert uncased.encode("The CATS", "cat").type_ids == [0, 0, 0, 0, 0, 1, 1]
    few = [*VOCAB, "The", "<S>", "<URL>", "COVID"]  # some capitals make no cased vocabulary
    assert bert.wordpiece_tokenizer(few).encode("The the").tokens == ["[CLS]", "the", "the", "[SEP]"]
    cased = bert.wordpiece_tokenizer([*VOCAB, "The", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
    assert cased.encode("The the THE").tokens == ["[CLS]", "The", "the", "[UNK]", "[SEP]"]
    cased = bert.wordpiece_tokenizer(few, settings={"do_lower_case": False})
    assert cased.encode("The the").tokens[1:3] == ["The", "the"]


def test_a_tokenizer_config_is_obeyed(hub):
    """What `transformers` makes of the same folder, for each setting."""
    text = "The CATS é猫 sat"
    for settings in ({"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False},
                     {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}):  # fmt: skip
        (hub / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
        reference = BertTokenizer(vocab=str(hub / "vocab.txt"), **({"do_lower_case": True} | settings))
        _, tokenizer = bert.load_pretrained(hub, 2)
        assert tokenizer.encode(text).ids == reference(text)["input_ids"], settings
    for kind in ("BertJapaneseTokenizer", "HerbertTokenizerFast"):  # which find words otherwise
        (hub / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        refuse(hub, f"no {kind} can be made", "add its tokenizer.json")


@pytest.mark.parametrize("ending", ["\n\n", "", " \n", "\r\n"])
def test_a_vocabulary_as_editors_leave_it(google, ending):
    """With a byte order mark, spaces after a word, blank lines at the end."""
    expected = bert.load_pretrained(google, 2)[1].get_vocab()
    text = "\ufeff" + "\n".join([VOCAB[0] + " ", *VOCAB[1:]]) + ending
    (google / "vocab.txt").write_bytes(text.encode())
    assert bert.load_pretrained(google, 2)[1].get_vocab() == expected


def test_a_vocabulary_that_may_be_cut_is_said(google, capsys):
    bert.load_pretrained(google, 2)
    assert "is its file whole" not in capsys.readouterr().out
    (google / "vocab.txt").write_text("\n".join(VOCAB[:-5]))
    bert.load_pretrained(google, 2)
    assert f"the tokenizer has {len(VOCAB) - 5} tokens, the model {len(VOCAB)}" in capsys.readouterr().out


def test_bad_vocabulary(google):
    for content, *words in (
        (b"the\ncat\n", "[SEP]"),
        ("\n".join([*VOCAB, "one", "more"]).encode(), "tokens 0..23, the model 22"),
        ("\n".join([*VOCAB[:-1], VOCAB[5], VOCAB[-1]]).encode(), "tokens 0..22"),  # a line twice: as many words
        (b"\xff\xfe", "UnicodeDecodeError"),
    ):
        (google / "vocab.txt").write_bytes(content)
        refuse(google, "tokenizer" if len(content) < 9 else "", *words)
    (google / "vocab.txt").unlink()
    refuse(google, "vocab.txt", "No such file")
    (google / "tokenizer.json").write_text("{}")
    refuse(google, "the tokenizer")
    for bare in (WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), BPE()):  # the heads would read a word for [CLS]
        (google / "tokenizer.json").write_text(Tokenizer(bare).to_str())
        refuse(google, "")
    (google / "tokenizer.json").write_text(Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str())
    refuse(google, "no [CLS] and [SEP]")


def test_a_tokenizer_made_to_hurt(google):
    """Padding to 30 million tokens; an unknown word that there is not; segments that the model has no rows for."""
    whole = json.loads(bert.read_tokenizer(google).to_str())
    fixed = {"strategy": {"Fixed": 30_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
             "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    (google / "tokenizer.json").write_text(json.dumps(whole | {"padding": fixed}))
    assert len(bert.load_pretrained(google, 2)[1].encode("the cat").ids) == 4
    (google / "tokenizer.json").write_text(json.dumps(whole | {"model": whole["model"] | {"unk_token": "nope"}}))
    refuse(google, "WordPiece error")
    (google / "tokenizer.json").write_text(json.dumps(whole))
    arrays = google_arrays(CONFIG | {"type_vocab_size": 1})
    write_google(google, arrays, CONFIG | {"type_vocab_size": 1})
    refuse(google, "segments 0..1, the model 1")


# ---- Bad input: one line each, that names the thing -----------------------------------------------------------------


def refuse(path, *words):
    fakes.refuse(lambda: bert.load_pretrained(path, 2), *words)


def test_a_data_file_of_another_length(google):
    whole = (google / DATA_FILE).read_bytes()
    for broken in (whole[:-1000], b"1234" + whole, whole[:99] + whole[103:]):
        (google / DATA_FILE).write_bytes(broken)
        refuse(google, DATA_FILE, f"it has {len(broken)} bytes, its index says {len(whole)}")
    (google / DATA_FILE).write_bytes(b"")
    refuse(google, DATA_FILE, "empty")


def test_a_cut_index(google):
    content = (google / "bert_model.ckpt.index").read_bytes()
    for length in (0, 7, 47, 48, 100, len(content) - 1):
        (google / "bert_model.ckpt.index").write_bytes(content[:length])
        refuse(google, "bert_model.ckpt.index", "magic number")
        (google / "bert_model.ckpt.index").write_bytes(content[-max(48, length) :])
        refuse(google, "bert_model.ckpt.index")


def test_missing_left_over_misshapen_and_doubled_tensors(tmp_path):
    arrays = google_arrays()
    key = "bert/encoder/layer_1/attention/self/key/kernel"
    without = {name: array for name, array in arrays.items() if name != key}
    refuse(write_google(tmp_path / "a", without), "Missing key", "bert.blocks.1.attention.key.weight")
    refuse(
        write_google(tmp_path / "b", arrays | {"bert/extra": np.zeros(3, np.float32)}), "Unexpected key", "bert.extra"
    )
    refuse(write_google(tmp_path / "c", arrays | {key: np.zeros((8, 7), np.float32)}), "size mismatch", "[7, 8]")
    tensors = hugging_face_names(arrays)
    word = "embeddings.word_embeddings.weight"
    refuse(write_hugging_face(tmp_path / "d", tensors | {f"bert.{word}": tensors[word]}), "twice, under two names")
    integers = tensors | {word: tensors[word].long()}  # of a quantised model: not what the weights are
    refuse(write_hugging_face(tmp_path / "e", integers), "Missing key", "bert.embed.word.weight")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": 3}, ("Missing key", "blocks.2.")),
        ({"num_hidden_layers": 1}, ("Unexpected key", "blocks.1.")),
        ({"num_hidden_layers": 0}, ("Unexpected key", "blocks.0.")),
        ({"num_hidden_layers": 10**9}, ("1000000000 blocks of size 8 are too large",)),
        ({"intermediate_size": 16}, ("size mismatch", "blocks.0.up.weight", "[12, 8]")),
        ({"num_attention_heads": 3}, ("hidden_size", "num_attention_heads")),
        ({"num_attention_heads": 0}, ("ZeroDivisionError",)),
        ({"hidden_size": "eight"}, ("'eight'",)),
        ({"hidden_size": [8]}, ("TypeError", "list")),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"hidden_size": 800_000}, ("2 blocks of size 800000 are too large",)),
        ({"vocab_size": 10**30}, ("Overflow",)),
        ({"vocab_size": 20}, ("tokens 0..21, the model 20",)),
        ({"pad_token_id": 99}, ("tokens 0..99, the model 22",)),
        ({"pad_token_id": -1}, ("tokens -1..21",)),
        ({"hidden_dropout_prob": 1.5}, ("dropout", "1.5")),
        ({"is_decoder": True}, ("is_decoder is 'True'",)),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type", "relative_key")),
        ({"hidden_act": "relu"}, ("hidden_act is 'relu'",)),
        ({"model_type": "gpt2\x1b[31m\n"}, ("gpt2?[31m",)),
    ],
)
def test_config_that_does_not_fit(google, change, words):
    change_json(google / "bert_config.json", **change)
    refuse(google, *words)


@pytest.mark.parametrize(
    "content", ['{"vocab_size": 30522,', '{"vocab_size": 30522}', "[" * 100_000, "[1]", "\xff", ""]
)
def test_config_that_is_broken_or_incomplete(google, content):
    (google / "bert_config.json").write_text(content, "latin-1")
    refuse(google, "google")


def test_bad_safetensors(hub):
    file = hub / "model.safetensors"
    content = file.read_bytes()
    first = 8 + struct.unpack("<Q", content[:8])[0]
    head, body = content[:first], content[first:]
    for broken in (
        content[:-100],
        content[:100],
        b"",
        struct.pack("<Q", 1 << 60) + content[8:],
        content[:8] + b"[" + content[9:],
        head.replace(b'"F32"', b'"F99"') + body,
        head.replace(b'"F32"', b"[3.2]") + body,
        *(head.replace(b"[8, 8]", shape) + body for shape in (b"[8, 7]", b"[8,-8]", b"[8.,8]", b"[9999]")),
    ):
        file.write_bytes(broken)
        refuse(hub, "hub")
    file.unlink()
    refuse(hub, "no *.ckpt.index, model.safetensors or pytorch_model.bin")


@pytest.mark.filterwarnings("ignore")  # torch's, of the format of its last file
def test_bad_bin(roberta, tmp_path):
    file = roberta / "pytorch_model.bin"
    content, weights = file.read_bytes(), torch.load(file)
    for broken in (content[:-100], content[:100], b"x" * 50):
        file.write_bytes(broken)
        refuse(roberta, "pytorch_model.bin")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    name = "roberta.embeddings.LayerNorm.weight"
    for strange in ([1, 2], {1: torch.zeros(2)}, weights | {name: 3}, weights | {"roberta.extra": torch.zeros(2)},
                    weights | {"evil": Evil()}, weights | {name: weights[name].to(torch.int8)}):  # fmt: skip
        torch.save(strange, file)
        refuse(roberta, "roberta")
    assert not (tmp_path / "evil").exists()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(file))  # of which torch's own words are other ones
    refuse(roberta, "no whole file of torch.save")


def test_paths_that_are_no_model(tmp_path, google):
    refuse("bert-huge", "unknown model 'bert-huge'", "bert-base-uncased")
    (tmp_path / "model.zip").write_text("a zip")
    refuse(tmp_path / "model.zip", "unpack a zip first")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no *.ckpt.index, model.safetensors")
    (google / "bert_config.json").unlink()
    refuse(google, "config.json", "No such file")
