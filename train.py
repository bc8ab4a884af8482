"""Train a vision-text dual encoder: data and a recipe in, a run folder out.

python train.py                                              drawn shapes, small towers, two minutes on a laptop
python train.py --data captions.csv --vision vit_base_patch16_224.augreg_in21k --lock vision
python train.py --data cifar10 --data-root data --epochs 10 --out runs/cifar
python train.py --resume runs/cifar
torchrun --nproc-per-node 2 train.py                         the same run in two processes
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import math
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import typing
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

import dualenc
import eval as evaluation
from dualenc import knob

BETAS, EPSILON = (0.9, 0.98), 1e-6  # CLIP, table 19
SIGLIP_START = {"logit_scale_init": math.log(10), "logit_bias_init": -10.0}  # SigLIP, section 3.2
# The vision tower of --vision scratch: a ResNet-10 of half the width, quick on a CPU.
SCRATCH_VISION = {
    "name": "resnet18",
    "args": {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_width": 32},
    "image_size": 64,
}
SCRATCH_POOLING = "mean"  # how the text tower of --text scratch makes one vector
STATE_FILE, METRICS_FILE, LOCK_FILE, BAD_PICTURES = "training_state.pt", "metrics.jsonl", "run.lock", "bad_pictures.txt"
BAD_SHARE = 0.01  # of the pictures; when more are bad, --on-bad-picture skip stops too
SHOWN_FLOOR = 0.01  # nats; a smaller floor of the loss is not worth a word
TILED_FROM = 2048  # pairs over all processes from which on the tiled losses are faster
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
BAD_STEPS_IN_A_ROW = 10  # --on-bad-step skip stops then: more of them will not help


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py."""

    data: str = knob("shapes", "data spec (README.md lists them)", "data")
    data_root: str = knob("data", "where torchvision's data sets lie", "data")
    download: bool = knob(False, "let torchvision download what is not there", "data")
    images: str = knob("", "picture folder of coco: and flickr: caption files", "data")
    val_fraction: float = knob(0.1, "share of the pictures held out, where the data has no split of its own", "data")
    templates: str = knob("", "plain, clip7, clip80, or a file with one template a line, {} for the class", "data")
    allow_outside: bool = knob(False, "let a caption file name pictures by paths that climb out of its folder", "data")
    on_bad_picture: str = knob(
        "error",
        f"skip: leave out pictures that cannot be read, list them in {BAD_PICTURES}; error beyond {BAD_SHARE:.0%}",
        "data",
        choices=("error", "skip"),
    )
    crop_scale: float = knob(
        1.0, "augmentation: smallest share of a picture that a random crop keeps; 1 for none", "data"
    )
    flip: bool = knob(
        False, "augmentation: mirror each picture with probability 1/2 (not where captions say left or right)", "data"
    )

    vision: str = knob(
        "scratch",
        "timm model name, or transformers folder or hub id; scratch: a small residual network for 64 pixels",
        "towers",
    )
    vision_args: dict = knob({}, "further arguments of timm.create_model", "towers")
    pretrained: bool | None = knob(
        None, "load timm's weights; by default if --vision names some with a tag, as in resnet18.a1_in1k", "towers"
    )
    image_size: int = knob(0, "pixels a side; the vision tower's own unless given", "towers")
    patch_dropout: float = knob(0.0, "share of patches left out while training (ViTs)", "towers")
    text: str = knob("scratch", "scratch: a new text tower; or a transformers folder or hub id", "towers")
    text_width: int = knob(192, "width of a new text tower", "towers")
    text_depth: int = knob(3, "layers of a new text tower", "towers")
    text_heads: int = knob(3, "attention heads of a new text tower", "towers")
    text_pooling: str = knob(
        "",
        "how the text tower makes one vector; by default mean for a new one, and a published checkpoint's own",
        "towers",
        choices=("", "cls", "mean", "pooler"),
    )
    vocab_size: int = knob(4096, "pieces of a new text tower's vocabulary, learned from the captions", "towers")
    max_tokens: int = knob(64, "longest caption of a new text tower; longer ones are cut", "towers")
    projection_dim: int = knob(256, "width of the shared space", "towers")
    lock: str = knob("", "freeze a tower (LiT: vision)", "towers", choices=("", "vision", "text"))

    loss: str = knob(
        "clip",
        "multi-positive: captions of one class are all right answers",
        "optimisation",
        choices=("clip", "siglip", "multi-positive"),
    )
    epochs: float = knob(10, "passes over the pictures", "optimisation")
    steps: int = knob(0, "steps, instead of epochs", "optimisation")
    batch_size: int = knob(256, "pairs a step, over all processes", "optimisation")
    neighbours: int = knob(
        0,
        "pictures in a row that stay together, as each other's hard negatives (all but those at a batch's ends); "
        f"0: {dualenc.ShapesPairs.neighbours} for drawn shapes (a scene and its mirror), 1 for other data",
        "optimisation",
    )
    lr: float = knob(1e-3, "peak learning rate; 1e-3 suits new towers, 1e-4 to 3e-5 pretrained ones", "optimisation")
    weight_decay: float = knob(0.05, "off norms, biases, position tables and logit_scale", "optimisation")
    warmup: float = knob(0.05, "share of the steps in which the learning rate rises", "optimisation")
    clip_grad: float = knob(1.0, "largest gradient norm; 0 for no limit", "optimisation")
    on_bad_step: str = knob(
        "error",
        f"skip: no update where loss or gradient is not finite; error after {BAD_STEPS_IN_A_ROW} in a row",
        "optimisation",
        choices=("error", "skip"),
    )
    seed: int = knob(0, "of weights, order, augmentation and drawn shapes", "optimisation")

    precision: str = knob(
        "auto",
        "arithmetic of the towers; weights and loss are float32",
        "memory and speed",
        choices=("auto", "bf16", "fp32"),
    )
    cache_features: bool = knob(
        False,
        "with --lock vision: run the locked tower once a picture, and keep what it gives beside the data",
        "memory and speed",
    )
    micro_batch: int = knob(
        0,
        "pairs that a process embeds at a time, for the exact gradient of the whole batch in less memory and about 4/3 "
        "of the time; 0: all at once",
        "memory and speed",
    )
    grad_checkpointing: bool = knob(
        False, "compute activations again in the backward pass: less memory, more time", "memory and speed"
    )
    compile: bool = knob(False, "torch.compile both towers, which takes its time at the start", "memory and speed")
    workers: int = knob(-1, "processes that read pictures; -1 picks", "memory and speed")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "memory and speed")

    out: str = knob("", "run folder; runs/NAME-OF-THE-DATA unless given", "output")
    resume: str = knob("", "run folder to go on with", "output")
    overwrite: bool = knob(False, "replace a run folder that is already there", "output")
    eval_every: int = knob(0, "steps between evaluations; 0 for about five in all", "output")
    log_every: int = knob(50, "steps between printed lines; the first step has one too", "output")


