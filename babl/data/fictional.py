"""A corpus about a world that nobody can know beforehand, in the format of SQuAD.

Every article describes an invented town and its people. Names are built from syllables, and every word of a name
belongs to one bearer in the whole corpus, so no name of a dev article occurs in training. Every fact's value is drawn
uniformly and independently, so a model without the paragraph can do no better than guess: for a relation with k
values its chance is exactly 1/k, and for a name next to nothing. `chance_exact` gives that level for any part of the
corpus; an answer above it can only come from reading.

Three grades of difficulty, written to each question as `"grade"`:

* `type`: the paragraph has one value of the kind asked for; who asks "which colour" finds the only colour.
* `entity`: two people have a value of that kind, so the name in the question decides. Reading without telling them
  apart gives 1/2.
* `name`: the answer is a name never seen in training, several tokens long, to be copied whole.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from babl.data.squad import Example, parse_squad

GRADES = ("type", "entity", "name")
ENTITY_CANDIDATES = 2  # people in a paragraph of grade `entity` who have a value of the kind asked for

CONSONANTS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
SYLLABLES = tuple(c + v for c in CONSONANTS for v in "aeiou")


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        values: All values, equally likely; empty where the value is a person's name.
        statements: Sentences with {subject} and {value}.
        questions: Questions with {subject}, answered by the value.
        who: Questions with {value}, answered by the subject.
    """

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    who: tuple[str, ...] = ()


TOWN = (
    Relation(
        ("salt", "wool", "honey", "glass", "copper", "timber", "paper", "silk", "barley", "leather"),
        (
            "{subject} lives from the trade in {value}.",
            "Most carts that leave {subject} carry {value}.",
            "For its {value} the town of {subject} is praised.",
            "The merchants of {subject} sell {value}.",
        ),
        (
            "Which good does {subject} sell?",
            "What do the carts from {subject} carry?",
            "What is {subject} praised for?",
        ),
    ),
    Relation(
        ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
        (
            "Every {value} the great fair of {subject} begins.",
            "{subject} holds its great fair in {value}.",
            "In {value} visitors come to the fair at {subject}.",
        ),
        ("In which month is the fair of {subject}?", "When does {subject} hold its fair?"),
    ),
    Relation(
        ("wolf", "heron", "stag", "otter", "falcon", "bear", "hare", "salmon", "badger", "raven"),
        (
            "The banner of {subject} shows a {value}.",
            "A {value} stands on the seal of {subject}.",
            "{subject} has a {value} on its gate.",
        ),
        ("Which animal does the banner of {subject} show?", "What animal stands for {subject}?"),
    ),
    Relation(
        (),
        (
            "The town of {subject} was founded by {value}.",
            "{value} laid the first stone of {subject}.",
            "It was {value} who founded {subject}.",
        ),
        ("Who founded {subject}?", "Who laid the first stone of {subject}?"),
    ),
)

PERSON = (
    Relation(
        ("baker", "miller", "weaver", "smith", "potter", "tanner", "mason", "cooper", "fisher", "tailor"),
        (
            "{subject} works as a {value}.",
            "By trade {subject} is a {value}.",
            "As a {value} {subject} is known to all.",
            "The best {value} of the valley is {subject}.",
        ),
        (
            "What is the trade of {subject}?",
            "What does {subject} work as?",
            "Which trade does {subject} follow?",
        ),
        ("Who works as a {value}?", "Who is the {value}?"),
    ),
    Relation(
        ("red", "blue", "green", "yellow", "white", "black", "brown", "purple", "golden", "grey"),
        (
            "{subject} wears a {value} coat.",
            "The coat of {subject} is {value}.",
            "A {value} coat belongs to {subject}.",
            "One sees {subject} in a {value} coat.",
        ),
        (
            "What colour is the coat of {subject}?",
            "Which colour does {subject} wear?",
            "In which colour does one see {subject}?",
        ),
        ("Who wears a {value} coat?", "To whom does the {value} coat belong?"),
    ),
    Relation(
        ("flute", "drum", "harp", "fiddle", "horn", "lute", "bell", "pipe", "organ", "trumpet"),
        (
            "{subject} plays the {value}.",
            "On the {value} {subject} has no equal.",
            "In the evening {subject} practises the {value}.",
        ),
        ("Which instrument does {subject} play?", "What does {subject} practise?"),
        ("Who plays the {value}?", "Who practises the {value}?"),
    ),
    Relation(
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        (
            "{subject} comes to the market on {value}.",
            "On {value} the stall of {subject} is open.",
            "Each {value} {subject} goes to the market.",
        ),
        ("On which day does {subject} come to the market?", "Which day is the stall of {subject} open?"),
        ("Who comes to the market on {value}?", "Whose stall is open on {value}?"),
    ),
    Relation(
        (),
        (
            "{subject} learned everything from {value}.",
            "The teacher of {subject} was {value}.",
            "{value} taught {subject} for years.",
        ),
        ("Who taught {subject}?", "Who was the teacher of {subject}?", "From whom did {subject} learn?"),
    ),
)

DISTRACTORS = (
    "The road is steep and narrow.",
    "Snow falls early in the hills.",
    "Travellers rest under the old oak.",
    "The river is crossed by a wooden bridge.",
    "Nobody remembers a warmer summer.",
    "Smoke rises from the chimneys at noon.",
    "The well in the square never runs dry.",
    "Children play behind the church.",
)


NAME_SYLLABLES = 3
PAIRS = 4  # paragraphs about two people to an article, besides one about the town and one about one person
DISTRACTED = 0.5  # share of the paragraphs with a sentence that answers nothing


