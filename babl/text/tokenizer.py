"""Text to ids and back: `tokenizer.json` and SentencePiece models behind one face.

A folder holds `tokenizer.json` (any family), `spiece.model` (T5) or `tokenizer.model` (LLaMA 1 and 2); the
first of these that is there is read. ByT5 has none of them: its tokens are bytes, as its settings say. The ids
of pad, eos, bos and unk come, each on its own, from the first of these that names it:

1. `pad_token`, `eos_token`, ... in tokenizer_config.json
2. the same keys in special_tokens_map.json
3. `pad_token_id`, `eos_token_id`, ... in config.json (the first, where it lists several)
4. the tokenizer file itself

**Text is never control.** `</s>` or `<pad>` typed by a user is encoded as the characters it is written
with, as SentencePiece does and transformers does not; who needs a control token looks it up with
`token_to_id`. T5's sentinels `<extra_id_n>` are words of its pre-training task rather than control, and are
recognised, as are words that were added beside a SentencePiece model (`added_tokens.json`). The text between them is
encoded piece by piece with a space before each: "<extra_id_0>. Hello" is [32099, 3, 5, 8774], what transformers calls
the legacy behaviour and what its T5Tokenizer 5.17 gives.

What a chat template renders is another matter: there control tokens are control, and the text around them is encoded as
transformers encodes it (`encode_chat`). An added token that the template or a configuration spells is control, whether
it is flagged special or not.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from babl.errors import UserError
from babl.files import refuse_pointer
from babl.text.backends import NAMES, Backend, ByteBackend, JsonBackend, SentencePieceBackend

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
BYTES = "ByT5Tokenizer"  # the class that the settings name where tokens are bytes
SIDE_FILES = (
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
    "generation_config.json",
)


class Tokenizer:
    """A tokenizer as models see it: ids without BOS, EOS or padding, which callers add where they belong.

    Attributes:
        vocab_size: The highest id plus one; a model may have more rows than that.
        eos_id: Ends every sequence.
        stop_ids: End what a model writes: EOS, and what config.json and generation_config.json name beside it (the end
            of a turn, in LLaMA 3).
        prefix_ids: What every text begins with: BOS for LLaMA, nothing for T5 and BLOOM.
        control: The written forms of control tokens and their ids.
        chat_template: A jinja template that words a conversation; empty for a base model.
        pad_id: None where the tokenizer has none (LLaMA).
        bos_id: None where the family has none (T5).
        unk_id: None where every text has ids (byte-level BPE).
    """

    def __init__(
        self,
        backend: Backend,
        files: dict[str, bytes],
        ids: dict[str, int],
        stops: set[int],
        begins: bool | None,
        chat_template: str,
    ) -> None:
        self._backend = backend
        self._files = files  # held, so that a checkpoint is whole even when the folder has gone meanwhile
        self._special = backend.special.union(ids.values())
        self._words = _any_of(backend.words)
        self._control = _any_of(backend.control)
        self.vocab_size = backend.vocab_size
        self.control = backend.control
        self.eos_id = ids["eos"]
        self.pad_id = ids.get("pad")
        self.bos_id = ids.get("bos")
        self.unk_id = ids.get("unk")
        self.stop_ids = frozenset({self.eos_id, *stops})
        begins = backend.begins_with is not None if begins is None else begins
        self.prefix_ids = [self.bos_id] if begins and self.bos_id is not None else []
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text that stands alone; no BOS or EOS, no truncation."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, several times faster."""
        if self._words is None:
            return self._backend.encode(texts)
        split = [self._words.split(text) for text in texts]  # text, word, text, ...
        plain = iter(self._backend.encode([part for parts in split for part in parts[::2]]))
        rows = []
        for parts in split:
            row = next(plain)
            for word in parts[1::2]:
                row += [self._backend.words[word], *next(plain)]
            rows.append(row)
        return rows

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the code point at which each token of a text begins, in order; T5's sentinels count as text here."""
        return self._backend.token_starts(texts)

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that follows other text: no space is put before it.

        SentencePiece starts every text with a space of its own, so that `encode(" Paris")` holds two; after
        "Answer:" the model has learned to expect one. Where the tokenizer does not merge over the boundary,
        `encode(a) + encode_continuation(b) == encode(a + b)`.
        """
        if not self._backend.prefixes_space:
            return self.encode(text)
        anchor = self.encode("\n")  # takes the space; a byte to LLaMA, nothing to T5, part of no longer piece
        return self.encode(f"\n{text}")[len(anchor) :]

    def spells_control(self, text: str) -> bool:
        """Returns whether the text holds the written form of a control token."""
        return self._control is not None and self._control.search(text) is not None

    def guard(self, text: str, mark: str) -> str:
        """Returns the text with a mark inside whatever is written like a control token."""
        return (
            text if self._control is None else self._control.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        )

    def encode_chat(self, text: str, mark: str = "") -> list[int]:
        """Returns the ids of what a chat template has rendered: the control tokens in it are control.

        Args:
            text: Rendered.
            mark: What `guard` has put into the parts that a user has typed, which are text; empty where nothing was
                guarded.
        """
        whole = None if mark else self._backend.encode_with_control(text)
        if whole is not None:
            return whole
        parts = [text] if self._control is None else self._control.split(text)  # text, control token, text, ...
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(self._backend.control[part])
                continue
            if place and self._backend.strips.get(parts[place - 1], (False, False))[1]:
                part = part.lstrip()
            if place + 1 < len(parts) and self._backend.strips.get(parts[place + 1], (False, False))[0]:
                part = part.rstrip()
            plain = part.replace(mark, "") if mark else part
            alone = place == 0 or self._backend.spaces_after_control
            if plain:
                ids += self.encode(plain) if alone else self.encode_continuation(plain)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, special ids left out, spaces as the model wrote them.

        Raises:
            ValueError: An id is outside of [0, vocab_size).
        """
        spoken = [id for id in ids if id not in self._special]
        outside = next((id for id in spoken if not 0 <= id < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"token id {outside} is outside of the vocabulary of {self.vocab_size}")
        return self._backend.decode(spoken)

    def written(self, id: int) -> str | None:
        """Returns the written form of a control token by its id; None where it is none."""
        return next((token for token, known in self.control.items() if known == id), None)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token by its written form, special or not; None where there is none."""
        return self._backend.token_to_id(token)

    def save(self, folder: str | Path) -> None:
        """The folder holds the files this tokenizer was loaded from, byte for byte."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            file = folder / name
            if not (file.is_file() and file.read_bytes() == content):
                file.write_bytes(content)


class Detokenizer:
    """The text of ids that come one by one, in pieces that never split a character.

    A piece is what the text grows by when an id is read beside the ids before it, so that a word keeps the space
    that only stands between ids. What may be the beginning of a character waits for its end.
    """

    _BESIDE = 4  # ids of the text before that are read with the first ones

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = list(before[-self._BESIDE :])
        self._start, self._read = 0, len(self._ids)

    def add(self, id: int) -> str:
        """Returns the text that is now known, often the id's own."""
        self._ids.append(id)
        piece = self._unread()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return piece

    def rest(self) -> str:
        """Returns what still waits, broken characters as U+FFFD."""
        piece = self._unread()
        self._start, self._read = self._read, len(self._ids)
        return piece

    def _unread(self) -> str:
        return self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._read])) :]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, whichever form it is stored in.

    Args:
        folder: Holds one of `TOKENIZER_FILES`, and tokenizer_config.json, special_tokens_map.json and the
            model's config.json where it has them.

    Raises:
        UserError: There is no tokenizer in the folder, one of its files is corrupt, a special token is not in
            the vocabulary, or no file says which token ends a sequence.
    """
    folder = Path(folder)
    files = {
        name: (folder / name).read_bytes() for name in (*TOKENIZER_FILES, *SIDE_FILES) if (folder / name).is_file()
    }
    name = tokenizer_file(folder)
    if name is None:
        raise UserError(f"{folder}: no tokenizer here (expected one of {', '.join(TOKENIZER_FILES)})")
    settings = _read_settings(folder / SETTINGS)
    if name == SETTINGS and settings.get("tokenizer_class") != BYTES:  # said in config.json, which is the model's
        settings |= {"tokenizer_class": BYTES}
        files[SETTINGS] = json.dumps(settings, indent=2).encode()
    beside = _read_settings(folder / "added_tokens.json")
    template = _chat_template(folder, files, settings)
    spelled_in = "\n".join([template, *_named_control(folder, settings)])
    refuse_pointer(folder / name)
    try:
        backend = _read_backend(name, files[name], settings, beside, spelled_in)
    except Exception as error:  # the libraries raise nothing narrower
        raise UserError(f"{folder / name}: not a tokenizer that can be read ({_first_line(error)})") from error
    ids, begins = _special_ids(folder, backend), settings.get("add_bos_token")
    return Tokenizer(backend, files, ids, _stop_ids(folder), begins, template)


def tokenizer_file(folder: Path) -> str | None:
    """Returns the name of the file that a folder's tokenizer is read from; None where there is no tokenizer."""
    found = next((name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    named = [_read_settings(folder / name).get("tokenizer_class") for name in (SETTINGS, "config.json")]
    return SETTINGS if found is None and BYTES in named else found


def _read_backend(
    name: str, content: bytes, settings: dict[str, Any], beside: dict[str, int], spelled_in: str
) -> Backend:
    if name == "tokenizer.json":
        return JsonBackend(content, settings, spelled_in)
    if name == SETTINGS:
        return ByteBackend(settings)
    # A folder that says nothing is one of the released T5's, which have a hundred.
    extra_ids = settings.get("extra_ids", 100 if name == "spiece.model" else 0)
    return SentencePieceBackend(content, settings | {"extra_ids": extra_ids}, beside, spelled_in)


def _chat_template(folder: Path, files: dict[str, bytes], settings: dict[str, Any]) -> str:
    """Returns the template for plain conversations, which is called "default" where several are listed by name."""
    try:
        template = files.get(TEMPLATE, b"").decode() or settings.get("chat_template")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / TEMPLATE}: not UTF-8 ({error})") from None
    forms = template if isinstance(template, list) else [{"name": "default", "template": template or ""}]
    if not all(isinstance(form, dict) and isinstance(form.get("template"), str) for form in forms):
        found = repr(template)[:40]
        raise UserError(f"{folder / SETTINGS}: chat_template is {found}, expected a text, or a list of them by name")
    return next((form["template"] for form in forms if form.get("name") == "default"), "")


def _named_control(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the control tokens that the folder's configurations name."""
    named = [found.get(f"{name}_token") for found in (settings, _special_map(folder)) for name in NAMES]
    return [token["content"] if isinstance(token, dict) else token for token in named if token]


def _special_map(folder: Path) -> dict[str, Any]:
    return _read_settings(folder / "special_tokens_map.json")


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the tokens, the longest first, and can split at them; None where there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _special_ids(folder: Path, backend: Backend) -> dict[str, int]:
    """The ids of pad, eos, bos and unk as far as there are any; the later source wins."""
    ids = dict(backend.own_ids)
    config = _read_settings(folder / "config.json")
    for name in NAMES:
        id = config.get(f"{name}_token_id")
        id = id[0] if isinstance(id, list) and id else id
        if isinstance(id, int) and id >= 0:  # old configs write -1 for none
            ids[name] = id
    for file in (folder / "special_tokens_map.json", folder / SETTINGS):
        settings = _read_settings(file)
        for name in NAMES:
            token = settings.get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            if token is not None:
                id = backend.token_to_id(token)
                if id is None:
                    raise UserError(f"{file}: {name}_token '{token}' is not in the vocabulary")
                ids[name] = id
    if "eos" not in ids:
        raise UserError(f"{folder}: no file says which token ends a sequence (eos_token in tokenizer_config.json)")
    return ids


def _stop_ids(folder: Path) -> set[int]:
    """The ids that end what the folder's model writes, as far as its configurations name them."""
    named = [_read_settings(folder / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    return {id for ids in named for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int) and id >= 0}


def _read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    try:
        settings = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({_first_line(error)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """The folder holds a byte-level BPE tokenizer of the texts: pad 0, eos 1, no bos, nothing unknown.

    The same texts give the same file. A word has the same ids at the start of a text as after a space.

    Args:
        texts: What it will read.
        vocab_size: An upper bound, in tokens; few texts may not fill it.
        folder: Created where it does not exist.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and two special tokens.
    """
    bytes_and_specials = 258
    if vocab_size < bytes_and_specials:
        raise UserError(f"vocab_size is {vocab_size}, expected at least {bytes_and_specials}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,  # transformers 4 takes it from here, whatever tokenizer.json says
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)
