"""Claims about training: the parts of the recipe, and whole runs on a few drawn images."""

import dataclasses
import json
import math
import os
import platform
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import class_folders, log_of, write_table

import dualenc
import train

ROOT = Path(train.__file__).parent
TINY_RUN = {"vision": "test_resnet", "image_size": 32, "text_width": 16, "text_depth": 1}
TINY_RUN |= {"text_heads": 2, "projection_dim": 8}
TINY_VIT_RUN = {**TINY_RUN, "vision": "test_vit"}  # without batch norm
SHORT = {"batch_size": 8, "steps": 6, "log_every": 2, "eval_every": 3, "workers": 0}


@pytest.fixture(scope="module")
def captions_file(tmp_path_factory):
    """40 drawn images, the first of them with two captions."""
    pairs = dualenc.ShapesPairs(count=40, side=32)
    pairs.captions[0] = [*pairs.captions[0], "drawing 0"]
    return write_table(tmp_path_factory.mktemp("drawn"), (pairs[i] for i in range(40)))


@pytest.fixture
def run(captions_file, tmp_path):
    """A function that trains a tiny model: run("name", flag=value) returns (metrics, folder)."""

    def go(name="run", towers=TINY_RUN, **flags):
        settings = {"data": captions_file, "precision": "fp32", "out": tmp_path / name}
        argv = []
        for key, value in {**settings, **SHORT, **towers, **flags}.items():
            words = "--" + key.replace("_", "-")
            switch = [words if value else words.replace("--", "--no-")]
            argv += switch if isinstance(value, bool) else [words, str(value)]
        return train.main(argv), tmp_path / name

    return go


def weights(folder):
    return dualenc.DualEncoder.from_pretrained(folder).state_dict()


def same_weights(one, two):
    one, two = weights(one), weights(two)
    return all(torch.equal(one[name], two[name]) for name in one)


def assert_same_log(one, two, tolerance):
    for line, other in zip(log_of(one), log_of(two), strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)


# ---- Losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train.LOSSES)
def test_chance_floor_and_tiled_form_of_a_row_are_those_of_its_loss(name, make_model, monkeypatch):
    """Chance: all embeddings alike. Floor: perfect embeddings, alike within a group."""
    model, row = make_model(logit_bias_init=0.0), train.LOSSES[name]
    groups, sizes = torch.tensor([0, 1, 0, 2, 0, 1]), [3, 2, 1]
    alike, perfect = torch.ones(6, 4) / 2, torch.eye(3)[groups]

    def loss(embeds, scale, bias):
        with torch.no_grad():
            model.logit_scale.fill_(scale)
            model.logit_bias.fill_(bias)
        return train.compute_loss(name, model, embeds, embeds, groups).item()

    if name == "siglip":  # the best constant answer, found by trying
        chance = min(loss(alike * 0, 0.0, bias) for bias in torch.linspace(-4, 2, 601))
        assert row.floor([1] * 6) == 0 and row.floor(sizes) < row.chance(sizes)
    else:
        chance = loss(alike, math.log(100), 0.0)
        assert row.floor(sizes) == pytest.approx(loss(perfect, math.log(100), 0.0), abs=1e-5)
    assert row.chance(sizes) == pytest.approx(chance, abs=1e-3)
    plain = loss(perfect, 1.0, -2.0)
    monkeypatch.setattr(train, "TILED_FROM", 1)  # where there is one
    assert loss(perfect, 1.0, -2.0) == pytest.approx(plain)


def test_a_new_loss_is_one_row_and_an_incomplete_row_raises(make_model, monkeypatch):
    """Large batches take the tiled form, and the plain one where there is none."""
    row = {"function": lambda images, texts, scale: (len(images), len(texts), scale.item())}
    row |= {"inputs": ("logit_scale",), "tiled": None, "chance": len, "floor": len}
    monkeypatch.setitem(train.LOSSES, "plain", train.Loss(**row))
    tiled = train.Loss(**{**row, "tiled": lambda *embeds: "tiled"})
    monkeypatch.setitem(train.LOSSES, "tiled", tiled)
    given = make_model(), torch.ones(8, 4), torch.ones(8, 4), torch.arange(8)
    plain = (8, 8, pytest.approx(2.6592))
    for size, expected in ((8, "tiled"), (9, plain)):
        monkeypatch.setattr(train, "TILED_FROM", size)
        assert train.compute_loss("plain", *given) == plain
        assert train.compute_loss("tiled", *given) == expected
    for name in row:
        with pytest.raises(TypeError, match=name):
            train.Loss(**{key: value for key, value in row.items() if key != name})


