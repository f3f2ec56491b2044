"""Tokenizers as transformers 4 and 5 save them: the ids of texts and of conversations are those of who saved them."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from babl.text import load_tokenizer
from babl.text.prompts import chat_ids

LOOP, SYSTEM = "{% for m in messages %}", "{% if messages[0].role == 'system' %}"
ASK = "{% if add_generation_prompt %}"
# In the layouts of published chat models. {B}, {E}: what begins and ends a text in the vocabulary at hand.
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    + "<|im_start|>assistant\n{% endif %}",
    "chatml with a system message of its own": LOOP + "{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    + "You help.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
    + "<|im_start|>assistant\n{% endif %}",
    "headers": LOOP + "{% set said = '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|stop|>' %}"
    + "{% if loop.index0 == 0 %}{% set said = bos_token + said %}{% endif %}{{ said }}{% endfor %}" + ASK
    + "<|start|>assistant<|end|>\n\n{% endif %}",
    "instructions": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    + "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "instructions, each turn a text": LOOP + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + "
    + "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    + "{% endfor %}",
    "instructions around a system message": SYSTEM + "{% set rest = messages[1:] %}{% set told = '<<SYS>>\n' + "
    + "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}"
    + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ told if loop.first else '' }}"
    + "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "roles in bars": LOOP + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}" + ASK
    + "<|assistant|>\n{% endif %}",
    "roles in bars, turns ended": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "turns": "{{ bos_token }}" + LOOP + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + "{{ m.content | trim }}</turn>\n{% endfor %}" + ASK + "<turn>model\n{% endif %}",
    "capital names": "{{ bos_token }}" + SYSTEM + "{{ messages[0].content }} {% endif %}" + LOOP
    + "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}"
    + "{{ eos_token }}{% endif %}{% endfor %}" + ASK + "ASSISTANT:{% endif %}",
    "headed paragraphs": LOOP + "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    + "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n"
    + "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}" + ASK + "### Response:\n{% endif %}",
    "names and colons": LOOP + "{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}" + ASK
    + "Assistant:{% endif %}",
    "user and bot": LOOP + "{{ {'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[m.role] }}: "
    + "{{ m.content }}\n{% endfor %}" + ASK + "Falcon:{% endif %}",
    "text ends turns": LOOP + "{{ m.content }}{{ eos_token }}{% endfor %}",
    "tags": LOOP + "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}" + ASK + "<assistant>{% endif %}",
    "a namespace": "{% set ns = namespace(told='') %}" + LOOP + "{% if m.role == 'system' %}"
    + "{% set ns.told = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.told }}" + LOOP
    + "{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    + "<|stop|>{% endif %}{% endfor %}" + ASK + "<|assistant|>{% endif %}",
    "a macro": "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endmacro %}" + LOOP
    + "{{ turn(m) }}\n{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}",
    "alternating or refused": "{{ bos_token }}{% set start = 1 if messages[0].role == 'system' else 0 %}"
    + "{% for m in messages[start:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    + "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}|{{ m.content }}|{% endfor %}",
    "tools where there are any": "{%- if tools %}{{ tools | tojson }}{%- endif %}\n" + LOOP
    + "{%- if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endif %}{%- endfor %}",
    "stripped lines": "{%- for m in messages -%}\n  <|{{- m.role -}}|>\n  {{- m.content }}\n{%- endfor -%}\n"
    + "<|assistant|>",
    "marked for training": LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    + "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>",
    "as JSON": LOOP + "{{ m | tojson }}\n{% endfor %}" + ASK + "{\"role\": \"assistant\"{% endif %}",
    "the date": "Today is {{ strftime_now('%Y') }}.\n" + LOOP
    + "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
}  # fmt: skip
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|stop|>", "<turn>", "</turn>", "<|user|>"]
CONTROL += ["<|assistant|>", "<|system|>"]
BITS = [
    *" é1aİßΩ_-▁\n\t\r½…“`\\{}#<|>\"'", "  ", "\r\n", "e\u0301", "日本", "한국", "ก็", "אבג", "كتاب", "😀", "👩‍👩‍👧",
    "🇩🇪", "\u200b", "\u00a0", "ﬁ", "①", "\x7f", "\u2028", "23", "'s", "n't", "[INST]", "<b>", "reads", "The",
    "://", "\ufeff", "\u3000", "\u0301",
]  # fmt: skip
SAID = ("who reads", " two  spaces ", "a line\nand another\n", "Été ① ﬁ", "日本 😀", "x", "")
# Saves each tokenizer anew and writes what it makes of texts and conversations when it is read from there.
SAVE = """
import json, sys, transformers
from transformers import AutoTokenizer
with open(sys.argv[1]) as file:
    job = json.load(file)
