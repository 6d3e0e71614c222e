"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not eat the other tests' core
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A Ray of its own asks for a token, and this process would go on doing so when a later test joins a cluster that has
# none: that cluster's workers then die without ever running. One mode for all tests of the process.
os.environ["RAY_AUTH_MODE"] = "disabled"


# The same examples in every run, here and in CI, so that a failure can be repeated; and no limit on an example's wall
# time, which a busy machine breaks: where speed is what is tested, the test itself measures CPU time.
settings.register_profile("rstar", deadline=None, derandomize=True, database=None)
settings.load_profile("rstar")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama (2 layers, width 64, fp32) and a tokenizer with chat template, bos, eos and pad."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))
