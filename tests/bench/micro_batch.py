"""A large batch in pieces (dualenc.MicroBatches, which train.py --micro-batch uses), and at once.

    python tests/bench/micro_batch.py                        # 1,024 pairs in pieces of 64, float32

Both fill the gradients of the same model. Memory is the peak of a process of its own, beyond model
and batch; the error is that of the gradient of all weights, norm of the difference over norm.
"""

import common
import torch

import dualenc


def make_way(name, preset, pairs, size):
    """(model, a function that fills its gradients from a batch)."""
    preset = common.PRESETS[preset]._replace(batch=pairs)
    model, (images, _, inputs) = common.our_model(preset), common.batch_of(preset)
    embed = dualenc.MicroBatches(model, size if name == "checkpointed" else 0)

    def way():
        model.zero_grad()
        dualenc.clip_loss(*embed(images, inputs), model.logit_scale).backward()

    return model, way


def memory_and_gradient(name, preset, pairs, size):
    """(extra megabytes, the gradient of all weights)."""
    make_way(name, preset, 2 * size, size)[1]()  # what a first pass alone allocates
    model, way = make_way(name, preset, pairs, size)
    memory = common.peak_megabytes(way)
    return memory, torch.cat([w.grad.flatten() for w in model.parameters()]).numpy()


def main():
    parser = common.flag_parser(__doc__, rounds=2)
    parser.add_argument("--pairs", type=int, default=1024, help="of the whole batch")
    parser.add_argument("--micro-batch", type=int, default=64, help="pairs of a piece")
    args = parser.parse_args()
    common.print_head()
    sizes, cells = (args.preset, args.pairs, args.micro_batch), {}
    names = ["whole", "checkpointed"]
    found = {name: common.in_child(memory_and_gradient, name, *sizes) for name in names}
    seconds = common.alternate({name: make_way(name, *sizes)[1] for name in names}, args.rounds)
    right = found["whole"][1]
    for name, (memory, gradient) in found.items():
        error = (((gradient - right) ** 2).sum() / (right**2).sum()) ** 0.5
        cells[name] = [f"{memory:,.0f}", f"{error:.1e}"]
    title = f"{args.pairs:,} pairs in pieces of {args.micro_batch}"
    common.print_times(title, seconds, ["extra MB", "gradient off by"], cells)


if __name__ == "__main__":
    main()
