"""Claims about flags (test_train.py has more), devices, and how a script ends."""

from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch

import dualenc
import eval as evaluation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Flags:
    steps: int = evaluation.flag(10, "how long; 100% of the run", "training")
    lr: float = evaluation.flag(1e-3, "step size", "training")
    flip: bool = evaluation.flag(False, "mirror images")
    note: str = evaluation.flag("", "words")
    image_size: int | None = evaluation.flag(None, "pixels a side")
    loss: str = evaluation.flag("clip", "which loss", "training", ("clip", "siglip"), row="LOSSES")
    vision_args: dict | None = evaluation.flag(None, "arguments of the tower")


def parse(*flags):
    return Flags(**vars(evaluation.flag_parser(Flags, "").parse_args(flags)))


def test_flags_are_the_fields_of_a_dataclass(capsys):
    assert parse() == Flags() and Flags.__dataclass_fields__["loss"].metadata["row"] == "LOSSES"
    given = ["--flip", "--image-size", "64", "--lr", "1e-4", "--loss", "siglip"]
    got = parse(*given, "--vision-args", "layers=(1,2)", "act=relu", "note=a=b")
    args = {"layers": (1, 2), "act": "relu", "note": "a=b"}
    assert got == Flags(10, 1e-4, True, "", 64, "siglip", args) and not parse("--no-flip").flip
    for flags in (["--step=1000000000"], ["--vision-args", "layers"], ["--help"]):
        with pytest.raises(SystemExit):
            parse(*flags)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "arguments: --step=10000" in said and "'layers' is not NAME=VALUE" in said
    assert "training: --steps INT how long; 100% of the run (default: 10)" in said
    assert "other: --flip, --no-flip mirror images (default: False) --note STR words -" in said
    assert "--loss {clip,siglip} which loss (default: clip)" in said
    assert "--image-size INT pixels a side --vision-args [NAME=VALUE ...] arguments" in said


def test_error_messages_name_what_looks_like_the_value_given():
    with pytest.raises(ValueError, match="unknown loss 'clap'; expected clip, siglip"):
        dualenc.check_choice("loss", "clap", ("clip", "siglip"))
    dualenc.check_min("size", 3, 3)
    for wrong in (2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"size is {wrong}, expected at least 3"):
            dualenc.check_min("size", wrong, 3)


def test_devices_are_named_or_picked(monkeypatch):
    for name in ("cuda:9", "gpu"):  # not there, and unknown
        with pytest.raises(ValueError, match=f"cannot use --device {name} .cpu is always there.: "):
            dualenc.pick_device(name)
    monkeypatch.setattr(torch, "empty", lambda size, device: Namespace(device=torch.device(device)))
    for available, picked in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert dualenc.pick_device("auto") == torch.device(picked)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dualenc.pick_device("auto") == torch.device("cuda:1")


def test_precision_follows_the_hardware(monkeypatch):
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert dualenc.pick_precision("auto", CPU) == ("bf16" if amx or avx else "fp32")
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        assert dualenc.pick_precision("auto", CUDA) == expected
    assert dualenc.pick_precision("fp32", CUDA) == "fp32"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision, dtype in types.items():
        with dualenc.autocast(CPU, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("steps is 0"), "train.py: error: steps is 0"),
        (FileNotFoundError("no a.csv"), "train.py: error: no a.csv"),
        (KeyboardInterrupt(), "130"),
        (RuntimeError("shapes differ"), None),  # a fault of the program keeps its traceback
    ],
)
def test_a_script_ends_with_one_line_and_a_status(error, code, monkeypatch):
    """sys.exit prints a string on standard error, and the status is 1."""

    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/some/where/train.py"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda errors: None, raising=False)
    with pytest.raises(SystemExit if code else RuntimeError) as stopped:
        evaluation.run_script(main)
    assert code is None or str(stopped.value.code).startswith(code)
