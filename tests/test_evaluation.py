"""Claims about the tasks of eval.py: intervals, calibration, probe, binding, winoground, search and the report."""

import base64
import contextlib
import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc
import eval as evaluation


def unit_rows(n, width, seed):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_ranks(scores, query_groups, gallery_groups):
    """1 + the wrong answers that are not below the best right one, counted one by one."""
    found = []
    for row, group in zip(scores.tolist(), query_groups.tolist()):
        best = max(score for score, g in zip(row, gallery_groups.tolist()) if g == group)
        found.append(1 + sum(not score < best for score, g in zip(row, gallery_groups.tolist()) if g != group))
    return found


# ---- Retrieval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [64, 128, 2048])
def test_ranks_with_many_ties_and_shared_captions_equal_a_slow_count(tile):
    """Embeddings of small whole numbers tie often and multiply exactly; groups hold 1 to 5 of either side, shuffled."""
    rng = torch.Generator().manual_seed(0)
    image_groups = torch.cat([torch.arange(80), torch.randint(80, (120,), generator=rng)])
    text_groups = torch.cat([torch.arange(80), torch.randint(80, (220,), generator=rng)]).flip(0)
    images, texts = (torch.randint(-1, 2, (n, 5), generator=rng).float() for n in (200, 300))
    scores = images @ texts.T
    found = evaluation.ranks(images, texts, image_groups, text_groups, tile)
    right = [slow_ranks(scores, image_groups, text_groups), slow_ranks(scores.T, text_groups, image_groups)]
    assert [ranks.tolist() for ranks in found] == right
    assert len(torch.unique(scores)) < 12, "the point of this test is ties"


@pytest.mark.parametrize("n,width,tile", [(6, 384, 2048), (70, 64, 64)])
def test_equal_captions_tie_wherever_they_stand_in_the_gallery(n, width, tile):
    """Captions occur twice, the second time for another picture and in another tile: each query has a tied rival."""
    distinct, groups = unit_rows(n, width, 1), torch.arange(2 * n - 1)
    texts, images = distinct.repeat(2, 1)[:-1], torch.cat([distinct, unit_rows(n, width, 2)])[:-1]
    image_ranks, _ = evaluation.ranks(images, texts, groups, groups, tile)
    assert image_ranks[: n - 1].tolist() == [2] * (n - 1)


def test_embeddings_that_are_not_numbers_come_last_not_first():
    rows, groups = torch.full((6, 4), torch.nan), torch.arange(6)
    assert evaluation.ranks(rows, rows, groups, groups)[0].tolist() == [6] * 6


def test_only_one_tile_of_scores_is_in_memory_at_a_time(monkeypatch):
    sizes, tiles = [], evaluation.score_tiles

    def watched(*arguments, **options):
        for tile in tiles(*arguments, **options):
            sizes.append(tuple(tile[2].shape))
            yield tile

    monkeypatch.setattr(evaluation, "score_tiles", watched)
    groups = torch.arange(300)
    evaluation.ranks(unit_rows(300, 4, 0), unit_rows(300, 4, 1), groups, groups, tile=64)
    assert max(map(max, sizes)) == 64
    assert len(sizes) == 5 + 25, "the best right answers come from the 5 tiles on the diagonal alone"


def test_intervals_equal_a_slow_bootstrap_over_pictures():
    """Pictures are drawn with replacement, each with its captions; recall is counted anew over what was drawn."""
    image_groups, text_groups = torch.arange(40), torch.arange(40).repeat_interleave(3)
    images, texts = unit_rows(40, 8, 3), unit_rows(120, 8, 4)
    image_ranks, text_ranks = evaluation.ranks(images, texts, image_groups, text_groups)
    numbers = evaluation.retrieval(images, texts, image_groups, text_groups)
    drawn = {"i2t_r5": [], "t2i_r10": [], "t2i_mrr": [], "i2t_medr": [], "t2i_medr": []}
    for weights in torch.cat(list(evaluation.resamples(40))):
        pictures = torch.arange(40).repeat_interleave(weights.long())
        captions = torch.cat([(text_groups == picture).nonzero()[:, 0] for picture in pictures])
        drawn["i2t_r5"].append(float((image_ranks[pictures] <= 5).double().mean()))
        drawn["t2i_r10"].append(float((text_ranks[captions] <= 10).double().mean()))
        drawn["t2i_mrr"].append(float((1 / text_ranks[captions].double()).mean()))
        drawn["i2t_medr"].append(float(np.median(image_ranks[pictures])))
        drawn["t2i_medr"].append(float(np.median(text_ranks[captions])))
    for name, values in drawn.items():
        assert len(values) == evaluation.RESAMPLES
        got = numbers[f"{name}_low"], numbers[f"{name}_high"]
        assert got == pytest.approx(tuple(np.quantile(values, [0.025, 0.975]))), name
        assert got[0] <= numbers[name] <= got[1] and got[0] < got[1]


def test_intervals_of_shared_captions_weigh_a_caption_by_the_pictures_it_describes():
    """Of two classes, one has both captions right: the drawn share is that class's share of the drawn pictures."""
    image_groups = torch.tensor([0, 0, 0, 1])
    numbers = evaluation.retrieval_numbers(
        torch.tensor([1, 1, 1, 9]), torch.tensor([1, 1, 9]), image_groups, torch.tensor([0, 0, 1])
    )
    shares = []
    for weights in torch.cat(list(evaluation.resamples(4))):
        first, second = 2 * weights[:3].mean(), weights[3]
        shares.append(float(first / (first + second)))
    assert numbers["t2i_r1"] == pytest.approx(2 / 3)
    assert numbers["t2i_r1_low"] == pytest.approx(np.quantile(shares, 0.025))


def test_intervals_are_as_wide_as_theory_says_and_the_same_each_time():
    hits = torch.zeros(1000)
    hits[:300] = 1
    numbers = evaluation.mean_with_interval("share", hits)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert numbers["share"] == pytest.approx(0.3)
    assert numbers["share_high"] - numbers["share_low"] == pytest.approx(2 * half, rel=0.08)
    assert evaluation.mean_with_interval("share", hits) == numbers


# ---- Zero-shot and calibration --------------------------------------------------------------------------------------


def test_zeroshot_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    images, classes, labels = unit_rows(300, 16, 5), unit_rows(9, 16, 6), torch.arange(300) % 9
    got = evaluation.zeroshot(images, classes, labels, list("abcdefghi"))
    scores = (images @ classes.T).numpy()
    for k, name in ((1, "zs_top1"), (5, "zs_top5")):
        assert got[name] == pytest.approx(metrics.top_k_accuracy_score(labels.numpy(), scores, k=k))
    assert got["zs_per_class"] == pytest.approx(metrics.balanced_accuracy_score(labels.numpy(), scores.argmax(1)))


