"""What a server allows and where it listens: frozen, checked when it is made."""

import ipaddress
from dataclasses import dataclass

from microglia.errors import ConfigError, check_choice

BATCH_BY = ("settings", "decision", "mask")

SIZES = ("max_batch", "max_waiting", "max_new_tokens", "max_prompt_tokens", "max_body_bytes")


@dataclass(frozen=True)
class ServingConfig:
    """Raises ConfigError for what cannot be.

    name: the model's, in requests; api_key: what clients must send as bearer; max_batch: prompts that are answered
    together; max_waiting: prompts in the queue, those being answered not counted, more get 429; max_new_tokens: the
    longest answer; max_prompt_tokens: the longest prompt, None for what the context holds; max_body_bytes: of a
    request; batch_by: `settings` takes the oldest jobs of equal pruning, `decision` counts the heads that all of those
    will keep, when there are more than fit, and takes the ones that keep about as many as the oldest, `mask` takes
    those that keep the very same heads, which then share cut weights; grace: seconds that running answers get at the
    end, None for all they need.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 16
    max_waiting: int = 64
    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 1 << 20
    batch_by: str = "settings"
    grace: float | None = None

    def __post_init__(self) -> None:
        for field in SIZES:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field}={value} was given; it must be at least 1")
        check_choice("batch_by", self.batch_by, BATCH_BY)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} was given; it must be below 65536, 0 takes a free one")
        if not self.name.strip():
            raise ConfigError("the model's name is empty; give it one, or leave it out")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError(
                "the API key must be ASCII, printable, not empty and without spaces around it; give another, or leave "
                "it out"
            )
        if self.grace is not None and not self.grace >= 0:
            raise ConfigError(f"grace={self.grace} was given; it must be a number of seconds, 0 or more")
        if not self.loopback and self.api_key is None:
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines and there is no API key; give one, or listen "
                "on 127.0.0.1"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
