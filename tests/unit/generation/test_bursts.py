"""Requests, keys, bursts and memory: what decoding does beside the model."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_irl import hardware
from megatron_irl.generation import decode
from megatron_irl.generation.cache_size import mixed_graph_tokens, step_tokens
from megatron_irl.generation.context import PagedContext
from megatron_irl.generation.device_steps import DeviceSteps
from megatron_irl.generation.interface import SAMPLES_PER_PROMPT, SamplingConfig, request_key
from megatron_irl.generation.requests import RequestTable
from megatron_irl.generation.residency import Residency
from megatron_irl.generation.sampling import bisect_nucleus, filter_weights, uniforms
from tests.unit.generation.exact import EXACT

SAMPLING = SamplingConfig(max_new_tokens=6, eos_id=2, stop_ids=(9,))


def test_keys_of_prompts_and_samples_never_meet():
    keys = {request_key(o, s) for o in (0, 1, 2, 10**9) for s in (0, 1, SAMPLES_PER_PROMPT - 1)}
    assert len(keys) == 12 and max(keys) < 2**63


def record(table, requests, tokens, counts=None):
    """Append tokens [K][B]; the log-probability of token t is -t."""
    tokens = np.array(tokens)
    counts = np.full(len(requests), len(tokens)) if counts is None else np.array(counts)
    table.record(requests, tokens, -tokens.astype(np.float32), counts)


def test_a_request_draws_its_own_stream_however_it_is_asked():
    table = RequestTable(SAMPLING, [6, 4], [(7, 100), (8, 5)])
    np.testing.assert_array_equal(table.uniforms([0, 1], 3)[:, 0], uniforms(7, 100, 6)[:3])
    record(table, [0], [[5], [6]])
    block = table.uniforms([1, 0], 8)
    np.testing.assert_array_equal(block[:4, 1], uniforms(7, 100, 6)[2:])
    np.testing.assert_array_equal(block[:4, 0], uniforms(8, 5, 4))
    assert not block[4:].any(), "nothing past a budget"
    assert not RequestTable(SamplingConfig(temperature=0.0), [3], [(0, 0)]).uniforms([0], 3).any()


def test_table_keeps_and_drops_a_response():
    table = RequestTable(SAMPLING, [6], [(0, 0)])
    record(table, [0], [[5], [6]])
    record(table, [0], [[9]])
    assert table.left([0]).tolist() == [3] and table.lengths([0]).tolist() == [3]
    sample = table.finish(0)
    assert sample.token_ids.tolist() == [5, 6, 9] and sample.finish_reason == "stop"
    assert sample.logprobs.tolist() == [-5.0, -6.0, -9.0]


def test_any_number_of_requests_share_the_table():
    rng = np.random.default_rng()
    budgets = rng.integers(1, 9, 60).tolist()
    streams = [(5, 10 * n) for n in range(60)]
    table = RequestTable(SamplingConfig(eos_id=99), budgets, streams)
    expected = {n: rng.integers(0, 99, budgets[n]).tolist() for n in range(60)}
    waiting, active = list(rng.permutation(60)), []
    while waiting or active:
        while waiting and len(active) < 25:  # more than the first table has rows
            active.append(int(waiting.pop()))
            table.prepare(active[-1])
        rng.shuffle(active)
        done = table.lengths(active)
        counts = np.minimum(table.left(active), rng.integers(1, 4))
        steps = int(counts.max())
        drawn = table.uniforms(active, steps)
        tokens = np.full((steps, len(active)), -1)  # of no request where it has ended
        for column, request in enumerate(active):
            span = slice(done[column], done[column] + counts[column])
            tokens[: counts[column], column] = expected[request][span]
            numbers = uniforms(*streams[request], budgets[request])[span]
            np.testing.assert_array_equal(drawn[: counts[column], column], numbers)
        record(table, active, tokens, counts)
        for request in [r for r, left in zip(active, table.left(active), strict=True) if not left]:
            active.remove(request)
            assert table.finish(request).token_ids.tolist() == expected[request]
    assert table.token_count == sum(budgets)


class _View:
    def __init__(self, rows, blocks):
        self.token_to_input_ids = torch.zeros(rows, dtype=torch.long)
        self.token_to_pos_ids = torch.tensor([3, 5, 0, 0])
        self.token_to_position_in_request = torch.tensor([3, 5, 0, 0], dtype=torch.int32)
        self.token_to_block_idx = torch.tensor([10, 21, 99, 99])
        self.token_to_local_position_within_kv_block = torch.tensor([3, 1, 0, 0], dtype=torch.int32)
        self.mha_kv_seq_lengths = torch.tensor([4, 6, 0, 0], dtype=torch.int32)
        self.mha_block_table = torch.tensor(blocks, dtype=torch.int32)


class _Context:
    block_size_tokens = 4

    def __init__(self):
        self.gpu_view = _View(4, [[10, 11, -1], [20, 21, 22], [-1] * 3, [-1] * 3])


def test_rows_advance_stop_and_stay_by_hand():
    context = _Context()
    steps = DeviceSteps(
        context, rows=4, steps=3, vocab_size=12, device=torch.device("cpu"), capture=False
    )
    steps.choose(SAMPLING)
    steps.begin(np.zeros((3, 2)), np.array([3, 3]))
    for tokens in ([5, 6], [7, 2], [8, 1]):  # the second row ends with 2, padding rows never live
        steps.advance(torch.tensor([*tokens, 0, 0]), torch.zeros(4))
    tokens, _, was_live, live = steps.collect(3, 2)
    assert tokens[:, 0].tolist() == [5, 7, 8] and was_live[:, 0].tolist() == [True] * 3
    assert was_live[:, 1].tolist() == [True, True, False], "what comes after a stop is not its"
    assert live.tolist() == [False, False], "the first used its budget up"
    view = context.gpu_view
    assert view.token_to_pos_ids.tolist() == [5, 6, 0, 0]
    assert view.mha_kv_seq_lengths.tolist() == [6, 7, 0, 0]
    assert view.token_to_block_idx.tolist() == [11, 21, 99, 99], "the next block; the dummy stays"
    assert view.token_to_local_position_within_kv_block.tolist() == [1, 2, 0, 0]
    assert view.token_to_input_ids.tolist() == [7, 6, 0, 0]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_without_sorting_is_the_sorted_one(top_p):
    rng = torch.Generator().manual_seed(3)
    weights = torch.rand(50, 700, generator=rng) ** 6
    weights[:, ::7] = 0.0
    expected = filter_weights(weights.clone(), 0, top_p)
    got = weights.clone()
    bisect_nucleus(got, top_p)
    assert torch.equal(got, expected)


class _Config:
    num_layers, hidden_size, ffn_hidden_size, params_dtype = 22, 2048, 5632, torch.bfloat16
    tensor_model_parallel_size, pipeline_model_parallel_size = 1, 1
    num_moe_experts = None


class _Experts(_Config):
    """An eighth of the width in each of 64 experts, of which a token goes to eight."""

    ffn_hidden_size, num_moe_experts, moe_router_topk = 704, 64, 8
    expert_model_parallel_size = expert_tensor_parallel_size = 1


def test_graphs_of_steps_with_prompts_only_where_the_host_is_the_slower(monkeypatch):
    small = mixed_graph_tokens(_Config, 64, 40960)
    assert small == sorted(small) and small[0] > 64 and max(small) <= 40960
    large = type("Large", (_Config,), {"hidden_size": 8192, "ffn_hidden_size": 28672})
    assert max(mixed_graph_tokens(large, 64, 40960), default=0) < max(small)
    halves = type("Tp", (_Config,), {"tensor_model_parallel_size": 3})
    assert all(n % 3 == 0 for n in mixed_graph_tokens(halves, 63, 40960))
    assert mixed_graph_tokens(_Experts, 64, 40960) == small, "as many products a token"
    assert step_tokens(_Config) == 4096  # on CPU
    monkeypatch.setattr("megatron_irl.generation.cache_size.hardware.IS_CUDA", True)
    assert 4096 < step_tokens(_Config) <= 65536 and step_tokens(large) >= 4096
    # Beside as many inner numbers it has eight rows of 2048 twice: 2^31 bytes over two times
    # 8 * (3 * 704 + 2 * 2048) + 4 * 2048 is 18,558 tokens.
    assert step_tokens(_Experts) == 16384 < step_tokens(_Config)


def test_cache_stays_where_training_was_measured_to_leave_room():
    residency = Residency("auto", None)
    residency.cache_bytes = 20
    assert not residency.fits(100, 0), "nothing is known of training yet"
    residency.peak_train = 60
    assert residency.fits(100, 0) and not residency.fits(100, 16) and not residency.fits(80, 0)
    residency._resident = 20  # the measured phase held the cache already
    residency.peak_train = 80
    assert residency.fits(100, 0)


@pytest.mark.parametrize(("keep", "stays"), [("auto", False), ("true", True), ("false", False)])
def test_on_cpu_the_cache_stays_if_asked(keep, stays):
    residency = Residency(keep, None)
    residency.begin_generation()
    assert residency.end_generation() is stays
    assert residency.end_generation() is stays, "asked twice, answered alike"


def test_only_training_counts_as_training(monkeypatch):
    """A pass that only scores takes less than the optimizer will."""
    peaks = iter([5, 70, 30, 60, 20, 50])
    monkeypatch.setattr(hardware, "peak_memory", lambda: next(peaks))
    residency = Residency("false", None)
    residency.begin_generation()
    residency.end_generation()
    residency.begin_generation()  # after scoring alone
    assert residency.peak_train is None and residency.peak_generation == 5
    residency.end_generation()
    residency.note_update()
    residency.begin_generation()
    assert residency.peak_train == 30
    residency.end_generation()
    residency.note_update()
    residency.begin_generation()
    assert residency.peak_train == 30, "the most there was"


def test_prompts_and_the_steps_after_them_are_one_burst(make, monkeypatch):
    """The host looks at what was sampled once a burst, with prompts in it or without.

    Requests that end with their prompt's step, by budget or by id, and prompts that end where a
    block of the cache does, have the samples of the engine that looks after every token.
    """
    rng, sampling = np.random.default_rng(), SamplingConfig(max_new_tokens=12, seed=3, eos_id=1)
    prompts = [rng.integers(3, 128, n).astype(np.int32) for n in rng.integers(1, 37, 40)]
    prompts[:4] = [np.full(n, 7, np.int32) for n in (4, 4, 8, 36)]  # blocks have 4 tokens
    budgets = rng.integers(1, 13, 40).tolist()
    budgets[:4] = [1, 12, 1, 12]
    first = make().generate(prompts, sampling, max_new_tokens=[1] * 40)
    stops = tuple({int(sample.token_ids[0]) for sample in first[6:7]})
    sampling = replace(sampling, stop_ids=stops)
    expected = make().generate(prompts, sampling, max_new_tokens=budgets)

    looks, with_prompts = [], []
    collect, leave = DeviceSteps.collect, PagedContext.leave_prompts
    monkeypatch.setattr(
        DeviceSteps, "collect", lambda *args: looks.append(args[1]) or collect(*args)
    )
    monkeypatch.setattr(
        PagedContext, "leave_prompts", lambda *args: with_prompts.append(0) or leave(*args)
    )
    generator = make(burst_steps=16, block_tokens=4, max_requests=8)
    generator.generate(prompts[:1], sampling)
    monkeypatch.setattr(type(generator.engine), "step_modern", None)  # its own step waits
    looks.clear(), with_prompts.clear()
    found = generator.generate(prompts, sampling, max_new_tokens=budgets)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=0 if EXACT else 1e-5)
    assert with_prompts and len(looks) < sum(looks)


@pytest.mark.parametrize("share", [True, False])
def test_a_request_that_ends_with_its_prompt_leaves_shared_blocks_alone(make, share):
    """Its prompt ends where a block does, and the others read that block."""
    prompts = [np.arange(3, 11, dtype=np.int32)] * 6
    sampling, budgets = SamplingConfig(max_new_tokens=12, seed=3, eos_id=999), [12, 1, 12, 1, 12, 5]
    expected = make().generate(prompts, sampling, max_new_tokens=budgets)
    generator = make(burst_steps=16, block_tokens=4, max_requests=4, share_prompts=share)
    found = generator.generate(prompts, sampling, max_new_tokens=budgets)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_another_seed_or_budget_needs_no_other_recording():
    steps = DeviceSteps(
        _Context(), rows=4, steps=3, vocab_size=12, device=torch.device("cpu"), capture=False
    )
    for seed in range(3):
        steps.choose(replace(SAMPLING, seed=seed, max_new_tokens=9 + seed))
    steps.choose(replace(SAMPLING, temperature=0.5))
    assert len(steps._stops) == 2


def test_the_time_between_bursts_is_told_once(make, monkeypatch):
    """Of the device's time only what no burst fills, and only since it was asked last.

    The clock stands still but for a quarter of a second a look, and between two calls.
    """
    generator, clock = make(burst_steps=8, max_requests=2), SimpleNamespace(now=0.0)
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    prompts, sampling = [np.full(3, 7, np.int32)] * 6, SamplingConfig(max_new_tokens=9, eos_id=999)
    bursts, run = [], decode.DecodeLoop.run
    monkeypatch.setattr(decode.DecodeLoop, "run", lambda *args, **options: (
        bursts.append(clock.now) or run(*args, **options)))

    def pass_time(*_):
        clock.now += 0.25

    def told():
        with monkeypatch.context() as patch:
            patch.setattr(hardware, "IS_CUDA", True)
            return generator.costs()["host_seconds"]

    generator.generate(prompts, sampling, on_progress=pass_time)
    assert told() == 0.25 * (len(bursts) - 1) > 0 and told() == 0
    clock.now += 100.0  # between calls nobody waits
    generator.generate(prompts[:2], replace(sampling, max_new_tokens=1), on_progress=pass_time)
    assert told() == 0
