"""GLUE and the toy task: download, parse, tokenise, make batches.

Read from top to bottom: what a task is, how its files get here, how they are parsed, how text becomes batches,
how answers are scored, and last the toy task, which needs no file at all.

Shapes: B sequences in a batch, T tokens in the longest of them.
"""

import contextlib
import hashlib
import os
import random
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests
import torch


class InputError(ValueError):
    """A mistake of the user or of the outside world: one line that says what, what was found, and what to do next."""


@contextlib.contextmanager
def reading(source, advice="copy or download it again"):
    """Around what meets the outside world: whatever it raises becomes the one line of an `InputError`, on `source`."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic inside the tokenizers library is no Exception
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # our own words are ValueErrors
        raise InputError(f"{plain(source)}: {kind}{plain(error)}; {advice}") from error


def plain(thing, most=200):
    """Text from outside, on one line of a message."""
    text = " ".join(str(thing).split())
    return "".join(c if c.isprintable() else "?" for c in text[:most]) + "..." * (len(text) > most)


# ---- Tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One classification task. `labels[i]` is the word that stands for class i in the files."""

    labels: tuple
    metrics: tuple  # names in METRICS; the first is the one that tables lead with
    folder: str = ""  # GLUE's own name of it: the folder in its archive
    archive: str = ""
    texts: tuple = ()  # headers of the sentence, or of both sentences of a pair
    label: str = "label"
    header: tuple = ()  # of the train and dev files that come without one
    parts: tuple = ("",)  # what the names of its dev and test files end in


BINARY, ENTAILMENT, PAIR = ("0", "1"), ("entailment", "not_entailment"), ("sentence1", "sentence2")
THREE_WAY = ("entailment", "neutral", "contradiction")
ACCURACY, F1_AND_ACCURACY = ("accuracy",), ("F1", "accuracy")
COLA = ("source", "label", "mark", "sentence")
TASKS = {
    "toy": Task(("negative", "positive"), ACCURACY, texts=("sentence",)),
    "cola": Task(BINARY, ("Matthews",), "CoLA", "CoLA.zip", ("sentence",), header=COLA),
    "sst-2": Task(BINARY, ACCURACY, "SST-2", "SST-2.zip", ("sentence",)),
    "mrpc": Task(BINARY, F1_AND_ACCURACY, "MRPC", "", ("#1 String", "#2 String"), "Quality"),
    "qqp": Task(BINARY, F1_AND_ACCURACY, "QQP", "QQP-clean.zip", ("question1", "question2"), "is_duplicate"),
    "mnli": Task(THREE_WAY, ACCURACY, "MNLI", "MNLI.zip", PAIR, "gold_label", parts=("_matched", "_mismatched")),
    "qnli": Task(ENTAILMENT, ACCURACY, "QNLI", "QNLIv2.zip", ("question", "sentence")),
    "rte": Task(ENTAILMENT, ACCURACY, "RTE", "RTE.zip", PAIR),
    "wnli": Task(BINARY, ACCURACY, "WNLI", "WNLI.zip", PAIR),
}


@dataclass
class Examples:
    """Labelled sentences or pairs of them, and the name of the group that each belongs to, where a split has groups."""

    texts: list = field(default_factory=list)  # str, or (str, str) for a pair
    labels: list = field(default_factory=list)  # int, the class
    groups: list = field(default_factory=list)  # str: the toy task's level, MNLI's matched or mismatched

    def add(self, task, rows, path, group=""):
        """Append rows of `path`: [sentence, label word], or [first sentence, second sentence, label word]."""
        for *texts, label in rows:
            if label not in task.labels:
                raise InputError(f"{path}: unknown label {plain(label)!r}; expected one of {task.labels}")
            self.texts.append(texts[0] if len(texts) == 1 else tuple(texts))
            self.labels.append(task.labels.index(label))
            if group:
                self.groups.append(group)


