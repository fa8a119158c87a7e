"""The bundled model: its folder and its guidance."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of train.py
if not (ROOT / "weights" / "tiny").is_dir():  # the package is installed elsewhere
    ROOT = Path.cwd()
TINY = ROOT / "weights" / "tiny"
GUIDANCE = 3.0  # default for weights/tiny; higher values make learned words less recognisable


def is_tiny(weights: str | Path) -> bool:
    """Whether these weights are the bundled miniature."""
    return Path(weights).resolve() == TINY


def default_guidance(weights: str | Path) -> float:
    """The default guidance scale: GUIDANCE for the miniature, else 7.5 as in diffusers."""
    return GUIDANCE if is_tiny(weights) else 7.5
