"""Public functions with meaningless arguments raise a one-line error and never give a result."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tinyti import Concept, Inversion, invert, load, load_clip, load_dino, make_examples, sample
from tinyti.editing import attention_maps, ddim_invert, from_image, in_region, to_mask
from tinyti.files.pictures import Photo, read_image, read_photos, to_image, to_tensor
from tinyti.files.whole import atomic_write
from tinyti.files.words import read_words, write_words

from .conftest import CONCEPTS, TINY, last

NAN, INF, D = math.nan, math.inf, 128


def numbers(*right):
    """What may stand where a number is meant, without those that are right."""
    return [x for x in (0, -1, 2**70, 1.5, NAN, INF, -INF, None, "x", [], {}, "1") if x not in right]


IMAGE, MASK = torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)
MASK[:, :8] = 1
VECTORS, RGB, EMPTY = torch.full((1, D), 0.05), Image.new("RGB", (16, 16)), Image.new("RGB", (0, 8))
FOLDER = Path(tempfile.gettempdir())  # without a word, a model or a vocabulary
PATHS = [None, 0, [], b"x", "", "\0", "\ud800", "x" * 5000, "/dev/null", "no/such.pt", FOLDER]
NO_IMAGES = [
    *(None, "x", 0, RGB, IMAGE.byte(), IMAGE * NAN, IMAGE + INF, IMAGE[0], IMAGE[:1], IMAGE[:2]),
    *(torch.zeros(4, 16, 16), torch.zeros(2, 3, 16, 16), torch.zeros(0, 3, 16, 16), IMAGE[None, None]),
    IMAGE.to(torch.complex64),
]
NO_PIXELS = [*NO_IMAGES, IMAGE + 255, IMAGE[:, :15], torch.zeros(3, 0, 0), torch.zeros(3, 8, 8)[:, :2]]
NO_MASKS = [None, "x", MASK[0], MASK * NAN, MASK * 255, -MASK, MASK.repeat(3, 1, 1), MASK[None], MASK[:, :8]]
NO_VECTORS = [
    *(None, "x", [[1.0]], VECTORS * NAN, VECTORS * INF, VECTORS + 1e30, VECTORS[:, :5], VECTORS[:0]),
    *(VECTORS.repeat(76, 1), VECTORS.long(), VECTORS.to(torch.complex64), VECTORS.to_sparse()),
    *(VECTORS.to("meta"), VECTORS[None], torch.tensor(1.0)),
]
NO_NAMES = [None, 0, "", " ", "a b", "\n", "\x07", "\ud800", "\0", b"a", ["a"], "a\u2028"]
NO_TEMPLATES = [None, 0, [], "", "a {}", ["a"], [""], [None], ["{}s"], [b"a {}"]]
NO_PROMPTS = [None, 0, [], NAN, ["a", 1], [None], [["a"]], b"a", "\ud800"]
NO_LATENTS = [
    *("x", 0, torch.zeros(2, 4, 4, 4), torch.zeros(4, 4, 4), torch.full((1, 4, 4, 4), NAN), torch.zeros(4)),
    *(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 3, 3), torch.zeros(0, 4, 4, 4), torch.zeros(1, 4, 0, 0)),
]
NO_GENERATORS = [*numbers(None), [None], [torch.Generator()] * 2]
NO_ROWS = [None, "x", VECTORS[:0], VECTORS[0], VECTORS * NAN]
NO_SIZES = [(16,), (16, 16, 16), (16, None), (16.0, 16.0), (0, 16), (-16, 16), (NAN, 16), (4112, 16), "ab"]
NO_SPANS = [(0.9, 0.1), (-1, 2), (0.5, 0.5), (NAN, 1), (0, NAN), (None, 1), (0.5,), (0.1, 0.2, 0.3), "ab"]
NO_DTYPES = [None, 0, "x", torch.int32, torch.complex64, torch.bool, float, torch.float16]
NO_DEVICES = [0.5, "", "x", "cuda:99", "cpu:x", [], NAN, torch.float32]


class Learner:
    """A model with the word S*, and what it is learned from."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        model.tokenizer.words.clear()
        model.concepts.clear()
        model.add_word("S*", VECTORS)
        self.photos = read_photos(CONCEPTS / "cat", 16)[0][:1]
        self.examples = self.make()
        write_words(folder / "a.pt", {"a": VECTORS})

    def sample(self, **given):
        return last(sample(self.model, **{"prompts": "a", "steps": 1, "size": 16} | given))

    def walk(self, function, *args, steps=2, **given):
        return last(function(self.model, "a", *args, steps=steps, **given))

    def attend(self, prompts="a S*", word="S*", size=(16, 16)):
        with attention_maps(self.model, prompts, word, size):
            self.sample(prompts="a S*")

    def invert(self, **given):
        given = {"steps": 1, "batch_size": 1} | given
        return last(invert(self.model, self.begin(), self.examples, **given))

    def begin(self, *args, **given):
        return Inversion(self.model, self.model.concepts["S*"], *args, **given)

    def make(self, name="S*", photos=None, templates=("a {}",)):
        photos = self.photos if photos is None else photos
        return make_examples(self.model, name, photos, templates)

    def write(self, path, data=b"x"):
        with atomic_write(path) as stream:
            stream.write(data)


