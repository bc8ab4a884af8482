"""Measuring: every metric equals a slow recount, and the script measures what it says it does."""

import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import class_folders, in_processes, write_table

import dualenc
import eval as evaluation


def unit_rows(n, width, seed):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


def right_cells(*captions_of):
    """(R, 2) right answers, from the caption indices of each image."""
    return torch.tensor([(i, n) for i, captions in enumerate(captions_of) for n in captions])


def test_retrieval_metrics_equal_a_slow_recount():
    """30 images with 1 to 4 captions each, the last caption shared by two images."""
    captions_of = [[n for n in range(73) if n % 30 == i] for i in range(30)]
    captions_of[3] = captions_of[3] + [72]
    right = right_cells(*captions_of)
    images, texts = unit_rows(30, 6, 0), unit_rows(73, 6, 1)
    both = evaluation.ranks(images, texts, right)
    got = evaluation.retrieval_metrics(*both, right)
    for way, found in zip(("i2t", "t2i"), both):
        for k in (1, 5, 10):
            share = np.mean([rank <= k for rank in found.tolist()])
            assert got[f"{way}_r{k}"] == pytest.approx(share)
        assert got[f"{way}_medr"] == np.median(found)
        assert got[f"{way}_mrr"] == pytest.approx(np.mean([1 / rank for rank in found.tolist()]))
    assert (got["n_images"], got["n_captions"]) == (30, 73)
    assert got["chance_r1"] == pytest.approx(len(right) / (30 * 73)), "right cells over all cells"


def test_intervals_are_1_96_standard_errors_over_images():
    """An image's captions are averaged first: they are no independent draws."""
    right = right_cells([0, 1], [2], [3, 4, 5])
    image_ranks, text_ranks = torch.tensor([1, 2, 1]), torch.tensor([1, 7, 1, 9, 1, 9])
    got = evaluation.retrieval_metrics(image_ranks, text_ranks, right)
    means = {"i2t_r1": (2 / 3, [1, 0, 1]), "t2i_r1": (3 / 6, [1 / 2, 1, 1 / 3])}
    for name, (share, per_image) in means.items():
        error = 1.96 * np.std(per_image) / math.sqrt(3)
        ends = got[f"{name}_low"], got[f"{name}_high"]
        assert got[name] == pytest.approx(share)
        assert ends == pytest.approx((max(0, share - error), min(1, share + error))), name


# ---- Zero-shot and calibration -------------------------------------------------------------------


def test_zeroshot_equals_a_slow_recount():
    images, classes, labels = unit_rows(50, 8, 4), unit_rows(7, 8, 5), torch.arange(50) ** 2 % 6
    got = evaluation.zeroshot_metrics(images, classes, labels, list("abcdefg"))
    order = [sorted(range(7), key=lambda k: -float(image @ classes[k])) for image in images]
    hits = {k: np.array([label in row[:k] for row, label in zip(order, labels)]) for k in (1, 5)}
    assert got["zs_top1"] == pytest.approx(hits[1].mean())
    assert got["zs_top5"] == pytest.approx(hits[5].mean())
    by_class = {"abcdefg"[k]: hits[1][labels == k].mean() for k in labels.unique()}
    assert got["zs_class_top1"] == pytest.approx(by_class) and len(by_class) < 7
    assert got["zs_per_class"] == pytest.approx(np.mean(list(by_class.values())))
    assert (got["n_images"], got["n_classes"], got["chance_top1"]) == (50, 7, 1 / 7)


