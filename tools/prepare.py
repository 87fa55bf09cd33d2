"""Turn a folder of images with .txt captions into shards to train on; see hdl/data/prepare.py.

python tools/prepare.py IMAGES OUT --base CHECKPOINT --trigger "kotonia style"
"""

import argparse
import os

from hdl.errors import HdlError, command_line


def main() -> None:
    # Here, not above: every decoding process imports this file again and can do without torch.
    from hdl.data.captions import CaptionOptions, parse_descriptors
    from hdl.data.prepare import Options, describe, prepare

    args = arguments()
    captions = CaptionOptions(
        trigger=args.trigger,
        trigger_styles=tuple(args.trigger_styles),
        trigger_tags=tuple(args.trigger_tags),
        style_descriptors=parse_descriptors(args.style_descriptor, "--style-descriptor"),
        tag_descriptors=parse_descriptors(args.tag_descriptor, "--tag-descriptor"),
        orders=args.shuffle_sentences,
    )
    options = Options(
        tuple(args.area), args.allow_upscaling, captions, args.crops, tuple(args.keep_direction)
    )
    summary = prepare(
        args.images,
        args.out,
        args.base,
        config_from=args.config_from,
        random_init=args.random_init,
        options=options,
        workers=args.workers,
    )
    print(describe(summary))
    if args.report:
        from hdl.survey.report import write_report_page

        try:
            print(f"curation report: {write_report_page(summary, options.sizes.areas, args.workers)}")
        except OSError as error:
            raise HdlError(
                f"{args.out}: the shards are complete, but no report.html could be written there "
                f"({error.strerror}); make room, and run again"
            ) from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn a folder of images with .txt captions into shards to train on."
    )
    parser.add_argument(
        "images",
        help="folder of images in any depth, each with a .txt caption of the same name beside it (a.png: a.txt, "
        "further captions a.1.txt, a.2.txt, …; for editing the source images a.ref.png or a.ref1.png, a.ref2.png, …); "
        "optionally styles.json: file name -> style or {style, tags}",
    )
    parser.add_argument(
        "out", help="folder for the shards; run again with the same one to redo only what changed"
    )
    parser.add_argument(
        "--base", required=True, help="O1 checkpoint: published folder or single .safetensors file"
    )
    parser.add_argument(
        "--config-from", metavar="DIR", help="folder with config.json and tokenizer, for a single file"
    )
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="BASE is a folder with only config.json and tokenizer; draw the weights (speed tests)",
    )
    parser.add_argument(
        "--area",
        type=int,
        nargs="+",
        default=[1024],
        metavar="PX",
        help="images get at most the area of a square of this side; of several, a sample each; default 1024 "
        "(O1's own: 2048)",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=0,
        metavar="N",
        help="N further samples of each image: windows of 50 to 90%% of its sides (not of pairs for editing)",
    )
    parser.add_argument(
        "--keep-direction",
        nargs="*",
        default=["text"],
        metavar="TAG",
        help="images with one of these tags are marked as not to be mirrored, as are those whose captions quote or "
        "mention words, signs or logos, or left or right; default: text",
    )
    parser.add_argument(
        "--shuffle-sentences",
        type=int,
        default=0,
        metavar="N",
        help="up to N further captions of each: its sentences in other orders",
    )
    parser.add_argument(
        "--allow-upscaling",
        action="store_true",
        help="enlarge images smaller than the area instead of giving them a smaller bucket",
    )
    parser.add_argument("--trigger", metavar="PHRASE", help="put in front of every caption that lacks it")
    parser.add_argument(
        "--trigger-styles",
        nargs="+",
        default=[],
        metavar="STYLE",
        help="only images of these styles get the trigger",
    )
    parser.add_argument(
        "--trigger-tags",
        nargs="+",
        default=[],
        metavar="TAG",
        help="only images with one of these tags get the trigger",
    )
    parser.add_argument(
        "--style-descriptor",
        action="append",
        default=[],
        metavar="STYLE=WORDS",
        help="words put behind the captions of this style's images; may be repeated",
    )
    parser.add_argument(
        "--tag-descriptor",
        action="append",
        default=[],
        metavar="TAG=WORDS",
        help="words put behind the captions of images with this tag; may be repeated",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, len(os.sched_getaffinity(0))),
        metavar="N",
        help="processes that decode images; 0 decodes in this one; default: one a core, 8 at most",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write OUT/report.html: duplicates, blur, sizes, buckets, tags, caption lengths, with thumbnails",
    )
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
