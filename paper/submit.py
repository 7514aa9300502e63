"""A finished run's answers to GLUE's test set, whose labels only its server knows, as that server takes them.

    python paper/submit.py runs/mrpc --out answers        leaves answers/MRPC.tsv

Every example leaves where the run's own rule lets it.
"""

from functools import partial
from pathlib import Path

import baselines

import dact
import data
import train

INDEX = {"qqp": "id"}  # the header of what numbers the rows of a test file, where it is not "index"
SUFFIX = {"_matched": "-m", "_mismatched": "-mm"}  # of the server's files for MNLI


def main(argv):
    flag = {"default": "answers", "help": "folder for the files (default: answers)"}
    args = baselines.arguments(__doc__, ("--out", flag)).parse_args(argv)
    for folder in args.runs:
        _, run_args = baselines.read_metrics(folder)
        saved = train.load_run(run_args.out / "dact.pt", 2, run_args.task)  # before anything is downloaded
        submit(saved, run_args, load_test(saved.task, args.data), Path(args.out))
    print("GLUE's server takes one zip with a file for each task, also STS-B.tsv: 1379 times any number from 0 to 5")


def load_test(name, folder=None):
    """The test set of a task: {name of the file that GLUE's server takes: (index, examples)}.

    index: the number that each row has in its own file, a str. examples: `data.Examples`, whose labels are all 0.
    """
    if name == "toy":
        raise data.InputError("the toy task has no test set; choose a task of GLUE")
    task = data.find_task(name)
    folder = data.task_folder(task, folder)
    paths = {task.folder + SUFFIX.get(part, ""): folder / f"test{part}.tsv" for part in task.parts}
    if name == "mnli":  # a model of MNLI answers GLUE's diagnostic set, too
        paths["AX"] = data.download(data.GLUE + "AX.tsv", folder.parent / "AX.tsv")
    test = {}
    for file, path in paths.items():
        if name == "mrpc" and not path.is_file():  # Microsoft's own file, whose rows GLUE counts from 0
            path = data.mrpc_file(folder, "msr_paraphrase_test.txt")
            rows = [[str(i), *row] for i, row in enumerate(data.parse_tsv(path, task.texts, most_bad=0))]
        else:
            rows = data.parse_tsv(path, (INDEX.get(name, "index"), *task.texts), most_bad=0)
        examples = data.Examples()
        examples.add(task, [[*texts, task.labels[0]] for _, *texts in rows], path)
        test[file] = [row[0] for row in rows], examples
    return test


def submit(saved, args, test, out):
    """Write the files of lines (index, label word) that `load_test` names. args: the run's."""
    args.device, args.precision = train.pick_hardware(saved.name, args.precision)
    early = partial(saved.model.to(args.device).early_exit, rule=dact.RULES[args.rule])
    out.mkdir(parents=True, exist_ok=True)
    for file, (index, examples) in test.items():
        labels, _, exit_block = train.predict({"early": early}, saved.dataset(examples), args)[0]["early"]
        words = [data.TASKS[saved.task].labels[label] for label in labels.tolist()]
        lines = [f"{number}\t{word}\n" for number, word in zip(index, words, strict=True)]
        train.write_whole(out / f"{file}.tsv", ("index\tprediction\n" + "".join(lines)).encode())
        mean, N = exit_block.double().mean(), len(saved.model.heads)
        print(f"{file}: mean block {mean:.2f} of {N}, by {train.RULE_NAMES[args.rule]}")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
