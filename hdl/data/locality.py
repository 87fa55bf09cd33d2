"""Whether the shards that a run mixes at a time fit into the cache that they are fetched into."""

import math

from hdl.config import Data
from hdl.data.elsewhere import Elsewhere
from hdl.data.mixture import Mixture

GIB = 2**30


def what_thrashes(data: Data, mixture: Mixture) -> str | None:
    """A warning where samples are mixed over more bytes of shards from elsewhere than their cache holds, so that
    most of them would wait for a whole shard to be fetched again; None where all is well, or all shards are here."""
    homes = [source.shards.home for source in mixture.sources]
    remote = [home for home in homes if isinstance(home, Elsewhere)]
    sizes = [record["bytes"] for home in remote for record in home.records.values()]
    room = data.cache_gib * GIB - sum(home.lists for home in remote)
    mixed = len(sizes) if data.window is None else min(data.window, len(sizes))
    total = sum(sorted(sizes)[-mixed:]) if mixed else 0
    if total <= room:
        return None
    said = (
        f"data.window is unset, so samples are mixed over all {mixed:,} shards from elsewhere"
        if data.window is None
        else f"data.window {data.window} mixes samples over {mixed:,} shards from elsewhere at a time"
    )
    window = max(1, int(room / max(sizes) / 2))  # as many again are fetched meanwhile
    return (
        f"warning: {said} ({total / GIB:,.3g} GiB), of which data.cache_gib {data.cache_gib:g} holds "
        f"{max(room, 0) / total:.0%}: most samples will wait for a whole shard to be fetched again. Set data.window "
        f"{window}, or data.cache_gib {math.ceil((total + data.cache_gib * GIB - room) / GIB)} or more"
    )
