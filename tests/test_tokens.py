"""Tokenizer checks, prompts, segment borders, and broken model folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rstar import prompts
from rstar.config import ModelSection
from rstar.tokens import (
    SegmentEncoder,
    TextStream,
    begin_token,
    check_model_folder,
    check_tokenizer,
    load_few_shot,
    load_tokenizer,
    question_wrapper,
    wrap_question,
)
from rstar.types import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


@pytest.fixture()
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


class WithBegin:
    """The same tokenizer, but one that puts its begin token before every text, as Llama's does."""

    def __init__(self, tokenizer) -> None:
        self.inner = tokenizer
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = self.inner(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def test_importing_the_module_loads_neither_torch_nor_transformers():
    code = "import sys, rstar.tokens; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=100)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=20))
def test_ids_of_a_path_are_a_prefix_of_the_ids_of_its_continuation(tokenizer, segments, more):
    encoder = SegmentEncoder(tokenizer)
    ids = encoder.encode(segments)
    assert encoder.encode([*segments, more])[: len(ids)] == ids


def test_borders_are_the_ends_of_the_segments_and_the_ids_decode_to_the_text(tokenizer):
    segments = ["What is 1 + 1?\n", "<code>\n", "x = 1 + 1\n<end_of_step>\n", ""]
    encoded = SegmentEncoder(tokenizer).encode_with_borders(segments)
    starts = (0, *encoded.ends[:-1])
    pieces = [tokenizer.decode(list(encoded.ids[a:b])) for a, b in zip(starts, encoded.ends, strict=True)]
    assert pieces == segments
    assert encoded.ends[-1] == len(encoded.ids)


@settings(max_examples=100)
@given(st.text(max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_streamed_text_equals_decoding_all_ids_at_once(tokenizer, text, noise):
    ids = tokenizer("é∑" + text, add_special_tokens=False)["input_ids"] + noise
    stream = TextStream(tokenizer, tokenizer("prompt: ", add_special_tokens=False)["input_ids"])
    for token in ids:
        stream.push(token)
        assert not stream.text.endswith("\ufffd")
    stream.finish()
    assert stream.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_begin_token_goes_before_the_first_segment_only_and_never_twice(tokenizer):
    begins = WithBegin(tokenizer)
    assert begin_token(begins) == tokenizer.bos_token_id
    assert begin_token(tokenizer) is None
    encoder = SegmentEncoder(begins)
    once = encoder.encode(["a", "b"])
    assert once[0] == tokenizer.bos_token_id and once.count(tokenizer.bos_token_id) == 1
    assert encoder.encode([tokenizer.bos_token + "a", "b"]) == once
    assert SegmentEncoder(tokenizer).encode(["a", "b"]) == once[1:]
    assert encoder.encode_with_borders(["a", "b"]).ends == (2, 3)


def test_chat_template_wraps_system_few_shot_and_question_in_this_order(tokenizer):
    text = wrap_question(tokenizer, "Q2", system="S", few_shot=[("Q1", "<code>\nA1")])
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<code>\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_slm_and_own_templates_take_a_question_with_braces(tokenizer):
    question = r"Simplify $\frac{a}{b}$ {x}"
    slm = wrap_question(tokenizer, question, template="slm")
    assert slm == prompts.SLM_TEMPLATE.replace("{question}", question)
    own = wrap_question(tokenizer, question, template="Q: {question}\nA: {}", few_shot=[("1+1 {question}?", "2\n")])
    assert own == "Q: 1+1 {question}?\nA: {}2\n\nQ: " + question + "\nA: {}"


def test_question_wrapper_takes_everything_from_the_config(tiny_model: Path, tmp_path: Path):
    examples = tmp_path / "examples.yaml"
    examples.write_text("- question: Q1\n  solution: |\n    <code>\n    A1\n")
    section = ModelSection(base="x", system="S", few_shot=str(examples))
    chat = question_wrapper(tiny_model, section)("Q2")
    assert chat == wrap_question(load_tokenizer(tiny_model), "Q2", system="S", few_shot=[("Q1", "<code>\nA1\n")])
    slm = question_wrapper("", dataclasses.replace(section, template="slm"))("Q2")
    assert slm == wrap_question(None, "Q2", template="slm", system="S", few_shot=[("Q1", "<code>\nA1\n")])
    assert slm.startswith("S\n\n<|user|>:\nQ1")
    with pytest.raises(UserError, match="template=slm"):
        question_wrapper("", section)


@pytest.mark.parametrize("text", ["question: a", "- question: a", "- [a, b]", "- question: 1\n  solution: 2", "- {"])
def test_a_few_shot_file_of_another_form_is_a_user_error(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_few_shot(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="no few-shot file"):
        load_few_shot(tmp_path / "none.yaml")


def test_a_template_without_a_place_for_the_question_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="chat, slm, or a text"):
        wrap_question(tokenizer, "Q", template="chatml")


def test_a_chat_template_that_refuses_the_system_role_is_a_user_error(tiny_model: Path):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"no system role.*model\.system="):
        wrap_question(tokenizer, "Q", system="S")


@pytest.mark.parametrize(
    ("attribute", "template", "says"),
    [
        ("eos_token", "slm", "no end token"),
        ("chat_template", "chat", "template=slm"),
    ],
)
def test_check_tokenizer_names_what_is_missing(tiny_model: Path, attribute: str, template: str, says: str):
    tokenizer = load_tokenizer(tiny_model)
    check_tokenizer(tokenizer, template=template)
    setattr(tokenizer, attribute, None)
    with pytest.raises(UserError, match=says):
        check_tokenizer(tokenizer, template=template)


def test_a_tokenizer_without_chat_template_serves_the_slm_template(tiny_model: Path):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    check_tokenizer(tokenizer, template="slm")


def test_a_whole_model_folder_passes(folder: Path):
    check_model_folder(folder)


@pytest.mark.parametrize(
    ("file", "says"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "model.safetensors")],
)
def test_a_missing_file_of_a_model_folder_is_named(folder: Path, file: str, says: str):
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"has no {says}"):
        check_model_folder(folder)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights_are_found_without_loading_them(folder: Path, keep: int):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_model_folder(folder)


