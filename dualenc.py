"""A vision-text dual encoder (CLIP, LiT) in one file of plain PyTorch.

Two towers meet in one space: a picture and its caption should land close together, everything else far apart.

    pixel_values (B, 3, S, S) ── vision_model ── (B, W) ── visual_projection ── L2 norm ── image_embeds (B, E) ──┐
                                                                                                               cosine
    input_ids    (B, T)       ── text_model ──── (B, W) ── text_projection ──── L2 norm ── text_embeds  (B, E) ──┘
                                                                                                                 │
                            loss () ── clip_loss ── logits_per_image (B, B) = exp(logit_scale) * cosine ─────────┘

Symbols    B pairs, or rows of whatever a tower gets; T tokens after padding, P patches (with class tokens), S pixels a
           side, h and w rows and columns of a map of features, W tower width, H heads, E shared embedding size,
           I pictures, N captions, K classes; each tower has its own W, P and H. b and R are the rows of a piece of the
           batch and of one of several processes. (3, S, S) stands for (1, S, S) too, of gray pictures, and for
           (3, height, width) of those that are not square.
Words      "features" come out of a tower or a projection; "embeds" are features of unit norm. "Exercise n" marks what a
           course can leave out of a student's copy (README.md; 6 to 8 are in train.py and eval.py).
           Checkpoints: "published" means in the form in which the transformers library writes them; a "family" is a
           published architecture (rows of TEXT_FAMILIES and VISION_FAMILIES); a "hub id" is owner/name on
           huggingface.co, a "revision" its branch, tag or commit; a "safetensors" file holds named tensors and runs no
           code when read; a "trunk" is a timm model without its classifier, a "task head" what a file has on top of a
           tower; a "pooler" is a dense layer and an activation on the first token.
           Several processes: torchrun starts one for each GPU, numbered by "rank"; torch's DistributedDataParallel
           averages their gradients.
Helpers    as_pair and as_size take (height, width) for S and back (end of section 5); blamed_on names the file at fault
           (6); at_least, below_one, one_of, nearest and build check values (11).

Sections   1 Configurations      2 Losses         3 DualEncoder
           4 Text tower          5 Vision tower   6 Processor: pictures and captions to tensors
           7 Large batches       8 Checkpoints    9 Interchange with transformers
           10 Data               11 Checks of values, command line

Sources    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP)
           Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning"
           Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training" (SigLIP)
           Yang et al. 2022, "Unified Contrastive Learning in Image-Text-Label Space" (UniCL)
           Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers"
           Li et al. 2023, "Scaling Language-Image Pre-training via Masking" (FLIP); others where they are used
"""

from __future__ import annotations

import argparse
import array
import ast
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import tarfile
import threading
import time
import typing
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where lock_file locks nothing
    fcntl = None

import huggingface_hub
import numpy as np
import safetensors
import safetensors.torch
import timm
import tokenizers
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

LOGIT_SCALE_INIT = 2.6592  # ln(1 / 0.07), cut as published configs cut it: cosines start out multiplied by 14.28
LOGIT_SCALE_MAX = math.log(100)  # CLIP, section 2.5: beyond this training is unstable; train.py clamps after each step
MAX_SIDE = 8192  # pixels; a checkpoint that asks for larger pictures is broken or means harm


# ---------------------------------------------------------------------------------------------------------------------
# 2  Losses
# ---------------------------------------------------------------------------------------------------------------------


def clip_loss(image_embeds, text_embeds, logit_scale):
    """Symmetric contrastive loss over every pair in the batch.

    image_embeds  (B, E)  unit-norm rows
    text_embeds   (B, E)  unit-norm rows; row i describes picture i
    logit_scale   ()      natural log of the inverse temperature
    returns       ()      mean loss in nats: about ln(B) before training, towards 0 as pairs separate
    raises        ValueError if the two batches differ in shape
    source        Radford et al. 2021, Figure 3
    Exercise 1    easy, 20 minutes: the loss of both directions, run `pytest -k exercise_1`
    """
    check_same_shape(image_embeds, text_embeds)
    logits_per_image = logit_scale.exp() * image_embeds @ text_embeds.T
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    image_to_text = F.cross_entropy(logits_per_image, labels)
    text_to_image = F.cross_entropy(logits_per_image.T, labels)
    return (image_to_text + text_to_image) / 2


def siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias):
    """Every cell of the B x B matrix is a yes-or-no question of its own: are these two a pair?

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes picture i
    logit_scale, logit_bias    ()      the paper starts from ln(10) and -10
    returns                    ()      binary cross-entropy in nats, summed over the matrix, divided by B
    raises                     ValueError if the two batches differ in shape
    source                     Zhai et al. 2023, Algorithm 1 (equation 1 writes the bias with the other sign)
    """
    check_same_shape(image_embeds, text_embeds)
    logits = logit_scale.exp() * image_embeds @ text_embeds.T + logit_bias
    is_pair = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, is_pair, reduction="sum") / len(logits)


def multi_positive_clip_loss(image_embeds, text_embeds, logit_scale, group_ids):
    """clip_loss where several captions fit a picture: the right answer is shared evenly by the row's whole group.

    clip_loss calls the caption of another dog picture wrong: where a group's rows are alike, its best value is
    ln(group size), not 0. Here the entropy of the shared answer is taken off, so 0 stays the best value. Without
    repeats it is clip_loss.

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes picture i
    logit_scale                ()      natural log of the inverse temperature
    group_ids                  (B,)    integers; rows with equal ids describe each other
    returns                    ()      mean KL divergence from the shared answer, in nats
    raises                     ValueError if the batches differ in shape or group_ids is not (B,)
    source                     Yang et al. 2022, "Unified Contrastive Learning" (UniCL), equations 3 and 4
    """
    check_same_shape(image_embeds, text_embeds)
    check_group_ids(group_ids, image_embeds)
    logits_per_image = logit_scale.exp() * image_embeds @ text_embeds.T
    same_group = (group_ids[:, None] == group_ids[None, :]).to(logits_per_image.dtype)
    target = same_group / same_group.sum(dim=1, keepdim=True)  # symmetric: it serves both directions
    best_value = same_group.sum(dim=1).log().mean()  # the entropy of target: ln(group size)
    image_to_text = F.cross_entropy(logits_per_image, target)
    text_to_image = F.cross_entropy(logits_per_image.T, target)
    return (image_to_text + text_to_image) / 2 - best_value


def check_same_shape(image_embeds, text_embeds):
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)} must have one shape: "
            f"row i of one describes row i of the other"
        )


def check_group_ids(group_ids, image_embeds):
    if group_ids.shape != image_embeds.shape[:1]:
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}, expected one id a row: ({len(image_embeds)},)")



# ---------------------------------------------------------------------------------------------------------------------
# 1  Configurations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a BERT-like text tower; the default sizes are those of bert-base-uncased, with dropout off.

    raises  ValueError for an unknown family, pooling or activation, for numbers that are too small, for dropout that is
            no share below 1, and for a width that the heads do not divide
    """

    family: str = "bert"  # a row of TEXT_FAMILIES
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None  # 4 * width unless given
    vocab_size: int = 30522
    max_positions: int = 512  # rows of the position table; see TextEncoder.max_tokens
    pad_token_id: int = 0
    type_vocab_size: int = 2
    embedding_width: int | None = None  # ELECTRA, ALBERT: narrower embeddings than the encoder; width unless given
    layer_groups: int | None = None  # ALBERT: layers with weights of their own, each used in a row; depth unless given
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"  # a row of ACTIVATIONS
    pooling: str = "cls"  # "cls": first token; "mean": over real tokens; "pooler": first token, then dense + tanh
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        for name, unless_given in (("mlp_width", 4 * self.width), ("embedding_width", self.width)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, unless_given)  # the class is frozen for everybody else
        for name in ("width", "depth", "heads", "mlp_width", "vocab_size", "max_positions", "embedding_width"):
            at_least(f"text {name}", getattr(self, name), 1)
        for name in ("pad_token_id", "type_vocab_size", "layer_norm_eps"):
            at_least(f"text {name}", getattr(self, name), 0)
        for name in ("dropout", "attention_dropout"):
            below_one(f"text {name}", getattr(self, name))
        if self.layer_groups is not None:
            at_least("text layer_groups", self.layer_groups, 1)
        one_of("text family", self.family, TEXT_FAMILIES)
        one_of("text pooling", self.pooling, ("cls", "mean", "pooler"))
        one_of("activation", self.activation, ACTIVATIONS)
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of {self.heads} heads")


@dataclass(frozen=True)
class VisionConfig:
    """A timm model and how to build it, or a family of published checkpoints and its sizes.

    raises  ValueError for channels other than 3 (RGB) and 1 (gray), sides beyond MAX_SIDE, patch dropout that is no
            share below 1, or a checkpoint_path in args
    """

    name: str = "vit_base_patch16_224"  # a timm model, with or without a tag; or a row of VISION_FAMILIES
    args: dict = field(default_factory=dict)  # of a timm model: arguments of timm.create_model; of a family: its config
    image_size: int | tuple[int, int] | None = None  # pixels a side, or (height, width); the model's own unless given
    channels: int = 3
    # timm's global_pool ("avg", "token", "map", ...), the model's own unless given. Published ViT and DeiT: "token" or,
    # where the file has its weights, "pooler" (dense + activation). The other published families have no choice: None.
    pooling: str | None = None
    patch_dropout: float = 0.0  # share of the patches left out of each training picture (FLIP; ViTs only)

    def __post_init__(self):
        one_of("number of channels", self.channels, (1, 3))
        below_one("vision patch_dropout", self.patch_dropout)
        if self.image_size is not None:
            height, width = as_pair(self.image_size)
            if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
                raise ValueError(f"vision image_size is {self.image_size}, expected 1 to {MAX_SIDE} pixels")
            object.__setattr__(self, "image_size", as_size(height, width))
        if "checkpoint_path" in self.args:
            raise ValueError(
                "vision args hold checkpoint_path: they describe a tower, and must not name a file to read"
            )


@dataclass(frozen=True)
class DualEncoderConfig:
    """Everything needed to rebuild a DualEncoder without its weights; raises ValueError for a width below 1."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection_dim: int = 512
    logit_scale_init: float = LOGIT_SCALE_INIT
    logit_bias_init: float | None = None  # given: the model has a logit_bias, which siglip_loss needs

    def __post_init__(self):
        at_least("projection_dim", self.projection_dim, 1)

    def to_dict(self):
        """The configuration as plain dictionaries, ready for json."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values):
        """The inverse of to_dict; raises ValueError for unknown fields, wrong types, and what configurations refuse."""
        values = {key: value for key, value in values.items() if key != "model_type"}
        vision, text = build(VisionConfig, values.pop("vision", {})), build(TextConfig, values.pop("text", {}))
        return build(cls, {"vision": vision, "text": text, **values})

# ---------------------------------------------------------------------------------------------------------------------
# 3  DualEncoder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TowerOutput:
    """What a tower returns. Shapes are those of text towers (P stands for T) and ViTs; a model of another kind gives
    what its stages and attention layers make, such as the (B, W, h, w) of a convnet.

    last_hidden_state  (B, P, W)              every position after the last layer; None from pooled_only
    pooler_output      (B, W)                 one vector a row
    hidden_states      depth + 1 x (B, P, W)  on request: the embeddings, then the output of each layer
    attentions         depth x (B, H, P, P)   on request: the weights used; rows sum to 1 in evaluation mode, and in
                                              training mode before their dropout
    """

    last_hidden_state: Tensor | None
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DualEncoderOutput:
    """What DualEncoder returns; fields of a side that was not given stay None."""

    loss: Tensor | None = None  # ()
    logits_per_image: Tensor | None = None  # (I, N), exp(logit_scale) * cosine
    logits_per_text: Tensor | None = None  # (N, I)
    text_embeds: Tensor | None = None  # (N, E)
    image_embeds: Tensor | None = None  # (I, E)
    text_model_output: TowerOutput | None = None
    vision_model_output: TowerOutput | None = None


class DualEncoder(nn.Module):
    """Two towers, two linear projections into one space, one temperature.

    config                    DualEncoderConfig
    vision_model, text_model  ready towers of these configurations; new ones with random weights unless given
    source                    Radford et al. 2021, Figure 3
    """

    def __init__(self, config, vision_model=None, text_model=None):
        super().__init__()
        self.config = config
        self.vision_model = vision_model or VisionEncoder(config.vision)
        self.text_model = text_model or TextEncoder(config.text)
        self.visual_projection = nn.Linear(self.vision_model.width, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_model.width, config.projection_dim, bias=False)
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # as in CLIP's code
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))
        if config.logit_bias_init is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init)))
        self.processor = None  # a Processor, saved and loaded with the weights when there is one
        self.locked = set()

    def get_image_features(self, pixel_values):
        """(I, 3, S, S) pixels from the processor to (I, E) projected features, not normalised."""
        return self.visual_projection(self._run_tower("vision", pixel_values, pooled_only=True).pooler_output)

    def get_text_features(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        """(N, T) token ids to (N, E) projected features, not normalised; attention_mask is 1 on real tokens."""
        output = self._run_tower("text", input_ids, attention_mask, token_type_ids, position_ids, pooled_only=True)
        return self.text_projection(output.pooler_output)

    def encode_image(self, pixel_values):
        """get_image_features with unit norm: (I, E)."""
        return self._normalize(self.get_image_features(pixel_values))

    def project_image(self, pooler_output):
        """What encode_image does after the vision tower: (I, W) pooled features to (I, E), unit norm."""
        return self._normalize(self.visual_projection(pooler_output))

    def encode_text(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        """get_text_features with unit norm: (N, E)."""
        return self._normalize(self.get_text_features(input_ids, attention_mask, token_type_ids, position_ids))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        return_loss=False,
        output_hidden_states=False,
        output_attentions=False,
    ):
        """Both sides at once, or one of them.

        input_ids       (N, T)        token ids; attention_mask, token_type_ids and position_ids have the same shape
        pixel_values    (I, 3, S, S)  normalised pixels, as the processor makes them
        return_loss     adds clip_loss; picture i and caption i must be a pair
        returns         DualEncoderOutput
        raises          ValueError if there is nothing to encode, or return_loss is asked for without matching pairs
        Exercise 2      medium, 40 minutes: towers, projections, unit norm and temperature, run `pytest -k exercise_2`
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("nothing to encode: give input_ids, pixel_values or both")
        extras = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        output = DualEncoderOutput()
        if pixel_values is not None:
            output.vision_model_output = self._run_tower("vision", pixel_values, **extras)
            output.image_embeds = self.project_image(output.vision_model_output.pooler_output)
        if input_ids is not None:
            inputs = (input_ids, attention_mask, token_type_ids, position_ids)
            output.text_model_output = self._run_tower("text", *inputs, **extras)
            output.text_embeds = self._normalize(self.text_projection(output.text_model_output.pooler_output))
        if input_ids is not None and pixel_values is not None:
            output.logits_per_image = self.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
            output.logits_per_text = output.logits_per_image.T
        if return_loss:
            if output.logits_per_image is None:
                raise ValueError("return_loss needs both input_ids and pixel_values")
            # clip_loss computes its own logits, for training calls it without this method.
            output.loss = clip_loss(output.image_embeds, output.text_embeds, self.logit_scale)
        return output

    def lock(self, tower):
        """Freeze a tower for good: no gradients, evaluation mode even through .train(); its projection still learns.

        This is no part of a checkpoint: a model that is loaded again is not locked.

        tower    "vision" (LiT: the text tower learns to read a finished vision tower) or "text"
        returns  the model
        raises   ValueError for another tower
        source   Zhai et al. 2022, section 3
        Exercise 12  medium, 30 minutes: lock a tower for good, run `pytest -k exercise_12`
        """
        one_of("tower to lock", tower, ("vision", "text"))
        self.locked.add(tower)
        self._tower(tower).requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        """Training mode, except that a locked tower stays in evaluation mode: batch-norm statistics are weights too.

        Exercise 12  with lock
        """
        super().train(mode)
        for tower in self.locked:
            self._tower(tower).eval()
        return self

    def _tower(self, name):
        return self.vision_model if name == "vision" else self.text_model

    def _run_tower(self, name, *inputs, **extras):
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.locked):
            return self._tower(name)(*inputs, **extras)

    def _normalize(self, features):
        """Features to unit norm, in the precision of the weights.

        Exercise 2  with forward
        """
        # Back to the weights' own precision first: under bf16 autocast a cosine would keep two to three digits only.
        return F.normalize(features.to(self.logit_scale.dtype), dim=-1)

    @classmethod
    def from_vision_text_pretrained(cls, vision, text, projection_dim=512, pretrained=True, **overrides):
        """A dual encoder from two towers; both projections are new and must be trained.

        vision      a timm model name, e.g. "vit_base_patch16_224.augreg_in21k" or "hf-hub:timm/..."; or a transformers
                    folder or hub id: ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2
        text        a transformers folder or hub id: BERT, RoBERTa, XLM-R, CamemBERT, ALBERT, MPNet, DistilBERT or
                    ELECTRA; or "scratch": a new tower of sizes text_width, text_depth, text_heads, text_vocab_size
        pretrained  False starts a timm tower from random weights; a folder's weights are loaded all the same
        overrides   fields of DualEncoderConfig, or of the towers' configurations with vision_ or text_ before the name:
                    vision_image_size=64, vision_args={"patch_size": 4}, text_pooling="mean", logit_scale_init=2.3
        returns     a DualEncoder in training mode, with a processor if the text folder holds a tokenizer
        raises      ValueError for names or fields that do not exist; the message lists those that do
        """
        return build_from_towers(cls, vision, text, projection_dim, pretrained, overrides)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id):
        """Load what save_pretrained wrote, or a VisionTextDualEncoder of transformers, in evaluation mode.

        A hub id, which may end in @ and a revision, is read from huggingface_hub's cache where that is current or the
        hub out of reach, else downloaded.

        raises  ValueError, naming the file, for what is missing, damaged, of another model, or does not fit, with the
                first five weights of each kind
        """
        return load_dual_encoder(cls, folder_or_hub_id)

    def save_pretrained(self, folder, format="dualenc"):
        """Write config.json and model.safetensors, and the processor's files if the model has a processor.

        Each file is written under a temporary name and then renamed, so a crash never leaves half of a file.

        format  "dualenc", or "hf": what VisionTextDualEncoderModel.from_pretrained of transformers loads
        raises  ValueError for a processor without image_transform or tokenizer, and if transformers cannot compute what
                this model computes
        """
        save_dual_encoder(self, folder, format)



# ---------------------------------------------------------------------------------------------------------------------
# 4  Text tower
# ---------------------------------------------------------------------------------------------------------------------

# Where the families differ from BERT, beyond what TextConfig says.
#   positions after pad  positions count from pad_token_id + 1, padding has pad_token_id: 512 tokens need 514 rows
#   relative bias        every layer adds the same learned bias to its scores, by the distance of query and key
#   always projected     embeddings go through a linear map even where they are as wide as the encoder
TEXT_FAMILIES = {
    "bert": set(),
    "roberta": {"positions after pad"},
    "xlm-roberta": {"positions after pad"},
    "camembert": {"positions after pad"},
    "mpnet": {"positions after pad", "relative bias"},
    "albert": {"always projected"},
    "distilbert": set(),
    "electra": set(),
}


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


# By their published names, several of which mean the same.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


RELATIVE_BUCKETS = 32  # rows of MPNet's bias table


