"""Typed access to the values of a config.json."""

from typing import Any

_LARGEST = 1e38
"""What float32 has room for; no number of a configuration comes near it."""


class Fields:
    """Typed access to config.json that collects problems, so that all of them are reported at once."""

    def __init__(self, raw: dict):
        self.raw = raw
        self.missing: list[str] = []
        self.problems: list[str] = []

    def number(self, key: str, kind: type, raw: dict | None = None, optional: bool = False) -> Any:
        """The finite number under a key; None if optional and absent or null, else a placeholder and a problem."""
        value = (self.raw if raw is None else raw).get(key)
        if value is None:
            if not optional:
                self.missing.append(key)
            return None if optional else kind(2)
        if isinstance(value, kind | int) and not isinstance(value, bool) and abs(value) < _LARGEST:
            return kind(value)
        self.problems.append(f"{key} is {value!r}, not {'an integer' if kind is int else 'a number'}")
        return kind(2)

    def flag(self, key: str) -> bool:
        """Whether a key is true; absent and null are false, and text such as "false" is a problem."""
        value = self.raw.get(key)
        if value is None or value in (0, 1):
            return bool(value)
        self.problems.append(f"{key} is {value!r}, neither true nor false")
        return False

    def mapping(self, key: str) -> dict:
        """The object under a key; empty if absent or null."""
        value = self.raw.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        self.problems.append(f"{key} is {value!r}, not an object")
        return {}

    def token_ids(self, key: str, generation: dict) -> tuple[int, ...]:
        """The token ids under a key, which holds one or a list; generation_config.json comes first."""
        value = generation.get(key)
        value = self.raw.get(key) if value is None else value
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            self.problems.append(f"{key} is {value!r}, not an integer or a list of integers")
        return tuple(ids)
