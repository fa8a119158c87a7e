"""Learn a word from a few pictures:  python train.py --images concepts/cat --token "S*" """

import argparse
import csv
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import tinyti
from tinyti import embeddings
from tinyti.concept import Concept
from tinyti.data import OBJECT_TEMPLATES, STYLE_TEMPLATES, grid, read_folder, read_templates, to_image
from tinyti.inversion import (
    START_WORDS,
    STYLE_WORDS,
    TIMESTEPS,
    choose_start,
    evaluate,
    invert,
    make_subject,
    trouble,
)
from tinyti.model import pick_device

HERE = Path(__file__).resolve().parent
WORD_FILE = "learned_embeds.safetensors"
PREVIEWS = (
    "a photo of {}",
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a painting of {}",
    "a sketch of {}",
)
STYLE_PREVIEWS = ("a cat in the style of {}", "a house in the style of {}", "a flower in the style of {}",
                  "a car in the style of {}", "a boat on the beach in the style of {}")  # fmt: skip
PREVIEW_STEPS = (30, 100, 300, 1000, 3000)  # and before the first and after the last
EVALUATE_EVERY = 10
MAY_CHANGE = {
    "steps",
    "out",
    "save_every",
    "resume",
    "force",
    "device",
    "no_early_stop",
    "gradient_checkpointing",
}


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what to learn").add_argument
    add(
        "--images",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="a folder of pictures for each word; 3 to 5 are best",
    )
    add(
        "--token",
        nargs="+",
        required=True,
        metavar="WORD",
        help="the new word, any string without white space; one for each folder",
    )
    add(
        "--init",
        nargs="+",
        metavar="WORD",
        help="word(s) to start from, one string for each folder; by default the best of a list",
    )
    add(
        "--vectors",
        type=int,
        default=1,
        metavar="N",
        help="vectors per word; more hold more detail and obey prompts less",
    )
    add("--style", action="store_true", help="learn a style, from the paper's style prompts, not a thing")
    add(
        "--templates", metavar="FILE", help="own prompts, one a line, {} for the word; by default the paper's"
    )
    add("--no-flip", action="store_true", help="never mirror the pictures: for writing and asymmetric things")
    add(
        "--size",
        type=int,
        help="side of the training pictures in pixels; by default what the model was trained on",
    )

    add = parser.add_argument_group("how to learn it").add_argument
    add("--steps", type=int, default=600, help="the most steps to take")
    add(
        "--no-early-stop",
        action="store_true",
        help="take all of them; by default the word ends when its evaluation loss is flat",
    )
    add("--batch-size", type=int, default=8, help="samples per step and word, on all GPUs together")
    add("--accumulate", type=int, default=1, metavar="N", help="work a batch off in N parts, to save memory")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations twice, to save much memory for about half as much time again",
    )
    add("--lr", type=float, default=5e-3, help="the effective learning rate of Adam; nothing scales it")
    add(
        "--timesteps",
        type=float,
        nargs=2,
        default=list(TIMESTEPS),
        metavar=("LOW", "HIGH"),
        help="the part of the schedule to draw from; 0 1 is the paper's, but low ones teach a word little",
    )
    add("--seed", type=int, default=0, help="of everything random")

    add = parser.add_argument_group("the model and the machine").add_argument
    add(
        "--weights",
        default=str(HERE / "weights" / "tiny"),
        metavar="PATH",
        help="model folder or single file, see weights/README.md",
    )
    add("--tokenizer", metavar="FOLDER", help="the vocabulary, for a single file that has none beside it")
    add(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts, for single files of Stable Diffusion 2",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the frozen networks; by default bf16 on GPUs that have it, else fp32",
    )

    add = parser.add_argument_group("what comes out").add_argument
    add("--out", nargs="+", metavar="FOLDER", help="one for each word; by default words/ and the word")
    add("--save-every", type=int, default=100, metavar="STEPS", help="how much work a crash may cost")
    add(
        "--resume",
        action="store_true",
        help="go on where the folder's run stopped; the result is the same to the byte",
    )
    add("--force", action="store_true", help="write over a word that is there")
    args = parser.parse_args(argv)
    words, folders = len(args.token), len(args.images)
    for flag, given in (
        ("--images", folders),
        ("--init", len(args.init or args.token)),
        ("--out", len(args.out or args.token)),
    ):
        if given != words:
            raise ValueError(
                f"{words} words in --token, but {given} entries in {flag}; give one for each word"
            )
    for flag in ("vectors", "steps", "batch_size", "accumulate", "save_every"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")
    low, high = args.timesteps
    if not 0 <= low < high <= 1:
        raise ValueError(f"--timesteps is {low} {high}; give two numbers from 0 to 1, the lower one first")
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr is {args.lr}; it must be a positive number, e.g. 5e-3")
    return args


def folder_name(token):
    """A form of the word that every file system takes: `S` for `S*`, code points where nothing is left."""
    return re.sub(r"[^\w-]", "", token) or "-".join(f"u{ord(c):x}" for c in token)


def word_rows(model, text):
    """The vocabulary's rows of the words in `text` (m, D); ValueError for what is no such word."""
    ids = [model.tokenizer.core.encode(word, add_special_tokens=False).ids for word in text.split()]
    for word, pieces in zip(text.split(), ids):
        if len(pieces) != 1 or not model.tokenizer.token(pieces[0]).isalpha():
            raise ValueError(
                f"--init {word!r} is no single word of the model's vocabulary; take a simpler one"
            )
    if not ids:
        raise ValueError("--init is empty; give a word such as 'cat', or leave it out")
    return model.text.table[[i for pieces in ids for i in pieces]]


class Run:
    """One word's output folder: what is written there, when, and how."""

    def __init__(self, args, model, token, folder):
        self.args, self.model, self.token, self.folder = args, model, token, Path(folder)
        self.rows, self.log, self.vectors_at = [], [], {}
        self.table = model.text.table.float()
        self.median = self.table.norm(dim=-1).median().item()
        self.words = model.tokenizer.word_ids()

    def check(self, settings):
        """Refuse to overwrite a word, or to go on with other settings."""
        kept = self.folder / "settings.json"
        if self.args.resume:
            if not (self.folder / "state.pt").exists():
                raise FileNotFoundError(
                    f"--resume: there is no state.pt in {self.folder}; start without --resume"
                )
            before = json.loads(kept.read_text())
            other = [
                f"{k} was {before.get(k)!r} and is {v!r}" for k, v in settings.items() if before.get(k) != v
            ]
            if other:
                raise ValueError(f"--resume: {self.folder} was begun with other settings: {'; '.join(other)}")
        elif (self.folder / WORD_FILE).exists() and not self.args.force:
            raise ValueError(f"{self.folder} holds a word already; take --resume, --force or another --out")

    def write(self, name, save):
        """save(temporary path), then put it in place: a reader never sees half a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.tmp"
        try:
            save(temporary)
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def statistics(self, subject):
        """Norm and cosine to the start, means over the word's vectors."""
        vectors = subject.concept.vectors.detach().cpu()
        return vectors.norm(dim=-1).mean().item(), torch.cosine_similarity(
            vectors, subject.start
        ).mean().item()

    def nearest(self, subject, k=5):
        """The nearest words of the vocabulary and their cosines."""
        found = subject.concept.nearest(self.table, k, self.words)[0]
        return [(self.model.tokenizer.token(i), c) for i, c in found]

    def preview(self, subject, step, label=None):
        """A row of pictures with the vectors as they are now, always from the same noise."""
        prompts = [p.format(self.token) for p in (STYLE_PREVIEWS if self.args.style else PREVIEWS)]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        size = self.args.size or self.model.size
        *_, x_0 = tinyti.sample(
            self.model, prompts, steps=25, sampler="dpm++", generator=generators, size=size
        )
        self.rows.append((label or f"step {step}", [to_image(p) for p in self.model.decode(x_0)]))

    def save(self, subject, photos):
        """Everything the folder holds, from the state last, so that it never runs ahead of the rest."""
        shown = [("learned from", [to_image(p.pixels) for p in photos[:5]]), *self.rows]
        captions = [p.format(self.token) for p in (STYLE_PREVIEWS if self.args.style else PREVIEWS)]
        self.write("progress.png", lambda p: grid(shown, footer=captions).save(p, format="PNG"))
        self.write("log.csv", self._write_log)
        vectors = subject.concept.vectors.detach().cpu()
        self.folder.mkdir(parents=True, exist_ok=True)
        embeddings.write(self.folder / WORD_FILE, {self.token: vectors})
        state = subject.state_dict() | {"vectors_at": self.vectors_at}
        self.write("state.pt", lambda p: torch.save(state, p))

    def _write_log(self, path):
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows(
                [("step", "loss", "evaluation", "gradient", "norm", "cosine_to_start"), *self.log]
            )


def prepare(args, model):
    """Read the pictures, choose the start and add the word, for every word: -> [(Run, Subject, photos)]."""
    templates = (
        read_templates(args.templates)
        if args.templates
        else STYLE_TEMPLATES
        if args.style
        else OBJECT_TEMPLATES
    )
    size = args.size or model.size
    folders = args.out or [HERE / "words" / folder_name(token) for token in args.token]
    if len({str(Path(f).resolve()) for f in folders}) < len(folders):
        raise ValueError(
            f"two words would be written to the same folder ({', '.join(map(str, folders))}); give --out"
        )
    work = []
    for i, (images, token) in enumerate(zip(args.images, args.token)):
        if len(token) > 64:
            raise ValueError(f"--token has {len(token)} characters; take a short word, at most 64")
        run = Run(args, model, token, folders[i])
        photos, passed_over = read_folder(images, size)
        if passed_over:
            say(f"{images}: passed over {'; '.join(passed_over)}")
        init = args.init[i] if args.init else None
        rows = word_rows(model, init) if init else model.text.table[:1]
        ids = model.tokenizer.add(token, args.vectors)
        concept = model.concepts[token] = Concept.initial(token, ids, rows, args.seed).to(model.device)
        settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
        settings |= {"images": images, "token": token, "init": init}
        run.check(settings)
        one = make_subject(model, concept, photos, templates, flip=not args.no_flip)
        if args.resume:
            state = torch.load(run.folder / "state.pt", weights_only=True)
            one.load_state_dict(state | {"finished": state["finished"] and not args.no_early_stop})
            run.vectors_at = state["vectors_at"]
            with open(run.folder / "log.csv", newline="") as f:
                run.log = [tuple(row) for row in list(csv.reader(f))[1:] if int(row[0]) <= one.step]
        elif init is None:
            words = STYLE_WORDS if args.style else START_WORDS
            losses = choose_start(model, one, words, args.seed, args.timesteps)
            best = next(iter(losses))
            say(f"{token} starts from “{best}”, which explains the pictures best (loss {losses[best]:.4f})")
            one.put(Concept.initial(token, ids, word_rows(model, best), args.seed).vectors)
        if leads():
            run.write("settings.json", lambda p, s=settings: p.write_text(json.dumps(s, indent=1)))
        work.append((run, one, photos))
    return work


def leads():
    """Whether this is the process that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text):
    """A line for the user, above the progress bar."""
    if leads():
        tqdm.write(text, file=sys.stderr)


def learn(args, model, work):
    """The loop, and all that one sees of it."""
    by_subject = {id(one): (run, photos) for run, one, photos in work}
    for run, one, _ in work if leads() else []:
        now = one.concept.vectors.detach().cpu().clone()
        run.vectors_at.setdefault(0, now)
        for step, vectors in run.vectors_at.items():  # rows of a resumed run are drawn again
            one.put(vectors)
            run.preview(one, step)
        one.put(now)
    done = min(one.step for _, one, _ in work)
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=not leads())
    options = {k: getattr(args, k) for k in ("steps", "batch_size", "lr", "seed", "accumulate")}
    for step in invert(
        model,
        [one for _, one, _ in work],
        early_stop=not args.no_early_stop,
        evaluate_every=EVALUATE_EVERY,
        span=args.timesteps,
        **options,
    ):
        one = step.subject
        run, photos = by_subject[id(one)]
        bar.update(step.number - bar.n)
        if not leads():
            continue
        norm, cosine = run.statistics(one)
        evaluation = one.evaluations[-1] if step.evaluated else ""
        run.log.append((step.number, step.loss, evaluation, step.gradient, norm, cosine))
        if step.evaluated:
            nearest = " ".join(word for word, _ in run.nearest(one, 3))
            bar.set_postfix_str(
                f"{run.token}: eval {one.evaluations[0]:.4f} → {evaluation:.4f}, cos {cosine:.2f}, "
                f"norm {norm:.2f} (vocabulary {run.median:.2f}), near {nearest}"
            )
        if step.number in PREVIEW_STEPS:
            run.vectors_at[step.number] = one.concept.vectors.detach().cpu().clone()
            run.preview(one, step.number)
        if step.number % args.save_every == 0:
            run.save(one, photos)
    bar.close()


def finish(args, model, work, began):
    """Write everything once more, say what came out: -> exit status."""
    status = 0
    for run, one, photos in work:
        run.preview(one, one.step, label=f"step {one.step}, the word")
        run.save(one, photos)
        if one.step % EVALUATE_EVERY:  # not part of the state: a run that goes on evaluates on time
            one.evaluations.append(evaluate(model, one, args.seed, args.timesteps))
        first, last = one.evaluations[0], one.evaluations[-1]
        stop = ", flat by then" if one.finished else ""
        print(f"{run.token}: evaluation loss {first:.4f} → {last:.4f} in {one.step} steps{stop}")
        print("nearest words: " + ", ".join(f"{word} {cosine:.2f}" for word, cosine in run.nearest(one)))
        if problem := trouble(one):
            print(f"WARNING: {run.token} has learned nothing: {problem}", file=sys.stderr)
            status = 1
        weights = "" if args.weights == str(HERE / "weights" / "tiny") else f" --weights {args.weights}"
        words = os.path.relpath(run.folder)
        print(f'use it: python sample.py "a photo of {run.token} on the beach" --words {words}{weights}')
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if sys.platform == "darwin" else 2**20
        )
    print(f"{time.time() - began:.0f} s, {memory:.1f} GiB at most")
    return status


def train(args):
    """All of it: -> exit status."""
    began = time.time()
    device, dtype = pick_device(args.device, args.precision)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if args.batch_size < dist.get_world_size():
            raise ValueError(
                f"--batch-size {args.batch_size} is less than the {dist.get_world_size()} processes"
            )
    model = tinyti.load(args.weights, device, dtype, args.prediction, args.tokenizer)
    model.unet.checkpointing = args.gradient_checkpointing
    work = prepare(args, model)
    try:
        learn(args, model, work)
    except KeyboardInterrupt:
        for run, one, photos in work if leads() else []:
            run.save(one, photos)
        say("interrupted; the words so far are saved, --resume goes on")
        return 130
    status = finish(args, model, work, began) if leads() else 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def main(argv=None):
    """Run, and turn bad input into one line and exit status 2."""
    try:
        return train(arguments(argv))
    except torch.cuda.OutOfMemoryError:
        print(
            "train.py: out of GPU memory; take --accumulate, --gradient-checkpointing or a smaller --size",
            file=sys.stderr,
        )
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