def test_every_shard_of_the_index_is_checked(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="00002-of-00002"):
        check_model_folder(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    check_model_folder(folder)


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="no model folder"):
        check_model_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "empty")


def llama2_like() -> PreTrainedTokenizerFast:
    """A tokenizer in the layout of Llama 2 and Phi-3, which puts a space before every text that it is given."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        piece: i for i, piece in enumerate(["<s>", "</s>", "<unk>", "\u2581", "\n", *letters, "\u2581a", "12"])
    }
    merges = [("\u2581", "a"), ("1", "2")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    "segments", [("Q: 12", "34"), ("a\n", "a = 1\n", "b"), ("a", "\n\n", "12"), ("x", "", " a", "a")]
)
def test_segments_of_tokenizers_that_put_a_space_before_a_text_join_without_one(segments: tuple[str, ...]) -> None:
    encoder = SegmentEncoder(llama2_like())
    ids = encoder.encode(segments)
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == "".join(segments)
    stream = TextStream(encoder.tokenizer, encoder.encode(segments[:1]))
    for token in ids[len(encoder.encode(segments[:1])) :]:
        stream.push(token)
    stream.finish()
    assert stream.text == "".join(segments[1:]), "what a policy wrote is read as it was written"
    assert encoder.encode([segments[0], stream.text])[:1] == ids[:1]


def test_examples_of_our_own_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_few_shot("configs/rstar_math/few_shot.yaml")) == 2
    with pytest.raises(UserError, match=r"no few-shot file mine\.yaml"):
        load_few_shot("mine.yaml")
