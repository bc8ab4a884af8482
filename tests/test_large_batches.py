"""Claims about tiles and pieces; test_runs.py has the steps of several processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import CAPTIONS, Memory, build_model, fails_like

import dualenc

B = 11  # pairs of a batch, which neither pieces nor ranks divide


def loss_inputs(count, scale=14.28):
    """[image_embeds, text_embeds, logit_scale] in float64."""
    rng = torch.Generator().manual_seed(0)
    sides = torch.randn(2, count, 16, generator=rng, dtype=torch.float64)
    images, texts = F.normalize(sides, dim=-1)
    texts[::4], texts[1::4] = images[::4], -images[1::4]  # the best pairs and the worst
    inputs = [images, texts, torch.tensor(math.log(scale))]
    return [tensor.double().requires_grad_() for tensor in inputs]


def value_and_gradients(loss, inputs, **options):
    """Of the loss times 3: a forgotten outer gradient shows."""
    value = 3 * loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize(("count", "tile"), [(50, 16), (48, 16), (7, 16), (5, 1)])
def test_tiled_clip_loss_equals_the_plain_one(count, tile):
    """Value and gradients; at the clamp of 100, exp of a score overflows float32."""
    for scale in (1.0, 14.28, 100.0):
        inputs = loss_inputs(count, scale)
        right = value_and_gradients(dualenc.clip_loss, inputs)
        single = [tensor.detach().float().requires_grad_() for tensor in inputs]
        for given, tolerance in ((inputs, 1e-7), (single, 1e-4)):
            got = value_and_gradients(dualenc.tiled_clip_loss, given, tile=tile)
            for one, other, what in zip(got, right, ("loss", "images", "texts", "scale")):
                mistakes = {"a forgotten outer gradient": other / 3, "sum": count * other}
                fails_like(one, other, mistakes, f"{what} at scale {scale}", tolerance)


def test_tiled_clip_loss_never_holds_the_matrix():
    """Neither forward nor backward."""
    count, seen = 512, []
    for loss, options in ((dualenc.clip_loss, {}), (dualenc.tiled_clip_loss, {"tile": 16})):
        inputs = loss_inputs(count)
        with Memory() as memory:
            value_and_gradients(loss, inputs, **options)
        seen.append(memory)
    assert [memory.largest for memory in seen] == [count**2, count * 16]
    assert seen[1].most_alive < seen[0].most_alive / 8


def make_towers(vision="vit_tiny_patch16_224", locked=(), **overrides):
    """A tiny model in float64: what differs beyond the last digits differs."""
    tokenizer = dualenc.train_tokenizer(CAPTIONS, vocab_size=200, max_length=32)
    model = build_model(tokenizer, vision, **overrides)
    for tower in locked:
        model.lock(tower)
    return model.double().train()


def make_batch(model, own=slice(None)):
    """This part of a batch; locked towers get pooled features (B, W)."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (B, 3, 32, 32), generator=rng).to(torch.uint8)[own]
    captions = model.processor(text=[CAPTIONS[n % 4][n:] for n in range(B)])
    captions = {name: rows[own] for name, rows in captions.items()}
    if "vision" in model.locked:
        images = model.vision_model(model.processor.image_transform.normalize(images)).pooler_output
    if "text" in model.locked:
        captions = {"features": model.text_model(**captions).pooler_output}
    return images, captions


def take_step(model, size, precision="fp32"):
    """(loss, {name: gradient})."""
    embeds = dualenc.MicroBatches(model, size, precision)(*make_batch(model))
    loss = dualenc.clip_loss(*embeds, model.logit_scale)
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: weight.grad for n, weight in named if weight.grad is not None}


@pytest.mark.parametrize("locked", [(), ("vision",), ("text",), ("vision", "text")])
def test_pieces_of_images_captions_and_cached_features_equal_the_batch(locked):
    """Exercise 10 in the product: whatever train.py passes, against the model's own forward."""
    plain, model = make_towers(), make_towers(locked=locked)
    images, captions = make_batch(plain)
    pixel_values = plain.processor.image_transform.normalize(images)
    right = plain(**captions, pixel_values=pixel_values, return_loss=True).loss
    right.backward()
    value, got = take_step(model, 3)
    torch.testing.assert_close(value, right)
    for name, weight in plain.named_parameters():
        assert (name in got) == (name.partition("_model")[0] not in locked), name
        if name in got:
            fails_like(got[name], weight.grad, {}, f"the gradient of {name}", 1e-8)


def test_pieces_are_about_equal():
    """So that no piece has one image, which batch norm refuses, unless all have few."""
    model, sizes = make_towers(), []
    model.vision_model.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    take_step(model, B - 1)
    assert sizes == [6, 5, 5, 6]  # and again in the backward pass


def test_pieces_are_computed_again_alike():
    """In bf16, with the same dropout: as one graph through all pieces, from the same seed."""
    options = {"vision": "test_resnet", "text_dropout": 0.3}
    model, twin, other = (make_towers(**options).float() for _ in range(3))
    torch.manual_seed(5)
    loss, got = take_step(model, 4, "bf16")
    torch.manual_seed(5)
    embed, parts = dualenc.MicroBatches(twin, 0, "bf16"), (slice(0, 4), slice(4, 8), slice(8, 12))
    sides = zip(*(embed(*make_batch(twin, part)) for part in parts))
    right = dualenc.clip_loss(*(torch.cat(side) for side in sides), twin.logit_scale)
    right.backward()
    torch.manual_seed(5)
    assert torch.equal(loss, right) and not torch.equal(loss, take_step(other, 4, "fp32")[0])
    for name, weight in twin.named_parameters():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], weight.grad, rtol=1e-3, atol=1e-5, msg=name)
