"""Train a vision-text dual encoder: data and a recipe in, a run folder out.

python train.py                                           drawn shapes, small towers, two minutes
python train.py --data captions.csv --vision vit_base_patch16_224.augreg_in21k --lock vision
python train.py --data captions.csv --init runs/shapes    a new run from the weights of another
python train.py --resume runs/shapes                      continue an interrupted run
torchrun --nproc-per-node 2 train.py                      the same run in two processes
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import json
import math
import random
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import filelock
import torch
from torch import nn

import dualenc
import eval as evaluation
from eval import flag  # a dataclass field with its --help line and more metadata

# The vision tower of --vision scratch: a ResNet-10 with stages of half the width, quick on a CPU.
SCRATCH_VISION, SCRATCH_SIZE = "resnet18", 64
SCRATCH_ARGS = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}
STATE_FILE, METRICS_FILE, LOCK_FILE = "training_state.pt", "metrics.jsonl", "run.lock"
SHOWN = {"i2t_r1": "image->text R@1", "i2t_r5": "R@5", "t2i_r1": "text->image R@1"}
SHOWN |= {"t2i_r5": "R@5", "chance_r1": "chance", "zs_top1": "zero-shot", "chance_top1": "chance"}
BAD_SHARE = 0.01  # the share of unreadable images above which --on-bad-image skip stops, too
TILED_FROM = 2048  # batch size, over all ranks, from which the tiled loss is faster

# ---- What is minimised, and what can be set ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of LOSSES. Chance and floor are only printed; sizes: how many pairs each group has."""

    function: Callable  # (image_embeds, text_embeds, *inputs) -> ()
    inputs: tuple  # names among "logit_scale", "logit_bias" and "group_ids"
    chance: Callable  # sizes -> nats of a model that guesses
    floor: Callable  # sizes -> nats of a perfect model, which cannot tell pairs of a group apart
    tiled: Callable | None  # the same from one rank's rows, in less memory; for large batches
    start: dict = dataclasses.field(default_factory=dict)  # configuration of a new model


def mean_over_groups(nats, sizes):
    """The mean over pairs of nats(size of the pair's group)."""
    return sum(size * nats(size) for size in sizes) / sum(sizes)


def siglip_guess(n):
    """Nats of n cells, each called a pair with probability 1 / n: one is, the others are not."""
    return -math.log(1 / n) - (n - 1) * math.log(1 - 1 / n) if n > 1 else 0.0


