"""Trees on disk: append-only shards of zstd frames, one frame a tree, one shard a worker.

Each tree's frame follows a small zstd skippable frame that holds the length of the tree's frame, the tree's revision,
whether it is complete, and its id. So `zstd -d` reads a shard as plain JSON lines, an index needs no decompression, a
torn tail (a crash in the middle of a write) is recognised and cut, and a damaged frame in the middle is refused by file
and number.
A later frame of the same tree id replaces an earlier one: that is how a tree is saved in the middle of its search, and
how a finished one is continued or re-scored (which raises its revision, whatever shard it is written to).

An appended tree survives the death of its process (kill -9, out of memory) at once, because the kernel has it. What a
power failure can take is bounded in time, not in trees: a worker syncs its shard once a second and on closing, and
all shards are synced before a stage's record is written. What was lost is searched again.

Every other file, and a checkpoint's folder, is written whole: under a temporary name, synced, renamed (`replacing`,
`complete_or_absent`). So what stands under its own name is complete, whatever kills the process and wherever.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from rstar.config import digest
from rstar.tree import Tree
from rstar.types import UserError

_MAGIC = 0x184D2A57  # one of zstd's skippable-frame magics; decoders pass over it
_MAGIC_BYTES = _MAGIC.to_bytes(4, "little")
_HEAD = struct.Struct("<II")  # magic, size of the payload
SYNC_SECONDS = 1.0  # one sync costs 3 ms on a local disk and more on shared storage, and the event loop stands still
_PAYLOAD = struct.Struct("<QB")  # length of the tree's frame, 2 * revision + complete; the tree id follows
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MEND = "restore the file, or run `rstar evolve CONFIG --repair`, which makes again what the damage took"
TEMPORARY = ".tmp"  # ends the names of what is being written; only a killed process leaves one behind


def reached(point: str, path: Path) -> None:
    """Called at every step of every write; does nothing. Fault tests replace it to kill the process there."""


@dataclass(frozen=True)
class FrameRef:
    """Where a tree's frame lies."""

    path: Path
    number: int  # of the frame in its shard, from 0
    offset: int  # of the tree's zstd frame
    length: int
    tree_id: str
    revision: int
    complete: bool


@dataclass(frozen=True)
class Shard:
    """What a scan of a shard found."""

    frames: tuple[FrameRef, ...]
    good_bytes: int  # up to here everything is whole
    torn_bytes: int  # the tail behind it, left by a crash


def scan(path: Path) -> Shard:
    """List the frames of a shard. Raises UserError naming file and frame where a middle frame's head is damaged."""
    frames: list[FrameRef] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while offset < size:
            found = _read_head(file, size - offset)
            if found is None:
                file.seek(offset)
                tail = file.read()
                torn = tail[:4] == _MAGIC_BYTES[: len(tail)] and not _whole_frames(tail)
                if torn or not tail.strip(b"\0"):  # some file systems leave a block of NULs after a crash
                    break
                raise UserError(
                    f"{path} is damaged at frame {len(frames)} (byte {offset})", need="whole frames", how=_MEND
                )
            start, length, state, tree_id = found
            start += offset
            frames.append(FrameRef(path, len(frames), start, length, tree_id, state >> 1, bool(state & 1)))
            offset = start + length
            file.seek(offset)
    return Shard(tuple(frames), offset, size - offset)


def _read_head(file: BinaryIO, room: int) -> tuple[int, int, int, str] | None:
    """(bytes before the tree's frame, its length, its state, tree id) of what begins here; None if no frame that fits
    into `room` does."""
    head = file.read(_HEAD.size)
    magic, size = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
    if magic != _MAGIC or not _PAYLOAD.size <= size <= room:
        return None
    payload = file.read(size)
    length, state = _PAYLOAD.unpack_from(payload.ljust(_PAYLOAD.size, b"\0"))
    with suppress(UnicodeDecodeError):
        if len(head) + size + length <= room:
            return len(head) + size, length, state, payload[_PAYLOAD.size :].decode("utf-8", "surrogatepass")
    return None


def read_frame(ref: FrameRef) -> Tree:
    """Read one tree. Raises UserError naming file and frame when its bytes are damaged."""
    with _frame(ref) as data:
        lines = zstandard.ZstdDecompressor().decompress(data).split(b"\n")
        return Tree.from_rows([orjson.loads(line) for line in lines if line])


