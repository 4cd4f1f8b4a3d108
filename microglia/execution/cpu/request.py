"""One request's steps: its buffers, its cache, its decision, and the tables that say where all of it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microglia.anatomy import Anatomy, HeadGeometry
from microglia.errors import MicrogliaError
from microglia.execution.base import Decision, Request, check_hard
from microglia.execution.captured.kv import StaticHeads
from microglia.execution.cpu import code
from microglia.execution.cpu import tables as t
from microglia.execution.cpu.plan import Plan, run_list
from microglia.execution.cpu.team import TEAM, thread_count
from microglia.units import HeadSite, Site
from microglia.units.kv import take_rows

CHECK = 16  # tokens that are written before Python is asked whether to go on


class Steps:
    """The steps of `request`: B rows, of which the prompt's mask (B, T) is left-padded."""

    def __init__(self, plan: Plan, anatomy: Anatomy, request: Request) -> None:
        self.plan, self.anatomy, self.request = plan, anatomy, request
        batch, width = request.mask.shape
        starts = width - request.mask.long().sum(1)
        if not bool((request.mask.bool() == (torch.arange(width) >= starts[:, None])).all()):
            raise MicrogliaError("a prompt has padding elsewhere than on its left; pad prompts on the left")
        self.length, self.threads = width + request.new_tokens, thread_count()
        lm = anatomy.lm
        geometries = [layer.heads for layer in anatomy.layers]
        with torch.inference_mode(False):
            self.cache = StaticHeads(geometries, batch, self.length, dtype=lm.dtype, device=lm.device)
            self.logits = torch.empty(batch, anatomy.vocab_size)
            self.tokens = torch.zeros(batch, dtype=torch.long)
            self.answer = torch.zeros(batch, request.new_tokens, dtype=torch.long)
            self.ended = torch.zeros(batch, dtype=torch.long)
        self.counter = np.zeros(16, np.int64)
        self.held: list[Any] = []
        self.layers, self.whole = plan.layers.copy(), plan.whole.copy()
        self._place_request(starts)
        self._place_buffers()
        for index, geometry in enumerate(geometries):
            self._place_units(index, geometry, np.ones((batch, geometry.heads), bool))

    # --- tables -------------------------------------------------------------------------------------------------------

    def _address(self, held: Any) -> int:
        self.held.append(held)
        return int(held.data_ptr() if isinstance(held, Tensor) else held.ctypes.data)

    def _place_request(self, starts: Tensor) -> None:
        row, request = self.whole, self.request
        row[[t.LAYERS, t.BATCH, t.THREADS, t.LONGEST]] = self.layers.ctypes.data, len(starts), self.threads, self.length
        row[[t.STARTS, t.IOTA]] = self._address(starts.contiguous()), self._address(torch.arange(self.length))
        row[[t.TOKENS, t.LOGITS, t.ENDED]] = [x.data_ptr() for x in (self.tokens, self.logits, self.ended)]
        row[[t.ANSWER, t.ANSWER_LENGTH]] = self.answer.data_ptr(), request.new_tokens
        row[[t.STOPS, t.STOP_COUNT]] = self._address(np.array([*request.end_tokens, 0])), len(request.end_tokens)
        row[[t.PAD, t.COUNTER]] = request.pad_token, self.counter.ctypes.data
        row[t.BEST] = self._address(np.zeros(len(starts) * self.threads, np.int64))

    def _place_buffers(self) -> None:
        row, layers, batch = self.whole, self.layers, int(self.whole[t.BATCH])
        hidden, size = int(row[t.HIDDEN]), int(layers[:, t.SIZE].max())
        heads, groups = layers[:, t.HEADS] * layers[:, t.SIZE], layers[:, t.GROUPS] * layers[:, t.SIZE]
        attention, mlp = int((heads + 2 * groups).max()), 2 * int(layers[:, t.CHANNELS].max())
        rotaries, width = self.plan.rotaries()
        row[[t.ROTARIES, t.ROTARY_COUNT]] = self._address(rotaries), len(self.plan.computation.rotaries)
        row[t.ROTARY_WIDTH] = width
        private = {
            t.HIDDEN_OF: 4 * batch * hidden,
            t.NORMED_OF: 4 * batch * hidden,
            t.SCORES_OF: 4 * (self.length + size),
            t.ROTATION_OF: 8 * batch * width * len(rotaries),
            t.JOB_OF: 8 * t.JOB,
            t.LIST_OF: 8 * max(hidden, attention, mlp, batch),
        }
        shared = {
            t.ATTENTION_PARTS: 4 * batch * attention * self.threads,
            t.OUT_PARTS: 4 * batch * hidden * self.threads,
            t.MLP_PARTS: 4 * batch * mlp * self.threads,
            t.ATTENDED: 4 * batch * attention,
            t.FED: 4 * batch * mlp,
        }
        private, shared = ({k: -(-v // 64) * 64 for k, v in part.items()} for part in (private, shared))
        step = sum(private.values())
        whole = torch.zeros(sum(shared.values()) + self.threads * step + 64, dtype=torch.uint8)
        at = -(-self._address(whole) // 64) * 64
        for field, length in (private | shared).items():
            row[field], at = at, at + length
            if field == t.LIST_OF:
                at += (self.threads - 1) * step
        row[[t.PRIVATE_STEP, t.ATTENTION_WIDTH, t.MLP_WIDTH]] = step, attention, mlp

    def _place_units(self, index: int, geometry: HeadGeometry, keep: "np.ndarray[Any, np.dtype[np.bool_]]") -> None:
        """Of decisions (B, H): which query heads of which rows are computed, and where their keys are in the cache."""
        kv: Any = self.cache.layers[self.anatomy.layers[index].index]
        grouped = keep.reshape(len(keep), geometry.kv_heads, -1)
        slots = np.where(grouped.any(-1), grouped.any(-1).cumsum(-1) - 1, -1)  # (B, G)
        rows, heads = np.nonzero(np.broadcast_to(keep.any(0), keep.shape))
        groups = geometry.group_of(torch.from_numpy(heads)).numpy()
        own = np.where(keep[rows, heads], slots[rows, groups], -1)
        units = np.ascontiguousarray(np.stack([rows, heads, groups, own], axis=1), dtype=np.int64)
        row = self.layers[index]
        row[[t.UNITS, t.UNIT_COUNT]] = self._address(units), len(units)
        row[[t.KEYS, t.VALUES]] = kv.keys.data_ptr(), kv.values.data_ptr()
        row[[t.CACHE_ROW, t.CACHE_SLOT]] = [kv.keys.stride(i) * kv.keys.element_size() for i in (0, 1)]

    # --- a request ----------------------------------------------------------------------------------------------------

    def prompt_read(self) -> None:
        """The prompt has just been read into the cache."""
        self.cache.place.length = self.request.mask.shape[1]

    @torch.inference_mode()
    def decide(self, sites: Sequence[Site], decision: Decision) -> None:
        """Continue with a decision: what is left out is no longer read, and the cache keeps kept groups only."""
        for site, keep in zip(sites, decision.keep, strict=True):
            assert isinstance(site, HeadSite)
            check_hard(site, keep, "a fast step")
            if bool((keep > 0).all()):
                continue
            self._decide(site, (keep > 0).expand(len(self.tokens), -1), decision.fill_of(site))

    def _decide(self, site: HeadSite, keep: Tensor, fill: Tensor | None) -> None:
        index = next(i for i, layer in enumerate(self.anatomy.layers) if layer.index == site.layer.index)
        row, geometry = self.layers[index], site.geometry
        groups = geometry.by_group(keep).any(-1)
        for first, kept in ((t.HEAD_RUNS, keep.any(0)), (t.GROUP_RUNS, groups.any(0))):
            runs = run_list(kept)
            row[first : first + 3] = self._address(runs), len(runs), int(kept.sum())
        row[t.OUTPUT] = self.plan.columns(index, t.OUTPUT)
        if fill is not None:
            row[t.FILL] = self._address(site.fill_bias(keep.float(), fill).float().contiguous())
        if not bool(groups.all()):
            kv: Any = self.cache.layers[site.layer.index]
            shape = geometry.row_shape(keep)
            kv.keys, kv.values = take_rows(kv.keys, shape.groups), take_rows(kv.values, shape.groups)
        self._place_units(index, geometry, keep.numpy())

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one token (B,) more in every row."""
        self.tokens.copy_(tokens)
        self._run(1, -1)
        return self.logits

    @torch.inference_mode()
    def greedy(self, logits: Tensor, new_tokens: int) -> Tensor:
        """The answers (B, N) after a prompt with these last logits (B, V), no longer than the longest."""
        first = logits.argmax(-1)
        stops = torch.tensor(self.request.end_tokens, dtype=torch.long)
        self.ended.copy_((first[:, None] == stops).any(-1))
        self.tokens.copy_(first)
        self.answer[:, 0] = first
        done = 1
        while done < new_tokens and not bool(self.ended.all()):
            done += self._run(min(CHECK, new_tokens - done), done)
        return self.answer[:, :done].clone()

    def _run(self, steps: int, first: int) -> int:
        """Steps on all threads. Python's own signals are looked at between calls."""
        write, place = code.step(), self.cache.place.length
        self.counter[:] = 0
        self.whole[t.ALL_ENDED] = 0
        table = self.whole.ctypes.data

        def task(thread: int) -> int:
            return int(write(table, thread, place, steps, first))

        done = int(TEAM.run(task, self.threads))
        self.cache.place.length += done
        return done
