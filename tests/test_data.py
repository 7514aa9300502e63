"""data.py: downloads against a server on this machine, GLUE's quirks, batches, metrics, the toy task."""

import hashlib
import http.server
import io
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fakes import ASSETS, GLUE, google_arrays, needs_assets, refuse, write_glue, write_google, write_roberta
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace

import bert
import data
from data import InputError

BODY = bytes(range(256)) * 12288  # 3 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


def test_any_error_of_a_reader_becomes_one_line(tmp_path):
    def fail(error, source="file"):
        with data.reading(source, "do this"):
            raise error

    refuse(lambda: fail(ValueError("too\nlong")), "file: too long; do this")
    refuse(lambda: fail(KeyError("name")), "file: KeyError: 'name'; do this")
    refuse(lambda: fail(InputError("as it is")), "as it is")
    refuse(lambda: fail(ValueError("x" * 1000 + "\x1b"), "\x1b[31m"), "?[31m: xxx", "...; do this")
    for error in (MemoryError, KeyboardInterrupt):  # of which no file is guilty
        with pytest.raises(error):
            fail(error())


# ---- Downloads ------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files` {path: bytes}, by its `behave` {path: list of behaviours, one a request}."""

    def do_GET(self):
        behaviours = self.server.behave.get(self.path, [])
        behaviour = behaviours.pop(0) if behaviours else "good"
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.seen.append((self.path, start))
        if behaviour == "drop":  # the connection closes without a word
            return
        if self.path not in self.server.files or isinstance(behaviour, int):
            self.send_error(behaviour if isinstance(behaviour, int) else 404)
            return
        body = self.server.files[self.path]
        start *= behaviour != "no ranges"
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + (len(body) - start) // 2] if behaviour == "truncate" else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.behave, server.seen = {"/file": BODY}, {}, []
    server.url = lambda path="/file": f"http://127.0.0.1:{server.server_port}{path}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_good_download_and_no_second_one(server, tmp_path):
    path = tmp_path / "new" / "file"
    for _ in range(2):
        assert data.download(server.url(), path, SHA256) == path
        assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("failure", ["truncate", "drop", 500, 503, 429])
def test_two_failures_are_got_over(server, tmp_path, failure):
    server.behave["/file"] = [failure, failure]
    assert data.download(server.url(), tmp_path / "file", SHA256).read_bytes() == BODY
    starts = [start for _, start in server.seen]
    assert starts == ([0, 1 << 20, 2 << 20] if failure == "truncate" else [0, 0, 0])  # what came is not asked for again


def test_a_server_that_cannot_go_on_in_the_middle_starts_over(server, tmp_path):
    server.behave["/file"] = ["truncate", "no ranges"]
    assert data.download(server.url(), tmp_path / "file", SHA256).read_bytes() == BODY


@pytest.mark.parametrize(
    "failure, words", [("truncate", "IncompleteRead"), ("drop", "ConnectionError"), (503, "503"), (404, "404")]
)
def test_after_three_attempts_one_line_says_what_to_do(server, tmp_path, failure, words):
    server.behave["/file"] = [failure] * 3
    refuse(
        lambda: data.download(server.url(), tmp_path / "file"), server.url(), words, "--data FOLDER", "--model FOLDER"
    )
    assert len(server.seen) == 3 and os.listdir(tmp_path) == []


