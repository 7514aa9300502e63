"""BERT in one file of plain PyTorch (Devlin et al., 2019), RoBERTa (Liu et al., 2019), and their released weights.

RoBERTa is the same network, trained better: it differs in its numbers (`BertConfig`), in how it counts positions
(`Embeddings`) and in its tokenizer.

Read from top to bottom: config, embeddings, self-attention, block, encoder, classifier; then the tokenizers, and the
loaders for Google's TensorFlow checkpoints and for Hugging Face folders.

Shapes: B sequences, T tokens, D hidden size, H attention heads, C classes.
"""

import hashlib
import io
import json
import math
import mmap
import os
import re
import string
import struct
import warnings
import zipfile
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import BertProcessing, RobertaProcessing
from torch import nn
from torch.overrides import TorchFunctionMode

from data import InputError, cache_dir, download, own_path, plain, reading


@dataclass(frozen=True)
class BertConfig:
    """The numbers that make a BERT or a RoBERTa, under the names of Google's bert_config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12  # Google's code fixes it; Hugging Face's config.json states it
    pad_token_id: int = 0
    first_position: int = 0  # the first token's position; RoBERTa's is pad_token_id + 1

    @property
    def max_tokens(self):
        """The longest input that there are positions for."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_dict(cls, values, source="config"):
        """Read a parsed bert_config.json or config.json; keys that are not ours are passed over.

        Raises InputError, naming `source`, for a config that makes no BERT.
        """
        kind, fitting = values.get("model_type", "bert"), "give the config that came with the weights"
        if kind not in ("bert", "roberta"):
            raise InputError(f"{source}: model type {plain(kind)!r} cannot be read; give a BERT or a RoBERTa")
        if kind == "roberta":
            values = {"pad_token_id": 1} | values
        for f in fields(cls):
            value = values.get(f.name, f.default)
            if value is MISSING:
                raise InputError(f"{source}: {f.name} is missing; {fitting}")
            low, high = (0, 1) if f.type is float else (1, 257) if f.name.startswith("num_") else (1, 2**24)
            if f.name in ("pad_token_id", "first_position"):
                low = 0
            if f.type is not str and not (type(value) in (int, f.type) and low <= value < high):
                raise InputError(f"{source}: {f.name} is {plain(value)!r}; {fitting}")
        if kind == "roberta":
            values["first_position"] = values["pad_token_id"] + 1
        config = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        D, heads, positions = config.hidden_size, config.num_attention_heads, config.max_position_embeddings
        if config.max_tokens < 8:
            raise InputError(f"{source}: max_position_embeddings {positions} leaves no positions for a text; {fitting}")
        if D % heads:
            raise InputError(f"{source}: hidden_size {D} is no multiple of num_attention_heads {heads}; {fitting}")
        for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if values.get(name, only) != only:
                raise InputError(f"{source}: {name} is {plain(values[name])!r}; only {only!r} is implemented")
        return config


class Dropout(nn.Dropout):
    """nn.Dropout, with cheaper random numbers on a CPU.

    There torch draws them one by one, an element each, which took an eighth of a training step. Here a draw of 64 bits
    serves four elements, so the rate is a multiple of 2^-16: for p = 0.1 it is 6554 / 65536 = 0.100006.
    """

    def forward(self, x):
        """x of any shape -> the same, in training with a share of about p set to 0 and the others scaled up."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        bits = bits[: x.numel()].view(x.shape)  # even from -2^15 to 2^15 - 1
        keep = torch.ge(bits, dropped - 2**15, out=torch.empty(x.shape, dtype=x.dtype))  # 1 or 0
        return x * keep.div_(1 - dropped / 2**16)


class Embeddings(nn.Module):
    """Word + position + segment, normalised."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.first_position, self.pad_id = config.first_position, config.pad_token_id

    def forward(self, input_ids, segment_ids):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        if self.first_position:  # RoBERTa: real tokens alone are counted, and pads stay one below the first
            real = input_ids != self.pad_id
            positions = self.first_position - 1 + real.cumsum(1) * real  # (B, T)
        summed = self.word(input_ids) + self.position(positions) + self.segment(segment_ids)  # (B, T, D)
        return self.dropout(self.norm(summed))


