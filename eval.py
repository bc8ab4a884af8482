"""Measure a dual encoder: retrieval both ways and zero-shot classification.

    python eval.py runs/shapes                                   a run, on its own held-out data
    python eval.py runs/cifar --data photos.csv --task retrieval
    python eval.py runs/cifar --data pets --task zeroshot --templates templates.txt

A run folder stands for its best checkpoint; any checkpoint folder may be named directly. Pictures and captions always
go through the processor saved with the weights, so they are measured as they were trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dualenc
from dualenc import knob

RUN_CONFIG = "train_config.json"  # beside the checkpoints in a run folder
# What a run's held-out data hangs on.
DATA_FLAGS = ("data", "data_root", "images", "val_fraction", "templates", "seed", "allow_outside")
EVAL_BATCH = 256


@dataclass(frozen=True)
class EvalConfig:
    data: str = knob("", "data spec (README.md lists them); the run's own unless given", "data")
    split: str = knob("test", "which part of the data", "data", choices=dualenc.SPLITS)
    data_root: str = knob("", "where torchvision's data sets lie", "data")
    images: str = knob("", "picture folder of coco: and flickr: caption files", "data")
    allow_outside: bool = knob(False, "let a caption file name pictures by paths that climb out of its folder", "data")
    on_bad_picture: str = knob(
        "", "skip pictures that cannot be read, or stop; as the run did unless given", "data", ("", "error", "skip")
    )
    classes: str = knob("", "text file with one class name a line, for zero-shot over other classes", "data")
    templates: str = knob("", "text file with one template a line, {} for the class name", "data")
    task: str = knob(
        "auto",
        "auto: retrieval, and zero-shot where there are classes",
        "tasks",
        choices=("auto", "retrieval", "zeroshot"),
    )
    batch_size: int = knob(EVAL_BATCH, "pictures or captions a step", "speed")
    workers: int = knob(-1, "processes that read pictures; -1 picks", "speed")
    precision: str = knob("auto", "arithmetic of the towers", "speed", choices=("auto", "bf16", "fp32"))
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "speed")
    json: str = knob("", "file to write the numbers to", "output")


# ---- Embedding ------------------------------------------------------------------------------------------------------


class ReadyPictures(torch.utils.data.Dataset):
    """Pictures resized and cropped but not normalised: uint8 (3, S, S), a quarter of the bytes to move."""

    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.transform.resize_and_crop(dualenc.to_pixels(self.pictures[i], self.transform.channels))


@torch.no_grad()
def embed_pictures(model, pictures, precision="fp32", batch_size=EVAL_BATCH, workers=0):
    """I pictures to (I, E) unit-norm float32 rows on the CPU, through the model's own processor."""
    device, transform = model.logit_scale.device, model.processor.image_transform
    loader = torch.utils.data.DataLoader(
        ReadyPictures(pictures, transform), batch_size, num_workers=workers, generator=torch.Generator()
    )
    rows = []
    for batch in tqdm(loader, desc="pictures", disable=None, leave=False):
        with dualenc.autocast(device, precision):
            rows.append(model.encode_image(transform.normalize(batch.to(device))).float().cpu())
    return finite(torch.cat(rows))


@torch.no_grad()
def embed_captions(model, captions, precision="fp32", batch_size=EVAL_BATCH):
    """N captions to (N, E) unit-norm float32 rows on the CPU, through the model's own processor."""
    device, rows = model.logit_scale.device, []
    for start in tqdm(range(0, len(captions), batch_size), desc="captions", disable=None, leave=False):
        inputs = model.processor(text=captions[start : start + batch_size])
        with dualenc.autocast(device, precision):
            rows.append(model.encode_text(**{name: t.to(device) for name, t in inputs.items()}).float().cpu())
    return finite(torch.cat(rows))


class NotFinite(ValueError):
    """Embeddings of which some are not numbers: all comparisons with them fail, and every rank would be the first."""


def finite(embeds):
    """The same rows, or NotFinite."""
    if not embeds.isfinite().all():
        raise NotFinite("embeddings are not finite numbers: the weights or the pictures' values are broken")
    return embeds


# ---- Retrieval ------------------------------------------------------------------------------------------------------


