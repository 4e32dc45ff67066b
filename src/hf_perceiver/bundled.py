"""The small trained checkpoints that ship with the package."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def bundled_checkpoint(name: str) -> str:
    """Folder of a checkpoint that ships with the package, for `from_pretrained`.

    Raises ValueError that lists what there is for another name.
    """
    known = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    if name not in known:
        raise ValueError(f"no bundled checkpoint {name!r}; there are: {', '.join(known) or 'none'}")
    return str(CHECKPOINTS / name)
