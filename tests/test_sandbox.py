"""The sandbox: what a step sees, how each failure is named, what it cannot reach. Each attack test tries one thing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from rstar.config import SandboxSection
from rstar.sandbox import NO_LOCKS, Host, Sandbox, SandboxError, Session, checks, locks, probe
from rstar.sandbox.checks import attack
from rstar.sandbox.levels import level_of
from rstar.sandbox.process import MAIN
from rstar.tree import Tree
from rstar.types import Execution, ExecutionStatus, Problem, UserError
from tests.benchmarks.sandbox import parking, prefix_costs

T = TypeVar("T")
SECTION = SandboxSection(cpu_seconds=1.0, wall_seconds=6.0, memory_mib=256, processes=2)
LOCKS = replace(probe(), namespaces=())  # level A, where this machine has it

pytestmark = pytest.mark.skipif(not LOCKS.seccomp or not LOCKS.landlock_abi, reason=f"no locks here: {LOCKS.problem}")


class Box:
    """A started sandbox with an event loop of its own, for tests without async plumbing."""

    def __init__(self, section: SandboxSection = SECTION, host: Host = LOCKS, patience: float = 10.0) -> None:
        self.loop = asyncio.new_event_loop()
        self.sandbox = Sandbox(section, host=host, patience=patience)
        try:
            self.wait(self.sandbox.start())
        except BaseException:
            self.loop.close()
            raise

    def wait(self, awaitable: Awaitable[T]) -> T:
        return self.loop.run_until_complete(awaitable)

    def run(self, *codes: str, seed: int = 0) -> list[Execution]:
        """Run codes one after another on a path, until one fails."""
        session = self.sandbox.session(seed)
        state, executions = session.root, []
        for code in codes:
            state, execution = self.wait(session.run(state, textwrap.dedent(code)))
            executions.append(execution)
            if execution.status is not ExecutionStatus.OK:
                break
        return executions

    def one(self, code: str) -> Execution:
        return self.run(code)[-1]

    def close(self) -> None:
        self.wait(self.sandbox.close())
        self.loop.close()


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.close()


@pytest.fixture
def own_box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Box]]:
    """Makes boxes for one test; their zygotes start fast because they load little."""
    monkeypatch.setattr("rstar.sandbox.preload.STEP_MODULES", ["random", "threading", "ctypes"])
    monkeypatch.setattr("rstar.sandbox.preload.WARM_UP", "")
    boxes: list[Box] = []

    def make(**arguments: object) -> Box:
        boxes.append(Box(**arguments))  # type: ignore[arg-type]
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


# What a step sees


def test_a_path_shares_one_namespace_and_each_step_shows_its_own_output(box: Box) -> None:
    first, second, third = box.run("x = 2\nprint('one')", "def f(n): return n * x\nprint('two')", "x = 5\nprint(f(3))")
    assert [first.stdout, second.stdout, third.stdout] == ["one\n", "two\n", "15\n"]


def test_a_program_may_be_larger_than_any_buffer_on_its_way(box: Box) -> None:
    session = box.sandbox.session()
    state = session.state([f"x = {n}\n#{'é' * 60_000}" for n in range(8)])
    assert box.wait(session.run(state, "print(x)"))[1].stdout == "7\n"


def test_a_run_never_changes_its_parent(box: Box) -> None:
    session = box.sandbox.session()
    parent, _ = box.wait(session.run(session.root, "x = [1]"))

    async def siblings() -> Sequence[Execution]:
        codes = ["x.append(2)\nprint(x)", "x.clear()\nprint(x)", "del x", "print(x)"]
        return [execution for _, execution in await asyncio.gather(*(session.run(parent, code) for code in codes))]

    assert [execution.stdout for execution in box.wait(siblings())] == ["[1, 2]\n", "[]\n", "", "[1]\n"]
    assert session.state(["x = [1]"]) == parent


def test_a_failed_run_returns_the_parent_state(box: Box) -> None:
    session = box.sandbox.session()
    state, execution = box.wait(session.run(session.root, "print('before')\n1 / 0"))
    assert state == session.root
    assert execution == Execution(
        ExecutionStatus.ERROR, "before\n", "ZeroDivisionError: division by zero", execution.cpu_ms
    )


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("1 + 1\n'text'", ""),  # values are not echoed
        ("print(0.1 + 0.2, 1e-17, 2.0, 1 / 3)", "0.30000000000000004 1e-17 2.0 0.3333333333333333\n"),  # never rounded
        ("print('standard error: 3')", "standard error: 3\n"),  # a word does not make an error
        ("print('a', end='')", "a"),
        ("print('é∑\\u2028\\r\\n\\x00')", "é∑\u2028\r\n\x00\n"),
        ("import sys\nprint('no', file=sys.stderr)\nprint('yes')", "yes\n"),
        ("import os\nos.write(1, b'\\xff!')", "\\xff!"),
        ("print(__name__)\nif __name__ == '__main__': print('main')", "__main__\nmain\n"),
        ("print('\\ud800')", "\\ud800\n"),
        ("\ufeffprint(1)", "1\n"),
    ],
)
def test_output_is_what_the_code_printed(box: Box, code: str, stdout: str) -> None:
    assert box.one(code) == Execution(ExecutionStatus.OK, stdout, "", pytest.approx(0, abs=1000))


def test_future_imports_reach_later_steps_as_in_one_program(box: Box) -> None:
    later = "def f(x: missing): return x\nprint(f.__annotations__)"
    assert box.run("from __future__ import annotations", later)[-1].stdout == "{'x': 'missing'}\n"
    late = box.run("x = 1", "from __future__ import annotations")[-1]
    assert late.status is ExecutionStatus.ERROR and "beginning of the file" in late.error


def test_classes_of_earlier_steps_pickle_and_become_dataclasses(box: Box) -> None:
    steps = (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
        "import pickle\nprint(pickle.loads(pickle.dumps(P(3))))",
    )
    assert box.run(*steps)[-1].stdout == "P(x=3)\n"


def test_files_of_the_working_folder_live_in_memory(box: Box) -> None:
    execution = box.run("with open('a.txt', 'w') as f:\n    f.write('hi\\n' * 2)", "print(open('a.txt').readlines())")[
        -1
    ]
    assert execution.stdout == "['hi\\n', 'hi\\n']\n"
    assert box.one("print(open('a.txt').read())").error.startswith("FileNotFoundError")


def test_seeds_hold_for_every_evaluation_of_a_session(box: Box) -> None:
    code = "import random, numpy as np\nprint(random.random(), np.random.rand(), hash('a'))"
    first, again, other = box.run(code, seed=1), box.run(code, seed=1), box.run(code, seed=2**40)
    assert first[0].stdout == again[0].stdout != other[0].stdout
    on_path = box.run("x = 1", code, seed=1)
    assert on_path[1].stdout == first[0].stdout


def test_the_mathematics_works_behind_the_locks() -> None:
    box = Box(replace(SECTION, cpu_seconds=20.0, wall_seconds=120.0, processes=1))  # its imports alone take half of 1 s
    try:
        execution = box.one(
            """
            from sympy import symbols, solve, Rational, integrate, oo, exp
            import numpy as np, scipy.optimize, statistics, xml.dom.minidom
            x = symbols('x')
            print(solve(x**2 - 5*x + 6, x), integrate(exp(-x), (x, 0, oo)), Rational(1, 3))
            print(np.linalg.det(np.eye(3)), round(scipy.optimize.brentq(lambda t: t * t - 2, 0, 2), 6))
            """
        )
    finally:
        box.close()
    assert execution.stdout == "[2, 3] 1 1/3\n1.0 1.414214\n"


def test_a_sibling_of_ten_steps_replays_them_cheaply(box: Box) -> None:
    session = box.sandbox.session()
    state = session.state([f"x{i} = {i} * 3 + 1\nprint(x{i})" for i in range(10)])
    times = []
    for _ in range(5):
        started = time.perf_counter()
        _, execution = box.wait(session.run(state, "print(x0 + x9)"))
        times.append(time.perf_counter() - started)
        assert execution.stdout == "29\n"
        assert execution.cpu_ms < 50
    assert min(times) < 0.25


# Results equal a fresh run of the concatenated program


def _random_step(draw: random.Random, step: int) -> str:
    number = draw.choice(["7", "2.5", "1e-9", "10**30", "-3", "0.1 + 0.2", "1/3", "float('inf')", "2**0.5"])
    lines = [
        f"v{step} = {number}",
        f"if v{step} > {draw.randint(-5, 9)}:\n    print('big', v{step})\nelse:\n    print('small', v{step}, end=';')",
        f"for i in range({draw.randint(0, 4)}):\n    print(i, i / 7, sep='|')",
        f"v{step}",
        f"def f{step}(x):\n    return x * {draw.randint(1, 9)}\nprint(f{step}(v0))",
        "print('∑ éß 你好', '\\t', repr('\\n'))",
        "names = sorted(k for k in globals() if k[0] == 'v')\nprint([(k, type(globals()[k]).__name__) for k in names])",
        "try:\n    {}['x']\nexcept KeyError as error:\n    print('caught', error)",
        "print(f'{v0:.3f} {v0!r:>12}', {1: [v0]}, {'a', }, (v0,))",
        "import math, statistics\nprint(math.floor(v0) if v0 < 1e9 else 'large', statistics.mean([1, 2, v0]))",
    ]  # fmt: skip
    failing = [
        "1 / 0", "[][3]", "int('x')", "undefined_name", "raise ValueError('two\\nlines')", "x = (",
        "assert v0 is None, 'no'",
    ]  # fmt: skip
    chosen = [lines[0], *draw.sample(lines[1:], draw.randint(1, 4))]
    if draw.random() < 0.15:
        chosen.append(draw.choice(failing))
    return "\n".join(chosen)


def test_paths_equal_fresh_runs_of_the_whole_program(box: Box, tmp_path: Path) -> None:
    draw = random.Random(20)
    programs = [[_random_step(draw, step) for step in range(draw.randint(1, 4))] for _ in range(200)]
    runner = tmp_path / "fresh.py"
    runner.write_text(
        textwrap.dedent(
            """
            import io, json, sys, contextlib
            program = json.load(sys.stdin)
            error = ""
            try:
                exec(compile(program, "<step>", "exec"), {"__name__": "__main__"})
            except BaseException as raised:
                error = f"{type(raised).__name__}: {raised}"
            sys.stdout.flush()
            sys.stderr.write(error)
            """
        )
    )
    import json

    failed = 0
    for steps in programs:
        executions = box.run(*steps)
        seen = steps[: len(executions)]
        if any("x = (" in step for step in seen):  # a program that does not compile prints nothing at all
            assert executions[-1].status is ExecutionStatus.ERROR and executions[-1].error.startswith("SyntaxError")
            continue
        fresh = subprocess.run(
            [sys.executable, "-S", "-E", str(runner)], input=json.dumps("\n".join(seen)).encode(), capture_output=True,
            env={"PYTHONUTF8": "1"}, check=True,
        )  # fmt: skip
        assert "".join(execution.stdout for execution in executions) == fresh.stdout.decode(), steps
        assert executions[-1].error == " ".join(fresh.stderr.decode().split("\n")), steps
        failed += executions[-1].status is ExecutionStatus.ERROR
    assert failed > 20  # the generator makes failing programs too


# How failures are named


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise KeyError('k')", ExecutionStatus.ERROR, "KeyError: 'k'"),
        ("x = ", ExecutionStatus.ERROR, "SyntaxError: invalid syntax (<step>, line 1)"),
        ("raise SystemExit(3)", ExecutionStatus.ERROR, "SystemExit: 3"),
        ("print(str(10 ** 5000)[:5])", ExecutionStatus.ERROR, "ValueError: Exceeds the limit"),
        ("raise ValueError('m' * 10**7)", ExecutionStatus.ERROR, "ValueError: mmm"),
        ("raise ValueError('two\\nlines')", ExecutionStatus.ERROR, "ValueError: two lines"),
        (
            "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
            ExecutionStatus.ERROR,
            "E: <no text",
        ),
        ("x = '\ud800'", ExecutionStatus.ERROR, "UnicodeEncodeError"),
        ("x" * (200 << 10), ExecutionStatus.ERROR, "source too large"),
        ("while True: pass", ExecutionStatus.TIMEOUT, "used 1 s of CPU time"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            ExecutionStatus.TIMEOUT,
            "used",
        ),
        ("import math\nmath.factorial(10**8)", ExecutionStatus.TIMEOUT, "used 1 s of CPU time"),
        ("x = bytearray(1 << 30)", ExecutionStatus.MEMORY, "MemoryError"),
        (
            "import numpy\nnumpy.ones((10**5, 10**5))",
            ExecutionStatus.MEMORY,
            "MemoryError: Unable to allocate 74.5 GiB",
        ),
        ("while True: print('x' * 1000)", ExecutionStatus.OUTPUT_LIMIT, "printed more than 65536 bytes"),
        ("open('/etc/passwd')", ExecutionStatus.DENIED, "PermissionError: [Errno 13] Permission denied: '/etc/passwd'"),
        ("import os\nos._exit(0)", ExecutionStatus.KILLED, "left early, exit code 0"),
        ("import ctypes\nctypes.string_at(0)", ExecutionStatus.KILLED, "killed by SIGSEGV"),
        ("import os\nos.closerange(0, 100)", ExecutionStatus.KILLED, "left early"),
        ("import os\nos.closerange(0, 100)\nwhile True: pass", ExecutionStatus.TIMEOUT, "used"),
    ],
)
def test_each_way_to_fail_has_its_name_and_one_line(box: Box, code: str, status: ExecutionStatus, error: str) -> None:
    execution = box.one(code)
    assert (execution.status, execution.error[: len(error)]) == (status, error)
    assert "\n" not in execution.error and len(execution.error) < 2100
    assert len(execution.stdout) <= 64 << 10


def test_sleeping_is_bounded_by_wall_time_and_not_by_cpu_time(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, cpu_seconds=0.3, wall_seconds=2.0, processes=1))
    assert box.one("import time\ntime.sleep(0.8)\nprint('awake')").stdout == "awake\n"
    slept = box.one("import time\ntime.sleep(60)")
    assert slept.status is ExecutionStatus.TIMEOUT and "wall" in slept.error


def test_cpu_time_is_that_of_the_step_alone(box: Box) -> None:
    burn = "import time\nend = time.thread_time() + {}\nwhile time.thread_time() < end: pass"
    first, second, third = box.run(burn.format(0.3), burn.format(0.1), "x = 1")
    assert 300 <= first.cpu_ms < 400 and 100 <= second.cpu_ms < 200 and third.cpu_ms < 50


def test_a_prefix_does_not_use_up_the_cpu_time_of_a_step(box: Box) -> None:
    burn = "import time\nend = time.thread_time() + 0.6\nwhile time.thread_time() < end: pass"
    assert [execution.status for execution in box.run(burn, burn, burn)] == [ExecutionStatus.OK] * 3


def test_a_step_deep_in_a_path_has_no_more_cpu_time_than_the_first(box: Box) -> None:
    last = box.run(*["x = 1"] * 5, "while True: pass")[-1]
    assert last.status is ExecutionStatus.TIMEOUT
    assert 900 <= last.cpu_ms < 1500


def test_sleep_of_earlier_steps_is_not_counted_against_a_step(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, wall_seconds=3.0, processes=1))  # room for one nap, not for all three
    nap = "import time\ntime.sleep(1.2)"
    assert [execution.status for execution in box.run(nap, nap, nap)] == [ExecutionStatus.OK] * 3


def test_the_cost_of_prefixes_is_counted(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))
    before = box.sandbox.counts.dear_prefixes
    box.run("import time\nend = time.thread_time() + 0.1\nwhile time.thread_time() < end: pass", "x = 1", "y = 2")
    assert box.sandbox.counts.dear_prefixes - before == 2
    assert 0.2 < box.sandbox.counts.prefix_cpu_seconds < 0.6


def test_the_cost_of_replay_in_a_tree_is_the_cpu_time_of_the_steps_before_each_executed_node() -> None:
    tree = Tree("t", Problem("p", "?", "1"), ("?",))
    first = tree.add_child(tree.root, status="ok", cpu_ms=12.0)
    second = tree.add_child(first, status="ok", cpu_ms=1.0)
    tree.add_child(first, status="error", cpu_ms=2.0)
    tree.add_child(tree.add_child(second), status="ok", cpu_ms=4.0)  # below a step without code
    assert list(prefix_costs(tree)) == [(0.0, 12.0), (12.0, 1.0), (12.0, 2.0), (13.0, 4.0)]
    found = parking(iter([tree]), fork_ms=5.0)
    assert (found["executed_nodes"], found["prefix_over_10ms_share"]) == (4, 0.75)
    assert found["replay_of_step_cpu"] == pytest.approx(37 / (37 + 19))
    assert found["replay_of_all_cpu"] == pytest.approx(37 / (37 + 19 + 4 * 5))


def test_error_text_cannot_drive_a_terminal(box: Box) -> None:
    assert box.one("raise ValueError('\\x1b[2J\\r\\x85\\u2028end')").error == "ValueError: \\x1b[2J\\r\\x85\\u2028end"


# What a step cannot reach. The self-checks (`attack`) hold at every start; these are the less common ways.


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.memfd_create('x')",
        "import os\nos.mkfifo('f')",
        "import os\nos.symlink('/etc/passwd', 's')",
        "import os\nos.chmod('.', 0o777)",
        "import os\nos.utime('.')",
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.killpg(0, 0)",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.pidfd_open(os.getppid())",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.open('/proc/self/mem', os.O_RDONLY)",
        "import os\nos.listdir('/proc')",
        "import os\nos.open('x', os.O_CREAT | os.O_WRONLY)",
        "import os\nos.truncate('/etc/passwd', 0)",
        "import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",  # asynchronous I/O signals
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)",  # F_SETSIG
        "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",  # TIOCSTI
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=10)",
        "import subprocess\nsubprocess.run(['true'])",
        "import sympy, os\nos.unlink(sympy.__file__)",
    ],
)
def test_forbidden_calls_are_denied(box: Box, code: str) -> None:
    execution = box.one(code)
    assert execution.status is ExecutionStatus.DENIED, execution


@pytest.mark.parametrize(
    "call",
    [
        "l.ptrace(16, os.getppid(), 0, 0)",
        "l.unshare(0x10000000)",
        "l.prctl(1, 0, 0, 0, 0)",  # PR_SET_PDEATHSIG: would outlive the zygote
        "l.prctl(22, 2, 0, 0, 0)",
        "l.mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
        "l.personality(0x0040000)",
        "l.setuid(0)",
        "l.keyctl(0, 0, 0, 0, 0) if hasattr(l, 'keyctl') else -1",
        "l.shmget(0, 4096, 0o1600)",
        "l.syscall(425, 4, 0)",  # io_uring_setup, on every architecture
        "l.syscall(435, 0, 0)",  # clone3
    ],
)
def test_forbidden_system_calls_fail(box: Box, call: str) -> None:
    execution = box.one(f"import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nprint({call}, ctypes.get_errno())")
    assert execution.stdout.split()[:1] == ["-1"], execution


INHERITED = """
import os
found = []
for descriptor in range(256):
    try: found.append((descriptor, os.fstat(descriptor).st_mode & 0o170000))
    except OSError: pass
