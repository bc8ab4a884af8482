"""Measure a dual encoder, with intervals and chance levels, and show what it does.

    python eval.py runs/shapes                                    a run, on its own held-out data
    python eval.py runs/cifar --task all --report report          everything the data allows, as a web page too
    python eval.py runs/cifar --data photos.csv --task retrieval
    python eval.py runs/cifar --data pets --task zeroshot --templates clip7
    python eval.py runs/cifar --data photos/ --task search --query "a dog on a beach" --out found.png

A run folder stands for its best checkpoint; any checkpoint folder may be named directly. Pictures and captions always
go through the processor saved with the weights, so they are measured as they were trained: no flag changes that.

Sections   1 Flags           2 Embedding, once           3 Intervals        4 Retrieval
           5 Zero-shot and calibration                   6 Linear probe and k-NN
           7 Binding and winoground                      8 Search           9 Tables
          10 The report     11 The tasks by name        12 Main

Symbols    I pictures, N captions, K classes, E embedding size, R resamples.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import dualenc
from dualenc import knob

RUN_CONFIG = "train_config.json"  # beside the checkpoints in a run folder
# What a run's held-out data hangs on.
DATA_FLAGS = ("data", "data_root", "images", "val_fraction", "templates", "seed", "allow_outside")
EVAL_BATCH = 256

# ---- 1  Flags -------------------------------------------------------------------------------------------------------

TASK_NAMES = ("retrieval", "zeroshot", "probe", "knn", "binding", "winoground", "search")


@dataclass(frozen=True)
class EvalConfig:
    """The flags of eval.py."""

    data: str = knob("", "data spec (README.md lists them); the run's own unless given", "data")
    split: str = knob("test", "which part of the data", "data", choices=dualenc.SPLITS)
    data_root: str = knob("", "where torchvision's data sets lie", "data")
    images: str = knob("", "picture folder of coco: and flickr: caption files", "data")
    allow_outside: bool = knob(False, "let a caption file name pictures by paths that climb out of its folder", "data")
    on_bad_picture: str = knob(
        "",
        "skip unreadable pictures, or stop; as the run did unless given; search always skips, winoground always stops",
        "data",
        ("", "error", "skip"),
    )
    classes: str = knob("", "other classes for zero-shot: names with commas between, or a file, one a line", "data")
    templates: str = knob("", "plain, clip7, clip80, or a file with one template a line, {} for the class", "data")
    task: str = knob(
        "auto",
        "auto: retrieval, and zero-shot where there are classes; all: also what takes training pictures, and binding",
        "tasks",
        choices=("auto", "all", *TASK_NAMES),
    )
    query: str = knob("", "search: words, or a picture file", "tasks")
    top: int = knob(20, "search: pictures to show", "tasks")
    index: str = knob("", "search: folder of the index; beside the data unless given", "tasks")
    batch_size: int = knob(EVAL_BATCH, "pictures or captions a step", "speed")
    workers: int = knob(-1, "processes that read pictures; -1 picks", "speed")
    precision: str = knob("auto", "arithmetic of the towers", "speed", choices=("auto", "bf16", "fp32"))
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "speed")
    json: str = knob("", "file to write the numbers to", "output")
    out: str = knob("", "search: picture file for the contact sheet", "output")
    report: str = knob("", "folder to write a self-contained web page to", "output")


# ---- 2  Embedding, once ---------------------------------------------------------------------------------------------


class ReadyPictures(torch.utils.data.Dataset):
    """(picture, None), resized and cropped but not normalised: uint8 (3, S, S), a quarter of the bytes to move.

    For a picture that cannot be read, (a blank one, the error): raised in a worker, it would come with the worker's
    traceback.
    """

    def __init__(self, pictures, transform):
        self.pictures, self.transform = dualenc.sized_for(transform, pictures), transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        channels = self.transform.channels
        try:
            return self.transform.resize_and_crop(dualenc.to_pixels(self.pictures[i], channels)), None
        except ValueError as error:
            return self.transform.resize_and_crop(torch.zeros(channels, 8, 8, dtype=torch.uint8)), error


def stack_pictures(items):
    """A batch (B, 3, S, S), and B times why a picture cannot be read, or None."""
    images, errors = zip(*items)
    return torch.stack(images), errors


def progress(items, what, count=None):
    """The same items, with a bar on a terminal: one bar, however many processes there are; count if len has none."""
    return tqdm(items, desc=what, total=count, disable=dualenc.process_rank() > 0 or None, leave=False)


def own_numbers(count, batch_size):
    """The numbers of the pictures or captions that this process embeds: whole batches of those of one process."""
    batches = dualenc.share(math.ceil(count / batch_size))
    return range(count)[batches.start * batch_size : batches.stop * batch_size]


def embed_pictures(model, pictures, precision="fp32", batch_size=EVAL_BATCH, workers=0):
    """I pictures to (I, E) unit-norm float32 rows on the CPU, through the model's own processor."""
    return run_pictures(model, model.encode_image, pictures, precision, batch_size, workers)


def picture_features(model, pictures, precision="fp32", batch_size=EVAL_BATCH, workers=0):
    """I pictures to (I, W) float32 rows on the CPU: what the vision tower pools, before the projection."""
    return run_pictures(model, partial(pooled, model), pictures, precision, batch_size, workers)


def pooled(model, pixel_values):
    """(B, 3, S, S) normalised pixels to (B, W)."""
    return model.vision_model(pixel_values, pooled_only=True).pooler_output


def run_pictures(model, encode, pictures, precision, batch_size, workers):
    """One row a picture, in every process those of all; raises the first error of a picture that cannot be read."""
    mine, rows = own_numbers(len(pictures), batch_size), []
    # A process without a share embeds a picture all the same: all must send rows of one width.
    batches = cut(mine or range(1), batch_size)
    with dualenc.together():
        for some, errors in run_batches(model, encode, pictures, batches, precision, workers):
            for error in filter(None, errors):
                raise error
            rows.append(some)
    return finite(dualenc.gather_embeds(torch.cat(rows)[: len(mine)]))


def cut(numbers, size):
    """A sequence of picture numbers in lists of this size, the last one perhaps shorter."""
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


@torch.no_grad()
def run_batches(model, encode, pictures, batches, precision, workers):
    """For each list of picture numbers yields (its rows, float32 on the CPU; why each cannot be read, or None)."""
    device, transform = model.logit_scale.device, model.processor.image_transform
    loader = torch.utils.data.DataLoader(
        ReadyPictures(pictures, transform),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=stack_pictures,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # measuring leaves the global generator alone
        worker_init_fn=dualenc.start_worker,
    )
    for images, errors in progress(dualenc.from_workers(loader), "pictures", len(loader)):
        with dualenc.autocast(device, precision):
            rows = encode(transform.normalize(images.to(device, non_blocking=True))).float().cpu()
        yield rows, errors


@torch.no_grad()
def embed_features(model, features, precision="fp32", batch_size=EVAL_BATCH):
    """(I, W) rows of picture_features to those of embed_pictures, (I, E), with the vision tower's work left out."""
    device, rows = model.logit_scale.device, []
    for some in features.split(batch_size):
        with dualenc.autocast(device, precision):
            rows.append(model.project_image(some.to(device)).float().cpu())
    return finite(torch.cat(rows))


@torch.no_grad()
def embed_captions(model, captions, precision="fp32", batch_size=EVAL_BATCH):
    """N captions to (N, E) unit-norm float32 rows on the CPU, through the model's own processor.

    Equal captions are embedded once: in batches padded to other lengths they would come out a little different, and
    a tie between them would be decided by rounding. A batch holds captions of about the same length, so that little of
    it is padding.
    """
    device, rows = model.logit_scale.device, []
    distinct = by_length(model.processor, list(dict.fromkeys(captions)), batch_size)
    row_of = {caption: row for row, caption in enumerate(distinct)}
    mine = own_numbers(len(distinct), batch_size)
    for start in progress((mine or range(1))[::batch_size], "captions"):
        inputs = model.processor(text=distinct[start : start + batch_size])
        with dualenc.autocast(device, precision):
            rows.append(model.encode_text(**{name: t.to(device) for name, t in inputs.items()}).float().cpu())
    embeds = finite(dualenc.gather_embeds(torch.cat(rows)[: len(mine)]))
    return embeds[torch.tensor([row_of[caption] for caption in captions])]


def by_length(processor, captions, batch_size):
    """The captions, those of the fewest tokens first."""
    batches = (captions[start : start + batch_size] for start in range(0, len(captions), batch_size))
    lengths = [n for batch in batches for n in processor(text=batch)["attention_mask"].sum(dim=1).tolist()]
    return [captions[i] for i in sorted(range(len(captions)), key=lengths.__getitem__)]


# ---- Rows kept on disk: of a search index, of a locked tower


def store_home(spec, ending, data_root="data"):
    """Where rows made from the pictures of a data spec lie: beside its folder or file, else below data_root; hidden."""
    path = Path(spec.partition(":")[2] or spec)
    on_disk = path.exists() or path.suffix.lower() == ".tar"  # with braces, of several shards
    beside = Path(os.path.abspath(path)) if on_disk else Path(data_root) / spec
    return beside.with_name(f".{beside.name}.{ending}")


def index_key(model, precision, parts=("vision_model.", "visual_projection.")):
    """A name that changes with whatever changes a row: weights and build of the picture's side, transform, arithmetic.

    parts  what the names of the weights that decide a row begin with
    """
    # Patches are left out while a tower learns, never here.
    tower = dataclasses.asdict(dataclasses.replace(model.config.vision, patch_dropout=0.0))
    facts = [tower, model.processor.image_transform.to_dict(), precision, parts]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stamps_of(pairs):
    """What tells each picture from its older versions: of a file name, size and time of change; else its name."""
    return [stamp(name, path) for name, path in zip(pairs.names, picture_paths(pairs.pictures))] or pairs.names


