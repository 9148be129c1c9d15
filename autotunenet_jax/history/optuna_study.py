"""A history as a study of Optuna, for its plots and its dashboard."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

    from .history import History


_NAME = "autotunenet"


def to_study(history: "History", *, storage: str | None = None) -> "optuna.study.Study":
    """The forks as trials; see `History.to_optuna`."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("History.to_optuna needs optuna; install autotunenet-jax[optuna].") from error
    if not history.space:
        raise ValueError("this history does not know its search space: ask the history of a run, or one read from one.")
    distributions = {name: _distribution(optuna, held) for name, held in history.space.items()}
    # One study has one direction: where some rounds were scored by the training loss, that of a loss.
    is_max = history.mode == "max" and all(row["scored_by"] == "validation" for row in history.rounds)
    try:
        direction = "maximize" if is_max else "minimize"
        study = optuna.create_study(direction=direction, study_name=_NAME, storage=storage)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ValueError(f"{storage} holds a study {_NAME!r} already. Choose another storage, or delete it.") from error
    for number, row in enumerate(history.rounds):
        for place, fork in enumerate(row["forks"]):
            is_failed = not fork["scores"] or fork["status"] == "failed"
            value = None if is_failed else (-1.0 if is_max else 1.0) * fork["scores"][0]
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.FAIL if is_failed else optuna.trial.TrialState.COMPLETE,
                    value=value,
                    params={name: _inside(fork["hyperparams"][name], history.space[name]) for name in distributions},
                    distributions=distributions,
                    user_attrs={
                        "round": number,
                        "fork": place,
                        "kind": row["kind"],
                        "scored_by": row["scored_by"],
                        "start": fork["start"],
                        "steps": fork["steps"],
                        "kept": fork["status"] == "kept",
                        "p_better": fork["p_better"] if fork["p_better"] == fork["p_better"] else None,
                    },
                )
            )
    return study


def _distribution(optuna: Any, held: dict[str, Any]) -> Any:
    if "options" in held:
        return optuna.distributions.CategoricalDistribution(held["options"])
    kind = optuna.distributions.FloatDistribution
    if isinstance(held["lo"], int):
        kind = optuna.distributions.IntDistribution
    return kind(held["lo"], held["hi"], log=held["log"])


def _inside(value: Any, held: dict[str, Any]) -> Any:
    """A value that single precision may have rounded beyond a bound."""
    return value if "options" in held else min(max(value, held["lo"]), held["hi"])