def test_zeroshot_intervals_equal_a_slow_bootstrap():
    images, classes, labels = unit_rows(60, 8, 7), unit_rows(3, 8, 8), torch.arange(60) % 3
    got = evaluation.zeroshot(images, classes, labels, list("abc"))
    hits = ((images @ classes.T).argmax(dim=1) == labels).double()
    drawn = []
    for weights in torch.cat(list(evaluation.resamples(60))):
        chosen = torch.arange(60).repeat_interleave(weights.long())
        drawn.append(np.mean([float(hits[chosen][labels[chosen] == k].mean()) for k in range(3)]))
    assert got["zs_per_class_low"] == pytest.approx(np.quantile(drawn, 0.025))
    assert got["zs_per_class_high"] == pytest.approx(np.quantile(drawn, 0.975))


def test_zeroshot_in_tiles_equals_zeroshot_at_once(monkeypatch):
    given = unit_rows(50, 8, 7), unit_rows(3, 8, 8), torch.arange(50) % 3
    whole = evaluation.zeroshot(*given, list("abc")), evaluation.confidences(*given, 10.0)
    monkeypatch.setattr(evaluation, "SCORE_TILE", 7)
    assert evaluation.zeroshot(*given, list("abc")) == whole[0]
    for tiled, at_once in zip(evaluation.confidences(*given, 10.0), whole[1]):
        assert torch.allclose(tiled, at_once)


def slow_calibration_error(probabilities, labels, bins=15):
    """Guo et al. 2017, equation 3, bin by bin."""
    error = 0.0
    for k in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels)
            if k / bins < row.max() <= (k + 1) / bins
        ]
        if inside:
            confidence, accuracy = np.mean([c for c, _ in inside]), np.mean([right for _, right in inside])
            error += len(inside) / len(labels) * abs(confidence - accuracy)
    return error


def made_up_answers(n, true_scale):
    """Embeddings whose softmax at true_scale says exactly how likely each class is; labels drawn from it."""
    images, classes = unit_rows(n, 8, 9), unit_rows(5, 8, 10)
    probabilities = (true_scale * images @ classes.T).softmax(dim=1)
    return images, classes, probabilities.multinomial(1, generator=torch.Generator().manual_seed(11))[:, 0]


def test_calibration_error_equals_a_slow_count_on_the_half_that_did_not_fit(monkeypatch):
    monkeypatch.setattr(evaluation, "RESAMPLES", 60)  # the slow count is slow
    images, classes, labels = made_up_answers(400, 4.0)
    got = evaluation.calibration(images, classes, labels, torch.tensor(10.0).log())
    fit, rest = evaluation.halves(400)
    assert sorted([*fit.tolist(), *rest.tolist()]) == list(range(400)) and len(rest) == got["n_calibration"] == 200
    for suffix, divisor in (("", 1.0), ("_scaled", got["zs_temperature"])):
        probabilities = (10 / divisor * images[rest].double() @ classes.T.double()).softmax(dim=1).numpy()
        right = slow_calibration_error(probabilities, labels[rest].numpy())
        assert got[f"zs_ece{suffix}"] == pytest.approx(right, abs=1e-5)
        nll = -np.log(probabilities[np.arange(200), labels[rest].numpy()]).mean()
        assert got[f"zs_nll{suffix}"] == pytest.approx(nll, abs=1e-5)
        drawn = []
        for weights in torch.cat(list(evaluation.resamples(200))):
            chosen = torch.arange(200).repeat_interleave(weights.long())
            drawn.append(slow_calibration_error(probabilities[chosen], labels[rest][chosen].numpy()))
        low, high = (max(0, 2 * right - np.quantile(drawn, q)) for q in (0.975, 0.025))
        assert got[f"zs_ece{suffix}_low"] == pytest.approx(low, abs=1e-4)
        assert got[f"zs_ece{suffix}_high"] == pytest.approx(high, abs=1e-4)


def test_the_interval_of_a_calibration_error_holds_the_true_error():
    """Of 40 samples of 50 pictures whose true error is 0.05; an interval that is not mirrored holds it in none."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        confidence = 0.5 + torch.rand(50, generator=generator, dtype=torch.float64) / 2
        right = torch.rand(50, generator=generator, dtype=torch.float64) < confidence - 0.05
        gaps = torch.zeros(50, 15, dtype=torch.float64)
        gaps[torch.arange(50), evaluation.calibration_bin(confidence)] = confidence - right.double()

        def error(weights, gaps=gaps):
            return (weights @ gaps).abs().sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)

        numbers = evaluation.with_intervals(["error"], error, 50, mirrored=["error"])
        held += numbers["error_low"] <= 0.05 <= numbers["error_high"]
    assert held >= 28, held


def test_the_temperature_undoes_known_overconfidence():
    """Answers drawn at a scale of 5, logits given at 20: they are 4 times too large, and dividing by 4 mends them."""
    images, classes, labels = made_up_answers(20_000, 5.0)
    got = evaluation.calibration(images, classes, labels, torch.tensor(20.0).log())
    assert got["zs_temperature"] == pytest.approx(4, rel=0.05)
    assert got["zs_ece"] > 0.15 and got["zs_ece_scaled"] < 0.02
    assert got["zs_nll_scaled"] < got["zs_nll"]


def test_the_temperature_is_the_best_of_a_fine_grid_on_its_own_half():
    images, classes, labels = made_up_answers(300, 3.0)
    got = evaluation.calibration(images, classes, labels, torch.tensor(9.0).log())
    fit, _ = evaluation.halves(300)
    logits = 9 * images[fit] @ classes.T
    grid = np.exp(np.linspace(-2, 3, 2001))
    losses = [torch.nn.functional.cross_entropy(logits / t, labels[fit]).item() for t in grid]
    assert got["zs_temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


@pytest.mark.parametrize("valley", [-4.9, 0.0, 1.234, 4.9])
def test_golden_section_finds_the_valley(valley):
    assert evaluation.golden_section(lambda x: (x - valley) ** 2, -5.0, 5.0) == pytest.approx(valley, abs=1e-6)


def test_the_built_in_templates_are_those_published():
    """80 prompts, all different, and the 7 chosen among them, each with one place for the class."""
    sets = evaluation.TEMPLATE_SETS
    assert {name: len(set(templates)) for name, templates in sets.items()} == {"plain": 1, "clip7": 7, "clip80": 80}
    assert set(sets["clip7"]) < set(sets["clip80"]) and set(sets["plain"]) < set(sets["clip80"])
    for template in itertools.chain(*sets.values()):
        assert template.count("{}") == 1 and template.endswith(".") and template == " ".join(template.split())
    assert evaluation.read_templates("clip7") == sets["clip7"]
    assert evaluation.read_templates("") == dualenc.TEMPLATES
    with pytest.raises(ValueError, match="no file clip8 .* nor a set of that name: plain, clip7, clip80"):
        evaluation.read_templates("clip8")


def test_equal_captions_get_one_embedding_whatever_batch_they_are_in(make_model):
    """Padded to another length, the second "two dogs" would come out a little different, and ties be left to luck."""
    captions = ["two dogs", "the quick brown fox jumps over the lazy dog", "two dogs", "fox", "two dogs"]
    embeds = evaluation.embed_captions(make_model(), captions, batch_size=2)
    assert torch.equal(embeds[0], embeds[2]) and torch.equal(embeds[0], embeds[4])
    assert not torch.allclose(embeds[0], embeds[3])


# ---- Probe and k-NN -------------------------------------------------------------------------------------------------


def blobs(n, n_classes=4, width=6, seed=12, spread=1.5):
    """Points around a centre a class."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % n_classes
    return centres[labels] + spread * torch.randn(n, width, generator=rng), labels


