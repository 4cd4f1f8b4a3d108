"""The agent of one site: from a prompt's features to one logit per head. An MLP, or a mixture of a few masks."""

from typing import Any

import torch
from torch import Tensor, nn

KEEP_AT_START = 2.0  # logit of every head before training: sigmoid(2) = 0.88, all kept, and the gradient still flows
MASK_SCALE = 5.0  # Adam moves every parameter by the learning rate; a logit has further to go than a router's weight


class MicrogliaAgent(nn.Module):
    """`Linear(features, hidden_dim) → GELU → Linear(hidden_dim, heads)`; logits above 0 mean keep.

    The last layer starts at small weights and a positive bias: at the start every head of every prompt is kept.
    """

    def __init__(self, *, heads: int, features: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(features, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, heads))
        nn.init.normal_(self.network[-1].weight, std=0.01)  # type: ignore[arg-type]
        self.start_from(torch.full((heads,), KEEP_AT_START))

    @torch.no_grad()
    def start_from(self, logits: Tensor) -> None:
        """Start at these logits (H,) for every prompt."""
        bias: Any = self.network[-1].bias
        bias.copy_(logits)

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, F) → logits (B, H)."""
        return self.network(features)


class MaskMixture(nn.Module):
    """`softmax(Linear(features, masks)) · (masks, heads)`: a prompt's logits lie between those of a few learned masks.

    Experts and their gate as in Jacobs et al. 1991 (Adaptive Mixtures of Local Experts), each expert one constant mask.
    """

    def __init__(self, *, heads: int, features: int, masks: int) -> None:
        super().__init__()
        self.router = nn.Linear(features, masks)
        nn.init.normal_(self.router.weight, std=2 * features**-0.5)  # prompts differ from the start, so masks can too
        self.masks = nn.Parameter(torch.empty(masks, heads))
        self.start_from(torch.full((heads,), KEEP_AT_START))

    @torch.no_grad()
    def start_from(self, logits: Tensor) -> None:
        """Start at these logits (H,) for every prompt."""
        self.masks.copy_((logits / MASK_SCALE).expand_as(self.masks))

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, F) → logits (B, H)."""
        return self.router(features).softmax(-1) @ self.masks * MASK_SCALE
