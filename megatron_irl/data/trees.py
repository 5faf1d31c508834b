"""Message trees of the OASST kind → the conversation that its raters liked best.

They come as one row per message (``message_id``, ``parent_id``, ``text``, ``role``), or as one
record per tree (``prompt`` with ``replies`` inside). From the first prompt on the best reply is
taken: rank 0 before 1, rated before unrated, the earlier where all are alike. Deleted messages and
such as failed review are passed over, with what hangs on them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_irl.data.readers import RecordError, Row, as_object

_KEYS = ("message_id", "parent_id", "text", "role")


def is_tree_row(record: Any) -> bool:
    """Whether a record is one message of a tree."""
    return isinstance(record, dict) and all(key in record for key in _KEYS)


def is_tree(record: dict[str, Any]) -> bool:
    """Whether a record is a whole tree."""
    prompt = record.get("prompt")
    return isinstance(prompt, dict) and "replies" in prompt and "text" in prompt


def best_path(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages along the best replies of a tree, up to the assistant's last.

    Raises:
        RecordError: A message of the tree is not one.
    """
    messages, node = [], prompt
    while isinstance(node, dict) and _is_usable(node):
        if "text" not in node or "role" not in node:
            raise RecordError("a message of the tree has no text or no role")
        messages.append({"role": node["role"], "content": node["text"]})
        node = _best(node.get("replies") or [])
    return _to_last_answer(messages)


def assembled(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield a record with ``messages`` per tree of a file with one message a row.

    Its source is the place of the tree's first message. The rows of the whole file are held, since
    nothing says that a tree's are together. A tree in which no one answers is left out.
    """
    roots: list[tuple[str, dict[str, Any]]] = []
    replies: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for source, raw in rows:
        try:
            row = as_object(raw)
            if not is_tree_row(row):
                raise RecordError(f"no message of a tree like the others; it needs {_KEYS}")
        except RecordError as error:
            yield source, error
            continue
        if row["parent_id"] is None:
            roots.append((source, row))
        else:
            replies[row["parent_id"]].append(row)
    for source, root in roots:
        messages, node = [], root
        while node is not None and _is_usable(node):
            messages.append({"role": node["role"], "content": node["text"]})
            node = _best(replies[node["message_id"]])
        messages = _to_last_answer(messages)
        if messages:
            yield source, {"messages": messages, "message_tree_id": root["message_id"]}


def _is_usable(node: dict[str, Any]) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _best(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    usable = [reply for reply in replies if isinstance(reply, dict) and _is_usable(reply)]

    def rank(reply: dict[str, Any]) -> float:
        found = reply.get("rank")
        return float(found) if isinstance(found, int | float) else float("inf")

    return min(usable, key=rank, default=None)


def _to_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages
