"""A run on disk: one file that is the run, written whole or not at all, and the files that show it."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files.pictures import Photo, to_image
from ..files.whole import atomic_write
from ..files.words import write_words
from ..inversion import EVALUATE_EVERY, Inversion
from ..model import LatentDiffusion, sample
from .miniature import ROOT, default_guidance
from .sheet import draw_sheet

FORMAT = b"tinyti run 1"  # a change of what state.pt holds is a change of this
WORD_FILE = "learned_embeds.safetensors"
PREVIEWS = (
    "a photo of {}",
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a painting of {}",
    "a sketch of {}",
)
STYLE_PREVIEWS = (
    "a cat in the style of {}",
    "a house in the style of {}",
    "a flower in the style of {}",
    "a car in the style of {}",
    "a boat on the beach in the style of {}",
)
PREVIEW_STEPS = (0, 10, 25, 100, 300, 1000, 3000)  # and after the last
MAY_CHANGE = {"steps", "out", "save_every", "resume", "force", "device", "gradient_checkpointing"}


class Run:
    """A run's folder.  state.pt is the run; the other files show it, and are written after it.

    As a context it holds the folder against other runs, and saves the word if Ctrl-C ends the block.
    """

    def __init__(
        self, args: argparse.Namespace, model: LatentDiffusion, state: Inversion, photos: list[Photo]
    ):
        name = re.sub(r"[^\w-]", "", args.token) or "-".join(f"u{ord(c):x}" for c in args.token)
        self.folder = Path(args.out or ROOT / "words" / name)
        self.args, self.model, self.state, self.photos = args, model, state, photos
        self.settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        self.previews = {0: state.vectors}  # the vectors at PREVIEW_STEPS
        self.rows = {}  # the pictures of them, drawn when they are first shown
        self.handle = None  # of the locked folder
        if os.path.realpath(self.folder) in {os.path.realpath(photo.file.parent) for photo in photos}:
            raise ValueError(f"--out {self.folder} is where the pictures are; take another folder")
        if args.resume:
            self._resume()
        elif not args.force and any((self.folder / name).exists() for name in ("state.pt", WORD_FILE)):
            raise ValueError(f"{self.folder} holds a word already; take --resume, --force or another --out")

    def _resume(self):
        """Take up the state of the folder."""
        file = self.folder / "state.pt"
        if not file.is_file():
            raise FileNotFoundError(f"--resume: no state.pt in {self.folder}; start without --resume")
        saved = read_state(file)
        pairs = [(name, repr(saved["settings"].get(name)), repr(now)) for name, now in self.settings.items()]
        if other := "; ".join(f"{name} was {a:.40} and is {b:.40}" for name, a, b in pairs if a != b):
            raise ValueError(f"--resume: {self.folder} was begun with other settings: {other}")
        self.state.load_state_dict(saved["word"])
        self.previews = {step: vectors.to(self.model.device) for step, vectors in saved["previews"].items()}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(ImportError):
            import fcntl  # not on Windows, where nothing keeps two runs apart

            self.handle = os.open(self.folder, os.O_RDONLY)  # the system closes it, however the process ends
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self.handle)
                raise ValueError(f"another run is writing into {self.folder}; take another --out") from None
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is KeyboardInterrupt and self.state.step and self.state.is_finite():
                self.save(draw=False)
                step = self.state.step
                raise KeyboardInterrupt(f"interrupted; step {step} is saved, --resume goes on") from None
        finally:
            if self.handle is not None:
                os.close(self.handle)
            with suppress(OSError):
                self.folder.rmdir()  # if nothing has been written

    def keep(self) -> None:
        """After each step: remember what is to be shown of it, and save every so often."""
        self._remember()
        if self.state.step % self.args.save_every == 0 and self.state.is_finite():
            self.save()

    def save(self, last: bool = False, draw: bool = True) -> None:
        """Write everything that the folder holds: the state first, then what shows it."""
        self._remember()  # Ctrl-C may have come before `keep`
        state = self.state.state_dict()
        previews = {step: vectors.cpu() for step, vectors in self.previews.items()}
        saved = {"settings": self.settings, "previews": previews, "word": state}
        write_state(self.folder / "state.pt", saved)
        write_words(self.folder / WORD_FILE, {self.args.token: self.state.vectors})
        with atomic_write(self.folder / "settings.json") as file:
            file.write(json.dumps(self.settings, indent=1).encode())
        with atomic_write(self.folder / "log.csv") as file:
            file.write(b"step,loss,evaluation,gradient,norm\n")
            evaluations = {EVALUATE_EVERY * i: value for i, value in enumerate(state["evaluations"])}
            for step, (loss, gradient, norm) in enumerate(state["log"].tolist(), 1):
                file.write(f"{step},{loss},{evaluations.get(step, '')},{gradient},{norm}\n".encode())
        if draw:
            with atomic_write(self.folder / "progress.png") as file:
                # A large sheet in half the time, for a fifth more bytes.
                self.progress(last).save(file, format="PNG", compress_level=1)

    def _remember(self):
        if self.state.step in PREVIEW_STEPS:
            self.previews[self.state.step] = self.state.vectors

    def progress(self, last: bool) -> Image.Image:
        """A sheet of what the word was learned from, and of what it drew along the way."""
        templates = STYLE_PREVIEWS if self.args.style else PREVIEWS
        prompts = [template.replace("{}", self.args.token) for template in templates]
        for step in self.previews.keys() - self.rows.keys():
            self.rows[step] = self.pictures(self.previews[step], prompts)
        shown = [("learned from", [to_image(photo.pixels) for photo in self.photos[: len(prompts)]])]
        shown += [(f"step {step}", self.rows[step]) for step in self.previews]
        if last:
            shown.append((f"step {self.state.step}, the word", self.pictures(self.state.vectors, prompts)))
        return draw_sheet(shown, footer=prompts)

    def pictures(self, vectors: Tensor, prompts: list[str]) -> list[Image.Image]:
        """A picture for each prompt with these vectors, always from the same noise."""
        self.state.show(vectors)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        settings = {"steps": 10, "sampler": "dpm++", "generator": generators, "size": self.args.size}
        *_, x_0 = sample(self.model, prompts, guidance=default_guidance(self.args.weights), **settings)
        self.state.show(self.state.vectors)
        return [to_image(pixels) for pixels in self.model.decode(x_0)]


def write_state(file: Path, saved: dict) -> None:
    """torch.save, followed by a SHA-256 that `read_state` checks."""
    with atomic_write(file) as stream:
        torch.save(saved, stream)
        stream.write(_digest(stream.getvalue()))


def read_state(file: Path) -> dict:
    """What `write_state` wrote, on the CPU; ValueError for any other bytes, of which no code is run."""
    data = file.read_bytes()
    with suppress(pickle.UnpicklingError):
        if data[-32:] == _digest(data[:-32]):
            return torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    raise ValueError(f"--resume: {file} is damaged, or of another version; start again with --force")


def _digest(data):
    return hashlib.sha256(FORMAT + data).digest()