# Flags that may change when a run is resumed: they decide what is shown, how fast, where things lie and when to give
# up, not what is learned.
FREE_ON_RESUME = {
    *("resume", "out", "overwrite", "eval_every", "log_every", "workers", "device"),
    *("data_root", "download", "allow_outside", "on_bad_picture", "on_bad_step", "cache_features"),
}


# ---- Data -----------------------------------------------------------------------------------------------------------


class TrainingPairs(torch.utils.data.Dataset):
    """(epoch, picture number) to (uint8 pixels (3, S, S), a caption, the picture's number).

    The key alone decides crop, mirroring and caption, so neither workers nor a resumed run change what is seen. For a
    picture that cannot be read, (None, the reason, the picture's number): an error would stop the worker.
    """

    def __init__(self, pairs, transform, config):
        self.pairs, self.transform, self.config = pairs, transform, config
        self.pictures = dualenc.sized_for(transform, pairs.pictures, config.crop_scale)

    def __getitem__(self, key):
        i, rng = key[1], draws(self.config.seed, key)
        try:
            picture, captions = self.pictures[i], self.pairs.captions[i]
        except ValueError as error:
            return None, str(error), i
        image = dualenc.to_pixels(picture, self.transform.channels)
        if self.config.crop_scale < 1:
            image = random_crop(image, self.config.crop_scale, rng)
        if self.config.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return self.transform.resize_and_crop(image), rng.choice(captions), i


def draws(seed, key):
    """The generator of all that is drawn for a key of TrainingPairs."""
    epoch, i = key
    return random.Random(f"{seed} {epoch} {i}")


class CachedPairs(torch.utils.data.Dataset):
    """A step's keys to its Batch, with rows of cached features in place of pictures; those unreadable are left out."""

    def __init__(self, pairs, cache, seed):
        self.pairs, self.features, self.unreadable, self.seed = pairs, cache.train, cache.unreadable, seed

    def __getitems__(self, keys):
        keys = [key for key in keys if key[1] not in self.unreadable]
        numbers = [i for _, i in keys]
        captions = [draws(self.seed, key).choice(self.pairs.captions[key[1]]) for key in keys]
        return Batch(self.features[numbers], captions, numbers, {})


def random_crop(image, smallest_share, rng):
    """A part of image (C, height, width) in its own proportions, from smallest_share of its area to all of it."""
    side = math.sqrt(rng.uniform(smallest_share, 1))
    height, width = (max(1, round(n * side)) for n in image.shape[-2:])
    top, left = rng.randint(0, image.shape[-2] - height), rng.randint(0, image.shape[-1] - width)
    return image[:, top : top + height, left : left + width]


class Batches(torch.utils.data.Sampler):
    """The keys of each step's batch, which the seed alone decides: every epoch a new order, whole batches only.

    Neighbours stay in a row, as hard negatives: a random batch seldom asks for what sets similar pictures apart
    (NegCLIP, Yuksekgonul et al. 2023, section 4). Of several processes, each gets its share of every batch.
    """

    def __init__(self, n_pictures, batch_size, seed, first_step, steps, neighbours=1):
        self.n_pictures, self.batch_size, self.seed = n_pictures, batch_size, seed
        self.first_step, self.steps, self.neighbours = first_step, steps, neighbours

    def __len__(self):
        return self.steps - self.first_step

    def __iter__(self):
        per_epoch = self.n_pictures // self.batch_size
        order, order_epoch = None, None
        for step in range(self.first_step, self.steps):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                starts = list(range(0, self.n_pictures, self.neighbours))
                random.Random(f"order {self.seed} {epoch}").shuffle(starts)
                rows = (range(start, min(start + self.neighbours, self.n_pictures)) for start in starts)
                order, order_epoch = [*itertools.chain.from_iterable(rows)], epoch
            start = position * self.batch_size
            batch = order[start : start + self.batch_size]
            yield [(epoch, i) for i in batch[dualenc.share(len(batch))]]


class Batch(typing.NamedTuple):
    """What one step learns from; the pictures that could not be read are missing from the first three."""

    images: torch.Tensor | None  # (B, C, S, S) uint8, or (B, W) features; None if no picture could be read
    captions: list  # B strings
    numbers: list  # B picture numbers
    bad: dict  # {picture number: why it could not be read}


def stack_batch(items):
    """The Batch of some items of TrainingPairs."""
    bad = {i: reason for image, reason, i in items if image is None}
    images, captions, numbers = ([item[k] for item in items if item[0] is not None] for k in range(3))
    return Batch(torch.stack(images) if images else None, captions, numbers, bad)


def as_it_is(batch):
    return batch


def make_loader(pairs, model, config, device, first_step, steps, cache=None):
    """Batches from first_step on, fetched ahead where there are workers, pinned on CUDA."""
    # Rows of a cache are there at once: to fetch them from another process would take longer.
    workers = 0 if cache else dualenc.pick_workers(config.workers, device)
    pixels = TrainingPairs(pairs, model.processor.image_transform, config)
    return torch.utils.data.DataLoader(
        CachedPairs(pairs, cache, config.seed) if cache else pixels,
        batch_sampler=Batches(
            len(pairs), config.batch_size, config.seed, first_step, steps, config.neighbours or pairs.neighbours
        ),
        num_workers=workers,
        collate_fn=as_it_is if cache else stack_batch,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=dualenc.start_worker,
    )


class DataFault(ValueError):
    """Training cannot go on with this data, but the weights are good and worth saving."""


class BadPictures:
    """What to do with pictures that cannot be read: stop, or list them in a file of the run folder and count them.

    total  pictures, of which BAD_SHARE may be bad
    found  {name: reason}, together with those of the run that this one resumes
    met    names that this process met itself: those of before may have been mended
    """

    def __init__(self, out, policy, total):
        self.path, self.policy, self.total = out / BAD_PICTURES, policy, total
        lines = self.path.read_bytes().decode(errors="surrogateescape").split("\n") if self.path.exists() else []
        self.found = dict(line.split("\t", 1) for line in lines if line)
        self.met = set()

    def check(self, batch, names):
        """Take note of the bad pictures of a batch, in all processes; raises DataFault if they are reason to stop."""
        told = dualenc.tell_all({names[i]: reason for i, reason in batch.bad.items()} or None)
        self.add({name: reason for reasons in told for name, reason in reasons.items()})
        if told and dualenc.sum_over_processes(torch.tensor(len(batch.captions))) < 2:
            raise DataFault(
                "fewer than two pictures of this batch can be read: mend them, or take a larger --batch-size"
            )

    def add(self, reasons):
        """Take note of {name: reason}; raises DataFault if that is reason to stop."""
        if reasons and self.policy == "error":
            raise DataFault(f"{next(iter(reasons.values()))} (--on-bad-picture skip leaves such pictures out)")
        # Tabs and line ends stay out of the list: it has a line a picture, with a tab before the reason.
        new = {" ".join(name.split()): " ".join(reason.split()) for name, reason in reasons.items()}
        if new.keys() - self.found.keys():
            self.found.update(new)
            with dualenc.together():
                if dualenc.process_rank() == 0:
                    lines = (f"{name}\t{reason}\n" for name, reason in self.found.items())
                    dualenc.write_file(self.path, "".join(lines))
        self.met |= new.keys()
        if len(self.met) > BAD_SHARE * self.total:
            raise DataFault(
                f"{len(self.met)} of {self.total:,} pictures cannot be read, more than {BAD_SHARE:.0%}; {self.path} "
                f"lists them"
            )


