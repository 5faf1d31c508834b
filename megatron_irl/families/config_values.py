"""Reading single values of a ``config.json``, with the key named when one is wrong."""

from typing import Any

from megatron_irl.errors import UserError


def size(config: dict[str, Any], key: str) -> int:
    """A positive whole number that must be there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive whole number.")
    return value


def optional_size(config: dict[str, Any], key: str, default: int) -> int:
    """A positive whole number, or ``default`` where there is none."""
    return default if config.get(key) is None else size(config, key)


def required_size(config: dict[str, Any], key: str, default: int, family: str) -> int:
    """As ``optional_size``, but the key may only be null, not missing.

    Left out, these take a constant of the HF class instead of following from the other sizes.
    """
    if key not in config:
        raise UserError(f"config.json: {key} is missing, and {family} does not derive it.")
    return optional_size(config, key, default)


def number(config: dict[str, Any], key: str) -> float:
    """A positive number that must be there."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"config.json: {_state(config, key)}; it must be a positive number.")
    return float(value)


def flag(config: dict[str, Any], key: str, default: bool = False) -> bool:
    """True or false; null and a missing key are ``default``."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {_state(config, key)}; it must be true or false.")
    return default if value is None else value


def optional_number(config: dict[str, Any], key: str, default: float | None) -> float | None:
    """A positive number; null is None, and a missing key is ``default``."""
    if key not in config:
        return default
    return None if config[key] is None else number(config, key)


def refuse(config: dict[str, Any], *keys: str) -> None:
    """Raise UserError for the first key that is in use."""
    for key in keys:
        if config.get(key):
            raise UserError(f"config.json: {key}={config[key]} is not supported.")


def _state(config: dict[str, Any], key: str) -> str:
    return f"{key}={config[key]!r}" if key in config else f"{key} is missing"
