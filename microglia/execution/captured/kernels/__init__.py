"""Kernels in Triton, for a GPU. Nothing here is imported where there is none; each has a slower truth in torch."""

import importlib.util
import os

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels run on this device: on CUDA with Triton; elsewhere where Triton only interprets them, for tests.

    Triton decides about that when a kernel is defined, so the variable must be set before the first one is used.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None
