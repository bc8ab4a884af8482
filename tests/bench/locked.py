"""Epochs with a locked vision tower: train.py --cache-features against transformers.

    python tests/bench/locked.py                                 # 2,500 images of noise
    python tests/bench/locked.py --preset small --images 320

Ours is the whole of train.py on a folder it sees for the first time. Theirs is a plain loop: images
through the processor once, kept in memory, vision tower frozen, bf16 autocast around model and
loss, AdamW. Two epochs are measured; the others count like the second.
"""

import contextlib
import io
import random
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
from PIL import Image

import dualenc
import train


def make_folder(folder, count):
    """Class folders train/ and test/ with count and ten JPEGs of noise."""
    for split, wanted in (("train", count), ("test", 10)):
        for i in range(wanted):
            path = folder / split / f"class {i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (32, 32), random.randbytes(3072)).save(path)


def our_run(preset, images, epochs):
    width, depth, heads = preset.text
    flags = f"--text-width {width} --text-depth {depth} --text-heads {heads} --lock vision"
    flags += f" --vision {preset.timm_name} --image-size {preset.image_size} --cache-features"
    flags += f" --batch-size {preset.batch} --epochs {epochs} --eval-every {10**9} --vision-args"
    args = [f"{name}={value}" for name, value in preset.timm_args.items()]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        make_folder(Path(scratch) / "data", images)
        files = ["--data", f"{scratch}/data", "--out", f"{scratch}/run"]
        train.main([*flags.split(), *args, *files])


def their_epoch(preset, pairs):
    """A function that trains an epoch of transformers' model with a frozen vision tower."""
    from transformers import ViTImageProcessor

    captions = dict.fromkeys(caption for several in pairs.captions for caption in several)
    processor = dualenc.Processor(None, dualenc.train_tokenizer(captions, common.VOCABULARY, 64))
    model = common.transformers_model(preset)
    model.vision_model.requires_grad_(False)
    size = {"height": preset.image_size, "width": preset.image_size}
    theirs = ViTImageProcessor(size=size)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, rng, pixels = torch.optim.AdamW(learning, lr=1e-4, fused=True), random.Random(0), []

    def epoch():
        for image in pairs.images if not pixels else ():
            pixels.append(theirs(image, return_tensors="pt")["pixel_values"][0])
        for batch in torch.randperm(len(pairs)).split(preset.batch):
            inputs = processor(text=[rng.choice(pairs.captions[i]) for i in batch])
            with torch.autocast("cpu", torch.bfloat16):
                images = torch.stack([pixels[i] for i in batch])
                loss = model(pixel_values=images, return_loss=True, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def main():
    parser = common.flag_parser(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    peers, preset = common.print_head(), common.PRESETS[args.preset]
    ours = {"ours": partial(our_run, preset, args.images, args.epochs)}
    seconds = common.alternate(ours, args.rounds, warmup=0)
    with tempfile.TemporaryDirectory() as scratch:
        make_folder(Path(scratch), args.images)
        pairs = dualenc.load_pairs(scratch, "train")
        if "transformers" in peers:
            first, later = common.alternate({"": their_epoch(preset, pairs)}, 2, warmup=0)[""]
            seconds["transformers"] = [first + (args.epochs - 1) * later] * args.rounds
    common.print_times(f"{args.images:,} images, {args.epochs} epochs", seconds)


if __name__ == "__main__":
    main()
