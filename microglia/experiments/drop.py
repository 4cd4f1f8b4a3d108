"""The most accuracy that a pruned model could have lost, exactly, from its answers beside the dense model's.

On n prompts drawn independently, `lost` were right dense and wrong pruned, `won` the other way round: a trinomial with
probabilities p and m, whose difference p - m is the drop. General bounds for a mean of bounded values hold here too but
are blunt, because they cannot know that most pairs agree. To promise at 95 % that at most 2 points are lost when no
answer changed at all takes 10,998 prompts with Hoeffding-Bentkus, and 149 with a betting bound (Waudby-Smith and Ramdas
2024) that stakes everything on it and is ruined by the first lost answer. Here it takes 150, and losses are weighed.

The limit is Buehler's (1957): outcomes are ordered by an approximate upper limit of the drop (Kabaila and Lloyd 1997),
and the limit is the largest drop under which an outcome that looks as good as this one has a probability above
1 - confidence, whatever the share of pairs that disagree. How large this nuisance can be is bounded first, which costs
a fiftieth of the error (Berger and Boos 1994). Nothing is asymptotic; what is rounded is rounded to the safe side.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from microglia.errors import ConfigError, DataError

Floats = NDArray[np.float64]
NUISANCE = 1 / 50  # share of the allowed error that is spent on bounding the share of pairs that disagree
PARTS = 192  # parts of the nuisance's range; each contributes an upper bound of its own, so fewer are looser, not wrong
CLOSE = 1e-5  # how near the limit is searched for; it is always given from above


@lru_cache(maxsize=4096)
def drop_p_value(lost: int, won: int, prompts: int, drop: float, confidence: float = 0.95) -> float:
    """p-value of "the drop is `drop` or more": at most `error` with a probability of at most `error`, 1 - confidence.

    It falls as `drop` grows. Powerful at that error; at others it is valid but says little about the strength of the
    evidence. Raises DataError for impossible counts, ConfigError for a confidence or drop out of range.
    """
    _check(lost, won, prompts, confidence)
    if not -1 < drop < 1:
        raise ConfigError(f"a drop of {drop} was given; it must lie between -1 and 1, and 0.02 is two points")
    error = 1 - confidence
    most = (
        float(stats.beta.ppf(1 - NUISANCE * error, lost + won + 1, prompts - lost - won)) if lost + won < prompts else 1
    )
    first, last = max(0.0, -drop), (most - drop) / 2  # of m, where p = m + drop and p + m ≤ most
    if last < first:
        return NUISANCE * error
    edges = np.linspace(first, last, PARTS + 1)
    # More losses make a good outcome rarer, more wins likelier: the corner bounds the part.
    bounds = _as_good(lost, won, prompts, edges[:-1] + drop, edges[1:], (1 - NUISANCE) * error)
    return min(1.0, float(bounds.max()) + NUISANCE * error)


@lru_cache(maxsize=4096)
def drop_limit(lost: int, won: int, prompts: int, confidence: float = 0.95) -> float:
    """The upper limit of the drop: below the true drop with a probability of at most 1 - confidence, for any truth.

    Raises as `drop_p_value` does.
    """
    _check(lost, won, prompts, confidence)
    low, high = max((lost - won) / prompts, -1 + CLOSE), 1.0
    while high - low > CLOSE:
        middle = (low + high) / 2
        if drop_p_value(lost, won, prompts, middle, confidence) <= 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def prompts_needed(max_drop: float, confidence: float = 0.95) -> int:
    """The fewest prompts that could promise `max_drop`: those that suffice when no answer changes.

    Raises ConfigError unless 0 < max_drop < 1 and 0 < confidence < 1.
    """
    if not 0 < max_drop < 1:
        raise ConfigError(f"max_drop={max_drop} was given; it must lie between 0 and 1, and 0.02 is two points")
    _check(0, 0, 1, confidence)
    error = 1 - confidence
    needed = math.ceil(math.log(error) / math.log1p(-max_drop))
    while drop_p_value(0, 0, needed, max_drop, confidence) > error:
        needed += 1
    return needed


def _as_good(lost: int, won: int, prompts: int, p: Floats, m: Floats, error: float) -> Floats:
    """Probability of an outcome that ranks as low as (lost, won) or lower, for each pair of probabilities, `(C,)`.

    Rank of an outcome: lost - won + z √(lost + won + z²/4), the upper limit of a Wald interval but for a small count
    that lets it grow with every loss and fall with every win. So up to `allowed` losses go with each number of wins.
    """
    z = float(stats.norm.ppf(1 - error)) if error < 0.5 else 0.0
    rank = lost - won + z * math.sqrt(lost + won + z * z / 4)
    wins = np.arange(prompts + 1)
    inner = z * z + 4 * (rank + 2 * wins + z * z / 4)
    root = (np.sqrt(np.maximum(inner, 0)) - z) / 2
    allowed = np.floor(root**2 - wins - z * z / 4 + 1e-9)
    allowed[(inner < 0) | (root < z / 2 - 1e-9)] = -1
    allowed = np.minimum(allowed, prompts - wins)
    first, last = int(stats.binom.ppf(1e-13, prompts, m[0])), int(stats.binom.isf(1e-13, prompts, m[-1]))
    inside = slice(first, min(last, prompts) + 1)
    wins, allowed = wins[inside], allowed[inside]
    mass = stats.binom.pmf(wins, prompts, m[:, None])  # (C, W)
    share = np.minimum(p / (1 - m), 1)[:, None]  # of losses among the prompts that are no win
    losses = np.where(allowed >= 0, special.bdtr(np.maximum(allowed, 0), prompts - wins, share), 0.0)
    rest = np.clip(1 - mass.sum(1), 0, None)  # wins so many or few that they were not counted
    result: Floats = (mass * losses).sum(1) + rest
    return result


def _check(lost: int, won: int, prompts: int, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence} but must lie between 0 and 1; 0.95 is usual")
    if prompts < 1 or min(lost, won) < 0 or lost + won > prompts:
        raise DataError(
            f"{lost} lost and {won} won answers of {prompts} cannot be; give counts that add up to at most all prompts"
        )