def test_what_is_no_whole_file_gets_no_name(server, tmp_path, monkeypatch):
    path = tmp_path / "file"
    refuse(lambda: data.download(server.url(), path, "0" * 64), "its sha256 is " + SHA256[:50])
    refuse(lambda: data.download("http://127.0.0.1:9/file", path), "http://127.0.0.1:9/file: ConnectionError")
    server.files["/file"] = b"<!DOCTYPE html><title>Log in</title>"  # so some networks answer everything
    refuse(lambda: data.download(server.url(), path), "a web page came in its place")

    def fail(url, part):
        part.write_bytes(BODY[:99])
        raise error

    monkeypatch.setattr(data, "fetch", fail)
    for error, kind in ((OSError(28, "No space left on device"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(kind):
            data.download(server.url(), path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inside", [None, "member"])
def test_runs_at_once_do_not_meet(server, tmp_path, inside):
    if inside:
        server.files["/file"] = zip_bytes({inside: BODY})
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(data.download, server.url(), tmp_path / "new", None, inside) for _ in range(4)]
    assert {call.result() for call in calls} == {tmp_path / "new"} and os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / inside if inside else tmp_path / "new").read_bytes() == BODY


def test_progress_on_a_terminal_only(server, tmp_path, capsys, monkeypatch):
    data.download(server.url(), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    data.download(server.url(), tmp_path / "loud")
    assert "3 of 3 MiB\r" in capsys.readouterr().err


def zip_bytes(files):
    """A zip of {name: text or bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_is_unpacked_whole_or_not_at_all(server, tmp_path):
    whole, folder = zip_bytes({"a/b/file": "x" * 1000, "a/b/more": "y", "../../evil": "z"}), tmp_path / "in" / "folder"
    for broken in (whole[:-50], BODY, whole.replace(b"xxxxx", b"xxyxx", 1), zip_bytes({"other": "x"})):
        server.files["/file"] = broken
        refuse(lambda: data.download(server.url(), folder, inside="file"), server.url(), "--data FOLDER")
        assert os.listdir(tmp_path / "in") == []
    server.files["/file"] = whole
    for _ in range(2):
        assert data.download(server.url(), folder, inside="file") == folder
    assert sorted(os.listdir(folder)) == ["file", "more"] and len(server.seen) == 5
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["folder"]


RTE_TSV = 'index\tsentence1\tsentence2\tlabel\n0\tA "cat.\tB.\tentailment\n1\tC\tD\tnot_entailment\n'


def test_rte_comes_out_of_its_zip(server, tmp_path, monkeypatch):
    zipped = zip_bytes({f"RTE/{name}.tsv": RTE_TSV for name in ("train", "dev")})
    server.files["/RTE.zip"] = zipped
    monkeypatch.setattr(data, "GLUE", server.url("/"))
    refuse(lambda: data.load_task("rte", tmp_path), "RTE.zip: its sha256 is")
    monkeypatch.setitem(data.SHA256, "RTE.zip", hashlib.sha256(zipped).hexdigest())
    for _ in range(2):
        train, dev = data.load_task("rte", tmp_path)
        assert train.texts == [('A "cat.', "B."), ("C", "D")] and train.labels == dev.labels == [0, 1]
    assert len(server.seen) == 2


def test_google_model_is_downloaded_once(server, tmp_path, monkeypatch):
    google, inside = write_google(tmp_path / "google", google_arrays()), "uncased_L-12_H-768_A-12/"
    for place, folder in (("2020_02_20/uncased_L-2_H-128_A-2", ""), (f"2018_10_18/{inside[:-1]}", inside)):
        zipped = zip_bytes({folder + file.name: file.read_bytes() for file in google.iterdir()})
        server.files[f"/{place}.zip"] = zipped  # flat and nested, as Google's are
    monkeypatch.setattr(bert, "GOOGLE_URL", server.url("/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("bert-tiny", "bert-tiny", "uncased_L-2_H-128_A-2", "bert-base-uncased"):
        assert len(bert.load_pretrained(name, 2)[0].bert.blocks) == 2
    assert len(server.seen) == 2
    refuse(lambda: bert.load_pretrained("uncased_L-2_H-129_A-2", 2), "404", "--model FOLDER")


def test_roberta_is_downloaded_file_by_file(server, tmp_path, monkeypatch):
    folder, _ = write_roberta(tmp_path / "hub")
    for model in ("base", "large"):
        monkeypatch.setitem(bert.HUB_MODELS, f"roberta-{model}", server.url(f"/{model}/"))
        server.files |= {f"/{model}/{name}": (folder / name).read_bytes() for name in bert.HUB_FILES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert len(bert.load_pretrained("roberta-large", 2)[0].bert.blocks) == 3
    assert len(server.seen) == 4
    refuse(lambda: bert.load_pretrained("roberta-base", 2), "vocab.json: its sha256 is")  # they are not Meta's


# ---- Parsing --------------------------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("task, sizes", [("rte", (2490, 277)), ("mrpc", (3668, 408)), ("qnli", (10293, 5463))])
def test_real_files_are_read_whole(task, sizes):
    train, dev = data.load_task(task, ASSETS / "glue")
    assert (len(train.texts), len(dev.texts)) == sizes
    positive = {"rte": 146, "mrpc": 129, "qnli": 2702}[task]  # dev examples of class 0
    assert dev.labels.count(0) == positive


@needs_assets
@pytest.mark.parametrize("task, size", [("rte", 3000), ("mrpc", 1725)])
def test_real_test_files(task, size):
    test = data.load_test(task, ASSETS / "glue")
    assert len(test.texts) == size and set(test.groups) == {task.upper()}
    assert test.index == [str(i) for i in range(size)]


@pytest.mark.parametrize("name", GLUE)
def test_every_task_in_its_own_format(tmp_path, name):
    written, task = write_glue(tmp_path, name), data.TASKS[name.lower()]
    test, (train, dev) = data.load_test(name.lower(), tmp_path), data.load_task(name.lower(), tmp_path)
    parts, groups = ("",), [name]
    if name == "MNLI":
        parts, groups = ("_matched", "_mismatched"), ["MNLI-m", "MNLI-mm", "AX"]
        written["testAX"] = [("a b", "c", "neutral")] * 40  # after its own two files, the diagnostic set
    for split, files in (
        (train, ["train.tsv"]),
        (dev, [f"dev{part}.tsv" for part in parts]),
        (test, [file for file in written if file.startswith("test")]),
    ):
        rows = [row for file in files for row in written[file]]
        space = " " * (name == "SST-2" and split is not test)
        assert split.texts == [(a, b) if len(task.texts) == 2 else a + space for a, b, _ in rows]
        assert split is test or [task.labels[i] for i in split.labels] == [label for _, _, label in rows]
    assert dev.groups == (["matched"] * 40 + ["mismatched"] * 40 if name == "MNLI" else [])
    assert test.groups == [group for group in groups for _ in range(40)] and len(test.labels) == len(test.texts)
    assert test.index == [str(i) for _ in groups for i in range(40)]


def test_the_diagnostic_set_is_downloaded_alone(server, tmp_path, monkeypatch):
    """MNLI's archive does not hold it."""
    write_glue(tmp_path, "MNLI")
    server.files["/AX.tsv"] = (tmp_path / "AX.tsv").read_bytes()
    (tmp_path / "AX.tsv").unlink()
    monkeypatch.setattr(data, "GLUE", server.url("/"))
    assert data.load_test("mnli", tmp_path).groups.count("AX") == 40 and (tmp_path / "AX.tsv").is_file()


@pytest.mark.parametrize("name, column", [("RTE", "index"), ("QQP", "id"), ("MRPC", "index")])
def test_a_test_row_has_the_number_in_its_file(tmp_path, name, column):
    """GLUE's server takes answers by it: in shuffled files, too, and where rows are missing. A bad row has none."""
    texts = data.TASKS[name.lower()].texts
    rows = [f"{number}\tfirst {number}\tsecond\n" for number in (7, 3, 12, 0)]
    for file in ("train.tsv", "test.tsv"):
        (tmp_path / file).write_text("\t".join((column, *texts)) + "\n" + "".join(rows))
    test = data.load_test(name.lower(), tmp_path)
    assert test.index == ["7", "3", "12", "0"] and [first for first, _ in test.texts] == [
        f"first {i}" for i in test.index
    ]
    with open(tmp_path / "test.tsv", "a") as file:
        file.write("5\tcut\n" + "".join(rows) * 1000)
    refuse(lambda: data.load_test(name.lower(), tmp_path), "test.tsv: 4004 of 4005 rows have the 3 columns")


def test_what_is_no_task_or_has_no_test_set(tmp_path):
    refuse(lambda: data.load_task("rtee", tmp_path), "unknown task 'rtee'; choose one of: toy, cola")
    refuse(lambda: data.load_task("sts-b", tmp_path), "unknown task 'sts-b'")
    refuse(lambda: data.load_test("toy", tmp_path), "no test set")
    (tmp_path / "GLUE.zip").write_bytes(b"")
    for load in (data.load_task, data.load_test):
        refuse(lambda load=load: load("rte", tmp_path / "GLUE.zip"), "GLUE.zip is no folder", "unpack")


MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"


def write_mrpc(folder, rows, ids):
    (folder / "MRPC").mkdir(exist_ok=True)
    (folder / "MRPC" / "msr_paraphrase_train.txt").write_bytes((MRPC_HEADER + "".join(rows)).encode())
    (folder / "MRPC" / "msr_paraphrase_test.txt").write_bytes((MRPC_HEADER + "".join(rows[::-1])).encode())
    (folder / "MRPC" / "mrpc_dev_ids.tsv").write_text(ids)


def test_mrpc_split_mark_and_quotes(tmp_path):
    rows = ['1\t10\t11\t"Open quote\tB\x85b\r\n', "0\t12\t13\tC\tD\u2028d\r\n", '1\t11\t10\tE"\tF\r\n', "\r\n"]
    write_mrpc(tmp_path, rows, "12\t13\n")
    train, dev = data.load_task("mrpc", tmp_path)
    assert train.texts == [('"Open quote', "B\x85b"), ('E"', "F")] and train.labels == [1, 1]
    assert dev.texts == [("C", "D\u2028d")] and dev.labels == [0]
    test = data.load_test("mrpc", tmp_path)  # of Microsoft's own file, GLUE counts the rows
    assert test.texts == [('E"', "F"), *dev.texts, train.texts[0]] and test.index == ["0", "1", "2"]
    for broken in ("7\t8\n", "12\t13\n11\t12\n", ""):  # one row unknown; all; none
        write_mrpc(tmp_path, rows, broken)
        refuse(lambda: data.load_task("mrpc", tmp_path), "mrpc_dev_ids.tsv")


def test_mrpc_files_are_downloaded_one_by_one(server, tmp_path, monkeypatch):
    write_mrpc(tmp_path, ["1\t10\t11\tA\tB\r\n", "0\t12\t13\tC\tD\r\n"], "12\t13\n")
    for file in (tmp_path / "MRPC").iterdir():
        server.files["/" + file.name] = file.read_bytes()
        monkeypatch.setitem(data.SHA256, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "GLUE", server.url("/"))
    monkeypatch.setattr(data, "SENTEVAL", server.url("/"))
    train, dev = data.load_task("mrpc", tmp_path / "cache")
    assert (train.texts, dev.texts) == ([("A", "B")], [("C", "D")])
    assert sorted(os.listdir(tmp_path / "cache" / "MRPC")) == ["mrpc_dev_ids.tsv", "msr_paraphrase_train.txt"]


def test_mrpc_that_was_split_already(tmp_path):
    (tmp_path / "MRPC").mkdir()
    for name, text in (("train", "A"), ("dev", "C"), ("test", "E")):
        head = "index\t#1 ID\t#2 ID\t#1 String\t#2 String" if name == "test" else MRPC_HEADER.strip()
        (tmp_path / "MRPC" / f"{name}.tsv").write_text(f"{head}\n1\t10\t11\t{text}\tB\n", "utf-8")
    for folder in (tmp_path, tmp_path / "MRPC"):
        train, dev = data.load_task("mrpc", folder)
        assert (train.texts, dev.texts, dev.labels) == ([("A", "B")], [("C", "B")], [1])
        assert data.load_test("mrpc", folder).texts == [("E", "B")]


def test_a_tasks_own_folder(tmp_path, capsys):
    """As $GLUE_DIR/RTE in other scripts: read, and nothing is downloaded into it or mixed with it."""
    write_glue(tmp_path, "RTE", examples=7)
    train, dev = data.load_task("rte", tmp_path / "RTE")
    assert len(train.texts) == len(dev.texts) == 7 and len(data.load_test("rte", tmp_path / "RTE").texts) == 7
    assert f"reading    {tmp_path}/RTE/train.tsv" in capsys.readouterr().out
    (tmp_path / "RTE" / "dev.tsv").unlink()
    refuse(lambda: data.load_task("rte", tmp_path / "RTE"), "RTE/dev.tsv: FileNotFoundError")


def test_a_training_row_in_a_thousand_may_be_bad(tmp_path, capsys):
    """QQP's training file has one with too few columns."""
    write_glue(tmp_path, "QQP", examples=1000)
    with open(tmp_path / "QQP" / "train.tsv", "a") as file:
        file.write("1000\t7\t8\tcut\n")
    assert len(data.load_task("qqp", tmp_path)[0].texts) == 1000
    assert (
        "QQP/train.tsv: 1000 of 1001 rows have the 6 columns of the header; the others are" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no column 'sentence1'"),
        (b"index\tsentence1\tsentence2\tlabel\n", "0 of 0 rows"),
        (b"index\tsentence1\tlabel\n0\ta\tentailment\n", "no column 'sentence2'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "unknown label 'maybe'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n", "1 of 2 rows have the 4 columns"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\xff\tb\tentailment\n", "UnicodeDecodeError"),
    ],
)
def test_bad_tsv(tmp_path, content, words):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_bytes(content)
    refuse(lambda: data.load_task("rte", tmp_path), "RTE/train.tsv", words)


# ---- Batches and metrics --------------------------------------------------------------------------------------------


def test_batches_pad_on_the_right(capsys):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["pad", "a", "b", "c", "d"])}))
    tokenizer.pre_tokenizer = Whitespace()
    examples = data.Examples([("a b", "c"), ("d", "a"), ("a a a a", "b b")], [1, 0, 1])
    dataset = data.Dataset(examples, tokenizer, max_tokens=5, pad_id=9)
    (input_ids, segment_ids, mask), labels = dataset.batch(np.array([0, 1]))
    assert input_ids.tolist() == [[1, 2, 3], [4, 1, 9]]
    assert segment_ids.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert labels.tolist() == [1, 0]
    assert dataset.input_ids[2].tolist() == [1, 1, 1, 2, 2]  # cut to 5, the longer sentence first
    assert capsys.readouterr().out == "note: 1 of 3 inputs are longer than 5 tokens, and cut (--max-tokens)\n"
    data.Dataset(examples, tokenizer, max_tokens=6, pad_id=9)
    assert capsys.readouterr().out == ""


