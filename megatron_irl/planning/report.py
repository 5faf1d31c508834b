"""A plan as text, as JSON, and as a picture."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_irl.console import format_seconds
from megatron_irl.planning.certain import active_parameters, parameters_of
from megatron_irl.planning.machines import GIB
from megatron_irl.planning.plan import Plan
from megatron_irl.planning.search import Found

_COLOURS = ("#3f83d6", "#8e63ce", "#c2508f", "#2f9e77", "#dd7a2b", "#b09a2f", "#777777")


def plan_lines(plan: Plan) -> list[str]:
    """Parameters, memory by stage, a round's time, files, and the verdict."""
    setup, work, time = plan.setup, plan.work, plan.time
    lines = [
        f"on {setup.world_size} {setup.machine.name} of {setup.machine.memory / GIB:.1f} GiB; "
        f"{'Transformer Engine' if setup.lean else 'local'} layers; lengths: "
        f"{work.lengths.origin}",
        *_memory_table(plan),
        *(f"host memory a rank, GiB: {name} {size / GIB:.1f}"
          for name, size in plan.fullest.host.items()),
        "files, GiB: " + ", ".join(f"{n} {size / GIB:.2f}" for n, size in plan.files.items()),
        "a round: " + ", ".join(
            f"{name} {format_seconds(seconds)}" for name, seconds in time.seconds.items()
        ) + f"; together {format_seconds(time.total)}, times {work.rounds} rounds "
        f"{format_seconds(time.total * work.rounds)} (evaluation not counted)",
    ]
    for phase in work.phases:
        speed, tokens = time.tokens_per_second[phase.name], sum(p.whole for p in phase.packs)
        lines.append(
            f"{phase.name} steps: {time.step[phase.name]:.3g} s of {len(phase.packs)} "
            f"microbatches a rank with {tokens:,} tokens, {speed:,.0f} tokens/s a rank"
        )
    stall, behind = time.checkpoint
    lines.append(f"a checkpoint stops training for {format_seconds(stall)}" + (
        f" and is written in {format_seconds(behind)} behind it" if behind else ""))
    if setup.pp > 1:
        lines.append(f"pipeline bubble: {time.bubble:.0%} of a step")
    if work.samples:
        if setup.pp > 1:
            lines.append("stages generate " + ("as replicas, on all layers each" if setup.replicas
                                               else "in turn") + " (generation.pipeline)")
        lines.append(
            f"generation: {time.decode_tokens_per_second:,.0f} tokens/s over all ranks, "
            f"{1e3 * time.decode_step:.1f} ms a decode step, {time.generation_share:.0%} of a round"
        )
    return [*lines, plan.verdict()]


def _memory_table(plan: Plan) -> list[str]:
    """GiB by stage: the terms, then the phases."""
    terms = list(dict.fromkeys(name for stage in plan.stages for name in stage.terms))
    phases = list(plan.stages[0].phases)
    shown = _different(plan)
    heads = [f"{plan.stages[i].stage}" for i in shown]
    width = max(map(len, [*terms, *phases, "parameters, million"])) + 2
    rows = [("stage", heads),
            ("parameters, million", [f"{plan.stages[i].parameters / 1e6:,.0f}" for i in shown])]
    rows += [(name, [f"{plan.stages[i].terms.get(name, 0) / GIB:.2f}" for i in shown])
             for name in terms]
    rows += [(f"= {name}", [f"{plan.stages[i].phases[name] / GIB:.2f}" for i in shown])
             for name in phases]
    rows.append(("needed", [f"{plan.stages[i].needed / GIB:.2f}" for i in shown]))
    return ["memory of a rank by stage, GiB (needed: with the CUDA context, NCCL and pieces):"] + [
        "  " + name.ljust(width) + "".join(cell.rjust(10) for cell in cells)
        for name, cells in rows
    ]


def _different(plan: Plan) -> list[int]:
    """Stages that are worth a column: eight at most, the first and last ones among them."""
    count = len(plan.stages)
    return list(range(count)) if count <= 8 else [0, 1, 2, 3, count - 4, count - 3, count - 2,
                                                  count - 1]


