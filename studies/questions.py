"""Short open questions, each with an instruction; a split has topics that no other has."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from megatron_irl.errors import UserError
from studies.instructions import INSTRUCTIONS

SYSTEM = "Answer in one short sentence."

FORMS = (
    "What is special about {}?",
    "Why do people like {}?",
    "What should a child know about {}?",
    "How would you describe {}?",
    "What is the best thing about {}?",
    "What do many people get wrong about {}?",
)

TOPICS = (
    "the moon", "bees", "bread", "trains", "volcanoes", "sleep", "chess", "rivers", "glass",
    "coffee", "whales", "maps", "rain", "bicycles", "gold", "spiders", "paper", "music", "winter",
    "bridges", "honey", "dreams", "lighthouses", "salt", "elephants", "clocks", "gardens", "snow",
    "mirrors", "owls", "tea", "mountains", "kites", "soap", "penguins", "libraries", "thunder",
    "cheese", "deserts", "ants", "windmills", "mushrooms", "islands", "umbrellas", "wolves",
    "chocolate", "glaciers", "candles", "horses", "museums", "caves", "rice", "butterflies",
    "airports", "stars", "dogs", "pencils", "forests", "swimming", "ice", "dolphins", "castles",
    "apples", "fog", "football", "tigers", "wool", "comets", "kitchens", "pianos", "sharks",
    "summer", "boats", "eggs", "cities", "parrots", "painting", "fire", "potatoes", "tunnels",
    "cats", "dancing", "oceans", "shoes", "eagles", "markets", "oranges", "robots", "lakes",
    "poems", "frogs", "balloons", "pepper", "farms", "rainbows", "camels", "jazz", "bamboo",
    "turtles", "theaters", "wheat", "photographs", "the sun", "squirrels", "bells", "soup",
    "beaches", "rockets", "silk", "bears", "holidays", "roses", "steel", "crows", "hats", "schools",
    "planets", "lemons", "canals", "puzzles", "trees",
)


def draw_questions(seed: int, **sizes: int) -> dict[str, list[dict[str, Any]]]:
    """Prompts of each split, as records for ``megatron-irl generate``.

    Args:
        sizes: Prompts of each split, by its name.
    """
    rng = random.Random(seed)
    topics = rng.sample(TOPICS, len(TOPICS))
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in sizes.items():
        count = -(-size // len(FORMS))
        if count > len(topics):
            raise UserError(
                f"{sum(sizes.values())} prompts ({', '.join(sizes)}) are more than {len(TOPICS)} "
                f"topics with {len(FORMS)} questions give, none of them in two splits. Make them "
                "fewer."
            )
        own, topics = topics[:count], topics[count:]
        splits[split] = _records(rng, own)[:size]
    return splits


def _records(rng: random.Random, topics: Sequence[str]) -> list[dict[str, Any]]:
    """All questions about the topics, in any order, with an instruction at random each."""
    questions = [form.format(topic) for form, topic in itertools.product(FORMS, topics)]
    rng.shuffle(questions)
    return [{"prompt": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content":
            f"{question} {INSTRUCTIONS[rng.choice(list(INSTRUCTIONS))].text}"},
    ]} for question in questions]