def stamp(name, path):
    """The stamp of the picture file at a path; of one that is not there, its name."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{name} 0 0"
    return f"{name} {status.st_size} {status.st_mtime_ns}"


def picture_paths(pictures):
    """The file of each picture of a sequence, or the shard it lies in; none if they are not files."""
    if isinstance(pictures, dualenc.Selected):
        paths = picture_paths(pictures.items)
        return [paths[i] for i in pictures.indices] if paths else []
    if isinstance(pictures, dualenc.ShardPictures):
        return [pictures.paths[shard] for shard in pictures.places[:, 0]]
    return pictures.paths if isinstance(pictures, dualenc.PictureFiles) else []


def stored_rows(folder, stamps, width, embed, batch_size, whole_batches=False):
    """Rows (I, width) kept in a folder, one a picture, brought up to date: (rows, how many were tried, unreadable).

    stamps         I strings, another one when the picture changes
    embed          function of lists of picture numbers that yields (rows, errors) for each; see run_batches
    whole_batches  fill the last list up, so that all have batch_size numbers
    returns        the rows, float32, read from disk as they are used; unreadable is {stamp: why}, and such rows are 0
    raises         OSError or ValueError naming what cannot be written, NotFinite for broken weights

    The folder holds pictures.json (stamps in the order of the rows) and the .npy file that it names. Changed stamps get
    a new file of rows, and the table follows when that is done; pictures that could not be read are tried again, and
    until the table says otherwise their rows count for nothing: whatever interrupts this, the store stays whole. A
    second run waits until the first one is done, and takes what it made; the processes of a job share the work.
    """
    table_file = folder / "pictures.json"
    with alone_in(folder):
        table = dualenc.read_json(table_file) if table_file.is_file() else {"stamps": [], "unreadable": {}, "rows": ""}
        # What could not be read is tried again: a permission or a network that comes back changes no stamp.
        row_of = {stamp: row for row, stamp in enumerate(table["stamps"]) if stamp not in table["unreadable"]}
        new = [i for i, stamp in enumerate(stamps) if stamp not in row_of]
        file = folder / table["rows"]
        if table["stamps"] != stamps:
            file = folder / f"rows-{hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]}.npy"
            with dualenc.together():
                if dualenc.process_rank() == 0:
                    rows = create_rows(file, len(stamps), width)
                    for kept in cut([i for i, stamp in enumerate(stamps) if stamp in row_of], 4096):
                        rows[kept] = load_rows(folder / table["rows"])[[row_of[stamps[i]] for i in kept]]
                    rows.flush()
        if new or table["stamps"] != stamps:
            batches = cut(new + new[-1:] * (-len(new) % batch_size if whole_batches else 0), batch_size)
            errors = fill_rows(file, batches, embed)
            unreadable = {stamps[i]: why for i, why in errors.items()}
            table = {"stamps": stamps, "unreadable": unreadable, "rows": file.name}
            with dualenc.together():
                if dualenc.process_rank() == 0:
                    dualenc.write_file(table_file, json.dumps(table))
                    for older in set(folder.glob("rows-*.npy")) - {file}:
                        older.unlink()
        return load_rows(folder / table["rows"]), len(new), table["unreadable"]


@contextmanager
def alone_in(folder):
    """Inside, no other run writes to this folder, which is made if need be; the processes of a job go together."""
    with ExitStack() as held:
        with dualenc.together():
            if dualenc.process_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                dualenc.lock_file(held.enter_context(open(folder / "lock", "w")), wait=True)
        yield
        dualenc.tell_all(None)  # the first process lets go when all have done what they came for


def create_rows(path, count, width):
    """A new .npy file of float32 zeros, mapped into memory.

    Its space is taken at once: a full disk says so here, whereas a write into the map would end the process.
    """
    with dualenc.blamed_on(path, "cannot write"):
        try:
            rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, rows.offset + rows.nbytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return rows


def fill_rows(path, batches, embed):
    """Write the rows of all batches, as they come, each process its share; returns {picture number: why unreadable}."""
    rows, unreadable = np.load(path, mmap_mode="r+"), {}
    mine = batches[dualenc.share(len(batches))]
    with dualenc.together():
        for numbers, (some, errors) in zip(mine, embed(mine)):
            unreadable |= {i: str(error) for i, error in zip(numbers, errors) if error}
            some[[error is not None for error in errors]] = 0
            rows[numbers] = finite(some)
        rows.flush()
    return {i: why for share in dualenc.tell_all(unreadable or None) for i, why in share.items()}


def load_rows(path):
    """The rows of an .npy file, read from disk as they are used."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


class NotFinite(ValueError):
    """Embeddings of which some are not numbers: all comparisons with them fail, and every rank would be the first."""


def finite(embeds):
    """The same rows, or NotFinite."""
    if not embeds.isfinite().all():
        raise NotFinite("embeddings are not finite numbers: the weights or the pictures' values are broken")
    return embeds


class Subject:
    """A model and the data it is measured on; what several tasks need is computed once, when first asked for.

    model       DualEncoder with a processor
    data        Pairs; Quadruples for winoground; a Gallery for search
    load_train  function without arguments that gives the training Pairs, for the probe and k-NN; or None
    templates   what class names become for zero-shot
    features    (I, W), what picture_features would give for data.pictures, if that is known
    the rest    as in EvalConfig
    raises      ValueError for a model without a processor
    """

    def __init__(
        self,
        model,
        data,
        load_train=None,
        templates=dualenc.TEMPLATES,
        precision="fp32",
        batch_size=EVAL_BATCH,
        workers=0,
        features=None,
    ):
        if model.processor is None:
            raise ValueError(
                "the model holds no processor, so nothing says how its pictures and captions were prepared: "
                "tokenizer.json or preprocessor_config.json is missing from its checkpoint"
            )
        self.model, self.data, self.load_train, self.templates = model, data, load_train, templates
        self.known_features = features
        self.precision, self.batch_size, self.workers = precision, batch_size, workers
        reading = {"precision": precision, "batch_size": batch_size}
        self.embed_captions = partial(embed_captions, model, **reading)
        self.class_embeds = partial(class_embeds, model, **reading)
        self.embed_pictures = partial(embed_pictures, model, workers=workers, **reading)
        self.picture_features = partial(picture_features, model, workers=workers, **reading)

    @cached_property
    def image_embeds(self):
        """(I, E)"""
        if self.known_features is not None:
            return embed_features(self.model, self.known_features, self.precision, self.batch_size)
        return self.embed_pictures(self.data.pictures)

    @cached_property
    def captions(self):
        """(the N captions, the group of each picture (I,), the group of each caption (N,))"""
        captions, text_groups, image_groups = self.data.caption_table()
        return captions, torch.tensor(image_groups), torch.tensor(text_groups)

    @cached_property
    def text_embeds(self):
        """(N, E)"""
        return self.embed_captions(self.captions[0])

    @cached_property
    def ranks(self):
        """(of the I pictures, of the N captions)"""
        device = self.model.logit_scale.device
        return ranks(self.image_embeds.to(device), self.text_embeds.to(device), *self.captions[1:])

    @cached_property
    def labels(self):
        """(I,); raises ValueError for data without classes"""
        if not self.data.classes:
            raise ValueError(
                "zero-shot needs pictures with classes, and so do probe and k-NN: class folders, or a torchvision set"
            )
        return torch.tensor(self.data.labels)

    @cached_property
    def class_rows(self):
        """(K, E), one direction a class"""
        return self.class_embeds(self.data.classes, self.templates)

    @cached_property
    def features(self):
        """(features of the training pictures, their labels, features of the test pictures), for probe and k-NN."""
        labels = self.labels  # asked for first: without classes there is no need to read training pictures
        if self.load_train is None:
            raise ValueError(
                "probe and k-NN learn from training pictures other than those measured, and none were given: "
                "measure another part than --split train"
            )
        train = self.load_train()
        if train.classes != self.data.classes:
            raise ValueError(
                f"the training part has {len(train.classes or ())} classes and the test part {len(labels.unique())} of "
                f"{len(self.data.classes)}: probe and k-NN need the same class list in both"
            )
        train_features, train_labels = self.picture_features(train.pictures), torch.tensor(train.labels)
        return train_features, train_labels, self.picture_features(self.data.pictures)


# ---- 3  Intervals ---------------------------------------------------------------------------------------------------

RESAMPLES = 1000