LOSSES = {
    "clip": Loss(
        function=dualenc.clip_loss,
        inputs=("logit_scale",),
        chance=lambda sizes: math.log(sum(sizes)),
        floor=lambda sizes: mean_over_groups(math.log, sizes),
        tiled=dualenc.tiled_clip_loss,
    ),
    "siglip": Loss(
        function=dualenc.siglip_loss,
        inputs=("logit_scale", "logit_bias"),
        chance=lambda sizes: siglip_guess(sum(sizes)),
        floor=lambda sizes: mean_over_groups(siglip_guess, sizes),  # knows the group, then guesses
        tiled=None,
        start={"logit_scale_init": math.log(10), "logit_bias_init": -10.0},  # SigLIP, section 3.2
    ),
    "multi-positive": Loss(
        function=dualenc.multi_positive_clip_loss,
        inputs=("logit_scale", "group_ids"),
        chance=lambda sizes: math.log(sum(sizes)) - mean_over_groups(math.log, sizes),
        floor=lambda sizes: 0.0,
        tiled=None,
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The flags. One with sets=NAME goes to from_vision_text_pretrained as NAME, unless 0 or ""."""

    data: str = flag("shapes", "data spec (README.md lists them)", "data")
    data_root: str = flag("data", "where torchvision's data sets lie", "data")
    download: bool = flag(False, "let torchvision download what is missing", "data")
    images: str = flag("", "image folder of a COCO or Karpathy caption file", "data")
    classes: str = flag("", "file with a line FOLDER<TAB>NAME for each class folder", "data")
    val_fraction: float = flag(0.1, "share of images held out of data without a split", "data")
    templates: str = flag("", "plain, clip7, or a file of templates, {} for the class", "data")
    on_bad_image: str = flag("error", "skip: take the next one", "data", ("error", "skip"))
    init: str = flag("", "start from this dual encoder: run, checkpoint or hub id", "start")
    lock: str = flag("", "freeze towers (LiT: vision)", "start", ("", "vision", "text", "both"))
    vision: str = flag("scratch", "timm name, folder or hub id; scratch: a small ResNet", "towers")
    vision_args: dict | None = flag(None, "of timm.create_model", "towers", sets="vision_args")
    pretrained: bool | None = flag(None, "load timm's weights; by default for NAME.TAG", "towers")
    image_size: int = flag(0, "pixels per side; 0: its own", "towers", sets="vision_image_size")
    patch_dropout: float = flag(0.0, "share left out (ViTs)", "towers", sets="vision_patch_dropout")
    text: str = flag("scratch", "folder or hub id; scratch, scratch:FAMILY: a new tower", "towers")
    text_width: int = flag(192, "width of a new text tower", "towers")
    text_depth: int = flag(3, "layers of a new text tower", "towers")
    text_heads: int = flag(3, "attention heads of a new text tower", "towers")
    text_pooling: str = flag("", "cls, mean, pooler; or its own", "towers", sets="text_pooling")
    vocab_size: int = flag(4096, "tokens of a new text tower, learned from captions", "towers")
    max_tokens: int = flag(64, "longest caption of a new text tower", "towers")
    projection_dim: int = flag(256, "size of the embeds", "towers", sets="projection_dim", least=1)
    loss: str = flag("clip", "see LOSSES in train.py", "recipe", tuple(LOSSES))
    epochs: float = flag(10, "passes over the images", "recipe")
    steps: int = flag(0, "steps, instead of epochs", "recipe")
    batch_size: int = flag(256, "pairs a step, over all processes", "recipe", least=2)
    neighbours: int = flag(0, "images in a row that share a batch; 0: as the data has it", "recipe")
    lr: float = flag(1e-3, "peak learning rate of new weights", "recipe")
    tower_lr: float = flag(0.0, "that of pretrained towers; 0: a tenth of --lr", "recipe")
    weight_decay: float = flag(0.05, "none on norms, biases, positions, logit_scale", "recipe")
    warmup: float = flag(0.05, "share of the steps in which --lr rises", "recipe", most=1)
    clip_grad: float = flag(1.0, "largest gradient norm; 0 for no limit", "recipe")
    seed: int = flag(0, "of weights, order, augmentation and drawn shapes", "recipe")
    precision: str = flag("auto", "of the towers", "speed", ("auto", "bf16", "fp16", "fp32"))
    cache_features: bool = flag(False, "run locked towers once and keep their outputs", "speed")
    micro_batch: int = flag(0, "most pairs embedded at once; less memory, 4/3 of the time", "speed")
    compile: bool = flag(False, "torch.compile both towers; slow to start", "speed")
    workers: int = flag(-1, "processes that read images; -1 picks", "speed", least=-1)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", "speed")
    out: str = flag("", "run folder; runs/NAME-OF-THE-DATA unless given", "output")
    resume: str = flag("", "run folder to resume", "output")
    overwrite: bool = flag(False, "replace a run folder that is already there", "output")
    eval_every: int = flag(0, "steps between evaluations; 0 for about five in all", "output")
    log_every: int = flag(50, "steps between printed lines", "output", least=1)

    # Augmentations: functions of uint8 pixels (3, h, w), the flag's value and random numbers to
    # such pixels, each above its flag. Off by default; new ones go to the end.
    @staticmethod
    def random_crop(pixels, smallest_share, rng):
        side, (height, width) = math.sqrt(rng.uniform(smallest_share, 1)), pixels.shape[-2:]
        rows, columns = max(1, round(height * side)), max(1, round(width * side))
        top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
        return pixels[:, top : top + rows, left : left + columns]

    crop_scale: float = flag(1.0, "smallest share", "data", augment=random_crop, least=1e-3, most=1)

    @staticmethod
    def random_flip(pixels, flip, rng):
        return pixels.flip(-1) if rng.random() < 0.5 else pixels

    flip: bool = flag(False, "mirror each image with probability 1/2", "data", augment=random_flip)


# A resumed run may change these: they do not decide what it learns. Data may have moved.
FREE_ON_RESUME = {"resume", "overwrite", "eval_every", "log_every", "workers", "device"}
FREE_ON_RESUME |= {"data", "data_root", "images", "download", "on_bad_image", "cache_features"}

# What the loop works with. features: what locked towers make of images and captions, if cached.
Run = namedtuple("Run", "out pairs held_out templates features")


# ---- The loop ------------------------------------------------------------------------------------


def train(config, run, model, optimizer, state):
    """Train from state["step"] to config.steps, or until SIGINT or SIGTERM, which save and exit.

    returns  the metrics of the best evaluation
    raises   ValueError once loss or gradient is not finite (fp16 skips steps that overflow)
    """
    loss_row, device = LOSSES[config.loss], model.logit_scale.device
    embed = dualenc.MicroBatches(model, config.micro_batch, config.precision)
    if dualenc.world_size() > 1:
        embed = nn.parallel.DistributedDataParallel(embed)  # averages logit_scale's gradient, too
    # Keeps small gradients of fp16 from becoming 0; does nothing for bf16 and fp32.
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    scaler.load_state_dict(state.get("scaler") or scaler.state_dict())
    sums, bad_images = Counter(state["sums"]), {}  # sums since the last line; update() adds
    first_step, ready = state["step"] + 1, 0.0  # ready: the time when the last step ended

    with stop_signals() as received:
        for images, indices, captions in fetch(config, run, model, state["step"], bad_images):
            fetched = time.perf_counter()
            # Pairs of all ranks whose captions fit each other's images get the same group id.
            pair_ids = dualenc.gather_embeds(run.pairs.pair_ids(indices, captions))
            group_ids = dualenc.positive_groups(pair_ids).to(device)

            # Learning rate. Dropout follows from seed, step and rank, and so repeats on resuming.
            factor = learning_rate(state["step"], config.steps, config.warmup, peak=1.0)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            seed = random.Random(f"dropout {config.seed} {state['step']}").getrandbits(63)
            torch.manual_seed(seed + dualenc.rank())

            # Forward, loss, backward.
            cached = run.features.get("captions")  # of a locked text tower
            texts = cached and {"features": torch.stack([cached[c] for c in captions])}
            image_embeds, text_embeds = embed(images, texts or model.processor(captions))
            loss = compute_loss(config.loss, model, image_embeds, text_embeds, group_ids)
            optimizer.zero_grad()
            scaler.scale(loss).backward()

            # Clip, step, clamp. In fp16 an overflow skips the step; at scale 1 it is an error.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
            mean_loss = dualenc.gather_embeds(loss.detach()[None]).mean().item()
            overflow = not norm.isfinite().item()
            broken = not math.isfinite(mean_loss) or (overflow and scaler.get_scale() <= 1)
            where = f"step {state['step'] + 1}: loss or gradient is not finite"
            refuse(broken, f"{where}: lower --lr ({config.lr:.1e}) or take --precision fp32")
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                model.logit_scale.clamp_(max=dualenc.LOGIT_SCALE_MAX)
            step = state["step"] = state["step"] + 1
            state["skipped_steps"] += overflow

            # Meter and log. The first step warms up and is not timed.
            sizes = group_ids.unique(return_counts=True)[1].tolist()
            accuracy = in_batch_accuracy(image_embeds, text_embeds, group_ids)
            sums.update(steps=1, loss=mean_loss, in_batch_acc=accuracy)
            sums.update(chance_loss=loss_row.chance(sizes), floor_loss=loss_row.floor(sizes))
            if step > first_step:
                sums.update(timed=1, waited=fetched - ready, seconds=time.perf_counter() - ready)
            if step in (1, config.steps) or step % config.log_every == 0:
                line, seconds = {"step": step}, sums["seconds"] or 1
                for name in ("loss", "chance_loss", "floor_loss", "in_batch_acc"):
                    line[name] = sums[name] / sums["steps"]
                line |= {"logit_scale": model.logit_scale.item(), "lr": factor * config.lr}
                line["pairs_per_s"] = sums["timed"] * config.batch_size / seconds
                line["data_share"] = sums["waited"] / seconds
                line |= {"skipped_steps": state["skipped_steps"], "bad_images": len(bad_images)}
                sums.clear()
                log(run.out, line, describe_step(line, config))

            # Evaluate, save, and stop if a rank was asked to.
            due = step == config.steps or step % config.eval_every == 0
            stop_signal = dualenc.gather_embeds(torch.tensor([received[0]])).max().item()
            if due:
                evaluate(config, run, model, state)
            if due or stop_signal:
                state |= {"sums": dict(sums), "optimizer": optimizer.state_dict()}
                state["scaler"] = scaler.state_dict()
                save_checkpoint(run.out / "last", model, state)
            if stop_signal and step < config.steps:
                name = signal.Signals(stop_signal).name
                print(f"stopped  {name}; step {step} is saved; go on with --resume {run.out}")
                sys.exit(128 + stop_signal)
            ready = time.perf_counter()
    return state["best"]


def compute_loss(name, model, image_embeds, text_embeds, group_ids):
    """The loss that --loss names, in float32, over the pairs of all ranks.

    image_embeds, text_embeds  (R, E)  unit-norm rows of this rank's pairs
    group_ids                  (B,)    of all ranks; equal for pairs that describe each other
    returns                    ()      nats; loss and gradients are to be averaged over ranks
    """
    row, given = LOSSES[name], {"logit_scale": model.logit_scale, "group_ids": group_ids}
    given["logit_bias"] = getattr(model, "logit_bias", None)
    inputs = [given[key] for key in row.inputs]
    if row.tiled and len(group_ids) >= TILED_FROM:
        return row.tiled(image_embeds, text_embeds, *inputs)
    image_embeds, text_embeds = map(dualenc.gather_embeds, (image_embeds, text_embeds))
    return row.function(image_embeds, text_embeds, *inputs)


def learning_rate(step, steps, warmup, peak):
    """The learning rate of a step counted from 0: a line up to peak, then half a cosine towards 0.

    warmup      share of the steps in which it rises, rounded to whole steps, at least one; the
                first step is already above 0, the last warm-up step and the next one run at peak
    Exercise 6  easy, 15 minutes: warm-up and cosine, run `pytest -k exercise_6`
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@torch.no_grad()
def in_batch_accuracy(image_embeds, text_embeds, group_ids):
    """The share of images and captions, of all ranks, whose nearest counterpart is a right one."""
    right = torch.zeros(1)
    own_ids = group_ids[dualenc.share(len(group_ids))]  # of this rank
    for queries, gallery in ((image_embeds, text_embeds), (text_embeds, image_embeds)):
        gallery = dualenc.gather_embeds(gallery)
        for rows, wanted in zip(queries.split(1024), own_ids.split(1024)):
            right += (group_ids[(rows @ gallery.T).argmax(dim=1)] == wanted).sum().cpu()
    return dualenc.gather_embeds(right).sum().item() / (2 * len(group_ids))


def evaluate(config, run, model, state):
    """Measure the held-out pairs; log and print the metrics, and save the model if it is best."""
    # Each rank has batch-norm statistics of its own images: all take rank 0's.
    for buffer in model.buffers() if dualenc.world_size() > 1 else ():
        torch.distributed.broadcast(buffer, 0)
    how = {"precision": config.precision, "workers": config.workers, "templates": run.templates}
    features = run.features.get("val")
    results = evaluation.evaluate(model, run.held_out, image_features=features, **how)
    line = {"step": state["step"]}
    for metrics in results.values():
        line |= {name: v for name, v in metrics.items() if not isinstance(v, dict)}
    score = line["zs_top1"] if "zs_top1" in line else line["i2t_r1"] + line["t2i_r1"]
    best = score >= state["score"]
    if best:
        state |= {"best": line, "score": score}
        save_checkpoint(run.out / "best", model)
    shown = [f"{words} {line[name]:.1%}" for name, words in SHOWN.items() if name in line]
    # Logged before last/ is saved: if killed in between, a resumed run drops this line again.
    text = f"eval {line['step']:>6,}/{config.steps:,}   {'   '.join(shown)}"
    log(run.out, line, f"{text}   saved {run.out / ('best' if best else 'last')}")


# ---- Data and model ------------------------------------------------------------------------------


def load_data(config):
    """(training pairs, held-out pairs, templates) that the flags name."""
    templates = evaluation.read_templates(config.templates)
    flags = ("data_root", "images", "val_fraction", "seed")
    source = {"templates": templates, **{name: getattr(config, name) for name in flags}}
    source["class_names"] = evaluation.read_class_names(config.classes)
    if config.download and dualenc.rank() == 0:
        dualenc.load_pairs(config.data, download=True, **source)
    dualenc.from_all_ranks("downloaded")  # the others wait for rank 0
    pairs, held_out = (dualenc.load_pairs(config.data, part, **source) for part in ("train", "val"))
    return pairs, held_out, templates


def batch_keys(config, pairs, first_step):
    """Yields this rank's share of each batch's keys (epoch, image index); the seed alone decides.

    Whole batches in a new order each epoch; neighbours are hard negatives (NegCLIP, section 4).
    """
    neighbours, indices = config.neighbours or pairs.neighbours, range(len(pairs))
    order, order_epoch = [], None
    for step in range(first_step, config.steps):
        epoch, position = divmod(step, len(pairs) // config.batch_size)
        if epoch != order_epoch:
            rows = [indices[i : i + neighbours] for i in indices[::neighbours]]
            random.Random(f"order {config.seed} {epoch}").shuffle(rows)
            order, order_epoch = list(itertools.chain.from_iterable(rows)), epoch
        start = position * config.batch_size
        batch = order[start : start + config.batch_size]
        yield [(epoch, i) for i in batch[dualenc.share(config.batch_size)]]


def fetch(config, run, model, first_step, bad_images):
    """Yields R images, indices and captions of each step for this rank, from first_step on.

    Images are uint8 pixels (R, 3, S, S) or cached features (R, W). The place of an unreadable image
    is taken by the next one, and bad_images, {index: reason}, grows.
    """
    batches, again = itertools.tee(batch_keys(config, run.pairs, first_step))  # for loader and loop
    if "train" in run.features:
        loader = cached_images(*run.features["train"], batches)
    else:
        transform, device = model.processor.image_transform, model.logit_scale.device
        dataset = dualenc.ImageDataset(run.pairs.images, transform, partial(augment, config))
        loader = dualenc.image_loader(dataset, batches, config.workers, device)
    allowed = BAD_SHARE * len(run.pairs) if config.on_bad_image == "skip" else 0
    for (images, indices, errors), keys in zip(loader, again):
        new = {i: error for (_, i), error in zip(keys, errors) if error and i not in bad_images}
        bad_images |= new
        count = f"{len(bad_images)} of {len(run.pairs):,} images; skip allows {BAD_SHARE:.0%}"
        reasons = "; ".join(new.values())
        refuse(len(bad_images) > allowed, f"{reasons} (--on-bad-image; {count})")
        if new:
            print(f"skipped  {reasons}", flush=True)
        rngs = [random.Random(f"caption {config.seed} {key}") for key in keys]
        captions = [rng.choice(run.pairs.captions[i]) for rng, i in zip(rngs, indices.tolist())]
        yield images, indices.tolist(), captions


def cached_images(rows, unreadable, batches):
    """What an image loader yields, with features (R, W) for pixels."""
    for keys in batches:
        indices = [i for _, i in keys]
        while not unreadable.keys().isdisjoint(indices):  # then the next image takes the place
            indices = [(i + 1) % len(rows) if i in unreadable else i for i in indices]
        yield rows[indices], torch.tensor(indices), [unreadable.get(i, "") for _, i in keys]


def augmentations(config):
    """Fields of the augmentations that are switched on."""
    fields = [f for f in dataclasses.fields(config) if "augment" in f.metadata]
    return [f for f in fields if getattr(config, f.name) != f.default]


def augment(config, pixels, key):
    """Pixels after the augmentations; the key alone decides, whichever process computes them."""
    rng = random.Random(f"augment {config.seed} {key}")
    for f in augmentations(config):
        pixels = f.metadata["augment"](pixels, getattr(config, f.name), rng)
    refuse(pixels.dtype != torch.uint8, f"augmentations made {pixels.dtype}, not torch.uint8")
    return pixels


def cache_features(config, run, model):
    """Fill run.features with what locked towers make of the data, stored beside it for next time.

    "train" and "val" are (rows (I, W), {unreadable: why}) of images, "captions" {caption: row (W,)}
    """
    home = evaluation.store_folder(config.data, "features", config.data_root)
    how, workers = {"precision": config.precision, "pooled": True}, config.workers

    def stored(name, side, items, stamps, embed):
        folder = home / evaluation.cache_key(model, config.precision, side) / name
        rows, unreadable, new = evaluation.stored_rows(folder, stamps, partial(embed, items))
        print(f"cache    {folder}   {len(rows):,} rows, {new:,} of them new", flush=True)
        return rows, unreadable

    def embed_images(pairs, new):
        return evaluation.embed_images(model, pairs.select(new).images, workers=workers, **how)

    def embed_captions(captions, new):
        return evaluation.embed_captions(model, [captions[i] for i in new], **how), {}

    if "vision" in model.locked:
        for name, pairs in (("train", run.pairs), ("val", run.held_out)):
            run.features[name] = stored(name, "image_features", pairs, pairs.stamps(), embed_images)
    if "text" in model.locked:
        captions, _ = run.pairs.caption_table()
        rows, _ = stored("captions", "text_features", captions, captions, embed_captions)
        run.features["captions"] = dict(zip(captions, rows))


def towers(model):
    return {"vision": model.vision_model, "text": model.text_model}


def make_model(config, pairs):
    """The model that the flags name, with a processor; a new text tower learns its tokenizer."""
    if config.init:
        model = dualenc.DualEncoder.from_pretrained(config.init)
        model.vision_model.weights_from = model.text_model.weights_from = config.init
        return model
    given = [f for f in dataclasses.fields(config) if "sets" in f.metadata]
    more = {f.metadata["sets"]: vars(config)[f.name] for f in given if vars(config)[f.name]}
    if (vision := config.vision) == "scratch":
        vision, more["vision_args"] = SCRATCH_VISION, SCRATCH_ARGS | (config.vision_args or {})
        more.setdefault("vision_image_size", SCRATCH_SIZE)
    if is_new := config.text.split(":")[0] == "scratch":
        captions = dict.fromkeys(itertools.chain.from_iterable(pairs.captions))
        tokenizer = dualenc.train_tokenizer(captions, config.vocab_size, config.max_tokens)
        more = {"text_pooling": "mean", "text_vocab_size": tokenizer.get_vocab_size(), **more}
        more |= {"text_max_positions": config.max_tokens, "text_width": config.text_width}
        more |= {"text_depth": config.text_depth, "text_heads": config.text_heads}
    has_tag = "." in vision or ":" in vision
    pretrained = has_tag if config.pretrained is None else config.pretrained
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        vision, config.text, pretrained=pretrained, **LOSSES[config.loss].start, **more
    )
    # A tower without weights has learned nothing about a crop: show it the whole image.
    whole = None if model.vision_model.weights_from else 1.0
    transform = model.vision_model.image_transform(crop_pct=whole)
    if is_new:
        model.processor = dualenc.Processor(None, tokenizer, positions=model.text_model.max_tokens)
    if model.processor:
        model.processor.image_transform = transform
    return model


def make_optimizer(model, config):
    """AdamW with betas and eps of CLIP's ViTs; the "peak" of pretrained towers is --tower-lr."""
    trunk, groups = model.vision_model.trunk, {}
    kept = {f"vision_model.trunk.{name}" for name in getattr(trunk, "no_weight_decay", set)()}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = getattr(model, name.split(".")[0])  # a tower, a projection or logit_scale
            is_pretrained = bool(getattr(part, "weights_from", None))
            peak = (config.tower_lr or config.lr / 10) if is_pretrained else config.lr
            decays = weight.ndim > 1 and "position_embeddings" not in name and name not in kept
            groups.setdefault((peak, config.weight_decay * decays), []).append(weight)
    groups = [{"params": w, "peak": peak, "weight_decay": d} for (peak, d), w in groups.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def load_run(config, pairs, out, device):
    """(model, optimizer, state): new ones, or as the last checkpoint of a resumed run left them."""
    torch.manual_seed(config.seed)
    state = {"step": 0, "best": None, "score": 0.0, "skipped_steps": 0, "sums": {}}
    path = out / "last" / STATE_FILE
    if config.resume and path.exists():  # a run may be killed before its first checkpoint
        model = dualenc.DualEncoder.from_pretrained(out / "last")
        with dualenc.blamed_on(path, "cannot read"):
            # To the CPU: the GPU it was saved from may be absent.
            state = torch.load(path, weights_only=True, map_location="cpu")
            for name, tower in towers(model).items():
                tower.weights_from = state["weights_from"][name]
    else:
        model = make_model(config, pairs)
        state["weights_from"] = {name: t.weights_from for name, t in towers(model).items()}
    start, needs_bias = config.init or config.text, "logit_bias" in LOSSES[config.loss].inputs
    refuse(model.processor is None, f"{start} lacks a tokenizer or preprocessor_config.json")
    has_bias = hasattr(model, "logit_bias")
    refuse(needs_bias and not has_bias, f"{start} has no logit_bias for --loss {config.loss}")
    if has_bias:
        model.logit_bias.requires_grad_(needs_bias)
    if config.lock:
        model.lock(config.lock)
    locked = [towers(model)[name] for name in model.locked]
    learns = any(weight.requires_grad for tower in locked for weight in tower.parameters())
    refuse(config.cache_features and learns, "--cache-features: adapters of a locked tower learn")
    model.to(device).train()
    if config.compile:
        model.vision_model.compile()
        model.text_model.compile(dynamic=True)
    optimizer = make_optimizer(model, config)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, state


# ---- The run folder and the printout -------------------------------------------------------------


def refuse(wrong, message):
    if wrong:
        raise ValueError(message)


def flag_names(fields):
    return ", ".join("--" + name.replace("_", "-") for name in fields)


def read_flags(argv):
    """TrainConfig from the command line; with --resume, the run's with allowed changes."""
    parser = evaluation.flag_parser(TrainConfig, __doc__.splitlines()[0])
    config = TrainConfig(**vars(parser.parse_args(argv)))
    if config.resume:
        stored = dualenc.read_json(Path(config.resume) / dualenc.RUN_CONFIG)["flags"]
        parser.set_defaults(**stored)  # and parse once more: what is not given is the run's
        config = dualenc.config_from_dict(TrainConfig, vars(parser.parse_args(argv)))
        now = json.loads(json.dumps(vars(config)))  # tuples become lists, like what is stored
        changed = {n: v for n, v in stored.items() if now[n] != v and n not in FREE_ON_RESUME}
        refuse(changed, f"a resumed run keeps {flag_names(changed)}; --init begins another run")
    return config


@contextmanager
def claim_run(config):
    """The run folder, which no other process may use meanwhile. Rank 0 checks, the others wait."""
    out = Path(config.resume or config.out or f"runs/{Path(config.data).resolve().stem}")
    lock = filelock.FileLock(out / LOCK_FILE)
    try:
        if dualenc.rank() == 0:
            held = (out / dualenc.RUN_CONFIG).exists() and not (config.resume or config.overwrite)
            refuse(held, f"{out} holds a run: --resume {out}, or --overwrite, or another --out")
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            for name in ("last", "best"):  # undo a swap that was cut short
                if (out / f"{name}.old").exists() and not (out / name).exists():
                    (out / f"{name}.old").rename(out / name)
        dualenc.from_all_ranks("claimed")
        yield out
    except filelock.Timeout as error:
        raise ValueError(f"another process is using {out}: name another --out") from error
    finally:
        if lock.is_locked and [*out.iterdir()] == [out / LOCK_FILE]:
            shutil.rmtree(out, ignore_errors=True)  # refused before it began: nothing to keep
        lock.release()


def open_run(out, config, run, argv, device, step):
    """Clear a new run's folder and record its settings, which a resumed run must match."""
    record = {
        "flags": dataclasses.asdict(dataclasses.replace(config, resume="", overwrite=False)),
        "command": ["train.py", *(sys.argv[1:] if argv is None else argv)],
        "device": str(device),
        "processes": dualenc.world_size(),
        "versions": {"torch": torch.__version__, "timm": dualenc.timm.__version__},
        "data_names": evaluation.data_checksum([*run.pairs.names, *run.held_out.names]),
    }
    lines = []
    if config.resume:
        begun = dualenc.read_json(out / dualenc.RUN_CONFIG)
        moved = begun["data_names"] != record["data_names"]
        refuse(moved, f"{out} began with other images: point --data at the right ones")
        began = f"{out} began with {begun['processes']} processes, not {record['processes']}"
        refuse(begun["processes"] != record["processes"], began)
        record = {**begun, "flags": record["flags"]}  # the data may have moved
        print(f"resumed  {out} at step {step:,}")
        # Lines after the checkpoint will be written again; a kill may have cut the last one.
        whole = (out / METRICS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
        lines = [f"{line}\n" for line in whole if json.loads(line)["step"] <= step]
    if dualenc.rank() == 0:
        for name in () if config.resume else ("last", "best"):
            shutil.rmtree(out / name, ignore_errors=True)
        dualenc.write_file(out / "trained_on.txt", "".join(f"{n}\n" for n in run.pairs.names))
        dualenc.write_file(out / METRICS_FILE, "".join(lines))
        dualenc.write_file(out / dualenc.RUN_CONFIG, json.dumps(record, indent=2) + "\n")


def save_checkpoint(folder, model, state=None):
    """Write a checkpoint beside the old one, then swap them: at every moment one is complete."""
    if dualenc.rank() > 0:
        return
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new)
    if state is not None:
        torch.save(state, buffer := io.BytesIO())
        dualenc.write_file(new / STATE_FILE, buffer.getvalue())
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def log(out, line, text):
    """Append a line to the metrics, and print it as text."""
    if dualenc.rank() == 0:
        with open(out / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(text, flush=True)


@contextmanager
def stop_signals():
    """Inside, a first SIGINT or SIGTERM is only noted, and a second one stops at once."""
    received = [0]  # the number of the signal, 0 for none

    def note(number, frame):
        received[0] = number
        signal.signal(number, before[number])  # as it was: a second one has its usual effect

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_step(line, config):
    """The line that is printed for a few training steps."""
    floor = f", floor {line['floor_loss']:.3f}" if line["floor_loss"] > 0.01 else ""
    text = f"step {line['step']:>6,}/{config.steps:,}   loss {line['loss']:.3f} "
    text += f"(chance {line['chance_loss']:.3f}{floor})   acc {line['in_batch_acc']:.1%}   "
    text += f"scale {math.exp(line['logit_scale']):.1f}   lr {line['lr']:.1e}"
    if line["pairs_per_s"]:  # the first step has none
        left = round((config.steps - line["step"]) * config.batch_size / line["pairs_per_s"])
        text += f"   {line['pairs_per_s']:,.0f} pairs/s   data {line['data_share']:.0%}"
        text += f"   {left // 60}:{left % 60:02} left"
    counts = {name.replace("_", " "): line[name] for name in ("skipped_steps", "bad_images")}
    return text + "".join(f"   {count} {name}" for name, count in counts.items() if count)


def introduce(config, run, model, optimizer, flags):
    """The head of the printout: data, model, what learns, run, and flags that are not defaults."""
    pairs, text, sides = run.pairs, model.config.text, towers(model).items()
    known, n_captions = pairs.classes, sum(map(len, pairs.captions))
    size = f"{len(pairs):,} images, {n_captions:,} captions"
    size += f", {len(known)} classes: {', '.join(known[:6])}" if known else ""
    print(f"data     {config.data}   {size}; {len(run.held_out):,} images held out")
    vision, language = (sum(w.numel() for w in tower.parameters()) / 1e6 for _, tower in sides)
    sizes = f"({vision:.1f}M) + {text.family} {text.depth}x{text.width} ({language:.1f}M)"
    print(f"model    {model.config.vision.name} {sizes} -> {model.config.projection_dim}")
    sources = [f"{n} tower from {tower.weights_from or 'random weights'}" for n, tower in sides]
    sources += [f"{name} tower locked" for name in sorted(model.locked)]
    print(f"weights  {', '.join(sources)}; new: {'nothing' if config.init else 'projections'}")
    for group in optimizer.param_groups:
        size, decay = sum(w.numel() for w in group["params"]) / 1e6, group["weight_decay"]
        print(f"learns   {size:.2f}M weights at lr {group['peak']:.1e}, weight decay {decay:g}")
    where = f"{model.logit_scale.device} {config.precision}, {dualenc.world_size()} processes"
    print(f"run      {config.steps:,} steps of {config.batch_size}, seed {config.seed}   {where}")
    changed = [f"{k}={v}" for k, v in vars(flags).items() if v != vars(TrainConfig())[k]]
    print(f"flags    {' '.join(changed) or 'defaults'}", flush=True)


def check_recipe(config, pairs, held_out):
    """Raise ValueError for a recipe that cannot learn."""
    for f in dataclasses.fields(config):
        name, value = flag_names([f.name]), getattr(config, f.name)
        if isinstance(value, (int, float)):
            dualenc.check_min(name, value, f.metadata.get("least", 0))
            most = f.metadata.get("most", math.inf)
            refuse(value > most, f"{name} is {value}, expected at most {most}")
    uneven = f"--batch-size {config.batch_size} is not a multiple of {dualenc.world_size()} ranks"
    refuse(config.batch_size % dualenc.world_size(), uneven)
    refuse(not len(pairs), f"{config.data} has no training images: all are held out")
    refuse(len(pairs) < config.batch_size, f"{len(pairs)} training images: lower --batch-size")
    refuse(not len(held_out), f"no images are held out of {config.data}: raise --val-fraction")
    kinds = set(pairs.labels or itertools.chain.from_iterable(pairs.captions))
    refuse(len(kinds) == 1, f"all images of {config.data} share their caption or class")
    refuse(config.cache_features and not config.lock, "--cache-features needs a tower to --lock")
    views = flag_names(f.name for f in augmentations(config))
    one_view = config.cache_features and config.lock != "text"
    refuse(one_view and views, f"--cache-features keeps one view of each image: leave out {views}")
    fields = [f.name for f in dataclasses.fields(config) if f.metadata["group"] == "towers"]
    built = [name for name in fields if getattr(config, name) != vars(TrainConfig())[name]]
    refuse(config.init and built, f"--init brings its own towers: leave out {flag_names(built)}")


def prepare_cpu():
    """Settings for speed on CPUs; without the first one a step takes 6 to 22% longer."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc keeps what a step frees, and asks the system for no fresh pages
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    # Lets the attention that autocast chooses multiply in bf16; despite its name, on CPUs, too.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def main(argv=None):
    """Train from the command line; returns the metrics of the best checkpoint, by name."""
    flags = read_flags(argv)
    device = dualenc.pick_device(flags.device)
    if device.type == "cpu":
        prepare_cpu()
    elif device.index is not None:
        torch.cuda.set_device(device)
    with dualenc.process_group(), claim_run(flags) as out:
        # 1. Data, and what flags at 0 or "auto" stand for.
        run = Run(out, *load_data(flags), features={})
        check_recipe(flags, run.pairs, run.held_out)
        steps = flags.steps or max(1, round(flags.epochs * (len(run.pairs) // flags.batch_size)))
        every = flags.eval_every or math.ceil(steps / 5)
        precision = dualenc.pick_precision(flags.precision, device)
        config = dataclasses.replace(flags, steps=steps, eval_every=every, precision=precision)
        # 2. Model and optimiser, new or from the last checkpoint.
        model, optimizer, state = load_run(config, run.pairs, out, device)
        # 3. The run folder, cleared only now that everything is known to work.
        open_run(out, flags, run, argv, device, state["step"])
        introduce(config, run, model, optimizer, flags)
        # 4. Train; log, evaluate and save on the way.
        if config.cache_features:
            cache_features(config, run, model)
        best = train(config, run, model, optimizer, state)
        print(f"done     best at step {best['step']:,}; measure it again: python eval.py {out}")
    return best


if __name__ == "__main__":
    evaluation.run_script(main)
