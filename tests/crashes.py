"""What a disk may hold once power is lost: a model, fed with the journal of real operations.

POSIX promises little. What `fsync` of a file returned for is there. Of what was written since, any
part may be there, and where it is not there may be zeros or garbage. A directory's entries are on
the medium once the directory itself was synced; until then each entry that was made, moved or
removed may have become so or not, whatever became of those before it. A rename is one such change.
The model is that of Pillai et al. 2014, "All File Systems Are Not Created Equal", section 3.2, with
atomic renames.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from truestep.storage import LocalStorage

Tree = dict[str, bytes | None]  # relative path -> content; None for a directory


def memory_directory() -> tempfile.TemporaryDirectory:
    """A temporary directory in memory where the system has such a place."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    return tempfile.TemporaryDirectory(prefix="truestep-", dir=shared if usable else None)


def read_tree(root: Path) -> Tree:
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    root.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


class Operation(NamedTuple):
    """One thing done to the disk, or a mark that the test made in between."""

    kind: str
    path: str = ""
    value: object = None  # of a write: its bytes; of a rename: the new path; of a mark: its value
    file: int = -1  # which created file is meant: its path may have changed


class Journal(LocalStorage):
    """The local file system, with a record of everything done to it below `root`.

    What is there when it is made counts as being on the medium.
    """

    def __init__(self, root: Path, largest_write: int = 2**30) -> None:
        self.root = root
        self.before = read_tree(root)
        self.operations: list[Operation] = []
        self.largest_write = largest_write
        self._files: dict[int, int] = {}
        self._num_files = 0
        self._being_made: list[Path] = []

    def mark(self, value: object) -> None:
        """Note how far the caller is: whatever crashes later has this behind it."""
        self.operations.append(Operation("mark", value=value))

    def make_unsynced(self, path: Path) -> None:
        """Make a directory as a process does that dies before it syncs the parent."""
        path.mkdir()
        self._note("mkdir", path)

    def make_directory(self, path):
        # The real one makes the parents by this very method, and syncs what it made by the one
        # below: the directory is there by then, and is noted just before.
        self._being_made.append(path)
        existed = path.is_dir()
        super().make_directory(path)
        if not existed:
            self._note_directories()
        self._being_made.remove(path)

    def create(self, path):
        descriptor = super().create(path)
        self._files[descriptor] = self._num_files
        self.operations.append(Operation("create", self._name(path), file=self._num_files))
        self._num_files += 1
        return descriptor

    def write(self, descriptor, data):
        written = super().write(descriptor, data[: self.largest_write])
        data = bytes(data[:written])
        self.operations.append(Operation("write", value=data, file=self._files[descriptor]))
        return written

    def sync(self, descriptor):
        super().sync(descriptor)
        self.operations.append(Operation("sync", file=self._files[descriptor]))

    def rename(self, source, target):
        super().rename(source, target)
        self._note("rename", source, self._name(target))

    def sync_directory(self, path):
        self._note_directories()
        super().sync_directory(path)
        self._note("sync_directory", path)

    def remove(self, path):
        inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
        for each in [*inside, path]:
            self._note("remove", each)
        super().remove(path)

    def _note_directories(self):
        known = {(op.kind, op.path) for op in self.operations}
        for path in sorted(self._being_made):  # parents first
            name = self._name(path)
            if path.is_dir() and name not in self.before and ("mkdir", name) not in known:
                self._note("mkdir", path)

    def _note(self, kind, path, value=None):
        self.operations.append(Operation(kind, self._name(path), value))

    def _name(self, path):
        name = os.path.relpath(path, self.root)
        return "" if name == "." else name


@dataclass(eq=False)
class _File:
    data: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Directory:
    live: dict = field(default_factory=dict)  # what processes see: name -> _File or _Directory
    durable: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)  # changes since it was synced, in their order

    def change(self, name, node=None, new_name=None):
        """Enter `node`, or take `name` out, or move what it names to `new_name`."""
        self.pending.append(change := (name, node or self.live[name], new_name, node is not None))
        _apply(self.live, change)


def _apply(entries, change):
    name, node, new_name, enters = change
    if not enters:
        entries.pop(name, None)
    if enters or new_name is not None:
        entries[new_name or name] = node