class SelfAttention(nn.Module):
    """Multi-head attention of every token to all real tokens, and the linear map that mixes the heads."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, mask):
        if torch.is_autocast_enabled(hidden.device.type):  # here and once, or each of the three would cast it anew
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        q, k, v = (
            linear(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for linear in (self.query, self.key, self.value)
        )
        mask = mask[:, None, None, :]  # (B, 1, 1, T)
        if self.training and hidden.device.type == "cpu":  # step by step, for torch fuses no dropout there
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
            context = self.dropout(scores.softmax(-1)) @ v
        else:
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0
            )
        return self.output(context.transpose(1, 2).flatten(2))  # (B, T, D)


class Block(nn.Module):
    """One Transformer block: attention, then a feed-forward net, each added to its input and normalised after."""

    def __init__(self, config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden, mask):
        """hidden (B, T, D), mask (B, T) bool, True on real tokens -> (B, T, D)."""
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, mask)))
        # CHOICE: the exact (erf) GELU. Google's weights of 2018 predate the tanh form in Google's code.
        return self.norm(hidden + self.dropout(self.down(F.gelu(self.up(hidden)))))


class Bert(nn.Module):
    """The encoder: an embedding step and a list of blocks that can be run one at a time (early exit needs that)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.embed = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, segment_ids, mask):
        """input_ids, segment_ids (B, T) int64, mask (B, T) bool -> the last block's hidden states (B, T, D)."""
        hidden = self.embed(input_ids, segment_ids)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden


class Classifier(nn.Module):
    """From a [CLS] vector to logits: BERT's pooler (dense, tanh), dropout, linear."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.linear = nn.Linear(config.hidden_size, num_classes)

    def forward(self, cls):
        """cls (B, D) -> logits (B, C)."""
        return self.linear(self.dropout(torch.tanh(self.pooler(cls))))


class BertClassifier(nn.Module):
    """The model of stage 1: BERT with one classifier on the [CLS] vector of its last block."""

    def __init__(self, bert, classifier):
        super().__init__()
        self.bert = bert
        self.classifier = classifier

    def forward(self, input_ids, segment_ids, mask):
        """-> logits (B, C)."""
        return self.classifier(self.bert(input_ids, segment_ids, mask)[:, 0])


def init_weights(module):
    """BERT's own start for weights that come from no checkpoint: matrices ~ N(0, 0.02) cut at 2 sigma, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def wordpiece_tokenizer(vocab, settings=None, longest_word=100):
    """BERT's tokenizer over the list `vocab`; adds [CLS] and [SEP] and numbers the segments.

    settings: of a tokenizer_config.json. Where it does not say do_lower_case, the vocabulary does: one that lacks a
    letter from A to Z was made from lowered text. longest_word: letters; longer words are unknown.
    Raises ValueError for a vocabulary without the tokens that it needs.
    """
    ids, settings = {token: i for i, token in enumerate(vocab)}, settings or {}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    need_tokens(ids, special, "vocab.txt")
    lowercase = settings.get("do_lower_case", not {*string.ascii_uppercase} <= ids.keys())
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=longest_word))
    tokenizer.add_special_tokens([token for token in (*special, "[MASK]") if token in ids])
    tokenizer.normalizer = BertNormalizer(
        lowercase=lowercase,
        strip_accents=settings.get("strip_accents"),  # by default exactly when it lowers
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def byte_level_tokenizer(ids, merges, settings):
    """RoBERTa's tokenizer, byte-level BPE: ids {token: id}, merges [(left, right)]. A pair is <s> A </s></s> B </s>.

    There is no unknown word, for every byte is a token, and no segments: RoBERTa numbers both sentences 0.
    Raises ValueError, or what the library raises, for ids and merges that are not whole or do not fit each other.
    """
    special, space = ["<s>", "<pad>", "</s>", "<unk>"], settings.get("add_prefix_space", False)
    need_tokens(ids, [*special, *ByteLevel.alphabet()], "vocab.json")
    if {*map(type, ids.values())} != {int} or len({*ids.values()}) < len(ids):
        raise ValueError("vocab.json does not give each token a number of its own")
    if any(len(pair) != 2 for pair in merges):
        raise ValueError("merges.txt has a line that is no pair")
    unmade = ids.keys() - {*ByteLevel.alphabet()} - {left + right for left, right in merges}
    if len(unmade) > 16 + len(ids) // 100:  # RoBERTa's own: 9 of 50,265
        raise ValueError(f"{len(unmade)} tokens of vocab.json come from no line of merges.txt")
    tokenizer = Tokenizer(BPE(ids, merges))
    tokenizer.add_special_tokens(special)
    if "<mask>" in ids:
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])  # it stands for a word and its space
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=space)
    tokenizer.post_processor = RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=space)
    return tokenizer


