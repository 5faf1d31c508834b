"""One rank of the pool: ``python -m tests.dist.worker SOCKET``, or a fork (``faults.forked``)."""

import gc
import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client


def main(address: str) -> None:
    with Client(address, "AF_UNIX") as pipe:
        import torch

        from megatron_irl.collector import keep_aside
        from megatron_irl.parallel.topology import shutdown

        torch.set_num_threads(1)
        keep_aside()  # what a collection after every job would go through
        while True:
            try:
                environment, name, arguments = pickle.loads(pipe.recv_bytes())
            except EOFError:  # the tests are over
                return
            os.environ.update(environment)
            module, function = name.split(":")
            try:
                result = getattr(importlib.import_module(module), function)(**arguments)
                answer = pickle.dumps((True, result))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            finally:
                shutdown()
                # Models and optimizers are cycles that hold their process groups, and gloo has
                # three threads for each of these, which wake up a hundred times a second.
                gc.collect()
            pipe.send_bytes(answer)


if __name__ == "__main__":
    main(sys.argv[1])
