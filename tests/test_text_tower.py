"""Claims about the text tower, against a slow version that never sees padding at all."""

import math

import numpy as np
import pytest
import torch
from conftest import fails_like
from torch.utils.flop_counter import FlopCounterMode

import dualenc


def make_encoder(**overrides):
    sizes = {"width": 24, "depth": 2, "heads": 3, "vocab_size": 50, "max_positions": 20, "pooling": "cls"}
    torch.manual_seed(0)
    encoder = dualenc.TextEncoder(dualenc.TextConfig(**{**sizes, **overrides})).eval()
    for weight in encoder.parameters():  # every weight counts: no zero biases, no unit norms
        torch.nn.init.normal_(weight, std=0.4)
    return encoder.double()


def layer_norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def slow_encode(encoder, ids, positions, types=None, keys=None):
    """Hidden states (depth + 1, T, W) of one caption without padding, in numpy, one head and one query at a time.

    keys  the positions that attention may look at; all of them unless given
    """
    keys = range(len(ids)) if keys is None else keys
    config = encoder.config
    weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][positions]
    if config.type_vocab_size:
        x = x + weights["embeddings.token_type_embeddings.weight"][types if types is not None else [0] * len(ids)]
    x = layer_norm(x, weights, "embeddings.LayerNorm", config.layer_norm_eps)
    if config.embedding_width != config.width:
        x = linear(x, weights, "embeddings_project")
    states, size = [x], config.width // config.heads
    for n in range(config.depth):
        name = f"encoder.layer.{n}"
        q, k, v = (linear(x, weights, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for h in range(config.heads):
            columns = slice(h * size, (h + 1) * size)
            for t in range(len(ids)):
                scores = np.array([q[t, columns] @ k[s, columns] / math.sqrt(size) for s in keys])
                shares = np.exp(scores - scores.max())
                mixed[t, columns] = (shares / shares.sum()) @ v[list(keys)][:, columns]
        x = x + linear(mixed, weights, f"{name}.attention.output.dense")
        x = layer_norm(x, weights, f"{name}.attention.output.LayerNorm", config.layer_norm_eps)
        inner = linear(x, weights, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = x + linear(inner, weights, f"{name}.output.dense")
        x = layer_norm(x, weights, f"{name}.output.LayerNorm", config.layer_norm_eps)
        states.append(x)
    return np.stack(states)


CAPTION_IDS = [[4, 8, 2], [7, 3, 9, 12, 5], [11]]


def padded(side, pad):
    longest = max(map(len, CAPTION_IDS))
    rows = []
    for ids in CAPTION_IDS:
        fill = [pad] * (longest - len(ids))
        rows.append(ids + fill if side == "right" else fill + ids)
    input_ids = torch.tensor(rows)
    return input_ids, (input_ids != pad).long()


FAMILIES = {
    "bert": {},
    "roberta": {"family": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"family": "distilbert", "type_vocab_size": 0},
    "electra": {"family": "electra", "embedding_width": 10},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_the_caption_alone(family, side):
    """Attention gives padding no weight, and positions are counted as the family counts them."""
    encoder = make_encoder(**FAMILIES[family])
    pad = encoder.config.pad_token_id
    input_ids, mask = padded(side, pad)
    with torch.no_grad():
        output = encoder(input_ids, mask, output_hidden_states=True)
    for row, ids in enumerate(CAPTION_IDS):
        shift = 0 if side == "right" else input_ids.shape[1] - len(ids)
        real = slice(shift, shift + len(ids))
        first = pad + 1 if family == "roberta" else shift  # BERT counts columns, also with padding on the left
        positions = np.arange(first, first + len(ids))
        right = slow_encode(encoder, ids, positions)
        columns = np.arange(input_ids.shape[1])
        all_positions = np.where(mask[row] == 1, columns - shift + first, pad) if family == "roberta" else columns
        all_ids, is_pad = input_ids[row].tolist(), np.flatnonzero(mask[row] == 0)
        mistakes = {
            "padding mask not used": slow_encode(encoder, all_ids, all_positions)[-1][real],
            "positions shifted by one": slow_encode(encoder, ids, positions + 1)[-1],
            "positions counted from 0": slow_encode(encoder, ids, np.arange(len(ids)))[-1],
        }
        if len(is_pad):
            mistakes["inverted padding mask"] = slow_encode(encoder, all_ids, all_positions, keys=is_pad)[-1][real]
        fails_like(output.last_hidden_state[row, real], right[-1], mistakes, f"row {row}", 1e-9)
        for n, state in enumerate(output.hidden_states):
            fails_like(state[row, real], right[n], {}, f"hidden state {n} of row {row}", 1e-9)
    assert len(output.hidden_states) == encoder.config.depth + 1


def test_token_types_and_positions_count_when_given():
    encoder = make_encoder()
    ids, types, positions = CAPTION_IDS[1], [0, 0, 1, 1, 1], [3, 1, 4, 1, 5]
    with torch.no_grad():
        got = encoder(torch.tensor([ids]), None, torch.tensor([types]), torch.tensor([positions])).last_hidden_state[0]
    fails_like(got, slow_encode(encoder, ids, positions, types)[-1], {}, "last_hidden_state", 1e-9)


def test_pooling_takes_the_first_token_the_mean_over_real_tokens_or_the_pooler():
    input_ids, mask = padded("right", 0)
    for pooling in ("cls", "mean", "pooler"):
        encoder = make_encoder(pooling=pooling)
        with torch.no_grad():
            output = encoder(input_ids, mask)
        for row, ids in enumerate(CAPTION_IDS):
            last = slow_encode(encoder, ids, np.arange(len(ids)))[-1]
            right, mistakes = last[0], {}
            if pooling == "mean":
                right = last.mean(0)
                mistakes["mean over padding too"] = output.last_hidden_state[row].mean(0)
                mistakes["first token, not mean"] = last[0]
            if pooling == "pooler":
                weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
                right = np.tanh(linear(last[0], weights, "pooler.dense"))
                mistakes["no tanh"] = linear(last[0], weights, "pooler.dense")
            fails_like(output.pooler_output[row], right, mistakes, f"{pooling} of row {row}", 1e-9)
    assert torch.equal(dualenc.masked_mean(torch.ones(1, 3, 2)), torch.ones(1, 2))


def test_attention_weights_are_real_and_give_the_same_result():
    """Each row sums to 1, padding gets exactly 0, and asking for them changes nothing."""
    encoder = make_encoder()
    input_ids, mask = padded("right", 0)
    with torch.no_grad():
        plain, shown = encoder(input_ids, mask), encoder(input_ids, mask, output_attentions=True)
    assert plain.attentions is None and plain.hidden_states is None
    assert len(shown.attentions) == 2 and shown.attentions[0].shape == (3, 3, 5, 5)
    for weights in shown.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(3, 3, 5).double())
        assert (weights * (1 - mask)[:, None, None, :]).abs().max() == 0
    assert torch.allclose(plain.last_hidden_state, shown.last_hidden_state, atol=1e-12)


def test_the_plain_attention_of_bfloat16_training_equals_the_fused_one():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    is_real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None]
    plain, weights = dualenc.masked_attention(query, key, value, is_real)
    with torch.no_grad():
        fused, _ = dualenc.masked_attention(query, key, value, is_real)
    assert weights is None and torch.allclose(plain, fused, atol=2e-2)


def test_plain_attention_serves_where_a_cpu_trains_in_bfloat16_and_nowhere_else():
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert dualenc.fused_kernel_is_slow(half) and not dualenc.fused_kernel_is_slow(single)
    with torch.autocast("cpu", torch.bfloat16):
        assert dualenc.fused_kernel_is_slow(single)
    with torch.no_grad():
        assert not dualenc.fused_kernel_is_slow(half)
    assert not dualenc.fused_kernel_is_slow(half.to("meta")), "another device has other kernels"


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean"])
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "albert"])
def test_what_pooling_does_not_read_is_left_out_and_nothing_changes(family, pooling):
    """pooled_only: the same vector and the same gradients of every weight, padding and all, for fewer products."""
    encoder = make_encoder(family=family, pooling=pooling, layer_groups=1 if family == "albert" else None)
    input_ids, mask = padded("left", encoder.config.pad_token_id)
    gradients, vectors, products = [], [], []
    for pooled_only in (False, True):
        encoder.zero_grad()
        with FlopCounterMode(display=False) as counter:
            output = encoder(input_ids, mask, pooled_only=pooled_only)
        output.pooler_output.square().sum().backward()
        vectors.append(output.pooler_output)
        gradients.append(
            {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}
        )
        products.append(counter.get_total_flops())
    assert output.last_hidden_state is None
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-10)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-9, atol=1e-9)
    assert products[1] == products[0] if pooling == "mean" else products[1] < 0.75 * products[0]