class Cache(typing.NamedTuple):
    """What a locked vision tower makes of each picture."""

    train: torch.Tensor  # (I, W), read from disk as it is used
    held_out: torch.Tensor  # (J, W)
    unreadable: dict  # {training picture's number: why it cannot be read}


def check_cache(config):
    """Raises ValueError where features made once would not be those of an uncached run."""
    if config.lock != "vision":
        raise ValueError(
            f"--cache-features keeps what the vision tower makes of each picture, which lasts only while that tower "
            f"does not learn: add --lock vision (--lock is {config.lock!r})"
        )
    if config.crop_scale < 1 or config.flip:
        raise ValueError(
            f"--cache-features keeps one view of each picture, and augmentation shows another each time: leave out "
            f"either that, or --crop-scale (it is {config.crop_scale:g}) and --flip (it is {config.flip})"
        )


def cache_features(run):
    """The run's Cache: read from beside the data, or from the run folder where that cannot be written, then completed.

    Pictures go through the tower in batches as large as a step's pieces, held-out ones as evaluation does it, in the
    same arithmetic: features are those of an uncached run to the bit, unless the tower rounds by a picture's place in
    its batch. On one thread of a CPU none was seen to in batches of a multiple of 16. Where threads share a product,
    ViTs do, convnets do not: their float32 features may be some 1e-6 apart.
    """
    started, config, model = time.perf_counter(), run.config, run.model
    home = evaluation.store_home(config.data, "features", config.data_root)
    everywhere = not dualenc.tell_all(None if can_write(home) else "read only")
    home = (home if everywhere else run.out / "features") / evaluation.index_key(
        model, run.precision, ("vision_model.",)
    )
    settings = {"precision": run.precision, "workers": dualenc.pick_workers(config.workers, run.device)}
    rows, n_new = {}, 0
    for split, pairs, batch_size in (
        ("train", run.pairs, piece_size(config) or config.batch_size // dualenc.process_count()),
        ("held_out", run.held_out, evaluation.EVAL_BATCH),
    ):
        stamps = evaluation.stamps_of(pairs)
        embed = partial(evaluation.run_batches, model, partial(evaluation.pooled, model), pairs.pictures, **settings)
        rows[split], new, bad = evaluation.stored_rows(
            home / split, stamps, model.vision_model.width, embed, batch_size, whole_batches=split == "train"
        )
        n_new += new
        unreadable = {i: bad[stamp] for i, stamp in enumerate(stamps) if stamp in bad}
        run.bad_pictures.add({pairs.names[i]: reason for i, reason in unreadable.items()})
        rows.setdefault("unreadable", unreadable)
    n_old = len(run.pairs) + len(run.held_out) - n_new
    seconds = time.perf_counter() - started
    print(f"cache    {home}   {n_new:,} pictures embedded, {n_old:,} there already, {seconds:.1f} s", flush=True)
    return Cache(**rows)


def can_write(folder):
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


# ---- Model and optimiser --------------------------------------------------------------------------------------------


def make_model(config, pairs):
    """The towers that the flags name, with a processor; a new text tower learns its tokenizer from the captions."""
    vision, args, size = config.vision, config.vision_args, config.image_size or None
    if vision == "scratch":
        vision, args, size = (
            SCRATCH_VISION["name"],
            {**SCRATCH_VISION["args"], **args},
            size or SCRATCH_VISION["image_size"],
        )
    names_weights = "." in vision or ":" in vision
    pretrained = names_weights if config.pretrained is None else config.pretrained
    text = {"text_pooling": config.text_pooling} if config.text_pooling else {}
    if config.text == "scratch":
        captions = [caption for several in pairs.captions for caption in several]
        tokenizer = dualenc.train_tokenizer(dict.fromkeys(captions), config.vocab_size, config.max_tokens)
        sizes = {name: getattr(config, name) for name in ("text_width", "text_depth", "text_heads")}
        vocabulary = {"text_vocab_size": tokenizer.get_vocab_size(), "text_max_positions": config.max_tokens}
        text = {"text_pooling": SCRATCH_POOLING, **text, **sizes, **vocabulary}
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        vision,
        config.text,
        projection_dim=config.projection_dim,
        pretrained=pretrained,
        vision_args=args,
        vision_image_size=size,
        vision_patch_dropout=config.patch_dropout,
        **(SIGLIP_START if config.loss == "siglip" else {}),
        **text,
    )
    # A tower without weights has learned nothing about a crop: show it the whole picture.
    transform = model.vision_model.image_transform(crop_pct=None if pretrained else 1.0)
    if config.text == "scratch":
        model.processor = dualenc.Processor(transform, tokenizer)
    if model.processor is None:
        raise ValueError(
            f"{config.text} holds no tokenizer, and a pretrained text tower understands no other one's ids"
        )
    model.processor.image_transform = transform
    has_weights = {
        "vision": pretrained or model.config.vision.name in dualenc.VISION_FAMILIES,
        "text": config.text != "scratch",
    }
    if not has_weights.get(config.lock, True):
        warnings.warn(
            f"--lock {config.lock} freezes random weights: name a tower that has learned something", stacklevel=2
        )
    return model


def make_optimizer(model, config):
    """AdamW; weight decay acts on matrices and convolutions only, not on norms, biases, position tables or scalars."""
    undecayed = set(getattr(model.vision_model.trunk, "no_weight_decay", set)())
    decay, rest = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            keep = (
                weight.ndim < 2
                or "position_embeddings" in name
                or name.removeprefix("vision_model.trunk.") in undecayed
            )
            (rest if keep else decay).append(weight)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPSILON, fused=True)


