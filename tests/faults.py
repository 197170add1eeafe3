"""A storage that fails where it is told to, and forgets what was not synced when power is lost."""

import errno
import os
from contextlib import suppress
from functools import partial

from truestep.storage import LOCAL

FAULTS = ["disk full", "error after the effect", "short write", "death", "power loss"]


class Died(BaseException):
    """The process is gone: no operation after this one has any effect."""


class FaultyStorage:
    """The local file system, failing at one operation; it can write a byte at a time.

    Of a power loss remains: of each unsynced file its first half, no unsynced directory entry.
    """

    def __init__(self, fail_at=None, fault=None, largest_write=2**30):
        self.fail_at, self.fault, self.largest_write = fail_at, fault, largest_write
        self.operations = []
        self._dead = False
        self._unsynced_files = {}  # descriptor -> a second one, kept open
        self._unsynced_entries = []  # (identity of the directory, how to undo)

    def _perform(self, name, operation, *arguments):
        if self._dead:
            raise Died
        self.operations.append(name)
        if len(self.operations) - 1 != self.fail_at:
            return operation(*arguments)
        if self.fault == "disk full":
            raise OSError(errno.ENOSPC, "injected")
        if self.fault == "short write":
            if name != "write":
                return operation(*arguments)
            operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(errno.EIO, "injected")
        if self.fault == "error after the effect":
            operation(*arguments)
            raise OSError(errno.EIO, "injected")
        self._dead = True
        if name == "write":  # dies half-way
            operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if name == "remove" and arguments[0].is_dir():
            next(arguments[0].iterdir()).unlink()
        raise Died

    def make_directory(self, path):
        self._perform("make_directory", partial(path.mkdir, parents=True, exist_ok=True))

    def create(self, path):
        descriptor = self._perform("create", LOCAL.create, path)
        self._unsynced_files[descriptor] = os.dup(descriptor)
        directory = os.open(path.parent, os.O_RDONLY)
        undo = partial(os.unlink, path.name, dir_fd=directory)
        self._unsynced_entries.append((_identity(path.parent), undo))
        return descriptor

    def write(self, descriptor, data):
        return self._perform("write", LOCAL.write, descriptor, data[: self.largest_write])

    def sync(self, descriptor):
        def settle(descriptor):
            os.close(self._unsynced_files.pop(descriptor))

        self._perform("sync", settle, descriptor)

    def close(self, descriptor):
        self._perform("close", LOCAL.close, descriptor)

    def rename(self, source, target):
        replaced = target.read_bytes() if target.is_file() else None

        def undo():
            target.rename(source)
            if replaced is not None:
                target.write_bytes(replaced)

        self._perform("rename", LOCAL.rename, source, target)
        self._unsynced_entries.append((_identity(target.parent), undo))

    def sync_directory(self, path):
        def settle(path):
            kept = [entry for entry in self._unsynced_entries if entry[0] != _identity(path)]
            self._unsynced_entries = kept

        self._perform("sync_directory", settle, path)

    def remove(self, path):
        self._perform("remove", LOCAL.remove, path)

    def lose_power(self):
        """Undo what was never synced, the latest first."""
        for descriptor in self._unsynced_files.values():
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.close(descriptor)
        for _, undo in reversed(self._unsynced_entries):
            with suppress(FileNotFoundError):  # removed since
                undo()


def _identity(path):
    status = path.stat()
    return status.st_dev, status.st_ino
