"""A vision-text dual encoder (CLIP, LiT) in one file of plain PyTorch.

An image and its caption should land close together in one space, everything else far apart.

    pixel_values (B, 3, S, S) ─ vision_model ─ (B, W) ─ visual_projection ─ L2 ─ image_embeds (B, E)
                                                                                            cosine
    input_ids    (B, T) ─────── text_model ─── (B, W) ─ text_projection ─── L2 ─ text_embeds  (B, E)
                                                                                               │
        loss () ◄─ clip_loss: cross-entropy of (B, B) logits = exp(logit_scale) * cosines ◄────┘

Symbols    B pairs of a batch (R of them on each process; I images and N captions if they differ)
           T tokens after padding        P patches and class tokens     S pixels per side
           W tower width                 H attention heads              E embedding size
Words      "features" come out of a tower or a projection; "embeds" are features of unit norm.
           A "trunk" is a timm model without its classifier. "Exercise n" marks what a course can
           leave out of a student's copy.

Sections   1 Losses        2 DualEncoder       3 Text tower       4 Vision tower    (the lesson)
           5 Processor     6 Data              7 Checkpoints      8 Large batches
           9 Published checkpoints             10 Checks and devices

Read first Sections 1 to 4, 6 up to Readers, and 8; LOSSES and train() of train.py; ranks() and
           class_embeds() of eval.py. Sections 5, 7, 9 and 10 build, load, save or check: trust
           their names, such as check_min, check_choice, open_image, blamed_on, autocast.

Sources    Radford et al. 2021 (CLIP, arXiv 2103.00020), Zhai et al. 2022 (LiT, 2111.07991), Zhai
           et al. 2023 (SigLIP, 2303.15343), Yang et al. 2022 (UniCL, 2204.03610), Devlin et al.
           2019 (BERT, 1810.04805); others where they are used
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import tarfile
import textwrap
import typing
from collections import Counter, OrderedDict
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import tokenizers
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import functional as TF

LOGIT_SCALE_INIT = 2.6592  # ln(1 / 0.07) truncated, as in published configs: cosines times 14.28
LOGIT_SCALE_MAX = math.log(100)  # CLIP, section 2.5: train.py clamps after each step

# ==== 1  Losses ===================================================================================


def clip_loss(image_embeds, text_embeds, logit_scale):
    """Contrastive loss both ways: each image against all captions, each caption against all images.

    Cosines span only -1 to 1, too little for a sharp softmax. They are multiplied by a factor
    that the model learns, exp(logit_scale), which is always positive: 1 / temperature.

    image_embeds  (B, E)  unit-norm rows
    text_embeds   (B, E)  unit-norm rows; row i describes image i
    logit_scale   ()      natural log of the inverse temperature
    returns       ()      mean loss in nats: about ln(B) at first, near 0 once pairs outscore others
    raises        ValueError if the two batches differ in shape
    source        Radford et al. 2021, Figure 3
    Exercise 1    easy, 20 minutes: the loss of both directions, run `pytest -k exercise_1`
    """
    check_same_shape(image_embeds, text_embeds)
    logits_per_image = logit_scale.exp() * (image_embeds @ text_embeds.T)
    # Which of the B captions is image i's own? Caption i. And which image is caption i's? Image i.
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    image_to_text = F.cross_entropy(logits_per_image, labels)
    text_to_image = F.cross_entropy(logits_per_image.T, labels)
    return (image_to_text + text_to_image) / 2


def siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias):
    """Every cell of the B x B matrix is a yes-or-no question of its own: are these two a pair?

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes image i
    logit_scale, logit_bias    ()      the paper starts from ln(10) and -10: every cell says no
    returns                    ()      binary cross-entropy in nats, summed over cells, divided by B
    raises                     ValueError if the two batches differ in shape
    source                     Zhai et al. 2023, Algorithm 1
    """
    check_same_shape(image_embeds, text_embeds)
    logits = logit_scale.exp() * (image_embeds @ text_embeds.T) + logit_bias
    is_pair = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, is_pair, reduction="sum") / len(logits)


def multi_positive_clip_loss(image_embeds, text_embeds, logit_scale, group_ids):
    """clip_loss where several captions fit an image: all pairs of a group are right answers.

    With two images of dogs, clip_loss calls each one's caption wrong for the other. Here a group
    shares the right answer evenly: for groups 0, 0, 1 the target rows are ½ ½ 0, ½ ½ 0 and 0 0 1.
    Even a perfect ½ ½ 0 has a cross-entropy of -½ ln ½ - ½ ln ½ = ln 2, or ln(group size). It is
    subtracted, so that the best value is 0. If every group is one pair, this is clip_loss.

    image_embeds, text_embeds  (B, E)  unit-norm rows; row i describes image i
    logit_scale                ()      natural log of the inverse temperature
    group_ids                  (B,)    integers; rows with equal ids describe each other
    returns                    ()      mean of cross-entropy minus ln(group size), in nats
    raises                     ValueError if the two batches differ in shape
    source                     Yang et al. 2022, "Unified Contrastive Learning", equations 3 and 4
    """
    check_same_shape(image_embeds, text_embeds)
    logits_per_image = logit_scale.exp() * (image_embeds @ text_embeds.T)
    same_group = (group_ids[:, None] == group_ids[None, :]).to(logits_per_image.dtype)
    group_size = same_group.sum(dim=1)
    target = same_group / group_size[:, None]  # symmetric, so it serves both directions
    mean_entropy = group_size.log().mean()
    image_to_text = F.cross_entropy(logits_per_image, target)  # from probabilities, not indices
    text_to_image = F.cross_entropy(logits_per_image.T, target)
    return (image_to_text + text_to_image) / 2 - mean_entropy


def check_same_shape(image_embeds, text_embeds):
    if image_embeds.shape != text_embeds.shape:
        shapes = f"image_embeds {tuple(image_embeds.shape)}, text_embeds {tuple(text_embeds.shape)}"
        raise ValueError(f"{shapes} differ in shape; row i of one describes row i of the other")


# ==== 2  DualEncoder ==============================================================================


@dataclass(frozen=True)
class DualEncoderConfig:
    """Everything needed to rebuild a DualEncoder without its weights.

    raises  ValueError for an unknown projection head or a projection_dim below 1
    """

    vision: VisionConfig = field(default_factory=lambda: VisionConfig())  # a class further down
    text: TextConfig = field(default_factory=lambda: TextConfig())
    projection_dim: int = 512
    projection_head: str = "linear"  # a key of PROJECTION_HEADS
    logit_scale_init: float = LOGIT_SCALE_INIT
    logit_bias_init: float | None = None  # a number adds the logit_bias of siglip_loss

    def __post_init__(self):
        check_min("projection_dim", self.projection_dim, 1)
        check_choice("projection head", self.projection_head, PROJECTION_HEADS)

    def to_dict(self):
        """The configuration as plain dictionaries, ready for json."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values):
        """The inverse of to_dict; raises ValueError for unknown fields."""
        values = {name: value for name, value in values.items() if name != "model_type"}
        vision = config_from_dict(VisionConfig, values.pop("vision", {}))
        text = config_from_dict(TextConfig, values.pop("text", {}))
        return config_from_dict(cls, {"vision": vision, "text": text, **values})


