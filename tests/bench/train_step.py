"""One whole training step, here and in transformers and open_clip: equal towers, batch, precision.

    python tests/bench/train_step.py                             # 32 pixels, batch 128
    python tests/bench/train_step.py --preset small --rounds 5   # ViT-S/16 at 224 pixels; minutes

Ours is a step of train.train, from uint8 images and captions. The peers start from ready pixels and
token ids and do what transformers' Trainer and open_clip's train_one_epoch do. All keep freed
memory, which the peers by themselves do not.
"""

import math
from pathlib import Path
from unittest import mock

import common
import torch

import dualenc
import train


def our_step(preset, precision):
    model, (images, captions, _) = common.our_model(preset), common.batch_of(preset)
    B = len(images)
    config = train.TrainConfig(batch_size=B, steps=1, eval_every=1, precision=precision)
    optimizer = train.make_optimizer(model, config)
    pairs = dualenc.Pairs([str(i) for i in range(B)], range(B), [[]] * B)
    run = train.Run(Path(), pairs, pairs, (), {})
    left_out = dict.fromkeys(("evaluate", "save_checkpoint", "log"), lambda *_: None)

    def step():
        state = {"step": 0, "best": None, "skipped_steps": 0, "sums": {}}
        batches = [(images, list(range(B)), captions)]
        with mock.patch.multiple(train, fetch=lambda *_: batches, **left_out):
            train.train(config, run, model, optimizer, state)

    return step


def transformers_step(preset, precision):
    model, (images, _, inputs) = common.transformers_model(preset), common.batch_of(preset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    pixels = images / 127.5 - 1

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(pixel_values=pixels, return_loss=True, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def open_clip_step(preset, precision):
    from open_clip.loss import ClipLoss

    model, (images, _, inputs) = common.open_clip_model(preset), common.batch_of(preset)
    groups = [{"params": [], "weight_decay": 0.2}, {"params": [], "weight_decay": 0.0}]
    for name, weight in model.named_parameters():
        groups[weight.ndim < 2 or "ln" in name]["params"].append(weight)
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    pixels = images / 127.5 - 1

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = ClipLoss()(**model(pixels, inputs["input_ids"]))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step


STEPS = {"ours": our_step, "transformers": transformers_step, "open_clip": open_clip_step}


def main():
    args = common.flag_parser(__doc__, rounds=9).parse_args()
    names, preset = ["ours", *common.print_head()], common.PRESETS[args.preset]
    print(f"preset   {args.preset}: batch {preset.batch}, {preset.image_size} pixels")
    train.prepare_cpu()
    ways = {f"{n} {p}": STEPS[n](preset, p) for p in ("bf16", "fp32") for n in names}
    seconds = common.alternate(ways, args.rounds)
    for precision in ("bf16", "fp32"):
        common.print_times("step", {name: seconds[name] for name in ways if precision in name})


if __name__ == "__main__":
    main()
