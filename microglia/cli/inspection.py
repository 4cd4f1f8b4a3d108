"""`microglia inspect`: where a model's heads are, what a checkpoint holds, or which heads a prompt keeps and why."""

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from microglia.cli import decided
from microglia.cli import options as o
from microglia.cli.show import facts, table
from microglia.cli.verb import Outcome, verb
from microglia.errors import ConfigError, MicrogliaError, first_line

HEADINGS = {"head": ("heads", "KV heads", "head size"), "sublayer": ("protected sublayers",)}  # else a geometry's own
SHOWN = (
    "base_model model_class policy policy_options signals window fill units arrangement lora training".split()
)  # of a checkpoint


@verb()
def inspect(
    what: Annotated[str, typer.Argument(help="A model, as --model takes it, or a checkpoint.")] = "reasoner",
    *,
    prompt: Annotated[str | None, "Which heads of a checkpoint this prompt keeps, and why."] = None,
    png: Annotated[Path | None, "Picture of that to write: .png, .svg or .pdf."] = None,
    site: Annotated[int | None, typer.Option(min=0, help="One site of it, head by head.")] = None,
    keep_ratio: o.KeepRatio = None,
    bytes: o.Bytes = None,
    raw: o.Raw = False,
    loading: o.Loading,
) -> Outcome:
    """Show a model's attention layers (no weights are loaded), a checkpoint, or which heads a prompt keeps and why.

    microglia inspect Qwen/Qwen2.5-3B-Instruct

    microglia inspect checkpoints --prompt "What is 15% of 240?" --png heads.png
    """
    from microglia.checkpoint import CONFIG

    if prompt is not None:
        return of_prompt(
            loading.system(what), prompt, png, site, {"keep_ratio": keep_ratio, "byte_share": bytes, "raw": raw}
        )
    if png is not None or site is not None:
        raise ConfigError("--png and --site show what a prompt keeps; say --prompt TEXT too")
    return of_checkpoint(what) if (Path(what) / CONFIG).is_file() else of_model(what, loading.trust_remote_code)


def of_prompt(system: Any, prompt: str, png: Path | None, site: int | None, how: dict[str, Any]) -> Outcome:
    """Every unit of every site for one prompt: signals, logit and what became of it. how: of `system.explain`."""
    from microglia.cli.picture import check_picture, draw_decision

    if png is not None:
        check_picture(png)
    decision = system.explain(prompt, **how).as_json()
    last = len(decision["sites"]) - 1
    if site is not None and site > last:
        raise ConfigError(f"--site {site} was given; the model has the sites 0 to {last}")
    data = {"kind": "prompt", "version": 1, "prompt": prompt, **decision}
    view = decided.overview(decision) if site is None else decided.of_site(decision, site)
    if png is not None:
        data["png"] = str(draw_decision(decision, png, title=prompt))
        view.append(f"The picture is {png}.")
    return Outcome(data, view)


def of_model(source: str, trust_remote_code: bool) -> Outcome:
    """Class, parameters and the head geometry of every site."""
    from microglia.checkpoint.config import saved_sites
    from microglia.units import find_sites

    lm = _without_weights(source, trust_remote_code)
    sites = saved_sites(find_sites(lm))
    rows: dict[str, Any] = {"model": source, "model_class": type(lm).__name__}
    rows["parameters"] = sum(p.numel() for p in lm.parameters())
    rows["heads"] = sum(site.geometry["heads"] for site in sites)
    data = {"kind": "model", "version": 1, **rows, "sites": [site.flat for site in sites]}
    return Outcome(data, [facts({**rows, "parameters": f"{rows['parameters']:,}"}), *site_tables(sites)])


def of_checkpoint(folder: str) -> Outcome:
    """What was trained on which model, and how large the agents are."""
    from microglia.checkpoint import Checkpoint

    saved = Checkpoint.from_pretrained(folder)
    config = saved.config
    parameters = sum(p.numel() for p in saved.pruner.policy.parameters())
    share = parameters / config.base_parameters if config.base_parameters else None
    data: dict[str, Any] = {"kind": "checkpoint", "version": 1, "agent_parameters": parameters, "agent_share": share}
    data |= {name: getattr(config, name) for name in SHOWN}
    data["gate"] = {name: getattr(config, name) for name in ("threshold", "temperature", "bucket")}
    data["sites"] = [site.flat for site in config.sites]
    rows = {
        "checkpoint of": f"{config.base_model} ({config.model_class})",
        "policy": f"{config.policy}: {parameters:,} parameters" + (f", {share:.3%} of the model" if share else ""),
        "reads": f"{', '.join(config.signals) or 'nothing'} of a prompt, entropy window {config.window or 'all'}",
        "gate": f"threshold {config.threshold:.4g}, bucket {config.bucket or 'heads / 8'}, fill {config.fill}",
        "LoRA": "yes" if config.lora else "no",
        "trained on": config.training.get("dataset", "nothing yet"),
    }
    return Outcome(data, [facts(rows), *site_tables(config.sites)])


def site_tables(sites: Any) -> list[Any]:
    """One table per kind of unit, in it one row per run of sites that differ in their place only."""
    tables = []
    for unit, kind in groupby(enumerate(sites), key=lambda pair: pair[1].unit):
        rows, numbered = [], list(kind)
        for shape, run in groupby(numbered, key=lambda pair: tuple(pair[1].geometry.values())):
            (first, site), *_, (last, _) = [*run] * 2
            rows.append((f"{first} to {last}" if last > first else str(first), site.name, *map(str, shape)))
        columns = HEADINGS.get(unit, tuple(numbered[0][1].geometry))
        tables.append(table(None, ("sites", "first", *columns), rows, padding=(0, 1)))
    return tables


def _without_weights(source: str, trust_remote_code: bool) -> Any:
    """The model's modules on the meta device: looking at a large model downloads and allocates next to nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from microglia.models import located

    folder = located(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config.json raises whatever its values come across
        raise MicrogliaError(
            f"{source!r} is neither a checkpoint folder nor a causal language model ({first_line(error)}); give "
            "one of them"
        ) from error
