"""A run on disk: state.pt, from which a run resumes, and the files that show it, all written atomically."""

import hashlib
import json
import os
import re
import time
import unicodedata
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files.pictures import Photo, to_image
from ..files.tensors import one_line, unpickle
from ..files.whole import atomic_write, remove_temporaries, writable_folder
from ..files.words import check_vectors, write_words
from ..inversion import EVALUATE_EVERY, OPTIMIZERS, Inversion
from ..model import LatentDiffusion, sample
from .cli import pick_device, say
from .miniature import ROOT, default_guidance
from .sheet import add_curve, draw_sheet

FORMAT = b"tinyti run 1"  # change it whenever the contents of state.pt change
WORD_FILE = "learned_embeds.safetensors"
FILES = ("state.pt", WORD_FILE, "settings.json", "log.csv", "progress.png")  # all that a run writes
MOST_STATE_BYTES = 2 * 2**30  # of a state.pt
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
PREVIEW_STEPS = (0, 10, 25, 100, 300, 1000, 3000)  # and the last step
SAVE_STATE_EVERY = 10  # steps between saves of state.pt alone
MAY_CHANGE = {
    "steps",
    "out",
    "save_every",
    "resume",
    "force",
    "device",
    "gradient_checkpointing",
    "preview",
    "download",
}
# Paths; `take_fingerprint` compares their contents instead.
BY_CONTENT = {"images", "templates", "weights", "tokenizer"}