def masked_attention(query, key, value, mask=None, dropout=0.0, return_weights=False):
    """Softmax attention that gives padding no weight.

    query              (B, H, Q, W/H), from all T tokens or fewer
    key, value         (B, H, T, W/H)
    mask               (B, 1, 1, T) bool: True where a key may be attended to; None: everywhere
                       or (B or 1, H, Q, T) float: added to the scores, hugely negative where a key is padding
    dropout            share of the weights dropped
    returns            (B, H, Q, W/H), and the weights after dropout (B, H, Q, T) or None; of a caption without real
                       tokens, anything
    source             Vaswani et al. 2017, equation 1
    Exercise 3         medium, 40 minutes: attention that never looks at padding, run `pytest -k exercise_3`
    """
    # torch's fused kernel computes the lines below in one call. It never stores the weights, so cannot return them.
    if not (return_weights or fused_kernel_is_slow(query)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ value, weights if return_weights else None


def fused_kernel_is_slow(tensor):
    """Whether separate products are faster than fused attention: two to five times on a CPU in bf16 with gradients."""
    in_bf16 = tensor.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return tensor.device.type == "cpu" and in_bf16 and torch.is_grad_enabled()


def masked_mean(hidden, attention_mask=None):
    """The mean over real tokens: hidden (B, T, W), attention_mask (B, T) with 1 on real tokens, returns (B, W).

    attention_mask may be of whole numbers, bools or floats; the mean has hidden's type. Every row needs a real token.

    Exercise 4  easy, 10 minutes: the mean over real tokens only, run `pytest -k exercise_4`
    """
    if attention_mask is None:
        return hidden.mean(dim=1)
    weight = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def positions_after_pad(input_ids, pad_token_id):
    """RoBERTa's positions: real tokens count up from pad_token_id + 1, padding stays at pad_token_id; (B, T) to (B, T).

    They follow from the ids, not from the attention mask, as in transformers.

    Exercise 5  easy, 15 minutes: positions that count real tokens, run `pytest -k exercise_5`
    """
    is_real = (input_ids != pad_token_id).long()
    return is_real.cumsum(dim=1) * is_real + pad_token_id


def relative_buckets(T, buckets=RELATIVE_BUCKETS, max_distance=128):
    """Which bias MPNet adds for each query and key: half of the buckets for keys to the left, half to the right.

    Distances below a quarter of the buckets have a bucket each; beyond, the bucket grows with the logarithm of the
    distance, up to max_distance.

    returns  (T, T)  bucket numbers; row: query, column: key; distance 0 counts as left
    source   Raffel et al. 2020 (T5), section 2.1
    """
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    exact = buckets // 4
    far = (distance.abs().clamp(min=1) / exact).log() / math.log(max_distance / exact) * (buckets // 2 - exact)
    far = (exact + far.long()).clamp(max=buckets // 2 - 1)
    return torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * (buckets // 2)


class TextLayer(nn.Module):
    """One post-LN transformer layer: LN(x + attention(x)), then LN(x + mlp(x)).

    The module names are BERT's published ones, so that loading its weights is a copy.
    """

    def __init__(self, config):
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps)})
        self.attention = nn.ModuleDict({"self": projections, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.mlp_width)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(config.mlp_width, width), "LayerNorm": nn.LayerNorm(width, eps)}
        )
        self.config = config

    def forward(self, hidden, mask, return_weights, first_only=False):
        """hidden (B, T, W), mask as in masked_attention; returns (B, T, W) and the weights (B, H, T, T) or None.

        first_only  computes the first token alone, (B, 1, W): all that is read of the last layer where pooling takes
                    the first token. It still attends to all others.
        """
        config = self.config
        asking = hidden[:, :1] if first_only else hidden
        if mask is not None:
            mask = mask[:, :, : asking.shape[1]]  # the rows of those who ask; a mask of one row stays as it is
        query, key, value = (
            self.attention["self"][name](tokens).unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for name, tokens in (("query", asking), ("key", hidden), ("value", hidden))
        )
        attention_dropout = config.attention_dropout if self.training else 0.0
        mixed, weights = masked_attention(query, key, value, mask, attention_dropout, return_weights)
        mixed = mixed.transpose(1, 2).flatten(2)
        hidden = self._add_and_norm(self.attention["output"], mixed, asking)
        inner = ACTIVATIONS[config.activation](self.intermediate["dense"](hidden))
        return self._add_and_norm(self.output, inner, hidden), weights

    def _add_and_norm(self, block, update, hidden):
        return block["LayerNorm"](hidden + F.dropout(block["dense"](update), self.config.dropout, self.training))


class TextEncoder(nn.Module):
    """The post-LN encoder that BERT, RoBERTa, ALBERT, MPNet, DistilBERT and ELECTRA share.

    config  TextConfig
    source  Devlin et al. 2019, section 3
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.width = config.width
        self.traits = TEXT_FAMILIES[config.family]
        tables = {
            "word_embeddings": nn.Embedding(config.vocab_size, config.embedding_width),
            "position_embeddings": nn.Embedding(config.max_positions, config.embedding_width),
            "LayerNorm": nn.LayerNorm(config.embedding_width, config.layer_norm_eps),
        }
        if config.type_vocab_size:
            tables["token_type_embeddings"] = nn.Embedding(config.type_vocab_size, config.embedding_width)
        self.embeddings = nn.ModuleDict(tables)
        if config.embedding_width != config.width or "always projected" in self.traits:
            self.embeddings_project = nn.Linear(config.embedding_width, config.width)
        groups = config.layer_groups or config.depth
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(config) for _ in range(groups))})
        if "relative bias" in self.traits:
            self.encoder["relative_attention_bias"] = nn.Embedding(RELATIVE_BUCKETS, config.heads)
        if config.pooling == "pooler":
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})
        self.apply(self._init_weights)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, **overrides):
        """The text tower of a transformers checkpoint, with or without a task head, in evaluation mode.

        overrides  fields of TextConfig; pooling is "pooler" if the checkpoint has its weights, else "cls", unless given
        raises     ValueError for another model, and for missing, unexpected or misshapen weights
        """
        return load_text_encoder(cls, find_folder(folder_or_hub_id), overrides).eval()

    def _init_weights(self, module):
        """As transformers starts BERT: normal weights of standard deviation 0.02, zero biases."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def max_tokens(self):
        """The longest caption this tower can read, in tokens."""
        after_pad = "positions after pad" in self.traits
        return self.config.max_positions - (self.config.pad_token_id + 1 if after_pad else 0)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=False,
        output_attentions=False,
        pooled_only=False,
    ):
        """input_ids (B, T); attention_mask (B, T) is 1 on real tokens; token types default to 0, positions to 0, 1, 2.

        pooled_only  leaves out of the last layer what pooling does not read: the same pooler_output for less work, but
                     no last_hidden_state, and of the last layer's hidden states and attentions only the first token's
                     (of a ViT, none)
        returns      TowerOutput; last_hidden_state (B, T, W), pooler_output (B, W)
        raises       ValueError for captions longer than max_tokens
        """
        T = input_ids.shape[1]
        if self.max_tokens < T:
            raise ValueError(
                f"captions of {T} tokens, but this text tower has {self.max_tokens} positions; "
                f"tokenize with max_length={self.max_tokens}"
            )
        hidden = self._embed(input_ids, token_type_ids, position_ids)
        mask = self._attention_mask(T, attention_mask, hidden)
        hidden_states, attentions = [hidden], []
        for i in range(self.config.depth):
            layer = self.encoder["layer"][i * len(self.encoder["layer"]) // self.config.depth]  # ALBERT has fewer
            first_only = pooled_only and self.config.pooling != "mean" and i == self.config.depth - 1
            hidden, weights = layer(hidden, mask, output_attentions, first_only)
            hidden_states.append(hidden)
            attentions.append(weights)
        return TowerOutput(
            last_hidden_state=None if pooled_only else hidden,
            pooler_output=self._pool(hidden, attention_mask),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, input_ids, token_type_ids, position_ids):
        if position_ids is None and "positions after pad" in self.traits:
            position_ids = positions_after_pad(input_ids, self.config.pad_token_id)
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]
        hidden = self.embeddings["word_embeddings"](input_ids) + self.embeddings["position_embeddings"](position_ids)
        if self.config.type_vocab_size:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            hidden = hidden + self.embeddings["token_type_embeddings"](token_type_ids)
        hidden = F.dropout(self.embeddings["LayerNorm"](hidden), self.config.dropout, self.training)
        return self.embeddings_project(hidden) if hasattr(self, "embeddings_project") else hidden

    def _attention_mask(self, T, attention_mask, hidden):
        """What masked_attention takes: (B, 1, 1, T) or None, or (B or 1, H, T, T) for a relative bias."""
        is_real = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        if "relative bias" not in self.traits:
            return is_real
        bias = self.encoder["relative_attention_bias"](relative_buckets(T).to(hidden.device)).permute(2, 0, 1)[None]
        return bias if is_real is None else bias.masked_fill(~is_real, torch.finfo(bias.dtype).min)

    def _pool(self, hidden, attention_mask):
        if self.config.pooling == "mean":
            return masked_mean(hidden, attention_mask)
        if self.config.pooling == "pooler":
            return torch.tanh(self.pooler["dense"](hidden[:, 0]))
        return hidden[:, 0]



# ---------------------------------------------------------------------------------------------------------------------
# 5  Vision tower
# ---------------------------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """Any timm model without its classifier, or a family of published checkpoints rebuilt from timm's parts.

    config           VisionConfig
    pretrained_from  the timm name whose weights to load; position tables are resampled to config.image_size
    raises           ValueError for a name timm does not know (with near ones) or arguments the model does not take
    """

    def __init__(self, config, pretrained_from=None):
        super().__init__()
        self.config = config
        # Channels last is the layout that convolutions are fast in; it changes no result.
        self.trunk = create_trunk(config, pretrained_from).to(memory_format=torch.channels_last)
        self.width = self.trunk.head_hidden_size  # what timm would hand to a classifier
        # timm's pretrained_cfg describes the pictures that the model was made for.
        self.image_size = config.image_size or as_size(*self.trunk.pretrained_cfg["input_size"][-2:])
        self.own_transform = None  # the ImageTransform of the published checkpoint that the weights came from
        if config.pooling == "pooler":
            self.pooler = nn.ModuleDict({"dense": nn.Linear(self.width, self.width)})
        if config.args.get("use_mask_token"):
            # Nothing here uses or trains it. It is kept for those who go on with masked pictures, in its file's shape.
            shape = (1, self.width) if config.name.startswith("dinov2") else (1, 1, self.width)
            self.register_buffer("mask_token", torch.zeros(shape))

    def image_transform(self, crop_pct=None):
        """The ImageTransform this model was trained with: its mean, std, size, crop and interpolation.

        crop_pct  the share of the picture's shorter side that the crop keeps; the model's own unless given; families
                  of published checkpoints keep theirs
        """
        if self.own_transform is not None:
            return self.own_transform
        if self.config.name in VISION_FAMILIES:
            return published_transform(self.config.name, self.image_size, self.config.channels)
        data = timm.data.resolve_model_data_config(self.trunk)
        crop = as_pair(self.image_size)
        height, width = (math.floor(side / (crop_pct or data["crop_pct"])) for side in crop)
        return ImageTransform(
            # A tower that is not square gets whole pictures, whatever their proportions.
            resize=(height, width) if data["crop_mode"] == "squash" or height != width else height,
            crop=crop,
            interpolation=data["interpolation"].replace("random", "bilinear"),  # timm draws one anew while training
            mean=channel_values(data["mean"], self.config.channels),
            std=channel_values(data["std"], self.config.channels),
        )

    def forward(self, pixel_values, output_hidden_states=False, output_attentions=False, pooled_only=False):
        """pixel_values (B, 3, S, S) to TowerOutput; pooler_output (B, W) as the model pools, without a classifier.

        pooled_only  as in TextEncoder
        raises       ValueError for another channel count, for another size where the model is built for one, and for
                     attentions of a model that has none
        """
        self._check_pixels(pixel_values)
        hidden_states, attentions = [], []
        hooks = []
        if output_hidden_states:
            hooks += self._record_hidden_states(hidden_states)
        if output_attentions:
            hooks += self._record_attentions(attentions)
        for module in self.trunk.modules():
            if hasattr(module, "fused_attn"):
                # A fused kernel never calls attn_drop, where _record_attentions listens.
                wanted = timm.layers.use_fused_attn()
                module.fused_attn = wanted and not (output_attentions or fused_kernel_is_slow(pixel_values))
        try:
            features = self._run_trunk(pixel_values.contiguous(memory_format=torch.channels_last), pooled_only)
        finally:
            for hook in hooks:
                hook.remove()
        return TowerOutput(
            last_hidden_state=None if pooled_only else features,
            pooler_output=self._pool(features),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _run_trunk(self, pixel_values, pooled_only):
        """timm's forward_features; for pooled_only, a ViT that pools its first token gives that alone, (B, 1, W)."""
        trunk = self.trunk
        if not (pooled_only and reads_first_token(trunk)):
            return trunk.forward_features(pixel_values)
        x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixel_values))))
        earlier = trunk.blocks[:-1]
        x = timm.models.checkpoint_seq(earlier, x) if trunk.grad_checkpointing else earlier(x)
        return trunk.norm(first_token_block(trunk.blocks[-1], x))

    def _pool(self, features):
        if self.config.pooling == "pooler":
            return ACTIVATIONS[self.config.args["pooler_act"]](self.pooler["dense"](features[:, 0]))
        if self.config.name == "deit":  # timm would average the class token and the distillation token
            return features[:, 0]
        return self.trunk.forward_head(features)

    def _check_pixels(self, pixel_values):
        expected = (self.config.channels, *as_pair(self.image_size))
        # Convnets run at any size; most ViTs only at that of their position table.
        checked = len(expected) if needs_image_size(self.config) else 1
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1 : 1 + checked]) != expected[:checked]:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(B, {', '.join(map(str, (*expected[:checked], *'hw'[checked - 1 :])))}); "
                f"the processor saved with the model makes such pixels"
            )
        if self.config.name in VISION_FAMILIES:
            size, patch_size = tuple(pixel_values.shape[2:]), as_pair(self.config.args["patch_size"])
            if any(side % of_patch for side, of_patch in zip(size, patch_size)):
                raise ValueError(f"pictures of {size} pixels are not whole patches of {patch_size}")

    def _record_hidden_states(self, into):
        """Hooks that append the input of the first block and the output of every block, or of every stage."""
        blocks = getattr(self.trunk, "blocks", None) or getattr(self.trunk, "stages", None)
        if blocks is None:
            # ResNets have layer1 to layer4, Swin layers, NesT levels.
            blocks = [
                module for name, module in self.trunk.named_children() if re.fullmatch(r"layers?\d*|levels", name)
            ]
            blocks = list(blocks[0]) if len(blocks) == 1 else blocks
        if not blocks:
            raise ValueError(f"no blocks found in {self.config.name}: its hidden states cannot be recorded")
        first = blocks[0].register_forward_pre_hook(lambda module, inputs: into.append(inputs[0]))
        return [first] + [b.register_forward_hook(lambda module, inputs, output: into.append(output)) for b in blocks]

    def _record_attentions(self, into):
        """Hooks that append each attention layer's weights, which timm sends through a module called attn_drop."""
        layers = [module for name, module in self.trunk.named_modules() if name.endswith("attn_drop")]
        if not layers:
            raise ValueError(f"{self.config.name} has no attention layers: output_attentions needs a transformer")
        return [layer.register_forward_hook(lambda module, inputs, output: into.append(output)) for layer in layers]


def create_trunk(config, pretrained_from=None):
    """The timm model that a VisionConfig describes, with its classifier left out."""
    if config.name in VISION_FAMILIES:
        return create_published_trunk(config)
    base = config.name.split(".")[0]
    if not timm.is_model(base):
        raise ValueError(f"unknown timm model {config.name!r}; {nearest(base, timm.list_models())}")
    # timm takes its own default for an argument that is None.
    arguments = dict(config.args, num_classes=0, in_chans=config.channels, global_pool=config.pooling)
    if config.patch_dropout:
        arguments["patch_drop_rate"] = config.patch_dropout
    try:
        if config.image_size and needs_image_size(config):
            arguments["img_size"] = config.image_size
        return timm.create_model(pretrained_from or config.name, pretrained=pretrained_from is not None, **arguments)
    except (TypeError, AssertionError) as error:  # Python's "got an unexpected keyword argument", timm's checks
        raise ValueError(f"timm's {config.name} cannot be built with {arguments}: {error}") from error
    except (RuntimeError, OSError) as error:
        weights = f"the weights of {pretrained_from}" if pretrained_from else "random weights"
        raise ValueError(f"timm could not build {config.name} with {weights}: {error}") from error


def reads_first_token(trunk):
    """Whether a timm model is a plain ViT whose pooling reads nothing but the first token.

    Types are compared exactly: first_token_block repeats what these very classes do, and a subclass may do otherwise.
    """
    return (
        isinstance(trunk, timm.models.VisionTransformer)
        and type(trunk).forward_head is timm.models.VisionTransformer.forward_head
        and trunk.global_pool == "token"
        and type(trunk.blocks[-1]) is timm.models.vision_transformer.Block
        and type(trunk.blocks[-1].attn) is timm.layers.Attention
    )


def first_token_block(block, x):
    """timm's Block.forward for the first token alone, which attends to all: (B, P, W) to (B, 1, W)."""
    attn, normed = block.attn, block.norm1(x)
    weights = attn.qkv.weight.chunk(3)
    biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    query, key, value = (
        F.linear(tokens, weight, bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for tokens, weight, bias in zip((normed[:, :1], normed, normed), weights, biases)
    )
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed, _ = masked_attention(attn.q_norm(query), attn.k_norm(key), value, dropout=dropout)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    x = x[:, :1] + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(mixed))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def channel_values(values, channels):
    """One mean or std per channel; gray pictures take the average of the three colours'."""
    return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels


def needs_image_size(config):
    """Whether the model is built for one picture size, as most ViTs are; convnets and DINOv2 run at any."""
    if config.name in VISION_FAMILIES:
        return not VISION_FAMILIES[config.name][1].get("dynamic_img_size")
    return timm.get_pretrained_cfg(config.name).fixed_input_size and not config.args.get("dynamic_img_size")


class DinoTransformer(timm.models.VisionTransformer):
    """A ViT whose position table is resampled to each picture's own grid, without antialiasing: DINOv2's way."""

    antialias = False

    def _pos_embed(self, x):
        """(B, h, w, W) patches to (B, 1 + h * w, W) tokens."""
        positions = timm.layers.resample_abs_pos_embed(
            self.pos_embed, x.shape[1:3], self.patch_embed.grid_size, antialias=self.antialias
        )
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(x + positions)


class RegisterTransformer(DinoTransformer):
    """DINOv2 with registers, whose way is with antialiasing."""

    antialias = True