def linear_head(width, projection_dim):
    """A layer from (B, W) to (B, E): one matrix, as in CLIP."""
    projection = nn.Linear(width, projection_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


# To try another projection, add it here, and a flag to train.py.
PROJECTION_HEADS = {"linear": linear_head}


@dataclass
class TowerOutput:
    """What a tower returns. Text towers: read P as T. Convnets: states are maps (B, W, h, w).

    last_hidden_state  (B, P, W)              every position after the last layer
    pooler_output      (B, W)                 one vector per image or caption
    hidden_states      depth + 1 of (B, P, W) if asked for: block 1's input, each block's output
    attentions         depth of (B, H, P, P)  if asked for: each layer's attention weights
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DualEncoderOutput:
    """What DualEncoder returns; the fields of a side not given stay None."""

    loss: Tensor | None = None  # ()
    logits_per_image: Tensor | None = None  # (I, N), exp(logit_scale) * cosine
    logits_per_text: Tensor | None = None  # (N, I)
    text_embeds: Tensor | None = None  # (N, E)
    image_embeds: Tensor | None = None  # (I, E)
    text_model_output: TowerOutput | None = None
    vision_model_output: TowerOutput | None = None


class DualEncoder(nn.Module):
    """Two towers, two projections into one space, one temperature.

    vision_model, text_model  the towers; built from the configuration unless given
    source                    Radford et al. 2021, Figure 3
    """

    def __init__(self, config, vision_model=None, text_model=None):
        super().__init__()
        self.config = config
        self.vision_model = vision_model or build_tower(config.vision)
        self.text_model = text_model or build_tower(config.text)
        make_head = PROJECTION_HEADS[config.projection_head]
        self.visual_projection = make_head(self.vision_model.width, config.projection_dim)
        self.text_projection = make_head(self.text_model.width, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))
        if config.logit_bias_init is not None:
            # Not used in forward: train.py hands it to siglip_loss.
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init)))
        self.processor = None  # a Processor, saved and loaded with the weights if there is one
        self.locked = set()  # of "vision" and "text"

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

        input_ids     (N, T)        token ids; attention_mask (1 for real tokens), token_type_ids
                                    and position_ids have the same shape
        pixel_values  (I, 3, S, S)  normalised pixels, as the processor makes them
        return_loss   adds clip_loss; image i and caption i must be a pair
        returns       DualEncoderOutput
        raises        ValueError if there is nothing to encode, or return_loss with one side only
        Exercise 2    medium, 40 minutes: from towers to logits, run `pytest -k exercise_2`
        """
        both = input_ids is not None and pixel_values is not None
        if input_ids is None and pixel_values is None:
            raise ValueError("nothing to encode: give input_ids, pixel_values or both")
        if return_loss and not both:
            raise ValueError("return_loss needs both input_ids and pixel_values")
        extras = (output_hidden_states, output_attentions)
        output = DualEncoderOutput()
        if pixel_values is not None:
            output.vision_model_output = self.vision_model(pixel_values, *extras)
            output.image_embeds = self.project_image(output.vision_model_output.pooler_output)
        if input_ids is not None:
            inputs = (input_ids, attention_mask, token_type_ids, position_ids)
            output.text_model_output = self.text_model(*inputs, *extras)
            output.text_embeds = self.project_text(output.text_model_output.pooler_output)
        if both:
            images, texts = output.image_embeds, output.text_embeds
            with autocast(self.logit_scale.device, "fp32"):  # fp32 even inside a caller's autocast
                output.logits_per_image = self.logit_scale.exp() * (images @ texts.T)
                output.loss = clip_loss(images, texts, self.logit_scale) if return_loss else None
            output.logits_per_text = output.logits_per_image.T
        return output

    def encode_image(self, pixel_values):
        """(I, 3, S, S) pixels to image_embeds (I, E), unit norm."""
        return self(pixel_values=pixel_values).image_embeds

    def encode_text(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        """(N, T) token ids to text_embeds (N, E), unit norm."""
        return self(input_ids, None, attention_mask, token_type_ids, position_ids).text_embeds

    def get_image_features(self, pixel_values):
        """(I, 3, S, S) pixels to (I, E) projected features, not normalised."""
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)

    def get_text_features(
        self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None
    ):
        """(N, T) token ids to (N, E) projected features, not normalised."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        return self.text_projection(self.text_model(*inputs).pooler_output)

    def project_image(self, pooler_output):
        """(I, W) pooled features of the vision tower to image_embeds (I, E), unit norm."""
        return self._normalize(self.visual_projection(pooler_output))

    def project_text(self, pooler_output):
        """(N, W) pooled features of the text tower to text_embeds (N, E), unit norm."""
        return self._normalize(self.text_projection(pooler_output))

    def _normalize(self, features):
        """Features to unit norm, in the precision of the weights.

        Exercise 2  with forward
        """
        # Under train.py's autocast features are bf16, but norms and cosines need full precision.
        return F.normalize(features.to(self.logit_scale.dtype), dim=-1)

    def lock(self, tower):
        """Freeze a tower for good: no gradients, and evaluation mode even after .train().

        Its projection still learns. A checkpoint does not say what was locked.

        tower        "vision" (as in LiT: the text tower learns to match it), "text" or "both"
        returns      the model
        raises       ValueError for another name
        source       Zhai et al. 2022, section 3
        Exercise 12  medium, 30 minutes: lock a tower for good, run `pytest -k exercise_12`
        """
        check_choice("tower to lock", tower, ("vision", "text", "both"))
        self.locked |= {"vision", "text"} if tower == "both" else {tower}
        for name in self.locked:
            # A tower with adapters (LoRA) may override requires_grad_, to keep them trainable.
            getattr(self, f"{name}_model").requires_grad_(False)
        return self.train(self.training)  # which puts locked towers in evaluation mode

    def train(self, mode=True):
        """Training mode for all but locked towers, whose batch norm would otherwise keep changing.

        Exercise 12  with lock
        """
        super().train(mode)
        for name in self.locked:
            getattr(self, f"{name}_model").eval()
        return self

    # Section 7 does the work of this method and the next two.
    @classmethod
    def from_vision_text_pretrained(
        cls, vision, text, projection_dim=512, pretrained=True, **overrides
    ):
        """A dual encoder from two towers; both projections are new and must be trained.

        vision      a timm name such as "vit_base_patch16_224.augreg_in21k" or "hf-hub:timm/...", a
                    timm folder, or a transformers folder or hub id (rows of HF_VISION)
        text        a transformers or sentence-transformers folder or hub id (rows of HF_TEXT), or
                    "scratch": a new tower of sizes text_width, text_depth, text_vocab_size, ...;
                    "scratch:mpnet" one of another row of HF_TEXT, which may be your own
        pretrained  False starts a timm tower from random weights; folders are always loaded
        overrides   fields of DualEncoderConfig, or of the towers' configurations with vision_ or
                    text_ before the name: vision_image_size=64, text_pooling="mean"
        returns     a DualEncoder in training mode, with a processor if text holds a tokenizer
        raises      ValueError for unknown names and fields, with the nearest known ones
        """
        return build_from_towers(cls, vision, text, projection_dim, pretrained, overrides)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id):
        """A saved model, in evaluation mode: ours, or a VisionTextDualEncoder of transformers.

        A run folder of train.py means its best checkpoint. A hub id may end in @revision. Anything
        missing, damaged or misfitting raises a ValueError that names it.
        """
        return load_dual_encoder(cls, folder_or_hub_id)

    def save_pretrained(self, folder, format="dualenc"):
        """Write config.json, model.safetensors and, if the model has one, the processor's files.

        format  "dualenc", or "hf": what transformers' VisionTextDualEncoderModel loads
        raises  ValueError for one half of a processor, or what transformers cannot compute
        """
        save_dual_encoder(self, folder, format)


# ==== 3  Text tower ===============================================================================


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a BERT-like text tower; the defaults are bert-base-uncased's, with dropout off.

    raises  ValueError for unknown names, sizes below 1, and a width not divisible by heads
    """

    family: str = "bert"  # a key of HF_TEXT (section 9); a new kind of tower is a row there
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None  # 4 * width unless given
    vocab_size: int = 30522
    max_positions: int = 512  # rows of the position table; RoBERTa skips the first two
    pad_token_id: int = 0
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"  # a key of ACTIVATIONS
    pooling: str = "cls"  # a key of TEXT_POOLING
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", 4 * self.width)  # the class is frozen
        for name in ("width", "depth", "heads", "mlp_width", "vocab_size", "max_positions"):
            check_min(f"text {name}", getattr(self, name), 1)
        check_choice("text family", self.family, HF_TEXT)
        check_choice("text pooling", self.pooling, TEXT_POOLING)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of {self.heads} heads")


class TextEncoder(nn.Module):
    """BERT's encoder; section 9 has its relatives.

    All modules have BERT's published names, so that loading its weights is a copy.

    source  Devlin et al. 2019, section 3
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.width
        self.weights_from = None  # folder or id of a pretrained tower, for train.py
        parts = {
            "word_embeddings": nn.Embedding(config.vocab_size, config.width),
            "position_embeddings": nn.Embedding(config.max_positions, config.width),
            "LayerNorm": nn.LayerNorm(config.width, config.layer_norm_eps),
        }
        if config.type_vocab_size:
            parts["token_type_embeddings"] = nn.Embedding(config.type_vocab_size, config.width)
        self.embeddings = nn.ModuleDict(parts)
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.encoder = nn.ModuleDict({"layer": layers})
        if config.pooling == "pooler":
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})
        self.apply(self._init_weights)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=False,
        output_attentions=False,
    ):
        """Token ids to TowerOutput: last_hidden_state (B, T, W), pooler_output (B, W).

        input_ids       (B, T)
        attention_mask  (B, T)  1 for real tokens, 0 for padding; all real unless given
        token_type_ids  (B, T)  which of BERT's two sentences; 0 unless given
        position_ids    (B, T)  0, 1, 2, ... unless given
        raises          ValueError for captions longer than max_tokens
        """
        if input_ids.shape[1] > self.max_tokens:
            got = f"captions of {input_ids.shape[1]} tokens, but {self.max_tokens} positions"
            raise ValueError(f"{got}; tokenize with max_length={self.max_tokens}")
        if position_ids is None:
            position_ids = self.default_positions(input_ids)
        hidden = self.embeddings["word_embeddings"](input_ids)
        hidden = hidden + self.embeddings["position_embeddings"](position_ids)
        if self.config.type_vocab_size:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            hidden = hidden + self.embeddings["token_type_embeddings"](token_type_ids)
        hidden = self.embeddings["LayerNorm"](hidden)
        hidden = F.dropout(hidden, self.config.dropout, self.training)

        mask = self.score_mask(attention_mask, hidden)
        hidden_states, attentions = [hidden], []
        for layer in self.encoder["layer"]:
            hidden, weights = layer(hidden, mask, output_attentions)
            hidden_states.append(hidden)
            attentions.append(weights)
        return TowerOutput(
            last_hidden_state=hidden,
            pooler_output=TEXT_POOLING[self.config.pooling](self, hidden, attention_mask),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    @property
    def max_tokens(self):
        """The longest caption this tower can read, in tokens; fewer in a RoBERTa."""
        return self.config.max_positions

    def default_positions(self, input_ids):
        """The row of the position table for each token, (1, T) or (B, T)."""
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]

    def score_mask(self, attention_mask, hidden):
        """The mask for masked_attention: (B, 1, 1, T), the same for all heads and queries."""
        return None if attention_mask is None else attention_mask[:, None, None, :].bool()

    @classmethod
    def from_pretrained(cls, folder_or_hub_id, **overrides):
        """The text tower of a transformers checkpoint, in evaluation mode.

        overrides  fields of TextConfig; pooling is the folder's own unless given
        raises     ValueError for another model, and for weights that are missing or do not fit
        """
        folder = find_folder(folder_or_hub_id)
        return load_tower(read_text_config, folder, folder_or_hub_id, overrides).eval()

    def _init_weights(self, module):
        """As BERT: normal weights of standard deviation 0.02, zero biases."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class AddAndNorm(nn.Module):
    """How both halves of a layer end: a linear layer, and LN(hidden + its output)."""

    def __init__(self, width, config):
        super().__init__()
        self.dense = nn.Linear(width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, update, hidden):
        return self.LayerNorm(hidden + F.dropout(self.dense(update), self.dropout, self.training))


class TextLayer(nn.Module):
    """One post-LN transformer layer: LN(x + attention(x)), then LN(x + mlp(x))."""

    def __init__(self, config):
        super().__init__()
        W = config.width
        projections = nn.ModuleDict({name: nn.Linear(W, W) for name in ("query", "key", "value")})
        # BERT's names: attention.self and .output are the first half, the rest is the MLP.
        self.attention = nn.ModuleDict({"self": projections, "output": AddAndNorm(W, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(W, config.mlp_width)})
        self.output = AddAndNorm(config.mlp_width, config)
        self.config = config
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, hidden, mask, return_weights):
        """hidden (B, T, W) to (B, T, W), and the weights (B, H, T, T) or None."""

        def project_to_heads(name):  # (B, T, W) to (B, H, T, W/H)
            projected = self.attention["self"][name](hidden)
            return projected.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

        query, key, value = map(project_to_heads, ("query", "key", "value"))
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = masked_attention(query, key, value, mask, dropout, return_weights)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, W): heads side by side again
        hidden = self.attention["output"](mixed, hidden)
        inner = self.activation(self.intermediate["dense"](hidden))
        return self.output(inner, hidden), weights


def masked_attention(query, key, value, mask=None, dropout=0.0, return_weights=False):
    """Softmax attention that gives padding no weight.

    A token's query is compared with the keys of all tokens. The softmax of these scores says how
    much of each token's value it takes in. Dividing by the root of W/H keeps scores near 1.

    query, key, value  (B, H, T, W/H)
    mask               (B, 1, 1, T) bool: True where a key may be seen; None: everywhere.
                       A causal tower passes (B, 1, T, T); MPNet, in section 9, passes floats,
                       which are added to the scores
    dropout            share of the weights dropped
    returns            the mixed values (B, H, T, W/H), and the weights after dropout (B, H, T, T)
                       or None; for a caption that is all padding they mean nothing
    source             Vaswani et al. 2017, equation 1
    Exercise 3         medium, 40 minutes: never look at padding, run `pytest -k exercise_3`
    """
    if not return_weights:  # torch's own function does this faster, and returns no weights
        return F.scaled_dot_product_attention(query, key, value, mask, dropout), None
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        # The lowest finite score: -inf would turn a caption that is all padding into nan.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # dropout is 0 in evaluation
    return weights @ value, weights


def masked_mean(hidden, attention_mask=None):
    """The mean over real tokens: hidden (B, T, W) and attention_mask (B, T) to (B, W).

    Each caption must have at least one real token.
    Exercise 4  easy, 10 minutes: the mean over real tokens only, run `pytest -k exercise_4`
    """
    if attention_mask is None:
        return hidden.mean(dim=1)
    weight = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


# How a text tower makes one vector (B, W): functions of the tower, hidden (B, T, W) and the mask.
TEXT_POOLING = {
    "cls": lambda tower, hidden, attention_mask: hidden[:, 0],
    "mean": lambda tower, hidden, attention_mask: masked_mean(hidden, attention_mask),
    "pooler": lambda tower, hidden, attention_mask: tower.pooler["dense"](hidden[:, 0]).tanh(),
}

# By their names in config.json; gelu_new and gelu_fast are GELU's approximation by tanh.
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), timm.layers.GELUTanh)
ACTIVATIONS |= {"quick_gelu": timm.layers.QuickGELU, "tanh": nn.Tanh}


# ==== 4  Vision tower =============================================================================


@dataclass(frozen=True)
class VisionConfig:
    """Describes a timm model, or a tower of transformers (section 9)."""

    name: str = "vit_base_patch16_224"  # a timm model, or a key of HF_VISION (section 9)
    args: dict = field(default_factory=dict)  # of timm.create_model, or a family's config.json
    image_size: int | None = None  # pixels a side; None: the model's own
    pooling: str | None = None  # timm's global_pool ("avg", "token", "map"); None: the model's own
    patch_dropout: float = 0.0  # share of patches left out in training (ViTs; Li et al. 2023)


class VisionEncoder(nn.Module):
    """Any timm model without its classifier.

    pretrained_from  a timm name with its tag, or a folder, to load weights from; None: random
                     weights. Position tables are resampled to image_size
    raises           ValueError for a name, sizes or arguments that timm does not know
    """

    def __init__(self, config, pretrained_from=None):
        super().__init__()
        self.config = config
        self.weights_from = None  # timm name, folder or id of a pretrained tower, for train.py
        self.trunk = self.build_trunk(pretrained_from)
        self.width = self.trunk.head_hidden_size  # size of the pooled features
        self.image_size = config.image_size or self.trunk.pretrained_cfg["input_size"][-1]

    def build_trunk(self, pretrained_from):
        """The timm model that the configuration describes."""
        config = self.config
        check_choice("timm model", config.name.split(".")[0], timm.list_models())
        name = pretrained_from or config.name
        with blamed_on(f"{name} with {config.args}", "timm cannot build"):
            # Most ViTs are built for one image size; convnets take any.
            is_fixed = timm.get_pretrained_cfg(config.name).fixed_input_size
            is_fixed = is_fixed and not config.args.get("dynamic_img_size")
            # What is set here cannot be in args, too. timm ignores None: not every model takes all.
            ours = {"img_size": config.image_size if is_fixed else None, "num_classes": 0}
            ours |= {"global_pool": config.pooling, "in_chans": 3, "checkpoint_path": ""}
            args = {"patch_drop_rate": config.patch_dropout or None, **config.args}
            return timm.create_model(name, pretrained=bool(pretrained_from), **ours, **args)

    def forward(self, pixel_values, output_hidden_states=False, output_attentions=False):
        """Pixels to TowerOutput, pooled by timm. Not thread-safe: see recording.

        pixel_values  (B, 3, S, S) from the processor
        raises        ValueError for another shape (convnets take any S), for hidden states of a
                      model without blocks or stages, and for attentions of one that has none
        """
        shape, S = tuple(pixel_values.shape), self.image_size
        is_strict = getattr(getattr(self.trunk, "patch_embed", None), "strict_img_size", False)
        if len(shape) != 4 or shape[1] != 3 or (is_strict and shape[2:] != (S, S)):
            expected = f"(B, 3, {S}, {S}), as the model's processor makes them"
            raise ValueError(f"pixel_values has shape {shape}, expected {expected}")
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        if pixel_values.is_cuda:  # faster; on CPUs narrow convolutions crash in this layout
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        # Hooks on the trunk fill the two lists, if they are asked for (section 10).
        with recording(self.trunk, output_hidden_states, output_attentions) as (states, weights):
            features = self.trunk.forward_features(pixel_values)
        return TowerOutput(
            last_hidden_state=features,
            pooler_output=self.trunk.forward_head(features),  # there is no classifier: only pools
            hidden_states=tuple(states) or None,
            attentions=tuple(weights) or None,
        )

    def image_transform(self, crop_pct=None):
        """The ImageTransform of timm's configuration: size, crop, mean and std.

        crop_pct  share of the image's shorter side that the crop keeps; the model's own unless set
        """
        data = timm.data.resolve_model_data_config(self.trunk)
        return ImageTransform(
            resize=math.floor(self.image_size / (crop_pct or data["crop_pct"])),  # 224 / 0.9 = 248
            squash=data["crop_mode"] == "squash",
            crop=self.image_size,
            interpolation=data["interpolation"].replace("random", "bilinear"),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )


# ==== 5  Processor: images and captions to tensors ================================================

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")  # files store Pillow's number for each
Image.init()  # loads what Pillow can open
# Pillow runs Ghostscript for an EPS; files of the other formats are seldom images.
IMAGE_FORMATS = [f for f in Image.OPEN if f not in ("EPS", "HDF5", "GRIB", "BUFR", "MPEG", "WMF")]
IMAGE_SUFFIXES = {suffix for suffix, name in Image.EXTENSION.items() if name in IMAGE_FORMATS}


@dataclass(frozen=True)
class ImageTransform:
    """Any image to normalised pixels: resize, centre crop, (pixel / 255 - mean) / std.

    resize         pixels of the shorter side, or of both; None leaves the image as it is
    crop           pixels of both sides, cropped or padded with black; None leaves them as they are
    squash         resize both sides, whatever the image's proportions
    interpolation  one of INTERPOLATIONS
    mean, std      of red, green and blue, for pixels from 0 to 1
    """

    resize: int | None
    crop: int | None
    squash: bool = False
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for side in {self.resize, self.crop} - {None}:
            check_min("image side", side, 1)
        if not (len(self.mean) == len(self.std) == 3 and min(self.std) > 0):
            raise ValueError(f"image mean {self.mean}, std {self.std}: expected three of each")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)

    def __call__(self, image):
        """A PIL image, array or tensor to (3, S, S) float32."""
        return self.normalize(self.resize_and_crop(to_pixels(image)))

    def resize_and_crop(self, pixels):
        """(3, height, width) to (3, S, S), same dtype."""
        if self.resize is not None:
            size = [self.resize] * (2 if self.squash else 1)  # of both sides, or of the shorter one
            mode = TF.InterpolationMode(self.interpolation)
            pixels = TF.resize(pixels, size, mode, antialias=True)
        if self.crop is not None:
            # Negative padding crops: 31 rows by 15 at the top and 16 at the bottom, as transformers
            # does. torchvision does the reverse.
            more_rows, more_columns = (self.crop - side for side in pixels.shape[-2:])
            top, left = int(more_rows / 2), int(more_columns / 2)
            pixels = F.pad(pixels, (left, more_columns - left, top, more_rows - top))
        return pixels

    def normalize(self, pixels):
        """(..., 3, S, S) uint8 to normalised float32."""
        # mean and std (3, 1, 1) are multiplied by 255, instead of dividing the pixels: this rounds
        # as transformers does.
        mean, std = 255 * torch.tensor([self.mean, self.std], device=pixels.device)[..., None, None]
        return (pixels.float() - mean) / std

    def to_dict(self):
        """The values of transformers' preprocessor_config.json."""
        sides = ("height", "width") if self.squash else ("shortest_edge",)
        return {
            "image_processor_type": "CLIPImageProcessor" if self.crop else "ViTImageProcessor",
            "do_resize": self.resize is not None,
            "size": self.resize and dict.fromkeys(sides, self.resize),
            "resample": Image.Resampling[self.interpolation.upper()].value,
            "do_center_crop": self.crop is not None,
            "crop_size": self.crop and dict.fromkeys(("height", "width"), self.crop),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    @classmethod
    def from_dict(cls, values):
        """The inverse of to_dict, for files of every version of transformers."""
        kind = values.get("image_processor_type") or values.get("feature_extractor_type") or "none"
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind).lower()
        check_choice("image processor", kind, IMAGE_PROCESSORS)
        defaults = cls(**IMAGE_PROCESSORS[kind]).to_dict()
        values = defaults | {name: value for name, value in values.items() if value is not None}
        # Both are {"shortest_edge": 224} or {"height": 224, "width": 224}, in old files 224.
        size, crop = values["size"], values["crop_size"]
        size = size if isinstance(size, dict) else dict.fromkeys(defaults["size"], size)
        crop = crop if isinstance(crop, dict) else {"side": crop or 224}
        for sides in (size, crop):
            if len({*sides.values()}) != 1:
                raise ValueError(f"size is {sides}, expected a number of pixels or a square")
        factor = values["rescale_factor"] if values["do_rescale"] else 1
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            advice = "fold the rest into image_mean and image_std"
            raise ValueError(f"pixels are multiplied by {factor}, expected 1 / 255; {advice}")
        if not values["do_normalize"]:
            values |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        return cls(
            resize=max(size.values()) if values["do_resize"] else None,  # all are equal
            crop=max(crop.values()) if values["do_center_crop"] else None,
            squash="shortest_edge" not in size,
            interpolation=Image.Resampling(values["resample"]).name.lower(),
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
        )


def to_pixels(image):
    """A PIL image, uint8 tensor (C, h, w) or array (h, w, C) to (3, h, w) uint8."""
    if not isinstance(image, Image.Image):
        kind, dtype = type(image).__name__, str(getattr(image, "dtype", "no dtype"))
        if not dtype.endswith("uint8"):
            raise ValueError(f"image is a {kind} of {dtype}, expected a PIL image, or uint8 values")
        image = TF.to_pil_image(image)
    return TF.pil_to_tensor(to_rgb(image))


