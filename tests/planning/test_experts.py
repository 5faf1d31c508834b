"""What mixtures of experts keep, against Megatron's own modules on real tensors, and by hand."""

import contextlib
import dataclasses
import json
import time
from typing import Any

import pytest
import torch

from megatron_irl import hardware
from megatron_irl.algorithms.base import algorithm_of
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture
from megatron_irl.errors import UserError
from megatron_irl.model.build import build_config
from megatron_irl.parallel.topology import initialize
from megatron_irl.planning import activations
from megatron_irl.planning.activations import PerToken, footprint, per_token
from megatron_irl.planning.certain import refuse_what_cannot_fit, stage_elements
from megatron_irl.planning.fake_world import fake_world
from megatron_irl.planning.machines import GIB, MACHINES
from megatron_irl.planning.memory import _adapted_bytes, _generation
from megatron_irl.planning.plan import setup_of, stage_parameters
from megatron_irl.planning.search import layouts_that_fit
from megatron_irl.planning.time import decode_seconds
from tests.cli.harness import refused, run
from tests.planning.cases import CONFIGS, irft, random_lengths, shape
from tests.planning.test_plan import ROOT, expected
from tests.planning.test_real_memory import MIXTRAL, OF_EXPERTS, SLICES

pytestmark = pytest.mark.skipif(hardware.IS_CUDA, reason="counts the CPU's tensors")
LENGTHS = [96, 160]


def footprint_of(topology: Any, layout: dict[str, Any], precision: Any, attach: Any) -> Any:
    arch, parallel = architecture(MIXTRAL), ParallelConfig(**layout)
    config = build_config(arch, parallel, precision=precision)
    (found,) = footprint(config, arch, topology, LENGTHS, attach)
    return found


def on_real_tensors(layout: dict[str, Any], precision: str) -> Any:
    """A job: the same count of the same modules with numbers in them.

    All tokens are alike, and so the routers as uneven as they can be.
    """
    topology = initialize(ParallelConfig(**layout))

    class Real(contextlib.nullcontext):
        def __enter__(self) -> Any:
            return self

        def from_tensor(self, tensor: Any) -> Any:
            return tensor

    def fill(chunks: list[Any], _: Any) -> None:
        torch.manual_seed(0)  # each time the same routers
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)

    def hidden_states(*, hidden_states: Any, **_: Any) -> Any:
        time.sleep(0.1)  # gloo's threads let go of what they sent
        return hidden_states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "fake_tensors", Real)
        patch.setattr(activations, "even_routing", contextlib.nullcontext)
        patch.setattr(activations, "_hidden_states", hidden_states)
        # What gloo still holds is counted too, and never the other way about.
        times = 3 if topology.tp_size > 1 else 1
        found = [footprint_of(topology, layout, precision, fill) for _ in range(times)]
    return min(found, key=lambda one: one.kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["one", "slices", "whole"])
def test_fake_tensors_keep_what_real_ones_do(pool, name, precision):
    """Exactly where ranks have slices of all experts; of whole ones the ranks' mean."""
    ranks, layout = OF_EXPERTS[name]
    real = pool.run(ranks, on_real_tensors, layout=layout, precision=precision)
    with fake_world(ParallelConfig(**layout)) as topology:
        fake = footprint_of(topology, layout, precision, None)
    kept = sum(one.kept for one in real) / ranks
    assert fake.kept == pytest.approx(kept, rel=0.001), "what the layers keep"
    if name == "whole":
        assert real[0].kept != real[1].kept, "the routers were even"
    if name == "one":  # others' peaks are ``test_real_memory``'s
        assert fake.forward == pytest.approx(real[0].forward, rel=0.05)
        assert fake.backward == pytest.approx(real[0].backward, rel=0.05)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2)])
def test_an_experts_row_in_transformer_engines_layers(tp, ep):
    """By hand, in bf16, of one expert more a token: input of the first product (2H), what it gives
    (4F), gate times up (2F), that times the router's weight, the input of the second (2F).

    Every rank with a slice of the expert has the row, F over the slices. Besides up to 64 bytes
    (before tensor parallelism) of where the row came from and its weight. Megatron's own experts
    on the CPU keep as much, but for a copy.
    """
    def layer(topk: int, *, lean: bool) -> float:
        arch = shape("qwen3-30b-a3b", num_experts_per_tok=topk, num_experts=16)
        return per_token(arch, "bf16", {}, tp=tp, ep=ep, sequence_parallel=tp > 1, lean=lean,
                         lengths=(512,)).layer

    slices = tp // ep
    row = (2 * 2048 + 8 * 768 / slices) / ep
    for lean in (True, False):
        more = (layer(12, lean=lean) - layer(4, lean=lean)) / 8
        assert row < more < row + 64, (lean, more - row)


