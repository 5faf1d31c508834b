"""Adam in few bytes against torch's: the same numbers where it keeps as much, close where less."""

import pytest
import torch

from megatron_irl.hardware.narrow_adam import NarrowAdam, joined, split

SHAPES = [(7,), (33, 5), (64, 16)]


def parameters(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def steps(optimizer, params, count, *, seed=0):
    """Update with gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * 0.1
            if isinstance(optimizer, NarrowAdam):
                param.decoupled_grad = grad
            else:
                param.grad = grad
        optimizer.step()


def masters(optimizer, params):
    states = [optimizer.state[param]["master_param"] for param in params]
    return [joined(param, state) if state.dtype == torch.int16 else state.clone()
            for param, state in zip(params, states, strict=True)]


def test_two_halves_are_the_whole():
    """Of any float32: small and large, negative, zero, halfway between two bf16."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    bits = torch.randint(-2**31, 2**31 - 1, (10000,), generator=generator, dtype=torch.int32)
    values = bits.view(torch.float32)
    # Of the largest exponent rounding up would be infinite; no weight is there.
    values = values[values.abs() < 1e38]
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1.00390625, -1.00390625, 1e-40])])
    param = torch.empty_like(values, dtype=torch.bfloat16)
    remainder = torch.empty_like(values, dtype=torch.int16)
    split(values, param, remainder)
    assert torch.equal(joined(param, remainder).view(torch.int32), values.view(torch.int32))
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~is_tie], values.bfloat16()[~is_tie])


@pytest.mark.parametrize("remainders", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adam_w", [True, False])
def test_with_float32_moments_it_is_adam(remainders, decay, adam_w):
    """The float32 copies bit for bit those of torch's fused Adam on float32 parameters."""
    params = parameters(1, torch.bfloat16)
    expected = [param.float().requires_grad_() for param in params]
    ours = NarrowAdam(params, lr=1e-3, weight_decay=decay, adam_w_mode=adam_w,
                      store_param_remainders=remainders)
    kind = torch.optim.AdamW if adam_w else torch.optim.Adam
    theirs = kind(expected, lr=1e-3, weight_decay=decay, fused=True)
    steps(ours, params, 20)
    steps(theirs, expected, 20)
    for got, want, param in zip(masters(ours, params), expected, params, strict=True):
        assert torch.equal(got, want.detach())
        assert (param.float() - want).abs().max() <= 2**-8 * want.abs().max()
    kept = ours.state[params[0]]["master_param"].dtype
    assert kept == (torch.int16 if remainders else torch.float32)


def test_float32_parameters_are_their_own_copy():
    params = parameters(2, torch.float32)
    expected = [param.clone().requires_grad_() for param in params]
    steps(NarrowAdam(params, lr=1e-3), params, 10)
    steps(torch.optim.AdamW(expected, lr=1e-3, weight_decay=0.0, fused=True), expected, 10)
    for got, want in zip(params, expected, strict=True):
        assert torch.equal(got, want.detach())


def test_bf16_moments_stay_close():
    params, exact = parameters(3, torch.bfloat16), parameters(3, torch.bfloat16)
    start = [param.float() for param in params]
    narrow = NarrowAdam(params, lr=1e-2, betas=(0.9, 0.95), exp_avg_dtype=torch.bfloat16,
                        exp_avg_sq_dtype=torch.bfloat16)
    whole = NarrowAdam(exact, lr=1e-2, betas=(0.9, 0.95))
    steps(narrow, params, 30)
    steps(whole, exact, 30)
    assert {s.dtype for p in params for n, s in narrow.state[p].items() if "exp" in n} == {
        torch.bfloat16
    }
    for got, want, before in zip(masters(narrow, params), masters(whole, exact), start,
                                 strict=True):
        assert (got - want).norm() < 0.02 * (want - before).norm()
        assert not torch.equal(got, want)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_read_back_goes_on_the_same(dtype, weights):
    """Through ``state_dict`` and, as Megatron does, state by state."""
    options = {"lr": 1e-3, "exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
    params = parameters(4, weights)
    first = NarrowAdam(params, **options)
    steps(first, params, 5)
    copies = [[param.clone() for param in params] for _ in range(2)]
    whole, single = (NarrowAdam(copy, **options) for copy in copies)
    whole.load_state_dict(first.state_dict())
    for source, target in zip(params, copies[1], strict=True):
        single.initialize_state(target, weights == torch.bfloat16)
        single.state[target]["step"].copy_(first.state[source]["step"])
        for name in ("exp_avg", "exp_avg_sq", "master_param"):
            single.set_scaled_state(target, name, first.get_unscaled_state(source, name))
    for optimizer, own in ((first, params), (whole, copies[0]), (single, copies[1])):
        steps(optimizer, own, 5, seed=9)
    for optimizer, own in ((whole, copies[0]), (single, copies[1])):
        for got, want in zip(masters(optimizer, own), masters(first, params), strict=True):
            assert torch.equal(got, want)
        for got, want in zip(own, params, strict=True):
            assert torch.equal(got, want)


def test_what_it_does_not_keep_is_refused():
    params = parameters(5, torch.bfloat16)
    with pytest.raises(ValueError, match="float16"):
        NarrowAdam(params, exp_avg_dtype=torch.float16)
    with pytest.raises(ValueError, match="graphs"):
        NarrowAdam(params, capturable=True)
    optimizer = NarrowAdam(params)
    steps(optimizer, params, 1)
    with pytest.raises(TypeError, match="16 bits"):
        optimizer.set_scaled_state(params[0], "master_param", params[0].float())