def resamples(n, seed=0):
    """Yields (R, n) float64 until RESAMPLES rows are drawn: how often each of n pictures is in a resample of n."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(RESAMPLES, 1_000_000 // n))
    for start in progress(range(0, RESAMPLES, at_once), "intervals"):
        rows = min(at_once, RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator) + n * torch.arange(rows)[:, None]
        yield drawn.flatten().bincount(minlength=rows * n).view(rows, n).double()


def with_intervals(names, statistics, n, mirrored=()):
    """Numbers with 95% bootstrap intervals over pictures: {name, name_low, name_high for each name}.

    names       M strings
    statistics  function from weights of the pictures (R, n) to values (R, M); weights of 1 give the numbers themselves
    n           pictures
    mirrored    names of sums of distances, which chance only adds to: in resamples they come out too large, by about as
                much as the number itself is. Their intervals are mirrored at the number, and end at 0
    source      Efron and Tibshirani 1993, chapter 13 (percentile intervals); mirrored: Davison and Hinkley 1997,
                equation 5.6 (basic intervals)
    """
    values = statistics(torch.ones(1, n, dtype=torch.float64))[0]
    drawn = torch.cat([statistics(weights) for weights in resamples(n)])
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    numbers = {}
    for name, value, *ends in zip(names, values.tolist(), low.tolist(), high.tolist()):
        if name in mirrored:
            ends = [max(0.0, 2 * value - end) for end in reversed(ends)]
        numbers.update(zip((name, f"{name}_low", f"{name}_high"), (value, *ends)))
    return numbers


def mean_with_interval(name, values):
    """with_intervals of the plain mean of one value a picture (n,)."""
    values = values.double()[:, None]
    return with_intervals([name], lambda weights: weights @ values / weights.sum(dim=1, keepdim=True), len(values))


# ---- 4  Retrieval ---------------------------------------------------------------------------------------------------


def ranks(image_embeds, text_embeds, image_groups, text_groups, tile=1024):
    """Both ways, the rank of each query's best right answer: 1 is first. Wrong answers that score the same stand
    before it, and scores that are not numbers before all others.

    Sorted by group, right answers lie in tiles along the diagonal. These tiles give each query its best right score;
    then every tile of the picture-caption matrix is multiplied once and counted for both directions.

    image_embeds, text_embeds  (I, E) and (N, E)  unit-norm rows
    image_groups, text_groups  (I,) and (N,)      integers; a caption fits a picture if their groups are equal
    tile                       rows and columns at a time, a multiple of 64: never more than tile x tile scores at once
                               (for the exercise, all scores at once will do)
    returns                    (I,) and (N,)      int64 from 1, on the CPU; computed where the embeddings are
    raises                     ValueError if a picture has no caption that fits, or a caption no picture
    Exercise 7                 medium, 45 minutes: ranks with several captions, run `pytest -k exercise_7`
    """
    image_groups, text_groups = image_groups.to(image_embeds.device), text_groups.to(image_embeds.device)
    if not torch.equal(image_groups.unique(), text_groups.unique()):
        raise ValueError("a query has no right answer in the gallery: every picture needs a caption and vice versa")
    images, texts = SortedTiles(image_embeds, image_groups, tile), SortedTiles(text_embeds, text_groups, tile)
    best_text, best_image = (embeds.new_full((len(embeds),), -torch.inf) for embeds in (image_embeds, text_embeds))
    for rows, columns, scores, right in score_tiles(images, texts, only_right=True):
        scores = scores.masked_fill(~right, -torch.inf)
        best_text[rows] = best_text[rows].maximum(scores.amax(dim=1))
        best_image[columns] = best_image[columns].maximum(scores.amax(dim=0))

    # A rank is 1 more than the wrong answers that are not below the best right one.
    image_ranks, text_ranks = 1 + images.count_wrong(texts), 1 + texts.count_wrong(images)
    flags = image_embeds.new_empty(tile, tile)
    for rows, columns, scores, right in score_tiles(images, texts):
        if right is not None:
            scores.masked_fill_(right, torch.inf)
        below = flags[: scores.shape[0], : scores.shape[1]]
        # Flags as floats are summed many times faster than as bools, and exactly up to 2**24 of them.
        image_ranks[rows] -= torch.lt(scores, best_text[rows, None], out=below).sum(dim=1).long()
        text_ranks[columns] -= torch.lt(scores, best_image[columns], out=below).sum(dim=0).long()
    return images.unsort(image_ranks), texts.unsort(text_ranks)


class Tile(NamedTuple):
    """Some sorted rows, filled up with zeros to the height of a tile."""

    where: slice  # of the real rows, among all of them
    rows: torch.Tensor
    first_group: int
    last_group: int


class SortedTiles:
    """Rows sorted by group, cut into tiles of one shape.

    A matrix product rounds a row differently at the ragged end of a block. In blocks of one shape, a multiple of 64,
    equal rows get equal scores wherever they stand, so that ties stay ties.
    """

    def __init__(self, embeds, groups, tile):
        self.order, n = groups.argsort(stable=True), len(groups)
        self.groups, self.tiles = groups[self.order], []
        tile = min(tile, n + -n % 64)
        rows = embeds.new_zeros(n + -n % tile, embeds.shape[1])
        torch.index_select(embeds, 0, self.order, out=rows[:n])
        for start in range(0, n, tile):
            where = slice(start, min(start + tile, n))
            first, last = self.groups[where][[0, -1]].tolist()
            self.tiles.append(Tile(where, rows[start : start + tile], first, last))

    def count_wrong(self, others):
        """For each row, how many of the others are of another group."""
        first, last = (torch.searchsorted(others.groups, self.groups, side=side) for side in ("left", "right"))
        return len(others.groups) - (last - first)

    def unsort(self, values):
        """Values of the sorted rows in the order that the rows came in, on the CPU."""
        return torch.empty_like(values).scatter_(0, self.order, values).cpu()


def score_tiles(images, texts, only_right=False):
    """Yields (picture slice, caption slice, scores, right): right marks the right answers, None where there are none.

    only_right  leaves out tiles without right answers
    scores      good until the next tile: all are written to one piece of memory, for asking the system for new memory
                each time can take longer than the product
    """
    pairs = []
    for image, text in itertools.product(images.tiles, texts.tiles):
        overlap = image.first_group <= text.last_group and text.first_group <= image.last_group
        if overlap or not only_right:
            pairs.append((image, text, overlap))
    product = images.tiles[0].rows.new_empty(len(images.tiles[0].rows), len(texts.tiles[0].rows))
    for image, text, overlap in progress(pairs, "ranks"):
        rows, columns = image.where, text.where
        torch.mm(image.rows, text.rows.T, out=product)
        scores = product[: rows.stop - rows.start, : columns.stop - columns.start]
        right = images.groups[rows, None] == texts.groups[columns] if overlap else None
        yield rows, columns, scores, right


def retrieval(image_embeds, text_embeds, image_groups, text_groups):
    """Retrieval both ways, several captions a picture and several pictures a caption allowed.

    image_embeds, text_embeds  (I, E) and (N, E)  unit-norm rows
    image_groups, text_groups  (I,) and (N,)      integers; a caption fits a picture if their groups are equal
    returns                    see retrieval_numbers
    """
    groups = image_groups, text_groups
    return retrieval_numbers(*ranks(image_embeds, text_embeds, *groups), *groups)


def retrieval_numbers(image_ranks, text_ranks, image_groups, text_groups):
    """What ranks say, by name.

    image_ranks, text_ranks    (I,) and (N,)  integers from 1
    image_groups, text_groups  (I,) and (N,)  integers; a caption fits a picture if their groups are equal
    returns                    fractions i2t_r1, i2t_r5, i2t_r10, i2t_mrr, ranks i2t_medr, the same with t2i_, each with
                               _low and _high; the counts n_images and n_captions, and chance_r1: what guessing reaches
                               either way. The intervals resample the pictures that ask, each with its captions; the
                               gallery that they ask stays whole.
    source                     Karpathy and Fei-Fei 2015, section 4.1 (recall and median rank)
    """
    n_images, n_captions = len(image_ranks), len(text_ranks)
    # Groups renumbered from 0: both sides have the same ones.
    image_groups, text_groups = (groups.unique(return_inverse=True)[1] for groups in (image_groups, text_groups))
    group_sizes, captions_of = image_groups.bincount().double(), text_groups.bincount().double()
    by_rank = image_ranks.argsort(), text_ranks.argsort()

    def of_pictures(weights):
        return rank_statistics(image_ranks[by_rank[0]], weights[:, by_rank[0]])

    def of_captions(weights):
        # A caption that several pictures share is drawn as often as they are on average.
        group_weights = (
            weights.new_zeros(len(weights), len(group_sizes)).index_add_(1, image_groups, weights) / group_sizes
        )
        return rank_statistics(text_ranks[by_rank[1]], group_weights[:, text_groups[by_rank[1]]])

    names = ("r1", "r5", "r10", "medr", "mrr")
    numbers = {"n_images": n_images, "n_captions": n_captions}
    numbers.update(with_intervals([f"i2t_{name}" for name in names], of_pictures, n_images))
    numbers.update(with_intervals([f"t2i_{name}" for name in names], of_captions, n_images))
    # The share of all picture-caption cells that are right: a random first answer's chance, in both directions.
    return {**numbers, "chance_r1": (group_sizes @ captions_of / (n_images * n_captions)).item()}


def rank_statistics(ranks, weights):
    """R@1, R@5, R@10, median rank and mean reciprocal rank of ascending ranks (Q,) with weights (R, Q): (R, 5)."""
    means = torch.stack([*((ranks <= k).double() for k in (1, 5, 10)), 1 / ranks.double()], dim=1)
    below = weights.cumsum(dim=1)
    total = below[:, -1:]
    middle = torch.searchsorted(below, torch.cat([total / 2, total / 2 + 1e-9 * total], dim=1))
    median = ranks[middle.clamp(max=len(ranks) - 1)].double().mean(dim=1, keepdim=True)
    r1, r5, r10, mrr = (weights @ means / total).unbind(dim=1)
    return torch.stack([r1, r5, r10, median[:, 0], mrr], dim=1)


def retrieval_task(subject):
    """Retrieval both ways over the subject's pairs; see retrieval_numbers."""
    return retrieval_numbers(*subject.ranks, *subject.captions[1:])


# ---- 5  Zero-shot and calibration -----------------------------------------------------------------------------------

# From the CLIP repository's notebook Prompt_Engineering_for_ImageNet: the 80 prompts of the paper, and the 7 that a
# forward selection among them chose.
CLIP7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
CLIP80 = tuple(
    template.strip()
    for line in """
    a bad photo of a {}.|a photo of many {}.|a sculpture of a {}.|a photo of the hard to see {}.
    a low resolution photo of the {}.|a rendering of a {}.|graffiti of a {}.|a bad photo of the {}.
    a cropped photo of the {}.|a tattoo of a {}.|the embroidered {}.|a photo of a hard to see {}.
    a bright photo of a {}.|a photo of a clean {}.|a photo of a dirty {}.|a dark photo of the {}.
    a drawing of a {}.|a photo of my {}.|the plastic {}.|a photo of the cool {}.
    a close-up photo of a {}.|a black and white photo of the {}.|a painting of the {}.|a painting of a {}.
    a pixelated photo of the {}.|a sculpture of the {}.|a bright photo of the {}.|a cropped photo of a {}.
    a plastic {}.|a photo of the dirty {}.|a jpeg corrupted photo of a {}.|a blurry photo of the {}.
    a photo of the {}.|a good photo of the {}.|a rendering of the {}.|a {} in a video game.
    a photo of one {}.|a doodle of a {}.|a close-up photo of the {}.|a photo of a {}.
    the origami {}.|the {} in a video game.|a sketch of a {}.|a doodle of the {}.
    a origami {}.|a low resolution photo of a {}.|the toy {}.|a rendition of the {}.
    a photo of the clean {}.|a photo of a large {}.|a rendition of a {}.|a photo of a nice {}.
    a photo of a weird {}.|a blurry photo of a {}.|a cartoon {}.|art of a {}.
    a sketch of the {}.|a embroidered {}.|a pixelated photo of a {}.|itap of the {}.
    a jpeg corrupted photo of the {}.|a good photo of a {}.|a plushie {}.|a photo of the nice {}.
    a photo of the small {}.|a photo of the weird {}.|the cartoon {}.|art of the {}.
    a drawing of the {}.|a photo of the large {}.|a black and white photo of a {}.|the plushie {}.
    a dark photo of a {}.|itap of a {}.|graffiti of the {}.|a toy {}.
    itap of my {}.|a photo of a cool {}.|a photo of a small {}.|a tattoo of the {}.
    """.strip().splitlines()
    for template in line.split("|")
)
TEMPLATE_SETS = {"plain": ("a photo of a {}.",), "clip7": CLIP7, "clip80": CLIP80}


