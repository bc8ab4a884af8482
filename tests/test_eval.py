"""Measuring: every metric equals a slow recount, and the script measures what it says it does."""

import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import Memory, in_processes

import dualenc
import eval as evaluation


def unit_rows(n, width, seed):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def right_cells(*captions_of):
    """(R, 2) right answers, from the caption indices of each image."""
    cells = [(i, n) for i, captions in enumerate(captions_of) for n in captions]
    return torch.tensor(cells)


# ---- Retrieval -----------------------------------------------------------------------------------


def test_equal_answers_tie_wherever_they_stand_in_the_gallery():
    """Each answer occurs twice, also for another query: rounding must not decide between them."""
    distinct = unit_rows(70, 384, 1)
    texts, images = distinct.repeat(2, 1), torch.cat([distinct, unit_rows(70, 384, 2)])
    found = evaluation.ranks(images, texts, right_cells(*([i] for i in range(140))), 64)
    assert found[:70].tolist() == [2] * 70
    near = torch.tensor([[1.0, 0.0], [0.9999, 0.0]])
    assert evaluation.ranks(near[:1], near, right_cells([0])).tolist() == [1], "no tie"


def test_ranks_hold_the_scores_of_a_few_queries_at_a_time():
    right = right_cells(*([i] for i in range(300)))
    with Memory() as memory:
        evaluation.ranks(unit_rows(300, 4, 0), unit_rows(300, 4, 1), right, rows=10)
    assert memory.most_alive < 2 * 10 * 300 + 20 * 300


def both_ways(images, texts, right):
    found = evaluation.ranks(images, texts, right), evaluation.ranks(texts, images, right.flip(1))
    return *found, evaluation.retrieval_metrics(*found, right)


def test_retrieval_metrics_equal_a_slow_recount():
    """30 images with 1 to 4 captions each, the last caption shared by two images."""
    captions_of = [[n for n in range(73) if n % 30 == i] for i in range(30)]
    captions_of[3] = captions_of[3] + [72]
    right = right_cells(*captions_of)
    images, texts = unit_rows(30, 6, 0), unit_rows(73, 6, 1)
    image_ranks, text_ranks, got = both_ways(images, texts, right)
    for way, found in (("i2t", image_ranks.tolist()), ("t2i", text_ranks.tolist())):
        for k in (1, 5, 10):
            share = sum(rank <= k for rank in found) / len(found)
            assert got[f"{way}_r{k}"] == pytest.approx(share)
        assert got[f"{way}_medr"] == np.median(found)
        assert got[f"{way}_mrr"] == pytest.approx(sum(1 / rank for rank in found) / len(found))
    assert (got["n_images"], got["n_captions"]) == (30, 73)
    assert got["chance_r1"] == pytest.approx(len(right) / (30 * 73)), "right cells over all cells"
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in got.values())


def test_intervals_are_1_96_standard_errors_over_images():
    """An image's captions are averaged first: they are no independent draws."""
    right = right_cells([0, 1], [2], [3, 4, 5])
    image_ranks, text_ranks = torch.tensor([1, 2, 1]), torch.tensor([1, 7, 1, 9, 1, 9])
    got = evaluation.retrieval_metrics(image_ranks, text_ranks, right)
    for name, share, per_image in (
        ("i2t_r1", 2 / 3, [1, 0, 1]),
        ("t2i_r1", 3 / 6, [1 / 2, 1, 1 / 3]),
    ):
        error = 1.96 * np.std(per_image) / math.sqrt(3)
        ends = got[f"{name}_low"], got[f"{name}_high"]
        assert got[name] == pytest.approx(share)
        assert ends == pytest.approx((max(0, share - error), min(1, share + error))), name


# ---- Zero-shot and calibration -------------------------------------------------------------------


