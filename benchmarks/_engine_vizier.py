"""Google Vizier's Gaussian process bandit as a process of its own, asked and told in lines of JSON.

Its requirements (Equinox 0.11, which uses what JAX 0.10 has removed) conflict with ours, so it lives in an environment
of its own, and `benchmarks.engine` starts this file with the interpreter that the variable ``VIZIER_PYTHON`` names:

    python3.11 -m venv vizier
    vizier/bin/pip install "google-vizier[jax]==0.1.24" && vizier/bin/pip uninstall -y tfp-nightly
    vizier/bin/pip install jax==0.4.35 jaxlib==0.4.35 "numpy<2" "scipy<1.14" flax==0.10.0 "optax<0.2.5" \\
        tensorflow-probability==0.25.0 "orbax-checkpoint<0.7" "jaxtyping<0.3" "chex<0.1.88"
    VIZIER_PYTHON=vizier/bin/python python -m benchmarks.engine regret --methods Vizier

The first line in is ``{"dims", "is_mixed", "seed"}``. Then ``"ask"`` is answered with a point of the unit cube, and a
number, or null where the trial failed, is the score of the last one.
"""

import json
import sys


def statement(vz, dims, is_mixed):
    problem = vz.ProblemStatement()
    root = problem.search_space.root
    for i in range(1 if is_mixed else dims):
        root.add_float_param(f"x{i}", 0.0, 1.0)
    if is_mixed:
        root.add_int_param("x1", 0, 7)
        root.add_categorical_param("x2", ["0", "1", "2"])
    problem.metric_information.append(vz.MetricInformation("y", goal=vz.ObjectiveMetricGoal.MINIMIZE))
    return problem


def designer(vz, setup):
    """The library's defaults, except that shapes are padded: without that every new trial recompiles everything."""
    import jax
    from vizier._src.algorithms.designers.gp_bandit import VizierGPBandit
    from vizier.pyvizier.converters.padding import PaddingSchedule, PaddingType

    return VizierGPBandit(
        statement(vz, setup["dims"], setup["is_mixed"]),
        padding_schedule=PaddingSchedule(num_trials=PaddingType.POWERS_OF_2),
        rng=jax.random.PRNGKey(setup["seed"]),
    )


def unit(parameters, setup):
    values = [parameters.get_value(f"x{i}") for i in range(setup["dims"])]
    if setup["is_mixed"]:
        values = [values[0], (float(values[1]) + 0.5) / 8.0, (float(values[2]) + 0.5) / 3.0]
    return [float(value) for value in values]


def serve(lines, answers):
    from vizier import algorithms as vza
    from vizier import pyvizier as vz

    setup = json.loads(next(lines))
    bandit, trial, count = designer(vz, setup), None, 0
    for line in lines:
        told = json.loads(line)
        if told == "ask":
            count += 1
            trial = bandit.suggest(1)[0].to_trial(count)
            print(json.dumps(unit(trial.parameters, setup)), file=answers, flush=True)
        else:
            trial.complete(
                vz.Measurement(metrics={} if told is None else {"y": told}),
                infeasibility_reason="failed" if told is None else None,
            )
            bandit.update(vza.CompletedTrials([trial]), vza.ActiveTrials())


if __name__ == "__main__":
    # What the library prints belongs to no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(iter(sys.stdin.readline, ""), answers)
