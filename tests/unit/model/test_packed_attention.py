"""Packed attention equals attention written out one sequence, one head, one query at a time."""

from types import SimpleNamespace

import pytest
import torch

from megatron_irl.model import packed_attention
from megatron_irl.model.packed_attention import PackedAttention, padded_layout

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def attention(
    window: int | None = None, scale: float | None = None, softcap: float | None = None
) -> PackedAttention:
    config = SimpleNamespace(
        window_size=None if window is None else (window - 1, 0), window_attn_skip_freq=None,
        attention_dropout=0.0,
    )
    return PackedAttention(config, 1, None, "self", softmax_scale=scale, softcap=softcap)


def written_out(q, k, v, lengths, window, scale, softcap=None):
    """Query i of a sequence sees keys max(0, i - window + 1) .. i of the same sequence."""
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            for head in range(HEADS):
                mine = head // (HEADS // KEY_HEADS)
                scores = k[first : i + 1, mine] @ q[i, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[i, head] = scores.softmax(0) @ v[first : i + 1, mine]
        start += length
    return out.flatten(1)


def run(module, q, k, v, lengths):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = SimpleNamespace(padded_layout=padded_layout(bounds, q.device))
    return module(q, k, v, packed_seq_params=packed)


def random_inputs(total, dtype):
    return [
        torch.randn(total, heads, SIZE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


@pytest.mark.parametrize("short", [True, False], ids=["products", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[5], [7, 1, 4], [3, 9]])
def test_equals_attention_written_out(monkeypatch, short, window, lengths):
    monkeypatch.setattr(packed_attention, "SHORT", {torch.float64: 100 if short else 0})
    inputs = random_inputs(sum(lengths), torch.float64)
    scale = 0.3
    ours = run(attention(window, scale), *inputs, lengths)
    theirs = written_out(*inputs, lengths, window, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad),
        rtol=1e-8, atol=1e-9,
    )


@pytest.mark.parametrize("window", [None, 3])
def test_soft_caps_come_after_the_scale_and_before_the_mask(window):
    lengths = [7, 1, 4]
    inputs = random_inputs(sum(lengths), torch.float32)
    ours = run(attention(window, 0.9, softcap=0.5), *inputs, lengths)
    theirs = written_out(*inputs, lengths, window, 0.9, softcap=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, written_out(*inputs, lengths, window, 0.9), atol=1e-2)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad),
        rtol=1e-4, atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_agree_at_the_longest_short_length(monkeypatch, dtype):
    lengths = [packed_attention.SHORT[dtype], 17]
    inputs = random_inputs(sum(lengths), dtype)
    short = run(attention(), *inputs, lengths)
    monkeypatch.setattr(packed_attention, "SHORT", {})
    fused = run(attention(), *inputs, lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(short, fused, rtol=tolerance, atol=tolerance)


def test_unpacked_input_is_one_sequence_per_batch_column():
    q, k, v = random_inputs(10, torch.float32)
    packed = run(attention(), q, k, v, [5, 5])
    batch = (x.unflatten(0, (2, 5)).transpose(0, 1) for x in (q, k, v))
    torch.testing.assert_close(attention()(*batch).transpose(0, 1).flatten(0, 1), packed)