def test_zeroshot_equals_a_slow_recount():
    images, classes, labels = unit_rows(50, 8, 4), unit_rows(7, 8, 5), torch.arange(50) ** 2 % 6
    got = evaluation.zeroshot_metrics(images, classes, labels, list("abcdefg"))
    order = [sorted(range(7), key=lambda k: -float(image @ classes[k])) for image in images]
    top1 = [row[0] == label for row, label in zip(order, labels)]
    top5 = [label in row[:5] for row, label in zip(order, labels.tolist())]
    assert got["zs_top1"] == pytest.approx(np.mean(top1))
    assert got["zs_top5"] == pytest.approx(np.mean(top5))
    by_class = {
        "abcdefg"[k]: np.mean([hit for hit, label in zip(top1, labels) if label == k])
        for k in sorted(set(labels.tolist()))
    }
    assert got["zs_class_top1"] == pytest.approx(by_class), "only classes that occur"
    assert got["zs_per_class"] == pytest.approx(np.mean(list(by_class.values())))
    assert (got["n_images"], got["n_classes"], got["chance_top1"]) == (50, 7, 1 / 7)


def made_up_answers(n, true_scale):
    """Embeddings, and labels drawn from the softmax of their cosines times true_scale."""
    images, classes = unit_rows(n, 8, 9), unit_rows(5, 8, 10)
    probabilities = (true_scale * images @ classes.T).softmax(dim=1)
    return (
        images,
        classes,
        probabilities.multinomial(1, generator=torch.Generator().manual_seed(11))[:, 0],
    )


def slow_calibration_error(probabilities, labels, bins=15):
    """Guo et al. 2017, equation 3, bin by bin."""
    error, top = 0.0, probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    for k in range(bins):
        inside = (k / bins < top) & (top <= (k + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(top[inside].mean() - right[inside].mean())
    return error


def test_calibration_equals_a_slow_count_on_the_half_that_did_not_fit():
    images, classes, labels = made_up_answers(400, 4.0)
    got = evaluation.calibration(images, classes, labels, torch.tensor(10.0).log())
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    fit, rest = order[:200], order[200:]
    for suffix, divisor in (("", 1.0), ("_scaled", got["zs_temperature"])):
        logits = 10 / divisor * images[rest].double() @ classes.T.double()
        probabilities, answers = logits.softmax(dim=1).numpy(), labels[rest].numpy()
        error = slow_calibration_error(probabilities, answers)
        assert got[f"zs_ece{suffix}"] == pytest.approx(error, abs=1e-5)
        nll = -np.log(probabilities[np.arange(200), answers]).mean()
        assert got[f"zs_nll{suffix}"] == pytest.approx(nll, abs=1e-5)
    grid, logits = np.exp(np.linspace(-2, 3, 2001)), 10 * images[fit] @ classes.T
    losses = [torch.nn.functional.cross_entropy(logits / t, labels[fit]).item() for t in grid]
    assert got["zs_temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


def test_templates_come_from_a_set_or_a_file(tmp_path):
    assert [len(set(templates)) for templates in evaluation.TEMPLATE_SETS.values()] == [1, 7]
    for template in sum(evaluation.TEMPLATE_SETS.values(), ()):
        assert template.count("{}") == 1 and template.endswith(".")
    assert evaluation.read_templates("") == dualenc.TEMPLATES
    (tmp_path / "mine.txt").write_text("the {}\n\na {}\n")
    assert evaluation.read_templates(str(tmp_path / "mine.txt")) == ("the {}", "a {}")
    with pytest.raises(ValueError, match="unknown .*templates 'clip8'; expected plain, clip7"):
        evaluation.read_templates("clip8")
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(ValueError, match="mine.txt is empty"):
        evaluation.read_templates(str(tmp_path / "mine.txt"))


# ---- Embeddings ----------------------------------------------------------------------------------


def test_embedding_in_batches_equals_one_at_a_time(make_model, images):
    model = make_model()
    captions = ["two dogs", "a small red circle left of a large blue star", "fox"]
    with torch.no_grad():
        texts = torch.cat([model.encode_text(**model.processor(text=text)) for text in captions])
        pixels = [model.processor(images=image)["pixel_values"] for image in images]
        rows = torch.cat([model.encode_image(values) for values in pixels])
        pooled = torch.cat([model.vision_model(values).pooler_output for values in pixels])
    for size in (1, 2, 100):
        got = evaluation.embed_captions(model, captions, batch_size=size)
        assert torch.allclose(got, texts, atol=1e-5)
        for wanted, features in ((rows, False), (pooled, True)):
            workers = int(size == 2)
            got, bad = evaluation.embed_images(model, images, "fp32", size, workers, features)
            assert torch.allclose(got, wanted, atol=1e-5) and bad == {}
    inputs = model.processor(text=captions)
    with torch.no_grad():
        wanted = model.text_model(**inputs).pooler_output
    assert torch.allclose(
        evaluation.embed_captions(model, captions, pooled=True), wanted, atol=1e-5
    )


def test_equal_captions_get_one_embedding_and_equal_lengths_a_batch(make_model, monkeypatch):
    model, seen, encode = make_model(), [], None
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda **x: (seen.append(x), encode(**x))[1])
    captions = ["two dogs " * n for n in (3, 1, 4, 1, 5)] + ["a small red circle", "zzzzzzz"]
    distinct = dict.fromkeys(captions)
    lengths = sorted(model.processor(text=c)["input_ids"].shape[1] for c in distinct)
    rows = evaluation.embed_captions(model, captions, batch_size=2)
    assert [x["input_ids"].shape[1] for x in seen] == lengths[1::2]
    assert torch.equal(rows[1], rows[3]) and not torch.allclose(rows[0], rows[1])


def test_unreadable_images_are_named_and_their_rows_are_0(make_model, images, tmp_path):
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"torn")
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    files = dualenc.Lazy(paths, dualenc.open_image)
    rows, bad = evaluation.embed_images(make_model(), files)
    assert list(bad) == [2] and "2.png" in bad[2]
    assert rows.norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1])


