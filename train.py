"""Train a vision-text dual encoder: data and a recipe in, a run folder out.

python train.py                                              drawn shapes, small towers, two minutes on a laptop
python train.py --data captions.csv --vision vit_base_patch16_224.augreg_in21k --pretrained --lock vision
python train.py --data cifar10 --data-root data --epochs 10 --out runs/cifar
python train.py --resume runs/cifar
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import random
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import dualenc
import eval as evaluation
from dualenc import knob

BETAS, EPSILON = (0.9, 0.98), 1e-6  # CLIP, table 19
SIGLIP_BIAS = -10.0  # SigLIP, section 3.2
# The vision tower of --vision scratch: a ResNet-10 of half the width, quick on a CPU.
SCRATCH_VISION = {
    "name": "resnet18",
    "args": {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_width": 32},
    "image_size": 64,
}
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py."""

    data: str = knob("shapes", "data spec (README.md lists them)", "data")
    data_root: str = knob("data", "where torchvision's data sets lie", "data")
    download: bool = knob(False, "let torchvision download what is not there", "data")
    images: str = knob("", "picture folder of coco: and flickr: caption files", "data")
    val_fraction: float = knob(0.1, "share of the pictures held out, where the data has no split of its own", "data")
    templates: str = knob("", "text file with one template a line, {} for the class name", "data")
    crop_scale: float = knob(
        1.0, "augmentation: smallest share of a picture that a random crop keeps; 1 for none", "data"
    )
    flip: bool = knob(False, "augmentation: mirror every other picture (not where captions say left or right)", "data")

    vision: str = knob("scratch", "timm model name; scratch: a small residual network for 64 pixels", "towers")
    vision_args: dict = knob({}, "further arguments of timm.create_model", "towers")
    pretrained: bool | None = knob(
        None, "load timm's weights; by default if --vision names some with a tag, as in resnet18.a1_in1k", "towers"
    )
    image_size: int = knob(0, "pixels a side; the vision tower's own unless given", "towers")
    patch_dropout: float = knob(0.0, "share of patches left out while training (ViTs)", "towers")
    text: str = knob("scratch", "scratch: a new text tower", "towers")
    text_width: int = knob(192, "width of a new text tower", "towers")
    text_depth: int = knob(3, "layers of a new text tower", "towers")
    text_heads: int = knob(3, "attention heads of a new text tower", "towers")
    text_pooling: str = knob("mean", "how the text tower makes one vector", "towers", choices=("cls", "mean", "pooler"))
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
    batch_size: int = knob(256, "pairs a step", "optimisation")
    lr: float = knob(1e-3, "peak learning rate; 1e-3 suits new towers, 1e-4 to 3e-5 pretrained ones", "optimisation")
    weight_decay: float = knob(0.05, "off norms, biases, position tables and logit_scale", "optimisation")
    warmup: float = knob(0.05, "share of the steps in which the learning rate rises", "optimisation")
    clip_grad: float = knob(1.0, "largest gradient norm; 0 for no limit", "optimisation")
    seed: int = knob(0, "of weights, order, augmentation and drawn shapes", "optimisation")

    precision: str = knob(
        "auto",
        "arithmetic of the towers; weights and loss are float32",
        "memory and speed",
        choices=("auto", "bf16", "fp32"),
    )
    workers: int = knob(-1, "processes that read pictures; -1 picks", "memory and speed")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "memory and speed")

    out: str = knob("", "run folder; runs/NAME-OF-THE-DATA unless given", "output")
    resume: str = knob("", "run folder to go on with", "output")
    overwrite: bool = knob(False, "replace a run folder that is already there", "output")
    eval_every: int = knob(0, "steps between evaluations; 0 for five in all", "output")
    log_every: int = knob(50, "steps between printed lines", "output")


# Flags that may change when a run is resumed: they decide what is shown and how fast, not what is learned.
FREE_ON_RESUME = {"resume", "out", "eval_every", "overwrite", "workers", "log_every", "data_root", "download", "device"}


# ---- Data -----------------------------------------------------------------------------------------------------------


