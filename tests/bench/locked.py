"""Epochs with a locked vision tower: features kept by train.py --cache-features, against the peers' frozen towers.

    python tests/bench/locked.py --cifar data/cifar10                            # 2,500 pictures, 20 epochs
    python tests/bench/locked.py --cifar data/cifar10 --preset small --pictures 320 --peer-epochs 3
    python tests/bench/locked.py                                                 # drawn noise instead of CIFAR-10

Ours is the whole of `train.py --lock vision --cache-features` on a folder it sees for the first time: reading captions,
learning the tokenizer, building the model, the pass of every picture through the tower, the epochs, two checkpoints,
and an evaluation of a few held-out pictures. The second row leaves out what the peers' loops do not do either:
building the model, evaluation and checkpoints.
The peers are plain loops as their users write them: pictures through the library's own processor once, kept in memory
(counted in the first epoch), vision tower frozen, bf16 autocast around model and loss, AdamW over what is left to
train, captions tokenized as ours and padded to the longest of the batch (open_clip: of all captions, for its text tower
takes one length only). Building their models is not counted.
--peer-epochs measures fewer epochs of the peers; the later ones are alike, so their median is multiplied, and the
table says so.
"""

import contextlib
import io
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import common
import torch
from PIL import Image

import dualenc
import train

HELD_OUT = 10  # pictures, for the evaluation that ends a run of ours and that the peers do not have


