"""Claims about the vision tower: any timm model, used as timm itself would use it."""

import math

import pytest
import timm
import torch
from conftest import TINY_VIT
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dualenc

# One small random variant a family: name, pixels a side, arguments.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 32, TINY_VIT),
    "beit": ("beit_base_patch16_224", 32, TINY_VIT),
    "resnet": ("test_resnet", 32, {}),
    "convnext": ("test_convnext", 32, {}),
    "swin": ("swin_tiny_patch4_window7_224", 32, dict(embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4)),
    "mobilenet": ("mobilenetv3_small_050", 32, {}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "hybrid": ("vit_tiny_r_s16_p8_224", 64, dict(embed_dim=32, depth=2, num_heads=4)),
}
TRANSFORMERS = ("vit", "beit", "swin", "hybrid")


def make_tower(family, **overrides):
    name, size, arguments = FAMILIES[family]
    torch.manual_seed(0)
    return dualenc.VisionEncoder(dualenc.VisionConfig(name, {**arguments, **overrides}, size)).eval(), size


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_the_timm_model_without_its_classifier(family):
    """Pooled features equal those of a timm model built directly, also in bfloat16-free evaluation mode."""
    tower, size = make_tower(family)
    name, _, arguments = FAMILIES[family]
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments = {**arguments, "img_size": size}
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    pixel_values = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = tower(pixel_values)
        assert torch.allclose(output.pooler_output, reference(pixel_values), atol=1e-5)
        assert torch.allclose(output.last_hidden_state, reference.forward_features(pixel_values), atol=1e-5)
    assert output.pooler_output.shape == (2, tower.width)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_vision_text_pretrained_and_lock_leave_every_bit_of_the_tower(make_model, pictures, family):
    """Three training steps later weights and batch-norm statistics are the same to the bit; the rest has moved."""
    name, size, arguments = FAMILIES[family]
    model = make_model(name, size, arguments)
    model.lock("vision").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    inputs = model.processor(text=["a", "b", "c", "d"], images=pictures)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    for key, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[key])
        assert same == (key.startswith("vision_model.") or "pooler" in key), f"{key}: {'kept' if same else 'moved'}"
    unlocked = make_model(name, size, arguments).train()
    unlocked(**inputs)
    statistics = [key for key in before if key.endswith("running_mean")]
    assert all(not torch.equal(unlocked.state_dict()[key], before[key]) for key in statistics), "statistics never moved"


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_input_of_the_first_block_and_the_output_of_each(family):
    tower, size = make_tower(family)
    pixel_values = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain, shown = tower(pixel_values), tower(pixel_values, output_hidden_states=True)
    assert plain.hidden_states is None and torch.equal(plain.pooler_output, shown.pooler_output)
    blocks = getattr(tower.trunk, "blocks", None) or getattr(tower.trunk, "stages", None)
    assert len(shown.hidden_states) == (len(blocks) if blocks else 4 if family == "resnet" else 2) + 1
    if family == "vit":
        assert torch.allclose(tower.trunk.norm(shown.hidden_states[-1]), shown.last_hidden_state, atol=1e-6)
        assert torch.allclose(tower.trunk.blocks[0](shown.hidden_states[0]), shown.hidden_states[1], atol=1e-6)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_vision_attention_weights_are_real_and_change_nothing(family):
    tower, size = make_tower(family)
    pixel_values = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain, shown = tower(pixel_values), tower(pixel_values, output_attentions=True)
    assert plain.attentions is None and len(shown.attentions) >= 2
    for weights in shown.attentions:
        assert weights.shape[-1] == weights.shape[-2]
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
    assert torch.allclose(plain.pooler_output, shown.pooler_output, atol=1e-5)
    tower(pixel_values)
    assert all(getattr(module, "fused_attn", True) for module in tower.modules()), "the next call fuses again"
    with torch.autocast("cpu", torch.bfloat16):
        tower(pixel_values)
    assert not any(getattr(module, "fused_attn", False) for module in tower.modules())


# ViTs whose pooling reads the first token alone: with layer scale, normed queries and keys, several first tokens, no
# biases. The name of a family stands for the plain model.
FIRST_TOKEN_VITS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "layer scale, normed queries": ("vit_tiny_patch16_224", {"init_values": 0.5, "qk_norm": True, "qkv_bias": False}),
    "normed attention output": ("vit_tiny_patch16_224", {"scale_attn_norm": True}),
    "CLIP": ("vit_base_patch32_clip_quickgelu_224", {}),
    "registers": ("vit_base_patch14_reg4_dinov2", {}),
}