def test_measuring_leaves_model_and_generators_as_they_were(make_model, images):
    model = make_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    captions = [[text] for text in ("two dogs", "fox", "star", "circle")]
    pairs = dualenc.Pairs(list("abcd"), images, captions, [0, 1, 0, 1], ["dog", "fox"])
    evaluation.evaluate(model, pairs)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_given_features_stand_in_for_the_tower(make_model, images):
    model = make_model()
    pairs = dualenc.Pairs(list("abcd"), images, [[c] for c in ("two dogs", "fox", "star", "a")])
    wanted = evaluation.evaluate(model, pairs)
    features, _ = evaluation.embed_images(model, images, pooled=True)
    model.vision_model = None
    assert evaluation.evaluate(model, pairs, image_features=features) == wanted


def test_embeddings_that_are_not_finite_are_refused(make_model, images):
    model = make_model()
    model.visual_projection.weight.data[:] = torch.nan
    pairs = dualenc.Pairs(list("abcd"), images, [["two dogs"]] * 4)
    with pytest.raises(evaluation.NotFinite, match="not finite"):
        evaluation.evaluate(model, pairs)


def embed_in_one_process(rank, model, images, captions, paths):
    files = dualenc.Lazy(paths, dualenc.open_image)
    return (
        evaluation.embed_images(model, images, batch_size=2)[0],
        evaluation.embed_captions(model, captions, batch_size=2),
        evaluation.embed_images(model, files, batch_size=1)[1],
        evaluation.embed_images(model, images[:1], batch_size=2, pooled=True)[0],
    )


def test_processes_share_the_work_and_agree(make_model, images, tmp_path):
    """Three batches for two processes, unreadable files for both, and a share of nothing."""
    model, images, captions = make_model(), [*images, images[0]], ["two dogs", "fox", "a star", "b"]
    given = model, images, captions, [str(tmp_path / name) for name in "ab"]
    alone = embed_in_one_process(0, *given)
    for rows in in_processes(2, embed_in_one_process, *given):
        for got, wanted in zip(rows, alone):
            if isinstance(got, dict):
                assert got == wanted and len(got) == 2
            else:
                assert torch.allclose(got, wanted, atol=1e-6)