DOORS = {
    "sample steps": (lambda x, v: x.sample(steps=v), numbers()),
    "sample guidance": (lambda x, v: x.sample(guidance=v), numbers(0, -1, 1.5, 2**70, "1")),
    "sample eta": (lambda x, v: x.sample(eta=v), numbers(0)),
    "sample start": (lambda x, v: x.sample(start=v), numbers(0)),
    "sample sampler": (lambda x, v: x.sample(sampler=v), numbers()),
    "sample negative": (lambda x, v: x.sample(negative=v), numbers("x", "1")),
    "sample generator": (lambda x, v: x.sample(generator=v), NO_GENERATORS),
    "sample size": (lambda x, v: x.sample(size=v), [*numbers(None), *NO_SIZES]),
    "sample x_T": (lambda x, v: x.sample(x_T=v), NO_LATENTS),
    "sample prompts": (lambda x, v: x.sample(prompts=v), NO_PROMPTS),
    "from_image image": (lambda x, v: x.walk(from_image, v), NO_PIXELS),
    "from_image strength": (lambda x, v: x.walk(from_image, IMAGE, v), numbers()),
    "from_image options": (lambda x, v: x.walk(from_image, IMAGE, **{v: None}), ["x_T", "size", "word"]),
    "in_region image": (lambda x, v: x.walk(in_region, v, MASK), NO_PIXELS),
    "in_region mask": (lambda x, v: x.walk(in_region, IMAGE, v), NO_MASKS),
    "in_region strength": (lambda x, v: x.walk(in_region, IMAGE, MASK, v), numbers()),
    "ddim_invert image": (lambda x, v: x.walk(ddim_invert, v), NO_PIXELS),
    "ddim_invert steps": (lambda x, v: x.walk(ddim_invert, IMAGE, steps=v), numbers()),
    "ddim_invert iterations": (lambda x, v: x.walk(ddim_invert, IMAGE, iterations=v), numbers(2**70)),
    "attention_maps word": (lambda x, v: x.attend(word=v), [*numbers(), "", "cat"]),
    "attention_maps size": (lambda x, v: x.attend(size=v), [*numbers(None), *NO_SIZES]),
    "attention_maps prompts": (lambda x, v: x.attend(prompts=v), [*NO_PROMPTS, "a", ["a S*", "a"]]),
    "Inversion optimizer": (lambda x, v: x.begin(v), numbers()),
    "Inversion step_size": (lambda x, v: x.begin(step_size=v), numbers(None, 1.5)),
    "invert steps": (lambda x, v: x.invert(steps=v), numbers(2**70)),
    "invert batch_size": (lambda x, v: x.invert(batch_size=v), numbers()),
    "invert accumulate": (lambda x, v: x.invert(accumulate=v), numbers(2**70)),
    "invert seed": (lambda x, v: x.invert(seed=v), numbers(0, -1)),
    "invert span": (lambda x, v: x.invert(span=v), [*numbers(), *NO_SPANS]),
    "make_examples name": (lambda x, v: x.make(v), NO_NAMES),
    "make_examples photos": (lambda x, v: x.make(photos=v), [0, [], "x", [1], [None]]),
    "make_examples pixels": (lambda x, v: x.make(photos=[Photo(Path("x"), v, None)]), NO_PIXELS),
    "make_examples templates": (lambda x, v: x.make(templates=v), NO_TEMPLATES),
    "Concept.initial n": (lambda x, v: Concept.initial(VECTORS, v), numbers(2**70)),
    "Concept.initial rows": (lambda x, v: Concept.initial(v), NO_ROWS),
    "add_word name": (lambda x, v: x.model.add_word(v, VECTORS), [*NO_NAMES, "S*"]),
    "add_word vectors": (lambda x, v: x.model.add_word("N*", v), NO_VECTORS),
    "read_words path": (lambda x, v: read_words(v), PATHS),
    "read_words width": (lambda x, v: read_words(x.folder / "a.pt", v), numbers(None)),
    "write_words path": (lambda x, v: write_words(v, {"a": VECTORS}), [*PATHS, "\0.pt", "\ud800.pt"]),
    "write_words name": (lambda x, v: write_words(x.folder / "b.pt", {v: VECTORS}), NO_NAMES[:9]),
    "write_words vectors": (
        lambda x, v: write_words(x.folder / "b.pt", {"a": v}),
        [v for v in NO_VECTORS if not (torch.is_tensor(v) and v.shape == (1, 5))],
    ),
    "write_words words": (lambda x, v: write_words(x.folder / "b.pt", v), [None, 0, "x", [], {}, 1.5]),
    "atomic_write path": (lambda x, v: x.write(v), [*PATHS[:3], *PATHS[4:8], "no/x", FOLDER]),
    "atomic_write data": (lambda x, v: x.write(x.folder / "b.pt", v), [None, 0, "x", [1.5]]),
    "read_image file": (lambda x, v: read_image(v), PATHS),
    "read_photos folder": (lambda x, v: read_photos(v, 16), PATHS[:-1]),
    "read_photos size": (lambda x, v: read_photos(CONCEPTS / "cat", v), numbers()),
    "to_image pixels": (lambda x, v: to_image(v), NO_IMAGES),
    "to_tensor image": (lambda x, v: to_tensor(v, 16), [None, 0, IMAGE, RGB.convert("L"), EMPTY]),
    "to_tensor size": (lambda x, v: to_tensor(RGB, v), numbers()),
    "to_mask picture": (lambda x, v: to_mask(v, 16), [None, 0, IMAGE, RGB]),
    "to_mask size": (lambda x, v: to_mask(Image.linear_gradient("L"), v), numbers()),
    "to_mask feather": (lambda x, v: to_mask(Image.linear_gradient("L"), 16, v), numbers(0)),
    "load path": (lambda x, v: load(v), PATHS),
    "load device": (lambda x, v: load(TINY, v), NO_DEVICES),
    "load dtype": (lambda x, v: load(TINY, dtype=v), NO_DTYPES),
    "load prediction": (lambda x, v: load(TINY, prediction=v), numbers(None)),
    "load tokenizer": (lambda x, v: load(TINY, tokenizer=v), PATHS[1:]),
    "load clip_skip": (lambda x, v: load(TINY, clip_skip=v), numbers()),
    "load_clip path": (lambda x, v: load_clip(v), [*PATHS, TINY]),
    "load_dino path": (lambda x, v: load_dino(v), [*PATHS, TINY, TINY / "clip"]),
}
# Of wrong types Python itself says what an argument lacks.
REFUSALS = (ValueError, TypeError, OSError, AttributeError, FloatingPointError, OverflowError)


