"""Text to token ids: CLIP's byte pairs (Stable Diffusion), BERT's word pieces (the paper's LDM), new words.

Learned words are cut out of the raw text first; the pretrained tokenizer sees only the rest.  So its
vocabulary never changes, and even `*` or `cat` can name a word."""

import json
import re
import unicodedata
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MOST_VOCABULARY_BYTES = 64 * 2**20  # per file of the folder
LETTER = r"[\p{L}\p{N}_*]"  # a character that continues a word
BEFORE = LETTER + r"[\p{M}\u200c\u200d🏻-🏿]*"  # with its accents, joiners and skin tones


def as_list(prompts: str | list[str]) -> list[str]:
    """One prompt or several, as a list; TypeError for one that is not a string, ValueError for none."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise TypeError(f"a prompt is a string, not {type(other[0]).__name__}")
    if not prompts:
        raise ValueError("there is no prompt")
    return prompts


class Tokenizer:
    """Turns prompts into the ids that a text transformer embeds.

    `start` and `end` enclose a prompt; `pad` fills it up to `length` ids.  `vocab_size` counts the pretrained
    ids.  `words` maps each learned word to its ids, which start at `vocab_size`.
    """

    def __init__(self, core: Core, start: int, end: int, pad: int, length: int = 77):
        self.core = core
        self.start, self.end, self.pad, self.length = start, end, pad, length
        self.vocab_size = core.get_vocab_size()
        self.words: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a published folder: `tokenizer.json`, or `vocab.json` and `merges.txt`, or BERT's `vocab.txt`.

        Ids and padding equal those of CLIPTokenizer and BertTokenizer in transformers 5, for any text.  That
        includes their flaw: Stable Diffusion 2 pads with "!", so a "!" in a prompt gets the padding's id.
        Raises FileNotFoundError if there is no vocabulary, ValueError if it is damaged.
        """
        try:
            return cls._from_folder(Path(folder))
        except FileNotFoundError:
            raise
        except Exception as error:  # `tokenizers` raises this for damaged files
            found = " ".join(f"{folder} does not describe a tokenizer ({error})".split("\n"))
            raise ValueError(found) from None

    @classmethod
    def _from_folder(cls, folder):
        for file in (*folder.glob("*.json"), *folder.glob("*.txt")):  # CLIP's weights may lie beside them
            if (size := file.stat().st_size) > MOST_VOCABULARY_BYTES:
                raise ValueError(
                    f"{file.name} has {size:,} bytes, expected at most {MOST_VOCABULARY_BYTES:,}"
                )
        config = _settings(folder, "tokenizer_config.json") | _settings(folder, "special_tokens_map.json")
        core = _read_core(folder, config)
        is_clip = isinstance(core.model, models.BPE)
        # CLIP's vocabulary spells the two bytes of é as Ã©; BERT's marks a later piece of a word, as in ##s.
        core.decoder = decoders.ByteLevel() if is_clip else decoders.WordPiece()
        roles = CLIP_SPECIAL if is_clip else BERT_SPECIAL
        special = {role: _added_token(config.get(role) or default) for role, default in roles.items()}
        ids = {role: core.token_to_id(token.content) for role, token in special.items()}
        for role, id in ids.items():
            if id is None:
                raise ValueError(f"{role} {special[role].content!r} is not in the vocabulary")
        core.model.unk_token = special["unk_token"].content
        # The order matters: if two roles share a token, the last one sets how it is matched in a text.
        saved = {token.content for token in core.get_added_tokens_decoder().values()}
        core.add_tokens([token for token in special.values() if token.content not in saved])
        if sorted(core.get_vocab().values()) != list(range(core.get_vocab_size())):
            raise ValueError("damaged vocabulary, expected entries with the ids 0, 1, 2, …")
        length = min(int(config.get("model_max_length") or 77), 77)  # BERT's is 512
        if length < 3:
            raise ValueError(f"model_max_length is {length}, which leaves no place between start and end")
        start, end = ("bos_token", "eos_token") if is_clip else ("cls_token", "sep_token")
        return cls(core, ids[start], ids[end], ids["pad_token"], length)

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        """The ids of one or more prompts, (B, length): start, ids, end, padding; the end is never cut off."""
        prompts = as_list(prompts)
        batch = torch.full((len(prompts), self.length), self.pad, device="cpu")
        for row, prompt in zip(batch, prompts):
            ids = [self.start, *self.encode(prompt)[: self.length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return batch

    def encode(self, text: str) -> list[int]:
        """All ids of a text, however long, without start, end and padding."""
        ids, start = [], 0
        for word, (begin, end) in self._find_words(text):
            ids += self._encode_plain(text[start:begin]) + self.words[word]
            start = end
        return ids + self._encode_plain(text[start:])

    def has_word(self, text: str, name: str) -> bool:
        """Whether a registered word stands in a text, by the rule of `add`."""
        return any(found == name for found, _ in self._find_words(text))

    def without_words(self, text: str) -> str:
        """A text with each learned word replaced by a space."""
        rest, start = "", 0
        for _, (begin, end) in self._find_words(text):
            rest += text[start:begin] + " "
            start = end
        return rest + text[start:]

    def _encode_plain(self, text):
        return self.core.encode(text, add_special_tokens=False).ids

    def _find_words(self, text):
        """The learned words in a text, by the rule of `add`: [(word, (begin, end)), ...]."""
        if not self.words:
            return []
        # A text may spell é as one character or as two; both match the word.
        forms = {unicodedata.normalize(f, word): word for word in self.words for f in ("NFC", "NFD")}
        forms |= {word: word for word in self.words}
        words = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
        # \y matches between two visible characters (grapheme clusters).
        rule = rf"\y(?<!{BEFORE})(?<!{BEFORE}['’])(?:{words})\y(?!{LETTER})"
        split = pre_tokenizers.Split(Regex(rule), behavior="removed", invert=True)
        return [(forms[found], place) for found, place in split.pre_tokenize_str(text)]

    def add(self, word: str, n: int = 1) -> list[int]:
        """Register a learned word and return its `n` consecutive ids.

        The word is found wherever it stands alone, in exactly this spelling.  Its neighbours must not be
        letters, digits, `_` or `*`, and no apostrophe may join it to one of these before it (the t of don't).
        A match never splits a visible character such as a family emoji.  So `S*` is found in "(S*)", "S*'s"
        and "S*-like", not in "cats*", "S*2", "S**".  Among overlapping words the leftmost wins, then the
        longest.

        Raises ValueError for an empty word, white space or control characters in it, a word added before, or
        n < 1.
        """
        if not word or any(c.isspace() or unicodedata.category(c) in ("Cc", "Cs") for c in word):
            found = f"a learned word must be non-empty and without white space, got {word!r}"
            raise ValueError(f"{found}; give it another name (sample.py: --words NAME=PATH)")
        if unicodedata.normalize("NFC", word) in {unicodedata.normalize("NFC", w) for w in self.words}:
            raise ValueError(f"the learned word {word!r} is registered already; choose another name")
        if not n >= 1:
            raise ValueError(f"a learned word needs at least one id, got n={n}")
        first = self.vocab_size + sum(len(ids) for ids in self.words.values())
        self.words[word] = list(range(first, first + n))
        return list(self.words[word])

    def token(self, id: int) -> str:
        """The text of an id: "cat" for `cat</w>`, "##s" for a later piece in BERT, or a learned word."""
        learned = [word for word, ids in self.words.items() if id in ids]
        entry = self.core.id_to_token(id)
        if entry is None and not learned:
            raise ValueError(f"id {id}: expected one of the {self.vocab_size} entries or of a learned word")
        return learned[0] if learned else self.core.decoder.decode([entry]).removesuffix("</w>")

    def single(self, word: str) -> int | None:
        """The id of a word that is letters only and one entry of the vocabulary; None for any other."""
        ids = self._encode_plain(word)
        # An unknown word may be one id, too: [UNK], which is not letters only.
        return ids[0] if word.isalpha() and len(ids) == 1 and self.token(ids[0]).isalpha() else None

    def word_ids(self) -> list[int]:
        """The sorted ids of all vocabulary entries that are whole words of letters only."""
        # CLIP marks the end of a word (cat</w>); BERT marks every piece but the first (##s).
        ending = getattr(self.core.model, "end_of_word_suffix", "")
        entries = self.core.get_vocab().items()
        return sorted(id for entry, id in entries if entry.endswith(ending) and self.token(id).isalpha())


def _read_core(folder: Path, config: dict) -> Core:
    """The tokenizer of a folder, with the tokens that were added after its training."""
    if (folder / "tokenizer.json").is_file():  # holds everything
        steps = (_settings(folder, "tokenizer.json").get("normalizer") or {}).get("normalizers", [])
        if len(steps) > 8:  # each may double the length of a text
            raise ValueError(f"tokenizer.json has {len(steps)} normalizers, expected at most 8")
        core = Core.from_file(str(folder / "tokenizer.json"))
        core.no_truncation()
        core.no_padding()
        return core

    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        core = Core(models.BPE.from_file(*files, end_of_word_suffix="</w>"))
        one_space = normalizers.Replace(Regex(r"\s+"), " ")
        core.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
        split = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    elif (folder / "vocab.txt").is_file():
        core = Core(models.WordPiece.from_file(str(folder / "vocab.txt")))
        core.normalizer = normalizers.BertNormalizer(
            lowercase=config.get("do_lower_case", True),
            strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        )
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        found = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise FileNotFoundError(
            f"no vocabulary in {folder}: found {found}, expected tokenizer.json, or vocab.json and merges.txt"
            ", or vocab.txt; download the model's whole tokenizer folder (weights/README.md has the command)"
        )

    added = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    if not added:  # older folders have a file for them
        words = _settings(folder, "added_tokens.json").items()
        added = {int(id): {"content": word, "normalized": True} for word, id in words}
    core.add_tokens([_added_token(token) for _, token in sorted(added.items())])
    return core


def _added_token(value: str | dict) -> AddedToken:
    """A token that is never split; a string is matched in the raw text, a saved token as its flags say."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
    return AddedToken(value["content"], special=True, **flags)


def _settings(folder: Path, name: str) -> dict:
    """The content of a .json file; {} if there is none."""
    if not (folder / name).is_file():
        return {}
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not readable: {error}") from None
