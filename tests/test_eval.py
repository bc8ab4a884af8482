"""Claims about evaluation: every number equals a slow recount, and chance stands beside it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import fails_like

import dualenc
import eval as evaluation


def unit_rows(n, width, seed):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_ranks(queries, gallery, query_groups, gallery_groups):
    """1 + the number of wrong answers that score at least as high as the best right one, one query at a time."""
    found = []
    for query, group in zip(queries, query_groups):
        scores = [float(query @ answer) for answer in gallery]
        best = max(score for score, g in zip(scores, gallery_groups) if g == group)
        found.append(1 + sum(score >= best for score, g in zip(scores, gallery_groups) if g != group))
    return found


@pytest.mark.parametrize("tile", [1, 7, 1024])
def test_retrieval_equals_a_slow_recount_with_several_captions_a_picture(tile):
    """30 pictures with 1 to 4 captions each; the tile size changes nothing."""
    image_groups = torch.arange(30)
    text_groups = torch.cat([torch.full((1 + i % 4,), i) for i in range(30)])
    texts, images = unit_rows(len(text_groups), 6, 0), unit_rows(30, 6, 1)
    right = slow_ranks(images, texts, image_groups, text_groups)
    metrics = evaluation.retrieval(images, texts, image_groups, text_groups)
    back = slow_ranks(texts, images, text_groups, image_groups)
    found = evaluation.ranks(images, texts, image_groups, text_groups, tile)
    assert [ranks.tolist() for ranks in found] == [right, back]
    for way, found in (("i2t", right), ("t2i", back)):
        for k in (1, 5, 10):
            assert metrics[f"{way}_r{k}"] == pytest.approx(sum(rank <= k for rank in found) / len(found))
        assert metrics[f"{way}_medr"] == np.median(found)
        assert metrics[f"{way}_mrr"] == pytest.approx(sum(1 / rank for rank in found) / len(found))
    assert metrics["n_images"] == 30 and metrics["n_captions"] == len(text_groups)


def test_a_picture_may_have_several_captions_and_a_caption_several_pictures():
    groups = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1, 1])
    images, texts = unit_rows(3, 4, 2), unit_rows(4, 4, 3)
    metrics = evaluation.retrieval(images, texts, *groups)
    right = [rank <= 1 for rank in slow_ranks(texts, images, groups[1], groups[0])]
    assert metrics["t2i_r1"] == sum(right) / 4
    assert metrics["chance_r1"] == pytest.approx((2 * 2 + 1 * 2) / (3 * 4)), "right cells over all cells"


def test_ties_count_against_the_model():
    """A model that gives every picture one embedding finds nothing, rather than everything."""
    same, groups = torch.ones(8, 4) / 2, torch.arange(8)
    metrics = evaluation.retrieval(same, same, groups, groups)
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == metrics["i2t_r5"] == 0 and metrics["i2t_medr"] == 8
    labels = torch.arange(4).repeat(2)
    zeroshot = evaluation.zeroshot(same, torch.ones(4, 4) / 2, labels, list("abcd"))
    assert zeroshot["zs_top1"] == 0


def test_chance_is_what_random_embeddings_reach():
    """Over 400 pictures with two captions each, R@1 of guessing is 1/400 both ways."""
    groups = torch.arange(400), torch.arange(400).repeat_interleave(2)
    hits = []
    for seed in range(20):
        metrics = evaluation.retrieval(unit_rows(400, 16, 10 + seed), unit_rows(800, 16, 50 + seed), *groups)
        hits += [metrics["i2t_r1"], metrics["t2i_r1"]]
        assert metrics["chance_r1"] == pytest.approx(1 / 400)
    assert np.mean(hits) == pytest.approx(1 / 400, abs=1.2e-3)  # 4 standard errors of 24,000 guesses


def test_a_query_without_a_right_answer_is_refused():
    with pytest.raises(ValueError, match="no right answer in the gallery"):
        evaluation.retrieval(unit_rows(2, 4, 0), unit_rows(1, 4, 1), torch.tensor([0, 1]), torch.tensor([0]))


def test_zeroshot_equals_a_slow_recount():
    images, classes, labels = unit_rows(50, 8, 4), unit_rows(7, 8, 5), torch.arange(50) % 6
    names = list("abcdefg")
    metrics = evaluation.zeroshot(images, classes, labels, names)
    order = [sorted(range(7), key=lambda k: -float(image @ classes[k])) for image in images]
    top1 = [row[0] == label for row, label in zip(order, labels)]
    assert metrics["zs_top1"] == pytest.approx(sum(top1) / 50)
    assert metrics["zs_top5"] == pytest.approx(sum(label in row[:5] for row, label in zip(order, labels.tolist())) / 50)
    by_class = {names[k]: np.mean([hit for hit, label in zip(top1, labels) if label == k]) for k in range(6)}
    assert metrics["zs_class_top1"] == pytest.approx(by_class), "class g never occurs and is left out"
    assert metrics["zs_per_class"] == pytest.approx(np.mean(list(by_class.values())))
    assert metrics["chance_top1"] == pytest.approx(1 / 7) and (metrics["n_images"], metrics["n_classes"]) == (50, 7)


def test_class_directions_average_the_templates_in_embedding_space(make_model):
    model = make_model()
    templates, classes = ("a photo of a {}.", "the {}"), ("dog", "red star", "fox")
    with torch.no_grad():
        embeds = torch.stack(
            [
                torch.cat([model.encode_text(**model.processor(text=t.replace("{}", c))) for t in templates])
                for c in classes
            ]
        )
    mean = embeds.mean(dim=1)
    mistakes = {"not normalised again": mean, "first template only": embeds[:, 0]}
    right = mean / mean.norm(dim=1, keepdim=True)
    fails_like(evaluation.class_embeds(model, classes, templates), right, mistakes, "class_embeds")


def test_embedding_in_batches_equals_one_at_a_time(make_model, pictures):
    model = make_model()
    captions = ["two dogs", "a small red circle left of a large blue star", "fox"]
    with torch.no_grad():
        texts = torch.cat([model.encode_text(**model.processor(text=caption)) for caption in captions])
        images = torch.cat([model.encode_image(model.processor(images=p)["pixel_values"]) for p in pictures])
    for batch_size in (1, 2, 100):
        assert torch.allclose(evaluation.embed_captions(model, captions, batch_size=batch_size), texts, atol=1e-5)
        got = evaluation.embed_pictures(model, pictures, batch_size=batch_size, workers=batch_size == 2)
        assert torch.allclose(got, images, atol=1e-5)


def test_captions_of_equal_length_share_a_batch(make_model, monkeypatch):
    """Sorted by tokens, not by characters: no batch is padded beyond what the sorted lengths ask for."""
    model, seen = make_model(), []
    encode_text = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda **inputs: (seen.append(inputs), encode_text(**inputs))[1])
    captions = ["two dogs " * n for n in (3, 1, 4, 1, 5)] + ["a small red circle left of a large blue star", "zzzzzzz"]
    lengths = sorted(model.processor(text=c)["input_ids"].shape[1] for c in dict.fromkeys(captions))
    evaluation.embed_captions(model, captions, batch_size=2)
    assert [inputs["input_ids"].shape[1] for inputs in seen] == lengths[1::2]


def test_evaluation_leaves_the_model_as_it_was(make_model, pictures):
    model = make_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = dualenc.Pairs(list("abcd"), pictures, [[c] for c in ("two dogs", "fox", "star", "circle")])
    evaluation.evaluate(model, pairs)
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


# ---- The script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def class_folder(tmp_path, pictures):
    for name in ("dog", "fox"):
        for i, picture in enumerate(pictures):
            (tmp_path / "photos" / "test" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / "train" / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "photos" / "test" / name / f"{i}.png")
    return tmp_path / "photos"


def test_the_script_prints_a_table_and_writes_the_numbers(checkpoint, class_folder, tmp_path, capsys):
    results = evaluation.main([str(checkpoint), "--data", str(class_folder), "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == results and set(results) == {"retrieval", "zeroshot"}
    assert "8 pictures, 14 captions   chance R@1 50.00%" in printed
    assert "8 pictures, 2 classes   chance 50.0%" in printed
    assert f"{results['zeroshot']['zs_top1']:.1%} (" in printed and "dog" in printed


def test_one_task_other_classes_and_templates_can_be_asked_for(checkpoint, class_folder, tmp_path):
    (tmp_path / "classes.txt").write_text("fox\n\ndog\nstar\n")
    (tmp_path / "templates.txt").write_text("the {}\n")
    arguments = [str(checkpoint), "--data", str(class_folder), "--task", "zeroshot"]
    results = evaluation.main(
        [*arguments, "--classes", str(tmp_path / "classes.txt"), "--templates", str(tmp_path / "templates.txt")]
    )
    assert set(results) == {"zeroshot"} and results["zeroshot"]["n_classes"] == 3
    assert list(results["zeroshot"]["zs_class_top1"]) == ["fox", "dog"]
    (tmp_path / "classes.txt").write_text("fox\nstar\n")
    with pytest.raises(ValueError, match="--classes lacks 1 of the data's classes: dog"):
        evaluation.main([*arguments, "--classes", str(tmp_path / "classes.txt")])


def test_what_cannot_be_evaluated_is_refused(checkpoint, class_folder, tmp_path):
    with pytest.raises(ValueError, match="not a run of train.py.*give --data"):
        evaluation.main([str(checkpoint)])
    with pytest.raises(ValueError, match="zero-shot needs pictures with classes"):
        evaluation.main([str(checkpoint), "--data", "shapes", "--task", "zeroshot"])
    with pytest.raises(ValueError, match="--classes needs pictures with classes"):
        evaluation.main([str(checkpoint), "--data", "shapes", "--classes", "fox,dog"])
    with pytest.raises(ValueError, match="no file .*none.txt"):
        evaluation.main([str(checkpoint), "--data", str(class_folder), "--templates", str(tmp_path / "none.txt")])
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="none.txt is empty"):
        evaluation.main([str(checkpoint), "--data", str(class_folder), "--templates", str(tmp_path / "none.txt")])
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no processor"):
        evaluation.main([str(checkpoint), "--data", "shapes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task search --query x --top 0", "--top is 0, expected at least 1"),
        ("--batch-size 0", "--batch-size is 0, expected at least 1"),
        ("--out found.png", "--out found.png is for search, and --task is auto: add --task search"),
        ("--query fox --task zeroshot", "--query fox is for search, and --task is zeroshot"),
        ("--index folder", "--index folder is for search"),
        ("--top 3", "--top 3 is for search"),
        ("--classes fox,dog --task search --query x", "--classes is for pictures with classes, which search"),
        ("--classes fox,dog --task winoground", "--classes is for pictures with classes, which winoground"),
    ],
)
def test_flags_without_sense_or_without_effect_are_refused(checkpoint, flags, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main([str(checkpoint), "--data", "shapes", *flags.split()])


def test_a_part_without_pictures_is_named(checkpoint, class_folder, pictures, tmp_path):
    """One picture, whose hash is not in the tenth that is held out; and pictures none of which can be read."""
    pictures[0].save(tmp_path / "1.png")
    (tmp_path / "one.csv").write_text("image,caption\n1.png,two dogs\n")
    with pytest.raises(ValueError, match="the test part of data .*one.csv has no pictures .*--split"):
        evaluation.main([str(checkpoint), "--data", str(tmp_path / "one.csv")])
    for file in class_folder.rglob("*.png"):
        file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="the test part of data .*photos has no pictures that can be read"):
        evaluation.main([str(checkpoint), "--data", str(class_folder), "--on-bad-picture", "skip"])


def test_naming_the_runs_own_data_changes_nothing():
    """A run's share of held-out pictures is kept, else training pictures would be measured; other data has its own."""
    flags = {"data": "photos.csv", "val_fraction": 0.5, "seed": 3, "templates": "clip7", "on_bad_picture": "skip"}
    own = {name: value for name, value in flags.items() if name in evaluation.DATA_FLAGS}
    for data in ("", "photos.csv"):
        assert evaluation.data_source(evaluation.EvalConfig(data=data), flags, "run") == own
    assert evaluation.data_source(evaluation.EvalConfig(data="shapes"), flags, "run") == {"data": "shapes"}


