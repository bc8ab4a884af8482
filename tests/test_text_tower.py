"""Claims about the text tower, against a slow version that never sees padding at all."""

import math

import numpy as np
import pytest
import torch
from support import fails_like

import dualenc

CAPTION_IDS = [[4, 8, 2], [7, 3, 9, 12, 5], [11]]
TABLES = ("word", "position", "token_type")
FAMILIES = {
    "bert": {},
    "roberta": {"family": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"family": "distilbert", "type_vocab_size": 0},
}


def make_encoder(**overrides):
    sizes = {"width": 24, "depth": 2, "heads": 3, "vocab_size": 50, "max_positions": 20}
    torch.manual_seed(0)
    encoder = dualenc.build_tower(dualenc.TextConfig(**{**sizes, **overrides})).eval()
    for weight in encoder.parameters():  # every weight counts: no zero biases, no unit norms
        torch.nn.init.normal_(weight, std=0.4)
    return encoder.double()


def layer_norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def slow_attention(q, k, v, size):
    """One head and one query at a time."""
    mixed = np.zeros_like(q)
    for h, t in np.ndindex(q.shape[1] // size, len(q)):
        columns = slice(h * size, (h + 1) * size)
        shares = np.exp([q[t, columns] @ key[columns] / math.sqrt(size) for key in k])
        mixed[t, columns] = shares / shares.sum() @ v[:, columns]
    return mixed


def slow_encode(encoder, ids, positions, types=None):
    """Hidden states (depth + 1, T, W) of one caption without padding, in numpy."""
    config, weights = encoder.config, {n: w.numpy() for n, w in encoder.state_dict().items()}
    tables = {name: weights.get(f"embeddings.{name}_embeddings.weight") for name in TABLES}
    x = tables["word"][ids] + tables["position"][positions]
    if config.type_vocab_size:
        x = x + tables["token_type"][types or [0] * len(ids)]
    x = layer_norm(x, weights, "embeddings.LayerNorm", config.layer_norm_eps)
    states = [x]
    for layer in (f"encoder.layer.{n}" for n in range(config.depth)):
        parts = (f"{layer}.attention.self.{part}" for part in ("query", "key", "value"))
        qkv = [linear(x, weights, part) for part in parts]
        mixed = slow_attention(*qkv, config.width // config.heads)
        x = x + linear(mixed, weights, f"{layer}.attention.output.dense")
        x = layer_norm(x, weights, f"{layer}.attention.output.LayerNorm", config.layer_norm_eps)
        inner = linear(x, weights, f"{layer}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = x + linear(inner, weights, f"{layer}.output.dense")
        x = layer_norm(x, weights, f"{layer}.output.LayerNorm", config.layer_norm_eps)
        states.append(x)
    return np.stack(states)


def padded(side="right", pad=0):
    fill = [[pad] * (5 - len(ids)) for ids in CAPTION_IDS]
    rows = zip(CAPTION_IDS, fill) if side == "right" else zip(fill, CAPTION_IDS)
    input_ids = torch.tensor([first + second for first, second in rows])
    return input_ids, (input_ids != pad).long()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_the_caption_alone(family, side):
    """Every hidden state; attentions give padding no weight, and asking changes nothing."""
    encoder = make_encoder(**FAMILIES[family])
    pad = encoder.config.pad_token_id
    input_ids, mask = padded(side, pad)
    with torch.no_grad():
        plain = encoder(input_ids, mask)
        output = encoder(input_ids, mask, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == encoder.config.depth + 1
    for row, ids in enumerate(CAPTION_IDS):
        shift = 0 if side == "right" else input_ids.shape[1] - len(ids)
        # BERT counts columns, also with padding on the left.
        first = pad + 1 if family == "roberta" else shift
        right = slow_encode(encoder, ids, np.arange(first, first + len(ids)))
        for n, state in enumerate((*output.hidden_states, plain.last_hidden_state)):
            got, expected = state[row, shift:][: len(ids)], right[min(n, encoder.config.depth)]
            fails_like(got, expected, {}, f"hidden state {n} of row {row}", 1e-9)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 3, 5, 5)
    for weights in output.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(3, 3, 5).double())
        assert (weights * (1 - mask)[:, None, None, :]).abs().max() == 0


def test_token_types_and_positions_count_when_given():
    encoder = make_encoder()
    ids, types, positions = CAPTION_IDS[1], [0, 0, 1, 1, 1], [3, 1, 4, 1, 5]
    rows, *others = (torch.tensor([given]) for given in (ids, types, positions))
    got = encoder(rows, None, *others).last_hidden_state[0].detach()
    right = slow_encode(encoder, ids, positions, types)[-1]
    fails_like(got, right, {}, "last_hidden_state", 1e-9)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_pooling_takes_the_first_token_the_mean_or_the_pooler(pooling):
    encoder, (input_ids, mask) = make_encoder(pooling=pooling), padded()
    output = encoder(input_ids, mask)
    weights = {n: weight.numpy() for n, weight in encoder.state_dict().items()}
    for row, ids in enumerate(CAPTION_IDS):
        last = output.last_hidden_state[row, : len(ids)].detach().numpy()
        right = last.mean(0) if pooling == "mean" else last[0]
        if pooling == "pooler":
            right = np.tanh(linear(last[0], weights, "pooler.dense"))
        fails_like(output.pooler_output[row].detach(), right, {}, f"{pooling} of {row}", 1e-9)


@pytest.mark.parametrize("precision, learns", [("fp32", True), ("bf16", False), ("bf16", True)])
def test_no_fused_kernel_where_a_cpu_trains_in_bf16(precision, learns, make_model, images):
    """There separate products are faster; the embeddings are the same to bf16's digits."""
    model, cpu, tolerance = make_model(), torch.device("cpu"), 3e-2 * (precision == "bf16")
    inputs, settings = model.processor(text=["two dogs", "a"], images=images[:2]), torch.backends
    right = model(**inputs)
    with torch.set_grad_enabled(learns), dualenc.autocast(cpu, precision):
        got = model(**inputs)
        slow = precision == "bf16" and learns
        assert settings.cuda.flash_sdp_enabled() != slow
    assert settings.cuda.flash_sdp_enabled()
    for side in ("image_embeds", "text_embeds"):
        assert torch.allclose(getattr(got, side), getattr(right, side), atol=tolerance)


def test_dropout_acts_in_training_only():
    """Where all is dropped, embeddings too, each norm sees only what the last one made of 0."""
    ids, right = torch.tensor(CAPTION_IDS[:1]), torch.zeros(1, 3, 24, dtype=torch.float64)
    encoder, attention = make_encoder(dropout=1.0), make_encoder(attention_dropout=0.5)
    for tower in (encoder, attention):
        first, second = (tower(ids).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, tower.train()(ids).last_hidden_state)
    for layer in encoder.encoder["layer"]:
        right = layer.output.LayerNorm(layer.attention["output"].LayerNorm(right))
    assert torch.allclose(encoder(ids).last_hidden_state, right)


@pytest.mark.parametrize(("family", "limit"), [("bert", 20), ("roberta", 18)])
def test_captions_longer_than_the_position_table_are_refused(family, limit):
    """RoBERTa loses pad_token_id + 1 rows: 514 positions are 512 tokens."""
    encoder = make_encoder(**FAMILIES[family])
    assert encoder.max_tokens == limit
    encoder(torch.full((1, limit), 7))
    message = f"captions of {limit + 1} tokens, .* {limit} positions; .*max_length={limit}"
    with pytest.raises(ValueError, match=message):
        encoder(torch.full((1, limit + 1), 7))


def test_activations_are_the_published_formulas():
    x = torch.linspace(-3, 3, 13).double()
    tanh_form = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    right = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), tanh_form)
    right |= dict.fromkeys(("silu", "swish"), x / (1 + torch.exp(-x)))
    right["gelu"] = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    right["quick_gelu"] = x / (1 + torch.exp(-1.702 * x))
    right |= {"relu": x * (x > 0), "tanh": 2 / (1 + torch.exp(-2 * x)) - 1}
    assert right.keys() == dualenc.ACTIVATIONS.keys()
    for name, values in right.items():
        assert torch.allclose(dualenc.ACTIVATIONS[name]()(x), values, atol=1e-12), name
