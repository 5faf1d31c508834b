"""What upstream says that is known, understood and not for the user; all else is heard.

Each entry names one message. None is silenced by its module alone: Megatron's cross-rank check of a
checkpoint's state, for one, speaks from among them. An entry goes when upstream no longer says it.
"""

import logging
import warnings

# Category, beginning of the message (a regular expression), why it is nobody's business here.
WARNINGS: list[tuple[type[Warning], str, str]] = [
    (DeprecationWarning, "The following imports from `dynamic_context.py`",
     "said by an import of Megatron's own"),
    (DeprecationWarning, "MLP requires ffn_hidden_size", "the default is what is meant"),
    (DeprecationWarning, "Warning: tp_group is None", "the default group is what is meant"),
    (UserWarning, "full scope is deprecated", "a default of TransformerConfig itself"),
    (UserWarning, "MimoModelConfig is experimental", "imported by Megatron, not used"),
    (UserWarning, "The .grad attribute of a Tensor that is not a leaf",
     "Megatron's optimizer looks at the gradients of shards, which have none"),
    (UserWarning, "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
     "of an expert that is whole on its rank; for other layers the recipe's check refuses it"),
    (RuntimeWarning, "Detected a Jax installation",
     "Transformer Engine looks for its extension to a framework that is not used here"),
    (FutureWarning, "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is",
     "called by Megatron"),
    (FutureWarning, "`torch.distributed._(all_gather|reduce_scatter)_base` is",
     "called by Megatron"),
    (Warning, "Detected a Jax installation", "Transformer Engine for JAX, not used"),
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized, assuming the "
     "intent is to load in a single process", "a checkpoint that one rank resumes from; so it is"),
    (UserWarning, "The argument order of load has been changed",
     "torch's word to Megatron, which names its arguments"),
]
# Only where there is no GPU; with one these say that something runs slower than it could.
CPU_WARNINGS: list[tuple[type[Warning], str, str]] = [
    (UserWarning, "(Transformer Engine and )?Apex (is|are) not installed", "they need a GPU"),
    (UserWarning, "When using (sequence parallelism|async grad allreduce) it is recommended to set "
     "the environment variable CUDA_DEVICE_MAX_CONNECTIONS", "about a GPU's queues"),
]
# Logger, beginning of the message, why.
LOGS: list[tuple[str, str, str]] = [
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED",
     "its successor has no output processor, which everything here builds on"),
    ("megatron.core.distributed.distributed_data_parallel",
     "DistributedDataParallel: full_param_layout not provided", "DDP computes the same itself"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated",
     "said of synchronous saves too"),
]
CPU_LOGS: list[tuple[str, str, str]] = [
    ("torch.utils.cpp_extension", "No CUDA runtime is found", "as it should be"),
]


def silence(*, is_cuda: bool) -> None:
    """Install the filters; for the process, once."""
    for category, message, _ in WARNINGS + ([] if is_cuda else CPU_WARNINGS):
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, message, _ in LOGS + ([] if is_cuda else CPU_LOGS):
        logging.getLogger(name).addFilter(_Without(message))


class _Without(logging.Filter):
    """Drops records that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