# ---- Rows kept on disk ---------------------------------------------------------------------------


def test_stored_rows_follow_the_stamps(tmp_path):
    """Only what is new is embedded, whatever the order; what cannot be read is tried again."""
    asked, broken = [], set()

    def stored(stamps):
        def embed(new):
            asked.append("".join(stamps[i] for i in new))
            bad = {k: f"cannot read {stamps[i]}" for k, i in enumerate(new) if stamps[i] in broken}
            rows = torch.tensor([[float(ord(stamps[i]))] for i in new])
            rows[list(bad)] = 0
            return rows, bad

        rows, bad, new = evaluation.stored_rows(tmp_path / "store", list(stamps), embed)
        wanted = [0 if stamp in broken else ord(stamp) for stamp in stamps]
        assert rows[:, 0].tolist() == wanted, stamps
        return new, bad

    assert stored("abc") == (3, {})
    assert stored("abc") == (0, {}) and asked == ["abc"]
    assert stored("dca") == (1, {}) and asked[-1] == "d", "b is forgotten"
    broken.add("e")
    for _ in range(2):
        assert stored("aec") == (0, {1: "cannot read e"}) and asked[-1] == "e"
    broken.clear()
    assert stored("aec") == (1, {}) and stored("aec") == (0, {})
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1


