"""Fixtures that every test may ask for, and the order of the files."""

import pytest
import torch
from hypothesis import settings

from tests.tiny import FAMILIES, step_logits, tiny_prompts

# What decides a stop draws the same examples for everybody; `make fuzz` searches on with random ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("search", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What is kept for later runs goes where nobody else's is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROGLIA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items):
    """Files with slow tests begin, so that no process is left alone with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """Each family of tests.tiny in turn."""
    return request.param


@pytest.fixture
def snapshot():
    """A function of a model: everything that leaving a context must bring back, in comparable form."""
    kept = []  # so that no identity is given away twice

    def take(model):
        ids, mask = tiny_prompts(9, 4)
        parts = {"logits": step_logits(model, ids, mask, ids[:, -3:]).numpy().tobytes()}
        for name, module in model.named_modules():
            parts[name] = (
                id(module),
                id(getattr(module, "config", None)),
                {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | None)},
                [len(v) for k, v in vars(module).items() if k.endswith("_hooks")],
                "forward" in vars(module),
            )
            kept.append(module)
        for name, tensor in [*model.state_dict(keep_vars=True).items(), *model.named_buffers()]:
            parts["tensor", name] = (tensor.requires_grad, tensor.shape, tensor.dtype, tensor.device)
            if not tensor.is_meta:  # accelerate makes new stand-ins for offloaded weights in every pass
                parts["value", name] = id(tensor), torch.hash_tensor(tensor.detach().float()).item()
        return parts

    return take
