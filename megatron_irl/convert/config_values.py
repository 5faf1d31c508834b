"""Reading single values of a ``config.json``, with the key named when one is wrong."""

from typing import Any

from megatron_irl.errors import UserError


def size(config: dict[str, Any], key: str) -> int:
    """A positive whole number that must be there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive whole number.")
    return value


def number(config: dict[str, Any], key: str) -> float:
    """A positive number that must be there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive number.")
    return float(value)


def _state(config: dict[str, Any], key: str) -> str:
    return f"{key}={config[key]!r}" if key in config else f"{key} is missing"
