"""Claims about large batches: tiled losses, gradient caching and gathering give what the plain computation gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fails_like, in_processes
from references import Memory

import dualenc

# Each loss with its tiled form, and whether it takes a bias or group ids beside embeddings and scale.
LOSSES = {
    "clip": (dualenc.clip_loss, dualenc.tiled_clip_loss),
    "siglip": (dualenc.siglip_loss, dualenc.tiled_siglip_loss),
    "multi-positive": (dualenc.multi_positive_clip_loss, dualenc.tiled_multi_positive_clip_loss),
}


def loss_inputs(name, B, dtype=torch.float64, scale=14.28, seed=0):
    """(image_embeds, text_embeds, logit_scale, logit_bias or group_ids where the loss takes them)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(B, 16, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)]
    inputs = [*rows, torch.tensor(math.log(scale), dtype=torch.float64)]
    inputs += [torch.tensor(-3.0, dtype=torch.float64)] if name == "siglip" else []
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    groups = torch.randint(100, 100 + B // 4, (B,), generator=generator)
    return inputs + ([groups] if name == "multi-positive" else [])


def value_and_gradients(loss, inputs, **options):
    """The loss times 3 (so that a forgotten outer gradient shows), and the gradient of each input that has one."""
    learned = [tensor for tensor in inputs if tensor.requires_grad]
    value = 3 * loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, learned)]


@pytest.mark.parametrize("kept", [0, 2 * 16**2, 10**9])
@pytest.mark.parametrize("name", LOSSES)
def test_tiled_losses_equal_the_textbook_ones(name, kept, monkeypatch):
    """Value and every gradient, with tiles that do not divide the batch, whether scores are kept or computed again."""
    monkeypatch.setattr(dualenc, "KEPT_SCORES", kept)
    textbook, tiled = LOSSES[name]
    for B, tile in ((50, 16), (48, 16), (7, 16), (5, 1)):
        inputs = loss_inputs(name, B)
        right = value_and_gradients(textbook, inputs)
        for got, expected, what in zip(
            value_and_gradients(tiled, inputs, tile=tile), right, ("loss", "images", "texts", "logit_scale", "bias")
        ):
            mistakes = {
                "a forgotten outer gradient": expected / 3,
                "one direction only": expected / 2,
                "sum, not mean": B * expected,
            }
            fails_like(got, expected, mistakes, f"{name}: {what} at B = {B}, tile = {tile}", 1e-10)