class Run:
    """A run's folder.  state.pt holds the run; the other files show it, and are written after it.

    As a context manager it locks the folder, and saves the word if Ctrl-C or SIGTERM ends the block.
    """

    def __init__(self, args, model: LatentDiffusion, state: Inversion, photos: list[Photo], templates):
        self.folder = Path(args.out or ROOT / "words" / folder_name(args.token))
        self.args, self.model, self.state, self.photos = args, model, state, photos
        self.settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        self.fingerprint = take_fingerprint(model, photos, templates)
        self.previews = {0: state.vectors}  # the vectors at PREVIEW_STEPS
        self.prompts = [prompt.replace("{}", args.token) for prompt in preview_prompts(args)]
        if without := [p for p in self.prompts if not model.tokenizer.has_word(p, args.token)]:
            raise ValueError(f"--preview {without[0]!r} lacks the word {args.token}; write {{}} for it")
        self.ceiling = None  # the autoencoder's copy of the photos: no word can draw them better
        self.rows = {}  # the pictures of `previews`, drawn when they are first shown
        self.stack = ExitStack()  # the folder, locked
        self.saved_step = None  # the step in state.pt
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.problem = None  # the error that kept progress.png from being written
        if os.path.realpath(self.folder) in {os.path.realpath(photo.file.parent) for photo in photos}:
            raise ValueError(f"--out {self.folder} is where the pictures are; take another folder")
        if args.resume:
            self._resume()
        elif not args.force:
            self._refuse_to_replace()

    def _refuse_to_replace(self):
        """ValueError if a file that the run would write exists."""
        if any((self.folder / name).exists() for name in ("state.pt", WORD_FILE)):
            raise ValueError(f"{self.folder} holds a word already; take --resume, --force or another --out")
        there = [name for name in FILES if os.path.lexists(self.folder / name)]
        if files := [name for name in there if not (self.folder / name).is_dir()]:
            found = f"{self.folder} has a file {files[0]}, which would be replaced"
            raise ValueError(f"{found}; take --force or another --out")

    def _resume(self):
        """Load the folder's state; ValueError if it is damaged or of another run."""
        file = self.folder / "state.pt"
        if not file.is_file():
            raise FileNotFoundError(f"--resume: no state.pt in {self.folder}; start without --resume")
        saved = read_state(file)
        try:
            difference = self._compare(saved["settings"], saved.get("fingerprint"))
            if difference is None:
                self.state.load_state_dict(saved["word"])
                for step, vectors in saved["previews"].items():
                    vectors = check_vectors(vectors, self.args.token, file)
                    self.previews[int(step)] = vectors.to(self.state.start).view_as(self.state.start)
        except Exception:  # a file that others wrote raises almost anything
            raise _damaged(file) from None
        if difference is not None:
            raise ValueError(one_line(f"--resume: {difference}"))
        self.saved_step = self.state.step

    def _compare(self, settings: dict, fingerprint: dict | None) -> str | None:
        """How the run differs from a saved one, in a line; None if it is the same."""
        if not isinstance(settings, dict) or not isinstance(fingerprint, dict | None):
            raise TypeError("expected dictionaries")  # a tensor would treat a name as an index
        if settings["optimizer"] == "whitened" and "angle" not in settings:
            found = "was begun by an earlier version, whose whitened steps were different"
            return f"{self.folder} {found}; take --force to begin anew"
        before, now = self._meaning(settings), self._meaning(self.settings)
        if changed := [name for name in now if before[name] != now[name]]:
            other = "; ".join(f"{n} was {before[n]!r:.40} and is {now[n]!r:.40}" for n in changed)
            return f"{self.folder} was begun with other settings: {other}"
        if fingerprint is None:  # an earlier version saved none
            return None
        difference = compare_fingerprints(fingerprint, self.fingerprint)
        return difference and f"{difference}; take --force to begin anew"

    def _meaning(self, settings: dict) -> dict:
        """Fill in default settings, and give a name one spelling (NFC)."""
        settings = {"clip_skip": 1, "angle": None} | settings  # earlier versions lacked these flags
        optimizer = settings["optimizer"]
        defaults = {
            "angle" if optimizer == "whitened" else "lr": OPTIMIZERS[optimizer][1],
            "size": self.model.size,
            "prediction": self.model.schedule.prediction_type,
        }
        meant = {name: value for name, value in settings.items() if name not in BY_CONTENT}
        meant |= {name: default for name, default in defaults.items() if settings[name] is None}
        meant["precision"] = pick_device(self.args.device, settings["precision"])[1]
        meant["token"] = unicodedata.normalize("NFC", settings["token"])
        return meant

    def __enter__(self):
        with ExitStack() as stack:  # if one step fails, it undoes the others
            stack.enter_context(writable_folder(self.folder))
            self._lock(stack)
            remove_temporaries(self.folder)
            self.stack = stack.pop_all()
        return self

    def _lock(self, stack):
        """Lock the folder until the stack is closed; ValueError if another run holds it."""
        with suppress(ImportError):
            import fcntl  # Windows lacks it, so nothing keeps two runs apart there

            handle = os.open(self.folder, os.O_RDONLY)  # the system closes it, however the process ends
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another run is writing into {self.folder}; take another --out") from None

    def __exit__(self, kind, error, traceback):
        with self.stack:
            ended = kind is not None and issubclass(kind, KeyboardInterrupt)
            if ended and self.state.step and self.state.is_finite():
                self.save(draw=False)
                raise kind(f"interrupted; step {self.state.step} is saved, --resume goes on") from None

    def keep(self) -> None:
        """After each step, remember its vectors for progress.png, and save from time to time."""
        self._remember()
        step = self.state.step
        if step % self.args.save_every == 0 and self.state.is_finite():
            self.save()
        # Saving may take a fiftieth of the time: for a long word it takes longer than a fast GPU's step.
        rested = time.monotonic() - self.saved_at >= 50 * self.save_seconds
        if step % SAVE_STATE_EVERY == 0 and rested and self.state.is_finite():
            self.save_state()

    def save_state(self) -> None:
        """Write state.pt, unless it already holds this step."""
        began = time.monotonic()
        self._remember()  # Ctrl-C may have come before `keep`
        if self.saved_step != self.state.step:
            previews = {step: vectors.cpu() for step, vectors in self.previews.items()}
            saved = {"settings": self.settings, "previews": previews, "word": self.state.state_dict()}
            write_state(self.folder / "state.pt", saved | {"fingerprint": self.fingerprint})
            self.saved_step = self.state.step
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def save(self, last: bool = False, draw: bool = True) -> None:
        """Write all files of the folder: state.pt first, then the files that show it."""
        self.save_state()
        state = self.state.state_dict()
        write_words(self.folder / WORD_FILE, {self.args.token: self.state.vectors})
        with atomic_write(self.folder / "settings.json") as file:
            file.write(json.dumps(self.settings, indent=1).encode())
        with atomic_write(self.folder / "log.csv") as file:
            file.write(b"step,loss,evaluation,gradient,norm\n")
            evaluations = {EVALUATE_EVERY * i: value for i, value in enumerate(state["evaluations"])}
            for step, (loss, gradient, norm) in enumerate(state["log"].tolist(), 1):
                file.write(f"{step},{loss},{evaluations.get(step, '')},{gradient},{norm}\n".encode())
        if draw:
            self._save_sheet(last)

    def _save_sheet(self, last):
        """Write progress.png.  It only shows the run, so a failure here does not end the run."""
        before, self.problem = self.problem, None
        try:
            sheet = self.progress(last)
            with atomic_write(self.folder / "progress.png") as file:
                # Level 1 takes half the time for a large sheet, and a fifth more bytes.
                sheet.save(file, format="PNG", compress_level=1)
        except (OSError, ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
            self.problem = error
            if str(error) != str(before):  # say it once
                say(f"progress.png was not written: {error}")

    def _remember(self):
        if self.state.step in PREVIEW_STEPS:
            self.previews[self.state.step] = self.state.vectors

    def progress(self, last: bool) -> Image.Image:
        """Draw a sheet of the photos, the autoencoder's copies, the previews and the evaluation loss."""
        prompts = self.prompts
        for step in self.previews.keys() - self.rows.keys():
            self.rows[step] = self.pictures(self.previews[step], prompts)
        photos = torch.stack([photo.pixels for photo in self.photos[: len(prompts)]])
        if self.ceiling is None:
            latents, _ = self.model.encode_moments(photos)
            self.ceiling = self.model.decode(latents)
        shown = [("learned from", [to_image(pixels) for pixels in photos])]
        shown += [("the autoencoder's copy, at best", [to_image(pixels) for pixels in self.ceiling])]
        shown += [(f"step {step}", self.rows[step]) for step in self.previews]
        if last:
            shown.append((f"step {self.state.step}, the word", self.pictures(self.state.vectors, prompts)))
        return add_curve(draw_sheet(shown, footer=prompts), self.state.evaluations, EVALUATE_EVERY)

    def pictures(self, vectors: Tensor, prompts: list[str]) -> list[Image.Image]:
        """Draw a picture for each prompt with these vectors, always from the same noise."""
        self.state.show(vectors)
        try:
            generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
            settings = {"steps": 10, "sampler": "dpm++", "generator": generators, "size": self.args.size}
            *_, x_0 = sample(self.model, prompts, guidance=default_guidance(self.args.weights), **settings)
        finally:
            self.state.show(self.state.vectors)
        return [to_image(pixels) for pixels in self.model.decode(x_0)]


def preview_prompts(args) -> tuple[str, ...]:
    """Return the prompts of progress.png, with {} for the word."""
    return args.preview or (STYLE_PREVIEWS if args.style else PREVIEWS)


def folder_name(token: str) -> str:
    """Make a name for a word's folder, of at most 100 bytes, that every file system accepts."""
    token = unicodedata.normalize("NFC", token)
    name = re.sub(r"[^\w-]", "", token) or "-".join(f"u{ord(c):x}" for c in token)
    if len(name.encode()) > 100:
        digest = hashlib.sha256(token.encode()).hexdigest()[:8]
        name = f"{name.encode()[:90].decode(errors='ignore')}-{digest}"
    return name


def take_fingerprint(model: LatentDiffusion, photos: list[Photo], templates) -> dict:
    """Fingerprint a model, photos and templates by their contents, whatever their paths are.

    A model counts by its vocabulary, schedule, tensors' names and shapes and up to four numbers of each.  A
    photo counts by its file's bytes, caption and mask and, if these differ, by its pixels, caption and mask.
    """
    vocabulary = sorted(model.tokenizer.core.get_vocab().items())
    names, samples = hashlib.sha256(ascii([vocabulary, model.schedule]).encode()), []
    for part in (model.unet, model.vae, model.text):
        for name, tensor in part.state_dict().items():
            names.update(f"{name} {tuple(tensor.shape)}\n".encode())
            flat = tensor.flatten()
            samples.append(flat[:: max(1, len(flat) // 4)][:4].float())
    return {
        "model": names.hexdigest(),
        "samples": torch.cat(samples).cpu(),
        "photos": {unicodedata.normalize("NFC", photo.file.name): _digest_photo(photo) for photo in photos},
        "templates": hashlib.sha256("\n".join(templates).encode()).hexdigest(),
    }


def _digest_photo(photo):
    caption = photo.file.with_suffix(".txt")
    mask = b"" if photo.mask is None else photo.mask.numpy().tobytes()
    data = photo.file.read_bytes() + (caption.read_bytes() if caption.is_file() else b"") + mask
    pixels = photo.pixels.numpy().tobytes() + (photo.caption or "").encode() + mask
    return [hashlib.sha256(data).hexdigest(), hashlib.sha256(pixels).hexdigest()]


def compare_fingerprints(before: dict, now: dict) -> str | None:
    """Say the first difference of two fingerprints, as the beginning of a sentence; None if they agree."""
    samples = before["samples"], now["samples"]
    is_same = before["model"] == now["model"]  # vocabulary, schedule, names and shapes
    # Rounding to bf16 or fp16, or on another device, does not count as a difference.
    if not is_same or not torch.allclose(*samples, rtol=5e-3, atol=1e-4, equal_nan=True):
        return "the model (--weights) has changed"
    if before["templates"] != now["templates"]:
        return "the prompts (--templates) have changed"
    old, new = before["photos"], now["photos"]
    for name in [*old, *new]:
        if name not in new:
            return f"the picture {name} is missing, so the set has changed"
        if name not in old:
            return f"the picture {name} is new, so the set has changed"
        if old[name][0] != new[name][0] and old[name][1] != new[name][1]:
            return f"the picture {name}, or its caption or mask, has changed"
    return None


def write_state(file: Path, saved: dict) -> None:
    """torch.save, followed by a SHA-256 that `read_state` checks."""
    with atomic_write(file) as stream:
        torch.save(saved, stream)
        stream.write(_digest(stream.getvalue()))


def read_state(file: Path) -> dict:
    """Read what `write_state` wrote, on the CPU; ValueError for any other bytes, whose code never runs."""
    if file.stat().st_size > MOST_STATE_BYTES:
        raise _damaged(file)
    data = file.read_bytes()
    if data[-32:] != _digest(data[:-32]):
        raise _damaged(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = unpickle(data[:-32])
    except Exception:  # a damaged pickle raises almost anything
        raise _damaged(file) from None
    if not isinstance(saved, dict):
        raise _damaged(file)
    return saved


def _damaged(file):
    return ValueError(f"--resume: {file} is damaged, or of another version; start again with --force")


def _digest(data):
    return hashlib.sha256(FORMAT + data).digest()