def test_training_batches():
    lengths = np.random.default_rng(0).integers(5, 128, 1000)
    first, again, later = (data.training_batches(lengths, 32, seed) for seed in ((3, 0), (3, 0), (3, 1)))
    assert sorted(np.concatenate(first)) == list(range(1000))  # each example once
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(later))
    padded = sum(lengths[batch].max() * len(batch) for batch in first)
    assert padded < 1.1 * lengths.sum()
    assert abs(np.corrcoef([lengths[b].mean() for b in first], range(len(first)))[0, 1]) < 0.5  # order is shuffled


def test_evaluation_batches():
    lengths = np.array([5, 3, 9, 1, 4])
    assert [batch.tolist() for batch in data.evaluation_batches(lengths, 2)] == [[3, 1], [4, 0], [2]]


def test_metrics_by_hand():
    predicted, labels = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0])
    assert data.accuracy(predicted, labels) == pytest.approx(60)
    assert data.f1(predicted, labels) == pytest.approx(100 * 2 / 3)  # precision 2/3, recall 2/3
    assert data.f1(torch.zeros(5), labels) == 0
    # 2 hits, 1 miss, 1 rejection, 1 false alarm: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2) = 1 / 6
    assert data.matthews(predicted, labels) == pytest.approx(100 / 6)
    assert data.matthews(predicted, 1 - predicted) == pytest.approx(-100)
    assert data.matthews(labels, labels) == pytest.approx(100)
    assert data.matthews(torch.ones(5), labels) == 0
    three = torch.tensor([0, 1, 2, 2])
    assert data.accuracy(three, torch.tensor([0, 1, 2, 0])) == 75
    mrpc_dev = torch.tensor([1] * 279 + [0] * 129)  # the majority class on MRPC's dev set
    assert data.f1(torch.ones(408), mrpc_dev) == pytest.approx(81.22, abs=0.01)


