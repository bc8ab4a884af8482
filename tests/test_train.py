"""Claims about training: the recipe's parts, and whole runs in process on a few drawn pictures."""

import csv
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import fails_like

import dualenc
import eval as evaluation
import train

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def captions_file(tmp_path_factory):
    """40 drawn pictures, the first of them with two captions."""
    folder = tmp_path_factory.mktemp("drawn")
    pairs = dualenc.ShapesPairs(count=40, side=32)
    rows = []
    for i in range(len(pairs)):
        picture, captions = pairs[i]
        picture.save(folder / f"{i}.png")
        rows += [(f"{i}.png", caption) for caption in captions + [f"drawing {i}"] * (i == 0)]
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder / "captions.csv"


@pytest.fixture
def run(captions_file, tmp_path):
    """A function that trains a tiny model: run("name", flag=value) returns (metrics, run folder)."""

    def go(name="run", **flags):
        settings = {
            "data": captions_file,
            "vision": "test_resnet",
            "vision_args": [],
            "image_size": 32,
            "text_width": 16,
            "text_depth": 1,
            "text_heads": 2,
            "projection_dim": 8,
            "batch_size": 8,
            "steps": 6,
            "precision": "fp32",
            "workers": 0,
            "log_every": 2,
            "eval_every": 3,
            "out": tmp_path / name,
            **flags,
        }
        argv = []
        for key, value in settings.items():
            flag = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-"))
            elif isinstance(value, list):
                argv += [flag, *map(str, value)]
            else:
                argv += [flag, str(value)]
        return train.main(argv), Path(settings["out"])

    return go


def weights(folder):
    return dualenc.DualEncoder.from_pretrained(folder).state_dict()


def same_weights(one, two):
    one, two = weights(one), weights(two)
    return all(torch.equal(one[name], two[name]) for name in one)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("pairs_per_s", "data_share")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


# ---- Parts of the recipe --------------------------------------------------------------------------------------------