@pytest.mark.parametrize("variant", FIRST_TOKEN_VITS)
def test_a_vit_that_pools_its_first_token_computes_no_other_in_its_last_block(variant):
    """pooled_only: the same vector and the same gradients of every weight, for fewer products."""
    name, arguments = FIRST_TOKEN_VITS[variant]
    torch.manual_seed(0)
    tower = dualenc.VisionEncoder(dualenc.VisionConfig(name, {**TINY_VIT, **arguments}, 32)).eval().double()
    for weight in tower.parameters():  # every weight counts: no zero biases, no unit norms
        torch.nn.init.normal_(weight, std=0.3)
    pixel_values = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    gradients, vectors, products = [], [], []
    for pooled_only in (False, True):
        tower.zero_grad()
        with FlopCounterMode(display=False) as counter:
            output = tower(pixel_values, pooled_only=pooled_only)
        output.pooler_output.square().sum().backward()
        vectors.append(output.pooler_output)
        gradients.append([weight.grad.clone() for weight in tower.parameters()])
        products.append(counter.get_total_flops())
    assert output.last_hidden_state is None and dualenc.reads_first_token(tower.trunk)
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
    assert products[1] < 0.75 * products[0]


@pytest.mark.parametrize(
    ("name", "arguments", "pooling"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, "avg"),
        ("beit_base_patch16_224", TINY_VIT, "token"),
        ("test_resnet", {}, None),
        ("vit_base_patch16_rope_reg1_gap_256", TINY_VIT, None),
        ("vit_tiny_patch16_224", {**TINY_VIT, "attn_layer": "diff"}, None),
        ("deit_tiny_distilled_patch16_224", TINY_VIT, None),  # pools two tokens
        ("vit_tiny_patch16_224", {**TINY_VIT, "block_fn": timm.models.vision_transformer.ResPostBlock}, None),
    ],
)
def test_other_models_run_as_timm_has_them(name, arguments, pooling):
    tower = dualenc.VisionEncoder(dualenc.VisionConfig(name, arguments, 32, pooling=pooling)).eval()
    assert not dualenc.reads_first_token(tower.trunk)
    pixel_values = torch.randn(2, 3, 32, 32)
    assert torch.equal(tower(pixel_values, pooled_only=True).pooler_output, tower(pixel_values).pooler_output)


def test_vit_attention_weights_are_the_softmax_of_its_queries_and_keys():
    tower, size = make_tower("vit")
    with torch.no_grad():
        output = tower(torch.randn(2, 3, size, size), output_hidden_states=True, output_attentions=True)
        block = tower.trunk.blocks[1]
        queries, keys, _ = block.attn.qkv(block.norm1(output.hidden_states[1])).view(2, 17, 3, 4, 8).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(8)
    assert torch.allclose(output.attentions[1], scores.exp() / scores.exp().sum(-1, keepdim=True), atol=1e-6)


def test_attentions_of_a_convnet_are_refused():
    tower, size = make_tower("resnet")
    with pytest.raises(ValueError, match="test_resnet has no attention layers"):
        tower(torch.randn(1, 3, size, size), output_attentions=True)


def test_hidden_states_of_a_model_without_known_blocks_are_refused():
    tower, size = make_tower("resnet")
    tower.trunk.forward_features, tower.trunk.forward_head = torch.nn.Flatten(), torch.nn.Identity()
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        delattr(tower.trunk, layer)
    with pytest.raises(ValueError, match="no blocks found in test_resnet"):
        tower(torch.randn(1, 3, size, size), output_hidden_states=True)


def test_the_image_transform_is_the_models_own():
    """mean, std, size, crop and interpolation from timm's record of how the weights were trained."""
    for name, arguments in (
        ("vit_base_patch16_clip_quickgelu_224.openai", TINY_VIT),
        ("convnext_tiny.in12k_ft_in1k", dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))),
        ("beit_base_patch16_224", TINY_VIT),
    ):
        record = timm.get_pretrained_cfg(name)
        transform = dualenc.VisionEncoder(dualenc.VisionConfig(name, arguments)).image_transform()
        assert transform.mean == tuple(record.mean) and transform.std == tuple(record.std)
        assert transform.interpolation == record.interpolation
        assert transform.crop == record.input_size[1:]
        assert transform.resize == math.floor(record.input_size[-1] / record.crop_pct)


def test_another_image_size_and_crop_share_are_followed():
    tower, _ = make_tower("vit")
    assert tower.image_transform().crop == (32, 32) and tower.image_transform(crop_pct=1.0).resize == 32
    assert tower.image_transform().resize == math.floor(32 / 0.9)
    squash = dualenc.VisionEncoder(dualenc.VisionConfig("vit_base_patch16_siglip_224", TINY_VIT, 32))
    squash.trunk.pretrained_cfg["crop_mode"] = "squash"
    assert squash.image_transform(crop_pct=1.0).resize == (32, 32)


def test_a_tower_that_is_not_square_sees_whole_pictures():
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    tower = dualenc.VisionEncoder(dualenc.VisionConfig("vit_tiny_patch16_224", arguments, image_size=(32, 64)))
    transform = tower.image_transform(crop_pct=1.0)
    assert transform.resize == transform.crop == (32, 64)
    pixels = transform(Image.new("RGB", (50, 90)))
    assert tower(pixels[None]).pooler_output.shape == (1, 24)
    arguments["num_kv_heads"] = [2]
    own = dualenc.VisionEncoder(dualenc.VisionConfig("vit_base_patch16_sapiens2", arguments))
    assert own.image_size == own.image_transform().crop == timm.get_pretrained_cfg(own.config.name).input_size[1:]


