"""bert.py against `transformers` on the same weights, and its loaders against all that can be wrong with a file."""

import hashlib
import json
import os
import struct
import zipfile

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
    zip_folder,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel, BertTokenizer, PreTrainedTokenizerFast, RobertaModel, RobertaTokenizer

import bert
import dact
import data
from data import InputError

MODELS = ASSETS / "models"
ROBERTA = ASSETS / "roberta-tokenizer"


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


def reference_from_google(folder):
    """transformers' BertModel, filled from a TensorFlow checkpoint through the mapping in fakes.py."""
    content = (folder / "bert_model.ckpt.data-00000-of-00001").read_bytes()
    entries, _ = bert.read_index((folder / "bert_model.ckpt.index").read_bytes(), "index")
    arrays = {
        name: np.frombuffer(content, np.float32, e.size // 4, e.offset).reshape(e.shape)
        for name, e in entries.items()
        if e.dtype == 1
    }
    reference = BertModel(ReferenceConfig(**json.loads((folder / "bert_config.json").read_text())))
    reference.load_state_dict(hugging_face_names(arrays))
    return reference


# ---- The same numbers as transformers -------------------------------------------------------------------------------


@needs_assets
def test_minilm_from_tensorflow_equals_transformers():
    model, tokenizer = bert.load_pretrained(MODELS / "minilm_L-6_H-384_A-12", 2)
    reference = reference_from_google(MODELS / "minilm_L-6_H-384_A-12")
    assert_same_hidden_states(model.bert, reference, *real_batch(tokenizer, 0))


@needs_assets
def test_e5_from_safetensors_equals_transformers():
    model, tokenizer = bert.load_pretrained(MODELS / "e5-small-12L", 2)
    reference = BertModel.from_pretrained(MODELS / "e5-small-12L", dtype=torch.float32)
    assert_same_hidden_states(model.bert, reference, *real_batch(tokenizer, 1))


@needs_assets
def test_tiny_random_from_tensorflow_equals_transformers_and_its_arrays():
    folder = MODELS / "tiny_random_L-2_H-32_A-2"
    config = bert.BertConfig.from_dict(json.loads((folder / "bert_config.json").read_text()))
    read = bert.open_weights(folder, bert.list_files(folder))
    tensors = {bert.standard_name(name): read[name]() for name in filter(bert.is_encoder, read)}
    arrays = {name.replace("|", "/"): array for name, array in np.load(folder / "expected.npz").items()}
    expected = hugging_face_names(arrays)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    model = bert.build(config, 2, read, folder)
    _, tokenizer = bert.load_pretrained(MODELS / "minilm_L-6_H-384_A-12", 2)
    input_ids, segment_ids, mask = real_batch(tokenizer, 0, max_tokens=64)
    assert_same_hidden_states(model.bert, reference_from_google(folder), input_ids % 128, segment_ids, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout(dtype):
    """A tenth is dropped, wherever in a draw of four an element lies; the mean stays; the gradient meets the same."""
    torch.manual_seed(0)
    dropout, x = bert.Dropout(0.1), torch.ones(999, 1001, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and not torch.equal(dropout(x), y)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.9], dtype=dtype), atol=1e-4, rtol=2**-7)
    dropped = (y == 0).flatten()[: 4 * 249_999].view(-1, 4).double()
    assert (dropped.mean(0) - 0.1).abs().max() < 0.003  # 5 standard errors
    assert (torch.corrcoef(dropped.T) - torch.eye(4)).abs().max() < 0.01
    assert (dropped[1:] * dropped[:-1]).mean().item() == pytest.approx(0.01, abs=5e-4)  # one draw and the next
    assert dropout.eval()(x) is x
    assert torch.equal(bert.Dropout(0.0)(x), x) and bert.Dropout(1.0)(torch.ones(10**5)).count_nonzero() < 20


def test_attention_in_training_is_that_of_evaluation():
    config = bert.BertConfig(8, 32, 1, 4, 64, attention_probs_dropout_prob=0.0)
    attention, hidden, mask = bert.SelfAttention(config), torch.randn(3, 7, 32), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    said = attention.train()(hidden, mask)
    torch.testing.assert_close(said, attention.eval()(hidden, mask), atol=1e-6, rtol=1e-5)
    attention.dropout.p = 0.5
    assert not torch.allclose(attention.train()(hidden, mask), said, atol=1e-3)
    changed = hidden.clone()
    changed[1, 4:] += 1  # what is padding is not looked at
    attention.dropout.p = 0.0
    torch.testing.assert_close(attention(changed, mask)[1, :4], said[1, :4])


