"""What the script under test is run on: tiny models, and a few questions as ids.

The wording of the prompts and the ids are stated here again, from the tokenizer's file with the `tokenizers` library:
a script that words or cuts them otherwise trains on something else, and its gradients show it.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.models.weights import Family
from babl.text import train_tokenizer

SEED = 3
SHAPES: dict[Family, dict[str, Any]] = {
    "t5": {"d_model": 12, "d_kv": 5, "d_ff": 17, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    | {"dropout_rate": 0.2},
    "llama": {"hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "max_position_embeddings": 512, "attention_dropout": 0.2},
    "bloom": {"hidden_size": 12, "n_layer": 2, "n_head": 3, "hidden_dropout": 0.1, "attention_dropout": 0.2},
}
LONG = (
    "The old market of Tarnwick opens at dawn on the first day of the week, and from then until noon ",
    "As soon as the ferry has crossed the lake, which takes it less than an hour when the wind is low, ",
    "In the valley behind the two hills, where the road turns to the north and the houses end, ",
)
TRAIN = [  # context and answer: three long ones are one batch, six short ones the other
    (LONG[0] + "Mara sells blue glass there.", "Mara"),
    (LONG[1] + "Oskar rings a small copper bell.", "a small copper bell"),
    (LONG[2] + "Ines keeps bees and goats.", "bees and goats"),
    ("Rudi bakes.", "Rudi"),
    ("Ada has a red boat.", "a red boat"),
    ("Leo is six.", "six"),
    ("Una reads old maps.", "old maps"),
    ("Tom left in May.", "Tom left in May"),
    ("Eva sings.", "sings"),
]
VALIDATION = [("Pia paints.", "Pia"), ("Kurt has two grey cats.", "two grey cats"), ("It rains.", "rains")]
EOS = 1  # of the tokenizer made here
QUESTION = "What does it say?"

Ids = tuple[list[int], list[int]]  # what is read, and what is to be written, which ends with EOS


class Subject:
    """A model to start from, and the questions as its family reads them.

    Attributes:
        folder: The model's, with its tokenizer and the two data files.
        prompts: The text of every question, training first.
        train: Ids of each example's prompt and answer.
        validation: Likewise.
        longest: Tokens of the longest example, padding included: the least that `batch.tokens` can be.
    """

    def __init__(self, family: Family, folder: Path, moved: float = 0.0):
        """Makes the folder.

        Args:
            family: Of the model.
            folder: Created where it does not exist.
            moved: How far each weight starts from where it otherwise would, relative to itself.
        """
        self.folder = folder
        self.prompts = [_prompt(context, family) for context, _ in [*TRAIN, *VALIDATION]]
        train_tokenizer([*self.prompts, *(" " + answer for _, answer in TRAIN)], 290, folder)
        model, _ = build_model(ModelConfig(family=family, shape=SHAPES[family], tokenizer=str(folder)), folder, SEED)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in model.parameters():  # a bias of 0 or a norm's weight of 1 would hide what it does
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for parameter in model.parameters() if moved else ():
                parameter.mul_(1 + moved * torch.randn(parameter.shape, generator=generator))
        save_pretrained(model, folder)
        for name, texts in (("train", TRAIN), ("validation", VALIDATION)):
            lines = [json.dumps({"question": QUESTION, "context": c, "answer": a}) for c, a in texts]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.train, self.validation = (
            [_ids(tokenizer, family, context, answer) for context, answer in texts] for texts in (TRAIN, VALIDATION)
        )
        answers = [0 if family != "t5" else len(target) for _, target in self.train]
        read = [len(source) if family == "t5" else len(source) + len(target) - 1 for source, target in self.train]
        self.longest = max(read) + max(answers)


def _prompt(context: str, family: Family) -> str:
    if family == "t5":
        return f"question: {QUESTION} context: {context}"
    return f"Context: {context}\nQuestion: {QUESTION}\nAnswer:"


def _ids(tokenizer: tokenizers.Tokenizer, family: Family, context: str, answer: str) -> Ids:
    """Returns an encoder's prompt with EOS after it, or a decoder's, whose answer begins with the space."""
    eos = [EOS]
    prompt, written = _prompt(context, family), answer if family == "t5" else f" {answer}"
    source, target = (tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, written))
    return source + (eos if family == "t5" else []), target + eos
