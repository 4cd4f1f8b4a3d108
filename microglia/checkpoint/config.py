"""What a checkpoint says about itself: the model that it fits, the pruner, how it was trained."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from torch import Tensor, nn

from microglia.anatomy import causal_lm
from microglia.checkpoint.files import CONFIG, checksum
from microglia.checkpoint.format_1 import upgraded
from microglia.errors import CheckpointError, ConfigError, check_choice, check_range, first_line
from microglia.gate import Gate
from microglia.models import source_of
from microglia.policies import POLICIES, Policy
from microglia.pruner import Fill, Pruner, check_window
from microglia.recovery import Recovery
from microglia.signals import check_signals
from microglia.tasks.prompts import check_template
from microglia.units import MOST_UNITS, UNITS, Arrangement, Geometry, Site, find_sites

FORMAT_VERSION = 2  # raised when an older microglia could not read what a newer one writes
MOST_SITES = 4096


@dataclass(frozen=True)
class SavedSite:
    """Where a site stood, of which units, and their geometry."""

    unit: str
    name: str
    layer: int
    geometry: dict

    @property
    def flat(self) -> dict[str, Any]:
        """Everything side by side, the geometry's numbers too."""
        return {"unit": self.unit, "name": self.name, "layer": self.layer, **self.geometry}

    def geometry_value(self) -> Geometry:
        """The geometry as its unit knows it. Raises ConfigError for one that cannot be."""
        kind = UNITS[self.unit].geometry_type
        allowed = {name: type(value) is int and value <= MOST_UNITS for name, value in self.geometry.items()}
        if wrong := [f"{name}={self.geometry[name]!r}" for name, is_allowed in allowed.items() if not is_allowed]:
            raise ConfigError(
                f"the geometry of {self.name} has {', '.join(wrong)}; it must be whole numbers of at most {MOST_UNITS}"
            )
        try:
            geometry: Geometry = kind(**self.geometry)
        except TypeError as error:
            raise ConfigError(f"the geometry {self.geometry} is not one of units={self.unit!r} ({error})") from error
        return geometry


