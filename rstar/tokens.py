"""Everything about tokenizers: loading and checking them, wrapping a question, prompts as token ids.

A prompt is tokenised segment by segment (SegmentEncoder), so that the ids of a path are a prefix of the ids of every
continuation. Engines and trainers share this one encoder; that is what makes their ids equal.

`transformers` is imported where a tokenizer is loaded, not here: importing this module costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rstar.config import ModelSection, read_yaml
from rstar.prompts import SLM_TEMPLATE
from rstar.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CACHED_SEGMENTS = 65536


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or a hub id. Raises UserError when there is none to load."""
    from transformers import AutoTokenizer

    name = str(path_or_id)
    if _is_folder_name(name):
        _check_has_tokenizer(Path(name))
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:  # transformers' way to say "no such model" and "not a tokenizer"
        raise UserError(
            f"no tokenizer could be loaded from {name}: {_first_line(error)}",
            need="a model folder or a hub id",
            how="check model.base; without network, give a local folder",
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, template: str = "chat", name: str = "") -> None:
    """Raise UserError unless `tokenizer` has an end token and what `template` needs. Nothing here pads."""
    name = name or str(tokenizer.name_or_path) or "the model"
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end token",
            need="eos_token",
            how='set "eos_token" in its tokenizer_config.json',
        )
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template",
            need="one, because model.template is chat",
            how="set model.template=slm, or a text with {question}",
        )


