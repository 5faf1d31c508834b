"""A policy as what evaluations ask: how likely texts are, and what it answers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_irl.console import Console
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.evaluation.texts import continuations, rolling
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.stop_texts import StopTexts
from megatron_irl.policy.pairs import ranks
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import Sequences
from megatron_irl.types import Sample

Settings = tuple[int, float, float, int, tuple[str, ...]]

LOT = 8192  # sequences scored, and
PART = 1024  # prompts per replica answered, between two looks at what came out


@dataclass
class TextModel:
    """Scores and answers with the shards that trained, in any layout.

    Attributes:
        policy: The weights as they are when asked.
        seed: Of sampled answers.

    Collectives: every rank must call every method, with equal arguments; all get the results.
    """

    policy: Policy
    tokenizer: Tokenizer
    console: Console
    seed: int = 1234

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.policy.architecture.max_sequence_length

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether it is greedy."""
        return self.choices(continuations(self.tokenizer, pairs, self.max_length))

    def text_loglikelihoods(self, texts: Sequence[str]) -> list[float]:
        """Of each whole text, its log-probability in nats; however long it is."""
        sequences, owners = rolling(self.tokenizer, texts, self.max_length)
        totals = np.zeros(len(texts))
        np.add.at(totals, np.array(owners, np.int64), [logp for logp, _ in self.choices(sequences)])
        return totals.tolist()

    def choices(self, sequences: Sequences) -> list[tuple[float, bool]]:
        """As ``loglikelihoods`` of ids; a continuation without tokens is certain."""
        answers = [(0.0, True)] * len(sequences)
        places = [i for i, (_, response) in enumerate(sequences) if len(response)]
        with self.console.scoring(len(places)) as advance:
            for start in range(0, len(places), LOT):
                lot = places[start : start + LOT]
                logps, greedy = self.policy.score_choices(
                    [sequences[i] for i in lot],
                    on_progress=functools.partial(_advance, advance, start))
                for place, logp, is_greedy in zip(lot, logps, greedy, strict=True):
                    answers[place] = float(logp), bool(is_greedy)
        return answers

    def respond(
        self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, until: Sequence[str] = (),
        plain: Sequence[bool] | None = None,
    ) -> list[str]:
        """The text that follows each prompt, up to an end token or the first of some texts.

        Args:
            prompts: int32 ids. One that leaves no room for the answer loses its beginning.
            max_new_tokens: Of an answer.
            until: Texts before which an answer ends; none empty.
            plain: Which prompts did not go through the chat template; None: all of them.

        Raises:
            UserError: The model has no room for such an answer and a token of prompt.
        """
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"the evaluation asks for answers of {max_new_tokens} tokens, the model has "
                f"{self.max_length} positions. Set --max-new-tokens to at most "
                f"{self.max_length - 1}; for tasks also as --gen-kwargs max_gen_toks=N.")
        kept = [ids[-room:] for ids in prompts]
        if not kept:
            return []
        sampling = self._sampling(max_new_tokens, temperature, top_p, top_k, until)
        self.policy.open_generator(max_sequence_length=max(map(len, kept)) + max_new_tokens)
        size, texts = PART * ranks(self.policy, self.console).dp_size, list[str]()
        with self.console.generation(len(range(len(kept))[self._share])) as advance:
            for start in range(0, len(kept), size):
                part = kept[start : start + size]
                kinds = [True] * len(part) if plain is None else plain[start : start + size]
                texts += self._part(part, start, sampling, until, kinds, advance)
        generator, self.policy.generator = self.policy.generator, None
        assert generator is not None
        generator.close()
        return texts

    def respond_with(self, prompts: Sequence[np.ndarray], settings: Settings) -> list[str]:
        """``respond`` with (max_new_tokens, temperature, top_p, top_k, until), as tasks ask."""
        length, temperature, top_p, top_k, until = settings
        return self.respond(prompts, max_new_tokens=length, temperature=temperature, top_p=top_p,
                            top_k=top_k, until=until)

    @property
    def _share(self) -> slice:
        topology = self.policy.sampling_ranks()
        return slice(topology.dp_rank, None, topology.dp_size)

    def _sampling(
        self, max_new_tokens: int, temperature: float, top_p: float, top_k: int,
        until: Sequence[str],
    ) -> SamplingConfig:
        sampling = SamplingConfig(
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
            seed=self.seed, eos_id=self.tokenizer.eos_id, stop_ids=self.tokenizer.stop_ids)
        # A mark such as </s> is a token without text, which no text would ever show.
        marks = [ids[0] for ids in self.tokenizer.encode_batch(list(until))
                 if len(ids) == 1 and ids[0] in self.tokenizer.codec.special_ids]
        return replace(sampling, stop_ids=tuple(dict.fromkeys([*sampling.stop_ids, *marks])))

    def _part(
        self, prompts: Sequence[np.ndarray], start: int, sampling: SamplingConfig,
        until: Sequence[str], plain: Sequence[bool], advance: Callable[..., None],
    ) -> list[str]:
        stops = StopTexts(until, self.tokenizer.decode) if until else None

        def decode(place: int) -> Callable[[np.ndarray], str]:
            return functools.partial(
                self.tokenizer.response_text, prompts[place], plain=plain[place])

        def ends(place: int, token_ids: np.ndarray) -> bool:
            assert stops is not None
            return stops.ends(place, token_ids, decode(place))

        def text(place: int, sample: Sample) -> str:
            return decode(place)(sample.token_ids) if stops is None else (
                stops.cut(sample, decode(place))[0])

        done = len(range(start)[self._share])
        samples = self.policy.generate(
            prompts, sampling, lambda count, tokens: advance(done + count, tokens),
            keys=range(start, start + len(prompts)), ends=ends if stops is not None else None)
        return [text(place, sample) for place, sample in enumerate(samples)]


def _advance(advance: Callable[..., None], before: int, done: int) -> None:
    advance(before + done)
