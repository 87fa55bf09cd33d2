"""What a plain loop does with an image. Alone in its file: worker processes import it, and it needs no torch."""

from PIL import Image


def open_convert_resize(job: tuple[str, int, int]) -> Image.Image:
    """job: path, width, height."""
    path, width, height = job
    return Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