for source, target, slow in job["folders"]:
    AutoTokenizer.from_pretrained(source, use_fast=not slow).save_pretrained(target)
    read = AutoTokenizer.from_pretrained(target, use_fast=not slow)
    ids = read(job["texts"], add_special_tokens=False)["input_ids"]
    asked = {"add_generation_prompt": True, "return_dict": False}
    chats = {
        name: [read.apply_chat_template(chat, chat_template=template, **asked) for chat in job["chats"]]
        for name, template in job["templates"].items() if read.bos_token  # which templates of chat models name
    }
    found = {"version": transformers.__version__, "texts": ids, "chats": chats}
    with open(target + ".json", "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="module")
def sources(shared, tmp_path_factory):
    """T5's unigram and LLaMA's BPE with byte fallback as SentencePiece models, a byte-level BPE, and ByT5's bytes."""
    home = tmp_path_factory.mktemp("sources")
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = {
        "t5": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "pad_token": "<pad>"} | ends,
        "llama": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False} | ends,
        "byte-level": {"tokenizer_class": "PreTrainedTokenizerFast"} | ends,
        "byt5": {"tokenizer_class": "ByT5Tokenizer"},
    }
    for name, settings in made.items():
        (home / name).mkdir()
        (home / name / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**6}))
    shutil.copy(shared / "tokenizers" / "t5" / "spiece.model", home / "t5")
    shutil.copy(shared / "tokenizers" / "llama" / "tokenizer.model", home / "llama")
    for name, family in (("t5", "t5"), ("llama", "llama"), ("byt5", "t5")):
        (home / name / "config.json").write_text(json.dumps({"model_type": family}))
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>", "<unk>", *CONTROL], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    byte_level.train_from_iterator([*passages(shared)[:200], *TEMPLATES.values()], trainer)
    byte_level.save(str(home / "byte-level" / "tokenizer.json"))
    return home


def passages(shared):
    tree = json.loads((shared / "data" / "squad" / "dev-v1.1-xquad-en.json").read_text())
    paragraphs = [paragraph for article in tree["data"] for paragraph in article["paragraphs"]]
    return [text for p in paragraphs for text in (p["context"], *(qa["question"] for qa in p["qas"]))]


def saved_by(python, sources, home, shared, forms):
    """Babl's and transformers' ids of the same folders, saved by the transformers of this Python."""
    draw = random.Random(11)
    texts = draw.sample(passages(shared), 600)
    texts += ["".join(draw.choices(BITS, k=draw.randint(1, 9))) for _ in range(1500)]
    turns = [*itertools.combinations(SAID, 1), *itertools.islice(itertools.combinations(SAID, 3), 0, None, 4)]
    roles = ("user", "assistant", "user")
    chats = [[{"role": role, "content": text} for role, text in zip(roles, said, strict=False)] for said in turns]
    chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats[:2] + chats[-2:]]
    folders = [(str(sources / kind), str(home / f"{kind} {'slow' if slow else 'fast'}"), slow) for kind, slow in forms]
    job = {"texts": texts, "chats": chats, "templates": TEMPLATES, "folders": folders}
    (home / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([python, "-c", SAVE, home / "job.json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for _, target, _ in folders:
        with open(f"{target}.json") as file:
            theirs = json.load(file)
        check(target, theirs, texts, chats)
        yield theirs["version"]


def check(folder, theirs, texts, chats):
    ours = load_tokenizer(folder)
    for text, got, want in zip(texts, ours.encode_batch(texts), theirs["texts"], strict=True):
        assert got == want, (folder, text)
    for name, expected in theirs["chats"].items():
        ours.chat_template = TEMPLATES[name]
        for chat, want in zip(chats, expected, strict=True):
            assert chat_ids(chat, ours) == want, (folder, name, chat)


def test_what_transformers_5_saves_is_read_as_it_reads_it(sources, shared, tmp_path):
    forms = [("t5", False), ("llama", False), ("byte-level", False), ("byt5", True)]
    assert set(saved_by(sys.executable, sources, tmp_path, shared, forms)) == {"5.17.0"}


@pytest.mark.slow
def test_what_transformers_4_saves_is_read_as_it_reads_it(old_python, sources, shared, tmp_path):
    forms = [("t5", False), ("t5", True), ("llama", False), ("llama", True), ("byte-level", False), ("byt5", True)]
    assert set(saved_by(old_python, sources, tmp_path, shared, forms)) == {"4.57.6"}