def test_small_random_model_equals_transformers(tmp_path):
    folder = write_google(tmp_path / "google", google_arrays())
    model, _ = bert.load_pretrained(folder, 2)
    lengths = torch.tensor([9, 3, 6])
    mask = torch.arange(9) < lengths[:, None]
    batch = torch.randint(len(VOCAB), (3, 9)), torch.randint(2, (3, 9)), mask
    assert_same_hidden_states(model.bert, reference_from_google(folder), *batch)


@needs_assets
@pytest.mark.parametrize("task", ["rte", "mrpc"])
@pytest.mark.parametrize("name", ["minilm_L-6_H-384_A-12", "e5-small-12L"])
def test_token_ids_equal_transformers(task, name):
    path = MODELS / name
    tokenizer = bert.read_tokenizer(path, bert.list_files(path))
    if name.startswith("minilm"):
        reference = BertTokenizer(vocab=str(path / "vocab.txt"), do_lower_case=True)
    else:
        reference = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    _, dev = data.load_task(task, ASSETS / "glue")
    dataset = data.Dataset(dev, tokenizer, 128, 0)
    expected = reference([a for a, _ in dev.texts], [b for _, b in dev.texts], truncation=True, max_length=128)
    assert [ids.tolist() for ids in dataset.input_ids] == expected["input_ids"]
    if name.startswith("minilm"):
        assert [ids.tolist() for ids in dataset.segment_ids] == expected["token_type_ids"]


@needs_assets
def test_a_genuine_index_of_google():
    path = MODELS / "uncased_L-8_H-512_A-8.index-only" / "bert_model.ckpt.index"
    entries, num_shards = bert.read_index(path.read_bytes(), "index")
    assert num_shards == 1 and len(entries) == 142
    assert entries["bert/embeddings/word_embeddings"].shape == (30522, 512)
    assert max(entry.offset + entry.size for entry in entries.values()) == 166_673_648  # the data file's known size


def roberta_vocab():
    return tuple((ROBERTA / name).read_text("utf-8") for name in ("vocab.json", "merges.txt"))


@needs_assets
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_roberta_equals_transformers_on_real_pairs(tmp_path, safe):
    folder, reference = write_roberta(tmp_path / "hub", safe, roberta_vocab())
    model, tokenizer = bert.load_pretrained(folder, 2)
    assert model.bert.config.first_position == 2 and model.bert.config.layer_norm_eps == 1e-5
    assert_same_hidden_states(model.bert, reference, *real_batch(tokenizer, 1))
    if safe:
        again = RobertaModel.from_pretrained(folder)
        assert_same_hidden_states(model.bert, again, *real_batch(tokenizer, 1))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_small_roberta_equals_transformers(tmp_path, safe):
    folder, reference = write_roberta(tmp_path / "hub", safe)
    model, tokenizer = bert.load_pretrained(folder, 2)
    texts = [("the cat", "sat on the mat"), ("a", "b <pad> c")]  # a pad token inside a text counts as no position
    dataset = data.Dataset(data.Examples(texts, [0, 1]), tokenizer, 128, 1)
    assert_same_hidden_states(model.bert, reference, *dataset.batch(np.arange(2))[0])


@needs_assets
@pytest.mark.parametrize("task", ["rte", "mrpc"])
def test_roberta_token_ids_equal_transformers(task):
    tokenizer = bert.read_tokenizer(ROBERTA, bert.list_files(ROBERTA))
    reference = RobertaTokenizer.from_pretrained(ROBERTA)
    _, dev = data.load_task(task, ASSETS / "glue")
    for max_tokens in (512, 40):  # whole, and cut
        dataset = data.Dataset(dev, tokenizer, max_tokens, 1)
        pairs = [a for a, _ in dev.texts], [b for _, b in dev.texts]
        expected = reference(*pairs, truncation=True, max_length=max_tokens)["input_ids"]
        assert [ids.tolist() for ids in dataset.input_ids] == expected
    assert tokenizer.encode("Hello world!").ids == [0, 31414, 232, 328, 2]  # as in RoBERTa's own examples


def test_roberta_pairs_and_segments(tmp_path):
    _, tokenizer = bert.load_pretrained(write_roberta(tmp_path / "hub")[0], 2)
    encoding = tokenizer.encode("the", "a the")
    assert encoding.tokens == ["<s>", "the", "</s>", "</s>", "a", "\u0120the", "</s>"]
    assert encoding.type_ids == [0] * 7
    assert tokenizer.encode("x <mask>").ids[2] == tokenizer.token_to_id("<mask>")  # the mask takes its space along


