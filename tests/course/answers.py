"""Answers to the exercises as students write them, and what tempts them to write otherwise.

ANSWERS  {number: source}  right, and unlike the library's
WRONG    {number: {mistake as a test must name it: (old, new)}}  one edit of the answer, or several
"""

ANSWERS = {
    1: """
def clip_loss(image_embeds, text_embeds, logit_scale):
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(f"shapes {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)} differ")
    logits = (image_embeds @ text_embeds.t()) * torch.exp(logit_scale)
    by_image = -logits.log_softmax(dim=1).diagonal().mean()
    by_text = -logits.log_softmax(dim=0).diagonal().mean()
    return 0.5 * (by_image + by_text)
""",
    2: """
class DualEncoder(nn.Module):
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        return_loss=False,
        output_hidden_states=False,
        output_attentions=False,
    ):
        flags = dict(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        vision = text = image_embeds = text_embeds = logits = loss = None
        if pixel_values is None and input_ids is None:
            raise ValueError("nothing to encode")
        if pixel_values is not None:
            vision = self._run_tower("vision", pixel_values, **flags)
            image_embeds = self._normalize(self.visual_projection(vision.pooler_output))
        if input_ids is not None:
            text = self._run_tower("text", input_ids, attention_mask, token_type_ids, position_ids, **flags)
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
def ranks(image_embeds, text_embeds, image_groups, text_groups, tile=1024):
    scores = image_embeds @ text_embeds.T
    right = image_groups[:, None] == text_groups[None, :]
    if not right.any(1).all() or not right.any(0).all():
        raise ValueError("a query has no right answer")
    found = []
    for way, correct in ((scores, right), (scores.T, right.T)):
        best = way.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
        rivals = ~(way < best) & ~correct
        found.append(1 + rivals.sum(dim=1))
    return tuple(found)
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
    def forward(ctx, image_embeds, text_embeds, logit_scale, tile):
        scale = logit_scale.exp()
        rows = image_embeds.new_full((len(image_embeds),), -torch.inf)
        columns = text_embeds.new_full((len(text_embeds),), -torch.inf)
        for i in range(0, len(rows), tile):
            for j in range(0, len(columns), tile):
                scores = scale * image_embeds[i : i + tile] @ text_embeds[j : j + tile].T
                rows[i : i + tile] = torch.logaddexp(rows[i : i + tile], scores.logsumexp(1))
                columns[j : j + tile] = torch.logaddexp(columns[j : j + tile], scores.logsumexp(0))
        ctx.tile = tile
        ctx.save_for_backward(image_embeds, text_embeds, logit_scale, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx, grad_rows, grad_columns):
        image_embeds, text_embeds, logit_scale, rows, columns = ctx.saved_tensors
        scale, tile = logit_scale.exp(), ctx.tile
        grad_images, grad_texts = torch.zeros_like(image_embeds), torch.zeros_like(text_embeds)
        grad_scale = torch.zeros_like(logit_scale)
        for i in range(0, len(rows), tile):
            for j in range(0, len(columns), tile):
                images, texts = image_embeds[i : i + tile], text_embeds[j : j + tile]
                scores = scale * images @ texts.T
                of_rows = (scores - rows[i : i + tile, None]).exp() * grad_rows[i : i + tile, None]
                of_columns = (scores - columns[j : j + tile]).exp() * grad_columns[j : j + tile]
                grad = of_rows + of_columns
                grad_images[i : i + tile] += scale * grad @ texts
                grad_texts[j : j + tile] += scale * grad.T @ images
                grad_scale += (grad * scores).sum()
        return grad_images, grad_texts, grad_scale, None
""",
    10: """
def cached_backward(embed, pieces, loss_of, loss_weights=()):
    states, images, texts = [], [], []
    restore = remember_buffers(embed)
    for piece in pieces:
        states.append(torch.get_rng_state())
        with torch.no_grad():
            image, text = embed(piece)
        images.append(image)
        texts.append(text)
    restore()
    all_images, all_texts = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
    loss = loss_of(all_images, all_texts)
    grad_images, grad_texts, *grads = torch.autograd.grad(loss, [all_images, all_texts, *loss_weights])
    sizes = [len(image) for image in images]
    parts = zip(grad_images.split(sizes), grad_texts.split(sizes))
    after = torch.get_rng_state()
    for i, (piece, (image_grad, text_grad)) in enumerate(zip(pieces, parts)):
        torch.set_rng_state(states[i])
        last = i == len(pieces) - 1
        waiting = nullcontext() if last or not hasattr(embed, "no_sync") else embed.no_sync()
        with waiting:
            outputs = list(embed(piece))
            gradients = [image_grad, text_grad]
            if last:
                outputs += loss_weights
                gradients += grads
            learned = [(out, grad) for out, grad in zip(outputs, gradients) if out.requires_grad]
            torch.autograd.backward(*zip(*learned))
    torch.set_rng_state(after)
    return loss.detach(), all_images.detach(), all_texts.detach()
""",
    11: """
class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        count, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        parts = [None] * count
        torch.distributed.all_gather_object(parts, rows.detach())
        ctx.start = sum(len(part) for part in parts[:rank])
        ctx.length = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad, op=torch.distributed.ReduceOp.SUM)
        return grad[ctx.start : ctx.start + ctx.length]
""",
    12: """
class DualEncoder(nn.Module):
    def lock(self, tower):
        if tower not in ("vision", "text"):
            raise ValueError(f"unknown tower to lock {tower!r}")
        self.locked.add(tower)
        for weight in self._tower(tower).parameters():
            weight.requires_grad = False
        self._tower(tower).eval()
        return self

    def train(self, mode=True):
        nn.Module.train(self, mode)
        for name in ("vision", "text"):
            if name in self.locked:
                self._tower(name).train(False)
        return self
""",
}

