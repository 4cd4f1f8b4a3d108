"""Lists of numbers on the command line: separated by commas, repeated, or both."""

from microglia.errors import ConfigError


def numbers(option: str, given: list[str] | None, kind: type) -> list:
    """`["1,8", "16"]` → `[1, 8, 16]`. Raises ConfigError for what is no number."""
    try:
        return [kind(word) for text in given or () for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{option} {','.join(given or ())} was given; give numbers separated by commas") from None
