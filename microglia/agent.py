"""The agent of one site: a small MLP from a prompt's features to one logit per head."""

from torch import Tensor, nn

KEEP_AT_START = 2.0  # logit of every head before training: sigmoid(2) = 0.88, all kept, and the gradient still flows


class MicrogliaAgent(nn.Module):
    """`Linear(features, hidden_dim) → GELU → Linear(hidden_dim, heads)`; logits above 0 mean keep.

    The last layer starts at small weights and a positive bias: at the start every head of every prompt is kept.
    """

    def __init__(self, *, heads: int, features: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(features, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, heads))
        nn.init.normal_(self.network[-1].weight, std=0.01)  # type: ignore[arg-type]
        nn.init.constant_(self.network[-1].bias, KEEP_AT_START)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, F) → logits (B, H)."""
        return self.network(features)
