"""Manifests as an attacker writes them: well-formed, sealed, and saying whatever they like."""

import hashlib
import json
import zlib

from truestep.manifest import MANIFEST
from truestep.storage import FileRecord

BLOCK = 2**20


def record_of(data):
    """The record of a file's bytes, computed apart from the code that writes files."""
    blocks = tuple(zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK))
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), blocks)


def sealed(manifest):
    """The text of a manifest whose seal is right."""
    content = {key: value for key, value in manifest.items() if key != "content_sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "content_sha256": digest})


def reseal(directory, **changes):
    """Write a manifest that vouches for whatever the directory holds now."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"] = {
        name: vars(record_of((directory / name).read_bytes())) for name in manifest["files"]
    }
    (directory / MANIFEST).write_text(sealed(manifest | changes))
