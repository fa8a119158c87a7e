"""Fixtures and helpers that several test files share."""

import functools
import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tinyti
from tinyti.programs import cli
from tinyti.programs.run import Run

# A shell ignores Ctrl-C in background jobs, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
TINY, CONCEPTS = ROOT / "weights" / "tiny", ROOT / "concepts"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """The whole suite runs in a process a core, up to four; the slow tests, and pages by name, in one.

    Each has one thread, as has every process that a test starts: they would wait for each other.
    """
    if config.option.markexpr != "not slow" or config.args_source is not config.ArgsSource.TESTPATHS:
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers inherit it
    return min(4, os.cpu_count())


def randomise(module, scale=0.15):
    """Weights that leave no parameter at its silent initial value (biases 0, norms 1)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.add_(scale * noise)
    return module.eval()


def relative_error(reference, result):
    """The largest difference, relative to the reference's scale."""
    assert reference.shape == result.shape
    return ((reference - result).abs().max() / reference.abs().max()).item()


def saved(contents, **options):
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(contents, stream, **options)
    return stream.getvalue()


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def tree(folder):
    """What is in a folder: names, and the bytes of plain files."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refuses(program, flags, folder, capsys, message=""):
    """Status 2, one line that says who speaks and the `message`, and nothing written."""
    before = tree(folder), tree(CONCEPTS / "cat")
    status = program.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, (flags, status, error)
    assert error.startswith(program.__name__ + ".py: ") and message in error and len(error) < 2000, error
    assert (tree(folder), tree(CONCEPTS / "cat")) == before, flags


@pytest.fixture(scope="module")
def loaded():
    """Runs of the two programs in this process take a miniature that is loaded once, and draw no previews."""
    load_model = cli.load_model

    def load_once(args):
        is_other = args.weights != str(TINY) or args.precision or args.clip_skip > 1
        if is_other or args.device not in ("auto", "cpu"):
            return load_model(args)
        model = _tiny()
        model.tokenizer.words.clear()
        model.concepts.clear()
        return model

    def pictures(run, vectors, prompts):  # that tell vectors apart
        level = int(vectors.abs().sum().item() * 1e4) % 256
        return [Image.new("RGB", (16, 16), (level, i, 0)) for i in range(len(prompts))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_model", load_once)
        patch.setattr(Run, "pictures", pictures)
        yield


@functools.cache
def _tiny():
    return tinyti.load(TINY)


def of_family(name, **scheduler):
    """A fixture: the tiny model of a family, as `published.Published` holds it."""

    @pytest.fixture(scope="session", name=name)
    def model(tmp_path_factory):
        from .published import Published

        return Published(name, tmp_path_factory.mktemp(name), **scheduler)

    return model


sd1, sd2, ldm = of_family("sd1"), of_family("sd2", prediction_type="v_prediction"), of_family("ldm")


@pytest.fixture(params=["sd1", "sd2", "ldm"])
def family(request):
    """Each of the three in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def pictures():
    """Three pictures of different shapes: smooth colours under noise."""
    rng = np.random.default_rng(0)
    made = []
    for h, w in ((40, 60), (97, 33), (32, 32)):
        y, x = np.mgrid[0:h, 0:w]
        base = np.stack([255 * x / w, 255 * y / h, 128 + 100 * np.sin(x / 7)], axis=-1)
        made.append(Image.fromarray((base + rng.normal(0, 20, base.shape)).clip(0, 255).astype(np.uint8)))
    return made


@pytest.fixture(scope="module")
def model():
    """The miniature, for one file's tests."""
    return tinyti.load(TINY)


def seeded(seeds=0):
    """A generator, or a list of them for a list of seeds."""
    return torch.Generator().manual_seed(seeds) if isinstance(seeds, int) else [seeded(s) for s in seeds]


def last(steps):
    """The last of what a generator yields."""
    *_, x = steps
    return x
