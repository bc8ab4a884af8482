"""Claims about --micro-batch: the gradient of the whole batch, from pieces that are embedded one after the other."""

import copy
import math
import weakref

import pytest
import torch

import dualenc
import train

LOSSES = ("clip", "siglip", "multi-positive")
CAPTIONS = ["two dogs", "fox", "a small red circle left of a large blue star", "star", "two dogs", "a photo", "the fox"]
GROUPS = torch.tensor([0, 1, 2, 3, 0, 4, 5])


@pytest.fixture(autouse=True)
def pixels_in_float64(monkeypatch):
    """With weights in float64 too, what differs beyond the last digits differs."""
    normalize = dualenc.ImageTransform.normalize
    monkeypatch.setattr(dualenc.ImageTransform, "normalize", lambda self, image: normalize(self, image).double())


def random_batch(count=7):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return train.Batch(images, (CAPTIONS * count)[:count], list(range(count)), {})


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


class WatchedEmbedder(train.Embedder):
    """Notes of each call the pieces, whether a graph was made, and what the dropout was drawn from."""

    def __init__(self, model):
        super().__init__(model, "fp32")
        self.calls = []

    def forward(self, piece):
        self.calls.append((piece, torch.is_grad_enabled(), torch.get_rng_state()))
        return super().forward(piece)


@pytest.mark.parametrize("tiled_from", [1, 10_000])
@pytest.mark.parametrize("locked", ["", "vision", "text"])
@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_give_the_gradient_of_one_graph_through_all_of_them(loss, locked, tiled_from, make_model, monkeypatch):
    """Dropout and patch dropout included: the reference embeds the same pieces from the same generator states."""
    monkeypatch.setattr(train, "TILED_FROM", tiled_from)
    bias = {"logit_bias_init": -2.0} if loss == "siglip" else {}
    model = make_model(text_dropout=0.3, vision_patch_dropout=0.4, **bias).double().train()
    if locked:
        model.lock(locked)
    embed, config = WatchedEmbedder(model), train.TrainConfig(loss=loss, batch_size=7, micro_batch=3)
    got_loss, images, texts = train.compute_gradient(model, embed, config, random_batch(), GROUPS)
    got = gradients(model)
    assert ("logit_scale" in got) and ("logit_bias" in got) == (loss == "siglip")

    first_pass = [(piece, state) for piece, with_graph, state in embed.calls if not with_graph]
    assert [len(piece.images) for piece, _ in first_pass] == [2, 2, 3]
    embeds = []
    for piece, state in first_pass:
        torch.set_rng_state(state)
        embeds.append(train.Embedder(model, "fp32")(piece))
    all_images, all_texts = (torch.cat(side) for side in zip(*embeds))
    if loss == "multi-positive":
        expected = dualenc.multi_positive_clip_loss(all_images, all_texts, model.logit_scale, GROUPS)
    elif loss == "siglip":
        expected = dualenc.siglip_loss(all_images, all_texts, model.logit_scale, model.logit_bias)
    else:
        expected = dualenc.clip_loss(all_images, all_texts, model.logit_scale)
    model.zero_grad()
    expected.backward()
    assert_equal(got, gradients(model))
    assert_equal({"loss": got_loss, "images": images}, {"loss": expected.detach(), "images": all_images.detach()})
    assert not images.requires_grad and torch.equal(texts, all_texts.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_without_dropout_a_step_in_pieces_is_the_plain_step(loss, make_model):
    """Weights after the update, and everything that is logged."""
    results = []
    for micro_batch in (0, 3, 7, 100):
        model = make_model(logit_bias_init=-2.0 if loss == "siglip" else None).double().train()
        config = train.TrainConfig(loss=loss, batch_size=7, micro_batch=micro_batch, lr=1e-2)
        optimizer = train.make_optimizer(model, config)
        for _ in range(3):
            values = train.train_step(model, optimizer, config, random_batch(), GROUPS, "fp32")
        results.append({**{name: torch.tensor(value) for name, value in values.items()}, **model.state_dict()})
    for got in results[1:]:
        assert_equal(got, results[0])


def test_adding_up_the_losses_of_pieces_would_be_another_gradient(make_model):
    """Why there is no naive accumulation: each pair would miss the wrong answers of the other pieces."""
    model, batch = make_model().double().train(), random_batch()
    config = train.TrainConfig(batch_size=7, micro_batch=3)
    train.compute_gradient(model, train.Embedder(model, "fp32"), config, batch, GROUPS)
    exact = torch.cat([grad.flatten() for grad in gradients(model).values()])
    model.zero_grad()
    for piece in train.split_batch(batch, model.processor, 3):
        loss = dualenc.clip_loss(*train.Embedder(model, "fp32")(piece), model.logit_scale)
        (loss * piece.count / 7).backward()
    naive = torch.cat([grad.flatten() for grad in gradients(model).values()])
    assert torch.cosine_similarity(exact, naive, dim=0) < 0.99


def test_batch_norm_counts_each_picture_once(make_model):
    """Two passes, one update of the statistics a piece, as if the pieces had been embedded once."""
    model = make_model("test_resnet").double().train()
    twin, batch = copy.deepcopy(model), random_batch()
    config = train.TrainConfig(batch_size=7, micro_batch=3)
    train.compute_gradient(model, train.Embedder(model, "fp32"), config, batch, GROUPS)
    with torch.no_grad():
        for part in (slice(0, 2), slice(2, 4), slice(4, 7)):
            twin.encode_image(twin.processor.image_transform.normalize(batch.images[part]))
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert int(next(b for name, b in model.named_buffers() if "num_batches_tracked" in name)) == 3


def test_a_step_in_pieces_that_is_not_finite_leaves_everything_as_it_was(make_model, monkeypatch):
    model = make_model("test_resnet").double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(train, "compute_loss", lambda name, model, *_: dualenc.clip_loss(*_[:2], model.logit_scale / 0))
    config = train.TrainConfig(batch_size=7, micro_batch=3)
    optimizer = train.make_optimizer(model, config)
    assert train.train_step(model, optimizer, config, random_batch(), GROUPS, "fp32") is None
    assert_equal(model.state_dict(), before)


def test_bf16_pieces_come_close_to_float32_ones(make_model, monkeypatch):
    monkeypatch.undo()  # pixels in float32
    losses = {}
    for precision in ("fp32", "bf16"):
        model, config = make_model().train(), train.TrainConfig(batch_size=7, micro_batch=3)
        optimizer = train.make_optimizer(model, config)
        losses[precision] = train.train_step(model, optimizer, config, random_batch(), GROUPS, precision)["loss"]
        assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())
    assert losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def saved_for_backward(step):
    """The most bytes that autograd held for the backward pass at any moment of step()."""
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor, size = tensor, tensor.numel() * tensor.element_size()
            held += size
            most = max(most, held)
            weakref.finalize(self, self.release, size)

        @staticmethod
        def release(size):
            nonlocal held
            held -= size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step()
    return most


