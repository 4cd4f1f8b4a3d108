"""Capturing work once and replaying it on the same tensors: CUDA graphs, and a tape that does the same anywhere."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microglia.errors import MicrogliaError

# Operations by which Python would see values. A replay does not run Python, so it could never see the new ones.
LOOKING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Graph(Protocol):
    """Everything done between `begin` and `end`; `replay` does it again, on the very same tensors."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def replay(self) -> None: ...


class Capture(Protocol):
    """Makes graphs that may share memory. Graphs are captured inside `recording` and replayed in their order."""

    def graph(self) -> Graph: ...

    def recording(self) -> AbstractContextManager[None]: ...


class CudaCapture:
    """CUDA graphs on one stream with one pool of memory: what one piece no longer needs, the next one uses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.opened: list[Graph] = []

    def graph(self) -> Graph:
        return _CudaGraph(self.pool, self.opened)

    @contextmanager
    def recording(self) -> Iterator[None]:
        gc.collect()  # a graph that is collected while another one is captured would spoil it
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), _closing(self.opened):
            yield
        torch.cuda.synchronize(self.device)


class _CudaGraph:
    def __init__(self, pool: Any, opened: list[Graph]) -> None:
        self.pool, self.opened, self.inner = pool, opened, torch.cuda.CUDAGraph()

    def begin(self) -> None:
        _own_workspace()
        self.inner.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.opened.append(self)

    def end(self) -> None:
        self.opened.remove(self)
        self.inner.capture_end()
        _own_workspace()

    def replay(self) -> None:
        self.inner.replay()


@contextmanager
def _closing(opened: list[Graph]) -> Iterator[None]:
    """End the capture that an error inside left open: else whatever comes after it would be captured too."""
    try:
        yield
    except BaseException:
        while opened:
            with suppress(Exception):
                opened[-1].end()
        raise


def _own_workspace() -> None:
    """Let the next matrix product allocate its workspace anew: within a capture then from the pool of the graphs.

    Else a graph would keep the address of a workspace that others free: torch.compile's own graphs do.
    """
    torch._C._cuda_clearCublasWorkspaces()


class TapeCapture:
    """Tapes: for tests, and for machines without CUDA. They save no time."""

    def __init__(self) -> None:
        self.opened: list[Graph] = []

    def graph(self) -> Graph:
        return Tape(self.opened)

    def recording(self) -> AbstractContextManager[None]:
        return _closing(self.opened)


class Tape:
    """The operations that reach the kernels, in order; a replay gives their results to the tensors of the first time.

    As with a CUDA graph, Python does not run again: a number that Python kept, a branch that it took and a tensor that
    was not static stay what they were. A step that looks at values raises, as it would there.
    """

    def __init__(self, opened: list[Graph]) -> None:
        self.opened = opened
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._recorder = _Recorder(self.calls)

    def begin(self) -> None:
        self._recorder.__enter__()
        self.opened.append(self)

    def end(self) -> None:
        self.opened.remove(self)
        self._recorder.__exit__(None, None, None)

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(output), _tensors(again), strict=True):
                if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "lift_fresh":  # torch.tensor(0.0, device=…): fine on a CPU, refused by CUDA
            raise MicrogliaError("a captured step may not make tensors from numbers of Python, which are on the host")
        if name in LOOKING:
            raise MicrogliaError(
                f"a captured step may not look at values, but {name} does; keep the decision on tensors"
            )
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def capture_for(device: torch.device) -> Capture:
    """CUDA graphs on a CUDA device, else tapes."""
    return CudaCapture(device) if device.type == "cuda" else TapeCapture()
