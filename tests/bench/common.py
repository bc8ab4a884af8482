"""What the benches share: towers of equal size in three libraries, alternating rounds, memory, the printed head.

Peers are imported where they are built, so that every bench shows its --help and runs alone without them.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import random
import re
import statistics
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch

import dualenc
import train

MEGABYTE = 2**20
PACKAGES = ("torch", "timm", "transformers", "open_clip_torch")


# ---- Towers of equal size -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Sizes of a dual encoder and of the batch it is trained with; dropout is 0 everywhere."""

    vision: str  # timm name
    vision_args: dict
    image_size: int
    patch: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    text_width: int
    text_depth: int
    text_heads: int
    tokens: int
    batch: int
    vocab: int = 4096
    projection_dim: int = 256


PRESETS = {
    "smoke": Preset("vit_tiny_patch16_224", {"patch_size": 8, "depth": 1}, 32, 8, 192, 1, 3, 64, 1, 2, 8, 4),
    "tiny": Preset("vit_tiny_patch16_224", {"patch_size": 4, "depth": 6}, 32, 4, 192, 6, 3, 192, 4, 3, 32, 128),
    "small": Preset("vit_small_patch16_224", {}, 224, 16, 384, 12, 6, 384, 6, 6, 32, 16),
}
WORDS = ["".join(letters) for letters in zip(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")]


def ours(preset, text_pooling="mean"):
    """A DualEncoder in training mode, as `train.py --text scratch` builds it, with a processor."""
    torch.manual_seed(0)
    model = dualenc.DualEncoder.from_vision_text_pretrained(
        preset.vision,
        "scratch",
        projection_dim=preset.projection_dim,
        pretrained=False,
        vision_args=preset.vision_args,
        vision_image_size=preset.image_size,
        text_width=preset.text_width,
        text_depth=preset.text_depth,
        text_heads=preset.text_heads,
        text_vocab_size=preset.vocab,
        text_max_positions=512,
        text_pooling=text_pooling,
    )
    tokenizer = dualenc.train_tokenizer(WORDS, 200, 512)
    model.processor = dualenc.Processor(model.vision_model.image_transform(crop_pct=1.0), tokenizer)
    return model.train()


def transformers_model(preset, **text_overrides):
    """VisionTextDualEncoderModel of ViT and BERT in training mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    vision = transformers.ViTConfig(
        image_size=preset.image_size,
        patch_size=preset.patch,
        hidden_size=preset.vision_width,
        num_hidden_layers=preset.vision_depth,
        num_attention_heads=preset.vision_heads,
        intermediate_size=4 * preset.vision_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    text = {
        "vocab_size": preset.vocab,
        "hidden_size": preset.text_width,
        "num_hidden_layers": preset.text_depth,
        "num_attention_heads": preset.text_heads,
        "intermediate_size": 4 * preset.text_width,
        "max_position_embeddings": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    text = transformers.BertConfig(**{**text, **text_overrides})
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=preset.projection_dim
    )
    return transformers.VisionTextDualEncoderModel(config).train()


def open_clip_model(preset, tokens=None):
    """CustomTextCLIP of timm's ViT and open_clip's own text transformer (pre-norm, causal) in training mode."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    text = CLIPTextCfg(
        context_length=tokens or preset.tokens,
        vocab_size=preset.vocab,
        width=preset.text_width,
        heads=preset.text_heads,
        layers=preset.text_depth,
    )
    vision = CLIPVisionCfg(timm_model_name=preset.vision, timm_pool="", image_size=preset.image_size)
    model = CustomTextCLIP(preset.projection_dim, vision, text, output_dict=True)
    model.visual.trunk = timm_vit(preset)  # its configuration has no field for patch size and depth of a timm model
    return model.train()


def timm_vit(preset):
    """The vision tower alone."""
    return timm.create_model(preset.vision, num_classes=0, img_size=preset.image_size, **preset.vision_args)


def batch_of(preset, processor, seed=0, tokens=None):
    """(uint8 pictures (B, 3, S, S), B captions of T/4 to T tokens, their token inputs (B, T))."""
    longest = tokens or preset.tokens
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    shape = (preset.batch, 3, preset.image_size, preset.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    lengths = [longest, *(rng.randint(max(3, longest // 4), longest) for _ in range(preset.batch - 1))]
    captions = [" ".join(rng.choices(WORDS, k=length - 2)) for length in lengths]  # [CLS] and [SEP] are two
    inputs = processor(text=captions)
    assert inputs["input_ids"].shape == (preset.batch, longest), inputs["input_ids"].shape
    return images, captions, dict(inputs)


# ---- Time -----------------------------------------------------------------------------------------------------------


def seconds_of(way):
    """Seconds of one call, garbage collected beforehand."""
    gc.collect()
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def alternate(ways, rounds, warmup=1):
    """Every way once a round, in an order that turns each round, so that drift of the machine meets all alike.

    ways     {name: function without arguments}
    warmup   rounds that are not counted
    returns  {name: seconds of each round}
    """
    names, seconds = list(ways), {name: [] for name in ways}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            took = seconds_of(ways[name])
            if number >= 0:
                seconds[name].append(took)
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __format__(self, spec):
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def spread(values):
    """The Spread of some values; of a single one, that value three times."""
    values = list(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(statistics.median(values), low, high)


def times_faster(slower, faster):
    """The Spread of how many times as long the first took as the second, round by round."""
    return spread(a / b for a, b in zip(slower, faster, strict=True))


def fastest(*several):
    """Round by round, the seconds of whichever was fastest."""
    return [min(values) for values in zip(*several, strict=True)]


def matmul_rate(dtype, side=2048, repeats=7):
    """FLOP/s of a square product, the best of some: the ceiling that shares are given of."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b) for _ in range(repeats))


def count_flops(way):
    """Floating-point operations of the products in one call; attention is counted in its unfused form."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


# ---- Memory ---------------------------------------------------------------------------------------------------------


def resident(name):
    """Bytes of "VmRSS" (resident now) or "VmHWM" (the most since reset_peak); Linux."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak():
    """Give freed memory back and let VmHWM start again from what is resident now; returns that, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_of(way):
    """Bytes by which one call goes beyond what was resident before it."""
    before = reset_peak()
    way()
    return resident("VmHWM") - before


def in_child(function, *args):
    """function(*args) in a process of its own: no memory freed by others to reuse."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_threads, torch.get_num_threads(), function, *args).result()


def with_threads(threads, function, *args):
    torch.set_num_threads(threads)
    return function(*args)


# ---- Command line and printing --------------------------------------------------------------------------------------


def flag_parser(description, rounds):
    """A parser with the flags that all benches have; --help prints the whole description."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds ({rounds})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (one a core)")
    return parser


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def processor_name():
    """The processor, and what of its instructions matters to bfloat16."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if f" {flag}" in facts]
    model = re.search(r"model name\s*: (.*)", facts)
    return f"{model[1] if model else platform.machine()} ({', '.join(flags) or 'no bf16 instructions'})"


def print_head(args, rates=True):
    """Versions, hardware, threads and the measured product rates; returns {"fp32": FLOP/s, "bf16": FLOP/s}."""
    torch.set_num_threads(args.threads)
    print(f"hardware {processor_name()}, {os.cpu_count()} cores; {args.threads} threads, {args.rounds} rounds")
    print(f"versions python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in PACKAGES))
    if not rates:
        return {}
    rates = {"fp32": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)}
    print(f"products {rates['fp32'] / 1e9:.0f} GFLOP/s fp32, {rates['bf16'] / 1e9:.0f} bf16 (2048^3, best of 7)")
    return rates


def print_table(titles, rows):
    """Columns as wide as their cells; the first one to the left, the others to the right."""
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    print()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("   ".join([line[0].ljust(widths[0]), *cells]).rstrip(), flush=True)


def available(libraries):
    """Those of the libraries that are installed; says which are not."""
    missing = [name for name in libraries if name != "ours" and importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (tests/requirements-parity.txt)")
    return [name for name in libraries if name not in missing]


def training_setup(preset, **flags):
    """(model, optimizer, TrainConfig) of ours, with train.py's own defaults beside flags."""
    model, config = ours(preset), train.TrainConfig(batch_size=preset.batch, **flags)
    return model, train.make_optimizer(model, config), config