def need_tokens(ids, tokens, file):
    for token in tokens:
        if token not in ids:
            raise ValueError(f"no {token} among the {len(ids)} tokens of {file}")


# ---- Loading: which model, from where -------------------------------------------------------------------------------

GOOGLE_URL = "https://storage.googleapis.com/bert_models/"
GOOGLE_MODELS = {
    "bert-base-uncased": "2018_10_18/uncased_L-12_H-768_A-12",
    "bert-base-cased": "2018_10_18/cased_L-12_H-768_A-12",
    "bert-large-uncased": "2018_10_18/uncased_L-24_H-1024_A-16",
    "bert-large-cased": "2018_10_18/cased_L-24_H-1024_A-16",
    "bert-tiny": "2020_02_20/uncased_L-2_H-128_A-2",
    "bert-mini": "2020_02_20/uncased_L-4_H-256_A-4",
    "bert-small": "2020_02_20/uncased_L-4_H-512_A-8",
    "bert-medium": "2020_02_20/uncased_L-8_H-512_A-8",
}
GOOGLE_MODELS |= {
    f"uncased_L-{layers}_H-{size}_A-{size // 64}": f"2020_02_20/uncased_L-{layers}_H-{size}_A-{size // 64}"
    for layers in (2, 4, 6, 8, 10, 12)
    for size in (128, 256, 512, 768)
}
HUB_URL = "https://huggingface.co/FacebookAI/"
HUB_MODELS = {  # Meta's own files at a fixed commit: {file: sha256, or None where we know of no published sum}
    "roberta-base": (
        "roberta-base/resolve/e2da8e2f811d1448a5b465c236feacd80ffbac7b/",
        {
            "config.json": None,
            "vocab.json": "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655",
            "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "model.safetensors": "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81",
        },
    ),
    "roberta-large": (
        "roberta-large/resolve/722cf37b1afa9454edce342e7895e588b6ff1d59/",
        dict.fromkeys(("config.json", "vocab.json", "merges.txt", "model.safetensors")),
    ),
}


def find_model(name):
    """The folder or zip of a model: a path, or a name of GOOGLE_MODELS or HUB_MODELS (downloaded once).

    Raises InputError.
    """
    path = own_path(name)
    if os.path.exists(path):  # False also for names that no file can have
        if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
            raise InputError(f"{path}: neither a folder nor a zip file; give the folder that holds the checkpoint")
        return path
    if name in GOOGLE_MODELS:
        place = GOOGLE_MODELS[name] + ".zip"
        return download(GOOGLE_URL + place, cache_dir() / "models" / place, member="bert_config.json")
    if name in HUB_MODELS:
        place, files = HUB_MODELS[name]
        for file, sha256 in files.items():
            download(HUB_URL + place + file, cache_dir() / "models" / name / file, sha256)
        return cache_dir() / "models" / name
    known = ", ".join([key for key in GOOGLE_MODELS if key.startswith("bert-")] + list(HUB_MODELS))
    raise InputError(f"unknown model {plain(name)!r}: no such path, nor one of {known}, uncased_L-*_H-*_A-*")


def load_pretrained(name, num_classes):
    """A pretrained model with a fresh classification layer, and its tokenizer: (BertClassifier, Tokenizer).

    name: as for `find_model`. The pooler comes from the checkpoint; where it has none it is started fresh, and said so.
    Raises InputError for anything else that is missing, misshapen or unreadable.
    """
    path = find_model(name)
    print(f"reading    {path}")
    files = list_files(path)
    tensors = open_weights(path, files)
    config = read_config(path, files, tensors)
    model, tokenizer = build(config, num_classes, tensors, path), read_tokenizer(path, files)
    check_tokenizer(tokenizer, config, path)
    if (count := tokenizer.get_vocab_size()) < config.vocab_size:
        print(f"note: {path}: the tokenizer has {count} tokens, the model {config.vocab_size}; is its file whole?")
    return model, tokenizer


