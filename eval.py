"""Measure a dual encoder, with intervals and chance levels, and show what it finds.

    python eval.py runs/shapes                                  a run, on its own held-out images
    python eval.py runs/cifar --task all --report report        all the data allows, plus a page
    python eval.py runs/cifar --data photos --task zeroshot --templates clip7
    python eval.py runs/cifar --data photos/ --task search --query "a dog on a beach" --out a.png

A run folder stands for its best checkpoint; a checkpoint folder or a hub id works too. Images and
captions go through the processor saved with the weights: they are measured as they were trained.

Sections   1 Embeddings, computed once   2 Rows kept on disk   3 Retrieval   4 Zero-shot
           5 Other tasks   6 Tables and the report   7 Flags   8 Tasks and main

Symbols    I images, N captions, K classes, E embedding size, W tower width.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import filelock
import safetensors.torch
import timm.utils
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import dualenc

EVAL_BATCH = 256
ROUNDING = 1e-6  # cosines closer than this are equal: the order of summation moves them by less

# ---- 1  Embeddings, computed once ----------------------------------------------------------------


@contextmanager
def measuring(model):
    """Inside: evaluation mode, no gradients, full float32 products. The model is left as it was."""
    was_training, products = model.training, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            yield model.eval()
    finally:
        torch.set_float32_matmul_precision(products)
        model.train(was_training)


def progress(items, what):
    """The same items, with a progress bar on the first process's terminal."""
    return tqdm(items, desc=what, disable=dualenc.rank() > 0 or None, leave=False)


def batches_of(items, size):
    """A sequence in batches; each of several processes takes its share of them."""
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    return batches[dualenc.share(len(batches))]


def embed_batches(model, batches, embed, precision, what):
    """Rows of embed, float32 on the CPU of every process; ValueError if some are not finite."""
    rows = []
    with measuring(model), dualenc.autocast(model.logit_scale.device, precision):
        for batch in progress(batches, what):
            rows.append(embed(batch).float().cpu())
    rows = torch.cat(sum(dualenc.from_all_ranks(rows), []))  # ranks hold consecutive batches
    if not rows.isfinite().all():
        raise ValueError("embeddings are not finite: the weights or the pixel values are broken")
    return rows


def embed_images(model, images, precision="fp32", batch_size=EVAL_BATCH, workers=0, pooled=False):
    """Embed images through the model's own processor; the processes of a job share the work.

    images   I PIL images, fetched by the workers
    pooled   stop at the vision tower's pooled features, before the projection
    returns  (I, E) unit-norm rows, or (I, W) pooled ones, float32 on the CPU of every process;
             {index: reason} of the images that cannot be read, whose rows are 0
    """
    device, transform, errors = model.logit_scale.device, model.processor.image_transform, []
    keys = batches_of([(0, i) for i in range(len(images))], batch_size)

    def embed(batch):
        errors.extend(batch[2])
        x = transform.normalize(batch[0].to(device, non_blocking=True))
        return model.vision_model(x).pooler_output if pooled else model.encode_image(x)

    loader = dualenc.image_loader(dualenc.ImageDataset(images, transform), keys, workers, device)
    rows = embed_batches(model, loader, embed, precision, "images")
    errors = sum(dualenc.from_all_ranks(errors), [])
    unreadable = {i: error for i, error in enumerate(errors) if error}
    rows[list(unreadable)] = 0
    return rows, unreadable


def embed_captions(model, captions, precision="fp32", batch_size=EVAL_BATCH, pooled=False):
    """Embed captions through the model's own processor; the processes of a job share the work.

    Equal captions are embedded once: in batches padded to different lengths they would come out
    slightly different, and rounding would decide their ties. Batches have similar lengths.

    captions  N strings
    pooled    stop at the text tower's pooled features, before the projection
    returns   (N, E) unit-norm rows, or (N, W) pooled ones, float32 on the CPU of every process
    """
    processor, encode = model.processor, model.processor.tokenizer.encode
    distinct = sorted(dict.fromkeys(captions), key=lambda caption: len(encode(caption)))

    def embed(batch):
        x = {name: ids.to(model.logit_scale.device) for name, ids in processor(text=batch).items()}
        return model.text_model(**x).pooler_output if pooled else model.encode_text(**x)

    rows = embed_batches(model, batches_of(distinct, batch_size), embed, precision, "captions")
    row_of = {caption: row for row, caption in enumerate(distinct)}
    return rows[[row_of[caption] for caption in captions]]


