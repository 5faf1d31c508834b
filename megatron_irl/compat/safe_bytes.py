"""Objects inside a distributed checkpoint, read without running what a stranger put there.

What is no tensor (Megatron's common state, random states) is pickled into the checkpoint's files,
and torch 2.14 reads it with ``weights_only=False``, which calls whatever the pickle names. Here the
same is read as weights are: tensors, plain containers, and the classes that Megatron-Core registers
as safe. To be removed when torch's planner does so itself.
"""

import io
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem


def install() -> None:
    """Replace the planner's way to read objects in this process; again is harmless."""
    DefaultLoadPlanner.load_bytes = _load_bytes


def _load_bytes(self: Any, read_item: ReadItem, value: io.BytesIO) -> None:
    """``DefaultLoadPlanner.load_bytes``.

    Raises:
        pickle.UnpicklingError: The object asks for a class or function that is not known as safe.
    """
    # Said outright: an environment variable can turn torch's default around.
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
