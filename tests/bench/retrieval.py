"""recall@k both ways over embeddings: eval.ranks, and CLIP_benchmark's way.

    python tests/bench/retrieval.py                              # 5,000 images x 25,000 captions
    python tests/bench/retrieval.py --images 50000 --rounds 1    # ours alone; minutes

Five captions an image, width 512. CLIP_benchmark's way: the whole score matrix, a mask of right
answers, and the top k of 64 queries as one-hot rows over the gallery, for each k and direction.
"""

from functools import partial

import common
import torch
import torch.nn.functional as F

import eval as evaluation

KS = (1, 5, 10)


def embeddings(images):
    """(image_embeds (I, E), text_embeds (N, E), the image of each caption (N,))."""
    torch.manual_seed(0)
    image_embeds = F.normalize(torch.randn(images, 512), dim=-1)
    image = torch.arange(5 * images) // 5
    text_embeds = torch.randn(5 * images, 512) / 512**0.5 + 0.15 * image_embeds[image]
    return image_embeds, F.normalize(text_embeds, dim=-1), image


def our_ranks(image_embeds, text_embeds, image):
    right = torch.stack([image, torch.arange(len(image))], dim=1)
    found = evaluation.ranks(image_embeds, text_embeds, right)
    return [(ranks <= k).float().mean().item() for ranks in found for k in KS]


def one_hot_top_k(image_embeds, text_embeds, image):
    scores = text_embeds @ image_embeds.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), image] = True

    def recall(scores, right, k):
        found = []
        for rows, mask in zip(scores.split(64), right.split(64)):
            best = F.one_hot(rows.topk(k, dim=1).indices, scores.shape[1])
            found.append((best * mask[:, None]).sum(dim=(1, 2)) > 0)
        return torch.cat(found).float().mean().item()

    return [recall(s, r, k) for s, r in ((scores.T, right.T), (scores, right)) for k in KS]


WAYS = {"ours": our_ranks, "CLIP_benchmark's way": one_hot_top_k}


def peak(name, images):
    WAYS[name](*embeddings(64))
    return common.peak_megabytes(partial(WAYS[name], *embeddings(images)))


def main():
    parser = common.flag_parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=5000)
    args = parser.parse_args()
    common.print_head()
    inputs, found = embeddings(args.images), {}

    def way(name):
        found[name] = tuple(WAYS[name](*inputs))

    names = list(WAYS) if args.images <= 10_000 else ["ours"]
    seconds = common.alternate({name: partial(way, name) for name in names}, args.rounds, warmup=0)
    assert len(set(found.values())) == 1, found
    print(f"recall   {', '.join(f'{share:.4f}' for share in found['ours'])} (k = {KS}, both ways)")
    memory = {name: [f"{common.in_child(peak, name, args.images):.0f}"] for name in names}
    common.print_times(f"{args.images:,} images", seconds, ["extra MB"], memory)


if __name__ == "__main__":
    main()