WRONG = {
    1: {
        "a mean over the whole matrix, not over its diagonal": (
            "diagonal().mean()",
            "diagonal().sum() / logits.numel()",
        ),
        "exp was taken twice": ("torch.exp(logit_scale)", "logit_scale.exp().exp()"),
        "take log_softmax or logsumexp": (
            ("logits.log_softmax(dim=1)", "logits.softmax(dim=1).log()"),
            ("logits.log_softmax(dim=0)", "logits.softmax(dim=0).log()"),
        ),
        "clamped: train.py does that": ("torch.exp(logit_scale)", "torch.exp(logit_scale).clamp(max=100)"),
        "it runs on the CPU only": (
            "-logits.log_softmax(dim=1).diagonal().mean()",
            "nn.functional.cross_entropy(logits, torch.arange(len(logits)))",
        ),
        "one direction only": ("0.5 * (by_image + by_text)", "by_image"),
        "one direction only, text to image": ("0.5 * (by_image + by_text)", "by_text"),
        "no transpose for the second direction": ("log_softmax(dim=0)", "log_softmax(dim=1)"),
        "logit_scale used without exp": ("torch.exp(logit_scale)", "logit_scale"),
        "divided by exp\\(logit_scale\\), not multiplied": ("* torch.exp(", "/ torch.exp("),
        "no temperature": (" * torch.exp(logit_scale)", ""),
        "both directions added, not averaged": ("0.5 * (", "("),
        "sum over the batch, not mean": (".mean()", ".sum()"),
        "the sign is the other way round": ("-logits", "logits"),
        "one softmax over the whole matrix": (
            ("logits.log_softmax(dim=1)", "logits.flatten().log_softmax(dim=0).view_as(logits)"),
            ("logits.log_softmax(dim=0)", "logits.flatten().log_softmax(dim=0).view_as(logits)"),
        ),
        "no gradient reaches logit_scale: was it detached": ("torch.exp(logit_scale)", "math.exp(logit_scale.item())"),
        "exp of a logit of 100 overflows float32": (
            ("logits.log_softmax(dim=1)", "(logits.exp() / logits.exp().sum(1, keepdim=True)).log()"),
            ("logits.log_softmax(dim=0)", "(logits.exp() / logits.exp().sum(0, keepdim=True)).log()"),
        ),
        "DID NOT RAISE": ('raise ValueError(f"shapes', 'print(f"shapes'),
    },
    2: {
        "image_embeds .* the first token of last_hidden_state": (
            "vision.pooler_output",
            "vision.last_hidden_state[:, 0]",
        ),
        "image_embeds .* divided by the square of the norm": (".clamp(min=1e-12)", ".clamp(min=1e-12).square()"),
        "the norm was detached": ("features.norm(", "features.detach().norm("),
        "a locked tower got gradients: run towers by _run_tower": ('self._run_tower("text", ', "self.text_model("),
        "a tower ran 2 times": (
            "image_embeds = self._norm",
            'self._run_tower("vision", pixel_values, **flags)\n            image_embeds = self._norm',
        ),
        "logits_per_image .* logit_scale used without exp": ("torch.exp(self.logit_scale)", "self.logit_scale"),
        "logits_per_image .* divided by exp": ("T * torch.exp", "T / torch.exp"),
        "logits_per_image .* no temperature": (" * torch.exp(self.logit_scale)", ""),
        "image_embeds .* no unit norm": (" / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)", ""),
        "image_embeds .* normalised over the batch": ("dim=-1", "dim=0"),
        "image_embeds .* sums of 1": ("features.norm(", "features.norm(p=1, "),
        "logits_per_text .* not transposed": ("else logits.T", "else logits"),
        "logits_per_image .* transposed": ("image_embeds @ text_embeds.T", "(text_embeds @ image_embeds.T)"),
        "0 / 0": (".clamp(min=1e-12)", ""),
        "exp was taken twice": ("text_embeds, self.logit_scale)", "text_embeds, self.logit_scale.exp())"),
        "back to float32": ("features = features.to(self.logit_scale.dtype)", "pass"),
        "a locked tower got gradients": ('self._run_tower("vision", ', "self.vision_model("),
        "the text tower did not get token_type_ids": (
            "attention_mask, token_type_ids, position_ids, **",
            "attention_mask, **",
        ),
        "no gradient reaches logit_scale": ("torch.exp(self.logit_scale)", "torch.exp(self.logit_scale).item()"),
    },
    3: {
        "divided by the root of the number of heads": ("query.shape[-1] **", "query.shape[1] **"),
        "divided by the root of the number of tokens": ("query.shape[-1] **", "key.shape[2] **"),
        "the share to keep was taken for the share to drop": (
            "nn.functional.dropout(weights, dropout)",
            "nn.functional.dropout(weights, 1 - dropout) if dropout else weights",
        ),
        "were they detached": ("scores + mask", "scores + mask.detach()"),
        "mask was changed in place": ("torch.where(mask, scores", "torch.where(~mask.logical_not_(), scores"),
        "the mask is not used": ("if mask is not None:", "if False:"),
        "inverted mask": ("torch.where(mask,", "torch.where(~mask,"),
        "not divided by the root of the head size": (" / query.shape[-1] ** 0.5", ""),
        "divided by the head size, not by its root": ("** 0.5", "** 1"),
        "divided by the root of the whole width": ("query.shape[-1] **", "(query.shape[1] * query.shape[-1]) **"),
        "softmax over the wrong axis": ("torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-2)"),
        "weights set to 0 after the softmax": (
            ('scores = torch.where(mask, scores, -float("inf"))', "pass"),
            ("nn.functional.dropout(weights, dropout)", "weights * (1 if mask is None else mask)"),
        ),
        "the mask added as 1 and 0": ('torch.where(mask, scores, -float("inf"))', "scores + mask.to(scores.dtype)"),
        "no softmax": (
            ('-float("inf")', "0"),
            ("torch.softmax(scores, dim=-1)", "scores"),
        ),
        "numbers used as yes and no": ("scores = scores + mask", "scores = torch.where(mask.bool(), scores, -1e9)"),
        "only whether a key may be seen is used": ("scores + mask", "torch.where(mask > -1e9, scores, -1e9)"),
        "exp overflows on large scores": (
            "torch.softmax(scores, dim=-1)",
            "scores.exp() / scores.exp().sum(-1, keepdim=True)",
        ),
        "scores, before the softmax": ("(weights if return_weights", "(scores if return_weights"),
        "half of the weights are dropped and the other half doubled": (
            ("nn.functional.dropout(weights, dropout)", "weights"),
            (
                "return weights @ value",
                "weights = nn.functional.dropout(weights, dropout) * (1 - dropout)\n    return weights @ value",
            ),
        ),
        "dropout does nothing": ("weights = nn.functional.dropout(weights, dropout)", "pass"),
    },
    4: {
        "the axis of the batch is gone": ("total / count", "(total / count).squeeze()"),
        "mean over padding too": ("return total / count", "return hidden.mean(1)"),
        "padding left out of the sum, but counted": ("count = mask.sum(1)", "count = hidden.shape[1]"),
        "sum, not mean": ("total / count", "total"),
        "divided by the real tokens of the whole batch": ("count = mask.sum(1)", "count = mask.sum()"),
        "first token, not mean": ("total / count", "hidden[:, 0]"),
        "inverted mask": ("mask = attention_mask.unsqueeze(-1)", "mask = (1 - attention_mask).unsqueeze(-1)"),
        "all captions together": ("return total / count", "return (total.sum(0) / count.sum()).expand_as(total)"),
        "mean over the wrong axis": ("(hidden * mask).sum(1)", "(hidden * mask).sum(2)"),
        "hidden states under a .* mask give": (".to(hidden.dtype)", ".float()"),
        "inputs were changed": ("(hidden * mask).sum(1)", "hidden.mul_(mask).sum(1)"),
    },
    5: {
        "counted in int8": (("torch.cumsum(mask, dim=1)", "torch.cumsum(mask, dim=1, dtype=torch.int8)"),),
        "shifted by one, too low": ("+ pad_token_id", "+ pad_token_id - 1"),
        "shifted by one, too high": ("+ pad_token_id", "+ pad_token_id + 1"),
        "columns counted, padding too": (
            "return (count * mask).long() + pad_token_id",
            "return torch.arange(mask.shape[1]).expand(mask.shape) + 0",
        ),
        "columns counted from pad_token_id \\+ 1": (
            "count = torch.cumsum(mask, dim=1)",
            "return torch.arange(mask.shape[1]).expand(mask.shape) + pad_token_id + 1",
        ),
        "padding goes on counting": ("(count * mask)", "count"),
        "padding at 0, not at pad_token_id": (
            "(count * mask).long() + pad_token_id",
            "((count + pad_token_id) * mask).long()",
        ),
        "counted down the batch": ("dim=1", "dim=0"),
        "padding counted, real tokens not": (".ne(", ".eq("),
        "columns counted, on real tokens": ("torch.cumsum(mask, dim=1)", "torch.arange(1, mask.shape[1] + 1)"),
        "pad_token_id taken to be 1": (("ne(pad_token_id)", "ne(1)"), ("+ pad_token_id", "+ 1")),
        "positions are torch.int32": (".long()", ".int()"),
    },
    6: {
        "the first step gets nothing": ("(step + 1) / n", "step / n"),
        "a line down, not a cosine": ("(1 + math.cos(math.pi * done)) / 2", "(1 - done)"),
        "a quarter of a cosine": ("(1 + math.cos(math.pi * done)) / 2", "math.cos(math.pi * done / 2)"),
        "a whole cosine, which rises again": ("math.pi * done", "2 * math.pi * done"),
        "not halved: twice the peak": (") / 2", ")"),
        "no 1 added: rates below 0": ("(1 + math.cos(math.pi * done)) / 2", "math.cos(math.pi * done)"),
        "counts from step 0": ("(step - n) / max(steps - n, 1)", "step / steps"),
        "as long as the whole run": ("max(steps - n, 1)", "steps"),
        "no warm-up": (("if step < n", "if False"), ("(step - n) / max(steps - n, 1)", "step / steps")),
        "warm-up taken as a number of steps": ("round(steps * warmup)", "round(warmup)"),
        "peak does not count": (("return peak * (step + 1)", "return (step + 1)"), ("return peak * (1", "return (1")),
        "ZeroDivisionError": ("max(steps - n, 1)", "(steps - n)"),
    },
    7: {
        "wrong answers were scored 0, not lowest": ("way.masked_fill(~correct, -torch.inf)", "(way * correct)"),
        "near scores taken for ties": ("(way < best)", "(way < best - 1e-3)"),
        "nan counts as the lowest score": (
            "image_embeds @ text_embeds.T",
            "(image_embeds @ text_embeds.T).nan_to_num(-9)",
        ),
        "of 80 pictures and 159 captions": (
            "image_embeds @",
            "image_embeds / image_embeds.norm(dim=1, keepdim=True) @",
        ),
        "counted from 0": ("1 + rivals.sum", "rivals.sum"),
        "only a picture's first caption counts": (
            "    found = []\n",
            "    right &= right.cumsum(1) == 1\n    found = []\n",
        ),
        "the worst right answer, not the best": (
            ".masked_fill(~correct, -torch.inf).amax",
            ".masked_fill(~correct, torch.inf).amin",
        ),
        "caption i taken for picture i": (
            "best = way.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)",
            "best, correct = way.diagonal()[: len(way), None], torch.eye(*way.shape).bool()\n"
            "        best = best if len(best) == len(way) else way[:, :1]",
        ),
        "lowest score first": ("scores = image_embeds @ text_embeds.T", "scores = -(image_embeds @ text_embeds.T)"),
        "ties count for the model": ("~(way < best)", "(way > best)"),
        "nan counts for the model": ("~(way < best)", "(way >= best)"),
        "DID NOT RAISE": ('raise ValueError("a query has no right answer")', "pass"),
        "ranks are torch.float32": ("1 + rivals.sum(dim=1)", "1 + rivals.float().sum(dim=1)"),
    },
    8: {
        "not normalised after the mean": ("mean / mean.norm()", "mean"),
        "first template only": ("embeds.mean(dim=0)", "embeds[0]"),
        "last template only": ("embeds.mean(dim=0)", "embeds[-1]"),
        "templates are filled in wrongly": ('template.replace("{}", name)', "template + name"),
        "classes in another order": ("for name in classes", "for name in sorted(classes)"),
        "a row a caption, not averaged": (("rows.append(mean / mean.norm())", "rows.extend(embeds)"),),
        "embed_captions got other options": ("texts, precision, batch_size", "texts"),
    },
    9: {
        "every tile kept": (
            ("ctx.tile = tile", "ctx.tile, ctx.kept = tile, kept"),
            ("        rows = image", "        kept = []\n        rows = image"),
            (
                "                rows[i : i + tile] = torch",
                "                kept.append(scores)\n                rows[i : i + tile] = torch",
            ),
        ),
        "sums start at 0, not at minus infinity": ("-torch.inf", "0.0"),
        "the incoming gradients were changed in place": (
            "        return grad_images",
            "        grad_rows.zero_()\n        return grad_images",
        ),
        "the last tile only": ("torch.logaddexp(rows[i : i + tile], scores.logsumexp(1))", "scores.logsumexp(1)"),
        "sums of tiles added after the logarithm": (
            ("torch.logaddexp(rows[i : i + tile], scores.logsumexp(1))", "rows[i : i + tile] + scores.logsumexp(1)"),
            (
                "rows = image_embeds.new_full((len(image_embeds),), -torch.inf)",
                "rows = image_embeds.new_zeros(len(image_embeds))",
            ),
        ),
        "the largest tile only": ("torch.logaddexp(rows[i : i + tile]", "torch.maximum(rows[i : i + tile]"),
        "logit_scale used without exp": ("scale = logit_scale.exp()\n", "scale = logit_scale\n"),
        "no temperature": ("scores = scale * image_embeds", "scores = image_embeds"),
        "no logarithm": (("return rows, columns", "return rows.exp(), columns.exp()"),),
        "only rows count, not columns": ("of_rows + of_columns", "of_rows"),
        "only columns count, not rows": ("of_rows + of_columns", "of_columns"),
        "a forgotten outer gradient": ((" * grad_rows[i : i + tile, None]", ""), (" * grad_columns[j : j + tile]", "")),
        "exp\\(logit_scale\\) left out": ("+= scale * grad @ texts", "+= grad @ texts"),
        "exp\\(logit_scale\\) counted twice": ("+= scale * grad @ texts", "+= scale**2 * grad @ texts"),
        "gradient of logit_scale .* no gradient": ("grad_scale += (grad * scores).sum()", "pass"),
        "no gradient reaches logit_scale": ("grad_scale, None", "None, None"),
        "exp of 100 overflows float32": (
            (
                "torch.logaddexp(rows[i : i + tile], scores.logsumexp(1))",
                "(rows[i : i + tile].exp() + scores.exp().sum(1)).log()",
            ),
        ),
        "not tiled": (("scale, tile = logit_scale.exp(), ctx.tile", "scale, tile = logit_scale.exp(), len(rows)"),),
    },
    10: {
        "pictures count twice": ("    restore()\n", ""),
        "all graphs are kept: run backward for a piece": (
            ("after = torch.get_rng_state()", "after, everything = torch.get_rng_state(), []"),
            ("torch.autograd.backward(*zip(*learned))", "everything += learned"),
            (
                "    torch.set_rng_state(after)",
                "    torch.autograd.backward(*zip(*everything))\n    torch.set_rng_state(after)",
            ),
        ),
        "the scale got a gradient after": (
            "outputs += loss_weights\n                gradients += grads",
            "for weight, grad in zip(loss_weights, grads):\n                    weight.grad = grad",
        ),
        "the model was left in another mode": ("    sizes = [", '    getattr(embed, "train", dict)()\n    sizes = ['),
        "naive accumulation": (
            "states, images, texts = [], [], []",
            "losses = [loss_of(*embed(piece)) for piece in pieces]\n    sum(losses).backward()\n"
            "    return sum(losses).detach(), *(torch.cat(side).detach() for side in zip(*map(embed, pieces)))",
        ),
        "the loss of the last piece alone": (
            "loss = loss_of(all_images, all_texts)",
            "loss = loss_of(all_images[-len(image):], all_texts[-len(image):])",
        ),
        "the generator's state is not restored": ("torch.set_rng_state(states[i])", "pass"),
        "a fixed seed": (
            ("states.append(torch.get_rng_state())", "torch.manual_seed(len(states))"),
            ("torch.set_rng_state(states[i])", "torch.manual_seed(i)"),
        ),
        "no torch.no_grad": (
            ("with torch.no_grad():", "with nullcontext():"),
            ("torch.cat(images)", "torch.cat(images).detach()"),
            ("torch.cat(texts)", "torch.cat(texts).detach()"),
        ),
        "loss_weights are left out": (("outputs += loss_weights", "pass"), ("gradients += grads", "pass")),
        "a factor of the number of pieces": ("if last:", "if True:"),
        "what is returned still holds a graph": ("return loss.detach()", "return loss"),
        "all pieces but the last belong inside embed.no_sync": ("with waiting:", "with nullcontext():"),
        "the old gradient is overwritten": (
            "    after = torch",
            "    for weight in getattr(embed, 'parameters', list)():\n        weight.grad = None\n    after = torch",
        ),
    },
    11: {
        "the incoming gradient was changed in place": ("grad = grad.clone()", "grad = grad.contiguous()"),
        "own rows only": ("return torch.cat(parts)", "return rows.clone()"),
        "ranks in the wrong order": ("torch.cat(parts)", "torch.cat(parts[::-1])"),
        "own rows first, whatever the rank": ("torch.cat(parts)", "torch.cat([parts[rank], parts[1 - rank]])"),
        "only this process's loss counts": (
            "torch.distributed.all_reduce(grad, op=torch.distributed.ReduceOp.SUM)",
            "pass",
        ),
        "divided by the process count": ("ReduceOp.SUM)", "ReduceOp.SUM)\n        grad = grad / 2"),
        "a factor of the process count": ("ReduceOp.SUM)", "ReduceOp.SUM)\n        grad = grad * 2"),
        "the gradient of the other process's rows": (
            "return grad[ctx.start : ctx.start + ctx.length]",
            "return grad[: ctx.length] if ctx.start else grad[-ctx.length :]",
        ),
        "gathered without autograd": (
            (
                "return torch.cat(parts)",
                "out = torch.cat(parts)\n        ctx.mark_non_differentiable(out)\n        return out",
            ),
        ),
    },
    12: {
        "has unlocked the weights": (
            "nn.Module.train(self, mode)",
            "nn.Module.train(self, mode)\n        self.requires_grad_(True)",
        ),
        "batch-norm statistics are weights too": (
            "if name in self.locked:\n                self._tower(name).train(False)",
            "pass",
        ),
        "its dropout and batch norm are active": ("        self._tower(tower).eval()\n", ""),
        "a locked weight still requires a gradient": ("requires_grad = False", "requires_grad = True"),
        "more than the tower was locked": ("self._tower(tower).parameters()", "self.parameters()"),
        "lock returns None": ("eval()\n        return self", "eval()"),
        "train returns None": ("train(False)\n        return self", "train(False)"),
        "the rest left training mode": ("self._tower(tower).eval()", "self.eval()"),
        "train\\(False\\) is eval|nothing is in training mode": (
            "nn.Module.train(self, mode)",
            "nn.Module.train(self)",
        ),
        "lock put the model into training mode": ("self._tower(tower).eval()", "self.train()"),
        "must not be remembered as locked|DID NOT RAISE": (
            "if tower not in",
            "self.locked.add(tower)\n        if tower not in",
        ),
        "model.locked names the locked towers|statistics are weights": ("        self.locked.add(tower)\n", ""),
    },
}
