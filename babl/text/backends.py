"""What is behind a tokenizer: `tokenizers` for tokenizer.json, `sentencepiece` for its own models, bytes for ByT5."""

import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import sentencepiece
import tokenizers

NAMES = ("pad", "eos", "bos", "unk")
_SPACE = "▁"  # how SentencePiece writes a space inside a piece
_BYTE_SPACE = "Ġ"  # how byte-level BPE does
_SENTINEL = re.compile(r"<extra_id_\d+>")
_BRACKETED = re.compile(r"<\S+>|\[\S+\]")  # as control tokens are written, and words are not


class Backend(Protocol):
    """What each of them is reduced to."""

    vocab_size: int
    special: frozenset[int]  # ids that stand for no text
    control: dict[str, int]  # the written forms of those among them that are not T5's sentinels
    strips: dict[str, tuple[bool | None, bool | None]]  # whether a token takes the spaces before it, and after it
    words: dict[str, int]  # recognised in any text: T5's sentinels, and words added beside a SentencePiece model
    own_ids: dict[str, int]  # pad, eos, bos, unk as far as the tokenizer file itself names them
    prefixes_space: bool  # a space is put before whatever is encoded
    begins_with: int | None  # the id that the tokenizer file itself puts before every text

    @property
    def spaces_after_control(self) -> bool:
        """Whether that space is also put before a text that follows a control token."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, in which nothing is control."""

    def encode_with_control(self, text: str) -> list[int] | None:
        """Returns the ids of a text whose control tokens are control; None where the library does not know them."""

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the code point at which each token of a text begins."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that stand for text."""

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token by its written form; None where there is none."""


class JsonBackend:
    """A `tokenizer.json`, without the truncation and padding that may be baked into it."""

    def __init__(self, content: bytes, settings: dict[str, Any], spelled_in: str) -> None:
        spec = json.loads(content)
        model = spec["model"]
        unigram = isinstance(model["vocab"], list)  # the oldest files do not name their type
        spec["added_tokens"] = added = spec["added_tokens"] + _declared(spec, settings)
        self._content = json.dumps(spec)
        # Chat models exist whose turns begin and end with tokens that nobody has flagged.
        spelled = {token["id"] for token in added if _spells(spelled_in, token["content"])}
        self.special = frozenset(token["id"] for token in added if token["special"]) | spelled
        self._added = {token["content"]: token["id"] for token in added}
        self.words = {token: id for token, id in self._added.items() if _SENTINEL.fullmatch(token)}
        self.control = {t: id for t, id in self._added.items() if id in self.special and t not in self.words}
        self.strips = {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}
        if unigram:
            # To a unigram model special tokens are pieces like any other, so text could spell them. A piece
            # with a space cannot be spelled: the pre-tokenizer has split at every space or replaced it.
            inside = [token for token in added if token["special"] and token["id"] < len(model["vocab"])]
            for token in inside:
                model["vocab"][token["id"]][0] = f" {token['content']}"
            added = [token for token in added if token not in inside]
        spec["added_tokens"] = [token for token in added if token["special"] or token["id"] not in spelled]
        unk = model.get("unk_id") if unigram else self._added.get(model.get("unk_token"))
        self.own_ids = {} if unk is None else {"unk": unk}

        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # that is: as the text they are written with
        self.vocab_size = 1 + max(max(self._tokenizer.get_vocab().values()), *self._added.values(), 0)
        tokens = self._tokenizer.encode("a", add_special_tokens=False).tokens  # none where the vocabulary has no "a"
        self.prefixes_space = any(token.startswith((_SPACE, _BYTE_SPACE)) for token in tokens[:1])
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        self.begins_with = next((id for id in ids[:1] if id in self.special), None)

    @cached_property
    def _published(self) -> tokenizers.Tokenizer:
        """The tokenizer as it is in the file, to which control tokens in a text are control."""
        published = tokenizers.Tokenizer.from_str(self._content)
        published.no_truncation()
        published.no_padding()
        return published

    @cached_property
    def spaces_after_control(self) -> bool:  # noqa: D102
        token = next(iter(self.control), "")
        after = self._published.encode(f"{token}a", add_special_tokens=False).tokens
        return self.prefixes_space and after[-1].startswith((_SPACE, _BYTE_SPACE))

    def encode_with_control(self, text: str) -> list[int]:
        """Returns the ids of a text whose control tokens are control."""
        return self._published.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [[start for start, _ in e.offsets] for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:  # noqa: D102
        return self._added[token] if token in self._added else self._tokenizer.token_to_id(token)


def _declared(spec: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the tokens that the settings add to those of a tokenizer.json, with the ids transformers gives them.

    Those are the next ones, whatever the settings say, unless the vocabulary has the token already.
    """
    known = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocabulary = spec["model"]["vocab"]
    pieces = {p: id for id, (p, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    free = 1 + max([*pieces.values(), *known.values()], default=-1)
    declared = []
    for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda pair: int(pair[0])):
        if token["content"] not in known:
            id = pieces.get(token["content"], free)
            free = max(free, id + 1)
            flags = {name: token.get(name, False) for name in ("special", "single_word", "lstrip", "rstrip")}
            normalized = token.get("normalized", not flags["special"])
            declared.append(flags | {"id": id, "content": token["content"], "normalized": normalized})
    return declared


class SentencePieceBackend:
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
        ids = {name: getattr(self._processor, f"{name}_id")() for name in NAMES}
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

    def encode(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        return self._processor.encode(list(texts))

    def encode_with_control(self, text: str) -> None:  # noqa: D102
        return None

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        encoded = self._processor.encode(list(texts), return_type="offset_mapping")
        return [[start for start, _ in e["offsets"]] for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
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

    def token_to_id(self, token: str) -> int | None:  # noqa: D102
        if token in self._added:
            return self._added[token]
        id = self._processor.piece_to_id(token)  # the id of <unk> for what it does not know
        return id if self._processor.id_to_piece(id) == token else None


class ByteBackend:
    """ByT5's tokens: three that are control, the 256 bytes of UTF-8, and sentinels, of which the first comes first.

    Ref: Xue et al. 2021, section 3.1; transformers' ByT5Tokenizer.
    """

    prefixes_space = spaces_after_control = False
    begins_with: int | None = None

    def __init__(self, settings: dict[str, Any]) -> None:
        self.own_ids = {"pad": 0, "eos": 1, "unk": 2}
        self.control = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self._bytes = len(self.control)
        described = {int(id): token for id, token in settings.get("added_tokens_decoder", {}).items()}
        self.strips = {token["content"]: (token.get("lstrip"), token.get("rstrip")) for token in described.values()}
        size, sentinels = self._bytes + 256, settings.get("extra_ids", 125)
        self.words = {f"<extra_id_{n}>": size + n for n in range(sentinels)}  # 0 where transformers 5 describes each
        self.words |= {token["content"]: id for id, token in described.items() if id >= size}
        self.vocab_size = 1 + max(size - 1, *self.words.values())
        self.special = frozenset([*self.control.values(), *self.words.values()])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        return [[self._bytes + byte for byte in text.encode()] for text in texts]

    def encode_with_control(self, text: str) -> None:  # noqa: D102
        return None

    def token_starts(self, texts: Sequence[str]) -> list[list[int]]:  # noqa: D102
        return [[at for at, char in enumerate(text) for _ in char.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that stand for text; bytes that are no UTF-8 are left out, as transformers does."""
        return bytes(id - self._bytes for id in ids).decode(errors="ignore")

    def token_to_id(self, token: str) -> int | None:  # noqa: D102
        known = self.control | self.words
        if token not in known and len(token) == 1 and ord(token) < 256:
            return self._bytes + ord(token)
        return known.get(token)


def _byte_text(pieces: Sequence[str]) -> str:
    """The text of byte pieces such as `<0xE2>`; a replacement character for each where they are not UTF-8."""
    content = bytes(int(piece[3:5], 16) for piece in pieces)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(content)


def _spells(text: str, token: str) -> bool:
    return _BRACKETED.fullmatch(token) is not None and token in text
