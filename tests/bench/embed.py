"""Embedding a folder of JPEGs and a list of captions, end to end, here and in transformers, with the same weights.

    python tests/bench/embed.py --cifar data/cifar10 --emoji emoji/captions.csv                     # 2,000 pictures
    python tests/bench/embed.py --cifar data/cifar10 --emoji emoji/captions.csv --pictures 10000
    python tests/bench/embed.py                                                # drawn pictures and captions

The weights are random ones of ours, written by save_pretrained(format="hf") and read by both libraries from that folder
with their own processors. Files on disk to unit-norm rows: ours by eval.embed_pictures (a loader of as many workers as
eval.py picks) and eval.embed_captions; transformers under inference_mode in batches of 256, decoding with PIL and
AutoImageProcessor in a loop, or in a DataLoader of as many workers; captions by AutoTokenizer in the order they come,
padded to the longest of their batch. Rows of both must agree. "as each runs by default" is ours at --precision auto
and transformers in fp32.
"""

import random
import sys
import tempfile
from pathlib import Path

import captions as caption_bench
import common
import torch
from PIL import Image

import dualenc
import eval as evaluation

BATCH = 256


def drawn_files(folder, count, side=32):
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side)).save(path)
    return paths


def save_weights(preset, captions, folder):
    model = common.ours(preset, text_pooling="pooler").eval()
    transform = model.vision_model.image_transform(crop_pct=1.0)
    model.processor = dualenc.Processor(transform, dualenc.train_tokenizer(captions, preset.vocab, 64))
    for weight in model.text_model.parameters():  # at its published start this tower tells captions hardly apart
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.save_pretrained(folder, format="hf")


class Ours:
    def __init__(self, folder, precision):
        self.model, self.precision = dualenc.DualEncoder.from_pretrained(folder), precision
        self.workers = dualenc.pick_workers(-1, torch.device("cpu"))

    def pictures(self, paths):
        pictures = dualenc.PictureFiles(paths)
        return evaluation.embed_pictures(self.model, pictures, self.precision, workers=self.workers)

    def captions(self, captions):
        return evaluation.embed_captions(self.model, captions, self.precision)


class Files(torch.utils.data.Dataset):
    """Paths to processed pixels, for transformers in a DataLoader."""

    def __init__(self, paths, processor):
        self.paths, self.processor = paths, processor

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB")

    def collate(self, pictures):
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"]


class Theirs:
    def __init__(self, folder, precision, workers):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.precision, self.workers = precision, workers

    @torch.inference_mode()
    def rows(self, embed, batches):
        rows = []
        for batch in batches:
            with dualenc.autocast(torch.device("cpu"), self.precision):
                features = embed(batch)
            features = getattr(features, "pooler_output", features)  # an output object from version 5 on
            rows.append(torch.nn.functional.normalize(features.float(), dim=-1))
        return torch.cat(rows)

    def pictures(self, paths):
        files = Files(paths, self.processor)
        loader = torch.utils.data.DataLoader(files, BATCH, num_workers=self.workers, collate_fn=files.collate)
        return self.rows(lambda pixels: self.model.get_image_features(pixel_values=pixels), loader)

    def captions(self, captions):
        batches = (captions[start : start + BATCH] for start in range(0, len(captions), BATCH))
        encode = lambda batch: self.tokenizer(batch, padding=True, return_tensors="pt")  # noqa: E731
        return self.rows(lambda inputs: self.model.get_text_features(**inputs), map(encode, batches))


def make_ways(folder, precisions):
    auto = dualenc.pick_precision("auto", torch.device("cpu"))
    workers = dualenc.pick_workers(-1, torch.device("cpu"))
    ways = {("ours", precision): Ours(folder, precision) for precision in sorted({auto, *precisions})}
    for library in common.available(["transformers"]):
        for precision in precisions:
            ways[library, precision] = Theirs(folder, precision, 0)
            ways[f"{library}, {workers} worker(s)", precision] = Theirs(folder, precision, workers)
    return ways, auto


def print_ways(what, count, ways, run, auto, rounds):
    """Time all ways of embedding and print them; run takes a way to its rows, which must agree."""
    rows_of = {name: run(way) for name, way in ways.items()}
    for (library, precision), rows in rows_of.items():
        apart = (rows - rows_of["ours", precision]).abs().max().item()
        assert apart < (1e-4 if precision == "fp32" else 5e-2), (what, library, precision, apart)
    seconds = common.alternate({name: lambda way=way: run(way) for name, way in ways.items()}, rounds, warmup=0)
    table = []
    for (library, precision), took in seconds.items():
        row = [
            f"{library} {precision}",
            f"{common.spread(took).median:.2f}",
            f"{count / common.spread(took).median:,.0f}",
        ]
        if library == "ours":
            row += ["", ""]
        else:
            row.append(f"{common.times_faster(took, seconds['ours', precision]):.2f}")
            row.append(f"{common.times_faster(took, seconds['ours', auto]):.2f}" if precision == "fp32" else "")
        table.append(row)
    default = f"as each runs by default (ours {auto})"
    common.print_table([f"{count:,} {what}", "seconds", "a second", "ours is x times as fast", default], table)


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=3)
    parser.add_argument("--preset", choices=common.PRESETS, default="tiny")
    parser.add_argument("--cifar", default="", help="folder of JPEGs, however deep (noise unless given)")
    parser.add_argument("--emoji", default="", help="caption file (drawn captions unless given)")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=10**9, help="at most as many")
    parser.add_argument("--precision", choices=("bf16", "fp32"), nargs="+", default=["bf16", "fp32"])
    args = parser.parse_args(argv)
    common.print_head(args, rates=False)
    captions = caption_bench.read_captions(args.emoji)[: args.captions]
    with tempfile.TemporaryDirectory() as scratch:
        save_weights(common.PRESETS[args.preset], captions, Path(scratch) / "model")
        paths = sorted(Path(args.cifar).rglob("*.jp*g")) if args.cifar else drawn_files(Path(scratch), args.pictures)
        paths = paths[:: max(1, len(paths) // args.pictures)][: args.pictures]
        ways, auto = make_ways(Path(scratch) / "model", args.precision)
        print_ways("JPEGs", len(paths), ways, lambda way: way.pictures(paths), auto, args.rounds)
        ways = {(name, p): way for (name, p), way in ways.items() if "worker" not in name}
        print_ways("captions", len(captions), ways, lambda way: way.captions(captions), auto, args.rounds)


if __name__ == "__main__":
    sys.exit(main())