class Registers(nn.Module):
    """Further tokens between the class token and the patches, without positions; (B, P, W) to (B, P + count, W).

    source  Darcet et al. 2024, "Vision Transformers Need Registers"
    """

    def __init__(self, count, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, count, width))

    def forward(self, x):
        return torch.cat([x[:, :1], self.tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)


class Activation(nn.Module):
    """A row of ACTIVATIONS as a module, which is what timm wants."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name](x)


# Families of published checkpoints: the timm class that computes the same, and the arguments that all of them share.
VISION_FAMILIES = {
    "vit": (timm.models.VisionTransformer, {}),
    "deit": (timm.models.deit.VisionTransformerDistilled, {}),
    "beit": (timm.models.Beit, {}),
    "clip_vision_model": (timm.models.VisionTransformer, {"pre_norm": True, "fc_norm": True}),
    "siglip_vision_model": (timm.models.VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "dinov2": (DinoTransformer, {"dynamic_img_size": True}),
    "dinov2_with_registers": (RegisterTransformer, {"dynamic_img_size": True}),
}
# Where a published config says something, what timm calls it.
TIMM_ARGUMENTS = {
    "hidden_size": ("embed_dim",),
    "num_hidden_layers": ("depth",),
    "num_attention_heads": ("num_heads",),
    "patch_size": ("patch_size",),
    "qkv_bias": ("qkv_bias",),
    "hidden_dropout_prob": ("pos_drop_rate", "proj_drop_rate"),
    "attention_probs_dropout_prob": ("attn_drop_rate",),
    "attention_dropout": ("attn_drop_rate",),
    "drop_path_rate": ("drop_path_rate",),
    "layer_scale_init_value": ("init_values",),
    "layerscale_value": ("init_values",),
    "use_absolute_position_embeddings": ("use_abs_pos_emb",),
    "use_relative_position_bias": ("use_rel_pos_bias",),
    "use_shared_relative_position_bias": ("use_shared_rel_pos_bias",),
}


def create_published_trunk(config):
    """The timm model that computes what a family's published code computes.

    raises  ValueError for a family alone, without the sizes of a published config, for a pooling the family does not
            have, and for patch dropout in a BEiT
    """
    if "hidden_size" not in config.args:
        raise ValueError(f"{config.name!r} is a family of towers; name a folder or hub id of one, or a timm model")
    has_pooler = "pooler_act" in config.args  # ViT and DeiT
    one_of(f"{config.name} pooling", config.pooling, ("pooler", "token") if has_pooler else (None,))
    (trunk_class, arguments), published = VISION_FAMILIES[config.name], config.args
    arguments = {new: published[old] for old in published for new in TIMM_ARGUMENTS.get(old, ())} | arguments
    width = published["hidden_size"]
    if published.get("use_swiglu_ffn"):
        # DINOv2's rule: two thirds, up to the next multiple of 8; twice, for SwiGLUPacked has gate and value in one.
        mlp_width = (int(int(width * published["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8 * 2
        arguments |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    else:
        mlp_width = published.get("intermediate_size") or int(width * published["mlp_ratio"])
    if config.name == "beit":
        arguments["global_pool"] = "avg" if published["use_mean_pooling"] else "token"
    if config.patch_dropout:
        if config.name == "beit":
            raise ValueError("a beit tower has no patch dropout; leave patch_dropout at 0")
        arguments["patch_drop_rate"] = config.patch_dropout
    trunk = trunk_class(
        img_size=config.image_size,
        in_chans=config.channels,
        num_classes=0,
        mlp_ratio=(mlp_width + 0.5) / width,  # timm rounds width * ratio down
        norm_layer=functools.partial(nn.LayerNorm, eps=published["layer_norm_eps"]),
        **arguments,
    )
    for module in trunk.modules():
        if isinstance(module, timm.layers.Mlp):
            module.act = Activation(published["hidden_act"])
    if config.name == "dinov2_with_registers":
        # timm runs norm_pre after patch dropout, which must not drop registers, and before the blocks.
        trunk.norm_pre = Registers(published["num_register_tokens"], width)
    return trunk


def as_pair(size):
    """(height, width) of a size given as one number or as two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def as_size(height, width):
    """The inverse of as_pair: one number for a square."""
    return height if height == width else (height, width)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Processor: pictures and captions to tensors
# ---------------------------------------------------------------------------------------------------------------------

# Pillow's numbers, which preprocessor_config.json uses. It has three more, lanczos, box and hamming, which not every
# torch we support computes for tensors.
INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
# By how many pixels of the resized picture a JPEG's far edge may move when it is decoded at a smaller scale: the values
# of a photograph then differ from those of a full decode by less than one level of 255 on average.
DECODE_SHIFT = 0.1


@dataclass(frozen=True)
class ImageTransform:
    """Any picture to normalised pixels: RGB, resize, centre crop, (pixel / 255 - mean) / std.

    A call is `normalize(resize_and_crop(to_pixels(picture)))`; training puts its augmentation in between.
    """

    resize: int | tuple[int, int] | None  # pixels: the shorter side, or (height, width) whatever the proportions
    crop: tuple[int, int] | None  # (height, width) in pixels
    interpolation: str = "bicubic"  # a row of INTERPOLATIONS
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one per channel, for pixels from 0 to 1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        sides = (*([self.resize] if isinstance(self.resize, int) else self.resize or ()), *(self.crop or ()))
        if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(
                f"pictures of {self.resize}, cropped to {self.crop}: expected 1 to {MAX_SIDE} pixels a side"
            )
        if not (len(self.mean) == len(self.std) in (1, 3) and min(self.std) > 0):
            raise ValueError(
                f"pictures of mean {self.mean} and std {self.std}: expected 1 or 3 channels, a std above 0 for each"
            )
        one_of("interpolation", self.interpolation, INTERPOLATIONS)

    @property
    def channels(self):
        """3 for RGB, 1 for gray."""
        return len(self.mean)

    def __call__(self, picture):
        """A PIL picture, array or tensor to (3, S, S) float32."""
        return self.normalize(self.resize_and_crop(to_pixels(picture, self.channels)))

    def resize_and_crop(self, image):
        """(3, height, width) to (3, S, S), same dtype."""
        if isinstance(self.resize, int) and self.crop is not None:
            image = shorten_strip(image)
        before, size = tuple(image.shape[-2:]), self.resized(*image.shape[-2:])
        if size != before:
            image = TF.resize(image, list(size), InterpolationMode(self.interpolation), antialias=True)
        return image if self.crop is None else centre_crop(image, self.crop)

    def resized(self, height, width):
        """The (height, width) that a picture of this size has before it is cropped."""
        size = self.resize or (height, width)
        if isinstance(size, int):
            other = int(size * max(height, width) / min(height, width))
            size = (other, size) if height > width else (size, other)
        return size

    def decode_scale(self, size, smallest_share=1.0):
        """The largest of 8, 4, 2 and 1 by which a picture of this (width, height) may shrink before it gets here.

        The shrunk picture still has at least twice the pixels a side that resizing will make of it, so the filter of
        resizing still does the smoothing, and it comes to the same size. As a shrunk side is rounded up, the far edge
        moves a little: at most by DECODE_SHIFT.

        smallest_share  of the picture's area that a crop in between keeps
        """
        if self.resize is None:
            return 1
        needed = max(as_pair(self.resize)) / math.sqrt(smallest_share)
        for scale in (8, 4, 2):
            shrunk = [-(-side // scale) for side in size]
            # Pixels that rounding up adds at the far edge; resizing will shrink them as it does the shorter side.
            enlarged = max(scale * new - side for new, side in zip(shrunk, size))
            fits = min(size) >= 2 * scale * needed and enlarged * needed <= DECODE_SHIFT * min(size)
            if fits and self.resized(*shrunk[::-1]) == self.resized(*size[::-1]):
                return scale
        return 1

    def normalize(self, image):
        """(..., 3, S, S) uint8, or float from 0 to 1, to normalised float32."""
        # On the scale of 0 to 255, as torchvision-backed processors do it: the last bits agree with theirs.
        image = image.float() if image.dtype == torch.uint8 else image * 255
        mean, std = (255 * torch.tensor(values, device=image.device)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std

    def to_dict(self):
        """In the words of transformers' preprocessor_config.json."""
        values = {
            "image_processor_type": "ViTImageProcessor" if self.crop is None else "CLIPImageProcessor",
            "do_resize": self.resize is not None,
            "resample": INTERPOLATIONS[self.interpolation],
            "do_center_crop": self.crop is not None,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }
        if self.resize is not None:
            by_shorter = isinstance(self.resize, int)
            values["size"] = {"shortest_edge": self.resize} if by_shorter else height_and_width(self.resize)
        if self.crop is not None:
            values["crop_size"] = height_and_width(self.crop)
        return values

    @classmethod
    def from_dict(cls, values):
        """The inverse of to_dict, for files of every version of transformers.

        raises  ValueError for a kind of image processor that is not in IMAGE_PROCESSORS, sizes of another form, or an
                interpolation that is not in INTERPOLATIONS
        """
        written = values.get("image_processor_type") or values.get("feature_extractor_type") or "none"
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", written)
        one_of("image processor", kind, IMAGE_PROCESSORS)
        values = IMAGE_PROCESSORS[kind] | {key: value for key, value in values.items() if value is not None}
        crop = values["crop_size"] if values["do_center_crop"] else None
        resize = values["size"] if values["do_resize"] else None
        if isinstance(resize, int) and kind not in SHORTER_SIDE_PROCESSORS:
            resize = (resize, resize)
        interpolations = {number: word for word, number in INTERPOLATIONS.items()}
        one_of("resample", values["resample"], interpolations)
        # Their pixel * factor is our pixel / 255 * scale.
        scale = 255 * (values["rescale_factor"] if values["do_rescale"] else 1)
        mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else (0.0, 1.0)
        mean, std = (value if isinstance(value, list) else [value] * 3 for value in (mean, std))
        return cls(
            resize=read_size(resize),
            crop=crop and as_pair(read_size(crop)),
            interpolation=interpolations[values["resample"]],
            mean=tuple(value / scale for value in mean),
            std=tuple(value / scale for value in std),
        )


def shorten_strip(image, longest=32):
    """The middle of a picture more than `longest` times as long as it is wide; others unchanged.

    The centre crop keeps that middle only, while resizing the shorter side of a whole 1 x 60,000 strip to 224 pixels
    would take nine gigabytes. Both ends are cut by the same, so the middle stays where it is.
    """
    height, width = image.shape[-2:]
    cuts = [max(0, n - longest * min(height, width)) // 2 for n in (height, width)]
    return image[..., cuts[0] : height - cuts[0], cuts[1] : width - cuts[1]]


# What the image processors of transformers do where a file does not say otherwise: by the class name without its end.
_HALVES, _CLIP_MEAN, _CLIP_STD = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_SQUARE = {
    "do_resize": True,
    "size": 224,
    "resample": 2,
    "do_center_crop": False,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALVES,
    "image_std": _HALVES,
}
_SHORTER_SIDE = _SQUARE | {"resample": 3, "do_center_crop": True, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD}
IMAGE_PROCESSORS = {
    "ViT": _SQUARE,
    "DeiT": _SQUARE | {"size": 256, "resample": 3, "do_center_crop": True},
    "Beit": _SQUARE | {"resample": 3},
    "Siglip": _SQUARE | {"resample": 3},
    "CLIP": _SHORTER_SIDE,
    "Bit": _SHORTER_SIDE,
}
SHORTER_SIDE_PROCESSORS = {"CLIP", "Bit"}  # where "size": 224 means the shorter side


def height_and_width(size):
    return dict(zip(("height", "width"), size))


def read_size(size):
    """A size of preprocessor_config.json as ImageTransform has it: the shorter side, (height, width) or None."""
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if size is None or isinstance(size, int):
        return size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return tuple(size)
    raise ValueError(f"image size {size} is not understood; expected shortest_edge, or height and width")


def centre_crop(image, size):
    """(C, height, width) to (C, *size) around the middle; where the picture is smaller, black is added."""
    (height, width), (new_height, new_width) = image.shape[-2:], size
    pad_height, pad_width = max(new_height - height, 0), max(new_width - width, 0)
    if pad_height or pad_width:
        # An odd pixel of padding goes to the end, and one of cropping comes off the end: as in transformers, not as in
        # torchvision.
        image = F.pad(
            image, (pad_width // 2, pad_width - pad_width // 2, pad_height // 2, pad_height - pad_height // 2)
        )
        height, width = image.shape[-2:]
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return image[..., top : top + new_height, left : left + new_width]


def to_pixels(picture, channels=3):
    """One picture of any common kind to (channels, height, width): uint8, or float from 0 to 1.

    picture  a PIL image of any mode; or a numpy array or tensor, (height, width), channels first or channels last,
             uint8 or float (0 to 1, or 0 to 255 if any value is above 1); transparency is laid on white
    raises   ValueError for other shapes and kinds
    """
    if isinstance(picture, Image.Image):
        return TF.pil_to_tensor(flatten_picture(picture).convert("RGB" if channels == 3 else "L"))
    if isinstance(picture, np.ndarray):
        picture = torch.tensor(np.ascontiguousarray(picture))
    if not isinstance(picture, Tensor):
        raise ValueError(f"a picture is a PIL image, a numpy array or a tensor, not {type(picture).__name__}")
    image = picture[None] if picture.ndim == 2 else picture
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4} or 0 in image.shape:
        raise ValueError(
            f"a picture has shape {tuple(picture.shape)}, expected (height, width), (channels, height, width) or "
            f"(height, width, channels) with 1, 3 or 4 channels"
        )
    if image.shape[0] not in (1, 3) and image.shape[-1] in (1, 3, 4):
        image = image.permute(2, 0, 1)
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise ValueError(f"a picture's values are {image.dtype}, expected uint8 or a float type")
        image = image.float() / 255 if image.max() > 1 else image.float()
    white = 255 if image.dtype == torch.uint8 else 1
    if image.shape[0] == 4:
        opacity = image[3:].float() / white
        image = (image[:3] * opacity + white * (1 - opacity)).to(image.dtype)
    if image.shape[0] < channels:
        return image.expand(channels, -1, -1)
    return image if image.shape[0] == channels else TF.rgb_to_grayscale(image)


def flatten_picture(picture):
    """Any PIL picture to one of mode RGB or L, as a person would see it: transparency on white, deep gray in 8 bits."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture).astype(np.float64))
        # 16-bit files say so; of others only the values tell what white is.
        white = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
        white = 65535 if picture.mode.startswith("I;16") else white
        return Image.fromarray((values.clip(0, white) / white * 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("RGB")


def open_picture(path, scale_of=None):
    """Read a picture file, turned upright; raises ValueError naming a file that is missing or not a picture.

    scale_of  function of (width, height), as decode_scale is: a JPEG is decoded that many times smaller, which is much
              faster; other formats are read whole
    """
    with blamed_on(path, "cannot read picture"):
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("no such file")
        return decode_picture(path, scale_of)


def decode_picture(file, scale_of=None):
    """The PIL picture in a file, given by its path or opened, upright and in mode RGB or L; see open_picture."""
    with Image.open(file) as picture:
        if picture.format == "EPS":  # a program; Pillow would have Ghostscript run it
            raise ValueError("PostScript is not read")
        if scale_of:
            scale = scale_of(picture.size)
            if scale > 1:
                # Pillow takes the smallest of its scales that is no smaller than this: so it is rounded down.
                picture.draft(None, [side // scale for side in picture.size])
        return flatten_picture(ImageOps.exif_transpose(picture))


@contextmanager
def blamed_on(path, what="cannot read"):
    """Whatever goes wrong inside becomes a ValueError that names the file: parsers of broken files raise all kinds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{what} {path}: {kind}{error}") from error


class Processor:
    """Captions to token ids and a mask, pictures to pixel_values: what a DualEncoder takes.

    image_transform  ImageTransform, or None for captions alone
    tokenizer        tokenizers.Tokenizer with padding enabled, and truncation at the text tower's limit; or None
    token_types      whether captions come with token_type_ids, as BERT's do
    raises           ValueError for a tokenizer without padding
    """

    def __init__(self, image_transform, tokenizer, token_types=False):
        if tokenizer is not None and tokenizer.padding is None:
            raise ValueError("the tokenizer has no padding: call tokenizer.enable_padding(pad_id=..., pad_token=...)")
        self.image_transform = image_transform
        self.tokenizer = tokenizer
        self.token_types = token_types
        truncation = (tokenizer and tokenizer.truncation) or {"max_length": None, "direction": "right"}
        self.max_length, self.truncation_side = truncation["max_length"], truncation["direction"]
        self._warned = False

    def limit_length(self, max_tokens):
        """Cut captions at max_tokens, or where they were cut already if that is sooner."""
        self.max_length = min(self.max_length or max_tokens, max_tokens)

    def __call__(self, text=None, images=None, max_length=None):
        """Encode captions, pictures or both.

        text        a caption or N of them; padded to the longest, cut at max_length tokens, with a warning once
        images      a picture or I of them (see to_pixels), of mixed sizes if you like
        max_length  tokens; the tower's limit unless given, and never more
        returns     {"input_ids" (N, T), "attention_mask" (N, T), "pixel_values" (I, 3, S, S)}, what was asked for, and
                    "token_type_ids" (N, T) with token_types
        raises      ValueError if there is nothing to encode or nothing to encode it with, for captions that are not
                    strings, and for fewer tokens than the special ones
        """
        captions = None if text is None else [text] if isinstance(text, str) else list(text)
        pictures = None if images is None else as_pictures(images)
        if (captions is None and pictures is None) or [] in (captions, pictures):
            raise ValueError("nothing to process: give text, images or both, none of them empty")
        inputs = {}
        if text is not None:
            self.must_have("tokenizer")
            inputs.update(self._encode_captions(captions, max_length))
        if images is not None:
            self.must_have("image_transform")
            inputs["pixel_values"] = torch.stack([self.image_transform(picture) for picture in pictures])
        return inputs

    def must_have(self, part):
        """Raise ValueError without an "image_transform" or a "tokenizer"."""
        if getattr(self, part) is None:
            raise ValueError(f"this processor has no {part}: make one with Processor(image_transform, tokenizer)")

    def _truncate(self, limit):
        if limit is None:
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(limit, direction=self.truncation_side)

    def _encode_captions(self, captions, max_length):
        for i, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"caption {i} is {caption!r} ({type(caption).__name__}), expected a string")
        limit = min((n for n in (max_length, self.max_length) if n is not None), default=None)
        special = self.tokenizer.num_special_tokens_to_add(False)
        if limit is not None and limit < special:
            raise ValueError(f"captions of at most {limit} tokens, but the special ones alone are {special}")
        self._truncate(limit)
        encodings = self.tokenizer.encode_batch(captions)
        cut = sum(bool(encoding.overflowing) for encoding in encodings)
        if cut and not self._warned:
            self._warned = True
            warnings.warn(f"{cut} of {len(captions)} captions were cut to {limit} tokens", stacklevel=3)
        inputs = {
            "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        }
        if self.token_types:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids for encoding in encodings])
        return inputs

    def decode(self, ids):
        """Token ids (T,) back to a caption, without special tokens; raises ValueError without a tokenizer."""
        self.must_have("tokenizer")
        return self.tokenizer.decode(torch.as_tensor(ids).tolist())

    def batch_decode(self, ids):
        """Token ids (N, T) back to N captions, without special tokens."""
        return [self.decode(row) for row in ids]

    def save_pretrained(self, folder, format="dualenc"):
        """Write tokenizer.json and preprocessor_config.json.

        format  "hf" adds the tokenizer_config.json that transformers wants. It is also written for a tokenizer with
                token types, of which no other file tells
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self._truncate(self.max_length)  # a call may have left its own there
            write_file(folder / TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
            if format == "hf" or self.token_types:
                write_file(folder / "tokenizer_config.json", json.dumps(tokenizer_config(self), indent=2))
        if self.image_transform is not None:
            write_file(folder / PICTURES_FILE, json.dumps(self.image_transform.to_dict(), indent=2))

    @classmethod
    def from_pretrained(cls, folder_or_hub_id):
        """Rebuild a processor from the files of save_pretrained or of transformers; ValueError if some are missing."""
        folder = find_folder(folder_or_hub_id)
        image_transform, tokenizer_and_types = read_image_transform(folder), read_tokenizer(folder)
        with blamed_on(find_tokenizer(folder)):
            return cls(image_transform, *tokenizer_and_types)


def as_pictures(images):
    """One picture, a list of them or a stacked (I, ...) batch, as a list."""
    if isinstance(images, Image.Image) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4):
        return [images]
    return list(images)


def train_tokenizer(captions, vocab_size, max_length=None):
    """A lower-casing WordPiece tokenizer learned from captions, as BERT's was from its corpus.

    captions    iterable of strings
    vocab_size  pieces, the five special tokens and the single characters included; more only if these are more
    max_length  tokens kept of a caption, [CLS] and [SEP] included; all unless given
    returns     tokenizers.Tokenizer that pads to the longest of a batch and wraps captions in [CLS] ... [SEP]
    raises      ValueError if there are no captions
    """
    captions = list(captions)
    if not captions:
        raise ValueError("no captions to learn a vocabulary from")
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers the pieces inside words in the random order of a hash table, and breaks ties by number. Given
    # as special tokens they are numbered first, in our order, and the vocabulary is the same every time.
    between_spaces = {part for caption in captions for part in caption.split(" ")}
    words = (pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(part)) for part in between_spaces)
    inner = sorted({"##" + character for pairs in words for word, _ in pairs for character in word[1:]})
    learner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special + inner, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)

    # But special tokens are never split, and decoding drops them: a second tokenizer holds the pieces as plain ones.
    vocabulary = dict(sorted(learner.get_vocab().items(), key=lambda item: item[1]))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    ids = {token: tokenizer.token_to_id(token) for token in special}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    if max_length:
        tokenizer.enable_truncation(max_length)
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# 10  Data
# ---------------------------------------------------------------------------------------------------------------------

# What a class name becomes, for training captions and for zero-shot classification alike.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
)
SPLITS = ("train", "val", "test")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_SUFFIXES = {".csv", ".tsv", ".jsonl"}
IMAGE_COLUMNS = ("image", "filepath", "path", "image_path", "filename", "file_name", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")

# torchvision's data sets: class, then the arguments of each split; where there is one dictionary, the set has no split
# of its own.
_BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_BY_THREE = {**_BY_SPLIT, "val": {"split": "val"}}
TORCHVISION_SETS = {
    "mnist": ("MNIST", _BY_TRAIN),
    "fashionmnist": ("FashionMNIST", _BY_TRAIN),
    "cifar10": ("CIFAR10", _BY_TRAIN),
    "cifar100": ("CIFAR100", _BY_TRAIN),
    "stl10": ("STL10", _BY_SPLIT),
    "food101": ("Food101", _BY_SPLIT),
    "flowers102": ("Flowers102", _BY_THREE),
    "pets": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "dtd": ("DTD", _BY_THREE),
    "aircraft": ("FGVCAircraft", _BY_THREE),
    "country211": ("Country211", {**_BY_SPLIT, "val": {"split": "valid"}}),
    "eurosat": ("EuroSAT", {}),
    "caltech101": ("Caltech101", {}),
}


class Pairs(torch.utils.data.Dataset):
    """Pictures, each with all of its captions.

    names     I strings, one a picture: they decide the split and name the picture in messages
    pictures  indexable by picture number, gives a PIL image
    captions  I lists of captions
    labels    I class numbers; None when captions are not made from classes
    classes   the K class names, or None
    """

    neighbours = 1  # pictures in a row that training should see in one batch: wrong, but almost right for each other

    def __init__(self, names, pictures, captions, labels=None, classes=None):
        self.names, self.pictures, self.captions = names, pictures, captions
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Picture i and the list of its captions."""
        return self.pictures[i], self.captions[i]

    def select(self, indices):
        """The pairs at these picture numbers, as plain Pairs: neighbours and hard_negatives do not come along."""
        indices = list(indices)
        return Pairs(
            [self.names[i] for i in indices],
            Selected(self.pictures, indices),
            [self.captions[i] for i in indices],
            self.labels and [self.labels[i] for i in indices],
            self.classes,
        )

    def group_of(self, i):
        """Pictures of one group share their captions: the class where there are classes, else the picture itself."""
        return self.labels[i] if self.labels else i

    def caption_table(self):
        """Every caption once per group: (captions, the group of each caption, the group of each picture)."""
        groups = [self.group_of(i) for i in range(len(self))]
        table = {(caption, group): None for group, captions in zip(groups, self.captions) for caption in captions}
        return [caption for caption, _ in table], [group for _, group in table], groups


class Selected(Sequence):
    """Some items of a sequence, fetched when asked for."""

    def __init__(self, items, indices):
        self.items, self.indices = items, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.items[self.indices[i]]


class PictureFiles(Sequence):
    """Picture files, opened when asked for; rows and source say where each was named, for messages."""

    scale_of = None  # see open_picture and sized_for

    def __init__(self, paths, rows=None, source=""):
        self.paths, self.rows, self.source = paths, rows, source

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return open_picture(self.paths[i], self.scale_of)
        except ValueError as error:
            raise ValueError(f"{self.source}{self.rows[i]}: {error}" if self.rows else str(error)) from error


def sized_for(transform, pictures, smallest_share=1.0):
    """The same pictures for this ImageTransform's use alone: large JPEGs decoded no larger than it takes.

    smallest_share  of a picture's area that a crop before the transform keeps
    """
    if isinstance(pictures, Selected):
        return Selected(sized_for(transform, pictures.items, smallest_share), pictures.indices)
    if hasattr(pictures, "scale_of"):
        pictures = copy.copy(pictures)
        pictures.scale_of = functools.partial(transform.decode_scale, smallest_share=smallest_share)
    return pictures


class Unreadable(torch.utils.data.Dataset):
    """For each picture of pairs why it cannot be read, or an empty string."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        try:
            to_pixels(self.pairs.pictures[i])
        except ValueError as error:
            return str(error)
        return ""


def drop_unreadable(pairs, workers=0):
    """(the pairs whose pictures can be read, {name: reason} of the others); every picture is read once."""
    loader = torch.utils.data.DataLoader(
        Unreadable(pairs),
        batch_size=64,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # measuring leaves the global generator alone
        worker_init_fn=start_worker,
    )
    reasons = [reason for batch in from_workers(loader) for reason in batch]
    bad = {pairs.names[i]: reason for i, reason in enumerate(reasons) if reason}
    return pairs.select(i for i, reason in enumerate(reasons) if not reason), bad


def load_pairs(
    spec,
    split="train",
    data_root="data",
    images=None,
    val_fraction=0.1,
    templates=TEMPLATES,
    seed=0,
    download=False,
    allow_outside=False,
):
    """Pictures with captions from a data spec.

    spec          "shapes"; a torchvision set such as "cifar10"; a folder with a subfolder a class; a folder of pictures
                  with .txt files of the same name; a .csv, .tsv or .jsonl caption file; "coco:captions.json" or
                  "flickr:captions.txt"; tar shards, as in "shards-{0000..0099}.tar"
    split         "train", "val" or "test". The data's own where it has one (its test part serves as val if it has no
                  val part; in folders val serves as test, too); else val and test are the pictures whose names hash
                  below val_fraction of the range, so about that share of them, and train is the rest
    data_root     where torchvision's sets lie
    val_fraction  0 to 1
    images        the picture folder of coco: and flickr:, unless it is the caption file's own
    templates     what class names become: strings with {} in them
    seed          draws the shapes
    download      whether torchvision may fetch a set that is not in data_root
    allow_outside lets a caption file name pictures by relative paths that climb out of its folder
    returns       Pairs
    raises        ValueError for an unknown spec (listing what there is), for a val_fraction beyond 0 and 1, and for
                  pictures or captions that are missing, naming file and line
    """
    one_of("split", split, SPLITS)
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected a share from 0 to 1")
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    path = Path(spec)
    if spec == "shapes":
        return ShapesPairs(split, seed=seed)
    if spec in TORCHVISION_SETS:
        pairs, own = torchvision_pairs(spec, split, data_root, templates, download)
    elif kind in ("coco", "flickr") and rest:
        pairs, own = {"coco": coco_pairs, "flickr": flickr_pairs}[kind](Path(rest), split, images, allow_outside)
    elif path.is_dir():
        pairs, own = folder_pairs(path, split, templates)
    elif path.suffix.lower() in CAPTION_SUFFIXES:
        pairs, own = caption_file_pairs(path, allow_outside), False
    elif path.suffix.lower() == ".tar" or re.match("(pipe|https?|s3|gs):", spec):
        pairs, own = shard_pairs(spec), False
    else:
        raise ValueError(
            f"unknown data {spec!r}: neither a folder or caption file ({', '.join(sorted(CAPTION_SUFFIXES))}) here, "
            f"nor .tar shards, nor a data set; {nearest(spec, ['shapes', *TORCHVISION_SETS])}"
        )
    return pairs if own else pairs.select(hashed_split(pairs.names, split, val_fraction))


def hashed_split(names, split, val_fraction):
    """The numbers of a split's pictures. A name's hash decides, so new files never move old ones across."""
    held_out = [
        int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8], 16) < val_fraction * 2**32
        for name in names
    ]
    return [i for i, out in enumerate(held_out) if out != (split == "train")]


def readable_name(name):
    """A class name as words: underscores and runs of white space become one space."""
    return re.sub(r"[_\s]+", " ", name).strip()


def class_captions(labels, classes, templates):
    """The captions of each picture, its class name in every template; and the class names made readable.

    raises  ValueError for a template without {}
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name")
    readable = [readable_name(name) for name in classes]
    by_class = [[template.replace("{}", name) for template in templates] for name in readable]
    return [by_class[label] for label in labels], readable


def torchvision_pairs(name, split, data_root, templates, download):
    class_name, splits = TORCHVISION_SETS[name]
    arguments = (splits.get(split) or splits["test"]) if splits else {}
    try:
        data = getattr(torchvision.datasets, class_name)(str(data_root), download=download, **arguments)
    except RuntimeError as error:
        raise ValueError(f"{name} is not below {data_root} ({error}); train.py's --download fetches it") from error
    # torchvision has no one name for the labels; each of these saves decoding all pictures to read them.
    labels = next(getattr(data, name) for name in ("targets", "labels", "_labels", "y") if hasattr(data, name))
    labels = [int(label) for label in labels]
    captions, classes = class_captions(labels, getattr(data, "classes", None) or data.categories, templates)
    # A set without splits is split by the hash of these names, which must then be the same for each split.
    prefix = f"{name}/{split}" if splits else name
    names = [f"{prefix}/{i}" for i in range(len(data))]
    return Pairs(names, FirstOfEach(data), captions, labels, classes), bool(splits)


class FirstOfEach(Sequence):
    """The pictures of a torchvision data set, whose items are (picture, label)."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        with blamed_on(f"{i} of {type(self.items).__name__}", "cannot read picture"):
            return flatten_picture(self.items[i][0])


def folder_pairs(folder, split, templates):
    """A folder of class folders, or of pictures with captions in .txt files; with or without train/, val/, test/."""
    own = (folder / "train").is_dir()
    if own:
        wanted = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
        present = [part for part in wanted if (folder / part).is_dir()]
        if not present:
            raise ValueError(f"{folder} has train/ but neither val/ nor test/; add one, or move train/'s content up")
        folder = folder / present[0]
    if any(pictures_below(path) for path in subfolders(folder)):
        return class_folder_pairs(folder, templates), own
    return text_file_pairs(folder), own


def subfolders(folder):
    """Its folders in order, but hidden ones, where programs keep things of their own."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def pictures_below(folder):
    """The pictures of a folder and all folders in it that are not hidden, in order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
    )


def class_folder_pairs(folder, templates):
    class_folders = subfolders(folder)
    paths, labels = [], []
    for label, class_folder in enumerate(class_folders):
        found = pictures_below(class_folder)
        if not found:
            raise ValueError(f"class folder {class_folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    captions, classes = class_captions(labels, [path.name for path in class_folders], templates)
    names = [path.relative_to(folder).as_posix() for path in paths]
    return Pairs(names, PictureFiles(paths), captions, labels, classes)


def text_file_pairs(folder):
    paths = pictures_below(folder)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    rows = []
    for path in paths:
        text_path = path.with_suffix(".txt")
        if not text_path.is_file():
            raise ValueError(f"picture {path} has no caption file {text_path.name} beside it")
        filled = [
            (f"{text_path}, line {number}", str(path.relative_to(folder)), line)
            for number, line in text_lines(text_path)
            if line.strip()
        ]
        if not filled:
            raise ValueError(f"caption file {text_path} is empty")
        rows += filled
    return pairs_from_rows(rows, folder)


def caption_file_pairs(path, allow_outside):
    """A table of pictures and captions, columns found by name, one row a caption."""
    if not path.is_file():
        raise ValueError(f"no caption file {path}")
    return pairs_from_rows(caption_file_rows(path), path.parent, f"{path}, line ", allow_outside)


def caption_file_rows(path):
    """(line number, picture, caption) of each caption."""
    columns = None
    for line, row in jsonl_rows(path) if path.suffix.lower() == ".jsonl" else table_rows(path):
        if columns is None:
            image_column = find_column(row, IMAGE_COLUMNS, "picture", path)
            columns = image_column, find_column(row, CAPTION_COLUMNS, "caption", path)
        image, captions = (row.get(column) for column in columns)
        for caption in captions if isinstance(captions, list) and captions else [captions]:
            yield line, image, caption


def text_lines(path):
    """(number from 1, line with its end) of a text file: UTF-8, or UTF-16 if it starts with that byte-order mark."""
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    number = 0
    try:
        with open(path, encoding=encoding, newline="") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeError as error:
        raise ValueError(f"{path} is not {encoding} text after line {number}: {error}; save it as UTF-8") from error


def table_rows(path):
    """(line number, {column: cell}) for each row of a csv or tsv file; the header tells the separator."""
    lines = (line for _, line in text_lines(path))
    header = next(lines, "")
    separator = max("\t,;|", key=header.count)
    # Strict: else a quote that is never closed would quietly swallow the rows below it.
    settings = {"delimiter": separator, "skipinitialspace": True, "strict": True}
    columns, number = None, 1
    reader = csv.reader(itertools.chain([header], lines), **settings)
    try:
        for cells in reader:
            if cells and columns is None:
                columns = [cell.strip() for cell in cells]
            elif cells:
                if any(cell.strip() for cell in cells[len(columns) :]):
                    raise ValueError(
                        f"{path}, line {number} has {len(cells)} cells, but the header names {len(columns)} columns: "
                        f"quote captions that hold the separator {separator!r}"
                    )
                yield number, dict(itertools.zip_longest(columns, cells[: len(columns)]))
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {number}: {error}; a cell that starts with a quote must end with one, and quotes inside it "
            f"are doubled"
        ) from error


def jsonl_rows(path):
    for number, line in text_lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not json: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a json object")
            yield number, row


def find_column(row, accepted, kind, path):
    for name in accepted:
        found = [column for column in row if column.strip().lower() == name]
        if found:
            return found[0]
    there = ", ".join(str(column) for column in row)
    raise ValueError(f"{path} has no {kind} column: it has {there}; expected one of {', '.join(accepted)}")


def pairs_from_rows(rows, root, source="", allow_outside=False):
    """Pairs from rows of (where, picture, caption); a picture's rows are brought together, equal rows count once.

    where    a line number, say: source and where together begin every message
    picture  its path from root; outside of root only if absolute, or with allow_outside
    raises   ValueError for a caption or picture that is missing, or no text
    """
    captions_of, by_spelling, first_rows = {}, {}, []
    for where, picture, caption in rows:
        if not isinstance(picture, str) or not picture:
            raise ValueError(f"{source}{where}: no picture named")
        if not isinstance(caption, str) or not caption.strip():
            got = "empty caption" if caption is None or isinstance(caption, str) else f"caption {caption!r}"
            raise ValueError(f"{source}{where}: {got} for {picture}")
        if not caption.isascii():  # json can hold half a character: "\ud83d"
            with blamed_on(f"{source}{where}", "no text in"):
                caption.encode()
        if picture not in by_spelling:
            path = locate_picture(picture, root, f"{source}{where}", allow_outside)
            if path not in captions_of:
                captions_of[path] = []
                first_rows.append(where)
            by_spelling[picture] = captions_of[path]
        by_spelling[picture].append(caption.strip())
    if not captions_of:
        raise ValueError(f"no pairs below {root}")
    names = [Path(os.path.relpath(path, root)).as_posix() for path in captions_of]
    captions = [list(dict.fromkeys(several)) for several in captions_of.values()]
    return Pairs(names, PictureFiles(list(captions_of), first_rows, source), captions)


def locate_picture(picture, root, place, allow_outside):
    """The path of a picture that a row names; see pairs_from_rows."""
    climbs = not os.path.isabs(picture) and os.path.normpath(picture).split(os.sep)[0] == os.pardir
    if climbs and not allow_outside:
        raise ValueError(
            f"{place}: picture {picture} lies outside {root}; name it by its absolute path, or --allow-outside"
        )
    path = os.path.normpath(os.path.join(root, picture))
    if not os.path.isfile(path):
        raise ValueError(f"{place}: missing picture {path}")
    return path


def coco_pairs(path, split, images, allow_outside):
    """COCO's captions_*.json, or Karpathy's dataset_*.json, which has splits of its own."""
    data, root = read_json(path), Path(images or path.parent)
    with blamed_on(path):
        entries = data.get("images", [])
        own = bool(entries) and "sentences" in entries[0]
        rows = karpathy_rows(entries, split) if own else coco_rows(data, entries)
    return pairs_from_rows(rows, root, f"{path}, ", allow_outside), own


def karpathy_rows(entries, split):
    parts = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}[split]
    return [
        (f"picture {entry['filename']}", os.path.join(entry.get("filepath", ""), entry["filename"]), sentence["raw"])
        for entry in entries
        if entry["split"] in parts
        for sentence in entry["sentences"]
    ]


def coco_rows(data, entries):
    if "annotations" not in data:
        raise ValueError(f"no COCO caption file: it has {', '.join(data)}; expected images and annotations")
    files = {entry["id"]: entry["file_name"] for entry in entries}
    notes = data["annotations"]
    return [(f"annotation {note.get('id')}", files.get(note["image_id"]), note["caption"]) for note in notes]


def flickr_pairs(path, split, images, allow_outside):
    """Flickr8k's token file (picture.jpg#0, tab, caption), or the tables of both Flickr sets."""
    if path.suffix.lower() == ".json":
        return coco_pairs(path, split, images, allow_outside)
    if not path.is_file():
        raise ValueError(f"no caption file {path}")
    return pairs_from_rows(flickr_rows(path), Path(images or path.parent), f"{path}, line ", allow_outside), False


def flickr_rows(path):
    for number, line in text_lines(path):
        if not line.strip():
            continue
        separator = r"(?P<separator>#\d+\s*\t|\|\s*\w+\s*\||,|\t)"
        match = re.match(rf"\s*(?P<image>[^#,|\t]+?)\s*{separator}\s*(?P<caption>.*?)\s*$", line)
        if match is None:
            raise ValueError(
                f"{path}, line {number} is no Flickr caption: {line!r}; expected picture.jpg#0<tab>caption"
            )
        if number == 1 and Path(match["image"]).suffix.lower() not in PICTURE_SUFFIXES:
            continue  # a header
        caption = match["caption"]
        if match["separator"] == "," and caption.startswith('"'):
            caption = ",".join(next(csv.reader([caption])))
        yield number, match["image"], caption


def shard_pairs(spec):
    """Tar shards in webdataset's layout: members key.jpg (or .png, ...) with key.txt, or key.json with a caption field.

    Each shard is gone through once, for headers and captions; pictures are read later, one seek each. So shards behave
    as files do: every picture is seen once an epoch in an order drawn anew, by however many workers and processes.

    spec    paths with {0000..0099} or {a,b} in them
    raises  ValueError naming shard and sample for shards that are missing, cut short or no tar files, for a sample
            without picture or caption, and for a key that comes twice
    """
    if ":" in spec[2:]:  # past the drive letter that a path on Windows begins with
        raise ValueError(f"shards are read from disk, so fetch {spec} first, and name the files")
    paths = expand_braces(spec)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:5])}")
    if len(set(paths)) < len(paths):
        raise ValueError(f"{spec} names a shard twice")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names, captions, places = [], [], array.array("q")  # numbers only: millions of pictures are many
    for number, path in enumerate(paths):
        shard = Path(os.path.relpath(path, root)).as_posix()
        for key, (offset, size, several) in shard_samples(path).items():
            names.append(f"{shard}/{key}")
            captions.append(several)
            places.extend((number, offset, size))
    if not names:
        raise ValueError(f"{spec} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return Pairs(names, ShardPictures(paths, np.array(places).reshape(-1, 3)), captions)


def expand_braces(spec):
    """Every spec that {first..last} and {one,other} stand for: "a{08..10}" is a08, a09 and a10."""
    braces = re.search(r"\{([^{}]*)\}", spec)
    if not braces:
        return [spec]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    words = braces[1].split(",")
    if numbers:
        words = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    if not words or (len(words) == 1 and not numbers):
        raise ValueError(f"{braces[0]} in {spec} names no shards; expected {{0000..0099}} or {{a,b}}")
    return [path for word in words for path in expand_braces(spec[: braces.start()] + word + spec[braces.end() :])]


def shard_samples(path):
    """{key: (offset, size of its picture, captions)} of a tar shard, in the order of the pictures."""
    pictures, captions, from_json = {}, {}, {}
    with blamed_on(path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # or they would all be kept
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = name.partition(".")
            key, extension = f"{folder}/{stem}".removeprefix("/"), f".{extension.lower()}"
            if not (member.isfile() and stem):
                continue
            found = pictures if extension in PICTURE_SUFFIXES else {".txt": captions, ".json": from_json}.get(extension)
            if found is None:
                continue
            if key in found:
                raise ValueError(f"sample {key} comes twice: {member.name}")
            if found is pictures:
                pictures[key] = (member.offset_data, member.size)
            else:
                file.seek(member.offset_data)  # tarfile's own way takes as long as all the rest
                content = file.read(member.size)
                with blamed_on(member.name):
                    found[key] = member_captions(content, extension)
        file.seek(tar.offset)  # a whole archive ends in a block of zeros
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise ValueError(f"cut short or damaged at byte {tar.offset:,}, after {len(pictures):,} pictures")
        captions = {**from_json, **captions}
        for key in {**pictures, **captions}:
            if key not in pictures:
                raise ValueError(f"sample {key} has no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
            if not captions.get(key):
                raise ValueError(
                    f"sample {key} has no caption: neither lines in {key}.txt nor {', '.join(CAPTION_COLUMNS)} in "
                    f"{key}.json"
                )
    return {key: (*place, captions[key]) for key, place in pictures.items()}


def member_captions(content, extension):
    """The captions in a .txt or .json member of a shard, each once."""
    text = content.decode("utf-8-sig")
    lines = re.split(r"[\r\n]+", text)
    if extension == ".json":
        values = json.loads(text)
        lines = next((values[name] for name in CAPTION_COLUMNS if values.get(name)), [])
        lines = [lines] if isinstance(lines, str) else lines
        for line in lines:
            line.encode()  # json can hold half a character, which is no text
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


class ShardPictures(Sequence):
    """Pictures inside tar shards, read when asked for.

    paths   the shards
    places  (I, 3): shard number, offset and size in bytes of each picture
    """

    scale_of = None  # see open_picture and sized_for

    def __init__(self, paths, places):
        self.paths, self.places = paths, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        shard, offset, size = self.places[i].tolist()
        # Opened for each picture, which takes microseconds: no handles to share between processes, or to run out of.
        with blamed_on(f"{self.paths[shard]} at byte {offset:,}", "cannot read picture"):
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                content = file.read(size)
            return decode_picture(io.BytesIO(content), self.scale_of)


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 0.1, "large": 0.18}  # radius as a share of the picture's side
RELATIONS = ("left of", "above")  # of the first object to the second, in a scene
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_OBJECTS = {("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "circle")}
MAX_HELD_OUT = 3184  # held-out pictures: twice as many as there are held-out scenes without one of these objects


class ShapesPairs(Pairs):
    """Drawn pictures such as "a small red circle left of a large blue star": data that needs no download.

    Two objects, each with a size, a colour and a shape, beside or above each other: 18,240 scenes. Which adjective goes
    with which noun, and their order, decide the picture. Held out are a tenth of the scenes, and all scenes with one of
    HELD_OUT_OBJECTS, whose colour and shape are seen in training, but never together. Each picture has its mirror
    beside it, the same objects having changed places: a bag of words cannot tell which of the two a caption belongs to.

    split  "train", "val" or "test"; val and test are the same pictures
    seed   draws scenes and pictures
    count  pictures, 10,000 or, held out, 512 unless given; half of those held out show an object never seen, and each
           has a caption of its own
    side   pixels
    raises ValueError for an odd number of held-out pictures, or for more than there are
    """

    neighbours = 2  # a scene and its mirror

    def __init__(self, split="train", seed=0, count=None, side=64):
        one_of("split", split, SPLITS)
        if split == "train":
            scenes = training_scenes(random.Random(f"shapes train {seed}"), 10_000 if count is None else count)
        else:
            scenes = held_out_scenes(random.Random(f"shapes held out {seed}"), 512 if count is None else count)
        names = [f"shapes/{seed}/{'train' if split == 'train' else 'held-out'}/{i}" for i in range(len(scenes))]
        # A generator of its own: with the picture's, the background would give the wording away.
        self.told = [as_told(*scene, random.Random(f"{name} told")) for name, scene in zip(names, scenes)]
        super().__init__(names, DrawnScenes(scenes, names, side), [[describe(*scene)] for scene in self.told])

    def hard_negatives(self, i):
        """Wrong captions of picture i, each a small change to its own: {kind: caption}.

        "attributes"  the two colours exchanged; not there if the objects have one colour, and the same as "order" if
                      they have one size and shape
        "relation"    left for right, above for below
        "order"       the two objects exchanged
        "replaced"    a control that needs no binding: one object in a colour that the picture does not show
        """
        first, relation, second = self.told[i]
        (size_1, colour_1, shape_1), (size_2, colour_2, shape_2) = first, second
        absent = random.Random(self.names[i]).choice([c for c in COLOURS if c not in (colour_1, colour_2)])
        wrong = {
            "relation": describe(first, OPPOSITE[relation], second),
            "order": describe(second, relation, first),
            "replaced": describe((size_1, absent, shape_1), relation, second),
        }
        if colour_1 != colour_2:
            wrong["attributes"] = describe((size_1, colour_2, shape_1), relation, (size_2, colour_1, shape_2))
        return wrong


class DrawnScenes(Sequence):
    """Scenes, drawn when asked for; a picture's name decides its details, so it always looks the same."""

    def __init__(self, scenes, names, side):
        self.scenes, self.names, self.side = scenes, names, side

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return draw_scene(*self.scenes[i], random.Random(self.names[i]), self.side)


def random_object(rng):
    return rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)


def is_held_out(first, relation, second):
    """A scene and its mirror are held out together."""
    if first[1:] in HELD_OUT_OBJECTS or second[1:] in HELD_OUT_OBJECTS:
        return True
    key = f"{sorted([first, second])} {relation}"
    return hashlib.sha256(key.encode()).digest()[0] < 26  # a tenth of 256


def random_scenes(rng):
    """Endless scenes (object, relation, other object); the relation is "left of" or "above"."""
    while True:
        first, relation, second = random_object(rng), rng.choice(RELATIONS), random_object(rng)
        if first != second:
            yield first, relation, second


def training_scenes(rng, count):
    """Scenes that are not held out, each followed by its mirror."""
    scenes = (scene for scene in random_scenes(rng) if not is_held_out(*scene))
    with_mirrors = (((a, relation, b), (b, relation, a)) for a, relation, b in scenes)
    return list(itertools.islice(itertools.chain.from_iterable(with_mirrors), count))


def held_out_scenes(rng, count):
    """Half with an object that training never shows, half new compositions of known ones; mirrors side by side."""
    if count % 2 or not 0 < count <= MAX_HELD_OUT:
        raise ValueError(f"{count} held-out pictures; expected an even number up to {MAX_HELD_OUT:,}")
    scenes = {}
    candidates = random_scenes(rng)
    for want_new_object in (True, False):
        while len(scenes) < count // (2 if want_new_object else 1):
            first, relation, second = next(candidates)
            new_object = any(thing[1:] in HELD_OUT_OBJECTS for thing in (first, second))
            if new_object == want_new_object and is_held_out(first, relation, second):
                scenes[first, relation, second] = scenes[second, relation, first] = None
    return list(scenes)


def as_told(first, relation, second, rng):
    """The scene in one of its two wordings: A left of B is also B right of A."""
    return (second, OPPOSITE[relation], first) if rng.random() < 0.5 else (first, relation, second)


def describe(first, relation, second):
    """The caption that names two objects and their relation, in this order."""
    return f"a {' '.join(first)} {relation} a {' '.join(second)}"


def draw_scene(first, relation, second, rng, side):
    """A PIL picture, side x side pixels; positions, sizes and colours vary a little with rng."""
    background = tuple(rng.randint(225, 255) for _ in range(3))
    picture = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(picture)
    for thing, along in ((first, 0.27), (second, 0.73)):
        size, colour, shape = thing
        along, across = along + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.12, 0.12)
        centre = (along, across) if relation == "left of" else (across, along)
        fill = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])
        draw_shape(draw, shape, [side * c for c in centre], side * SIZES[size] * rng.uniform(0.9, 1.1), fill)
    return picture


