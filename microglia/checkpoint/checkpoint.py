"""A policy with everything that is needed to use it again, saved to and loaded from a folder or the hub."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from microglia.anatomy import input_device
from microglia.checkpoint.card import model_card
from microglia.checkpoint.config import MicrogliaConfig, is_lora
from microglia.checkpoint.files import ADAPTER, AGENTS, CARD, CONFIG, read_all, read_config, replace_all
from microglia.checkpoint.format_1 import renamed
from microglia.errors import CheckpointError, ConfigError, first_line
from microglia.pruner import Pruner
from microglia.recovery import Recovery

CALIBRATION = "calibration."  # before the site's index in the names of tensors
RECOVERY = "recovery."  # likewise
WEIGHTS = "calibration.weights"  # of its prompts, where they do not all count alike
ORDER = "order."  # before the layer's


@dataclass(frozen=True)
class Checkpoint:
    """pruner: with its budget, where there are prompts that it was not trained on. adapter: the files of the LoRA
    adapter, name → bytes, when there is one.
    """

    pruner: Pruner
    config: MicrogliaConfig
    adapter: Mapping[str, bytes] | None = None

    @classmethod
    def of(cls, model: nn.Module, pruner: Pruner, **description: Any) -> "Checkpoint":
        """The checkpoint of a pruner on a model; `description` goes to `MicrogliaConfig.describing`."""
        return cls(pruner, MicrogliaConfig.describing(model, pruner, **description))

    def save_pretrained(self, folder: Path | str, model: nn.Module | None = None) -> Path:
        """Write the checkpoint; a crash at any moment leaves the previous one or this one, whole.

        model: the peft-wrapped model, whose adapter is saved with it. Raises CheckpointError when nothing can be
        written there or the adapter is missing.
        """
        folder = Path(folder)
        adapter = _adapter_of(model) if model is not None and is_lora(model) else self.adapter
        if self.config.lora and adapter is None:
            raise CheckpointError("this policy was trained with LoRA, so its adapter must be saved too; pass model=")
        config = replace(self.config, lora=adapter is not None)
        policy, budget = self.pruner.policy, self.pruner.budget
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
        calibration = enumerate(budget.logits if budget else ())
        tensors |= {f"{CALIBRATION}{i}": x.detach().float().cpu().contiguous() for i, x in calibration}
        if self.pruner.recovery is not None:
            state = self.pruner.recovery.state_dict()
            tensors |= {f"{RECOVERY}{name}": x.detach().cpu().contiguous() for name, x in state.items()}
        if budget is not None and budget.weights is not None:
            tensors[WEIGHTS] = budget.weights.detach().float().cpu().contiguous()
        orders = enumerate(self.pruner.arrangement.orders or ())
        tensors |= {f"{ORDER}{i}": x.int().cpu().contiguous() for i, x in orders}
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise CheckpointError(
                f"{broken[0]} holds NaN or infinity, so this policy decides nothing; train at a lower learning rate"
            )
        contents = {AGENTS: safetensors_bytes(tensors), **(adapter or {})}
        card = model_card(config, policy_parameters=sum(p.numel() for p in policy.parameters()))
        replace_all(folder, contents, config.to_json, card.encode(), outdated={*ADAPTER})
        return folder

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, revision: str | None = None, token: str | None = None
    ) -> "Checkpoint":
        """Load from a local folder, or from the hub when there is no such folder. Nothing that is pickled is read.

        Raises CheckpointError, one sentence, for whatever is missing, damaged, unsafe or too new.
        """
        path = Path(folder)
        if not path.is_dir():
            path = _download(str(folder), revision, token)
        config, contents = _read(path)
        pruner, calibration = _parts(config, contents.pop(AGENTS), str(path / AGENTS))
        weights = calibration.pop(WEIGHTS, None)
        if calibration:
            pruner = pruner.with_budget(list(calibration.values()), config.geometries, weights)
        return cls(pruner, config, contents or None)

    def calibrated(self, pruner: Pruner, promise: Mapping[str, Any]) -> "Checkpoint":
        """The same checkpoint with the threshold that a calibration chose, and the promise that comes with it."""
        return replace(self, config=replace(self.config, threshold=pruner.gate.threshold, promise=dict(promise)))

    def check(self, model: nn.Module) -> None:
        """Raise CheckpointError naming every difference at once unless `model` is the kind this was made on."""
        if differences := self.config.differences(model):
            raise CheckpointError(
                f"this checkpoint was made on {self.config.base_model or self.config.model_class} and does not fit the "
                f"given model: {'; '.join(differences)}; load the model it was made on, or train new agents"
            )

    def load_onto(self, model: nn.Module) -> nn.Module:
        """The model, checked and wrapped with the LoRA adapter if there is one; the policy moves to its device."""
        self.check(model)
        if self.adapter is not None:
            if is_lora(model):
                raise CheckpointError(
                    "the model has an adapter and this checkpoint brings its own; give the base model"
                )
            model = _with_adapter(model, self.adapter)
        self.pruner.policy.to(input_device(model)).eval()
        if self.pruner.recovery is not None:
            if not self.pruner.recovery.fits(model):
                raise CheckpointError(
                    "the recovery of this checkpoint was made for layers of other sizes; load the model it was made on"
                )
            self.pruner.recovery.to(input_device(model))
        return model

    def push_to_hub(
        self, repo_id: str, *, model: nn.Module | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Save to a repository of the hub, made if it is missing, and return its address."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, model)
            try:
                api = HfApi(token=token)
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Checkpoint of microglia")
            except Exception as error:  # network, rights, names: some ten unrelated types
                raise CheckpointError(
                    f"the checkpoint could not be pushed to {repo_id!r} ({first_line(error)}); check the name, the "
                    "network and hf auth login, or use save_pretrained"
                ) from error
        return str(url)


def _read(folder: Path) -> tuple[MicrogliaConfig, dict[str, bytes]]:
    """Configuration and contents that belong together, also while somebody saves into the folder."""
    while True:
        data = read_config(folder)
        config, checksums = MicrogliaConfig.from_json(data, str(folder / CONFIG))
        wanted = {AGENTS, *(ADAPTER if config.lora else ())}
        if checksums.keys() != wanted:
            raise CheckpointError(
                f"{folder / CONFIG} has the SHA-256 of {', '.join(sorted(checksums)) or 'nothing'}, but must have "
                f"that of {', '.join(sorted(wanted))}; copy or save the checkpoint again"
            )
        try:
            return config, read_all(folder, checksums)
        except CheckpointError:
            if read_config(folder) == data:
                raise  # else another checkpoint has come in between: read that


def _parts(config: MicrogliaConfig, data: bytes, where: str) -> tuple[Pruner, dict[str, Tensor]]:
    """Pruner and calibration from the bytes of a safetensors file: logits by site, perhaps weights."""
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{where} is not safetensors ({first_line(error)}); copy it again") from error
    orders = {name: tensors.pop(name) for name in [*tensors] if name.startswith(ORDER)}
    names = [f"{CALIBRATION}{i}" for i in range(len(config.sites))]
    calibration = {name: tensors.pop(name) for name in (*names, WEIGHTS) if name in tensors}
    recovery = _recovery({name: tensors.pop(name) for name in [*tensors] if name.startswith(RECOVERY)}, config, where)
    try:
        with torch.device("meta"):  # what a configuration asks for may be larger than any memory
            wanted = {name: tuple(x.shape) for name, x in config.new_policy().state_dict().items()}
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG} beside {where}: {error}") from error
    if not tensors.keys() <= wanted.keys():
        tensors = renamed(tensors, config.policy)
    prompts = max((len(x) for x in calibration.values() if x.dim()), default=0) or 1
    logits = {name: (prompts, g.count) for name, g in zip(names, config.geometries, strict=True) if calibration}
    weights = {WEIGHTS: (prompts,)} if WEIGHTS in calibration else {}
    problems = _problems(tensors | calibration, wanted | logits | weights)
    if not problems and weights and not bool((calibration[WEIGHTS] > 0).all()):
        problems = [f"{WEIGHTS} holds numbers that are not above 0"]
    if problems:
        raise CheckpointError(f"{where} does not fit {CONFIG}: {'; '.join(problems)}; copy or save both again")
    policy = config.new_policy()
    policy.load_state_dict(tensors)
    pruner = config.pruner(policy.eval(), recovery, _orders(orders, config, where))
    return pruner, {name: x.float() for name, x in calibration.items()}


def _recovery(tensors: Mapping[str, Tensor], config: MicrogliaConfig, where: str) -> Recovery | None:
    if not config.recovery and not tensors:
        return None
    try:
        return Recovery.from_tensors({name.removeprefix(RECOVERY): x for name, x in tensors.items()}, config.recovery)
    except ConfigError as error:
        raise CheckpointError(f"{where} does not fit {CONFIG}: {error}") from error


def _orders(found: Mapping[str, Tensor], config: MicrogliaConfig, where: str) -> list[Tensor] | None:
    """The order of every layer's channels; None where they stand as they are."""
    channels = [site.geometry["channels"] for site in config.sites if site.unit == "channel"]
    wanted = {f"{ORDER}{i}": count for i, count in enumerate(channels)} if found else {}
    problems = [
        *(f"{name} is unknown" for name in found if name not in wanted),
        *(f"{name} is no order of {n} channels" for name, n in wanted.items() if not _is_order(found, name, n)),
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit {CONFIG}: {'; '.join(problems)}; copy or save both again")
    return [found[name].long() for name in wanted] or None


def _is_order(tensors: Mapping[str, Tensor], name: str, count: int) -> bool:
    order = tensors.get(name, torch.zeros(0))
    whole = order.dtype == torch.int32 and order.shape == (count,)
    return whole and bool(order.sort().values.equal(torch.arange(count, dtype=torch.int32)))


def _problems(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every way in which tensors are not those of these names and shapes, all of finite numbers."""
    both = [(name, x) for name, x in tensors.items() if name in wanted]
    return [
        *(f"{name} is missing" for name in wanted if name not in tensors),
        *(f"{name} is unknown" for name in tensors if name not in wanted),
        *(f"{name} has shape {tuple(x.shape)}, not {wanted[name]}" for name, x in both if x.shape != wanted[name]),
        *(f"{name} holds {x.dtype}, not numbers with a point" for name, x in both if not x.is_floating_point()),
        *(f"{name} holds NaN or infinity" for name, x in both if not bool(torch.isfinite(x).all())),
    ]


def _adapter_of(model: Any) -> dict[str, bytes]:
    """The files that peft writes for a wrapped model, name → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # save_embedding_layers: "auto" asks the hub whether the vocabulary grew; microglia never changes it.
        model.save_pretrained(folder, save_embedding_layers=False)
        return {name: (Path(folder) / Path(name).name).read_bytes() for name in ADAPTER}


def _check_ranks(adapter: Mapping[str, bytes]) -> None:
    """Raise ValueError unless an adapter is LoRA and its settings have the ranks that its tensors have."""
    settings, weights = (adapter[name] for name in ADAPTER)
    row = json.loads(settings)
    if not isinstance(row, dict) or row.get("peft_type") != "LORA":
        raise ValueError("it is not LoRA")
    named = {row.get("r"), *(row.get("rank_pattern") or {}).values()}
    saved = {len(x) for name, x in parse_safetensors(weights).items() if name.endswith("lora_A.weight")}
    if not named <= saved:
        raise ValueError(f"its settings have the ranks {sorted(named)}, its tensors {sorted(saved)}")


def _with_adapter(model: nn.Module, adapter: Mapping[str, bytes]) -> nn.Module:
    from peft import PeftModel  # here, since importing it takes seconds

    with tempfile.TemporaryDirectory() as folder:
        for name, data in adapter.items():
            (Path(folder) / Path(name).name).write_bytes(data)
        try:
            _check_ranks(adapter)
            # low_cpu_mem_usage: on the meta device until the saved tensors are put in, which must fit.
            wrapped = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
            if missing := [name for name, p in wrapped.named_parameters() if p.is_meta and "lora_" in name]:
                raise ValueError(f"it lacks {missing[0]}")
            return wrapped.eval()
        except Exception as error:  # peft, safetensors and torch raise their own kinds for what does not fit
            raise CheckpointError(
                f"the LoRA adapter of this checkpoint does not fit the model ({first_line(error)}); load the one it "
                "was made on"
            ) from error


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise CheckpointError(
            f"there is no checkpoint folder {repo_id}; give one that microglia train wrote, or a hub id"
        ) from None
    try:
        names = [CONFIG, AGENTS, CARD, *ADAPTER]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=names))
    except Exception as error:  # no network, no such repository, no right: some ten unrelated types
        raise CheckpointError(
            f"there is no checkpoint folder {repo_id}, nor could one be had from the hub ({first_line(error)}); give "
            "a folder that microglia train or save_pretrained wrote, or a hub id"
        ) from error