def test_calibration_equals_a_slow_count_on_the_half_that_did_not_fit():
    """Guo et al. 2017, equation 3, bin by bin; the temperature is the best of a fine grid."""
    images, classes = unit_rows(400, 8, 9), unit_rows(5, 8, 10)
    chances = (4 * images @ classes.T).softmax(dim=1)
    labels = chances.multinomial(1, generator=torch.Generator().manual_seed(11))[:, 0]
    got = evaluation.calibration(images, classes, labels, torch.tensor(10.0).log())
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    for suffix, divisor in (("", 1.0), ("_scaled", got["zs_temperature"])):
        logits, answers = 10 / divisor * images @ classes.T, labels[order[200:]].numpy()
        probabilities = logits[order[200:]].softmax(dim=1).numpy()
        top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == answers
        bins = [(k / 15 < top) & (top <= (k + 1) / 15) for k in range(15)]
        error = sum(b.mean() * abs(top[b].mean() - right[b].mean()) for b in bins if b.any())
        assert got[f"zs_ece{suffix}"] == pytest.approx(error, abs=1e-5)
        nll = -np.log(probabilities[np.arange(200), answers]).mean()
        assert got[f"zs_nll{suffix}"] == pytest.approx(nll, abs=1e-5)
    grid, logits = np.exp(np.linspace(-2, 3, 2001)), 10 * images[order[:200]] @ classes.T
    losses = [F.cross_entropy(logits / t, labels[order[:200]]).item() for t in grid]
    assert got["zs_temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


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
    got = evaluation.embed_captions(model, [*captions, captions[0]], batch_size=2)
    assert torch.equal(got[0], got[3]), "equal captions tie to the bit"
    got = evaluation.embed_captions(model, captions, pooled=True)
    with torch.no_grad():
        wanted = model.text_model(**model.processor(text=captions)).pooler_output
    assert torch.allclose(got, wanted, atol=1e-5)


def test_measuring_leaves_model_and_generators_as_they_were(make_model, images):
    model = make_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    captions = [[text] for text in ("two dogs", "fox", "star", "circle")]
    pairs = dualenc.Pairs(list("abcd"), images, captions, [0, 1, 0, 1], ["dog", "fox"])
    torch.set_float32_matmul_precision("medium")
    evaluation.evaluate(model, pairs)
    assert model.training and torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_given_features_stand_in_for_the_tower(make_model, images):
    """And what comes of weights that are not numbers is refused."""
    model = make_model()
    pairs = dualenc.Pairs(list("abcd"), images, [[c] for c in ("two dogs", "fox", "star", "a")])
    wanted = evaluation.evaluate(model, pairs)
    features = evaluation.embed_images(model, images, pooled=True)
    model.vision_model = None
    assert evaluation.evaluate(model, pairs, image_features=features) == wanted
    torn = evaluation.evaluate(model, pairs, image_features=(features[0], {3: "torn"}))
    assert torn["retrieval"]["n_images"] == 3, "an unreadable image is measured by its row of 0"
    model.visual_projection.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluation.evaluate(model, pairs, image_features=features)
    model.processor = None
    with pytest.raises(ValueError, match="no processor"):
        evaluation.evaluate(model, pairs, image_features=features)


def embed_in_one_process(rank, model, images, captions, paths):
    files = dualenc.Lazy(paths, dualenc.open_image)
    return (
        evaluation.embed_images(model, images, batch_size=2)[0],
        evaluation.embed_captions(model, captions, batch_size=2),
        evaluation.embed_images(model, files, batch_size=1),
        evaluation.embed_images(model, images[:1], batch_size=2, pooled=True)[0],
    )


def test_processes_share_the_work_and_agree(make_model, images, tmp_path):
    """Three batches for two processes, unreadable files for both, and a share of nothing."""
    model, images, captions = make_model(), [*images, images[0]], ["two dogs", "fox", "a star", "b"]
    given = model, images, captions, [str(tmp_path / name) for name in "ab"]
    alone = embed_in_one_process(0, *given)
    for rows in in_processes(2, embed_in_one_process, *given):
        assert rows[2][1] == alone[2][1] and len(alone[2][1]) == 2
        assert rows[2][0].count_nonzero() == 0
        for k in (0, 1, 3):
            assert torch.allclose(rows[k], alone[k], atol=1e-6)


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
    with pytest.raises(ValueError, match="none of the images can be read: cannot read e"):
        stored("e")
    broken.clear()
    assert stored("aec") == (1, {}) and stored("aec") == (0, {})
    next((tmp_path / "store").glob("*.safetensors")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read .*rows.safetensors"):
        stored("aec")


def test_the_key_changes_with_whatever_changes_a_row(make_model):
    sides, model = ("image_embeds", "image_features", "text_features"), make_model()
    first = {side: evaluation.cache_key(model, "fp32", side) for side in sides}
    assert evaluation.cache_key(model, "bf16", sides[0]) not in first.values()

    def changed(model):
        model.processor(text="a", max_length=4)  # leaves a limit of its own in the tokenizer
        return [k for k in sides if evaluation.cache_key(model, "fp32", k) != first[k]]

    assert len(set(first.values())) == 3 and changed(make_model()) == [], "content alone decides"
    model.image_head = torch.nn.Linear(2, 2)  # a projection by any name
    assert changed(model) == ["image_embeds"], "not what towers pool"
    model = make_model()
    transform = model.processor.image_transform
    model.processor.image_transform = dataclasses.replace(transform, mean=(0.1, 0.2, 0.3))
    assert changed(model) == ["image_embeds", "image_features"]
    model = make_model()
    model.processor.max_length = 5
    assert changed(model) == ["text_features"]


# ---- Probe, k-NN, binding ------------------------------------------------------------------------


def blobs(n, n_classes=4, width=6, seed=12, spread=1.5):
    """Points around a centre for each class, with a one at the end; labels."""
    centres = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % n_classes
    points = centres[labels] + spread * noise
    return torch.cat([points, torch.ones(n, 1)], dim=1).double(), labels


def test_logistic_regression_stands_where_the_gradient_is_zero(penalty=0.01):
    """The objective is convex, so a zero gradient (by hand: residuals times features) proves it."""
    features, labels = blobs(200)
    weights = evaluation.fit_logistic(features, labels, penalty, features.new_zeros(7, 4))
    probabilities = (features @ weights).softmax(dim=1)
    residuals = (probabilities - F.one_hot(labels, 4)) / len(labels)
    gradient = features.T @ residuals
    gradient[:-1] += penalty * weights[:-1]  # the bias is not penalised
    assert gradient.abs().max() < 1e-4


def test_nearest_neighbours_equal_a_slow_vote():
    (train, labels), (test, _) = blobs(90), blobs(33, seed=14)
    got = evaluation.nearest_neighbours(train, labels, test, 4, rows=7)
    for row, guess in zip(test, got):
        cosines = F.cosine_similarity(train, row[None])
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
    labels = torch.arange(40) % 2
    features = torch.stack([labels * 4.0 + torch.arange(40) / 40, torch.full((40,), 3.0)], dim=1)
    context = SimpleNamespace(train=(features, labels), image_features=features, labels=labels)
    context.pairs = SimpleNamespace(classes=["low", "high"])
    fit = Mock(wraps=evaluation.fit_logistic)
    monkeypatch.setattr(evaluation, "fit_logistic", fit)
    got = evaluation.probe_task(context)
    assert got["probe_top1"] == got["probe_16shot_top1"] == 1, "also with a constant feature"
    assert max(len(call.args[0]) for call in fit.call_args_list) == got["n_train"] == 32


def test_a_bag_of_words_passes_the_control_and_fails_binding(monkeypatch):
    """Ties count as wrong, also those that rounding hides."""
    pairs = dualenc.ShapesPairs("test", count=64)
    captions = [[*pairs.captions[i], *pairs.hard_negatives(i).values()] for i in range(64)]
    distinct = sorted({caption for row in captions for caption in row})
    words = sorted({word for caption in distinct for word in caption.split()})
    counts = [[caption.split().count(word) for word in words] for caption in distinct]
    exact = F.normalize(torch.tensor(counts).float(), dim=1)
    noise = 2e-7 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    row_of = dict(zip(distinct, exact + noise))

    def embed(model, captions, *options):
        return torch.stack([row_of[caption] for caption in captions])

    monkeypatch.setattr(evaluation, "embed_captions", embed)
    rows = embed(None, [row[0] for row in captions])
    context = SimpleNamespace(pairs=pairs, image_embeds=rows, model=None, options=())
    monkeypatch.setattr(evaluation, "BINDING_KINDS", evaluation.BINDING_KINDS[::-1])
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
    return class_folders(tmp_path / "photos", "dog", "fox", "red_star")


@pytest.fixture
def table(tmp_path):
    """A caption file of 40 images."""
    images = (Image.new("RGB", (16, 16), (6 * i, 0, 0)) for i in range(40))
    captions = ([f"red number {i}"] for i in range(40))
    return write_table(tmp_path / "table", zip(images, captions))


def run_on(checkpoint, spec):
    """Make the checkpoint's folder a run on this data; how many images it held out."""
    flags = {"data": str(spec), "val_fraction": 0.3, "templates": "", "seed": 0}
    names = dualenc.load_pairs(spec, "all").names
    trained_on = dualenc.load_pairs(spec, "train", val_fraction=0.3).names
    record = {"flags": flags, "data_names": evaluation.data_checksum(names)}
    (checkpoint.parent / dualenc.RUN_CONFIG).write_text(json.dumps(record))
    (checkpoint.parent / "trained_on.txt").write_text("\n".join(trained_on) + "\n")
    return len(names) - len(trained_on)


def test_the_script_prints_tables_and_writes_the_metrics(checkpoint, colours, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    flags = ["--data", str(colours), "--task", "all", "--json", str(out), "--report", str(tmp_path)]
    results = evaluation.main([str(checkpoint), *flags])
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote       {out}\nwrote       {tmp_path}\n")
    assert json.loads(out.read_text()) == results
    assert list(results) == ["retrieval", "zeroshot", "probe", "knn"]
    for name in ("probe", "knn"):
        assert results[name][f"{name}_top1"] == 1 and results[name]["n_images"] == 18
    assert "test, 18 of 78 images" in printed and "chance_top1 0.3333\n" in printed
    assert f"{results['zeroshot']['zs_top1']:.3f}" in printed
    wanted = {f"{way}_{what}" for way in ("i2t", "t2i") for what in ("r1", "r5", "medr", "mrr")}
    assert wanted | {"n_images", "n_captions", "chance_r1"} <= set(results["retrieval"])
    wanted = {"zs_top1", "zs_top5", "zs_per_class", "n_images", "n_classes", "chance_top1"}
    assert wanted <= set(results["zeroshot"])


def test_other_data_without_a_test_part_is_measured_whole(checkpoint, table, capsys):
    hashed, lines = len(dualenc.load_pairs(table, "test")), table.with_suffix(".jsonl")
    pairs = dualenc.load_pairs(table, "all")
    records = [{"image": n, "text": text} for n, text in zip(pairs.names, pairs.captions)]
    lines.write_text("\n".join(map(json.dumps, records)))
    for flags, wanted in (([], 40), (["--split", "all"], 40), (["--split", "test"], hashed)):
        results = evaluation.main([str(checkpoint), "--data", str(lines), *flags])
        assert results["retrieval"]["n_images"] == wanted
        assert f"{wanted} of 40 images" in capsys.readouterr().out


def test_a_run_is_measured_by_its_own_seed_and_with_its_own_images(table, tmp_path):
    listed = shutil.copy(table, tmp_path / "listed.csv")
    (tmp_path / "trained_on.txt").touch()
    for flags in ({"data": "shapes", "seed": 3}, {"data": listed, "images": table.parent}):
        (tmp_path / dualenc.RUN_CONFIG).write_text(json.dumps({"flags": flags}, default=str))
        name = evaluation.open_data(evaluation.EvalConfig(), tmp_path / "best")[0]["pairs"].names[0]
        assert name.startswith("shapes/3/") == ("seed" in flags)


def test_a_run_knows_its_data_wherever_it_lies(checkpoint, table, tmp_path, capsys):
    """Its own val_fraction holds, and nothing that was trained on is measured."""
    held_out = run_on(checkpoint, table)
    assert 4 < held_out < 36
    shutil.copytree(table.parent, tmp_path / "moved")
    record = checkpoint.parent / dualenc.RUN_CONFIG
    old = json.dumps({"flags": json.loads(record.read_text())["flags"]})  # without the checksum
    new, moved = record.read_text(), tmp_path / "moved" / "captions.csv"
    for flags, content in (([], new), (["--data", str(moved)], new), (["--data", str(table)], old)):
        record.write_text(content)
        got = evaluation.main([str(checkpoint.parent), *flags])
        assert got["retrieval"]["n_images"] == held_out
        said = capsys.readouterr().out
        assert f"{held_out} of 40 images   the run's own data" in said and "trained on" not in said
    (moved.parent / "again.csv").write_text(moved.read_text().partition("\n39.png")[0])
    trained_on = (checkpoint.parent / "trained_on.txt").read_text().split()
    for data, n in ((table, 40), (moved.with_name("again.csv"), 39)):
        evaluation.main([str(checkpoint), "--data", str(data), "--split", "all"])
        seen = len(set(trained_on) & {f"{i}.png" for i in range(n)})
        assert f"{n} of {n} images" in (said := capsys.readouterr().out)
        assert f"the run trained on {seen} of them" in said


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
    (tmp_path / "mine.txt").write_text("the {}\n\na {}\n")
    flags += [str(tmp_path / "names.txt"), "--templates", str(tmp_path / "mine.txt")]
    got = evaluation.main(flags)["zeroshot"]
    assert list(got["zs_class_top1"]) == ["poodle", "vixen", "sun"] and got["n_templates"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "is not from a run.*give --data"),
        ("--data shapes --task zeroshot", "zeroshot needs data with classes, and this has none"),
        ("--data FOLDER --task probe --split train", "probe needs data with training_pairs"),
        ("--data shapes --templates clip8", "unknown .*templates 'clip8'; expected clip7, plain"),
        ("--data shapes --out found.png", "--out are for --task search, and --task is auto"),
        ("--data FOLDER --task search", "search needs --query"),
        (
            "--data FOLDER --task search --query fox --out found",
            "--out is found, expected an image file",
        ),
        ("--data FOLDER --task search --query no.jpg", "cannot read image no.jpg"),
    ],
)
def test_what_cannot_be_measured_is_refused(checkpoint, colours, flags, message):
    flags = flags.replace("FOLDER", str(colours)).split()
    with pytest.raises(ValueError, match=message):
        evaluation.main([str(checkpoint), *flags])


def test_one_unreadable_image_is_left_out_and_more_stop(checkpoint, colours, capsys):
    flags = [str(checkpoint), "--data", str(colours)]
    (colours / "test" / "dog" / "0.png").write_bytes(b"torn")
    assert evaluation.main(flags)["zeroshot"]["n_images"] == 17
    assert "skipped     1 of 18 images: " in capsys.readouterr().out
    (colours / "test" / "dog" / "1.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="2 of 18 images: .*0.png"):
        evaluation.main(flags)


def test_all_leaves_out_tasks_without_training_images(checkpoint, colours, table):
    """Class folders without a test part are measured whole, and nothing is left to learn from."""
    flags = [str(checkpoint), "--data", str(colours / "train"), "--task"]
    assert list(evaluation.main([*flags, "all"])) == ["retrieval", "zeroshot"]
    flags[2:3] = str(table), "--split", "val"
    assert list(evaluation.main([*flags, "all"])) == ["retrieval"]
    model, pairs = dualenc.DualEncoder.from_pretrained(checkpoint), dualenc.load_pairs(colours)
    others = dualenc.Pairs(pairs.names, pairs.images, pairs.captions, pairs.labels, ["other"] * 2)
    with pytest.raises(ValueError, match="need the same classes in training and test data"):
        evaluation.evaluate(model, pairs, ["knn"], training_pairs=others)
    shutil.rmtree(colours / "train")
    with pytest.raises(ValueError, match="the train part of .* has no images"):
        evaluation.main([str(checkpoint), "--data", str(colours), "--split", "train"])


def test_a_new_task_is_one_row(monkeypatch, checkpoint, table, capsys):
    """In auto, in the printout, by name; a row that lacks something raises."""
    task = evaluation.Task("Light", True, True, "captions", lambda context: {"brightness": 0.5})
    monkeypatch.setitem(evaluation.TASKS, "brightness", task)
    got = evaluation.main([str(checkpoint), "--data", str(table)])
    assert list(got) == ["retrieval", "brightness"]
    assert "brightness   0.500" in capsys.readouterr().out
    with pytest.raises(TypeError):
        evaluation.Task("Light", True, True, "captions")


# ---- Search --------------------------------------------------------------------------------------


def search(checkpoint, folder, query="two dogs", *more):
    flags = ["--data", str(folder), "--task", "search", "--precision", "fp32", "--query", query]
    return evaluation.main([str(checkpoint), *flags, *more])["search"]


def test_search_ranks_all_images_of_a_folder_by_cosine(checkpoint, colours, tmp_path, capsys):
    found = search(checkpoint, colours, "two dogs", "--top", "7", f"--out={tmp_path}/b/a.png")
    model = dualenc.DualEncoder.from_pretrained(checkpoint)
    names = sorted(path.relative_to(colours).as_posix() for path in colours.rglob("*.png"))
    with torch.no_grad():
        query = model.encode_text(**model.processor(text="two dogs"))[0]
        opened = [dualenc.open_image(str(colours / name)) for name in names]
        rows = model.encode_image(model.processor(images=opened)["pixel_values"])
    scores = dict(zip(names, (rows @ query).tolist()))
    best = sorted(names, key=lambda name: -scores[name])[:7]
    assert found["found"] == pytest.approx({name: scores[name] for name in best}, abs=1e-5)
    assert list(found["found"]) == best and found["n_images"] == 78
    said = capsys.readouterr().out
    assert best[0] in said and f"\nwrote       {tmp_path}/b/a.png" in said and "95%" not in said
    assert Image.open(tmp_path / "b/a.png").size == (8 + 5 * 168, 8 + 2 * 168), "rows of five"
    query = shutil.copy(colours / names[5], tmp_path / "QUERY.PNG")
    found = search(checkpoint, colours, str(query))["found"]
    assert found[names[5]] == pytest.approx(1, abs=1e-4), "an image finds itself"


def test_the_index_is_kept_and_follows_the_files(checkpoint, table):
    folder = table.parent
    assert [search(checkpoint, folder)["n_indexed"] for _ in range(2)] == [40, 0]
    Image.new("RGB", (9, 9), "blue").save(folder / "0.png")
    Image.new("RGB", (9, 9), "red").save(folder / "new.jpg")
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"torn")
    found = search(checkpoint, folder, "two dogs", "--top", "99")
    assert (found["n_indexed"], found["n_images"], found["unreadable"]) == (2, 40, "4.png")
    assert len(found["found"]) == 39 and not {"3.png", "4.png"} & set(found["found"])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="search needs data with images, and this has none"):
        search(checkpoint, folder / "empty")


def test_stores_lie_hidden_beside_the_data_or_in_data_root(checkpoint, table, monkeypatch):
    assert search(checkpoint, table)["n_images"] == 40
    assert (table.parent / ".captions.csv.all.index").is_dir()
    monkeypatch.chdir(table.parent)
    assert evaluation.store_folder("shapes", "x", "root").as_posix() == "root/.shapes.x"
    shards = evaluation.store_folder("shard-{0..3}.tar", "x")
    assert shards == table.with_name(".shard-{0..3}.tar.x")
