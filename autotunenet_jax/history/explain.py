"""A run told in plain words: what was tried, what came of it, and why it was kept."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .history import History

# Most lines of the whole text, however long the run; a round told fork by fork takes several.
_MOST_LINES = 38

# Most messages of events told, and of each the steps it was given at.
_MOST_MESSAGES, _MOST_STEPS = 7, 4

# Kinds of events that moved the training: where there is no room for all, these are told.
_UNDOING = ("rollback", "retreat", "rate")

# Those that may move the rates.
_MOVING = (*_UNDOING, "climb")

# Most characters of a round's candidates on one line.
_MOST_CHARACTERS = 100


def shown(value: Any) -> str:
    """A value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def varied(row: Mapping[str, Any]) -> list[str]:
    """Hyperparameters that the forks of a round differ in; all of them where there is one fork."""
    forks = [fork["hyperparams"] for fork in row["forks"]]
    names = list(row["chosen"])
    differing = [name for name in names if any(fork[name] != forks[0][name] for fork in forks)]
    return differing or names


def settings(hyperparams: Mapping[str, Any], names: Sequence[str]) -> str:
    """Hyperparameters by name, in a line."""
    return ", ".join(f"{name} {shown(hyperparams[name])}" for name in names)


def score_of(history: "History", row: Mapping[str, Any], score: float) -> float:
    """A fork's score in the user's own direction."""
    return -score if history.mode == "max" and row["scored_by"] == "validation" else score


def explain(history: "History") -> str:
    """What happened, in words; see `History.explain`."""
    head, tail = [_headline(history), *_values(history)], _events(history)
    room = _MOST_LINES - len(head) - len(tail)
    detailed = [_in_full(history, number, row) for number, row in enumerate(history.rounds, start=1)]
    if sum(map(len, detailed)) > room:
        detailed = [_in_short(history, number, row) for number, row in enumerate(history.rounds, start=1)]
    lines = [line for block in detailed for line in block]
    if len(lines) > room:
        # The first rounds move most, and the last ones say where the run ended.
        count = (room - 1) // len(detailed[0])
        first, left = count // 2, len(detailed) - count
        kept = [*detailed[:first], [f"... {left} rounds more ..."], *detailed[first + left :]]
        lines = [line for block in kept for line in block]
    return "\n".join([*head, *lines, *tail])


def _headline(history: "History") -> str:
    total, rounds = history.summary, history.rounds
    steps = total.get("steps", history.records[-1]["step"] if history.records else 0)
    spent, undone = _price(history)
    forks = sum(len(row["forks"]) for row in rounds)
    rollbacks = total.get("rollbacks", sum(event["kind"] == "rollback" for event in history.events))
    return (
        f"{steps} training steps in {_count(len(rounds), 'round')} with {_count(forks, 'fork')}; {spent} steps "
        f"({100.0 * spent / max(steps, 1):.1f} %) went into range tests and forks that were not kept; {undone} more "
        f"({100.0 * undone / max(steps, 1):.1f} %) were undone by going back, or skipped; "
        f"{_count(rollbacks, 'rollback')}."
    )


def _price(history: "History") -> tuple[int, int]:
    """Steps spent on range tests and on forks that were not kept, and the others that are not part of the past."""
    spent = history.summary.get("discarded_steps")
    if spent is None:
        # The run is under way: what its rounds so far have told.
        tests = [row["sweep"] for row in history.rounds if row["sweep"] is not None]
        lost = [
            (fork["start"], fork["end"]) for row in history.rounds for fork in row["forks"] if fork["status"] != "kept"
        ]
        spent = sum(end - start for start, end in (*tests, *lost))
    return spent, history.summary.get("undone_steps", max(history.lost_steps - spent, 0))


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _values(history: "History") -> list[str]:
    """Where the run began and what its rounds chose."""
    if not history.rounds or not history.records:
        return []
    first, last, ended = history.records[0], history.rounds[-1]["chosen"], history.rounds[-1]["end"]
    has_moved = any(event["kind"] in _MOVING and event["step"] > ended for event in history.events)
    moved = " and what is told below" if has_moved else ""
    lines = []
    for name in list(history.names)[:6]:
        # A test's or a fork's first step is no starting value.
        start = f"began at {shown(first[name])} and " if first["phase"] == "train" else ""
        lines.append(f"{name}: {start}stood at {shown(last[name])} after the last round, before the schedule{moved}.")
    return lines


def _title(number: int, row: Mapping[str, Any], *, is_paired: bool) -> str:
    steps = sorted({fork["steps"] for fork in row["forks"]})
    horizon = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return (
        f"Round {number} ({row['kind']}, steps {row['start']} to {row['end']}): "
        f"{_count(len(row['forks']), 'fork')} of {horizon} steps from one state, on "
        f"{'the same' if is_paired else 'fresh'} data, scored by {row['scored_by']}"
    )


def _read_by_test(history: "History", row: Mapping[str, Any]) -> str:
    """Where a range test said that the first fork should go."""
    if row["sweep"] is None or not row["forks"]:
        return ""
    start, end = row["sweep"]
    rates = [name for name, held in history.space.items() if held["role"] == "rate"] or list(row["chosen"])
    return f"A range test of {end - start} steps read {settings(row['forks'][0]['hyperparams'], rates)}. "


