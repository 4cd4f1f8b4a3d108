"""How a decision is carried out, behind one protocol for every entry point: library, server, harness, benchmark."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from microglia.errors import ConfigError, MicrogliaError
from microglia.registry import Registry
from microglia.units import Site


@dataclass(frozen=True)
class Decision:
    """keep (B, U) or (1, U) per site; fill (B, U, …) per site is what pruned units leave behind, zero when None."""

    keep: Sequence[Tensor]
    fill: Sequence[Tensor | None] | None = None

    def fill_of(self, site: Site) -> Tensor | None:
        """What stands in for a site's pruned units."""
        return None if self.fill is None else self.fill[site.index]


@dataclass(frozen=True)
class Request:
    """A batch that is about to be read: its mask (B, T), false at padding, and the most new tokens of an answer.

    fill: whether pruned units leave their mean behind. end_tokens, pad_token: what ends an answer, what follows it.
    """

    mask: Tensor
    new_tokens: int
    fill: bool = False
    end_tokens: tuple[int, ...] = ()
    pad_token: int = 0


@dataclass(frozen=True)
class Prepared:
    """What an execution brings to a request.

    cache: to be given to the model as past_key_values, None for its own. greedy: writes the likeliest answers (B, N)
    after the prompt's last logits (B, V), where the execution has a loop of its own.
    """

    cache: Cache | None = None
    greedy: Callable[[Tensor], Tensor] | None = None

    @property
    def cache_option(self) -> dict[str, Any]:
        """The cache as a keyword for the model, or nothing where the model makes its own."""
        return {} if self.cache is None else {"past_key_values": self.cache}


class Execution(ABC):
    """One way to carry out decisions. To add one: a subclass, registered in EXECUTIONS.

    name: in the registry. prunes: False for the one that leaves the model dense. scores: whether several given tokens
    can continue a prompt in one pass. saves: False where pruned units are still computed. shares: whether threads can
    write dense answers with it at once. calls_layers: whether passes that continue a prompt call the model's layers.
    recovers: whether they are made with the weights that the layers' modules hold then, those of a recovery too.
    """

    name: ClassVar[str]
    prunes: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    saves: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    calls_layers: ClassVar[bool] = True
    recovers: ClassVar[bool] = True

    @classmethod
    def for_model(cls, model: nn.Module) -> "Execution":
        """The execution, made for a model; what it keeps between requests belongs to that model."""
        return cls()

    def check_generation(self, config: GenerationConfig) -> None:  # noqa: B027  # most can follow all of them
        """Raise ConfigError for settings of a generation that this execution cannot follow."""

    def check_sites(self, sites: Sequence[Site]) -> None:  # noqa: B027  # most can prune all of them
        """Raise ConfigError for units that this execution cannot prune."""

    @contextmanager
    def prepared(self, request: Request) -> Iterator[Prepared]:
        """While inside, the model reads this request and continues it."""
        yield Prepared()

    @abstractmethod
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None) -> AbstractContextManager[None]:
        """While inside, the sites are pruned as decided. `cache` is the prompt's; what it loses is gone for good."""


def check_kinds(sites: Sequence[Site], kinds: tuple[type[Site], ...], rule: str) -> None:
    """Raise ConfigError, which begins with the rule, for sites of other kinds."""
    if other := {site.unit for site in sites if not isinstance(site, kinds)}:
        raise ConfigError(f"{rule}, but units={', '.join(sorted(other))!r} was given; use execution='compact'")


def check_hard(site: Site, keep: Tensor, who: str) -> None:
    """Raise MicrogliaError, in the name of who cuts units out, for keeps other than 0 and 1."""
    if not bool(((keep == 0) | (keep == 1)).all()):
        raise MicrogliaError(f"{site.name} got soft keeps; {who} needs keeps of 0 or 1, use Gate(mode='hard')")


EXECUTIONS: Registry[type[Execution]] = Registry("execution")


def kind_of(execution: str | Execution) -> type[Execution]:
    """The class of an execution, by its name or of the one given. Raises ConfigError for an unknown name."""
    return type(execution) if isinstance(execution, Execution) else EXECUTIONS[execution]


def execution_for(execution: str | Execution, model: nn.Module) -> Execution:
    """An execution by its name, made for a model, or the one that was given. Raises ConfigError for an unknown name."""
    return execution if isinstance(execution, Execution) else EXECUTIONS[execution].for_model(model)