LAYOUTS = {
    "one": {}, "slices": SLICES, "whole": OF_EXPERTS["whole"][1],
    "all": SLICES | {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2,
                     "expert_model_parallel_size": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_exact(name):
    """Of every stage, as from the folder's names and shapes."""
    recipe, arch = irft(1, 8, parallel=LAYOUTS[name]), shape("qwen3-30b-a3b")
    setup = setup_of(recipe, arch, MACHINES["h100"], 1)
    built = stage_parameters(setup, algorithm_of(recipe))
    for stage, parameters in built.items():
        found = sum(n for n, _, _ in parameters.values())
        assert found == expected(recipe, arch, stage, has_reward_head=False)
        assert found == stage_elements(arch, recipe.parallel, stage)


def test_qwen3_30b_a3b(capsys):
    """By hand: a layer has 2048 * (32 + 2 * 4 + 32) * 128 of attention, two norms of 2048 and two
    of 128, a router of 128 * 2048 and experts of 3 * 2048 * 768; embedding and head are
    151,936 * 2048 each, and there is a last norm.
    """
    attention, router = 2048 * 72 * 128 + 2 * 2048 + 2 * 128, 128 * 2048
    expert, ends = 3 * 2048 * 768, 2 * 151936 * 2048 + 2048
    total = 48 * (attention + router + 128 * expert) + ends
    active = 48 * (attention + router + 8 * expert) + ends
    assert (total, active) == (30_532_122_624, 3_353_032_704)
    recipe = [ROOT / "examples" / "pythia_rft" / "recipe.yaml", "data.chat_template=null",
              f"model.hf={CONFIGS / 'qwen3-30b-a3b'}", "--lengths", "400,400", "--gpu", "b200"]
    layout = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true",
              "parallel.expert_model_parallel_size=4", "--world-size", "8"]
    result = run("plan", *recipe, *layout, "--json")
    said = json.loads(capsys.readouterr().out)
    assert result.code == 0 and said["fits"], result.err
    assert (said["parameters"], said["active_parameters"]) == (total, active)
    act = ["model.recompute_granularity=selective", "model.recompute_modules=[moe_act]"]
    assert run("plan", *recipe, *layout, *act).code == 0, "only grouped experts recompute this"
    text = capsys.readouterr().out
    assert "30.532 B parameters, 3.353 B of them active (8 of 128 experts a token)" in text
    # Six operations a parameter that a token meets, at no more than the peak.
    most = 2.25e15 / (6 * (active - 2 * 151936 * 2048))
    assert all(0 < rate < most for rate in said["tokens_per_second"].values())
    assert said["stages"][0]["terms"]["graphs"] > 0
    assert 5e-3 < said["decode_step_seconds"] < 48 * 1e-3, "the host does not start every layer"
    without = [word for word in layout if "sequence" not in word]
    refused("plan", *recipe, *without, named=("128 experts", "parallel.sequence_parallel"))


def test_search_splits_the_sequence_where_it_splits_tensors():
    recipe, arch = irft(1, 16), shape("qwen3-30b-a3b", num_hidden_layers=4, num_experts=64)
    lengths = random_lengths(count=100)
    small = dataclasses.replace(MACHINES["h100"], memory=40 * GIB)
    found = layouts_that_fit(recipe, arch, small, lengths, world_size=4)
    said = [dict(word.split("=", 1) for word in one.overrides) for one in found]
    sizes = [one.get("parallel.tensor_model_parallel_size", "1") for one in said]
    assert {"2", "4"} & set(sizes)
    for one, size in zip(said, sizes, strict=True):
        assert ("parallel.sequence_parallel" in one) == (size != "1")
        assert one.get("parallel.expert_model_parallel_size", "1") in ("1", size)
        assert one.get("model.recompute_modules", "[moe]") == "[moe]"


def test_decoding_reads_all_experts_or_those_that_are_hit():
    """By hand on one rank whose memory is slow: all parameters but for the embedding, and the
    cache; with more requests than are sent to all, experts * (1 - (1 - 8/128)^600) of each layer.
    """
    arch = shape("qwen3-30b-a3b")
    slow = dataclasses.replace(MACHINES["h100"], bandwidth=1e9)
    setup = setup_of(irft(1, 8), arch, slow, 1)
    total, layers = 30_532_122_624, 48 * 50e-6
    for batch in (1, 64, 600):
        unread = 48 * 128 * (1 - 8 / 128) ** batch * 3 * 2048 * 768 if batch > 512 else 0
        fixed = layers + (0 if batch > 512 else 48 * 2 * 128 * 1e-6)
        cache = 2 * 48 * 4 * 128 * 100 * batch
        read = 2 * (total - unread - 151936 * 2048 + cache)
        found = decode_seconds(setup, batch, 100, total) - fixed - 2.5e-6 * batch
        assert found == pytest.approx(read / (0.85 * 1e9))


def test_only_adapted_weights_are_kept_while_sampling():
    """By hand: of a mixture the attention's, 2048 * (32 + 2 * 4 + 32) * 128 a layer."""
    recipe = irft(1, 8, parallel=SLICES)
    recipe = dataclasses.replace(
        recipe, adapter=dataclasses.replace(recipe.adapter, rank=8, alpha=8.0)
    )
    setup = setup_of(recipe, shape("qwen3-30b-a3b"), MACHINES["h100"], 1)
    assert _adapted_bytes(setup) == 2 * 48 * 2048 * 72 * 128 / setup.tp


def test_small_steps_have_a_row_for_every_expert():
    """By hand, in bf16 on one rank: 128 rows of 3 * 768 + 2 * 2048 a token, 1,638,400 bytes."""
    recipe = irft(1, 8, generation={"max_requests": 300})
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, max_prompt_length=1))
    setup = setup_of(recipe, shape("qwen3-30b-a3b"), MACHINES["h100"], 1)
    for forward, step in ((0.0, 300 * 1_638_400), (2e6, 300 * 2e6)):
        found = _generation(setup, PerToken(0, 0, forward, 0, 0))["prefill"]
        assert found == step + 300 * 151936 * (2 + 4)


def test_what_cannot_fit_is_split_with_its_sequence():
    recipe = dataclasses.replace(irft(1, 8), optimizer={"optimizer": "sgd"})
    with pytest.raises(UserError, match=(
            r"tensor_model_parallel_size=4, parallel.sequence_parallel=true \(4 ranks\)")):
        refuse_what_cannot_fit(
            recipe, shape("qwen3-30b-a3b"), None, data_parallel_size=1, device_memory=120 * GIB)