@dataclasses.dataclass(frozen=True)
class WithHead(train.TrainConfig):
    projection_head: str = train.flag("mlp", "of the projections", sets="projection_head")


def test_a_new_head_is_one_row_and_one_flag(monkeypatch):
    monkeypatch.setitem(dualenc.PROJECTION_HEADS, "mlp", torch.nn.Linear)
    model = train.make_model(WithHead(**TINY_RUN), dualenc.load_pairs("shapes", "val"))
    assert model.config.projection_head == "mlp" and model.text_projection.bias is not None


def test_in_batch_accuracy_counts_both_directions_and_any_right_answer():
    images, texts = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]  # the last two changed places
    assert train.in_batch_accuracy(images, texts, torch.arange(4)) == 0.5
    assert train.in_batch_accuracy(images, texts, torch.tensor([0, 1, 2, 2])) == 1.0
    one_way = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert train.in_batch_accuracy(one_way, torch.eye(2), torch.arange(2)) == 0.75


# ---- Data ----------------------------------------------------------------------------------------


def batches_of(n_images, batch_size, first=0, steps=15, seed=0, neighbours=1):
    sizes = {"batch_size": batch_size, "steps": steps, "seed": seed, "neighbours": neighbours}
    return list(train.batch_keys(train.TrainConfig(**sizes), range(n_images), first))


