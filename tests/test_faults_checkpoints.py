"""What happens to checkpoints from strangers: each broken one is a ValueError that names file and reason."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import dualenc


@pytest.fixture
def saved(make_model, tmp_path):
    """A checkpoint folder of a tiny model, and the model."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def load(folder):
    return dualenc.DualEncoder.from_pretrained(folder)


def edit(folder, name="config.json", **changes):
    """Set entries of a json file; a key of two words is an entry of an inner object: text__width."""
    path = folder / name
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        inner = values
        for part in outer:
            inner = inner[part]
        inner[last] = value
    path.write_text(json.dumps(values))


# ---- Weights --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_weights_is_noticed_or_changes_nothing(saved):
    """In the header it breaks names, types, shapes or places; in the numbers, the checksum."""
    folder, model = saved
    path = folder / "model.safetensors"
    whole, rng = path.read_bytes(), random.Random("bits")
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(8), *rng.sample(range(8, header), 150), *rng.sample(range(header, len(whole)), 150)]:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load(folder).state_dict()
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:
            assert place < header, f"a flipped bit in byte {place} of the numbers went unnoticed"
            assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(keep, saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="cannot read weights .*model.safetensors"):
        load(folder)


def test_weights_without_checksum_are_read(saved):
    """Other programs write none."""
    folder, model = saved
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert torch.equal(load(folder).text_projection.weight, model.text_projection.weight)


def test_the_checksum_depends_on_every_weight_and_not_on_their_order():
    weights = {"a": torch.randn(3, 4), "b": torch.tensor(1.5), "c": torch.zeros(2, dtype=torch.bfloat16)}
    whole = dualenc.checksum(weights)
    assert whole == dualenc.checksum(dict(reversed(weights.items())))
    for name in weights:
        assert whole != dualenc.checksum({**weights, name: weights[name] + 1})


