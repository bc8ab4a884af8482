"""What padding costs: captions padded to the longest of the batch, as train.py does, against 77 and 128 tokens.

    python tests/bench/captions.py --emoji FOLDER/captions.csv
    python tests/bench/captions.py                               # drawn captions of about the same lengths

A whole training step (train.train_step) and the text tower alone (forward and backward), at the tiny preset, on the
same batches of captions drawn from the file, in turn. 77 is the length of CLIP's and open_clip's tokenizers, 128 that
of the example script of transformers. The tokenizer is learned from the captions; more pieces would lengthen none.
"""

import random
import sys
from dataclasses import replace

import common
import torch

import dualenc
import train


class Padding:
    """A Processor whose captions are all filled up to one length."""

    def __init__(self, processor, length):
        self.processor, self.length = processor, length
        self.image_transform = processor.image_transform

    def __call__(self, text):
        inputs = self.processor(text=text)
        return {name: torch.nn.functional.pad(rows, (0, self.length - rows.shape[1])) for name, rows in inputs.items()}


def read_captions(path):
    """All captions of a caption file; without one, some as long as those of the emoji."""
    if path:
        pairs = [dualenc.load_pairs(path, split, val_fraction=0.1) for split in ("train", "val")]
        return [caption for part in pairs for several in part.captions for caption in several]
    rng = random.Random(0)
    lengths = rng.choices(range(1, 21), weights=[2 ** -abs((n - 4) / 2) for n in range(1, 21)], k=3600)
    return [" ".join(rng.choices(common.WORDS, k=length)) for length in lengths]


def make_steps(preset, captions, precision, processor, seed):
    """(a training step, forward and backward of the text tower) on the n-th batch; the batches turn with each call."""
    model, optimizer, config = common.training_setup(preset, precision=precision)
    processor.image_transform = model.processor.image_transform
    model.processor = processor
    images, _, _ = common.batch_of(preset, common.ours(common.PRESETS["smoke"]).processor)
    batches = (random.Random(f"{seed} {n}").sample(captions, preset.batch) for n in range(10**9))
    numbers = list(range(preset.batch))
    groups = torch.arange(preset.batch)

    def step():
        batch = train.Batch(images, next(batches), numbers, {})
        train.train_step(model, optimizer, config, batch, groups, precision)

    def text():
        inputs = model.processor(text=next(batches))
        with dualenc.autocast(torch.device("cpu"), precision):
            embeds = model.encode_text(**inputs)
        embeds.square().mean().backward()

    return step, text


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=9)
    parser.add_argument("--preset", choices=common.PRESETS, default="tiny")
    parser.add_argument("--emoji", default="", help="caption file (drawn captions unless given)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[77, 128], help="to pad to, beside the longest")
    args = parser.parse_args(argv)
    common.print_head(args, rates=False)
    precision = dualenc.pick_precision(args.precision, torch.device("cpu"))
    captions, preset = read_captions(args.emoji), replace(common.PRESETS[args.preset], tokens=8)
    tokenizer = dualenc.train_tokenizer(dict.fromkeys(captions), preset.vocab, max(args.lengths))
    ready = dualenc.Processor(common.ours(preset).processor.image_transform, tokenizer)
    lengths = sorted(int(row.sum()) for row in ready(text=captions)["attention_mask"])
    print(f"captions {len(captions):,} of {args.emoji or 'drawn words'}: {sum(lengths) / len(lengths):.1f} tokens in "
          f"the mean, 99% up to {lengths[len(lengths) * 99 // 100]}, longest {lengths[-1]}; {precision}")  # fmt: skip

    processors = {"longest of the batch": ready, **{str(n): Padding(ready, n) for n in args.lengths}}
    for title, which in (("whole step", 0), ("text tower", 1)):
        ways = {name: make_steps(preset, captions, precision, p, seed=0)[which] for name, p in processors.items()}
        seconds = common.alternate(ways, args.rounds)
        rows = []
        for name, took in seconds.items():
            time = common.spread(took)
            ratio = f"{common.times_faster(took, seconds['longest of the batch']):.2f}"
            rows.append([name, f"{1e3 * time.median:.0f}", f"{preset.batch / time.median:.0f}", ratio])
        common.print_table([f"{title}, padded to", "ms", "pairs/s", "times the longest's time"], rows)


if __name__ == "__main__":
    sys.exit(main())