def read_head(ref: FrameRef) -> dict[str, Any]:
    """First line of a tree: the tree without its nodes, which are not decompressed."""
    with _frame(ref) as data, io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(data)) as lines:
        head: dict[str, Any] = orjson.loads(lines.readline())
        return head


@contextmanager
def _frame(ref: FrameRef) -> Iterator[bytes]:
    with ref.path.open("rb") as file:
        file.seek(ref.offset)
        data = file.read(ref.length)
    try:
        yield data
    except (zstandard.ZstdError, orjson.JSONDecodeError, MemoryError) as error:
        raise UserError(
            f"{ref.path} is damaged in frame {ref.number} (tree {ref.tree_id}): {error}", need="whole frames", how=_MEND
        ) from error


class TreeWriter:
    """Appends trees to one shard. Opening an existing shard cuts a torn tail; `torn_bytes` says how much was lost."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.torn_bytes = 0
        if path.exists():
            shard = scan(path)
            self.torn_bytes = shard.torn_bytes
            if shard.torn_bytes:
                os.truncate(path, shard.good_bytes)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self._synced = time.monotonic()

    def append(self, tree: Tree) -> None:
        """Write the tree as one frame; it outlives this process from now on, a power failure within SYNC_SECONDS."""
        frame = self._compressor.compress(b"".join(orjson.dumps(row) + b"\n" for row in tree.to_rows()))
        payload = _PAYLOAD.pack(len(frame), 2 * tree.revision + tree.complete) + tree.tree_id.encode(
            "utf-8", "surrogatepass"
        )
        data = memoryview(_HEAD.pack(_MAGIC, len(payload)) + payload + frame)
        whole = os.fstat(self._fd).st_size
        try:
            with room_for(self.path):
                reached("appending", self.path)
                while data:
                    data = data[os.write(self._fd, data) :]
        except BaseException:  # a full disk: the next frame must not come behind half a one
            os.ftruncate(self._fd, whole)
            raise
        reached("appended", self.path)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._fd)
            self._synced = time.monotonic()
            reached("synced", self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TreeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in name order."""
    return sorted(folder.glob("trees-*.jsonl.zst"))


def index(folder: Path) -> dict[str, FrameRef]:
    """Newest frame of each tree id in the folder; sorted by tree id.

    A higher revision is newer; within one, a complete frame replaces an incomplete one, and a later one an earlier. Of
    unfinished trees of two workers it is the one that has grown further.
    """
    newest: dict[str, FrameRef] = {}
    for path in shards(folder):
        for ref in scan(path).frames:
            known = newest.get(ref.tree_id)
            if known is None or (ref.revision, ref.complete) >= (known.revision, known.complete):
                if known and known.path != ref.path and known.revision == ref.revision and not ref.complete:
                    ref = max(known, ref, key=lambda one: read_head(one)["rollouts_done"])
                newest[ref.tree_id] = ref
    return dict(sorted(newest.items()))


def read_trees(folder: Path, *, complete_only: bool = True) -> Iterator[Tree]:
    """Stream the trees of a folder in tree-id order, one in memory at a time."""
    for ref in index(folder).values():
        if ref.complete or not complete_only:
            yield read_frame(ref)


def repair(path: Path) -> int:
    """Take the damaged frames, a torn tail too, out of a shard; returns how many bytes those are."""
    data = path.read_bytes()
    whole = _whole_frames(data)
    lost = len(data) - sum(map(len, whole))
    if lost:
        with replacing(path) as file:
            file.writelines(whole)
    return lost


def _whole_frames(data: bytes) -> list[bytes]:
    """The frames in `data`, heads included, whatever lies between them."""
    whole: list[bytes] = []
    offset = 0
    while (offset := data.find(_MAGIC_BYTES, offset)) >= 0:
        found = _read_head(io.BytesIO(data[offset : offset + (1 << 16)]), len(data) - offset)
        if found is None or not _is_sound(data[offset + found[0] : offset + found[0] + found[1]]):
            offset += 1
            continue
        end = offset + found[0] + found[1]
        whole.append(data[offset:end])
        offset = end
    return whole