def test_pretrained_position_tables_are_resampled_to_another_image_size(tmp_path):
    """A 64-pixel ViT's weights in a 32-pixel tower: timm's own resampling, read from a local file."""
    big = timm.create_model("deit_tiny_patch16_224", num_classes=0, img_size=64, **TINY_VIT)
    torch.save(big.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 0}
    config = dualenc.VisionConfig("deit_tiny_patch16_224", {**TINY_VIT, "pretrained_cfg_overlay": overlay}, 32)
    tower = dualenc.VisionEncoder(config, pretrained_from=config.name)
    assert tower.trunk.pos_embed.shape == (1, 17, 32)
    assert torch.equal(tower.trunk.patch_embed.proj.weight, big.patch_embed.proj.weight)


def test_patch_dropout_drops_patches_in_training_only():
    config = dualenc.VisionConfig("vit_tiny_patch16_224", TINY_VIT, 32, patch_dropout=0.5)
    tower, pixel_values = dualenc.VisionEncoder(config), torch.randn(1, 3, 32, 32)
    assert tower.train()(pixel_values).last_hidden_state.shape == (1, 1 + 8, 32)
    assert tower.eval()(pixel_values).last_hidden_state.shape == (1, 1 + 16, 32)
    products = []
    for mode in (True, False):
        with FlopCounterMode(display=False) as counter:
            tower.train(mode)(pixel_values, pooled_only=True)
        products.append(counter.get_total_flops())
    assert products[0] < 0.7 * products[1]


def test_pooling_is_timms_global_pool():
    config = dualenc.VisionConfig("vit_tiny_patch16_224", {**TINY_VIT, "fc_norm": False}, 32, pooling="avg")
    tower = dualenc.VisionEncoder(config).eval()
    output = tower(torch.randn(2, 3, 32, 32))
    assert torch.allclose(output.pooler_output, output.last_hidden_state[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("resnet81",), "unknown timm model 'resnet81'; the nearest names are .*resnet18"),
        (("zzzzzzzz",), "unknown timm model 'zzzzzzzz'; no known name is near it"),
        (("resnet18", {"patch_size": 4}), "resnet18 cannot be built with .*patch_size"),
        (("vit_tiny_patch16_224", {"num_heads": 5}), "vit_tiny_patch16_224 cannot be built with .*num_heads"),
        (("vit_tiny_patch16_224.nonsense", {}, 32), "could not build vit_tiny_patch16_224.nonsense .*tag"),
        (("dinov2",), "'dinov2' is a family of towers; name a folder or hub id of one, or a timm model"),
    ],
)
def test_unknown_models_and_arguments_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        dualenc.VisionEncoder(dualenc.VisionConfig(*config))


def test_a_fused_kernel_that_timm_was_told_to_leave_stays_off():
    tower, size = make_tower("vit")
    timm.layers.set_fused_attn(False)
    try:
        tower(torch.randn(1, 3, size, size))
    finally:
        timm.layers.set_fused_attn(True)
    assert not any(getattr(module, "fused_attn", False) for module in tower.modules())


def test_patch_dropout_of_a_convnet_is_refused():
    with pytest.raises(ValueError, match="test_resnet cannot be built with .*patch_drop_rate"):
        dualenc.VisionEncoder(dualenc.VisionConfig("test_resnet", patch_dropout=0.5))


def test_weights_that_cannot_be_loaded_are_an_error_not_a_random_start():
    with pytest.raises(ValueError, match="could not build resnet18 with the weights of resnet18.no_such_tag"):
        dualenc.VisionEncoder(dualenc.VisionConfig("resnet18"), pretrained_from="resnet18.no_such_tag")


def test_pixels_of_another_size_or_channel_count_are_refused():
    tower, _ = make_tower("vit")
    for shape in ((1, 3, 64, 64), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\)"):
            tower(torch.randn(shape))
    convnet, _ = make_tower("resnet")
    assert convnet(torch.randn(1, 3, 48, 64)).pooler_output.shape == (1, 96), "convnets take any size"
    with pytest.raises(ValueError, match=r"expected \(B, 3, h, w\)"):
        convnet(torch.randn(1, 1, 32, 32))


def test_one_channel_towers_work():
    tower = dualenc.VisionEncoder(dualenc.VisionConfig("test_resnet", image_size=32, channels=1)).eval()
    transform = tower.image_transform()
    assert transform.channels == 1 and len(transform.mean) == 1
    assert tower(transform(Image.new("RGB", (40, 50), "red"))[None]).pooler_output.shape == (1, 96)
    with pytest.raises(ValueError, match="unknown number of channels 4; expected 1, 3"):
        dualenc.VisionConfig("test_resnet", channels=4)