@pytest.mark.parametrize("penalty", [0.1, 1e-3])
def test_logistic_regression_stands_where_the_gradient_is_zero(penalty):
    """The objective is convex, so a zero gradient (by hand: residuals times features) proves the fit."""
    features, labels = blobs(200)
    weights = evaluation.fit_logistic(features.double(), labels, 4, penalty)
    probabilities = (features.double() @ weights[:-1] + weights[-1]).softmax(dim=1)
    residuals = (probabilities - torch.nn.functional.one_hot(labels, 4)) / len(labels)
    assert (features.double().T @ residuals + penalty * weights[:-1]).abs().max() < 1e-4
    assert residuals.sum(dim=0).abs().max() < 1e-4, "the bias is not penalised"


def test_logistic_regression_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(300)
    weights = evaluation.fit_logistic(features.double(), labels, 4, 0.01)
    model = linear_model.LogisticRegression(C=1 / (0.01 * 300), tol=1e-8, max_iter=1000)
    right = model.fit(features.double().numpy(), labels.numpy()).predict_proba(features.double().numpy())
    got = (features.double() @ weights[:-1] + weights[-1]).softmax(dim=1)
    assert np.allclose(got, right, atol=1e-3)


def test_the_penalty_is_the_best_one_on_the_validation_part():
    fit, validation = blobs(24, width=40, spread=2), blobs(200, width=40, seed=13, spread=2)
    weights, penalty = evaluation.best_fit(*fit, 4, validation)

    def accuracy(weights):
        return (evaluation.classify(validation[0], weights) == validation[1]).double().mean().item()

    others = [accuracy(evaluation.fit_logistic(*fit, 4, p)) for p in evaluation.PENALTIES]
    assert accuracy(weights) == pytest.approx(max(others), abs=0.01)
    assert accuracy(evaluation.fit_logistic(*fit, 4, penalty)) == pytest.approx(max(others), abs=0.01)
    assert max(others) > min(others) + 0.02, "the point of this test is that penalties differ"


def test_nearest_neighbours_equal_a_slow_vote():
    (train, labels), (test, _) = blobs(90), blobs(33, seed=14)
    got = evaluation.nearest_neighbours(train, labels, test, 4, tile=7)
    for row, guess in zip(test, got):
        cosines = torch.nn.functional.cosine_similarity(train, row[None])
        votes = [0.0] * 4
        for i in sorted(range(90), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        assert int(np.argmax(votes)) == guess


def test_shots_are_drawn_evenly_and_differently_each_time():
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 3)
    first, again, other = (evaluation.draw_shots(labels, 4, seed) for seed in (0, 0, 1))
    assert labels[first].bincount().tolist() == [4, 4, 3] and len(set(first.tolist())) == 11
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_fit_and_validation_parts_never_share_a_picture():
    features, labels = torch.arange(50.0)[:, None], torch.arange(50)
    (fit, _), (validation, validation_labels) = evaluation.split_training(features, labels)
    assert sorted([*fit[:, 0].tolist(), *validation[:, 0].tolist()]) == list(range(50)) and len(validation) == 10
    assert torch.equal(validation[:, 0].long(), validation_labels), "features and labels stay together"


@pytest.fixture
def colour_folder(tmp_path):
    """Nearly plain pictures in three classes, with a train and a test part: a linear probe finds this easy."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, colour in (("dog", (200, 40, 40)), ("fox", (40, 200, 40)), ("star", (40, 40, 200))):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.integers(-40, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_probe_and_neighbours_learn_from_frozen_features(checkpoint, colour_folder, capsys):
    """Even an untrained tower tells three colours apart, and the contrastive answer is at chance."""
    results = evaluation.main([str(checkpoint), "--data", str(colour_folder), "--task", "all"])
    assert list(results) == ["retrieval", "zeroshot", "probe", "knn"]
    for name in ("probe", "knn"):
        numbers = results[name]
        assert numbers[f"{name}_top1"] == 1.0 and numbers[f"{name}_1shot_top1"] > 0.6
        assert numbers["chance_top1"] == pytest.approx(1 / 3)
        assert (numbers["n_images"], numbers["n_train"], numbers["n_classes"]) == (18, 60, 3)
    printed = capsys.readouterr().out
    assert "60 training and 18 test pictures   chance 33.3%" in printed and "16 a class" in printed


def test_probe_features_are_what_the_vision_tower_pools(make_model, pictures):
    model = make_model()
    got = evaluation.picture_features(model, pictures)
    with torch.no_grad():
        right = model.vision_model(model.processor(images=pictures)["pixel_values"]).pooler_output
    assert torch.allclose(got, right, atol=1e-5) and got.shape == (4, 32)


def test_the_probe_takes_the_strongest_of_equally_good_penalties_and_learns_from_all_pictures(
    checkpoint, colour_folder, monkeypatch
):
    fitted, fit = [], evaluation.fit_logistic

    def noted(features, labels, n_classes, penalty, *more):
        fitted.append((len(features), penalty))
        return fit(features, labels, n_classes, penalty, *more)

    monkeypatch.setattr(evaluation, "fit_logistic", noted)
    numbers = evaluation.main([str(checkpoint), "--data", str(colour_folder), "--task", "probe"])["probe"]
    assert numbers["probe_top1"] == 1 and numbers["probe_penalty"] == evaluation.PENALTIES[0]
    tried = [(48, penalty) for penalty in evaluation.PENALTIES]  # on four fifths of 60
    assert fitted[: len(tried) + 1] == [*tried, (60, evaluation.PENALTIES[0])]


def test_the_probe_stands_a_feature_that_never_varies_and_draws_anew_for_each_few_shot_fit(monkeypatch):
    """Of three training pictures one chooses the penalty."""
    features, labels = torch.tensor([[0.0, 3], [1, 3], [2, 3], [5, 3]]), torch.tensor([0, 0, 1, 1])
    (fit, _), (_, validation) = evaluation.split_training(features[:3], labels[:3])
    assert (len(fit), len(validation)) == (2, 1)
    drawn, draw_shots = [], evaluation.draw_shots
    monkeypatch.setattr(
        evaluation, "draw_shots", lambda labels, shots, seed: drawn.append(seed) or draw_shots(labels, shots, seed)
    )
    data = SimpleNamespace(classes=["low", "high"])
    subject = SimpleNamespace(features=(features.repeat(8, 1), labels.repeat(8), features), labels=labels, data=data)
    assert evaluation.probe_task(subject)["probe_top1"] == 1
    assert drawn == [*range(evaluation.DRAWS)] * len(evaluation.SHOTS)


def test_a_single_picture_is_classified_but_not_calibrated(checkpoint, tmp_path, pictures):
    (tmp_path / "photos" / "train" / "dog").mkdir(parents=True)
    pictures[0].save(tmp_path / "photos" / "train" / "dog" / "0.png")
    arguments = ["--data", str(tmp_path / "photos"), "--split", "train", "--classes", "dog,fox", "--task", "zeroshot"]
    numbers = evaluation.main([str(checkpoint), *arguments])["zeroshot"]
    assert numbers["n_images"] == 1 and numbers["zs_top1"] in (0, 1) and "zs_ece" not in numbers


def test_other_names_of_classes_may_come_in_any_order(colour_folder):
    pairs = dualenc.load_pairs(str(colour_folder), "test")
    again = evaluation.with_classes(pairs, ["star", "cat", "fox", "dog"], dualenc.TEMPLATES)
    assert [again.classes[k] for k in again.labels] == [pairs.classes[k] for k in pairs.labels]
    assert again.captions == pairs.captions and again.classes == ["star", "cat", "fox", "dog"]


def test_shapes_stay_shapes_where_bad_pictures_are_skipped_and_none_is_bad(checkpoint):
    """Binding needs their scenes, which a selection of pictures has no more."""
    arguments = ["--data", "shapes", "--task", "binding", "--on-bad-picture", "skip"]
    assert evaluation.main([str(checkpoint), *arguments])["binding"]["n_images"] == 512


def test_probe_refuses_what_it_cannot_learn_from(make_model, colour_folder):
    model = make_model()
    pairs = dualenc.load_pairs(str(colour_folder), "test")
    with pytest.raises(ValueError, match="none were given"):
        evaluation.evaluate(model, pairs, ["probe"])
    train = dualenc.Pairs(pairs.names, pairs.pictures, pairs.captions, pairs.labels, ["dog", "fox", "cat"])
    with pytest.raises(ValueError, match="need the same class list in both"):
        evaluation.measure(evaluation.Subject(model, pairs, lambda: train), ["knn"])


def test_probe_and_neighbours_are_not_measured_on_what_they_learned_by_heart(checkpoint, colour_folder, capsys):
    """Named, they refuse the training part; all leaves them out, says why, and keeps the rest."""
    arguments = [str(checkpoint), "--data", str(colour_folder), "--split", "train"]
    for task in ("probe", "knn"):
        with pytest.raises(ValueError, match="other than those measured.*--split train"):
            evaluation.main([*arguments, "--task", task])
    assert list(evaluation.main([*arguments, "--task", "all"])) == ["retrieval", "zeroshot"]
    assert "left out    probe: probe and k-NN learn from training pictures other" in capsys.readouterr().out


def test_all_keeps_what_was_measured_when_a_task_refuses(checkpoint, colour_folder, capsys):
    """A class more in training; but where nothing can be measured, all stops as any task."""
    (colour_folder / "train" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(colour_folder / "train" / "cat" / "0.png")
    arguments = [str(checkpoint), "--data", str(colour_folder), "--task"]
    assert list(evaluation.main([*arguments, "all"])) == ["retrieval", "zeroshot"]
    assert capsys.readouterr().out.count("left out    ") == 2
    with pytest.raises(ValueError, match="need the same class list in both"):
        evaluation.main([*arguments, "probe"])
    (colour_folder / "test" / "dog" / "0.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read picture"):
        evaluation.main([*arguments, "all"])


# ---- Binding and winoground -----------------------------------------------------------------------------------------


def scene_of(caption):
    """A caption taken apart by eye: ({object: what it is left of or above}), relations turned to left of and above."""
    first, relation, second = re.fullmatch(r"a (.+?) (left of|right of|above|below) a (.+)", caption).groups()
    if relation in ("right of", "below"):
        first, second = second, first
    return {"right of": "left of", "below": "above"}.get(relation, relation), first, second


def test_hard_negatives_are_wrong_and_differ_as_their_kind_says():
    pairs = dualenc.ShapesPairs("test")
    for i in range(len(pairs)):
        caption = pairs.captions[i][0]
        wrong = pairs.hard_negatives(i)
        same_words = {kind: sorted(text.split()) == sorted(caption.split()) for kind, text in wrong.items()}
        changed = {kind: sum(a != b for a, b in zip(text.split(), caption.split())) for kind, text in wrong.items()}
        assert all(scene_of(text) != scene_of(caption) for text in wrong.values()), (caption, wrong)
        assert same_words["order"] and same_words.get("attributes", True) and not same_words["relation"]
        assert changed["relation"] == changed["replaced"] == 1 and changed.get("attributes", 2) == 2
        colours = set(caption.split()) & set(dualenc.COLOURS)
        assert ("attributes" in wrong) == (len(colours) == 2)
        assert len((set(wrong["replaced"].split()) & set(dualenc.COLOURS)) - colours) == 1


def bag_of_words(captions):
    words = sorted({word for caption in captions for word in caption.split()})
    rows = torch.tensor([[caption.split().count(word) for word in words] for caption in captions])
    return torch.nn.functional.normalize(rows.float(), dim=1)


def test_a_bag_of_words_passes_the_control_and_fails_what_needs_binding():
    """Ties count as wrong, also those that rounding hides: it scores 0 where the words are the same, and 100% where one
    word gives it away."""
    pairs = dualenc.ShapesPairs("test", count=64)
    everything = {c for i in range(64) for c in [*pairs.captions[i], *pairs.hard_negatives(i).values()]}
    exact = bag_of_words(sorted(everything))
    rounded = exact + 2e-7 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    rows = dict(zip(sorted(everything), rounded))

    def embed_captions(captions):
        return torch.stack([rows[caption] for caption in captions])

    images = embed_captions([captions[0] for captions in pairs.captions])
    subject = SimpleNamespace(data=pairs, image_embeds=images, embed_captions=embed_captions)
    numbers = evaluation.binding_task(subject)
    got = {kind: numbers[f"binding_{kind}"] for kind in (*evaluation.BINDING_KINDS, "all")}
    assert got == {"replaced": 1.0, "relation": 1.0, "attributes": 0.0, "order": 0.0, "all": 0.0}
    assert numbers["n_images"] == numbers["n_order"] == 64 and numbers["n_attributes"] < 64
    assert numbers["chance_binding"] == 0.5


def test_binding_is_refused_off_shapes_and_part_of_all_on_them(checkpoint, colour_folder):
    with pytest.raises(ValueError, match="use --data shapes"):
        evaluation.main([str(checkpoint), "--data", str(colour_folder), "--task", "binding"])
    assert evaluation.default_tasks(dualenc.ShapesPairs("test", count=8), everything=True) == ["retrieval", "binding"]


def test_winoground_scores_equal_the_published_definition():
    rng = torch.Generator().manual_seed(15)
    images, texts = (torch.randint(-2, 3, (40, 3), generator=rng).float() for _ in range(2))
    data = evaluation.Quadruples([None] * 40, [str(i) for i in range(40)])
    subject = SimpleNamespace(
        data=data, image_embeds=images, embed_captions=lambda captions: texts[[int(c) for c in captions]]
    )
    text, image, group = [], [], []
    for i0, i1, c0, c1 in ((images[2 * r], images[2 * r + 1], texts[2 * r], texts[2 * r + 1]) for r in range(20)):
        text.append(bool(c0 @ i0 > c1 @ i0 and c1 @ i1 > c0 @ i1))
        image.append(bool(c0 @ i0 > c0 @ i1 and c1 @ i1 > c1 @ i0))
        group.append(text[-1] and image[-1])
    numbers = evaluation.winoground_task(subject)
    assert [numbers[f"wino_{name}"] for name in ("text", "image", "group")] == pytest.approx(
        [np.mean(text), np.mean(image), np.mean(group)]
    )
    assert numbers["n_quadruples"] == 20 and text != image


def test_winoground_chance_levels_are_what_guessing_reaches():
    """Of the 24 orders of four random scores, 6 pass the text score, 6 the image score and 4 both."""
    orders = list(itertools.permutations(range(4)))  # s00, s01, s10, s11: picture, caption
    text = [a > b and d > c for a, b, c, d in orders]
    image = [a > c and d > b for a, b, c, d in orders]
    group = [t and i for t, i in zip(text, image)]
    right = {"text": np.mean(text), "image": np.mean(image), "group": np.mean(group)}
    data = evaluation.Quadruples([None] * 2, ["a", "b"])
    subject = SimpleNamespace(data=data, image_embeds=torch.eye(2), embed_captions=lambda captions: torch.eye(2))
    numbers = evaluation.winoground_task(subject)
    assert {name: numbers[f"chance_{name}"] for name in right} == pytest.approx(right)
    assert numbers["wino_group"] == 1.0


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_winoground_reads_the_users_own_rows(checkpoint, pictures, tmp_path, suffix, capsys):
    for i in range(2):
        pictures[i].save(tmp_path / f"{i}.png")
    row = {"image_0": "0.png", "caption_0": "two dogs", "image_1": "1.png", "caption_1": "fox, dog"}
    separator = "\t" if suffix == ".tsv" else ","
    table = separator.join(row) + "\n" + separator.join(f'"{cell}"' for cell in row.values()) + "\n"
    path = tmp_path / f"rows{suffix}"
    path.write_text(json.dumps(row) + "\n" if suffix == ".jsonl" else table)
    data = evaluation.load_quadruples(path)
    assert data.captions == ["two dogs", "fox, dog"] and np.array_equal(data.pictures[1], pictures[1])
    results = evaluation.main([str(checkpoint), "--data", str(path), "--task", "winoground"])
    assert results["winoground"]["n_quadruples"] == 1 and "16.7%" in capsys.readouterr().out


def test_paths_that_climb_out_are_read_where_the_user_allows_it(checkpoint, pictures, tmp_path):
    (tmp_path / "below").mkdir()
    pictures[0].save(tmp_path / "0.png")
    (tmp_path / "below" / "rows.csv").write_text("image_0,caption_0,image_1,caption_1\n../0.png,a,../0.png,b\n")
    (tmp_path / "below" / "captions.csv").write_text("image,caption\n../0.png,two dogs\n")
    for file, *task in (("rows.csv", "winoground"), ("captions.csv", "retrieval", "--split", "train")):
        arguments = [str(checkpoint), "--data", str(tmp_path / "below" / file), "--task", *task]
        with pytest.raises(ValueError, match="lies outside .*--allow-outside"):
            evaluation.main(arguments)
        assert task[0] in evaluation.main([*arguments, "--allow-outside"])


def test_winoground_files_that_lack_something_are_refused(pictures, tmp_path):
    pictures[0].save(tmp_path / "0.png")
    path = tmp_path / "rows.csv"
    for content, message in (
        ("image_0,caption_0,image_1\n0.png,a,0.png\n", "rows.csv, line 2: no caption_1; it has image_0, caption_0"),
        ("image_0,caption_0,image_1,caption_1\n0.png,a,0.png,\n", "line 2: no caption_1"),
        ("image_0,caption_0,image_1,caption_1\n0.png,a,7.png,b\n", "line 2: missing picture .*7.png"),
        ("image_0,caption_0,image_1,caption_1\n\n../0.png,a,0.png,b\n", "line 3: picture ../0.png lies outside"),
        ("image_0,caption_0,image_1,caption_1\n", "rows.csv has no rows"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            evaluation.load_quadruples(path)
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"image_0": "0.png", "caption_0": 7, "image_1": "0.png", "caption_1": "b"}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: caption_0 is 7, expected text"):
        evaluation.load_quadruples(path)
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "rows.csv"
    path.write_text("image_0,caption_0,image_1,caption_1\n../0.png,a,../0.png,b\n")
    assert len(evaluation.load_quadruples(path, allow_outside=True)) == 1
    for wrong in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ValueError, match="winoground needs a file"):
            evaluation.load_quadruples(wrong)


# ---- Search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """A folder of eight pictures, two of them in a folder below."""
    rng = np.random.default_rng(1)
    for i in range(8):
        path = tmp_path / "album" / ("below" if i > 5 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "album"


def search(checkpoint, album, query="two dogs", *more):
    arguments = [str(checkpoint), "--data", str(album), "--task", "search", "--precision", "fp32"]
    return evaluation.main([*arguments, "--query", query, *more])["search"]


def test_search_ranks_all_pictures_of_a_folder_by_cosine(checkpoint, album, tmp_path, capsys):
    found = search(checkpoint, album, "two dogs", "--top", "3", "--out", str(tmp_path / "found.png"))
    model = dualenc.DualEncoder.from_pretrained(checkpoint)
    names = sorted(path.relative_to(album).as_posix() for path in album.rglob("*.png"))
    with torch.no_grad():
        query = model.encode_text(**model.processor(text="two dogs"))[0]
        pixel_values = model.processor(images=[Image.open(album / name) for name in names])["pixel_values"]
        scores = dict(zip(names, (model.encode_image(pixel_values) @ query).tolist()))
    best = sorted(names, key=lambda name: -scores[name])[:3]
    assert [item["picture"] for item in found["found"]] == best
    assert [item["score"] for item in found["found"]] == pytest.approx([scores[name] for name in best], abs=1e-5)
    assert found["n_images"] == 8 and best[0] in capsys.readouterr().out
    sheet = Image.open(tmp_path / "found.png")
    assert sheet.width > 5 * 160 and len(sheet.getcolors(1 << 20)) > 500


def test_the_pictures_of_a_folder_have_one_order_whatever_the_disk_says(album, monkeypatch):
    names = evaluation.open_gallery(str(album), "test", "", "fox", 4).names
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: contextlib.nullcontext(sorted(scandir(path), key=lambda e: e.name)[::-1])
    )
    assert evaluation.open_gallery(str(album), "test", "", "fox", 4).names == names == sorted(names)


def test_a_picture_finds_itself(checkpoint, album):
    (album / "below" / "7.png").rename(album / "below" / "7.PNG")
    found = search(checkpoint, album, str(album / "below" / "7.PNG"))["found"]
    assert found[0]["picture"] == "below/7.PNG" and found[0]["score"] == pytest.approx(1, abs=1e-4)


def test_the_index_is_kept_and_follows_the_files(checkpoint, album):
    """Only what is new is embedded: all, nothing, a changed file, a new file; what is gone is forgotten."""
    assert search(checkpoint, album)["n_indexed"] == 8
    before = search(checkpoint, album)
    assert before["n_indexed"] == 0 and (album.parent / ".album.index").is_dir()
    Image.new("RGB", (9, 9), "red").save(album / "0.png")
    assert search(checkpoint, album)["n_indexed"] == 1
    os.utime(album / "1.png", (1, 1))
    assert search(checkpoint, album)["n_indexed"] == 1, "of the same size, but written at another time"
    Image.new("RGB", (9, 9), "blue").save(album / "new.jpg")
    (album / "3.png").unlink()
    after = search(checkpoint, album)
    assert (after["n_indexed"], after["n_images"]) == (1, 8)
    scores = [{item["picture"]: item["score"] for item in m["found"]} for m in (before, after)]
    assert "3.png" not in scores[1] and "new.jpg" in scores[1]
    kept = {"1.png", "2.png", "4.png", "5.png"}
    assert {n: scores[0][n] for n in kept} == pytest.approx({n: scores[1][n] for n in kept}, abs=1e-6)
    assert scores[0]["0.png"] != scores[1]["0.png"]
    assert len(list(album.parent.glob(".album.index/*/*.npy"))) == 1, "older rows are removed"


def test_another_model_or_transform_gets_an_index_of_its_own(make_model):
    model = make_model()
    key = evaluation.index_key(model, "fp32")
    assert key == evaluation.index_key(make_model(), "fp32"), "the key depends on content alone"
    model.text_projection.weight.data += 1
    assert key == evaluation.index_key(model, "fp32"), "the text side does not change pictures' embeddings"
    assert key != evaluation.index_key(model, "bf16")
    transform = model.processor.image_transform
    model.processor.image_transform = dataclasses.replace(transform, mean=(0.1, 0.2, 0.3))
    assert key != evaluation.index_key(model, "fp32")
    model.processor.image_transform = transform
    model.visual_projection.weight.data[0, 0] += 1e-3
    assert key != evaluation.index_key(model, "fp32")


def test_unreadable_pictures_are_named_and_never_found(checkpoint, album, tmp_path, capsys, monkeypatch):
    """Though their rows of 0 beat every negative cosine; the contact sheet and the report can be drawn."""
    embed = evaluation.embed_captions
    (album / "4.png").write_bytes(b"no picture")
    for n_indexed, sign in ((7, 1), (0, -1)):
        monkeypatch.setattr(evaluation, "embed_captions", lambda *a, sign=sign, **more: sign * embed(*a, **more))
        found = search(checkpoint, album, "two dogs", "--out", str(tmp_path / "a.png"), "--report", str(tmp_path / "r"))
        assert found["unreadable"] == ["4.png"] and found["n_indexed"] == n_indexed
        assert len(found["found"]) == 7 and "4.png" not in [item["picture"] for item in found["found"]]
        assert "1 unreadable: 4.png" in capsys.readouterr().out
    (album / "4.png").unlink()
    assert search(checkpoint, album)["unreadable"] == []


def test_a_picture_that_could_not_be_read_once_is_tried_again(checkpoint, album, monkeypatch):
    """A permission or a network drive may come back, which leaves size and time of the file as they were."""
    whole = search(checkpoint, album, "fox", "--index", str(album.parent / "whole"))["found"]
    open_picture, gone = dualenc.open_picture, ["4.png"]

    def fail_at_times(path, *rest):
        if os.path.basename(path) in gone:
            raise ValueError(f"cannot read picture {path}: the network is down")
        return open_picture(path, *rest)

    monkeypatch.setattr(dualenc, "open_picture", fail_at_times)
    flags = ["fox", "--workers", "0"]
    for n_indexed in (7, 0):
        found = search(checkpoint, album, *flags)
        assert found["unreadable"] == ["4.png"] and found["n_indexed"] == n_indexed
    gone.clear()
    found = search(checkpoint, album, *flags)
    assert found["unreadable"] == [] and found["n_indexed"] == 1
    assert {i["picture"]: i["score"] for i in found["found"]} == pytest.approx(
        {i["picture"]: i["score"] for i in whole}, abs=1e-5
    )
    assert search(checkpoint, album, *flags)["n_indexed"] == 0


def test_search_over_data_specs_and_other_index_folders(checkpoint, album, tmp_path):
    (album / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,two dogs\n" for i in range(6)))
    for split in dualenc.SPLITS:
        found = search(checkpoint, album / "captions.csv", "fox", "--split", split)
        assert found["n_images"] == 6, "without a split of its own, all of it"
    assert (album / ".captions.csv.test.index").is_dir()
    found = search(checkpoint, album, "fox", "--index", str(tmp_path / "elsewhere"))
    assert found["n_images"] == 8 and (tmp_path / "elsewhere").is_dir() and not (tmp_path / ".album.index").exists()


def test_pictures_without_files_are_told_apart_by_name(make_model, tmp_path, monkeypatch):
    """Drawn shapes and torchvision's sets have no file to look at: their names stand for their content."""
    gallery = evaluation.open_gallery("shapes", "test", "", "fox", 4, data_root=str(tmp_path))
    assert gallery.index == tmp_path / ".shapes.test.index", "there is nothing else to be beside"
    monkeypatch.chdir(tmp_path)
    beside = evaluation.store_home("shard-{0..3}.tar", "index", "elsewhere")
    assert beside == tmp_path / ".shard-{0..3}.tar.index", "braces name shards that are files"
    gallery = dataclasses.replace(
        gallery, stamps=gallery.stamps[:9], pictures=dualenc.Selected(gallery.pictures, range(9))
    )
    subject = evaluation.Subject(make_model(image_size=64), gallery)
    assert [evaluation.search_task(subject)["n_indexed"] for _ in range(2)] == [9, 0]


