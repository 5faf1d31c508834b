"""Demonstrations that are drafts of the model itself, some of them edited by a program."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_irl.errors import UserError
from studies.instructions import INSTRUCTIONS, follows, instruction_of
from studies.questions import draw_questions

MOST_TOKENS = 32  # of an answer


class Questions:
    """Questions with an instruction; see ``Material``."""

    generate: Sequence[Any] = ("--max-new-tokens", MOST_TOKENS, "--precision", "bf16")
    score: Sequence[Any] = ("--precision", "bf16")
    samples = 2
    recipe: Mapping[str, Any] = {
        "data": {"max_prompt_length": 96, "max_response_length": MOST_TOKENS + 8},  # edits add some
        "generation": {"max_requests": 64, "max_new_tokens": MOST_TOKENS},
        "precision": "bf16",
    }

    def splits(self, seed: int, sizes: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """``drafts`` training prompts, of which ``train`` will be demonstrated."""
        return draw_questions(seed, test=sizes["test"], validation=sizes["validation"],
                              train=sizes["drafts"])

    def needs_drafts(self, task: Mapping[str, Any]) -> bool:
        """Always."""
        return True

    def demonstrations(
        self, records: Sequence[dict[str, Any]], drafts: Sequence[dict[str, Any]],
        task: Mapping[str, Any], seed: int,
    ) -> list[dict[str, Any]]:
        """Drafts that have an end and can be edited; all are, but for the share ``unedited``."""
        usable = [(record, draft["response"]) for record, draft in zip(records, drafts, strict=True)
                  if draft["finish_reason"] == "stop" and self._edited(record, draft["response"])]
        count = task["train"]
        if len(usable) < count:
            raise UserError(f"{len(usable)} of {len(records)} drafts can be demonstrated, and "
                            f"task.train is {count}. Set task.drafts higher.")
        left = set(random.Random(seed).sample(range(count), round(task["unedited"] * count)))
        made = []
        for place, (record, draft) in enumerate(usable[:count]):
            answer = draft if place in left else self._edited(record, draft)
            made.append({**record, "response": answer, "is_edited": place not in left,
                         "is_right": self.is_right(self.key(record), answer)})
        return made

    def _edited(self, record: Mapping[str, Any], draft: str) -> str:
        """The draft as its prompt's instruction wants it; "" if the checker refuses that too."""
        prompt = self.key(record)
        answer = INSTRUCTIONS[instruction_of(prompt)].edit(draft)
        return answer if draft.strip() and self.is_right(prompt, answer) else ""

    def key(self, record: Mapping[str, Any]) -> str:
        """The user's turn."""
        return record["prompt"][-1]["content"]

    def is_right(self, key: str, answer: str) -> bool:
        """Whether the answer follows the instruction."""
        return follows(instruction_of(key), answer)