def find_task(name):
    """The `Task` of a name. Raises InputError if there is none."""
    if name not in TASKS:
        raise InputError(f"unknown task {plain(name)!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name, folder=None):
    """The train and dev split of a task, as two `Examples`.

    folder: where the files lie or are downloaded to, by default in the cache; the toy task makes its sentences itself.
    Raises InputError for an unknown task and for everything that can be wrong with a download or a file.
    """
    task, train, dev = find_task(name), Examples(), Examples()
    if name == "toy":
        return toy_examples(8192, seed=1), toy_examples(600, seed=2)
    folder = task_folder(task, folder)
    if name == "mrpc" and not (folder / "train.tsv").is_file():
        return load_mrpc(task, folder)
    for split, part in ((train, "train"), *((dev, f"dev{part}") for part in task.parts)):
        path, columns = folder / f"{part}.tsv", (*task.texts, task.label)
        split.add(task, parse_tsv(path, columns, task.header), path, group=part.partition("_")[2])
    return train, dev


def load_mrpc(task, folder):
    """MRPC as GLUE splits it: the rows of Microsoft's train file whose two ids stand in the dev ids are dev."""
    ids, splits, path = ("#1 ID", "#2 ID"), (Examples(), Examples()), mrpc_file(folder, "msr_paraphrase_train.txt")
    dev_ids = {*map(tuple, parse_tsv(mrpc_file(folder, "mrpc_dev_ids.tsv"), ids, header=ids))}
    for *pair, label, first, second in parse_tsv(path, (*task.texts, task.label, *ids)):
        splits[(first, second) in dev_ids].add(task, [[*pair, label]], path)
    if len(splits[1].texts) != len(dev_ids):
        raise InputError(f"{folder}: mrpc_dev_ids.tsv does not belong to msr_paraphrase_train.txt; delete both")
    return splits


# ---- Files and downloads --------------------------------------------------------------------------------------------

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
DOWNLOAD_ADVICE = "try again later; without a network, give --data FOLDER and --model FOLDER (see README.md)"
SHA256 = {
    "CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    "SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
    "WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46",
    "msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    "msr_paraphrase_test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}


def cache_dir():
    """The folder for everything that is downloaded: $XDG_CACHE_HOME/dact-bert, by default ~/.cache/dact-bert."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dact-bert"


def task_folder(task, folder):
    """Where a task's files are: `folder` itself or in it, as GLUE has it (by default in the cache), or downloaded."""
    folder = Path(folder or cache_dir() / "glue").expanduser()
    if folder.is_file():
        raise InputError(f"{folder} is no folder; name the one that holds GLUE's files (unpack a zip first)")
    if any((folder / name).is_file() for name in ("train.tsv", "msr_paraphrase_train.txt")):
        return folder
    if task.archive:
        download(GLUE + task.archive, folder / task.folder, SHA256[task.archive], inside="train.tsv")
    return folder / task.folder


def mrpc_file(folder, name):
    """One of MRPC's files, which are no archive of GLUE's: there, or downloaded."""
    return download((SENTEVAL if name.startswith("msr") else GLUE) + name, folder / name, SHA256[name])


def download(url, path, sha256=None, inside=None):
    """Download `url` to `path` unless it is there already. Returns the path. Raises InputError if it cannot be had.

    inside: of a zip that is unpacked, a file in the folder that becomes `path`.
    Only what is whole and of the right sum gets its name: an interruption leaves nothing, and two runs do not meet.
    """
    if path.exists():
        return path
    print(f"download   {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with reading(url, DOWNLOAD_ADVICE), tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as scratch:
        part = Path(scratch, "part")
        fetch(url, part)
        if sha256 and (found := hashlib.sha256(part.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"its sha256 is {found}, expected {sha256}")
        if inside:
            with zipfile.ZipFile(part) as zipped:
                zipped.extractall(f"{scratch}/files")  # checks each file's sum, and writes nothing outside
            part = next(Path(scratch, "files").rglob(inside)).parent
        if not path.exists():  # else another run was faster
            os.replace(part, path)
    return path


def fetch(url, part, attempts=3):
    """Download `url` into the file `part`, from the start in each of its attempts."""
    try:
        with requests.get(url, stream=True, timeout=(10, 60)) as response:
            response.raise_for_status()
            if "text/html" in response.headers.get("Content-Type", ""):  # so answers a network that asks for a login
                raise requests.ConnectionError("a web page came in its place")
            have, total = 0, int(response.headers.get("Content-Length", 0))
            with open(part, "wb") as file:
                for chunk in response.iter_content(1 << 20):
                    have += file.write(chunk)
                    if sys.stderr.isatty():
                        print(f"{have >> 20} of {total >> 20} MiB", end="\r", file=sys.stderr, flush=True)
            if have < total:  # urllib3 itself says so from version 2 on
                raise requests.ConnectionError(f"{have} of {total} bytes came")
    except requests.RequestException:
        if attempts == 1:
            raise
        time.sleep(3)
        fetch(url, part, attempts - 1)


# ---- Parsing --------------------------------------------------------------------------------------------------------


def parse_tsv(path, columns, header=(), most_bad=0.001):
    """Rows of a tab-separated file: lists of the fields of `columns`. header: by default its first line says it.

    most_bad: the share of rows that may have too few or too many fields; they are left out, with a note.
    Quotes are ordinary characters in GLUE: a csv reader with its default quoting swallows hundreds of rows of MRPC.
    Only "\\n" ends a line: str.splitlines would also cut at characters that occur inside sentences.
    """
    print(f"reading    {path}")
    with reading(path, "is it this task's? if so, delete it to download it again"):
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
        rows = [line.split("\t") for line in lines if line]
        header = list(header) or (rows.pop(0) if rows else [])
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"no column {missing[0]!r} in its first line")
        taken = [header.index(column) for column in columns]
        whole = [row for row in rows if len(row) == len(header)]
        what = f"{len(whole)} of {len(rows)} rows have the {len(header)} columns of the header"
        if not whole or len(whole) < (1 - most_bad) * len(rows):  # one bad row is known in QQP's 363,849
            raise ValueError(what)
        if len(whole) < len(rows):
            print(f"note: {path}: {what}; the others are left out")
    return [[row[i] for i in taken] for row in whole]


# ---- Tokens and batches ---------------------------------------------------------------------------------------------


class Dataset:
    """A split, tokenised: what batches are cut from.

    tokenizer: a `tokenizers.Tokenizer` that adds the special tokens itself. max_tokens: longer inputs are cut, the
    longer sentence of a pair first. pad_id: the token id that fills short rows.
    """

    def __init__(self, examples, tokenizer, max_tokens, pad_id):
        tokenizer.no_padding()  # padding is per batch, below
        with reading("the tokenizer", "give the one that came with the weights, and text as input"):
            tokenizer.enable_truncation(max_tokens)
            encodings = tokenizer.encode_batch(examples.texts)
        self.input_ids = [torch.tensor(encoding.ids) for encoding in encodings]
        self.segment_ids = [torch.tensor(encoding.type_ids) for encoding in encodings]
        self.labels = torch.tensor(examples.labels)
        self.groups = examples.groups
        self.lengths = np.array([len(ids) for ids in self.input_ids])
        self.pad_id = pad_id
        if cut := sum(bool(encoding.overflowing) for encoding in encodings):
            print(f"note: {cut} of {len(self)} inputs are longer than {max_tokens} tokens, and cut (--max-tokens)")

    def __len__(self):
        return len(self.input_ids)

    def batch(self, indices, device="cpu"):
        """-> (input_ids, segment_ids, mask), each (B, T), padded on the right where mask is False; and labels (B,)."""
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([self.input_ids[i] for i in indices], batch_first=True, padding_value=self.pad_id)
        segment_ids = pad([self.segment_ids[i] for i in indices], batch_first=True)
        mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(self.lengths[indices])[:, None]
        tensors, cuda = (input_ids, segment_ids, mask, self.labels[indices]), torch.device(device).type == "cuda"
        *inputs, labels = (x.to(device, non_blocking=cuda) for x in tensors)  # a GPU need not be waited for
        return tuple(inputs), labels


def training_batches(lengths, batch_size, seed):
    """Index arrays of one epoch: shuffled, each batch of similar lengths.

    The shuffled examples are sorted by length inside pools of 16 batches, and the batches shuffled again: little
    padding, yet no two epochs alike. seed: an int or a sequence of ints, e.g. (seed, epoch).
    """
    generator = np.random.default_rng(seed)
    order, size = generator.permutation(len(lengths)), 16 * batch_size
    batches = []
    for start in range(0, len(order), size):
        pool = order[start : start + size]
        batches += [pool[rows] for rows in evaluation_batches(lengths[pool], batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def evaluation_batches(lengths, batch_size):
    """Index arrays that cover every example once, sorted by length."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# ---- Metrics: percentages of predicted classes against labels, both (n,) int tensors --------------------------------


def accuracy(predicted, labels):
    """Percent of predictions that are right."""
    return 100 * (predicted == labels).double().mean().item()


def f1(predicted, labels):
    """F1 of class 1, in percent; 0 without a true positive."""
    true_positive = ((predicted == 1) & (labels == 1)).sum().item()
    positive = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 200 * true_positive / positive if true_positive else 0.0


def matthews(predicted, labels):
    """Matthews' correlation of two classes, in percent, from -100 to 100; 0 where either never varies."""
    pearson = torch.corrcoef(torch.stack([predicted, labels]).double())[0, 1]  # of two 0-1 numbers it is Matthews'
    return 100 * pearson.nan_to_num().item()  # 0 / 0 where either never varies


METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews}


# ---- The toy task: is the speaker pleased? --------------------------------------------------------------------------

THINGS = ["food", "service", "music", "room", "garden", "staff", "soup", "view", "tea", "story"]
GOOD = ["good", "great", "lovely", "fresh", "kind", "warm", "bright", "perfect"]
BAD = ["bad", "awful", "dirty", "cold", "rude", "dull", "bitter", "broken"]
TOY_WORDS = ["the", "was", "not", "but", ",", "former", "latter", "counts", *THINGS, *GOOD, *BAD]


def clause(rng):
    """A clause and whether it pleases: ("the soup was not awful", True)."""
    good, negated = rng.random() < 0.5, rng.random() < 0.5
    word = rng.choice(GOOD if good else BAD)
    return f"the {rng.choice(THINGS)} was {'not ' if negated else ''}{word}", good != negated


def toy_examples(count, seed):
    """Sentences in three levels of difficulty, a third each.

    1: one clause, perhaps with a "not":         the tea was not lovely
    2: two clauses, of which the second wins:    the tea was not lovely but the staff was kind
    3: the end of the sentence says which wins:  the tea was not lovely but the staff was kind , the former counts
    """
    rng = random.Random(seed)
    examples = Examples()
    for i in range(count):
        level = i % 3 + 1
        text, label = clause(rng)
        if level > 1:
            second, second_label = clause(rng)
            latter = level == 2 or rng.random() < 0.5
            ending = f" , the {'latter' if latter else 'former'} counts" if level == 3 else ""
            text, label = f"{text} but {second}{ending}", second_label if latter else label
        examples.texts.append(text)
        examples.labels.append(int(label))
        examples.groups.append(f"level {level}")
    return examples
