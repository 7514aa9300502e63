"""GLUE and the toy task: download, parse, tokenise, make batches.

Read from top to bottom: what a task is, how its files get here, how they are parsed, how text becomes batches,
how answers are scored, and last the toy task, which needs no file at all.

Shapes: B sequences in a batch, T tokens in the longest of them.
"""

import contextlib
import copy
import hashlib
import os
import random
import sys
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import requests
import torch

try:
    import fcntl
except ImportError:  # Windows: there, two runs must not download the same file at once
    fcntl = None


class InputError(ValueError):
    """A mistake of the user or of the outside world: one line that says what, what was found, and what to do next."""


@contextlib.contextmanager
def reading(source, advice="copy or download it again"):
    """Around a parser of what comes from outside: whatever it raises becomes the one line of an `InputError`.

    Not around our own work on what was parsed: a fault of ours is not to be blamed on a file.
    """
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic inside the tokenizers library is no Exception
        if isinstance(error, OSError) and error.filename:  # a file that cannot be opened says so itself
            raise
        raise InputError(f"{source}: cannot be read ({type(error).__name__}: {plain(error)}); {advice}") from None


def plain(thing, most=80):
    """Text from outside for a message: printable, and not too long."""
    text = str(thing)
    return "".join(c if c.isprintable() else "?" for c in text[:most]) + "..." * (len(text) > most)


# ---- Tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One classification task. `labels[i]` is the word that stands for class i in the files."""

    labels: tuple
    metrics: tuple  # names in METRICS; the first is the one that tables lead with
    folder: str = ""  # GLUE's own name of it: the folder in its archive, and the file that its server takes
    archive: str = ""
    texts: tuple = ()  # headers of the sentence, or of both sentences of a pair
    label: str = "label"
    header: tuple = ()  # of the train and dev files that come without one
    parts: tuple = (("", ""),)  # what names end in: of its dev and test files, and of the file GLUE's server takes


