"""What the cluster recipes are planned for, and the lines that their READMEs have of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_irl.config import check_layout, load_recipe, resolve
from megatron_irl.console import format_seconds
from megatron_irl.planning.machines import GIB, MACHINES
from megatron_irl.planning.plan import Plan, make_plan
from megatron_irl.planning.workload import Lengths
from tests.planning.cases import shape

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Planned:
    """A recipe of ``examples/`` on so many GPUs, with mean prompts and responses."""

    path: str
    model: str
    gpus: int
    prompt: int
    response: int


PLANS = [
    Planned("zephyr_irft/recipe.yaml", "zephyr-7b", 8, 400, 400),
    Planned("zephyr_irft/lora.yaml", "zephyr-7b", 8, 400, 400),
    Planned("pythia_irft/recipe.yaml", "pythia-1.4b", 8, 80, 80),
    Planned("pythia_rft/recipe.yaml", "pythia-1.4b", 8, 80, 80),
    Planned("llama_8b/one_gpu.yaml", "llama-3.1-8b", 1, 400, 400),
    Planned("llama_8b/one_gpu_full.yaml", "llama-3.1-8b", 1, 400, 400),
    Planned("llama_8b/recipe.yaml", "llama-3.1-8b", 8, 400, 400),
    Planned("qwen_32b/recipe.yaml", "qwen2.5-32b", 16, 400, 400),
    Planned("qwen3_30b_a3b/recipe.yaml", "qwen3-30b-a3b", 16, 400, 400),
    Planned("qwen3_30b_a3b/lora.yaml", "qwen3-30b-a3b", 8, 400, 400),
    Planned("llama_70b/recipe.yaml", "llama-3.1-70b", 64, 400, 400),
    Planned("llama_70b/bf16.yaml", "llama-3.1-70b", 64, 400, 400),
    Planned("llama_70b/rft.yaml", "llama-3.1-70b", 64, 400, 400),
    Planned("llama_70b/rft.yaml", "llama-3.1-70b", 512, 400, 400),
]


def planned(one: Planned, overrides: Sequence[str] = ()) -> Plan:
    """On H100s."""
    recipe = load_recipe(ROOT / "examples" / one.path, list(overrides), check_files=False)
    dp = check_layout(recipe, one.gpus)
    lengths = Lengths.equal(one.prompt, one.response, 50_000, "as given")
    return make_plan(resolve(recipe, lengths.records), shape(one.model), MACHINES["h100"], lengths,
                     data_parallel_size=dp)


def row(one: Planned, plan: Plan) -> str:
    """The line of a README's table."""
    time = plan.time
    return (f"| {Path(one.path).name} | {one.gpus} | {plan.fullest.needed / GIB:.0f} GiB | "
            f"{max(s.needed for s in plan.worst) / GIB:.0f} GiB | {format_seconds(time.total)} | "
            f"{time.generation_share:.0%} |")


HEAD = ("| recipe | H100s | fullest rank | with the longest packs | a round | generating |\n"
        "|-|-|-|-|-|-|\n")
_TABLE = re.compile(r"\| recipe \| H100s .*?(?=\n\n|\Z)", re.DOTALL)


def table_of(readme: str) -> str | None:
    """The planner's table of a README; None without one."""
    found = _TABLE.search(readme)
    return found.group(0).strip() if found else None


def write_tables() -> None:
    """Bring the READMEs level with the planner: ``python -m tests.examples.plans``."""
    for folder in sorted({one.path.split("/")[0] for one in PLANS}):
        rows = [row(one, planned(one)) for one in PLANS if one.path.startswith(folder + "/")]
        path = ROOT / "examples" / folder / "README.md"
        text, new = path.read_text(), HEAD + "\n".join(rows)
        old = table_of(text)
        path.write_text(text.replace(old, new) if old else text.rstrip() + "\n\n" + new + "\n")


if __name__ == "__main__":
    write_tables()