def search_lines(found: list[Found], world_size: int) -> list[str]:
    """What fits instead, or that nothing does."""
    if not found:
        return [f"no layout of {world_size} ranks fits; more ranks are needed"]
    lines = [f"layouts of {world_size} ranks that fit, the fastest first:"]
    for one in found:
        lines.append(
            f"  {format_seconds(one.plan.time.total)} a round, "
            f"{one.plan.fullest.needed / GIB:.1f} GiB: {' '.join(one.overrides) or 'as it is'}"
        )
    return lines


def fuller_line(plan: Plan, fuller: Found) -> str:
    """What larger microbatches would gain."""
    return (f"microbatches are small for this GPU: {' '.join(fuller.overrides)} takes "
            f"{format_seconds(fuller.plan.time.total)} a round instead of "
            f"{format_seconds(plan.time.total)}, changes no gradient and fits "
            f"({fuller.plan.fullest.needed / GIB:.1f} GiB)")


def plan_json(plan: Plan, found: list[Found], fuller: Found | None = None) -> dict[str, Any]:
    """Everything of a plan, in bytes and seconds."""
    time, setup = plan.time, plan.setup
    return {
        "fits": plan.fits, "always_fits": plan.always_fits, "verdict": plan.verdict(),
        "gpu": setup.machine.name, "gpu_memory": setup.machine.memory,
        "parameters": parameters_of(setup.arch), "active_parameters": active_parameters(setup.arch),
        "world_size": setup.world_size, "lengths": plan.work.lengths.origin,
        "layout": {"tp": setup.tp, "pp": setup.pp, "vpp": setup.vpp, "dp": setup.dp},
        "stages": [
            {"stage": s.stage, "parameters": s.parameters, "trainable": s.trainable,
             "terms": s.terms, "phases": s.phases, "peak": s.peak, "needed": s.needed,
             "host": s.host}
            for s in plan.stages
        ],
        "worst": [s.needed for s in plan.worst], "files": plan.files,
        "seconds": time.seconds, "step_seconds": time.step,
        "tokens_per_second": time.tokens_per_second, "bubble": time.bubble,
        "checkpoint_stall_seconds": time.checkpoint[0],
        "checkpoint_background_seconds": time.checkpoint[1],
        "decode_step_seconds": time.decode_step,
        "generation_tokens_per_second": time.decode_tokens_per_second,
        "generation_share": time.generation_share,
        "advice": None if fuller is None else fuller_line(plan, fuller),
        "layouts": [
            {"overrides": list(one.overrides), "seconds": one.plan.time.total,
             "needed": one.plan.fullest.needed} for one in found
        ],
    }


def draw_plan(plan: Plan, path: Path) -> None:
    """For every phase a bar a stage, made of its terms; the device's memory is a line."""
    phases, stages = list(plan.stages[0].phases), plan.stages
    names = list(dict.fromkeys(name for stage in stages for name in stage.terms))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure((3.2 * len(phases) + 1.5, 3.6), layout="constrained")
        for axes, phase in zip(figure.subplots(1, len(phases), sharey=True, squeeze=False)[0],
                               phases, strict=True):
            bottom = [0.0] * len(stages)
            for index, name in enumerate(names):
                if all(name not in stage.parts[phase] for stage in stages):
                    continue
                heights = [s.terms[name] / GIB if name in s.parts[phase] else 0.0 for s in stages]
                axes.bar(range(len(stages)), heights, bottom=bottom, label=name,
                         color=_COLOURS[index % len(_COLOURS)],
                         alpha=1.0 if index < len(_COLOURS) else 0.55)
                bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
            axes.axhline(plan.setup.machine.memory / GIB, color="black", linewidth=0.8)
            axes.set_title(phase)
            axes.set_xlabel("pipeline stage")
            axes.legend(fontsize=6)
        figure.axes[0].set_ylabel(f"GiB of a {plan.setup.machine.name}")
        figure.savefig(path)
