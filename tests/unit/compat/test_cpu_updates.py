"""The CPU's shortcuts in an optimizer step change no number."""

import torch
import torch.distributed as dist

from megatron_irl.compat import cpu_updates


def test_scaling_in_place_and_into_others():
    sources = [torch.randn(5), torch.randn(2, 3)]
    expected = [source * 0.3 for source in sources]
    others = [torch.full_like(source, 7.0) for source in sources]
    cpu_updates._scale(0, torch.zeros(1), [sources, others], 0.3)
    assert all(map(torch.equal, others, expected))
    places = [source.data_ptr() for source in sources]
    cpu_updates._scale(0, torch.zeros(1), [sources, sources], 0.3)
    assert all(map(torch.equal, sources, expected))
    assert [source.data_ptr() for source in sources] == places


def test_collectives_of_one_rank_move_data_only_where_it_is_elsewhere(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        buffer = torch.randn(8)
        before = buffer.clone()
        for collective in (cpu_updates.reduce_scatter, cpu_updates.all_gather):
            assert collective(buffer, buffer.view(8)) is None
            assert torch.equal(buffer, before)
            elsewhere = torch.zeros(8)
            collective(elsewhere, buffer)
            assert torch.equal(elsewhere, before)
    finally:
        dist.destroy_process_group()


def test_install_puts_them_where_megatron_looks():
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import clip_grads

    cpu_updates.install()
    assert clip_grads.multi_tensor_scale_impl is cpu_updates._scale
    assert param_and_grad_buffer.dist_reduce_scatter_func is cpu_updates.reduce_scatter
    assert param_and_grad_buffer.dist_all_gather_func is cpu_updates.all_gather


def test_adam_is_fused_and_sgd_left_alone():
    weights = [torch.nn.Parameter(torch.randn(3))]
    adam, sgd = torch.optim.AdamW(weights), torch.optim.SGD(weights, lr=0.1)
    cpu_updates.fuse(adam)
    cpu_updates.fuse(sgd)
    assert adam.param_groups[0]["fused"] is True
    assert not sgd.param_groups[0].get("fused")
