"""Caption a folder of images with a vision-language model, for training; see hdl/caption/run.py.

python tools/caption.py IMAGES --trigger "kotonia style" --tag-descriptor nsfw="explicit content"
torchrun --nproc_per_node=8 tools/caption.py IMAGES --config caption.toml
"""

import argparse
from pathlib import Path

from hdl.errors import HdlError, command_line


def main() -> None:
    from hdl.caption.settings import load_settings
    from hdl.data.captions import parse_descriptors

    flags = vars(arguments())
    images, config = Path(flags.pop("images")), flags.pop("config")
    sheet, overwrite = flags.pop("sheet"), flags.pop("overwrite")
    try:
        for name in {"style_descriptors", "tag_descriptors"} & flags.keys():
            flags[name] = parse_descriptors(flags[name], f"--{name[:-1].replace('_', '-')}")
        settings = load_settings(config, flags)
    except HdlError as error:
        raise HdlError(str(error), on_all_ranks=True) from None
    from hdl.caption.run import caption  # torch takes seconds to import
    from hdl.caption.summary import describe

    summary = caption(images, settings, sheet, overwrite)
    if summary:
        lines = [*describe(summary), f"images with their captions, to look through: {summary.sheet}"]
        print("\n".join(lines).encode(errors="backslashreplace").decode())  # file names need not be UTF-8


def arguments() -> argparse.Namespace:
    """The flags that were given; those not given are left to the config and its defaults."""
    parser = argparse.ArgumentParser(
        description="Write a .txt caption beside every image of a folder, by a vision-language model that runs "
        "here or on a server. Run again to go on where it stopped; captions edited by hand are left alone.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "images",
        help="folder of images in any depth; optionally styles.json: file name -> style or {style, tags}",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="TOML",
        help="prompt, rules and all other settings (hdl/caption/settings.py); flags override it",
    )
    parser.add_argument(
        "--model", help="folder or hub name, or the server's name of it; default google/gemma-4-E4B-it"
    )
    parser.add_argument("--server", metavar="URL", help="OpenAI-compatible server, up to and with /v1")
    parser.add_argument("--bits", type=int, metavar="4", help="load the weights in 4 bits (needs a GPU)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images a forward takes, or requests at once; default 4"
    )
    parser.add_argument("--max-side", type=int, metavar="PX", help="shrink images to this; default 1024")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; default 400")
    parser.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="of drawn answers; default 0")
    parser.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="further ones go to NAME.1.txt, NAME.2.txt, ...; needs a temperature",
    )
    parser.add_argument("--trigger", metavar="PHRASE", help="put in front of every caption")
    parser.add_argument(
        "--style-descriptor",
        dest="style_descriptors",
        action="append",
        metavar="STYLE=WORDS",
        help="words put behind the captions of this style's images; may be repeated",
    )
    parser.add_argument(
        "--tag-descriptor",
        dest="tag_descriptors",
        action="append",
        metavar="TAG=WORDS",
        help="words put behind the captions of images with this tag; may be repeated",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=False,
        help="replace captions written or edited by hand, too",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        default=None,
        metavar="HTML",
        help="images with captions, to look through; default IMAGES.captions.html beside the folder",
    )
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