def test_weights_of_other_shapes_types_and_names_are_listed(saved):
    folder, model = saved
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    missing = weights.pop("logit_scale")
    weights["stranger"] = torch.zeros(3)
    weights["text_projection.weight"] = weights["text_projection.weight"].int()
    weights["visual_projection.weight"] = weights["visual_projection.weight"].T.contiguous()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    message = (
        r"model.safetensors does not fit .*1 missing: logit_scale; 1 unexpected: stranger; "
        r"1 misshapen: visual_projection.weight \(32, 16\), expected \(16, 32\); "
        r"1 of the wrong type: text_projection.weight torch.int32, expected torch.float32"
    )
    with pytest.raises(ValueError, match=message):
        load(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file({**weights, "logit_scale": missing.double()}, folder / "model.safetensors")
    assert load(folder).logit_scale.dtype == torch.float32  # another precision is no fault


def test_a_pickle_is_not_even_opened(saved, tmp_path):
    """A folder whose only weights are a .bin: refused, and the code in it does not run."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder, _ = saved
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.safetensors"):
        load(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot read weights .*model.safetensors"):
        load(folder)
    assert not (tmp_path / "ran").exists()


# ---- Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text__vocab_size": 10**10}, "vocab_size is 10000000000, but no side of its weights"),
        ({"text__width": 10**9, "text__heads": 1}, "width is 1000000000, but no side of its weights"),
        ({"text__max_positions": 10**11}, "max_positions is 100000000000, but no side"),
        ({"projection_dim": 10**10}, "projection_dim is 10000000000, but no side"),
        ({"text__depth": 90_000}, "the config describes far more than the .* weights there are"),
        ({"vision__args__depth": 90_000}, "the config describes far more than the .* weights there are"),
        ({"vision__args__embed_dim": 10**12}, "embed_dim is 1000000000000, but no side"),
        ({"vision__args__embed_dim": [5, 10**12]}, "embed_dim is .*, but no side"),
        ({"vision__args__embed_dim": 90_000}, "does not fit|cannot build"),
        ({"vision__image_size": 80_000}, "image_size is 80000, expected 1 to 8192"),
        ({"text__vocab_size": 90_000, "text__width": 90_000, "text__heads": 1}, "does not fit"),
        ({"text__mlp_width": 99_000, "projection_dim": 99_000}, "does not fit .*misshapen"),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_allocated(changes, reason, saved):
    folder, _ = saved
    edit(folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=reason) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text__family": "gpt9"}, "unknown text family 'gpt9'; expected"),
        ({"vision__name": "resnet19"}, "unknown timm model 'resnet19'; the nearest names are"),
        ({"vision__name": "../../x"}, "unknown timm model"),
        ({"vision__args__checkpoint_path": "/etc/passwd"}, "must not name a file to read"),
        ({"text__activation": "boom"}, "unknown activation 'boom'"),
        ({"text__width": "32"}, "width is '32', expected int"),
        ({"text__width": True}, "width is True, expected int"),
        ({"text__width": None}, "width is None, expected int"),
        ({"text__width": -32}, "text width is -32, expected at least 1"),
        ({"text__heads": 0}, "text heads is 0, expected at least 1"),
        ({"text__mlp_width": 0}, "text mlp_width is 0, expected at least 1"),
        ({"text__embedding_width": 0}, "text embedding_width is 0, expected at least 1"),
        ({"text__layer_groups": 0}, "text layer_groups is 0, expected at least 1"),
        ({"text__dropout": 2.0}, "text dropout is 2.0, expected a share from 0 to below 1"),
        ({"text__attention_dropout": -0.1}, "text attention_dropout is -0.1, expected a share from 0 to below 1"),
        ({"vision__patch_dropout": 1.0}, "vision patch_dropout is 1.0, expected a share from 0 to below 1"),
        ({"projection_dim": -3}, "projection_dim is -3, expected at least 1"),
        ({"text__layer_norm_eps": float("nan")}, "text layer_norm_eps is nan, expected at least 0"),
        ({"vision__image_size": 0}, "image_size is 0"),
        ({"vision__channels": 7}, "channels"),
        ({"vision__args": []}, r"args is \[\], expected dict"),
        ({"text": 5}, "TextConfig is 5, expected fields by name"),
        ({"text__colour": 5}, "unknown field of TextConfig 'colour'"),
        ({"vision__args__num_heads": 5}, "cannot build the model"),
        ({"vision__args__colour": 5}, "cannot build the model.*colour"),
        ({"model_type": "gpt9"}, "model_type 'gpt9'"),
    ],
)
def test_configs_without_sense_are_refused(changes, reason, saved):
    folder, _ = saved
    edit(folder, **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"5" * 10_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_files_that_are_no_json_objects_are_refused_by_name(name, content, saved):
    folder, _ = saved
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(name, saved):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        load(folder)


# ---- Processors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": {"shortest_edge": 10**6}}, "expected 1 to 8192 pixels a side"),
        ({"crop_size": {"height": 10**6, "width": 32}}, "expected 1 to 8192 pixels a side"),
        ({"size": {"shortest_edge": -5}}, "expected 1 to 8192 pixels a side"),
        ({"size": {"shortest_edge": "5"}}, "cannot read"),
        ({"size": "5"}, "cannot read"),
        ({"image_std": [0, 1, 1]}, "a std above 0 for each"),
        ({"image_mean": [1, 1]}, "expected 1 or 3 channels"),
        ({"image_mean": "half"}, "cannot read"),
        ({"resample": 99}, "cannot read"),
    ],
)
def test_image_processors_without_sense_are_refused(changes, reason, saved):
    folder, _ = saved
    edit(folder, "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        load(folder)
    assert "preprocessor_config.json" in str(caught.value)


def test_a_tokenizer_whose_ids_exceed_the_table_is_refused(saved):
    """Its tokens, its padding and its special tokens: each would be an index error in the middle of a run."""
    folder, model = saved
    rows = model.config.text.vocab_size
    whole = (folder / "tokenizer.json").read_text()
    message = rf"tokenizer.json has token id 99999, but the text tower's table ends at {rows - 1}"
    for changes in (
        {"model__vocab__a": 99999},
        {"padding__pad_id": 99999},
        {"post_processor__special_tokens__[CLS]__ids": [99999]},
    ):
        (folder / "tokenizer.json").write_text(whole)
        edit(folder, "tokenizer.json", **changes)
        with pytest.raises(ValueError, match=message):
            load(folder)


def test_a_tokenizer_without_padding_is_refused_by_name(saved):
    folder, _ = saved
    edit(folder, "tokenizer.json", padding=None)
    with pytest.raises(ValueError, match="tokenizer.json: .*no padding"):
        load(folder)


# ---- Links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_followed(name, saved, tmp_path):
    folder, _ = saved
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*elsewhere, outside its folder"):
        load(folder)


def test_links_inside_the_folder_and_those_of_the_hub_cache_are_followed(saved, tmp_path):
    folder, model = saved
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    load(folder)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert torch.equal(load(tmp_path / "shortcut").text_projection.weight, model.text_projection.weight)


# ---- Anything at all ------------------------------------------------------------------------------------------------


EXAMPLES = pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])


def refuses_or_loads(folder):
    """Loading raises ValueError or gives a model that works; anything else is a failure."""
    try:
        model = load(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    model.processor(text=["two dogs"])


@EXAMPLES
def test_any_config_is_refused_or_loaded(examples, make_model, tmp_path):
    """Hypothesis replaces values of the configs by others, of every type and size."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies

    make_model().save_pretrained(tmp_path / "whole")
    files = {name: json.loads((tmp_path / "whole" / name).read_text()) for name in CONFIGS}
    places = [(name, *path) for name in CONFIGS for path in paths(files[name])]
    scalars = strategies.one_of(
        strategies.none(),
        strategies.booleans(),
        strategies.integers(),
        strategies.sampled_from([0, 1, -1, 8, 32, 33, 1000, 10**6, 2**31, 2**63, 10**30]),
        strategies.floats(),
        strategies.text(max_size=8),
    )
    values = strategies.recursive(scalars, lambda inner: strategies.lists(inner, max_size=3), max_leaves=4)

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True)
    @hypothesis.given(strategies.dictionaries(strategies.sampled_from(places), values, min_size=1, max_size=2))
    def check(changes):
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        changed = json.loads(json.dumps(files))
        for place, value in changes.items():
            inner = changed
            for part in place[:-1]:
                inner = inner.get(part) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[place[-1]] = value
        for name, content in changed.items():
            (folder / name).write_text(json.dumps(content))
        refuses_or_loads(folder)

    check()