def test_weight_decay_is_kept_off_norms_biases_positions_and_the_temperature(make_model):
    model = make_model(logit_bias_init=-1.0)
    groups = train.make_optimizer(model, train.TrainConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and groups[0]["fused"]
    for group in groups:
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6, "Radford et al. 2021, table 19, for ViTs"
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, kept = ({names[id(weight)] for weight in group["params"]} for group in groups)
    assert decayed | kept == set(names.values()) and not decayed & kept
    for name in names.values():
        free = any(
            word in name for word in ("bias", "norm", "Norm", "pos_embed", "position_embeddings", "cls_token", "logit")
        )
        assert (name in kept) == free, name
    model.lock("text")
    names = {id(weight): name for name, weight in model.named_parameters()}
    trained = [
        names[id(w)] for group in train.make_optimizer(model, train.TrainConfig()).param_groups for w in group["params"]
    ]
    assert not any(name.startswith("text_model") for name in trained) and "text_projection.weight" in trained


def test_batches_visit_every_picture_once_an_epoch_in_a_new_order():
    batches = list(train.Batches(21, 4, seed=0, first_step=0, steps=15))
    assert len(batches) == len(train.Batches(21, 4, 0, 0, 15)) == 15
    for epoch in range(3):
        keys = [key for batch in batches[5 * epoch : 5 * epoch + 5] for key in batch]
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 20, "whole batches, no repeats"
    orders = [[i for batch in batches[5 * e : 5 * e + 5] for _, i in batch] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert list(train.Batches(21, 4, 0, 7, 15)) == batches[7:], "a resumed run goes on where it was"
    assert list(train.Batches(21, 4, 1, 0, 15)) != batches


def test_neighbours_stay_in_a_row_and_the_rows_are_shuffled():
    batches = list(train.Batches(20, 4, seed=0, first_step=0, steps=10, neighbours=2))
    epochs = [[i for batch in part for _, i in batch] for part in (batches[:5], batches[5:])]
    for order in epochs:
        assert sorted(order) == list(range(20))
        assert all(even % 2 == 0 and odd == even + 1 for even, odd in zip(order[::2], order[1::2]))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    odd = [i for batch in train.Batches(5, 5, 0, 0, 1, neighbours=2) for _, i in batch]
    assert sorted(odd) == list(range(5)), "the last row may be short"


@pytest.mark.parametrize("flag, always", [(0, True), (1, False), (2, True)])
def test_drawn_shapes_meet_their_mirror_in_the_batch_unless_told_otherwise(make_model, flag, always):
    config, pairs = train.TrainConfig(batch_size=8, neighbours=flag, workers=0), dualenc.ShapesPairs(count=200, side=32)
    batches = [batch.numbers for batch in train.make_loader(pairs, make_model(), config, torch.device("cpu"), 0, 25)]
    met = [i ^ 1 in batch for batch in batches for i in batch]  # 2k and 2k + 1 are mirrors
    assert all(met) if always else sum(met) < 0.2 * len(met)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_arrives_with_one_of_its_own_captions(captions_file, make_model, workers):
    """Pixels, caption and number of a row belong together, and workers change nothing."""
    config = train.TrainConfig(batch_size=8, workers=workers)
    pairs, model = dualenc.load_pairs(captions_file, val_fraction=0.0), make_model()
    loader = train.make_loader(pairs, model, config, torch.device("cpu"), 0, 15)
    drawn = set()
    for images, captions, numbers, _ in loader:
        assert images.dtype == torch.uint8 and images.shape == (8, 3, 32, 32)
        for image, caption, i in zip(images, captions, numbers):
            picture, own = pairs[i]
            assert caption in own
            assert torch.equal(image, model.processor.image_transform.resize_and_crop(dualenc.to_pixels(picture)))
            drawn.add((i, caption))
    assert len(drawn) == 41, "over three epochs both captions of a picture are drawn"


def test_augmentation_follows_from_the_key_alone(captions_file, make_model):
    pairs, transform = dualenc.load_pairs(captions_file, val_fraction=0.0), make_model().processor.image_transform
    augmented = train.TrainingPairs(pairs, transform, train.TrainConfig(crop_scale=0.3, flip=True))
    assert torch.equal(augmented[0, 5][0], augmented[0, 5][0])
    assert not torch.equal(augmented[0, 5][0], augmented[1, 5][0])
    flips = train.TrainingPairs(pairs, transform, train.TrainConfig(flip=True))
    plain = train.TrainingPairs(pairs, transform, train.TrainConfig())[0, 5][0]
    seen = [flips[epoch, 5][0] for epoch in range(20)]
    mirrored = transform.resize_and_crop(dualenc.to_pixels(pairs[5][0]).flip(-1))
    assert all(torch.equal(image, plain) or torch.equal(image, mirrored) for image in seen)
    assert 3 <= sum(torch.equal(image, mirrored) for image in seen) <= 17


def test_random_crops_keep_proportions_and_at_least_the_share_asked_for():
    import random

    image = torch.arange(40 * 60).view(1, 40, 60)
    shares = []
    for seed in range(200):
        crop = train.random_crop(image, 0.25, random.Random(seed))
        height, width = crop.shape[-2:]
        assert width / height == pytest.approx(1.5, abs=0.1)
        assert torch.equal(crop - crop[0, 0, 0], image[:, :height, :width]), "one connected part"
        shares.append(height * width / image.numel())
    assert 0.23 <= min(shares) < 0.35 and 0.9 < max(shares) <= 1
    line = torch.zeros(3, 1, 9)
    crops = [train.random_crop(line, 0.01, random.Random(seed)) for seed in range(50)]
    assert all(min(crop.shape) >= 1 for crop in crops), "of a picture one pixel high too"


def test_pairs_with_one_class_or_word_for_word_one_caption_are_one_group():
    """Ids do not depend on what else is in the batch: another process gives a group the same one."""
    plain = dualenc.Pairs(list("abcd"), None, [["x"], ["y"], ["x"], ["z"]])
    x, y, again, z = train.pair_groups(plain, ["x", "y", "x", "z"], [0, 1, 2, 3]).tolist()
    assert x == again and len({x, y, z}) == 3
    assert train.pair_groups(plain, ["z", "x"], [3, 2]).tolist() == [z, x]
    assert train.pair_groups(plain, ["\ud83d", "\ud83d"], [0, 1]).unique().numel() == 1, "half a character is text too"
    labelled = dualenc.Pairs(list("abcd"), None, [["x"]] * 4, [5, 3, 3, 5], ["?"] * 6)
    assert train.pair_groups(labelled, ["p", "q", "r", "s"], [0, 1, 2, 3]).tolist() == [5, 3, 3, 5]


def test_the_printed_chance_and_floor_are_losses_that_embeddings_can_have(make_model):
    """Chance: all embeddings alike. Floor: perfect embeddings, alike within a group."""
    model = make_model(logit_bias_init=0.0)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    groups = torch.tensor([0, 1, 0, 2, 0, 1])
    alike, perfect = torch.ones(6, 4) / 2, torch.eye(3)[groups]
    for name in ("clip", "multi-positive"):
        chance, floor = train.reference_losses(name, groups)
        assert train.compute_loss(name, model, alike, alike, groups).item() == pytest.approx(chance, abs=1e-5), name
        assert train.compute_loss(name, model, perfect, perfect, groups).item() == pytest.approx(floor, abs=1e-5), name
    chance, _ = train.reference_losses("siglip", groups)
    constants = []
    for logit in torch.linspace(-4, 2, 601):
        with torch.no_grad():
            model.logit_bias.fill_(logit)
        constants.append(train.compute_loss("siglip", model, alike * 0, alike * 0, groups).item())
    assert chance == pytest.approx(min(constants), abs=1e-3), "the best constant answer"


def test_in_batch_accuracy_counts_both_directions_and_any_right_answer():
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 2]]  # the last two changed places
    assert train.in_batch_accuracy(images, texts, torch.arange(4)) == 0.5
    assert train.in_batch_accuracy(images, texts, torch.tensor([0, 1, 2, 2])) == 1.0
    one_way = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert train.in_batch_accuracy(one_way, torch.eye(2), torch.arange(2)) == 0.75


