"""BERT in one file of plain PyTorch (Devlin et al., 2019), RoBERTa (Liu et al., 2019), and their released weights.

RoBERTa is the same network, trained better: it differs in its numbers (`BertConfig`), in how it counts positions
(`Embeddings`) and in its tokenizer.

Read from top to bottom: config, embeddings, self-attention, block, encoder, classifier; then the tokenizers, and the
loaders for Google's TensorFlow checkpoints and for Hugging Face folders.

Shapes: B sequences, T tokens, D hidden size, H attention heads, C classes.
"""

import io
import json
import math
import pickle
import re
import string
import struct
from dataclasses import dataclass, fields
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

from data import InputError, cache_dir, download, plain, reading


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

        Raises InputError, naming `source`, for a config that makes no BERT, or another one than this file's.
        """
        for name, known in (("model_type", ("bert", "roberta")), ("hidden_act", ("gelu",)), ("is_decoder", (False,)),
                            ("position_embedding_type", ("absolute",))):  # fmt: skip
            if values.get(name, known[0]) not in known:
                raise InputError(f"{source}: {name} is {plain(values[name])!r}; implemented: {known}")
        with reading(source, "give the config that came with the weights"):
            if values.get("model_type") == "roberta":
                values = {"pad_token_id": 1} | values
                values["first_position"] = values["pad_token_id"] + 1
            config = cls(**{f.name: f.type(values[f.name]) for f in fields(cls) if f.name in values})
            if max(16 * config.num_hidden_layers, config.hidden_size) > 16384:  # it would fill the memory
                raise ValueError(f"{config.num_hidden_layers} blocks of size {config.hidden_size} are too large")
            if config.hidden_size % config.num_attention_heads:
                raise ValueError("hidden_size is no multiple of num_attention_heads")
        return config


def init_weights(module):
    """BERT's own start for weights that come from no checkpoint: matrices ~ N(0, 0.02) cut at 2 sigma, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Table(nn.Embedding):
    """nn.Embedding with BERT's start. On the "meta" device (see `build`) torch's own imports a compiler (2 s)."""

    reset_parameters = init_weights


class Embeddings(nn.Module):
    """Word + position + segment, normalised."""

    def __init__(self, config):
        super().__init__()
        self.word = Table(config.vocab_size, config.hidden_size)
        self.position = Table(config.max_position_embeddings, config.hidden_size)
        self.segment = Table(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
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
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, mask):
        q, k, v = (
            linear(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for linear in (self.query, self.key, self.value)
        )
        mask = mask[:, None, None, :]  # (B, 1, 1, T)
        if self.training and hidden.device.type == "cpu":  # step by step: faster there, with dropout or in bfloat16
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
            scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
            context = self.dropout(scores.softmax(-1)) @ v
        else:
            dropout = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
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
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

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
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
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


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def wordpiece_tokenizer(vocab, settings=None):
    """BERT's tokenizer over the list `vocab`; adds [CLS] and [SEP] and numbers the segments.

    settings: of a tokenizer_config.json. Where it does not say do_lower_case, the vocabulary does: one that lacks a
    letter from A to Z was made from lowered text.
    """
    ids, settings = {token: i for i, token in enumerate(vocab)}, settings or {}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.add_special_tokens([token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in ids])
    tokenizer.normalizer = BertNormalizer(
        lowercase=settings.get("do_lower_case", not {*string.ascii_uppercase} <= ids.keys()),
        strip_accents=settings.get("strip_accents"),  # by default exactly when it lowers
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def byte_level_tokenizer(ids, merges, space=False):
    """RoBERTa's tokenizer, byte-level BPE: ids {token: id}, merges [(left, right)]. A pair is <s> A </s></s> B </s>.

    No word is unknown, for every byte is a token. RoBERTa has one segment, 0. space: whether to put one before a text.
    """
    if len(ids) > len(merges) + 1000:  # all but 256 bytes and a few special tokens come from a merge
        raise ValueError(f"{len(ids)} tokens and {len(merges)} merges: merges.txt is cut")
    tokenizer = Tokenizer(BPE(ids, merges))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])  # it stands for a word and its space
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=space)
    tokenizer.post_processor = RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=space)
    return tokenizer


