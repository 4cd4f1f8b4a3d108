"""A codebook: a router picks one of a few learned masks for each prompt, and every site follows the one choice."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microglia.gate import straight_through
from microglia.policies.agents import MASK_SCALE, Agent, LearnedPolicy, Masks
from microglia.policies.base import POLICIES
from microglia.signals import feature_size
from microglia.units import Geometry

ROUTER_SCALE = 2.0  # standard deviation of the router's scores at the start: prompts differ, none is beyond doubt
ROUNDS = 20  # of k-means; it is at rest long before


@POLICIES.register("codebook")
class CodebookPolicy(LearnedPolicy):
    """One of `hidden_dim` masks per prompt: `masks[argmax Linear(all features → masks)]`, one product for all sites.

    The choice is hard; its gradient is that of the softmax (straight-through, Bengio et al. 2013). Masks begin alike,
    each with a cluster of the training prompts (k-means of their features), so that each has prompts to learn from.
    Nothing holds them there: a mask may lose its prompts while others learn, and is then of no use.
    """

    name: ClassVar[str] = "codebook"
    describes: ClassVar[str] = "an input-adaptive choice of one of a few learned masks"
    default_hidden_dim: ClassVar[int] = 8

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        hidden_dim: int | None = None,
        signals: Sequence[str] = ("norm", "entropy"),
    ) -> None:
        super().__init__(geometries, hidden_dim=hidden_dim, signals=signals)
        features = sum(feature_size(geometry, signals) for geometry in geometries)
        self.router = nn.Linear(features, self.hidden_dim)
        nn.init.normal_(self.router.weight, std=ROUTER_SCALE * features**-0.5)

    def _agent(self, units: int, site_features: int, all_features: int) -> Agent:
        return Masks(units=units, masks=self.hidden_dim)

    def fit_statistics(self, features: Sequence[Tensor]) -> None:
        super().fit_statistics(features)
        if all(bool((site == site[:1]).all()) for site in self.masks):  # else the router has learned which is whose
            self._start_from_clusters(self.joined(features))

    @torch.no_grad()
    def _start_from_clusters(self, every: Tensor) -> None:
        """Let each mask begin with the prompts (N, F) around one centre: x·c - |c|²/2 is largest at the nearest."""
        centres = clusters(every, self.hidden_dim)
        offsets = -centres.square().sum(-1) / 2
        scale = ROUTER_SCALE / (every @ centres.T + offsets).std(correction=0).clamp(min=1e-6)
        self.router.weight.copy_(centres * scale)
        self.router.bias.copy_(offsets * scale)

    @property
    def masks(self) -> list[Tensor]:
        """The logits of every mask, (K, U) per site."""
        return [MASK_SCALE * site.masks for site in self.agents if isinstance(site, Masks)]

    def choices(self, features: Sequence[Tensor]) -> Tensor:
        """Which mask each of B prompts gets, (B,), from the features of every site, (B, F) each."""
        choices: Tensor = self.router(self.joined(features)).argmax(-1)
        return choices

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        scores = self.router(self.joined(features))
        hard = F.one_hot(scores.argmax(-1), self.hidden_dim).to(scores.dtype)
        choice = straight_through(scores.softmax(-1), hard)
        return [site(choice) for site in self.agents]


def clusters(points: Tensor, count: int) -> Tensor:
    """Centres (count, F) of points (N, F), by k-means from points that lie far apart; no chance is involved.

    With fewer points than centres some centres are alike.
    """
    chosen = [points[int((points - points.mean(0)).square().sum(-1).argmax())]]
    while len(chosen) < count:
        distance = torch.cdist(points, torch.stack(chosen)).amin(-1)
        chosen.append(points[int(distance.argmax())])
    centres = torch.stack(chosen)
    for _ in range(ROUNDS):
        member = F.one_hot(torch.cdist(points, centres).argmin(-1), count).to(points.dtype)  # (N, K)
        sizes = member.sum(0)[:, None]
        centres = torch.where(sizes > 0, member.T @ points / sizes.clamp(min=1), centres)
    return centres
