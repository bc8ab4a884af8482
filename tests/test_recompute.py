"""Claims about --grad-checkpointing: the same gradients to the bit, in less memory."""

import pytest
import torch
from conftest import CAPTIONS

import dualenc

TOWERS = {
    "vit that pools its first token": {},
    "vit that pools by the mean": {"vision_args": {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}},
    "batch norm": {"vision": "test_resnet"},
    "layers that share weights": {"text_family": "albert", "text_layer_groups": 1, "text_embedding_width": 16},
}
TOWERS["vit that pools by the mean"]["vision_pooling"] = "avg"


def step(model, precision="fp32", pieces=1):
    """A training step's loss and gradients, with dropout, and buffers after it; and the bytes kept for its backward."""
    model.train().zero_grad()
    torch.manual_seed(1)
    images, kept = torch.randn(4, 3, 32, 32), []
    inputs = model.processor(text=list(CAPTIONS))

    def embed(rows):
        with dualenc.autocast(torch.device("cpu"), precision):
            captions = {name: tensor[rows] for name, tensor in inputs.items()}
            return model.encode_image(images[rows]), model.encode_text(**captions)

    def loss_of(*embeds):
        return dualenc.clip_loss(*embeds, model.logit_scale)

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if pieces > 1:
            rows = [slice(start, start + 4 // pieces) for start in range(0, 4, 4 // pieces)]
            loss, *_ = dualenc.cached_backward(embed, rows, loss_of, [model.logit_scale])
        else:
            loss = loss_of(*embed(slice(None)))
            loss.backward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return loss.detach(), gradients, buffers, sum(n for place, n in storages.items() if place not in weights)


def both(make_model, **options):
    """Two equal models, the second with recompute_activations."""
    dropout = {"text_dropout": 0.1, "text_attention_dropout": 0.1}
    plain, sparing = (make_model(**dropout, **options) for _ in range(2))
    dualenc.recompute_activations(sparing)
    return plain, sparing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("towers", TOWERS)
def test_recomputing_changes_neither_loss_nor_gradient_nor_statistics(towers, pieces, precision, make_model):
    """To the bit: dropout draws the same again, and batch norm counts each picture once."""
    plain, sparing = both(make_model, **TOWERS[towers])
    for _ in range(2):
        loss, gradients, buffers, _ = step(plain, precision, pieces)
        its_loss, its_gradients, its_buffers, _ = step(sparing, precision, pieces)
        assert torch.equal(loss, its_loss) and gradients.keys() == its_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, its_gradients[name]), name
        for name, buffer in buffers.items():
            assert torch.equal(buffer, its_buffers[name]), name
    assert plain.state_dict().keys() == sparing.state_dict().keys()
    plain.eval(), sparing.eval()
    images, captions = torch.randn(2, 3, 32, 32), plain.processor(text=list(CAPTIONS))
    assert torch.equal(plain.encode_image(images), sparing.encode_image(images))
    assert torch.equal(plain.encode_text(**captions), sparing.encode_text(**captions))


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("vision", ["vit_tiny_patch16_224", "test_resnet"])
def test_recomputing_keeps_less_for_the_backward_pass(vision, tower, make_model):
    """Of either tower; bytes of tensors that wait for the backward pass, weights left out."""
    depth = {"vision_args": {"embed_dim": 32, "depth": 8, "num_heads": 4, "patch_size": 8}} if "vit" in vision else {}
    plain, sparing = both(make_model, vision=vision, text_depth=8, **depth)
    for model in (plain, sparing):
        model.lock("vision" if tower == "text" else "text")
    assert step(sparing)[3] < step(plain)[3] * (0.4 if depth or tower == "text" else 0.8)


def test_a_tower_that_cannot_recompute_is_refused_unless_it_is_locked(make_model):
    with pytest.raises(ValueError, match="timm cannot recompute activations of dla46x_c: leave out --grad-checkp"):
        dualenc.recompute_activations(make_model("dla46x_c", 64))
    model = make_model("dla46x_c", 64)
    model.lock("vision")
    dualenc.recompute_activations(model)
    assert all("forward" in vars(layer) for layer in model.text_model.encoder["layer"])
    model = make_model()
    model.lock("text")
    dualenc.recompute_activations(model)
    assert model.vision_model.trunk.grad_checkpointing
    assert not any("forward" in vars(layer) for layer in model.text_model.encoder["layer"])