def test_a_vocabulary_that_does_not_begin_with_pad(tmp_path):
    """Google's config has no pad_token_id. In BERT pads are masked, so any token serves; RoBERTa counts from it."""
    vocab = ["[MASK]", "[PAD]", *(token for token in VOCAB if token not in ("[MASK]", "[PAD]"))]
    _, tokenizer = bert.load_pretrained(write_google(tmp_path / "m", google_arrays(), vocab=vocab), 2)
    assert tokenizer.token_to_id("[PAD]") == 1
    folder = write_roberta(tmp_path / "r")[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    refuse(folder, "the tokenizer pads with 1")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padding_changes_no_answer(tmp_path, kind):
    """Hidden states, answers and halting values of every block, alone and beside a longer sequence's padding."""
    folder = write_google(tmp_path / "m", google_arrays()) if kind == "bert" else write_roberta(tmp_path / "m")[0]
    model, tokenizer = bert.load_pretrained(folder, 3)
    dataset = data.Dataset(data.Examples([("the cat", "sat"), ("the", "the " * 30)], [0, 1]), tokenizer, 128,
                           model.bert.config.pad_token_id)  # fmt: skip
    adaptive = dact.DactBert(model.bert, 3).eval()
    torch.nn.init.normal_(adaptive.heads[0].halt[-1].weight)
    (alone, _), (padded, _) = dataset.batch(np.array([0])), dataset.batch(np.array([0, 1]))
    length = alone[0].shape[1]
    assert padded[0].shape[1] > length + 10
    for said, with_padding in zip(adaptive(*alone), adaptive(*padded)):  # y (N, B, C), h (N, B)
        torch.testing.assert_close(with_padding[:, :1], said, atol=1e-6, rtol=0)
    hidden, wide = model.bert.embed(*alone[:2]), model.bert.embed(*padded[:2])
    torch.testing.assert_close(wide[:1, :length], hidden, atol=1e-6, rtol=0)
    for block in model.bert.blocks:
        hidden, wide = block(hidden, alone[2]), block(wide, padded[2])
        torch.testing.assert_close(wide[:1, :length], hidden, atol=2e-6, rtol=0)


# ---- Where weights come from ----------------------------------------------------------------------------------------


def state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.linear")}


def assert_same_weights(model, other, tolerance=0.0):
    assert state(model).keys() == state(other).keys()
    for name, tensor in state(model).items():
        torch.testing.assert_close(tensor, state(other)[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("inside", ["", "uncased_L-2_H-8_A-2/"])
def test_google_zip_flat_and_nested(tmp_path, inside):
    folder = write_google(tmp_path / "google", google_arrays())
    zipped = zip_folder(folder, tmp_path / "model.zip", inside)
    assert_same_weights(bert.load_pretrained(zipped, 2)[0], bert.load_pretrained(folder, 2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_hugging_face_folder(tmp_path, dtype, prefix):
    arrays = google_arrays()
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in hugging_face_names(arrays).items()}
    tensors |= {"cls.predictions.bias": torch.zeros(3), prefix + "embeddings.position_ids": torch.arange(3)}
    model, _ = bert.load_pretrained(write_hugging_face(tmp_path / "hub", tensors), 2)
    expected, _ = bert.load_pretrained(write_google(tmp_path / "google", arrays), 2)
    assert_same_weights(model, expected, tolerance=0.0 if dtype == torch.float32 else 0.01)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_old_gamma_beta_names(tmp_path):
    arrays = google_arrays()
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in hugging_face_names(arrays).items()
    }
    model, _ = bert.load_pretrained(write_hugging_face(tmp_path / "hub", tensors), 2)
    assert_same_weights(model, bert.load_pretrained(write_google(tmp_path / "google", arrays), 2)[0])


def test_a_missing_pooler_starts_fresh_and_is_said(tmp_path, capsys):
    tensors = {name: t for name, t in hugging_face_names(google_arrays()).items() if "pooler" not in name}
    model, _ = bert.load_pretrained(write_hugging_face(tmp_path / "hub", tensors), 2)
    assert "no pooler" in capsys.readouterr().out
    assert 0.01 < model.classifier.pooler.weight.std() < 0.03  # N(0, 0.02), cut


def test_loaded_weights_do_not_change_the_file(tmp_path):
    folder = write_google(tmp_path / "google", google_arrays())
    before = (folder / "bert_model.ckpt.data-00000-of-00001").read_bytes()
    model, _ = bert.load_pretrained(folder, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "bert_model.ckpt.data-00000-of-00001").read_bytes() == before


def test_cased_or_uncased_is_read_off_the_vocabulary():
    uncased = bert.wordpiece_tokenizer(VOCAB)
    assert uncased.encode("The CATS", "é z").tokens == ["[CLS]", "the", "cat", "##s", "[SEP]", "e", "[UNK]", "[SEP]"]
    assert uncased.encode("The CATS", "cat").type_ids == [0, 0, 0, 0, 0, 1, 1]
    few = [*VOCAB, "The", "<S>", "<URL>", "COVID"]  # some capitals make no cased vocabulary
    assert bert.wordpiece_tokenizer(few).encode("The the").tokens == ["[CLS]", "the", "the", "[SEP]"]
    cased = bert.wordpiece_tokenizer([*VOCAB, "The", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
    assert cased.encode("The the THE").tokens == ["[CLS]", "The", "the", "[UNK]", "[SEP]"]
    assert bert.wordpiece_tokenizer(few, settings={"do_lower_case": False}).encode("The the").tokens[1:3] == [
        "The",
        "the",
    ]


def test_a_tokenizer_config_is_obeyed(tmp_path, capsys):
    """What `transformers` makes of the same folder, for each setting; and added tokens, which have ids of their own."""
    folder = write_hugging_face(tmp_path / "hub", hugging_face_names(google_arrays()))
    text = "The CATS é猫 sat"
    for settings in ({"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False},
                     {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}):  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
        reference = BertTokenizer(vocab=str(folder / "vocab.txt"), **({"do_lower_case": True} | settings))
        _, tokenizer = bert.load_pretrained(folder, 2)
        assert tokenizer.encode(text).ids == reference(text)["input_ids"], settings
    assert "tokenizer  lower-cases" in capsys.readouterr().out
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    refuse(folder, "no BertJapaneseTokenizer can be read")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": len(VOCAB)}))
    refuse(folder, f"token {len(VOCAB)} of the tokenizer")  # the table of this model has no row for it
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": len(VOCAB) + 1}))
    refuse(folder, "added_tokens.json", "would be 22")


def test_the_longest_word_is_that_of_the_layout(tmp_path):
    arrays, word = google_arrays(), "a" + "s" * 150
    vocab = ["##s" if token == "##s" else token for token in VOCAB]
    google = bert.load_pretrained(write_google(tmp_path / "g", arrays, vocab=vocab), 2)[1]
    hub = bert.load_pretrained(write_hugging_face(tmp_path / "h", hugging_face_names(arrays)), 2)[1]
    assert google.encode(word).tokens[1:3] == ["a", "##s"] and hub.encode(word).tokens[1] == "[UNK]"


@pytest.mark.parametrize("ending", ["\n\n", "", " \n", "\r\n"])
def test_a_vocabulary_as_editors_leave_it(google, ending):
    """With a byte order mark, spaces after a word, blank lines at the end."""
    expected = bert.load_pretrained(google, 2)[1].get_vocab()
    text = "\ufeff" + "\n".join([VOCAB[0] + " ", *VOCAB[1:]]) + ending
    (google / "vocab.txt").write_bytes(text.encode())
    assert bert.load_pretrained(google, 2)[1].get_vocab() == expected


def test_fine_tuned_checkpoints(tmp_path, capsys):
    """The head of a task and an optimiser's slots are left out, and said so; weights in several files; a prefix."""
    arrays = google_arrays()
    expected, _ = bert.load_pretrained(write_google(tmp_path / "plain", arrays), 2)
    more = {"output_weights": np.zeros((2, 8), np.float32), "bert/pooler/dense/bias/Adam_1": np.zeros(8, np.float32)}
    folder = write_google(tmp_path / "google", arrays | more)
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"bert_model.ckpt.{suffix}").rename(folder / f"model.ckpt-20.{suffix}")
    (folder / "._model.ckpt-20.index").write_bytes(b"Mac")
    assert_same_weights(bert.load_pretrained(folder, 2)[0], expected)
    out = capsys.readouterr().out
    assert "left out" in out and "output_weights" in out
    tensors = {f"module.bert.{name}": tensor for name, tensor in hugging_face_names(arrays).items()}
    head = {"module.classifier.weight": torch.zeros(2, 8)}
    folder = write_hugging_face(tmp_path / "hub", tensors | head)
    assert_same_weights(bert.load_pretrained(folder, 2)[0], expected)
    assert "module.classifier.weight" in capsys.readouterr().out
    names, parts = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        write_hugging_face(folder, {name: tensors[name] for name in part})
        (folder / "model.safetensors").rename(folder / file)
        parts |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / "config.json").rename(folder / "bert_config.json")  # Google's name beside PyTorch's weights
    assert_same_weights(bert.load_pretrained(folder, 2)[0], expected)
    (folder / "model-1.safetensors").unlink()
    refuse(folder, "names 'model-1.safetensors', which is missing")


def test_a_local_folder_with_a_known_name(google, monkeypatch):
    google.rename(google.with_name("bert-tiny"))
    monkeypatch.chdir(google.parent)
    assert bert.load_pretrained("bert-tiny", 2)[0].bert.config.hidden_size == 8
    monkeypatch.setenv("HOME", str(google.parent))
    assert bert.find_model("~/bert-tiny") == google.with_name("bert-tiny")


def test_a_roberta_whose_config_does_not_say_so(tmp_path):
    folder, _ = write_roberta(tmp_path / "r", safe=False)
    expected, _ = bert.load_pretrained(folder, 2)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = bert.load_pretrained(folder, 2)
    assert model.bert.config == expected.bert.config and model.bert.config.first_position == 2
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    refuse(folder, "the weights are a RoBERTa's")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "camembert"}))
    refuse(folder, "model type 'camembert' cannot be read")


def test_files_made_to_hurt(tmp_path, google):
    """Padding to 30 million tokens, a zip that grows, a name with a colour code, two files of one name, a key that is
    none."""
    (google / "tokenizer.json").write_text(bert.read_tokenizer(google, {"vocab.txt"}).to_str())
    written = json.loads((google / "tokenizer.json").read_text())
    fixed = {"strategy": {"Fixed": 30_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
             "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    (google / "tokenizer.json").write_text(json.dumps(written | {"padding": fixed}))
    assert len(bert.load_pretrained(google, 2)[1].encode("the cat").ids) == 4
    written["model"]["unk_token"] = "nope"
    (google / "tokenizer.json").write_text(json.dumps(written))
    refuse(google, "give the tokenizer of the weights")
    (google / "tokenizer.json").unlink()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for file in google.iterdir():
            zipped.write(file, file.name)
        zipped.writestr("a/model.safetensors", bytes(10**8))
        zipped.writestr("b/\x1b[31m.ckpt.index", b"x")
    assert bert.load_pretrained(tmp_path / "bomb.zip", 2)[0]
    with pytest.raises(InputError, match="would have 100000000 bytes"):
        bert.read_file(tmp_path / "bomb.zip", "model.safetensors")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "a") as zipped:
        zipped.writestr("b/vocab.txt", "the")
    assert bert.load_pretrained(tmp_path / "bomb.zip", 2)[1].get_vocab_size() > 1  # a module's own, further in
    with zipfile.ZipFile(tmp_path / "bomb.zip", "a") as zipped, pytest.warns(UserWarning):
        zipped.writestr("vocab.txt", "the")
    refuse(tmp_path / "bomb.zip", "vocab.txt", "several times")
    folder, _ = write_roberta(tmp_path / "r", safe=False)
    torch.save({1: torch.zeros(2)}, folder / "pytorch_model.bin")
    refuse(folder, "no dictionary of tensors")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "neither a folder nor a zip")
    huge = {"bert.x": {"dtype": "F32", "shape": [0, 2**64], "data_offsets": [0, 0]}}
    head = json.dumps(huge).encode()
    hub = write_hugging_face(tmp_path / "hub", hugging_face_names(google_arrays()))
    (hub / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    refuse(hub, "a bad entry for bert.x")


def test_weights_that_are_no_numbers(tmp_path):
    arrays = google_arrays()
    arrays["bert/encoder/layer_1/output/dense/bias"][3] = np.nan
    refuse(write_google(tmp_path / "google", arrays), "bert/encoder/layer_1/output/dense/bias", "not finite")


def test_a_damaged_data_file_of_which_the_sum_is_known(google, monkeypatch):
    content, index = (google / DATA_FILE).read_bytes(), (google / "bert_model.ckpt.index").read_bytes()
    sums = {hashlib.sha256(index).hexdigest(): hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(bert, "DATA_SUMS", sums)
    bert.load_pretrained(google, 2)
    (google / DATA_FILE).write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    refuse(google, "damaged, its sha256 is not")


def test_names_of_google_models():
    assert len([name for name in bert.GOOGLE_MODELS if name.startswith("uncased_L-")]) == 24
    assert bert.GOOGLE_MODELS["bert-base-uncased"] == "2018_10_18/uncased_L-12_H-768_A-12"
    assert bert.GOOGLE_MODELS["bert-medium"] == bert.GOOGLE_MODELS["uncased_L-8_H-512_A-8"]


# ---- Bad input: one line each, that names the thing -----------------------------------------------------------------


def refuse(path, *words):
    with pytest.raises(InputError) as caught:
        bert.load_pretrained(path, 2)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture
def google(tmp_path):
    return write_google(tmp_path / "google", google_arrays())


DATA_FILE = "bert_model.ckpt.data-00000-of-00001"


def test_missing_empty_and_truncated_data_file(google):
    content = (google / DATA_FILE).read_bytes()
    for wrong in (content[:-1000], b"1234" + content, content[:99] + content[103:]):
        (google / DATA_FILE).write_bytes(wrong)
        refuse(google, DATA_FILE, f"has {len(wrong)} bytes, its index says {len(content)}")
    (google / DATA_FILE).write_bytes(b"")
    refuse(google, DATA_FILE, "empty")
    (google / DATA_FILE).unlink()
    refuse(google, DATA_FILE, "missing")


@needs_assets
def test_a_genuine_checkpoint_without_its_data_file():
    refuse(MODELS / "uncased_L-8_H-512_A-8.index-only", DATA_FILE, "missing")


def test_missing_left_over_and_misshapen_tensors(tmp_path):
    arrays = google_arrays()
    key = "bert/encoder/layer_1/attention/self/key/kernel"
    without = {name: array for name, array in arrays.items() if name != key}
    refuse(write_google(tmp_path / "a", without), "missing", "layer.1.attention.self.key")
    refuse(write_google(tmp_path / "b", arrays | {"bert/extra": np.zeros(3, np.float32)}), "no place", "extra")
    refuse(write_google(tmp_path / "c", arrays | {key: np.zeros((8, 7), np.float32)}), "(7, 8)", "(8, 8)")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": 3}, ("missing", "layer.2.")),
        ({"num_hidden_layers": 1}, ("no place", "layer.1.")),
        ({"intermediate_size": 16}, ("shape (12,)", "asks for (16,)")),
        ({"num_attention_heads": 3}, ("hidden_size 8", "num_attention_heads 3")),
        ({"hidden_size": "8"}, ("hidden_size", "'8'")),
        ({"hidden_size": None}, ("hidden_size", "None")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
        ({"vocab_size": 10**30}, ("vocab_size", "1000")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "1000")),
        ({"is_decoder": True}, ("is_decoder", "True")),
        ({"hidden_size": 800_000}, ("shape (8,)", "(800000,)")),
        ({"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob", "1.5")),
        ({"layer_norm_eps": float("nan")}, ("layer_norm_eps", "nan")),
        ({"pad_token_id": 99}, ("token 99", "vocab_size 22")),
        ({"hidden_act": "relu"}, ("hidden_act", "relu")),
        ({"model_type": "gpt2"}, ("gpt2",)),
    ],
)
def test_config_that_does_not_fit(tmp_path, change, words):
    refuse(write_google(tmp_path / "google", google_arrays(), config=CONFIG | change), *words)


def test_config_that_is_missing_broken_or_incomplete(google):
    (google / "bert_config.json").write_text('{"vocab_size": 30522,')
    refuse(google, "bert_config.json", "not JSON")
    (google / "bert_config.json").write_text('{"vocab_size": 30522}')
    refuse(google, "hidden_size is missing")
    (google / "bert_config.json").write_text("[" * 100_000)
    refuse(google, "bert_config.json", "not JSON")
    (google / "bert_config.json").write_text("[1]")
    refuse(google, "list")
    (google / "bert_config.json").unlink()
    refuse(google, "neither bert_config.json", "nor config.json")


def test_bad_vocabulary(google):
    (google / "vocab.txt").write_text("the\ncat\n")
    refuse(google, "vocab.txt", "[PAD]")
    (google / "vocab.txt").write_text("\n".join([*VOCAB, "one", "more"]) + "\n")
    refuse(google, "token 23", "vocab_size 22")
    (google / "vocab.txt").write_text(
        "\n".join([*VOCAB[:-1], VOCAB[5], VOCAB[-1]]) + "\n"
    )  # a line twice: as many words
    refuse(google, "token 22", "vocab_size 22")
    (google / "vocab.txt").write_bytes(b"\xff\xfe")
    refuse(google, "vocab.txt", "UTF-8")
    (google / "vocab.txt").unlink()
    refuse(google, "vocab.txt")
    (google / "tokenizer.json").write_text("{}")
    refuse(google, "tokenizer.json")
    for bare in (WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), BPE()):  # the heads would read a word for [CLS]
        (google / "tokenizer.json").write_text(Tokenizer(bare).to_str())
        refuse(google, "no [CLS] and [SEP]")