def test_search_refuses_what_it_cannot_do(checkpoint, album, tmp_path):
    with pytest.raises(ValueError, match="search needs --query"):
        search(checkpoint, album, "")
    with pytest.raises(ValueError, match="cannot read picture .*none.jpg"):
        search(checkpoint, album, str(tmp_path / "none.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        search(checkpoint, tmp_path / "empty")


# ---- The same preparation as in training ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--image-size", "--crop", "--mean", "--std", "--interpolation", "--transform"])
def test_no_flag_evaluates_with_another_transform(checkpoint, colour_folder, flag, capsys):
    with pytest.raises(SystemExit):
        evaluation.main([str(checkpoint), "--data", str(colour_folder), flag, "64"])
    assert f"unknown flag {flag}" in capsys.readouterr().err
    with pytest.raises(TypeError):
        evaluation.evaluate(None, None, **{flag.strip("-").replace("-", "_"): 64})


def test_pictures_are_measured_through_the_transform_saved_with_the_weights(make_model, colour_folder, tmp_path):
    """The same weights saved with another mean and crop give other embeddings, those of that transform."""
    model = make_model()
    plain = model.processor.image_transform
    pairs = dualenc.load_pairs(str(colour_folder), "test")
    for name, transform in (("a", plain), ("b", dataclasses.replace(plain, mean=(0.9, 0.1, 0.4), std=(0.1, 0.3, 0.2)))):
        model.processor = dualenc.Processor(transform, model.processor.tokenizer)
        model.save_pretrained(tmp_path / name)
        loaded = dualenc.DualEncoder.from_pretrained(tmp_path / name)
        got = evaluation.Subject(loaded, pairs).image_embeds
        with torch.no_grad():
            right = model.encode_image(torch.stack([transform(picture) for picture in pairs.pictures]))
        assert torch.allclose(got, right, atol=1e-5)
        if name == "a":
            first = got
    assert not torch.allclose(first, got, atol=1e-2)


def test_a_model_without_a_processor_is_refused(make_model, colour_folder):
    model = make_model()
    model.processor = None
    with pytest.raises(ValueError, match="holds no processor"):
        evaluation.evaluate(model, dualenc.load_pairs(str(colour_folder), "test"))


# ---- The report -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Every tag of a page with its attributes; raises AssertionError where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("data", ["colours", "shapes", "search"])
def test_the_report_is_one_page_with_everything_inside(checkpoint, colour_folder, album, tmp_path, data):
    """No script, no address on the network, every picture inlined, decodable and described in words."""
    arguments = {
        "colours": ["--data", str(colour_folder), "--task", "all"],
        "shapes": ["--data", "shapes", "--task", "all"],
        "search": ["--data", str(album), "--task", "search", "--query", "<b>dogs & foxes"],
    }[data]
    results = evaluation.main([str(checkpoint), *arguments, "--report", str(tmp_path / "report")])
    assert os.listdir(tmp_path / "report") == ["index.html"]
    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert not re.search(r"<script|javascript:|@import|url\(|\son\w+=", text)
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name == "href"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 5
    for attributes in pictures:
        assert attributes["alt"].strip()
        kind, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", attributes["src"]).groups()
        content = base64.b64decode(content)
        if kind == "image/svg+xml":
            assert Page(content.decode()).tags[0][0] == "svg"
        else:
            Image.open(io.BytesIO(content)).verify()
    words = " ".join(page.words)
    for name in results:
        assert evaluation.TASKS[name].title in words
    assert ("<b>dogs & foxes" in words) == (data == "search"), "what the user typed is shown, not interpreted"
    assert ("width=device-width" in text) and ("overflow-x: auto" in text), "narrow windows"


def test_words_of_users_are_shown_in_the_report_not_interpreted(checkpoint, colour_folder, tmp_path):
    """Class names, which are in captions, tables and drawings too."""
    for split in ("train", "test"):
        (colour_folder / split / "dog").rename(colour_folder / split / "<b>dog & fox")
    arguments = ["--data", str(colour_folder), "--task", "all", "--report", str(tmp_path / "report")]
    evaluation.main([str(checkpoint), *arguments])
    page = Page((tmp_path / "report" / "index.html").read_text())
    drawn = [attributes["src"].partition("svg+xml;base64,")[2] for tag, attributes in page.tags if tag == "img"]
    drawings = [Page(base64.b64decode(content).decode()) for content in drawn if content]
    for one in (page, *drawings):
        assert "b" not in {tag for tag, _ in one.tags}
    assert any("<b>dog & fox" in words for words in page.words)
    assert any("<b>dog" in words for drawing in drawings for words in drawing.words)


def test_the_second_reliability_diagram_is_that_of_the_scaled_answers(monkeypatch):
    images, classes, labels = made_up_answers(40, 4.0)
    data = dualenc.Pairs([str(i) for i in range(40)], [Image.new("RGB", (8, 8))] * 40, [["x"]] * 40, labels.tolist())
    data.classes = list("abcde")
    subject = SimpleNamespace(image_embeds=images, class_rows=classes, labels=labels, data=data)
    subject.model, drawn = SimpleNamespace(logit_scale=torch.tensor(2.0)), []
    monkeypatch.setattr(evaluation, "reliability_diagram", lambda *given: drawn.append(given[0]) or "")
    evaluation.zeroshot_figures(subject, {"zs_temperature": 3.0})
    _, rest = evaluation.halves(40)
    for confidence, divisor in zip(drawn, (1.0, 3.0)):
        right, _ = evaluation.confidences(images[rest], classes, labels[rest], math.exp(2.0) / divisor)
        assert torch.allclose(confidence, right)


def test_right_answers_have_a_frame_in_the_report(make_model, colour_folder):
    subject = evaluation.Subject(make_model(), dualenc.load_pairs(str(colour_folder), "test"))
    for query in range(len(subject.text_embeds)):
        pages = [Page(card) for card in evaluation.found_pictures(subject, query)]
        framed = [page.tags[0][1].get("class") == "right" for page in pages]
        assert framed == [" right" in " ".join(page.words) for page in pages] and any(framed)


def test_shared_captions_are_pointed_out_and_only_those(colour_folder, album, make_model):
    for spec, shared in ((colour_folder, True), (album / "captions.csv", False)):
        if not shared:
            (album / "captions.csv").write_text("image,caption\n0.png,two dogs\n1.png,fox\n2.png,a star\n")
        pairs = dualenc.load_pairs(str(spec), "test", val_fraction=1.0, templates=("a {}",))
        numbers = evaluation.evaluate(make_model(), pairs, ["retrieval"])["retrieval"]
        assert ("captions are shared" in evaluation.retrieval_tables(numbers)[0].note) == shared


def test_the_most_confident_mistakes_are_mistakes_and_the_most_confident_comes_first():
    images = torch.nn.functional.normalize(torch.tensor([[9.0, 1, 1], [1, 5, 1], [3, 9, 1], [1, 1, 9]]), dim=1)
    pictures = [Image.new("RGB", (8, 8))] * 4
    data = dualenc.Pairs(list("pqrs"), pictures, [["x"]] * 4, [0, 0, 0, 2], ["dog", "fox", "star"])
    model = SimpleNamespace(logit_scale=torch.tensor(2.0))
    subject = SimpleNamespace(image_embeds=images, class_rows=torch.eye(3), labels=torch.tensor(data.labels), data=data)
    subject.model = model
    page = Page(evaluation.zeroshot_figures(subject, {})[-1])
    shown = [words.partition(",")[0] for words in page.words if "taken for" in words]
    assert shown == ["dog taken for fox"] * 2
    assert [attributes["alt"][:9] for tag, attributes in page.tags if tag == "img"] == ["picture q", "picture r"]


def test_the_similarity_table_has_captions_in_rows_and_pictures_in_columns(make_model, colour_folder):
    subject = evaluation.Subject(make_model(), dualenc.load_pairs(str(colour_folder), "test"))
    page = Page(evaluation.similarity_matrix(subject))
    known = {caption for several in subject.data.captions for caption in several}
    captions = [words for words in page.words if words in known]
    values = torch.tensor([float(words) for words in page.words if re.fullmatch(r"-?\d\.\d\d", words)])
    pictures = [0, 6, 12]  # the first of each class
    with torch.no_grad():
        texts = subject.model.encode_text(**subject.model.processor(text=captions))
        expected = texts @ subject.embed_pictures([subject.data.pictures[i] for i in pictures]).T
    assert len(captions) == 3 and torch.allclose(values.view(3, 3), expected, atol=0.006)


def test_a_card_shows_words_not_tags():
    page = Page(evaluation.card(Image.new("RGB", (8, 8)), "<i>dogs & foxes", 'say "hi" <b>'))
    assert [tag for tag, _ in page.tags] == ["figure", "img", "figcaption"] and page.words == ["<i>dogs & foxes"]
    assert page.tags[1][1]["alt"] == 'say "hi" <b>'


def test_every_number_of_the_report_is_that_of_the_json_file(checkpoint, colour_folder, tmp_path):
    out = tmp_path / "numbers.json"
    evaluation.main(
        [str(checkpoint), "--data", str(colour_folder), "--report", str(tmp_path / "report"), "--json", str(out)]
    )
    numbers, text = json.loads(out.read_text()), (tmp_path / "report" / "index.html").read_text()
    for task, name in (("retrieval", "i2t_r1"), ("retrieval", "t2i_r10"), ("zeroshot", "zs_top1")):
        assert evaluation.percent(numbers[task], name) in text
    assert f"{numbers['zeroshot']['zs_temperature']:.3f}" in text


def test_best_and_worst_are_of_different_groups():
    ranks, groups = torch.tensor([1, 1, 9, 7, 3, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert evaluation.best_and_worst(ranks, groups, 2) == {"best": [0, 5], "worst": [2, 4]}
    assert evaluation.best_and_worst(ranks[:2], groups[:2], 2)["worst"] == [], "what is right at once is not among them"


def test_the_found_pictures_end_with_the_right_one_where_it_was_missed():
    picture = Image.new("RGB", (8, 8))
    images = torch.eye(7)
    data = SimpleNamespace(pictures=[picture] * 7, names=list("abcdefg"))
    query = torch.tensor([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    subject = SimpleNamespace(
        data=data, image_embeds=images, text_embeds=query[None], captions=(["x"], torch.arange(7), torch.tensor([6]))
    )
    cards = evaluation.found_pictures(subject, 0)
    assert len(cards) == 6 and "right" in cards[-1] and "a wrong answer" in cards[0]
    subject.captions = (["x"], torch.arange(7), torch.tensor([1]))
    assert len(evaluation.found_pictures(subject, 0)) == 5


def test_confusion_counts_rows_by_right_class():
    """Two of three dogs taken for a fox: the alt text, the only part words can check, says so."""
    guesses, labels = torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
    assert "dog taken for fox 2 times" in evaluation.confusion_diagram(guesses, labels, ["dog", "fox"])
    many = [f"class {k}" for k in range(60)]
    assert "Confusion matrix of 60 classes" in evaluation.confusion_diagram(torch.arange(60), torch.arange(60), many)


def test_the_most_frequent_mistakes_are_mistakes():
    """With two classes right answers fill half of the matrix; where nothing is wrong there is no such sentence."""
    guesses, labels = torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
    drawn = evaluation.confusion_diagram(guesses, labels, ["dog", "fox"])
    assert drawn.count("taken for") == 2, "the one mistake, in the alt text and in the caption"
    assert "mistakes" not in evaluation.confusion_diagram(labels, labels, ["dog", "fox"])


def test_classes_come_from_words_or_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("fox\nred star\n")
    assert evaluation.read_classes("fox, red star") == evaluation.read_classes(str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="no file names"):
        evaluation.read_classes("names")


def test_given_class_names_are_cleaned_as_those_of_the_data_and_named_once(tmp_path):
    assert evaluation.read_classes("fox,red_star , blue  star,") == ("fox", "red star", "blue star")
    many = ", ".join(f"class number {k}" for k in range(400))
    assert len(evaluation.read_classes(many)) == 400, "more words than a file name can hold"
    with pytest.raises(ValueError, match="--classes names red star more than once"):
        evaluation.read_classes("fox,red_star,red star")


def test_long_class_lists_show_the_best_and_the_worst_ten():
    rows = unit_rows(30, 64, 20)
    numbers = evaluation.zeroshot(rows, rows, torch.arange(30), [f"class {k}" for k in range(30)])
    table = evaluation.zeroshot_tables({**numbers, "n_templates": 1})[-1]
    assert len(table.rows) == 20 and table.note == "best and worst ten"


def test_measuring_draws_from_generators_of_its_own(make_model, pictures):
    """Training that goes on after an evaluation is not disturbed by it."""
    model = make_model()
    pairs = dualenc.Pairs(list("abcd"), pictures, [["two dogs"], ["fox"]] * 2, [0, 1, 0, 1], ["dog", "fox"])
    before = torch.get_rng_state(), random.getstate()
    evaluation.evaluate(model, pairs)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
