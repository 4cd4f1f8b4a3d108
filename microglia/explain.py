"""One prompt's decision, laid open: for every unit its signals, what the policy said of it, and what became of it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm
from microglia.pruner import Pruner
from microglia.reading import encode_prompts, read
from microglia.signals import signals_at, split_features

# (requested, kept) → what became of the unit. Counts are rounded up to regular shapes, and the best units fill them.
OUTCOMES = {
    (True, True): "kept",
    (False, True): "kept to fill",
    (False, False): "pruned",
    (True, False): "displaced",
}


@dataclass(frozen=True)
class SiteExplanation:
    """One site of units of one kind; every list has a number per unit. logit: above `threshold` the unit is requested.

    signals: by name, as measured. deviations: by name, in standard deviations from the prompts of the training; empty
    for policies that keep no statistics. probability: sigmoid of the distance to the threshold over the temperature.
    """

    name: str
    unit: str
    signals: dict[str, list[float]]
    deviations: dict[str, list[float]]
    logit: list[float]
    probability: list[float]
    outcome: list[str]

    @property
    def kept(self) -> list[bool]:
        return [outcome.startswith("kept") for outcome in self.outcome]


@dataclass(frozen=True)
class Explanation:
    """What a pruner decides for a prompt of so many tokens, and why."""

    sites: tuple[SiteExplanation, ...]
    tokens: int
    threshold: float

    @property
    def keep_ratio(self) -> float:
        kept = [unit for site in self.sites for unit in site.kept]
        return sum(kept) / len(kept)

    @property
    def requested(self) -> int:
        """How many units the policy requested, before counts were rounded to regular shapes."""
        return sum(outcome in ("kept", "displaced") for site in self.sites for outcome in site.outcome)

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "tokens": self.tokens,
            "threshold": self.threshold,
            "requested": self.requested,
            "keep_ratio": self.keep_ratio,
            "sparsity": 1 - self.keep_ratio,
            "sites": [asdict(site) | {"keep": [int(kept) for kept in site.kept]} for site in self.sites],
        }


@torch.inference_mode()
def explain(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, pruner: Pruner) -> Explanation:
    """Read a complete prompt and lay the decision open; nothing is generated."""
    lm, policy, gate = causal_lm(model), pruner.policy, pruner.gate
    batch = encode_prompts(lm, tokenizer, [prompt], 0)
    reading = read(lm, batch["input_ids"], batch["attention_mask"], pruner)
    sites = []
    per_site = zip(pruner.sites(lm), reading.features, reading.logits, reading.keep, strict=True)
    for site, features, logits, keep in per_site:
        signals = signals_at(site.unit, policy.signals)
        requested = (logits[0] > gate.threshold).tolist()
        deviations = policy.standardised(site.index, features)
        sites.append(
            SiteExplanation(
                name=site.name,
                unit=site.unit,
                signals=_by_signal(features, signals),
                deviations={} if deviations is None else _by_signal(deviations, signals),
                logit=_rounded(logits[0]),
                probability=_rounded(torch.sigmoid((logits[0] - gate.threshold) / gate.temperature)),
                outcome=[OUTCOMES[wanted, bool(k)] for wanted, k in zip(requested, keep[0].tolist(), strict=True)],
            )
        )
    return Explanation(tuple(sites), int(batch["attention_mask"].sum()), gate.threshold)


def _by_signal(features: Tensor, signals: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: _rounded(values[0]) for name, values in split_features(features, signals).items()}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]
