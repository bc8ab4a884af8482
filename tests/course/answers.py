"""Answers to the exercises as students write them, and tempting mistakes.

ANSWERS  {number: source}  right, and written unlike the library's
WRONG    {number: {mistake as a test must name it: (old, new)}}  one edit of the answer, or several
"""

ANSWERS = {
    1: """
def clip_loss(image_embeds, text_embeds, logit_scale):
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(f"shapes {image_embeds.shape} and {text_embeds.shape} differ")
    logits = (image_embeds @ text_embeds.t()) * torch.exp(logit_scale)
    by_image = -logits.log_softmax(dim=1).diagonal().mean()
    by_text = -logits.log_softmax(dim=0).diagonal().mean()
    return 0.5 * (by_image + by_text)
""",
    2: """
class DualEncoder(nn.Module):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, token_type_ids=None,
                position_ids=None, return_loss=False, output_hidden_states=False,
                output_attentions=False):
        flags = dict(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        vision = text = image_embeds = text_embeds = logits = loss = None
        if pixel_values is None and input_ids is None:
            raise ValueError("nothing to encode")
        if pixel_values is not None:
            vision = self.vision_model(pixel_values, **flags)
            image_embeds = self._normalize(self.visual_projection(vision.pooler_output))
        if input_ids is not None:
            args = (input_ids, attention_mask, token_type_ids, position_ids)
            text = self.text_model(*args, **flags)
            text_embeds = self._normalize(self.text_projection(text.pooler_output))
        if vision is not None and text is not None:
            logits = image_embeds @ text_embeds.T * torch.exp(self.logit_scale)
        if return_loss:
            if logits is None:
                raise ValueError("return_loss needs both sides")
            loss = clip_loss(image_embeds, text_embeds, self.logit_scale)
        flipped = None if logits is None else logits.T
        return DualEncoderOutput(loss, logits, flipped, text_embeds, image_embeds, text, vision)

    def _normalize(self, features):
        features = features.to(self.logit_scale.dtype)
        return features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
""",
    3: """
def masked_attention(query, key, value, mask=None, dropout=0.0, return_weights=False):
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = torch.where(mask, scores, -float("inf"))
        else:
            scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, dropout)
    return weights @ value, (weights if return_weights else None)
""",
    4: """
def masked_mean(hidden, attention_mask=None):
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    total = (hidden * mask).sum(1)
    count = mask.sum(1)
    return total / count
""",
    5: """
def positions_after_pad(input_ids, pad_token_id):
    mask = input_ids.ne(pad_token_id).int()
    count = torch.cumsum(mask, dim=1)
    return (count * mask).long() + pad_token_id
""",
    6: """
def learning_rate(step, steps, warmup, peak):
    n = max(round(steps * warmup), 1)
    if step < n:
        return peak * (step + 1) / n
    done = (step - n) / max(steps - n, 1)
    return peak * (1 + math.cos(math.pi * done)) / 2
""",
    7: """
def ranks(image_embeds, text_embeds, right, rows=1024):
    scores = image_embeds @ text_embeds.T
    correct = torch.zeros(scores.shape, dtype=torch.bool)
    correct[right[:, 0], right[:, 1]] = True
    if not correct.any(1).all():
        raise ValueError("an image has no right answer")
    found = []
    for dim in (1, 0):
        best = scores.masked_fill(~correct, -torch.inf).amax(dim=dim, keepdim=True)
        found.append(1 + (~(scores < best - 1e-6) & ~correct).sum(dim=dim))
    return found
""",
    8: """
def class_embeds(model, classes, templates, precision="fp32", batch_size=EVAL_BATCH):
    rows = []
    for name in classes:
        texts = [template.replace("{}", name) for template in templates]
        embeds = embed_captions(model, texts, precision, batch_size)
        mean = embeds.mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)
""",
    9: """
class TiledLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, tile):
        rows = images.new_full((len(images),), -torch.inf)
        columns = texts.new_full((len(texts),), -torch.inf)
        for i in range(0, len(rows), tile):
            for j in range(0, len(columns), tile):
                scores = images[i : i + tile] @ texts[j : j + tile].T
                rows[i : i + tile] = torch.logaddexp(rows[i : i + tile], scores.logsumexp(1))
                columns[j : j + tile] = torch.logaddexp(columns[j : j + tile], scores.logsumexp(0))
        ctx.tile = tile
        ctx.save_for_backward(images, texts, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx, grad_rows, grad_columns):
        images, texts, rows, columns = ctx.saved_tensors
        tile = ctx.tile
        grad_images, grad_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for i in range(0, len(rows), tile):
            for j in range(0, len(columns), tile):
                scores = images[i : i + tile] @ texts[j : j + tile].T
                of_rows = (scores - rows[i : i + tile, None]).exp() * grad_rows[i : i + tile, None]
                of_columns = (scores - columns[j : j + tile]).exp() * grad_columns[j : j + tile]
                grad = of_rows + of_columns
                grad_images[i : i + tile] += grad @ texts[j : j + tile]
                grad_texts[j : j + tile] += grad.T @ images[i : i + tile]
        return grad_images, grad_texts, None
""",
    10: """
class MicroBatches(nn.Module):
    def forward(self, images, captions):
        B, n = len(images), self.size
        if n < 1 or B <= n:
            return self.embed(images, captions)
        sides = [], []
        for i in range(0, B, n):
            texts = {name: rows[i : i + n] for name, rows in captions.items()}
            piece = (images[i : i + n], texts)
            embeds = checkpoint(self.embed, *piece, use_reentrant=False)
            for side, rows in zip(sides, embeds):
                side.append(rows)
        return tuple(torch.cat(side) for side in sides)
""",
    11: """
class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows.detach())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
""",
    12: """
class DualEncoder(nn.Module):
    def lock(self, tower):
        names = {"both": ["vision", "text"]}.get(tower, [tower])
        if not set(names) <= {"vision", "text"}:
            raise ValueError(f"unknown tower to lock {tower!r}")
        for name in names:
            self.locked.add(name)
            for weight in getattr(self, name + "_model").parameters():
                weight.requires_grad = False
            getattr(self, name + "_model").eval()
        return self

    def train(self, mode=True):
        nn.Module.train(self, mode)
        for name in ("vision", "text"):
            if name in self.locked:
                getattr(self, name + "_model").train(False)
        return self
""",
}