def draw_shape(draw, shape, centre, radius, fill):
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    if shape == "cross":
        arm = radius / 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        return
    # Corners around the centre, as distance (share of the radius) and angle (turns from straight up).
    corners = {
        "square": [(1.15, 0.125 + i / 4) for i in range(4)],
        "diamond": [(1.1, i / 4) for i in range(4)],
        "triangle": [(1.1, i / 3) for i in range(3)],
        "star": [(1.2 if i % 2 == 0 else 0.5, i / 10) for i in range(10)],
    }[shape]
    turn = 2 * math.pi
    draw.polygon([(x + d * radius * math.sin(a * turn), y - d * radius * math.cos(a * turn)) for d, a in corners], fill)


# ---------------------------------------------------------------------------------------------------------------------
# 8  Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

MODEL_TYPE = "dualenc"  # config.json names its writer in model_type, as transformers' files do
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
PICTURES_FILE = "preprocessor_config.json"
SMALL = 100_000  # larger numbers in a config must be the side of some weight, or a lie could fill the memory
PICKLE_FILE = "pytorch_model.bin"  # where transformers kept weights before safetensors


def build_from_towers(cls, vision, text, projection_dim, pretrained, overrides):
    """See DualEncoder.from_vision_text_pretrained."""
    sides = {"vision": {}, "text": {}, "": {"projection_dim": projection_dim}}
    for name, value in overrides.items():
        side, _, rest = name.partition("_")
        if side in ("vision", "text"):
            sides[side][rest] = value
        else:
            sides[""][name] = value
    vision_model = build_vision_tower(vision, pretrained, sides["vision"])
    if text == "scratch":
        text_model, tokenizer_and_types = TextEncoder(build(TextConfig, sides["text"])), None
    else:
        text = find_folder(text)
        text_model = load_text_encoder(TextEncoder, text, sides["text"])
        tokenizer_and_types = find_tokenizer(text) and read_tokenizer(text)
    config = {"vision": vision_model.config, "text": text_model.config, **sides[""]}
    model = cls(build(DualEncoderConfig, config), vision_model, text_model)
    if tokenizer_and_types:
        model.processor = Processor(vision_model.image_transform(), *tokenizer_and_types)
        model.processor.limit_length(text_model.max_tokens)
    return model