def to_rgb(image):
    """Any PIL image in RGB as a person sees it: transparency on white, 16 bits to 8."""
    if image.mode == "F":
        raise ValueError("pixels are floats, expected whole numbers of 8 or 16 bits")
    if image.mode.startswith("I"):
        shares = np.asarray(image).clip(0, 65535) / 65535
        image = Image.fromarray((shares * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@functools.cache  # a second call with the same message does nothing
def notice(message):
    """Print a message once, from the first process."""
    if rank() == 0:
        print(f"note: {message}")


def open_image(source, size=None):
    """A PIL image, upright and in RGB: the one way to open an image.

    source  a path, (path, first byte, length) of a part of a file, or (data set, index), whose item
            begins with a PIL image, as torchvision's do
    size    pixels that the shorter side needs. If given, JPEGs are decoded at a reduced size of at
            least twice this, which is much faster
    raises  ValueError that names a file that is missing or is not an image
    """
    with blamed_on(source, "cannot read image"):
        file = source
        match source:  # a path, or a tuple of two or three
            case dataset, index:
                return to_rgb(ImageOps.exif_transpose(dataset[index][0]))
            case path, start, length:
                with open(path, "rb") as whole:
                    whole.seek(start)
                    file = io.BytesIO(whole.read(length))
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if size:
                image.draft(None, (2 * size, 2 * size))
            return to_rgb(ImageOps.exif_transpose(image))


def stamp_image(source):
    """A string that changes when the image behind a source of open_image does."""
    path, *place = source if isinstance(source, tuple) else [source]
    if not isinstance(path, (str, Path)):
        return ""  # data sets never change
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {place}"


@contextmanager
def blamed_on(path, what="cannot read"):
    """Turn any exception raised inside into a ValueError: "cannot read a.json: its reason"."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers' Rust panics are not Exceptions
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # the path is named already
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        reason = textwrap.shorten(f"{kind}{error}", 600)
        raise ValueError(f"{what} {path}: {reason}") from error


class Processor:
    """Captions to token ids and a mask, images to pixel_values: what a DualEncoder takes.

    image_transform  ImageTransform, or None for captions alone
    tokenizer        tokenizers.Tokenizer with padding enabled, or None for images alone
    token_types      whether captions come with token_type_ids, as BERT's do
    positions        tokens that the text tower has room for; any number unless given
    """

    def __init__(self, image_transform, tokenizer, token_types=False, positions=math.inf):
        if tokenizer is not None and tokenizer.padding is None:
            raise ValueError("no padding: call tokenizer.enable_padding(pad_id=..., pad_token=...)")
        self.image_transform, self.tokenizer = image_transform, tokenizer
        self.token_types, self.positions = token_types, positions
        truncation = (tokenizer and tokenizer.truncation) or {}
        self.max_length = min(truncation.get("max_length", math.inf), positions)
        self.truncation_side = truncation.get("direction", "right")

    def __call__(self, text=None, images=None, max_length=None):
        """Encode captions, images or both.

        text        a caption or N of them, padded to the longest
        images      an image or I of them (see to_pixels), of mixed sizes if you like
        max_length  tokens, up to the tower's positions; longer captions are truncated, with a note
        returns     {"input_ids" (N, T), "attention_mask" (N, T), "pixel_values" (I, 3, S, S)}, as
                    asked for, and "token_type_ids" (N, T) with token_types
        """
        captions = [text] if isinstance(text, str) else list(text or ())
        inputs = {}
        if captions:
            if self.tokenizer is None:
                raise ValueError("no tokenizer: make a Processor(image_transform, tokenizer)")
            limit = self.max_length if max_length is None else min(max_length, self.positions)
            self.truncate_at(limit)
            rows = self.tokenizer.encode_batch(captions)
            inputs["input_ids"] = torch.tensor([row.ids for row in rows])
            inputs["attention_mask"] = torch.tensor([row.attention_mask for row in rows])
            if self.token_types:
                inputs["token_type_ids"] = torch.tensor([row.type_ids for row in rows])
            if any(row.overflowing for row in rows):
                notice(f"captions longer than {limit} tokens are cut")
        if isinstance(images, Image.Image) or getattr(images, "ndim", 4) < 4:  # one, not a batch
            images = [images]
        if images is not None and len(images):
            if self.image_transform is None:
                raise ValueError("no image_transform: make a Processor(image_transform, tokenizer)")
            inputs["pixel_values"] = torch.stack([self.image_transform(image) for image in images])
        if not inputs:
            raise ValueError("nothing to process: give text, images or both, none of them empty")
        return inputs

    def truncate_at(self, limit):
        """Truncate captions to limit tokens from now on."""
        if limit == math.inf:
            return self.tokenizer.no_truncation()
        check_min("max_length", limit, self.tokenizer.num_special_tokens_to_add(False))
        self.tokenizer.enable_truncation(limit, direction=self.truncation_side)

    def decode(self, ids):
        """Token ids (T,) to a caption without special tokens."""
        return self.tokenizer.decode(torch.as_tensor(ids).tolist()).strip()

    def batch_decode(self, ids):
        """Token ids (N, T) to N captions without special tokens."""
        return [self.decode(row) for row in ids]

    def save_pretrained(self, folder, format="dualenc"):
        """Write tokenizer.json and preprocessor_config.json; "hf" adds tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.truncate_at(self.max_length)  # a call may have left its own limit there
            write_file(folder / TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
            if format == "hf" or self.token_types:
                settings = json.dumps(tokenizer_config(self), indent=2)
                write_file(folder / "tokenizer_config.json", settings)
        if self.image_transform is not None:
            write_file(folder / IMAGE_FILE, json.dumps(self.image_transform.to_dict(), indent=2))

    @classmethod
    def from_pretrained(cls, folder_or_hub_id):
        """The processor of a folder, ours or transformers'; either half is None without a file."""
        folder = find_folder(folder_or_hub_id)
        transform, (tokenizer, token_types) = read_image_transform(folder), read_tokenizer(folder)
        if transform is None and tokenizer is None:
            raise ValueError(f"{folder} has neither a tokenizer nor {IMAGE_FILE}")
        return cls(transform, tokenizer, token_types)


def train_tokenizer(captions, vocab_size, max_length=None):
    """A byte-level BPE tokenizer learned from captions. It lower-cases and keeps accents.

    vocab_size  tokens; at least 259, for all bytes and three special tokens
    max_length  tokens kept of a caption, including <s> and </s>; all unless given
    returns     tokenizers.Tokenizer that wraps captions in <s> ... </s> and pads to the longest
    source      Radford et al. 2019 (GPT-2), section 2.2
    """
    # A space before the first word makes it the same token as inside a caption.
    options = {"add_prefix_space": True, "lowercase": True, "unicode_normalizer": "nfc"}
    learner = tokenizers.ByteLevelBPETokenizer(**options)
    learner.train_from_iterator(captions, vocab_size, 1, False, ["<pad>", "<s>", "</s>"])
    tokenizer = tokenizers.Tokenizer.from_str(learner.to_str())
    ends = {"single": "<s> $A </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    if max_length:
        tokenizer.enable_truncation(max_length)
    return tokenizer


# ==== 6  Data: images with captions ===============================================================

# What a class name becomes, for training captions and for zero-shot classification alike.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
TEMPLATES += ("a small photo of a {}.", "a blurry photo of a {}.", "a close-up photo of a {}.")
TEMPLATES += ("a photo of one {}.",)
SPLITS = ("train", "val", "test", "all")


class Lazy:
    """A sequence whose item i is function(items[i]), computed when it is asked for."""

    def __init__(self, items, function):
        self.items, self.function = items, function

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.function(self.items[i])


class Pairs(torch.utils.data.Dataset):
    """Images, each with all of its captions: pairs[i] is (PIL image, list of captions).

    names     I strings, one per image: they decide the split, and name the image in messages
    images    I PIL images; a Lazy opens them when asked for
    captions  I lists of captions
    labels    I class indices; None where captions do not come from classes
    classes   K class names, or None
    """

    neighbours = 1  # consecutive images that training should see in one batch, as hard negatives

    def __init__(self, names, images, captions, labels=None, classes=None):
        if not isinstance(images, Lazy):  # a list, as a Lazy
            images = Lazy(range(len(images)), images.__getitem__)
        self.names, self.images, self.captions = names, images, captions
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.images[i], self.captions[i]

    def select(self, indices):
        """The pairs at these indices, as plain Pairs without neighbours."""
        indices = list(indices)
        names, captions = [self.names[i] for i in indices], [self.captions[i] for i in indices]
        labels = self.labels and [self.labels[i] for i in indices]
        images = Lazy([self.images.items[i] for i in indices], self.images.function)
        return Pairs(names, images, captions, labels, self.classes)

    def stamps(self):
        """I strings that change when the image does: the keys of stored features."""
        stamp = {open_image: stamp_image, draw_scene: str}.get(self.images.function)
        if stamp is None:
            raise ValueError("features of these images cannot be stored: Pairs.stamps has no stamp")
        return [f"{name} {stamp(item)}" for name, item in zip(self.names, self.images.items)]

    def pair_ids(self, indices, captions):
        """(B, 2) for B images and a caption of each: (class or image, caption text) as numbers.

        Two pairs describe each other if they agree in either column; see positive_groups.
        """
        groups = [self.labels[i] if self.labels else i for i in indices]
        # A text's number must be the same on every rank.
        texts = [int.from_bytes(digest(caption)[:8], "big", signed=True) for caption in captions]
        return torch.tensor([groups, texts]).T

    def caption_table(self):
        """The N distinct captions, and (M, 2) indices (image, caption) of all right pairs."""
        index_of, right = {}, []
        for i, captions in enumerate(self.captions):
            for caption in dict.fromkeys(captions):
                right.append((i, index_of.setdefault(caption, len(index_of))))  # new: the next
        return list(index_of), torch.tensor(right)


def positive_groups(pair_ids):
    """(B, 2) of Pairs.pair_ids to (B,): the connected components of pairs that share an id.

    Images 7 7 8 9, captions a b b c: groups 0 0 0 3, as pairs 0, 1 share an image and 1, 2 a text.
    """
    groups = torch.arange(len(pair_ids), device=pair_ids.device)
    columns = [column.unique(return_inverse=True)[1] for column in pair_ids.T]  # ids from 0
    while True:
        before = groups
        for column in columns:
            # All pairs with an id take their lowest group, until no group changes any more:
            # with captions a b b c the groups 0 0 2 3 become 0 0 0 3.
            lowest = groups.scatter_reduce(0, column, groups, "amin", include_self=False)
            groups = lowest[column]
        if torch.equal(groups, before):
            return groups


def digest(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


class ImageDataset(torch.utils.data.Dataset):
    """(epoch, i) to (uint8 pixels (3, S, S), the index used, an error or "").

    An image that cannot be read is replaced by the next one that can, so that batches keep their
    size: an exception in a worker would end the run.

    augment  function(pixels (3, h, w), key) -> pixels, before they are resized; key is (epoch, i)
    """

    def __init__(self, images, transform, augment=None):
        self.images, self.transform, self.augment = images, transform, augment
        if isinstance(images, Lazy) and images.function is open_image and transform.resize:
            self.images = Lazy(images.items, functools.partial(open_image, size=transform.resize))

    def __getitem__(self, key):
        epoch, wanted = key
        used, error = wanted, ""
        pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)  # black, if 100 in a row cannot be read
        for i in range(wanted, wanted + 100):
            i %= len(self.images)
            try:
                pixels, used = to_pixels(self.images[i]), i
                break
            except (ValueError, OSError) as reason:
                error = error or str(reason)
        if self.augment:
            pixels = self.augment(pixels, (epoch, used))
        return self.transform.resize_and_crop(pixels), used, error


def image_loader(dataset, batches, workers, device):
    """An ImageDataset in batches of keys: pixels (B, 3, S, S), indices (B,), a tuple of errors."""
    if workers < 0:  # up to 8 with a GPU, else 1, and one core is left for training
        workers = min(8 if device.type == "cuda" else 1, os.cpu_count() - 1)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # so that workers' seeds leave the global generator alone
    )


# ---- Drawn shapes, the default data --------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
COLOURS |= {"yellow": (240, 210, 40), "purple": (140, 60, 180), "orange": (245, 140, 30)}
COLOURS |= {"black": (20, 20, 20), "gray": (140, 140, 140)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 0.1, "large": 0.18}  # radius as a share of the image's side
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_OBJECTS = {("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "circle")}
MAX_HELD_OUT = 2 * 1592  # half show none of these objects: only 1,592 such scenes are held out


class ShapesPairs(Pairs):
    """Drawn images such as "a small red circle left of a large blue star", without any download.

    Two objects, each with a size, a colour and a shape, beside or above each other: 18,240 scenes.
    A tenth of them are held out, as are all with one of HELD_OUT_OBJECTS, whose colour and shape
    are seen in training, but never together. Each scene is followed by its mirror, in which the two
    have changed places: a bag of words cannot tell which of the two images a caption describes.

    split   "train"; "val" or "test", which are the same images; or "all"
    seed    draws scenes and images
    count   images of a part: by default 10,000, or 512 held out (at most MAX_HELD_OUT), of which
            half show one of HELD_OUT_OBJECTS
    side    pixels
    """

    neighbours = 2  # a scene and its mirror

    def __init__(self, split="train", seed=0, count=None, side=64):
        check_choice("split", split, SPLITS)
        self.scenes, self.wordings, names = [], [], []
        parts = {"train": ["train"], "all": ["train", "held-out"]}
        for part in parts.get(split, ["held-out"]):
            rng = random.Random(f"shapes {part.replace('-', ' ')} {seed}")
            usual, held_out = (10_000, False) if part == "train" else (512, True)
            scenes = draw_scenes(rng, count or usual, held_out)
            self.scenes += scenes
            names += [f"shapes/{seed}/{part}/{i}" for i in range(len(scenes))]
        for scene, name in zip(self.scenes, names):
            # Its own generator: draw_scene's would tie the wording to the background.
            turned = random.Random(f"{name} told").random() < 0.5
            first, relation, second = scene
            self.wordings.append((second, OPPOSITE[relation], first) if turned else scene)
        items = [(*scene, name, side) for scene, name in zip(self.scenes, names)]
        captions = [[describe(*wording)] for wording in self.wordings]
        super().__init__(names, Lazy(items, draw_scene), captions)

    def hard_negatives(self, i):
        """Wrong captions of image i, each a small change to its own: {kind: caption}.

        "attributes"  the two colours exchanged; missing if the objects have one colour
        "relation"    left for right, above for below
        "order"       the two objects exchanged
        "replaced"    a control that needs no binding: an object in a colour that is not there
        """
        first, relation, second = self.wordings[i]
        (size_1, colour_1, shape_1), (size_2, colour_2, shape_2) = first, second
        absent = [colour for colour in COLOURS if colour not in (colour_1, colour_2)]
        replaced = (size_1, random.Random(self.names[i]).choice(absent), shape_1)
        wrong = {
            "relation": describe(first, OPPOSITE[relation], second),
            "order": describe(second, relation, first),
            "replaced": describe(replaced, relation, second),
        }
        if colour_1 != colour_2:
            first, second = (size_1, colour_2, shape_1), (size_2, colour_1, shape_2)
            wrong["attributes"] = describe(first, relation, second)
        return wrong


def draw_scenes(rng, count, held_out):
    """Scenes of objects (size, colour, shape), each followed by its mirror."""
    if held_out and count > MAX_HELD_OUT:
        raise ValueError(f"{count} held-out images, expected at most {MAX_HELD_OUT}")

    def random_object():
        return rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES)

    scenes = []
    while len(scenes) < count:
        scene = random_object(), rng.choice(("left of", "above")), random_object()
        first, relation, second = scene
        new_object = not HELD_OUT_OBJECTS.isdisjoint((first[1:], second[1:]))
        tenth = digest(f"{sorted([first, second])} {relation}")[0] < 26  # of 256, as for its mirror
        if first == second or (new_object or tenth) != held_out:  # invalid, or of the other part
            continue
        wants_new_object = len(scenes) < count // 2  # held-out scenes with a new object come first
        if held_out and (new_object != wants_new_object or scene in scenes):
            continue
        scenes += [scene, (second, relation, first)]
    return scenes[:count]


def describe(first, relation, second):
    return f"a {' '.join(first)} {relation} a {' '.join(second)}"


def draw_scene(scene):
    """A PIL image of (object, relation, object, name, side); the name decides all details."""
    first, relation, second, name, side = scene
    rng = random.Random(name)
    image = Image.new("RGB", (side, side), tuple(rng.randint(225, 255) for _ in range(3)))
    for (size, colour, shape), along in ((first, 0.27), (second, 0.73)):
        along, across = along + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.12, 0.12)
        x, y = (along, across) if relation == "left of" else (across, along)
        fill = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])
        radius = side * SIZES[size] * rng.uniform(0.9, 1.1)
        draw_shape(ImageDraw.Draw(image), shape, side * x, side * y, radius, fill)
    return image


def draw_shape(draw, shape, x, y, radius, fill):
    arm = radius / 3
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "cross":
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    else:
        # Corners around the centre: distance (share of the radius), angle (turns from straight up).
        corners = {
            "square": [(1.15, 0.125 + i / 4) for i in range(4)],
            "diamond": [(1.1, i / 4) for i in range(4)],
            "triangle": [(1.1, i / 3) for i in range(3)],
            "star": [(1.2 if i % 2 == 0 else 0.5, i / 10) for i in range(10)],
        }[shape]
        turns = [(d * radius, 2 * math.pi * a) for d, a in corners]
        draw.polygon([(x + d * math.sin(a), y - d * math.cos(a)) for d, a in turns], fill)


# ---- Readers -------------------------------------------------------------------------------------

IMAGE_COLUMNS = ["image", "image_name", "image_path", "filepath", "path", "filename", "file_name"]
CAPTION_COLUMNS = ["caption", "captions", "text", "title", "comment"]
# What folders, columns and Karpathy's files call a part of the data; None: they do not say.
SPLIT_OF = dict.fromkeys(("train", "training", "restval", None), "train")
SPLIT_OF |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
SPLIT_OF |= {"test": "test", "testing": "test"}

# torchvision's data sets: class, and the arguments of each split.
_BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_BY_THREE = {**_BY_SPLIT, "val": {"split": "val"}}
TORCHVISION_SETS = {
    **{n.lower(): (n, _BY_TRAIN) for n in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")},
    **{"flowers102": ("Flowers102", _BY_THREE), "dtd": ("DTD", _BY_THREE)},
    **{"aircraft": ("FGVCAircraft", _BY_THREE), "food101": ("Food101", _BY_SPLIT)},
    "country211": ("Country211", {**_BY_SPLIT, "val": {"split": "valid"}}),
    "pets": ("OxfordIIITPet", {**_BY_SPLIT, "train": {"split": "trainval"}}),
    "eurosat": ("EuroSAT", {None: {}}),
}


@dataclass
class Row:
    """What readers yield: a caption, or the class, of an image."""

    where: str  # names the row in messages, and images without a path: "captions.csv, line 7"
    image: object  # a path below the data's folder, or anything else that open_image accepts
    caption: str | None = None
    label: str | None = None  # the class name
    split: str | None = None  # as the data has it; __post_init__ makes it train, val or test
    group: str | None = None  # images of one group stay on one side of the hashed split

    def __post_init__(self):
        word = self.split and self.split.strip().lower()
        if word not in SPLIT_OF:
            raise ValueError(f"{self.where}: split is {self.split!r}, expected train, val or test")
        self.split = SPLIT_OF[word]
        text = self.caption.strip() if isinstance(self.caption, str) else ""
        # A row holds one caption, and not a list as Python or json prints it.
        is_list = re.fullmatch(r"""\[\s*['"].*['"]\s*\]""", text, re.DOTALL)
        if self.label is None and (is_list or not text):
            raise ValueError(f"{self.where}: caption is {self.caption!r}, expected one caption")
        self.caption = text


def load_pairs(
    spec,
    split="train",
    data_root="data",
    images=None,
    val_fraction=0.1,
    templates=TEMPLATES,
    seed=0,
    download=False,
    class_names=None,
):
    """Images with captions from a data spec.

    spec          "shapes", or what DATA_READERS reads: see README.md, "Your own images"
    split         "train", "val", "test" or "all". If the data has only one of val and test, it is
                  both. Without a split of its own, a val_fraction of the images is held out, as a
                  hash of their names (or groups) decides
    data_root     where torchvision's sets lie; download lets it fetch them
    images        the image folder of a table or .json, unless it is the file's own
    templates     what class names become: strings with {} in them
    seed          draws the shapes
    class_names   {class folder: name} for classes not named like their folders
    returns       Pairs; a ValueError names file and line of what is missing or wrong
    """
    check_choice("split", split, SPLITS)
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected a share from 0 to 1")
    spec = str(spec)
    if spec == "shapes":
        return ShapesPairs(split, seed=seed)
    kind = "folder/" if os.path.isdir(spec) else Path(spec).suffix.lower() or spec
    check_choice("folder, data set or kind of file", kind, ["shapes", *DATA_READERS])
    rows = DATA_READERS[kind](spec, data_root=data_root, download=download)
    rows_of = rows_by_image(rows, images or (spec if kind == "folder/" else os.path.dirname(spec)))
    pairs = pairs_from_rows(rows_of, templates, class_names or {})
    split_of = [own[0].split for own in rows_of.values()]
    if {"val", "test"}.isdisjoint(split_of):
        # A hash decides, so new images never move old ones across.
        groups = [own[0].group or name for (name, _), own in rows_of.items()]
        hashes = [int.from_bytes(digest(group)[:4], "big") / 2**32 for group in groups]
        split_of = ["test" if number < val_fraction else "train" for number in hashes]
    if split in ("val", "test") and split not in split_of:
        split = "val" if split == "test" else "test"  # it stands in for the other
    return pairs.select(i for i, found in enumerate(split_of) if split in (found, "all"))


def rows_by_image(rows, root):
    """{(name, source for open_image): rows}; two spellings of one path are one image."""
    rows_of, key_of = {}, {}  # key_of: an image as its row has it -> (name, source)
    for row in rows:
        if row.image not in key_of:
            name, source = row.where, row.image
            if isinstance(source, str):  # a path, which is a better name
                source = os.path.normpath(os.path.join(root, source))
                name = Path(os.path.relpath(source, root or ".")).as_posix()
                if not os.path.isfile(source):
                    raise ValueError(f"{row.where}: missing image {source}")
            key_of[row.image] = name, source
        own = rows_of.setdefault(key_of[row.image], [])
        own.append(row)
        if row.split != own[0].split:
            raise ValueError(f"{row.where}: split is {row.split}, but {own[0].split} above")
    if not rows_of:
        raise ValueError(f"no images with captions below {root}")
    return rows_of


def pairs_from_rows(rows_of, templates, class_names):
    """Pairs of rows_by_image: an image has its rows' captions, or those of its class."""
    names, sources = zip(*rows_of)
    images, folders = Lazy(sources, open_image), [own[0].label for own in rows_of.values()]
    if folders[0] is None:
        if class_names:
            raise ValueError("class names given, but the data has captions, not classes")
        captions = [list(dict.fromkeys(row.caption for row in own)) for own in rows_of.values()]
        return Pairs(list(names), images, captions)
    known = sorted({*folders})
    # Extra names (say all of ImageNet's) are fine if every class has one. If not, one is misspelt.
    if {*known} - {*class_names}:
        for name in class_names:
            check_choice("class to rename", name, known)
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"template {wrong[0]!r} has no {{}} for the class name")
    index = {folder: k for k, folder in enumerate(known)}
    labels = [index[folder] for folder in folders]
    classes = [readable_name(class_names.get(name, name)) for name in known]
    by_class = [[template.replace("{}", name) for template in templates] for name in classes]
    return Pairs(list(names), images, [by_class[label] for label in labels], labels, classes)


def readable_name(name):
    """A class name as words: underscores and runs of white space become one space."""
    return re.sub(r"[_\s]+", " ", name).strip()


def read_torchvision(name, data_root, download):
    class_name, splits = TORCHVISION_SETS[name]
    make = getattr(torchvision.datasets, class_name)
    for part, arguments in splits.items():
        with blamed_on(f"{name} below {data_root}; --download fetches it"):
            data = make(str(data_root), download=download, **arguments)
        labels = data.targets if hasattr(data, "targets") else data._labels
        for i, label in enumerate(labels):
            where = f"{name}/{part}/{i}" if part else f"{name}/{i}"
            yield Row(where, (data, i), label=data.classes[int(label)], split=part)


def list_images(folder):
    """The image files below a folder in order, as paths from there, without hidden ones."""
    paths = glob.glob("**/*", root_dir=folder, recursive=True)
    files = [path for path in paths if not os.path.isdir(os.path.join(folder, path))]
    suffix_of = {file: os.path.splitext(file)[1].lower() or "no suffix" for file in files}
    if others := sorted({*suffix_of.values()} - IMAGE_SUFFIXES - {".txt"}):
        notice(f"ignored in {folder}: files with {', '.join(others)}")
    images = [file for file, suffix in suffix_of.items() if suffix in IMAGE_SUFFIXES]
    return sorted(images, key=lambda path: path.split(os.sep))


def read_folder(folder, **_):
    """1.jpg with 1.txt, or dog/1.jpg; with splits train/1.jpg, train/1.txt, or train/dog/1.jpg."""
    images = list_images(folder)
    places = [image.split(os.sep) for image in images]
    texts = [os.path.join(folder, os.path.splitext(image)[0] + ".txt") for image in images]
    has_texts = any(map(os.path.isfile, texts))
    tops = {place[0] for place in places if len(place) > 1}
    splits = {top for top in tops if top.lower() in SPLIT_OF}
    if len(splits) > 1 and splits != tops:
        raise ValueError(f"{folder} has {', '.join(sorted(splits))}, but also {min(tops - splits)}")
    depth = 1 if splits and splits == tops else 0  # of train/
    least = depth + 1 if has_texts else depth + 2  # of 1.jpg, or of dog/1.jpg, below it
    for image, place, text in zip(images, places, texts):
        split = place[0] if depth else None
        if len(place) < least:
            notice(f"ignored: images of {folder} outside of its class folders or splits")
        elif has_texts:
            for caption in filter(str.strip, text_lines(text)):
                yield Row(text, image, caption, split=split)
        else:
            yield Row(image, image, label=place[depth], split=split)


def text_lines(path):
    with blamed_on(path, "cannot read UTF-8 text from"), open(path, encoding="utf-8-sig") as file:
        yield from file


def read_table(path, **_):
    """A table; its header's most frequent separator is used."""
    separator = max("\t,;|", key=next(text_lines(path), "").count)
    # Strict: else a quote that is never closed would quietly swallow the rows below it.
    options = {"delimiter": separator, "skipinitialspace": True, "strict": True}
    reader = csv.DictReader(text_lines(path), **options)
    advice = "quote captions that hold the separator or quotes, and double quotes inside them"
    try:
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if any(cell.strip() for cell in record.pop(None, ())):  # csv keeps surplus cells there
                raise ValueError(f"{where}: more cells than the header has columns; {advice}")
            yield from record_rows(where, record)
    except csv.Error as error:  # in the record that begins on the next line
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}; {advice}") from error