def read_tokenizer(folder):
    """A model's tokenizer: tokenizer.json, else byte-level BPE (vocab.json, merges.txt), else WordPiece (vocab.txt)."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    kind = settings.get("tokenizer_class") or "BertTokenizer"
    if not re.fullmatch("(Bert|Roberta|PreTrained)Tokenizer(Fast)?", kind):  # another one cuts words otherwise
        raise ValueError(f"no {kind} can be made from a vocabulary; add its tokenizer.json")
    if (folder / "vocab.json").is_file():
        ids, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        return byte_level_tokenizer(ids, merges, settings.get("add_prefix_space", False))
    vocab = (folder / "vocab.txt").read_text("utf-8-sig").rstrip("\n ").split("\n")
    return wordpiece_tokenizer([token.rstrip(" ") for token in vocab], settings)


def check_tokenizer(tokenizer, config, source):
    """Raise InputError unless all that a tokenizer gives has its row in a model's tables."""
    tokenizer.no_padding()
    tokens = [config.pad_token_id, *tokenizer.get_vocab().values()]
    segments = tokenizer.encode("a", "\u2603 zq").type_ids  # with a word that no tokenizer knows
    for what, ids, rows in (("token", tokens, config.vocab_size), ("segment", segments, config.type_vocab_size)):
        if min(ids) < 0 or max(ids) >= rows:
            raise InputError(f"{source}: tokenizer has {what}s {min(ids)}..{max(ids)}, the model {rows}; give its own")
    if config.first_position and tokenizer.token_to_id("<pad>") not in (None, config.pad_token_id):  # see `Embeddings`
        raise InputError(f"{source}: the tokenizer's <pad> is not the config's pad_token_id; give the model's own")
    if tokenizer.num_special_tokens_to_add(is_pair=False) < 2:  # the heads read the first token, and take it for [CLS]
        raise InputError(f"{source}: the tokenizer puts no [CLS] and [SEP] around a text; give the model's own")


# ---- Loading: which model, from where -------------------------------------------------------------------------------

GOOGLE_URL = "https://storage.googleapis.com/bert_models/"
GOOGLE_MODELS = {  # of the smaller ones, every uncased_L-*_H-*_A-* is found, too
    "bert-base-uncased": "2018_10_18/uncased_L-12_H-768_A-12",
    "bert-base-cased": "2018_10_18/cased_L-12_H-768_A-12",
    "bert-large-uncased": "2018_10_18/uncased_L-24_H-1024_A-16",
    "bert-large-cased": "2018_10_18/cased_L-24_H-1024_A-16",
    "bert-tiny": "2020_02_20/uncased_L-2_H-128_A-2",
    "bert-mini": "2020_02_20/uncased_L-4_H-256_A-4",
    "bert-small": "2020_02_20/uncased_L-4_H-512_A-8",
    "bert-medium": "2020_02_20/uncased_L-8_H-512_A-8",
}
HUB_MODELS = {  # Meta's own files, at a fixed commit
    "roberta-base": "https://huggingface.co/FacebookAI/roberta-base/resolve/e2da8e2f811d1448a5b465c236feacd80ffbac7b/",
    "roberta-large": "https://huggingface.co/FacebookAI/roberta-large/resolve/722cf37b1afa9454edce342e7895e588b6ff1d59/",
}
HUB_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
HUB_SUMS = {  # sha256; of the other files we know of no published sum
    "roberta-base/vocab.json": "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655",
    "roberta-base/merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "roberta-base/model.safetensors": "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81",
}


