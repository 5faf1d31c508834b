import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import megatron_irl.hardware  # noqa: F401
from megatron_irl.errors import UserError
from megatron_irl.generation import SamplingConfig, megatron_engine
from megatron_irl.generation.borrow import borrow
from megatron_irl.generation.context import PagedContext
from megatron_irl.generation.engine import BuiltEngine
from megatron_irl.generation.graphs import LayerGraphs
from tests.unit.generation.exact import EXACT

EOS = 1
SAMPLED = SamplingConfig(max_new_tokens=12, seed=3, eos_id=EOS)


def ids(samples):
    return [s.token_ids.tolist() for s in samples]


def test_same_seed_same_samples_and_order_of_input(make, prompts):
    generator = make()
    first = ids(generator.generate(prompts, SAMPLED))
    assert first == ids(generator.generate(prompts, SAMPLED))
    generator.close()
    assert first == ids(generator.generate(prompts, SAMPLED)), "usable again after close"
    swapped = generator.generate(prompts[::-1], SAMPLED, keys=range(len(prompts))[::-1])
    assert first == ids(swapped)[::-1]


@pytest.mark.parametrize("burst", [1, 5, 16])
def test_the_caller_ends_a_response_and_no_other_changes(make, prompts, burst):
    """Within a burst of when it has seen enough; others have the tokens they had, and the place."""
    whole = make().generate(prompts, SAMPLED)
    generator, enough, seen = make(burst_steps=burst, max_requests=2), {0: 2, 3: 5, 8: 1}, []

    def ends(request, token_ids):
        seen.append((request, len(token_ids)))
        return len(token_ids) >= enough.get(request, 99)

    found = generator.generate(prompts, SAMPLED, ends=ends)
    for request, (got, expected) in enumerate(zip(found, whole, strict=True)):
        count = len(got.token_ids)
        assert got.token_ids.tolist() == expected.token_ids.tolist()[:count]
        if request in enough and len(expected.token_ids) > enough[request] + burst:
            assert enough[request] <= count < enough[request] + burst
            assert got.finish_reason == "stop" and (request, count) in seen
        elif request not in enough:
            assert count == len(expected.token_ids)
            assert got.finish_reason == expected.finish_reason
    assert ids(generator.generate(prompts, SAMPLED)) == ids(whole), "the cache is in order"


@pytest.mark.parametrize(
    "options",
    [
        {"max_requests": 1},
        {"max_requests": 64},
        {"block_tokens": 4},
        {"burst_steps": 5},
        {"burst_steps": 16, "block_tokens": 4},
        {"burst_steps": 3, "max_requests": 2},
        {"burst_steps": 4, "block_tokens": 4, "share_prompts": True},
    ],
)
def test_batching_and_cache_size_do_not_change_samples(make, prompts, options):
    expected = make().generate(prompts, SAMPLED)
    got = make(**options).generate(prompts, SAMPLED)
    assert ids(got) == ids(expected)
    for a, b in zip(got, expected, strict=True):
        # A killed run goes on with other company in its steps: it must not show in any bit.
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=0 if EXACT else 1e-5)