def read_jsonl(path, **_):
    """One json object a line; its caption may be a list of captions."""
    for line, text in enumerate(text_lines(path), 1):
        if text.strip():
            where = f"{path}, line {line}"
            with blamed_on(where, "no json object in"):
                record = dict(json.loads(text))
            yield from record_rows(where, record)


def record_rows(where, record):
    """The rows of a table's {column: cell}, whose columns are found by name."""
    record = {name.strip().lower(): cell for name, cell in record.items()}
    image = next((name for name in IMAGE_COLUMNS if name in record), None)
    caption = next((name for name in CAPTION_COLUMNS if name in record), None)
    if None in (image, caption):
        expected = f"one of {', '.join(IMAGE_COLUMNS)}, and one of {', '.join(CAPTION_COLUMNS)}"
        raise ValueError(f"{where}: the columns are {', '.join(record)}; expected {expected}")
    cells = record.get("split"), record.get("group")
    split, group = (None if cell is None else str(cell) for cell in cells)
    captions = record[caption]  # of json perhaps a list
    for text in captions if captions and isinstance(captions, list) else [captions]:
        yield Row(where, str(record[image] or ""), text, None, split, group)


def read_json_captions(path, **_):
    """COCO's captions_*.json, or Karpathy's dataset_*.json, which has splits of its own."""
    data = read_json(Path(path))
    with blamed_on(path):
        if "images" not in data:
            raise ValueError(f"it has {', '.join(data)}; expected images, and COCO's annotations")
        if "annotations" in data:
            files = {entry["id"]: entry["file_name"] for entry in data["images"]}
            for note in data["annotations"]:
                where = f"{path}, annotation {note.get('id')}"
                yield Row(where, files.get(note["image_id"], ""), note["caption"])
            return
        for entry in data["images"]:
            image = os.path.join(entry.get("filepath", ""), entry["filename"])
            for sentence in entry["sentences"]:
                yield Row(f"{path}, {image}", image, sentence["raw"], split=entry["split"])


def read_shards(spec, **_):
    """Tar files in webdataset's layout: members key.jpg and key.txt, one caption per line."""
    paths = [spec]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", spec):  # a-{08..10}.tar: a-08, a-09 and a-10
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        paths = [spec.replace(braces[0], str(n).zfill(len(first))) for n in numbers]
    root = os.path.dirname(spec.partition("{")[0]) or "."
    for path in paths:
        with blamed_on(path), tarfile.open(path, "r:") as tar:
            images, captions = {}, {}
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, file = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = file.partition(".")
                key, kind = folder + slash + stem, "." + kind.lower()
                if kind in IMAGE_SUFFIXES:
                    images[key] = path, member.offset_data, member.size
                elif kind == ".txt":
                    text = tar.extractfile(member).read().decode("utf-8-sig").strip()
                    captions[key] = re.split(r"\s*\n\s*", text)
            tar.fileobj.seek(tar.offset)  # a whole archive ends in a block of zeros
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise ValueError(f"truncated or damaged at byte {tar.offset:,}")
        name = Path(os.path.relpath(path, root)).as_posix()
        for key in images | captions:
            for caption in captions.get(key, [""]):  # a missing half becomes "", which Row rejects
                yield Row(f"{name}/{key}", images.get(key, ""), caption)


# The one table of readers: what a spec is, and the function that yields its Rows.
DATA_READERS = {".csv": read_table, ".tsv": read_table, ".txt": read_table, ".jsonl": read_jsonl}
DATA_READERS |= {".json": read_json_captions, ".tar": read_shards, "folder/": read_folder}
DATA_READERS |= dict.fromkeys(TORCHVISION_SETS, read_torchvision)


# ==== 7  Checkpoints ==============================================================================

# config.json names its writer in model_type: us, or transformers.
MODEL_TYPE, PUBLISHED_TYPE = "dualenc", "vision-text-dual-encoder"
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
IMAGE_FILE, PICKLE_FILE = "preprocessor_config.json", "pytorch_model.bin"
RUN_CONFIG = "train_config.json"  # the folder that holds it is a run of train.py


def build_from_towers(cls, vision, text, projection_dim, pretrained, overrides):
    sides = {"vision": {}, "text": {}, "dual": {"projection_dim": projection_dim}}
    for name, value in overrides.items():
        side, _, rest = name.partition("_")
        side, name = (side, rest) if side in ("vision", "text") else ("dual", name)
        sides[side][name] = value
    vision_model = build_vision_tower(str(vision), pretrained, sides["vision"])
    kind, _, family = str(text).partition(":")
    if kind == "scratch":
        sizes = {"family": family or "bert", **sides["text"]}
        text_model = build_tower(config_from_dict(TextConfig, sizes))
    else:
        folder = find_folder(text)
        text_model = load_tower(read_text_config, folder, text, sides["text"])
    config = {"vision": vision_model.config, "text": text_model.config, **sides["dual"]}
    model = cls(config_from_dict(DualEncoderConfig, config), vision_model, text_model)
    if kind != "scratch":
        add_processor(model, vision_model.image_transform(), folder)
    return model


def build_vision_tower(vision, pretrained, overrides):
    """A VisionEncoder from a timm name, or from a folder or hub id of timm's or transformers'."""
    found, source = {"name": vision, "args": {}}, vision  # source: what timm loads weights from
    if "/" in vision or Path(vision).is_dir():
        folder = find_folder(vision.removeprefix("hf-hub:"))
        values = read_json(folder / CONFIG_FILE)
        if "architecture" not in values:
            tower = load_tower(read_vision_config, folder, vision, overrides)
            tower.own_transform = read_image_transform(folder)
            return tower
        found, source = read_timm_config(values), f"local-dir:{folder}"
        pretrained = pretrained or not vision.startswith("hf-hub:")  # others always load
    args = found["args"] | overrides.get("args", {})
    config = config_from_dict(VisionConfig, {**found, **overrides, "args": args})
    tower = VisionEncoder(config, pretrained_from=source if pretrained else None)
    tower.config = dataclasses.replace(config, image_size=tower.image_size)
    tower.weights_from = vision if pretrained else None
    return tower


def read_timm_config(values):
    """Fields of VisionConfig from the config.json of a timm folder, whose path is not kept."""
    args = values.get("model_args") or {}
    size = args.get("img_size")
    found = {"name": values["architecture"], "pooling": args.get("global_pool")}
    found["image_size"] = size[0] if isinstance(size, list) else size
    left_out = ("img_size", "global_pool", "in_chans", "num_classes")
    return {**found, "args": {name: args[name] for name in args if name not in left_out}}


def add_processor(model, image_transform, folder):
    """Give the model a processor with the folder's tokenizer, if both halves are there."""
    tokenizer, token_types = read_tokenizer(folder)
    if tokenizer is None or image_transform is None:
        return
    last = model.config.text.vocab_size - 1
    with blamed_on(folder, "cannot use the tokenizer of"):
        positions = model.text_model.max_tokens
        model.processor = Processor(image_transform, tokenizer, token_types, positions)
        largest = max(tokenizer.padding["pad_id"], *tokenizer.get_vocab().values())
        if largest > last:
            raise ValueError(f"id {largest} is beyond the text tower's vocabulary, 0 to {last}")


def save_dual_encoder(model, folder, format):
    check_choice("checkpoint format", format, ("dualenc", "hf"))
    folder, processor = Path(folder), model.processor
    if processor and None in (processor.tokenizer, processor.image_transform):
        raise ValueError("the processor lacks its tokenizer or image_transform: give it both")
    own = model.config.to_dict(), model.state_dict()
    config, weights = publish_dual_encoder(model) if format == "hf" else own
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # "pt" is PyTorch; transformers does not read a file without it.
    write_file(folder / WEIGHTS_FILE, safetensors.torch.save(weights, metadata={"format": "pt"}))
    if processor:
        processor.save_pretrained(folder, format)