def class_embeds(model, classes, templates, precision="fp32", batch_size=EVAL_BATCH):
    """One direction a class, (K, E): its captions in all templates, through embed_captions, averaged, normalised again.

    classes     K names
    templates   strings in which every {} stands for the name
    source      Radford et al. 2021, section 3.1.4 (ensembling over the embedding space)
    Exercise 8  easy, 20 minutes: a classifier made of captions, run `pytest -k exercise_8`
    """
    captions = [template.replace("{}", name) for name in classes for template in templates]
    rows = embed_captions(model, captions, precision, batch_size)
    return F.normalize(rows.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


SCORE_TILE = 8192  # pictures whose scores for all classes are in memory at a time


def zeroshot(image_embeds, class_rows, labels, classes):
    """Zero-shot classification: the nearest class direction wins; ties count against the model.

    image_embeds, class_rows  (I, E) and (K, E)  unit-norm rows
    labels                    (I,)               right class numbers, below K
    classes                   K names
    returns                   fractions zs_top1, zs_top5, zs_per_class (the mean over classes that occur), each with
                              _low and _high; chance_top1, n_images, n_classes, and zs_class_top1, a fraction a
                              class name
    """
    found = []
    for rows, label in zip(image_embeds.split(SCORE_TILE), labels.split(SCORE_TILE)):
        scores = rows @ class_rows.T
        right = scores.gather(1, label[:, None])
        found.append(len(classes) - (scores < right).sum(dim=1))  # the right class is not below itself
    rank = torch.cat(found)
    hits = torch.stack([rank <= 1, rank <= 5], dim=1).double()

    def statistics(weights):
        shares = weights @ hits / weights.sum(dim=1, keepdim=True)
        right, drawn = (
            weights.new_zeros(len(weights), len(classes)).index_add_(1, labels, w)
            for w in (weights * hits[:, 0], weights)
        )
        return torch.cat([shares, (right / drawn).nanmean(dim=1, keepdim=True)], dim=1)

    by_class = {name: hits[labels == k, 0].mean().item() for k, name in enumerate(classes) if (labels == k).any()}
    return {
        **with_intervals(["zs_top1", "zs_top5", "zs_per_class"], statistics, len(labels)),
        "zs_class_top1": by_class,
        "chance_top1": 1 / len(classes),
        "n_images": len(image_embeds),
        "n_classes": len(classes),
    }


CALIBRATION_BINS = 15
TEMPERATURE_PICTURES = 10_000  # at most so many of the first half fit the temperature: it is a single number


def confidences(image_embeds, class_rows, labels, scale):
    """The largest softmax probability of each picture, and whether its class is right: (I,) float and (I,) bool."""
    found = []
    for rows, label in zip(image_embeds.split(SCORE_TILE), labels.split(SCORE_TILE)):
        confidence, guess = (scale * rows @ class_rows.T).softmax(dim=1).max(dim=1)
        found.append((confidence, guess == label))
    confidence, right = zip(*found)
    return torch.cat(confidence), torch.cat(right)


def calibration_bin(confidence):
    """The bin of each confidence: CALIBRATION_BINS of one width, each with its upper end."""
    return (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1


def halves(n, seed=0):
    """Picture numbers in two random halves: the first fits the temperature, the second measures what it does."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2], order[n // 2 :]


def calibration(image_embeds, class_rows, labels, logit_scale):
    """Do classes given 80% turn out right 80% of the time? Before and after dividing the logits by a temperature.

    image_embeds, class_rows  (I, E) and (K, E)  unit-norm rows; I is at least 2
    labels                    (I,)               right class numbers
    logit_scale               ()                 the model's: natural log of what multiplies cosines
    returns                   zs_ece, the expected calibration error: the mean over pictures of |confidence - accuracy|
                              of their bin, and zs_nll in nats; zs_ece_scaled and zs_nll_scaled after the temperature;
                              each with _low and _high, on one half of the pictures; zs_temperature, fitted on the other
    source                    Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 3 and 9
    """
    fit, rest = halves(len(labels))
    fit, scale = fit[:TEMPERATURE_PICTURES], logit_scale.exp().item()
    logits = scale * image_embeds[fit] @ class_rows.T

    def loss(log_temperature):
        return F.cross_entropy(logits / math.exp(log_temperature), labels[fit]).item()

    temperature = math.exp(golden_section(loss, -5.0, 5.0))
    numbers = {"zs_temperature": temperature, "n_calibration": len(rest)}
    for suffix, divisor in (("", 1.0), ("_scaled", temperature)):
        confidence, right = confidences(image_embeds[rest], class_rows, labels[rest], scale / divisor)
        bins = F.one_hot(calibration_bin(confidence), CALIBRATION_BINS).double()
        gaps = bins * (confidence - right.double())[:, None]
        nll = torch.cat(
            [
                F.cross_entropy(scale / divisor * rows @ class_rows.T, label, reduction="none").double()
                for rows, label in zip(image_embeds[rest].split(SCORE_TILE), labels[rest].split(SCORE_TILE))
            ]
        )

        def statistics(weights, gaps=gaps, nll=nll):
            errors = torch.stack([(weights @ gaps).abs().sum(dim=1), weights @ nll], dim=1)
            return errors / weights.sum(dim=1, keepdim=True)

        names = [f"zs_ece{suffix}", f"zs_nll{suffix}"]
        numbers.update(with_intervals(names, statistics, len(rest), mirrored=names[:1]))
    return numbers


def golden_section(function, low, high, steps=40):
    """Where a function with one valley is smallest, to (high - low) * 0.618 ** steps.

    source  Kiefer 1953, "Sequential minimax search for a maximum"
    """
    shrink = (math.sqrt(5) - 1) / 2
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - shrink * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + shrink * (high - low)
            at_right = function(right)
    return (low + high) / 2


def zeroshot_task(subject):
    """Accuracy and calibration of zero-shot classification; see zeroshot and calibration."""
    labels = subject.labels  # asked for first: it refuses data without classes
    given = subject.image_embeds, subject.class_rows, labels
    calibrated = calibration(*given, subject.model.logit_scale.detach().cpu()) if len(labels) > 1 else {}
    return {**zeroshot(*given, subject.data.classes), "n_templates": len(subject.templates), **calibrated}


# ---- 6  Linear probe and k-NN ---------------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5  # few-shot accuracy is the mean over so many random choices of the training pictures
NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07
PENALTIES = tuple(10.0**-power for power in range(7))  # strong to weak: each fit starts from the one before


def fit_logistic(features, labels, n_classes, penalty, start=None):
    """Multinomial logistic regression by L-BFGS.

    features  (I, W)
    labels    (I,)         class numbers below n_classes
    penalty   the fit minimises the mean cross-entropy + penalty / 2 * sum of squared weights; the bias is free
    start     a fit to start from
    returns   (W + 1, K)   weights, and the bias in the last row
    """
    weights = features.new_zeros(features.shape[1] + 1, n_classes) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels)
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def classify(features, weights):
    """The likeliest class of each row: (I,)"""
    return (features @ weights[:-1] + weights[-1]).argmax(dim=1)


def best_fit(features, labels, n_classes, held_out, desc=None):
    """The fit whose penalty does best on held-out (features, labels): (weights, penalty)."""
    best, weights = (-1.0, None, None), None
    for penalty in tqdm(PENALTIES, desc=desc, disable=None if desc else True, leave=False):
        weights = fit_logistic(features, labels, n_classes, penalty, weights)
        accuracy = (classify(held_out[0], weights) == held_out[1]).double().mean().item()
        if accuracy > best[0]:
            best = accuracy, weights, penalty
    return best[1:]


def nearest_neighbours(train, train_labels, test, n_classes, tile=512):
    """k-NN by cosine: NEIGHBOURS vote with weight exp(cosine / NEIGHBOUR_TEMPERATURE); (I,) class numbers.

    source  Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4
    """
    train, test, guesses = F.normalize(train, dim=1), F.normalize(test, dim=1), []
    for rows in tqdm(test.split(tile), desc="k-NN", disable=None if len(train) > 10_000 else True, leave=False):
        cosines, nearest = (rows @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = rows.new_zeros(len(rows), n_classes)
        guesses.append(
            votes.scatter_add_(1, train_labels[nearest], (cosines / NEIGHBOUR_TEMPERATURE).exp()).argmax(dim=1)
        )
    return torch.cat(guesses)


def draw_shots(labels, shots, seed):
    """The numbers of `shots` random pictures of each class, of all of them where a class has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == k][:shots] for k in labels.unique()])


def split_training(features, labels, seed=0):
    """(fit, validation) parts of the training pictures, each (features, labels): a fifth, at most 5,000, validates."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    n = max(1, min(len(labels) // 5, 5000))
    return [(features[part], labels[part]) for part in (order[n:], order[:n])]


def probe_task(subject):
    """Linear probe: multinomial logistic regression on the vision tower's pooled features, the tower untouched.

    The penalty is chosen on a fifth of the training pictures (also in few-shot, where peers choose on fewer), then the
    full probe is fitted again on all of them.

    returns  fractions probe_top1, probe_1shot_top1, ..., probe_16shot_top1, each with _low and _high; probe_penalty,
             n_images, n_train, n_classes, chance_top1
    raises   ValueError for data without classes or without training pictures
    source   Radford et al. 2021, appendix A.3 (protocol)
    """
    train, train_labels, test = subject.features
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test, n_classes = (train - mean) / std, (test - mean) / std, len(subject.data.classes)
    fit, validation = split_training(train, train_labels)
    weights, penalty = best_fit(*fit, n_classes, validation, desc="probe")
    weights = fit_logistic(train, train_labels, n_classes, penalty, weights)
    numbers = mean_with_interval("probe_top1", classify(test, weights) == subject.labels)
    for shots in progress(SHOTS, "few-shot"):
        hits = []
        for draw in range(DRAWS):
            chosen = draw_shots(fit[1], shots, draw)
            weights, _ = best_fit(fit[0][chosen], fit[1][chosen], n_classes, validation)
            hits.append((classify(test, weights) == subject.labels).double())
        numbers.update(mean_with_interval(f"probe_{shots}shot_top1", torch.stack(hits).mean(dim=0)))
    return {**numbers, "probe_penalty": penalty, **probe_counts(subject)}


def knn_task(subject):
    """k-NN on the vision tower's pooled features: no fitting at all; names as in probe_task, with knn for probe."""
    train, train_labels, test = subject.features
    n_classes = len(subject.data.classes)
    guesses = nearest_neighbours(train, train_labels, test, n_classes)
    numbers = mean_with_interval("knn_top1", guesses == subject.labels)
    for shots in SHOTS:
        hits = []
        for draw in range(DRAWS):
            chosen = draw_shots(train_labels, shots, draw)
            guesses = nearest_neighbours(train[chosen], train_labels[chosen], test, n_classes)
            hits.append((guesses == subject.labels).double())
        numbers.update(mean_with_interval(f"knn_{shots}shot_top1", torch.stack(hits).mean(dim=0)))
    return {**numbers, **probe_counts(subject)}


