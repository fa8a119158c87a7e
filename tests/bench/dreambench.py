"""Measure learned words by DreamBench: DINO, CLIP-I and CLIP-T of the DreamBooth paper (2208.12242).

    git clone https://github.com/google/dreambooth     # 158 pictures of 30 subjects, 112 MB, CC BY 4.0
    python -m tests.bench dreambench --data dreambooth --clip CLIP --dino DINO --check
    python -m tests.bench dreambench --data dreambooth --clip CLIP --dino DINO --weights weights/sd15
    python -m tests.bench dreambench --data dreambooth --clip CLIP --dino DINO --weights weights/sd15 --grid

CLIP and DINO are folders of weights/README.md.  On a GPU: `--device cuda --precision bf16`.  `--check` draws
nothing: it compares the real pictures of a subject with each other, which must give the paper's row.
`--grid` tests on four subjects whether 50 steps are enough: our settings against diffusers' recipe.

Every picture is a row of rows.csv in --out, and every word a file beside it.  A stopped run continues when it
is started again.  The paper does not name its CLIP, sampler, guidance, seeds and texts; ours are printed.
"""

import csv
import io
import os
import re
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

import tinyti
from notebooks.setups import use
from notebooks.study import commit, digest
from tinyti.concept import word_length
from tinyti.examples import OBJECT_TEMPLATES, make_examples
from tinyti.files.pictures import SUFFIXES, read_image, read_photos, read_text, to_image
from tinyti.files.words import read_words, write_words
from tinyti.inversion import OPTIMIZERS, STEPS, TIMESTEPS, Inversion, invert
from tinyti.programs.miniature import default_guidance
from tinyti.whitened import whitened

from .common import head, row
from .sides import DTYPES, RECIPE, Theirs

TOKEN = "S*"
PROMPT = r"""(['"])([^{}]*\{0\} \{1\}[^{}]*)\1\.format\(unique_token, class_token\),?"""  # a line of the file
LIVE = ("cat", "dog")  # classes of the 9 live subjects, which have their own prompts; the file lists none
FEW = ("dog", "backpack_dog", "teapot", "robot_toy")  # the subjects of --grid
KEYS = ("run", "choices", "subject", "prompt", "picture", "seed", "weights", "judges")
SCORES = ("dino", "clip_i", "clip_t")
COLUMNS = (*KEYS, *SCORES, "commit")
PUBLISHED = [
    ("real pictures, DreamBooth paper", 0.774, 0.885, ""),
    ("Textual Inversion, DreamBooth paper", 0.569, 0.780, 0.255),
    ("Textual Inversion, ZOODiP paper, 5 pictures a prompt", 0.559, 0.778, 0.285),
    ("Custom Diffusion, DreamCache paper", 0.643, 0.790, 0.305),
    ("ELITE, DreamCache paper", 0.621, 0.771, 0.293),
    ("BLIP-Diffusion, DreamCache paper", 0.594, 0.779, 0.300),
    ("IP-Adapter, DreamCache paper", 0.667, 0.813, 0.289),
]

# -- the runs ------------------------------------------------------------------------------------------------

DEFAULT = {"angle": OPTIMIZERS["whitened"][1], "length": 1, "span": TIMESTEPS, "steps": STEPS}
GRID = [  # of --grid: what differs from DEFAULT, or the steps of diffusers' recipe
    *({"angle": angle, "span": span, "steps": steps}
      for angle in (0.06, 0.12) for span in (TIMESTEPS, (0.5, 0.9)) for steps in (STEPS, 200)),
    *({"length": length} for length in (0.5, 2)),  # in lengths of a real word
    {"recipe": 100},
    {"recipe": RECIPE["steps"]},
]  # fmt: skip