def ranks(queries, gallery, query_groups, gallery_groups, tile=1024):
    """The rank of each query's best right answer: 1 is first. Wrong answers that score the same stand before it.

    queries, gallery              (Q, E) and (G, E)  unit-norm rows
    query_groups, gallery_groups  (Q,) and (G,)      integers; an answer is right if its group is the query's
    tile                          queries at a time: memory is tile x G, never Q x G
    returns                       (Q,)               integers from 1
    raises                        ValueError if a query has no right answer in the gallery
    """
    found = []
    for rows, groups in zip(queries.split(tile), query_groups.split(tile)):
        scores = rows @ gallery.T
        right = groups[:, None] == gallery_groups[None, :]
        if not right.any(dim=1).all():
            raise ValueError("a query has no right answer in the gallery: every picture needs a caption and vice versa")
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(1 + ((scores >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def retrieval(image_embeds, text_embeds, image_groups, text_groups):
    """Retrieval both ways, several captions a picture and several pictures a caption allowed.

    image_embeds, text_embeds  (I, E) and (N, E)  unit-norm rows
    image_groups, text_groups  (I,) and (N,)      integers; a caption fits a picture if their groups are equal
    returns                    fractions i2t_r1, i2t_r5, i2t_r10, i2t_mrr, ranks i2t_medr, the same with t2i_, the
                               counts n_images and n_captions, and chance_r1: what guessing reaches either way
    source                     Karpathy and Fei-Fei 2015, section 4.1 (recall and median rank)
    """
    metrics = {"n_images": len(image_embeds), "n_captions": len(text_embeds)}
    both_ways = {
        "i2t": ranks(image_embeds, text_embeds, image_groups, text_groups),
        "t2i": ranks(text_embeds, image_embeds, text_groups, image_groups),
    }
    for way, rank in both_ways.items():
        for k in (1, 5, 10):
            metrics[f"{way}_r{k}"] = (rank <= k).double().mean().item()
        metrics[f"{way}_medr"] = rank.double().quantile(0.5).item()
        metrics[f"{way}_mrr"] = (1 / rank.double()).mean().item()
    # The share of all picture-caption cells that are right: a random first answer's chance, in both directions.
    n_groups = int(max(image_groups.max(), text_groups.max())) + 1
    pairs = image_groups.bincount(minlength=n_groups).double() @ text_groups.bincount(minlength=n_groups).double()
    metrics["chance_r1"] = (pairs / (len(image_embeds) * len(text_embeds))).item()
    return metrics


# ---- Zero-shot classification ---------------------------------------------------------------------------------------


def class_embeds(model, classes, templates, precision="fp32"):
    """One direction a class: its captions in all templates, embedded, averaged, normalised again; (K, E).

    source  Radford et al. 2021, section 3.1.4 (ensembling over the embedding space)
    """
    captions = [template.replace("{}", name) for name in classes for template in templates]
    rows = embed_captions(model, captions, precision)
    return F.normalize(rows.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zeroshot(image_embeds, class_rows, labels, classes):
    """Zero-shot classification: the nearest class direction wins; ties count against the model.

    image_embeds, class_rows  (I, E) and (K, E)  unit-norm rows
    labels                    (I,)               right class numbers, below K
    classes                   K names
    returns                   fractions zs_top1, zs_top5, zs_per_class (the mean over classes that occur) and
                              chance_top1, the counts n_images and n_classes, and zs_class_top1, a fraction a class name
    """
    scores = image_embeds @ class_rows.T
    right = scores.gather(1, labels[:, None])
    rank = (scores >= right).sum(dim=1)  # the right class is one of those counted
    hit = (rank <= 1).double()
    by_class = {name: hit[labels == k].mean().item() for k, name in enumerate(classes) if (labels == k).any()}
    return {
        "zs_top1": hit.mean().item(),
        "zs_top5": (rank <= 5).double().mean().item(),
        "zs_per_class": sum(by_class.values()) / len(by_class),
        "zs_class_top1": by_class,
        "chance_top1": 1 / len(classes),
        "n_images": len(image_embeds),
        "n_classes": len(classes),
    }


# ---- Tasks ----------------------------------------------------------------------------------------------------------


def evaluate(model, pairs, tasks=None, templates=dualenc.TEMPLATES, precision="fp32", batch_size=EVAL_BATCH, workers=0):
    """Run tasks on held-out pairs: {"retrieval": {...}, "zeroshot": {...}}, numbers by name.

    model   DualEncoder with a processor; evaluated in evaluation mode and left as it was
    pairs   Pairs
    tasks   some of "retrieval" and "zeroshot"; those that the data allows unless given
    raises  ValueError for zero-shot on data without classes
    """
    tasks = tasks or (["retrieval", "zeroshot"] if pairs.classes else ["retrieval"])
    if "zeroshot" in tasks and not pairs.classes:
        raise ValueError("zero-shot needs pictures with classes: class folders, or a torchvision data set")
    was_training = model.training
    model.eval()
    image_embeds = embed_pictures(model, pairs.pictures, precision, batch_size, workers)
    results = {}
    if "retrieval" in tasks:
        captions, text_groups, image_groups = pairs.caption_table()
        text_embeds = embed_captions(model, captions, precision, batch_size)
        groups = torch.tensor(image_groups), torch.tensor(text_groups)
        results["retrieval"] = retrieval(image_embeds, text_embeds, *groups)
    if "zeroshot" in tasks:
        class_rows = class_embeds(model, pairs.classes, templates, precision)
        results["zeroshot"] = zeroshot(image_embeds, class_rows, torch.tensor(pairs.labels), pairs.classes)
    model.train(was_training)
    return results


def describe(results):
    """Results as the lines of a readable table, each number beside its chance level and sample counts."""
    lines = []
    if "retrieval" in results:
        m = results["retrieval"]
        lines.append(
            f"retrieval   {m['n_images']:,} pictures, {m['n_captions']:,} captions   chance R@1 {m['chance_r1']:.2%}"
        )
        lines.append("                     R@1     R@5    R@10   median rank     MRR")
        for way, name in (("i2t", "image->text"), ("t2i", "text->image")):
            recalls = "  ".join(f"{m[f'{way}_r{k}']:6.1%}" for k in (1, 5, 10))
            lines.append(f"  {name:<14} {recalls}   {m[f'{way}_medr']:11g}   {m[f'{way}_mrr']:.3f}")
    if "zeroshot" in results:
        m = results["zeroshot"]
        lines.append(
            f"zero-shot   {m['n_images']:,} pictures, {m['n_classes']} classes   chance {m['chance_top1']:.1%}"
        )
        lines.append(
            f"  top-1 {m['zs_top1']:.1%}   top-5 {m['zs_top5']:.1%}   mean over classes {m['zs_per_class']:.1%}"
        )
        lines += [f"    {name:<20} {share:6.1%}" for name, share in m["zs_class_top1"].items()]
    return lines


def read_lines(path, default):
    """The non-empty lines of a text file; default if no file is named. Raises ValueError if there are none."""
    if not path:
        return default
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    lines = [line.strip() for _, line in dualenc.text_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return tuple(lines)


def find_checkpoint(run):
    """(checkpoint folder or hub id, flags of the run it belongs to): a run folder stands for its best checkpoint."""
    folder = Path(run)
    home = folder if (folder / RUN_CONFIG).is_file() else folder.parent
    flags = dualenc.read_json(home / RUN_CONFIG)["flags"] if (home / RUN_CONFIG).is_file() else {}
    # A run killed while it replaced best has best.old; one stopped before its first evaluation has only last.
    return next((folder / name for name in ("best", "best.old", "last") if (folder / name).is_dir()), run), flags


def main(argv=None):
    """Evaluate from the command line; returns the numbers that --json writes."""
    parser = dualenc.flag_parser(EvalConfig, __doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder, a checkpoint folder or a hub id")
    args = vars(parser.parse_args(argv))
    run, config = args.pop("run"), EvalConfig(**args)

    checkpoint, flags = find_checkpoint(run)
    device = dualenc.pick_device(config.device)
    model = dualenc.DualEncoder.from_pretrained(checkpoint).to(device)
    if model.processor is None:
        raise ValueError(f"{checkpoint} holds no processor: tokenizer.json and preprocessor_config.json are missing")

    if not (config.data or flags):
        raise ValueError(f"{run} is not a run of train.py, so it has no held-out data of its own: give --data")
    own = {name: flags[name] for name in DATA_FLAGS if name in flags} if not config.data else {}
    given = {name: getattr(config, name) for name in DATA_FLAGS if getattr(config, name, None)}
    spec = {**own, **given}
    templates = read_lines(spec.pop("templates", ""), dualenc.TEMPLATES)
    pairs = dualenc.load_pairs(spec.pop("data"), config.split, templates=templates, **spec)
    if (config.on_bad_picture or (not config.data and flags.get("on_bad_picture"))) == "skip":
        pairs, bad = dualenc.drop_unreadable(pairs, dualenc.pick_workers(config.workers, device))
        print("".join(f"skipped     {name}: {reason}\n" for name, reason in bad.items()), end="")
    if config.classes:
        pairs = with_classes(pairs, read_lines(config.classes, None), templates)

    precision = dualenc.pick_precision(config.precision, device)
    tasks = None if config.task == "auto" else [config.task]
    workers = dualenc.pick_workers(config.workers, device)
    results = evaluate(model, pairs, tasks, templates, precision, config.batch_size, workers)
    print(f"model       {checkpoint}   {precision} on {device}")
    print("\n".join(describe(results)))
    if config.json:
        dualenc.write_file(Path(config.json), json.dumps(results, indent=2) + "\n")
    return results


def with_classes(pairs, classes, templates):
    """The same pictures classified over another list of names, which must hold every class that occurs."""
    if not pairs.classes:
        raise ValueError("--classes needs pictures with classes: class folders, or a torchvision data set")
    numbers = {name: k for k, name in enumerate(classes)}
    missing = [name for name in pairs.classes if name not in numbers]
    if missing:
        raise ValueError(f"--classes lacks {len(missing)} of the data's classes: {', '.join(missing[:5])}")
    labels = [numbers[pairs.classes[label]] for label in pairs.labels]
    captions, classes = dualenc.class_captions(labels, classes, templates)
    return dualenc.Pairs(pairs.names, pairs.pictures, captions, labels, classes)


if __name__ == "__main__":
    dualenc.run_script(main)
