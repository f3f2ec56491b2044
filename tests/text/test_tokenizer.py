import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from babl.errors import UserError
from babl.text import load_tokenizer, train_tokenizer
from babl.text.prompts import qa_prompt, qa_target

# What normalisers and whitespace rules trip over: NFKC, no-break and zero-width spaces, emoji, controls,
# characters T5 has no piece for, and the written form of special tokens.
AWKWARD = [
    *(
        "ﬁne ｆｕｌｌ Å Å ①",
        "a\u00a0b",
        "a\u200bb",
        "½ cup",
        "a\nb\n\nc\td",
        "\ufeffx",
        "x\u3000",
        "\u00ad",
        "\x00a\x1fb",
    ),
    *(
        "😀 👩\u200d👩\u200d👧 👍🏽🇩🇪",
        "नमस्ते",
        "中文",
        "▁",
        "a▁b",
        "",
        " ",
        "  ",
        "  a  b ",
        "x ,",
        "a .",
        "don 't",
    ),
    *("{x}", "<", "~", "{~<", "</s>", "a </s> b", "<pad><unk>", "<s>", "<0x0A>"),
    *("<extra_id_0>", "a<extra_id_1> b <extra_id_0>", "<extra_id_100>"),
]
CORPUS = ["The cat sat on the mat.", "A dog — not a cat — ran home, 42 times!", "Été: naïve café?"]


@pytest.fixture(scope="module")
def corpus(shared) -> list[str]:
    """Every distinct question, context and answer of the three SQuAD files."""
    texts: dict[str, None] = {}
    for file in sorted((shared / "data" / "squad").glob("*.json")):
        for article in json.loads(file.read_text())["data"]:
            for paragraph in article["paragraphs"]:
                texts[paragraph["context"]] = None
                for qa in paragraph["qas"]:
                    texts[qa["question"]] = None
                    texts.update(dict.fromkeys(answer["text"] for answer in qa["answers"]))
    assert len(texts) > 11_000
    return list(texts)