def build_vision_tower(vision, pretrained, overrides):
    """A VisionEncoder from a timm name, or from a transformers folder or hub id."""
    vision = str(vision)
    if not vision.startswith("hf-hub:") and ("/" in vision or Path(vision).is_dir()):
        return load_vision_encoder(find_folder(vision), dict(overrides))
    source = vision
    if vision.startswith("hf-hub:"):
        # The folder alone must rebuild the model: note the architecture, not the address it came from.
        _, vision, arguments = timm.models.load_model_config_from_hf(vision.removeprefix("hf-hub:"))
        overrides = {**overrides, "args": {**(arguments or {}), **overrides.get("args", {})}}
    config = build(VisionConfig, {"name": vision, **overrides})
    return VisionEncoder(config, pretrained_from=source if pretrained else None)


def save_dual_encoder(model, folder, format):
    """See DualEncoder.save_pretrained."""
    one_of("checkpoint format", format, ("dualenc", "hf"))
    for part in ("image_transform", "tokenizer") if model.processor else ():
        model.processor.must_have(part)
    if format == "hf":
        config, weights = publish_dual_encoder(model)
    else:
        config, weights = model.config.to_dict(), model.state_dict()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", "crc32": checksum(weights)}  # "pt": PyTorch; transformers wants to know
    write_file(folder / WEIGHTS_FILE, safetensors.torch.save(weights, metadata=metadata))
    if model.processor is not None:
        model.processor.save_pretrained(folder, format)


def load_dual_encoder(cls, folder_or_hub_id):
    """See DualEncoder.from_pretrained."""
    folder = find_folder(folder_or_hub_id)
    config_path = checkpoint_file(folder, CONFIG_FILE)
    values = read_json(config_path)
    if values.get("model_type") == PUBLISHED_TYPE:
        model = load_published_dual_encoder(cls, folder, values)
    elif values.get("model_type") == MODEL_TYPE:
        model = load_own_dual_encoder(cls, folder, values)
    else:
        raise ValueError(
            f"{config_path} has model_type {values.get('model_type')!r}, expected {MODEL_TYPE!r} or "
            f"{PUBLISHED_TYPE!r}; towers of other models are read by DualEncoder.from_vision_text_pretrained"
        )
    # Ours has tokenizer and image processor, or neither. A published folder may lack one: the model loads all the same.
    if find_tokenizer(folder) and (values["model_type"] == MODEL_TYPE or find_image_processor(folder)):
        model.processor = Processor.from_pretrained(folder)
        model.processor.limit_length(model.text_model.max_tokens)
        if values["model_type"] == MODEL_TYPE:  # some published tokenizers know more words than their tower's table
            check_token_ids(model.processor.tokenizer, model.config.text.vocab_size, find_tokenizer(folder))
    return model.eval()


def load_own_dual_encoder(cls, folder, values):
    """The model of a folder that save_pretrained wrote in our own format; values is its config.json."""
    config_path, weights_path = folder / CONFIG_FILE, checkpoint_file(folder, WEIGHTS_FILE)
    with blamed_on(weights_path, "cannot read weights"):
        weights = read_weights(weights_path)
    with blamed_on(config_path, "cannot build the model of"):
        sides = [n for tensor in weights.values() for n in tensor.shape]
        check_numbers(values, max([SMALL, *sides]))
        config = DualEncoderConfig.from_dict(values)
        shapes = build_without_memory(cls, config, weights).state_dict()
    check_weights(shapes, weights, weights_path)
    model = cls(config)
    model.load_state_dict(weights)
    return model


def checkpoint_file(folder, name):
    """The path of a checkpoint's file; raises ValueError if it is a link that leads out of the folder."""
    path, home = (folder / name).resolve(), folder.resolve()
    # The hub's cache keeps contents in blobs/, and in each of snapshots/'s folders links to them.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.is_relative_to(home) for home in homes):
        raise ValueError(f"{folder / name} is a link to {path}, outside its folder; put the file itself there")
    return folder / name


def read_weights(path):
    """{name: tensor} of a safetensors file; raises ValueError if they are not the weights that were written."""
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        written = (file.metadata() or {}).get("crc32")
    if written is not None and written != checksum(weights):
        raise ValueError(
            f"the weights have checksum {checksum(weights)}, but {written} was written: the file is damaged"
        )
    return weights


def checksum(weights):
    """CRC-32 of the bytes of all weights in the order of their names, as eight hexadecimal digits."""
    crc = 0
    for _, tensor in sorted(weights.items()):
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def check_numbers(values, longest):
    """Raise ValueError for a whole number in a config that no side of its weights can explain."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, longest)
        elif any(isinstance(n, int) and n > longest for n in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name} is {value}, but no side of its weights is longer than {longest:,}")


def build_without_memory(cls, config, weights):
    """The model on the meta device, where weights have shapes but take no memory: sizes that lie cost nothing.

    raises  ValueError once it has many more weights than the file, however deep its config says it is
    """
    left = 4 * len(weights) + 1000  # some towers make a weight and replace it

    def count(module, name, weight):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the config describes far more than the {len(weights)} weights there are")

    counting = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return cls(config)
    finally:
        counting.remove()


def check_weights(wanted, weights, source):
    """Raise ValueError naming the first five weights of each kind: missing, unexpected, misshapen, no (or a) float."""
    both = [(name, weights[name], wanted[name]) for name in wanted if name in weights]
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "misshapen": [
            f"{name} {tuple(got.shape)}, expected {tuple(expected.shape)}"
            for name, got, expected in both
            if got.shape != expected.shape
        ],
        "of the wrong type": [
            f"{name} {got.dtype}, expected {expected.dtype}"
            for name, got, expected in both
            if got.is_floating_point() != expected.is_floating_point()
        ],
    }
    if any(faults.values()):
        report = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in faults.items() if names)
        raise ValueError(f"{source} does not fit the model of its config.json: {report}")


def check_token_ids(tokenizer, vocab_size, source):
    """Raise ValueError if the tokenizer can produce an id for which the text tower has no row."""
    ids = {*tokenizer.get_vocab().values(), *tokenizer.encode("").ids, tokenizer.padding["pad_id"]}
    if max(ids) >= vocab_size:
        raise ValueError(f"{source} has token id {max(ids)}, but the text tower's table ends at {vocab_size - 1}")


def find_folder(folder_or_hub_id):
    """A local folder, or a hub id's folder in huggingface_hub's cache, downloaded if need be; else ValueError.

    A hub id may end in @ and a revision.
    """
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    # name or owner/name, then perhaps @revision
    name = re.fullmatch(r"(?P<id>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", str(folder_or_hub_id))
    if not name:
        raise ValueError(f"no folder {folder_or_hub_id}")
    download = functools.partial(huggingface_hub.snapshot_download, name["id"], revision=name["revision"])
    try:
        folder = Path(download(allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"], ignore_patterns="*/*"))
        if not any(folder.glob("*.safetensors")):
            download(allow_patterns=f"{Path(PICKLE_FILE).stem}*.bin", ignore_patterns="*/*")
        return folder
    except Exception as error:
        raise ValueError(f"{folder_or_hub_id} is neither a folder nor a hub id within reach: {error}") from error


def listing(folder):
    return ", ".join(sorted(os.listdir(folder))) or "nothing"


def read_json(path):
    """The object in a json file; raises ValueError naming a file that is missing, or holds something else."""
    with blamed_on(path):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a json object was expected, not {type(values).__name__}")
        return values


def write_file(path, content):
    """Write text or bytes under a temporary name, flush, rename: afterwards the old file is there or the new one.

    raises  OSError naming the file if that fails, as on a full disk
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def lock_file(file, wait=False):
    """Hold a lock on an open file until it is closed or this process ends, whatever ends it.

    wait    for another process that holds the lock
    raises  OSError if another process holds it and there is no waiting for it
    """
    if fcntl:
        # Unlike flock's, this lock is not inherited by workers, which may outlive a killed run for seconds.
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------------------------------------------------------------
# 7  Large batches: the same numbers in less memory, or from several processes
# ---------------------------------------------------------------------------------------------------------------------

