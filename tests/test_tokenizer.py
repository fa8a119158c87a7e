"""Ids equal transformers' for any text; learned words are found where they stand alone and nowhere else."""

import json
import random
import re
import unicodedata

import pytest
import torch
from transformers import BertTokenizer, CLIPTokenizer

from tinyti.tokenizer import Tokenizer

from .conftest import TINY
from .published import bert_vocabulary

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
FAMILY = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
NASTY = [
    "",
    " ",
    "\n\t \r\n",
    "a photo of a cat",
    "A  PHOTO\tof\na   Cat ",
    "the cat's, it's, they'll I'VE we'd 'S ''s",
    "naïve café cafe\u0301 \u1112\u1161\u11ab q\u0323\u0307 İstanbul ẞ ǅ ﬁ",
    "一只猫的照片 ねこ 고양이 חתול שָׁלוֹם قطة बिल्ली แมว",
    "\N{CAT FACE}\N{CAT FACE} \N{THUMBS UP SIGN}\U0001f3fd \u2764\ufe0f " + FAMILY + " \U0001f1eb\U0001f1f7",
    "\x00a\x01\x07\x1b[0m\x7f\x80\x85\x9f",
    "zero\u200bwidth\u200djoiner\ufeff\u00adsoft\u2028line\u2029",
    "1234 ½ ² ① Ⅷ 3.14 1,000,000 ٣",
    "<|endoftext|>",
    "cat<|endoftext|>cat <|startoftext|> <|ENDOFTEXT|> <|endoftext|>!",
    "! !! !!! cat! (cat) [cat] {cat} #cat @cat $5 50% a_b a-b a*b ~`^",
    "[CLS] [SEP] [PAD] [UNK] [MASK] [mask] ##ing [CLS]cat",
    "\ue000\U000f0000\U0010ffff\ufffd",
    "cat" * 100,
]
BLOCKS = """20-7E 20-7E 0-FF 300-36F 590-6FF 900-9FF 1100-11FF 2000-206F 3000-30FF 4E00-4EFF 1F300-1F6FF
    0-D7FF E000-10FFFF""".split()
FRAGMENTS = ["cat", " a photo ", "'s", "'LL", "!", "\u200d", "  ", "##s", "[SEP]", *SPECIAL, "<|EndOfText|>"]


def random_texts(count, seed):
    dice = random.Random(seed)

    def letter():
        first, last = dice.choice(BLOCKS).split("-")
        return chr(dice.randint(int(first, 16), int(last, 16)))

    for _ in range(count):
        length = dice.randrange(30)
        yield "".join(dice.choice(FRAGMENTS) if dice.random() < 0.2 else letter() for _ in range(length))


LONG = ["a photo of a very " * 600, "x" * 10_000, "1 \N{CAT FACE}" * 3_000]
TEXTS = [*NASTY, *LONG, "a <Cat-toy>, <cat-toy><dog>s", *random_texts(300, seed=0)]