@dataclass(frozen=True)
class MicrogliaConfig:
    """Frozen; saved as JSON beside the weights.

    base_model: what `load_model` takes; base_parameters: its parameters, without LoRA. policy, policy_options and
    signals: what the policy is made from; units, window, temperature, threshold, bucket, least_kept and fill: the rest
    of the pruner (a unit is kept when its logit exceeds the threshold); recovery: its rank, 0 without one;
    arrangement: what of the units' arrangement differs from the usual one, but for the order of channels, which lies
    beside the weights. template: the prompt with `{question}` that training used; training: dataset, options and
    results of the training, anything that JSON holds; promise: what `calibrate` measured for this threshold, empty when
    nothing is promised; used: keys of the questions that trained the policy or set its thresholds, by `tasks.used`,
    none in checkpoints of before; lora: an adapter belongs to it.
    """

    base_model: str
    model_class: str
    sites: tuple[SavedSite, ...]
    base_parameters: int = 0
    policy: str = "agents"
    policy_options: dict = field(default_factory=dict)
    signals: tuple[str, ...] = ("norm", "entropy")
    units: tuple[str, ...] = ("head",)
    window: int | None = 64
    temperature: float = 0.5
    threshold: float = 0.0
    bucket: int | None = None
    least_kept: float = 0.0
    fill: str = "zero"
    recovery: int = 0
    arrangement: dict = field(default_factory=dict)
    template: str = "{question}"
    training: dict = field(default_factory=dict)
    promise: dict = field(default_factory=dict)
    used: str = ""
    lora: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.sites) <= MOST_SITES:
            raise ConfigError(f"{len(self.sites)} sites make no policy; there must be 1 to {MOST_SITES}")
        check_choice("fill", self.fill, get_args(Fill))
        check_window(self.window)
        check_template(self.template)
        # Each of them checks itself.
        _ = POLICIES[self.policy], [UNITS[unit] for unit in self.units], check_signals(self.signals)
        _ = self.geometries, self.gate, Arrangement.of_settings(self.arrangement)
        check_range("recovery", self.recovery, 0, MOST_UNITS)

    @classmethod
    def describing(
        cls,
        model: nn.Module,
        pruner: Pruner,
        *,
        base_model: str | None = None,
        template: str = "{question}",
        training: Mapping[str, Any] | None = None,
        promise: Mapping[str, Any] | None = None,
        used: Collection[str] = (),
    ) -> "MicrogliaConfig":
        """The configuration of a pruner on `model` (with LoRA when peft has wrapped it)."""
        lm, policy, gate = causal_lm(model), pruner.policy, pruner.gate
        if POLICIES.get(policy.name) is not type(policy):
            raise ConfigError(
                f"a {type(policy).__name__} cannot be saved; only registered policies can, {', '.join(POLICIES)}"
            )
        return cls(
            base_model=base_model or source_of(lm),
            model_class=type(lm).__name__,
            sites=saved_sites(pruner.sites(lm)),
            base_parameters=sum(p.numel() for key, p in lm.named_parameters() if "lora_" not in key),
            policy=policy.name,
            policy_options=policy.options(),
            signals=policy.signals,
            units=pruner.units,
            window=pruner.window,
            temperature=gate.temperature,
            threshold=gate.threshold,
            bucket=gate.bucket,
            least_kept=gate.least_kept,
            recovery=pruner.recovery.rank if pruner.recovery is not None else 0,
            fill=pruner.fill,
            arrangement=pruner.arrangement.settings(),
            template=template,
            training=dict(training or {}),
            promise=dict(promise or {}),
            used=" ".join(sorted(used)),
            lora=is_lora(model),
        )

    @property
    def geometries(self) -> list[Geometry]:
        return [site.geometry_value() for site in self.sites]

    @property
    def gate(self) -> Gate:
        """The hard gate of inference."""
        return Gate("hard", self.temperature, self.threshold, self.bucket, self.least_kept)

    def new_policy(self) -> Policy:
        """An untrained policy of this kind and these sizes. Raises ConfigError for options that it does not know.

        Under `torch.device("meta")` it has shapes and no memory, to be compared with what was saved.
        """
        try:
            return POLICIES[self.policy].create(self.geometries, self.signals, **self.policy_options)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"policy_options={self.policy_options} make no policy {self.policy!r} ({first_line(error)})"
            ) from error

    def pruner(
        self, policy: Policy, recovery: Recovery | None = None, orders: Sequence[Tensor] | None = None
    ) -> Pruner:
        """The pruner that this describes, with its policy, its recovery and the order of every layer's channels.

        Raises ConfigError for parts that cannot be.
        """
        return Pruner(
            policy,
            self.gate,
            self.window,
            self.fill,  # type: ignore[arg-type]
            self.units,
            recovery=recovery,
            arrangement=Arrangement.of_settings(self.arrangement, orders),
        )

    def differences(self, model: nn.Module) -> list[str]:
        """Every way in which `model` is not the model that this was made on; empty when it fits."""
        lm = causal_lm(model)
        differences = []
        if type(lm).__name__ != self.model_class:
            differences.append(f"its class is {type(lm).__name__}, not {self.model_class}")
        here = saved_sites(find_sites(lm, self.units, Arrangement.of_settings(self.arrangement)))
        if len(here) != len(self.sites):
            differences.append(f"it has {len(here)} sites, not {len(self.sites)}")
        grouped: dict[tuple[str, Any, Any], list[int]] = {}
        for index, (site, saved) in enumerate(zip(here, self.sites, strict=False)):
            now, before = site.flat, saved.flat
            for name in {**before, **now}:  # of another unit, a geometry has other numbers
                if (a := now.get(name)) != (b := before.get(name)):
                    grouped.setdefault((name, a, b), []).append(index)
        for (name, a, b), sites in grouped.items():
            differences.append(f"{name} is {a}, not {b} ({_listed(sites)})")
        return differences

    def to_json(self, checksums: Mapping[str, str]) -> bytes:
        """Readable JSON with the SHA-256 of the files beside it and of what it says itself.

        Raises CheckpointError for what JSON cannot hold.
        """
        row = {"format_version": FORMAT_VERSION, **asdict(self), "sha256": dict(checksums)}
        if not self.arrangement:  # as checkpoints of before
            del row["arrangement"]
        try:
            row["sha256"] = {**checksums, CONFIG: _digest(json.loads(json.dumps(row)))}  # as it will be read
            return json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the configuration cannot be written as JSON ({error}); keep finite numbers, texts and lists in it"
            ) from error

    @classmethod
    def from_json(cls, data: bytes, where: str) -> tuple["MicrogliaConfig", dict[str, str]]:
        """The configuration and the checksums of the other files. `where` names the file in a CheckpointError."""
        row = _parsed(data, where)
        version = row.pop("format_version")
        checksums = row.pop("sha256", None)
        if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
            raise CheckpointError(f"{where} has no SHA-256 of the files beside it; copy or save the checkpoint again")
        digest = checksums.pop(CONFIG, None)  # which those of before and those that people write have not
        if digest is not None and digest != _digest({"format_version": version, **row, "sha256": checksums}):
            raise CheckpointError(
                f"{where} is damaged or was changed by hand: it has not the SHA-256 that it names; copy it again, or "
                f"take the line {CONFIG!r} out of it if the change was meant"
            )
        later: dict[str, Any] = {"used": "", "least_kept": 0.0, "recovery": 0, "arrangement": {}}
        values = _typed(cls, {**later, **(upgraded(row, where) if version == 1 else row)}, where)
        sites = [_typed(SavedSite, site, f"{where}, site {index}") for index, site in enumerate(values["sites"])]
        try:
            lists = {name: tuple(values[name]) for name in ("signals", "units")}
            return cls(**{**values, **lists, "sites": tuple(SavedSite(**site) for site in sites)}), checksums
        except ValueError as error:  # ConfigError is one
            raise CheckpointError(f"{where}: {error}") from error