class TrainingPairs(torch.utils.data.Dataset):
    """(epoch, picture number) to (uint8 pixels (3, S, S), a caption, the picture's number).

    The key alone decides crop, mirroring and caption, so neither workers nor a resumed run change what is seen.
    """

    def __init__(self, pairs, transform, config):
        self.pairs, self.transform, self.config = pairs, transform, config

    def __getitem__(self, key):
        epoch, i = key
        rng = random.Random(f"{self.config.seed} {epoch} {i}")
        picture, captions = self.pairs[i]
        image = dualenc.to_pixels(picture, self.transform.channels)
        if self.config.crop_scale < 1:
            image = random_crop(image, self.config.crop_scale, rng)
        if self.config.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return self.transform.resize_and_crop(image), rng.choice(captions), i


def random_crop(image, smallest_share, rng):
    """A part of image (C, height, width) in its own proportions, from smallest_share of its area to all of it."""
    side = math.sqrt(rng.uniform(smallest_share, 1))
    height, width = (max(1, round(n * side)) for n in image.shape[-2:])
    top, left = rng.randint(0, image.shape[-2] - height), rng.randint(0, image.shape[-1] - width)
    return image[:, top : top + height, left : left + width]


class Batches(torch.utils.data.Sampler):
    """The keys of each step's batch, which the seed alone decides: every epoch a new order, whole batches only."""

    def __init__(self, n_pictures, batch_size, seed, first_step, steps):
        self.n_pictures, self.batch_size, self.seed = n_pictures, batch_size, seed
        self.first_step, self.steps = first_step, steps

    def __len__(self):
        return self.steps - self.first_step

    def __iter__(self):
        per_epoch = self.n_pictures // self.batch_size
        order, order_epoch = None, None
        for step in range(self.first_step, self.steps):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = list(range(self.n_pictures)), epoch
                random.Random(f"order {self.seed} {epoch}").shuffle(order)
            start = position * self.batch_size
            yield [(epoch, i) for i in order[start : start + self.batch_size]]


def stack_batch(items):
    images, captions, numbers = zip(*items)
    return torch.stack(images), list(captions), list(numbers)


def make_loader(pairs, model, config, device, first_step, steps):
    """Batches from first_step on; on CUDA they are pinned and fetched ahead."""
    workers = dualenc.pick_workers(config.workers, device)
    return torch.utils.data.DataLoader(
        TrainingPairs(pairs, model.processor.image_transform, config),
        batch_sampler=Batches(len(pairs), config.batch_size, config.seed, first_step, steps),
        num_workers=workers,
        collate_fn=stack_batch,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else it would draw from the generator that dropout uses
    )


# ---- Model and optimiser --------------------------------------------------------------------------------------------


def make_model(config, pairs):
    """The towers that the flags name, with a processor: a new tokenizer is learned from the captions."""
    captions = [caption for several in pairs.captions for caption in several]
    tokenizer = dualenc.train_tokenizer(dict.fromkeys(captions), config.vocab_size, config.max_tokens)
    vision, args, size = config.vision, config.vision_args, config.image_size or None
    if vision == "scratch":
        vision, args, size = (
            SCRATCH_VISION["name"],
            {**SCRATCH_VISION["args"], **args},
            size or SCRATCH_VISION["image_size"],
        )
    names_weights = "." in vision or ":" in vision
    pretrained = names_weights if config.pretrained is None else config.pretrained
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        vision,
        config.text,
        projection_dim=config.projection_dim,
        pretrained=pretrained,
        vision_args=args,
        vision_image_size=size,
        vision_patch_dropout=config.patch_dropout,
        text_width=config.text_width,
        text_depth=config.text_depth,
        text_heads=config.text_heads,
        text_pooling=config.text_pooling,
        text_vocab_size=tokenizer.get_vocab_size(),
        text_max_positions=config.max_tokens,
        logit_bias_init=SIGLIP_BIAS if config.loss == "siglip" else None,
    )
    # A tower without weights has learned nothing about a crop: show it the whole picture.
    transform = model.vision_model.image_transform(crop_pct=None if pretrained else 1.0)
    model.processor = dualenc.Processor(transform, tokenizer)
    if config.lock:
        model.lock(config.lock)
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
    """Linear from 0 to peak over the first warmup share of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ---- One step -------------------------------------------------------------------------------------------------------


def pair_groups(pairs, captions, numbers):
    """(B,) group ids: pictures of one class, or with word-for-word the same caption, describe each other."""
    keys = [pairs.labels[i] for i in numbers] if pairs.labels else captions
    first = {}
    return torch.tensor([first.setdefault(key, len(first)) for key in keys])


def compute_loss(name, model, image_embeds, text_embeds, groups):
    """The loss that --loss names, in float32."""
    if name == "siglip":
        return dualenc.siglip_loss(image_embeds, text_embeds, model.logit_scale, model.logit_bias)
    if name == "multi-positive":
        return dualenc.multi_positive_clip_loss(image_embeds, text_embeds, model.logit_scale, groups)
    return dualenc.clip_loss(image_embeds, text_embeds, model.logit_scale)


def reference_losses(name, groups):
    """(chance, floor) in nats: the loss of guessing, and the best reachable while groups of pairs look alike."""
    B, size = len(groups), groups.bincount()[groups].double()
    alike = size.log().mean().item()
    if name == "siglip":
        p = 1 / B  # the best constant answer says "a pair" with the share of pairs
        return -math.log(p) - (B - 1) * math.log1p(-p), 0.0
    if name == "multi-positive":
        return math.log(B) - alike, 0.0
    return math.log(B), alike


@torch.no_grad()
def in_batch_accuracy(image_embeds, text_embeds, groups):
    """The share of pictures and captions whose nearest counterpart in the batch is a right one."""
    cosines = image_embeds @ text_embeds.T
    nearest = torch.cat([groups[cosines.argmax(dim=1)], groups[cosines.argmax(dim=0)]])
    return (nearest == torch.cat([groups, groups])).double().mean().item()


# ---- The run folder -------------------------------------------------------------------------------------------------


def save_checkpoint(folder, model, state=None):
    """Write a whole checkpoint beside the old one, then swap the two: at every moment one of them is complete."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(new)
    if state is not None:
        torch.save(state, new / STATE_FILE)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def open_metrics(out, step):
    """A function that appends one object to metrics.jsonl; lines after step, of a run cut short, are dropped."""
    path = out / "metrics.jsonl"
    kept = path.read_text().splitlines() if path.exists() else []
    dualenc.write_file(path, "".join(line + "\n" for line in kept if json.loads(line)["step"] <= step))

    def log(line):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    return log