class Disk:
    """A file system as it is after some operations, with what of it is on the medium."""

    def __init__(self, tree: Tree) -> None:
        self._root = _Directory()
        self._files: dict[int, _File] = {}
        self.marks: list[object] = []
        for path, content in sorted(tree.items()):
            self.do(Operation("mkdir" if content is None else "create", path))
            if content is not None:
                self._at(path).data = self._at(path).synced = content
        for directory in self._within_reach()[1]:
            self._settle(directory)

    def do(self, operation: Operation) -> None:
        kind, path, value, number = operation
        if kind == "mark":
            self.marks.append(value)
            return
        parent, name = self._parent(path)
        if kind == "mkdir":
            parent.change(name, _Directory())
        elif kind == "create":
            self._files[number] = _File()
            parent.change(name, self._files[number])
        elif kind == "write":
            self._files[number].data += value
        elif kind == "sync":
            self._files[number].synced = self._files[number].data
        elif kind == "rename":
            other, new_name = self._parent(value)
            if other is parent:
                parent.change(name, new_name=new_name)
            else:  # either half may last without the other: journals are better than that
                other.change(new_name, parent.live[name])
                parent.change(name)
        elif kind == "sync_directory":
            self._settle(self._at(path))
        else:
            parent.change(name)

    def states(self, limit: int, chooser: random.Random) -> Iterator[Tree]:
        """Yield what may be left if power is lost now: all of it, or `limit` states if it is more.

        Of those that are drawn, the first two are the extremes: no change made it, and all did.
        """
        files, directories = self._within_reach()
        unsynced = [file for file in files if file.data != file.synced]
        fates = [self._fates(file, chooser) for file in unsynced]
        pending = [(directory, change) for directory in directories for change in directory.pending]
        choices = [*((False, True) for _ in pending), *fates]
        count = 1
        for options in choices:
            count *= len(options)
        if count <= limit:
            drawn = product(*choices)
        else:
            drawn = [[options[0] for options in choices], [options[1] for options in choices]]
            drawn += [[chooser.choice(options) for options in choices] for _ in range(limit - 2)]
        for choice in drawn:
            happened, contents = choice[: len(pending)], choice[len(pending) :]
            yield self._tree(
                dict(zip(unsynced, contents, strict=True)),
                [each for each, did in zip(pending, happened, strict=True) if did],
            )

    def _within_reach(self):
        """The files and directories that some state has, in the order they are met."""
        files, directories = {}, {self._root: None}
        queue = [self._root]
        for directory in queue:
            changed = [node for _, node, _, _ in directory.pending]
            for node in [*directory.durable.values(), *changed]:
                if isinstance(node, _File):
                    files[node] = None
                elif node not in directories:
                    directories[node] = None
                    queue.append(node)
        return list(files), list(directories)

    @staticmethod
    def _fates(file, chooser):
        """What may be in a file: what was synced, and of the rest all, a part, zeros, garbage."""
        kept, rest = file.synced, file.data[len(file.synced) :]
        start, end = sorted(chooser.randrange(len(rest) + 1) for _ in range(2))
        return [
            kept,
            kept + rest,
            kept + rest[: chooser.randrange(len(rest) + 1)],
            kept + bytes(len(rest)),
            kept + chooser.randbytes(len(rest)),
            kept + rest[:start] + bytes(end - start) + rest[end:],
        ]

    def _tree(self, contents, happened):
        tree: Tree = {}

        def walk(directory, prefix):
            entries = dict(directory.durable)
            for owner, change in happened:
                if owner is directory:
                    _apply(entries, change)
            for name, node in entries.items():
                if isinstance(node, _File):
                    tree[prefix + name] = contents.get(node, node.synced)
                else:
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")

        walk(self._root, "")
        return tree

    def _settle(self, directory):
        directory.durable, directory.pending = dict(directory.live), []

    def _at(self, path):
        node = self._root
        for part in path.split("/") if path else []:
            node = node.live[part]
        return node

    def _parent(self, path):
        parent, _, name = path.rpartition("/")
        return self._at(parent), name


def crash_everywhere(journal: Journal, limit: int, seed: int = 0) -> Iterator[tuple[Tree, list]]:
    """Yield each different (tree that may be left, marks before the crash), once.

    Power is lost before the first operation, between any two and after the last.
    """
    chooser = random.Random(seed)
    disk, seen = Disk(journal.before), set()
    for operation in [*journal.operations, None]:
        for tree in disk.states(limit, chooser):
            key = (frozenset(tree.items()), len(disk.marks))
            if key not in seen:
                seen.add(key)
                yield tree, list(disk.marks)
        if operation is not None:
            disk.do(operation)
