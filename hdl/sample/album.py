"""Prompts x seeds down, adapters x strengths across: what is drawn, and where it goes.

Every picture is a PNG that says in its metadata what it was drawn from (`prompt`, and `hdl` as JSON); all
together are grid.png.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from hdl.adapter.stack import Weighted, check_weight
from hdl.errors import HdlError
from hdl.sample.draw import Drawing, Wanted
from hdl.sample.generate import SamplerSettings
from hdl.sample.grid import as_tensor, picture_grid


@dataclass(frozen=True)
class Column:
    """Adapters that are on together. weights: name -> weight."""

    label: str
    weights: Mapping[str, float]


def columns_of(loras: Mapping[str, Weighted], strengths: Sequence[float], compare: bool) -> list[Column]:
    """All adapters together at each strength, which multiplies their weights; with `compare` first none of them,
    then, of several, each alone. HdlError for a strength of zero or no finite number."""
    for strength in strengths:
        check_weight("strength", strength)
    columns = []
    if compare or not loras:
        columns.append(Column("no adapter", {}))
    if compare and len(loras) > 1:
        columns += [Column(f"{name} {lora.weight:g}", {name: lora.weight}) for name, lora in loras.items()]
    if loras:
        for strength in strengths:
            weights = {name: lora.weight * strength for name, lora in loras.items()}
            label = " + ".join(f"{name} {weight:g}" for name, weight in weights.items())
            columns.append(Column(label, weights))
    return columns


class Album:
    """Pictures to be drawn into a folder. HdlError where a picture of the same name is already there."""

    def __init__(
        self, out: Path, prompts: Sequence[str], seeds: Sequence[int], columns: Sequence[Column],
        *, width: int, height: int, references: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self.out, self.columns = out, columns
        self.rows = [(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]
        # Column by column, so that adapters are switched once a column and neighbours are drawn together.
        self.wanted = [
            Wanted(prompt, seed, height, width, column.weights, tuple(references))
            for column in columns
            for _, prompt, seed in self.rows
        ]
        taken = [path for path in (*self._files(), out / "grid.png") if path.exists()]
        if taken:
            raise HdlError(f"{taken[0]} is already there; nothing was drawn. Name another folder")

    def save(self, drawings: Sequence[Drawing], settings: SamplerSettings, about: Mapping[str, Any]) -> None:
        """Write the drawings of `wanted` and their grid. about: what else their metadata say."""
        self.out.mkdir(parents=True, exist_ok=True)
        for file, drawing in zip(self._files(), drawings):
            wanted = asdict(drawing.wanted)
            wanted["references"] = [str(path) for path in drawing.wanted.references]
            info = PngInfo()
            info.add_itxt("prompt", drawing.prompt)
            described = {**wanted, "settings": asdict(settings), **about}
            info.add_itxt("hdl", json.dumps(described, ensure_ascii=False))
            drawing.image.save(file, pnginfo=info)
        count = len(self.rows)
        grid = [
            [as_tensor(drawings[c * count + r].image) for c in range(len(self.columns))] for r in range(count)
        ]
        labels = [f"seed {seed}: {prompt}" for _, prompt, seed in self.rows]
        picture_grid(grid, [column.label for column in self.columns], labels).save(self.out / "grid.png")

    def _files(self) -> list[Path]:
        several = len(self.columns) > 1
        return [
            self.out / (f"{i:03d}-seed{seed}" + (f"-{c}" if several else "") + ".png")
            for c in range(len(self.columns))
            for i, _, seed in self.rows
        ]
