"""The contrastive loss alone, forward and backward: tiled, the textbook's, and both libraries'.

    python tests/bench/loss.py                                  # B = 1,024 to 8,192
    python tests/bench/loss.py --sizes 16384 32768 --rounds 1   # ours alone from 16,384 on

Float32 rows of width 512. Memory is the peak of a process of its own, gradients included.
"""

import common
import torch

import dualenc


def transformers_loss(image_embeds, text_embeds, logit_scale):
    from transformers.models.vision_text_dual_encoder import modeling_vision_text_dual_encoder

    loss = modeling_vision_text_dual_encoder.image_text_contrastive_loss
    return loss(torch.matmul(text_embeds, image_embeds.t()) * logit_scale.exp())


def open_clip_loss(image_embeds, text_embeds, logit_scale):
    from open_clip.loss import ClipLoss

    return ClipLoss()(image_embeds, text_embeds, logit_scale.exp())


LOSSES = {"tiled": dualenc.tiled_clip_loss, "textbook": dualenc.clip_loss}
LOSSES |= {"transformers": transformers_loss, "open_clip": open_clip_loss}


def make_way(name, size):
    """A function that computes loss and gradients, and returns the loss."""
    rows = torch.randn(2, size, 512, generator=torch.Generator().manual_seed(0))
    leaves = [*torch.nn.functional.normalize(rows, dim=-1), torch.tensor(dualenc.LOGIT_SCALE_INIT)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def way():
        for leaf in leaves:
            leaf.grad = None
        loss = LOSSES[name](*leaves)
        loss.backward()
        return loss.item()

    return way


def peak(name, size):
    make_way(name, 256)()  # imports, threads, workspaces of the product
    return common.peak_megabytes(make_way(name, size))


def main():
    parser = common.flag_parser(__doc__, rounds=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    args = parser.parse_args()
    names = ["tiled", "textbook", *common.print_head()]
    for size in args.sizes:
        chosen = names if size <= 8192 else names[:1]  # the others hold B x B scores
        ways = {name: make_way(name, size) for name in chosen}
        values = [way() for way in ways.values()]  # also the warm-up
        assert max(values) - min(values) < 1e-4 * max(values), values
        rounds = args.rounds * max(1, min(8, 8192 // size))  # short times vary more
        seconds = common.alternate(ways, rounds, warmup=0)
        memory = {name: [f"{common.in_child(peak, name, size):.0f}"] for name in ways}
        common.print_times(f"{size:,} pairs", seconds, ["extra MB"], memory)


if __name__ == "__main__":
    main()