def saved_sites(sites: Sequence[Site]) -> tuple[SavedSite, ...]:
    """Sites as they are saved."""
    return tuple(SavedSite(s.unit, s.name, s.layer.index, asdict(s.geometry)) for s in sites)  # type: ignore[call-overload]


def is_lora(model: nn.Module) -> bool:
    """Whether peft has wrapped the model."""
    return hasattr(model, "get_base_model")


def _digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of what a configuration says, however it is laid out."""
    return checksum(json.dumps(row, sort_keys=True).encode())


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    """JSON object of a format version that this microglia knows."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        row = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are two
        raise CheckpointError(f"{where} is damaged or cut short ({error}); copy or save it again") from error
    version = row.get("format_version") if isinstance(row, dict) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise CheckpointError(f"{where} has no format_version, so microglia did not write it; give a checkpoint folder")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, but this microglia reads up to {FORMAT_VERSION}; upgrade microglia"
        )
    return row


def _typed(target: type, row: Any, where: str) -> dict[str, Any]:
    """The fields of the dataclass `target` in `row`, each of its type. Raises CheckpointError."""
    if not isinstance(row, dict):
        raise CheckpointError(f"{where} holds a {type(row).__name__} in place of an object; copy or save it again")
    known = {f.name: f.type for f in fields(target)}
    missing, unknown = sorted(known.keys() - row.keys()), sorted(row.keys() - known.keys())
    wrong = [f"{name}={row[name]!r}" for name, kind in known.items() if name in row and not _is(row[name], kind)]
    problems = {"lacks": missing, "has the unknown": unknown, "has the wrong": wrong}
    if listed := [f"{problem} {', '.join(names)}" for problem, names in problems.items() if names]:
        raise CheckpointError(f"{where} {' and '.join(listed)}; copy or save the checkpoint again")
    return row


def _is(value: Any, annotation: Any) -> bool:
    """Whether a JSON value suits a field; JSON knows lists but no tuples, and writes 1.0 as 1 in other hands."""
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if isinstance(value, bool):
        return annotation is bool
    if "tuple" in str(annotation):
        return isinstance(value, list) and ("str" not in str(annotation) or all(isinstance(x, str) for x in value))
    return isinstance(value, annotation)


def _listed(sites: Sequence[int]) -> str:
    """`site 3`, `sites 0, 1, 2` or `sites 0, 1, 2 and 29 more`."""
    shown = ", ".join(map(str, sites[:3]))
    return f"site{'s' * (len(sites) > 1)} {shown}" + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
