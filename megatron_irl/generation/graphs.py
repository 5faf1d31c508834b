"""Megatron-Core's CUDA graphs for the layers' decode steps, on a model that trains without them.

Megatron creates what manages graphs when a module is built with ``cuda_graph_impl: local``, and
then looks for graphs in training too. Here the managers are put on the transformer blocks while
the model is lent to the engine, and the config says ``local`` only as long: training can neither
capture nor replay. Parameters are captured by address, so updates in place are seen; the cache and
the context must stay the objects they were at the capture.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat import graph_arguments
from megatron_irl.hardware.replay import same_stream
from megatron_irl.parallel.scratch import shared_buffers

from megatron.core.transformer.cuda_graphs import (  # isort: skip
    CudaGraphManager,
    delete_cuda_graphs,
)
from megatron.core.transformer.enums import InferenceCudaGraphScope  # isort: skip

_NAME = "cudagraph_manager"


class LayerGraphs:
    """The graphs of a model's transformer blocks, from their capture until ``drop``."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._models = list(models)
        self._managers: list[Any] = []
        self._shared: dict[Any, torch.Tensor] = {}

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the engine capture and replay within the block, and nothing else ever."""
        graph_arguments.install()
        buffers = shared_buffers()
        buffers.update(self._shared)
        configs = {id(model.config): model.config for model in self._models}.values()
        old = [
            (config, config.cuda_graph_impl, config.inference_cuda_graph_scope,
             config.cuda_graph_warmup_steps)
            for config in configs
        ]
        for config in configs:
            config.cuda_graph_impl = "local"
            config.inference_cuda_graph_scope = InferenceCudaGraphScope.block
            config.cuda_graph_warmup_steps = 1  # enough to load kernels; upstream takes 3
        try:
            if not self._managers:
                self._managers = [_manager(model) for model in self._models]
            for model, manager in zip(self._models, self._managers, strict=True):
                # Not through nn.Module's registration: it is no part of the model.
                model.decoder.__dict__[_NAME] = manager
            yield
        finally:
            for model in self._models:
                model.decoder.__dict__.pop(_NAME, None)
            for config, impl, scope, warmup in old:
                config.cuda_graph_impl, config.inference_cuda_graph_scope = impl, scope
                config.cuda_graph_warmup_steps = warmup
            # Graphs write to the shared buffers they were captured with, which training may not
            # use; they are kept here until the model is lent again.
            self._shared = dict(buffers)

    @property
    def count(self) -> int:
        """Graphs captured."""
        return sum(len(manager.cudagraph_runners) for manager in self._managers)

    def drop(self) -> None:
        """Free the graphs and their memory."""
        if self._managers:
            delete_cuda_graphs()  # all of the process: nobody else here captures through Megatron
        self._managers, self._shared = [], {}


def _manager(model: Any) -> CudaGraphManager:
    with same_stream():  # the first manager of a process would change it
        return CudaGraphManager(
            model.config, pg_collection=model.pg_collection, need_backward=False
        )


def why_not_captured(models: Sequence[nn.Module], flash_attention: bool) -> str | None:
    """Why decode steps cannot be captured; None where they can."""
    config: Any = models[0].config
    if not hardware.IS_CUDA:
        return "there is no CUDA device"
    if config.params_dtype == torch.float32:
        return "fp32 decodes through SDPA, which asks the host"
    if not flash_attention:
        return "flash-attn is not installed, and SDPA asks the host"
    return None
