"""What a comparison can detect, from its seeds and the standard deviation expected.

Power of the paired t test by the noncentral t distribution, of McNemar's exact test by counting.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import scipy

from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import is_rate_over_seeds

ALPHA, POWER = 0.05, 0.8


def power(effect: float, sd: float, n: int, *, alpha: float = ALPHA) -> float:
    """Probability that a two-sided paired t test of n differences finds a mean of `effect`."""
    if n < 2:
        return 0.0
    limit = scipy.stats.t.ppf(1 - alpha / 2, n - 1)
    shift = abs(effect) * math.sqrt(n) / sd
    far, near = scipy.stats.nct.sf(limit, n - 1, shift), scipy.stats.nct.cdf(-limit, n - 1, shift)
    # scipy gives nan for a tail this far away
    return float(far) + (0.0 if math.isnan(near) else float(near))


def detectable(sd: float, n: int, *, alpha: float = ALPHA) -> float:
    """The smallest effect that is found with probability POWER; infinite for n < 2."""
    if n < 2:
        return math.inf
    high = 1.0
    while power(high, 1.0, n, alpha=alpha) < POWER:
        high *= 2
    unit = scipy.optimize.brentq(lambda d: power(d, 1.0, n, alpha=alpha) - POWER, 0.0, high)
    return float(unit) * sd


def detectable_rate(n: int, *, alpha: float = ALPHA) -> float:
    """The smallest difference of solve rates that McNemar's exact test of n pairs finds with
    probability POWER, where no pair speaks for the other side; infinite where n pairs are too few.
    """
    needed = next((k for k in range(1, n + 1) if 2 * 0.5**k < alpha), None)
    if needed is None:
        return math.inf
    # P(at least `needed` of n pairs differ) = POWER, solved for the rate: the beta's quantile
    return float(scipy.stats.beta.ppf(POWER, needed, n - needed + 1))


@dataclass(frozen=True)
class Detectable:
    """What one comparison of a study can find in one metric, beside what it expects to find."""

    comparison: str
    arm: str
    against: str
    metric: str
    # of the paired differences over seeds; None: none expected, or a rate, which needs none
    sd: float | None
    source: str | None
    smallest: float | None  # None: unknown without an sd
    expected: float | None
    primary: bool

    @property
    def unresolved(self) -> bool:
        """The effect expected, other than 0 (the equivalence test's matter), cannot be found."""
        return bool(self.expected and self.smallest and self.smallest > abs(self.expected))


def detectables(study: Study) -> Iterator[Detectable]:
    """Of every test of the study, at Holm's first step within its family."""
    n, tests = len(study.seeds), study.tests()
    for comparison, metric, arm, primary in tests:
        item = study.comparisons[comparison]
        given, smallest = item.expected.get(metric), None
        alpha = ALPHA / sum(test[3] == primary for test in tests)
        if is_rate_over_seeds(metric):
            smallest = detectable_rate(n, alpha=alpha)
        elif given is not None and given.sd is not None:
            smallest = detectable(given.sd, n, alpha=alpha)
        yield Detectable(
            *(comparison, arm, item.against, metric),
            sd=given.sd if given else None,
            source=given.source if given else None,
            smallest=smallest,
            expected=given.effect_of(arm) if given else None,
            primary=primary,
        )
