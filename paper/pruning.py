"""Section 4.2: "prune whole layers without changing the model accuracy for reduced model size".

    python paper/pruning.py runs/mrpc             # drops the blocks that no training example reaches
    python paper/pruning.py runs/mrpc --keep 8    # drops all blocks after 8, and says what that costs

Leaves the smaller model in pruned.pt, a file like dact.pt: as dact.pt in a folder of its own, `train.py --out FOLDER
--explain` takes it.

Why the answers stay. Cut N blocks down to K, and d = N - n in the halting rules becomes K - n. Both rules only get
easier with a smaller d, so who left at a block n <= K leaves there or earlier. The label is the same: the old rule
promised that its winner at n stays the winner of a_n, ..., a_N, among them a_K; and the new rule, if it stops earlier,
promises the winner of a_K. Only an example that went past block K may change, for it now takes the winner of a_K as it
stands. No training example does; how many dev examples do is measured.
"""

import copy
from dataclasses import replace
from functools import partial

import baselines

import dact
import data
import train


def prune(model, K):
    """A copy of a `dact.DactBert` with its first K blocks and their heads alone; block K always answers."""
    small = copy.deepcopy(model)
    small.backbone.config = replace(small.backbone.config, num_hidden_layers=K)
    small.backbone.blocks = small.backbone.blocks[:K]
    small.heads = small.heads[:K]
    return small


def save_pruned(run, K):
    """Write the run's dact.pt again, as pruned.pt, with K blocks: the path."""
    small, path = prune(run.dact, K).cpu(), run.folder / "pruned.pt"
    train.save_model(path, run.saved._replace(model=small, config=small.backbone.config))
    return path


def predicted(run, models, dataset):
    """({name: `dact.Halted`}, {name: seconds}) of models {name: DactBert}: early exit under the run's rule."""
    early = {name: partial(model.early_exit, rule=dact.RULES[run.args.rule]) for name, model in models.items()}
    found, seconds = train.predict(early, dataset, run.args)
    return {name: dact.Halted(*columns) for name, columns in found.items()}, seconds


def last_block_reached(run):
    """K: the last block that a training example of the run reaches; prints where they leave."""
    found, _ = predicted(run, {"dact": run.dact}, run.train_set)
    histogram = train.blocks_used(found["dact"].exit_block, run.N)["exit_histogram"]
    print(f"training   {len(run.train_set)} examples leave after block 1 .. {run.N}: {histogram}")
    return max(n for n, count in enumerate(histogram, start=1) if count)


def changes(before, after, K):
    """How many examples went past block K, how many of them changed their label, and how many of the others did."""
    went_past, changed = before.exit_block > K, before.label != after.label
    return went_past.sum().item(), (changed & went_past).sum().item(), (changed & ~went_past).sum().item()


def report(run, models, predictions, seconds):
    """The table: both models {name: DactBert}, the sizes of their files, predictions and seconds on the dev set."""
    metrics = "".join(f"{name:>10}" for name in data.TASKS[run.args.task].metrics)
    print(f"\ndev set   blocks   parameters         bytes   mean block   seconds{metrics}")
    files = {"unpruned": run.folder / "dact.pt", "pruned": run.folder / "pruned.pt"}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    for name, model in models.items():
        N, found = len(model.backbone.blocks), predictions[name]
        row = f"{name:<10}{N:>6}{sum(p.numel() for p in model.parameters()):>13,}{sizes[name]:>14,}"
        row += f"{train.blocks_used(found.exit_block, N)['mean_blocks']:>13.2f}{seconds[name]:>10.2f}"
        scores = train.scores(found.label, run.dev.labels, run.args.task)
        print(row + "".join(f"{value:>9.1f}%" for value in scores.values()))
    bytes_saved, before = 100 * (1 - sizes["pruned"] / sizes["unpruned"]), seconds["unpruned"]
    print(f"saved      {bytes_saved:.1f} % of the bytes, {before - seconds['pruned']:.2f} s of {before:.2f} s")


def prune_run(run, keep):
    """Cut a run's model after block `keep`, or where the training set says if None; print what that gives and costs."""
    print(f"run        {run.folder}: {run.args.task}, {run.N} blocks, {train.RULE_NAMES[run.args.rule]}")
    if keep is not None and keep >= run.N:
        raise data.InputError(f"--keep {keep} of {run.N} blocks drops none; give a number from 1 to {run.N - 1}")
    K = keep or last_block_reached(run)
    if K == run.N:
        print(f"no block can be dropped: training examples reach block {K}; --keep K cuts after block K all the same")
        return
    path = save_pruned(run, K)
    small = train.load_run(path, 2, run.args.task).model.to(run.args.device)  # what others will load
    why = "as told" if keep else "which no training example reaches"
    print(f"dropped    block {K + 1} to {run.N}, {why}")
    models = {"unpruned": run.dact, "pruned": small}
    predictions, seconds = predicted(run, models, run.dev)
    report(run, models, predictions, seconds)
    past, lost, others = changes(predictions["unpruned"], predictions["pruned"], K)
    print(f"answers    {past} of {len(run.dev)} dev examples went past block {K}; {lost} of them change their answer")
    print(f"           {others} of the other {len(run.dev) - past} change it")


def main(argv):
    flag = {"type": baselines.number(int, 1, 1000), "metavar": "K", "help": "cut after block K, whoever goes past it"}
    args = baselines.arguments(__doc__, ("--keep", flag)).parse_args(argv)
    for folder in args.runs:
        prune_run(baselines.open_run(folder, args.data), args.keep)


if __name__ == "__main__":
    raise SystemExit(train.command(main))