def learning_rate(step, steps, warmup, peak):
    """The learning rate of a step counted from 0: a line up to peak, then half a cosine towards 0.

    warmup  share of the steps in which it rises, rounded to whole steps, at least one; the first step gets its part of
            peak, never 0, and the last of them peak
    peak    the largest rate, also that of the first step after the rise
    Exercise 6  easy, 15 minutes: warm-up and cosine, run `pytest -k exercise_6`
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def compile_towers(model, **options):
    """torch.compile both towers of a DualEncoder in place; weights keep their names, and checkpoints are as ever.

    Compiled is what runs of a vision tower between its checks and its pooling, and a text tower whole, with captions of
    any length: one graph each for training, one or two for evaluation. Hidden states cannot be asked for any more.

    options  of torch.compile
    """
    vision, text = model.vision_model, model.text_model
    vision._run_trunk = torch.compile(vision._run_trunk, **options)
    text.forward = torch.compile(text.forward, dynamic=True, **options)


# ---- One step -------------------------------------------------------------------------------------------------------


def pair_groups(pairs, captions, numbers):
    """(B,) group ids: pictures of one class, or with word-for-word the same caption, describe each other.

    Ids are class numbers, or hashes of captions: several processes give a group the same one.
    """
    if pairs.labels:
        return torch.tensor([pairs.labels[i] for i in numbers], dtype=torch.long)
    hashes = [hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in hashes], dtype=torch.long)


# What --loss names, for small batches and for those of TILED_FROM pairs or more; the same values and gradients.
LOSSES = {
    "clip": (dualenc.clip_loss, dualenc.tiled_clip_loss),
    "siglip": (dualenc.siglip_loss, dualenc.tiled_siglip_loss),
    "multi-positive": (dualenc.multi_positive_clip_loss, dualenc.tiled_multi_positive_clip_loss),
}


def loss_weights(name, model):
    """What a loss learns beside the embeddings."""
    return [model.logit_scale, model.logit_bias] if name == "siglip" else [model.logit_scale]


def compute_loss(name, model, image_embeds, text_embeds, groups):
    """The loss that --loss names, in float32, of the pairs of all processes.

    image_embeds, text_embeds  (R, E)  unit-norm rows of this process's pairs
    groups                     (R,)    their group ids
    returns                    ()      the mean of the results over processes, and of their gradients, is the loss's
    """
    textbook, tiled = LOSSES[name]
    weights = loss_weights(name, model)
    if len(dualenc.gather_embeds(groups)) >= TILED_FROM:
        more = [groups] if name == "multi-positive" else []
        return tiled(image_embeds, text_embeds, *weights, *more, sharded=dualenc.process_count() > 1)
    image_embeds, text_embeds, groups = map(dualenc.gather_embeds, (image_embeds, text_embeds, groups))
    return textbook(image_embeds, text_embeds, *weights, *([groups] if name == "multi-positive" else []))


def reference_losses(name, groups):
    """(chance, floor) in nats: the loss of guessing, and the best reachable while groups of pairs look alike."""

    def guessing(n):
        """The loss of a pair that cannot be told from n - 1 others."""
        if name == "siglip":  # the best constant answer says "a pair" with the share of pairs
            return math.log(n) - (n - 1) * math.log1p(-1 / n) if n > 1 else 0.0
        return math.log(n)

    sizes, how_many = groups.unique(return_counts=True)[1].unique(return_counts=True)
    of_groups = sum(n * size * guessing(size) for size, n in zip(sizes.tolist(), how_many.tolist()))
    chance, floor = guessing(len(groups)), of_groups / len(groups)
    return (chance - floor, 0.0) if name == "multi-positive" else (chance, floor)


def data_losses(config, pairs, batches=10):
    """(chance, floor) in nats of a batch drawn at random from the data, the mean over some."""
    rng, losses = random.Random(f"floor {config.seed}"), []
    for _ in range(batches):
        numbers = rng.sample(range(len(pairs)), config.batch_size)
        captions = [rng.choice(pairs.captions[i]) for i in numbers]
        losses.append(reference_losses(config.loss, pair_groups(pairs, captions, numbers)))
    return tuple(sum(values) / batches for values in zip(*losses))


@torch.no_grad()
def in_batch_accuracy(image_embeds, text_embeds, groups):
    """The share of pictures and captions whose nearest counterpart in the batch is a right one.

    image_embeds, text_embeds, groups  this process's rows; the counterparts, and the share, are those of all processes
    """
    all_texts, all_groups = dualenc.gather_embeds(text_embeds), dualenc.gather_embeds(groups)
    texts, images = Nearest(groups), Nearest(all_groups)  # nearest to each picture here, and to each caption
    for rows, columns, _, scores in dualenc.score_tiles(image_embeds, all_texts):
        texts.update(rows, scores, all_groups[columns])
        images.update(columns, scores.T, groups[rows])
    # Of the pictures nearest to a caption, one in each process, the nearest.
    scores, found = dualenc.gather_embeds(images.scores[None]), dualenc.gather_embeds(images.groups[None])
    right_images = found.gather(0, scores.argmax(dim=0, keepdim=True))[0] == all_groups
    right_texts = dualenc.sum_over_processes((texts.groups == groups).sum())
    return (right_images.sum() + right_texts).item() / (2 * len(all_groups))


class Nearest:
    """The highest score so far of some rows, and the group of what scored it."""

    def __init__(self, rows):
        self.scores, self.groups = torch.full(rows.shape, -torch.inf, device=rows.device), torch.zeros_like(rows)

    def update(self, part, scores, groups):
        """Take note of the scores (r, c) of some of the rows with columns of these groups (c,)."""
        best, column = scores.max(dim=1)
        self.groups[part] = torch.where(best > self.scores[part], groups[column], self.groups[part])
        self.scores[part] = best.maximum(self.scores[part])


# ---- The run folder -------------------------------------------------------------------------------------------------


def save_checkpoint(folder, model, state=None):
    """Write a whole checkpoint beside the old one, then swap the two: at every moment one of them is complete.

    raises  ValueError if it cannot be written, as on a full disk; the old one is still there then
    """
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(new)
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            dualenc.write_file(new / STATE_FILE, buffer.getbuffer())
    except (OSError, ValueError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = f"{folder} is as it was" if folder.exists() else f"there is no {folder} yet"
        raise ValueError(f"{error}; {kept}") from error
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(folder):
    """Do the rest of a save_checkpoint that was killed between its two renames."""
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    if old.exists() and not folder.exists():
        new.rename(folder)


def drop_metrics_after(out, step):
    """Drop the lines of metrics.jsonl that a run cut short wrote after its last checkpoint: they come again."""
    path = out / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    with dualenc.blamed_on(path):
        kept = [line for line in lines if json.loads(line)["step"] <= step]
    dualenc.write_file(path, "".join(kept))


def claim_run(config):
    """(the run folder, a lock on it that lasts as long as this process holds it; None but in the first process).

    raises  ValueError if another process holds it, if it has a run that is neither resumed nor overwritten, or if it
            holds anything else
    """
    name = Path(config.data.partition(":")[2] or config.data).resolve().stem
    out = Path(config.resume or config.out or f"runs/{name}")
    if dualenc.process_rank() > 0:
        return out, None
    if (out / evaluation.RUN_CONFIG).exists():
        if not (config.resume or config.overwrite):
            raise ValueError(
                f"{out} already holds a run: go on with --resume {out}, or --overwrite it, or name another --out"
            )
    elif out.is_dir() and any(path.name != LOCK_FILE for path in out.iterdir()):
        raise ValueError(f"{out} holds files but no run, and a new run clears its folder: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / LOCK_FILE, "w")  # noqa: SIM115 (held until the process ends)
    try:
        dualenc.lock_file(lock)
    except OSError as error:
        raise ValueError(f"another process trains into {out}: stop it, or name another --out ({error})") from error
    for checkpoint in ("last", "best"):
        finish_swap(out / checkpoint)
    return out, lock


def open_run(out, config, pairs, argv, device):
    """Clear the run folder and note what is run with what; a resumed run must find what it began with."""
    path, data, processes = out / evaluation.RUN_CONFIG, fingerprint(pairs), dualenc.process_count()
    if config.resume:
        record = dualenc.read_json(path)
        if record.get("data_sha256") != data:
            raise ValueError(f"{config.data} has changed since {out} began with it: start a new run")
        begun = record.get("processes", 1)
        if begun != processes:
            raise ValueError(
                f"{out} began with {begun} processes and would go on with {processes}: dropout and batch norm would "
                f"differ; go on with: {resume_command(out, begun)}"
            )
        return
    for old in out.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != LOCK_FILE:
            old.unlink()
    record = {
        "flags": dataclasses.asdict(config),
        "command": ["train.py", *(sys.argv[1:] if argv is None else argv)],
        "device": str(device),
        "processes": processes,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "data_sha256": data,
    }
    dualenc.write_file(path, json.dumps(record, indent=2) + "\n")


def fingerprint(pairs):
    """A hash of all names and captions: a resumed run must find the data it began with."""
    digest = hashlib.sha256()
    for name, captions in zip(pairs.names, pairs.captions):
        digest.update("\0".join([name, *captions, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_flags(argv):
    """TrainConfig from the command line; with --resume, from the run, and only harmless flags may differ."""
    parser = dualenc.flag_parser(TrainConfig, __doc__.splitlines()[0])
    config = TrainConfig(**vars(parser.parse_args(argv)))
    if not config.resume:
        return config
    stored = dualenc.read_json(Path(config.resume) / evaluation.RUN_CONFIG)["flags"]
    parser.set_defaults(**stored)
    config = TrainConfig(**vars(parser.parse_args(argv)))
    changed = [
        f"--{name.replace('_', '-')} (was {value!r})"
        for name, value in stored.items()
        if json.dumps(getattr(config, name)) != json.dumps(value) and name not in FREE_ON_RESUME  # which has no tuples
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its flags, but these differ from {config.resume}: {', '.join(changed)}")
    return config


def check_recipe(config, pairs, held_out):
    """(chance, floor) of a batch's loss in nats; raises ValueError for a recipe that cannot learn."""
    if config.batch_size < 2:
        raise ValueError(
            f"batch_size is {config.batch_size}: with one pair there is nothing to tell it from and the loss is always "
            f"0; take at least 2, better 256"
        )
    if config.batch_size < dualenc.process_count():
        raise ValueError(
            f"batch_size is {config.batch_size}, less than a pair for each of {dualenc.process_count()} processes"
        )
    if not 0 < config.crop_scale <= 1:
        raise ValueError(f"--crop-scale is {config.crop_scale}, expected a share above 0, and 1 for no cropping")
    if len(pairs) < 2:
        raise ValueError(f"{config.data} has {len(pairs)} training pictures: training tells pictures apart, at least 2")
    if len(pairs) < config.batch_size:
        raise ValueError(
            f"{config.data} has {len(pairs)} training pictures, fewer than one batch of {config.batch_size}: pictures "
            f"would repeat within a batch, as wrong answers to themselves; take --batch-size {len(pairs)} or less"
        )
    if not len(held_out):
        raise ValueError(f"no pictures are held out of {config.data}: raise --val-fraction ({config.val_fraction})")
    if config.cache_features:
        check_cache(config)
    if config.compile and config.grad_checkpointing:
        raise ValueError("--compile decides by itself what to compute again: leave out --grad-checkpointing")
    dualenc.at_least("--log-every", config.log_every, 1)
    counts = ("steps", "neighbours", "micro_batch", "eval_every")
    for name in (*counts, "epochs", "lr", "weight_decay", "warmup", "clip_grad"):
        dualenc.at_least(f"--{name.replace('_', '-')}", getattr(config, name), 0)
    if config.warmup > 1:
        raise ValueError(f"--warmup is {config.warmup}, expected a share of the steps, at most 1")
    chance, floor = data_losses(config, pairs)
    if len(set(pairs.labels or itertools.chain(*pairs.captions))) == 1:
        raise ValueError(
            f"all training pictures of {config.data} share their caption or class: there is nothing to tell apart, and "
            f"the loss cannot fall below its floor of {floor:.3f}, which is chance"
        )
    if same_pictures(pairs):
        raise ValueError(
            f"the training pictures of {config.data} look the same, pixel for pixel: there is nothing to tell apart, "
            f"and the loss cannot fall below its floor of {chance:.3f}, which is chance"
        )
    return chance, floor


