"""What kind of question and what kind of answer, by rule, so that anybody gets the same strata."""

import re
from typing import Literal, get_args

QuestionKind = Literal["who", "what", "when", "where", "why", "which", "how many", "how", "other"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
AnswerKind = Literal["year", "date", "money", "number", "person", "name", "phrase", "clause"]
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

_QUESTION = re.compile(r"\b(how (?:many|much)|who|whom|whose|what|when|where|why|which|how)\b")
_SAME: dict[str, QuestionKind] = {"whom": "who", "whose": "who", "how much": "how many"}
_YEAR = re.compile(r"(?:[12]\d{3})s?(?: ?(?:ad|ce|bc|bce))?", re.IGNORECASE)
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b(?:{_MONTHS})\b|\b\d+(?:st|nd|rd|th) centur(?:y|ies)\b")
_MONEY = re.compile(r"[$£€¥]\s*\d|\b(?:dollars?|pounds?|euros?|cents?|yen)\b", re.IGNORECASE)
_NUMBER_WORD = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion)"
)
_NUMBER = re.compile(rf"\d|\b{_NUMBER_WORD}\b", re.IGNORECASE)
_CLAUSE_WORDS = 6  # a phrase of as many words or more is called a clause
_PERSON_WORDS = (2, 3)


def question_kind(question: str) -> QuestionKind:
    """Returns the first question word, wherever it stands: "In which year" is a "which"."""
    found = _QUESTION.search(question.lower())
    if found is None:
        return "other"
    return next(kind for kind in QUESTION_KINDS if kind == _SAME.get(found[1], found[1]))


def answer_kind(answer: str) -> AnswerKind:
    """Returns the kind of an answer by its characters: two or three capitalised words pass for a person."""
    text = answer.strip()
    if _YEAR.fullmatch(text):
        return "year"
    if _DATE.search(text) and len(text.split()) < _CLAUSE_WORDS:
        return "date"
    if _MONEY.search(text):
        return "money"
    words = text.split()
    if _NUMBER.search(text) and len(words) < _CLAUSE_WORDS:
        return "number"
    if words and all(word[0].isupper() for word in words) and len(words) in _PERSON_WORDS:
        return "person"
    if words and words[0][0].isupper() and len(words) < _CLAUSE_WORDS:
        return "name"
    return "phrase" if len(words) < _CLAUSE_WORDS else "clause"
