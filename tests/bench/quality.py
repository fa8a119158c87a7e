"""The quality of the words that both programs learn, and the time they take."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tinyti
from tinyti.files.words import read_words, write_words
from tinyti.inversion import BATCH_SIZE, STEPS
from tinyti.programs.miniature import ROOT
from tinyti.programs.run import WORD_FILE

from .common import head, isolated, row
from .sides import RECIPE, Theirs


def quality(args):
    """Run both whole programs with their defaults: time, samples and the word's scores, means over sets."""
    from notebooks import setups, study

    model, clip = tinyti.load(args.weights), tinyti.load_clip(Path(args.weights) / "clip")
    found = {}
    for name in args.sets:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as out:
                for key, (seconds, file) in programs(args, name, seed, Path(out), study.SETS[name]).items():
                    setups.use(model, {"S*": next(iter(read_words(file).values()))})
                    data = study.Data(model, name)
                    scores = {"seconds": seconds, "loss": study.heldout_loss(model, data)}
                    found.setdefault(key, []).append(scores | study.scores(model, clip, data, "S*"))
    columns = ("seconds", *study.SCORES)
    head("program", "samples", *columns)
    for (side, samples), runs in found.items():
        cells = [[run[column] for run in runs if column in run] for column in columns]
        row(side, samples, *(statistics.mean(cell) if cell else "" for cell in cells))


def programs(args, name, seed, out, about):
    """Run both on a set: {(side, samples): (seconds since the program's start, the word's file)}."""
    images, is_style = ROOT / "concepts" / name, about["kind"] == "style"
    command = [sys.executable, "train.py", "--images", images, "--token", "S*", "--seed", seed, "--out", out]
    command += ["--weights", args.weights, "--device", args.device, "--precision", "fp32"]
    command += ["--style"] * is_style
    began = time.time()
    subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)  # status 1: nothing learned
    words = {("tinyti", STEPS * BATCH_SIZE): (time.time() - began, out / WORD_FILE)}
    case = {"weights": args.weights, "images": str(images), "size": args.size[0], "batch": RECIPE["batch"]}
    case |= {"vectors": 1, "device": args.device, "precision": "fp32"}
    case |= {"style": is_style, "start": about["start"], "seed": seed}
    began = time.time()
    for steps, ended in isolated(recipe, out=str(out), steps=args.steps, **case).items():
        words["diffusers", int(steps) * RECIPE["batch"]] = ended - began, out / f"{steps}.safetensors"
    return words


def recipe(out, steps, **case):
    """Run diffusers' recipe: write words along the way, and print when each was written."""
    side, ended = Theirs(**case), {}
    for i in range(1, steps + 1):
        side.step()
        if i in (25, 50, 100, 250, 500, 1000, 2000, steps):
            write_words(Path(out) / f"{i}.safetensors", {"S*": side.table[side.ids].detach()})
            ended[i] = time.time()
    print(json.dumps(ended))