def test_memory_follows_the_piece_not_the_batch(make_model):
    """64 pairs in pieces of 4 hold less than an eighth of the activations, and no more than twice the pairs do."""

    def step(count, micro_batch):
        model = make_model().double().train()
        embed, config = train.Embedder(model, "fp32"), train.TrainConfig(batch_size=count, micro_batch=micro_batch)
        batch = random_batch(count)
        return saved_for_backward(lambda: train.compute_gradient(model, embed, config, batch, torch.arange(count)))

    plain, pieces, more_pieces = step(64, 0), step(64, 4), step(128, 4)
    assert pieces < plain / 8
    assert more_pieces < 1.2 * pieces


def test_pieces_are_even_and_padded_to_their_own_longest_caption(make_model):
    processor = make_model().processor
    pieces = train.split_batch(random_batch(), processor, 3)
    assert [piece.count for piece in pieces] == [2, 2, 3] == [len(piece.captions["input_ids"]) for piece in pieces]
    for piece in pieces:
        assert piece.captions["attention_mask"].sum(dim=1).max() == piece.captions["input_ids"].shape[1]
    assert len({piece.captions["input_ids"].shape[1] for piece in pieces}) > 1
    assert torch.equal(torch.cat([piece.images for piece in pieces]), random_batch().images)
    [whole] = train.split_batch(random_batch(), processor, 0)
    assert whole.count == 7
    sizes = {size: train.piece_size(train.TrainConfig(batch_size=7, micro_batch=size)) for size in (0, 3, 6, 7, 100)}
    assert sizes == {0: 0, 3: 3, 6: 6, 7: 0, 100: 0}, "one piece is a plain step: nothing to embed twice"


def test_shares_cover_everything_once_and_are_even():
    for count in range(20):
        for parts in range(1, 8):
            slices = dualenc.shares(count, parts)
            numbers = [list(range(count))[part] for part in slices]
            assert sum(numbers, []) == list(range(count)) and len(numbers) == parts
            assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
            assert max(map(len, numbers)) == math.ceil(count / parts)


def test_accuracy_by_tiles_is_that_of_the_whole_matrix(monkeypatch):
    """Both directions, in tiles that do not divide the batch; the slow version ranks the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(50, 8, generator=generator) for _ in range(2))
    groups = torch.randint(0, 6, (50,), generator=generator)
    cosines = images @ texts.T
    right = [groups[cosines[i].argmax()] == groups[i] for i in range(50)]
    right += [groups[cosines[:, i].argmax()] == groups[i] for i in range(50)]
    for tile in (7, 50, 64):
        monkeypatch.setattr(dualenc, "TILE", tile)
        assert train.in_batch_accuracy(images, texts, groups) == pytest.approx(sum(right).item() / 100)


@pytest.mark.parametrize("name", LOSSES)
def test_large_batches_take_the_tiled_losses_and_small_ones_the_textbook(name, make_model, monkeypatch):
    model, taken = make_model(logit_bias_init=-2.0), []
    embeds = [torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2)]
    textbook, tiled = train.LOSSES[name]

    def note(kind, loss):
        return lambda *arguments, **more: (taken.append(kind), loss(*arguments, **more))[1]

    monkeypatch.setitem(train.LOSSES, name, (note("textbook", textbook), note("tiled", tiled)))
    values = []
    for tiled_from in (7, 6):
        monkeypatch.setattr(train, "TILED_FROM", tiled_from)
        values.append(train.compute_loss(name, model, *embeds, torch.tensor([0, 1, 2, 0, 1, 3])))
    assert taken == ["textbook", "tiled"]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(("lock", "said"), [("", True), ("vision", False)])
def test_the_printout_says_what_batch_norm_sees(lock, said, make_model, capsys):
    model, pairs = make_model("test_resnet").train(), dualenc.ShapesPairs(count=4)
    if lock:
        model.lock(lock)
    for micro_batch, line in ((3, said), (0, False), (8, False)):
        config = train.TrainConfig(batch_size=8, micro_batch=micro_batch)
        train.introduce(config, model, pairs, pairs, (2.0, 0.0), 1, torch.device("cpu"), "fp32")
        assert ("batch norm sees 3 pictures or fewer at a time" in capsys.readouterr().out) == line


def test_a_negative_micro_batch_is_refused():
    pairs = dualenc.ShapesPairs(count=300)
    with pytest.raises(ValueError, match="--micro-batch is -1, expected at least 0"):
        train.check_recipe(train.TrainConfig(micro_batch=-1), pairs, pairs)
