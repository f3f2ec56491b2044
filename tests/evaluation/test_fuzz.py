"""The scorer against a second statement of the rules, which looks at single characters and knows no regular expression.

The rules, once more: letters become small, one by one as Python's `lower` does it. The 32 marks of ASCII punctuation
vanish. Of what then stands between two places where letters, digits and the like meet anything else, the words a, an
and the become a space. What any whitespace parts are the tokens. Two texts match exactly where their tokens are the
same; F1 is the harmonic mean of the shares of tokens they have in common, each token counted as often as both have it.
A question's score is the best over its golds, for either measure on its own. Version 2.0 first drops golds without
tokens, takes no gold for one gold without tokens, and gives F1 1 to two texts without tokens, where 1.1 gives 0.
"""

import random

import pytest

from babl.evaluation.squad import exact_match, f1, question_scores, score

PAIRS = 10_000
PUNCTUATION = {chr(c) for low, high in ((33, 47), (58, 64), (91, 96), (123, 126)) for c in range(low, high + 1)}
PIECES = [
    *("a", "an", "the", "A", "An", "THE", "The", "tHe", "than", "thean", "ana"),
    *(
        "cat",
        "Cat",
        "new",
        "York",
        "red",
        "car",
        "x",
        "İ",
        "ß",
        "ΣΑΣ",
        "ﬁ",
        "½",
        "²",
        "Ｆｕｌｌ",
        "é",
        "e\u0301",
        "a\u0300",
    ),
    *("1", "1.5", "1,000", "-5", "٣", "१२", "Ⅷ", "_", "__", "日本", "ا", "ال", "\u0301", "\u20dd", "\ud800"),
    *PUNCTUATION,
    *("“", "’", "…", "–", "−", "£", "€", "¿", "、"),
    *(" ", " ", " ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003"),
    *("\u2009", "\u2028", "\u3000", "\u200b", "\ufeff", "\u200d", "\u2060", "\x00", "\xad"),
]


def tokens(text):
    kept = [c for c in text.lower() if c not in PUNCTUATION]
    runs = []  # of characters that words are made of, and of others
    for c in kept:
        inside = c.isalnum() or c == "_"
        if runs and runs[-1][0] == inside:
            runs[-1][1].append(c)
        else:
            runs.append((inside, [c]))
    spaced = "".join(" " if "".join(run) in ("a", "an", "the") else "".join(run) for _, run in runs)
    words = [""]
    for c in spaced:
        if c.isspace():
            words.append("")
        else:
            words[-1] += c
    return [word for word in words if word]


def overlap(predicted, gold, version):
    if version == "2.0" and (predicted == [] or gold == []):
        return 1.0 if predicted == gold else 0.0
    left, common = list(gold), 0
    for token in predicted:
        if token in left:
            left.remove(token)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def expected(golds, prediction, version):
    wanted, predicted = [tokens(gold) for gold in golds], tokens(prediction)
    if version == "2.0":
        wanted = [gold for gold in wanted if gold] or [[]]
    exact = 1.0 if any(gold == predicted for gold in wanted) else 0.0
    return exact, max(overlap(predicted, gold, version) for gold in wanted)


def text(rng):
    pieces = [rng.choice(PIECES) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 6, 9)))]
    if pieces and rng.random() < 0.3:
        pieces += rng.choices(pieces, k=rng.randint(1, 4))
    return rng.choice(("", " ", " ")).join(pieces)


def near(rng, words):
    """The text with something put in, taken out, moved or dressed up."""
    pieces = words.split(" ")
    for _ in range(rng.randint(0, 2)):
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(PIECES))
    if rng.random() < 0.3:
        del pieces[rng.randrange(len(pieces))]
    if rng.random() < 0.3:
        rng.shuffle(pieces)
    words = rng.choice((" ", " ", "\xa0", " the ", "-", "\u3000")).join(pieces)
    return rng.choice((words, words, words.upper(), words.title(), f"“{words}”", f"({words}),", f"The {words}."))


def draw(version):
    """Returns PAIRS of golds and prediction; predictions stay near to a gold, so that scores take every value."""
    rng = random.Random(f"fuzz {version}")
    pairs = []
    for _ in range(PAIRS):
        golds = [text(rng) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
        if rng.random() < 0.5:
            golds[-1] = near(rng, golds[0])
        if rng.random() < 0.1:
            golds.append(golds[0])
        if version == "2.0" and rng.random() < 0.2:
            golds = []
        prediction = near(rng, rng.choice(golds)) if golds and rng.random() < 0.7 else text(rng)
        pairs.append((golds, prediction))
    return pairs


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_ten_thousand_random_pairs_to_the_last_bit(version):
    pairs = draw(version)
    qas = [{"id": str(i), "answers": [{"text": gold} for gold in golds]} for i, (golds, _) in enumerate(pairs)]
    data = {"data": [{"paragraphs": [{"qas": qas}]}]}
    predictions = {str(i): prediction for i, (_, prediction) in enumerate(pairs)}
    want = [expected(golds, prediction, version) for golds, prediction in pairs]

    found = question_scores(data, predictions, version)
    for (golds, prediction), pair, got in zip(pairs, want, found.values(), strict=True):
        assert (got.exact, got.f1, got.has_answer) == (*pair, bool(golds)), (golds, prediction)

    def means(prefix, exact, kept):
        columns = zip(*(pair for pair, (golds, _) in zip(want, pairs, strict=True) if kept(golds)), strict=True)
        (first, second), total = ([100.0 * sum(c) / len(c) for c in columns], sum(kept(golds) for golds, _ in pairs))
        return {f"{prefix}{exact}": first, f"{prefix}f1": second, f"{prefix}total": total}

    if version == "1.1":
        assert score(data, predictions, version=version) == means("", "exact_match", lambda golds: True)
    else:
        whole = means("", "exact", lambda golds: True)
        parts = means("HasAns_", "exact", bool) | means("NoAns_", "exact", lambda golds: not golds)
        assert score(data, predictions, version=version) == whole | parts


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_single_pairs_are_scored_as_in_a_data_set(version):
    for golds, prediction in draw(version)[:1000]:
        for gold in golds:
            assert exact_match(prediction, gold) == float(tokens(prediction) == tokens(gold))
            assert f1(prediction, gold, version) == overlap(tokens(prediction), tokens(gold), version)


def test_the_pairs_are_rich():
    """A fuzz that only ever met scores of nought would prove little."""
    scores = [expected(golds, prediction, "2.0") for golds, prediction in draw("2.0")]
    assert 1500 < sum(exact for exact, _ in scores) < 8500
    assert len({overlap for _, overlap in scores}) > 40
    empty = [(golds, prediction) for golds, prediction in draw("1.1") if prediction and not tokens(prediction)]
    assert len(empty) > 200
    mixed = [golds for golds, _ in draw("1.1") if len({bool(tokens(gold)) for gold in golds}) == 2]
    assert len(mixed) > 200