def test_batches_visit_every_image_once_an_epoch_in_a_new_order():
    batches = batches_of(21, 4)
    assert len(batches) == 15
    for epoch in range(3):
        keys = [key for batch in batches[5 * epoch : 5 * epoch + 5] for key in batch]
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 20
    orders = [[i for batch in batches[5 * e : 5 * e + 5] for _, i in batch] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert batches_of(21, 4, first=7) == batches[7:], "a resumed run goes on where it was"
    assert batches_of(21, 4, seed=1) != batches


def test_neighbours_stay_in_a_row_and_the_rows_are_shuffled():
    order = [i for batch in batches_of(21, 7, steps=3, neighbours=2) for _, i in batch]
    assert sorted(order) == list(range(21)) != order, "the last row is short"
    assert all(order[order.index(i) + 1] == i + 1 for i in range(0, 20, 2))
    shapes = dualenc.ShapesPairs(count=40, side=32)
    for batch in train.batch_keys(train.TrainConfig(batch_size=8, steps=5), shapes, 0):
        assert all((epoch, i ^ 1) in batch for epoch, i in batch), "2k and 2k + 1 are mirrors"


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_arrives_with_one_of_its_own_captions(captions_file, make_model, workers):
    config = train.TrainConfig(batch_size=8, workers=workers, steps=15)
    pairs, model, drawn = dualenc.load_pairs(captions_file, split="all"), make_model(), set()
    transform, of_run = model.processor.image_transform, train.Run("", pairs, pairs, (), {})
    fetch = partial(train.fetch, config, of_run, model, 0, {})
    for (images, indices, captions), (_, _, again) in zip(fetch(), fetch()):
        assert captions == again, "the key alone decides"
        assert images.dtype == torch.uint8 and images.shape == (8, 3, 32, 32)
        for image, i, caption in zip(images, indices, captions):
            opened, own = pairs[i]
            assert caption in own
            assert torch.equal(image, transform.resize_and_crop(dualenc.to_pixels(opened)))
            drawn.add((i, caption))
    assert next(train.cached_images(torch.arange(3), {1: "", 2: ""}, [[(0, 1)]]))[:2] == (0, 0)
    assert len(drawn) == 41, "over three epochs both captions of an image are drawn"


def test_augmentation_follows_from_seed_and_key_alone():
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    config = train.TrainConfig(crop_scale=0.3, flip=True)
    seen = [train.augment(config, pixels, (epoch, 5)) for epoch in range(20)]
    assert torch.equal(seen[3], train.augment(config, pixels, (3, 5)))
    assert len({image.shape for image in seen}) > 10
    flips = [train.augment(train.TrainConfig(flip=True), pixels, (e, 5)) for e in range(20)]
    mirrored = sum(torch.equal(image, pixels.flip(-1)) for image in flips)
    assert 3 <= mirrored <= 17 and mirrored + sum(torch.equal(i, pixels) for i in flips) == 20
    assert train.augment(train.TrainConfig(), pixels, (0, 5)) is pixels


def test_random_crops_keep_proportions_and_at_least_the_share_asked_for():
    image, shares = torch.arange(40 * 60).view(1, 40, 60), []
    for seed in range(200):
        crop = train.TrainConfig.random_crop(image, 0.25, random.Random(seed))
        height, width = crop.shape[-2:]
        assert width / height == pytest.approx(1.5, abs=0.1)
        assert torch.equal(crop - crop[0, 0, 0], image[:, :height, :width]), "one connected part"
        shares.append(height * width / image.numel())
    assert 0.23 <= min(shares) < 0.35 and 0.9 < max(shares) <= 1
    assert train.TrainConfig.random_crop(torch.zeros(3, 1, 9), 0.01, random.Random(0)).numel() > 0


@dataclasses.dataclass(frozen=True)
class DarkConfig(train.TrainConfig):
    @staticmethod
    def darken(pixels, by, rng):
        return (pixels * (1 - by * rng.random())).to(pixels.dtype)

    dark: float = train.flag(0.0, "darken images", "data", augment=darken)


def test_a_new_augmentation_is_one_field_and_never_dropped_silently():
    config = DarkConfig(dark=0.5, cache_features=True, lock="vision", batch_size=8)
    pixels, pairs = torch.full((3, 4, 4), 200).byte(), dualenc.ShapesPairs(count=8, side=32)
    seen = [train.augment(config, pixels, (0, i)).max().item() for i in range(9)]
    assert len(set(seen)) > 3 and max(seen) < 200
    with pytest.raises(ValueError, match="made torch.float32, not torch.uint8"):
        train.augment(config, pixels / 255, (0, 0))
    with pytest.raises(ValueError, match="one view of each image: leave out --dark$"):
        train.check_recipe(config, pairs, pairs)
    train.check_recipe(dataclasses.replace(config, lock="text"), pairs, pairs)


# ---- Model and optimiser -------------------------------------------------------------------------


def groups_of(model, config):
    """{name of a weight: (peak learning rate, weight decay)}"""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = train.make_optimizer(model, config).param_groups
    rates = [(group["peak"], group["weight_decay"]) for group in groups]
    return {names[id(w)]: rate for group, rate in zip(groups, rates) for w in group["params"]}


def test_weight_decay_and_learning_rates_reach_the_right_weights(make_model):
    model, config = make_model(logit_bias_init=-1.0), train.TrainConfig(weight_decay=0.3, lr=1e-2)
    assert groups_of(model, config).keys() == dict(model.named_parameters()).keys()
    kept = ("bias", "norm", "Norm", "pos_embed", "position_embeddings", "cls_token", "logit")
    for name, group in groups_of(model, config).items():
        assert group == (1e-2, 0.0 if any(word in name for word in kept) else 0.3), name
    model.text_model.weights_from = "some/folder"
    for rates, tower_lr in (({}, 1e-3), ({"tower_lr": 5e-5}, 5e-5)):
        for name, (peak, _) in groups_of(model, dataclasses.replace(config, **rates)).items():
            assert peak == (tower_lr if name.startswith("text_model.") else 1e-2), name
    learning = groups_of(model.lock("text"), config)
    assert not any(name.startswith("text_model") for name in learning)
    assert "text_projection.weight" in learning


def test_the_flags_of_towers_reach_the_towers():
    pairs = dualenc.ShapesPairs(count=8, side=32)
    flags = {"vision_args": {"stem_width": 8}, "text_pooling": "cls", "text": "scratch:mpnet"}
    model = train.make_model(train.TrainConfig(**flags, text_width=16, text_heads=2), pairs)
    vision, text, size = model.config.vision, model.config.text, train.SCRATCH_SIZE
    assert (vision.name, vision.args["stem_width"], text.pooling) == ("resnet18", 8, "cls")
    assert (text.family, text.width, text.heads, text.depth) == ("mpnet", 16, 2, 3)
    assert model.processor.image_transform.resize == size, "a new tower sees the whole image"
    flags = {"image_size": 32, "patch_dropout": 0.5, "vision_args": {"depth": 3}}
    config = train.TrainConfig(vision="test_vit", projection_dim=9, **flags)
    got = train.make_model(config, pairs).config
    assert (got.projection_dim, got.text.pooling) == (9, "mean")
    assert (got.vision.patch_dropout, got.vision.args) == (0.5, {"depth": 3})


def test_init_starts_a_new_run_from_the_weights_of_another(run, capsys):
    """With its processor, and the lower learning rate."""
    _, first = run("first", steps=3)
    _, out = run("second", {}, init=first, lr=1e-9, steps=1)
    source = weights(first)
    for name, weight in weights(out / "last").items():
        if weight.is_floating_point() and "running" not in name:
            torch.testing.assert_close(weight, source[name], atol=1e-6, rtol=0)
    tokens = [folder / "tokenizer.json" for folder in (out / "best", first / "best")]
    assert tokens[0].read_text() == tokens[1].read_text()
    said = capsys.readouterr().out
    assert f"vision tower from {first}" in said and "new: nothing" in said
    assert "at lr 1.0e-10" in said and "at lr 1.0e-09" in said
    with pytest.raises(ValueError, match="--init brings its own.*--text-width, --projection"):
        run("", {}, init=first, text_width=8, projection_dim=4)  # in a folder that is in use
    with pytest.raises(ValueError, match="first has no logit_bias for --loss siglip"):
        run("third", {}, init=first, loss="siglip")
    _, siglip = run("siglip", loss="siglip", steps=1)
    _, clip = run("clip", {}, init=siglip, steps=1)
    biases = [weights(folder / "best")["logit_bias"] for folder in (siglip, clip)]
    assert torch.equal(*biases), "clip_loss has no use for it"
    states = [torch.load(folder / "last" / train.STATE_FILE) for folder in (siglip, clip)]
    learning = [sum(len(g["params"]) for g in s["optimizer"]["param_groups"]) for s in states]
    assert learning[0] == learning[1] + 1, "several processes would wait for its gradient"


def test_init_takes_a_folder_of_transformers_and_what_is_learned_goes_back(run, tmp_path):
    config = dualenc.DualEncoder.from_pretrained(ROOT / "tests/fixtures/dual/vit-bert").config
    tokenizer = dualenc.train_tokenizer(["a red circle"], 300)
    words = dataclasses.replace(config.text, vocab_size=300)
    model = dualenc.DualEncoder(dataclasses.replace(config, text=words))
    model.processor = dualenc.Processor(dualenc.ImageTransform(24, 24), tokenizer)
    model.save_pretrained(tmp_path / "theirs", format="hf")
    _, out = run("tuned", {}, init=tmp_path / "theirs", steps=2)
    tuned = dualenc.DualEncoder.from_pretrained(out)
    tuned.save_pretrained(tmp_path / "back", format="hf")
    assert same_weights(out / "best", tmp_path / "back") and tuned.config == model.config
    assert not same_weights(out, tmp_path / "theirs")


# ---- Whole runs ----------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_the_readme_promises(run, captions_file, capsys):
    metrics, out = run(steps=90, eval_every=30, lr=3e-3, val_fraction=0.2)
    steps, measured = log_of(out, "loss"), log_of(out, "i2t_r1")
    late = steps[-10:]  # 160 pairs; a few of them are always hard
    assert sum(step["loss"] for step in late) / len(late) < 0.5 * steps[0]["loss"]
    assert sum(step["in_batch_acc"] for step in late) / len(late) > 0.7
    assert steps[0]["chance_loss"] == pytest.approx(math.log(8))
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "logit_scale", "lr", "pairs_per_s", "data_share"} <= set(first)
    assert [line["step"] for line in measured] == [30, 60, 90]
    best = max(measured, key=lambda line: (line["i2t_r1"] + line["t2i_r1"], line["step"]))
    assert metrics == best, "of equal ones the last"
    record = json.loads((out / "train_config.json").read_text())
    assert record["flags"]["lr"] == 3e-3 and record["versions"]["torch"] == torch.__version__
    assert record["command"][0] == "train.py" and "--lr" in record["command"]
    assert record["device"] == "cpu" and record["processes"] == 1
    names = dualenc.load_pairs(captions_file, "train", val_fraction=0.2).names
    assert (out / "trained_on.txt").read_text().splitlines() == names
    assert (out / "last" / train.STATE_FILE).exists()
    assert not (out / "best" / train.STATE_FILE).exists()
    printed = capsys.readouterr().out
    assert "chance 2.079" in printed and f"python eval.py {out}" in printed
    assert "scale 14." in printed and "text tower from random weights; new: projections" in printed


