"""How large the mean of a bounded loss can be, from its values on prompts drawn independently: by betting.

For losses x in [0, 1], of agreement or clipped KL, counts of lost and won answers are too coarse. Who believes that the
mean is below `mean` stakes s on every prompt, which multiplies the capital by 1 + s (mean − x), never negative for s ≤
1. If the mean is `mean` or more, no stake multiplies capital in expectation, whatever was seen before, so a capital
that ever reaches 1 / error has a probability of at most `error` (Ville 1939; Waudby-Smith and Ramdas 2024). The stake
follows from the prompts before, as Bates et al. (2021) choose it: the less losses vary, the bolder. Nothing is
asymptotic and nothing is assumed of the losses but independence and their bounds; the order must not depend on them.

Of losses with mean .03 and deviation .03, 200 prompts promise .05 at 95 % in 96 % of the cases,
Hoeffding–Bentkus in none.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from microglia.errors import ConfigError, DataError
from microglia.evaluation.significance import finite_array

Floats = NDArray[np.float64]
CLOSE = 1e-6  # how near the limit is searched for; it is always given from above


def mean_p_value(losses: ArrayLike, mean: float, confidence: float = 0.95) -> float:
    """p-value of "the mean loss is `mean` or more", losses (n,) in [0, 1]; it falls as `mean` grows.

    Valid at every error, powerful at 1 − confidence. Raises DataError for losses outside [0, 1] or none, ConfigError
    for a mean or confidence outside (0, 1).
    """
    x, error = _checked(losses), _error(confidence)
    if not 0 < mean < 1:
        raise ConfigError(f"a mean loss of {mean} was given; it must lie between 0 and 1")
    return _p_value(x, mean, error)


def mean_limit(losses: ArrayLike, confidence: float = 0.95) -> float:
    """The upper limit of the mean loss: below the true mean with a probability of at most 1 − confidence.

    1 where nothing better can be said. Raises as `mean_p_value` does, ConfigError for a confidence out of range.
    """
    x, error = _checked(losses), _error(confidence)
    low, high = max(float(x.mean()), CLOSE), 1.0
    while high - low > CLOSE:
        middle = (low + high) / 2
        if _p_value(x, middle, error) <= error:
            high = middle
        else:
            low = middle
    return high


def losses_needed(mean: float, confidence: float = 0.95) -> int:
    """The fewest prompts that could promise `mean`: those that suffice when every loss is 0.

    Raises ConfigError unless 0 < mean < 1 and 0 < confidence < 1.
    """
    error = _error(confidence)
    if not 0 < mean < 1:
        raise ConfigError(f"max_drop={mean} was given; it must lie between 0 and 1, and 0.05 is 5 tokens of 100")
    needed = math.ceil(math.log(error) / math.log1p(-mean))  # what no valid method can do without
    while _p_value(np.zeros(needed), mean, error) > error:
        needed += 1
    return needed


def _p_value(x: Floats, mean: float, error: float) -> float:
    capital = np.log1p(_stakes(x, error) * (mean - x)).cumsum()
    return min(1.0, math.exp(-float(capital.max())))


def _stakes(x: Floats, error: float) -> Floats:
    """(n,), each from the losses before: √(2 log(1 / error) / (n variance)), 1 at most.

    Mean and variance begin as if one loss of 1/2 with a variance of 1/4 had been seen.
    """
    seen = np.arange(2, x.size + 2)
    means = (0.5 + x.cumsum()) / seen
    variances = (0.25 + ((x - means) ** 2).cumsum()) / seen
    before = np.concatenate([[0.25], variances[:-1]])
    result: Floats = np.minimum(1.0, np.sqrt(2 * math.log(1 / error) / (x.size * before)))
    return result


def _checked(losses: ArrayLike) -> Floats:
    x = finite_array(losses, 1, "the losses", "at least one number between 0 and 1")
    if x.min() < 0 or x.max() > 1:
        raise DataError(f"losses from {x.min():.3g} to {x.max():.3g} were given; they must lie between 0 and 1")
    return x


def _error(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence} but must lie between 0 and 1; 0.95 is usual")
    return 1 - confidence
