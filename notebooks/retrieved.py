"""Draw what a model finds: captions of held-out images, and the images it puts first.

    python notebooks/retrieved.py runs/shapes notebooks/retrieved.png --queries 5

A green frame marks the image that the caption belongs to.
"""

import argparse
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import dualenc
import eval as evaluation

SIDE, GAP, TEXT_WIDTH = 96, 10, 240  # pixels


def draw_rows(captions, rows, right):
    """captions (Q), rows of images (Q x n), right (Q x n) booleans, to one PIL image."""
    font = ImageFont.load_default(size=15)
    width = TEXT_WIDTH + len(rows[0]) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (caption, images, marks) in enumerate(zip(captions, rows, right)):
        top = GAP + y * (SIDE + GAP)
        lines = "\n".join(textwrap.wrap(caption, 28)[:4])
        place = (GAP, top + SIDE // 2)
        draw.multiline_text(place, lines, fill="black", font=font, anchor="lm", spacing=6)
        for x, (image, mark) in enumerate(zip(images, marks)):
            square = ImageOps.pad(image.convert("RGB"), (SIDE - 6, SIDE - 6), color="white")
            framed = ImageOps.expand(square, 3, "green" if mark else "lightgray")
            sheet.paste(framed, (TEXT_WIDTH + x * (SIDE + GAP), top))
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("--queries", type=int, default=10, help="captions, spread evenly")
    parser.add_argument("--found", type=int, default=4, help="images a caption")
    args = parser.parse_args(argv)

    checkpoint = dualenc.find_folder(args.run)
    model = dualenc.DualEncoder.from_pretrained(checkpoint)
    data, _ = evaluation.open_data(evaluation.EvalConfig(), checkpoint)
    pairs = data["pairs"]
    captions, right = pairs.caption_table()
    chosen = [i * len(captions) // args.queries for i in range(args.queries)]
    image_embeds, _ = evaluation.embed_images(model, pairs.images)
    text_embeds = evaluation.embed_captions(model, [captions[n] for n in chosen])
    best = (text_embeds @ image_embeds.T).topk(args.found).indices.tolist()
    rows = [[pairs.images[i] for i in row] for row in best]
    cells = set(map(tuple, right.tolist()))
    marks = [[(i, n) in cells for i in row] for n, row in zip(chosen, best)]
    draw_rows([captions[n] for n in chosen], rows, marks).save(args.out)


if __name__ == "__main__":
    main()
