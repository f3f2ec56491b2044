"""F1 over characters: for languages that do not write spaces, where the official F1 is exact match in disguise.

It stands beside the official metrics and never in their place: figures of it compare with none that are published as
SQuAD's F1.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from babl.evaluation.squad import gold_texts, questions
from babl.text.normalize import normalize_answer


def f1_characters(dataset: Mapping[str, Any], predictions: Mapping[str, str]) -> float:
    """Returns the mean over questions, in percent, of the best character F1 over a question's gold answers.

    Texts are normalised as the official scripts do, then their spaces are left out, and each character counts as a word
    does in the official F1. A question without an answer scores 1 where the prediction is empty, else 0; one without a
    prediction scores 0.

    Args:
        dataset: A parsed SQuAD file; of its questions, ids and gold texts alone are looked at.
        predictions: Question id -> text.
    """
    scores = []
    for _, qa in questions(dataset):
        prediction = predictions.get(str(qa["id"]))
        golds = gold_texts(qa) or [""]
        scores.append(0.0 if prediction is None else max(_f1(prediction, gold) for gold in golds))
    return 100 * sum(scores) / len(scores)


def _f1(prediction: str, gold: str) -> float:
    predicted, golden = (Counter(normalize_answer(text).replace(" ", "")) for text in (prediction, gold))
    if predicted == golden:
        return 1.0
    same = (predicted & golden).total()
    return 2 * same / (predicted.total() + golden.total())
