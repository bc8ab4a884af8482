"""One whole training step, here and in transformers and open_clip, at equal towers, batch, length and precision.

    python tests/bench/train_step.py                               # tiny towers, 32-pixel pictures, batch 128
    python tests/bench/train_step.py --preset small --rounds 5     # ViT-S/16 at 224 pixels, batch 16; three minutes
    python tests/bench/train_step.py --memory                      # also peak memory, in processes of their own
    python tests/bench/train_step.py --where                       # where the time of each step goes, instead

Ours is train.train_step itself: tokenizing the captions, normalising uint8 pictures, towers, loss, backward, clipping,
AdamW, and the accuracy of the batch. The peers start from ready pixels and token ids, and do what their own training
scripts do: transformers as its Trainer (autocast around model and loss, clipping at 1, fused AdamW), open_clip as its
train_one_epoch (autocast around model and loss, AdamW with decay 0.2 off gains and biases, no clipping).
"timm ViT alone" is forward and backward of the vision tower under autocast, without loss and optimiser. All of them
keep freed memory for the next step (train.keep_freed_memory), which the peers by themselves do not.

Rows of one precision are compared with each other; "as each runs by default" compares ours at --precision auto with
the peers in fp32, which is what they do on a CPU unless told. FLOPs are those of the products that are done, forward
and backward: ours does fewer, for it leaves out of the last layer what pooling does not read. Shares are of the
measured rate of a large product in the same precision.
"""

import math
import re
import sys
from collections import Counter
from functools import partial

import common
import torch

import dualenc
import train

LIBRARIES = ("ours", "transformers", "open_clip", "timm")
KINDS = {  # of torch's operations, by their names; the first that fits counts
    "products": r"mm|conv",
    "attention, fused": r"attention",
    "copies and casts": r"copy_|cat|clone",
    "norms, softmax, GELU": r"norm_cpu|layer_norm|softmax|gelu",
    "optimiser, clipping": r"adamw|_foreach|linalg",
    "the rest": r"",
}


def our_step(preset, precision):
    model, optimizer, config = common.training_setup(preset, precision=precision)
    images, captions, _ = common.batch_of(preset, model.processor)
    numbers = list(range(preset.batch))
    batch = train.Batch(images, captions, numbers, {})
    groups = torch.arange(preset.batch)
    return partial(train.train_step, model, optimizer, config, batch, groups, precision)


def ready_batch(preset):
    """(pixel_values, token inputs), for the peers."""
    processor = common.ours(common.PRESETS["smoke"]).processor
    images, _, inputs = common.batch_of(preset, processor)
    return images / 127.5 - 1, inputs


