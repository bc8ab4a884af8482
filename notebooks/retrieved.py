"""Draw what a model finds: captions of held-out pictures, and the pictures it puts first.

    python notebooks/retrieved.py runs/shapes notebooks/retrieved.png --queries 5

A green frame marks the picture that the caption belongs to.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import dualenc
import eval as evaluation

SIDE, GAP, TEXT_WIDTH = 96, 10, 240  # pixels


def draw_rows(captions, rows, right):
    """captions (Q), rows of pictures (Q x n), right (Q x n) booleans, to one PIL picture."""
    font = ImageFont.load_default(size=15)
    width = TEXT_WIDTH + len(rows[0]) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (caption, pictures, marks) in enumerate(zip(captions, rows, right)):
        top = GAP + y * (SIDE + GAP)
        lines = "\n".join(textwrap.wrap(caption, 28)[:4])
        draw.multiline_text((GAP, top + SIDE // 2), lines, fill="black", font=font, anchor="lm", spacing=6)
        for x, (picture, mark) in enumerate(zip(pictures, marks)):
            left = TEXT_WIDTH + x * (SIDE + GAP)
            frame = ImageOps.expand(
                ImageOps.pad(picture, (SIDE - 6, SIDE - 6), color="white"), 3, "green" if mark else "lightgray"
            )
            sheet.paste(frame, (left, top))
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("--queries", type=int, default=10, help="captions, spread evenly over the held-out ones")
    parser.add_argument("--found", type=int, default=4, help="pictures a caption")
    args = parser.parse_args(argv)

    checkpoint, flags = evaluation.find_checkpoint(args.run)
    model = dualenc.DualEncoder.from_pretrained(checkpoint)
    options = {name: flags[name] for name in evaluation.DATA_FLAGS if name in flags and name != "templates"}
    pairs = dualenc.load_pairs(options.pop("data"), "test", **options)
    captions, text_groups, image_groups = pairs.caption_table()
    chosen = [i * len(captions) // args.queries for i in range(args.queries)]
    captions = [captions[i] for i in chosen]
    image_embeds = evaluation.embed_pictures(model, pairs.pictures)
    cosines = evaluation.embed_captions(model, captions) @ image_embeds.T
    best = torch.topk(cosines, args.found).indices.tolist()
    rows = [[pairs.pictures[i].convert("RGB") for i in row] for row in best]
    right = [[image_groups[i] == text_groups[query] for i in row] for query, row in zip(chosen, best)]
    draw_rows(captions, rows, right).save(args.out)


if __name__ == "__main__":
    main()
