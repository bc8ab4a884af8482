"""The printout and the report page: tables, shaded matrices, cards; everything on one page."""

import base64
import html.parser
import io
import os
import re

import pytest
import torch
from PIL import Image
from support import class_folders

import dualenc
import eval as evaluation


class Page(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and its words; tags must close in order."""

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


@pytest.fixture
def folder(tmp_path):
    """Class folders, one with a name that must be shown, not interpreted."""
    return class_folders(tmp_path / "photos", "<b>dog & cat", "fox", n_test=3)


@pytest.fixture
def context(make_model, folder):
    return evaluation.EvalContext(make_model(), dualenc.load_pairs(folder, "test"))


@pytest.mark.parametrize("task", ["all", "search"])
def test_the_report_is_one_page_with_everything_inside(make_model, folder, tmp_path, task):
    """No script, nothing to fetch; every image can be decoded; words are shown as they are."""
    make_model().save_pretrained(tmp_path / "model")
    report, query = tmp_path / "report", "<i>dogs & foxes"
    flags = ["--data", str(folder), "--task", task, "--report", str(report)]
    flags += ["--query", query, "--top", "99"] if task == "search" else []
    results = evaluation.main([str(tmp_path / "model"), *flags])
    assert os.listdir(report) == ["index.html"]
    text = (report / "index.html").read_text()
    page = Page(text)
    assert not re.search(r"<script|javascript:|@import|url\(|https?:|\son\w+=", text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"a", "link", "b", "i"})
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) > 5
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        Image.open(io.BytesIO(content)).verify()
    words = " ".join(page.words)
    assert "<b>dog & cat" in words and (query in words) == (task == "search")
    assert "width=device-width" in text and "overflow-x: auto" in text, "narrow windows"
    for name, metrics in results.items():
        assert evaluation.TASKS[name].title in words
        values = [value for value in metrics.values() if isinstance(value, float)]
        assert all(f"{value:.3f}" in words for value in values), "every number of the json file"


def test_the_similarity_table_has_captions_in_rows_and_images_in_columns(context):
    table = evaluation.retrieval_blocks(context, {})[0]
    values = torch.tensor([[float(cell) for cell in row[1:]] for row in table.rows])
    captions = [row[0] for row in table.rows]
    with torch.no_grad():
        texts = context.model.encode_text(**context.model.processor(text=captions))
        pixels = context.model.processor(images=list(table.columns[1:]))["pixel_values"]
        expected = texts @ context.model.encode_image(pixels).T
    assert values.shape == (6, 6) and torch.allclose(values, expected, atol=0.006)
    for i, caption in enumerate(captions):
        assert caption in context.pairs.captions[i]
    shades = torch.tensor(table.shades)
    assert (shades.min(), shades.max()) == (0, 1)
    assert shades.argmax() == expected.argmax() and shades.argmin() == expected.argmin()


def test_best_and_worst_captions_show_what_they_found(context):
    """Each image is its own caption's best, but captions 0 and 1 are exchanged."""
    context.captions = [f"caption {i}" for i in range(6)]
    context.image_embeds, context.text_embeds = torch.eye(6), torch.eye(6)[[1, 0, 2, 3, 4, 5]]
    context.right = torch.arange(6)[:, None].repeat(1, 2)
    blocks = [Page(block) for block in evaluation.retrieval_blocks(context, {})[1:]]
    titles = [page.words[0].partition(", ") for page in blocks]
    assert titles[0] == ("Best: “caption 2”", ", ", "right at rank 1")
    assert [title for title, *_ in titles[3:]] == ["Worst: “caption 1”", "Worst: “caption 0”"]
    for page in blocks:
        framed = [attributes["class"] for tag, attributes in page.tags if tag == "figure"]
        assert framed.count("right") == 1 and 5 <= len(framed) <= 6, "the right one is shown too"
    assert blocks[0].words[1] == f"1.000 {context.pairs.names[2]}"


def test_confusion_has_right_classes_in_rows(context):
    """Two of three dogs are taken for foxes."""
    context.class_embeds = torch.eye(2)
    context.image_embeds = torch.eye(2)[[1, 1, 0, 1, 1, 1]]
    (table,) = evaluation.zeroshot_blocks(context, {})
    assert table.rows == [("<b>dog & cat", "33%", "67%"), ("fox", "", "100%")]
    assert table.shades[0] == pytest.approx([1 / 3, 2 / 3]) and "/0.67)" in table.html()
