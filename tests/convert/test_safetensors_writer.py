"""Files written in pieces are the files that safetensors reads."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_irl.convert.hf_folder import INDEX
from megatron_irl.convert.safetensors_writer import ShardedWriter, TensorPlan

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8),
    limit=st.integers(1, 400), seed=st.integers(0, 99), data=st.data(),
)
def test_any_order_of_any_tensors(tmp_path_factory, kinds, limit, seed, data):
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(seed)
    plan = [TensorPlan(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
    tensors = {t.name: torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in plan}
    order = data.draw(st.permutations(plan))
    split = data.draw(st.integers(0, len(plan)))
    writer = ShardedWriter(folder, plan, limit)
    for tensor in order[:split]:
        writer.add(tensor.name, tensors[tensor.name])
    writer.close()
    writer = ShardedWriter(folder, plan, limit, resume=True)
    for tensor in order[split:]:
        writer.add(tensor.name, tensors[tensor.name])
    writer.close()
    files = sorted(folder.glob("*.safetensors"))
    read = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
        read |= held
    assert read.keys() == tensors.keys()
    assert all(
        read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items()
    )
    assert (len(files) > 1) == (folder / INDEX).exists()
    if len(files) > 1:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        assert all(name in load_file(folder / file) for name, file in places.items())


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    writer = ShardedWriter(tmp_path, [TensorPlan("t", (2, 3), torch.float32)], 100)
    with pytest.raises(AssertionError, match="planned"):
        writer.add("t", torch.zeros(3, 2))
