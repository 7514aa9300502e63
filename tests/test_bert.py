"""bert.py against `transformers` on the same weights, and its loaders against all that can be wrong with a file."""

import json

import fakes
import numpy as np
import pytest
import torch
from fakes import ASSETS, CONFIG, VOCAB, google_arrays, hugging_face_names, needs_assets
from safetensors.torch import load, save
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel, BertTokenizer, PreTrainedTokenizerFast, RobertaModel, RobertaTokenizer

import bert
import dact
import data

MODELS = ASSETS / "models"
ROBERTA = ASSETS / "roberta-tokenizer"
DATA_FILE = "bert_model.ckpt.data-00000-of-00001"


def change_json(path, **changes):
    """Set keys of a JSON file's dictionary; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def real_batch(model, tokenizer):
    """Pairs of RTE's dev set, padded, with segments at random (not every tokenizer numbers them)."""
    _, dev = data.load_task("rte", ASSETS / "glue")
    (input_ids, _, mask), _ = data.Dataset(dev, tokenizer, 128, model.config.pad_token_id).batch(np.arange(24))
    assert not mask.all()
    return input_ids, torch.randint(model.config.type_vocab_size, mask.shape), mask


def random_batch(vocab_size):
    mask = torch.arange(9) < torch.tensor([9, 3, 6])[:, None]
    return torch.randint(vocab_size, (3, 9)), torch.randint(2, (3, 9)), mask


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


def reference_of(config, arrays):
    """transformers' BertModel, filled from Google's arrays through the mapping in fakes.py."""
    reference = BertModel(ReferenceConfig(**config))
    reference.load_state_dict(hugging_face_names(arrays))
    return reference


# ---- The same numbers as transformers -------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("name", ["minilm_L-6_H-384_A-12", "e5-small-12L"])
def test_real_models_equal_transformers(name):
    folder = MODELS / name
    model, tokenizer = bert.load_pretrained(folder, 2)
    if name.startswith("e5"):
        reference = BertModel.from_pretrained(folder, dtype=torch.float32)
    else:
        arrays = {name: tensor.numpy() for name, tensor in bert.read_weights(folder).items()}
        reference = reference_of(json.loads((folder / "bert_config.json").read_text()), arrays)
    assert_same_hidden_states(model.bert, reference, *real_batch(model.bert, tokenizer))


@needs_assets
def test_tiny_random_from_tensorflow_equals_its_arrays_and_transformers():
    folder = MODELS / "tiny_random_L-2_H-32_A-2"
    expected = {name.replace("|", "/"): array for name, array in np.load(folder / "expected.npz").items()}
    tensors, config = bert.read_weights(folder), json.loads((folder / "bert_config.json").read_text())
    assert expected.keys() <= tensors.keys()
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in expected.items())
    model = bert.build(bert.BertConfig.from_dict(config), 2, tensors, folder)
    assert_same_hidden_states(model.bert, reference_of(config, expected), *random_batch(128))


def test_small_random_model_equals_transformers(google):
    model, _ = bert.load_pretrained(google, 2)
    assert_same_hidden_states(model.bert, reference_of(CONFIG, google_arrays()), *random_batch(len(VOCAB)))


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
    folder, reference = fakes.write_roberta(tmp_path / "hub", safe, files or None)
    model, tokenizer = bert.load_pretrained(folder, 2)
    assert model.bert.config.first_position == 2 and model.bert.config.layer_norm_eps == 1e-5
    texts = [("the cat", "sat on the mat"), ("a", "b <pad> c")]  # a pad token inside a text counts as no position
    batch, _ = data.Dataset(data.Examples(texts, [0, 1]), tokenizer, 128, 1).batch(np.arange(2))
    assert_same_hidden_states(model.bert, reference, *batch)
    if safe:
        assert_same_hidden_states(model.bert, RobertaModel.from_pretrained(folder), *batch)
    if vocab == "real":
        assert_same_hidden_states(model.bert, reference, *real_batch(model.bert, tokenizer))
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


