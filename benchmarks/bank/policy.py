"""The algorithm of docs/how_it_works.md as a plain program over a `Lab`: where ideas are cheap.

It knows nothing of the package. `Knobs` holds every number that is chosen on the bank, so that an ablation is
``dataclasses.replace`` and a line in the report.
"""

import dataclasses
import math
import zlib

import numpy as np

from benchmarks.bank.lab import WORST, Lab, States, finite

ERF = np.vectorize(math.erf)


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Every constant of the algorithm for one rate. Shares are of the run, distances in decades.

    Attributes:
      test_share: Length of the range test.
      first_share: Length of a fork of the first round, of at most ``first_forks`` forks.
      second_share: The same for the second round, which begins at ``second_start``; ``second_least`` forks at least,
        the second one above the first with ``second_up``.
      third_start: When a third round asks upward once more, by forks of ``third_share``; 0 for never.
      least_fork: Steps of the shortest fork.
      cool: Last part of a fork over which its rate falls to almost zero.
      line_step: Step of the line search.
      rise: First part of a fork over which its rate climbs to what it claims, from the rate before it; 0 for none.
      drift: How far below the winner of the first round training goes on; 0 for at its rate.
      unseen: How much further where there is no validation metric.
      reach: Standard deviations above the others up to which the highest loss counts in a score, where there is none.
      price: Least expected improvement worth another fork.
      signal: Standard deviation of the surrogate's shape, in units of the round's gain on the warped scale.
      lengthscale: Of its Matern kernel.
      noise: Standard deviation of a score.
      time_scale: How fast the shape forgets, in logarithms of time.
      curvature: Of the prior mean about a round's first fork; per squared decade.
      resolution: Shortfall, as a share of the gain, below which scores count in proportion.
      hold: Share of the budget after which the rate falls linearly to zero.
      check_share: Distance of two readings of the validation metric.
      patience: Readings above the best one, in a row, after which training goes back to it.
      confirm_share: Length of the cool-down before that; 0 for none.
      back: How far the rate falls then.
      climb: How far it climbs after ``patience`` readings in a row that are each the lowest, until training has had to
        go back once; 0 for never. The next reading has to be the lowest as well, or that is undone.
      far: How far below the range test's reading a rate climbs half of the way there instead, until the ending, also
        after training had to go back, unless that was from a climb.
      ending: Last part of the run in which training does not go back.
      judge: ``"gp"``, or ``"argmin"``: the best score wins and every round looks to both sides.
      validates: Whether there is a validation metric; without one forks are scored by the training losses of their
        cool-down, and the mean training loss between readings is one.
      rewinds: Whether forks of a round see the same batches.
      falls: How often rates fall by readings of the training loss.
      seeks: Whether the first round goes on to lower rates while no fork has gained on the state they began from.
    """

    test_share: float = 0.03
    first_share: float = 0.03
    first_forks: int = 6
    second_start: float = 0.12
    second_share: float = 0.04
    second_forks: int = 4
    cool: float = 0.25
    line_step: float = 0.5
    rise: float = 0.0
    drift: float = 0.0
    unseen: float = 0.25
    reach: float = 4.0
    second_least: int = 2
    second_up: bool = False
    third_start: float = 0.0
    third_share: float = 0.05
    price: float = 0.03
    signal: float = 0.25
    lengthscale: float = 0.6
    noise: float = 0.04
    time_scale: float = 1.5
    curvature: float = 0.15
    resolution: float = 0.05
    hold: float = 0.6
    check_share: float = 0.05
    patience: int = 2
    back: float = 0.5
    climb: float = 0.25
    far: float = 1.0
    ending: float = 0.1
    least_fork: int = 20
    confirm_share: float = 0.05
    judge: str = "gp"
    validates: bool = True
    rewinds: bool = True
    falls: int = 1
    seeks: bool = True
    spoils: float = 1.0
    metric_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Observation:
    """One fork: its rate, its score less that of the state it began from (infinite if it failed), round and time."""

    x: float
    score: float
    round: int
    time: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Validation and test loss of the state that is returned, log10 of the rate in force, shares, and counts."""

    losses: tuple[float, float]
    rate: float
    discarded: float
    went_back: int
    forks: int


def _matern(distance: np.ndarray) -> np.ndarray:
    t = math.sqrt(5.0) * np.abs(distance)
    return (1.0 + t + t * t / 3.0) * np.exp(-t)


def _bowl(knobs: Knobs, x: np.ndarray, centre: float) -> np.ndarray:
    quadratic = 0.5 * knobs.curvature * (x - centre) ** 2
    return 2.0 * quadratic / (1.0 + np.sqrt(1.0 + quadratic))


