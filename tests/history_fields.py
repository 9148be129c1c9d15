"""What a history holds, whichever way in it comes from."""

RECORD = {"step", "data_step", "loss", "phase", "round", "fork", "is_kept"}
ROUND = {
    "start", "end", "kind", "scored_by", "reference", "sweep", "forks", "best", "outcome", "verdict", "chosen",
}  # fmt: skip
FORK = {"hyperparams", "scores", "status", "steps", "start", "end", "p_better", "lead", "deviation"}
EVAL = {"step", "value", "is_settled"}
# A loop that measures more than one number says so.
METRICS = {"metrics"}
EVENT = {"step", "kind", "message"}
SUMMARY = {
    "steps", "total_steps", "discarded_steps", "share_discarded", "undone_steps", "rollbacks", "rounds", "evals",
    "dropped",
}  # fmt: skip


def check(history):
    """Every row has these fields, no more and no fewer."""
    forks = [fork for row in history.rounds for fork in row["forks"]]
    pairs = (
        (history.records, RECORD | set(history.names)), (history.rounds, ROUND), (forks, FORK), (history.evals, EVAL),
        (history.events, EVENT), ([history.summary], SUMMARY),
    )  # fmt: skip
    for rows, fields in pairs:
        assert all(set(row) - METRICS == fields for row in rows), fields
    assert history.records and history.rounds and forks


def check_price(history):
    """What the summary says was discarded and undone is just what the records do not keep; returns both."""
    assert history.stride == 1
    summary, lost = history.summary, sum(not row["is_kept"] for row in history.records)
    assert summary["discarded_steps"] + summary["undone_steps"] == lost == history.lost_steps
    text = history.explain()
    assert f"{summary['discarded_steps']} steps (" in text and f"{summary['undone_steps']} more (" in text
    return summary["discarded_steps"], summary["undone_steps"]