def read_config(path, files, tensors):
    """The `BertConfig` of a checkpoint. The names of its weights tell a RoBERTa where config.json does not."""
    file = next((name for name in ("bert_config.json", "config.json") if name in files), None)
    if not file:
        what = "neither bert_config.json (Google) nor config.json (Hugging Face) in it"
        raise InputError(f"{path}: {what}; give the folder that holds the checkpoint")
    values = read_json(path, file)
    if any("roberta." in name for name in tensors):
        values = {"model_type": "roberta"} | values
        if values["model_type"] == "bert":
            raise InputError(f"{path}: {file} says 'bert', but the weights are a RoBERTa's; give their config")
    if "model_type" not in values and "vocab.json" in files:
        raise InputError(f'{path}: {file} does not say what it is; add "model_type", roberta or bert')
    return BertConfig.from_dict(values, f"{path}: {file}")


def check_tokenizer(tokenizer, config, source):
    """Raise InputError unless a tokenizer fits a model; its own padding and truncation are switched off."""
    with reading(source, "give the tokenizer of the weights"):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        frame, one, pair = tokenizer.encode(""), tokenizer.encode("a"), tokenizer.encode("a", "\u2603 zq")
        # The heads read the first token, and take it for [CLS]
        if len(frame.ids) < 2 or one.ids[0] != frame.ids[0] or len(pair.ids) <= len(one.ids):
            raise ValueError("the tokenizer puts no [CLS] and [SEP] around a text")
        token = max([config.pad_token_id, *pair.ids, *tokenizer.get_vocab().values()])
        if token >= config.vocab_size:
            raise ValueError(f"token {token} of the tokenizer does not fit the config's vocab_size {config.vocab_size}")
        segment, segments = max(pair.type_ids), config.type_vocab_size
        if segment >= segments:
            raise ValueError(f"segment {segment} of the tokenizer does not fit the config's type_vocab_size {segments}")
        pad = next((i for i in map(tokenizer.token_to_id, ("[PAD]", "<pad>")) if i is not None), config.pad_token_id)
        if config.first_position and pad != config.pad_token_id:  # from which RoBERTa counts positions
            raise ValueError(f"the tokenizer pads with {pad}, the config's pad_token_id is {config.pad_token_id}")


