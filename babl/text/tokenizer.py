"""Text to ids and back: `tokenizer.json` and SentencePiece models behind one face.

A folder holds `tokenizer.json` (any family), `spiece.model` (T5) or `tokenizer.model` (LLaMA 1 and 2); the
first of these that is there is read. The ids of pad, eos, bos and unk come, each on its own, from the first
of these that names it:

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

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from babl.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

_NAMES = ("pad", "eos", "bos", "unk")
_SPACE = "▁"  # how SentencePiece writes a space inside a piece
_BYTE_SPACE = "Ġ"  # how byte-level BPE does
_SENTINEL = re.compile(r"<extra_id_\d+>")
_BRACKETED = re.compile(r"<\S+>|\[\S+\]")  # as control tokens are written, and words are not


class _Backend(Protocol):
    """What the two libraries are reduced to."""

    vocab_size: int
    special: frozenset[int]  # ids that stand for no text
    control: dict[str, int]  # the written forms of those among them that are not T5's sentinels
    strips: dict[
        str, tuple[bool | None, bool | None]
    ]  # of control tokens: whether they take the spaces before them, and after
    words: dict[str, int]  # recognised in any text: T5's sentinels, and words added beside a SentencePiece model
    own_ids: dict[str, int]  # pad, eos, bos, unk as far as the tokenizer file itself names them
    prefixes_space: bool  # a space is put before whatever is encoded
    begins_with: int | None  # the id that the tokenizer file itself puts before every text

    @property
    def spaces_after_control(self) -> bool: ...  # that space is also put before a text that follows a control token

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...


class _JsonBackend:
    """A `tokenizer.json`, without the truncation and padding that may be baked into it."""

    def __init__(self, content: bytes, spelled_in: str) -> None:
        self._content = content
        spec = json.loads(content)
        model, added = spec["model"], spec["added_tokens"]
        # Chat models exist whose turns begin and end with tokens that nobody has flagged.
        spelled = {token["id"] for token in added if _spells(spelled_in, token["content"])}
        self.special = frozenset(token["id"] for token in added if token["special"]) | spelled
        self._added = {token["content"]: token["id"] for token in added}
        self.words = {token: id for token, id in self._added.items() if _SENTINEL.fullmatch(token)}
        self.control = {t: id for t, id in self._added.items() if id in self.special and t not in self.words}
        self.strips = {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}
        if model["type"] == "Unigram":
            # To a unigram model special tokens are pieces like any other, so text could spell them. A piece
            # with a space cannot be spelled: the pre-tokenizer has split at every space or replaced it.
            inside = [token for token in added if token["special"] and token["id"] < len(model["vocab"])]
            for token in inside:
                model["vocab"][token["id"]][0] = f" {token['content']}"
            added = [token for token in added if token not in inside]
        spec["added_tokens"] = [token for token in added if token["special"] or token["id"] not in spelled]
        unk = model.get("unk_id") if model["type"] == "Unigram" else self._added.get(model.get("unk_token"))
        self.own_ids = {} if unk is None else {"unk": unk}

        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # that is: as the text they are written with
        self.vocab_size = 1 + max(max(self._tokenizer.get_vocab().values()), *self._added.values(), 0)
        first = self._tokenizer.encode("a", add_special_tokens=False).tokens[0]
        self.prefixes_space = first.startswith((_SPACE, _BYTE_SPACE))
        first_id = self._tokenizer.encode("a", add_special_tokens=True).ids[0]
        self.begins_with = first_id if first_id in self.special else None

    @cached_property
    def _published(self) -> tokenizers.Tokenizer:
        """The tokenizer as it is in the file, to which control tokens in a text are control."""
        published = tokenizers.Tokenizer.from_str(self._content.decode())
        published.no_truncation()
        published.no_padding()
        return published

    @cached_property
    def spaces_after_control(self) -> bool:
        token = next(iter(self.control), "")
        after = self._published.encode(f"{token}a", add_special_tokens=False).tokens[-1]
        return self.prefixes_space and after.startswith((_SPACE, _BYTE_SPACE))

    def encode_with_control(self, text: str) -> list[int]:
        """Returns the ids of a text whose control tokens are control."""
        return self._published.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[start for start, _ in e.offsets] for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._added[token] if token in self._added else self._tokenizer.token_to_id(token)


class _SentencePieceBackend:
    """A SentencePiece model, with the tokens that transformers keeps beside it.

    Those stand in `added_tokens_decoder` of tokenizer_config.json, and in older folders in added_tokens.json. T5's
    sentinels need no mention: `extra_ids` of them follow the pieces, the last one first.
    """

    def __init__(self, content: bytes, settings: dict[str, Any], beside: dict[str, int], spelled_in: str) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        size, extra_ids = self._processor.get_piece_size(), settings["extra_ids"]
        sentinels = {f"<extra_id_{n}>": size + extra_ids - 1 - n for n in range(extra_ids)}
        flags = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items() if int(id) >= size}
        described = {token["content"]: id for id, token in flags.items()}
        self._added = sentinels | {token: id for token, id in beside.items() if id >= size} | described
        self._check_added(size)
        flagged = {token["content"] for token in flags.values() if token["special"]}
        spelled = {token for token in self._added if token in flagged or _spells(spelled_in, token)}
        self.words = {token: id for token, id in self._added.items() if token in sentinels or token not in spelled}
        self.words |= {token: id for token, id in self._added.items() if _SENTINEL.fullmatch(token)}
        mute = [id for id in range(size) if self._processor.is_control(id) or self._processor.is_unknown(id)]
        written = {self._processor.id_to_piece(id): id for id in mute}
        self.control = {t: id for t, id in (written | self._added).items() if t not in self.words}
        silent = [id for token, id in self.words.items() if _SENTINEL.fullmatch(token)]
        self.special = frozenset([*self.control.values(), *silent])
        self.strips = {token["content"]: (token.get("lstrip"), token.get("rstrip")) for token in flags.values()}
        ids = {name: getattr(self._processor, f"{name}_id")() for name in _NAMES}
        self.own_ids = {name: id for name, id in ids.items() if id >= 0}
        self.vocab_size = 1 + max(size - 1, *self._added.values(), 0)
        has_sentinels = any(_SENTINEL.fullmatch(token) for token in self.words)
        self.begins_with = None if has_sentinels else self.own_ids.get("bos")  # LLaMA's has one, T5's not
        self.prefixes_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE)
        self.spaces_after_control = self.prefixes_space and settings.get("legacy") is not False

    def _check_added(self, size: int) -> None:
        """Every added token has an id of its own, after the pieces."""
        ids = sorted(self._added.values())
        twice = next((id for id, other in itertools.pairwise(ids) if id == other), None)
        if twice is not None:
            tokens = [token for token, id in self._added.items() if id == twice]
            raise ValueError(f"{' and '.join(map(repr, tokens))} are both added as {twice}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._processor.encode(list(texts), return_type="offset_mapping")
        return [[start for start, _ in e["offsets"]] for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        # As tokenizer.json does it, down to byte runs that are not UTF-8 and to a second leading space: the
        # library's own decoding differs in both.
        written = {id: token for token, id in self._added.items()}
        parts = []
        for kind, run in itertools.groupby(ids, lambda id: "added" if id in written else self._processor.is_byte(id)):
            if kind == "added":
                parts += [written[id] for id in run]
                continue
            pieces = self._processor.id_to_piece(list(run))
            parts.append(_byte_text(pieces) if kind else "".join(pieces).replace(_SPACE, " "))
        text = "".join(parts)
        return text.removeprefix(" ") if self.prefixes_space else text

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        id = self._processor.piece_to_id(token)  # the id of <unk> for what it does not know
        return id if self._processor.id_to_piece(id) == token else None


def _byte_text(pieces: Sequence[str]) -> str:
    """The text of byte pieces such as `<0xE2>`; a replacement character for each where they are not UTF-8."""
    content = bytes(int(piece[3:5], 16) for piece in pieces)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(content)


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
        self, backend: _Backend, files: dict[str, bytes], ids: dict[str, int], stops: set[int], settings: dict[str, Any]
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
        begins = settings.get("add_bos_token", backend.begins_with is not None)
        self.prefix_ids = [self.bos_id] if begins and self.bos_id is not None else []
        self.chat_template = _chat_template(files, settings)

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
        if isinstance(self._backend, _JsonBackend) and not mark:
            return self._backend.encode_with_control(text)
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
    name = next((name for name in TOKENIZER_FILES if name in files), None)
    if name is None:
        raise UserError(f"{folder}: no tokenizer here (expected one of {', '.join(TOKENIZER_FILES)})")
    settings = _read_settings(folder / "tokenizer_config.json")
    beside = _read_settings(folder / "added_tokens.json")
    try:
        backend = _read_backend(name, files[name], settings, beside, _spelled_control(folder, files, settings))
    except Exception as error:  # the libraries raise nothing narrower
        raise UserError(f"{folder / name}: not a tokenizer that can be read ({_first_line(error)})") from error
    return Tokenizer(backend, files, _special_ids(folder, backend), _stop_ids(folder), settings)


def _read_backend(
    name: str, content: bytes, settings: dict[str, Any], beside: dict[str, int], spelled_in: str
) -> _Backend:
    if name == "tokenizer.json":
        return _JsonBackend(content, spelled_in)
    # A folder that says nothing is one of the released T5's, which have a hundred.
    extra_ids = settings.get("extra_ids", 100 if name == "spiece.model" else 0)
    return _SentencePieceBackend(content, settings | {"extra_ids": extra_ids}, beside, spelled_in)


def _chat_template(files: dict[str, bytes], settings: dict[str, Any]) -> str:
    """Returns the template for plain conversations, which is called "default" where several are listed by name."""
    template = files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    named = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {"default": template}
    return named.get("default") or ""


def _spelled_control(folder: Path, files: dict[str, bytes], settings: dict[str, Any]) -> str:
    """Returns a text that holds every control token which the folder's template and configurations spell."""
    named = [found.get(f"{name}_token") for found in (settings, _special_map(folder)) for name in _NAMES]
    written = [token["content"] if isinstance(token, dict) else token for token in named]
    return "\n".join([_chat_template(files, settings), *filter(None, written)])


def _special_map(folder: Path) -> dict[str, Any]:
    return _read_settings(folder / "special_tokens_map.json")


def _spells(text: str, token: str) -> bool:
    return _BRACKETED.fullmatch(token) is not None and token in text


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the tokens, the longest first, and can split at them; None where there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _special_ids(folder: Path, backend: _Backend) -> dict[str, int]:
    """The ids of pad, eos, bos and unk as far as there are any; the later source wins."""
    ids = dict(backend.own_ids)
    config = _read_settings(folder / "config.json")
    for name in _NAMES:
        id = config.get(f"{name}_token_id")
        id = id[0] if isinstance(id, list) and id else id
        if isinstance(id, int) and id >= 0:  # old configs write -1 for none
            ids[name] = id
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        settings = _read_settings(file)
        for name in _NAMES:
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

    The same texts give the same file. A word has the same ids at the start of a text as behind a space.

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
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)
