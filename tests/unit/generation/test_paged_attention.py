import numpy as np
import pytest
import torch

from megatron_irl.compat import attention_kernels
from megatron_irl.hardware.paged_attention import flash_attn_varlen_func, flash_attn_with_kvcache

HEADS, KEY_HEADS, SIZE = 6, 2, 8


class Paged:
    """Random sequences written into shuffled cache blocks, and attention the slow way."""

    def __init__(self, lengths, block, total, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.keys = [torch.randn(n, KEY_HEADS, SIZE, generator=rng) for n in lengths]
        self.values = [torch.randn(n, KEY_HEADS, SIZE, generator=rng) for n in lengths]
        # What no sequence wrote holds large numbers, so that reading it shows.
        self.k_cache = torch.full((total, block, KEY_HEADS, SIZE), 50.0)
        self.v_cache = torch.full_like(self.k_cache, 50.0)
        order = iter(torch.randperm(total, generator=rng).tolist())
        widest = max(-(-n // block) for n in lengths) + 1
        self.table = torch.full((len(lengths), widest), -1, dtype=torch.int32)
        for row, n in enumerate(lengths):
            for i in range(-(-n // block)):
                page = slice(i * block, min(n, (i + 1) * block))
                self.table[row, i] = next(order)
                width = page.stop - page.start
                self.k_cache[self.table[row, i], :width] = self.keys[row][page]
                self.v_cache[self.table[row, i], :width] = self.values[row][page]

    def expected(self, row, q, window=None, softcap=None):
        """q [n, N, D], the last n positions of the sequence."""
        group = HEADS // KEY_HEADS
        k = self.keys[row].repeat_interleave(group, 1)
        v = self.values[row].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        n, total = len(q), len(k)
        places = torch.arange(total - n, total)[:, None]
        hidden = torch.arange(total) > places
        if window is not None:
            hidden |= places - torch.arange(total) >= window
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -1e9).softmax(-1), v)


@pytest.mark.parametrize(
    ("lengths", "block", "total"),
    [
        ([3, 9, 1, 5], 16, 4),  # one block each, all blocks in use: read in place
        ([5, 5, 5], 16, 3),  # equal lengths: no mask
        ([3, 9, 1, 5], 16, 40),  # scattered blocks: gathered
        ([3, 17, 1, 8, 9], 4, 30),  # several blocks each
    ],
)
def test_decode(lengths, block, total):
    paged = Paged(lengths, block, total)
    q = torch.randn(len(lengths), 1, HEADS, SIZE)
    out = flash_attn_with_kvcache(
        q, paged.k_cache, paged.v_cache,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32), block_table=paged.table,
    )
    for row in range(len(lengths)):
        torch.testing.assert_close(out[row], paged.expected(row, q[row]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("total", [3, 30])
def test_decode_padding_rows_leave_the_others_alone(total):
    paged = Paged([4, 7, 2], 8, total)
    q = torch.randn(5, 1, HEADS, SIZE)
    table = torch.cat([paged.table, torch.full((2, 2), -1, dtype=torch.int32)])
    out = flash_attn_with_kvcache(
        q, paged.k_cache, paged.v_cache,
        cache_seqlens=torch.tensor([4, 7, 2, 0, 0], dtype=torch.int32), block_table=table,
    )
    assert torch.isfinite(out).all()
    for row in range(3):
        torch.testing.assert_close(out[row], paged.expected(row, q[row]), atol=1e-5, rtol=1e-5)


def test_decode_layout_follows_lengths_changed_in_place():
    paged = Paged([4, 7], 8, 2)
    lengths = torch.tensor([4, 7], dtype=torch.int32)
    q = torch.randn(2, 1, HEADS, SIZE)

    def run():
        return flash_attn_with_kvcache(
            q, paged.k_cache, paged.v_cache, cache_seqlens=lengths, block_table=paged.table
        )

    run()
    lengths -= 1
    paged.keys = [k[:-1] for k in paged.keys]
    paged.values = [v[:-1] for v in paged.values]
    torch.testing.assert_close(run()[0], paged.expected(0, q[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [4, 32])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([5, 3, 9], [5, 3, 9]),  # new prompts
        ([1, 5, 1, 30, 2], [8, 5, 1, 30, 2]),  # decode and prompts of very different lengths
        ([3, 4], [9, 4]),  # one continues a cached prefix
    ],
)
def test_mixed(block, queries, keys):
    paged = Paged(keys, block, 40)
    padding = 3
    q = torch.randn(sum(queries) + padding, HEADS, SIZE)
    cu_q = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
    cu_k = torch.tensor([0, *keys], dtype=torch.int32).cumsum(0).int()
    out = flash_attn_varlen_func(
        q, paged.k_cache, paged.v_cache, cu_q, cu_k, max(queries), max(keys),
        block_table=paged.table,
    )
    assert torch.equal(out[-padding:], torch.zeros(padding, HEADS, SIZE))
    for row, (start, stop) in enumerate(zip(cu_q[:-1], cu_q[1:], strict=True)):
        part = q[start:stop]
        expected = paged.expected(row, part)
        torch.testing.assert_close(out[start:stop], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("total", [4, 40])
@pytest.mark.parametrize("softcap", [None, 0.3])
@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_windows_hide_what_lies_before(window, total, softcap):
    queries, keys = [1, 5, 1, 3], [8, 5, 1, 9]
    paged, decode = Paged(keys, 16, total), torch.randn(4, 1, HEADS, SIZE)
    q = torch.randn(sum(queries), HEADS, SIZE)
    cu_q = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
    cu_k = torch.tensor([0, *keys], dtype=torch.int32).cumsum(0).int()

    def run(size):
        mixed = flash_attn_varlen_func(
            q, paged.k_cache, paged.v_cache, cu_q, cu_k, 5, 9, block_table=paged.table,
            window_size=size, softcap=softcap or 0.0,
        )
        single = flash_attn_with_kvcache(
            decode, paged.k_cache, paged.v_cache, block_table=paged.table, window_size=size,
            cache_seqlens=torch.tensor(keys, dtype=torch.int32), softcap=softcap or 0.0,
        )
        return mixed, single

    run((-1, -1))  # as in a model where only some layers have a window
    mixed, single = run((window - 1, 0))
    for row in range(4):
        part = slice(cu_q[row], cu_q[row + 1])
        expected = paged.expected(row, q[part], window, softcap)
        torch.testing.assert_close(mixed[part], expected, atol=1e-5, rtol=1e-5)
        expected = paged.expected(row, decode[row], window, softcap)
        torch.testing.assert_close(single[row], expected, atol=1e-5, rtol=1e-5)


SHORT = [3, 17, 64, 33, 150, 1, 90, 16], [1, 17, 1, 33, 150, 1, 40, 1]  # keys and queries
LONG = [384, 17, 1000, 33, 800, 385, 401, 16], [1, 17, 1, 33, 800, 1, 90, 1]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 50])
def test_many_keys_are_attended_to(window, softcap):
    keys, queries = LONG
    paged, q = Paged(keys, 64, 80), torch.randn(sum(queries), HEADS, SIZE)
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys))
    out = flash_attn_varlen_func(
        q, paged.k_cache, paged.v_cache, cu_q, cu_k, 0, 0, block_table=paged.table,
        window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap or 0.0,
    )
    for row, part in enumerate(q.split(queries)):
        expected = paged.expected(row, part, window, softcap)
        torch.testing.assert_close(out[cu_q[row] : cu_q[row + 1]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("block", "sizes"), [(64, SHORT), (256, SHORT), (64, LONG), (1024, LONG)])
def test_a_request_gets_the_same_bits_alone_and_in_any_company(block, sizes, softcap):
    if sizes is LONG and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("MKL's products for AVX2 add up more than 192 terms in another order")
    keys, queries = sizes
    paged, q = Paged(keys, block, 80), torch.randn(sum(queries), HEADS, SIZE)
    starts = np.cumsum([0, *queries])

    def attended(rows):
        cu_q, cu_k = (
            torch.tensor([0, *(sizes[row] for row in rows)]).cumsum(0).int()
            for sizes in (queries, keys)
        )
        part = torch.cat([q[starts[row] : starts[row + 1]] for row in rows])
        out = flash_attn_varlen_func(
            part, paged.k_cache, paged.v_cache, cu_q, cu_k, 0, 0, block_table=paged.table[rows],
            softcap=softcap,
        )
        return dict(zip(rows, out.split([queries[row] for row in rows]), strict=True))

    alone = {row: attended([row])[row] for row in range(len(keys))}
    for company in (range(8), [0, 1], [5, 4], [3, 2, 7], [6, 4, 0]):
        for row, out in attended(list(company)).items():
            assert torch.equal(out, alone[row]), f"request {row} among {list(company)}"


def test_attention_sinks_are_refused():
    paged = Paged([4], 8, 1)
    with pytest.raises(NotImplementedError, match="sinks"):
        flash_attn_with_kvcache(
            torch.randn(1, 1, HEADS, SIZE), paged.k_cache, paged.v_cache, return_softmax_lse=True,
            cache_seqlens=torch.tensor([4]), block_table=paged.table,
        )


def test_flash_attn_keeps_its_types_and_fp32_comes_here(monkeypatch):
    from megatron.core.transformer import attention

    def theirs(q, *_, **__):
        return f"flash-attn in {q.dtype}"

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", theirs)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", theirs)
    is_recent = attention.is_fa_min_version
    attention_kernels.install()
    attention_kernels.install()
    assert attention.is_fa_min_version is is_recent
    half = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    assert attention.flash_attn_with_kvcache(q=half) == "flash-attn in torch.bfloat16"
    assert attention.flash_attn_varlen_func(half[0]) == "flash-attn in torch.bfloat16"
    out = attention.flash_attn_with_kvcache(
        q=half.float(), k_cache=torch.zeros(1, 4, 1, 8), v_cache=torch.ones(1, 4, 1, 8),
        cache_seqlens=torch.tensor([2]), block_table=torch.tensor([[0]]),
    )
    assert torch.equal(out, torch.ones(1, 1, 2, 8))