def folder_with(target: Path, source: Path, *names: str, **settings: dict) -> Path:
    """A folder with some of the source's files, and `key.json` with the content of each keyword."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    for key, content in settings.items():
        (target / f"{key}.json").write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def t5(shared, tmp_path_factory):
    """The T5 tokenizer of tokenizer.json and the one of spiece.model."""
    source = shared / "tokenizers" / "t5"
    alone = folder_with(tmp_path_factory.mktemp("t5"), source, "spiece.model", "tokenizer_config.json")
    return load_tokenizer(source), load_tokenizer(alone)


@pytest.fixture(scope="module")
def stories(shared, tmp_path_factory):
    """The stories260K tokenizer of tokenizer.json and the one of tokenizer.model."""
    source = shared / "checkpoints" / "stories260K"
    alone = folder_with(tmp_path_factory.mktemp("stories"), source, "tokenizer.model", "tokenizer_config.json")
    return load_tokenizer(source), load_tokenizer(alone)


@pytest.fixture(scope="module")
def llama(shared):
    return load_tokenizer(shared / "tokenizers" / "llama")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a small SentencePiece model in T5's layout; needs nothing beside the project."""
    folder = tmp_path_factory.mktemp("small")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """A byte-level BPE folder as LLaMA 3 and BLOOM have it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    library.add_tokens(["Zurich"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", library.token_to_id("<|begin|>"))]
    )
    folder = tmp_path_factory.mktemp("byte_level")
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "pad_token": None}
    return folder_with(folder, folder, tokenizer_config=settings)


def assert_same(one, other, texts):
    """Both give the same ids for every text, and the same text for every list of ids."""
    ids = one.encode_batch(texts)
    different = [text for text, a, b in zip(texts, ids, other.encode_batch(texts), strict=True) if a != b]
    assert not different
    assert [one.decode(row) for row in ids] == [other.decode(row) for row in ids]


# ---- the two forms of one tokenizer


def test_t5_forms_agree_on_the_corpus(t5, corpus):
    assert_same(*t5, corpus)


def test_t5_forms_agree_on_awkward_text(t5):
    assert_same(*t5, AWKWARD)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(st.sampled_from([*AWKWARD, *map(chr, range(0x20, 0x7F)), *"éüßłőœ€—“”…"])).map("".join))
def test_t5_forms_agree_on_fuzz(t5, text):
    """Equal ids, but for ties: "lll" is l + ll or ll + l, equally likely, and the two libraries choose differently."""
    one, other = (tokenizer.encode(text) for tokenizer in t5)
    assert one == other or sorted(one) == sorted(other)


def test_t5_forms_agree_on_every_character_but_next_line(t5):
    """The next-line control splits words in tokenizer.json and is an unknown character in spiece.model."""
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    one, other = (tokenizer.encode_batch([f"a{c}b " for c in characters]) for tokenizer in t5)
    assert [c for c, a, b in zip(characters, one, other, strict=True) if a != b] == ["\x85"]


def test_llama_forms_agree_on_the_corpus(stories, corpus):
    assert_same(*stories, corpus)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join)))
def test_llama_forms_agree_on_fuzz(stories, text):
    assert_same(*stories, [text])


@pytest.mark.parametrize("family", ["t5", "stories"])
def test_forms_and_transformers_decode_any_ids_alike(family, shared, request):
    from transformers import AutoTokenizer

    folder = {"t5": "tokenizers/t5", "stories": "checkpoints/stories260K"}[family]
    oracle = AutoTokenizer.from_pretrained(shared / folder)
    one, other = request.getfixturevalue(family)
    rng = random.Random(0)
    for _ in range(2000):  # with many a lone "▁" (3), byte and special id, as a model may write them
        ids = [rng.choice([3, rng.randrange(260), rng.randrange(one.vocab_size)]) for _ in range(rng.randint(0, 8))]
        text = oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert one.decode(ids) == text
        assert other.decode(ids) == text


# ---- parity with transformers


def test_t5_ids_equal_transformers(t5, shared, corpus):
    from transformers import T5Tokenizer

    oracle = T5Tokenizer.from_pretrained(shared / "tokenizers" / "t5")
    texts = corpus + [text for text in AWKWARD if not any(token in text for token in ("</s>", "<pad>", "<unk>"))]
    ids = t5[0].encode_batch(texts)
    assert ids == oracle(texts, add_special_tokens=False).input_ids
    assert [[*row, t5[0].eos_id] for row in ids] == oracle(texts).input_ids


def llama_oracle(model: Path):
    """The LlamaTokenizer of transformers, built from a tokenizer.model without protobuf.

    The merges are ranked by score, as SentencePiece ranks them and converted checkpoints hold them.
    """
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(id): id for id in range(len(pieces))}
    scores = {piece: pieces.get_score(id) for piece, id in vocab.items()}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))


def without_double_prefix(text: str) -> str:
    """The text whose ids transformers 5 gives: it adds a space only where the text starts with none."""
    return text[1:] if text.startswith((" ", "▁")) else text


def test_llama_ids_equal_transformers(llama, shared, corpus):
    control = ("</s>", "<unk>", "<s>")
    awkward = [t for t in AWKWARD if t not in (" ", "▁") and not any(token in t for token in control)]
    texts = corpus + awkward
    oracle = llama_oracle(shared / "tokenizers" / "llama" / "tokenizer.model")
    expected = oracle(texts, add_special_tokens=False).input_ids
    assert llama.encode_batch([without_double_prefix(text) for text in texts]) == expected


@pytest.mark.parametrize("form", [0, 1])
def test_stories_ids_equal_transformers(form, stories, shared, corpus):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(shared / "checkpoints" / "stories260K")
    texts = corpus[:2000]
    expected = oracle(texts, add_special_tokens=False).input_ids
    assert stories[form].encode_batch([without_double_prefix(text) for text in texts]) == expected


# ---- special ids


def test_t5_special_ids(t5):
    for tokenizer in t5:
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)
        assert tokenizer.vocab_size == 32100
        assert tokenizer.token_to_id("<extra_id_0>") == 32099
        assert tokenizer.token_to_id("<extra_id_99>") == 32000
        assert tokenizer.token_to_id("</s>") == 1
        assert tokenizer.token_to_id("no such token") is None


def test_llama_special_ids(llama, stories):
    for tokenizer, size in [(llama, 32000), (stories[0], 512), (stories[1], 512)]:
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, None, 0)
        assert tokenizer.vocab_size == size


@pytest.mark.parametrize(
    ("config", "sentinels"),
    [({}, 100), ({"extra_ids": 100}, 100), ({"extra_ids": 3}, 3), ({"extra_ids": 0}, 0)],
)
def test_extra_ids_follow_the_pieces(config, sentinels, small, tmp_path):
    pieces = load_tokenizer(small).vocab_size
    tokenizer = load_tokenizer(folder_with(tmp_path, small, "spiece.model", tokenizer_config=config))
    assert tokenizer.vocab_size == pieces + sentinels
    assert tokenizer.token_to_id("<extra_id_0>") == (pieces + sentinels - 1 if sentinels else None)


def test_added_tokens_of_the_settings_exist_behind_sentencepiece(small, tmp_path):
    size = load_tokenizer(small).vocab_size
    added = {str(size): {"content": "<turn>", "special": True}}
    config = {"extra_ids": 0, "added_tokens_decoder": added}
    tokenizer = load_tokenizer(folder_with(tmp_path, small, "spiece.model", tokenizer_config=config))
    assert tokenizer.token_to_id("<turn>") == size == tokenizer.vocab_size - 1
    assert tokenizer.decode([*tokenizer.encode("the cat"), size]) == "the cat"


def test_special_ids_come_from_the_first_file_that_names_them(small, tmp_path):
    config = {"pad_token_id": 9, "eos_token_id": [8, 1], "bos_token_id": -1}
    folder = folder_with(tmp_path, small, "spiece.model")
    assert (load_tokenizer(folder).pad_id, load_tokenizer(folder).eos_id) == (0, 1)
    folder_with(folder, small, config=config)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (9, 8, None, 2)
    folder_with(folder, small, special_tokens_map={"pad_token": {"content": "<unk>"}, "eos_token": "</s>"})
    assert (load_tokenizer(folder).pad_id, load_tokenizer(folder).eos_id) == (2, 1)
    folder_with(folder, small, tokenizer_config={"pad_token": "<pad>", "eos_token": None})
    assert (load_tokenizer(folder).pad_id, load_tokenizer(folder).eos_id) == (0, 1)


# ---- text that spells control tokens


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<pad>", "x<unk>", "<s>", "</s><pad>"])
def test_text_never_becomes_control(text, t5, stories, llama):
    for tokenizer in (*t5, *stories, llama):
        special = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id}
        ids = tokenizer.encode(text)
        assert special.isdisjoint(ids)


def test_control_text_is_encoded_as_sentencepiece_does(t5, llama, shared):
    for tokenizer, file in [(t5[0], "t5/spiece.model"), (llama, "llama/tokenizer.model")]:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers" / file))
        for text in ("</s>", "a</s> <pad>", "{</s>{", "<unk> <s>"):
            assert tokenizer.encode(text) == reference.encode(text)


def test_sentinels_are_recognised_the_legacy_way(t5):
    """The piece 3 is the space before ".", which the variant without `legacy` leaves out."""
    for tokenizer in t5:
        assert tokenizer.encode("<extra_id_0>. Hello") == [32099, 3, 5, 8774]
        assert tokenizer.encode("<extra_id_0>") == [32099]
        assert tokenizer.encode_batch(["a", "a <extra_id_1><extra_id_0>", ""]) == [
            [3, 9],
            [3, 9, 32098, 32099],
            [],
        ]
        assert tokenizer.decode([32099, 8774]) == "Hello"


def test_byte_level_special_tokens(byte_level):
    tokenizer = load_tokenizer(byte_level)
    begin, end = tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (
        begin,
        end,
        None,
        None,
    )
    assert tokenizer.vocab_size == 303
    text = "cat <|end|> in Zurich"
    assert {begin, end}.isdisjoint(tokenizer.encode(text))
    assert tokenizer.token_to_id("Zurich") in tokenizer.encode(text)
    assert tokenizer.decode([begin, *tokenizer.encode(text), end]) == text


# ---- round trip, boundaries, baked settings


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join)))
def test_llama_and_byte_level_round_trip(text, stories, llama, byte_level):
    for tokenizer in (*stories, llama, load_tokenizer(byte_level)):
        expected = text.replace("▁", " ") if tokenizer.unk_id is not None else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_t5_round_trips_plain_text(t5):
    for tokenizer in t5:
        for text in ("Hello, world .", "x , y", "don 't", "in 1984 (the year)"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode("  two  spaces ")) == "two spaces"


def test_decode_refuses_ids_outside_of_the_vocabulary(small):
    tokenizer = load_tokenizer(small)
    for id in (-100, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {id} is outside of the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([5, id])


@pytest.mark.parametrize("text", [" Paris", "Paris", " a b", "  a", "\nThe"])
def test_a_continuation_joins_without_a_second_space(text, stories, llama, byte_level):
    for tokenizer in (*stories, llama, load_tokenizer(byte_level)):
        whole = tokenizer.encode_continuation(text)
        assert tokenizer.decode(tokenizer.encode("Answer:") + whole) == f"Answer:{text}"
    assert llama.encode_continuation(" Paris") == [3681] == llama.encode("Paris")


def test_prompt_and_target_join_to_the_ids_of_the_whole(llama, stories, shared):
    data = json.loads((shared / "data" / "squad" / "train-v1.1-slice.json").read_text())["data"]
    pairs = [
        (qa_prompt(qa["question"], None, "decoder"), qa_target(qa["answers"][0]["text"], "decoder"))
        for article in data
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    for tokenizer in (llama, *stories):
        whole = tokenizer.encode_batch([prompt + target for prompt, target in pairs])
        prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
        for (_, target), prompt_ids, ids in zip(pairs, prompts, whole, strict=True):
            assert prompt_ids + tokenizer.encode_continuation(target) == ids


def test_baked_truncation_and_padding_are_off(t5):
    assert len(t5[0].encode("word " * 100)) == 100
    assert t5[0].encode("word") == [1448]
    assert [len(row) for row in t5[0].encode_batch(["word " * 100, "word"])] == [100, 1]


def test_encode_adds_neither_bos_nor_eos(byte_level, t5, stories, llama):
    for tokenizer in (load_tokenizer(byte_level), *t5, *stories, llama):
        ids = tokenizer.encode("The cat")
        assert tokenizer.bos_id not in ids
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode("") == []
        assert tokenizer.encode_batch([]) == []


# ---- save


def test_save_copies_every_file_of_the_tokenizer(shared, t5, tmp_path):
    from transformers import AutoTokenizer

    t5[0].save(tmp_path / "new")
    names = {"tokenizer.json", "spiece.model", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (shared / "tokenizers" / "t5" / name).read_bytes()
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("Hello there").input_ids
    assert ids == [*load_tokenizer(tmp_path / "new").encode("Hello there"), 1]


def test_save_into_its_own_folder_changes_nothing(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "own")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    load_tokenizer(folder).save(folder)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before


def test_save_works_after_the_source_has_gone(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "gone")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "special_tokens_map.json").is_file()
    assert load_tokenizer(tmp_path / "saved").encode("the cat") == tokenizer.encode("the cat")


# ---- training


def test_a_trained_tokenizer_reads_everything_and_a_word_alike_wherever_it_stands(tmp_path):
    tokenizer = train_tokenizer(CORPUS * 3, 300, tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, None, None)
    assert tokenizer.vocab_size <= 300
    for text in [*CORPUS, "漢 😀 <pad> </s>", "two  spaces\nand a line", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert {0, 1}.isdisjoint(tokenizer.encode(text))
    assert tokenizer.encode("cat") == tokenizer.encode("The cat")[-len(tokenizer.encode("cat")) :]
    assert tokenizer.encode("The") + tokenizer.encode_continuation(" cat") == tokenizer.encode("The cat")


def test_training_twice_gives_the_same_files(tmp_path, capfd):
    for name in ("a", "b"):
        train_tokenizer(iter(CORPUS), 300, tmp_path / name)
    assert capfd.readouterr() == ("", "")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_transformers_gives_the_ids_of_a_trained_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(CORPUS, 300, tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(CORPUS).input_ids == tokenizer.encode_batch(CORPUS)
    assert (auto.pad_token_id, auto.eos_token_id) == (0, 1)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size is 100, expected at least 258"):
        train_tokenizer(CORPUS, 100, tmp_path)


# ---- errors


def test_a_folder_without_tokenizer_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError) as error:
            load_tokenizer(folder)
        assert str(error.value) == (
            f"{folder}: no tokenizer here (expected one of tokenizer.json, spiece.model, tokenizer.model)"
        )


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "tokenizer.model"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage\n", b"{}", b"\xff\xfe", b"[1]", b'{"model": 3, "added_tokens": []}']
)
def test_a_corrupt_tokenizer_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: not a tokenizer that can be read (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize(("content", "reason"), [("{", "not valid JSON"), ("[]", "expected a JSON object, found list")])
def test_a_corrupt_settings_file_is_named(name, content, reason, small, tmp_path):
    folder = folder_with(tmp_path, small, "spiece.model")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: {reason}"):
        load_tokenizer(folder)


def test_a_special_token_outside_of_the_vocabulary_is_named(small, tmp_path):
    folder = folder_with(tmp_path, small, "spiece.model", tokenizer_config={"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"tokenizer_config.json: pad_token '\[PAD\]' is not in the vocabulary"):
        load_tokenizer(folder)


@pytest.mark.parametrize("where", ["tokenizer_config", "added_tokens"])
def test_a_word_added_beside_sentencepiece_is_recognised_in_a_text(small, tmp_path, where):
    size = load_tokenizer(small).vocab_size
    word = {"content": "<hl>", "special": False, "lstrip": False, "rstrip": False, "single_word": False}
    files = {
        "tokenizer_config": {"extra_ids": 0}
        | ({"added_tokens_decoder": {str(size): word}} if "config" in where else {}),
    }
    if where == "added_tokens":
        files["added_tokens"] = {"<hl>": size}
    tokenizer = load_tokenizer(folder_with(tmp_path, small, "spiece.model", **files))
    plain = load_tokenizer(small)
    assert tokenizer.encode("the <hl>cat<hl> sat") == [
        *plain.encode("the"), size, *plain.encode("cat"), size, *plain.encode("sat")
    ]  # fmt: skip
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == "<hl>"


def test_a_tokenizer_without_end_of_sequence_is_named(byte_level, tmp_path):
    folder = folder_with(tmp_path, byte_level, "tokenizer.json")
    with pytest.raises(UserError, match=f"{tmp_path}: no file says which token ends a sequence"):
        load_tokenizer(folder)
