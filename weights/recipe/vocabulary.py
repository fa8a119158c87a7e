"""Make the tokenizer: byte pairs that are frequent in the captions."""

import json
import shutil

from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyti.tokenizer import Tokenizer

from . import world
from .measure import PART_NAMES
from .training import in_turn

START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(work, captions):
    """Make a byte-pair vocabulary from the captions and the paper's templates, in CLIP's form."""
    folder = work / "tokenizer"

    def fill():
        if work.start:
            shutil.copytree(work.start / "tokenizer", folder, dirs_exist_ok=True)
        if not (folder / "merges.txt").exists():
            folder.mkdir(exist_ok=True)
            entries, merges = learn_merges(vocabulary_text(captions), work.recipe.vocabulary)
            vocabulary = json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False)
            (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
            special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
            settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
            (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
            lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
            work.write("tokenizer/merges.txt", lambda p: p.write_text(lines, encoding="utf-8"))

    in_turn(fill)
    return Tokenizer.from_folder(folder)


def vocabulary_text(captions):
    """Return the text to learn from: the captions, the templates, and every part in every colour."""
    text = [*captions]
    text += [t.format(thing) for t in OBJECT_TEMPLATES + STYLE_TEMPLATES for thing in world.THINGS] * 20
    return text + [f"a {shade} {part}" for shade in world.SHADES for part in PART_NAMES]


def learn_merges(text, size):
    """Return the entries of a vocabulary of at most `size`, and the merges of pairs that make them."""
    core = Core(models.BPE(end_of_word_suffix="</w>"))
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer = pre_tokenizers.Sequence(words)
    core.train_from_iterator(text, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = json.loads(core.to_str())["model"]["merges"]
    # All bytes, inside a word and at its end, come first, so that any text can be spelt.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [letter + "</w>" for letter in letters]
    merges = merges[: size - len(letters) - 2]
    return [*letters, *("".join(pair) for pair in merges), START, END], merges