def probe_counts(subject):
    n_classes = len(subject.data.classes)
    counts = {"n_images": len(subject.labels), "n_train": len(subject.features[1]), "n_classes": n_classes}
    return {**counts, "chance_top1": 1 / n_classes}


# ---- 7  Binding and winoground --------------------------------------------------------------------------------------

BINDING_KINDS = {
    "replaced": "control: a colour not in the picture",
    "attributes": "the two colours exchanged",
    "relation": "left for right, above for below",
    "order": "the two objects exchanged",
}


ROUNDING = 1e-6  # a sum of the same numbers in another order differs by less: cosines as near as this are a tie


def binding_task(subject):
    """Is a picture nearer to its caption than to the same words bound wrongly? On shapes; ties count as wrong.

    returns  fractions binding_attributes, binding_relation, binding_order, the control binding_replaced, and
             binding_all (the right caption beats all of a picture's wrong ones), each with _low and _high; n_images,
             n_attributes (pictures whose objects differ in colour), chance_binding (one half)
    raises   ValueError for data other than shapes
    source   the idea: Yuksekgonul et al. 2023, "When and why vision-language models behave like bags-of-words"
    """
    pairs = subject.data
    if not isinstance(pairs, dualenc.ShapesPairs):
        raise ValueError("binding needs pictures whose scenes are known: use --data shapes")
    wrong = [pairs.hard_negatives(i) for i in range(len(pairs))]
    right_score = paired_cosines(subject, range(len(pairs)), [captions[0] for captions in pairs.captions])
    numbers, all_right = {}, torch.ones(len(pairs), dtype=torch.bool)
    for kind in BINDING_KINDS:
        pictures = [i for i, captions in enumerate(wrong) if kind in captions]
        won = right_score[pictures] > paired_cosines(subject, pictures, [wrong[i][kind] for i in pictures]) + ROUNDING
        all_right[pictures] &= won
        numbers.update(mean_with_interval(f"binding_{kind}", won))
        numbers[f"n_{kind}"] = len(pictures)
    numbers.update(mean_with_interval("binding_all", all_right))
    return {**numbers, "n_images": len(pairs), "chance_binding": 0.5}


def paired_cosines(subject, pictures, captions):
    """The cosine of each picture number with the caption beside it."""
    return (subject.image_embeds[list(pictures)] * subject.embed_captions(captions)).sum(dim=1)


@dataclass(frozen=True)
class Quadruples:
    """Rows of two pictures and two captions, of which the first fits the first and the second the second."""

    pictures: Sequence  # 2 a row: both of row 0, both of row 1, ...
    captions: list  # the same

    def __len__(self):
        return len(self.captions) // 2


def load_quadruples(path, allow_outside=False):
    """Quadruples from a .csv, .tsv or .jsonl file with the columns image_0, caption_0, image_1, caption_1.

    Picture paths are relative to the file, and climb out of its folder only with allow_outside.

    raises  ValueError for another kind of file, a missing column, a cell that is empty or no text, or a missing
            picture, naming the line
    """
    path, pictures, captions = Path(path), [], []
    if path.suffix.lower() not in dualenc.CAPTION_SUFFIXES or not path.is_file():
        raise ValueError(f"winoground needs a file ({', '.join(sorted(dualenc.CAPTION_SUFFIXES))}), and got {path}")
    rows = dualenc.jsonl_rows(path) if path.suffix.lower() == ".jsonl" else dualenc.table_rows(path)
    for line, row in rows:
        for column in ("image_0", "caption_0", "image_1", "caption_1"):
            cell = row.get(column)
            if cell in (None, ""):
                raise ValueError(
                    f"{path}, line {line}: no {column}; it has {', '.join(map(str, row))}; a row of winoground is "
                    f"image_0, caption_0, image_1, caption_1"
                )
            if not isinstance(cell, str):
                raise ValueError(f"{path}, line {line}: {column} is {cell!r}, expected text: put it in quotes")
            if column.startswith("image"):
                pictures.append(dualenc.locate_picture(cell, path.parent, f"{path}, line {line}", allow_outside))
            else:
                captions.append(cell)
    if not captions:
        raise ValueError(f"{path} has no rows")
    return Quadruples(dualenc.PictureFiles(pictures), captions)


def winoground_task(subject):
    """Two pictures and two captions a row: is each matched with its own? Ties count as wrong.

    returns  fractions wino_text (each picture prefers its caption), wino_image (each caption prefers its picture) and
             wino_group (both), each with _low and _high over rows; their chance levels, and n_quadruples
    source   Thrush et al. 2022, "Winoground", section 3.3
    """
    images = subject.image_embeds.view(len(subject.data), 2, -1)
    texts = subject.embed_captions(subject.data.captions).view(len(subject.data), 2, -1)
    scores = images @ texts.transpose(1, 2)  # (rows, picture, caption)
    text = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    image = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    numbers = {}
    for name, won, chance in (("text", text, 1 / 4), ("image", image, 1 / 4), ("group", text & image, 1 / 6)):
        numbers.update(mean_with_interval(f"wino_{name}", won))
        numbers[f"chance_{name}"] = chance
    return {**numbers, "n_quadruples": len(subject.data)}


# ---- 8  Search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """Pictures to search, what tells each apart from an older version of itself, and where their index lies."""

    names: list
    pictures: Sequence
    stamps: list  # a string a picture, another one when the picture changes
    seconds: float  # that listing and stamping them took
    index: Path
    query: str
    top: int


def open_gallery(spec, split, index, query, top, **source):
    """The Gallery of a folder (all pictures in it, captions or not) or of a data spec.

    A picture file is stamped with name, size and time of change; a picture of a named data set with its name. Files
    without a split of their own are searched whole.

    raises  ValueError for a folder without pictures, and where the spec is unknown
    """
    started, path = time.perf_counter(), Path(spec.partition(":")[2] or spec)
    if path.is_dir():
        files = sorted(picture_files(path))
        if not files:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(dualenc.PICTURE_SUFFIXES))})")
        names, paths, stamps = (list(column) for column in zip(*files))
        pictures, ending = dualenc.PictureFiles(paths), "index"
    else:
        whole = {"val_fraction": 0.0 if split == "train" else 1.0}
        pairs = dualenc.load_pairs(spec, split, **{**source, **whole})
        names, pictures = pairs.names, pairs.pictures
        stamps, ending = stamps_of(pairs), f"{split}.index"
    beside = store_home(spec, ending, source.get("data_root", "data"))
    return Gallery(names, pictures, stamps, time.perf_counter() - started, Path(index or beside), query, top)


def picture_files(folder, below=""):
    """Yields (name, path, stamp) of every picture in a folder and those below it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.is_dir():
                yield from picture_files(entry.path, f"{name}/")
            elif os.path.splitext(name)[1].lower() in dualenc.PICTURE_SUFFIXES:
                yield name, entry.path, stamp(name, entry)


def open_index(subject):
    """The gallery's embeddings from the index folder, brought up to date: see stored_rows.

    The rows of pictures that cannot be read are 0, which is nearer to a query than many a picture: see search_task.
    """
    gallery, model = subject.data, subject.model
    folder = gallery.index / index_key(model, subject.precision)
    embed = partial(run_batches, model, model.encode_image, gallery.pictures, precision=subject.precision)
    return stored_rows(
        folder, gallery.stamps, model.config.projection_dim, partial(embed, workers=subject.workers), subject.batch_size
    )


def search_task(subject):
    """The gallery's pictures nearest to a query of words, or to a picture file.

    returns  found, a list of {"picture": name, "score": cosine, "row": number in the gallery}, best first, none of
             them unreadable; query, n_images, n_indexed (pictures that the index did not have), unreadable (names),
             and seconds: index_s to look for changed files and bring the index up to date, search_s from the query to
             the answer
    raises   ValueError without a query, or for a query picture that is not there
    """
    gallery = subject.data
    if not gallery.query:
        raise ValueError('search needs --query: words such as "a red car", or a picture file')
    started = time.perf_counter()
    embeds, n_tried, unreadable = open_index(subject)
    opened = time.perf_counter()
    if Path(gallery.query).suffix.lower() in dualenc.PICTURE_SUFFIXES:
        query = subject.embed_pictures(dualenc.PictureFiles([gallery.query]))
    else:
        query = subject.embed_captions([gallery.query])
    scores, bad = embeds @ query[0], [row for row, stamp in enumerate(gallery.stamps) if stamp in unreadable]
    scores[bad] = -torch.inf
    scores, rows = scores.topk(min(gallery.top, len(embeds) - len(bad)))
    answered = time.perf_counter()
    found = [
        {"picture": gallery.names[row], "score": score, "row": row}
        for score, row in zip(scores.tolist(), rows.tolist())
    ]
    return {
        "query": gallery.query,
        "n_images": len(embeds),
        "n_indexed": n_tried - len(unreadable),
        "unreadable": [stamp.rsplit(" ", 2)[0] for stamp in unreadable],
        "index_s": gallery.seconds + opened - started,
        "search_s": answered - opened,
        "found": found,
    }


def contact_sheet(gallery, found, columns=5, side=160):
    """One PIL picture of the pictures found, with scores and names below."""
    line, margin = 16, 8
    rows, cell = -(-len(found) // columns), side + 2 * line + margin
    sheet = Image.new("RGB", (columns * (side + margin) + margin, 2 * line + margin + rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((margin, margin), gallery.query, fill="black", font=ImageFont.load_default(16))
    for i, item in enumerate(found):
        x, y = margin + i % columns * (side + margin), 2 * line + margin + i // columns * cell
        sheet.paste(fit_square(gallery.pictures[item["row"]], side), (x, y))
        draw.text((x, y + side + 1), f"{item['score']:.3f}", fill="black", font=font)
        draw.text((x, y + side + line), shorten(item["picture"], side // 7), fill="dimgray", font=font)
    return sheet


def fit_square(picture, side):
    """The picture scaled into side x side pixels, on gray."""
    return ImageOps.pad(dualenc.flatten_picture(picture).convert("RGB"), (side, side), color=(238, 238, 238))


def shorten(text, length):
    """The end of a text too long, which tells files of one folder apart."""
    return text if len(text) <= length else "…" + text[1 - length :]


# ---- 9  Tables ------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """What a task found, for the terminal and the web page alike."""

    title: str
    note: str
    columns: tuple
    rows: list

    def lines(self):
        """The table as lines of text, columns aligned."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[c]) for row in cells) for c in range(len(self.columns))]
        return [f"{self.title:<11} {self.note}"] + [
            "  " + "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in cells
        ]


