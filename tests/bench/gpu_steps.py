"""Ways to run a transformers model token by token, and over a prompt, for the decoding bench.

All ways do the same work on the same static cache: the model's forward with the position given as
a tensor, then the most likely token as the next input.
    eager     one kernel launch after the other, as Python comes to them
    graph     the eager step recorded once as a CUDA graph and replayed
    compile   torch.compile(mode="reduce-overhead"): fused kernels, replayed as CUDA graphs
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

WARM_UP = 3


class Decoder:
    """Decoding of one sequence from position `prompt` on, in a cache for `length` positions."""

    def __init__(self, model: Any, prompt: int, length: int, way: str) -> None:
        self.model, self.prompt, self.length = model, prompt, length
        self.device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.ones(1, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.places = torch.arange(length, device=self.device)
        ids = torch.ones(1, prompt, dtype=torch.long, device=self.device)
        model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.rewind()
        self.step: Callable[[], None] = self._eager
        if way == "graph":
            self.step = recorded(self._eager)
        elif way == "compile":
            self.compiled = torch.compile(self._next, mode="reduce-overhead")
            self.step = self._compiled
        for _ in range(WARM_UP):
            self.step()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.position.fill_(self.prompt)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)

    def _next(self, token: Tensor, position: Tensor) -> Tensor:
        """The most likely token `[1, 1]` after `token` at `position`."""
        seen = (self.places <= position).view(1, 1, 1, -1)
        logits = self.model(
            input_ids=token,
            attention_mask=seen,
            position_ids=position.unsqueeze(0),
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1:].argmax(-1)

    def _eager(self) -> None:
        self.token.copy_(self._next(self.token, self.position))
        self.position += 1

    def _compiled(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.token.copy_(self.compiled(self.token, self.position))
        self.position += 1

    def seconds_per_token(self, tokens: int) -> float:
        """Of `tokens` tokens from the end of the prompt on."""
        self.rewind()
        began = now(self.device)
        for _ in range(tokens):
            self.step()
        return (now(self.device) - began) / tokens


class Prefill:
    """The forward pass over a prompt with an empty cache, the head at its last position only."""

    def __init__(self, model: Any, prompt: int, way: str) -> None:
        self.model, self.device = model, model.device
        self.ids = torch.ones(1, prompt, dtype=torch.long, device=self.device)
        self.run: Callable[[], Any] = self._once
        self._once()
        if way == "graph":
            self.run = recorded(self._once)
        self.run()

    def _once(self) -> None:
        self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)

    def seconds(self) -> float:
        """Of one pass."""
        began = now(self.device)
        self.run()
        return now(self.device) - began


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph; it must read and write tensors that stay where they are."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # first calls allocate and tune: not while recording
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def now(device: torch.device) -> float:
    """Seconds, with all work of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
