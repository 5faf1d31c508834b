"""Parameters of every rank, the command's answers, and what does not fit."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_irl.algorithms.base import algorithm_of
from megatron_irl.config import load_recipe, padded_vocab_size, resolve
from megatron_irl.families.table import EMBEDDING, HEAD, row_groups
from megatron_irl.families.tensors import Replicated
from megatron_irl.planning.certain import stage_elements
from megatron_irl.planning.machines import GIB, MACHINES
from megatron_irl.planning.plan import setup_of, stage_parameters
from tests.cli.harness import refused, run
from tests.examples.plans import PLANS, planned
from tests.planning.cases import CONFIGS, shape

ROOT = Path(__file__).parents[2]
SEVENTY = ROOT / "examples" / "llama_70b" / "recipe.yaml"


def expected(recipe, arch, stage, *, has_reward_head):
    """Elements of a stage's rank, by hand from the names and shapes of the Hugging Face folder."""
    tp, pp = (recipe.parallel.tensor_model_parallel_size,
              recipe.parallel.pipeline_model_parallel_size)
    layers, total = arch.transformer["num_layers"] // pp, 0
    vpp = recipe.parallel.virtual_pipeline_model_parallel_size or 1
    chunk = layers // vpp
    mine = {v * pp * chunk + stage * chunk + i for v in range(vpp) for i in range(chunk)}
    for name, rows in row_groups(arch):
        for row in rows:
            size = 1
            for length in row.shape(arch):
                size *= length
            if row.megatron in (EMBEDDING, HEAD):
                size = size // arch.vocab_size * padded_vocab_size(arch.vocab_size, tp)
            size = size if isinstance(row.transform, Replicated) else size // tp
            is_mine = (int(name.split()[1]) in mine if name.startswith("layer ")
                       else stage == (0 if name == "embedding" else pp - 1))
            total += size * is_mine
    if arch.tie_word_embeddings and pp > 1 and stage == pp - 1:
        total += padded_vocab_size(arch.vocab_size, tp) // tp * arch.dims["hidden"]
    return total + (arch.dims["hidden"] if has_reward_head and stage == pp - 1 else 0)


@pytest.mark.parametrize("one", PLANS, ids=lambda one: f"{one.path}-{one.gpus}")
@pytest.mark.parametrize("layout", [(), ("tensor_model_parallel_size=2",
                                         "pipeline_model_parallel_size=4",
                                         "virtual_pipeline_model_parallel_size=2",
                                         "sequence_parallel=true")])
def test_parameters_are_exact(one, layout):
    """Megatron's modules of every stage hold what the folder's names and shapes say."""
    arch = shape(one.model)
    if layout and arch.dims["experts"]:
        layout = (*layout, "expert_model_parallel_size=2")
    recipe = load_recipe(ROOT / "examples" / one.path, [
        *(f"parallel.{key}" for key in layout), "train.global_batch_size=512"], check_files=False)
    setup = setup_of(resolve(recipe, 1000), arch, MACHINES["h100"], 2)
    built = stage_parameters(setup, algorithm_of(recipe))
    head = algorithm_of(recipe).head_lr(recipe) is not None
    assert len(built) == setup.pp
    for stage, parameters in built.items():
        model = {name: n for name, (n, _, _) in parameters.items() if "lora" not in name}
        assert sum(model.values()) == expected(recipe, arch, stage, has_reward_head=head)
        assert stage_elements(arch, recipe.parallel, stage) == sum(model.values()) - (
            arch.dims["hidden"] if head and stage == setup.pp - 1 else 0)
        trained = {name for name, (_, _, is_trained) in parameters.items() if is_trained}
        assert trained == (parameters.keys() - model.keys() or parameters.keys())


def test_adapters_are_exact():
    """Rank times rows and columns of q, k, v, o, gate, up and down of every layer."""
    one = next(one for one in PLANS if one.path == "llama_8b/one_gpu.yaml")
    plan = planned(one)
    matrices = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336),
                (4096, 14336), (14336, 4096)]
    assert plan.fullest.trainable == 32 * sum(64 * (i + o) for i, o in matrices)
    assert plan.fullest.terms["gradients"] == 4 * plan.fullest.trainable
    # On disk bf16 matrices, float32 copies and two moments, as ``tests/cli/test_lora.py`` finds it.
    assert plan.files["checkpoint"] == 14 * plan.fullest.trainable < 2.2 * GIB
    assert plan.files["adapter"] == 2 * plan.fullest.trainable < GIB / 3


