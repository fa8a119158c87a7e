"""Learn a word from a few pictures:  python train.py --images concepts/robot --token "S*" """

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from tinyti import Concept, Inversion, invert, make_examples
from tinyti.concept import word_length
from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES, read_templates
from tinyti.files.hub import find_word, is_name
from tinyti.files.pictures import read_photos
from tinyti.files.words import check_name, compatibility_warning, read_words
from tinyti.inversion import (
    BATCH_SIZE,
    EVALUATE_EVERY,
    OPTIMIZERS,
    STEPS,
    TIMESTEPS,
    diagnose,
    evaluate,
    is_flat,
)
from tinyti.programs import cli
from tinyti.programs.cli import number_type, path_type, text_type
from tinyti.programs.miniature import ROOT, is_tiny
from tinyti.programs.run import PREVIEWS, STYLE_PREVIEWS, Run


def arguments(argv=None):
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("what to learn").add_argument
    add("--images", type=path_type, required=True, metavar="FOLDER", help="three to five pictures")
    add(
        "--token",
        type=text_type,
        required=True,
        metavar="WORD",
        help="the new word (placeholder token), without spaces",
    )
    add(
        "--init",
        type=text_type,
        metavar="WORDS",
        help="initial vector: words of the vocabulary, or a learned word's file, folder or name; "
        "by default zeros, and the first step finds a direction",
    )
    add(
        "--vectors",
        type=number_type(1, 75, int),
        metavar="N",
        help="vectors (tokens) of the word; by default 1, or as many as the learned word in --init has",
    )
    add("--style", action="store_true", help="learn a style: train with the paper's style prompts")
    add(
        "--templates",
        type=path_type,
        metavar="FILE",
        help="training prompts, one a line, with {} for the word; by default the paper's",
    )
    add("--no-flip", action="store_true", help="no horizontal flips: for writing and asymmetric things")
    add(
        "--size",
        type=number_type(1, 4096, int),
        metavar="PIXELS",
        help="side of a training picture; by default the model's resolution",
    )

    add = parser.add_argument_group("how to learn it").add_argument
    angle, rate = (OPTIMIZERS[name][1] for name in ("whitened", "adam"))
    add("--steps", type=number_type(1, 10**6, int), default=STEPS, metavar="N", help="optimization steps")
    add(
        "--batch-size",
        type=number_type(1, 4096, int),
        default=BATCH_SIZE,
        metavar="N",
        help="samples per step, over all GPUs together",
    )
    add(
        "--accumulate",
        type=number_type(1, 4096, int),
        default=1,
        metavar="N",
        help="gradient accumulation: compute a batch in N parts, to save memory",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, but 40 %% slower")
    add("--optimizer", choices=OPTIMIZERS, default="whitened", help="adam takes ten times the steps")
    add(
        "--angle",
        type=number_type(1e-6, 1.5),
        metavar="RADIANS",
        help=f"step size of whitened steps: how far a step turns the vector; by default {angle}",
    )
    add("--lr", type=number_type(1e-30, 100), help=f"learning rate of adam; by default {rate}")
    add(
        "--timesteps",
        type=number_type(0, 1),
        nargs=2,
        default=list(TIMESTEPS),
        metavar=("LOW", "HIGH"),
        help="range of timesteps to train on, as fractions of the schedule; the paper's is 0 1, "
        "but low timesteps teach little",
    )
    add("--seed", type=cli.SEED, default=0, metavar="N", help="random seed")
    cli.model_flags(parser)

    add = parser.add_argument_group("what comes out").add_argument
    add("--out", type=path_type, metavar="FOLDER", help="output folder; by default words/ and the word")
    add("--save-every", type=number_type(1, 10**6, int), default=100, metavar="N", help="save every N steps")
    add(
        "--preview",
        type=text_type,
        nargs="+",
        metavar="PROMPT",
        help="validation prompts, drawn in progress.png, with {} or the word itself; by default five",
    )
    add("--resume", action="store_true", help="continue from the last checkpoint; on a CPU to the same bytes")
    add("--force", action="store_true", help="overwrite a run in --out")
    args = parser.parse_args(argv)
    if args.lr is not None and args.optimizer != "adam":
        raise ValueError(
            "--lr is Adam's learning rate; give a whitened step an --angle, or take --optimizer adam"
        )
    if args.angle is not None and args.optimizer != "whitened":
        raise ValueError("--angle is the step size of whitened steps; give Adam a learning rate, --lr")
    if not args.timesteps[0] < args.timesteps[1]:
        raise ValueError(f"--timesteps is {' '.join(map(str, args.timesteps))}; give the lower number first")
    if len(args.token) > 64:
        raise ValueError(f"--token has {len(args.token)} characters; take a short word, at most 64")
    return args


def main(argv=None):
    """Run the program; bad input gives one line and exit status 2."""
    return cli.run_program("train.py", lambda: train(arguments(argv), sys.argv[1:] if argv is None else argv))


def train(args, argv):
    """Learn the word and write its folder; returns the exit status."""
    began = time.monotonic()
    check_name(args.token)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if args.batch_size < (ranks := dist.get_world_size()):
            raise ValueError(f"--batch-size {args.batch_size} is less than the {ranks} processes")
    model = cli.load_model(args)
    model.unet.checkpointing = args.gradient_checkpointing
    size = args.size or model.size
    model.check_size(size, size)
    templates = STYLE_TEMPLATES if args.style else OBJECT_TEMPLATES
    if args.templates:
        templates = read_templates(args.templates)
    photos, passed_over = read_photos(args.images, size)
    start = start_vectors(model, args)
    args.vectors = len(start)
    concept = model.add_word(args.token, start)
    examples = make_examples(model, args.token, photos, templates, flip=not args.no_flip)
    check_templates(model, args.token, templates)
    check_prompts(model, concept, examples.prompts)
    state = Inversion(model, concept, args.optimizer, args.angle or args.lr)
    run = Run(args, model, state, photos, templates) if cli.is_main_process() else None
    progress = {"initial": state.step, "unit": "step", "disable": not run}
    with run or nullcontext(), tqdm(total=args.steps, **progress) as bar:  # no bar if the run is refused
        if passed_over:
            cli.say(f"passed over {'; '.join(passed_over)}")
        if uses_photos_on_tiny(args):
            cli.say(
                "the miniature knows its drawn world only; for photos take a real model: weights/README.md"
            )
        if dist.is_initialized():  # all processes start from the first one's state
            saved = [state.state_dict()]
            dist.broadcast_object_list(saved)
            state.load_state_dict(saved[0])
        options = {name: getattr(args, name) for name in ("steps", "batch_size", "seed", "accumulate")}
        for _ in invert(model, state, examples, span=args.timesteps, **options):
            bar.update()
            if state.step % EVALUATE_EVERY == 0:
                bar.set_postfix_str(f"evaluation {state.evaluations[0]:.4f}, now {state.evaluations[-1]:.4f}")
            if run:
                run.keep()
        if run and state.is_finite():
            run.save(last=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not run:
        return 0
    status = report(args, argv, model, state, examples, run)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if model.device.type == "cuda" else ""
    print(f"{time.monotonic() - began:.0f} s{memory}")
    return status


def check_templates(model, name, templates):
    """Refuse a word that a template contains: the prompt would have it twice."""
    for template in templates:
        if model.tokenizer.has_word(template.replace("{}", " "), name):
            raise ValueError(f"the template {template!r} contains {name!r} itself; take another --token")


def check_prompts(model, concept, prompts):
    """Refuse vectors that do not fit into every prompt, and prompts where the word is part of another."""
    places = model.tokenizer.length - 2
    for prompt in {line for lines in prompts for line in lines}:
        if not set(concept.ids) <= set(model.tokenizer.encode(prompt)[:places]):
            found = f"the prompt {prompt!r} has no room for the {len(concept.ids)} vectors of the word"
            advice = "take fewer --vectors or other --templates"
            raise ValueError(f"{found}, or the word does not stand alone in it; {advice}")


def start_vectors(model, args):
    """Return the vectors (n, D) that the word starts from: zeros, rows of the vocabulary, or a learned word.

    ValueError if --init is neither words of the vocabulary nor a learned word that fits.
    """
    table, words = model.text.table, (args.init or "").split()
    ids = [model.tokenizer.single(word) for word in words]
    if not words:  # the first step finds a direction
        return torch.zeros(args.vectors or 1, table.shape[1])
    if None not in ids:
        return Concept.initial(table[ids], args.vectors or 1, args.seed)
    path = find_word(args.init, args.download) if is_name(args.init) else Path(args.init)
    if not path.exists():
        found = f"--init {words[ids.index(None)]!r} is no single word of the model's vocabulary"
        raise ValueError(f"{found}, and no file of a learned word; take a simpler one")
    learned = read_words(path, table.shape[1], lambda note: cli.say(f"note: {note}"))
    if len(learned) > 1:
        raise ValueError(f"--init {args.init} holds {len(learned)} words, expected one: {', '.join(learned)}")
    [vectors] = learned.values()
    if args.vectors not in (None, len(vectors)):
        raise ValueError(f"--init {args.init} has {len(vectors)} vectors, --vectors is {args.vectors}")
    return vectors


def report(args, argv, model, state, examples, run):
    """Print the result; returns the exit status, 1 if nothing was learned or pictures are not finite."""
    if state.step % EVALUATE_EVERY:  # not saved: a resumed run evaluates at its own steps
        state.evaluations.append(evaluate(model, examples, args.seed, args.timesteps))
    first, last = state.evaluations[0], state.evaluations[-1]
    print(f"{args.token}: evaluation loss {first:.4f}, now {last:.4f}, after {state.step} steps")
    if problem := diagnose(state):
        print(f"WARNING: {args.token} has learned nothing: {problem}", file=sys.stderr)
    if state.is_finite():
        report_word(args, argv, model, state, run)
    # If the pictures are not finite, the word or the model is unusable.
    return 1 if problem or isinstance(run.problem, FloatingPointError) else 0


def report_word(args, argv, model, state, run):
    """Print whether more steps help, the word's length, its nearest words and how to use it."""
    if is_flat(state.evaluations):
        print("the loss has become flat: more steps change little")
    else:
        again = [flag for flag in argv if flag not in ("--force", "--resume")]
        if "--steps" in again:
            place = again.index("--steps")
            del again[place : place + 2]
        more = ["python", "train.py", *again, "--steps", str(2 * state.step), "--resume"]
        print("the loss is still falling; go on:", cli.shell_command(more))
    length, real = state.vectors.norm(dim=-1).max().item(), word_length(model.text.table)
    print(f"length {length:.2f}, {length / real:.1f} times a real word's")
    if length > 3 * real:
        print("WARNING: the word is so long that prompts may be ignored; lower --lr", file=sys.stderr)
    if uses_photos_on_tiny(args):
        hint = "for photos take a real model: weights/README.md"
        print(
            f"note: the miniature knows its own drawn world only, so expect no likeness; {hint}",
            file=sys.stderr,
        )
    if warning := compatibility_warning(args.token, args.vectors):
        print(f"note: {warning}", file=sys.stderr)
    nearest = state.concept.nearest(model.text.table, 5, model.tokenizer.word_ids())[0]
    near = [f"{model.tokenizer.token(id)} {cosine:.2f}" for id, cosine in nearest]
    print("nearest words:", ", ".join(near))
    prompt = (STYLE_PREVIEWS if args.style else PREVIEWS)[1].replace("{}", args.token)
    command = ["python", "sample.py", prompt, "--words", str(cli.short_path(run.folder))]
    if not is_tiny(args.weights):
        command += ["--weights", args.weights]
    if args.clip_skip != 1:
        command += ["--clip-skip", str(args.clip_skip)]
    print("use it:", cli.shell_command(command))


def uses_photos_on_tiny(args):
    """Whether the miniature learns from pictures that are not of its own world."""
    return is_tiny(args.weights) and ROOT / "concepts" not in Path(args.images).resolve().parents


if __name__ == "__main__":
    cli.leave(main)