@pytest.mark.parametrize("burst", [1, 7])
def test_eviction_and_recomputation_do_not_change_samples(make, prompts, burst):
    expected = make().generate(prompts, SAMPLED)
    block_bytes = 2 * 2 * 4 * 4 * 8 * 4  # k and v, layers, tokens, key heads, head size, fp32
    generator = make(block_tokens=4, kv_cache_gb=16 * block_bytes / 2**30, burst_steps=burst)
    got = generator.generate(prompts, SAMPLED)
    assert generator.engine.evicted_request_count > 0
    assert ids(got) == ids(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_share_of_the_prompts_gives_the_same_samples(make, prompts):
    everything = ids(make().generate(prompts, SAMPLED))
    share = slice(1, None, 2)
    part = make().generate(prompts[share], SAMPLED, keys=range(len(prompts))[share])
    assert ids(part) == everything[share]


def test_several_stop_ids(make, prompts):
    free = make().generate(prompts, SamplingConfig(max_new_tokens=12, seed=3, eos_id=10**6))
    stops = {int(free[0].token_ids[4]), int(free[2].token_ids[2])}
    eos, *others = stops
    sampling = SamplingConfig(max_new_tokens=12, seed=3, eos_id=eos, stop_ids=tuple(others))
    for want, got in zip(free, make().generate(prompts, sampling), strict=True):
        cut = next((i + 1 for i, t in enumerate(want.token_ids) if int(t) in stops), None)
        assert got.token_ids.tolist() == want.token_ids[:cut].tolist()
        assert len(got.logprobs) == len(got.token_ids)
        assert got.finish_reason == ("length" if cut is None else "stop")


def test_budgets_per_prompt_and_progress(make, prompts):
    budgets = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    seen = []
    samples = make().generate(
        prompts, SamplingConfig(eos_id=10**6), lambda *numbers: seen.append(numbers),
        max_new_tokens=budgets,
    )
    assert [len(s.token_ids) for s in samples] == budgets
    assert {s.finish_reason for s in samples} == {"length"}
    assert seen[-1] == (len(prompts), sum(budgets))
    assert seen == sorted(seen)


def test_ids_of_vocabulary_padding_are_never_sampled(make, prompts):
    samples = make(vocab_size=20).generate(prompts, SAMPLED)
    assert max(int(s.token_ids.max()) for s in samples) < 20


def test_prompts_that_do_not_fit_are_the_users_error(make):
    generator = make()
    with pytest.raises(UserError, match="prompt 1 has 37 tokens.*max_new_tokens=12"):
        generator.generate([np.arange(36, dtype=np.int32), np.arange(37, dtype=np.int32)], SAMPLED)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generator.generate([np.zeros(0, np.int32)], SAMPLED)
    with pytest.raises(UserError, match="kv_cache_gb=1e-06"):
        make(kv_cache_gb=1e-6).generate([np.arange(3, dtype=np.int32)], SAMPLED)
    assert generator.generate([], SAMPLED) == []


def test_the_step_size_is_a_multiple_of_the_token_rounding(make, prompts, monkeypatch):
    """Every step is padded to it, so the last tokens below the limit need room to be padded."""
    monkeypatch.setattr(PagedContext, "TOKEN_ROUNDER", 64)
    generator = make(max_sequence_length=4100)
    generator.generate(prompts[:1], SamplingConfig(max_new_tokens=1))
    assert generator.engine.context.max_tokens == 4160


def test_close_frees_the_cache(make, prompts):
    generator = make()
    generator.generate(prompts, SAMPLED)
    cache = weakref.ref(generator.engine.context.memory_buffer)
    engine = weakref.ref(generator.engine)
    assert cache() is not None
    gc.disable()
    try:
        generator.close()
        assert cache() is None, "the cache must not wait for the garbage collector"
    finally:
        gc.enable()
    gc.collect()
    assert engine() is None


def test_an_exception_leaves_module_and_generator_usable(model, make, prompts):
    from megatron.core.inference.utils import InferenceMode

    (chunk,), _ = model
    generator = make()
    expected = ids(generator.generate(prompts, SAMPLED))
    chunk.train()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(prompts, SAMPLED, interrupt)
    assert chunk.training and all(m.training for m in chunk.modules())
    assert not InferenceMode.is_active()
    assert ids(generator.generate(prompts, SAMPLED)) == expected


def test_a_model_that_trains_in_fp8_is_lent_in_bf16(model, monkeypatch):
    """The engine would otherwise wrap Transformer Engine's layers for good."""
    chunks, _ = model
    config = chunks[0].config
    monkeypatch.setattr(config, "fp8", "hybrid")
    with borrow(chunks):
        assert (config.fp8, config.fp4) == (None, None)
    assert config.fp8 == "hybrid"
    with pytest.raises(KeyboardInterrupt), borrow(chunks):
        raise KeyboardInterrupt
    assert config.fp8 == "hybrid"


def test_an_fp32_model_uses_the_attention_that_takes_fp32(model, monkeypatch):
    """flash-attn 3 and 4 do not, and are preferred where they are installed."""
    chunks, _ = model
    attention = chunks[0].decoder.layers[0].self_attention
    with borrow(chunks):
        assert attention._resolve_flash_version() == (False, False)
        assert attention.flash_attention_version == 2
    assert attention.flash_attention_version is None
    monkeypatch.setattr(chunks[0].config, "params_dtype", torch.bfloat16)
    with borrow(chunks):
        assert attention.flash_attention_version is None


def test_training_backward_after_generation(model, make, prompts):
    (chunk,), _ = model
    chunk.train()
    tokens, positions = torch.arange(3, 23)[None], torch.arange(20)[None]

    def gradients():
        chunk.zero_grad()
        chunk(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
        return {name: p.grad.clone() for name, p in chunk.named_parameters()}

    before = gradients()
    # A sequence length that training has not used: its rotary angles get cached by generation.
    make(max_sequence_length=20).generate(
        [np.arange(3, 9, dtype=np.int32)], SamplingConfig(max_new_tokens=3)
    )
    after = gradients()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert not any(p.is_inference() for p in chunk.parameters())


def test_a_failed_capture_decodes_without_graphs_and_warns_once(make, prompts, monkeypatch):
    expected = ids(make().generate(prompts, SAMPLED))
    asked, build = [], BuiltEngine._build

    def failing(self, cuda_graphs):
        asked.append(cuda_graphs)
        if cuda_graphs is not None:
            raise torch.OutOfMemoryError("planted")
        return build(self, cuda_graphs)

    monkeypatch.setattr(BuiltEngine, "_build", failing)
    monkeypatch.setattr(megatron_engine, "why_not_captured", lambda *_: None)
    monkeypatch.setattr(LayerGraphs, "lent", lambda _: nullcontext())
    generator = make(cuda_graphs=3)
    with pytest.warns(UserWarning, match="without CUDA graphs.*planted") as warned:
        assert ids(generator.generate(prompts, SAMPLED)) == expected
        assert ids(generator.generate(prompts, SAMPLED)) == expected
    assert asked == [3, None] and len(warned) == 1 and generator.graph_count == 0


def test_angles_do_not_outlive_a_pass(make, prompts, monkeypatch):
    """What a captured pass reads, it must have computed itself."""
    expected = ids(make(burst_steps=4).generate(prompts, SAMPLED))
    forget = PagedContext.follow_device

    def keeps_angles(self):
        angles = self._angles
        forget(self)
        self._angles = angles

    monkeypatch.setattr(PagedContext, "follow_device", keeps_angles)
    assert ids(make(burst_steps=4).generate(prompts, SAMPLED)) == expected


def test_finished_samples_are_handed_back_as_they_end(make, prompts):
    seen = {}
    samples = make(max_requests=2).generate(
        prompts, SAMPLED, on_finished=lambda i, sample: seen.setdefault(i, sample),
        max_new_tokens=[12, 3, 5, 7, 2, 12, 4, 9, 1],
    )
    assert sorted(seen) == list(range(len(prompts))) and list(seen) != sorted(seen)
    assert all(seen[i] is sample for i, sample in enumerate(samples))


def test_seeds_of_their_own(make, prompts):
    expected = ids(make().generate(prompts, SAMPLED))
    other = replace(SAMPLED, seed=99)
    assert ids(make().generate(prompts, other, seeds=[SAMPLED.seed] * len(prompts))) == expected
    assert ids(make().generate(prompts, other)) != expected


def test_the_cache_stays_over_pauses_if_it_may(make, prompts):
    generator = make(keep_cache="true")
    first = ids(generator.generate(prompts, SAMPLED))
    engine = generator.engine
    generator.pause()
    assert generator.engine is engine and ids(generator.generate(prompts, SAMPLED)) == first
    freed = make(keep_cache="auto")
    freed.generate(prompts, SAMPLED)
    freed.pause()
    assert freed.engine is None, "nothing is known of the memory that training takes"
