"""What the questions share: cases, clocks, tables, and processes of their own."""

import itertools
import json
import os
import subprocess
import sys
import time

import torch

from tinyti.programs.miniature import ROOT


def cases(args):
    """All (sizes, batches, numbers of vectors), each with what our side and theirs are made with."""
    shared = {name: getattr(args, name) for name in ("weights", "images", "device")}
    precisions = args.precision[0], args.precision[-1]
    for case in itertools.product(args.size, args.batch, args.vectors):
        both = shared | dict(zip(("size", "batch", "vectors"), case))
        yield case, [both | {"precision": precision} for precision in precisions]


def clock(step, count, device):
    """Seconds that each of `count` steps takes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def isolated(function, **arguments):
    """What a function of this package prints as JSON, in a process of its own."""
    module, name = function.__module__, function.__name__
    command = [sys.executable, "-c", f"import {module} as m; m.{name}(**{arguments!r})"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(*cells):
    """A line of a table."""
    print("|", " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells), "|")


def head(*cells):
    row(*cells)
    row(*["---"] * len(cells))