class NoRandomStart(TorchFunctionMode):
    """For torch.device("meta"), where modules are made whose weights come from a file: leaves nn.Embedding's start out.

    "meta" would import torch's whole compiler (2 s) for normal_, to compute nothing.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def build(config, num_classes, tensors, source):
    """A BertClassifier with the weights `tensors`, {name in a checkpoint: function that reads it}, in float32.

    What does not belong to BERT itself is left out, with a note.
    """
    left_out = [name for name in tensors if not is_encoder(name)]
    left_out.sort(key=lambda name: bool(NO_WEIGHT.search(name)))  # what may surprise comes first
    if left_out:
        print(f"note: {source}: left out, for they are not BERT itself: {name_some(left_out)}")
    ours, theirs = our_names(config), {}
    for name in filter(is_encoder, tensors):
        if theirs.setdefault(standard_name(name), name) != name:
            raise InputError(f"{source}: {plain(name)} is there under another name too; give the checkpoint as it came")
    with torch.device("meta"), NoRandomStart():  # no memory for what the checkpoint overwrites
        model = BertClassifier(Bert(config), Classifier(config, num_classes))
    missing, left_over = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing == ["pooler.dense.bias", "pooler.dense.weight"]:
        print(f"note: {source} has no pooler; it starts from random weights")
    elif missing:
        raise InputError(f"{source}: missing {name_some(missing)}; give a complete checkpoint that fits its config")
    if left_over:
        raise InputError(f"{source}: no place for {name_some(left_over)}; give a checkpoint that fits its config")
    empty, state = model.state_dict(), {}
    for name, original in theirs.items():
        tensor, wanted = tensors[original](), tuple(empty[ours[name]].shape)
        if tuple(tensor.shape) != wanted:
            shape = f"{plain(original)} has shape {plain(tuple(tensor.shape))}, the config asks for {wanted}"
            raise InputError(f"{source}: {shape}; give the config that came with the weights")
        if not all_finite(tensor):
            raise InputError(f"{source}: {plain(original)} holds a number that is not finite; download it again")
        state[ours[name]] = tensor.float().contiguous()  # as the readers give them, mostly
    model.classifier = Classifier(config, num_classes).apply(init_weights)
    model.load_state_dict(state, strict=False, assign=True)
    return model


def all_finite(tensor):
    """Whether every number of a tensor is finite, looked at without a copy of it."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def name_some(names):
    """The first few of many names, for a message."""
    return ", ".join(map(plain, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def our_names(config):
    """{name of a tensor in a Hugging Face checkpoint: its name in a BertClassifier}."""
    names = {"embeddings.word_embeddings": "bert.embed.word", "embeddings.position_embeddings": "bert.embed.position",
             "embeddings.token_type_embeddings": "bert.embed.segment"}  # fmt: skip
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in names.items()}
    layers = {"embeddings.LayerNorm": "bert.embed.norm", "pooler.dense": "classifier.pooler"}
    inside = {f"attention.self.{name}": f"attention.{name}" for name in ("query", "key", "value")}
    inside |= {"attention.output.dense": "attention.output", "attention.output.LayerNorm": "attention_norm",
               "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm"}  # fmt: skip
    for n in range(config.num_hidden_layers):
        layers |= {f"encoder.layer.{n}.{theirs}": f"bert.blocks.{n}.{ours}" for theirs, ours in inside.items()}
    for kind in ("weight", "bias"):
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items()}
    return names


def standard_name(name):
    """A tensor's name in Google's or an older checkpoint as Hugging Face has it today, without a prefix."""
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name).replace("/", ".")
    name = re.sub(r"^(module\.)?((bert|roberta)\.)?", "", name)
    for old, new in ((r"\.(kernel|gamma)$", ".weight"), (r"\.beta$", ".bias"), ("_embeddings$", "_embeddings.weight")):
        name = re.sub(old, new, name)
    return name


# What a training leaves beside the weights: the optimiser's slots, and positions counted once and for all
NO_WEIGHT = re.compile(r"[./](adam_[mv]|Adam(_\d+)?)$|embeddings\.position_ids$")


def is_encoder(name):
    """Whether a tensor belongs to BERT itself. What does not, such as the head of a task, is left out."""
    outside = not re.match(r"(module\.)?(bert|roberta|embeddings|encoder|pooler)[./]", name)
    return not (outside or NO_WEIGHT.search(name))


def open_weights(path, files):
    """{name in the checkpoint: function that reads the tensor} of a folder or zip, of any layout."""
    indices = [name for name in files if re.search(r"\.ckpt(-\d+)?\.index$", name)]
    if len(indices) > 1:
        raise InputError(f"{path}: {name_some(sorted(indices))} are several checkpoints; give a folder with one")
    if indices:
        return open_google(path, indices[0])
    kinds = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_bin}
    whole = next((name for name in kinds if {name, f"{name}.index.json"} & files), None)
    if not whole:
        raise InputError(f"{path}: no *.ckpt.index, {' or '.join(kinds)} in it; give the whole checkpoint")
    parts, index, tensors = [whole], f"{whole}.index.json", {}
    if whole not in files:
        about = read_json(path, index)
        with reading(f"{path}: {index}"):
            parts = sorted({str(part) for part in about["weight_map"].values()})
    for part in parts:
        if part not in files:
            raise InputError(f"{path}: {index} names {plain(part)!r}, which is missing; give the whole checkpoint")
        found = kinds[whole](path, part)
        if twice := sorted(tensors.keys() & found.keys()):
            raise InputError(f"{path}: {name_some(twice)} in several files; give the checkpoint as it came")
        tensors |= found
    return tensors


