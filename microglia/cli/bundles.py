"""Bundles: parameters of a verb that are frozen dataclasses become one option per field, and arrive as one value.

A field says what it is by its annotation: `Annotated[int, "What it means."]`, or with a typer.Option for limits and the
like. A new field of TrainingConfig is thereby an option of `microglia train`, and a name in its --config files.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from microglia.errors import ConfigError

NARROW = 12  # characters of choices that stand in the column of types; more of them would leave no room for the help
PAIR = tuple[float, float]  # START,END; one number keeps the end, or is both where the default does not move


@dataclass(frozen=True)
class Fields:
    """Beside a bundle's type: options with another name than their field, fields that are no options, default texts."""

    names: Mapping[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()
    defaults: Mapping[str, str] = field(default_factory=dict)
    panel: str | None = None


class Bundle:
    """A parameter of a verb whose type is a dataclass."""

    def __init__(self, parameter: inspect.Parameter) -> None:
        annotation = parameter.annotation
        self.kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        self.how = next((note for note in notes if isinstance(note, Fields)), Fields())
        self.given = None if parameter.default is parameter.empty else parameter.default

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One keyword parameter with a typer option per field."""
        hints = get_type_hints(self.kind, include_extras=True)
        for name, default in self._defaults():
            kind, option = as_option(hints[name])
            option.show_default = self.how.defaults.get(name, default is None and option.show_default)
            option.show_default = option.show_default or default is not None
            if kind == PAIR:
                kind, default, option.metavar = str, ",".join(map(str, default)), "START,END"
            option.rich_help_panel = self.how.panel or getattr(self.kind, "panel", None)
            name = self.how.names.get(name, name)
            yield keyword(name, switch(name, kind, option, default), default)

    def take(self, options: dict[str, Any]) -> Any:
        """The value of this bundle; takes its options away. Raises ConfigError for a pair that is none."""
        hints, values = get_type_hints(self.kind), dict[str, Any]()
        for name, default in self._defaults():
            value = options.pop(self.how.names.get(name, name))
            values[name] = pair(name, value, default) if hints[name] == PAIR else value
        return self.kind(**values)

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        for item in fields(self.kind):
            if item.name not in self.how.without:
                default = item.default if self.given is None else getattr(self.given, item.name)
                yield item.name, None if default is MISSING else default


def as_option(annotation: Any) -> tuple[Any, Any]:
    """The type and the typer option of `Annotated[type, "Help.", "text that stands for the default"]`, or of a type."""
    kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if notes and isinstance(notes[0], ParameterInfo):
        return kind, copy(notes[0])
    text, default = [*notes, True][:2] if notes else (None, True)
    words = next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal), ())
    if len("|".join(words)) <= NARROW:
        return kind, typer.Option(help=text, show_default=default)
    if not all(word in str(text) for word in words):
        text = f"{text} One of {', '.join(words)}."
    return kind, typer.Option(help=text, show_default=default, metavar="<name>")


def switch(name: str, kind: Any, option: Any, default: Any) -> Any:
    """The annotation of a parameter; what is off by default has no --no-… beside it."""
    if kind is bool and not default and not option.param_decls:
        option.param_decls = (f"--{name.replace('_', '-')}",)
    return Annotated[kind, option]


def pair(name: str, text: str, default: tuple[float, float]) -> tuple[float, float]:
    """`"0.1,0.3"` → (0.1, 0.3)."""
    try:
        numbers = [float(word) for word in text.split(",")]
        start, end = numbers if len(numbers) > 1 else (*numbers, numbers[0] if default[0] == default[1] else default[1])
    except ValueError:
        raise ConfigError(f"{name}={text} was given; give one number, or start and end as 0.1,0.3") from None
    return start, end


def command_line(
    function: Callable[..., Any], common: Mapping[str, tuple[Any, Any]], shown: Sequence[str] | None
) -> tuple[dict[str, Bundle], list[inspect.Parameter]]:
    """The bundles of a verb, and the parameters of its command: its own, those of its bundles, and the common ones."""
    bundles, parameters = dict[str, Bundle](), list[inspect.Parameter]()
    for name, parameter in inspect.signature(function).parameters.items():
        bundle = Bundle(parameter)
        if is_dataclass(bundle.kind):
            bundles[name] = bundle
            parameters += bundle.parameters()
        elif name != "settings":
            kind, option = as_option(parameter.annotation)
            parameters.append(parameter.replace(annotation=switch(name, kind, option, parameter.default)))
    parameters += [keyword(name, kind, default) for name, (kind, default) in common.items()]
    if shown is not None:
        rest = [p for p in parameters if p.name not in {*shown, *common}]
        for parameter in parameters:
            option = get_args(parameter.annotation)[1]
            if parameter.name in shown:
                option.rich_help_panel = None  # so that the few stand together
            old, option.hidden = option.hidden, parameter in rest
            if old:
                rest.remove(parameter)
        place = {name: index for index, name in enumerate(shown)}
        parameters.sort(key=lambda p: place.get(p.name, len(place)))
        parameters.append(keyword("help_all", _help_all({p.name for p in rest}), False))
    return bundles, sorted(parameters, key=lambda p: p.kind)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter that typer makes an option of."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help_all(names: set[str]) -> Any:
    def show(context: typer.Context, wanted: bool) -> None:
        if wanted and not context.resilient_parsing:
            for option in context.command.params:
                option.hidden = getattr(option, "hidden", False) and option.name not in names  # type: ignore[attr-defined]
            typer.echo(context.get_help())
            raise typer.Exit

    text = "Show all options."
    return Annotated[bool, typer.Option("--help-all", callback=show, is_eager=True, help=text)]
