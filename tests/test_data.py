"""data.py: downloads against a server on this machine, GLUE's quirks, batches, metrics, the toy task."""

import hashlib
import http.server
import io
import os
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import ASSETS, GLUE, google_arrays, needs_assets, write_glue, write_google, write_roberta, zip_folder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace

import bert
import data
from data import InputError

BODY = bytes(range(256)) * 2000  # half a megabyte
SHA256 = hashlib.sha256(BODY).hexdigest()


# ---- Downloads ------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; `behave` {path: list of behaviours, one a request}; keeps the requests it saw."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.behave, self.seen = {}, {}, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviours = self.server.behave.get(self.path, [])
        behaviour = behaviours.pop(0) if behaviours else "good"
        self.server.seen.append((self.path, self.headers.get("Range")))
        if behaviour == "drop":  # the connection closes without a word
            return
        if self.path not in self.server.files or isinstance(behaviour, int):
            self.send_error(behaviour if isinstance(behaviour, int) else 404)
            return
        body, total, start = self.server.files[self.path], len(self.server.files[self.path]), 0
        if self.headers.get("Range") and behaviour != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = start + (total - start) // 2 if behaviour == "truncate" else total
        if behaviour == "slow":
            self.wfile.write(body[start : start + 1])
            time.sleep(0.3)
            start += 1
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.files["/file"] = BODY
    yield server
    server.shutdown()
    server.server_close()