def same_pictures(pairs, sample=16):
    """Whether pictures drawn at random are all one picture; usually the second one settles it."""
    images = []
    for i in random.Random("same pictures").sample(range(len(pairs)), min(sample, len(pairs))):
        try:
            images.append(dualenc.to_pixels(pairs.pictures[i]))
        except ValueError:  # training will say what to do about it
            continue
        if not torch.equal(images[0], images[-1]):
            return False
    return len(images) > 1


# ---- Stopping -------------------------------------------------------------------------------------------------------


class StopSignals:
    """Inside, the first SIGINT or SIGTERM is noted, so that the step can be finished; the next one stops at once.

    received  the signal's number, or None
    """

    def __enter__(self):
        self.received = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def received_anywhere(self):
        """The signal that this or another process had received when this was called, the same in all; or None.

        One that comes while the processes talk is kept for the next time.
        """
        return next(iter(dualenc.tell_all(self.received)), None)

    def _note(self, number, frame):
        self.received = signal.Signals(number)
        self.__exit__()


# ---- Watching -------------------------------------------------------------------------------------------------------


class Meter:
    """Means and rates since the last printed line; the first step, evaluation and saving are not timed."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.reset()

    def reset(self, sums=None, count=0):
        """Start anew, or with what a run that is resumed had counted since its last line."""
        self.sums, self.count = sums or {}, count
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0

    def fetch(self, loader):
        """The loader's batches, with the time spent waiting for each one noted."""
        batches = dualenc.from_workers(loader)
        # Where a worker dies, torch would raise at any moment, perhaps halfway through an update; without its handler,
        # the loader finds out when it is asked for the next batch.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for _ in range(len(loader)):
            asked = time.perf_counter()
            with dualenc.together():
                try:
                    batch = next(batches)
                except ValueError as error:
                    raise DataFault(str(error)) from error
                self.waited += time.perf_counter() - asked
            yield batch

    def add(self, values, first):
        """Count one step, and its values unless it was skipped; the first one of a run warms up and is not timed."""
        if values is not None:
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        if first:
            self.started, self.waited = time.perf_counter(), 0.0
        else:
            self.timed_steps += 1

    @contextmanager
    def paused(self):
        """Leave out the time spent inside."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def read(self):
        """Means of what was added, pairs_per_s, data_share (of the time, waiting for data); then start anew.

        Of several processes, data_share is that of the one which waits longest: the others wait for it.
        """
        waited = dualenc.gather_embeds(torch.tensor([self.waited])).max().item()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        means = {name: total / self.count for name, total in self.sums.items()}
        rates = {"pairs_per_s": self.timed_steps * self.batch_size / seconds, "data_share": waited / seconds}
        self.reset()
        return {**means, **rates}


def describe_step(line, steps, batch_size):
    """The printed line of some training steps."""
    floor = f", floor {line['floor_loss']:.3f}" if line["floor_loss"] > SHOWN_FLOOR else ""
    speed = ""  # of the first step, which warms things up, nothing is known
    if line["pairs_per_s"]:
        minutes, seconds = divmod(round((steps - line["step"]) * batch_size / line["pairs_per_s"]), 60)
        speed = f"   {line['pairs_per_s']:,.0f} pairs/s   data {line['data_share']:.0%}"
        speed += f"   {minutes}:{seconds:02} left"
    return (
        f"step {line['step']:>6,}/{steps:,}   loss {line['loss']:.3f} (chance {line['chance_loss']:.3f}{floor})   "
        f"acc {line['in_batch_acc']:.1%}   scale {math.exp(line['logit_scale']):.1f}   lr {line['lr']:.1e}{speed}"
        + (f"   {line['bad_steps']} steps skipped" if line["bad_steps"] else "")
    )


def describe_evaluation(line, steps, saved):
    """The printed line of an evaluation."""
    parts = []
    if "i2t_r1" in line:
        parts.append(f"image->text R@1 {line['i2t_r1']:.1%} R@5 {line['i2t_r5']:.1%}")
        parts.append(
            f"text->image R@1 {line['t2i_r1']:.1%} R@5 {line['t2i_r5']:.1%} (chance R@1 {line['chance_r1']:.1%})"
        )
    if "zs_top1" in line:
        parts.append(f"zero-shot top-1 {line['zs_top1']:.1%} (chance {line['chance_top1']:.1%})")
    return f"eval {line['step']:>6,}/{steps:,}   {'   '.join(parts)}   saved {saved}"


def introduce(config, model, pairs, held_out, losses, steps, device, precision):
    """The head of the printout: data, model, run, and the flags that differ from their defaults."""

    def millions(module, trainable=False):
        return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable) / 1e6:.1f}M"

    text, n_captions = model.config.text, sum(map(len, pairs.captions))
    defaults = vars(TrainConfig())
    changed = [f"{name}={value}" for name, value in vars(config).items() if value != defaults[name]]
    print(f"data     {config.data}   {len(pairs):,} pictures, {n_captions:,} captions; {len(held_out):,} held out")
    towers = f"{model.config.vision.name} ({millions(model.vision_model)}) + {text.family} {text.depth}x{text.width}"
    sizes = f"({millions(model.text_model)}) -> {config.projection_dim}"
    print(f"model    {towers} {sizes}   trainable {millions(model, trainable=True)} of {millions(model)}")
    processes = f"   {dualenc.process_count()} processes" if dualenc.process_count() > 1 else ""
    how = f"torch {torch.__version__}   {device} {precision}{processes}"
    print(f"run      batch_size={config.batch_size} steps={steps}   {how}")
    at_once = piece_size(config) or config.batch_size // dualenc.process_count()
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if at_once < config.batch_size and any(norm.training for norm in norms):
        print(
            f"norm     batch norm sees {at_once} pictures or fewer at a time, not the batch: other statistics and run"
        )
    chance, floor = losses
    if floor > SHOWN_FLOOR:
        print(f"loss     chance {chance:.3f}, floor {floor:.3f}: pairs of one caption or class cannot be told apart")
    print(f"flags    {' '.join(changed) or 'defaults'}", flush=True)


# ---- Main -----------------------------------------------------------------------------------------------------------


def load_data(config):
    """(training pairs, held-out pairs, templates) that the flags name."""
    templates = evaluation.read_templates(config.templates)
    source = {name: getattr(config, name) for name in evaluation.DATA_FLAGS if name not in ("data", "templates")}
    source.update(templates=templates, download=config.download)
    pairs, held_out = (dualenc.load_pairs(config.data, split, **source) for split in ("train", "val"))
    return pairs, held_out, templates


def held_out_to_measure(config, held_out, device):
    """(held-out pairs to evaluate on, {name: reason} of those left out): every evaluation measures the same ones."""
    if config.on_bad_picture == "error":
        return held_out, {}
    return dualenc.drop_unreadable(held_out, dualenc.pick_workers(config.workers, device))


@dataclass
class Run:
    """What the steps of a run share; state is what a checkpoint keeps of it beside weights, optimiser and meter."""

    config: TrainConfig
    out: Path
    device: torch.device
    precision: str
    pairs: dualenc.Pairs
    held_out: dualenc.Pairs
    templates: tuple
    steps: int
    bad_pictures: BadPictures
    meter: Meter
    model: nn.Module
    embed: nn.Module
    optimizer: torch.optim.Optimizer
    state: dict
    cache: Cache | None = None

    def log(self, line):
        """Add one object to metrics.jsonl, which is written anew: at every moment there are whole lines in it."""
        path = self.out / METRICS_FILE
        with dualenc.together():
            if dualenc.process_rank() == 0:
                dualenc.write_file(path, path.read_text(encoding="utf-8") + json.dumps(line) + "\n")

    def save(self, name, state=None):
        """Write a checkpoint."""
        with dualenc.together():
            if dualenc.process_rank() == 0:
                save_checkpoint(self.out / name, self.model, state)


def load_run(config, pairs, out, device, meter):
    """(model, optimizer, state): new ones, or as the last checkpoint of a resumed run left them, the meter too."""
    torch.manual_seed(config.seed)
    state = {
        "step": 0,  # steps taken
        "evaluated": 0,  # the step of the last evaluation
        "saved": None,  # the step of the checkpoint in last/
        "best": None,  # the numbers of the best evaluation
        "bad_steps": 0,  # steps without an update, because loss or gradient were not finite
        "bad_steps_in_a_row": 0,
    }
    last = out / "last"
    resumed = config.resume and last.exists()  # a run may be killed before its first checkpoint
    model = dualenc.DualEncoder.from_pretrained(last) if resumed else make_model(config, pairs)
    if config.lock:
        model.lock(config.lock)
    if config.grad_checkpointing:
        dualenc.recompute_activations(model)
    model.to(device).train()
    if config.compile:
        compile_towers(model)
    optimizer = make_optimizer(model, config)
    if resumed:
        with dualenc.blamed_on(last / STATE_FILE):
            # Onto the CPU: the card it was saved from may not be here. The optimiser takes it to where its weights are.
            state = torch.load(last / STATE_FILE, weights_only=True, map_location="cpu")
            optimizer.load_state_dict(state.pop("optimizer"))
            meter.reset(**state.pop("meter"))
    return model, optimizer, state


def piece_size(config):
    """Pairs that each process embeds at a time; 0 for its whole share of the batch.

    Only the flags decide, not how many pictures could be read: all processes must go the same way.
    """
    return config.micro_batch if config.micro_batch < config.batch_size / dualenc.process_count() else 0


class Piece(typing.NamedTuple):
    """Pairs that are embedded at a time."""

    images: torch.Tensor  # (b, C, S, S) uint8, or (b, W) features
    captions: dict  # the processor's tensors (b, T), padded to the longest here
    count: int  # how many of them are wanted


def split_batch(batch, processor, size):
    """The pieces of a batch, of at most `size` pairs each, or one piece if that is 0."""
    if not batch.captions:
        # A process whose pictures are all bad takes part nevertheless: the others wait for its share of the gradient.
        return [blank_piece(processor, count=0)]
    parts = dualenc.shares(len(batch.captions), math.ceil(len(batch.captions) / size) if size else 1)
    return [
        Piece(batch.images[part], processor(text=batch.captions[part]), len(batch.captions[part])) for part in parts
    ]


def blank_piece(processor, count):
    """Two black pictures with empty captions."""
    transform = processor.image_transform
    picture = transform.resize_and_crop(torch.zeros(transform.channels, 8, 8, dtype=torch.uint8))
    return Piece(torch.stack([picture] * 2), processor(text=["", ""]), count)


def encode_pictures(model, images):
    """Pictures (b, C, S, S) uint8, or their cached features (b, W), to (b, E) unit-norm rows."""
    if images.ndim == 2:
        return model.project_image(images)
    return model.encode_image(model.processor.image_transform.normalize(images))


class Embedder(nn.Module):
    """What a step runs of a model: from a Piece to image_embeds and text_embeds."""

    def __init__(self, model, precision):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, piece):
        """(image_embeds, text_embeds), each (count, E)"""
        device = self.model.logit_scale.device
        captions = {name: tensor.to(device) for name, tensor in piece.captions.items()}
        with dualenc.autocast(device, self.precision):
            image_embeds = encode_pictures(self.model, piece.images.to(device, non_blocking=True))
            text_embeds = self.model.encode_text(**captions)
        return image_embeds[: piece.count], text_embeds[: piece.count]


def make_embedder(model, config, precision):
    """An Embedder; in a job of several processes, one whose gradients become their mean over the processes."""
    embed = Embedder(model, precision)
    if dualenc.process_count() == 1:
        return embed
    with warnings.catch_warnings():  # newer versions have another name for the argument, older ones do not
        warnings.simplefilter("ignore", FutureWarning)
        embed = nn.parallel.DistributedDataParallel(embed, broadcast_buffers=False)
    # After its first backward pass it bundles gradients in another order, in which sums of three are rounded in another
    # way. With that pass done here, a resumed run computes what an uninterrupted one does, to the bit.
    restore_buffers = dualenc.remember_buffers(model)
    images, texts = embed(blank_piece(model.processor, count=2))
    sum([images.sum(), texts.sum(), *loss_weights(config.loss, model)]).backward()
    restore_buffers()
    return embed


def train_step(model, optimizer, config, batch, groups, precision, embed=None):
    """Forward, loss, backward, update; returns what to log of it.

    If loss or gradient are not finite, returns None, and weights and batch-norm statistics are as they were.
    """
    restore_buffers = dualenc.remember_buffers(model)
    embed = embed or Embedder(model, precision)
    optimizer.zero_grad()
    loss, image_embeds, text_embeds = compute_gradient(model, embed, config, batch, groups)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
    finite = loss.isfinite() and norm.isfinite()
    if not (finite and batch.captions):
        restore_buffers()
    if not finite:
        return None
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=dualenc.LOGIT_SCALE_MAX)
    chance, floor = reference_losses(config.loss, dualenc.gather_embeds(groups))
    accuracy = in_batch_accuracy(image_embeds, text_embeds, groups)
    return {"loss": loss.item(), "chance_loss": chance, "floor_loss": floor, "in_batch_acc": accuracy}


def compute_gradient(model, embed, config, batch, groups):
    """The gradient of the whole batch, of all processes, in .grad of every weight.

    returns  (the loss, image_embeds and text_embeds of this process's pairs)
    """

    def loss_of(image_embeds, text_embeds):
        return compute_loss(config.loss, model, image_embeds, text_embeds, groups)

    pieces = split_batch(batch, model.processor, piece_size(config))
    if piece_size(config):
        weights = loss_weights(config.loss, model)
        loss, image_embeds, text_embeds = dualenc.cached_backward(embed, pieces, loss_of, weights)
    else:
        image_embeds, text_embeds = embed(*pieces)
        loss = loss_of(image_embeds, text_embeds)
        loss.backward()
    return dualenc.sum_over_processes(loss.detach()) / dualenc.process_count(), image_embeds, text_embeds


def not_finite_error(run, step, what):
    """A ValueError that says where numbers broke, and what is left."""
    state, lr, scale = run.state, run.optimizer.param_groups[0]["lr"], run.model.logit_scale.exp().item()
    saved = "no checkpoint was saved yet"
    if state["saved"] is not None:
        saved = f"the last good checkpoint is {run.out / 'last'}, of step {state['saved']}"
    return ValueError(
        f"step {step}: {what} (learning rate {lr:.1e}, scale {scale:.1f}); {saved}; try a lower --lr, "
        f"--precision fp32, or --on-bad-step skip"
    )


def take_bad_step(run):
    """Count a step without an update; raises ValueError if it is reason to stop."""
    run.state["bad_steps"] += 1
    run.state["bad_steps_in_a_row"] += 1
    in_a_row = run.state["bad_steps_in_a_row"]
    if run.config.on_bad_step == "error" or in_a_row >= BAD_STEPS_IN_A_ROW:
        raise not_finite_error(
            run, run.state["step"] + 1, f"loss or gradient are no longer finite numbers, {in_a_row} in a row"
        )


def save_last(run):
    """Write the last checkpoint with all that resuming needs."""
    run.state["saved"] = run.state["step"]
    meter = {"sums": run.meter.sums, "count": run.meter.count}
    state = {**run.state, "optimizer": run.optimizer.state_dict(), "meter": meter}
    run.save("last", state)


def evaluate_and_save(run):
    """Evaluate, log and print it; write the last checkpoint, and the best one if this is it."""
    if dualenc.process_count() > 1:
        for buffer in run.model.buffers():  # each process has batch-norm statistics of its own pictures
            torch.distributed.broadcast(buffer, 0)
    try:
        workers = dualenc.pick_workers(run.config.workers, run.device)
        results = evaluation.evaluate(
            run.model,
            run.held_out,
            templates=run.templates,
            precision=run.precision,
            workers=workers,
            features=run.cache and run.cache.held_out,
        )
    except evaluation.NotFinite as error:
        raise not_finite_error(run, run.state["step"], str(error)) from error
    except ValueError as error:
        raise DataFault(f"cannot evaluate: {error}") from error
    numbers = {name: value for task in results.values() for name, value in task.items() if not isinstance(value, dict)}
    line, best = {"step": run.state["step"], **numbers}, run.state["best"]
    if best is None or score(line) >= score(best):
        run.state["best"] = line
        run.save("best")
    run.log(line)  # before the checkpoint: a run that is resumed drops the lines after its checkpoint, and repeats them
    run.state["evaluated"] = run.state["step"]
    save_last(run)
    saved = run.out / ("best" if line is run.state["best"] else "last")
    print(describe_evaluation(line, run.steps, saved), flush=True)


def score(line):
    """What the best checkpoint is best at: zero-shot accuracy where there are classes, else R@1 both ways."""
    return line["zs_top1"] if "zs_top1" in line else (line["i2t_r1"] + line["t2i_r1"]) / 2


def train(run):
    """Steps, printed lines, evaluations and checkpoints: to the end, or until a signal or a fault in the data.

    returns  (the signal or None, the fault or None)
    """
    first_step = run.state["step"]
    loader = make_loader(run.pairs, run.model, run.config, run.device, first_step, run.steps, run.cache)
    signalled = None
    with StopSignals() as stop:
        try:
            evaluate_if_due(run)  # a resumed run may have ended in an evaluation that failed
            for batch in run.meter.fetch(loader):
                run.bad_pictures.check(batch, run.pairs.names)
                take_step(run, batch, first=run.state["step"] == first_step)
                evaluate_if_due(run)
                signalled = stop.received_anywhere()
                if signalled:
                    break
        except DataFault as fault:
            return stop.received_anywhere(), fault
    return signalled, None


def take_step(run, batch, first):
    """Learning rate, update, and a line of the printout where one is due."""
    config, state = run.config, run.state
    lr = learning_rate(state["step"], run.steps, config.warmup, config.lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    # Like the order of the pictures, dropout is a function of seed and step, and of the process: resuming needs no
    # generator's state.
    seed = random.Random(f"dropout {config.seed} {state['step']}").getrandbits(63)
    torch.manual_seed(seed + dualenc.process_rank())
    groups = pair_groups(run.pairs, batch.captions, batch.numbers).to(run.device)
    values = train_step(run.model, run.optimizer, config, batch, groups, run.precision, run.embed)
    run.meter.add(values, first)
    if values is None:
        take_bad_step(run)
    else:
        state["bad_steps_in_a_row"] = 0
    state["step"] += 1
    due = state["step"] in (1, run.steps) or state["step"] % config.log_every == 0
    if due and run.meter.count:
        line = {"step": state["step"], **run.meter.read(), "logit_scale": run.model.logit_scale.item(), "lr": lr}
        line["bad_steps"] = state["bad_steps"]
        run.log(line)
        print(describe_step(line, run.steps, config.batch_size), flush=True)


def evaluate_if_due(run):
    """Evaluate and save every --eval-every steps and at the end, once a step, not counting the time."""
    step, every = run.state["step"], run.config.eval_every or math.ceil(run.steps / 5)
    if step > run.state["evaluated"] and (step % every == 0 or step == run.steps):
        with run.meter.paused():
            evaluate_and_save(run)


def resume_command(out, processes):
    """What to type to go on with a run of so many processes."""
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return f"{launcher} train.py --resume {shlex.quote(str(out))}"


def stop_early(run, signalled, fault):
    """Save a run that is cut short and end it: with the status that shells expect of a signal, or with an error."""
    save_last(run)
    hint = f"step {run.state['step']} is saved; go on with: {resume_command(run.out, dualenc.process_count())}"
    if not signalled:
        raise ValueError(f"{fault}; {hint}")
    print(f"stopped  {signalled.name}; {hint}", flush=True)
    sys.exit(128 + signalled)


def keep_freed_memory():
    """Let glibc keep the memory that one step frees for the next one.

    Left to itself it gives large blocks back to the system, which clears their pages again before the next step writes
    there: on a CPU that takes a tenth of the time. Other C libraries have no such switch and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main(argv=None):
    """Train from the command line; returns the numbers of the best checkpoint, by name."""
    with dualenc.process_group():
        return train_by_flags(argv)


def train_by_flags(argv):
    """main, in each of the processes that torchrun started, or in one."""
    # 1. Flags, device, run folder and data.
    config = read_flags(argv)
    device = dualenc.pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    precision = dualenc.pick_precision(config.precision, device)
    with dualenc.together():
        out, lock = claim_run(config)
    with dualenc.together():
        if config.download and dualenc.process_rank() == 0:
            load_data(config)  # the other processes wait until all is there
    pairs, held_out, templates = load_data(config)
    held_out, unreadable = held_out_to_measure(config, held_out, device)
    losses = check_recipe(config, pairs, held_out)
    steps = config.steps or max(1, round(config.epochs * (len(pairs) // config.batch_size)))

    # 2. Model and optimiser, new or from the last checkpoint.
    meter = Meter(config.batch_size)
    model, optimizer, state = load_run(config, pairs, out, device, meter)

    # 3. The run folder, cleared only now that everything is known to work, and the head of the printout.
    with dualenc.together():
        if dualenc.process_rank() == 0:
            open_run(out, config, pairs, argv, device)
            drop_metrics_after(out, state["step"])
    bad_pictures = BadPictures(out, config.on_bad_picture, len(pairs) + len(held_out) + len(unreadable))
    bad_pictures.add(unreadable)
    introduce(config, model, pairs, held_out, losses, steps, device, precision)

    # 4. Train; log, evaluate and save on the way.
    run = Run(
        config=config,
        out=out,
        device=device,
        precision=precision,
        pairs=pairs,
        held_out=held_out,
        templates=templates,
        steps=steps,
        bad_pictures=bad_pictures,
        meter=meter,
        model=model,
        embed=make_embedder(model, config, precision),
        optimizer=optimizer,
        state=state,
    )
    with dualenc.float32_products(device, precision):
        if config.cache_features:
            run.cache = cache_features(run)
        signalled, fault = train(run)
    if fault or state["step"] < steps:
        stop_early(run, signalled, fault)
    if lock:
        lock.close()

    # 5. What came out, and what to do with it.
    best = state["best"]
    print(f"done     best at step {best['step']:,}; see it measured again: python eval.py {shlex.quote(str(out))}")
    return best


if __name__ == "__main__":
    dualenc.run_script(main)