def test_checksum_of_the_index():
    # CRC-32C of "123456789" is 0xE3069283 in every catalogue; LevelDB's mask turns it by 15 bits and adds 0xA282EAD8
    turned = (0xE3069283 >> 15) | (0xE3069283 << 17) & 0xFFFFFFFF
    assert bert.masked_crc32c(b"123456789") == (turned + 0xA282EAD8) & 0xFFFFFFFF


def test_every_damaged_byte_of_an_index_is_noticed(google):
    """Its checksums cover all but the footer's padding, which nothing reads."""
    content = (google / "bert_model.ckpt.index").read_bytes()
    expected = bert.read_index(content, "index")
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(content), 300, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            assert bert.read_index(bytes(damaged), "index") == expected
        except InputError:
            refused += 1
    assert refused > 250
    for length in (0, 7, 47, 48, len(content) - 1):
        with pytest.raises(InputError):
            bert.read_index(content[:length], "index")


def test_bad_safetensors(tmp_path):
    tensors = hugging_face_names(google_arrays())
    folder = write_hugging_face(tmp_path / "hub", tensors)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for broken, word in (
        (content[:-100], "ends after"),
        (content[:100], "no whole safetensors file"),
        (struct.pack("<Q", 1 << 60) + content[8:], "claims"),
        (content[:8] + b"[" + content[9:], "no whole safetensors file"),
        (content[: 8 + length].replace(b'"F32"', b'"F99"') + content[8 + length :], "F99"),
        (content[: 8 + length].replace(b"[8, 8]", b"[8, 7]") + content[8 + length :], "(8, 7)"),
        (content[: 8 + length].replace(b"[8, 8]", b"[8,-8]") + content[8 + length :], "a bad entry"),
        (content[: 8 + length].replace(b"[8, 8]", b"[8.,8]") + content[8 + length :], "no whole safetensors file"),
        (content[: 8 + length].replace(b'"F32"', b"[3.2]") + content[8 + length :], "a bad entry"),
        (b"", "empty"),
    ):
        file.write_bytes(broken)
        refuse(folder, "model.safetensors", word)
    word = "embeddings.word_embeddings.weight"
    write_hugging_face(folder, tensors | {f"bert.{word}": torch.zeros_like(tensors[word])})
    refuse(folder, "word_embeddings", "under another name too")
    write_hugging_face(folder, {k: v for k, v in tensors.items() if k != word})
    refuse(folder, "missing", "word_embeddings")
    file.unlink()
    refuse(folder, "no *.ckpt.index, model.safetensors or pytorch_model.bin")


