"""Section 3.1: DeeBERT inside DACT. The thresholds on the entropy, which DeeBERT is given by hand, are learned.

    python paper/generality.py runs/mrpc

Three stages: stage 1 and the off-ramps as DeeBERT trains them, then the confidence functions alone, by equation (3):
h_n = σ(w (H(y_n) - S)), H the entropy of the ramp's answer in nats. Tied, all blocks share one w and S, as DeeBERT
does; untied, each block has its own. Each is trained from a low and from a high S, to see whether the same one is
found. Beside them stands DeeBERT itself with the learned tied S for its threshold.
"""

from functools import partial

import baselines

import train

STARTS = (0.1, 0.5)


def main(argv):
    args = baselines.arguments(__doc__).parse_args(argv)
    for folder in args.runs:
        run = baselines.open_run(folder, args.data)
        report(run, *learn(run))


def learn(run):
    """({variant: inputs -> Halted} to be measured, {name: thresholds in nats}); trained unless the run holds them."""
    exits = baselines.deebert(run)
    variants, learned = {}, {}
    for tied in (True, False):
        for start in STARTS:
            model = baselines.learned_entropy_dact(run, exits, tied, start)
            name = f"{'tied' if tied else 'untied'}, from S = {start}"
            learned[name] = [head.threshold() for head in model.heads][: 1 if tied else None]
            variants[f"DACT, {name}"] = model.early_exit
            if tied:
                S = learned[name][0]
                variants[f"DeeBERT, S = {S:.3f}"] = partial(exits.early_exit, rule=partial(baselines.entropy_rule, S=S))
    return variants, learned


def report(run, variants, learned):
    """Print the learned thresholds in nats, and what each variant makes of the dev set."""
    print(f"\n{run.folder}: {run.args.task}, seed {run.args.seed}, tau {run.args.tau:g}; learned S in nats")
    for name, thresholds in learned.items():
        print(f"{name:<28}" + " ".join(f"{S:6.3f}" for S in thresholds))
    for name, variant in variants.items():
        halted = train.predict(variant, run.dev, run.args)
        scores = train.scores(halted.label, run.dev.labels, run.args.task)
        saved = train.blocks_used(halted.exit_block, len(run.dact.backbone.blocks))["saved"]
        print(
            f"{name:<28}" + "".join(f"  {metric} {x:5.1f}%" for metric, x in scores.items()) + f"  saved {saved:5.1f}%"
        )


if __name__ == "__main__":
    raise SystemExit(baselines.command(main))