def test_checkpoints_in_the_background_cost_host_memory_and_not_time():
    """A copy of 14 bytes a parameter, divided by replicas; written at once it takes none."""
    one = next(one for one in PLANS if one.path == "llama_8b/recipe.yaml")
    behind, waited = (planned(one, [f"checkpoint.asynchronous={word}"])
                      for word in ("true", "false"))
    stage = behind.fullest
    assert stage.host["checkpoint being written"] == 14 * stage.parameters / 4
    assert "checkpoint being written" not in waited.fullest.host
    stall, written = behind.time.checkpoint
    assert 0 < stall < written and waited.time.checkpoint == (written, 0.0)
    assert behind.time.seconds["checkpoint"] == stall  # none but the round's own in its time
    often = planned(one, ["checkpoint.interval=32"])
    assert often.time.seconds["checkpoint"] == pytest.approx(4 * stall)


def test_moments_with_a_scale_are_on_the_device_twice_while_they_are_stored():
    """In float32 besides, of what each of four replicas keeps; of other moments nothing is."""
    one = next(one for one in PLANS if one.path == "llama_8b/recipe.yaml")
    few = ["optimizer.use_precision_aware_optimizer=true"]
    scaled = planned(one, [*few, "optimizer.exp_avg_dtype=fp8", "optimizer.exp_avg_sq_dtype=fp16"])
    for stage in scaled.stages:
        assert stage.phases["checkpoint"] == pytest.approx(
            stage.terms["weights"] + stage.terms["gradients"] + stage.terms["optimizer"]
            + 8 * stage.trainable / 4)
    assert "checkpoint" not in planned(one, [*few, "optimizer.exp_avg_dtype=bf16"]).fullest.phases


def test_the_optimizer_on_the_host_fits_a_host_of_128_gb():
    """All weights of 8 B on one GPU: 16 bytes a parameter of four fifths of them."""
    plan = planned(next(one for one in PLANS if one.path == "llama_8b/one_gpu_full.yaml"))
    host = plan.fullest.host
    assert host["offloaded optimizer"] == pytest.approx(0.8 * 16 * plan.fullest.parameters)
    assert 90e9 < sum(host.values()) < 110e9  # of 128, with what Python and its libraries take
    faster = plan.time.step["irft"] - 0.8 * plan.fullest.parameters / 1e9
    assert 0 < faster < plan.time.step["irft"], "the host's updates are in the step"


def plan(*arguments, capsys):
    """(exit code, the JSON object)."""
    result = run("plan", *arguments, "--json")
    said = capsys.readouterr().out
    assert said, result.err
    return result.code, json.loads(said)


def seventy(*more):
    return [SEVENTY, f"model.hf={CONFIGS / 'llama-3.1-70b'}", "--lengths", "400,400", *more]


def test_seventy_billion_on_512_ranks():
    """Every stage, in a process of its own on one core: under a minute, under 4 GiB."""
    command = [sys.executable, "-m", "megatron_irl", "plan", *map(str, seventy(
        "--world-size", "512", "train.global_batch_size=512", "--json"))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fits"] and len(said["stages"]) == 4 and said["layout"]["dp"] == 16
    assert used.ru_utime - before.ru_utime < 60
    assert used.ru_maxrss < 4 * 2**20  # KiB, of the largest child


def test_layouts_that_fit_fit(capsys, tmp_path):
    """A replica of 8B on each of eight small GPUs is too much; what the search names is not."""
    small = [ROOT / "examples" / "pythia_rft" / "recipe.yaml",
             f"model.hf={CONFIGS / 'llama-3.1-8b'}", "--lengths", "100,100",
             "data.chat_template=null"]
    small += ["--gpu", "a100-40gb"]
    code, said = plan(*small, "--world-size", "8", capsys=capsys)
    assert code == 2 and said["layouts"] and not said["fits"]
    assert "does not fit" in said["verdict"] and "gradients" in said["verdict"]
    fastest = said["layouts"][0]
    assert fastest["needed"] < said["gpu_memory"]
    assert [one["seconds"] for one in said["layouts"]] == sorted(
        one["seconds"] for one in said["layouts"])
    code, again = plan(*small, *fastest["overrides"], "--world-size", "8", "--picture",
                       tmp_path / "memory.svg", capsys=capsys)
    assert code == 0 and again["always_fits"]
    assert sum(again["seconds"].values()) == pytest.approx(fastest["seconds"])
    assert "pipeline stage" in (tmp_path / "memory.svg").read_text()


@pytest.mark.parametrize(("more", "named"), [
    (["--gpu", "h1000"], ("h1000", "h100", "b200")),
    (["--gpu", "a100"], ("precision=fp8", "a100", "bf16")),
    (["--world-size", "48"], ("world_size=48", "replica takes 32")),
    (["--world-size", "0"], ("--world-size 0",)),
    (["--lengths", "long"], ("--lengths long", "PROMPT,RESPONSE")),
    (["model.hf=/nowhere"], ("model.hf=/nowhere", "not a folder")),
    (["train.micro_batch_tokens=null", "train.micro_batch_size=5"],
     ("train.global_batch_size=64", "train.micro_batch_size=5")),
])
def test_wrong_input(more, named):
    refused("plan", *seventy(*more), named=named)