def _is_sound(frame: bytes) -> bool:
    try:
        zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError):
        return False
    return True


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Name the file that did not fit where a disk or quota is full, or cannot be written at all."""
    try:
        yield
    except Exception as error:
        reason = _no_room(error)
        if not reason:
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"cannot write {path}: {reason}; {free} bytes are free",
            need="room for it",
            how="make some; what was finished is whole, and the same command resumes",
        ) from error


def _no_room(error: Exception) -> str:
    """The system's word for a write that found no room, empty for any other error. Libraries hide it: safetensors in
    its message, torch behind a message of its own."""
    hidden = re.search(r"\(os error ([0-9]+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(hidden[1]) if hidden else 0
    if not number and "inline_container" in str(error):
        return "torch could not write it all"
    return os.strerror(number) if number in _FULL else ""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path`, in place of what has it, when the block ends well; else nothing changes."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")  # `rstar report` may run beside the driver
    try:
        with room_for(path):
            with temporary.open("wb") as file:
                reached("opened", path)
                yield file
                file.flush()
                reached("written", path)
                os.fsync(file.fileno())
            reached("synced", path)
            os.replace(temporary, path)
            reached("renamed", path)
            sync_path(path.parent)
            reached("done", path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """As `replacing` for a folder: a temporary one that takes its name, and is removed where the block fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(TEMPORARY, f".{folder.name}.", folder.parent))
    try:
        with room_for(folder):
            reached("opened", folder)
            yield temporary
            reached("written", folder)
            os.chmod(temporary, 0o755)  # mkdtemp's 0700 would hide a checkpoint from the group on shared storage
            for path in sync_files(temporary):
                os.chmod(path, 0o644)  # as safetensors' own 0600 would
            reached("synced", folder)
            if folder.exists():
                shutil.rmtree(folder)
            reached("cleared", folder)
            os.replace(temporary, folder)
            reached("renamed", folder)
            sync_path(folder.parent)
            reached("done", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Write dataclass rows as JSON lines, whole or not at all. Returns their number."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY, default=str))


def append_line(path: Path, value: Any) -> None:
    """Append a value to a file of JSON lines, behind whatever a crash has left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path), path.open("ab") as file:
        file.write((b"\n" if file.tell() else b"") + orjson.dumps(value))


def read_lines(path: Path) -> list[Any]:
    """Values of a file of JSON lines, none where it is not there; a line that was cut off does not count."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(orjson.JSONDecodeError):
            found.append(orjson.loads(line))
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError names the file where it is missing or broken."""
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error


def sync_path(path: Path) -> None:
    """Make a file's contents, or the renames in a folder, outlive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(folder: Path) -> list[Path]:
    """As sync_path for a folder and everything in it; returns its files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in [*files, folder]:
        sync_path(path)
    return files


@dataclass(frozen=True)
class FileState:
    """A file, or a folder with all files in it, as it was when its digest was computed."""

    sha256: str
    size: int  # bytes, of a folder in all
    mtime_ns: int  # modification time, of a folder the newest of its files


def file_state(path: Path, *, sha256: str | None = None) -> FileState:
    """The state of a file or folder now; its contents are read unless `sha256` says what they are."""
    stats = [one.stat() for one in _files(path)]
    size, mtime = sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)
    return FileState(path_digest(path) if sha256 is None else sha256, size, mtime)


def path_digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return file_digest(path)
    return digest([(str(one.relative_to(path)), file_digest(one)) for one in _files(path)])


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_digest(path: Path) -> str:
    """As `path_digest` for files and models that a run reads but has not made.

    Those of a MiB or more are read once: their digests are kept in the cache folder, by size and modification time.
    """
    now = file_state(path, sha256="")
    if now.size < 1 << 20:
        return path_digest(path)
    kept, key = cache_folder() / "digests.json", str(path.resolve())
    known = read_json(kept) if kept.exists() else {}
    if (was := known.get(key)) and (was["size"], was["mtime_ns"]) == (now.size, now.mtime_ns):
        return str(was["sha256"])
    found = file_state(path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, known | {key: found})
    return found.sha256


def cache_folder() -> Path:
    """Where converted models and digests are kept: $RSTAR_CACHE, else the user's cache folder."""
    if "RSTAR_CACHE" in os.environ:
        return Path(os.environ["RSTAR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rstar"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