def shortfalls(knobs: Knobs, observations: list[Observation]) -> np.ndarray:
    """Scores in the surrogate's unit: 0 the best of its round, 1 one that gained nothing; NaN where a fork failed."""
    out = np.full(len(observations), np.nan)
    for number in {o.round for o in observations}:
        at = [i for i, o in enumerate(observations) if o.round == number and np.isfinite(o.score)]
        if at:
            scores = np.array([observations[i].score for i in at])
            excess = scores - scores.min()
            gain = -scores.min()
            unit = (
                max(gain, np.sort(excess)[(len(excess) - 1) // 2], 1e-12) if gain > 0 else 2.0 * excess.mean() + 1e-12
            )
            warped = np.log1p(np.clip(excess / unit, 0.0, 4.0) / knobs.resolution)
            out[at] = warped / math.log1p(1.0 / knobs.resolution)
    return out


def posterior(
    knobs: Knobs, observations: list[Observation], x: np.ndarray, time: float, centre: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the shortfall at ``x``; the intercept of each round is left out."""
    at = np.array([o.x for o in observations])
    rounds = np.array([o.round for o in observations])
    times = np.array([o.time for o in observations])
    residual = shortfalls(knobs, observations) - _bowl(knobs, at, centre)
    for number in set(rounds):
        same = rounds == number
        good = same & np.isfinite(residual)
        residual[good] -= residual[good].mean() if good.any() else 0.0
        residual[same & ~good] = (residual[good].max() if good.any() else 0.0) + 0.5

    def kernel(a: np.ndarray, ta: np.ndarray, b: np.ndarray, tb: np.ndarray) -> np.ndarray:
        forgets = np.exp(-np.abs(ta[:, None] - tb) / knobs.time_scale)
        return knobs.signal**2 * _matern((a[:, None] - b) / knobs.lengthscale) * forgets

    now = np.full(len(x), time)
    joint = kernel(at, times, at, times) + (rounds[:, None] == rounds) + np.eye(len(at)) * (knobs.noise**2 + 9e-6)
    cross = kernel(at, times, x, now)
    solved = np.linalg.solve(joint, np.column_stack([residual, cross]))
    mean = _bowl(knobs, x, centre) + cross.T @ solved[:, 0]
    return mean, kernel(x, now, x, now) - cross.T @ solved[:, 1:]


def expected_improvement(mean: np.ndarray, covariance: np.ndarray, best: int) -> np.ndarray:
    """Of every point over point ``best``."""
    variance = np.diag(covariance) + covariance[best, best] - 2.0 * covariance[best]
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    z = (mean[best] - mean) / deviation
    return deviation * (np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) + z * 0.5 * (1.0 + ERF(z / math.sqrt(2.0))))


def read_range_test(losses: np.ndarray, rates: np.ndarray) -> float:
    """Where to begin, log10: .3 decades above the middle of the loss's fall, or .8 below where it blows up."""
    values = np.where(np.isfinite(losses), losses, np.inf)
    n = len(values)
    calm = np.array([np.median(values[np.clip(i, 1, n - 2) + np.arange(-1, 2)]) for i in range(n)])
    smooth = np.array([calm[np.clip(i + np.arange(-1, 2), 0, n - 1)].mean() for i in range(n)])
    start = np.mean(calm[1:7])
    noise = math.sqrt(0.5 * np.mean(np.diff(values[:8]) ** 2))
    limit = start + max(4.0 * noise, 0.5 * max(start - smooth.min(), 0.0))
    fine = np.flatnonzero(smooth <= limit)
    end = min(int(fine[-1]) + 1, n - 1) if len(fine) else 0
    fall = start - smooth[: max(end, 1)].min()
    if not fall > 3.0 * noise:
        return float(rates[end]) - 0.8
    done = [int(np.argmax(smooth <= start - share * fall)) for share in (0.5, 0.9)]
    return float(0.5 * (rates[done[0]] + rates[done[1]])) + 0.3


class Run:
    """One run of the algorithm on one task; every step spent counts."""

    def __init__(self, lab: Lab, knobs: Knobs):
        self.lab, self.knobs, self.steps = lab, knobs, lab.task.steps
        self.low, self.high = lab.task.decades[0] - 0.5, lab.task.decades[1] + 0.5
        self.state: States = lab.start
        self.spent = self.data = self.discarded = self.forks = self.rounds = self.went_back = 0
        self.observations: list[Observation] = []
        self.reference, self.tested = math.nan, -math.inf
        self.noise = np.random.default_rng(zlib.crc32(lab.task.name.encode()))

    def factor(self, spent: np.ndarray) -> np.ndarray:
        return np.clip((1.0 - spent / self.steps) / (1.0 - self.knobs.hold), 0.0, 1.0)

    @property
    def at(self) -> int:
        """Index of the next batch."""
        return self.data if self.knobs.rewinds else self.spent

    def metric(self, state: States) -> float:
        value = float(self.lab.evaluate(state)[0, 0])
        noise = self.knobs.metric_noise
        return value * math.exp(noise * self.noise.standard_normal()) if noise else value

    def range_test(self) -> float:
        n = max(round(self.knobs.test_share * self.steps), 16)
        rates = np.linspace(self.low, self.high, n)
        _, losses = self.lab.run(self.state, self.data, 10.0 ** rates[None], warms_up=False)
        self.spent += n
        self.discarded += n
        self.tested = float(np.clip(read_range_test(losses[0], rates), self.low, self.high))
        return self.tested

    def first_rate(self) -> float:
        """Log10 of where training goes on from the first round."""
        x = self.round(self.range_test(), self.knobs.first_share, self.knobs.first_forks) - self.knobs.drift
        return x - (0.0 if self.knobs.validates else self.knobs.unseen)

    def fork(self, x: float, n: int, before: float) -> tuple[States, float]:
        """The state at its end, and its score; ``before`` is the rate that training has got used to."""
        cool = np.clip((n - np.arange(n)) / max(round(self.knobs.cool * n), 1), 0.02, 1.0)
        risen = np.minimum((np.arange(n) + 1) / (round(self.knobs.rise * n) + 1), 1.0)
        rates = np.maximum(risen * 10.0**x, min(before, 10.0**x)) * self.factor(self.spent + np.arange(n)) * cool
        state, losses = self.lab.run(self.state, self.at, rates[None], warms_up=False)
        self.spent += n
        self.forks += 1
        tail = np.sort(losses[0, -max(round(self.knobs.cool * n), 2) :])
        if np.isfinite(tail).all():
            tail[-1] = min(tail[-1], np.mean(tail[:-1]) + self.knobs.reach * np.std(tail[:-1]))
        if math.isnan(self.reference):
            self.reference = float(np.mean(losses[0, :2]))
        score = self.metric(state) if self.knobs.validates else float(np.mean(tail))
        fine = np.isfinite(losses).all() and np.isfinite(score) and score < WORST
        self.observations.append(
            Observation(x, score - self.reference if fine else math.inf, self.rounds, math.log1p((self.data + n) / 10))
        )
        return state, score if fine else math.inf

    def round(self, x: float, share: float, most: int) -> float:
        """Forks from the present state, outward from ``x``; training goes on from the best. Returns its rate."""
        knobs, n = self.knobs, max(round(share * self.steps), self.knobs.least_fork)
        first = len(self.observations)
        # Without a metric, what the first fork's first losses are.
        self.reference = self.metric(self.state) if knobs.validates else math.nan
        ends: list[tuple[States, float]] = []
        self.rounds += 1
        time = math.log1p((self.data + n) / 10)

        def judged(extra: list[float]) -> tuple[np.ndarray, np.ndarray]:
            tried = [o.x for o in self.observations[first:]]
            if knobs.judge == "argmin":
                score = np.array([*(s for _, s in ends), *[np.inf] * len(extra)])
                return score, np.zeros((len(score), len(score)))
            return posterior(knobs, self.observations, np.array([*tried, *extra]), time, x)

        chosen, before = x, 10.0**x if self.rounds > 1 else 0.0
        while True:
            ends.append(self.fork(chosen, n, before))
            tried = [o.x for o in self.observations[first:]]
            outward = [min(tried) - knobs.line_step, max(tried) + knobs.line_step]
            if (self.rounds == 2 and knobs.second_up) or self.rounds == 3:
                outward = outward[::-1]
            if self.rounds == 3:
                outward = outward[:1]
            outward = [o for o in outward if self.low - 0.1 <= o <= self.high + 0.1]
            failed = np.array([not np.isfinite(s) for _, s in ends])
            mean, covariance = judged(outward)
            ranked = np.where(failed, np.inf, mean[: len(tried)])
            best = int(np.argmin(ranked))
            if len(tried) >= most or not outward:
                break
            seeks = knobs.seeks and self.rounds == 1 and not any(score <= self.reference for _, score in ends)
            if failed.all() or (seeks and min(outward) < min(tried)):
                chosen = outward[0]
                continue
            if knobs.judge == "argmin":
                is_open = [best == int(np.argmin(tried)), best == int(np.argmax(tried))]
                if len(tried) == 2:
                    is_open = [False, True]
                if len(outward) < 2 or not any(is_open):
                    break
                chosen = outward[0] if is_open[0] else outward[1]
                continue
            gain = expected_improvement(mean, covariance, best)[len(tried) :]
            if gain.max() < knobs.price and len(tried) > (1 if self.rounds != 2 else knobs.second_least - 1):
                break
            chosen = outward[int(np.argmax(gain))]
        self.discarded += n * (len(ends) - (not failed.all()))
        if failed.all():
            return min(tried) - 0.5
        ended = np.array([score for _, score in ends if np.isfinite(score)])
        if knobs.validates and len(ended) > 1 and ended.min() - self.reference > knobs.spoils * np.ptp(ended):
            self.discarded += n
            return float(tried[best]) - knobs.back
        self.state = ends[best][0]
        self.data += n
        return float(tried[best])

    def confirm(self, x: float) -> float:
        """The metric after a cool-down of the present state."""
        n = min(max(round(self.knobs.confirm_share * self.steps), self.knobs.least_fork), self.steps - self.spent)
        cool = np.clip((n - np.arange(n)) / n, 0.02, 1.0)
        self.state, _ = self.lab.run(
            self.state, self.at, 10.0**x * (self.factor(self.spent + np.arange(n)) * cool)[None]
        )
        self.spent += n
        self.data += n
        return self.metric(self.state)

    def train(self, x: float, n: int) -> float:
        """The mean training loss."""
        n = min(n, self.steps - self.spent)
        rates = 10.0**x * self.factor(self.spent + np.arange(n))
        self.state, losses = self.lab.run(self.state, self.at, rates[None])
        self.spent += n
        self.data += n
        return float(np.mean(finite(losses)))


def tune(lab: Lab, knobs: Knobs, *, rate: float | None = None, waste: float = 0.0) -> Result:
    """The whole run. With ``rate`` (log10) it is known, and ``waste`` of the steps is thrown away instead."""
    run = Run(lab, knobs)
    is_known = rate is not None
    x = run.first_rate() if rate is None else rate
    if is_known:
        run.spent = run.discarded = round(waste * run.steps)
    asks_again = knobs.second_forks > 0 and not is_known
    third = knobs.third_start > 0 and not is_known
    best, hot, kept, worse = math.inf, math.inf, None, 0
    better, is_on_trial, climb, has_fallen = 0, False, 0.0, False
    check = max(round(knobs.check_share * run.steps), 10)
    while run.spent < run.steps:
        is_second = asks_again and run.spent >= knobs.second_start * run.steps
        if is_second or (third and run.spent >= knobs.third_start * run.steps):
            if is_second:
                asks_again, x = False, run.round(x, knobs.second_share, knobs.second_forks)
            else:
                third, x = False, run.round(x, knobs.third_share, 3)
            best, hot, kept, worse = math.inf, math.inf, None, 0
            if knobs.validates:
                best, kept = run.metric(run.state), run.state
                hot = best if not knobs.confirm_share else math.inf
            continue
        loss = run.train(x, check)
        metric = run.metric(run.state) if knobs.validates else loss
        worse = 0 if metric <= hot else worse + 1
        hot = min(hot, metric)
        is_stuck = worse >= knobs.patience and run.steps - run.spent >= knobs.ending * run.steps
        if not knobs.validates:
            if is_stuck and run.went_back < knobs.falls:
                worse, x, hot, run.went_back = 0, x - knobs.back, math.inf, run.went_back + 1
            continue
        if is_on_trial and not metric < best:
            is_on_trial, better, worse, hot = False, 0, 0, math.inf
            run.state, x, run.went_back, has_fallen = kept, x - climb, run.went_back + 1, True
            run.discarded += check
            continue
        is_on_trial, better = False, better + 1 if metric < best else 0
        is_far = run.tested - x > knobs.far
        climb = 0.5 * (run.tested - x) if is_far else knobs.climb
        until = (1.0 - knobs.ending if is_far else knobs.hold) * run.steps
        is_unhurt = run.went_back == 0 or (is_far and not has_fallen)
        may_climb = knobs.climb > 0 and not asks_again and is_unhurt and run.spent < until
        if better >= knobs.patience and may_climb and x + climb <= run.high:
            x, is_on_trial, better = x + climb, True, 0
        if metric < best:
            best, kept = metric, run.state
        if is_stuck and kept is not None:
            worse = 0
            if knobs.confirm_share:
                cooled = run.confirm(x)
                if cooled < best:
                    best, kept, hot = cooled, run.state, math.inf
                    continue
                run.discarded += max(round(knobs.confirm_share * run.steps), knobs.least_fork)
            run.state, x, hot, run.went_back = kept, x - knobs.back, best, run.went_back + 1
    end = lab.evaluate(run.state)[0]
    last = run.metric(run.state) if knobs.validates else math.inf
    losses = lab.evaluate(kept)[0] if kept is not None and best < last else end
    return Result((float(losses[0]), float(losses[1])), x, run.discarded / run.steps, run.went_back, run.forks)