def test_a_step_clips_its_gradient_and_clamps_the_temperature(run, monkeypatch):
    norms, make_model, make_optimizer = [], train.make_model, train.make_optimizer

    def hot_model(config, pairs):
        model = make_model(config, pairs)
        torch.nn.init.constant_(model.logit_scale, 9.0)
        return model

    def watched_optimizer(model, config):
        optimizer, norm = make_optimizer(model, config), torch.nn.utils.clip_grad_norm_
        optimizer.register_step_pre_hook(lambda *_: norms.append(norm(model.parameters(), 1e9)))
        return optimizer

    monkeypatch.setattr(train, "make_model", hot_model)
    monkeypatch.setattr(train, "make_optimizer", watched_optimizer)
    _, out = run(clip_grad=0.5, steps=2)
    assert max(norms) == pytest.approx(0.5, abs=1e-3)
    run("free", clip_grad=0, steps=1)
    assert norms[-1] > 0.6
    scale = weights(out / "last")["logit_scale"].item()
    assert scale == pytest.approx(math.log(100), abs=2e-3)


def test_the_same_seed_gives_the_same_run_whatever_the_workers(run):
    _, one = run("one", crop_scale=0.5)
    _, two = run("two", crop_scale=0.5, workers=2)
    _, other = run("other", crop_scale=0.5, seed=1)
    assert same_weights(one / "last", two / "last") and log_of(one) == log_of(two)
    assert not same_weights(one / "last", other / "last")