BINARY, ENTAILMENT, PAIR = ("0", "1"), ("entailment", "not_entailment"), ("sentence1", "sentence2")
THREE_WAY = ("entailment", "neutral", "contradiction")
ACCURACY, F1 = ("accuracy",), ("F1", "accuracy")
COLA = ("source", "label", "mark", "sentence")
MNLI = (("_matched", "-m"), ("_mismatched", "-mm"))
TASKS = {
    "toy": Task(("negative", "positive"), ACCURACY),
    "cola": Task(BINARY, ("Matthews",), "CoLA", "CoLA.zip", ("sentence",), header=COLA),
    "sst-2": Task(BINARY, ACCURACY, "SST-2", "SST-2.zip", ("sentence",)),
    "mrpc": Task(BINARY, F1, "MRPC", "", ("#1 String", "#2 String"), "Quality"),
    "qqp": Task(BINARY, F1, "QQP", "QQP-clean.zip", ("question1", "question2"), "is_duplicate"),
    "mnli": Task(THREE_WAY, ACCURACY, "MNLI", "MNLI.zip", PAIR, "gold_label", parts=MNLI),
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


def find_task(name):
    """The `Task` of a name. Raises InputError if there is none."""
    if name.lower().replace("_", "-") in ("sts-b", "stsb"):
        raise InputError(
            "STS-B is a regression: the bound asks whether another class can still win, and a score has no classes; "
            f"choose one of: {', '.join(TASKS)}"
        )
    if name not in TASKS:
        raise InputError(f"unknown task {plain(name)!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name, folder=None):
    """The train and dev split of a task, as two `Examples`.

    folder: where the files lie or are downloaded to, by default in the cache; the toy task makes its sentences itself.
    Raises InputError for an unknown task and for everything that can be wrong with a download or a file.
    """
    task = find_task(name)
    if name == "toy":
        return toy_examples(4096, seed=1), toy_examples(600, seed=2)
    folder = own_path(folder or cache_dir() / "glue")
    if name == "mrpc" and not local_file(folder, "MRPC/train.tsv"):
        return load_mrpc(task, folder)
    train, dev = Examples(), Examples()
    read_into(train, task, folder, f"{task.folder}/train.tsv")
    for part, _ in task.parts:
        read_into(dev, task, folder, f"{task.folder}/dev{part}.tsv", part.removeprefix("_"))
    return train, dev


def load_test(name, folder=None):
    """The test split, whose labels GLUE keeps to itself (they are all 0 here), grouped by the file its server takes."""
    task, test = find_task(name), Examples()
    if name == "toy":
        raise InputError("the toy task has no test set; choose a task of GLUE")
    folder = own_path(folder or cache_dir() / "glue")
    task = replace(task, label="", header=())  # CoLA's test file does have a header
    for part, suffix in task.parts:
        file = f"{task.folder}/test{part}.tsv"
        if name == "mrpc" and not local_file(folder, file):
            file = "MRPC/msr_paraphrase_test.txt"
        read_into(test, task, folder, file, task.folder + suffix)
    if name == "mnli":  # a model of MNLI answers GLUE's diagnostic set, too
        try:
            read_into(test, task, folder, "AX.tsv", "AX")
        except InputError as error:
            print(f"left out   AX: {error}")
    return test


def read_into(examples, task, folder, name, group=""):
    """Append the rows of GLUE's file `name` to `examples`."""
    columns = (*task.texts, task.label) if task.label else task.texts
    add_rows(examples, parse_tsv(*find_file(folder, name, task.archive), columns, task.header), task, group)


def load_mrpc(task, folder):
    """MRPC as GLUE splits it: the rows of Microsoft's train file whose two ids stand in the dev ids are dev."""
    ids = ("#1 ID", "#2 ID")
    rows = parse_tsv(*find_file(folder, "MRPC/msr_paraphrase_train.txt"), (*task.texts, task.label, *ids))
    content, source = find_file(folder, "MRPC/mrpc_dev_ids.tsv")
    dev_ids = {tuple(pair) for _, pair in parse_tsv(content, source, ids, header=ids)}
    train, dev = [], []
    for place, (*fields, first, second) in rows:
        (dev if (first, second) in dev_ids else train).append((place, fields))
    if len(dev) != len(dev_ids) or not train:
        found = f"its {len(dev_ids)} ids are those of {len(dev)} of {len(rows)} rows of msr_paraphrase_train.txt"
        raise InputError(f"{source}: {found}; delete both files to download them again")
    splits = Examples(), Examples()
    add_rows(splits[0], train, task)
    add_rows(splits[1], dev, task)
    return splits


def add_rows(examples, rows, task, group=""):
    """Append rows of (place, [sentence, label word]), or of a pair of sentences, or without a label."""
    for place, fields in rows:
        *texts, label = fields if task.label else (*fields, task.labels[0])
        if label not in task.labels:
            raise InputError(f"{place}: unknown label {plain(label)!r}; expected one of {list(task.labels)}")
        examples.texts.append(texts[0] if len(texts) == 1 else tuple(texts))
        examples.labels.append(task.labels.index(label))
        if group:
            examples.groups.append(group)


# ---- Files and downloads --------------------------------------------------------------------------------------------

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
DOWNLOADS = {  # name in the folder: (URL of the folder that it is in, sha256)
    "AX.tsv": (GLUE, None),
    "CoLA.zip": (GLUE, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2.zip": (GLUE, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "QQP-clean.zip": (GLUE, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "MNLI.zip": (GLUE, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLIv2.zip": (GLUE, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE.zip": (GLUE, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI.zip": (GLUE, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "MRPC/msr_paraphrase_train.txt": (SENTEVAL, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
    "MRPC/msr_paraphrase_test.txt": (SENTEVAL, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
    "MRPC/mrpc_dev_ids.tsv": (GLUE, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
}


def cache_dir():
    """The folder for everything that is downloaded: $XDG_CACHE_HOME/dact-bert, by default ~/.cache/dact-bert."""
    with reading("~/.cache", "set XDG_CACHE_HOME to a folder"):
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dact-bert"


def own_path(text):
    """A path that the user gave, with ~ spelt out."""
    with reading(plain(text), "name a folder that there is"):
        return Path(text).expanduser()


def local_file(folder, name):
    """Where GLUE's file `name`, say RTE/dev.tsv, lies in a folder like GLUE's or in the task's own; None if nowhere."""
    return next((path for path in (folder / name, folder / Path(name).name) if path.is_file()), None)


def find_file(folder, name, archive=""):
    """GLUE's file `name`: (its bytes, where they are from). From `folder`, else downloaded: alone, or in its archive.

    Nothing is ever unpacked to disk.
    """
    path, wanted = local_file(folder, name), name if name in DOWNLOADS else archive
    if not path:
        if wanted not in DOWNLOADS or (folder / "train.tsv").is_file():  # a task's own folder, and incomplete
            raise InputError(f"{folder}: {Path(name).name} is missing beside train.tsv; add it, or name another folder")
        url, sha256 = DOWNLOADS[wanted]
        path = download(url + Path(wanted).name, folder / wanted, sha256)
    if path.suffix != ".zip":
        print(f"reading    {path}")
        return path.read_bytes(), str(path)
    print(f"reading    {name} in {path}")
    with reading(path, "delete it to download it again"), zipfile.ZipFile(path) as zipped:
        return zipped.read(name), f"{path}: {name}"


def download(url, path, sha256=None, member=None, pause=1.0):
    """Download `url` to `path` unless it is there already. Returns the path.

    The bytes go to `path` + ".part" first, and a later attempt (or a later run) resumes there. Only a file of the right
    sha256 gets its final name; without one, only a sound zip that holds `member` (if named), and never a web page.
    pause: seconds before the second attempt, doubled after each. Raises InputError with one line when it cannot be had.
    """
    path = Path(path)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as at_the_end:
            if fcntl:
                handle = os.open(path.parent, os.O_RDONLY)
                at_the_end.callback(os.close, handle)
                lock(handle, path.parent, wait=True)
            if not path.is_file():  # else another run downloaded it while this one waited
                try_download(url, path, sha256, member, pause)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from None
    return path


def lock(file, folder, wait=False):
    """Keep other runs out of a folder while `file` is open, in it or its descriptor. Raises InputError, or waits."""
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another run; choose another --out") from None
        except OSError:  # some network file systems have no locks
            pass


def try_download(url, path, sha256, member, pause):
    """`download`'s attempts. Raises InputError after the last, or at once where another one will not help."""
    part = Path(f"{path}.part")
    for wait in (0, pause, 2 * pause, 4 * pause):
        time.sleep(wait)
        try:
            start = fetch(url, part)
        except requests.HTTPError as error:
            status = error.response.status_code
            problem = f"the server answered {status} {error.response.reason}"
            if status < 500 and status not in (408, 429):
                break
            continue
        except OSError as error:  # all that requests raises is one, without a number
            if error.errno:
                raise  # the disk's, not the network's
            problem = f"the connection failed ({type(error).__name__}: {plain(error)})"
            continue
        problem = check_download(part, sha256, member)
        if not problem:
            os.replace(part, path)
            return
        part.unlink()
        if start == 0:  # a whole fresh copy is wrong: another one will be too
            break
    raise InputError(f"cannot download {url}: {problem}; try again later, or place the file at {path} yourself")


def fetch(url, part):
    """Append what is missing of `url` to the file `part`, or start it afresh where the server cannot resume.

    Returns the byte that it went on from.
    """
    start = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # a compressed transfer would change length and offsets
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if start and response.status_code == 416:  # nothing is missing, or it changed there: the check will tell
            return start
        response.raise_for_status()
        if response.status_code != 206:
            start = 0
        have, total = start, start + int(response.headers.get("Content-Length", 0))
        with open(part, "ab" if start else "wb") as file:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                have += len(chunk)
                show_progress(url, have, total)
        if total > have:
            raise requests.ConnectionError(f"{have} of {total} bytes came")
    return start


def show_progress(url, have, total):
    """One line that overwrites itself, on a terminal only."""
    if sys.stderr.isatty():
        of_total = f"of {total / 1e6:.1f} MB" if total else "MB"
        end = "\n" if have == total else ""
        print(f"\r{url.rsplit('/', 1)[-1]}: {have / 1e6:.1f} {of_total}", end=end, file=sys.stderr, flush=True)


def check_download(part, sha256, member):
    """What is wrong with a finished download, as words; empty if nothing is."""
    with open(part, "rb") as file:
        if sha256:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            return "" if found == sha256 else f"its sha256 is {found}, expected {sha256}"
        if file.read(100).lstrip().startswith(b"<"):
            return "a web page came in its place"
    if not member:
        return ""
    try:
        with zipfile.ZipFile(part) as zipped:
            names, damaged = zipped.namelist(), zipped.testzip()  # Google publishes no sums, but each member has one
    except Exception as error:  # zipfile raises many kinds
        return f"it is not a sound zip file ({error})"
    if damaged:
        return f"{damaged} in the zip is damaged"
    if not any(name == member or name.endswith("/" + member) for name in names):
        return f"the zip has no {member}"
    return ""


# ---- Parsing --------------------------------------------------------------------------------------------------------


def parse_tsv(content, source, columns, header=()):
    """Rows of a tab-separated file: a list of (place, [the fields of `columns`]), where a place is "source, line 2".

    header: the names of its columns; by default its first line says them.
    Quotes are ordinary characters in GLUE: a csv reader with its default quoting swallows hundreds of rows of MRPC.
    Only "\\n" ends a line: str.splitlines would also cut at characters that occur inside sentences.
    """
    again = "is it this task's? if so, delete the file to download it again"
    if not content:
        raise InputError(f"{source}: the file is empty; {again}")
    with reading(source, f"it is not UTF-8; {again}"):
        lines = content.decode("utf-8-sig").split("\n")  # MRPC starts with a byte order mark
    numbered = enumerate((line.removesuffix("\r") for line in lines), start=1)
    header = header or next(numbered)[1].split("\t")
    for column in columns:
        if column not in header:
            raise InputError(f"{source}: no column {column!r} in its first line, {plain(lines[0])!r}; {again}")
    taken = [header.index(column) for column in columns]
    rows, bad = [], []
    for number, line in numbered:
        place, fields = f"{source}, line {number}", line.split("\t")
        if len(fields) == len(header):
            rows.append((place, [fields[i] for i in taken]))
        elif line:
            bad.append(f"{place}: {len(fields)} columns, the header has {len(header)}")
    if 1000 * len(bad) > len(rows):  # one such row is known in QQP's 363,849
        raise InputError(f"{bad[0]}; {again}")
    if not rows:
        raise InputError(f"{source}: no examples in it; {again}")
    for row in bad:
        print(f"left out   {row}")
    return rows


# ---- Tokens and batches ---------------------------------------------------------------------------------------------


class Dataset:
    """A split, tokenised: what batches are cut from.

    tokenizer: a `tokenizers.Tokenizer` that adds the special tokens itself. max_tokens: longer inputs are cut, the
    longer sentence of a pair first. pad_id: the token id that fills short rows.
    """

    def __init__(self, examples, tokenizer, max_tokens, pad_id):
        tokenizer.enable_truncation(max_tokens)
        tokenizer.no_padding()  # padding is per batch, below
        with reading("the tokenizer", "give the one that came with the weights"):
            encodings = tokenizer.encode_batch(examples.texts)
        self.input_ids = [torch.tensor(encoding.ids) for encoding in encodings]
        self.segment_ids = [torch.tensor(encoding.type_ids) for encoding in encodings]
        self.labels = torch.tensor(examples.labels)
        self.groups = examples.groups
        self.lengths = np.array([len(ids) for ids in self.input_ids])
        self.pad_id = pad_id

    def __len__(self):
        return len(self.input_ids)

    def part(self, indices):
        """A `Dataset` of the examples `indices` alone."""
        part = copy.copy(self)
        part.input_ids, part.segment_ids = ([ids[i] for i in indices] for ids in (self.input_ids, self.segment_ids))
        part.groups = [self.groups[i] for i in indices] if self.groups else []
        part.labels, part.lengths = self.labels[indices], self.lengths[indices]
        return part

    def batch(self, indices):
        """Rows `indices` as (input_ids (B, T), segment_ids (B, T), mask (B, T)), padded on the right, and labels (B,).

        mask is True on real tokens.
        """
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([self.input_ids[i] for i in indices], batch_first=True, padding_value=self.pad_id)
        segment_ids = pad([self.segment_ids[i] for i in indices], batch_first=True)
        mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(self.lengths[indices])[:, None]
        return (input_ids, segment_ids, mask), self.labels[indices]


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

THINGS = "food service music room garden staff soup view tea story".split()
GOOD = "good great lovely fresh kind warm bright perfect".split()
BAD = "bad awful dirty cold rude dull bitter broken".split()
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