def find_model(name):
    """The folder of a model: a path, or a name of GOOGLE_MODELS or HUB_MODELS (downloaded once). Raises InputError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    cache = cache_dir() / "models"
    if name in HUB_MODELS:
        for file in HUB_FILES:
            download(HUB_MODELS[name] + file, cache / name / file, HUB_SUMS.get(f"{name}/{file}"))
        return cache / name
    if name in GOOGLE_MODELS or re.fullmatch(r"uncased_L-\d+_H-\d+_A-\d+", str(name)):
        place = GOOGLE_MODELS.get(name, f"2020_02_20/{name}")
        return download(f"{GOOGLE_URL}{place}.zip", cache / place, inside="bert_config.json")
    known = ", ".join([*GOOGLE_MODELS, *HUB_MODELS, "uncased_L-*_H-*_A-*"])
    raise InputError(f"unknown model {plain(name)!r}: no such folder (unpack a zip first), nor one of {known}")


def load_pretrained(name, num_classes):
    """A pretrained model with a fresh classification layer, and its tokenizer: (BertClassifier, Tokenizer).

    name: as for `find_model`. Raises InputError for all that is missing, misshapen or unreadable.
    """
    folder = find_model(name)
    print(f"reading    {folder}")
    with reading(folder, "give the folder with all files of one checkpoint"):
        tensors, google = read_weights(folder), folder / "bert_config.json"
        with reading(f"{folder}: the tokenizer", "give the one that came with the weights"):
            tokenizer = read_tokenizer(folder)
        roberta = any("roberta." in name for name in tensors)
        kind = "roberta" if roberta else "missing" if (folder / "vocab.json").is_file() else "bert"  # of old configs
        config = {"model_type": kind} | read_json(google if google.is_file() else folder / "config.json")
        if roberta and config["model_type"] == "bert":
            raise ValueError("its config says bert, but its weights are a RoBERTa's")
        config = BertConfig.from_dict(config, folder)
        check_tokenizer(tokenizer, config, folder)
        if (count := tokenizer.get_vocab_size()) < config.vocab_size:  # what is missing is [UNK], or cut otherwise
            print(f"note: the tokenizer has {count} tokens, the model {config.vocab_size}; is its file whole?")
        return build(config, num_classes, tensors, folder), tokenizer


def build(config, num_classes, tensors, source):
    """A BertClassifier with the weights `tensors` {name in a checkpoint: tensor}, in float32, and a fresh classifier.

    What does not belong to BERT itself, such as the head of a task, is left out, with a note. What does must fit, and
    be whole: only a missing pooler starts from random weights, with a note, too.
    """
    ours = {name: our_name(name) for name, tensor in tensors.items() if tensor.is_floating_point()}  # no counters
    ours = {name: key for name, key in ours.items() if key.startswith(("bert.", "classifier.pooler."))}
    if len({*ours.values()}) < len(ours):
        raise ValueError("a weight is there twice, under two names")
    if left_out := sorted((name for name in tensors if name not in ours), key=len):  # a head before optimiser's slots
        print(f"note: {source}: left out, for they are not BERT itself: {plain(', '.join(left_out))}")
    if "classifier.pooler.weight" not in ours.values():
        print(f"note: {source} has no pooler; it starts from random weights")
    classifier = Classifier(config, num_classes).apply(init_weights)
    with torch.device("meta"):  # no time and no memory for weights that the checkpoint takes the place of
        model = BertClassifier(Bert(config), classifier)
    state = classifier.state_dict(prefix="classifier.")
    for name, key in ours.items():
        tensor = tensors[name].T if name.endswith("kernel") else tensors[name]  # TensorFlow's are (in, out)
        state[key] = tensor.float().contiguous()
    model.load_state_dict(state, assign=True)
    return model


RENAMED = (  # names in checkpoints, Google's, the hub's and older ones, become a BertClassifier's, one after the other
    (r"^(?=.*[./](adam_[mv]|Adam(_\d+)?)$)", "optimiser "),  # what training keeps beside a weight
    ("/", "."),
    (r"\.(kernel|gamma)$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"_embeddings$", "_embeddings.weight"),
    (r"^(module\.)?((bert|roberta)\.|(?=embeddings|encoder|pooler))", "bert."),
    (r"^bert\.pooler\.dense", "classifier.pooler"),
    (r"^bert\.encoder\.layer[._]", "bert.blocks."),
    (r"^bert\.embeddings", "bert.embed"),
    (r"(word|position)_embeddings", r"\1"),
    ("token_type_embeddings", "segment"),
    (r"embed\.LayerNorm", "embed.norm"),
    (r"attention\.self", "attention"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"attention\.output\.dense", "attention.output"),
    (r"intermediate\.dense", "up"),
    (r"\boutput\.dense", "down"),
    (r"\boutput\.LayerNorm", "norm"),
)


def our_name(name):
    for theirs, ours in RENAMED:
        name = re.sub(theirs, ours, name)
    return name


def read_weights(folder):
    """{name in the checkpoint: tensor} of a folder of any layout."""
    google = sorted(folder.glob("[!.]*.ckpt*.index"))
    if len(google) > 1:
        raise InputError(f"{folder}: {google[0].name} and {google[1].name} are two checkpoints; keep one of them")
    if google:
        return read_google(google[0])
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", load_pickle)):
        parts, index, tensors = [folder / name], folder / f"{name}.index.json", {}
        if index.is_file():  # the weights are in several files
            parts = [folder / part for part in sorted({*read_json(index)["weight_map"].values()})]
        if parts[0].is_file():
            for part in parts:
                with reading(part):
                    tensors |= read(part)
            return tensors
    raise InputError(f"{folder}: no *.ckpt.index, model.safetensors or pytorch_model.bin in it; add the weights")


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text("utf-8")))


def load_pickle(path, advice="copy or download it again"):
    """What torch.save wrote into a file, on the CPU; nothing in it can run code. Raises InputError."""
    with reading(path, advice):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:  # torch's own words advise to load it unsafely
            raise InputError(f"{path}: no whole file of torch.save, or more in it than tensors; {advice}") from error


def read_safetensors(path):
    """{name: tensor} of a safetensors file: the length of a header in JSON, the header, and the raw bytes after it."""
    content = np.memmap(path, np.uint8, mode="c")  # bytes that are read when they are looked at, and copied on write
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    first = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:first].tobytes())
    return {
        name: tensor_at(content, first + about["data_offsets"][0], kinds[about["dtype"]], about["shape"])
        for name, about in header.items()
        if about.get("dtype") in kinds  # what is left out is "__metadata__", and counters
    }


def tensor_at(content, offset, dtype, shape):
    """A tensor in the bytes of a file, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(content[offset : offset + size]).view(dtype).view(shape)


