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


def main(argv):
    flag = {"default": "answers", "help": "folder for the files (default: answers)"}
    args = baselines.arguments(__doc__, ("--out", flag)).parse_args(argv)
    for folder in args.runs:
        _, run_args = baselines.read_metrics(folder)
        saved = train.load_run(run_args.out / "dact.pt", 2, run_args.task)  # before anything is downloaded
        submit(saved, run_args, data.load_test(saved.task, args.data), Path(args.out))
    print("GLUE's server takes one zip with a file for each task, also STS-B.tsv: 1379 times any number from 0 to 5")


def submit(saved, args, examples, out):
    """Write a file of lines (index, label word) for each group of test `data.Examples` that the server has a file for.

    index is the number that a row has in its own file, wherever it stands there. args: the run's.
    """
    args.device, args.precision = train.pick_hardware(saved.name, args.precision)
    early = partial(saved.model.to(args.device).early_exit, rule=dact.RULES[args.rule])
    labels, _, exit_block = train.predict({"early": early}, saved.dataset(examples), args)[0]["early"]
    words = [data.TASKS[saved.task].labels[label] for label in labels.tolist()]
    out.mkdir(parents=True, exist_ok=True)
    for group in dict.fromkeys(examples.groups):
        rows = zip(examples.groups, examples.index, words, strict=True)
        lines = [f"{index}\t{word}\n" for of, index, word in rows if of == group]
        train.write_whole(out / f"{group}.tsv", ("index\tprediction\n" + "".join(lines)).encode())
    print(f"mean block {exit_block.double().mean():.2f} of {len(saved.model.heads)}, by {train.RULE_NAMES[args.rule]}")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