def test_dropout_acts_in_training_only():
    encoder = make_encoder(dropout=0.5, attention_dropout=0.5)
    ids = torch.tensor(CAPTION_IDS[:1])
    assert torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)
    encoder.train()
    assert not torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)
    for name in ("dropout", "attention_dropout"):
        only = make_encoder(**{name: 0.5}).train()
        assert not torch.equal(only(ids).last_hidden_state, only(ids).last_hidden_state), f"{name} does nothing"


@pytest.mark.parametrize(("family", "limit"), [("bert", 20), ("roberta", 18)])
def test_captions_longer_than_the_position_table_are_refused(family, limit):
    """RoBERTa loses pad_token_id + 1 rows: 514 positions are 512 tokens."""
    encoder = make_encoder(**FAMILIES[family])
    assert encoder.max_tokens == limit
    encoder(torch.full((1, limit), 7))
    with pytest.raises(ValueError, match=f"captions of {limit + 1} tokens, .* tokenize with max_length={limit}"):
        encoder(torch.full((1, limit + 1), 7))


def test_activations_are_the_published_formulas():
    x = torch.linspace(-3, 3, 13).double()
    tanh_form = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    right = {
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_new": tanh_form,
        "gelu_fast": tanh_form,
        "gelu_pytorch_tanh": tanh_form,
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "relu": x * (x > 0),
        "silu": x / (1 + torch.exp(-x)),
        "swish": x / (1 + torch.exp(-x)),
        "tanh": 2 / (1 + torch.exp(-2 * x)) - 1,
    }
    assert right.keys() == dualenc.ACTIVATIONS.keys()
    for name, values in right.items():
        assert torch.allclose(dualenc.ACTIVATIONS[name](x), values, atol=1e-12), name