def test_a_step_descends_the_named_loss_clips_its_gradient_and_clamps_the_temperature(make_model, pictures):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = train.Batch(images, ["two dogs", "fox", "star", "circle"], [0, 1, 2, 3], {})
    for name in ("clip", "siglip", "multi-positive"):
        model = make_model("test_resnet", logit_bias_init=-1.0 if name == "siglip" else None).train()
        with torch.no_grad():
            model.logit_scale.fill_(9.0)
        config = train.TrainConfig(loss=name, clip_grad=0.5, lr=1e-2)
        optimizer = train.make_optimizer(model, config)
        groups = torch.tensor([0, 1, 2, 0])
        first = train.train_step(model, optimizer, config, batch, groups, "fp32")
        norm = torch.stack([w.grad.norm() for w in model.parameters() if w.grad is not None]).norm()
        assert norm <= 0.5001
        assert model.logit_scale.item() == pytest.approx(math.log(100))
        for _ in range(15):
            last = train.train_step(model, optimizer, config, batch, groups, "fp32")
        assert last["loss"] < first["loss"], name
        assert set(first) == {"loss", "chance_loss", "floor_loss", "in_batch_acc"}


def test_bf16_steps_come_close_to_float32_ones(make_model):
    """The towers run in bfloat16; weights, gradients and the loss stay in float32."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = train.Batch(images, ["two dogs", "fox", "star", "circle"], [0, 1, 2, 3], {})
    losses = {}
    for precision in ("fp32", "bf16"):
        model, config = make_model().train(), train.TrainConfig()
        step = train.train_step(model, train.make_optimizer(model, config), config, batch, torch.arange(4), precision)
        losses[precision] = step["loss"]
        assert all(w.dtype == w.grad.dtype == torch.float32 for w in model.parameters() if w.grad is not None)
    assert losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_design_promises(run, capsys):
    metrics, out = run(steps=90, eval_every=30, lr=3e-3, val_fraction=0.2)
    lines = log_of(out)
    steps = [line for line in lines if "loss" in line]
    late = steps[-10:]  # 160 pairs; a few of them are always hard
    assert sum(step["loss"] for step in late) / len(late) < 0.5 * steps[0]["loss"]
    assert sum(step["in_batch_acc"] for step in late) / len(late) > 0.7
    assert steps[0]["chance_loss"] == pytest.approx(math.log(8))
    names = {"step", "loss", "chance_loss", "in_batch_acc", "logit_scale", "lr", "pairs_per_s", "data_share"}
    assert names <= set(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    assert [line["step"] for line in lines if "i2t_r1" in line] == [30, 60, 90]
    assert metrics == max(
        (line for line in lines if "i2t_r1" in line), key=lambda line: (train.score(line), line["step"])
    )
    record = json.loads((out / "train_config.json").read_text())
    assert record["flags"]["lr"] == 3e-3 and record["versions"]["torch"] == torch.__version__
    assert record["command"][0] == "train.py" and "--lr" in record["command"] and record["device"] == "cpu"
    assert (out / "last" / "training_state.pt").exists() and not (out / "best" / "training_state.pt").exists()
    printed = capsys.readouterr().out
    assert "chance 2.079" in printed and f"python eval.py {out}" in printed and "scale 14." in printed


def test_eval_prints_the_runs_numbers_again_from_the_folder(run):
    metrics, out = run()
    again = evaluation.main([str(out), "--device", "cpu", "--precision", "fp32"])["retrieval"]
    assert {name: metrics[name] for name in again} == again
    last = evaluation.main([str(out / "last"), "--precision", "fp32"])["retrieval"]
    assert last.keys() == again.keys()


def test_the_same_seed_gives_the_same_run_whatever_the_workers(run):
    _, one = run("one")
    _, two = run("two", workers=2)
    _, other = run("other", seed=1)
    assert same_weights(one / "last", two / "last") and log_of(one) == log_of(two)
    assert not same_weights(one / "last", other / "last")


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_cut_short_and_resumed_equals_one_that_was_not(run, monkeypatch, stop_at):
    """Dropout, order, captions, crops, optimiser and metrics: to the bit."""
    flags = {"crop_scale": 0.5, "steps": 8, "eval_every": 2, "lr": 1e-2}
    _, whole = run("whole", **flags)
    step, calls = train.train_step, []

    def stopping_step(*args):
        calls.append(1)
        if len(calls) == stop_at + 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", stopping_step)
    with pytest.raises(KeyboardInterrupt):
        run("cut", **flags)
    monkeypatch.setattr(train, "train_step", step)
    cut = whole.with_name("cut")
    train.main(["--resume", str(cut)])
    assert same_weights(whole / "last", cut / "last") and same_weights(whole / "best", cut / "best")
    assert log_of(whole) == log_of(cut)


def test_the_picture_of_results_shows_each_caption_with_what_was_found(run, tmp_path):
    """notebooks/retrieved.py: a row a caption; a green frame where the right picture is among those found."""
    from PIL import Image

    _, out = run(steps=2, val_fraction=0.2)
    code = (ROOT / "notebooks" / "retrieved.py").read_text()
    scope = {"__name__": "retrieved", "__file__": str(ROOT / "notebooks" / "retrieved.py")}
    exec(compile(code, "retrieved.py", "exec"), scope)
    n_held_out = len(
        dualenc.load_pairs(
            json.loads((out / "train_config.json").read_text())["flags"]["data"], "test", val_fraction=0.2
        )
    )
    scope["main"]([str(out), str(tmp_path / "sheet.png"), "--queries", "3", "--found", str(n_held_out)])
    sheet = Image.open(tmp_path / "sheet.png")
    side, gap = scope["SIDE"], scope["GAP"]
    assert sheet.size == (scope["TEXT_WIDTH"] + n_held_out * (side + gap) + gap, 3 * (side + gap) + gap)
    green = (0, 128, 0)
    rows = [sheet.crop((0, gap + y * (side + gap), sheet.width, (y + 1) * (side + gap))) for y in range(3)]
    assert all(green in {colour for _, colour in row.getcolors(10**6)} for row in rows), "all pictures are shown"


def test_resuming_with_other_flags_is_refused_by_name(run):
    _, out = run()
    with pytest.raises(ValueError, match="these differ from .*--batch-size .*--lr"):
        train.main(["--resume", str(out), "--lr", "0.5", "--batch-size", "16"])
    train.main(["--resume", str(out), "--log-every", "1"])  # nothing left to do, and harmless
    train.main(["--resume", str(out), "--on-bad-step", "skip", "--on-bad-picture", "skip", "--allow-outside"])


def test_a_run_is_named_after_its_data_and_knows_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data, name in (("coco:captions_val.json", "captions_val"), ("photos/", "photos"), ("shapes", "shapes")):
        out, lock = train.claim_run(train.TrainConfig(data=data))
        lock.close()
        assert out == Path("runs") / name
    pairs = [dualenc.Pairs(names, None, [["x"], ["y"]]) for names in (["1.png", "2.png"], ["1.png", "3.png"])]
    assert train.fingerprint(pairs[0]) != train.fingerprint(pairs[1]), "other pictures with the same captions"


def test_the_number_of_steps_and_of_evaluations_follows_from_the_data(run):
    """At least one step, and about five evaluations, the last one at the end."""
    _, out = run(steps=7, eval_every=0)
    assert [line["step"] for line in log_of(out) if "i2t_r1" in line] == [2, 4, 6, 7]
    _, out = run("short", steps=2, eval_every=0)
    assert [line["step"] for line in log_of(out) if "i2t_r1" in line] == [1, 2]
    _, out = run("shortest", steps=0, epochs=0.01)
    assert [line["step"] for line in log_of(out) if "i2t_r1" in line] == [1]
    pictures = json.loads((out / "train_config.json").read_text())["flags"]["data"]
    count = len(dualenc.load_pairs(pictures, "train"))
    B = next(B for B in range(5, 12) if count % B > B / 2)
    _, out = run("epochs", steps=0, epochs=2, batch_size=B)
    assert log_of(out)[-1]["step"] == 2 * (count // B), "epochs have whole batches"


def test_as_few_pictures_as_one_batch_and_a_warm_up_to_the_end_are_no_fault():
    pairs = dualenc.ShapesPairs(count=8, side=32)
    train.check_recipe(train.TrainConfig(batch_size=8, warmup=1.0), pairs, pairs)


def test_of_equal_evaluations_the_last_is_the_best_and_both_directions_count(run, monkeypatch):
    assert train.score({"i2t_r1": 0.2, "t2i_r1": 0.6}) == pytest.approx(0.4)
    evaluate, first = evaluation.evaluate, []
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: first.append(evaluate(*a, **k)) or first[0])
    best, _ = run(steps=6, eval_every=3)
    assert len(first) == 2 and best["step"] == 6


def test_a_signal_during_the_last_step_stops_nothing(run, monkeypatch):
    taken, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: taken.append(1) or step(*a))
    monkeypatch.setattr(
        train.StopSignals, "received_anywhere", lambda self: signal.SIGTERM if len(taken) == 6 else None
    )
    best, _ = run(steps=6)
    assert best["i2t_r1"] >= 0


def test_what_is_left_of_a_swap_is_finished_and_a_lock_file_stays_where_it_is(tmp_path):
    """A second run that finds no lock file would make its own, and lock that."""
    (tmp_path / "train_config.json").write_text("{}")
    for name in ("best.old", "best.new"):
        (tmp_path / name).mkdir()
    _, lock = train.claim_run(train.TrainConfig(resume=str(tmp_path)))
    assert (tmp_path / "best").is_dir() and not (tmp_path / "best.new").exists()
    train.open_run(tmp_path, train.TrainConfig(), dualenc.Pairs(["a"], None, [["x"]]), [], torch.device("cpu"))
    assert sorted(os.listdir(tmp_path)) == sorted([train.LOCK_FILE, "train_config.json"])
    lock.close()


def test_the_command_that_goes_on_can_be_pasted_into_a_shell():
    assert train.resume_command(Path("my runs/a"), 1) == "python train.py --resume 'my runs/a'"
    assert train.resume_command(Path("a"), 2) == "torchrun --nproc-per-node 2 train.py --resume a"


def test_the_flags_of_towers_reach_the_towers(run, monkeypatch):
    pairs = dualenc.ShapesPairs(count=8, side=32)
    vit = {"vision": "test_vit", "vision_args": {"img_size": 32}, "image_size": 0, "patch_dropout": 0.5}
    assert train.make_model(train.TrainConfig(**vit), pairs).config.vision.patch_dropout == 0.5
    model = train.make_model(train.TrainConfig(vision_args={"stem_width": 8}), pairs)
    assert model.config.vision.args == {**train.SCRATCH_VISION["args"], "stem_width": 8}
    recomputed = []
    monkeypatch.setattr(dualenc, "recompute_activations", recomputed.append)
    run(steps=1, grad_checkpointing=True)
    assert len(recomputed) == 1


def test_the_head_of_the_printout_counts_weights_that_learn_apart_from_all(run, capsys):
    with pytest.warns(UserWarning, match="random weights"):
        run(steps=1, lock="vision")
    learning, every = re.search(r"trainable (\d+\.\d)M of (\d+\.\d)M", capsys.readouterr().out).groups()
    assert float(learning) < float(every)


def test_the_line_of_an_evaluation_shows_each_number_in_its_place():
    line = {"step": 3, "i2t_r1": 0.1, "i2t_r5": 0.2, "t2i_r1": 0.3, "t2i_r5": 0.4, "chance_r1": 0.05}
    line |= {"zs_top1": 0.6, "chance_top1": 0.5}
    assert train.describe_evaluation(line, 9, "here") == (
        "eval      3/9   image->text R@1 10.0% R@5 20.0%   text->image R@1 30.0% R@5 40.0% (chance R@1 5.0%)   "
        "zero-shot top-1 60.0% (chance 50.0%)   saved here"
    )


def test_a_run_folder_is_not_overwritten_unless_asked(run):
    _, out = run()
    kept = weights(out / "last")
    with pytest.raises(ValueError, match="already holds a run: go on with --resume"):
        run(seed=3)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(out / "last").items())
    run(seed=3, overwrite=True)
    assert json.loads((out / "train_config.json").read_text())["flags"]["seed"] == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_something_else_is_never_cleared(run, tmp_path, overwrite):
    """--out . or --out photos/ must cost nobody their files."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="photos holds files but no run"):
        run("photos", overwrite=overwrite)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "precious"