TILE = 1024  # rows and columns of the score matrix in memory at a time
KEPT_SCORES = 2**24  # scores that the tiled losses keep for backward, 64 MB in float32; the rest are computed again


def tiled_clip_loss(image_embeds, text_embeds, logit_scale, tile=TILE, sharded=False):
    """clip_loss, value and gradients, without the B x B matrix: a few tiles, and up to KEPT_SCORES scores, at a time.

    A row's cross-entropy is its log-sum-exp minus the score of the pair, and only the log-sum-exp needs the other rows.

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes picture i
    logit_scale                ()      natural log of the inverse temperature
    tile                       rows and columns of the matrix at a time
    sharded                    the rows are this process's share of the batch. The mean of the results over processes,
                               and of their gradients, is that of clip_loss on all rows; each tile is computed by one
                               process only, and only text_embeds and the columns' sums are gathered
    returns                    ()      mean loss in nats
    raises                     ValueError if the two batches differ in shape
    source                     Cheng et al. 2024, "Breaking the Memory Barrier" (Inf-CL), section 3.1
    """
    check_same_shape(image_embeds, text_embeds)
    pairs = logit_scale.exp() * (image_embeds * text_embeds).sum(dim=1)
    of_rows, over_columns = row_and_column_terms(image_embeds, text_embeds, logit_scale, tile, sharded)
    # The mean of ((log-sum-exp of the row - pair) + (log-sum-exp of the column - pair)) / 2.
    return share_of_mean(of_rows / 2 - pairs, len(over_columns), sharded) + over_columns.mean() / 2


def tiled_multi_positive_clip_loss(image_embeds, text_embeds, logit_scale, group_ids, tile=TILE, sharded=False):
    """multi_positive_clip_loss in tiles: the mean score of a group is the score of its mean caption.

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes picture i
    logit_scale                ()      natural log of the inverse temperature
    group_ids                  (B,)    integers; rows with equal ids describe each other
    tile, sharded              as in tiled_clip_loss
    returns                    ()      mean KL divergence from the shared answer, in nats
    raises                     ValueError if the batches differ in shape or group_ids is not (B,)
    """
    check_same_shape(image_embeds, text_embeds)
    check_group_ids(group_ids, image_embeds)
    of_rows, over_columns = row_and_column_terms(image_embeds, text_embeds, logit_scale, tile, sharded)
    all_texts, all_ids = text_embeds, group_ids
    if sharded:
        all_texts, all_ids = gather_embeds(text_embeds), gather_embeds(group_ids)
    ids, group_of, sizes = all_ids.unique(return_inverse=True, return_counts=True)
    mean_texts = all_texts.new_zeros(len(ids), all_texts.shape[1]).index_add(0, group_of, all_texts) / sizes[:, None]
    pairs = logit_scale.exp() * (image_embeds * mean_texts[torch.searchsorted(ids, group_ids)]).sum(dim=1)
    best_value = sizes[group_of].to(pairs.dtype).log().mean()
    return share_of_mean(of_rows / 2 - pairs, len(over_columns), sharded) + over_columns.mean() / 2 - best_value


def tiled_siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias, tile=TILE, sharded=False):
    """siglip_loss in tiles: no cell needs another one, so each tile is visited once.

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes picture i
    logit_scale, logit_bias    ()      the paper starts from ln(10) and -10
    tile, sharded              as in tiled_clip_loss
    returns                    ()      binary cross-entropy in nats, summed over the matrix, divided by B
    raises                     ValueError if the two batches differ in shape
    """
    check_same_shape(image_embeds, text_embeds)
    all_texts = gather_embeds(text_embeds) if sharded else text_embeds
    pairs = logit_scale.exp() * (image_embeds * text_embeds).sum(dim=1) + logit_bias
    # As if no cell were a pair; a cell that is one costs its logit less.
    no_pairs = TiledSoftplus.apply(image_embeds, all_texts, logit_scale, logit_bias, tile)
    return share_of_mean(no_pairs - pairs, len(all_texts), sharded)


def share_of_mean(values, count, sharded):
    """The mean of all rows' values, or this process's part of it times the process count: the parts are averaged."""
    return values.sum() * process_count() / count if sharded else values.mean()


def row_and_column_terms(image_embeds, text_embeds, logit_scale, tile, sharded):
    """The log-sum-exp of every row of logits_per_image, (R,) for R rows here, and of every column of all rows, (B,)."""
    if not sharded:
        return TiledLogSumExp.apply(image_embeds, text_embeds, logit_scale, tile)
    of_rows, of_columns = TiledLogSumExp.apply(image_embeds, gather_embeds(text_embeds), logit_scale, tile)
    return of_rows, gather_embeds(of_columns[None]).logsumexp(dim=0)


class TiledLogSumExp(torch.autograd.Function):
    """Log-sum-exp of every row (I,) and every column (N,) of exp(logit_scale) * image_embeds @ text_embeds.T.

    image_embeds (I, E), text_embeds (N, E), logit_scale (), tile as in score_tiles, which goes through the matrix.
    The gradient is made of the softmax of rows and of columns, which need the finished sums: the backward pass visits
    all tiles again, with scores kept from the forward pass as far as KEPT_SCORES reaches.

    Exercise 9  hard, 120 minutes: the loss without its matrix, forward and backward, run `pytest -k exercise_9`
    """

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, logit_scale, tile):
        of_rows = image_embeds.new_full((len(image_embeds),), -math.inf)
        of_columns = text_embeds.new_full((len(text_embeds),), -math.inf)
        ctx.tile, ctx.kept = tile, {}
        tiles = score_tiles(image_embeds, text_embeds, logit_scale.exp(), tile, ctx.kept, KEPT_SCORES)
        for rows, columns, _, scores in tiles:
            of_rows[rows] = of_rows[rows].logaddexp(scores.logsumexp(dim=1))
            of_columns[columns] = of_columns[columns].logaddexp(scores.logsumexp(dim=0))
        ctx.save_for_backward(image_embeds, text_embeds, logit_scale, of_rows, of_columns)
        return of_rows, of_columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, grad_columns):
        image_embeds, text_embeds, logit_scale, of_rows, of_columns = ctx.saved_tensors
        grad_images, grad_texts = torch.zeros_like(image_embeds), torch.zeros_like(text_embeds)
        tiles = score_tiles(image_embeds, text_embeds, logit_scale.exp(), ctx.tile, ctx.kept)
        for rows, columns, scaled, scores in tiles:
            # The slope of a row's log-sum-exp is its softmax: exp(score - log-sum-exp). A column's likewise.
            grad = (scores - of_rows[rows, None]).exp_().mul_(grad_rows[rows, None])
            grad += scores.sub_(of_columns[columns]).exp_().mul_(grad_columns[columns])
            grad_images[rows].addmm_(grad, text_embeds[columns])
            grad_texts[columns].addmm_(grad.T, scaled)
        grad_scale = sum_of_products(grad_images.mul_(logit_scale.exp()), image_embeds)
        return grad_images, grad_texts, grad_scale, None


class TiledSoftplus(torch.autograd.Function):
    """For every row of exp(logit_scale) * image_embeds @ text_embeds.T + logit_bias, the sum of ln(1 + exp(score)).

    The slope of a cell is its sigmoid, whatever the others are; only the weight of its row is not known until the
    backward pass, which visits all tiles again.
    """

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, logit_scale, logit_bias, tile):
        of_rows = image_embeds.new_zeros(len(image_embeds))
        ctx.tile, ctx.kept = tile, {}
        tiles = score_tiles(image_embeds, text_embeds, logit_scale.exp(), tile, ctx.kept, KEPT_SCORES)
        for rows, _, _, scores in tiles:
            of_rows[rows] += F.softplus(scores + logit_bias).sum(dim=1)
        ctx.save_for_backward(image_embeds, text_embeds, logit_scale, logit_bias)
        return of_rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows):
        image_embeds, text_embeds, logit_scale, logit_bias = ctx.saved_tensors
        grad_images, grad_texts = torch.zeros_like(image_embeds), torch.zeros_like(text_embeds)
        grad_bias = torch.zeros_like(logit_bias)
        tiles = score_tiles(image_embeds, text_embeds, logit_scale.exp(), ctx.tile, ctx.kept)
        for rows, columns, scaled, scores in tiles:
            grad = scores.add_(logit_bias).sigmoid_().mul_(grad_rows[rows, None])
            grad_bias += grad.sum()
            grad_images[rows].addmm_(grad, text_embeds[columns])
            grad_texts[columns].addmm_(grad.T, scaled)
        grad_scale = sum_of_products(grad_images.mul_(logit_scale.exp()), image_embeds)
        return grad_images, grad_texts, grad_scale, grad_bias, None


def sum_of_products(a, b):
    """The sum of a * b, both (B, E), without a third matrix of that size: einsum multiplies and adds at once.

    If a loss L sees y = exp(s) * x, then dy/ds = y, and dL/ds is the sum of dL/dx * x.
    """
    return torch.einsum("be,be->b", a, b).sum()


def score_tiles(image_embeds, text_embeds, scale=1.0, tile=TILE, kept=None, keep=0):
    """Yields (row slice, column slice, scale * image_embeds[rows], their scores with text_embeds[columns]).

    kept  {(top, left): scores of that tile}: what is in it is taken out and not computed again
    keep  how many scores may be put into it for the next pass; until then nobody may change them in place
    """
    kept = {} if kept is None else kept
    for top in range(0, len(image_embeds), tile):
        rows = slice(top, top + tile)
        scaled = scale * image_embeds[rows]
        for left in range(0, len(text_embeds), tile):
            columns = slice(left, left + tile)
            scores = kept.pop((top, left), None)
            if scores is None:
                scores = scaled @ text_embeds[columns].T
                if (len(kept) + 1) * tile**2 <= keep:
                    kept[top, left] = scores
            yield rows, columns, scaled, scores


def cached_backward(embed, pieces, loss_of, loss_weights=()):
    """The exact gradient of a large batch in the memory of a small one (gradient caching).

    Adding up the gradients of small batches would not do: each pair needs all others as wrong answers, and the sum of
    small losses is another objective. But the loss needs only embeddings, which are small. So every piece is embedded
    without a graph, the loss of the whole batch gives the gradient of each embedding, and a second pass through each
    piece, with the same dropout, carries it into the weights.

    embed         function of a piece: image_embeds (b, E) and text_embeds (b, E). If it is a module, the first pass
                  leaves its buffers as they were: batch norm counts each picture once. A DistributedDataParallel module
                  averages its gradients once, with the last piece
    pieces        a sequence of what embed takes
    loss_of       function of image_embeds (B, E) and text_embeds (B, E): the loss () of the whole batch
    loss_weights  what the loss learns beside the embeddings: logit_scale, logit_bias
    returns       the loss (), image_embeds (B, E) and text_embeds (B, E), without graph. Gradients are added to .grad
                  of every weight, and torch's random generators are seeded anew
    source        Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3
    Exercise 10   hard, 90 minutes: a large batch's gradient in two passes, run `pytest -k exercise_10`
    """
    seeds = torch.randint(2**62, (len(pieces),)).tolist()
    restore_buffers = remember_buffers(embed)
    with torch.no_grad():
        embeds = []
        for piece, seed in zip(pieces, seeds):
            torch.manual_seed(seed)
            embeds.append(embed(piece))
    restore_buffers()
    image_embeds, text_embeds = (torch.cat(side).requires_grad_() for side in zip(*embeds))
    loss = loss_of(image_embeds, text_embeds)
    grad_images, grad_texts, *grad_weights = torch.autograd.grad(loss, [image_embeds, text_embeds, *loss_weights])
    done = 0
    for number, (piece, seed) in enumerate(zip(pieces, seeds), start=1):
        last = number == len(pieces)
        # A DistributedDataParallel module adds gradients up inside no_sync, and averages them outside of it.
        with nullcontext() if last else getattr(embed, "no_sync", nullcontext)():
            torch.manual_seed(seed)
            images, texts = embed(piece)
            part = slice(done, done + len(images))
            done = part.stop
            # A scalar whose gradient is the cached one.
            proxy = (images * grad_images[part]).sum() + (texts * grad_texts[part]).sum()
            if last:  # once, and by way of backward, so that DistributedDataParallel averages these too
                proxy = proxy + sum((weight * grad).sum() for weight, grad in zip(loss_weights, grad_weights))
            proxy.backward()
    return loss.detach(), image_embeds.detach(), text_embeds.detach()


def remember_buffers(module):
    """A function that sets a module's buffers, batch norm's statistics above all, back to what they are now."""
    buffers = list(getattr(module, "buffers", list)())
    before = [buffer.clone() for buffer in buffers]

    def restore():
        for buffer, old in zip(buffers, before):
            buffer.copy_(old)

    return restore


def recompute_activations(model):
    """From now on a DualEncoder's layers keep only their input for the backward pass, which computes the rest again.

    Same gradients in less memory, for about a third more time; dropout draws the same again. A locked tower keeps
    nothing anyway and is left alone. The last block of a ViT that pools its first token handles that token alone, and
    keeps all.

    raises  ValueError for a vision tower that timm cannot do this for
    source  Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"
    """
    if "vision" not in model.locked:
        try:
            model.vision_model.trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"timm cannot recompute activations of {model.config.vision.name}: leave out --grad-checkpointing"
            ) from error
        for module in model.vision_model.trunk.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(functools.partial(count_pictures_once, module.momentum))
    if "text" not in model.locked:
        for layer in model.text_model.encoder["layer"]:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def count_pictures_once(momentum, batch_norm, inputs):
    """Before a batch norm's forward: its statistics move by momentum, but not where the backward pass repeats it."""
    repeated = torch._C._current_graph_task_id() != -1  # torch's number for: no backward pass
    batch_norm.momentum = 0.0 if repeated else momentum
    if repeated and batch_norm.training:
        batch_norm.num_batches_tracked -= 1  # and it adds one again


def process_count():
    """Processes of a torchrun job, or 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def process_rank():
    """Which process of a torchrun job this is, counted from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def shares(count, parts):
    """Slices that cut `count` things in a row into parts, as even as can be."""
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def share(count):
    """The slice of `count` things in a row that falls to this process."""
    return shares(count, process_count())[process_rank()]


def sum_over_processes(values):
    """The sum of a tensor over the processes, the same in each."""
    total = values.clone()
    if process_count() > 1:
        torch.distributed.all_reduce(total)
    return total


def tell_all(news):
    """The news of all processes as one list, the same in each; cheap while nobody has any. All of them must call it.

    news     anything that can be pickled; None for nothing
    returns  the news of all processes that have some, in the order of their ranks
    """
    if not sum_over_processes(torch.tensor(int(news is not None))):
        return []
    told = [news] * process_count()
    if process_count() > 1:
        torch.distributed.all_gather_object(told, news)
    return [one for one in told if one is not None]


@contextmanager
def together():
    """A ValueError or OSError inside, in whichever process, is raised in all of them: none waits for one that stopped.

    Every process must come here, and nothing inside may wait for another process. Any other error ends this process,
    and torchrun the others.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as failure:
        error = failure
    for first in tell_all(error):
        raise first


@contextmanager
def process_group():
    """Inside, the processes that torchrun started know each other, and all but the first are silent.

    After an error the group is not taken down, which could wait for the others for ever: torchrun ends them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's choice, whatever the machine
        torch.set_num_threads(own_cores())
    with warnings.catch_warnings(), redirect_stdout(sys.stdout if process_rank() == 0 else None):
        if process_rank() > 0:
            warnings.simplefilter("ignore")
        yield
    torch.distributed.destroy_process_group()