def percent(numbers, name):
    """A fraction and its interval, as text."""
    low, high = (100 * numbers[f"{name}_{end}"] for end in ("low", "high"))
    return f"{numbers[name]:.1%} ({low:.1f} to {high:.1f})"


def plain(numbers, name, digits):
    """A number and its interval, as text."""
    value, low, high = (numbers[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


INTERVALS = "in brackets: 95% intervals over pictures"


def retrieval_tables(m):
    """Retrieval numbers as a table."""
    note = f"{m['n_images']:,} pictures, {m['n_captions']:,} captions   chance R@1 {m['chance_r1']:.2%}   {INTERVALS}"
    if m["n_captions"] < m["n_images"]:
        note += "; captions are shared, so those of text->image only weigh the classes anew"
    rows = [(f"R@{k}", *(percent(m, f"{way}_r{k}") for way in ("i2t", "t2i"))) for k in (1, 5, 10)]
    rows.append(("median rank", *(plain(m, f"{way}_medr", 1) for way in ("i2t", "t2i"))))
    rows.append(("MRR", *(plain(m, f"{way}_mrr", 3) for way in ("i2t", "t2i"))))
    return [Table("retrieval", note, ("", "image->text", "text->image"), rows)]


def zeroshot_tables(m):
    """Zero-shot numbers as tables: accuracy, calibration, accuracy by class."""
    chance = f"chance {m['chance_top1']:.1%}"
    note = (
        f"{m['n_images']:,} pictures, {m['n_classes']} classes   {chance}   {m['n_templates']} templates   {INTERVALS}"
    )
    names = {"zs_top1": "top-1", "zs_top5": "top-5", "zs_per_class": "mean over classes"}
    rows = [(title, percent(m, name)) for name, title in names.items()]
    tables = [Table("zero-shot", note, ("", "accuracy"), rows)]
    if "zs_ece" in m:
        note = f"temperature fitted on one half of the pictures, errors on the other {m['n_calibration']:,}"
        rows = [
            ("as trained", "1", percent(m, "zs_ece"), plain(m, "zs_nll", 3)),
            ("scaled", f"{m['zs_temperature']:.3f}", percent(m, "zs_ece_scaled"), plain(m, "zs_nll_scaled", 3)),
        ]
        tables.append(Table("calibration", note, ("", "temperature", "calibration error", "loss in nats"), rows))
    by_class = sorted(m["zs_class_top1"].items(), key=lambda item: -item[1])
    shown = by_class if len(by_class) <= 20 else by_class[:10] + by_class[-10:]
    rows = [(name, f"{share:.1%}") for name, share in shown]
    note = "" if shown == by_class else "best and worst ten"
    return [*tables, Table("by class", note, ("", "top-1"), rows)]


def probe_tables(m, name="probe", title="probe"):
    """Linear probe or k-NN numbers as a table."""
    note = (
        f"{m['n_train']:,} training and {m['n_images']:,} test pictures   chance {m['chance_top1']:.1%}   {INTERVALS}"
    )
    rows = [(f"{shots} a class", percent(m, f"{name}_{shots}shot_top1")) for shots in SHOTS]
    return [Table(title, note, ("training pictures", "top-1"), [*rows, ("all", percent(m, f"{name}_top1"))])]


def binding_tables(m):
    """Binding numbers as a table."""
    note = f"{m['n_images']:,} pictures; the right caption against one wrong caption   {INTERVALS}"
    rows = [
        (f"{kind}: {what}", percent(m, f"binding_{kind}"), f"{m[f'n_{kind}']:,}", "50.0%")
        for kind, what in BINDING_KINDS.items()
    ]
    rows.append(("right against all of them", percent(m, "binding_all"), f"{m['n_images']:,}", ""))
    return [Table("binding", note, ("wrong caption", "accuracy", "pictures", "chance"), rows)]


def winoground_tables(m):
    """Winoground numbers as a table."""
    rows = [
        (f"{name} score", percent(m, f"wino_{name}"), f"{m[f'chance_{name}']:.1%}")
        for name in ("text", "image", "group")
    ]
    note = f"{m['n_quadruples']:,} rows of two pictures and two captions   {INTERVALS.replace('pictures', 'rows')}"
    return [Table("winoground", note, ("", "accuracy", "chance"), rows)]


def search_tables(m):
    """Pictures found, as a table."""
    bad = f"; {len(m['unreadable'])} unreadable: {', '.join(m['unreadable'][:5])}" if m["unreadable"] else ""
    note = (
        f"{m['query']!r} in {m['n_images']:,} pictures; {m['n_indexed']:,} of them new to the index   "
        f"index {m['index_s']:.2f} s, answer {m['search_s']:.2f} s{bad}"
    )
    rows = [(item["picture"], f"{item['score']:.3f}") for item in m["found"]]
    return [Table("search", note, ("picture", "cosine"), rows)]


def describe(results):
    """Results as the lines of readable tables, each number beside its interval, chance level and sample counts."""
    tables = [table for name, numbers in results.items() for table in TASKS[name].tables(numbers)]
    return [line for table in tables for line in table.lines()]


# ---- 10  The report -------------------------------------------------------------------------------------------------

BLUE, RED, INK, PALE = "#2b6cb0", "#c53030", "#222", "#ddd"
DARK = 0.65  # shades above this take white words
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 64rem;
       padding: 0 .75rem 3rem }
h1 { font-size: 1.6rem } h2 { border-top: 2px solid #ddd; padding-top: 1rem; margin-top: 2.5rem }
h3 { font-size: 1rem; margin-bottom: 0 } p { margin: .25rem 0 .75rem; color: #555; overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; margin-bottom: 1rem }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd;
         font-variant-numeric: tabular-nums }
th:first-child { text-align: left; font-weight: normal } thead th { font-weight: 600 }
figure { margin: 0 } img { max-width: 100%; height: auto } figcaption { font-size: .85rem; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem } .row figure { width: 370px; max-width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.75rem, 1fr)); gap: .75rem;
         margin: .5rem 0 1.25rem }
.cards img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eee; box-sizing: border-box }
.right img { outline: 4px solid #2b6cb0 } .right figcaption { color: #2b6cb0; font-weight: 600 }
.matrix td, .matrix th { border: 0; white-space: normal; padding: .1rem; text-align: center; font-size: .75rem }
.matrix tbody th { text-align: left; padding-right: .4rem; line-height: 1.2 }
@media (max-width: 30rem) { table { font-size: .78rem } th, td { padding: .2rem .3rem } }
.matrix td { min-width: 1.9rem } .matrix img { width: 1.9rem; display: block; margin: auto }
"""


def write_report(folder, subject, results, facts):
    """Write folder/index.html: one page with every picture inside it, no script and nothing from the network.

    facts  lines about the model and the data, for the head of the page
    """
    parts = [f"<h1>dualenc evaluation</h1>{''.join(f'<p>{html.escape(fact)}</p>' for fact in facts)}"]
    for name, numbers in results.items():
        task = TASKS[name]
        parts.append(f"<h2>{html.escape(task.title)}</h2>")
        parts += [html_table(table) for table in task.tables(numbers)]
        parts += task.figures(subject, numbers)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dualenc evaluation</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dualenc.write_file(folder / "index.html", f"{head}<body>{''.join(parts)}</body></html>\n")


def html_table(table):
    """A Table as HTML that scrolls sideways where it must."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in table.rows
    )
    title = f"<h3>{html.escape(table.title)}</h3><p>{html.escape(table.note.replace('   ', '; '))}</p>"
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def picture_tag(picture, alt, side=None):
    """An <img> with the PIL picture inside; scaled down to side pixels if given."""
    picture = dualenc.flatten_picture(picture).convert("RGB")
    if side:
        picture.thumbnail((side, side))
    data = io.BytesIO()
    small = max(picture.size) <= 64
    picture.save(data, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return image_tag(data.getvalue(), f"image/{'png' if small else 'jpeg'}", alt, "")


def image_tag(data, kind, alt, attributes):
    encoded = base64.b64encode(data).decode()
    return f'<img {attributes} src="data:{kind};base64,{encoded}" alt="{html.escape(alt, quote=True)}">'


def card(picture, caption, alt, right=False):
    """A small picture with a line below; framed if it is a right answer."""
    image = picture_tag(picture, alt, side=160)
    mark = ' class="right"' if right else ""
    return f"<figure{mark}>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def cards(title, items):
    return f'<h3>{html.escape(title)}</h3><div class="cards">{"".join(items)}</div>'


class Drawing:
    """An SVG drawing, put together from rectangles, lines and words; x and y in pixels from the top left."""

    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def rect(self, x, y, width, height, fill):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, points, colour, width=1.5, dash=""):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" '
            f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
        )

    def text(self, x, y, words, anchor="start", turn=0, colour=INK, size=12):
        place = f'transform="translate({x:.1f} {y:.1f}) rotate({turn})" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} font-size="{size}" fill="{colour}">{html.escape(words)}</text>')

    def tag(self, alt):
        """The drawing as an <img>, never wider than drawn."""
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="sans-serif">{"".join(self.parts)}</svg>'
        )
        return image_tag(svg.encode(), "image/svg+xml", alt, f'width="{self.width}" height="{self.height}"')