class Names:
    """Invented words, none given twice."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.given: set[str] = set()

    def new(self) -> str:
        """Returns a name nobody bears yet."""
        while True:
            name = "".join(self.rng.choice(SYLLABLES) for _ in range(NAME_SYLLABLES)).capitalize()
            if name not in self.given:
                self.given.add(name)
                return name


@dataclass(frozen=True)
class Fact:
    """One statement of a paragraph: of whom, which relation, which value, and how hard it is to find."""

    subject: str
    relation: Relation
    value: str
    grade: str


def town_facts(town: str, names: Names, rng: random.Random) -> list[Fact]:
    """Returns all facts of a town, the last one its founder's name."""
    *plain, founder = TOWN
    facts = [Fact(town, relation, rng.choice(relation.values), "type") for relation in plain]
    return [*facts, Fact(town, founder, names.new(), "name")]


def portrait_facts(names: Names, rng: random.Random) -> list[Fact]:
    """Returns two facts about one person and the name of the teacher."""
    *plain, teacher = PERSON
    person = names.new()
    facts = [Fact(person, relation, rng.choice(relation.values), "type") for relation in rng.sample(plain, 2)]
    return [*facts, Fact(person, teacher, names.new(), "name")]


def pair_facts(names: Names, rng: random.Random) -> list[Fact]:
    """Returns the same kind of fact about two people, with different values."""
    *plain, _ = PERSON
    relation = rng.choice(plain)
    values = rng.sample(relation.values, ENTITY_CANDIDATES)
    return [Fact(names.new(), relation, value, "entity") for value in values]


def paragraph(facts: list[Fact], rng: random.Random, next_id: Iterator[int], unanswerable: float) -> dict[str, Any]:
    """Returns a paragraph of the facts, perhaps a distractor, in random order, with a question about each fact.

    Args:
        facts: What it states.
        rng: Chooses the templates and the order.
        next_id: Numbers the questions.
        unanswerable: Share of questions to be made about something the paragraph does not say.
    """
    order: list[Fact | None] = [*facts, None] if rng.random() < DISTRACTED else [*facts]
    rng.shuffle(order)
    context = ""
    starts: dict[Fact, tuple[int, int]] = {}  # of the value and of the subject
    for fact in order:
        if context:
            context += " "
        if fact is None:
            context += rng.choice(DISTRACTORS)
            continue
        sentence = rng.choice(fact.relation.statements)
        at = len(context)
        context += sentence.format(subject=fact.subject, value=fact.value)
        starts[fact] = context.index(fact.value, at), context.index(fact.subject, at)
    asked = [(fact, False) for fact in facts] + [(fact, True) for fact in facts if fact.grade == "entity"]
    said = {(fact.subject, fact.relation) for fact in facts}
    relations = TOWN if facts[0].relation in TOWN else PERSON
    unsaid = [(fact.subject, r) for fact in facts for r in relations if (fact.subject, r) not in said]
    questions = []
    for fact, who in asked:
        subject, relation = fact.subject, fact.relation
        text = rng.choice(relation.who if who else relation.questions).format(subject=subject, value=fact.value)
        answers = [{"text": subject if who else fact.value, "answer_start": starts[fact][who]}]
        impossible = bool(unsaid) and rng.random() < unanswerable
        if impossible:
            subject, relation = rng.choice(unsaid)
            text, answers = rng.choice(relation.questions).format(subject=subject), []
        grade = "name" if who else fact.grade
        question = {"id": f"fictional-{next(next_id):06d}", "question": text, "answers": answers, "grade": grade}
        questions.append(question | {"is_impossible": impossible} if unanswerable else question)
    return {"context": context, "qas": questions}


def fictional_corpus(
    train_articles: int, dev_articles: int, seed: int = 0, unanswerable: float = 0.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a training and a dev set that share no title and no name, as parsed SQuAD files.

    Args:
        train_articles: Articles to train on, 23 questions each.
        dev_articles: Articles held out.
        seed: Same seed, same corpus.
        unanswerable: Share of the questions that ask for something unsaid; above 0 the files are of version 2.0.
    """
    rng = random.Random(seed)
    names, next_id = Names(rng), itertools.count()

    def articles(number: int) -> list[dict[str, Any]]:
        made = []
        for _ in range(number):
            town = names.new()
            facts = [town_facts(town, names, rng), portrait_facts(names, rng)]
            facts += [pair_facts(names, rng) for _ in range(PAIRS)]
            made.append({"title": town, "paragraphs": [paragraph(f, rng, next_id, unanswerable) for f in facts]})
        return made

    version = "v2.0" if unanswerable else "1.1"
    return (
        {"version": version, "data": articles(train_articles)},
        {"version": version, "data": articles(dev_articles)},
    )


def fictional_examples(seed: int) -> tuple[list[Example], list[Example]]:
    """Returns a training and a dev set of a size for trying things out."""
    train, dev = fictional_corpus(200, 8, seed)
    return parse_squad(train, "fictional"), parse_squad(dev, "fictional")


_CHANCE = {value: 1 / len(relation.values) for relation in (*TOWN, *PERSON) for value in relation.values}


def chance_exact(answers: Iterable[str]) -> float:
    """Returns the exact match in percent, by expectation, of the best guess without the paragraph.

    Args:
        answers: The gold answers of the questions, all answerable.
    """
    levels = [_CHANCE.get(answer, len(SYLLABLES) ** -NAME_SYLLABLES) for answer in answers]
    return 100 * sum(levels) / len(levels)