def test_the_number_of_steps_and_of_evaluations_follows_from_the_data(run, captions_file):
    """At least one step, and about five evaluations, the last one at the end."""

    def evaluated(name, **flags):
        return [line["step"] for line in log_of(run(name, eval_every=0, **flags)[1], "i2t_r1")]

    assert evaluated("seven", steps=7) == [2, 4, 6, 7]
    assert evaluated("one", steps=0, epochs=0.01) == [1]
    count = len(dualenc.load_pairs(captions_file, "train"))
    B = next(B for B in range(5, 12) if count % B > B / 2)
    assert evaluated("epochs", steps=0, epochs=2, batch_size=B)[-1] == 2 * (count // B)


def test_micro_batches_and_tiled_losses_make_the_same_run(run, monkeypatch):
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    _, plain = run("plain", TINY_VIT_RUN)
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # see dualenc.autocast
    monkeypatch.setattr(train, "TILED_FROM", 1)
    _, pieces = run("pieces", TINY_VIT_RUN, micro_batch=3)
    assert_same_log(plain, pieces, 1e-4)


@pytest.mark.slow
def test_compiled_towers_make_the_same_run(run):
    torch._dynamo.reset()
    _, plain = run("plain", TINY_VIT_RUN)
    _, out = run("compiled", TINY_VIT_RUN, compile=True)
    assert_same_log(plain, out, 1e-3)
    assert weights(out / "last").keys() == weights(plain / "last").keys()


@pytest.mark.parametrize("lock", ["vision", "text", "both"])
def test_a_cached_run_is_the_locked_run_and_locked_towers_stay(lock, run, monkeypatch, capsys):
    """A second one computes no feature of images again."""
    flags = {"lock": lock, "steps": 10, "lr": 1e-2}
    _, plain = run("plain", **flags)
    _, cached = run("cached", cache_features=True, **flags)
    assert_same_log(plain, cached, 1e-4)
    config = train.TrainConfig(**json.loads((plain / "train_config.json").read_text())["flags"])
    torch.manual_seed(0)
    start = train.make_model(config, train.load_data(config)[0]).state_dict()
    for folder in (plain, cached):
        for name, weight in weights(folder / "last").items():
            tower = {"vision": "vision_model", "text": "text_model"}.get(lock, "_model")
            assert torch.equal(weight, start[name]) == (tower in name), name
    capsys.readouterr()
    if lock != "text":
        monkeypatch.setattr(dualenc.VisionEncoder, "forward", None)
    _, again = run("again", cache_features=True, **flags)
    n_stores = {"vision": 2, "text": 1, "both": 3}[lock]
    assert capsys.readouterr().out.count("rows, 0 of them new") == n_stores
    assert log_of(again) == log_of(cached)


def test_fp16_scales_the_loss_and_skips_what_overflows(run, monkeypatch, capsys):
    """On a CPU too. Gradients come close to float32's; a step that overflows changes nothing."""
    scaler = torch.amp.GradScaler
    _, full = run("full", TINY_VIT_RUN)
    for scale, flags in ((2.0**8, {}), (2.0**125, {"log_every": 1, "steps": 4})):
        monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=scale))
        _, out = run(f"half {scale}", TINY_VIT_RUN, precision="fp16", **flags)
        state = torch.load(out / "last" / train.STATE_FILE, weights_only=True)
        assert state["scaler"]["scale"] == (scale if not flags else scale / 2**4)
    assert_same_log(full, out.with_name("half 256.0"), 0.05)
    assert [line["skipped_steps"] for line in log_of(out, "loss")] == [1, 2, 3, 4]
    assert len({line["logit_scale"] for line in log_of(out, "loss")}) == 1
    assert "4 skipped steps" in capsys.readouterr().out
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(ValueError, match="step 1: loss or gradient is not finite"):
        run("in float32 no step is skipped")


