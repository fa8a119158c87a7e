"""Learn a word from a few pictures:  python train.py --images concepts/cat --token "S*" """

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, too, is one line and status 130
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"train.py: interrupted\n") and 130))

import csv
import io
import json
import pickle
import re
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import tinyti
from tinyti import cli, embeddings
from tinyti.concept import Concept
from tinyti.data import OBJECT_TEMPLATES, STYLE_TEMPLATES, grid, read_folder, read_templates, to_image
from tinyti.inversion import (
    BATCH_SIZE,
    EVALUATE_EVERY,
    OPTIMIZERS,
    STEPS,
    TIMESTEPS,
    Inversion,
    diagnose,
    evaluate,
    find_fault,
    invert,
    make_examples,
)

WORD_FILE = "learned_embeds.safetensors"
PREVIEWS = ("a photo of {}", "a photo of {} on the beach", "a photo of {} in the snow",
            "a painting of {}", "a sketch of {}")  # fmt: skip
STYLE_PREVIEWS = ("a cat in the style of {}", "a house in the style of {}", "a flower in the style of {}",
                  "a car in the style of {}", "a boat on the beach in the style of {}")  # fmt: skip
PREVIEW_STEPS = (0, 10, 25, 100, 300, 1000, 3000)  # and after the last
MAY_CHANGE = {"steps", "out", "save_every", "resume", "force", "device"}
MAY_CHANGE |= {"no_early_stop", "gradient_checkpointing"}


def arguments(argv=None):
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("what to learn").add_argument
    add("--images", type=cli.path, required=True, metavar="FOLDER", help="pictures; 3 to 5 are best")
    add("--token", type=cli.text, required=True, metavar="WORD", help="the new word, without white space")
    add("--init", type=cli.text, metavar="WORDS", help="where to start; by default the vocabulary's mean")
    add("--vectors", type=cli.whole(1, 75), default=1, metavar="N",
        help="vectors of the word; more hold more detail and obey prompts less")  # fmt: skip
    add("--style", action="store_true", help="learn a style, from the paper's style prompts, not a thing")
    add("--templates", type=cli.path, metavar="FILE",
        help="own prompts, one a line, {} for the word; by default the paper's")  # fmt: skip
    add("--no-flip", action="store_true", help="never mirror the pictures: for writing and asymmetric things")
    add("--size", type=cli.whole(1, 4096), help="side of the pictures in pixels; by default the model's own")

    add = parser.add_argument_group("how to learn it").add_argument
    add("--steps", type=cli.whole(1, 10**6), default=STEPS, help="the most steps to take")
    add("--batch-size", type=cli.whole(1, 4096), default=BATCH_SIZE, help="samples per step, on all GPUs")
    add("--accumulate", type=cli.whole(1, 4096), default=1, metavar="N",
        help="compute a batch in N parts, to save memory")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="save much memory, for 40 %% more time")
    add("--optimizer", choices=OPTIMIZERS, default="whitened", help="adam takes ten times the steps")
    add("--lr", type=cli.number(1e-30, 100), help="step per number; by default "
        + ", ".join(f"{kind.LR:g} for {name}" for name, kind in OPTIMIZERS.items()))  # fmt: skip
    add("--no-early-stop", action="store_true",
        help="take all steps; by default adam ends when its evaluation loss is flat")  # fmt: skip
    add("--timesteps", type=cli.number(0, 1), nargs=2, default=list(TIMESTEPS), metavar=("LOW", "HIGH"),
        help="part of the schedule to draw from; 0 1 is the paper's, but low ones teach little")  # fmt: skip
    add("--seed", type=cli.SEED, default=0, help="of everything random")
    cli.model_flags(parser)

    add = parser.add_argument_group("what comes out").add_argument
    add("--out", type=cli.path, metavar="FOLDER", help="by default words/ and the word")
    add("--save-every", type=cli.whole(1, 10**6), default=100, metavar="STEPS", help="what a crash may cost")
    add("--resume", action="store_true", help="go on where the run stopped, to the same bytes")
    add("--force", action="store_true", help="replace a run that is there")
    args = parser.parse_args(argv)
    if not args.timesteps[0] < args.timesteps[1]:
        raise ValueError(f"--timesteps is {' '.join(map(str, args.timesteps))}; give the lower number first")
    if len(args.token) > 64:
        raise ValueError(f"--token has {len(args.token)} characters; take a short word, at most 64")
    return args


