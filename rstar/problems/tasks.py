"""Multiple-choice and short-answer tasks (Orca 2's evaluation): hub ids and field maps, in one table.

A field map turns a record into {question, answer}: choices become lines "A. ...", and the answer a letter. A record
that has a question and an answer already, and none of the map's own fields, is left as it is: local files may hold
either. Ids and fields are from the data sets' cards and are not tried here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Record = Mapping[str, object]
Form = Callable[[Record], Record]

LETTERS = "ABCDEFGHIJ"


def multiple_choice(question: str, choices: str, answer: str, *, context: str = "") -> Form:
    """Field map of a multiple-choice record.

    Args:
        question, context: Fields of the texts.
        choices: Field of the choices: a list of texts, or a mapping with `text` and `label` (ARC).
        answer: Field of the right one: its place from 0 (a number, also as text), its label, or its letter.
    """

    def form(record: Record) -> Record:
        if choices not in record:
            return record
        given = record[choices]
        texts, labels = (given["text"], given["label"]) if isinstance(given, Mapping) else (given, None)
        assert isinstance(texts, Sequence)
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        asked = [str(record[name]) for name in (context, question) if name and record.get(name)]
        letter = LETTERS[_place(record[answer], labels)]
        return {**_identity(record), "question": "\n".join([*asked, *lines]), "answer": letter}

    return form


def _place(answer: object, labels: object) -> int:
    if isinstance(labels, Sequence) and not isinstance(labels, str) and answer in labels:
        return list(labels).index(answer)
    text = str(answer).strip()
    return int(text) if text.isdigit() else LETTERS.index(text)


def short_answer(question: str, answer: str, *, context: str = "") -> Form:
    """Field map of a record whose answer is a few words; the first of several accepted ones counts."""

    def form(record: Record) -> Record:
        if answer not in record:
            return record
        found = record[answer]
        if isinstance(found, Mapping):  # DROP: {spans: [...], types: [...]}
            found = found.get("spans", "")
        if isinstance(found, Sequence) and not isinstance(found, str):
            found = found[0] if found else ""
        asked = [str(record[name]) for name in (context, question) if name and record.get(name)]
        return {**_identity(record), "question": "\n".join(asked), "answer": found}

    return form


def last_word(text: str) -> Form:
    """Field map of LAMBADA: the last word of a passage is the answer."""

    def form(record: Record) -> Record:
        if text not in record:
            return record
        passage, _, word = str(record[text]).strip().rpartition(" ")
        asked = f"{passage}\nWhich single word comes next? State it as the answer."
        return {**_identity(record), "question": asked, "answer": word}

    return form


def _identity(record: Record) -> dict[str, object]:
    return {name: record[name] for name in ("id", "index", "level", "category") if name in record}


BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip

TASKS: dict[str, tuple[str, str, int, tuple[str, ...], Form]] = {
    "arc-easy": ("allenai/ai2_arc", "test", 2376, ("ARC-Easy",), multiple_choice("question", "choices", "answerKey")),
    "arc-challenge": (
        "allenai/ai2_arc", "test", 1172, ("ARC-Challenge",), multiple_choice("question", "choices", "answerKey"),
    ),
    "mmlu": ("cais/mmlu", "test", 14042, ("all",), multiple_choice("question", "choices", "answer")),
    "race": (
        "ehovy/race", "test", 4934, ("all",), multiple_choice("question", "options", "answer", context="article"),
    ),
    "hellaswag": ("Rowan/hellaswag", "validation", 10042, ("",), multiple_choice("ctx", "endings", "label")),
    "agieval": ("", "test", 3546, ("",), multiple_choice("question", "options", "label", context="passage")),
    "crass": ("", "test", 274, ("",), multiple_choice("question", "choices", "answer", context="premise")),
    "bbh": ("lukaemon/bbh", "test", 6511, BBH, short_answer("input", "target")),
    "drop": ("ucinlp/drop", "validation", 9535, ("",), short_answer("question", "answers_spans", context="passage")),
    "lambada": ("EleutherAI/lambada_openai", "test", 5153, ("en",), last_word("text")),
    "flan": ("Muennighoff/flan", "train", 0, ("",), short_answer("inputs", "targets")),
}  # fmt: skip
"""name -> (hub id, "" where a local file is needed; split; records; configurations; field map)."""
