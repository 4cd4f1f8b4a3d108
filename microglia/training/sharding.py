"""The base model's layers divided among the processes (FSDP2), for models that are larger than one device."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from microglia import processes
from microglia.anatomy import Anatomy


def shard_layers(lm: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every layer's weights; a layer is whole only while it computes.

    In place and for good: every process must then run the model whenever one does. What trains is small and stays
    whole (agents are no part of the model, adapters are left out), and so do the embeddings and the output head.
    """
    mesh = init_device_mesh(device.type, (processes.count(),))
    for layer in Anatomy(lm).layers:
        adapters = {p for name, p in layer.module.named_parameters() if "lora_" in name}
        # torch 2.6 does not know ignored_params
        left_out: dict[str, Any] = {"ignored_params": adapters} if adapters else {}
        fully_shard(layer.module, mesh=mesh, **left_out)
    lm.to(device)
