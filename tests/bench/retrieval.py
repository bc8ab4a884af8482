"""recall@k both ways over embeddings: in tiles, the way of CLIP_benchmark, and a plain top-k.

    python tests/bench/retrieval.py                      # 5,000 pictures x 25,000 captions, width 512
    python tests/bench/retrieval.py --large              # ours alone at 50,000 x 250,000; some minutes

CLIP_benchmark's way, as its description goes: the whole score matrix and a mask of the right answers as large; for each
k and each direction, in batches of 64 queries, the top k as one-hot rows over the whole gallery, counted where the mask
is true. "plain top-k" is what a careful user would write: the whole score matrix, one top-k of the largest k a
direction, and a look at whether the right answer is among the first k. Ours is eval.ranks: exact ranks of all queries,
from which every k, the median rank and the reciprocal rank follow. The fractions must be equal.
Memory is the peak of a process of its own beyond the embeddings.
"""

import sys
from functools import partial

import common
import torch

import eval as evaluation

KS = (1, 5, 10)


def embeddings(images, captions, width):
    """(image_embeds (I, E), text_embeds (N, E), the picture of each caption (N,)): captions near their picture."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=-1)
    picture = torch.arange(captions) * images // captions
    text_embeds = torch.randn(captions, width, generator=generator).div_(width**0.5)
    text_embeds += 0.15 * image_embeds[picture]
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), picture


def in_tiles(image_embeds, text_embeds, picture):
    ranks = evaluation.ranks(image_embeds, text_embeds, torch.arange(len(image_embeds)), picture)
    return [(rank <= k).float().mean().item() for rank in ranks for k in KS]


def one_hot_top_k(image_embeds, text_embeds, picture, at_once=64):
    scores = text_embeds @ image_embeds.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), picture] = True
    return [share_found(s, r, k, at_once) for s, r in ((scores.T, right.T), (scores, right)) for k in KS]


def share_found(scores, right, k, at_once):
    """The share of queries (rows) with a right answer among their k best."""
    found = []
    for some, mask in zip(scores.split(at_once), right.split(at_once)):
        best = torch.nn.functional.one_hot(some.topk(k, dim=1).indices, scores.shape[1])
        found.append((best * mask[:, None]).sum(dim=(1, 2)) > 0)
    return torch.cat(found).float().mean().item()


def plain_top_k(image_embeds, text_embeds, picture):
    scores = text_embeds @ image_embeds.T
    shares = []
    for best_right in (
        picture[scores.T.topk(max(KS), dim=1).indices] == torch.arange(len(image_embeds))[:, None],
        scores.topk(max(KS), dim=1).indices == picture[:, None],
    ):
        shares += [best_right[:, :k].any(dim=1).float().mean().item() for k in KS]
    return shares


WAYS = {"ours, in tiles": in_tiles, "CLIP_benchmark's way": one_hot_top_k, "plain top-k": plain_top_k}


def peak(name, *sizes):
    WAYS[name](*embeddings(64, 320, sizes[-1]))
    return common.peak_of(partial(WAYS[name], *embeddings(*sizes)))


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--large", action="store_true", help="50,000 x 250,000, ours alone, once")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time only")
    args = parser.parse_args(argv)
    names = list(WAYS)
    if args.large:
        args.images, args.captions, args.rounds, names = 50_000, 250_000, 1, names[:1]
    rates = common.print_head(args)
    sizes = args.images, args.captions, args.width
    flops = 2 * args.images * args.captions * args.width
    print(f"sizes    {args.images:,} pictures, {args.captions:,} captions, width {args.width}; one product of all "
          f"takes {flops / rates['fp32']:.1f} s at the measured rate")  # fmt: skip
    inputs, found = embeddings(*sizes), {}

    def way(name):
        found[name] = tuple(WAYS[name](*inputs))

    seconds = common.alternate({name: partial(way, name) for name in names}, args.rounds, warmup=0)
    assert len(set(found.values())) == 1, found
    equal = ": equal" if len(found) > 1 else ""
    print("recall   " + ", ".join(f"{value:.4f}" for value in found[names[0]]) + f" (k = {KS}, both ways){equal}")
    rows = []
    for name, took in seconds.items():
        ratio = f"{common.times_faster(took, seconds[names[0]]):.1f}" if name != names[0] else ""
        rows.append([name, f"{common.spread(took).median:.2f}", ratio])
        if args.memory:
            rows[-1].append(f"{common.in_child(peak, name, *sizes) / common.MEGABYTE:.0f}")
    common.print_table(["way", "seconds", "ours is x times as fast"] + ["extra MB"] * args.memory, rows)


if __name__ == "__main__":
    sys.exit(main())