def open_run(config, argv, device):
    """Make the run folder and note what is run with what; returns it."""
    name = Path(config.data.partition(":")[2] or config.data).stem
    out = Path(config.out or f"runs/{name}")
    if (out / evaluation.RUN_CONFIG).exists():
        if not config.overwrite:
            raise ValueError(
                f"{out} already holds a run: go on with --resume {out}, or --overwrite it, or name another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "flags": dataclasses.asdict(config),
        "command": ["train.py", *(sys.argv[1:] if argv is None else argv)],
        "device": str(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    dualenc.write_file(out / evaluation.RUN_CONFIG, json.dumps(record, indent=2) + "\n")
    return out


def read_flags(argv):
    """TrainConfig from the command line; with --resume, from the run, and only harmless flags may differ."""
    parser = dualenc.flag_parser(TrainConfig, __doc__.splitlines()[0])
    config = TrainConfig(**vars(parser.parse_args(argv)))
    if not config.resume:
        return config
    stored = dualenc.read_json(Path(config.resume) / evaluation.RUN_CONFIG)["flags"]
    stored["vision_args"] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["vision_args"].items()}
    parser.set_defaults(**stored)
    config = TrainConfig(**vars(parser.parse_args(argv)))
    changed = [name for name, value in stored.items() if getattr(config, name) != value and name not in FREE_ON_RESUME]
    if changed:
        raise ValueError(f"a resumed run keeps its flags, but these differ from {config.resume}: {', '.join(changed)}")
    return config


def check(config, pairs, held_out):
    """Raise ValueError for a recipe that cannot learn."""
    if config.batch_size < 2:
        raise ValueError(
            f"batch_size is {config.batch_size}: with one pair there is nothing to tell it from and the loss is always "
            f"0; take at least 2, better 256"
        )
    if len(pairs) < config.batch_size:
        raise ValueError(
            f"{config.data} has {len(pairs)} training pictures, fewer than one batch of {config.batch_size}: pictures "
            f"would repeat within a batch, as wrong answers to themselves; take --batch-size {len(pairs)} or less"
        )
    if not len(held_out):
        raise ValueError(f"no pictures are held out of {config.data}: raise --val-fraction ({config.val_fraction})")


# ---- Watching -------------------------------------------------------------------------------------------------------


class Meter:
    """Means and rates since the last printed line; the first step, evaluation and saving are not timed."""

    def __init__(self, steps, batch_size):
        self.steps, self.batch_size = steps, batch_size
        self.reset()

    def reset(self):
        self.sums, self.count = {}, 0
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0

    def fetch(self, loader):
        """The loader's batches, with the time spent waiting for each one noted."""
        batches = iter(loader)
        for _ in range(len(loader)):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, values, first):
        """Count one step; the first one of a run warms things up and is not timed."""
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
        """Means of what was added, pairs_per_s, data_share (of the time, waiting for data); then start anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        means = {name: total / self.count for name, total in self.sums.items()}
        rates = {"pairs_per_s": self.timed_steps * self.batch_size / seconds, "data_share": self.waited / seconds}
        self.reset()
        return {**means, **rates}


def describe_step(line, steps, batch_size):
    """One line of the printout."""
    floor = f", floor {line['floor_loss']:.3f}" if line["floor_loss"] > 0.01 else ""
    left = (steps - line["step"]) * batch_size / line["pairs_per_s"] if line["pairs_per_s"] else 0
    return (
        f"step {line['step']:>6,}/{steps:,}   loss {line['loss']:.3f} (chance {line['chance_loss']:.3f}{floor})   "
        f"acc {line['in_batch_acc']:.1%}   scale {math.exp(line['logit_scale']):.1f}   lr {line['lr']:.1e}   "
        f"{line['pairs_per_s']:,.0f} pairs/s   data {line['data_share']:.0%}   {left // 60:.0f}:{left % 60:02.0f} left"
    )


def describe_evaluation(line, steps, saved):
    """One line of the printout."""
    parts = []
    if "i2t_r1" in line:
        parts.append(f"image->text R@1 {line['i2t_r1']:.1%} R@5 {line['i2t_r5']:.1%}")
        parts.append(
            f"text->image R@1 {line['t2i_r1']:.1%} R@5 {line['t2i_r5']:.1%} (chance R@1 {line['chance_r1']:.1%})"
        )
    if "zs_top1" in line:
        parts.append(f"zero-shot top-1 {line['zs_top1']:.1%} (chance {line['chance_top1']:.1%})")
    return f"eval {line['step']:>6,}/{steps:,}   {'   '.join(parts)}   saved {saved}"


def introduce(config, model, pairs, held_out, steps, device, precision):
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
    print(f"run      batch_size={config.batch_size} steps={steps}   torch {torch.__version__}   {device} {precision}")
    print(f"flags    {' '.join(changed) or 'defaults'}", flush=True)


# ---- Main -----------------------------------------------------------------------------------------------------------


def load_data(config):
    """(training pairs, held-out pairs, templates) that the flags name."""
    templates = evaluation.read_lines(config.templates, dualenc.TEMPLATES)
    source = {name: getattr(config, name) for name in evaluation.DATA_FLAGS if name not in ("data", "templates")}
    source.update(templates=templates, download=config.download)
    return *(dualenc.load_pairs(config.data, split, **source) for split in ("train", "val")), templates


def train_step(model, optimizer, config, batch, groups, precision):
    """Forward, loss, backward, update; returns what to log of it."""
    images, captions, _ = batch
    device = model.logit_scale.device
    inputs = {name: tensor.to(device) for name, tensor in model.processor(text=captions).items()}
    with dualenc.autocast(device, precision):
        image_embeds = model.encode_image(
            model.processor.image_transform.normalize(images.to(device, non_blocking=True))
        )
        text_embeds = model.encode_text(**inputs)
    loss = compute_loss(config.loss, model, image_embeds, text_embeds, groups)
    optimizer.zero_grad()
    loss.backward()
    if config.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=dualenc.LOGIT_SCALE_MAX)
    chance, floor = reference_losses(config.loss, groups)
    accuracy = in_batch_accuracy(image_embeds, text_embeds, groups)
    return {"loss": loss.item(), "chance_loss": chance, "floor_loss": floor, "in_batch_acc": accuracy}


def evaluate_and_save(out, model, optimizer, held_out, templates, precision, done, best):
    """Evaluate, write the last checkpoint with all that resuming needs, and the best one if this is it.

    returns  (the evaluation's numbers by name, the best evaluation's)
    """
    results = evaluation.evaluate(model, held_out, templates=templates, precision=precision)
    numbers = {name: value for task in results.values() for name, value in task.items() if name != "zs_class_top1"}
    line = {"step": done, **numbers}
    if best is None or score(line) >= score(best):
        best = line
        save_checkpoint(out / "best", model)
    state = {"step": done, "best": best, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_checkpoint(out / "last", model, state)
    return line, best


def score(line):
    """What the best checkpoint is best at: zero-shot accuracy where there are classes, else R@1 both ways."""
    return line["zs_top1"] if "zs_top1" in line else (line["i2t_r1"] + line["t2i_r1"]) / 2


def main(argv=None):
    """Train from the command line; returns the numbers of the best checkpoint, by name."""
    # 1. Flags, device and data.
    config = read_flags(argv)
    device = dualenc.pick_device(config.device)
    precision = dualenc.pick_precision(config.precision, device)
    pairs, held_out, templates = load_data(config)
    check(config, pairs, held_out)
    steps = config.steps or round(config.epochs * (len(pairs) // config.batch_size))
    eval_every = config.eval_every or math.ceil(steps / 5)

    # 2. Model and optimiser, new or from the last checkpoint.
    torch.manual_seed(config.seed)
    state = {"step": 0, "best": None}
    if config.resume:
        model = dualenc.DualEncoder.from_pretrained(Path(config.resume) / "last")
        state = torch.load(Path(config.resume) / "last" / STATE_FILE, weights_only=True)
    else:
        model = make_model(config, pairs)
    if config.lock:
        model.lock(config.lock)
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    if config.resume:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    # 3. The run folder and the head of the printout.
    out = Path(config.resume) if config.resume else open_run(config, argv, device)
    log = open_metrics(out, state["step"])
    introduce(config, model, pairs, held_out, steps, device, precision)

    # 4. Train; log, evaluate and save on the way.
    best, first_step = state["best"], state["step"]
    meter = Meter(steps, config.batch_size)
    loader = make_loader(pairs, model, config, device, first_step, steps)
    for done, batch in enumerate(meter.fetch(loader), first_step + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done - 1, steps, config.warmup, config.lr)
        groups = pair_groups(pairs, *batch[1:]).to(device)
        meter.add(train_step(model, optimizer, config, batch, groups, precision), first=done == first_step + 1)
        if done % config.log_every == 0 or done == steps:
            lr, logit_scale = optimizer.param_groups[0]["lr"], model.logit_scale.item()
            line = {"step": done, **meter.read(), "logit_scale": logit_scale, "lr": lr}
            if not math.isfinite(line["loss"]):
                raise ValueError(
                    f"the loss is no longer a number at step {done} (learning rate {lr:.1e}, scale "
                    f"{math.exp(logit_scale):.1f}); {out}/last is the last good checkpoint; try a lower --lr"
                )
            log(line)
            print(describe_step(line, steps, config.batch_size), flush=True)
        if done % eval_every == 0 or done == steps:
            with meter.paused():
                line, best = evaluate_and_save(out, model, optimizer, held_out, templates, precision, done, best)
                log(line)
                print(describe_evaluation(line, steps, out / ("best" if line is best else "last")), flush=True)

    # 5. What came out, and what to do with it.
    print(f"done     best at step {best['step']:,}; see it measured again: python eval.py {out}")
    return best


if __name__ == "__main__":
    dualenc.run_script(main)