def list_files(path):
    """Names, without folders, of the files in a folder or anywhere in a zip (Google's are nested or flat)."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
    else:
        with reading(path, "not a sound zip file; download it again"), zipfile.ZipFile(path) as zipped:
            names = [Path(name).name for name in zipped.namelist() if not name.endswith("/")]
    return {name for name in names if name.isprintable() and not name.startswith("._")}  # a Mac's, beside each file


def read_file(path, name):
    """File `name` of a folder (memory-mapped, copy on write) or of a zip (read into memory): bytes (n,) uint8."""
    if name not in list_files(path):
        raise InputError(f"{path}: {plain(name)} is missing; give the whole checkpoint")
    with reading(f"{path}: {name}"):
        if path.is_dir():
            return np.memmap(path / name, np.uint8, mode="c")  # refuses an empty file
        with zipfile.ZipFile(path) as zipped:
            found = [info for info in zipped.infolist() if Path(info.filename).name == name]
            depth = min(info.filename.count("/") for info in found)  # further in lie those of the model's modules
            info, *more = [info for info in found if info.filename.count("/") == depth]
            if more:
                raise ValueError("it is there several times")
            if info.file_size > 10 * info.compress_size + 2**26:  # no weights and no text shrink so far
                raise ValueError(f"it would have {info.file_size} bytes")
            return np.frombuffer(bytearray(zipped.read(info)), np.uint8)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: in which shard of a checkpoint of several files, and at which bytes of it."""

    name: str
    dtype: str | int  # a key of TYPES, or what is not read
    shape: tuple
    shard: int
    offset: int
    size: int

    def __post_init__(self):
        numbers = (*self.shape, self.shard, self.offset, self.size)
        sound = all(type(n) is int and 0 <= n < 2**40 for n in numbers) and len(self.shape) <= 8
        if type(self.dtype) not in (str, int) or not sound:
            raise ValueError(f"a bad entry for {self.name}")


# What the data types are called by safetensors, and by TensorFlow
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, 1: torch.float32}


def tensor_at(content, source, entry):
    """The tensor of an entry in what `read_file` gave, as float32: the one copy on its way into the model."""
    name, dtype, shape = plain(entry.name), TYPES.get(entry.dtype), entry.shape
    if not dtype:
        raise InputError(f"{source}: {name} is of type {plain(entry.dtype)}; expected one of {[*TYPES]}")
    if entry.size != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{source}: {name} has shape {plain(shape)} in {entry.size} bytes; download it again")
    tensor = torch.from_numpy(content[entry.offset : entry.offset + entry.size]).view(dtype).view(shape)
    if entry.name.endswith("kernel"):  # TensorFlow's (in, out)
        tensor = tensor.T
    tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        content.base.madvise(mmap.MADV_DONTNEED)  # else the file's pages stay: twice the memory
    return tensor


def read_json(path, name):
    """The dictionary that a JSON file holds."""
    with reading(f"{path}: {name}", "it is not JSON; copy or download it again"):
        values = json.loads(read_file(path, name).tobytes())
    if not isinstance(values, dict):
        raise InputError(f"{path}: {name} holds a {type(values).__name__}, no dictionary; copy or download it again")
    return values


def read_text(path, name):
    with reading(f"{path}: {name}", "it is not UTF-8; copy or download it again"):
        return read_file(path, name).tobytes().decode("utf-8-sig")


def read_tokenizer(path, files):
    """A model's tokenizer: tokenizer.json, else byte-level BPE (vocab.json, merges.txt), else WordPiece (vocab.txt)."""
    if "tokenizer.json" in files:
        with reading(f"{path}: tokenizer.json"):
            return Tokenizer.from_str(read_text(path, "tokenizer.json"))
    settings, added = (
        read_json(path, name) if name in files else {} for name in ("tokenizer_config.json", "added_tokens.json")
    )
    kind = str(settings.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")
    if kind not in ("BertTokenizer", "RobertaTokenizer", "PreTrainedTokenizer"):
        raise InputError(f"{path}: tokenizer_config.json: no {plain(kind)} can be read; add its tokenizer.json")
    with reading(path, "give the tokenizer files that came with the weights"):
        if {"vocab.json", "merges.txt"} <= files:
            lines = read_text(path, "merges.txt").splitlines()
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            tokenizer = byte_level_tokenizer(read_json(path, "vocab.json"), merges, settings)
        elif "vocab.txt" in files:
            vocab = [token.rstrip(" \r") for token in read_text(path, "vocab.txt").rstrip("\n\r ").split("\n")]
            longest = 200 if "bert_config.json" in files else 100  # letters: in Google's code, and in the hub's
            tokenizer = wordpiece_tokenizer(vocab, settings, longest)
            print(f"tokenizer  {'lower-cases' if tokenizer.normalizer.lowercase else 'keeps capitals'}")
        else:
            what = "neither tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt in it"
            raise InputError(f"{path}: {what}; add the files that came with the weights")
        for token, i in sorted(added.items(), key=lambda item: item[1]):
            tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token) != i:
                raise ValueError(f"added_tokens.json: {token} would be {tokenizer.token_to_id(token)}, not {i}")
    return tokenizer


