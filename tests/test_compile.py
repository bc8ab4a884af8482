"""Claims about --compile: few graphs, the same numbers, the same checkpoints."""

import json

import pytest
import torch
from test_train import captions_file, log_of, run, same_weights  # noqa: F401 (two of them are fixtures)

import dualenc
import eval as evaluation
import train

LENGTHS = (7, 9, 12, 5, 20, 31, 8, 9, 3, 2)
VISION = {"vit": {}, "vit, mean": {"vision_pooling": "avg"}, "convnet": {"vision": "test_resnet"}}
VISION["vit, mean"]["vision_args"] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
TEXT = {"mean": {}, "cls": {"text_pooling": "cls"}, "albert": {"text_family": "albert", "text_embedding_width": 16}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches(sizes, lengths=LENGTHS):
    """Random pictures and captions, those of a batch of another length than the last one's."""
    torch.manual_seed(2)
    for size, length in zip(sizes, lengths):
        mask = torch.ones(size, length, dtype=torch.long)
        mask[0, (length + 1) // 2 :] = 0
        yield torch.randn(size, 3, 32, 32), {"input_ids": torch.randint(5, 60, (size, length)), "attention_mask": mask}


def embed(model, batch, precision):
    images, captions = batch
    with dualenc.autocast(torch.device("cpu"), precision):
        return model.encode_image(images), model.encode_text(**captions)


@pytest.mark.parametrize(
    ("vision", "text", "precision"),
    [("vit", "mean", "bf16"), ("vit, mean", "cls", "fp32"), ("convnet", "albert", "fp32")],
)
def test_ten_lengths_of_captions_take_one_graph_a_tower_and_evaluation_two_more(vision, text, precision, make_model):
    """Without a break inside a tower; the last batch of an evaluation may be of another size. Going back is free."""
    model, compiled = make_model(**VISION[vision], **TEXT[text]), []

    def count(graph, examples):
        compiled.append(graph)
        return graph.forward

    train.compile_towers(model, backend=count, fullgraph=True)
    counts = []
    for mode in ("train", "eval", "train", "eval"):
        model.train(mode == "train")
        compiled.clear()
        with torch.set_grad_enabled(mode == "train"):
            for batch in batches([8] * 10 if mode == "train" else [8] * 9 + [5]):
                loss = sum(side.sum() for side in embed(model, batch, precision))
                if mode == "train":
                    loss.backward()
        counts.append(len(compiled))
    assert counts[0] == 2 and counts[1] <= 3 and counts[2:] == [0, 0]


def losses_and_gradients(model):
    results = []
    for images, captions in batches([8] * 3):
        model.zero_grad()
        loss = dualenc.clip_loss(model.encode_image(images), model.encode_text(**captions), model.logit_scale)
        loss.backward()
        results += [loss.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]
    model.eval()
    with torch.no_grad():
        return results + [side for batch in batches([8, 3]) for side in embed(model, batch, "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "convnet"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_towers_compute_the_same(backend, vision, make_model):
    """Loss, gradients, batch norm's statistics and embeddings; the backend inductor is what --compile takes."""
    plain, fast = (make_model(**VISION[vision], text_dropout=0.0, text_attention_dropout=0.0) for _ in range(2))
    train.compile_towers(fast, backend=backend)
    for got, expected in zip(losses_and_gradients(fast.train()), losses_and_gradients(plain.train()), strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    one, two = plain.state_dict(), fast.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-4, atol=1e-5), name


def test_a_compiled_run_saves_resumes_and_is_measured_like_any_other(run, monkeypatch):  # noqa: F811
    compile_towers, models = train.compile_towers, []

    def compile_quickly(model):
        models.append(model)
        compile_towers(model, backend="eager")

    monkeypatch.setattr(train, "compile_towers", compile_quickly)
    _, plain = run("plain", steps=6)
    assert not models
    metrics, fast = run("fast", steps=6, compile=True)
    assert len(models) == 1 and same_weights(plain / "last", fast / "last") and log_of(plain) == log_of(fast)
    assert not any("orig_mod" in name for name in models[0].state_dict())
    assert evaluation.main([str(fast), "--precision", "fp32"])["retrieval"]["i2t_r1"] == metrics["i2t_r1"]

    take_step = train.take_step

    def stop_at_three(run, batch, first):
        take_step(run, batch, first)
        if run.state["step"] == 3:
            raise train.DataFault("enough")

    monkeypatch.setattr(train, "take_step", stop_at_three)
    with pytest.raises(ValueError, match="enough"):
        run("cut", steps=6, compile=True)
    monkeypatch.setattr(train, "take_step", take_step)
    train.main(["--resume", str(fast.with_name("cut"))])
    assert len(models) == 3 and same_weights(fast / "last", fast.with_name("cut") / "last")


def test_grad_checkpointing_is_a_flag_that_changes_no_weight(run):  # noqa: F811
    _, plain = run(
        "plain", steps=4, vision="vit_tiny_patch16_224", vision_args=["embed_dim=32", "num_heads=2", "depth=2"]
    )
    asked, recompute = [], dualenc.recompute_activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dualenc, "recompute_activations", lambda model: (asked.append(model), recompute(model)))
        _, sparing = run(
            "sparing",
            steps=4,
            vision="vit_tiny_patch16_224",
            vision_args=["embed_dim=32", "num_heads=2", "depth=2"],
            grad_checkpointing=True,
        )
    assert len(asked) == 1 and same_weights(plain / "last", sparing / "last") and log_of(plain) == log_of(sparing)
    assert json.loads((sparing / "train_config.json").read_text())["flags"]["grad_checkpointing"]