@pytest.mark.parametrize("scale", [1.0, 14.28, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_tiled_losses_hold_at_every_temperature_in_float32(name, scale):
    """At the clamp of 100, scores differ by up to 200: exp of them overflows float32, their log-sum-exp does not."""
    textbook, tiled = LOSSES[name]
    inputs = loss_inputs(name, 64, torch.float32, scale)
    with torch.no_grad():  # half of the pairs are right to the last bit, half are opposites
        inputs[1][:32] = inputs[0][:32]
        inputs[1][32:] = -inputs[0][32:]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    for got, expected in zip(
        value_and_gradients(tiled, inputs, tile=24), value_and_gradients(textbook, exact), strict=True
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_tiled_losses_never_hold_the_matrix(name):
    """No tensor larger than a tile or the embeddings is ever made, forward or backward; the textbook's are B x B."""
    textbook, tiled = LOSSES[name]
    B, tile = 256, 32
    for loss, options, largest in ((textbook, {}, B * B), (tiled, {"tile": tile}, max(B * 16, tile * tile))):
        with Memory() as seen:
            value_and_gradients(loss, loss_inputs(name, B), **options)
        assert seen.largest == largest


def test_kept_scores_stay_within_their_limit_and_are_taken_out_once():
    kept, images, texts = {}, *loss_inputs("clip", 40)[:2]
    first = [scores.clone() for *_, scores in dualenc.score_tiles(images, texts, tile=8, kept=kept, keep=3 * 8**2)]
    assert len(first) == 25 and len(kept) == 3
    for place in kept:
        kept[place] = kept[place] + 1  # if these are read, they show
    again = [scores for *_, scores in dualenc.score_tiles(images, texts, tile=8, kept=kept)]
    assert sum(not torch.equal(one, two) for one, two in zip(first, again)) == 3 and not kept


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward_pass_through_a_tiled_loss_gives_the_same_gradients(name):
    """The first one overwrites the scores that were kept for it."""
    inputs = loss_inputs(name, 12)
    loss, leaves = LOSSES[name][1](*inputs, tile=4), [leaf for leaf in inputs if leaf.requires_grad]
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for one, two in zip(once, twice, strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize("name", LOSSES)
def test_tiled_losses_refuse_what_the_textbook_ones_refuse(name):
    inputs = loss_inputs(name, 6)
    for loss in LOSSES[name]:
        with pytest.raises(ValueError, match="must have one shape"):
            loss(inputs[0], inputs[1][:5], *inputs[2:])
        if name == "multi-positive":
            with pytest.raises(ValueError, match="one id a row"):
                loss(*inputs[:3], inputs[3][:5])


# ---- Gradient caching -----------------------------------------------------------------------------------------------


class Towers(torch.nn.Module):
    """Two small networks with dropout, and what the losses learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.images, self.texts = (
            torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(24, 8))
            for _ in range(2)
        )
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-1.0))
        self.double()

    def forward(self, piece):
        return tuple(F.normalize(tower(rows), dim=-1) for tower, rows in zip((self.images, self.texts), piece))

    def loss(self, name, image_embeds, text_embeds):
        extra = {"clip": [], "siglip": [self.logit_bias], "multi-positive": [torch.arange(len(image_embeds)) % 7]}[name]
        return LOSSES[name][0](image_embeds, text_embeds, self.logit_scale, *extra)

    def loss_weights(self, name):
        return [self.logit_scale, self.logit_bias] if name == "siglip" else [self.logit_scale]

    def gradients(self):
        return {name: weight.grad for name, weight in self.named_parameters() if weight.grad is not None}


def some_pieces(*sizes):
    torch.manual_seed(5)
    return [(torch.randn(b, 12, dtype=torch.float64), torch.randn(b, 12, dtype=torch.float64)) for b in sizes]


@pytest.mark.parametrize("name", LOSSES)
def test_cached_backward_equals_one_graph_over_all_pieces(name):
    """With dropout: one graph in which each piece is embedded from its seed, against the two passes."""
    pieces = some_pieces(8, 8, 5)
    plain, cached = Towers(), Towers()
    torch.manual_seed(11)
    seeds = torch.randint(2**62, (3,)).tolist()
    sides = []
    for piece, seed in zip(pieces, seeds):
        torch.manual_seed(seed)
        sides.append(plain(piece))
    loss = plain.loss(name, *(torch.cat(side) for side in zip(*sides)))
    loss.backward()

    torch.manual_seed(11)
    got, image_embeds, text_embeds = dualenc.cached_backward(
        cached, pieces, lambda *embeds: cached.loss(name, *embeds), cached.loss_weights(name)
    )
    assert got.item() == pytest.approx(loss.item(), abs=1e-12) and not image_embeds.requires_grad
    for side, embeds in zip(zip(*sides), (image_embeds, text_embeds)):
        assert torch.equal(torch.cat(side), embeds)
    expected = plain.gradients()
    assert cached.gradients().keys() == expected.keys() and "logit_scale" in expected
    for weight, gradient in cached.gradients().items():
        mistakes = {"a factor of the number of pieces": 3 * expected[weight], "doubled": 2 * expected[weight]}
        fails_like(gradient, expected[weight], mistakes, f"the gradient of {weight}", 1e-10)


def test_the_sum_of_small_batches_is_another_gradient():
    """Why naive accumulation is not offered: each pair needs the other pieces' rows as wrong answers."""
    pieces = some_pieces(*[4] * 8)
    exact, naive = Towers().eval(), Towers().eval()
    dualenc.cached_backward(exact, pieces, lambda *embeds: exact.loss("clip", *embeds), [exact.logit_scale])
    for piece in pieces:
        (naive.loss("clip", *naive(piece)) / len(pieces)).backward()
    flat = [torch.cat([g.flatten() for g in model.gradients().values()]) for model in (exact, naive)]
    assert F.cosine_similarity(*flat, dim=0) < 0.99


def test_cached_backward_holds_the_graph_of_one_piece_at_a_time():
    pieces, model, alive, most = some_pieces(*[4] * 6), Towers(), 0, 0

    def pack(tensor):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Saved(tensor)

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

        def __del__(self):
            nonlocal alive
            alive -= 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        model.loss("clip", *model(pieces[0])).backward()
        of_one, most = most, 0
        dualenc.cached_backward(model, pieces, lambda *embeds: model.loss("clip", *embeds), [model.logit_scale])
    assert alive == 0 and most <= 1.5 * of_one


# ---- Several processes ----------------------------------------------------------------------------------------------


def share_of_losses(rank, sizes):
    """{(loss, way): [value, gradients of own rows, of scale and bias]} for every loss, in both ways."""
    start, results = sum(sizes[:rank]), {}
    for name, (textbook, tiled) in LOSSES.items():
        for way in ("gathered", "sharded"):
            images, texts, *rest = loss_inputs(name, sum(sizes))
            own = slice(start, start + sizes[rank])
            images, texts = (side[own].detach().requires_grad_() for side in (images, texts))
            if name == "multi-positive":
                rest[-1] = rest[-1][own]
            if way == "gathered":
                if name == "multi-positive":
                    rest[-1] = dualenc.gather_embeds(rest[-1])
                inputs = [dualenc.gather_embeds(images), dualenc.gather_embeds(texts), *rest]
                value = textbook(*inputs)
            else:
                value = tiled(images, texts, *rest, tile=5, sharded=True)
            learned = [images, texts, *(tensor for tensor in rest if tensor.requires_grad)]
            gradients = torch.autograd.grad(value, learned)
            results[name, way] = [tensor.detach().numpy() for tensor in (value, *gradients)]
    return results


@pytest.mark.parametrize("sizes", [(8, 8), (9, 5, 2)], ids=["two equal shares", "three uneven shares"])
def test_gathered_rows_carry_gradients_back_to_their_process(sizes):
    """The mean over processes, which DistributedDataParallel takes, is value and gradient of one process's loss."""
    shares, count = in_processes(len(sizes), share_of_losses, sizes), len(sizes)
    for name, (textbook, _) in LOSSES.items():
        loss, images, texts, *rest = value_and_gradients(textbook, loss_inputs(name, sum(sizes)))
        for way in ("gathered", "sharded"):
            parts = [[torch.from_numpy(array) for array in share[name, way]] for share in shares]
            # The rows of a process reach its weights only: their sum over processes, divided by the count.
            got = [sum(part[0] for part in parts) / count]
            got += [torch.cat([part[side] for part in parts]) / count for side in (1, 2)]
            got += [sum(part[i] for part in parts) / count for i in range(3, len(parts[0]))]
            for value, expected in zip(got, (loss, images, texts, *rest), strict=True):
                mistakes = {
                    "a factor of the process count": expected / 3 * count,
                    "divided by the process count once too often": expected / 3 / count,
                }
                fails_like(value, expected / 3, mistakes, f"{name}, {way}, in {count} processes", 1e-10)


def gathered_ids(rank):
    rows = torch.arange(3 * (rank + 1)).view(-1, 3) + 100 * rank
    return dualenc.process_rank(), dualenc.process_count(), dualenc.gather_embeds(rows).tolist()


def test_rows_are_gathered_in_the_order_of_ranks_and_one_process_gathers_its_own():
    rows = [[0, 1, 2], [100, 101, 102], [103, 104, 105]]
    assert in_processes(2, gathered_ids) == [(0, 2, rows), (1, 2, rows)]
    alone = torch.ones(2, 3)
    assert dualenc.gather_embeds(alone) is alone
    assert (dualenc.process_rank(), dualenc.process_count()) == (0, 1)