def load_dual_encoder(cls, folder_or_hub_id):
    folder = find_folder(folder_or_hub_id)
    values = read_json(folder / CONFIG_FILE)
    own = values.get("model_type") == MODEL_TYPE
    # On the meta device tensors have shapes and no values: absurd sizes cost no memory.
    with blamed_on(folder / CONFIG_FILE, "cannot build the model of"), torch.device("meta"):
        what = "model_type (for towers of other models: from_vision_text_pretrained)"
        check_choice(what, values.get("model_type"), (MODEL_TYPE, PUBLISHED_TYPE))
        model = cls(DualEncoderConfig.from_dict(values) if own else read_dual_config(values))
    weights = read_weights(folder) if own else read_published_weights(folder)
    fill(model, weights, folder, () if own else published_pieces(model))
    add_processor(model, read_image_transform(folder), folder)
    return model.eval()


def fill(module, weights, source, pieces=()):
    """Give a module on the meta device exactly the weights {name: tensor}, as float32.

    pieces  how tensors of transformers are cut, joined and renamed: see published_pieces
    """
    with blamed_on(source, f"weights do not fit the {CONFIG_FILE} of"):
        # With assign the file's tensors become the parameters.
        module.load_state_dict(regroup(weights, pieces), assign=True)
    # Buffers that timm computes are not in files, so they are still on meta: allocate, recompute.
    module.float()._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()


def find_folder(folder_or_hub_id):
    """A local folder, a run's best checkpoint, or the cache's copy of a hub id or id@revision."""
    folder = Path(folder_or_hub_id)
    if (folder / RUN_CONFIG).is_file():
        for name in ("best", "best.old", "last", "last.old"):  # .old: killed while saving a new one
            if (folder / name).is_dir():
                return folder / name
        raise ValueError(f"the run in {folder} has not saved a checkpoint yet")
    if folder.is_dir():
        return folder
    name, _, revision = str(folder_or_hub_id).partition("@")
    download = functools.partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    with blamed_on(f"{folder_or_hub_id}, nor a reachable hub id", "no folder"):
        folder = Path(download(allow_patterns=["*.json", "*.txt", "*.model", WEIGHTS_FILE]))
        if not (folder / WEIGHTS_FILE).is_file():
            download(allow_patterns=PICKLE_FILE)
        return folder


def read_json(path, default=None):
    """The object in a json file; the default, if there is one, stands for a missing file."""
    if default is not None and not Path(path).is_file():
        return default
    with blamed_on(path):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a json object was expected, not {type(values).__name__}")
        return values


