"""From the config to an engine: the right kind, on the right device, late imports."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rstar.config import EngineSection
from rstar.engines.build import KINDS, build_policy, build_scorer
from rstar.types import UserError


def test_an_unknown_kind_names_the_known_ones():
    for build in (build_policy, build_scorer):
        with pytest.raises(UserError, match=", ".join(KINDS)):
            build(EngineSection(kind="sglang"), "model")


@pytest.mark.parametrize("kind", ["hf", "openai", "vllm"])
@pytest.mark.parametrize(("scorer_device", "expected"), [("", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_the_scorer_has_a_device_of_its_own_where_the_config_says_so(
    monkeypatch: pytest.MonkeyPatch, kind: str, scorer_device: str, expected: str
):
    """The engine modules are stand-ins: what matters is the section that reaches them."""
    for module in ("hf", "vllm"):
        classes = {
            name: lambda path, section, **_: section for name in ("HfScorer", "VllmScorer", "HfPolicy", "VllmPolicy")
        }
        monkeypatch.setitem(sys.modules, f"rstar.engines.{module}", SimpleNamespace(**classes))
    section = EngineSection(kind=kind, device="cuda", scorer_device=scorer_device)
    assert build_scorer(section, "ppm") == replace(section, device=expected)
    if kind != "openai":
        assert build_policy(section, "policy") == section
