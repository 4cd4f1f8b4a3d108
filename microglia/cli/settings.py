"""Files of settings: what --config reads, and what `microglia train` writes beside a run."""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli.writing import write

NOT_SET = {"config", "help-all", "help"}  # options that no file can set

# Spellings of the original project's scripts and of microglia 0.1.0: of options, of verbs and of choices.
RENAMED = {
    "base-model": "model",
    "checkpoint": "model-path",
    "path": "execution",
    "graph": "captured",
    "features": "signals",
    "gate": "estimator",
    "answer-room": "answer-limit",
    "own": "as-trained",
    "no-own": "no-as-trained",
}


def hyphenated(name: str) -> str:
    """`num_epochs` → `num-epochs`."""
    return name.replace("_", "-")


def present_name(name: str) -> str:
    """`base_model` → `model`: a name as it is spelled today."""
    return RENAMED.get(hyphenated(name), hyphenated(name))


def load_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this call. Names that the verb does not have are refused."""
    if path is not None and not context.resilient_parsing:
        options = {name.strip("-"): option for option in context.command.params for name in option.opts}
        options = {hyphenated(name): option for name, option in options.items() if name not in NOT_SET}
        context.default_map = {}
        for name, value in read_settings(path).items():
            option = options.get(hyphenated(str(name))) or options.get(present_name(str(name)))
            if option is None:
                close = difflib.get_close_matches(hyphenated(str(name)), options)
                advice = f"did you mean {close[0]}" if close else f"see microglia {context.info_name} --help"
                raise typer.BadParameter(f"{path} sets {name}, which is no option of {context.info_name}; {advice}")
            several = getattr(option, "multiple", False) or option.nargs != 1
            context.default_map[str(option.name)] = as_given(value, several)
    return path


def as_given(value: Any, several: bool) -> Any:
    """A value of a file as the command line would give it: lists are separated by commas or repeated."""
    if isinstance(value, list):
        words = [str(item) for item in value]
        return words if several else ",".join(words)
    return value if value is None or isinstance(value, bool) else [str(value)] if several else str(value)


def read_settings(path: Path) -> dict[str, Any]:
    """The names and values of a YAML or TOML file. Raises BadParameter when it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        else:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise typer.BadParameter(f"{path} cannot be read ({reason}); give a YAML or TOML file of options") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} holds no options; write one `name: value` in each line")
    return values


def write_settings(path: Path, verb: str, settings: dict[str, Any]) -> None:
    """Write all settings that have a value, so that `microglia VERB --config path` takes them again."""
    import yaml

    plain = {hyphenated(name): value for name, value in settings.items() if value is not None}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
    header = f"# Repeat it: microglia {verb} --config {path} --output-dir OTHER. Go on with it: --resume instead.\n"
    write(path, (header + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)).encode())


FILE = typer.Option("--config", callback=load_settings, is_eager=True, help="File of options, YAML or TOML.")
Config = Annotated[Path | None, FILE]