def transformers_step(preset, precision):
    model = common.transformers_model(preset)
    pixels, inputs = ready_batch(preset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)

    def step():
        with dualenc.autocast(torch.device("cpu"), precision):
            loss = model(pixel_values=pixels, return_loss=True, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def open_clip_step(preset, precision):
    from open_clip.loss import ClipLoss

    model, loss_of = common.open_clip_model(preset), ClipLoss()
    pixels, inputs = ready_batch(preset)
    groups = [{"params": [], "weight_decay": 0.2}, {"params": [], "weight_decay": 0.0}]
    for name, weight in model.named_parameters():
        groups[weight.ndim < 2 or "ln" in name]["params"].append(weight)
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def step():
        optimizer.zero_grad()
        with dualenc.autocast(torch.device("cpu"), precision):
            loss = loss_of(**model(pixels, inputs["input_ids"]))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step


def timm_step(preset, precision):
    vit = common.timm_vit(preset).train()
    pixels, _ = ready_batch(preset)

    def step():
        vit.zero_grad()
        with dualenc.autocast(torch.device("cpu"), precision):
            features = vit(pixels)
        features.float().square().mean().backward()

    return step


STEPS = {"ours": our_step, "transformers": transformers_step, "open_clip": open_clip_step, "timm": timm_step}


def make_step(library, preset, precision):
    return STEPS[library](common.PRESETS[preset], precision)


def peak_memory(library, preset, precision):
    """Bytes of a process that takes three steps, and what of it the first step added."""
    step = make_step(library, preset, precision)
    before = common.reset_peak()
    for _ in range(3):
        step()
    peak = common.resident("VmHWM")
    return peak, peak - before


def where(step, rounds):
    """{kind of operation: milliseconds of a step}, as torch's profiler counts them."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(rounds):
            step()
    spent = Counter()
    for event in profile.key_averages():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key.lower()))
        spent[kind] += event.self_cpu_time_total / 1e3 / rounds
    return spent


def main(argv=None):
    parser = common.flag_parser(__doc__, rounds=9)
    parser.add_argument("--preset", choices=common.PRESETS, default="tiny")
    parser.add_argument("--precision", choices=("bf16", "fp32"), nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=LIBRARIES)
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--where", action="store_true", help="count each step's time by kind of operation, instead")
    args = parser.parse_args(argv)
    rates = common.print_head(args)
    train.keep_freed_memory()
    libraries, preset = common.available(args.library), common.PRESETS[args.preset]
    print(f"preset   {args.preset}: batch {preset.batch}, {preset.image_size} pixels, {preset.tokens} tokens")

    ways = {(library, precision): make_step(library, args.preset, precision)
            for precision in args.precision for library in libraries
            if (library, precision) != ("timm", "fp32")}  # fmt: skip
    if args.where:
        return print_where(ways, args.rounds)
    flops = {library: common.count_flops(make_step(library, args.preset, "fp32")) for library in libraries}
    seconds = common.alternate(ways, args.rounds)

    rows = []
    for (library, precision), took in seconds.items():
        row = [f"{'timm ViT alone' if library == 'timm' else library} {precision}"]
        time = common.spread(took)
        row += [f"{1e3 * time.median:.0f}", f"{preset.batch / time.median:.1f}", f"{flops[library] / 1e9:.1f}"]
        row.append(f"{flops[library] / time.median / rates[precision]:.1%}")
        ours = seconds.get(("ours", precision))
        row.append(f"{common.times_faster(took, ours):.2f}" if ours and library not in ("ours", "timm") else "")
        if args.memory:
            row.append(" / ".join(f"{n / common.MEGABYTE:.0f}" for n in common.in_child(
                peak_memory, library, args.preset, precision)))  # fmt: skip
        rows.append(row)
    titles = ["step", "ms", "pairs/s", "GFLOP", "share of product rate", "ours is x times as fast"]
    common.print_table(titles + ["peak / beyond the model, MB"] * args.memory, rows)
    print_verdicts(seconds, args.precision)


def print_where(ways, rounds):
    """A row for each step: milliseconds by kind of operation."""
    spent = {name: where(step, rounds) for name, step in ways.items()}
    rows = [[*name, *(f"{of[kind]:.0f}" for kind in KINDS), f"{of.total():.0f}"] for name, of in spent.items()]
    common.print_table(["ms of a step", "", *KINDS, "all"], rows)


def print_verdicts(seconds, precisions):
    """Ours against the faster peer of each round, and as each library runs by default."""
    rows = []
    for precision in precisions:
        peers = [seconds[key] for key in seconds if key[0] in ("transformers", "open_clip") and key[1] == precision]
        if peers and ("ours", precision) in seconds:
            ratio = common.times_faster(common.fastest(*peers), seconds["ours", precision])
            rows.append([f"{precision}: ours against the faster peer", f"{ratio:.2f}"])
    auto = dualenc.pick_precision("auto", torch.device("cpu"))
    for library in ("transformers", "open_clip"):
        if (library, "fp32") in seconds and ("ours", auto) in seconds:
            ratio = common.times_faster(seconds[library, "fp32"], seconds["ours", auto])
            rows.append([f"as each runs by default: ours ({auto}) against {library} (fp32)", f"{ratio:.2f}"])
    if rows:
        common.print_table(["comparison", "times as fast"], rows)


if __name__ == "__main__":
    sys.exit(main())
