"""The recipe: frozen dataclasses with one field per key of the YAML file.

The string under a field is its user documentation. ``None`` always means "derived", and
``megatron_irl.config.resolve`` says from what. ``model``, ``optimizer`` and ``ddp`` are open
sections: they take Megatron's own fields by Megatron's own names, and the room that builds the
Megatron object checks them with ``check_field_names``. What belongs to one algorithm alone is
declared in that algorithm's file (``megatron_irl.algorithms``), in dataclasses of the same kind.

Relative paths are relative to the working directory the command is started in, not to the recipe.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_irl.config.data_schema import DataConfig as DataConfig
from megatron_irl.config.data_schema import DataSource as DataSource
from megatron_irl.config.data_schema import FormatName as FormatName
from megatron_irl.config.data_schema import SplitConfig as SplitConfig
from megatron_irl.config.run_schema import CheckpointConfig as CheckpointConfig
from megatron_irl.config.run_schema import LoggingConfig as LoggingConfig
from megatron_irl.config.run_schema import ProfileConfig as ProfileConfig

LossName = Literal["sigmoid", "hinge", "linear"]
ReferenceName = Literal["round_start", "initial"]
Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class ModelConfig:
    """The starting model."""

    hf: str
    """Hugging Face folder (config.json, safetensors, tokenizer) training starts from."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Every other key of the section: any Megatron ``TransformerConfig`` field, by its name
    (``model.recompute_granularity``, ``model.fp8_recipe``, ...). The architecture itself comes
    from the Hugging Face config."""


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: train low-rank updates of linear layers, scaled by alpha / rank, and freeze the model.
    Memory and checkpoints then hold optimizer state for the adapters alone."""

    rank: int | None = None
    """Rank of every update; none: no adapters, the whole model is trained."""
    alpha: float | None = None
    """Updates are multiplied by alpha / rank; none: alpha is the rank."""
    dropout: float = 0.0
    """Dropout of what an adapter reads, while training. Above 0 the policy of a round's first step
    is not quite its reference."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers by the names of Hugging Face's modules (``q_proj``, ``self_attn.q_proj``,
    ``lm_head``); ``all-linear`` is all of them but the output head. The router and the experts of
    a mixture take no adapter."""
    init: Literal["kaiming", "normal"] = "kaiming"
    """Distribution of A, uniform or normal as peft draws it. B begins as zero."""
    path: str | None = None
    """Folder of an adapter to go on with, as peft or a run wrote it; it decides rank, alpha and
    targets."""
    merge_each_round: bool = False
    """Add the updates to the model after each round and begin new ones, as the paper's code does;
    needs ``algorithm.reset_optimizer: round``. Otherwise one adapter is trained to the end."""
    generation: Literal["merged", "applied"] = "merged"
    """Sample with the updates added to the weights, which are put back exactly from a copy in host
    memory, or with the adapters applied beside them."""

    @property
    def enabled(self) -> bool:
        """Whether there are adapters."""
        return self.rank is not None or self.path is not None


