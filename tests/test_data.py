"""data.py, and the test sets of paper/submit.py: downloads against a server on this machine, GLUE's quirks, batches,
metrics, the toy task."""

import hashlib
import http.server
import io
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import submit
import torch
from fakes import ASSETS, GLUE, needs_assets, refuse, write_glue, write_roberta
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
    """Serves the server's `files` {path: bytes}, by its `behave`, a list of behaviours, one a request."""

    def do_GET(self):
        behaviour = self.server.behave.pop(0) if self.server.behave else "good"
        self.server.seen.append(self.path)
        if behaviour == "drop":  # the connection closes without a word
            return
        if self.path not in self.server.files or isinstance(behaviour, int):
            self.send_error(behaviour if isinstance(behaviour, int) else 404)
            return
        body = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if behaviour == "truncate" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The place that every file comes from; the cache is a folder of the test."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.behave, server.seen = {"/file": BODY}, [], []
    server.url = lambda path="/file": f"http://127.0.0.1:{server.server_port}{path}"
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    for module, name in ((data, "GLUE"), (data, "SENTEVAL"), (bert, "GOOGLE_URL")):
        monkeypatch.setattr(module, name, server.url("/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_good_download_and_no_second_one(server, tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "file"
    for _ in range(2):
        assert data.download(server.url(), path, SHA256) == path
        assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
    assert len(server.seen) == 1 and capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # progress is for a terminal only
    data.download(server.url(), tmp_path / "loud")
    assert "3 of 3 MiB\r" in capsys.readouterr().err


@pytest.mark.parametrize("failures", [["truncate", "truncate"], ["drop", 503], [500, 429]])
def test_two_failures_are_got_over(server, tmp_path, failures):
    server.behave = failures
    assert data.download(server.url(), tmp_path / "file", SHA256).read_bytes() == BODY
    assert len(server.seen) == 3


@pytest.mark.parametrize("failure, words", [("truncate", "IncompleteRead"), ("drop", "ConnectionError"), (404, "404")])
def test_after_three_attempts_one_line_says_what_to_do(server, tmp_path, failure, words):
    server.behave = [failure] * 3
    advice = "--data FOLDER", "--model FOLDER"
    refuse(lambda: data.download(server.url(), tmp_path / "file"), server.url(), words, *advice)
    assert len(server.seen) == 3 and os.listdir(tmp_path) == []


def test_what_is_no_whole_file_gets_no_name(server, tmp_path, monkeypatch):
    path = tmp_path / "file"
    refuse(lambda: data.download(server.url(), path, "0" * 64), "its sha256 is " + SHA256[:50])
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


def test_mnli_comes_out_of_its_zip_and_the_diagnostic_set_alone(server, tmp_path, monkeypatch):
    written = write_glue(tmp_path, "MNLI")
    zipped = zip_bytes({f"MNLI/{name}": (tmp_path / "MNLI" / name).read_bytes() for name in written})
    server.files |= {"/MNLI.zip": zipped, "/AX.tsv": (tmp_path / "AX.tsv").read_bytes()}
    refuse(lambda: data.load_task("mnli"), "MNLI.zip: its sha256 is")
    monkeypatch.setitem(data.SHA256, "MNLI.zip", hashlib.sha256(zipped).hexdigest())
    for _ in range(2):
        assert len(data.load_task("mnli")[0].texts) == 40 and len(submit.load_test("mnli")["AX"][0]) == 40
    assert server.seen == ["/MNLI.zip", "/MNLI.zip", "/AX.tsv"]


def test_google_model_is_downloaded_once(server, google):
    inside = "uncased_L-12_H-768_A-12/"
    for place, folder in (("2020_02_20/uncased_L-2_H-128_A-2", ""), (f"2018_10_18/{inside[:-1]}", inside)):
        zipped = zip_bytes({folder + file.name: file.read_bytes() for file in google.iterdir()})
        server.files[f"/{place}.zip"] = zipped  # flat and nested, as Google's are
    for name in ("bert-tiny", "bert-tiny", "uncased_L-2_H-128_A-2", "bert-base-uncased"):
        assert len(bert.load_pretrained(name, 2)[0].bert.blocks) == 2
    assert len(server.seen) == 2
    refuse(lambda: bert.load_pretrained("uncased_L-2_H-129_A-2", 2), "404", "--model FOLDER")


def test_roberta_is_downloaded_file_by_file(server, tmp_path, monkeypatch):
    folder, _ = write_roberta(tmp_path / "hub")
    for model in ("base", "large"):
        monkeypatch.setitem(bert.HUB_MODELS, f"roberta-{model}", server.url(f"/{model}/"))
        server.files |= {f"/{model}/{name}": (folder / name).read_bytes() for name in bert.HUB_FILES}
    for _ in range(2):
        assert len(bert.load_pretrained("roberta-large", 2)[0].bert.blocks) == 3
    assert len(server.seen) == 4
    refuse(lambda: bert.load_pretrained("roberta-base", 2), "vocab.json: its sha256 is")  # they are not Meta's


# ---- Parsing --------------------------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(
    "task, in_train, in_dev, of_class_0, in_test",
    [("rte", 2490, 277, 146, 3000), ("mrpc", 3668, 408, 129, 1725), ("qnli", 10293, 5463, 2702, None)],
)
def test_real_files_are_read_whole(task, in_train, in_dev, of_class_0, in_test):
    train, dev = data.load_task(task, ASSETS / "glue")
    assert (len(train.texts), len(dev.texts), dev.labels.count(0)) == (in_train, in_dev, of_class_0)
    if in_test:  # of QNLI's the files here have none
        ((file, (index, test)),) = submit.load_test(task, ASSETS / "glue").items()
        assert file == task.upper() and len(test.texts) == in_test and index == [str(i) for i in range(in_test)]


@pytest.mark.parametrize("name", GLUE)
def test_every_task_in_its_own_format(tmp_path, name):
    written, task = write_glue(tmp_path, name), data.TASKS[name.lower()]
    test, (train, dev) = submit.load_test(name.lower(), tmp_path), data.load_task(name.lower(), tmp_path)
    parts, of_server = ("",), [name]
    if name == "MNLI":
        parts, of_server = ("_matched", "_mismatched"), ["MNLI-m", "MNLI-mm", "AX"]
        written["testAX"] = [("a b", "c", "neutral")] * 40  # after its own two files, the diagnostic set
    for split, files in ((train, ["train.tsv"]), (dev, [f"dev{part}.tsv" for part in parts])):
        rows = [row for file in files for row in written[file]]
        space = " " * (name == "SST-2")
        assert split.texts == [(a, b) if len(task.texts) == 2 else a + space for a, b, _ in rows]
        assert [task.labels[i] for i in split.labels] == [label for _, _, label in rows]
    assert dev.groups == (["matched"] * 40 + ["mismatched"] * 40 if name == "MNLI" else [])
    assert list(test) == of_server
    for (index, examples), file in zip(test.values(), [file for file in written if file.startswith("test")]):
        assert examples.texts == [(a, b) if len(task.texts) == 2 else a for a, b, _ in written[file]]
        assert index == [str(i) for i in range(40)]


@pytest.mark.parametrize("name, column", [("RTE", "index"), ("QQP", "id"), ("MRPC", "index")])
def test_a_test_row_has_the_number_in_its_file(tmp_path, name, column):
    """GLUE's server takes answers by it: in shuffled files, too, and where rows are missing. A bad row has none."""
    header = "\t".join((column, *data.TASKS[name.lower()].texts)) + "\n"
    rows = "".join(f"{i}\tfirst {i}\tsecond\n" for i in (7, 3, 12, 0))
    for file in ("train.tsv", "test.tsv"):
        (tmp_path / file).write_text(header + rows)
    index, test = submit.load_test(name.lower(), tmp_path)[name]
    assert index == ["7", "3", "12", "0"] and test.texts == [(f"first {i}", "second") for i in index]
    (tmp_path / "test.tsv").write_text(header + rows * 1001 + "5\tcut\n")
    refuse(lambda: submit.load_test(name.lower(), tmp_path), "test.tsv: 4004 of 4005 rows have the 3 columns")


def test_what_is_no_task_or_has_no_test_set(tmp_path):
    refuse(lambda: data.load_task("sts-b", tmp_path), "unknown task 'sts-b'; choose one of: toy, cola")
    refuse(lambda: submit.load_test("toy", tmp_path), "no test set")
    (tmp_path / "GLUE.zip").write_bytes(b"")
    for load in (data.load_task, submit.load_test):
        refuse(lambda load=load: load("rte", tmp_path / "GLUE.zip"), "GLUE.zip is no folder", "unpack")


MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"


def test_mrpc_split_mark_and_quotes(server, tmp_path, monkeypatch):
    """Of files that are there, or are downloaded one by one."""
    rows = ['1\t10\t11\t"Open quote\tB\x85b\r\n', "0\t12\t13\tC\tD\u2028d\r\n", '1\t11\t10\tE"\tF \r\n', "\r\n"]
    train, test = (MRPC_HEADER + "".join(rows[::step]) for step in (1, -1))
    ids = tmp_path / "MRPC" / "mrpc_dev_ids.tsv"
    ids.parent.mkdir()
    for name, text in ("msr_paraphrase_train.txt", train), ("msr_paraphrase_test.txt", test), (ids.name, "12\t13\n"):
        server.files["/" + name] = text.encode()
        monkeypatch.setitem(data.SHA256, name, hashlib.sha256(text.encode()).hexdigest())
        (ids.parent / name).write_bytes(text.encode())
    for folder in (tmp_path, ids.parent, tmp_path / "new"):
        train, dev = data.load_task("mrpc", folder)
        assert train.texts == [('"Open quote', "B\x85b"), ('E"', "F ")] and train.labels == [1, 1]
        assert dev.texts == [("C", "D\u2028d")] and dev.labels == [0]
        index, test = submit.load_test("mrpc", folder)["MRPC"]  # of Microsoft's own file, GLUE counts the rows
        assert test.texts == [('E"', "F "), *dev.texts, train.texts[0]] and index == ["0", "1", "2"]
    assert len(server.seen) == 3
    for broken in ("7\t8\n", "12\t13\n11\t12\n", ""):  # one row unknown; all; none
        ids.write_text(broken)
        refuse(lambda: data.load_task("mrpc", tmp_path), "mrpc_dev_ids.tsv")


def test_mrpc_that_was_split_already(tmp_path):
    (tmp_path / "MRPC").mkdir()
    for name, text in (("train", "A"), ("dev", "C")):
        (tmp_path / "MRPC" / f"{name}.tsv").write_text(f"{MRPC_HEADER}1\t10\t11\t{text}\tB\n", "utf-8")
    for folder in (tmp_path, tmp_path / "MRPC"):
        train, dev = data.load_task("mrpc", folder)
        assert (train.texts, dev.texts, dev.labels) == ([("A", "B")], [("C", "B")], [1])


def test_a_tasks_own_folder(tmp_path, capsys):
    """As $GLUE_DIR/RTE in other scripts: read, and nothing is downloaded into it or mixed with it."""
    write_glue(tmp_path, "RTE", examples=1000)
    with open(tmp_path / "RTE" / "train.tsv", "a") as file:
        file.write("1000\tcut\n")  # as in QQP's; of training rows one in a thousand may be bad
    _, test = submit.load_test("rte", tmp_path / "RTE")["RTE"]
    for split in (*data.load_task("rte", tmp_path / "RTE"), test):
        assert len(split.texts) == 1000
    out = capsys.readouterr().out
    assert f"reading    {tmp_path}/RTE/train.tsv" in out
    assert "RTE/train.tsv: 1000 of 1001 rows have the 4 columns of the header; the others are left out" in out
    (tmp_path / "RTE" / "dev.tsv").unlink()
    refuse(lambda: data.load_task("rte", tmp_path / "RTE"), "RTE/dev.tsv: FileNotFoundError")


@pytest.mark.parametrize(
    "header, rows, words",
    [
        ("index\tsentence1\tsentence2\tlabel", "", "0 of 0 rows"),
        ("index\tsentence1\tlabel", "0\ta\tentailment\n", "no column 'sentence2'"),
        ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe\n", "unknown label 'maybe'"),
        ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment\n1\ta\tb\n", "1 of 2 rows have the 4 columns"),
    ],
)
def test_bad_tsv(tmp_path, header, rows, words):
    (tmp_path / "train.tsv").write_text(f"{header}\n{rows}")
    refuse(lambda: data.load_task("rte", tmp_path), "/train.tsv", words)


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
