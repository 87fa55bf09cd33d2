"""A shard is, to the byte, the tar that webdataset's own writer makes."""

import io
from collections.abc import Callable
from pathlib import Path

import webdataset

from hdl.data.prepare import Summary
from hdl.data.shards import Shards
from tests.data.image_folders import noise, put


def test_shards_are_the_tars_that_webdataset_writes(images: Path, run: Callable[..., Summary]) -> None:
    for i in range(3):
        put(images, f"{i}.png", f"thing {i}", noise(64, 32 + 32 * i))
    out = run().out
    infos = Shards(out).infos
    shard = (out / infos[0].shard).read_bytes()
    file = io.BytesIO()
    writer = webdataset.TarWriter(file, encoder=False, mtime=0)
    for sample in webdataset.WebDataset([str(out / infos[0].shard)], shardshuffle=False):
        writer.write({name: sample[name] for name in ("__key__", "json", "safetensors")})
    writer.close()
    assert shard == file.getvalue()
