"""Time and memory of loading a ViT-B/16 + BERT-base dual encoder, here and in transformers, on one folder.

    pip install -r tests/requirements-parity.txt
    python tests/bench/load_checkpoint.py

transformers saves the folder, with random weights (0.8 GB, in a temporary place). Each row is a process of its own;
the file is read once beforehand, so that neither pays for the disk. Peak memory is that of the process while it loads,
less what it held before: resident pages, mapped pages of the file included.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
MEGABYTE = 2**20


def save(folder):
    import transformers as hf

    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(), hf.BertConfig())
    hf.VisionTextDualEncoderModel(config).save_pretrained(folder)


def load(library, folder):
    """Load once; print seconds, and the peak above what the imports took, in bytes."""
    if library == "dualenc":
        from dualenc import DualEncoder as model_class
    else:
        from transformers import VisionTextDualEncoderModel as model_class
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model = model_class.from_pretrained(folder)
    # transformers may leave weights in the mapped file: touch them all, as the first forward pass would.
    sum(float(weight.detach().sum()) for weight in model.parameters())
    seconds = time.perf_counter() - began
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def main():
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "save", folder], check=True, stderr=subprocess.DEVNULL)
        size = (Path(folder) / "model.safetensors").stat().st_size
        (Path(folder) / "model.safetensors").read_bytes()
        print(f"weights {size / MEGABYTE:.0f} MB")
        for library in ("dualenc", "transformers") * 3:
            out = subprocess.run(
                [sys.executable, __file__, library, folder], check=True, capture_output=True, text=True
            ).stdout
            seconds, peak = map(float, out.split()[-2:])
            print(
                f"{library:<13} {seconds:5.2f} s   peak {peak / MEGABYTE:5.0f} MB = {peak / size:.2f} copies",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "save":
        save(sys.argv[2])
    else:
        load(*sys.argv[1:])
