"""The queue in front of the engine: which requests start in which step.

A step with prompts in it makes the device wait for the host, so what can be done beforehand is
done while a burst of decode steps runs, and the places of ended requests are filled several at a
time, in numbers that fill a captured size of the step.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.generation.decode import DecodeLoop
from megatron_irl.generation.requests import RequestTable

from megatron.core.inference.inference_request import DynamicInferenceRequest  # isort: skip
from megatron.core.inference.sampling_params import SamplingParams  # isort: skip

WASTE = 0.1  # share of a captured step that may be padding before prompts are left for the next


class Intake:
    """Requests of one ``generate`` call that have not started.

    Args:
        engine: Megatron's dynamic engine.
        prompts: int32 [length] each.
        table: Budgets and random numbers of the requests.
        together: Places to fill at a time.

    Attributes:
        together: As given.
    """

    def __init__(
        self, engine: Any, prompts: Sequence[np.ndarray], table: RequestTable, together: int
    ) -> None:
        self._engine, self._prompts, self._table = engine, prompts, table
        self.together = together
        self._places = int(engine.context.max_requests)
        self._order = deque(start_order(table.budgets, self._places))
        self._prepared: deque[DynamicInferenceRequest] = deque()
        sizes = engine.context.cuda_graph_batch_dimensions_list or []
        self._captured = sorted(size.token_count for size in sizes if size.prefill_req_count)
        self.prepare()

    @property
    def waiting(self) -> int:
        """Requests that have not started, those that the engine has evicted included."""
        evicted = len(self._engine.waiting_request_ids)
        return len(self._order) + len(self._prepared) + evicted

    def prepare(self) -> None:
        """Build what the engine wants of the next requests; worth doing while the device works."""
        while self._order and len(self._prepared) < self._places:
            request = self._order.popleft()
            self._prepared.append(
                _request(self._engine, request, self._prompts[request],
                         self._table.budgets[request])
            )
            self._table.prepare(request)

    def fits(self) -> bool:
        """Whether the next request could start now."""
        engine = self._engine
        if engine.waiting_request_ids:
            head = engine.get_request(engine.waiting_request_ids[0])
        elif self._prepared:
            head = self._prepared[0]
        else:
            return False
        return engine._can_schedule_non_chunked_prefill(head, record_cg_wait=False)

    def hand_over(self) -> None:
        """Give the engine what its next step shall take up; evicted requests go first."""
        self.prepare()
        context, engine = self._engine.context, self._engine
        free = self._places - int(context.total_request_count) - len(engine.waiting_request_ids)
        upcoming = itertools.islice(self._prepared, max(0, free))
        lengths = [len(self._prompts[request.request_id]) for request in upcoming]
        for _ in range(take(lengths, int(context.total_request_count), self._captured)):
            engine._add_request(self._prepared.popleft())


def steps(
    engine: Any, loop: DecodeLoop, prompts: Sequence[np.ndarray], table: RequestTable
) -> Iterator[list[int]]:
    """Run the engine until all requests are sampled; yield those that have ended, step by step.

    A step with prompts in it costs the host far more than a decode step. So the places of ended
    requests are filled several at a time, unless the host looks at every step anyway.
    """
    places = int(engine.context.max_requests)
    # An eighth: fewer make too many steps with prompts, more leave too many places empty.
    intake = Intake(engine, prompts, table, max(1, places // 8) if loop.burst_steps > 1 else 1)
    cut = False  # the last step took fewer prompts than it was given
    while intake.waiting or engine.has_unfinished_requests():
        free = places - int(engine.context.total_request_count)
        enough = cut or free >= min(intake.together, intake.waiting)
        cut = False
        if not loop.ready() or (intake.waiting and enough and intake.fits()):
            intake.hand_over()
            engine.schedule_waiting_requests()
            cut = bool(engine.waiting_request_ids)
        # Whether a burst comes next or one of Megatron's own steps, and how long a burst is,
        # follows from queue and cache, which are the same on every rank of the replica.
        if loop.ready():
            free = places - int(engine.context.total_request_count)
            wanted = max(1, intake.together - free) if intake.waiting else None
            yield loop.run(table, wanted=wanted, single=cut, meanwhile=intake.prepare)
        else:
            loop.pause()
            stepped: Any = engine.step_modern()
            yield [record[-1].request_id for record in stepped["finished_request_records"]]
    loop.pause()


def start_order(budgets: Sequence[int], places: int) -> list[int]:
    """The order in which requests start: as given, but the last ones the longest first.

    With the queue at its end places stay empty, for as long as the last requests to start may run.
    No sample depends on the order.
    """
    # Three rounds of places: the order only matters near the end, and before it ``as given`` lets
    # parts of the bank complete, and be committed, one after the other.
    tail = max(0, len(budgets) - 3 * places)
    return [*range(tail), *sorted(range(tail, len(budgets)), key=lambda n: -budgets[n])]


def take(lengths: Sequence[int], decoding: int, captured: Sequence[int]) -> int:
    """How many of the next prompts a step shall take.

    Args:
        lengths: Of the prompts there is a place for.
        decoding: Requests that decode in the same step, a token each.
        captured: Token counts of steps with prompts that are captured, ascending. A step runs
            padded to the next of them; a larger one runs as it is.

    Returns:
        All of them, unless at least half of them fill a captured size far better.
    """
    totals = decoding + np.cumsum(lengths, dtype=np.int64)
    if not len(totals) or not captured or totals[-1] > captured[-1]:
        return len(totals)
    size = next(n for n in captured if n >= totals[-1])
    if size - totals[-1] <= WASTE * size:
        return len(totals)
    smaller = [n for n in captured if n < size]
    fewer = int(np.searchsorted(totals, smaller[-1], side="right")) if smaller else 0
    return fewer if 2 * fewer >= len(totals) else len(totals)


def _request(engine: Any, number: int, prompt: np.ndarray, budget: int) -> DynamicInferenceRequest:
    # Sampling is the sampler's business; stopping by id is the controller's. The prompt stays on
    # the host (engine.add_request would ask for it on the device): bookkeeping copies it there.
    context = engine.context
    return DynamicInferenceRequest(
        request_id=number,
        prompt_tokens=torch.as_tensor(np.asarray(prompt, dtype=np.int64)),
        sampling_params=SamplingParams(num_tokens_to_generate=int(budget), termination_id=-1),
        block_size_tokens=context.block_size_tokens,
        enable_prefix_caching=context.enable_prefix_caching,
    )
