"""The contrastive loss alone, forward and backward: tiled, the textbook, transformers' and open_clip's.

    python tests/bench/loss.py                                  # B = 1,024 to 8,192
    python tests/bench/loss.py --sizes 16384 32768 --rounds 1   # ours alone: the others stop at --others-up-to

Unit-norm rows of --width float32 numbers with gradients for both sides and logit_scale. Times come from alternating
rounds in one process: --rounds at --others-up-to pairs, twice as many at half of that, and so on. Extra memory is the
peak of a process of its own, beyond the embeddings and what a small call left behind; the gradients of the embeddings
(2 B E numbers) are part of it. All ways must give the same loss.

The other losses that train.py tiles, SigLIP's and the multi-positive one, are compared with their textbooks at --sizes
of at most 4,096.
"""

import sys
from functools import partial

import common
import torch

import dualenc

WAYS = ("tiled", "textbook", "transformers", "open_clip")
PAIRS_A_GROUP = 10  # of the multi-positive loss


def transformers_loss(image_embeds, text_embeds, logit_scale):
    from transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder import (
        image_text_contrastive_loss,
    )

    return image_text_contrastive_loss(torch.matmul(text_embeds, image_embeds.t()) * logit_scale.exp())


def open_clip_loss(image_embeds, text_embeds, logit_scale):
    from open_clip.loss import ClipLoss

    return ClipLoss()(image_embeds, text_embeds, logit_scale.exp())


def groups(image_embeds):
    return torch.arange(len(image_embeds)) // PAIRS_A_GROUP


BIAS = torch.tensor(-10.0, requires_grad=True)
LOSSES = {
    "tiled": dualenc.tiled_clip_loss,
    "textbook": dualenc.clip_loss,
    "transformers": transformers_loss,
    "open_clip": open_clip_loss,
    "tiled SigLIP": lambda *embeds: dualenc.tiled_siglip_loss(*embeds, BIAS),
    "textbook SigLIP": lambda *embeds: dualenc.siglip_loss(*embeds, BIAS),
    "tiled multi-positive": lambda *embeds: dualenc.tiled_multi_positive_clip_loss(*embeds, groups(embeds[0])),
    "textbook multi-positive": lambda *embeds: dualenc.multi_positive_clip_loss(*embeds, groups(embeds[0])),
}


def leaves(size, width):
    """Image and text embeddings and logit_scale, with gradients."""
    generator = torch.Generator().manual_seed(0)
    embeds = (torch.randn(size, width, generator=generator) for _ in range(2))
    return [*(torch.nn.functional.normalize(rows, dim=-1).requires_grad_() for rows in embeds),
            torch.tensor(dualenc.LOGIT_SCALE_INIT, requires_grad=True)]  # fmt: skip


def forward_backward(name, inputs):
    for leaf in inputs:
        leaf.grad = None
    loss = LOSSES[name](*inputs)
    loss.backward()
    return loss.item()


def peaks(name, sizes, width):
    """Extra bytes of forward and backward at each size."""
    forward_backward(name, leaves(256, width))  # imports, threads, workspaces of the product
    found = []
    for size in sizes:
        inputs = leaves(size, width)
        found.append(common.peak_of(partial(forward_backward, name, inputs)))
    return found


def compare(ways, size, args):
    """{way: seconds of each round} at one size, after making sure that all give one loss."""
    inputs = leaves(size, args.width)
    values = {name: forward_backward(name, inputs) for name in ways}  # also the warm-up
    assert max(values.values()) - min(values.values()) < 1e-4 * max(values.values()), values
    rounds = args.rounds * max(1, args.others_up_to // size)  # a short time varies more
    return common.alternate({name: partial(forward_backward, name, inputs) for name in ways}, rounds, warmup=0)


def print_sizes(ways_of, baseline, args):
    """A table of time, ratio to the baseline and extra memory; ways_of gives the ways to compare at a size."""
    sizes = {}
    for size in args.sizes:
        for name in ways_of(size):
            sizes.setdefault(name, []).append(size)
    memory = {}
    if args.memory:
        memory = {name: dict(zip(of, common.in_child(peaks, name, of, args.width))) for name, of in sizes.items()}
    rows = []
    for size in args.sizes:
        seconds = compare(ways_of(size), size, args)
        for name, took in seconds.items():
            row = [f"{size:,}", name, f"{common.spread(took).median:.3f}"]
            row.append(f"{common.times_faster(took, seconds[baseline]):.2f}" if name != baseline else "")
            if args.memory:
                row.append(f"{memory[name][size] / common.MEGABYTE:.0f}")
            rows.append(row)
    titles = ["pairs", "loss", "seconds", f"{baseline} is x times as fast"]
    common.print_table(titles + ["extra MB"] * args.memory, rows)


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="pairs")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--others-up-to", type=int, default=8192, help="largest size that holds B x B scores")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time only")
    args = parser.parse_args(argv)
    common.print_head(args)
    libraries = common.available(WAYS[2:])
    clip = [name for name in WAYS if name in WAYS[:2] or name in libraries]
    print_sizes(lambda size: clip if size <= args.others_up_to else ["tiled"], "tiled", args)
    args.sizes = [size for size in args.sizes if size <= 4096][-1:]
    for loss in ("SigLIP", "multi-positive") if args.sizes else ():
        print_sizes(lambda size, loss=loss: [f"tiled {loss}", f"textbook {loss}"], f"tiled {loss}", args)


if __name__ == "__main__":
    sys.exit(main())
