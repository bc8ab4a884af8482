"""Shared: towers of one size in three libraries (peers are optional), rounds, memory, printing."""

import argparse
import ctypes
import gc
import importlib.util
import multiprocessing
import random
import re
import statistics
import string
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import timm
import torch

import dualenc

WORDS = [a + b for a, b in zip(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")]

# Towers are (width, layers, heads), with MLPs of four times the width.
Preset = namedtuple("Preset", "timm_name timm_args image_size patch vision text tokens batch")
TINY = "vit_tiny_patch16_224"
PRESETS = {
    "smoke": Preset(TINY, {"patch_size": 8, "depth": 1}, 32, 8, (192, 1, 3), (64, 1, 2), 8, 4),
    "tiny": Preset(TINY, {"patch_size": 4, "depth": 6}, 32, 4, (192, 6, 3), (192, 4, 3), 32, 128),
    "small": Preset("vit_small_patch16_224", {}, 224, 16, (384, 12, 6), (384, 6, 6), 32, 16),
}
VOCABULARY, PROJECTION = 4096, 256
TOKENIZER = dualenc.train_tokenizer(WORDS, 400, 512)  # a token for each word


def our_model(preset):
    """A DualEncoder in training mode, with a processor."""
    torch.manual_seed(0)
    sizes = dict(zip(("text_width", "text_depth", "text_heads"), preset.text))
    sizes |= {"vision_args": preset.timm_args, "vision_image_size": preset.image_size}
    sizes |= {"text_vocab_size": VOCABULARY, "text_max_positions": 512, "text_pooling": "mean"}
    build = dualenc.DualEncoder.from_vision_text_pretrained
    model = build(preset.timm_name, "scratch", PROJECTION, pretrained=False, **sizes)
    model.processor = dualenc.Processor(model.vision_model.image_transform(1.0), TOKENIZER)
    return model.train()


def transformers_model(preset):
    """VisionTextDualEncoderModel in training mode, without dropout."""
    import transformers

    def sizes(width, depth, heads):
        names = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        names |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {**names, "intermediate_size": 4 * width}

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    images = {"image_size": preset.image_size, "patch_size": preset.patch}
    vision = transformers.ViTConfig(**images, **sizes(*preset.vision))
    text = transformers.BertConfig(vocab_size=VOCABULARY, **sizes(*preset.text))
    config = transformers.VisionTextDualEncoderConfig
    config = config.from_vision_text_configs(vision, text, projection_dim=PROJECTION)
    return transformers.VisionTextDualEncoderModel(config).train()


def open_clip_model(preset):
    """CustomTextCLIP of timm's ViT and open_clip's own text tower (pre-norm, causal), training."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    width, layers, heads = preset.text
    text = CLIPTextCfg(preset.tokens, VOCABULARY, width=width, heads=heads, layers=layers)
    name, size = preset.timm_name, preset.image_size
    vision = CLIPVisionCfg(timm_model_name=name, timm_pool="", image_size=size)
    model = CustomTextCLIP(PROJECTION, vision, text, output_dict=True)
    # The trunk again, as the configuration has no field for patch size and depth.
    model.visual.trunk = timm.create_model(name, num_classes=0, img_size=size, **preset.timm_args)
    return model.train()


def batch_of(preset):
    """uint8 images (B, 3, S, S), B captions of T/4 to T tokens, and their token inputs (B, T)."""
    rng, T = random.Random(0), preset.tokens
    images = torch.randint(256, (preset.batch, 3, *[preset.image_size] * 2), dtype=torch.uint8)
    lengths = [T, *(rng.randint(max(3, T // 4), T) for _ in range(preset.batch - 1))]
    captions = [" ".join(rng.choices(WORDS, k=length - 2)) for length in lengths]  # [CLS], [SEP]
    return images, captions, dict(dualenc.Processor(None, TOKENIZER)(text=captions))


def alternate(ways, rounds, warmup=1):
    """{name: seconds of each round} of ways {name: function}, called in an order that turns."""
    names, seconds = list(ways), {name: [] for name in ways}
    for i in range(-warmup, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            began = time.perf_counter()
            ways[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def print_times(title, seconds, more=(), further=None):
    """A row a way: median seconds, its time over the first way's, and {name: further cells}."""
    first, rows = next(iter(seconds)), []
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds[first], strict=True)]
        ratios *= 1 + (len(ratios) == 1)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        cells = [f"{statistics.median(took):.3f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
        rows.append([name, *cells, *(further[name] if more else ())])
    titles = [title, "seconds", f"times that of {first}", *more]
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    print()
    for left, *others in [titles, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("   ".join([left.ljust(widths[0]), *cells]), flush=True)


def peak_megabytes(way):
    """How far one call goes beyond the memory that was resident before it; Linux."""

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before


def start_child(threads):
    """As many threads as here, and no heap for blocks of 64 KB or more (glibc's M_MMAP_THRESHOLD).

    So memory is what tensors hold at once. The holes that a heap has between blocks of different
    sizes can multiply it; they depend on glibc and not on what is compared.
    """
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(-3, 2**16)


def in_child(function, *args):
    """function(*args) in a process of its own: no memory freed by others to reuse."""
    context, threads = multiprocessing.get_context("forkserver"), torch.get_num_threads()
    context.set_forkserver_preload(["dualenc", "transformers.modeling_utils", "open_clip"])
    with ProcessPoolExecutor(1, context, start_child, (threads,)) as pool:
        return pool.submit(function, *args).result()


def flag_parser(description, rounds):
    """A parser with the flags of all benches."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the towers")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds ({rounds})")
    return parser


def print_head():
    """Print versions; returns the names of the peers that are installed."""
    peers = [name for name in ("transformers", "open_clip") if importlib.util.find_spec(name)]
    modules = [torch, timm, *map(importlib.import_module, peers)]
    versions = (f"{module.__name__} {module.__version__}" for module in modules)
    print(f"{torch.get_num_threads()} threads;", *versions)
    return peers
