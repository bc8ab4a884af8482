"""Claims about the vision tower: any timm model, used as timm itself would use it."""

import copy
import math

import pytest
import timm
import torch
from PIL import Image
from support import TINY_VIT

import dualenc

# One small random variant a family: name, pixels a side, arguments.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 32, TINY_VIT),
    "beit": ("beit_base_patch16_224", 32, TINY_VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 28, {**TINY_VIT, "patch_size": 14}),
    "maxvit": ("test_maxvit", 32, {}),
    "hybrid": ("vit_tiny_r_s16_p8_224", 64, {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "resnet": ("test_resnet", 32, {}),
    "convnext": ("test_convnext", 32, {}),
}
VIT = FAMILIES["vit"][0]


def tower_of(name=VIT, args=None, image_size=32, **fields):
    torch.manual_seed(0)
    args = TINY_VIT if args is None and name == VIT else args or {}
    return dualenc.VisionEncoder(dualenc.VisionConfig(name, args, image_size, **fields)).eval()


def make_tower(family):
    """A tower and pixel_values for it."""
    name, size, args = FAMILIES[family]
    return tower_of(name, args, size), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_the_timm_model_without_its_classifier(family):
    tower, pixel_values = make_tower(family)
    name, size, args = FAMILIES[family]
    if timm.get_pretrained_cfg(name).fixed_input_size:
        args = {**args, "img_size": size}
    reference = timm.create_model(name, num_classes=0, **args).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    with torch.no_grad():
        output = tower(pixel_values)
        assert torch.equal(output.pooler_output, reference(pixel_values))
        assert torch.equal(output.last_hidden_state, reference.forward_features(pixel_values))
    assert output.pooler_output.shape == (2, tower.width)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_first_blocks_input_and_each_ones_output(family):
    tower, pixel_values = make_tower(family)
    if family == "resnet":
        for option, what in (("hidden_states", "has neither"), ("attentions", "has no att")):
            with pytest.raises(ValueError, match=f"ResNet {what}"):
                tower(pixel_values, **{f"output_{option}": True})
        return
    blocks, right = getattr(tower.trunk, "blocks", None) or tower.trunk.stages, []
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: right.append((args[0], out)))
    with torch.no_grad():
        output = tower(pixel_values, output_hidden_states=True)
    assert len(right) == len(blocks) and torch.equal(output.hidden_states[0], right[0][0])
    for got, (_, expected) in zip(output.hidden_states[1:], right, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["vit", "beit", "dinov2", "maxvit", "hybrid"])
def test_attentions_are_the_weights_that_timm_computes_unfused(family):
    """And asking for them changes nothing."""
    tower, pixel_values = make_tower(family)
    for weight in tower.parameters():  # position biases too, which start at 0
        torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        plain, shown = tower(pixel_values), tower(pixel_values, output_attentions=True)
        right = []
        for module in tower.trunk.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
                module.attn_drop.register_forward_hook(lambda _, args, out: right.append(args[0]))
        tower(pixel_values)
    assert plain.attentions is None and len(shown.attentions) == len(right) >= 2
    for got, expected in zip(shown.attentions, right):
        assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(plain.pooler_output, shown.pooler_output, atol=1e-5)


def attributes(trunk):
    """Everything that timm's modules remember beside their weights."""
    kept = {name: vars(module) for name, module in trunk.named_modules()}
    return {n: {k: copy.copy(value) for k, value in has.items()} for n, has in kept.items()}


@pytest.mark.parametrize("family", ["vit", "beit", "convnext"])
def test_a_forward_pass_leaves_timms_modules_as_they_were(family):
    """Also after a pass that failed: no switch is flipped, and no hook stays."""
    tower, pixel_values = make_tower(family)
    tower.trunk.fused_attn = False  # as a user may have set a layer's switch
    before = attributes(tower.trunk)
    wanted = {"output_hidden_states": True, "output_attentions": family != "convnext"}
    with torch.autocast("cpu", torch.bfloat16):
        _ = tower(pixel_values), tower(pixel_values, **wanted)
    with pytest.raises(RuntimeError):  # where the weights are not
        tower(pixel_values.to("meta"), **wanted)
    assert attributes(tower.trunk) == before


def test_a_small_fastvit_trains_a_step_on_a_cpu():
    """In channels-last, torch's backward of its 1 x 1 convolution of stride 2 ends the process."""
    args = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}
    tower, pixel_values = tower_of("fastvit_t8", args, 64).train(), torch.randn(2, 3, 64, 64)

    def check(module, args):
        convolutions = [w for w in module.parameters() if w.ndim == 4]
        assert all(tensor.is_contiguous() for tensor in (args[0], *convolutions))

    tower.trunk.stem[0].register_forward_pre_hook(check)
    tower(pixel_values).pooler_output.square().sum().backward()
    assert all(weight.grad is not None for weight in tower.parameters())