def check_model_folder(path: str | Path) -> None:
    """Raise UserError unless a model folder is whole: config, tokenizer, every shard there and not cut short.

    Reads the shards' headers only, so a broken copy of a big model is found in milliseconds.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}", need="a folder with config.json", how="check model.base")
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} has no config.json", need="a whole model folder", how="copy or download it again")
    _read_json(config)
    _check_has_tokenizer(folder)
    for shard in _shards(folder):
        _check_shard(shard)


def wrap_question(
    tokenizer: PreTrainedTokenizerBase | None,
    question: str,
    *,
    template: str = "chat",
    system: str = "",
    few_shot: Sequence[tuple[str, str]] = (),
) -> str:
    """The text before the first step.

    Args:
        tokenizer: Its chat template is used where `template` is "chat"; otherwise it is not read.
        question: The problem as text; never interpreted as a template.
        template: "chat", "slm" (rStar-Math's own prompt), or a text that holds `{question}`.
        system: System message; where the template is a text, its first paragraph.
        few_shot: (question, worked solution in the step format) pairs, put before as earlier turns.
    """
    if template != "chat":
        form = SLM_TEMPLATE if template == "slm" else template
        if "{question}" not in form:
            raise UserError(f"model.template {template!r}", need="chat, slm, or a text with {question}")
        turns = [form.replace("{question}", q) + solution.rstrip("\n") + "\n\n" for q, solution in few_shot]
        return "".join([f"{system}\n\n" if system else "", *turns, form.replace("{question}", question)])
    messages = [{"role": "system", "content": system}] if system else []
    for earlier, solution in few_shot:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": solution}]
    messages.append({"role": "user", "content": question})
    from jinja2 import TemplateError

    assert tokenizer is not None, "a chat template needs its tokenizer"
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"the chat template refused the prompt: {_first_line(error)}",
            need="a chat template that takes these roles",
            how="set model.system= (empty) if it has no system role, or model.template=slm",
        ) from error


def question_wrapper(path_or_id: str | Path, section: ModelSection, *, key: str = "model") -> Callable[[str], str]:
    """`wrap_question` with everything but the question fixed by the config; loads the tokenizer where it is needed.

    Raises UserError where the tokenizer, the template or the few-shot file cannot serve. `key`: of the section.
    """
    few_shot = load_few_shot(section.few_shot) if section.few_shot else ()
    if section.template != "chat":
        return lambda question: wrap_question(
            None, question, template=section.template, system=section.system, few_shot=few_shot
        )
    if not str(path_or_id):
        raise UserError(
            f"{key}.template=chat without a model", need="a tokenizer", how=f"set {key}.base, or {key}.template=slm"
        )
    tokenizer = load_tokenizer(path_or_id)
    check_tokenizer(tokenizer, name=str(path_or_id))
    return lambda question: wrap_question(tokenizer, question, system=section.system, few_shot=few_shot)


def load_few_shot(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Read worked examples: a YAML list of `question:`, `solution:` mappings, solutions in the step format.

    A path that is not there is looked for in the checkout as well: our own configs name theirs from its root.
    """
    if not Path(path).is_file() and (ours := Path(__file__).parent.parent / path).is_file():
        path = ours
    if not Path(path).is_file():
        raise UserError(
            f"no few-shot file {path}", need="a YAML list of question, solution", how="check model.few_shot"
        )
    wrong = UserError(f"{path} is no list of worked examples", need="entries with the texts question and solution")
    entries = read_yaml(Path(path))
    if not isinstance(entries, list):
        raise wrong
    examples = []
    for entry in entries:
        question, solution = (entry.get("question"), entry.get("solution")) if isinstance(entry, dict) else (None, None)
        if not isinstance(question, str) or not isinstance(solution, str):
            raise wrong
        examples.append((question, solution))
    return tuple(examples)


@dataclass(frozen=True)
class EncodedSegments:
    """Token ids of a prompt and the end offset of each segment in them; `ends[-1] == len(ids)`."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]


class SegmentEncoder:
    """Segments to token ids, each segment by itself, so that ids never change when text is appended.

    The first segment gets the begin token where the tokenizer would add one and the text does not start with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._bos = begin_token(tokenizer)
        puts_space = self._ids("a") != self._ids("\na")[len(self._ids("\n")) :]
        self._border = "\n" if puts_space else None
        self._segment_ids = lru_cache(maxsize=_CACHED_SEGMENTS)(self._tokenise)

    def encode(self, segments: Iterable[str]) -> list[int]:
        """Ids of the concatenated segments."""
        return list(self.encode_with_borders(segments).ids)

    def encode_with_borders(self, segments: Iterable[str]) -> EncodedSegments:
        """Ids of the concatenated segments and where each segment ends."""
        ids: list[int] = []
        ends: list[int] = []
        for i, segment in enumerate(segments):
            own = self._segment_ids(segment, i == 0)
            if i == 0 and self._bos is not None and own[:1] != (self._bos,):
                ids.append(self._bos)
            ids.extend(own)
            ends.append(len(ids))
        return EncodedSegments(tuple(ids), tuple(ends))

    def within(self, text: str) -> tuple[int, ...]:
        """Ids of a text that goes on where another one ended."""
        return self._segment_ids(text, False)

    def _tokenise(self, text: str, first: bool) -> tuple[int, ...]:
        """Some tokenizers (Llama 2, Phi-3) put a space before every text that they are given: not within a solution."""
        if not first and self._border is not None:
            behind = self._ids(self._border + text)
            before = self._ids(self._border)
            if behind[: len(before)] == before:
                return behind[len(before) :]
        return self._ids(text)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class TextStream:
    """Generated ids to text, one id at a time; `text` grows only by whole characters.

    Equals decoding all ids at once: a few ids before the new ones go with them, because some tokenizers drop the space
    that begins a text, and ids that end within a character wait for its other bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = (), text: str = "") -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-4:])
        self._context = len(self._window)  # ids of the window whose text is out already
        self._shown = self._decode(self._window)

    def push(self, token: int) -> None:
        """Add one generated id."""
        self._window.append(token)
        decoded = self._decode(self._window)
        if not decoded.endswith("\ufffd"):
            self._emit(decoded)

    def finish(self) -> None:
        """No more ids: what still waits is shown as it is."""
        if len(self._window) > self._context:
            self._emit(self._decode(self._window))

    def _emit(self, decoded: str) -> None:
        self.text += decoded[len(self._shown) :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._shown = self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the begin token where the tokenizer puts one before every text; None where it puts none."""
    ids = tokenizer("a")["input_ids"]
    return cast(int, ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


def _is_folder_name(name: str) -> bool:
    return Path(name).is_dir() or name.startswith(("/", "./", "../", "~"))


def _check_has_tokenizer(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}", need="a folder with config.json", how="check model.base")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer",
            need=f"one of {', '.join(_TOKENIZER_FILES)}",
            how="copy the base model's tokenizer files there",
        )


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} lists no weights", need="a weight_map", how="copy or download the model again")
        return [folder / str(name) for name in sorted(set(weight_map.values()))]
    return [folder / "model.safetensors"]


def _check_shard(shard: Path) -> None:
    """The header can be read, and the file ends where it says."""
    from safetensors import SafetensorError, safe_open

    again = "copy or download the model again"
    if not shard.is_file():
        raise UserError(f"{shard.parent} has no {shard.name}", need="every shard of the model", how=again)
    try:
        with safe_open(shard, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard} is damaged: {error}", need="a whole safetensors file", how=again) from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", need="a whole file", how="copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", need="a whole file", how="copy or download it again")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