# ---- Google's checkpoints: an index (a small LevelDB table of names and places) and the raw bytes beside it ---------

# sha256 of Google's index files and of the data that belongs to them, where both are known; no other data is checked
DATA_SUMS = {
    "04c1323086e2f1c5b7c0759d8d3e484afbb0ab45f51793daab9f647113a0117b": (
        "58580dc5e0bf0ae0d2efd51d0e8272b2f808857f0a43a88aaf7549da6d7a8a84"
    ),
}


def open_google(path, index):
    """{name: function that reads the tensor} of a TensorFlow checkpoint in a folder or zip; index: its *.index file."""
    content = read_file(path, index).tobytes()
    entries, num_shards = read_index(content, f"{path}: {index}")
    wanted, shards = DATA_SUMS.get(hashlib.sha256(content).hexdigest()), {}
    for shard in {entry.shard for entry in entries.values()}:
        name = f"{index.removesuffix('.index')}.data-{shard:05d}-of-{num_shards:05d}"
        data, source = read_file(path, name), f"{path}: {name}"
        size = max(entry.offset + entry.size for entry in entries.values() if entry.shard == shard)
        if len(data) != size:
            raise InputError(f"{source} has {len(data)} bytes, its index says {size}; copy or download it again")
        if wanted and hashlib.sha256(data).hexdigest() != wanted:
            raise InputError(f"{source} is damaged, its sha256 is not {wanted}; download it again")
        shards[shard] = data, source
    return {name: partial(tensor_at, *shards[entry.shard], entry) for name, entry in entries.items()}


def read_index(content, source):
    """Parse a checkpoint's `.index` file: ({tensor name: Entry}, number of shards). Raises InputError.

    A LevelDB table: blocks of (key, value) pairs sorted by key, then an index block of the blocks' places, then a
    footer of 48 bytes with the index block's place and a magic number. Every block carries a checksum.
    """
    with reading(source, "it is no whole TensorFlow checkpoint index; copy or download it again"):
        if content[-8:] != struct.pack("<Q", 0xDB4775248B80FB57):
            raise ValueError("it does not end with a table's magic number")
        footer, table, entries = io.BytesIO(content[-48:]), {}, {}
        read_varint(footer), read_varint(footer)  # the place of the meta index block: unused
        for _, place in read_block(content, footer):
            for key, value in read_block(content, io.BytesIO(place)):
                table[key.decode()] = read_protobuf(value)
        header = table.pop("", {})
        num_shards = number(header, 1)
        if not 0 < num_shards < 10**5 or number(header, 2):
            raise ValueError("it has no header, or its data is big-endian")
        for name, message in table.items():
            dims = read_protobuf(message.get(2, [b""])[0]).get(2, [])
            shape = tuple(number(read_protobuf(dim), 1) for dim in dims)
            entries[name] = Entry(name, number(message, 1), shape, *(number(message, field) for field in (3, 4, 5)))
    return entries, num_shards


def read_block(content, place):
    """The (key, value) pairs of the block of a LevelDB table at a place, a stream of two varints: offset and size."""
    start, size = read_varint(place), read_varint(place)
    end = start + size
    block, kind, checksum = content[start:end], content[end : end + 1], content[end + 1 : end + 5]
    if kind != b"\0":
        raise ValueError("a block is cut off or compressed")
    if checksum != struct.pack("<I", masked_crc32c(block + kind)):
        raise ValueError("a block's checksum is wrong")
    (restarts,) = struct.unpack("<I", block[-4:])
    stream, key, pairs = io.BytesIO(block), b"", []
    while stream.tell() < size - 4 - 4 * restarts:  # what follows is for a search
        shared, unshared, length = (read_varint(stream) for _ in range(3))
        key = key[:shared] + stream.read(unshared)  # keys share prefixes with the key before
        pairs.append((key, stream.read(length)))
    return pairs