def test_patch_dropout_acts_in_training_and_pooling_is_timms():
    tower = tower_of(args={**TINY_VIT, "fc_norm": False}, patch_dropout=0.5, pooling="avg")
    pixel_values = torch.randn(1, 3, 32, 32)
    assert tower.train()(pixel_values).last_hidden_state.shape == (1, 1 + 8, 32)
    output = tower.eval()(pixel_values)
    assert output.last_hidden_state.shape == (1, 1 + 16, 32)
    right = output.last_hidden_state[:, 1:].mean(1)
    assert torch.allclose(output.pooler_output, right, atol=1e-6)


# ---- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_base_patch16_clip_quickgelu_224.openai", TINY_VIT),
        ("convnext_tiny.in12k_ft_in1k", {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}),
    ],
)
def test_the_image_transform_is_timms_own(name, args):
    """Mean, std, size, crop and interpolation as the weights were trained."""
    record = timm.get_pretrained_cfg(name)
    transform = tower_of(name, args, None).image_transform()
    assert transform.mean == tuple(record.mean) and transform.std == tuple(record.std)
    assert transform.interpolation == record.interpolation
    assert transform.crop == record.input_size[-1]
    assert transform.resize == math.floor(record.input_size[-1] / record.crop_pct)


@pytest.mark.parametrize(
    ("crop_pct", "crop_mode", "resize"),
    [(None, "center", math.floor(112 / 0.9)), (1.0, "center", 112), (1.0, "squash", 112)],
)
def test_the_image_transform_follows_the_configuration(crop_pct, crop_mode, resize):
    tower, colours = tower_of(image_size=112), (0.25, 0.5, 0.75)
    tower.trunk.pretrained_cfg |= {"crop_mode": crop_mode, "mean": colours}
    transform = tower.image_transform(crop_pct)
    assert (transform.crop, transform.resize, transform.mean) == (112, resize, colours)
    assert transform.squash == (crop_mode == "squash")
    pixel_values = transform(Image.new("RGB", (50, 90), "red"))[None]
    assert tower(pixel_values).pooler_output.shape == (1, 32)


def test_pixels_of_another_shape_are_refused_but_convnets_take_any_size():
    wrong = [(name, s) for name in ("vit", "resnet") for s in ((1, 1, 32, 32), (3, 32, 32))]
    for family, shape in (*wrong, ("vit", (1, 3, 48, 64))):
        with pytest.raises(ValueError, match=rf"{shape[-2]}, .*expected \(B, 3, 32, 32\), as"):
            make_tower(family)[0](torch.randn(shape))
    assert make_tower("resnet")[0](torch.randn(1, 3, 48, 64)).pooler_output.shape == (1, 96)
    dynamic = tower_of(args={**TINY_VIT, "dynamic_img_size": True})
    assert dynamic(torch.randn(1, 3, 48, 64)).last_hidden_state.shape == (1, 1 + 48, 32)
    assert dynamic.trunk.pos_embed.shape[1] == 1 + 28**2, "timm's own, resampled for each image"


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet81"}, "unknown timm model 'resnet81'; expected resnet18, .*[...]"),
        ({"args": {"num_heads": 5}}, "timm cannot build vit_tiny_patch16_224 with .*num_heads"),
        ({"name": "vit_tiny_patch16_224.nonsense"}, "vit_tiny_patch16_224.nonsense .*nonsense"),
        ({"name": "resnet18", "patch_dropout": 0.5}, "timm cannot build .*patch_drop_rate"),
        ({"image_size": 0}, "timm cannot build .*a positive image size"),
        ({"args": {"img_size": 32}}, "multiple values for keyword argument 'img_size'"),
        ({"args": {"global_pool": "avg"}}, "timm cannot build .*argument 'global_pool'"),
        ({"args": {"in_chans": 1}}, "timm cannot build .*argument 'in_chans'"),
        ({"args": {"num_classes": 9}}, "timm cannot build .*argument 'num_classes'"),
        ({"args": {"checkpoint_path": "a"}}, "argument 'checkpoint_path'"),
        ({"name": "vit", "args": {"global_pool": "avg"}}, "unknown argument of vit 'global_pool'"),
    ],
)
def test_models_and_arguments_that_timm_lacks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        dualenc.build_tower(dualenc.VisionConfig(**{"name": VIT, "image_size": 32, **config}))


def test_pretrained_tables_are_resampled_and_missing_weights_are_an_error(tmp_path):
    """A 64-pixel ViT's weights in a 32-pixel tower, read from a local file."""
    name = "deit_tiny_patch16_224"
    big = timm.create_model(name, num_classes=0, img_size=64, **TINY_VIT)
    torch.save(big.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 0}
    config = dualenc.VisionConfig(name, {**TINY_VIT, "pretrained_cfg_overlay": overlay}, 32)
    tower = dualenc.VisionEncoder(config, pretrained_from=name)
    table = timm.layers.resample_abs_pos_embed(big.pos_embed, [4, 4], [8, 8])
    assert torch.allclose(tower.trunk.pos_embed, table, atol=1e-6)
    assert torch.equal(tower.trunk.patch_embed.proj.weight, big.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="timm cannot build resnet18.no_tag"):
        dualenc.VisionEncoder(dualenc.VisionConfig("resnet18"), pretrained_from="resnet18.no_tag")