class Plot(Drawing):
    """A drawing with a frame in which both axes go from 0 to 1."""

    def __init__(self, x_label, y_label, x_ticks, side=300):
        super().__init__(side + 70, side + 60)
        self.side, self.left, self.top = side, 55, 10
        for tick in (0, 0.25, 0.5, 0.75, 1):
            self.line([self.at(0, tick), self.at(1, tick)], PALE, 1)
            self.text(self.left - 6, self.at(0, tick)[1] + 4, f"{tick:.0%}", "end")
        for x, words in x_ticks:
            self.text(self.at(x, 0)[0], self.top + side + 18, words, "middle")
        self.text(self.left + side / 2, self.top + side + 40, x_label, "middle")
        self.text(12, self.top + side / 2, y_label, "middle", turn=-90)

    def at(self, x, y):
        """The place of the point (x, y) in the drawing."""
        return self.left + x * self.side, self.top + (1 - y) * self.side


def reliability_diagram(confidence, right, title):
    """Bars: accuracy of each confidence bin; the closer to the diagonal, the better calibrated."""
    plot = Plot("confidence", "accuracy", [(0, "0%"), (0.5, "50%"), (1, "100%")])
    bins, words = calibration_bin(confidence), []
    for k in bins.unique().tolist():
        accuracy, share = right[bins == k].double().mean().item(), (bins == k).double().mean().item()
        x, y = plot.at(k / CALIBRATION_BINS, accuracy)
        width = plot.side / CALIBRATION_BINS
        plot.rect(x + 1, y, width - 2, plot.at(0, 0)[1] - y, BLUE)
        plot.rect(x + 1, plot.at(0, 0)[1] - share * plot.side, 4, share * plot.side, RED)
        words.append(f"{(k + 0.5) / CALIBRATION_BINS:.0%} confident: {accuracy:.0%} right")
    plot.line([plot.at(0, 0), plot.at(1, 1)], INK, 1, "4 3")
    alt = f"Reliability diagram, {title}: {'; '.join(words)}"
    note = f"{title}: blue, accuracy; red, share of the pictures; dashed, what it should be"
    return f"<figure>{plot.tag(alt)}<figcaption>{html.escape(note)}</figcaption></figure>"


