"""The sandbox, attacked and used in less usual ways: each test tries one thing. The plain ones are in test_sandbox."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from rstar.types import ExecutionStatus
from tests.test_sandbox import Box, pytestmark  # noqa: F401  (skips where there are no locks)


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.close()


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.stdout.reconfigure(encoding='utf-8')\nprint('\u00e9')",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint('hello')",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')\nprint('hello')",
        "import os, sys\nsys.stdout = os.fdopen(1, 'w', closefd=False)\nprint('hello')",
        "import sys\nprint(sys.stdout.name, sys.stdout.mode, sys.stdout.encoding, sys.stdout.seekable())",
        "import os\nfrom contextlib import redirect_stdout\n"
        "with redirect_stdout(open(os.devnull, 'w')): print('no')\nprint('yes')",
        "with open('/dev/stdout', 'w') as f: f.write('q')",
        "with open('/dev/stderr', 'w') as f: f.write('q')",
    ],
)
def test_standard_output_is_that_of_a_fresh_interpreter(box: Box, code: str) -> None:
    fresh = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True)
    execution = box.one(code)
    assert (execution.status, execution.stdout) == (ExecutionStatus.OK, fresh.stdout)


def test_what_a_step_printed_into_a_stream_of_its_own_is_not_the_next_step_s(box: Box) -> None:
    wrap = "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint('A')"
    assert [one.stdout for one in box.run(wrap, "print('B', flush=True)")] == ["A\n", "B\n"]


def test_generators_without_a_seed_repeat_and_differ_between_problems(box: Box) -> None:
    code = (
        "import numpy as np\nrng = np.random.default_rng()\nprint(rng.integers(10**9), np.random.RandomState().rand())"
    )
    first, again, other = (box.run(code, "print(rng.integers(10**9))", seed=seed) for seed in (1, 1, 2))
    assert [one.stdout for one in first] == [one.stdout for one in again] != [one.stdout for one in other]


def test_a_symbol_s_hidden_number_is_the_same_in_every_zygote(box: Box) -> None:
    assert box.one("import sympy\nprint(sympy.srepr(sympy.Dummy('x')).partition('=')[2][:4])").stdout == "1000\n"


def test_memory_holds_no_trace_of_another_problem_s_program(box: Box) -> None:
    box.run("# NEIGHBOUR_plan: x = 17\n" * 300, seed=1)
    scan = """
        import ctypes, os, re
        libc, found, needle = ctypes.CDLL(None), set(), b"NEIGHB" + b"OUR_[ -~]{0,20}"
        libc.sbrk.restype = ctypes.c_void_p
        read, write = os.pipe()
        for page in range(libc.sbrk(0) - (100 << 20), libc.sbrk(0), 4096):
            if libc.write(write, ctypes.c_void_p(page), 4096) == 4096:  # else: nothing is mapped there
                found.update(re.findall(needle, os.read(read, 4096)))
        print(sorted(found))
    """
    for _ in range(3):
        assert box.run(scan, seed=2)[0].stdout == "[]\n"
    with_it = scan.replace("import ctypes", "keep = 'NEIGHBOUR_mine' + 'x' * 5000; import ctypes")
    assert "NEIGHBOUR_mine" in box.run(with_it, seed=2)[0].stdout  # the scan would find it


def test_flags_of_the_null_device_are_a_step_s_own(box: Box) -> None:
    flags = "import fcntl\nprint(fcntl.fcntl(0, fcntl.F_GETFL), fcntl.fcntl(2, fcntl.F_GETFL))"
    before = [box.one(flags).stdout for _ in range(4)]
    box.run("import fcntl, os\nfor d in (0, 2): fcntl.fcntl(d, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)")
    assert [box.one(flags).stdout for _ in range(4)] == before


def test_a_flood_of_reports_ends_the_step(box: Box) -> None:
    execution = box.one("import os\nwhile True: os.write(3, b'x' * 65536)")
    assert execution.status is ExecutionStatus.OUTPUT_LIMIT and execution.cpu_ms < 500


def test_the_text_of_an_error_is_bounded_whatever_it_is_made_of(box: Box) -> None:
    for text in ("'\\x01' * 9000", "'\\udcff' * 2000", "'\U0001f600' * 2000"):
        for code in (f"raise ValueError({text})", f"raise type('E' + {text}, (Exception,), {{}})(1)"):
            execution = box.one(code)
            assert execution.status is ExecutionStatus.ERROR and 0 < len(execution.error) <= 2000, execution


@pytest.mark.parametrize("mode", ["3", "3 | os.O_TRUNC", "os.O_RDONLY | os.O_TRUNC", "os.O_RDONLY | os.O_CREAT"])
@pytest.mark.parametrize("call", ["os.open(path, {})", "os.open(path, {}, dir_fd=-100)"])
def test_a_file_is_opened_for_reading_only(box: Box, mode: str, call: str) -> None:
    """Also one that a step may read: an access mode of 3 is neither reading nor writing to Landlock."""
    execution = box.one(f"import os\npath = '/dev/zero'\nos.open(path, os.O_RDONLY)\n{call.format(mode)}")
    assert execution.status is ExecutionStatus.DENIED
