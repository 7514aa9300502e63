"""Section 4.2: "prune whole layers without changing the model accuracy for reduced model size".

    python paper/pruning.py runs/mrpc             # drops the blocks that no training example reaches
    python paper/pruning.py runs/mrpc --keep 8    # drops all blocks after 8, and says what that costs

Leaves the smaller model in pruned.pt, a file like dact.pt: as dact.pt in a folder of its own, `train.py --out FOLDER`
with --explain or --submit takes it.

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
    saved = train.load_run(run.folder / "dact.pt")
    train.save_model(path, saved._replace(model=small, config=small.backbone.config))
    return path


def variants_of(run, models):
    """{name: inputs -> `dact.Halted`} of models {name: DactBert}: early exit under the run's rule."""
    return {name: partial(model.early_exit, rule=dact.RULES[run.args.rule]) for name, model in models.items()}


def last_block_reached(run):
    """K: the last block that a training example of the run reaches; prints where they leave."""
    N = len(run.dact.backbone.blocks)
    used = train.blocks_used(train.predict(run.early_exit, run.train_set, run.args).exit_block, N)
    print(f"training   {len(run.train_set)} examples leave after block 1 .. {N}: {used['exit_histogram']}")
    return max(n for n, count in enumerate(used["exit_histogram"], start=1) if count)


def changes(before, after, K):
    """How many examples went past block K, how many of them changed their label, and how many of the others did."""
    went_past, changed = before.exit_block > K, before.label != after.label
    return went_past.sum().item(), (changed & went_past).sum().item(), (changed & ~went_past).sum().item()


def report(run, models, files, predictions, seconds):
    """The table: both models {name: DactBert}, their files, predictions and seconds on the dev set."""
    metrics = "".join(f"{name:>10}" for name in data.TASKS[run.args.task].metrics)
    print(f"\ndev set   blocks   parameters         bytes   mean block   seconds{metrics}")
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
    N = len(run.dact.backbone.blocks)
    print(f"run        {run.folder}: {run.args.task}, {N} blocks, {train.RULE_NAMES[run.args.rule]}")
    if keep is not None and keep >= N:
        raise data.InputError(f"{run.folder}: --keep {keep} of {N} blocks drops none; give a number from 1 to {N - 1}")
    K = keep or last_block_reached(run)
    if K == N:
        print(f"no block can be dropped: training examples reach block {N}; --keep K cuts after block K all the same")
        return
    path = save_pruned(run, K)
    small = train.load_run(path, 2, run.args.task).model.to(run.args.device).eval()  # what others will load
    why = "as told" if keep else "which no training example reaches"
    print(f"dropped    block {K + 1} to {N}, {why}: {path}")
    models = {"unpruned": run.dact, "pruned": small}
    variants = variants_of(run, models)
    predictions = {name: train.predict(variant, run.dev, run.args) for name, variant in variants.items()}
    seconds = train.seconds_of(variants, run.dev, run.args)
    report(run, models, {"unpruned": run.folder / "dact.pt", "pruned": path}, predictions, seconds)
    past, lost, others = changes(predictions["unpruned"], predictions["pruned"], K)
    print(f"answers    {past} of {len(run.dev)} dev examples went past block {K}; {lost} of them change their answer")
    print(f"           {others} of the other {len(run.dev) - past} change it")


def main(argv):
    flag = {"type": train.number(int, 1, 1000), "metavar": "K", "help": "cut after block K, whoever goes past it"}
    args = baselines.arguments(__doc__, ("--keep", flag)).parse_args(argv)
    for folder in args.runs:
        prune_run(baselines.open_run(folder, args.data), args.keep)


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