@dataclass(frozen=True)
class AlgorithmConfig:
    """What is learnt, and the three knobs of the loop: regenerate, refresh reference, reset.

    These keys are the algorithms' common words; each algorithm says which of them it does not read,
    and may add keys of its own (``options``). In a recipe file, and as attributes, those stand
    beside the common ones: ``recipe.algorithm.reward_steps``.
    """

    name: str
    """``sft``; ``irft``: rounds of generation and optimisation on the implicit reward;
    ``spin``: irft with one generation per pass over the data; ``rft``: rounds of generation,
    learning of an explicit reward (section ``reward``) and policy optimisation (``policy``)."""
    rounds: int = 1
    """Number of rounds T. For spin a round is a pass over the data."""
    steps_per_round: int | None = None
    """Optimizer steps K per round; none: one pass over the round's prompts (sft: over the
    demonstrations). Not for rft, which has ``reward_steps`` and ``policy_steps``."""
    prompts_per_round: int | None = None
    """Prompts sampled for at the start of a round (all but sft); none: ``steps_per_round *
    train.global_batch_size``, or every demonstration where ``steps_per_round`` is none too. For
    rft none means so many that neither phase sees a sample twice."""
    beta: tuple[float, ...] = (0.1,)
    """Scale of the implicit reward r = beta * log(pi / pi_ref), or for rft the weight of the KL to
    the reference in E[r] - beta * KL; a number, or one per round."""
    loss: LossName = "sigmoid"
    """h in h(beta * g): -log sigmoid, hinge max(0, 1 - .), or linear -(.)."""
    reference: ReferenceName | None = None
    """Reference policy: the weights at the start of each round (``round_start``), or those the run
    began with (``initial``); none: ``round_start``, for rft ``initial``. Under ``round_start`` the
    samples of rft come from the reference itself, and its KL penalty is zero."""
    nll_coefficient: float | None = None
    """Weight of the anchor: mean per-token negative log-likelihood of the demonstration; none: 0.3
    for irft, without which it lost to imitation (``docs/study.md``), else 0. The paper's loss has
    none: 0. ``loss/margin`` is logged without it, ln 2 where the policy is its reference. For rft
    it is added to the reward steps, where the demonstrations pass by anyway."""
    length_normalize: bool = False
    """Divide each log-ratio by its length in tokens (not in the paper)."""
    reset_optimizer: Literal["never", "round"] = "never"
    """Keep Adam's moments and the learning-rate schedule for the run, or restart them each
    round."""
    options: Any = None
    """The algorithm's own keys of this section, in its own dataclass; None where it has none."""

    def __getattr__(self, name: str) -> Any:
        """An own key of the algorithm; asked for only where no common key has the name."""
        options = self.__dict__.get("options")
        if options is None or not hasattr(options, name):
            raise AttributeError(f"algorithm {self.__dict__.get('name')} has no key {name}")
        return getattr(options, name)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling of the policy's own responses. The theory asks for temperature 1 and top_p 1."""

    temperature: float = 1.0
    """0 is greedy, a biased but reproducible variant."""
    top_p: float = 1.0
    """Nucleus sampling in (0, 1]; 1 is off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    max_new_tokens: int | None = None
    """Response budget in tokens; none: ``data.max_response_length``."""
    max_requests: int = 64
    """Most responses generated at the same time on one model replica."""
    kv_cache_gb: float | None = None
    """Memory for the KV cache in GiB per rank, held only while generating; none: room for
    ``max_requests`` full-length responses."""
    part_size: int = 256
    """Most prompts per committed part of the pair bank: what a killed run may have to redo. It
    changes no sample."""
    cuda_graphs: Literal["auto", "off"] | int = "auto"
    """Decode through CUDA graphs: ``auto`` where the device and its kernels allow it, ``off``, or
    the most batch sizes to capture. Training never runs through them."""
    keep_cache: Literal["auto", "true", "false"] = "auto"
    """Keep the KV cache and the captured graphs while training. ``auto`` does so once a phase of
    training has been measured to leave room for them; otherwise both are made anew each round."""
    share_prompts: bool = False
    """Samples of one prompt share the whole cache blocks of it (256 tokens on CUDA), computed
    once."""
    pipeline: Literal["auto", "stages", "replicas"] = "auto"
    """How the stages of a pipeline generate: ``stages`` decode in turn, ``replicas`` sample each by
    itself, on a copy of the other stages' weights that lives as long as the cache. ``auto`` takes
    replicas where the memory of every rank allows it."""
    offload_optimizer: bool = False
    """Move gradient buffers and optimizer state to host memory while generating, so that a larger
    cache fits."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on ``data.eval``."""

    greedy: bool = True
    """Generate greedily and score exact match, of records that have a field ``answer``; without
    one there is nothing to score, and nothing is generated."""
    samples: bool = True
    """Generate at the training temperature: exact match (as above), reward margin and lengths."""
    interval: Literal["round", "end", "never"] = "round"
    """Evaluate after every round, after the last one, or never."""
    before: bool | None = None
    """Evaluate the starting model as well; none: unless ``interval`` is never."""
    limit: int | None = None
    """Generate for the first so many records only; log-likelihood still uses all of them."""


