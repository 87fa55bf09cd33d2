"""What an adapter's file says about itself, in the metadata of its safetensors header: strings by name.

    hdl.format_version, hdl.version          of these names, and of the hdl that trained it
    hdl.base_fingerprint, hdl.dataset_hash   what it was trained on (Checkpoint.fingerprint, Shards.dataset_hash)
    ss_steps, ss_network_dim, ss_network_alpha, ss_network_module, ss_base_model_version
                                             as kohya's trainers name them; "Dynamic" where modules differ
    modelspec.*                              https://github.com/Stability-AI/ModelSpec 1.0.0: title, architecture,
                                             implementation, and where given trigger_phrase, license

There is no date unless somebody gives one as modelspec.date: the same run writes the same bytes.
"""

from collections.abc import Iterable
from importlib.metadata import version

ARCHITECTURE = "hidream_o1_image"  # as musubi-tuner calls it
BASE, DATASET = "hdl.base_fingerprint", "hdl.dataset_hash"
STEPS, TRIGGER, LICENSE, TITLE = (
    "ss_steps",
    "modelspec.trigger_phrase",
    "modelspec.license",
    "modelspec.title",
)
RANK, ALPHA = "ss_network_dim", "ss_network_alpha"


def describe(
    *,
    title: str,
    base: str | None = None,
    dataset: str | None = None,
    steps: int | None = None,
    trigger: str | None = None,
    license: str | None = None,
) -> dict[str, str]:
    """Metadata of a trained adapter; what is None or empty is left out. Rank and alpha are added when it is written.

    base: the checkpoint's fingerprint; dataset: the shards' hash; license: as its maker gives it, unchecked.
    """
    given = {BASE: base, DATASET: dataset, STEPS: steps, TRIGGER: trigger, LICENSE: license}
    return {
        "hdl.format_version": "1",
        "hdl.version": version("hdl"),
        "ss_base_model_version": ARCHITECTURE,
        "ss_network_module": "networks.lora_hidream_o1",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURE}/lora",
        "modelspec.implementation": "https://github.com/HiDream-ai/HiDream-O1-Image",
        TITLE: title,
        **{name: str(value) for name, value in given.items() if value not in (None, "")},
    }


def sizes(ranks: Iterable[int], alphas: Iterable[float]) -> dict[str, str]:
    """Rank and alpha as metadata has them."""
    return {RANK: _common(ranks), ALPHA: _common(alphas)}


def _common(values: Iterable[float]) -> str:
    found = set(values)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"