def main(argv=None):
    """Run, and turn bad input into one line and exit status 2."""
    return cli.run("train.py", lambda: train(arguments(argv)))


def train(args):
    """Everything, from the first check to the last line: -> exit status."""
    began = time.time()
    embeddings.check_name(args.token)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if args.batch_size < dist.get_world_size():
            ranks = dist.get_world_size()
            raise ValueError(f"--batch-size {args.batch_size} is less than the {ranks} processes")
    model = cli.load_model(args)
    model.unet.checkpointing = args.gradient_checkpointing
    size = args.size or model.size
    model.check_size(size, size)
    templates = STYLE_TEMPLATES if args.style else OBJECT_TEMPLATES
    templates = read_templates(args.templates) if args.templates else templates
    photos, passed_over = read_folder(args.images, size)
    warn(args, model, passed_over)

    rows = word_rows(model, args.init) if args.init else model.text.table.mean(dim=0, keepdim=True)
    concept = model.add_word(args.token, Concept.initial(rows, args.vectors, args.seed))
    examples = make_examples(model, args.token, photos, templates, flip=not args.no_flip)
    check_prompts(model, concept, examples.prompts)
    word = Inversion(model, concept, args.optimizer, args.lr)
    run = Run(args, model, word, photos) if cli.is_main_process() else None
    with run or nullcontext(), tqdm(total=args.steps, initial=word.step, unit="step", disable=not run) as bar:
        if dist.is_initialized():
            state = [word.state_dict()]
            dist.broadcast_object_list(state)
            word.load_state_dict(state[0])
        options = {name: getattr(args, name) for name in ("batch_size", "seed", "accumulate")}
        early_stop = args.optimizer == "adam" and not args.no_early_stop
        for _ in invert(
            model, word, examples, args.steps, span=args.timesteps, early_stop=early_stop, **options
        ):
            bar.update()
            is_evaluated = word.step % EVALUATE_EVERY == 0
            if is_evaluated:
                bar.set_postfix_str(f"evaluation {word.evaluations[0]:.4f}, now {word.evaluations[-1]:.4f}")
            if is_evaluated and not word.is_finite():
                break
            if run:
                run.remember()
            if run and word.step % args.save_every == 0 and word.is_finite():
                run.save()
        if run and word.is_finite():
            run.save(last=True)
    status = report(args, model, word, examples, run) if run else 0
    if run:
        print(f"{time.time() - began:.0f} s{cli.peak_memory(model.device)}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def check_prompts(model, concept, prompts):
    """Refuse vectors that do not fit into every prompt, and prompts with the word inside another."""
    places = model.tokenizer.length - 2
    for prompt in {line for lines in prompts for line in lines}:
        if not set(concept.ids) <= set(model.tokenizer.encode(prompt)[:places]):
            n = len(concept.ids)
            raise ValueError(
                f"the prompt {prompt!r} has no room for the {n} vectors of the word, or the word does not "
                "stand alone in it; take fewer --vectors or other --templates"
            )


def word_rows(model, text):
    """The vocabulary's rows of the words in `text` (m, D); ValueError for what is no such word."""
    ids = [model.tokenizer.single(word) for word in text.split()]
    if None in ids:
        word = text.split()[ids.index(None)]
        raise ValueError(f"--init {word!r} is no single word of the model's vocabulary; take a simpler one")
    return model.text.table[ids]


def warn(args, model, passed_over):
    """Say what the user should know before the training."""
    if files := [line for line in passed_over if "not a file" not in line]:  # but subfolders
        cli.say(f"passed over {'; '.join(files)}")
    is_drawn = cli.ROOT / "concepts" in Path(args.images).resolve().parents
    if Path(args.weights).resolve() == cli.TINY and not is_drawn:
        cli.say("the miniature knows its own drawn world only; photos want a real model: weights/README.md")


def report(args, model, word, examples, run):
    """Say what came out: -> exit status, 1 if nothing was learned."""
    if word.step % EVALUATE_EVERY:  # not part of the state: a run that goes on evaluates on time
        word.evaluations.append(evaluate(model, examples, args.seed, args.timesteps))
    first, last = word.evaluations[0], word.evaluations[-1]
    print(f"{args.token}: evaluation loss {first:.4f}, now {last:.4f}, after {word.step} steps")
    if problem := diagnose(word):
        print(f"WARNING: {args.token} has learned nothing: {problem}", file=sys.stderr)
    if word.is_finite():
        if warning := embeddings.compatibility_warning(args.token, args.vectors):
            print(f"note: {warning}", file=sys.stderr)
        tokenizer = model.tokenizer
        nearest = word.concept.nearest(model.text.table, 5, tokenizer.word_ids())[0]
        print("nearest words:", ", ".join(f"{tokenizer.token(id)} {cosine:.2f}" for id, cosine in nearest))
        prompt = (STYLE_PREVIEWS if args.style else PREVIEWS)[1].replace("{}", args.token)
        weights = ["--weights", args.weights] if Path(args.weights).resolve() != cli.TINY else []
        print("use it:", cli.command("sample.py", prompt, "--words", cli.shown(run.folder), *weights))
    return 1 if problem else 0


class Run:
    """A run's folder.  state.pt is the run; the other files show it, and are written after it.

    As a context it holds the folder against other runs, and saves the word if Ctrl-C ends the block.
    """

    def __init__(self, args, model, word, photos):
        name = re.sub(r"[^\w-]", "", args.token) or "-".join(f"u{ord(c):x}" for c in args.token)
        self.folder = Path(args.out or cli.ROOT / "words" / name)
        self.args, self.model, self.word, self.photos = args, model, word, photos
        self.settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        self.previews = {0: word.word}  # the vectors at PREVIEW_STEPS
        self.rows = {}  # the pictures of them, drawn when they are first shown
        images = Path(args.images)
        images = images.parent if images.is_file() else images
        if os.path.realpath(self.folder) == os.path.realpath(images):
            raise ValueError(f"--out {self.folder} is where the pictures are; take another folder")
        if args.resume:
            self._resume()
        elif not args.force and any((self.folder / name).exists() for name in ("state.pt", WORD_FILE)):
            raise ValueError(f"{self.folder} holds a word already; take --resume, --force or another --out")

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl  # not on Windows, where nothing keeps two runs apart
        except ImportError:
            return self
        self._handle = os.open(self.folder, os.O_RDONLY)  # let go of by the system however the process ends
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise ValueError(f"another run is writing into {self.folder}; take another --out") from None
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is KeyboardInterrupt and self.word.step and self.word.is_finite():
                self.save(draw=False)
                step = self.word.step
                raise KeyboardInterrupt(f"interrupted; step {step} is saved, --resume goes on") from None
        finally:
            if hasattr(self, "_handle"):
                os.close(self._handle)
            with suppress(OSError):
                self.folder.rmdir()  # if nothing has been written

    def remember(self):
        """Keep the vectors of the steps that pictures are shown of."""
        if self.word.step in PREVIEW_STEPS:
            self.previews[self.word.step] = self.word.word

    def save(self, last=False, draw=True):
        """Write everything that the folder holds: the state first."""
        self.remember()
        previews = {step: vectors.cpu() for step, vectors in self.previews.items()}
        state = {"settings": self.settings, "previews": previews, "word": self.word.state_dict()}
        with embeddings.atomic_write(self.folder / "state.pt") as file:
            torch.save(state, file)
        self.show(last, draw)

    def show(self, last=False, draw=True):
        """Write the files that show the state."""
        embeddings.write(self.folder / WORD_FILE, {self.args.token: self.word.word})
        with embeddings.atomic_write(self.folder / "settings.json") as file:
            file.write(json.dumps(self.settings, indent=1).encode())
        with embeddings.atomic_write(self.folder / "log.csv") as file:
            lines = csv.writer(text := io.StringIO())
            lines.writerow(("step", "loss", "evaluation", "gradient", "norm"))
            evaluations = {EVALUATE_EVERY * i: value for i, value in enumerate(self.word.evaluations)}
            for step, (loss, gradient, norm) in enumerate(torch.stack(self.word.log).tolist(), 1):
                lines.writerow((step, loss, evaluations.get(step, ""), gradient, norm))
            file.write(text.getvalue().encode())
        if not draw:
            return
        templates = STYLE_PREVIEWS if self.args.style else PREVIEWS
        prompts = [template.replace("{}", self.args.token) for template in templates]
        shown = [("learned from", [to_image(photo.pixels) for photo in self.photos[: len(prompts)]])]
        for step, vectors in self.previews.items():
            if step not in self.rows:
                self.rows[step] = self.pictures(vectors, prompts)
            shown.append((f"step {step}", self.rows[step]))
        if last:
            shown.append((f"step {self.word.step}, the word", self.pictures(self.word.word, prompts)))
        with embeddings.atomic_write(self.folder / "progress.png") as file:
            grid(shown, footer=prompts).save(file, format="PNG")

    def pictures(self, vectors, prompts):
        """A picture for each prompt with these vectors, always from the same noise."""
        self.word.show(vectors)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        settings = {"steps": 10, "sampler": "dpm++", "guidance": cli.GUIDANCE, "size": self.args.size}
        *_, x_0 = tinyti.sample(self.model, prompts, generator=generators, **settings)
        self.word.show(self.word.word)
        return [to_image(pixels) for pixels in self.model.decode(x_0)]

    def _resume(self):
        """Take up the state of the folder, after checking it as a whole; nothing is changed if it is bad."""
        file = self.folder / "state.pt"
        if not file.is_file():
            raise FileNotFoundError(f"--resume: no state.pt in {self.folder}; start without --resume")
        state = read_state(file)
        before = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(before, dict) or state.keys() != {"settings", "previews", "word"}:
            raise ValueError(f"--resume: {file} has not the entries of a run; start again with --force")
        if repr(before) != repr(self.settings):
            pairs = [(name, repr(before.get(name)), repr(value)) for name, value in self.settings.items()]
            other = "; ".join(f"{name} was {a:.40} and is {b:.40}" for name, a, b in pairs if a != b)
            other = other or f"it has {len(before)} of them"
            raise ValueError(f"--resume: {self.folder} was begun with other settings: {other}")
        try:
            self.word.load_state_dict(state["word"])
            steps = [step for step in PREVIEW_STEPS if step <= self.word.step]
            if fault := find_fault(state["previews"], dict.fromkeys(steps, state["word"]["start"]), "rows"):
                raise ValueError(fault)
        except ValueError as error:
            raise ValueError(f"--resume: {file} is damaged ({error}); start again with --force") from None
        self.previews = {step: vectors.to(self.model.device) for step, vectors in state["previews"].items()}


def read_state(file):
    """What torch.save wrote into a file, its checksums compared; ValueError for anything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, *embeddings.DAMAGED) as error:
        damaged = str(error)
    raise ValueError(f"--resume: {file} is damaged ({damaged:.100}); start again with --force")


if __name__ == "__main__":
    sys.exit(main())