def confusion_diagram(guesses, labels, classes):
    """Rows: the right class; columns: the class given; the darker, the larger its share of the row."""
    K, named = len(classes), len(classes) <= 40
    counts = torch.bincount(labels * K + guesses, minlength=K * K).view(K, K).double()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    cell, margin = (30 if K <= 12 else max(4, 420 // K)), (90 if named else 20)
    drawing = Drawing(margin + K * cell + 10, margin + K * cell + 10)
    size = min(12, cell - 1)
    for row, name in enumerate(classes):
        if named:
            drawing.text(margin - 4, margin + row * cell + cell / 2 + 4, shorten(name, 12), "end", size=size)
            drawing.text(margin + row * cell + cell / 2 + 4, margin - 4, shorten(name, 12), turn=-90, size=size)
        for column in shares[row].nonzero()[:, 0].tolist():
            share = shares[row, column].item()
            place = margin + column * cell, margin + row * cell
            drawing.rect(*place, cell - (cell > 8), cell - (cell > 8), shade(share))
            if K <= 12 and share >= 0.005:
                colour = "white" if share > DARK else INK
                drawing.text(place[0] + cell / 2 - 1, place[1] + cell / 2 + 3, f"{share:.0%}", "middle", 0, colour, 10)
    wrong = (counts * (1 - torch.eye(K))).flatten()
    worst = [i for i in wrong.topk(min(3, K * K)).indices.tolist() if wrong[i] > 0]
    words = "; ".join(f"{classes[i // K]} taken for {classes[i % K]} {wrong[i]:.0f} times" for i in worst)
    mistakes = f" Most frequent mistakes: {words}." if worst else ""
    alt = f"Confusion matrix of {K} classes.{mistakes}"
    note = f"Confusion: rows are right classes, columns the answers.{mistakes}"
    return f"<figure>{drawing.tag(alt)}<figcaption>{html.escape(note)}</figcaption></figure>"


def shade(share):
    """White for 0 to blue for 1."""
    return "#" + "".join(f"{round(255 + (int(BLUE[i : i + 2], 16) - 255) * share):02x}" for i in (1, 3, 5))


def retrieval_figures(subject, numbers):
    """The similarity matrix of a few pairs, and the best and worst captions and pictures with what they found."""
    captions, image_groups, text_groups = subject.captions
    image_ranks, text_ranks = subject.ranks
    parts = [similarity_matrix(subject)]
    for title, queries in best_and_worst(text_ranks, text_groups, 3).items():
        for query in queries:
            words = f"One of the {title}: “{captions[query]}”, right at rank {text_ranks[query]}"
            parts.append(cards(words, found_pictures(subject, query)))
    for title, queries in best_and_worst(image_ranks, image_groups, 6).items():
        items = []
        for query in queries:
            nearest = (subject.text_embeds @ subject.image_embeds[query]).argmax().item()
            words = f"nearest: “{captions[nearest]}”; a right caption is at rank {image_ranks[query]}"
            alt = f"picture {subject.data.names[query]}; {words}"
            items.append(card(subject.data.pictures[query], words, alt, image_ranks[query] == 1))
        parts.append(cards(f"Pictures that did {title}", items) if items else "")
    return parts


def best_and_worst(ranks, groups, count):
    """{"best": numbers of queries, "worst": numbers of queries that missed}, each of another group."""
    order = ranks.argsort(stable=True).tolist()
    best = {int(groups[query]): query for query in reversed(order)}  # the last to be noted for a group stays
    worst = {int(groups[query]): query for query in order if ranks[query] > 1}
    return {
        "best": sorted(best.values(), key=lambda query: ranks[query])[:count],
        "worst": sorted(worst.values(), key=lambda query: -ranks[query])[:count],
    }


def found_pictures(subject, query):
    """Cards of the five pictures nearest to a caption, and of the best right one if it is not among them."""
    _, image_groups, text_groups = subject.captions
    scores, right = subject.image_embeds @ subject.text_embeds[query], image_groups == text_groups[query]
    found = scores.topk(min(5, len(scores))).indices.tolist()
    if not right[found].any():
        found.append(scores.masked_fill(~right, -torch.inf).argmax().item())
    return [
        card(
            subject.data.pictures[row],
            f"{scores[row]:.3f}" + (" right" if right[row] else ""),
            f"picture {subject.data.names[row]}, {'a right' if right[row] else 'a wrong'} answer",
            bool(right[row]),
        )
        for row in found
    ]


def similarity_matrix(subject, size=8):
    """Cosines of some pictures with a caption of each, as a table whose cells are shaded; pairs on the diagonal."""
    captions, image_groups, text_groups = subject.captions
    groups = image_groups.unique()
    chosen = groups[torch.linspace(0, len(groups) - 1, min(size, len(groups))).long()].tolist()
    pictures = [int((image_groups == group).nonzero()[0]) for group in chosen]
    texts = [int((text_groups == group).nonzero()[0]) for group in chosen]
    cosines = subject.text_embeds[texts] @ subject.image_embeds[pictures].T
    shares = (cosines - cosines.min()) / (cosines.max() - cosines.min()).clamp(min=1e-9)
    head = "".join(
        f"<th>{picture_tag(subject.data.pictures[i], f'picture {subject.data.names[i]}', 64)}</th>" for i in pictures
    )
    body = ""
    for text, values, row in zip(texts, cosines.tolist(), shares.tolist()):
        cells = "".join(
            f'<td style="background:{shade(share)};color:{"white" if share > DARK else INK}">{value:.2f}</td>'
            for value, share in zip(values, row)
        )
        body += f'<tr><th scope="row">{html.escape(captions[text])}</th>{cells}</tr>'
    return (
        "<h3>similarity</h3><p>cosines of captions (rows) and pictures (columns); pairs on the diagonal</p>"
        f'<div class="wide"><table class="matrix"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def zeroshot_figures(subject, numbers):
    """Confusion, reliability before and after the temperature, and the most confident mistakes."""
    images, classes, labels = subject.image_embeds, subject.class_rows, subject.labels
    names, scale = subject.data.classes, subject.model.logit_scale.exp().item()
    guesses = torch.cat([(rows @ classes.T).argmax(dim=1) for rows in images.split(SCORE_TILE)])
    parts = [confusion_diagram(guesses, labels, names)]
    if "zs_temperature" in numbers:
        _, rest = halves(len(labels))
        diagrams = [
            reliability_diagram(*confidences(images[rest], classes, labels[rest], scale / divisor), title)
            for title, divisor in (("as trained", 1), ("with the temperature", numbers["zs_temperature"]))
        ]
        parts.append(f'<h3>reliability</h3><div class="row">{"".join(diagrams)}</div>')
    confidence, right = confidences(images, classes, labels, scale)
    mistakes = confidence.masked_fill(right, -1).topk(min(8, int((~right).sum()))).indices.tolist()
    items = []
    for i in mistakes:
        words = f"{names[labels[i]]} taken for {names[guesses[i]]}, {confidence[i]:.0%}"
        items.append(card(subject.data.pictures[i], words, f"picture {subject.data.names[i]}: {words}"))
    return [*parts, cards("Most confident mistakes", items)] if items else parts


def probe_figures(subject, numbers, name="probe"):
    """Accuracy against the number of training pictures a class."""
    steps = [*((f"{shots}", f"{name}_{shots}shot_top1") for shots in SHOTS), ("all", f"{name}_top1")]
    places = [(i + 0.5) / len(steps) for i in range(len(steps))]
    plot = Plot("training pictures a class", "top-1", [(x, words) for x, (words, _) in zip(places, steps)])
    chance = numbers["chance_top1"]
    plot.line([plot.at(0, chance), plot.at(1, chance)], INK, 1, "4 3")
    plot.line([plot.at(x, numbers[key]) for x, (_, key) in zip(places, steps)], BLUE, 2)
    for x, (_, key) in zip(places, steps):
        plot.line([plot.at(x, numbers[f"{key}_low"]), plot.at(x, numbers[f"{key}_high"])], RED, 3)
    words = ", ".join(f"{words}: {numbers[key]:.1%}" for words, key in steps)
    note = "<figcaption>red: 95% intervals; dashed: chance</figcaption>"
    return [f"<figure>{plot.tag(f'Accuracy by training pictures a class. {words}')}{note}</figure>"]


def binding_figures(subject, numbers):
    """Some pictures with their captions and the wrong ones, with cosines."""
    items = []
    for i in range(0, min(len(subject.data), 64), 8):
        captions = {"right": subject.data.captions[i][0], **subject.data.hard_negatives(i)}
        scores = paired_cosines(subject, [i] * len(captions), list(captions.values())).tolist()
        best = max(scores)
        words = "; ".join(f"{'▸ ' if score == best else ''}{score:.2f} {kind}" for kind, score in zip(captions, scores))
        alt = f"drawn picture of {captions['right']}; cosines: {words}"
        items.append(card(subject.data.pictures[i], f"{captions['right']}: {words}", alt, scores[0] == best))
    return [cards("Cosines with the right caption and the wrong ones (▸ the highest; framed where it is right)", items)]


def search_figures(subject, numbers):
    """The pictures found, with scores."""
    items = [
        card(
            subject.data.pictures[item["row"]],
            f"{item['score']:.3f} {item['picture']}",
            f"picture {item['picture']}, found for {numbers['query']}",
        )
        for item in numbers["found"]
    ]
    return [cards(f"Found for “{numbers['query']}”", items)]


# ---- 11  The tasks by name ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A row of TASKS: what a task is called, and its three functions."""

    title: str
    measure: Callable  # subject to numbers by name
    tables: Callable  # numbers to Tables
    figures: Callable  # (subject, numbers) to pieces of HTML


TASKS = {
    "retrieval": Task("Retrieval", retrieval_task, retrieval_tables, retrieval_figures),
    "zeroshot": Task("Zero-shot classification", zeroshot_task, zeroshot_tables, zeroshot_figures),
    "probe": Task("Linear probe", probe_task, probe_tables, probe_figures),
    "knn": Task(
        "k nearest neighbours",
        knn_task,
        partial(probe_tables, name="knn", title="k-NN"),
        partial(probe_figures, name="knn"),
    ),
    "binding": Task("Binding", binding_task, binding_tables, binding_figures),
    "winoground": Task("Winoground", winoground_task, winoground_tables, lambda subject, numbers: []),
    "search": Task("Search", search_task, search_tables, search_figures),
}


def measure(subject, tasks, leave_out=False):
    """{task: its numbers} with the model in evaluation mode; it is left as it was.

    leave_out  print why a task refuses, and go on, once another one has been measured
    """
    results = {}
    was_training = subject.model.training
    subject.model.eval()
    try:
        with dualenc.float32_products(subject.model.logit_scale.device, "fp32"):
            for name in tasks:
                try:
                    results[name] = TASKS[name].measure(subject)
                except ValueError as error:
                    if not (leave_out and results):
                        raise
                    print(f"left out    {name}: {error}", flush=True)
            return results
    finally:
        subject.model.train(was_training)


def evaluate(
    model,
    pairs,
    tasks=None,
    templates=dualenc.TEMPLATES,
    precision="fp32",
    batch_size=EVAL_BATCH,
    workers=0,
    features=None,
):
    """Run tasks on held-out pairs: {"retrieval": {...}, "zeroshot": {...}}, numbers by name.

    model     DualEncoder with a processor; evaluated in evaluation mode and left as it was
    pairs     Pairs
    tasks     some of the names in TASKS; retrieval, and zero-shot where there are classes, unless given
    features  (I, W), what picture_features gives for the pictures; unless given, the vision tower runs
    raises    ValueError for zero-shot on data without classes, and for a model without a processor
    """
    subject = Subject(model, pairs, None, templates, precision, batch_size, workers, features)
    return measure(subject, tasks or default_tasks(pairs, everything=False))


def default_tasks(data, everything):
    """The tasks that the data allows: those of auto, or those of all."""
    tasks = ["retrieval", *(["zeroshot"] if data.classes else [])]
    if everything:
        tasks += ["probe", "knn"] if data.classes else []
        tasks += ["binding"] if isinstance(data, dualenc.ShapesPairs) else []
    return tasks


# ---- 12  Main -------------------------------------------------------------------------------------------------------


def read_lines(path, default):
    """The non-empty lines of a text file; default if no file is named. Raises ValueError if there are none."""
    if not path:
        return default
    if not os.path.isfile(path):  # unlike Path's, it takes words longer than a file name can be
        raise ValueError(f"no file {path}")
    lines = [line.strip() for _, line in dualenc.text_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return tuple(lines)


def read_templates(source):
    """The templates of a set by name (TEMPLATE_SETS) or of a file; dualenc.TEMPLATES unless given."""
    if source and source not in TEMPLATE_SETS and not os.path.isfile(source):
        raise ValueError(f"no file {source} with templates, nor a set of that name: {', '.join(TEMPLATE_SETS)}")
    return TEMPLATE_SETS[source] if source in TEMPLATE_SETS else read_lines(source, dualenc.TEMPLATES)


def read_classes(source):
    """Class names, made readable, from a file, one a line, or from the words themselves, with commas between.

    raises  ValueError for names that are given more than once
    """
    from_file = os.path.isfile(source) or "," not in source
    names = [dualenc.readable_name(name) for name in (read_lines(source, None) if from_file else source.split(","))]
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        raise ValueError(f"--classes names {', '.join(repeated[:5])} more than once: give each class one name")
    return tuple(filter(None, names))


def find_checkpoint(run):
    """(checkpoint folder or hub id, flags of the run it belongs to): a run folder stands for its best checkpoint."""
    folder = Path(run)
    home = folder if (folder / RUN_CONFIG).is_file() else folder.parent
    flags = dualenc.read_json(home / RUN_CONFIG)["flags"] if (home / RUN_CONFIG).is_file() else {}
    # A run killed while it replaced best has best.old; one stopped before its first evaluation has only last.
    return next((folder / name for name in ("best", "best.old", "last") if (folder / name).is_dir()), run), flags


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


def is_own_data(config, flags):
    """Whether --data is not given, or names what the run was trained on."""
    return config.data in ("", flags.get("data"))


def data_source(config, flags, run):
    """The arguments of load_pairs, spec among them: the run's own, as far as no other data is named."""
    if not (config.data or flags):
        raise ValueError(f"{run} is not a run of train.py, so it has no held-out data of its own: give --data")
    own = {name: flags[name] for name in DATA_FLAGS if name in flags} if is_own_data(config, flags) else {}
    return {**own, **{name: getattr(config, name) for name in DATA_FLAGS if getattr(config, name, None)}}


def make_subject(model, config, source, skip_bad):
    """The model and what --task and --data name, ready to be measured; skip_bad leaves out unreadable pictures."""
    spec, templates = source.pop("data"), read_templates(source.pop("templates", ""))
    device = model.logit_scale.device
    precision, workers = dualenc.pick_precision(config.precision, device), dualenc.pick_workers(config.workers, device)

    def load(split):
        pairs = dualenc.load_pairs(spec, split, templates=templates, **source)
        readable, bad = dualenc.drop_unreadable(pairs, workers) if skip_bad else (pairs, {})
        print("".join(f"skipped     {name}: {reason}\n" for name, reason in bad.items()), end="")
        pairs = readable if bad else pairs
        if not len(pairs):
            raise ValueError(
                f"the {split} part of data {spec} has no pictures that can be read, expected at least 1: name another "
                f"part with --split, or other data with --data"
            )
        return with_classes(pairs, read_classes(config.classes), templates) if config.classes else pairs

    if config.task == "winoground":
        data = load_quadruples(spec, source.get("allow_outside", False))
    elif config.task == "search":
        data = open_gallery(spec, config.split, config.index, config.query, config.top, **source)
    else:
        data = load(config.split)
    load_train = None if config.split == "train" else partial(load, "train")  # what was learned by heart is no measure
    return Subject(model, data, load_train, templates, precision, config.batch_size, workers)


def check_flags(config):
    """Raise ValueError for flags that no task could use, or that this one would ignore."""
    dualenc.at_least("--top", config.top, 1)
    dualenc.at_least("--batch-size", config.batch_size, 1)
    for name in ("query", "top", "index", "out"):
        got = getattr(config, name)
        if config.task != "search" and got != getattr(EvalConfig, name):
            raise ValueError(
                f"--{name} {got} is for search, and --task is {config.task}: add --task search or leave it out"
            )
    if config.classes and config.task in ("search", "winoground"):
        raise ValueError(f"--classes is for pictures with classes, which {config.task} does not look at: leave it out")


def main(argv=None):
    """Evaluate from the command line; returns the numbers that --json writes."""
    parser = dualenc.flag_parser(EvalConfig, __doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder, a checkpoint folder or a hub id")
    args = vars(parser.parse_args(argv))
    run, config = args.pop("run"), EvalConfig(**args)

    check_flags(config)
    checkpoint, flags = find_checkpoint(run)
    model = dualenc.DualEncoder.from_pretrained(checkpoint).to(dualenc.pick_device(config.device))
    source = data_source(config, flags, run)
    skip_bad = (config.on_bad_picture or (is_own_data(config, flags) and flags.get("on_bad_picture"))) == "skip"
    data = source["data"]
    subject = make_subject(model, config, source, skip_bad)
    facts = [
        f"model       {checkpoint}   {subject.precision} on {model.logit_scale.device}",
        f"data        {data}   {config.split}",
    ]
    automatic = config.task in ("auto", "all")
    tasks = default_tasks(subject.data, config.task == "all") if automatic else [config.task]
    print("\n".join(facts), flush=True)
    results = measure(subject, tasks, leave_out=config.task == "all")
    print("\n".join(describe(results)))
    if config.json:
        dualenc.write_file(Path(config.json), json.dumps(results, indent=2) + "\n")
    if config.task == "search" and config.out:
        contact_sheet(subject.data, results["search"]["found"]).save(config.out)
        print(f"sheet       {config.out}")
    if config.report:
        write_report(config.report, subject, results, facts)
        print(f"report      {config.report}/index.html")
    return results


if __name__ == "__main__":
    dualenc.run_script(main)
