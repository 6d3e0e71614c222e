"""The tree store: round trip, torn tails, damage, replacement; atomic rows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rstar.search.mcts import Mcts
from rstar.store import (
    TreeWriter,
    append_line,
    complete_or_absent,
    index,
    read_frame,
    read_lines,
    read_trees,
    repair,
    scan,
    write_rows,
)
from rstar.tree import Tree
from rstar.types import OutcomeRow, Problem, UserError
from tests.fakes import branching, grow


async def grown(seed: int = 0) -> Tree:
    expander = grow(branching(2, lambda made: made == [1, 0]), seed=seed)
    await Mcts(expander).search(6)
    expander.tree.complete = True
    return expander.tree


def write(folder: Path, *trees: Tree, shard: str = "w0") -> Path:
    path = folder / f"trees-{shard}.jsonl.zst"
    with TreeWriter(path) as writer:
        for tree in trees:
            writer.append(tree)
    return path


async def test_tree_comes_back_equal(tmp_path: Path) -> None:
    tree = await grown()
    write(tmp_path, tree)
    (back,) = read_trees(tmp_path)
    assert list(back.to_rows()) == list(tree.to_rows())
    assert [n.exhausted for n in back.nodes] == [n.exhausted for n in tree.nodes]
    assert [n.children for n in back.nodes] == [n.children for n in tree.nodes]


async def test_hostile_text_survives_the_file_format(tmp_path: Path) -> None:
    tree = await grown()
    tree.nodes[1].text = 'a\n{"id": 3}\u2028\0 \\ " é <script>'
    write(tmp_path, tree)
    (back,) = read_trees(tmp_path)
    assert back.nodes[1].text == tree.nodes[1].text


@pytest.mark.parametrize("cut", [1, 7, 30, 200])
async def test_torn_tail_is_cut_and_counted(tmp_path: Path, cut: int) -> None:
    trees = [await grown(seed) for seed in range(3)]
    path = write(tmp_path, *trees)
    whole = scan(path)
    last = whole.frames[-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    writer = TreeWriter(path)
    assert writer.torn_bytes > 0
    assert len(scan(path).frames) == 2 and scan(path).torn_bytes == 0
    writer.append(trees[2])
    writer.close()
    assert scan(path).frames[-1].offset == last.offset
    assert len(list(read_trees(tmp_path))) == 3


async def test_block_of_nuls_at_the_end_is_a_torn_tail(tmp_path: Path) -> None:
    path = write(tmp_path, await grown())
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert scan(path).torn_bytes == 4096
    assert TreeWriter(path).torn_bytes == 4096


async def test_damage_in_the_middle_is_refused_with_file_and_frame(tmp_path: Path) -> None:
    path = write(tmp_path, await grown(0), await grown(1), await grown(2))
    frame = scan(path).frames[1]
    data = bytearray(path.read_bytes())
    data[frame.offset + frame.length // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"trees-w0.jsonl.zst.* frame 1 "):
        list(read_trees(tmp_path))
    data[frame.offset - len("p#1") - 9 - 8] ^= 0xFF  # now its head's magic too
    path.write_bytes(data)
    with pytest.raises(UserError, match="frame 1"):
        scan(path)


async def test_later_frame_replaces_an_earlier_one_unless_that_was_complete(tmp_path: Path) -> None:
    early, late = await grown(), await grown()
    early.complete, early.rollouts_done = False, 2
    write(tmp_path, early, late)
    (ref,) = index(tmp_path).values()
    assert ref.complete and read_frame(ref).rollouts_done == late.rollouts_done
    assert next(iter(read_trees(tmp_path))).complete
    write(tmp_path, early, shard="w1")  # an old worker's leftover in another shard
    assert read_frame(index(tmp_path)["p#0"]).complete


async def test_of_two_workers_unfinished_trees_the_one_grown_further_counts(tmp_path: Path) -> None:
    short, long = await grown(), await grown()
    short.complete = long.complete = False
    short.rollouts_done, long.rollouts_done = 16, 96
    write(tmp_path, long, shard="w0")
    write(tmp_path, short, shard="w1")  # read later
    (ref,) = index(tmp_path).values()
    assert read_frame(ref).rollouts_done == 96


async def test_tree_that_was_taken_up_again_is_the_newest_in_whatever_shard_it_lies(tmp_path: Path) -> None:
    old, again, half = await grown(), await grown(), await grown()
    again.revision, again.rollouts_done = 1, 64
    half.revision, half.complete, half.rollouts_done = 2, False, 70
    write(tmp_path, old, shard="w1")
    write(tmp_path, again, shard="w0")  # read before w1's
    (back,) = read_trees(tmp_path)
    assert (back.revision, back.rollouts_done) == (1, 64)
    write(tmp_path, half, shard="v0")  # killed in the middle of another go
    (ref,) = index(tmp_path).values()
    assert not ref.complete and ref.revision == 2 and read_frame(ref).rollouts_done == 70


async def test_frame_that_did_not_fit_on_the_disk_leaves_the_shard_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.write, [100]

    def write_some(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, data[: room[0]])
        room[0] -= written
        return written

    with TreeWriter(tmp_path / "trees-w0.jsonl.zst") as writer:
        monkeypatch.setattr(os, "write", write_some)
        with pytest.raises(UserError, match=r"trees-w0.jsonl.zst: No space left on device; [0-9]+ bytes are free"):
            writer.append(await grown(0))
        monkeypatch.undo()
        writer.append(await grown(1))
    assert list(index(tmp_path)) == ["p#1"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "could not write"),
    ],
)
def test_folder_that_finds_no_room_is_named_and_the_one_before_stays(
    tmp_path: Path, error: Exception, said: str
) -> None:
    """The last two are safetensors' and torch's words for a full disk, as they came of a file-size limit."""
    folder = tmp_path / "policy"
    with complete_or_absent(folder) as temporary:
        (temporary / "weights").write_text("first")
    with pytest.raises(UserError, match=f"cannot write {folder}: .*{said}"), complete_or_absent(folder) as temporary:
        (temporary / "weights").write_text("second")
        raise error
    assert (folder / "weights").read_text() == "first" and list(tmp_path.iterdir()) == [folder]
    with pytest.raises(RuntimeError, match="another"), complete_or_absent(folder):
        raise RuntimeError("another")


def test_file_past_a_size_limit_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit is the system's own; a tree and rows that do not fit."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])

    code = (
        "import resource, sys; from pathlib import Path; from rstar.store import write_rows, UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_rows(Path(sys.argv[1]), [{'a': 'x' * 99}] * 99)\n"
        "except UserError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}: File too large" in out.stdout
    assert path.read_text() == '{"a":1}\n' and list(tmp_path.iterdir()) == [path]


def test_lines_behind_a_torn_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'\n{"n": 2')
    append_line(path, {"n": 3})
    assert read_lines(path) == [{"n": 1}, {"n": 3}] and read_lines(tmp_path / "none") == []


def test_repair_takes_out_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    import asyncio

    trees = [asyncio.run(grown(seed)) for seed in range(3)]
    path = write(tmp_path, *trees)
    frame = scan(path).frames[1]
    data = bytearray(path.read_bytes())
    data[frame.offset - len("p#1") - 1 - 8 + 5] = 0xFF  # the length in its head, now beyond the file
    path.write_bytes(data + b"torn")
    with pytest.raises(UserError, match="frame 1"):  # and not a torn tail of two trees, cut off when it is opened
        TreeWriter(path)
    assert repair(path) == len(data) + 4 - path.stat().st_size > 0
    assert list(index(tmp_path)) == ["p#0", "p#2"] and repair(path) == 0


async def test_shard_is_plain_zstandard(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("no zstd program on this machine")
    path = write(tmp_path, await grown(0), await grown(1))
    lines = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True)
    heads = [row for line in lines.stdout.splitlines() if "tree_id" in (row := json.loads(line))]
    assert [row["tree_id"] for row in heads] == ["p#0", "p#1"]


def test_rows_load_with_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [OutcomeRow("q", "a", (("a", True),), float(i), "p", "p#0", (1, i)) for i in range(3)]
    assert write_rows(tmp_path / "rows.jsonl", rows) == 3
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "c"), split="train"
    )
    assert loaded["label"] == [0.0, 1.0, 2.0] and set(loaded.column_names) >= {
        "prompt",
        "completion",
        "label",
        "tree_id",
    }


def test_unknown_schema_is_a_user_error() -> None:
    rows = list(Tree("t", Problem("p", "q", "1"), ("q",)).to_rows())
    rows[0]["schema"] = 99
    with pytest.raises(UserError, match="schema 99"):
        Tree.from_rows(rows)


def test_two_processes_that_replace_one_file_leave_one_of_their_texts(tmp_path: Path) -> None:
    """`rstar report` beside the driver, which refreshes the report itself."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom rstar.store import replacing\n"
        "for _ in range(150):\n"
        "    with replacing(Path(sys.argv[1])) as file:\n"
        "        for _ in range(20): file.write(sys.argv[2].encode() * 1000)"
    )
    path = tmp_path / "report.html"
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "ab"]
    assert [one.wait(120) for one in both] == [0, 0]
    assert path.read_bytes() in (b"a" * 20_000, b"b" * 20_000) and list(tmp_path.iterdir()) == [path]
