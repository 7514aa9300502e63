"""Section 3.1: DeeBERT inside DACT. The thresholds on the entropy, which DeeBERT is given by hand, are learned.

    python paper/generality.py runs/mrpc

Three stages: stage 1 and the off-ramps as DeeBERT trains them, then the confidence functions alone, by equation (3):
h_n = σ(w (H(y_n) - S)), H the entropy of the ramp's answer in nats. Tied, all blocks share one w and S, as DeeBERT
does; untied, each block has its own. Each is trained from a low and from a high S, to see whether the same one is
found. Beside them stands DeeBERT itself with the learned tied S for its threshold.
"""

import baselines

import train

STARTS = (0.1, 0.5)


def main(argv):
    args = baselines.arguments(__doc__).parse_args(argv)
    for folder in args.runs:
        run = baselines.open_run(folder, args.data)
        report(run, *learn(run))


def learn(run):
    """({name: thresholds in nats}, {variant: its (labels, exits (n,)) on the dev set}); trained if it is not yet."""
    exits = baselines.deebert(run)
    (logits,) = baselines.answers(exits, run.dev, run.args)
    vectors = baselines.Vectors(logits, run.dev.labels, run.dev.lengths)
    learned, variants = {}, {}
    for tied in (True, False):
        for start in STARTS:
            heads = baselines.learned_entropy_heads(run, exits, tied, start)
            name = f"{'tied' if tied else 'untied'}, from S = {start}"
            learned[name] = [head.threshold() for head in heads][: 1 if tied else None]
            variants[f"DACT, {name}"] = baselines.leave_by_rule(*baselines.over(heads, vectors, run.args.device))
            if tied:
                S = learned[name][0]
                variants[f"DeeBERT, S = {S:.3f}"] = baselines.leave(logits, baselines.entropy(logits) < S)
    return learned, variants


def report(run, learned, variants):
    """Print the learned thresholds in nats, and what each variant makes of the dev set."""
    print(f"\n{run.folder}: {run.args.task}, seed {run.args.seed}, tau {run.args.tau:g}; learned S in nats")
    for name, thresholds in learned.items():
        print(f"{name:<28}" + " ".join(f"{S:6.3f}" for S in thresholds))
    for name, (labels, exit_block) in variants.items():
        scores = train.scores(labels, run.dev.labels, run.args.task)
        shown = "".join(f"  {metric} {score:5.1f}%" for metric, score in scores.items())
        print(f"{name:<28}{shown}  saved {train.blocks_used(exit_block, run.N)['saved']:5.1f}%")


if __name__ == "__main__":
    raise SystemExit(train.command(main))
