"""What index.json of prepared data holds, and refusing one that is not what hdl wrote.

Its names become paths, URLs and words of a command, and its hashes names in the cache, so nothing is taken from
it that could mean more there.
"""

import json
import re
from typing import Any

from hdl.errors import HdlError

FORMAT = "hdl-shards"
VERSION = 2
INDEX_FILE = "index.json"
INDEX_LIMIT = 64 * 2**20  # bytes; a hundred million samples' index is smaller
PREPARE_AGAIN = "run tools/prepare.py again with the same options to make it anew"
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def parse_index(data: bytes, shown: str) -> dict[str, Any]:
    """The index in these bytes, every record of it as expected. shown: its place, for errors."""
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HdlError(
            f"{shown}: not readable as JSON ({error}); {PREPARE_AGAIN} in an empty folder"
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise HdlError(f"{shown}: not an index of hdl shards; expected a folder made by tools/prepare.py")
    if index.get("version") != VERSION:
        raise HdlError(
            f"{shown}: shards of format version {index.get('version')}, this hdl reads version {VERSION}; "
            "prepare the images again into a new folder"
        )
    try:
        if not isinstance(index["base"]["fingerprint"] + index["dataset_hash"], str):
            raise TypeError("base.fingerprint and dataset_hash must be text")
        _check_record(index["samples"], "count")
        _check_record(index["empty_prompt"])
        for shard in index["shards"]:
            _check_record(shard, "samples")
        if not index["shards"]:
            raise ValueError("it lists no shards")
    except (KeyError, TypeError, ValueError) as error:
        raise HdlError(
            f"{shown}: not an index that hdl wrote ({type(error).__name__}: {error}); {PREPARE_AGAIN} in an empty "
            "folder"
        ) from None
    return index


def _check_record(record: dict[str, Any], count: str | None = None) -> None:
    name = record["file"]
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no file name")
    if not re.fullmatch("[0-9a-f]{64}", record["sha256"]):
        raise ValueError(f"{name} has sha256 {record['sha256']!r}")
    for number in ("bytes", *([count] if count else [])):
        if type(record[number]) is not int or not 0 < record[number] < 2**60:
            raise ValueError(f"{name} has {record[number]!r} {number}")


def shard_bytes(index: dict[str, Any]) -> dict[str, int]:
    """File name -> bytes."""
    return {shard["file"]: shard["bytes"] for shard in index["shards"]}