def test_paths_that_are_no_model(tmp_path):
    refuse("bert-huge", "unknown model 'bert-huge'", "bert-base-uncased")
    (tmp_path / "file").write_text("not a zip")
    refuse(tmp_path / "file", "neither a folder nor a zip")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no *.ckpt.index, model.safetensors")
    google = write_google(tmp_path / "google", google_arrays())
    (google / "bert_config.json").unlink()
    refuse(google, "neither bert_config.json")
    (google / "bert_model.ckpt.index").unlink()
    refuse(google, "ckpt.index", "give the whole checkpoint")


@pytest.mark.parametrize("weights", ["random", "zero"])  # stored almost as they are, and compressed to nothing
def test_damaged_zip(tmp_path, weights):
    arrays = google_arrays()
    if weights == "zero":
        arrays = {name: np.zeros_like(array) for name, array in arrays.items()}
    zipped = zip_folder(write_google(tmp_path / "google", arrays), tmp_path / "model.zip")
    content = bytearray(zipped.read_bytes())
    start = content.index(DATA_FILE.encode()) + len(DATA_FILE)  # the compressed weights
    zipped.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    refuse(zipped, DATA_FILE, "copy or download it again")
    central = content.index(b"PK\x01\x02")  # the zip's table of contents
    zipped.write_bytes(content[:central] + bytes(4) + content[central + 4 :])
    refuse(zipped, "not a sound zip")