def test_a_roberta_whose_config_or_weights_do_not_say_so(roberta):
    expected, _ = bert.load_pretrained(roberta, 2)
    change_json(roberta / "config.json", model_type=None)
    model, _ = bert.load_pretrained(roberta, 2)
    assert model.bert.config == expected.bert.config and model.bert.config.first_position == 2
    weights = torch.load(roberta / "pytorch_model.bin")
    bare = {name.removeprefix("roberta."): tensor for name, tensor in weights.items()} | {"lm_head.bias": torch.ones(3)}
    torch.save(bare, roberta / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as before torch 1.6
    refuse(roberta, "model_type is 'missing'")
    change_json(roberta / "config.json", model_type="roberta")
    assert_same_weights(bert.load_pretrained(roberta, 2)[0], expected)


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
    states = ({n: t for n, t in m.state_dict().items() if "linear" not in n} for m in (model, other))
    torch.testing.assert_close(*states, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "bert.", "module.bert."])
@pytest.mark.parametrize("old", [False, True], ids=["weight-bias", "gamma-beta"])
def test_hugging_face_folder(tmp_path, google, capsys, dtype, prefix, old):
    """Under each of their names and kinds of number; what is not BERT is left out, and said so."""
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in hugging_face_names(google_arrays()).items()}
    if old:  # as the hub's files of 2018 call them
        names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in tensors}
        tensors = {names[name].replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()}
    tensors |= {"module.classifier.weight": torch.zeros(2, 8), prefix + "embeddings.position_ids": torch.arange(3)}
    model, _ = bert.load_pretrained(fakes.write_hugging_face(tmp_path / "hub", tensors), 2)
    assert "left out" in (out := capsys.readouterr().out) and "module.classifier.weight" in out
    expected, _ = bert.load_pretrained(google, 2)
    assert_same_weights(model, expected, tolerance=0.0 if dtype == torch.float32 else 0.01)


def test_a_missing_pooler_starts_fresh_and_is_said(hub, capsys):
    weights = load((hub / "model.safetensors").read_bytes())
    (hub / "model.safetensors").write_bytes(save({name: t for name, t in weights.items() if "pooler" not in name}))
    model, _ = bert.load_pretrained(hub, 2)
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


def test_a_fine_tuned_checkpoint(tmp_path, google, capsys):
    """The head of a task and an optimiser's slots are left out, and said so, under any name of a checkpoint."""
    expected, _ = bert.load_pretrained(google, 2)
    more = {"output_weights": np.zeros((2, 8), np.float32), "bert/pooler/dense/bias/Adam_1": np.zeros(8, np.float32)}
    folder = fakes.write_google(tmp_path / "tuned", google_arrays() | more)
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"bert_model.ckpt.{suffix}").rename(folder / f"model.ckpt-20.{suffix}")
    (folder / "._model.ckpt-20.index").write_bytes(b"Mac")
    capsys.readouterr()
    assert_same_weights(bert.load_pretrained(folder, 2)[0], expected)
    out = capsys.readouterr().out
    assert "left out" in out and "output_weights" in out and "adam_m" in out and "no pooler" not in out
    (folder / "model.ckpt-30.index").write_bytes(b"")
    refuse(folder, "model.ckpt-20.index and model.ckpt-30.index are two checkpoints")


def test_weights_in_several_files(hub, google):
    weights, parts = load((hub / "model.safetensors").read_bytes()), {}
    (hub / "model.safetensors").unlink()
    for i in (0, 1):
        part = {name: weights[name] for name in sorted(weights)[i::2]}
        (hub / f"model-{i}.safetensors").write_bytes(save(part))
        parts |= dict.fromkeys(part, f"model-{i}.safetensors")
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (hub / "config.json").rename(hub / "bert_config.json")  # Google's name beside PyTorch's weights
    assert_same_weights(bert.load_pretrained(hub, 2)[0], bert.load_pretrained(google, 2)[0])
    (hub / "model-1.safetensors").unlink()
    refuse(hub, "model-1.safetensors", "No such file")


