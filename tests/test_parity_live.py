"""dualenc beside transformers itself, in one process; runs where tests/requirements-parity.txt is installed."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dualenc

hf = pytest.importorskip("transformers")
FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import make_fixtures  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DUAL = make_fixtures.dual_configs()
agreed_tokens = pytest.mark.skipif(
    hf.__version__.startswith("5.0."), reason="5.0 tokenizes some files otherwise than the versions before and after it"
)
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}


def assert_same(theirs, ours, pixel_values, text_inputs):
    """Both models give the same embeddings, logits / scale and loss to 1e-5."""
    inputs = {"pixel_values": pixel_values, **text_inputs}
    with torch.no_grad():
        right, got = theirs(**inputs, return_loss=True), ours(**inputs, return_loss=True)
    for key in ("image_embeds", "text_embeds"):
        assert (right[key] - getattr(got, key)).abs().max() < 1e-5, key
    scale = ours.logit_scale.exp()
    assert ((right.logits_per_image - got.logits_per_image) / scale).abs().max() < 1e-5
    assert got.loss.item() == pytest.approx(right.loss.item(), rel=1e-4)


def read_by_transformers(folder):
    """The model, after making sure that every weight was read and none was made up."""
    model, report = hf.VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def pictures():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((25, 41), (33, 33), (90, 38))
    ]


@pytest.mark.parametrize("name", DUAL)
def test_there_and_back(name, tmp_path):
    """transformers -> ours -> transformers -> ours: outputs, and tensors to the bit."""
    torch.manual_seed(0)
    vision, text = DUAL[name]
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    theirs = hf.VisionTextDualEncoderModel(config).eval()
    with torch.no_grad():
        make_fixtures.randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    size = dualenc.as_pair(vision.image_size)
    inputs = torch.randn(3, vision.num_channels, *size), make_fixtures.text_inputs(text)
    ours = dualenc.DualEncoder.from_pretrained(tmp_path / "theirs")
    assert_same(theirs, ours, *inputs)
    ours.save_pretrained(tmp_path / "ours", format="hf")
    again = read_by_transformers(tmp_path / "ours")
    assert_same(again, ours, *inputs)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    again.save_pretrained(tmp_path / "again")
    last = dualenc.DualEncoder.from_pretrained(tmp_path / "again")
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, last.state_dict()[key]), key


@pytest.mark.parametrize(
    "name, pooling",
    [
        ("vit_tiny_patch16_224", None),
        ("vit_tiny_patch16_224", "avg"),
        ("deit3_small_patch16_224", None),
        ("vit_base_patch14_reg4_dinov2", None),
        ("vit_base_patch32_clip_quickgelu_224", None),
        ("vit_base_patch16_siglip_224", None),
        ("beit_base_patch16_224", None),
    ],
)
def test_transformers_reads_a_plain_timm_vit_with_its_processor(name, pooling, make_model, tmp_path):
    model = make_model(name, vision_args=TINY, vision_pooling=pooling, text_pooling="pooler")
    model.save_pretrained(tmp_path, format="hf")
    theirs = read_by_transformers(tmp_path)
    processor = hf.VisionTextDualEncoderProcessor.from_pretrained(tmp_path, use_fast=True)
    texts = ["two dogs", "a cat left of a blue star", "café"]
    right = processor(text=texts, images=pictures(), padding=True, truncation=True, return_tensors="pt")
    got = model.processor(text=texts, images=pictures())
    assert right.keys() == got.keys()
    for key in got:
        assert (right[key].double() - got[key].double()).abs().max() < 1e-6, key
    assert_same(theirs, model, got.pop("pixel_values"), got)


@agreed_tokens
@pytest.mark.parametrize("kind", ["bert", "roberta", "deit", "clip"])
def test_a_folder_saved_by_transformers_is_read_with_its_processor(kind, tmp_path):
    """As users have them: model, tokenizer and image processor in one folder."""
    name, tokens, image_processor = {
        "bert": ("vit-bert", "bert-old", hf.ViTImageProcessor),
        "roberta": ("vit-roberta", "roberta-old", hf.ViTImageProcessor),
        "deit": ("deit-xlmr", "xlm-roberta-old", hf.DeiTImageProcessor),
        "clip": ("clip-mpnet", "mpnet-old", hf.CLIPImageProcessor),
    }[kind]
    tokenizer = hf.AutoTokenizer.from_pretrained(FIXTURES / "tokens" / tokens)
    sizes = {"size": {"shortest_edge": 16}} if kind == "clip" else {"size": {"height": 16, "width": 16}}
    sizes |= {"crop_size": {"height": 16, "width": 16}} if kind in ("deit", "clip") else {}
    processor = hf.VisionTextDualEncoderProcessor(image_processor(**sizes), tokenizer)
    processor.save_pretrained(tmp_path)
    hf.VisionTextDualEncoderModel.from_pretrained(FIXTURES / "dual" / name).save_pretrained(tmp_path)
    ours = dualenc.DualEncoder.from_pretrained(tmp_path).processor
    theirs = hf.VisionTextDualEncoderProcessor.from_pretrained(tmp_path, use_fast=True)
    right = theirs(text=make_fixtures.TEXTS, images=pictures(), padding=True, truncation=True, return_tensors="pt")
    got = ours(text=make_fixtures.TEXTS, images=pictures())
    assert right.keys() == got.keys()
    for key in got:
        assert (right[key].double() - got[key].double()).abs().max() < 1e-6, key


# Versions 4 and 5 split an XLM-R text without a character map at different places; no published file is without one.
OLD_TOKENS = sorted(path.name for path in (FIXTURES / "tokens").glob("*-old") if path.name != "xlm-roberta-old")


@agreed_tokens
@pytest.mark.parametrize("name", OLD_TOKENS)
def test_tokenizer_files_of_this_version_give_its_tokens(name, tmp_path):
    """The oldest files, and what this version of transformers saves of them."""
    settings = json.loads((FIXTURES / "tokens" / name / "tokenizer_config.json").read_text())
    tokenizer = getattr(hf, settings["tokenizer_class"] + "Fast").from_pretrained(FIXTURES / "tokens" / name)
    tokenizer.save_pretrained(tmp_path)
    for folder in (FIXTURES / "tokens" / name, tmp_path):
        limited = tokenizer.model_max_length < 1e9
        right = tokenizer(make_fixtures.TEXTS, padding=True, truncation=limited)
        got = dualenc.Processor(None, *dualenc.read_tokenizer(folder))(text=make_fixtures.TEXTS)
        assert {key: tensor.tolist() for key, tensor in got.items()} == dict(right)


@agreed_tokens
def test_an_xlm_roberta_tokenizer_with_a_character_map_is_read(tmp_path):
    """A sentencepiece file as XLM-R's is, with its table of characters to replace (half-width, ligatures, ...)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus").write_text("\n".join(make_fixtures.CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"),
        model_prefix=str(tmp_path / "sentencepiece.bpe"),
        vocab_size=75,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    texts = [text for text in make_fixtures.TEXTS if "<mask>" not in text] + ["ﬁne ①②③ ﾊﾟ"]
    right = hf.XLMRobertaTokenizerFast.from_pretrained(tmp_path)(texts, padding=True)
    got = dualenc.Processor(None, *dualenc.read_tokenizer(tmp_path))(text=texts)
    assert {key: tensor.tolist() for key, tensor in got.items()} == dict(right)


@pytest.mark.parametrize("head", ["ViTForImageClassification", "BertForMaskedLM"])
def test_towers_below_a_head(head, tmp_path):
    """The documentation's first example: a ViT classifier and a BERT, neither with a pooler to rely on."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    vit = hf.ViTForImageClassification(hf.ViTConfig(**make_fixtures.VISION)).eval()
    bert = hf.BertForMaskedLM(hf.BertConfig(**make_fixtures.TEXT)).eval()
    vit.save_pretrained(tmp_path / "vit")
    bert.save_pretrained(tmp_path / "bert")
    model = dualenc.DualEncoder.from_vision_text_pretrained(str(tmp_path / "vit"), str(tmp_path / "bert")).eval()
    pixel_values, inputs = torch.randn(2, 3, 16, 16), make_fixtures.text_inputs(bert.config)
    with torch.no_grad():
        right = vit.vit(pixel_values) if head.startswith("ViT") else bert.bert(**inputs)
        got = model.vision_model(pixel_values) if head.startswith("ViT") else model.text_model(**inputs)
    assert (right.last_hidden_state[:, 0] - got.pooler_output).abs().max() < 1e-5
