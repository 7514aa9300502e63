"""What each choice of stage 2 is worth: stage 2 without it, from the same stage 1.

    python paper/choices.py runs/table1-mrpc/seed-0 runs/table1-mrpc/seed-1 runs/table1-mrpc/seed-2

Every change is trained in every run's folder, and what is finished is kept. Prints a table of means over the runs.
"""

import re
from contextlib import ExitStack
from unittest.mock import patch

import baselines
import numpy as np
import table1
from torch import nn

import dact
import data
import train


def half_open(head):
    """h_n = sigmoid(0) = 0.5 for every input."""
    nn.init.zeros_(head.halt.weight)
    nn.init.zeros_(head.halt.bias)


NO_SCALE = (dact.Scale, "forward", lambda scale, cls: cls)
DROPOUT = (train, "without_dropout", lambda backbone: None)
FROM_HALF = (dact.DactModule, "reset_halting", half_open)
AS_WRITTEN = {"tau": 0.005, "head_loss": 0.0}
# {row: (settings in the place of the run's, what stands in the place of which function)}
CHANGES = {
    "as shipped": ({}, ()),
    "[CLS] as it is, no Scale": ({}, (NO_SCALE,)),
    "halting starts at h = 0.5": ({}, (FROM_HALF,)),
    "no loss of the heads' own": ({"head_loss": 0.0}, ()),
    "dropout in the backbone": ({}, (DROPOUT,)),
    "the paper as it is written": (AS_WRITTEN, (NO_SCALE, DROPOUT)),  # it names no start
    "the same, from h = 0.5": (AS_WRITTEN, (NO_SCALE, DROPOUT, FROM_HALF)),
}


def main(argv):
    args = baselines.arguments(__doc__).parse_args(argv)
    runs = [baselines.open_run(folder, args.data) for folder in args.runs]
    metric = data.TASKS[runs[0].args.task].metrics[0]
    print(f"\n| {len(runs)} run(s) | {metric} | blocks saved | exits by chance | leave after block 1, 2, ... (%) |")
    print("| --- | ---: | ---: | ---: | --- |")
    for row, (settings, replaced) in CHANGES.items():
        found = [changed(run, row, settings, replaced) if settings or replaced else run.metrics for run in runs]
        columns = zip(*((each["dact"][metric], each["dact"]["saved"], each["by_chance"][metric]) for each in found))
        exits = np.sum([each["dact"]["exit_histogram"] for each in found], axis=0)
        shares = " ".join(f"{share:.0f}" for share in 100 * exits / exits.sum())
        print(f"| {row} | {' | '.join(map(table1.mean_and_deviation, columns))} | {shares} |", flush=True)


def changed(run, row, settings, replaced):
    """The metrics of the run's stage 2 with other settings, and other functions in the place of some."""
    with ExitStack() as stack:
        for target, attribute, new in replaced:
            stack.enter_context(patch.object(target, attribute, new))
        return another_stage2(run, re.sub(r"\W+", "-", row), **settings).metrics


def another_stage2(run, name, **changes):
    """A run of the same stage 1 whose stage 2 differs by `changes`, in a folder of this name beside the run."""
    stage1 = str(run.folder / "stage1.pt")
    return table1.opened(run.args, run.splits, out=run.trained / name, stage1=stage1, **changes)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