def test_a_step_that_is_not_finite_leaves_weights_and_statistics_as_they_were(make_model, monkeypatch):
    """Batch norm updates its statistics in the forward pass, before anyone can see that numbers are broken."""
    model, config = make_model("test_resnet").train(), train.TrainConfig()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalize = dualenc.ImageTransform.normalize
    monkeypatch.setattr(dualenc.ImageTransform, "normalize", lambda self, image: normalize(self, image) * torch.inf)
    batch = train.Batch(
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["two dogs", "fox", "star", "circle"], [0, 1, 2, 3], {}
    )
    optimizer = train.make_optimizer(model, config)
    assert train.train_step(model, optimizer, config, batch, torch.arange(4), "fp32") is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"warmup": 1.5}, "--warmup is 1.5, expected a share of the steps"),
        ({"neighbours": -1}, "--neighbours is -1, expected at least 0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1, expected at least 0"),
        ({"clip_grad": -1.0}, "--clip-grad is -1.0, expected at least 0"),
        ({"lr": math.inf}, "--lr is inf, expected at least 0"),
        ({"compile": True, "grad_checkpointing": True}, "--compile decides by itself.* leave out --grad-checkp"),
        ({"batch_size": 1}, "batch_size is 1: with one pair there is nothing to tell it from"),
        ({"batch_size": 100}, r"has 3\d training pictures, fewer than one batch of 100"),
        ({"device": "cuda"}, r"torch sees no CUDA device\(s\); use --device cpu"),
        ({"vision": "resnet19"}, "unknown timm model 'resnet19'"),
        ({"data": "chiffres"}, "unknown data 'chiffres'"),
        ({"lr": 1e30, "clip_grad": 0}, "step 2: loss or gradient are no longer finite.*no checkpoint was saved"),
        ({"val_fraction": 0.0}, "no pictures are held out"),
        ({"val_fraction": 10.0}, "val_fraction is 10.0, expected a share from 0 to 1"),
        ({"val_fraction": 0.999}, "has [01] training pictures: training tells pictures apart, at least 2"),
        ({"crop_scale": 0.0}, "--crop-scale is 0.0, expected a share above 0"),
        ({"crop_scale": 70.0}, "--crop-scale is 70.0, expected a share above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(run, flags, message):
    if "device" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match=message):
        run(**flags)