def test_a_store_is_whole_after_whatever_interrupts_it(tmp_path):
    def embed(new):
        return torch.ones(len(new), 2), {}

    evaluation.stored_rows(tmp_path, ["a"], embed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.stored_rows(
            tmp_path, ["a", "b"], lambda new: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    assert evaluation.stored_rows(tmp_path, ["a", "b"], embed)[2] == 1
    (tmp_path / "rows.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read .*rows.safetensors"):
        evaluation.stored_rows(tmp_path, ["a"], embed)


def test_the_key_changes_with_whatever_changes_a_row(make_model):
    def key(model, side="image_embeds", precision="fp32"):
        return evaluation.cache_key(model, precision, side)

    sides = ("image_embeds", "image_features", "text_features")
    model = make_model()
    first = {side: key(model, side) for side in sides}
    assert first == {side: key(make_model(), side) for side in sides}, "content alone decides"
    assert len(set(first.values())) == 3 and key(model, precision="bf16") != first["image_embeds"]

    def changed():
        return {side for side in sides if key(model, side) != first[side]}

    model.text_projection.weight.data += 1
    model.logit_scale.data += 1
    assert changed() == set()
    model.visual_projection.weight.data += 1
    assert changed() == {"image_embeds"}
    model = make_model()
    model.image_head = model.visual_projection  # a projection by any name
    assert changed() == {"image_embeds"}
    model = make_model()
    transform = model.processor.image_transform
    model.processor.image_transform = dataclasses.replace(transform, mean=(0.1, 0.2, 0.3))
    assert changed() == {"image_embeds", "image_features"}
    model = make_model()
    model.processor.limit_length(5)
    assert changed() == {"text_features"}


# ---- Probe, k-NN, binding ------------------------------------------------------------------------


def blobs(n, n_classes=4, width=6, seed=12, spread=1.5):
    """Points around a centre for each class, with a one at the end; labels."""
    centres = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % n_classes
    points = centres[labels] + spread * noise
    return torch.cat([points, torch.ones(n, 1)], dim=1).double(), labels


@pytest.mark.parametrize("penalty", [0.1, 1e-3])
def test_logistic_regression_stands_where_the_gradient_is_zero(penalty):
    """The objective is convex, so a zero gradient (by hand: residuals times features) proves it."""
    features, labels = blobs(200)
    weights = evaluation.fit_logistic(features, labels, 4, penalty)
    probabilities = (features @ weights).softmax(dim=1)
    residuals = (probabilities - torch.nn.functional.one_hot(labels, 4)) / len(labels)
    gradient = features.T @ residuals
    gradient[:-1] += penalty * weights[:-1]  # the bias is not penalised
    assert gradient.abs().max() < 1e-4


def test_nearest_neighbours_equal_a_slow_vote():
    (train, labels), (test, _) = blobs(90), blobs(33, seed=14)
    got = evaluation.nearest_neighbours(train, labels, test, 4, rows=7)
    for row, guess in zip(test, got):
        cosines = torch.nn.functional.cosine_similarity(train, row[None])
        votes = [0.0] * 4
        for i in sorted(range(90), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        assert int(np.argmax(votes)) == guess


def test_few_shots_are_drawn_evenly_and_anew_from_the_pool():
    labels, pool, seen = torch.tensor([0] * 30 + [1] * 30 + [2] * 3), torch.arange(1, 63), []
    train = torch.arange(63.0)[:, None]
    pairs = SimpleNamespace(classes=list("abc"))
    context = SimpleNamespace(labels=labels[:5], train=(train, labels), pairs=pairs)

    def learn(features, given, test, n_classes):
        chosen = features[:, 0].long()
        assert torch.equal(given, labels[chosen]) and 0 not in chosen
        seen.append(chosen.tolist())
        return torch.zeros(len(test), dtype=torch.long)

    got = evaluation.few_shot(context, "x", learn, train, train[:5], pool)
    assert got["x_1shot_top1"] == got["x_top1"] == 1 and got["n_train"] == 62
    shots = [len(chosen) for chosen in seen]
    assert shots == [3] * 5 + [6] * 5 + [11] * 5 + [19] * 5 + [35] * 5 + [62]
    assert len({tuple(chosen) for chosen in seen}) == 26 and len(set(seen[10])) == 11


def test_the_probe_keeps_images_that_choose_the_penalty_apart(monkeypatch):
    """The first of equally good penalties, the strongest, is taken."""
    labels, fitted = torch.arange(40) % 2, []
    features = torch.stack([labels * 4.0 + torch.arange(40) / 40, torch.full((40,), 3.0)], dim=1)
    context = SimpleNamespace(train=(features, labels), image_features=features, labels=labels)
    context.pairs = SimpleNamespace(classes=["low", "high"])
    fit = evaluation.fit_logistic
    monkeypatch.setattr(
        evaluation, "fit_logistic", lambda x, *more: (fitted.append(len(x)), fit(x, *more))[1]
    )
    got = evaluation.probe_task(context)
    assert got["probe_top1"] == got["probe_16shot_top1"] == 1, "also with a constant feature"
    assert max(fitted) == got["n_train"] == 32


def bag_of_words(captions):
    words = sorted({word for caption in captions for word in caption.split()})
    rows = torch.tensor([[caption.split().count(word) for word in words] for caption in captions])
    return torch.nn.functional.normalize(rows.float(), dim=1)


def test_a_bag_of_words_passes_the_control_and_fails_binding(monkeypatch):
    """Ties count as wrong, also those that rounding hides."""
    pairs = dualenc.ShapesPairs("test", count=64)
    captions = [[*pairs.captions[i], *pairs.hard_negatives(i).values()] for i in range(64)]
    distinct = sorted({caption for row in captions for caption in row})
    exact = bag_of_words(distinct)
    noise = 2e-7 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    row_of = dict(zip(distinct, exact + noise))

    def embed(model, captions, *reading):
        return torch.stack([row_of[caption] for caption in captions])

    monkeypatch.setattr(evaluation, "embed_captions", embed)
    rows = embed(None, [row[0] for row in captions])
    context = SimpleNamespace(pairs=pairs, image_embeds=rows, model=None, reading=())
    numbers = evaluation.binding_task(context)
    got = {kind: numbers[f"binding_{kind}"] for kind in (*evaluation.BINDING_KINDS, "all")}
    assert got == {"replaced": 1, "relation": 1, "attributes": 0, "order": 0, "all": 0}
    assert numbers["n_images"] == numbers["n_order"] == 64 > numbers["n_attributes"]


# ---- The script ----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "run" / "best")
    return tmp_path / "run" / "best"


@pytest.fixture
def colours(tmp_path):
    """Class folders of nearly plain images in three colours, in train/ and test/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, colour in (
            ("dog", (200, 40, 40)),
            ("fox", (40, 200, 40)),
            ("red_star", (40, 40, 200)),
        ):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.integers(-40, 40, (32, 32, 3)), 0, 255)
                path = tmp_path / "photos" / split / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def table(tmp_path):
    """A caption file of 40 images."""
    (tmp_path / "table").mkdir()
    lines = ["image,caption"]
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 0, 0)).save(tmp_path / "table" / f"{i}.png")
        lines.append(f"{i}.png,red number {i}")
    (tmp_path / "table" / "captions.csv").write_text("\n".join(lines))
    return tmp_path / "table" / "captions.csv"


def run_on(checkpoint, spec, **flags):
    """Make the checkpoint's folder a run on this data; how many images it held out."""
    flags = {"data": str(spec), "val_fraction": 0.3, "templates": "", "seed": 0, **flags}
    train, all_pairs = (
        dualenc.load_pairs(spec, split, val_fraction=flags["val_fraction"])
        for split in ("train", "all")
    )
    record = {"flags": flags, "data_names": evaluation.data_checksum(all_pairs.names)}
    (checkpoint.parent / dualenc.RUN_CONFIG).write_text(json.dumps(record))
    (checkpoint.parent / "trained_on.txt").write_text("".join(f"{n}\n" for n in train.names))
    return len(all_pairs) - len(train)


def test_the_script_prints_tables_and_writes_the_metrics(checkpoint, colours, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--data", str(colours), "--task", "all", "--json", str(out)]
    results = evaluation.main([str(checkpoint), *flags])
    printed = capsys.readouterr().out
    assert json.loads(out.read_text()) == results
    assert list(results) == ["retrieval", "zeroshot", "probe", "knn"]
    for name in ("probe", "knn"):
        assert results[name][f"{name}_top1"] == 1 and results[name]["n_images"] == 18
    assert "test, 18 of 78 images" in printed and "chance_top1 0.3333" in printed
    assert f"{results['zeroshot']['zs_top1']:.3f}" in printed
    wanted = {f"{way}_{what}" for way in ("i2t", "t2i") for what in ("r1", "r5", "medr", "mrr")}
    assert wanted | {"n_images", "n_captions", "chance_r1"} <= set(results["retrieval"])
    wanted = {"zs_top1", "zs_top5", "zs_per_class", "n_images", "n_classes", "chance_top1"}
    assert wanted <= set(results["zeroshot"])


def test_other_data_without_a_test_part_is_measured_whole(checkpoint, table, capsys):
    hashed = len(dualenc.load_pairs(table, "test"))
    for flags, wanted in (([], 40), (["--split", "all"], 40), (["--split", "test"], hashed)):
        results = evaluation.main([str(checkpoint), "--data", str(table), *flags])
        assert results["retrieval"]["n_images"] == wanted
        assert f"{wanted} of 40 images" in capsys.readouterr().out


def test_a_run_knows_its_data_wherever_it_lies(checkpoint, table, tmp_path, capsys):
    """Its own val_fraction holds, and nothing that was trained on is measured."""
    held_out = run_on(checkpoint, table)
    assert 4 < held_out < 36
    shutil.copytree(table.parent, tmp_path / "moved")
    record = checkpoint.parent / dualenc.RUN_CONFIG
    old = json.dumps({"flags": json.loads(record.read_text())["flags"]})  # without the checksum
    moved = tmp_path / "moved" / "captions.csv"
    for flags, content in (
        ([], record.read_text()),
        (["--data", str(moved)], record.read_text()),
        (["--data", str(table)], old),
    ):
        record.write_text(content)
        got = evaluation.main([str(checkpoint.parent), *flags])
        assert got["retrieval"]["n_images"] == held_out
        said = capsys.readouterr().out
        assert f"{held_out} of 40 images   the run's own data" in said and "trained on" not in said
    assert evaluation.main([str(checkpoint), "--split", "all"])["retrieval"]["n_images"] == 40
    assert f"the run trained on {40 - held_out} of them" in capsys.readouterr().out


def test_other_data_that_was_trained_on_is_counted(checkpoint, table, tmp_path, capsys):
    held_out = run_on(checkpoint, table)
    lines = table.read_text().splitlines()
    (table.parent / "part.csv").write_text("\n".join(lines[:31]))
    evaluation.main([str(checkpoint), "--data", str(table.parent / "part.csv")])
    said = capsys.readouterr().out
    trained_on = set((checkpoint.parent / "trained_on.txt").read_text().split())
    count = sum(f"{i}.png" in trained_on for i in range(30))
    assert f"30 of 30 images   the run trained on {count} of them" in said and count > held_out / 9


def test_other_classes_and_templates_can_be_given(checkpoint, colours, tmp_path):
    flags = [str(checkpoint), "--data", str(colours), "--task", "zeroshot", "--classes"]
    (tmp_path / "names.txt").write_text("fox\ncat\n\nred star\ndog\n")
    for given in ("fox, cat,red_star,dog,", str(tmp_path / "names.txt")):
        got = evaluation.main([*flags, given, "--templates", "plain"])["zeroshot"]
        assert (got["n_classes"], got["n_templates"]) == (4, 1)
        assert list(got["zs_class_top1"]) == ["fox", "red star", "dog"]
    with pytest.raises(ValueError, match="lacks some of the data's: red star; add them, or rename"):
        evaluation.main([*flags, "fox,dog"])
    with pytest.raises(ValueError, match="has a name twice"):
        evaluation.main([*flags, "fox,red star,red_star"])
    (tmp_path / "names.txt").write_text("dog\tpoodle\nfox\tvixen\nred_star\tsun\n")
    got = evaluation.main([*flags, str(tmp_path / "names.txt")])["zeroshot"]
    assert list(got["zs_class_top1"]) == ["poodle", "vixen", "sun"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "does not belong to a run.*give --data"),
        ("--data shapes --task zeroshot", "zeroshot needs data with classes, and this has none"),
        ("--data FOLDER --task binding", "binding needs data with hard_negatives"),
        ("--data shapes --classes fox,dog", "--classes lacks some of the data's: classes"),
        ("--data FOLDER --task probe --split train", "training images that are not measured"),
        ("--data shapes --top 0", "--top is 0, expected at least 1"),
        ("--data shapes --out found.png", "--out are for --task search, and --task is auto"),
        ("--data FOLDER --task search", "search needs --query"),
    ],
)
def test_what_cannot_be_measured_is_refused(checkpoint, colours, flags, message):
    flags = flags.replace("FOLDER", str(colours)).split()
    with pytest.raises(ValueError, match=message):
        evaluation.main([str(checkpoint), *flags])


def test_a_model_without_a_processor_is_refused(make_model, images):
    model = make_model()
    model.processor = None
    with pytest.raises(ValueError, match="no processor"):
        evaluation.evaluate(model, dualenc.Pairs(list("abcd"), images, [["two dogs"]] * 4))


def test_one_unreadable_image_is_left_out_and_more_stop(checkpoint, colours, capsys):
    flags = [str(checkpoint), "--data", str(colours)]
    (colours / "test" / "dog" / "0.png").write_bytes(b"torn")
    assert evaluation.main(flags)["zeroshot"]["n_images"] == 17
    assert "skipped     1 of 18 images: " in capsys.readouterr().out
    (colours / "test" / "dog" / "1.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="2 of 18 images: .*0.png"):
        evaluation.main(flags)


def test_all_keeps_what_was_measured_when_a_task_refuses(checkpoint, colours, capsys):
    """Class folders without a test part are measured whole, and nothing is left to learn from."""
    flags = [str(checkpoint), "--data", str(colours / "train"), "--task"]
    assert list(evaluation.main([*flags, "all"])) == ["retrieval", "zeroshot"]
    assert capsys.readouterr().out.count("left out    ") == 2
    with pytest.raises(ValueError, match="the train part of .* has no images"):
        evaluation.main([*flags, "probe"])


def test_a_new_task_is_one_row(monkeypatch, checkpoint, table, capsys):
    """In auto, in the printout, by name; a row that lacks something raises."""
    task = evaluation.Task("Brightness", "auto", "captions", lambda context: {"brightness": 0.5})
    monkeypatch.setitem(evaluation.TASKS, "brightness", task)
    got = evaluation.main([str(checkpoint), "--data", str(table)])
    assert (
        list(got) == ["retrieval", "brightness"] and "brightness   0.500" in capsys.readouterr().out
    )
    with pytest.raises(TypeError):
        evaluation.Task("Brightness", "auto", "captions")
    monkeypatch.setitem(evaluation.TASKS, "brightness", task._replace(part_of="atuo"))
    with pytest.raises(ValueError, match="atuo"):
        evaluation.main([str(checkpoint), "--data", str(table)])
    with pytest.raises(ValueError, match="unknown task 'brihgtness'"):
        evaluation.evaluate(None or SimpleNamespace(processor=1), None, ["brihgtness"])


# ---- Search --------------------------------------------------------------------------------------


def search(checkpoint, folder, query="two dogs", *more):
    flags = ["--data", str(folder), "--task", "search", "--precision", "fp32", "--query", query]
    return evaluation.main([str(checkpoint), *flags, *more])["search"]


def test_search_ranks_all_images_of_a_folder_by_cosine(checkpoint, colours, tmp_path, capsys):
    found = search(checkpoint, colours, "two dogs", "--top", "3", "--out", str(tmp_path / "a.png"))
    model = dualenc.DualEncoder.from_pretrained(checkpoint)
    names = sorted(path.relative_to(colours).as_posix() for path in colours.rglob("*.png"))
    with torch.no_grad():
        query = model.encode_text(**model.processor(text="two dogs"))[0]
        opened = [dualenc.open_image(str(colours / name)) for name in names]
        rows = model.encode_image(model.processor(images=opened)["pixel_values"])
    scores = dict(zip(names, (rows @ query).tolist()))
    best = sorted(names, key=lambda name: -scores[name])[:3]
    assert found["found"] == pytest.approx({name: scores[name] for name in best}, abs=1e-5)
    assert list(found["found"]) == best and found["n_images"] == 78
    assert best[0] in capsys.readouterr().out and Image.open(tmp_path / "a.png").width > 3 * 160
    itself = search(checkpoint, colours, str(colours / names[5]))["found"]
    assert itself[names[5]] == pytest.approx(1, abs=1e-4)


def test_the_index_is_kept_and_follows_the_files(checkpoint, table):
    folder = table.parent
    assert search(checkpoint, folder)["n_indexed"] == 40
    assert search(checkpoint, folder)["n_indexed"] == 0
    Image.new("RGB", (9, 9), "blue").save(folder / "0.png")
    Image.new("RGB", (9, 9), "red").save(folder / "new.jpg")
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"torn")
    found = search(checkpoint, folder, "two dogs", "--top", "99")
    assert (found["n_indexed"], found["n_images"], found["unreadable"]) == (2, 40, "4.png")
    assert len(found["found"]) == 39 and not {"3.png", "4.png"} & set(found["found"])
    assert (folder.parent / ".table.index").is_dir()


def test_search_over_data_specs(checkpoint, table, tmp_path, monkeypatch):
    assert search(checkpoint, table)["n_images"] == 40
    assert (table.parent / ".captions.csv.all.index").is_dir()
    monkeypatch.chdir(tmp_path)
    folder = evaluation.store_folder
    assert folder("shapes", "x", "elsewhere").as_posix() == "elsewhere/.shapes.x"
    assert folder("shard-{0..3}.tar", "x") == tmp_path / ".shard-{0..3}.tar.x"
    with pytest.raises(ValueError, match="cannot read image .*none.jpg"):
        search(checkpoint, table, str(tmp_path / "none.jpg"))
