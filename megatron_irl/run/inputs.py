"""What a run is made of, read and checked before anything expensive is built.

The order here is the order in which errors surface.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_irl.adapters.spec import AdapterSpec, adapter_spec
from megatron_irl.algorithms.base import Algorithm, algorithm_of
from megatron_irl.config import Recipe, resolve
from megatron_irl.config.bounds import value_at
from megatron_irl.convert.certificate import certificate_notes
from megatron_irl.convert.hf_config import Architecture, architecture, read_hf_config
from megatron_irl.convert.hf_folder import validate_hf_folder
from megatron_irl.data.corpus import Corpus, Gather, read_corpus
from megatron_irl.data.token_key import token_key
from megatron_irl.data.token_store import TokenStore
from megatron_irl.data.tokenizer import Tokenizer, fitted, load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.generation.cache_size import cache_gb, default_block_tokens
from megatron_irl.model.build import build_config
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.policy.provenance import describe_start, today
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.tokens import Tokens
from megatron_irl.train.host_optimizer import grad_buffer_fields
from megatron_irl.train.optimizer import build_optimizer_config, shards_optimizer

from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import OptimizerConfig  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


@dataclass(frozen=True)
class Headers:
    """What follows from the recipe and the model's config.json, each made once.

    Attributes:
        hf_config: The starting model's config.json.
        model_config, optimizer_config, ddp_config: Megatron's.
        adapter: What is trained instead of the whole model, if anything.
    """

    recipe: Recipe
    folder: RunFolder
    algorithm: Algorithm
    hf_config: dict[str, Any]
    architecture: Architecture
    model_config: TransformerConfig
    optimizer_config: OptimizerConfig
    ddp_config: DistributedDataParallelConfig
    adapter: AdapterSpec | None


@dataclass(frozen=True)
class Inputs(Headers):
    """And what follows from the other files that the recipe names; the recipe is resolved.

    Attributes:
        start: What the run begins with, see ``describe_start``.
        notes: Lines for the user.
        tokens: Where the token ids are kept; None where nothing is.
    """

    tokenizer: Tokenizer
    data: Corpus
    start: dict[str, str]
    notes: list[str]
    tokens: Tokens | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a run folder keeps of it besides the recipe."""
        return {"data": self.data.digest, "demonstrations": len(self.data.demonstrations),
                "start": self.start}


def read_inputs(
    recipe: Recipe, *, check_hardware: bool = True, keeps_tokens: bool = True,
    check: Callable[[Headers, Recipe], None] | None = None,
) -> Inputs:
    """Read and check recipe, model folder, data and output folder; needs no process group.

    Every rank calls it, and one of each machine tokenises for all of them.

    Args:
        check_hardware: Otherwise the recipe may ask for what this machine does not have.
        keeps_tokens: Keep token ids in the output folder, for the other ranks and the next start.
            Otherwise nothing is written, and a folder of another run is a note.
        check: Called before the data are read, which may take long.

    Raises:
        UserError: Anything that is wrong with the user's input.
    """
    headers = read_headers(recipe, check_hardware=check_hardware)
    recipe, kept = headers.folder.as_begun(recipe)
    if check is not None:
        check(headers, recipe)
    hf_dir, folder, arch = Path(recipe.model.hf), headers.folder, headers.architecture
    algorithm = headers.algorithm
    validate_hf_folder(hf_dir, arch)
    adapter = headers.adapter
    # A run keeps the date it began with: in a template that prints it another one is other ids.
    date = folder.date or today()
    tokenizer = load_tokenizer(
        recipe.data.tokenizer or hf_dir, recipe.data.chat_template,
        arguments=recipe.data.chat_template_args, date=date, model=hf_dir,
    )
    tokenizer = fitted(tokenizer, arch.vocab_size)
    start = describe_start(hf_dir, tokenizer, date, adapter=recipe.adapter.path)
    if adapter is not None and adapter.start is not None:
        adapter.start.check_base(start["model.hf"], hf_dir)
    data, resolved, tokens = _read_data(
        recipe, algorithm, folder, tokenizer, start, keeps=keeps_tokens
    )
    if not keeps_tokens:
        try:
            folder.check(resolved, data.digest, len(data.demonstrations), start)
        except UserError as error:
            kept = [*kept, f"train would refuse this: {error}"]
    notes = [*kept, *certificate_notes(hf_dir), *data.notes]
    return Inputs(
        **vars(replace(headers, recipe=resolved)), tokenizer=tokenizer, data=data, start=start,
        notes=notes, tokens=tokens,
    )


