"""What padding costs: captions padded to the longest of the batch, against 77 and 128 tokens.

    python tests/bench/captions.py --emoji emoji/captions.csv
    python tests/bench/captions.py                              # drawn captions of such lengths

77 is the length of CLIP's and open_clip's tokenizers, 128 that of transformers' example script.
"""

import random

import common
from torch.nn.functional import pad

import dualenc


class Padding(dualenc.Processor):
    """A Processor whose captions are all filled up to .length."""

    def __call__(self, text):
        inputs = super().__call__(text=text)
        missing = max(0, self.length - inputs["input_ids"].shape[1])
        return {name: pad(rows, (0, missing)) for name, rows in inputs.items()}


def read_captions(path):
    """All captions of a table; without one, some about as long as those of the emoji."""
    if path:
        return [text for several in dualenc.load_pairs(path, "all").captions for text in several]
    rng = random.Random(0)
    return [" ".join(rng.choices(common.WORDS, k=rng.randint(1, 9))) for _ in range(3600)]


def make_step(preset, captions, tokenizer, length):
    """A training step, on captions drawn each time."""
    model, rng = common.our_model(preset), random.Random(0)
    model.processor = Padding(model.processor.image_transform, tokenizer)
    model.processor.length = length
    precision = dualenc.pick_precision("auto", common.CPU)

    def draw():
        return rng.sample(captions, preset.batch)

    return common.our_step(model, common.batch_of(preset)[0], draw, precision)


def main():
    parser = common.flag_parser(__doc__, rounds=9)
    parser.add_argument("--emoji", default="", help="caption table (drawn captions unless given)")
    args = parser.parse_args()
    common.print_head()
    captions, preset = read_captions(args.emoji), common.PRESETS[args.preset]
    tokenizer = dualenc.train_tokenizer(dict.fromkeys(captions), common.VOCABULARY, 128)
    lengths = {"the longest": 0, "77": 77, "128": 128}
    ways = {name: make_step(preset, captions, tokenizer, n) for name, n in lengths.items()}
    common.print_times("step, padded to", common.alternate(ways, args.rounds))


if __name__ == "__main__":
    main()