# ---- Folders of RoBERTa's layout ------------------------------------------------------------------------------------


@pytest.fixture
def roberta(tmp_path):
    return write_roberta(tmp_path / "roberta", safe=False)[0]


def test_prefixes_and_the_language_model_head_are_passed_over(roberta):
    expected, _ = bert.load_pretrained(roberta, 2)
    weights = torch.load(roberta / "pytorch_model.bin")
    bare = {name.removeprefix("roberta."): tensor for name, tensor in weights.items()}
    torch.save(
        bare | {"lm_head.bias": torch.zeros(3)}, roberta / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    assert_same_weights(bert.load_pretrained(roberta, 2)[0], expected)  # also: the format of before torch 1.6


def test_bad_bin(roberta, tmp_path):
    file = roberta / "pytorch_model.bin"
    content, weights = file.read_bytes(), torch.load(file)
    middle = len(content) // 2
    for broken in (
        content[:-100],
        content[:100],
        b"",
        b"x" * 50,
        content[:middle] + b"\x55" * 9 + content[middle + 9 :],
    ):
        file.write_bytes(broken)
        refuse(roberta, "pytorch_model.bin", "damaged")
    torch.save([1, 2], file)
    refuse(roberta, "no dictionary of tensors")
    torch.save(weights | {"roberta.extra": torch.zeros(2)}, file)
    refuse(roberta, "no place", "extra")
    name = "roberta.embeddings.LayerNorm.weight"
    for strange in (weights[name].to(torch.int8), torch._neg_view(weights[name]), weights[name].to_sparse()):
        torch.save(weights | {name: strange}, file)
        refuse(roberta, f"{name} is torch.")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save(weights | {"evil": Evil()}, file)
    refuse(roberta, "pytorch_model.bin")
    assert not (tmp_path / "evil").exists()


def test_bad_byte_level_vocabulary(roberta):
    ids = json.loads((roberta / "vocab.json").read_text())
    for vocab, word in (
        ([1], "vocab.json holds a list"),
        (ids | {"a": "b"}, "vocab.json does not give each token a number"),
        (ids | {"a": -1}, "give the tokenizer files"),
        (ids | {"a": []}, "vocab.json does not give each token a number"),
        ({"a": 0}, "no <s> among the 1 tokens of vocab.json"),
        (ids | {"more": len(ids)}, f"token {len(ids)}"),
        (ids | {"more": 7}, "vocab.json does not give each token a number of its own"),
        ({token: i for token, i in ids.items() if token != "b"}, "no b among the 263 tokens of vocab.json"),
        ({token: i for token, i in ids.items() if token != "th"}, "Token `th` out of vocabulary"),
    ):
        (roberta / "vocab.json").write_text(json.dumps(vocab))
        refuse(roberta, word)
    (roberta / "vocab.json").write_text(json.dumps(ids))
    (roberta / "merges.txt").write_text("t h e\n")
    refuse(roberta, "merges.txt has a line that is no pair")
    (roberta / "merges.txt").unlink()
    refuse(roberta, "neither tokenizer.json, nor vocab.json")


def test_cut_vocabularies(roberta, google, capsys):
    """Of a cut merges.txt the tokens tell that nothing makes any more; a cut vocab.txt may be whole, and is said."""
    files = roberta / "vocab.json", roberta / "merges.txt"
    ids, merges = json.loads(files[0].read_text()), files[1].read_text()
    pairs = [(left, right) for left in "abcdefgh" for right in "ijklmnop"]
    files[0].write_text(json.dumps(ids | {"".join(pair): len(ids) + i for i, pair in enumerate(pairs)}))
    files[1].write_text(merges + "".join(f"{left} {right}\n" for left, right in pairs))
    assert bert.read_tokenizer(roberta, {"vocab.json", "merges.txt"}).encode("ai").tokens[1:-1] == ["ai"]
    files[1].write_text(merges)
    refuse(roberta, "69 tokens of vocab.json come from no line of merges.txt")
    vocab = (google / "vocab.txt").read_text().splitlines()
    bert.load_pretrained(google, 2)
    assert "is its file whole" not in capsys.readouterr().out
    (google / "vocab.txt").write_text("\n".join(vocab[:-5]))
    bert.load_pretrained(google, 2)
    assert f"the tokenizer has {len(vocab) - 5} tokens, the model {len(vocab)}" in capsys.readouterr().out


def test_too_few_positions_for_roberta(roberta):
    config = json.loads((roberta / "config.json").read_text())
    (roberta / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    refuse(roberta, "max_position_embeddings 2")