def read_weights(folder):
    """{name: tensor} of a folder's one file of weights; nothing in it is executed."""
    is_pickle = (folder / PICKLE_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()
    path = folder / (PICKLE_FILE if is_pickle else WEIGHTS_FILE)
    with blamed_on(path, "cannot read weights in one piece from"):
        if is_pickle:
            return torch.load(path, map_location="cpu", weights_only=True)
        mapped = safetensors.torch.load_file(path)  # memory-mapped: it changes with the file
        return {name: tensor.clone() for name, tensor in mapped.items()}


def write_file(path, content):
    """Write text or bytes whole or not at all: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")
    try:
        with blamed_on(path, "cannot write"), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only after an error


# ==== 8  Large batches and several processes ======================================================


class MicroBatches(nn.Module):
    """Embeds a batch in pieces, so that the exact gradient of a large batch fits in little memory.

    The loss compares each pair with all others, so losses of small batches do not add up to it.
    But it needs only embeddings, which are small. So each piece is embedded, and all else that its
    towers computed is dropped; the loss of all embeddings gives each embedding its gradient; and
    each piece is embedded again, with the same dropout, to carry these gradients into the weights.
    Batch norm sees a piece at a time, and updates its statistics twice.

    model      DualEncoder with a processor
    size       pairs per piece at most; all are about equal; 0 embeds the batch at once
    precision  "bf16", "fp16" or "fp32": what the towers compute in
    source     Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
               Setup", section 3
    """

    def __init__(self, model, size=0, precision="fp32"):
        super().__init__()
        self.model, self.size, self.precision = model, size, precision

    def forward(self, images, captions):
        """Both sides of a batch.

        images       (B, 3, S, S) uint8 from ImageTransform.resize_and_crop, or (B, W) features of
                     a locked tower
        captions     tensors (B, T) by name from the processor, or {"features": (B, W)}
        returns      image_embeds (B, E) and text_embeds (B, E), unit norm, in the batch's order
        Exercise 10  hard, 60 minutes: a large batch in pieces, run `pytest -k exercise_10`
        """
        if not 0 < self.size < len(images):
            return self.embed(images, captions)
        embeds, count = [], math.ceil(len(images) / self.size)
        parts_of = {name: tensor.tensor_split(count) for name, tensor in captions.items()}
        for i, part in enumerate(images.tensor_split(count)):
            texts = {name: parts[i] for name, parts in parts_of.items()}
            # Drops what embed computes on the way, and calls it again in the backward pass.
            embeds.append(checkpoint(self.embed, part, texts, use_reentrant=False))
        image_embeds, text_embeds = zip(*embeds)
        return torch.cat(image_embeds), torch.cat(text_embeds)

    def embed(self, images, captions):
        """forward for one piece, b pairs: image_embeds (b, E) and text_embeds (b, E)."""
        model, device = self.model, self.model.logit_scale.device
        images = images.to(device, non_blocking=True)
        captions = {name: tensor.to(device) for name, tensor in captions.items()}
        with autocast(device, self.precision):
            if images.ndim == 2:
                image_embeds = model.project_image(images)
            else:
                image_embeds = model.encode_image(model.processor.image_transform.normalize(images))
            if "features" in captions:
                text_embeds = model.project_text(captions["features"])
            else:
                text_embeds = model.encode_text(**captions)
        return image_embeds, text_embeds


def tiled_clip_loss(image_embeds, text_embeds, logit_scale, tile=1024):
    """clip_loss, value and gradients, with a few tiles of the B x B matrix in memory at a time.

    A row's cross-entropy is its log-sum-exp minus the score of its pair. Only the log-sum-exp needs
    other columns. The loss is the mean over i of (lse of row i + lse of column i) / 2 - score ii.
    Each rank computes the R rows of its own images, with all B columns. The mean over ranks, of
    values and of gradients, is that of clip_loss on all rows.

    image_embeds, text_embeds  (R, E)  unit-norm rows of this rank; row i describes image i
    logit_scale                ()      natural log of the inverse temperature
    tile                       rows and columns of the matrix at a time
    returns                    ()      mean loss in nats
    raises                     ValueError if the two batches differ in shape
    source                     Cheng et al. 2024, "Breaking the Memory Barrier", section 3.1
    """
    check_same_shape(image_embeds, text_embeds)
    scaled = logit_scale.exp() * image_embeds
    of_rows, of_columns = TiledLogSumExp.apply(scaled, gather_embeds(text_embeds), tile)
    # of_columns (B,) covers only this rank's images: stack them, (ranks, B), and combine the ranks.
    of_columns = gather_embeds(of_columns[None]).logsumexp(dim=0)
    pair_scores = (scaled * text_embeds).sum(dim=1)
    row_loss = (of_rows - pair_scores).mean()  # of this rank's R images
    # All ranks have the same first term, and each its own R pairs: the mean over ranks is that of
    # all B pairs.
    column_loss = of_columns.mean() - pair_scores.mean()
    return (row_loss + column_loss) / 2


class TiledLogSumExp(torch.autograd.Function):
    """Log-sum-exp of every row (I,) and every column (N,) of the scores images @ texts.T.

    images (I, E), already times exp(logit_scale), and texts (N, E) are embeds. The gradient of a
    log-sum-exp is a softmax, which needs the finished sum: the backward pass computes all tiles
    again.

    Exercise 9  hard, 120 minutes: the loss without its matrix, run `pytest -k exercise_9`
    """

    @staticmethod
    def forward(ctx, images, texts, tile):  # ctx carries what the backward pass needs
        of_rows = images.new_full((len(images),), -math.inf)
        of_columns = texts.new_full((len(texts),), -math.inf)
        for rows, columns, scores in score_tiles(images, texts, tile):
            of_rows[rows] = of_rows[rows].logaddexp(scores.logsumexp(dim=1))
            of_columns[columns] = of_columns[columns].logaddexp(scores.logsumexp(dim=0))
        ctx.tile = tile
        ctx.save_for_backward(images, texts, of_rows, of_columns)
        return of_rows, of_columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, grad_columns):
        images, texts, of_rows, of_columns = ctx.saved_tensors
        grad_images, grad_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for rows, columns, scores in score_tiles(images, texts, ctx.tile):
            in_row = (scores - of_rows[rows, None]).exp()  # softmax: exp(score - log-sum-exp)
            in_column = (scores - of_columns[columns]).exp()
            # A log-sum-exp's derivative with respect to its scores is the softmax.
            grad = grad_rows[rows, None] * in_row + grad_columns[columns] * in_column
            grad_images[rows] += grad @ texts[columns]
            grad_texts[columns] += grad.T @ images[rows]
        return grad_images, grad_texts, None  # none for the tile size


def score_tiles(images, texts, tile):
    """Yields (row slice, column slice, the scores of these rows with these columns)."""
    for top in range(0, len(images), tile):
        for left in range(0, len(texts), tile):
            rows, columns = slice(top, top + tile), slice(left, left + tile)
            yield rows, columns, images[rows] @ texts[columns].T


def world_size():
    """Processes of a torchrun job, or 1."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank():
    """Which process of a torchrun job this is, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def share(count):
    """This rank's slice of `count` items; the ranks' shares differ by at most one."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def from_all_ranks(value):
    """[the value of each rank], of anything that can be pickled; ranks wait for each other."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def process_group():
    """Inside, torchrun's processes can communicate, and only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group()  # gloo on CPUs, nccl on CUDA
    with redirect_stdout(sys.stdout if rank() == 0 else None):  # print to None is silent
        yield
    # Not in a finally: after an error other ranks may never arrive, and torchrun ends them.
    torch.distributed.destroy_process_group()


def gather_embeds(embeds):
    """Every rank's rows, with gradients; the identity in one process.

    A row's gradients from the losses of all ranks are summed on the rank that owns it. If two ranks
    compute the same loss, rank 0's rows get their gradient twice, so its weights get 2 g0, and rank
    1's get 2 g1. DistributedDataParallel's mean over ranks is g0 + g1, the gradient of all rows.

    embeds   (R, ...)  this rank's rows of anything, as many on every rank
    returns  (B, ...)  the rows of all ranks, in order
    """
    return embeds if world_size() == 1 else GatherRows.apply(embeds)


class GatherRows(torch.autograd.Function):
    """See gather_embeds.

    Exercise 11  hard, 60 minutes: rows of all ranks, with gradients, run `pytest -k exercise_11`
    """

    @staticmethod
    def forward(ctx, rows):
        parts = [rows.new_empty(rows.shape) for _ in range(world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(world_size())[rank()]


# ==== 9  Published checkpoints ====================================================================


class RobertaEncoder(TextEncoder):
    """BERT with RoBERTa's positions: those of real tokens start at pad_token_id + 1."""

    @property
    def max_tokens(self):
        return self.config.max_positions - self.config.pad_token_id - 1

    def default_positions(self, input_ids):
        return positions_after_pad(input_ids, self.config.pad_token_id)


def positions_after_pad(input_ids, pad_token_id):
    """RoBERTa's positions: real tokens count up from pad_token_id + 1, padding has pad_token_id.

    They follow from the ids and not from the attention mask, as in transformers.

    input_ids   (B, T)
    returns     (B, T)
    Exercise 5  easy, 15 minutes: positions that count real tokens, run `pytest -k exercise_5`
    """
    is_real = (input_ids != pad_token_id).long()
    return is_real.cumsum(dim=1) * is_real + pad_token_id


class MPNetEncoder(RobertaEncoder):
    """RoBERTa with a learned bias on every layer's scores, by the distance of query and key.

    The bias table has 16 rows for keys up to the query and 16 for keys on its right. Distances
    below 8 have a row each, those from 8 to 128 share 8 rows by their logarithm.

    source  Raffel et al. 2020 (T5), section 2.1
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder["relative_attention_bias"] = nn.Embedding(32, config.heads)
        self._init_weights(self.encoder["relative_attention_bias"])

    def score_mask(self, attention_mask, hidden):
        position = torch.arange(hidden.shape[1])
        to_right = position[None, :] - position[:, None]  # (T, T), from query to key
        distance = to_right.abs()
        share = (distance.clamp(min=1) / 8).log() / math.log(128 / 8)  # at 8: 0, 30: 0.48, 128: 1
        far_row = (8 + (share * 8).long()).clamp(max=15)  # at 8: 8, 30: 11, 128: 15
        row = torch.where(distance < 8, distance, far_row) + 16 * (to_right > 0)
        bias = self.encoder["relative_attention_bias"](row.to(hidden.device)).permute(2, 0, 1)[None]
        is_real = super().score_mask(attention_mask, hidden)
        return bias if is_real is None else bias.masked_fill(~is_real, torch.finfo(bias.dtype).min)


class PublishedVisionEncoder(VisionEncoder):
    """A vision tower of transformers, built from timm's parts; config.args has its config.json."""

    own_transform = None  # the ImageTransform in the folder that the weights came from

    def build_trunk(self, pretrained_from):
        config, family = self.config, HF_VISION[self.config.name]
        if (config.image_size or 0) < 1:
            raise ValueError(f"{config.name!r} is a family, not a model: name one by folder or id")
        for key in config.args:
            check_choice(f"argument of {config.name}", key, VISION_KEYS)
        args = family.defaults | config.args
        act, pooler_act = args.pop("hidden_act", "gelu"), args.pop("pooler_act", None)
        epsilon, mlp_width = args.pop("layer_norm_eps", 1e-6), args.pop("intermediate_size", None)
        poolings = ("pooler", "token") if pooler_act else (None,)
        check_choice("activation", act, ACTIVATIONS)
        check_choice(f"{config.name} pooling", config.pooling, poolings)
        args = {VISION_KEYS.get(key, key): value for key, value in args.items()}
        args["norm_layer"] = functools.partial(nn.LayerNorm, eps=epsilon)
        args["proj_drop_rate"] = args.get("pos_drop_rate", 0.0)
        if mlp_width is not None:  # + 0.5, as timm rounds width * ratio down
            args["mlp_ratio"] = (mlp_width + 0.5) / args.get("embed_dim", 768)
        if config.patch_dropout:
            args["patch_drop_rate"] = config.patch_dropout
        trunk = family.make(img_size=config.image_size, num_classes=0, **args)
        for module in trunk.modules():
            if isinstance(module, timm.layers.Mlp):
                module.act = ACTIVATIONS[act]()
        if config.pooling == "pooler":  # timm's place for a classifier, after norm and first token
            dense = nn.Linear(trunk.embed_dim, trunk.embed_dim)
            trunk.head = nn.Sequential(OrderedDict(dense=dense, act=ACTIVATIONS[pooler_act]()))
        return trunk

    def image_transform(self, crop_pct=None):
        """What the folder's own file says."""
        if self.own_transform is None:
            raise ValueError(f"{self.weights_from} has no {IMAGE_FILE}: how are images prepared?")
        return self.own_transform


class DinoTransformer(timm.models.VisionTransformer):
    """A ViT that resamples its positions to each image's grid, not antialiased: as DINOv2."""

    def _pos_embed(self, x):
        """(B, h, w, W) patches to (B, 1 + h * w, W) tokens."""
        resample, grid = timm.layers.resample_abs_pos_embed, self.patch_embed.grid_size
        positions = resample(self.pos_embed, x.shape[1:3], grid, antialias=False)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(x + positions)


def build_tower(config):
    """The tower that a VisionConfig or TextConfig describes, with random weights."""
    if isinstance(config, TextConfig):
        return HF_TEXT[config.family].make(config)
    return (PublishedVisionEncoder if config.name in HF_VISION else VisionEncoder)(config)


class Published(typing.NamedTuple):
    """A family of towers, and how transformers writes it."""

    make: typing.Callable  # text: class of the tower; vision: what makes the timm model
    prefix: str = ""  # of tensor names in files with a task head; "" if transformers lacks it
    names: dict = {}  # {pattern in our tensor names: its replacement in theirs}
    defaults: dict = {}  # where a config.json is silent: see _VIT; text: fields of TextConfig


# Keys of a vision tower's config.json, and timm's names. The second line has those that timm does
# not know: build_trunk handles them.
VISION_KEYS = {name: name for name in ("patch_size", "qkv_bias", "mlp_ratio", "drop_path_rate")}
VISION_KEYS |= {n: n for n in ("intermediate_size", "hidden_act", "pooler_act", "layer_norm_eps")}
VISION_KEYS |= {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
VISION_KEYS |= {"hidden_dropout_prob": "pos_drop_rate", "layerscale_value": "init_values"}
VISION_KEYS |= {"attention_dropout": "attn_drop_rate", "layer_scale_init_value": "init_values"}
VISION_KEYS |= {"attention_probs_dropout_prob": "attn_drop_rate"}
VISION_KEYS |= {"hidden_size": "embed_dim", "use_relative_position_bias": "use_rel_pos_bias"}
VISION_KEYS |= {"use_shared_relative_position_bias": "use_shared_rel_pos_bias"}
VISION_KEYS |= {"use_absolute_position_embeddings": "use_abs_pos_emb"}
# Substitutions that turn timm's names into those of published files, one after the other: from
# blocks.0.attn.proj.bias to encoder.layer.0.attention.output.dense.bias. Reading uses them, too.
_VIT_NAMES = {
    **{"^cls_token": "embeddings.cls_token", "^reg_token": "embeddings.distillation_token"},
    "^pos_embed": "embeddings.position_embeddings",
    "^patch_embed.proj": "embeddings.patch_embeddings.projection",
    "^rel_pos_bias": "encoder.relative_position_bias",
    **{"^blocks": "encoder.layer", "norm1": "layernorm_before", "norm2": "layernorm_after"},
    "attn.proj": "attention.output.dense",
    "attn.q[._]": "attention.attention.query.",  # BEiT's biases are attn.q_bias and attn.v_bias
    "attn.k[._]": "attention.attention.key.",
    "attn.v[._]": "attention.attention.value.",
    "attn.relative": "attention.attention.relative_position_bias.relative",
    **{"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    **{"gamma_": "lambda_", "ls(1|2).gamma": r"layer_scale\1.lambda1"},  # BEiT's, DINOv2's
    **{"^norm": "layernorm", "^head": "pooler", "^fc_norm": "pooler.layernorm"},  # fc_norm: BEiT
}
_DINO_NAMES = _VIT_NAMES | {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
_CLIP_NAMES = {
    "^cls_token": "embeddings.class_embedding",
    "^pos_embed": "embeddings.position_embedding.weight",
    "^patch_embed.proj": "embeddings.patch_embedding",
    "^norm_pre": "pre_layrnorm",  # the spelling is theirs
    **{r"^blocks(.*)\.norm": r"encoder.layers\1.layer_norm", "^blocks": "encoder.layers"},
    **{"attn.(q|k|v)[.]": r"self_attn.\1_proj.", "attn.proj": "self_attn.out_proj"},
    "^(norm|fc_norm)": "post_layernorm",  # SigLIP's is before pooling, CLIP's after it
    **{"attn_pool.latent": "head.probe", "attn_pool.(q|k|v)[.]": "head.attention.in_proj_"},
    **{"attn_pool.proj": "head.attention.out_proj", "attn_pool.norm": "head.layernorm"},
    "attn_pool": "head",
}
FLAT = (".class_embedding", ".position_embedding.weight")  # timm's begin with dimensions of one

# Defaults of transformers that differ from timm's: keys of config.json, or arguments of timm.
_VIT = {"layer_norm_eps": 1e-12, "pooler_act": "tanh"}
_DEIT = _VIT | {"reg_tokens": 1}  # timm's name for the distillation token
_BEIT = {"layer_norm_eps": 1e-12, "layer_scale_init_value": 0.1, "drop_path_rate": 0.1}
_BEIT |= {"use_absolute_position_embeddings": False}
_CLIP = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "patch_size": 32}
_CLIP |= {"pre_norm": True, "fc_norm": True}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "class_token": False, "global_pool": "map"}
_DINO = {"layerscale_value": 1.0, "patch_size": 14, "dynamic_img_size": True}
_TIMM = timm.models.VisionTransformer
HF_VISION = {
    "vit": Published(_TIMM, "vit.", _VIT_NAMES, _VIT),
    "deit": Published(_TIMM, "deit.", _VIT_NAMES, _DEIT),
    "beit": Published(timm.models.Beit, "beit.", _VIT_NAMES, _BEIT),
    "clip_vision_model": Published(_TIMM, "vision_model.", _CLIP_NAMES, _CLIP),
    "siglip_vision_model": Published(_TIMM, "vision_model.", _CLIP_NAMES, _SIGLIP),
    "dinov2": Published(DinoTransformer, "dinov2.", _DINO_NAMES, _DINO),
}

# Keys of config.json in BERT and those like it, and in DistilBERT: fields of TextConfig.
BERT_KEYS = {n: n for n in ("vocab_size", "pad_token_id", "type_vocab_size", "layer_norm_eps")}
BERT_KEYS |= {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
BERT_KEYS |= {"intermediate_size": "mlp_width", "max_position_embeddings": "max_positions"}
BERT_KEYS |= {"hidden_act": "activation", "hidden_dropout_prob": "dropout"}
BERT_KEYS |= {"attention_probs_dropout_prob": "attention_dropout"}
DISTILBERT_KEYS = {name: name for name in ("activation", "dropout", "attention_dropout")}
DISTILBERT_KEYS |= dict(dim="width", n_layers="depth", n_heads="heads", hidden_dim="mlp_width")
_MPNET = {"pad_token_id": 1, "vocab_size": 30527, "type_vocab_size": 0}
_DISTILBERT = {"depth": 6, "type_vocab_size": 0}
_MPNET_NAMES = {
    "self.(q|k|v)[a-z]+": r"attn.\1",
    "attention.output.dense": "attention.attn.o",
    "attention.output.LayerNorm": "attention.LayerNorm",
}
_DISTILBERT_NAMES = {
    **{"^encoder": "transformer", "self.(q|k|v)[a-z]+": r"\1_lin"},
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    **{"intermediate.dense": "ffn.lin1", "output.dense": "ffn.lin2"},
    "output.LayerNorm": "output_layer_norm",
}
HF_TEXT = {
    "bert": Published(TextEncoder, "bert."),
    "roberta": Published(RobertaEncoder, "roberta.", {}, {"pad_token_id": 1, "vocab_size": 50265}),
    "xlm-roberta": Published(RobertaEncoder, "roberta.", {}, {"pad_token_id": 1}),
    "camembert": Published(RobertaEncoder, "roberta.", {}, {"pad_token_id": 1}),
    "mpnet": Published(MPNetEncoder, "mpnet.", _MPNET_NAMES, _MPNET),
    "distilbert": Published(TextEncoder, "distilbert.", _DISTILBERT_NAMES, _DISTILBERT),
}

# ---- Reading and writing -------------------------------------------------------------------------


def published_row(config):
    """The family of a tower's configuration; None for a timm model."""
    return HF_TEXT[config.family] if isinstance(config, TextConfig) else HF_VISION.get(config.name)


def published_pieces(module):
    """[(name in a published file, our name)] of a tower or DualEncoder, a pair for each piece.

    Most tensors are one piece. timm's blocks.0.attn.qkv.bias is three, end to end, that files have
    one by one: encoder.layer.0.attention.attention.query.bias, then ...key.bias and ...value.bias
    """
    towers, pieces = {"": module}, []
    if isinstance(module, DualEncoder):
        towers = {"vision_model.": module.vision_model, "text_model.": module.text_model}
    for side, tower in towers.items():
        for ours in tower.state_dict():
            names = [ours.removeprefix("trunk.")]
            if joint := re.search(r"\.(qkv|kv)\.", ours):  # attn.qkv: attn.q, attn.k and attn.v
                names = [names[0].replace(joint[1], letter) for letter in joint[1]]
            for pattern, replacement in published_row(tower.config).names.items():
                names = [re.sub(pattern, replacement, name) for name in names]
            pieces += [(side + name, side + ours) for name in names]
    return pieces


def regroup(tensors, pieces):
    """{name: tensor} cut, joined and renamed; tensors of other names stay as they are.

    pieces  [(name, new name)]: ("qkv", "q"), ("qkv", "k") and ("qkv", "v") cut qkv in three along
            its first dimension; ("q", "qkv"), ("k", "qkv") and ("v", "qkv") join them
    """
    counts, parts_of = Counter(name for name, _ in pieces), {}
    cut = {name: [*t.tensor_split(counts[name])] for name, t in tensors.items() if name in counts}
    for name, new in pieces:
        if name in cut:
            parts_of.setdefault(new, []).append(cut[name].pop(0))
    for new, parts in parts_of.items():  # torch.cat would copy a tensor of one part
        parts_of[new] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return {name: tensor for name, tensor in tensors.items() if name not in cut} | parts_of


def read_published_weights(folder):
    """{name: tensor} of a transformers folder, without mask tokens and tables that are computed."""
    left_out = (".position_ids", ".token_type_ids", "_position_index", "embeddings.mask_token")
    weights = {}
    for name, tensor in read_weights(folder).items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # old names
        name = name.replace("vision_model.vision_model.", "vision_model.")  # CLIP, old versions
        if not name.endswith(left_out):
            weights[name] = tensor[(None,) * (3 - tensor.ndim)] if name.endswith(FLAT) else tensor
    return weights


def read_dual_config(values):
    """The DualEncoderConfig of transformers' VisionTextDualEncoder, whose towers have poolers."""
    vision = read_vision_config(values["vision_config"], "pooler", {})
    text = read_text_config(values["text_config"], "pooler", {})
    scale = float(values["logit_scale_init_value"])
    return DualEncoderConfig(vision, text, values["projection_dim"], logit_scale_init=scale)


def read_vision_config(values, pooling, overrides):
    """A VisionConfig from the config.json of a vision tower, or of a whole CLIP or SigLIP."""
    if values.get("model_type") in ("clip", "siglip"):
        values = {**values["vision_config"], "model_type": values["model_type"] + "_vision_model"}
    name, size = values.get("model_type"), values.get("image_size") or 224
    check_choice("vision model_type (timm has more by name)", name, HF_VISION)
    if values.get("num_channels", 3) != 3 or (overrides.get("image_size") or size) != size:
        raise ValueError(f"it reads RGB of {size} pixels; timm has towers of any size by name")
    args = {key: values[key] for key in VISION_KEYS if values.get(key) is not None}
    args |= overrides.get("args", {})
    # config.json does not say whether a ViT or DeiT has a pooler, but the weights do.
    pooling = (pooling or "token") if name in ("vit", "deit") else None
    found = {"name": name, "pooling": pooling, **overrides, "image_size": size, "args": args}
    return config_from_dict(VisionConfig, found)


def read_text_config(values, pooling, overrides):
    """A TextConfig from the config.json of a text tower."""
    family, keys = values.get("model_type"), BERT_KEYS | DISTILBERT_KEYS
    check_choice("text model_type", family, HF_TEXT)
    check_choice("text family for this folder", overrides.get("family", family), [family])
    if values.get("is_decoder"):
        raise ValueError("is_decoder is true: a text tower reads captions in both directions")
    found = {"family": family, "pooling": pooling or "cls", "mlp_width": 3072}
    found |= {"dropout": 0.1, "attention_dropout": 0.1, **HF_TEXT[family].defaults}
    found |= {keys[key]: values[key] for key in keys if values.get(key) is not None}
    return config_from_dict(TextConfig, found | overrides)


def load_tower(read_config, folder, source, overrides):
    """A tower of transformers, without a task head or a pooler that it does not use."""
    values, weights = read_json(folder / CONFIG_FILE), read_published_weights(folder)
    pooling = overrides.get("pooling") or read_pooling(folder)
    if not pooling and any(name.endswith("pooler.dense.weight") for name in weights):
        pooling = "pooler"
    with blamed_on(folder / CONFIG_FILE, "cannot build the model of"), torch.device("meta"):
        tower = build_tower(read_config(values, pooling, overrides))
    tower.weights_from, prefix = str(source), published_row(tower.config).prefix
    if any(name.startswith(prefix) for name in weights):  # there is a task head beside the tower
        weights = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    if tower.config.pooling != "pooler":  # then an unused pooler goes
        weights = {n: t for n, t in weights.items() if not n.startswith("pooler.dense.")}
    fill(tower, weights, folder, published_pieces(tower))
    return tower


def read_pooling(folder):
    """The pooling of a sentence-transformers folder; None if it is not one."""
    values = read_json(folder / "1_Pooling" / CONFIG_FILE, {})
    # pooling_mode_mean_tokens is true, or pooling_mode is "mean". TextConfig rejects "cls+mean".
    flags = [key for key, on in values.items() if on and key.startswith("pooling_mode_")]
    modes = [key.removeprefix("pooling_mode_").split("_token")[0] for key in flags]
    return "+".join(modes) or values.get("pooling_mode")


def publish_dual_encoder(model):
    """(config.json, {name: tensor}) of a model as transformers writes it."""
    config, vision, text = model.config, model.config.vision, model.config.text
    family, known_text = published_row(vision), published_row(text).prefix
    fits = {
        f"{vision.name} with pooling {vision.pooling}": family and vision.pooling != "token",
        f"{text.family} with pooling {text.pooling}": known_text and text.pooling == "pooler",
        "distilbert": text.family != "distilbert",  # transformers' has no pooler
        f"{config.projection_head} heads": config.projection_head == "linear",
        "logit_bias": config.logit_bias_init is None,
    }
    if wrong := [part for part, fit in fits.items() if not fit]:
        got = f"transformers' dual encoder has no {', no '.join(wrong)}"
        advice = "such as google/vit-base-patch16-224-in21k and bert-base-uncased"
        raise ValueError(f"{got}; start from towers that end in a pooler, {advice}")
    sizes = {"image_size": vision.image_size, "use_mask_token": False}
    text_sizes = {key: getattr(text, name) for key, name in BERT_KEYS.items()}
    values = {
        "model_type": PUBLISHED_TYPE,
        "architectures": ["VisionTextDualEncoderModel"],
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": {"model_type": vision.name, **vision.args, **sizes},
        "text_config": {"model_type": text.family, **text_sizes},
    }
    # Newer versions write CLIP and SigLIP without the second prefix, older ones need it to read.
    nested = "vision_model.vision_model." if family.prefix == "vision_model." else "vision_model."
    pieces = [(ours, theirs) for theirs, ours in published_pieces(model)]
    weights = {}
    for name, tensor in regroup(model.state_dict(), pieces).items():
        name = re.sub(r"^vision_model\.", nested, name)
        weights[name] = tensor.squeeze() if name.endswith(FLAT) else tensor
    return values, weights


# ---- Image processors and tokenizers -------------------------------------------------------------

# What transformers' image processors do where a file does not say: fields of ImageTransform.
_SQUASH, _CROP = {"resize": 224, "crop": None, "squash": True}, {"resize": 224, "crop": 224}
_CROP |= {"mean": timm.data.OPENAI_CLIP_MEAN, "std": timm.data.OPENAI_CLIP_STD}
IMAGE_PROCESSORS = {"beit": _SQUASH, "siglip": _SQUASH, "clip": _CROP, "bit": _CROP}
IMAGE_PROCESSORS["vit"] = _SQUASH | {"interpolation": "bilinear"}
IMAGE_PROCESSORS["deit"] = _SQUASH | {"resize": 256, "crop": 224}


def read_image_transform(folder):
    """The ImageTransform that a folder's files describe, or None if it has no such file."""
    values = read_json(folder / "processor_config.json", {}).get("image_processor")
    values = values or read_json(folder / IMAGE_FILE, {})
    if not values:
        return None
    # The oldest files leave it to config.json which processor they are for.
    family = read_json(folder / CONFIG_FILE, {}).get("model_type")
    with blamed_on(folder, "cannot read the image processor of"):
        return ImageTransform.from_dict({"feature_extractor_type": family, **values})


# Special tokens of transformers' tokenizer classes (names without "Tokenizer") unless files say.
_SQUARE = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ANGLED = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
TOKEN_TYPES = ("bert", "electra", "pretrained", "tokenizersbackend")  # give token_type_ids, too
TOKENIZERS = dict.fromkeys((*TOKEN_TYPES, "distilbert"), _SQUARE)
TOKENIZERS |= dict.fromkeys(("roberta", "xlmroberta", "camembert", "mpnet"), _ANGLED)


def read_tokenizer(folder):
    """(Tokenizer that pads and cuts, whether captions get token types), or (None, False)."""
    names = (TOKENIZER_FILE, "vocab.txt", "vocab.json", "*.model")  # the first one found
    path = next((path for name in names for path in folder.glob(name)), None)
    if path is None:
        return None, False
    settings = read_json(folder / "special_tokens_map.json", {})
    settings |= read_json(folder / "tokenizer_config.json", {})
    with blamed_on(path):
        if path.name == TOKENIZER_FILE and not settings:  # ours has padding and truncation inside
            return tokenizers.Tokenizer.from_file(str(path)), False
        # Old files leave it to the model's config.json which tokenizer they are for.
        config = read_json(folder / CONFIG_FILE, {})
        config = config.get("text_config", config) | settings
        kind = config.get("tokenizer_class") or config.get("model_type", "PreTrainedTokenizer")
        kind = re.sub("tokenizer(fast)?$", "", kind.lower().replace("-", ""))
        check_choice("tokenizer class", kind, TOKENIZERS)
        words = {name: settings.get(name) or word for name, word in TOKENIZERS[kind].items()}
        words = {name: w["content"] if isinstance(w, dict) else w for name, w in words.items()}
        tokenizer, pad = tokenizer_from_files(path, settings, words), words["pad_token"]
        padding = {"pad_token": pad, "pad_id": tokenizer.token_to_id(pad)}
        if padding["pad_id"] is None:
            raise ValueError(f"no pad_token {pad!r} in the vocabulary")
    # transformers ignores what tokenizer.json says of padding and truncation.
    tokenizer.enable_padding(direction=settings.get("padding_side", "right"), **padding)
    sentence = read_json(folder / "sentence_bert_config.json", {})
    longest = sentence.get("max_seq_length") or settings.get("model_max_length") or math.inf
    side = settings.get("truncation_side", "right")
    tokenizer.enable_truncation(int(min(longest, 1e9)), direction=side)  # 1e30 stands for no limit
    inputs = settings.get("model_input_names")
    return tokenizer, ("token_type_ids" in inputs if inputs else kind in TOKEN_TYPES)


def tokenizer_from_files(path, settings, words):
    """The tokenizer in tokenizer.json, or of older files with words as its special tokens."""
    if path.name == TOKENIZER_FILE:
        return tokenizers.Tokenizer.from_file(str(path))
    if path.suffix == ".model" or "\u2581" in path.read_text(encoding="utf-8"):
        raise ValueError("sentencepiece's pieces are not read: save them as tokenizer.json")
    if path.name == "vocab.txt":
        options = {"lowercase": settings.get("do_lower_case", True), **words}
        options["strip_accents"] = settings.get("strip_accents")
        options["handle_chinese_chars"] = settings.get("tokenize_chinese_chars", True)
        return tokenizers.BertWordPieceTokenizer.from_file(str(path), **options)._tokenizer
    files = str(path), str(path.with_name("merges.txt"))
    options = {"add_prefix_space": settings.get("add_prefix_space", False)}
    tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(*files, **options)._tokenizer
    # The library's class leaves special tokens to us. RoBERTa's mask takes in the space before it.
    ends = ((w, tokenizer.token_to_id(w)) for w in (words["sep_token"], words["cls_token"]))
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(*ends)
    mask = tokenizers.AddedToken(words.pop("mask_token"), lstrip=True)
    tokenizer.add_special_tokens([*words.values(), "<unk>", mask])
    return tokenizer


def tokenizer_config(processor):
    """What tokenizer.json does not say, as transformers reads it."""
    padding = processor.tokenizer.padding
    types = ["token_type_ids"] if processor.token_types else []
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": padding["pad_token"],
        "padding_side": padding["direction"],
        "truncation_side": processor.truncation_side,
        "model_max_length": min(processor.max_length, int(1e30)),
        "model_input_names": ["input_ids", *types, "attention_mask"],
    }


# ==== 10  Checks and devices ======================================================================


def check_choice(what, got, accepted):
    """Raise ValueError unless got is among the accepted values; it lists the nearest first."""
    if got not in accepted:
        known = [str(name) for name in accepted]
        near = difflib.get_close_matches(str(got), known, n=5)
        listed = textwrap.shorten(", ".join(dict.fromkeys(near + known)), 200)
        raise ValueError(f"unknown {what} {got!r}; expected {listed}")


def check_min(what, got, minimum):
    """Raise ValueError unless got is a finite number of at least the minimum."""
    if not minimum <= got < math.inf:
        raise ValueError(f"{what} is {got}, expected at least {minimum}")


def config_from_dict(config_class, values):
    """config_class(**values), with the nearest field in the ValueError for an unknown one."""
    for name in values:
        check_choice(f"field of {config_class.__name__}", name, config_class.__dataclass_fields__)
    return config_class(**values)


def pick_device(name):
    """The torch.device called name; "auto" is CUDA if available, one card per rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with blamed_on(f"--device {name} (cpu is always there)", "cannot use"):
        return torch.empty(0, device=name).device


def worker_init(worker_id):
    """A worker gets a Unix process group of its own: Ctrl-C spares it until the run has saved."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def pick_precision(name, device):
    """Auto takes "bf16" where the hardware has it, else "fp16" on CUDA and "fp32" on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and hardware else "fp32"


@contextmanager
def autocast(device, precision):
    """The context in which towers run; "fp32" also switches an outer one off."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    # In training in bf16 on CPUs, fused attention takes 2 to 5 times as long: see prepare_cpu.
    slow = device.type == "cpu" and precision == "bf16" and torch.is_grad_enabled()
    attention = sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()
    with torch.autocast(device.type, dtype, enabled=dtype is not None), attention:
        yield


@contextmanager
def recording(trunk, want_states, want_weights):
    """Inside, two lists fill with a timm model's hidden states and attention weights, if wanted.

    While timm's fused_attn is False, its attention weights pass through attn_drop, where a hook
    collects them. All is restored at the end. Not thread-safe.
    """
    kind, states, weights = type(trunk).__name__, [], []

    def keep_state(block, args, output):
        states.extend([output] if states else [args[0], output])  # first, block 1's input, too

    def keep_weights(layer, args, output):
        weights.append(output)

    blocks = getattr(trunk, "blocks", None) or getattr(trunk, "stages", ())
    if want_states and not blocks:
        raise ValueError(f"{kind} has neither blocks nor stages to show")
    with ExitStack() as undo:
        for block in blocks if want_states else ():
            undo.enter_context(block.register_forward_hook(keep_state))
        for layer in trunk.modules() if want_weights else ():
            if hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop"):
                undo.callback(setattr, layer, "fused_attn", layer.fused_attn)
                layer.fused_attn = False
                undo.enter_context(layer.attn_drop.register_forward_hook(keep_weights))
        yield states, weights
    if want_weights and not weights:
        raise ValueError(f"{kind} has no attention whose weights can be shown")