def _in_full(history: "History", number: int, row: Mapping[str, Any]) -> list[str]:
    """A round, fork by fork."""
    reference, before = row.get("reference"), ""
    # Where nothing was measured before the first fork, its own score stands for that.
    if reference is not None and reference not in row["forks"][0]["scores"]:
        before = f"; before them it stood at {shown(score_of(history, row, reference))}"
    lines = [f"{_title(number, row, is_paired=history.is_paired)}{before}."]
    names = varied(row)
    for place, fork in enumerate(row["forks"], start=1):
        lines.append(f"  fork {place}: {settings(fork['hyperparams'], names)}: {_told(history, row, place)}")
    lines.append(f"  {_read_by_test(history, row)}Verdict: {verdict(row)}")
    return lines


def _told(history: "History", row: Mapping[str, Any], place: int) -> str:
    """What came of a fork."""
    # Loaded where it is asked for: every run imports this file, for its verdicts.
    from .belief import believed

    fork = row["forks"][place - 1]
    best = row["forks"][row["best"]] if row["best"] >= 0 else None
    if not fork["scores"]:
        return f"{_end_of(row)} after {fork['steps']} steps"
    text = f"scored {score_of(history, row, fork['scores'][0]):.4g}"
    held = believed(row, place - 1)
    if held is not None:
        low, high = (f"{end:.4g}" for end in sorted(score_of(history, row, end) for end in held))
        text += f" (believed {low} to {high})" if low != high else ""
    if best is not None and fork is not best and best["scores"]:
        behind = fork["scores"][0] - best["scores"][0]
        text += f", {abs(behind):.2g} {'better' if behind < 0 else 'worse'} than the kept one"
    # The first with a score had nothing to be better than.
    has_rival = any(other["scores"] for other in row["forks"][: place - 1])
    if has_rival and _is_known(fork["p_better"]):
        text += f", {100 * fork['p_better']:.0f} % likely to beat the one kept till then"
    return f"{text}; kept" if fork is best else text


def _end_of(row: Mapping[str, Any]) -> str:
    """What is said of a fork without a score."""
    return "not measured" if _is_unmeasured(row) else "failed"


def _is_known(probability: Any) -> bool:
    return probability is not None and math.isfinite(probability)


def _is_unmeasured(row: Mapping[str, Any]) -> bool:
    """Whether a round of slow hyperparameters ended without the metric that it needs."""
    return row["kind"] == "slow" and row["scored_by"] != "validation"


def verdict(row: Mapping[str, Any]) -> str:
    """The outcome of a round, in a sentence."""
    names = varied(row)
    if row["best"] < 0 and _is_unmeasured(row):
        return (
            "no validation metric came when it was asked for, and nothing else judges these; training went back to "
            f"where it began, with {settings(row['chosen'], names)}."
        )
    if row["best"] < 0 and any(fork["scores"] for fork in row["forks"]):
        return (
            "by the metric every fork ended well behind the state that they began from; training went back to it, with "
            f"{settings(row['chosen'], names)}."
        )
    if row["best"] < 0:
        return f"every fork failed; training went back to where they began, with {settings(row['chosen'], names)}."
    best = row["forks"][row["best"]]
    others = [fork["scores"][0] for fork in row["forks"] if fork is not best and fork["scores"]]
    why = "it was the only one with a score"
    if others and best["scores"]:
        ahead = min(others) - best["scores"][0]
        why = f"it was {ahead:.2g} ahead of the next" if ahead >= 0 else (
            f"another scored {-ahead:.2g} better, which is too little to be believed"
        )  # fmt: skip
    chosen = settings(row["chosen"], names)
    is_lower = row["scored_by"] != "validation" and chosen != settings(best["hyperparams"], names)
    rest = ", a little lower, since no validation metric has judged" if is_lower else ""
    return f"fork {row['best'] + 1} was kept, since {why}; on with {chosen}{rest}."


def _in_short(history: "History", number: int, row: Mapping[str, Any]) -> list[str]:
    """A round, in two lines."""
    names = varied(row)
    tried = "; ".join(
        f"{settings(fork['hyperparams'], names)} -> "
        + (f"{score_of(history, row, fork['scores'][0]):.4g}" if fork["scores"] else _end_of(row))
        for fork in row["forks"]
    )
    if len(tried) > _MOST_CHARACTERS:
        tried = f"{tried[: _MOST_CHARACTERS - 4].rsplit(';', 1)[0]}; ..."
    title = _title(number, row, is_paired=history.is_paired)
    return [f"{title}: {tried}.", f"  {_read_by_test(history, row)}Verdict: {verdict(row)}"]


def _events(history: "History") -> list[str]:
    """Rollbacks, retreats and the rest: each message once, with the steps it was given at."""
    said: dict[tuple[str, str], list[int]] = {}
    for event in history.events:
        said.setdefault((event["kind"], event["message"]), []).append(event["step"])
    # What was undone is told at any rate, and a further message of a kind only where there is room.
    kinds = [kind for kind, _ in said]
    ranks = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
    order = sorted(zip(ranks, kinds, said, strict=True), key=lambda entry: (entry[0], entry[1] not in _UNDOING))
    chosen = {key for _, _, key in order[:_MOST_MESSAGES]}
    lines = [
        _event(kind, message, said[kind, message]) for kind, message in sorted(chosen, key=lambda key: said[key][0])
    ]
    left = sum(len(steps) for key, steps in said.items() if key not in chosen)
    return [*lines, *([f"... {_count(left, 'event')} more ..."] if left else [])]


def _event(kind: str, message: str, steps: Sequence[int]) -> str:
    more = f" and {len(steps) - _MOST_STEPS} times more" if len(steps) > _MOST_STEPS else ""
    return f"Step {', '.join(map(str, steps[:_MOST_STEPS]))}{more} ({kind}): {message}"