def own_cores():
    """How many of the machine's cores are there for each of its processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def gather_embeds(embeds):
    """Every process's rows, with gradients; the identity in one process.

    What each process's loss makes of a row comes back, summed, to the process that owns the row. So if every process
    computes the loss of all gathered rows, each gets its own rows' gradient times the number of processes, and the mean
    over processes that DistributedDataParallel takes is the gradient of the whole batch.

    embeds   (R, ...)  this process's rows; R may differ between processes, the rest may not
    returns  (B, ...)  the rows of all processes, in the order of their ranks
    """
    return embeds if process_count() == 1 else GatherRows.apply(embeds)


class GatherRows(torch.autograd.Function):
    """See gather_embeds.

    Exercise 11  hard, 60 minutes: rows of all processes, with gradients, run `pytest -k exercise_11`
    """

    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(process_count())]
        torch.distributed.all_gather(counts, count)
        counts = torch.cat(counts).tolist()
        ctx.mine = slice(sum(counts[: process_rank()]), sum(counts[: process_rank() + 1]))
        # Processes must send tensors of one shape: short shares are filled up.
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, counts)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return sum_over_processes(grad.contiguous())[ctx.mine]


# ---------------------------------------------------------------------------------------------------------------------
# 9  Interchange with transformers
# ---------------------------------------------------------------------------------------------------------------------
#
# Reading and writing go through the same tables. A family's `names` says what our tensors are called in its files, N
# being the layer. {a,b,c} on one side means that several tensors stand for one on the other: laid end to end along
# their first dimension, both sides are the same numbers. So timm's one attn.qkv.weight is query.weight, key.weight and
# value.weight in the files. A module's entry serves its weight and its bias; of several entries that fit, the longest
# counts. What a table does not list has the same name on both sides.

PUBLISHED_TYPE = "vision-text-dual-encoder"
POOLER = "pooler.dense.weight"  # ViT's and DeiT's, which published checkpoints often lack


@dataclass(frozen=True)
class Published:
    """How transformers writes a family of towers.

    prefix    what its tensor names start with in a checkpoint that has a task head as well
    names     our tensor or module name: theirs
    defaults  what config.json may leave out; for text towers in the words of TextConfig
    keys      text towers: field of TextConfig: key of config.json
    """

    prefix: str
    names: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)


def _without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


_VIT_NAMES = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "mask_token": "embeddings.mask_token",
    "reg_token": "embeddings.register_tokens",  # of timm's own models
    "norm_pre.tokens": "embeddings.register_tokens",  # of ours: Registers
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "rel_pos_bias": "encoder.relative_position_bias",
    "blocks.N.norm1": "encoder.layer.N.layernorm_before",
    "blocks.N.norm2": "encoder.layer.N.layernorm_after",
    "blocks.N.attn.qkv": "encoder.layer.N.attention.attention.{query,key,value}",
    "blocks.N.attn.q_bias": "encoder.layer.N.attention.attention.query.bias",
    "blocks.N.attn.v_bias": "encoder.layer.N.attention.attention.value.bias",
    "blocks.N.attn.relative_position_bias_table": (
        "encoder.layer.N.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "blocks.N.attn.proj": "encoder.layer.N.attention.output.dense",
    "blocks.N.mlp.fc1": "encoder.layer.N.intermediate.dense",
    "blocks.N.mlp.fc2": "encoder.layer.N.output.dense",
    "blocks.N.gamma_1": "encoder.layer.N.lambda_1",
    "blocks.N.gamma_2": "encoder.layer.N.lambda_2",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",  # BEiT's files call the norm after its mean pooling a pooler
}
_DINO_NAMES = _VIT_NAMES | {
    "blocks.N.norm1": "encoder.layer.N.norm1",
    "blocks.N.norm2": "encoder.layer.N.norm2",
    "blocks.N.mlp": "encoder.layer.N.mlp",
    "blocks.N.mlp.fc1": "encoder.layer.N.mlp.fc1",
    "blocks.N.mlp.fc2": "encoder.layer.N.mlp.fc2",
    "blocks.N.ls1.gamma": "encoder.layer.N.layer_scale1.lambda1",
    "blocks.N.ls2.gamma": "encoder.layer.N.layer_scale2.lambda1",
}
_SWIGLU_NAMES = {
    "blocks.N.mlp.fc1": "encoder.layer.N.mlp.weights_in",
    "blocks.N.mlp.fc2": "encoder.layer.N.mlp.weights_out",
}
_CLIP_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",  # the spelling is theirs
    "blocks.N.norm1": "encoder.layers.N.layer_norm1",
    "blocks.N.norm2": "encoder.layers.N.layer_norm2",
    "blocks.N.attn.qkv": "encoder.layers.N.self_attn.{q_proj,k_proj,v_proj}",
    "blocks.N.attn.proj": "encoder.layers.N.self_attn.out_proj",
    "blocks.N.mlp": "encoder.layers.N.mlp",
    "norm": "post_layernorm",  # timm's models have one of these two: before pooling, or after it
    "fc_norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.{q,kv}.weight": "head.attention.in_proj_weight",
    "attn_pool.{q,kv}.bias": "head.attention.in_proj_bias",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp": "head.mlp",
}
# Tensors that have fewer dimensions in the files: ours begin with ones.
_FILE_DIMENSIONS = {"embeddings.class_embedding": 1, "embeddings.position_embedding.weight": 2}

_VIT_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_act": "tanh",
}
_BEIT_DEFAULTS = _without(_VIT_DEFAULTS, "qkv_bias", "pooler_act") | {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
    "use_mean_pooling": True,
}
_DINO_DEFAULTS = _without(_VIT_DEFAULTS, "intermediate_size", "pooler_act") | {
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-5,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
_SIGLIP_DEFAULTS = _CLIP_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16}
_REGISTER_DEFAULTS = _DINO_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4}

PUBLISHED_VISION = {
    "vit": Published("vit.", _VIT_NAMES, _VIT_DEFAULTS),
    "deit": Published("deit.", _VIT_NAMES, _VIT_DEFAULTS),
    "beit": Published("beit.", _VIT_NAMES, _BEIT_DEFAULTS),
    "clip_vision_model": Published("vision_model.", _CLIP_NAMES, _CLIP_DEFAULTS),
    "siglip_vision_model": Published("vision_model.", _CLIP_NAMES, _SIGLIP_DEFAULTS),
    "dinov2": Published("dinov2.", _DINO_NAMES, _DINO_DEFAULTS),
    "dinov2_with_registers": Published("dinov2_with_registers.", _DINO_NAMES, _REGISTER_DEFAULTS),
}
# The image processor class of each family; DINOv2's two use "Bit".
_PROCESSOR_OF = {
    "vit": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "Siglip",
}

_BERT_KEYS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_ELECTRA_KEYS = _BERT_KEYS | {"embedding_width": "embedding_size"}
_ALBERT_KEYS = _ELECTRA_KEYS | {"layer_groups": "num_hidden_groups"}
_MPNET_KEYS = _without(_BERT_KEYS, "pad_token_id", "type_vocab_size")
_DISTILBERT_KEYS = {
    "width": "dim",
    "depth": "n_layers",
    "heads": "n_heads",
    "mlp_width": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
    "activation": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
_BERT_DEFAULTS = {"mlp_width": 3072, "dropout": 0.1, "attention_dropout": 0.1}  # the rest is as in TextConfig
_ROBERTA_DEFAULTS = _BERT_DEFAULTS | {"pad_token_id": 1}
_ALBERT_DEFAULTS = {
    "width": 4096,
    "heads": 64,
    "mlp_width": 16384,
    "embedding_width": 128,
    "vocab_size": 30000,
    "activation": "gelu_new",
    "layer_groups": 1,
}
_ALBERT_LAYER = "encoder.albert_layer_groups.N.albert_layers.0."
_ALBERT_NAMES = {
    "embeddings_project": "encoder.embedding_hidden_mapping_in",
    "encoder.layer.N.attention.self": _ALBERT_LAYER + "attention",
    "encoder.layer.N.attention.output": _ALBERT_LAYER + "attention",
    "encoder.layer.N.intermediate.dense": _ALBERT_LAYER + "ffn",
    "encoder.layer.N.output.dense": _ALBERT_LAYER + "ffn_output",
    "encoder.layer.N.output.LayerNorm": _ALBERT_LAYER + "full_layer_layer_norm",
    "pooler.dense": "pooler",
}
_MPNET_NAMES = {
    "encoder.layer.N.attention.self.query": "encoder.layer.N.attention.attn.q",
    "encoder.layer.N.attention.self.key": "encoder.layer.N.attention.attn.k",
    "encoder.layer.N.attention.self.value": "encoder.layer.N.attention.attn.v",
    "encoder.layer.N.attention.output.dense": "encoder.layer.N.attention.attn.o",
    "encoder.layer.N.attention.output.LayerNorm": "encoder.layer.N.attention.LayerNorm",
}
_DISTILBERT_NAMES = {
    "encoder.layer.N.attention.self.query": "transformer.layer.N.attention.q_lin",
    "encoder.layer.N.attention.self.key": "transformer.layer.N.attention.k_lin",
    "encoder.layer.N.attention.self.value": "transformer.layer.N.attention.v_lin",
    "encoder.layer.N.attention.output.dense": "transformer.layer.N.attention.out_lin",
    "encoder.layer.N.attention.output.LayerNorm": "transformer.layer.N.sa_layer_norm",
    "encoder.layer.N.intermediate.dense": "transformer.layer.N.ffn.lin1",
    "encoder.layer.N.output.dense": "transformer.layer.N.ffn.lin2",
    "encoder.layer.N.output.LayerNorm": "transformer.layer.N.output_layer_norm",
}
PUBLISHED_TEXT = {
    "bert": Published("bert.", {}, _BERT_DEFAULTS, _BERT_KEYS),
    "roberta": Published("roberta.", {}, _ROBERTA_DEFAULTS | {"vocab_size": 50265}, _BERT_KEYS),
    "xlm-roberta": Published("roberta.", {}, _ROBERTA_DEFAULTS, _BERT_KEYS),
    "camembert": Published("roberta.", {}, _ROBERTA_DEFAULTS, _BERT_KEYS),
    "albert": Published("albert.", _ALBERT_NAMES, _ALBERT_DEFAULTS, _ALBERT_KEYS),
    "mpnet": Published(
        "mpnet.", _MPNET_NAMES, _ROBERTA_DEFAULTS | {"vocab_size": 30527, "type_vocab_size": 0}, _MPNET_KEYS
    ),
    "distilbert": Published(
        "distilbert.", _DISTILBERT_NAMES, _BERT_DEFAULTS | {"depth": 6, "type_vocab_size": 0}, _DISTILBERT_KEYS
    ),
    "electra": Published(
        "electra.",
        {},
        _BERT_DEFAULTS | {"width": 256, "heads": 4, "mlp_width": 1024, "embedding_width": 128},
        _ELECTRA_KEYS,
    ),
}

# ---- Tensors --------------------------------------------------------------------------------------------------------


def translate(name, names):
    """The file's names for our tensor, several if it is cut into them along its first side; see the tables' note.

    blocks.3.attn.qkv.bias -> [encoder.layer.3.attention.attention.query.bias, ...key.bias, ...value.bias]
    """
    layer = re.search(r"\.(\d+)\.", name)
    general = name.replace(layer[0], ".N.", 1) if layer else name
    # The longest entry wins: blocks.N.mlp.fc1 before blocks.N.mlp.
    for ours in sorted(names, key=len, reverse=True):
        for part in spell_out(ours):
            if general == part or general.startswith(part + "."):
                theirs = [n + general[len(part) :] for n in spell_out(names[ours])]
                return [n.replace(".N.", layer[0], 1) if layer else n for n in theirs]
    return [name]


def spell_out(pattern):
    """a.{b,c}.d -> [a.b.d, a.c.d]"""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [pattern]


@torch.no_grad()
def published_views(tower, names):
    """{name in a published file: [pieces]}: views of the tower's own tensors that, end to end, are that tensor.

    They share the tower's memory, so copying into a piece loads it. The pieces of one tensor come in the tower's order,
    which is also the file's.
    """
    views = {}
    for name, tensor in tower.state_dict().items():
        theirs = translate(name.removeprefix("trunk."), names)
        for their_name, piece in zip(theirs, tensor.chunk(len(theirs))):
            dimensions = _FILE_DIMENSIONS.get(their_name, piece.ndim)
            views.setdefault(their_name, []).append(piece.reshape(piece.shape[piece.ndim - dimensions :]))
    return views


def views_of(module):
    """published_views of a tower of ours in its family's names, or of a whole DualEncoder."""
    if isinstance(module, TextEncoder):
        return published_views(module, PUBLISHED_TEXT[module.config.family].names)
    if isinstance(module, VisionEncoder):
        names = PUBLISHED_VISION[module.config.name].names
        return published_views(module, names | _SWIGLU_NAMES if module.config.args.get("use_swiglu_ffn") else names)
    return dual_encoder_views(module, views_of(module.vision_model))


def dual_encoder_views(model, vision_views):
    """The views of a whole model; vision_views are those of its vision tower."""
    towers = {"vision_model": vision_views, "text_model": views_of(model.text_model)}
    views = {f"{tower}.{name}": pieces for tower, of_tower in towers.items() for name, pieces in of_tower.items()}
    for name, tensor in model.state_dict().items():
        if name.partition(".")[0] not in towers:
            views[name] = [tensor]
    return views


@torch.no_grad()
def build_filled(cls, config, weights, source):
    """cls(config) with the weights of a published file.

    Sizes are compared before any memory is taken, and no time goes into random weights that are then overwritten.

    raises  ValueError unless the weights fit exactly
    """
    with blamed_on(source, "cannot build the model of"):
        module = build_without_memory(cls, config, weights)
    check_weights({name: join(pieces) for name, pieces in views_of(module).items()}, weights, source)
    module.to_empty(device="cpu")  # from no memory to memory with anything in it
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):  # timm's: tables that are computed, and in no file
            part.init_non_persistent_buffers()
    for name, pieces in views_of(module).items():
        parts = weights[name].split([len(piece) for piece in pieces]) if len(pieces) > 1 else [weights[name]]
        for piece, part in zip(pieces, parts):
            piece.copy_(part)  # into the module, whose memory the pieces share
    return module


def join(pieces):
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def read_published_weights(folder):
    """{name: tensor} from model.safetensors or pytorch_model.bin, whole or in shards; memory-mapped where possible.

    The oldest names of LayerNorm tensors are brought up to date, and tables that can be computed are left out.
    """
    shards = []
    for name in (PICKLE_FILE, WEIGHTS_FILE):  # the latter counts if there are both
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))  # {tensor's name: its shard}
        elif (folder / name).is_file():
            shards = [name]
    if not shards:
        expected = f"expected {WEIGHTS_FILE} or {PICKLE_FILE}"
        raise ValueError(f"no weights in {folder}: {expected}, it holds {listing(folder)}")
    weights = {key: tensor for shard in shards for key, tensor in read_shard(checkpoint_file(folder, shard)).items()}
    old = {".gamma": ".weight", ".beta": ".bias"}
    computed = (".position_ids", ".token_type_ids", "_position_index")
    weights = {re.sub(r"\.(gamma|beta)$", lambda end: old[end[0]], key): tensor for key, tensor in weights.items()}
    return {key: tensor for key, tensor in weights.items() if not key.endswith(computed)}


def read_shard(path):
    with blamed_on(path, "cannot read weights"):
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another form, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


# ---- Reading --------------------------------------------------------------------------------------------------------


def load_published_dual_encoder(cls, folder, values):
    """The DualEncoder of a transformers VisionTextDualEncoder folder; values is its config.json."""
    weights = {
        # Some versions of transformers nest CLIP and SigLIP towers once more than others.
        re.sub(r"^vision_model\.vision_model\.", "vision_model.", name): tensor
        for name, tensor in read_published_weights(folder).items()
    }
    # In transformers a dual encoder's towers always have a pooler. Taken for granted here, it is reported if missing.
    of_vision = {name.removeprefix("vision_model.") for name in weights} | {POOLER}
    with blamed_on(folder / CONFIG_FILE, "cannot build the model of"):
        config = DualEncoderConfig(
            vision=read_vision_config(values.get("vision_config") or {}, of_vision),
            text=read_text_config(values.get("text_config") or {}, {"pooling": "pooler"}),
            projection_dim=values.get("projection_dim", DualEncoderConfig.projection_dim),
            logit_scale_init=float(values.get("logit_scale_init_value", LOGIT_SCALE_INIT)),
        )
    return build_filled(cls, config, weights, folder)


def read_vision_config(values, tensors=(), overrides=None):
    """A VisionConfig from the config.json of a vision tower, or of a model that contains one (CLIP, SigLIP).

    raises     ValueError for another model, and for pictures that transformers cannot compute in a square of positions
    tensors    names of those that the checkpoint has: no config.json tells of a mask token or a pooler
    overrides  fields of VisionConfig
    """
    if values.get("model_type") in ("clip", "siglip"):
        values = {**values["vision_config"], "model_type": values["model_type"] + "_vision_model"}
    name = values.get("model_type")
    one_of("vision model_type", name, PUBLISHED_VISION)
    defaults = PUBLISHED_VISION[name].defaults
    args = {key: default if values.get(key) is None else values[key] for key, default in defaults.items()}
    # The newest transformers insists on the point in 0.0 when it reads what we write.
    args = {key: float(value) if isinstance(defaults[key], float) else value for key, value in args.items()}
    one_of("activation", args["hidden_act"], ACTIVATIONS)
    channels, height_width = args.pop("num_channels"), as_pair(args.pop("image_size"))
    of_positions = [key for key, value in args.items() if "position" in key and value]  # BEiT's use_..._position_...
    if height_width[0] != height_width[1] and (name not in ("vit", "deit", "beit") or of_positions):
        because = f" with {', '.join(of_positions)}" if of_positions else ""
        raise ValueError(
            f"a {name} tower{because} for pictures of {height_width[0]} x {height_width[1]} pixels: transformers lays "
            f"its positions out as a square, so there is nothing to reproduce; only square pictures are supported"
        )
    if "embeddings.mask_token" in tensors:
        args["use_mask_token"] = True
    found = {"name": name, "image_size": height_width, "channels": channels, **(overrides or {})}
    if "pooler_act" in args:
        found.setdefault("pooling", "pooler" if POOLER in tensors else "token")
    return build(VisionConfig, {**found, "args": args | found.get("args", {})})


def read_text_config(values, overrides):
    """A TextConfig from the config.json of a text tower; raises ValueError for models that compute something else."""
    family = values.get("model_type")
    one_of("text model_type", family, PUBLISHED_TEXT)
    published = PUBLISHED_TEXT[family]
    for key, accepted in (
        ("position_embedding_type", ("absolute", None)),
        ("is_decoder", (False, None)),
        ("add_cross_attention", (False, None)),
        ("inner_group_num", (1, None)),
    ):
        if values.get(key) not in accepted:
            raise ValueError(f"this {family} has {key} = {values[key]!r}; only {accepted[0]!r} is supported")
    found = {name: values[key] for name, key in published.keys.items() if values.get(key) is not None}
    return build(TextConfig, {"family": family, **published.defaults, **found, **overrides})


def load_text_encoder(cls, folder, overrides):
    """See TextEncoder.from_pretrained."""
    values = read_json(folder / CONFIG_FILE)
    with blamed_on(folder / CONFIG_FILE, "cannot build the model of"):
        family = read_text_config(values, {}).family
    weights, left_out = tower_weights(folder, PUBLISHED_TEXT[family].prefix)
    has_pooler = any(name.startswith("pooler.") for name in weights)
    config = read_text_config(values, {"pooling": "pooler" if has_pooler else "cls", **overrides})
    return load_tower(cls, config, weights, left_out, folder)


def load_vision_encoder(folder, overrides):
    """A VisionEncoder from a transformers folder; see DualEncoder.from_vision_text_pretrained."""
    values = read_json(folder / CONFIG_FILE)
    if "architecture" in values:
        raise ValueError(f"{folder} holds a timm model: write hf-hub: before its hub id, or name the timm model")
    image_size = overrides.pop("image_size", None)
    with blamed_on(folder / CONFIG_FILE, "cannot build the model of"):
        family = read_vision_config(values).name
    weights, left_out = tower_weights(folder, PUBLISHED_VISION[family].prefix)
    config = read_vision_config(values, weights, overrides)
    tower = load_tower(VisionEncoder, config, weights, left_out, folder)
    own_transform = read_image_transform(folder) if find_image_processor(folder) else None
    if image_size and as_pair(image_size) != as_pair(config.image_size):
        tower.trunk.set_input_size(img_size=as_pair(image_size))
        tower.config = dataclasses.replace(config, image_size=image_size)
        tower.image_size = tower.config.image_size
        if own_transform:  # of the folder's file all but the sizes, which are the family's for such pictures
            sized = tower.image_transform()
            own_transform = dataclasses.replace(own_transform, resize=sized.resize, crop=sized.crop)
    tower.own_transform = own_transform
    return tower


def tower_weights(folder, prefix):
    """({name: tensor} of the tower alone, the names of what belongs to task heads)"""
    weights = read_published_weights(folder)
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return (inside, [name for name in weights if not name.startswith(prefix)]) if inside else (weights, [])


def load_tower(cls, config, weights, left_out, folder):
    """A tower with its weights; says in one line what was left out: task heads, and a pooler that is not used."""
    # What BEiT's files call pooler is the norm that its mean pooling ends with.
    has_pooler = isinstance(config, TextConfig) or "pooler_act" in config.args
    if has_pooler and config.pooling != "pooler":
        unused = {name for name in weights if name.startswith("pooler.")}
        weights = {name: tensor for name, tensor in weights.items() if name not in unused}
        left_out = left_out + sorted(unused)
    if left_out:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        message = f"{folder}: {len(left_out)} tensors are no part of the tower and were left out: {shown}"
        warnings.warn(message, stacklevel=4)
    return build_filled(cls, config, weights, folder)


# ---- Writing --------------------------------------------------------------------------------------------------------


def publish_dual_encoder(model):
    """(config.json, {name: tensor}) of a model as transformers writes it; raises ValueError if it has no such form."""
    text = model.config.text
    if model.config.logit_bias_init is not None:
        raise ValueError(
            "transformers' dual encoder has no logit_bias: a model trained with siglip_loss stays in dualenc"
        )
    if text.pooling != "pooler" or text.family in ("distilbert", "electra"):
        raise ValueError(
            f"transformers' dual encoder has no form of a {text.family} tower that pools by {text.pooling!r}: it pools "
            f"with a dense layer and tanh on the first token, and takes no distilbert or electra; train with "
            f"text_pooling='pooler' on another family"
        )
    published = PUBLISHED_TEXT[text.family]
    text_config = {key: getattr(text, name) for name, key in published.keys.items()}
    if "num_hidden_groups" in text_config:
        text_config["num_hidden_groups"] = text.layer_groups or text.depth
    vision_config, vision_views = publish_vision_tower(model.vision_model)
    config = {
        "model_type": PUBLISHED_TYPE,
        "architectures": ["VisionTextDualEncoderModel"],
        "projection_dim": model.config.projection_dim,
        "logit_scale_init_value": model.config.logit_scale_init,
        "vision_config": vision_config,
        "text_config": {"model_type": text.family, **text_config},
        "torch_dtype": str(model.logit_scale.dtype).removeprefix("torch."),
    }
    views = dual_encoder_views(model, vision_views)
    if PUBLISHED_VISION[vision_config["model_type"]].prefix == "vision_model.":
        # CLIP and SigLIP: their vision_model.vision_model.* is a model in a model. All versions of transformers read
        # this, and only the newest ones a single prefix.
        views = {("vision_model." if n.startswith("vision_model.") else "") + n: pieces for n, pieces in views.items()}
    return config, {name: join(pieces) for name, pieces in views.items()}