def test_a_local_folder_with_a_known_name(google, monkeypatch):
    google.rename(google.with_name("bert-tiny"))
    monkeypatch.chdir(google.parent)
    assert bert.load_pretrained("bert-tiny", 2)[0].bert.config.hidden_size == 8
    monkeypatch.setenv("HOME", str(google.parent))
    assert bert.find_model("~/bert-tiny") == google.with_name("bert-tiny")
    (google.parent / "bert-huge").write_text("a zip")
    refuse("bert-huge", "unknown model 'bert-huge'", "unpack a zip first", "bert-base-uncased")


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


@pytest.mark.parametrize("ending", ["\n\n", "", " \n", "\r\n"])
def test_a_vocabulary_as_editors_leave_it(google, capsys, ending):
    """With a byte order mark, spaces after a word, blank lines at the end; in any order, for BERT masks its pads."""
    (google / "vocab.txt").write_bytes(("\ufeff" + " \n".join(VOCAB[::-1]) + ending).encode())
    assert bert.load_pretrained(google, 2)[1].get_vocab() == {token: i for i, token in enumerate(VOCAB[::-1])}
    assert "is its file whole" not in capsys.readouterr().out


def test_a_vocabulary_that_may_be_cut_is_said(google, capsys):
    (google / "vocab.txt").write_text("\n".join(VOCAB[:-5]))
    bert.load_pretrained(google, 2)
    assert f"the tokenizer has {len(VOCAB) - 5} tokens, the model {len(VOCAB)}; is its" in capsys.readouterr().out


def test_a_tokenizer_that_pads_is_told_not_to(google):
    tokenizer = bert.read_tokenizer(google)
    tokenizer.enable_padding(length=30_000_000)
    tokenizer.save(str(google / "tokenizer.json"))
    assert len(bert.load_pretrained(google, 2)[1].encode("the cat").ids) == 4


# ---- Bad input: one line each, that names the thing; test_fuzz.py has more of it ------------------------------------


def refuse(path, *words):
    fakes.refuse(lambda: bert.load_pretrained(path, 2), *words)


def with_word_table(change, name="embeddings.word_embeddings.weight"):
    """From the bytes of a safetensors file to those of one with a changed copy of the word embeddings."""
    return lambda content: save((old := load(content)) | {name: change(old["embeddings.word_embeddings.weight"])})