def test_naming_the_runs_own_data_keeps_what_it_does_with_bad_pictures(checkpoint, class_folder):
    (class_folder / "test" / "dog" / "0.png").write_bytes(b"torn")
    flags = {"data": str(class_folder), "on_bad_picture": "skip"}
    (checkpoint.parent / evaluation.RUN_CONFIG).write_text(json.dumps({"flags": flags}))
    for data in ([], ["--data", str(class_folder)]):
        assert evaluation.main([str(checkpoint), *data])["retrieval"]["n_images"] == 7


def test_unknown_flags_are_refused_with_near_ones(checkpoint, capsys):
    for wrong, hint in (("--datta", "--data"), ("--tsak", "--task")):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([str(checkpoint), wrong, "x"])
        assert stopped.value.code == 2
        assert f"unknown flag {wrong}; " in (said := capsys.readouterr().err) and hint in said
    with pytest.raises(SystemExit):
        evaluation.main([str(checkpoint), "--dat", "shapes"])  # no abbreviations


def test_metric_names_of_the_contract():
    """DESIGN's names, so that programs written against them keep working."""
    groups = torch.arange(12)
    rows = unit_rows(12, 4, 0)
    retrieval = evaluation.retrieval(rows, rows, groups, groups)
    wanted = {f"{way}_{what}" for way in ("i2t", "t2i") for what in ("r1", "r5", "r10", "medr", "mrr")}
    assert wanted | {"n_images", "n_captions", "chance_r1"} <= set(retrieval)
    zeroshot = evaluation.zeroshot(rows, rows, groups, list("abcdefghijkl"))
    assert {"zs_top1", "zs_top5", "zs_per_class", "n_images", "n_classes", "chance_top1"} <= set(zeroshot)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in retrieval.values())