# ---- Google's checkpoints: an index (a small LevelDB table of names and places) and the raw bytes beside it ---------


def read_google(index):
    """{name: tensor} of a TensorFlow checkpoint; index: the path of its *.index file."""
    with reading(index):
        entries, num_shards, lengths = read_index(index.read_bytes())
    tensors = {}
    for name, (shape, shard, offset) in entries.items():
        path = f"{str(index).removesuffix('.index')}.data-{shard:05d}-of-{num_shards:05d}"
        with reading(path):
            content = np.memmap(path, np.uint8, mode="c")
            if len(content) != lengths[shard]:
                raise ValueError(f"it has {len(content)} bytes, its index says {lengths[shard]}")
            tensors[name] = tensor_at(content, offset, torch.float32, shape)
    return tensors


def read_index(content):
    """Parse a checkpoint's `.index` file.

    Returns {name of a float32 tensor: (shape, shard, offset)}, the number of shards, and {shard: its length in bytes}.

    A LevelDB table: blocks of (key, value) pairs sorted by key, then an index block of the blocks' places, then a
    footer of 48 bytes with the index block's place and a magic number.
    """
    if content[-8:] != struct.pack("<Q", 0xDB4775248B80FB57):
        raise ValueError("it does not end with a table's magic number")
    footer, entries, num_shards, lengths = io.BytesIO(content[-48:]), {}, 1, {}
    read_varint(footer), read_varint(footer)  # the place of the meta index block: unused
    for _, place in read_block(content, footer):
        for key, value in read_block(content, io.BytesIO(place)):
            message = read_protobuf(value)
            if not key:
                num_shards = number(message, 1)  # the header
                continue
            kind, shard, offset, size = (number(message, field) for field in (1, 3, 4, 5))
            lengths[shard] = max(lengths.get(shard, 0), offset + size)
            if kind == 1:  # float32
                dims = read_protobuf(message.get(2, [b""])[0]).get(2, [])
                entries[key.decode()] = tuple(number(read_protobuf(dim), 1) for dim in dims), shard, offset
    return entries, num_shards, lengths


def read_block(content, place):
    """The (key, value) pairs of the block of a LevelDB table at a place, a stream of two varints: offset and size."""
    start, size = read_varint(place), read_varint(place)
    block = content[start : start + size]
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