@dataclass(frozen=True)
class TrainConfig:
    """Batch sizes: in pairs for irft, spin and rft's reward steps, in sequences for sft and rft's
    policy steps."""

    micro_batch_size: int = 1
    """Packed into one row of a forward pass; does not change the gradient."""
    micro_batch_tokens: int | None = None
    """Instead of ``micro_batch_size``: as many pairs or sequences to a row as have about so many
    tokens together, of equal size on all ranks; a shared prompt counts once. The number of rows
    may differ from step to step; an item longer than this has a row of its own. Does not change the
    gradient either, and keeps a GPU busy whatever the lengths are. None: ``micro_batch_size``
    counts."""
    global_batch_size: int = 8
    """Per optimizer step, over all ranks."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for demonstration and sample, in training and in scoring;
    attention alone goes over it for both. Changes no number beyond rounding. (Sampling has
    ``generation.share_prompts``.)"""
    logprob_rows: int = 2048
    """Response tokens whose logits exist at one time in fp32; bounds the memory they take. On a GPU
    they stay in the model's precision, and so many more as fit the same memory are taken."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite: stop the run, or leave weights and
    optimizer as they are and go on with the next batch. Either way the batch is kept in
    ``nonfinite/`` of the run folder."""
    max_skips: int = 10
    """Most steps of a run that are skipped; then it stops."""
    on_spike: Literal["ignore", "warn", "halve_lr", "end_round"] = "ignore"
    """A loss far above those of the last 20 steps: halve the learning rate for the rest of the
    run, or end the round's phase there and sample afresh."""
    spike_factor: float = 6.0
    """How many robust standard deviations above the median of those steps a spike is."""
    on_collapse: Literal["warn", "halve_lr", "end_round"] = "warn"
    """The same, where the guard warns within a round: demonstrations that are being forgotten,
    samples that no longer teach or have collapsed."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the whole run (over each round with ``reset_optimizer: round``)."""

    lr_decay_style: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after the warmup."""
    lr_warmup_fraction: float = 0.1
    """Share of the steps with a linear warmup, in [0, 1)."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of ``optimizer.lr``."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout. Under torchrun or srun the data-parallel size follows from the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks a layer's matrices are split over; must divide heads and KV heads."""
    pipeline_model_parallel_size: int = 1
    """Ranks the layers are split over; must divide their number."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage; none: no interleaving."""
    expert_model_parallel_size: int = 1
    """1: of the ranks that share a layer's matrices each holds a slice of every expert;
    ``tensor_model_parallel_size``: each holds whole experts, its share of them."""
    context_parallel_size: int = 1
    """Ranks a sequence is split over; needs a GPU."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel ranks; saves memory."""
    data_parallel_size: int = 1
    """Used only when the command line starts the ranks itself."""
    timeout_minutes: int = 30
    """How long a rank waits for the others before the run ends in an error; more than any save or
    export takes. Reading the data does not count."""
    hang_seconds: float = 600.0
    """How long a rank may show no progress (a step, some decoded tokens, a pack of scores) before
    the run is ended, with the stacks of every rank in the log; saving and exporting have
    ``timeout_minutes``. 0: for ever."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """Before weights are read: refuse what cannot fit, when weights, gradients and optimizer state
    alone are more than the device has, or only warn of it. Both also warn if the planner's
    estimate of a new run on a known GPU is more than the device has, or nearly so."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica: tensor x pipeline x context."""
        return (self.tensor_model_parallel_size * self.pipeline_model_parallel_size
                * self.context_parallel_size)


@dataclass(frozen=True)
class Recipe:
    """Everything a run is. Made by ``load_recipe``; derived values filled by ``resolve``."""

    model: ModelConfig
    """Starting model; further keys are Megatron ``TransformerConfig`` fields."""
    data: DataConfig
    """Demonstrations."""
    algorithm: AlgorithmConfig
    """What is learnt, and when samples and reference are renewed."""
    output_dir: str
    """The run folder; started again on the same folder, a run resumes."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How samples are drawn."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured, and when."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch sizes."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Any Megatron ``OptimizerConfig`` field by its name (``optimizer.lr``, ...)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Any Megatron ``DistributedDataParallelConfig`` field by its name."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA instead of training the whole model."""
    precision: Precision = "bf16"
    """``fp8`` takes Megatron's recipe in ``model.fp8_recipe`` and needs a GPU."""
    seed: int = 1234
    """Seeds the data order and, with round and prompt, every sample."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Trackers and console."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Steps to record with torch's profiler."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Sections that the algorithm brings, by name, each in its own dataclass (for rft ``reward``
    and ``policy``). In a recipe file, and as attributes, they stand beside the others."""

    def __getattr__(self, name: str) -> Any:
        """A section of the algorithm: ``recipe.reward``; asked for only where no field fits."""
        sections = self.__dict__.get("sections", {})
        if name not in sections:
            raise AttributeError(f"the recipe has no section {name}")
        return sections[name]