# ---- The toy task ---------------------------------------------------------------------------------------------------


def pleases(text):
    """The toy task's label, worked out from the words alone."""
    body, _, ending = text.partition(" , ")
    clauses = body.split(" but ")
    words = clauses[0 if "former" in ending else -1].split()
    return (words[-1] in data.GOOD) != ("not" in words)


def test_toy_labels_and_levels():
    examples = data.toy_examples(900, seed=5)
    assert [bool(label) for label in examples.labels] == [pleases(text) for text in examples.texts]
    for text, group in zip(examples.texts, examples.groups):
        assert ("but" in text) == (group != "level 1") and (text.endswith(" counts")) == (group == "level 3")
    assert [examples.groups.count(f"level {level}") for level in (1, 2, 3)] == [300, 300, 300]
    assert 0.4 < np.mean(examples.labels) < 0.6
    assert set(" ".join(examples.texts).split()) <= set(data.TOY_WORDS)
    assert data.toy_examples(900, seed=5) == examples != data.toy_examples(900, seed=6)


def test_a_tokenizer_that_fails_on_a_text():
    """Its unknown word does not exist, which only a word that it does not know brings to light."""
    tokenizer = Tokenizer(WordPiece({"a": 0}, unk_token="[UNK]"))
    data.Dataset(data.Examples(["a"], [0]), tokenizer, 8, 0)
    refuse(lambda: data.Dataset(data.Examples(["b"], [0]), tokenizer, 8, 0), "the tokenizer: ")