def test_a_locked_tower_and_its_statistics_survive_a_run_unchanged(run):
    with pytest.warns(UserWarning, match="--lock vision freezes random weights"):
        _, out = run(lock="vision", steps=4, eval_every=1)
    config = train.TrainConfig(**json.loads((out / "train_config.json").read_text())["flags"])
    torch.manual_seed(config.seed)
    start = train.make_model(config, train.load_data(config)[0]).state_dict()
    for name, tensor in weights(out / "last").items():
        if name.startswith("vision_model"):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(weights(out / "last")["visual_projection.weight"], start["visual_projection.weight"])


def test_only_random_weights_are_warned_about_when_they_are_frozen(run):
    """A tower of a published folder comes with its weights, whatever its name looks like."""
    folder = ROOT / "tests" / "fixtures" / "tower" / "vit-classifier"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "vision tower|tensors are no part|.*left out")
        run(vision=folder, image_size=0, steps=1, lock="vision")
    with pytest.warns(UserWarning, match="--lock text freezes random weights"):
        run("other", steps=1, lock="text")


def test_a_vision_name_with_a_tag_asks_for_its_weights_and_a_bare_one_does_not(run, monkeypatch):
    """A tag names weights; without network and cache they cannot be had, and that is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(ROOT / "no cache here"))
    message = "could not build test_resnet.r160_in1k with the weights of test_resnet.r160_in1k"
    with pytest.raises(ValueError, match=message):
        run(vision="test_resnet.r160_in1k")
    with pytest.raises(ValueError, match="could not build test_resnet with the weights of test_resnet"):
        run(pretrained=True)
    _, out = run(vision="test_resnet.r160_in1k", pretrained=False, steps=2)
    assert json.loads((out / "best" / "config.json").read_text())["vision"]["name"] == "test_resnet.r160_in1k"
    preprocessor = json.loads((out / "best" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 32}, "a tower without its weights sees the whole picture"


def test_the_towers_of_scratch_are_the_small_ones(run):
    _, out = run(vision="scratch", image_size=0, steps=2, text_pooling="cls")
    config = json.loads((out / "best" / "config.json").read_text())
    vision, pooling = config["vision"], config["text"]["pooling"]
    assert pooling == "cls" != train.SCRATCH_POOLING, "unless another one is asked for"
    assert vision["name"] == train.SCRATCH_VISION["name"] and vision["image_size"] == train.SCRATCH_VISION["image_size"]
    preprocessor = json.loads((out / "best" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 64}, "a new tower sees the whole picture"


def test_siglip_and_multi_positive_runs_and_class_folders_work(run, tmp_path, captions_file):
    for i in range(40):
        name = "dog" if i % 2 else "red_fox"
        for split in ("train", "test"):
            (tmp_path / "classes" / split / name).mkdir(parents=True, exist_ok=True)
            target = tmp_path / "classes" / split / name / f"{i}.png"
            target.write_bytes((captions_file.parent / f"{i}.png").read_bytes())
    for loss in ("siglip", "multi-positive"):
        metrics, out = run(loss, data=tmp_path / "classes", loss=loss, flip=True, templates="clip7")
        assert metrics["n_classes"] == 2 and 0 <= metrics["zs_top1"] <= 1 and "zs_class_top1" not in metrics
        assert metrics["n_templates"] == 7, "those that training took its captions from"
        assert evaluation.main([str(out), "--precision", "fp32"])["zeroshot"]["zs_top1"] == metrics["zs_top1"]
    assert "logit_bias" in weights(tmp_path / "siglip" / "best")
    start = json.loads((tmp_path / "siglip" / "best" / "config.json").read_text())
    assert start["logit_scale_init"] == pytest.approx(math.log(10)) and start["logit_bias_init"] == -10


def test_bad_flags_end_the_script_with_one_line(captions_file):
    """As a user meets it: exit status 1, one line on standard error, no traceback."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", "nowhere.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=captions_file.parent)
    assert done.returncode == 1 and done.stderr == "train.py: error: no caption file nowhere.csv\n"