def read_varint(stream):
    """A little-endian base-128 number."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = stream.read(1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number is too long")


def read_protobuf(content):
    """The fields of a protobuf message: {field number: [values]}; numbers as int, the rest as bytes."""
    stream, message = io.BytesIO(content), {}
    while stream.tell() < len(content):
        field, kind = divmod(read_varint(stream), 8)
        if kind == 0:
            value = read_varint(stream)
        elif kind == 2:
            value = stream.read(read_varint(stream))
        elif kind == 5:
            value = stream.read(4)
        else:
            raise ValueError(f"field type {kind} is unknown")
        message.setdefault(field, []).append(value)
    return message


def number(message, field):
    """A number in a protobuf message, which leaves out what is 0."""
    return message.get(field, [0])[0]


def masked_crc32c(content):
    """LevelDB's checksum: CRC-32C (Castagnoli), rotated and offset so that sums of sums do not cancel."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = CRC32C_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


CRC32C_TABLE = list(range(256))
for _ in range(8):
    CRC32C_TABLE = [(crc >> 1) ^ (0x82F63B78 * (crc & 1)) for crc in CRC32C_TABLE]


# ---- Hugging Face folders: safetensors is a JSON header and raw bytes after it; the older .bin is a pickle ----------


def open_safetensors(path, file):
    """{name: function that reads the tensor} of a safetensors file in a folder or zip."""
    content, source = read_file(path, file), f"{path}: {file}"
    with reading(source, "it is no whole safetensors file; copy or download it again"):
        (length,) = struct.unpack("<Q", content[:8].tobytes())
        first, entries = 8 + length, []
        if first > len(content):
            raise ValueError(f"its header claims {length} bytes of {len(content)}")
        header = json.loads(content[8:first].tobytes())
        header.pop("__metadata__", None)
        for name, about in header.items():
            start, end = about["data_offsets"]
            entries.append(Entry(name, about["dtype"], tuple(about["shape"]), 0, first + start, end - start))
        end = first
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size)):
            if entry.offset != end:
                raise ValueError(f"a hole or an overlap before {entry.name}")
            end += entry.size
        if end != len(content):
            raise ValueError(f"it ends after {len(content) - first} bytes of tensors, its header says {end - first}")
    return {entry.name: partial(tensor_at, content, source, entry) for entry in entries}


def open_bin(path, file):
    """{name: function that gives the tensor} of a pytorch_model.bin in a folder or zip. Nothing in it can run code."""
    source = f"{path}: {file}"
    tensors = load_pickle(path / file if path.is_dir() else io.BytesIO(read_file(path, file)), source)
    with reading(source, "it is no dictionary of tensors; give the weights as the hub has them"):
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()):
            raise TypeError("something in it is none")

    def read(name, tensor):
        strange = tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_neg()
        if strange or tensor.dtype not in TYPES.values():
            what = f"{plain(name)} is {tensor.dtype}, {tensor.layout}"
            raise InputError(f"{source}: {what}; expected plain numbers of 16 or 32 bits")
        return tensor

    return {name: partial(read, name, tensor) for name, tensor in tensors.items()}


def load_pickle(file, source=None, advice="copy or download it again"):
    """What torch.save wrote into a file (a path or a buffer), on the CPU; nothing in it can run code.

    Raises InputError, naming `source` (by default the path), for anything else and for a damaged file.
    """
    with reading(source or file, f"it is no file of torch.save, or damaged; {advice}"):
        if zipfile.is_zipfile(file):  # since torch 1.6; torch.load itself looks at no checksum
            with zipfile.ZipFile(file) as zipped:
                if any(info.file_size != info.compress_size for info in zipped.infolist()) or zipped.testzip():
                    raise ValueError("a checksum is wrong")
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # of formats that are refused, or read all the same
            return torch.load(file, map_location="cpu", weights_only=True)