print([number for number, _ in found if number < 40], {kind for number, kind in found if number >= 40} <= {0o40000})
"""  # from 40 on: library folders that the uid cannot reach by path


def test_nothing_is_inherited_but_the_three_standard_descriptors_and_its_own_report(box: Box) -> None:
    assert box.one(INHERITED).stdout == "[0, 1, 2, 3] True\n"


def test_nothing_more_is_inherited_from_a_process_with_many_open_files(own_box: Callable[..., Box]) -> None:
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(60)]  # so the socket to the zygote has a high number
    try:
        assert own_box().one(INHERITED).stdout == "[0, 1, 2, 3] True\n"
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_a_step_sees_no_other_step_through_the_frames_below_it(box: Box) -> None:
    code = (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame := frame.f_back: found += sorted(frame.f_locals)"
    )
    names = box.one(f"{code}\nprint('_forks' in str(found), 'server' in str(found), 'buffer' in str(found))").stdout
    assert names == "False False False\n"


def test_forging_a_report_changes_only_ones_own_result(box: Box) -> None:
    forged = "import os, struct\nos.write(3, struct.pack('=cd', b'O', float('nan')) + b'forged')\nos._exit(0)"
    session = box.sandbox.session()

    async def both() -> tuple[Execution, Execution]:
        one, two = await asyncio.gather(session.run(session.root, forged), session.run(session.root, "print('mine')"))
        return one[1], two[1]

    forger, honest = box.wait(both())
    assert forger.status in (ExecutionStatus.OK, ExecutionStatus.KILLED) and forger.cpu_ms >= 0
    assert honest.stdout == "mine\n"


def test_sixty_four_sessions_with_hostile_neighbours_answer_as_alone(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, cpu_seconds=0.5, wall_seconds=3.0, memory_mib=128))
    hostile = [
        "while True: pass",
        "while True: print('x' * 10000)",
        "x = []\nwhile True: x.append('a' * 10**6)",
        "import os\nos.closerange(0, 100)\nwhile True: pass",
        "import ctypes\nctypes.string_at(0)",
        "import builtins\nbuiltins.print = None\nbuiltins.len = None",
        "import os\nfor pid in range(1, 5000):\n    try: os.kill(pid, 9)\n    except OSError: pass",
        "import random, os\nrandom.seed(1)\nos.chdir('/')\nos.umask(0)",
    ]
    steps = ["import random\na = {n} + 1", "print(a, len('abc'), random.random() < 1)", "b = a * 2\nprint(b / 3)"]

    async def honest(session: Session, number: int) -> list[str]:
        state, printed = session.root, []
        for step in steps:
            state, execution = await session.run(state, step.replace("{n}", str(number)))
            printed.append(f"{execution.status.value} {execution.stdout} {execution.error}")
        return printed

    async def neighbour(session: Session, code: str) -> list[str]:
        await session.run(session.root, code)
        return []

    async def everybody(with_hostile: bool) -> list[list[str]]:
        sandbox = box.sandbox
        work = [honest(sandbox.session(number), number) for number in range(48)]
        others = [neighbour(sandbox.session(), hostile[number % len(hostile)]) for number in range(16)]
        if not with_hostile:
            for other in others:
                other.close()
            others = []
        mixed = [one for pair in zip(work[:16], others, strict=False) for one in pair] + work[len(others) :]
        return [printed for printed in await asyncio.gather(*mixed) if printed]

    alone = box.wait(everybody(False))
    assert len(alone) == 48 and all(line.startswith("ok ") for printed in alone for line in printed)
    assert box.wait(everybody(True)) == alone
    assert box.sandbox.counts.infrastructure_failures == 0


# Infrastructure


def test_a_killed_zygote_is_rebuilt_and_its_step_started_again(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))
    [old] = box.sandbox.zygote_pids()

    async def kill_under_way() -> Execution:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(3)\nprint('done')"))
        await asyncio.sleep(0.2)
        os.kill(old, signal.SIGKILL)
        return (await running)[1]

    assert box.wait(kill_under_way()).stdout == "done\n"
    assert (box.sandbox.counts.infrastructure_failures, box.sandbox.counts.retries) == (1, 1)
    assert box.sandbox.zygote_pids() != [old]


def test_zygotes_that_die_while_nothing_runs_are_rebuilt_and_counted(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=2))

    async def idle() -> None:
        for pid in box.sandbox.zygote_pids():
            os.kill(pid, signal.SIGKILL)
        while box.sandbox.zygote_pids():
            await asyncio.sleep(0.02)

    box.wait(idle())
    assert box.wait(asyncio.wait_for(box.sandbox.run_limited("print(1)", 1.0), 30)).stdout == "1\n"
    assert (box.sandbox.counts.infrastructure_failures, box.sandbox.counts.retries) == (2, 0)


def test_a_grading_zygote_that_dies_while_nothing_is_graded_is_rebuilt(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))

    def echoed() -> str:
        asked = box.sandbox.call("echo", "heard", cpu_seconds=1.0, wall_seconds=5.0)
        return box.wait(asyncio.wait_for(asked, 60)).stdout

    assert echoed() == "heard" and box.sandbox._grading is not None
    [old] = box.sandbox._grading.zygotes
    os.kill(old.pid, signal.SIGKILL)
    while old.alive:
        box.wait(asyncio.sleep(0.02))
    assert echoed() == "heard"
    assert box.sandbox.counts.infrastructure_failures == 1


def test_a_zygote_that_is_not_ready_in_time_is_the_infrastructures_failure(
    own_box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rstar.sandbox.process.START_SECONDS", 0.01)
    with pytest.raises(SandboxError, match=r"did not start: zygote .* was not ready after 0.01 s"):
        own_box()


def test_a_step_that_the_kernel_ends_is_run_again_and_counted(own_box: Callable[..., Box]) -> None:
    """No step can send itself SIGKILL: where the warden did not either, the machine was out of memory."""
    box = own_box(section=replace(SECTION, processes=1))
    [zygote] = box.sandbox.zygote_pids()

    async def killed(times: int) -> Execution:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(1.5)\nprint('done')"))
        known = {one.pid for one in psutil.Process(zygote).children()}
        for _ in range(times):
            while not (new := {one.pid for one in psutil.Process(zygote).children()} - known):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            known |= new
            for pid in new:
                os.kill(pid, signal.SIGKILL)
        return (await running)[1]

    once, twice = box.wait(killed(1)), box.wait(killed(2))
    assert (once.status, once.stdout) == (ExecutionStatus.OK, "done\n")
    assert (twice.status, twice.error) == (ExecutionStatus.MEMORY, "killed by the kernel, out of memory")
    assert box.sandbox.counts.infrastructure_failures == 3 and box.sandbox.zygote_pids() == [zygote]


def test_time_in_which_the_whole_machine_stood_still_is_no_steps_time(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1, wall_seconds=2.5))
    [zygote] = box.sandbox.zygote_pids()

    async def frozen() -> Execution:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(0.8)\nprint('done')"))
        await asyncio.sleep(0.2)
        everything = [psutil.Process(zygote), *psutil.Process(zygote).children(recursive=True)]
        for one in everything:
            one.suspend()
        await asyncio.sleep(4.5)
        for one in everything:
            one.resume()
        return (await running)[1]

    execution = box.wait(frozen())
    assert (execution.status, execution.stdout) == (ExecutionStatus.OK, "done\n"), execution


def test_a_zygote_whose_supervisor_dies_before_its_first_message_leaves() -> None:
    ours, theirs = socket.socketpair()
    zygote = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[1]
    )
    theirs.close()
    ours.close()
    assert zygote.wait(60) == 0


def test_a_path_to_shared_libraries_reaches_the_interpreter_and_no_step(
    own_box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    box = own_box(section=replace(SECTION, processes=1))
    started = Path(f"/proc/{box.sandbox.zygote_pids()[0]}/environ").read_bytes()
    assert f"LD_LIBRARY_PATH={tmp_path}".encode() in started
    assert box.one("import os\nprint(os.environ.get('LD_LIBRARY_PATH'))").stdout == "None\n"


def test_a_zygote_whose_template_died_is_rebuilt(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))
    [old] = box.sandbox.zygote_pids()
    [template] = psutil.Process(old).children()
    template.kill()
    assert box.one("print('after')").stdout == "after\n"
    assert box.sandbox.zygote_pids() != [old]
    assert box.sandbox.counts.infrastructure_failures == 1


def test_a_zygote_outlives_the_thread_that_started_it(own_box: Callable[..., Box]) -> None:
    with ThreadPoolExecutor(1) as pool:  # the kernel's "parent" of PR_SET_PDEATHSIG is a thread
        box = pool.submit(own_box, section=replace(SECTION, processes=1), host=LOCKS).result()
    time.sleep(0.3)  # a thread is joined before the kernel has ended it
    assert box.one("print('after')").stdout == "after\n"
    assert box.sandbox.counts.infrastructure_failures == 0


def test_a_wedged_zygote_is_found_and_replaced(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1), patience=2.0)
    os.kill(box.sandbox.zygote_pids()[0], signal.SIGSTOP)
    assert box.one("print('after')").stdout == "after\n"
    assert box.sandbox.counts.infrastructure_failures == 1


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def test_a_second_infrastructure_failure_is_an_exception_and_never_a_failed_step(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))

    async def kill_twice() -> None:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(5)"))
        for _ in range(2):
            while not (pids := box.sandbox.zygote_pids()) or len(children_of(pids[0])) < 2:  # the template, the step
                await asyncio.sleep(0.02)
            os.kill(pids[0], signal.SIGKILL)
            while pids[0] in box.sandbox.zygote_pids():
                await asyncio.sleep(0.02)
        await running

    with pytest.raises(SandboxError, match="failed twice"):
        box.wait(asyncio.wait_for(kill_twice(), 120))  # a bound, for the case that no step is ever seen
    assert box.one("print(1)").stdout == "1\n"


def test_a_cancelled_run_is_killed_at_once(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, wall_seconds=60.0, processes=1))

    async def cancel() -> int:
        session = box.sandbox.session()
        zygote = psutil.Process(box.sandbox.zygote_pids()[0])
        before = len(zygote.children())
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(30)"))
        while len(zygote.children()) < before + 1:
            await asyncio.sleep(0.02)
        assert len(zygote.children()) == before + 1
        running.cancel()
        for _ in range(200):  # 10 s: long before the step would end by itself
            await asyncio.sleep(0.05)
            if len(zygote.children()) == before:
                return 0
        return len(zygote.children()) - before

    assert box.wait(asyncio.wait_for(cancel(), 120)) == 0


def test_closing_fails_what_is_in_flight_and_leaves_nothing(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))
    [pid] = box.sandbox.zygote_pids()

    async def close_under_way() -> None:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "import time\ntime.sleep(5)"))
        await asyncio.sleep(0.2)
        await box.sandbox.close()
        await running

    with pytest.raises(SandboxError, match="closed"):
        box.wait(close_under_way())
    assert not psutil.pid_exists(pid)


def test_nothing_is_left_after_closing() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    box = Box(replace(SECTION, processes=1))
    assert len(psutil.Process().children(recursive=True)) > len(before)
    box.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_under_memory_pressure_the_kernel_ends_steps_before_anything_else(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))

    async def scores() -> list[int]:
        session = box.sandbox.session()
        running = asyncio.create_task(session.run(session.root, "while True: pass"))
        zygote = psutil.Process(box.sandbox.zygote_pids()[0])
        while len(zygote.children(True)) < 2:
            await asyncio.sleep(0.02)
        found = [int(Path(f"/proc/{p.pid}/oom_score_adj").read_text()) for p in [zygote, *zygote.children(True)]]
        await running
        return found

    assert box.wait(scores()) == [1000] * 3  # the warden, the template, the step


def test_zygotes_go_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import asyncio\nfrom rstar.config import SandboxSection\nfrom rstar.sandbox import Sandbox\n"
        "async def main():\n    async with Sandbox(SandboxSection(processes=1)) as box:\n"
        "        s = box.session()\n        run = asyncio.create_task(s.run(s.root, 'import time\\ntime.sleep(60)'))\n"
        "        await asyncio.sleep(0.3)\n        print(*box.zygote_pids(), flush=True)\n        await run\n"
        "asyncio.run(main())\n"
    )
    driver = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert driver.stdout is not None
    zygote = psutil.Process(int(driver.stdout.readline()))
    family = [zygote, *zygote.children(recursive=True)]
    assert len(family) >= 2
    driver.kill()
    driver.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []


# Levels


@pytest.mark.parametrize(
    ("host", "level"),
    [
        (Host(7, True, ("bwrap",)), "A+"),
        (Host(6, True), "A"),
        (Host(5, True, ("bwrap",)), "B"),
        (Host(1, True), "B"),
    ],
)
def test_the_level_follows_from_the_host(host: Host, level: str) -> None:
    assert level_of(host, allow_unsafe=False) == level_of(host, allow_unsafe=True) == level


@pytest.mark.parametrize("host", [Host(0, True), Host(7, False), Host(0, False)])
def test_a_host_without_locks_is_refused_unless_the_user_insists(host: Host) -> None:
    with pytest.raises(UserError, match=r"sandbox\.unsafe_local_exec=true"):
        Sandbox(SandboxSection(), host=host)
    assert Sandbox(SandboxSection(unsafe_local_exec=True), host=host).level == "unsafe"


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5])
def test_every_check_holds_on_older_kernels(abi: int, own_box: Callable[..., Box]) -> None:
    if abi > LOCKS.landlock_abi:
        pytest.skip("this kernel is older still")
    box = own_box(section=replace(SECTION, processes=1), host=replace(LOCKS, landlock_abi=abi))
    assert box.sandbox.level == "B"
    assert [check for check in box.wait(attack(box.sandbox)) if not check.ok] == []


def test_every_check_holds_inside_namespaces(own_box: Callable[..., Box]) -> None:
    if not probe().namespaces:
        pytest.skip("bubblewrap does not work here")
    box = own_box(section=replace(SECTION, processes=1), host=probe())
    assert box.sandbox.level == "A+"
    assert [check for check in box.wait(attack(box.sandbox)) if not check.ok] == []
    assert box.one("import os\nprint(os.getppid())").stdout == "1\n"


def test_without_libseccomp_there_still_is_a_fork() -> None:
    """In a process with a single thread, which the tests' own is not: there such a fork may wait for a lost lock."""
    assert locks.CLONE_NUMBERS[os.uname().machine] == locks._number("clone")
    program = """
import os, sys
sys.modules["pyseccomp"] = None
from rstar.sandbox import locks
pid = locks.forker(sibling=False)()
if pid == 0:
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7


def test_without_locks_the_checks_fail_and_limits_still_hold(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, unsafe_local_exec=True, processes=1), host=NO_LOCKS)
    assert box.sandbox.level == "unsafe"
    failed = {check.name for check in box.wait(attack(box.sandbox)) if not check.ok}
    assert {
        "network",
        "read a file",
        "write a file",
        "start a process",
        "start a thread",
        "signal the zygote",
    } <= failed
    assert not failed & {"run for ever", "take memory", "print without end", "poison the next step", "be root"}
    assert box.one("import os\nprint(sorted(set(os.environ) & {'PATH', 'PYTEST_CURRENT_TEST'}))").stdout == "[]\n"
    folder = box.one("import os\nprint(os.getcwd())").stdout.strip()
    assert os.listdir(folder) == []  # not the folder of this process, whatever a step does to its own
    box.wait(box.sandbox.close())
    assert not os.path.exists(folder)


def test_a_lock_that_does_not_hold_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_module = sys.modules["rstar.sandbox.checks"]  # the package shows the function of that name
    broken = checks_module._Attack("open a window", "print('open')", checks_module._DENIED)
    monkeypatch.setattr(checks_module, "_attacks", lambda *_: [broken])
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(UserError, match="open a window"):
        Box(replace(SECTION, processes=1))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_zygote_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rstar.sandbox.preload.STEP_MODULES", ["no_such_module"])
    with pytest.raises(UserError, match="no_such_module"):
        Box(replace(SECTION, processes=1))


def test_the_doctor_lists_every_check() -> None:
    found = checks(SECTION)
    assert len(found) > 12 and all(check.ok for check in found)


# Trusted functions on untrusted text


def test_a_registered_function_runs_behind_the_wall(own_box: Callable[..., Box]) -> None:
    box = own_box(section=replace(SECTION, processes=1))
    call = box.sandbox.call
    assert box.wait(call("echo", "a\n\ud800é", cpu_seconds=1, wall_seconds=5)).stdout == "a\n\\ud800é"
    same = box.wait(call("grade", '["\\\\frac{1}{2}", "0.5"]', cpu_seconds=5, wall_seconds=30))
    assert (same.status, same.stdout) == (ExecutionStatus.OK, "1")
    with pytest.raises(KeyError):
        box.wait(call("missing", "", cpu_seconds=1, wall_seconds=5))
    assert "too large" in box.wait(call("echo", "x" * (2 << 20), cpu_seconds=1, wall_seconds=5)).error