# ---- Command line ---------------------------------------------------------------------------------------------------


def test_every_field_is_a_flag_with_a_help_line_that_shows_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, value in vars(train.TrainConfig()).items():
        assert "--" + name.replace("_", "-") in said
        if isinstance(value, float):
            assert f"(default: {value})" in said, name


def test_flags_are_typed_strictly():
    parser = dualenc.flag_parser(train.TrainConfig, "")
    parsed = parser.parse_args(
        ["--flip", "--no-pretrained", "--vision-args", "layers=(1,2)", "act=relu", "--lr", "1e-4"]
    )
    assert parsed.flip is True and parsed.pretrained is False and parsed.lr == 1e-4
    assert parsed.vision_args == {"layers": (1, 2), "act": "relu"}
    for wrong in (
        ["--steps", "1.5"],
        ["--flip", "yes"],
        ["--loss", "clap"],
        ["--vision-args", "layers"],
        ["--batch", "8"],
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_importing_has_no_side_effects():
    """No seeding, no environment edits, no printing, no thread counts."""
    code = (
        "import os, torch; torch.manual_seed(5); before = dict(os.environ), torch.get_num_threads()\n"
        "import dualenc, eval, train\n"
        "assert before == (dict(os.environ), torch.get_num_threads()) and torch.initial_seed() == 5"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_workers_are_as_many_as_asked_for_or_as_fit_the_machine():
    assert dualenc.pick_workers(3, torch.device("cpu")) == 3 and dualenc.pick_workers(0, torch.device("cuda")) == 0
    cores = len(os.sched_getaffinity(0))
    assert dualenc.pick_workers(-1, torch.device("cpu")) == min(1, cores - 1)
    assert dualenc.pick_workers(-1, torch.device("cuda")) == min(8, cores - 1)


def test_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for amx, avx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert dualenc.pick_precision("auto", cpu) == expected
    assert dualenc.pick_precision("fp32", cpu) == "fp32"
    assert dualenc.pick_device("cpu") == cpu


def test_float32_products_are_rounded_only_while_training_in_bf16_on_cuda(run, monkeypatch, make_model, pictures):
    """TF32 keeps three digits: enough beside bf16, too few for whom --precision fp32 was asked, or for ranks."""
    cuda, cpu, now = torch.device("cuda"), torch.device("cpu"), torch.get_float32_matmul_precision
    for device, precision, inside in ((cuda, "bf16", "high"), (cuda, "fp32", "highest"), (cpu, "bf16", "highest")):
        with dualenc.float32_products(device, precision):
            assert now() == inside
    with pytest.raises(ZeroDivisionError), dualenc.float32_products(cuda, "bf16"):
        raise ZeroDivisionError
    assert now() == "highest"
    asked, seen, train_step = [], [], train.train_step
    products = dualenc.float32_products
    monkeypatch.setattr(dualenc, "float32_products", lambda *a: (asked.append(a), products(cuda, a[1]))[1])
    monkeypatch.setattr(train, "train_step", lambda *a: (seen.append(now()), train_step(*a))[1])
    encode_text = dualenc.DualEncoder.encode_text
    monkeypatch.setattr(
        dualenc.DualEncoder,
        "encode_text",
        lambda self, **k: (seen.append((self.training, now())), encode_text(self, **k))[1],
    )
    run(steps=1, precision="bf16")
    assert asked == [(cpu, "bf16"), (cpu, "fp32")], "the run, and the evaluation in it"
    assert set(seen) == {"high", (True, "high"), (False, "highest")} and now() == "highest"


def test_time_left_is_rounded_before_it_is_cut_into_minutes():
    line = {"loss": 1.0, "chance_loss": 4.0, "floor_loss": 0.0, "in_batch_acc": 0.5, "logit_scale": 0.0, "lr": 1e-3}
    line |= {"step": 1, "pairs_per_s": 10.0, "data_share": 0.0, "bad_steps": 0}
    for batch_size, left in ((597, "1:00"), (1204, "2:00"), (49, "0:05")):
        assert train.describe_step(line, 2, batch_size).endswith(f"data 0%   {left} left")
    assert train.describe_step({**line, "bad_steps": 3}, 2, 49).endswith("left   3 steps skipped")


def test_the_first_step_has_a_line_of_its_own_without_a_rate(run, capsys):
    """Its loss is near chance if all is well; its time says nothing. The next line covers the steps after it."""
    metrics, out = run(steps=6, log_every=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]
    assert "pairs/s" not in lines[0] and all("pairs/s   data " in line and " left" in line for line in lines[1:])
    logged = [line["loss"] for line in log_of(out) if "loss" in line]
    _, every = run("every", steps=6, log_every=1)
    losses = [line["loss"] for line in log_of(every) if "loss" in line]
    assert logged == pytest.approx([losses[0], sum(losses[1:4]) / 3, sum(losses[4:]) / 2], abs=1e-6)


def test_a_first_step_that_is_skipped_warms_up_all_the_same(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    meter = train.Meter(batch_size=8)
    meter.waited = 3.0  # for the first batch
    for values, first in ((None, True), ({"loss": 2.0}, False), (None, False)):
        now[0] += 100 if first else 1
        meter.add(values, first)
    waited = []
    monkeypatch.setattr(dualenc, "gather_embeds", lambda own: waited.append(own) or torch.tensor([0.5, 1.0, *own]))
    assert meter.read() == {"loss": 2.0, "pairs_per_s": 8.0, "data_share": 0.5}, "of the process that waited longest"
    assert waited == [torch.tensor([0.0])]


def test_the_time_of_an_evaluation_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "evaluate_and_save", lambda run: now.__setitem__(0, now[0] + 100))
    meter = train.Meter(batch_size=8)
    meter.add({"loss": 2.0}, first=True)
    now[0] += 2
    meter.add({"loss": 2.0}, first=False)
    run = types.SimpleNamespace(state={"step": 2, "evaluated": 0}, config=train.TrainConfig(eval_every=2), steps=4)
    run.meter = meter
    train.evaluate_if_due(run)
    assert now[0] == 102 and meter.read()["pairs_per_s"] == 4


def test_data_share_is_the_share_of_the_time_spent_waiting(run, monkeypatch):
    """A slow loader shows as waiting, a slow step does not."""
    read, step = train.TrainingPairs.__getitem__, train.train_step

    def share(name):
        _, out = run(name, steps=9, log_every=9, eval_every=9, batch_size=4)
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["data_share"]

    monkeypatch.setattr(train.TrainingPairs, "__getitem__", lambda *a: (time.sleep(0.1), read(*a))[1])
    monkeypatch.setattr(train, "train_step", lambda *a: (time.sleep(0.02), step(*a))[1])
    assert 0.6 < share("slow loader") < 1
    monkeypatch.setattr(train.TrainingPairs, "__getitem__", read)
    monkeypatch.setattr(train, "train_step", lambda *a: (time.sleep(0.3), step(*a))[1])
    assert share("slow step") < 0.2


def test_fails_like_names_the_mistake():
    """The helper that other tests lean on: it fails on a difference and says what it looks like."""
    with pytest.raises(pytest.fail.Exception, match="off by up to 1; it looks like: twice as much"):
        fails_like(2.0, 1.0, {"twice as much": 2.0, "half": 0.5}, "x")
    with pytest.raises(AssertionError, match="shape"):
        fails_like(torch.zeros(2), torch.zeros(3), {}, "x")


PAGES_OF_A_LATER_BLOCK = """
import resource, sys, torch, train
if sys.argv[1] == "keep":
    train.keep_freed_memory()
for _ in range(8):  # until the heap has found its place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)  # 128 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_used_again_without_asking_the_system():
    faults = {}
    for way in ("leave", "keep"):
        ran = subprocess.run(
            [sys.executable, "-c", PAGES_OF_A_LATER_BLOCK, way], cwd=ROOT, capture_output=True, text=True
        )
        faults[way] = int(ran.stdout)
    assert faults["keep"] < 0.1 * faults["leave"], faults


def test_training_on_a_cpu_keeps_freed_memory(monkeypatch):
    def called():
        raise InterruptedError("before anything large is made")

    monkeypatch.setattr(train, "keep_freed_memory", called)
    with pytest.raises(InterruptedError):
        train.main(["--device", "cpu"])
