"""One prompt's decision, laid open: for every head its signals, what the policy said of them, and what became of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.attach import attached
from microglia.gate import Gate
from microglia.generation import encode_prompts, positions
from microglia.look import Look
from microglia.policy import AgentPolicy, Policy
from microglia.signals import split_features
from microglia.sites import causal_lm, find_sites

# (asked for, kept) → what became of the head. Counts are rounded up to rectangles, and the best heads fill them.
OUTCOMES = {
    (True, True): "kept",
    (False, True): "kept to fill",
    (False, False): "pruned",
    (True, False): "crowded out",
}


@dataclass(frozen=True)
class SiteDecision:
    """One site; every list has a number per head. logit: above `threshold` the head is asked for.

    signals: by name, as measured. unusual: by name, in standard deviations from the prompts of the training; empty for
    policies that keep no statistics. probability: sigmoid of the distance to the threshold over the temperature.
    """

    name: str
    signals: dict[str, list[float]]
    unusual: dict[str, list[float]]
    logit: list[float]
    probability: list[float]
    outcome: list[str]

    @property
    def kept(self) -> list[bool]:
        return [outcome.startswith("kept") for outcome in self.outcome]


@dataclass(frozen=True)
class Decision:
    """What a policy decides for a prompt of so many tokens."""

    sites: tuple[SiteDecision, ...]
    tokens: int
    threshold: float

    @property
    def keep_ratio(self) -> float:
        kept = [head for site in self.sites for head in site.kept]
        return sum(kept) / len(kept)

    @property
    def asked(self) -> int:
        """How many heads the policy asked for, before counts were rounded to rectangles."""
        return sum(outcome in ("kept", "crowded out") for site in self.sites for outcome in site.outcome)

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sites = [vars(site) | {"keep": [int(kept) for kept in site.kept]} for site in self.sites]
        return {
            "tokens": self.tokens,
            "threshold": self.threshold,
            "asked": self.asked,
            "keep_ratio": self.keep_ratio,
            "sparsity": 1 - self.keep_ratio,
            "sites": sites,
        }


@torch.inference_mode()
def decide(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    policy: Policy,
    *,
    gate: Gate | None = None,
    look: Look | None = None,
    scope: str = "answer",
) -> Decision:
    """Read a complete prompt and decide, generating nothing."""
    lm: Any = causal_lm(model)
    gate = gate or Gate()
    batch = encode_prompts(lm, tokenizer, [prompt], 0)
    with attached(lm, policy, gate=gate, look=look, scope=scope) as trace:
        lm(**batch, position_ids=positions(batch["attention_mask"]), use_cache=True, logits_to_keep=1)
    sites = []
    for site, features, logits, keep in zip(find_sites(lm), trace.features, trace.logits, trace.keep, strict=True):
        asked = (logits[0] > gate.threshold).tolist()
        signals = split_features(features, policy.features)
        sites.append(
            SiteDecision(
                name=site.name,
                signals={name: _numbers(values[0]) for name, values in signals.items()},
                unusual=_unusual(policy, site.index, features),
                logit=_numbers(logits[0]),
                probability=_numbers(torch.sigmoid((logits[0] - gate.threshold) / gate.temperature)),
                outcome=[OUTCOMES[a, bool(k)] for a, k in zip(asked, keep[0].tolist(), strict=True)],
            )
        )
    return Decision(tuple(sites), int(batch["attention_mask"].sum()), gate.threshold)


def _unusual(policy: Policy, index: int, features: Tensor) -> dict[str, list[float]]:
    """How far each signal is from its mean over training prompts, in standard deviations."""
    if not isinstance(policy, AgentPolicy):
        return {}
    mean, std = policy.get_buffer(f"mean_{index}"), policy.get_buffer(f"std_{index}")
    distance = split_features((features.to(mean) - mean) / std, policy.features)
    return {name: _numbers(values[0]) for name, values in distance.items()}


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]
