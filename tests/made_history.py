"""Histories made by hand, of runs whose every number is known."""

import numpy as np

import autotunenet_jax as atn

# One space for all that is fitted, so that one program is compiled.
SPACE = atn.SearchSpace({"learning_rate": (1e-5, 1e-1), "batch_size": [16, 32, 64]})
RATES = ((1e-2, 1.6), (3e-3, 1.1), (1e-3, 1.0), (3e-4, None))


def fork(values, score, start, *, kept=False):
    scores = [] if score is None else [score]
    status = "kept" if kept else "lost" if scores else "failed"
    return {
        "hyperparams": values, "scores": scores, "status": status, "steps": 20, "start": start, "end": start + 20,
        "p_better": 0.5, "lead": 0.9, "deviation": 0.1,
    }  # fmt: skip


def add_steps(made, start, end, *, phase="train", number=0, place=-1, values, is_kept=True):
    for step in range(start + 1, end + 1):
        loss = 2.0 / (1.0 + 0.05 * (step - start)) + 0.1 * np.sin(step)
        row = {"step": step, "data_step": step, "loss": loss, "phase": phase, "round": number, "fork": place}
        made.add({**row, **values})
    if not is_kept:
        made.discard(start, end)


def history(rounds=2, *, space=SPACE, has_records=True, scored_by="validation", options=(32, 64), name="batch_size"):
    """A run of a few rounds of four forks: the third won, the fourth failed."""
    made = atn.History(space.names, space=space)
    step = 0
    for number in range(rounds):
        begin, forks = step, []
        for place, (rate, score) in enumerate(RATES):
            values = {"learning_rate": rate}
            if name in space:
                values[name] = options[place % 2]
            forks.append(fork(values, score, step, kept=place == 2))
            if has_records:
                held = space.clip(values)
                numbers = {key: np.asarray(value).item() for key, value in held.items()}
                add_steps(
                    made, step, step + 20, phase="fork", number=number, place=place, values=numbers, is_kept=place == 2
                )
            else:
                made.discard(step, step + 20) if place != 2 else None
            step += 20
        made.rounds.append(
            {
                "start": begin,
                "end": step,
                "kind": "fast",
                "scored_by": scored_by,
                "sweep": None,
                "forks": forks,
                "best": 2,
                "outcome": "A round ended.",
                "chosen": forks[2]["hyperparams"],
                "reference": 1.5,
            }
        )
        if has_records:
            numbers = {key: np.asarray(value).item() for key, value in space.clip(forks[2]["hyperparams"]).items()}
            add_steps(made, step, step + 60, number=number, values=numbers)
        step += 60
        made.evals.append({"step": step, "value": 1.0 / (number + 1), "is_settled": True})
    made.events += [{"step": 100, "kind": "rollback", "message": "."}, {"step": 130, "kind": "retreat", "message": "."}]
    made.summary = {"steps": step, "discarded_steps": 60 * rounds, "share_discarded": 0.4, "rollbacks": 1}
    return made