def read_headers(recipe: Recipe, *, check_hardware: bool = True) -> Headers:
    """Read and check everything that takes no time; as ``read_inputs``."""
    folder = RunFolder(Path(recipe.output_dir))
    folder.check_place()  # reading the data may take minutes
    algorithm = algorithm_of(recipe)
    hf_config = read_hf_config(Path(recipe.model.hf))
    arch = architecture(hf_config)
    model_config = build_config(
        arch, recipe.parallel, precision=recipe.precision, overrides=recipe.model.overrides,
        check_hardware=check_hardware,
    )
    optimizer_config = build_optimizer_config(
        recipe, model_config, check_hardware=check_hardware
    )
    sharded = {"use_distributed_optimizer": shards_optimizer(recipe)}
    ddp_config = build_ddp_config(grad_buffer_fields(recipe) | recipe.ddp | sharded)
    check_lengths(recipe, arch, model_config)
    return Headers(
        recipe, folder, algorithm, hf_config, arch, model_config, optimizer_config, ddp_config,
        adapter_spec(recipe.adapter, arch, recipe.parallel, seed=recipe.seed),
    )


def _read_data(
    recipe: Recipe, algorithm: Algorithm, folder: RunFolder, tokenizer: Tokenizer,
    start: dict[str, str], *, keeps: bool,
) -> tuple[Corpus, Recipe, Tokens | None]:
    """The data, and the recipe resolved for so much of it; both are those of the run's folder."""
    key = algorithm.preferences
    trained_on = (key, value_at(recipe, key)) if key else None

    def read(gather: Gather | None) -> Corpus:
        return read_corpus(recipe, tokenizer, preferences=trained_on, gather=gather)

    if not keeps:
        data = read(None)
        return data, resolve(recipe, len(data.demonstrations)), None
    tokens = Tokens(TokenStore(folder.tokens))
    data = tokens.corpus(
        lambda: token_key(recipe, tokenizer, trained_on[1] if trained_on else ()), read
    )
    try:
        resolved = _resolved(recipe, folder, data, start)
    except UserError:
        tokens.discard_new()
        raise
    return data, resolved, tokens


def _resolved(recipe: Recipe, folder: RunFolder, data: Corpus, start: dict[str, str]) -> Recipe:
    """The recipe for so much data, if it is what the folder was begun with."""
    resolved = resolve(recipe, len(data.demonstrations))
    folder.check(resolved, data.digest, len(data.demonstrations), start)
    return resolved


def check_lengths(recipe: Recipe, arch: Architecture, config: TransformerConfig) -> None:
    """Raise UserError unless the model and the KV cache hold the longest sequences."""
    generated = generation_length(recipe)
    longest = max(generated, recipe.data.max_prompt_length + recipe.data.max_response_length)
    if longest > arch.max_sequence_length:
        raise UserError(
            f"data.max_prompt_length={recipe.data.max_prompt_length} plus responses of up to "
            f"{longest - recipe.data.max_prompt_length} tokens conflicts with the model's "
            f"max_position_embeddings={arch.max_sequence_length}. Set data.max_prompt_length, "
            "data.max_response_length or generation.max_new_tokens lower."
        )
    cache_gb(
        config, max_sequence_length=generated, max_requests=recipe.generation.max_requests,
        block_tokens=default_block_tokens(generated), kv_cache_gb=recipe.generation.kv_cache_gb,
    )


def generation_length(recipe: Recipe) -> int:
    """Longest prompt plus response that is generated, in tokens."""
    new_tokens = recipe.generation.max_new_tokens or recipe.data.max_response_length
    return recipe.data.max_prompt_length + new_tokens
