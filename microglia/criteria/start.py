"""Where a training begins: every unit kept, those first in danger that a criterion ranks last."""

from microglia.criteria.base import CRITERIA
from microglia.criteria.calibration import Calibration
from microglia.errors import ConfigError
from microglia.policies import LearnedPolicy, Policy, StaticPolicy
from microglia.policies.agents import KEEP_AT_START


def start_from(criterion: str, policy: Policy, calibration: Calibration) -> None:
    """Move the logits at which a policy starts by the ranks of a criterion's scores, in place: from 1 to 3, not all 2.

    Raises ConfigError for a criterion that does not exist or a policy that learns nothing.
    """
    scored = CRITERIA[criterion]().policy(calibration)
    if not isinstance(scored, StaticPolicy):
        raise ConfigError(f"start={criterion!r} gives no scores to start from; choose norm, taylor or fluctuation")
    logits = [(KEEP_AT_START + ranks.detach()).cpu() for ranks in scored.logits]
    if isinstance(policy, StaticPolicy):
        policy.load_state_dict({f"logits.{index}": x for index, x in enumerate(logits)})
    elif isinstance(policy, LearnedPolicy):
        policy.start_from(logits)
    else:
        raise ConfigError(f"start={criterion!r} was given, but the policy {policy.name!r} learns nothing; leave it out")
