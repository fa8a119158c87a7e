"""Text to token ids: CLIP's byte pairs (Stable Diffusion), BERT's word pieces (the paper's LDM), new words.

Learned words are cut out of the raw text first, and the pretrained tokenizer sees only what is left.  So its
vocabulary never changes, and a name such as `*` or `cat` costs the model nothing it knew."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

CLIP_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>"}  # fmt: skip
BERT_SPECIAL = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                "mask_token": "[MASK]"}  # fmt: skip
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What a reader sees as one character: a letter with its accents, an emoji with its skin tone, a family.
GRAPHEMES = pre_tokenizers.Split(Regex(r"\X"), behavior="isolated")


class Tokenizer:
    """Turns prompts into the ids that a text transformer embeds.

    `start` and `end` enclose a prompt, `pad` fills it up to `length` ids.  `vocab_size` counts the pretrained
    ids; `words` maps each learned word to its ids, which follow from `vocab_size` upwards.
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
            return cls._from_files(Path(folder))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            found = " ".join(f"{folder} does not describe a tokenizer ({error})".split("\n"))
            raise ValueError(found) from None

    @classmethod
    def _from_files(cls, folder):
        vocab, merges, added = _read_vocabulary(folder)
        config = _settings(folder, "tokenizer_config.json")
        if "added_tokens_decoder" in config:
            added |= {int(id): token for id, token in config["added_tokens_decoder"].items()}
        else:  # an older folder: special and other tokens have a file each
            config |= _settings(folder, "special_tokens_map.json")
            words = _settings(folder, "added_tokens.json").items()
            added |= {int(id): {"content": word, "normalized": True} for word, id in words}
        is_clip = merges is not None
        roles = CLIP_SPECIAL if is_clip else BERT_SPECIAL
        special = {role: _added_token(config.get(role) or default) for role, default in roles.items()}
        unknown = special["unk_token"].content
        core = _byte_pair(vocab, merges, unknown) if is_clip else _word_piece(vocab, unknown, config)

        # The order matters: of two roles that share a token, the last says how it is found in a text.
        saved = {token["content"] for token in added.values()}
        core.add_tokens([_added_token(token) for _, token in sorted(added.items())])
        core.add_tokens([t for t in special.values() if t.content in vocab and t.content not in saved])
        ids = {role: core.token_to_id(token.content) for role, token in special.items()}
        start, end = ("bos_token", "eos_token") if is_clip else ("cls_token", "sep_token")
        for role in (start, end, "pad_token", "unk_token"):
            if ids[role] is None:
                raise ValueError(f"{role} {special[role].content!r} is not in the vocabulary")
        length = min(int(config.get("model_max_length") or 77), 77)  # BERT's is 512
        if length < 3:
            raise ValueError(f"model_max_length is {length}, which leaves no place between start and end")
        return cls(core, ids[start], ids[end], ids["pad_token"], length)

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        """The ids of one or more prompts, (B, length): start, ids, end, padding; the end is never cut off."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        batch = torch.full((len(prompts), self.length), self.pad)
        for row, prompt in zip(batch, prompts):
            ids = [self.start, *self.encode(prompt)[: self.length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return batch

    def encode(self, text: str) -> list[int]:
        """All ids of a text, however long, without start, end and padding."""
        ids = []
        for piece, learned in _cut(text, self.words):
            ids += self.words[piece] if learned else self.core.encode(piece, add_special_tokens=False).ids
        return ids

    def add(self, word: str, n: int = 1) -> list[int]:
        """Register a learned word and return its `n` consecutive ids.

        A prompt means the word wherever it stands alone, in exactly this spelling: neither neighbour is a
        letter, digit, `_` or `*`, no apostrophe ties it to one of these before it (the t of don't), and no
        visible character, such as a family emoji, is cut in two.  So `S*` is found in "(S*)", "S*'s" and
        "S*-like", not in "cats*", "S*2", "S**".  Of overlapping words the leftmost counts, then the longest.

        Raises ValueError for an empty word, white space in it, a word added before, or n < 1.
        """
        if not word or any(character.isspace() for character in word):
            raise ValueError(f"a learned word must be non-empty and without white space, got {word!r}")
        if word in self.words:
            raise ValueError(f"the learned word {word!r} is registered already; choose another name")
        if n < 1:
            raise ValueError(f"a learned word needs at least one id, got n={n}")
        first = self.vocab_size + sum(len(ids) for ids in self.words.values())
        self.words[word] = list(range(first, first + n))
        return list(self.words[word])

    def token(self, id: int) -> str:
        """How an id reads: "cat" for `cat</w>`, "##s" for a later piece of a BERT word, or a learned word."""
        learned = [word for word, ids in self.words.items() if id in ids]
        entry = self.core.id_to_token(id)
        if entry is None and not learned:
            raise ValueError(f"id {id}: expected one of the {self.vocab_size} entries or of a learned word")
        return learned[0] if learned else self.core.decoder.decode([entry]).removesuffix("</w>")

    def single(self, word: str) -> int | None:
        """The id of a word of letters only that is one entry of the vocabulary; None for any other."""
        ids = self.core.encode(word, add_special_tokens=False).ids
        # (what is not in the vocabulary at all may be one id too, [UNK], which is not of letters)
        return ids[0] if word.isalpha() and len(ids) == 1 and self.token(ids[0]).isalpha() else None

    def word_ids(self) -> list[int]:
        """Ids of those vocabulary entries that are whole words of letters only, in order."""
        # CLIP marks the end of a word (cat</w>), BERT every piece that is not its beginning (##s).
        ending = getattr(self.core.model, "end_of_word_suffix", "")
        entries = self.core.get_vocab().items()
        return sorted(id for entry, id in entries if entry.endswith(ending) and self.token(id).isalpha())


def _cut(text: str, words: dict[str, list[int]]) -> list[tuple[str, bool]]:
    """A text in pieces: learned words that stand alone in it (True), and the stretches between (False)."""
    cells = ["", "", *_graphemes(text), ""]  # nothing before, nothing after
    longest_first = [_graphemes(word) for word in sorted(words, key=len, reverse=True)]
    pieces, start, i = [], 0, 2
    while i < len(cells):
        for word in longest_first:
            stop = i + len(word)
            if cells[i:stop] == word and _stands_alone(cells, i, stop):
                pieces += [("".join(cells[start:i]), False), ("".join(word), True)]
                start = i = stop
                break
        else:
            i += 1
    return [*pieces, ("".join(cells[start:]), False)]


def _graphemes(text: str) -> list[str]:
    return [grapheme for grapheme, _ in GRAPHEMES.pre_tokenize_str(text)]


def _stands_alone(cells: list[str], start: int, stop: int) -> bool:
    """Whether nothing around `cells[start:stop]` makes it part of a longer word: `Tokenizer.add`'s rule."""

    def in_word(cell):
        return any(character.isalnum() or character in "_*" for character in cell)

    before_last, before, after = cells[start - 2], cells[start - 1], cells[stop]
    tied = before in ("'", "’") and in_word(before_last)
    return not (in_word(before) or in_word(after) or tied)


def _byte_pair(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Core:
    core = Core(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix="</w>"))
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    core.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()  # the vocabulary spells the two bytes of é as Ã©
    return core


def _word_piece(vocab: dict[str, int], unknown: str, config: dict) -> Core:
    core = Core(models.WordPiece(vocab, unk_token=unknown))
    core.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]] | None, dict[int, dict]]:
    """Entries with their ids, merges (None: word pieces), and by id the tokens added after training."""
    merges, added = None, {}
    if (folder / "tokenizer.json").is_file():
        content = _read(folder / "tokenizer.json")
        model = content.get("model") or {}
        vocab, merges = model.get("vocab"), model.get("merges")
        added = {token["id"]: token for token in content.get("added_tokens", [])}
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, lines = _read(folder / "vocab.json"), _read(folder / "merges.txt")
        merges = [line for line in lines if not line.startswith("#version")]
    elif (folder / "vocab.txt").is_file():
        vocab = {entry: id for id, entry in enumerate(_read(folder / "vocab.txt"))}
    else:
        found = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise FileNotFoundError(
            f"no vocabulary in {folder}: found {found}, expected tokenizer.json, or vocab.json and merges.txt"
            ", or vocab.txt; download the model's whole tokenizer folder (weights/README.md has the command)"
        )
    if not isinstance(vocab, dict) or set(vocab.values()) != set(range(len(vocab))):
        raise ValueError("damaged vocabulary, expected entries with the ids 0, 1, 2, …")
    return vocab, merges and [_merge(line, vocab) for line in merges], added


def _merge(line: str | list[str], vocab: dict[str, int]) -> tuple[str, str]:
    """One merge, written "a b" or ["a", "b"]."""
    # (checked here, for what tokenizers raises is a bare Exception)
    pair = line.split(" ") if isinstance(line, str) else line
    if len(pair) != 2 or any(entry not in vocab for entry in (*pair, "".join(pair))):
        raise ValueError(f"expected a merge of two vocabulary entries into one, got {line!r:.80}")
    return tuple(pair)


def _added_token(value: str | dict) -> AddedToken:
    """A token that is never split: a plain one is sought in the raw text, a saved one as its flags say."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
    return AddedToken(value["content"], special=True, **flags)


def _settings(folder: Path, name: str) -> dict:
    return _read(folder / name) if (folder / name).is_file() else {}


def _read(file: Path):
    """The content of a .json file, the lines of a .txt file; an error names the file."""
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else text.removesuffix("\n").split("\n")
    except ValueError as error:
        raise ValueError(f"{file.name} is not readable: {error}") from None