def label(run):
    """A run's name in the rows: its settings."""
    if "recipe" in run:
        return f"diffusers, {run['recipe'] * RECIPE['batch']} samples"
    values = {k: "-".join(map(str, v)) if isinstance(v, tuple) else v for k, v in (DEFAULT | run).items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def learn(model, args, folder, class_name, run, seed):
    """Learn a run's vectors (n, D) from the pictures in a folder.

    The settings of a run act only here.  The recipe starts from the last word of the class name.
    """
    if "recipe" in run:
        case = {"weights": args.weights, "device": args.device, "precision": args.precision[0]}
        case |= {"size": model.size, "batch": RECIPE["batch"], "vectors": 1, "seed": seed}
        side = Theirs(images=folder, start=class_name.split()[-1], **case)
        for _ in range(run["recipe"]):
            side.step()
        return side.table[side.ids].detach()
    settings = DEFAULT | run
    use(model, {TOKEN: torch.zeros(1, model.text.table.shape[1])})
    examples = make_examples(model, TOKEN, read_photos(folder, model.size)[0], OBJECT_TEMPLATES)
    state = Inversion(model, model.concepts[TOKEN])
    length = settings["length"] * word_length(model.text.table)
    state.optimizer = partial(whitened, angle=settings["angle"], length=length)
    for _ in invert(model, state, examples, settings["steps"], seed=seed, span=settings["span"]):
        pass
    return state.vectors


# -- the data ------------------------------------------------------------------------------------------------


def read_data(folder):
    """The pictures' folder and {subject: (class, prompts)}; no code of prompts_and_classes.txt runs."""
    files = [path / "prompts_and_classes.txt" for path in (folder, folder / "dataset")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        hint = "git clone https://github.com/google/dreambooth"
        raise FileNotFoundError(f"--data {folder} has no prompts_and_classes.txt; {hint}")
    section, classes, prompts = None, {}, {"Object Prompts": [], "Live Subject Prompts": []}
    for number, line in enumerate(map(str.strip, read_text(file).splitlines()), 1):
        subject, prompt = re.fullmatch(r"([\w-]+),(\w[\w -]*)", line), re.fullmatch(PROMPT, line)
        if line in ("Classes", "Prompts", *prompts):
            section = line
        elif line in ("", "subject_name,class", "prompt_list = [", "]"):
            continue
        elif section == "Classes" and subject:
            classes[subject[1]] = subject[2]
        elif section in prompts and prompt:
            prompts[section].append(prompt[2])
        else:
            expected = "a class or a prompt as in google/dreambooth"
            raise ValueError(f"{file}, line {number}: {line!r:.80} is not {expected}")
    objects, live = prompts.values()
    if not (classes and objects and live):
        found = f"{len(classes)} classes, {len(objects)} prompts of objects and {len(live)} of live subjects"
        raise ValueError(f"{file} has {found}; expected some of each, as in google/dreambooth")
    return file.parent, {name: (kind, live if kind in LIVE else objects) for name, kind in classes.items()}


def pictures_of(folder):
    """The real pictures of a subject, PIL images."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"{folder} has {len(files)} pictures; expected two or more of one subject")
    return [read_image(file) for file in files]


def fill(prompt, token, class_name):
    """Fill the word, the class or both into a prompt of the file."""
    return " ".join(prompt.replace("{0}", token).replace("{1}", class_name).split())


# -- the measures --------------------------------------------------------------------------------------------


class Judges:
    """The measuring networks, and their vectors of the real pictures: {subject: (DINO's, CLIP's)}."""

    def __init__(self, args, folder, subjects):
        self.clip, self.tokenizer = tinyti.load_clip(args.clip, args.device)
        self.dino = tinyti.load_dino(args.dino, args.device)
        self.digest = digest(self.dino, self.clip)
        self.real = {subject: self.look(pictures_of(folder / subject)) for subject in subjects}

    @torch.no_grad()
    def look(self, pictures):
        """Pictures -> vectors of length 1, DINO's and CLIP's, (B, D) each."""
        return self.dino.encode_image(pictures), self.clip.encode_image(pictures)

    @torch.no_grad()
    def scores(self, pictures, subject, texts):
        """DINO, CLIP-I and CLIP-T of each picture: means over all real pictures, and against its text."""
        seen, device = self.look(pictures), self.clip.logit_scale.device
        likeness = [(one @ real.T).mean(dim=1) for one, real in zip(seen, self.real[subject])]
        obedience = (seen[1] * self.clip.encode_text(self.tokenizer(texts).to(device))).sum(dim=1)
        return torch.stack([*likeness, obedience], dim=1).tolist()

    def compare_real(self):
        """Means over subjects of DINO and CLIP-I: of pairs of different real pictures, and of all pairs."""
        found = []
        for real in self.real.values():
            cosines = [one @ one.T for one in real]
            n = len(cosines[0])
            different = [((c.sum() - c.trace()) / (n * (n - 1))).item() for c in cosines]
            found.append(different + [c.mean().item() for c in cosines])
        means = [statistics.mean(column) for column in zip(*found)]
        return means[:2], means[2:]


# -- the rows ------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a file by their KEYS, and the file open for more.  A cut last line is dropped."""

    def __init__(self, file):
        data = file.read_bytes() if file.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = csv.reader(io.StringIO(whole.decode(errors="replace")))
        if (first := next(lines, list(COLUMNS))) != list(COLUMNS):
            raise ValueError(f"{file} has the columns {first!r:.80}, expected {', '.join(COLUMNS)}")
        self.found = {}
        for line in lines:
            try:
                values = dict(zip(COLUMNS, line, strict=True))
                self.found[tuple(values[k] for k in KEYS)] = [float(values[score]) for score in SCORES]
            except ValueError:
                raise ValueError(f"{file}, line {lines.line_num}, is no row of it; remove it") from None
        if len(whole) < len(data):
            os.truncate(file, len(whole))
        self.stream = open(file, "a", newline="", encoding="utf-8")  # noqa: SIM115
        if not whole:
            self._write(COLUMNS)

    def add(self, key, scores, source):
        """Add a row, and hand it to the system before the next one is made."""
        self.found[key] = scores
        self._write([*key, *(f"{score:.6f}" for score in scores), source])

    def _write(self, cells):
        csv.writer(self.stream, lineterminator="\n").writerow(cells)
        self.stream.flush()


class Bench:
    """All that a row depends on."""

    def __init__(self, args, folder, data, judges):
        self.args, self.folder, self.data, self.judges = args, folder, data, judges
        self.model = tinyti.load(args.weights, args.device, DTYPES[args.precision[0]])
        self.digest = digest(self.model.unet, self.model.vae, self.model.text)
        self.guidance = default_guidance(args.weights) if args.guidance is None else args.guidance
        self.commit = commit()
        words = f"{TOKEN} and class" if args.class_word else TOKEN
        self.choices = f"{args.sampler}, {args.draw_steps} steps, guidance {self.guidance:g}, {words}"
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(self.out / "rows.csv")

    def texts(self, subject, i):
        """What is drawn for the subject's prompt i, and what CLIP-T compares it with."""
        class_name, prompts = self.data[subject]
        shown = fill(prompts[i - 1], TOKEN, class_name if self.args.class_word else "")
        return shown, fill(prompts[i - 1], "", class_name)

    def keys(self, run, subject, seed):
        """The keys of a subject's rows: pictures of prompts, both counted from 1."""
        numbers = range(1, len(self.data[subject][1]) + 1), range(1, self.args.pictures + 1)
        places = [(i, j) for i in numbers[0] for j in numbers[1]]
        ends = str(seed), self.digest, self.judges.digest
        return [(label(run), self.choices, subject, str(i), str(j), *ends) for i, j in places]

    def word(self, run, subject, seed):
        """Read a word's vectors from its file, or learn and write them if there is none."""
        file = self.out / "words" / self.digest / label(run) / f"{subject}-{seed}.safetensors"
        if not file.is_file():
            began = time.monotonic()
            vectors = learn(self.model, self.args, self.folder / subject, self.data[subject][0], run, seed)
            if not vectors.isfinite().all():
                raise FloatingPointError("the word is not made of finite numbers")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_words(file, {TOKEN: vectors.cpu()})
            print(f"{subject} {seed}: {label(run)}: learned in {time.monotonic() - began:.0f} s", flush=True)
        return read_words(file, self.model.text.table.shape[1])[TOKEN]

    def complete(self, run, subject, seed):
        """Draw and measure a subject's missing pictures."""
        keys, size = self.keys(run, subject, seed), self.args.batch[0]
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        batches = [batch for batch in batches if not self.rows.found.keys() >= set(batch)]
        if batches:
            use(self.model, {TOKEN: self.word(run, subject, seed)})
        for batch in batches:  # whole batches: the last digits of a picture depend on its neighbours
            numbers = [(int(prompt), int(picture)) for *_, prompt, picture, _, _, _ in batch]
            shown, compared = zip(*(self.texts(subject, i) for i, _ in numbers))
            scores = self.judges.scores(self.draw(list(shown), numbers), subject, list(compared))
            for key, values in zip(batch, scores):
                if key not in self.rows.found:
                    self.rows.add(key, values, self.commit)

    @torch.no_grad()
    def draw(self, prompts, numbers):
        """A picture of each prompt; its noise depends on its two numbers alone."""
        generators = [torch.Generator().manual_seed(1000 * i + j) for i, j in numbers]
        settings = self.args.draw_steps, self.guidance, self.args.sampler
        *_, x_0 = tinyti.sample(self.model, prompts, *settings, generator=generators)
        return [to_image(pixels) for pixels in self.model.decode(x_0)]

    def means(self, run, subject, seeds):
        """How many pictures are measured and how many wanted, and the means of their scores."""
        keys = [key for seed in seeds for key in self.keys(run, subject, seed)]
        found = [self.rows.found[key] for key in keys if key in self.rows.found]
        return len(found), len(keys), [statistics.mean(column) for column in zip(*found)]


# -- the program ---------------------------------------------------------------------------------------------


def dreambench(args):
    """Learn, draw and measure; returns the exit status, 1 if a word or a picture was not finite."""
    if not (args.data and args.dino):
        raise ValueError("dreambench needs --data and --dino, and --clip if no clip/ is beside the weights")
    args.clip = args.clip or Path(args.weights) / "clip"
    folder, data = read_data(Path(args.data))
    subjects = list(dict.fromkeys(args.subjects or (FEW if args.grid else data)))
    if unknown := [name for name in subjects if name not in data]:
        raise ValueError(f"--subjects: {unknown[0]} is not in the data; there are {', '.join(data)}")
    if missing := [name for name in subjects if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"the folder {folder / missing[0]} is missing; download the whole data set")
    judges = Judges(args, folder, subjects)
    print_check(judges, len(data))
    if args.check:
        return 0
    bench, failed = Bench(args, folder, data, judges), 0
    print_choices(bench, subjects[0])
    runs = GRID if args.grid else [{}]
    for run in runs:
        for subject in subjects:
            for seed in args.seeds:
                try:
                    bench.complete(run, subject, seed)
                except FloatingPointError as error:
                    failed = 1
                    print(f"{subject} {seed}: {label(run)}: {error}", flush=True)
    print_means(bench, runs, subjects)
    return failed


def print_check(judges, count):
    """Print how alike the real pictures are, beside the paper's numbers."""
    different, every = judges.compare_real()
    head("real pictures among themselves", "DINO", "CLIP-I")
    row(f"pairs of different pictures, mean over {len(judges.real)} of {count} subjects", *different)
    row("the same, each picture with itself, too", *every)
    row(*PUBLISHED[0][:3])
    print("\nWith ViT-S/16, the paper's CLIP and all 30 subjects the first row must agree with the paper's.")
    print("This is unverified: nobody has told us of such a run with the published weights.\n")


def print_choices(bench, subject):
    """Print the choices that the paper leaves open."""
    shown, compared = bench.texts(subject, 1)
    head("choice", "here")
    row("sampler and prompts", bench.choices)
    row("pictures", f"{bench.args.pictures} a prompt, {bench.model.size} pixels, no negative prompt")
    row("drawn", f"{shown!r}, the noise of picture j of prompt i from seed 1000 i + j, in every run")
    row("CLIP-T compares with", repr(compared))
    row("DINO and CLIP-I compare with", "all real pictures of the subject, which the word was learned from")
    row("DINO's pictures", "shorter side 256 (bicubic), middle 224, ImageNet's mean and deviation")
    row("CLIP's pictures", f"as its preprocessor_config.json says; {bench.args.clip}")
    row("seeds of the words", " ".join(map(str, bench.args.seeds)))
    row("commit, weights, judges", f"{bench.commit}, {bench.digest}, {bench.judges.digest}")
    print(flush=True)


def print_means(bench, runs, subjects):
    """Print the means of each subject, and over subjects beside the published ones."""
    over = defaultdict(list)
    print()
    head("run", "subject", "pictures", "DINO", "CLIP-I", "CLIP-T")
    for run in runs:
        for subject in subjects:
            found, wanted, means = bench.means(run, subject, bench.args.seeds)
            row(label(run), subject, f"{found} of {wanted}", *means)
            if found == wanted:
                over[label(run)].append(means)
    print()
    head("run", "subjects", "DINO", "CLIP-I", "CLIP-T")
    for name, means in over.items():
        row(name, len(means), *(statistics.mean(column) for column in zip(*means)))
    for name, *means in PUBLISHED:
        row(name, 30, *means)
    print("\nThe DreamBooth paper calls differences of 0.1 in DINO and 0.05 in CLIP-T significant to users.")