_NO_LOG_SOFTMAX = [
    (f"logits.log_softmax(dim={d})", f"(logits.exp() / logits.exp().sum({d}, keepdim=True)).log()")
    for d in (0, 1)
]
_SCALE = "torch.exp(logit_scale)"
_DROPOUT = "nn.functional.dropout(weights, dropout)"
_ROWS = "rows[i : i + tile]"
_NO_LOGARITHMS = f"({_ROWS}.exp() + scores.exp().sum(1)).log()"
_LOGADDEXP = f"torch.logaddexp({_ROWS}, scores.logsumexp(1))"
_ALL_REDUCE = "torch.distributed.all_reduce(grad)"
_IN_NO_GRAD = "embeds = torch.no_grad()(self.embed)(*piece)"
_EACH_PIECE = "embeds = checkpoint(self.embed, *piece, use_reentrant=False)"

WRONG = {
    1: {
        "a mean over the whole matrix": ("diagonal().mean()", "diagonal().sum() / logits.numel()"),
        "clamped: train.py does": (_SCALE, f"{_SCALE}.clamp(max=100)"),
        "it runs on the CPU only": (
            "-logits.log_softmax(dim=1).diagonal().mean()",
            "nn.functional.cross_entropy(logits, torch.arange(len(logits)))",
        ),
        "one direction only": ("0.5 * (by_image + by_text)", "by_image"),
        "no transpose for the second direction": ("log_softmax(dim=0)", "log_softmax(dim=1)"),
        "logit_scale used without exp": (_SCALE, "logit_scale"),
        "no temperature": (" * torch.exp(logit_scale)", ""),
        "sum over the batch, not mean": (".mean()", ".sum()"),
        "was it detached": (_SCALE, "math.exp(logit_scale.item())"),
        "exp of a logit of 100 overflows float32": _NO_LOG_SOFTMAX,
    },
    2: {
        "the norm was detached": ("features.norm(", "features.detach().norm("),
        "a tower ran 2 times": (
            "image_embeds = self._norm",
            "self.vision_model(pixel_values, **flags)\n            image_embeds = self._norm",
        ),
        "logits_per_image .* without exp": ("torch.exp(self.logit_scale)", "self.logit_scale"),
        "image_embeds .* normalised over the batch": ("dim=-1", "dim=0"),
        "logits_per_text .* not transposed": ("else logits.T", "else logits"),
        "0 / 0": (".clamp(min=1e-12)", ""),
        "back to float32": ("features = features.to(self.logit_scale.dtype)", "pass"),
        "did not get token_type_ids": ("token_type_ids, position_ids)", "None, position_ids)"),
    },
    3: {
        "mask was changed in place": ("torch.where(mask,", "torch.where(~mask.logical_not_(),"),
        "the mask is not used": ("if mask is not None:", "if False:"),
        "inverted mask": ("torch.where(mask,", "torch.where(~mask,"),
        "not divided by the root of the head size": (" / query.shape[-1] ** 0.5", ""),
        "by the head size, not by its root": ("** 0.5", "** 1"),
        "softmax over the wrong axis": ("softmax(scores, dim=-1)", "softmax(scores, dim=-2)"),
        "weights set to 0 after the softmax": [
            ('scores = torch.where(mask, scores, -float("inf"))', "pass"),
            (_DROPOUT, "weights * (1 if mask is None else mask)"),
        ],
        "numbers used as yes and no": ("scores + mask", "torch.where(mask.bool(), scores, -1e9)"),
        "dropout does nothing": (f"weights = {_DROPOUT}", "pass"),
    },
    4: {
        "the axis of the batch is gone": ("total / count", "(total / count).squeeze()"),
        "mean over padding too": ("return total / count", "return hidden.mean(1)"),
        "padding left out of the sum, but": ("count = mask.sum(1)", "count = hidden.shape[1]"),
        "real tokens of the whole batch": ("count = mask.sum(1)", "count = mask.sum()"),
        "inverted mask": ("= attention_mask.unsqueeze(-1)", "= (1 - attention_mask).unsqueeze(-1)"),
        "hidden states, .* mask give": (".to(hidden.dtype)", ".float()"),
    },
    5: {
        "counted in int8": ("torch.cumsum(mask, dim=1)", "torch.cumsum(mask, 1, dtype=torch.int8)"),
        "shifted by one, too low": ("+ pad_token_id", "+ pad_token_id - 1"),
        "padding goes on counting": ("(count * mask)", "count"),
        "counted down the batch": ("dim=1", "dim=0"),
        "pad_token_id taken to be 1": [("ne(pad_token_id)", "ne(1)"), ("+ pad_token_id", "+ 1")],
    },
    6: {
        "the first step gets nothing": ("(step + 1) / n", "step / n"),
        "a line down, not a cosine": ("(1 + math.cos(math.pi * done)) / 2", "(1 - done)"),
        "not halved: twice the peak": (") / 2", ")"),
        "counts from step 0": ("(step - n) / max(steps - n, 1)", "step / steps"),
        "as long as the whole run": ("max(steps - n, 1)", "steps"),
        "a number of steps": ("round(steps * warmup)", "round(warmup)"),
    },
    7: {
        "scored 0, not lowest": ("scores.masked_fill(~correct, -torch.inf)", "(scores * correct)"),
        "near scores taken for ties": ("best - 1e-6", "best - 1e-3"),
        "rounding are no tie": ("best - 1e-6", "best"),
        "counted from 0": ("append(1 + (", "append(("),
        "the worst right answer, not": (", -torch.inf).amax", ", torch.inf).amin"),
        "lowest score first": ("scores = image_embeds", "scores = -image_embeds"),
        "ties count for the model": ("~(scores < best - 1e-6)", "(scores > best + 1e-6)"),
        "nan counts for the model": ("~(scores < best - 1e-6)", "(scores >= best - 1e-6)"),
        "right answers count as rivals": (" & ~correct", ""),
    },
    8: {
        "not normalised after the mean": ("mean / mean.norm()", "mean"),
        "first template only": ("embeds.mean(dim=0)", "embeds[0]"),
        "templates are filled in wrongly": ('template.replace("{}", name)', "template + name"),
        "classes in another order": ("for name in classes", "for name in sorted(classes)"),
        "a row a caption, not averaged": ("rows.append(mean / mean.norm())", "rows.extend(embeds)"),
    },
    9: {
        "sums start at 0, not at minus infinity": ("-torch.inf", "0.0"),
        "the last tile only": (_LOGADDEXP, "scores.logsumexp(1)"),
        "the largest tile only": ("torch.logaddexp(rows", "torch.maximum(rows"),
        "only rows count, not columns": ("of_rows + of_columns", "of_rows"),
        "a forgotten outer gradient": [
            (" * grad_rows[i : i + tile, None]", ""),
            (" * grad_columns[j : j + tile]", ""),
        ],
        "no gradient reaches texts": ("return grad_images, grad_texts", "return grad_images, None"),
        "exp of 100 overflows float32": (_LOGADDEXP, _NO_LOGARITHMS),
        "not tiled": ("tile = ctx.tile", "tile = 999"),
    },
    10: {
        "no checkpoint": (_EACH_PIECE, "embeds = self.embed(*piece)"),
        "came a piece at a time": [
            ("use_reentrant=False", "use_reentrant=True"),
            ("(images[i : i + n], ", "(images[i : i + n].clone().requires_grad_(), "),
        ],
        "state is not restored": ("=False)", "=False, preserve_rng_state=False)"),
        "in evaluation mode": (_EACH_PIECE, f"self.model.eval()\n            {_EACH_PIECE}"),
        "was a piece embedded in no_grad": (_EACH_PIECE, _IN_NO_GRAD),
        "pieces in the wrong order": ("side.append(rows)", "side.insert(0, rows)"),
        "the last piece is left out": ("range(0, B, n)", "range(0, B - n + 1, n)"),
        "the last piece only": ("torch.cat(side)", "side[-1]"),
        "calls with pieces of": ("B <= n", "B < n"),
    },
    11: {
        "only this process's loss counts": (_ALL_REDUCE, "pass"),
        "the incoming gradient was changed": ("grad = grad.clone()", "grad = grad.contiguous()"),
        "own rows only": ("return torch.cat(parts)", "return rows.clone()"),
        "ranks in the wrong order": ("torch.cat(parts)", "torch.cat(parts[::-1])"),
        "divided by the process count": (_ALL_REDUCE, f"{_ALL_REDUCE}\n        grad = grad / 2"),
    },
    12: {
        "batch norm are weights too": ("if name in self.locked", "if False"),
        "its dropout and batch": ('getattr(self, name + "_model").eval()\n', "pass\n"),
        "still requires a gradient": ("requires_grad = False", "requires_grad = True"),
        "more than the tower": ('getattr(self, name + "_model").parameters', "self.parameters"),
        "train returns None": ("train(False)\n        return self", "train(False)"),
    },
}