BARE = Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()
DOUBLED = with_word_table(torch.clone, name="bert.embeddings.word_embeddings.weight")
DAMAGED = [  # a file; the bytes in its place, a function of its bytes, changes of its JSON, or None: it is gone; words
    ("google/bert_config.json", {"num_hidden_layers": 3}, "Missing key", "blocks.2."),
    ("google/bert_config.json", {"num_hidden_layers": 1}, "Unexpected key", "blocks.1."),
    ("google/bert_config.json", {"num_hidden_layers": 10**9}, "1000000000 blocks of size 8 are too large"),
    ("google/bert_config.json", {"intermediate_size": 16}, "size mismatch", "blocks.0.up.weight", "[12, 8]"),
    ("google/bert_config.json", {"num_attention_heads": 3}, "hidden_size is no multiple of num_attention_heads"),
    ("google/bert_config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("google/bert_config.json", {"hidden_size": None}, "hidden_size"),
    ("google/bert_config.json", {"hidden_size": 800_000}, "2 blocks of size 800000 are too large"),
    ("google/bert_config.json", {"vocab_size": 20}, "tokens 0..21, the model 20"),
    ("google/bert_config.json", {"type_vocab_size": 1}, "segments 0..1, the model 1"),
    ("google/bert_config.json", {"pad_token_id": 99}, "tokens 0..99, the model 22"),
    ("google/bert_config.json", {"pad_token_id": -1}, "tokens -1..21"),
    ("google/bert_config.json", {"is_decoder": True}, "is_decoder is 'True'"),
    ("google/bert_config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type", "relative_key"),
    ("google/bert_config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("google/bert_config.json", {"model_type": "gpt2\x1b[31m\n"}, "gpt2?[31m"),
    ("google/bert_config.json", b"[" * 100_000, "bert_config.json: RecursionError"),
    ("google/bert_config.json", None, "config.json", "No such file"),
    ("google/" + DATA_FILE, lambda content: content[:-1000], DATA_FILE, "it has 9716 bytes, its index says 10716"),
    ("google/" + DATA_FILE, lambda content: b"1234" + content, DATA_FILE, "it has 10720 bytes, its index says 10716"),
    ("google/bert_model.ckpt.index", lambda content: content[:-1], "bert_model.ckpt.index", "magic number"),
    ("google/bert_model.ckpt.index", lambda content: content[-48:], "bert_model.ckpt.index"),
    ("google/vocab.txt", b"the\ncat\n", "tokenizer", "[SEP]"),
    ("google/vocab.txt", "\n".join([*VOCAB, "one", "more"]).encode(), "tokens 0..23, the model 22"),
    ("google/vocab.txt", "\n".join([*VOCAB[:-1], "a", "."]).encode(), "tokens 0..22"),  # a line twice: as many words
    ("google/vocab.txt", None, "vocab.txt", "No such file"),
    ("google/tokenizer.json", BARE.encode(), "no [CLS] and [SEP]"),  # the heads would read a word for [CLS]
    ("google/tokenizer.json", BARE.replace('"unk_token":"[UNK]"', '"unk_token":"none"').encode(), "WordPiece error"),
    ("hub/tokenizer_config.json", b'{"tokenizer_class": "BertJapaneseTokenizer"}', "no BertJapaneseTokenizer can be"),
    ("hub/tokenizer_config.json", b'{"tokenizer_class": "HerbertTokenizer"}', "no HerbertTokenizer can be made", "add"),
    ("hub/model.safetensors", lambda content: content[:-100], "model.safetensors"),
    ("hub/model.safetensors", None, "no *.ckpt.index, model.safetensors or pytorch_model.bin"),
    ("hub/model.safetensors", DOUBLED, "twice, under two names"),
    ("hub/model.safetensors", with_word_table(torch.Tensor.long), "Missing key", "bert.embed.word.weight"),  # integers
    ("roberta/config.json", {"model_type": "bert"}, "its weights are a RoBERTa's"),
    ("roberta/config.json", {"model_type": "camembert"}, "model_type is 'camembert'"),
    ("roberta/config.json", {"pad_token_id": 0}, "<pad> is not the config's pad_token_id"),
    ("roberta/vocab.json", {"more": 264}, "tokens 0..264, the model 264"),
    ("roberta/vocab.json", {"th": None}, "Token `th` out of vocabulary"),
    ("roberta/vocab.json", {f"more{i}": 264 + i for i in range(1000)}, "merges.txt is cut"),
    ("roberta/merges.txt", None, "tokenizer", "No such file"),
    ("roberta/pytorch_model.bin", lambda content: content[:-100], "pytorch_model.bin"),
]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: f"{case[0]}: {case[-1]}")
def test_a_damaged_file_is_one_line_that_says_so(request, case):
    (layout, name), change, *words = case[0].split("/"), *case[1:]
    file = request.getfixturevalue(layout) / name
    if change is None:
        file.unlink()
    elif isinstance(change, dict):
        change_json(file, **change)
    else:
        file.write_bytes(change if isinstance(change, bytes) else change(file.read_bytes()))
    refuse(file.parent, *words)


@pytest.mark.filterwarnings("ignore")  # torch's, of the format of its last file
def test_a_bin_with_more_than_weights_in_it(roberta, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    file, name = roberta / "pytorch_model.bin", "roberta.embeddings.LayerNorm.weight"
    weights = torch.load(file)
    torch.save(weights | {name: weights[name].to(torch.int8)}, file)  # of a quantised model: not what the weights are
    refuse(roberta, "Missing key", "bert.embed.norm.weight")
    torch.save(weights | {"evil": Evil()}, file)
    refuse(roberta, "no whole file of torch.save, or more in it than tensors")
    assert not (tmp_path / "evil").exists()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(file))  # of which torch's own words are other ones
    refuse(roberta, "no whole file of torch.save, or more in it than tensors")
