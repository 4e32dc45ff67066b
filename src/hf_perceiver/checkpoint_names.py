"""Names: ours <-> transformers' built-in Perceiver."""

from typing import Any


def is_builtin_config(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json describes transformers' own Perceiver."""
    return config_dict.get("model_type") == "perceiver"


def builtin_to_config(config_dict: dict[str, Any], numerics: str | None = None) -> dict[str, Any]:
    """A built-in config.json -> the fields of PerceiverIOConfig."""
    raise NotImplementedError