CONFIGS = ("config.json", "preprocessor_config.json")


def paths(values):
    """The paths of all the entries of nested dictionaries."""
    for name, value in values.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *path) for path in paths(value))


@EXAMPLES
def test_any_corrupted_bytes_are_refused_or_loaded(examples, make_model, tmp_path):
    """Hypothesis overwrites, inserts and cuts bytes of every file of a checkpoint."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies

    make_model().save_pretrained(tmp_path / "whole")
    names = sorted(os.listdir(tmp_path / "whole"))

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True)
    @hypothesis.given(
        strategies.sampled_from(names),
        strategies.floats(0, 1),
        strategies.integers(0, 20),
        strategies.binary(max_size=9),
    )
    def check(name, where, cut, inserted):
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        data = (folder / name).read_bytes()
        # Half of the examples go into the first kilobyte, where a safetensors file has its header.
        place = int(2 * where * min(len(data), 1024)) if where < 0.5 else int((2 * where - 1) * len(data))
        (folder / name).write_bytes(data[:place] + inserted + data[place + cut :])
        refuses_or_loads(folder)

    check()


@pytest.mark.slow
def test_an_absurd_config_does_not_need_its_memory(saved):
    """In a process that may take four gigabytes in all."""
    folder, _ = saved
    edit(folder, text__vocab_size=99_000, text__width=99_000, text__heads=1, text__mlp_width=99_000)
    code = (
        "import resource, dualenc; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); "
        f"dualenc.DualEncoder.from_pretrained({str(folder)!r})"
    )
    root = Path(dualenc.__file__).parent
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "does not fit the model of its config.json" in ran.stderr.splitlines()[-1], ran.stderr