def refuse_download(server, path, *words, name="/file", **options):
    with pytest.raises(InputError) as caught:
        data.download(server.url(name), path, pause=0, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not Path(path).exists()


def test_good_download_and_no_second_one(server, tmp_path):
    path = data.download(server.url("/file"), tmp_path / "new" / "file", SHA256)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
    data.download(server.url("/file"), path, SHA256)
    assert len(server.seen) == 1


def resumed_at(server):
    """Where the last request asked the server to go on; never beyond what it had sent."""
    start = int(server.seen[-1][1].removeprefix("bytes=").removesuffix("-"))
    assert start <= len(BODY) // 2
    return start


@pytest.mark.parametrize("failure", ["truncate", "drop", 500, 503, 429])
def test_a_passing_failure_is_retried(server, tmp_path, failure):
    server.behave["/file"] = [failure]
    assert data.download(server.url("/file"), tmp_path / "file", SHA256, pause=0).read_bytes() == BODY
    assert resumed_at(server) > 0 if failure == "truncate" else server.seen[1][1] is None


def test_a_web_page_is_no_file(server, tmp_path):
    """Which some networks answer to everything, with status 200."""
    server.files["/file"] = b"<!DOCTYPE html><title>Log in</title>"
    refuse_download(server, tmp_path / "file", "a web page came in its place")


def test_a_later_run_resumes(server, tmp_path):
    server.behave["/file"] = ["truncate"] + ["drop"] * 3
    refuse_download(server, tmp_path / "file", "connection failed")
    assert data.download(server.url("/file"), tmp_path / "file", SHA256).read_bytes() == BODY
    assert resumed_at(server) > 0


def test_a_server_that_cannot_resume_starts_over(server, tmp_path):
    server.behave["/file"] = ["truncate", "no ranges"]
    assert data.download(server.url("/file"), tmp_path / "file", SHA256, pause=0).read_bytes() == BODY


def test_a_whole_part_file_needs_no_bytes_and_a_stale_one_starts_over(server, tmp_path):
    part = tmp_path / "file.part"
    part.write_bytes(BODY)
    assert data.download(server.url("/file"), tmp_path / "file", SHA256, pause=0).read_bytes() == BODY
    for stale in (b"x" * 1000, b"x" * (len(BODY) + 5)):
        (tmp_path / "file").unlink()
        part.write_bytes(stale)
        assert data.download(server.url("/file"), tmp_path / "file", SHA256, pause=0).read_bytes() == BODY
        assert not part.exists()


def test_wrong_sum(server, tmp_path):
    refuse_download(server, tmp_path / "file", "sha256", SHA256[:8], sha256="0" * 64)
    assert len(server.seen) == 1 and os.listdir(tmp_path) == []  # a fresh copy that is wrong is not asked for again


def test_truncated_for_good(server, tmp_path):
    server.behave["/file"] = ["truncate"] * 4
    refuse_download(server, tmp_path / "file", "connection failed", sha256=SHA256)


def test_404_is_not_retried(server, tmp_path):
    refuse_download(server, tmp_path / "file", "404", name="/nothing")
    assert len(server.seen) == 1


def test_dropped_connection_and_no_server(server, tmp_path):
    server.behave["/file"] = ["drop"] * 4
    refuse_download(server, tmp_path / "file", "connection failed")
    with pytest.raises(InputError, match="connection failed"):
        data.download("http://127.0.0.1:9/file", tmp_path / "file", pause=0)


def zip_bytes(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def test_zip_without_the_member_and_no_zip(server, tmp_path):
    server.files["/file"] = zip_bytes(other="x")
    refuse_download(server, tmp_path / "file", "no RTE/train.tsv", member="RTE/train.tsv")
    server.files["/file"] = BODY
    refuse_download(server, tmp_path / "file", "not a sound zip", member="RTE/train.tsv")
    whole = zip_bytes(member="x" * 1000)
    server.files["/file"] = whole.replace(b"xxxxx", b"xxyxx", 1)
    refuse_download(server, tmp_path / "file", "member in the zip is damaged", member="member")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_full_disk(server, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    refuse_download(server, tmp_path / "file", "cannot write", "No space left")


def test_read_only_folder(server, tmp_path):
    tmp_path.chmod(0o555)
    folder = tmp_path
    if os.access(folder, os.W_OK):  # root writes everywhere, but for the kernel's own folders
        folder = Path("/sys/dact-test")
    refuse_download(server, folder / "new" / "file", "cannot write", str(folder))
    tmp_path.chmod(0o755)


def test_two_runs_at_once_download_once(server, tmp_path):
    """Without the lock both append to the same .part file."""
    server.behave["/file"] = ["slow"]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: data.download(server.url("/file"), tmp_path / "file", SHA256), range(4)))
    assert {path.read_bytes() for path in paths} == {BODY} and len(server.seen) == 1


def test_progress_on_a_terminal_only(server, tmp_path, capsys, monkeypatch):
    data.download(server.url("/file"), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    data.download(server.url("/file"), tmp_path / "loud")
    assert "0.5 of 0.5 MB\n" in capsys.readouterr().err


RTE_TSV = 'index\tsentence1\tsentence2\tlabel\n0\tA "cat.\tB.\tentailment\n1\tC\tD\tnot_entailment\n'


def test_rte_comes_out_of_its_zip(server, tmp_path, monkeypatch):
    server.files["/RTE.zip"] = zip_bytes(RTE__train_tsv=RTE_TSV).replace(b"train_tsv", b"train.tsv")
    monkeypatch.setitem(data.DOWNLOADS, "RTE.zip", (server.url("/"), None))
    with pytest.raises(InputError, match="RTE.zip: cannot be read .*dev.tsv"):  # a zip that has train but not dev
        data.load_task("rte", tmp_path)
    whole = zip_bytes(RTE__train_tsv=RTE_TSV, RTE__dev_tsv=RTE_TSV)
    (tmp_path / "RTE.zip").write_bytes(whole.replace(b"train_tsv", b"train.tsv").replace(b"dev_tsv", b"dev.tsv"))
    train, dev = data.load_task("rte", tmp_path)
    assert train.texts == [('A "cat.', "B."), ("C", "D")] and train.labels == dev.labels == [0, 1]


def test_google_model_is_downloaded_once(server, tmp_path, monkeypatch):
    zipped = zip_folder(write_google(tmp_path / "google", google_arrays()), tmp_path / "model.zip")
    server.files["/2020_02_20/uncased_L-2_H-128_A-2.zip"] = zipped.read_bytes()
    monkeypatch.setattr(bert, "GOOGLE_URL", server.url("/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        model, _ = bert.load_pretrained("bert-tiny", 2)
    assert len(model.bert.blocks) == 2 and len(server.seen) == 1


def test_roberta_is_downloaded_file_by_file(server, tmp_path, monkeypatch):
    folder, _ = write_roberta(tmp_path / "hub")
    place, files = bert.HUB_MODELS["roberta-large"]  # no sums: the files of the test are not Meta's
    for name in files:
        server.files[f"/{place}{name}"] = (folder / name).read_bytes()
    monkeypatch.setattr(bert, "HUB_URL", server.url("/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        model, _ = bert.load_pretrained("roberta-large", 2)
    assert len(model.bert.blocks) == 3 and len(server.seen) == len(files) == 4
    for name in bert.HUB_MODELS["roberta-base"][1]:
        server.files[f"/{bert.HUB_MODELS['roberta-base'][0]}{name}"] = b"not Meta's"
    with pytest.raises(InputError, match="vocab.json: its sha256 is"):
        bert.load_pretrained("roberta-base", 2)


# ---- Parsing --------------------------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("task, sizes", [("rte", (2490, 277)), ("mrpc", (3668, 408)), ("qnli", (10293, 5463))])
def test_real_files_are_read_whole(task, sizes):
    train, dev = data.load_task(task, ASSETS / "glue")
    assert (len(train.texts), len(dev.texts)) == sizes
    positive = {"rte": 146, "mrpc": 129, "qnli": 2702}[task]  # dev examples of class 0
    assert dev.labels.count(0) == positive


@pytest.mark.parametrize("name", GLUE)
def test_every_task_in_its_own_format(tmp_path, name):
    written = write_glue(tmp_path, name)
    task = data.TASKS[name.lower()]

    def expected(file):
        for first, second, label in written[file]:
            first += " " * (name == "SST-2" and file != "test.tsv")
            yield (first, second) if len(task.texts) == 2 else first, label

    train, dev = data.load_task(name.lower(), tmp_path)
    test = data.load_test(name.lower(), tmp_path)
    parts = ("_matched", "_mismatched") if name == "MNLI" else ("",)
    if name == "MNLI":  # after its own two files, the diagnostic set
        assert test.groups.count("AX") == 40 and test.texts[-40:] == [("a b", "c")] * 40
        del test.texts[-40:], test.labels[-40:]
    for split, files in (
        (train, ["train.tsv"]),
        (dev, [f"dev{p}.tsv" for p in parts]),
        (test, [f"test{p}.tsv" for p in parts]),
    ):
        rows = [row for file in files for row in expected(file)]
        assert split.texts == [texts for texts, _ in rows]
        assert split is test or [task.labels[i] for i in split.labels] == [label for _, label in rows]
    assert dev.groups == (["matched"] * 40 + ["mismatched"] * 40 if name == "MNLI" else [])
    assert list(dict.fromkeys(test.groups)) == (["MNLI-m", "MNLI-mm", "AX"] if name == "MNLI" else [name])


def test_the_diagnostic_set_is_downloaded_alone(server, tmp_path, monkeypatch):
    """MNLI's archive does not hold it."""
    write_glue(tmp_path, "MNLI")
    server.files["/AX.tsv"] = (tmp_path / "AX.tsv").read_bytes()
    (tmp_path / "AX.tsv").unlink()
    monkeypatch.setitem(data.DOWNLOADS, "AX.tsv", (server.url("/"), None))
    assert data.load_test("mnli", tmp_path).groups.count("AX") == 40 and (tmp_path / "AX.tsv").is_file()


@needs_assets
@pytest.mark.parametrize("task, size", [("rte", 3000), ("mrpc", 1725)])
def test_real_test_files(task, size):
    test = data.load_test(task, ASSETS / "glue")
    assert len(test.texts) == size and set(test.groups) == {task.upper()}


def test_a_regression_is_refused_with_the_reason():
    with pytest.raises(InputError, match="STS-B is a regression.*no classes.*cola"):
        data.find_task("sts-b")


def test_the_toy_task_has_no_test_set(tmp_path):
    with pytest.raises(InputError, match="no test set"):
        data.load_test("toy", tmp_path)


MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"


def write_mrpc(folder, rows, ids):
    (folder / "MRPC").mkdir(exist_ok=True)
    (folder / "MRPC" / "msr_paraphrase_train.txt").write_text(MRPC_HEADER + "".join(rows), "utf-8")
    (folder / "MRPC" / "mrpc_dev_ids.tsv").write_text(ids)


def test_mrpc_split_mark_and_quotes(tmp_path):
    rows = ['1\t10\t11\t"Open quote\tB\x85b\r\n', "0\t12\t13\tC\tD\u2028d\r\n", '1\t11\t10\tE"\tF\r\n']
    write_mrpc(tmp_path, rows, "12\t13\n")
    train, dev = data.load_task("mrpc", tmp_path)
    assert train.texts == [('"Open quote', "B\x85b"), ('E"', "F")] and train.labels == [1, 1]
    assert dev.texts == [("C", "D\u2028d")] and dev.labels == [0]
    ids = ("7\t8\n", "12\t13\n11\t12\n", "", "12\t13\n10\t11\n11\t10\n")  # one row unknown; all; none; all rows dev
    for broken in ids:
        write_mrpc(tmp_path, rows, broken)
        with pytest.raises(InputError, match="mrpc_dev_ids.tsv"):
            data.load_task("mrpc", tmp_path)


def test_a_tasks_own_folder(tmp_path, capsys):
    """As $GLUE_DIR/RTE in other scripts: read, and nothing is downloaded into it or mixed with it."""
    write_glue(tmp_path, "RTE", examples=7)
    train, dev = data.load_task("rte", tmp_path / "RTE")
    assert len(train.texts) == len(dev.texts) == 7 and len(data.load_test("rte", tmp_path / "RTE").texts) == 7
    assert f"reading    {tmp_path}/RTE/train.tsv" in capsys.readouterr().out
    (tmp_path / "RTE" / "dev.tsv").unlink()
    with pytest.raises(InputError, match="dev.tsv is missing beside train.tsv"):
        data.load_task("rte", tmp_path / "RTE")


def test_mrpc_that_was_split_already(tmp_path):
    (tmp_path / "MRPC").mkdir()
    for name, text in (("train", "A"), ("dev", "C"), ("test", "E")):
        head = "index\t#1 ID\t#2 ID\t#1 String\t#2 String" if name == "test" else MRPC_HEADER.strip()
        (tmp_path / "MRPC" / f"{name}.tsv").write_text(f"{head}\n1\t10\t11\t{text}\tB\n", "utf-8")
    for folder in (tmp_path, tmp_path / "MRPC"):
        train, dev = data.load_task("mrpc", folder)
        assert (train.texts, dev.texts, dev.labels) == ([("A", "B")], [("C", "B")], [1])
        assert data.load_test("mrpc", folder).texts == [("E", "B")]


def test_a_row_in_a_thousand_may_be_bad(tmp_path, capsys):
    """QQP's training file has one with too few columns."""
    write_glue(tmp_path, "QQP", examples=1000)
    with open(tmp_path / "QQP" / "train.tsv", "a") as file:
        file.write("1000\t7\t8\tcut\n")
    assert len(data.load_task("qqp", tmp_path)[0].texts) == 1000
    assert "left out" in (out := capsys.readouterr().out) and "line 1002: 4 columns, the header has 6" in out


def test_mrpc_files_are_downloaded_one_by_one(server, tmp_path, monkeypatch):
    write_mrpc(tmp_path, ["1\t10\t11\tA\tB\r\n", "0\t12\t13\tC\tD\r\n"], "12\t13\n")
    for name in ("MRPC/msr_paraphrase_train.txt", "MRPC/mrpc_dev_ids.tsv"):
        server.files["/" + name] = (tmp_path / name).read_bytes()
        monkeypatch.setitem(data.DOWNLOADS, name, (server.url("/MRPC/"), None))
    train, dev = data.load_task("mrpc", tmp_path / "cache")
    assert (train.texts, dev.texts) == ([("A", "B")], [("C", "D")])
    assert sorted(os.listdir(tmp_path / "cache" / "MRPC")) == ["mrpc_dev_ids.tsv", "msr_paraphrase_train.txt"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"index\tsentence1\tsentence2\tlabel\n", "no examples"),
        (b"index\tsentence1\tlabel\n0\ta\tentailment\n", "no column 'sentence2'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2: unknown label 'maybe'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n", "line 3: 3 columns"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\xff\tb\tentailment\n", "not UTF-8"),
    ],
)
def test_bad_tsv(tmp_path, content, words):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        data.load_task("rte", tmp_path)
    assert words in str(caught.value) and "RTE/train.tsv" in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_task(tmp_path):
    with pytest.raises(InputError, match="unknown task 'rtee'; choose one of: toy, cola"):
        data.load_task("rtee", tmp_path)


# ---- Batches and metrics --------------------------------------------------------------------------------------------


def test_batches_pad_on_the_right():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate("pad a b c d".split())}))
    tokenizer.pre_tokenizer = Whitespace()
    examples = data.Examples([("a b", "c"), ("d", "a"), ("a a a a", "b b")], [1, 0, 1])
    dataset = data.Dataset(examples, tokenizer, max_tokens=5, pad_id=9)
    (input_ids, segment_ids, mask), labels = dataset.batch(np.array([0, 1]))
    assert input_ids.tolist() == [[1, 2, 3], [4, 1, 9]]
    assert segment_ids.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert labels.tolist() == [1, 0]
    assert dataset.input_ids[2].tolist() == [1, 1, 1, 2, 2]  # cut to 5, the longer sentence first


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
    assert data.matthews(predicted, 1 - predicted) == pytest.approx(-100) and data.matthews(
        labels, labels
    ) == pytest.approx(100)
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
    with pytest.raises(InputError, match="the tokenizer: cannot be read"):
        data.Dataset(data.Examples(["b"], [0]), tokenizer, 8, 0)
