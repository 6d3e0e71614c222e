"""Local files (jsonl, json, csv, parquet) -> Problem, with every complaint naming file and line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rstar.grading import is_equivalent_fast, reference_answer
from rstar.problems.agreement import agreeing_answer
from rstar.types import Problem, UserError

SYNTHETIC = "synthetic"
"""`source` of problems whose reference answer is what several attempts agree on."""

MAX_LINE_BYTES = 4 * 2**20
MAX_JSON_BYTES = 2**30
_BROKEN_ESCAPES = re.compile(r"\t(?=frac|ext|imes|heta|an\b|o\b)|\f(?=rac|box)|\x08(?=oxed|egin|ar)")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # JSON can hold them, UTF-8 can not
_RESTORED = {"\t": "\\t", "\f": "\\f", "\x08": "\\b"}


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields. Further names are tried where the first is absent."""

    question: str = "question"
    answer: str = "answer"
    more_questions: tuple[str, ...] = ()
    more_answers: tuple[str, ...] = ()
    level: str = "level"
    solution: str = "solution"
    category: str = ""
    answers: str = ""  # field with several attempts' answers or solutions; only synthetic problems have it
    min_agreement: int = 3


def read_problems(
    path: Path,
    fields: Fields,
    source: str,
    form: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda record: record,
) -> list[Problem]:
    """All problems of a file in order; `form` makes a record one with the named fields.

    Ids come from `id`, `unique_id` or `index`, else from the position.

    Raises UserError (missing, empty, not UTF-8, broken, a record without question or answer), naming file:line.
    """
    records = enumerate(read_records(path))
    problems = []
    for number, (where, record) in records:
        try:
            problems.append(to_problem(form(record), fields, source, number, where))
        except RecursionError as error:
            raise UserError(f"{where} is nested too deeply", need="texts for question and answer") from error
    if not problems:
        raise UserError(f"{path} holds no records", need="at least one problem")
    return problems


def read_records(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(place for complaints, record) of a file. Raises UserError where it is missing, of an unknown kind or broken."""
    if not path.is_file():
        raise UserError(f"no file {path}", need="json, jsonl, csv or parquet with questions and answers")
    rows = _ROWS.get(path.suffix.lower())
    if rows is None:
        raise UserError(f"{path} has an unknown kind", need=f"one of {', '.join(sorted(_ROWS))}")
    yield from rows(path)


def to_problem(record: Mapping[str, object], fields: Fields, source: str, number: int, where: str) -> Problem:
    """One record as a Problem; `where` names it in complaints.

    An answer in GSM8K's form ("... #### n"), a worked solution with \\boxed{} or prose that states one is cut to its
    final answer and kept whole as the solution. A list of answers becomes "a, b" (all of them, in any order). A record
    with `fields.answers` is synthetic: its answer is the one that enough of them agree on, and that its own answer,
    where it has one, agrees with; "" where there is none.
    """
    question = _text(_first(record, (fields.question, *fields.more_questions), where, "question"))
    if fields.answers and record.get(fields.answers):
        return _synthetic(record, fields, question.strip(), source, number, where)
    answer = _text(_first(record, (fields.answer, *fields.more_answers), where, "answer"))
    solution = _text(record.get(fields.solution)) if fields.solution != fields.question else ""
    if not question.strip():
        raise UserError(f"{where} has no question", need=f"text in its field {fields.question!r}")
    final = reference_answer(answer)
    if final != answer.strip():
        solution = solution or answer
    if not final:
        raise UserError(f"{where} has no answer", need=f"a final answer in its field {fields.answer!r}")
    return Problem(
        _ident(record, source, number),
        question.strip(),
        final,
        source,
        _level(record, fields),
        solution,
        _text(record.get(fields.category)),
    )


def _synthetic(
    record: Mapping[str, object], fields: Fields, question: str, source: str, number: int, where: str
) -> Problem:
    attempts = record[fields.answers]
    if not isinstance(attempts, list | tuple) or not question:
        raise UserError(f"{where} is no synthetic problem", need=f"a question, and a list in {fields.answers!r}")
    agreed = agreeing_answer([reference_answer(_text(one)) for one in attempts], fields.min_agreement) or ""
    own = reference_answer(_text(record.get(fields.answer)))
    if own and not is_equivalent_fast(agreed, own):
        agreed = ""
    category = _text(record.get(fields.category))
    return Problem(
        _ident(record, source, number), question, agreed, SYNTHETIC, _level(record, fields), category=category
    )


def _ident(record: Mapping[str, object], source: str, number: int) -> str:
    name = next((record[k] for k in ("id", "unique_id", "index") if record.get(k) not in (None, "")), None)
    return _text(name) if isinstance(name, str) else f"{source}/{number if name is None else _text(name)}"


def _level(record: Mapping[str, object], fields: Fields) -> str:
    return _text(record.get(fields.level)).removeprefix("Level ")


def _first(record: Mapping[str, object], names: Sequence[str], where: str, what: str) -> object:
    for name in names:
        if name in record:
            return record[name]
    have = ", ".join(map(str, record)) or "none"
    raise UserError(f"{where} has no {what}: no field {names[0]!r} among {have}", how=f"set problems.{what}=FIELD")


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    text = value if isinstance(value, str) else str(value)
    text = _HALF_CHARACTERS.sub("\ufffd", text)
    # JSON written without doubling its backslashes turns \tfrac into a tab and "frac"; no answer means a tab there.
    return _BROKEN_ESCAPES.sub(lambda m: _RESTORED[m.group()], text)


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}", need="an object with question and answer")
    return value


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start})", how="convert the file with iconv") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):  # bytes: U+2028 inside a text ends no line
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB", need="one problem a line")
            text = _decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where).strip("\r\n \t")
            if not text:
                continue
            yield where, _mapping(_loads(text, where), where)


def _loads(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply", need="an object with question and answer") from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 30} GiB", how="write it as jsonl")
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    _check_lines(path, raw)
    if not raw.strip():
        return
    data = _loads(raw.decode("utf-8"), str(path))
    if isinstance(data, dict):
        data = next((value for value in data.values() if isinstance(value, list)), None)
    if not isinstance(data, list):
        raise UserError(f"{path} holds no list of records", need="[{...}, {...}]")
    for number, record in enumerate(data, 1):
        where = f"{path} (record {number})"
        yield where, _mapping(record, where)


def _check_lines(path: Path, raw: bytes) -> None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8", how="convert the file with iconv") from error


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    _check_lines(path, path.read_bytes())
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield f"{path}:{rows.line_num}", {str(k): v for k, v in row.items() if k is not None}
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num} is not csv: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # heavy, and only for this kind of file

    try:
        for number, record in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path} (record {number})", record
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


_ROWS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
