"""Only messages that are named are silenced; a GPU's are heard where there is a GPU."""

import logging
import warnings

import pytest

from megatron_irl.hardware import quiet


@pytest.fixture
def heard():
    """What gets through, of warnings and of Megatron's and torch's loggers."""
    texts = []

    class Listen(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    listener, loggers = Listen(), [logging.getLogger(n) for n in ("megatron", "torch")]
    before = {name: list(logging.getLogger(name).filters)
              for name, _, _ in quiet.LOGS + quiet.CPU_LOGS}
    for name in before:
        logging.getLogger(name).filters.clear()
    for logger in loggers:
        logger.addHandler(listener)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: texts.append(str(message))
        yield texts
    for logger in loggers:
        logger.removeHandler(listener)
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


NAMED = [(UserWarning, "full scope is deprecated. Use empty cuda_graph_modules to capture."),
         (DeprecationWarning, "Warning: tp_group is None, using default tp group."),
         (UserWarning, "The argument order of load has been changed. Please check the document."),
         (UserWarning, "torch.distributed is disabled, unavailable or uninitialized, assuming the "
          "intent is to load in a single process.")]


@pytest.mark.parametrize("is_cuda", [False, True])
def test_what_is_named_is_silent_and_the_rest_is_heard(heard, is_cuda):
    quiet.silence(is_cuda=is_cuda)
    for category, text in NAMED:
        warnings.warn_explicit(text, category, "megatron/core/x.py", 1, module="megatron.core.x")
    logging.getLogger("megatron.core.models.gpt.gpt_model").warning("GPTModel IS DEPRECATED. ...")
    assert heard == []
    warnings.warn_explicit("something new", UserWarning, "x.py", 1, module="megatron.core.x")
    logging.getLogger("megatron.core.models.gpt.gpt_model").warning("something else")
    logging.getLogger("megatron.core.dist_checkpointing.validation").warning(
        "Rank 1 common state dict differs from rank 0 common state dict.")
    assert [text.split()[0] for text in heard] == ["something", "something", "Rank"]


def test_missing_gpu_packages_are_heard_on_a_gpu(heard):
    text = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
    quiet.silence(is_cuda=True)
    warnings.warn(text, UserWarning, stacklevel=1)
    assert heard == [text]
    heard.clear()
    quiet.silence(is_cuda=False)
    warnings.warn(text, UserWarning, stacklevel=1)
    assert heard == []


def test_a_gpus_queues_are_nobodys_business_on_a_cpu(heard):
    quiet.silence(is_cuda=False)
    for what in ("sequence parallelism", "async grad allreduce"):
        warnings.warn(f"When using {what} it is recommended to set the environment variable "
                      "CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup", stacklevel=1)
    assert heard == []


def test_this_process_is_quiet_about_nothing_else():
    import megatron_irl.hardware  # noqa: F401

    assert logging.getLogger("megatron.core").level == logging.NOTSET
    assert not [f for f in warnings.filters if f[0] == "ignore" and f[3] is not None
                and f[1] is None and "megatron" in f[3].pattern and f[2] is Warning]