def make_folder(folder, source, count):
    """Class folders train/ and test/ with `count` and HELD_OUT JPEGs, from CIFAR-10's or drawn."""
    for split, wanted in (("train", count), ("test", HELD_OUT)):
        for label in range(10):
            if source:
                kind = sorted(path for path in (Path(source) / split).iterdir() if path.is_dir())[label]
                files = sorted(kind.iterdir())[: -(-wanted // 10)]
            (folder / split / (kind.name if source else f"class {label}")).mkdir(parents=True)
            for number in range(len(range(label, wanted, 10))):
                if source:
                    shutil.copy(files[number], folder / split / kind.name)
                else:
                    path = folder / split / f"class {label}" / f"{number}.jpg"
                    Image.frombytes("RGB", (32, 32), random.randbytes(3 * 32 * 32)).save(path)


def our_seconds(args, preset, epochs):
    """(seconds of train.main on a fresh copy of the folder, those of them that the peers' loops have too)."""
    beside = []  # seconds of what they do not have

    def timed(function):
        def call(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            beside.append(time.perf_counter() - began)
            return result

        return mock.patch.object(train, function.__name__, call)

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        shutil.copytree(args.folder, data)
        sizes = ["--text-width", preset.text_width, "--text-depth", preset.text_depth, "--text-heads",
                 preset.text_heads, "--projection-dim", preset.projection_dim, "--image-size",
                 preset.image_size, "--batch-size", preset.batch]  # fmt: skip
        vision_args = [f"{name}={value}" for name, value in preset.vision_args.items()]
        sizes += ["--vision", preset.vision, *(["--vision-args", *vision_args] if vision_args else [])]
        recipe = ["--lock", "vision", "--cache-features", "--epochs", epochs, "--eval-every", 10**9]
        flags = ["--data", data, "--out", Path(scratch) / "run", "--precision", args.precision, *recipe, *sizes]
        printed = io.StringIO()
        began = time.perf_counter()
        with contextlib.redirect_stdout(printed), timed(train.load_run), timed(train.evaluate_and_save):
            train.main([str(flag) for flag in flags])
        took = time.perf_counter() - began
        return took, took - sum(beside)


class Frozen:
    """A peer's model with a frozen vision tower, and the loop that trains the rest of it."""

    def __init__(self, library, preset, pairs, precision):
        self.preset, self.pairs, self.precision = preset, pairs, precision
        captions = dict.fromkeys(caption for several in pairs.captions for caption in several)
        self.tokenize = dualenc.Processor(None, dualenc.train_tokenizer(captions, preset.vocab, 64))
        if library == "transformers":
            import transformers

            self.model = common.transformers_model(preset)
            self.model.vision_model.requires_grad_(False)
            size = {"height": preset.image_size, "width": preset.image_size}
            processor = transformers.ViTImageProcessor(size=size)
            self.prepare = lambda pictures: processor(pictures, return_tensors="pt")["pixel_values"]
        else:
            from open_clip.loss import ClipLoss
            from open_clip.transform import image_transform

            longest = self.tokenize(text=list(captions))["input_ids"].shape[1]
            self.model, self.loss = common.open_clip_model(preset, tokens=longest), ClipLoss()
            self.model.lock_image_tower()
            transform = image_transform(preset.image_size, is_train=False)
            self.prepare = lambda pictures: torch.stack([transform(picture) for picture in pictures])
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        self.library, self.pixels = library, None

    def batch_loss(self, pixels, inputs):
        if self.library == "transformers":
            return self.model(pixel_values=pixels, return_loss=True, **inputs).loss
        ids = inputs["input_ids"]
        ids = torch.nn.functional.pad(ids, (0, self.model.context_length - ids.shape[1]))
        return self.loss(**self.model(pixels, ids))

    def epoch(self):
        if self.pixels is None:
            pictures = self.pairs.pictures
            chunks = (range(start, min(start + 256, len(pictures))) for start in range(0, len(pictures), 256))
            self.pixels = torch.cat([self.prepare([pictures[i] for i in chunk]) for chunk in chunks])
        B, rng = self.preset.batch, random.Random(0)
        order = torch.randperm(len(self.pairs))
        for some in order[: len(order) // B * B].split(B):
            inputs = self.tokenize(text=[rng.choice(self.pairs.captions[i]) for i in some.tolist()])
            with dualenc.autocast(torch.device("cpu"), self.precision):
                loss = self.batch_loss(self.pixels[some], inputs)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=1)
    parser.add_argument("--preset", choices=common.PRESETS, default="tiny")
    parser.add_argument("--cifar", default="", help="folder with train/ and test/ class folders (noise unless given)")
    parser.add_argument("--pictures", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--peer-epochs", type=int, default=0, help="epochs of the peers to measure (all)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args(argv)
    common.print_head(args, rates=False)
    preset, measured = common.PRESETS[args.preset], args.peer_epochs or args.epochs
    source = f"{args.pictures:,} pictures of {args.cifar or 'noise'}"
    print(f"data     {source}, {args.preset} towers, batch {preset.batch}, {args.precision}")
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = Path(scratch)
        make_folder(args.folder, args.cifar, args.pictures)
        pairs = dualenc.load_pairs(args.folder, "train")
        peers = {name: Frozen(name, preset, pairs, args.precision)
                 for name in common.available(["transformers", "open_clip"])}  # fmt: skip
        ours = {epochs: [our_seconds(args, preset, epochs) for _ in range(args.rounds)]
                for epochs in (1, args.epochs)}  # fmt: skip
        seconds = {name: [] for name in peers}
        for _ in range(measured):
            for name, peer in peers.items():
                seconds[name].append(common.seconds_of(peer.epoch))
    print_epochs(
        {n: [statistics.median(took) for took in zip(*runs)] for n, runs in ours.items()}, seconds, args.epochs
    )


def print_epochs(ours, seconds, epochs):
    """ours is {epochs: (seconds of whole runs, of what the peers do too)}; ratios of first epochs are of the latter."""
    rows = [
        [f"ours, {what}", f"{first:.1f}", "", f"{all_:.1f}", "", "", f"{epochs} epochs"]
        for what, first, all_ in zip(("whole runs", "as the peers' loops"), ours[1], ours[epochs])
    ]
    for name, took in seconds.items():
        later = common.spread(took[1:] or took)
        total = sum(took) + (epochs - len(took)) * later.median
        counted = f"{len(took)} epochs" + (f", then the median x {epochs - len(took)}" if len(took) < epochs else "")
        rows.append([name, f"{took[0]:.1f}", f"{later:.2f}", f"{total:.1f}", f"{took[0] / ours[1][1]:.2f}",
                     f"{total / ours[epochs][0]:.2f}", counted])  # fmt: skip
    titles = ["locked vision tower", "first epoch, s", "later ones, s", f"{epochs} epochs, s"]
    common.print_table([*titles, "ours x times as fast: first", "whole runs", "measured"], rows)


if __name__ == "__main__":
    sys.exit(main())