@pytest.fixture
def learner(model, tmp_path):
    return Learner(model, tmp_path)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore")  # PyTorch's on complex and nested tensors
def test_nonsense_is_refused(door, learner):
    call, values = DOORS[door]
    files = sorted(learner.folder.iterdir())
    for value in values:
        with pytest.raises(REFUSALS) as refusal:
            call(learner, value)
            pytest.fail(f"{door} takes {value!r:.80}")
        text = str(refusal.value)
        assert text and ("\n" not in text or refusal.type is TypeError), (door, value, text)
        assert list(learner.model.concepts) == list(learner.model.tokenizer.words) == ["S*"], (door, value)
        assert sorted(learner.folder.iterdir()) == files, (door, value)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    if door in ("add_word vectors", "write_words vectors"):
        with pytest.raises(ValueError, match="several shapes"):
            call(learner, nested)


def test_the_doors_are_open_to_what_is_right(learner):
    """With the defaults that the refused values replace each of the calls gives a result."""
    right = {"sample steps": 1, "from_image strength": 0.5, "in_region mask": MASK, "to_image pixels": IMAGE}
    right |= {"ddim_invert iterations": 2, "attention_maps size": (16, 32), "invert span": (0, 1)}
    right |= {"make_examples templates": ["{} {}"], "to_mask feather": 1, "load dtype": torch.bfloat16}
    right |= {"invert accumulate": 2**70, "add_word vectors": VECTORS[0], "read_words width": D}
    for door, value in right.items():
        DOORS[door][0](learner, value)