@dataclass
class EvalContext:
    """A model, the pairs to measure it on, and what several tasks need, computed once.

    pairs           Pairs; unreadable images are skipped if there is only one, or at most 1%
    tasks           names in TASKS; "auto" or "all" for those that the pairs allow
    training_pairs  Pairs of other images to learn from, with the same classes, for probe and k-NN
    image_features  pooled features, if known, as embed_images gives them: the tower does not run
    query, top      of search, and folder, where it keeps its index
    raises          ValueError for a model without a processor, or pairs that lack what a task needs

    Computed: image_embeds (I, E), text_embeds (N, E) of the distinct captions, right (M, 2), the
    (image, caption) indices of all right pairs; with classes, labels (I,), class_embeds (K, E).
    """

    model: dualenc.DualEncoder
    pairs: dualenc.Pairs
    tasks: str | list = "auto"
    training_pairs: dualenc.Pairs | None = None
    templates: tuple = dualenc.TEMPLATES
    precision: str = "fp32"
    batch_size: int = EVAL_BATCH
    workers: int = 0
    image_features: tuple | None = None
    query: str = ""
    top: int = 20
    folder: Path | None = None

    def __post_init__(self):
        if self.model.processor is None:
            raise ValueError("the model has no processor to prepare images and captions with")

        def has(what):
            return getattr(self, what, None) or getattr(self.pairs, what, None)

        # TASKS, section 8: a row says what it needs, and whether "auto" and "all" include it.
        allowed = [name for name, task in TASKS.items() if has(task.needs)]
        if self.tasks in ("auto", "all"):
            self.tasks = [name for name in allowed if getattr(TASKS[name], self.tasks)]
        for name in self.tasks:
            dualenc.check_choice("task", name, TASKS)
            if name not in allowed:
                got = f"{name} needs data with {TASKS[name].needs}, and this has none"
                raise ValueError(f'{got}; see the table of tasks in README.md, "Measure it"')
        self.options = self.precision, self.batch_size
        if self.tasks == ["search"]:
            return
        self.pairs, self.image_features = self.read(self.pairs, self.image_features)

        def project(features):
            return self.model.project_image(features.to(self.model.logit_scale.device))

        batches = batches_of(self.image_features, self.batch_size)
        self.image_embeds = embed_batches(self.model, batches, project, self.precision, "embeds")
        self.captions, self.right = self.pairs.caption_table()
        self.text_embeds = embed_captions(self.model, self.captions, *self.options)
        if self.pairs.classes:
            self.labels, classes = torch.tensor(self.pairs.labels), self.pairs.classes
            self.class_embeds = class_embeds(self.model, classes, self.templates, *self.options)

    def read(self, pairs, found=None):
        """(the pairs whose image can be read, their pooled features (I, W)); found: known ones."""
        how = *self.options, self.workers
        features, unreadable = found or embed_images(self.model, pairs.images, *how, pooled=True)
        if not unreadable:
            return pairs, features
        kept = [i for i in range(len(pairs)) if i not in unreadable]
        reason = f"{len(unreadable)} of {len(pairs)} images: {next(iter(unreadable.values()))}"
        if len(unreadable) > max(1, len(pairs) // 100) or not kept:
            raise ValueError(reason)
        print(f"skipped     {reason}", flush=True)
        return pairs.select(kept), features[kept]

    @cached_property
    def ranks(self):  # of each image's best right caption (I,), of each caption's best image (N,)
        device = self.model.logit_scale.device
        return ranks(self.image_embeds.to(device), self.text_embeds.to(device), self.right)

    @cached_property
    def train(self):  # pooled features of the training images, and their labels
        if self.training_pairs.classes != self.pairs.classes:
            raise ValueError("probe and k-NN need the same classes in training and test data")
        pairs, features = self.read(self.training_pairs)
        return features, torch.tensor(pairs.labels)

    def measure(self):
        """{task: its metrics}"""
        with measuring(self.model):
            return {name: TASKS[name].measure(self) for name in self.tasks}


def evaluate(model, pairs, tasks="auto", **more):
    """{task: {metric: value}} of held-out pairs; tasks and more are fields of EvalContext."""
    return EvalContext(model, pairs, tasks, **more).measure()


# ---- 2  Rows kept on disk ------------------------------------------------------------------------


def store_folder(spec, kind, data_root="data"):
    """The hidden folder, beside the data or in data_root, for stored rows of a data spec."""
    path = Path(spec).absolute()
    on_disk = path.exists() or path.suffix == ".tar"  # a name with {0..9} is not a file's
    beside = path.parent if on_disk and os.access(path.parent, os.W_OK) else Path(data_root)
    return beside / f".{path.name}.{kind}"


def data_checksum(names):
    """How a run recognises its data: a checksum of all images' names, whatever their order."""
    return hashlib.sha256("\0".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()


def cache_key(model, precision, side):
    """A name that changes with anything that changes a row: weights, configuration, preparation.

    side  "image_features" or "text_features", of a tower; "image_embeds", of the whole model
    """
    config, processor = model.config, model.processor
    if side == "text_features":
        processor.truncate_at(processor.max_length)  # a call may have left its own limit there
        facts = [asdict(config.text), processor.tokenizer.to_str(), processor.max_length]
    else:  # patches are dropped in training only
        tower = replace(config.vision, patch_dropout=0.0)
        facts = [asdict(tower), processor.image_transform.to_dict(), config.projection_head]
    digest = hashlib.sha256(json.dumps([side, precision, *facts], sort_keys=True).encode())
    part = {"text_features": "text_model.", "image_features": "vision_model.", "image_embeds": ""}
    for name, tensor in model.state_dict().items():
        if name.startswith(part[side]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stored_rows(folder, stamps, embed):
    """Rows kept on disk, brought up to date: only what is new or has changed is embedded.

    folder   made if need be; a second job waits for the first
    stamps   one string a row, which changes when the row's image does
    embed    list of indices -> (rows in its order, {place in the list: why unreadable})
    returns  (I, W) float32 rows, those of unreadable images 0; {index: why unreadable}; how many
             rows are new
    raises   ValueError if none of the images can be read
    """
    file, old_stamps, parts, unreadable = Path(folder) / "rows.safetensors", [], [], {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{file}.lock") if dualenc.rank() == 0 else nullcontext():
        dualenc.from_all_ranks("locked")  # the others wait for the lock, too
        if file.is_file():
            with dualenc.blamed_on(file, "cannot read"):
                stored = safetensors.torch.load_file(file)
                old_stamps = json.loads(stored["stamps"].numpy().tobytes())
                parts.append(stored["rows"])
        row_of = {stamp: row for row, stamp in enumerate(old_stamps)}
        new = [i for i, stamp in enumerate(stamps) if stamp not in row_of]
        if new:
            fresh, reasons = embed(new)
            parts.append(fresh)
            row_of |= {stamps[i]: len(old_stamps) + k for k, i in enumerate(new)}  # below the old
            unreadable = {new[place]: reason for place, reason in reasons.items()}
        if len(unreadable) == len(stamps):
            raise ValueError(f"none of the images can be read: {unreadable[0]}")
        rows = torch.cat(parts)[[row_of[stamp] for stamp in stamps]]
        if dualenc.rank() == 0 and new:
            # Unreadable images are left out, and so are tried again the next time.
            kept = [i for i in range(len(stamps)) if i not in unreadable]
            content = json.dumps([stamps[i] for i in kept]).encode()
            # As bytes in a tensor: safetensors holds nothing else.
            text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dualenc.write_file(file, safetensors.torch.save({"rows": rows[kept], "stamps": text}))
    return rows, unreadable, len(new) - len(unreadable)


# ---- 3  Retrieval --------------------------------------------------------------------------------


def with_interval(name, values, per_image=None):
    """A share with its 95% interval: the mean, plus or minus 1.96 standard errors over images.

    per_image  (I,) one value an image: the error comes from their spread; values unless given
    returns    {name, name_low, name_high}, the ends kept within 0 and 1
    """
    values, spread = values.double(), (values if per_image is None else per_image).double()
    mean, error = values.mean(), 1.96 * spread.std(correction=0) / len(spread) ** 0.5
    low, high = (mean - error).clamp(min=0), (mean + error).clamp(max=1)
    return {name: mean.item(), f"{name}_low": low.item(), f"{name}_high": high.item()}


def ranks(image_embeds, text_embeds, right, rows=512):
    """The rank of each image's best right caption and of each caption's best right image.

    1 is first. A tie counts against the model: wrong answers with the score of the right one rank
    before it. A score that is nan ranks before all others.

    image_embeds  (I, E)  unit-norm rows
    text_embeds   (N, E)  unit-norm rows of captions, or of classes
    right         (M, 2)  int64, (image index, caption index) of every right answer
    rows          images at a time: at most twice rows x N scores are in memory
    returns       (I,) and (N,), int64 from 1, on the CPU; a caption of no image has rank I + 1
    raises        ValueError if an image has no right answer
    Exercise 7    medium, 45 minutes: ranks with several right answers, run `pytest -k exercise_7`
    """
    image, text = right.to(image_embeds.device).unique(dim=0).T
    n_images, n_texts = len(image_embeds), len(text_embeds)
    # Start in last place, at 1 + all wrong answers. The loop subtracts those below the best right
    # one. A tie or nan is not below it, and so counts against the model.
    image_ranks = 1 + n_texts - image.bincount(minlength=n_images)
    text_ranks = 1 + n_images - text.bincount(minlength=n_texts)
    if (image_ranks > n_texts).any():
        raise ValueError("an image has no right answer")
    pieces = zip(image.split(rows), text.split(rows))
    own = torch.cat([(image_embeds[i] * text_embeds[t]).sum(dim=1) for i, t in pieces])
    image_best = own.new_full((n_images,), -torch.inf).scatter_reduce(0, image, own, "amax")
    text_best = own.new_full((n_texts,), -torch.inf).scatter_reduce(0, text, own, "amax")
    for start in progress(range(0, n_images, rows), "ranks"):
        part, here = slice(start, start + rows), (image >= start) & (image < start + rows)
        scores = image_embeds[part] @ text_embeds.T
        scores[image[here] - start, text[here]] = torch.inf  # right answers must not count
        # Write 0 and 1 as floats, which add up many times faster than booleans, exactly to 2**24.
        text_below = torch.lt(scores, text_best - ROUNDING, out=torch.empty_like(scores))
        text_ranks -= text_below.sum(dim=0).long()
        image_ranks[part] -= scores.lt_(image_best[part, None] - ROUNDING).sum(dim=1).long()
    return image_ranks.cpu(), text_ranks.cpu()


def retrieval_metrics(image_ranks, text_ranks, right):
    """Metrics of ranks, by name.

    image_ranks  (I,)    of each image's best right caption
    text_ranks   (N,)    of each caption's best right image
    right        (M, 2)  (image index, caption index) of every right answer
    returns      shares i2t_r1, i2t_r5, i2t_r10, i2t_mrr, each with _low and _high; i2t_medr, the
                 median rank; the same with t2i_; counts; chance_r1, what guessing reaches
    source       Karpathy and Fei-Fei 2015, section 4.1 (recall and median rank)
    """
    images, captions = right.T
    metrics = {"n_images": len(image_ranks), "n_captions": len(text_ranks)}
    metrics["chance_r1"] = len(right) / (len(image_ranks) * len(text_ranks))
    for way, found in (("i2t", image_ranks), ("t2i", text_ranks)):
        values = {f"r{k}": (found <= k).double() for k in (1, 5, 10)} | {"mrr": 1 / found.double()}
        for name, value in values.items():
            per_image = value
            if way == "t2i":  # an image's captions depend on each other: it counts by their mean
                total = value.new_zeros(len(image_ranks)).index_add(0, images, value[captions])
                per_image = total / images.bincount()
            metrics |= with_interval(f"{way}_{name}", value, per_image)
        metrics[f"{way}_medr"] = found.double().quantile(0.5).item()
    return metrics


def retrieval_task(context):
    return retrieval_metrics(*context.ranks, context.right)


def retrieval_blocks(context, metrics, size=8):
    """For the page: cosines of a few pairs; the best and worst captions with what they found."""
    captions, right, pairs = context.captions, context.right, context.pairs
    text_ranks = context.ranks[1]
    some = torch.linspace(0, len(pairs) - 1, min(size, len(pairs))).long().tolist()
    texts = [right[right[:, 0] == i, 1][0].item() for i in some]
    values = context.text_embeds[texts] @ context.image_embeds[some].T
    shades = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    rows = [(captions[n], *(f"{v:.2f}" for v in row)) for n, row in zip(texts, values.tolist())]
    note = "cosines of captions (rows) and images (columns); pairs on the diagonal"
    columns = ("", *(pairs.images[i] for i in some))
    blocks = [Table("similarity", note, columns, rows, shades.tolist())]
    best = text_ranks.argsort(stable=True).tolist()
    worst = [query for query in best[::-1] if text_ranks[query] > 1]
    for title, query in [("Best", q) for q in best[:3]] + [("Worst", q) for q in worst[:3]]:
        images = right[right[:, 1] == query, 0]
        scores = context.image_embeds @ context.text_embeds[query]
        nearest = scores.topk(min(5, len(scores))).indices
        # The best right one is shown whatever its rank.
        found = {pairs.names[i]: scores[i] for i in [*nearest, images[scores[images].argmax()]]}
        title = f"{title}: “{captions[query]}”, right at rank {text_ranks[query]}"
        blocks.append(cards(title, pairs, found, [pairs.names[i] for i in images]))
    return blocks


# ---- 4  Zero-shot --------------------------------------------------------------------------------

# Chosen among the paper's 80 prompts, in the CLIP repository's Prompt_Engineering_for_ImageNet.
CLIP7 = "itap of a {}.|a bad photo of the {}.|a origami {}.|a photo of the large {}."
CLIP7 += "|a {} in a video game.|art of the {}.|a photo of the small {}."
TEMPLATE_SETS = {"plain": ("a photo of a {}.",), "clip7": tuple(CLIP7.split("|"))}
CALIBRATION_BINS = 15


def class_embeds(model, classes, templates, precision="fp32", batch_size=EVAL_BATCH):
    """A classifier made of captions: one direction per class, the mean over its templates.

    classes     K names
    templates   strings in which every {} stands for the name
    returns     (K, E) unit-norm rows: a class's captions averaged, then normalised again
    source      Radford et al. 2021, section 3.1.4 (ensembling over the embedding space)
    Exercise 8  easy, 20 minutes: a classifier made of captions, run `pytest -k exercise_8`
    """
    captions = [template.replace("{}", name) for name in classes for template in templates]
    rows = embed_captions(model, captions, precision, batch_size)
    return F.normalize(rows.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zeroshot_metrics(image_embeds, class_rows, labels, classes):
    """Zero-shot classification: retrieval of the class direction nearest to each image.

    image_embeds  (I, E)  unit-norm rows
    class_rows    (K, E)  unit-norm rows of K classes by name
    labels        (I,)    right class indices
    returns       shares zs_top1, zs_top5, zs_per_class (the mean over classes in the data), each
                  with _low and _high; zs_class_top1, {name: share}; chance_top1, n_images, ...
    """
    right = torch.stack([torch.arange(len(labels)), labels], dim=1)
    rank, _ = ranks(image_embeds, class_rows, right)
    hits, sizes = (rank <= 1).double(), labels.bincount(minlength=len(classes)).double()
    by_class = hits.new_zeros(len(classes)).index_add(0, labels, hits) / sizes
    # With these weights, the mean over images is the mean over the classes present.
    weights = len(labels) / ((sizes > 0).sum() * sizes[labels])
    return {
        "n_images": len(labels),
        "n_classes": len(classes),
        "chance_top1": 1 / len(classes),
        **with_interval("zs_top1", hits),
        **with_interval("zs_top5", (rank <= 5).double()),
        **with_interval("zs_per_class", weights * hits),
        "zs_class_top1": {name: by_class[k].item() for k, name in enumerate(classes) if sizes[k]},
    }


def minimise(loss, start):
    """Where a smooth function of one tensor is smallest, by L-BFGS from start."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return found.detach()


def calibration(image_embeds, class_rows, labels, logit_scale):
    """Are classes given 80% right 80% of the time? Before and after dividing by a temperature.

    logit_scale  ()  the model's: natural log of what multiplies cosines; the rest as above
    returns      zs_temperature, fitted on a random half of the images; on the other zs_ece, the
                 mean over images of |confidence - accuracy| of their bin (of similar confidence),
                 and zs_nll, the loss in nats; the same with _scaled, after the temperature
    source       Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 3 and 9
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit, rest = order[: len(labels) // 2], order[len(labels) // 2 :]
    logits = (logit_scale.exp() * image_embeds @ class_rows.T).double()
    start = torch.zeros(1).double()  # the logarithm of a temperature of 1
    fitted = minimise(lambda log_t: F.cross_entropy(logits[fit] / log_t.exp(), labels[fit]), start)
    temperature = fitted.clamp(-5, 5).exp().item()
    metrics = {"zs_temperature": temperature}
    for suffix, divisor in (("", 1), ("_scaled", temperature)):
        confidence, guess = (logits[rest] / divisor).softmax(dim=1).max(dim=1)
        gaps = confidence - (guess == labels[rest]).double()
        bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        # |mean gap of a bin| times the bin's share of images is |sum of its gaps| / images.
        sums = gaps.new_zeros(CALIBRATION_BINS).index_add(0, bins, gaps)
        metrics[f"zs_ece{suffix}"] = sums.abs().sum().item() / len(rest)
        metrics[f"zs_nll{suffix}"] = F.cross_entropy(logits[rest] / divisor, labels[rest]).item()
    return metrics


def zeroshot_task(context):
    """Accuracy and calibration of zero-shot classification."""
    given = context.image_embeds, context.class_embeds, context.labels
    metrics = zeroshot_metrics(*given, context.pairs.classes)
    if len(context.labels) > 1:
        metrics |= calibration(*given, context.model.logit_scale.detach().cpu())
    return {"n_templates": len(context.templates), **metrics}


def zeroshot_blocks(context, metrics):
    """For the page: the confusion matrix, up to 100 classes."""
    classes, K = context.pairs.classes, len(context.pairs.classes)
    guesses = (context.image_embeds @ context.class_embeds.T).argmax(dim=1)
    counts = (context.labels * K + guesses).bincount(minlength=K * K).view(K, K)  # cells by number
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    rows = [(name, *(f"{v:.0%}" if v else "" for v in row)) for name, row in zip(classes, shares)]
    note = "right classes in rows, the classes found in columns"
    return [Table("confusion", note, ("", *classes), rows, shares)] if K <= 100 else []


# ---- 5  Other tasks ------------------------------------------------------------------------------

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5  # few-shot accuracy is the mean over this many random draws of the training images
PENALTIES = tuple(10.0**-power for power in range(7))  # each fit starts from the one before
BINDING_KINDS = ("replaced", "attributes", "relation", "order")  # see ShapesPairs.hard_negatives


def fit_logistic(features, labels, penalty, start):
    """Logistic regression: weights (W, K) of features (I, W); the last is 1, for the bias."""

    def loss(weights):
        nll = F.cross_entropy(features @ weights, labels)
        return nll + penalty / 2 * weights[:-1].square().sum()

    return minimise(loss, start)


def nearest_neighbours(train, train_labels, test, n_classes, k=20, temperature=0.07, rows=512):
    """k-NN by cosine: classes (I,) of test (I, W) by train (J, W) with its labels (J,).

    source  Wu et al. 2018, "Unsupervised Feature Learning ... Instance Discrimination", section 3.4
    """
    train, test, guesses = F.normalize(train, dim=1), F.normalize(test, dim=1), []
    for some in test.split(rows):
        cosines, nearest = (some @ train.T).topk(min(k, len(train)), dim=1)
        weights = (cosines / temperature).exp()
        votes = some.new_zeros(len(some), n_classes).scatter_add_(1, train_labels[nearest], weights)
        guesses.append(votes.argmax(dim=1))
    return torch.cat(guesses)


def few_shot(context, name, learn, train, test, pool):
    """Accuracy of a classifier that learned from a few training images a class, or from all.

    learn    function of features (J, W), labels (J,), test features (I, W) and K to classes (I,)
    pool     indices of the training images to learn from
    returns  shares name_1shot_top1, ..., name_16shot_top1, name_top1; counts and chance_top1
    """
    labels, train_labels, K = context.labels, context.train[1], len(context.pairs.classes)

    def hits(chosen):
        return (learn(train[chosen], train_labels[chosen], test, K) == labels).double()

    metrics = {"n_images": len(labels), "n_train": len(pool), "n_classes": K, "chance_top1": 1 / K}
    for shots in progress(SHOTS, f"{name}, few shots"):
        draws = []
        for seed in range(DRAWS):
            drawn = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
            drawn = torch.cat([drawn[train_labels[drawn] == k][:shots] for k in range(K)])
            draws.append(hits(drawn))
        metrics |= with_interval(f"{name}_{shots}shot_top1", torch.stack(draws).mean(dim=0))
    return metrics | with_interval(f"{name}_top1", hits(pool))


def probe_task(context):
    """Linear probe: logistic regression on the vision tower's pooled features.

    A fifth of the training images, at most 5,000, choose the penalty, also of few-shot fits.

    source  Radford et al. 2021, appendix A.3 (protocol)
    """
    train, labels = context.train
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    # The last column is for the bias.
    train = F.pad((train - mean) / std, (0, 1), value=1.0)
    test = F.pad((context.image_features - mean) / std, (0, 1), value=1.0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = order[: max(1, min(len(labels) // 5, 5000))]

    def learn(features, classes, queries, n_classes):
        weights, best = features.new_zeros(features.shape[1], n_classes), (-1.0, None)
        for penalty in PENALTIES:
            weights = fit_logistic(features, classes, penalty, weights)
            hits = (train[held_out] @ weights).argmax(dim=1) == labels[held_out]
            best = max(best, (hits.float().mean().item(), weights), key=lambda fit: fit[0])
        return (queries @ best[1]).argmax(dim=1)

    return few_shot(context, "probe", learn, train, test, order[len(held_out) :])


def knn_task(context):
    """k-NN on the vision tower's pooled features; metrics as in probe_task, with knn for probe."""
    train, pool = context.train[0], torch.arange(len(context.train[1]))
    return few_shot(context, "knn", nearest_neighbours, train, context.image_features, pool)


def binding_task(context):
    """Is an image nearer to its caption than to the same words bound wrongly? Ties are wrong.

    returns  shares binding_replaced, ..., binding_all (the caption beats all wrong ones); n_images,
             n_attributes (images whose objects differ in colour), ...; chance_binding, of one kind
    source   the idea: Yuksekgonul et al. 2023, "... behave like bags-of-words, and what to do"
    """
    pairs, everything = context.pairs, list(range(len(context.pairs)))
    wrong = [pairs.hard_negatives(i) for i in everything]

    def cosines(images, captions):
        texts = embed_captions(context.model, captions, *context.options)
        return (context.image_embeds[images] * texts).sum(dim=1)

    right_cosines = cosines(everything, [captions[0] for captions in pairs.captions])
    metrics, all_right = {"n_images": len(pairs)}, torch.ones(len(pairs), dtype=torch.bool)
    for kind in BINDING_KINDS:
        images = [i for i in everything if kind in wrong[i]]
        won = right_cosines[images] > ROUNDING + cosines(images, [wrong[i][kind] for i in images])
        all_right[images] &= won
        metrics |= {f"n_{kind}": len(images), **with_interval(f"binding_{kind}", won)}
    return {**metrics, **with_interval("binding_all", all_right), "chance_binding": 0.5}


def search_task(context):
    """The images nearest to a query of words, or to an image file; the index is kept on disk.

    returns  found, {name: cosine}, best first; query, n_images, n_indexed (those that the index did
             not have), unreadable (names, never among those found)
    """
    pairs, model, query, options = context.pairs, context.model, context.query, context.options
    if not query:
        raise ValueError('search needs --query: words such as "a red car", or an image file')
    if Path(query).suffix.lower() in dualenc.IMAGE_SUFFIXES:
        direction, _ = embed_images(model, [dualenc.open_image(query)], *options)
    else:
        direction = embed_captions(model, [query], *options)
    rows, unreadable, n_indexed = stored_rows(
        context.folder / cache_key(model, context.precision, "image_embeds"),
        pairs.stamps(),
        lambda new: embed_images(model, pairs.select(new).images, *options, context.workers),
    )
    cosines = rows @ direction[0]
    cosines[list(unreadable)] = -torch.inf  # their 0 would beat every negative cosine
    cosines, best = cosines.topk(min(context.top, len(rows) - len(unreadable)))
    return {
        "query": query,
        "n_images": len(rows),
        "n_indexed": n_indexed,
        "unreadable": ", ".join(pairs.names[i] for i in unreadable) or "none",
        "found": {pairs.names[i]: cosine for i, cosine in zip(best.tolist(), cosines.tolist())},
    }


def search_blocks(context, metrics):
    """For the page: the images found."""
    return [cards(f"Found for “{metrics['query']}”", context.pairs, metrics["found"])]


def image_grid(pairs, names, columns=5, side=160):
    """One PIL image of the named ones, row by row, each scaled into a square."""
    images = [pairs.images[pairs.names.index(name)] for name in names]
    squares = [ImageOps.pad(image, (side, side), color="white") for image in images]
    return to_pil_image(make_grid([pil_to_tensor(s) for s in squares], columns, 8, pad_value=255))


# ---- 6  Tables and the report --------------------------------------------------------------------


@dataclass
class Table:
    """Rows of text under columns, for the terminal and the report page alike.

    columns  strings; on the page, PIL images too
    rows     tuples of strings; the first of each names the row
    shades   how dark the cells after the first are on the page, from 0 to 1, a list a row
    """

    title: str
    note: str
    columns: tuple
    rows: list
    shades: list | None = None

    def lines(self):
        """The table as lines of text, columns aligned."""
        cells = [self.columns, *self.rows] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [f"{self.title:<11} {self.note}".rstrip()]
        for first, *others in cells:
            aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
            lines.append("  " + "   ".join([first.ljust(widths[0]), *aligned]).rstrip())
        return lines

    def html(self):
        head = [html.escape(c) if isinstance(c, str) else image_tag(c, 64) for c in self.columns]
        body, no_shades = "", [[0.0] * len(head)] * len(self.rows)
        for (first, *cells), shades in zip(self.rows, self.shades or no_shades):
            body += f"<tr><th>{html.escape(first)}</th>"
            for cell, shade in zip(cells, shades):
                style = f"background:rgb(43 108 176/{shade:.2f});color:{'#fff' * (shade > 0.65)}"
                body += f'<td style="{style}">{html.escape(cell)}</td>'
            body += "</tr>"
        head = "".join(f"<th>{cell}</th>" for cell in head)
        title = f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.note)}</p>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'{title}<div class="wide">{table}</div>'


def metric_tables(title, metrics):
    """Metrics as Tables: one with counts in its note, and one for each {name: number}."""
    notes, rows, tables = [], [], []
    for name, value in metrics.items():
        if isinstance(value, dict):
            ordered = sorted(value.items(), key=lambda item: -item[1])
            tables.append(Table(name, "", ("", "value"), [(k, f"{v:.3f}") for k, v in ordered]))
        elif name.startswith("chance"):
            notes.append(f"{name} {value:.4f}")
        elif not isinstance(value, float):
            notes.append(f"{name} {value}")
        elif not name.endswith(("_low", "_high")):
            ends = [metrics[name + end] for end in ("_low", "_high") if name + end in metrics]
            rows.append((name, f"{value:.3f}", " to ".join(f"{end:.3f}" for end in ends)))
    columns = ("", "value", "95% interval over images")
    return [Table(title, "   ".join(notes), columns, rows), *tables]


def cards(title, pairs, found, right=()):
    """HTML of the images of {name: cosine}, with both below; those named in right are framed."""
    figures = ""
    for name, cosine in found.items():
        image = image_tag(pairs.images[pairs.names.index(name)], 160)
        figures += f'<figure class="{"right" if name in right else ""}">{image}'
        figures += f"<figcaption>{cosine:.3f} {html.escape(name)}</figcaption></figure>"
    return f'<h3>{html.escape(title)}</h3><div class="cards">{figures}</div>'


def image_tag(image, side):
    """An <img> with the PIL image inside, scaled down to side pixels."""
    image, data = image.convert("RGB"), io.BytesIO()
    image.thumbnail((side, side))
    image.save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="">'


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dualenc evaluation</title><style>
body { font: 16px/1.5 sans-serif; color: #222; margin: 0 auto; max-width: 64rem; padding: 1rem }
h2 { border-top: 2px solid #ddd; padding-top: 1rem } h3 { margin-bottom: 0 } figure { margin: 0 }
p, figcaption { margin: 0; color: #555; overflow-wrap: anywhere } .wide { overflow-x: auto }
table { border-collapse: collapse } thead th { vertical-align: bottom } figure { width: 9rem }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
tbody th { text-align: left; font-weight: normal } .cards { display: flex; flex-wrap: wrap }
.cards { gap: 1rem } figure img { width: 100% } .right img { outline: 4px solid #2b6cb0 }
</style></head><body><h1>dualenc evaluation</h1>"""


def write_report(folder, context, results, facts):
    """Write folder/index.html, headed by facts: one page, no script, nothing to fetch."""
    page = PAGE + "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    for name, metrics in results.items():
        page += f"<h2>{html.escape(TASKS[name].title)}</h2>"
        for block in metric_tables(name, metrics) + TASKS[name].blocks(context, metrics):
            page += block.html() if isinstance(block, Table) else block
    Path(folder).mkdir(parents=True, exist_ok=True)
    dualenc.write_file(Path(folder) / "index.html", page + "</body></html>\n")


# ---- 7  Flags: of eval.py and train.py -----------------------------------------------------------


def flag(default, help, group="other", choices=None, **more):
    """A dataclass field that carries its own --help line; more, like least=1, is its metadata."""
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, **more))


def flag_parser(config_class, description):
    """A parser with one --kebab-case flag a field: strict types, --x and --no-x for booleans."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    hints, groups = get_type_hints(config_class), {}
    for f in fields(config_class):
        kind, *_ = get_args(hints[f.name]) or [hints[f.name]]  # int of int | None, or the type
        shown = "" if f.default in (None, "") else f" (default: {f.default})"
        options = {"default": f.default, "help": (f.metadata["help"] + shown).replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict:  # a=1 b=(2,3): a value that is no Python literal stays a string
            options.update(nargs="*", metavar="NAME=VALUE", action=timm.utils.ParseKwargs)
            options["type"] = lambda s: s if "=" in s else parser.error(f"{s!r} is not NAME=VALUE")
        else:
            metavar = None if f.metadata["choices"] else kind.__name__.upper()
            options.update(type=kind, choices=f.metadata["choices"], metavar=metavar)
        title = f.metadata["group"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        groups[title].add_argument("--" + f.name.replace("_", "-"), **options)
    return parser


def run_script(main):
    """Call main; an error becomes one line and exit status 1, Ctrl-C gives 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names that the terminal cannot show
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---- 8  Tasks and main ---------------------------------------------------------------------------


class Task(NamedTuple):
    """A row of TASKS, used by --task, evaluate, printout and page. A new task is a new row."""

    title: str  # heading on the page
    auto: bool  # whether --task auto includes it
    all: bool  # whether --task all includes it; if not, it runs only if named
    needs: str  # an attribute of Pairs, or training_pairs, that must not be empty
    measure: object  # an EvalContext to metrics by name
    blocks: object = lambda context, metrics: []  # to Tables and HTML for the page only


TASKS = {
    "retrieval": Task("Retrieval", True, True, "captions", retrieval_task, retrieval_blocks),
    "zeroshot": Task("Zero-shot", True, True, "classes", zeroshot_task, zeroshot_blocks),
    "probe": Task("Linear probe", False, True, "training_pairs", probe_task),
    "knn": Task("k nearest neighbours", False, True, "training_pairs", knn_task),
    "binding": Task("Binding", False, True, "hard_negatives", binding_task),
    "search": Task("Search", False, False, "images", search_task, search_blocks),
}

SPLIT_HELP = "auto: what the run held out of its own data; of other data the test part, or all"
CLASSES_HELP = "other classes: a,b,c or a file, one a line; folder<TAB>name lines rename classes"
TASK_HELP = "auto: retrieval, and zero-shot where there are classes; all: what the data allows"


@dataclass(frozen=True)
class EvalConfig:
    data: str = flag("", "data spec (README.md has them); the run's own unless given", "data")
    split: str = flag("auto", SPLIT_HELP, "data", ("auto", "train", "val", "test", "all"))
    data_root: str = flag("", "where torchvision's data sets lie", "data")
    images: str = flag("", "image folder of a caption file, if not its own", "data")
    classes: str = flag("", CLASSES_HELP, "data")
    templates: str = flag("", "plain, clip7 or a file, one a line, {} for the class", "data")
    task: str = flag("auto", TASK_HELP, "tasks", ("auto", "all", *TASKS))
    query: str = flag("", "search: words, or an image file", "tasks")
    top: int = flag(20, "search: how many images to show", "tasks")
    batch_size: int = flag(EVAL_BATCH, "images or captions a step", "speed")
    workers: int = flag(-1, "processes that read images; -1 picks", "speed")
    precision: str = flag("auto", "of the towers", "speed", ("auto", "bf16", "fp16", "fp32"))
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", "speed")
    json: str = flag("", "file to write the metrics to", "output")
    out: str = flag("", "search: image file for a grid of what was found", "output")
    report: str = flag("", "folder to write a self-contained web page to", "output")


def read_list(source):
    """The non-empty lines of a text file; without a file, the items between commas."""
    lines = dualenc.text_lines(source) if os.path.isfile(source) else source.split(",")
    lines = tuple(line.strip() for line in lines if line.strip())
    if source and not lines:
        raise ValueError(f"{source} is empty")
    return lines


def read_templates(source):
    """The templates of a set by name (TEMPLATE_SETS) or of a file; dualenc.TEMPLATES for ""."""
    if os.path.isfile(source):
        return read_list(source)
    dualenc.check_choice("file or set of templates", source or "plain", TEMPLATE_SETS)
    return TEMPLATE_SETS[source] if source else dualenc.TEMPLATES


def read_class_names(source):
    """What --classes says, {folder: name}; where only names are listed, {name: name}.

    source  names with commas between, or a file with one name a line or folder<TAB>name lines
    """
    cells = [line.rpartition("\t") for line in read_list(source)]
    names = [dualenc.readable_name(name) for _, _, name in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"--classes {source} has a name twice: give each class its own")
    return {folder.strip() or name: name for (folder, _, _), name in zip(cells, names)}


def load_part(spec, split, class_names, **how):
    """Pairs of a split. A list of names alone replaces the data's classes, and must have them."""
    classes = list(class_names)
    renames = classes != list(class_names.values())  # there are folder<TAB>name lines
    pairs = dualenc.load_pairs(spec, split, class_names=class_names if renames else {}, **how)
    if classes and not renames:
        if lacking := ", ".join(sorted({*(pairs.classes or ["classes"])} - {*classes})):
            hint = "add them, or rename them by a file of folder<TAB>name lines"
            raise ValueError(f"--classes lacks some of the data's: {lacking[:200]}; {hint}")
        pairs.labels = [classes.index(pairs.classes[label]) for label in pairs.labels]
        pairs.classes = classes
    return pairs


def open_data(config, checkpoint):
    """What --data and --split mean: fields of EvalContext by name, and a line that names the part.

    A run recognises its own data by their spec, or by the names of the images wherever they lie:
    then its val_fraction, templates and classes hold, and --split auto is what it held out. For
    other data auto means the test part or, without one, all of it.
    """
    record = dualenc.read_json(checkpoint.parent / dualenc.RUN_CONFIG, {})
    flags = record.get("flags", {})
    if not (config.data or flags):
        raise ValueError(f"{checkpoint} is not from a run with its own data: give --data")
    spec, search = config.data or flags["data"], config.task == "search"
    if search and os.path.isdir(spec):
        names = dualenc.list_images(spec)  # with captions or without
        paths = [os.path.join(spec, name) for name in names]
        pairs = dualenc.Pairs(names, dualenc.Lazy(paths, dualenc.open_image), [[] for _ in paths])
        line = f"{spec}   {len(pairs):,} images"
        return {"pairs": pairs, "folder": store_folder(spec, "index")}, line
    settings = flags if spec == flags.get("data") else {}  # the run's, if these are its own data
    how = {"data_root": config.data_root or settings.get("data_root", "data")}
    how |= {"images": config.images or settings.get("images"), "seed": flags.get("seed", 0)}
    names = dualenc.load_pairs(spec, "all", **how).names
    if record.get("data_names") == data_checksum(names):
        settings = flags  # the same images in another place are the run's own data, too
    how["templates"] = read_templates(config.templates or settings.get("templates", ""))
    how["class_names"] = read_class_names(config.classes or settings.get("classes", ""))
    # Other data without a split is measured whole: a val_fraction of 1.
    how["val_fraction"] = settings.get("val_fraction", 1.0 if config.split == "auto" else 0.1)
    auto = "all" if search else "test"
    part = auto if config.split == "auto" else config.split
    pairs = load_part(spec, part, **how)
    if not len(pairs):
        raise ValueError(f"the {part} part of {spec} has no images: name another by --split")
    line = f"{spec}   {part}, {len(pairs):,} of {len(names):,} images"
    line += "   the run's own data" if settings else ""
    path = checkpoint.parent / "trained_on.txt"
    trained_on = path.read_text(encoding="utf-8", errors="surrogateescape") if record else ""
    if seen := len(set(pairs.names).intersection(trained_on.split("\n"))):
        line += f"   the run trained on {seen:,} of them"
    data = {"pairs": pairs, "templates": how["templates"]}
    data["folder"] = store_folder(spec, f"{part}.index", how["data_root"])
    learners = [name for name, task in TASKS.items() if task.needs == "training_pairs"]
    if pairs.classes and part in ("val", "test") and config.task in ("all", *learners):
        data["training_pairs"] = load_part(spec, "train", **how)
    return data, line


def main(argv=None):
    """Evaluate from the command line; returns the metrics that --json writes."""
    parser = flag_parser(EvalConfig, __doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder, a checkpoint folder or a hub id")
    flags = vars(parser.parse_args(argv))
    run, config = flags.pop("run"), EvalConfig(**flags)
    dualenc.check_min("--top", config.top, 1)
    dualenc.check_min("--batch-size", config.batch_size, 1)
    if (config.query or config.out) and config.task != "search":
        raise ValueError(f"--query and --out are for --task search, and --task is {config.task}")
    if config.out and Path(config.out).suffix.lower() not in dualenc.IMAGE_SUFFIXES:
        raise ValueError(f"--out is {config.out}, expected an image file such as found.png")
    for file in filter(None, (config.json, config.out)):  # fails now, not after the work
        Path(file).parent.mkdir(parents=True, exist_ok=True)

    checkpoint = dualenc.find_folder(run)
    device = dualenc.pick_device(config.device)
    model = dualenc.DualEncoder.from_pretrained(checkpoint).to(device)
    precision = dualenc.pick_precision(config.precision, device)
    data, line = open_data(config, checkpoint)
    facts = [f"model       {checkpoint}   {precision} on {device}", f"data        {line}"]
    print("\n".join(facts), flush=True)

    tasks = config.task if config.task in ("auto", "all") else [config.task]
    how = {name: getattr(config, name) for name in ("batch_size", "workers", "query", "top")}
    context = EvalContext(model, tasks=tasks, precision=precision, **data, **how)
    results = context.measure()
    for name, metrics in results.items():
        for table in metric_tables(name, metrics):
            print("\n".join(table.lines()))
    if config.json:
        dualenc.write_file(Path(config.json), json.dumps(results, indent=2) + "\n")
    if config.out:
        image_grid(context.pairs, results["search"]["found"]).save(config.out)
    if config.report:
        write_report(config.report, context, results, facts)
    for file in filter(None, (config.json, config.out, config.report)):
        print(f"wrote       {file}")
    return results


if __name__ == "__main__":
    run_script(main)