def publish_vision_tower(tower):
    """(vision_config, views) of a vision tower; raises ValueError for towers that transformers has no form for."""
    config = tower.config
    without_pooler = config.name in ("vit", "deit") and config.pooling != "pooler"
    if without_pooler or config.name not in PUBLISHED_VISION:  # transformers' ViT and DeiT always use their pooler
        return publish_timm_tower(tower)
    values = {"use_mask_token": False, **config.args, "image_size": config.image_size, "num_channels": config.channels}
    return {"model_type": config.name, **values}, views_of(tower)


def publish_timm_tower(tower):
    """publish_vision_tower for a timm ViT: its weights under the names of a family that computes the same.

    transformers' own ViT and DeiT pool by a dense layer and tanh, which timm's lack. What a ViT pools decides instead:
        first token  DINOv2, its layer scales all 1; with registers; or CLIP where a norm precedes the blocks
        mean         BEiT
        attention    SigLIP
    A twin loaded from what would be written must give the same features for random pictures.
    """
    trunk, reason = tower.trunk, f"transformers has no form of {tower.config.name} (pooling {tower.config.pooling!r})"
    is_vit = isinstance(trunk, (timm.models.VisionTransformer, timm.models.Beit))
    if not is_vit or not hasattr(trunk.blocks[0], "mlp"):  # ViTs with parallel blocks have none
        raise ValueError(f"{reason}; plain ViTs can be written, convolutions and other shapes cannot")
    values = describe_timm_vit(trunk)
    family = values["model_type"]
    try:
        # transformers' DINOv2 with registers has a mask token in any case.
        config = read_vision_config(values, {"embeddings.mask_token"} if family == "dinov2_with_registers" else ())
        with torch.device("meta"):  # an empty tower of the family, for the shapes in its file
            shapes = {name: join(pieces).shape for name, pieces in views_of(VisionEncoder(config)).items()}
        views = published_views(tower, PUBLISHED_VISION[family].names)
        positions = shapes.get("embeddings.position_embeddings")
        if positions and trunk.pos_embed is not None and trunk.pos_embed.shape[1] == positions[1] - 1:
            # This ViT gives its class token no position, which is one of zeros.
            views["embeddings.position_embeddings"] = [F.pad(trunk.pos_embed.detach(), (0, 0, 1, 0))]
        for name, shape in shapes.items():
            # What the family has and a plain ViT lacks: ones that multiply (layer scales), zeros that are added.
            if "lambda" in name:
                views.setdefault(name, [torch.ones(shape)])
            elif name.endswith(("query.bias", "value.bias", "mask_token")):
                views.setdefault(name, [torch.zeros(shape)])
        if family == "beit":  # has no key bias: it adds the same to a row's scores, which softmax ignores
            views = {name: pieces for name, pieces in views.items() if not name.endswith("key.bias")}
        joined = {name: join(pieces) for name, pieces in views.items()}
        twin = build_filled(VisionEncoder, config, joined, f"the nearest one, {family},").eval()
    except ValueError as error:
        raise ValueError(f"{reason}: {error}") from error
    if not computes_the_same(tower, twin):
        raise ValueError(f"{reason}: the nearest one, {family}, computes something else")
    return publish_vision_tower(twin)[0], views


def describe_timm_vit(trunk):
    """The config.json of the published family that is nearest to a timm ViT; see publish_timm_tower."""
    block = trunk.blocks[0]
    width, mlp_width, points = trunk.embed_dim, block.mlp.fc1.out_features, torch.linspace(-4, 4, 99)
    values = {
        "hidden_size": width,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": mlp_width,
        "hidden_act": next(  # timm's modules have no published name: values are compared
            (n for n, f in ACTIVATIONS.items() if torch.allclose(f(points), block.mlp.act(points), atol=1e-6)),
            "unknown",
        ),
        "layer_norm_eps": block.norm1.eps,
        "image_size": as_size(*trunk.patch_embed.img_size),
        "patch_size": trunk.patch_embed.patch_size[0],
        "num_channels": trunk.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if trunk.global_pool == "map":
        return {"model_type": "siglip_vision_model", **values}
    if isinstance(trunk, timm.models.Beit) or trunk.global_pool == "avg":
        return {
            "model_type": "beit",
            "use_absolute_position_embeddings": trunk.pos_embed is not None,
            "use_relative_position_bias": getattr(block.attn, "relative_position_bias_table", None) is not None,
            "use_shared_relative_position_bias": getattr(trunk, "rel_pos_bias", None) is not None,
            "layer_scale_init_value": float(getattr(block, "gamma_1", None) is not None),  # above 0: there is one
            "use_mean_pooling": trunk.global_pool == "avg",
            **values,
        }
    if isinstance(trunk.norm_pre, nn.LayerNorm):
        return {"model_type": "clip_vision_model", **values}
    registers = {"num_register_tokens": trunk.num_reg_tokens} if trunk.num_reg_tokens else {}
    family = "dinov2_with_registers" if registers else "dinov2"
    return {"model_type": family, "mlp_ratio": mlp_width // width, **registers, **values}


@torch.no_grad()
def computes_the_same(tower, twin):
    """Whether two vision towers pool random pictures to the same features, up to the rounding of two ways to sum."""
    weight, was_training = next(tower.parameters()), tower.training
    own = torch.Generator().manual_seed(0)  # saving must not change what a training run draws next
    pictures = torch.randn(2, tower.config.channels, *as_pair(tower.image_size), generator=own)
    ours = tower.eval()(pictures.to(weight.device, weight.dtype)).pooler_output.float().cpu()
    tower.train(was_training)
    theirs = twin(pictures).pooler_output
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


# ---- Image processors and tokenizers --------------------------------------------------------------------------------


def find_image_processor(folder):
    """(file, settings in it) of a folder's image processor, the newer form if there are two; None if there is none."""
    for name in ("processor_config.json", PICTURES_FILE):
        if (folder / name).is_file():
            values = read_json(checkpoint_file(folder, name))
            if name == PICTURES_FILE or "image_processor" in values:
                return folder / name, values.get("image_processor", values)
    return None


def read_image_transform(folder):
    """The ImageTransform that a folder's files describe."""
    found = find_image_processor(folder)
    if found is None:
        raise ValueError(f"cannot read {folder / PICTURES_FILE}: there is none; the folder holds {listing(folder)}")
    with blamed_on(found[0]):
        return ImageTransform.from_dict(found[1])


def published_transform(family, image_size, channels):
    """The ImageTransform of a family's image processor with the class's own settings, its sizes made for image_size."""
    transform = ImageTransform.from_dict({"image_processor_type": _PROCESSOR_OF.get(family, "Bit")})
    resized, cropped = as_pair(transform.resize), transform.crop or as_pair(transform.resize)
    resize = tuple(side * new // old for side, new, old in zip(as_pair(image_size), resized, cropped))
    resize = min(resize) if isinstance(transform.resize, int) else resize
    mean, std = (channel_values(values, channels) for values in (transform.mean, transform.std))
    crop = transform.crop and as_pair(image_size)
    return dataclasses.replace(transform, resize=resize, crop=crop, mean=mean, std=std)


# The files that a tokenizer can be read from, the first one there is.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
SPECIAL_TOKENS = {
    "bert": "[PAD] [UNK] [CLS] [SEP] [MASK]",
    "distilbert": "[PAD] [UNK] [CLS] [SEP] [MASK]",
    "electra": "[PAD] [UNK] [CLS] [SEP] [MASK]",
    "albert": "<pad> <unk> [CLS] [SEP] [MASK]",
    "mpnet": "<pad> [UNK] <s> </s> <mask>",
    "roberta": "<pad> <unk> <s> </s> <mask>",
    "xlmroberta": "<pad> <unk> <s> </s> <mask>",
    "camembert": "<pad> <unk> <s> </s> <mask>",
}
SPECIAL_NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
WITHOUT_TOKEN_TYPES = {"roberta", "xlmroberta", "camembert", "distilbert", "mpnet"}
BERT_NORMALIZED = {"bert", "distilbert", "electra", "mpnet"}


def find_tokenizer(folder):
    """The file of a folder to read its tokenizer from, or None."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def read_tokenizer(folder):
    """(tokenizers.Tokenizer with padding and truncation, whether it gives token types) from a checkpoint's files.

    raises  ValueError if there is no file to read it from, or no padding token
    """
    path = find_tokenizer(folder)
    if path is None:
        raise ValueError(f"no tokenizer in {folder}: expected {', '.join(TOKENIZER_FILES)}; it holds {listing(folder)}")
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / name) if (folder / name).is_file() else {}
    if path.name == "tokenizer.json" and not settings:  # ours: the file itself says how to pad and where to cut
        return read_tokenizer_file(checkpoint_file(folder, path.name)), False
    kind = tokenizer_kind(folder, settings)
    if kind == "camembert" and path.suffix == ".model":
        raise ValueError(f"{path}: CamemBERT's tokenizer is read from tokenizer.json; save it with transformers once")
    defaults = zip(SPECIAL_NAMES, SPECIAL_TOKENS.get(kind, SPECIAL_TOKENS["bert"]).split())
    special = {name: settings.get(name) or default for name, default in defaults}
    words = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    if path.name == "tokenizer.json":
        tokenizer = read_tokenizer_file(path)
        update_tokenizer(tokenizer, kind, settings)
    else:
        tokenizer = build_tokenizer(path, settings, words)
        tokenizer.add_special_tokens([added_token(token) for token in special.values()])
    pad_id, pad_token = tokenizer.token_to_id(words["pad_token"]), words["pad_token"]
    if pad_id is None:
        raise ValueError(f"the tokenizer in {folder} has no padding token {pad_token!r} in its vocabulary")
    # transformers ignores the padding and truncation in tokenizer.json: what is to be done stands in its own file.
    side = settings.get("padding_side", "right")
    tokenizer.enable_padding(direction=side, pad_id=pad_id, pad_token=pad_token)
    tokenizer.no_truncation()
    longest = settings.get("model_max_length", 1e30)
    if longest < 1e9:  # 1e30 stands for no limit
        tokenizer.enable_truncation(int(longest), direction=settings.get("truncation_side", "right"))
    inputs = settings.get("model_input_names")
    return tokenizer, "token_type_ids" in inputs if inputs else kind not in WITHOUT_TOKEN_TYPES


def read_tokenizer_file(path):
    with blamed_on(path):
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def update_tokenizer(tokenizer, kind, settings):
    """Where tokenizer_config.json and tokenizer.json differ, the former wins, as in transformers."""
    if kind in BERT_NORMALIZED and isinstance(tokenizer.normalizer, tokenizers.normalizers.BertNormalizer):
        tokenizer.normalizer = bert_normalizer(settings)
    if isinstance(tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel) and "add_prefix_space" in settings:
        tokenizer.pre_tokenizer.add_prefix_space = settings["add_prefix_space"]


def tokenizer_kind(folder, settings):
    """A tokenizer's class without its end, or else the kind of model it belongs to: perhaps a row of SPECIAL_TOKENS."""
    name = settings.get("tokenizer_class")
    if name is None and (folder / CONFIG_FILE).is_file():
        values = read_json(folder / CONFIG_FILE)
        name = (values.get("text_config") or values).get("model_type")
    return re.sub(r"Tokenizer(Fast)?$", "", name or "").replace("-", "").lower()


def bert_normalizer(settings):
    return tokenizers.normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )


def added_token(token):
    """A special token as the tokenizers library has it; files may say more than its word."""
    # RoBERTa's mask takes the space before it along.
    details = token if isinstance(token, dict) else {"content": token, "lstrip": token == "<mask>"}
    known = {k: details[k] for k in ("content", "single_word", "lstrip", "rstrip", "normalized") if k in details}
    return tokenizers.AddedToken(**{"normalized": False, **known}, special=True)


def build_tokenizer(path, settings, words):
    """A tokenizer from the files that came before tokenizer.json; words are its special tokens by name."""
    if path.name == "vocab.txt":
        vocabulary = {word: i for i, word in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))}
        model = tokenizers.models.WordPiece(vocabulary, unk_token=words["unk_token"])
        normalizer, split = bert_normalizer(settings), tokenizers.pre_tokenizers.BertPreTokenizer()
        decoder = tokenizers.decoders.WordPiece()
    elif path.name == "vocab.json":
        model = tokenizers.models.BPE.from_file(
            str(path), str(path.with_name("merges.txt")), continuing_subword_prefix="", end_of_word_suffix=""
        )
        normalizer, decoder = None, tokenizers.decoders.ByteLevel()
        split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    else:
        pieces, character_map = read_sentencepiece(path)
        # XLM-R's order: four special tokens, then the file's pieces from the fourth on, then the mask.
        specials = [(words[name], 0.0) for name in ("cls_token", "pad_token", "sep_token", "unk_token")]
        model = tokenizers.models.Unigram(specials + pieces[3:] + [(words["mask_token"], 0.0)], unk_id=3)
        normalizer = tokenizers.normalizers.Precompiled(character_map) if character_map else None
        decoder = tokenizers.decoders.Metaspace()
        split = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    start, end = words["cls_token"], words["sep_token"]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(word, tokenizer.token_to_id(word)) for word in (start, end)],
    )
    return tokenizer


def read_sentencepiece(path):
    """([(piece, score)], character map) of a sentencepiece model.

    The file is a protobuf: field 1 is a piece (1: its text, 2: its score), field 3 the normalizer (2: character map).
    """
    pieces, character_map = [], b""
    for number, value in protobuf_fields(path.read_bytes()):
        if number == 1:
            piece = dict(protobuf_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece[2])[0]))
        elif number == 3:
            character_map = dict(protobuf_fields(value)).get(2, b"")
    return pieces, character_map


def protobuf_fields(data):
    """(field number, value) of each field of a protobuf message: an int for a varint, bytes for all else.

    source  protobuf.dev, "Encoding"
    """

    def varint(at):
        value, shift = 0, 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)  # field number * 8 + kind: 0 varint, 1 eight bytes, 2 with its length before it, 5 four
        if key & 7 == 0:
            value, at = varint(at)
        else:
            length, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def tokenizer_config(processor):
    """What tokenizer.json does not say, as transformers reads it."""
    padding, words = processor.tokenizer.padding, {}
    for row in SPECIAL_TOKENS.values():
        for name, word in zip(SPECIAL_NAMES, row.split()):
            if processor.tokenizer.token_to_id(word) is not None:
                words.setdefault(name, word)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **words,
        "pad_token": padding["pad_token"],
        "padding_side": padding["direction"],
        "truncation_side": processor.truncation_side,
        "model_max_length": processor.max_length or int(1e30),
        "model_input_names": ["input_ids", *(["token_type_ids"] if processor.token_types else []), "attention_mask"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# 11  Checks of values, command line
# ---------------------------------------------------------------------------------------------------------------------


def one_of(what, got, accepted):
    """Raise ValueError unless got is among the accepted values."""
    if got not in accepted:
        raise ValueError(f"unknown {what} {got!r}; {nearest(got, accepted)}")


def nearest(got, known):
    """The end of an error message: the known names that look like what was got, or all of them if there are few."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(str(got), known, n=5)
    if len(known) > 20:
        return f"the nearest names are {', '.join(near)}" if near else "no known name is near it"
    return f"expected {', '.join(known)}" + (f" (did you mean {near[0]}?)" if near else "")


def at_least(what, got, minimum):
    """Raise ValueError unless got is a number of at least the minimum."""
    if not minimum <= got < math.inf:
        raise ValueError(f"{what} is {got}, expected at least {minimum}")


def below_one(what, got):
    """Raise ValueError unless got is a share from 0 to below 1."""
    if not 0 <= got < 1:
        raise ValueError(f"{what} is {got}, expected a share from 0 to below 1")


def build(config_class, values):
    """config_class(**values), or ValueError naming a field it does not have, or a value of the wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"{config_class.__name__} is {values!r}, expected fields by name")
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        one_of(f"field of {config_class.__name__}", name, hints)
        # "int | None" is [int, NoneType]. A whole float may be written as an int, and json has lists for tuples.
        kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hints[name]) or (hints[name],)]
        kinds += [int] * (float in kinds) + [list] * (tuple in kinds)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return config_class(**values)


def knob(default, help, group="other", choices=None):
    """A dataclass field that carries its own --help line."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return field(**factory, metadata={"help": help, "group": group, "choices": choices})


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose error for a misspelt flag names the nearest ones."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}; {nearest(unknown[1], self._option_string_actions)}"
        super().error(message)


def flag_parser(config_class, description):
    """A parser with one flag per field of the dataclass: --kebab-case, strict types, --x/--no-x for booleans."""
    parser = FlagParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    groups = {}
    for f in dataclasses.fields(config_class):
        kind = hints[f.name]
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind) if kind is not dict else kind
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        flag, metadata = "--" + f.name.replace("_", "-"), f.metadata
        shown = "" if default in (None, "", {}) else f" (default: {default})"
        options = {"default": default, "help": (metadata["help"] + shown).replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            options.update(nargs="*", action=KeyValues, metavar="NAME=VALUE")
        else:
            options.update(type=kind, choices=metadata["choices"])
            if not metadata["choices"]:
                options["metavar"] = kind.__name__.upper()
        title = metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag, **options)
    return parser


class KeyValues(argparse.Action):
    """--flag a=1 b=(2,3): a dictionary; values are Python literals, or strings where they are not."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for text in values:
            name, equals, value = text.partition("=")
            if not equals:
                parser.error(f"{option_string} takes name=value, got {text!r}")
            try:
                pairs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


def pick_device(name):
    """The torch.device called name, "auto" being CUDA where there is some; raises ValueError for CUDA without any."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise ValueError(f"device {name} was asked for, but torch sees {count} CUDA device(s); use --device cpu")
    return device


def pick_workers(count, device):
    """How many processes read pictures; -1 picks: up to 8 beside a GPU, one where the cores themselves compute."""
    if count >= 0:
        return count
    return min(8 if device.type == "cuda" else 1, own_cores() - 1)


def start_worker(number):
    """What each process that reads pictures does first: it leaves stopping to the run, and ends if the run was killed.

    A terminal and torchrun signal all processes of a group at once; out of the group, the worker still brings what the
    run needs to finish its step. torch looks for a killed run too, but does not notice one that was killed before the
    worker began to look.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=end_with_run, daemon=True).start()


def end_with_run():
    """Wait for the process that started this one to end, and end."""
    multiprocessing.parent_process().join()
    os._exit(1)


# Seconds between the last word of processes to each other and a fork. For a moment after it, gloo's threads hold a lock
# of Python's, and a worker forked then by an older Python waits for it for ever (python/cpython#112275): 3 of 5,000
# forks right after a broadcast did, and none of 5,000 after a fifth of this pause.
FORK_PAUSE = 0.1


def from_workers(loader):
    """A DataLoader's batches, its workers started now; raises ValueError if a process that reads pictures ended."""
    if process_count() > 1:
        time.sleep(FORK_PAUSE)
    batches = iter(loader)

    def checked():
        try:
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            raise ValueError(
                f"a worker that reads pictures ended ({error}); perhaps memory: try fewer --workers"
            ) from error

    return checked()


def pick_precision(name, device):
    """ "bf16" or "fp32"; "auto" takes bf16 where the hardware computes in it, not where it is only emulated."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and hardware else "fp32"


def autocast(device, precision):
    """The context in which towers run: bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def float32_products(device, precision):
    """Inside, with "bf16", CUDA multiplies the float32 matrices that remain, the loss's above all, in TF32.

    That has three digits and is much faster. Measuring passes "fp32": there rounding would decide ranks.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" and precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run_script(main):
    """Call main and end the process: errors become one line on standard error and exit status 1; Ctrl-C gives 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # where the first process has the same to say, torchrun ends this one before it repeats it
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