@pytest.fixture(scope="module")
def byte_pairs():
    """The miniature's vocabulary in CLIP's form, and a word with a letter of two bytes."""
    vocab = json.loads((TINY / "tokenizer" / "vocab.json").read_text("utf-8"))
    lines = (TINY / "tokenizer" / "merges.txt").read_text("utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    merges += [("c", "a"), ("ca", "f"), ("caf", "Ã"), ("cafÃ", "©</w>")]
    merges = list(dict.fromkeys(merges))
    entries = dict.fromkeys([*vocab, *map("".join, merges)])
    assert len(merges) > 900 and {"cat</w>", "a</w>"} <= entries.keys()
    return {entry: id for id, entry in enumerate(entries)}, merges


def write_json(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def write_clip(folder, vocab, merges, pad="<|endoftext|>", **config):
    """The four files of Stable Diffusion's tokenizer folder, flags as published."""
    folder.mkdir()
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = ({"content": token, **flags} for token in SPECIAL)
    roles = {"bos_token": start, "eos_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", {**roles, "pad_token": pad})
    typed = {role: {"__type": "AddedToken", **token} for role, token in roles.items()}
    defaults = {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", {**typed, **defaults, **config})
    return folder


def write_bert(folder, **config):
    bert_vocabulary(folder)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512, **config})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_pairs):
    root, (vocab, merges) = tmp_path_factory.mktemp("tokenizers"), byte_pairs
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    decoder = {str(vocab[token]): {"content": token, **flags} for token in SPECIAL}
    kept = {id: entry for entry, id in vocab.items() if entry not in ("c", "c</w>", "\u0120", "Ã")}
    holes = {entry: id for id, entry in enumerate(kept.values())}
    rest = [m for m in merges if all(part in holes for part in (*m, "".join(m)))]
    folders = {
        "sd1": write_clip(root / "sd1", vocab, merges),
        "sd2": write_clip(root / "sd2", vocab, merges, pad="!"),
        "decoder": write_clip(root / "decoder", vocab, merges, added_tokens_decoder=decoder),
        "added": write_clip(root / "added", vocab, merges),
        "unknown": write_clip(root / "unknown", holes, rest),
        "bert": write_bert(root / "bert"),
        "bert cased": write_bert(root / "cased", do_lower_case=False, tokenize_chinese_chars=False),
    }
    write_json(folders["added"] / "added_tokens.json", {"<dog>": len(vocab) + 1, "<Cat-toy>": len(vocab)})
    for name in ("sd1", "sd2", "added", "bert"):  # transformers 5 writes tokenizer.json alone
        folders[name + " json"] = root / (name + " json")
        reference(name, folders[name]).save_pretrained(folders[name + " json"])
    # as openai/clip-vit-* has it: merges written "a b"; and with a truncation of its own
    content = json.loads((folders["sd1 json"] / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    del content["model"]["type"]
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    folders["bare json"] = root / "bare"
    folders["bare json"].mkdir()
    write_json(folders["bare json"] / "tokenizer.json", content)
    return folders


def reference(name, folder):
    return (BertTokenizer if "bert" in name else CLIPTokenizer).from_pretrained(folder)


KINDS = ["sd1", "sd2", "decoder", "added", "unknown", "sd1 json", "sd2 json", "added json", "bare json"]


@pytest.mark.parametrize("kind", [*KINDS, "bert", "bert cased", "bert json"])
def test_ids_equal_transformers(folders, kind):
    ours, theirs = Tokenizer.from_folder(folders[kind]), reference(kind, folders[kind])
    padded = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(ours(TEXTS), padded.input_ids)
    whole = theirs(TEXTS, add_special_tokens=False, truncation=False).input_ids
    for text, ids in zip(TEXTS, whole):
        assert ours.encode(text) == ids, ascii(text)
    assert ours.vocab_size == len(theirs) and ours.length == 77


PADDING = [("sd1", "<|endoftext|>"), ("sd2", "!"), ("sd2 json", "!"), ("bert", "[PAD]")]


@pytest.mark.parametrize("kind, pad", PADDING)
def test_start_end_and_padding(folders, kind, pad):
    tokenizer = Tokenizer.from_folder(folders[kind])
    special = [*(["[CLS]", "[SEP]"] if kind == "bert" else SPECIAL), pad]
    start, end, pad = (tokenizer.core.token_to_id(token) for token in special)
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (start, end, pad)
    ids = tokenizer("cat")
    assert ids.shape == (1, 77) and ids.dtype == torch.long
    assert ids[0, 0] == start and ids[0, 2] == end and set(ids[0, 3:].tolist()) == {pad}
    assert "!" not in special or pad == 0


@pytest.mark.parametrize("limit, length", [(20, 20), (77, 77), (512, 77), (10**30, 77), (None, 77)])
def test_length_is_the_folders_when_sensible(tmp_path, byte_pairs, limit, length):
    tokenizer = Tokenizer.from_folder(write_clip(tmp_path / "f", *byte_pairs, model_max_length=limit))
    assert tokenizer.length == length and tokenizer(["a"] * 3).shape == (3, length)


def test_folder_without_settings(folders, tmp_path, byte_pairs):
    folder = write_clip(tmp_path / "f", *byte_pairs)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    assert torch.equal(Tokenizer.from_folder(folder)(NASTY), Tokenizer.from_folder(folders["sd1"])(NASTY))


@pytest.fixture
def tokenizer(folders):
    return Tokenizer.from_folder(folders["sd1"])


base = tokenizer  # another one, which learns nothing


def test_truncation_keeps_the_end(tokenizer):
    fits = "cat " * 75
    assert len(tokenizer.encode(fits)) == 75 and len(tokenizer.encode("x1" * 5_000)) == 10_000
    ids = tokenizer([fits, fits + "cat", "x1" * 5_000])
    assert ids.shape == (3, 77) and ids[:, -1].tolist() == [tokenizer.end] * 3
    assert torch.equal(ids[0], ids[1])
    first = tokenizer.add("S*", n=2)
    assert tokenizer("S* " * 38)[0, -3:].tolist() == [first[1], first[0], tokenizer.end]
    with pytest.raises(ValueError, match="no prompt"):
        tokenizer([])


# ⟦…⟧ marks what has to be found; all that is not marked has to be tokenised as if no word had been learned.
FOUND = [
    ("S*", "⟦S*⟧"),
    ("S*", "a photo of ⟦S*⟧"),
    ("S*", "⟦S*⟧, (⟦S*⟧) \"⟦S*⟧\" '⟦S*⟧' [⟦S*⟧] ⟦S*⟧. ⟦S*⟧! ⟦S*⟧: ⟦S*⟧;"),
    ("S*", "⟦S*⟧'s hat and ⟦S*⟧’s shoe"),
    ("S*", "⟦S*⟧-like, a non-⟦S*⟧ thing, ⟦S*⟧/⟦S*⟧, #⟦S*⟧"),
    ("S*", "⟦S*⟧\tand\n⟦S*⟧\u3000⟦S*⟧"),
    ("S*", "s* cats* S* ".replace("S*", "⟦S*⟧")),
    ("S*", "CATS* S*2 2S* S*a S*_ _S* S** *S* S S *"),
    ("S*", "éS* e\u0301S* S*é S*\u0301 猫S* S*שלום"),
    ("s*", "cats* ⟦s*⟧ S*"),
    ("*", "a photo of ⟦*⟧"),
    ("*", '⟦*⟧, (⟦*⟧) ⟦*⟧\'s "⟦*⟧" 2*3 2 ⟦*⟧ 3 S* *S f***k ** *** _*'),
    ("<cat-toy>", "a ⟦<cat-toy>⟧, <Cat-toy> <cat-toy>s x<cat-toy> <⟦<cat-toy>⟧> cat-toy> <cat-toy>*"),
    ("<s1> <s2>", "⟦<s1>⟧⟦<s2>⟧ ⟦<s2>⟧⟦<s2>⟧⟦<s1>⟧"),
    ("cat", "⟦cat⟧ ⟦cat⟧'s ⟦cat⟧. (⟦cat⟧) wild-⟦cat⟧ Cat CAT cats concat catcat cat2 my_cat cat_ cat*"),
    ("cat <cat-toy>", "⟦cat⟧ ⟦<cat-toy>⟧ <⟦cat⟧>"),
    ("t S Brien", "don't cat'S O’Brien ⟦t⟧ '⟦t⟧ the cats' ⟦S⟧ \"⟦Brien⟧\""),
    ("S", "⟦S⟧ ⟦S⟧'s S* *S S** S2"),
    ("S S*", "⟦S⟧ ⟦S*⟧ ⟦S⟧'s ⟦S*⟧'s ⟦S*⟧'S S** S*S* ⟦S⟧, (⟦S*⟧)"),
    ("S* S S*2", "⟦S*2⟧ ⟦S*⟧ ⟦S⟧ S*3 ⟦S*2⟧'s S*22"),
    ("S* *", "⟦S*⟧ ⟦*⟧ S** (⟦*⟧ ⟦S*⟧)"),
    ("a-b b-c a-b-c", "⟦a-b⟧ ⟦b-c⟧ ⟦a-b-c⟧ ⟦a-b⟧-d"),
    ("a-b b-c", "⟦a-b⟧-c"),
    ("\N{CAT FACE}", "⟦\N{CAT FACE}⟧ a ⟦\N{CAT FACE}⟧⟦\N{CAT FACE}⟧, ⟦\N{CAT FACE}⟧'s \N{CAT FACE}cat"),
    ("\N{MAN} \N{WOMAN} \N{GIRL}", f"{FAMILY} ⟦\N{MAN}⟧ ⟦\N{WOMAN}⟧⟦\N{GIRL}⟧ \N{MAN}\u200d"),
    (FAMILY, f"⟦{FAMILY}⟧ \N{MAN} {FAMILY}\u200d\N{BOY} ⟦{FAMILY}⟧"),
    ("\N{THUMBS UP SIGN}", "⟦\N{THUMBS UP SIGN}⟧ \N{THUMBS UP SIGN}\U0001f3fd \N{THUMBS UP SIGN}\ufe0f"),
    ("\u2764\ufe0f", "⟦\u2764\ufe0f⟧ \u2764 ⟦\u2764\ufe0f⟧⟦\u2764\ufe0f⟧ S\u2764\ufe0f"),
    ("\U0001f1fa\U0001f1f8", "⟦\U0001f1fa\U0001f1f8⟧ \U0001f1e6\U0001f1fa\U0001f1f8\U0001f1ea"),
    ("חתול", "⟦חתול⟧, (⟦חתול⟧) החתול חתולים חתוּל חתול\u05b8 ⟦חתול⟧"),
    ("बिल्ल", "बिल्ली ⟦बिल्ल⟧"),
    ("Café", "⟦Café⟧ café ⟦Cafe\u0301⟧ Cafés"),
    ("<|endoftext|>", "a ⟦<|endoftext|>⟧ <|startoftext|>"),
    ("S*", ""),
]


@pytest.mark.parametrize("words, marked", FOUND)
@pytest.mark.parametrize("kind", ["sd1", "bert"])
def test_learned_words_are_found_where_they_stand_alone(folders, kind, words, marked):
    base, tokenizer = (Tokenizer.from_folder(folders[kind]) for _ in range(2))
    for n, word in enumerate(words.split(), start=1):
        tokenizer.add(word, n)
    expected = []
    added = tokenizer.words
    forms = added | {unicodedata.normalize("NFD", word): ids for word, ids in added.items()}
    for piece in re.split("(⟦[^⟧]*⟧)", marked):
        expected += forms[piece[1:-1]] if piece.startswith("⟦") else base.encode(piece)
    text = marked.replace("⟦", "").replace("⟧", "")
    assert tokenizer.encode(text) == expected


def test_learned_ids_follow_the_vocabulary(tokenizer):
    assert tokenizer.words == {}
    size = tokenizer.vocab_size
    tokenizer.add("S*").append(0)  # a copy
    assert tokenizer.add("cat", n=3) == [size + 1, size + 2, size + 3]
    assert tokenizer.add("*") == [size + 4]
    assert tokenizer.words == {"S*": [size], "cat": [size + 1, size + 2, size + 3], "*": [size + 4]}
    assert tokenizer.vocab_size == size == len(tokenizer.core.get_vocab())
    assert tokenizer("S* cat")[0, :6].tolist() == [tokenizer.start, *range(size, size + 4), tokenizer.end]


def test_a_word_of_the_vocabulary_keeps_its_row(tokenizer, base):
    (pretrained,) = base.encode("cat")
    learned = tokenizer.add("cat")
    assert tokenizer.encode("cat Cat CAT") == [*learned, pretrained, pretrained]
    assert tokenizer.encode("cats concat") == base.encode("cats concat")


def test_a_learned_word_changes_nothing_else(tokenizer, base):
    """A name that no text contains leaves every id as it was; one amid random text cuts only itself out."""
    for word in ("S*", "\N{DRAGON}\u200d\N{DRAGON}", "qqqq"):
        tokenizer.add(word)
    for text in random_texts(300, seed=1):
        if not any(word in text for word in tokenizer.words):
            assert tokenizer.encode(text) == base.encode(text)
            framed = base.encode(text + " ") + tokenizer.words["S*"] + base.encode(" " + text)
            assert tokenizer.encode(f"{text} S* {text}") == framed


def test_words_that_cannot_be_added(tokenizer):
    tokenizer.add("S*")
    for word in ("", " ", "two words", "tab\t", "\u3000", "line\n", "\u2028x"):
        with pytest.raises(ValueError, match="white space"):
            tokenizer.add(word)
    with pytest.raises(ValueError, match=r"'S\*' is registered"):
        tokenizer.add("S*", n=2)
    with pytest.raises(ValueError, match="n=0"):
        tokenizer.add("T*", n=0)
    assert list(tokenizer.words) == ["S*"]


def test_entries_read_as_words(folders, tokenizer, byte_pairs):
    (learned,), bert = tokenizer.add("S*"), Tokenizer.from_folder(folders["bert"])
    assert [tokenizer.token(id) for id in tokenizer.encode("CAT café S*")] == ["cat", "café", "S*"]
    assert tokenizer.token(learned) == "S*" and tokenizer.token(tokenizer.end) == "<|endoftext|>"
    assert [bert.token(id) for id in bert.encode("caté cats")] == ["cat", "##e", "cats"]
    with pytest.raises(ValueError, match=str(learned + 1)):
        tokenizer.token(learned + 1)

    vocab, _ = byte_pairs
    for word, entry in [("cat", "cat</w>"), ("CAT", "cat</w>"), ("a", "a</w>"), ("café", "cafÃ©</w>")]:
        assert tokenizer.single(word) == vocab[entry]
    for word in ("", "catphotoq", "cat's", "a cat", "!", "1", "<|endoftext|>"):
        assert tokenizer.single(word) is None
    assert bert.token(bert.single("Photo")) == "photo"
    assert bert.single("photox") is None and bert.single("\N{HIRAGANA LETTER A}") is None  # [UNK]


def test_whole_words(folders, tokenizer, byte_pairs):
    vocab, _ = byte_pairs
    ids = tokenizer.word_ids()
    assert ids == sorted(set(ids)) and {vocab["cat</w>"], vocab["a</w>"], vocab["cafÃ©</w>"]} <= set(ids)
    assert not {vocab["a"], vocab["!</w>"], vocab["1</w>"], vocab["<|endoftext|>"], vocab["Ã</w>"]} & set(ids)
    plain = [id for id in ids if tokenizer.token(id).isascii() and tokenizer.token(id).islower()]
    assert plain and all(tokenizer.encode(tokenizer.token(id)) == [id] for id in plain)
    bert = Tokenizer.from_folder(folders["bert"])
    words = [bert.token(id) for id in bert.word_ids()]
    assert {"cat", "photo", "a", "猫"} <= set(words)
    assert not any(word.startswith(("#", "[")) for word in words)


def test_missing_vocabulary(tmp_path, byte_pairs):
    with pytest.raises(FileNotFoundError, match=r"found nothing, expected tokenizer\.json.*weights/README"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    folder = write_clip(tmp_path / "f", *byte_pairs)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"found special_tokens_map\.json.*merges\.txt"):
        Tokenizer.from_folder(folder)


CLIP_FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
DAMAGED = [  # a file, its contents and what the error says of them
    *((name, "\ud800", "") for name in [*CLIP_FILES, "tokenizer.json"]),
    ("vocab.json", '{"a": 0, ', "line 1 column 9"),
    ("vocab.json", "\xff", "line 1"),
    ("vocab.json", "[1, 2]", "Bad vocabulary"),
    ("vocab.json", '{"a": 0, "b": "x"}', ""),
    ("vocab.json", "[" * 100_000, ""),
    ("merges.txt", "#version: 0.2\nc a\nc a t\n", "line 2"),
    ("merges.txt", "#version: 0.2\nc a\n\n", "line 2"),
    ("merges.txt", "#version: 0.2\nc qqqq\n", "`qqqq`"),
    ("merges.txt", "#version: 0.2\n! a\n", "`!a`"),
    ("merges.txt", "<!DOCTYPE html>", "DOCTYPE"),
    ("tokenizer_config.json", "", r"tokenizer_config\.json is not readable"),
    ("tokenizer_config.json", "[]", ""),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', ""),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', ""),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 5}}}', ""),
    ("tokenizer_config.json", '{"model_max_length": "many"}', "many"),
    ("tokenizer_config.json", '{"model_max_length": 2}', "is 2"),
    ("special_tokens_map.json", '{"pad_token": "<pad>"}', "pad_token '<pad>' is not in the vocabulary"),
    ("special_tokens_map.json", '{"unk_token": "<unk>"}', "unk_token '<unk>' is not in the vocabulary"),
    ("special_tokens_map.json", '{"bos_token": [1]}', ""),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": 5}}', ""),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [7]}', ""),
    ("tokenizer.json", "{", "line 1"),
    ("tokenizer.json", '{"version": "1.0"}', "Model missing"),
    ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "not in the vocabulary"),
]


@pytest.mark.parametrize("name, content, found", DAMAGED)
def test_damaged_files(tmp_path, byte_pairs, name, content, found):
    folder = write_clip(tmp_path / "f", *byte_pairs)
    (folder / name).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=f"f does not describe a tokenizer.*{found}") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


def test_damaged_word_pieces(tmp_path):
    folder = write_bert(tmp_path / "f")
    entries = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (folder / "vocab.txt").write_text("\n".join(entries[3:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\[CLS\]|\[PAD\]|\[UNK\]"):
        Tokenizer.from_folder(folder)
    (folder / "vocab.txt").write_text("\n".join(["cat", *entries]), encoding="utf-8")
    with pytest.raises(ValueError, match="ids 0, 1, 2"):
        Tokenizer.from_folder(folder)
