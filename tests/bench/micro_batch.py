"""A large batch in small pieces: gradient caching, plain accumulation, open_clip's scheme, and the batch at once.

    python tests/bench/micro_batch.py                        # 1,024 pairs in pieces of 64, tiny towers, float32
    python tests/bench/micro_batch.py --precision bf16

Each way fills the gradients of one and the same model of ours (forward, loss, backward; no update):

whole         the batch at once: the definition
cached        dualenc.cached_backward, which train.py --micro-batch uses
accumulated   the mean of the gradients of the pieces' own losses, as plain accumulation gives: another objective
open_clip's   as open_clip --accum-freq does it: all pieces embedded without a graph, then each piece once more with a
              graph, the loss of the whole batch each time; logit_scale collects its gradient once a piece

Memory is the peak of a process of its own, beyond model and batch. Errors are those of the gradient of all other
weights (norm of the difference over norm) and of logit_scale (ratio), both against "whole" in float32.
"""

import sys
from dataclasses import replace

import common
import torch

import dualenc

CPU = torch.device("cpu")


class Embed:
    """Pieces of a batch to embeddings of a model."""

    def __init__(self, model, precision):
        self.model, self.precision = model, precision

    def __call__(self, piece):
        images, inputs = piece
        with dualenc.autocast(CPU, self.precision):
            pixels = self.model.processor.image_transform.normalize(images)
            return self.model.encode_image(pixels), self.model.encode_text(**inputs)


def cut(images, inputs, size):
    """The batch in pieces of some pairs; each padded as far as the whole batch."""
    return [
        (images[start : start + size], {name: rows[start : start + size] for name, rows in inputs.items()})
        for start in range(0, len(images), size)
    ]


def whole(model, embed, pieces):
    images = torch.cat([images for images, _ in pieces])
    inputs = {name: torch.cat([inputs[name] for _, inputs in pieces]) for name in pieces[0][1]}
    dualenc.clip_loss(*embed((images, inputs)), model.logit_scale).backward()


def cached(model, embed, pieces):
    def loss_of(image_embeds, text_embeds):
        return dualenc.clip_loss(image_embeds, text_embeds, model.logit_scale)

    dualenc.cached_backward(embed, pieces, loss_of, [model.logit_scale])


def accumulated(model, embed, pieces):
    for piece in pieces:
        (dualenc.clip_loss(*embed(piece), model.logit_scale) / len(pieces)).backward()


def like_open_clip(model, embed, pieces):
    with torch.no_grad():
        known = [embed(piece) for piece in pieces]
    for number, piece in enumerate(pieces):
        mixed = [*known[:number], embed(piece), *known[number + 1 :]]
        dualenc.clip_loss(*(torch.cat(side) for side in zip(*mixed)), model.logit_scale).backward()


WAYS = {"whole": whole, "cached": cached, "accumulated": accumulated, "open_clip's": like_open_clip}


def make_way(name, preset, pairs, piece, precision):
    preset = replace(common.PRESETS[preset], batch=pairs)
    model = common.ours(preset)
    images, _, inputs = common.batch_of(preset, model.processor)
    pieces = cut(images, inputs, piece)

    def way():
        model.zero_grad()
        WAYS[name](model, Embed(model, precision), pieces)

    return model, way


def memory_and_gradients(name, *args):
    """(extra bytes, the gradient of all weights but logit_scale, that of logit_scale)."""
    _, small = make_way(name, args[0], 2 * args[2], args[2], args[3])
    small()  # what the first pass alone allocates is not the batch's
    model, way = make_way(name, *args)
    bytes_used = common.peak_of(way)
    grads = [w.grad.flatten() for key, w in model.named_parameters() if key != "logit_scale"]
    return bytes_used, torch.cat(grads).numpy(), model.logit_scale.grad.item()


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=2)
    parser.add_argument("--preset", choices=common.PRESETS, default="tiny")
    parser.add_argument("--pairs", type=int, default=1024, help="of the whole batch")
    parser.add_argument("--micro-batch", type=int, default=64, help="pairs of a piece")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time only")
    args = parser.parse_args(argv)
    common.print_head(args, rates=False)
    print(f"batch    {args.pairs:,} pairs in pieces of {args.micro_batch}, {args.preset} towers, {args.precision}")
    sizes = args.preset, args.pairs, args.micro_batch, args.precision
    ways = {name: make_way(name, *sizes)[1] for name in WAYS}
    seconds = common.alternate(ways, args.rounds, warmup=1)
    found = {}
    if args.memory:
        del ways
        found = {name: common.in_child(memory_and_gradients, name, *sizes) for name in WAYS}
    print_ways(seconds, found)


def print_ways(seconds, found):
    rows = []
    for name, took in seconds.items():
        time = common.spread(took)
        row = [name, f"{time.median:.2f}", f"{common.times_faster(took, seconds['whole']):.2f}"]
        if found:
            (memory, grad, scale), (most, right, right_scale) = found[name], found["whole"]
            error = ((grad - right) ** 2).sum() ** 0.5 / (right**2).sum() ** 0.5
            cosine = (grad * right).sum() / ((grad**2).sum() * (right**2).sum()) ** 0.5
            row += [f"{memory / common.MEGABYTE:,.0f}", f"{memory / most:.2f}", f"{error:.1e}", f"{cosine:.3f}"]
            row.append(f"{scale / right_scale:.5f}")
        rows.append(row)
    titles = ["way", "seconds", "time of whole"]
    memory = ["extra MB", "of whole", "gradient off by", "cosine", "logit_scale's, times"]
    common.print_table(titles + memory * bool(found), rows)


if __name__ == "__main__":
    sys.exit(main())