def test_compile_compiles_both_towers_in_place(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(dualenc.VisionEncoder, "compile", lambda _: compiled.append("vision"))
    monkeypatch.setattr(dualenc.TextEncoder, "compile", lambda _, dynamic: compiled.append(dynamic))
    run(compile=True, steps=1)
    assert compiled == ["vision", True], "captions of any length share a graph"


@pytest.mark.parametrize("loss", ["siglip", "multi-positive"])
def test_class_folders_train_with_other_losses(loss, run, tmp_path, capsys):
    data = class_folders(tmp_path / "data", "dog", "red_fox")
    (tmp_path / "names.tsv").write_text("dog\thound\n")
    flags = {"data": data, "flip": True, "classes": tmp_path / "names.tsv"}
    metrics, out = run(loss=loss, templates="plain", **flags)
    assert (metrics["n_classes"], metrics["n_templates"]) == (2, 1) and 0 <= metrics["zs_top1"] <= 1
    assert "zs_class_top1" not in metrics  # a line holds numbers only
    assert "2 classes: hound, red fox" in capsys.readouterr().out
    assert (log_of(out)[0]["floor_loss"] == 0) == (loss == "multi-positive")
    start = json.loads((out / "best" / "config.json").read_text())
    expected = (math.log(10), -10) if loss == "siglip" else (dualenc.LOGIT_SCALE_INIT, None)
    assert (start["logit_scale_init"], start["logit_bias_init"]) == expected


REFUSED = [
    ({"cache_features": True}, "--cache-features needs a tower to --lock"),
    ({"cache_features": True, "lock": "both", "flip": True, "crop_scale": 0.5}, "crop-scale, --fl"),
    ({"batch_size": 1}, "--batch-size is 1, expected at least 2"),
    ({"batch_size": 100}, r"3\d training images: lower --batch-size"),
    ({"lr": 1e30, "clip_grad": 0}, "step 2: loss or gradient is not finite: lower --lr"),
    ({"images": "nowhere"}, "missing image nowhere"),
    ({"val_fraction": 0.0}, "no images are held out"),
    ({"val_fraction": 1.0}, "has no training images: all are held out"),
    ({"crop_scale": 70.0}, "--crop-scale is 70.0, expected at most 1"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("refused", **flags)
    assert (tmp_path / "refused").exists() == ("step" in message), "training had begun, or not"


def test_batches_that_processes_cannot_share_and_captions_all_alike_are_refused(monkeypatch):
    pairs = dualenc.load_pairs("shapes", "val")
    monkeypatch.setattr(dualenc, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--batch-size 8 is not a multiple of 3 ranks"):
        train.check_recipe(train.TrainConfig(batch_size=8), pairs, pairs)
    pairs.captions = [["an image"]] * len(pairs)
    with pytest.raises(ValueError, match="share their caption or class"):
        train.check_recipe(train.TrainConfig(batch_size=9), pairs, pairs)


def test_features_of_a_locked_tower_that_learns_are_not_cached(run, monkeypatch):
    """Adapters in a locked tower would be trained past, without a word."""
    monkeypatch.setattr(dualenc.DualEncoder, "lock", lambda model, tower: model.locked.add(tower))
    with pytest.raises(ValueError, match="adapters of a locked tower learn"):
        run(cache_features=True, lock="vision")


def test_a_printed_line_covers_the_steps_since_the_last_one(run, capsys):
    """The first step has a line of its own, without a rate: it warms up."""
    _, out = run(log_every=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]
    assert "pairs/s" not in lines[0]
    assert all("pairs/s   data " in line and " left" in line for line in lines[1:])
    losses = [line["loss"] for line in log_of(run("every", log_every=1)[1], "loss")]
    means = [losses[0], sum(losses[1:4]) / 3, sum(losses[4:]) / 2]
    assert [line["loss"] for line in log_of(out, "loss")] == pytest.approx(means, abs=1e-6)


def test_rates_count_waiting_and_leave_out_evaluation(run, monkeypatch):
    """By a clock of our own: 8 images take 1 s, a step takes 3, an evaluation takes 100."""
    taken = []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: sum(taken)))
    durations = {(dualenc, "to_pixels"): 1 / 8, (train, "compute_loss"): 3}
    durations[train, "evaluate"] = 100
    for (owner, name), seconds in durations.items():
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, w=work, s=seconds: taken.append(s) or w(*a))
    _, out = run(steps=4, log_every=4, eval_every=3)
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[2])
    assert line["step"] == 4 and line["data_share"] == 1 / 4 and line["pairs_per_s"] == 8 / 4
    config = train.TrainConfig(steps=49, batch_size=8)  # 45 steps of 4 s are left
    assert train.describe_step(line, config).endswith("3:00 left")


FRESH_PROCESS = """
import os, resource, torch
torch.manual_seed(5)
before = dict(os.environ), torch.get_num_threads()
import dualenc, eval, train
assert before == (dict(os.environ), torch.get_num_threads()) and torch.initial_seed() == 5

def pages():
    for _ in range(8):  # until the heap has found its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**23)  # 32 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left = pages()
train.prepare_cpu()
assert pages() < 0.1 * left and dualenc.torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
print(dualenc.train_tokenizer([*dualenc.COLOURS, *dualenc.SHAPES], 300).to_str())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_fresh_process_is_left_alone_reuses_memory_and_numbers_words_alike():
    command, hashes = [sys.executable, "-c", FRESH_PROCESS], {"PYTHONHASHSEED": "7"}
    options = {"cwd": ROOT, "env": {**os.environ, **hashes}, "capture_output": True, "text": True}
    ran = subprocess.run(command, **options)
    here = dualenc.train_tokenizer([*dualenc.COLOURS, *dualenc.SHAPES], 300)
    assert ran.returncode == 0 and ran.stdout == f"{here.to_str()}\n", ran.stderr
